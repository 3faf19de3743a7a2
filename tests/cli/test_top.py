# SPDX-License-Identifier: Apache-2.0
"""`tokenpool top`: figures and frames from the state of a real server, and one line for everything that is wrong."""

from __future__ import annotations

import copy
import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from rich.console import Console

from tests.helpers.server import REPOSITORY, PoolServerProcess
from tokenpool.cli.main import run
from tokenpool.cli.top.figures import summarize
from tokenpool.cli.top.view import frame
from tokenpool.errors import PoolError

pytestmark = pytest.mark.vllm

MODELS = ["llama", "qwen2", "gemma3", "embed"]


def generate(server: PoolServerProcess, model: str, tokens: int) -> None:
    body = {"model": model, "prompt": "hello world", "max_tokens": tokens, "ignore_eos": True}
    assert 200 == server.request("POST", "/v1/completions", json=body).status_code


@pytest.fixture(scope="module")
def states(pool_server: PoolServerProcess) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two real states, with 8 tokens of qwen2 (the first late, by its SLO) and 4 of llama between them."""
    before = pool_server.wait_until_idle()
    generate(pool_server, "qwen2", 8)
    generate(pool_server, "llama", 4)
    return before, pool_server.wait_until_idle()


@pytest.fixture
def state(states: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    return copy.deepcopy(states[1])


def lines_of(view: dict[str, Any], *, width: int = 80, height: int | None = 24, colours: bool = False) -> list[str]:
    """A frame as the lines of a terminal."""
    out, system = io.StringIO(), "standard" if colours else None
    Console(file=out, width=width, force_terminal=colours, color_system=system).print(frame(view, height))
    return out.getvalue().splitlines()


def model_of(view: dict[str, Any], name: str) -> dict[str, Any]:
    return next(model for model in view["models"] if model["name"] == name)


def test_figures_are_those_between_two_states(states: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Attainment, shares and rates count only what came between; latencies are there; pages add up."""
    view = summarize(states[1], states[0])
    host = view["hosts"]["device 0"]

    assert MODELS == [model["name"] for model in view["models"]]
    assert 7 / 8 == model_of(view, "qwen2")["attainment"]
    assert model_of(view, "llama")["attainment"] is None, "a model without an SLO has no attainment"
    assert model_of(view, "qwen2")["ttft_s"]["p50"] > 0
    assert model_of(view, "qwen2")["tpot_s"]["p50"] > 0
    assert 0 < host["busy_share"] <= 1
    assert host["switches_per_s"] > 0
    assert host["num_pages"] == sum(host["pages"].values())
    assert host["current_model"] is None


def test_a_host_that_was_started_again_counts_from_its_start(state: dict[str, Any]) -> None:
    """Totals that went down are not taken for negative rates."""
    before = copy.deepcopy(state)
    before["host"]["switches"] += 1000
    assert summarize(state) == summarize(state) | {"hosts": summarize(state, before)["hosts"]}


def test_a_frame_fits_80_by_24_and_is_plain(state: dict[str, Any]) -> None:
    """Every model has a line; nothing is wider than the terminal, and without colours there is no escape code."""
    state["host"]["current_model"] = "gemma3"
    lines = lines_of(summarize(state), width=80, height=24)

    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in "".join(lines)
    assert "tokenpool  ready  4 models  round_robin" in lines[0]
    for name in MODELS:
        assert 1 == sum(line.startswith(name) for line in lines)
    assert any(re.match(r"gemma3 +>on device", line) for line in lines)
    (bar,) = (line for line in lines if line.startswith("pages "))
    assert 74 == len(bar) - len("pages ")
    assert state["host"]["num_free_pages"] > 0
    assert "." in bar and "#" in bar


def test_colours_change_no_text(state: dict[str, Any]) -> None:
    """The same frame with colours is the same text between escape codes."""
    view = summarize(state)
    coloured = lines_of(view, colours=True)

    assert any("\x1b[" in line for line in coloured)
    assert lines_of(view) == [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in coloured]


def test_fifty_models_keep_the_height(state: dict[str, Any]) -> None:
    """The busiest are shown, and how many are not; without a height all are."""
    for i in range(50):
        state["models"][f"model-{i:02}"] = dict(state["models"]["llama"])
        state["host"]["models"][f"model-{i:02}"] = {**state["host"]["models"]["llama"], "running": i}
    lines = lines_of(summarize(state), width=80, height=24)

    assert 24 == len(lines)
    assert lines[8].startswith("model-49")
    assert "and 39 more models, less busy" == lines[-1]
    assert 54 == len(lines_of(summarize(state), height=None)) - 8


