# SPDX-License-Identifier: Apache-2.0
"""What one more engine takes of a GPU beside its weights and KV, and how long each phase of its build takes.

An engine host in this process builds `--models` engines of one shape, one after another, with graphs and compiled, as
vLLM does by default, and small as pools make them (`--vllm-defaults`: not). After each phase a line says how long it
took and how much the driver has free. A result that is cut off has the engines that were built before.

    engine_mib     bytes outside the pool's pages, weights apart, by engine: the last one's
    build_s        seconds of the last build

Weights are random and read from nowhere. `--device cpu` tries it out with a tiny model; its figures mean nothing.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/gpu itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.gpu import rig
from bench.parts import common


@dataclass(slots=True)
class Build:
    """One engine."""

    seconds: float = 0.0
    engine_bytes: int = 0
    phases: list[tuple[str, float, int]] = field(default_factory=list)
    """Name, seconds, and free bytes of the GPU at its end."""


def run(
    *, shape: str, models: int, device: str, eager: bool, vllm_defaults: bool, seed: int, partial: Path | None
) -> list[Build]:
    """Build them all; `partial` is written anew after each."""
    if device == "cuda":
        rig.require_cuda()
    from tokenpool.host.engine_host import EngineHost
    from tokenpool.wire.spec import HostConfig

    page = rig.PAGE_BYTES if device == "cuda" else 1 << 20
    weights = rig.weight_bytes(shape) if device == "cuda" else 8 << 20
    host = EngineHost(HostConfig((models + 1) * (weights + (1 << 30 if device == "cuda" else 16 << 20)), page))
    done: list[Build] = []
    with tempfile.TemporaryDirectory(prefix="tokenpool-bench-") as folder:
        path = _model(Path(folder, "model"), shape, device)
        for index in range(models):
            done.append(_build(host, f"model-{index}", path, weights, device, eager, vllm_defaults))
            common.progress(f"{index}: {done[-1].seconds:.1f} s, {done[-1].engine_bytes >> 20} MiB")
            if partial is not None:
                common.write_result(
                    partial, "gpu_engine_cost", {"shape": shape, "seed": seed}, {"builds": [asdict(b) for b in done]}
                )
    return done


def _model(folder: Path, shape: str, device: str) -> Path:
    if device == "cuda":
        return rig.make_model(folder, shape)
    from tokenpool.demo.tiny_models import make_tiny_model

    return make_tiny_model("llama", folder)


def _build(host: Any, name: str, path: Path, weights: int, device: str, eager: bool, vllm_defaults: bool) -> Build:
    from vllm.engine.arg_utils import EngineArgs

    from tokenpool.host.load.device_choice import EngineMemory
    from tokenpool.serve.launch.small_engines import keep_engine_small
    from tokenpool.wire.spec import HostedModelSpec

    args = EngineArgs(model=str(path), max_model_len=2048 if device == "cuda" else 256, dtype="bfloat16")
    args.block_size, args.load_format, args.enforce_eager = rig.BLOCK_TOKENS, "dummy", eager
    if not vllm_defaults:
        keep_engine_small(args)
    spec = HostedModelSpec(name, args.create_engine_config(), weight_bytes=weights)
    build, memory = Build(), EngineMemory(host.arena.device)
    start, before = time.perf_counter(), ["config"]
    began = [start]
    enter = host.progress.enter

    def entered(phase: str) -> None:
        now = time.perf_counter()
        build.phases.append((before[0], round(now - began[0], 3), _free(device)))
        common.progress(f"{name}: {build.phases[-1]}")
        before[0], began[0] = phase, now
        enter(phase)

    host.progress.enter = entered
    try:
        host.add_model(spec)
        entered("end")
    finally:
        with suppress(AttributeError):
            del host.progress.enter
    build.seconds = time.perf_counter() - start
    # Fixed weights are torch's memory too; what the pool books of a model beside them is what is looked for.
    build.engine_bytes = max(0, memory.growth() - weights)
    return build


def _free(device: str) -> int:
    if device != "cuda":
        return 0
    import torch

    return int(torch.cuda.mem_get_info()[0])


def main(words: Sequence[str] | None = None) -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--shape", choices=list(rig.SHAPES), default="1b", help="default: %(default)s")
    add("--models", type=int, default=3, help="engines to build (default: %(default)s)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    add("--eager", action="store_true", help="neither compile nor capture graphs")
    add("--vllm-defaults", action="store_true", help="as many sequences and graphs as vLLM has by itself")
    flags = parser.parse_args(words)
    builds = run(
        shape=flags.shape, models=flags.models, device=flags.device, eager=flags.eager,
        vllm_defaults=flags.vllm_defaults, seed=flags.seed, partial=flags.json,
    )  # fmt: skip
    common.print_result_line({"engine_mib": builds[-1].engine_bytes / (1 << 20), "build_s": builds[-1].seconds})
    sys.stdout.flush()
    os._exit(0)  # an orderly exit takes seconds and prints what Triton leaks


if __name__ == "__main__":
    main()
