# SPDX-License-Identifier: Apache-2.0
"""Takes the series of models that are gone out of the scrape, and lets processes outlast a disk that is full.

In its multiprocess mode prometheus_client keeps the values of a process in files, which every process of the pool reads
for a scrape, and has no way to remove a value. A file is written anew without the values and put in the old one's
place, so a scrape reads the one or the other, never half of both.

It maps these files with holes in them, and whoever writes to a hole when the disk is full is killed by SIGBUS. So room
is reserved first. Where there is none, values live in the process's own memory, and the scrape has those of before.
"""

from __future__ import annotations

import contextlib
import glob
import inspect
import json
import logging
import mmap
import os
import struct
from collections.abc import Callable, Collection, Mapping
from typing import Any

from prometheus_client import REGISTRY, values
from prometheus_client.mmap_dict import MmapedDict

from tokenpool.settings import METRICS_FOLDER

logger = logging.getLogger(__name__)

_MODEL = "model_name"
_LISTS = ("running_lora_adapters", "waiting_lora_adapters")
"""Labels of vLLM that hold names of adapters with commas between them."""
_FIRST = 8
"""Where the first value of a file begins; the number of bytes in use comes before."""
_VALUE_BYTES = 16
_LEAST_BYTES = 1 << 16
_MOST_BESIDE_BYTES = 32
"""Of a value in a file: its length, padding and two numbers."""


class RoomyDict(MmapedDict):
    """A file of values that has all of its room on the disk, or goes on in memory."""

    def __init__(self, filename: str, read_mode: bool = False) -> None:
        if read_mode or _has_room(filename):
            super().__init__(filename, read_mode)  # type: ignore[no-untyped-call]
            return
        memory = os.memfd_create("tokenpool-metrics", os.MFD_CLOEXEC)
        try:
            super().__init__(f"/proc/self/fd/{memory}")  # type: ignore[no-untyped-call]
        finally:
            os.close(memory)
        self._fname = filename

    def _init_value(self, key: str) -> None:
        while self._used + len(key.encode()) + _MOST_BESIDE_BYTES > self._capacity:
            self._enlarge(2 * self._capacity)
        super()._init_value(key)  # type: ignore[no-untyped-call]

    def _enlarge(self, capacity: int) -> None:
        try:
            os.posix_fallocate(self._f.fileno(), 0, capacity)
            data = mmap.mmap(self._f.fileno(), capacity)
        except OSError as error:
            _tell_of(self._fname, error)
            data = mmap.mmap(-1, capacity)
        data[: self._capacity] = self._m[: self._capacity]  # the other way round it may be in memory only
        self._m, self._capacity = data, capacity


def _has_room(path: str) -> bool:
    """Whether a file has all of its room on the disk; made if it is not there and has."""
    is_new = not os.path.exists(path)
    try:
        with open(path, "a+b") as file:
            os.posix_fallocate(file.fileno(), 0, max(os.fstat(file.fileno()).st_size, _LEAST_BYTES))
        return True
    except OSError as error:
        _tell_of(path, error)
        if is_new:  # an empty one would break every scrape
            with contextlib.suppress(OSError):
                os.unlink(path)
        return False


def _tell_of(path: str, error: OSError) -> None:
    logger.warning("no room for metrics, /metrics has those of before file=%s: %s", path, error)


def outlast_full_disks() -> None:
    """Let no process be killed for metrics that its disk has no room for; once, before most metrics are made."""
    values.MmapedDict = RoomyDict  # type: ignore[attr-defined]
    if getattr(values.ValueClass, "_multiprocess", False):
        with _kept()["lock"]:
            for file in _open_files().values():
                file.__class__ = RoomyDict
                file._enlarge(file._capacity)  # type: ignore[attr-defined]


def forget_models(names: Collection[str]) -> None:
    """Remove every series of the models, or adapters, with these names that this process or one that ended has made.

    Their engines and clients must be gone: a metric that is still written to comes back. The series of other running
    processes stay, each has to do this itself. Takes about 1 us per series of all models; any thread may call it.
    """
    for collector in list(REGISTRY._collector_to_names):
        _forget_children(collector, names)
    if not getattr(values.ValueClass, "_multiprocess", False):
        return
    try:
        with _kept()["lock"]:
            for file in _open_files().values():
                _drop(file, names)
        _drop_from_ended(names)
    except OSError as error:  # such as a full disk: the series stay, and nothing else is wrong
        logger.warning("series stay in /metrics models=%s: %s", ",".join(names), error)


def _kept() -> Mapping[str, Any]:
    """What prometheus_client's values share and give nobody: their files and the lock for them."""
    return inspect.getclosurevars(values.ValueClass.close_all_files).nonlocals


def _open_files() -> dict[str, MmapedDict]:
    return _kept()["files"]


def _forget_children(collector: Any, names: Collection[str]) -> None:
    """Let go of what writes the series; a removal by prometheus_client itself warns in the multiprocess mode."""
    labels: tuple[str, ...] = getattr(collector, "_labelnames", ())
    if _MODEL in labels and not collector._labelvalues:
        place = labels.index(_MODEL)
        with collector._lock:
            for child in [child for child in collector._metrics if child[place] in names]:
                del collector._metrics[child]


def _drop(file: MmapedDict, names: Collection[str]) -> None:
    """Write a file that is open here anew without these models' values."""
    is_gone = _search(names)
    start, used, parts, positions = _FIRST, _FIRST, [], {}
    for key, position in file._positions.items():  # in the order in which they lie in the file
        end = position + _VALUE_BYTES
        if not is_gone(key):
            parts.append(file._m[start:end])
            used += end - start
            positions[key] = used - _VALUE_BYTES
        start = end
    if len(positions) == len(file._positions):
        return
    capacity = _LEAST_BYTES
    while capacity < used:
        capacity *= 2
    fresh = open(f"{file._fname}.{os.getpid()}", "w+b")  # noqa: SIM115  # it stays open as long as the file is in use
    try:
        os.posix_fallocate(fresh.fileno(), 0, capacity)
        fresh.write(b"".join([struct.pack("ii", used, 0), *parts]))
        fresh.flush()
        data = mmap.mmap(fresh.fileno(), capacity)
        os.replace(fresh.name, file._fname)
    except BaseException:
        fresh.close()
        os.unlink(fresh.name)
        raise
    file._m.close()
    file._f.close()
    file._f, file._m, file._capacity, file._used, file._positions = fresh, data, capacity, used, positions


def _drop_from_ended(names: Collection[str]) -> None:
    """Do the same for the files of processes that ended; their gauges of the living kind are removed by others."""
    for path in glob.glob(f"{METRICS_FOLDER.get()}/*.db"):
        kind, _, pid = os.path.basename(path).removesuffix(".db").rpartition("_")
        if kind.startswith("gauge_live") or not pid.isdigit() or os.path.exists(f"/proc/{pid}"):
            continue
        file = RoomyDict(path)
        try:
            _drop(file, names)
        finally:
            file.close()  # type: ignore[no-untyped-call]


def _search(names: Collection[str]) -> Callable[[str], bool]:
    """Whether a value's key, which is JSON, is of one of these models."""
    quoted = [json.dumps(name)[1:-1] for name in names]

    def is_gone(key: str) -> bool:
        if not any(name in key for name in quoted):
            return False  # nearly all end here
        labels = json.loads(key)[2]
        listed = (name for label in _LISTS for name in labels.get(label, "").split(","))
        return labels.get(_MODEL) in names or any(name in names for name in listed)

    return is_gone
