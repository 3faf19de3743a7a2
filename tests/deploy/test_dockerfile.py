# SPDX-License-Identifier: Apache-2.0
"""The Dockerfile, read as text: no image is built here."""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.deploy

ROOT = Path(__file__).parents[2]
PATH = ROOT / "deploy" / "Dockerfile"


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, rest) of each, comments removed and continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word
    ]


INSTRUCTIONS = instructions(PATH.read_text())
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def all_of(word: str) -> list[str]:
    return [rest for name, rest in INSTRUCTIONS if name == word]


def test_every_instruction_is_known():
    """A misspelt instruction would fail only when somebody builds."""
    known = {"FROM", "ARG", "RUN", "WORKDIR", "COPY", "ENV", "USER", "EXPOSE", "STOPSIGNAL", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in INSTRUCTIONS} == known
    assert INSTRUCTIONS[0][0] == "FROM"


def test_the_base_is_pinned_to_a_patch_version():
    """The base has a full version of a Python that the package allows, and no floating tag."""
    (base,) = all_of("FROM")
    version = re.fullmatch(r"python:(\d+)\.(\d+)\.(\d+)-slim-\w+", base)
    assert version is not None
    assert (int(version[1]), int(version[2])) >= (3, 11)
    assert PYPROJECT["project"]["requires-python"] == ">=3.11"


def test_it_runs_as_the_charts_user():
    """The last USER is a number, not root, and the one of the chart's securityContext."""
    values = yaml.safe_load((ROOT / "deploy" / "chart" / "values.yaml").read_text())
    user = all_of("USER")[-1]
    assert user == f"{values['userId']}:{values['userId']}"
    after = [name for name, _ in INSTRUCTIONS][[name for name, _ in INSTRUCTIONS].index("USER") :]
    assert "RUN" not in after and "COPY" not in after


def test_what_is_copied_exists_and_is_sent_to_the_builder():
    """Every COPY names files of the repository, and .dockerignore lets them through."""
    ignored = (PATH.parent / "Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "*"
    sent = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {source for rest in all_of("COPY") for source in rest.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    assert copied == sent
    packages = {folder.split("/")[0] for folder in PYPROJECT["tool"]["setuptools"]["package-dir"].values()}
    assert packages <= copied
    assert {PYPROJECT["project"]["readme"], *PYPROJECT["project"]["license-files"]} <= copied


def test_no_secret_goes_into_the_image():
    """Neither ARG nor ENV holds a key: both stay readable in the image."""
    names = [re.split(r"[=\s]", rest)[0] for rest in all_of("ARG")]
    names += re.findall(r"(\w+)=", " ".join(all_of("ENV")))
    assert names
    assert not [
        name for name in names for bad in ("*KEY*", "*TOKEN*", "*SECRET*", "*PASSWORD*") if fnmatch.fnmatch(name, bad)
    ]


def test_the_extras_are_those_of_the_package():
    """`cpu`, `cuda` and `cluster` exist, and torch is the version that `make setup` installs."""
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert {"cpu", "cuda", "cluster"} <= extras.keys()
    assert '".[${DEVICE},cluster]"' in " ".join(all_of("RUN"))
    (version,) = re.findall(r"^TORCH = (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert f"TORCH_VERSION={version}" in all_of("ARG")
    assert f"torch=={version}" in extras["cpu"]


def test_it_starts_what_the_chart_starts():
    """Entry point and default arguments are the chart's command and args; the port is the chart's."""
    template = (ROOT / "deploy" / "chart" / "templates" / "deployment.yaml").read_text()
    command, args = (re.search(rf"{key}: (\[.*\])", template)[1] for key in ("command", "args"))
    assert json.loads(all_of("ENTRYPOINT")[0]) == yaml.safe_load(command)
    assert json.loads(all_of("CMD")[0]) == yaml.safe_load(args)
    values = yaml.safe_load((ROOT / "deploy" / "chart" / "values.yaml").read_text())
    assert all_of("EXPOSE") == [str(values["port"])]


def test_the_entry_point_is_a_script_of_the_package():
    """`tokenpool` is installed by pyproject.toml."""
    assert "tokenpool" in PYPROJECT["project"]["scripts"]
