# SPDX-License-Identifier: Apache-2.0
"""Shared memory is written by one process, once, and by nobody afterwards."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tokenpool.memory.copies.seals import check_sealed
from tokenpool.memory.copies.shared_memory import SharedMemory

pytestmark = pytest.mark.cpu

NBYTES = 3 * mmap.PAGESIZE + 100


def test_sealing_keeps_bytes_and_addresses() -> None:
    """Tensors that view it, or parts of it, go on; another mapping of it reads the same."""
    memory = SharedMemory.make(NBYTES)
    part = memory.tensor[mmap.PAGESIZE :].view(torch.uint8)
    memory.tensor.copy_(torch.arange(NBYTES) % 251)
    place = part.data_ptr()
    memory.seal()
    assert place == part.data_ptr() and mmap.PAGESIZE % 251 == part[0].item()
    other = SharedMemory.open(os.dup(memory.file), NBYTES)
    assert torch.equal(other.tensor, memory.tensor)


@pytest.mark.parametrize("how", ["mapping", "write", "size"])
def test_nobody_can_change_what_is_sealed(how: str) -> None:
    """Not even who has the descriptor that it was made with."""
    memory = SharedMemory.make(NBYTES)
    memory.seal()
    with pytest.raises(PermissionError):
        if how == "mapping":
            mmap.mmap(memory.file, NBYTES)
        elif how == "write":
            os.pwrite(memory.file, b"x", 0)
        else:
            os.ftruncate(memory.file, 1)


def test_a_write_to_what_is_sealed_ends_the_process() -> None:
    """Rather than to change the weights of another host."""
    script = (
        "from tokenpool.memory.copies.shared_memory import SharedMemory as S\n"
        "m = S.make(5000)\nm.seal()\nprint('sealed', flush=True)\nm.tensor[7] = 1\nprint('written')\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    assert (-signal.SIGSEGV, "sealed\n") == (done.returncode, done.stdout)


def test_what_is_not_sealed_is_not_opened() -> None:
    """It could change under whoever maps it; nor is what has another size, or is no such memory."""
    memory = SharedMemory.make(NBYTES)
    with pytest.raises(ValueError, match="not sealed"):
        SharedMemory.open(os.dup(memory.file), NBYTES)
    memory.seal()
    with pytest.raises(ValueError, match="has 12388 bytes, not 5"):
        SharedMemory.open(os.dup(memory.file), 5)
    with open(__file__) as file, pytest.raises(ValueError, match="no seals"):
        check_sealed(file.fileno(), 5)


def test_it_cannot_be_sealed_while_another_process_could_write() -> None:
    """Whoever has it mapped for writing keeps it from being shared."""
    memory = SharedMemory.make(NBYTES)
    with mmap.mmap(memory.file, NBYTES) as writer, pytest.raises(OSError, match="busy"):
        writer[0] = 1
        memory.seal()


def test_memory_goes_with_the_last_tensor() -> None:
    """The descriptor with the object, the mapping with what views it."""
    memory = SharedMemory.make(NBYTES)
    memory.tensor.fill_(5)
    address, file, part = memory.tensor.data_ptr(), memory.file, memory.tensor[:10]
    del memory
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)
    assert 5 == part[3].item()
    del part
    assert f"{address:x}-" not in Path("/proc/self/maps").read_text()
