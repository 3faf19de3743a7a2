# SPDX-License-Identifier: Apache-2.0
"""Which kinds of hostile requests a polite tenant suffers from: one kind at a time, and a line for each.

The server and the tenant are those of `bench/hostile.py`. With `mix` first all kinds come together, in the shares and
at the rate that they have there. For each kind:

    itl_p50, itl_p99, itl_max    of the polite tenant's times between tokens, in ms
    slow_per_input    of these times those longer than --slow-ms, for each hostile request
    slow_per_s        as many as that would be a second in the mix, of the 144 that the polite tenant has there
    ttft_p50, ttft_max    of its times to the first token, in ms
    frontend_ms, host_ms    CPU milliseconds for each hostile request, the polite tenant's own included
    kept_mib    what the frontend has beyond what it had at the begin, proportional set size
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.parts import common, hostile_rig
from bench.parts.hostile_arms import KEYS, Attack, Hostility, Nothing
from bench.parts.hostile_inputs import KINDS
from bench.parts.hostile_seen import Seen
from bench.tenant_fairness import wait_until_ready, yielding_process

_MIX_PER_S = 40.0
_POLITE_PER_S, _LENGTHS = 3.0, (32, 48)


def main() -> None:
    """Read the flags, play, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kinds", nargs="+", choices=["mix", *KINDS], default=[*KINDS], metavar="KIND", help="default: all of them")
    add("--rate", type=float, default=10.0, help="hostile requests a second (default: %(default)s)")
    add("--seconds", type=float, default=20.0, help="for each kind (default: %(default)s)")
    add("--slow-ms", type=float, default=23.0, help="default: %(default)s")
    add("--seed", type=int, default=1, help="default: %(default)s")
    add("--logs", type=Path, help="keep the server's log in this folder")
    flags = parser.parse_args()
    with common.scratch(flags.logs) as (folder, logs, stack):
        server = hostile_rig.serve(folder, logs, 32, "float32")
        stack.callback(server.close)
        wait_until_ready([server], 900)
        elsewhere = stack.enter_context(yielding_process())
        seen = Seen(server.port, hostile_rig.pids(server), KEYS.metrics)
        trace = hostile_rig.requests(random.Random("warm"), 6.0, _POLITE_PER_S, _LENGTHS)
        asyncio.run(hostile_rig.play(server.port, trace, -1, elsewhere, Nothing()))
        seen.begin()
        for number, kind in enumerate(["alone", *flags.kinds, "again"]):
            attack = _attack(server.port, kind, number, flags)
            trace = hostile_rig.requests(random.Random(f"{number}"), flags.seconds, _POLITE_PER_S, _LENGTHS)
            arm, seed = str(number), number + 1000 * flags.seed
            outcomes, got = asyncio.run(hostile_rig.watched(server.port, trace, seed, elsewhere, attack, seen, arm))
            frontend_s, host_s = seen.cpu_s[arm]
            times = [outcome.token_times_s for outcome in outcomes]
            gaps = [1e3 * (late - early) for each in times for early, late in itertools.pairwise(each)]
            firsts = [1e3 * seconds for outcome in outcomes if (seconds := outcome.ttft_s()) is not None]
            inputs = max(1, got.num_sent)
            slow_per_input = sum(gap > flags.slow_ms for gap in gaps) / inputs
            figures = {
                **{f"itl_p{percent}": common.percentile(gaps, percent) for percent in (50, 99)},
                "itl_max": max(gaps), "slow_per_input": slow_per_input, "slow_per_s": _share(kind) * slow_per_input,
                "ttft_p50": common.percentile(firsts, 50), "ttft_max": max(firsts),
                "frontend_ms": 1e3 * frontend_s / inputs, "host_ms": 1e3 * host_s / inputs,
                "kept_mib": seen.kept_mib, "problems": sum(bool(outcome.problem) for outcome in outcomes),
            }  # fmt: skip
            told = " ".join(f"{name}={value:.3g}" for name, value in figures.items())
            print(time.strftime("%H:%M:%S"), kind, f"inputs={got.num_sent}", told, got.by_class(), flush=True)


def _attack(port: int, kind: str, number: int, flags: argparse.Namespace) -> Attack:
    if kind not in ("mix", *KINDS):
        return Nothing()
    rate = _MIX_PER_S if kind == "mix" else flags.rate
    part = range(number * 10_000, number * 10_000 + int(rate * flags.seconds))
    return Hostility(port, flags.seed, part, rate, [] if kind == "mix" else [kind])


def _share(kind: str) -> float:
    """Requests of a kind a second in the mix."""
    if kind == "mix":
        return _MIX_PER_S
    total = sum(weight for weight, _ in KINDS.values())
    return _MIX_PER_S * KINDS[kind][0] / total if kind in KINDS else 0.0


if __name__ == "__main__":
    main()
