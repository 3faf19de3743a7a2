# SPDX-License-Identifier: Apache-2.0
"""Judges grammars and schemas of requests beside the event loop, before vLLM does it on the loop without a limit.

Every route ends in `AsyncLLM.add_request`, so that is where it happens: for chat, completions, responses, messages and
those to come. What was judged good carries a mark, which copies keep, and vLLM's own validation leaves it out. The
judgements of the last specs are kept, so the same schema costs once.
"""

from __future__ import annotations

import copy
import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError, LoRAAdapterNotFoundError, VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import RequestOutputCollector

from tokenpool.serve.access.stored_responses import MAX_ID_CHARS
from tokenpool.serve.access.tenant_call import CURRENT_CALL, current_tenant
from tokenpool.serve.client.check_worker import CHECK_LIMIT_S, ChecksBusyError, CheckWorker
from tokenpool.serve.client.grammar_bounds import grammar_problem
from tokenpool.serve.client.sampling_bounds import refuse_long_lists, refuse_many_logprobs, refuse_undrafted
from tokenpool.serve.client.sendable import refuse_unsendable
from tokenpool.wire.stop_reasons import GRAMMAR_FAILED

_NO_ANSWER = (
    "The grammar or schema could not be compiled, allows no answer, or takes too long for each token: "
    "use another or a simpler one."
)
_ADDED_ID_CHARS = 64
"""The most that vLLM adds to an id that a client has chosen."""
_NOT_READ = "Call to add_lora method failed: [Errno"
"""Of an adapter whose files cannot be read; why one of them is not taken, such as its rank, is told as it is."""
_KEPT = 256
_TOO_LONG = f"The grammar or schema takes longer than {CHECK_LIMIT_S:g} s to check: use a simpler one."
_BUSY = "Grammars of other requests are being checked; retry after 5 s."


class CheckedOutputs(StructuredOutputsParams):
    """A constraint that vLLM's validation has accepted, and completed, for the model that it is for."""


class SpecJudge:
    """Judges the constraints of one model's requests and remembers the last ones; for any thread."""

    def __init__(self, processor: InputProcessor) -> None:
        self._processor = processor
        self._known: OrderedDict[bytes, dict[str, Any] | str] = OrderedDict()
        self._lock = threading.Lock()

    def judge(self, constraint: StructuredOutputsParams) -> dict[str, Any]:
        """What vLLM changes in a constraint that it accepts, by field; raises VLLMValidationError."""
        given = dict(vars(constraint))
        if problem := grammar_problem({key: value for key, value in given.items() if not key.startswith("_")}):
            raise VLLMValidationError(problem, parameter="structured_outputs")
        key = hashlib.sha256(json.dumps(given, default=str).encode(errors="replace")).digest()
        with self._lock:
            verdict = self._known.get(key)
        if verdict is None:
            verdict = self._validate(constraint)
            self._remember(key, verdict)
        if isinstance(verdict, str):
            raise VLLMValidationError(verdict)
        return verdict

    def _remember(self, key: bytes, verdict: dict[str, Any] | str) -> None:
        with self._lock:
            self._known[key] = verdict
            self._known.move_to_end(key)
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)

    def _validate(self, constraint: StructuredOutputsParams) -> dict[str, Any] | str:
        processor, began_s = self._processor, time.thread_time()
        trial = SamplingParams(structured_outputs=copy.deepcopy(constraint))
        try:
            trial._validate_structured_outputs(
                processor.model_config, processor.structured_outputs_config, processor.tokenizer
            )
        except (VLLMValidationError, ValueError) as error:
            return str(error)
        if time.thread_time() - began_s > CHECK_LIMIT_S:  # nobody waited so long; the engine would need it again
            return _TOO_LONG
        given = vars(constraint)
        return {key: value for key, value in vars(trial.structured_outputs).items() if value != given.get(key)}


