# SPDX-License-Identifier: Apache-2.0
"""A pool file that is edited while a cluster serves it: which models come and go."""

from __future__ import annotations

import asyncio

import pytest

from tokenpool.config import ModelSpec, PoolConfig
from tokenpool.errors import CapacityError
from tokenpool.serve.launch.pool_file import apply_changes, follow_pool_file

pytestmark = pytest.mark.cpu


class Pool:
    """Keeps what is done to it."""

    def __init__(self, *names: str) -> None:
        self.names = set(names)
        self.done: list[str] = []

    async def add_model(self, spec: ModelSpec) -> None:
        if spec.name == "large":
            raise CapacityError("no room")
        self.names.add(spec.name)
        self.done.append(f"add {spec.name}")

    async def remove_model(self, name: str, drain_s: float) -> None:
        self.names.remove(name)
        self.done.append(f"remove {name}")


def config(**models: str) -> PoolConfig:
    return PoolConfig(models=tuple(ModelSpec(name, model) for name, model in models.items()))


def test_models_are_removed_changed_and_added():
    """What is gone goes first, so that its memory is there for what comes; a change is both."""
    pool = Pool("a", "b", "c")
    asyncio.run(apply_changes(config(a="x/a", b="x/b", c="x/c"), config(b="x/b", c="x/other", d="x/d"), pool))

    assert pool.done == ["remove a", "remove c", "add c", "add d"]


def test_one_failure_does_not_stop_the_rest():
    """A model without room, and one that is gone already, are logged; the others come."""
    pool = Pool()
    asyncio.run(apply_changes(config(gone="x/a"), config(large="x/l", d="x/d"), pool))

    assert pool.done == ["add d"]


def test_an_edited_file_is_taken_and_a_wrong_one_is_not(tmp_path, caplog):
    """The pool follows good versions of the file and says why it does not take a wrong one."""
    path, pool = tmp_path / "pool.yaml", Pool("a")

    async def edit() -> None:
        path.write_text("models: [{name: a, model: x/a}]")
        following = asyncio.create_task(follow_pool_file(str(path), pool))
        await asyncio.sleep(0.1)
        for text, until in (
            ("models: [{name: a}]", lambda: "pool file not taken" in caplog.text),
            ("models: [{name: a, model: x/a}, {name: b, model: x/b}]", lambda: pool.done == ["add b"]),
        ):
            path.write_text(text)
            async with asyncio.timeout(30):
                while not until():
                    await asyncio.sleep(0.02)
        following.cancel()

    asyncio.run(edit())
    assert pool.names == {"a", "b"}
