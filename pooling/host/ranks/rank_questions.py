# SPDX-License-Identifier: Apache-2.0
"""What rank 0 asks of the ranks that follow, and what they answer.

    question = ask("call", ...)     all ranks do it; so does rank 0, which they meet inside of it
    answers(question)               waits for all, raises what the first of them raised
    leave(question, model)          nobody waits for the answers: they are taken before the next question
    give_up(question, why)          rank 0 failed in its own part: those that wait for it give up as well
    meet(pause)                     a point of a build at which all ranks are before any goes on

At most one question is left at a time, so a follower is never more than one behind. One that failed is told to the
model that it was left for, before that model's next step.
"""

from __future__ import annotations

import pickle
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import cloudpickle

from tokenpool.errors import EngineLostError, LateRankError
from tokenpool.host.ranks.rank_watch import RankWatch

_PORTIONS = 10


class RankQuestions:
    """The connections to the followers. `send` may be called from any thread, all else from one at a time."""

    def __init__(self, connections: Sequence[Connection], watch: RankWatch, end: Callable[[str], None]) -> None:
        """`end` ends the process, for a reason."""
        self.watch = watch
        self._end = end
        self._connections = list(connections)
        self._lock = threading.Lock()
        self._num_asked = 0
        self._open: list[int] = []
        """Questions that rank 0 does its part of; of a build that pauses there, more may follow."""
        self._left: dict[int, str] = {}
        self._failures: dict[str, Exception] = {}
        self._answers: list[dict[int, Any]] = [{} for _ in connections]
        self._arrived: list[dict[int, int]] = [defaultdict(int) for _ in connections]
        """By follower and question, at how many points it waits."""

    def send(self, kind: str, *content: Any) -> None:
        """Tell all followers something they do not answer; raises EngineLostError when one is gone."""
        self._tell(self._connections, kind, 0, *content)

    def repeat(self, name: str, args: tuple[Any, ...]) -> None:
        """Have a call on rank 0's memory repeated; see memory/devices/mirrored.py."""
        with self.watch.work(f"{name} of memory, for which the other ranks take no message,"):
            self.send("device", name, args)

    def ask(self, kind: str, *content: Any) -> int:
        """Ask all followers; returns the question's number. Takes first what was left."""
        self.settle()
        self._num_asked += 1
        self._open.append(self._num_asked)
        self._tell(self._connections, kind, self._num_asked, *content)
        return self._num_asked

    def answers(self, question: int) -> list[Any]:
        """What the followers answer, by rank; raises what the first of them raised."""
        answers = self._take(question)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def leave(self, question: int, model: str) -> None:
        """Wait for no answers to what was asked for `model`."""
        self._open.remove(question)
        self._left[question] = model

    def settle(self) -> None:
        """Wait for the answers to what was left; keeps what failed."""
        for question, model in list(self._left.items()):
            del self._left[question]
            for answer in self._take(question):
                if isinstance(answer, Exception):
                    self._failures.setdefault(model, answer)

    def take_failure(self, model: str) -> LateRankError | None:
        """That a follower raised in something that was left for this model; told once. Waits for what was left."""
        self.settle()
        cause = self._failures.pop(model, None)
        if cause is None:
            return None
        failure = LateRankError(f"another rank failed in an earlier step: {type(cause).__name__}: {cause}")
        failure.__cause__ = cause
        return failure

    def give_up(self, question: int, why: str) -> None:
        """Rank 0 raised in its part: take the answers, whatever they are. Ends the process when one does not come."""
        self._tell(self._connections, "failed", question)
        portions = _PORTIONS  # this process may be frozen meanwhile, and then the followers are, too
        while missing := self._without(question):
            if not self._read(missing, self.watch.limits.alarm_s / _PORTIONS):
                portions -= 1
            if not portions:
                ranks = ", ".join(str(index + 1) for index in missing)
                self._end(f"rank 0 failed in {why}, and rank {ranks} goes on waiting for it")
        self._take(question)

    def meet(self, pause: Callable[[], None]) -> None:
        """Let all ranks come to this point, `pause`, let all go on.

        While it pauses more may be asked, for other models. Raises what a follower has raised on the way here: no rank
        goes on to where it would wait for that one.
        """
        if not self._open:
            return
        question = self._open[-1]
        while missing := [i for i in self._without(question) if not self._arrived[i][question]]:
            self._read(missing)
            self._raise_what_failed(question)
        self._raise_what_failed(question)
        self.watch.beat()
        pause()
        self.watch.beat()
        for arrived in self._arrived:
            arrived[question] = max(0, arrived[question] - 1)
        self._tell(self._connections, "go", question)

    def _take(self, question: int) -> list[Any]:
        while missing := self._without(question):
            for index in missing:
                if self._arrived[index][question]:  # at a point that rank 0 has not: it is past it
                    self._arrived[index][question] -= 1
                    self._tell([self._connections[index]], "go", question)
            self._read(missing)
        if question in self._open:
            self._open.remove(question)
        for arrived in self._arrived:
            arrived.pop(question, None)
        return [answers.pop(question) for answers in self._answers]

    def _without(self, question: int) -> list[int]:
        """The followers whose answer has not come."""
        return [index for index, answers in enumerate(self._answers) if question not in answers]

    def _raise_what_failed(self, question: int) -> None:
        for answers in self._answers:
            if isinstance(answer := answers.get(question), Exception):
                raise answer

    def _read(self, followers: Sequence[int], limit_s: float | None = None) -> bool:
        """Take what the first of these followers sends; returns whether anything came within `limit_s`."""
        if limit_s is None and len(followers) == 1:  # as in each step of two ranks: nothing to choose from
            self._receive(followers[0])
            return True
        indices = {self._connections[index]: index for index in followers}
        ready = wait(list(indices), limit_s)
        for connection in ready:
            self._receive(indices[connection])  # type: ignore[index]
        return bool(ready)

    def _receive(self, index: int) -> None:
        try:
            packed = self._connections[index].recv_bytes()
        except (OSError, EOFError) as error:
            raise self._lost(f"rank {index + 1} of the tensor parallel group is gone: {error}") from error
        question, is_answer, content = pickle.loads(packed)
        if not is_answer:
            self._arrived[index][question] += 1
            return
        self._answers[index][question] = answer = _unpacked(content)
        if isinstance(answer, Exception):
            self.watch.taken(index)

    def _tell(self, connections: Sequence[Connection], *message: Any) -> None:
        packed = _packed(message)
        try:
            with self._lock:
                for connection in connections:
                    connection.send_bytes(packed)
        except OSError as error:
            raise self._lost(f"a rank of the tensor parallel group is gone: {error}") from error

    def _lost(self, reason: str) -> EngineLostError:
        """The error for a follower that is gone."""
        return EngineLostError(reason)


def _packed(message: tuple[Any, ...]) -> bytes:
    """A message as bytes: quickly if it is of a step, else with whatever functions and classes it brings."""
    kind, _, *content = message
    if kind == "call" and len(content) > 1 and isinstance(content[1], str):
        with suppress(pickle.PicklingError, AttributeError, TypeError):
            return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    packed: bytes = cloudpickle.dumps(message)
    return packed


def _unpacked(answer: bytes) -> Any:
    try:
        return pickle.loads(answer)
    except Exception as error:  # such as an exception whose class takes other arguments; the others' answers count
        return RuntimeError(f"an answer of a rank cannot be read: {type(error).__name__}: {error}")
