# SPDX-License-Identifier: Apache-2.0
"""What the words after `tokenpool serve` mean: models, a pool file, pool flags, and flags left for vLLM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tokenpool.cli.command_line import pool_from_command_line
from tokenpool.config import ModelSpec, Scheduling
from tokenpool.errors import ConfigError

pytestmark = pytest.mark.cpu


KEY = "key-0123456789ab"


@pytest.fixture
def pool_file(tmp_path: Path) -> str:
    path = tmp_path / "pool.yaml"
    path.write_text("models: [{name: a, model: org/a}]\nport: 9000\ndevice_memory: 1GiB\nadmin_key: from-file-012345\n")
    return str(path)


def test_one_model_takes_all_other_flags() -> None:
    """Flags that are not the pool's are kept for vLLM's parser, in their order."""
    pool = pool_from_command_line(["org/a", "--max-model-len", "512", "--port", "9", "--dtype=bfloat16", "-O0"])

    assert (ModelSpec("org/a", "org/a", ("--max-model-len", "512", "--dtype=bfloat16", "-O0")),) == pool.models
    assert pool.port == 9


def test_several_models_share_the_flags() -> None:
    """Each model gets every flag."""
    pool = pool_from_command_line(["org/a", "./b", "--enforce-eager"])

    assert [(m.name, m.model, m.args) for m in pool.models] == [
        ("org/a", "org/a", ("--enforce-eager",)),
        ("./b", "./b", ("--enforce-eager",)),
    ]


@pytest.mark.parametrize("words", [["--model", "org/a"], ["--model=org/a"], ["--port", "8000", "--model", "org/a"]])
def test_the_model_may_be_a_flag(words: list[str]) -> None:
    """`--model` works as it does for vllm serve, and is taken out of the flags."""
    pool = pool_from_command_line([*words, "--dtype", "auto"])

    assert (ModelSpec("org/a", "org/a", ("--dtype", "auto")),) == pool.models


@pytest.mark.parametrize("flag", ["--served-model-name", "--served_model_name"])
@pytest.mark.parametrize("equals", [True, False])
def test_the_served_name_is_the_models_name(flag: str, equals: bool) -> None:
    """A single model is known by its first served name."""
    words = [f"{flag}=chat"] if equals else [flag, "chat", "other"]
    model = pool_from_command_line(["org/a", *words]).models[0]

    assert ("chat", "org/a", tuple(words)) == (model.name, model.model, model.args)


FLAGS: list[tuple[str, str, str, Any]] = [
    ("--device-memory", "2GiB", "device_memory", 2 << 30),
    ("--device-memory", "2147483648", "device_memory", 2 << 30),
    ("--host-memory", "3GiB", "host_memory", 3 << 30),
    ("--page-size", "1MiB", "page_size", 1 << 20),
    ("--kv-floor-pages", "3", "kv_floor_pages", 3),
    ("--admin-key", KEY, "admin_key", (KEY,)),
    ("--view-key", KEY, "view_key", (KEY,)),
    ("--api-key", KEY, "api_key", (KEY,)),
    ("--admin-models", "any", "admin_models", "any"),
    ("--turn-policy", "other", "scheduling", Scheduling("other")),
    ("--max-request", "5MiB", "max_request_bytes", 5 << 20),
    ("--host", "::1", "host", "::1"),
    ("--port", "1234", "port", 1234),
    ("--shutdown-timeout", "5", "shutdown_timeout_s", 5.0),
    ("--shutdown-timeout", "1500ms", "shutdown_timeout_s", 1.5),
]


@pytest.mark.parametrize(("flag", "text", "field", "value"), FLAGS)
@pytest.mark.parametrize("equals", [True, False])
@pytest.mark.parametrize("underscores", [True, False])
def test_pool_flags(flag: str, text: str, field: str, value: Any, equals: bool, underscores: bool) -> None:
    """A pool flag takes its value with `=` or a space, in either spelling, and is not left for vLLM."""
    flag = "--" + flag[2:].replace("-", "_") if underscores else flag
    words = [f"{flag}={text}"] if equals else [flag, text]
    pool = pool_from_command_line(["org/a", *words, "--enforce-eager"])

    assert value == getattr(pool, field)
    assert pool.models[0].args == ("--enforce-eager",)


def test_several_api_keys() -> None:
    """`--api-key` takes several keys, as vLLM's does, and may come again."""
    pool = pool_from_command_line(["org/a", "--api-key", KEY, KEY + "b", f"--api-key={KEY}c", "--dtype", "auto"])

    assert ((KEY, KEY + "b", KEY + "c"), ("--dtype", "auto")) == (pool.api_key, pool.models[0].args)


