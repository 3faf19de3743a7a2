# SPDX-License-Identifier: Apache-2.0
"""Blame for engine hosts that die: the request at fault is found, and nobody else fails with it.

The engines speak vLLM's protocol and compute nothing; a host dies when the test says so.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.serve.client.test_failover_client import Setup
from tokenpool.serve.access.blamed_tenants import ACQUITTED_AFTER, MAX_IN_A_ROW, REFUSED_S, BlamedTenants
from tokenpool.serve.access.tenant_call import CURRENT_CALL
from tokenpool.serve.client import suspects as suspects_module
from tokenpool.serve.client.suspects import MAX_LOSSES, SUSPECTS, Suspects

if TYPE_CHECKING:
    from tests.helpers.told_engine import ToldEngine

pytestmark = pytest.mark.vllm


class Blaming(Setup):
    """One model whose engines are at one host, and who is suspected of its deaths."""

    def __init__(self, folder: Path, suspects: Suspects) -> None:
        super().__init__(folder)
        self.client._suspects = suspects
        suspects.watch(self.client.journal)
        self.engine: ToldEngine | None = None
        self.seen: list[str] = []

    async def start(self) -> None:
        """The host is there with a new engine."""
        self.engine = await self.join("host")

    async def got(self) -> str:
        """The request that the engine gets next."""
        assert self.engine is not None
        wire_id = (await self.engine.added()).request_id
        self.wire = getattr(self, "wire", {}) | {wire_id.partition("~")[0]: wire_id}
        return wire_id.partition("~")[0]

    async def speak(self, request_id: str, *, finished: bool = False) -> None:
        """The engine puts out one token of a request."""
        assert self.engine is not None
        wire_id = self.wire[request_id]
        self.engine.say({wire_id: [7]}, finished={wire_id} if finished else ())
        assert [request_id] == list(await self.next_tokens())

    async def gets_nothing(self) -> bool:
        """Whether the engine is sent nothing more; the answer to a call is behind all that was sent."""
        assert self.engine is not None
        await asyncio.wait_for(self.client.is_sleeping_async(), 30)
        return self.engine._added.empty()

    def die(self) -> None:
        self.client.lost("host")


Test = Callable[..., Coroutine[Any, Any, None]]


def run(test: Test, folder: Path, models: int = 1) -> None:
    """Run a test with that many models of one process."""

    async def main() -> None:
        suspects = Suspects()
        setups = [Blaming(folder / str(i), suspects) for i in range(models)]
        for i in range(models):
            (folder / str(i)).mkdir()
        try:
            await test(*setups)
        finally:
            for setup in setups:
                setup.client.close()
                for engine in setup.engines:
                    engine.close()

    asyncio.run(main())


def test_only_the_request_at_fault_fails(tmp_path: Path) -> None:
    """The first suspect goes on alone, and the one that the host dies of each time fails alone at the third death."""

    async def test(s: Blaming) -> None:
        await s.start()
        for name in ("bad", "a", "b"):
            await s.add(name)
            assert name == await s.got()
        s.die()
        await s.start()
        for death in (2, 3):
            while (name := await s.got()) != "bad":
                assert death == 3 or await s.gets_nothing(), "more than one is on trial"
                await s.speak(name)
            assert ({}, 3) == (s.failed, len(s.client.journal))
            s.die()
            await s.start()
        assert ["bad"] == list(s.failed) and "3 engine hosts died" in str(s.failed["bad"])
        for name in {await s.got(), await s.got()}:
            await s.speak(name, finished=True)
        assert 0 == len(s.client.journal)

    run(test, tmp_path)


@pytest.mark.parametrize("seed", range(12))
def test_groups_that_double_find_it_in_three_deaths(tmp_path: Path, seed: int) -> None:
    """With any number of requests, in any order, the one at fault alone fails, at the third death; groups grow until
    then, and those of the group that it was in go on alone."""
    draw = random.Random(seed)
    names = [f"r{i}" for i in range(draw.randint(1, 40))]
    bad = draw.choice([*names, None])

    async def test(s: Blaming) -> None:
        await s.start()
        for name in names:
            await s.add(name)
            await s.got()
        deaths, done, groups = 1, set(), []
        s.die()
        await s.start()
        while len(done) < len(names) - (bad is not None):
            group = [await s.got()]
            while not await s.gets_nothing():
                group.append(await s.got())
            groups.append(len(group))
            if bad in group and not s.failed:
                deaths += 1
                assert len(group) == 1 or deaths == 2
                s.die()
                await s.start()
                continue
            if len(group) > 1:
                assert {1} == {s.client.journal.get(name).num_losses for name in group}  # type: ignore[union-attr]
            for name in draw.sample(group, len(group)):
                await s.speak(name, finished=True)
            done.update(group)
        while bad is not None and not s.failed:  # the last one of all
            assert bad == await s.got()
            deaths += 1
            s.die()
            await s.start()
        assert [bad] * (bad is not None) == list(s.failed)
        assert (1 if bad is None else MAX_LOSSES) == deaths
        assert bad is not None or len(groups) <= len(names).bit_length()

    run(test, tmp_path)


def test_requests_that_nobody_suspects_go_first(tmp_path: Path) -> None:
    """What came while no host was there does not wait for those that may have ended the last one."""

    async def test(s: Blaming) -> None:
        await s.start()
        for name in ("old", "older"):
            await s.add(name)
            await s.got()
        s.die()
        await s.add("new")
        await s.start()
        assert ["new", "old"] == [await s.got(), await s.got()]
        assert await s.gets_nothing()
        await s.client.abort_requests_async(["old"])
        assert "older" == await s.got(), "one that goes away keeps the next one waiting"

    run(test, tmp_path)


def test_who_was_there_at_three_deaths_goes_on_alone(tmp_path: Path) -> None:
    """One that ends hosts late is found too: it runs alone until it ends, and new requests wait for its first token."""

    async def test(s: Blaming) -> None:
        await s.start()
        for name in ("late", "a"):
            await s.add(name)
            await s.got()
        for _ in range(MAX_LOSSES):
            for name in ("late", "a"):
                await s.speak(name)
            s.die()  # all have tokens, nobody is on trial: all are blamed
            await s.start()
            if MAX_LOSSES > s.client.journal.get("a").num_losses:  # type: ignore[union-attr]
                for _ in "ab":
                    await s.speak(await s.got())
        assert {} == s.failed
        first = await s.got()
        await s.add("new")
        assert await s.gets_nothing()
        await s.speak(first)
        assert "new" == await s.got()
        await s.speak("new", finished=True)
        assert await s.gets_nothing(), "two that are suspected run beside each other"
        second = {"late": "a", "a": "late"}[first]
        await s.speak(first, finished=True)
        assert second == await s.got()
        await s.speak(second)
        s.die()
        assert [second] == list(s.failed)

    run(test, tmp_path)


def test_other_models_are_not_blamed_for_the_one_on_trial(tmp_path: Path) -> None:
    """All models of a host lose it at once; the death is judged once, whoever hears of it first."""

    async def test(one: Blaming, two: Blaming) -> None:
        for s, name in ((one, "bad"), (two, "good")):
            await s.start()
            await s.add(name)
            await s.got()
        for order in ((one, two), (two, one)):
            for s in order:
                s.die()
            await two.start()
            assert "good" == await two.got()
            await two.speak("good")
            await one.start()
            assert "bad" == await one.got()
        assert (2, 1) == tuple(s.client.journal.get(n).num_losses for s, n in ((one, "bad"), (two, "good")))
        for s in (two, one):
            s.die()
        assert (["bad"], []) == (list(one.failed), list(two.failed))

    run(test, tmp_path, models=2)


def test_who_came_meanwhile_is_suspected_with_the_one_on_trial(tmp_path: Path) -> None:
    """A death with a new request that has no token yet convicts nobody: either may have done it."""

    async def test(s: Blaming) -> None:
        await s.start()
        await s.add("a")
        await s.got()
        for death in range(1, MAX_LOSSES):
            s.die()
            await s.client.abort_requests_async([f"new-{death - 1}"])
            await s.start()
            await s.add(f"new-{death}")
            assert {"a", f"new-{death}"} == {await s.got(), await s.got()}
        s.die()
        assert {} == s.failed
        assert (MAX_LOSSES, 1) == tuple(s.client.journal.get(n).num_losses for n in ("a", f"new-{MAX_LOSSES - 1}"))

    run(test, tmp_path)


def test_a_suspect_that_waits_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One without a token for long, such as behind a grammar, lets the next one go."""
    monkeypatch.setattr(suspects_module, "_TRIAL_LIMIT_S", 0.01)

    async def test(s: Blaming) -> None:
        await s.start()
        for name in "ab":
            await s.add(name)
            await s.got()
        s.die()
        await s.start()
        assert {"a", "b"} == {await s.got(), await s.got()}

    run(test, tmp_path)


