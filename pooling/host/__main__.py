# SPDX-License-Identifier: Apache-2.0
"""Entry of the host process: `python -m tokenpool.host CONTROL_SOCKET HOST_CONFIG_JSON`, started by a supervisor."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import logging
import os
import pickle
import signal
import sys
from dataclasses import replace
from typing import Any

from vllm.logger import configure_logging_if_needed

from tokenpool.host.affinity import unpinned
from tokenpool.host.control import ControlServer
from tokenpool.host.engine_builder import import_architecture
from tokenpool.host.engine_host import EngineHost
from tokenpool.host.frontends import attach_frontend, detach_frontend
from tokenpool.host.hosted_core import EngineAddresses
from tokenpool.host.hosted_model import HostConfig, HostedModel, HostedModelSpec
from tokenpool.host.kv_exchange import KVExchange
from tokenpool.host.metrics import HostMetrics, scrape
from tokenpool.host.pulse import STACKS_SIGNAL
from tokenpool.host.request_waits import tell_waits
from tokenpool.host.state import host_load, host_state, host_trace, model_state
from tokenpool.logs import log_to_stderr

CONTROL_KEY_VARIABLE = "TOKENPOOL_CONTROL_KEY"
_PR_SET_PDEATHSIG = 1
_LOST = 71
"""Exit status of a host that ends because an engine is lost."""
logger = logging.getLogger(__name__)


def main(control_path: str, config_json: str) -> None:
    """Serve until SIGTERM, then finish what was accepted. The process dies with its supervisor."""
    key = bytes.fromhex(os.environ.pop(CONTROL_KEY_VARIABLE))  # before there are children, which would have it too
    log_to_stderr("host")
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    faulthandler.register(STACKS_SIGNAL)
    host = EngineHost(HostConfig(**json.loads(config_json)))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the frontend, which drains and then asks us
    signal.signal(signal.SIGTERM, lambda *_: host.stop())
    host.on_idle = HostMetrics(host).update

    def add_model(spec: HostedModelSpec) -> dict[str, Any]:
        configure_logging_if_needed(spec.vllm_config.logging_config)  # of models of one pool they are equal
        import_architecture(spec)
        return host.build_beside(lambda: model_state(host, host.add_model(spec))).result()

    def add_packed(spec: bytes, input_address: str, output_address: str, server_key: bytes) -> None:
        """A model from a controller, which neither opens the spec nor knows vLLM."""
        add_model(replace(pickle.loads(spec), addresses=_addresses(input_address, output_address, server_key)))

    exchange = KVExchange(host, (host.config.node_ip, 0) if host.config.node_ip else f"{control_path}.kv")

    def added(hosted: HostedModel) -> None:
        exchange.add(hosted)
        tell_waits(hosted.core, hosted.name, host.trace)

    host.on_add = added
    methods = {
        "remove_model": host.remove_model,
        "attach_frontend": lambda *args: attach_frontend(host, *args),
        "attach_at": lambda model, index, *where: attach_frontend(host, model, index, _addresses(*where)),
        "detach_frontend": lambda client_index: detach_frontend(host, client_index),
        "state": lambda: {**host_state(host), "kv_exchange": exchange.snapshot()},
        "load": lambda: host_load(host),
        "trace": lambda last_s: host_trace(host, last_s),
        "check": host.check,
    }
    engines = (host.weights.copier, host.weights.fetcher)
    direct = {
        "add_model": add_model,
        "add_packed": add_packed,
        "progress": host.progress.snapshot,
        "metrics": scrape,
        "pulse": lambda: host.pulse.snapshot(host.progress.snapshot(), engines),
    }
    with unpinned():
        ControlServer(control_path, key, host.call).serve(methods, direct)
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


def _addresses(input_address: str, output_address: str, server_key: bytes) -> EngineAddresses:
    """Those of one frontend, or of none where they are empty."""
    if not input_address:
        return EngineAddresses((), ())
    return EngineAddresses((input_address,), (output_address,), server_key)


if __name__ == "__main__":
    main(*sys.argv[1:])
