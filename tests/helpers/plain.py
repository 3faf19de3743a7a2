# SPDX-License-Identifier: Apache-2.0
"""The reference side of the token-exactness tests: each model alone, in plain vLLM, in a process of its own.

The parent never imports vllm here, and the child never imports tokenpool and loads no vLLM plugin, so nothing
of ours can touch the reference. Both sides must use the same engine arguments and threads: take ENGINE_ARGS
and ENV from here.
"""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
import random
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from tests.helpers.inputs.media import prompt_with

logger = logging.getLogger(__name__)

ENV = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
"""Environment of the reference process; set the same in the process that runs the pool."""

ENGINE_ARGS: dict[str, Any] = {
    "enforce_eager": True,
    "dtype": "bfloat16",
    "block_size": 32,
    "kv_cache_memory_bytes": 64 << 20,
    # vLLM's own defaults differ between LLM and its HTTP server. Keep the prompts of a step under it: a
    # chunked prefill of a seeded request ends vLLM 0.32 on CPU ("CPU Generator does not use offset").
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 64,
}
"""Defaults under `Case.engine_args`."""

_ROOT = Path(__file__).parents[2]
_SERVE = "--serve"
FIRST_PLAIN_TOKEN = 3  # below: <s>, </s>, <unk>
PREFIX_BLOCK_TOKENS = 32


@dataclass(frozen=True, slots=True)
class RequestSpec:
    request_id: str
    prompt_token_ids: list[int]
    max_tokens: int = 80
    temperature: float = 0.0
    seed: int | None = None
    lora: str | None = None
    """Path of an adapter directory; the case needs `enable_lora` then.

    Set `max_loras` above the number of adapters: vLLM 0.32 on CPU gives requests without an adapter the
    weights of the last slot (index -1 in lora/ops/torch_ops), which must therefore stay empty.
    """
    media: tuple[str, int] | None = None
    """Kind of model and seed: `media.prompt_with` makes the prompt, of which `prompt_token_ids` is the text."""
    task: str = "embed"
    """What is asked of a pooling model."""


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    model: str
    engine_args: dict[str, Any]
    requests: list[RequestSpec]


@dataclass(frozen=True, slots=True)
class Result:
    tokens: list[int]
    logprobs: list[float]
    """Logprob of each token in `tokens`."""
    preempted: int
    """How often the scheduler preempted the request; recomputation may move the last bits of the logprobs."""
    embedding: list[float] = field(default_factory=list)
    """Only of a pooling model; the other fields are empty then."""


def prompts_for(
    seed: int, count: int, vocab: int = 512, lengths: Sequence[int] = (7, 150, 340, 130, 48, 420)
) -> list[list[int]]:
    """Return `count` random prompts whose lengths cycle through `lengths`.

    Those longer than three blocks start with the same two (even index) or three (odd index) blocks of tokens.
    """
    rng = random.Random(seed)

    def draw(size: int) -> list[int]:
        return [rng.randrange(FIRST_PLAIN_TOKEN, vocab) for _ in range(size)]

    shared = draw(3 * PREFIX_BLOCK_TOKENS)
    prompts = []
    for index in range(count):
        length = lengths[index % len(lengths)]
        prefix = shared[: (2 + index % 2) * PREFIX_BLOCK_TOKENS] if length > len(shared) else []
        prompts.append(prefix + draw(length - len(prefix)))
    return prompts


def run_plain(
    cases: list[Case], *, plain_gemm: bool = False, program: Sequence[str] = (__name__,)
) -> dict[str, dict[str, Result]]:
    """Run the cases one after another in one child process: case name -> request id -> result.

    With `plain_gemm` linear layers compute with the kernels that they have where weights are movable: others round
    otherwise, and only equal kernels give equal logprobs. `program` is a module that ends in `_main`, with its own
    arguments before those of `_main`.

    Raises RuntimeError with the end of the child's output when any case fails.
    """
    assert len({case.name for case in cases}) == len(cases), "case names must differ"
    with tempfile.TemporaryDirectory(prefix="plain-vllm-") as scratch:
        cases_file, results_file, log_file = (Path(scratch, name) for name in ("cases", "results", "log"))
        cases_file.write_text(json.dumps([asdict(case) for case in cases]))
        words = [*program, str(cases_file), str(results_file), str(int(plain_gemm))]
        code = run_program(words, log_file, is_ready="second" not in program)
        output = log_file.read_text(errors="replace").replace("[rank0]: ", "")  # vLLM adds one per engine
        if code != 0:
            raise RuntimeError(f"plain vLLM ended with code {code}:\n{output[-6000:]}")
        logger.info("plain vLLM:\n%s", "\n".join(x for x in output.splitlines() if x.startswith("case=")))
        loaded = json.loads(results_file.read_text())
    return {
        name: {request_id: Result(**fields) for request_id, fields in results.items()}
        for name, results in loaded.items()
    }


