# SPDX-License-Identifier: Apache-2.0
"""What a replay has measured, for all requests, per model and per tenant: as JSON, as a table, as a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenpool.cli.bench.client import Outcome, counts
from tokenpool.config import SLO
from tokenpool.errors import ConfigError
from tokenpool.policy.slo import attainments

_PERCENTILES = (50, 90, 95, 99)
_NUM_BINS = 40


def report(outcomes: Sequence[Outcome], slo: SLO) -> dict[str, Any]:
    """Summaries under `all`, `models` and `tenants` (empty without names); times in seconds, shares 0 to 1."""
    return {
        "slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s},
        "all": summary(outcomes, slo, _span_s(outcomes)),
        "models": _grouped(outcomes, slo, lambda outcome: outcome.request.model),
        "tenants": _grouped(outcomes, slo, lambda outcome: outcome.request.tenant),
        "send_lag_p99_s": _percentiles([max(0.0, o.sent_s - o.arrival_s) for o in outcomes if o.sent_s]).get("p99"),
    }


def summary(outcomes: Sequence[Outcome], slo: SLO, span_s: float) -> dict[str, Any]:
    """What there is to say of some requests that were played within `span_s` seconds.

    `*_per_s` are per second of the whole play, from the first arrival to the last token; goodput counts tokens, and
    requests, that were on time: token i by arrival + ttft + i * tpot. Times to tokens are of those that came.
    """
    records = [outcome.record(slo) for outcome in outcomes]
    shares = attainments(records)
    on_time = [
        sum(at <= o.arrival_s + slo.ttft_s + i * slo.tpot_s for i, at in enumerate(o.token_times_s)) for o in outcomes
    ]
    good = sum(not o.problem and count == o.request.output_len for o, count in zip(outcomes, on_time, strict=True))
    tokens = sum(len(outcome.token_times_s) for outcome in outcomes)
    ended = [outcome for outcome in outcomes if not outcome.problem]
    return {
        "requests": len(outcomes),
        "ended": counts(outcomes, by_kind=True),
        "attainment": {"token": shares.token, "request": shares.request, "time_weighted": shares.time_weighted},
        "goodput_tokens_per_s": sum(on_time) / span_s,
        "goodput_requests_per_s": good / span_s,
        "output_tokens_per_s": tokens / span_s,
        "requests_per_s": len(ended) / span_s,
        "input_tokens": sum(outcome.request.input_len for outcome in outcomes),
        "output_tokens": tokens,
        "ttft_s": _percentiles([ttft for o in outcomes if (ttft := o.ttft_s()) is not None]),
        "tpot_s": _percentiles([tpot for o in outcomes if (tpot := o.tpot_s()) is not None]),
        "e2el_s": _percentiles([outcome.token_times_s[-1] - outcome.arrival_s for outcome in ended]),
    }


def table(answer: dict[str, Any]) -> str:
    """A report as text: one line for all, for each model and for each tenant, then what failed."""
    rows = [("all", answer["all"])]
    rows += [(name, entry) for name, entry in answer["models"].items() if len(answer["models"]) > 1]
    rows += [(f"tenant {name}", entry) for name, entry in answer["tenants"].items()]
    width = max(len(name) for name, _ in rows)
    slo = answer["slo"]
    lines = [
        f"on time: token i by arrival + {slo['ttft_s']:g} s + i * {1e3 * slo['tpot_s']:g} ms",
        f"{'':{width}}  {'requests':>8} {'failed':>6}  {'tokens':>7} {'reqs.':>7} {'time-w.':>7}  {'goodput':>9}"
        f"  {'TTFT p50':>9} {'p99':>9}  {'TPOT p50':>9} {'p99':>9}",
    ]
    for name, entry in rows:
        failed = entry["requests"] - entry["ended"].get("done", 0)
        shares = " ".join(f"{100 * share:5.1f} %" for share in entry["attainment"].values())
        times = "  ".join(
            " ".join(f"{_ms(entry[kind].get(which)):>9}" for which in ("p50", "p99")) for kind in ("ttft_s", "tpot_s")
        )
        goodput = f"{entry['goodput_tokens_per_s']:7.1f}/s"
        lines.append(f"{name:{width}}  {entry['requests']:>8} {failed:>6}  {shares}  {goodput}  {times}")
    failures = {kind: count for kind, count in answer["all"]["ended"].items() if kind != "done"}
    lines += [f"failed: {count} x {kind}" for kind, count in failures.items()]
    return "\n".join(lines)


def draw(outcomes: Sequence[Outcome], slo: SLO, path: Path) -> None:
    """Draw times to the first token and tokens on time over the time of arrival, one colour per model or tenant."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--png needs matplotlib: pip install 'tokenpool[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_tenant = any(outcome.request.tenant for outcome in outcomes)
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.request.tenant if by_tenant else outcome.request.model, []).append(outcome)
    start_s = min(outcome.arrival_s for outcome in outcomes)
    edges = np.linspace(0, max(outcome.arrival_s - start_s for outcome in outcomes) + 1e-9, _NUM_BINS + 1)
    figure, (first, share) = pyplot.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    for name, group in sorted(groups.items()):
        points = [(o.arrival_s - start_s, ttft) for o in group if (ttft := o.ttft_s()) is not None]
        if points:
            first.plot(*zip(*points, strict=True), ".", markersize=4, label=name)
        bins = np.digitize([outcome.arrival_s - start_s for outcome in group], edges) - 1
        drawn = [
            (edges[i], 100 * attainments(o.record(slo) for o, b in zip(group, bins, strict=True) if b == i).token)
            for i in sorted(set(bins))
        ]
        share.plot(*zip(*drawn, strict=True), drawstyle="steps-post", label=name)
    first.axhline(slo.ttft_s, color="grey", linewidth=0.8, linestyle="--")
    first.set(ylabel="time to first token, s", yscale="log")
    share.set(ylabel="tokens on time, %", xlabel="arrival, s", ylim=(-2, 102))
    first.legend(fontsize="small", ncols=4)
    for axis in (first, share):
        axis.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be written: {error}", source=str(path)) from error


def _grouped(outcomes: Sequence[Outcome], slo: SLO, name_of: Callable[[Outcome], str]) -> dict[str, Any]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if name := name_of(outcome):
            groups.setdefault(name, []).append(outcome)
    span_s = _span_s(outcomes)
    return {name: summary(group, slo, span_s) for name, group in sorted(groups.items())}


def _span_s(outcomes: Sequence[Outcome]) -> float:
    begin_s = min(outcome.arrival_s for outcome in outcomes)
    end_s = max((o.token_times_s[-1] for o in outcomes if o.token_times_s), default=begin_s)
    return max(end_s - begin_s, outcomes[-1].arrival_s - begin_s, 1e-9)


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    found = np.percentile(values, _PERCENTILES)
    return {"mean": float(np.mean(values))} | {
        f"p{percent}": float(value) for percent, value in zip(_PERCENTILES, found, strict=True)
    }


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f} ms"
