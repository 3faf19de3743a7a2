# SPDX-License-Identifier: Apache-2.0
"""What it costs to tell another rank of a step: pipes, as a tensor parallel group has them, and vLLM's shared memory.

Rank 0 and one other rank, a process each, no model. A step is two messages, as of vLLM's executor: `execute_model` with
what was scheduled, `sample_tokens` with masks of grammars if there are any; then rank 0 sleeps `--step-ms`. Messages of
a model with blocks of 16 tokens:

    decode_N    N requests that decode, of which each sixteenth gets a block
    prefill     a prompt of 8192 tokens beside 32 requests that decode
    masks       32 requests that decode, each with a mask over 152064 tokens

    send_us     median over steps: how long the thread of rank 0 takes for both messages, answers before them included
    arrive_us   median over steps: from the begin of a message until the other rank has it unpacked, the sum of both

Not to be concluded: anything about more ranks, each of which adds one write of the packed message to a pipe and none to
shared memory; nor of ranks that share their core with rank 0.
"""

from __future__ import annotations

import multiprocessing
import pickle
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: only bench/ itself is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, GrammarOutput, NewRequestData, SchedulerOutput

from bench.parts import common
from tokenpool.host.ranks.rank_questions import RankQuestions
from tokenpool.host.ranks.rank_watch import RankLimits, RankWatch

VOCABULARY = 152064
MODEL = "llama"
Call = tuple[str, tuple[Any, ...]]
Tell = Callable[[Call], tuple[float, float]]
_SPAWN = multiprocessing.get_context("spawn")


@dataclass
class Messages:
    """Microseconds by message."""

    pipe_send_us: dict[str, float] = field(default_factory=dict)
    queue_send_us: dict[str, float] = field(default_factory=dict)
    pipe_arrive_us: dict[str, float] = field(default_factory=dict)
    queue_arrive_us: dict[str, float] = field(default_factory=dict)
    packed_bytes: dict[str, int] = field(default_factory=dict)


def run(*, steps: int, step_ms: float, seed: int, start_limit_s: float, logs: Path | None) -> Messages:
    """Measure each kind of step with each way; `seed`, the limit and logs are of other benches."""
    found = Messages()
    for way, connected in (("pipe", _pipe), ("queue", _queue)):
        sends, arrivals = getattr(found, f"{way}_send_us"), getattr(found, f"{way}_arrive_us")
        with connected() as tell:
            for name, calls in _steps().items():
                found.packed_bytes[name] = sum(len(pickle.dumps(call)) for call in calls)
                times = [_step(tell, calls, step_ms) for _ in range(steps)]
                sends[name], arrivals[name] = (statistics.median(each) * 1e6 for each in zip(*times, strict=True))
                common.progress(f"{way} {name}: {sends[name]:.0f} us to send, {arrivals[name]:.0f} us to arrive")
    return found


def _step(tell: Tell, calls: list[Call], step_ms: float) -> tuple[float, float]:
    told = [tell(call) for call in calls]
    time.sleep(step_ms / 1000)
    return sum(sent for sent, _ in told), sum(arrived for _, arrived in told)


@contextmanager
def _follower(follow: Callable[[Any, Any], None], end: Any) -> Iterator[Any]:
    """A process that follows, with the clock on which it notes when a message was there, and how many there were."""
    clock = _SPAWN.RawArray("d", 2)
    process = _SPAWN.Process(target=follow, args=(end, clock), daemon=True)
    process.start()
    try:
        yield clock
    finally:
        process.kill()
        process.join()


def _timed(clock: Any, send: Callable[[Call], object]) -> Tell:
    """Send a message and wait until the follower has it."""

    def tell(call: Call) -> tuple[float, float]:
        begin_s, before = time.perf_counter(), clock[1]
        send(call)
        sent_s = time.perf_counter() - begin_s
        while clock[1] == before:
            time.sleep(0)
        return sent_s, clock[0] - begin_s

    return tell


