# SPDX-License-Identifier: Apache-2.0
"""The figures of `tokenpool top`: plain values from two answers of `/v1/pool/state`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


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
    """What hosts say that gave an error instead of their state, by name; Ray's head, too, while it is away."""
    hosts = state.get("hosts")
    found = hosts if isinstance(hosts, dict) else {"the engine host": state.get("host")}
    errors = {name: host["error"] for name, host in found.items() if isinstance(host, dict) and "error" in host}
    head = (state.get("cluster") or {}).get("head") or {}
    return errors if head.get("up", True) else errors | {"Ray's head": f"for {head['away_s']:.0f} s; requests go on"}


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
    pages = {use: sum(held.get(use, {}).values()) for use in ("weights", "kv", "null", "lent")}
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
            "node": {key: memory.get("node", {}).get(key, 0) for key in ("used_bytes", "budget_bytes", "hosts")},
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
