# SPDX-License-Identifier: Apache-2.0
"""Memory of models that are gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

_METRICS = """
import gc, weakref
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from tokenpool.process.heap import release_metrics

registry = CollectorRegistry()
MultiProcessCollector(registry)
kept, gone = (Counter(name, "a counter", registry=None) for name in ("kept", "gone"))
kept.inc(1)
gone.inc(2)
value = weakref.ref(gone._value)
del gone
gc.collect()
held = value() is not None
release_metrics()
gc.collect()
kept.inc(3)
lines = generate_latest(registry).decode().splitlines()
print(held, value() is None, *[line for line in lines if not line.startswith("#")], sep="|")
"""


def test_values_of_metrics_that_are_gone_are_let_go_and_the_scrape_keeps_them(tmp_path: Path) -> None:
    """Counters must not fall when a model is removed, and those of the others go on."""
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}  # read once, at import

    out = subprocess.run([sys.executable, "-c", _METRICS], env=env, check=True, capture_output=True, text=True).stdout

    held, let_go, *scrape = out.strip().split("|")
    assert (held, let_go) == ("True", "True"), "if prometheus_client lets go by itself, release_metrics can go"
    assert sorted(scrape) == ["gone_total 2.0", "kept_total 4.0"]


def test_nothing_to_let_go_without_the_multiprocess_mode() -> None:
    """As in the engine host and in PooledLLM."""
    env = {name: value for name, value in os.environ.items() if name.lower() != "prometheus_multiproc_dir"}
    code = "from tokenpool.process.heap import release_metrics; release_metrics()"

    subprocess.run([sys.executable, "-c", code], env=env, check=True)
