# SPDX-License-Identifier: Apache-2.0
"""Kinds of hostile input, as scripts of raw bytes, drawn from a seed.

heads      too many headers, too long ones, malformed lines, garbage, wrong framing, requests in one piece
slow       heads and bodies that trickle, are half sent and left, or whose answers nobody reads
keys       no key, wrong keys and keys of other purposes, for every route, by every method and spelling of a path
bodies     of `hostile_bodies` and `hostile_waits`, with a tenant's key
floods     small requests of a tenant that is above its limits
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from bench.parts import hostile_bodies as bodies
from bench.parts import hostile_waits as waits
from bench.parts.hostile_bodies import COMPLETIONS, EMBED, GENERATE, MODEL, RESPONSES, Draw, completion, good_body
from bench.parts.hostile_wire import Script

ALL = 1 << 30
"""Of a script with a right key: all of its answers may tell something."""
POOL_PATHS = (
    "/v1/pool/state", "/v1/pool/trace", "/v1/pool/tenants", "/v1/pool/decisions", "/v1/pool/check",
    "/v1/pool/models", f"/v1/pool/models/{MODEL}",
)  # fmt: skip
OTHER_PATHS = (
    "/metrics", "/metrics/", "/load", "/version", "/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect",
    "/v1/models", f"/v1/models/{MODEL}", "/server_info", "/tokenizer_info", "/is_sleeping", "/sleep", "/pause",
    "/collective_rpc", "/reset_prefix_cache", "/start_profile", "/update_weights", "/v1/load_lora_adapter",
    "/inference/v1/abort_requests", "/inference/v1/generate", "/scale_elastic_ep", "/v1/responses/resp_1",
    "/v1/responses/resp_1/cancel", "/v1/embeddings", "/rerank", "/tokenize", "/detokenize", "/pooling", "/invocations",
    "/v1/audio/transcriptions", "/v1/realtime", "/static/x", "/favicon.ico", "/", *GENERATE,
)  # fmt: skip
PATHS = (*POOL_PATHS, *OTHER_PATHS, *(f"/models/{MODEL}{path}" for path in ("/metrics", "/load", "/docs", COMPLETIONS)))
OPEN_PATHS = ("/health", "/live", "/ready", "/ping", "/pool")
"""What a server answers without a key, by its docs."""
METHODS = ("GET", "POST", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "get", "BREW")
WEBSOCKET = {
    "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Keys:
    """Right keys, each for its purpose."""

    odd: str
    """Of a tenant whose limits let nearly everything through to where it is read."""
    greedy: str
    """Of a tenant that is above its limits all the time."""
    view: str
    metrics: str


Kind = Callable[[Draw, Keys], Script]


def request(
    path: str, body: bytes = b"", key: str = "", method: str = "POST", close: bool = True, **headers: str
) -> bytes:
    """A request as it should be, but for what is in its parts."""
    upgrade = "Upgrade" if "Upgrade" in headers else "close" if close else "keep-alive"
    lines = {"Host": "pool", "Connection": upgrade, "Content-Type": "application/json"}
    if body or method == "POST":
        lines["Content-Length"] = str(len(body))
    if key:
        lines["Authorization"] = f"Bearer {key}"
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{text}\r\n".encode("utf-8", "surrogateescape") + body


def _good(draw: Draw, key: str, **headers: str) -> bytes:
    path = draw.choice(GENERATE)
    return request(path, json.dumps(good_body(path)).encode(), key, **headers)


# -- heads -------------------------------------------------------------------------------------------


def heads(draw: Draw, keys: Keys) -> Script:
    """Headers that are too many or too long, with a key and without."""
    key = draw.choice(["", keys.odd])
    count = draw.choice([200, 300, 5_000, 20_000])
    more = draw.choice(
        [
            {f"x-{i}": "a" for i in range(count)},
            {"x-long": "a" * draw.choice([60_000, 70_000, 2_000_000])},
            {"x" * draw.choice([1_000, 70_000]): "a"},
            {"Authorization": "Bearer " + "a" * draw.choice([100, 60_000, 200_000])},
            {"X-Request-Id": "a" * draw.choice([1_000, 60_000])},
            {"Content-Type": "multipart/form-data; boundary=" + "a" * 50_000},
            {"Content-Type": "application/json;" + "a=b;" * 12_000},
            {"Cookie": "a=b; " * 12_000, "Accept": "*/*," * 500},
            {"traceparent": "00-" + "f" * draw.choice([32, 60_000]), "X-Forwarded-For": "1.1.1.1," * 5_000},
            {"Origin": "http://" + "a" * 60_000, "Range": "bytes=" + "0-1," * 9_000},
        ]
    )
    return Script("heads", [(0, _good(draw, key, **more))], ALL * bool(key and "Authorization" not in more))


def lines(draw: Draw, keys: Keys) -> Script:
    """Request lines and headers that are none, without a key."""
    good = _good(draw, "")
    target, head_end = b"POST /v1", good.index(b"\r\n") + 2
    text = draw.choice(
        [
            good.replace(target, b"POST  /v1"), good.replace(b"HTTP/1.1", b"HTTP/9.9"),
            good.replace(b"HTTP/1.1", b"HTTP/1.0"), good.replace(b" HTTP/1.1", b""),
            good.replace(target, b"POST http://other/v1"), good.replace(target, b"POST /" + b"a" * 90_000),
            good.replace(target, b"POST /v1?" + b"a=b&" * 16_000), good.replace(target, b"POST \x00/v1"),
            good.replace(target, b"POST /\xff\xfe"), good.replace(target, b"\r\n\r\n\r\nPOST /v1"),
            good.replace(b"POST", b"A" * draw.choice([40, 70_000])), good.replace(b"Host: pool\r\n", b""),
            good.replace(b"Host: pool", b"Host: a\r\nHost: b"), good.replace(b"Host: pool", b"Host: a b\x00"),
            good[:head_end] + b"no colon\r\n" + good[head_end:], good[:head_end] + b" folded: 1\r\n" + good[head_end:],
            good[:head_end] + b"x : 1\r\n: 2\r\n" + good[head_end:], good.replace(b"\r\n", b"\n"),
            good[:head_end] + b"x: \x00\x01\r\n" + good[head_end:],
            good[:head_end] + b"x: a\rb: c\nd: e\r\n" + good[head_end:],
            good.replace(b"\r\n", b"\r"), good[:head_end] + b"x: \xff\xfe\r\n" + good[head_end:],
        ]
    )  # fmt: skip
    return Script("lines", [(0, text), (1, b"\r\n\r\n")])


def garbage(draw: Draw, keys: Keys) -> Script:
    """Bytes of other protocols, or of none."""
    text = draw.choice(
        [
            draw.randbytes(draw.choice([1, 100, 100_000])),
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + draw.randbytes(512),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + draw.randbytes(64),
            b"GET /\r\n", b"EHLO pool\r\n", b"\x00" * 70_000, b"\r\n" * 40_000, b"*1\r\n$4\r\nPING\r\n",
            b"PROXY TCP4 1.1.1.1 1.1.1.1 1 1\r\n", b"SSH-2.0-x\r\n", b"\x80" * 10, b"HTTP/1.1 200 OK\r\n\r\n",
        ]
    )  # fmt: skip
    return Script("garbage", [(0, text), (draw.choice([0, 1]), b"\r\n\r\n")], leaves_after_s=1.0)


def framing(draw: Draw, keys: Keys) -> Script:
    """Lengths and transfer encodings that contradict each other, some with a request without a key behind them."""
    body = json.dumps(completion()).encode()
    inner = request("/v1/models", method="GET") + request("/v1/pool/state", method="GET")
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    wrong = draw.choice(["0", "5", "-1", "+5", "1e3", "0x10", "9" * 30, "", " ", "5, 5", "5, 6", str(10**9)])
    chunks = draw.choice(
        [
            chunked, b"0\r\n\r\n", b"ffffffffffffffff\r\n" + body, b"-5\r\nabcde\r\n", b"zz\r\n", b"5\r\nab",
            b"1;" + b"x" * 80_000 + b"\r\na\r\n0\r\n\r\n", b"1\r\na\r\n" * 20_000 + b"0\r\n\r\n",
            b"0\r\n" + b"x: y\r\n" * 9_000 + b"\r\n", b"5\nabcde\n0\n\n",
        ]
    )  # fmt: skip
    codings = ["chunked", "Chunked", "gzip, chunked", "identity", "chunked, chunked", "xchunked", "\x0bchunked"]
    head = request(COMPLETIONS, key=keys.odd, close=False, Transfer_Encoding=draw.choice(codings), Content_Length=wrong)
    if draw.random() < 0.5:
        head = head.replace(b"Content-Length: %s\r\n" % wrong.encode(), b"")
    twice = request(COMPLETIONS, body, keys.odd, close=False).replace(b"\r\n\r\n", b"\r\nContent-Length: 3\r\n\r\n", 1)
    parts = draw.choice(
        [
            head + chunks + inner,
            request(COMPLETIONS, key=keys.odd, close=False, Content_Length=wrong) + body + inner,
            twice + inner,
            request(COMPLETIONS, body, keys.odd, close=False, Expect="100-continue") + inner,
            request(COMPLETIONS, body, keys.odd, Content_Encoding=draw.choice(["gzip", "br", "deflate", "x"])),
        ]
    )
    # What a parser takes for a second request has no key, so only the first answer may tell something.
    return Script("framing", [(0, parts)], keyed=1, num_answers=3, leaves_after_s=2.0)


def pipelines(draw: Draw, keys: Keys) -> Script:
    """Many requests in one piece, of which only the first ones have a key."""
    num_keyed, num = draw.choice([0, 1, 5]), draw.choice([5, 20, 200])
    pieces = [request("/v1/models", key=keys.odd, method="GET", close=False)] * num_keyed
    pieces += [request(draw.choice(PATHS), method="GET", close=False) for _ in range(num)]
    return Script("pipelines", [(0, b"".join(pieces))], num_keyed, num_answers=num_keyed + num)


# -- slow --------------------------------------------------------------------------------------------


def slow(draw: Draw, keys: Keys) -> Script:
    """A head or a body that comes in small pieces; some of them wait for what the server does about it."""
    key = draw.choice(["", keys.odd])
    good = _good(draw, key)
    head_end = good.index(b"\r\n\r\n") + 4
    begin = draw.choice([0, 20, head_end - 6, head_end + 5])
    pieces = [good[i : i + 1] for i in range(begin, len(good))][: draw.choice([5, 10, 20])]
    parts = [(0.0, good[:begin]), *((draw.choice([0.1, 0.4]), piece) for piece in pieces)]
    if draw.random() < 0.03:  # until the server closes it
        return Script("slow", parts, ALL * bool(key))
    return Script("slow", parts, ALL * bool(key), leaves_after_s=0.0)


def halves(draw: Draw, keys: Keys) -> Script:
    """A request that ends in the middle; what has been read of it must not stay."""
    key = draw.choice(["", keys.odd, keys.greedy])
    path = draw.choice(GENERATE)
    body = json.dumps(good_body(path) | {"x": "a" * draw.choice([10, 100_000, 4_000_000])}).encode()
    text = request(path, body, key, Expect=draw.choice(["", "100-continue"]))
    part = text[: draw.randrange(len(text))]
    return Script("halves", [(0, part)], ALL * bool(key), leaves_after_s=draw.choice([0, 0.5, 4]))


def unread(draw: Draw, keys: Keys) -> Script:
    """Streams that nobody reads, or that are left at once."""
    body = completion(stream=True, ignore_eos=True, max_tokens=draw.choice([20, 200]), prompt=[5] * 30)
    text = request(COMPLETIONS, json.dumps(body).encode(), keys.greedy)
    return Script("unread", [(0, text)], ALL, leaves_after_s=draw.choice([0, 0.05, 1, 5]), reads=False)


# -- keys --------------------------------------------------------------------------------------------


def _wrong_keys(draw: Draw, keys: Keys) -> dict[str, str]:
    return draw.choice(
        [
            {}, {}, {"Authorization": "Bearer "}, {"Authorization": "Bearer wrong-key-0123456789"},
            {"Authorization": f"Basic {keys.odd}"}, {"Authorization": keys.odd}, {"x_api_key": keys.odd[:-1]},
            {"Authorization": f"Bearer {keys.odd}x"}, {"Authorization": f"Bearer {keys.odd},{keys.odd}"},
            {"x_api_key": "\udcff\udcfe"}, {"Cookie": f"api_key={keys.odd}"}, {"X_Forwarded_User": "admin"},
            {"Authorization": f"Bearer{keys.odd}"}, {"X_Original_URL": "/health", "X_Rewrite_URL": "/health"},
            {"Authorization": f"Bearer {keys.odd.upper()}"}, {"Proxy_Authorization": f"Bearer {keys.odd}"},
        ]
    )  # fmt: skip


def keyless(draw: Draw, keys: Keys) -> Script:
    """Every route by every method, without a key or with a wrong one."""
    path, method = draw.choice(PATHS), draw.choice(METHODS)
    if draw.random() < 0.2:
        path += draw.choice(["?", "&"]) + draw.choice(["model=shared", f"api_key={keys.odd}", "seconds=1", "a" * 9_000])
    body = b"" if method in ("GET", "HEAD") else json.dumps(completion()).encode() * draw.choice([1, 1, 20_000])
    text = request(path, body, method=method, **_wrong_keys(draw, keys))
    return Script("keyless", [(0, text)], has_body=method != "HEAD")


def other_purposes(draw: Draw, keys: Keys) -> Script:
    """Right keys for what they are not for: a tenant's for the pool, a view key for changes and for models."""
    what = draw.randrange(4)
    if what == 0:
        path, key, method = draw.choice(POOL_PATHS), draw.choice([keys.odd, keys.greedy, keys.metrics]), "GET"
    elif what == 1:
        path, key, method = draw.choice(OTHER_PATHS), keys.view, draw.choice(["GET", "POST"])
    elif what == 2:
        path, key, method = draw.choice(POOL_PATHS), draw.choice([keys.view, keys.odd]), draw.choice(["POST", "DELETE"])
    else:
        path = draw.choice(["/metrics", "/metrics/", f"/models/{MODEL}/metrics", "/metrics?model=shared"])
        key, method = keys.odd, draw.choice(["GET", "OPTIONS", "POST"])
    body = json.dumps({"name": "x", "model": "/etc", "args": ["--trust-remote-code"]}).encode()
    return Script("other_purposes", [(0, request(path, body if method == "POST" else b"", key, method))])


