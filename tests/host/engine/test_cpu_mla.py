# SPDX-License-Identifier: Apache-2.0
"""MLA on the CPU: the pool's backend on strided blocks is the original on dense ones; what has none is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.plain import Case, RequestSpec, prompts_for
from tokenpool.errors import ModelRefusedError

pytestmark = pytest.mark.vllm

BLOCK, LATENT, ROPE = 16, 512, 64
WIDTH = LATENT + ROPE
NUM_LAYERS, LAYER = 3, 1
BLOCK_ELEMENTS = NUM_LAYERS * BLOCK * WIDTH
NEAR = [7, 2, 0, 5, 3]
FAR = [2**31 // BLOCK_ELEMENTS + i for i in NEAR]
"""Block ids that the kernel's 32-bit offsets reach, and ids that they do not."""


def _impl(kind: type):
    """An implementation with what the cache paths need of it."""
    impl = object.__new__(kind)
    impl.kv_lora_rank, impl.scale = LATENT, 0.05
    return impl


def _write_and_decode(impl, cache: torch.Tensor, ids: list[int], stale: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill three sequences of 33, 16 and 5 tokens and decode a query of each; returns what is read and written."""
    generator = torch.Generator().manual_seed(0)
    lengths, blocks = [33, 16, 5], [ids[:3], ids[3:4], ids[4:]]
    slots = [block[i // BLOCK] * BLOCK + i % BLOCK for n, block in zip(lengths, blocks, strict=True) for i in range(n)]
    latent = torch.randn(len(slots) + 1, LATENT, generator=generator).bfloat16()
    rope = torch.randn(len(slots) + 1, 1, ROPE, generator=generator).bfloat16()
    impl.do_kv_cache_update(latent, rope, cache, torch.tensor([*slots, -1]), "auto", None)
    table = torch.full((3, 4), stale, dtype=torch.int32)
    for row, block in enumerate(blocks):
        table[row, : len(block)] = torch.tensor(block)
    metadata = SimpleNamespace(decode=_decode_metadata(table, torch.tensor(lengths, dtype=torch.int32)))
    query = torch.randn(3, 4, WIDTH, generator=generator).bfloat16()
    out, _ = impl.forward_mqa(query, cache, metadata, None)
    return out, cache[ids].clone()


def _decode_metadata(table: torch.Tensor, seq_lens: torch.Tensor):
    from vllm.model_executor.layers.attention.mla_attention import MLACommonDecodeMetadata

    return MLACommonDecodeMetadata(table, seq_lens, None)


@pytest.mark.parametrize("ids", [NEAR, FAR], ids=["near", "far"])
def test_strided_blocks_give_what_dense_ones_give(ids: list[int]) -> None:
    """Bytes written and outputs read are equal bit for bit, also for blocks more than 4 GiB from the first."""
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLAImpl

    from tokenpool.host.engine.cpu_mla import PooledCPUMLAImpl

    dense = torch.zeros(max(NEAR) + 1, BLOCK, WIDTH, dtype=torch.bfloat16)
    expected = _write_and_decode(_impl(CPUMLAImpl), dense, NEAR, stale=0)
    # Address range only: the pages that are not written are never backed.
    arena = torch.empty((max(ids) + 1) * BLOCK_ELEMENTS, dtype=torch.bfloat16)
    blocks = arena.view(max(ids) + 1, NUM_LAYERS, BLOCK, WIDTH)
    for block_id in ids:
        blocks[block_id] = 0
    actual = _write_and_decode(_impl(PooledCPUMLAImpl), blocks[:, LAYER], ids, stale=max(ids))

    assert all(torch.equal(want, got) for want, got in zip(expected, actual, strict=True))
    assert not any(blocks[block_id, other].any() for block_id in ids for other in (0, 2)), "another layer was written"


def test_a_backend_without_the_layout_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line names backend and fix; the pages are back and the model that was there goes on."""
    from tests.helpers.pooled import PooledModels
    from tokenpool.demo.tiny_models import ENGINE_ARGS, make_tiny_model
    from tokenpool.host.load import model_build

    args = {"max_model_len": 512}
    requests = [RequestSpec(f"llama-{i}", prompt, max_tokens=10) for i, prompt in enumerate(prompts_for(0, 2))]
    llama = Case("llama", str(make_tiny_model("llama", tmp_path / "llama")), args, requests)
    model = str(make_tiny_model("deepseek_v2", tmp_path / "deepseek_v2"))
    deepseek = Case("deepseek_v2", model, {**args, **ENGINE_ARGS["deepseek_v2"]}, [])
    pooled = PooledModels(32 << 20, 256 << 10)
    pooled.add(llama)
    ledger = pooled.host.ledger
    before = ledger.snapshot()
    # AMX_MLA needs a processor with AMX; CPU_MLA stands in for it.
    monkeypatch.setattr(model_build, "_LAYOUT_FAILS", {"CPU_MLA": model_build._LAYOUT_FAILS["AMX_MLA"]})
    with pytest.raises(ModelRefusedError) as caught:
        pooled.add(deepseek)

    message = str(caught.value)
    assert "model 'deepseek_v2' cannot be pooled: attention backend CPU_MLA without KV layout" in message
    assert message.endswith("; choose --attention-backend CPU_MLA")
    assert "\n" not in message
    assert before == ledger.snapshot()
    pooled.submit(llama)
    pooled.run()
    assert [10, 10] == [len(result.tokens) for result in pooled.results("llama").values()]
    pooled.check()
    pooled.close()
