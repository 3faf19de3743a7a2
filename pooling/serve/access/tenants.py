# SPDX-License-Identifier: Apache-2.0
"""What each tenant uses and may use: limits on its requests and tokens, and the counts of both.

A request is counted when it comes, its prompt when vLLM has tokenized it, and a token put out when the frontend gets it
from the engine, by `tenant_meter`. All of it lives on the event loop's thread. Imports no vLLM.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

from starlette.responses import Response
from starlette.types import Scope

from tokenpool.config import PoolConfig
from tokenpool.policy.leases import Lease
from tokenpool.policy.rate_limit import LEAST_SHARE, TokenBucket
from tokenpool.serve.access.auth import error_response
from tokenpool.serve.access.shared_limits import SharedLimits, TenantRow
from tokenpool.serve.access.tenant_call import Call
from tokenpool.tenant_config import DEFAULT_TENANT, TenantConfig

Reason = Literal[
    "models",
    "requests_per_minute",
    "tokens_per_minute",
    "max_concurrent",
    "max_sequences_per_request",
    "queue",
    "host_deaths",
]
"""Why a request was refused: the limit of that name, the model's own queue, or deaths of hosts (`blamed_tenants`)."""

_LONGEST_RETRY_S = 60
_BYTES_PER_TOKEN = 4
_MEAN_WEIGHT = 0.2
_LONGEST_NAP_S = 1.0


@dataclass(slots=True)
class Usage:
    """What a tenant has used of one model since the start."""

    requests: int = 0
    """Requests taken in."""
    sequences: int = 0
    """Sequences that they asked for: prompts times `n`."""
    prompt_tokens: int = 0
    """Tokens of their prompts, cached ones included."""
    completion_tokens: int = 0
    """Tokens put out."""


