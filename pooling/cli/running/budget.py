# SPDX-License-Identifier: Apache-2.0
"""`tokenpool budget`: show how much memory a running pool may use, lend some of it, take it back. Imports no vLLM.

tokenpool budget                            # with TOKENPOOL_VIEW_KEY or TOKENPOOL_ADMIN_KEY set
tokenpool budget --device-memory 8GiB       # with TOKENPOOL_ADMIN_KEY set
tokenpool budget --device-memory 0          # parks the pool: requests wait
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from tokenpool.cli.key_words import add_key_flags, changing_key, looking_key
from tokenpool.cli.parser import Parser
from tokenpool.cli.pool_query import add_url_flag, ask_pool
from tokenpool.units import format_bytes, format_count, parse_bytes

_PATH = "/v1/pool/budget"
_LIMIT_S = 3600.0
"""All KV may have to leave the device first."""
_EPILOG = (
    "Idle pages go first, then weights and the KV of requests, which wait in host memory until there is room again. A "
    "budget that cannot be is refused, with what holds the memory and how little is possible. A host that is restarted "
    "keeps the present budget; a server that is restarted has that of the pool file."
)


def add_command(commands: argparse._SubParsersAction[Parser], summary: str) -> None:
    """Add the parser of `tokenpool budget` to the tree."""
    text = "Show how much memory a running pool may use, or change it."
    parser = commands.add_parser("budget", help=summary, description=text, epilog=_EPILOG)
    add_url_flag(parser)
    add_key_flags(parser)
    device = "let the pool use so much of the device, such as 8GiB; 0 parks it: all leaves the device, requests wait"
    parser.add_argument("--device-memory", metavar="SIZE", help=device)
    parser.add_argument("--host-memory", metavar="SIZE", help="let it use so much host memory")
    parser.add_argument("--json", action="store_true", help="print the server's answer as JSON")


def run(options: argparse.Namespace) -> int:
    """Print the budget, changed if that is asked for; returns the exit status, raises PoolError with one line."""
    given = {"device_memory": options.device_memory, "host_memory": options.host_memory}
    order = {key: parse_bytes(text, f"--{key.replace('_', '-')}") for key, text in given.items() if text is not None}
    if order:
        state = ask_pool(options.url, changing_key(options), _PATH, body=order, limit_s=_LIMIT_S)
    else:
        state = ask_pool(options.url, looking_key(options), _PATH)
    print(json.dumps(state, indent=1) if options.json else "\n".join(lines_of(state)))
    return 0


def lines_of(state: Mapping[str, Any]) -> list[str]:
    """A budget, as the server tells it, for people."""
    least, most = format_bytes(state["device_memory_least"]), format_bytes(state["device_memory_most"])
    device = "parked" if state["parked"] else format_bytes(state["device_memory"])
    lines = [f"device memory  {device} (0, or {least} to {most})", *_held(state["device_held"])]
    lines += [f"host memory    {format_bytes(state['host_memory'])}", *_held(state["host_held"])]
    if node := state.get("node"):
        used, budget = format_bytes(node["used_bytes"]), format_bytes(node["budget_bytes"])
        lines += [f"node           {used} of {budget}, shared by {format_count(node['hosts'], 'host')}"]
    lines += [f"asleep         {name}, level {level}" for name, level in state["asleep"].items()]
    return lines


def _held(held: Mapping[str, Mapping[str, int]]) -> list[str]:
    return [
        f"  {use:<12} {format_bytes(n):>10}  {owner}" for use, owners in held.items() for owner, n in owners.items()
    ]
