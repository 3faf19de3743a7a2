# SPDX-License-Identifier: Apache-2.0
"""When a host counts as alive, overdue or dead, and that its guard ends one that hangs; the host is a stand-in."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.server import REPOSITORY, poll
from tokenpool.errors import HostError
from tokenpool.memory.copy_engine import CopyEngine, CopyJob
from tokenpool.process.guard import HostGuard
from tokenpool.settings import CONTROL_KEY
from tokenpool.wire.control import call_host
from tokenpool.wire.pulse import WAITING, Pulse, PulseBook, PulseLimits, Standing, Still, Works, judge

pytestmark = pytest.mark.cpu

KEY = b"k" * 32
LIMITS = PulseLimits(host_s=60.0, load_s=600.0)
SHORT = {"host_timeout_s": 2.0, "load_timeout_s": 60.0}


def one(what: str, model: str, seconds: float) -> dict[str, Still]:
    return {"loop": Still(what, model, seconds)}


@pytest.mark.parametrize(
    ("silent_s", "still", "standing", "reason"),
    [
        (0.0, {}, Standing.ALIVE, ""),
        (5.0, one("step", "llama", 30.0), Standing.ALIVE, ""),
        (5.1, {}, Standing.OVERDUE, "no pulse for 5.1 s"),
        (60.1, one("step", "llama", 3.0), Standing.SILENT, "no pulse for 60.1 s"),
        (0.0, one("step", "llama", 31.0), Standing.OVERDUE, "in step of llama for 31.0 s"),
        (0.0, one("step", "llama", 61.0), Standing.STUCK, "in step of llama for 61.0 s"),
        (0.0, one("call check", "", 61.0), Standing.STUCK, "in call check for 61.0 s"),
        (0.0, one("build: warming up", "llama", 300.0), Standing.ALIVE, ""),
        (0.0, one("build: warming up", "llama", 601.0), Standing.STUCK, "in build: warming up of llama for 601.0 s"),
        (0.0, {"weights-fetch": Still("read", "llama", 61.0)}, Standing.ALIVE, ""),
        (0.0, one("step", "a", 1.0) | {"weights-copy": Still("copy", "b", 61.0)}, Standing.STUCK,
         "in copy of b for 61.0 s"),
    ],
)  # fmt: skip
def test_a_host_is_judged_by_its_silence_and_by_what_does_not_get_on(
    silent_s: float, still: dict[str, Still], standing: Standing, reason: str
) -> None:
    """Each thing has its own limit, half of which makes the host overdue; the reason names it with its seconds."""
    assert (standing, reason) == tuple(judge(silent_s, still, LIMITS))


def taken(*pulses: Works | None, passed_s: float = 10.0) -> PulseBook:
    book = PulseBook()
    for pulse in pulses:
        book.take(pulse, passed_s)
    return book


def test_only_what_shows_no_progress_grows_old() -> None:
    """A step that is the same one is older each time; one after the other, and a loop that waits, are not."""
    pulse = Pulse()
    pulse.enter("step", "llama")
    same = [pulse.snapshot(None, ()) for _ in range(3)]
    pulse.enter("step", "llama")
    other = pulse.snapshot(None, ())
    pulse.enter(WAITING)

    assert {"loop": Still("step", "llama", 20.0)} == taken(*same).still
    assert {"loop": Still("step", "llama", 0.0)} == taken(*same, other).still
    assert {} == taken(*same, pulse.snapshot(None, ())).still


def test_silence_is_counted_until_the_next_pulse() -> None:
    """Each question without an answer adds the time that its asker has seen pass; one answer ends the silence."""
    assert 30.0 == taken({}, None, None, None).silent_s
    assert 0.0 == taken(None, None, {}).silent_s


def test_a_build_that_gets_on_is_not_still() -> None:
    """A beat within a phase, or another phase, is progress; a beat of anything but a build is none."""
    pulse, build = Pulse(), {"model": "llama", "phase": "loading weights"}
    pulse.enter("build")
    first = pulse.snapshot(build, ())
    pulse.beat()
    second = pulse.snapshot(build, ())
    third = pulse.snapshot(build | {"phase": "warming up"}, ())
    assert 0.0 == taken(first, second).still["loop"].seconds
    assert Still("build: warming up", "llama", 10.0) == taken(first, second, third, third).still["loop"]
    pulse.enter("step", "llama")
    before = pulse.snapshot(None, ())
    pulse.beat()
    assert 10.0 == taken(before, pulse.snapshot(None, ())).still["loop"].seconds


def test_a_copy_is_alive_while_its_bytes_come() -> None:
    """The side threads' jobs are in the pulse by model, and the loop may wait for one as long as it gets on."""
    copier, steps = CopyEngine(), [0]
    seen: list[Works] = []
    pulse = Pulse()
    pulse.enter("copy", "llama")

    def work(job: CopyJob) -> None:
        seen.append(pulse.snapshot(None, (copier,)))
        seen.append(pulse.snapshot(None, (copier,)))
        job.advance(7)
        seen.append(pulse.snapshot(None, (copier,)))
        steps[0] += 1

    job = copier.submit("load llama", 7, work)
    assert job.wait(20) and job.succeeded
    copier.close()
    assert "copy" == seen[0]["weights-copy"]["what"]
    assert {10.0} == {work.seconds for work in taken(*seen[:2]).still.values()}
    assert {0.0} == {work.seconds for work in taken(*seen).still.values()}


