# SPDX-License-Identifier: Apache-2.0
"""A grammar that is compiled for ever ends its request, and keeps no other request of the engine waiting."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.serial_utils import MsgpackEncoder

from tokenpool.host.engine.grammar_wait import limited
from tokenpool.host.engine.input_receiver import InputReceiver
from tokenpool.wire.continued_request import ContinuedRequest

pytestmark = pytest.mark.vllm


class Core:
    """As much of an engine as an InputReceiver uses; the grammars are the test's."""

    tensor_ipc_receiver = None

    def __init__(self) -> None:
        self.input_queue: queue.Queue[Any] = queue.Queue()
        self.aborts_queue: queue.Queue[Any] = queue.Queue()
        self.grammars: dict[str, Future[Any]] = {}
        self.failed: list[str] = []

    def make_request(self, message: ContinuedRequest) -> tuple[Any, int]:
        grammar = self.grammars.get(message.request_id)
        structured = SimpleNamespace(_grammar=grammar) if grammar is not None else None
        return SimpleNamespace(request_id=message.request_id, structured_output_request=structured, restored=False), 0

    def restore(self, made: Any, message: ContinuedRequest) -> None:
        grammar = self.grammars.get(made.request_id)
        if grammar is not None and message.delivered_token_ids and not grammar.result(0):
            raise ValueError("no grammar")
        made.restored = True

    def _handle_request_preproc_error(self, message: ContinuedRequest) -> None:
        self.failed.append(message.request_id)

    def taken(self) -> list[str]:
        """Requests in the inbox, in order; each is restored."""
        requests = [self.input_queue.get_nowait() for _ in range(self.input_queue.qsize())]
        added = [content[0] for kind, content in requests if kind is EngineCoreRequestType.ADD]
        assert all(request.restored for request in added)
        return [request.request_id for request in added]


class Wire:
    """A receiver whose thread is the test's."""

    def __init__(self) -> None:
        self.core = Core()
        self.receiver = InputReceiver(self.core)  # type: ignore[arg-type]

    def send(self, kind: EngineCoreRequestType, content: Any) -> None:
        self.receiver._receive(zmq.Frame(kind.value), *map(zmq.Frame, MsgpackEncoder().encode(content)))

    def add(self, request_id: str, delivered: list[int], client_index: int = 0) -> None:
        self.send(EngineCoreRequestType.ADD, ContinuedRequest(
            request_id=request_id, prompt_token_ids=[1], mm_features=None, sampling_params=None, pooling_params=None,
            arrival_time=time.time(), lora_request=None, cache_salt=None, data_parallel_rank=None,
            client_index=client_index, delivered_token_ids=delivered,
        ))  # fmt: skip

    def work(self) -> None:
        """Do what other threads have asked the receiver's for."""
        while self.receiver._jobs:
            self.receiver._jobs.popleft()()


def test_a_request_that_goes_on_does_not_keep_others_waiting_for_its_grammar():
    """Those that come after it are taken at once; it is taken when its grammar is there."""
    wire = Wire()
    wire.core.grammars["late"] = grammar = Future()
    wire.add("late", [5, 6])
    wire.add("other", [])
    wire.add("plain", [7])
    assert ["other", "plain"] == wire.core.taken()
    grammar.set_result(True)
    wire.work()
    assert ["late"] == wire.core.taken()


@pytest.mark.parametrize("gone", ["abort", "frontend"])
def test_who_goes_away_meanwhile_is_not_taken(gone):
    """An abort, and the end of the frontend, hold for requests whose grammars are not there yet."""
    wire = Wire()
    wire.core.grammars["late"] = grammar = Future()
    wire.add("late", [5, 6], client_index=3)
    if gone == "abort":
        wire.send(EngineCoreRequestType.ABORT, ["late"])
    else:
        wire.receiver._forget(3)
    grammar.set_result(True)
    wire.work()
    assert [] == wire.core.taken()


def test_a_grammar_that_cannot_be_had_ends_its_request():
    """The client is told, and the receiver goes on."""
    wire = Wire()
    wire.core.grammars["late"] = grammar = Future()
    wire.add("late", [5, 6])
    grammar.set_result(False)
    wire.work()
    assert ([], ["late"]) == (wire.core.taken(), wire.core.failed)


def test_a_grammar_ends_as_its_compilation_does():
    """Result and error are passed on, whenever they come."""
    done, later, failing = Future(), Future(), Future()
    done.set_result(1)
    assert 1 == limited(done).result(0)
    ending = limited(later), limited(failing)
    later.set_result(2)
    failing.set_exception(ValueError("bad"))
    assert 2 == ending[0].result(60)
    assert isinstance(ending[1].exception(60), ValueError)
    cancelled = Future()
    ending_too = limited(cancelled)
    cancelled.cancel()
    assert isinstance(ending_too.exception(60), RuntimeError)


def test_a_compilation_without_end_is_not_waited_for():
    """The request gets TimeoutError; an end that comes later changes nothing."""
    compiling, told = Future(), threading.Event()
    ending = limited(compiling, 0.01)
    ending.add_done_callback(lambda _: told.set())
    assert told.wait(60)
    compiling.set_result(1)
    assert isinstance(ending.exception(0), TimeoutError)