def run_program(words: Sequence[str], log_file: Path, *, is_ready: bool = True) -> int:
    """Run a module with its words, without tokenpool; returns its exit status.

    It is run in a fork of a process that has imported vLLM, unless `is_ready` is false: what has to be said before
    that import, as by v2_runner.py for the second runner, needs a new process.
    """
    if is_ready:
        return _READY.run(words, log_file)
    with log_file.open("w") as log:
        command = [sys.executable, "-m", *words]
        return subprocess.run(command, cwd=_ROOT, env=_environment(), stdout=log, stderr=subprocess.STDOUT).returncode


def _environment() -> dict[str, str]:
    # numba's OpenMP layer would change the number of threads; the pool has to see to that itself.
    return os.environ | ENV | {"VLLM_PLUGINS": "", "NUMBA_THREADING_LAYER": "workqueue"}


class _Ready:
    """A process that has imported vLLM and does nothing else; it ends with this one."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, words: Sequence[str], log_file: Path) -> int:
        """See run_program."""
        process = self._fit_process()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps([_environment(), str(log_file), *words]) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())
        except BaseException:  # what it says next would be the answer to this
            self._end()
            raise

    def _fit_process(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, _SERVE], cwd=_ROOT, env=_environment(), text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            atexit.register(self._end)
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        atexit.unregister(self._end)


_READY = _Ready()


def keep_heap_frozen() -> None:
    """Freeze what is there for good, let nothing else be frozen, and so let collections look at engines alone.

    An engine makes vLLM collect all garbage some eight times. With the objects of all its modules, a million, that
    takes half a second each time.
    """
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None


def _serve() -> None:
    """Be the process that has imported vLLM: fork for each line of the input, and print the child's exit status."""
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker
    from vllm import LLM

    assert LLM and vllm.v1
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _run_forked(*json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _run_forked(environment: dict[str, str], log_file: str, module: str, *words: str) -> NoReturn:
    code = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        with open(log_file, "w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.argv[:] = [module, *words]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _main(cases_file: str, results_file: str, plain_gemm: str) -> None:
    prepare(plain_gemm=plain_gemm == "1")
    results = {}
    for fields in json.loads(Path(cases_file).read_text()):
        requests = [RequestSpec(**request) for request in fields.pop("requests")]
        case = Case(**fields, requests=requests)
        results[case.name] = {key: asdict(result) for key, result in _run_case(case).items()}
        gc.collect()
    Path(results_file).write_text(json.dumps(results))


def prepare(*, plain_gemm: bool) -> None:
    """What is done to this process before its first engine; see `run_plain`."""
    import torch
    from vllm import LLM
    from vllm.model_executor.models import registry
    from vllm.v1.sample import sampler

    assert LLM
    torch.cpu._init_amx()  # see bench/parts/plain_vllm.py
    # Compiled, it costs each process 12 s.
    sampler.batched_count_greater_than = lambda scores, least: (scores >= least).sum(-1)
    if plain_gemm:
        use_plain_gemm()
    # Inspecting an architecture in a further process costs 10 s each; it protects only CUDA initialisation.
    registry._run_in_subprocess = lambda inspect: inspect()
    _register_kernels_once()
    _mend_drafted_sampling()
    keep_heap_frozen()


def _register_kernels_once() -> None:
    """Each engine registers the same CPU kernels; vLLM cannot do that when one with n-grams has imported numba."""
    if find_spec("vllm.triton_utils.dispatcher") is None:  # vLLM 0.29
        return
    from vllm.triton_utils import dispatcher

    original, seen = dispatcher.register_kernels, set()

    def register_kernels(overrides: Any) -> None:
        new = {name: kernel for name, kernel in overrides.items() if name not in seen}
        seen.update(new)
        if new:
            original(new)

    dispatcher.register_kernels = register_kernels


def _mend_drafted_sampling() -> None:
    """Give drafts the temperature of their request: vLLM 0.32 on the CPU gives them what is in memory, so that a batch
    with a sampled request has other tokens in each run (patches/draft_constraints.py).
    """
    import torch
    from vllm.v1.sample import rejection_sampler

    def expand(x: Any, ends: Any, num_tokens: int, replace_from: int = 0, replace_to: int = 0) -> Any:
        starts = [0, *ends.tolist()[:-1]]
        rows = [value.expand(end - start) for value, start, end in zip(x, starts, ends.tolist(), strict=True)]
        expanded = torch.cat(rows)
        return torch.where(expanded == replace_from, torch.full_like(expanded, replace_to), expanded)

    rejection_sampler.expand_batch_to_tokens = expand


def use_plain_gemm() -> None:
    """Let every linear layer loaded from here on use the kernel that takes its weight as a plain tensor."""
    import torch
    from vllm import _custom_ops as ops
    from vllm.model_executor.layers import utils

    original = utils.dispatch_cpu_unquantized_gemm

    def dispatch(layer: Any, remove_weight: bool) -> None:
        if layer.weight.ndim != 2:
            original(layer, remove_weight)
            return
        n, k = layer.weight.shape
        whole_tiles = n % 16 == 0 and k % 32 == 0 and layer.weight.dtype is torch.bfloat16
        if not (remove_weight and whole_tiles and torch.cpu._is_avx512_bf16_supported()):
            layer.cpu_linear = torch.nn.functional.linear
            return
        packed = torch.ops._C.convert_weight_packed(layer.weight)
        if getattr(layer, "bias", None) is not None:
            layer.bias.data = layer.bias.to(torch.float32)
        layer.cpu_linear = lambda x, weight, bias: ops.weight_packed_linear_cpu(x, packed, n, bias)

    utils.dispatch_cpu_unquantized_gemm = dispatch


def _run_case(case: Case) -> dict[str, Result]:
    """Run one case.

    The caller collects garbage before the next one: a late finalizer would end the next engine's groups.
    """
    from vllm import LLM

    started_s = time.monotonic()
    llm = LLM(case.model, **ENGINE_ARGS | case.engine_args)
    loaded_s = time.monotonic()
    try:
        results = generate(llm, case)
    finally:
        llm.llm_engine.engine_core.shutdown()
    finished_s = time.monotonic()
    print(f"case={case.name} load_s={loaded_s - started_s:.2f} run_s={finished_s - loaded_s:.2f}", flush=True)
    return results


def generate(llm: Any, case: Case, *, gap: int = 0) -> dict[str, Result]:
    """Step the engine here: `generate` drops the scheduler's requests, which count the preemptions.

    `gap` steps lie between two requests.
    """
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    adapters = sorted({request.lora for request in case.requests if request.lora})
    scheduled, outputs = {}, {}

    def step() -> None:
        outputs.update({output.request_id: output for output in engine.step() if output.finished})

    for request in case.requests:
        internal_id = engine.add_request(
            request.request_id,
            prompt_of(request),
            _params(request, pooling=llm.model_config.runner_type == "pooling"),
            lora_request=_lora_request(adapters, request.lora),
        )
        scheduled[request.request_id] = scheduler.requests[internal_id]
        for _ in range(gap):
            step()
    while engine.has_unfinished_requests():
        step()
    return {name: _result(outputs[name], request.num_preemptions) for name, request in scheduled.items()}


def prompt_of(request: RequestSpec) -> Any:
    """The request's prompt, as vLLM takes it."""
    if request.media is None:
        return {"prompt_token_ids": request.prompt_token_ids}
    return prompt_with(*request.media, request.prompt_token_ids)


def _params(request: RequestSpec, *, pooling: bool) -> Any:
    from vllm import PoolingParams, SamplingParams

    if pooling:
        return PoolingParams(task=request.task)
    return SamplingParams(
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        seed=request.seed,
        ignore_eos=True,
        logprobs=1,
    )


def _lora_request(adapters: list[str], path: str | None) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(path, 1 + adapters.index(path), path) if path else None


def _result(output: Any, preempted: int) -> Result:
    from vllm import PoolingRequestOutput

    if isinstance(output, PoolingRequestOutput):
        return Result([], [], preempted, output.outputs.data.float().tolist())
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    logprobs = [step[token].logprob for token, step in zip(tokens, completion.logprobs, strict=True)]
    return Result(tokens, logprobs, preempted)


if __name__ == "__main__":
    if sys.argv[1:] == [_SERVE]:
        _serve()
    else:
        _main(*sys.argv[1:])
