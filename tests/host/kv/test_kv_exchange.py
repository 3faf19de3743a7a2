# SPDX-License-Identifier: Apache-2.0
"""Two hosts' exchanges over real sockets and shared memory: equal bytes, or an error and books in order."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.server import poll
from tests.host.kv.kv_hosts import LIMIT_S, MODEL, HostProcess, TierHost, key_of, knock
from tokenpool.errors import HostError
from tokenpool.host import kv_exchange
from tokenpool.host.kv import kv_fetch, kv_supply
from tokenpool.wire import kv_frames
from tokenpool.wire.kv_frames import Chunk, Open, Want
from tokenpool.wire.messages import Wire
from tokenpool.wire.tls import Identity

pytestmark = pytest.mark.vllm

BLOCK = 1 << 14
BLOCKS = 1000
"""Four chunks, the last one not full."""
MEMORY = 40 << 20


@pytest.fixture(params=["unix", "tcp"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A host that has blocks, and one that can get them, over either kind of socket."""
    options: dict[str, Any] = {"block_bytes": BLOCK, "host_memory": MEMORY}
    source = TierHost(str(tmp_path / "a"), "127.0.0.1", num_blocks=BLOCKS, only=request.param, **options).start()
    target = TierHost(str(tmp_path / "b"), "127.0.0.1", **options).start()
    yield source, target
    source.end()
    target.end()


def test_all_blocks_arrive_and_none_twice(pair: tuple[TierHost, TierHost]) -> None:
    source, target = pair
    offer = source.export()
    assert [key_of(n) for n in range(BLOCKS)] == offer["keys"]
    assert BLOCKS == target.fetch(offer) == target.verify() == source.verify()
    assert {"exported_blocks": 0, "imported_blocks": BLOCKS} == target.exchange.snapshot()
    assert BLOCKS == target.fetch(offer), "what is here was not found"
    assert BLOCKS == target.exchange.imported_blocks, "what is here was sent again"


