# SPDX-License-Identifier: Apache-2.0
"""Grammars and schemas are judged before vLLM sees them, once for equal ones, and never on the event loop."""

from __future__ import annotations

import asyncio
import copy
import threading
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from tokenpool.serve.access.stored_responses import MAX_ID_CHARS
from tokenpool.serve.client import structured_check
from tokenpool.serve.client.check_worker import PLACES_EACH, CheckWorker
from tokenpool.serve.client.structured_check import (
    CheckedOutputs,
    SpecJudge,
    _CheckedInputProcessor,
    _CheckedLLM,
    check,
)
from tokenpool.wire.stop_reasons import GRAMMAR_FAILED

pytestmark = pytest.mark.vllm

SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}}}


def make_judge(backend: str = "auto") -> SpecJudge:
    config = SimpleNamespace(backend=backend)
    model = SimpleNamespace(is_diffusion=False)
    return SpecJudge(SimpleNamespace(model_config=model, structured_outputs_config=config, tokenizer=object()))


def checked(judge: SpecJudge, **constraint: Any) -> StructuredOutputsParams:
    return asyncio.run(check(StructuredOutputsParams(**constraint), judge, CheckWorker(limit_s=60)))


@pytest.mark.parametrize("constraint", [
    {"json": SCHEMA}, {"regex": "[a-z]{1,9}"}, {"choice": ["yes", "no"]}, {"grammar": 'root ::= "a"'},
    {"json_object": True},
], ids=str)  # fmt: skip
def test_an_accepted_constraint_is_what_vllm_makes_of_it(constraint):
    """The marked constraint has the backend and the grammar that vLLM's own validation would have given it."""
    alone = SamplingParams(structured_outputs=StructuredOutputsParams(**constraint))
    processor = make_judge()._processor
    alone._validate_structured_outputs(processor.model_config, processor.structured_outputs_config, processor.tokenizer)
    judged = checked(make_judge(), **constraint)
    assert isinstance(judged, CheckedOutputs)
    assert vars(alone.structured_outputs) == vars(judged)


def test_the_mark_survives_what_vllm_does_with_parameters():
    """Copies of sampling parameters keep it, and the engine decodes a plain constraint with its backend."""
    params = SamplingParams(structured_outputs=checked(make_judge(), json=SCHEMA))
    for copied in (params.clone(), copy.copy(params), copy.deepcopy(params)):
        assert isinstance(copied.structured_outputs, CheckedOutputs)
    decoded = MsgpackDecoder(SamplingParams).decode(MsgpackEncoder().encode(params))
    assert vars(params.structured_outputs) == vars(decoded.structured_outputs)
    assert "xgrammar" == decoded.structured_outputs._backend


@pytest.mark.parametrize("constraint", [
    {"json": {"type": "string", "pattern": "^a{1,20000}$"}}, {"regex": "a{1,20000}"}, {"grammar": "root ::= nothing"},
], ids=str)  # fmt: skip
def test_refusals_are_vllm_s_validation_errors(constraint):
    """Each API answers them with 400 in its own shape."""
    with pytest.raises(VLLMValidationError):
        checked(make_judge("xgrammar"), **constraint)


def test_equal_constraints_are_judged_once(monkeypatch):
    """A verdict, good or bad, is kept; only so many are."""
    judge, calls = make_judge("xgrammar"), []
    validate = SamplingParams._validate_structured_outputs

    def counted(params: SamplingParams, *args: Any) -> None:
        calls.append(params)
        validate(params, *args)

    monkeypatch.setattr(SamplingParams, "_validate_structured_outputs", counted)
    for _ in range(3):
        checked(judge, json=SCHEMA)
        with pytest.raises(VLLMValidationError):
            checked(judge, grammar="root ::= nothing")
    assert 2 == len(calls)
    monkeypatch.setattr(structured_check, "_KEPT", 1)
    checked(judge, json_object=True)
    assert 1 == len(judge._known)


def test_a_check_without_end_is_refused_and_a_flood_of_them_too(monkeypatch):
    """The client gets 400 after the limit, and 503 while no place is free; other requests go on meanwhile."""
    ends = threading.Event()
    monkeypatch.setattr(SamplingParams, "_validate_structured_outputs", lambda self, *a: ends.wait(60))

    async def main() -> None:
        worker, judge = CheckWorker(limit_s=0.01), make_judge()
        for i in range(PLACES_EACH):
            with pytest.raises(VLLMValidationError, match="takes longer"):
                await check(StructuredOutputsParams(regex=f"{i}"), judge, worker)
        with pytest.raises(GracefulHTTPError) as caught:
            await check(StructuredOutputsParams(regex="c"), judge, worker)
        assert HTTPStatus.SERVICE_UNAVAILABLE == caught.value.http_status
        ends.set()
        while worker.num_running:
            await asyncio.sleep(0.001)

    asyncio.run(main())


