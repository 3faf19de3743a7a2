# SPDX-License-Identifier: Apache-2.0
"""An engine host in this process whose turns the bench decides, with a clock at every step.

Import it only after OMP_NUM_THREADS is set: it loads torch and vLLM.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}

from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine import EngineCoreRequest, EngineCoreRequestType

from bench.parts import common
from tokenpool.host.engine_host import EngineHost
from tokenpool.memory.states import WeightState
from tokenpool.policy.turns import Decision, PoolView
from tokenpool.wire.spec import HostConfig, HostedModelSpec

BLOCK_TOKENS = 32
PROMPT_TOKENS = 128


class Step(NamedTuple):
    """One engine step; times are seconds of `time.perf_counter`."""

    model: str
    loop_s: float
    """When the loop began to look for what to do."""
    decided_s: float
    """When the policy had decided."""
    start_s: float
    end_s: float
    copying: bool
    """Whether the side thread was copying weights when the step began."""

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    @property
    def gap_s(self) -> float:
        """What the loop took before the step."""
        return self.start_s - self.loop_s


@dataclass(slots=True)
class Script:
    """A `TurnPolicy` that says what it is told, and notes when."""

    run: str = ""
    prefetch: str | None = None
    spare: str | None = None
    decided_s: float = 0.0

    def decide(self, pool: PoolView) -> Decision:
        decision = Decision(self.run, prefetch=self.prefetch, evict=self.spare)
        self.decided_s = time.perf_counter()
        return decision


class Rig:
    """Models with one request each that runs all the time; `step` runs a step of the model that `script` names.

    The host has `pages` pages, of which each model that is not away is promised `kv_pages`. The requests end after
    `max_steps` steps. `weight_bytes` is the size of each checkpoint, `flags` are further engine arguments.
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        pages: int,
        page_bytes: int,
        kv_pages: int,
        max_steps: int,
        seed: int,
        *,
        host_memory: int = 16 << 30,
        link_bytes_per_s: int | None = None,
        weight_bytes: int = 0,
        **flags: Any,
    ) -> None:
        self._weight_bytes, self._flags = weight_bytes, {"enforce_eager": True, **flags}
        config = HostConfig(
            pages * page_bytes, page_bytes, kv_pages, movable_weights=True, host_memory=host_memory,
            cpu_link=link_bytes_per_s,
        )  # fmt: skip
        self.host = EngineHost(config)
        self.script = Script()
        self.host._turns._policy = self.script
        self.steps: list[Step] = []
        self._loop_s = 0.0
        for name, path in paths.items():
            self.add(name, path, PROMPT_TOKENS + max_steps)
        for name, prompt in zip(paths, common.random_prompts(seed, len(paths), PROMPT_TOKENS), strict=True):
            self.submit(name, prompt, max_steps, name)
            self.turn(name, 3)

    def add(self, name: str, path: Path, max_tokens: int) -> None:
        """Load a model that makes at most `max_tokens` tokens, prompt included; it gets no request."""
        self.add_spec(self.spec(name, path, max_tokens))

    def spec(self, name: str, path: Path, max_tokens: int) -> HostedModelSpec:
        """What `add_spec` adds; made by a frontend in a server."""
        config = EngineArgs(
            model=str(path),
            dtype="bfloat16",
            block_size=BLOCK_TOKENS,
            max_model_len=max_tokens,
            max_num_batched_tokens=max_tokens,
            max_num_seqs=8,
            **self._flags,
        ).create_engine_config()
        return HostedModelSpec(name, config, weight_bytes=self._weight_bytes)

    def add_spec(self, spec: HostedModelSpec) -> None:
        """Load a model and put a clock on its steps."""
        name = spec.name
        core = self.host.add_model(spec).core
        step_once = core.step_once

        def timed(**options: Any) -> bool:
            copying = self.host.weights.copier.pending() > 0
            start_s = time.perf_counter()
            executed = step_once(**options)
            times = self._loop_s, self.script.decided_s, start_s, time.perf_counter()
            self.steps.append(Step(name, *times, copying))
            return executed

        core.step_once = timed

    def submit(self, model: str, prompt: list[int], max_tokens: int, request_id: str) -> None:
        """Send one more request to a model."""
        core = self.host.models[model].core
        message = EngineCoreRequest(
            request_id=request_id,
            prompt_token_ids=prompt,
            mm_features=None,
            sampling_params=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        core.input_queue.put((EngineCoreRequestType.ADD, core.preprocess_add_request(message)))

    def step(self) -> Step:
        """One pass of the host's loop; raises RuntimeError unless it stepped the model of the script."""
        count = len(self.steps)
        self._loop_s = time.perf_counter()
        self.host.run_once()
        if len(self.steps) != count + 1 or self.steps[-1].model != self.script.run:
            raise RuntimeError(f"{self.script.run!r} made no step: its switch failed or its requests ended")
        queue = self.host.models[self.script.run].core.output_queue
        while not queue.empty():
            queue.get_nowait()
        return self.steps[-1]

    def turn(self, model: str, steps: int) -> Step:
        """Let a model make `steps` steps; returns the first of them."""
        self.script.run, self.script.prefetch, self.script.spare = model, None, None
        first, *_ = [self.step() for _ in range(steps)]
        return first

    def is_resident(self, model: str) -> bool:
        return self.host.weights.state(model) is WeightState.ON_DEVICE

    def moved(self) -> dict[str, int]:
        """Bytes copied so far by kind; those of `SwitchPlan` have its names."""
        device, tier = self.host.weights.device, self.host.swapper.tier.counters
        return {
            "weights_in": device.bytes_to_device,
            "weights_to_host": device.bytes_to_host,
            "kv_out": tier.paused_out_bytes,
            "kv_in": tier.paused_in_bytes,
            "cached_kv_out": tier.cached_out_bytes,
            "cached_kv_in": tier.cached_in_bytes,
        }

    def close(self) -> None:
        """Drop all requests and free everything; the books must agree."""
        self.host.check()
        for hosted in self.host.models.values():
            hosted.core.abort_requests(list(hosted.core.scheduler.requests))
        self.host.close()
