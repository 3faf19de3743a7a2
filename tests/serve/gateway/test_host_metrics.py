# SPDX-License-Identifier: Apache-2.0
"""Scrapes of several processes as one: real Prometheus registries, merged and read back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tokenpool.process.metric_files import forget_models
from tokenpool.serve.gateway.host_metrics import merged
from tokenpool.serve.gateway.tenant_metrics import show_tenants

pytestmark = pytest.mark.cpu


def registry(steps: int = 0, **gauges: float) -> CollectorRegistry:
    made = CollectorRegistry()
    if steps:
        Counter("x:steps", "Steps.", ["model_name"], registry=made).labels('a "b"\n').inc(steps)
        Histogram("x:seconds", "Seconds.", buckets=[1, 2], registry=made).observe(1.5)
    for name, value in gauges.items():
        Gauge(f"x:{name}", "A gauge.", registry=made).set(value)
    return made


def test_samples_of_hosts_get_their_name_and_none_is_lost_or_altered():
    hosts = {"host-1": registry(3, pages=7), "host-0": registry(5)}
    text = merged(registry(models=2), {name: generate_latest(made).decode() for name, made in hosts.items()}).decode()

    read = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    samples = {(s.name, s.labels.pop("host", None), tuple(s.labels.values())): s.value for s in read}
    assert len(samples) == len(read)
    assert samples["x:models", None, ()] == 2
    assert samples["x:pages", "host-1", ()] == 7
    assert samples["x:steps_total", "host-1", ('a "b"\n',)] == 3
    assert samples["x:steps_total", "host-0", ('a "b"\n',)] == 5
    assert samples["x:seconds_bucket", "host-0", ("2.0",)] == 1


def test_each_family_is_written_once_with_its_type():
    """Prometheus refuses a scrape with two blocks of one family."""
    text = merged(registry(1), {name: generate_latest(registry(2)).decode() for name in ("h0", "h1")}).decode()
    types = [line for line in text.splitlines() if line.startswith("# TYPE") and "created" not in line]
    assert types == ["# TYPE x:steps_total counter", "# TYPE x:seconds histogram"]


def test_without_hosts_a_scrape_is_the_frontends_own():
    own = registry(4, pages=1)
    assert merged(own, {}) == generate_latest(own)


def test_tenants_have_no_series_of_models_that_are_gone():
    """Their usage is kept for the bill; a scrape does not make a series of it again after the model's were removed."""

    def shown() -> dict[tuple[str, ...], float]:
        samples = (sample for family in REGISTRY.collect() for sample in family.samples)
        return {
            (s.labels["tenant"], s.labels["model_name"]): s.value
            for s in samples
            if s.name == "tokenpool:tenant_requests_total" and s.labels["tenant"] == "acme"
        }

    usage = {name: SimpleNamespace(requests=3, prompt_tokens=0, completion_tokens=0) for name in ("stays", "goes")}
    account = SimpleNamespace(usage=usage, refused={("goes", "queue"): 1})
    book = SimpleNamespace(accounts={"acme": account})
    models = {name: SimpleNamespace(gate=SimpleNamespace(line=None)) for name in usage}
    show_tenants(book, models)
    assert shown() == {("acme", "stays"): 3, ("acme", "goes"): 3}

    del models["goes"]
    forget_models({"goes"})
    usage["stays"].requests = 4
    show_tenants(book, models)
    assert shown() == {("acme", "stays"): 4}
