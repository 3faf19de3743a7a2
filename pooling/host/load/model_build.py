# SPDX-License-Identifier: Apache-2.0
"""Builds one engine inside the host: its KV cache becomes a view of the arena, its block pool one of slabs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.kv_cache_interface import (
    KVCacheConfig,
    UniformTypeKVCacheSpecs,
    create_kv_cache_views,
)

from tokenpool.errors import ModelRefusedError
from tokenpool.host.kv.slab_block_pool import SlabBlockPool
from tokenpool.host.load.adoption_check import AdoptionCheck
from tokenpool.host.load.checkpoint_reload import checkpoint_reload
from tokenpool.host.load.device_choice import WORKERS
from tokenpool.host.load.model_tensors import fixed_tensors, models_of, movable_tensors
from tokenpool.host.load.shared_weights import SharedWeights
from tokenpool.memory.arena import ArenaView
from tokenpool.memory.loader_memory import LoaderMemory
from tokenpool.memory.slab_allocator import SlabAllocator
from tokenpool.memory.weights import WeightStore

logger = logging.getLogger(__name__)

LAYOUT = "BLHNC"
_LAYOUT_WORKS = frozenset({"CPU_ATTN"})
"""Backends that declare only their default layout but whose kernels take block strides: proven by the exactness
tests. CPU_ATTN's kernel reads stride(0), and the other dimensions stay dense inside a block."""
_LAYOUT_FAILS = {"AMX_MLA": "choose --attention-backend CPU_MLA"}
"""Backends that declare any layout but view their cache as one dense run of tokens, and what to do instead. CPU_MLA
does so too and is replaced: see cpu_mla.py."""

_MOST_FIXED = 0.1
"""Share of a model's weights that may stay on a GPU when the others leave it."""

_STATES_WITHOUT_CPU_KERNEL = {"MAMBA1": "Mamba 1"}
"""Kinds of layers that keep a state, by vLLM's names."""


def set_for_pool(config: VllmConfig, span_bytes: int) -> None:
    """Ask for a worker of ours, and for KV of the pool's layout over so many bytes of addresses."""
    config.cache_config.kv_cache_layout = LAYOUT
    config.cache_config.kv_cache_memory_bytes = span_bytes
    config.parallel_config.worker_cls = WORKERS[config.device_config.device_type]


