# SPDX-License-Identifier: Apache-2.0
"""Does the controller follow the traffic? Real engines on two hosts; the popularity flips from model a to model b.

Three models of one size, each on one of two hosts: `busy` and `b` on one, `a` on the other. At first `busy` and `a`
are asked, a host each. Then `b` is asked instead of `a`: both models that have work are on one host, the other host
is idle. With `capacity: fixed` that stays so; with `live` the controller moves a model, which here may have one seat
only: half a model on each host needs more than half of its time.

A model is asked for so many tokens per second that `--users` requests decode at a time if all are on time. Time per
token of the SLO is measured first: `--between` of the way from what a token takes when a model has a host for itself to
what it takes when two share one. So one model is well within what a host can do, and two are not. Requests come in
equal intervals; token i is due at arrival + ttft + i * tpot, with ttft = 20 tpot. The window of the controller is
shorter than usual, to keep this short.

    attainment_*   share of tokens on time, of all that fell due after the flip
    moves          seats that the controller added for the load, in the whole run
    moves_constant those of them before the flip, under constant load: should be 0
    adapt_s        from the flip until 90 % of tokens are on time again and stay so, in steps of 2 s; -1 = never

Hosts, frontend, Ray and load share the cores of the machine, so a token takes longer while both hosts work than
`alone`: if tokens are late before the flip, raise --between. Of other work on the cores the result says nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import aiohttp

from bench.parts import cluster_load, common, sized_models
from bench.parts.cluster_load import Stream

NAMES = ("busy", "a", "b")
"""In this order they are spread over two hosts: the first and the third come to one."""
_ANSWER, _PROMPT, _STEP_S, _GOOD = 48, 16, 2.0, 0.9


@dataclass(frozen=True, slots=True)
class Due:
    """Tokens on time and all tokens that fell due, in one step of time."""

    on_time: int
    due: int

    @property
    def frac(self) -> float:
        return self.on_time / self.due if self.due else 1.0


@dataclass(slots=True)
class Moves:
    attainment_static: float
    attainment_controller: float
    moves: int
    moves_constant: int
    adapt_s: float
    adapt_static_s: float
    first_move_s: float
    """From the flip; -1 = none."""
    before_static: float
    before_controller: float
    """Attainment before the flip."""
    tpot_s: float
    lost: int
    """Streams of both runs that ended with an error; those that still ran at the end were cut off and do not count."""
    cores: int
    decisions: list[dict[str, Any]] = field(default_factory=list)
    """Of the controller, with `at_s` from the flip."""
    timeline_static: list[float] = field(default_factory=list)
    timeline_controller: list[float] = field(default_factory=list)
    """Attainment of steps of 2 s from the start."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run over both phases; times from its start."""

    flip_s: float
    steps: Sequence[Due]
    decisions: Sequence[dict[str, Any]]
    lost: int

    def attainment(self, from_s: float, to_s: float) -> float:
        part = self.steps[round(from_s / _STEP_S) : round(to_s / _STEP_S)]
        return sum(d.on_time for d in part) / max(1, sum(d.due for d in part))

    def adapt_s(self) -> float:
        """See the module."""
        after = self.steps[round(self.flip_s / _STEP_S) :]
        bad = [i for i, step in enumerate(after) if step.frac < _GOOD]
        if not bad:
            return 0.0
        return -1.0 if bad[-1] >= len(after) - 2 else (bad[-1] + 1) * _STEP_S

    def moves(self) -> list[dict[str, Any]]:
        """Seats added because of load."""
        return [d for d in self.decisions if d["action"] == "add" and d["reason"].startswith(("move:", "replicate:"))]


def count_due(streams: Sequence[Stream], start_s: float, seconds: float, ttft_s: float, tpot_s: float) -> list[Due]:
    """Tokens of streams by the step in which they fell due; what had not come by its due time is late."""
    on_time, due = ([0] * round(seconds / _STEP_S) for _ in range(2))
    for stream in streams:
        for i in range(stream.num_tokens):
            due_s = stream.arrival_s + ttft_s + i * tpot_s
            step = int((due_s - start_s) / _STEP_S)
            if step < len(due):
                due[step] += 1
                on_time[step] += i < len(stream.times_s) and stream.times_s[i] <= due_s
    return [Due(*pair) for pair in zip(on_time, due, strict=True)]


