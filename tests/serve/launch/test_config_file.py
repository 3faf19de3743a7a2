# SPDX-License-Identifier: Apache-2.0
"""vLLM's `--config FILE` counts as if its flags were written out, before those beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tokenpool.cli.command_line import has_api_key, pool_file_of, pool_from_command_line
from tokenpool.config import ModelSpec, PoolConfig
from tokenpool.errors import ConfigError

pytestmark = pytest.mark.cpu

KEY = "7" * 15 + "8"


class Files:
    """Config files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "flags.yaml")

    def write(self, **flags: Any) -> str:
        written = {name.replace("_", "-"): value for name, value in flags.items()}
        Path(self.path).write_text(yaml.safe_dump(written, sort_keys=False))
        return self.path

    def read(self, *words: str, **flags: Any) -> PoolConfig:
        """The pool of a command line with `--config` of these flags after `words`."""
        return pool_from_command_line([*words, "--config", self.write(**flags)])


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_the_pools_settings_in_the_file_are_the_pools(files: Files) -> None:
    """A key in the file closes the port, and a port in it is that which is listened on; nothing is left to vLLM."""
    pool = files.read("org/a", host="::1", port=9, api_key=[KEY, KEY[::-1]], device_memory="1GiB", shutdown_timeout=5)

    assert ("::1", 9, (KEY, KEY[::-1]), 1 << 30, 5.0) == (
        pool.host, pool.port, pool.api_key, pool.device_memory, pool.shutdown_timeout_s)  # fmt: skip
    assert (ModelSpec("org/a", "org/a"),) == pool.models


def test_the_models_names_in_the_file_are_the_models(files: Files) -> None:
    """`model` and `served-model-name` say which model is served, and under which name."""
    pool = files.read(model="org/a", served_model_name="chat", max_model_len=512)

    expected = ModelSpec("chat", "org/a", ("--served-model-name", "chat", "--max-model-len", "512"))
    assert (expected,) == pool.models


def test_what_is_given_beside_the_file_wins(files: Files) -> None:
    """The model, keys, settings and flags of the command line stand over those of the file, wherever they stand."""
    path = files.write(model="org/b", port=9, api_key=KEY[::-1], max_model_len=512, served_model_name="file")
    words = ["org/a", "--api-key", KEY, "--config", path, "--max-model-len", "64", "--served-model-name", "line"]
    pool = pool_from_command_line([*words, "--port=10"])

    assert (10, (KEY,)) == (pool.port, pool.api_key)
    assert ("line", "org/a") == (pool.models[0].name, pool.models[0].model)
    assert pool.models[0].args.index("512") < pool.models[0].args.index("64")
    assert "org/b" not in pool.models[0].args


def test_every_kind_of_value_becomes_words(files: Files) -> None:
    """As vLLM reads them: true and false, lists, mappings, nothing; with dashes or underscores."""
    flags = {"enforce-eager": True, "enable_lora": False, "middleware": ["a.b"], "hf-overrides": {"x": [1]}, "seed": -1}
    Path(files.path).write_text(yaml.safe_dump(flags | {"tokenizer": None, "lora-modules": []}, sort_keys=False))
    args = pool_from_command_line(["org/a", f"--config={files.path}"]).models[0].args

    assert args == (
        "--enforce-eager", "--no-enable-lora", "--middleware", "a.b", "--hf-overrides", '{"x": [1]}', "--seed=-1",
        "--tokenizer", "None",
    )  # fmt: skip


def test_several_models_share_the_file(files: Files) -> None:
    """As they share flags; a name for one of them is refused."""
    assert [("--seed", "1")] * 2 == [model.args for model in files.read("org/a", "org/b", seed=1).models]
    with pytest.raises(ConfigError, match="--served-model-name: belongs to one model"):
        files.read("org/a", "org/b", served_model_name="c")


