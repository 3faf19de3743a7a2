# SPDX-License-Identifier: Apache-2.0
"""Control sockets answer whoever knows the key, whatever other peers do, and every call ends in time."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.server import poll
from tokenpool.errors import HostError
from tokenpool.wire.coding import Call, Packed, Pickled
from tokenpool.wire.control import ControlServer, call_host
from tokenpool.wire.messages import Wire, connect

pytestmark = pytest.mark.cpu

KEY = b"k" * 32


class Loop:
    """Runs calls when it is told to, as a host's loop does between two steps."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Callable[[], Any], Future[Any]]] = []
        self.is_busy = False

    def call(self, job: Callable[[], Any]) -> Future[Any]:
        self.waiting.append((job, Future()))
        future = self.waiting[-1][1]
        if not self.is_busy:
            self.run()
        return future

    def run(self) -> None:
        while self.waiting:
            job, future = self.waiting.pop(0)
            try:
                future.set_result(job())
            except Exception as error:
                future.set_exception(error)


class Odd(Exception):
    """An exception that can be pickled and not made again."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__("odd")


def locked() -> Any:
    return threading.Lock()


def fail_with_lock() -> None:
    raise RuntimeError("the lock", threading.Lock())


def fail_oddly() -> None:
    raise Odd(1, 2)


@pytest.fixture(params=["unix", "tcp"])
def server(request: pytest.FixtureRequest, tmp_path: Any) -> Iterator[tuple[ControlServer, Loop]]:
    loop = Loop()
    made = ControlServer(str(tmp_path / "s") if request.param == "unix" else ("127.0.0.1", 0), KEY, loop.call)
    made.serve({"ping": lambda: "pong", "locked": locked, "lock": fail_with_lock, "odd": fail_oddly}, {"now": dict})
    yield made, loop


def connected(server: ControlServer) -> socket.socket:
    made = socket.socket(socket.AF_UNIX if isinstance(server.address, str) else socket.AF_INET)
    made.connect(server.address)
    return made


def nothing_said(server: ControlServer) -> Any:
    return connected(server)


def gone_at_once(server: ControlServer) -> Any:
    connected(server).close()


def gone_in_the_middle(server: ControlServer) -> Any:
    made = connected(server)
    made.recv(16)
    made.sendall(b"x" * 5)
    made.close()


def reset(server: ControlServer) -> Any:
    made = connected(server)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    made.close()


def rubbish(server: ControlServer) -> Any:
    made = connected(server)
    with contextlib.suppress(OSError):
        made.sendall(os.urandom(1 << 16))
    return made


def wrong_key(server: ControlServer) -> Any:
    with pytest.raises(HostError, match="ping"):
        call_host(server.address, b"x" * 32, "ping")


@pytest.mark.parametrize("peer", [nothing_said, gone_at_once, gone_in_the_middle, reset, rubbish, wrong_key])
def test_no_peer_keeps_others_from_being_answered(
    server: tuple[ControlServer, Loop], peer: Callable[[ControlServer], Any]
) -> None:
    """Whatever a peer does or leaves undone before it has proved to know the key, the next caller is answered."""
    control, _ = server
    kept = [peer(control) for _ in range(3)]
    answered: list[Any] = []
    caller = threading.Thread(target=lambda: answered.append(call_host(control.address, KEY, "ping")), daemon=True)
    caller.start()
    caller.join(20)
    assert ["pong"] == answered
    for made in filter(None, kept):
        made.close()


@pytest.mark.parametrize(
    ("method", "words"),
    [("locked", "locked cannot be sent"), ("lock", "the lock"), ("odd", "odd"), ("nothing", "nothing")],
)
def test_what_cannot_be_sent_reaches_the_caller_as_that_error(
    server: tuple[ControlServer, Loop], method: str, words: str
) -> None:
    """An answer or an exception that cannot cross the socket, or an unknown method, is told in words."""
    with pytest.raises(Exception, match=words):
        call_host(server[0].address, KEY, method)


class Trap:
    """Whoever reads its pickle makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_tcp_port_reads_no_pickle(tmp_path: Path) -> None:
    """Not even from a peer that knows the key, neither of a call nor of an answer."""
    trap, caught = pickle.dumps(Trap(tmp_path / "caught")), tmp_path / "caught"
    pickle.loads(trap)
    assert caught.exists(), "the trap works"
    caught.unlink()
    control = ControlServer(("127.0.0.1", 0), KEY, Loop().call)
    control.serve({"ping": lambda: "pong"})
    with connect(control.address, 20.0) as wire:
        wire.prove(KEY)
        wire.send(trap)
        assert wire.receive()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            sock, _ = listening.accept()
            with Wire(sock, 20.0) as wire:
                wire.ask_proof(KEY)
                wire.receive()
                wire.send(trap)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(HostError, match="cannot be read"):
            call_host(listening.getsockname(), KEY, "ping")
        thread.join(20)
    assert not caught.exists()


@given(values=st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20,
))  # fmt: skip
def test_plain_values_pass_both_ways(values: Any) -> None:
    """Arguments, limits and results arrive as they were sent, whichever the coding is."""
    for coding in (Pickled(), Packed()):
        call = coding.read_call(coding.pack_call(Call("m", (values, 1), 2.5)))
        assert (call.method, list(call.args), call.limit_s) == ("m", [values, 1], 2.5)
        assert coding.read_answer(coding.pack_answer(values)) == values


def test_a_call_that_is_not_answered_in_time_names_method_and_seconds(server: tuple[ControlServer, Loop]) -> None:
    """A busy loop costs the caller its limit and keeps no thread; direct methods are answered, late calls not run."""
    control, loop = server
    loop.is_busy = True
    with pytest.raises(HostError, match=r"ping within 0\.2 s"):
        call_host(control.address, KEY, "ping", timeout_s=0.2)
    assert {} == call_host(control.address, KEY, "now")
    poll(lambda: [t for t in threading.enumerate() if t.name == "control call"], until=lambda left: not left)
    future = loop.waiting[0][1]
    loop.run()
    assert "before it began" in str(future.exception())


def test_a_host_that_is_stopped_costs_the_limit_even_while_connecting(tmp_path: Any) -> None:
    """A socket at which nobody accepts any more, with its queue full, is a host that does not answer."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(path)
        deaf.listen(0)
        errors = []
        for _ in range(3):
            with pytest.raises(HostError, match=r"state within 0\.1 s") as caught:
                call_host(path, KEY, "state", timeout_s=0.1)
            errors.append(caught)
        assert 3 == len(errors)


def test_an_impostor_is_told_nothing(tmp_path: Any) -> None:
    """A caller sends what it wants only to who has proved to know the key."""
    path, heard = str(tmp_path / "s"), []

    def listen(deaf: socket.socket) -> None:
        peer, _ = deaf.accept()
        with peer:
            peer.sendall(b"n" * 32)
            while piece := peer.recv(1 << 16):
                heard.append(piece)
                if sum(map(len, heard)) >= 64:
                    peer.sendall(b"y" * 32)

    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(path)
        deaf.listen(1)
        thread = threading.Thread(target=listen, args=(deaf,), daemon=True)
        thread.start()
        with pytest.raises(HostError, match="key"):
            call_host(path, KEY, "add_model", "secret spec")
        thread.join(20)
    assert b"secret" not in b"".join(heard)
