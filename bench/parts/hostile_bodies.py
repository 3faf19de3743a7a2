# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests that are meant to cost a server much, or to break it. Each function draws one, with its path.

They come with a tenant's key, else nobody would read them. A body is kept to few tokens unless its point is to ask for
many, so that it is the server's own work that they are about and not the model's.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

MODEL, EMBED = "shared", "embed"
"""The model that the polite tenant uses too, and one that makes embeddings."""
CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
EMBEDDINGS, TOKENIZE, DETOKENIZE, RERANK = "/v1/embeddings", "/tokenize", "/detokenize", "/rerank"
GENERATE = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)

Body = tuple[str, bytes]
"""A path, and what is posted there."""
Draw = random.Random


def chat(**more: Any) -> dict[str, Any]:
    """A chat of few tokens, with `more` fields."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, **more}


def completion(**more: Any) -> dict[str, Any]:
    """A completion of few tokens, with `more` fields."""
    return {"model": MODEL, "prompt": "hello", "max_tokens": 2, **more}


def good_body(path: str) -> dict[str, Any]:
    """A small request that `path` takes."""
    if path == RESPONSES:
        return {"model": MODEL, "input": "hello", "max_output_tokens": 2}
    if path in (EMBEDDINGS, RERANK):
        return {"model": EMBED, "input": "hello", "query": "hello", "documents": ["hello"]}
    if path == DETOKENIZE:
        return {"model": MODEL, "tokens": [5, 6]}
    return completion() if path in (COMPLETIONS, TOKENIZE) else chat()


def _dump(path: str, body: Any) -> Body:
    return path, json.dumps(body).encode()


def _around(draw: Draw, value: str, path: str = "") -> Body:
    """`value`, which is written JSON, as a field of a good body."""
    path = path or draw.choice([*GENERATE, EMBEDDINGS, TOKENIZE])
    name = draw.choice(["prompt", "messages", "input", "tools", "metadata", "documents", "extra", "logit_bias"])
    body = good_body(path)
    body.pop(name, None)
    return path, json.dumps(body)[:-1].encode() + f', "{name}": {value}}}'.encode()


def brackets(draw: Draw) -> Body:
    """Arrays and objects inside of each other, or side by side, some of them in another encoding."""
    depth = draw.choice([100, 127, 200, 5_000, 200_000])
    opens = draw.choice(["[", '{"a":', '[{"a":'])
    closes = {"[": "]", '{"a":': "}", '[{"a":': "}]"}[opens]
    text = draw.choice(
        [
            opens * depth + "1" + closes * depth,
            opens * depth,
            "[" + ("[" * 127 + "]" * 127 + ",") * draw.randint(10, 4_000) + "1]",
            "[" + "{}," * draw.choice([1_000, 99_000, 150_000]) + "{}]",
            '"' + '\\"[' * draw.choice([1_000, 300_000]) + '"',
        ]
    )
    path, body = _around(draw, text) if draw.random() < 0.7 else (draw.choice(GENERATE), text.encode())
    encoding = draw.choice(["utf-8"] * 6 + ["utf-16", "utf-32", "utf-8-sig"])
    return path, body if encoding == "utf-8" else body.decode().encode(encoding)


def huge_json(draw: Draw) -> Body:
    """Many values, long texts and numbers that are hard to read."""
    count = draw.choice([1_000, 50_000, 300_000])
    makers: list[Callable[[], str]] = [
        lambda: json.dumps([5] * count),
        lambda: json.dumps([0.1] * count),
        lambda: json.dumps(["a"] * count),
        lambda: json.dumps({f"k{i}": i for i in range(count // 4)}),
        lambda: json.dumps("x" * draw.choice([1 << 16, 1 << 20, 3 << 20])),
        lambda: json.dumps("\ud800" * (count // 8)),
        lambda: json.dumps("\x00" * count),
        lambda: "9" * draw.choice([400, 5_000, 100_000]),
        lambda: "-1e" + "9" * draw.choice([3, 400, 50_000]),
        lambda: "[" + "1e400," * 1_000 + "NaN, Infinity, -Infinity]",
        lambda: "0." + "0" * count + "1",
    ]
    return _around(draw, draw.choice(makers)())


def broken_json(draw: Draw) -> Body:
    """JSON that ends early or has other bytes, or no JSON at all."""
    path = draw.choice([*GENERATE, EMBEDDINGS, TOKENIZE, DETOKENIZE])
    body = bytearray(json.dumps(good_body(path)).encode())
    what = draw.randrange(5)
    if what == 0:
        return path, bytes(body[: draw.randrange(len(body))])
    if what == 1:
        for _ in range(draw.randint(1, 8)):
            body[draw.randrange(len(body))] = draw.randrange(256)
        return path, bytes(body)
    if what == 2:
        return path, draw.randbytes(draw.choice([1, 100, 100_000]))
    if what == 3:
        return path, draw.choice([b"null", b"[]", b'""', b"0", b"true", b"{}", b"", b"\xff\xfe", b'{"model": null}'])
    return path, bytes(body) * 2


def _pattern(draw: Draw) -> str:
    """A regular expression that is dear to compile."""
    count = draw.choice([10, 100, 999, 1_000, 1_001, 4_000, 100_000, 10**12])
    inner = draw.choice(["a", ".", "[a-z]", "\\w", "(a|b|ab)", "(a?){9}", "[^\\n]"])
    return draw.choice(
        [
            f"^{inner}{{1,{count}}}$",
            f"^({inner}{{1,{min(count, 60)}}}){{1,{min(count, 60)}}}$",
            f"^(({inner}{{1,20}}){{1,20}}){{1,20}}$",
            "(a+)+$",
            "(a|aa)*" * draw.randint(1, 40),
            "(" * draw.choice([10, 500, 20_000]) + "a" + ")" * draw.choice([10, 500, 20_000]),
            "(?=.*a)(?!b)\\1(?<n>x)",
            "[" + "a-z" * 2_000 + "]",
            "|".join(f"w{i}" for i in range(draw.choice([100, 5_000]))),
            "\\p{L}" * draw.choice([10, 300]),
            "[^" + "".join(chr(draw.randrange(0x100, 0xD000)) for _ in range(200)) + "]*",
            "\\",
            "{1,2}{3,4}**++",
            "x*" * draw.choice([100, 3_000]),
        ]
    )


def _schema(draw: Draw) -> Any:
    """A JSON schema that is dear to compile, or has no end."""
    count = draw.choice([5, 50, 400, 3_000])
    text = {"type": "string"}
    nested: Any = text
    for _ in range(min(count, 120)):
        nested = draw.choice([{"type": "array", "items": nested}, {"type": "object", "properties": {"a": nested}}])
    wide: Any = text
    for _ in range(draw.randint(2, 9)):
        wide = {draw.choice(["anyOf", "oneOf", "allOf"]): [wide] * draw.randint(2, 3)}
    cycle = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    tree = {"type": "object", "properties": {name: {"$ref": "#"} for name in "abcdefgh"}}
    return draw.choice(
        [
            {"type": "string", "pattern": _pattern(draw)},
            {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(count)}},
            {
                "type": "object",
                "properties": {f"p{i}": {"type": "string", "pattern": "^a{1,60}$"} for i in range(count // 5)},
            },
            {"type": "object", "patternProperties": {_pattern(draw): text}, "minProperties": 10**6},
            {"enum": [f"value {i}" for i in range(count)]},
            {"type": "array", "items": text, "minItems": draw.choice([1, 10**4, 10**9]), "maxItems": 10**9},
            {"type": "string", "minLength": draw.choice([10, 10**5, 10**15]), "maxLength": 10**15},
            {"type": "integer", "minimum": -(10**30), "maximum": 10**30, "multipleOf": 7},
            {"type": "number", "exclusiveMinimum": 1e308, "maximum": -1e308},
            {"type": "string", "format": draw.choice(["uri", "date-time", "email", "none", "regex"])},
            {"$ref": draw.choice(["#", "#/a/b", "http://127.0.0.1/x", "file:///etc/passwd", "#/$defs/none"])},
            nested, wide, cycle, tree, {"not": {}}, {}, [], True, "x", 5, {"type": ["string"] * 100}, {"type": "none"},
        ]
    )  # fmt: skip


def schemas(draw: Draw) -> Body:
    """Schemas in each place that takes one."""
    schema = _schema(draw)
    function = {"name": "f", "parameters": schema}
    named = {"name": "x", "schema": schema}
    tag = {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": schema}}
    old_tag = {"structures": [{"begin": "<a>", "schema": schema, "end": "</a>"}], "triggers": ["<a>"]}
    text = json.dumps(schema)
    chosen = {"type": "function", "function": {"name": "f"}}
    where: list[Callable[[], Body]] = [
        lambda: _dump(CHAT, chat(response_format={"type": "json_schema", "json_schema": named})),
        lambda: _dump(CHAT, chat(structured_outputs={"json": schema})),
        lambda: _dump(COMPLETIONS, completion(structured_outputs={"json": text})),
        lambda: _dump(CHAT, chat(tools=[{"type": "function", "function": function}], tool_choice=chosen)),
        lambda: _dump(CHAT, chat(tools=[{"type": "function", "function": function}], tool_choice="required")),
        lambda: _dump(COMPLETIONS, completion(structured_outputs={"structural_tag": json.dumps(tag)})),
        lambda: _dump(COMPLETIONS, completion(structured_outputs={"structural_tag": json.dumps(old_tag)})),
        lambda: _dump(RESPONSES, good_body(RESPONSES) | {"text": {"format": {"type": "json_schema", **named}}}),
        lambda: _dump(MESSAGES, chat(tools=[{"name": "f", "input_schema": schema}], tool_choice={"type": "any"})),
    ]
    return draw.choice(where)()


def regexes(draw: Draw) -> Body:
    """Regular expressions as the form of an answer."""
    path, body = draw.choice([(CHAT, chat()), (COMPLETIONS, completion())])
    return _dump(path, body | {"structured_outputs": {"regex": _pattern(draw)}})


def grammars(draw: Draw) -> Body:
    """Grammars and lists of choices."""
    count = draw.choice([10, 300, 5_000])
    rules = "\n".join(f"r{i} ::= r{i + 1} r{i + 1} | r{i + 1}" for i in range(min(count, 400)))
    grammar = draw.choice(
        [
            'root ::= root "a" | root root | ""',
            f'root ::= r0\n{rules}\nr{min(count, 400)} ::= "a"',
            f"root ::= [a-z]{{1,{draw.choice([50, 1_000, 90_000])}}}",
            "root ::= ((a{1,40}){1,40}){1,40}\na ::= [a-z]",
            "root ::= " + " | ".join(f'"w{i}"' for i in range(count)),
            "root ::= " + "(" * count + '"a"' + ")" * count,
            "root ::= none",
            "root ::=",
            f"start: A~1..{draw.choice([50, 1_000, 10**6])}\nA: /[a-z]+/",
            "start: start start | start\n%import common.WORD",
            'root ::= "' + "\\x00" * count + '"',
            "?" * count,
        ]
    )
    if draw.random() < 0.3:
        choices: list[Any] = [f"choice {i}" for i in range(count)]
        return _dump(CHAT, chat(structured_outputs={"choice": draw.choice([choices, choices * 9, ["a" * 60_000], []])}))
    return _dump(COMPLETIONS, completion(structured_outputs={"grammar": grammar}))


def sampling(draw: Draw) -> Body:
    """Lists and numbers for the sampler that are long, or out of every range."""
    count = draw.choice([100, 5_000, 30_000])
    words = [f"word {i}" for i in range(count)]
    more: dict[str, Any] = draw.choice(
        [
            {"stop": words}, {"stop": ["a" * count]}, {"stop": ""}, {"bad_words": words}, {"bad_words": ["a" * count]},
            {"stop_token_ids": list(range(count))}, {"allowed_token_ids": [5] * count},
            {"allowed_token_ids": [-1, 10**9]}, {"logit_bias": {str(i): 1 for i in range(count)}},
            {"logit_bias": {"5": 1e308}}, {"logprobs": 10**6}, {"prompt_logprobs": 10**6},
            {"temperature": -1e308}, {"top_k": 10**30}, {"seed": 2**63}, {"min_tokens": 10**9},
            {"repetition_penalty": 1e-300}, {"truncate_prompt_tokens": 2**31},
            {"vllm_xargs": {f"k{i}": "v" for i in range(count)}}, {"kv_transfer_params": {"do_remote_prefill": True}},
            {"priority": 10**18}, {"request_id": "x" * count}, {"cache_salt": "x" * count}, {"user": "x" * count},
            {"echo": True, "suffix": "x" * count}, {"prompt_embeds": "QUJD" * count}, {"prompt_embeds": ["!"]},
            {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": 5},
        ]
    )  # fmt: skip
    path, body = draw.choice([(CHAT, chat()), (COMPLETIONS, completion())])
    return _dump(path, body | more)


def templates(draw: Draw) -> Body:
    """Chats that are dear to render, or bring a template of their own."""
    count = draw.choice([10, 2_000, 30_000])
    loop = "{% for i in range(10 ** 9) %}{% for j in range(10 ** 9) %}x{% endfor %}{% endfor %}"
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    system = {"role": "system", "content": "x" * count}
    body = draw.choice(
        [
            chat(chat_template=draw.choice([loop, escape, "{{ 'x' * 10 ** 10 }}", "{% include '/etc/passwd' %}"])),
            chat(chat_template_kwargs={"chat_template": loop, "tools": "x" * count, "messages": [1]}),
            chat(messages=[{"role": "user", "content": "a"}] * count),
            chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * count}]),
            chat(messages=[system, {"role": "assistant", "content": escape, "tool_calls": [{}] * 9}]),
            chat(tools=[{"type": "function", "function": {"name": f"f{i}"}} for i in range(count // 4)]),
            chat(documents=[{"text": "a"}] * count),
            chat(add_generation_prompt=True, continue_final_message=True),
            chat(messages=[{"role": draw.choice(["", "x" * count, "tool", "\x00"]), "content": None}]),
        ]
    )
    return _dump(draw.choice([CHAT, CHAT, MESSAGES, TOKENIZE]), body)


def many_prompts(draw: Draw) -> Body:
    """Lists of prompts times `n`: one call that asks for thousands of sequences."""
    count, n = draw.choice([2, 64, 1_000, 20_000]), draw.choice([1, 16, 10_000])
    messages = [[{"role": "user", "content": "a"}]] * count
    query = {"query": "a", "documents": ["a"] * count, "text_1": "a", "text_2": ["a"] * count}
    return draw.choice(
        [
            lambda: _dump(COMPLETIONS, completion(prompt=["a"] * count, n=n, max_tokens=1)),
            lambda: _dump(COMPLETIONS, completion(prompt=[[5]] * count, n=str(n), max_tokens=1)),
            lambda: _dump(f"{CHAT}/batch", chat(messages=messages, n=n)),
            lambda: _dump(EMBEDDINGS, {"model": EMBED, "input": ["a"] * count}),
            lambda: _dump(draw.choice([RERANK, "/v1/rerank", "/score", "/pooling"]), {"model": EMBED, **query}),
        ]
    )()


def huge_numbers(draw: Draw) -> Body:
    """Counts of answers, beams and tokens that no machine has."""
    number = draw.choice([500, 2_000, 16_384, 10**6, 2**31, 2**63, 10**40, -1, "1e9", 1e300])
    names = ["n", "best_of", "max_tokens", "max_completion_tokens", "min_tokens", "top_logprobs", "logprobs"]
    name = draw.choice(names)
    more: dict[str, Any] = {name: number}
    if draw.random() < 0.2:
        more = {"use_beam_search": True, "n": number, "temperature": 0}
    path, body = draw.choice([(CHAT, chat()), (COMPLETIONS, completion())])
    return _dump(path, body | {"ignore_eos": draw.random() < 0.5} | more)


def megabytes(draw: Draw) -> Body:
    """Megabytes for the tokenizer, and for the way back."""
    count = draw.choice([10_000, 300_000, 2_000_000])
    text = draw.choice(["a" * count, "a b" * (count // 3), "\u0301" * (count // 6), "🙂" * (count // 8), "\n" * count])
    ids = draw.choice([[5] * (count // 8), [10**9], [-1], [2**63], [511] * (count // 8)])
    return draw.choice(
        [
            lambda: _dump(TOKENIZE, {"model": MODEL, "prompt": text}),
            lambda: _dump(TOKENIZE, chat(messages=[{"role": "user", "content": text}])),
            lambda: _dump("/v1/messages/count_tokens", chat(messages=[{"role": "user", "content": text}])),
            lambda: _dump(DETOKENIZE, {"model": MODEL, "tokens": ids}),
            lambda: _dump(COMPLETIONS, completion(prompt=draw.choice([text, ids]))),
            lambda: _dump(CHAT, chat(messages=[{"role": "user", "content": text}])),
            lambda: _dump(EMBEDDINGS, {"model": EMBED, "input": text}),
        ]
    )()


def model_names(draw: Draw) -> Body:
    """Names of models that are paths, huge, or no names."""
    name = draw.choice(
        [
            "../../etc/passwd", "/etc/passwd", "shared/../embed", "shared\x00", "SHARED", " shared", "", None, 5, [],
            {}, ["shared"], "x" * draw.choice([300, 70_000, 2_000_000]), "\ud800", "%73hared", "shared%2f..", "🙂",
            "http://127.0.0.1/", "${HOME}", "{{7*7}}", "'; DROP TABLE models;--", "shared\r\nx-api-key: a",
        ]
    )  # fmt: skip
    path = draw.choice([*GENERATE, EMBEDDINGS, TOKENIZE, "/v1/load_lora_adapter", "/v1/unload_lora_adapter"])
    adapter = {"lora_name": name, "lora_path": draw.choice(["/etc", "../..", "http://127.0.0.1/"])}
    return _dump(path, good_body(path) | {"model": name} | (adapter if "lora" in path else {}))


def responses(draw: Draw) -> Body:
    """The Responses API with the ids of others, work behind the client's back, and tools on other machines."""
    other = draw.choice(["resp_1", "resp_" + "a" * 40, "../x", "resp_" + "x" * 50_000])
    server = {"type": "mcp", "server_label": "x", "server_url": "http://127.0.0.1:1/"}
    more: dict[str, Any] = draw.choice(
        [
            {"previous_response_id": other}, {"background": True, "store": True}, {"request_id": other, "store": True},
            {"background": True, "store": True, "request_id": "resp_1"}, {"background": True, "stream": True},
            {"background": True, "store": False}, {"tools": [server]}, {"tools": [{"type": "code_interpreter"}]},
            {"max_tool_calls": 10**9, "tools": [{"type": "web_search_preview"}]}, {"input": [{}] * 5_000},
            {"input": [{"type": "function_call_output", "call_id": other, "output": "x"}]}, {"include": ["x"] * 9_000},
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "file:///etc/passwd"}]}]},
            {"reasoning": {"effort": "x"}}, {"prompt": {"id": other}}, {"conversation": other}, {"truncation": "x"},
        ]
    )  # fmt: skip
    return _dump(RESPONSES, good_body(RESPONSES) | more)


