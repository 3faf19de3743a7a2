# SPDX-License-Identifier: Apache-2.0
"""What is said of a host copy beside its bytes, so that a host which maps it has nothing left to find out."""

from __future__ import annotations

import hashlib

import msgspec
import torch

from tokenpool.memory.weight_layout import WeightLayout
from tokenpool.memory.weight_reload import ReloadProof


class CopyMeta(msgspec.Struct, frozen=True, omit_defaults=True):
    """Bytes of a copy mean the same in each model with this layout."""

    layout: str
    """Digest of where each tensor lies and how it views its bytes."""
    outputs: str = ""
    """Digest of what the modules of a model with these weights give in the self-test; empty = it was not run."""
    proof: ProofMeta | None = None
    """What reading the checkpoint again has shown; None = nobody has tried."""

    def fits(self, layout: WeightLayout) -> bool:
        """Whether tensors laid out in this way can be pointed into the copy."""
        return self.layout == layout_digest(layout)


class ProofMeta(msgspec.Struct, frozen=True, omit_defaults=True):
    """A ReloadProof without bytes."""

    droppable: bool
    problem: str = ""
    checksum: int = 0
    kept: tuple[tuple[int, int], ...] = ()
    """Offset and bytes of each storage that the checkpoint does not give."""

    @classmethod
    def of(cls, proof: ReloadProof) -> ProofMeta:
        """That of a proof."""
        kept = tuple((offset, part.numel()) for offset, part in proof.kept.items())
        return cls(proof.droppable, proof.problem, proof.checksum, kept)

    def proof(self, host: torch.Tensor) -> ReloadProof:
        """The proof, with the bytes that are kept taken out of a whole host copy; ValueError if it is not of one."""
        if any(not 0 <= offset <= offset + nbytes <= host.numel() for offset, nbytes in self.kept):
            raise ValueError("bytes are kept that are not in the host copy")
        kept = {offset: host[offset : offset + nbytes].clone() for offset, nbytes in self.kept}
        return ReloadProof(self.droppable, self.problem, self.checksum, kept)


def layout_digest(layout: WeightLayout) -> str:
    """Equal for equal sizes, offsets, strides and dtypes of all storages and of the tensors that view them."""
    digest = hashlib.sha256()
    for span in layout.spans:
        digest.update(f"{span.offset} {span.nbytes}\n".encode())
        for member in span.members:
            shown = (member.storage_offset, member.size, member.stride, str(member.tensor.dtype))
            digest.update(f"{shown}\n".encode())
    return digest.hexdigest()


pack_meta = msgspec.msgpack.Encoder().encode
_read = msgspec.msgpack.Decoder(CopyMeta).decode


def read_meta(content: bytes) -> CopyMeta | None:
    """What was said; None for what another version said."""
    try:
        return _read(content)
    except (msgspec.MsgspecError, ValueError):
        return None
