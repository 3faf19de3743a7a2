# SPDX-License-Identifier: Apache-2.0
"""What the encoder of a multimodal model leaves on the device: its outputs, which vLLM keeps between steps.

The scheduler counts them in embeddings and says which ones go; the runner has the tensors. They are in no page and do
not move: an output is needed until the prompt behind it is computed, and may serve the next request with the same
image. So the most that there can be is booked as fixed bytes of the model, wherever its weights are.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.encoder_budget import MultiModalBudget


def capacity_bytes(core: Any) -> int:
    """The most that the outputs kept by an engine's runner take; 0 for a model without an encoder.

    vLLM counts no bytes. An output has the width of the embeddings, times one more for each further layer of the
    encoder that some models add to the layers of their decoder ("deepstack").
    """
    model, count = core.vllm_config.model_config, core.scheduler.encoder_cache_manager.cache_size
    if not count:
        return 0
    vision = getattr(model.hf_config, "vision_config", None)
    layers = getattr(vision, "deepstack_visual_indexes", None) or ()
    width = model.get_inputs_embeds_size() * (1 + len(layers))
    return count * width * model.dtype.itemsize


def held_bytes(core: Any) -> int:
    """What the outputs take that the runner has now."""
    return sum(output.nbytes for output in _outputs(core.model_executor.driver_worker.worker).values())


def check(core: Any) -> None:
    """Raise AssertionError if the outputs take more than is booked for them."""
    held, capacity = held_bytes(core), capacity_bytes(core)
    assert held <= capacity, f"outputs of an encoder take {held} bytes, {capacity} are booked"


def forget_all(core: Any) -> None:
    """Drop all outputs, between two steps and with no request running: those in need of one compute it again.

    After a crashed step scheduler and runner disagree: outputs are entered when a step is scheduled, and those that it
    was told to drop are known to nobody else.
    """
    core.scheduler.reset_encoder_cache()
    core.model_executor.collective_rpc(_clear)


def _clear(worker: Any) -> None:
    _outputs(worker).clear()


def longest_input(core: Any) -> int:
    """Encoder tokens to whose KV the decoder of one request attends, at most; 0 unless there are such layers."""
    if not core.vllm_config.model_config.is_encoder_decoder:
        return 0
    budget = MultiModalBudget(core.vllm_config, MULTIMODAL_REGISTRY, enable_cache=False)
    return sum(length * budget.mm_max_items_per_prompt[kind] for kind, length in budget.mm_max_toks_per_item.items())


def input_of(request: Any) -> int:
    """Encoder tokens of a request."""
    return sum(request.get_num_encoder_embeds(index) for index in range(len(request.mm_features)))


def _outputs(worker: Any) -> dict[str, torch.Tensor]:
    cache = worker.model_runner.encoder_cache
    return getattr(cache, "encoder_outputs", cache) or {}  # the second runner's is an object, or None
