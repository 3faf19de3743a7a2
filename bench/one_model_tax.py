# SPDX-License-Identifier: Apache-2.0
"""What one model pays for living in a pool: the same tiny model behind tokenpool and behind plain vLLM.

Both servers start once and stay up; the load goes to one at a time, in rounds of alternating order (A B, B A, ...),
so that a drift of the machine hits both. Every ratio is tokenpool / plain, the median over rounds of the ratio of the
two neighbouring runs:

    throughput_ratio_cN  tokens per second at N users; higher is better for the pool
    itl_p50_ratio_cN     median time between two token events; lower is better (p99 and mean are in the JSON)

Events that reach the client in one piece count as 0 apart: where a side sends in bursts (tokens_per_event above 1, or
a p99 far above the p50), judge by tpot_mean_ratio and the throughput instead.

With --same both sides are plain vLLM: what the ratios then differ from 1 is the noise of the machine. With --model
hybrid the model has layers that keep a state beside layers of attention (Nemotron-H) in the place of a llama.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.parts import common

CONCURRENCIES = (1, 8, 32)
PROMPT_TOKENS = 64
KV_MIB = 64
WEIGHT_MIB = 8  # the pool's budget holds the weights too: about 1 MiB, and what rounding to pages takes
SIDES = ("pool", "plain")
MODELS = {"llama": ("llama", []), "hybrid": ("nemotron_h", ["--no-enable-prefix-caching"])}
"""By --model the kind of tiny model, and the flags that it cannot do without."""


@dataclass(frozen=True, slots=True)
class Run:
    """One load on one side. Times are those between token events."""

    round: int
    side: str
    concurrency: int
    tokens_per_s: float
    itl_p50_ms: float
    itl_p99_ms: float
    tpot_mean_ms: float
    """Of all tokens but the first of each request. Unlike `itl_*`, the same for a stream that comes in bursts."""
    ttft_p50_ms: float
    tokens_per_event: float
    cpu_ms_per_token: float
    """CPU time of the loaded side's processes: less noisy than wall time, but counts threads that spin."""
    idle_cpu_frac: float
    """Cores that the other side used meanwhile; should be near 0."""


@dataclass(frozen=True, slots=True)
class OneModelTax:
    """Ratios tokenpool / plain; see the module."""

    throughput_ratio_c1: float
    throughput_ratio_c8: float
    throughput_ratio_c32: float
    itl_p50_ratio_c1: float
    itl_p50_ratio_c8: float
    itl_p50_ratio_c32: float
    better: dict[str, str]
    itl_p99_ratio: dict[str, float]
    tpot_mean_ratio: dict[str, float]
    cpu_per_token_ratio: dict[str, float]
    throughput_ratio_spread: dict[str, list[float]]
    """The ratio of every round, to judge the median by."""
    plain_median: dict[str, dict[str, float]]
    """Medians over rounds of the plain side's own values."""
    ready_s: dict[str, float]
    runs: list[Run]


def run(
    *,
    model: str,
    rounds: int,
    tokens: int,
    requests: int,
    same: bool,
    seed: int,
    start_limit_s: float,
    logs: Path | None,
) -> OneModelTax:
    """Measure both sides in `rounds` rounds; each user sends `requests` requests of `tokens` tokens in a round."""
    with common.scratch(logs) as (folder, log_folder, stack):
        kind, flags = MODELS[model]
        ((name, path),) = common.make_models(folder, [kind]).items()
        ready_s, servers = {}, {}
        for side in SIDES:  # one after the other, so that each gets the whole machine to start
            words = _plain_words(path, name) if same or side == "plain" else _pool_words(path, name)
            servers[side] = common.Server([*words, *flags], [name], log_folder / f"{side}.log")
            stack.callback(servers[side].close)
            (ready_s[side],) = common.wait_until_ready([servers[side]], start_limit_s)
            common.progress(f"{side} ready after {ready_s[side]:.1f} s")
        for side in SIDES:
            for concurrency in CONCURRENCIES:
                _load(servers, side, name, concurrency, -1, seed=seed - 1, tokens=16, requests=2)
        runs = []
        for number in range(rounds):
            for concurrency in CONCURRENCIES:
                for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                    run_seed = seed * 10_000 + number * 100 + concurrency  # the same prompts for both sides
                    made = _load(servers, side, name, concurrency, number, run_seed, tokens, requests)
                    common.progress(f"round {number} c{concurrency} {side}: {made.tokens_per_s:.0f} tokens/s")
                    runs.append(made)
    return _summarize(runs, ready_s)


