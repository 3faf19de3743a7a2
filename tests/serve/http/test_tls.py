# SPDX-License-Identifier: Apache-2.0
"""TLS of the port: vLLM's flags have their effect, and what cannot be used is refused before anything starts."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from tokenpool.config import ModelSpec, PoolConfig
from tokenpool.errors import ConfigError
from tokenpool.serve.launch.flags import parse_serve_flags
from tokenpool.serve.launch.launch_plan import plan_model
from tokenpool.serve.launch.tls import CertificateRefresh, check_tls
from tokenpool.serve.pool.http_loop import _uvicorn_config

pytestmark = pytest.mark.vllm

CIPHER = "ECDHE-RSA-AES256-GCM-SHA384"


def write_certificate(folder: Path, name: str, key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> None:
    """Write `cert.pem` and `key.pem` of a certificate that `name` has signed for itself."""
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem, pkcs8, plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    written = {"key.pem": key.private_bytes(pem, pkcs8, plain), "cert.pem": certificate.public_bytes(pem)}
    for file, data in written.items():
        (folder / "new").write_bytes(data)
        (folder / "new").rename(folder / file)


@pytest.fixture(scope="module")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@pytest.fixture
def files(tmp_path: Path, rsa_key: rsa.RSAPrivateKey) -> Path:
    write_certificate(tmp_path, "first", rsa_key)
    (tmp_path / "text.pem").write_text("no certificate")
    (tmp_path / "other").mkdir()
    write_certificate(tmp_path / "other", "other", ec.generate_private_key(ec.SECP256R1()))
    return tmp_path


def flags_of(folder: Path, *more: str) -> list[str]:
    return ["--ssl-certfile", f"{folder}/cert.pem", "--ssl-keyfile", f"{folder}/key.pem", *more]


@asynccontextmanager
async def port(*flags: str) -> AsyncIterator[int]:
    """A port that answers with 204 behind what uvicorn is given by these flags."""

    async def app(scope: object, receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 204})  # type: ignore[operator]
        await send({"type": "http.response.body"})  # type: ignore[operator]

    args = parse_serve_flags(["org/a", *flags])
    config = _uvicorn_config(app, args, PoolConfig((ModelSpec("a", "org/a"),)))
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    with socket.create_server(("127.0.0.1", 0)) as sock:
        async with CertificateRefresh(args, config):
            serving = asyncio.create_task(server.serve(sockets=[sock]))
            try:
                yield sock.getsockname()[1]
            finally:
                server.should_exit = True
                await serving


async def shake_hands(port: int, ciphers: str | None = None) -> tuple[str, str]:
    """The cipher of a connection, and the name in the certificate that the port shows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    if ciphers:
        context.set_ciphers(ciphers)
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        connection = writer.get_extra_info("ssl_object")
        certificate = x509.load_der_x509_certificate(connection.getpeercert(binary_form=True))
        (name,) = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        return connection.cipher()[0], str(name.value)
    finally:
        writer.close()


def test_ciphers_are_those_that_are_given(files: Path) -> None:
    """Another one is not agreed upon."""

    async def main() -> None:
        async with port(*flags_of(files, "--ssl-ciphers", CIPHER)) as number:
            assert (CIPHER, "first") == await shake_hands(number)
            with pytest.raises((ssl.SSLError, OSError)):
                await shake_hands(number, "ECDHE-RSA-AES128-GCM-SHA256")

    asyncio.run(main())


def test_a_certificate_that_changes_is_shown(files: Path, rsa_key: rsa.RSAPrivateKey) -> None:
    """With --enable-ssl-refresh, without a restart."""

    async def main() -> None:
        async with port(*flags_of(files, "--enable-ssl-refresh")) as number:
            assert "first" == (await shake_hands(number))[1]
            async with asyncio.timeout(60):
                while (await shake_hands(number))[1] != "second":
                    write_certificate(files, "second", rsa_key)  # again, as the watcher may not look yet
                    await asyncio.sleep(0.1)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--ssl-certfile", "/none/c", "--ssl-keyfile", "{}/key.pem"], "--ssl-certfile: /none/c cannot be read: No"),
        (["--ssl-certfile", "{}/cert.pem", "--ssl-keyfile", "/none/k"], "--ssl-keyfile: /none/k cannot be read: No"),
        (["--ssl-certfile", "{}/text.pem", "--ssl-keyfile", "{}/key.pem"], "--ssl-certfile, --ssl-keyfile: cannot be"),
        (["--ssl-certfile", "{}/other/cert.pem", "--ssl-keyfile", "{}/key.pem"], "--ssl-certfile, --ssl-keyfile: ca"),
        (["--ssl-keyfile", "{}/key.pem"], "--ssl-keyfile: needs --ssl-certfile"),
        (["--ssl-ca-certs", "{}/cert.pem"], "--ssl-ca-certs: needs --ssl-certfile"),
        (["{good}", "--ssl-ca-certs", "/none/ca"], "--ssl-ca-certs: /none/ca cannot be read"),
        (["{good}", "--ssl-ca-certs", "{}/text.pem"], "--ssl-ca-certs: cannot be used"),
        (["{good}", "--ssl-ciphers", "ROT13"], "--ssl-ciphers: cannot be used"),
        (["{good}", "--ssl-cert-reqs", "7"], "--ssl-cert-reqs: cannot be used"),
        (["--ssl-ciphers", CIPHER], "--ssl-ciphers: needs --ssl-certfile"),
        (["--enable-ssl-refresh"], "--enable-ssl-refresh: needs --ssl-certfile and --ssl-keyfile"),
    ],
)
def test_what_cannot_be_used_is_refused_by_its_flag(files: Path, flags: list[str], problem: str) -> None:
    """In one line that names the flag that was given."""
    words = [part for word in flags for part in (flags_of(files) if word == "{good}" else [word.format(files)])]
    with pytest.raises(ConfigError) as caught:
        check_tls(plan_model(ModelSpec("a", "org/a", tuple(words))).args)

    assert str(caught.value).startswith(problem)
    assert "\n" not in str(caught.value)


def test_good_files_are_not_refused(files: Path) -> None:
    """Nor is a port without TLS."""
    check_tls(parse_serve_flags(["org/a", *flags_of(files, "--ssl-ciphers", CIPHER, "--enable-ssl-refresh")]))
    check_tls(parse_serve_flags(["org/a", *flags_of(files, "--ssl-ca-certs", f"{files}/cert.pem")]))
    check_tls(parse_serve_flags(["org/a"]))