def media(draw: Draw) -> Body:
    """Images, sounds and films from private addresses, from files, and as data."""
    url = draw.choice(
        [
            "http://169.254.169.254/latest/meta-data/", "http://127.0.0.1:1/x.png", "http://[::1]/", "http://0/",
            "file:///etc/passwd", "gopher://127.0.0.1/", "http://2130706433/", "http://localhost@127.0.0.1/",
            "data:image/png;base64," + "A" * draw.choice([100, 1_000_000]), "data:,", "x" * 100_000, "", None, 5,
        ]
    )  # fmt: skip
    kind = draw.choice(["image_url", "audio_url", "video_url", "input_audio", "image_pil", "image_embeds"])
    value = draw.choice([{"url": url}, url, {"data": url, "format": "wav"}])
    content = [{"type": kind, kind: value}] * draw.choice([1, 1, 200])
    return _dump(draw.choice([CHAT, MESSAGES, TOKENIZE]), chat(messages=[{"role": "user", "content": content}]))


ODD: dict[str, Callable[[Draw], Body]] = {
    "brackets": brackets,
    "huge_json": huge_json,
    "broken_json": broken_json,
    "schemas": schemas,
    "regexes": regexes,
    "grammars": grammars,
    "sampling": sampling,
    "templates": templates,
    "megabytes": megabytes,
    "model_names": model_names,
    "responses": responses,
    "media": media,
}
"""Kinds of bodies that are odd."""
GREEDY: dict[str, Callable[[Draw], Body]] = {"many_prompts": many_prompts, "huge_numbers": huge_numbers}
"""Kinds that ask for much work of the engine."""
