# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenpool import errors
from tokenpool.config import SLO, Admission, ModelSpec, PoolConfig, Scheduling, load_pool_file
from tokenpool.errors import ConfigError

pytestmark = pytest.mark.cpu

MIB = 1 << 20
GIB = 1 << 30


def write_pool(folder: Path, text: str | bytes) -> Path:
    path = folder / "pool.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def one_model(**changes: object) -> dict[str, Any]:
    return {"models": [{"name": "a", "model": "org/a", **changes}]}


def read_args(value: object) -> tuple[str, ...]:
    return PoolConfig.from_dict(one_model(args=value)).models[0].args


def refusal_of(data: object) -> str:
    with pytest.raises(ConfigError) as refusal:
        PoolConfig.from_dict(data)
    assert len(str(refusal.value).splitlines()) == 1
    return str(refusal.value)


def test_every_key_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with every key gives every field in its unit."""
    monkeypatch.setenv("TOKENPOOL_TEST_KEY", "api-key-0123456-2")
    monkeypatch.setenv("TOKENPOOL_TEST_IP", "10.0.0.7")
    path = write_pool(
        tmp_path,
        """
models:
  - name: chat
    model: Qwen/Qwen3-4B
    args: {max_model_len: 512}
    slo: {ttft: 10s, tpot: 100ms}
    priority: 3
    admission: {max_waiting: null, on_miss: reject}
  - {name: code, model: org/code}
device_memory: 24GiB
host_memory: 64 GB
page_size: 2MiB
kv_floor_pages: 2
host: ${TOKENPOOL_TEST_IP}
port: 9000
api_key: [api-key-0123456-1, "${TOKENPOOL_TEST_KEY}"]
admin_key: root-0123456789ab
view_key: view-0123456789ab
admin_models: any
admin_roots: [./models, Qwen/]
scheduling: {policy: aegaeon, options: {qmax_s: 2}}
weights: movable
admission: {max_waiting: 50, max_waiting_tokens: 100000}
shutdown_timeout: 2m
max_request: 1MiB
""",
    )
    overrides = (("max_waiting", None), ("on_miss", "reject"))
    chat = ModelSpec("chat", "Qwen/Qwen3-4B", ("--max-model-len", "512"), SLO(10.0, 0.1), 3, overrides)
    expected = PoolConfig(
        models=(chat, ModelSpec("code", "org/code")),
        device_memory=24 * GIB,
        host_memory=64 * 10**9,
        page_size=2 * MIB,
        kv_floor_pages=2,
        host="10.0.0.7",
        port=9000,
        api_key=("api-key-0123456-1", "api-key-0123456-2"),
        admin_key=("root-0123456789ab",),
        view_key=("view-0123456789ab",),
        admin_models="any",
        admin_roots=(str(tmp_path / "models"), "Qwen"),
        scheduling=Scheduling("aegaeon", (("qmax_s", 2),)),
        weights="movable",
        admission=Admission(50, 100_000),
        shutdown_timeout_s=120.0,
        max_request_bytes=MIB,
    )

    assert expected == load_pool_file(path)


def test_only_models_are_needed() -> None:
    """A pool of one model with its name and id is complete; the rest has defaults."""
    config = PoolConfig.from_dict(one_model())

    assert PoolConfig(models=(ModelSpec("a", "org/a"),)) == config
    assert (
        config.device_memory, config.host_memory, config.page_size, config.kv_floor_pages,
    ) == (None, None, 32 * MIB, 1)  # fmt: skip
    assert (config.host, config.port, config.api_key, config.admin_key) == (None, 8000, (), ())
    assert (Scheduling("auto"), 60.0, 32 * MIB) == (
        config.scheduling, config.shutdown_timeout_s, config.max_request_bytes,
    )  # fmt: skip


def test_a_models_admission_overrides_the_pools() -> None:
    """What a model sets counts for it, `null` included; the rest is the pool's, and at last the default."""
    pool = {**one_model(admission={"max_waiting": None}), "admission": {"max_waiting": 5, "on_miss": "reject"}}
    pool["models"].append({"name": "b", "model": "org/b"})
    config = PoolConfig.from_dict(pool)
    plain = PoolConfig.from_dict(one_model())

    assert Admission(None, None, "reject") == config.admission_of(config.models[0])
    assert Admission(5, None, "reject") == config.admission_of(config.models[1])
    assert Admission(1024, None, "queue") == plain.admission_of(plain.models[0])


