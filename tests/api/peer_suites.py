# SPDX-License-Identifier: Apache-2.0
"""Sends vLLM's own API tests to plain `vllm serve` and to a pool of one model, and lists what differs.

    python -m tests.api.peer_suites --tests FOLDER [--json FILE] [--only WORD …] [--logs FOLDER]

FOLDER is an unpacked sdist of vLLM 0.32.0, of which only `tests` and `examples` are needed. The tests stay as they are,
but for their RemoteOpenAIServer (see peer_servers.py), and the models that they name are tiny random ones in a hub
cache of ours. Ends with status 1 if a test passes on one side only and docs/http.md does not say so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tests.api.peer_servers import SIDES

DOCUMENT = Path(__file__).parents[2] / "docs" / "http.md"
_FOLDER = "tests/entrypoints"
# Neighbours with the same model and flags share a server.
FILES = (
    "openai/models/test_models.py",
    "openai/test_return_tokens_as_ids.py",
    "openai/chat_completion/test_chat.py",
    "openai/chat_completion/test_chat_completion.py",
    "openai/chat_completion/test_batched_chat_completions.py",
    "openai/chat_completion/test_chat_echo.py",
    "openai/chat_completion/test_chat_logit_bias_validation.py",
    "openai/chat_completion/test_logprob_token_ids.py",
    "openai/chat_completion/test_root_path.py",
    "openai/chat_completion/test_enable_force_include_usage.py",
    "openai/chat_completion/test_include_reasoning.py",
    "openai/chat_completion/test_thinking_token_budget.py",
    "openai/chat_completion/test_completion_with_function_calling.py",
    "openai/chat_completion/test_chat_completion_with_prompt_embeds.py",
    "openai/completion/test_completion_with_prompt_embeds.py",
    "openai/completion/test_completion.py",
    "openai/completion/test_prompt_validation.py",
    "openai/completion/test_token_in_token_out.py",
    "openai/test_chunked_prompt.py",
    "openai/test_return_token_ids.py",
    "openai/responses/test_basic.py",
    "openai/responses/test_stateful.py",
    "openai/responses/test_structured_output.py",
    "openai/responses/test_function_call.py",
    "openai/responses/test_namespace_tool_separator.py",
    "openai/responses/test_simple.py",
    "anthropic/test_messages.py",
)
_SERVER = "RemoteOpenAIServer("
_NO_SERVER = "starts no server: vLLM's classes are called in the process of the test"
_GPT_OSS = "needs gpt-oss-20b and its vocabulary (harmony)"
LEFT_OUT = {
    "openai/chat_completion/test_serving_chat.py": f"{_NO_SERVER}; one class {_GPT_OSS}",
    "openai/chat_completion/test_extra_content_fields.py": "needs the chat template of a multimodal Gemma 3",
    "openai/completion/test_tensorizer_entrypoint.py": "needs the package tensorizer and a GPU",
    "openai/correctness/test_lmeval.py": "measures the answers of real models",
    "openai/test_openai_schema.py": "needs SmolVLM and the package schemathesis",
    "openai/responses/test_harmony.py": _GPT_OSS,
    "openai/responses/test_mcp_tools.py": _GPT_OSS,
    "openai/responses/test_parsable_context.py": "needs a Qwen3-8B that calls tools",
}
_SUITES = ("openai", "anthropic")
_BASES = (
    "HuggingFaceH4/zephyr-7b-beta", "Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2-1.5B-Instruct", "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B", "facebook/opt-125m", "openai-community/gpt2",
)  # fmt: skip
_ADAPTERS = (
    "typeof/zephyr-7b-beta-lora",
    "charent/self_cognition_Alice",
    "peft-internal-testing/opt-125m-dummy-lora",
)
_ENDING = ("Qwen/Qwen2-1.5B-Instruct", "Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B")
"""Models whose tests wait for an end of the text: many of their tokens are one."""
_END_EVERY = 48
_MAX_TOKENS = 200
_VOCAB_SIZE = 8192
_MAX_POSITION = 32768
_MARKUP = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_start|>", "<|im_end|>")
_LIMIT_S = 3600.0
"""For one side."""
Outcomes = Mapping[str, Sequence[str]]


def make_hub(folder: Path) -> Path:
    """Make a hub cache in which each model that the tests name is a tiny random one; returns its HF_HOME."""
    from transformers.utils.logging import disable_progress_bar

    from tokenpool.demo.tiny_models import make_tiny_lora, make_tiny_model

    disable_progress_bar()
    tiny = make_tiny_model("llama", folder / "tiny")
    home = folder / "hub-home"
    for index, name in enumerate(_BASES):
        _enlarge(tiny, _in_cache(home, name), seed=index, ends=name in _ENDING)
    for index, name in enumerate(_ADAPTERS):
        make_tiny_lora(tiny, _in_cache(home, name), seed=index)
    # A test of its own cache, in the folder for temporary files.
    (folder / "qwen3_06b").symlink_to(home / "hub")
    return home


def _in_cache(home: Path, name: str) -> Path:
    commit = "0" * 40
    model = home / "hub" / f"models--{name.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    path = model / "snapshots" / commit
    path.mkdir(parents=True)
    return path


def _enlarge(tiny: Path, path: Path, *, seed: int, ends: bool) -> None:
    """Write a model like `tiny` whose context and vocabulary are as large as the tests want them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(list(_MARKUP))
    # Words that decode to themselves and back: the tests compare texts with tokens.
    tokenizer.add_tokens([f" w{index:04}" for index in range(len(tokenizer), _VOCAB_SIZE)])
    tokenizer.model_max_length = _MAX_POSITION
    tokenizer.save_pretrained(path)
    config = AutoConfig.from_pretrained(tiny, vocab_size=_VOCAB_SIZE, max_position_embeddings=_MAX_POSITION)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        model.get_output_embeddings().weight[:3] = 0  # special tokens are never the likeliest
    model.save_pretrained(path)
    ends_at = [1, *range(600, _VOCAB_SIZE, _END_EVERY)] if ends else 1
    # Random models know no end: the server caps what a test does not. Greedy unless a test says otherwise: a draw
    # without a seed is another one at each run.
    defaults = {"bos_token_id": 0, "eos_token_id": ends_at, "max_new_tokens": _MAX_TOKENS, "temperature": 0.0}
    (path / "generation_config.json").write_text(json.dumps(defaults))


