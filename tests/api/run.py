# SPDX-License-Identifier: Apache-2.0
"""Sends the battery to plain `vllm serve` and to pools, and compares: `python -m tests.api.run [--pools one three …]`.

Ends with status 1 if an answer differs and docs/http.md does not say so, or says so of one that does not differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.parts import common
from tests.api.battery import ALIAS, KEY, MODEL, ORIGIN, Probe, all_probes
from tests.api.compare import Answer, ask, documented, report

POOLS = ("one", "three", "movable")
FLAGS = (
    *common.MODEL_FLAGS, "--served-model-name", MODEL, ALIAS, "--allowed-origins", json.dumps([ORIGIN]),
    "--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-request-id-headers", "--seed", "0",
)  # fmt: skip
ENV = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
_START_LIMIT_S = 300.0


def _words(kind: str, paths: Sequence[Path], folder: Path) -> list[str]:
    """The command of a server; the first model is the one that is asked."""
    if kind == "plain":
        memory = ("--kv-cache-memory-bytes", str(16 << 20))
        return [*common.PLAIN, "--model", str(paths[0]), *FLAGS, *memory, "--api-key", KEY]
    if kind == "one":
        return [
            *common.POOL,
            str(paths[0]),
            *FLAGS,
            "--api-key",
            KEY,
            "--device-memory",
            "64MiB",
            "--page-size",
            "1MiB",
        ]
    names = (MODEL, "second", "embed")
    models: list[dict[str, Any]] = [
        {"name": name, "model": str(path), "args": list(common.MODEL_FLAGS)}
        for name, path in zip(names, paths, strict=True)
    ]
    models[0]["args"] = list(FLAGS)
    models[2]["args"] += ["--runner", "pooling"]
    pool = {"models": models, "device_memory": "96MiB", "page_size": "1MiB", "api_key": KEY}
    if kind == "movable":
        pool |= {"weights": "movable", "host_memory": "64MiB"}
    file = folder / f"{kind}.yaml"
    file.write_text(json.dumps(pool))
    return [*common.POOL, str(file)]


def answers(kind: str, paths: Sequence[Path], folder: Path, probes: Sequence[Probe]) -> list[Answer]:
    """Start a server, send it everything, end it."""
    models = [MODEL] if kind in ("plain", "one") else [MODEL, "second", "embed"]
    server = common.Server(_words(kind, paths, folder), models, folder / f"{kind}.log", **ENV)
    server.key = KEY
    try:
        common.wait_until_ready([server], _START_LIMIT_S)
        return [ask(server.port, probe) for probe in probes]
    finally:
        server.close()


def compare(probes: Sequence[Probe], plain: Sequence[Answer], pools: Mapping[str, Sequence[Answer]]) -> dict[str, int]:
    """Print what is not documented, or documented and not so; returns the figures."""
    rows, used = documented(POOLS), set()
    same = known = unknown = 0
    for pool, got in pools.items():
        for probe, expected, answer in zip(probes, plain, got, strict=True):
            differences = expected.differences(answer)
            for part in list(differences):
                covering = [index for index, row in enumerate(rows) if row.covers(pool, probe, part)]
                used.update((index, pool) for index in covering)
                if covering:
                    del differences[part]
                    known += 1
            same += expected == answer
            if differences:
                unknown += 1
                print(report(f"{pool}: {probe.name}", differences))
    stale = [
        row for index, row in enumerate(rows) if (pools.keys() & row.pools) and not any(i == index for i, _ in used)
    ]
    for row in stale:
        print(f"docs/http.md tells of a difference that is none: {row.requests} {sorted(row.parts)}")
    requests = len(probes) * len(pools)
    return {"requests": requests, "same": same, "documented_differences": known, "undocumented": unknown + len(stale)}


def main() -> int:
    """Read the flags, run, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pools", nargs="+", choices=POOLS, default=list(POOLS))
    parser.add_argument("--save", type=Path, help="keep all answers in this file, as JSON")
    flags = parser.parse_args()
    probes = all_probes()
    with tempfile.TemporaryDirectory(prefix="api-") as name:
        folder = Path(name)
        paths = list(common.make_models(folder, ("llama", "qwen2", "embed")).values())
        got = {kind: answers(kind, paths, folder, probes) for kind in ("plain", *flags.pools)}
    if flags.save:
        told = {
            kind: {p.name: [a.status, a.headers, a.body] for p, a in zip(probes, had, strict=True)}
            for kind, had in got.items()
        }
        flags.save.write_text(json.dumps(told, indent=1))
    plain = got.pop("plain")
    figures = compare(probes, plain, got)
    print("result: " + " ".join(f"{key}={value}" for key, value in figures.items()))
    return 1 if figures["undocumented"] else 0


if __name__ == "__main__":
    sys.exit(main())
