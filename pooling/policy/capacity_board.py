# SPDX-License-Identifier: Apache-2.0
"""The controller's working copy of a `CapacityView`: seats, room and loads, kept up to date decision by decision.

What a model asks of a host is predicted from its traffic. With N = tokens per second * tpot requests decoding at a
time on average, and a share x of its traffic there,

    decode    (1 - exp(-x N)) * step_s / tpot  +  x N * (step_per_request_s + step_per_token_s * context) / tpot
    prefill   x * (arrivals per second * prefill_s  +  prompt tokens per second * prefill_per_token_s)

are shares of the host's time. The first term does not halve with x: a model in two places reads its weights twice.
Weights of models that are busy at the same time and do not fit on the device together load the link.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter

import numpy as np

from tokenpool.policy.capacity import LINK_BYTES_PER_S, CapacityModel, CapacityView, HostState, Role

_DEFAULT_TPOT_S = 0.1
_DEFAULT_TTFT_S = 10.0
_WEIGHTS_FRAC = 0.8
"""Of the device: the rest is left for KV."""
_SIGMAS = 4.0
"""By how many standard deviations of a Poisson count recent arrivals must exceed the long window's to be believed."""
_MIN_BUSY_FRAC = 0.6
"""A host that steps less has late tokens for another reason than too much work."""
_WORST_FRAC = 0.9
"""Share of tokens on time below which one model alone makes its host count as late."""
_MAX_SCALE = 3.0
_UNSURE = 1.6
"""What the load of a host must exceed, times the load that is full, while there is no measurement of it as it is."""
_TRAFFIC = attrgetter(
    "arrivals_per_s", "recent_arrivals_per_s", "input_tokens_per_s", "output_tokens_per_s", "tpot_s", "ttft_s",
    "weight_bytes",
)  # fmt: skip
_COSTS = attrgetter("step_s", "step_per_request_s", "step_per_token_s", "prefill_s", "prefill_per_token_s")


