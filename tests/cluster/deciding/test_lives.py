# SPDX-License-Identifier: Apache-2.0
"""Models on demand in a cluster: the controller's logic and servers in memory, without Ray, on a clock of the test."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cluster.deciding.lives_world import World, model
from tokenpool.cluster.deciding.lives import MAX_HOST_DEATHS
from tokenpool.errors import ConfigError

pytestmark = pytest.mark.cpu


def test_a_cold_model_is_built_once_for_all_who_wait_and_served_by_all():
    w = World([model("a"), model("b")], num_hosts=2)
    w.settle()
    assert (w.loaded(), w.control.seats) == (set(), {})
    assert all(seen.is_cold for seen in w.control.view().models.values())
    for server in ("one", "one", "two"):
        w.ask(server, "a")
    w.run()
    assert w.ends() == ["answered"] * 3
    assert (w.loaded(), sum((host.built for host in w.hosts.values()), Counter())) == ({"a"}, {"a": 1})
    w.settle(1)
    assert w.control.view().models["b"].is_cold and w.actions("demand_load") == [("demand_load", "a")]


def test_what_nobody_uses_is_unloaded_once_all_servers_have_finished():
    w = World([model("a", unload_after_s=5.0), model("b", unload_after_s=5.0, keep="host")])
    long = w.ask("two", "a", steps=30)
    w.ask("one", "b")
    w.settle(12)
    assert w.loaded() == {"a", "b"} and not long.end
    w.run()
    w.settle(9)
    assert w.loaded() == {"a", "b"}, "not so long"
    w.settle(8)
    assert (w.loaded(), w.control.view().models["a"].is_cold) == ({"b"}, True)
    w.ask("one", "a")
    w.run()
    assert w.hosts["h0"].built == {"a": 2, "b": 1}


def test_the_longest_idle_model_makes_room_and_kept_ones_stay():
    w = World([model("k", keep="device"), *(model(name) for name in "abc")], max_loaded=3)
    for name in "kabac":
        w.ask("one", name)
        w.run()
        w.settle(2)
    assert w.loaded() == {"k", "a", "c"}


def test_models_of_two_servers_take_turns_and_each_load_serves_who_waited():
    """`max_loaded: 1`, both servers always want another model: both are answered, and no load is for nobody."""
    w = World([model("a"), model("b")], max_loaded=1, load_periods=3)
    for _ in range(12):
        for server, name in (("one", "a"), ("two", "b")):
            if all(r.end for r in w.requests if r.model == name):
                w.ask(server, name, steps=3)
        w.settle(4)
    w.run()
    assert set(w.ends()) == {"answered"}
    asked = Counter(request.model for request in w.requests)
    assert min(asked.values()) >= 2 and sum(w.hosts["h0"].built.values()) <= sum(asked.values())


def test_nobody_starves_beside_a_model_that_is_always_busy():
    w = World([model("a"), model("b")], max_loaded=1)
    for i in range(60):
        w.ask("one", "a", steps=4)
        if i == 10:
            wanted = w.ask("two", "b")
        w.period()
    assert wanted.end == "answered"
    w.run()


def test_room_in_memory_is_made_where_the_model_may_go():
    """Of two hosts one is for the model that is wanted: what lies on the other one stays, however long it was idle."""
    w = World([model("a", 30), model("b", 30), replace(model("big", 50), hosts=("h1",))], num_hosts=2)
    for name in "ab":
        w.ask("one", name)
        w.run()
    assert [sorted(host.models) for host in w.hosts.values()] == [["a"], ["b"]]
    w.ask("one", "big")
    w.run()
    assert [sorted(host.models) for host in w.hosts.values()] == [["a"], ["big"]]


def test_what_never_fits_is_refused_at_once_and_names_why():
    w = World([model("a", 100), model("b")])
    asked = [w.ask("one", "a"), w.ask("two", "a"), w.ask("two", "b")]
    w.run(8)
    assert ["no host has room" in request.end for request in asked] == [True, True, False]
    assert (w.loaded(), asked[2].end) == ({"b"}, "answered")


def test_nothing_is_wanted_in_vain_where_all_that_is_loaded_is_kept():
    w = World([model("k", keep="host"), model("a")], max_loaded=1)
    w.ask("one", "k")
    w.run()
    asked = w.ask("two", "a")
    w.run(8)
    assert "max_loaded is 1" in asked.end and w.loaded() == {"k"}


def test_a_load_that_fails_is_told_to_all_once_and_tried_again_later():
    w = World([model("a")], num_hosts=2)
    for host in w.hosts.values():
        host.refuses["a"] = ConfigError("no file")
    asked = [w.ask(server, "a") for server in ("one", "two", "two")]
    w.run(20)
    assert ["no file" in request.end for request in asked] == [True] * 3
    assert w.control.view().models["a"].error is not None
    w.settle(30)
    seen = w.control.view().models["a"]
    assert (seen.error, seen.is_cold, w.actions("wake")) == (None, True, [("wake", "a")]), "nobody wants it"
    for host in w.hosts.values():
        host.refuses.clear()
    w.ask("one", "a")
    w.run()
    assert w.ends()[3] == "answered"


def test_a_lost_host_that_comes_back_leaves_no_more_than_max_loaded():
    """What nobody uses rests first; a model that is used finishes what it has, and its next request has it loaded."""
    w = World([model("a"), model("b")], num_hosts=2, max_loaded=1)
    long = w.ask("one", "a", steps=60)
    w.settle()
    (host,) = [host for host in w.hosts.values() if "a" in host.models]
    host.is_there = False
    w.settle(6)
    w.kill_server("one")
    w.settle(6)
    w.ask("two", "b", steps=40)
    w.settle(10)
    assert (w.loaded(), long.end) == ({"b"}, "lost with its server")
    host.is_there, w.have_returned = True, True
    w.settle(1)
    assert w.loaded() == {"a", "b"}
    w.settle(4)
    assert w.loaded() == {"b"} and not w.requests[1].end
    w.have_returned = False
    w.ask("two", "a")
    w.run()
    assert w.requests[2].end == "answered"


def test_a_host_that_dies_while_it_loads_keeps_nobody_from_being_answered():
    w = World([model("a")], num_hosts=2, load_periods=4)
    w.ask("one", "a")
    w.settle(3)
    (host,) = [name for name, host in w.hosts.items() if host.building]
    w.hosts[host].is_there = False
    w.run()
    assert w.ends() == ["answered"]


def test_a_model_that_hosts_die_of_is_refused():
    w = World([model("a"), model("b")], num_hosts=2, load_periods=2)
    asked = w.ask("one", "a")
    deaths = 0
    for _ in range(200):
        for name, host in w.hosts.items():
            if host.building and host.building.name == "a" and host.orders[0][1] == 0:
                deaths += 1
                w.kill_host(name)
        w.period()
        if asked.end:
            break
    assert f"{MAX_HOST_DEATHS} engine hosts ended" in asked.end and deaths == MAX_HOST_DEATHS
    w.ask("one", "b")
    w.run()


def test_a_dead_server_takes_its_wishes_along():
    w = World([model("a"), model("b")], max_loaded=1, load_periods=2)
    w.ask("one", "b", steps=30)
    w.settle()
    w.ask("two", "a")
    w.settle(2)
    w.kill_server("two")
    w.run()
    w.settle(20)
    assert w.loaded() == {"b"} and ("wake", "a") not in w.actions("wake")


@pytest.mark.parametrize("with_snapshot", [True, False])
def test_a_controller_that_dies_while_a_model_loads_has_it_built_once(with_snapshot):
    """The next one finds that a host is at it, and puts no other one to work."""
    w = World([model("a"), model("b"), model("c")], num_hosts=2, max_loaded=1, load_periods=6)
    w.ask("one", "a")
    w.settle(3)
    w.replace_controller(with_snapshot=with_snapshot)
    w.ask("two", "b")
    w.run()
    assert set(w.ends()) == {"answered"}
    assert sum((host.built for host in w.hosts.values()), Counter()) == {"a": 1, "b": 1}


def test_a_new_controller_takes_over_streams_and_what_was_unloaded_stays_cold():
    w = World([model("a"), model("s", at_start=True, unload_after_s=3.0)])
    w.settle(20)
    assert w.loaded() == set(), "loaded with the pool, and unloaded when it was idle"
    long = w.ask("one", "a", steps=40)
    w.settle(5)
    w.replace_controller()
    w.settle(5)
    assert (w.loaded(), w.hosts["h0"].built["a"], long.end) == ({"a"}, 1, "")
    w.run()
    assert w.control.view().models["s"].is_cold


def test_a_model_that_is_not_configured_yet_is_asked_for_at_whoever_waits():
    w = World([replace(model("a"), payload=None), replace(model("b"), payload=None)])
    w.settle(2)
    w.ask("one", "a")
    w.ask("two", "b")
    told = [w.control.tell(s.name, s.uses(w.now_s), w.now_s) for s in w.servers.values()]
    assert told == [["a"], ["b"]]
    w.settle(3)
    assert w.loaded() == set()
    w.control.equip("a", 1, b"spec", w.now_s)
    w.control.equip("b", 1, ConfigError("is no flag", key="--x"), w.now_s)
    w.run(10)
    assert [end.partition(":")[0] for end in w.ends()] == ["answered", "refused"] and "--x" in w.ends()[1]


def test_a_tenant_that_wants_many_models_waits_for_itself():
    names = [f"a{i}" for i in range(8)]
    w = World([model(name) for name in [*names, "b0", "b1"]], max_loaded=1)
    for name in names:
        w.ask("one", name, tenant="many")
    w.settle(2)
    for name in ("b0", "b1"):
        w.ask("two", name, tenant="few")
    w.run()
    woken = [name for _, name in w.actions("wake")]
    assert woken.index("b0") <= 2 and woken.index("b1") <= 4


def test_an_added_model_is_loaded_at_once_within_max_loaded():
    w = World([model("a"), model("b")], max_loaded=1)
    w.ask("one", "a")
    w.run()
    w.control.deploy(model("new", at_start=True))
    w.control.deploy(model("cold"))
    w.settle(12)
    assert w.loaded() == {"new"} and w.control.view().models["cold"].is_cold
    w.control.withdraw("new")
    w.settle(6)
    assert w.loaded() == set()


@pytest.mark.parametrize("mib", [4, 1000], ids=["it cannot be loaded", "it is too large"])
@pytest.mark.parametrize("is_live", [False, True])
def test_a_model_that_cannot_be_loaded_at_the_start_is_in_nobodys_way(mib, is_live):
    """It is tried again and again, until another model waits for its place; later it has its turn as others have."""
    w = World([model("bad", mib, at_start=True, keep="host"), model("a")], max_loaded=1, is_live=is_live)
    w.hosts["h0"].refuses = {"bad": ConfigError("no file")}
    w.settle(60)
    assert w.control.lives.is_awake("bad") and w.control.view().models["bad"].error is not None
    w.ask("one", "a")
    w.run(40)
    w.ask("two", "bad")
    w.run(400)
    assert [end.partition(":")[0] for end in w.ends()] == ["answered", "refused"]
    if mib == 4:
        w.hosts["h0"].refuses = {}
        w.settle(200)
        w.ask("two", "bad")
        w.run(400)
        assert w.ends()[-1] == "answered"


def test_a_server_that_is_late_at_a_new_controller_keeps_what_it_uses():
    """It was stopped for some seconds: others wait until it has told what it has."""
    w = World([model("a"), model("b"), model("c", at_start=True)], max_loaded=2)
    w.server_timeout_s = 10.0
    for name in "ac":
        w.ask("one", name, steps=60)
    w.settle(8)
    w.servers["one"].is_stopped = True
    w.replace_controller()
    w.ask("two", "b")
    w.settle(4)
    w.control.withdraw("c")
    w.settle(10)
    assert w.loaded() == {"a", "c"} and w.control.is_settled
    w.servers["one"].is_stopped = False
    w.run()
    assert set(w.ends()) == {"answered"} and w.hosts["h0"].built == {"a": 1, "b": 1, "c": 1}


def test_a_server_cannot_make_what_hosts_need_of_a_model_before_anything_was_decided():
    w = World([model("a")])
    version = w.control.deploy(replace(model("b"), payload=None))
    w.control.equip("b", version, ConfigError("is no flag", key="--x"), w.now_s)
    w.settle(1)
    w.ask("one", "b")
    w.settle(1)
    assert "--x" in w.ends()[0]


def test_what_rests_while_requests_wait_for_it_and_is_lost_with_the_last_host():
    w = World([model("a"), model("b")], max_loaded=1)
    w.ask("one", "a", steps=100)
    w.settle(6)
    w.ask("two", "b")
    while not w.control.lives.rest_of("a"):
        w.settle(1)
    w.ask("two", "a")
    w.hosts["h0"].is_there = False
    w.settle(10)
    assert w.control.hosts == {}
    w.hosts["h0"].die()
    w.hosts["h0"].is_there = True
    w.run()
    assert set(w.ends()) == {"answered"}


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["ask"] * 8 + ["host dies", "host away", "server dies", "server stops", "controller", "refuse", "wait"]
        ),
        st.integers(0, 5),
        st.integers(0, 30),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(
    events=EVENTS,
    num_hosts=st.integers(1, 3),
    max_loaded=st.sampled_from([None, 1, 2]),
    sizes=st.lists(st.sampled_from([4, 20, 40]), min_size=3, max_size=6),
    unload_after_s=st.sampled_from([math.inf, 2.0]),
    load_periods=st.integers(0, 3),
    is_live=st.booleans(),
    server_timeout_s=st.sampled_from([2.0, 8.0]),
    bad=st.sampled_from([None, {"at_start": True}, {"at_start": True, "keep": "host"}]),
)
def test_every_request_is_answered_or_refused(
    events, num_hosts, max_loaded, sizes, unload_after_s, load_periods, is_live, server_timeout_s, bad
):
    """Through deaths of hosts, servers and controllers, servers that are stopped and loads that fail, with a model that
    is to be there always and that no host can hold: no seat is taken from a model that is in use, never more than
    `max_loaded` are loaded, and in the end nobody waits."""
    models = [model(f"m{i}", mib, unload_after_s=unload_after_s) for i, mib in enumerate(sizes)]
    if bad is not None:
        models[0] = model("m0", 1000, **bad)
    w = World(models, num_hosts, max_loaded, is_live, load_periods=load_periods)
    w.server_timeout_s = server_timeout_s
    for what, which, steps in events:
        name, host = models[which % len(models)].name, w.hosts[f"h{which % num_hosts}"]
        server = ["one", "two"][which % 2]
        if what == "ask" and w.servers[server].is_there:
            w.ask(server, name, steps, tenant="xy"[steps % 2])
        elif what == "host dies":
            w.kill_host(host.name)
        elif what == "host away":
            host.is_there = not host.is_there
            w.have_returned |= host.is_there
        elif what == "server dies" and server == "two":
            w.kill_server(server)
        elif what == "server stops":
            w.servers[server].is_stopped = not w.servers[server].is_stopped
        elif what == "controller":
            w.replace_controller(with_snapshot=steps % 2 == 0)
        elif what == "refuse":
            host.refuses = {} if name in host.refuses else {name: ConfigError("no file")}
        w.settle(1 + steps % 3)
    for host in w.hosts.values():
        w.have_returned |= not host.is_there
        host.is_there, host.refuses = True, {}
    for server in w.servers.values():
        server.is_stopped = False
    w.settle(80)
    w.have_returned = False  # by now as many rest as were too many
    w.run(2000)
    w.settle(20)
    for request in w.requests:
        is_told = any(why in request.end for why in ("no file", "no host", "engine hosts ended", "so many are kept"))
        assert request.end in ("answered", "lost with its server") or is_told
    if unload_after_s < math.inf:
        w.settle(40)
        assert w.loaded() == set() and w.control.seats == {}
