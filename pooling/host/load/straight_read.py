# SPDX-License-Identifier: Apache-2.0
"""Which bytes of a checkpoint's files become which bytes of a model, so that they are read to their place at once.

The first time vLLM loads the weights, and each copy from a file that is mapped into memory to a tensor of the model is
noted. Where all that is written to the model is such copies, later reads need neither vLLM nor the mapping, whose pages
the kernel would fetch one by one: the files are read in their order, straight to where the tensors lie then. What
changes its type or its order on the way is read to other memory and copied as it was before.
"""

from __future__ import annotations

import bisect
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tokenpool.memory.weight_reload import Advance

_CHUNK_BYTES = 8 << 20
_MOST_PIECES = 512  # of one call; the kernel takes 1024
_SAMPLE_BYTES = 4096
_MOST_OTHER_FRAC = 0.125


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes of a file that become bytes of a tensor; offsets count from the start of the file and of the tensor."""

    path: str
    offset: int
    tensor: torch.Tensor
    start: int
    nbytes: int

    def part(self, first: int, nbytes: int) -> _Piece:
        """Some of it."""
        return _Piece(self.path, self.offset + first, self.tensor, self.start + first, nbytes)

    def place(self) -> tuple[int, int]:
        """Addresses of the bytes of the tensor now."""
        begin = self.tensor.data_ptr() + self.start
        return begin, begin + self.nbytes

    def view(self) -> torch.Tensor:
        """The bytes of the tensor, where it lies now: flat uint8."""
        tensor = self.tensor
        begin = tensor.storage_offset() * tensor.element_size() + self.start
        empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        return empty.set_(tensor.untyped_storage(), begin, (self.nbytes,), (1,))


@dataclass(frozen=True, slots=True)
class _View:
    """How a tensor views bytes; offset and stride count elements."""

    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor, offset: int) -> _View:
        """How `tensor` does, `offset` elements after where the bytes begin."""
        return cls(tensor.dtype, offset, tuple(tensor.shape), tensor.stride())


@dataclass(frozen=True, slots=True)
class _OtherCopy:
    """One that changes the type or the order of what it copies."""

    piece: _Piece
    """What it reads, and the tensor that it writes to."""
    source: _View
    target: _View

    def read(self) -> torch.Tensor:
        """What it copies, from the file."""
        raw = torch.empty(self.piece.nbytes, dtype=torch.uint8)
        with open(self.piece.path, "rb", buffering=0) as file:
            _read(file.fileno(), [_Piece(self.piece.path, self.piece.offset, raw, 0, raw.numel())])
        return raw.view(self.source.dtype).as_strided(self.source.size, self.source.stride)

    def place(self) -> torch.Tensor:
        """Where it copies to now."""
        tensor, view = self.piece.tensor.detach(), self.target
        return tensor.as_strided(view.size, view.stride, tensor.storage_offset() + view.offset)

    def agrees(self) -> bool:
        """Whether it has been done; bytes are compared, for a NaN equals nothing."""
        place, read = self.place(), self.read()
        both = [each.to("cpu", place.dtype).contiguous().reshape(-1).view(torch.uint8) for each in (place, read)]
        return torch.equal(*both)


class StraightRead:
    """A way to read a model's weights again; `CopiesOfFiles.plan` makes it."""

    def __init__(self, pieces: Sequence[_Piece], others: Sequence[_OtherCopy]) -> None:
        in_order = sorted(pieces, key=lambda piece: (piece.path, piece.offset))
        self._calls = {path: list(_calls(list(of_file))) for path, of_file in groupby(in_order, lambda p: p.path)}
        self._others = others
        self._tensors = {id(p.tensor): p.tensor for p in (*pieces, *(other.piece for other in others))}
        self._num_pieces = Counter(id(p.tensor) for calls in self._calls.values() for call in calls for p in call)
        self._num_pieces.update(id(other.piece.tensor) for other in others)  # these are never whole early

    def is_on_host(self) -> bool:
        """Whether all tensors lie in host memory now, where files can be read to."""
        return all(tensor.device.type == "cpu" for tensor in self._tensors.values())

    def read(self, advance: Advance, on_whole: Callable[[torch.Tensor], object]) -> None:
        """Read all of it; `on_whole` gets each tensor to which all is read straight as soon as all of that is there.

        Raises OSError, also for a file that has become shorter.
        """
        left = self._num_pieces.copy()
        for path, calls in self._calls.items():
            with open(path, "rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                for call in calls:
                    _read(file.fileno(), call)
                    advance(_bytes_of(call))
                    for piece in call:
                        left[id(piece.tensor)] -= 1
                        if not left[id(piece.tensor)]:
                            on_whole(piece.tensor)
        for other in self._others:
            other.place().copy_(other.read())
            advance(other.piece.nbytes)

    def agrees(self) -> bool:
        """Whether the tensors have what it would read: of what is read straight, both ends of each piece."""
        for path, calls in self._calls.items():
            with open(path, "rb", buffering=0) as file:
                for piece in (piece for call in calls for piece in call):
                    nbytes = min(_SAMPLE_BYTES, piece.nbytes)
                    for sample in (piece.part(0, nbytes), piece.part(piece.nbytes - nbytes, nbytes)):
                        if os.pread(file.fileno(), nbytes, sample.offset) != sample.view().cpu().numpy().tobytes():
                            return False
        return all(other.agrees() for other in self._others)


def _calls(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces of one file, in its order, as what single calls read: no gaps, and about as many bytes each."""
    call: list[_Piece] = []
    room = _CHUNK_BYTES
    for piece in pieces:
        first = 0
        while first < piece.nbytes:
            if call and (not room or len(call) == _MOST_PIECES or _end(call[-1]) != piece.offset + first):
                yield call
                call, room = [], _CHUNK_BYTES
            nbytes = min(room, piece.nbytes - first)
            call.append(piece.part(first, nbytes))
            first, room = first + nbytes, room - nbytes
    if call:
        yield call


def _end(piece: _Piece) -> int:
    return piece.offset + piece.nbytes


def _read(file: int, call: Sequence[_Piece]) -> None:
    views = [memoryview(piece.view().numpy()) for piece in call]
    offset = call[0].offset
    while views:
        if not (count := os.preadv(file, views, offset)):
            raise OSError(f"{call[0].path} ends at byte {offset}: it is shorter than it was")
        offset += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]


class CopiesOfFiles(TorchDispatchMode):
    """While it is entered, on this thread, notes what torch writes to the given tensors."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._tensors = list(_outermost(tensors))
        self._starts = [tensor.data_ptr() for tensor in self._tensors]
        self._files = _MappedFiles()
        self._pieces: list[_Piece] = []
        self._others: list[_OtherCopy] = []
        self._is_known = True

    def plan(self) -> StraightRead | None:
        """How to write the same again; None where other things than bytes of files were written, or much is changed."""
        of_others = [other.piece for other in self._others]
        written = [*self._pieces, *of_others]
        if not self._is_known or _bytes_of(of_others) > _MOST_OTHER_FRAC * _bytes_of(written):
            return None
        places = sorted([piece.place() for piece in self._pieces] + [_place(other.place()) for other in self._others])
        if not places or any(end > start for (_, end), (start, _) in pairwise(places)):
            return None  # written twice: the order would matter
        plan = StraightRead(self._pieces, self._others)
        try:
            return plan if plan.agrees() else None
        except OSError:  # a mapping of something else than a usual file
            return None

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._is_known:
            for written in _written(func, args, kwargs):
                if (tensor := self._holder_of(written)) is not None:
                    is_copy = func is torch.ops.aten.copy_.default
                    self._is_known = is_copy and self._note(tensor, written, args[1])
            if func is torch.ops.aten.clone.default:  # vLLM's pooling models look at the first tensors beforehand
                self._files.note_clone(result, args[0])
        return result

    def _holder_of(self, written: torch.Tensor) -> torch.Tensor | None:
        """The tensor that has these bytes."""
        if written.is_meta or not written.numel():
            return None
        index = bisect.bisect_right(self._starts, written.data_ptr()) - 1
        if index < 0:
            return None
        tensor = self._tensors[index]
        return tensor if written.data_ptr() < _place(tensor)[1] else None

    def _note(self, tensor: torch.Tensor, target: torch.Tensor, source: torch.Tensor) -> bool:
        begin, end = _place(source)
        if target.dtype != tensor.dtype or target.shape != source.shape or source.device.type != "cpu":
            return False
        if (found := self._files.find(begin, end, source)) is None:
            return False
        start = target.data_ptr() - tensor.data_ptr()
        piece = _Piece(*found, tensor, start, end - begin)
        if target.dtype == source.dtype and target.is_contiguous() and source.is_contiguous():
            self._pieces.append(piece)
        else:
            offset = start // tensor.element_size()
            self._others.append(_OtherCopy(piece, _View.of(source, 0), _View.of(target, offset)))
        return True


def _bytes_of(pieces: Iterable[_Piece]) -> int:
    return sum(piece.nbytes for piece in pieces)


def _outermost(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """By address, without those that lie within another one."""
    last = 0
    for (_, end), tensor in sorted(((_place(t), t) for t in tensors if t.numel()), key=lambda p: (p[0][0], -p[0][1])):
        if end > last:
            yield tensor
            last = end


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """Address of its first element, and where its last one ends."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """Tensors among the arguments that an operator says it writes to."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from [value] if isinstance(value, torch.Tensor) else value or ()


@dataclass(frozen=True, slots=True)
class _Mapping:
    """Addresses at which bytes of a file are, from an offset on, as long as a tensor is there."""

    start: int
    stop: int
    path: str
    offset: int
    holder: torch.Tensor

    def find(self, begin: int, end: int) -> tuple[str, int] | None:
        if self.start <= begin and end <= self.stop:
            return self.path, self.offset + begin - self.start
        return None


class _MappedFiles:
    """Files that are mapped into this process, and copies of parts of them, all of which it keeps there meanwhile."""

    def __init__(self) -> None:
        self._known: list[_Mapping] = []

    def find(self, begin: int, end: int, tensor: torch.Tensor) -> tuple[str, int] | None:
        """The file whose bytes lie from one address to another, where a tensor views them, and their offset in it."""
        for mapping in reversed(self._known):
            if (found := mapping.find(begin, end)) is not None:
                return found
        if (made := _mapping_at(begin, tensor)) is None or (found := made.find(begin, end)) is None:
            return None
        self._known.append(made)
        return found

    def note_clone(self, clone: torch.Tensor, tensor: torch.Tensor) -> None:
        """Know the file of a copy, too; that it was written to since, a look at its bytes tells."""
        if not (tensor.device.type == clone.device.type == "cpu" and tensor.numel() and tensor.is_contiguous()):
            return
        if (found := self.find(*_place(tensor), tensor)) is not None:
            self._known.append(_Mapping(*_place(clone), *found, clone))


def _mapping_at(address: int, holder: torch.Tensor) -> _Mapping | None:
    with open("/proc/self/maps") as maps:
        for line in maps:
            fields = line.split(maxsplit=5)
            start, stop = (int(each, 16) for each in fields[0].split("-"))
            if start <= address < stop:
                path = fields[5].rstrip("\n") if len(fields) == 6 else ""
                if not path.startswith("/") or path.endswith(" (deleted)"):
                    return None
                return _Mapping(start, stop, path, int(fields[2], 16), holder)
    return None
