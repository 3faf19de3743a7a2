# SPDX-License-Identifier: Apache-2.0
"""The public API as clients use it: OpenAI's, Anthropic's and vLLM's own routes, for all models of one pool."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.conftest import LORA_NAME
from tests.helpers.server import PoolServerProcess, poll

pytestmark = pytest.mark.vllm

GENERATIVE = ("llama", LORA_NAME, "qwen2", "gemma3")
POOL_MODELS = ("llama", "qwen2", "gemma3", "embed")
MESSAGES: list[Any] = [{"role": "user", "content": "hello world, the quick brown fox"}]
LONG = 480
"""Tokens that take the engine about two seconds: far longer than anything a test does while they come."""


@pytest.fixture(scope="module")
def client(pool_server: PoolServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{pool_server.base_url}/v1", api_key=pool_server.api_key, max_retries=0, timeout=60)


@pytest.fixture
def async_client(pool_server: PoolServerProcess) -> openai.AsyncOpenAI:
    url = f"{pool_server.base_url}/v1"
    return openai.AsyncOpenAI(base_url=url, api_key=pool_server.api_key, max_retries=0, timeout=60)


def greedy(model: str, **changes: Any) -> dict[str, Any]:
    extra = {"ignore_eos": True}
    return {"model": model, "temperature": 0, "max_tokens": 16, "extra_body": extra, **changes}


def chat_text(client: openai.OpenAI, model: str, **changes: Any) -> str:
    answer = client.chat.completions.create(messages=MESSAGES, **greedy(model, **changes))
    return answer.choices[0].message.content or ""


# --- OpenAI ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", GENERATIVE)
def test_chat(client: openai.OpenAI, model: str) -> None:
    """A chat answers under the model's name with as many tokens as asked for; streamed, it is the same text."""
    answer = client.chat.completions.create(messages=MESSAGES, **greedy(model))
    stream = client.chat.completions.create(
        messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **greedy(model)
    )
    chunks = list(stream)
    pieces = [choice.delta.content for chunk in chunks for choice in chunk.choices]

    assert (model, "length") == (answer.model, answer.choices[0].finish_reason)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].message.content == "".join(filter(None, pieces))
    assert {model} == {chunk.model for chunk in chunks}
    assert chunks[-1].usage == answer.usage


@pytest.mark.parametrize("model", GENERATIVE)
def test_completions(client: openai.OpenAI, model: str) -> None:
    """A completion is the same text whole and streamed."""
    answer = client.completions.create(prompt="hello world", **greedy(model))
    stream = client.completions.create(prompt="hello world", stream=True, **greedy(model))

    assert answer.choices[0].text
    assert answer.choices[0].text == "".join(chunk.choices[0].text for chunk in stream)


@pytest.mark.parametrize("model", ["llama", "qwen2", "gemma3"])
def test_responses(client: openai.OpenAI, model: str) -> None:
    """The Responses API gives the same text whole and as events."""
    settings: dict[str, Any] = {"model": model, "input": "hello", "max_output_tokens": 16, "temperature": 0}
    answer = client.responses.create(**settings)
    events = list(client.responses.create(stream=True, **settings))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]

    assert answer.model == model
    assert answer.output_text
    assert answer.output_text == "".join(deltas)
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")


def test_embeddings(client: openai.OpenAI) -> None:
    """Equal texts have equal embeddings of the model's size, others have others."""
    texts = ["hello world", "the lazy dog", "hello world"]
    first, second, third = (item.embedding for item in client.embeddings.create(model="embed", input=texts).data)

    assert len(first) == 128
    assert first == pytest.approx(third, abs=1e-2)
    assert first != pytest.approx(second, abs=1e-2)


def test_async_client(async_client: openai.AsyncOpenAI) -> None:
    """The async client gets answers of all models at once, whole and streamed."""

    async def whole(model: str) -> str:
        answer = await async_client.chat.completions.create(messages=MESSAGES, **greedy(model))
        return answer.choices[0].message.content or ""

    async def streamed(model: str) -> str:
        stream = await async_client.chat.completions.create(messages=MESSAGES, stream=True, **greedy(model))
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def embedded() -> int:
        return len((await async_client.embeddings.create(model="embed", input="hello")).data[0].embedding)

    async def main() -> list[Any]:
        jobs = [job(model) for job in (whole, streamed) for model in GENERATIVE]
        async with async_client:
            return await asyncio.gather(*jobs, embedded())

    *texts, size = asyncio.run(main())
    assert texts[: len(GENERATIVE)] == texts[len(GENERATIVE) :]
    assert len(set(texts)) == len(GENERATIVE)
    assert size == 128


