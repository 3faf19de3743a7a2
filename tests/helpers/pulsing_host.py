# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the host process: the real control socket and pulse, a loop that does what calls ask for, no engine.

    python -m tests.helpers.pulsing_host CONTROL_SOCKET [WORD ...]

The key is where a host's is; it can be the template of such hosts, too.

Calls: `add_packed`, `remove_model`, `load` and `state` as a host's; `wedge` makes the loop's next step never end;
`hold` (direct) never answers.
"""

from __future__ import annotations

import faulthandler
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from tokenpool.process.template_process import words_of_child
from tokenpool.settings import CONTROL_KEY
from tokenpool.wire.control import ControlServer
from tokenpool.wire.pulse import STACKS_SIGNAL, WAITING, Pulse

_never = threading.Event()


class Loop:
    """Takes one call after the other, as a host's loop does."""

    def __init__(self) -> None:
        self.pulse = Pulse()
        self.wedged = False
        self._calls: queue.Queue[tuple[Callable[[], Any], Future[Any]]] = queue.Queue()

    def call(self, job: Callable[[], Any]) -> Future[Any]:
        """Run it on the loop's thread."""
        future: Future[Any] = Future()
        self._calls.put((job, future))
        return future

    def run(self) -> None:
        """Serve for ever."""
        while True:
            self.pulse.enter(WAITING)
            job, future = self._calls.get()
            self.pulse.enter(f"call {job.__name__}")
            try:
                future.set_result(job())
            except Exception as error:
                future.set_exception(error)
            if self.wedged:
                self.pulse.enter("step", "llama")
                step_that_never_ends()


def step_that_never_ends() -> None:
    """Looks like a kernel that waits for ever."""
    _never.wait()


def main(path: str, *_: str) -> None:
    """Serve until the process is killed."""
    key = CONTROL_KEY.take()
    assert key is not None
    faulthandler.register(STACKS_SIGNAL)
    loop, models = Loop(), set()
    methods: dict[str, Callable[..., Any]] = {
        "wedge": lambda: setattr(loop, "wedged", True),
        "load": lambda: {name: {} for name in models},
        "state": lambda: {"models": {}, "num_free_pages": 1},
        "remove_model": models.remove,
    }
    direct: dict[str, Callable[..., Any]] = {
        "add_packed": lambda spec, *where: models.add(spec.decode()),
        "pulse": lambda: loop.pulse.snapshot(None, ()),
        "hold": _never.wait,
        "metrics": lambda: "# TYPE a gauge\na 1.0\n",
    }
    ControlServer(path, key, loop.call).serve(methods, direct)
    loop.run()


if __name__ == "__main__":
    main(*words_of_child(lambda: None))
