# SPDX-License-Identifier: Apache-2.0
"""What tokenpool's frontend adds to each engine step, compared with plain vLLM's client: 64 streams, one process.

    python -m bench.token_path --json bench/results/token_path_cpu.json

An engine of a few lines, in a thread of its own, takes vLLM's requests and answers each step with one token for every
stream, over the sockets that an engine uses. In front of it is vLLM's real AsyncLLM, once over vLLM's own client
(`plain`), once over the pool's (`pool`: link, route, journal), once more with every stream on the account of a tenant
with limits (`tenants`), and with these limits kept together with other frontends (`shared`). A step is over when all
streams have their token. Its cost is the CPU time of the event loop's thread, so that other work on the machine counts
only where it shares caches and cores. Arms take turns, round by round; `added_*` is the difference of the percentiles.
HTTP, which is the same everywhere, is not in it.

    python -m bench.token_path --delay-ms 1

measures time instead, with client and engine as two processes: on one machine over Unix sockets (`near`), and on two
(Linux namespaces, whose cable has that delay in each direction) as a cluster's are, over TCP with CURVE (`far`). The
engine puts out a token for each stream every 20 ms. A step's delay is the time until the last stream has its token,
`tpot` the time between two such moments; `added_token_ms` is the difference of the delays, less what a few bytes take
one way. The cable is a Python process (tests/helpers/network/delay.py), which wants a core too: see `ping_ms`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.parts import common

ARMS = ("plain", "pool", "tenants", "shared")
PROMPT = list(range(5, 25))
_WARM_UP_STEPS = 50
_MOST_TOKENS = 1500
"""Of one stream, warm-up included: the context of the tiny model has room for as many."""
_PERIOD_MS = 20.0


@dataclass(slots=True)
class TokenPath:
    streams: int
    steps: int
    """Per arm."""
    step_ms_p50: dict[str, float] = field(default_factory=dict)
    step_ms_p99: dict[str, float] = field(default_factory=dict)
    added_ms_p50: dict[str, float] = field(default_factory=dict)
    added_ms_p99: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class FarTokens:
    """See the module; by arm."""

    streams: int
    steps: int
    ping_ms: float
    """What a few bytes take one way, without ZMQ and CURVE."""
    added_token_ms: float
    step_delay_ms_p50: dict[str, float]
    step_delay_ms_p99: dict[str, float]
    tpot_ms_p50: dict[str, float]
    tpot_ms_p99: dict[str, float]


class Engine:
    """The engine's end: knows the streams, and puts out one token for each when it is told to."""

    def __init__(self, input_address: str, output_address: str, key: bytes = b"") -> None:
        """With a `key` the frontend's sockets are of CURVE."""
        import zmq

        from tokenpool.wire.addresses import EngineAddresses
        from tokenpool.wire.curve import secured

        self.input, self.output = input_address, output_address
        self._context = secured(zmq.Context(), EngineAddresses((), (), key))
        self._in, self._out = self._context.socket(zmq.DEALER), self._context.socket(zmq.PUSH)
        self._in.setsockopt(zmq.IDENTITY, b"\x00\x00")
        self._in.connect(self.input)
        self._out.connect(self.output)
        self.ids: list[str] = []
        self._thread = threading.Thread(target=self._receive, daemon=True)

    def start(self) -> None:
        """Greet, and listen."""
        self._in.send(b"")
        self._thread.start()

    def step(self) -> None:
        """One token for every stream."""
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
        from vllm.v1.serial_utils import MsgpackEncoder

        outputs = [EngineCoreOutput(request_id, [7]) for request_id in self.ids]
        self._out.send_multipart(MsgpackEncoder().encode(EngineCoreOutputs(outputs=outputs)))

    def _receive(self) -> None:
        from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest, EngineCoreRequestType, UtilityOutput
        from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder, UtilityResult

        decode_add, decode = MsgpackDecoder(EngineCoreRequest).decode, MsgpackDecoder().decode
        while True:
            kind, *frames = self._in.recv_multipart()
            if kind == EngineCoreRequestType.ADD.value:
                self.ids.append(decode_add(frames).request_id)
            elif kind == EngineCoreRequestType.UTILITY.value:
                _, call_id, method, _ = decode(frames)
                result = ["generate"] if method == "get_supported_tasks" else None
                answer = EngineCoreOutputs(utility_output=UtilityOutput(call_id, result=UtilityResult(result)))
                self._out.send_multipart(MsgpackEncoder().encode(answer))


