# SPDX-License-Identifier: Apache-2.0
"""The `tokenpool` command from outside: exit status, and one line of stderr for every error of the user."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import tokenpool
from tests.conftest import TinyModels
from tests.helpers.server import ENV, REPOSITORY, TINY_ARGS

pytestmark = pytest.mark.vllm

NOT_OURS = {"Triton is installed, but doesn't include CPU backend. Disabling Triton."}
"""What importing vLLM prints on stderr, past its own logging, before anything of ours runs."""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command with vLLM's default log level: what it prints must not hide our line."""
    env = {**os.environ, **ENV}
    del env["VLLM_LOGGING_LEVEL"], env["TOKENPOOL_LOG_LEVEL"]
    command = [sys.executable, "-m", "tokenpool.cli.main", *words]
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=180, check=False)


def refusal(*words: str) -> str:
    """Return the one line of stderr of a command that must be refused with status 2."""
    result = run(*words)
    lines = [line for line in result.stderr.splitlines() if line not in NOT_OURS]
    assert (2, 1) == (result.returncode, len(lines)), result.stderr[-3000:]
    assert lines[0].startswith("tokenpool: error: ")
    return lines[0]


class PoolFile:
    """Writes a pool file of one good model, with changes."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.path = folder / "pool.yaml"
        self.model = {"name": "llama", "model": str(model), "args": dict(TINY_ARGS)}

    def write(self, **changes: Any) -> str:
        pool = {"models": [self.model], "device_memory": "64MiB", "page_size": "1MiB", "port": 0, **changes}
        self.path.write_text(yaml.safe_dump(pool))
        return str(self.path)


@pytest.fixture
def pool_file(tmp_path: Path, tiny_models: TinyModels) -> PoolFile:
    return PoolFile(tmp_path, tiny_models.path("llama"))


# --- answered without vLLM: at once ------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["serve", "validate"])
def test_an_unknown_key(pool_file: PoolFile, command: str) -> None:
    """The line names the file, the key and the one that may be meant."""
    line = refusal(command, pool_file.write(device_memry="1GiB"))

    assert "pool.yaml: unknown key 'device_memry', did you mean 'device_memory'?" in line


def test_two_models_of_one_name(pool_file: PoolFile) -> None:
    """The line names the second model's place and the name."""
    line = refusal("serve", pool_file.write(models=[pool_file.model] * 2))

    assert "models[1].name: 'llama' is the name of models[0] already" in line


def test_a_missing_path(pool_file: PoolFile) -> None:
    """The line names the model's place and the path."""
    line = refusal("serve", pool_file.write(models=[pool_file.model | {"model": "./none"}]))

    assert f"models[0].model: missing path '{pool_file.path.parent / 'none'}'" in line


def test_a_missing_file(tmp_path: Path) -> None:
    """The line names the file."""
    line = refusal("validate", str(tmp_path / "none.yaml"))

    assert f"{tmp_path / 'none.yaml'}: cannot be read" in line


def test_a_bad_flag_of_the_pool() -> None:
    """The line names the flag."""
    assert "--port: expected a whole number, got 'http'" in refusal("serve", "org/a", "--port", "http")


def test_an_unknown_command() -> None:
    """The line names the command and the known ones."""
    assert "unknown command 'server'; known: serve, validate, doctor" in refusal("server")


@pytest.mark.parametrize("word", ["--help", "-h", "help"])
def test_help(word: str) -> None:
    """Help goes to stdout."""
    result = run(word)

    assert (0, "") == (result.returncode, result.stderr)
    assert result.stdout.startswith("usage: tokenpool [-h] [-V] COMMAND ...")


def test_version() -> None:
    """The version is that of the package."""
    result = run("--version")

    assert (0, f"{tokenpool.__version__}\n", "") == (result.returncode, result.stdout, result.stderr)


def test_whoever_reads_the_output_may_go() -> None:
    """As `tokenpool top --once | head` does: no traceback, and the status that a shell gives such a command."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "tokenpool.cli.main", "key", "new"]
    try:
        result = subprocess.run(command, cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    finally:
        os.close(writer)

    assert (141, b"") == (result.returncode, result.stderr)


# --- judged by vLLM's parser and the models: 10 s each, so few ----------------------------------------------


@pytest.mark.slow
def test_an_unknown_flag_of_a_model(pool_file: PoolFile) -> None:
    """The line names the model, the flag and the one that may be meant."""
    model = pool_file.model | {"args": {**TINY_ARGS, "max_modl_len": 512}}
    line = refusal("serve", pool_file.write(models=[model]))

    assert "model 'llama': --max-modl-len: unknown flag --max-modl-len: did you mean --max-model-len?" in line


@pytest.mark.slow
def test_a_name_that_two_models_claim(pool_file: PoolFile) -> None:
    """The line names both places, before anything is loaded."""
    model = pool_file.model | {"name": "other", "args": {**TINY_ARGS, "served_model_name": ["llama"]}}
    line = refusal("serve", pool_file.write(models=[pool_file.model, model]))

    expected = "the name 'llama' is claimed twice, by model 'llama' and by --served-model-name of model 'other': rename"
    assert expected in line


@pytest.mark.slow
def test_a_budget_no_model_fits_in(pool_file: PoolFile) -> None:
    """The line names the key and what is needed."""
    line = refusal("validate", pool_file.write(device_memory="1MiB"))

    assert "device_memory: 1MiB is too little" in line


def test_fixed_weights_that_do_not_fit(pool_file: PoolFile) -> None:
    """The line says how much is needed and names the setting that lets weights move."""
    models = [pool_file.model | {"name": f"llama{i}"} for i in range(3)]
    budget = {"models": models, "device_memory": "2MiB", "page_size": "256KiB"}
    line = refusal("validate", pool_file.write(**budget, weights="fixed"))
    movable = run("validate", pool_file.write(**budget, host_memory="64MiB"))

    assert "device_memory: 2MiB is too little: the weights of 3 models and 1 KV page each need " in line
    assert "let weights move (weights: movable)" in line
    first = "device memory 2MiB in pages of 256KiB, weights movable, host memory 64MiB"
    assert (0, first) == (movable.returncode, movable.stdout.splitlines()[-5]), movable.stderr[-3000:]


def test_the_error_of_a_pool_that_does_not_start_is_the_last_line(pool_file: PoolFile) -> None:
    """What only the host finds out, after it has logged a lot, is not buried under what libraries say at the exit."""
    pool_file.model["args"] |= {"block_size": 256}
    result = run("serve", pool_file.write(page_size="64KiB"))

    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("tokenpool: error: model 'llama': one KV block of all layers is"), result.stderr[-3000:]


def test_a_good_file(pool_file: PoolFile) -> None:
    """`validate` of a good file prints the plan and ok, and ends with 0."""
    model = pool_file.model | {"slo": {"ttft": "10s", "tpot": "100ms"}}
    result = run("validate", pool_file.write(models=[model]))
    lines = result.stdout.splitlines()

    assert result.returncode == 0, result.stderr[-3000:]
    assert lines[-3] == "device memory 64MiB in pages of 1MiB, weights fixed"
    assert lines[-2].startswith(f"  llama: {pool_file.model['model']}, ")
    assert lines[-2].endswith(", ttft 10 s, tpot 0.1 s")
    assert lines[-1] == "ok"