class Account:
    """One tenant's limits, calls and usage."""

    def __init__(self, config: TenantConfig, row: TenantRow | None = None, *, share_cache: bool = False) -> None:
        """`row` is where several frontends keep the limits together; `share_cache` is the pool's setting."""
        self.config = config
        self._shares_cache = share_cache if config.share_cache is None else config.share_cache
        self._row = row
        self.request_bucket = _bucket("requests", config.requests_per_minute, row)
        self.token_bucket = _bucket("tokens", config.tokens_per_minute, row)
        self.usage: dict[str, Usage] = {}
        """By model."""
        self.refused: Counter[tuple[str, Reason]] = Counter()
        """Requests not taken in, by model and reason."""
        self._calls: set[Call] = set()  # whose HTTP requests go on
        self._num_open = 0  # their sequences
        self._lingering: set[Call] = set()  # for which an engine works behind the client's back
        self._lease: Lease | None = None
        self._mean_prompt_tokens = math.inf
        self._mean_call_s = 1.0

    @property
    def num_sequences(self) -> int:
        """Sequences of this frontend's calls that are not over."""
        left = {call: call.num_left for call in self._lingering}
        self._lingering = {call for call, count in left.items() if count}
        return self._num_open + sum(left.values())

    def count_sequences(self) -> int:
        """Sequences that are not over, at all frontends that keep the limits together, which learn of the own ones."""
        own = self.num_sequences
        return own if self._row is None else self._row.note_sequences(own)

    def sequences_by_model(self) -> dict[str, int]:
        """The same of this frontend alone, by model."""
        counts: Counter[str] = Counter()
        for call in self._calls:
            counts[call.model] += call.sequences
        for call in self._lingering:
            counts[call.model] += call.num_left
        return dict(counts)

    def salted(self, cache_salt: str | None) -> str | None:
        """The salt of a request's prefix cache; what it is for one tenant it is for no other, whatever clients give.

        Tenants that share the cache have a common one; no name of a tenant is empty or has a slash.
        """
        if self._shares_cache:
            return f"/{cache_salt}" if cache_salt else None
        return f"{self.config.name}/{cache_salt or ''}"

    def exclusive(self) -> AbstractContextManager[None]:
        """From `refusal` to `begin` no other frontend may take a request in."""
        return nullcontext() if self._row is None else self._row.limits.locked()

    @property
    def lease(self) -> Lease | None:
        """This server's part of the limits; None where there is no other server."""
        return self._lease if self._row is None else self._row.lease

    def set_lease(self, lease: Lease) -> None:
        """Keep to this part of the limits; other servers of the pool keep the rest."""
        self._lease = lease
        for bucket in filter(None, (self.request_bucket, self.token_bucket)):
            bucket.set_share(time.monotonic(), max(lease.share, LEAST_SHARE), lease.fill)

    def refusal(
        self, scope: Scope, model: str, sequences: int = 1, *, being_read: int | None = None
    ) -> Response | None:
        """The answer that refuses a request of so many sequences, counted; None if no limit is in the way.

        Before the body is read, `being_read` is how many others of the tenant are, which count as calls, and `model`
        may be empty: nobody knows it.
        """
        if being_read is None and not _is_limited(scope):
            return None
        reason: Reason
        for reason in ("max_sequences_per_request", "max_concurrent"):
            most = getattr(self.config, reason)
            if most is not None and sequences > most:
                return self._too_many(model, reason, sequences)
        now_s = time.monotonic()
        if limit := self.config.max_concurrent:
            limit = limit if self.lease is None else self.lease.slots
            count = self.count_sequences() + (being_read or 0)
            if (count or not limit) and count + sequences > limit:
                return self._over_limit(model, "max_concurrent", self._mean_call_s / max(1, count))
        if self.token_bucket and (wait_s := self.token_bucket.ready_in_s(now_s)):
            return self._over_limit(model, "tokens_per_minute", wait_s)
        if self.request_bucket and (wait_s := self.request_bucket.ready_in_s(now_s)):
            return self._over_limit(model, "requests_per_minute", wait_s)
        return None

    def begin(self, scope: Scope, model: str, body_bytes: int, sequences: int = 1) -> Call:
        """Take a request in. Until its prompt is tokenized, tokens are set aside for it, by what others had."""
        usage = self.usage.setdefault(model, Usage())
        reserved = 0.0
        if _is_limited(scope):
            usage.requests += 1
            usage.sequences += sequences
            now_s = time.monotonic()
            if self.request_bucket:
                self.request_bucket.take(now_s, sequences)
            if self.token_bucket:
                reserved = min(body_bytes / _BYTES_PER_TOKEN, self._mean_prompt_tokens)
                self.token_bucket.take(now_s, reserved)
        call = Call(self, model, reserved, sequences)
        call.is_paced = scope["type"] == "websocket"
        self._calls.add(call)
        self._num_open += sequences
        self.count_sequences()
        return call

    def sequence_added(self, call: Call, num_live: int) -> None:
        """A call has got one more sequence; those that its body did not tell of count from now on."""
        if call not in self._calls:
            self._lingering.add(call)  # its HTTP request had ended
        elif num_live > call.sequences:
            more, call.sequences = num_live - call.sequences, num_live
            self._num_open += more
            self.usage[call.model].sequences += more
            if self.request_bucket and not call.is_paced:  # `pace` takes each
                self.request_bucket.take(time.monotonic(), more)

    async def pace(self, *, is_new: bool) -> None:
        """Wait until the limits per minute let one more sequence of a call pass, or more input of one if not new."""
        buckets = [self.token_bucket, self.request_bucket if is_new else None]
        while wait_s := max((b.ready_in_s(time.monotonic()) for b in buckets if b is not None), default=0.0):
            await asyncio.sleep(min(wait_s, _LONGEST_NAP_S))
        if is_new and self.request_bucket:
            self.request_bucket.take(time.monotonic(), 1)

    def call_ended(self, call: Call, seconds: float) -> None:
        """A call's HTTP request is over."""
        if call in self._calls:
            self._calls.discard(call)
            self._num_open -= call.sequences
        self._lingering.add(call)
        self.count_sequences()
        self._mean_call_s += _MEAN_WEIGHT * (seconds - self._mean_call_s)
        if call.prompt_tokens and self._mean_prompt_tokens < math.inf:
            self._mean_prompt_tokens += _MEAN_WEIGHT * (call.prompt_tokens - self._mean_prompt_tokens)
        elif call.prompt_tokens:
            self._mean_prompt_tokens = float(call.prompt_tokens)

    def limit_headers(self) -> dict[str, str]:
        """The limits per minute and what is left of them, by the names that OpenAI's API uses."""
        headers, now_s = {}, time.monotonic()
        for what, bucket in (("requests", self.request_bucket), ("tokens", self.token_bucket)):
            if bucket:
                headers[f"x-ratelimit-limit-{what}"] = f"{bucket.per_minute:.0f}"
                headers[f"x-ratelimit-remaining-{what}"] = f"{max(0, math.floor(bucket.level(now_s)))}"
        return headers

    def report(self) -> dict[str, Any]:
        """Limits, usage and refusals, for people; without keys."""
        config, now_s = self.config, time.monotonic()
        limits = ("requests_per_minute", "tokens_per_minute", "max_concurrent", "max_sequences_per_request")
        buckets = {"requests": self.request_bucket, "tokens": self.token_bucket}
        refused: dict[str, int] = {}
        for (_, reason), count in self.refused.items():
            refused[reason] = refused.get(reason, 0) + count
        return {
            "num_keys": len(config.keys),
            "priority": config.priority,
            "weight": config.weight,
            "models": list(config.models) if config.models is not None else None,
            "limits": {name: getattr(config, name) for name in limits},
            "share": self.lease.share if self.lease is not None else 1.0,
            "fill": min((bucket.fill for bucket in buckets.values() if bucket), default=1.0),
            "remaining": {name: math.floor(bucket.level(now_s)) for name, bucket in buckets.items() if bucket},
            "inflight": self.num_sequences,
            "usage": {model: asdict(usage) for model, usage in self.usage.items()},
            "refused": refused,
        }

    def _too_many(self, model: str, reason: Reason, sequences: int) -> Response:
        self.refused[model, reason] += 1
        name, limit = self.config.name, getattr(self.config, reason)
        message = (
            f"The request asks for {sequences} sequences, prompts times n; the limit {reason} of the tenant {name} is "
            f"{limit}: split it."
        )
        return error_response(400, "BadRequestError", message, reason)

    def _over_limit(self, model: str, reason: Reason, wait_s: float) -> Response:
        self.refused[model, reason] += 1
        retry_s = max(1, math.ceil(wait_s))
        if reason == "max_concurrent":  # a guess: there is no telling when one of the calls ends
            retry_s = min(retry_s, _LONGEST_RETRY_S)
        name, limit = self.config.name, getattr(self.config, reason)
        message = f"The limit {reason} of the tenant {name}, {limit}, is reached; retry after {retry_s} s."
        headers = {"retry-after": str(retry_s), **self.limit_headers()}
        return error_response(429, "RateLimitError", message, reason, headers)


