# SPDX-License-Identifier: Apache-2.0
"""Runs groups of models in a pool each, on memory for one or two of them, with random turns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.helpers.plain import Case, RequestSpec
from tests.models.forks import serve_pieces
from tests.models.plain_side import case_of

HOST_MEMORY = 1 << 30


def _work(piece: dict[str, Any]) -> dict[str, Any]:
    from tests.helpers.pooled import PooledModels
    from tokenpool.memory.devices.cpu import CpuDevice

    device, page = CpuDevice(keeps_bytes=True), piece["page"]
    pooled = PooledModels(
        piece["pages"] * page,
        page,
        device=device,
        poison=True,
        movable_weights=piece["movable"],
        host_memory=HOST_MEMORY,
    )
    evictions, kv_evictions = _count_evictions(pooled)
    cases = [case_of(fields) for fields in piece["cases"]]
    planned: dict[str, int] = {}
    refused = {case.name: problem for case in cases if (problem := _refusal(pooled, case, planned))}
    served = [case for case in cases if case.name not in refused]
    # All requests of a model that gives vectors would end in one step, and it would come only once.
    in_turn = [case for case in served if piece["alone"] or case.engine_args.get("runner") == "pooling"]
    pooled.host._turns._policy = _random_turns(piece["seed"], short=len(in_turn) > 0)
    waiting = [_in_turn(pooled, case) for case in in_turn]
    for case in served:
        if case not in in_turn:
            pooled.submit(case)

    def each_step(step: int) -> None:
        for turn in waiting:
            next(turn, None)
        if step % 25 == 0:
            pooled.check()

    each_step(0)
    pooled.run(max_steps=200_000, each_step=each_step)
    pooled.check()
    counters = pooled.host.residency.counters
    return {
        "refused": refused,
        "switches": counters.switches,
        "blocks_in": pooled.host.swapper.counters.blocks_in,
        "models": {
            case.name: {
                "weight_evictions": evictions[case.name],
                "kv_evictions": kv_evictions[case.name],
                **_sizes(pooled, case.name),
                "planned_bytes": planned[case.name],
                "results": {key: asdict(result) for key, result in pooled.results(case.name).items()},
            }
            for case in served
        },
    }


def _random_turns(seed: int, *, short: bool) -> Any:
    """A policy of random turns; `short` ones are a step each."""
    from tests.host.test_switching import RandomTurns

    class Turns(RandomTurns):
        def decide(self, pool: Any) -> Any:
            if short:
                self._left = 0
            return super().decide(pool)

    return Turns(seed)


def _sizes(pooled: Any, name: str) -> dict[str, int]:
    """What a model's weights have on the device; nothing is known of fixed ones beside their pages."""
    store = pooled.host.weights
    if name not in store:
        return {}
    fixed = store.fixed.of(name)
    return {"pages": store.pages_of(name), "held_bytes": store.bytes_of(name) + fixed, "fixed_bytes": fixed}


def _count_evictions(pooled: Any) -> tuple[Counter[str], Counter[str]]:
    """How often weights of each model leave the device, and KV of each that is in use."""
    weights: Counter[str] = Counter()
    kv: Counter[str] = Counter()
    store, swapper = pooled.host.weights, pooled.host.swapper
    evict, begin_out = store.evict, swapper.begin_out

    def count_weights(owner: str) -> None:
        weights[owner] += 1
        evict(owner)

    def count_kv(hosted: Any) -> None:
        kv[hosted.name] += 1
        begin_out(hosted)

    store.evict, swapper.begin_out = count_weights, count_kv
    return weights, kv


def _refusal(pooled: Any, case: Case, planned: dict[str, int]) -> str | None:
    """Add a model as a server would, which plans its bytes; returns why it is refused."""
    from tests.helpers.pooled import make_spec
    from tokenpool.errors import PoolError
    from tokenpool.serve.launch.checkpoint import checkpoint_bytes
    from tokenpool.serve.launch.poolability import check_config
    from tokenpool.serve.launch.weight_sizes import device_bytes

    try:
        spec, folder = make_spec(case), Path(case.model)
        planned[case.name] = device_bytes(checkpoint_bytes(folder), folder, spec.vllm_config)
        check_config(case.name, spec.vllm_config)
        pooled.host.add_model(spec)
    except PoolError as error:
        return str(error)
    return None


def _in_turn(pooled: Any, case: Case) -> Iterator[RequestSpec]:
    """Submit each request of a case when the one before has ended; yields the one that runs."""
    adapters = sorted({request.lora for request in case.requests if request.lora})
    for request in case.requests:
        pooled.submit_one(case.name, request, adapters)
        while pooled.finish_reason(case.name, request.request_id) is None:
            yield request


def _prepare() -> None:
    import tests.helpers.pooled
    import tests.host.test_switching

    assert tests.helpers.pooled and tests.host.test_switching


if __name__ == "__main__":
    serve_pieces(_work, _prepare)
