# SPDX-License-Identifier: Apache-2.0
"""Patches fit the installed vLLM, fail closed when they do not, and leave nothing behind."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from tokenpool.errors import PatchMismatchError
from tokenpool.patches import PATCHES, Patch, PatchSet, vllm_version
from tokenpool.patches.base import known, resolve, source_hash
from tokenpool.patches.build_context import building, current_build

pytestmark = pytest.mark.vllm

README = Path(__file__).parents[1] / "patches" / "README.md"
HERE = PATCHES.of(vllm_version())
SITES = [site for patch in HERE for site in patch.sites]
by_name = pytest.mark.parametrize("patch", HERE, ids=lambda patch: patch.name)


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    """Start from vLLM as it is installed, and leave the process as it was."""
    was_applied = bool(PATCHES._originals)
    PATCHES.undo()
    yield
    PATCHES.undo()
    if was_applied:
        PATCHES.apply(vllm_version())


def at_sites() -> dict[str, Any]:
    return {site: resolve(site) for site in SITES}


def doctored(patch: Patch) -> Patch:
    """The same patch, written against a source that differs."""
    return dataclasses.replace(patch, hashes=MappingProxyType({vllm_version(): "0" * 64}))


@by_name
def test_the_hash_is_that_of_the_installed_vllm(patch):
    """Each patch knows the source that is installed here."""
    assert patch.hashes[vllm_version()] == source_hash(patch.target)


@by_name
def test_every_patch_says_why_and_until_when(patch):
    """Reason and removal condition are there, and a patch with sites has a replacement."""
    assert patch.reason
    assert patch.removal
    assert bool(patch.sites) == (patch.replacement is not None)


def test_names_and_sites_are_unique():
    """Two patches of one site would overwrite each other."""
    assert len(PATCHES.patches) == len({patch.name for patch in PATCHES.patches})
    assert len(SITES) == len(set(SITES))


@by_name
def test_the_readme_names_every_patch(patch):
    """patches/README.md has each patch's name and what it is bound to."""
    text = README.read_text()
    assert patch.name in text
    assert patch.target.rpartition(":")[2] in text


CHANGED = re.findall(r"^\| `((?:pooling|patches)/[^`]+)` \| ([^|]*) \|", README.read_text(), re.MULTILINE)
CHANGES = re.compile(r"\.__class__ = |method-assign|getclosurevars|\.cache_clear\(\)|middleware_stack = ")
"""Code that changes an object of another package."""


def test_the_readme_lists_what_is_changed_in_objects():
    """Each file that changes one is in the table, and each file of the table has what the table says of it."""
    root = README.parents[1]
    found = {str(p.relative_to(root)) for p in (root / "pooling").rglob("*.py") if CHANGES.search(p.read_text())}
    assert CHANGED
    assert found <= {file for file, _ in CHANGED}
    for file, what in CHANGED:
        text = (root / file).read_text()
        assert not [name for name in re.findall(r"`([^`]+)`", what) if name.rpartition(".")[2] not in text], file


@by_name
def test_a_replaced_name_is_the_target_itself(patch):
    """A site holds the very object whose source was hashed, not another of the same name."""
    for site in patch.sites:
        assert resolve(patch.target) is resolve(site)


def test_apply_replaces_every_site_and_undo_restores_it():
    """After undo each name is the identical object it was; both can be repeated."""
    before = at_sites()
    for _ in range(2):
        PATCHES.apply(vllm_version())
        applied = at_sites()
        assert not [site for site in SITES if applied[site] is before[site]]
        assert all(status.applied and status.ok for status in PATCHES.status(vllm_version()))
        PATCHES.apply(vllm_version())  # a second time changes nothing
        assert applied == at_sites()
        PATCHES.undo()
        assert before == at_sites()
        assert not any(status.applied for status in PATCHES.status(vllm_version()))
    PATCHES.undo()
    assert before == at_sites()


HERE = PATCHES.of(vllm_version())


