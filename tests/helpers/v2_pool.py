# SPDX-License-Identifier: Apache-2.0
"""Runs pooled models on vLLM's second model runner, on the CPU, and tells what each request got.

A process of its own, for the reason told in v2_runner.py. Each scenario returns plain values for its test.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.helpers.plain import Case
from tests.helpers.v2_runner import async_scheduling_allowed, use_second_runner

DEVICE_MEMORY, PAGE = 32 << 20, 256 << 10
PLACES = ("before", "after", "sampling")
CULPRIT = 1
"""Which request crashes the engine."""


def turns(cases: list[Case], *, ahead: bool) -> dict[str, Any]:
    """The host's own loop, a turn per token; the second model is warmed up, as on CUDA, when the first has KV."""
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup

    from tests.helpers.pooled import PooledModels
    from tokenpool.host.kv.runner_adapter import warm_up_in_null_block

    pooled = PooledModels(DEVICE_MEMORY, PAGE, poison=True)
    for case in cases:
        pooled.add(case, async_scheduling=ahead)
    first, second = cases
    pooled.submit(first)
    for _ in range(3):
        pooled.run_once()
    worker = pooled.host.models[second.name].core.model_executor.driver_worker.worker
    with warm_up_in_null_block(worker.model_runner):
        warmed_up = run_mixed_prefill_decode_warmup(
            worker.model_runner, worker.execute_model, worker.sample_tokens, num_tokens=200
        )
    pooled.submit(second)
    pooled.run()
    pooled.check()
    result = {"warmed_up": warmed_up, "switches": pooled.host.switches, "results": _results(pooled)}
    pooled.close()
    return result


def moves(cases: list[Case], *, ahead: bool) -> dict[str, Any]:
    """Models leave and return at random token boundaries, into other blocks of slabs that were poisoned.

    They are stepped while their blocks come back.
    """
    from tests.helpers.devices.late_device import LateDevice
    from tests.helpers.stepping import RandomMoves, SteppedModels

    pooled = SteppedModels(DEVICE_MEMORY, PAGE, late=LateDevice())
    for case in cases:
        pooled.add(case, async_scheduling=ahead)
        pooled.submit(case)
    pooled.run_all(RandomMoves(pooled, 1))
    return _close_stepped(pooled)


def windows(cases: list[Case], *, ahead: bool) -> dict[str, Any]:
    """What is not in use is taken away and poisoned after each step; what the steps' tables named is noted."""
    from tests.helpers.devices.table_reads import TableReads
    from tests.helpers.stepping import SteppedModels

    pooled = SteppedModels(DEVICE_MEMORY, PAGE)
    (case,) = cases
    pooled.add(case, async_scheduling=ahead)
    reads = TableReads(pooled, case.name)
    pooled.submit(case)
    pooled.run_all(pooled.evict)
    return _close_stepped(pooled) | {"freed": reads.freed, "hidden": reads.hidden}


class _MaskKernel:
    """What vLLM's kernel for masks of grammars does, which Triton's interpreter refuses: the rest is vLLM's."""

    def __getitem__(self, grid: Any) -> Any:
        return self._apply

    def _apply(
        self, logits: Any, _: int, rows: Any, starts: Any, masks: Any, __: int, vocab: int, **sizes: int
    ) -> None:
        import torch

        for mask, row in zip(masks, rows.tolist(), strict=True):
            request, position = divmod(row, sizes["MASK_STRIDE"])
            allowed = (mask[:, None] >> torch.arange(32, dtype=torch.int32)) & 1
            logits[int(starts[request]) + position].masked_fill_(allowed.flatten()[:vocab] == 0, float("-inf"))


def masked(cases: list[Case], *, ahead: bool) -> dict[str, Any]:
    """A request with a grammar beside others, greedy and seeded, with masks in time and with late ones."""
    from contextlib import ExitStack
    from dataclasses import replace

    import pytest
    from vllm.v1.worker.gpu import structured_outputs

    from tests.host.engine.test_grammar_hold import GREEDY, SEEDED, Masks, _late, _play

    structured_outputs._apply_grammar_bitmask_kernel = _MaskKernel()
    case, found = replace(cases[0], engine_args=cases[0].engine_args | {"async_scheduling": ahead}), {}
    for kind, params in (("greedy", GREEDY), ("seeded", SEEDED)):
        with ExitStack() as stack:
            in_time = _play(case, None, stack, params)[0]
        with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
            masks = Masks(patch, _late(0).__contains__)
            late, preemptions, beside = _play(case, masks, stack, params)
        found[kind] = {"in_time": in_time, "late": late, "kept": masks.kept}
        found[kind] |= {"preemptions": preemptions, "beside": beside}
    return found


def drafted(cases: list[Case], *, ahead: bool) -> dict[str, Any]:
    """The same with models that have drafters."""
    return moves(cases, ahead=ahead)


