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
from tokenpool.serve.auth import OPEN_PATHS
from tokenpool.serve.request_body import MAX_DEPTH

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
    assert (len(blocks("migration")), len(blocks("operations"))) == (3, 1)


def test_the_security_page_names_every_open_path():
    """No route answers without a key unless the page says so."""
    (row,) = re.findall(r"^\| anybody who reaches the port \|([^|]*)\|", PAGES["security"], re.MULTILINE)
    assert set(re.findall(r"`(/\w+)`", row)) == OPEN_PATHS


def test_the_security_page_states_the_limits_of_the_code():
    """Size and depth of a body are what the defaults say."""
    default = PoolConfig.from_dict({"models": [{"name": "a", "model": "b"}]})
    assert f"{default.max_request_bytes >> 20} MiB by default" in PAGES["security"]
    assert f"| depth of JSON | {MAX_DEPTH}; 400 |" in PAGES["security"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Every relative link of the page names a file of the repository."""
    targets = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]) if "://" not in link]
    assert targets
    assert [target for target in targets if not (ROOT / "docs" / target).exists()] == []
