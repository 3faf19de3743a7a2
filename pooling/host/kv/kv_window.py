# SPDX-License-Identifier: Apache-2.0
"""Memory that two hosts of one machine share while KV goes from one to the other: places for a few chunks.

It is a memfd without a name, which only the target gets a descriptor of, over their socket. It holds blocks of that one
move; its size is sealed, so that neither can take memory away under the other.
"""

from __future__ import annotations

import fcntl
import mmap
import os

import numpy as np
import numpy.typing as npt

_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Window:
    """One process' mapping; closed once nothing uses its places."""

    def __init__(self, file: int, num_places: int, place_bytes: int, *, writable: bool) -> None:
        """Takes `file` over. Raises OSError, ValueError."""
        self.file = file
        self.num_places = num_places
        self._place_bytes = place_bytes
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        try:
            self._memory = mmap.mmap(file, num_places * place_bytes, mmap.MAP_SHARED, protection)
        except BaseException:
            os.close(file)
            raise

    @classmethod
    def make(cls, num_places: int, place_bytes: int) -> Window:
        """New memory; raises OSError."""
        file = os.memfd_create("tokenpool-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(file, num_places * place_bytes)
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SIZE_SEALS)
        except BaseException:
            os.close(file)
            raise
        return cls(file, num_places, place_bytes, writable=True)

    @classmethod
    def open(cls, file: int, num_places: int, place_bytes: int) -> Window:
        """Another process' memory, to be read; raises OSError, ValueError for one that could be taken away."""
        try:
            if fcntl.fcntl(file, fcntl.F_GET_SEALS) & _SIZE_SEALS != _SIZE_SEALS:
                raise ValueError("the size of the memory that came is not sealed")
            if os.fstat(file).st_size < num_places * place_bytes:
                raise ValueError("the memory that came is too small")
        except BaseException:
            os.close(file)
            raise
        return cls(file, num_places, place_bytes, writable=False)

    def place(self, number: int) -> npt.NDArray[np.uint8]:
        """The bytes of the chunk of this number, flat uint8."""
        start = number % self.num_places * self._place_bytes
        return np.frombuffer(self._memory, np.uint8, self._place_bytes, start)

    def __enter__(self) -> Window:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.file)
        # The mapping goes with the last array over it: closing it under one would raise.
