# SPDX-License-Identifier: Apache-2.0
"""What `tokenpool top` shows: from two answers of `/v1/pool/state` to plain values, and from these to lines of text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_COLOURS = {"good": "32", "warn": "33", "bad": "31", "dim": "2", "bold": "1", "mark": "36"}
_USES = (("weights", "#", "mark"), ("kv", "+", "good"), ("kv_idle", "-", "dim"), ("null", "=", "dim"))
"""Bars: use of pages, its letter, its colour; what is free is a dot."""
_LEAST_WIDTH = 60


def hosts_of(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The states of the hosts that have answered, by name; a pool of one host has no `hosts`."""
    hosts = state.get("hosts")
    if isinstance(hosts, list):
        hosts = {str(host.get("name", i)): host for i, host in enumerate(hosts)}
    if not isinstance(hosts, dict):
        hosts = {"device 0": state.get("host")}
    found = {name: (host or {}).get("state", host) for name, host in hosts.items()}
    return {name: host for name, host in found.items() if isinstance(host, dict) and host.get("num_pages")}


def _errors(state: dict[str, Any]) -> dict[str, str]:
    """What hosts say that gave an error instead of their state, by name."""
    hosts = state.get("hosts")
    found = hosts if isinstance(hosts, dict) else {"the engine host": state.get("host")}
    return {name: host["error"] for name, host in found.items() if isinstance(host, dict) and "error" in host}


def summarize(now: dict[str, Any], before: dict[str, Any] | None = None) -> dict[str, Any]:
    """The figures of one frame. Rates are those between two states, or since the start without `before`."""
    hosts = hosts_of(now)
    earlier = hosts_of(before or {})
    return {
        "ready": now.get("ready", False),
        "stopping": now.get("stopping", False),
        "progress": now.get("progress"),
        "host_restarts": now.get("host_restarts", 0),
        "errors": _errors(now),
        "hosts": {name: _host(host, earlier.get(name)) for name, host in hosts.items()},
        "models": [_model(name, pool, now, hosts, earlier) for name, pool in now.get("models", {}).items()],
    }


