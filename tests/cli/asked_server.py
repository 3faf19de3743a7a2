# SPDX-License-Identifier: Apache-2.0
"""A server that notes what a command of the tool asks, and answers as a test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, NamedTuple


class AskedFor(NamedTuple):
    """One request; `body` is decoded, None for a GET."""

    method: str
    path: str
    key: str
    body: Any


@contextmanager
def asked_server(answer: Callable[[AskedFor], tuple[int, bytes]]) -> Iterator[str]:
    """Serve until the end of the block; gives the address. `answer` returns status and body."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # http.server's name
            self._answer(None)

        def do_POST(self) -> None:  # http.server's name
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Any) -> None:
            status, text = answer(AskedFor(self.command, self.path, self.headers["Authorization"], body))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
