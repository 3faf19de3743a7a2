# SPDX-License-Identifier: Apache-2.0
"""Engines in this process that begin requests, or go on with those that others began."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.helpers.plain import Case
from tests.helpers.pooled import EngineCoreRequestType, PooledModels
from tokenpool.wire.continued_request import ContinuedRequest

_DEVICE_MEMORY, _PAGE = 64 << 20, 256 << 10


@dataclass
class Got:
    """What an engine put out for one request."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    """By how much the likeliest token's logprob exceeds the next one's; needs `logprobs` of 2."""
    finish_reason: Any = None
    num_prefill_stats: int = 0


class Resuming:
    """A host without frontends whose requests may have delivered tokens. No prefix caches."""

    def __init__(self, cases: Iterable[Case], **engine_args: Any) -> None:
        self._pooled = PooledModels(_DEVICE_MEMORY, _PAGE)
        self._got: dict[tuple[str, str], Got] = {}
        for case in cases:
            self._pooled.add(case, enable_prefix_caching=False, **engine_args)

    def __enter__(self) -> Resuming:
        return self

    def __exit__(self, *_: object) -> None:
        self._pooled.close()

    def submit(
        self, model: str, request_id: str, prompt: list[int], params: dict[str, Any], delivered: Sequence[int] = ()
    ) -> Got:
        """Queue a request; what it gets appears in the result while `run` runs."""
        from vllm.sampling_params import SamplingParams, StructuredOutputsParams

        params = dict(params)
        schema = params.pop("schema", None)
        sampling = SamplingParams(**params)
        if schema is not None:
            sampling.structured_outputs = StructuredOutputsParams(json=schema)
            sampling.structured_outputs._backend = "xgrammar"
        core = self._core(model)
        message = ContinuedRequest(
            request_id=request_id,
            prompt_token_ids=prompt,
            mm_features=None,
            sampling_params=sampling,
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            delivered_token_ids=list(delivered),
        )
        core.input_queue.put((EngineCoreRequestType.ADD, core.preprocess_add_request(message)))
        self._got[model, request_id] = got = Got()
        return got

    def abort(self, model: str, request_id: str) -> None:
        """Queue the end of a request."""
        self._pooled.abort(model, request_id)

    def run(self) -> None:
        """Step until all requests have ended."""
        models = self._pooled.host.models.values()
        while any(m.core.has_work() or not m.core.input_queue.empty() for m in models):
            self._pooled.host.run_once()
            for hosted in models:
                self._collect(hosted)

    def _collect(self, hosted: Any) -> None:
        queue = hosted.core.output_queue
        while not queue.empty():
            for output in queue.get_nowait()[1].outputs:
                got = self._got[hosted.name, output.request_id]
                got.tokens += output.new_token_ids
                got.finish_reason = output.finish_reason
                got.num_prefill_stats += output.prefill_stats is not None
                if output.new_logprobs is not None:
                    rows = output.new_logprobs.logprobs
                    got.logprobs += [float(row[0]) for row in rows]
                    got.margins += [float(row[1] - row[2]) for row in rows]

    def account(self, model: str) -> Any:
        """The model's account of tokens."""
        return self._core(model).slo_account

    def runner_requests(self, model: str) -> dict[str, Any]:
        """The table of requests of the model's runner."""
        return self._core(model).model_executor.driver_worker.worker.model_runner.requests

    def check(self) -> None:
        """Check the host's books."""
        self._pooled.check()

    def _core(self, model: str) -> Any:
        return self._pooled.host.models[model].core
