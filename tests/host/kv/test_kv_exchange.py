# SPDX-License-Identifier: Apache-2.0
"""Two hosts' exchanges over real sockets and shared memory: equal bytes, or an error and books in order."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.helpers.server import poll
from tests.host.kv.kv_hosts import MODEL, HostProcess, TierHost, key_of
from tokenpool.errors import HostError
from tokenpool.host.kv import kv_supply
from tokenpool.wire import kv_frames
from tokenpool.wire.kv_frames import Chunk, Open, Want
from tokenpool.wire.messages import Wire, connect

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
    address = offer["addresses"][0]
    wire = connect(address, 30)
    wire.prove(offer["access"])
    wire.send(msgspec.msgpack.encode(Open(MODEL, BLOCK, 256)))
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
    for opened in (Open(MODEL, 2 * BLOCK, 1), Open(MODEL, BLOCK, 257), Open(MODEL, BLOCK, 0), Open("x", BLOCK, 1)):
        wire = connect(offer["addresses"][0], 30)
        wire.prove(offer["access"])
        wire.send(msgspec.msgpack.encode(opened))
        with pytest.raises((EOFError, ConnectionError)):
            wire.receive_with_file()
        wire.close()
    assert source.verify() == BLOCKS


def liar(sock: socket.socket, source: TierHost, end: Callable[[Wire], None]) -> None:
    """Answers as a source does, up to a chunk."""
    wire = Wire(sock, 30)
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
    with socket.create_server(("127.0.0.1", 0)) as listening:
        offer = {**source.export(), "addresses": [listening.getsockname()[:2]]}
        thread = threading.Thread(target=lambda: liar(listening.accept()[0], source, end), daemon=True)
        thread.start()
        with pytest.raises(HostError):
            target.fetch(offer)
    assert target.verify() == 0
    source.end()
    target.end()


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
