# SPDX-License-Identifier: Apache-2.0
"""vLLM's client starts its engine by name: while a pooled one is built for `LLM`, the pool provides the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tokenpool.patches.base import Patch, known

EngineLauncher = Callable[[Any, Any], Any]
"""Takes the VllmConfig and the EngineZmqAddresses that the client has bound; returns what stands for the engine's
processes: an object with `monitor_engine_liveness()`, which returns once they are dead, and `shutdown(timeout)`."""

_launcher: ContextVar[EngineLauncher | None] = ContextVar("tokenpool_engine_launcher", default=None)


@contextmanager
def launching(launcher: EngineLauncher) -> Iterator[None]:
    """Let `launcher` provide the engines of clients that are built on this thread."""
    token = _launcher.set(launcher)
    try:
        yield
    finally:
        _launcher.reset(token)


def _replacement(original: Any) -> Any:
    @contextmanager
    def launch_core_engines(vllm_config: Any, executor_class: Any, log_stats: bool, addresses: Any) -> Iterator[Any]:
        from vllm.v1.engine.utils import CoreEngineLaunch

        launcher = _launcher.get()
        if launcher is None:
            with original(vllm_config, executor_class, log_stats, addresses) as launch:
                yield launch
        else:
            yield CoreEngineLaunch(launcher(vllm_config, addresses), None, addresses, None)

    return launch_core_engines


PATCH = Patch(
    name="engine_launch",
    target="vllm.v1.engine.utils:launch_core_engines",
    hashes=known(
        v0_32_0="eb2fee7daf792e33ec0e7b54519efd50d4f3a86b48895eb1c58960a9583e420e",
        v0_29_0="277ff80a65f633b2fa69c0192204757d1fa8e7cf65663c4956e5b534c25b6749",
    ),
    reason="an offline `LLM` of the pool talks to an engine in the pool's host instead of starting one",
    removal="vLLM's `LLM` takes the addresses of an engine that runs already, as `AsyncLLM` does",
    sites=("vllm.v1.engine.core_client:launch_core_engines",),
    replacement=_replacement,
)