def test_a_config_file_is_no_pool_file(files: Files) -> None:
    """Only the first word can be one: a cluster does not follow a file of flags."""
    assert pool_file_of(["org/a", "--config", files.write(port=1)]) is None
    assert pool_file_of(["--port", "1", "pool.yaml", "--frontends=2"]) == "pool.yaml"


def test_a_key_in_the_file_is_a_key(files: Files) -> None:
    """The key of the environment is for who gives none, in whatever spelling."""
    assert has_api_key(["org/a", "--config", files.write(api_key="k")])
    assert has_api_key(["org/a", "--api_key", "k"])
    assert has_api_key(["org/a", "--api-k=k"])
    assert not has_api_key(["org/a", "--config", files.write(port=1)])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "cannot be read: No such file"),
        ("[1]", "must hold a mapping of flags"),
        ("a: b: c", "is no good YAML"),
        ("config: other.yaml", "config: names another file"),
        ("max-model-len: 2026-11-01", "max-model-len: expected a text"),
        ("a b: 1", "'a b' is no flag"),
        ("port: http", "--port: expected a whole number"),
    ],
)
def test_a_bad_file_is_one_line(files: Files, text: str | None, problem: str) -> None:
    """It names the file, or the flag in it, and what is wrong."""
    if text is not None:
        Path(files.path).write_text(text)
    with pytest.raises(ConfigError) as caught:
        pool_from_command_line(["org/a", "--config", files.path])

    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_date_is_no_text_whatever_another_package_makes_of_it(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that vLLM imports with some requests makes dates texts, for all who read YAML in the process."""
    constructors = yaml.SafeLoader.yaml_constructors
    monkeypatch.setitem(constructors, "tag:yaml.org,2002:timestamp", constructors["tag:yaml.org,2002:str"])
    Path(files.path).write_text("max-model-len: 2026-11-01")
    with pytest.raises(ConfigError, match="expected a text"):
        pool_from_command_line(["org/a", "--config", files.path])


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["a", "--config"], "--config: needs a value"),
        (["a", "--config", "--port"], "--config: needs a value"),
        (["a", "--config", "x.yaml", "--config=y.yaml"], "--config: is given twice"),
        (["a", "--config", "x.json"], "x.json: must end with .yaml"),
        (["pool.yaml", "--config", "x.yaml"], "x.yaml"),
        (["a", "--model", "b"], "--model: is given beside a model"),
    ],
)
def test_bad_words_are_one_line(words: list[str], problem: str) -> None:
    """Nothing is dropped without a word."""
    with pytest.raises(ConfigError) as caught:
        pool_from_command_line(words)

    assert problem in str(caught.value)


def test_a_pool_file_takes_no_config_file(files: Files, tmp_path: Path) -> None:
    """Its flags belong to a model: they go into the `args` of one."""
    pool = tmp_path / "pool.yaml"
    pool.write_text("models: [{name: a, model: org/a}]")
    with pytest.raises(ConfigError, match="--config is no pool flag: with a pool file, write flags of vllm serve unde"):
        files.read(str(pool), port=1)


@pytest.mark.parametrize(
    ("short", "setting", "value"),
    [("--api-k", "api_key", (KEY,)), ("--hos", "host", "7"), ("--por", "port", 7), ("--shut", "shutdown_timeout_s", 7)],
)
def test_abbreviations_of_settings_are_taken(short: str, setting: str, value: object) -> None:
    """As by vLLM's parser, which would else put them where no server looks for them."""
    word = KEY if setting == "api_key" else "7"
    assert value == getattr(pool_from_command_line(["org/a", short, word]), setting)
    assert value == getattr(pool_from_command_line(["org/a", f"{short.replace('-k', '_k')}={word}"]), setting)


def test_abbreviations_of_names_are_seen() -> None:
    """A served name is a served name, and belongs to one model."""
    assert pool_from_command_line(["org/a", "--served-model", "c"]).models[0].name == "c"
    with pytest.raises(ConfigError, match="--lora-modules: belongs to one model"):
        pool_from_command_line(["org/a", "org/b", "--lora-module", "c=d"])
