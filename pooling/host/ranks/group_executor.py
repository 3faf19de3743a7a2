# SPDX-License-Identifier: Apache-2.0
"""vLLM's executor for a model on a tensor parallel group: rank 0's worker is in this process, the others follow."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.worker.worker_base import WorkerWrapperBase

from tokenpool.host.kv.pool_relabel import IdMap
from tokenpool.host.kv.runner_adapter import RunnerAdapter
from tokenpool.host.ranks.rank_group import RankGroup
from tokenpool.patches.build_context import current_build


def group_executor(group: RankGroup, model: str) -> type[Executor]:
    """The executor class for one model; vLLM makes the executor with the engine's config alone."""
    return type("GroupExecutorOfModel", (GroupExecutor,), {"group": group, "model": model})


class GroupExecutor(UniProcExecutor):
    """Everything is asked of all ranks at once, because they meet inside it; rank 0's answer is the model's.

    Source: vllm/v1/executor/uniproc_executor.py; what it does with one worker is done with all.
    """

    group: RankGroup
    model: str

    def _init_executor(self) -> None:
        build = current_build()
        assert build is not None
        self.group.send("build", self.model, self.vllm_config, build.movable_weights)
        self._together(self._build_worker)

    def _build_worker(self) -> None:
        self.driver_worker = WorkerWrapperBase(rpc_rank=0)
        arguments = dict(
            vllm_config=self.vllm_config,
            local_rank=0,
            rank=0,
            distributed_init_method=self.group.init_method,
            is_driver_worker=True,
        )
        self.driver_worker.init_worker(all_kwargs=[arguments])
        self.driver_worker.init_device()
        self.driver_worker.load_model()
        current_platform.update_block_size_for_backend(self.vllm_config)

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        single_value: bool = False,
    ) -> Any:
        """Call all workers; the result is a list by rank, or with `single_value` what rank 0 gives."""
        self.group.send("call", self.model, method, args, kwargs or {}, not single_value)

        def call_ours() -> Any:
            return super(GroupExecutor, self).collective_rpc(method, timeout, args, kwargs, non_block, single_value)

        ours, theirs = self._together(call_ours)
        if single_value:
            return ours
        if not isinstance(ours, Future):
            return [*ours, *theirs]
        whole: Future[list[Any]] = Future()
        whole.set_result([*ours.result(), *theirs])
        return whole

    def mirrored(self, adapter: RunnerAdapter) -> RunnerAdapter:
        """An adapter that does on all ranks what `adapter` does on this one."""
        return _MirroredAdapter(adapter, self.group, self.model)

    def shutdown(self) -> None:
        """Free the workers; the processes stay for the other models."""
        self.group.send("forget", self.model)
        super().shutdown()

    def _together(self, ours: Callable[[], Any]) -> tuple[Any, list[Any]]:
        """Do our part of what the others were asked; returns what we and they give, raises what fails first here."""
        try:
            result = ours()
        except BaseException:
            self.group.send("failed")  # one that waits for what we did not do gives up
            self.group.discard_answers()
            raise
        return result, self.group.answers()


class _MirroredAdapter:
    """A `RunnerAdapter` for all ranks; what it tells is the same on each, so it asks this one."""

    def __init__(self, adapter: RunnerAdapter, group: RankGroup, model: str) -> None:
        self.is_between_steps = adapter.is_between_steps
        self.can_resume = adapter.can_resume
        self._adapter = adapter
        self._group = group
        self._model = model

    def remap(self, ids: IdMap) -> None:
        """Rewrite every block id on every rank."""
        self._adapter.remap(ids)
        self._group.send("runner", self._model, "remap", (ids,))
        self._group.answers()

    def drop_step(self) -> None:
        """Drop what a crashed step left behind on every rank."""
        self._adapter.drop_step()
        self._group.send("runner", self._model, "drop_step", ())
        self._group.answers()
