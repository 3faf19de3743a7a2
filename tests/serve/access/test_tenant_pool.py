# SPDX-License-Identifier: Apache-2.0
"""Tenants of a running pool: every route is on their account, and no key is ever shown."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor

from tests.conftest import TinyModels
from tests.helpers.server import PoolServerProcess, child_pids, poll
from tokenpool.cli.main import run
from tokenpool.demo.tiny_models import ENGINE_ARGS
from tokenpool.serve.access.tenant_call import CURRENT_CALL
from tokenpool.serve.access.tenant_meter import meter
from tokenpool.serve.access.tenants import Account
from tokenpool.tenant_config import TenantConfig, hash_key

pytestmark = pytest.mark.vllm

KEYS = {
    "free": "tp-free-11111111", "narrow": "tp-narrow-2222222", "slow": "tp-slow-333333333",
    "api": "sk-api-444444444", "admin": "sk-admin-5555555", "env": "tp-env-66666666666",
}  # fmt: skip
PROMPT = [5] * 20
COMPLETION = {"model": "llama", "prompt": PROMPT, "max_tokens": 7, "ignore_eos": True, "temperature": 0}
CHAT = {"model": "llama", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def server(tiny_models: TinyModels) -> Iterator[PoolServerProcess]:
    """A pool that logs all it can."""
    llama = {"scheduling_policy": "priority", "enable_log_requests": True, "enable_prompt_tokens_details": True}
    pool = {
        "models": [
            {"name": "llama", "model": str(tiny_models.path("llama")), "args": llama},
            {"name": "embed", "model": str(tiny_models.path("embed")), "args": ENGINE_ARGS["embed"]},
        ],
        "tenants": [
            {"name": "free", "keys": [hash_key(KEYS["free"]), "${TENANT_ENV_KEY}"], "priority": 5},
            {"name": "narrow", "keys": hash_key(KEYS["narrow"]), "models": ["embed"], "priority": -5},
            {"name": "slow", "keys": hash_key(KEYS["slow"]), "tokens_per_minute": 60, "max_concurrent": 8},
        ],
        "device_memory": "64MiB",
        "page_size": "1MiB",
        "api_key": KEYS["api"],
        "admin_key": KEYS["admin"],
    }
    levels = {"TOKENPOOL_LOG_LEVEL": "DEBUG", "VLLM_LOGGING_LEVEL": "DEBUG"}
    with PoolServerProcess(pool, env={**levels, "TENANT_ENV_KEY": KEYS["env"]}) as process:
        yield process


def send(server: PoolServerProcess, key: str, path: str, body: Any, method: str = "POST") -> httpx.Response:
    headers = {"x-api-key": KEYS[key]}
    return httpx.request(method, server.base_url + path, json=body, headers=headers, timeout=60)


def report(server: PoolServerProcess, tenant: str) -> dict[str, Any]:
    """What the admin sees, once nothing of the tenant is in flight."""

    def look() -> dict[str, Any]:
        return server.admin("GET", "/tenants").json()["tenants"][tenant]

    return poll(look, until=lambda found: not found["inflight"])


def used(server: PoolServerProcess, tenant: str, model: str) -> tuple[int, int, int]:
    usage = report(server, tenant)["usage"].get(model, {})
    return tuple(usage.get(key, 0) for key in ("requests", "prompt_tokens", "completion_tokens"))


def openai_usage(answer: httpx.Response) -> tuple[int, int]:
    usage = answer.json()["usage"]
    return usage["prompt_tokens"], usage.get("completion_tokens", 0)


def anthropic_usage(answer: httpx.Response) -> tuple[int, int]:
    usage = answer.json()["usage"]
    return usage["input_tokens"], usage["output_tokens"]


def stream_usage(answer: httpx.Response) -> tuple[int, int]:
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    usage = next(event["usage"] for event in reversed(events) if event.get("usage"))
    return usage["prompt_tokens"], usage["completion_tokens"]


STREAM = {"stream": True, "stream_options": {"include_usage": True}}
ROUTES = [
    ("/v1/completions", COMPLETION, openai_usage),
    ("/v1/completions", COMPLETION | STREAM, stream_usage),
    ("/v1/completions", COMPLETION | {"n": 3, "temperature": 1.0}, openai_usage),
    ("/v1/completions", COMPLETION | {"prompt": [PROMPT, PROMPT[:9]]}, openai_usage),
    ("/v1/chat/completions", CHAT, openai_usage),
    ("/v1/chat/completions", CHAT | STREAM, stream_usage),
    ("/v1/messages", CHAT, anthropic_usage),
    ("/v1/responses", {"model": "llama", "input": "hello", "max_output_tokens": 4}, anthropic_usage),
    ("/v1/embeddings", {"model": "embed", "input": [PROMPT, PROMPT]}, openai_usage),
    ("/pooling", {"model": "embed", "input": "hello there"}, openai_usage),
    ("/models/llama/v1/completions", COMPLETION, openai_usage),
    ("/tokenize", {"model": "llama", "prompt": "hello"}, lambda answer: (0, 0)),
]


@pytest.mark.parametrize(("path", "body", "usage_of"), ROUTES)
def test_the_account_agrees_with_the_answer(server, path, body, usage_of):
    """Each route adds one request, and the prompt and completion tokens that its own answer tells."""
    model = body["model"]
    before = used(server, "free", model)
    answer = send(server, "free", path, body)
    assert answer.status_code == 200, answer.text
    after = used(server, "free", model)

    assert (1, *usage_of(answer)) == tuple(new - old for new, old in zip(after, before, strict=True))


def test_what_a_client_leaves_unread_counts_as_far_as_it_came(server):
    """A client that goes away is charged for the tokens until then, and holds nothing."""
    before = used(server, "free", "llama")
    body = COMPLETION | {"stream": True, "max_tokens": 400}
    headers = {"x-api-key": KEYS["free"]}
    with httpx.stream("POST", f"{server.base_url}/v1/completions", json=body, headers=headers, timeout=60) as answer:
        next(answer.iter_lines())
    server.wait_until_idle()
    after = used(server, "free", "llama")

    assert (1, 20) == (after[0] - before[0], after[1] - before[1])
    assert 1 <= after[2] - before[2] <= 400


def test_limits_hold_for_streams_and_say_when_to_come_back(server):
    """60 tokens per minute: a request over it puts the next one off, by as much as it overdrew."""
    answer = send(server, "slow", "/v1/completions", COMPLETION | STREAM | {"max_tokens": 60})
    assert answer.status_code == 200
    assert (20, 60) == stream_usage(answer)
    refused = send(server, "slow", "/v1/chat/completions", CHAT | STREAM)

    assert (429, "tokens_per_minute") == (refused.status_code, refused.json()["error"]["param"])
    assert 10 < int(refused.headers["retry-after"]) <= 21
    assert {"tokens_per_minute": 1} == report(server, "slow")["refused"]


def test_a_tenant_sees_and_uses_its_models_only(server):
    """The others are not listed and are as none: 404; the pool's API is for admins."""
    listed = send(server, "narrow", "/v1/models", None, "GET").json()["data"]
    assert ["embed"] == [card["id"] for card in listed]
    assert 404 == send(server, "narrow", "/v1/models/llama", None, "GET").status_code
    assert 404 == send(server, "narrow", "/v1/completions", COMPLETION).status_code
    assert 200 == send(server, "narrow", "/v1/embeddings", {"model": "embed", "input": "x"}).status_code
    assert 2 == len(send(server, "free", "/v1/models", None, "GET").json()["data"])
    for path in ("/v1/pool/tenants", "/v1/pool/state"):
        assert 401 == send(server, "free", path, None, "GET").status_code