def paths(draw: Draw, keys: Keys) -> Script:
    """Spellings of a path that one layer may read otherwise than the next, without a key."""
    path = draw.choice(PATHS)
    first, _, rest = path[1:].partition("/")
    encoded = "".join(f"%{ord(letter):02x}" for letter in path[1:])
    path = draw.choice(
        [
            f"/{path}", f"//{path}", f"/health/..{path}", f"/health/%2e%2e{path}", f"/./{path}", f"/{first}//{rest}",
            f"/{first}/./{rest}", f"/{encoded}", f"/{encoded.replace('%', '%25')}", f"{path}/", f"{path}/..;/",
            f"{path}%00", f"{path}%2f", f"{path};a=b", f"/ping%2f..{path}", f"/{first}%5c{rest}", f"\\{first}\\{rest}",
            f"/models/{MODEL}/..{path}", f"/models/{MODEL}/../../health/..{path}", f"/models/../{path}", path.upper(),
            f"/models/{'x' * 9_000}{path}", f"/health?{path}", f"/health#{path}", f"/health{path}", f"http://pool{path}",
            f"{path}/{'../' * 500}health", "/" + "a/" * 9_000, "/" + "%2e%2e/" * 2_000, f"/ready/{path}", f"*{path}",
            f"/models/%2e%2e{path}", f"/%u002e{path}", f"/models//{path}", f"/ping/..%c0%af{path}", f"/health;{path}",
        ]
    )  # fmt: skip
    if path.split("?")[0].split("#")[0] in OPEN_PATHS:
        return Script("paths", [(0, request(path, method="GET"))], is_open=True)
    method = draw.choice(["GET", "GET", "GET", "POST", "OPTIONS"])
    return Script("paths", [(0, request(path, method=method, **_wrong_keys(draw, keys)))])


