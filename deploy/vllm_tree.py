# SPDX-License-Identifier: Apache-2.0
"""A tree of Python files that is read and not imported: where a name is defined, and with what source text."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

_TARGET = re.compile(r"vllm(\.\w+)+(:[\w.]+)?")
_MOST_HOPS = 8
"""Modules that one name may come through."""


def digest(source: str) -> str:
    """SHA-256 of a source text, as patches/base.py takes it."""
    return hashlib.sha256(source.encode()).hexdigest()


def imports_of(text: str) -> Iterator[tuple[int, str]]:
    """Line and target of each name of vLLM that an import statement of this text names."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if _is_vllm(alias.name))
        elif isinstance(node, ast.ImportFrom) and _is_vllm(node.module or ""):
            yield from ((node.lineno, f"{node.module}:{alias.name}") for alias in node.names)


def names_in_strings(text: str) -> Iterator[tuple[int, str]]:
    """Line and target of each string that is a module of vLLM, or a name in one by a colon."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and _TARGET.fullmatch(node.value):
            yield node.lineno, node.value


def _is_vllm(module: str) -> bool:
    return module.partition(".")[0] == "vllm"


class Module:
    """One file: the names that are bound at its top level, in `if` and `try` as well."""

    def __init__(self, path: Path) -> None:
        self.is_package = path.name == "__init__.py"
        self.lines = path.read_text().splitlines(keepends=True)
        self._tree = ast.parse("".join(self.lines))

    @cached_property
    def bound(self) -> dict[str, ast.AST]:
        """Name -> the statement that binds it last."""
        found: dict[str, ast.AST] = {}
        for node in _statements(self._tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found[node.name] = node
            elif isinstance(node, ast.Import | ast.ImportFrom):
                found.update((alias.asname or alias.name.partition(".")[0], node) for alias in node.names)
            elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    found.update((name.id, node) for name in ast.walk(target) if isinstance(name, ast.Name))
        return found

    @property
    def is_dynamic(self) -> bool:
        """Whether it may have names that are bound nowhere in its text."""
        return "__getattr__" in self.bound or "*" in self.bound


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _statements(child)
        else:
            yield child


class Tree:
    """The folder in which `vllm/` lies."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        """A module by its full name, None if there is no such file."""
        if name not in self._modules:
            stem = self.root.joinpath(*name.split("."))
            paths = [path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()]
            self._modules[name] = Module(paths[0]) if paths else None
        return self._modules[name]

    def source(self, target: str) -> str | None:
        """The text of a function or class, "package.module:attribute[.attribute]", as `inspect.getsource` has it."""
        found = self._find(target)
        if found is None or not isinstance(found[1], ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            return None
        module, node = found
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        return "".join(module.lines[first - 1 : node.end_lineno])

    def has(self, target: str) -> bool:
        """Whether a module, or a name in one, is there; a name that its module may make when asked counts as there."""
        module_name, _, path = target.partition(":")
        module = self.module(module_name)
        if not path or module is None:
            return module is not None or (not path and self._has_dotted(target))
        return self._find(target) is not None or module.is_dynamic or self.module(f"{module_name}.{path}") is not None

    def _has_dotted(self, target: str) -> bool:
        """Of "package.module.Name", which is written without a colon."""
        module_name, _, name = target.rpartition(".")
        return self.module(module_name) is not None and self.has(f"{module_name}:{name}")

    def _find(self, target: str, hops: int = _MOST_HOPS) -> tuple[Module, ast.AST] | None:
        module_name, _, path = target.partition(":")
        module = self.module(module_name)
        if module is None or not hops:
            return None
        first, *rest = path.split(".")
        node = module.bound.get(first)
        if isinstance(node, ast.ImportFrom):
            there = _imported(module_name, module, node, first)
            return self._find(":".join([there[0], ".".join([there[1], *rest])]), hops - 1) or (module, node)
        for name in rest:
            node = next((n for n in _statements(node) if getattr(n, "name", None) == name), None) if node else None
        return None if node is None else (module, node)


def _imported(module_name: str, module: Module, node: ast.ImportFrom, name: str) -> tuple[str, str]:
    """The module and name that `from ... import ...` takes a name from."""
    original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
    if not node.level:
        return node.module or "", original
    parts = module_name.split(".")
    package = parts[: len(parts) - node.level + module.is_package]
    return ".".join([*package, *([node.module] if node.module else [])]), original
