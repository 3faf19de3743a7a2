# SPDX-License-Identifier: Apache-2.0
"""What `tokenpool top` shows of the figures, as text and tables of rich. It is the same text without colours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate, islice
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from tokenpool.memory.states import WeightState
from tokenpool.model_life import Life

_TONES = {"good": "green", "warn": "yellow", "bad": "red", "dim": "dim", "bold": "bold", "mark": "cyan", "": ""}
_USES = (("weights", "#", "mark"), ("kv", "+", "good"), ("kv_idle", "-", "dim"), ("null", "=", "dim"),
         ("lent", "x", "dim"))  # fmt: skip
"""Bars: use of pages, its letter, its tone; what is free is a dot."""
_MOST_BAR = 94  # columns; a longer one says no more
_NAME_WIDTH, _MARK_WIDTH, _STATE_WIDTH = 8, 2, 15
_COLUMNS = {"RUN": 4, "WAIT": 5, "TOK/S": 8, "ON TIME": 9, "TTFT": 9, "TPOT": 9, "KV": 5}
"""Numbers of a model, and how wide: from frame to frame nothing moves."""


def frame(view: dict[str, Any], height: int | None = None) -> Group:
    """One frame, no line of which wraps; at most `height` lines, the busiest models first; None = all models."""
    lines = _status(view)
    for name, host in view["hosts"].items():
        lines += _host_lines(name if len(view["hosts"]) > 1 else "device", host)
    lines += [_line((f"{name} does not answer: {error}", "bad")) for name, error in view["errors"].items()]
    failed = [model for model in view["models"] if model["state"] == Life.FAILED]
    lines += [_line((f"{model['name']} failed: {model['reason']}", "bad")) for model in failed]
    models = sorted(view["models"], key=_importance)
    room = len(models) if height is None else max(1, height - len(lines) - 2)  # a gap, and the heads of the columns
    shown = models if len(models) <= room else models[: max(0, room - 1)]
    rest: list[Text] = []
    if len(shown) < len(models):
        rest.append(_line((f"and {len(models) - len(shown)} more models, less busy", "dim")))
    if not models:
        rest.append(_line("no models: POST /v1/pool/models adds one"))
    return Group(*lines, "", _Models(shown), *rest)


def _line(*parts: str | tuple[str, str]) -> Text:
    """Text of one line, cut where the terminal ends; a part may have a tone."""
    toned = (part if isinstance(part, str) else (part[0], _TONES[part[1]]) for part in parts)
    return Text.assemble(*toned, no_wrap=True, overflow="ellipsis")


def _importance(model: dict[str, Any]) -> tuple[bool, float, float]:
    """Models that load or failed first, then busy ones, in the order of the pool among equals."""
    is_well = model["loading"] is None and model["state"] != Life.FAILED
    return (is_well, -(model["running"] + model["waiting"]), -model["goodput_tokens_per_s"])


def _status(view: dict[str, Any]) -> list[Text]:
    num = len(view["models"])
    progress = view["progress"]
    if view["stopping"]:
        left = sum(model["inflight"] for model in view["models"])
        word, tone = f"draining, {left} requests left", "warn"
    elif progress:
        word, tone = f"loading, {progress['done']} of {progress['total']} models ready", "warn"
    else:
        word, tone = ("ready", "good") if view["ready"] else ("not ready", "bad")
        if failed := sum(model["state"] == Life.FAILED for model in view["models"]):
            word, tone = f"{word}, {failed} failed", "bad"
    parts = [f"  {num} models" if num != 1 else "  1 model"]
    hosts = list(view["hosts"].values())
    if hosts:
        parts.append(f"  {hosts[0]['policy']}, up {_uptime(min(h['uptime_s'] for h in hosts))}")
    if view["host_restarts"]:
        parts.append(f"  {view['host_restarts']} host restarts")
    goodput = sum(model["goodput_tokens_per_s"] for model in view["models"])
    running, waiting = (sum(model[key] for model in view["models"]) for key in ("running", "waiting"))
    return [
        _line(("tokenpool", "bold"), "  ", (word, tone), *parts),
        _line(f"{goodput:.0f} tok/s on time; requests: {running} running, {waiting} waiting"),
    ]


def _host_lines(name: str, host: dict[str, Any]) -> list[Any]:
    turn = Text(host["current_model"] or "idle")
    turn.truncate(16, overflow="ellipsis")
    first = (
        f"{name}: turn {turn.plain}  steps {host['busy_share']:.0%}  waits {host['wait_share']:.1%}  "
        f"{host['switches_per_s']:.1f} switches/s ({host['waited_switch_share']:.0%} waited for)"
    )
    if host["age_s"] > 1:
        first += f"  ({host['age_s']:.0f} s old)"
    pages, num = host["pages"], host["num_pages"]
    memory = host["host_memory"]
    uses = {"weights": "weights", "paused": "paused_kv", "cached": "cached_kv"}
    node = memory.get("node", {})
    shared = f"; node {_size(node['used_bytes'])} of {_size(node['budget_bytes'])}" if node.get("hosts") else ""
    held = ", ".join(f"{word} {_size(memory.get(use, 0))}" for word, use in uses.items())
    shown = [use for use in _USES if use[0] != "lent" or pages[use[0]]]
    legend = "  ".join(f"{letter} {use.replace('_', ' ')} {pages[use]}" for use, letter, _ in shown)
    total = _size(num * host["page_size"])
    return [
        _line(first),
        _Bar(pages, num),
        _line(f"      {legend}  . free {pages['free']}  of {num} ({total})"),
        _line(f"host  {held}, free {_size(memory['free_bytes'])} of {_size(memory['budget_bytes'])}{shared}"),
    ]


class _Bar:
    """The pages of a device as one line of letters, as wide as the terminal allows."""

    def __init__(self, pages: dict[str, int], total: int) -> None:
        self._pages = pages
        self._total = total

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        head = "pages "
        width = min(options.max_width - len(head), _MOST_BAR)
        yield _line(head, *self._parts(width))

    def _parts(self, width: int) -> Iterator[tuple[str, str]]:
        done = drawn = 0
        for use, letter, tone in _USES:
            done += self._pages[use]
            end = round(done / self._total * width)
            if self._pages[use] and end == drawn and end < width:
                end += 1  # a use of few pages is seen too
            yield letter * (end - drawn), tone
            drawn = max(drawn, end)
        yield "." * (width - drawn), ""


class _Models:
    """A table with a row for each model; the columns on the right are left out where the terminal is narrow."""

    def __init__(self, models: Iterable[dict[str, Any]]) -> None:
        self._models = models

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = options.max_width - _NAME_WIDTH - _MARK_WIDTH - _STATE_WIDTH
        num_fit = sum(needed <= room for needed in accumulate(_COLUMNS.values()))
        table = Table(box=None, padding=0, pad_edge=False, header_style=_TONES["bold"])
        table.add_column("MODEL", min_width=_NAME_WIDTH)  # the one that yields
        table.add_column("", width=_MARK_WIDTH, justify="right")
        table.add_column("STATE", width=_STATE_WIDTH, no_wrap=True)
        for name, width in islice(_COLUMNS.items(), num_fit):
            table.add_column(name, min_width=width, justify="right", no_wrap=True)
        for model in self._models:
            table.add_row(*_cells(model)[: 3 + num_fit])
        yield table


def _cells(model: dict[str, Any]) -> list[Text]:
    word, tone = _state(model)
    share = model["attainment"]
    on_time = "-" if share is None else f"{share:.1%}"
    share_tone = "" if share is None or share >= 0.99 else "warn" if share >= 0.9 else "bad"
    return [
        _line(model["name"]),
        _line((">", "mark") if model["has_turn"] else ""),
        _line((word, tone)),
        _line(f"{model['running']}"),
        _line(f"{model['waiting']}"),
        _line(f"{model['goodput_tokens_per_s']:.1f}"),
        _line((on_time, share_tone)),
        _line(_latency(model["ttft_s"])),
        _line(_latency(model["tpot_s"])),
        _line(f"{model['kv_pages']}"),
    ]


def _state(model: dict[str, Any]) -> tuple[str, str]:
    if model["loading"]:
        return model["loading"]["phase"], "warn"
    if model["state"] == Life.DRAINING:
        return f"drains {model['inflight']}", "warn"
    if model["state"] == Life.COLD:
        return model["state"], ""
    if model["state"] != Life.READY:
        return model["state"], "bad"
    word = "/".join(model["weights"]) or model["state"]
    if model["kv"] == "out":
        word += " KV out"
    return word, "good" if WeightState.ON_DEVICE in model["weights"] else ""


def _latency(latency: dict[str, float] | None) -> str:
    if latency is None:
        return "-"
    seconds = latency["p50"]
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 99.5 else f"{seconds:.0f} s"


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}" if num_bytes < 999.5 else f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TiB"


def _uptime(seconds: float) -> str:
    for unit, scale, limit in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds / scale < limit:
            return f"{seconds / scale:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"
