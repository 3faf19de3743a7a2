# SPDX-License-Identifier: Apache-2.0
"""What the pool's KV layout costs: plain vLLM with block-outermost KV (BLHNC) against the layout that it chooses.

For each attention backend engines in processes of their own, in alternating order, generate the same tokens.

    step_ratio_BACKEND   seconds of a decode step with BLHNC / with the backend's own layout; medians
    equal_BACKEND        share of streams that are the same in both, 1 = all

A backend that is not installed, or fails, has 0 for both and its error in the log. A decode step is the seconds for
`--tokens` tokens less those for one, over the steps between. On a CPU (`--device cpu`) a tiny model and its only layout
take the place.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/gpu itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.gpu import rig
from bench.parts import common

BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
LAYOUT = "BLHNC"
_CHILD_LIMIT_S = 300


@dataclass(frozen=True, slots=True)
class Layout:
    """Results; see the module."""

    gpu: dict[str, Any]
    step_ratio: dict[str, float]
    equal: dict[str, float]
    step_s: dict[str, list[float]]
    """By `BACKEND LAYOUT`, the layout as vLLM resolved it; one entry per repeat."""


def run(
    *,
    device: str,
    shape: str,
    backends: Sequence[str],
    rounds: int,
    repeats: int,
    batch: int,
    prompt: int,
    tokens: int,
    graphs: bool,
    seed: int,
    start_limit_s: float,
    logs: Path | None,
) -> Layout:
    """Measure each backend in `rounds` pairs of processes."""
    del start_limit_s, logs  # there is no server
    if device == "cuda":
        rig.require_cuda()
    else:
        backends = ("CPU_ATTN",)
    found = Layout(rig.describe_gpu() if device == "cuda" else {}, {}, {}, {})
    with tempfile.TemporaryDirectory(prefix="tokenpool-bench-") as folder:
        if device == "cuda":
            path = rig.make_model(Path(folder, shape), shape)
        else:
            (path,) = common.make_models(Path(folder), ["llama"]).values()
        what = dict(path=str(path), dummy=device == "cuda", repeats=repeats, batch=batch, prompt=prompt, tokens=tokens)
        for backend in backends:
            try:
                runs = [
                    (ours, _in_child({**what, "backend": backend, "graphs": graphs, "seed": seed}, ours, device))
                    for number in range(rounds)
                    for ours in ((True, False) if number % 2 == 0 else (False, True))
                ]
            except RuntimeError as error:
                common.progress(f"{backend}: {error}")
                found.step_ratio[backend] = found.equal[backend] = 0.0
                continue
            _add(found, backend, runs)
    return found


def _add(found: Layout, backend: str, runs: Sequence[tuple[bool, dict[str, Any]]]) -> None:
    steps: dict[bool, list[float]] = {True: [], False: []}
    streams: dict[bool, list[list[int]]] = {}
    for ours, seen in runs:
        steps[ours] += seen["step_s"]
        streams[ours] = seen["tokens"]
        found.step_s.setdefault(f"{backend} {seen['layout']}", []).extend(seen["step_s"])
    found.step_ratio[backend] = statistics.median(steps[True]) / statistics.median(steps[False])
    pairs = list(zip(streams[True], streams[False], strict=True))
    found.equal[backend] = sum(one == other for one, other in pairs) / len(pairs)
    common.progress(f"{backend}: ratio {found.step_ratio[backend]:.4f}, {found.equal[backend]:.0%} of streams equal")


def _in_child(what: dict[str, Any], ours: bool, device: str) -> dict[str, Any]:
    """Steps, tokens and resolved layout of one engine; raises RuntimeError with the end of its log."""
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    if ours and device == "cuda":
        env["VLLM_KV_CACHE_LAYOUT"] = LAYOUT
    command = [sys.executable, "-m", "bench.gpu.layout", "--child", json.dumps(what)]
    root = Path(__file__).resolve().parents[2]
    ran = subprocess.run(
        command, env=env, cwd=root, capture_output=True, text=True, check=False, timeout=_CHILD_LIMIT_S
    )
    lines = [line for line in ran.stdout.splitlines() if line.startswith("measured: ")]
    if ran.returncode or not lines:
        raise RuntimeError(f"failed with status {ran.returncode}: {ran.stderr[-500:]}")
    return json.loads(lines[-1].removeprefix("measured: "))


def _child(what: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams, TokensPrompt

    quick = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]}
    how = {"compilation_config": quick} if what["graphs"] and what["dummy"] else {"enforce_eager": True}
    llm = LLM(
        model=what["path"],
        load_format="dummy" if what["dummy"] else "auto",
        attention_backend=what["backend"],
        dtype="bfloat16",
        block_size=rig.BLOCK_TOKENS,
        max_model_len=what["prompt"] + what["tokens"],
        enable_prefix_caching=False,
        kv_cache_memory_bytes=(4096 if what["dummy"] else 64) << 20,
        **how,
    )
    prompts = [
        TokensPrompt(prompt_token_ids=p) for p in common.random_prompts(what["seed"], what["batch"], what["prompt"])
    ]

    def generate(count: int) -> tuple[float, list[list[int]]]:
        params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start, [list(output.outputs[0].token_ids) for output in outputs]

    generate(what["tokens"])
    steps = []
    for _ in range(what["repeats"]):
        one_s, _ = generate(1)
        all_s, tokens = generate(what["tokens"])
        steps.append((all_s - one_s) / (what["tokens"] - 1))
    layout = str(llm.llm_engine.vllm_config.cache_config.kv_cache_layout)
    print("measured: " + json.dumps({"step_s": steps, "tokens": tokens, "layout": layout}), flush=True)
    os._exit(0)  # an orderly exit takes seconds and prints what Triton leaks


def main(words: Sequence[str] | None = None) -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    add("--shape", choices=list(rig.SHAPES), default="8b", help="on a GPU (default: %(default)s)")
    add("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS), help="default: %(default)s")
    add("--rounds", type=int, default=2, help="pairs of processes per backend (default: %(default)s)")
    add("--repeats", type=int, default=5, help="per process (default: %(default)s)")
    add("--batch", type=int, default=16, help="requests at a time (default: %(default)s)")
    add("--prompt", type=int, default=512, help="tokens of each prompt (default: %(default)s)")
    add("--tokens", type=int, default=128, help="generated for each (default: %(default)s)")
    add("--eager", dest="graphs", action="store_false", help="without CUDA graphs (default: with)")
    flags = parser.parse_args(words)
    measured = ["CPU_ATTN"] if flags.device == "cpu" else flags.backends
    keys = [f"{name}_{backend}" for backend in measured for name in ("step_ratio", "equal")]
    common.report("gpu_layout", run, flags, keys)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(json.loads(sys.argv[2]))
    main()
