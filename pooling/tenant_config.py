# SPDX-License-Identifier: Apache-2.0
"""The section `tenants` of a pool file: who may use the pool, by which keys, and how much.

    tenants:
      - name: team-a
        keys: [sha256:9f86d0…, "${TEAM_A_KEY}"]   # as `tokenpool key new` prints them
        requests_per_minute: 600
        tokens_per_minute: 200000

A key is kept as its SHA-256 digest only, from the moment the file is read. Imports neither vllm nor ray.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated

from tokenpool import units
from tokenpool.access_config import MIN_KEY_CHARS, TEXTS, expand_key
from tokenpool.errors import check_setting, config_errors_under, show
from tokenpool.sections import Count, Number, Section, Switch, Text, Written, at_least, between, filled, matching

DEFAULT_TENANT = "default"
"""Whoever comes with a key of `api_key` or `admin_key`. A tenant of this name sets limits for them."""

_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_REFERENCE = re.compile(r"\$\{\w+\}")
_WILDCARDS = frozenset("*?[")


def _read_keys(value: object) -> tuple[bytes, ...]:
    digests = []
    for i, text in enumerate(units.parse_texts(value, "sha256:… as `tokenpool key new` prints it, or ${NAME}")):
        with config_errors_under(f"[{i}]"):
            digests.append(_digest(text))
    check_setting(len(digests) > 0, None, "is empty: add what `tokenpool key new` prints")
    return tuple(digests)


def _digest(text: str) -> bytes:
    # No message shows the text: it may be a key.
    is_reference = _REFERENCE.fullmatch(text) is not None
    key = expand_key(text) if is_reference else text
    if match := _HASH.fullmatch(key):
        return bytes.fromhex(match[1])
    problem = "begins with sha256: but not with 64 lower-case hexadecimal digits behind it: correct it"
    check_setting(not key.startswith("sha256:"), None, problem)
    problem = "is no hash: write what `tokenpool key hash` prints for the key, or ${NAME}, never the key itself"
    check_setting(is_reference, None, problem)
    good = bool(key) and key.isprintable() and key == key.strip()
    check_setting(good, None, f"{text} is empty, unprintable or has spaces at an end: correct the variable")
    problem = f"{text} has {len(key)} characters: give {MIN_KEY_CHARS} or more, `tokenpool key new` makes one"
    check_setting(len(key) >= MIN_KEY_CHARS, None, problem)
    return hashlib.sha256(key.encode()).digest()


def _read_models(value: object) -> tuple[str, ...]:
    return tuple(units.parse_texts(value, "names of models"))


_KEY = {"type": "string", "pattern": rf"^({_HASH.pattern}|\$\{{[A-Za-z_][A-Za-z0-9_]*\}})$"}
_KEYS = Written(_read_keys, "key or keys", {"anyOf": [_KEY, {"type": "array", "items": _KEY}]})
_Models = Annotated[tuple[str, ...], Written(_read_models, "text or texts", TEXTS)]
_Limit = Annotated[Count, at_least(1, "must be 1 or more, or null for no limit")]


@dataclass(frozen=True, slots=True)
class TenantConfig(Section):
    """One tenant."""

    name: Annotated[Text, matching(_NAME, "{} is no tenant name: use letters, digits and . _ - only, 64 at most")]
    """What metrics and `/v1/pool/tenants` call it: letters, digits and . _ - only, 64 at most."""
    keys: Annotated[tuple[bytes, ...], _KEYS] = field(default=(), repr=False)
    """SHA-256 digests of its keys: `sha256:…` or `${NAME}`, one or a list; a key in plain text is refused.
    Every tenant but the one called `default` needs them."""
    priority: Annotated[Count, between(-1000, 1000)] = 0
    """Larger goes first in vLLM's queue of models with `--scheduling-policy priority`; no effect on others."""
    weight: Annotated[Number, between(0.001, 1000)] = 1.0
    """Its share of a model while others wait for it too, 0.001 to 1000: a tenant of weight 2 gets twice the tokens."""
    requests_per_minute: _Limit | None = None
    """Sequences per minute, bursts of as many included, counted when they come: prompts times `n`. none = no limit."""
    tokens_per_minute: _Limit | None = None
    """Tokens per minute, of prompts and put out; none = no limit."""
    max_concurrent: _Limit | None = None
    """Sequences at the same time, waiting or running; none = no limit."""
    max_sequences_per_request: _Limit | None = 64
    """Sequences that one request may ask for, which is its prompts times `n`; `null` = as many as vLLM takes."""
    share_cache: Switch | None = None
    """Whether its requests share the prefix cache with those of others who do; none = as the pool's `share_cache`."""
    models: Annotated[_Models, filled("is empty: list models, or remove the key to allow all")] | None = None
    """Models it may use, by their names in the pool or patterns such as `team-a/*`; adapters count as their
    model. none = all."""

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        needs_keys = self.name != DEFAULT_TENANT
        problem = "is missing: add what `tokenpool key new` prints"
        check_setting(bool(self.keys) or not needs_keys, "keys", problem)
        problem = f"the tenant {DEFAULT_TENANT!r} has the keys of api_key and admin_key: remove its keys, or rename it"
        check_setting(not self.keys or needs_keys, "keys", problem)

    def may_use(self, model: str) -> bool:
        """Tell whether a model, by its name in the pool, is open to the tenant."""
        return self.models is None or any(fnmatchcase(model, pattern) for pattern in self.models)


def hash_key(key: str) -> str:
    """Return a key as the pool file holds it: ``sha256:`` and 64 hexadecimal digits."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def check_tenants(tenants: Sequence[TenantConfig], models: Iterable[str], plain_keys: Iterable[str]) -> None:
    """Refuse what two tenants claim, keys that are the pool's own, and models that are not there."""
    models = list(models)
    names: dict[str, int] = {}
    owners = {hashlib.sha256(key.encode()).digest(): "api_key or admin_key" for key in plain_keys}
    for i, tenant in enumerate(tenants):
        first = names.setdefault(tenant.name, i)
        problem = f"{tenant.name!r} is the name of tenants[{first}] already: give each tenant its own"
        check_setting(first == i, f"tenants[{i}].name", problem)
        for j, digest in enumerate(tenant.keys):
            owner = owners.setdefault(digest, f"tenants[{i}].keys[{j}]")
            problem = f"this key is in {owner} already: a key belongs to one tenant"
            check_setting(owner == f"tenants[{i}].keys[{j}]", f"tenants[{i}].keys[{j}]", problem)
        for j, pattern in enumerate(tenant.models or ()):
            known = pattern in models or not _WILDCARDS.isdisjoint(pattern)  # a pattern may be for later models
            near = difflib.get_close_matches(pattern, models, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"models: {', '.join(models)}"
            check_setting(known, f"tenants[{i}].models[{j}]", f"no model {show(pattern)} in the pool, {hint}")
