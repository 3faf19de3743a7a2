# SPDX-License-Identifier: Apache-2.0
"""Series of models that are gone leave the scrape, and all others stay as they are, to the last digit.

prometheus_client chooses its mode at import, so each test runs its code in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.cpu

SETUP = """
import json, os, random, sys, threading
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, REGISTRY
from prometheus_client.multiprocess import MultiProcessCollector
from tokenpool.process import metric_files
from tokenpool.process.metric_files import forget_models

def scrape():
    registry = REGISTRY
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
    samples = {}
    for family in registry.collect():
        for s in family.samples:
            if s.name.startswith("x_") and not s.name.endswith("_created"):
                samples[" ".join([s.name, *(s.labels[label] for label in sorted(s.labels))])] = s.value
    return samples

def show(value):
    print(json.dumps(value))

counter = Counter("x_c", "A counter.", ["model_name", "kind"])
gauge = Gauge("x_g", "A gauge.", ["kind", "model_name"], multiprocess_mode="livemostrecent")
histogram = Histogram("x_h", "A histogram.", ["model_name"], buckets=[1, 2])
total = Counter("x_t", "Of no model.")

def write(model, value):
    counter.labels(model, "k").inc(value)
    gauge.labels("k", model).set(value)
    histogram.labels(model).observe(value)
    total.inc(value)
"""


def run(code: str, folder: Path | None, within: Sequence[str] = ()) -> list[Any]:
    """Run code after SETUP, with `folder` for the files of the multiprocess mode; returns what it has shown.

    `within` are words before the command.
    """
    env = {name: value for name, value in os.environ.items() if name != "PROMETHEUS_MULTIPROC_DIR"}
    if folder is not None:
        env["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    command = [*within, sys.executable, "-c", SETUP + code]
    out = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [json.loads(line) for line in out.splitlines()]


def of(samples: dict[str, float], model: str) -> dict[str, float]:
    return {name: value for name, value in samples.items() if model in name.split(" ")}


@pytest.mark.parametrize("multiprocess", [True, False], ids=["files", "no files"])
def test_a_forgotten_model_has_no_series_and_the_others_have_theirs(tmp_path, multiprocess):
    """Counters, gauges and histograms, with and without the multiprocess mode; what goes on counting goes on."""
    code = """
write("a", 1.5); write("b", 2.5); write("aa", 0.5)
show(scrape()); forget_models({"a"}); show(scrape()); write("b", 1); show(scrape())
"""
    before, after, later = run(code, tmp_path if multiprocess else None)

    assert of(before, "a")["x_c_total k a"] == 1.5
    assert after == {name: value for name, value in before.items() if name not in of(before, "a")}
    assert (later["x_c_total k b"], later["x_g k b"], later["x_h_count b"]) == (3.5, 1, 2)
    assert later["x_t_total"] == 5.5


@pytest.mark.parametrize("multiprocess", [True, False], ids=["files", "no files"])
def test_a_model_of_the_same_name_starts_anew(tmp_path, multiprocess):
    """It does not go on where the one before it stopped."""
    code = 'write("a", 7); forget_models({"a"}); gauge.labels("k", "a"); write("a", 1); show(scrape())'
    (after,) = run(code, tmp_path if multiprocess else None)

    assert (after["x_c_total k a"], after["x_g k a"], after["x_h_sum a"]) == (1, 1, 1)


def test_random_histories_agree_with_a_plain_dict(tmp_path):
    """Whatever is written and forgotten in whatever order, with names that look alike in JSON."""
    code = """
names = ["a", "b", "org/a", 'q"uote', "back\\\\slash", "a, b", "model_name", "ü", "k"]
for seed in range(3):
    dice, truth = random.Random(seed), {}
    for _ in range(400):
        if dice.random() < 0.9:
            name, value = dice.choice(names), dice.randrange(1, 9)
            counter.labels(name, "k").inc(value)
            truth[name] = truth.get(name, 0) + value
        else:
            gone = set(dice.sample(names, dice.randrange(4)))
            forget_models(gone)
            truth = {name: value for name, value in truth.items() if name not in gone}
        read = {n.removeprefix("x_c_total k "): v for n, v in scrape().items() if "x_c_total" in n}
        assert read == truth, (seed, read, truth)
    forget_models(names)
show("ok")
"""
    assert run(code, tmp_path) == ["ok"]


def test_files_shrink(tmp_path):
    """A thousand names that come and go leave no more behind than one."""
    code = """
def size():
    return sum(file._used for file in metric_files._open_files().values())
write("keep", 1); write("m", 1); forget_models({"m"}); before = size()
for i in range(1000):
    write(f"m-{i}", 1); forget_models({f"m-{i}"})
