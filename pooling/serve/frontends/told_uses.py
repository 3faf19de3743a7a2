# SPDX-License-Identifier: Apache-2.0
"""What frontends have of models, as their supervisor knows it: who waits for one, and who uses it."""

from __future__ import annotations

import math

from tokenpool.serve.access.holding import Hold
from tokenpool.serve.pool.model_use import ModelUse
from tokenpool.serve.pool.models import Models, PoolModel


class ToldHold(Hold):
    """The requests that wait in all frontends."""

    def __init__(self) -> None:
        Hold.__init__(self)
        self.told: dict[int, ModelUse] = {}
        """By life of the frontend."""

    def __len__(self) -> int:
        """See Hold."""
        return sum(use.num_held for use in self.told.values())

    @property
    def due_by_tenant(self) -> dict[str, float]:
        """See Hold."""
        due: dict[str, float] = {}
        for use in self.told.values():
            for tenant, due_s in use.due_by_tenant.items():
                due[tenant] = min(due_s, due.get(tenant, math.inf))
        return due

    @property
    def since_s(self) -> float:
        """See Hold."""
        return min((use.since_s for use in self.told.values()), default=math.inf)


class ToldUses:
    """Keeps what frontends tell with the models."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def tell(self, life: int, uses: dict[tuple[str, int], ModelUse]) -> None:
        """A frontend tells what it has of some models, by name and number; of the others it has what it had."""
        for (name, number), use in uses.items():
            model = self._models.get(name)
            if model is None or model.number != number or not isinstance(model.app.hold, ToldHold):
                continue
            model.app.hold.told[life] = use
            model.app.last_used_s = max(model.app.last_used_s, use.last_used_s)
            self._count(model, model.app.hold)

    def forget(self, life: int) -> None:
        """A frontend is gone."""
        for model in self._models.values():
            if isinstance(model.app.hold, ToldHold) and model.app.hold.told.pop(life, None) is not None:
                self._count(model, model.app.hold)

    def _count(self, model: PoolModel, hold: ToldHold) -> None:
        model.app.inflight = sum(use.inflight for use in hold.told.values())
        if len(hold):
            model.app.want()
