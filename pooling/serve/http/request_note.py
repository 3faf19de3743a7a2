# SPDX-License-Identifier: Apache-2.0
"""What the log may say of a request, from when it comes; its parts are filled in as they become known."""

from __future__ import annotations

from starlette.types import Scope

NOTE_KEY = "tokenpool.note"
"""Where the scope of a request has its note."""

_MAX_SHOWN = 200


class RequestNote:
    """What the log may say of a request: nothing of its body."""

    __slots__ = ("is_over", "method", "model", "path", "request_id", "tenant")

    def __init__(self, method: str = "", path: str = "", request_id: str = "") -> None:
        self.method, self.path, self.request_id = method, path, request_id
        self.model = ""
        """Its model's name in the pool, once that is known."""
        self.tenant = ""
        self.is_over = False

    @classmethod
    def of(cls, scope: Scope) -> RequestNote:
        """The note of a request that has just come."""
        request_id = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        shown_id = request_id[:_MAX_SHOWN].decode("latin-1")
        return cls(scope.get("method", "WEBSOCKET"), scope["path"][:_MAX_SHOWN], shown_id)

    def __str__(self) -> str:
        # Path and request id are the client's: no line of the log may be forged with them.
        shown = {"model": self.model, "tenant": self.tenant, "request_id": self.request_id}
        known = "".join(f" {key}={value!r}" for key, value in shown.items() if value)
        return f"request={self.method} path={self.path!r}{known}"


def note_of(scope: Scope) -> RequestNote:
    """The note of a request, to be filled in; one that nobody reads where no `LoopWatch` is around the app."""
    return scope.get(NOTE_KEY) or RequestNote()
