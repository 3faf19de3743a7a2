# SPDX-License-Identifier: Apache-2.0
"""Laws of a pool under the router and the capacity policy of the product: more devices never do harm, none idles."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import pytest

from tokenpool.config import SLO
from tokenpool.policy.turns import load_turn_policy
from tokenpool.sim import generate
from tokenpool.sim.cluster import Call, Cluster
from tokenpool.sim.compared.systems import run_system, system
from tokenpool.sim.costs import costs_of
from tokenpool.sim.device_spec import DeviceSpec
from tokenpool.sim.host_costs import HostCosts
from tokenpool.sim.result import SimResult
from tokenpool.sim.router import FrontendRouter
from tokenpool.sim.workload import ModelCosts, Workload

pytestmark = pytest.mark.cpu

GPU, LINK, SLO_10S = "h100-80g", 16e9, SLO(10.0, 0.1)
KINDS = ("qwen2.5-7b", "yi-9b", "llama2-13b")


def serve(workload: Workload, num_gpus: int, from_s: float = 30.0) -> SimResult:
    made = system("slack", num_gpus, GPU, LINK)
    return run_system(made, workload, lambda kind: costs_of(kind, GPU), SLO_10S, window_s=(from_s, float("inf")))


def random_pool(seed: int) -> tuple[Workload, int]:
    """Up to 20 models with rates of 0.02 to 2 per second, and a number of devices that is not quite enough."""
    rng = random.Random(seed)
    rates = {f"m{i}": 0.02 * 100 ** rng.random() for i in range(rng.randint(4, 20))}
    kinds = {model: rng.choice(KINDS) for model in rates}
    return generate.poisson(rates, 120.0, seed, kinds=kinds), max(1, round(sum(rates.values()) / 4))


@pytest.mark.parametrize("seed", range(4))
def test_a_device_more_never_does_harm(seed):
    """Tokens on time rise with every device, up to a point of noise."""
    workload, count = random_pool(seed)
    shares = [serve(workload, n).token_attainment for n in range(count, count + 4)]
    assert all(after >= before - 0.01 for before, after in pairwise(shares)), shares
    assert shares[-1] > 0.99


@pytest.mark.parametrize("num_gpus", [2, 4, 8])
def test_a_hot_model_scales(num_gpus):
    """30 requests per second of one 7B model are more than one device can serve."""
    hot = generate.poisson({"hot": 30.0}, 90.0, 1, kinds={"hot": KINDS[0]})
    assert serve(hot, num_gpus).token_attainment > 0.995


def test_nothing_is_late_where_everything_fits():
    """Two models for each of four devices, TTFT 2 s, TPOT 25 ms: none is moved to a device that is too busy for it."""
    rates = dict.fromkeys([f"m{i}" for i in range(8)], 0.3)
    workload = generate.poisson(rates, 120.0, 1, kinds=dict.fromkeys(rates, "qwen2.5-7b"))
    made = system("slack", 4, GPU, LINK)
    costs = costs_of("qwen2.5-7b", GPU)
    result = run_system(made, workload, lambda _: costs, SLO(2.0, 0.025), window_s=(30.0, float("inf")))
    assert result.worst_model > 0.99


def test_a_pool_at_its_limit_is_left_as_it_is():
    """Somewhat more equal models than eight devices can serve well: no model starves, and none is moved for it."""
    models = [f"m{i:02}" for i in range(64)]
    kinds = {name: generate.ARTIFACT_KINDS[i % 10] for i, name in enumerate(models)}
    workload = generate.poisson(dict.fromkeys(models, 0.1), 240.0, 1, kinds=kinds)
    result = run_system(
        system("slack", 8, GPU, LINK), workload, lambda kind: costs_of(kind, GPU), SLO_10S, window_s=(60.0, 210.0)
    )
    assert result.worst_model > 0.75
    assert result.token_attainment > 0.97


@pytest.mark.parametrize(("num_models", "rate_per_s", "most", "worst"), [(8, 0.5, 0.85, 0.7), (10, 0.1, 0.7, 0.5)])
@pytest.mark.parametrize("seed", [1, 2])
def test_there_is_no_cliff(num_models, rate_per_s, most, worst, seed):
    """One device with more than it can serve for five minutes: what is late is so for all models alike."""
    models = [f"m{i:02}" for i in range(num_models)]
    kinds = {name: generate.ARTIFACT_KINDS[i] for i, name in enumerate(models)}
    workload = generate.poisson(dict.fromkeys(models, rate_per_s), 390.0, seed, kinds=kinds)
    made = system("slack", 1, GPU, LINK, charges=HostCosts(node_link_bytes_per_s=LINK / 2))
    window_s = 60.0, 360.0
    result = run_system(made, workload, lambda kind: costs_of(kind, GPU), SLO_10S, drain_s=90.0, window_s=window_s)
    assert result.token_attainment > most
    assert result.worst_model > worst


def test_a_hot_model_does_not_suffer_beside_cold_ones():
    """One hundred models with a request in 50 seconds each."""
    rates = {"hot": 30.0, **{f"c{i}": 0.02 for i in range(100)}}
    result = serve(generate.poisson(rates, 90.0, 1, kinds=dict.fromkeys(rates, KINDS[0])), 8)
    assert result.model_attainments()["hot"] > 0.98
    assert result.token_attainment > 0.98


@dataclass
class Idling:
    """Looks at a cluster twice a second."""

    cluster: Cluster
    samples: int = 0
    idle: int = 0

    def look(self, now_s: float) -> None:
        waits = [s for d in self.cluster.devices for s in d.active if s.waiting and now_s - s.oldest_s > 2.5]
        self.samples += 1
        self.idle += bool(waits) and any(not device.active for device in self.cluster.devices)
        if now_s < 120.0:
            self.cluster._at(now_s + 0.5, Call(self.look), 0)


@pytest.mark.parametrize("seed", range(3))
def test_no_device_idles_while_requests_wait_that_it_could_serve(seed):
    """Every device may serve every model: none is without work while a request waits longer than reports are old."""
    rng = random.Random(seed)
    rates = {f"m{i}": rng.uniform(0.5, 2.0) for i in range(6)}
    workload = generate.poisson(rates, 120.0, seed, kinds=dict.fromkeys(rates, KINDS[0]))
    costs = ModelCosts(1 << 30, 1 << 15, 0.05, 1e-4, 0.0, 0.02, 1e-3, 0.0)
    spec = DeviceSpec(memory_bytes=8 << 30, link_bytes_per_s=16 << 30)
    cluster = Cluster([spec] * 4, lambda: load_turn_policy("slack"), FrontendRouter(), lambda _: costs, SLO_10S)
    watch = Idling(cluster)
    cluster._at(0.5, Call(watch.look), 0)
    cluster.run(workload)

    assert watch.samples > 200
    assert watch.idle <= 0.02 * watch.samples
