# SPDX-License-Identifier: Apache-2.0
"""Lets the warm-up of a new engine give way to those that run: before each dummy run and each capture of a graph.

Between two of them nothing is half done: a capture is one graph, and a step that another engine takes meanwhile is on
another thread's streams. A compilation is one piece still. For graphs of model runner V2 not yet run on hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class _Pausing(list[Any]):
    """A list that gives way before each of its items."""

    def __init__(self, items: list[Any], pause: Callable[[], None]) -> None:
        super().__init__(items)
        self._pause = pause

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            self._pause()
            yield item


def graphs_to_capture(runner: Any) -> int:
    """How many graphs a runner that was warmed up will capture, those of encoders left out."""
    if (manager := getattr(runner, "cudagraph_manager", None)) is not None:
        return sum(map(len, manager._capture_descs.values()))
    dispatcher = getattr(runner, "cudagraph_dispatcher", None)  # of the first runner
    return 0 if dispatcher is None else sum(len(graphs) for _, graphs in dispatcher.get_capture_descs())


@contextmanager
def giving_way(runner: Any, pause: Callable[[], None]) -> Iterator[None]:
    """In the block, `pause` is called before each dummy run of a model runner and each graph that it captures."""
    dummy_run = runner._dummy_run

    def paused(*args: Any, **kwargs: Any) -> Any:
        pause()
        return dummy_run(*args, **kwargs)

    captured = getattr(getattr(runner, "cudagraph_manager", None), "_capture_descs", {})
    before = dict(captured)
    captured.update({mode: _Pausing(graphs, pause) for mode, graphs in before.items()})
    runner._dummy_run = paused
    try:
        yield
    finally:
        del runner._dummy_run  # the method of its class is left
        captured.update(before)