def test_processes_hold_one_trial_at_a_time(tmp_path: Path) -> None:
    """Several frontends of a host share a lock, which the first one lets go when its suspect is proven."""

    async def test(one: Blaming, two: Blaming) -> None:
        two.client._suspects = Suspects()
        two.client._suspects.watch(two.client.journal)
        for s in (one, two):
            s.client._suspects.share(str(tmp_path / "lock"))
            await s.start()
            await s.add("a")
            await s.got()
        for s in (one, two):
            s.die()
        await one.start()
        assert "a" == await one.got()
        await two.start()
        assert await two.gets_nothing()
        await one.speak("a")
        assert "a" == await two.got()

    run(test, tmp_path, models=2)


# -- tenants -----------------------------------------------------------------------------------------------------


async def add_for(s: Blaming, tenant: str, request_id: str) -> None:
    call = SimpleNamespace(account=SimpleNamespace(config=SimpleNamespace(name=tenant)))
    token = CURRENT_CALL.set(call)  # type: ignore[arg-type]
    try:
        await s.add(request_id)
    finally:
        CURRENT_CALL.reset(token)


def test_a_tenant_whose_requests_end_hosts_is_refused_and_others_are_not(tmp_path: Path, caplog: Any) -> None:
    """It sends one after the other and hangs up each time; the log has its name and the ids. Another tenant is there
    at two deaths of three, and stays."""
    post = {"type": "http", "method": "POST"}

    async def test(s: Blaming) -> None:
        tenants = s.client._suspects.tenants
        await s.start()
        for death in range(MAX_IN_A_ROW):
            assert tenants.refusal(post, "evil") is None
            await add_for(s, "good", f"good-{death}")
            await add_for(s, "evil", f"evil-{death}")
            while True:
                name = await s.got()
                if name.startswith("evil"):
                    break
                await s.speak(name)
            s.die()
            await s.client.abort_requests_async([f"evil-{death}"])
            if death == 0:  # the polite one is done in time
                await s.client.abort_requests_async(["good-0"])
            await s.start()
        refusal = tenants.refusal(post, "evil")
        assert refusal is not None and refusal.status_code == 429
        assert 0 < int(refusal.headers["retry-after"]) <= REFUSED_S
        assert tenants.refusal(post, "good") is None
        assert tenants.refusal({"type": "http", "method": "GET"}, "evil") is None

    run(test, tmp_path)
    assert "tenant=evil in_a_row=3 ids=evil-2" in caplog.text


