# SPDX-License-Identifier: Apache-2.0
"""The engine client by itself: which host gets what, what counts as an answer, and what is sent again.

The engines here speak vLLM's protocol and compute nothing: they answer what the test tells them to, also what no real
engine can be made to say at the right moment, such as a word that comes after it was left.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.helpers.told_engine import ToldEngine
    from tokenpool.serve.client.engine_client import PoolEngineClient

pytestmark = pytest.mark.vllm


class Setup:
    """A client without hosts, and engines to join."""

    def __init__(self, folder: Path) -> None:
        from tokenpool.serve.client.engine_client import PoolEngineClient

        config = SimpleNamespace(parallel_config=SimpleNamespace())
        self.client: PoolEngineClient = PoolEngineClient(config)  # type: ignore[arg-type]
        self.client._knows_config = True  # there is no model whose config a greeting would complete
        self._folder = folder
        self.engines: list[ToldEngine] = []
        self.failed: dict[str, Exception] = {}
        self.client.fail = self.failed.__setitem__

    async def join(self, host: str) -> ToldEngine:
        from tests.helpers.told_engine import ToldEngine

        engine = ToldEngine(self._folder / str(len(self.engines)))
        self.engines.append(engine)
        await self.client.join(host, engine.addresses)
        return engine

    async def add(self, request_id: str, **fields: Any) -> None:
        from tests.helpers.told_engine import make_request

        await self.client.add_request_async(make_request(request_id, **fields))

    async def next_tokens(self) -> dict[str, list[int]]:
        """Tokens of the next outputs by request."""
        outputs = await asyncio.wait_for(self.client.get_output_async(), 30)
        return {output.request_id: output.new_token_ids for output in outputs.outputs}


Scenario = Callable[[Setup], Coroutine[Any, Any, None]]


async def with_setup(folder: Path, test: Scenario) -> None:
    """Run a test, and close what it made."""
    setup = Setup(folder)
    try:
        await test(setup)
    finally:
        setup.client.close()
        for engine in setup.engines:
            engine.close()


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Scenario], None]:
    """Run a test on an event loop of its own."""
    return lambda test: asyncio.run(with_setup(tmp_path, test))


def test_the_host_with_the_fewest_requests_gets_the_next(run) -> None:
    """Requests spread by what is unfinished, unless the owner chooses otherwise."""

    async def test(s: Setup) -> None:
        one, two = await s.join("one"), await s.join("two")
        assert ["one", "two"] == s.client.hosts
        for name in "abc":
            await s.add(name)
        assert (2, 1) == (s.client.load("one"), s.client.load("two"))
        assert (["a", "c"], ["b"]) == ([(await one.added()).request_id for _ in "ac"], [(await two.added()).request_id])
        one.say({"a": [1]}, finished={"a"})
        assert {"a": [1]} == await s.next_tokens()
        s.client.route = lambda request, loads: max(loads, key=loads.__getitem__)
        await s.add("d")
        await s.client.abort_requests_async(["b"])
        assert ["b"] == await two.aborted()
        assert (2, 0) == (s.client.load("one"), s.client.load("two"))

    run(test)


def test_a_lost_request_is_sent_again_with_what_was_delivered(run) -> None:
    """The message is the first one, with the tokens so far, under an id that no earlier answer has."""

    async def test(s: Setup) -> None:
        one, two = await s.join("one"), await s.join("two")
        await s.add("a", max_tokens=9, prompt_logprobs=2)
        await s.add("b")
        first = await one.added()
        one.say({"a": [5, 6]})
        assert {"a": [5, 6]} == await s.next_tokens()
        s.client.lost("one")
        await two.added()
        again = await two.added()
        assert ([5, 6], first.prompt_token_ids) == (again.delivered_token_ids, again.prompt_token_ids)
        assert (first.arrival_time, 9) == (again.arrival_time, again.sampling_params.max_tokens)
        assert (2, None) == (first.sampling_params.prompt_logprobs, again.sampling_params.prompt_logprobs)
        assert first.request_id != again.request_id
        two.say({again.request_id: [7]})
        assert {"a": [7]} == await s.next_tokens()

    run(test)


def test_requests_wait_while_no_host_is_there(run) -> None:
    """They are given to the next host, but for those that were aborted meanwhile; first what saw no host die."""

    async def test(s: Setup) -> None:
        await s.join("one")
        await s.add("a")
        await s.add("b")
        s.client.lost("one")
        await s.add("c")
        assert (3, []) == (s.client.num_waiting, s.client.hosts)
        await s.client.abort_requests_async(["b"])
        again = await s.join("one")
        ids = [(await again.added()).request_id.partition("~")[0] for _ in "ac"]
        assert (["c", "a"], 0, 2) == (ids, s.client.num_waiting, s.client.load("one"))

    run(test)


def test_a_host_that_was_left_is_not_heard_any_more(run) -> None:
    """Its requests move, it is told to drop them, and what it still says of them does not count."""

    async def test(s: Setup) -> None:
        one, two = await s.join("one"), await s.join("two")
        await s.add("a")
        await one.added()
        one.say({"a": [1]})
        assert {"a": [1]} == await s.next_tokens()
        await s.client.leave("one")
        assert (["two"], ["a"]) == (s.client.hosts, await one.aborted())
        again = await two.added()
        one.say({"a": [2]})
        two.say({again.request_id: [3]})
        assert ([1], {"a": [3]}) == (again.delivered_token_ids, await s.next_tokens())

    run(test)


@pytest.mark.parametrize("fault", ["none", "import", "target", "source"])
def test_a_request_that_its_engine_gave_up_is_sent_on(run, fault) -> None:
    """With its blocks or without; if the other host is gone to where it was, if its own is gone to the other one."""

    async def test(s: Setup) -> None:
        one, two = await s.join("one"), await s.join("two")
        await s.add("a")
        await one.added()
        one.say({"a": [1]})
        assert {"a": [1]} == await s.next_tokens()
        one.answers["export_kv"] = {"keys": [b"k"], "given_up": True}
        two.answers["import_kv"] = 0 if fault == "import" else 1
        lost = {"target": "two", "source": "one"}.get(fault)
        two.on_call = lambda method: lost and method == "import_kv" and s.client.lost(lost)
        moved = await asyncio.wait_for(s.client.move_with_kv("a", "two"), 30)

        place, engine = ("one", one) if fault == "target" else ("two", two)
        again = await engine.added()
        assert ("a~1", [1]) == (again.request_id, again.delivered_token_ids)
        assert [place] == [link.host for link in [s.client.journal.get("a").place]]
        assert moved is (fault in ("none", "source"))
        assert {host: s.client.load(host) for host in s.client.hosts}[place] == 1

    run(test)


def test_a_request_that_stays_with_its_engine_is_not_sent_to_one_that_is_gone(run) -> None:
    """Its blocks were copied and it goes on: it stays when the other host has died meanwhile."""

    async def test(s: Setup) -> None:
        one, two = await s.join("one"), await s.join("two")
        await s.add("a")
        await one.added()
        one.answers["export_kv"] = {"keys": [b"k"], "given_up": False}
        two.on_call = lambda method: method == "import_kv" and s.client.lost("two")
        assert not await asyncio.wait_for(s.client.move_with_kv("a", "two"), 30)
        one.say({"a": [1]})
        assert {"a": [1]} == await s.next_tokens()

    run(test)


def test_the_last_host_is_left_when_its_requests_have_ended(run) -> None:
    """Without another host they are finished where they are; one that joins meanwhile takes them."""

    async def test(s: Setup) -> None:
        one = await s.join("one")
        await s.add("a")
        await s.add("b")
        leaving = asyncio.create_task(s.client.leave("one"))
        one.say({"a": [1]}, finished={"a"})
        assert {"a": [1]} == await s.next_tokens()
        assert not leaving.done()
        two = await s.join("two")
        await asyncio.wait_for(leaving, 30)
        assert "b" == (await two.added()).request_id.partition("~")[0]

    run(test)


def test_a_request_that_hosts_die_of_is_given_up(run) -> None:
    """After three losses it fails and says why; not a fourth host gets it. Hosts ended on purpose do not count."""

    async def test(s: Setup) -> None:
        from tokenpool.serve.client.suspects import MAX_LOSSES

        await s.add("a")
        await (await s.join("one")).added()
        s.client.lost("one", blame=False)
        for _ in range(MAX_LOSSES):
            assert {} == s.failed
            await (await s.join("one")).added()
            s.client.lost("one")
        assert "3 engine hosts died" in str(s.failed["a"])
        assert 0 == s.client.num_waiting

    run(test)


def test_a_request_with_streamed_input_fails_with_its_host(run) -> None:
    """What such a request has taken in is not kept, so that it ends with an error instead of a wrong answer."""

    async def test(s: Setup) -> None:
        one = await s.join("one")
        await s.add("a", resumable=True)
        await s.add("a", resumable=True)
        assert ["a", "a"] == [(await one.added()).request_id for _ in "aa"]
        s.client.lost("one")
        assert "its input is streamed" in str(s.failed["a"])

    run(test)


def test_streamed_input_stays_at_its_host(run) -> None:
    """All pieces go where the first one went, also once the answer to one has ended; the last word ends the request."""

    async def test(s: Setup) -> None:
        one, two = await s.join("one"), await s.join("two")
        await s.add("a", resumable=True)
        await one.added()
        one.say({"a": [1]}, finished={"a"})
        assert {"a": [1]} == await s.next_tokens()
        await s.add("b")
        await two.added()
        await s.add("a", resumable=True)
        assert "a" == (await one.added()).request_id
        one.say({"a": [2]}, finished={"a"})
        assert {"a": [2]} == await s.next_tokens()
        assert 1 == s.client.load("one")
        await s.add("a", resumable=False)
        assert ("a", 0) == ((await one.added()).request_id, s.client.load("one"))

    run(test)


def test_calls_go_to_all_hosts_and_wait_for_one(run) -> None:
    """The first host's answer is returned; adapters are loaded on hosts that join later."""

    async def test(s: Setup) -> None:
        from vllm.lora.request import LoRARequest

        waiting = asyncio.create_task(s.client.is_sleeping_async())
        one, two = await s.join("one"), await s.join("two")
        assert await asyncio.wait_for(waiting, 30) is False
        assert await s.client.add_lora_async(LoRARequest("l", 1, "/l"))
        assert "add_lora" in one.calls and "add_lora" in two.calls
        three = await s.join("three")
        assert ["add_lora"] == three.calls
        await s.client.remove_lora_async(1)
        assert [] == (await s.join("four")).calls

    run(test)


