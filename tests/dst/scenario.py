# SPDX-License-Identifier: Apache-2.0
"""What happens in the simulation of one seed: models, sizes, requests, and what goes wrong when."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from tests.dst.oracle import FIRST_TOKEN, VOCAB
from tests.dst.world import CHECKPOINT_NUMBERS

PAGE = 64 << 10
LENDING = 1_000_000
"""From this seed on, memory is lent and models sleep, beside what happens in the life of the seed below."""
FAULT_KINDS = ("map_zeroed", "copy_in", "copy_out", "read")


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A model of the pool."""

    name: str
    checkpoint: int
    windows: tuple[int | None, ...]
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    prefix_caching: bool
    slo: tuple[float, float] | None

    @property
    def weight_bytes(self) -> int:
        """Bytes of its checkpoint."""
        return 8 * sum(CHECKPOINT_NUMBERS[self.checkpoint])


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """A request of a client."""

    request_id: str
    model: str
    at_s: float
    prompt: tuple[int, ...]
    max_tokens: int
    client: int
    structured: bool
    abort_at_s: float | None


@dataclass(slots=True)
class Scenario:
    """Everything that is decided before the run; times are seconds from its start."""

    seed: int
    models: list[ModelPlan]
    requests: list[RequestPlan]
    spare_pages: int
    """Pages beyond what the models are thought to need at least; where they are too few, as many as it takes."""
    movable: bool
    host_memory_frac: float
    """Host memory as a fraction of the weights of all models."""
    policy: str
    async_scheduling: bool
    head_size: int
    lateness_s: float
    step_s: float
    events: list[tuple[float, str, tuple[Any, ...]]] = field(default_factory=list)
    """Time, what, arguments."""
    poisoned: dict[str, int] = field(default_factory=dict)
    crash_at: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    memory_error_at: dict[str, tuple[int, bool]] = field(default_factory=dict)


def make_scenario(seed: int) -> Scenario:
    """The scenario of a seed."""
    scenario = _make_life(seed)
    if seed >= LENDING:
        _lend(random.Random(f"lending {seed}"), scenario)
    scenario.events.sort(key=lambda event: event[0])
    return scenario


def _lend(rng: random.Random, scenario: Scenario) -> None:
    """Budgets that shrink, grow and park the pool, and models that sleep.

    At the end all is there and awake, but for a model that may sleep on until all that the others were asked is done.
    """
    end_s = rng.choice((0.1, 0.4, 1.5))
    for _ in range(rng.choice((1, 3, 6))):
        share = rng.choice((0.0, 0.0, rng.random(), rng.random(), 1.0))
        host_share = rng.choice((None, None, None, rng.random(), 1.5))
        scenario.events.append((rng.random() * end_s, "budget", (share, host_share)))
    for _ in range(rng.choice((0, 1, 3))):
        at_s, name = rng.random() * end_s, rng.choice(scenario.models).name
        level, mode = rng.choice((0, 1, 1, 2)), rng.choice(("keep", "keep", "keep", "wait", "abort"))
        scenario.events.append((at_s, "sleep", (name, level, mode)))
        if rng.random() < 0.7:
            scenario.events.append((at_s + rng.random() * end_s, "wake", (name,)))
    last_s = max([end_s * 2, *(at_s for at_s, _, _ in scenario.events)]) + 0.01
    scenario.events.append((last_s, "budget", (1.0, None)))
    slept = [args[0] for _, what, args in scenario.events if what == "sleep"]
    last = rng.choice(slept) if slept and rng.random() < 0.7 else None
    for model in scenario.models:
        scenario.events.append((last_s, "wake_last" if model.name == last else "wake", (model.name, True)))