def preflights(draw: Draw, keys: Keys) -> Script:
    """Preflights, and what looks like them, with bodies that nobody should read."""
    asked = {"Origin": "http://evil.test", "Access_Control_Request_Method": draw.choice(["GET", "POST", "x" * 9_000])}
    given = dict(draw.choice([list(asked.items()), [*asked.items()][:1], [*asked.items()][1:]]))
    body = b"[" * draw.choice([0, 0, 1_000_000])
    path = draw.choice([*PATHS, *OPEN_PATHS])
    text = request(path, body, method="OPTIONS", **given)
    return Script("preflights", [(0, text)], is_open=given == asked or path in OPEN_PATHS)


def websockets(draw: Draw, keys: Keys) -> Script:
    """Websockets that are opened without a key, or left open, with frames that are none."""
    path = draw.choice(["/v1/realtime", "/v1/realtime", f"/models/{MODEL}/v1/realtime", *PATHS])
    if draw.random() < 0.5:
        given = {**WEBSOCKET, **_wrong_keys(draw, keys)}
        text = request(f"{path}?model={MODEL}", method="GET", **given)
        return Script("websockets", [(0, text)], leaves_after_s=2)
    opened = request(f"{path}?model={MODEL}", key=keys.odd, method="GET", **WEBSOCKET)
    mask = b"\x00\x00\x00\x00"
    event = json.dumps({"type": "session.update", "model": MODEL}).encode()
    frames = draw.choice(
        [
            b"\x81" + bytes([0x80 | len(event)]) + mask + event, b"\x81\x05hello", b"\xff\xff\xff",
            b"\x81\xff" + b"\x7f" * 8 + mask, b"\x01\x81" + mask + b"a", b"\x89\xfe\x10\x00" + mask + b"a" * 4096,
            b"\x82\xff" + (3 << 20).to_bytes(8) + mask + b"[" * (3 << 20), b"\x88\x80" + mask,
        ]
    )  # fmt: skip
    return Script("websockets", [(0, opened), (0.3, frames)], ALL, leaves_after_s=draw.choice([0.5, 5]))


