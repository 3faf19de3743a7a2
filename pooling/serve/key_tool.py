# SPDX-License-Identifier: Apache-2.0
"""`tokenpool key`: makes keys of tenants and the hashes that a pool file holds of them."""

from __future__ import annotations

import getpass
import secrets
import sys

from tokenpool.access_config import check_key
from tokenpool.errors import ConfigError
from tokenpool.tenant_config import hash_key

USAGE = """usage: tokenpool key new     print a new key and its hash
       tokenpool key hash    read a key from standard input and print its hash"""
_KEY_BYTES = 32


def key(words: list[str]) -> int:
    """Run `tokenpool key`; returns the exit status, raises ConfigError."""
    if words == ["new"]:
        new = f"tp-{secrets.token_urlsafe(_KEY_BYTES)}"
        print(f"key:  {new}    # give it to the tenant; it is shown only now")
        print(f"hash: {hash_key(new)}    # write it under `keys` of the tenant in the pool file")
        return 0
    if words == ["hash"]:
        print(hash_key(_read()))
        return 0
    raise ConfigError("give `new`, or `hash` with the key on standard input; it does not belong on a command line")


def _read() -> str:
    text = getpass.getpass("key: ") if sys.stdin.isatty() else sys.stdin.readline()
    found = text.strip("\r\n")
    check_key(found, "standard input")
    return found
