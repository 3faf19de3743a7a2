# SPDX-License-Identifier: Apache-2.0
"""`tokenpool key`: makes keys of tenants and the hashes that a pool file holds of them."""

from __future__ import annotations

import argparse
import getpass
import secrets
import sys

from tokenpool.access_config import check_key
from tokenpool.cli.parser import Parser
from tokenpool.tenant_config import hash_key

_KEY_BYTES = 32
_REFUSAL = "give `new`, or `hash` with the key on standard input; it does not belong on a command line"


def add_command(commands: argparse._SubParsersAction[Parser], summary: str) -> None:
    """Add the parser of `tokenpool key` to the tree: what is wrong there may be a key, which no message repeats."""
    parser = commands.add_parser(
        "key", help=summary, description="Make a key of a tenant, or the hash of one.", refusal=_REFUSAL
    )
    actions = parser.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    for name, text in (
        ("new", "print a new key and its hash"),
        ("hash", "read a key from standard input and print its hash"),
    ):
        actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", refusal=_REFUSAL)


def run(options: argparse.Namespace) -> int:
    """Print the key and its hash, or the hash; raises ConfigError for what is no key."""
    if options.action == "hash":
        print(hash_key(_read()))
        return 0
    new = f"tp-{secrets.token_urlsafe(_KEY_BYTES)}"
    print(f"key:  {new}    # give it to the tenant; it is shown only now")
    print(f"hash: {hash_key(new)}    # write it under `keys` of the tenant in the pool file")
    return 0


def _read() -> str:
    text = getpass.getpass("key: ") if sys.stdin.isatty() else sys.stdin.readline()
    found = text.strip("\r\n")
    check_key(found, "standard input")
    return found