class ModelBuild:
    """The `BuildContext` of one model; also undoes what was done when the build fails.

    What the weight store was given, whoever owns the store takes out of it.
    """

    def __init__(
        self,
        name: str,
        vllm_config: VllmConfig,
        allocator: SlabAllocator,
        floor: int,
        store: WeightStore | None = None,
        enter_phase: Callable[[str], None] = lambda phase: None,
        pause: Callable[[], None] = lambda: None,
        shared: SharedWeights | None = None,
    ) -> None:
        self.name = name
        self.enter_phase = enter_phase
        self.pause = pause
        self.give_up_loading: Callable[[], None] = lambda: None
        """Called when the memory that the loader filled is not needed any more, before pages take its place."""
        self.view: ArenaView | None = None
        self.pool: SlabBlockPool | None = None
        self.movable_weights = store is not None
        self._config = vllm_config
        self._allocator = allocator
        self._floor = floor
        self._shared = shared or SharedWeights(name, vllm_config, None, pause)
        self._store = store
        """Where the weights go after loading; None = they stay where the loader puts them."""

    def expect_blocks(self, block_bytes: int) -> None:
        """Raise CapacityError for blocks that pages cannot hold, before minutes go into their model."""
        # Another rank of a group would wait for this one in its warm-up.
        if block_bytes and self._config.parallel_config.world_size == 1:
            self._allocator.arena.place_of(self.name, block_bytes)

    def make_block_pool(self, num_gpu_blocks: int, *args: Any, **kwargs: Any) -> BlockPool:
        """A pool on slabs, or vLLM's own for a model that keeps no KV cache."""
        if self.view is None:
            return BlockPool(num_gpu_blocks, *args, **kwargs)
        if self.pool is not None:
            raise ModelRefusedError(self.name, "a second block pool (host-resident KV)", "serve it outside the pool")
        self.pool = SlabBlockPool(self._allocator, self.view, self._floor, num_gpu_blocks, *args, **kwargs)
        return self.pool

    def allocate_kv_cache(
        self, kv_cache_config: KVCacheConfig, layout: Any, kernel_block_sizes: list[int] | None
    ) -> dict[str, Any]:
        """Layer name -> (num_blocks, heads, states, content) view of the arena with the model's block stride."""
        if not kv_cache_config.kv_cache_tensors:
            return {}
        self._refuse_kinds(kv_cache_config)
        self._refuse_backends()
        strides = {tensor.block_stride for tensor in kv_cache_config.kv_cache_tensors}
        if len(strides) != 1:
            raise ModelRefusedError(self.name, f"KV caches of several block strides {sorted(strides)}", "")
        arena = self._allocator.arena
        self.view = arena.open_view(self.name, strides.pop())
        try:
            return kv_cache_views(arena.tensor(self.view), kv_cache_config, layout, kernel_block_sizes)
        except ValueError as error:  # such as blocks of which a kernel makes several
            size, kernels = self._config.cache_config.block_size, sorted(set(kernel_block_sizes or ()))
            feature = f"KV blocks of {size} tokens with kernels for {kernels} ({error})"
            raise ModelRefusedError(self.name, feature, "give the size of a kernel's as --block-size") from error

    def clear_null_block(self) -> None:
        """Zero what a warm-up wrote into it: kernels read it where a request has no block, and mask it only then."""
        if self.view is not None:
            arena = self._allocator.arena
            arena.device.fill(arena.base + self.view.offset, self.view.block_bytes, 0)

    def adopt_weights(self, model_runner: Any) -> None:
        """Move the weights of the model, and of its draft model, into the store; nothing without one.

        What stays behind is accounted there. Raises ModelRefusedError for a model that does not compute the same
        afterwards, or that would end its engine.
        """
        self._refuse_states()
        if self._store is None:
            return
        if self._config.parallel_config.enable_eplb:
            raise ModelRefusedError(self.name, "experts that are rearranged at run time", "drop --enable-eplb")
        models, shared = models_of(model_runner), self._shared
        shared.loaded()
        # Tried now and not when host memory is short: here it needs no second copy, and nobody waits for a token.
        # The other ranks of a group do not read the checkpoint again: their host copies stay, and so does ours.
        alone = self._config.parallel_config.world_size == 1
        reload = checkpoint_reload(models, self._config) if alone else None
        # A forward pass of a group needs all its ranks, and those of the others are in the midst of `adopt`.
        layers = self._config.compilation_config.static_forward_context.values()
        check = AdoptionCheck(model_runner, models, layers) if alone else None
        if check is not None and not shared.is_mapped:
            check.before()
            self.pause()
        tensors = movable_tensors(*models)
        loaded = LoaderMemory(tensors)

        def give_up() -> None:
            loaded.poison(fill=not shared.is_mapped)
            self.give_up_loading()

        self._store.adopt(
            self.name,
            tensors,
            reload,
            verify_reload=True,
            advance=lambda nbytes: self.pause() if alone else None,  # ranks have no two tensors at the same time
            give_up=give_up,
            known=shared.known,
            copy=shared.take(),
        )
        if check is not None:
            self._refuse_difference(check)
        loaded.free()
        fixed = fixed_tensors(*models)
        self._account_fixed(fixed)
        shared.adopted(self._store, check.outputs if check is not None else "", sum(fixed.values()))

    def _refuse_difference(self, check: AdoptionCheck) -> None:
        if self._shared.is_mapped:
            check.alone()
            self._shared.refuse_difference(check.outputs)
            return
        layer = check.first_difference()
        logger.info("weights moved and compared model=%s seconds=%.3f", self.name, check.seconds)
        if layer is not None:
            feature = f"movable weights: {layer} still reads the memory that its weights have left"
            raise ModelRefusedError(self.name, feature, "set weights: fixed for its pool, or serve it outside")

    def _account_fixed(self, fixed: dict[str, int]) -> None:
        assert self._store is not None
        nbytes = sum(fixed.values())
        self._refuse_mostly_fixed(fixed, self._store.bytes_of(self.name))
        self._store.fixed.add(self.name, nbytes, self._store.make_room)
        if nbytes > self._store.ledger.page_size:
            largest = max(fixed, key=lambda path: fixed[path])
            logger.warning(
                "weights that cannot move stay on the device model=%s bytes=%d movable=%d largest=%s",
                self.name,
                nbytes,
                self._store.bytes_of(self.name),
                largest,
            )

    def _refuse_mostly_fixed(self, fixed: dict[str, int], movable: int) -> None:
        """On a GPU, refuse weights of which much would stay: some kernels keep theirs in objects of their own."""
        assert self._store is not None
        nbytes = sum(fixed.values())
        if current_platform.is_cpu() or nbytes <= self._store.ledger.page_size:
            return
        if nbytes > _MOST_FIXED * (nbytes + movable):
            largest = max(fixed, key=lambda path: fixed[path])
            feature = f"movable weights: {nbytes} of {nbytes + movable} bytes cannot move, the most of them {largest}"
            raise ModelRefusedError(self.name, feature, "try --moe-backend marlin, or set weights: fixed for its pool")

    def undo(self) -> None:
        """Give back what a failed build, or a model that is removed, holds of the arena."""
        if self.pool is not None:
            self._allocator.unregister(self.name)
        if self.view is not None:
            self._allocator.arena.close_view(self.name)
        self.view = self.pool = None

    def _refuse_kinds(self, kv_cache_config: KVCacheConfig) -> None:
        for tensor in kv_cache_config.kv_cache_tensors:
            _, spec = _spec_of(kv_cache_config, tensor.layers[0])
            if not getattr(spec, "has_layer_views", True):  # vLLM 0.29 has no other kind
                raise ModelRefusedError(self.name, f"KV cache kind {type(spec).__name__}", "")

    def _refuse_states(self) -> None:
        """Refuse layers with which vLLM's CPU build ends at the first request."""
        if not current_platform.is_cpu():
            return
        layers = self._config.compilation_config.static_forward_context.values()
        kinds = {layer.mamba_type.name for layer in layers if hasattr(layer, "mamba_type")}
        for kind in kinds & _STATES_WITHOUT_CPU_KERNEL.keys():
            feature = f"{_STATES_WITHOUT_CPU_KERNEL[kind]} layers, for which vLLM has no CPU kernel"
            raise ModelRefusedError(self.name, feature, "serve it on a GPU")
        if "MAMBA2" in kinds and self._config.cache_config.enable_prefix_caching:
            feature = "the prefix cache of Mamba 2 layers, with which vLLM on the CPU ends at the first request"
            raise ModelRefusedError(self.name, feature, "add --no-enable-prefix-caching to its args")

    def _refuse_backends(self) -> None:
        for layer in self._config.compilation_config.static_forward_context.values():
            if not hasattr(layer, "get_attn_backend"):
                continue
            backend = layer.get_attn_backend()
            layouts = backend.supported_kv_cache_layouts()
            declared = layouts is None or LAYOUT in {layout.name for layout in layouts}
            name = backend.get_name()
            if name in _LAYOUT_FAILS or not (declared or name in _LAYOUT_WORKS):
                hint = _LAYOUT_FAILS.get(name, "choose another --attention-backend or serve it outside the pool")
                raise ModelRefusedError(self.name, f"attention backend {name} without KV layout {LAYOUT}", hint)


def kv_cache_views(
    buffer: torch.Tensor, kv_cache_config: KVCacheConfig, layout: Any, kernel_block_sizes: list[int] | None
) -> dict[str, Any]:
    """Layer name -> (num_blocks, heads, states, content) view of `buffer`, flat bytes that start at block 0."""
    caches: dict[str, Any] = {}
    for tensor in kv_cache_config.kv_cache_tensors:
        group_id, spec = _spec_of(kv_cache_config, tensor.layers[0])
        views = create_kv_cache_views(
            buffer,
            spec,
            kv_cache_config.num_blocks,
            layout,
            tensor,
            kernel_block_size=kernel_block_sizes[group_id] if kernel_block_sizes else None,
        )
        caches.update(zip(tensor.layers, views, strict=True))
    return caches


def _spec_of(kv_cache_config: KVCacheConfig, layer: str) -> tuple[int, Any]:
    for group_id, group in enumerate(kv_cache_config.kv_cache_groups):
        if layer in group.layer_names:
            spec = group.kv_cache_spec
            return group_id, spec.kv_cache_specs[layer] if isinstance(spec, UniformTypeKVCacheSpecs) else spec
    raise AssertionError(f"layer {layer} is in no KV cache group")
