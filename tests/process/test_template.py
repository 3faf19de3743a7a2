# SPDX-License-Identifier: Apache-2.0
"""A child that a template has forked is what a spawned one would be, and needs the template no more."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.server import REPOSITORY, child_pids, is_running, poll
from tests.process.told_child import files_of
from tokenpool.process import template as template_module
from tokenpool.process.birth import Birth
from tokenpool.process.forked_child import ForkedChild, WatchedChild
from tokenpool.process.template import Template

pytestmark = pytest.mark.cpu

COMMAND = (sys.executable, "-m", "tests.process.told_child")
OWN = {"OWN_VARIABLE": "of one child"}


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def children() -> Callable[[], set[int]]:
    """Processes that a test has started; a server of the whole session may be a child as well."""
    before = child_pids(os.getpid())
    return lambda: child_pids(os.getpid()) - before


@pytest.fixture
def template(children: Callable[[], set[int]]) -> Iterator[Template]:
    made = Template(COMMAND)
    yield made
    made.stop()


def forked(template: Template, path: Path, *words: str, env: Mapping[str, str] | None = None) -> ForkedChild:
    child = template.fork([str(path), *words], os.environ if env is None else env, OWN)
    assert child is not None
    return child


def spawned(path: Path) -> subprocess.Popen[bytes]:
    env = {**os.environ, **OWN}
    return subprocess.Popen([*COMMAND, str(path)], env=env, stdin=subprocess.DEVNULL, start_new_session=True)


def told(path: Path) -> dict[str, Any]:
    poll(path.exists)
    found = json.loads(path.read_text())
    path.unlink()
    return found


def end(*children: ForkedChild | subprocess.Popen[bytes]) -> None:
    for child in children:
        child.kill()
        assert -signal.SIGKILL == child.wait()


def test_a_forked_child_is_as_a_spawned_one(template: Template, tmp_path: Path) -> None:
    """Its environment, files, limits, signals, group, parent and command line; only what chance gives differs."""
    path = tmp_path / "told"
    one = forked(template, path)
    by_fork = told(path)
    two = spawned(path)
    by_spawn = told(path)

    assert by_fork.pop("chance") != by_spawn.pop("chance")
    caught = [int(each["status"].pop("SigCgt"), 16) for each in (by_fork, by_spawn)]
    assert caught[1] == caught[0] & ~(1 << 32)  # glibc's own, of a process that has had a thread
    assert by_spawn == by_fork
    assert files_of(two.pid) == files_of(one.pid) and ["0", "1", "2"] == sorted(files_of(one.pid))
    command = Path(f"/proc/{two.pid}/cmdline").read_bytes()
    assert command == Path(f"/proc/{one.pid}/cmdline").read_bytes().rstrip(b"\0") + b"\0"
    end(one, two)


def test_what_one_child_gets_no_other_process_has(template: Template, tmp_path: Path) -> None:
    """Neither the template nor a later child; nor can anybody read it in /proc."""
    path, env = tmp_path / "told", dict(os.environ)
    one = template.fork([str(path)], env, {"OWN_VARIABLE": "one"})
    first = told(path)
    two = template.fork([str(path)], env, {"OWN_VARIABLE": "two"})
    second = told(path)
    assert one is not None and two is not None

    assert ["one", "two"] == [each["environment"]["OWN_VARIABLE"] for each in (first, second)]
    assert first["chance"] != second["chance"]
    for pid in (template.snapshot()["pid"], one.pid, two.pid):
        shown = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert b"OWN_VARIABLE=" in shown
    end(one, two)


def test_children_outlive_their_template(template: Template, tmp_path: Path) -> None:
    """Whoever kills it changes nothing but that there is another one soon."""
    child = forked(template, tmp_path / "told")
    before = template.snapshot()["pid"]
    os.kill(before, signal.SIGKILL)
    another = forked(template, tmp_path / "other")  # waits for the next one

    assert before != template.snapshot()["pid"]
    assert child.poll() is None and os.getpid() == told(tmp_path / "told")["parent"]
    template.stop()
    assert None is child.poll() is another.poll()
    assert template.fork([str(tmp_path / "none")], os.environ, OWN) is None
    end(child, another)


def test_a_template_that_is_stopped_holds_nobody_up(
    template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: Callable[[], set[int]]
) -> None:
    """Who wants a child is told soon that there is none; the next one comes from another template."""
    monkeypatch.setattr(template_module, "_ANSWER_LIMIT_S", 0.2)
    monkeypatch.setattr(template_module, "_AFTER_REFUSAL_S", 0.0)
    child = forked(template, tmp_path / "told")
    stopped = template.snapshot()["pid"]
    os.kill(stopped, signal.SIGSTOP)

    assert template.fork([str(tmp_path / "none")], os.environ, OWN) is None
    poll(lambda: template.snapshot()["state"] == "ready")
    another = forked(template, tmp_path / "other")
    assert not is_running(stopped)
    assert {child.pid, another.pid, template.snapshot()["pid"]} == children()
    end(child, another)


def test_a_template_that_stops_while_nobody_asks_is_replaced(
    template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: Callable[[], set[int]]
) -> None:
    """It is asked now and then; one that is stopped before its imports are done is seen too."""
    monkeypatch.setattr(template_module, "_ANSWER_LIMIT_S", 0.2)
    monkeypatch.setattr(template_module, "_LOOK_S", 0.1)
    template.begin(os.environ, OWN)
    importing = poll(lambda: template.snapshot()["pid"])
    os.kill(importing, signal.SIGSTOP)
    ready = poll(template.snapshot, until=lambda now: now["state"] == "ready")
    os.kill(ready["pid"], signal.SIGSTOP)
    last = poll(template.snapshot, until=lambda now: now["state"] == "ready" and now["pid"] != ready["pid"])

    assert 3 == len({importing, ready["pid"], last["pid"]})
    assert {last["pid"]} == children()


def test_a_child_has_what_its_owner_has_become(template: Template, tmp_path: Path) -> None:
    """Another environment, folder or mask makes another template; limits are the child's own."""
    path = tmp_path / "told"
    children = [forked(template, path)]
    pids = [template.snapshot()["pid"]]
    before = told(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    mask = os.umask(0o027)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
        children.append(forked(template, path))
        pids.append(template.snapshot()["pid"])
        after = told(path)
        children.append(forked(template, path, env={**os.environ, "ANOTHER": "1"}))
        pids.append(template.snapshot()["pid"])
        third = told(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.umask(mask)

    assert 3 == len(set(pids))
    changed = {name for name, limits in after["limits"].items() if limits != before["limits"][name]}
    assert ("0027", {"RLIMIT_NOFILE", "RLIMIT_OFILE"}) == (after["status"]["Umask"], changed)
    assert ("1", None) == (third["environment"].get("ANOTHER"), after["environment"].get("ANOTHER"))
    end(*children)


@pytest.mark.parametrize(("number", "difference"), [(signal.SIGINT, ""), (signal.SIGQUIT, "SigIgn")])
def test_a_shell_in_the_background_makes_no_second_template(number: int, difference: str) -> None:
    """Such a shell has servers ignore SIGINT, which they handle later; what else they ignore, their children must."""
    kept = signal.signal(number, signal.SIG_IGN)
    try:
        before = Birth.now({})
        signal.signal(number, lambda *_: None)
        assert difference == Birth.now({}).difference(before)
    finally:
        signal.signal(number, kept)


@pytest.mark.parametrize(
    ("done", "why"),
    [
        ("import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()", "2 threads"),
        ("import os, builtins; builtins.kept = open(os.devnull)", "open files: /dev/null"),
        ("import subprocess, builtins; builtins.kept = subprocess.Popen(['sleep', '60'])", "children"),
    ],
)
def test_a_template_that_cannot_be_forked_well_is_not(
    template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    done: str, why: str,
) -> None:  # fmt: skip
    """A thread, a file or a child of the template: hosts are started as processes, and the log says why, once."""
    script = tmp_path / "script"
    script.write_text(done)
    monkeypatch.setenv("TOLD_CHILD", str(script))
    for _ in range(2):
        assert template.fork([str(tmp_path / "none")], os.environ, OWN) is None

    assert {"pid": None, "state": "unfit"} == template.snapshot()
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert 1 == len(warnings) and why in warnings[0]


def test_how_a_child_ends_is_seen(template: Template, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its status, a signal, and a traceback where it raises; a group of its own can be killed."""
    failing = forked(template, tmp_path / "none", "fail")
    leaving = forked(template, tmp_path / "none", "exit", "7")
    running = forked(template, tmp_path / "told")
    told(tmp_path / "told")
    assert (None, 1, 7) == (running.poll(), failing.wait(30), leaving.wait(30))
    with pytest.raises(subprocess.TimeoutExpired):
        running.wait(0.01)
    os.killpg(running.pid, signal.SIGTERM)

    assert (-signal.SIGTERM, -signal.SIGTERM) == (running.wait(30), running.returncode)
    assert "RuntimeError: it has to fail" in capfd.readouterr().err
    running.terminate()  # nobody is hit


def test_an_event_loop_sees_how_a_child_ends(template: Template, tmp_path: Path) -> None:
    """As it sees that of a child it has started itself."""

    async def test() -> None:
        ending = WatchedChild(forked(template, tmp_path / "none", "exit", "7"))
        running = WatchedChild(forked(template, tmp_path / "told"))
        assert 7 == await ending.wait() == ending.returncode
        assert running.returncode is None
        waits = [asyncio.create_task(running.wait()) for _ in range(2)]
        running.terminate()
        assert [-signal.SIGTERM] * 2 == await asyncio.gather(*waits)
        running.kill()  # nobody is hit

    asyncio.run(test())


OWNER = """
import os, signal, sys, time
from tokenpool.process.template import Template
template = Template([sys.executable, "-m", "tests.process.told_child"])
child = template.fork([sys.argv[1]], os.environ, {})
print(child.pid, template.snapshot()["pid"], flush=True)
time.sleep(60)
"""


def test_a_killed_owner_takes_child_and_template_along(tmp_path: Path) -> None:
    """Whatever they do at that moment: the kernel sees to it."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path / "told")], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    pids = [int(word) for word in owner.stdout.readline().split()]
    assert owner.pid == told(tmp_path / "told")["parent"]
    os.kill(pids[1], signal.SIGSTOP)
    owner.kill()
    owner.wait()

    poll(lambda: not any(map(is_running, pids)))


def test_a_template_is_the_first_to_go_when_memory_is_short(template: Template, tmp_path: Path) -> None:
    """The kernel prefers it to all others of the pool; its children have their owner's place."""
    child = forked(template, tmp_path / "told")
    score = int(Path("/proc/self/oom_score_adj").read_text())

    assert score == int(told(tmp_path / "told")["oom_score"])
    assert 900 <= int(Path(f"/proc/{template.snapshot()['pid']}/oom_score_adj").read_text())
    end(child)


def test_a_template_that_takes_too_much_memory_is_not_kept(
    template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own memory, which no file holds, has a limit."""
    monkeypatch.setattr(template_module, "_MEMORY_LIMIT", 1 << 20)

    assert template.fork([str(tmp_path / "none")], os.environ, OWN) is None
    assert "unfit" == template.snapshot()["state"]


def test_a_child_of_which_its_owner_lost_sight_does_not_begin(
    template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: Callable[[], set[int]]
) -> None:
    """It ends, and no process is left."""
    template.begin(os.environ, OWN)
    poll(lambda: template.snapshot()["state"] == "ready")
    failures = [OSError("no descriptors left")]

    def make(pid: int) -> ForkedChild:
        if failures:
            raise failures.pop()
        return ForkedChild(pid)

    monkeypatch.setattr(template_module, "ForkedChild", make)

    assert template.fork([str(tmp_path / "none")], os.environ, OWN) is None
    assert not (tmp_path / "none").exists()
    poll(lambda: not children())
