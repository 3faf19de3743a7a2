# SPDX-License-Identifier: Apache-2.0
"""What surrounds the host in a simulation: a seeded clock, a device and copies that are late or fail, and checkpoints.

Nothing here runs on another thread, and all randomness is of one seed, so two runs of it are the same.
"""

from __future__ import annotations

import ctypes
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.dst.oracle import MASK, ModelFacts
from tokenpool.memory.copy_engine import CopyEngine, CopyJob, Work
from tokenpool.memory.devices.cpu import CpuDevice
from tokenpool.memory.devices.device import BlockCopy, Copies

CHECKPOINT_NUMBERS = ((3000, 900), (6000, 4000, 200), (16000,), (9000, 12000), (25000, 500), (33000,))
"""Per checkpoint, the 64-bit numbers of each of its tensors: 31 to 264 KiB."""
_TICK_S = 1e-6


class Violation(BaseException):
    """A law was broken. No Exception, so that no handler of a failed step takes it for one."""


class Clock:
    """Time as the host sees it; moves when the simulation says, and by a microsecond whenever somebody looks."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.wall_offset_s = 1.7e9

    def _look(self) -> float:
        self.now_s += _TICK_S
        return self.now_s

    def _wall(self) -> float:
        return self._look() + self.wall_offset_s

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now_s += max(0.0, seconds)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Make this the clock of the process."""
        names = {"time": self._wall, "monotonic": self._look, "perf_counter": self._look, "sleep": self.sleep}
        before = {name: getattr(time, name) for name in names}
        for name, function in names.items():
            setattr(time, name, function)
        try:
            yield
        finally:
            for name, function in before.items():
                setattr(time, name, function)


class Faults:
    """What goes wrong, and what has."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.rates: dict[str, float] = {}
        """Chance that a call fails: map_zeroed, copy_in, copy_out, read."""
        self.fired: Counter[str] = Counter()
        self.in_step = False
        self.poisoned: dict[str, int] = {}
        """Request -> from how many computed tokens on it crashes every step that it is in."""
        self.crash_at: dict[str, list[tuple[int, str]]] = {}
        """Model -> steps at which it crashes, and where in the step."""
        self.memory_error_at: dict[str, tuple[int, bool]] = {}
        """Model -> the step from which on the next output ends in a MemoryError, and whether only one that is taken
        because the model has to leave for another."""
        self.has_to_leave: Callable[[str], bool] = lambda model: False
        """Whether the outputs of a model's steps are being taken because it has to leave for another."""
        self.steps: Counter[str] = Counter()
        self.crashed: set[str] = set()
        """Requests that were in a step that crashed."""
        self.lost = 0
        """Errors of that kind that somebody has seen."""

    def maybe(self, call: str) -> None:
        """Fail now and then."""
        if self.random.random() < self.rates.get(call, 0.0) and not (call == "map_zeroed" and self.in_step):
            self.fired[call] += 1
            raise OSError(f"injected: {call} fails")

    def crash_of(self, model: str, scheduled: Any) -> str | None:
        """Where the step crashes that is about to run; raises MemoryError itself."""
        if not scheduled.total_num_scheduled_tokens:
            return None
        self.steps[model] += 1
        step, place = self.steps[model], None
        for at, where in self.crash_at.get(model, ()):
            place = where if at == step else place
        computed = {r.req_id: r.num_computed_tokens for r in scheduled.scheduled_new_reqs}
        cached = scheduled.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for request_id, count in scheduled.num_scheduled_tokens.items():
            if computed[request_id] + count > self.poisoned.get(request_id, MASK):
                place = "after"
        if place is not None:
            self.crashed |= scheduled.num_scheduled_tokens.keys()
            self.fired["crash"] += 1
        return place

    def check_memory(self, model: str) -> None:
        """Raise MemoryError if it is time for one; called when the output of a step is taken."""
        step, leaves = self.memory_error_at.get(model, (MASK, False))
        if self.steps[model] >= step and (not leaves or self.has_to_leave(model)):
            self.memory_error_at.clear()
            self.lost += 1
            raise MemoryError("injected: the device is out of memory")


class StepOutput(Future):
    """The output of a step that may have ended in an error of the device, which is seen when the output is taken."""

    def __init__(self, faults: Faults, model: str) -> None:
        super().__init__()
        self._faults, self._model = faults, model

    def result(self, timeout: float | None = None) -> Any:
        self._faults.check_memory(self._model)
        return super().result(timeout)


class _LateCopies:
    def __init__(
        self, device: SimDevice, work: Callable[[], Any], places: list[range], buffers: list[torch.Tensor], due_s: float
    ) -> None:
        self._device, self._work, self.places, self.buffers, self.due_s = device, work, places, buffers, due_s
        self.is_done = False
        self.seconds = 0.0

    def do(self) -> None:
        self._work()
        self.is_done, self.seconds = True, 1e-3

    def done(self) -> bool:
        self._device.happen()
        return self.is_done

    def wait(self) -> None:
        self._device.run_to(self)

    precede_compute = wait