def test_vllm_s_own_validation_leaves_out_what_is_marked(monkeypatch):
    """On the event loop a marked constraint is not validated again; others are held to the bounds first."""
    seen: list[Any] = []
    monkeypatch.setattr(
        structured_check.InputProcessor, "_validate_params", lambda self, params, tasks: seen.append(self.config)
    )
    processor = object.__new__(_CheckedInputProcessor)
    processor.config = "full"
    processor.unchecked = object.__new__(structured_check.InputProcessor)
    processor.unchecked.config = None

    processor._validate_params(SamplingParams(structured_outputs=checked(make_judge(), json=SCHEMA)), ())
    processor._validate_params(SamplingParams(structured_outputs=StructuredOutputsParams(json=SCHEMA)), ())
    processor._validate_params(SamplingParams(), ())
    assert [None, "full", "full"] == seen
    with pytest.raises(VLLMValidationError):
        processor._validate_params(SamplingParams(structured_outputs=StructuredOutputsParams(regex="a{5000}")), ())


def test_nothing_reaches_the_engine_before_the_verdict(monkeypatch):
    """`add_request` refuses before vLLM's own begins, and hands it the marked constraint otherwise."""
    given: list[Any] = []

    async def add_request(self: Any, request_id: str, prompt: Any, params: Any, **options: Any) -> None:
        given.append(params.structured_outputs)

    monkeypatch.setattr(structured_check.AsyncLLM, "add_request", add_request)
    engine = object.__new__(_CheckedLLM)

    async def main() -> None:
        engine.judge, engine.worker = make_judge("xgrammar"), CheckWorker(limit_s=60)
        with pytest.raises(VLLMValidationError):
            bomb = StructuredOutputsParams(regex="a{5000}")
            await engine.add_request("1", "p", SamplingParams(structured_outputs=bomb))
        assert [] == given
        params = SamplingParams(structured_outputs=StructuredOutputsParams(json=SCHEMA))
        await engine.add_request("2", "p", params)
        await engine.add_request("3", "p", params)
        await engine.add_request("4", "p", SamplingParams())

    asyncio.run(main())
    assert [True, True, False] == [isinstance(constraint, CheckedOutputs) for constraint in given]
    assert given[0] is given[1]


def test_a_long_id_is_refused_before_anything_is_done():
    """It would come back from the engine with each token; the longest that is taken gets as far as vLLM."""
    engine = object.__new__(_CheckedLLM)
    params = SamplingParams()
    with pytest.raises(VLLMValidationError, match=f"has 2000 characters, at most {MAX_ID_CHARS} are"):
        asyncio.run(engine.add_request("x" * 2000, "p", params))
    with pytest.raises(AttributeError):  # this engine is none
        asyncio.run(engine.add_request(f"chatcmpl-{'x' * MAX_ID_CHARS}-0", "p", params))


@pytest.mark.parametrize(("stop_reason", "is_refused"), [(GRAMMAR_FAILED, True), (None, False)])
def test_an_end_by_the_grammar_is_the_clients_error(monkeypatch, stop_reason, is_refused):
    """What the engine ends because of the grammar is refused with 400; any other error stays one of the server."""
    ended = SimpleNamespace(outputs=[SimpleNamespace(finish_reason="error", stop_reason=stop_reason)])

    async def generate(self: Any, *args: Any) -> Any:
        yield ended

    async def main() -> list[Any]:
        engine = structured_check._CheckedLLM.__new__(structured_check._CheckedLLM)
        return [output async for output in engine.generate("p", SamplingParams(), "1")]

    monkeypatch.setattr(structured_check.AsyncLLM, "generate", generate)
    if is_refused:
        with pytest.raises(VLLMValidationError, match="allows no answer"):
            asyncio.run(main())
    else:
        assert [ended] == asyncio.run(main())


@pytest.mark.parametrize(
    ("reason", "is_path"),
    [
        ("Call to add_lora method failed: [Errno 20] Not a directory", True),
        ("Call to add_lora method failed: LoRA rank 8 is greater than max_lora_rank 1.", False),
        ("the engine is dead", False),
    ],
)
def test_an_adapter_that_cannot_be_read_is_not_found(reason, is_path, monkeypatch):
    """Why one that was read is not taken is told; an engine that is gone is another matter."""
    from vllm.exceptions import LoRAAdapterNotFoundError
    from vllm.lora.request import LoRARequest

    async def add_lora(self, request):
        raise Exception(reason)

    monkeypatch.setattr(structured_check.AsyncLLM, "add_lora", add_lora)
    engine = structured_check._CheckedLLM.__new__(structured_check._CheckedLLM)
    with pytest.raises(LoRAAdapterNotFoundError if is_path else Exception, match="No adapter" if is_path else reason):
        asyncio.run(engine.add_lora(LoRARequest("a", 1, "/none")))
