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


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=short)
def test_no_file_is_too_long(path):
    """A module has at most 400 lines, a test file 600."""
    limit = MAX_TEST_LINES if path in TESTS else MAX_LINES
    assert len(path.read_text().splitlines()) <= limit


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=short)
def test_every_file_starts_with_its_licence(path):
    """The first line is the SPDX line; only an empty __init__.py has none."""
    text = path.read_text()
    assert text.startswith(SPDX) or (path.name == "__init__.py" and not text)


def test_every_part_has_a_layer():
    """A new folder or top-level module must be given its place in LAYERS."""
    parts = {part_of(path) for path in OURS} - {"__init__"}
    assert parts == set.union(*LAYERS)


@pytest.mark.parametrize("path", OURS, ids=short)
def test_imports_go_downward(path):
    """No module imports from a layer above its own."""
    part = part_of(path)
    for line, module in imports_of(path):
        package, _, rest = module.partition(".")
        imported = rest.partition(".")[0]
        if package == "tokenpool" and any(imported in parts for parts in LAYERS):
            assert part != "__init__", f"{short(path)}:{line}: the package itself imports nothing of ours"
            assert layer_of(imported) <= layer_of(part), f"{short(path)}:{line}: {part} imports {module}"
        elif package == "tokenpool":
            assert imported in ("", "__version__"), f"{short(path)}:{line}: {module} is in no layer"


@pytest.mark.parametrize("path", [p for p in OURS if part_of(p) in ENGINE_FREE], ids=short)
def test_low_layers_know_no_engine(path):
    """Settings, memory and policies import neither vLLM nor Ray; only memory may import torch."""
    packages = {module.partition(".")[0] for _, module in imports_of(path)}
    assert not packages & {"vllm", "ray"}
    assert "torch" not in packages or part_of(path) == "memory"


def markers_of(path: Path) -> list[str]:
    """The markers that a module-level `pytestmark = pytest.mark.x` (or a list of them) sets."""
    found: list[str] = []
    for node in ast.parse(path.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "pytestmark" for target in targets):
            marks = (n for n in ast.walk(node.value) if isinstance(n, ast.Attribute))
            found += [mark.attr for mark in marks if mark.attr in MARKERS]
    return found


@pytest.mark.parametrize("path", [p for p in TESTS if p.name.startswith("test_")], ids=short)
def test_every_test_file_has_one_marker(path):
    """Each test file says once what it needs to run: cpu, vllm, ray, gpu or deploy."""
    assert len(markers_of(path)) == 1


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


@pytest.mark.parametrize("path", [*OURS, *TESTS], ids=short)
def test_every_module_is_in_a_package(path):
    """A folder without __init__.py would be left out of the wheel, or shadow another test module's name."""
    assert (path.parent / "__init__.py").exists()


def test_markers_are_those_of_pyproject():
    """The markers this file knows are the registered ones."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert sorted(marker.partition(":")[0] for marker in options["markers"]) == sorted(MARKERS)
