# SPDX-License-Identifier: Apache-2.0
"""Runs the fault simulator (tests/dst) on many seeds, and shows that it finds faults that the host once had.

Real hosts with vLLM's real scheduler and KV manager; only the models are stubs, whose tokens depend on every byte that
they read. A failing seed is printed; `python -m tests.dst.shrink SEED` makes it small. Nothing here is timed against
anything: the clock of a simulation is simulated, and tokens_per_s says how fast this machine simulates.

Figures: seeds, failures, tokens_checked (fingerprints read from KV and compared, each as often as a step read it),
tokens_computed, tokens_per_s (computed tokens per second and worker), switches between models, errors (requests that
ended with an error that something injected explains), hosts_lost (injected), floors_raised, reverted_bugs_found (of the
mutants in tests/dst/mutants.py; `found_after` says after how many seeds).
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.parts import common
from tests.dst.seeds import differing, run_seeds

MUTANTS = (
    "hunger_is_guessed",
    "raised_floor_outlives_its_request",
    "copies_throw_each_other_out",
    "fatal_error_is_charged_to_another",
)
_BLOCK = 50
"""Seeds between two looks at whether a mutant was found."""


def find_mutant(mutant: str, most_seeds: int, workers: int) -> int | None:
    """After how many seeds the simulator finds a fault that is put back; None if it does not."""
    for first in range(0, most_seeds, _BLOCK):
        seeds = range(first, min(first + _BLOCK, most_seeds))
        if failures := run_seeds(seeds, workers=workers, mutant=mutant).failures:
            return min(failures) + 1
    return None


@dataclass(frozen=True, slots=True)
class DstResult:
    """The figures that the module's docstring explains."""

    seeds: int
    failures: int
    failed_seeds: dict[str, str]
    tokens_checked: int
    tokens_computed: int
    switches: int
    requests: int
    errors: int
    hosts_lost: int
    floors_raised: int
    seconds: float
    tokens_per_s: float
    found_after: dict[str, int | None]
    reverted_bugs_found: int


def run(seed: int, seeds: int, workers: int, twice_every: int, mutant_seeds: int, **_: Any) -> DstResult:
    """Run the seeds, some of them twice, and the mutants."""
    start = time.perf_counter()
    chosen = range(seed, seed + seeds)
    outcome = run_seeds(chosen, workers=workers)
    seconds = time.perf_counter() - start
    common.progress(f"{seeds} seeds, {len(outcome.failures)} failures")
    failures = outcome.failures | differing(chosen[::twice_every], outcome, workers=workers)
    for failed, problem in failures.items():
        print(f"seed {failed}: {problem}")
    found = {}
    for mutant in MUTANTS:
        found[mutant] = find_mutant(mutant, mutant_seeds, workers)
        common.progress(f"{mutant}: found after {found[mutant]} seeds")
    totals = {field.name: outcome.total(field.name) for field in fields(DstResult)[3:10]}
    return DstResult(
        seeds=seeds,
        failures=len(failures),
        failed_seeds={str(failed): problem for failed, problem in failures.items()},
        **totals,
        seconds=seconds,
        tokens_per_s=totals["tokens_computed"] / seconds / workers,
        found_after=found,
        reverted_bugs_found=sum(after is not None for after in found.values()),
    )


def main() -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    parser.set_defaults(seed=0)
    parser.add_argument("--seeds", type=int, default=200, help="how many, from --seed on (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="child processes (default: %(default)s)")
    parser.add_argument(
        "--twice-every", type=int, default=10, help="one of so many is run twice and compared (default: %(default)s)"
    )
    parser.add_argument(
        "--mutant-seeds", type=int, default=1000, help="most seeds to find a fault put back (default: %(default)s)"
    )
    keys = ["seeds", "failures", "tokens_checked", "tokens_per_s", "switches", "reverted_bugs_found"]
    common.report("dst", run, parser.parse_args(), keys)


if __name__ == "__main__":
    main()
