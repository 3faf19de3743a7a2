# SPDX-License-Identifier: Apache-2.0
"""The environment variables: what each gives, and who gets them."""

from __future__ import annotations

import pytest

from tokenpool import settings
from tokenpool.access_config import expand_key
from tokenpool.errors import ConfigError

pytestmark = pytest.mark.cpu


def test_a_variable_has_its_type(monkeypatch):
    """It is read when it is asked for; None where it is not set."""
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert settings.CPU_KV_BYTES.get() is None
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert 4 << 30 == settings.CPU_KV_BYTES.get()


def test_a_wrong_value_names_the_variable(monkeypatch):
    """In one line, with what it must be."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4GiB")
    with pytest.raises(ConfigError, match="^VLLM_CPU_KVCACHE_SPACE: '4GiB' is no whole number of GiB$"):
        settings.CPU_KV_BYTES.get()


def test_a_taken_variable_is_gone(monkeypatch):
    """Neither children nor libraries find it."""
    monkeypatch.setenv("TOKENPOOL_CONTROL_KEY", "00ff")

    assert (b"\0\xff", None) == (settings.CONTROL_KEY.take(), settings.CONTROL_KEY.get())
    assert "TOKENPOOL_CONTROL_KEY" not in settings.environment()


def test_hosts_get_no_secret(monkeypatch):
    """Neither a variable that is declared to be one, nor one that a key of a pool file names."""
    for name in ("TOKENPOOL_ADMIN_KEY", "RAY_AUTH_TOKEN", "TEAM_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "x-0123456789abcd")
    expand_key("${TEAM_KEY}")

    given = settings.environment_of_hosts()
    assert {"HF_TOKEN"} == {name for name, value in given.items() if value == "x-0123456789abcd"}
