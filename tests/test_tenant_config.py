# SPDX-License-Identifier: Apache-2.0
"""The section `tenants`: keys become digests at once, and each mistake is one line that says what to change."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest

from tokenpool.config import PoolConfig
from tokenpool.errors import ConfigError
from tokenpool.tenant_config import hash_key

pytestmark = pytest.mark.cpu

SECRET = "sk-Very-Secret-77"
MODELS = [{"name": "chat", "model": "x/y"}, {"name": "team-a/code", "model": "x/z"}]
ONE = "one-0123456789ab"
GOOD = {"name": "a", "keys": hash_key(ONE)}


def pool(*tenants: Any, **settings: Any) -> PoolConfig:
    return PoolConfig.from_dict({"models": MODELS, "tenants": list(tenants), **settings})


def test_every_setting_is_read():
    """What is written is what the tenant has; a limit of null is none."""
    (tenant,) = pool(
        {
            "name": "team-a",
            "keys": [hash_key("one"), hash_key("two")],
            "priority": -3,
            "weight": 2.5,
            "requests_per_minute": 60,
            "tokens_per_minute": 1000,
            "max_concurrent": None,
            "models": ["team-a/*", "chat"],
        }
    ).tenants

    assert tuple(hashlib.sha256(key).digest() for key in (b"one", b"two")) == tenant.keys
    assert (-3, 2.5, 60, 1000, None) == (
        tenant.priority, tenant.weight, tenant.requests_per_minute, tenant.tokens_per_minute, tenant.max_concurrent
    )  # fmt: skip
    assert [True, True, False] == [tenant.may_use(name) for name in ("chat", "team-a/code", "team-b/code")]


def test_without_limits_everything_is_open():
    """A tenant with a name and a key has every model and no limit."""
    (tenant,) = pool(GOOD).tenants

    assert (None, None, None) == (tenant.requests_per_minute, tenant.tokens_per_minute, tenant.max_concurrent)
    assert (64, None) == (tenant.max_sequences_per_request, tenant.share_cache)
    assert tenant.may_use("anything")


def test_a_key_from_the_environment_is_hashed_at_once(monkeypatch):
    """Neither the key nor its digest can be printed; a variable may hold the hash as well."""
    monkeypatch.setenv("TEAM_KEY", SECRET)
    plain = pool({"name": "a", "keys": "${TEAM_KEY}"})
    monkeypatch.setenv("TEAM_KEY", hash_key(SECRET))
    hashed = pool({"name": "a", "keys": "${TEAM_KEY}"})

    assert (hashlib.sha256(SECRET.encode()).digest(),) == plain.tenants[0].keys == hashed.tenants[0].keys
    assert SECRET not in repr(plain)
    assert hash_key(SECRET)[7:] not in repr(plain)


@pytest.mark.parametrize(
    ("tenant", "problem"),
    [
        ({"name": "a"}, "tenants[0].keys: is missing"),
        ({"keys": hash_key("x")}, "tenants[0].name: is missing"),
        ({"name": "a", "keys": []}, "tenants[0].keys: is empty"),
        ({"name": "a", "keys": SECRET}, "tenants[0].keys[0]: is no hash: write what `tokenpool key hash` prints"),
        ({"name": "a", "keys": f"sha256:{SECRET}"}, "tenants[0].keys[0]: begins with sha256:"),
        ({"name": "a", "keys": ["x${TEAM_KEY}"]}, "tenants[0].keys[0]: is no hash"),
        ({"name": "a", "keys": "${NOT_SET_AT_ALL}"}, "tenants[0].keys[0]: environment variable NOT_SET_AT_ALL"),
        ({"name": "a", "keys": "${SPACED_KEY}"}, "tenants[0].keys[0]: ${SPACED_KEY} is empty, unprintable"),
        ({"name": "a", "keys": "${SHORT_KEY}"}, "tenants[0].keys[0]: ${SHORT_KEY} has 8 characters: give 16 or more"),
        ({"name": "a", "keys": 5}, "tenants[0].keys: expected a text or a list"),
        ({**GOOD, "name": "a b"}, "tenants[0].name: 'a b' is no tenant name"),
        ({**GOOD, "name": "default"}, "tenants[0].keys: the tenant 'default' has the keys of api_key"),
        ({**GOOD, "requests_per_minut": 1}, "did you mean 'requests_per_minute'?"),
        ({**GOOD, "requests_per_minute": 0}, "tenants[0].requests_per_minute: must be 1 or more, or null"),
        ({**GOOD, "tokens_per_minute": 1.5}, "tenants[0].tokens_per_minute: expected a whole number"),
        ({**GOOD, "max_concurrent": True}, "tenants[0].max_concurrent: expected a whole number"),
        ({**GOOD, "max_sequences_per_request": 0}, "tenants[0].max_sequences_per_request: must be 1 or more, or null"),
        ({**GOOD, "share_cache": "yes"}, "tenants[0].share_cache: expected true or false"),
        ({**GOOD, "weight": 0}, "tenants[0].weight: 0.0 is out of range"),
        ({**GOOD, "weight": "2"}, "tenants[0].weight: expected a number"),
        ({**GOOD, "priority": 10**9}, "tenants[0].priority: 1000000000 is out of range"),
        ({**GOOD, "models": ["chta"]}, "tenants[0].models[0]: no model 'chta' in the pool, did you mean 'chat'?"),
        ({**GOOD, "models": []}, "tenants[0].models: is empty"),
        ("a", "tenants[0]: expected a mapping"),
    ],
)
def test_a_mistake_is_one_line_without_the_key(tenant, problem, monkeypatch):
    """The message names the place and the fix; a key written in plain text is not repeated."""
    monkeypatch.setenv("SPACED_KEY", f"{SECRET} ")
    monkeypatch.setenv("SHORT_KEY", SECRET[:8])
    with pytest.raises(ConfigError) as error:
        pool(tenant)
    message = str(error.value)

    assert problem in message
    assert "\n" not in message
    assert SECRET not in message


@pytest.mark.parametrize(
    ("tenants", "settings", "problem"),
    [
        ([GOOD, {**GOOD, "keys": hash_key("z")}], {}, "tenants[1].name: 'a' is the name of tenants[0] already"),
        ([GOOD, {**GOOD, "name": "b"}], {}, "tenants[1].keys[0]: this key is in tenants[0].keys[0] already"),
        ([GOOD], {"api_key": ONE}, "tenants[0].keys[0]: this key is in api_key or admin_key already"),
        ([GOOD], {"admin_key": ONE}, "tenants[0].keys[0]: this key is in api_key or admin_key already"),
    ],
)
def test_a_key_has_one_owner(tenants, settings, problem):
    """No two tenants share a name or a key, and no tenant has a key of the pool itself."""
    with pytest.raises(ConfigError) as error:
        pool(*tenants, **settings)
    assert problem in str(error.value)


def test_a_key_given_on_the_command_line_is_checked_too():
    """`replace`, by which flags override the file, checks again."""
    with pytest.raises(ConfigError, match="this key is in api_key or admin_key already"):
        replace(pool(GOOD), api_key=(ONE,))


def test_the_default_tenant_has_no_keys():
    """It limits whoever comes with a key of the pool itself."""
    (tenant,) = pool({"name": "default", "requests_per_minute": 5}).tenants

    assert () == tenant.keys