show([before, size()])
"""
    ((before, after),) = run(code, tmp_path)
    assert before == after


def test_files_of_processes_that_ended_lose_the_model_and_those_of_others_stay(tmp_path):
    """A dead host's counters are kept, so that sums do not fall; a running process writes its own file."""
    run('write("a", 1); write("b", 2)', tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", SETUP + 'write("a", 10); write("b", 20); show("up"); input()'],
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdin is not None
        assert other.stdout is not None
        assert json.loads(other.stdout.readline()) == "up"
        (alive,) = run('forget_models({"a"}); show(scrape())', tmp_path)
        other.stdin.write("\n")
    (ended,) = run('forget_models({"a"}); show(scrape())', tmp_path)

    assert (alive["x_c_total k a"], alive["x_c_total k b"]) == (10, 22)
    assert set(of(ended, "a")) <= {"x_g k a"}, "a gauge of the living kind leaves with its file"
    assert (ended["x_c_total k b"], ended["x_t_total"]) == (22, 33)


def test_whoever_scrapes_meanwhile_sees_all_of_the_others(tmp_path):
    """Each scrape, from another thread, finds what is never forgotten, in full."""
    code = """
write("keep", 3)
expected = {name: value for name, value in scrape().items() if "keep" in name}
seen, done = [], threading.Event()
def look():
    while not done.is_set():
        seen.append({name: value for name, value in scrape().items() if "keep" in name})
thread = threading.Thread(target=look); thread.start()
i = 0
while len(seen) < 50:
    counter.labels(f"m-{i}", "k").inc(); forget_models({f"m-{i}"}); i += 1
done.set(); thread.join()
show([i > 0, all(each == expected for each in seen)])
"""
    assert run(code, tmp_path) == [[True, True]]


def test_series_of_adapters_go_with_their_names(tmp_path):
    """vLLM lists the adapters that run and wait in labels."""
    code = """
lora = Gauge("x_l", "Adapters.", ["running_lora_adapters", "waiting_lora_adapters"], multiprocess_mode="sum")
for labels in [("a,l", ""), ("", "l"), ("b", "ll"), ("", "")]:
    lora.labels(*labels).set(1)
forget_models({"l"}); show(sorted(name for name in scrape() if name.startswith("x_l")))
"""
    assert run(code, tmp_path) == [["x_l  ", "x_l b ll"]]


def test_a_full_disk_changes_nothing(tmp_path):
    """The series stay, are counted on, and nothing is raised: a model is removed all the same."""
    code = """
def full(*paths):
    raise OSError(28, "No space left on device")
write("a", 1); write("b", 1)
replace, os.replace = os.replace, full
forget_models({"a"}); write("b", 1); show(scrape()); show(os.listdir(os.environ["PROMETHEUS_MULTIPROC_DIR"]))
os.replace = replace
forget_models({"a"}); show(scrape())
"""
    full, files, later = run(code, tmp_path)

    assert (full["x_c_total k a"], full["x_c_total k b"]) == (1, 2)
    assert all(file.endswith(".db") for file in files)
    assert not of(later, "a")
    assert later["x_c_total k b"] == 2


FULL = """
metric_files.outlast_full_disks()
numbers, folder = range(900), os.environ["PROMETHEUS_MULTIPROC_DIR"]
write("a", 1)
fill()
for number in numbers:
    write(f"m{number}", number + 1)
write("a", 1)
show(counter.labels("a", "k")._value.get())
show([counter.labels(f"m{n}", "k")._value.get() for n in numbers] == [n + 1 for n in numbers])
show(scrape()["x_c_total k a"])
Counter("x_n", "Made when there is no room.", ["model_name"]).labels("a").inc()
Gauge("x_o", "In a file of its own.", multiprocess_mode="livesum").set(3)
empty()
forget_models({"m0"}); write("m0", 5)
after = scrape()
show([after["x_c_total k a"], after["x_c_total k m0"], after["x_c_total k m899"]])
"""


def _check_full(shown: list[Any]) -> None:
    value, are_right, scraped, later = shown
    assert (value, are_right, scraped) == (2, True, 1), "the scrape has what was there before"
    assert later == [2, 5, 900], "and all again, once there is room"


def test_a_process_goes_on_without_room_for_its_metrics(tmp_path):
    """As long as nothing can be reserved, values are kept and the scrape has those of before."""
    code = """
import errno
reserve = os.posix_fallocate
def refuse(*_):
    raise OSError(errno.ENOSPC, "No space left on device")
def fill():
    os.posix_fallocate = refuse
def empty():
    os.posix_fallocate = reserve
"""
    _check_full(run(code + FULL, tmp_path))


def test_a_disk_that_is_full_kills_no_process(tmp_path):
    """A real one: prometheus_client by itself is killed by SIGBUS there."""
    code = """
def fill():
    file = os.open(f"{folder}/fill", os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(file, bytes(4096))
    except OSError:
        os.close(file)
def empty():
    os.unlink(f"{folder}/fill")
"""
    mount = f"mount -t tmpfs -o size=1536k tmpfs '{tmp_path}'"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "sh", "-c", mount]).returncode:
        pytest.skip("no file system can be mounted here")
    _check_full(run(code + FULL, tmp_path, ("unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh")))


def test_a_hosts_gauges_forget_a_model_that_came_again(tmp_path):
    """A gauge that is replaced as a whole shows no zeros of models that are gone, and a new one as it is."""
    code = """
from types import SimpleNamespace
from tokenpool.host.metrics import HostMetrics
from tokenpool.metric_registry import LabelledGauge
made = LabelledGauge("pages")
made.replace({("kv", "a"): 3, ("kv", "b"): 4}); made.replace({("kv", "b"): 4})
def pages():
    registry = CollectorRegistry(); MultiProcessCollector(registry)
    return sorted([*s.labels.values(), s.value] for f in registry.collect() for s in f.samples if "pages" in s.name)
show(pages())
made.forget({"a"}); forget_models({"a"}); made.replace({("kv", "b"): 5}); show(pages())
made.replace({("kv", "a"): 1, ("kv", "b"): 5}); show(pages())
"""
    zeroed, gone, again = run(code, tmp_path)

    assert zeroed == [["a", "kv", 0], ["b", "kv", 4]]
    assert gone == [["b", "kv", 5]]
    assert again == [["a", "kv", 1], ["b", "kv", 5]]
