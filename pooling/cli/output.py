# SPDX-License-Identifier: Apache-2.0
"""What commands say and write: the line of an error, and files of JSON. Imports no vLLM."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenpool.errors import ConfigError, PoolError


def fail(error: PoolError) -> int:
    """Print an error as one line; returns the exit status that goes with it."""
    print(f"tokenpool: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def write_json(path: Path | None, values: Mapping[str, Any]) -> None:
    """Write a result to `path`, unless it is None; raises ConfigError."""
    if path is not None:
        try:
            path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot be written: {error.strerror}", source=str(path)) from error
