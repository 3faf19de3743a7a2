# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint, read again, gives the very bytes that are in the host copy, and what must be kept if not.

Some storages are in no checkpoint, such as tables of rotary embeddings: the trial finds them, and their bytes stay
in host memory when the rest goes. Weights that are packed or quantised after loading differ too; where they are most
of a model, giving its host copy up would free little, and it is not droppable.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tokenpool.memory.weight_layout import Span, WeightLayout

Advance = Callable[[int], None]
"""Called with bytes done; raises JobCancelled when the work is to stop, which must be let through."""

Reload = Callable[[Advance], None]
"""Reads the checkpoint into the adopted tensors, whose `data` lies in host memory meanwhile.

Runs on the side thread, where it must leave process-wide state of torch and vLLM alone, calls its argument once per
tensor read, and may raise any Exception.
"""

_MAX_KEPT_FRAC = 0.25
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class ReloadProof:
    """What a trial has shown."""

    droppable: bool
    problem: str = ""
    """Why not, for people."""
    checksum: int = 0
    """CRC-32 of all storages of the host copy, gaps left out."""
    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    """Offset -> bytes of each storage that the checkpoint does not give."""

    @property
    def kept_bytes(self) -> int:
        """Bytes that stay in host memory while the weights are on disk."""
        return sum(kept.numel() for kept in self.kept.values())


def try_reload(
    layout: WeightLayout,
    host: torch.Tensor,
    scratch_of: Callable[[Span], torch.Tensor],
    read: Callable[[], None],
    advance: Advance,
) -> ReloadProof:
    """Compare the host copy with what `read` puts into the scratch bytes of each span.

    They start as the complement of the host copy, so that no byte is right by chance. An error of `read` does not
    leave this function: it only means that this host copy must stay.
    """
    for span in layout.spans:
        advance(0)
        scratch_of(span).copy_(layout.slice_of(span, host)).bitwise_not_()
    try:
        read()
    except Exception as error:
        return ReloadProof(False, f"the checkpoint cannot be read again: {type(error).__name__}: {error}")
    kept = {}
    for span in layout.spans:
        advance(0)
        here = layout.slice_of(span, host)
        if not torch.equal(here, scratch_of(span).cpu()):
            kept[span.offset] = here
    kept_bytes = sum(part.numel() for part in kept.values())
    if kept_bytes > layout.nbytes * _MAX_KEPT_FRAC:
        problem = f"{kept_bytes} of {layout.nbytes} bytes are not those of the checkpoint: they are made after loading"
        return ReloadProof(False, problem)
    checksum = checksum_of(layout, host, advance)
    return ReloadProof(True, checksum=checksum, kept={offset: part.clone() for offset, part in kept.items()})


def complete(layout: WeightLayout, buffer: torch.Tensor, proof: ReloadProof, advance: Advance) -> bool:
    """Add the kept storages to a buffer just read; returns whether it is the old host copy then."""
    for offset, part in proof.kept.items():
        buffer[offset : offset + part.numel()].copy_(part)
    return checksum_of(layout, buffer, advance) == proof.checksum


def checksum_of(layout: WeightLayout, buffer: torch.Tensor, advance: Advance) -> int:
    """CRC-32 of the storages in a host buffer, about 4 GB/s; other threads run meanwhile."""
    crc = 0
    view = memoryview(buffer.numpy())
    for span in layout.spans:
        for start in range(span.offset, span.offset + span.nbytes, _CHUNK_BYTES):
            advance(0)
            crc = zlib.crc32(view[start : min(start + _CHUNK_BYTES, span.offset + span.nbytes)], crc)
    return crc
