# SPDX-License-Identifier: Apache-2.0
"""The source tree keeps its shape: sizes, layers, markers, packages and licence lines."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from tests.import_graph import (
    LAYERS,
    OURS,
    PACKAGE_DIRS,
    ROOT,
    circles,
    graph,
    imports_of,
    layer_of,
    part_of,
    python_files,
    short,
    to_strangers,
    upward,
)  # fmt: skip

pytestmark = pytest.mark.cpu

ENGINE_FREE = LAYERS[0] | {"memory", "policy", "scheduler_plugins", "sim"}
MARKERS = {"cpu", "vllm", "ray", "gpu", "deploy"}
"""What a test file needs to run."""
SPDX = "# SPDX-License-Identifier: Apache-2.0\n"
MAX_LINES, MAX_TEST_LINES, MAX_FUNCTION_LINES, MAX_FILES = 400, 600, 60, 20


SOURCES = python_files("pooling", "scheduler_plugins", "patches", "bench", "deploy")
TESTS = python_files("tests")


def test_no_file_is_too_long():
    """A module has at most 400 lines, a test file 600."""
    lines = {path: len(path.read_text().splitlines()) for path in [*SOURCES, *TESTS]}
    assert [] == [(short(p), n) for p, n in lines.items() if n > (MAX_TEST_LINES if p in TESTS else MAX_LINES)]


def test_every_file_starts_with_its_licence():
    """The first line is the SPDX line; only an empty __init__.py has none."""
    texts = {path: path.read_text() for path in [*SOURCES, *TESTS]}
    without = [path for path, text in texts.items() if not text.startswith(SPDX)]
    assert [] == [short(path) for path in without if path.name != "__init__.py" or texts[path]]


def test_every_part_has_a_layer():
    """A new folder or top-level module must be given its place in LAYERS."""
    parts = {part_of(path) for path in OURS} - {"__init__"}
    assert parts == set.union(*LAYERS)


def test_imports_go_downward():
    """No module imports from a layer above its own; the package itself imports nothing of ours."""
    wrong = []
    for path in OURS:
        part = part_of(path)
        for line, module in imports_of(path):
            package, _, rest = module.partition(".")
            imported = rest.partition(".")[0]
            if package != "tokenpool" or imported in ("", "__version__"):
                continue
            known = any(imported in parts for parts in LAYERS)
            if not known or part == "__init__" or layer_of(imported) > layer_of(part):
                wrong.append(f"{short(path)}:{line}: {module}")
    assert [] == wrong


def test_the_floors_of_a_layer_import_downward():
    """Nor does a room of the host or of what serves import from a floor above; so nothing forms a circle of rooms."""
    assert [] == upward(graph())
    assert [] != upward({"tokenpool.host.kv.kv_swap": {"tokenpool.host.engine_host"}})


def test_processes_know_one_another_by_what_they_say():
    """What serves requests imports nothing of the host, which is another process."""
    assert [] == to_strangers(graph())
    assert [] != to_strangers({"tokenpool.cli.doctor": {"tokenpool.host.state"}})


def test_imports_form_no_circle():
    """Of files, imports for types and inside functions included; the search finds circles where there are some."""
    imports = graph()
    assert sum(map(len, imports.values())) > len(imports), "no imports were read"
    assert [["a", "b"], ["c"]] == circles({"a": {"b"}, "b": {"a", "c"}, "c": {"c"}, "d": {"a"}})
    assert [] == circles(imports)


def test_imports_are_absolute():
    """Each module is named one way everywhere, so that it can be found and moved."""
    relative = [
        f"{short(path)}:{node.lineno}"
        for path in OURS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert [] == relative


def test_no_folder_holds_too_much():
    """A folder has at most 20 files, its __init__.py included, and no function of ours is longer than 60 lines."""
    files = Counter(path.parent for path in [*SOURCES, *TESTS])
    assert {} == {short(folder): number for folder, number in files.items() if number > MAX_FILES}
    long = [
        f"{short(path)}:{node.lineno}: {node.name}"
        for path in OURS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert [] == long


def test_low_layers_know_no_engine():
    """Settings, memory and policies import neither vLLM nor Ray; only memory may import torch."""
    wrong = []
    for path in (p for p in OURS if part_of(p) in ENGINE_FREE):
        forbidden = {"vllm", "ray"} if part_of(path) == "memory" else {"vllm", "ray", "torch"}
        wrong += [f"{short(path)}:{line}" for line, m in imports_of(path) if m.partition(".")[0] in forbidden]
    assert [] == wrong


def test_one_module_touches_the_environment():
    """Only settings.py reads or sets a variable, and only there stands the name of one of ours."""
    found = {
        short(path): named
        for path in OURS
        if (named := re.findall(r"\benviron\b|\bgetenv\b|\bputenv\b|[\"']TOKENPOOL_\w+", path.read_text()))
    }
    assert ["pooling/settings.py"] == [*found]


def markers_of(path: Path) -> list[str]:
    """The markers that a module-level `pytestmark = pytest.mark.x` (or a list of them) sets."""
    found: list[str] = []
    for node in ast.parse(path.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "pytestmark" for target in targets):
            marks = (n for n in ast.walk(node.value) if isinstance(n, ast.Attribute))
            found += [mark.attr for mark in marks if mark.attr in MARKERS]
    return found


def test_every_test_file_has_one_marker():
    """Each test file says once what it needs to run: cpu, vllm, ray, gpu or deploy."""
    markers = {short(path): markers_of(path) for path in TESTS if path.name.startswith("test_")}
    assert {} == {name: found for name, found in markers.items() if len(found) != 1}


def test_packages_in_pyproject_are_those_on_disk():
    """No package is forgotten in a wheel, none is listed that is not there."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {
        ".".join((name, *init.parent.relative_to(folder).parts))
        for name, folder in PACKAGE_DIRS.items()
        for init in folder.rglob("__init__.py")
    }
    assert sorted(on_disk) == sorted(setuptools["packages"])
    assert {name: str(folder.relative_to(ROOT)) for name, folder in PACKAGE_DIRS.items()} == setuptools["package-dir"]


def test_every_module_is_in_a_package():
    """A folder without __init__.py would be left out of the wheel, or shadow another test module's name."""
    assert [] == [short(path) for path in [*OURS, *TESTS] if not (path.parent / "__init__.py").exists()]


def test_markers_are_those_of_pyproject():
    """The markers this file knows are the registered ones."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert sorted(marker.partition(":")[0] for marker in options["markers"]) == sorted(MARKERS | {"slow"})
