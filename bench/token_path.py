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
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.parts import common

ARMS = ("plain", "pool", "tenants", "shared")
_PROMPT = list(range(5, 25))
_WARM_UP_STEPS = 50


@dataclass(slots=True)
class TokenPath:
    streams: int
    steps: int
    """Per arm."""
    step_ms_p50: dict[str, float] = field(default_factory=dict)
    step_ms_p99: dict[str, float] = field(default_factory=dict)
    added_ms_p50: dict[str, float] = field(default_factory=dict)
    added_ms_p99: dict[str, float] = field(default_factory=dict)


class Engine:
    """The engine's end: knows the streams, and puts out one token for each when it is told to."""

    def __init__(self, folder: Path, name: str) -> None:
        import zmq

        self.input, self.output = f"ipc://{folder}/{name}.in", f"ipc://{folder}/{name}.out"
        self._context = zmq.Context()
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
        self._engine = Engine(folder, name)
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
        params = SamplingParams(max_tokens=1500, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
        async for _ in self.llm.generate({"prompt_token_ids": _PROMPT}, params, request_id):
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


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--streams", type=int, default=64, help="open at the same time (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="of each arm (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="in which arms take turns (default: %(default)s)")
    keys = [f"{key}_{arm}" for arm in ARMS[1:] for key in ("added_ms_p50", "added_ms_p99")]
    common.report("token_path", run, parser.parse_args(), ["step_ms_p50_plain", *keys])


if __name__ == "__main__":
    main()
