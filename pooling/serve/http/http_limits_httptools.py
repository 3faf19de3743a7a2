# SPDX-License-Identifier: Apache-2.0
"""The bounds of `http_limits` for uvicorn's protocol with httptools; a module of its own, as that may be missing."""

from __future__ import annotations

from enum import Enum
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from tokenpool.serve.http.http_limits import _Bounded


class _Part(Enum):
    """What of a request comes next."""

    NONE = 0
    HEAD = 1
    BODY = 2


class _TooLargeError(Exception):
    """Ends the parser."""


class BoundedHttpTools(_Bounded, HttpToolsProtocol):
    """With httptools, whose parser has no bounds of its own."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._part = _Part.NONE
        self._head_bytes = self._num_lines = 0  # of headers that the parser has told
        self._untold_bytes = 0  # since then: the parser may keep them
        self._has_told = False
        self._is_too_large = False

    def data_received(self, data: bytes) -> None:
        """Parse, and see that the parser does not keep too much."""
        self._has_told = False
        super().data_received(data)
        if self._part is _Part.NONE or self._has_told or self.transport.is_closing():
            return
        self._untold_bytes += len(data)
        if self._untold_bytes > self._max_bytes:
            self._end_by_size()

    def _note_told(self) -> None:
        """A head or a piece of a body begins: what came before is not kept any more."""
        self._has_told, self._untold_bytes = True, 0

    def on_message_begin(self) -> None:
        """See httptools."""
        self._part = _Part.HEAD
        self._head_bytes = self._num_lines = 0
        self._note_told()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """See httptools."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """See httptools."""
        self._num_lines += 1
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """See httptools."""
        self._part = _Part.BODY
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """See httptools."""
        self._note_told()
        super().on_body(body)

    def on_message_complete(self) -> None:
        """See httptools."""
        self._part = _Part.NONE
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Tell a head that is too large from one that is wrong."""
        if self._is_too_large:
            self._end_by_size()
        else:
            super().send_400_response(msg)

    def _count(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > self._max_bytes or self._num_lines > self._max_lines:
            self._is_too_large = True
            raise _TooLargeError

    def _is_in_body(self) -> bool:
        return self._part is _Part.BODY

    def _waits_for_client(self) -> bool:
        is_between = self.cycle is not None and (not self.cycle.response_complete or self._is_idle())
        return self._part is not _Part.NONE or not is_between
