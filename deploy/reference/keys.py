# SPDX-License-Identifier: Apache-2.0
"""Tables of the pool file's keys, from the declaration that also reads it."""

from __future__ import annotations

from dataclasses import MISSING

from deploy.reference.tables import code, table
from tokenpool.cluster_config import ClusterConfig
from tokenpool.config import SLO, Admission, ModelSpec, PoolConfig, Scheduling
from tokenpool.sections import Key, Section, keys_of, texts_of
from tokenpool.tenant_config import TenantConfig

SECTIONS: dict[str, type[Section]] = {
    "the pool": PoolConfig,
    "models": ModelSpec,
    "slo": SLO,
    "admission": Admission,
    "scheduling": Scheduling,
    "tenants": TenantConfig,
    "cluster": ClusterConfig,
}
"""The declaration of each section of a pool file."""
LEFT_OUT = "none"
"""The default of a key that means nothing until it is given."""


def key_table(section: str) -> str:
    """Each key of a section with what stands there, its default as a pool file writes it, and its docstring."""
    keys, texts = keys_of(SECTIONS[section]), texts_of(SECTIONS[section])
    rows = [[code(name), form_of(key), default_of(key), texts[name]] for name, key in keys.items()]
    return table(["key", "value", "default", "meaning"], rows)


def form_of(key: Key) -> str:
    """What a pool file holds behind the key: a kind of value, or the only texts that it may be."""
    return code(*key.choices) if key.choices else key.written.form


def default_of(key: Key) -> str:
    """The default as a pool file would say it, in code; in words where no value says it."""
    if key.default is MISSING:
        return "required"
    if isinstance(key.default, Section):
        return "see below"
    return LEFT_OUT if key.default_text is None else code(key.default_text)
