# SPDX-License-Identifier: Apache-2.0
"""Linear layers that round a row alike in every step, for tests in which other requests share it than in the reference.

vLLM's kernel for packed weights takes other instructions for up to four rows than for more. Sums end in another order
there: on a CPU with AMX about one output of 128 columns in 16,000 is the next bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

LEAST_ROWS = 5
"""From so many on, and in torch's own kernel from two, what is in a row does not depend on how many there are."""


def round_alike(model: torch.nn.Module) -> int:
    """Let no linear layer of a model on the CPU compute fewer than `LEAST_ROWS` rows; returns how many there are."""
    layers = [layer for layer in model.modules() if hasattr(layer, "cpu_linear")]
    for layer in layers:
        layer.cpu_linear = partial(padded_linear, layer.cpu_linear)
    return len(layers)


def padded_linear(linear: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any) -> torch.Tensor:
    """`linear` of `x` (..., k) and zero rows behind it, which are cut off again."""
    rows = x.reshape(-1, x.shape[-1])
    missing = LEAST_ROWS - len(rows)
    if missing <= 0:
        return linear(x, *args)
    return linear(torch.nn.functional.pad(rows, (0, 0, 0, missing)), *args)[:-missing].reshape(*x.shape[:-1], -1)
