# SPDX-License-Identifier: Apache-2.0
"""What each tenant uses and may use: limits on its requests and tokens, and the counts of both.

A request is counted when it comes, its prompt when vLLM has tokenized it, and a token put out when the frontend gets it
from the engine, by `tenant_meter`. All of it lives on the event loop's thread. Imports no vLLM.
"""

from __future__ import annotations

import math
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, Literal

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import Message, Scope

from tokenpool.policy.fairness import token_cost
from tokenpool.policy.rate_limit import TokenBucket
from tokenpool.serve.auth import error_response
from tokenpool.serve.shared_limits import SharedLimits, TenantRow
from tokenpool.tenant_config import DEFAULT_TENANT, TenantConfig

Reason = Literal["models", "requests_per_minute", "tokens_per_minute", "max_concurrent", "queue", "host_deaths"]
"""Why a request was refused: the limit of that name, the model's own queue, or deaths of hosts (`blamed_tenants`)."""

_LONGEST_RETRY_S = 60
_BYTES_PER_TOKEN = 4
_MEAN_WEIGHT = 0.2

CURRENT_CALL: ContextVar[Call | None] = ContextVar("tokenpool_call", default=None)
"""The call that the running task works for; tasks that it starts have it too."""


@dataclass(slots=True)
class Usage:
    """What a tenant has used of one model since the start."""

    requests: int = 0
    """Requests taken in."""
    prompt_tokens: int = 0
    """Tokens of their prompts, cached ones included."""
    completion_tokens: int = 0
    """Tokens put out."""


class Call:
    """One request of a tenant, from when it is taken in until neither its client nor an engine is busy with it."""

    def __init__(self, account: Account, model: str, reserved_tokens: float) -> None:
        self.account = account
        self.model = model
        """Name of the model in the pool."""
        self.held_s = 0.0
        """How long it was held back before it went to the engine."""
        self.cost = 0.0
        """The service it has had; see `policy.fairness`."""
        self.has_begun = False
        """Whether it waits no longer: it has a token, or is over."""
        self.on_begun: Callable[[], None] = lambda: None
        """Called once, when it waits no longer."""
        self.on_end: Callable[[], None] = lambda: None
        """Called once, when its HTTP request is over."""
        self.prompt_tokens = 0
        """Tokens of its prompts so far."""
        self.ended_s = math.inf
        """When its HTTP request ended, on the monotonic clock."""
        self._reserved_tokens = reserved_tokens
        self._started_s = time.monotonic()
        self._engine_requests: list[tuple[str, weakref.ref[Any]]] = []

    def add_engine_request(self, request_id: str, prompt_tokens: int, processor: Any) -> None:
        """An engine gets a request for this call; `processor` is the OutputProcessor that has its state."""
        self._give_back_reserve()
        self._engine_requests.append((request_id, weakref.ref(processor)))
        self.prompt_tokens += prompt_tokens
        self.account.usage[self.model].prompt_tokens += prompt_tokens
        self._charge(prompt_tokens, 0)

    def put_out(self, num_tokens: int) -> None:
        """Tokens, or an embedding, have come from the engine."""
        self.account.usage[self.model].completion_tokens += num_tokens
        self._charge(0, num_tokens)
        self._begin()

    def close(self) -> None:
        """Its HTTP request is over."""
        self._give_back_reserve()
        self._begin()
        self.ended_s = time.monotonic()
        self.account.call_ended(self, self.ended_s - self._started_s)
        self.on_end()

    @property
    def is_over(self) -> bool:
        """Whether its HTTP request has ended and no engine works for it, as for `background` responses."""
        return self.ended_s < math.inf and not any(
            (processor := ref()) is not None and request_id in processor.request_states
            for request_id, ref in self._engine_requests
        )

    def dress(self, message: Message) -> None:
        """Put the limits and what is left of them into the headers of the answer."""
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in self.account.limit_headers().items():
                headers[name] = value

    def _begin(self) -> None:
        if not self.has_begun:
            self.has_begun = True
            self.on_begun()

    def _charge(self, prompt_tokens: int, completion_tokens: int) -> None:
        self.cost += token_cost(prompt_tokens, completion_tokens)
        if bucket := self.account.token_bucket:
            bucket.take(time.monotonic(), prompt_tokens + completion_tokens)

    def _give_back_reserve(self) -> None:
        reserved, self._reserved_tokens = self._reserved_tokens, 0.0
        if reserved and (bucket := self.account.token_bucket):
            bucket.take(time.monotonic(), -reserved)


