# SPDX-License-Identifier: Apache-2.0
"""What hostile requests do to a pool, and to a polite tenant beside them.

A pool of two models, with a polite tenant that streams completions all the time. In turn, in rounds, a process of its
own, which yields the cores to all others as if it were on another machine, does what the arm says:

    alone      it sends nothing
    again      it sends nothing, once more: how far two equal arms are apart is the noise
    sink       it sends the same as in `hostile`, to a process that refuses all at once: what sending alone costs the
               polite tenant where sender and pool share the cores, as no sender from elsewhere does
    hostile    it sends its part of --inputs, --rate a second: the kinds of `bench.parts.hostile_inputs`, drawn by seed
    ordinary   it sends streams of the same tenant, evenly spaced, as many a second as requests were answered (2xx) in
               the round's `hostile`, with as many tokens as its tenants had of the engine there, on average: what a
               neighbour costs who means well and uses as much of what the limits allow

`hostile` takes its time, the others a third of it.

    alive             1 if frontend and engine host are the same processes in the end, the polite tenant still gets all
                      its tokens, and the books of the memory agree once the pool is idle; else 0
    max_loop_lag_ms   the longest time that the frontend's event loop stood still, from the first round to the end, as
                      `tokenpool:loop_lag_max_seconds` tells: in all arms, `stalls` tells them apart
    max_loop_held_ms  the most that the loop's own thread computed in such a time, of those above 200 ms, by the log:
                      less than the lag where the machine was busy with others
    keyless_bytes     bytes of bodies of 2xx answers, and of websocket frames, to requests without a right key for what
                      they ask: none, a wrong one, a tenant's for what is of the pool, a view key for anything but
                      looking. The probes /health, /live, /ready, /ping, the page /pool and preflights (OPTIONS with
                      Origin and Access-Control-Request-Method) need no key and are left out. Of several requests on one
                      connection all count but the first ones that had a key
    errors_5xx        answers that say that the server failed: 5xx, in the status or within a stream. 503 and 529 with
                      Retry-After are refusals for overload; 501 is how vLLM says that a model does not do something
    unanswered        scripts that had neither an answer nor an end of the connection after 90 s, of those that wait
    polite_errors     streams of the polite tenant, in any arm, that did not get all their tokens
    itl_p99_change_pct    by how much its p99 time between tokens is above that in `alone`
    itl_p99_again_pct     the same of `again`: the noise
    itl_p99_sink_pct      the same of `sink`
    itl_p99_ordinary_pct  the same of `ordinary`
    itl_p99_beyond_ordinary_pct   by how much it is in `hostile` above that in `ordinary`: what hostility adds
    frontend_ms_per_input CPU milliseconds of the frontend in `hostile`, beyond those of `alone` in as long a time, for
                          each hostile request
    host_ms_per_input     the same of the engine host, which computes the tokens that are answered
    frontend_growth_mib   proportional set size of the frontend, its peak less what it was before the first round
    frontend_kept_mib     the same at the end

The loop's lag at the start, while models load, is left out: nothing is sent before a minute has passed, which is what
the metric remembers. `tracebacks` counts those in the server's log.
"""

from __future__ import annotations

import asyncio
import random
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.parts import common, hostile_rig, hostile_wire
from bench.parts.hostile_arms import (
    KEYS,
    OTHERS_LAST,
    Attack,
    Hostility,
    Neighbour,
    Nothing,
    Played,
    itl_ms_of,
    order_of,
    ttft_p99_ms_of,
)  # fmt: skip
from bench.parts.hostile_inputs import KINDS
from bench.parts.hostile_seen import Seen
from bench.tenant_fairness import wait_until_ready, yielding_process

_FORGETS_S = 62.0  # the longest lag of the last minute
_HELD = re.compile(r"event loop .* cpu_seconds=([0-9.]+)")