def test_concurrent_chats_do_not_mix(client: openai.OpenAI) -> None:
    """Sixteen chats of all models at once give the tokens each model gives alone."""
    alone = {model: chat_text(client, model) for model in GENERATIVE}
    with ThreadPoolExecutor(16) as threads:
        texts = list(threads.map(lambda model: (model, chat_text(client, model)), GENERATIVE * 4))

    assert [(model, alone[model]) for model in GENERATIVE * 4] == texts


def test_an_adapter_changes_the_tokens(client: openai.OpenAI) -> None:
    """The adapter's name gives other greedy tokens than its base, each time the same."""
    base, adapted = chat_text(client, "llama"), chat_text(client, LORA_NAME)

    assert base != adapted
    assert (base, adapted) == (chat_text(client, "llama"), chat_text(client, LORA_NAME))


def test_models_list(client: openai.OpenAI) -> None:
    """All models and the adapter are listed in order, each with its state; each can be got alone."""
    cards = client.models.list().data

    assert ["llama", LORA_NAME, "qwen2", "gemma3", "embed"] == [card.id for card in cards]
    assert [{"state": "ready"}] * 5 == [card.model_dump()["pool"] for card in cards]
    for card in cards:
        assert client.models.retrieve(card.id).id == card.id
    assert cards[1].model_dump()["parent"] == "llama"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("none")


# --- Anthropic and vLLM's own routes -----------------------------------------------------------------------


def test_anthropic_messages(pool_server: PoolServerProcess) -> None:
    """Anthropic's route works with its own key header, whole and streamed."""
    body = {"model": "gemma3", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    headers = {"x-api-key": str(pool_server.api_key), "anthropic-version": "2023-06-01"}
    url = f"{pool_server.base_url}/v1/messages"
    answer = httpx.post(url, json=body, headers=headers, timeout=60).json()
    streamed = httpx.post(url, json=body | {"stream": True}, headers=headers, timeout=60).text
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]

    assert ("message", "gemma3", "max_tokens") == (answer["type"], answer["model"], answer["stop_reason"])
    assert answer["usage"]["output_tokens"] == 8
    deltas = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
    assert answer["content"][0]["text"] == "".join(deltas)
    assert ["message_start", "message_stop"] == [events[0]["type"], events[-1]["type"]]


@pytest.mark.parametrize("model", POOL_MODELS)
def test_tokenize_and_detokenize(pool_server: PoolServerProcess, model: str) -> None:
    """Tokens of a text turn into the text again."""
    text = "The quick brown fox."
    tokens = pool_server.request("POST", "/tokenize", json={"model": model, "prompt": text}).json()
    back = pool_server.request("POST", "/detokenize", json={"model": model, "tokens": tokens["tokens"]}).json()

    assert (len(tokens["tokens"]), 512) == (tokens["count"], tokens["max_model_len"])
    assert text == back["prompt"]


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_score(pool_server: PoolServerProcess, path: str) -> None:
    """A text is more similar to itself than to another."""
    body = {"model": "embed", "text_1": "hello", "text_2": ["hello", "the dog"]}
    same, other = (item["score"] for item in pool_server.request("POST", path, json=body).json()["data"])

    assert same == pytest.approx(1.0, abs=1e-2)
    assert other < 0.9


def test_pooling_and_rerank(pool_server: PoolServerProcess) -> None:
    """The other routes of a pooling model are there too."""
    pooled = pool_server.request("POST", "/pooling", json={"model": "embed", "input": "hello"}).json()
    body = {"model": "embed", "query": "hello", "documents": ["the dog", "hello"]}
    ranked = pool_server.request("POST", "/rerank", json=body).json()

    assert len(pooled["data"][0]["data"]) == 128
    assert [1, 0] == [result["index"] for result in ranked["results"]]


@pytest.mark.parametrize(("model", "path"), [("llama", "/v1/embeddings"), ("embed", "/v1/chat/completions")])
def test_routes_are_those_of_the_model(pool_server: PoolServerProcess, model: str, path: str) -> None:
    """A route that a model's kind lacks is 404, as in plain vLLM."""
    assert pool_server.request("POST", path, json={"model": model, "input": "x"}).status_code == 404


@pytest.mark.parametrize("model", ["llama", LORA_NAME, "gemma3"])
def test_the_model_may_be_in_the_path(pool_server: PoolServerProcess, model: str) -> None:
    """Below /models/<name> every route of vLLM is that model's."""
    answer = pool_server.request("POST", f"/models/{model}/tokenize", json={"prompt": "hello"})

    assert (200, 3) == (answer.status_code, answer.json().get("count"))


