# SPDX-License-Identifier: Apache-2.0
"""Writes the exact packages of an image with their hashes, from what pip resolves here.

    python -m deploy.lock cpu      # deploy/locks/cpu.txt; needs the index that has torch's CPU build
    python -m deploy.lock cuda     # deploy/locks/cuda.txt; downloads the CUDA packages

A lock is good for the platform and the Python that it is written on: those of the image, x86_64 and CPython 3.11.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "deploy" / "locks"
NOT_FOR_CPU = frozenset({"torchaudio", "torchcodec", "triton"})
"""The CUDA builds of the first two break the import of vLLM's CPU build, which needs none of them; torchvision's can be
mended. Triton has no CPU backend and is a quarter of the image."""


def lock_text(report: Mapping[str, Any], device: str, where: str) -> str:
    """The lines of a requirements file, from pip's installation report."""
    lines = [
        f"# Written by `python -m deploy.lock {device}` on {where}: what the image is made of, for",
        "# pip install --no-deps --require-hashes -r; do not edit.",
    ]
    found = {}
    for item in report["install"]:
        name = item["metadata"]["name"].lower().replace("_", "-").replace(".", "-")
        if name == "tokenpool" or (device == "cpu" and name in NOT_FOR_CPU):
            continue
        found[name] = item["metadata"]["version"], item["download_info"]["archive_info"]["hashes"]["sha256"]
    lines += [f"{name}=={version} --hash=sha256:{digest}" for name, (version, digest) in sorted(found.items())]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Resolve the extras of a device and write its lock."""
    if sys.argv[1:] not in (["cpu"], ["cuda"]):
        print("usage: python -m deploy.lock cpu|cuda", file=sys.stderr)
        return 2
    device = sys.argv[1]
    with tempfile.NamedTemporaryFile() as report:
        words = ["pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", report.name]
        subprocess.run([sys.executable, "-m", *words, f"{ROOT}[{device},audio,cluster]"], check=True)
        found = json.load(report)
    where = f"{platform.machine()} with Python {platform.python_version()}"
    (FOLDER / f"{device}.txt").write_text(lock_text(found, device, where))
    return 0


if __name__ == "__main__":
    sys.exit(main())
