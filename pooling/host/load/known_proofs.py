# SPDX-License-Identifier: Apache-2.0
"""What was shown of checkpoints once, kept on disk by content: a checkpoint is not read twice for it again.

It lies in vLLM's cache folder (VLLM_CACHE_ROOT), and is believed once the bytes have the checksum that was kept.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from pathlib import Path

import vllm.envs as envs

from tokenpool.memory.copies.copy_meta import CopyMeta, read_meta

logger = logging.getLogger(__name__)

_MOST_PROOFS = 1000


class KnownProofs:
    """All of one user; what cannot be read or written is not known."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or Path(envs.VLLM_CACHE_ROOT, "tokenpool", "proofs")

    def of(self, key: str) -> CopyMeta | None:
        """What is known of a content."""
        try:
            return read_meta((self._folder / key).read_bytes())
        except OSError:
            return None

    def keep(self, key: str, meta: bytes) -> None:
        """Know this of it from now on."""
        path = self._folder / key
        try:
            if path.exists() and path.read_bytes() == meta:
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".", delete=False) as file:
                file.write(meta)
            os.replace(file.name, path)
            self._forget_oldest()
        except OSError as error:
            logger.info("what was shown of a checkpoint is not kept: %s", error)

    def _forget_oldest(self) -> None:
        paths = [path for path in self._folder.iterdir() if not path.name.startswith(".")]
        if len(paths) > _MOST_PROOFS:
            with contextlib.suppress(OSError):  # another host forgets it
                min(paths, key=lambda path: path.stat().st_mtime_ns).unlink()