class StandIn:
    """A stand-in host and its guard, with short limits."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "control")
        self.log = folder / "log"
        words = [sys.executable, "-m", "tests.helpers.pulsing_host", self.path]
        env = {**os.environ, CONTROL_KEY.name: KEY.hex()}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(words, cwd=REPOSITORY, env=env, stderr=log)
        poll(lambda: os.path.exists(self.path))
        self.guard = HostGuard.of("h0", self.process.pid, self.path, KEY, SHORT)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        poll(lambda: self.guard.is_over)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[StandIn]:
    made = StandIn(tmp_path)
    yield made
    made.end()


def stop(host: StandIn) -> None:
    host.process.send_signal(signal.SIGSTOP)


def wedge(host: StandIn) -> None:
    call_host(host.path, KEY, "wedge")


@pytest.mark.parametrize(("hang", "reason"), [(stop, "no pulse for"), (wedge, "in step of llama for")])
def test_a_host_that_hangs_is_overdue_and_then_killed(
    hang: Callable[[StandIn], None], reason: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The process ends by SIGKILL, the log says why, and where it hung if it could write that."""

    def is_told_where(attempt: int) -> bool:
        folder = tmp_path / str(attempt)
        folder.mkdir()
        host = StandIn(folder)
        try:
            poll(lambda: host.guard.snapshot()["works"] == {} and not host.guard.is_overdue)
            hang(host)
            poll(lambda: host.guard.is_overdue)
            assert host.process.poll() is None
            assert host.process.wait(30) in (-signal.SIGKILL, -signal.SIGSEGV)
            assert reason in host.guard.reason and reason in caplog.text
            return "step_that_never_ends" in host.log.read_text()
        finally:
            host.end()

    # Python 3.11 may crash, or find no frames, while it writes the stacks of threads that run.
    attempts = 5 if hang is wedge else 1
    assert (hang is wedge) == any(is_told_where(attempt) for attempt in range(attempts))


def test_a_host_that_comes_back_in_time_lives(host: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    """One that was stopped for less than its limit is overdue meanwhile and alive afterwards."""
    stop(host)
    poll(lambda: host.guard.is_overdue)
    assert host.guard.age_s > 0
    host.process.send_signal(signal.SIGCONT)
    poll(lambda: not host.guard.is_overdue)
    assert host.process.poll() is None
    assert "gets on again" in caplog.text


def test_a_guard_that_was_stopped_itself_kills_nobody() -> None:
    """Time that the keeper has not seen pass, as when all processes are frozen, does not count against a host."""
    asked: list[bool] = []
    hours = itertools.count(0, 3600)  # one between any two looks

    def ask(limit_s: float) -> Works:
        asked.append(guard.is_overdue)
        if len(asked) % 2:
            raise HostError("late")
        return {"loop": {"what": "step", "model": "a", "mark": str(len(asked)), "for_s": 1e6}}

    with subprocess.Popen(["sleep", "60"]) as process:
        guard = HostGuard("h0", process.pid, ask, PulseLimits(2.0, 60.0), clock=lambda: float(next(hours)))
        guard.start()
        poll(lambda: len(asked) >= 6)
        process.terminate()
        assert -signal.SIGTERM == process.wait(20)
    assert {False} == set(asked)
