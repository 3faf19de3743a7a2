# SPDX-License-Identifier: Apache-2.0
"""The requests that plain `vllm serve` and the pool must answer alike."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

MODEL, ALIAS = "base", "alias"
KEY = "the-key-of-the-conformance-battery"
ORIGIN = "http://app.test"
CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"


@dataclass(frozen=True, slots=True)
class Probe:
    """One request."""

    about: str
    """What is tried with it; with method and path it names the request."""
    method: str
    path: str
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """How docs/http.md names it."""
        return f"{self.method} {self.path}: {self.about}"


def _with_key(headers: Mapping[str, str] | None = None) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEY}", **(headers or {})}


def _post(about: str, path: str, body: Any, **headers: str) -> Probe:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Probe(about, "POST", path, content, _with_key({"Content-Type": "application/json", **headers}))


def all_probes() -> list[Probe]:
    """The whole battery; names are unique."""
    groups = (
        _keys(), _methods(), _cross_origin(), _encodings(), _broken_json(), _names(), _parameters(),
        _messages_of_chat(), _structured(), _tools(), _other_apis(), _websockets(),
    )  # fmt: skip
    probes = list(itertools.chain(*groups))
    names = [probe.name for probe in probes]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)
    return probes


def chat(**more: Any) -> dict[str, Any]:
    """A chat of few tokens."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 4,
        "temperature": 0,
        **more,
    }


def completion(**more: Any) -> dict[str, Any]:
    """A completion of few tokens."""
    return {"model": MODEL, "prompt": "hello", "max_tokens": 4, "temperature": 0, **more}


