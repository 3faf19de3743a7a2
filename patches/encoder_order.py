# SPDX-License-Identifier: Apache-2.0
"""What a model hears or reads beside its prompts is encoded in the order of the batch, for model runner V1."""

from __future__ import annotations

import dataclasses
from typing import Any

from tokenpool.patches.base import Patch, known


def _replacement(original: Any) -> Any:
    def execute_in_order(runner: Any, scheduled: Any) -> Any:
        inputs = scheduled.scheduled_encoder_inputs
        if runner.model_config.is_encoder_decoder and len(inputs) > 1:
            rows = runner.input_batch.req_id_to_index
            ordered = {request_id: inputs[request_id] for request_id in sorted(inputs, key=rows.__getitem__)}
            scheduled = dataclasses.replace(scheduled, scheduled_encoder_inputs=ordered)
        return original(runner, scheduled)

    return execute_in_order


_TARGET = "vllm.v1.worker.gpu_model_runner:GPUModelRunner._execute_mm_encoder"

PATCH = Patch(
    name="encoder_order",
    target=_TARGET,
    hashes=known(
        v0_32_0="04cf849ba61fec021bbe0e0f9b15d80ca6b9696e34579d3448995b0cc577a75d",
        v0_29_0="40613f2f4827b04baae368de485677d3ded8e823f2f2b15fa023ed3ec10c7d10",
    ),
    reason=(
        "its outputs come in the order of scheduling, and cross-attention stores them in the order of the batch: "
        "requests that begin in one step get each other's audio when a finished one has left a row free before them"
    ),
    removal="vLLM orders the inputs of encoders by the batch, as its runner V2 does, or has removed runner V1",
    sites=(_TARGET,),
    replacement=_replacement,
)