class SimDevice(CpuDevice):
    """Forbids access to what is not granted; copies of KV end late and in their order; calls fail now and then."""

    def __init__(self, clock: Clock, faults: Faults, lateness_s: float) -> None:
        super().__init__(keeps_bytes=True)
        self.copies_beside = True
        self._clock, self._faults, self._lateness_s = clock, faults, lateness_s
        self._queue: deque[_LateCopies] = deque()

    def map_zeroed(self, address: int, nbytes: int) -> None:
        self._faults.maybe("map_zeroed")
        super().map_zeroed(address, nbytes)

    def map_unset(self, address: int, nbytes: int) -> None:
        self._faults.maybe("map_zeroed")
        super().map_unset(address, nbytes)
        self.fill(address, nbytes, 0xFF)

    def copy_in(self, address: int, source: torch.Tensor) -> None:
        self._faults.maybe("copy_in")
        super().copy_in(address, source)

    def copy_out(self, target: torch.Tensor, address: int) -> None:
        self._faults.maybe("copy_out")
        super().copy_out(target, address)

    def begin_copies_in(self, copies: Sequence[BlockCopy]) -> Copies:
        self._faults.maybe("copy_in")
        for address, source in copies:
            if not self._under_way(address, source.numel()):
                ctypes.memset(address, 0xFF, source.numel())
        return self._later(copies, lambda: self._do(copies, super(SimDevice, self).copy_in))

    def begin_copies_out(self, copies: Sequence[BlockCopy]) -> Copies:
        self._faults.maybe("copy_out")
        for _, target in copies:
            if not any(_overlap(target, buffer) for queued in self._queue for buffer in queued.buffers):
                target.zero_()
        return self._later(copies, lambda: self._do(copies, lambda a, b: super(SimDevice, self).copy_out(b, a)))

    def _do(self, copies: Sequence[BlockCopy], copy: Callable[[int, torch.Tensor], None]) -> None:
        for address, buffer in copies:
            copy(address, buffer)

    def _later(self, copies: Sequence[BlockCopy], work: Callable[[], Any]) -> _LateCopies:
        places = [range(address, address + buffer.numel()) for address, buffer in copies]
        due_s = self._clock.now_s + self._faults.random.random() * self._lateness_s
        self._queue.append(_LateCopies(self, work, places, [buffer for _, buffer in copies], due_s))
        return self._queue[-1]

    def happen(self) -> None:
        """Do the copies that are due."""
        while self._queue and self._queue[0].due_s <= self._clock.now_s:
            self._queue.popleft().do()

    def run_to(self, last: _LateCopies) -> None:
        """Do all copies up to these; whoever asks waits for them."""
        while not last.is_done:
            self._clock.now_s = max(self._clock.now_s, self._queue[0].due_s)
            self._queue.popleft().do()

    def settle(self, address: int, nbytes: int) -> None:
        for copies in self._under_way(address, nbytes):
            self.run_to(copies)

    def _under_way(self, address: int, nbytes: int) -> list[_LateCopies]:
        end = address + nbytes
        return [c for c in self._queue if any(place.start < end and address < place.stop for place in c.places)]

    def unmap(self, address: int, nbytes: int) -> None:
        if self._under_way(address, nbytes):
            raise Violation("memory is taken away that is being copied")
        super().unmap(address, nbytes)


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    start, stop = one.data_ptr(), one.data_ptr() + one.numel()
    return other.data_ptr() < stop and start < other.data_ptr() + other.numel()


class _SimJob(CopyJob):
    engine: SimCopyEngine

    def wait(self, timeout: float | None = None) -> bool:
        self.engine.run_to(self)
        return self.done()


class SimCopyEngine(CopyEngine):
    """Runs jobs when they are due, on the thread that asks."""

    world: World

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._due: deque[tuple[float, _SimJob]] = deque()
        self.world.copy_engines.append(self)

    def job(self, label: str, total_bytes: int, work: Work) -> CopyJob:
        job = _SimJob(label, total_bytes, work, lambda job: self.notify(job))
        job.engine = self
        return job

    def submit(self, label: str, total_bytes: int, work: Work) -> CopyJob:
        job = self.job(label, total_bytes, work)
        late_s = self.world.faults.random.random() * self.world.lateness_s
        self._due.append((self.world.clock.now_s + late_s, job))
        self.world.submitted[label] += 1
        return job

    def happen(self) -> None:
        """Run the jobs that are due."""
        while self._due and self._due[0][0] <= self.world.clock.now_s:
            self._due.popleft()[1].run()

    def run_to(self, last: _SimJob) -> None:
        """Run all jobs up to this one."""
        while not last.done() and self._due:
            due_s, job = self._due.popleft()
            self.world.clock.now_s = max(self.world.clock.now_s, due_s)
            job.run()

    def next_s(self) -> float:
        """When the next job is due; inf without one."""
        return self._due[0][0] if self._due else float("inf")

    def pending(self) -> int:
        return len(self._due)

    def close(self) -> None:
        for _, job in self._due:
            job.cancel()
            job.run()
        self._due.clear()


