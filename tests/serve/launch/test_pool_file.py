# SPDX-License-Identifier: Apache-2.0
"""A pool file that is edited while a pool serves it: which models come and go."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml

from tokenpool.config import ModelSpec
from tokenpool.errors import CapacityError, ConfigError, HostError
from tokenpool.serve.launch.pool_file import PoolFile, _metrics

pytestmark = pytest.mark.cpu


class Pool:
    """Keeps what is done to it; models whose path has a word of `trouble` in it cannot be checked, added or removed."""

    def __init__(self, **models: str) -> None:
        self.models = dict(models)
        self.done: list[str] = []
        self.trouble: set[str] = set()

    def _meet(self, what: str, model: str, error: Exception) -> None:
        if any(f"{what}-{word}" in self.trouble for word in model.split("/")):
            raise error

    async def check_model(self, spec: ModelSpec) -> None:
        self._meet("check", spec.model, ConfigError("is no good", key="args"))

    async def add_model(self, spec: ModelSpec) -> None:
        self._meet("check", spec.model, ConfigError("is no good", key="args"))
        self._meet("add", spec.model, CapacityError("no room"))
        assert spec.name not in self.models
        self.models[spec.name] = spec.model
        self.done.append(f"add {spec.name}")

    async def remove_model(self, name: str, drain_s: float) -> None:
        if name in self.models:
            self._meet("remove", self.models[name], HostError("it is busy"))
        del self.models[name]
        self.done.append(f"remove {name}")


class File:
    """A pool file and its follower."""

    def __init__(self, folder: Path, retry_s: float = 30.0, **models: str) -> None:
        self.path, self.pool = folder / "pool.yaml", Pool(**models)
        self.write(**models)
        running = [ModelSpec(name, model) for name, model in models.items()]
        self.followed = PoolFile(str(self.path), self.pool, running, retry_s)

    def write(self, text: str = "", **models: str) -> None:
        listed = [{"name": name, "model": model} for name, model in models.items()]
        new = self.path.with_suffix(".new")
        new.write_text(text or yaml.safe_dump({"models": listed}))
        os.replace(new, self.path)

    def look(self) -> Mapping[str, str]:
        asyncio.run(self.followed.look())
        return self.pool.models


def gauge() -> float:
    value: float = _metrics()[0]._value.get()
    return value


def refused() -> float:
    value: float = _metrics()[1]._value.get()
    return value


def test_models_are_removed_changed_and_added(tmp_path):
    """What is gone goes first, so that its memory is there for what comes; a change is both."""
    file = File(tmp_path, a="x/a", b="x/b", c="x/c")
    file.write(b="x/b", c="x/other", d="x/d")

    assert file.look() == {"b": "x/b", "c": "x/other", "d": "x/d"}
    assert file.pool.done == ["remove a", "remove c", "add c", "add d"]
    assert gauge() == 1


def test_what_changed_while_the_models_were_loaded_is_seen(tmp_path):
    """The first look compares with what the pool was started with, not with what is there by then."""
    file = File(tmp_path, a="x/a")
    file.write(a="x/a", b="x/b")
    file.followed = PoolFile(str(file.path), file.pool, [ModelSpec("a", "x/a")])
    assert file.look().keys() == {"a", "b"}


def test_one_failure_does_not_stop_the_rest(tmp_path, caplog):
    """A model without room, and one that is gone already, are logged; the others come."""
    file = File(tmp_path, gone="x/a", stays="x/s")
    file.pool.trouble = {"add-large"}
    del file.pool.models["gone"]
    file.write(stays="x/s", large="x/large", d="x/d")

    assert file.look() == {"stays": "x/s", "d": "x/d"}
    assert "model not added model=large: no room" in caplog.text
    assert gauge() == 0


@pytest.mark.parametrize(
    "text",
    ["models: [{name: a}]", "models: [", "models: []", "", "\0", "models: [{name: a, model: x/a, lod: start}]"],
)
def test_a_wrong_file_changes_nothing(tmp_path, caplog, text):
    """It is refused as a whole, said once, and counted; the next good one is taken."""
    file = File(tmp_path, a="x/a", b="x/b")
    before = refused()
    file.write(text or " ")
    for _ in range(3):
        assert file.look() == {"a": "x/a", "b": "x/b"}
    assert (caplog.text.count("pool file not taken"), refused() - before, gauge()) == (1, 1, 0)
    file.write(a="x/a")
    assert file.look() == {"a": "x/a"}
    assert gauge() == 1


def test_a_model_stays_what_it_is_until_the_new_one_is_good(tmp_path, caplog):
    """It is not removed for one that is no good, and comes back where the new one has no room."""
    file = File(tmp_path, a="x/a", b="x/b")
    file.pool.trouble = {"check-bad", "add-large"}
    file.write(a="x/bad", b="x/large")

    assert file.look() == {"a": "x/a", "b": "x/b"}
    assert file.pool.done == ["remove b", "add b"]
    assert "model not changed model=a: args is no good" in caplog.text.replace("args:", "args")
    assert "model not added model=b: no room" in caplog.text


def test_what_failed_is_tried_again_and_said_once(tmp_path, caplog):
    """Until its cause is gone; not in every look."""
    file = File(tmp_path, retry_s=0.0, a="x/a")
    file.pool.trouble = {"add-large"}
    file.write(a="x/a", b="x/large")
    for _ in range(3):
        file.look()
    assert caplog.text.count("model not added") == 1
    file.pool.trouble.clear()
    assert file.look() == {"a": "x/a", "b": "x/large"}
    assert gauge() == 1
    patient = File(tmp_path, a="x/a")
    patient.pool.trouble = {"add-large"}
    patient.write(a="x/a", b="x/large")
    patient.look()
    patient.pool.trouble.clear()
    assert patient.look() == {"a": "x/a"}


def test_the_order_of_flags_means_nothing(tmp_path):
    """A tool that writes the file anew may sort its keys; another value of a flag is a change."""
    file = File(tmp_path, a="x/a")
    file.followed = PoolFile(str(file.path), file.pool, [ModelSpec("a", "x/a", ("--seed", "1", "--dtype", "half"))])
    file.write("models: [{name: a, model: x/a, args: {dtype: half, seed: 1}}]")
    file.look()
    assert file.pool.done == []
    file.write("models: [{name: a, model: x/a, args: {dtype: half, seed: 2}}]")
    file.look()
    assert file.pool.done == ["remove a", "add a"]


def test_settings_other_than_models_are_named(tmp_path, caplog):
    file = File(tmp_path, a="x/a")
    file.look()
    file.write("models: [{name: a, model: x/a}]\nport: 1234\n")
    file.look()
    assert "restart for the others" in caplog.text and gauge() == 1


def test_the_swap_of_a_config_map_is_seen(tmp_path):
    """Kubernetes mounts `pool.yaml -> ..data/pool.yaml` and `..data -> ..TIME/`, and replaces the second link."""

    def swap(stamp: str, text: str) -> None:
        (tmp_path / stamp).mkdir()
        (tmp_path / stamp / "pool.yaml").write_text(text)
        os.utime(tmp_path / stamp / "pool.yaml", ns=(1, 1))  # a time that does not change
        os.symlink(stamp, tmp_path / "..data_tmp")
        os.replace(tmp_path / "..data_tmp", tmp_path / "..data")

    swap("..1", "models: [{name: a, model: x/a}]")
    os.symlink("..data/pool.yaml", tmp_path / "pool.yaml")
    pool = Pool(a="x/a")
    followed = PoolFile(str(tmp_path / "pool.yaml"), pool, [ModelSpec("a", "x/a")])
    asyncio.run(followed.look())
    swap("..2", "models: [{name: b, model: x/b}]")
    asyncio.run(followed.look())
    assert pool.models == {"b": "x/b"}


def test_a_file_that_is_away_for_a_moment_changes_nothing(tmp_path):
    file = File(tmp_path, a="x/a")
    file.path.unlink()
    assert file.look() == {"a": "x/a"}
    file.write(b="x/b")
    assert file.look() == {"b": "x/b"}


@pytest.mark.parametrize("seed", range(100))
def test_any_row_of_files_and_troubles_ends_in_what_the_last_good_file_says(tmp_path, seed):
    """A model of the file is never lost for one that is no good, and when the troubles are over all is as written."""
    rng = random.Random(seed)
    names, models = "abcd", ("x/one", "x/two", "x/three")

    def some() -> dict[str, str]:
        return {name: rng.choice(models) for name in rng.sample(names, rng.randint(1, 4))}

    good = some()
    file = File(tmp_path, retry_s=0.0, **good)
    looks: list[Callable[[], object]] = []
    for _ in range(rng.randint(1, 12)):
        kinds = [f"{what}-{model[2:]}" for what in ("check", "add", "remove") for model in models]
        file.pool.trouble = set(rng.sample(kinds, rng.randint(0, 2)))
        before = dict(file.pool.models)
        if rng.random() < 0.3:
            file.write(rng.choice(("models: []", "models: [{name: a}]", "nonsense: 1")))
            assert file.look() == before
            assert gauge() == 0
            file.write(**good)
        else:
            good = some()
            file.write(**good)
        after = dict(file.look())
        bad = {model for model in models if f"check-{model[2:]}" in file.pool.trouble}
        assert all(after[name] == before[name] for name in before.keys() & good.keys() if good[name] in bad)
        assert gauge() == float(after == good)
    file.pool.trouble.clear()
    looks = [file.look] * 2
    assert [look() for look in looks][-1] == good
    assert gauge() == 1


def test_it_is_followed_in_the_background(tmp_path):
    """As the pool does it: until it is cancelled."""
    file = File(tmp_path, a="x/a")

    async def edit() -> None:
        following = asyncio.create_task(file.followed.follow())
        await asyncio.sleep(0.05)
        file.write(a="x/a", b="x/b")
        async with asyncio.timeout(30):
            while file.pool.done != ["add b"]:
                await asyncio.sleep(0.02)
        following.cancel()

    asyncio.run(edit())
