# SPDX-License-Identifier: Apache-2.0
"""A host's sockets for calls: models are added and removed and the state is read; tokens never pass here."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from tokenpool.errors import HostError

logger = logging.getLogger(__name__)

Address = str | tuple[str, int]
"""Path of a Unix socket, or IP address and port."""


class ControlServer:
    """Answers calls on a Unix socket, or on (IP address, port), one thread per connection.

    Each call runs on the host loop's thread; `direct` methods run on the connection's own.
    """

    def __init__(self, address: Address, key: bytes, run_on_loop: Callable[[Callable[[], Any]], Any]) -> None:
        self._listener = Listener(address, authkey=key)
        self._run_on_loop = run_on_loop

    @property
    def address(self) -> Address:
        """Where it listens."""
        return self._listener.address

    def serve(
        self, methods: Mapping[str, Callable[..., Any]], direct: Mapping[str, Callable[..., Any]] | None = None
    ) -> None:
        """Answer in the background until the process ends."""
        self._direct = direct or {}
        threading.Thread(target=self._accept, args=(methods,), name="control", daemon=True).start()

    def _accept(self, methods: Mapping[str, Callable[..., Any]]) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError as error:  # a client that went away during the handshake
                logger.warning("control connection failed: %s", error)
                continue
            threading.Thread(target=self._answer, args=(connection, methods), daemon=True).start()

    def _answer(self, connection: Connection, methods: Mapping[str, Callable[..., Any]]) -> None:
        with connection:
            try:
                name, args = connection.recv()
                if name in self._direct:
                    result = self._direct[name](*args)
                else:
                    result = self._run_on_loop(lambda: methods[name](*args)).result()
            except EOFError:
                return
            except Exception as error:  # every failure is the caller's answer
                logger.debug("control call failed", exc_info=error)
                result = error
            try:
                connection.send(result)
            except OSError:
                logger.warning("nobody waits for the answer to a control call any more")


def call_host(address: Address, key: bytes, method: str, *args: Any) -> Any:
    """Call a host and return its answer; raises what the call raised, or HostError when the host is gone.

    Blocks for as long as the call takes; use a thread.
    """
    try:
        with Client(address, authkey=key) as connection:
            connection.send((method, args))
            result = connection.recv()
    except (OSError, EOFError) as error:
        raise HostError(f"engine host does not answer {method}: {error or 'it ended'}") from error
    if isinstance(result, Exception):
        raise result
    return result
