# SPDX-License-Identifier: Apache-2.0
"""Runs many seeds in child processes: what kills one, as an access to unmapped memory does, is a fault of its seed.

A seed that fails is told with all that is needed to run it again: `python -m tests.dst.shrink SEED`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_CHUNK = 25


@dataclass(slots=True)
class Outcome:
    """What became of some seeds."""

    reports: dict[int, dict[str, Any]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)
    """Seed -> what went wrong, for people."""

    def total(self, key: str) -> int:
        """Sum of a figure over all seeds."""
        return sum(report[key] for report in self.reports.values())


def run_seeds(
    seeds: Sequence[int], *, workers: int = 1, mutant: str | None = None, stop_early: bool = False
) -> Outcome:
    """Run each of `seeds`; with `stop_early` no more are begun after a failure. `mutant` puts a fault back."""
    outcome = Outcome()
    options = [f"--mutant={mutant}"] if mutant else []
    with tempfile.TemporaryDirectory(prefix="dst-") as folder, ThreadPoolExecutor(workers) as pool:
        chunks = [seeds[start : start + _CHUNK] for start in range(0, len(seeds), _CHUNK)]

        def run(number_and_chunk: tuple[int, Sequence[int]]) -> list[tuple[int, dict[str, Any] | str]]:
            number, chunk = number_and_chunk
            if stop_early and outcome.failures:
                return []
            return list(_run_chunk(chunk, Path(folder, str(number)), options))

        for results in pool.map(run, enumerate(chunks)):
            for seed, result in results:
                if isinstance(result, str):
                    outcome.failures[seed] = result
                    continue
                outcome.reports[seed] = result
                if result["violation"]:
                    outcome.failures[seed] = result["violation"]
    return outcome


def differing(seeds: Sequence[int], first: Outcome, *, workers: int = 1) -> dict[int, str]:
    """Those of `seeds` whose second run is another than the first."""
    second = run_seeds(seeds, workers=workers)
    return {
        seed: "two runs of it differ"
        for seed in seeds
        if seed in first.reports and first.reports[seed]["fingerprint"] != second.reports[seed]["fingerprint"]
    }


def _run_chunk(
    seeds: Sequence[int], folder: Path, options: Iterable[str]
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    folder.mkdir(exist_ok=True)
    left = list(seeds)
    while left:
        command = [sys.executable, "-m", "tests.dst.child", str(folder), ",".join(map(str, left)), *options]
        env = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        child = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        lines = child.stdout.splitlines()
        for line in lines:
            if line.startswith("{"):
                report = json.loads(line)
                left.remove(report["seed"])
                yield report["seed"], report
        if child.returncode == 0:
            assert not left, f"the child left {left} out"
            return
        begun = [line.removeprefix("seed ") for line in lines if line.startswith("seed ")]  # vLLM logs there, too
        assert begun, f"the simulator does not start: {child.stderr[-2000:]}"
        died = int(begun[-1])
        left.remove(died)
        yield died, f"the process died with status {child.returncode}: {child.stderr[-1500:]}"
