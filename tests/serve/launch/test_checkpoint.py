# SPDX-License-Identifier: Apache-2.0
"""Weight files that cannot be read are told by name, in one line, wherever a model is planned."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from starlette.testclient import TestClient

from tests.conftest import TinyModels
from tokenpool.config import ModelSpec
from tokenpool.errors import ConfigError
from tokenpool.serve.gateway.endpoints import build_outer_app
from tokenpool.serve.launch.checkpoint import checkpoint_bytes
from tokenpool.serve.launch.launch_plan import plan_model

pytestmark = pytest.mark.vllm


def dangle(file: Path) -> None:
    """A snapshot of a hub cache whose blob was pruned."""
    file.symlink_to("../../blobs/gone")


def circle(file: Path) -> None:
    """Two links to each other."""
    other = file.with_name("other.link")
    other.symlink_to(file.name)
    file.symlink_to(other.name)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link to nothing": (dangle, "a link to ../../blobs/gone, cannot be read: No such file or directory"),
    "a circle of links": (circle, "a link to other.link, cannot be read: Too many levels of symbolic links"),
    "a folder": (Path.mkdir, " is no file"),
    "a pipe": (os.mkfifo, " is no file"),
}


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt"])
@pytest.mark.parametrize(("make", "problem"), BROKEN.values(), ids=BROKEN)
def test_a_weight_file_that_is_none_is_told(tmp_path, make, problem, suffix):
    """The line names the file and what is wrong with it, and a good file beside it changes nothing."""
    (tmp_path / f"a.{suffix}").write_bytes(b"1234")
    file = tmp_path / f"b.{suffix}"
    make(file)

    with pytest.raises(ConfigError) as caught:
        checkpoint_bytes(tmp_path)
    message = str(caught.value)
    assert f"model: weight file {file}" in message
    assert problem in message
    assert "\n" not in message


def test_a_file_that_may_not_be_read_is_told():
    """Its size alone would be known, and the load would fail later."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors")
        file.write_bytes(b"1234")
        file.chmod(0)
        Path(folder).chmod(0o755)
        user = os.geteuid()
        if user == 0:  # root may read everything
            os.seteuid(65534)
        try:
            told = rf"{re.escape(str(file))} cannot be read by user {os.geteuid()}; let that user read it"
            with pytest.raises(ConfigError, match=told):
                checkpoint_bytes(Path(folder))
        finally:
            os.seteuid(user)


def test_a_file_that_goes_after_it_was_listed_is_told(tmp_path, monkeypatch):
    """As when a cache is pruned meanwhile."""
    file = tmp_path / "model.safetensors"
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: [file])

    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be read: No such file"):
        checkpoint_bytes(tmp_path)


def test_sizes_are_those_of_the_first_kind_that_is_there(tmp_path):
    """Links to files count as the files; other kinds, and folders without weights, count nothing."""
    assert checkpoint_bytes(tmp_path) == checkpoint_bytes(tmp_path / "none") == 0
    blob = tmp_path / "blob"
    blob.write_bytes(b"12345")
    (tmp_path / "a.bin").write_bytes(b"1")
    assert checkpoint_bytes(tmp_path) == 1
    (tmp_path / "a.safetensors").symlink_to(blob)
    (tmp_path / "b.safetensors").write_bytes(b"12")
    assert checkpoint_bytes(tmp_path) == 7


def broken_copy(tiny_models: TinyModels, folder: Path) -> Path:
    """The tiny llama with a dangling weight link."""
    for file in tiny_models.path("llama").iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    dangle(folder / "model.safetensors")
    return folder


def test_a_model_with_such_a_file_is_refused_by_its_name(tiny_models, tmp_path):
    """Serve, validate and doctor plan models with this, and print its ConfigError as one line."""
    spec = ModelSpec("chat", str(broken_copy(tiny_models, tmp_path)))

    with pytest.raises(ConfigError, match=r"model 'chat': model: weight file .*model\.safetensors, a link to"):
        plan_model(spec)


def test_the_pool_api_answers_in_json(tiny_models, tmp_path):
    """A model that cannot be added for it is a bad request, in the shape of all errors."""

    class Pool:
        config = SimpleNamespace(admin_models="any")

        async def add_model(self, spec: ModelSpec) -> None:
            plan_model(spec)

    app = build_outer_app()
    app.state.pool = app.state.operator = Pool()
    body = {"name": "chat", "model": str(broken_copy(tiny_models, tmp_path))}
    response = TestClient(app).post("/v1/pool/models", json=body)

    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("BadRequestError", 400, "model")
    assert "cannot be read: No such file or directory" in error["message"]


@pytest.mark.parametrize("model", ["~nobody-here/x", "/\0", "./none"])
def test_paths_that_cannot_be_are_told(model):
    """Such as a home folder of nobody."""
    with pytest.raises(ConfigError, match="missing path"):
        plan_model(ModelSpec("a", model))
