# SPDX-License-Identifier: Apache-2.0
"""How equal a pooled model's logprobs have to be to plain vLLM's: bit for bit where the CPU's kernels allow it.

On a CPU without AVX-512 (seen on an AMD EPYC of the first generation) vLLM's CPU attention rounds otherwise when the KV
lies elsewhere: tokens are the same, and of some streams the logprobs move by up to one unit of a bfloat16 logit.
"""

from __future__ import annotations

from typing import Any

TOLERANCE = 0.05


def exactly(values: list[float]) -> Any:
    """What is compared with `==` to the logprobs of another run."""
    import pytest
    import torch

    if torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return values
    return pytest.approx(values, abs=TOLERANCE)
