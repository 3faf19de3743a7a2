# SPDX-License-Identifier: Apache-2.0
"""One model's fixed address range on the device: pages come and go under it, the tensors over it stay as they are."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from tokenpool.errors import SwitchError
from tokenpool.memory.devices.counted import CountedDevice
from tokenpool.memory.ledger import PageLedger, PageUse
from tokenpool.memory.page_counts import pages_for
from tokenpool.memory.weight_layout import WeightLayout


class WeightRange:
    """The range of one owner; `copy_in` may run on another thread, all else is the loop's.

    Reserved when it is made; `release` ends it, and no tensor over it may be used any more.
    """

    def __init__(
        self, owner: str, layout: WeightLayout, device: CountedDevice, ledger: PageLedger, *, poison: bool
    ) -> None:
        self.owner = owner
        self.layout = layout
        self.num_pages = pages_for(layout.nbytes, ledger.page_size)
        """Pages it needs, mapped or not."""
        self.pages: list[int] = []
        """The pages under it: all or none."""
        self._device = device
        self._ledger = ledger
        self._poison = poison
        self._nbytes = self.num_pages * ledger.page_size
        self.address = device.reserve(self._nbytes) if self._nbytes else 0
        self._back: Callable[[int, int], None] = lambda address, nbytes: None

    def release(self) -> None:
        """Give the range back, with the pages under it if there are any."""
        if self.pages:
            self.unmap()
        if self.num_pages:
            self._device.release(self.address, self._nbytes)

    def map(self) -> None:
        """Take free pages for the range, which `copy_in` puts there; CapacityError or SwitchError change nothing."""
        assert not self.pages, f"the range of {self.owner!r} is mapped already"
        pages = self._ledger.take(self.owner, PageUse.WEIGHTS, self.num_pages)
        try:
            self._back = self._device.map_later(self.address, self._nbytes)
        except Exception as error:
            self._ledger.give(self.owner, PageUse.WEIGHTS, pages)
            raise SwitchError(self.owner, "map", f"the device gives no memory: {error}") from error
        self.pages = pages

    def unmap(self) -> None:
        """Take the pages away, with `poison` filled with 0xFF before; later accesses fault."""
        if self._poison:
            self._back(self.address, self._nbytes)  # a copy may have been given up
            self._device.fill(self.address, self._nbytes, 0xFF)
        self._device.unmap(self.address, self._nbytes)
        self._ledger.give(self.owner, PageUse.WEIGHTS, self.pages)
        self.pages = []

    def copy_in(self, host: torch.Tensor, chunk_bytes: int, advance: Callable[[int], None]) -> None:
        """Fill the mapped range from the host copy, chunk by chunk; `advance` gets the bytes of each that is there.

        However it ends, no copy is under way afterwards: the pages may go at once.
        """
        in_flight: deque[tuple[Callable[[], None], int]] = deque()

        def finish_one() -> None:
            wait, nbytes = in_flight.popleft()
            wait()
            advance(nbytes)

        try:
            for start in range(0, self.layout.nbytes, chunk_bytes):
                chunk = host[start : min(start + chunk_bytes, self.layout.nbytes)]
                self._back(self.address + start, chunk.numel())  # under the copies before it
                in_flight.append((self._device.begin_copy_in(self.address + start, chunk), chunk.numel()))
                if len(in_flight) == self._device.copies_in_flight:
                    finish_one()
            while in_flight:
                finish_one()
        finally:
            for wait, _ in in_flight:
                wait()

    def point_tensors_here(self) -> None:
        """Let every tensor view its place in the range, mapped or not."""
        self.layout.point_at(lambda span: self._device.tensor(self.address + span.offset, span.nbytes))

    def check_bytes(self, host: torch.Tensor) -> None:
        """Raise SwitchError unless the mapped range holds the bytes of the host copy; reads all of them."""
        for span in self.layout.spans:
            here = self._device.tensor(self.address + span.offset, span.nbytes).view(torch.uint8)
            if not torch.equal(here.cpu(), self.layout.slice_of(span, host)):
                member = span.members[0]
                what = f"a tensor of shape {member.size} and {member.tensor.dtype}"
                raise SwitchError(self.owner, "verify", f"{what} has changed since it was adopted: it must not move")

    def check(self) -> None:
        """Raise AssertionError unless the ledger knows the pages and every tensor is where it was put."""
        held = self._ledger.held(self.owner, PageUse.WEIGHTS)
        assert held == len(self.pages), f"{self.owner!r} has {len(self.pages)} pages, {held} in the ledger"
        assert len(self.pages) in (0, self.num_pages), f"{self.owner!r} is mapped in part"
        for span in self.layout.spans:
            for member in span.members:
                expected = self.address + span.offset + member.storage_offset * member.tensor.element_size()
                place = member.tensor.data_ptr() if member.tensor.numel() else expected
                assert place == expected, f"{self.owner!r}: a tensor has left its place in the range"
