# SPDX-License-Identifier: Apache-2.0
"""What n-grams gain in a pool, and in plain vLLM: tokens per second with and without them, on prompts that repeat.

A pool has the same tiny model twice, once with speculative decoding by n-grams and once without; beside it run two
servers of plain vLLM. All start once and stay up; the load goes to one model at a time, in rounds of alternating order,
so that a drift of the machine hits all. Each value is the median over rounds:

    spec_ratio   tokens per second with n-grams, pool / plain; higher is better for the pool
    base_ratio   the same without n-grams
    gain_pool    tokens per second with n-grams / without, in the pool
    gain_plain   the same in plain vLLM

The model says only a few words, so that n-grams of a stream with random weights come again. `acceptance` has accepted
drafts / drafts of both sides, over all rounds.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.parts import common

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 2}
SIDES, MODELS = ("pool", "plain"), ("ngram", "none")
_PHRASE_TOKENS, _PROMPT_TOKENS = 8, 64
_KV_MIB, _WEIGHT_MIB = 64, 8


@dataclass(frozen=True, slots=True)
class Run:
    """One load on one model of one side."""

    round: int
    side: str
    model: str
    tokens_per_s: float
    tokens_per_event: float
    """Above 1 where drafts are accepted."""


@dataclass(frozen=True, slots=True)
class SpecDecode:
    """See the module."""

    spec_ratio: float
    base_ratio: float
    gain_pool: float
    gain_plain: float
    spec_ratio_spread: list[float]
    """The ratio of every round, to judge the median by."""
    acceptance: dict[str, float]
    runs: list[Run]


def run(
    *, rounds: int, users: int, tokens: int, requests: int, seed: int, start_limit_s: float, logs: Path | None
) -> SpecDecode:
    """Measure all four in `rounds` rounds; each of `users` sends `requests` requests of `tokens` tokens in a round."""
    with common.scratch(logs) as (folder, log_folder, stack):
        model = _make_model(folder)
        servers: dict[tuple[str, str], common.Server] = {}
        for name, words, models in _commands(model, folder):  # one after the other: each has the machine to start
            server = common.Server(words, models, log_folder / f"{name}.log")
            stack.callback(server.close)
            common.wait_until_ready([server], start_limit_s)
            common.progress(f"{name} is ready")
            servers |= {(name.partition("-")[0], served): server for served in models}
        order = [(side, model) for model in MODELS for side in SIDES]
        for key in order:
            _load(servers, key, -1, _prompts(seed - 1, users), users, 16)
        before = {side: _drafts(servers[side, "ngram"]) for side in SIDES}
        runs = []
        for number in range(rounds):
            prompts = _prompts(seed * 10_000 + number, users * requests)
            for key in order if number % 2 == 0 else order[::-1]:
                made = _load(servers, key, number, prompts, users, tokens)
                common.progress(f"round {number} {' '.join(key)}: {made.tokens_per_s:.0f} tokens/s")
                runs.append(made)
        acceptance = {}
        for side in SIDES:
            accepted, drafts = (a - b for a, b in zip(_drafts(servers[side, "ngram"]), before[side], strict=True))
            acceptance[side] = accepted / drafts
    return _summarize(runs, acceptance)


def _make_model(folder: Path) -> Path:
    """In a child process: see `common`."""
    (path,) = common.make_models(folder, ["llama"]).values()
    code = "import sys; from pathlib import Path; from tokenpool.demo.tiny_drafters import make_few_words as make\n"
    words = folder / "few-words"
    subprocess.run([sys.executable, "-c", f"{code}make(Path(sys.argv[1]), sys.argv[2])", path, words], check=True)
    return words


def _commands(model: Path, folder: Path) -> list[tuple[str, list[str], list[str]]]:
    """Of each server its name, its command and the models that it serves."""
    flags: dict[str, tuple[str, ...]] = {"ngram": ("--speculative-config", json.dumps(NGRAM)), "none": ()}
    pool_file = folder / "pool.yaml"
    entries = [
        {"name": name, "model": str(model), "args": [*common.MODEL_FLAGS, *flags[name]]} for name in MODELS
    ]  # fmt: skip
    memory = {"device_memory": f"{_KV_MIB + 2 * _WEIGHT_MIB}MiB", "page_size": "1MiB"}
    pool_file.write_text(yaml.safe_dump({"models": entries, **memory}))
    plain = ["--model", str(model), *common.MODEL_FLAGS, "--kv-cache-memory-bytes", str(_KV_MIB << 20)]
    commands = [("pool", [*common.POOL, str(pool_file)], list(MODELS))]
    for name in MODELS:
        commands.append((f"plain-{name}", [*common.PLAIN, *plain, "--served-model-name", name, *flags[name]], [name]))
    return commands


def _prompts(seed: int, count: int) -> list[list[int]]:
    """Each a phrase of random tokens again and again."""
    phrases = common.random_prompts(seed, count, _PHRASE_TOKENS)
    return [phrase * (_PROMPT_TOKENS // _PHRASE_TOKENS) for phrase in phrases]


def _load(
    servers: dict[tuple[str, str], common.Server],
    key: tuple[str, str],
    number: int,
    prompts: Sequence[Sequence[int]],
    users: int,
    tokens: int,
) -> Run:
    common.wait_until_quiet(set(servers.values()))
    wall_s, (seen,) = common.measure([common.Load(servers[key].port, key[1], prompts, users, tokens)])
    return Run(number, *key, seen.num_tokens / wall_s, seen.num_tokens / seen.num_events)


def _drafts(server: common.Server) -> tuple[float, float]:
    """Drafted tokens that were accepted so far, and all."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    found = {
        sample.name: sample.value for family in families for sample in family.samples
        if sample.labels.get("model_name") == "ngram"
    }  # fmt: skip
    return found["vllm:spec_decode_num_accepted_tokens_total"], found["vllm:spec_decode_num_draft_tokens_total"]


def _summarize(runs: Sequence[Run], acceptance: dict[str, float]) -> SpecDecode:
    def ratios(over: tuple[str, str], under: tuple[str, str]) -> list[float]:
        speeds = [[r.tokens_per_s for r in runs if (r.side, r.model) == key] for key in (over, under)]
        return [a / b for a, b in zip(*speeds, strict=True)]

    spread = ratios(("pool", "ngram"), ("plain", "ngram"))
    return SpecDecode(
        spec_ratio=statistics.median(spread),
        base_ratio=statistics.median(ratios(("pool", "none"), ("plain", "none"))),
        gain_pool=statistics.median(ratios(("pool", "ngram"), ("pool", "none"))),
        gain_plain=statistics.median(ratios(("plain", "ngram"), ("plain", "none"))),
        spec_ratio_spread=spread,
        acceptance=acceptance,
        runs=list(runs),
    )


def main() -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="runs of each (default: %(default)s)")
    parser.add_argument("--users", type=int, default=4, help="who ask at a time (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="per request, at most 448 (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=3, help="per user and run (default: %(default)s)")
    keys = ["spec_ratio", "base_ratio", "gain_pool", "gain_plain", "acceptance_pool", "acceptance_plain"]
    common.report("spec_decode", run, parser.parse_args(), keys)


if __name__ == "__main__":
    main()