def _keys() -> Iterator[Probe]:
    paths = (
        "/", "/health", "/ping", "/version", "/load", "/metrics", "/v1/models", f"/v1/models/{MODEL}",
        "/v1/models/none",
        "/docs", "/openapi.json", "/tokenizer_info", "/server_info", "/v1", "/v1/", "/v1/nothing", "/nothing",
        "/health/", "/v1/models/", "//v1/models", "/v1/../v1/models", "/v1/responses/none", "/favicon.ico",
    )  # fmt: skip
    for path in paths:
        yield Probe("with the key", "GET", path, headers=_with_key())
        yield Probe("without a key", "GET", path)
        yield Probe("with a wrong key", "GET", path, headers={"Authorization": "Bearer wrong"})
    for about, value in (("lower case", f"bearer {KEY}"), ("basic", f"Basic {KEY}"), ("bare", KEY), ("empty", "")):
        yield Probe(f"key in {about}", "GET", "/v1/models", headers={"Authorization": value})
    for path, body in ((CHAT, chat()), (MESSAGES, chat()), ("/tokenize", completion())):
        yield Probe("without a key", "POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})


def _methods() -> Iterator[Probe]:
    paths = (
        CHAT, COMPLETIONS, RESPONSES, MESSAGES, "/tokenize", "/detokenize", "/v1/models", "/health", "/version",
        "/load",
        "/metrics", "/ping", "/nothing",
    )  # fmt: skip
    for path in paths:
        for method in ("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"):
            if method == "GET" and path in (
                "/v1/models",
                "/health",
                "/version",
                "/load",
                "/metrics",
                "/ping",
                "/nothing",
            ):
                continue  # among the keys
            yield Probe("without a body", method, path, headers=_with_key())
        yield Probe("without a body", "POST", path, headers=_with_key())


def _cross_origin() -> Iterator[Probe]:
    for path in (CHAT, "/v1/models", "/health", "/metrics", "/nothing"):
        for about, origin in (("an allowed origin", ORIGIN), ("another origin", "http://evil.test")):
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            yield Probe(f"preflight from {about}", "OPTIONS", path, headers=asked)
            yield Probe(f"from {about}", "GET", path, headers=_with_key({"Origin": origin}))
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    wanted = asked | {"Access-Control-Request-Headers": "authorization,content-type,x-own"}
    yield Probe("preflight for headers", "OPTIONS", CHAT, headers=wanted)
    yield Probe(
        "preflight for no known method", "OPTIONS", CHAT, headers=asked | {"Access-Control-Request-Method": "BREW"}
    )
    yield Probe("from an allowed origin, without a key", "GET", "/v1/models", headers={"Origin": ORIGIN})
    yield _post("from an allowed origin", CHAT, chat(), Origin=ORIGIN)
    yield _post("from an allowed origin, wrong", CHAT, chat(temperature=-1), Origin=ORIGIN)
    yield _post("from an allowed origin, no such model", CHAT, chat(model="none"), Origin=ORIGIN)
    yield _post("from an allowed origin, streamed", CHAT, chat(stream=True), Origin=ORIGIN)


def _encodings() -> Iterator[Probe]:
    text = json.dumps(chat())
    for kind in ("application/json; charset=utf-8", "APPLICATION/JSON", "text/plain", "application/xml", "",
                 "application/x-www-form-urlencoded", "multipart/form-data", "application/vnd.api+json"):  # fmt: skip
        yield _post(f"content type {kind or 'empty'}", CHAT, text.encode(), **{"Content-Type": kind})
    for code in ("utf-16", "utf-32", "utf-8-sig"):
        yield _post(f"body in {code}", CHAT, text.encode(code))
    yield _post("body in Latin 1", CHAT, text.replace("hello", "h\xe9").encode("latin-1"))
    yield _post("gzip", CHAT, gzip.compress(text.encode()), **{"Content-Encoding": "gzip"})
    yield _post("an id of its own", CHAT, chat(), **{"X-Request-Id": "mine"})
    yield _post("accepts XML only", CHAT, chat(), Accept="application/xml")
    yield _post("a key of another scheme", CHAT, chat(), **{"X-Api-Key": KEY})
    yield Probe("only x-api-key", "POST", MESSAGES, json.dumps(chat()).encode(),
                {"Content-Type": "application/json", "X-Api-Key": KEY})  # fmt: skip


def _broken_json() -> Iterator[Probe]:
    valid = json.dumps(chat())[:-1]
    bodies = {
        "empty": b"", "spaces": b"  ", "an open brace": b"{", "a list": b"[]", "null": b"null", "a string": b'"x"',
        "a number": b"1", "an empty object": b"{}", "NaN": f'{valid}, "temperature": NaN}}'.encode(),
        "infinity": f'{valid}, "temperature": Infinity}}'.encode(),
        "a key twice": f'{valid}, "max_tokens": 2}}'.encode(),
        "more after its end": f"{valid}}} x".encode(), "a trailing comma": f"{valid},}}".encode(),
        "single quotes": b"{'model': 'base'}", "a comment": f"{valid} /* x */}}".encode(),
        "bytes that are no UTF-8": valid.encode() + b', "user": "\xff\xfe"}',
        "a lone surrogate": f'{valid}, "user": "\\ud800"}}'.encode(),
        "a NUL": f'{valid}, "user": "\\u0000"}}'.encode(), "a huge number": f'{valid}, "seed": {"9" * 400}}}'.encode(),
        "sixty levels": f'{valid}, "metadata": {"[" * 60}{"]" * 60}}}'.encode(),
    }  # fmt: skip
    for path in (CHAT, COMPLETIONS, MESSAGES, "/tokenize"):
        for about, body in bodies.items():
            yield _post(f"body is {about}", path, body)


def _names() -> Iterator[Probe]:
    for path, body in ((CHAT, chat()), (COMPLETIONS, completion()), (RESPONSES, {"input": "hello",
    "max_output_tokens": 4, "temperature": 0}),
                       (MESSAGES, chat()), ("/tokenize", completion())):  # fmt: skip
        for about, name in (("its alias", ALIAS), ("no such model", "none"), ("an empty name", ""), ("no string", 3),
                            ("null", None), ("other case", MODEL.upper()), ("a long name", "x" * 5000)):  # fmt: skip
            yield _post(f"model is {about}", path, {**body, "model": name})
        yield _post("no model", path, {key: value for key, value in body.items() if key != "model"})


def _parameters() -> Iterator[Probe]:
    common: dict[str, list[Any]] = {
        "temperature": [-1, 3, "warm", None], "top_p": [0, 0.5, 1.5], "top_k": [0, 5, -2], "min_p": [0.2, 2],
        "n": [0, 2, -1, 1.5], "max_tokens": [0, 1, -1, 10**9, "4", None], "min_tokens": [2, 9], "seed": [1, "x", -1],
        "stop": ["e", ["e", "t"], [], [""], 5], "stop_token_ids": [[5], "5"], "presence_penalty": [1, 3],
        "frequency_penalty": [-1, -3], "repetition_penalty": [1.1, 0], "logit_bias": [{"5": 1}, {"x": 1},
        {"99999": 1}, {"5": 999}],
        "ignore_eos": [True], "stream": [True, "yes"], "stream_options": [{"include_usage": True}], "user": ["me", 5],
        "unknown_field": [1], "skip_special_tokens": [False], "return_token_ids": [True], "priority": [1],
        "truncate_prompt_tokens": [2, 9999], "cache_salt": ["salt", ""], "allowed_token_ids": [[5, 6], []],
        "bad_words": [["e"]], "include_stop_str_in_output": [True], "logprobs": [0, 3, 99, True],
    }  # fmt: skip
    own = {
        CHAT: (chat, {"top_logprobs": [2, 99], "max_completion_tokens": [2, -1], "echo": [True],
                      "add_generation_prompt": [False], "continue_final_message": [True],
                      "chat_template": ["{{ 1 }}"]}),
        COMPLETIONS: (completion, {"echo": [True], "suffix": ["x"], "best_of": [2], "prompt": [
            "", [], ["a", "b"], [5, 6], [[5], [6, 7]], [99999], [-1], None, 5, "x " * 2000, ["a", 5]]}),
    }  # fmt: skip
    for path, (make, more) in own.items():
        for key, values in (common | more).items():
            for value in values:
                told = json.dumps(value)
                seeded = {"seed": 5, key: value}  # what is random without a temperature
                yield _post(f"{key} {told if len(told) < 60 else 'of many words'}", path, make(**seeded))
        for stream in (False, True):
            yield _post(f"logprobs, stream {stream}", path,
                        make(stream=stream, logprobs=True if path == CHAT else 2))  # fmt: skip
            yield _post(f"n 2, usage, stream {stream}", path,
                        make(stream=stream, n=2,
                        **({"stream_options": {"include_usage": True}} if stream else {})))  # fmt: skip


def _messages_of_chat() -> Iterator[Probe]:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    told: dict[str, Any] = {
        "none": [], "null": None, "a string": "hello", "an unknown role": [{"role": "robot", "content": "x"}],
        "no role": [{"content": "x"}], "null content": [{"role": "user", "content": None}],
        "an empty text": [{"role": "user", "content": ""}], "parts": [{"role": "user", "content": [{"type": "text",
        "text": "x"}]}],
        "an unknown part": [{"role": "user", "content": [{"type": "smell", "smell": "x"}]}],
        "an image": [{"role": "user", "content": [image]}], "only a system": [{"role": "system", "content": "x"}],
        "a dialogue": [{"role": r, "content": "x"} for r in ("system", "user", "assistant", "user")],
        "an assistant last": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
        "a tool's answer": [{"role": "tool", "tool_call_id": "1", "content": "x"}], "too long": [{"role": "user",
        "content": "x " * 2000}],
    }  # fmt: skip
    for path in (CHAT, MESSAGES):
        for about, messages in told.items():
            yield _post(f"messages are {about}", path, chat(messages=messages))


def _structured() -> Iterator[Probe]:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    formats: dict[str, Any] = {
        "text": {"type": "text"}, "json_object": {"type": "json_object"},
        "json_schema": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        "json_schema without schema": {"type": "json_schema"}, "unknown": {"type": "poem"},
        "a wrong schema": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}},
    }  # fmt: skip
    for about, value in formats.items():
        for stream in (False, True):
            yield _post(f"response_format {about}, stream {stream}", CHAT,
                        chat(response_format=value, stream=stream, max_tokens=12))  # fmt: skip
    for about, value in {"choice": {"choice": ["yes", "no"]}, "regex": {"regex": "[ab]{3}"},
    "grammar": {"grammar": 'root ::= "a"'},
                         "a wrong regex": {"regex": "("}, "two kinds": {"regex": "a", "choice": ["b"]},
                         "nothing": {}}.items():  # fmt: skip
        yield _post(f"structured_outputs {about}", CHAT, chat(structured_outputs=value))
        yield _post(f"structured_outputs {about}", COMPLETIONS, completion(structured_outputs=value))


