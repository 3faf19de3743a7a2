# SPDX-License-Identifier: Apache-2.0
"""`--cluster` on the command line, and the line that `tokenpool job` makes of a pool file."""

from __future__ import annotations

import shlex
import sys

import pytest

from tokenpool.errors import ConfigError
from tokenpool.serve.cli import main
from tokenpool.serve.command_line import take_cluster
from tokenpool.serve.job_tool import job, submit_line

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
    assert job(["--address", "http://head:8265", str(pool_file), "--port", "8001"]) == 0

    job_words, _, served = capsys.readouterr().out.partition(" -- ")
    assert "ray job submit --address http://head:8265 --submission-id tokenpool-blue --no-wait" == job_words
    assert shlex.split(f"tokenpool serve {pool_file} --port 8001 --cluster auto") == shlex.split(served)


@pytest.mark.parametrize(
    ("words", "problem"),
    [([], "give one pool file"), (["--cluster", "auto"], "--cluster: a job serves on the cluster")],
)
def test_what_makes_no_job_is_refused(pool_file, words, problem):
    """A job needs a pool file, and its own cluster."""
    with pytest.raises(ConfigError, match=problem):
        submit_line([*words, str(pool_file)] if words else [], None)
