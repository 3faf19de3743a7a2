# SPDX-License-Identifier: Apache-2.0
"""What a template does: it has imported what hosts import, and forks one whenever its owner asks.

It has one thread, no open file but those it was given, no child and no device context; each is looked at before every
fork, for what a fork would leave broken in the child. A host is not the template's child but its owner's: it is forked
by a process that ends at once, and the owner adopts it. So the owner sees its end, and the host dies with the owner
and not with the template.

    owner ── asks ──► template ── forks ──► (a process that ends) ── forks ──► host, a child of the owner from then on
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from tokenpool import settings
from tokenpool.process.parent_death import end_with_parent

MESSAGE_BYTES = 1 << 17
"""More than any message has."""
HERE, GO = b"here", b"go"
"""What a forked child says once its owner is its parent, and what it then waits for."""
TEMPLATE_FLAG = "--template"
"""The first word of a template's command line; the number of its socket and room for a host's words follow."""
ROOM_FOR_WORDS = 3000
"""Characters for what `ps` is to show of a host."""
_OOM_SCORE = 900
"""The kernel ends the template rather than anything else when memory is short: nobody misses it."""
_ADOPTION_LIMIT_S = 5.0
_WORDS_OF_PYTHON = 3
"""`python -m MODULE`, with which template and host are started alike."""
_CUDA_NOT_INITIALIZED = 3


def words_of_child(prepare: Callable[[], object]) -> list[str]:
    """The words that tell a process what it is: those of its command line, at once, or in a fork of a template.

    A template runs `prepare` first: the imports, and what all children do alike.
    """
    if sys.argv[1:2] != [TEMPLATE_FLAG]:
        end_with_parent()
        return sys.argv[1:]
    owner = _begin()
    blas_threads = _start_blas()
    prepare()
    return _fork_when_asked(owner, blas_threads)


def _start_blas() -> int:
    """Import numpy, whose OpenBLAS has threads that it ends before a fork and starts anew; returns their number."""
    before = len(os.listdir("/proc/self/task"))
    with contextlib.suppress(ImportError):
        importlib.import_module("numpy")
    return len(os.listdir("/proc/self/task")) - before


def _begin() -> socket.socket:
    """Become a template, before the imports; returns the socket to the owner."""
    end_with_parent()
    show_words(sys.orig_argv[: _WORDS_OF_PYTHON + 1])
    with contextlib.suppress(OSError):
        write_oom_score(max(_OOM_SCORE, read_oom_score()))
    owner = socket.socket(fileno=int(sys.argv[2]))
    owner.set_inheritable(False)
    return owner


def _fork_when_asked(owner: socket.socket, spare_threads: int) -> list[str]:
    """Answer the owner until it is gone; returns in each forked host only, with the words of its command line.

    `spare_threads` is how many threads there may be that know what to do at a fork.
    """
    gc.collect()
    gc.freeze()  # a collection in a child would write to what all share
    _tell(owner, unfit=why_unfit(owner.fileno(), spare_threads))
    while True:
        data, files, _, _ = socket.recv_fds(owner, MESSAGE_BYTES, 3)
        if not data:
            os._exit(0)
        request = json.loads(data)
        if "words" not in request:
            _tell(owner)
            continue
        stdout, stderr, gate_file = files
        gate = socket.socket(fileno=gate_file)
        if unfit := why_unfit(owner.fileno(), spare_threads, given=files):
            _tell(gate, unfit=unfit)
        elif _fork_twice(gate):
            owner.close()
            _become_child(gate, stdout, stderr, request)
            return request["words"]
        gate.close()
        os.close(stdout)
        os.close(stderr)


def why_unfit(owner: int, spare_threads: int = 0, given: Sequence[int] = ()) -> str:
    """What a fork would leave broken, in a few words; empty if nothing."""
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1 + spare_threads:
        return f"it has {threads} threads"
    files = {int(name): _target(name) for name in os.listdir("/proc/self/fd")}
    known = {0, 1, 2, owner, *given}
    if strange := sorted(target for number, target in files.items() if number not in known and target):
        return f"it has open files: {', '.join(strange)}"
    try:
        os.waitpid(-1, os.WNOHANG)
        return "it has children"
    except ChildProcessError:
        pass
    return "it has a device context" if _has_device_context() else ""


def _target(number: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:  # that of the listing itself
        return ""


def _has_device_context() -> bool:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return True
    with open("/proc/self/maps") as maps:
        if not any("libcuda.so" in line for line in maps):
            return False
    return bool(ctypes.CDLL("libcuda.so.1").cuDeviceGetCount(ctypes.byref(ctypes.c_int())) != _CUDA_NOT_INITIALIZED)


def _fork_twice(gate: socket.socket) -> bool:
    """Fork a child that the owner adopts; returns whether this is the child."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    try:
        between = os.fork()
    except OSError as error:  # such as no process left
        _tell(gate, error=str(error))
        return False
    if between:
        os.waitpid(between, 0)
        return False
    try:
        if not (child := os.fork()):
            return True
        _tell(gate, pid=child)
    except BaseException as error:
        _tell(gate, error=str(error))
    os._exit(0)