@contextmanager
def _pipe() -> Iterator[Tell]:
    ours, theirs = _SPAWN.Pipe()
    with _follower(_follow_pipe, theirs) as clock:
        questions = RankQuestions([ours], RankWatch(2, RankLimits()), sys.exit)
        questions.answers(questions.ask("call", MODEL, "begin", (), {}, False))
        yield _timed(clock, lambda call: questions.leave(questions.ask("call", MODEL, *call, {}, False), MODEL))


def _follow_pipe(connection: Any, clock: Any) -> None:
    while True:
        message = pickle.loads(connection.recv_bytes())
        clock[0] = time.perf_counter()
        clock[1] += 1
        connection.send_bytes(pickle.dumps((message[1], True, pickle.dumps(None))))


@contextmanager
def _queue() -> Iterator[Tell]:
    queue = MessageQueue(1, 1)
    with _follower(_follow_queue, queue.export_handle()) as clock:
        queue.wait_until_ready()
        yield _timed(clock, lambda call: queue.enqueue((*call, {}, 0)))


def _follow_queue(handle: Any, clock: Any) -> None:
    queue = MessageQueue.create_from_handle(handle, 0)
    queue.wait_until_ready()
    while True:
        queue.dequeue(indefinite=True)
        clock[0] = time.perf_counter()
        clock[1] += 1


def _steps() -> dict[str, list[Call]]:
    masks = GrammarOutput(_names(32), np.zeros((32, -(-VOCABULARY // 32)), dtype=np.int32))
    return {
        "decode_32": [("execute_model", (_decoding(32),)), ("sample_tokens", (None,))],
        "decode_256": [("execute_model", (_decoding(256),)), ("sample_tokens", (None,))],
        "prefill": [("execute_model", (_with_prompt(_decoding(32), 8192),)), ("sample_tokens", (None,))],
        "masks": [("execute_model", (_decoding(32),)), ("sample_tokens", (masks,))],
    }


def _names(count: int) -> list[str]:
    return [f"chatcmpl-{number:032x}" for number in range(count)]


def _decoding(count: int) -> SchedulerOutput:
    made = SchedulerOutput.make_empty()
    names = _names(count)
    made.scheduled_cached_reqs = CachedRequestData(
        req_ids=names,
        resumed_req_ids=set(),
        new_token_ids=[],
        all_token_ids={},
        new_block_ids=[([1000 + number],) if number % 16 == 0 else None for number in range(count)],
        num_computed_tokens=[1000 + number for number in range(count)],
        num_output_tokens=[100 + number for number in range(count)],
    )
    made.num_scheduled_tokens = dict.fromkeys(names, 1)
    made.total_num_scheduled_tokens = count
    return made


def _with_prompt(made: SchedulerOutput, num_tokens: int) -> SchedulerOutput:
    tokens = [1000 + number % 100_000 for number in range(num_tokens)]
    blocks = [*range(2000, 2000 + num_tokens // 16)]
    made.scheduled_new_reqs = [NewRequestData("new", tokens, [], SamplingParams(), None, (blocks,), 0, None)]
    made.num_scheduled_tokens["new"] = num_tokens
    made.total_num_scheduled_tokens += num_tokens
    return made


def main() -> None:
    """Read the flags, run, report."""
    parser = common.parser(__doc__)
    parser.add_argument("--steps", type=int, default=300, help="of each kind (default: %(default)s)")
    parser.add_argument("--step-ms", type=float, default=3.0, help="between two steps (default: %(default)s)")
    keys = ["pipe_send_us_decode_32", "pipe_send_us_decode_256", "pipe_send_us_prefill", "pipe_send_us_masks"]
    common.report("rank_messages", run, parser.parse_args(), [*keys, *(key.replace("pipe", "queue") for key in keys)])


if __name__ == "__main__":
    main()
