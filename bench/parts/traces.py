# SPDX-License-Identifier: Apache-2.0
"""Request traces: CSV files `arrival_ms,model,input_len,output_len`, made up or recorded."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class TracedRequest(NamedTuple):
    """One request; the arrival is counted from the begin of the trace."""

    arrival_ms: float
    model: str
    input_len: int
    output_len: int


def generate(
    *,
    seed: int,
    models: int,
    requests: int,
    skew: float,
    input_len: tuple[int, int],
    output_len: tuple[int, int],
) -> list[TracedRequest]:
    """Poisson arrivals, one per second on average, of models whose popularity falls as 1 / rank ** skew (Zipf).

    Ranks are dealt out at random, lengths are uniform. Each model has at least one request, so that a file of them
    names all models; but for that its own arrivals are Poisson too.
    """
    rng = random.Random(seed)
    names = [f"model-{index:02}" for index in range(models)]
    weights = [1 / rank**skew for rank in range(1, models + 1)]
    rng.shuffle(weights)
    asked = names + rng.choices(names, weights, k=requests - models)
    rng.shuffle(asked)
    made, now_s = [], 0.0
    for model in asked:
        now_s += rng.expovariate(1.0)
        made.append(TracedRequest(round(now_s * 1e3, 1), model, rng.randint(*input_len), rng.randint(*output_len)))
    return made


def at_rate(trace: Sequence[TracedRequest], rate: float) -> list[TracedRequest]:
    """The same requests in the same order, faster or slower, so that `rate` arrive per second on average."""
    factor = len(trace) / rate * 1e3 / trace[-1].arrival_ms
    return [request._replace(arrival_ms=request.arrival_ms * factor) for request in trace]


def at_least(trace: Sequence[TracedRequest], num_requests: int) -> list[TracedRequest]:
    """The trace as often, one after the other, as it takes for so many requests."""
    times = -(-num_requests // len(trace))
    span_ms = trace[-1].arrival_ms
    return [r._replace(arrival_ms=r.arrival_ms + i * span_ms) for i in range(times) for r in trace]


def write(path: Path, trace: Sequence[TracedRequest]) -> None:
    """Write a trace as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(TracedRequest._fields)
        writer.writerows(trace)


def read(path: Path) -> list[TracedRequest]:
    """Read a trace; raises ValueError when it is empty or not in the order of arrivals."""
    with path.open(newline="") as file:
        trace = [
            TracedRequest(float(row["arrival_ms"]), row["model"], int(row["input_len"]), int(row["output_len"]))
            for row in csv.DictReader(file)
        ]
    if not trace or trace[-1].arrival_ms <= 0 or trace != sorted(trace, key=lambda request: request.arrival_ms):
        raise ValueError(f"{path}: give at least two requests in the order of their arrivals")
    return trace