def test_defaults() -> None:
    """Without flags the settings are those of a pool file without keys."""
    pool = pool_from_command_line(["org/a"])

    assert (None, 8000, (), ()) == (pool.device_memory, pool.port, pool.api_key, pool.admin_key)


def test_a_pool_file_and_flags_over_it(pool_file: str) -> None:
    """A flag wins over the file; what no flag says is the file's."""
    pool = pool_from_command_line([pool_file, "--port", "9001"])

    assert (9001, 1 << 30, ("from-file-012345",)) == (pool.port, pool.device_memory, pool.admin_key)
    assert (ModelSpec("a", "org/a"),) == pool.models


@pytest.mark.parametrize("path", ["./a", "../b/a", "/data/a/", "~/a"])
def test_a_path_alone_is_the_name_of_its_model(path: str) -> None:
    """As with vLLM, although such a name is refused where somebody writes one."""
    if path.startswith("~"):
        with pytest.raises(ConfigError, match="is no model name"):
            pool_from_command_line([path])
    else:
        assert path == pool_from_command_line([path]).models[0].name


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["no model"]),
        (["--port", "1"], ["no model"]),
        (["--model"], ["no model"]),
        (["a", "--port"], ["--port", "needs a value"]),
        (["a", "--api-key"], ["--api-key", "needs a value"]),
        (["a", "--api-key", "--dtype"], ["--api-key", "needs a value"]),
        (["a", "--port", "http"], ["--port", "'http'"]),
        (["a", "--port", "65536"], ["port", "65536"]),
        (["a", "--kv-floor-pages=x"], ["--kv-floor-pages", "'x'"]),
        (["a", "--kv-floor-pages=0"], ["kv_floor_pages", "1 or more"]),
        (["a", "--device-memory", "lots"], ["--device-memory", "lots"]),
        (["a", "--page-size", "3MiB"], ["page_size", "power of two"]),
        (["a", "--shutdown-timeout", "soon"], ["--shutdown-timeout", "soon"]),
        (["a", "--max-request=-1"], ["--max-request", "-1"]),
        (["a", "--admin-key="], ["admin_key", "empty"]),
        (["a", "--api-key="], ["api_key", "empty"]),
        (["a", "a"], ["models[1].name", "'a'"]),
        (["a", "b", "--served-model-name", "c"], ["--served-model-name", "one model"]),
        (["a", "b", "--lora_modules", "c=d"], ["--lora-modules", "one model"]),
        (["a", "b", "--tokenizer=t"], ["--tokenizer", "one model"]),
        (["none.yaml"], ["none.yaml", "cannot be read"]),
    ],
)
def test_errors_name_the_flag(words: list[str], parts: list[str]) -> None:
    """Every refusal is one line that names the flag or setting and what is wrong with it."""
    with pytest.raises(ConfigError) as caught:
        pool_from_command_line(words)

    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert "\n" not in message


def test_a_pool_file_takes_no_flags_of_vllm(pool_file: str) -> None:
    """With a file, a flag of one model belongs into it; the message says so."""
    with pytest.raises(ConfigError, match=r"--max-model-len.*`args`"):
        pool_from_command_line([pool_file, "--max-model-len", "512"])


def test_an_error_in_the_file_names_file_and_key(tmp_path: Path) -> None:
    """A flag does not hide where an error comes from."""
    path = tmp_path / "pool.yml"
    path.write_text("models: [{name: a, model: org/a}]\ndevice_memry: 1GiB\n")
    with pytest.raises(ConfigError, match=r"pool\.yml: .*device_memry.*device_memory"):
        pool_from_command_line([str(path)])


def test_it_imports_no_vllm() -> None:
    """A typo answers at once, without seconds of imports."""
    code = (
        "import sys; from tokenpool.cli.command_line import pool_from_command_line as p; p(['a']);"
        "sys.exit(sorted(m for m in sys.modules if m.split('.')[0] in ('vllm', 'torch', 'ray')).__repr__() != '[]')"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
