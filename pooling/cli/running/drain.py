# SPDX-License-Identifier: Apache-2.0
"""`tokenpool drain`: empty a host of a cluster, so that its node can be taken away, or use it again. Imports no vLLM.

tokenpool drain host-1             # with TOKENPOOL_ADMIN_KEY set; returns when nothing is left there
tokenpool drain host-1 --undo      # it gets models again
"""

from __future__ import annotations

import argparse
import sys
import time
from urllib.parse import quote

from tokenpool.cli.key_words import add_key_flags, changing_key
from tokenpool.cli.parser import Parser
from tokenpool.cli.pool_query import add_url_flag, ask_pool
from tokenpool.errors import PoolError
from tokenpool.units import parse_seconds

_LOOK_S = 1.0
_EPILOG = (
    "Models of the host are loaded on others first, and leave it when they are served there; its requests go on "
    "there. A model that no other host can take stays. The host gets nothing new until --undo, also when it dies and "
    "comes back. `tokenpool top` and GET /v1/pool/state name the hosts."
)


def add_command(commands: argparse._SubParsersAction[Parser], summary: str) -> None:
    """Add the parser of `tokenpool drain` to the tree."""
    parser = commands.add_parser("drain", help=summary, description="Empty a host of a cluster.", epilog=_EPILOG)
    parser.add_argument("host", metavar="HOST", help="its name, such as tokenpool-host-0")
    parser.add_argument("--undo", action="store_true", help="use it again")
    parser.add_argument("--wait", metavar="TIME", default="1h", help="how long to wait until it is empty (default 1h)")
    add_url_flag(parser)
    add_key_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Drain, and wait; 0 once the host is empty, 1 when models are left; raises PoolError with one line."""
    path, key = f"/v1/pool/hosts/{quote(options.host, safe='')}", changing_key(options)
    limit_s = parse_seconds(options.wait, "--wait")
    deadline = time.monotonic() + limit_s
    body = {"draining": not options.undo}
    left, is_told = ask_pool(options.url, key, path, body=body)["models"], False
    while left and not options.undo and time.monotonic() < deadline:
        if not is_told:
            print(f"{options.host} has {', '.join(left)}", file=sys.stderr)
            is_told = True
        time.sleep(_LOOK_S)
        try:
            left = ask_pool(options.url, key, path, body=body)["models"]
        except PoolError as error:
            if "does not answer" not in str(error):
                raise  # else it may be back by the next look
    if options.undo:
        print(f"{options.host} is used again")
    elif left:
        print(f"{options.host} still has {', '.join(left)}", file=sys.stderr)
        return 1
    else:
        print(f"{options.host} is empty")
    return 0
