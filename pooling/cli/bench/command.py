# SPDX-License-Identifier: Apache-2.0
"""`tokenpool bench serve`: play a trace for several models and tenants against a running server. Imports no vLLM.

tokenpool bench serve --models chat,code --rate 4 --duration 60s --ttft 2s --tpot 100ms --json out.json
tokenpool bench serve --trace burstgpt.csv --models chat,code --speed 10 --key a=env:KEY_A --key b=env:KEY_B
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from tokenpool import settings
from tokenpool.cli.bench.client import BenchRequest, Outcome, replay
from tokenpool.cli.bench.report import draw, report, table
from tokenpool.cli.output import write_json
from tokenpool.cli.parser import Parser
from tokenpool.cli.pool_query import add_url_flag
from tokenpool.config import SLO
from tokenpool.errors import ConfigError, show
from tokenpool.sim.generate import poisson, shipped_lengths
from tokenpool.sim.traces.trace_files import read_requests
from tokenpool.units import parse_seconds


def add_command(commands: argparse._SubParsersAction[Parser], summary: str) -> None:
    """Add the parsers of `tokenpool bench` and `tokenpool bench serve` to the tree."""
    bench = commands.add_parser("bench", help=summary, description="Measure a running server under load.")
    kinds = bench.add_subparsers(title="benches", metavar="BENCH", required=True)
    parser = kinds.add_parser(
        "serve",
        help="play a trace for several models and tenants",
        description="Play a trace against a running server and measure it.",
    )
    add_url_flag(parser)
    _add_load_flags(parser.add_argument_group("load"))
    _add_tenant_flags(parser.add_argument_group("tenants"))
    _add_result_flags(parser.add_argument_group("what is on time, and the result"))


def _add_load_flags(group: argparse._ArgumentGroup) -> None:
    count = partial(group.add_argument, metavar="N")
    add = group.add_argument
    add("--trace", type=Path, metavar="FILE", help="requests as CSV or CSV.gz, see docs/planning.md (default: made up)")
    names = "names, with commas; a trace is dealt out to them"
    add("--models", type=lambda text: text.split(","), metavar="NAMES", help=names)
    count("--rate", "--request-rate", type=float, help="requests per second of all models; a trace is sped up to it")
    played = "of made-up arrivals (default: 60s), or how much of a trace is played (default: all)"
    add("--duration", metavar="TIME", help=played)
    count("--num-prompts", type=int, help="play the first N requests only")
    bursts = "1 = Poisson, below in bursts, above steadier, as in vllm bench (default: %(default)s)"
    count("--burstiness", type=float, default=1.0, help=bursts)
    skew = "popularity of models falls as 1 / rank ** skew (default: all equal)"
    count("--skew", type=float, default=0.0, help=skew)
    count("--speed", type=float, default=1.0, help="play a trace this many times as fast (default: %(default)s)")
    count("--input-len", type=_span, help="prompt tokens, N or LOW-HIGH, evenly (default: pairs from ShareGPT)")
    count("--output-len", type=_span, help="tokens of the answer, alike; give both or none without a trace")
    count("--max-input-len", type=int, default=sys.maxsize, help="cut prompts to this")
    count("--max-output-len", type=int, default=sys.maxsize, help="cut answers to this")
    count("--seed", type=int, default=0, help="of arrivals and prompts (default: %(default)s)")


def _add_tenant_flags(group: argparse._ArgumentGroup) -> None:
    key = (
        "API key of a tenant; KEY may be env:VARIABLE. Several: requests are dealt out to them. "
        f"Without: {settings.CLIENT_KEY.name}, if it is set"
    )
    share = "part of the requests of a tenant (default: 1)"
    group.add_argument("--key", action="append", default=[], metavar="NAME=KEY", help=key)
    group.add_argument("--share", action="append", default=[], metavar="NAME=N", help=share)


def _add_result_flags(group: argparse._ArgumentGroup) -> None:
    add, pictured = group.add_argument, "times to the first token and attainment over time"
    add("--ttft", default="10s", metavar="TIME", help="time to the first token (default: %(default)s)")
    add("--tpot", default="100ms", metavar="TIME", help="time per further token (default: %(default)s)")
    add("--goodput", nargs="+", metavar="ttft:MS", help="the same as in vllm bench: ttft:1000 tpot:100")
    add("--drain", default="60s", metavar="TIME", help="wait after the last arrival (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the result there")
    add("--png", type=Path, metavar="FILE", help=f"draw {pictured} there; needs matplotlib")


def run(flags: argparse.Namespace) -> int:
    """Play, print and write what was measured; raises ConfigError for settings and files that cannot be."""
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
    for traced_s, model, input_len, output_len, _ in workload.requests:
        if flags.models and model not in names:
            names[model] = model if model in flags.models else flags.models[len(names) % len(flags.models)]
        arrival_s = traced_s / speed if speed else 0.0
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
    return [BenchRequest(r.arrival_s, r.model, r.input_len, r.output_len) for r in made.requests]


def _play(url: str, requests: list[BenchRequest], flags: argparse.Namespace, keys: Mapping[str, str]) -> list[Outcome]:
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{show(url)} is no address: write such as http://127.0.0.1:8000", key="--url")
    drain_s = parse_seconds(flags.drain, "--drain")
    if not keys and (key := settings.CLIENT_KEY.get()) is not None:
        keys = {"": key}
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
            environment = settings.environment()
            if variable not in environment:
                raise ConfigError(f"environment variable {variable} is not set: set it", key="--key")
            key = environment[variable]
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
