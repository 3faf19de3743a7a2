# SPDX-License-Identifier: Apache-2.0
"""Made-up workloads in the shape of published ones: the same arguments give the same requests.

    artifact_like(80, 0.1, 120, seed=0)    the benchmark of Aegaeon's artifact: equal rates
    production(779, seed=0)                a model market: few models get nearly all requests
    deployed(seed=0)                       what Aegaeon was put in charge of there: small and large models
    poisson({"a": 0.5, "b": 2}, ...)       any rates; all others are built on it

Each model has its own random numbers. So models can be added, and the time be prolonged, without a change to the
requests that there were, as long as rates stay and nothing is capped.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from operator import itemgetter

from tokenpool.errors import check_setting, show
from tokenpool.sim.costs import artifact_costs, kind_on
from tokenpool.sim.traces.trace_files import ARTIFACT_KINDS
from tokenpool.sim.workload import SimRequest, Workload

MEAN_RATE_PER_S = 0.037
"""Requests per second of a model in production, on average. Source: Aegaeon (SOSP'25)."""

_HEAD_MODELS_FRAC = 1 - 0.941
_HEAD_REQUESTS_FRAC = 1 - 0.0135

_MIN_RATE_PER_S, _MAX_RATE_PER_S = 0.01, 1.13
_NUM_SMALL, _NUM_LARGE = 28, 19
_SMALL_KINDS = ("qwen-1.8b", "qwen2.5-3b", "qwen1.5-4b", "qwen2.5-7b")
_LARGE_KINDS = (kind_on("qwen2.5-32b", 4), kind_on("qwen2.5-72b", 4))


def poisson(
    models: Mapping[str, float],
    duration_s: float,
    seed: int,
    *,
    kinds: Mapping[str, str] | None = None,
    skew: float = 0.0,
    cv: float = 1.0,
    is_capped: bool = False,
    input_scale: float = 1.0,
    output_scale: float = 1.0,
    lengths: Sequence[tuple[int, int]] | None = None,
) -> Workload:
    """Make independent arrivals for each model, at its mean rate in requests per second.

    `kinds` tells the kinds of models; that of others is their name. `skew` above 0 deals the sum of all rates out
    anew, as rate / rank ** skew with ranks in the order of `models` (Zipf). `cv` is the coefficient of variation of
    the gaps between arrivals, which are gamma-distributed: 1 is Poisson, more comes in bursts, less is steadier; the
    mean rate holds from the first second in any case. `is_capped` ends a model after int(duration * rate) requests.

    Prompt and answer lengths are drawn together, from `lengths` or the shipped pairs, then scaled and cut down to what
    the kind takes, for the kinds of `artifact_costs`. Raises ConfigError for rates, times and factors out of range.
    """
    check_setting(0 < duration_s < math.inf, "duration_s", f"must be above 0 seconds, not {show(duration_s)}")
    check_setting(0 < cv < math.inf, "cv", f"must be above 0, not {show(cv)}; 1 is Poisson")
    check_setting(0 <= skew < math.inf, "skew", f"must be at least 0, not {show(skew)}")
    for key, factor in (("input_scale", input_scale), ("output_scale", output_scale)):
        check_setting(0 < factor < math.inf, key, f"must be above 0, not {show(factor)}")
    for model, rate in models.items():
        check_setting(0 <= rate < math.inf, model, f"must have a rate of at least 0 per second, not {show(rate)}")
    kinds = {model: (kinds or {}).get(model, model) for model in models}
    pairs = [
        (max(1, int(input_len * input_scale)), max(1, int(output_len * output_scale)))
        for input_len, output_len in (lengths if lengths is not None else shipped_lengths())
    ]
    check_setting(bool(pairs), "lengths", "must hold at least one pair")
    by_kind = {kind: _fitting(pairs, kind) for kind in set(kinds.values())}
    requests: list[SimRequest] = []
    for model, rate in _skewed(models, skew).items():
        rng = random.Random(f"{seed}/{model}")
        choices = by_kind[kinds[model]]
        num_choices, num_left = len(choices), int(duration_s * rate) if is_capped else math.inf
        for arrival_s in _arrivals(rng, rate, cv, duration_s):
            if num_left <= 0:
                break
            num_left -= 1
            requests.append(SimRequest(arrival_s, model, *choices[int(rng.random() * num_choices)]))
    requests.sort(key=itemgetter(0))
    return Workload(requests, kinds)


def artifact_like(
    num_models: int,
    rate_per_s: float,
    duration_s: float,
    seed: int,
    *,
    input_scale: float = 1.0,
    output_scale: float = 1.0,
) -> Workload:
    """Make a workload like those of Aegaeon's artifact: Poisson arrivals, the same rate for every model.

    As there, a model gets int(duration * rate) requests at most, so that the rate in effect is less than `rate_per_s`:
    about 0.09 for 0.1 in 120 s. Six models of ten are qwen2.5-7b, two yi-9b and two llama2-13b. A workload of fewer
    models has the requests of a larger one for those models.

    Source: workloads of the artifact of Aegaeon (SOSP'25); where a prompt and its answer are together longer than the
    model takes, the prompt is cut, while the artifact scales both.
    """
    _check_models(num_models)
    names = [f"synth_model_{index:02}" for index in range(num_models)]
    return poisson(
        dict.fromkeys(names, rate_per_s),
        duration_s,
        seed,
        kinds=_cycled(names, ARTIFACT_KINDS),
        is_capped=True,
        input_scale=input_scale,
        output_scale=output_scale,
    )


def production(
    num_models: int = 779,
    mean_rate_per_s: float = MEAN_RATE_PER_S,
    duration_s: float = 3600.0,
    *,
    seed: int,
    skew: float = 1.0,
    cv: float = 1.0,
    kinds: Sequence[str] = ARTIFACT_KINDS,
    input_scale: float = 1.0,
    output_scale: float = 1.0,
) -> Workload:
    """Make a workload in the shape of a model market, where 94.1 % of the models get 1.35 % of the requests.

    See `production_rates`; model number i has the kind number i of `kinds`, taken again and again.
    """
    rates = production_rates(num_models, mean_rate_per_s, skew)
    kind_of = _cycled(list(rates), kinds)
    return poisson(rates, duration_s, seed, kinds=kind_of, cv=cv, input_scale=input_scale, output_scale=output_scale)


def production_rates(num_models: int, mean_rate_per_s: float = MEAN_RATE_PER_S, skew: float = 1.0) -> dict[str, float]:
    """Return the rate of each model, from the most asked for to the least; their mean is `mean_rate_per_s`.

    The head, 5.9 % of the models and one at least, gets 98.65 % of the requests. Inside of head and tail rates fall as
    1 / rank ** skew, in the tail more slowly where its first would come before the last of the head. Source: the split
    is that of 779 models in section 2 of Aegaeon (SOSP'25); that it is Zipf-like inside is an assumption.
    """
    _check_models(num_models, least=2)
    num_head = max(1, round(num_models * _HEAD_MODELS_FRAC))
    total = num_models * mean_rate_per_s
    head = _zipf(num_head, skew, total * _HEAD_REQUESTS_FRAC)
    tail = _zipf(num_models - num_head, skew, total * (1 - _HEAD_REQUESTS_FRAC))
    while tail[0] > head[-1] and skew > 0.01:
        skew *= 0.9
        tail = _zipf(num_models - num_head, skew, total * (1 - _HEAD_REQUESTS_FRAC))
    return {f"model-{index:04}": rate for index, rate in enumerate(head + tail)}


def deployed(
    multiple: int = 1,
    duration_s: float = 3600.0,
    *,
    seed: int,
    cv: float = 1.0,
    input_scale: float = 1.0,
    output_scale: float = 1.0,
) -> Workload:
    """Make a workload like that of Aegaeon's deployment: 28 models of 1.8 to 7B, 19 of 32 to 72B on four devices each.

    `multiple` times these 47, each time with the rates of `deployed_rates`. Small and large models are spread
    evenly over the ranks; the first, a small one, gets two thirds of the requests. Source: counts, sizes and tensor
    parallelism of the production deployment in Aegaeon (SOSP'25); which models they are is not published, so Qwen of
    such sizes stand for them.
    """
    _check_models(multiple, key="multiple")
    models, kinds = {}, {}
    num_ranks = _NUM_SMALL + _NUM_LARGE
    for copy in range(multiple):
        for rank, rate in enumerate(deployed_rates()):
            name = f"model-{copy * num_ranks + rank:04}"
            num_large = rank * _NUM_LARGE // num_ranks  # up to here, spread evenly
            is_large = (rank + 1) * _NUM_LARGE // num_ranks > num_large
            models[name] = rate
            kinds[name] = (
                _LARGE_KINDS[num_large % len(_LARGE_KINDS)]
                if is_large
                else _SMALL_KINDS[(rank - num_large) % len(_SMALL_KINDS)]
            )
    return poisson(models, duration_s, seed, kinds=kinds, cv=cv, input_scale=input_scale, output_scale=output_scale)


@functools.cache
def deployed_rates() -> tuple[float, ...]:
    """Return the rates of 47 models, from the highest down: 1.13 to 0.01 requests per second with mean 0.037.

    Published are these three numbers; rates are 0.01 + 1.12 / rank ** s here, with the s (about 3.3) that gives the
    mean, so the least is a little above 0.01. Source: Aegaeon (SOSP'25).
    """
    ranks = range(1, _NUM_SMALL + _NUM_LARGE + 1)
    target = (MEAN_RATE_PER_S - _MIN_RATE_PER_S) * len(ranks) / (_MAX_RATE_PER_S - _MIN_RATE_PER_S)
    low, high = 0.0, 10.0
    for _ in range(100):
        s = (low + high) / 2
        low, high = (s, high) if sum(rank**-s for rank in ranks) > target else (low, s)
    return tuple(_MIN_RATE_PER_S + (_MAX_RATE_PER_S - _MIN_RATE_PER_S) * rank**-s for rank in ranks)


@functools.cache
def shipped_lengths() -> Sequence[tuple[int, int]]:
    """Return pairs of prompt and answer length in tokens, from ShareGPT; see data/README.md."""
    text = (resources.files("tokenpool.sim") / "data" / "lengths.csv").read_text(encoding="utf-8")
    pairs = (line.split(",") for line in text.splitlines()[1:])
    return tuple((int(input_len), int(output_len)) for input_len, output_len in pairs)


def _arrivals(rng: random.Random, rate: float, cv: float, duration_s: float) -> Iterator[float]:
    if not rate:
        return
    shape, scale_s = 1 / cv**2, cv**2 / rate
    # The begin falls into a gap that is the likelier the longer it is, and anywhere into it. A whole gap first would
    # give models of few requests too many of them with cv above 1.
    now_s = rng.expovariate(rate) if cv == 1 else rng.random() * rng.gammavariate(shape + 1, scale_s)
    while now_s < duration_s:
        yield now_s
        now_s += rng.expovariate(rate) if cv == 1 else rng.gammavariate(shape, scale_s)


def _fitting(pairs: Sequence[tuple[int, int]], kind: str) -> Sequence[tuple[int, int]]:
    """The pairs cut down to what a kind takes: the answer first, then the prompt to what is left."""
    artifact = artifact_costs().get(kind)
    if artifact is None:
        return pairs
    limit = artifact.max_seq_len
    cut = ((input_len, min(output_len, limit - 1)) for input_len, output_len in pairs)
    return [(min(input_len, limit - output_len), output_len) for input_len, output_len in cut]


def _skewed(models: Mapping[str, float], skew: float) -> Mapping[str, float]:
    if not skew:
        return models
    weights = [rate / rank**skew for rank, rate in enumerate(models.values(), 1)]
    total = sum(weights)
    factor = sum(models.values()) / total if total else 0.0
    return {model: weight * factor for model, weight in zip(models, weights, strict=True)}


def _zipf(count: int, skew: float, total: float) -> list[float]:
    weights = [rank**-skew for rank in range(1, count + 1)]
    unit = total / sum(weights)
    return [unit * weight for weight in weights]


def _cycled(names: Sequence[str], kinds: Sequence[str]) -> dict[str, str]:
    check_setting(bool(kinds), "kinds", "must hold at least one kind")
    return {name: kinds[index % len(kinds)] for index, name in enumerate(names)}


def _check_models(count: int, least: int = 1, key: str = "num_models") -> None:
    check_setting(count >= least, key, f"must be at least {least}, not {show(count)}")
