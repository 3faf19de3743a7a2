# SPDX-License-Identifier: Apache-2.0
"""`tokenpool bench serve`: play a trace for several models and tenants against a running server. Imports no vLLM.

    tokenpool bench serve --models chat,code --rate 4 --duration 60s --ttft 2s --tpot 100ms --json out.json
    tokenpool bench serve --trace burstgpt.csv --models chat,code --speed 10 --key a=env:KEY_A --key b=env:KEY_B
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import sys
from collections.abc import Mapping
from pathlib import Path

from tokenpool.config import SLO
from tokenpool.errors import ConfigError, show
from tokenpool.serve.bench_client import BenchRequest, Outcome, replay
from tokenpool.serve.bench_report import draw, report, table
from tokenpool.serve.pool_query import default_url
from tokenpool.serve.sim_tool import Parser, write_json
from tokenpool.sim.generate import poisson, shipped_lengths
from tokenpool.sim.trace_files import read_requests
from tokenpool.units import parse_seconds

API_KEY_VARIABLE = "TOKENPOOL_API_KEY"


def bench(words: list[str]) -> int:
    """Run `tokenpool bench`; raises ConfigError for settings and files that cannot be."""
    if words in (["-h"], ["--help"]):
        words = ["serve", *words]
    if not words or words[0] != "serve":
        raise ConfigError("give `tokenpool bench serve`; see tokenpool bench serve --help")
    flags = _parser().parse_args(words[1:])
    keys = _keys(flags.key)
    requests = make_requests(flags, list(keys))
    slo = _slo(flags)
    outcomes = _play(flags.url.rstrip("/"), requests, flags, keys)
    answer = report(outcomes, slo)
    print(table(answer))
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(flags).items()}
    settings["key"] = list(keys)  # names alone
    write_json(flags.json, {"settings": settings, **answer})
    if flags.png:
        draw(outcomes, slo, flags.png)
    return 0 if answer["all"]["ended"].get("done") else 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser("tokenpool bench serve", description="Play a trace against a running server and measure it.")
    add = parser.add_argument
    add("--url", default=default_url(), help="of the server (default: $TOKENPOOL_URL, else http://127.0.0.1:8000)")
    add("--trace", type=Path, help="requests as CSV or CSV.gz in place of made-up ones; layouts: docs/planning.md")
    add("--models", type=lambda text: text.split(","), help="names, with commas; a trace is dealt out to them")
    add("--rate", "--request-rate", type=float, help="requests per second of all models; a trace is sped up to it")
    add("--duration", help="of made-up arrivals (default: 60s), or how much of a trace is played (default: all)")
    add("--num-prompts", type=int, help="play the first N requests only")
    add("--burstiness", type=float, default=1.0, help="1 = Poisson, below in bursts, above steadier, as in vllm bench")
    add("--skew", type=float, default=0.0, help="popularity of models falls as 1 / rank ** skew (default: all equal)")
    add("--speed", type=float, default=1.0, help="play a trace this many times as fast (default: %(default)s)")
    add("--input-len", type=_span, help="prompt tokens, N or LOW-HIGH, evenly (default: pairs from ShareGPT)")
    add("--output-len", type=_span, help="tokens of the answer, alike; give both or none without a trace")
    add("--max-input-len", type=int, default=sys.maxsize, help="cut prompts to this")
    add("--max-output-len", type=int, default=sys.maxsize, help="cut answers to this")
    add("--key", action="append", default=[], metavar="NAME=KEY", help="API key of a tenant; KEY may be env:VARIABLE. "
        f"Several: requests are dealt out to them. Without: {API_KEY_VARIABLE}, if it is set")  # fmt: skip
    add("--share", action="append", default=[], metavar="NAME=N", help="part of the requests of a tenant (default: 1)")
    add("--ttft", default="10s", help="time to the first token (default: %(default)s)")
    add("--tpot", default="100ms", help="time per further token (default: %(default)s)")
    add("--goodput", nargs="+", metavar="ttft:MS", help="the same as in vllm bench: ttft:1000 tpot:100")
    add("--drain", default="60s", help="wait after the last arrival (default: %(default)s)")
    add("--seed", type=int, default=0, help="of arrivals and prompts (default: %(default)s)")
    add("--json", type=Path, help="write the result there")
    add("--png", type=Path, help="draw times to the first token and attainment over time there; needs matplotlib")
    return parser


def make_requests(flags: argparse.Namespace, tenants: list[str]) -> list[BenchRequest]:
    """The requests to be sent, in order of arrival; raises ConfigError."""
    rng = random.Random(flags.seed)
    requests = (_from_trace(flags) if flags.trace else _made_up(flags))[: flags.num_prompts]
    if not requests:
        raise ConfigError("there is no request to send: raise --rate or --duration")
    shares = _shares(flags.share, tenants)
    made = []
    for request in requests:
        lengths = [
            rng.randint(*span) if span and flags.trace else length
            for span, length in ((flags.input_len, request.input_len), (flags.output_len, request.output_len))
        ]
        lengths = [min(*pair) for pair in zip(lengths, (flags.max_input_len, flags.max_output_len), strict=True)]
        tenant = rng.choices(tenants, shares)[0] if tenants else ""
        made.append(request._replace(input_len=lengths[0], output_len=lengths[1], tenant=tenant))
    return made


def _from_trace(flags: argparse.Namespace) -> list[BenchRequest]:
    end_s = parse_seconds(flags.duration, "--duration") if flags.duration else math.inf
    _check(flags.speed > 0, "--speed", "must be above 0")
    workload = read_requests(flags.trace)
    if not workload.requests:
        raise ConfigError("there are no requests in it", source=str(flags.trace))
    speed = flags.speed
    if flags.rate is not None:
        _check(flags.rate > 0, "--rate", "must be above 0")
        speed = flags.rate * workload.requests[-1].arrival_s / len(workload.requests)
    names: dict[str, str] = {}
    made = []
    for arrival_s, model, input_len, output_len in workload.requests:
        if flags.models and model not in names:
            names[model] = model if model in flags.models else flags.models[len(names) % len(flags.models)]
        arrival_s = arrival_s / speed if speed else 0.0
        if arrival_s <= end_s:
            made.append(BenchRequest(arrival_s, names.get(model, model), input_len, output_len))
    return made


def _made_up(flags: argparse.Namespace) -> list[BenchRequest]:
    if not flags.models or flags.rate is None:
        raise ConfigError("give --trace, or --models and --rate")
    _check(flags.burstiness > 0, "--burstiness", "must be above 0")
    if (flags.input_len is None) != (flags.output_len is None):
        raise ConfigError("give --input-len and --output-len, or none of them")
    rng = random.Random(flags.seed)
    pairs = shipped_lengths()
    if flags.input_len:
        pairs = [(rng.randint(*flags.input_len), rng.randint(*flags.output_len)) for _ in range(1000)]
    rates = dict.fromkeys(flags.models, flags.rate / len(flags.models))
    duration_s = parse_seconds(flags.duration or "60s", "--duration")
    made = poisson(rates, duration_s, flags.seed, skew=flags.skew, cv=flags.burstiness**-0.5, lengths=pairs)
    return [BenchRequest(*request) for request in made.requests]


def _play(url: str, requests: list[BenchRequest], flags: argparse.Namespace, keys: Mapping[str, str]) -> list[Outcome]:
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{show(url)} is no address: write such as http://127.0.0.1:8000", key="--url")
    drain_s = parse_seconds(flags.drain, "--drain")
    if not keys and API_KEY_VARIABLE in os.environ:
        keys = {"": os.environ[API_KEY_VARIABLE]}
    print(f"{len(requests)} requests in {requests[-1].arrival_s:.1f} s to {url}", file=sys.stderr)

    def progress(text: str) -> None:
        print(text, file=sys.stderr)

    return asyncio.run(replay(url, requests, seed=flags.seed, drain_s=drain_s, keys=keys, progress=progress))


def _slo(flags: argparse.Namespace) -> SLO:
    times = {"ttft": flags.ttft, "tpot": flags.tpot}
    for word in flags.goodput or ():
        name, colon, ms = word.partition(":")
        if name not in times or not colon:
            raise ConfigError(f"{show(word)} is none of ttft:MS and tpot:MS", key="--goodput")
        times[name] = f"{ms}ms"
    return SLO(*(parse_seconds(text, f"--{name}") for name, text in times.items()))


def _keys(words: list[str]) -> dict[str, str]:
    keys = {}
    for word in words:
        name, equals, key = word.partition("=")
        if key.startswith("env:"):
            variable = key.removeprefix("env:")
            if variable not in os.environ:
                raise ConfigError(f"environment variable {variable} is not set: set it", key="--key")
            key = os.environ[variable]
        if not (name and equals and key):
            raise ConfigError("write NAME=KEY or NAME=env:VARIABLE", key="--key")
        keys[name] = key
    return keys


def _shares(words: list[str], tenants: list[str]) -> list[float]:
    shares = dict.fromkeys(tenants, 1.0)
    for word in words:
        name, _, number = word.partition("=")
        try:
            shares[name] = float(number)
        except ValueError:
            raise ConfigError(f"{show(word)} is no NAME=N", key="--share") from None
        _check(name in tenants, "--share", f"no tenant {show(name)}: give its --key")
        _check(0 <= shares[name] < float("inf"), "--share", "must be 0 or more")
    _check(not tenants or sum(shares.values()) > 0, "--share", "all are 0")
    return [shares[name] for name in tenants]


def _span(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    span = int(low), int(high or low)
    if not 1 <= span[0] <= span[1]:
        raise argparse.ArgumentTypeError(f"expected N or LOW-HIGH from 1, got {text!r}")
    return span


def _check(condition: bool, key: str, problem: str) -> None:
    if not condition:
        raise ConfigError(problem, key=key)
