# SPDX-License-Identifier: Apache-2.0
"""A model whose client of its engine died in the frontend is begun anew, and never called ready meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.vllm


class Processor:
    """As much of vLLM's OutputProcessor as is used."""

    def __init__(self) -> None:
        self.request_states: dict[str, Any] = {}

    def get_num_unfinished_requests(self) -> int:
        return len(self.request_states)

    def abort_requests(self, request_ids: list[str], internal: bool) -> list[str]:
        for request_id in request_ids:
            del self.request_states[request_id]
        return request_ids


class Engine:
    """An AsyncLLM whose task ends when the test says so, as vLLM's does after an exception."""

    def __init__(self) -> None:
        self.output_processor = Processor()
        self.output_handler: asyncio.Task[Any] | None = None
        self.crash = asyncio.Event()
        self.num_handlers = 0

    def _run_output_handler(self) -> None:
        self.num_handlers += 1
        self.crash = asyncio.Event()
        self.output_handler = asyncio.create_task(self.crash.wait())

    def shutdown(self) -> None: ...


def client_of(engine: Engine, aborted: list[str]) -> Any:
    from tokenpool.serve.client.model_client import ModelClient

    core: Any = SimpleNamespace(
        resources=SimpleNamespace(engine_dead=False), abort=aborted.extend, close=lambda: None, fail=None
    )
    plan: Any = SimpleNamespace(spec=SimpleNamespace(name="m"))
    return ModelClient(plan, core, engine, {})  # type: ignore[arg-type]


def test_a_dead_client_is_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever the task of AsyncLLM ends it is started again without the requests it had, and the pool is told both."""
    from tokenpool.process import keeper

    monkeypatch.setattr(keeper, "RESTART_WAITS_S", (0.01,))

    async def test() -> None:
        engine, aborted, faults = Engine(), [], []
        client = client_of(engine, aborted)
        client.on_fault = faults.append
        client._hear_engines()
        async with asyncio.timeout(30):
            for count in (1, 2, 3):
                engine.output_processor.request_states[f"r{count}"] = None
                engine.crash.set()
                while len(faults) < 2 * count:
                    await asyncio.sleep(0)
                assert engine.num_handlers == count + 1 and not engine.output_handler.done()
        assert aborted == ["r1", "r2", "r3"] and client.num_unfinished == 0 and client.num_revivals == 3
        assert [bool(fault) for fault in faults] == [True, False] * 3
        engine.crash.set()
        await client.close()
        await asyncio.sleep(0.05)
        assert engine.num_handlers == 4, "a client that is closed stays so"

    asyncio.run(test())


def test_no_request_waits_for_a_client_that_is_closed() -> None:
    """One may have come between the end of a drain and the end of its engine: nobody will ever answer it."""
    from vllm.exceptions import GracefulHTTPError
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.output_processor import RequestOutputCollector

    async def test() -> None:
        engine = Engine()
        client = client_of(engine, [])
        client._hear_engines()
        queues = {name: RequestOutputCollector(RequestOutputKind.DELTA, name) for name in ("early", "late")}

        def come(name: str) -> None:
            engine.output_processor.request_states[name] = SimpleNamespace(parent_req=None, queue=queues[name])

        come("early")

        async def end_of_app() -> None:
            await asyncio.sleep(0)
            come("late")

        client._lifespan.push_async_callback(end_of_app)
        reading = [asyncio.create_task(queue.get()) for queue in queues.values()]
        await client.close()
        async with asyncio.timeout(20):
            for answer in await asyncio.gather(*reading, return_exceptions=True):
                assert isinstance(answer, GracefulHTTPError) and "`m`" in str(answer), answer
        assert client.num_unfinished == 0

    asyncio.run(test())


def test_a_pooling_request_without_a_result_fails_alone(tmp_path: Path) -> None:
    """AsyncLLM is not given an output that it cannot bear; the request ends with an error, and its place is free."""
    from vllm.pooling_params import PoolingParams
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason

    from tests.helpers.told_engine import ToldEngine, make_request
    from tokenpool.serve.client.engine_client import PoolEngineClient

    async def test() -> None:
        client = PoolEngineClient(SimpleNamespace(parallel_config=SimpleNamespace()))  # type: ignore[arg-type]
        client._knows_config = True
        engine = ToldEngine(tmp_path / "e")
        failed: dict[str, Exception] = {}
        client.fail = failed.__setitem__
        try:
            await client.join("h", engine.addresses)
            bad, good = make_request("bad"), make_request("good")
            bad.sampling_params, bad.pooling_params = None, PoolingParams(task="classify")
            for request in (bad, good):
                await client.add_request_async(request)
                await engine.added()
            outputs = [EngineCoreOutput("bad", [], finish_reason=FinishReason.ERROR), EngineCoreOutput("good", [7])]
            engine._send(EngineCoreOutputs(outputs=outputs))
            told = await asyncio.wait_for(client.get_output_async(), 30)
            assert [output.request_id for output in told.outputs] == ["good"]
            assert list(failed) == ["bad"] and "engine failed" in str(failed["bad"])
            assert client.load("h") == 1
        finally:
            client.close()
            engine.close()

    asyncio.run(test())
