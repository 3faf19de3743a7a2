# SPDX-License-Identifier: Apache-2.0
"""A process that stands in for a host: does with the node's store what it is told by lines, one answer for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.server import REPOSITORY
from tokenpool.node_store.client import NodeStore
from tokenpool.node_store.shared_copy import SharedCopy


class Host:
    """What the lines name."""

    def __init__(self, folder: Path, budget: int) -> None:
        self.store = NodeStore(folder, budget, lambda nbytes: self.wanted.append(nbytes))
        self.wanted: list[int] = []
        self.copies: dict[str, SharedCopy] = {}
        self.store.start()

    def claim(self, key: str, nbytes: int = 0) -> str:
        copy = self.copies.get(key) or SharedCopy(self.store, key, nbytes)
        self.copies[key] = copy
        while not (is_there := copy.claim()) and copy.is_asking:
            pass
        if not is_there:
            return "wait"
        return "whole" if copy.is_whole else "fill"

    def allocate(self, key: str, nbytes: int) -> None:
        self.copies[key].allocate(nbytes, lambda nbytes: None)

    def fill(self, key: str, value: int) -> None:
        self.copies[key].tensor.fill_(value)

    def publish(self, key: str, meta: str = "") -> None:
        self.copies[key].publish(meta.encode())

    def read(self, key: str) -> list[int]:
        """The first and last byte, and how many there are."""
        tensor = self.copies[key].tensor
        return [int(tensor[0]), int(tensor[-1]), tensor.numel()]

    def release(self, key: str) -> None:
        self.copies.pop(key).release()
        self.store.show()  # the keeper knows

    def cover(self, used: int) -> None:
        self.store.cover(used)
        self.store.show()

    def state(self) -> dict[str, Any]:
        return {"there": self.store.is_there, "shared": self.store.shared_bytes, "wanted": self.wanted}


def main() -> None:
    host = Host(Path(sys.argv[1]), int(sys.argv[2]))
    print("null", flush=True)
    for line in sys.stdin:
        name, *args = json.loads(line)
        print(json.dumps(getattr(host, name)(*args)), flush=True)


class Told:
    """Such a process, as a test has it."""

    def __init__(self, folder: Path, budget: int) -> None:
        command = [sys.executable, "-m", "tests.node_store.told_host", str(folder), str(budget)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY)
        self.pid = self.process.pid

    def ready(self) -> Told:
        self.answer()
        return self

    def tell(self, *words: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(words).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def do(self, *words: Any) -> Any:
        self.tell(*words)
        return self.answer()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


if __name__ == "__main__":
    main()