def test_a_tenant_that_was_not_there_begins_anew() -> None:
    """Only deaths in a row count, none that are long ago; keys of the pool itself are counted and never refused."""
    now = [0.0]
    tenants, post = BlamedTenants(lambda: now[0]), {"type": "http", "method": "POST"}
    for names in ("ab", "b", "ab"):
        tenants.host_died({name: ["x"] for name in names}, on_trial=False)
    assert [False, True] == [tenants.is_suspected(name) for name in "ab"]
    tenants.host_died({"b": ["x"]}, on_trial=True)
    refusal = tenants.refusal(post, "b")
    assert refusal is not None and str(int(REFUSED_S)) == refusal.headers["retry-after"]
    now[0] = REFUSED_S
    assert (None, False) == (tenants.refusal(post, "b"), tenants.is_suspected("b"))
    for _ in range(MAX_IN_A_ROW):
        tenants.host_died({"default": ["x"]}, on_trial=True)
    assert tenants.refusal(post, "default") is None


def test_who_is_there_at_all_deaths_is_refused_only_for_one_on_trial() -> None:
    """Hosts die of something else: tenants that use the pool all the time stay, whether others are on trial or none."""
    tenants, post = BlamedTenants(), {"type": "http", "method": "POST"}
    for number in range(3 * MAX_IN_A_ROW):
        tenants.host_died({"a": ["x"], "b": ["y"]}, on_trial=number % 2 == 0)
        tenants.host_died({"a": ["x"]}, on_trial=False)
    assert tenants.refusal(post, "a") is None
    tenants.host_died({"a": ["x"]}, on_trial=True)
    assert tenants.refusal(post, "a") is not None


def test_new_requests_of_a_suspected_tenant_are_tried_until_some_have_passed(tmp_path: Path) -> None:
    """In groups that double, those of other tenants beside them at once; then all go as before."""

    async def test(s: Blaming) -> None:
        await s.start()
        for _ in range(MAX_IN_A_ROW - 1):
            await add_for(s, "busy", "old")
            await s.got()
            s.die()
            await s.client.abort_requests_async(["old"])
            await s.start()
        names = [f"new-{i}" for i in range(ACQUITTED_AFTER + 5)]
        for name in names:
            await add_for(s, "busy", name)
        await add_for(s, "other", "beside")
        assert {"new-0", "beside"} == {await s.got(), await s.got()}
        assert await s.gets_nothing()
        await s.speak("new-0", finished=True)
        done = 1
        for size in (2, 4, 8):
            group = [await s.got() for _ in range(min(size, len(names) - done))]
            if size < 8:  # the last group makes it more than enough
                assert await s.gets_nothing()
            for name in group:
                await s.speak(name, finished=True)
            done += len(group)
        assert not s.client._suspects.tenants.is_suspected("busy")
        for name in ("a", "b"):
            await add_for(s, "busy", name)
        assert {"a", "b"} == {await s.got(), await s.got()}

    run(test, tmp_path)


def test_a_refused_tenant_gets_an_answer_at_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router answers 429 before the engine hears of the request, and counts it by its reason."""
    from tests.serve.access.test_tenants import Pool, tenant

    pool, blamed = Pool(tenant("a"), tenant("b")), BlamedTenants()
    monkeypatch.setattr(SUSPECTS, "tenants", blamed)
    for _ in range(MAX_IN_A_ROW):
        blamed.host_died({"a": ["x"]}, on_trial=True)

    async def main() -> None:
        refused = await pool.send("a", quick=True)
        assert (429, "host_deaths") == (refused.status_code, refused.json()["error"]["param"])
        assert 200 == (await pool.send("b", quick=True)).status_code

    asyncio.run(main())
    assert 1 == pool.book.accounts["a"].refused["a", "host_deaths"]
