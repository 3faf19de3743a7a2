# SPDX-License-Identifier: Apache-2.0
"""Which drafters a model of the pool may have, and what is planned for them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conftest import TinyModels
from tests.helpers.cases import NGRAM
from tokenpool.config import ModelSpec
from tokenpool.demo.tiny_drafters import make_tiny_drafter
from tokenpool.errors import ConfigError, ModelRefusedError
from tokenpool.serve.launch.launch_plan import plan_added, plan_model
from tokenpool.serve.launch.poolability import check_config

pytestmark = pytest.mark.vllm


def _spec(tiny_models: TinyModels, drafter: dict[str, Any]) -> ModelSpec:
    words = ("--max-model-len", "512", "--speculative-config", json.dumps(drafter))
    return ModelSpec("a", str(tiny_models.path("llama")), words)


def test_what_was_not_tried_is_refused_by_name(tiny_models, monkeypatch):
    """Other methods, several ranks, and states on the CPU; n-grams for a dense model are not."""
    plan = plan_model(_spec(tiny_models, NGRAM))
    config = plan.engine_config()
    assert plan.engine_config().speculative_config.method == "ngram", "vLLM wrote into the flags"

    with monkeypatch.context() as patch:
        patch.setattr(type(config.model_config), "has_inner_state", property(lambda _: True))
        with pytest.raises(ModelRefusedError, match="whose layers keep a state.*remove --speculative-config"):
            check_config("a", config)
    with monkeypatch.context() as patch:
        patch.setattr(config.parallel_config, "tensor_parallel_size", 2)
        with pytest.raises(ModelRefusedError, match="speculative decoding with tensor parallelism"):
            check_config("a", config)
    config.speculative_config.method = "suffix"
    with pytest.raises(ModelRefusedError, match="speculative decoding by suffix.*choose one of ngram, draft_model"):
        check_config("a", config)


def test_a_draft_model_is_planned_with_its_target(tiny_models, tmp_path):
    """Its weights count, as one of the weights that move; n-grams and layers of the model itself have none."""
    drafter = make_tiny_drafter("draft_model", tiny_models.path("llama"), tmp_path / "draft")
    alone = plan_model(_spec(tiny_models, NGRAM)).weight_bytes

    assert alone < plan_model(_spec(tiny_models, drafter)).weight_bytes <= 2 * alone
    assert alone == plan_model(_spec(tiny_models, {"method": "mtp", "num_speculative_tokens": 1})).weight_bytes


def test_a_draft_model_that_is_not_there_is_told(tiny_models, tmp_path):
    """The line names the flag and the path."""
    drafter = {"method": "draft_model", "model": str(tmp_path / "gone"), "num_speculative_tokens": 2}
    with pytest.raises(ConfigError, match=f"--speculative-config: missing path {tmp_path}/gone"):
        plan_added(_spec(tiny_models, drafter), [])
