# SPDX-License-Identifier: Apache-2.0
"""Lets PyPI's torchvision, which is built for CUDA, be imported where torch is built for the CPU.

    python deploy/cpu_torchvision.py      # with the interpreter of the environment; does nothing if it imports already

Its compiled library does not load there, which it bears. But it describes two operators of that library to torch
without looking whether they are there, so `import torchvision` ends; and with it that of transformers, whatever it is
for. The library has operators for detection, which vLLM does not use: the transforms are Python. So these two are
declared in torchvision's own file, where every process finds them, plain vLLM's too. PyTorch's CPU build needs none of
this, and is the better choice where its index can be reached. Exit status 1: it cannot be helped, remove torchvision.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

DECLARATIONS = """
# Added by tokenpool's deploy/cpu_torchvision.py: what _meta_registrations.py describes must be there.
if not _has_ops():
    _declared_operators = torch.library.Library("torchvision", "FRAGMENT")
    _declared_operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared_operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def imports() -> bool:
    """Whether a new process of this interpreter can import torchvision."""
    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, check=False)
    return done.returncode == 0


def main() -> int:
    """Declare the operators if torchvision is installed and does not import without; returns the exit status."""
    spec = find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations or imports():
        return 0
    file = Path(spec.submodule_search_locations[0], "extension.py")
    before = file.read_text()
    if DECLARATIONS not in before:
        file.write_text(before + DECLARATIONS)
        if imports():
            return 0
        file.write_text(before)
    print("torchvision cannot be imported, and that its operators are missing is not the reason", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
