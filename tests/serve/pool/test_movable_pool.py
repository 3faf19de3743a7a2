# SPDX-License-Identifier: Apache-2.0
"""A whole server whose models do not fit on the device together: weights and KV come and go behind the HTTP API."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import TinyModels
from tests.helpers.server import ENV, REPOSITORY, TINY_ARGS, PoolServerProcess, child_pids, is_running, poll
from tests.serve.pool.test_lifecycle import LONG, Stream, complete

pytestmark = pytest.mark.vllm

KINDS = ("llama", "qwen2", "gemma3", "mixtral")
PAGE = 256 << 10
PAGES = 16
"""For one of the models at a time, or two small ones; all of them have weights of 22 pages."""
MAX_TOKENS = 40


@pytest.fixture(scope="module")
def server(tiny_models: TinyModels) -> Iterator[PoolServerProcess]:
    models: list[dict[str, Any]] = [{"name": kind, "model": str(tiny_models.path(kind))} for kind in KINDS]
    models[0] |= {"slo": {"ttft": "60s", "tpot": "10s"}, "admission": {"on_miss": "reject"}}
    pool = {
        "models": models,
        "device_memory": PAGES * PAGE,
        "page_size": PAGE,
        "host_memory": "256MiB",
        "weights": "movable",
        "api_key": "test-api-key-0123",
        "admin_key": "test-admin-key-0123",
    }
    with PoolServerProcess(pool) as server:
        yield server


def tool(*words: str, status: int = 0) -> str:
    """Run `tokenpool trace` and return what it printed on stdout and stderr."""
    command = [sys.executable, "-m", "tokenpool.cli.main", "trace", *words]
    env = {**os.environ, **ENV}
    result = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert status == result.returncode, result.stderr[-3000:]
    return result.stdout + result.stderr


def use_all(server: PoolServerProcess, rounds: int = 4) -> dict[str, set[str]]:
    """Stream `rounds` completions of each model, all at once; returns the different texts of each model."""
    jobs = list(KINDS) * rounds
    with ThreadPoolExecutor(len(jobs)) as threads:
        texts = list(threads.map(lambda kind: (kind, complete(server, kind, MAX_TOKENS)), jobs))
    return {kind: {text for name, text in texts if name == kind} for kind in KINDS}


def samples(server: PoolServerProcess) -> dict[str, float]:
    """Sample name with its labels -> value."""
    text = server.request("GET", "/metrics").text
    return {key: float(value) for key, value in re.findall(r"^(\S.*) (\S+)$", text, re.MULTILINE) if key[0] != "#"}


def away(server: PoolServerProcess) -> str:
    """A model whose weights are not on the device."""
    models = server.wait_until_idle()["host"]["models"]
    return next(name for name, model in models.items() if model["state"] == "in host memory")


def test_all_streams_of_models_that_do_not_fit_are_answered(server: PoolServerProcess) -> None:
    """Sixteen streams of four models on memory for one: every one ends with all its tokens."""
    texts = use_all(server)
    state = server.wait_until_idle()
    host = state["host"]

    assert all(texts.values())
    assert host["residency"]["weight_evictions"] > 0
    assert host["residency"]["switches"] > 0
    assert host["copied_bytes"]["weights_to_device"] > sum(model["weight_bytes"] for model in host["models"].values())
    assert 0 == host["copied_bytes"]["weights_to_host"]
    assert state["ready"] and {"ready"} == {model["state"] for model in state["models"].values()}


def test_the_state_says_where_everything_is(server: PoolServerProcess) -> None:
    """Pages by use add up, and each model's place fits what it holds on the device and in host memory."""
    use_all(server, 1)
    host = server.wait_until_idle()["host"]
    held = host["held_pages"]

    assert host["movable_weights"] is True
    assert PAGES == host["num_pages"] == host["num_free_pages"] + sum(sum(pages.values()) for pages in held.values())
    for name, model in host["models"].items():
        assert model["state"] in ("in host memory", "on device")
        assert (model["state"] == "on device") == (model["weight_pages"] > 0)
        assert held["weights"].get(name, 0) == model["weight_pages"]
        assert 0 < model["weight_bytes"] <= model["host_bytes"]["weights"]  # and what a checkpoint does not hold
        assert model["kv"] in ("in", "out")
        assert model["costs"]["step_s"] > 0
        assert (model["costs"]["ready_in_s"] > 0) == (model["state"] == "in host memory" or model["kv"] == "out")
    assert any(model["state"] == "in host memory" for model in host["models"].values())
    assert any(model["costs"]["errors"] for model in host["models"].values())
    assert host["copy_costs"]["errors"]["to_device"] >= 0
    assert {"token": 1.0, "request": 1.0} == {
        share: host["models"]["llama"]["attainment"][share] for share in ("token", "request")
    }
    memory = host["host_memory"]
    assert memory["budget_bytes"] == 256 << 20
    used = sum(sum(owners.values()) for owners in memory["held_bytes"].values())
    assert memory["budget_bytes"] == memory["free_bytes"] + used


