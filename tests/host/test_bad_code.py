# SPDX-License-Identifier: Apache-2.0
"""Code of a model or of vLLM that raises where nothing is stepped: one request or model ends, and not the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.pooling_params import PoolingParams
from vllm.v1.engine import EngineCoreRequestType, FinishReason

from tests.dst import engines, oracle
from tests.dst.scenario import RequestPlan
from tests.dst.simulation import Stream
from tests.host.test_lending import Life
from tokenpool.errors import CapacityError, EngineLostError
from tokenpool.host.engine.hosted_core import HostedEngineCore
from tokenpool.host.engine.resume import restore_in_worker

pytestmark = pytest.mark.vllm


@pytest.fixture
def life(folder: Path) -> Iterator[Life]:
    with ExitStack() as stack:
        made = Life(folder)
        stack.enter_context(made.sim.world.clock.installed())
        yield made


def _raise(error: BaseException) -> Callable[..., Any]:
    def broken(*_: Any, **__: Any) -> Any:
        raise error

    return broken


def _of_no_task(life: Life, stream: Stream) -> None:
    """A request for what the model cannot do; vLLM's frontends refuse it, and its engine raises."""
    core = life.host.models["m0"].core
    made = core.preprocess_add_request(engines.make_request(stream.plan, stream.arrival_s, []))
    made[0].pooling_params = PoolingParams(task="classify")
    core.input_queue.put((EngineCoreRequestType.ADD, made))


def _without_memory(life: Life, stream: Stream) -> None:
    """One that another host began, and for whose state the worker has no memory; it has noted the request already."""
    core = life.host.models["m0"].core
    facts = life.sim.world.facts["m0"]
    stream.tokens = oracle.stream(facts, stream.plan.prompt, stream.plan.max_tokens)[:3]
    collective_rpc = core.model_executor.collective_rpc

    def short(method: Any, *args: Any, **kwargs: Any) -> Any:
        answer = collective_rpc(method, *args, **kwargs)
        if method is restore_in_worker:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answer

    core.model_executor.collective_rpc = short
    life.sim._send(stream)


def _with_a_broken_connector(life: Life, stream: Stream) -> None:
    """One that is queued when what is told of it raises."""
    scheduler = life.host.models["m0"].core.scheduler
    add_request = scheduler.add_request

    def add_and_fail(request: Any) -> None:
        add_request(request)
        raise RuntimeError("no connector")

    scheduler.add_request = add_and_fail
    life.sim._send(stream)


@pytest.mark.parametrize("send", [_of_no_task, _without_memory, _with_a_broken_connector])
def test_a_request_that_cannot_be_queued_fails_alone(life: Life, send: Callable[[Life, Stream], None]) -> None:
    """Its client is told, the worker forgets it, and all others, of its model too, get their tokens."""
    life.both_run()
    core = life.host.models["m0"].core
    plan = RequestPlan("bad", "m0", 0.0, tuple(range(40, 60)), 10, 0, False, None)
    stream = life.sim.streams["bad"] = Stream(plan, arrival_s=0.0)
    life.sim.world.faults.crashed.add("bad")  # it may end with an error
    send(life, stream)
    life.step(lambda: stream.is_done)
    assert (FinishReason.ERROR, 1) == (stream.reason, core.counters.failed_requests)
    assert "bad" not in core.scheduler.requests and "bad" not in core._book._requests
    for broken, name in ((core.model_executor, "collective_rpc"), (core.scheduler, "add_request")):
        vars(broken).pop(name, None)
    life.finish()
    assert "bad" not in core.model_executor.runner.requests


def test_a_lost_engine_is_no_fault_of_the_request(life: Life) -> None:
    """As in a group of ranks of which one is gone while a request is queued: the host ends."""
    life.host.models["m0"].core.scheduler.add_request = _raise(EngineLostError("a rank is gone"))
    life.send("m0", "second")
    with pytest.raises(EngineLostError, match="a rank is gone"):
        life.host.run_once()


@pytest.mark.parametrize("part", ["structured_output_manager.clear_backend", "model_executor.shutdown",
                                  "scheduler.shutdown"])  # fmt: skip
def test_a_model_whose_engine_cannot_be_closed_leaves_nothing_behind(life: Life, part: str) -> None:
    """It is gone when `remove_model` returns, each other part of it is closed, and its name is free."""
    life.step(lambda: not life.sim._waiting())
    host, world, scenario = life.host, life.sim.world, life.sim.scenario
    core, closed = host.models["m0"].core, []
    for path in ("structured_output_manager.clear_backend", "model_executor.shutdown", "scheduler.shutdown"):
        owner, name = path.split(".")
        close = _raise(RuntimeError("not in order")) if path == part else lambda path=path: closed.append(path)
        setattr(getattr(core, owner), name, close)
    host.remove_model("m0")
    assert 2 == len(closed)
    host.check()
    assert {"m1"} == set(host.models) == set(host.weights.owners)
    assert all("m0" not in owners for owners in host.ledger.snapshot().held.values())
    assert all("m0" not in owners for owners in host.host_ledger.snapshot().values())

    engines.add_model(host, world, scenario.models[0], scenario)
    life.send("m0", "again")
    life.finish()


def test_a_failed_build_whose_engine_cannot_be_closed_leaves_nothing_behind(
    life: Life, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is the build's own."""
    life.step(lambda: not life.sim._waiting())
    host, world, scenario = life.host, life.sim.world, life.sim.scenario
    before = host.ledger.snapshot().held, host.host_ledger.snapshot()
    model = replace(scenario.models[0], name="m2", max_model_len=4096)
    with monkeypatch.context() as patch:
        patch.setattr(HostedEngineCore, "shutdown", _raise(RuntimeError("not in order")))
        with pytest.raises(CapacityError, match="m2"):
            engines.add_model(host, world, model, scenario)
    host.check()
    assert before == (host.ledger.snapshot().held, host.host_ledger.snapshot())
    engines.add_model(host, world, replace(model, max_model_len=96), scenario)
    life.finish()


@pytest.mark.parametrize("movable", [True, False])
def test_a_config_without_words_is_no_fault_of_its_model(folder: Path, movable: bool) -> None:
    """The code of a model may keep anything in its config; such a model is read by each host for itself."""
    life = Life(folder, movable=movable)
    with life.sim.world.clock.installed():
        life.step(lambda: not life.sim._waiting())
        model = replace(life.sim.scenario.models[0], name="m2")
        spec = engines.make_spec(model, life.sim.world, life.sim.scenario)
        spec.vllm_config.model_config.hf_config.kinds = {"a set", "of strings"}
        life.host.add_model(spec)
        life.host.check()
        life.host.remove_model("m2")
        life.finish()