@pytest.mark.parametrize(("width", "last"), [(80, "KV"), (74, "KV"), (73, "TPOT"), (60, "TTFT"), (40, "WAIT")])
def test_a_narrow_terminal_has_fewer_columns(state: dict[str, Any], width: int, last: str) -> None:
    """No line wraps, and every model keeps its name, its state and as many of its numbers as fit."""
    lines = lines_of(summarize(state), width=width)
    (header,) = (line for line in lines if line.startswith("MODEL"))

    assert max(map(len, lines)) <= width
    assert ["MODEL", "STATE", "RUN", last] == [*header.split()[:3], header.split()[-1]]
    assert [name for name in MODELS if not any(re.match(rf"{name} +\w", line) for line in lines)] == []


def test_several_hosts_are_summed(state: dict[str, Any]) -> None:
    """With `hosts` each has its lines, and a model's row is the sum over them."""
    one = state.pop("host")
    two = copy.deepcopy(one)
    one["models"]["llama"]["running"], two["models"]["llama"]["running"] = 2, 3
    del two["models"]["embed"]
    view = summarize({**state, "hosts": {"node-a": one, "node-b": two, "node-c": {"error": "gone"}}})
    lines = lines_of(view, height=None)

    assert ["node-a", "node-b"] == list(view["hosts"])
    assert 5 == model_of(view, "llama")["running"]
    assert 2 == sum(line.startswith(("node-a: ", "node-b: ")) for line in lines)
    assert "node-c does not answer: gone" in lines


def test_loading_draining_and_a_dead_host_are_said(state: dict[str, Any]) -> None:
    """Phase and count while models load, requests left while they drain, and what a dead host answers."""
    state["models"]["qwen2"]["state"] = "loading"
    state["progress"] = {"done": 3, "total": 4, "loading": {"qwen2": {"phase": "loading weights", "elapsed_s": 3.0}}}
    lines = lines_of(summarize(state))
    assert "loading, 3 of 4 models ready" in lines[0]
    assert lines[8].startswith("qwen2     loading weights"), "a model that loads comes first"

    state["progress"] = None
    state["models"]["qwen2"] |= {"state": "draining", "inflight": 7}
    assert any(line.startswith("qwen2     drains 7") for line in lines_of(summarize(state)))
    state["stopping"] = True
    assert "draining, 7 requests left" in lines_of(summarize(state))[0]

    dead = lines_of(summarize({**state, "stopping": False, "ready": False, "host": {"error": "it ended"}}))
    assert "not ready" in dead[0]
    assert "the engine host does not answer: it ended" in dead


def test_a_head_that_is_away_is_said(state: dict[str, Any]) -> None:
    """And nothing of one that answers, or where there is none."""
    told = {"epoch": 1, "head": {"up": False, "away_s": 12.4}}
    assert "Ray's head does not answer: for 12 s; requests go on" in lines_of(summarize({**state, "cluster": told}))
    told["head"] = {"up": True, "away_s": 0.0}
    assert not [line for line in lines_of(summarize({**state, "cluster": told})) if "head" in line]


def test_a_failed_model_comes_first_with_its_reason(state: dict[str, Any]) -> None:
    """How many failed is in the first line, the reason in one of its own, and the model above the others."""
    state["models"]["qwen2"] |= {"state": "failed", "reason": "model 'qwen2': no file"}
    lines = lines_of(summarize(state))
    assert "ready, 1 failed" in lines[0]
    assert "qwen2 failed: model 'qwen2': no file" in lines
    header = next(i for i, line in enumerate(lines) if line.startswith("MODEL"))
    assert lines[header + 1].startswith("qwen2     failed")


def test_a_model_added_to_a_busy_host_shows_its_progress(pool_server: PoolServerProcess) -> None:
    """The state answers while a fifth model is built on the thread that answers for it, and says how far that is."""
    entry = {**pool_server.pool["models"][2], "name": "fifth"}
    answers: list[Any] = []
    adding = threading.Thread(target=lambda: answers.append(pool_server.admin("POST", "/models", json=entry)))
    seen = []
    adding.start()
    while adding.is_alive():
        state = pool_server.state()
        if state["progress"]:
            seen.append(state)
    assert 201 == answers[0].status_code, answers[0].text
    try:
        assert seen
        assert {(4, 5)} == {(state["progress"]["done"], state["progress"]["total"]) for state in seen}
        assert {"fifth"} == {name for state in seen for name in state["progress"]["loading"]}
        assert all(set(MODELS) <= state["host"]["models"].keys() for state in seen)
        assert "loading, 4 of 5 models ready" in lines_of(summarize(seen[-1]))[0]
    finally:
        assert 200 == pool_server.admin("DELETE", "/models/fifth").status_code
    assert pool_server.state()["progress"] is None


