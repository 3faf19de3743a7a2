# SPDX-License-Identifier: Apache-2.0
"""The chart's schema of its value `pool`, from the declaration that also reads a pool file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from tokenpool.config import PoolConfig
from tokenpool.sections import SIZE, adapter_of

SCHEMA = Path(__file__).parents[1] / "chart/values.schema.json"

_WRITTEN_BY_THE_CHART = ("host", "port", "api_key", "view_key", "admin_key", "metrics_key")
_SIZES_OF_THE_POD = ("device_memory", "host_memory")
"""What the chart computes a pod's memory from, so that `auto` will not do."""
_BY_HAND = ("paths", "secretKey")
_WIDTH = 120


class _Plain(GenerateJsonSchema):
    """Without titles, which repeat the keys, and without defaults, which the loader puts in."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def default_schema(self, schema: Any) -> dict[str, Any]:
        return self.generate_inner(schema["schema"])


def chart_schema() -> str:
    """The text of values.schema.json with the pool's part made anew; the rest of the file is written by hand."""
    schema = json.loads(SCHEMA.read_text())
    pool = adapter_of(PoolConfig).json_schema(ref_template="#/definitions/{model}", schema_generator=_Plain)
    sections = pool.pop("$defs")
    keys = {key: value for key, value in pool["properties"].items() if key not in _WRITTEN_BY_THE_CHART}
    keys |= {key: keys[key] | {"$ref": "#/definitions/size"} for key in _SIZES_OF_THE_POD}
    for key in _SIZES_OF_THE_POD:
        del keys[key]["anyOf"]
    schema["properties"]["pool"] = {
        "type": "object",
        "additionalProperties": False,
        "properties": keys,
        "required": [*pool["required"], *_SIZES_OF_THE_POD],
    }
    schema["definitions"] = {name: schema["definitions"][name] for name in _BY_HAND}
    schema["definitions"] |= {"size": {**SIZE, "minimum": 1}, **sections}
    return _pretty(schema).replace(r"\n", " ") + "\n"  # a docstring is one text


def _pretty(value: Any, indent: str = "", before: int = 0) -> str:
    """JSON in which what fits on a line stands on one."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(indent) + before + len(line) < _WIDTH:
        return line
    inner = indent + "  "
    if isinstance(value, list):
        return "[\n" + ",\n".join(inner + _pretty(item, inner) for item in value) + f"\n{indent}]"
    heads = {json.dumps(key) + ": ": item for key, item in value.items()}
    lines = (inner + head + _pretty(item, inner, len(head)) for head, item in heads.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