def _host(now: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    if before and before["switches"] > now["switches"]:
        before = None  # the host was started again
    seconds = now["time_s"] - before["time_s"] if before else now["uptime_s"]
    seconds = max(seconds, 1e-9)

    def gained(*path: str) -> float:
        return _at(now, path) - (_at(before, path) if before else 0)

    steps = sum(gained("models", name, "step_seconds") for name in now["models"])
    switches = gained("switches")
    held, idle = now["held_pages"], sum(model["kv_idle_pages"] for model in now["models"].values())
    pages = {use: sum(held.get(use, {}).values()) for use in ("weights", "kv", "null")}
    memory = now["host_memory"]
    return {
        "policy": now.get("policy"),
        "uptime_s": now["uptime_s"],
        "age_s": now.get("age_s", 0.0),
        "current_model": now.get("current_model"),
        "busy_share": min(1.0, steps / seconds),
        "wait_share": min(1.0, gained("residency", "visible_seconds") / seconds),
        "switches_per_s": switches / seconds,
        "waited_switch_share": min(1.0, gained("residency", "switches") / switches) if switches else 0.0,
        "page_size": now["page_size"],
        "num_pages": now["num_pages"],
        "pages": {**pages, "kv": pages["kv"] - idle, "kv_idle": idle, "free": now["num_free_pages"]},
        "host_memory": {
            "budget_bytes": memory["budget_bytes"],
            "free_bytes": memory["free_bytes"],
            **{use: sum(owners.values()) for use, owners in memory["held_bytes"].items()},
        },
    }


def _model(
    name: str, pool: dict[str, Any], state: dict[str, Any], hosts: dict[str, Any], earlier: dict[str, Any]
) -> dict[str, Any]:
    parts = [host["models"][name] for host in hosts.values() if name in host["models"]]
    old = [host["models"][name] for host in earlier.values() if name in host["models"]]

    def total(key: str) -> float:
        return sum(part[key] for part in parts)

    tokens, on_time = total("tokens"), total("tokens_on_time")
    new_tokens = tokens - sum(part["tokens"] for part in old)
    if new_tokens > 0:
        share = (on_time - sum(part["tokens_on_time"] for part in old)) / new_tokens
    else:
        share = on_time / tokens if tokens else None
    has_slo = any(part.get("has_slo") for part in parts)
    return {
        "name": name,
        "state": pool["state"],
        "reason": pool.get("reason"),
        "loading": ((state.get("progress") or {}).get("loading") or {}).get(name),
        "inflight": pool.get("inflight", 0),
        "weights": sorted({part["state"] for part in parts}),
        "kv": "out" if any(part["kv"] == "out" for part in parts) else "in",
        "has_turn": any(host.get("current_model") == name for host in hosts.values()),
        "running": total("running"),
        "waiting": total("waiting"),
        "goodput_tokens_per_s": total("goodput_tokens_per_s"),
        "attainment": share if has_slo else None,
        "ttft_s": _worst(part.get("ttft_s") for part in parts),
        "tpot_s": _worst(part.get("tpot_s") for part in parts),
        "weight_pages": total("weight_pages"),
        "kv_pages": total("kv_pages"),
    }


def _worst(latencies: Iterable[dict[str, float] | None]) -> dict[str, float] | None:
    return max((latency for latency in latencies if latency), key=lambda latency: latency["p99"], default=None)


def _at(value: Any, path: Iterable[str]) -> float:
    for key in path:
        value = value.get(key, 0) if isinstance(value, dict) else 0
    return value


# -- text --------------------------------------------------------------------------------------------------


def frame(view: dict[str, Any], *, width: int = 80, height: int | None = 24, colours: bool = False) -> list[str]:
    """The lines of one frame: at most `width` columns and `height` lines; None = as many as there are models."""
    paint = _painter(colours)
    width = max(width, _LEAST_WIDTH)
    lines = _status(view, paint)
    for name, host in view["hosts"].items():
        lines += _host_lines(name if len(view["hosts"]) > 1 else "device", host, width, paint)
    lines += [paint(_cut(f"{name} does not answer: {error}", width), "bad") for name, error in view["errors"].items()]
    failed = [model for model in view["models"] if model["state"] == "failed"]
    lines += [paint(_cut(f"{model['name']} failed: {model['reason']}", width), "bad") for model in failed]
    name_width = max(8, min(max((len(m["name"]) for m in view["models"]), default=5), width - 66))
    header = f"{'MODEL':{name_width}}  {'STATE':15}{'RUN':>4}{'WAIT':>5}{'TOK/S':>8}{'ON TIME':>9}"
    lines += ["", paint(f"{header}{'TTFT':>9}{'TPOT':>9}{'KV':>5}", "bold")]
    models = sorted(view["models"], key=_importance)
    room = len(models) if height is None else max(1, height - len(lines))
    shown = models if len(models) <= room else models[: max(0, room - 1)]
    lines += [_model_line(model, name_width, width, paint) for model in shown]
    if len(shown) < len(models):
        lines.append(paint(f"and {len(models) - len(shown)} more models, less busy", "dim"))
    if not models:
        lines.append("no models: POST /v1/pool/models adds one")
    return lines


def _importance(model: dict[str, Any]) -> tuple[bool, float, float]:
    """Models that load or failed first, then busy ones, in the order of the pool among equals."""
    is_well = model["loading"] is None and model["state"] != "failed"
    return (is_well, -(model["running"] + model["waiting"]), -model["goodput_tokens_per_s"])


def _status(view: dict[str, Any], paint: Any) -> list[str]:
    num = len(view["models"])
    progress = view["progress"]
    if view["stopping"]:
        left = sum(model["inflight"] for model in view["models"])
        word, tone = f"draining, {left} requests left", "warn"
    elif progress:
        word, tone = f"loading, {progress['done']} of {progress['total']} models ready", "warn"
    else:
        word, tone = ("ready", "good") if view["ready"] else ("not ready", "bad")
        if failed := sum(model["state"] == "failed" for model in view["models"]):
            word, tone = f"{word}, {failed} failed", "bad"
    parts = [paint("tokenpool", "bold"), paint(word, tone), f"{num} models" if num != 1 else "1 model"]
    hosts = list(view["hosts"].values())
    if hosts:
        parts.append(f"{hosts[0]['policy']}, up {_uptime(min(h['uptime_s'] for h in hosts))}")
    if view["host_restarts"]:
        parts.append(f"{view['host_restarts']} host restarts")
    goodput = sum(model["goodput_tokens_per_s"] for model in view["models"])
    running, waiting = (sum(model[key] for model in view["models"]) for key in ("running", "waiting"))
    return ["  ".join(parts), f"{goodput:.0f} tok/s on time; requests: {running} running, {waiting} waiting"]


def _host_lines(name: str, host: dict[str, Any], width: int, paint: Any) -> list[str]:
    turn = host["current_model"] or "idle"
    first = (
        f"{name}: turn {_cut(turn, 16)}  steps {host['busy_share']:.0%}  waits {host['wait_share']:.1%}  "
        f"{host['switches_per_s']:.1f} switches/s ({host['waited_switch_share']:.0%} waited for)"
    )
    if host["age_s"] > 1:
        first += f"  ({host['age_s']:.0f} s old)"
    pages, num = host["pages"], host["num_pages"]
    memory = host["host_memory"]
    uses = {"weights": "weights", "paused": "paused_kv", "cached": "cached_kv"}
    held = ", ".join(f"{word} {_size(memory.get(use, 0))}" for word, use in uses.items())
    parts = [(letter, tone, pages[use]) for use, letter, tone in _USES]
    legend = "  ".join(f"{letter} {use.replace('_', ' ')} {pages[use]}" for use, letter, _ in _USES)
    total = _size(num * host["page_size"])
    return [
        _cut(first, width),
        f"pages {_bar(parts, num, min(width, 100) - 6, paint)}",
        _cut(f"      {legend}  . free {pages['free']}  of {num} ({total})", width),
        _cut(f"host  {held}, free {_size(memory['free_bytes'])} of {_size(memory['budget_bytes'])}", width),
    ]


def _bar(parts: list[tuple[str, str, int]], total: int, width: int, paint: Any) -> str:
    text, done, drawn = "", 0, 0
    for letter, tone, pages in parts:
        done += pages
        end = round(done / total * width)
        if pages and end == drawn and end < width:
            end += 1
        text += paint(letter * (end - drawn), tone)
        drawn = max(drawn, end)
    return text + "." * (width - drawn)


def _model_line(model: dict[str, Any], name_width: int, width: int, paint: Any) -> str:
    word, tone = _state(model)
    share = model["attainment"]
    on_time = "-" if share is None else f"{share:.1%}"
    share_tone = "" if share is None or share >= 0.99 else "warn" if share >= 0.9 else "bad"
    name = _cut(model["name"], name_width)
    mark = paint(">", "mark") if model["has_turn"] else " "
    cells = [
        f"{name:{name_width}} {mark}{paint(f'{_cut(word, 15):15}', tone)}",
        f"{model['running']:>4}{model['waiting']:>5}{model['goodput_tokens_per_s']:>8.1f}",
        paint(f"{on_time:>9}", share_tone),
        f"{_latency(model['ttft_s']):>9}{_latency(model['tpot_s']):>9}{model['kv_pages']:>5}",
    ]
    return "".join(cells)


def _state(model: dict[str, Any]) -> tuple[str, str]:
    if model["loading"]:
        return model["loading"]["phase"], "warn"
    if model["state"] == "draining":
        return f"drains {model['inflight']}", "warn"
    if model["state"] != "resident":
        return model["state"], "bad"
    word = "/".join(model["weights"]) or "resident"
    if model["kv"] == "out":
        word += " KV out"
    return word, "good" if "resident" in model["weights"] else ""


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


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}~"


def _painter(colours: bool) -> Any:
    def paint(text: str, tone: str) -> str:
        return f"\x1b[{_COLOURS[tone]}m{text}\x1b[0m" if colours and tone and text else text

    return paint
