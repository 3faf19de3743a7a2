# SPDX-License-Identifier: Apache-2.0
"""Which of the bounded HTTP protocols uvicorn is given. Imports no vLLM."""

from __future__ import annotations

import asyncio

from tokenpool.serve.http.http_limits import BoundedH11


def http_protocol() -> type[asyncio.Protocol]:
    """The protocol to give to uvicorn: with httptools if that is installed, which is faster, else with h11."""
    try:
        from tokenpool.serve.http.http_limits_httptools import BoundedHttpTools
    except ImportError:
        return BoundedH11
    return BoundedHttpTools
