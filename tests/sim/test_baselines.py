# SPDX-License-Identifier: Apache-2.0
"""Baselines do in small cases what can be worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tokenpool.config import SLO
from tokenpool.errors import ConfigError
from tokenpool.sim.compared import artifact
from tokenpool.sim.compared.systems import System, run_system, system
from tokenpool.sim.host_costs import FREE
from tokenpool.sim.result import SimResult
from tokenpool.sim.workload import ModelCosts, SimRequest, Workload

pytestmark = pytest.mark.cpu

GB = 10**9
SIMPLE = ModelCosts(10 * GB, 1e6, 0.5, 0.0, 0.0, 0.1, 0.0, 0.0)
"""1 s to bring in at 10 GB/s, 0.5 s per prefill, 0.1 s per step."""
GPU, LINK = "h100-80g", 10.0 * GB


def workload(*rows: tuple[float, str, int]) -> Workload:
    """Requests of 10 prompt tokens: (arrival, model, tokens of the answer)."""
    return Workload([SimRequest(at, model, 10, n) for at, model, n in rows], {model: "kind" for _, model, _ in rows})


def run(name: str, num_gpus: int, requests: Workload, **more: int) -> SimResult:
    return run_system(
        system(name, num_gpus, GPU, LINK, charges=FREE, **more), requests, lambda _: SIMPLE, SLO(10.0, 0.2)
    )


def run_changed(described: System, requests: Workload) -> SimResult:
    return run_system(described, requests, lambda _: SIMPLE, SLO(10.0, 0.2))


def test_an_unknown_system_is_an_error() -> None:
    """The message names what is known."""
    with pytest.raises(ConfigError, match="known are slack, "):
        system("nope", 2, GPU, LINK)


@pytest.mark.parametrize("prefill_gpus", [0, 2])
def test_aegaeon_needs_devices_of_both_roles(prefill_gpus: int) -> None:
    """Neither role may be without a device."""
    with pytest.raises(ConfigError, match="from 1 to 1 of 2"):
        system("aegaeon", 2, GPU, LINK, prefill_gpus=prefill_gpus)


def test_sllm_spreads_models_and_comes_back_to_them() -> None:
    """Two models on two devices: each is brought in once."""
    result = run("sllm", 2, workload((0, "a", 5), (0.1, "b", 5), (9, "a", 5), (9, "b", 5)))
    assert (1.5, 0) == (pytest.approx(result.ttft_s(99.9)), result.switches)
    assert 0.5 == pytest.approx(result.ttft_s(0.1))


def test_sllm_interrupts_nothing() -> None:
    """The second model waits for 1 + 0.5 + 9 * 0.1 s of the first, then comes in."""
    result = run("sllm", 1, workload((0, "a", 10), (0.1, "b", 2)))
    assert 2.4 - 0.1 + 1.5 == pytest.approx(result.ttft_s(99.9), abs=0.01)
    assert 2.4 + 1.5 + 0.1 == pytest.approx(result.end_s)


def test_sllm_brings_a_model_in_twice_when_four_requests_are_there() -> None:
    """The fifth request of a model goes to the other device, and waits there for the weights."""
    requests = [(0.0 if i == 0 else 2.0 + i / 100, "a", 100) for i in range(5)]
    four, five = (run("sllm", 2, workload(*requests[:n])) for n in (4, 5))
    copies = [result.link_frac * result.end_s * 2 for result in (four, five)]  # of 1 s each
    assert [1.0, 2.0] == pytest.approx(copies)


def test_sllm_plus_runs_the_shorter_answer_first() -> None:
    """The short one interrupts; the long one is prefilled again and ends behind it."""
    long, short = (0, "a", 50), (2.0, "b", 2)
    plus, plain = (run(name, 1, workload(long, short)) for name in ("sllm+", "sllm"))
    assert (1.5, 1.5) == (pytest.approx(plus.ttft_s(0.1)), pytest.approx(plus.ttft_s(99.9)))
    # Interrupted at 2.0 with 6 tokens; b until 3.6; then weights, prefill (the 7th token) and 43 steps.
    assert 3.6 + 1.5 + 4.3 == pytest.approx(plus.end_s)
    assert 1.5 + 4.9 + 1.6 == pytest.approx(plain.end_s)


def test_aegaeon_prefills_and_decodes_on_two_devices() -> None:
    """1 s of weights and 0.5 s of prefill, 1 s of weights and the KV on the other device, then steps."""
    result = run("aegaeon", 2, workload((0, "a", 11)), prefill_gpus=1)
    kv_s = 11 * 1e6 / LINK  # out of one device and into the other
    assert 1.5 == pytest.approx(result.ttft_s(50))
    assert 1.5 + kv_s + 1.0 + kv_s + 10 * 0.1 == pytest.approx(result.end_s, abs=1e-3)


def test_aegaeon_groups_requests_of_a_model() -> None:
    """The third request joins the first of its model, so the prefill device switches once, not twice."""
    result = run("aegaeon", 3, workload((0, "a", 1), (0.1, "b", 1), (0.2, "a", 1), (0.3, "b", 1)), prefill_gpus=1)
    assert 3 >= result.switches
    assert 0 == result.num_failed + result.num_unfinished


def test_dedicated_refuses_models_beyond_the_devices() -> None:
    """Two of three models are served, and their weights are there from the start."""
    result = run("dedicated", 2, workload((0, "a", 5), (0, "b", 5), (0, "c", 5)))
    assert (1, 0.5) == (result.num_failed, pytest.approx(result.ttft_s(99.9)))


def test_mux_refuses_models_beyond_the_memory() -> None:
    """10 GB models on 60 % of 73 GB: four; their steps take turns, so two take twice as long as one."""
    names = "abcdef"
    result = run("mux", 1, workload(*((0, name, 5) for name in names)))
    assert 2 == result.num_failed
    both = run("mux", 1, workload((0, "a", 11), (0, "b", 11)))
    assert 2 * (0.5 + 10 * 0.1) == pytest.approx(both.end_s)


def test_sleep_copies_both_models_at_a_switch() -> None:
    """1 s out and 1 s in, each with a fixed part, between the models; the first only wakes."""
    described = system("sleep", 1, GPU, LINK, charges=FREE)
    fixed_s = described.specs[0].switch_s
    result = run_system(described, workload((0, "a", 1), (0, "b", 1)), lambda _: SIMPLE, SLO(10.0, 0.2))
    assert 1.0 + fixed_s + 0.5 + 2 * (1.0 + fixed_s) + 0.5 == pytest.approx(result.end_s)


def test_requests_without_a_token_are_given_up_at_arrivals_only() -> None:
    """At 16 s the second has waited for more than 15 s; without the arrival it would have been served at 20 s."""
    rows = [(0, "a", 186), (0.5, "b", 1)]
    described = replace(system("sllm", 1, GPU, LINK, charges=FREE), give_up_s=15.0)
    assert 0 == run_changed(described, workload(*rows)).num_failed
    assert 1 == run_changed(described, workload(*rows, (16, "a", 1))).num_failed


def test_artifact_steps_are_whole_milliseconds_of_any_batch() -> None:
    """8.506 ms and more, cut off: 8.0 up to about 1,900 tokens of context, then 9.0."""
    costs = artifact.costs("qwen2.5-7b")
    assert [0.008, 0.008, 0.009] == [costs.step(n, c) for n, c in ((1, 1000), (64, 1000), (1, 2000))]
    assert [0.875, 1.125, 1.625] == [
        artifact.costs(kind).weight_bytes / artifact.LINK_BYTES_PER_S for kind in ("qwen2.5-7b", "yi-9b", "llama2-13b")
    ]


def test_artifact_mode_takes_the_artifacts_devices() -> None:
    """Its memory, no copies out, and its 15 s; other modes give up nobody."""
    described = system("sllm", 2, GPU, artifact.LINK_BYTES_PER_S, artifact_mode=True)
    assert (artifact.MEMORY_BYTES, math.inf) == (described.specs[0].memory_bytes, described.specs[0].out_bytes_per_s)
    assert (15.0, math.inf) == (described.give_up_s, system("sllm", 2, GPU, LINK).give_up_s)
