# SPDX-License-Identifier: Apache-2.0
"""How much traffic for several models of real shape one GPU serves on time, by turn policy.

A trace as in bench/serve_trace.py (Poisson arrivals, popularity by Zipf), against `tokenpool serve` with movable
weights. Each policy has a server of its own; the rates follow one another on it, from idle to idle.

The policy `sleep` is not tokenpool: a vLLM server for each model, all asleep (level 1) but one, behind
bench/gpu/sleep_router.py. Each has the whole of --device-mib while it is awake; what sleeping servers keep on the
device comes on top.

    attainment_POLICY   share of tokens on time at the highest rate; all rates and the other shares are in the JSON

Weights are random and read from nowhere (--load-format dummy). Timer boundaries and limits are those of
bench/serve_trace.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/gpu itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import serve_trace
from bench.gpu import rig, sleep_mode, sleep_router
from bench.parts import common, pool_under_test, traces
from tokenpool.config import SLO

SLEEP = "sleep"


@dataclass(frozen=True, slots=True)
class Goodput:
    """Results; see the module."""

    gpu: dict[str, Any]
    attainment: dict[str, float]
    pool: dict[str, Any]
    runs: list[serve_trace.Played]


def run(
    *,
    policies: Sequence[str],
    rates: Sequence[float],
    shapes: Sequence[str],
    models: int,
    requests: int,
    skew: float,
    device_mib: int,
    graphs: bool,
    sleep_quantum_s: float,
    ttft_s: float,
    tpot_s: float,
    drain_s: float,
    seed: int,
    start_limit_s: float,
    logs: Path | None,
) -> Goodput:
    """Play the trace at all `rates` under all `policies`."""
    rig.require_cuda()
    slo, runs = SLO(ttft_s, tpot_s), []
    trace = serve_trace._generate(seed, models, requests, skew, (64, 1024), (16, 256))
    names = sorted({request.model for request in trace})
    with common.scratch(logs) as (folder, log_folder, _):
        shape_of = {name: shapes[index % len(shapes)] for index, name in enumerate(names)}
        setup = pool_under_test.Setup(
            folder,
            paths={name: rig.make_model(folder / name, shape) for name, shape in shape_of.items()},
            mib_of={name: rig.weight_bytes(shape) / (1 << 20) for name, shape in shape_of.items()},
            device_mib=device_mib,
            max_model_len=2048,
            slo=slo,
            link_mib_per_s=None,
            page_mib=rig.PAGE_BYTES >> 20,
            flags=["--dtype", "bfloat16", "--load-format", "dummy", *([] if graphs else ["--enforce-eager"])],
        )
        for policy in policies:
            if policy == SLEEP:
                serving = _serve_asleep(setup, sleep_quantum_s, log_folder, start_limit_s)
            else:
                serving = pool_under_test.serve(setup, policy, log_folder / f"{policy}.log", start_limit_s)
            with serving as server:
                for number, rate in enumerate(sorted(rates)):
                    prompts = seed * 1000 + number
                    at_rate = traces.at_rate(trace, rate)
                    played, _ = serve_trace._play(server, policy, at_rate, rate, slo, drain_s, prompts)
                    common.progress(serve_trace._line(played))
                    runs.append(played)
                if policy != SLEEP:
                    server.get("/v1/pool/check", key=pool_under_test.ADMIN_KEY, body={})
    return Goodput(
        gpu=rig.describe_gpu(),
        attainment={played.policy: played.token_attainment for played in runs},  # the last one is the highest rate
        pool=setup.describe(),
        runs=runs,
    )


@contextmanager
def _serve_asleep(
    setup: pool_under_test.Setup, quantum_s: float, logs: Path, start_limit_s: float
) -> Iterator[common.Server]:
    """A router before vLLM servers that take turns; closed at the end."""
    flags = ["--max-model-len", str(setup.max_model_len), *setup.flags]
    kv_mib = int(setup.device_mib - max(setup.mib_of.values()))
    with ExitStack() as close:
        ports = sleep_mode.start(close, setup.paths, flags, kv_mib, start_limit_s, logs)
        sleep_mode.post([*ports.values()][-1], "/sleep?level=1&mode=wait")
        router = sleep_router.start(ports, quantum_s, logs / "sleep-router.log")
        close.callback(router.close)
        common.wait_until_ready([router], start_limit_s)
        pool_under_test.first_requests(router)
        yield router


def main(words: Sequence[str] | None = None) -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    policies = ["slack", "aegaeon", SLEEP]
    add("--policies", type=lambda text: text.split(","), default=policies, help="default: %(default)s")
    add("--rates", type=serve_trace._numbers, default=[1.0, 2.0], help="per second (default: %(default)s)")
    add("--shapes", nargs="+", choices=list(rig.SHAPES), default=["8b"], help="in turn (default: %(default)s)")
    add("--models", type=int, default=6, help="default: %(default)s")
    add("--requests", type=int, default=60, help="default: %(default)s")
    add("--skew", type=float, default=1.0, help="of the models' popularity, 0 = all alike (default: %(default)s)")
    add("--device-mib", type=int, default=48 << 10, help="device memory of the pool (default: %(default)s)")
    add("--graphs", action="store_true", help="capture CUDA graphs and compile (default: eager)")
    add("--sleep-quantum-s", type=float, default=4.0, help="of a server while others wait (default: %(default)s)")
    add("--ttft-s", type=float, default=10.0, help="SLO (default: %(default)s)")
    add("--tpot-s", type=float, default=0.1, help="SLO (default: %(default)s)")
    add("--drain-s", type=float, default=20.0, help="wait after the last arrival (default: %(default)s)")
    flags = parser.parse_args(words)
    common.report("gpu_goodput", run, flags, [f"attainment_{name}" for name in flags.policies])


if __name__ == "__main__":
    main()
