# SPDX-License-Identifier: Apache-2.0
"""The tenants' limits that the frontends of one node keep together: a file in memory that each of them maps.

What a bucket holds lies there, and how many sequences each frontend has of each tenant. A lock on the file, which the
kernel opens when its holder dies, makes one frontend at a time look and take. Times are those of the monotonic clock,
which all processes of a machine share. Taking a token costs some microseconds. Imports no vLLM.

A holder that is stopped keeps the lock, so nobody waits long for it: the others go on without. What two of them write
at the same moment may then count once instead of twice, so that tenants get a little more than their limits.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from tokenpool.policy.leases import Lease
from tokenpool.policy.rate_limit import LEAST_SHARE, TokenBucket
from tokenpool.tenant_config import TenantConfig

logger = logging.getLogger(__name__)

_LOCK_LIMIT_S, _LOCK_LOOK_S = 0.02, 0.0002
"""How long an event loop stands still at most for the lock, and between two tries."""
_STUCK_S = 1.0
"""How long, after the lock did not come, it is only tried once each time."""
_BUCKET = struct.Struct("dd")
_COUNT = struct.Struct("q")
_LEASE = struct.Struct("dq")
_NO_SLOTS = -1
"""Where the limits are this server's alone."""
KINDS = ("requests", "tokens")