def test_the_trace_has_turns_and_switches(server: PoolServerProcess, tmp_path: Path) -> None:
    """/v1/pool/trace is a Chrome trace of all models; `tokenpool trace` saves it and draws it."""
    pytest.importorskip("matplotlib")
    use_all(server, 2)
    response = server.admin("GET", "/trace")
    events = [event for event in response.json()["traceEvents"] if event["ph"] == "X"]
    saved, picture = tmp_path / "trace.json", tmp_path / "trace.png"
    access = ["--url", server.base_url, "--admin-key", str(server.admin_key)]
    tool(*access, "--json", str(saved), "--png", str(picture))

    assert {"turn", "switch", "weights_in", "weights_out"} <= {event["name"] for event in events}
    assert set(KINDS) == {event["args"]["model"] for event in events}
    assert all(event["dur"] >= 0 for event in events)
    assert len(json.loads(saved.read_text())["traceEvents"]) >= len(events)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [] == [e for e in server.admin("GET", "/trace?seconds=0").json()["traceEvents"] if e["ph"] == "X"]
    assert 400 == server.admin("GET", "/trace?seconds=soon").status_code
    assert "answers 401" in tool("--url", server.base_url, "--admin-key", "wrong", "--json", str(saved), status=2)


def test_the_metrics_tell_of_switches(server: PoolServerProcess) -> None:
    """Switches, evictions, copies, host memory, states and attainment are in /metrics."""
    use_all(server, 1)
    server.wait_until_idle()
    host = server.state()["host"]
    seen = poll(
        lambda: samples(server),
        until=lambda s: s.get("tokenpool:waited_switches_total") == host["residency"]["switches"],
    )

    assert seen["tokenpool:switch_wait_seconds_total"] > 0
    assert host["residency"]["weight_evictions"] == seen['tokenpool:evictions_total{kind="weights"}']
    for kind, nbytes in host["copied_bytes"].items():
        assert nbytes == seen[f'tokenpool:copied_bytes_total{{kind="{kind}"}}']
    for name, model in host["models"].items():
        for state in ("on disk", "reading", "in host memory", "copying", "on device"):
            sample = f'tokenpool:model_state{{model_name="{name}",state="{state}"}}'
            assert float(state == model["state"]) == seen[sample]
        weights = f'tokenpool:host_memory_bytes{{model_name="{name}",use="weights"}}'
        assert model["host_bytes"]["weights"] == seen[weights]
    assert 1.0 == seen['tokenpool:slo_attainment{model_name="llama",share="token"}']
    assert any(sample.startswith("tokenpool:cost_error{") for sample in seen)


def test_a_client_that_leaves_while_models_switch(server: PoolServerProcess) -> None:
    """A stream that is cut while other models run frees its KV wherever it lies; the others end as they should."""
    streams = [Stream(server, kind, 400) for kind in KINDS]
    for stream in streams:
        stream.read_one()
    for stream in streams[:2]:
        stream._client.close()
    for stream in streams[2:]:
        stream.read_all()
        assert (True, 400) == (stream.done, stream.num_tokens)
    host = server.wait_until_idle()["host"]

    assert all(model["host_bytes"]["paused_kv"] == 0 for model in host["models"].values())
    assert dict.fromkeys(KINDS, 0) == server.request("GET", "/load").json()["models"]


