# SPDX-License-Identifier: Apache-2.0
"""Who imports whom: `python -m tests.import_graph` prints the house from the ground up; tests/test_structure.py judges.

An arrow that points up is an import from a floor above the importer's own.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE_DIRS = {"tokenpool": ROOT / "pooling"}
PACKAGE_DIRS |= {f"tokenpool.{name}": ROOT / name for name in ("patches", "scheduler_plugins")}

LAYERS = [
    {"errors", "units", "config", "cluster_config", "tenant_config", "access_config", "engine_flags", "metric_registry",
     "group_config", "host_kinds", "logs", "model_life", "recent_logs", "sections", "settings", "yaml_loader"},
    {"memory"},
    {"policy"},
    {"scheduler_plugins"},
    {"sim"},
    {"patches"},
    {"wire"},
    {"process"},
    {"node_store"},
    {"host"},
    {"cluster"},
    {"serve"},
    {"offline"},
    {"cli"},
    {"demo"},
]  # fmt: skip
"""From low to high: a module imports from its own layer and lower ones. The package itself holds only the version."""
ROOMS = {
    "host": ("kv", "engine", "load", "ranks", ""),
    "serve": ("access", "launch", "http", "media", "client", "gateway", "pool", "clustered", "frontends", ""),
}
"""The floors of two layers, from low to high; the last one is what lies directly in the folder."""
STRANGERS = {"cluster", "serve", "offline", "cli"}
"""Never import `host`, although it lies below them: processes know one another by `wire` alone."""


def python_files(*folders: str) -> list[Path]:
    """All below these folders of the repository, of which there are some."""
    files = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert files, f"no Python file below {folders}: the test would prove nothing"
    return files


OURS = python_files("pooling", "scheduler_plugins", "patches")


def short(path: Path) -> str:
    """A path for people."""
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


def module_of(path: Path) -> str:
    """The name under which a file of ours is imported."""
    return ".".join([*package_of(path), *([path.stem] if path.name != "__init__.py" else [])])


MODULES = {module_of(path): path for path in OURS}


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that an import statement names, anywhere in the file, with its line."""
    for node in ast.walk(ast.parse(path.read_text(), short(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package_of(path)[: -node.level + 1 or None] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            members = {f"{module}.{alias.name}" for alias in node.names}
            if module in PACKAGE_DIRS or members & MODULES.keys():  # names submodules
                yield from ((node.lineno, member) for member in sorted(members))
            else:
                yield node.lineno, module


def layer_of(part: str) -> int:
    """The number of a layer, from the ground up."""
    return next(level for level, parts in enumerate(LAYERS) if part in parts)


def floor_of(module: str) -> tuple[int, int]:
    """The layer of a module of ours, and its floor there."""
    part, *rest = module.split(".")[1:]
    floors = ROOMS.get(part, ())
    room = rest[0] if len(rest) > 1 and rest[0] in floors else ""
    return layer_of(part), floors.index(room) if floors and rest else 0


def graph() -> dict[str, set[str]]:
    """Of each module of ours those that it imports; imports for types and inside functions included."""
    return {name: {m for _, m in imports_of(path) if m in MODULES} - {name} for name, path in MODULES.items()}


def circles(imports: Mapping[str, Set[str]]) -> list[list[str]]:
    """The groups of modules of which each reaches each other."""
    reached: dict[str, set[str]] = {}
    for module in imports:
        reached[module], ahead = set(), [module]
        while ahead:
            new = (imports[ahead.pop()] & imports.keys()) - reached[module]
            reached[module] |= new
            ahead += new
    groups = {frozenset(other for other in imports if other in reached[m] and m in reached[other]) for m in imports}
    return sorted(sorted(group) for group in groups if group)


def upward(imports: Mapping[str, Set[str]]) -> list[tuple[str, str]]:
    """Imports from a floor above; the empty packages aside, which hold a caption only."""
    wrong = [(name, other) for name, others in imports.items() for other in others if "." in name and "." in other]
    return sorted((name, other) for name, other in wrong if floor_of(other) > floor_of(name))


def to_strangers(imports: Mapping[str, Set[str]]) -> list[tuple[str, str]]:
    """Imports of the host by what is another process."""
    pairs = [(name, other) for name, others in imports.items() for other in others]
    return sorted(p for p in pairs if p[0].split(".")[1:2] and p[0].split(".")[1] in STRANGERS
                  and f"{p[1]}.".startswith("tokenpool.host."))  # fmt: skip


def main() -> int:
    """Print the floors and the figures."""
    imports = graph()
    rooms: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name in MODULES:
        if "." in name:
            rooms[floor_of(name)].append(name)
    for floor in sorted(rooms):
        folders = Counter(short(MODULES[name].parent) for name in rooms[floor] if MODULES[name].name != "__init__.py")
        print(f"{floor[0]:2}.{floor[1]}  " + ", ".join(f"{folder} ({number})" for folder, number in folders.items()))
    largest = Counter(path.parent for path in OURS).most_common(1)[0]
    figures = {
        "files": len(MODULES),
        "lines": sum(len(path.read_text().splitlines()) for path in OURS),
        "imports": sum(map(len, imports.values())),
        "circles": len(circles(imports)),
        "upward": len(upward(imports)),
        "serve_to_host": len(to_strangers(imports)),
        "largest_folder": f"{short(largest[0])}:{largest[1]}",
    }
    print("result: " + " ".join(f"{key}={value}" for key, value in figures.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
