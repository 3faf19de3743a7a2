# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint, read again, gives the very bytes that are in the host copy, and what must be kept if not.

Some storages are in no checkpoint, such as tables of rotary embeddings: the trial finds them, and their bytes stay
in host memory when the rest goes. Weights that are packed or quantised after loading differ too; where they are most
of a model, giving its host copy up would free little, and it is not droppable.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from tokenpool.memory.weight_layout import Span, WeightLayout

Advance = Callable[[int], None]
"""Called with bytes done; raises JobCancelled when the work is to stop, which must be let through."""

OnFinal = Callable[[torch.Tensor], None]
"""Called with a tensor whose bytes stay as they are now; by one thread at a time, whichever."""

Reload = Callable[[Advance, OnFinal], None]
"""Reads the checkpoint into the adopted tensors, whose `data` lies in host memory meanwhile.

Runs on the side thread, where it must leave process-wide state of torch and vLLM alone, calls its first argument once
per tensor read, and the second for what it likes to tell early. May raise any Exception.
"""

_MAX_KEPT_FRAC = 0.25
_SMALL_BYTES = 16 << 20
_CRC_THREADS = min(4, len(os.sched_getaffinity(0)))


@dataclass(frozen=True, slots=True)
class ReloadProof:
    """What a trial has shown."""

    droppable: bool
    problem: str = ""
    """Why not, for people."""
    checksum: int = 0
    """Of the storages of the host copy, gaps left out; see `checksum_of`."""
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


def checksum_of(layout: WeightLayout, buffer: torch.Tensor, advance: Advance) -> int:
    """CRC-32 of the CRC-32 of each storage in a host buffer."""
    return Checksum(layout, buffer).value(advance)


class Checksum:
    """That of a host buffer which is being filled: what is final early is looked at while the rest is read."""

    def __init__(self, layout: WeightLayout, buffer: torch.Tensor, not_early: Container[int] = ()) -> None:
        """`not_early` has offsets of storages that are written to at last, whatever is said of them."""
        self._layout = layout
        self._view = memoryview(buffer.numpy())
        self._crcs: dict[int, int] = {}  # by offset
        self._early = {
            id(member.tensor): span
            for span in layout.spans if span.offset not in not_early
            for member in span.members if member.tensor.nbytes == span.nbytes
        }  # fmt: skip

    def note_final(self, tensor: torch.Tensor) -> None:
        """See `OnFinal`."""
        if (span := self._early.get(id(tensor))) is not None and span.offset not in self._crcs:
            self._crcs[span.offset] = self._crc_of(span)

    def _crc_of(self, span: Span) -> int:
        return zlib.crc32(self._view[span.offset : span.offset + span.nbytes])  # other threads run meanwhile

    def value(self, advance: Advance) -> int:
        """All is final: look at the rest, about 4 GB/s a thread."""
        rest = [span for span in self._layout.spans if span.offset not in self._crcs]
        side = ThreadPoolExecutor(_CRC_THREADS) if sum(span.nbytes for span in rest) > _SMALL_BYTES else None
        try:
            for span, crc in zip(rest, (side.map if side is not None else map)(self._crc_of, rest), strict=True):
                advance(0)
                self._crcs[span.offset] = crc
        finally:
            if side is not None:
                side.shutdown(cancel_futures=True)
        return zlib.crc32(b"".join(self._crcs[span.offset].to_bytes(4) for span in self._layout.spans))
