# SPDX-License-Identifier: Apache-2.0
"""TLS between machines: the right certificate and key get through whole, and no peer holds anybody up."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.server import poll
from tokenpool.wire.messages import KeyRefusedError, Wire, connect
from tokenpool.wire.tls import Identity

pytestmark = pytest.mark.cpu

KEY = b"k" * 32
OURS, OTHERS = Identity.new(), Identity.new()
LIMIT_S = 30.0


@contextlib.contextmanager
def listening(serve: Callable[[socket.socket], Any]) -> Iterator[tuple[str, int]]:
    """One who takes one connection; what it raises is raised at the end."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            sock, _ = server.accept()
            serve(sock)
        except BaseException as error:
            raised.append(error)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield server.getsockname()[:2]
        thread.join(LIMIT_S)
        assert not thread.is_alive()
        if raised:
            raise raised[0]


def proved(sock: socket.socket) -> Wire:
    """As a host does with one who comes over TCP."""
    wire = Wire(OURS.accept(sock, LIMIT_S), LIMIT_S)
    wire.ask_proof(KEY)
    return wire


def echo(sock: socket.socket) -> None:
    with proved(sock) as wire:
        wire.send(wire.receive())


def test_who_has_certificate_and_key_gets_through_encrypted() -> None:
    with listening(echo) as address, connect(address, LIMIT_S, OURS.certificate) as wire:
        wire.prove(KEY)
        wire.send(b"words")
        assert wire.receive() == b"words"
        assert isinstance(wire._sock, ssl.SSLSocket) and wire._sock.version() == "TLSv1.3"