class TenantBook:
    """The accounts of all tenants, with the one of the pool's own keys."""

    def __init__(
        self,
        tenants: Iterable[TenantConfig],
        limits: SharedLimits | None = None,
        frontend: int = 0,
        *,
        share_cache: bool = False,
    ) -> None:
        """`limits` is the table of several frontends, made for `with_default(tenants)`; this one has that index."""
        self._accounts = {}
        for i, tenant in enumerate(with_default(tenants)):
            row = TenantRow(limits, i, frontend) if limits is not None else None
            self._accounts[tenant.name] = Account(tenant, row, share_cache=share_cache)
        self.default = self._accounts[DEFAULT_TENANT]
        """Of whoever comes with a key of `api_key` or `admin_key`."""

    @classmethod
    def of(cls, config: PoolConfig, limits: SharedLimits | None, frontend: int) -> TenantBook | None:
        """The book of a pool, None without tenants; the rest as above."""
        return cls(config.tenants, limits, frontend, share_cache=config.share_cache) if config.tenants else None

    @property
    def accounts(self) -> Mapping[str, Account]:
        """By tenant's name."""
        return self._accounts

    def auth_options(self) -> dict[str, Any]:
        """What `ApiKeyAuth` has to know of the tenants."""
        accounts = self._accounts.values()
        keys = [(digest, account) for account in accounts for digest in account.config.keys]
        return {"tenant_keys": keys, "default_tenant": self.default}

    def count_sequences(self) -> None:
        """Let the other frontends know of sequences that ended behind their client's back."""
        for account in self._accounts.values():
            account.count_sequences()

    def weight_of(self, tenant: str) -> float:
        """A tenant's share of a busy model."""
        return self._accounts[tenant].config.weight

    def set_leases(self, leases: Mapping[str, Lease]) -> None:
        """Keep to these parts of tenants' limits, where several servers share them."""
        for name, lease in leases.items():
            self._accounts[name].set_lease(lease)

    def report(self, lines: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """All accounts' reports by name; with the models' `TenantLine`s, also how many requests each has held there."""
        reports = {name: account.report() for name, account in self._accounts.items()}
        if lines is not None:
            for name, report in reports.items():
                report["held"] = {model: line.num_held(name) for model, line in lines.items() if line is not None}
        return reports


def tenants_of(config: PoolConfig) -> list[TenantConfig]:
    """Those that a pool keeps accounts of; none in a pool without tenants."""
    return with_default(config.tenants) if config.tenants else []


def with_default(tenants: Iterable[TenantConfig]) -> list[TenantConfig]:
    """The tenants, and the one of the pool's own keys if it is not among them."""
    known = {tenant.name: tenant for tenant in tenants}
    known.setdefault(DEFAULT_TENANT, TenantConfig(DEFAULT_TENANT))
    return list(known.values())


def _bucket(kind: str, per_minute: int | None, row: TenantRow | None) -> TokenBucket | None:
    if per_minute is None:
        return None
    return TokenBucket(per_minute, now_s=time.monotonic()) if row is None else row.bucket(kind, per_minute)


def _is_limited(scope: Scope) -> bool:
    """Only what can make an engine work is: POST requests and websockets."""
    return scope["type"] == "websocket" or scope["method"] == "POST"
