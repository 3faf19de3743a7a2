# SPDX-License-Identifier: Apache-2.0
"""The last log lines of a process, kept for whoever looks at a pool over HTTP. They go to stderr all the same."""

from __future__ import annotations

import logging
import re
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from itertools import count
from secrets import token_hex
from typing import Any

_KEPT = 2000
"""Lines of a process."""
_LONGEST = 2000
"""Characters of one; of a longer one the beginning is kept, and the end of it with the exception."""


class RecentLines(logging.Handler):
    """Keeps the last 2,000 lines, each with a number one larger than that of the line before."""

    def __init__(self, process: str = "") -> None:
        super().__init__()
        self.source = f"{process or 'server'}-{token_hex(3)}"
        """Tells processes apart, also a host from the one that it came after."""
        self._process = process or "server"
        self._numbers = count(1)
        self._lines: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self._guard = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        try:
            text = self.format(record)
        except Exception:  # a line that cannot be written must not end what it is about
            self.handleError(record)
            return
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
        line = {"time_s": record.created, "level": record.levelname, "process": self._process, "text": text}
        with self._guard:
            self._lines.append({"source": self.source, "number": next(self._numbers), **line})

    def after(self, seen: Mapping[str, int]) -> list[dict[str, Any]]:
        """The lines with a larger number than `seen` has for this source, oldest first; all of them without one."""
        last = seen.get(self.source, 0)
        with self._guard:
            return [line for line in self._lines if line["number"] > last]


_here: list[RecentLines] = []
"""That of this process, if there is one."""


def keep_recent(logger: logging.Logger, process: str) -> None:
    """Keep the lines of a logger of this process from now on; a second call begins anew."""
    for old in _here:
        logger.removeHandler(old)
    _here[:] = [RecentLines(process)]
    logger.addHandler(_here[0])


def recent_lines(seen: Mapping[str, int]) -> list[dict[str, Any]]:
    """The kept lines of this process that are newer than `seen`."""
    return [line for here in _here for line in here.after(seen)]


def in_order(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of several processes by their time; those of one stay in their order, each is there once."""
    one = {(line["source"], line["number"]): line for line in lines}
    return sorted(one.values(), key=lambda line: (line["time_s"], line["source"], line["number"]))


def is_about(line: Mapping[str, Any], model: str) -> bool:
    """Whether a line names a model: `model=NAME`, or the name in quotes, and no longer name that begins alike."""
    pattern = rf"(?:\bmodels?=(?:\S*,)?|['\"`]){re.escape(model)}(?![\w./:-]*\w)"
    return re.search(pattern, line["text"]) is not None