# -- the command ------------------------------------------------------------------------------------------


def test_once_and_json(pool_server: PoolServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    """Both end after one frame; `--once` is plain text, and `--json` are the figures."""
    words = ["--url", pool_server.base_url, "--admin-key", str(pool_server.admin_key), "--interval", "0.1"]
    assert 0 == run(["top", *words, "--once"])
    text = capsys.readouterr().out
    assert text.startswith("tokenpool  ready  4 models")
    assert "\x1b" not in text

    assert 0 == run(["top", *words, "--json"])
    view = json.loads(capsys.readouterr().out)
    assert MODELS == [model["name"] for model in view["models"]]


def test_an_output_without_the_ellipsis_has_another_sign(pool_server: PoolServerProcess) -> None:
    """What an encoding cannot write is replaced, not an error."""
    words = ["top", "--once", "--url", pool_server.base_url, "--interval", "0.1"]
    env = {**os.environ, "COLUMNS": "40", "PYTHONIOENCODING": "ascii"}
    env["TOKENPOOL_ADMIN_KEY"] = str(pool_server.admin_key)
    command = [sys.executable, "-m", "tokenpool.cli.main", *words]
    result = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=60)

    assert (0, "") == (result.returncode, result.stderr)
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 40 and any(line.endswith("?") for line in lines)


def test_a_terminal_is_drawn_until_q_and_restored(pool_server: PoolServerProcess) -> None:
    """On a terminal the second screen is used, with colours; q ends it with status 0 and the first screen back."""
    ours, theirs = pty.openpty()
    words = ["top", "--url", pool_server.base_url, "--interval", "0.2"]
    env = {**os.environ, "TOKENPOOL_ADMIN_KEY": str(pool_server.admin_key), "TERM": "xterm", "COLUMNS": "80",
           "LINES": "24"}  # fmt: skip
    env.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "tokenpool.cli.main", *words], cwd=REPOSITORY, env=env, stdin=theirs, stdout=theirs
    )
    os.close(theirs)
    shown = b""
    while shown.count(b"q ends") < 2:
        shown += os.read(ours, 4096)
    os.write(ours, b"q")
    while not shown.endswith(b"\x1b[?1049l"):
        shown += os.read(ours, 4096)
    assert 0 == process.wait(60)
    os.close(ours)
    assert shown.startswith(b"\x1b[?1049h")
    assert b"\x1b[32mready\x1b[0m" in shown
    frames = shown.split(b"\x1b[H")[1:]
    assert all(part.count(b"\r\n") < 24 for part in frames)


def test_a_wrong_key_and_a_pool_without_one_are_said(pool_server: PoolServerProcess) -> None:
    """The server's own reason is passed on."""
    with pytest.raises(PoolError, match="answers 401: Missing or invalid admin key"):
        run(["top", "--url", pool_server.base_url, "--admin-key", "wrong"])


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "--view-key: is needed, or an admin key: set TOKENPOOL_VIEW_KEY or TOKENPOOL_ADMIN_KEY"),
        (["--admin-key", "k", "--url", "localhost"], "--url: 'localhost' is no address"),
        (["--admin-key", "k", "--url", "http://127.0.0.1:1"], "http://127.0.0.1:1 does not answer: "),
        (["--admin-key", "k", "--url", "OTHER"], "is no tokenpool server: its /v1/pool/state has no models"),
        (["--admin-key", "k", "--interval", "soon"], "--interval: 'soon' is no time"),
        (["--admin-key", "k", "--interval", "0"], "--interval: 0 is out of range: 0.1 to 3600 seconds"),
        (["--once", "--json"], "not allowed with argument --once; see tokenpool top --help"),
        (["--onze"], "unrecognized arguments: --onze; see tokenpool top --help"),
    ],
)
def test_mistakes_are_one_line(words: list[str], problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each mistake is a PoolError of one line that names the option or the address."""
    monkeypatch.delenv("TOKENPOOL_ADMIN_KEY", raising=False)
    monkeypatch.delenv("TOKENPOOL_VIEW_KEY", raising=False)
    with _other_server() as url, pytest.raises(PoolError) as refusal:
        run(["top", *(url if word == "OTHER" else word for word in words)])

    assert problem in str(refusal.value)
    assert 1 == len(str(refusal.value).splitlines())


class _other_server:  # used as a function
    """A server that answers everything with an empty JSON object."""

    def __enter__(self) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # http.server's name
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: Any) -> None: ...

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
