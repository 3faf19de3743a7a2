# SPDX-License-Identifier: Apache-2.0
"""A CUDA GPU as a `Device`; which page lies where is told in cuda_pages.py.

What keeps the order right:

* The engine computes on torch's current stream of the thread that calls (the host loop's). `unmap` waits on the host
  until all that is on this stream is done; copies of blocks and `fill` wait for it on the device.
* Zeroing, copies of blocks and `fill` run on a stream of their own. The host goes on, and the engine's stream and that
  of weights wait for zeroing. Zeroing a page that was drained when it was taken away waits for nothing; that of a
  parked one comes after what the engine computes and after copies that were begun. Whoever begins copies of blocks is
  told when they are done, or lets the engine's stream wait.
* A page is taken away from where it is parked after both streams have drained.
* `begin_copy_in`, for weights on their way into a range that nobody uses yet, waits for zeroing only and has its own
  stream, which one side thread feeds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise

import torch

from tokenpool.errors import ConfigError
from tokenpool.memory.devices.cuda_driver import CudaDriver, CudaError
from tokenpool.memory.devices.cuda_pages import CudaPages
from tokenpool.memory.devices.device import BlockCopy, Copies
from tokenpool.memory.devices.dlpack import CUDA, tensor_at
from tokenpool.memory.devices.pinned import cpus_near, pinned_buffer

BatchCopy = Callable[[Sequence[tuple[int, int, int]], int], None]
"""Issues copies (target address, source address, bytes) on a stream; one side of each is pinned host memory."""


class _CudaCopies:
    """Copies between two events of one stream; see `Copies`."""

    def __init__(self, device: CudaDevice, buffers: list[torch.Tensor], start: int, end: int) -> None:
        self._device = device
        self._buffers = buffers  # pinned until the copies are done
        self._events = (start, end)
        self._seconds: float | None = None

    def done(self) -> bool:
        """See `Copies`."""
        if self._seconds is None and self._device.driver.has_happened(self._events[1]):
            self._end()
        return self._seconds is not None

    def wait(self) -> None:
        """See `Copies`."""
        if self._seconds is None:
            self._device.driver.synchronize_event(self._events[1])
            self._end()

    def precede_compute(self) -> None:
        """See `Copies`."""
        if self._seconds is None:
            self._device.driver.wait_event(self._device.compute_stream(), self._events[1])

    @property
    def seconds(self) -> float:
        """See `Copies`; on the device's clock."""
        assert self._seconds is not None, "not known before they are done"
        return self._seconds

    def _end(self) -> None:
        self._seconds = self._device.driver.elapsed_s(*self._events)
        self._buffers.clear()
        self._device.timed_events += self._events  # a wait on the device that was issued keeps what it waits for


