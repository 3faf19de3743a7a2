# SPDX-License-Identifier: Apache-2.0
"""Which models of a cluster are to be loaded: those that are wanted, within `max_loaded` and the memory of hosts.

    cold ──wake──► awake ──rest──► resting ──all servers have finished──► leaving its hosts ──► cold
     ▲               │
     └───────────────┘ it cannot be loaded, or its host is lost and nobody uses it

Who is woken next depends on who waits: tenants have turns, and the most urgent request of one comes first. For one that
has no room, models rest that nobody uses, the longest idle first; after PATIENCE_S also such as are used, those with
the fewest requests first, and nobody is woken before it. What rests finishes what it has; what comes for it waits.
Where a model is loaded is the placement's to say. Plain Python: no Ray, no clock.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from dataclasses import dataclass

from tokenpool.cluster.deciding.scene import Event, Scene
from tokenpool.cluster.deciding.uses import Uses, Want
from tokenpool.cluster.seats import BAR_S
from tokenpool.cluster.values import Deployment, SeatState
from tokenpool.config import Loading
from tokenpool.errors import CapacityError, HostError, PoolError
from tokenpool.policy.fairness import FairTurns

PATIENCE_S = 5.0
"""So long a request waits for a model that is to be idle before such as are used are asked to finish."""
MAX_HOST_DEATHS = 3
"""So many hosts may die in a row while they load a model."""
_JOIN_LIMIT_S = 60.0
"""A model that a server does not join so long after it was loaded may rest, although requests wait for it there."""
_NOBODY = Want()
_NO_CLAIM = (math.inf, math.inf, "")


@dataclass(slots=True)
class _Life:
    version: int
    rule: Loading
    is_awake: bool
    is_on_demand: bool
    asked_s: float = math.inf
    """Since when it is to be loaded although no request waits for it; inf = it is not."""
    rest: int = 0
    """Not 0 while it rests, or leaves its hosts."""
    used_s: float = -math.inf
    served_s: float = math.inf
    """Since when a host has it; inf while none has."""
    is_woken: bool = False
    """Whether it was woken and is not served yet."""
    retry_s: float = -math.inf
    """Not woken before."""
    failures: int = 0
    host_deaths: int = 0


class Lives:
    """See the module; times are those of the caller's monotonic clock."""

    def __init__(
        self,
        max_loaded: int | None,
        weight_of: Callable[[str], float] = lambda tenant: 1.0,
        *,
        first_rest: int = 1,
        known_awake: Collection[str] | None = None,
    ) -> None:
        """`known_awake` are those that a former controller had woken; None = there was none, or it had no choice.

        Rests are counted from `first_rest`, which is above those of former controllers.
        """
        self.uses = Uses()
        self._max_loaded = max_loaded
        self._lives: dict[str, _Life] = {}
        self._turns = FairTurns(weight_of)
        self._rests = itertools.count(first_rest)
        self._known_awake = None if known_awake is None else set(known_awake)
        self._wants: Mapping[str, Want] = {}
        self._states: dict[str, set[SeatState]] = {}
        self._gone: set[str] = set()
        """What rests, or is removed: its room is on its way."""

    # -- what is known -----------------------------------------------------------------------------------

    @property
    def has_choice(self) -> bool:
        """Whether any model comes and goes; if not, all of them are always awake."""
        rules = (life.rule for life in self._lives.values())
        return self._max_loaded is not None or any(not r.at_start or r.unload_after_s < math.inf for r in rules)

    @property
    def awake(self) -> list[str]:
        """Those that are to have seats."""
        return sorted(name for name, life in self._lives.items() if life.is_awake)

    def is_awake(self, name: str) -> bool:
        """Whether it is to have seats."""
        return name in self._lives and self._lives[name].is_awake

    def rest_of(self, name: str) -> int:
        """See ModelView.rest."""
        return self._lives[name].rest if name in self._lives else 0

    def keep(self, models: Mapping[str, Deployment], now_s: float) -> None:
        """Know these models and no others."""
        for name in [name for name, life in self._lives.items() if name not in models]:
            del self._lives[name]
        known, self._known_awake = self._known_awake, None
        for name, model in models.items():
            if name in self._lives and self._lives[name].version == model.version:
                continue
            rule = model.loading
            is_awake = rule.at_start and (self._max_loaded is None or len(self.awake) < self._max_loaded)
            if known is not None:
                is_awake = name in known
            is_on_demand = not (rule.at_start and is_awake)
            life = self._lives[name] = _Life(model.version, rule, is_awake, is_on_demand, used_s=now_s)
            if known is None and rule.at_start and not is_awake:
                life.asked_s = now_s
        if known is not None and not self.has_choice:
            for life in self._lives.values():
                life.is_awake, life.is_on_demand = True, False

    def found(self, name: str) -> None:
        """A host has it: it is awake, whatever was known."""
        if name in self._lives and not self._lives[name].is_awake and not self._lives[name].rest:
            self._lives[name].is_awake = True

    def died(self, name: str) -> None:
        """A host died while it loaded the model."""
        if name in self._lives:
            self._lives[name].host_deaths += 1

    def in_use(self, name: str) -> bool:
        """Whether a server has a request for it."""
        return self._wants.get(name, _NOBODY).is_used

    def needed(self, now_s: float) -> list[str]:
        """Those that need a host: such as are always loaded, and such as are used and may be loaded."""
        found, lasting = [], self.lasting()
        for name, life in self._lives.items():
            is_wanted = self.in_use(name) or life.asked_s < math.inf
            if name in lasting or (is_wanted and (life.is_awake or life.retry_s <= now_s)):
                found.append(name)
        return found

    def lasting(self) -> set[str]:
        """Those that stay loaded, whoever uses them."""
        lives = self._lives.items()
        return {name for name, life in lives if life.is_awake and (not life.is_on_demand or life.rule.keep is not None)}

    def used_since(self, since_s: float) -> set[str]:
        """Those that are loaded and were used since then."""
        return {name for name, life in self._lives.items() if life.is_awake and life.used_s >= since_s}

    def look(self, now_s: float, servers: Set[str]) -> None:
        """Put together what servers have told."""
        self.uses.keep(servers, self._lives)
        self._wants = self.uses.wants()
        for name, life in self._lives.items():
            want = self._wants.get(name, _NOBODY)
            life.used_s = now_s if want.is_used else max(life.used_s, want.used_s)

    # -- what is decided ---------------------------------------------------------------------------------

    def decide(self, scene: Scene) -> list[Event]:
        """Change what is to be changed now; what each host is to do about it follows from `is_awake`."""
        self._states = {}
        for (name, _), seat in scene.seats.items():
            self._states.setdefault(name, set()).add(seat.state)
        events = self._note_served(scene.now_s)
        if not self.has_choice:
            return events
        events += [*self._fail_deadly(scene.now_s), *self._end_rests(scene)]  # what is cold now may be wanted now
        self._gone = {*self._resting, *scene.retiring, *(self._states.keys() - self._lives.keys())}
        events += [self._rest(name, f"unused for {idle_s:.0f} s") for name, idle_s in self._unused(scene)]
        stranded = [name for name in self._idle(scene) if name in scene.stranded and self._lives[name].is_on_demand]
        events += [self._rest(name, "its host is given back, and nobody uses it") for name in stranded]
        events += self._rest_of_too_many(scene)
        return events + self._wake_wanted(scene)

    def give_up(self, scene: Scene, until_s: Callable[[str], float]) -> list[Event]:
        """Let models be cold that no host can load, for a while; `until_s` says when a host may try one again."""
        return [
            self.fail(name, scene.errors[name], scene.now_s, until_s(name))
            for name, life in self._lives.items()
            if self._is_hopeless(name, scene) and not self._wants.get(name, _NOBODY).num_unfinished
            and (life.is_on_demand or self._is_in_the_way(name, scene))  # else it is tried on and on
        ]  # fmt: skip

    def _is_hopeless(self, name: str, scene: Scene) -> bool:
        return name in scene.errors and self._lives[name].is_awake and all(seated != name for seated, _ in scene.seats)

    def _is_in_the_way(self, name: str, scene: Scene) -> bool:
        """Whether a model that waits could be woken, were this one not to be loaded."""
        gone = {name, *self._gone, *self._resting}
        waiting = [other for other in self._wanted(scene) if not self._fits(other, gone - {name}, scene)]
        return any(self._fits(other, gone, scene) for other in waiting)

    def fail(self, name: str, error: PoolError, now_s: float, until_s: float = -math.inf) -> Event:
        """It cannot be loaded, and is not woken again for a while, nor before `until_s`."""
        life = self._lives[name]
        wait_s = max(until_s - now_s, BAR_S[min(life.failures, len(BAR_S) - 1)])
        life.is_awake, life.is_on_demand, life.asked_s = False, True, math.inf
        life.is_woken, life.host_deaths = False, 0
        life.retry_s, life.failures = now_s + wait_s, life.failures + 1
        return Event("load_failed", name, f"{error}; not again for {wait_s:g} s", error)

    def forgiven(self, now_s: float) -> list[str]:
        """Those that may be tried again from now on."""
        names = [name for name, life in self._lives.items() if -math.inf < life.retry_s <= now_s]
        for name in names:
            self._lives[name].retry_s = -math.inf
        return names

    def _note_served(self, now_s: float) -> list[Event]:
        events = []
        for name, life in self._lives.items():
            if SeatState.SERVING not in self._states.get(name, ()):
                life.served_s = math.inf
            elif life.served_s == math.inf:
                is_news, life.is_woken = life.is_woken, False
                life.served_s, life.asked_s, life.failures, life.host_deaths = now_s, math.inf, 0, 0
                life.used_s = max(life.used_s, now_s)
                events += [Event("demand_load", name, "it is served")] if is_news else []
        return events

    def _fail_deadly(self, now_s: float) -> list[Event]:
        return [
            self.fail(name, HostError(f"{life.host_deaths} engine hosts ended in a row while they loaded it"), now_s)
            for name, life in self._lives.items()
            if life.is_awake and life.host_deaths >= MAX_HOST_DEATHS and not self._states.get(name)
        ]

    def _end_rests(self, scene: Scene) -> list[Event]:
        """Let those be cold that have rested, and that were lost with their host and nobody uses."""
        events, have_told = [], self.uses.have_told(scene.servers)
        for name, life in self._lives.items():
            is_anywhere, is_used = bool(self._states.get(name)), self.in_use(name)
            is_lost = life.is_awake and have_told and not (is_anywhere or is_used) and life.asked_s == math.inf
            if life.rest and life.is_awake and (is_lost or self.uses.rested_by(scene.servers, name, life.rest)):
                life.is_awake, life.is_on_demand = False, True
            elif is_lost and life.is_on_demand and life.rule.keep is None:
                life.is_awake = False
                events.append(Event("cold", name, "no host has it, and nobody uses it"))
            if life.rest and not life.is_awake and not is_anywhere:
                life.rest = 0
                events.append(Event("cold", name, "it has left all hosts"))
        return events

    def _may_rest(self, name: str, scene: Scene) -> bool:
        life = self._lives[name]
        is_served = life.is_awake and life.served_s < math.inf and not life.rest
        return is_served and life.rule.keep is None and name not in scene.retiring

    def _idle(self, scene: Scene) -> list[str]:
        """Those that nobody uses and that may rest, the longest idle first."""
        if not self.uses.have_told(scene.servers):
            return []
        found = [name for name in self._lives if not self.in_use(name) and self._may_rest(name, scene)]
        return sorted(found, key=lambda name: self._lives[name].used_s)

    def _busy(self, scene: Scene) -> list[str]:
        """Those that are used, and have served all who waited for them, with the fewest requests first."""
        found = []
        for name in self._lives:
            want, served_for_s = self._wants.get(name, _NOBODY), scene.now_s - self._lives[name].served_s
            has_served = served_for_s >= (PATIENCE_S if not want.num_held else _JOIN_LIMIT_S)
            if want.is_used and has_served and self._may_rest(name, scene):
                found.append((want.num_unfinished, name))
        return [name for _, name in sorted(found)]

    def _unused(self, scene: Scene) -> list[tuple[str, float]]:
        idle = ((name, scene.now_s - self._lives[name].used_s) for name in self._idle(scene))
        return [(name, idle_s) for name, idle_s in idle if idle_s >= self._lives[name].rule.unload_after_s]

    def _rest(self, name: str, reason: str) -> Event:
        self._lives[name].rest = next(self._rests)
        return Event("rest", name, reason)

    @property
    def _loaded(self) -> set[str]:
        """Those that are loaded, or are to be."""
        return self._states.keys() | {name for name, life in self._lives.items() if life.is_awake}

    @property
    def _resting(self) -> set[str]:
        return {name for name, life in self._lives.items() if life.rest}

    def _rest_of_too_many(self, scene: Scene) -> list[Event]:
        """What a former controller had loaded beside what this one has."""
        excess = len(self._loaded - self._gone) - (self._max_loaded or math.inf)
        if excess <= 0:
            return []
        victims = [*self._idle(scene), *self._busy(scene)][: int(excess)]
        return [self._rest(name, f"more than {self._max_loaded} are loaded") for name in victims]

    # -- who is next -------------------------------------------------------------------------------------

    def _claims(self, name: str) -> list[tuple[float, float, str]]:
        due_by_tenant = dict(self._wants.get(name, _NOBODY).due_by_tenant)
        if (asked_s := self._lives[name].asked_s) < math.inf:
            due_by_tenant[""] = min(asked_s, due_by_tenant.get("", asked_s))
        return [(self._turns.counter(tenant), due_s, tenant) for tenant, due_s in due_by_tenant.items()]

    def _since_s(self, name: str) -> float:
        want, asked_s = self._wants.get(name, _NOBODY), self._lives[name].asked_s
        return -math.inf if want.num_unfinished else min(want.since_s, asked_s)

    def _wanted(self, scene: Scene) -> list[str]:
        """Those that are to be woken, in that order: what was accepted comes first."""
        found = []
        for name, life in self._lives.items():
            is_wanted = self.in_use(name) or life.asked_s < math.inf
            if not is_wanted or life.is_awake or life.rest or self._states.get(name) or life.retry_s > scene.now_s:
                continue
            if name in scene.retiring or scene.models[name].payload is None:
                continue
            is_accepted = self._wants.get(name, _NOBODY).num_unfinished > 0
            found.append((not is_accepted, min(self._claims(name), default=_NO_CLAIM)[:2], name))
        return [name for _, _, name in sorted(found)]

    def _wake_wanted(self, scene: Scene) -> list[Event]:
        """Wake the next one, or make room for it: one at a time, because the one after it is to see its seats."""
        events: list[Event] = []
        coming = [life for life in self._lives.values() if life.is_awake and life.served_s == math.inf]
        if sum(life.is_on_demand for life in coming) >= scene.num_hosts:
            return events
        for name in self._wanted(scene):
            if self._fits(name, frozenset(), scene):
                return [*events, self._wake(name)]
            events += (made := self._make_room(name, scene))
            is_refused = any(event.error for event in made)
            if not is_refused and scene.now_s - self._since_s(name) >= PATIENCE_S and self._may_fit(name, scene):
                break  # nothing comes between it and what is about to be free
        return events

    def _wake(self, name: str) -> Event:
        want = self._wants.get(name, _NOBODY)
        if claims := self._claims(name):
            self._turns.take(min(claims)[2])
        self._lives[name].is_awake = self._lives[name].is_woken = True
        return Event("wake", name, f"{want.num_held} requests wait" if want.is_used else "it was added")

    def _fits(self, name: str, gone: Set[str], scene: Scene) -> bool:
        others = self._loaded - gone - {name}
        return (self._max_loaded is None or len(others) < self._max_loaded) and scene.has_room(name, gone)

    def _make_room(self, name: str, scene: Scene) -> list[Event]:
        """Let models rest that `name` takes the place of, unless some do already."""
        gone = self._gone | self._resting
        if self._fits(name, gone, scene):
            return []  # what it needs is on its way
        idle = self._idle(scene)
        if self._fits(name, gone.union(idle), scene):
            return [self._rest(other, f"idle, and {name} is wanted") for other in self._needed(name, idle, scene)]
        if not self._may_fit(name, scene):
            if not self._are_too_many(name, scene) and scene.may_come(name):
                return []
            return [self.fail(name, CapacityError(self._why_never(name, scene)), scene.now_s)]
        busy = self._busy(scene)
        if scene.now_s - self._since_s(name) < PATIENCE_S or not self._fits(name, gone.union(idle, busy), scene):
            return []
        return [self._rest(other, f"{name} has waited") for other in self._needed(name, [*idle, *busy], scene)]

    def _may_fit(self, name: str, scene: Scene) -> bool:
        """Whether a host that is there could have it: else it waits for another one, and is in nobody's way."""
        return self._fits(name, self._gone | self._resting | self._may_go_at_all(scene), scene)

    def _are_too_many(self, name: str, scene: Scene) -> bool:
        """Whether `max_loaded` models are kept beside it."""
        num_kept = len(self._loaded - self._may_go_at_all(scene) - {name})
        return self._max_loaded is not None and num_kept >= self._max_loaded

    def _why_never(self, name: str, scene: Scene) -> str:
        if self._are_too_many(name, scene):
            return f"model {name!r}: max_loaded is {self._max_loaded}, and so many are kept; raise it, or keep fewer"
        return (
            f"model {name!r}: no host has room for it beside what is kept, or may take it; add hosts, or raise their "
            "memory"
        )

    def _may_go_at_all(self, scene: Scene) -> set[str]:
        """All that are loaded, or are to be, but those that are kept; also such as are only being loaded."""
        kept = {name for name, life in self._lives.items() if life.rule.keep and not self._is_hopeless(name, scene)}
        return self._loaded - kept

    def _needed(self, name: str, others: Iterable[str], scene: Scene) -> list[str]:
        """Of `others`, in the order in which they are to go, the first ones that make enough room."""
        kept, gone = list(others), self._gone | self._resting
        needed: list[str] = []
        while kept and not self._fits(name, gone.union(needed), scene):
            needed.append(kept.pop(0))
        for other in reversed(needed[:-1]):  # what lies where `name` cannot go stays
            if self._fits(name, gone.union(needed) - {other}, scene):
                needed.remove(other)
        return needed
