# SPDX-License-Identifier: Apache-2.0
"""What a start would find wrong with a model's flags is found before it, in one line that names flag and model."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from tests.conftest import TinyModels
from tokenpool.config import ModelSpec, PoolConfig
from tokenpool.errors import ConfigError
from tokenpool.serve.launch.launch_plan import plan_added, plan_model, plan_pool
from tokenpool.serve.launch.model_plan import ModelPlan
from tokenpool.serve.launch.start_checks import check_start, load_plugins

pytestmark = pytest.mark.vllm

GIB = 1 << 30
PLUGIN = """
from vllm.tool_parsers import ToolParser, ToolParserManager
from vllm.reasoning import ReasoningParser, ReasoningParserManager
{register}
count = open({count!r}, "a").write("x")
"""


def spec(*words: str, name: str = "m", model: str = "org/a") -> ModelSpec:
    return ModelSpec(name, model, words)


def plan(*words: str) -> ModelPlan:
    """A plan whose flags were looked through; of a model that does not exist, as nothing of it is looked at."""
    return plan_added(spec(*words), [])


def refusal(*words: str) -> str:
    """The line that refuses these flags; it names the model."""
    with pytest.raises(ConfigError) as caught:
        plan(*words)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("model 'm': ")
    return line.removeprefix("model 'm': ")


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_chat_template_must_be_there_and_good(tmp_path: Path) -> None:
    """A file that is missing or a folder, a syntax error, and a filter that there is not."""
    assert refusal("--chat-template", "/none/t.jinja").startswith("--chat-template: ")
    assert refusal("--chat-template", str(tmp_path)).startswith("--chat-template: ")
    broken = write(tmp_path / "t.jinja", "{{ bos }}\n{% for m in messages %}")
    assert "--chat-template: is no good template: line 2: Unexpected end" in refusal("--chat-template", broken)
    assert "No filter named 'shout'" in refusal("--chat-template", "{{ messages | shout }}")


def test_good_chat_templates_are_not_refused(tmp_path: Path) -> None:
    """Those of transformers have marks of their own, and filters and functions that it brings."""
    text = "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% break %}{% endfor %}"
    plan("--chat-template", write(tmp_path / "t.jinja", text))
    plan("--chat-template", "{{ raise_exception('no') if not messages }}{{ strftime_now('%Y') }}")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--tool-call-parser", "nope"], "--tool-call-parser: there is no 'nope': give one of "),
        (["--enable-auto-tool-choice", "--tool-call-parser=nope"], "--tool-call-parser: there is no 'nope'"),
        (["--enable-auto-tool-choice"], "Error: --enable-auto-tool-choice requires --tool-call-parser"),
        (["--reasoning-parser", "nope"], "--reasoning-parser: there is no 'nope': give one of "),
        (["--structured-outputs-config.reasoning_parser", "nope"], "--reasoning-parser: there is no 'nope'"),
        (["--tool-parser-plugin", "/none/p.py"], "--tool-parser-plugin: /none/p.py cannot be imported: FileNotFound"),
        (["--reasoning-parser-plugin", "no.such.plugin"], "--reasoning-parser-plugin: no.such.plugin cannot be impor"),
        (["--middleware", "no.such.Middleware"], "--middleware: no.such.Middleware cannot be imported: ModuleNotFound"),
        (["--middleware", "json.nothing"], "--middleware: json.nothing cannot be imported: AttributeError"),
        (["--middleware", "json.dumps"], "--middleware: json.dumps is neither a class nor an async function"),
        (["--middleware", "nodots"], "--middleware: 'nodots' names nothing"),
        (["--scheduler-cls", "a.b"], "--scheduler-cls: a.b cannot be imported: ModuleNotFoundError: No"),
        (["--worker-extension-cls", "a.b"], "--worker-extension-cls: a.b cannot be imported"),
        (["--logits-processors", "a:b"], "--logits-processors: a:b cannot be imported"),
        (["--io-processor-plugin", "nope"], "--io-processor-plugin: nope is not installed"),
        (["--tokenizer", "/none/t"], "--tokenizer: missing path /none/t"),
        (["--hf-config-path", "./none"], "--hf-config-path: missing path ./none"),
        (["--log-config-file", "none.json"], "--log-config-file: missing path"),
        (["--enable-lora", "--lora-modules", "l=/none/l"], "--lora-modules: adapter 'l': missing path /none/l"),
        (["--enable-lora", "--default-mm-loras", '{"image": "~/none"}'], "--default-mm-loras: adapter 'image'"),
        (["--lora-modules", "l=org/l"], "--lora-modules: needs --enable-lora"),
    ],
)
def test_whatever_is_named_must_be_there(words: list[str], problem: str) -> None:
    """Parsers, plugins, classes, files and adapters."""
    assert refusal(*words).startswith(problem)


def test_weights_must_be_whole(tiny_models: TinyModels, tmp_path: Path) -> None:
    """A folder without any, and an index that names a part that is not there; not where none are read."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_models.path("llama"), folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "part-2.safetensors"}}))
    with pytest.raises(ConfigError, match="^model 'm': model: weight file .*/part-2.safetensors is missing"):
        plan_added(spec(model=str(folder)), [])
    index.write_text("{")
    with pytest.raises(ConfigError, match="^model 'm': model: .*index.json cannot be read"):
        plan_added(spec(model=str(folder)), [])
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="^model 'm': model: .*/model has no weights"):
        plan_added(spec(model=str(folder)), [])
    plan_added(spec("--load-format", "dummy", model=str(folder)), [])


