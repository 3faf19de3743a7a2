# SPDX-License-Identifier: Apache-2.0
"""A body with many faults costs no more than one with a few, and what is valid is read as before."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, TypeAdapter
from starlette.responses import JSONResponse
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.sagemaker.api_router import attach_router

from tokenpool.serve.client.body_validation import stop_at_first_faults

pytestmark = pytest.mark.vllm

FEW = 1000
"""Faults of one element at most: it has some for each type that it may have."""


class Inner(BaseModel):
    numbers: dict[str, int] = {}


class Plain(BaseModel):
    inner: Inner | None = None
    pair: tuple[int, ...] = ()


@pytest.fixture(scope="module")
def app() -> FastAPI:
    """Routes as vLLM's, with bodies that are its own; an answer has the number of faults, or the body."""
    app, router = FastAPI(), APIRouter()

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Any, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(len(error.errors()), 400)

    @router.post("/responses")
    async def responses(body: ResponsesRequest) -> Any:
        return body.model_dump(mode="json", exclude={"request_id"})

    @router.post("/chat")
    async def chat(body: ChatCompletionRequest) -> Any:
        return body.model_dump(mode="json", exclude={"request_id"})

    @router.post("/plain")
    async def plain(body: Plain) -> Any:
        return body.model_dump()

    app.include_router(router)
    stop_at_first_faults(app)
    return app


def post(app: FastAPI, path: str, body: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://pool", timeout=60) as client:
            return await client.post(path, json=body)

    return asyncio.run(send())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/responses", {"model": "m", "input": [{}] * 40}),
        ("/responses", {"model": "m", "input": [5] * 400}),
        ("/chat", {"model": "m", "messages": [5] * 2000}),
        ("/chat", {"model": "m", "messages": [], "logit_bias": {f"k{i}": "x" for i in range(2000)}}),
        ("/plain", {"inner": {"numbers": {f"k{i}": "x" for i in range(2000)}}}),
        ("/plain", {"pair": ["x"] * 2000}),
    ],
)
def test_faults_are_not_told_for_every_element(app, path, body):
    """In lists, tuples and mappings at any depth, whatever types an element may have."""
    answer = post(app, path, body)
    assert 400 == answer.status_code
    assert 0 < answer.json() < FEW


def test_what_is_valid_is_read_as_before(app):
    """The value of a body is that which pydantic's own validation gives."""
    message = {"role": "user", "content": [{"type": "text", "text": "hello"}]}
    said = {"type": "message", "role": "assistant", "id": "a", "status": "completed", "content": []}
    reason = {"type": "reasoning", "id": "r", "summary": []}
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    for path, kind, body in (
        ("/chat", ChatCompletionRequest, {"model": "m", "messages": [message] * 3, "tools": [tool], "stop": ["a"]}),
        (
            "/responses",
            ResponsesRequest,
            {"model": "m", "input": [{"role": "user", "content": "a"}, said, reason, call]},
        ),
        ("/responses", ResponsesRequest, {"model": "m", "input": "hello", "metadata": {"a": "b"}}),
        ("/plain", Plain, {"inner": {"numbers": {"a": 1}}, "pair": [1, 2]}),
    ):
        expected = kind.model_validate(copy.deepcopy(body)).model_dump(mode="json", exclude={"request_id"})
        answer = post(app, path, body)
        assert 200 == answer.status_code, answer.text
        assert expected == answer.json()


def test_the_route_that_tries_types_itself_stops_early_too(monkeypatch):
    """vLLM's /invocations has adapters of its own: all of them are changed."""
    made: list[TypeAdapter[Any]] = []

    class Noted(TypeAdapter):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr("pydantic.TypeAdapter", Noted)
    app = FastAPI()
    attach_router(app, ("generate",), None)
    monkeypatch.undo()
    assert made
    before = [adapter.validator for adapter in made]
    stop_at_first_faults(app)
    assert all(adapter.validator is not old for adapter, old in zip(made, before, strict=True))


def test_what_was_changed_is_not_changed_again(app):
    """A second call leaves all validators as they are."""
    fields = [field for route in app.routes for field in getattr(getattr(route, "dependant", None), "body_params", ())]
    before = [field._type_adapter.validator for field in fields]
    stop_at_first_faults(app)
    assert before == [field._type_adapter.validator for field in fields]
