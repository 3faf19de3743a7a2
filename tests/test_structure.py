# SPDX-License-Identifier: Apache-2.0
"""The source tree keeps its shape: sizes, layers, markers, packages and licence lines."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[1]
PACKAGE_DIRS = {"tokenpool": ROOT / "pooling"}
PACKAGE_DIRS |= {f"tokenpool.{name}": ROOT / name for name in ("patches", "scheduler_plugins")}

LAYERS = [
    {"errors", "units", "config", "cluster_config", "tenant_config", "access_config", "engine_flags", "metric_registry",
     "logs"},
    {"memory"},
    {"policy"},
    {"scheduler_plugins"},
    {"sim"},
    {"patches"},
    {"host"},
    {"cluster"},
    {"serve"},
    {"demo"},
]
"""From low to high: a module imports from its own layer and lower ones. The package itself holds only the version."""
ENGINE_FREE = LAYERS[0] | {"memory", "policy", "scheduler_plugins", "sim"}
MARKERS = {"cpu", "vllm", "ray", "gpu", "deploy"}
"""What a test file needs to run."""
SPDX = "# SPDX-License-Identifier: Apache-2.0\n"
MAX_LINES, MAX_TEST_LINES = 400, 600


def python_files(*folders: str) -> list[Path]:
    files = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert files, f"no Python file below {folders}: the test would prove nothing"
    return files


SOURCES = python_files("pooling", "scheduler_plugins", "patches", "bench", "deploy")
TESTS = python_files("tests")
OURS = python_files("pooling", "scheduler_plugins", "patches")


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def part_of(path: Path) -> str:
    """The layer name of a file: its folder, or its own name directly below pooling/."""
    folder, *rest = path.relative_to(ROOT).parts
    if folder != "pooling":
        return folder
    return rest[0].removesuffix(".py")


def package_of(path: Path) -> list[str]:
    """The package a file of ours lies in, as the names from the root down."""
    folder, *rest = path.parent.relative_to(ROOT).parts
    return ["tokenpool", *rest] if folder == "pooling" else ["tokenpool", folder, *rest]


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Every module an import statement names, anywhere in the file, with its line."""
    for node in ast.walk(ast.parse(path.read_text(), short(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package_of(path)[: -node.level + 1 or None] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module in PACKAGE_DIRS:  # may name submodules
                for alias in node.names:
                    yield node.lineno, f"{module}.{alias.name}"
            else:
                yield node.lineno, module


def layer_of(part: str) -> int:
    return next(level for level, parts in enumerate(LAYERS) if part in parts)


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


def test_low_layers_know_no_engine():
    """Settings, memory and policies import neither vLLM nor Ray; only memory may import torch."""
    wrong = []
    for path in (p for p in OURS if part_of(p) in ENGINE_FREE):
        forbidden = {"vllm", "ray"} if part_of(path) == "memory" else {"vllm", "ray", "torch"}
        wrong += [f"{short(path)}:{line}" for line, m in imports_of(path) if m.partition(".")[0] in forbidden]
    assert [] == wrong


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
