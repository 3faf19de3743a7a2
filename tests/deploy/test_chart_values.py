# SPDX-License-Identifier: Apache-2.0
"""The chart's values: every key is in the schema and explained, typos and wrong values are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.deploy.charts import CHART, VALUES_FILES

pytestmark = pytest.mark.deploy

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES_TEXT = (CHART / "values.yaml").read_text()
VALUES = yaml.safe_load(VALUES_TEXT)


def deeply(base: Any, change: Any) -> Any:
    """Values as Helm lays one file over another: mappings are merged, everything else is replaced."""
    if not (isinstance(base, dict) and isinstance(change, dict)):
        return change
    return base | {key: deeply(base.get(key), value) for key, value in change.items()}


def objects(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, schema) of every object in a schema that lists its keys."""
    if isinstance(schema, dict):
        if "properties" in schema and not isinstance(schema["properties"].get("type"), str):
            yield path, schema
        for key, value in schema.items():
            yield from objects(value, f"{path}/{key}")


@pytest.mark.parametrize("path", [CHART / "values.yaml", *VALUES_FILES], ids=lambda path: path.name)
def test_values_files_fit_the_schema(path: Path):
    """The defaults and every example are allowed."""
    jsonschema.validate(deeply(VALUES, yaml.safe_load(path.read_text())), SCHEMA)


def test_every_object_of_the_schema_is_closed():
    """An unknown key is an error at every depth; only maps of names to texts are open."""
    found = dict(objects(SCHEMA))
    assert len(found) > 20
    assert not [path for path, schema in found.items() if schema.get("additionalProperties") is not False]


def test_the_schema_refuses_a_typo_at_every_depth():
    """Each key of the defaults, misspelt, is refused."""

    def misspelt(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        if isinstance(values, dict):
            for key, value in values.items():
                yield (*path, key)
                yield from misspelt(value, (*path, key))

    validator = jsonschema.Draft7Validator(SCHEMA)
    open_maps = {("monitoring", "dashboards", "labels")}
    checked = 0
    for path in misspelt(VALUES):
        if path[:-1] in open_maps:
            continue
        broken = json.loads(json.dumps(VALUES))
        parent = broken
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1] + "x"] = parent[path[-1]]
        problems = [error.message for error in validator.iter_errors(broken)]
        assert any("Additional properties" in problem for problem in problems), path
        checked += 1
    assert checked > 90


def test_the_schema_knows_every_value_and_the_values_every_key():
    """No key of the schema lacks a default, but optional ones of the pool file; no default lacks a schema."""

    def compare(values: dict[str, Any], schema: dict[str, Any], path: str) -> None:
        known = set(schema["properties"]) - ({"global"} if not path else set())
        if path != "/pool":
            assert set(values) == known, path
        for key, value in values.items():
            if isinstance(value, dict) and "properties" in schema["properties"][key]:
                compare(value, schema["properties"][key], f"{path}/{key}")

    compare(VALUES, SCHEMA, "")


def test_every_value_is_explained():
    """Above each key stands a comment; a section may leave that to its keys."""
    lines = VALUES_TEXT.splitlines()
    unexplained = []
    for i, line in enumerate(lines):
        match = re.match(r"( *)([A-Za-z_]+):(.*)", line)
        inside_a_model = line.startswith(("      ", "    - "))
        is_section = match and not match[3].strip() and lines[i + 1].startswith(match[1] + "  #")
        if match and not inside_a_model and not is_section and not lines[i - 1].lstrip().startswith("#"):
            unexplained.append(line)
    assert unexplained == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weights", "away"),
        ("page_size", "big"),
        ("device_memory", "auto"),
        ("frontends", 65),
        ("kv_floor_pages", 0),
        ("host_timeout", "soon"),
        ("scheduling", {"options": {"max_turn_s": "1"}}),
        ("admission", {"on_miss": "drop"}),
        ("cluster", {"reconcile_period": 61}),
        ("tenants", [{"name": "a", "keys": "in plain text"}]),
        ("models", []),
        ("models", [{"name": "a", "model": "org/a", "slo": {"ttft": "1s"}}]),
        ("port", 8000),
    ],
)
def test_the_schema_refuses_what_the_loader_would(key, value):
    """By type, range and form; and what the chart writes itself."""
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(deeply(VALUES, {"pool": {key: value}}), SCHEMA)
