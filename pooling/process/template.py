# SPDX-License-Identifier: Apache-2.0
"""Keeps a template: a process that has imported what engine hosts import, and forks one in a moment.

A host that cannot be had from it, for whatever reason, is to be started as any process: the template saves seconds and
is never needed. See template_process.py for what it does itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenpool.errors import HostError, text_of
from tokenpool.process.birth import Birth
from tokenpool.process.forked_child import ForkedChild, adopting_orphans
from tokenpool.process.keeper import Backoff, count_failure
from tokenpool.process.template_process import (
    GO,
    HERE,
    MESSAGE_BYTES,
    ROOM_FOR_WORDS,
    TEMPLATE_FLAG,
    read_oom_score,
)

logger = logging.getLogger(__name__)

_IMPORT_LIMIT_S = 60.0
"""A host waits no longer for a template that imports; then both import."""
_ANSWER_LIMIT_S = 2.0
"""A template that does not answer for so long hangs. A fork takes 20 to 50 ms."""
_END_S = 0.05
"""How long it takes at most until a process that was killed is seen to have ended."""
_LOOK_S, _IMPORT_LOOK_S = 1.0, 0.02
_WAITS_S = (1.0, 10.0, 60.0, 600.0)
"""Before each start in a row, but the first, of a template that ended or hung."""
_AFTER_REFUSAL_S = 30.0
"""How long there is none after one that could not fork."""
_MEMORY_LIMIT = 4 << 30
"""Bytes of its own, which no file holds; its children share them until they write there."""
_LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
_TASK = "template of hosts"
_COMMAND = (sys.executable, "-m", "tokenpool.host")


class Template:
    """The template of one owner's hosts, started anew when it ends, hangs or no longer fits; usable from any thread.

    The kernel ends it with the thread that looks after it, which is there as long as the process is.
    """

    def __init__(self, command: Sequence[str] = _COMMAND) -> None:
        """`command` is `python -m MODULE`, which also starts a host."""
        self._command = list(command)
        self._changed = threading.Condition()  # guards what is below
        self._wish: Birth | None = None
        self._life: _Life | None = None
        self._backoff = Backoff(first_at_once=True, waits_s=_WAITS_S)
        self._due_s = 0.0
        self._refused: tuple[Birth, str] | None = None
        self._stopping = False
        self._thread: threading.Thread | None = None

    def begin(self, env: Mapping[str, str], own: Iterable[str]) -> None:
        """Have a template for hosts with this environment, and variables of these names beside it; returns at once."""
        with contextlib.suppress(OSError), self._changed:
            self._want(_birth(env, own))

    def fork(self, words: Sequence[str], env: Mapping[str, str], own: Mapping[str, str]) -> ForkedChild | None:
        """A child with these words on its command line, the environment `env` and, beside it, its `own` variables.

        It is in a session of its own, as one started with `start_new_session`. None if it is to be started in the
        other way; the template is seen to meanwhile. Blocks, while the template imports for as long as that takes.
        """
        deadline = time.monotonic() + _IMPORT_LIMIT_S
        try:
            with self._changed:
                birth = _birth(env, own)
                try:
                    return self._fork(self._fit_life(birth, deadline), words, own)
                except _EndedError:  # the next one is there as soon as another process has imported
                    return self._fork(self._fit_life(birth, deadline), words, own)
        except (HostError, OSError) as error:
            logger.info("engine host is not forked from the template: %s", error)
            return None

    def _fork(self, life: _Life, words: Sequence[str], own: Mapping[str, str]) -> ForkedChild:
        try:
            return life.fork(words, own)
        except HostError as error:
            self._end()
            if not isinstance(error, _EndedError):  # the next one is not to import beside a host that does
                self._due_s = time.monotonic() + _AFTER_REFUSAL_S
            self._changed.notify_all()
            raise

    def stop(self) -> None:
        """End it; hosts stay."""
        with self._changed:
            self._stopping = True
            self._end()
            self._changed.notify_all()

    def snapshot(self) -> dict[str, Any]:
        """Its pid, None without one, and how it is, as plain values."""
        life, refused = self._life, self._refused
        if life is not None:
            return {"pid": life.process.pid, "state": "ready" if life.is_ready else "importing"}
        return {"pid": None, "state": "unfit" if refused is not None else "absent"}

    def _want(self, birth: Birth) -> Birth:
        if self._wish is None or (difference := self._wish.difference(birth)):
            if self._wish is not None:
                logger.info("the template of engine hosts is replaced: %s changed", difference)
            self._wish, self._due_s = birth, 0.0
            self._backoff.reset()
            if self._thread is None:
                self._thread = threading.Thread(target=self._keep, name="host template", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return self._wish

    def _fit_life(self, birth: Birth, deadline: float) -> _Life:
        """Wait for a template that makes such hosts; raises HostError."""
        wish = self._want(birth)
        while True:
            if self._stopping or self._wish is not wish:
                raise HostError("it is stopped, or another one is wanted")
            if self._refused is not None and self._refused[0] is wish:
                raise HostError(self._refused[1])
            life = self._life
            if life is not None and life.birth is wish and life.is_ready:
                return life
            if life is None and self._due_s > time.monotonic():
                raise HostError("it has ended and is not there yet")
            if life is not None and life.birth is wish:
                deadline = min(deadline, life.started_s + _IMPORT_LIMIT_S)
            if not self._changed.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                raise HostError("it takes too long to import")

    # -- the thread that looks after it ----------------------------------------------------------------

    def _keep(self) -> None:
        with self._changed:
            while not self._stopping:
                try:
                    wait_s = self._look()
                except Exception:  # whatever it is, hosts are started without a template
                    logger.exception("the template of engine hosts cannot be seen to")
                    self._failed()
                    wait_s = _LOOK_S
                self._changed.notify_all()
                self._changed.wait(wait_s)

    def _look(self) -> float:
        """Start, renew or question it, whatever is due; returns the seconds until it is to be looked at again."""
        if self._life is not None and self._life.birth is not self._wish:
            self._end()
        assert self._wish is not None
        if self._life is None:
            if self._refused is not None and self._refused[0] is self._wish:
                return _LOOK_S
            if (wait_s := self._due_s - time.monotonic()) > 0:
                return wait_s
        try:
            if self._life is None:
                _refuse_without_descriptors()
                self._life = _Life(self._command, self._wish)
            self._life.look()
            return _LOOK_S if self._life.is_ready else _IMPORT_LOOK_S
        except _UnfitError as error:
            logger.warning("engine hosts are not forked from a template: %s", error)
            self._refused = self._wish, str(error)
            count_failure(_TASK)
            self._end()
            return _LOOK_S
        except (HostError, OSError) as error:
            logger.warning("the template of engine hosts is replaced: %s", error)
            self._failed()
            return 0.0

    def _failed(self) -> None:
        count_failure(_TASK)
        self._end()
        self._due_s = time.monotonic() + self._backoff.next_s()

    def _end(self) -> None:
        if self._life is not None:
            self._life.end()
            self._life = None


def _birth(env: Mapping[str, str], own: Iterable[str]) -> Birth:
    return Birth.now({**env, **dict.fromkeys(own, "")})


class _UnfitError(Exception):
    """The next template would be as unfit as this one."""


def _refuse_without_descriptors() -> None:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:  # Linux before 5.3, or a container that forbids it
        raise _UnfitError(f"processes have no file descriptors here: {error}") from error


class _EndedError(HostError):
    """The template has ended by itself."""


class _Life:
    """One template process."""

    def __init__(self, command: Sequence[str], birth: Birth) -> None:
        """Start it; to be called by the thread that it is to end with."""
        self.birth = birth
        self.is_ready = False
        self.started_s = time.monotonic()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [*command, TEMPLATE_FLAG, str(theirs.fileno()), " " * ROOM_FOR_WORDS],
                env=dict(birth.env),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=[theirs.fileno()],
            )

    def look(self) -> None:
        """Raise HostError when it is to be replaced, or _UnfitError when that would help nobody."""
        if (status := self.process.poll()) is not None:
            raise HostError(f"it ended with status {status}")
        if not self.is_ready:
            self._hear_ready()
        else:
            try:
                self._socket.settimeout(_ANSWER_LIMIT_S)
                self._socket.send(b"{}")
                self._socket.recv(MESSAGE_BYTES)
            except OSError as error:
                raise HostError(f"it does not answer: {error}") from error
        if (nbytes := _own_bytes(self.process.pid)) > _MEMORY_LIMIT:
            raise _UnfitError(f"its {nbytes} bytes of memory are more than {_MEMORY_LIMIT}")

    def _hear_ready(self) -> None:
        self._socket.settimeout(0.0)
        try:
            said = self._socket.recv(MESSAGE_BYTES)
        except BlockingIOError:
            if _stat_of(self.process.pid)[:1] in (["T"], ["t"]):
                raise HostError("it is stopped") from None
            if time.monotonic() - self.started_s > _IMPORT_LIMIT_S:
                raise HostError(f"it imports for more than {_IMPORT_LIMIT_S:g} s") from None
            return
        if not said:
            raise HostError("it has ended")
        if unfit := json.loads(said)["unfit"]:
            raise _UnfitError(unfit)
        self.is_ready = True
        logger.info("template of engine hosts is ready pid=%d seconds=%.1f", self.process.pid,
                    time.monotonic() - self.started_s)  # fmt: skip

    def fork(self, words: Sequence[str], own: Mapping[str, str]) -> ForkedChild:
        """See Template; raises HostError, and then nothing is left of the child, and the template is to be ended."""
        limits = {kind: resource.getrlimit(kind) for kind in _LIMITS}
        request = {"words": list(words), "own": dict(own), "owner": os.getpid(), "limits": limits}
        packed = json.dumps(request | {"oom_score": read_oom_score()}).encode()
        gate, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        child, pids = None, list[int]()
        try:
            with gate, adopting_orphans():
                gate.settimeout(_ANSWER_LIMIT_S)
                self._socket.settimeout(_ANSWER_LIMIT_S)
                with theirs:
                    socket.send_fds(self._socket, [packed], [1, 2, theirs.fileno()])
                _await_child(gate, pids)
                adopted = ForkedChild(pids[0])
                gate.send(GO)
                child = adopted
                return child
        except (HostError, OSError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise _EndedError(f"it ended with status {self.process.wait(_END_S)}") from error
            raise HostError(f"it does not fork: {text_of(error)}") from error
        finally:
            if child is None:
                for pid in pids:
                    _reap(pid)

    def end(self) -> None:
        """End the process."""
        self._socket.close()
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # the kernel holds it in a call
            self.process.wait(_ANSWER_LIMIT_S)


def _await_child(gate: socket.socket, pids: list[int]) -> None:
    """Return once the forked child, whose pid is put into `pids`, is one of this process; raises HostError, OSError."""
    is_here = False
    while not (pids and is_here):
        said = gate.recv(MESSAGE_BYTES)
        if not said:
            raise HostError("the child has ended")
        if said == HERE:
            is_here = True
            continue
        told = json.loads(said)
        if "pid" not in told:
            raise HostError(told.get("unfit") or told.get("error"))
        pids.append(told["pid"])


def _reap(pid: int) -> None:
    """Leave nothing of a child that ends because nobody wants it, if this process has adopted it."""
    if _stat_of(pid)[1:2] == [str(os.getpid())]:  # then nobody else has that number
        child = ForkedChild(pid)
        child.kill()
        child.wait()


def _own_bytes(pid: int) -> int:
    """Resident bytes of a process that no file holds; 0 when it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    return 0


def _stat_of(pid: int) -> list[str]:
    """State, parent and what follows in /proc/PID/stat; empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
