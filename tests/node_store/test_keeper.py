# SPDX-License-Identifier: Apache-2.0
"""A real keeper, and hosts that share copies by it: whoever is killed or stopped, the others go on, and books agree."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.server import is_running, poll
from tests.node_store.asking import BUDGET, MIB, book, end_keeper, keeper_pid
from tests.node_store.told_host import Host, Told
from tokenpool.errors import HostError
from tokenpool.node_store import client, line, shared_copy
from tokenpool.node_store.client import NodeStore
from tokenpool.node_store.keeper import Keeper
from tokenpool.node_store.messages import Seal, Tick
from tokenpool.node_store.place import clear_up, connect, folder_of, listen, make_folder, start_keeper
from tokenpool.node_store.shared_copy import SharedCopy

pytestmark = pytest.mark.cpu

SIZE = 10 * MIB


@pytest.fixture
def make_host(folder: Path) -> Iterator[Callable[..., Host]]:
    made: list[Host] = []

    def make(budget: int = BUDGET) -> Host:
        made.append(Host(folder, budget))
        return made[-1]

    yield make
    for host in made:
        host.store.close()


@pytest.fixture
def make_told(folder: Path) -> Iterator[Callable[..., list[Told]]]:
    made: list[Told] = []

    def make(count: int) -> list[Told]:
        new = [Told(folder, BUDGET) for _ in range(count)]
        made.extend(new)
        return [told.ready() for told in new]

    yield make
    for told in made:
        told.end()


def fill(host: Host, key: str, value: int = 7, nbytes: int = SIZE) -> None:
    assert "fill" == host.claim(key)
    host.allocate(key, nbytes)
    host.fill(key, value)
    host.publish(key, f"of {key}")


def test_two_hosts_have_one_copy(make_host, folder) -> None:
    """The second maps what the first has filled; both read the same, and the node counts it once."""
    one, two = make_host(), make_host()
    fill(one, "a")
    assert "whole" == two.claim("a")
    assert [7, 7, SIZE] == two.read("a") == one.read("a")
    assert b"of a" == two.copies["a"].meta
    found = book(folder)
    assert (SIZE, {"bytes": SIZE, "sealed": True, "hosts": 2}) == (found["used_bytes"], found["copies"]["a"])
    assert SIZE == one.store.shared_bytes == two.store.shared_bytes


def test_a_host_of_two_models_of_one_content_has_one_lease(make_host, folder) -> None:
    """Which ends with the second."""
    host = make_host()
    fill(host, "a")
    again = SharedCopy(host.store, "a", SIZE)
    assert again.claim() and again.is_whole
    assert again.tensor.data_ptr() == host.copies["a"].tensor.data_ptr()
    assert 2 * SIZE == host.store.shared_bytes
    host.release("a")
    assert 1 == book(folder)["copies"]["a"]["hosts"]
    again.release()
    assert 0 == book(folder)["copies"]["a"]["hosts"] == host.store.shared_bytes


def test_a_copy_waits_for_the_next_host(make_host, folder) -> None:
    """Nobody has it, and it is there until room is wanted."""
    fill(make_host(), "a", 3)
    make_host().store.close()
    one = make_host()
    one.store.close()
    two = make_host()
    assert "whole" == two.claim("a")
    assert [3, 3, SIZE] == two.read("a")


def test_a_killed_filler_leaves_its_work_to_who_waits(make_told, folder) -> None:
    """And a killed holder leaves the copy; nothing of either stays in the books."""
    one, two, three = make_told(3)
    assert "fill" == one.do("claim", "a", SIZE)
    one.do("allocate", "a", SIZE)
    one.do("fill", "a", 1)
    assert "wait" == two.do("claim", "a", SIZE) == three.do("claim", "a", SIZE)
    one.signal(signal.SIGKILL)
    poll(lambda: "wait" != two.do("claim", "a", SIZE))
    assert "fill" == two.do("claim", "a", SIZE)
    two.do("allocate", "a", SIZE)
    two.do("fill", "a", 2)
    two.do("publish", "a")
    assert "whole" == three.do("claim", "a", SIZE)
    two.signal(signal.SIGKILL)
    poll(lambda: 1 == book(folder)["copies"]["a"]["hosts"])
    assert [2, 2, SIZE] == three.do("read", "a")
    found = book(folder)
    assert (SIZE, 1) == (found["used_bytes"], found["hosts"])


def test_nobody_waits_for_a_filler_that_is_stopped(make_told, make_host, monkeypatch) -> None:
    """Who has waited long enough fills a copy of its own, which counts as that; the stopped one goes on as it was."""
    (one,) = make_told(1)
    assert "fill" == one.do("claim", "a", SIZE)
    one.do("allocate", "a", SIZE)
    one.signal(signal.SIGSTOP)
    two = make_host()
    monkeypatch.setattr(shared_copy, "IDLE_LIMIT_S", 1.0)
    assert "wait" == two.claim("a", SIZE)
    poll(lambda: "wait" != two.claim("a", SIZE))
    assert "fill" == two.claim("a", SIZE)
    two.allocate("a", SIZE)
    two.fill("a", 9)
    two.publish("a")
    assert [9, 9, SIZE] == two.read("a")
    assert 0 == two.store.shared_bytes
    one.signal(signal.SIGCONT)
    one.do("fill", "a", 1)
    one.do("publish", "a")
    assert [1, 1, SIZE] == one.do("read", "a")
    assert SIZE == one.do("state")["shared"]


def test_copies_outlive_the_keeper(make_host, folder) -> None:
    """It is killed: hosts read on, start another one and offer what they have, which a third host then maps."""
    one, two = make_host(), make_host()
    fill(one, "a", 4)
    fill(two, "b", 5)
    two.claim("a")
    one.cover(SIZE + 3 * MIB)
    before = keeper_pid(folder)
    end_keeper(folder)
    assert [4, 4, SIZE] == two.read("a")
    poll(lambda: one.store.is_there and two.store.is_there and book(folder)["hosts"] == 2)
    found = book(folder)
    assert before != found["pid"]
    assert {"a": SIZE, "b": SIZE} == {key: copy["bytes"] for key, copy in found["copies"].items()}
    assert (3 * MIB, 2 * SIZE + 3 * MIB) == (found["own_bytes"], found["used_bytes"])
    three = make_host()
    assert ["whole", "whole"] == [three.claim("a"), three.claim("b")]
    assert [4, 4, SIZE] == three.read("a")


def test_who_fills_while_the_keeper_dies_publishes_to_the_next(make_host, folder) -> None:
    """The new keeper takes the copy as one from before."""
    one, two = make_host(), make_host()
    assert "fill" == one.claim("a")
    one.allocate("a", SIZE)
    end_keeper(folder)
    poll(lambda: all(host.store.generation and host.store.is_there for host in (one, two)))
    one.fill("a", 6)
    one.publish("a")
    assert "whole" == two.claim("a")
    assert SIZE == one.store.shared_bytes == book(folder)["used_bytes"]


def test_nobody_waits_for_a_stopped_keeper(make_host, folder, monkeypatch) -> None:
    """What a host tells is told at once; who claims does without after a while. One that hangs is killed."""
    monkeypatch.setattr(line, "ANSWER_LIMIT_S", 3.0)
    monkeypatch.setattr(client, "BEGIN_LIMIT_S", 1.0)
    monkeypatch.setattr(line, "HUNG_S", 1e9)
    one, two = make_host(), make_host()
    fill(one, "a", 8)
    fill(one, "c", 3)
    pid = keeper_pid(folder)
    os.kill(pid, signal.SIGSTOP)
    copy = SharedCopy(two.store, "b", SIZE)
    assert not copy.claim() and copy.is_asking
    one.store.cover(BUDGET)
    one.copies.pop("c").release()
    assert one.store.is_there, "nobody waited"
    poll(lambda: "wait" != two.claim("b", SIZE))
    assert "fill" == two.claim("b", SIZE)
    assert not two.store.is_there
    two.allocate("b", SIZE)
    two.fill("b", 2)
    two.publish("b")
    copy.release()
    assert [2, 2, SIZE] == two.read("b")
    assert is_running(pid)
    monkeypatch.setattr(line, "HUNG_S", 0.0)
    poll(lambda: not is_running(pid))
    poll(lambda: {"a", "b"} == book(folder)["copies"].keys())
    poll(lambda: one.store.is_there and two.store.is_there)
    assert BUDGET + SIZE == book(folder)["used_bytes"], "one has all of its own, but for a copy; two has a copy"


def test_a_keeper_that_is_late_is_waited_for(make_host, folder) -> None:
    """A copy that the node has is mapped, and nothing else is thought to have happened."""
    one, two = make_host(), make_host()
    fill(one, "a", 8)
    pid = keeper_pid(folder)
    os.kill(pid, signal.SIGSTOP)
    copy = SharedCopy(two.store, "a", SIZE)
    for _ in range(20):
        assert not copy.claim()
    os.kill(pid, signal.SIGCONT)
    poll(copy.claim)
    assert copy.is_whole
    assert 0 == one.store.generation == two.store.generation
    assert 2 == book(folder)["copies"]["a"]["hosts"]


def test_who_claims_while_the_keeper_is_gone_gets_the_copy_of_the_next(make_host, folder) -> None:
    """It waits for the next one, and for what hosts from before offer that one."""
    one, two = make_host(), make_host()
    fill(one, "a", 8)
    end_keeper(folder)
    poll(lambda: "wait" != two.claim("a", SIZE))
    assert "whole" == two.claim("a", SIZE)
    assert [8, 8, SIZE] == two.read("a")
    assert 2 == book(folder)["copies"]["a"]["hosts"]


def test_who_claims_while_the_keeper_is_being_lost_waits_for_the_next(make_host, folder, monkeypatch) -> None:
    """Its claim was not answered, and the host finds out only a little later that nothing will be."""
    one, two = make_host(), make_host()
    fill(one, "a", 8)
    lose = NodeStore._lose

    def lose_late(store: NodeStore, why: str) -> None:
        time.sleep(0.3)
        lose(store, why)

    monkeypatch.setattr(NodeStore, "_lose", lose_late)
    end_keeper(folder)
    assert "wait" == two.claim("a", SIZE)
    poll(lambda: "wait" != two.claim("a", SIZE))
    assert "whole" == two.claim("a", SIZE)


def test_who_asked_a_keeper_that_went_asks_the_next(make_host, folder, monkeypatch) -> None:
    """The next one may be there before the host hears that the last one has not answered."""
    one, two = make_host(), make_host()
    fill(one, "a", 8)
    ask = NodeStore.ask_later
    monkeypatch.setattr(NodeStore, "ask_later", lambda store, message, generation: ask(store, message, generation - 1))
    assert "wait" == two.claim("a", SIZE)
    monkeypatch.undo()
    assert "whole" == two.claim("a", SIZE)


def test_an_answer_that_nobody_waits_for_any_more_holds_nothing(make_host, folder) -> None:
    """Whether the copy was there, or would have been filled."""
    one, two = make_host(), make_host()
    fill(one, "a")
    pid = keeper_pid(folder)
    os.kill(pid, signal.SIGSTOP)
    copies = [SharedCopy(two.store, key, SIZE) for key in ("a", "b")]
    for copy in copies:
        assert not copy.claim()
        copy.release()
    os.kill(pid, signal.SIGCONT)
    two.store.show()
    two.store.show()
    found = book(folder)
    assert ({"a"}, 1, 0) == (found["copies"].keys(), found["copies"]["a"]["hosts"], two.store.shared_bytes)


def test_a_keeper_that_goes_on_takes_its_hosts_back(make_host, folder, monkeypatch) -> None:
    """It was stopped for a while: the same copies are the same ones, and nothing counts twice."""
    monkeypatch.setattr(line, "ANSWER_LIMIT_S", 0.5)
    one, two = make_host(), make_host()
    fill(one, "a")
    two.claim("a")
    pid = keeper_pid(folder)
    os.kill(pid, signal.SIGSTOP)
    for host in (one, two):
        assert host.store.ask(Tick(), host.store.generation) is None
    os.kill(pid, signal.SIGCONT)
    poll(lambda: one.store.is_there and two.store.is_there and book(folder)["hosts"] == 2)
    found = book(folder)
    assert (pid, SIZE, 2) == (found["pid"], found["used_bytes"], found["copies"]["a"]["hosts"])
    assert SIZE == one.store.shared_bytes == two.store.shared_bytes


def test_the_budget_is_one_for_all(make_host, folder) -> None:
    """What nobody holds goes first, then others are asked; what must be there is there, and the book says so."""
    one, two = make_host(), make_host()
    fill(one, "a", nbytes=30 * MIB)
    fill(one, "b", nbytes=30 * MIB)
    one.release("a")
    fill(two, "c", nbytes=30 * MIB)
    assert {"b", "c"} == book(folder)["copies"].keys()
    two.cover(30 * MIB + 20 * MIB)
    assert 16 * MIB == book(folder)["over_bytes"]
    poll(lambda: one.wanted)
    assert 16 * MIB == one.wanted[0]
    one.release("b")
    found = book(folder)
    assert (0, 50 * MIB, {"c"}) == (found["over_bytes"], found["used_bytes"], found["copies"].keys())
    poll(lambda: 14 * MIB == two.store.free_bytes)


def test_what_a_host_has_of_its_own_is_told_in_steps(make_host, folder) -> None:
    """Not each block of KV; the keeper never knows of less than there is."""
    host = make_host()
    for used in [*range(0, 8 * MIB, MIB // 4), *range(8 * MIB, 0, -MIB // 4)]:
        host.cover(used)
        told = book(folder)["own_bytes"]
        assert used <= told <= used + 2 * MIB
    host.cover(0)
    assert book(folder)["own_bytes"] <= 2 * MIB


def test_a_keeper_ends_when_nobody_is_there(folder) -> None:
    """After its while, whoever started it; the next one knows whether it has cleared up."""
    make_folder(folder)
    listening = listen(folder)
    assert listening is not None and listen(folder) is None
    with listening.socket:
        Keeper(listening.socket, stays_s=0.1).run()
    os.close(listening.lock)
    second = listen(folder)
    assert second is not None and (False, True) == (listening.is_next, second.is_next)
    second.socket.close()
    clear_up(folder)
    os.close(second.lock)
    assert not folder.exists()


def test_a_keeper_of_a_store_leaves_nothing_behind(folder) -> None:
    """Its process ends, and its folder goes."""
    start_keeper(folder, stays_s=0.1)
    poll(lambda: not folder.exists())
    start_keeper(folder)
    assert is_running(keeper_pid(folder))


def test_one_keeper_however_many_start_one(folder) -> None:
    """The others find that there is one and end."""
    for _ in range(3):
        start_keeper(folder)
    pid = keeper_pid(folder)
    start_keeper(folder)
    assert pid == keeper_pid(folder)
    assert os.getpid() != os.getsid(pid)


def test_a_folder_that_others_reach_is_not_used(tmp_path, make_host) -> None:
    """Whoever may write there could be the keeper."""
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("open", "link"):
        with pytest.raises(HostError, match="only this user reaches"):
            start_keeper(tmp_path / name)
    with pytest.raises(HostError, match="cannot be made"):
        start_keeper(tmp_path / "missing" / "store")


def test_stores_of_other_names_are_others() -> None:
    """Of one user, and of another one."""
    assert folder_of("a") != folder_of("b")
    assert str(os.getuid()) in folder_of("a").name


@pytest.mark.parametrize("content", [b"", b"\x00", b"x" * 100, b"\x81\xa4type\xa5Hello"])
def test_a_client_that_says_nonsense_is_shown_out(make_host, folder, content) -> None:
    """The keeper serves the others."""
    one = make_host()
    with connect(folder, 20.0) as connection:
        connection.send(content)
        with contextlib.suppress(ConnectionResetError):
            assert b"" == connection.recv(100)
    fill(one, "a")
    assert 1 == book(folder)["hosts"]


def test_what_is_not_sealed_is_not_taken(make_host, folder) -> None:
    """Nor from whom has filled nothing."""
    one = make_host()
    assert "fill" == one.claim("a")
    one.allocate("a", SIZE)
    memory = one.copies["a"]._memory
    generation = one.store.generation
    answer, _ = one.store.ask(Seal("a", b""), generation, memory.file)
    assert (False, "the memory is not sealed: it could change") == (answer.ok, answer.problem)
    memory.seal()
    answer, _ = one.store.ask(Seal("b", b""), generation, memory.file)
    assert not answer.ok
    assert {"bytes": SIZE, "sealed": False, "hosts": 0} == book(folder)["copies"]["a"]
