# SPDX-License-Identifier: Apache-2.0
"""Lets tokens that share a step with embeddings of prompts be embedded with the adapters of their own requests.

With `--enable-prompt-embeds` vLLM's first model runner embeds the tokens of a step alone and packed together, while its
adapters are given by row of the whole step. With `--enable-lora` that crashes the step, or, where the counts agree,
embeds a token with the adapter of another row. So all rows are embedded, those that are embeddings already as token 0,
and those of tokens are taken out. The second runner embeds all rows by itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def embed_in_place(runner: Any) -> None:
    """Do so in every step of a runner from now on; once per runner, when its model is loaded."""
    if not hasattr(runner, "is_token_ids") or not runner.model_config.enable_prompt_embeds:
        return
    if runner.lora_config is None or runner.supports_mm_inputs:  # models with media embed all rows
        return
    preprocess, embed = runner._preprocess, runner.model.embed_input_ids
    num_rows = 0

    def preprocess_step(scheduler_output: Any, *args: Any, **options: Any) -> Any:
        nonlocal num_rows
        num_rows = scheduler_output.total_num_scheduled_tokens
        try:
            return preprocess(scheduler_output, *args, **options)
        finally:
            num_rows = 0

    def embed_input_ids(input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        if len(input_ids) >= num_rows:
            return embed(input_ids, **options)
        rows = torch.from_numpy(np.nonzero(runner.is_token_ids.np[:num_rows])[0]).to(input_ids.device)
        tokens = torch.zeros(num_rows, dtype=input_ids.dtype, device=input_ids.device)
        tokens[rows] = input_ids
        return embed(tokens, **options)[rows]

    runner._preprocess, runner.model.embed_input_ids = preprocess_step, embed_input_ids