def test_on_one_machine_no_block_goes_over_a_socket(
    pair: tuple[TierHost, TierHost], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = pair
    sent: list[int] = []
    send_views = Wire.send_views
    monkeypatch.setattr(Wire, "send_views", lambda self, views, n: sent.append(n) or send_views(self, views, n))
    offer = source.export()
    assert target.fetch(offer) == BLOCKS
    assert sum(sent) == (0 if isinstance(offer["addresses"][0], str) else BLOCKS * BLOCK)


def test_the_path_of_a_socket_on_another_machine_is_no_obstacle(tmp_path: Path) -> None:
    """The nearest address does not answer, or somebody else does: the next one is taken."""
    source = TierHost(str(tmp_path / "a"), "127.0.0.1", block_bytes=BLOCK, num_blocks=10).start()
    target, other = TierHost(str(tmp_path / "b"), block_bytes=BLOCK).start(), TierHost(str(tmp_path / "c")).start()
    offer = source.export()
    near, far = offer["addresses"]
    assert near == str(tmp_path / "a") and far[0] == "127.0.0.1"
    assert target.fetch({**offer, "addresses": [str(tmp_path / "nobody"), str(tmp_path / "c"), far]}) == 10
    target.forget()
    with pytest.raises(HostError, match="does not send KV"):
        target.fetch({**offer, "addresses": [str(tmp_path / "nobody")]})
    assert target.verify() == 0
    for host in (source, target, other):
        host.end()


def test_an_address_that_is_not_this_machines_leaves_the_unix_socket(tmp_path: Path) -> None:
    """As that of a node whose packets another machine passes on: its own neighbours get their blocks."""
    source = TierHost(str(tmp_path / "a"), "203.0.113.7", block_bytes=BLOCK, num_blocks=10).start()
    target = TierHost(str(tmp_path / "b"), block_bytes=BLOCK).start()
    offer = source.export()
    assert offer["addresses"] == [str(tmp_path / "a")]
    assert target.fetch(offer) == target.verify() == 10
    with pytest.raises(OSError, match="no way"):
        TierHost(str(tmp_path / "no folder" / "c"), "203.0.113.7")
    source.end()
    target.end()


def test_what_the_source_gave_up_meanwhile_is_not_there(pair: tuple[TierHost, TierHost]) -> None:
    source, target = pair
    offer = source.export()
    source.call(lambda: [source.tier.discard(MODEL, key) for key in offer["keys"][::3]]).result()
    assert target.fetch(offer) == target.verify() == source.verify() == BLOCKS - len(offer["keys"][::3])


def test_a_target_without_room_takes_what_it_can(pair: tuple[TierHost, TierHost], tmp_path: Path) -> None:
    source, _ = pair
    small = TierHost(str(tmp_path / "small"), block_bytes=BLOCK, host_memory=100 * BLOCK).start()
    small.fetch(source.export())
    assert 0 < small.verify() <= 100
    small.end()


@pytest.mark.parametrize("what", ["removed", "forgotten"])
def test_blocks_of_a_model_that_is_another_one_meanwhile_are_not_taken(
    pair: tuple[TierHost, TierHost], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is removed and added anew, or its weights change, while blocks are on their way."""
    source, target = pair
    offer, go_on, is_there = source.export(), threading.Event(), threading.Event()
    void = kv_supply.Supply.void

    def late(self: kv_supply.Supply) -> list[int]:
        is_there.set()
        go_on.wait(30)
        return void(self)

    monkeypatch.setattr(kv_supply.Supply, "void", late)
    result = target.call(lambda: target.models[MODEL].core.import_kv(offer)).result()
    assert is_there.wait(30)
    target.forget()
    if what == "removed":
        target.call(target.add).result()
    go_on.set()
    if what == "removed":
        with pytest.raises(HostError, match="no longer on this host"):
            result.result(60)
        assert target.verify() == 0
    else:
        assert result.result(60) == target.verify() == 0


def test_what_another_model_of_the_name_has_computed_is_not_what_was_offered(pair: tuple[TierHost, TierHost]) -> None:
    """The source's model is removed, and one with other weights computes the same prompt: the keys are the same."""
    source, target = pair
    offer = source.export()
    source.forget()
    source.call(source.add).result()
    again = source.export()
    assert again["keys"] == offer["keys"]
    with pytest.raises(HostError, match="does not send KV"):
        target.fetch(offer)
    assert target.verify() == 0
    assert target.fetch(again) == target.verify() == BLOCKS


def silent(wire: Wire) -> None:
    """Asks for more than a socket takes and reads nothing."""
    for number in range(4):
        wire.send(msgspec.msgpack.encode(Want(number, [key_of(n) for n in range(256 * number, 256 * number + 256)])))


def rubbish(wire: Wire) -> None:
    wire.send(b"rubbish")


def gone_in_a_chunk(wire: Wire) -> None:
    silent(wire)
    wire.receive_with_file()
    msgspec.msgpack.decode(wire.receive(), type=Chunk)
    wire.close()


@pytest.mark.parametrize("peer", [silent, rubbish, gone_in_a_chunk])
def test_a_target_that_hangs_or_dies_keeps_nothing_of_the_source(
    pair: tuple[TierHost, TierHost], peer: Callable[[Wire], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source's memory goes to whoever needs it meanwhile, and others get their blocks."""
    for module in (kv_frames, kv_supply):
        monkeypatch.setattr(module, "IDLE_LIMIT_S", 0.5)
    source, target = pair
    offer = source.export()
    wire = knock(offer)
    wire.prove(offer["access"])
    wire.send(msgspec.msgpack.encode(Open(MODEL, BLOCK, 256, 0)))
    peer(wire)
    assert target.fetch(offer) == target.verify() == BLOCKS
    assert source.call(lambda: source.tier.drop_cached(MEMORY)).result() >= BLOCKS * BLOCK
    assert source.verify() == 0
    poll(lambda: [t for t in threading.enumerate() if t.name == "kv call"], until=lambda left: not left)
    assert source.exchange._sharing._value == 4, "a place for shared memory is lost"


def test_sizes_that_are_not_the_models_are_refused(pair: tuple[TierHost, TierHost]) -> None:
    source, target = pair
    offer = source.export()
    with pytest.raises(HostError, match="another size"):
        target.fetch({**offer, "block_bytes": 2 * BLOCK})
    for opened in (
        Open(MODEL, 2 * BLOCK, 1, 0), Open(MODEL, BLOCK, 257, 0), Open(MODEL, BLOCK, 0, 0), Open("x", BLOCK, 1, 0),
        Open(MODEL, BLOCK, 1, 7),
    ):  # fmt: skip
        wire = knock(offer)
        wire.prove(offer["access"])
        wire.send(msgspec.msgpack.encode(opened))
        with pytest.raises((EOFError, ConnectionError)):
            wire.receive_with_file()
        wire.close()
    assert source.verify() == BLOCKS


def liar(sock: socket.socket, identity: Identity, source: TierHost, end: Callable[[Wire], None]) -> None:
    """Answers as a source does, up to a chunk."""
    wire = Wire(identity.accept(sock, 30), 30)
    wire.ask_proof(source.exchange._access)
    wire.receive()
    wire.send_with_file(msgspec.msgpack.encode(kv_frames.Opened(0)), None)
    wire.receive()
    end(wire)


def in_a_chunk(wire: Wire) -> None:
    wire.send(msgspec.msgpack.encode(Chunk(0, [(0, None), (1, None)])))
    wire._send_raw(bytes(BLOCK + 5))
    wire.close()


def wrong_number(wire: Wire) -> None:
    wire.send(msgspec.msgpack.encode(Chunk(77, [])))


def no_message(wire: Wire) -> None:
    wire.send(b"\xc1")


@pytest.mark.parametrize("end", [in_a_chunk, wrong_number, no_message])
def test_a_source_that_dies_or_lies_leaves_nothing_at_the_target(tmp_path: Path, end: Callable[[Wire], None]) -> None:
    source = TierHost(str(tmp_path / "a"), block_bytes=BLOCK, num_blocks=10).start()
    target = TierHost(str(tmp_path / "b"), block_bytes=BLOCK).start()
    identity = Identity.new()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        at = {"addresses": [listening.getsockname()[:2]], "certificate": identity.certificate}
        offer = {**source.export(), **at}
        thread = threading.Thread(target=lambda: liar(listening.accept()[0], identity, source, end), daemon=True)
        thread.start()
        with pytest.raises(HostError):
            target.fetch(offer)
    assert target.verify() == 0
    source.end()
    target.end()


def test_who_is_not_the_owner_of_the_certificate_or_not_told_the_key_gets_nothing(tmp_path: Path) -> None:
    source = TierHost(str(tmp_path / "a"), "127.0.0.1", block_bytes=BLOCK, num_blocks=10, only="tcp").start()
    target = TierHost(str(tmp_path / "b"), block_bytes=BLOCK).start()
    offer = source.export()
    with pytest.raises(HostError, match="does not send KV.*(?i:certificate)"):
        target.fetch({**offer, "certificate": Identity.new().certificate})
    with pytest.raises(HostError, match="refused the key"):
        target.fetch({**offer, "access": bytes(32)})
    with pytest.raises(HostError, match="does not send KV"):
        target.fetch({**offer, "certificate": b""})
    assert target.verify() == 0
    assert target.fetch(offer) == target.verify() == 10
    source.end()
    target.end()


def test_peers_that_hang_in_the_handshake_are_few_and_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While they are there hosts of the same machine get their blocks, and afterwards all others do."""
    monkeypatch.setattr(kv_exchange, "IDLE_LIMIT_S", 1.0)
    source = TierHost(str(tmp_path / "a"), "127.0.0.1", block_bytes=BLOCK, num_blocks=10).start()
    target = TierHost(str(tmp_path / "b"), block_bytes=BLOCK).start()
    offer = source.export()
    near, far = offer["addresses"]
    silent_ones = [socket.create_connection(far) for _ in range(2 * kv_exchange._MOST_ENTERING)]
    poll(lambda: source.exchange._entering._value, until=lambda left: left == 0)
    assert target.fetch({**offer, "addresses": [near]}) == target.verify() == 10
    target.forget()
    poll(lambda: source.exchange._entering._value, until=lambda left: left == kv_exchange._MOST_ENTERING)
    assert target.fetch({**offer, "addresses": [far]}) == target.verify() == 10
    for sock in silent_ones:
        sock.close()
    poll(lambda: [t for t in threading.enumerate() if t.name == "kv call"], until=lambda left: not left)
    source.end()
    target.end()


class Line:
    """Passes on what two ends say through it, until so many bytes have gone one way; then it is cut or silent."""

    def __init__(self, target: tuple[str, int], most: dict[str, int], what: str) -> None:
        """`most` bytes `there`, from who connects, and `back`."""
        self._target, self._most, self._what = target, most, what
        self._ends: list[socket.socket] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._server.getsockname()[:2]
        threading.Thread(target=self._join, daemon=True).start()

    def _join(self) -> None:
        with suppress(OSError):
            one, _ = self._server.accept()
            other = socket.create_connection(self._target)
            self._ends += [one, other]
            for source, sink, way in ((one, other, "there"), (other, one, "back")):
                threading.Thread(target=self._pass_on, args=(source, sink, self._most[way]), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, most: int) -> None:
        with suppress(OSError):
            while content := source.recv(1 << 16):
                sink.sendall(content[:most])
                most -= len(content)
                if most < 0:
                    if self._what == "cut":
                        self.close()
                    return
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for end in (self._server, *self._ends):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@contextmanager
def waiting(limit_s: float) -> Iterator[None]:
    """Hosts wait so long for a word of each other."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (kv_frames, kv_supply, kv_fetch, kv_exchange):
            patch.setattr(module, "IDLE_LIMIT_S", limit_s)
        yield


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TierHost, TierHost]]:
    """A pair over TCP that waits for a word of each other for a moment only."""
    with waiting(0.7):
        folder = tmp_path_factory.mktemp("kv")
        options: dict[str, Any] = {"block_bytes": BLOCK, "host_memory": MEMORY}
        source = TierHost(str(folder / "a"), "127.0.0.1", num_blocks=BLOCKS, only="tcp", **options).start()
        target = TierHost(str(folder / "b"), **options).start()
        yield source, target
        source.end()
        target.end()


MOST = st.one_of(st.integers(0, 3000), st.integers(0, BLOCKS * BLOCK), st.just(1 << 30))


@settings(deadline=None, max_examples=25)
@given(there=MOST, back=MOST, what=st.sampled_from(["cut", "silent"]))
def test_a_line_that_breaks_anywhere_leaves_whole_blocks_and_books_in_order(
    impatient: tuple[TierHost, TierHost], there: int, back: int, what: str
) -> None:
    """In the handshake, in a key, in a block, between chunks: what came whole stays, the rest can be fetched again."""
    source, target = impatient
    target.forget()
    offer = source.export()
    line = Line(offer["addresses"][0], {"there": there, "back": back}, what)
    try:
        count = target.fetch({**offer, "addresses": [line.address]})
    except HostError:
        count = None
    finally:
        line.close()
    found = target.verify()
    assert count in (None, found) and found <= BLOCKS
    assert count == BLOCKS or min(there, back) < BLOCKS * BLOCK * 1.1, "nothing had broken"
    with waiting(LIMIT_S):  # nothing breaks now, on however busy a machine
        assert target.fetch(offer) == target.verify() == source.verify() == BLOCKS
    poll(lambda: source.exchange._entering._value, until=lambda left: left == kv_exchange._MOST_ENTERING)


@pytest.mark.slow
@pytest.mark.parametrize("only", ["unix", "tcp"])
def test_a_source_that_is_killed_between_two_chunks(tmp_path: Path, only: str) -> None:
    """What came whole stays, what did not is nowhere, and the target can get the rest from the next one."""
    many = 2400  # more chunks than may be on their way
    options: dict[str, Any] = {"block_bytes": BLOCK, "num_blocks": many, "host_memory": MEMORY, "only": only}
    target = TierHost(str(tmp_path / "t"), block_bytes=BLOCK, host_memory=MEMORY)
    fetched = []
    for name in ("a", "b"):
        source = HostProcess(tmp_path, name, "127.0.0.1", **options)
        offer = source.ask("export")
        result = target.models[MODEL].core.import_kv(offer)
        while not result.done():
            target._calls.run()
            if name == "a" and len(target.tier.entries_of(MODEL)) >= 256:
                source.end()
        fetched.append(len(target.tier.entries_of(MODEL)))
        if name == "a":
            with pytest.raises(HostError):
                result.result()
        else:
            assert result.result() == many
        target._verify()
        source.end()
    assert 256 <= fetched[0] < fetched[1] == many
