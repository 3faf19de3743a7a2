# SPDX-License-Identifier: Apache-2.0
"""Where each storage of a model's tensors lies in the model's address range, and how to point the tensors there.

    offset 0      256-byte steps
     | storage of q, k, v (three views) | gap | storage of a norm | gap | ...

Storages are moved whole, so tensors that share one, with whatever offsets and strides, share it afterwards too. The
bytes of the gaps mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

ALIGN_BYTES = 256
"""Every storage starts at a multiple of this: the widest alignment that a kernel of CUDA or of the CPU asks for."""


@dataclass(frozen=True, slots=True)
class Member:
    """One tensor and how it views its storage; offset and stride count elements."""

    tensor: torch.Tensor
    storage_offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """The place of one storage in the range, and the tensors that view it."""

    offset: int
    nbytes: int
    members: list[Member] = field(default_factory=list)


class WeightLayout:
    """Places the storages behind `tensors` one after another, in their order; tensors without bytes stay out of it.

    A tensor given twice counts once. Raises ValueError for a tensor that has no plain storage, and for two storages
    that overlap without being one.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.spans: list[Span] = []
        self.nbytes = 0
        """Bytes from the first storage to the end of the last, gaps included."""
        storages = _storages_of(tensors)
        _refuse_overlap(storages)
        for nbytes, members in storages.values():
            offset = -(-self.nbytes // ALIGN_BYTES) * ALIGN_BYTES
            self.spans.append(Span(offset, nbytes, members))
            self.nbytes = offset + nbytes

    def members(self) -> Iterator[Member]:
        """All tensors in the range."""
        for span in self.spans:
            yield from span.members

    def bytes_of(self, span: Span) -> torch.Tensor:
        """The span's storage where its tensors view it now: flat uint8, no copy."""
        tensor = span.members[0].tensor
        view = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        return view.set_(tensor.untyped_storage(), 0, (span.nbytes,), (1,))

    def slice_of(self, span: Span, buffer: torch.Tensor) -> torch.Tensor:
        """The span's place in a flat uint8 buffer of the whole range."""
        return buffer[span.offset : span.offset + span.nbytes]

    def copy_to(self, buffer: torch.Tensor, advance: Callable[[int], None]) -> None:
        """Copy every storage from where its tensors are to its place in `buffer`; `advance` gets the bytes of each."""
        for span in self.spans:
            self.slice_of(span, buffer).copy_(self.bytes_of(span))
            advance(span.nbytes)

    def fill_from(self, buffer: torch.Tensor, advance: Callable[[int], None]) -> None:
        """Copy every storage from its place in `buffer` to where its tensors are; `advance` gets the bytes of each."""
        for span in self.spans:
            self.bytes_of(span).copy_(self.slice_of(span, buffer))
            advance(span.nbytes)

    def point_into(self, buffer: torch.Tensor) -> None:
        """Let every tensor view its place in `buffer`, one flat tensor of `nbytes` bytes or more."""
        storage = buffer.untyped_storage()
        base = buffer.storage_offset() * buffer.element_size()
        for span in self.spans:
            for member in span.members:
                _point(member, storage, base + span.offset)

    def point_at(self, storage_of: Callable[[Span], torch.Tensor]) -> None:
        """Let the tensors of each span view the flat tensor that `storage_of` gives for it, from its byte 0 on."""
        for span in self.spans:
            storage = storage_of(span).untyped_storage()
            for member in span.members:
                _point(member, storage, 0)

    def save(self) -> list[torch.Tensor]:
        """What the tensors view now, for `restore`; keeps that memory alive."""
        return [member.tensor.data for member in self.members()]

    def restore(self, saved: list[torch.Tensor]) -> None:
        """Let the tensors view again what they did at `save`."""
        for member, data in zip(self.members(), saved, strict=True):
            member.tensor.data = data


def _storages_of(tensors: Iterable[torch.Tensor]) -> dict[int, tuple[int, list[Member]]]:
    """Address of a storage -> its bytes and the tensors that view it, both in the order given."""
    storages: dict[int, tuple[int, list[Member]]] = {}
    seen: set[int] = set()
    for tensor in tensors:
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise ValueError(f"a tensor of layout {tensor.layout} on {tensor.device} has no bytes that can be moved")
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            continue
        nbytes, members = storages.get(storage.data_ptr(), (0, []))
        members.append(Member(tensor, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()))
        storages[storage.data_ptr()] = (max(nbytes, storage.nbytes()), members)
    return storages


def _refuse_overlap(storages: dict[int, tuple[int, list[Member]]]) -> None:
    end = 0
    for address in sorted(storages):
        if address < end:
            raise ValueError("two storages of the weights overlap without being one: they cannot be moved")
        end = address + storages[address][0]


def _point(member: Member, storage: torch.UntypedStorage, base_bytes: int) -> None:
    tensor = member.tensor
    offset = base_bytes // tensor.element_size() + member.storage_offset
    view = torch.empty(0, dtype=tensor.dtype, device=storage.device)
    tensor.data = view.set_(storage, offset, member.size, member.stride)
