# SPDX-License-Identifier: Apache-2.0
"""What a host tells frontends of one model on it. The host and the simulator both make it here.

Pure: values in, a mapping of plain values out, as it travels. Imports neither vllm nor ray.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

from tokenpool.policy.admission import first_token_in_s
from tokenpool.policy.turns import ModelView, PoolView, Residency

_USUAL_TTFT_S = 10.0
"""Time to a first token that loads are counted with where a model has no SLO."""


class Predictor(Protocol):
    """Predicts what steps of one model take: `policy.cost_model.CostModel`, or a simulator's costs."""

    def predict_step(self, batch: int, context_tokens: int, /) -> float:
        """Seconds of one decode step."""

    def predict_prefill(self, tokens: int, /) -> float:
        """Seconds of one prefill."""


_USUAL_PROMPT_TOKENS = 256
"""Length of a new prompt while there are no requests to take it from."""


def usual_prompt_tokens(num_waiting: int, waiting_tokens: int, num_running: int, context_tokens: int) -> int:
    """Length of a new prompt of a model, taken from the requests that are there."""
    if num_waiting:
        return max(1, waiting_tokens // num_waiting)
    if num_running:
        return max(1, context_tokens // num_running)
    return _USUAL_PROMPT_TOKENS


def host_load(pool: PoolView) -> float:
    """Share of the host's time that keeps the requests on time that are there; 0 without any.

    The sum over models with work of step_s / tpot_s, and of the seconds of waiting prefills / ttft_s. A model without
    an SLO has no step that is due.
    """
    load = 0.0
    for view in pool.models:
        if view.num_running or view.num_waiting:
            load += view.step_s / view.tpot_s + view.prefill_s / _ttft_s(view)
    return load


def report_model(
    view: ModelView, prompt_tokens: int, pool: PoolView, cost: Predictor, *, load: float, num_places: int
) -> dict[str, Any]:
    """One model's entry in a host's answer to `load`.

    Args:
        view: the model, with or without work.
        prompt_tokens: of a usual request.
        pool: the models of the host that have work.
        cost: of the model.
        load: `host_load` of `pool`; the same for all models of a host.
        num_places: requests that may decode together, `max_num_seqs`.
    """
    running = max(1, view.num_running)
    context = prompt_tokens * running
    prefill_s = cost.predict_prefill(prompt_tokens)
    more_step_s = cost.predict_step(running + 1, context + prompt_tokens) - cost.predict_step(running, context)
    copy_s = 0.0 if view.residency is Residency.ON_DEVICE else view.ready_in_s
    is_active = bool(view.num_running or view.num_waiting)
    return {
        "running": view.num_running,
        "waiting": view.num_waiting,
        "waiting_tokens": view.waiting_tokens,
        "residency": view.residency.value,
        "ready_in_s": view.ready_in_s,
        "prefill_s": prefill_s,
        "first_token_in_s": first_token_in_s(view, prompt_tokens, pool, cost),
        "load": load,
        "first_load": 0.0 if is_active else cost.predict_step(1, prompt_tokens) / view.tpot_s + copy_s / _ttft_s(view),
        "request_load": prefill_s / _ttft_s(view) + max(0.0, more_step_s) / view.tpot_s,
        "places": num_places - view.num_running - view.num_waiting,
    }


def _ttft_s(view: ModelView) -> float:
    return view.ttft_s if view.ttft_s < math.inf else _USUAL_TTFT_S
