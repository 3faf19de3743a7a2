# SPDX-License-Identifier: Apache-2.0
"""The models that a pool is to serve, and those that are on their way out. Plain Python: no Ray, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, field, replace

from tokenpool.cluster.values import Deployment
from tokenpool.errors import ConfigError

_DRAIN_MARGIN_S = 10.0
"""What servers may take beyond the limit of a drain to say that they have done it; one that hangs never does."""


@dataclass(slots=True)
class _Retiring:
    drain_s: float
    due_s: float
    drained_by: set[str] = field(default_factory=set)


class Wishes(dict[str, Deployment]):
    """What is wanted, by name. Changed by its methods only."""

    def __init__(self, deployments: Iterable[Deployment] = (), revision: int = 0) -> None:
        super().__init__({deployment.name: deployment for deployment in deployments})
        self.revision = max([revision, *(deployment.version for deployment in self.values())])
        """Grows with every change."""
        self._retiring: dict[str, _Retiring] = {}

    @property
    def retiring(self) -> dict[str, float]:
        """Models that are being drained, with the seconds that their requests may take."""
        return {name: retiring.drain_s for name, retiring in self._retiring.items()}

    @property
    def kept(self) -> list[Deployment]:
        """Those that the next controller is to want, too."""
        return [deployment for name, deployment in self.items() if name not in self._retiring]

    def deploy(self, deployment: Deployment) -> Deployment:
        """Want one more model; returns it with its version. Asked twice for the same one it is there already.

        Raises ConfigError if the name is taken.
        """
        there = self.get(deployment.name)
        if there is not None and (there.origin != deployment.origin or deployment.name in self._retiring):
            raise ConfigError(f"model {deployment.name!r} is in the pool already: choose another name", key="name")
        if there is None:
            self.revision += 1
            there = self[deployment.name] = replace(deployment, version=self.revision)
        return there

    def equip(self, name: str, payload: bytes) -> None:
        """What hosts need of a model has been made; it is the same model as before."""
        self[name] = replace(self[name], payload=payload)

    def retire(self, name: str, drain_s: float, now_s: float) -> bool:
        """Drain a model at all servers, then want it no longer; returns False if it is not wanted."""
        if name in self and name not in self._retiring:
            self._retiring[name] = _Retiring(drain_s, now_s + drain_s + _DRAIN_MARGIN_S)
        return name in self

    def drained(self, name: str, server: str) -> None:
        """A server has no more requests of a model that is being drained, and takes none."""
        if name in self._retiring:
            self._retiring[name].drained_by.add(server)

    def finished(self, servers: Set[str], now_s: float) -> list[str]:
        """Models that all servers have drained, or had long enough for."""
        return [name for name, one in self._retiring.items() if servers <= one.drained_by or now_s > one.due_s]

    def withdraw(self, name: str) -> bool:
        """Want a model no longer; returns whether it was wanted."""
        self._retiring.pop(name, None)
        if self.pop(name, None) is None:
            return False
        self.revision += 1
        return True
