# SPDX-License-Identifier: Apache-2.0
"""Writes docs/models.md."""
from __future__ import annotations
import json
from pathlib import Path
from typing import Any


def write(file: Path, entries: dict[str, Any]) -> None:
    """Stub."""
    file.write_text(json.dumps(entries, indent=1) + "\n")
