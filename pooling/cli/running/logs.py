# SPDX-License-Identifier: Apache-2.0
"""`tokenpool logs`: the last log lines of a running pool, of one model or all. Imports no vLLM.

tokenpool logs --model chat --follow       # with TOKENPOOL_VIEW_KEY or TOKENPOOL_ADMIN_KEY set
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from tokenpool.cli.key_words import add_key_flags, looking_key
from tokenpool.cli.parser import Parser
from tokenpool.cli.pool_query import add_url_flag, pool_lines


def add_command(commands: argparse._SubParsersAction[Parser], summary: str) -> None:
    """Add the parser of `tokenpool logs` to the tree."""
    text = "Show the last log lines of a running pool: those of tokenpool, not those of vLLM."
    parser = commands.add_parser("logs", help=summary, description=text)
    parser.add_argument("--model", metavar="NAME", help="lines that name this model")
    parser.add_argument("--lines", metavar="N", type=int, default=100, help="the last N lines (default 100)")
    parser.add_argument("--follow", action="store_true", help="then those that come, until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="as JSON, one object in a line")
    add_url_flag(parser)
    add_key_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Print lines; returns 0, raises PoolError with one line."""
    asked = {"lines": str(options.lines), "follow": str(int(options.follow))}
    asked |= {"model": options.model} if options.model else {}
    try:
        for line in pool_lines(options.url, looking_key(options), f"/v1/pool/logs?{urlencode(asked)}"):
            print(line if options.json else _shown(json.loads(line)), flush=True)
    except KeyboardInterrupt:
        pass
    return 0


def _shown(line: Mapping[str, Any]) -> str:
    if "missed" in line:
        return f"... {line['missed']} lines were missed"
    at = time.strftime("%H:%M:%S", time.localtime(line["time_s"]))
    return f"{at} {line['level']} {line['process']}: {line['text']}"