def test_keys_of_the_pool_are_the_default_tenant(server):
    """`api_key` works as before, on an account of its own."""
    before = used(server, "default", "llama")
    assert 200 == send(server, "api", "/v1/completions", COMPLETION).status_code
    assert (1, 20, 7) == tuple(new - old for new, old in zip(used(server, "default", "llama"), before, strict=True))


def test_metrics_have_bounded_labels(server):
    """Counters per tenant and model; nothing that a client sends becomes a label."""
    send(server, "free", "/v1/completions", COMPLETION | {"model": "no-such-model"})
    lines = [line for line in send(server, "api", "/metrics", None, "GET").text.splitlines() if "tenant=" in line]

    assert any(line.startswith("tokenpool:tenant_requests_total{") for line in lines)
    tokens = 'tokenpool:tenant_tokens_total{kind="completion",model_name="llama",tenant="free"}'
    assert used(server, "free", "llama")[2] == next(
        float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(tokens)
    )
    assert "no-such-model" not in "".join(lines)


def test_the_bench_client_agrees_with_the_server(server, tmp_path: Path, monkeypatch, capsys):
    """Requests and tokens by tenant are those on the accounts; lengths are exact; keys are in no result."""
    monkeypatch.setenv("FREE_KEY", KEYS["free"])
    before = {name: used(server, name, "llama") for name in ("free", "default")}
    words = f"""serve --url {server.base_url} --models llama --rate 40 --duration 1s --input-len 10-30 --output-len 2-5
        --key free=env:FREE_KEY --key default={KEYS["api"]} --share free=3 --ttft 60s --tpot 60s --json {tmp_path}/out
        --png {tmp_path}/out.png"""
    assert 0 == run(["bench", *words.split()])
    text = (tmp_path / "out").read_text()
    result = json.loads(text)

    assert {"done": result["all"]["requests"]} == result["all"]["ended"]
    assert {"token": 1.0, "request": 1.0, "time_weighted": 1.0} == result["all"]["attainment"]
    for name, used_before in before.items():
        entry = result["tenants"][name]
        told = (entry["requests"], entry["input_tokens"], entry["output_tokens"])
        after = used(server, name, "llama")
        assert told == tuple(new - old for new, old in zip(after, used_before, strict=True))
    assert (tmp_path / "out.png").stat().st_size > 1000
    out = capsys.readouterr()
    assert not any(key in text + out.out + out.err for key in KEYS.values())


