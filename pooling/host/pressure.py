# SPDX-License-Identifier: Apache-2.0
"""Keeps every model moving when the pages run out: nothing deadlocks and no request waits for ever.

When memory is short, vLLM preempts requests of the model that asks. A model is starved when its own block pool refused
a request and its step could run nothing. The model that starved first gets its floor raised to what that request needs
to finish: the others keep what they use but get nothing more until that floor is met, and since each of their requests
ends or preempts itself when it needs another slab, it is met. One model at a time has a raised floor, so the floors
always fit. A floor stays raised as long as its request is there and may be scheduled, however it ends.

Which memory there is changes with each model that comes or goes. So a model that was refused may look again each time,
and two of them would take turns for ever without a step. Therefore they yield: after each refusal in a row to twice as
many steps of models that could run, if there are such.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vllm.v1.core.single_type_kv_cache_manager import CrossAttentionManager

from tokenpool.errors import CapacityError
from tokenpool.host.engine.encoder_cache import input_of, longest_input
from tokenpool.host.engine.hosted_core import HostedEngineCore
from tokenpool.host.hosted_model import HostedModel
from tokenpool.host.kv.slab_block_pool import SlabBlockPool
from tokenpool.host.waiting import is_paused
from tokenpool.memory.slab_allocator import SlabAllocator

_MOST_YIELDED = 64
"""Steps of others that a refused model lets pass at most before it is tried again."""


class PressureRelief:
    """Tracks starved models; called on the host loop's thread only."""

    def __init__(
        self,
        models: Mapping[str, HostedModel],
        allocator: SlabAllocator,
        floor: int,
        most_for: Callable[[str], int],
        on_raised: Callable[[str], None] = lambda model: None,
    ) -> None:
        self._models = models
        self._allocator = allocator
        self._floor = floor
        self._most_for = most_for
        """Slabs that a model could have if all others gave up what they can."""
        self._on_raised = on_raised
        """Called when a model's floor was raised; may move other models off the device."""
        self._starved: dict[str, str] = {}  # model -> request that was refused, the longest starved first
        self._seen_version: dict[str, int] = {}
        self._steps = 0
        """Steps of all models that ran something."""
        self._yields: dict[str, tuple[int, int]] = {}  # model -> refusals in a row, until which step it yields
        self._raised: str | None = None
        self._needs: dict[str, int] = {}  # model -> slabs that one request of its full length needs

    @property
    def raised(self) -> str | None:
        """The model whose floor is raised."""
        return self._raised

    @property
    def starved(self) -> dict[str, str]:
        """Model -> request that was refused memory, the longest starved first."""
        return dict(self._starved)

    def may_step(self, model: str) -> bool:
        """False while a starved model would find the memory as it found it last time."""
        return self._seen_version.get(model) != self._allocator.version

    def yields(self, model: str) -> bool:
        """Whether models that were not refused lately go first; the one whose floor is raised goes with them."""
        _, until = self._yields.get(model, (0, 0))
        return self._steps < until and model != self._raised

    def wake(self, model: str) -> None:
        """New input came in for the model: it may have something to do without memory, such as an abort."""
        self._seen_version.pop(model, None)

    def forget(self, model: str) -> None:
        """The model is gone."""
        self._seen_version.pop(model, None)
        self._needs.pop(model, None)
        self._yields.pop(model, None)
        self.review()

    def after_step(self, model: str, core: HostedEngineCore, executed: bool) -> None:
        """Note what the model's block pool said in the step that ended."""
        if executed:
            self._steps += 1
            self._seen_version.pop(model, None)
            self._yields.pop(model, None)
        elif core.watch.refused is not None:
            self._seen_version[model] = self._allocator.version
            self._starved.setdefault(model, core.watch.refused)
            count = self._yields.get(model, (0, 0))[0] + 1
            self._yields[model] = count, self._steps + min(2 ** (count - 1), _MOST_YIELDED)

    def review(self) -> None:
        """Drop what does not starve any more, whatever ended it, and raise the next floor; once per loop.

        A request ends by its last token, an abort, the death of its frontend, an error, or the removal of its model;
        and it gets nothing while its engine is paused or asleep. All of that is read here, so nobody has to tell.
        """
        for model, request_id in list(self._starved.items()):
            hosted = self._models.get(model)
            if hosted is None or request_id not in hosted.core.scheduler.requests or _is_still(hosted):
                self._drop(model)
        if self._raised is None and self._starved:
            self._raise_next_floor()

    def _drop(self, model: str) -> None:
        del self._starved[model]
        if self._raised == model:
            self._raised = None
            self._yields.clear()  # what it held is there for all
            if model in self._models:
                self._allocator.set_floor(model, self._floor)

    def _raise_next_floor(self) -> None:
        model, request_id = next(iter(self._starved.items()))
        core = self._models[model].core
        scheduler = core.scheduler
        request = scheduler.requests[request_id]
        pool = scheduler.kv_cache_manager.block_pool
        drafts = scheduler.num_spec_tokens + scheduler.num_lookahead_tokens  # have blocks too, of both models
        length = request.num_prompt_tokens + (request.max_tokens or 0) + drafts
        length = min(length, scheduler.max_model_len)
        self._allocator.set_floor(model, max(self._floor, self.slabs_for(core, pool, length, input_of(request))))
        self._raised = model
        self._on_raised(model)

    def spare_pages(self) -> int | None:
        """How many pages fewer would still hold one request of full length of each model; None without models."""
        needs = {model: max(need, self._floor) for model, need in self._needs.items()}
        return min((self._most_for(model) - needs.get(model, 0) for model in self._models), default=None)

    def slabs_for(self, core: HostedEngineCore, pool: SlabBlockPool, num_tokens: int, num_encoder_tokens: int) -> int:
        """Slabs that hold one request of `num_tokens`, an upper bound; cross-attention has the encoder's KV."""
        blocks = 0
        for manager in core.scheduler.kv_cache_manager.coordinator.single_type_managers:
            length = num_encoder_tokens if isinstance(manager, CrossAttentionManager) else num_tokens
            blocks += -(-length // manager.block_size) + 1 + getattr(manager, "num_speculative_blocks", 0)
        return -(-blocks // pool.blocks_per_slab)

    def check_fits(self, model: str, core: HostedEngineCore, pool: SlabBlockPool | None) -> None:
        """Raise CapacityError unless one request of full length of each model fits beside the others' floors."""
        for other, need in self._needs.items():
            have = self._most_for(other)
            if need > have:
                raise CapacityError(
                    f"model {model!r} would leave {have} KV pages for model {other!r}, one request of whose "
                    f"max_model_len needs {need}; raise device_memory or lower its --max-model-len",
                    needed_pages=need,
                    free_pages=have,
                )
        if pool is None:
            return
        length = core.scheduler.max_model_len
        need, have = self.slabs_for(core, pool, length, longest_input(core)), self._most_for(model)
        if need > have:
            page = self._allocator.ledger.page_size
            raise CapacityError(
                f"model {model!r}: one request of max_model_len {length} needs {need} KV pages of {page} bytes, "
                f"at most {have} are left for it; raise device_memory or lower --max-model-len",
                needed_pages=need,
                free_pages=have,
            )
        self._needs[model] = need


def _is_still(hosted: HostedModel) -> bool:
    return hosted.asleep is not None or is_paused(hosted.core)