# --- streams -----------------------------------------------------------------------------------------------


def test_a_stream_comes_in_steps(pool_server: PoolServerProcess) -> None:
    """The first event is here while the engine still works on the rest; every token is an event of its own."""
    body = {"model": "gemma3", "messages": MESSAGES, "max_tokens": LONG, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "return_token_ids": True}
    before = pool_server.model_state("gemma3")["tokens"]
    options: dict[str, Any] = {"headers": pool_server.headers(pool_server.api_key), "timeout": 60}
    with httpx.stream("POST", f"{pool_server.base_url}/v1/chat/completions", json=body, **options) as response:
        chunks = response.iter_raw()
        text = next(chunks)
        during = pool_server.model_state("gemma3")
        num_chunks = 1
        for chunk in chunks:
            text, num_chunks = text + chunk, num_chunks + 1
    events = [line for line in text.decode().splitlines() if line.startswith("data: ")]

    assert response.headers["content-type"].startswith("text/event-stream")
    assert (1, True) == (during["running"], during["tokens"] - before < LONG)
    assert pool_server.model_state("gemma3")["tokens"] - before == LONG
    assert num_chunks > LONG // 4
    assert events[-1] == "data: [DONE]"
    assert len(events) > LONG // 2


def _leave_openai_stream(server: PoolServerProcess, model: str) -> None:
    client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=server.api_key, max_retries=0)
    stream = client.chat.completions.create(messages=MESSAGES, stream=True, **greedy(model, max_tokens=LONG))
    for _ in range(5):
        next(stream)
    stream.close()


def _leave_whole_answer(server: PoolServerProcess, model: str) -> None:
    body = {"model": model, "prompt": "hello", "max_tokens": LONG, "ignore_eos": True}
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.api_key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + content)
        poll(lambda: server.model_state(model)["running"])


@pytest.mark.parametrize("leave", [_leave_openai_stream, _leave_whole_answer])
@pytest.mark.parametrize("model", ["llama", "gemma3"])
def test_a_client_that_leaves_ends_its_request(
    pool_server: PoolServerProcess, model: str, leave: Callable[[PoolServerProcess, str], None]
) -> None:
    """When the client goes, the engine stops to make tokens and its KV is idle.

    On a busy machine a client may go when nearly all is made, which shows nothing: it comes again.
    """
    for _ in range(5):
        before = pool_server.wait_until_idle()["host"]["models"][model]
        leave(pool_server, model)
        after = pool_server.wait_until_idle()["host"]["models"][model]
        made = after["tokens"] - before["tokens"]
        if made < LONG * 3 // 4:
            break

    assert 0 < made < LONG * 3 // 4
    assert pool_server.request("GET", "/load").json()["models"][model] == 0


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["none", "llama2", "x" * 300])
def test_an_unknown_model_is_404_and_names_the_known(client: openai.OpenAI, model: str) -> None:
    """The error is OpenAI's and says which models there are."""
    with pytest.raises(openai.NotFoundError) as caught:
        chat_text(client, model)

    error = caught.value
    assert (404, "NotFoundError", "model") == (error.status_code, error.type, error.param)
    assert [name for name in POOL_MODELS if name not in error.message] == []


