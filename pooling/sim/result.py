# SPDX-License-Identifier: Apache-2.0
"""What came of a simulated run: the three attainments, times to the first token, and what the devices did."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenpool.sim.timeline import Timeline

if TYPE_CHECKING:
    from tokenpool.sim.device import SimDevice


class MostMissed(NamedTuple):
    """Tokens that may be missed before a run is ended."""

    of_all: float
    of_model: Mapping[str, float]
    counts_overdue: bool = False
    """Whether tokens of a pool count that are late already, though their request has not ended. The answer to "too
    many?" is the same and comes earlier, but the sums of a run that was ended are others."""
    is_unwanted: Callable[[], bool] | None = None
    """Asked by a pool now and again: whether nobody waits for the answer any more. Then the run is ended as well."""


@dataclass(slots=True)
class SimResult:
    """Sums over requests. A request that failed or did not end misses all tokens that it did not get."""

    num_requests: int = 0
    num_failed: int = 0
    """Refused, or given up."""
    num_unfinished: int = 0
    num_tokens: int = 0
    """That were asked for."""
    num_tokens_delivered: int = 0
    tokens_on_time: int = 0
    requests_on_time: int = 0
    first_on_time: int = 0
    time_weighted_sum: float = 0.0
    busy_frac: float = 0.0
    """Share of the devices' time in which they stepped."""
    waited_frac: float = 0.0
    """Share in which they waited for weights or KV of the model to run."""
    link_frac: float = 0.0
    """Share in which weights or KV came in."""
    prefix_frac: float = 0.0
    """Share of the prompt tokens that needed no prefill, because others had begun alike."""
    switches: int = 0
    decisions: int = 0
    steps: int = 0
    num_events: int = 0
    wall_s: float = 0.0
    """Real seconds that the simulation took."""
    end_s: float = 0.0
    """Simulated seconds up to the last token."""
    window_s: tuple[float, float] = (0.0, math.inf)
    """Arrival times from and up to which requests are measured. What devices did is of the whole run."""
    is_stopped: bool = False
    """Too much was missed already: the run was ended, and what had not arrived by then counts nowhere."""
    host_bytes_per_node: float = 0.0
    """Most weights in the host memory of one node at a time, where hosts have seats; 0 elsewhere."""
    placement: dict[str, tuple[int, ...]] = field(default_factory=dict, repr=False)
    """Devices that each model began on, where hosts have seats."""
    models: dict[str, list[int]] = field(default_factory=dict, repr=False)
    """Tokens that were asked for, and those on time, by model."""
    open: set[Timeline] = field(default_factory=set, repr=False)
    """Requests on their way."""
    _ttft_s: list[float] = field(default_factory=list, repr=False)

    def add(self, request: Timeline) -> None:
        """A request has ended."""
        self.open.discard(request)
        self.end_s = max(self.end_s, request.end_s)
        if not self.window_s[0] <= request.arrival_s < self.window_s[1]:
            return
        self.num_requests += 1
        sums = self.models.setdefault(request.spec.model, [0, 0])
        sums[0] += request.spec.output_len
        sums[1] += request.num_on_time
        self.num_failed += request.failed
        self.num_tokens += request.spec.output_len
        self.num_tokens_delivered += request.num_delivered
        self.tokens_on_time += request.num_on_time
        self.requests_on_time += request.is_all_on_time
        if request.num_delivered:
            ttft_s = request.first_token_s - request.arrival_s
            self._ttft_s.append(ttft_s)
            self.first_on_time += ttft_s <= request.ttft_s
        self.time_weighted_sum += request.time_weighted()

    def stop_beyond(self, most: MostMissed, request: Timeline) -> None:
        """Note whether too much was missed, now that a request has ended."""
        count, on_time = self.models.get(request.spec.model, (0, 0))
        if count - on_time > most.of_model[request.spec.model] or self.num_tokens - self.tokens_on_time > most.of_all:
            self.is_stopped = True

    def stop_overdue(self, most: MostMissed, late: Mapping[str, int]) -> None:
        """Note whether too much was missed, with `late` tokens by model of requests that have not ended."""
        missed, of_all = dict(late), self.num_tokens - self.tokens_on_time + sum(late.values())
        for model, (count, on_time) in self.models.items():
            missed[model] = missed.get(model, 0) + count - on_time
        if of_all > most.of_all or any([count > most.of_model[model] for model, count in missed.items()]):
            self.is_stopped = True

    def close(self, devices: Sequence[SimDevice], num_events: int, wall_s: float) -> None:
        """The run is over."""
        for request in sorted(self.open, key=lambda r: r.arrival_s):
            failed = self.num_failed
            request.failed = True
            self.add(request)
            self.num_unfinished += self.num_failed - failed
        self.num_failed -= self.num_unfinished
        self.num_events, self.wall_s = num_events, wall_s
        span_s = max(self.end_s, 1e-9) * len(devices)
        self.busy_frac = sum(device.busy_s for device in devices) / span_s
        self.waited_frac = sum(device.waited_s for device in devices) / span_s
        copied_s = [
            (device.memory.weights_in_bytes + device.memory.kv_in_bytes) / device.spec.link_bytes_per_s
            for device in devices
        ]
        self.link_frac = sum(copied_s) / span_s
        asked = sum(device.prefixes.asked_tokens for device in devices)
        self.prefix_frac = sum(device.prefixes.hit_tokens for device in devices) / max(1, asked)
        self.switches = sum(device.switches for device in devices)
        self.decisions = sum(device.decisions for device in devices)
        self.steps = sum(device.steps for device in devices)

    @property
    def token_attainment(self) -> float:
        """Tokens by their due time, of all that were asked for; 0 to 1, as the next two."""
        return self.tokens_on_time / self.num_tokens if self.num_tokens else 1.0

    @property
    def request_attainment(self) -> float:
        """Requests with every token on time."""
        return self.requests_on_time / self.num_requests if self.num_requests else 1.0

    @property
    def time_weighted_attainment(self) -> float:
        """Mean of the measure of Aegaeon's artifact; see `policy.slo`."""
        return self.time_weighted_sum / self.num_requests if self.num_requests else 1.0

    def model_attainments(self) -> dict[str, float]:
        """Share of tokens on time of each model that was asked for, by name."""
        return {model: on_time / count for model, (count, on_time) in self.models.items()}

    @property
    def worst_model(self) -> float:
        """Share of tokens on time of the model with the least; 1 without requests."""
        return min(self.model_attainments().values(), default=1.0)

    def models_frac(self, goal: float = 0.9) -> float:
        """Share of the models that have at least the share `goal` of their tokens on time."""
        shares = self.model_attainments().values()
        return sum([share >= goal for share in shares]) / len(shares) if shares else 1.0

    def ttft_s(self, percent: float) -> float:
        """Percentile of the times to the first token, of requests that got one; 0 without any."""
        if len(self._ttft_s) < 2:
            return self._ttft_s[0] if self._ttft_s else 0.0
        return statistics.quantiles(self._ttft_s, n=1000, method="inclusive")[min(998, round(percent * 10) - 1)]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; shares in percent under the names that Aegaeon's results use here."""
        return {
            "artifact_slo_pct": 100 * self.time_weighted_attainment,
            "token_deadline_pct": 100 * self.token_attainment,
            "request_all_tokens_pct": 100 * self.request_attainment,
            "models_90_pct": 100 * self.models_frac(),
            "worst_model_pct": 100 * self.worst_model,
            "ttft_ok_pct": 100 * self.first_on_time / max(1, self.num_requests),
            "ttft_p50_s": self.ttft_s(50),
            "ttft_p99_s": self.ttft_s(99),
            "n_requests": self.num_requests,
            "n_failed": self.num_failed,
            "n_unfinished": self.num_unfinished,
            "n_tokens": self.num_tokens,
            "busy_frac": self.busy_frac,
            "waited_frac": self.waited_frac,
            "link_frac": self.link_frac,
            "prefix_hit_pct": 100 * self.prefix_frac,
            "switches": self.switches,
            "decisions": self.decisions,
            "steps": self.steps,
            "events": self.num_events,
            "wall_s": self.wall_s,
        }
