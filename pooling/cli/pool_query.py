# SPDX-License-Identifier: Apache-2.0
"""Ask a running server's admin API, for the subcommands that look at one. Imports no vLLM."""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tokenpool import settings
from tokenpool.errors import ConfigError, PoolError

_LIMIT_S = 60.0


def add_url_flag(parser: argparse.ArgumentParser) -> None:
    """Let a command ask the server that is named, or that of the environment."""
    default = "http://127.0.0.1:8000"
    text = f"address of the server (default: ${settings.URL.name}, else {default})"
    parser.add_argument("--url", default=settings.URL.get() or default, help=text)


def ask_pool(url: str, key: str | None, path: str, *, body: Any = None, limit_s: float = _LIMIT_S) -> Any:
    """The JSON answer of `path` on the server at `url`; raises PoolError of one line with what the server says.

    With a `body`, which is sent as JSON, it is a POST.
    """
    with _answer(url, key, path, body, limit_s) as response:
        return json.load(response)


def pool_lines(url: str, key: str | None, path: str) -> Iterator[str]:
    """The lines of an answer as they come, however long that takes; raises PoolError as `ask_pool` does."""
    with _answer(url, key, path, None, None) as response:
        for line in response:
            yield line.decode().rstrip("\n")


@contextmanager
def _answer(url: str, key: str | None, path: str, body: Any, limit_s: float | None) -> Iterator[Any]:
    """The answer, for as long as it is read; see `ask_pool`."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is no address: write such as http://127.0.0.1:8000", key="--url")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    data = None if body is None else json.dumps(body).encode()
    if data is not None:
        headers["Content-Type"] = "application/json"
    request = urllib.request.Request(f"{url.rstrip('/')}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=limit_s) as response:
            yield response
    except urllib.error.HTTPError as error:
        raise PoolError(f"{url} answers {error.code}: {_reason(error)}") from None
    except (OSError, ValueError) as error:
        raise PoolError(f"{url} does not answer: {getattr(error, 'reason', error)}") from None


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return json.load(error)["error"]["message"]
    except (OSError, ValueError, KeyError, TypeError):
        return str(error.reason)