# -- bodies and floods -------------------------------------------------------------------------------


def forms(draw: Draw, keys: Keys) -> Script:
    """Forms of many parts, long ones, and with names that lead elsewhere; some without a key."""
    count = draw.choice([1, 900, 20_000])
    name = draw.choice(["file", "model", "a" * 5_000, "../../etc/passwd"])
    part = f'--b\r\nContent-Disposition: form-data; name="{name}"; filename="../../etc/passwd"\r\n\r\n'.encode()
    body = draw.choice(
        [
            (part + b"a\r\n") * count + b"--b--\r\n",
            part + b"a" * draw.choice([1_000, 4 << 20]) + b"\r\n--b--",
            b"--b\r\n" + b"x: y\r\n" * count + b"\r\n",
            b"--b" * count,
            b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + b"a" * 500_000 + b"\r\n--b--",
            b"\r\n" * count,
        ]
    )
    kind = draw.choice(["multipart/form-data; boundary=b", "multipart/form-data", "application/x-www-form-urlencoded"])
    if "url" in kind:
        texts = [b"a=b&" * count, b"model=" + b"%41" * count, b"&" * count, b"model=shared&" + b"a" * 99_000]
        body = draw.choice(texts)
    key = draw.choice(["", keys.odd, keys.odd])
    path = draw.choice(["/v1/audio/transcriptions", "/v1/audio/translations", "/v1/images/edits", *GENERATE])
    return Script("forms", [(0, request(path, body, key, Content_Type=kind))], ALL * bool(key))