def test_a_call_that_is_given_up_leaves_nothing(run) -> None:
    """Nothing is kept of a call whose caller is gone, and an answer that comes late is dropped."""

    async def scenario(setup: Setup) -> None:
        engine = await setup.join("h0")
        link = next(iter(setup.client._links.values()))
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await link.call("is_sleeping")
        assert {} == link._calls
        assert await link.call("is_sleeping") is False
        assert 4 == engine.calls.count("is_sleeping")

    run(scenario)


def test_an_engine_that_says_it_is_dead_is_lost(run) -> None:
    """vLLM's last word counts as much as the end of the host's process."""

    async def test(s: Setup) -> None:
        one, two = await s.join("one"), await s.join("two")
        await s.add("a")
        await one.added()
        one.die()
        assert "a" == (await two.added()).request_id.partition("~")[0]
        assert ["two"] == s.client.hosts

    run(test)


def test_times_of_another_machine_become_our_own() -> None:
    """A clock that is ahead or behind by hours does not show in latencies; distances stay as they are."""
    from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs

    from tokenpool.serve.client.engine_link import EngineLink

    link = EngineLink.__new__(EngineLink)
    link._clock_behind_s = math.inf
    told = time.monotonic() + 9999
    event = EngineCoreEvent(EngineCoreEventType.QUEUED, told - 2)
    first = EngineCoreOutputs(outputs=[EngineCoreOutput("a", [1], events=[event])], timestamp=told)
    later = EngineCoreOutputs(timestamp=told - 1)
    link._to_own_clock(first)
    assert first.timestamp <= time.monotonic()
    assert pytest.approx(2) == first.timestamp - event.timestamp
    link._to_own_clock(later)
    assert pytest.approx(1) == first.timestamp - later.timestamp
