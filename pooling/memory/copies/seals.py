# SPDX-License-Identifier: Apache-2.0
"""Seals of shared memory: what the kernel refuses to whoever has it, in whatever process. Imports no torch."""

from __future__ import annotations

import fcntl
import os

SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""Neither its bytes nor its size can change, for ever."""


def check_sealed(file: int, nbytes: int) -> None:
    """Raise ValueError unless the descriptor is that of so many bytes which can never change."""
    try:
        seals = fcntl.fcntl(file, fcntl.F_GET_SEALS)
    except OSError as error:
        raise ValueError(f"this file has no seals: {error}") from error
    if seals & SEALS != SEALS:
        raise ValueError("the memory is not sealed: it could change")
    if (found := os.fstat(file).st_size) != nbytes:
        raise ValueError(f"the memory has {found} bytes, not {nbytes}")
