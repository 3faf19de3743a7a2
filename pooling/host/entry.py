# SPDX-License-Identifier: Apache-2.0
"""What the host process does from its start to its end, in whichever way it was started."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import logging
import os
import pickle
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vllm.logger import configure_logging_if_needed
from vllm.platforms import current_platform

from tokenpool.host.engine.request_waits import tell_waits
from tokenpool.host.engine_builder import import_architecture
from tokenpool.host.engine_host import EngineHost
from tokenpool.host.frontends import attach_frontend, detach_frontend
from tokenpool.host.hosted_model import HostedModel
from tokenpool.host.kv_exchange import KVExchange
from tokenpool.host.load.compiled_code import CompiledCode
from tokenpool.host.load.device_choice import WORKERS
from tokenpool.host.metrics import HostMetrics, scrape
from tokenpool.host.state import host_load, host_state, host_trace, model_state
from tokenpool.logs import log_to_stderr
from tokenpool.patches import apply_all
from tokenpool.process.affinity import unpinned
from tokenpool.recent_logs import recent_lines
from tokenpool.settings import CONTROL_KEY
from tokenpool.wire.addresses import EngineAddresses
from tokenpool.wire.control import ControlServer
from tokenpool.wire.pulse import STACKS_SIGNAL
from tokenpool.wire.spec import HostConfig, HostedModelSpec

_OF_BUILDS = (
    "vllm.compilation.backends",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.v1.attention.backends.cpu_attn",
)
"""What vLLM imports when it builds an engine for the CPU, whatever the model."""
_LOST = 71
"""Exit status of a host that ends because an engine is lost."""
logger = logging.getLogger(__name__)


def prepare() -> None:
    """What every host does alike before it knows what it is; beside the imports, in a template.

    The first build of a host imports more. On a GPU that is left to the host: nobody has seen what it does there.
    """
    apply_all()
    if current_platform.is_cpu():
        for module in (WORKERS["cpu"].rpartition(".")[0], *_OF_BUILDS):
            with contextlib.suppress(ImportError):  # another version of vLLM: the build says so, or does without
                importlib.import_module(module)


def main(control_path: str, config_json: str) -> None:
    """Serve until SIGTERM, then finish what was accepted."""
    key = CONTROL_KEY.take()  # before there are children, which would have it too
    assert key is not None, "no server has started this process"
    log_to_stderr("host")
    faulthandler.register(STACKS_SIGNAL)
    host = EngineHost(HostConfig(**json.loads(config_json)))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the frontend, which drains and then asks us
    signal.signal(signal.SIGTERM, lambda *_: host.stop())
    host.on_idle = HostMetrics(host).update

    def add_model(spec: HostedModelSpec) -> dict[str, Any]:
        configure_logging_if_needed(spec.vllm_config.logging_config)  # of models of one pool they are equal
        import_architecture(spec)
        code = CompiledCode(spec.name, spec.vllm_config, movable_weights=host.config.movable_weights)

        def check(block_bytes: int) -> None:
            if block_bytes:
                host.call(lambda: host.allocator.arena.place_of(spec.name, block_bytes)).result()

        if host.models:
            code.make_aside(check=check)
        state = host.build_beside(lambda: model_state(host, host.add_model(spec))).result()
        code.note_made()
        return state

    def add_packed(spec: bytes, input_address: str, output_address: str, server_key: bytes) -> None:
        """A model from a controller, which neither opens the spec nor knows vLLM."""
        add_model(replace(pickle.loads(spec), addresses=_addresses(input_address, output_address, server_key)))

    exchange = KVExchange(host, f"{control_path}.kv", host.config.node_ip)

    def added(hosted: HostedModel) -> None:
        exchange.add(hosted)
        tell_waits(hosted.core, hosted.name, host.trace)

    host.on_add = added
    engines = (host.weights.copier, host.weights.fetcher)
    direct: dict[str, Callable[..., Any]] = {
        "add_model": add_model,
        "add_packed": add_packed,
        "progress": host.progress.snapshot,
        "metrics": scrape,
        "logs": recent_lines,
        "pulse": lambda: host.pulse.snapshot(host.progress.snapshot(), engines),
    }
    with unpinned():
        ControlServer(control_path, key, host.call).serve(_methods(host, exchange), direct)
    # A socket thread that wants the interpreter waits this long for the loop: 5 ms by default, a step or more.
    sys.setswitchinterval(0.0005)
    try:
        host.run()
    except BaseException:  # an orderly end of the interpreter would wait for threads that may never end
        logger.critical("the engine host cannot go on", exc_info=True)
        logging.shutdown()
        os._exit(_LOST)
    if host.group is not None:
        host.group.close()
    logging.shutdown()
    os._exit(0)  # an orderly interpreter exit takes seconds and prints what Triton leaks


def _methods(host: EngineHost, exchange: KVExchange) -> dict[str, Callable[..., Any]]:
    """The calls that run on the loop's thread, between two steps."""
    return {
        "remove_model": host.remove_model,
        "attach_frontend": lambda *args: attach_frontend(host, *args),
        "attach_at": lambda model, index, *where: attach_frontend(host, model, index, _addresses(*where)),
        "detach_frontend": lambda client_index: detach_frontend(host, client_index),
        "state": lambda: {**host_state(host), "kv_exchange": exchange.snapshot()},
        "load": lambda: host_load(host),
        "trace": lambda last_s: host_trace(host, last_s),
        "check": host.check,
        "set_budget": host.budget.set,
        "sleep": host.sleepers.sleep,
        "wake": host.sleepers.wake,
    }


def _addresses(input_address: str, output_address: str, server_key: bytes) -> EngineAddresses:
    """Those of one frontend, or of none where they are empty."""
    if not input_address:
        return EngineAddresses((), ())
    return EngineAddresses((input_address,), (output_address,), server_key)