@pytest.mark.parametrize("key", [None, "wrong", "test-api-key-0123x"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/metrics", "/models/llama/tokenize", "/none"])
def test_a_key_is_needed(pool_server: PoolServerProcess, path: str, key: str | None) -> None:
    """Without the right key nothing but the probes answers."""
    headers = pool_server.headers(key)
    method = "GET" if path in ("/v1/models", "/metrics") else "POST"
    response = httpx.request(method, pool_server.base_url + path, headers=headers, json={"model": "llama"})

    assert (401, "AuthenticationError") == (response.status_code, response.json()["error"]["type"])


def test_openai_client_with_a_wrong_key(pool_server: PoolServerProcess) -> None:
    """The official client recognizes the refusal."""
    client = openai.OpenAI(base_url=f"{pool_server.base_url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        chat_text(client, "llama")


@pytest.mark.parametrize("path", ["/health", "/ready", "/live", "/ping"])
def test_probes_need_no_key(pool_server: PoolServerProcess, path: str) -> None:
    """Probes are open."""
    assert httpx.get(pool_server.base_url + path).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/pool/state"), ("GET", "/v1/pool/trace"), ("POST", "/v1/pool/check"), ("POST", "/v1/pool/models")]
    + [("DELETE", "/v1/pool/models/llama"), ("GET", "/v1/%70ool/state"), ("GET", "/models/llama/v1/pool/state")],
)
def test_the_admin_api_needs_the_admin_key(pool_server: PoolServerProcess, method: str, path: str) -> None:
    """The API key does not open the admin API, in no spelling of its path."""
    assert pool_server.request(method, path).status_code == 401
    assert httpx.request(method, pool_server.base_url + path).status_code == 401
    assert "llama" in pool_server.state()["models"]


# --- pool-level routes -------------------------------------------------------------------------------------


def samples(text: str, name: str) -> dict[str, float]:
    """Model name -> value of a metric."""
    found = re.findall(rf'^{re.escape(name)}\{{[^}}]*model_name="([^"]+)"[^}}]*\}} (\S+)$', text, re.MULTILINE)
    return {model: float(value) for model, value in found}


def test_metrics_of_all_models(pool_server: PoolServerProcess, client: openai.OpenAI) -> None:
    """/metrics has vLLM's and the pool's numbers, each under the model's name, and they count."""

    def read() -> str:
        return pool_server.request("GET", "/metrics").text

    names = ("vllm:generation_tokens_total", "tokenpool:tokens_total")
    before = read()
    for model in ("llama", "qwen2", "gemma3"):
        chat_text(client, model, max_tokens=7)

    # The host copies its counters when it falls idle, not on every step.
    expected = {name: {m: v + (0 if m == "embed" else 7) for m, v in samples(before, name).items()} for name in names}
    poll(lambda: {name: samples(read(), name) for name in names}, until=lambda seen: seen == expected)
    text = read()
    assert set(POOL_MODELS) == set(samples(text, "tokenpool:steps_total"))
    assert set(POOL_MODELS) <= set(samples(text, "tokenpool:pages"))
    for name in ("vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:time_to_first_token_seconds_count"):
        assert {"llama", "qwen2", "gemma3"} <= set(samples(text, name)), name
    assert re.search(r'^tokenpool:pages\{model_name="llama",use="weights"\} [1-9]', text, re.MULTILINE)


def test_tokens_are_judged_against_the_slo(pool_server: PoolServerProcess, client: openai.OpenAI) -> None:
    """Of a model with an SLO every token is on time or late (here: the first is late), of others all are on time."""
    before = pool_server.wait_until_idle()["host"]["models"]
    for model in ("qwen2", "llama"):
        chat_text(client, model, max_tokens=9)
    after = pool_server.wait_until_idle()["host"]["models"]

    def judged(model: str) -> list[int]:
        return [after[model][key] - before[model][key] for key in ("tokens", "tokens_on_time", "tokens_late")]

    assert [9, 8, 1] == judged("qwen2")
    assert [9, 9, 0] == judged("llama")


def test_load_counts_running_requests(pool_server: PoolServerProcess, client: openai.OpenAI) -> None:
    """/load is the number of open requests, in all and per model."""
    stream = client.chat.completions.create(messages=MESSAGES, stream=True, **greedy("qwen2", max_tokens=LONG))
    next(stream)
    during = pool_server.request("GET", "/load").json()
    stream.close()
    pool_server.wait_until_idle()
    idle = {"server_load": 0, "models": dict.fromkeys(POOL_MODELS, 0)}

    assert {"server_load": 1, "models": idle["models"] | {"qwen2": 1}} == during
    assert idle == poll(lambda: pool_server.request("GET", "/load").json(), until=lambda load: load == idle)


def test_version_and_ready(pool_server: PoolServerProcess) -> None:
    """/version tells both versions, /ready each model's state."""
    version = pool_server.request("GET", "/version").json()

    assert {"version", "tokenpool"} == set(version)
    assert re.fullmatch(r"\d+\.\d+.*", version["version"])
    assert dict.fromkeys(POOL_MODELS, "ready") == pool_server.request("GET", "/ready").json()


def test_ready_of_one_model_and_of_all(pool_server: PoolServerProcess) -> None:
    """`?model=` asks for one model, whom a client without a key cannot find out about; `?all=1` for all of them."""
    one = pool_server.request("GET", "/ready?model=qwen2")
    assert (200, {"qwen2": "ready"}) == (one.status_code, one.json())
    assert 404 == pool_server.request("GET", "/ready?model=nobody").status_code
    assert 200 == pool_server.request("GET", "/ready?all=1").status_code
    asked = [httpx.get(f"{pool_server.base_url}/ready?model={name}") for name in ("qwen2", "nobody")]
    assert [(200, {"ready": True}), (503, {"ready": False})] == [(one.status_code, one.json()) for one in asked]
