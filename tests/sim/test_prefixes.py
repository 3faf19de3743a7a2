# SPDX-License-Identifier: Apache-2.0
"""Prompts that begin alike: what is kept, for how long, and what it saves."""

from __future__ import annotations

import pytest

from tests.sim.test_bound import TEN_S
from tests.sim.test_cluster import COSTS, SPEC, cluster, workload
from tokenpool.sim.compared.bound import bound
from tokenpool.sim.device_spec import DeviceSpec
from tokenpool.sim.prefixes import BLOCK_TOKENS, PrefixCache
from tokenpool.sim.workload import SimRequest

pytestmark = pytest.mark.cpu

KEEPS = DeviceSpec(SPEC.memory_bytes, SPEC.link_bytes_per_s, prefix_bytes=1 << 30)
LEN = 2 * BLOCK_TOKENS + 10
FIRST, SECOND = (SimRequest(at_s, "a", LEN, 2, (1, 2, 3 + int(at_s))) for at_s in (0.0, 20.0))


@pytest.mark.parametrize(
    ("blocks", "num_tokens", "found"),
    [
        ((1, 2, 3), LEN, 1024),
        ((1, 9, 3), LEN, 512),
        ((9, 2, 3), LEN, 0),
        ((1, 2), 1024, 512),  # a prompt that is there as a whole still computes its last token
        ((), LEN, 0),
    ],
)
def test_a_prompt_finds_the_blocks_it_begins_with(blocks, num_tokens, found):
    cache = PrefixCache(1e9)
    cache.keep("a", (1, 2, 3), LEN, 1.0)

    assert found == cache.find("a", blocks, num_tokens)
    assert 0 == cache.find("b", blocks, num_tokens)


def test_the_least_recently_used_blocks_give_way():
    """Room for three blocks; ends of prompts go before their begins, and weights take the rest."""
    cache = PrefixCache(3 * BLOCK_TOKENS)
    cache.keep("a", (1, 2), 1024, 1.0)
    cache.keep("a", (3, 4), 1024, 1.0)
    assert [512, 1024] == [cache.find("a", blocks, LEN) for blocks in ((1, 2), (3, 4))]

    cache.resize(BLOCK_TOKENS)
    assert [0, 512] == [cache.find("a", blocks, LEN) for blocks in ((1, 2), (3, 4))]


def test_what_two_prompts_share_is_computed_once():
    """The second takes 1,024 tokens less, which are copied from host memory: 32 KiB each at 1 GiB/s."""
    c = cluster(KEEPS)
    result = c.run(workload(FIRST, SECOND))

    (with_it, without) = (r.end_s for r in (result, cluster().run(workload(FIRST, SECOND))))
    assert without - with_it == pytest.approx(1.024 - 1024 / 32768)
    assert 1024 / (2 * LEN) == pytest.approx(result.prefix_frac)
    assert 1024 * COSTS.kv_bytes_per_token == c.devices[0].memory.kv_in_bytes


def test_another_model_between_them_changes_nothing():
    """What is kept survives that the weights leave the device: there is room for one model."""
    between = SimRequest(10.0, "b", 100, 2)
    spec = DeviceSpec(1_500 << 20, SPEC.link_bytes_per_s, prefix_bytes=1 << 30)
    c = cluster(spec)
    c.run(workload(FIRST, between, SECOND))

    assert c.devices[0].memory.evictions >= 2
    assert 1024 == c.devices[0].prefixes.hit_tokens


def test_the_bound_counts_shared_blocks_once():
    """No more than what a run takes that finds them."""
    costs = {"any": COSTS}
    alone = bound(workload(FIRST), costs, TEN_S).gpu_s
    both = bound(workload(FIRST, SECOND), costs, TEN_S).gpu_s

    assert 2 * alone - 1.024 == pytest.approx(both)
    c = cluster(KEEPS)
    c.run(workload(FIRST, SECOND))
    assert both <= c.devices[0].busy_s
