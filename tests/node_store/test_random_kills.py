# SPDX-License-Identifier: Apache-2.0
"""Hosts and keepers that are killed and stopped at random: what is read is what was filled, and all books agree."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from tests.helpers.server import poll
from tests.node_store.asking import BUDGET, MIB, book, kill_keeper
from tests.node_store.told_host import Told

pytestmark = pytest.mark.cpu

SIZES = {"a": 5 * MIB, "b": 11 * MIB, "c": 23 * MIB, "d": 31 * MIB}
NUM_HOSTS, NUM_STEPS = 3, 60


class World:
    """Three hosts, one keeper, and what each host has, as far as it was told."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.hosts = [Told(folder, BUDGET).ready() for _ in range(NUM_HOSTS)]
        self.claimed: list[dict[str, str]] = [{} for _ in self.hosts]
        self.own = [0] * NUM_HOSTS

    def step(self) -> None:
        at, key = self.rng.randrange(NUM_HOSTS), self.rng.choice(sorted(SIZES))
        host, claimed = self.hosts[at], self.claimed[at]
        deed = self.rng.choice(["claim"] * 4 + ["finish"] * 4 + ["release", "own", "kill", "keeper", "pause"])
        if deed == "claim" and claimed.get(key) in (None, "wait"):
            claimed[key] = host.do("claim", key, SIZES[key])
            if claimed[key] == "fill":
                host.do("allocate", key, SIZES[key])
        elif deed == "finish" and claimed.get(key) == "fill":
            host.do("fill", key, ord(key))
            host.do("publish", key)
            claimed[key] = "whole"
        elif deed == "release" and key in claimed:
            host.do("release", key)
            del claimed[key]
        elif deed == "own":
            self.own[at] = self.rng.randrange(20) * MIB
            self.cover(at)
        elif deed == "kill":
            host.end()
            self.hosts[at] = Told(self.folder, BUDGET).ready()
            self.claimed[at], self.own[at] = {}, 0
        elif deed == "keeper":
            kill_keeper(self.folder)
        elif deed == "pause":
            host.signal(signal.SIGSTOP)
            other = self.hosts[at - 1]
            assert other.do("state")["wanted"] is not None
            host.signal(signal.SIGCONT)
        self.read(at)

    def cover(self, at: int) -> None:
        used = self.own[at] + sum(SIZES[key] for key, state in self.claimed[at].items() if state != "wait")
        self.hosts[at].do("cover", used)

    def read(self, at: int) -> None:
        for key, state in self.claimed[at].items():
            if state == "whole":
                assert [ord(key), ord(key), SIZES[key]] == self.hosts[at].do("read", key)

    def settle(self) -> None:
        """Whoever fills gives it up, and all find the keeper."""
        for at, host in enumerate(self.hosts):
            for key in [key for key, state in self.claimed[at].items() if state != "whole"]:
                host.do("release", key)
                del self.claimed[at][key]
        poll(lambda: self.agrees())

    def agrees(self) -> bool:
        """Whether each host is known, with what it has: of the node, or its own."""
        for at in range(NUM_HOSTS):
            self.cover(at)
        found = book(self.folder)
        if found["hosts"] != NUM_HOSTS or not all(host.do("state")["there"] for host in self.hosts):
            return False
        shared = sum(host.do("state")["shared"] for host in self.hosts)
        leases = sum(copy["bytes"] * copy["hosts"] for copy in found["copies"].values())
        used = sum(SIZES[key] for claimed in self.claimed for key in claimed) + sum(self.own)
        own = used - shared
        slack = 2 * MIB * NUM_HOSTS
        return bool(leases == shared and own <= found["own_bytes"] <= own + slack)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_books_agree_after_any_kill(folder: Path, seed: int) -> None:
    """Whatever happened before, and in which order."""
    world = World(folder, random.Random(seed))
    try:
        for _ in range(NUM_STEPS):
            world.step()
        world.settle()
        for at in range(NUM_HOSTS):
            world.read(at)
    finally:
        for host in world.hosts:
            host.end()