@dataclass(frozen=True, slots=True)
class Hostile:
    """Results; see the module."""

    inputs: int
    alive: int
    max_loop_lag_ms: float
    max_loop_held_ms: float
    keyless_bytes: int
    errors_5xx: int
    unanswered: int
    polite_errors: int
    itl_p99_change_pct: float
    itl_p99_again_pct: float
    itl_p99_sink_pct: float
    itl_p99_ordinary_pct: float
    itl_p99_beyond_ordinary_pct: float
    frontend_ms_per_input: float
    host_ms_per_input: float
    frontend_growth_mib: float
    frontend_kept_mib: float
    tracebacks: int
    better: Mapping[str, str]
    itl_ms: Mapping[str, Mapping[str, float]]
    """Percentiles of the polite tenant's times between tokens, by arm."""
    ttft_p99_ms: Mapping[str, float]
    per_round: Mapping[str, Sequence[float]]
    """p99 time between tokens in ms, by arm."""
    stalls: Mapping[str, Mapping[str, float]]
    """How often the loop was late by more than so many seconds, by arm."""
    by_class: Mapping[str, int]
    """Answers to hostile requests by the class of their status; `closed`, `left` and `unanswered` are none."""
    hostile: Mapping[str, Any]
    """What the hostile requests got, by kind and status, and what was noted of single ones."""
    ordinary: Sequence[Mapping[str, float]]
    """What was sent in `ordinary`, by round: requests a second, tokens in and out of each, and refusals."""
    polite_problems: Sequence[str]
    log: Sequence[str]
    """Lines of the server's log that tell of a loop that stood still, or of an error."""