def adopted(cases: list[Case], *, ahead: bool) -> dict[str, Any]:
    """One model's weights move and are compared by dummy steps of this runner; with and without leaving in mid-stream.

    `runs` has how many outputs of modules each dummy step gave.
    """
    from tests.helpers.pooled import PooledModels
    from tokenpool.host.load.adoption_check import AdoptionCheck

    runs: list[int] = []
    original = AdoptionCheck._run

    def counted(check: AdoptionCheck) -> Any:
        outputs = original(check)
        runs.append(len(outputs))
        return outputs

    AdoptionCheck._run = counted
    (case,), found = cases, {}
    for leaves in (False, True):
        pooled = PooledModels(DEVICE_MEMORY, PAGE, poison=True, movable_weights=True)
        pooled.add(case, async_scheduling=ahead)
        pooled.submit(case)
        for _ in range(6):
            pooled.run_once()
        if leaves:
            pooled.host.models[case.name].core.drain_batches()
            pooled.host.weights.evict(case.name)
        pooled.run()
        pooled.check()
        found[f"leaves-{leaves}"] = _results(pooled)
        found["loads"] = pooled.host.weights.snapshot()[case.name].loads
        pooled.close()
    AdoptionCheck._run = original
    return found | {"runs": runs}


def hits(cases: list[Case], *, ahead: bool) -> dict[str, Any]:
    """One request after another, the second of a case with the prompt of the first, whose blocks have moved since."""
    from tests.helpers.stepping import SteppedModels

    pooled = SteppedModels(DEVICE_MEMORY, PAGE)
    for case in cases:
        pooled.add(case, async_scheduling=ahead)
    for number in range(2):
        for case in cases:
            pooled.submit_one(case.name, case.requests[number], [])
        pooled.run_all()
        for case in cases:  # cached blocks leave for the host tier
            pooled.out(case.name)
            pooled.into(case.name)
    cached = {case.name: pooled.num_cached_tokens(case.name, case.requests[1].request_id) for case in cases}
    return _close_stepped(pooled) | {"cached": cached}


def crashes(cases: list[Case], *, ahead: bool) -> dict[str, Any]:
    """By place in a step: its second step crashes once, and later one request crashes each step that it is in."""
    return {place: _crash(cases[0], ahead, place) for place in PLACES}


def _crash(case: Case, ahead: bool, place: str) -> dict[str, Any]:
    from tests.helpers.crashes import crash_when
    from tests.helpers.pooled import PooledModels

    pooled = PooledModels(DEVICE_MEMORY, PAGE)
    pooled.add(case, async_scheduling=ahead)
    pooled.submit(case)
    culprit = case.requests[CULPRIT].request_id
    seen = []

    def bad(scheduler_output: Any) -> bool:
        seen.append(culprit in scheduler_output.num_scheduled_tokens)
        return len(seen) == 2 or (seen[-1] and sum(seen) > 4)

    crash_when(pooled, case.name, bad, place)
    pooled.run()
    pooled.check()
    hosted = pooled.host.models[case.name]
    runner = hosted.core.model_executor.driver_worker.worker.model_runner
    result = {
        "reasons": [pooled.finish_reason(case.name, request.request_id) for request in case.requests],
        "crashed_steps": hosted.core.counters.crashed_steps,
        "active": hosted.quarantine.active,
        "left_in_runner": len(runner.req_states.req_id_to_index),
        "results": _results(pooled),
    }
    pooled.close()
    return result


def _close_stepped(pooled: Any) -> dict[str, Any]:
    from tokenpool.host.kv.runner_adapter import RunnerAdapterV2

    for name in pooled.host.models:
        if pooled.swapper.is_out(name):
            pooled.into(name)
        assert isinstance(pooled.swapper._adapters[name], RunnerAdapterV2)
    pooled.check()
    result = {"moved_ids": pooled.moved_ids, "drained": pooled.drained, "results": _results(pooled)}
    pooled.close()
    return result


def _results(pooled: Any) -> dict[str, Any]:
    return {name: {key: asdict(result) for key, result in pooled.results(name).items()} for name in pooled.host.models}


def _main(cases_file: str, results_file: str) -> None:
    use_second_runner()
    wanted = json.loads(Path(cases_file).read_text())
    results = {}
    with async_scheduling_allowed():
        for scenario, fields in wanted.items():
            cases = [_case(one) for one in fields]
            for ahead in (False, True):
                results[f"{scenario}-{ahead}"] = globals()[scenario](cases, ahead=ahead)
    Path(results_file).write_text(json.dumps(results))


def _case(fields: dict[str, Any]) -> Case:
    from tests.helpers.plain import RequestSpec

    return Case(**fields | {"requests": [RequestSpec(**request) for request in fields["requests"]]})


if __name__ == "__main__":
    _main(*sys.argv[1:])
