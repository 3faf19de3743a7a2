# SPDX-License-Identifier: Apache-2.0
"""What a build refuses by name, and what it leaves in the null block; the arena is real, the engine is not there."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from tests.helpers.swapping import PAGE, make_allocator
from tokenpool.errors import ModelRefusedError
from tokenpool.host.load import model_build
from tokenpool.host.load.model_build import ModelBuild
from tokenpool.memory.devices.cpu import CpuDevice

pytestmark = pytest.mark.vllm

CONFIG = SimpleNamespace(
    compilation_config=SimpleNamespace(static_forward_context={}),
    cache_config=SimpleNamespace(block_size=128),
    load_config=SimpleNamespace(load_format="auto"),
    model_config=SimpleNamespace(quantization="fp8"),  # so that nothing is known of its checkpoint
    parallel_config=SimpleNamespace(world_size=1),
    speculative_config=None,
)


@pytest.fixture
def build() -> ModelBuild:
    return ModelBuild("m", CONFIG, make_allocator(8, CpuDevice(keeps_bytes=True)), 1)


def test_what_a_warm_up_wrote_into_the_null_block_is_zeroed(build):
    """Kernels read it through tables of other requests: NaN there would reach their tokens."""
    build.clear_null_block()  # a model without KV has none
    arena = build._allocator.arena
    build.view = arena.open_view("m", 4096)
    arena.device.fill(arena.base + build.view.offset, 4096, 0xFF)
    build.clear_null_block()
    assert bytes(4096) == ctypes.string_at(arena.base + build.view.offset, 4096)


def test_blocks_that_the_kernels_would_split_are_refused_by_name(build, monkeypatch):
    """vLLM's own words, the sizes, and what to change; not an error of a host."""

    def views(*args: object) -> None:
        raise ValueError("block is not dense")

    monkeypatch.setattr(model_build, "kv_cache_views", views)
    tensors = [SimpleNamespace(block_stride=4096, layers=["a"])]
    group = SimpleNamespace(layer_names=["a"], kv_cache_spec=SimpleNamespace())
    config = SimpleNamespace(kv_cache_tensors=tensors, kv_cache_groups=[group])
    with pytest.raises(ModelRefusedError, match=r"blocks of 128 tokens with kernels for \[64\].*not dense.*block-size"):
        build.allocate_kv_cache(config, "BLHNC", [64])


@pytest.mark.parametrize(("fixed", "refused"), [(PAGE, False), (2 * PAGE, True), (10 * PAGE, True)])
def test_a_model_whose_weights_stay_is_refused_on_a_gpu(build, monkeypatch, fixed, refused):
    """More than a tenth of them, and more than a page; on the CPU it is accounted and told."""
    build._store = SimpleNamespace(ledger=build._allocator.ledger)
    movable = 10 * PAGE
    build._refuse_mostly_fixed({"w13": fixed}, movable)
    monkeypatch.setattr(model_build, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    if not refused:
        build._refuse_mostly_fixed({"w13": fixed}, movable)
        return
    with pytest.raises(ModelRefusedError, match="w13.*moe-backend marlin"):
        build._refuse_mostly_fixed({"w13": fixed}, movable)


@pytest.mark.parametrize(
    ("kind", "prefix_cache", "told"),
    [
        ("MAMBA1", False, "Mamba 1 layers, for which vLLM has no CPU kernel; serve it on a GPU"),
        ("MAMBA2", True, "the prefix cache of Mamba 2 layers.*add --no-enable-prefix-caching"),
        ("MAMBA2", False, None),
        ("GDN_ATTN", True, None),
        ("SHORT_CONV", True, None),
        ("LINEAR", True, None),
    ],
)
def test_states_without_a_kernel_are_refused_on_the_cpu_alone(build, monkeypatch, kind, prefix_cache, told):
    """By name, and only what would end at the first request; a GPU is let try all, untested."""
    layer = SimpleNamespace(mamba_type=SimpleNamespace(name=kind))
    build._config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context={"layers.0": layer, "layers.1": object()}),
        cache_config=SimpleNamespace(enable_prefix_caching=prefix_cache),
    )
    if told is None:
        build._refuse_states()
    else:
        with pytest.raises(ModelRefusedError, match=told):
            build._refuse_states()
    monkeypatch.setattr(model_build, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    build._refuse_states()