async def _load(
    server: common.Server, phases: Sequence[tuple[Sequence[str], float]], interval_s: float, seed: int
) -> list[Stream]:
    """Ask the models of each phase, each every `interval_s`; returns all streams, the last ones cut off."""
    prompts = itertools.cycle(common.random_prompts(seed, 997, _PROMPT))
    streams: list[Stream] = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2)) as session:
        running: list[asyncio.Task[None]] = []

        async def ask(model: str, begin_s: float, end_s: float) -> None:
            due_s = begin_s
            while due_s < end_s:
                await asyncio.sleep(max(0.0, due_s - time.time()))
                streams.append(Stream(model, next(prompts), _ANSWER))
                running.append(asyncio.create_task(streams[-1].run(session, server.port)))
                due_s += interval_s

        begin_s = time.time()
        for models, seconds in phases:
            shifts = [begin_s + interval_s * i / len(models) for i in range(len(models))]
            await asyncio.gather(*(ask(m, at_s, begin_s + seconds) for m, at_s in zip(models, shifts, strict=True)))
            begin_s += seconds
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return streams


def _pool(paths: dict[str, Path], mib: float, slo: dict[str, Any] | None) -> dict[str, Any]:
    entries = [{"name": name, "model": str(path), "args": cluster_load.MODEL_ARGS} for name, path in paths.items()]
    memory = f"{round(mib * len(NAMES) * 1.3) + 128}MiB"
    return {"models": [e | ({"slo": slo} if slo else {}) for e in entries], "device_memory": memory,
            "host_memory": memory, "page_size": "4MiB", "weights": "movable"}  # fmt: skip


def _token_s(folder: Path, logs: Path, paths: dict[str, Path], mib: float, users: int, limit_s: float) -> list[float]:
    """Mean seconds from token to token of `users` streams of a model that has a host for itself, and of two on one."""
    token_s = []
    with ExitStack() as stack:
        pair = {name: paths[name] for name in ("busy", "b")}
        server = cluster_load.start_single(stack, _pool(pair, mib, None), folder, logs / "step.log", limit_s)
        for names, requests in ((["busy", "b"], users), (["busy"], 3 * users), (["busy", "b"], 3 * users)):
            prompts = common.random_prompts(requests, requests, _PROMPT)
            _, results = common.measure([common.Load(server.port, name, prompts, users, _ANSWER) for name in names])
            if requests == users:
                continue  # the first ones take longer
            token_s.append(statistics.fmean(itl_s for result in results for itl_s in result.itl_s))
        return token_s


def _arm(
    name: str, pool: dict[str, Any], folder: Path, logs: Path, phases: Sequence[tuple[Sequence[str], float]],
    tpot_s: float, users: int, window_s: float, seed: int, limit_s: float,
) -> Run:  # fmt: skip
    with ExitStack() as stack:
        server = cluster_load.start_cluster(stack, pool, folder, logs / f"{name}.log", 2, limit_s)
        at = {m: sorted(s["hosts"]) for m, s in cluster_load.state(server)["models"].items()}
        if at["busy"] != at["b"] or at["a"] == at["b"]:
            raise RuntimeError(f"the models are not spread as the bench needs it: {at}")
        common.progress(f"{name}: {at}")
        for model in NAMES:  # the first requests of a model take longer
            common.measure([common.Load(server.port, model, common.random_prompts(seed, 2, _PROMPT), 1, _ANSWER)])
        time.sleep(window_s)  # until the controller has forgotten them
        start_s = time.time()
        streams = asyncio.run(_load(server, phases, _ANSWER * tpot_s / users, seed))
        flip_s = phases[0][1]
        steps = count_due(streams, start_s, sum(seconds for _, seconds in phases), 20 * tpot_s, tpot_s)
        made = [d | {"at_s": round(d["at_s"] - start_s - flip_s, 2)} for d in cluster_load.decisions(server)]
        problems = [s.problem for s in streams if s.problem]
        run = Run(flip_s, steps, made, len(problems))
        common.progress(f"{name}: {[round(step.frac, 2) for step in steps]} {sorted(set(problems))[:3]}")
        for decision in run.moves():
            common.progress(f"{name}: {decision['at_s']} s after the flip: {decision['reason']}")
        return run


