# SPDX-License-Identifier: Apache-2.0
"""The pool that a trace is played against: random models, device memory for a part of them, one server per policy."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.parts import cluster_load, common, sized_models
from bench.parts.traces import TracedRequest
from tokenpool.config import SLO

ADMIN_KEY = cluster_load.ADMIN_KEY
WITH_OPTIONS: dict[str, tuple[str, dict[str, float]]] = {"aegaeon_join": ("aegaeon", {"join": 1, "quota_max_s": 0.5})}
"""Our names for policies with options; see docs/scheduling.md. Other names are policies as they are."""
_PAGE_MIB = 1
_LEAST_LEN = 512


@dataclass(frozen=True, slots=True)
class Setup:
    """Models and settings, the same for every policy."""

    folder: Path
    paths: Mapping[str, Path]
    mib_of: Mapping[str, float]
    device_mib: int
    max_model_len: int
    slo: SLO
    link_mib_per_s: float | None
    page_mib: int = _PAGE_MIB
    flags: Sequence[str] = common.MODEL_FLAGS[2:]
    """Of every model, beside its length."""

    def describe(self) -> dict[str, Any]:
        """For the results."""
        return {
            "weight_mib": dict(self.mib_of),
            "device_mib": self.device_mib,
            "page_mib": self.page_mib,
            "max_model_len": self.max_model_len,
            "slo": asdict(self.slo),
            "link_mib_per_s": self.link_mib_per_s,
        }


def prepare(
    folder: Path,
    trace: Sequence[TracedRequest],
    weight_mib: Sequence[float],
    device_frac: float,
    kv_mib: int,
    slo: SLO,
    link_mib_per_s: float | None,
) -> Setup:
    """Make a model for each name in the trace; sizes go round `weight_mib` in the order of names."""
    names = sorted({request.model for request in trace})
    mib_of = {name: weight_mib[index % len(weight_mib)] for index, name in enumerate(names)}
    longest = max(request.input_len + request.output_len for request in trace)
    device_mib = math.ceil(sum(mib_of.values()) * device_frac) + kv_mib
    common.progress(f"making {len(names)} models, {sum(mib_of.values()):g} MiB, for a device of {device_mib} MiB")
    paths = sized_models.make_all(folder, mib_of)
    return Setup(folder, paths, mib_of, device_mib, max(_LEAST_LEN, longest), slo, link_mib_per_s)


@contextmanager
def serve(setup: Setup, policy: str, log: Path, start_limit_s: float) -> Iterator[common.Server]:
    """A ready server with this turn policy; it is closed at the end."""
    pool_file = setup.folder / f"{policy}.yaml"
    pool_file.write_text(json.dumps(_pool(setup, policy)))  # JSON is YAML
    server = common.Server([*common.POOL, str(pool_file)], list(setup.paths), log)
    try:
        (ready_s,) = common.wait_until_ready([server], start_limit_s)
        common.progress(f"{policy}: ready after {ready_s:.0f} s")
        first_requests(server)
        yield server
    finally:
        server.close()


@contextmanager
def serve_on_hosts(
    setup: Setup, policy: str, log: Path, start_limit_s: float, num_hosts: int
) -> Iterator[common.Server]:
    """The same on a cluster of this machine: hosts with a device each, of which every one serves all models."""
    cluster = {"hosts": num_hosts, "capacity": "fixed", "replicas": num_hosts}
    with ExitStack() as stack:
        pool = _pool(setup, policy) | {"cluster": cluster}
        server = cluster_load.start_cluster(stack, pool, setup.folder, log, num_hosts, start_limit_s)
        deadline_s = time.monotonic() + start_limit_s
        while not all(_is_everywhere(model, num_hosts) for model in cluster_load.state(server)["models"].values()):
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"not all of {num_hosts} hosts serve all models")
            time.sleep(0.5)
        common.progress(f"{policy}: {num_hosts} hosts are ready")
        for _ in range(4 * num_hosts):  # the router sends some of them to each host
            first_requests(server)
        yield server


def _is_everywhere(model: Mapping[str, Any], num_hosts: int) -> bool:
    return list(model["hosts"].values()) == ["serving"] * num_hosts


def _pool(setup: Setup, policy: str) -> dict[str, Any]:
    flags = ["--max-model-len", str(setup.max_model_len), *setup.flags]
    slo = {"ttft": f"{setup.slo.ttft_s}s", "tpot": f"{setup.slo.tpot_s}s"}
    scheduler, options = WITH_OPTIONS.get(policy, (policy, {}))
    return {
        "models": [{"name": n, "model": str(path), "args": flags, "slo": slo} for n, path in setup.paths.items()],
        "device_memory": f"{setup.device_mib}MiB",
        "host_memory": f"{sum(setup.mib_of.values()) * 1.2 + 1024:.0f}MiB",
        "page_size": f"{setup.page_mib}MiB",
        "weights": "movable",
        "cpu_link": setup.link_mib_per_s and f"{setup.link_mib_per_s:.0f}MiB",
        "scheduling": {"policy": scheduler, "options": options},
        "admin_key": ADMIN_KEY,
    }


def first_requests(server: common.Server) -> None:
    """Ask each model once: its first request takes longer."""
    for name in sorted(server.models):
        common.measure([common.Load(server.port, name, common.random_prompts(0, 1, 64), 1, 4)])


def host_numbers(server: common.Server) -> dict[str, float]:
    """All numbers of the host's state by their path, and the sums over models of their counters; sums over hosts."""
    total: dict[str, float] = {}
    for host in host_states(server):
        models = host.get("models", {}).values()
        sums = {key: sum(model.get(key, 0) for model in models) for key in ("steps", "step_seconds", "tokens")}
        numbers = _flat({key: value for key, value in host.items() if key != "models"}) | sums
        for key, value in numbers.items():
            total[key] = total.get(key, 0) + value
    return total


def host_states(server: common.Server) -> list[dict[str, Any]]:
    """What each host tells of itself."""
    state = server.get("/v1/pool/state", key=ADMIN_KEY, limit_s=60.0)
    hosts = state["hosts"].values() if "hosts" in state else [state.get("host") or {}]
    return list(hosts)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + key] = value
    return found
