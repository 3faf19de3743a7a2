# SPDX-License-Identifier: Apache-2.0
"""What a patch is: a name in vLLM that we replace, bound to the exact source it was written against.

Patches fail closed: when the source of a target is not the one we know for the installed vLLM version, nothing
is applied and the start stops with one clear line.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from tokenpool.errors import PatchMismatchError


def resolve(target: str) -> Any:
    """Return the object named by `target`, written "package.module:attribute[.attribute]"."""
    module_name, _, path = target.partition(":")
    value: Any = importlib.import_module(module_name)
    for part in path.split("."):
        value = inspect.getattr_static(value, part) if isinstance(value, type) else getattr(value, part)
    return value


def source_hash(target: str) -> str:
    """SHA-256 of the source text of `target`."""
    return hash_of(resolve(target))


def hash_of(value: Any) -> str:
    """SHA-256 of the source text of a function or class."""
    return hashlib.sha256(inspect.getsource(inspect.unwrap(value)).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Patch:
    """One thing of vLLM that tokenpool replaces or builds on."""

    name: str
    target: str
    """What the hash is taken of, as "package.module:attribute"."""
    hashes: Mapping[str, str]
    """vLLM version -> SHA-256 of the target's source that this patch was written against."""
    reason: str
    removal: str
    """The condition under which the patch can go."""
    sites: tuple[str, ...] = ()
    """Names to replace, "package.module:attribute"; empty for a target that we only subclass or call."""
    replacement: Callable[[Any], Any] | None = None
    """original -> replacement; called once per site."""
    absent_in: tuple[str, ...] = ()
    """Versions of vLLM that have no such target: there is nothing to do there."""


@dataclass(frozen=True, slots=True)
class PatchStatus:
    """One line of `tokenpool doctor`."""

    name: str
    target: str
    expected: str | None
    found: str
    applied: bool
    sites: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True when the source is the one the patch was written against."""
        return self.expected == self.found


@dataclass(slots=True)
class PatchSet:
    """Applies patches all together or not at all, and takes them back."""

    patches: tuple[Patch, ...]
    _originals: dict[str, Any] = field(default_factory=dict)

    def status(self, version: str) -> list[PatchStatus]:
        """Compare every target with what is known for `version`; changes nothing."""
        applied = bool(self._originals)
        return [
            PatchStatus(p.name, p.target, p.hashes.get(version), self._hash(p.target), applied, p.sites)
            for p in self.of(version)
        ]

    def of(self, version: str) -> list[Patch]:
        """Those that there are for a version of vLLM."""
        return [patch for patch in self.patches if version not in patch.absent_in]

    def _hash(self, target: str) -> str:
        """Of the source that vLLM has; empty where it has none."""
        original = self._originals.get(target)
        try:
            return source_hash(target) if original is None else hash_of(original)
        except (ImportError, AttributeError):
            return ""

    def apply(self, version: str) -> None:
        """Apply all patches once; raises PatchMismatchError and applies none if any source differs."""
        if self._originals:
            return
        bad = [s for s in self.status(version) if not s.ok]
        if bad:
            known = sorted({v for p in self.patches for v in p.hashes})
            raise PatchMismatchError(
                f"vLLM {version} is not the source tokenpool was written against ({', '.join(known)}): "
                f"{', '.join(s.target for s in bad)} differ; install a known vLLM version"
            )
        try:
            for patch in self.of(version):
                for site in patch.sites:
                    assert patch.replacement is not None
                    original = resolve(site)
                    _set(site, patch.replacement(original))
                    self._originals[site] = original
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Put every original back."""
        for site, original in self._originals.items():
            _set(site, original)
        self._originals.clear()


def _set(site: str, value: Any) -> None:
    module_name, _, path = site.partition(":")
    owner, _, attribute = path.rpartition(".")
    setattr(resolve(f"{module_name}:{owner}") if owner else importlib.import_module(module_name), attribute, value)


def known(**versions: str) -> Mapping[str, str]:
    """Hashes by version, written as known(v0_32_0="...")."""
    return MappingProxyType({v[1:].replace("_", "."): digest for v, digest in versions.items()})