class Board:
    """Hosts and models by number, in the order of the view.

    `full` is the load up to which tokens are on time, `target` the share of tokens on time that is good enough.
    """

    def __init__(self, view: CapacityView, full: float, target: float) -> None:
        self.view, self.full = view, full
        hosts, models = view.hosts, view.models
        self.host_of = {host.host: i for i, host in enumerate(hosts)}
        self.model_of = {model.model: i for i, model in enumerate(models)}
        self.is_up = np.array([host.state is HostState.UP for host in hosts], bool)
        self.free_bytes = np.array([host.free_host_bytes for host in hosts], float)
        self.device_bytes = np.array([host.device_bytes for host in hosts], float)
        self.num_copies = np.array([host.num_copies for host in hosts], int)
        self.speed = np.array([host.speed for host in hosts], float)
        self.link = np.array([host.link_bytes_per_s for host in hosts], float)
        nodes = {host.node: i for i, host in enumerate(hosts)}
        self.node = np.array([nodes[host.node] for host in hosts], int)
        self.entry = np.array([host.role is not Role.DECODE for host in hosts], bool)
        """Whether requests may begin there."""
        self.decode = np.array([host.role is not Role.PREFILL for host in hosts], bool)
        """Whether requests may decode there."""
        self.seats: list[list[int]] = [[] for _ in models]
        """Hosts that are up by model, without those that it is leaving."""
        self.on_host: list[list[int]] = [[] for _ in hosts]
        """The same by host."""
        self.taken: list[set[int]] = [set() for _ in models]
        """Hosts by model where it has, or is losing, a seat."""
        self.stranded: list[tuple[int, int]] = []
        """(model, host) of seats on hosts that drain, or that the model may not be on."""
        self.bereft: set[int] = set()
        """Models that had a seat on a host that is lost."""
        self._apart = [[self.model_of[other] for other in m.apart if other in self.model_of] for m in models]
        self._read_seats()
        self._read_traffic(models)
        self._sum_up(target)
        self._now_in_lists()

    def _read_seats(self) -> None:
        model_of, seats, taken = self.model_of, self.seats, self.taken
        for h, host in enumerate(self.view.hosts):
            state, here = host.state, self.on_host[h]
            for seat in host.seats:
                m = model_of.get(seat.model)
                if m is None:
                    continue  # a model that is being removed
                if state is HostState.LOST:
                    self.bereft.add(m)
                    continue
                taken[m].add(h)
                if seat.is_leaving:
                    continue
                if state is HostState.UP and self.may_be_on(m, h, among=here):
                    seats[m].append(h)
                    here.append(m)
                else:
                    self.stranded.append((m, h))

    def may_be_on(self, m: int, h: int, among: Sequence[int] | None = None) -> bool:
        """Whether a host is one of those that a model may be on, and no model is there that it is apart from.

        With `among` these are the models that are there; else those that leave it count too.
        """
        allowed = self.view.models[m].allowed
        if allowed is not None and self.view.hosts[h].host not in allowed:
            return False
        if among is not None:
            return not any(other in among for other in self._apart[m])
        return not any(h in self.taken[other] for other in self._apart[m])

    def _read_traffic(self, models: Sequence[CapacityModel]) -> None:
        columns = np.array([_TRAFFIC(model) for model in models], float).reshape(len(models), 7).T
        arrivals, recent, inputs, outputs, tpot_s, ttft_s, self.weight_bytes = columns
        costs = np.array([_COSTS(model.costs) for model in models], float).reshape(len(models), 5).T
        step_s, per_request_s, per_token_s, prefill_s, per_prompt_token_s = costs
        recent = np.where(np.isnan(recent), arrivals, recent)
        tpot_s = np.where(np.isinf(tpot_s), _DEFAULT_TPOT_S, tpot_s)
        ttft_s = np.where(np.isinf(ttft_s), _DEFAULT_TTFT_S, ttft_s)
        window_s = self.view.windows.short_s
        # A rise is believed at once if it can hardly be chance, a fall when the long window shows it.
        surely = recent * window_s > arrivals * window_s + _SIGMAS * np.sqrt(np.maximum(arrivals * window_s, 1.0))
        self.rise = np.where(surely, recent / np.maximum(arrivals, 1e-9), 1.0)
        self.rise[surely & (arrivals <= 0)] = 1.0
        self.fades = recent * window_s < arrivals * window_s - _SIGMAS * np.sqrt(np.maximum(arrivals * window_s, 1.0))
        """Whether the traffic is about to go: nothing is moved for it."""
        requests = np.maximum(arrivals, 1e-9)
        context = (inputs + outputs / 2) / requests
        self.doubt_frac = 1 / np.sqrt(np.maximum(1.0, arrivals * self.view.windows.long_s))
        self.tokens_per_s = outputs * self.rise
        self.long_n = outputs * tpot_s
        self.n = self.long_n * self.rise
        self.per_step = step_s / tpot_s
        self.per_request = (per_request_s + per_token_s * np.where(arrivals > 0, context, 0.0)) / tpot_s
        self.long_prefill = arrivals * prefill_s + inputs * per_prompt_token_s
        self.prefill = self.long_prefill * self.rise
        self.ttft_s = np.minimum(ttft_s, _DEFAULT_TTFT_S)

    def _sum_up(self, target: float) -> None:
        """Loads of all hosts, scaled by what was measured where that is to be trusted."""
        count = len(self.on_host)
        m = np.array([m for m, hosts in enumerate(self.seats) for _ in hosts], int)
        h = np.array([h for hosts in self.seats for h in hosts], int)
        num_entry = np.bincount(m[self.entry[h]], minlength=len(self.seats))
        num_decode = np.bincount(m[self.decode[h]], minlength=len(self.seats))
        self.num_kinds = np.minimum(num_entry, num_decode).tolist()
        """The lesser of `kinds` of each model's seats, as the view has them."""
        x_e = np.where(self.entry[h], 1 / np.maximum(1, num_entry[m]), 0.0)
        x_d = np.where(self.decode[h], 1 / np.maximum(1, num_decode[m]), 0.0)

        def total(values: np.ndarray) -> np.ndarray:
            return np.bincount(h, values, minlength=count).astype(float)

        def work(n: np.ndarray, prefill: np.ndarray) -> np.ndarray:
            busy = -np.expm1(-x_d * n[m])
            return total(busy * self.per_step[m] + x_d * n[m] * self.per_request[m] + x_e * prefill[m]) / self.speed

        self.work = work(self.n, self.prefill)
        doubt = -np.expm1(-x_d * self.n[m] * (1 + self.doubt_frac[m])) + np.expm1(-x_d * self.n[m])
        doubt = doubt * self.per_step[m] + x_d * self.n[m] * self.doubt_frac[m] * self.per_request[m]
        self.doubt = (np.sqrt(total(doubt**2)) / self.speed).tolist()
        self.held = total(-np.expm1(-(x_d * self.n[m] + x_e * self.prefill[m])) * self.weight_bytes[m])
        self.tokens = total(np.where(self.decode[h], x_d, 0.0) * self.tokens_per_s[m])
        self.scale = self._scales(work(self.long_n, self.long_prefill) + self._link_part(), target)

    def _scales(self, predicted: np.ndarray, target: float) -> np.ndarray:
        """How much more, or less, hosts have to do than `predicted`, from the share of tokens that came on time."""
        scale = np.ones(len(predicted))
        self.limit = np.full(len(predicted), _UNSURE * self.full)
        """Load above which a host is relieved: more where only the prediction says so."""
        for h, host in enumerate(self.view.hosts):
            if not self.is_up[h] or predicted[h] <= 0 or host.since_move_s < self.view.windows.seat_s:
                continue
            due = on_time = 0.0
            worst_frac = 1.0
            for seat in host.seats:
                if seat.tokens_per_s:
                    due += seat.tokens_per_s
                    on_time += seat.tokens_per_s * seat.on_time_frac
                    worst_frac = min(worst_frac, seat.on_time_frac)
            if not due:
                continue
            good_frac = on_time / due
            if worst_frac < _WORST_FRAC:  # a model that few ask for counts as well
                good_frac = min(good_frac, worst_frac)
            self.limit[h] = self.full
            if good_frac < target and host.busy_frac >= _MIN_BUSY_FRAC:
                scale[h] = min(_MAX_SCALE, max(1.0, self.full / max(good_frac, 0.1) / predicted[h]))
            elif good_frac >= target:
                scale[h] = min(1.0, self.full / predicted[h])
        return scale

    # -- loads -----------------------------------------------------------------------------------------

    def _now_in_lists(self) -> None:
        """Single values are read and changed from here on, for which lists are several times as fast as arrays."""
        self.loads = self._loads()
        """`load` of all hosts."""
        for name in ("work", "held", "tokens", "scale", "speed", "link", "n", "per_step", "per_request", "prefill"):
            setattr(self, name, getattr(self, name).tolist())
        for name in ("weight_bytes", "tokens_per_s", "rise"):
            setattr(self, name, getattr(self, name).tolist())
        self.room = (_WEIGHTS_FRAC * self.device_bytes).tolist()
        self.entry_list, self.decode_list = self.entry.tolist(), self.decode.tolist()

    def _loads(self) -> np.ndarray:
        return self.scale * (self.work + self._link_part())

    def _link_part(self) -> np.ndarray:
        over = np.maximum(0.0, self.held - _WEIGHTS_FRAC * self.device_bytes)
        return over / (self.link * _DEFAULT_TTFT_S)

    def load(self, h: int, more_work: float = 0.0, more_held: float = 0.0) -> float:
        """Share of the host's time that its work needs to be on time, with the share of its link's that is short."""
        load = self.work[h] + more_work
        over = self.held[h] + more_held - self.room[h]
        if over > 0:
            load += over / (self.link[h] * _DEFAULT_TTFT_S)
        return self.scale[h] * load

    def lost(self, load: float, tokens: float) -> float:
        """Tokens per second that come late on a host with that load."""
        return tokens * (1.0 - self.full / load) if load > self.full else 0.0

    def kinds(self, hosts: Sequence[int]) -> tuple[int, int]:
        """How many of the hosts take new requests, and how many let requests decode."""
        entry, decode = self.entry_list, self.decode_list
        return sum([entry[h] for h in hosts]), sum([decode[h] for h in hosts])

    def parts(self, m: int, hosts: Sequence[int]) -> list[tuple[int, float, float, float]]:
        """What the model asks of each of `hosts` if these are its seats: host, work, bytes held, tokens per second."""
        num_entry, num_decode = self.kinds(hosts)
        n, prefill, nbytes = self.n[m], self.prefill[m], self.weight_bytes[m]
        by_kind: dict[tuple[bool, bool], tuple[float, float, float]] = {}
        found = []
        for h in hosts:
            kind = self.entry_list[h], self.decode_list[h]
            values = by_kind.get(kind)
            if values is None:
                x_e = 1 / num_entry if kind[0] else 0.0
                x_d = 1 / num_decode if kind[1] else 0.0
                steps = -math.expm1(-x_d * n) * self.per_step[m] + x_d * n * self.per_request[m]
                held = -math.expm1(-(x_d * n + x_e * prefill)) * nbytes
                values = by_kind[kind] = steps + x_e * prefill, held, x_d * self.tokens_per_s[m]
            found.append((h, values[0] / self.speed[h], values[1], values[2]))
        return found

    def alone(self, m: int) -> float:
        """Share of a usual host that the model needs with one seat, with what its weights take of the link."""
        steps = -math.expm1(-self.n[m]) * self.per_step[m] + self.n[m] * self.per_request[m] + self.prefill[m]
        held = -math.expm1(-(self.n[m] + self.prefill[m])) * self.weight_bytes[m]
        return float(steps + held / (LINK_BYTES_PER_S * _DEFAULT_TTFT_S))

    def share_of(self, m: int, h: int) -> float:
        """Share of the host's time that the model needs there now."""
        return next((self.scale[h] * work for s, work, _, _ in self.parts(m, self.seats[m]) if s == h), 0.0)

    def loads_after(self, m: int, after: Sequence[int]) -> dict[int, float]:
        """Loads of the hosts `after` if these were the model's seats."""
        now = {h: (work, held) for h, work, held, _ in self.parts(m, self.seats[m])}
        found = {}
        for h, work, held, _ in self.parts(m, after):
            old = now.get(h, (0.0, 0.0))
            found[h] = self.load(h, work - old[0], held - old[1])
        return found

    def gain(self, m: int, after: Sequence[int]) -> float:
        """Tokens on time per second won if the model's seats were `after`."""
        change = {h: (-work, -held, -tokens) for h, work, held, tokens in self.parts(m, self.seats[m])}
        for h, work, held, tokens in self.parts(m, after):
            old = change.get(h, (0.0, 0.0, 0.0))
            change[h] = work + old[0], held + old[1], tokens + old[2]
        won = 0.0
        for h, (work, held, tokens) in change.items():
            now, then = self.load(h), self.load(h, work, held)
            if now > self.full or then > self.full:
                won += self.lost(now, self.tokens[h]) - self.lost(then, self.tokens[h] + tokens)
        return won

    # -- changes ---------------------------------------------------------------------------------------

    def set_seats(self, m: int, after: Sequence[int]) -> None:
        """The model's seats are `after` now; room for new ones is taken, that of left ones is not free yet."""
        before = self.seats[m]
        for sign, hosts in ((-1.0, before), (1.0, after)):
            for h, work, held, tokens in self.parts(m, hosts):
                self.work[h] += sign * work
                self.held[h] += sign * held
                self.tokens[h] += sign * tokens
        for h in before:
            self.loads[h] = self.load(h)
            if h not in after:
                self.on_host[h].remove(m)
        for h in after:
            if h not in before:
                self.loads[h] = self.load(h)
                self.on_host[h].append(m)
                self.taken[m].add(h)
                self.free_bytes[h] -= self.weight_bytes[m]
                self.num_copies[h] += 1
        self.seats[m] = list(after)

    def set_role(self, h: int, role: Role) -> None:
        """The host takes other work; its loads and those of hosts that share models with it stay as they were."""
        self.entry[h] = self.entry_list[h] = role is not Role.DECODE
        self.decode[h] = self.decode_list[h] = role is not Role.PREFILL

    def can_take(self, m: int, max_copies: int) -> np.ndarray:
        """Which hosts have room for a new seat of the model, as a mask."""
        model = self.view.models[m]
        fits = self.is_up & (self.free_bytes >= model.weight_bytes)
        fits &= self.device_bytes >= model.weight_bytes + model.min_kv_bytes
        fits &= self.num_copies < max_copies
        if model.allowed is not None:
            fits &= np.fromiter((host.host in model.allowed for host in self.view.hosts), bool, len(fits))
        for other in self._apart[m]:
            fits[list(self.taken[other])] = False
        return fits