class Account:
    """One tenant's limits, calls and usage."""

    def __init__(self, config: TenantConfig, row: TenantRow | None = None) -> None:
        """`row` is where several frontends keep the limits together."""
        self.config = config
        self._row = row
        self.request_bucket = _bucket("requests", config.requests_per_minute, row)
        self.token_bucket = _bucket("tokens", config.tokens_per_minute, row)
        self.usage: dict[str, Usage] = {}
        """By model."""
        self.refused: Counter[tuple[str, Reason]] = Counter()
        """Requests not taken in, by model and reason."""
        self._calls: set[Call] = set()  # whose HTTP requests go on
        self._lingering: list[Call] = []  # for which an engine works behind the client's back
        self._share = 1.0
        self._mean_prompt_tokens = math.inf
        self._mean_call_s = 1.0

    @property
    def num_calls(self) -> int:
        """Calls of this frontend that are not over."""
        self._lingering = [call for call in self._lingering if not call.is_over]
        return len(self._calls) + len(self._lingering)

    def count_calls(self) -> int:
        """Calls that are not over, at all frontends that keep the limits together, which learn of the own ones."""
        return self.num_calls if self._row is None else self._row.note_calls(self.num_calls)

    def exclusive(self) -> AbstractContextManager[None]:
        """From `refusal` to `begin` no other frontend may take a request in."""
        return nullcontext() if self._row is None else self._row.limits.locked()

    def set_share(self, share: float) -> None:
        """Keep this part, above 0 to 1, of each limit; other frontends keep the rest."""
        self._share = share
        for bucket in filter(None, (self.request_bucket, self.token_bucket)):
            bucket.set_share(time.monotonic(), share)

    def refusal(self, scope: Scope, model: str, being_read: int | None = None) -> Response | None:
        """The answer that refuses a request by a limit, counted; None if no limit is in the way.

        Before the body is read, `being_read` is how many others of the tenant are, which count as calls, and `model`
        may be empty: nobody knows it.
        """
        if being_read is None and not _is_limited(scope):
            return None
        now_s = time.monotonic()
        if limit := self.config.max_concurrent:
            limit = max(1, math.floor(limit * self._share))
            if (count := self.count_calls() + (being_read or 0)) >= limit:
                return self._over_limit(model, "max_concurrent", self._mean_call_s / count)
        if self.token_bucket and (wait_s := self.token_bucket.ready_in_s(now_s)):
            return self._over_limit(model, "tokens_per_minute", wait_s)
        if self.request_bucket and (wait_s := self.request_bucket.ready_in_s(now_s)):
            return self._over_limit(model, "requests_per_minute", wait_s)
        return None

    def begin(self, scope: Scope, model: str, body_bytes: int) -> Call:
        """Take a request in. Until its prompt is tokenized, tokens are set aside for it, by what others had."""
        usage = self.usage.setdefault(model, Usage())
        reserved = 0.0
        if _is_limited(scope):
            usage.requests += 1
            now_s = time.monotonic()
            if self.request_bucket:
                self.request_bucket.take(now_s, 1)
            if self.token_bucket:
                reserved = min(body_bytes / _BYTES_PER_TOKEN, self._mean_prompt_tokens)
                self.token_bucket.take(now_s, reserved)
        call = Call(self, model, reserved)
        self._calls.add(call)
        self.count_calls()
        return call

    def call_ended(self, call: Call, seconds: float) -> None:
        """A call's HTTP request is over."""
        self._calls.discard(call)
        self._lingering.append(call)
        self.count_calls()
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
        limits = ("requests_per_minute", "tokens_per_minute", "max_concurrent")
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
            "share": self._share,
            "remaining": {name: math.floor(bucket.level(now_s)) for name, bucket in buckets.items() if bucket},
            "inflight": self.num_calls,
            "usage": {model: asdict(usage) for model, usage in self.usage.items()},
            "refused": refused,
        }

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

    def __init__(self, tenants: Iterable[TenantConfig], limits: SharedLimits | None = None, frontend: int = 0) -> None:
        """`limits` is the table of several frontends, made for `with_default(tenants)`; this one has the index given.
        """
        self._accounts = {
            tenant.name: Account(tenant, TenantRow(limits, i, frontend) if limits is not None else None)
            for i, tenant in enumerate(with_default(tenants))
        }
        self.default = self._accounts[DEFAULT_TENANT]
        """Of whoever comes with a key of `api_key` or `admin_key`."""

    @property
    def accounts(self) -> Mapping[str, Account]:
        """By tenant's name."""
        return self._accounts

    def auth_options(self) -> dict[str, Any]:
        """What `ApiKeyAuth` has to know of the tenants."""
        accounts = self._accounts.values()
        keys = [(digest, account) for account in accounts for digest in account.config.keys]
        return {"tenant_keys": keys, "default_tenant": self.default}

    def count_calls(self) -> None:
        """Let the other frontends know of calls that ended behind their client's back."""
        for account in self._accounts.values():
            account.count_calls()

    def weight_of(self, tenant: str) -> float:
        """A tenant's share of a busy model."""
        return self._accounts[tenant].config.weight

    def set_share(self, share: float) -> None:
        """Keep this part, above 0 to 1, of every limit, where several frontends share them."""
        for account in self._accounts.values():
            account.set_share(share)

    def report(self, lines: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """All accounts' reports by name; with the models' `TenantLine`s, also how many requests each has held there."""
        reports = {name: account.report() for name, account in self._accounts.items()}
        for name, report in reports.items() if lines is not None else ():
            report["held"] = {model: line.num_held(name) for model, line in lines.items() if line is not None}
        return reports


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