def stored(draw: Draw, keys: Keys) -> Script:
    """Responses that are stored, fetched, streamed and cancelled, with ids that are guessed, long or in use."""
    name = draw.choice(["resp_1", f"resp_{draw.randrange(50)}", "x" * 900, "x" * 50_000, "%00", "%2e%2e"])
    more = {"store": True, "background": draw.random() < 0.8, "stream": draw.random() < 0.5, "request_id": name}
    body = good_body(RESPONSES) | more | {"max_output_tokens": draw.choice([2, 200])}
    place, after = f"{RESPONSES}/{name}", draw.choice(["5", "-1", "9" * 5_000, "x"])
    asked = place + draw.choice(["", "?stream=true", f"?stream=true&starting_after={after}"])
    made = request(RESPONSES, json.dumps(body).encode(), keys.odd, close=False)
    sent = [made, request(asked, key=keys.odd, method="GET", close=False)]
    sent += [request(f"{place}/cancel", key=keys.odd, close=False), request(place, method="GET")]
    return Script("stored", [(0, b"".join(sent))], keyed=3, num_answers=4, leaves_after_s=draw.choice([0.5, 5]))


def floods(draw: Draw, keys: Keys) -> Script:
    """Small requests that are as they should be, of a tenant above its limits."""
    path = draw.choice([*GENERATE, bodies.EMBEDDINGS, bodies.TOKENIZE])
    return Script("floods", [(0, request(path, json.dumps(good_body(path)).encode(), keys.greedy))], ALL)