def test_an_adapter_must_be_whole(tiny_models: TinyModels, tmp_path: Path) -> None:
    """Its settings, its weights, and where links to them lead."""
    adapter = tmp_path / "adapter"
    words = ("--enable-lora", "--lora-modules", f"l={adapter}")
    adapter.mkdir()
    assert f"{adapter} has no adapter_config.json" in refusal(*words)
    shutil.copy(tiny_models.lora("llama") / "adapter_config.json", adapter)
    assert f"{adapter} has no weights" in refusal(*words)
    weights = adapter / "adapter_model.safetensors"
    weights.symlink_to("/none/weights")
    assert f"--lora-modules: adapter 'l': weight file {weights}, a link to /none/weights, cannot" in refusal(*words)
    weights.unlink()
    shutil.copy(tiny_models.lora("llama") / weights.name, weights)
    plan(*words)


def test_a_plugin_brings_its_parser_and_is_imported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file, also one that is named from the working directory; another model may have it too."""
    monkeypatch.chdir(tmp_path)
    count = str(tmp_path / "count")
    tool = "ToolParserManager.register_module('tried_tool', force=True)(type('T', (ToolParser,), {}))"
    reasoner = "ReasoningParserManager.register_module('tried_mind', force=True)(type('R', (ReasoningParser,), {}))"
    write(tmp_path / "tool_plug.py", PLUGIN.format(register=tool, count=count))
    write(tmp_path / "mind_plug.py", PLUGIN.format(register=reasoner, count=count))
    words = ["--tool-parser-plugin", "tool_plug.py", "--enable-auto-tool-choice", "--tool-call-parser", "tried_tool"]
    words += ["--reasoning-parser-plugin", "./mind_plug.py", "--reasoning-parser", "tried_mind"]
    first = plan(*words)
    plan_added(spec(*words, name="other"), [first])
    load_plugins(first.args)

    assert (tmp_path / "count").read_text() == "xx"
    assert str(tmp_path / "mind_plug.py") == first.args.reasoning_parser_plugin  # an engine host reads it as it is


def test_a_plugin_that_fails_says_how(tmp_path: Path) -> None:
    """With its own words, in one line."""
    bad = write(tmp_path / "bad_plug.py", "raise RuntimeError('of\\nno use')")
    assert f"--tool-parser-plugin: {bad} cannot be imported: RuntimeError: of no use" == refusal(
        "--tool-parser-plugin", bad
    )


def test_a_planned_pool_is_looked_through(tiny_models: TinyModels) -> None:
    """`validate` and `serve` find the same, before a config is made, of whichever model it is."""
    model = str(tiny_models.path("llama"))
    specs = (spec(model=model), spec("--scheduler-cls", "a.b", name="second", model=model))
    with pytest.raises(ConfigError, match="^model 'second': --scheduler-cls: a.b cannot be imported"):
        plan_pool(PoolConfig(specs, device_memory=GIB, page_size=1 << 20))
    with pytest.raises(ConfigError, match="^model 'm': --ssl-certfile: /none cannot be read"):
        plan_pool(PoolConfig((spec("--ssl-certfile=/none", model=model),), device_memory=GIB, page_size=1 << 20))


def test_flags_of_the_port_are_those_of_the_first_model() -> None:
    """A model without them gets them, so that no engine's config undoes them; one with others is refused."""
    first = plan_model(spec("--uvicorn-log-level", "error", "--log-level", "WARNING", name="first"))
    second = plan_added(spec("--uvicorn-log-level", "error"), [first])

    assert ("error", "WARNING") == (second.args.uvicorn_log_level, second.args.logging_config.log_level)
    assert second.args.logging_config is not first.args.logging_config
    expected = "^model 'm': {}: is a flag of the whole port, and model 'first' has another value: write it there$"
    for words, named in {
        ("--log-level=ERROR",): "--log-level",
        ("--ssl-ciphers", "AES"): "--ssl-ciphers",
        ("--allowed-origins", "a"): "--allowed-origins",
        ("--logging-config.log_level", "DEBUG"): "--logging-config",
    }.items():
        with pytest.raises(ConfigError, match=expected.format(named)):
            plan_added(spec(*words), [first])