def test_a_client_that_leaves_before_its_first_token(server: PoolServerProcess) -> None:
    """A request whose client goes while its model is off the device is forgotten."""
    name = away(server)
    before = server.model_state(name)["tokens"]
    body = json.dumps({"model": name, "prompt": "hello", "max_tokens": 400, "ignore_eos": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.api_key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + body)
        poll(lambda: server.request("GET", "/load").json()["models"][name])
    server.wait_until_idle()

    assert server.model_state(name)["tokens"] - before < 400


def test_a_model_that_is_off_the_device_is_removed_and_added(
    server: PoolServerProcess, tiny_models: TinyModels
) -> None:
    """Removing a model whose weights are in host memory frees them; added again, it answers as before."""
    name = away(server)
    text = complete(server, name)
    for other in KINDS:
        if other != name:
            complete(server, other)
    name = away(server)
    text = complete(server, name) if server.model_state(name)["state"] != "in host memory" else text
    removed = server.admin("DELETE", f"/models/{name}")
    assert (200, True) == (removed.status_code, removed.json()["removed"])
    host = server.wait_until_idle()["host"]
    assert name not in host["models"]
    assert all(name not in owners for owners in host["host_memory"]["held_bytes"].values())
    assert all(name not in owners for owners in host["held_pages"].values())
    seen = poll(lambda: samples(server), until=lambda s: not any(
        value for sample, value in s.items() if "model_state" in sample and f'"{name}"' in sample
    ))  # fmt: skip
    assert 0 == seen.get(f'tokenpool:host_memory_bytes{{model_name="{name}",use="weights"}}', 0)  # its series has left

    entry = {"name": name, "model": str(tiny_models.path(name)), "args": TINY_ARGS}
    added = server.admin("POST", "/models", entry)
    assert 201 == added.status_code, added.text
    assert complete(server, name)
    use_all(server, 1)
    server.wait_until_idle()


def test_a_full_queue_of_a_model_is_429(server: PoolServerProcess, tiny_models: TinyModels) -> None:
    """A model with `max_waiting: 1` added at run time refuses what comes while one waits; what it took in is served."""
    entry = {"name": "narrow", "model": str(tiny_models.path("qwen3")), "args": TINY_ARGS | {"max_num_seqs": 1}}
    assert 201 == server.admin("POST", "/models", entry | {"admission": {"max_waiting": 2}}).status_code
    running = Stream(server, "narrow", 450)
    running.read_one()
    with ThreadPoolExecutor(2) as threads:
        with server.host_held_still():
            begun = [threads.submit(Stream, server, "narrow", 8) for _ in range(2)]
            poll(lambda: server.request("GET", "/load").json()["models"]["narrow"], until=lambda count: count == 3)
            refused = server.request("POST", "/v1/completions", json={"model": "narrow", "prompt": "x"})
            tokens = server.request("POST", "/tokenize", json={"model": "narrow", "prompt": "x"})
        waiting = [stream.result(60) for stream in begun]
    for stream in (running, *waiting):
        stream.read_all()

    assert (429, "RateLimitError") == (refused.status_code, refused.json()["error"]["type"])
    assert int(refused.headers["retry-after"]) >= 1
    assert 200 == tokens.status_code
    assert [(True, 450), (True, 8), (True, 8)] == [(s.done, s.num_tokens) for s in (running, *waiting)]
    sample = 'tokenpool:refused_requests_total{model_name="narrow",status="429"}'
    assert 1 == samples(server)[sample]
    assert 200 == server.admin("DELETE", "/models/narrow").status_code
    server.wait_until_idle()


def test_what_would_be_late_is_503(server: PoolServerProcess, tiny_models: TinyModels) -> None:
    """A model with `on_miss: reject` and an SLO that cannot be met refuses once the host has said so, and recovers."""
    entry = {
        "name": "strict",
        "model": str(tiny_models.path("qwen3")),
        "args": TINY_ARGS | {"max_num_seqs": 1},
        "slo": {"ttft": "1us", "tpot": "60s"},
        "admission": {"on_miss": "reject"},
    }
    assert 201 == server.admin("POST", "/models", entry).status_code
    running = Stream(server, "strict", 450)
    body = {"model": "strict", "prompt": "x", "max_tokens": 1}
    refused = poll(
        lambda: server.request("POST", "/v1/completions", json=body), until=lambda response: response.status_code != 200
    )
    running.read_all()

    assert (503, "ServiceUnavailableError") == (refused.status_code, refused.json()["error"]["type"])
    assert "it is due in 1e-06 s" in refused.text
    assert int(refused.headers["retry-after"]) >= 1
    assert (True, 450) == (running.done, running.num_tokens)
    poll(lambda: server.request("POST", "/v1/completions", json=body).status_code, until=lambda code: code == 200)
    assert 200 == server.admin("DELETE", "/models/strict").status_code


def test_a_killed_host_comes_back_with_movable_weights(server: PoolServerProcess) -> None:
    """After the host died in the middle of switches, the pool serves all models again."""
    before = server.wait_until_idle()
    streams = [Stream(server, kind, 400) for kind in KINDS]
    for stream in streams:
        stream.read_one()
    os.kill(before["host_pid"], signal.SIGKILL)
    for stream in streams:
        try:
            stream.read_all()
        except httpx.TransportError:
            continue
        assert "error" in stream.events[-1] or stream.done

    server.wait_until_ready(120)
    assert before["host_pid"] != server.host_pid
    assert all(use_all(server, 1).values())
    after = server.wait_until_idle()["host"]
    assert set(KINDS) == set(after["models"])
    assert after["residency"]["weight_evictions"] > 0


def test_sigterm_finishes_what_runs(server: PoolServerProcess) -> None:
    """On SIGTERM a running stream gets all its tokens; then the server ends with 0 and leaves no process. The last."""
    assert server.process is not None
    host_pid = server.host_pid
    assert host_pid in child_pids(server.process.pid)
    alone = complete(server, "gemma3", LONG)
    stream = Stream(server, "gemma3")
    stream.read_one()
    server.terminate()
    stream.read_all()
    status = server.stop()

    assert (True, LONG, alone) == (stream.done, stream.num_tokens, stream.text)
    assert (0, False) == (status, is_running(host_pid))
