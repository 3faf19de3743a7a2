# SPDX-License-Identifier: Apache-2.0
"""The arms of the bench of hostile requests: what is sent in each, in which order, and what came of it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bench.parts import common, hostile_wire
from bench.parts.hostile_inputs import Keys, make_ordinary, make_scripts
from bench.parts.hostile_wire import Tally
from tokenpool.cli.bench.client import Outcome

ARMS = ("alone", "again", "sink", "hostile", "ordinary")
OTHERS_LAST = 1 / 3
"""Of the time of `hostile`."""
KEYS = Keys(
    odd="odd-key-0123456789", greedy="greedy-key-0123456789", view="view-key-0123456789", metrics="metrics-key-0123456"
)
_MOST_OPEN = 256
_MOST_TOKENS = 900  # of a prompt and of an answer in `ordinary`: the model takes 2048


class Attack(Protocol):
    """What a process of its own sends; is called there."""

    def __call__(self) -> Tally:
        """Send all of it, and wait for the answers."""
        ...


@dataclass(frozen=True, slots=True)
class Nothing:
    """Sends nothing."""

    def __call__(self) -> Tally:
        return Tally()


@dataclass(frozen=True, slots=True)
class Hostility:
    """Hostile requests to a port."""

    port: int
    seed: int
    part: range
    """Numbers of the inputs that are sent."""
    rate: float
    kinds: Sequence[str]

    def __call__(self) -> Tally:
        scripts = make_scripts(self.seed, self.part, KEYS, self.kinds)
        return hostile_wire.play_all(self.port, scripts, self.rate, _MOST_OPEN)


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Streams of a neighbour who means well."""

    port: int
    seed: int
    duration_s: float
    rate: float
    input_len: int
    output_len: int

    def __call__(self) -> Tally:
        count = max(1, round(self.duration_s * self.rate))
        scripts = make_ordinary(self.seed, count, KEYS, self.input_len, self.output_len)
        return hostile_wire.play_all(self.port, scripts, self.rate, _MOST_OPEN)


@dataclass(slots=True)
class Played:
    """What has been played so far, by arm."""

    outcomes: dict[str, list[list[Outcome]]] = field(default_factory=lambda: {arm: [] for arm in ARMS})
    hostile: Tally = field(default_factory=Tally)
    ordinary: list[dict[str, float]] = field(default_factory=list)
    neighbour: tuple[float, int, int] = (0.0, 1, 1)
    """Requests a second that were answered in the last `hostile`, and their mean tokens in and out."""

    def add(self, arm: str, outcomes: list[Outcome], got: Tally, duration_s: float, used: Counter[str]) -> None:
        """Note one arm of a round, in which the other tenants used so many tokens."""
        self.outcomes[arm].append(outcomes)
        if arm == "hostile":
            self.hostile.add(got)
            num = max(1, got.by_class().get("2xx", 0))
            tokens = (
                min(_MOST_TOKENS, max(1, round(used[name] / num))) for name in ("prompt_tokens", "completion_tokens")
            )
            self.neighbour = (num / duration_s, *tokens)
        elif arm == "ordinary":
            rate, input_len, output_len = self.neighbour
            told = {"per_s": rate, "input_len": input_len, "output_len": output_len, "sent": got.num_sent}
            self.ordinary.append(told | {"refused": got.by_class().get("4xx", 0)})


def order_of(number: int) -> tuple[str, ...]:
    """The arms of a round, there and back; `ordinary` is told by the `hostile` before it."""
    return ARMS if number % 2 == 0 else (*ARMS[3:], *ARMS[2::-1])


def itl_ms_of(runs: Sequence[Sequence[Outcome]]) -> dict[int, float]:
    """Percentiles of the times between tokens; a stream that failed tells what it has."""
    times = [outcome.token_times_s for outcomes in runs for outcome in outcomes]
    gaps = [1e3 * (late - early) for each in times for early, late in itertools.pairwise(each)]
    return {percent: common.percentile(gaps, percent) for percent in (50, 90, 99)}


def ttft_p99_ms_of(runs: Sequence[Sequence[Outcome]]) -> float:
    times = [outcome.ttft_s() for outcomes in runs for outcome in outcomes]
    return 1e3 * common.percentile([seconds for seconds in times if seconds is not None], 99)