def test_nothing_of_what_is_said_is_on_the_wire() -> None:
    """A listener in between passes all on, and finds neither the key nor the words."""
    seen = bytearray()

    def pass_on(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(1 << 16):
                seen.extend(content)
                sink.sendall(content)
            sink.shutdown(socket.SHUT_WR)

    with listening(echo) as address:

        def between(sock: socket.socket) -> None:
            with socket.create_connection(address) as other:
                threads = [threading.Thread(target=pass_on, args=ends) for ends in ((sock, other), (other, sock))]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(LIMIT_S)

        with listening(between) as middle, connect(middle, LIMIT_S, OURS.certificate) as wire:
            wire.prove(KEY)
            wire.send(b"blocks of a prompt")
            assert wire.receive() == b"blocks of a prompt"
            wire.close()
    assert len(seen) > 500 and b"blocks of a prompt" not in seen and KEY not in seen


def test_another_certificate_is_refused_by_who_connects() -> None:
    """Whoever took the address in the meantime, or stands in between, learns nothing."""

    def impostor(sock: socket.socket) -> None:
        with pytest.raises(OSError):
            OTHERS.accept(sock, LIMIT_S).recv(1)

    with listening(impostor) as address, pytest.raises(ssl.SSLCertVerificationError):
        connect(address, LIMIT_S, OURS.certificate)


def test_another_key_is_refused_by_who_listens() -> None:
    def serve(sock: socket.socket) -> None:
        with pytest.raises(KeyRefusedError):
            proved(sock)
        sock.close()

    with (
        listening(serve) as address,
        connect(address, LIMIT_S, OURS.certificate) as wire,
        pytest.raises((KeyRefusedError, OSError)),
    ):
        wire.prove(b"x" * 32)


def nothing(sock: socket.socket) -> None:
    """Says nothing."""


def plain(sock: socket.socket) -> None:
    """Knows nothing of TLS."""
    sock.sendall(b"GET / HTTP/1.1\r\n\r\n")


def half(sock: socket.socket) -> None:
    """Begins a handshake, as a real client does, and does not go on."""
    hello = ssl.MemoryBIO()
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(ssl.SSLWantReadError):
        client.wrap_bio(ssl.MemoryBIO(), hello).do_handshake()
    sock.sendall(hello.read()[:-10])


def old(sock: socket.socket) -> None:
    """Speaks TLS 1.2 at most."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    with contextlib.suppress(OSError):
        client.wrap_socket(sock)


@pytest.mark.parametrize("peer", [nothing, plain, half, old])
def test_a_peer_that_hangs_or_lies_in_the_handshake_is_left(peer: Callable[[socket.socket], None]) -> None:
    """At the limit, with an error, and its connection is closed; it stays connected all the time."""
    ended: list[BaseException] = []
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sock:
        theirs, _ = server.accept()

        def serve() -> None:
            try:
                OURS.accept(theirs, 0.3)
            except OSError as error:
                ended.append(error)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        peer(sock)
        thread.join(LIMIT_S)
        assert not thread.is_alive() and len(ended) == 1
        assert theirs.fileno() == -1


def test_a_listener_that_hangs_in_the_handshake_is_left() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(TimeoutError):
        connect(server.getsockname()[:2], 0.3, OURS.certificate)


def test_a_connection_whose_other_end_is_gone_without_a_word_ends_at_the_limit() -> None:
    """As after a cable was pulled: no byte comes, and no end."""
    go_on = threading.Event()

    def serve(sock: socket.socket) -> None:
        with proved(sock):
            go_on.wait(LIMIT_S)

    with listening(serve) as address, connect(address, LIMIT_S, OURS.certificate) as wire:
        wire.prove(KEY)
        wire.set_limit(0.3)
        with pytest.raises(TimeoutError):
            wire.receive()
        go_on.set()


def test_a_message_that_is_too_large_is_not_received() -> None:
    def serve(sock: socket.socket) -> None:
        with proved(sock) as wire:
            wire._send_raw((1 << 62).to_bytes(8, "big"))

    with listening(serve) as address, connect(address, LIMIT_S, OURS.certificate) as wire:
        wire.prove(KEY)
        with pytest.raises(OSError, match="allowed"):
            wire.receive(1 << 20)


SIZES = st.lists(st.one_of(st.integers(0, 200), st.integers(0, 200_000)), max_size=12)


@settings(deadline=None, max_examples=60)
@given(sizes=SIZES, cut=st.integers(1, 100_000), messages=st.integers(0, 3), reads=st.integers(1, 70_000))
def test_views_and_messages_come_whole_and_in_order(sizes: list[int], cut: int, messages: int, reads: int) -> None:
    """Whatever the sizes of views, of parts in which they are offered, and of reads: every byte, once, in its place."""
    content = bytes(range(251)) * (sum(sizes) // 251 + 1)
    content = content[: sum(sizes)]

    def views_from(start: int) -> list[memoryview]:
        views, place = [], 0
        for size in sizes:
            if start < place + size:
                first = max(start, place)
                views.append(memoryview(content)[first : min(place + size, first + cut)])
                if len(views[-1]) < place + size - first:
                    break
            place += size
        return views

    def serve(sock: socket.socket) -> None:
        with proved(sock) as wire:
            for number in range(messages):
                wire.send(bytes([number]) * number)
            wire.send_views(views_from, len(content))
            wire.send(b"the end")

    with listening(serve) as address, connect(address, LIMIT_S, OURS.certificate) as wire:
        wire.prove(KEY)
        assert [wire.receive() for _ in range(messages)] == [bytes([number]) * number for number in range(messages)]
        got = bytearray(len(content))
        for start in range(0, len(got), reads):
            wire.receive_into(memoryview(got)[start : start + reads])
        assert bytes(got) == content
        assert wire.receive() == b"the end"


def test_while_a_reader_stops_no_view_is_held() -> None:
    """And the record that was in the making goes on whole, whatever lies in the views by then."""
    size = 32 << 20
    content = bytearray(b"a" * size)

    def serve(sock: socket.socket) -> None:
        with proved(sock) as wire:
            wire.send_views(lambda start: [memoryview(content)[start:size]], size)
            wire.send(b"the end")

    def is_free() -> bool:
        try:
            content.append(0)  # no bytearray with a view changes its size
        except BufferError:
            return False
        return True

    with listening(serve) as address, connect(address, LIMIT_S, OURS.certificate) as wire:
        wire.prove(KEY)
        got = memoryview(bytearray(size))
        wire.receive_into(got[: 1 << 20])
        poll(is_free)
        content[:size] = b"b" * size
        wire.receive_into(got[1 << 20 :])
        assert wire.receive() == b"the end"
        num_old = bytes(got).index(b"b")
        assert 1 << 20 <= num_old < size and bytes(got) == b"a" * num_old + b"b" * (size - num_old)