def test_no_key_is_ever_shown(server):
    """Neither keys nor their hashes are in logs, states, metrics, traces or command lines, whatever is asked."""
    for headers in ({"x-api-key": "tp-wrong-9999"}, {"authorization": "Bearer tp-wrong-9999"}):
        httpx.post(f"{server.base_url}/v1/completions", json=COMPLETION, headers=headers)
    for content in (b"{", b"\xff", b'{"model": "llama", "prompt": 5}'):
        headers = {"x-api-key": KEYS["free"], "authorization": f"Bearer {KEYS['api']}"}
        httpx.post(f"{server.base_url}/v1/completions", content=content, headers=headers)
    shown = [server.admin("GET", path).text for path in ("/state", "/tenants", "/trace")]
    shown += [send(server, "api", path, None, "GET").text for path in ("/metrics", "/load", "/version", "/v1/models")]
    assert server.process is not None
    pids = [server.process.pid, *child_pids(server.process.pid)]
    shown += [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids]
    shown.append(server.log)
    assert "llama" in server.log and len(server.log) > 1000, "nothing was logged: the test would prove nothing"
    secrets = [*KEYS.values(), "tp-wrong-9999"]
    secrets += [hashlib.sha256(key.encode()).hexdigest() for key in KEYS.values()]

    assert [] == [secret for secret in secrets if any(secret in text for text in shown)]


def test_the_admin_api_refuses_deep_bodies(server):
    """Its routes do not go through the router: JSON too deep for the parser is a 400 of theirs."""
    headers = {"x-api-key": KEYS["admin"]}
    answer = httpx.post(f"{server.base_url}/v1/pool/models", content=b"[" * 50_000, headers=headers)

    assert (400, "BadRequestError") == (answer.status_code, answer.json()["error"]["type"])


BOMB = {"type": "string", "pattern": "^a{1,20000}$"}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": BOMB}}
TEXT_FORMAT = {"type": "json_schema", "name": "x", "schema": BOMB}


@pytest.mark.parametrize(("path", "body"), [
    ("/v1/chat/completions", CHAT | {"response_format": FORMAT}),
    ("/v1/chat/completions", CHAT | STREAM | {"response_format": FORMAT}),
    ("/v1/chat/completions/batch", CHAT | {"messages": [CHAT["messages"]] * 2, "response_format": FORMAT}),
    ("/v1/completions", COMPLETION | {"response_format": FORMAT}),
    ("/v1/completions", COMPLETION | {"structured_outputs": {"regex": "a{1,20000}"}}),
    ("/v1/completions", COMPLETION | {"structured_outputs": {"grammar": 'root ::= "a"{1,20000}'}}),
    ("/v1/responses", {"model": "llama", "input": "hi", "text": {"format": TEXT_FORMAT}}),
    ("/v1/messages", CHAT | {"output_config": {"format": {"type": "json_schema", "schema": BOMB}}}),
])  # fmt: skip
def test_a_grammar_that_unrolls_to_much_is_refused_on_each_route(server, path, body):
    """400 in the shape of the API that was called, as an event where vLLM has begun a stream; no token is put out."""
    before = used(server, "free", "llama")
    answer = send(server, "free", path, body)

    assert answer.status_code == (200 if "stream" in body else 400), answer.text
    assert "above 1000" in answer.text and ('"error"' in answer.text and "BadRequestError" in answer.text)
    assert before[2] == used(server, "free", "llama")[2]


def test_grammars_and_schemas_are_still_followed(server):
    """A schema, a choice and a regular expression shape the answer as they did, one by one and in a list."""
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    schema["additionalProperties"] = False
    shaped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    answer = send(server, "free", "/v1/chat/completions", CHAT | {"response_format": shaped, "max_tokens": 60})
    assert {"a"} == json.loads(answer.json()["choices"][0]["message"]["content"]).keys(), answer.text
    good = {"yes", "no"}
    for constraint in ({"choice": ["yes", "no"]}, {"regex": "(yes|no){1}"}, {"grammar": 'root ::= "yes" | "no"'}):
        body = COMPLETION | {"prompt": [PROMPT, PROMPT], "n": 2, "temperature": 1.0, "ignore_eos": False}
        body |= {"structured_outputs": constraint, "max_tokens": 60}
        choices = send(server, "free", "/v1/completions", body).json()["choices"]
        assert 4 == len(choices) and {choice["text"] for choice in choices} <= good


