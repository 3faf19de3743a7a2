# SPDX-License-Identifier: Apache-2.0
"""Variants of kinds that are equal: with an adapter for some requests, or with drafts by n-grams."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.helpers.cases import NGRAM
from tests.helpers.plain import Case
from tests.models.kind import Kind

RANK, ALPHA = 8, 16
ADAPTER, NGRAMS = "adapter", "n-grams"


def variants(name: str, kind: Kind, entry: Mapping[str, Any], case: Case, folder: Path) -> dict[str, Case]:
    """What is tried with a kind beside its plain requests, by feature."""
    if not entry.get("same") or kind.task or kind.media or kind.scheme or entry["alone"]:
        return {}
    found: dict[str, Case] = {}
    if not entry["inner_state"]:
        args = {**case.engine_args, "speculative_config": dict(NGRAM)}
        found[NGRAMS] = _renamed(replace(case, engine_args=args), f"{name}+{NGRAMS}")
    adapter = make_adapter(Path(case.model), folder / f"{name}-adapter") if entry["lora"] else None
    if adapter is not None:
        # An empty slot beside the adapter's: vllm#48421.
        args = {**case.engine_args, "enable_lora": True, "max_loras": 2, "max_lora_rank": RANK}
        requests = [replace(r, lora=str(adapter) if i % 2 else None) for i, r in enumerate(case.requests)]
        made = replace(case, engine_args=args, requests=requests)
        found[ADAPTER] = _renamed(made, f"{name}+{ADAPTER}")
    return found


def _renamed(case: Case, name: str) -> Case:
    requests = [replace(request, request_id=f"{name}-{i}") for i, request in enumerate(case.requests)]
    return replace(case, name=name, requests=requests)


def make_adapter(base: Path, directory: Path) -> Path | None:
    """Write an adapter for the query and value projections of the model in `base`; None if they have other names."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1)
    weights: dict[str, torch.Tensor] = {}
    with safe_open(base / "model.safetensors", "pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            if not name.endswith(("self_attn.q_proj.weight", "self_attn.v_proj.weight")):
                continue
            outputs, inputs = opened.get_slice(name).get_shape()
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            for factor, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
                values = torch.randn(shape, generator=generator) * 0.12
                weights[f"{prefix}.lora_{factor}.weight"] = values.to(torch.bfloat16)
    if not weights:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": RANK,
        "lora_alpha": ALPHA,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config) + "\n")
    save_file(weights, directory / "adapter_model.safetensors")
    return directory
