# SPDX-License-Identifier: Apache-2.0
"""Embeddings of prompts beside tokens, with and without adapters: each request has what it has alone."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.plain import Case, RequestSpec, prompts_for

pytestmark = pytest.mark.vllm

ENGINE: dict[str, Any] = {
    "enable_lora": True, "max_loras": 3, "max_lora_rank": 8, "enable_prompt_embeds": True,
    "enable_prefix_caching": False,
}  # fmt: skip
EMBEDDED = "model.embed_tokens.weight"


def with_embeddings(adapter: Path, folder: Path, seed: int) -> str:
    """A copy of an adapter that changes the embeddings of tokens too."""
    folder.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"].append("embed_tokens")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights, generator = load_file(adapter / "adapter_model.safetensors"), torch.Generator().manual_seed(seed)
    for factor, shape in (("A", (8, 512)), ("B", (128, 8))):
        values = torch.randn(shape, generator=generator) * 0.12
        weights[f"base_model.model.model.embed_tokens.lora_embedding_{factor}"] = values.to(torch.bfloat16)
    save_file(weights, folder / "adapter_model.safetensors")
    return str(folder)


class Asked:
    """A pool of one model that is asked with tokens and with embeddings, and what it put out."""

    def __init__(self, pool: Any, case: Case, adapters: list[str]) -> None:
        self.pool, self.case, self.adapters = pool, case, adapters
        self.embeddings = load_file(Path(case.model, "model.safetensors"))[EMBEDDED]

    def submit(self, name: str, request: RequestSpec, *, embedded: bool) -> None:
        """Queue a request under another name."""
        from vllm.v1.engine import EngineCoreRequest, EngineCoreRequestType

        from tests.helpers.plain import _lora_request, _params
        from tests.helpers.pooled import _Collected

        core = self.pool.host.models[self.case.name].core
        prompt = request.prompt_token_ids
        message = EngineCoreRequest(
            request_id=name,
            prompt_token_ids=None if embedded else prompt,
            prompt_embeds=self.embeddings[torch.tensor(prompt)] if embedded else None,
            mm_features=None,
            sampling_params=_params(request, pooling=False),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=_lora_request(self.adapters, request.lora),
            cache_salt=None,
            data_parallel_rank=None,
        )
        queued = core.preprocess_add_request(message)
        self.pool._collected[self.case.name, name] = _Collected(request=queued[0])
        core.input_queue.put((EngineCoreRequestType.ADD, queued))

    def tokens(self, name: str) -> list[int]:
        return self.pool.results(self.case.name)[name].tokens


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory):
    from tests.helpers.pooled import PooledModels
    from tokenpool.demo.tiny_models import make_tiny_lora, make_tiny_model

    folder = tmp_path_factory.mktemp("models")
    model = make_tiny_model("llama", folder / "llama")
    adapters = sorted(
        with_embeddings(make_tiny_lora(model, folder / f"a{i}", seed=i), folder / f"b{i}", i) for i in range(2)
    )
    case = Case("llama", str(model), ENGINE, [])
    pool = PooledModels(96 << 20, 1 << 20)
    pool.add(case)
    yield Asked(pool, case, adapters)
    pool.close()


@pytest.mark.parametrize("seed", range(6))
def test_embeddings_of_prompts_share_steps_with_tokens_and_adapters(asked: Asked, seed: int) -> None:
    """Whoever comes beside whom: no step crashes, and each has the tokens that it has alone."""
    draw = random.Random(seed)
    requests = {
        f"{seed}-{i}": (RequestSpec("", prompt, 12, lora=draw.choice([None, *asked.adapters])), draw.random() < 0.5)
        for i, prompt in enumerate(prompts_for(seed, 7, lengths=(5, 40, 130)))
    }
    alone = {}
    for name, (request, embedded) in requests.items():
        asked.submit(f"alone-{name}", request, embedded=embedded)
        asked.pool.run()
        alone[name] = asked.tokens(f"alone-{name}")
    for name, (request, embedded) in requests.items():
        asked.submit(name, request, embedded=embedded)
        for _ in range(draw.choice((0, 0, 1, 3))):
            asked.pool.run_once()
    asked.pool.run()

    assert alone == {name: asked.tokens(name) for name in requests}
    assert asked.pool.host.models["llama"].core.counters.crashed_steps == 0
    assert all(len(set(tokens)) > 3 for tokens in alone.values())
    asked.pool.check()