def _pool_words(path: Path, name: str) -> list[str]:
    memory = ["--device-memory", f"{KV_MIB + WEIGHT_MIB}MiB", "--page-size", "1MiB"]
    return [*common.POOL, str(path), "--served-model-name", name, *common.MODEL_FLAGS, *memory]


def _plain_words(path: Path, name: str) -> list[str]:
    memory = ["--kv-cache-memory-bytes", str(KV_MIB << 20)]
    return [*common.PLAIN, "--model", str(path), "--served-model-name", name, *common.MODEL_FLAGS, *memory]


def _load(
    servers: dict[str, common.Server],
    side: str,
    name: str,
    concurrency: int,
    number: int,
    seed: int,
    tokens: int,
    requests: int,
) -> Run:
    prompts = common.random_prompts(seed, concurrency * requests, PROMPT_TOKENS)
    common.wait_until_quiet(servers.values())
    before = {key: server.cpu_s() for key, server in servers.items()}
    load = common.Load(servers[side].port, name, prompts, concurrency, tokens)
    wall_s, (seen,) = common.measure([load])
    used = {key: server.cpu_s() - before[key] for key, server in servers.items()}
    return Run(
        round=number,
        side=side,
        concurrency=concurrency,
        tokens_per_s=seen.num_tokens / wall_s,
        itl_p50_ms=common.percentile(seen.itl_s, 50) * 1e3,
        itl_p99_ms=common.percentile(seen.itl_s, 99) * 1e3,
        tpot_mean_ms=sum(seen.itl_s) / (seen.num_tokens - len(prompts)) * 1e3,
        ttft_p50_ms=statistics.median(seen.ttft_s) * 1e3,
        tokens_per_event=seen.num_tokens / seen.num_events,
        cpu_ms_per_token=used.pop(side) / seen.num_tokens * 1e3,
        idle_cpu_frac=sum(used.values()) / wall_s,
    )


def _summarize(runs: Sequence[Run], ready_s: dict[str, float]) -> OneModelTax:
    def values(side: str, concurrency: int, field: str) -> list[float]:
        return [getattr(r, field) for r in runs if r.side == side and r.concurrency == concurrency]

    def ratios(field: str) -> dict[str, list[float]]:
        return {
            f"c{c}": [a / b for a, b in zip(values("pool", c, field), values("plain", c, field), strict=True)]
            for c in CONCURRENCIES
        }

    def medians(field: str) -> dict[str, float]:
        return {key: statistics.median(of_rounds) for key, of_rounds in ratios(field).items()}

    keys: dict[str, Any] = {
        **{f"throughput_ratio_{c}": value for c, value in medians("tokens_per_s").items()},
        **{f"itl_p50_ratio_{c}": value for c, value in medians("itl_p50_ms").items()},
    }
    numbers = [field for field in asdict(runs[0]) if field not in ("round", "side", "concurrency")]
    return OneModelTax(
        **keys,
        better={
            "throughput_ratio": "higher",
            "itl_p50_ratio": "lower",
            "itl_p99_ratio": "lower",
            "tpot_mean_ratio": "lower",
        },
        itl_p99_ratio=medians("itl_p99_ms"),
        tpot_mean_ratio=medians("tpot_mean_ms"),
        cpu_per_token_ratio=medians("cpu_ms_per_token"),
        throughput_ratio_spread=ratios("tokens_per_s"),
        plain_median={
            f"c{c}": {field: statistics.median(values("plain", c, field)) for field in numbers} for c in CONCURRENCIES
        },
        ready_s=ready_s,
        runs=list(runs),
    )


def main() -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    parser.add_argument("--model", choices=MODELS, default="llama", help="the kind of model (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="pairs of runs per concurrency (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="per request, at most 448 (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=4, help="per user and run (default: %(default)s)")
    parser.add_argument("--same", action="store_true", help="plain vLLM on both sides: measures the noise")
    keys = [f"{name}_ratio_c{c}" for name in ("throughput", "itl_p50") for c in CONCURRENCIES]
    common.report("one_model_tax", run, parser.parse_args(), keys)


if __name__ == "__main__":
    main()
