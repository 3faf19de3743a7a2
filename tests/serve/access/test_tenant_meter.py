# SPDX-License-Identifier: Apache-2.0
"""What the meter adds to vLLM's own OutputProcessor and to the engine's client: places, ends, and a salt per tenant."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest

from tests.serve.access.test_tenants import POST, settle, tenant
from tokenpool.policy.routing import HostQueue
from tokenpool.serve.access.tenant_call import CURRENT_CALL, Call
from tokenpool.serve.access.tenant_line import TenantLine
from tokenpool.serve.access.tenant_meter import meter
from tokenpool.serve.access.tenants import Account, TenantBook
from tokenpool.serve.client.request_route import by_prefix

pytestmark = pytest.mark.vllm


class Frontend:
    """A metered OutputProcessor and a client of no engine, with the line of a model in front."""

    def __init__(self, **options: Any) -> None:
        self.book = TenantBook([tenant("a"), tenant("b"), tenant("open", share_cache=True)], **options)
        self.line = TenantLine(self.book.weight_of)
        self.sent: list[str] = []
        self.failure: Exception | None = None
        self.processor = OutputProcessor(None, log_stats=False)
        core = SimpleNamespace(add_request_async=self._take)
        self.core = core
        meter(SimpleNamespace(
            output_processor=self.processor, engine_core=core, scheduler_config=SimpleNamespace(policy="fcfs")
        ))  # fmt: skip

    async def _take(self, request: EngineCoreRequest) -> None:
        if self.failure is not None:
            raise self.failure
        self.sent.append(request.request_id)

    def call(self, name: str) -> Call:
        call = self.account(name).begin(POST, "m", 0)
        call.wait_in_line = self.line.more
        return call

    def account(self, name: str) -> Account:
        return self.book.accounts[name]

    async def add(self, call: Call | None, request: EngineCoreRequest) -> None:
        """As `AsyncLLM._add_request` does it, in the task of the call."""
        token = CURRENT_CALL.set(call)
        queue = RequestOutputCollector(RequestOutputKind.DELTA, request.request_id)
        self.processor.add_request(request, None, None, 0, queue)
        try:
            await self.core.add_request_async(request)
        finally:
            CURRENT_CALL.reset(token)

    def start(self, call: Call | None, request_id: str) -> asyncio.Task[None]:
        return asyncio.create_task(self.add(call, request(request_id)))

    def put_out(self, request_id: str, end: FinishReason | None = None) -> None:
        self.processor.process_outputs([EngineCoreOutput(request_id, new_token_ids=[4], finish_reason=end)])


OPTIONS = {"prompt_token_ids": [1, 2, 3], "cache_salt": None, "sampling_params": SamplingParams(detokenize=False)}


def request(request_id: str, **fields: Any) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=request_id, mm_features=None, data_parallel_rank=None, pooling_params=None, arrival_time=1000.0,
        lora_request=None, **OPTIONS | {"external_req_id": request_id, **fields},
    )  # fmt: skip


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


@pytest.mark.parametrize("how", ["finished", "aborted"])
def test_the_end_of_a_sequence_lets_the_next_one_go(how):
    """Sequences beyond their tenant's seats are known to the frontend and not to the engine, until one has ended."""

    async def main() -> None:
        frontend = Frontend()
        frontend.line.shares.seats = 2
        other = frontend.call("b")
        await frontend.add(other, request("b0"))
        call = frontend.call("a")
        tasks = [frontend.start(call, f"a{i}") for i in range(3)]
        await settle()
        assert ["b0", "a0"] == frontend.sent
        assert 4 == frontend.processor.get_num_unfinished_requests()
        frontend.put_out("a0")
        await settle()
        assert ["b0", "a0"] == frontend.sent
        if how == "finished":
            frontend.put_out("a0", FinishReason.STOP)
        else:
            assert ["a0"] == frontend.processor.abort_requests(["a0"], internal=True)
        await settle()
        assert ["b0", "a0", "a1"] == frontend.sent
        frontend.processor.abort_requests(["a1", "a2", "b0"], internal=True)
        await asyncio.gather(*tasks)
        assert ["b0", "a0", "a1"] == frontend.sent, "an aborted one was sent"
        for ended in (call, other):
            ended.close()
        assert (0, 0) == (frontend.line.shares.taken("a"), len(frontend.line))
        assert {} == frontend.processor.calls and set() == frontend.processor.unsent

    run(main())


def test_a_cancelled_wait_leaves_no_request_behind():
    """vLLM does not know that one could wait there: what it has registered is taken back."""

    async def main() -> None:
        frontend = Frontend()
        frontend.line.shares.seats = 2
        other, call = frontend.call("b"), frontend.call("a")
        await frontend.add(other, request("b0"))
        tasks = [frontend.start(call, f"a{i}") for i in range(2)]
        await settle()
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert {"b0", "a0"} == frontend.processor.request_states.keys()
        assert (0, 1) == (len(frontend.line), frontend.line.shares.taken("a"))

    run(main())


def test_requests_of_nobody_pass():
    """Outside of a tenant's call nothing is held, counted or salted."""

    async def main() -> None:
        frontend = Frontend()
        await frontend.add(None, mine := request("r", cache_salt="own"))
        assert (["r"], "own", {}) == (frontend.sent, mine.cache_salt, frontend.processor.calls)

    run(main())