class Arm:
    """AsyncLLM over one of the clients, with all streams open."""

    def __init__(self, name: str, folder: Path, num_streams: int) -> None:
        self.name = name
        self.step_ms: list[float] = []
        self._engine = Engine(f"ipc://{folder}/{name}.in", f"ipc://{folder}/{name}.out")
        self._folder = folder
        self._num_streams = num_streams
        self._got = 0
        self._all_there = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, model: Path) -> None:
        """Build the client and AsyncLLM and start the streams."""
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.core_client import AsyncMPClient
        from vllm.v1.executor.uniproc_executor import UniProcExecutor

        from tokenpool.patches.engine_client import handing_in
        from tokenpool.serve.access.tenant_meter import meter
        from tokenpool.serve.client.engine_client import PoolEngineClient
        from tokenpool.wire.addresses import EngineAddresses

        config = engine_config(model)
        self._engine.start()
        core: Any
        if self.name == "plain":
            addresses = {"input_address": self._engine.input, "output_address": self._engine.output}
            core = AsyncMPClient(config, UniProcExecutor, True, client_addresses=addresses)
        else:
            core = PoolEngineClient(config)
            await core.join("host", EngineAddresses((self._engine.input,), (self._engine.output,)))
        with handing_in(core):
            self.llm = AsyncLLM.from_vllm_config(vllm_config=config)
        if self.name != "plain":
            meter(self.llm)
        account = self._account()
        for i in range(self._num_streams):
            self._tasks.append(asyncio.create_task(self._read(f"{self.name}-{i}", account)))
        while len(self._engine.ids) < self._num_streams:
            await asyncio.sleep(0.01)

    def _account(self) -> Any:
        from tokenpool.serve.access.shared_limits import SharedLimits
        from tokenpool.serve.access.tenants import TenantBook, with_default
        from tokenpool.tenant_config import TenantConfig, hash_key

        if self.name in ("plain", "pool"):
            return None
        tenants = [TenantConfig("t", (hash_key("tp-bench-11111111"),), tokens_per_minute=10**9)]
        limits = None
        if self.name == "shared":
            limits = SharedLimits.create(str(self._folder / "limits"), with_default(tenants), 4)
        return TenantBook(tenants, limits).accounts["t"]

    async def _read(self, request_id: str, account: Any) -> None:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        from tokenpool.serve.access.tenant_call import CURRENT_CALL

        if account is not None:
            CURRENT_CALL.set(account.begin({"type": "http", "method": "POST"}, "model", 100))
        params = SamplingParams(max_tokens=_MOST_TOKENS, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
        async for _ in self.llm.generate({"prompt_token_ids": PROMPT}, params, request_id):
            self._got += 1
            if self._got == self._num_streams:
                self._all_there.set()

    async def steps(self, count: int) -> None:
        """Some steps, each measured."""
        for _ in range(count):
            self._got = 0
            self._all_there.clear()
            self._engine.step()
            await asyncio.sleep(0)
            before = time.thread_time()
            await self._all_there.wait()
            self.step_ms.append((time.thread_time() - before) * 1e3)

    def close(self) -> None:
        """End the streams."""
        for task in self._tasks:
            task.cancel()


def engine_config(model: Path) -> Any:
    """The config of a tiny model, as its frontend has it."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    args = AsyncEngineArgs(str(model), max_model_len=2048, enforce_eager=True, dtype="bfloat16", block_size=32)
    config = args.create_engine_config()
    config.cache_config.num_gpu_blocks = 1024
    return config


def run(streams: int, steps: int, rounds: int, **_: object) -> TokenPath:
    """Measure all arms."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="tokenpool-metrics-")
    from tokenpool.patches import apply_all

    apply_all()
    return asyncio.run(_run(streams, steps, rounds))


def run_far(streams: int, steps: int, rounds: int, delay_ms: float, **_: object) -> FarTokens:
    """Measure the time that a network adds."""
    from tests.helpers.network.machines import Machines

    found: dict[str, list[tuple[float, float]]] = {"near": [], "far": []}
    pings: list[float] = []
    with common.scratch(None) as (folder, _, _stack), Machines(2) as machines:
        model = next(iter(common.make_models(folder, ["llama"]).values()))
        for turn in range(rounds):
            pings.append(_ping(machines, delay_ms))
            for arm in found if turn % 2 == 0 else reversed(list(found)):
                found[arm] += _ends(arm, machines, model, (streams, steps // rounds), delay_ms)
    delays = {arm: [1e3 * delay_s for delay_s, _ in pairs] for arm, pairs in found.items()}
    gaps = {arm: [1e3 * gap_s for _, gap_s in pairs] for arm, pairs in found.items()}
    middle = {arm: common.percentile(values, 50) for arm, values in delays.items()}
    return FarTokens(
        streams,
        len(delays["far"]),
        ping_ms=common.percentile(pings, 50),
        added_token_ms=middle["far"] - middle["near"] - common.percentile(pings, 50),
        step_delay_ms_p50=middle,
        step_delay_ms_p99={arm: common.percentile(values, 99) for arm, values in delays.items()},
        tpot_ms_p50={arm: common.percentile(values, 50) for arm, values in gaps.items()},
        tpot_ms_p99={arm: common.percentile(values, 99) for arm, values in gaps.items()},
    )


def _ends(
    arm: str, machines: Sequence[Any], model: Path, size: tuple[int, int], delay_ms: float
) -> list[tuple[float, float]]:
    """Delay of each step, and time since the one before, in seconds."""
    first, second = machines
    streams, steps = size
    with contextlib.ExitStack() as stack:
        start = partial(_start, stack)
        where = tempfile.mkdtemp(prefix="tp-", dir=first.folder) if arm == "near" else first.address
        listens = str(first.temporary / Path(where).name) if arm == "near" else where
        client = start(first, "bench.far.token_ends", "client", model, streams, steps + _WARM_UP_STEPS, listens)
        *at, key = _hear(client)
        if arm == "far":
            at = [f"tcp://{second.address}:{_cable(start, second, a.removeprefix('tcp://'), delay_ms)}" for a in at]
        words = ("engine", *at, key, streams, steps + _WARM_UP_STEPS, _PERIOD_MS)
        engine = start(first if arm == "near" else second, "bench.far.token_ends", *words)
        put_s, last_s = _hear(engine), _hear(client)
    pairs = list(zip(put_s, last_s, strict=True))[_WARM_UP_STEPS:]
    return [(last - put, last - before) for (_, before), (put, last) in itertools.pairwise(pairs)]


def _ping(machines: Sequence[Any], delay_ms: float) -> float:
    """Milliseconds that a few bytes take one way: the delay, and what the network and its cable add by themselves."""
    first, second = machines
    with contextlib.ExitStack() as stack:
        start = partial(_start, stack)
        port = _hear(start(first, "bench.far.token_ends", "echo", first.address))
        port = _cable(start, second, f"{first.address}:{port}", delay_ms)
        return 1e3 * float(_hear(start(second, "bench.far.token_ends", "ping", second.address, port)))


def _cable(start: Callable[..., subprocess.Popen[str]], machine: Any, target: str, delay_ms: float) -> str:
    """The port of a machine that leads to a target, with the delay."""
    wire = start(machine, "tests.helpers.network.delay", machine.address, target, delay_ms / 1e3)
    assert wire.stdout is not None
    return wire.stdout.readline().strip()


def _start(stack: contextlib.ExitStack, machine: Any, module: str, *words: object) -> subprocess.Popen[str]:
    """A Python module on a machine, until the stack ends."""
    command = [*machine.enter, sys.executable, "-m", module, *map(str, words)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def _hear(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = next((line for line in process.stdout if line.startswith("= ")), None)
    if line is None:
        raise RuntimeError("an end of the path has ended")
    return json.loads(line[2:])


async def _run(streams: int, steps: int, rounds: int) -> TokenPath:
    with common.scratch(None) as (folder, _, _stack):
        model = next(iter(common.make_models(folder, ["llama"]).values()))
        arms = [Arm(name, folder, streams) for name in ARMS]
        for arm in arms:
            await arm.open(model)
            await arm.steps(_WARM_UP_STEPS)
            arm.step_ms.clear()
        for turn in range(rounds):
            for arm in arms if turn % 2 == 0 else reversed(arms):
                await arm.steps(steps // rounds)
        result = TokenPath(streams, steps // rounds * rounds)
        for arm in arms:
            for percent, into in ((50, result.step_ms_p50), (99, result.step_ms_p99)):
                into[arm.name] = common.percentile(arm.step_ms, percent)
            arm.close()
        for name in ARMS[1:]:
            result.added_ms_p50[name] = result.step_ms_p50[name] - result.step_ms_p50["plain"]
            result.added_ms_p99[name] = result.step_ms_p99[name] - result.step_ms_p99["plain"]
        return result


def size_problem(steps: int, rounds: int, *, is_far: bool) -> str | None:
    """What to change where so many steps cannot be measured, or make no percentile; None = nothing.

    Far from the engine each round has streams of its own, and the time between two of its steps is measured.
    """
    least = (2, 2) if is_far else (1, 1)
    each = steps // max(1, rounds)
    if rounds < least[0] or each < least[1] or steps < 2:
        fewest = max(2, least[1] * max(rounds, least[0]))
        return (
            f"{steps} steps in {rounds} rounds are too few: give --rounds {least[0]} or more, --steps {fewest} or more"
        )
    most = _MOST_TOKENS - _WARM_UP_STEPS
    if (each if is_far else steps) > most:
        return (
            f"{steps} steps are too many, a stream has {most}: give --steps {most * (rounds if is_far else 1)} or fewer"
        )
    return None


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--streams", type=int, default=64, help="open at the same time (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="of each arm (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="in which arms take turns (default: %(default)s)")
    parser.add_argument("--delay-ms", type=float, metavar="MS", help="between two machines, in each direction")
    options = parser.parse_args()
    if (problem := size_problem(options.steps, options.rounds, is_far=options.delay_ms is not None)) is not None:
        parser.error(problem)
    if options.delay_ms is not None:
        keys = [
            "added_token_ms",
            "ping_ms",
            *(f"{key}_{arm}" for arm in ("near", "far") for key in ("step_delay_ms_p50", "tpot_ms_p99")),
        ]
        common.report("token_path_far", run_far, options, keys)
        return
    keys = [f"{key}_{arm}" for arm in ARMS[1:] for key in ("added_ms_p50", "added_ms_p99")]
    common.report("token_path", run, options, ["step_ms_p50_plain", *keys])


if __name__ == "__main__":
    main()
