# SPDX-License-Identifier: Apache-2.0
"""Messages over a socket with a time limit, between two processes that prove to each other that they know a key.

    who calls                                  who listens
              ◄──────── nonce ───────────────
    nonce, HMAC(key, "call", both nonces) ────►
              ◄──────── HMAC(key, "answer", both nonces)

Every wait ends at the limit, so no peer, whatever it does or leaves undone, can hold a thread for longer.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence

from tokenpool.wire.tls import enter

logger = logging.getLogger(__name__)

Address = str | tuple[str, int]
"""Path of a Unix socket, or IP address and port."""

_BACKLOG = 128
_NONCE_BYTES = 32
_HEADER_BYTES = 8
_FULL_REST_S = 0.01
_REST_S = 0.1


class KeyRefusedError(Exception):
    """The peer does not know the key, or is none of ours."""


class Wire:
    """One connected socket, plain or of TLS; for one thread. All raise TimeoutError at the limit, OSError, EOFError."""

    def __init__(self, sock: socket.socket, limit_s: float) -> None:
        self._sock = sock
        if sock.family == socket.AF_INET:  # a message is a header and content: the latter would wait for an answer
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.set_limit(limit_s)

    def set_limit(self, limit_s: float) -> None:
        """All that follows must be done in `limit_s` seconds from now."""
        self._deadline_s = time.monotonic() + limit_s

    def send(self, message: bytes) -> None:
        """Send one message."""
        self.send_with_file(message, None)

    def receive(self, most_bytes: int | None = None) -> bytes:
        """The next message; OSError for one of more than `most_bytes`."""
        return self._receive_raw(_size_of(self._receive_raw(_HEADER_BYTES), most_bytes))

    def send_with_file(self, message: bytes, file: int | None) -> None:
        """Send one message and, on a Unix socket, a descriptor that the other side gets a copy of."""
        header = len(message).to_bytes(_HEADER_BYTES, "big")
        self._limit_socket()
        sent = socket.send_fds(self._sock, [header], [file]) if file is not None else 0
        self._send_raw(header[sent:] + message)

    def receive_with_file(self, most_bytes: int | None = None) -> tuple[bytes, int | None]:
        """As `receive`, and the descriptor that came with it, which is the caller's to close."""
        if self._sock.family != socket.AF_UNIX:
            return self.receive(most_bytes), None
        self._limit_socket()
        header, files, *_ = socket.recv_fds(self._sock, _HEADER_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        try:
            if not header:
                raise EOFError("it ended")
            header += self._receive_raw(_HEADER_BYTES - len(header))
            return self._receive_raw(_size_of(header, most_bytes)), files[0] if files else None
        except BaseException:
            for file in files:
                os.close(file)
            raise

    def send_views(self, views_from: Callable[[int], Sequence[memoryview]], nbytes: int) -> None:
        """Send raw bytes out of where they are: `views_from` gives them from a place on, or the first part of them.

        While the other side does not read, no view is held.
        """
        poller, done = select.poll(), 0
        poller.register(self._sock, select.POLLOUT)
        while done < nbytes:
            if not poller.poll(1000 * max(0.001, self._deadline_s - time.monotonic())):
                raise TimeoutError
            if isinstance(self._sock, ssl.SSLSocket):
                done += _send_now(self._sock, views_from(done))
            else:
                self._limit_socket()
                done += self._sock.sendmsg(views_from(done))

    def receive_into(self, view: memoryview) -> None:
        """Fill a view with the raw bytes that come next."""
        filled = 0
        while filled < len(view):
            self._limit_socket()
            received = self._sock.recv_into(view[filled:])
            if not received:
                raise EOFError("it ended")
            filled += received

    def prove(self, key: bytes) -> None:
        """As who calls: show that this side knows the key and see that the other does; raises KeyRefusedError."""
        theirs, ours = self._receive_raw(_NONCE_BYTES), secrets.token_bytes(_NONCE_BYTES)
        self._send_raw(ours + _digest(key, b"call", theirs, ours))
        try:
            answer = self._receive_raw(hashlib.sha256().digest_size)
        except (EOFError, ConnectionError) as error:
            raise KeyRefusedError("it refused the key") from error
        if not hmac.compare_digest(answer, _digest(key, b"answer", theirs, ours)):
            raise KeyRefusedError("it does not know the key")

    def ask_proof(self, key: bytes) -> None:
        """As who listens: the other half of `prove`; raises KeyRefusedError."""
        ours = secrets.token_bytes(_NONCE_BYTES)
        self._send_raw(ours)
        theirs = self._receive_raw(_NONCE_BYTES)
        digest = self._receive_raw(hashlib.sha256().digest_size)
        if not hmac.compare_digest(digest, _digest(key, b"call", ours, theirs)):
            raise KeyRefusedError("a peer does not know the key")
        self._send_raw(_digest(key, b"answer", ours, theirs))

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send_raw(self, content: bytes) -> None:
        view = memoryview(content)
        while view:  # `sendall` of a TLS socket would take the limit for each part
            self._limit_socket()
            view = view[self._sock.send(view) :]

    def _receive_raw(self, count: int) -> bytes:
        content = bytearray(count)
        self.receive_into(memoryview(content))
        return bytes(content)

    def _limit_socket(self) -> None:
        # Not 0 when the limit is over: what has come already is still taken, as after a stop of this process.
        self._sock.settimeout(max(0.001, self._deadline_s - time.monotonic()))


def _send_now(sock: ssl.SSLSocket, views: Sequence[memoryview]) -> int:
    """Send of these bytes what the kernel takes without waiting; TLS takes a few kilobytes at a time."""
    sock.settimeout(0)
    sent = 0
    try:
        for view in views:
            done = 0
            while done < len(view):
                count = sock.send(view[done:])
                sent, done = sent + count, done + count
    except (ssl.SSLWantWriteError, BlockingIOError):
        pass  # a part may be in the making: it is sent first when the rest is, with the bytes that it has now
    return sent


def _size_of(header: bytes, most_bytes: int | None) -> int:
    size = int.from_bytes(header, "big")
    if most_bytes is not None and size > most_bytes:
        raise OSError(f"a message of {size} bytes, where {most_bytes} are allowed")
    return size


def listen(address: Address) -> socket.socket:
    """Listen at an address, which for a port 0 becomes any free one; a Unix socket appears only when it answers."""
    if not isinstance(address, str):
        return socket.create_server(address, backlog=_BACKLOG)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.bind(f"{address}~")
        made.listen(_BACKLOG)
        os.rename(f"{address}~", address)
    except BaseException:
        made.close()
        raise
    return made


def serve(listening: socket.socket, serve_one: Callable[[socket.socket], None], name: str) -> None:
    """Give each connection a thread of its own, in the background until the process ends."""
    threading.Thread(target=_accept, args=(listening, serve_one, name), name=name, daemon=True).start()


def _accept(listening: socket.socket, serve_one: Callable[[socket.socket], None], name: str) -> None:
    while True:
        try:
            sock, _ = listening.accept()
        except OSError as error:  # such as a process that has no file left to open
            logger.warning("%s connection not accepted: %s", name, error)
            time.sleep(_REST_S)
            continue
        try:
            threading.Thread(target=serve_one, args=(sock,), name=f"{name} call", daemon=True).start()
        except RuntimeError as error:  # no thread left
            logger.warning("%s connection not served: %s", name, error)
            sock.close()


def connect(address: Address, limit_s: float, certificate: bytes | None = None) -> Wire:
    """Connect to who listens there, by TLS if it has a `certificate`, and do all that follows within `limit_s`."""
    deadline_s = time.monotonic() + limit_s
    made = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET, socket.SOCK_STREAM)
    try:
        made.settimeout(limit_s)
        while True:
            try:
                made.connect(address)
                if certificate is not None:
                    made = enter(made, certificate, max(0.001, deadline_s - time.monotonic()))
                return Wire(made, deadline_s - time.monotonic())
            except BlockingIOError as error:  # the queue of a Unix socket is full; with TCP the kernel tries again
                if time.monotonic() > deadline_s:
                    raise TimeoutError from error
                time.sleep(_FULL_REST_S)
    except BaseException:
        made.close()
        raise


def _digest(key: bytes, role: bytes, listener_nonce: bytes, caller_nonce: bytes) -> bytes:
    return hmac.digest(key, role + listener_nonce + caller_nonce, "sha256")