def test_tenants_have_no_prefix_in_common():
    """The salt is the tenant's, whatever salt a client gives; it is there before a host is chosen by it."""

    async def main() -> None:
        frontend, salts = Frontend(), {}
        for name in ("a", "b", "open", "default"):
            for given in (None, "", "x", "a/", "/x"):
                await frontend.add(frontend.call(name), made := request(f"{name}{given}", cache_salt=given))
                salts[name, given] = made.cache_salt
                frontend.put_out(made.request_id, FinishReason.STOP)
        expected = ("a/", "a/x", "b/", "b/x")
        assert expected == tuple(salts[name, given] for name in ("a", "b") for given in (None, "x"))
        assert (None, "/x", "/a/") == tuple(salts["open", given] for given in (None, "x", "a/"))
        by_name = [{salt for (name, _), salt in salts.items() if name == owner} for owner in frontend.book.accounts]
        assert sum(map(len, by_name)) == len(set.union(*by_name))
        hosts = {f"host-{i}": HostQueue(0) for i in range(64)}
        prompts = [request("r", prompt_token_ids=[1] * 200, cache_salt=salts[name, None]) for name in ("a", "b")]
        assert 2 == len({by_prefix(prompt, hosts) for prompt in prompts}), "routing does not look at the salt"

    run(main())


def test_a_pool_may_share_its_cache_and_a_tenant_may_not():
    """`share_cache` of the pool holds for tenants without their own."""
    book = TenantBook([tenant("a"), tenant("own", share_cache=False)], share_cache=True)
    assert [None, "own/"] == [book.accounts[name].salted(None) for name in ("a", "own")]


def test_more_input_of_a_sequence_keeps_its_place():
    """A streamed input is one sequence; its last word goes to the engine, also when the answer had ended before."""

    async def main() -> None:
        frontend, call = Frontend(), None
        call = frontend.call("a")
        for _ in range(3):
            await frontend.add(call, request("r", resumable=True))
        assert ["r"] * 3 == frontend.sent
        assert (1, 9) == (frontend.line.shares.taken("a"), frontend.account("a").usage["m"].prompt_tokens)
        await frontend.add(call, request("r"))
        assert ["r"] * 4 == frontend.sent
        frontend.processor.abort_requests(["r"], internal=True)
        assert 0 == frontend.line.shares.taken("a")

    run(main())


def test_no_tenant_ends_or_changes_the_requests_of_another():
    """Ids that clients choose may be equal; a tenant's own requests end, also those of `n`."""

    async def main() -> None:
        frontend = Frontend()
        for name in ("a", "b"):
            await frontend.add(frontend.call(name), request(f"{name}-1", external_req_id="same"))
        owner = frontend.call("b")
        CURRENT_CALL.set(owner)
        parent = ParentRequest(request("p", sampling_params=SamplingParams(n=2, detokenize=False)))
        for i in range(2):
            child, params = parent.get_child_info(i)
            made = request(child, sampling_params=params, external_req_id="p")
            frontend.processor.add_request(made, None, parent, i, None)
        CURRENT_CALL.set(frontend.call("a"))
        assert ["a-1"] == frontend.processor.abort_requests(["same", "a-1", "b-1", "p"], internal=False)
        with pytest.raises(VLLMValidationError, match="in use"):
            await frontend.add(frontend.call("a"), request("b-1"))
        CURRENT_CALL.set(owner)
        assert {"b-1", "0_p", "1_p"} == set(frontend.processor.abort_requests(["same", "p"], internal=False))
        assert {} == frontend.processor.request_states

    run(main())


def test_the_pool_itself_ends_any_request():
    """What is no tenant's call, such as the removal of a model, ends all."""

    async def main() -> None:
        frontend = Frontend()
        await asyncio.create_task(frontend.add(frontend.call("a"), request("a-1")))
        assert ["a-1"] == frontend.processor.abort_requests(["a-1"], internal=True)

    run(main())


async def add_many(frontend: Frontend, call: Call, count: int) -> tuple[list[str], RequestOutputCollector]:
    """As `AsyncLLM.add_request` does it with `n`: all are registered, and then sent one after another."""
    CURRENT_CALL.set(call)
    parent = ParentRequest(request("p", sampling_params=SamplingParams(n=count, detokenize=False)))
    queue, made = RequestOutputCollector(RequestOutputKind.DELTA, "p"), []
    for i in range(count):
        child, params = parent.get_child_info(i)
        made.append(request(child, sampling_params=params, external_req_id="p"))
        frontend.processor.add_request(made[-1], None, parent, i, queue)
    for each in made:
        await frontend.core.add_request_async(each)
    return [each.request_id for each in made], queue


def test_a_stream_of_many_sequences_begins_when_its_first_one_has_its_place():
    """Those of `n` for which there is no seat wait beside it, and go, or are forgotten, each for itself."""

    async def main() -> None:
        frontend = Frontend()
        frontend.line.shares.seats = 4
        call = frontend.call("a")
        names, _ = await add_many(frontend, call, 8)
        await settle()
        assert names[:3] == frontend.sent, "all but one of four seats"
        frontend.put_out(names[1], FinishReason.STOP)
        await settle()
        assert names[:4] == frontend.sent
        frontend.processor.abort_requests(["p"], internal=False)
        await settle()
        call.close()
        assert names[:4] == frontend.sent, "an aborted one was sent"
        assert (0, 0, {}) == (frontend.line.shares.taken("a"), len(frontend.line), call._waiting)

    run(main())


def test_whoever_reads_hears_that_a_sequence_cannot_be_sent():
    """The engine of a stream dies while further sequences wait."""

    async def main() -> None:
        frontend = Frontend()
        frontend.line.shares.seats = 3
        _, queue = await add_many(frontend, frontend.call("a"), 3)
        await settle()
        frontend.failure = RuntimeError("the engine is gone")
        frontend.put_out("1_p", FinishReason.STOP)
        queue.get_nowait()
        await settle()
        with pytest.raises(RuntimeError, match="is gone"):
            queue.get_nowait()

    run(main())