def test_flags_may_be_abbreviated_as_in_vllm() -> None:
    """What begins one flag alone is that flag; what begins several, or none, is refused in one line."""
    args = plan("--max-num-se", "3", "--enable-lora", "--lora-mod", "l=org/l", "--compilation-conf.mode", "0").args

    assert (3, True, "l") == (args.max_num_seqs, args.enable_lora, args.lora_modules[0].name)
    assert refusal("--max-num", "3").startswith("--max-num: --max-num may mean --max-num-active-seqs, --max-num-batch")
    assert refusal("--max-modl-len=3").startswith("--max-modl-len: unknown flag --max-modl-len: did you mean --max-mod")


@pytest.mark.parametrize("word", ["--api-key", "--api-k", "--host", "--hos", "--port=1", "--por=1", "--shutdown-t=1"])
def test_settings_of_the_pool_are_refused_in_any_spelling(word: str) -> None:
    """A key among a model's flags would be a key that nobody asks for."""
    assert "is a setting of the pool: give" in refusal(word, *([] if "=" in word else ["x"]))


def test_a_models_config_file_counts_as_its_flags(tmp_path: Path) -> None:
    """Settings of the pool in it are refused, false is what is so anyway, and what is beside it wins."""
    path = write(tmp_path / "f.yaml", "model: org/other\nmax-num-seqs: 3\nseed: 1\nheadless: false\nenable-lora: false")
    args = plan("--config", path, "--seed", "2").args

    assert ("org/a", 3, 2, False, False) == (args.model, args.max_num_seqs, args.seed, args.headless, args.enable_lora)
    for text in ("api-key: k", "port: 1", "host: h"):
        assert "is a setting of the pool: give" in refusal("--config", write(tmp_path / "f.yaml", text))
    with pytest.raises(ConfigError, match="^--config /none.yaml: cannot be read"):
        plan("--config", "/none.yaml")
    assert "--model: is what `model` says" in refusal("--model", "org/b")


def test_an_effect_that_a_setting_has_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """--gpu-memory-utilization is in most command lines: it is not refused, and not ignored without a word."""
    plan("--gpu-memory-utilization", "0.5")

    assert ["--gpu-memory-utilization has no effect model=m: device_memory is for all models"] == [
        record.getMessage() for record in caplog.records if record.name.startswith("tokenpool")
    ]


def test_the_environment_sizes_kv(
    tiny_models: TinyModels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """VLLM_CPU_KVCACHE_SPACE is the KV of all models together where device_memory is auto; it wins over their flags."""
    model = str(tiny_models.path("llama"))
    specs = tuple(spec("--kv-cache-memory-bytes", "1048576", name=name, model=model) for name in "ab")
    auto = PoolConfig(specs, page_size=1 << 20)
    by_flags = plan_pool(auto)[0].device_memory
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    by_variable = plan_pool(auto)[0].device_memory

    assert by_flags is not None and by_variable is not None
    assert by_variable - 3 * GIB == by_flags - 2 * (1 << 20)
    given = PoolConfig(specs, page_size=1 << 20, device_memory=GIB)
    assert plan_pool(given)[0].device_memory == GIB
    assert "VLLM_CPU_KVCACHE_SPACE has no effect: device_memory is given" in caplog.text
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4GiB")
    with pytest.raises(ConfigError, match="^VLLM_CPU_KVCACHE_SPACE: '4GiB' is no whole number of GiB$"):
        plan_pool(auto)


def test_check_start_changes_nothing() -> None:
    """The flags are what vLLM's app is built from."""
    args = plan_model(spec("--enable-lora")).args
    before = dict(vars(args))
    check_start("m", args)
    assert isinstance(args, Namespace) and before == vars(args)