def _make_life(seed: int) -> Scenario:
    rng = random.Random(seed)
    movable = rng.random() < 0.7
    models = [_model(rng, f"m{index}") for index in range(rng.choice((1, 2, 2, 3, 3, 4)))]
    later = [_model(rng, "late0")] if rng.random() < 0.25 else []
    scenario = Scenario(
        seed=seed,
        models=models,
        requests=[],
        spare_pages=rng.choice((-6, -6, -3, 0, 2, 8)),
        movable=movable,
        host_memory_frac=rng.choice((0.5, 0.7, 0.9, 1.05, 1.2, 2.0, 8.0)),
        policy=rng.choice(("slack", "slack", "round_robin", "request_level", "aegaeon")),
        async_scheduling=rng.random() < 0.4,
        head_size=rng.choice((64, 128)),
        lateness_s=rng.choice((0.0, 0.002, 0.03)),
        step_s=rng.choice((0.0005, 0.002, 0.01)),
    )
    hungry = rng.random() < 0.35
    prefixes = {m.name: _tokens(rng, 40) for m in models + later}
    for number in range(rng.choice((2, 4, 8, 14)) + 6 * hungry):
        spread_s = 0.0 if hungry else rng.choice((0.0, 0.05, 0.6))
        scenario.requests.append(_request(rng, number, rng.choice(models), prefixes, spread_s, hungry=hungry))
    for model in later:
        at_s = rng.random() * 0.3
        scenario.events.append((at_s, "add", (model,)))
        for number in range(rng.randint(1, 3)):
            scenario.requests.append(_request(rng, 100 + number, model, prefixes, 0.3, after_s=at_s))
    if rng.random() < 0.2:
        scenario.events.append((rng.random() * 0.4, "remove", (rng.choice(models).name,)))
    if rng.random() < 0.2:
        scenario.events.append((rng.random() * 0.4, "drop_client", (rng.randrange(2),)))
    if rng.random() < 0.2:
        scenario.events.append((rng.random() * 0.4, "step_clock", (rng.choice((-3600.0, -2.0, 0.7, 3600.0)),)))
    if rng.random() < 0.15:
        name, at_s = rng.choice(models).name, rng.random() * 0.3
        scenario.events += [(at_s, "pause", (name,)), (at_s + rng.random() * 0.5, "resume", (name,))]
    for kind in FAULT_KINDS:
        if rng.random() < 0.15:
            start_s = rng.random() * 0.3
            end_s = start_s + rng.choice((0.05, 0.5, 3.0))
            scenario.events += [(start_s, "fault", (kind, rng.choice((0.05, 0.3, 1.0)))), (end_s, "fault", (kind, 0.0))]
    _crashes(rng, scenario)
    return scenario


def _crashes(rng: random.Random, scenario: Scenario) -> None:
    if rng.random() < 0.1:
        request = rng.choice(scenario.requests)
        scenario.poisoned[request.request_id] = rng.randint(0, len(request.prompt) + request.max_tokens)
    if rng.random() < 0.15:
        name = rng.choice(scenario.models).name
        scenario.crash_at[name] = [(rng.randint(1, 30), rng.choice(("before", "after")))]
    if rng.random() < 0.15:
        name, step, has_to_leave = rng.choice(scenario.models).name, rng.randint(1, 40), rng.random() < 0.6
        scenario.memory_error_at[name] = step, has_to_leave
        if has_to_leave:  # rare: whichever model it is, and soon, and with a step under way
            scenario.async_scheduling = True
            scenario.memory_error_at = {model.name: (1, True) for model in scenario.models}


def _model(rng: random.Random, name: str) -> ModelPlan:
    windows = rng.choice(((None,), (None,), (None, 16), (None, None)))
    return ModelPlan(
        name=name,
        checkpoint=rng.randrange(len(CHECKPOINT_NUMBERS)),
        windows=(None,) if windows == (None, None) else windows,
        block_size=rng.choice((4, 8)),
        max_model_len=rng.choice((64, 96, 160)),
        max_num_seqs=rng.choice((1, 3, 8)),
        max_num_batched_tokens=rng.choice((16, 48, 256)),
        prefix_caching=rng.random() < 0.7,
        slo=(rng.choice((0.05, 1.0)), rng.choice((0.01, 0.1))) if rng.random() < 0.6 else None,
    )


def _tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(FIRST_TOKEN, VOCAB) for _ in range(count)]


def _request(
    rng: random.Random,
    number: int,
    model: ModelPlan,
    prefixes: dict[str, list[int]],
    spread_s: float,
    after_s: float = 0.0,
    hungry: bool = False,
) -> RequestPlan:
    """A request; one that is `hungry` asks for nearly all tokens that its model allows."""
    length = rng.randint(1, 12 if hungry else model.max_model_len - 2)
    most_tokens = model.max_model_len - length
    shared = rng.choice((0, 0, 16, 40))
    prompt = (prefixes[model.name][:shared] + _tokens(rng, length))[:length]
    at_s = after_s + rng.random() * spread_s
    return RequestPlan(
        request_id=f"{model.name}-r{number}",
        model=model.name,
        at_s=at_s,
        prompt=tuple(prompt),
        max_tokens=most_tokens - rng.randint(0, 9) if hungry else rng.randint(1, min(most_tokens, rng.choice((4, 40)))),
        client=rng.randrange(2),
        structured=rng.random() < 0.15,
        abort_at_s=at_s + rng.random() * rng.choice((0.02, 0.1, 0.5)) if rng.random() < 0.25 else None,
    )