class SharedLimits:
    """The table, as one process sees it; for one thread."""

    def __init__(self, path: str, num_frontends: int) -> None:
        """Map the table that `create` made for as many frontends."""
        self._num_frontends = num_frontends
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._map = mmap.mmap(self._file, 0)
        self._depth = 0
        self._holds = False
        self._stuck_until_s = 0.0

    @classmethod
    def create(
        cls, path: str, tenants: Sequence[TenantConfig], num_frontends: int, *, is_leased: bool = False
    ) -> SharedLimits:
        """Make the table at `path`, which must be new, with all buckets full and no sequences.

        With `is_leased` other servers keep parts of the limits, and this one has none before `set_leases`.
        """
        now_s = time.monotonic()
        with open(path, "xb") as file:
            for tenant in tenants:
                for limit in (tenant.requests_per_minute, tenant.tokens_per_minute):
                    level = 0.0 if is_leased else TokenBucket(limit or 1, now_s=now_s).capacity
                    file.write(_BUCKET.pack(level, now_s))
                file.write(_LEASE.pack(0.0, 0) if is_leased else _LEASE.pack(1.0, _NO_SLOTS))
                file.write(bytes(_COUNT.size * num_frontends))
        return cls(path, num_frontends)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else reads or writes meanwhile, unless the lock does not come; may be entered again inside."""
        if not self._depth:
            self._holds = self._lock()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth and self._holds:
                fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _lock(self) -> bool:
        now_s = time.monotonic()
        limit_s = now_s + (_LOCK_LIMIT_S if now_s > self._stuck_until_s else 0.0)
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except (BlockingIOError, PermissionError):  # both mean that somebody else has it
                if (now_s := time.monotonic()) >= limit_s:
                    break
            time.sleep(_LOCK_LOOK_S)
        if now_s > self._stuck_until_s:
            logger.warning("a process keeps the lock of the tenants' limits: they are kept without it")
            self._stuck_until_s = now_s + _STUCK_S
        return False

    def read(self, tenant: int, kind: str) -> tuple[float, float]:
        """A bucket's level and the time of it."""
        return _BUCKET.unpack_from(self._map, self._bucket_at(tenant, kind))

    def write(self, tenant: int, kind: str, level: float, as_of_s: float) -> None:
        """Set both."""
        _BUCKET.pack_into(self._map, self._bucket_at(tenant, kind), level, as_of_s)

    def lease(self, tenant: int) -> Lease | None:
        """This server's part of a tenant's limits; None where it has them alone."""
        share, slots = _LEASE.unpack_from(self._map, self._lease_at(tenant))
        return None if slots == _NO_SLOTS else Lease(share, slots)

    def set_lease(self, tenant: int, lease: Lease, per_minute: Mapping[str, int | None]) -> None:
        """Keep to this part of a tenant's limits, which are `per_minute` by kind."""
        with self.locked():
            for kind in (kind for kind in KINDS if per_minute[kind] is not None):
                bucket = SharedBucket(self, tenant, kind, per_minute[kind] or 1)
                bucket.set_share(time.monotonic(), max(lease.share, LEAST_SHARE), lease.fill)
            _LEASE.pack_into(self._map, self._lease_at(tenant), lease.share, lease.slots)

    def sequences(self, tenant: int) -> int:
        """Sequences that a tenant has at all frontends."""
        return sum(_COUNT.unpack_from(self._map, self._count_at(tenant, i))[0] for i in range(self._num_frontends))

    def set_sequences(self, tenant: int, frontend: int, count: int) -> None:
        """Say how many of them one frontend has."""
        _COUNT.pack_into(self._map, self._count_at(tenant, frontend), count)

    def forget(self, frontend: int) -> None:
        """A frontend is gone, and its sequences with it."""
        with self.locked():
            for tenant in range(len(self._map) // self._row_bytes):
                self.set_sequences(tenant, frontend, 0)

    @property
    def _row_bytes(self) -> int:
        return len(KINDS) * _BUCKET.size + _LEASE.size + self._num_frontends * _COUNT.size

    def _bucket_at(self, tenant: int, kind: str) -> int:
        return tenant * self._row_bytes + KINDS.index(kind) * _BUCKET.size

    def _count_at(self, tenant: int, frontend: int) -> int:
        return self._lease_at(tenant) + _LEASE.size + frontend * _COUNT.size

    def _lease_at(self, tenant: int) -> int:
        return tenant * self._row_bytes + len(KINDS) * _BUCKET.size


class TenantRow:
    """One tenant's row of the table, for the frontend with the given index."""

    def __init__(self, limits: SharedLimits, tenant: int, frontend: int) -> None:
        self.limits = limits
        self._tenant = tenant
        self._frontend = frontend

    @property
    def lease(self) -> Lease | None:
        """See SharedLimits."""
        return self.limits.lease(self._tenant)

    def bucket(self, kind: str, per_minute: float) -> SharedBucket:
        """The bucket of `requests` or `tokens`."""
        return SharedBucket(self.limits, self._tenant, kind, per_minute)

    def note_sequences(self, own: int) -> int:
        """Say how many sequences this frontend has; returns how many all have."""
        with self.limits.locked():
            self.limits.set_sequences(self._tenant, self._frontend, own)
            return self.limits.sequences(self._tenant)


class SharedBucket(TokenBucket):
    """A bucket whose level lies in the table."""

    __slots__ = ("_kind", "_limits", "_tenant")

    def __init__(self, limits: SharedLimits, tenant: int, kind: str, per_minute: float) -> None:
        super().__init__(per_minute, now_s=0.0)
        self._limits, self._tenant, self._kind = limits, tenant, kind

    def level(self, now_s: float) -> float:
        """See TokenBucket."""
        with self._limits.locked():
            lease = self._limits.lease(self._tenant)
            self._share = max(lease.share, LEAST_SHARE) if lease is not None else 1.0
            self._level, self._as_of_s = self._limits.read(self._tenant, self._kind)
            level = super().level(now_s)
            self._limits.write(self._tenant, self._kind, level, self._as_of_s)
            return level

    def take(self, now_s: float, amount: float) -> None:
        """See TokenBucket."""
        with self._limits.locked():
            super().take(now_s, amount)
            self._limits.write(self._tenant, self._kind, self._level, self._as_of_s)

    def set_share(self, now_s: float, share: float, fill: float = 0.0) -> None:
        """See TokenBucket; the table's lease has to say the same."""
        with self._limits.locked():
            super().set_share(now_s, share, fill)
            self._limits.write(self._tenant, self._kind, self._level, self._as_of_s)
