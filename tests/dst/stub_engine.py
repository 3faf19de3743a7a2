# SPDX-License-Identifier: Apache-2.0
"""An executor without a model: vLLM's engine, scheduler and KV manager above it are real, and so are all bytes below.

For each scheduled token it writes the token's fingerprint where the block tables say, reads the fingerprints of the
whole context and the weights back, and makes the next token of what it read. It keeps requests and tables as vLLM's
first model runner does, because the pool rewrites those when KV moves.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, SlidingWindowSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from tests.dst import oracle
from tests.dst.world import StepOutput, Violation, World
from tokenpool.patches.build_context import current_build

LAYERS_PER_GROUP = 2


class StubModel(torch.nn.Module):
    """Weights that are fingerprints; loaded from a checkpoint as a model of vLLM's is."""

    def __init__(self, shapes: dict[str, int]) -> None:
        super().__init__()
        for name, size in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(size, dtype=torch.int64), requires_grad=False))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        own = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            own[name].data.copy_(tensor)
            loaded.add(name)
        return loaded

    def weights_sum(self) -> int:
        """Read all weights where they lie now."""
        parts = (int(p.data.numpy().view(np.uint64).sum(dtype=np.uint64)) for p in self.parameters())
        return sum(parts) & oracle.MASK


class GPUModelRunner:
    """Looks like vLLM's first model runner as far as the pool reads it."""

    __module__ = "vllm.v1.worker.gpu_model_runner"
    uses_mrope = is_pooling_model = False
    max_num_tokens = 1

    def __init__(self, world: World, facts: oracle.ModelFacts, config: Any, model: StubModel) -> None:
        self.world, self.facts, self.model = world, facts, model
        self.requests: dict[str, CachedRequestState] = {}
        self.execute_model_state: Any = None
        self.encoder_cache: dict[str, torch.Tensor] = {}
        self._block_size = config.cache_config.block_size
        self._rows: dict[str, int] = {}
        num_rows = config.scheduler_config.max_num_seqs + 1
        columns = -(-config.model_config.max_model_len // self._block_size) + 1
        self._tables = [
            SimpleNamespace(
                block_table=SimpleNamespace(np=np.zeros((num_rows, columns), np.int32)),
                num_blocks_per_row=np.zeros(num_rows, np.int32),
            )
            for _ in facts.windows
        ]
        self.input_batch = SimpleNamespace(block_table=SimpleNamespace(block_tables=self._tables))
        self._fingerprints: dict[str, list[int]] = {}
        self._blocks: np.ndarray | None = None
        """uint64 of shape (blocks, numbers per block) over the arena."""

    def get_model(self) -> StubModel:
        return self.model

    def get_draft_model(self) -> None:
        return None

    def _dummy_run(self, count: int, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What a forward pass gives without KV: something that depends on all weights."""
        hidden = torch.tensor([self.model.weights_sum() >> 1])
        return hidden, hidden

    def bind(self, view: Any, arena: Any) -> None:
        """Know where the KV lies; nothing is read of it."""
        flat = arena.tensor(view).numpy()
        count = len(flat) // view.block_bytes
        self._blocks = flat[: count * view.block_bytes].view(np.uint64).reshape(count, view.block_bytes // 8)

    # -- a step --------------------------------------------------------------------------------------

    def execute_model(self, scheduled: SchedulerOutput) -> ModelRunnerOutput | None:
        crash = self.world.faults.crash_of(self.facts.name, scheduled)
        if crash == "before":
            raise RuntimeError("injected: the step crashes before it begins")
        self._update(scheduled)
        if not scheduled.total_num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        sampled = {i: self._forward(self.requests[i], n) for i, n in scheduled.num_scheduled_tokens.items()}
        if crash == "after":
            raise RuntimeError("injected: the step crashes after it wrote")
        self.execute_model_state = sampled
        return None

    def sample_tokens(self, grammar_output: Any) -> ModelRunnerOutput:
        sampled, self.execute_model_state = self.execute_model_state, None
        if sampled is None:
            return EMPTY_MODEL_RUNNER_OUTPUT
        for request_id, tokens in sampled.items():
            self.requests[request_id].output_token_ids.extend(tokens)
        return ModelRunnerOutput(
            req_ids=list(sampled),
            req_id_to_index={request_id: index for index, request_id in enumerate(sampled)},
            sampled_token_ids=[list(tokens) for tokens in sampled.values()],
        )

    def _update(self, scheduled: SchedulerOutput) -> None:
        for request_id in scheduled.finished_req_ids:
            self.requests.pop(request_id, None)
            self._fingerprints.pop(request_id, None)
            self._leave(request_id)
        cached = scheduled.scheduled_cached_reqs
        for request_id in list(self._rows):
            if request_id not in scheduled.num_scheduled_tokens or request_id in cached.resumed_req_ids:
                self._leave(request_id)
        for new in scheduled.scheduled_new_reqs:
            self._fingerprints.pop(new.req_id, None)
            self.requests[new.req_id] = CachedRequestState(
                req_id=new.req_id,
                prompt_token_ids=new.prompt_token_ids,
                mm_features=[],
                sampling_params=new.sampling_params,
                generator=None,
                block_ids=tuple(list(ids) for ids in new.block_ids),
                num_computed_tokens=new.num_computed_tokens,
                output_token_ids=[],
            )
        for index, request_id in enumerate(cached.req_ids):
            self._update_cached(cached, index, self.requests[request_id])
        for request_id in scheduled.num_scheduled_tokens:
            self._enter(request_id)

    def _update_cached(self, cached: Any, index: int, request: CachedRequestState) -> None:
        request.num_computed_tokens = cached.num_computed_tokens[index]
        new_ids, num_output = cached.new_block_ids[index], cached.num_output_tokens[index]
        if request.req_id in cached.resumed_req_ids:
            request.block_ids = tuple(list(ids) for ids in new_ids)
        elif new_ids is not None:
            for ids, more in zip(request.block_ids, new_ids, strict=True):
                ids.extend(more)
        if request.req_id in cached.all_token_ids and num_output:
            request.output_token_ids = list(cached.all_token_ids[request.req_id][-num_output:])
        elif num_output < len(request.output_token_ids):
            del request.output_token_ids[num_output:]

    def _enter(self, request_id: str) -> None:
        if request_id not in self._rows:
            self._rows[request_id] = min(set(range(len(self._rows) + 1)) - set(self._rows.values()))
        row = self._rows[request_id]
        for table, ids in zip(self._tables, self.requests[request_id].block_ids, strict=True):
            table.num_blocks_per_row[row] = len(ids)
            table.block_table.np[row, : len(ids)] = ids

    def _leave(self, request_id: str) -> None:
        row = self._rows.pop(request_id, None)
        if row is not None:
            for table in self._tables:
                table.num_blocks_per_row[row] = 0

    def _forward(self, request: CachedRequestState, count: int) -> list[int]:
        """Write `count` tokens, check what the context says, and return the next token if all tokens are computed."""
        tokens = [*request.prompt_token_ids, *request.output_token_ids]
        start, end = request.num_computed_tokens, request.num_computed_tokens + count
        if end > len(tokens):
            raise Violation(f"{request.req_id}: {end} tokens are scheduled, the runner knows {len(tokens)}")
        known = self._fingerprints.setdefault(request.req_id, [])
        oracle.extend(known, self.facts.key, tokens)
        values = np.array(known[:end], np.uint64)
        kv = []
        for group, window in enumerate(self.facts.windows):
            want = oracle.of_group(values, group)
            self._write(request, group, start, want[start:])
            first = oracle.read_by(window, end)
            kv.append(self._read(request, group, first, want[first:]))
        weights = self.model.weights_sum()
        if weights != self.facts.weights_sum:
            raise Violation(f"{self.facts.name}: the weights that are used are not its own")
        self.world.tokens_computed += count
        self.world.tokens_checked += sum(map(len, kv))
        self.world.log(self.facts.name, request.req_id, start, count)
        return [oracle.next_token(weights, kv)] if end == len(tokens) else []

    def _places(self, request: CachedRequestState, group: int, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Block id and index within the block of each token."""
        positions = np.arange(first, end)
        table, row = self._tables[group], self._rows[request.req_id]
        columns = positions // self._block_size
        if len(columns) and columns[-1] >= table.num_blocks_per_row[row]:
            raise Violation(f"{request.req_id}: token {end} lies beyond its blocks")
        return table.block_table.np[row, columns], positions % self._block_size

    def _write(self, request: CachedRequestState, group: int, start: int, values: np.ndarray) -> None:
        blocks, places = self._places(request, group, start, start + len(values))
        if not blocks.all():
            raise Violation(f"{request.req_id}: a token is written to the null block")
        self._blocks[blocks, places] = values
        self._blocks[blocks, places - self._block_size] = values  # and at the end of the block

    def _read(self, request: CachedRequestState, group: int, first: int, want: np.ndarray) -> np.ndarray:
        blocks, places = self._places(request, group, first, first + len(want))
        found = self._blocks[blocks, places]
        wrong = (found != want) | (self._blocks[blocks, places - self._block_size] != want)
        if wrong.any():
            at = int(wrong.argmax())
            raise Violation(
                f"{request.req_id}: token {first + at} of {first + len(want)} in block {blocks[at]} of group {group} "
                f"holds {int(found[at]):#x}, not {int(want[at]):#x}"
            )
        return found


class StubExecutor(Executor):
    """One stub runner; a subclass per simulation says of which world (`executor_for`)."""

    world: World

    def _init_executor(self) -> None:
        config, build = self.vllm_config, current_build()
        assert build is not None
        self.build, self.facts = build, self.world.facts[build.name]
        model = StubModel(self.world.shapes(self.facts.checkpoint))
        model.load_weights(self.world.checkpoint_tensors(self.facts.checkpoint))
        runner = GPUModelRunner(self.world, self.facts, config, model)
        self.driver_worker = SimpleNamespace(worker=SimpleNamespace(model_runner=runner))
        self.runner = runner
        build.adopt_weights(runner)

    def get_kv_cache_specs(self) -> list[dict[str, Any]]:
        size = dict(
            block_size=self.cache_config.block_size, num_kv_heads=1, head_size=self.world.head_size, dtype=torch.float32
        )
        specs = {}
        for group, window in enumerate(self.facts.windows):
            for layer in range(LAYERS_PER_GROUP):
                spec = FullAttentionSpec(**size) if window is None else SlidingWindowSpec(**size, sliding_window=window)
                specs[f"layers.{group * LAYERS_PER_GROUP + layer}.attn"] = spec
        return [specs]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        return [["BLHNC"]]

    def set_kv_cache_layout(self, layout_name: str) -> None:
        self._layout = layout_name

    def determine_available_memory(self) -> list[int]:
        return [self.cache_config.kv_cache_memory_bytes]

    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        self.build.allocate_kv_cache(kv_cache_configs[0], KVCacheLayout[self._layout], None)
        self.runner.bind(self.build.view, self.build._allocator.arena)

    def compile_or_warm_up_model(self) -> None:
        pass

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        output = self.runner.execute_model(scheduler_output)
        if not non_block:
            return output
        future: Future[Any] = Future()
        future.set_result(output)
        return future

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        if not non_block:
            self.world.faults.check_memory(self.facts.name)
            return self.runner.sample_tokens(grammar_output)
        output = StepOutput(self.world.faults, self.facts.name)
        output.set_result(self.runner.sample_tokens(grammar_output))
        return output

    def collective_rpc(self, method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None, **_: Any) -> Any:
        if callable(method):
            return [method(self.driver_worker.worker, *args, **(kwargs or {}))]
        assert method in ("synchronize_device", "reset_encoder_cache", "reset_mm_cache"), f"the stub has no {method}"
        return [None]

    @property
    def supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def check_health(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


def executor_for(world: World) -> type[StubExecutor]:
    """The executor class of one simulation: vLLM makes executors with the engine's config alone."""
    return type("StubExecutorOfWorld", (StubExecutor,), {"world": world})
