# SPDX-License-Identifier: Apache-2.0
"""Where an engine and its frontends meet."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class EngineAddresses:
    """ZMQ endpoints of the frontends: engine input and output, one of each per frontend."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    server_key: bytes = b""
    """CURVE public key of the frontend's sockets, in Z85; empty = they are plain."""
    secret_key: bytes = field(default=b"", repr=False)
    """The other half, in the frontend only; engines get none."""
    silence_s: float = 0.0
    """Without a sign of life for so long, the frontend takes the connection for broken; 0 = it waits for ever."""
