# SPDX-License-Identifier: Apache-2.0
"""What the operations, security and migration pages show is what the code takes."""

from __future__ import annotations

import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.deploy.test_chart_values import SCHEMA, VALUES, deeply
from tokenpool.config import PoolConfig
from tokenpool.host.engine.grammar_cost import FREE_PART, FREE_S, SURE_S, TOKEN_S
from tokenpool.serve.access.auth import OPEN_PATHS
from tokenpool.serve.client.text_lanes import LONG, PLACES, PLACES_EACH
from tokenpool.serve.client.token_bounds import MAX_LISTED
from tokenpool.serve.http.body_budget import LARGEST_BODIES
from tokenpool.serve.http.http_limits import HEAD_BYTES, HEAD_LINES, SILENCE_S
from tokenpool.serve.http.loop_watch import STALL_S
from tokenpool.serve.http.request_body import MAX_CONTAINERS, MAX_DEPTH, MAX_VALUES

pytestmark = pytest.mark.deploy

ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in ("operations", "security", "migration")}


def blocks(page: str) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", blocks("migration"))
def test_pool_files_of_the_migration_page_are_good(block, monkeypatch):
    """Each is read by our own loader."""
    monkeypatch.setenv("POOL_API_KEY", "key-0123456789ab")
    assert PoolConfig.from_dict(yaml.safe_load(block)).models


@pytest.mark.parametrize("block", blocks("operations"))
def test_values_of_the_operations_page_are_good(block):
    """Each fits the chart's schema."""
    jsonschema.validate(deeply(VALUES, yaml.safe_load(block)), SCHEMA)


def test_the_pages_have_examples():
    """The two tests above would pass without any."""
    assert (len(blocks("migration")), len(blocks("operations"))) == (3, 2)


def test_the_security_page_names_every_open_path():
    """No route answers without a key unless the page says so."""
    (row,) = re.findall(r"^\| anybody who reaches the port \|([^|]*)\|", PAGES["security"], re.MULTILINE)
    assert set(re.findall(r"`(/\w+)`", row)) == OPEN_PATHS


def test_the_security_page_states_the_limits_of_the_code():
    """Sizes, times and counts of a request are what the code says."""
    default = PoolConfig.from_dict({"models": [{"name": "a", "model": "b"}]})
    assert f"{default.max_request_bytes >> 20} MiB by default" in PAGES["security"]
    counts = f"depth {MAX_DEPTH}, {MAX_CONTAINERS:,} arrays and objects, a million values"
    assert f"| JSON | {counts}; 400 |" in PAGES["security"] and MAX_VALUES == 1_000_000
    bodies = f"{LARGEST_BODIES} times `max_request` together, {LARGEST_BODIES * default.max_request_bytes >> 20} MiB"
    assert bodies in PAGES["security"]
    assert f"| {MAX_LISTED:,}; 400 |" in PAGES["security"]
    assert f"texts and lists of {LONG:,} characters" in PAGES["security"] and (PLACES, PLACES_EACH) == (2, 1)
    one = f"{SURE_S:g} s of CPU time for a request, {TOKEN_S * 1e3:g} ms more for each of its tokens"
    assert f"{one}, and for all requests of a host together {FREE_S:g} s" in PAGES["security"]
    assert f"had anew at {FREE_PART:g} s a second" in PAGES["security"]
    assert f"{HEAD_BYTES >> 10} KiB and {HEAD_LINES} headers" in PAGES["security"]
    assert f"{SILENCE_S:g} s for a whole head" in PAGES["security"]
    assert f"more than {STALL_S:g} s" in PAGES["security"]
