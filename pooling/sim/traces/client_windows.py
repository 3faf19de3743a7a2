# SPDX-License-Identifier: Apache-2.0
"""Rates of clients by window of time, as ServeGen publishes them, become requests: each client is a model.

    client, window_start_s, rate_rps, cv, distribution, param1, param2

A window lasts until the next of its client, 600 s at most. Its gaps are drawn from the distribution that was fitted,
Gamma or Weibull, of which only the shape (`param1`) is taken: the mean gap is 1 / rate. Lengths are not in the file;
they are those of ShareGPT.

Source: alibaba/ServeGen, its data flattened to a row for each client and window.
"""

from __future__ import annotations

import csv
import math
import os
import random
import zlib
from collections.abc import Callable, Iterable
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from tokenpool.errors import ConfigError, check_setting, show
from tokenpool.sim.generate import shipped_lengths
from tokenpool.sim.traces.trace_files import open_trace
from tokenpool.sim.workload import SimRequest, Workload

COLUMNS = ("client", "window_start_s", "rate_rps", "distribution", "param1")
WINDOW_S = 600.0
"""The longest that a window lasts."""


class ClientWindow(NamedTuple):
    """What one client asked for in one window."""

    client: str
    start_s: float
    rate_per_s: float
    distribution: str
    """Of gaps: gamma or weibull."""
    shape: float


def is_client_file(path: str | os.PathLike[str]) -> bool:
    """Whether the header of a file is that of rates of clients; False for one that cannot be read."""
    try:
        with open_trace(Path(path), "rt") as file:
            return set(COLUMNS) <= {name.strip() for name in next(csv.reader(file), [])}
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error):
        return False


def read_client_windows(path: str | os.PathLike[str]) -> list[ClientWindow]:
    """Return the windows of a file; raises ConfigError for one that cannot be read and a broken row, with its line."""
    try:
        with open_trace(Path(path), "rt") as file:
            rows = csv.DictReader(file)
            return [_window(row, rows.line_num, str(path)) for row in rows]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot be read: {getattr(error, 'strerror', None) or error}", source=str(path)) from error


def client_requests(
    windows: Iterable[ClientWindow], *, from_s: float, span_s: float, seed: int, scale: float = 1.0
) -> Workload:
    """Draw the requests of `span_s` seconds from `from_s` on, with all rates times `scale`; the first second is 0.

    Clients of no request are not in it. Raises ConfigError if nobody asks for anything in that time.
    """
    check_setting(0 <= from_s < math.inf, "from_s", f"must be 0 or more, not {show(from_s)}")
    check_setting(0 < span_s < math.inf, "span_s", f"must be above 0, not {show(span_s)}")
    check_setting(0 < scale < math.inf, "scale", f"must be above 0, not {show(scale)}")
    by_client: dict[str, list[ClientWindow]] = {}
    for window in windows:
        by_client.setdefault(window.client, []).append(window)
    lengths = shipped_lengths()
    requests = []
    for client, its in sorted(by_client.items()):
        its.sort(key=lambda window: window.start_s)
        rng = random.Random(f"{seed}/{client}")
        for window, after in zip(its, [*its[1:], None], strict=True):
            end_s = min(window.start_s + WINDOW_S, after.start_s if after else math.inf, from_s + span_s)
            now_s = max(window.start_s, from_s)
            if now_s >= end_s or not window.rate_per_s:
                continue
            draw = _gaps(rng, window)
            mean_s = 1 / (window.rate_per_s * scale)
            now_s += rng.random() * mean_s * draw()  # the begin falls into a gap
            while now_s < end_s:
                requests.append(SimRequest(now_s - from_s, client, *lengths[int(rng.random() * len(lengths))]))
                now_s += mean_s * draw()
    if not requests:
        raise ConfigError(f"no client asks for anything from {from_s:g} s on for {span_s:g} s: choose another time")
    requests.sort(key=itemgetter(0))
    return Workload(requests, {request.model: request.model for request in requests})


def _gaps(rng: random.Random, window: ClientWindow) -> Callable[[], float]:
    """Draws gaps of mean 1."""
    shape = window.shape
    if window.distribution == "gamma":
        return lambda: rng.gammavariate(shape, 1 / shape)
    scale = 1 / math.gamma(1 + 1 / shape)
    return lambda: rng.weibullvariate(scale, shape)


def _window(row: dict[str, str], line: int, source: str) -> ClientWindow:
    try:
        start_s, rate, shape = (float(row[name]) for name in ("window_start_s", "rate_rps", "param1"))
        distribution = row["distribution"].strip().lower()
        is_known = distribution in ("gamma", "weibull") and bool(row["client"])
        if not (is_known and 0 <= start_s < math.inf and 0 <= rate < math.inf and 0.005 <= shape < math.inf):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        problem = (
            "broken row: expected a client, window_start_s and rate_rps from 0, the distribution Gamma or Weibull, "
            "and its shape from 0.005 as param1"
        )
        raise ConfigError(problem, key=f"line {line}", source=source) from None
    return ClientWindow(f"client-{row['client']}", start_s, rate, distribution, shape)
