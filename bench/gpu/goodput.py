# SPDX-License-Identifier: Apache-2.0
"""How much traffic for several models of real shape one GPU serves on time, by turn policy.

A trace as in bench/serve_trace.py (Poisson arrivals, popularity by Zipf), against `tokenpool serve` with movable
weights. Each policy has a server of its own; the rates follow one another on it, from idle to idle.

    attainment_POLICY   share of tokens on time at the highest rate; all rates and the other shares are in the JSON

Weights are random and read from nowhere (--load-format dummy). Timer boundaries and limits are those of
bench/serve_trace.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/gpu itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import common, pool_under_test, serve_trace, traces  # noqa: E402
from bench.gpu import rig  # noqa: E402
from tokenpool.config import SLO  # noqa: E402


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
            with pool_under_test.serve(setup, policy, log_folder / f"{policy}.log", start_limit_s) as server:
                for number, rate in enumerate(sorted(rates)):
                    prompts = seed * 1000 + number
                    at_rate = traces.at_rate(trace, rate)
                    played, _ = serve_trace._play(server, policy, at_rate, rate, slo, drain_s, prompts)
                    common.progress(serve_trace._line(played))
                    runs.append(played)
                server.get("/v1/pool/check", key=pool_under_test.ADMIN_KEY, body={})
    return Goodput(
        gpu=rig.describe_gpu(),
        attainment={played.policy: played.token_attainment for played in runs},  # the last one is the highest rate
        pool=setup.describe(),
        runs=runs,
    )


def main(words: Sequence[str] | None = None) -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--policies", type=lambda text: text.split(","), default=["slack", "aegaeon"], help="default: %(default)s")
    add("--rates", type=serve_trace._numbers, default=[1.0, 2.0], help="per second (default: %(default)s)")
    add("--shapes", nargs="+", choices=list(rig.SHAPES), default=["8b"], help="in turn (default: %(default)s)")
    add("--models", type=int, default=6, help="default: %(default)s")
    add("--requests", type=int, default=60, help="default: %(default)s")
    add("--skew", type=float, default=1.0, help="of the models' popularity, 0 = all alike (default: %(default)s)")
    add("--device-mib", type=int, default=48 << 10, help="device memory of the pool (default: %(default)s)")
    add("--graphs", action="store_true", help="capture CUDA graphs and compile (default: eager)")
    add("--ttft-s", type=float, default=10.0, help="SLO (default: %(default)s)")
    add("--tpot-s", type=float, default=0.1, help="SLO (default: %(default)s)")
    add("--drain-s", type=float, default=20.0, help="wait after the last arrival (default: %(default)s)")
    flags = parser.parse_args(words)
    common.report("gpu_goodput", run, flags, [f"attainment_{name}" for name in flags.policies])


if __name__ == "__main__":
    main()