def left_out(tests: Path) -> dict[str, str]:
    """The files of the suites that are not sent, and why."""
    reasons = {}
    for suite in _SUITES:
        for path in sorted((tests / _FOLDER / suite).rglob("test_*.py")):
            if (file := str(path.relative_to(tests / _FOLDER))) not in FILES:
                reasons[file] = LEFT_OUT.get(file) or _NO_SERVER
                assert file in LEFT_OUT or _SERVER not in path.read_text(), f"{file} is not told of"
    return reasons


def run_side(side: str, tests: Path, files: Sequence[str], home: Path, logs: Path) -> dict[str, list[str]]:
    """Run vLLM's test files against one side; returns the outcome of each test and why it failed."""
    logs.mkdir(parents=True, exist_ok=True)
    results = logs / f"{side}.json"
    results.unlink(missing_ok=True)
    env = {
        **os.environ, "PEER_SIDE": side, "PEER_RESULTS": str(results), "PEER_LOGS": str(logs), "HF_HOME": str(home),
        "TMPDIR": str(home.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH")))),
    }  # fmt: skip
    if side == "plain":
        env["VLLM_PLUGINS"] = ""  # nothing of ours
    command = [sys.executable, "-m", "pytest", "-p", "peer_servers", "-p", "no:cacheprovider", "-q", "--tb=short"]
    command += [f"{_FOLDER}/{file}" for file in files]
    with (logs / f"{side}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=tests, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            process.wait(_LIMIT_S)
        except subprocess.TimeoutExpired:
            print(f"{side}: interrupted after {_LIMIT_S:g} s", file=sys.stderr)
        finally:
            if process.poll() is None:
                process.terminate()  # pytest then still ends its server and writes what it has
            process.wait()
    if not results.exists():
        raise RuntimeError(f"{side}: pytest wrote no results:\n{(logs / f'{side}.log').read_text()[-3000:]}")
    got: dict[str, list[str]] = json.loads(results.read_text())
    return {name.removeprefix(f"{_FOLDER}/"): outcome for name, outcome in got.items()}


def documented(text: str) -> list[str]:
    """Patterns of tests that differ, by the table of four columns in a text's section "vLLM's own API tests"."""
    section = re.search(r"^## vLLM's own API tests\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    lines = section[1].splitlines() if section else []
    rows = [cells for line in lines if line.startswith("| `") and len(cells := line.strip("|").split("|")) == 4]
    patterns = [pattern for cells in rows for pattern in re.findall("`([^`]+)`", cells[0])]
    return [pattern.replace("[", "[[]") for pattern in patterns]  # a bracket of a name stands for itself


def compare(plain: Outcomes, pool: Outcomes, known: Sequence[str]) -> tuple[list[str], dict[str, int]]:
    """What there is to tell of two runs, as lines, and the figures."""
    nothing = ("absent", "")
    differ = undocumented = other_reason = 0
    found: dict[tuple[str, str, str], list[str]] = {}
    for name in [*plain, *(name for name in pool if name not in plain)]:
        here, there = plain.get(name, nothing), pool.get(name, nothing)
        if here[0] != there[0]:
            is_known = any(fnmatchcase(name, pattern) for pattern in known)
            differ, undocumented = differ + 1, undocumented + (not is_known)
            mark = "documented" if is_known else "differs"
        elif here[1] != there[1] and here[0] in ("failed", "error"):
            other_reason += 1
            mark = f"{here[0]} on both, otherwise"
        else:
            continue
        found.setdefault((mark, " ".join(here), " ".join(there)), []).append(name)
    lines: list[str] = []
    for (mark, here_told, there_told), names in found.items():
        lines += [*(f"{mark}: {name}" for name in names), f"    plain {here_told}", f"    pool  {there_told}"]
    figures = {
        "tests": len(plain.keys() | pool.keys()),
        "passed_plain": _count(plain, "passed"),
        "passed_pool": _count(pool, "passed"),
        "same": len(plain.keys() | pool.keys()) - differ,
        "differ": differ,
        "undocumented": undocumented,
        "other_reason": other_reason,
    }
    return lines, figures


def _count(outcomes: Outcomes, outcome: str) -> int:
    return sum(told[0] == outcome for told in outcomes.values())


def per_file(got: Mapping[str, Outcomes]) -> list[str]:
    """One line a file: what became of its tests on each side."""
    lines = []
    for file in dict.fromkeys(name.partition("::")[0] for outcomes in got.values() for name in outcomes):
        sides = []
        for side, outcomes in got.items():
            told = {name: outcome for name, outcome in outcomes.items() if name.partition("::")[0] == file}
            kinds = sorted({outcome[0] for outcome in told.values()})
            sides.append(f"{side} " + (" ".join(f"{kind}={_count(told, kind)}" for kind in kinds) or "none"))
        lines.append(f"{file}: {', '.join(sides)}")
    return lines


def per_suite(plain: Outcomes, pool: Outcomes) -> list[str]:
    """One line a folder of tests: how many there are, and how many end alike."""
    lines = []
    for suite in dict.fromkeys(name.partition("::")[0].rpartition("/")[0] for name in [*plain, *pool]):
        sides = [
            {name: told[0] for name, told in outcomes.items() if name.partition("::")[0].rpartition("/")[0] == suite}
            for outcomes in (plain, pool)
        ]
        names = sides[0].keys() | sides[1].keys()
        same = [sides[0][name] for name in names if sides[0].get(name) == sides[1].get(name)]
        kinds = " ".join(f"{kind}={same.count(kind)}" for kind in sorted(set(same)))
        lines.append(f"suite {suite}: tests={len(names)} differ={len(names) - len(same)} same: {kinds}")
    return lines


def main() -> int:
    """Read the flags, run both sides, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, required=True, help="the unpacked sdist of vLLM")
    parser.add_argument("--only", nargs="+", default=[""], help="only files whose path holds one of these words")
    parser.add_argument("--json", type=Path, help="write all outcomes to this file")
    parser.add_argument("--logs", type=Path, help="keep the logs of pytest and of the servers in this folder")
    flags = parser.parse_args()
    files = [file for file in FILES if any(word in file for word in flags.only)]
    reasons = left_out(flags.tests)
    for file, reason in reasons.items():
        print(f"left out: {file}: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="peer-"))
    try:
        home = make_hub(folder)
        logs = (flags.logs or folder / "logs").resolve()
        with ThreadPoolExecutor() as pool:  # a start keeps one core busy
            runs = {side: pool.submit(run_side, side, flags.tests, files, home, logs) for side in SIDES}
            got = {side: run.result() for side, run in runs.items()}
    finally:
        shutil.rmtree(folder)
    told, figures = compare(got["plain"], got["pool"], documented(DOCUMENT.read_text()))
    if flags.json:
        result: dict[str, Any] = {"figures": figures, "left_out": reasons, "outcomes": got}
        flags.json.write_text(json.dumps(result, indent=1) + "\n")
    print(*per_file(got), *per_suite(got["plain"], got["pool"]), *told, sep="\n")
    print("result: " + " ".join(f"{key}={value}" for key, value in figures.items()))
    return 1 if figures["undocumented"] else 0


if __name__ == "__main__":
    sys.exit(main())