def run(
    *, mib: float, users: int, between: float, before_s: float, after_s: float, window_s: float, tpot_ms: float | None,
    png: Path | None, seed: int, start_limit_s: float, logs: Path | None,
) -> Moves:  # fmt: skip
    """The whole bench."""
    with common.scratch(logs) as (folder, log_folder, _):
        paths = sized_models.make_all(folder / "models", dict.fromkeys(NAMES, mib))
        tpot_s = (tpot_ms or 0.0) / 1e3
        if not tpot_s:
            alone_s, both_s = _token_s(folder, log_folder, paths, mib, users, start_limit_s)
            tpot_s = alone_s + between * (both_s - alone_s)
            common.progress(
                f"a token takes {alone_s:.4f} s, of two models on one host {both_s:.4f} s; tpot {tpot_s:.4f}"
            )
        pool = _pool(paths, mib, {"ttft": f"{20 * tpot_s:.4f}s", "tpot": f"{tpot_s:.5f}s"})
        phases = [(("busy", "a"), before_s), (("busy", "b"), after_s)]
        end_s = before_s + after_s
        arms = {}
        for name, cluster in (("fixed", {}), ("live", {"capacity_window": f"{window_s}s", "max_replicas": 1})):
            section = {"hosts": 2, "capacity": name, **cluster}
            arms[name] = _arm(
                name,
                pool | {"cluster": section},
                folder,
                log_folder,
                phases,
                tpot_s,
                users,
                window_s,
                seed,
                start_limit_s,
            )
        fixed, live = arms["fixed"], arms["live"]
        if png:
            _draw(png, fixed, live)
        made = live.moves()
        after = [d["at_s"] for d in made if d["at_s"] >= 0]
        return Moves(
            attainment_static=round(fixed.attainment(before_s, end_s), 4),
            attainment_controller=round(live.attainment(before_s, end_s), 4),
            moves=len(made),
            moves_constant=len(made) - len(after),
            adapt_s=live.adapt_s(),
            adapt_static_s=fixed.adapt_s(),
            first_move_s=min(after, default=-1.0),
            before_static=round(fixed.attainment(0, before_s), 4),
            before_controller=round(live.attainment(0, before_s), 4),
            tpot_s=round(tpot_s, 5),
            lost=fixed.lost + live.lost,
            cores=len(os.sched_getaffinity(0)),
            decisions=list(live.decisions),
            timeline_static=[round(step.frac, 3) for step in fixed.steps],
            timeline_controller=[round(step.frac, 3) for step in live.steps],
        )


def _draw(path: Path, fixed: Run, live: Run) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.2), layout="constrained")
    for arm, label in ((fixed, "fixed"), (live, "controller")):
        times_s = [i * _STEP_S - arm.flip_s for i in range(len(arm.steps))]
        axes.step(times_s, [step.frac for step in arm.steps], where="post", label=label)
    for i, decision in enumerate(live.moves()):
        axes.axvline(decision["at_s"], color="grey", linestyle=":", label=None if i else "move")
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set(xlabel="seconds from the flip", ylabel="tokens on time", ylim=(-0.02, 1.05))
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--mib", type=float, default=320, help="size of each model (default: %(default)s)")
    parser.add_argument("--users", type=int, default=3, help="requests at a time of a model (default: %(default)s)")
    parser.add_argument("--between", type=float, default=0.7, help="where tpot is, see above (default: %(default)s)")
    parser.add_argument("--before-s", type=float, default=40, help="until the flip (default: %(default)s)")
    parser.add_argument("--after-s", type=float, default=50, help="after the flip (default: %(default)s)")
    parser.add_argument("--window-s", type=float, default=18, help="cluster.capacity_window (default: %(default)s)")
    parser.add_argument("--tpot-ms", type=float, help="set it instead of measuring a step")
    parser.add_argument("--png", type=Path, help="draw both runs there; needs matplotlib")
    flags = parser.parse_args()
    common.report("capacity_moves", run, flags, ("attainment_static", "attainment_controller", "moves", "adapt_s"))


if __name__ == "__main__":
    main()
