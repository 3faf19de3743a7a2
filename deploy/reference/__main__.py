# SPDX-License-Identifier: Apache-2.0
"""Write the generated tables into docs/, and the pool's part of the chart's schema; `make reference`.

A page holds each of its tables between two comments, `<!-- made: NAME -->` and `<!-- /made -->`; what lies outside is
written by hand and stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from deploy.reference.chart import SCHEMA, chart_schema
from deploy.reference.flags import flag_table
from deploy.reference.keys import SECTIONS, key_table
from deploy.reference.metrics import metric_table, vllm_table
from deploy.reference.variables import variable_table
from tokenpool.metric_registry import METRICS

DOCS = Path(__file__).parents[2] / "docs"
PLACE = re.compile(r"(<!-- made: (.+?) -->\n)(.*?)(<!-- /made -->\n)", re.DOTALL)

_MODEL = [m for m in METRICS.values() if "model_name" in m.labels and "tenant" not in m.labels]
_TENANT = [m for m in METRICS.values() if "tenant" in m.labels]
_WHOLE = [m for m in METRICS.values() if not {"model_name", "tenant"} & set(m.labels)]
_PAGES = ("cluster", "tenants")
"""Sections with a page of their own."""
TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "configuration": {
        **{f"keys of {name}": partial(key_table, name) for name in SECTIONS if name not in _PAGES},
        "flags of the pool": flag_table,
        "environment variables": variable_table,
    },
    **{name: {f"keys of {name}": partial(key_table, name)} for name in _PAGES},
    "metrics": {
        "metrics of a model": partial(metric_table, _MODEL),
        "metrics of a tenant": partial(metric_table, _TENANT),
        "metrics of the pool": partial(metric_table, _WHOLE),
        "metrics of vLLM": vllm_table,
    },
}
"""What makes each table, by page and by the name in its comment."""


def generated() -> dict[Path, str]:
    """Path and text of every generated file; raises KeyError for a table that nothing makes, or that has no place."""
    pages = {SCHEMA: chart_schema()}
    for name, tables in TABLES.items():
        path = DOCS / f"{name}.md"
        text = path.read_text()
        places = [match[2] for match in PLACE.finditer(text)]
        if sorted(places) != sorted(tables):
            raise KeyError(f"{path} has places for {places}, there are {sorted(tables)}")
        pages[path] = PLACE.sub(lambda match, make=tables: f"{match[1]}\n{make[match[2]]()}\n{match[4]}", text)
    return pages


if __name__ == "__main__":
    for path, text in generated().items():
        path.write_text(text)
        print(path)
