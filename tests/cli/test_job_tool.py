# SPDX-License-Identifier: Apache-2.0
"""`--cluster` on the command line, and the line that `tokenpool job` makes of a pool file."""

from __future__ import annotations

import shlex
import sys

import pytest

from tokenpool.cli.command_line import take_cluster
from tokenpool.cli.job import submit_line
from tokenpool.cli.main import main
from tokenpool.errors import ConfigError

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(
    ("words", "address", "rest"),
    [
        (["pool.yaml"], None, ["pool.yaml"]),
        (["pool.yaml", "--cluster"], "auto", ["pool.yaml"]),
        (["--cluster", "pool.yaml"], "auto", ["pool.yaml"]),
        (["--cluster", "org/model"], "auto", ["org/model"]),
        (["pool.yaml", "--cluster", "local", "--port", "1"], "local", ["pool.yaml", "--port", "1"]),
        (["--cluster", "10.0.0.1:6379", "pool.yaml"], "10.0.0.1:6379", ["pool.yaml"]),
        (["--cluster=head:6379", "pool.yaml"], "head:6379", ["pool.yaml"]),
    ],
)
def test_the_cluster_flag_takes_an_address_if_one_follows(words, address, rest):
    """A model or a pool file behind the flag is not its value."""
    assert (address, rest) == take_cluster(words)


def test_an_empty_address_is_refused():
    """`--cluster=` says nothing."""
    with pytest.raises(ConfigError, match="--cluster: needs a value"):
        take_cluster(["--cluster="])


def test_a_cluster_needs_ray(pool_file, monkeypatch, capsys):
    """Without Ray the flag is refused in one line that says what to install; vLLM is not even imported."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")

    assert main(["serve", str(pool_file), "--cluster"]) == 2
    assert "tokenpool: error: --cluster needs Ray: pip install 'tokenpool[cluster]'\n" == capsys.readouterr().err


@pytest.fixture
def pool_file(tmp_path):
    path = tmp_path / "pool.yaml"
    path.write_text("models: [{name: a, model: x/y}]\ncluster: {name: blue}\n")
    return path


def test_the_line_serves_the_file_on_the_cluster(pool_file, capsys):
    """The job is named after the pool, and the path holds wherever it runs."""
    assert main(["job", "--address", "http://head:8265", str(pool_file), "--port", "8001"]) == 0

    job_words, _, served = capsys.readouterr().out.partition(" -- ")
    assert "ray job submit --address http://head:8265 --submission-id tokenpool-blue --no-wait" == job_words
    assert shlex.split(f"tokenpool serve {pool_file} --port 8001 --cluster auto") == shlex.split(served)


@pytest.fixture
def ray(tmp_path, monkeypatch):
    """The path of the `ray` that is submitted with; a test writes it."""
    monkeypatch.setattr("tokenpool.cli.job.find_spec", lambda name: name)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "ray"


@pytest.mark.parametrize(("ends", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", -15)])
def test_a_submission_ends_as_ray_does(ends, status, pool_file, ray, tmp_path):
    """`ray` gets the line that is printed otherwise, and its status is passed on; that of a signal is negative."""
    ray.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/given\n{ends}\n')
    ray.chmod(0o755)

    assert main(["job", "--submit", str(pool_file)]) == status
    assert (tmp_path / "given").read_text().split() == submit_line([str(pool_file)], None)[1:]


def test_a_submission_without_ray_is_told(pool_file, ray, capsys):
    """A line, and the status with which a shell says that a program is not there."""
    assert main(["job", "--submit", str(pool_file)]) == 127
    assert "tokenpool: error: ray cannot be run: No such file or directory\n" == capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "give one pool file"),
        (["--cluster", "auto"], "--cluster: a job serves on the cluster"),
        (["--max-model-len", "512"], "--max-model-len: --max-model-len is no pool flag"),
    ],
)
def test_what_makes_no_job_is_refused(pool_file, words, problem):
    """A job needs a pool file, and its own cluster."""
    with pytest.raises(ConfigError, match=problem):
        submit_line([*words, str(pool_file)] if words else [], None)
