# SPDX-License-Identifier: Apache-2.0
"""What a stream sees of a model that is added beside it, in one go or in slices.

In one process, in turns: a request of one model runs, another model is added, the longest time between two tokens of
the request is noted, the model is removed. The CPU device; a checkpoint that the system has in its page cache.

    stall_slices_ms    longest time between two tokens while the model is built in slices, median over rounds; lower
    stall_at_once_ms   the same when it is built in one go
    build_ratio        time until the added model can be used, in slices / in one go; the price of the others' tokens
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import itertools

from bench.parts import common, sized_models

PAGE = 2 << 20
STEPS = 1900
"""Of the request; its model can hold no more."""


@dataclass(frozen=True, slots=True)
class Beside:
    """Medians over rounds, and every round; see the module."""

    stall_slices_ms: float
    stall_at_once_ms: float
    build_ratio: float
    step_ms: float
    """A step without anything beside it."""
    better: dict[str, str]
    rounds: list[dict[str, float]]


def run(*, mib: int, rounds: int, seed: int, start_limit_s: float, logs: Path | None) -> Beside:
    """Add and remove a model of `mib` MiB `rounds` times in both ways."""
    from bench.parts.switch_rig import Rig

    with common.scratch(logs) as (folder, _, _):
        paths = sized_models.make_all(folder, {"stays": 8, "comes": mib})
        rig = Rig({"stays": paths["stays"]}, mib + 64, PAGE, kv_pages=4, max_steps=STEPS, seed=seed)
        host = rig.host
        noted = []

        def add(*, beside: bool) -> tuple[float, float]:
            """The longest gap between two steps' ends, and the time of the whole build; seconds."""
            spec = rig.spec("comes", paths["comes"], 256)
            first = len(rig.steps)
            rig.turn("stays", 2)
            start_s = time.perf_counter()
            if beside:
                added = host.build_beside(lambda: rig.add_spec(spec))
                while not added.done():
                    rig.turn("stays", 1)
                    host.build_on()
                added.result()
            else:
                rig.add_spec(spec)
            build_s = time.perf_counter() - start_s
            rig.turn("stays", 2)
            ends = [step.end_s for step in rig.steps[first:]]
            host.remove_model("comes")
            return max(b - a for a, b in itertools.pairwise(ends)), build_s

        add(beside=True)  # imports, and what vLLM finds out about an architecture once
        for _ in range(rounds):
            slices, at_once = add(beside=True), add(beside=False)
            noted.append({
                "stall_slices_ms": slices[0] * 1e3, "build_slices_s": slices[1],
                "stall_at_once_ms": at_once[0] * 1e3, "build_at_once_s": at_once[1],
            })  # fmt: skip
            common.progress(str(noted[-1]))
        first = len(rig.steps)
        rig.turn("stays", 40)
        step_s = statistics.median(step.seconds for step in rig.steps[first:])
        rig.close()

    def median(key: str) -> float:
        return statistics.median(each[key] for each in noted)

    return Beside(
        stall_slices_ms=median("stall_slices_ms"),
        stall_at_once_ms=median("stall_at_once_ms"),
        build_ratio=median("build_slices_s") / median("build_at_once_s"),
        step_ms=step_s * 1e3,
        better=dict.fromkeys(("stall_slices_ms", "stall_at_once_ms", "build_ratio"), "lower"),
        rounds=noted,
    )


def main() -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    parser.add_argument("--mib", type=int, default=256, help="size of the model that is added (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    common.report(
        "add_beside", run, parser.parse_args(), ["stall_slices_ms", "stall_at_once_ms", "build_ratio", "step_ms"]
    )


if __name__ == "__main__":
    main()
