# SPDX-License-Identifier: Apache-2.0
"""Keys on engine sockets: who was told the frontend's key gets through, nobody else does."""

from __future__ import annotations

from contextlib import suppress

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from tokenpool.wire.addresses import EngineAddresses
from tokenpool.wire.curve import secured

pytestmark = pytest.mark.vllm

PUBLIC, SECRET = zmq.curve_keypair()
WAIT_MS = 20_000


def pair(engine: EngineAddresses) -> tuple[bool, bool]:
    """Whether an engine with these addresses gets a message to a frontend with keys, and whether it was refused."""
    with zmq.Context() as context:
        frontend = secured(context, EngineAddresses((), (), PUBLIC, SECRET)).socket(zmq.PULL)
        sender = secured(context, engine).socket(zmq.PUSH)
        monitor = frontend.get_monitor_socket()
        with frontend, sender, monitor:
            sender.setsockopt(zmq.LINGER, 0)
            port = frontend.bind_to_random_port("tcp://127.0.0.1")
            sender.connect(f"tcp://127.0.0.1:{port}")
            with suppress(zmq.Again):  # a frontend may have refused already, and then nobody is there to send to
                sender.send(b"token", zmq.NOBLOCK)
            poller = zmq.Poller()
            poller.register(frontend, zmq.POLLIN)
            refused = False
            poller.register(monitor, zmq.POLLIN)
            while True:
                ready = dict(poller.poll(WAIT_MS))
                assert ready, "neither a message nor the end of a handshake"
                if frontend in ready:
                    return True, refused
                event = recv_monitor_message(monitor)["event"]
                if event & (zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL):
                    return False, True


def test_an_engine_with_the_key_gets_through():
    """The key of the order is enough."""
    assert pair(EngineAddresses((), (), PUBLIC)) == (True, False)


@pytest.mark.parametrize("key", [b"", zmq.curve_keypair()[0]], ids=["plain", "another key"])
def test_nobody_else_gets_through(key):
    """Without the key, or with another one, the frontend refuses the handshake."""
    assert pair(EngineAddresses((), (), key)) == (False, True)