class _CheckedInputProcessor(InputProcessor):
    """Leaves out vLLM's validation of marked constraints; holds unmarked ones, of streamed input, to the bounds.

    The bounds of `sampling_bounds` hold for all.
    """

    speculative_config: Any = None
    unchecked: InputProcessor
    """The same without a config of structured outputs, by which vLLM knows that there is nothing to validate."""

    def _validate_params(self, params: Any, *args: Any) -> Any:
        if isinstance(params, SamplingParams):
            refuse_long_lists(params)
            if self.speculative_config is not None:
                refuse_undrafted(params)
        constraint = getattr(params, "structured_outputs", None)
        if isinstance(constraint, CheckedOutputs):
            return self.unchecked._validate_params(params, *args)
        if constraint is not None and (problem := grammar_problem(vars(constraint))):
            raise VLLMValidationError(problem, parameter="structured_outputs")
        return super()._validate_params(params, *args)

    def process_inputs(self, *args: Any, **options: Any) -> EngineCoreRequest:
        """As vLLM's; raises VLLMValidationError for a tenant's request that the bound on log probabilities refuses."""
        request = super().process_inputs(*args, **options)
        if (call := CURRENT_CALL.get()) is not None:
            refuse_many_logprobs(request, call.sequences)
        return request


class _CheckedLLM(AsyncLLM):
    """Has the constraint of each request judged before anything else is done for it.

    What no engine can send, or read an adapter from, is the client's fault.
    """

    judge: SpecJudge
    worker: CheckWorker

    async def add_request(
        self, request_id: str, prompt: Any, params: Any, *args: Any, **options: Any
    ) -> RequestOutputCollector:
        if len(request_id) > MAX_ID_CHARS + _ADDED_ID_CHARS:
            message = f"The request id has {len(request_id)} characters, at most {MAX_ID_CHARS} are taken."
            raise VLLMValidationError(message, parameter="request_id", value=len(request_id))
        constraint = getattr(params, "structured_outputs", None)
        if constraint is not None and not isinstance(constraint, CheckedOutputs):
            params.structured_outputs = await check(constraint, self.judge, self.worker)
        return await super().add_request(request_id, prompt, params, *args, **options)

    async def add_lora(self, lora_request: LoRARequest) -> bool:
        """As AsyncLLM's; raises LoRAAdapterNotFoundError where its files cannot be read."""
        try:
            return await super().add_lora(lora_request)
        except Exception as error:
            if not str(error).startswith(_NOT_READ):
                raise
            raise LoRAAdapterNotFoundError(lora_request.lora_name, lora_request.lora_path) from error

    async def _add_request(self, request: EngineCoreRequest, *args: Any, **options: Any) -> None:
        refuse_unsendable(request)
        await super()._add_request(request, *args, **options)

    async def generate(self, *args: Any, **options: Any) -> AsyncGenerator[RequestOutput, None]:
        """As AsyncLLM's; raises VLLMValidationError when a request ends because of its grammar."""
        async for output in super().generate(*args, **options):
            if any(each.finish_reason == "error" and each.stop_reason == GRAMMAR_FAILED for each in output.outputs):
                raise VLLMValidationError(_NO_ANSWER, parameter="structured_outputs")
            yield output


async def check(constraint: StructuredOutputsParams, judge: SpecJudge, worker: CheckWorker) -> StructuredOutputsParams:
    """The constraint with its mark; raises VLLMValidationError, or GracefulHTTPError when too many are checked."""
    try:
        accepted = await worker.run(lambda: judge.judge(constraint), current_tenant())
    except TimeoutError:
        raise VLLMValidationError(_TOO_LONG, parameter="structured_outputs") from None
    except ChecksBusyError:
        raise GracefulHTTPError(_BUSY, HTTPStatus.SERVICE_UNAVAILABLE) from None
    marked = copy.copy(constraint)
    marked.__class__ = CheckedOutputs
    vars(marked).update(accepted)
    return marked


def check_structured_outputs(engine: AsyncLLM) -> None:
    """Let `engine` judge grammars and schemas beside the event loop; call it on the loop."""
    unchecked = copy.copy(engine.input_processor)
    unchecked.structured_outputs_config = None
    engine.__class__ = _CheckedLLM
    engine.judge = SpecJudge(engine.input_processor)
    engine.worker = CheckWorker()
    engine.input_processor.__class__ = _CheckedInputProcessor
    engine.input_processor.unchecked = unchecked
