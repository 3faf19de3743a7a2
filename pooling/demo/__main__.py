# SPDX-License-Identifier: Apache-2.0
"""The demo: three tiny random-weight models of different architectures on one port, a streamed chat from each.

python -m tokenpool.demo                    # serve them, chat, stop
python -m tokenpool.demo --files FOLDER     # only write what is needed to try the commands by hand
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml
from openai import OpenAI

from tokenpool import settings
from tokenpool.demo.tiny_models import make_tiny_model
from tokenpool.sim.generate import artifact_like
from tokenpool.sim.traces.trace_files import write_requests

KINDS = ("llama", "qwen2", "gemma3")
_ADMIN_KEY = "demo-admin-0123456"
_START_LIMIT_S = 180


def main() -> int:
    """Run the demo; returns 0 when every model streamed its tokens."""
    parser = argparse.ArgumentParser(prog="python -m tokenpool.demo")
    parser.add_argument("--files", type=Path, help="only write models, pool.yaml and requests.csv into this folder")
    if folder := parser.parse_args().files:
        write_files(folder)
        return 0
    with tempfile.TemporaryDirectory(prefix="tokenpool-demo-") as folder:
        port = _free_port()
        pool_file = _write_pool_file(Path(folder), port)
        print(f"pool file:\n{pool_file.read_text()}")
        server = subprocess.Popen([sys.executable, "-m", "tokenpool.cli.main", "serve", str(pool_file)], env=_env())
        try:
            _wait_until_ready(server, port)
            with concurrent.futures.ThreadPoolExecutor(len(KINDS)) as threads:
                counts = list(threads.map(lambda kind: _chat(port, kind), KINDS))
            _print_memory_map(port)
        finally:
            server.send_signal(signal.SIGTERM)
            status = server.wait(60)
    print(f"\nserver stopped with status {status}; streamed chunks: {dict(zip(KINDS, counts, strict=True))}")
    return 0 if status == 0 and all(counts) else 1


def write_files(folder: Path) -> None:
    """Write the demo's models, `pool.yaml`, and `requests.csv`: 12 models, 0.05 requests per second each, 5 minutes."""
    _write_pool_file(folder, 8000)
    write_requests(folder / "requests.csv", artifact_like(12, 0.05, 300, 1))
    print(f"{folder}: pool.yaml requests.csv {' '.join(KINDS)}")


def _write_pool_file(folder: Path, port: int) -> Path:
    args = {"max_model_len": 512, "enforce_eager": True, "dtype": "bfloat16", "block_size": 32}
    for kind in KINDS:
        make_tiny_model(kind, folder / kind)
    models = [{"name": kind, "model": f"./{kind}", "args": args} for kind in KINDS]
    pool = {
        "models": models,
        "device_memory": "64MiB",
        "page_size": "1MiB",
        "host": "127.0.0.1",
        "port": port,
        "admin_key": _ADMIN_KEY,
    }
    path = folder / "pool.yaml"
    path.write_text(yaml.safe_dump(pool, sort_keys=False))
    return path


def _env() -> dict[str, str]:
    return {"VLLM_LOGGING_LEVEL": "ERROR", settings.LOG_LEVEL.name: "WARNING", **settings.environment()}


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    start = time.monotonic()
    while time.monotonic() - start < _START_LIMIT_S:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}")
        try:
            _get(port, "/ready?all=1")
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
            continue
        print(f"ready after {time.monotonic() - start:.1f} s\n", flush=True)
        return
    raise SystemExit(f"the server is not ready after {_START_LIMIT_S} s")


def _chat(port: int, model: str) -> int:
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "hello world, the quick brown fox"}],
        max_tokens=24,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    count = 0
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            count += 1
            print(f"{model:>7} | {chunk.choices[0].delta.content!r}", flush=True)
    return count


def _print_memory_map(port: int) -> None:
    host = _get(port, "/v1/pool/state")["host"]
    print(f"\nmemory map: {host['num_pages']} pages of {host['page_size'] >> 10} KiB, {host['num_free_pages']} free")
    for name, model in host["models"].items():
        print(
            f"  {name:>7}: weights {model['weight_pages']} pages, KV {model['kv_pages']} pages "
            f"({model['kv_idle_pages']} idle), {model['steps']} steps in {model['turns']} turns"
        )
    print(f"  {host['switches']} switches between models, {host['slab_reclaims']} slabs moved")


def _get(port: int, path: str) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", headers={"Authorization": f"Bearer {_ADMIN_KEY}"}
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        return json.load(response)


if __name__ == "__main__":
    sys.exit(main())
