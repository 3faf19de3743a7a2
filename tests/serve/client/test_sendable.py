# SPDX-License-Identifier: Apache-2.0
"""A request that no message can carry is refused before it is in any book."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from tokenpool.serve.client import structured_check

pytestmark = pytest.mark.vllm


def make_request(**fields: Any) -> EngineCoreRequest:
    """A request with some fields of its own, of which `params` are for the sampler."""
    params = SamplingParams(max_tokens=5)
    for name, value in fields.pop("params", {}).items():
        setattr(params, name, value)
    given: dict[str, Any] = dict(
        request_id="a", prompt_token_ids=[3, 4, 5], mm_features=None, sampling_params=params, pooling_params=None,
        arrival_time=0.0, lora_request=None, cache_salt=None, data_parallel_rank=None,
    )  # fmt: skip
    return EngineCoreRequest(**given | fields)


def add(monkeypatch: pytest.MonkeyPatch, request: EngineCoreRequest) -> list[EngineCoreRequest]:
    """Hand a request to an engine client; returns those that vLLM's own code has then been given."""
    noted: list[EngineCoreRequest] = []

    async def note(self: Any, request: EngineCoreRequest, *args: Any) -> None:
        noted.append(request)

    monkeypatch.setattr(structured_check.AsyncLLM, "_add_request", note)
    engine = structured_check._CheckedLLM.__new__(structured_check._CheckedLLM)
    try:
        asyncio.run(engine._add_request(request, None, None, 0, None))
    except VLLMValidationError:
        assert not noted, "it is in the books"
        raise
    return noted


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"params": {"top_k": 10**30}}, "more than 64 bits"),
        ({"params": {"stop_token_ids": [-(10**30)]}}, "more than 64 bits"),
        ({"params": {"extra_args": {"kv_transfer_params": {"a": [10**30]}}}}, "more than 64 bits"),
        ({"priority": 10**30}, "more than 64 bits"),
        ({"cache_salt": "\ud800"}, "no UTF-8"),
        ({"params": {"stop": ["\ud800"]}}, "no UTF-8"),
        ({"params": {"extra_args": {"\ud800": 1}}}, "no UTF-8"),
    ],
)
def test_what_no_message_can_carry_is_refused(monkeypatch, fields, message):
    """Whichever field it is in, however deep; vLLM's code, which would note the request, is not reached."""
    with pytest.raises(VLLMValidationError, match=message):
        add(monkeypatch, make_request(**fields))


def test_any_other_request_goes_on(monkeypatch):
    """The very request, with numbers up to 64 bits."""
    request = make_request(params={"seed": 2**63 - 1, "extra_args": {"a": "🙂"}}, priority=-(2**63))
    assert [request] == add(monkeypatch, request)