class GrammarCompiler:
    """Stands in for the threads that compile grammars: each takes a while, some fail."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.waiting: list[tuple[float, Future[Any], Callable[[], Any]]] = []

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        due_s = self._world.clock.now_s + self._world.faults.random.choice((0.0, 0.002, 0.05, 0.4))
        self.waiting.append((due_s, future, lambda: function(*args)))
        return future

    def happen(self) -> None:
        """Finish the grammars that are due."""
        due = [entry for entry in self.waiting if entry[0] <= self._world.clock.now_s]
        self.waiting = [entry for entry in self.waiting if entry[0] > self._world.clock.now_s]
        for _, future, compile_it in due:
            try:
                future.set_result(compile_it())
            except Exception as error:
                future.set_exception(error)

    def cancel(self) -> None:
        """The process of these threads has ended."""
        waiting, self.waiting = self.waiting, []
        for _, future, _ in waiting:
            future.cancel()

    def next_s(self) -> float:
        """When the next grammar is due; inf without one."""
        return min((due_s for due_s, _, _ in self.waiting), default=float("inf"))


class World:
    """Everything around one host."""

    def __init__(self, seed: int, folder: Path, *, lateness_s: float, head_size: int) -> None:
        self.folder, self.head_size, self.lateness_s = folder, head_size, lateness_s
        self.clock = Clock()
        self.faults = Faults(seed)
        self.device = SimDevice(self.clock, self.faults, lateness_s)
        self.grammars = GrammarCompiler(self)
        self.copy_engines: list[SimCopyEngine] = []
        self.submitted: Counter[str] = Counter()
        """Jobs of the copy engines by label."""
        self.facts: dict[str, ModelFacts] = {}
        self.tokens_computed = 0
        self.tokens_checked = 0
        """Tokens whose fingerprint was read from KV and compared, each as often as a step read it."""
        self.history: list[tuple[Any, ...]] = []
        """What happened, for the law that two runs are the same."""

    def log(self, *what: Any) -> None:
        """Note what happened."""
        self.history.append(what)

    def copy_engine(self) -> type[SimCopyEngine]:
        """The class of this world's copy engines."""
        return type("CopyEngineOfWorld", (SimCopyEngine,), {"world": self})

    def happen(self) -> None:
        """Let everything end that is due."""
        self.device.happen()
        self.grammars.happen()
        for engine in self.copy_engines:
            engine.happen()

    def next_s(self) -> float:
        """When something of that is due next."""
        times = [self.grammars.next_s(), *(engine.next_s() for engine in self.copy_engines)]
        return min(times + [copies.due_s for copies in self.device._queue])

    def shapes(self, checkpoint: int) -> dict[str, int]:
        """Numbers in each tensor of a checkpoint."""
        return {f"w{i}": size for i, size in enumerate(CHECKPOINT_NUMBERS[checkpoint])}

    def checkpoint_tensors(self, checkpoint: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of a checkpoint, made anew."""
        return iter(checkpoint_tensors(checkpoint).items())


def checkpoint_tensors(checkpoint: int) -> dict[str, torch.Tensor]:
    """Tensors of 64-bit numbers that name the checkpoint and the place."""
    tensors = {}
    for index, size in enumerate(CHECKPOINT_NUMBERS[checkpoint]):
        start = (checkpoint + 1) * 0x9E3779B97F4A7C15 + index * 0xC2B2AE3D27D4EB4F & MASK
        numbers = np.uint64(start) + np.arange(size, dtype=np.uint64) * np.uint64(0xD6E8FEB86659FD93)
        tensors[f"w{index}"] = torch.from_numpy(numbers.view(np.int64))
    return tensors


def weights_sum(checkpoint: int) -> int:
    """Sum of a checkpoint's numbers, modulo 2**64."""
    parts = (t.numpy().view(np.uint64).sum(dtype=np.uint64) for t in checkpoint_tensors(checkpoint).values())
    return sum(map(int, parts)) & MASK


def make_checkpoints(folder: Path) -> None:
    """Write all checkpoints below `folder`."""
    for checkpoint in range(len(CHECKPOINT_NUMBERS)):
        place = folder / f"checkpoint-{checkpoint}"
        place.mkdir(parents=True, exist_ok=True)
        save_file(checkpoint_tensors(checkpoint), place / "model.safetensors")
