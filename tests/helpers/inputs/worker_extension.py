# SPDX-License-Identifier: Apache-2.0
"""A `--worker-extension-cls`, whose methods /collective_rpc calls."""

from __future__ import annotations

import os


class Extension:
    """Becomes a base of vLLM's worker class."""

    def told(self, *words: str) -> dict[str, list[str]]:
        """What it was called with."""
        return {"words": list(words)}

    def unsendable(self) -> object:
        """Something that no message carries."""
        return object()

    def end_the_host(self) -> None:
        """Never answers."""
        os._exit(3)
