# SPDX-License-Identifier: Apache-2.0
"""What a plan says: GPUs by system and group, what was tried, and what was taken for granted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tokenpool.config import SLO


class Try(NamedTuple):
    """What came of a number of GPUs."""

    num_gpus: int
    attainment: float
    """Share of tokens on time, 0 to 1."""


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """The answer for the models that take the same number of GPUs; only such share devices."""

    gpus_per_instance: int
    num_models: int
    num_gpus: int | None
    """None = the target was not reached with any number that was tried."""
    tries: tuple[Try, ...]
    """In order of GPUs."""
    num_tokens: int
    """That were asked for."""
    tokens_on_time: int
    """With `num_gpus`, or with the most that were tried."""
    busy_frac: float
    """Share of the devices' time in steps; this and the next two as in `SimResult`."""
    waited_frac: float
    link_frac: float
    worst_model: str | None = None
    """The model with the least share of tokens on time."""
    worst_frac: float = 1.0
    headroom_frac: float = 0.0
    """Share of the devices that the work due at its peak leaves free, at least: see `sim.compared.bound`."""
    host_bytes_per_node: float = 0.0
    """Most weights in the host memory of a node at a time; with dedicated instances none need be there."""
    placement: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """In a pool: the devices that each model begins on."""
    binding: str | None = None
    """With one device less, doubling this helps most: `compute`, `link` or `memory`; with the most that were tried, if
    they do not suffice. None = not known, or nothing."""
    instances: Mapping[str, int] = field(default_factory=dict)
    """With dedicated instances: how many of each model."""

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; shares of tokens in percent."""
        return {
            "gpus_per_instance": self.gpus_per_instance,
            "models": self.num_models,
            "gpus": self.num_gpus,
            "tried": [{"gpus": t.num_gpus, "token_deadline_pct": 100 * t.attainment} for t in self.tries],
            "busy_frac": self.busy_frac,
            "waited_frac": self.waited_frac,
            "link_frac": self.link_frac,
            "worst_model": self.worst_model,
            "worst_model_pct": 100 * self.worst_frac,
            "headroom_pct": 100 * self.headroom_frac,
            "host_bytes_per_node": self.host_bytes_per_node,
            "placement": {model: list(hosts) for model, hosts in self.placement.items()},
            "binding": self.binding,
            "instances": dict(self.instances),
        }


@dataclass(frozen=True, slots=True)
class SystemPlan:
    """The answer for one way of serving."""

    groups: tuple[GroupPlan, ...]

    @property
    def num_gpus(self) -> int | None:
        """GPUs of all groups; None if the target is out of reach for one of them."""
        counts = [group.num_gpus for group in self.groups]
        return None if None in counts else sum(count for count in counts if count)

    @property
    def spare_gpus(self) -> int | None:
        """With one instance more in each group, so that one may fail; None as `num_gpus`."""
        count = self.num_gpus
        return None if count is None else count + sum(group.gpus_per_instance for group in self.groups)

    @property
    def worst(self) -> GroupPlan:
        """The group with the worst model."""
        return min(self.groups, key=lambda group: group.worst_frac)

    @property
    def attainment(self) -> float:
        """Share of all tokens on time, 0 to 1."""
        num_tokens = sum(group.num_tokens for group in self.groups)
        return sum(group.tokens_on_time for group in self.groups) / num_tokens if num_tokens else 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """GPUs by system, and what was taken for granted."""

    gpu: str
    slo: SLO
    target: float
    model_target: float
    num_models: int
    num_requests: int
    """In the workload."""
    num_simulated: int
    """The first so many of them were used."""
    span_s: float
    """Seconds from the first of these to the last."""
    bound_gpus: int
    """With every token on time, free switching and endless memory: see `sim.bound`."""
    systems: Mapping[str, SystemPlan]
    """`dedicated`, then those of `POOLED`."""
    assumptions: tuple[str, ...]

    def saved_frac(self, system: str) -> float | None:
        """Share of the dedicated GPUs that a system does without; below 0 it needs more. None = not known."""
        dedicated, others = self.systems["dedicated"].num_gpus, self.systems[system].num_gpus
        return None if not dedicated or others is None else 1 - others / dedicated

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and texts, the same for the same input."""
        systems = {}
        for name, system in self.systems.items():
            saved = self.saved_frac(name)
            systems[name] = {
                "gpus": system.num_gpus,
                "gpus_and_spare": system.spare_gpus,
                "worst_model_pct": 100 * system.worst.worst_frac,
                "saved_pct": None if saved is None else 100 * saved,
                "token_deadline_pct": 100 * system.attainment,
                "groups": [group.to_json() for group in system.groups],
            }
        return {
            "gpu": self.gpu,
            "ttft_s": self.slo.ttft_s,
            "tpot_s": self.slo.tpot_s,
            "target_pct": 100 * self.target,
            "model_target_pct": 100 * self.model_target,
            "models": self.num_models,
            "requests": self.num_requests,
            "requests_simulated": self.num_simulated,
            "span_s": self.span_s,
            "bound_gpus": self.bound_gpus,
            "systems": systems,
            "assumptions": list(self.assumptions),
        }
