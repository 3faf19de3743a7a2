# SPDX-License-Identifier: Apache-2.0
"""`tokenpool top`: the pool in a terminal, drawn again every other second. Imports no vLLM.

tokenpool top                   # with TOKENPOOL_VIEW_KEY set
tokenpool top --once            # one frame as plain text
tokenpool top --json            # the same figures as JSON
"""

from __future__ import annotations

import argparse
import io
import json
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from tokenpool.cli.key_words import add_key_flags, looking_key
from tokenpool.cli.parser import Parser
from tokenpool.cli.pool_query import add_url_flag, ask_pool
from tokenpool.cli.top.figures import summarize
from tokenpool.cli.top.view import frame
from tokenpool.errors import ConfigError, PoolError
from tokenpool.units import parse_seconds

_EPILOG = (
    "q or Ctrl-C ends it. Colours are off where the output is no terminal, and with NO_COLOR set. `waits` is the share "
    "of time that the device waited for switches. TTFT and TPOT are medians of the requests of the last minute. Bar: # "
    "weights, + KV in use, - KV idle, = null blocks, x lent, . free. `host` is host memory: copies of weights, KV of "
    "paused requests, cached KV."
)


def add_command(commands: argparse._SubParsersAction[Parser], summary: str) -> None:
    """Add the parser of `tokenpool top` to the tree."""
    parser = commands.add_parser("top", help=summary, description="Watch a running pool.", epilog=_EPILOG)
    add_url_flag(parser)
    add_key_flags(parser)
    interval = "time between two frames, over which rates are; in seconds, or such as 500ms (default: %(default)s)"
    parser.add_argument("--interval", default="2", metavar="TIME", help=interval)
    single = parser.add_mutually_exclusive_group()
    single.add_argument("--once", action="store_true", help="print one frame as plain text, with all models, and stop")
    single.add_argument("--json", action="store_true", help="print the figures of one frame as JSON and stop")


def run(options: argparse.Namespace) -> int:
    """Print one frame, or draw until q is pressed; returns the exit status, raises PoolError with one line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # not every terminal has the ellipsis, or the letters of a name
    interval_s = _interval(options.interval)
    if not (key := looking_key(options)):
        raise ConfigError("is needed, or an admin key: set TOKENPOOL_VIEW_KEY or TOKENPOOL_ADMIN_KEY", key="--view-key")
    if options.once or options.json or not sys.stdout.isatty():
        view = _two_states(options.url, key, interval_s)
        if options.json:
            print(json.dumps(view, indent=2))
        else:
            Console(color_system=None).print(frame(view))
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
    before = _state(url, key)  # what is wrong with the address or the key ends the command before the screen changes
    view: dict[str, Any] = summarize(before)
    console = Console()
    foot = "q ends"
    with _keys(), Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            last = Text(foot, no_wrap=True, overflow="ellipsis")
            live.update(Group(frame(view, console.height - 2), "", last), refresh=True)
            if _quit_within(interval_s):
                return
            try:
                now = _state(url, key)
            except PoolError as error:
                foot = f"old figures: {error}"
                continue
            view, before, foot = summarize(now, before), now, "q ends"


@contextmanager
def _keys() -> Iterator[None]:
    """Keys are read as they are pressed, and not shown; afterwards the terminal is as before, whatever happens."""
    if not sys.stdin.isatty():
        yield
        return
    saved = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, saved)


def _quit_within(seconds: float) -> bool:
    """Wait; True as soon as q is pressed."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if not sys.stdin.isatty():
            time.sleep(left)
        elif select.select([sys.stdin], [], [], left)[0] and os.read(sys.stdin.fileno(), 1) in (b"q", b"Q", b""):
            return True
    return False