def test_auto_memory_is_none() -> None:
    """`auto` and an empty value leave a memory size to the host."""
    config = PoolConfig.from_dict({**one_model(), "device_memory": "auto", "host_memory": None})

    assert (config.device_memory, config.host_memory) == (None, None)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("--max-model-len 512 --dtype 'a b'", ["--max-model-len", "512", "--dtype", "a b"]),
        ("", []),
        ([], []),
        ({}, []),
        (["--max-model-len 512", "--enforce-eager"], ["--max-model-len", "512", "--enforce-eager"]),
        (["--max-model-len", 512], ["--max-model-len", "512"]),
        (["--hf-overrides", '{"a": 1}'], ["--hf-overrides", '{"a": 1}']),
        (["""--hf-overrides '{"a": 1}'"""], ["--hf-overrides", '{"a": 1}']),
        (['--hf-overrides={"a":1}'], ['--hf-overrides={"a":1}']),
        ({"max_model_len": 512}, ["--max-model-len", "512"]),
        ({"max-model-len": "512"}, ["--max-model-len", "512"]),
        ({"--max-model-len": 512}, ["--max-model-len", "512"]),
        ({"gpu_memory_utilization": 0.5}, ["--gpu-memory-utilization", "0.5"]),
        ({"enforce_eager": True, "enable_prefix_caching": False}, ["--enforce-eager", "--no-enable-prefix-caching"]),
        ({"lora_modules": ["a=b", "c=d"]}, ["--lora-modules", "a=b", "c=d"]),
        ({"lora_modules": [{"name": "a"}]}, ["--lora-modules", '{"name": "a"}']),
        ({"hf_overrides": {"a_b": [1, None]}}, ["--hf-overrides", '{"a_b": [1, null]}']),
        ({"compilation_config.max_size": 1}, ["--compilation-config.max_size", "1"]),
        ({"seed": -1}, ["--seed=-1"]),
        ({"chat_template": ""}, ["--chat-template", ""]),
    ],
)
def test_flags_are_read_in_each_form(value: object, expected: list[str]) -> None:
    """A text, a list and a mapping of flags give the words of vLLM's command line."""
    assert tuple(expected) == read_args(value)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "args: expected a list, a text or a mapping"),
        (3, "args: expected a list, a text or a mapping"),
        ("--a 'b", 'args: "--a \'b" cannot be split as a shell line'),
        (["--a", True], "args[1]: expected a text"),
        (["--a 'b"], "args[0]: "),
        ([None], "args[0]: expected a text"),
        ({"a": None}, "args.a: expected a text"),
        ({"a": []}, "args.a: is an empty list"),
        ({"a": [True]}, "args.a: expected a text"),
        ({"a": float("nan")}, "args.a: expected a text"),
        ({"a": {"b": float("inf")}}, "args.a: expected a text"),
        ({"a b": 1}, "args: 'a b' is no flag"),
        ({"": 1}, "args: '' is no flag"),
        ({1: 1}, "args: 1 is no flag"),
        ({"a_b": 1, "a-b": 2}, "args: flag --a-b is given twice"),
    ],
)
def test_bad_flags_are_refused(value: object, problem: str) -> None:
    """A flag that cannot be put on a command line is refused where it stands."""
    assert refusal_of(one_model(args=value)).startswith(f"pool.yaml: models[0].{problem}")


