# SPDX-License-Identifier: Apache-2.0
"""Where log lines of every process of a pool go: to stderr, whatever other packages do to Python's root logger.

Lines of tokenpool have a handler of their own, so a package that changes the root logger's level or handlers, as
dependencies of vLLM do at import, loses none of them.

What a client did wrong is one line, without the stack by which vLLM found it: a client could fill the log otherwise.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from tokenpool.recent_logs import keep_recent
from tokenpool.settings import LOG_LEVEL

_MOST_TEXT = 300
_COMPILES = "vllm.v1.structured_output"  # what it cannot compile is a client's grammar, whatever error that is


def log_to_stderr(process: str = "") -> None:
    """Send this process' log lines to stderr, each as `LEVEL process: message`; a second call replaces the first.

    The level of tokenpool's own lines is `TOKENPOOL_LOG_LEVEL`, else INFO. Of other packages that have no handler of
    their own, warnings and errors are shown. Raises ConfigError for a level that there is not.
    """
    level = LOG_LEVEL.get() or "INFO"
    layout = f"%(levelname)s {process}: %(message)s" if process else "%(levelname)s %(message)s"
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(layout))
    own = logging.getLogger("tokenpool")
    own.handlers[:] = [handler]
    keep_recent(own, process)
    own.setLevel(level)
    own.propagate = False
    logging.basicConfig(level=logging.WARNING, format=layout)
    _shorten_client_errors()


def _shorten_client_errors() -> None:
    make = logging.getLogRecordFactory()
    if isinstance(make, _Shortening):
        return
    logging.setLogRecordFactory(_Shortening(make))


class _Shortening:
    """Makes log records; those of a client's error lose its stack and become warnings."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def __call__(self, *args: Any, **options: Any) -> logging.LogRecord:
        record: logging.LogRecord = self._make(*args, **options)
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and (record.name == _COMPILES or _is_of_client(error)):
            said, text = record.getMessage()[:_MOST_TEXT], f"{type(error).__name__}: {error}"[:_MOST_TEXT]
            record.msg, record.args, record.exc_info = " ".join(f"{said} {text}".split()), (), None
            record.levelno, record.levelname = logging.WARNING, logging.getLevelName(logging.WARNING)
        return record


def _is_of_client(error: BaseException) -> bool:
    errors = sys.modules.get("vllm.exceptions")
    kinds = (getattr(errors, name, None) for name in ("VLLMClientError", "GracefulHTTPError"))
    return isinstance(error, tuple(kind for kind in kinds if kind is not None))
