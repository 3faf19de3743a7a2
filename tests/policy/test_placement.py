# SPDX-License-Identifier: Apache-2.0
"""New requests go where they cost least, and nowhere that has too much to do."""

from __future__ import annotations

import pytest

from tokenpool.policy.placement import HostView, place

pytestmark = pytest.mark.cpu


def host(index: int, load: float = 0.0, **fields) -> HostView:
    return HostView(index, load, fields.pop("link_load", 0.0), fields.pop("more", 0.1), 0.1, **fields)


def test_a_request_joins_the_running_batch_of_its_model():
    """A host that runs the model goes before one that holds its weights, and that one before an idle one."""
    batch, holds, idle = host(2, 0.8, is_active=True), host(1, 0.3, is_resident=True), host(0)
    assert 2 == place([idle, holds, batch])
    assert 1 == place([idle, holds])


def test_an_overloaded_host_gets_nothing_more():
    """Beyond `full` the host with the least overload is chosen, of compute and link together."""
    assert 0 == place([host(0), host(1, 1.15, is_active=True)])
    assert 1 == place([host(0, link_load=1.5), host(1, 0.5)])
    assert 1 == place([host(0, 2.0), host(1, 1.5)])


def test_ties_go_to_the_least_load_and_the_lowest_index():
    """The answer depends on the values only."""
    assert 1 == place([host(0, 0.4), host(1, 0.2), host(2, 0.2)])
    assert 1 == place([host(2, 0.2), host(1, 0.2), host(0, 0.4)])
