# SPDX-License-Identifier: Apache-2.0
"""Made-up workloads have the rates, shares and lengths that they promise, and the same seed gives the same requests."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter

import pytest

from tokenpool.errors import ConfigError
from tokenpool.sim.costs import artifact_costs, costs_of
from tokenpool.sim.generate import (
    artifact_like,
    deployed,
    deployed_rates,
    poisson,
    production,
    production_rates,
    shipped_lengths,
)
from tokenpool.sim.workload import Workload

pytestmark = pytest.mark.cpu


def counts(workload: Workload) -> Counter[str]:
    return Counter(request.model for request in workload.requests)


def gap_cv(workload: Workload) -> float:
    times = [request.arrival_s for request in workload.requests]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return statistics.pstdev(gaps) / statistics.fmean(gaps)


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: poisson({"a": 1.0, "b": 2.0}, 50, seed, cv=2, skew=1),
        lambda seed: artifact_like(10, 0.1, 100, seed),
        lambda seed: production(50, duration_s=100, seed=seed),
        lambda seed: deployed(duration_s=100, seed=seed),
    ],
    ids=["poisson", "artifact_like", "production", "deployed"],
)
def test_a_seed_is_a_workload(make):
    """The same seed gives the same requests in order of arrival, another seed others."""
    workload = make(3)

    assert workload == make(3)
    assert workload.requests != make(4).requests
    assert workload.requests == sorted(workload.requests, key=lambda request: request.arrival_s)
    assert {request.model for request in workload.requests} <= set(workload.kinds)


def test_rates_are_kept():
    """Each model has its rate, within three standard deviations; one of rate 0 has no request but a kind."""
    workload = poisson({"slow": 0.1, "fast": 2.0, "never": 0.0}, 10_000, 0, kinds={"fast": "yi-9b"})
    made = counts(workload)

    assert pytest.approx(1_000, abs=3 * 1_000**0.5) == made["slow"]
    assert pytest.approx(20_000, abs=3 * 20_000**0.5) == made["fast"]
    assert {"slow": "slow", "fast": "yi-9b", "never": "never"} == workload.kinds
    assert 0 == made["never"]
    assert all(0 <= request.arrival_s < 10_000 for request in workload.requests)


@pytest.mark.parametrize("cv", [0.25, 1, 3])
def test_gaps_are_as_bursty_as_asked(cv):
    """The coefficient of variation of the gaps is `cv`; the rate stays."""
    workload = poisson({"m": 10.0}, 5_000, 1, cv=cv)

    assert pytest.approx(cv, rel=0.05) == gap_cv(workload)
    assert pytest.approx(50_000, rel=0.05) == len(workload.requests)


@pytest.mark.parametrize("cv", [0.25, 4])
def test_rare_requests_come_at_their_rate_too(cv):
    """Of 20,000 models that expect half a request each, bursty or steady, 10,000 come, as many early as late."""
    arrivals = [r.arrival_s for r in poisson({f"m{i}": 0.005 for i in range(20_000)}, 100, 2, cv=cv).requests]

    assert pytest.approx(10_000, rel=0.1) == len(arrivals)
    assert pytest.approx(0.5, abs=0.05) == sum(arrival_s < 50 for arrival_s in arrivals) / len(arrivals)


def test_skew_deals_the_sum_of_rates_out():
    """Zipf with skew 1 over three models: shares of 6, 3 and 2 elevenths of the same sum."""
    made = counts(poisson({"a": 5.0, "b": 5.0, "c": 5.0}, 10_000, 0, skew=1))

    assert pytest.approx(150_000, rel=0.02) == made.total()
    assert pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.01) == [made[model] / made.total() for model in "abc"]


def test_a_longer_time_or_more_models_only_add():
    """What was there for less time and fewer models stays."""
    short = poisson({"a": 1.0, "b": 0.5}, 50, 7).requests
    long = poisson({"c": 2.0, "b": 0.5, "a": 1.0}, 100, 7).requests

    assert short == [request for request in long if request.arrival_s < 50 and request.model != "c"]


def test_lengths_are_drawn_in_pairs_and_scaled():
    """A pair stays a pair; each side has its own factor, and no length gets below 1."""
    workload = poisson({"m": 10.0}, 100, 0, lengths=[(10, 3), (1, 1)], input_scale=2.0, output_scale=0.5)

    assert {(20, 1), (2, 1)} == {request[2:4] for request in workload.requests}


def test_shipped_lengths_are_those_of_the_artifact():
    """839 pairs, 668 and 294 tokens on average; two that the artifact had scaled down are whole."""
    pairs = shipped_lengths()

    assert 839 == len(pairs)
    assert 2 == pairs.count((11_630, 57))
    assert pytest.approx(668, rel=0.01) == statistics.fmean(input_len for input_len, _ in pairs)
    assert pytest.approx(294, rel=0.01) == statistics.fmean(output_len for _, output_len in pairs)


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_no_request_is_longer_than_its_model_takes(scale):
    """Prompts are cut to what the answer leaves; models of unknown limits take all."""
    kinds = {kind: kind for kind in ("qwen2.5-7b", "yi-9b", "llama2-13b", "other")}
    workload = poisson(dict.fromkeys(kinds, 10.0), 500, 0, kinds=kinds, output_scale=scale)
    longest = {kind: 0 for kind in kinds}
    for request in workload.requests:
        longest[request.model] = max(longest[request.model], request.input_len + request.output_len)
        assert min(request.input_len, request.output_len) >= 1

    limits = {kind: model.max_seq_len for kind, model in artifact_costs().items()}
    assert limits | {"other": longest["other"]} == longest
    assert longest["other"] >= 11_630


def test_workloads_like_the_artifacts():
    """0.1 requests/s nominal are 0.087 to 0.089, as a model gets 12 at most in 120 s; kinds go by ten."""
    workloads = [artifact_like(80, 0.1, 120, seed) for seed in range(10)]
    rate = statistics.fmean(len(workload.requests) / 80 / 120 for workload in workloads)

    assert pytest.approx(0.0881, abs=0.001) == rate
    assert 12 == max(max(counts(workload).values()) for workload in workloads)
    assert {"qwen2.5-7b": 48, "yi-9b": 16, "llama2-13b": 16} == Counter(workloads[0].kinds.values())
    assert "yi-9b" == workloads[0].kinds["synth_model_47"]


def test_a_smaller_artifact_workload_is_a_part_of_the_larger():
    """Fewer models have the same requests as in a workload of more."""
    large, small = artifact_like(30, 0.1, 120, 0), artifact_like(10, 0.1, 120, 0)

    assert small.requests == [request for request in large.requests if request.model in small.kinds]


@pytest.mark.parametrize(("num_models", "num_head"), [(779, 46), (5000, 295), (100, 6), (2, 1)])
def test_few_models_get_nearly_all_of_production(num_models, num_head):
    """5.9 % of the models get 98.65 % of the requests, and ranks fall."""
    rates = list(production_rates(num_models).values())

    assert pytest.approx(0.037 * num_models) == sum(rates)
    assert pytest.approx(0.9865) == sum(rates[:num_head]) / sum(rates)
    assert rates == sorted(rates, reverse=True) and rates[-1] > 0


def test_production_keeps_its_split():
    """What is drawn has the shares of the rates."""
    workload = production(779, duration_s=3600, seed=0)
    made = counts(workload)

    assert pytest.approx(0.037 * 779 * 3600, rel=0.01) == len(workload.requests)
    assert pytest.approx(0.0135, abs=0.002) == sum(made[f"model-{i:04}"] for i in range(46, 779)) / made.total()
    assert 779 == len(workload.kinds) > len(made)


def test_deployed_rates_have_the_published_range_and_mean():
    """47 rates from 1.13 down to 0.01 with mean 0.037."""
    rates = deployed_rates()

    assert 47 == len(rates)
    assert pytest.approx((1.13, 0.01), rel=1e-3) == (rates[0], rates[-1])
    assert pytest.approx(0.037) == statistics.fmean(rates)
    assert list(rates) == sorted(rates, reverse=True)


@pytest.mark.parametrize("multiple", [1, 3])
def test_deployed_models_have_the_published_sizes(multiple):
    """28 models on one device and 19 on four, times the multiple; every kind has costs on the H20."""
    workload = deployed(multiple, duration_s=2_000, seed=0)
    costs = {kind: costs_of(kind, "h20-96g") for kind in set(workload.kinds.values())}
    sizes = [costs[kind].weight_bytes * costs[kind].num_gpus / 2e9 for kind in workload.kinds.values()]

    by_gpus = Counter(costs[kind].num_gpus for kind in workload.kinds.values())
    assert {1: 28 * multiple, 4: 19 * multiple} == by_gpus
    assert 28 * multiple == sum(1.8 <= size < 8 for size in sizes)
    assert 19 * multiple == sum(32 <= size < 73 for size in sizes)
    assert pytest.approx(0.037 * 47 * multiple * 2_000, rel=0.1) == len(workload.requests)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: poisson({"m": -1.0}, 1, 0), "m: must have a rate of at least 0 per second, not -1.0"),
        (lambda: poisson({"m": 1.0}, 0, 0), "duration_s: must be above 0 seconds, not 0"),
        (lambda: poisson({"m": 1.0}, 1, 0, cv=0), "cv: must be above 0, not 0; 1 is Poisson"),
        (lambda: poisson({"m": 1.0}, 1, 0, skew=-1), "skew: must be at least 0, not -1"),
        (lambda: poisson({"m": 1.0}, 1, 0, input_scale=0), "input_scale: must be above 0, not 0"),
        (lambda: poisson({"m": 1.0}, 1, 0, lengths=[]), "lengths: must hold at least one pair"),
        (lambda: artifact_like(0, 1, 1, 0), "num_models: must be at least 1, not 0"),
        (lambda: production(1, seed=0), "num_models: must be at least 2, not 1"),
        (lambda: production(2, kinds=(), seed=0), "kinds: must hold at least one kind"),
        (lambda: deployed(0, seed=0), "multiple: must be at least 1, not 0"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    """The message names the argument and its range."""
    with pytest.raises(ConfigError) as error:
        make()
    assert message == str(error.value)
