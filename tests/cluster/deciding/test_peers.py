# SPDX-License-Identifier: Apache-2.0
"""Several servers of one pool, as its controller sees them: no Ray, a clock that the test moves."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cluster.deciding.test_reconcile import FRONT, MemoryHost, Rig, attached, deployment
from tokenpool.cluster.machine import clear_after
from tokenpool.cluster.peers import Peers
from tokenpool.cluster.pool_record import PoolRecord, differing, digests
from tokenpool.cluster.values import Peer, SeatState
from tokenpool.config import PoolConfig
from tokenpool.errors import ConfigError
from tokenpool.tenant_config import hash_key

pytestmark = pytest.mark.cpu

OTHER = Peer("other", 128, 2, "10.0.0.8", 8)


def both(*models: str, hosts: Sequence[str] = ("h0",), period_s: float = math.inf) -> Rig:
    """A pool with one host, or these, and two servers."""
    rig = Rig(*map(MemoryHost, hosts), period_s=period_s)
    rig.want([deployment(name) for name in models])
    rig.control.join(OTHER, rig.now_s)
    rig.settle()
    return rig


def leave(rig: Rig, server: str, model: str = "a") -> None:
    rig.control.seats.left(server, model, "h0", "h0-1")


def test_a_seat_is_left_once_all_servers_have_left_it():
    rig = both("a")
    rig.control.withdraw("a")
    rig.period(frontend=False)
    for server in ("front", "front", "other"):
        assert rig.loaded() == {"h0": ["a"]}
        leave(rig, server)
        rig.period(frontend=False)
    assert rig.loaded() == {"h0": []}


def test_a_server_that_died_keeps_no_seat():
    """Others are heard all the time; what the dead one had is told to hosts once."""
    rig = both("a")
    rig.control.withdraw("a")
    rig.period(frontend=False)
    leave(rig, "front")
    rig.control.peers._heard_s["other"] = rig.now_s - 11
    for order in rig.control.tick(rig.now_s):
        rig.carry_out(order)
    assert (rig.loaded(), rig.control.gone) == ({"h0": []}, [OTHER])
    assert rig.actions().count("frontend_lost") == 1


def test_nobody_is_lost_because_the_controller_stood_still():
    """It has heard nobody meanwhile; the first word that it hears then is no sign that the others are silent."""
    rig = both("a", hosts=["h0", "h1"], period_s=0.25)
    seats = dict(rig.control.seats)
    rig.now_s += 60.0
    rig.control.host_reported(rig.hosts["h0"].report(rig.now_s), rig.now_s)
    rig.control.tick(rig.now_s)
    assert dict(rig.control.seats) == seats and rig.control.hosts.keys() == {"h0", "h1"}
    assert rig.control.peers.names == {"front", "other"}
    for _ in range(60):  # it runs, and two say nothing
        rig.now_s += 0.25
        rig.control.host_reported(rig.hosts["h0"].report(rig.now_s), rig.now_s)
        rig.control.peers.beat("front", rig.now_s)
        rig.control.tick(rig.now_s)
    assert rig.control.hosts.keys() == {"h0"} and rig.control.peers.names == {"front"}


def test_a_model_is_withdrawn_once_all_servers_have_drained_it():
    """Not by two words of one; it is wanted until then, and shown as one that goes."""
    rig = both("a")
    assert rig.control.retire("a", 5.0, rig.now_s)
    for server in ("front", "front", "other"):
        rig.control.models.drained("a", server)
        is_wanted = "a" in rig.control.models
        rig.control.tick(rig.now_s)
        assert is_wanted and rig.control.view().retiring == ({} if server == "other" else {"a": 5.0})
    assert [seat.state for seat in rig.control.seats.values()] == [SeatState.LEAVING]
    assert not rig.control.retire("a", 5.0, rig.now_s)


def test_a_server_that_hangs_holds_up_a_drain_for_its_limit_only():
    rig = both("a")
    rig.control.retire("a", 5.0, rig.now_s)
    rig.control.models.drained("a", "front")
    rig.now_s += 14.9
    assert rig.control.models.finished(rig.control.peers.names, rig.now_s) == []
    rig.now_s += 0.2
    assert rig.control.models.finished(rig.control.peers.names, rig.now_s) == ["a"]


def test_two_servers_cannot_add_one_name_and_a_question_that_is_asked_again_is_answered_again():
    """The second answer to the same wish is the first one: the controller may have died before it was heard."""
    rig = both()
    wish = replace(deployment("c"), origin="one")
    version = rig.control.deploy(wish)
    assert rig.control.deploy(wish) == version
    with pytest.raises(ConfigError, match="in the pool already"):
        rig.control.deploy(replace(wish, origin="two"))
    assert rig.control.deploy(deployment("d")) == version + 1


def test_a_model_is_everywhere_once_each_server_has_an_engine_of_it():
    rig = both("a")
    servers = rig.control.peers.names
    assert not rig.control.seats.are_joined(servers, "a"), "only one of them has"
    rig.control.seats.joined("other", "a", "h0", "of the past")
    assert not rig.control.seats.are_joined(servers, "a")
    rig.control.seats.joined("other", "a", "h0", "h0-1")
    assert rig.control.seats.are_joined(servers, "a")


def test_a_new_controller_waits_for_the_servers_of_the_former_one_and_gives_up_those_that_died():
    """Nothing is unloaded behind the back of one that lives; hosts forget one that died meanwhile."""
    rig = both("a")
    snapshot, models = rig.control.snapshot(), rig.control.models.kept
    servers = list(rig.control.peers)
    rig.control = rig.controller(snapshot, "second", models=models)
    rig.control.peers = Peers(timeout_s=10.0, now_s=rig.now_s, known=servers)
    assert rig.control.join(FRONT, rig.now_s) is False, "its engines know it"
    rig.period()
    assert not rig.control.is_settled
    rig.settle(6)
    assert rig.control.is_settled and rig.control.gone == []
    rig.settle(20)
    assert rig.control.gone == [OTHER]
    assert rig.control.join(OTHER, rig.now_s) is True, "it has to be attached anew"


def test_a_pool_is_orphaned_while_no_server_is_there():
    peers = Peers(timeout_s=10.0, now_s=100.0)
    assert peers.alone_s(160.0) == 60.0, "one that nobody has joined yet"
    peers.join(FRONT, 160.0)
    assert peers.alone_s(1000.0) < 0
    peers.leave("front", 1000.0)
    assert peers.alone_s(1007.0) == 7.0
    peers.join(OTHER, 1008.0)
    assert peers.expire(1017.0) == [] and peers.expire(1019.0) == [OTHER]
    assert peers.alone_s(1020.0) == 1.0


def test_the_eldest_server_is_the_first_of_the_view():
    rig = both("a")
    assert [peer.name for peer in rig.control.view().peers] == ["front", "other"]
    rig.control.leave("front", rig.now_s)
    rig.control.join(FRONT, rig.now_s)
    assert [peer.name for peer in rig.control.view().peers] == ["other", "front"]


def test_what_is_being_removed_is_not_kept_for_the_next_controller():
    rig = attached(Rig(MemoryHost("h0")), deployment("a"), deployment("b"))
    rig.control.retire("a", 60.0, rig.now_s)
    assert [kept.name for kept in rig.control.models.kept] == ["b"]


SOFTWARE = {"vllm": "0.32.0"}
POOL = {
    "models": [{"name": "a", "model": "x/a"}],
    "device_memory": "1GiB",
    "host_memory": "1GiB",
    "admin_key": "test-admin-key-0123",
    "tenants": [{"name": "t", "keys": hash_key("test-tenant-key-01234")}],
}


@pytest.mark.parametrize(
    "change, key",
    [
        ({"device_memory": "2GiB"}, "device_memory"),
        ({"host_timeout": "7s"}, "host_timeout"),
        ({"admin_key": "test-admin-key-0124"}, "admin_key"),
        ({"tenants": [{"name": "t", "keys": hash_key("test-tenant-key-01235")}]}, "tenants"),
        ({"cluster": {"host_timeout": "7s"}}, "cluster.host_timeout"),
        ({"cluster": {"orphan_timeout": "1h"}}, "cluster.orphan_timeout"),
    ],
)
def test_settings_that_differ_are_named_and_none_is_told(change, key):
    """By their keys in the pool file. The record has digests, which differ from one pool to the next."""
    pool = PoolConfig.from_dict(POOL)
    record = PoolRecord("identity", pool.cluster, {}, settings=digests(pool, SOFTWARE, "identity"))
    assert differing(PoolConfig.from_dict(POOL | change), SOFTWARE, record) == [key]
    assert set(digests(pool, SOFTWARE, "identity").values()).isdisjoint(digests(pool, SOFTWARE, "another").values())
    assert differing(pool, {"vllm": "0.33.0"}, record) == ["version of vllm"]
    assert "test-" not in repr(record)


@pytest.mark.parametrize("change", [{"port": 1}, {"host": "h"}, {"frontends": 3}, {"shutdown_timeout": "1s"}])
def test_settings_of_one_server_may_differ(change):
    pool = PoolConfig.from_dict(POOL)
    record = PoolRecord("identity", pool.cluster, {}, settings=digests(pool, SOFTWARE, "identity"))
    assert differing(PoolConfig.from_dict(POOL | change), SOFTWARE, record) == []


def test_only_temporary_folders_of_a_process_that_is_gone_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing elsewhere, no link, and nothing of a process that lives, whatever is named."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "kept" / "tokenpool-kept").mkdir(parents=True)
    names = ["tokenpool-a", "tokenpool-b", "other", "kept/tokenpool-kept"]
    for name in names[:3]:
        (tmp_path / name).mkdir()
    (tmp_path / "tokenpool-link").symlink_to(tmp_path / "kept")
    folders = [str(tmp_path / name) for name in [*names, "tokenpool-link"]]
    clear_after(os.getpid(), folders)
    assert all(Path(folder).exists() for folder in folders)
    clear_after(2**22 + 1, [*folders, "", "/", str(tmp_path / "tokenpool-none")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "other", "tokenpool-link"]
    assert (tmp_path / "kept" / "tokenpool-kept").exists()
