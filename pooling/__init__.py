# SPDX-License-Identifier: Apache-2.0
"""tokenpool: many LLMs share few GPUs, several real vLLM engines on one memory budget."""

from importlib import import_module

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "PooledLLM":  # imports vLLM, which takes seconds
        return import_module("tokenpool.offline").PooledLLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
