# SPDX-License-Identifier: Apache-2.0
"""TLS 1.3 for bulk data between machines, with a certificate that its listener has made for itself.

No authority is needed: who connects was told the certificate beforehand, on a way that is encrypted itself, and takes
this one and no other. Who listens learns inside whether the other one knows a key (`messages.Wire.ask_proof`), so the
certificate is no secret. The private key never leaves the process, and lies in no file.
"""

from __future__ import annotations

import datetime
import os
import socket
import ssl
from dataclasses import dataclass

_NAME = "tokenpool"
_FROM = datetime.datetime(1990, 1, 1, tzinfo=datetime.UTC)
_UNTIL = datetime.datetime(9999, 12, 31, tzinfo=datetime.UTC)
"""It lives as long as its process; clocks of two machines need not agree."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a listener has."""

    certificate: bytes
    """For those who are to connect, in DER."""
    context: ssl.SSLContext
    """With the private key."""

    @classmethod
    def new(cls) -> Identity:
        """A new key and its certificate; takes about a millisecond, and the import of `cryptography`."""
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, _NAME)])
        builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), _FROM, _UNTIL)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        made = builder.sign(key, hashes.SHA256())
        pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
        context = _context(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0  # nobody resumes
        _load(context, made.public_bytes(pem) + private)
        return cls(made.public_bytes(serialization.Encoding.DER), context)

    def accept(self, sock: socket.socket, limit_s: float) -> ssl.SSLSocket:
        """The handshake of one who listens; raises TimeoutError at the limit and OSError, with `sock` closed."""
        sock.settimeout(limit_s)
        return self.context.wrap_socket(sock, server_side=True)


def enter(sock: socket.socket, certificate: bytes, limit_s: float) -> ssl.SSLSocket:
    """The handshake of one who connects to the owner of `certificate`; as `Identity.accept`."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # the certificate is the name
    try:
        context.load_verify_locations(cadata=certificate)
        sock.settimeout(limit_s)
    except BaseException:
        sock.close()
        raise
    return context.wrap_socket(sock)


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _load(context: ssl.SSLContext, chain: bytes) -> None:
    """Python takes a key from a file only: this one has no name, and nobody else can open it."""
    file = os.memfd_create("tls", os.MFD_CLOEXEC)
    try:
        os.write(file, chain)
        context.load_cert_chain(f"/proc/self/fd/{file}")
    finally:
        os.close(file)
