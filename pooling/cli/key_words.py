# SPDX-License-Identifier: Apache-2.0
"""Keys on a command line, from files and from the environment. Imports no vLLM.

Whoever may list processes reads their command lines, and a process cannot change its own: a key belongs into the
environment, or into a file that the command line only names.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenpool import settings
from tokenpool.config import PoolConfig
from tokenpool.errors import ConfigError, check_setting, config_errors_under

VARIABLES = {
    "--api-key": settings.API_KEY,
    "--view-key": settings.VIEW_KEY,
    "--admin-key": settings.ADMIN_KEY,
}
"""Where a key of a server may come from instead of each flag."""


def read_key(text: str, flag: str) -> str:
    """The key that `flag` was given: what the file holds after ``@``, else the text, with a warning that it shows."""
    if not text.startswith("@"):
        print(
            f"tokenpool: warning: {flag}: the key is visible to all who may list processes: write {flag} @FILE, or "
            f"set {VARIABLES[flag].name}", file=sys.stderr,
        )  # fmt: skip
        return text
    try:
        return Path(text[1:]).expanduser().read_text().strip("\r\n")
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "is no text"
        raise ConfigError(f"cannot read the key from {text[1:]}: {reason}", key=flag) from None


def with_environment(config: PoolConfig, has_api_key: bool) -> PoolConfig:
    """`config` with the keys that the environment has for it.

    VLLM_API_KEY, which leaves the environment so that no model's app asks for it again, takes the place of the pool
    file's keys unless the flags have one (`has_api_key`); the other variables fill in what is not set.
    """
    key_of_vllm = VARIABLES["--api-key"].take()
    found = {"api_key": None if has_api_key else key_of_vllm}
    for flag in ("--view-key", "--admin-key"):
        setting = flag[2:].replace("-", "_")
        if not getattr(config, setting):
            found[setting] = VARIABLES[flag].get()
    for setting, key in found.items():
        if key is not None:
            with config_errors_under(source=VARIABLES[f"--{setting.replace('_', '-')}"].name):
                change: dict[str, Any] = {setting: (key,)}
                config = replace(config, **change)
    return config


def add_key_flags(parser: argparse.ArgumentParser) -> None:
    """Let a command that only looks take a view key or an admin key."""
    for flag, kind in (("--view-key", "view"), ("--admin-key", "admin")):
        text = f"the file with the server's {kind} key (default: ${VARIABLES[flag].name})"
        parser.add_argument(flag, metavar="@FILE", help=text)


def looking_key(options: argparse.Namespace) -> str | None:
    """The key of a command that only looks: a flag's, else the environment's; a view key before an admin key."""
    return _flag_key(options, "--view-key", "--admin-key") or settings.VIEW_KEY.get() or settings.ADMIN_KEY.get()


def changing_key(options: argparse.Namespace) -> str | None:
    """The admin key of a command that changes the pool: the flag's, else the environment's."""
    return _flag_key(options, "--admin-key") or settings.ADMIN_KEY.get()


def _flag_key(options: argparse.Namespace, *flags: str) -> str | None:
    for flag in flags:
        text = getattr(options, flag[2:].replace("-", "_"))
        if text is not None:
            check_setting(bool(text), flag, "is empty")
            return read_key(text, flag)
    return None