def run(
    *,
    inputs: int,
    kinds: Sequence[str],
    rate: float,
    rounds: int,
    polite_rate: float,
    input_len: int,
    output_len: int,
    weight_mib: float,
    dtype: str,
    seed: int,
    start_limit_s: float,
    logs: Path | None,
) -> Hostile:
    """Play all arms `rounds` times."""
    lengths = (input_len, output_len)
    with common.scratch(logs) as (folder, log_folder, stack):
        server = hostile_rig.serve(folder, log_folder, weight_mib, dtype)
        stack.callback(server.close)
        wait_until_ready([server], start_limit_s)
        elsewhere = stack.enter_context(yielding_process())
        ports = {"sink": hostile_rig.start_sink(stack), "hostile": server.port}
        trace = hostile_rig.requests(random.Random(f"{seed} warm"), _FORGETS_S, polite_rate, lengths)
        asyncio.run(hostile_rig.play(server.port, trace, -1, elsewhere, Nothing()))
        before = hostile_rig.pids(server)
        seen = Seen(server.port, before, KEYS.metrics)
        seen.begin()
        log_path = log_folder / "hostile.log"
        begun, played = log_path.stat().st_size, Played()
        for number in range(rounds):
            part = range(inputs * number // rounds, inputs * (number + 1) // rounds)
            for arm in order_of(number):
                duration_s = max(5.0, inputs / rounds / rate) * (1.0 if arm == "hostile" else OTHERS_LAST)
                trace = hostile_rig.requests(random.Random(f"{seed} {number}"), duration_s, polite_rate, lengths)
                attack: Attack = Nothing()
                if arm in ports:
                    some = range(part.start, part.start + int(len(part) * OTHERS_LAST)) if arm == "sink" else part
                    attack = Hostility(ports[arm], seed, some, rate, kinds)
                elif arm == "ordinary":
                    attack = Neighbour(server.port, seed * 1000 + number, duration_s, *played.neighbour)
                used = hostile_rig.used(server)
                outcomes, got = asyncio.run(
                    hostile_rig.watched(server.port, trace, seed * 1000 + number, elsewhere, attack, seen, arm)
                )
                played.add(arm, outcomes, got, duration_s, hostile_rig.used(server) - used)
                common.progress(
                    f"round {number} {arm}: p99 between tokens {itl_ms_of([outcomes])[99]:.1f} ms, "
                    f"lag so far {1e3 * seen.lag_s:.0f} ms, sent {got.by_class()}"
                )
        alive = hostile_rig.is_alive(server, before, lengths)
        log = log_path.read_bytes()[begun:].decode(errors="replace")
    return _result(played, seen, alive, log)


def _result(all_played: Played, seen: Seen, alive: int, log: str) -> Hostile:
    played, tally = all_played.outcomes, all_played.hostile
    itl_ms = {arm: itl_ms_of(runs) for arm, runs in played.items()}
    change_pct = {arm: 100 * (times[99] / itl_ms["alone"][99] - 1) for arm, times in itl_ms.items()}
    frontend_s, host_s = seen.cpu_beyond("hostile", "alone", 1 / OTHERS_LAST)
    outcomes = [outcome for runs in played.values() for run in runs for outcome in run]
    problems = [outcome.problem for outcome in outcomes if outcome.problem]
    told = [line for line in log.splitlines() if re.search(r"event loop|ERROR|Error:|CRITICAL", line)]
    better = {"alive": "higher", "errors_5xx": "lower", "keyless_bytes": "lower", "max_loop_lag_ms": "lower"}
    return Hostile(
        inputs=tally.num_sent,
        alive=alive,
        max_loop_lag_ms=1e3 * seen.lag_s,
        max_loop_held_ms=1e3 * max(map(float, _HELD.findall(log)), default=0.0),
        keyless_bytes=tally.keyless_bytes,
        errors_5xx=tally.errors,
        unanswered=tally.unanswered,
        polite_errors=len(problems),
        itl_p99_change_pct=change_pct["hostile"],
        itl_p99_again_pct=change_pct["again"],
        itl_p99_sink_pct=change_pct["sink"],
        itl_p99_ordinary_pct=change_pct["ordinary"],
        itl_p99_beyond_ordinary_pct=100 * (itl_ms["hostile"][99] / itl_ms["ordinary"][99] - 1),
        frontend_ms_per_input=1e3 * frontend_s / max(1, tally.num_sent),
        host_ms_per_input=1e3 * host_s / max(1, tally.num_sent),
        frontend_growth_mib=seen.growth_mib,
        frontend_kept_mib=seen.kept_mib,
        tracebacks=log.count("Traceback (most recent call last)"),
        better=better | {"itl_p99_change_pct": "lower", "polite_errors": "lower"},
        itl_ms={arm: {f"p{percent}": value for percent, value in found.items()} for arm, found in itl_ms.items()},
        ttft_p99_ms={arm: ttft_p99_ms_of(runs) for arm, runs in played.items()},
        per_round={arm: [itl_ms_of([run])[99] for run in runs] for arm, runs in played.items()},
        stalls=seen.stalls,
        by_class=tally.by_class(),
        hostile=hostile_wire.as_values(tally),
        ordinary=all_played.ordinary,
        polite_problems=problems[:20],
        log=[line[:400] for line in told[:200]],
    )


def main() -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--inputs", type=int, default=10_000, help="hostile requests (default: %(default)s)")
    add("--kinds", nargs="*", choices=list(KINDS), default=[], metavar="KIND", help="of them (default: all)")
    add("--rate", type=float, default=40.0, help="of them per second (default: %(default)s)")
    add("--rounds", type=int, default=6, help="default: %(default)s")
    add("--polite-rate", type=float, default=3.0, help="polite streams per second (default: %(default)s)")
    add("--input-len", type=int, default=32, help="prompt tokens of one (default: %(default)s)")
    add("--output-len", type=int, default=48, help="tokens of its answer (default: %(default)s)")
    add("--weight-mib", type=float, default=32, help="of its model (default: %(default)s)")
    add("--dtype", default="float32", help="of the models (default: %(default)s)")
    keys = [
        "inputs",
        "alive",
        "max_loop_lag_ms",
        "max_loop_held_ms",
        "keyless_bytes",
        "errors_5xx",
        "unanswered",
        "polite_errors",
    ]
    keys += [f"itl_p99_{arm}_pct" for arm in ("change", "again", "sink", "ordinary", "beyond_ordinary")]
    keys += ["frontend_ms_per_input", "host_ms_per_input", "frontend_growth_mib", "frontend_kept_mib", "tracebacks"]
    common.report("hostile", run, parser.parse_args(), keys)


if __name__ == "__main__":
    main()
