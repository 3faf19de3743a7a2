# SPDX-License-Identifier: Apache-2.0
"""The script that mends PyPI's torchvision, on packages made up for it, and what the set-up has left here."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.cpu_torchvision import DECLARATIONS

pytestmark = pytest.mark.deploy

SCRIPT = Path(__file__).parents[2] / "deploy" / "cpu_torchvision.py"
FAKE_TORCH = """
declared = set()

class library:
    class Library:
        def __init__(self, *names): ...
        def define(self, schema): declared.add(schema.partition("(")[0])
"""
EXTENSION = "import torch\n\ndef _has_ops():\n    return {has_library}\n"
INIT = "import torch\nfrom torchvision import extension\nassert {wanted} <= torch.declared\n"


def mend(folder: Path, wanted: set[str], has_library: bool = False) -> tuple[int, str]:
    """Run the script on a torchvision that needs the operators `wanted`; returns its status and extension.py."""
    package = folder / "torchvision"
    package.mkdir(exist_ok=True)
    (folder / "torch.py").write_text(FAKE_TORCH)
    (package / "__init__.py").write_text(INIT.format(wanted=wanted or "set()"))
    if not (package / "extension.py").exists():
        (package / "extension.py").write_text(EXTENSION.format(has_library=has_library))
    env = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=env, capture_output=True, timeout=60)
    return done.returncode, (package / "extension.py").read_text()


def test_what_is_missing_is_declared_once(tmp_path: Path) -> None:
    """A second run finds that it imports, and changes nothing."""
    mended = 0, EXTENSION.format(has_library=False) + DECLARATIONS
    assert mended == mend(tmp_path, {"nms", "qnms"})
    assert mended == mend(tmp_path, {"nms", "qnms"})


def test_one_that_imports_is_left_alone(tmp_path: Path) -> None:
    """PyTorch's CPU build, whose library loads."""
    assert (0, EXTENSION.format(has_library=True)) == mend(tmp_path, set(), has_library=True)


def test_one_that_cannot_be_helped_is_left_alone_and_told(tmp_path: Path) -> None:
    """The exit status says that it should go."""
    assert (1, EXTENSION.format(has_library=False)) == mend(tmp_path, {"nms", "another"})


def test_torchvision_imports_here() -> None:
    """What `make setup` has installed, be it PyTorch's build or PyPI's."""
    assert importlib.import_module("torchvision.transforms.v2.functional").resize
