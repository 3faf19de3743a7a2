# SPDX-License-Identifier: Apache-2.0
"""The pool file's `cluster` section: what it sets, and what is refused with a line that says what to change."""

from __future__ import annotations

from typing import Any

import pytest

from tokenpool.cluster_config import ClusterConfig
from tokenpool.config import PoolConfig
from tokenpool.errors import ConfigError

pytestmark = pytest.mark.cpu


def read(section: Any) -> ClusterConfig:
    return PoolConfig.from_dict({"models": [{"name": "a", "model": "x/y"}], "cluster": section}).cluster


def test_every_key_is_read():
    """The values of the file are those of the config, times in seconds."""
    expected = ClusterConfig("p", 4, 2.5, 2, 3, "live", 30.0, 1, 1.0, 20.0, 8.0, 300.0, "tcp", "/state")
    section = {
        "name": "p", "hosts": 4, "num_cpus_per_host": 2.5, "replicas": 2, "max_replicas": 3,
        "capacity": "live", "capacity_window": "30s", "prefill_hosts": 1,
        "reconcile_period": "1s", "host_timeout": "20s", "frontend_timeout": "8s",
        "orphan_timeout": "5m", "transport": "tcp", "state_dir": "/state",
    }  # fmt: skip

    assert expected == read(section)


def test_a_pool_without_the_section_has_defaults():
    """One host per device, one replica."""
    config = PoolConfig.from_dict({"models": [{"name": "a", "model": "x/y"}]}).cluster

    assert ClusterConfig() == config == read({"hosts": "auto"})


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"hosts": 0}, "cluster.hosts: must be 1 or more, or auto"),
        ({"host": 2}, "unknown key 'host', did you mean 'hosts'?"),
        ({"hosts": "two"}, "cluster.hosts: expected a whole number"),
        ({"hosts": 2, "replicas": 3}, "cluster.replicas: 3 replicas need as many hosts, there are 2"),
        ({"replicas": 2, "max_replicas": 1}, r"cluster.max_replicas: must be replicas \(2\) or more"),
        ({"capacity": "auto"}, "cluster.capacity: must be one of live, fixed, got 'auto'"),
        ({"capacity": "fixed", "max_replicas": 2}, "cluster.max_replicas: needs capacity: live"),
        ({"capacity": "fixed", "prefill_hosts": 1}, "cluster.prefill_hosts: needs capacity: live"),
        ({"capacity_window": "1s"}, "cluster.capacity_window: must be 6s to 1h"),
        ({"hosts": 2, "prefill_hosts": 2}, "cluster.prefill_hosts: must leave a host of 2 to decode"),
        ({"num_cpus_per_host": 0}, "cluster.num_cpus_per_host: must be above 0"),
        ({"num_cpus_per_host": True}, "cluster.num_cpus_per_host: expected a number"),
        ({"reconcile_period": "1ms"}, "cluster.reconcile_period: must be 50ms to 60s"),
        ({"host_timeout": "1s"}, "cluster.host_timeout: must be above 1s"),
        ({"transport": "udp"}, "cluster.transport: must be one of auto, tcp"),
        ({"name": "a b"}, "cluster.name: 'a b' is no cluster name"),
    ],
)
def test_what_is_wrong_is_named(section, problem):
    """A refusal names the key and the fix."""
    with pytest.raises(ConfigError, match=problem):
        read(section)


@pytest.mark.parametrize(
    ("model", "section", "problem"),
    [
        ({"replicas": 0}, {}, r"models\[0\].replicas: must be 1 or more"),
        ({"replicas": 3}, {"hosts": 2}, r"models\[0\].replicas: 3 hosts are asked for, cluster.hosts is 2"),
        ({"max_replicas": 2}, {"capacity": "fixed"}, r"models\[0\].max_replicas: needs cluster.capacity: live"),
        ({"max_replicas": 1}, {"replicas": 2}, r"models\[0\].max_replicas: at least 2 hosts and at most 1"),
        ({"replicas": 4}, {"max_replicas": 3}, r"models\[0\].replicas: at least 4 hosts and at most 3"),
        ({"replicas": "two"}, {}, r"models\[0\].replicas: expected a whole number"),
    ],
)
def test_a_models_own_replicas_go_with_the_clusters(model, section, problem):
    """They are read from the model's entry; what cannot be is refused with the key and the fix."""
    entry = {"name": "a", "model": "x/y"}
    good = PoolConfig.from_dict({"models": [entry | {"replicas": 2, "max_replicas": 3}], "cluster": {"hosts": 4}})
    assert (2, 3) == (good.models[0].replicas, good.models[0].max_replicas)
    with pytest.raises(ConfigError, match=problem):
        PoolConfig.from_dict({"models": [entry | model], "cluster": section})
