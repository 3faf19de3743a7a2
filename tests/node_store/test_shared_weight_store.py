# SPDX-License-Identifier: Apache-2.0
"""Weight stores of two hosts over one keeper: bytes, books of host and node, and what a kill of the keeper leaves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.devices.weight_rig import LIMIT_S, PAGE, Checkpoint, Rig, bytes_of
from tests.helpers.server import poll
from tests.node_store.asking import book, end_keeper, kill_keeper
from tokenpool.errors import SwitchError, UnfitCopyError
from tokenpool.memory.copies.copy_meta import CopyMeta, pack_meta, read_meta
from tokenpool.memory.host_ledger import HostUse
from tokenpool.memory.states import WeightState
from tokenpool.node_store.client import NodeStore
from tokenpool.node_store.shared_copy import SharedCopy

pytestmark = pytest.mark.cpu

BUDGET = 256 << 20


class Node:
    """Hosts of one node, each with a weight store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hosts: list[Host] = []

    def host(self) -> Host:
        self.hosts.append(Host(self.folder))
        return self.hosts[-1]

    def book(self) -> dict:
        for host in self.hosts:
            host.node.show()  # the keeper knows what was told
        return book(self.folder)


class Host(Rig):
    """One of them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(host_bytes=BUDGET)
        self.node = NodeStore(folder, BUDGET)
        self.node.start()
        self.host.node = self.node

    def adopt(
        self, owner: str, tensors: list[torch.Tensor], checkpoint: Checkpoint, known: CopyMeta | None = None
    ) -> bool:
        """Returns whether the weights were there already."""
        copy = SharedCopy(self.node, owner)
        poll(copy.claim)
        is_whole = copy.is_whole
        self.store.adopt(owner, tensors, checkpoint.reload, verify_reload=True, copy=copy, known=known)
        self.store.publish(owner, "outputs")
        self.check()
        return is_whole

    def fetch(self, owner: str) -> None:
        assert self.store.load_host(owner).wait(LIMIT_S)
        self.store.finish(owner)
        self.check()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path / "store")
    yield made
    for host in made.hosts:
        host.store.close()
        host.assert_empty()
        host.node.close()
    kill_keeper(made.folder)


def parts(count: int = 6) -> list[torch.Tensor]:
    return [torch.full((PAGE // 4,), i + 0.5) for i in range(count)]


def test_the_second_host_needs_no_bytes_of_its_own(node: Node) -> None:
    """Its tensors hold anything before; afterwards they hold what the first has read, and neither host reads more."""
    one, two = node.host(), node.host()
    first, second = parts(), [torch.zeros_like(part) for part in parts()]
    read, unread = Checkpoint(first), Checkpoint(second)
    assert not one.adopt("a", first, read)
    assert two.adopt("a", second, unread)
    assert bytes_of(first) == bytes_of(second)
    assert (1, 0) == (read.reads, unread.reads)
    nbytes = one.store.bytes_of("a")
    found = node.book()
    assert (nbytes, 0, 2) == (found["copies_bytes"], found["own_bytes"], found["copies"]["a"]["hosts"])
    assert nbytes == two.host.held("a", HostUse.WEIGHTS)
    two.store.evict("a")
    two.store.drop_host("a")
    assert 1 == node.book()["copies"]["a"]["hosts"]
    two.fetch("a")
    two.load("a")
    assert (bytes_of(first), 0) == (bytes_of(second), unread.reads)


def test_what_is_in_no_checkpoint_comes_with_the_copy(node: Node) -> None:
    """And stays with the host when it gives the copy up."""
    one, two = node.host(), node.host()
    first, second = parts(6), [torch.zeros_like(part) for part in parts(6)]
    one.adopt("a", first, Checkpoint(first, skip={2}))
    checkpoint = Checkpoint(first, skip={2})
    checkpoint.tensors = second
    assert two.adopt("a", second, checkpoint)
    two.store.evict("a")
    two.store.drop_host("a")
    assert first[2].nbytes == two.host.held("a", HostUse.WEIGHTS)
    one.store.remove("a")
    two.node.set_budget(0)
    one.node.set_budget(0)
    assert {} == node.book()["copies"]
    two.fetch("a")
    two.load("a")
    assert 1 == checkpoint.reads
    assert [part.tolist() for part in second] == [part.tolist() for part in parts(6)]


def test_a_copy_of_other_tensors_is_refused(node: Node) -> None:
    """Whatever its name says: then nothing of it is held, in no book."""
    one, two = node.host(), node.host()
    first = parts(6)
    one.adopt("a", first, Checkpoint(first))
    other = [part.reshape(2, -1) for part in parts(6)]
    values = bytes_of(other)
    with pytest.raises(UnfitCopyError, match="does not fit: its tensors lie otherwise"):
        two.adopt("a", other, Checkpoint(other))
    assert values == bytes_of(other)
    two.assert_empty()
    assert 1 == node.book()["copies"]["a"]["hosts"]


def test_a_build_that_fails_leaves_the_content_to_others(node: Node) -> None:
    """The fill ends with it, and so does what was booked."""
    one, two = node.host(), node.host()
    tensors = parts()
    one.device.allowed["map_later"] = 0
    with pytest.raises(SwitchError):
        one.adopt("a", tensors, Checkpoint(tensors))
    one.assert_empty()
    found = node.book()
    assert ({}, 0) == (found["copies"], found["used_bytes"])
    assert not two.adopt("a", parts(), Checkpoint(tensors))


@pytest.mark.parametrize("is_true", [True, False])
def test_what_is_known_of_a_checkpoint_is_believed_by_the_checksum(node: Node, is_true: bool) -> None:
    """Bytes that have another one are tried again."""
    one = node.host()
    tensors = parts()
    one.adopt("a", tensors, Checkpoint(tensors))
    known = read_meta(one.store.meta("a") or b"")
    assert known is not None and known.proof is not None and known.proof.droppable
    others = [part + (0 if is_true else 1) for part in parts()]
    checkpoint = Checkpoint(others)
    one.adopt("b", others, checkpoint, known)
    assert (0 if is_true else 1) == checkpoint.reads
    assert one.store.snapshot()["b"].droppable


def test_meta_of_another_version_is_nothing() -> None:
    """Nor is nonsense."""
    assert None is read_meta(b"") is read_meta(b"\xff\xff") is read_meta(pack_meta(CopyMeta("x"))[:-1])
    assert CopyMeta("x") == read_meta(pack_meta(CopyMeta("x")))


def test_weights_are_where_they_were_when_the_keeper_is_killed(node: Node) -> None:
    """Hosts switch, give copies up and get them back; all books agree with the next one."""
    one, two = node.host(), node.host()
    first, second = parts(), parts()
    checkpoint = Checkpoint(second)
    one.adopt("a", first, Checkpoint(first))
    two.adopt("a", second, checkpoint)
    two.store.evict("a")
    end_keeper(node.folder)
    two.load("a")
    two.store.evict("a")
    two.store.drop_host("a")
    two.fetch("a")  # from the disk, or from the host's own mapping, or from the next keeper: whatever is there
    two.load("a")
    assert bytes_of(first) == bytes_of(second)
    poll(lambda: node.book()["hosts"] == 2 and one.node.is_there and two.node.is_there)
    for host in (one, two):
        host.check()
        host.host.take("x", HostUse.PAUSED_KV, 1)
        host.host.give("x", HostUse.PAUSED_KV, 1)
    nbytes = one.store.bytes_of("a")
    shared = one.node.shared_bytes + two.node.shared_bytes
    found = node.book()
    leases = sum(copy["bytes"] * copy["hosts"] for copy in found["copies"].values())
    assert shared == leases
    assert 2 * nbytes - shared <= found["own_bytes"] <= 2 * nbytes - shared + (8 << 20)


def test_a_fetch_that_is_cancelled_while_it_waits_holds_nothing(node: Node) -> None:
    """Another host fills the content; who waited is on disk again, with nothing in any book."""
    one, two = node.host(), node.host()
    tensors = parts()
    two.adopt("a", tensors, Checkpoint(tensors))
    two.store.evict("a")
    two.store.drop_host("a")
    two.node.set_budget(0)
    one.node.set_budget(0)
    assert {} == node.book()["copies"]
    filling = SharedCopy(one.node, "a")
    poll(filling.claim)
    assert not filling.is_whole
    job = two.store.load_host("a")
    poll(lambda: job.running_s > 0.1)
    two.store.drop_host("a")
    assert WeightState.ON_DISK is two.store.state("a")
    assert 0 == two.host.total(HostUse.WEIGHTS) == two.node.shared_bytes
    filling.release()
    two.fetch("a")
    assert 1 == node.book()["copies"]["a"]["hosts"]