MODEL = {"name": "a", "model": "org/a"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "pool.yaml: expected a mapping with the keys models, "),
        ([], "pool.yaml: expected a mapping"),
        ({}, "pool.yaml: models: is missing"),
        ({"models": []}, "pool.yaml: models: is empty: list at least one model"),
        ({"models": None}, "pool.yaml: models: expected a list"),
        ({"models": {"a": "org/a"}}, "pool.yaml: models: expected a list"),
        ({"models": ["org/a"]}, "pool.yaml: models[0]: expected a mapping with the keys name, model, "),
        ({"models": [MODEL], "modles": []}, "pool.yaml: unknown key 'modles', did you mean 'models'?"),
        ({"models": [MODEL], "zzz": 1}, "pool.yaml: unknown key 'zzz', known keys: models, device_memory, "),
        ({"models": [MODEL], 7: 1}, "pool.yaml: unknown key 7, known keys: "),
        ({"models": [MODEL], "shutdown_timeout_s": 1}, "pool.yaml: unknown key 'shutdown_timeout_s', did you mean "),
        (one_model(prioritiy=1), "pool.yaml: models[0]: unknown key 'prioritiy', did you mean 'priority'?"),
        (one_model(slo={"ttft": 1, "tpto": 1}), "pool.yaml: models[0].slo: unknown key 'tpto', did you mean 'tpot'?"),
        ({"models": [{"name": "a"}]}, "pool.yaml: models[0].model: is missing"),
        ({"models": [{"model": "a"}]}, "pool.yaml: models[0].name: is missing"),
        ({"models": [MODEL, MODEL]}, "pool.yaml: models[1].name: 'a' is the name of models[0] already"),
        (one_model(name=""), "pool.yaml: models[0].name: is empty"),
        (one_model(name="a b"), "pool.yaml: models[0].name: 'a b' is no model name: use letters"),
        (one_model(name="../pool"), "pool.yaml: models[0].name: '../pool' is no model name"),
        (one_model(name="a//b"), "pool.yaml: models[0].name: 'a//b' is no model name"),
        (one_model(name="a/./b"), "pool.yaml: models[0].name: 'a/./b' is no model name"),
        (one_model(name="a/.."), "pool.yaml: models[0].name: 'a/..' is no model name"),
        (one_model(name="."), "pool.yaml: models[0].name: '.' is no model name"),
        (one_model(name="/a"), "pool.yaml: models[0].name: '/a' is no model name"),
        (one_model(name="a/"), "pool.yaml: models[0].name: 'a/' is no model name"),
        (one_model(name="a\n"), "pool.yaml: models[0].name: 'a\\n' is no model name"),
        (one_model(name="é"), "pool.yaml: models[0].name: 'é' is no model name"),
        (one_model(name=7), "pool.yaml: models[0].name: expected a text, got 7"),
        (one_model(model=" "), "pool.yaml: models[0].model: is empty"),
        (one_model(model=None), "pool.yaml: models[0].model: expected a text"),
        (one_model(priority="1"), "pool.yaml: models[0].priority: expected a whole number"),
        (one_model(priority=True), "pool.yaml: models[0].priority: expected a whole number"),
        (one_model(slo=3), "pool.yaml: models[0].slo: expected a mapping with the keys ttft, tpot"),
        (one_model(slo={"ttft": "1s"}), "pool.yaml: models[0].slo.tpot: is missing"),
        (one_model(slo={"ttft": 0, "tpot": 1}), "pool.yaml: models[0].slo.ttft: must be above 0"),
        (one_model(slo={"ttft": 1, "tpot": "0ms"}), "pool.yaml: models[0].slo.tpot: must be above 0"),
        (one_model(slo={"ttft": 1, "tpot": "soon"}), "pool.yaml: models[0].slo.tpot: 'soon' is no time"),
        ({**one_model(), "port": 65536}, "pool.yaml: port: 65536 is out of range"),
        ({**one_model(), "port": -1}, "pool.yaml: port: -1 is out of range"),
        ({**one_model(), "port": "8000"}, "pool.yaml: port: expected a whole number"),
        ({**one_model(), "page_size": "3MiB"}, "pool.yaml: page_size: 3145728 bytes is no power of two"),
        ({**one_model(), "page_size": "32KiB"}, "pool.yaml: page_size: 32768 bytes is no power of two"),
        ({**one_model(), "page_size": None}, "pool.yaml: page_size: None is no size"),
        ({**one_model(), "kv_floor_pages": 0}, "pool.yaml: kv_floor_pages: must be 1 or more"),
        ({**one_model(), "device_memory": "1MiB"}, "pool.yaml: device_memory: 1MiB is 0 pages, the models need 1"),
        ({**one_model(), "device_memory": 0}, "pool.yaml: device_memory: 0B is 0 pages"),
        ({**one_model(), "device_memory": "lots"}, "pool.yaml: device_memory: 'lots' is no size"),
        ({**one_model(), "device_memory": GIB, "kv_floor_pages": 10**9999}, "pool.yaml: device_memory: 1GiB is 32"),
        ({**one_model(), "host_memory": 0}, "pool.yaml: host_memory: is 0"),
        ({**one_model(), "host": "a b"}, "pool.yaml: host: must be one address"),
        ({**one_model(), "host": "${TOKENPOOL_NOT_SET}"}, "pool.yaml: host: environment variable TOKENPOOL_NOT_SET"),
        ({**one_model(), "scheduling": "aegaeon"}, "pool.yaml: scheduling: expected a mapping with the keys policy"),
        ({**one_model(), "scheduling": {"options": {"x": True}}}, "pool.yaml: scheduling.options.x: expected a number"),
        ({**one_model(), "scheduling": {"options": [1]}}, "pool.yaml: scheduling.options: expected a mapping"),
        ({**one_model(), "cpu_link": 0}, "pool.yaml: cpu_link: must be above 0"),
        ({**one_model(), "weights": "away"}, "pool.yaml: weights: must be one of auto, movable, fixed"),
        ({**one_model(), "scheduling": {"policy": 1}}, "pool.yaml: scheduling.policy: expected a text"),
        ({**one_model(), "scheduling": {"polcy": "a"}}, "pool.yaml: scheduling: unknown key 'polcy', did you mean "),
        ({**one_model(), "shutdown_timeout": "-1s"}, "pool.yaml: shutdown_timeout: '-1s' is no time"),
        ({**one_model(), "admission": None}, "pool.yaml: admission: expected a mapping with the keys max_waiting, "),
        ({**one_model(), "admission": {"max_waiting": 0}}, "pool.yaml: admission.max_waiting: must be 1 or more"),
        ({**one_model(), "admission": {"max_wait": 1}}, "pool.yaml: admission: unknown key 'max_wait', did you mean "),
        (one_model(admission={"max_waiting": "8"}), "pool.yaml: models[0].admission.max_waiting: expected a whole"),
        (one_model(admission={"max_waiting_tokens": -1}), "pool.yaml: models[0].admission.max_waiting_tokens: must be"),
        (one_model(admission={"on_miss": "drop"}), "pool.yaml: models[0].admission.on_miss: must be one of queue, rej"),
        (one_model(admission={"on_miss": "reject"}), "pool.yaml: models[0].admission.on_miss: reject needs to know"),
        ({**one_model(), "max_request": 0}, "pool.yaml: max_request: must be above 0"),
        ({**one_model(), "api_key": "fifteen-letters"}, "pool.yaml: api_key: a key has 15 characters: give 16"),
        ({**one_model(), "admin_models": "some"}, "pool.yaml: admin_models: must be one of none, listed, any, got"),
        ({**one_model(), "admin_roots": []}, "pool.yaml: admin_roots: is empty: list folders or owners"),
        ({**one_model(), "admin_roots": [5]}, "pool.yaml: admin_roots: expected a list of folders"),
        ({**one_model(), "admin_roots": ["a/b"]}, "pool.yaml: admin_roots: 'a/b' is neither a folder, such as /models"),
        ({**one_model(), "view_key": "k" * 16, "admin_key": "k" * 16}, "pool.yaml: view_key: a key is in admin_ke"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_by_name(data: object, message: str) -> None:
    """Each mistake is refused in one line with its key path."""
    assert refusal_of(data).startswith(message)


@pytest.mark.parametrize("setting", ["api_key", "admin_key", "view_key"])
@pytest.mark.parametrize(
    "value",
    [
        None,
        12345678,
        {"hunter2": 1},
        ["hunter2", 5],
        "",
        "hunter2",
        "hunter2-01234567 ",
        ["a", ""],
        "hunter2-01234567\n",
        "hunter2${",
        "hunter2-01234567\0",
    ],
)
def test_bad_keys_are_refused_in_secret(setting: str, value: object) -> None:
    """A key that can never be sent is refused, and the message does not show it."""
    message = refusal_of({**one_model(), setting: value})

    assert message.startswith(f"pool.yaml: {setting}: ")
    assert "hunter" not in message and "12345678" not in message


def test_keys_are_not_printed() -> None:
    """The printed form of a config, as in a log line, holds no key."""
    config = PoolConfig.from_dict({**one_model(), "api_key": "hunter2-01234567", "admin_key": ["hunter3-01234567"]})

    assert (config.api_key, config.admin_key) == (("hunter2-01234567",), ("hunter3-01234567",))
    assert "hunter" not in repr(config)


def test_variables_are_put_in_keys_and_host_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """${NAME} is read in host and keys; anywhere else it is plain text."""
    monkeypatch.setenv("TOKENPOOL_TEST", "v-0123456789abcd")
    reference = "${TOKENPOOL_TEST}"
    config = PoolConfig.from_dict({**one_model(args=[reference]), "host": reference, "api_key": f"<{reference}>"})

    assert ("v-0123456789abcd", ("<v-0123456789abcd>",)) == (config.host, config.api_key)
    assert (reference,) == config.models[0].args


def test_an_empty_variable_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that is set but empty does not switch the key check off."""
    monkeypatch.setenv("TOKENPOOL_TEST", "")

    assert "api_key: a key is empty" in refusal_of({**one_model(), "api_key": "${TOKENPOOL_TEST}"})


def test_paths_start_at_the_pool_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative model path is taken from the pool file's folder and comes back absolute."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "near").mkdir()
    (tmp_path / "far").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    paths = ["./near", "../far", "~/far", str(tmp_path / "far"), "org/near"]
    models = [{"name": f"m{i}", "model": path} for i, path in enumerate(paths)]
    write_pool(tmp_path / "conf", json.dumps({"models": models}))
    far = str(tmp_path / "far")

    actual = [model.model for model in load_pool_file("conf/pool.yaml").models]

    assert [str(tmp_path / "conf" / "near"), far, far, far, "org/near"] == actual


@pytest.mark.parametrize("path", ["./none", "../none", "~/none", "/none/at/all", "./\0"])
def test_missing_paths_are_refused(path: str) -> None:
    """A local path must exist when the file is read, not when the engine starts."""
    assert refusal_of(one_model(model=path)).startswith("pool.yaml: models[0].model: missing path ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping"),
        ("- a", "expected a mapping"),
        ("models: [", "line 1, column 10: while parsing a flow node, "),
        ("models:\n\t- a", "line 2, column 1: while scanning for the next token, "),
        ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
        ("port: 1\nport: 2", "line 2, column 1: key 'port' is written twice: remove one"),
        ("models:\n- {name: a, 'name': b}", "line 2, column 13: key 'name' is written twice"),
        ("a: *b", "line 1, column 4: found undefined alias"),
        ("a: !!python/object:os.system x", "line 1, column 4: could not determine a constructor"),
        ("a: 1\n---\nb: 2", "line 2, column 1: expected a single document in the stream, "),
        ("? [a]\n: b", "line 1, column 3: while constructing a mapping, found unhashable key"),
        ("port: 2001-99-99", "is no good YAML: "),
        ("port: !!bool x", "is no good YAML: "),
        (b"host: \xff", "is no good YAML: "),
        (b"host: \x00", "is no good YAML: "),
        ("[" * 10_000, "is no good YAML: "),
    ],
)
def test_bad_yaml_is_refused_with_its_place(tmp_path: Path, text: str | bytes, message: str) -> None:
    """What is no YAML mapping is refused in one line, with line and column where there is one."""
    path = write_pool(tmp_path, text)
    with pytest.raises(ConfigError) as refusal:
        load_pool_file(path)

    assert str(refusal.value).startswith(f"{path}: {message}")
    assert len(str(refusal.value).splitlines()) == 1


def test_a_merge_may_override(tmp_path: Path) -> None:
    """A key beside a YAML merge overrides the merged one and does not count as written twice."""
    text = """
models:
- &a {name: a, model: org/a, priority: 1}
- &b {<<: *a, name: b}
- {<<: *b, name: c, priority: 2}
"""
    models = load_pool_file(write_pool(tmp_path, text)).models

    assert [(model.name, model.priority) for model in models] == [("a", 1), ("b", 1), ("c", 2)]


@pytest.mark.parametrize("name", ["none.yaml", "."])
def test_an_unreadable_file_is_refused(tmp_path: Path, name: str) -> None:
    """A file that cannot be opened is a ConfigError with the system's reason."""
    path = os.path.join(tmp_path, name)
    with pytest.raises(ConfigError, match="cannot be read: (No such file|Is a directory)") as refusal:
        load_pool_file(path)

    assert isinstance(refusal.value.__cause__, OSError)


def test_a_changed_copy_is_checked() -> None:
    """`dataclasses.replace` checks ranges too, so that an override cannot pass what the file may not hold."""
    config = PoolConfig.from_dict(one_model())

    assert dataclasses.replace(config, port=1).port == 1
    with pytest.raises(ConfigError, match="^port: 70000 is out of range"):
        dataclasses.replace(config, port=70_000)


def test_a_refusal_holds_its_parts() -> None:
    """A ConfigError gives source, key path and problem apart."""
    with pytest.raises(ConfigError) as refusal:
        PoolConfig.from_dict(one_model(slo={"ttft": 1, "tpot": 0}), "x.yaml")

    parts = (refusal.value.source, refusal.value.key, refusal.value.problem)
    assert parts == ("x.yaml", "models[0].slo.tpot", "must be above 0, such as 100ms")


@pytest.mark.parametrize(
    "error",
    [
        errors.PoolError("x"),
        ConfigError("x", key="k", source="s"),
        errors.CapacityError("x", needed_pages=3, free_pages=1, holders={"a": 2}),
        errors.CapacityError("x"),
        errors.PatchMismatchError("x"),
        errors.ModelRefusedError("m", "needs f", "remove --f"),
        errors.ModelUnavailableError("x", retry_after_s=2.5),
        errors.HostError("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_cross_processes(error: errors.PoolError) -> None:
    """Every error keeps its type, message and attributes when it is pickled or copied."""
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (type(error), str(error), vars(error)) == (type(other), str(other), vars(other))
        assert isinstance(other, errors.PoolError)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates() | st.binary(max_size=4)
likely = st.sampled_from(
    ["a", "org/a", "./a", "~", "10s", "0ms", "auto", "64KiB", "1GiB", "--a 'b", "--a b", "${A", "${TOKENPOOL_NOT_SET}",
     "a\nb", "a\u2028b", 1, 0, -1, 65536, 1 << 20]
)  # fmt: skip
keys = st.text() | st.integers() | st.sampled_from(["a", "max_model_len", "max-model-len", "ttft", "a\nb"])
anything = st.recursive(
    scalars | likely, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=8
)


def mapping_of(required: dict[str, Any], optional: dict[str, Any]) -> st.SearchStrategy[Any]:
    fields = {key: value | anything for key, value in optional.items()}
    return st.fixed_dictionaries(required, optional=fields) | anything


slos = mapping_of({}, {"ttft": st.just("10s"), "tpot": st.floats(0, 1)})
admissions = mapping_of({}, {"max_waiting": likely, "max_waiting_tokens": likely, "on_miss": st.just("reject")})
models = mapping_of(
    {"name": st.sampled_from("abcd")},
    {"model": st.just("org/a"), "args": anything, "slo": slos, "priority": st.integers(), "modle": anything}
    | {"admission": admissions},
)
pools = mapping_of(
    {"models": st.lists(models, min_size=1, max_size=3)},
    {
        "device_memory": likely,
        "host_memory": likely,
        "page_size": likely,
        "kv_floor_pages": likely,
        "host": likely,
        "port": likely,
        "api_key": likely,
        "admin_key": st.lists(likely, max_size=2),
        "view_key": likely,
        "admin_models": likely,
        "admin_roots": st.lists(likely, max_size=2),
        "weights": likely,
        "cpu_link": likely,
        "admission": admissions,
        "scheduling": mapping_of({}, {"policy": likely, "options": st.dictionaries(st.text(max_size=5), likely)}),
        "shutdown_timeout": likely,
        "max_request": likely,
        "prot": anything,
    },
)


@given(pools)
def test_any_value_gives_a_config_or_one_line(data: object) -> None:
    """Whatever YAML holds gives a PoolConfig or a ConfigError of one line, never anything else."""
    try:
        assert isinstance(PoolConfig.from_dict(data), PoolConfig)
    except ConfigError as refusal:
        assert len(str(refusal).splitlines()) == 1
        assert str(refusal).startswith("pool.yaml: ")


@given(anything)
def test_any_flags_give_words_or_one_line(value: object) -> None:
    """Whatever stands under `args` gives a tuple of texts or a ConfigError of one line."""
    try:
        args = read_args(value)
    except ConfigError as refusal:
        assert len(str(refusal).splitlines()) == 1
    else:
        assert all(isinstance(word, str) for word in args)