def _tools() -> Iterator[Probe]:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    choices: dict[str, Any] = {
        "auto": "auto", "none": "none", "required": "required",
        "a name": {"type": "function", "function": {"name": "f"}}, "no such name": {"type": "function",
        "function": {"name": "g"}},
    }  # fmt: skip
    for stream in (False, True):
        for about, choice in choices.items():
            yield _post(f"tool_choice {about}, stream {stream}", CHAT,
                        chat(tools=[tool], tool_choice=choice, stream=stream))  # fmt: skip
    yield _post("tools are empty", CHAT, chat(tools=[]))
    yield _post("a tool without a name", CHAT, chat(tools=[{"type": "function", "function": {}}]))
    yield _post("tool_choice without tools", CHAT, chat(tool_choice="required"))


def _other_apis() -> Iterator[Probe]:
    ask = {"model": MODEL, "input": "hello", "max_output_tokens": 4, "temperature": 0}
    yield _post("plain", RESPONSES, ask)
    yield _post("streamed", RESPONSES, ask | {"stream": True})
    yield _post("not stored", RESPONSES, ask | {"store": False})
    yield _post("in the background", RESPONSES, ask | {"background": True})
    yield _post("after one that is not there", RESPONSES, ask | {"previous_response_id": "resp_none"})
    yield _post("of none", f"{RESPONSES}/resp_none/cancel", {})
    yield _post("plain", MESSAGES, chat())
    yield _post("streamed", MESSAGES, chat(stream=True))
    yield _post("without max_tokens", MESSAGES, {key: value for key, value in chat().items() if key != "max_tokens"})
    yield _post("plain", f"{MESSAGES}/count_tokens", chat())
    yield _post("no such model", f"{MESSAGES}/count_tokens", chat(model="none"))
    yield _post("a chat", "/tokenize", chat())
    yield _post("a text", "/tokenize", completion())
    yield _post("with strings", "/tokenize", completion(return_token_strs=True))
    yield _post("plain", "/detokenize", {"model": MODEL, "tokens": [5, 6]})
    yield _post("wrong tokens", "/detokenize", {"model": MODEL, "tokens": ["x"]})
    yield _post("tokens out of range", "/detokenize", {"model": MODEL, "tokens": [10**6]})
    for path in (
        "/v1/embeddings",
        "/pooling",
        "/classify",
        "/score",
        "/v1/score",
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
    ):
        yield _post("of a model that generates", path, {"model": MODEL, "input": "x", "query": "x", "documents": ["y"]})
    for path in ("/v1/audio/transcriptions", "/v1/audio/translations"):
        form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nbase\r\n--b--\r\n'
        yield _post("of a model that cannot hear", path, form, **{"Content-Type": "multipart/form-data; boundary=b"})
    yield _post("a chat", "/invocations", chat())
    yield _post("nothing known", "/invocations", {"model": MODEL})
    yield _post("two", f"{CHAT}/batch", chat(messages=[chat()["messages"]] * 2))
    yield _post("plain", f"{CHAT}/render", chat())
    yield _post("plain", f"{COMPLETIONS}/render", completion())
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/sleep", "/reset_prefix_cache", "/start_profile",
                 "/collective_rpc", "/scale_elastic_ep", "/abort_requests"):  # fmt: skip
        yield _post("not switched on", path, {"lora_name": "x", "lora_path": "/none"})


def _websockets() -> Iterator[Probe]:
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
               "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}  # fmt: skip
    for path in ("/v1/realtime", "/v1/nothing", "/health"):
        yield Probe("a websocket without a key", "GET", path, headers=upgrade)
        yield Probe("a websocket", "GET", path, headers=_with_key(upgrade))
