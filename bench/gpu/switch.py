# SPDX-License-Identifier: Apache-2.0
"""A full switch between models of real shape on a GPU: how much of the link it uses, and what is seen of it.

An engine host in this process, as in bench/switch.py, whose two cases are used: `blocking`, two models and memory for
the weights of one, nothing prefetched; `prefetch`, three models in a circle and memory for the weights of two.

    link_frac        `blocking`: seconds that the link needs for the bytes moved in, at the rate measured in this run,
                     / visible seconds; worst shape
    visible_steps    `prefetch`: visible seconds / median step; worst shape
    p99_switch_ms    `blocking`: visible, worst shape

Timer boundaries are those of bench/switch.py; KV that comes in is waited for inside them, although requests could run
earlier. Weights are random and read from nowhere (--load-format dummy). With --sleep vLLM's own way to switch is
measured afterwards, with the same model in two servers: `sleep` in the JSON, see bench/gpu/sleep_mode.py.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/gpu itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import switch as cpu_switch
from bench.gpu import link, rig, sleep_mode
from bench.parts import common

_SLEEP_KV_MIB = 2048
STEPS_PER_SWITCH = 100
"""Of one model, at most: a prefetch lasts for tens of steps."""
_PROBE_MIB = 1024


@dataclass(frozen=True, slots=True)
class Shape:
    """Both cases for models of one shape."""

    shape: str
    weight_bytes: int
    link_gbs: float
    """Chunks of 8 MiB, two in flight."""
    link_frac: float
    visible_steps: float
    p99_switch_ms: float
    blocking: cpu_switch.Case
    prefetch: cpu_switch.Case
    sleep: dict[str, sleep_mode.Sleep]
    """By mode; empty without --sleep."""


@dataclass(frozen=True, slots=True)
class Switch:
    """Results; see the module."""

    gpu: dict[str, Any]
    link_frac: float
    visible_steps: float
    p99_switch_ms: float
    shapes: list[Shape]


def run(
    *,
    shapes: Sequence[str],
    switches: int,
    graphs: bool,
    page_mib: int,
    sleep: bool,
    seed: int,
    start_limit_s: float,
    logs: Path | None,
) -> Switch:
    """Measure every shape with `switches` switches per case."""
    rig.require_cuda()
    measured = []
    for shape in shapes:
        with tempfile.TemporaryDirectory(prefix="tokenpool-bench-") as folder:
            paths = {name: rig.make_model(Path(folder, name), shape) for name in "abc"}
            done = _measure(shape, paths, switches, graphs, page_mib << 20, seed)
            if sleep:
                flags, log_folder = rig.model_flags(graphs), logs or Path(folder)
                modes = sleep_mode.serve_and_measure(
                    paths["a"], flags, _SLEEP_KV_MIB, switches, start_limit_s, log_folder, seed
                )
                done = replace(done, sleep=modes)
            measured.append(done)
        common.progress(f"{shape}: {done.link_frac:.1%} of the link, {done.visible_steps:.2f} steps visible")
    return Switch(
        gpu=rig.describe_gpu(),
        link_frac=min(m.link_frac for m in measured),
        visible_steps=max(m.visible_steps for m in measured),
        p99_switch_ms=max(m.p99_switch_ms for m in measured),
        shapes=measured,
    )


def _measure(shape: str, paths: dict[str, Path], switches: int, graphs: bool, page: int, seed: int) -> Shape:
    pair = {name: paths[name] for name in "ab"}
    with closing(_make_rig(shape, pair, 1, page, switches, graphs, seed)) as made:
        rate = _link_rate(made.host.arena.device, page)
        blocking = cpu_switch._blocking(made, switches, lambda name: None)
        weight_bytes = made.host.weights.bytes_of("a")
    gc.collect()
    with closing(_make_rig(shape, paths, 2, page, switches, graphs, seed)) as made:
        prefetch = cpu_switch._prefetched(made, switches)
    gc.collect()
    moved_in = blocking.moved["weights_in"] + blocking.moved["kv_in"]
    visible = blocking.visible_s.values
    return Shape(
        shape=shape,
        weight_bytes=weight_bytes,
        link_gbs=rate / 1e9,
        link_frac=moved_in / rate / sum(visible),
        visible_steps=prefetch.visible_s.median / prefetch.step_s,
        p99_switch_ms=common.percentile(visible, 99) * 1e3,
        blocking=blocking,
        prefetch=prefetch,
        sleep={},
    )


def _make_rig(
    shape: str, paths: dict[str, Path], weights: int, page: int, switches: int, graphs: bool, seed: int
) -> Any:
    """A host with device memory for the weights of `weights` models and the KV of all."""
    from bench.parts.switch_rig import BLOCK_TOKENS, PROMPT_TOKENS, Rig

    steps = STEPS_PER_SWITCH * (cpu_switch.WARM_UP + switches)
    block = BLOCK_TOKENS * rig.kv_bytes_per_token(shape)
    kv_pages = -(-(-(-(PROMPT_TOKENS + steps) // BLOCK_TOKENS) + 1) // max(1, page // block - 1))
    weight_pages = -(-int(rig.weight_bytes(shape) * 1.02) // page) + 1
    null_pages = -(-len(paths) * block // page) + 1
    made = Rig(
        paths,
        weights * weight_pages + len(paths) * kv_pages + null_pages,
        page,
        kv_pages,
        steps,
        seed,
        weight_bytes=rig.weight_bytes(shape),
        host_memory=int(len(paths) * rig.weight_bytes(shape) * 1.1) + (4 << 30),
        load_format="dummy",
        enforce_eager=not graphs,
    )
    bring_in = made.host.residency.bring_in

    def bring_in_and_wait(hosted: Any) -> None:
        bring_in(hosted)
        made.host.swapper.settle(hosted.name)

    made.host.residency.bring_in = bring_in_and_wait
    return made


def _link_rate(device: Any, page: int) -> float:
    """Bytes per second of a copy in as weights make it; on pages beside those of the pool."""
    nbytes = max(1, (_PROBE_MIB << 20) // page) * page
    address, host = device.reserve(nbytes), device.host_buffer(nbytes)
    device.map_zeroed(address, nbytes)
    seconds = [link._timed(link._in, device, address, host, 8, 2) for _ in range(7)]
    device.release(address, nbytes)
    return nbytes / statistics.median(seconds[2:])


def main(words: Sequence[str] | None = None) -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=list(rig.SHAPES), default=["8b", "14b"], help="default: %(default)s")
    add("--switches", type=int, default=12, help="counted ones per case, 2 or more (default: %(default)s)")
    add("--graphs", action="store_true", help="capture CUDA graphs and compile (default: eager)")
    add("--sleep", action="store_true", help="measure vLLM's sleep mode too")
    add("--page-mib", type=int, default=rig.PAGE_BYTES >> 20, help="multiple of 2 (default: %(default)s)")
    sys.setswitchinterval(0.0005)  # as in a host: a thread that waits for a copy gets on beside a busy loop
    common.report("gpu_switch", run, parser.parse_args(words), ["link_frac", "visible_steps", "p99_switch_ms"])
    sys.stdout.flush()
    os._exit(0)  # an orderly exit takes seconds and prints what Triton leaks


if __name__ == "__main__":
    main()
