# SPDX-License-Identifier: Apache-2.0
"""Steps the engines of an EngineHost one by one, so that a test says when a model leaves and when it comes back."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.helpers.devices.late_device import LateDevice
from tests.helpers.plain import RequestSpec
from tests.helpers.pooled import PooledModels
from tokenpool.host.kv.kv_swap import KVSwapper
from tokenpool.memory.devices.cpu import CpuDevice
from tokenpool.memory.ledger import PageUse


class SteppedModels(PooledModels):
    """Pooled models under a driver that never steps one that is out, and moves them when told.

    With `late` copies of KV end late, and models are stepped while their blocks are on their way back.
    """

    def __init__(self, device_memory: int, page_size: int, *, late: LateDevice | None = None) -> None:
        super().__init__(device_memory, page_size, device=late or CpuDevice(keeps_bytes=True), poison=True)
        self._late = late
        self.swapper: KVSwapper = self.host.swapper
        self.steps: Counter[str] = Counter()
        """Steps by model: the time axis on which a run with moves and one without are the same."""
        self.moved_ids = 0
        """Blocks that came back under another id."""
        self.drained = 0
        """Moves that found a step in flight."""
        self._ballast: dict[str, list[int]] = {}
        self._prefills: dict[tuple[str, str], Any] = {}

    def submit_one(self, model: str, spec: RequestSpec, adapters: list[str]) -> None:
        super().submit_one(model, spec, adapters)
        self._prefills[model, spec.request_id] = self._collected[model, spec.request_id].request.prefill_stats

    def step(self, name: str) -> None:
        """Drain the model's inputs and, unless it is out, run one step if it has work."""
        hosted = self.host.models[name]
        hosted.core._process_input_queue()
        if self.swapper.is_out(name) or not hosted.core.has_work():
            return
        self.host._globals.enter(name)
        hosted.core.step_once()
        self.steps[name] += 1
        self.swapper.after_step(hosted)
        self.swapper.poll()
        self._collect()

    def has_work(self, name: str) -> bool:
        core = self.host.models[name].core
        return core.has_work() or not core.input_queue.empty()

    def run_all(self, each_step: Callable[[str], None] = lambda name: None, max_rounds: int = 3000) -> None:
        """Step the models in turns until nothing is left to do; `each_step` is called after each model's turn."""
        for _ in range(max_rounds):
            busy = [name for name in self.host.models if self.has_work(name)]
            if not busy:
                return
            for name in busy:
                self.step(name)
                each_step(name)
        raise AssertionError(f"still busy after {max_rounds} rounds")

    def out(self, name: str) -> None:
        """Move a model out, and take the pages it leaves, so that it cannot get them back."""
        ledger = self.host.ledger
        hosted = self.host.models[name]
        self.drained += bool(hosted.core.batch_queue)
        hosted.core.drain_batches()
        self._collect()
        freed, nbytes, before = ledger.num_free, self.swapper.bytes_out(hosted), self.swapper.counters.bytes_out
        self.swapper.out(hosted)
        assert nbytes == self.swapper.counters.bytes_out - before
        assert 0 == ledger.held(name, PageUse.KV)
        self._ballast[name] = ledger.take(f"in place of {name}", PageUse.WEIGHTS, ledger.num_free - freed)
        self.check()

    def into(self, name: str) -> None:
        """Bring a model back."""
        blocks = self.host.models[name].build.pool.used_blocks()
        old = [block.block_id for block in blocks]
        (self.swapper.begin_in if self._late else self.swapper.into)(self.host.models[name])
        self.moved_ids += sum(i != block.block_id for i, block in zip(old, blocks, strict=True))
        self.host.ledger.give(f"in place of {name}", PageUse.WEIGHTS, self._ballast.pop(name))
        self.check()

    def evict(self, name: str) -> None:
        """Take every slab away that no request of the model uses."""
        pool = self.host.models[name].build.pool
        self.swapper.drop_cached(self.host.models[name], pool.num_idle_slabs)

    def num_cached_tokens(self, name: str, request_id: str) -> int:
        """Tokens of the prompt that were not computed, once it was scheduled."""
        return self._prefills[name, request_id].num_cached_tokens

    def check(self) -> None:
        super().check()
        self.swapper.check()


class RandomMoves:
    """Moves models out and back at random token boundaries of a seeded run."""

    def __init__(self, models: SteppedModels, seed: int) -> None:
        self._models = models
        self._random = random.Random(seed)
        self.num_moves = 0

    def __call__(self, name: str) -> None:
        """After a turn of `name`: it may leave, and one that is out may come back."""
        models = self._models
        out = [other for other in models.host.models if models.swapper.is_out(other)]
        others_work = any(models.has_work(n) for n in models.host.models if n not in out and n != name)
        if name not in out and self._random.random() < 0.25:
            models.out(name)
        elif out and (self._random.random() < 0.2 or not others_work):
            models.into(self._random.choice(out))
        else:
            return
        self.num_moves += 1
