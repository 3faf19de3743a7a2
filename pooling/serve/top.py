# SPDX-License-Identifier: Apache-2.0
"""`tokenpool top`: the pool in a terminal, drawn again every other second. Imports no vLLM.

    tokenpool top                   # with TOKENPOOL_VIEW_KEY set
    tokenpool top --once            # one frame as plain text
    tokenpool top --json            # the same figures as JSON
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from tokenpool.errors import ConfigError, PoolError
from tokenpool.serve.key_words import add_key_flags, looking_key
from tokenpool.serve.pool_query import ask_pool, default_url
from tokenpool.serve.top_view import frame, summarize
from tokenpool.units import parse_seconds

USAGE = """usage: tokenpool top [--url URL] [--view-key @FILE] [--interval SECONDS] [--once | --json]

--url         the server; else $TOKENPOOL_URL, else http://127.0.0.1:8000
--view-key    the file with its view key, or --admin-key with its admin key; else $TOKENPOOL_VIEW_KEY is used, or
              $TOKENPOOL_ADMIN_KEY
--interval    seconds between two frames, default 2; rates are over this time
--once        print one frame as plain text, with all models, and stop
--json        print the figures of one frame as JSON and stop

q or Ctrl-C ends it. Colours are off where the output is no terminal, and with NO_COLOR set.
`waits` is the share of time that the device waited for switches. TTFT and TPOT are medians of the requests of the last
minute. Bar: # weights, + KV in use, - KV idle, = null blocks, . free. `host` is host memory: copies of weights, KV of
paused requests, cached KV."""

_HOME, _CLEAR_REST, _CLEAR_LINE = "\x1b[H", "\x1b[J", "\x1b[K"
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see tokenpool top --help")


def top(words: list[str]) -> int:
    """Run the subcommand and return its exit status; raises PoolError with one line."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--url", default=default_url())
    add_key_flags(parser)
    parser.add_argument("--interval", default="2")
    single = parser.add_mutually_exclusive_group()
    single.add_argument("--once", action="store_true")
    single.add_argument("--json", action="store_true")
    options = parser.parse_args(words)
    interval_s = _interval(options.interval)
    if not (key := looking_key(options)):
        raise ConfigError("is needed, or an admin key: set TOKENPOOL_VIEW_KEY or TOKENPOOL_ADMIN_KEY", key="--view-key")
    if options.once or options.json or not sys.stdout.isatty():
        view = _two_states(options.url, key, interval_s)
        print(json.dumps(view, indent=2) if options.json else "\n".join(frame(view, width=_width(), height=None)))
        return 0
    _watch(options.url, key, interval_s)
    return 0


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = parse_seconds(text, "--interval")
    if not 0.1 <= seconds <= 3600:
        raise ConfigError(f"{text} is out of range: 0.1 to 3600 seconds", key="--interval")
    return seconds


def _width() -> int:
    return shutil.get_terminal_size().columns


def _state(url: str, key: str) -> dict[str, Any]:
    state = ask_pool(url, key, "/v1/pool/state")
    if not isinstance(state, dict) or "models" not in state:
        raise PoolError(f"{url} is no tokenpool server: its /v1/pool/state has no models")
    return state


def _two_states(url: str, key: str, interval_s: float) -> dict[str, Any]:
    before = _state(url, key)
    time.sleep(interval_s)
    return summarize(_state(url, key), before)


def _watch(url: str, key: str, interval_s: float) -> None:
    colours = "NO_COLOR" not in os.environ
    before = _state(url, key)  # what is wrong with the address or the key ends the command before the screen changes
    view: dict[str, Any] = summarize(before)
    trouble = ""
    with _screen():
        while True:
            columns, rows = shutil.get_terminal_size()
            lines = frame(view, width=columns, height=rows - 2, colours=colours)
            _draw([*lines, "", trouble or "q ends"], rows)
            if _quit_within(interval_s):
                return
            try:
                now = _state(url, key)
            except PoolError as error:
                trouble = f"old figures: {error}"[:columns]
                continue
            view, before, trouble = summarize(now, before), now, ""


def _draw(lines: list[str], rows: int) -> None:
    body = "\r\n".join(f"{line}{_CLEAR_LINE}" for line in lines[:rows])
    sys.stdout.write(f"{_HOME}{body}{_CLEAR_REST}")
    sys.stdout.flush()


@contextmanager
def _screen() -> Iterator[None]:
    """The terminal's second screen without echo; the first is back afterwards, whatever happens."""
    reads = sys.stdin.isatty()
    saved = termios.tcgetattr(sys.stdin) if reads else None
    sys.stdout.write(_ENTER)
    try:
        if reads:
            tty.setcbreak(sys.stdin)
        yield
    finally:
        if saved is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, saved)
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()


def _quit_within(seconds: float) -> bool:
    """Wait; True as soon as q is pressed."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if not sys.stdin.isatty():
            time.sleep(left)
        elif select.select([sys.stdin], [], [], left)[0] and os.read(sys.stdin.fileno(), 1) in (b"q", b"Q", b""):
            return True
    return False
