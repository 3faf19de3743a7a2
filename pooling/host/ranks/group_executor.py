# SPDX-License-Identifier: Apache-2.0
"""vLLM's executor for a model on a tensor parallel group: rank 0's worker is in this process, the others follow."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.uniproc_executor import AsyncOutputFuture, UniProcExecutor
from vllm.v1.worker.worker_base import WorkerWrapperBase

from tokenpool.host.engine.engine_globals import random_state
from tokenpool.host.kv.pool_relabel import IdMap
from tokenpool.host.kv.runner_adapter import RunnerAdapter
from tokenpool.host.ranks.rank_group import RankGroup
from tokenpool.host.ranks.rank_watch import RankWatch, Work
from tokenpool.patches.build_context import current_build


def group_executor(group: RankGroup, model: str) -> type[Executor]:
    """The executor class for one model; vLLM makes the executor with the engine's config alone."""
    return type("GroupExecutorOfModel", (GroupExecutor,), {"group": group, "model": model})


class GroupExecutor(UniProcExecutor):
    """Everything is asked of all ranks at once, because they meet inside it; rank 0's answer is the model's.

    A failure of rank 0 makes the others give up; one of another rank fails the step, or the build. A rank that waits
    inside for one that has failed ends the host: see rank_watch.py.

    Source: vllm/v1/executor/uniproc_executor.py; what it does with one worker is done with all.
    """

    group: RankGroup
    model: str

    def _init_executor(self) -> None:
        build = current_build()
        assert build is not None
        what = f"the build of {self.model}"
        with self.group.watch.work(what, builds=True) as work:
            work.question = self.group.ask("build", self.model, self.vllm_config, build.movable_weights)
            self._together(work, self._build_worker)
            self.group.answers(work.question)

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
        """Call all workers; the result is a list by rank, or with `single_value` what rank 0 gives.

        With `single_value` nobody waits for the others: what one of them raises is raised in the model's next step.
        """
        what = f"{_name_of(method)} of {self.model}"
        with self.group.watch.work(what, builds=current_build() is not None) as work:
            if _computes(method, args) and (failure := self.group.take_failure(self.model)) is not None:
                raise failure
            work.question = self.group.ask("call", self.model, method, args, kwargs or {}, not single_value)

            def call_ours() -> Any:
                return super(GroupExecutor, self).collective_rpc(method, timeout, args, kwargs, non_block, single_value)

            ours = self._together(work, call_ours)
            if single_value:
                self.group.leave(work.question, self.model)
                return self._watched(ours, what)
            theirs = self.group.answers(work.question)
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
        self.group.take_failure(self.model)
        self.group.send("forget", self.model)
        super().shutdown()

    def _together(self, work: Work, ours: Callable[[], Any]) -> Any:
        """Do our part of what the others were asked; they give up when we fail, or the process ends."""
        try:
            result = ours()
        except BaseException as error:
            self.group.give_up(work.question, f"{work.what}: {type(error).__name__}: {error}")
            raise
        if isinstance(result, Future) and result.done() and (failed := result.exception()) is not None:
            self.group.give_up(work.question, f"{work.what}: {type(failed).__name__}: {failed}")
            raise failed
        return result

    def _watched(self, output: Any, what: str) -> Any:
        """The same future of rank 0's output, for which the device may wait for the other ranks."""
        if not isinstance(output, AsyncOutputFuture):
            return output
        return _WatchedOutput(output, self.group.watch, what)


class _WatchedOutput(AsyncOutputFuture):
    def __init__(self, output: AsyncOutputFuture, watch: RankWatch, what: str) -> None:
        super().__init__(output.async_output, output.single_value)
        self._watch = watch
        self._what = f"the output of {what}"

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the device, with a limit."""
        with self._watch.work(self._what):
            return super().result(timeout)


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
        self._on_all("remap", ids)

    def drop_step(self) -> None:
        """Drop what a crashed step left behind on every rank, which all draw the same random numbers from now on."""
        self._group.take_failure(self._model)  # it belongs to that step
        self._on_all("drop_step")
        self._group.send("random", random_state())

    def _on_all(self, method: str, *args: Any) -> None:
        with self._group.watch.work(f"{method} of {self._model}") as work:
            work.question = self._group.ask("runner", self._model, method, args)
            try:
                getattr(self._adapter, method)(*args)
            finally:
                self._group.answers(work.question)


def _computes(method: str | Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a call is of a step of requests, and not one that only tells workers which have ended."""
    return method == "sample_tokens" or (method == "execute_model" and args[0].total_num_scheduled_tokens > 0)


def _name_of(method: str | Callable[..., Any]) -> str:
    return method if isinstance(method, str) else getattr(method, "__name__", "a function")
