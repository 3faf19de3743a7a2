# SPDX-License-Identifier: Apache-2.0
"""Keys by purpose: who only looks cannot change, an added model runs no code, and no key shows in a command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.serve.access.test_auth import POOL_SPELLINGS, make_app, status
from tokenpool.cli.command_line import pool_from_command_line
from tokenpool.cli.job import submit_line
from tokenpool.cli.key_words import with_environment
from tokenpool.config import ModelSpec, PoolConfig
from tokenpool.errors import ConfigError
from tokenpool.serve.access.auth import ApiKeyAuth
from tokenpool.serve.launch.added_models import check_added

pytestmark = pytest.mark.cpu

KEY, OTHER = "key-0123456789ab", "other-0123456789"
USER, VIEW, ADMIN = ({"authorization": f"Bearer {kind}-key"} for kind in ("user", "view", "admin"))


def make_auth(admin_keys: Any = ("admin-key",), view_keys: Any = ("view-key",)) -> ApiKeyAuth:
    return ApiKeyAuth(make_app(), api_keys=("user-key",), admin_keys=admin_keys, view_keys=view_keys)


# -- looking and changing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", POOL_SPELLINGS)
def test_a_view_key_looks_and_changes_nothing(path: str) -> None:
    """Below /v1/pool, in every spelling, it is good for GET and HEAD alone."""
    auth = make_auth()

    assert [200, 200] == [status(auth, path, VIEW, method=method) for method in ("GET", "HEAD")]
    assert [403] * 3 == [status(auth, path, VIEW, method=method) for method in ("POST", "DELETE", "get")]
    assert [200] * 3 == [status(auth, path, ADMIN, method=method) for method in ("GET", "POST", "DELETE")]
    assert 401 == status(auth, path, USER)


def test_a_view_key_is_no_key_of_a_client() -> None:
    """Whoever watches the pool does not thereby use its models."""
    assert [401, 401] == [status(make_auth(), path, VIEW) for path in ("/v1/models", "/metrics")]


def test_an_admin_key_counts_beside_a_view_key() -> None:
    """A request that brings both may change, in whatever order they stand."""
    for headers in ({**VIEW, "x-api-key": "admin-key"}, {"x-api-key": "admin-key", **VIEW}):
        assert 200 == status(make_auth(), "/v1/pool/models", headers, method="POST")


def test_with_a_view_key_alone_nothing_is_changed() -> None:
    """Without an admin key every change is refused, whatever is shown; without both everything is."""
    auth = make_auth(admin_keys=())
    assert (200, 403) == (status(auth, "/v1/pool/state", VIEW), status(auth, "/v1/pool/check", VIEW, method="POST"))
    assert 403 == status(make_auth(admin_keys=(), view_keys=()), "/v1/pool/state", VIEW)


# -- models that are added ---------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder of models with two in it, and one beside it."""
    for name in ("models/a", "models/b", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models/link").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "models"


def pool(models: Path, **settings: Any) -> PoolConfig:
    listed = [{"name": "a", "model": str(models / "a")}, {"name": "q", "model": "Qwen/Qwen3-4B"}]
    return PoolConfig.from_dict({"models": [*listed, {"name": "g", "model": "gpt2"}], **settings})


def refusal(model: Path | str, config: PoolConfig, *args: str) -> str | None:
    """Why a model is not let in; None if it is."""
    try:
        check_added(ModelSpec("x", str(model), args), config)
    except ConfigError as error:
        return str(error)
    return None


def test_listed_lets_in_what_lies_beside_the_models_of_the_pool_file(models: Path) -> None:
    """By default: their folders, their owners on the hub, themselves; a link counts as where it leads."""
    config = pool(models)
    for good in (models / "b", models / "b/..//a", "Qwen/Qwen3-8B", "gpt2"):
        assert refusal(good, config) is None, good
    for bad in (models / "link", models / "../elsewhere", models.parent, "/", "org/a", "Qwen/..", "Qwen/a/b", "gpt3"):
        assert "below admin_roots" in (refusal(bad, config) or ""), bad


def test_admin_roots_take_the_place_of_these_folders(models: Path) -> None:
    """What is named there is let in, and nothing else; the root folder is a default of nobody."""
    config = pool(models, admin_roots=[str(models.parent / "elsewhere"), "org/"])
    assert [None, None, None] == [refusal(m, config) for m in (models / "link", models.parent / "elsewhere", "org/a")]
    assert "below admin_roots" in (refusal(models / "b", config) or "")
    at_the_top = PoolConfig(models=(ModelSpec("a", "/models"),))
    assert "here none" in (refusal("/etc", at_the_top) or "")


@pytest.mark.parametrize(
    "args",
    [
        ["--trust-remote-code"], ["--trust_remote_code"], ["--trust-remote-code=true"], ["--trust"], ["-cc", "{}"],
        ["--middleware", "os.system"], ["--tool-parser-plugin", "x.py"], ["--reasoning-parser-plugin=x.py"],
        ["--worker-cls", "a.B"], ["--worker-extension-cls", "a.B"], ["--scheduler-cls", "a.B"], ["--config", "f.yaml"],
        ["--logits-processors", "a:B"], ["--io-processor-plugin", "p"], ["--allowed-local-media-path", "/"],
        ["--chat-template", "/etc/passwd"], ["--lora-modules", "a=/x"], ["--tokenizer", "/x"], ["--model", "/x"],
        ["--profiler-config.torch_profiler_dir", "/x"], ["--otlp-traces-endpoint", "x"], ["--hf-overrides", "{}"],
        ["--", "x"], ["--max-model-len", "512", "--load-format", "x"], ["--download-dir", "/x"], ["--hf-token", "x"],
    ],
)  # fmt: skip
def test_listed_lets_in_no_flag_that_runs_code_or_reaches_files(models: Path, args: list[str]) -> None:
    """Only flags of the list pass, in their full spelling; `any` lets all through."""
    assert "may not be given over HTTP" in (refusal(models / "b", pool(models), *args) or "")
    assert refusal("/anywhere", pool(models, admin_models="any"), *args) is None


def test_listed_lets_in_sizes_and_switches(models: Path) -> None:
    """In every spelling that vLLM reads, with values that begin with a dash and without."""
    args = ["--max-model-len", "512", "--max_num_seqs=4", "--no-enable-prefix-caching", "--seed", "-1"]
    args += ["--dtype", "auto", "--limit-mm-per-prompt.image", "1", "--enforce-eager"]
    assert refusal(models / "b", pool(models), *args) is None


class Pool:
    """What the routes of models ask."""

    def __init__(self, config: PoolConfig) -> None:
        self.config = config
        self.added: list[ModelSpec] = []

    async def add_model(self, spec: ModelSpec) -> dict[str, Any]:
        self.added.append(spec)
        return {}


def post(config: PoolConfig, content: bytes) -> tuple[int, str, int]:
    """Status, message and number of models that were added."""
    build_outer_app = pytest.importorskip("tokenpool.serve.gateway.endpoints").build_outer_app
    app = build_outer_app()
    app.state.pool = app.state.operator = asked = Pool(config)
    answer = TestClient(app).post("/v1/pool/models", content=content)
    return answer.status_code, answer.json().get("error", {}).get("message", ""), len(asked.added)


def test_the_route_asks_admin_models_first(models: Path) -> None:
    """A model that is not let in is a 400 that says what would, and no model is touched."""
    body = json.dumps({"name": "x", "model": str(models / "b")}).encode()
    assert (201, "", 1) == post(pool(models), body)
    none = post(pool(models, admin_models="none"), body)
    assert (400, 0) == none[::2] and "write it into the pool file" in none[1]
    code, message, added = post(pool(models), body[:-1] + b', "args": {"trust_remote_code": true}}')
    assert (400, 0) == (code, added) and "--trust-remote-code may not be given" in message


def test_the_body_of_a_model_is_bounded(models: Path) -> None:
    """No admin fills the memory of the frontend with one entry."""
    assert 413 == post(pool(models), b" " * (65 << 10))[0]
    assert 400 == post(pool(models), b"[" * (64 << 10))[0]


# -- on the command line and in the environment ------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--api-key", "--view-key", "--admin-key"])
def test_a_key_comes_from_a_file_or_with_a_warning(flag: str, tmp_path: Path, capsys: Any) -> None:
    """`@FILE` is silent; a key in the words is taken, and whoever wrote it there hears that it shows."""
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    setting = flag[2:].replace("-", "_")

    assert (KEY,) == getattr(pool_from_command_line(["org/a", flag, f"@{path}"]), setting)
    assert "" == capsys.readouterr().err
    assert (KEY,) == getattr(pool_from_command_line(["org/a", f"{flag}={KEY}"]), setting)
    told = capsys.readouterr().err
    assert "visible to all who may list processes" in told and KEY not in told
    with pytest.raises(ConfigError, match=rf"{flag}: cannot read the key from .*none: No such file"):
        pool_from_command_line(["org/a", flag, f"@{tmp_path}/none"])


def test_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM_API_KEY counts unless the flag is given and leaves; the others fill in what nobody has set."""
    config = pool_from_command_line(["org/a"])
    for name in ("VLLM_API_KEY", "TOKENPOOL_VIEW_KEY", "TOKENPOOL_ADMIN_KEY"):
        monkeypatch.setenv(name, f"{name.lower()}-0123456789")
    found = with_environment(config, has_api_key=False)

    assert ("vllm_api_key-0123456789",) == found.api_key
    assert ("tokenpool_view_key-0123456789", "tokenpool_admin_key-0123456789") == (*found.view_key, *found.admin_key)
    again = with_environment(found, has_api_key=True)
    assert found == again
    monkeypatch.setenv("VLLM_API_KEY", "short")
    with pytest.raises(ConfigError, match="VLLM_API_KEY: api_key: a key has 5 characters: give 16 or more"):
        with_environment(config, has_api_key=False)


def test_a_job_has_no_key_in_its_words(tmp_path: Path) -> None:
    """The line of a Ray job is in Ray's dashboard and in ps: keys in it are refused."""
    path = tmp_path / "pool.yaml"
    path.write_text("models: [{name: a, model: org/a}]")
    with pytest.raises(ConfigError, match=r"--admin-key: would be in the job's command line"):
        submit_line([str(path), "--admin_key=x"], None)
