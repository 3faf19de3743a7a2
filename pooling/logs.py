# SPDX-License-Identifier: Apache-2.0
"""Where log lines of every process of a pool go: to stderr, whatever other packages do to Python's root logger.

Lines of tokenpool have a handler of their own, so a package that changes the root logger's level or handlers, as
dependencies of vLLM do at import, loses none of them.
"""

from __future__ import annotations

import logging

from tokenpool.recent_logs import keep_recent
from tokenpool.settings import LOG_LEVEL


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
