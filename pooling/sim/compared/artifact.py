# SPDX-License-Identifier: Apache-2.0
"""Aegaeon's published simulator, like for like: its costs, and its devices as `DeviceSpec`.

Source: the artifact's coefficients (`costs.artifact_costs`), and constants and rules as observed from its runs.
"""

from __future__ import annotations

import functools
import math

from tokenpool.sim.costs import artifact_costs
from tokenpool.sim.workload import ModelCosts

LINK_BYTES_PER_S = 16 * 2**30
"""Its PCIe; its GB is 2**30 bytes."""
MEMORY_BYTES = 80 * 2**30
KINDS = frozenset(artifact_costs())
"""Kinds of models that it has costs for."""
GIVE_UP_S = 15.0
"""Age at which a request without a token fails, under its ServerlessLLM policies; looked at only at arrivals."""
_KV_BYTES_PER_TOKEN = 2**19
"""What a decode turn copies per token of context, whatever the model."""


class ArtifactCosts(ModelCosts):
    """Whole milliseconds, cut off; steps are predicted for a batch of -1, so they do not depend on the batch."""

    __slots__ = ()

    def prefill(self, num_tokens: int, squares: int) -> float:
        """See `ModelCosts.prefill`."""
        return _whole_ms(super().prefill(num_tokens, squares))

    def step(self, num_requests: int, context_tokens: float) -> float:
        """See `ModelCosts.step`."""
        return _whole_ms(super().step(-1, context_tokens))


def _whole_ms(seconds: float) -> float:
    return max(1, math.floor(seconds * 1e3 + 1e-9)) / 1e3


@functools.cache
def costs(kind: str) -> ArtifactCosts:
    """The costs of `qwen2.5-7b`, `yi-9b` or `llama2-13b`."""
    return ArtifactCosts(*artifact_costs()[kind].costs._replace(kv_bytes_per_token=float(_KV_BYTES_PER_TOKEN)))