def _tell(owner: socket.socket, **message: Any) -> None:
    with contextlib.suppress(OSError):  # it has given up
        owner.send(json.dumps(message).encode())


def _become_child(gate: socket.socket, stdout: int, stderr: int, request: Mapping[str, Any]) -> None:
    """Make this process what it were if the owner had started it, once the owner says so; else end it."""
    try:
        os.setsid()
        _wait_for_adoption(request["owner"])
        for number, file in ((1, stdout), (2, stderr)):
            os.dup2(file, number)
            os.close(file)
        for kind, limits in request["limits"].items():
            resource.setrlimit(int(kind), limits)
        if read_oom_score() != request["oom_score"]:
            write_oom_score(request["oom_score"])
        gate.send(HERE)
        is_wanted = gate.recv(len(GO)) == GO
        gate.close()
        if not is_wanted:
            os._exit(0)
        settings.extend_environment(request["own"])
        sys.argv[1:], sys.orig_argv[_WORDS_OF_PYTHON:] = request["words"], request["words"]
        show_words(sys.orig_argv)
        forget_chance()
    except BaseException as error:  # the owner sees it end and starts a host in the other way
        _end_unborn(error)


def _wait_for_adoption(owner: int) -> None:
    deadline = time.monotonic() + _ADOPTION_LIMIT_S
    while os.getppid() != owner:
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {owner} does not adopt it")
        time.sleep(0.0005)
    end_with_parent()
    if os.getppid() != owner:
        raise ProcessLookupError("its owner is gone")


def _end_unborn(error: BaseException) -> NoReturn:
    print(f"a forked engine host ends before it began: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def forget_chance() -> None:
    """Draw anew what a process draws when it starts; Python's `random` and prometheus_client see a fork themselves."""
    multiprocessing.current_process().authkey = os.urandom(32)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed()
    if (torch := sys.modules.get("torch")) is not None:
        torch.default_generator.seed()


def show_words(words: Sequence[str]) -> None:
    """Have `ps` show these words as this process' command line, as far as there is room."""
    try:
        with open("/proc/self/stat", "rb") as file:
            start, end = map(int, file.read().rpartition(b")")[2].split()[45:47])
        room = end - start
        if not 0 < start < end:  # the kernel does not tell
            return
        text = b"\0".join(map(os.fsencode, words))[: room - 1]
        ctypes.memmove(start, text.ljust(room, b"\0"), room)
    except (OSError, ValueError):  # it is for people to read
        pass


def read_oom_score() -> int:
    """This process' place among those that the kernel ends when memory is short, higher = earlier."""
    with open("/proc/self/oom_score_adj") as file:
        return int(file.read())


def write_oom_score(score: int) -> None:
    """Set it; raises OSError below what it was when somebody else has set it."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(score))