class CudaDevice:
    """One GPU of this process; see `Device` for the contract. `granularity` is the ledger's page size.

    `ways` says how blocks are copied: (least bytes of a copy, function for many at once) in rising order from 0 on,
    None = one call of the driver for each. Raises ConfigError when a page is no multiple of what the GPU maps, usually
    2 MiB, or without a GPU.
    """

    copies_in_flight = 4
    """One runs while the next ones are being issued: the link never waits for the host, which may be busy."""
    chunk_bytes = 32 << 20
    copies_beside = True
    burst_bytes = 512 << 20

    _dlpack_type = CUDA

    def __init__(
        self,
        page_bytes: int,
        *,
        driver: CudaDriver | None = None,
        compute_stream: Callable[[], int] | None = None,
        ways: Sequence[tuple[int, BatchCopy | None]] = ((0, None),),
    ) -> None:
        self.driver = driver or CudaDriver()
        self.granularity = page_bytes
        if page_bytes % (step := self.driver.granularity()):
            raise ConfigError(f"{page_bytes} is no multiple of {step} bytes, which the GPU maps", key="page_size")
        self.ways = ways
        self.compute_stream = compute_stream or self._torch_stream
        """The stream on which the engine computes, asked on its thread."""
        self._stream = self.driver.stream()
        self._weight_stream = self.driver.stream()
        self._event = self.driver.event()  # of the loop's thread
        self._zeroed = self.driver.event()
        self._spare_events: list[int] = []  # of copies that are done
        self.timed_events: list[int] = []
        """Events that nobody uses."""
        self._pages = CudaPages(self.driver, page_bytes, self._drain)
        self.near_cpus = cpus_near(self.driver.pci_bus_id())

    # -- addresses and pages -------------------------------------------------------------------------

    def reserve(self, nbytes: int, *, harmless: bool = False) -> int:
        """Reserve a range of addresses; raises CudaError when the driver refuses."""
        address = self.driver.reserve(nbytes)
        if harmless:
            self._pages.make_harmless(address, nbytes)
            self._zero(address, self.granularity)  # the same page everywhere
        return address

    def release(self, address: int, nbytes: int) -> None:
        """Give the range back; pages still mapped there are free afterwards."""
        if self._pages.is_used(address, nbytes):
            self._drain()
            self._pages.clear(address, nbytes)
        self.driver.free(address, nbytes)

    def map_zeroed(self, address: int, nbytes: int) -> None:
        """Put free pages under the range and zero them; raises CudaError and maps nothing if memory is short."""
        was_parked = self._pages.put(address, nbytes)
        try:
            if was_parked:
                self._follow_compute()
            self._zero(address, nbytes)
        except BaseException:
            with suppress(CudaError):  # the first error says what is wrong
                self._drain()
            self._pages.take_away(address, nbytes)
            raise

    def map_unset(self, address: int, nbytes: int) -> None:
        """Put free pages under the range as they are; raises CudaError and maps nothing if memory is short."""
        self._pages.put(address, nbytes)

    def map_later(self, address: int, nbytes: int) -> Callable[[int, int], None]:
        """Take free pages for the range; the function returned maps some, as copies get to them."""
        return self._pages.promise(address, nbytes)

    def unmap(self, address: int, nbytes: int) -> None:
        """Take the pages away once the engine's stream has drained; their bytes stay until they are mapped again."""
        self._wait_for_compute()
        self._pages.take_away(address, nbytes)

    def park(self, address: int, nbytes: int) -> None:
        """Leave the pages where they are, for whoever maps here again; they go when pages are short elsewhere."""
        self._pages.park(address, nbytes)

    @property
    def page_bytes(self) -> int:
        """Memory of all pages, whether they are mapped or not."""
        return self._pages.num_made * self.granularity

    def make_pages(self, count: int) -> None:
        """Make pages until there are `count`; raises CudaError, those that were made stay, when memory is short."""
        self._pages.make(count)

    def release_unused(self) -> int:
        """Give the memory of pages that are parked, or mapped nowhere, back to the GPU; returns its bytes.

        For others in this process, such as a loader; it is made anew when it is needed.
        """
        return self._pages.release_unused()

    def _zero(self, address: int, nbytes: int) -> None:
        self.driver.fill(address, nbytes, 0, self._stream)
        self.driver.record(self._zeroed, self._stream)
        self.driver.wait_event(self.compute_stream(), self._zeroed)
        self.driver.wait_event(self._weight_stream, self._zeroed)

    def tensor(self, address: int, nbytes: int) -> torch.Tensor:
        """An int8 tensor of shape (nbytes,) over the range, mapped or not; it does not keep the range reserved."""
        return tensor_at(address, nbytes, self._dlpack_type, self.driver.ordinal)

    def fill(self, address: int, nbytes: int, byte: int) -> None:
        """Set every byte of a mapped range, after what the engine has computed so far."""
        self._follow_compute()
        self.driver.fill(address, nbytes, byte, self._stream)
        self.driver.synchronize(self._stream)

    # -- host memory and copies ----------------------------------------------------------------------

    def host_buffer(self, nbytes: int) -> torch.Tensor:
        """Page-locked memory of exactly that size on the GPU's NUMA node, freed with its last tensor."""
        return pinned_buffer(self.driver, nbytes, self.near_cpus)

    def register_host(self, address: int, nbytes: int) -> Callable[[], None]:
        """Page-lock a sealed mapping; the function that is returned ends that. Not yet run on hardware."""
        self.driver.register(address, nbytes, read_only=True)
        return lambda: self.driver.unregister(address)

    def begin_copy_in(self, address: int, source: torch.Tensor) -> Callable[[], None]:
        """Issue a copy on the stream for weights; the function that is returned waits for it, once."""
        try:
            event = self._spare_events.pop()  # of any thread: no look before it
        except IndexError:
            event = self.driver.event()
        self.driver.copy_in(address, source.data_ptr(), source.numel(), self._weight_stream)
        self.driver.record(event, self._weight_stream)

        def wait(source: torch.Tensor = source) -> None:  # the default keeps the memory until the copy is done
            self.driver.synchronize_event(event)
            self._spare_events.append(event)

        return wait

    def copy_in(self, address: int, source: torch.Tensor) -> None:
        """Copy a pinned buffer to the device, after what the engine has computed so far."""
        self.begin_copies_in([(address, source)]).wait()

    def copy_out(self, target: torch.Tensor, address: int) -> None:
        """Copy a range into a pinned buffer, after what the engine has computed so far."""
        self.begin_copies_out([(address, target)]).wait()

    def begin_copies_in(self, copies: Sequence[BlockCopy]) -> Copies:
        """Copy pinned buffers to their addresses, after what the engine has computed so far."""
        places = [(address, host.data_ptr(), host.numel()) for address, host in copies]
        return self._begin(places, self.driver.copy_in, copies)

    def begin_copies_out(self, copies: Sequence[BlockCopy]) -> Copies:
        """Copy ranges into pinned buffers, after what the engine has computed so far."""
        places = [(host.data_ptr(), address, host.numel()) for address, host in copies]
        return self._begin(places, self.driver.copy_out, copies)

    def _begin(
        self, places: list[tuple[int, int, int]], one: Callable[[int, int, int, int], None], copies: Sequence[BlockCopy]
    ) -> Copies:
        self._follow_compute()
        start, end = (self._timed_event() for _ in range(2))
        self.driver.record(start, self._stream)
        try:
            for copy_all, group in self._by_way(places):
                if copy_all is not None:
                    copy_all(group, self._stream)
                    continue
                for place in group:
                    one(*place, self._stream)
            self.driver.record(end, self._stream)
        except BaseException:
            self.driver.synchronize(self._stream)
            self.timed_events += (start, end)
            raise
        return _CudaCopies(self, [host for _, host in copies], start, end)

    def _by_way(
        self, places: list[tuple[int, int, int]]
    ) -> Iterator[tuple[BatchCopy | None, list[tuple[int, int, int]]]]:
        """The copies in groups that go the same way."""
        for (least, way), (end, _) in pairwise((*self.ways, (sys.maxsize, None))):
            group = [place for place in places if least <= place[2] < end]
            if group:
                yield way, group

    def _timed_event(self) -> int:
        return self.timed_events.pop() if self.timed_events else self.driver.event(timed=True)

    # -- order ---------------------------------------------------------------------------------------

    def _torch_stream(self) -> int:
        return int(torch.cuda.current_stream(self.driver.ordinal).cuda_stream)

    def _wait_for_compute(self) -> None:
        self.driver.record(self._event, self.compute_stream())
        self.driver.synchronize_event(self._event)

    def _drain(self) -> None:
        """Wait on the host for all that the engine computes and for all copies of blocks."""
        self._follow_compute()
        self.driver.synchronize(self._stream)

    def _follow_compute(self) -> None:
        self.driver.record(self._event, self.compute_stream())
        self.driver.wait_event(self._stream, self._event)