@pytest.mark.parametrize("index", [0, len(HERE) // 2, len(HERE) - 1])
def test_one_wrong_hash_applies_nothing(index):
    """A single target that differs, wherever in the order, stops all patches with one line that names it."""
    before = at_sites()
    patches = list(HERE)
    patches[index] = doctored(patches[index])
    patch_set = PatchSet(tuple(patches))
    with pytest.raises(PatchMismatchError) as caught:
        patch_set.apply(vllm_version())
    assert patches[index].target in str(caught.value)
    assert "install a known vLLM version" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert before == at_sites()
    assert [index] == [i for i, status in enumerate(patch_set.status(vllm_version())) if not status.ok]
    assert not any(status.applied for status in patch_set.status(vllm_version()))


def test_an_unknown_version_applies_nothing():
    """A vLLM that no patch was written against is refused, and the error names the known ones."""
    before = at_sites()
    with pytest.raises(PatchMismatchError, match=rf"vLLM 9\.9\.9 is not .*{vllm_version()}"):
        PATCHES.apply("9.9.9")
    assert before == at_sites()


@pytest.mark.parametrize("target", ["vllm.no_such_module:function", "vllm.v1.core.block_pool:NoSuchClass"])
def test_what_a_version_no_longer_has_differs(target):
    """A module or a name that is gone is told as one whose source differs, not as an error of an import."""
    gone = Patch("gone", target, {vllm_version(): "0" * 64}, "test", "test")
    with pytest.raises(PatchMismatchError, match=f"{target} differ"):
        PatchSet((gone,)).apply(vllm_version())


def test_what_a_failed_apply_replaced_can_be_undone():
    """When a replacement cannot be made, undo restores what was replaced before it."""

    def broken(original: Any) -> Any:
        raise RuntimeError("no")

    before = at_sites()
    first, second, *_ = (patch for patch in PATCHES.patches if patch.sites)
    patch_set = PatchSet((first, dataclasses.replace(second, replacement=broken)))
    with pytest.raises(RuntimeError, match="no"):
        patch_set.apply(vllm_version())
    patch_set.undo()
    assert before == at_sites()


def test_methods_are_put_back_as_they_are_stored():
    """A patched static method is restored as a static method, not as a plain function."""
    target = f"{__name__}:Owner.method"
    digest = source_hash(target)
    patch = Patch("m", target, {"1": digest}, "test", "test", (target,), lambda original: lambda: "replaced")
    stored = inspect.getattr_static(Owner, "method")
    patch_set = PatchSet((patch,))
    patch_set.apply("1")
    assert "replaced" == Owner.method()
    patch_set.undo()
    assert "original" == Owner().method() == Owner.method()
    assert stored is inspect.getattr_static(Owner, "method")


class Owner:
    @staticmethod
    def method() -> str:
        return "original"


class Build:
    """A build context that only notes what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def make_block_pool(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append("make_block_pool")

    def allocate_kv_cache(self, kv_cache_config: Any, layout: Any, kernel_block_sizes: Any) -> dict[str, Any]:
        self.calls.append("allocate_kv_cache")
        return {}


def test_patched_names_serve_vllm_itself_outside_a_build():
    """Only while a pooled engine is built do the patched names ask the pool; otherwise they are vLLM's."""
    from vllm.v1.core import kv_cache_coordinator
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.worker import gpu_model_runner

    PATCHES.apply(vllm_version())
    build = Build()
    assert isinstance(kv_cache_coordinator.BlockPool(4, True, 16), BlockPool)
    with building(build):
        assert current_build() is build
        assert kv_cache_coordinator.BlockPool(4, True, 16) is None
        assert {} == gpu_model_runner.allocate_kv_cache(None, None, None)
    assert ["make_block_pool", "allocate_kv_cache"] == build.calls
    assert current_build() is None
    assert isinstance(kv_cache_coordinator.BlockPool(4, True, 16), BlockPool)


def test_known_versions_are_written_as_identifiers():
    """known(v0_32_0=...) is the version 0.32.0, read-only."""
    hashes = known(v0_32_0="abc")
    assert {"0.32.0": "abc"} == dict(hashes)
    with pytest.raises(TypeError):
        hashes["0.33.0"] = "x"  # type: ignore[index]
