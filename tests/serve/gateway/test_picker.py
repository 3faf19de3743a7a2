# SPDX-License-Identifier: Apache-2.0
"""What an endpoint picker reads: one number of each name, that means what it would mean of a server of its own."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from tokenpool.errors import HostError
from tokenpool.model_life import Life
from tokenpool.serve.gateway import endpoints
from tokenpool.serve.gateway.endpoints import build_outer_app
from tokenpool.serve.gateway.model_app import ModelApp
from tokenpool.serve.gateway.picker import Numbers, Recent, numbers_of
from tokenpool.serve.gateway.router import ModelRouter

pytestmark = pytest.mark.cpu

PAGE = 1 << 20


def model(running=0, waiting=0, kv=0, idle=0, weights=2, paused=0) -> dict[str, Any]:
    return {
        "running": running, "waiting": waiting, "kv_pages": kv, "kv_idle_pages": idle, "weight_pages": weights,
        "weight_bytes": weights * PAGE, "host_bytes": {"paused_kv": paused * PAGE, "weights": 0, "cached_kv": 5 * PAGE},
    }  # fmt: skip


def host(pages=20, lent=0, **models: dict[str, Any]) -> dict[str, Any]:
    held = {"null": {"null": 1}, "lent": {"outside the pool": lent}}
    return {"page_size": PAGE, "num_pages": pages, "held_pages": held, "models": models}


def state(one: dict[str, Any], held: int = 0, inflight: int = 0) -> dict[str, Any]:
    told = {name: {"held": held, "inflight": inflight} for name in one.get("models", {"a": None})}
    return {"models": told, "host": one}


def test_kv_is_full_where_the_next_request_would_wait_for_another():
    """Blocks that are only cached give way, weights of others too; what is paused wants to come back."""
    both = host(a=model(running=1, kv=6, idle=2), b=model(waiting=3, paused=3, weights=5))
    assert numbers_of(state(both), "a") == Numbers(0, 1, 7 / 17)
    assert numbers_of(state(both), "b") == Numbers(3, 0, 7 / 14)
    assert numbers_of(state(both), None) == Numbers(3, 1, 7 / 14)
    assert numbers_of(state(host(a=model(kv=3, idle=3), b=model(kv=9, idle=9))), "a").kv_usage == 0


def test_what_a_frontend_holds_waits():
    """Held for a cold model, or on its way to the engine: the picker is not told of an idle server."""
    assert numbers_of(state(host(a=model()), held=4), "a").waiting == 4
    assert numbers_of(state(host(a=model(running=2, waiting=1)), inflight=9), "a") == Numbers(7, 2, 0.0)


def test_a_parked_pool_and_a_silent_host_are_full():
    assert numbers_of(state(host(lent=19, a=model(running=1, paused=2, weights=0))), "a").kv_usage == 1
    assert numbers_of(state({"error": "gone"}), "a") == Numbers(0, 0, 1.0)


def test_a_model_of_a_cluster_counts_the_hosts_that_have_it():
    hosts = {"h0": host(a=model(running=1, kv=4)), "h1": host(b=model(running=2, kv=17))}
    told = {"models": {name: {"held": 0, "inflight": 0} for name in "abc"}, "host": None, "hosts": hosts}
    assert numbers_of(told, "a") == Numbers(0, 1, 4 / 17)
    assert numbers_of(told, "c") == Numbers(0, 0, 0.0)
    assert numbers_of(told, None) == Numbers(0, 3, 21 / 34)


@pytest.mark.parametrize("seed", range(50))
def test_numbers_stay_in_range_and_grow_with_the_work(seed):
    """Whatever the pool holds; one more page in use or one more request never makes a server look emptier."""
    rng = random.Random(seed)

    def some() -> dict[str, Any]:
        kv = rng.randint(0, 9)
        return model(
            rng.randint(0, 3), rng.randint(0, 3), kv, rng.randint(0, kv), rng.randint(0, 25), rng.randint(0, 4)
        )

    one = host(rng.randint(1, 30), rng.randint(0, 9), **{name: some() for name in "abc"})
    told = state(one, rng.randint(0, 3), rng.randint(0, 9))
    before = {name: numbers_of(told, name) for name in ("a", "b", None)}
    assert all(0 <= n.kv_usage <= 1 and n.waiting >= 0 and n.running >= 0 for n in before.values())
    grown = one["models"]["b"]
    grown["kv_pages"] += 1
    grown["waiting"] += 1
    for name, numbers in before.items():
        assert numbers_of(told, name).kv_usage >= numbers.kv_usage
        assert numbers_of(told, name).waiting >= numbers.waiting


class Operator:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    async def state(self) -> dict[str, Any]:
        self.asked += 1
        await asyncio.sleep(0)
        return state(host(**{"org/m": model(running=1, waiting=2, kv=4)}))


def client_of(operator: Operator) -> TestClient:
    outer = build_outer_app()
    router = ModelRouter(outer, max_request_bytes=1000)
    router.add(ModelApp("org/m", lambda *_: None, state=Life.READY))
    outer.state.pool, outer.state.operator = SimpleNamespace(router=router), operator
    return TestClient(router)


@pytest.mark.parametrize("path, name", [("/metrics/picker", "pool"), ("/metrics/picker/org/m", "org/m")])
def test_a_scrape_has_one_sample_of_each_name(path, name):
    """A picker takes any one of several samples."""
    families = text_string_to_metric_families(client_of(Operator()).get(path).text)
    samples = {sample.name: (sample.labels, sample.value) for family in families for sample in family.samples}
    assert samples == {
        "vllm:num_requests_waiting": ({"model_name": name}, 2.0),
        "vllm:num_requests_running": ({"model_name": name}, 1.0),
        "vllm:kv_cache_usage_perc": ({"model_name": name}, 4 / 17),
    }


def test_an_unknown_model_is_not_there():
    assert client_of(Operator()).get("/metrics/picker/other").status_code == 404


def test_many_pickers_ask_the_host_once():
    async def main() -> int:
        operator = Operator()
        recent = Recent(operator)  # type: ignore[arg-type]
        await asyncio.gather(*(recent.get() for _ in range(50)))
        return operator.asked

    assert asyncio.run(main()) == 1


@pytest.mark.parametrize("trouble", ["hangs", "fails"])
def test_a_scrape_does_not_wait_for_a_host_that_hangs(monkeypatch, trouble):
    """Its other numbers are told, the pulse of that host among them."""
    monkeypatch.setattr(endpoints, "_STATE_LIMIT_S", 0.05)

    class Hanging(Operator):
        async def state(self) -> dict[str, Any]:
            if trouble == "fails":
                raise HostError("the engine host ended")
            await asyncio.Event().wait()
            raise AssertionError

        async def host_metrics(self) -> dict[str, str]:
            return {}

    client = client_of(Hanging())
    client.app._outer.state.pool.tenants = None  # type: ignore[attr-defined]
    answer = client.get("/metrics")
    assert answer.status_code == 200 and "tokenpool:models" in answer.text