@pytest.mark.parametrize(("path", "body"), [
    ("/v1/completions", COMPLETION | {"prompt": [PROMPT] * 65}), ("/v1/completions", COMPLETION | {"n": 65}),
    ("/v1/chat/completions", CHAT | {"n": 65}),
    ("/v1/chat/completions/batch", CHAT | {"messages": [CHAT["messages"]] * 65}),
    ("/v1/embeddings", {"model": "embed", "input": ["x"] * 65}),
])  # fmt: skip
def test_a_request_of_too_many_sequences_is_refused_whole(server, path, body):
    """The cap is known before anything is begun: no request, no token is counted."""
    before = used(server, "free", body["model"])
    answer = send(server, "free", path, body)

    assert (400, "max_sequences_per_request") == (answer.status_code, answer.json()["error"]["param"])
    assert before == used(server, "free", body["model"])


def test_many_sequences_of_one_request_are_answered(server):
    """As many as the cap allows, more than the engine gets at a time, all come back."""
    answer = send(server, "free", "/v1/completions", COMPLETION | {"prompt": [PROMPT] * 16, "n": 4, "temperature": 1.0})
    assert 64 == len(answer.json()["choices"])
    assert 64 == len(send(server, "free", "/v1/embeddings", {"model": "embed", "input": ["x"] * 64}).json()["data"])


def test_a_tenant_finds_only_its_own_prefixes(server):
    """What another tenant has sent is not in the cache; what oneself has sent is."""
    body = COMPLETION | {"prompt": [7, 8, 9] * 130}

    def cached(key: str) -> int:
        details = send(server, key, "/v1/completions", body).json()["usage"]["prompt_tokens_details"]
        return (details or {}).get("cached_tokens") or 0

    assert 0 == cached("free")
    assert cached("free") > 0
    assert 0 == cached("api")
    assert cached("api") > 0


def test_the_pool_s_numbers_are_not_for_tenants(server):
    """403 on each way to the metrics; the load is the tenant's own."""
    for path in ("/metrics", "/models/llama/metrics/", "/models/llama/load"):
        assert 403 == send(server, "free", path, None, "GET").status_code
    assert {"server_load": 0, "models": {}} == send(server, "free", "/load", None, "GET").json()
    assert "models" in send(server, "api", "/load", None, "GET").json()


# -- the meter, on vLLM's own OutputProcessor -------------------------------------------------------------------


def engine_request(request_id: str, priority: int = 0) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=request_id, external_req_id=request_id, prompt_token_ids=[1, 2, 3], mm_features=None,
        sampling_params=SamplingParams(detokenize=False), pooling_params=None, arrival_time=1000.0, lora_request=None,
        cache_salt=None, data_parallel_rank=None, priority=priority,
    )  # fmt: skip


@pytest.mark.parametrize("by_priority", [False, True])
def test_the_engine_gets_the_tenants_priority_and_the_true_arrival(by_priority):
    """A larger priority goes first in vLLM, whatever the client asks for; time in the line counts as waiting."""
    processor = OutputProcessor(None, log_stats=False)
    config = SimpleNamespace(policy="priority" if by_priority else "fcfs")
    core = SimpleNamespace(add_request_async=None)
    meter(SimpleNamespace(output_processor=processor, engine_core=core, scheduler_config=config))
    made = []
    for name, priority, asked in (("low", -1, -(10**9)), ("mid", 0, 7), ("mid2", 0, 8), ("high", 2, 10**9)):
        account = Account(TenantConfig(name, keys=(b"k",), priority=priority))
        call = account.begin({"type": "http", "method": "POST"}, "m", 0)
        call.held_s = 2.5
        token = CURRENT_CALL.set(call)
        processor.add_request(request := engine_request(name, asked), None)
        CURRENT_CALL.reset(token)
        made.append((request.priority, name))
        assert 997.5 == request.arrival_time
        processor.process_outputs([EngineCoreOutput(request_id=name, new_token_ids=[4, 5])])
        assert (1, 3, 2) == tuple(vars_of(account.usage["m"]))
        assert call.has_begun
    processor.add_request(outside := engine_request("outside", 3), None)

    assert (3, 1000.0) == (outside.priority, outside.arrival_time)
    if by_priority:
        assert ["high", "mid", "mid2", "low"] == [name for _, name in sorted(made)]
    else:
        assert [-(10**9), 7, 8, 10**9] == [priority for priority, _ in made]


def vars_of(usage: Any) -> list[int]:
    return [usage.requests, usage.prompt_tokens, usage.completion_tokens]
