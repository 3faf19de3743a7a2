# SPDX-License-Identifier: Apache-2.0
"""The flags of `tokenpool serve` that are keys of the pool file, by the file's own declaration. Imports no vLLM."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from tokenpool.cli.key_words import read_key
from tokenpool.cli.parser import Parser
from tokenpool.config import PoolConfig, Scheduling
from tokenpool.errors import config_errors_under
from tokenpool.sections import Key, key_of, keys_of, texts_of

_KEYS = (
    "device_memory", "host_memory", "page_size", "weights", "kv_floor_pages", "max_request", "view_key", "admin_key",
    "admin_models", "frontends", "host", "port", "shutdown_timeout",
)  # fmt: skip
_POLICY = "--turn-policy"
POOL_FLAGS: Mapping[str, Key] = {
    **{f"--{name.replace('_', '-')}": keys_of(PoolConfig)[name] for name in _KEYS},
    _POLICY: keys_of(Scheduling)["policy"],
}
"""The flags that take one value; `--api-key`, which takes several, and `--cluster` are read by themselves."""


def read_flag(flag: str, text: str) -> dict[str, Any]:
    """What one of POOL_FLAGS changes, by the field of PoolConfig; raises ConfigError with the flag."""
    key = POOL_FLAGS[flag]
    with config_errors_under(flag):
        if flag == _POLICY:
            return {"scheduling": Scheduling(text)}
        if key.written.form == "key or keys":
            return {key.name: (read_key(text, flag),)}
        is_number = key.written.form == "whole number" and text.lstrip("-").isdecimal()
        return {key.name: key.written.read(int(text) if is_number else text)}


def flag_texts() -> Mapping[str, str]:
    """What each flag does, with its default: the texts of the pool file's keys."""
    texts = texts_of(Scheduling) | texts_of(PoolConfig)
    told = {flag: (texts[key_of(key.name)], key.default_text) for flag, key in POOL_FLAGS.items()}
    found = {flag: text + (f" Default: {default}." if default else "") for flag, (text, default) in told.items()}
    return found | {"--cluster": "Spread the pool over a Ray cluster: auto, local or an address."}


def metavar_of(flag: str) -> str:
    """What stands for the value of one of POOL_FLAGS in a help."""
    key, names = POOL_FLAGS[flag], {"size": "SIZE", "time": "TIME", "whole number": "N", "key or keys": "@FILE"}
    return "|".join(key.choices) or names.get(key.written.form, key.name.upper())


def add_pool_flags(parser: Parser, *, without: Container[str] = ()) -> None:
    """Put the flags into the help of a command that leaves its words to `pool_from_command_line`."""
    group = parser.add_argument_group("pool flags, which are keys of the pool file")
    if "--api-key" not in without:
        text = "@FILE with a key of clients, or several; may come again."
        group.add_argument("--api-key", nargs="+", metavar="@FILE", help=text)
    for flag, text in flag_texts().items():
        if flag not in without:
            nargs, metavar = (None, metavar_of(flag)) if flag in POOL_FLAGS else ("?", "ADDRESS")
            group.add_argument(flag, nargs=nargs, metavar=metavar, help=text.replace("%", "%%"))


def add_models(parser: Parser) -> None:
    """Put what stands before the flags into the help."""
    text = "models, or one FILE of a pool (.yaml); they stand before the flags of vllm serve"
    parser.add_argument("models", nargs="*", metavar="MODEL|FILE", help=text)
