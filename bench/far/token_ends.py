# SPDX-License-Identifier: Apache-2.0
"""The two ends of `bench/token_path.py --delay-ms`, each a process on a machine of its own.

    python -m bench.far.token_ends client MODEL STREAMS STEPS FOLDER             # over Unix sockets in a folder
    python -m bench.far.token_ends client MODEL STREAMS STEPS 10.0.0.1           # over TCP at an address, with CURVE
    python -m bench.far.token_ends engine INPUT OUTPUT KEY STREAMS STEPS PERIOD_MS
    python -m bench.far.token_ends echo 10.0.0.1                                   # says its port, and sends back
    python -m bench.far.token_ends ping 10.0.0.2 PORT                              # says what a few bytes take one way

The client says where it listens, and at the end when all streams had their token, step by step. The engine says when it
put them out. Both use the clock that all machines of one kernel have in common.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_NUM_PINGS, _PING_BYTES = 100, 64
_LEAD_S = 0.5
"""Before the first step, so that all is set up."""


def now_s() -> float:
    """Of a clock that namespaces share."""
    return time.clock_gettime(time.CLOCK_TAI)


async def _client(model: Path, num_streams: int, num_steps: int, where: str) -> None:
    import zmq
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    from bench.parts import common
    from bench.token_path import PROMPT, engine_config
    from tokenpool.patches.engine_client import handing_in
    from tokenpool.serve.access.tenant_meter import meter
    from tokenpool.serve.client.engine_client import PoolEngineClient
    from tokenpool.wire.addresses import EngineAddresses

    if where.startswith("/"):
        addresses = EngineAddresses((f"ipc://{where}/in",), (f"ipc://{where}/out",))
    else:
        keys = zmq.curve_keypair()
        at = [f"tcp://{where}:{common.free_port(where)}" for _ in range(2)]
        addresses = EngineAddresses((at[0],), (at[1],), *keys, silence_s=10.0)
    config = engine_config(model)
    core: Any = PoolEngineClient(config)
    _say([addresses.inputs[0], addresses.outputs[0], addresses.server_key.decode() or "-"])
    await core.join("host", addresses)
    with handing_in(core):
        llm = AsyncLLM.from_vllm_config(vllm_config=config)
    meter(llm)
    last_s = [0.0] * num_steps

    async def read(number: int) -> None:
        params = SamplingParams(max_tokens=num_steps, ignore_eos=True, output_kind=RequestOutputKind.DELTA)
        step = 0
        async for output in llm.generate({"prompt_token_ids": PROMPT}, params, str(number)):
            for _ in output.outputs[0].token_ids:
                last_s[step] = now_s()
                step += 1
            if step >= num_steps:
                return

    await asyncio.gather(*map(read, range(num_streams)))
    _say(last_s)


def _engine(
    input_address: str, output_address: str, key: str, num_streams: int, num_steps: int, period_s: float
) -> None:
    from bench.token_path import Engine

    engine = Engine(input_address, output_address, b"" if key == "-" else key.encode())
    engine.start()
    while len(engine.ids) < num_streams:
        time.sleep(0.01)
    time.sleep(_LEAD_S)
    put_s, due_s = [], time.monotonic()
    for _ in range(num_steps):
        put_s.append(now_s())
        engine.step()
        due_s += period_s
        time.sleep(max(0.0, due_s - time.monotonic()))
    _say(put_s)
    sys.stdin.read()  # the client may have tokens on their way


def _echo(address: str) -> None:
    with socket.create_server((address, 0)) as server:
        _say(server.getsockname()[1])
        sock, _ = server.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while content := sock.recv(_PING_BYTES):
        sock.sendall(content)


def _ping(address: str, port: int) -> None:
    took_s = []
    with socket.create_connection((address, port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(_NUM_PINGS):
            time.sleep(0.005)
            start_s = time.perf_counter()
            sock.sendall(bytes(_PING_BYTES))
            sock.recv(_PING_BYTES)
            took_s.append(time.perf_counter() - start_s)
    _say(statistics.median(took_s) / 2)


def _say(value: Any) -> None:
    print(f"= {json.dumps(value)}", flush=True)


def main() -> None:
    end, *words = sys.argv[1:]
    if end == "client":
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="tokenpool-metrics-")
        from tokenpool.patches import apply_all

        apply_all()
        asyncio.run(_client(Path(words[0]), int(words[1]), int(words[2]), words[3]))
    elif end == "echo":
        _echo(words[0])
    elif end == "ping":
        _ping(words[0], int(words[1]))
    else:
        _engine(*words[:3], int(words[3]), int(words[4]), float(words[5]) / 1e3)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