def _with_body(name: str, make: Callable[[Draw], bodies.Body], is_greedy: bool) -> Kind:
    def kind(draw: Draw, keys: Keys) -> Script:
        path, body = make(draw)
        how = {"Content-Type": draw.choice(["application/json"] * 9 + ["text/plain"])}
        model = EMBED if draw.random() < 0.1 else MODEL
        if draw.random() < 0.15:
            path = draw.choice([f"/models/{model}{path}", f"{path}?model={model}"])
        return Script(name, [(0, request(path, body, keys.greedy if is_greedy else keys.odd, **how))], ALL)

    return kind


KINDS: dict[str, tuple[int, Kind]] = {
    **{
        kind.__name__: (weight, kind)
        for weight, kind in (
            (4, heads), (4, lines), (3, garbage), (4, framing), (1, pipelines), (2, slow), (3, halves), (2, unread),
            (10, keyless), (4, other_purposes), (8, paths), (3, preflights), (3, websockets), (3, forms), (14, floods),
            (3, stored),
        )
    },
    **{name: (2, _with_body(name, make, False)) for name, make in bodies.ODD.items()},
    **{name: (1, _with_body(name, make, False)) for name, make in waits.WAITS.items()},
    **{name: (4, _with_body(name, make, True)) for name, make in bodies.GREEDY.items()},
}  # fmt: skip
"""How often each kind comes, and what draws one."""


def make_scripts(seed: int, numbers: range, keys: Keys, kinds: Sequence[str] = ()) -> Iterator[Script]:
    """The scripts of these numbers, of some kinds or all: the same for a seed, whatever others are made."""
    names = list(kinds or KINDS)
    weights = [KINDS[name][0] for name in names]
    for number in numbers:
        draw = random.Random(f"{seed} {number}")
        name = draw.choices(names, weights)[0]
        script = KINDS[name][1](draw, keys)
        yield replace(script, kind=name)


def make_ordinary(seed: int, count: int, keys: Keys, input_len: int, output_len: int) -> Iterator[Script]:
    """Streams of random prompts of so many tokens, of the tenant that sends the odd bodies, as they should be."""
    for number in range(count):
        prompt = random.Random(f"{seed} ordinary {number}").choices(range(3, 500), k=input_len)
        body = completion(prompt=prompt, max_tokens=output_len, ignore_eos=True, stream=True, temperature=0)
        yield Script("ordinary", [(0, request(COMPLETIONS, json.dumps(body).encode(), keys.odd))], ALL)
