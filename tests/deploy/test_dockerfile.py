# SPDX-License-Identifier: Apache-2.0
"""The Dockerfile, read as text: no image is built here."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from deploy.lock import lock_text

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
    assert [name for name, _ in INSTRUCTIONS][:2] == ["ARG", "FROM"]


def test_the_base_is_pinned_to_a_patch_version():
    """The base has a full version of a Python that the package allows, and no floating tag."""
    assert all_of("FROM") == ["${BASE}"]
    (base,) = (rest.removeprefix("BASE=") for rest in all_of("ARG") if rest.startswith("BASE="))
    version = re.fullmatch(r"python:(\d+)\.(\d+)\.(\d+)-slim-\w+", base)
    assert version is not None
    assert (int(version[1]), int(version[2])) >= (3, 11)
    assert PYPROJECT["project"]["requires-python"] == ">=3.11"


def install(folder: Path, **arguments: str) -> tuple[int, list[str], str]:
    """Run the step that installs, with programs that only note their words: exit status, those words, what was said."""
    (script,) = (rest for rest in all_of("RUN") if "pip install" in rest)
    for name in ("pip", "python"):
        program = folder / name
        program.write_text(f'#!/bin/sh\necho "$*" >> {folder}/calls\n')
        program.chmod(0o755)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "TORCH_VERSION": "1", "TORCH_CPU_INDEX": "index", **arguments}
    done = subprocess.run(["sh", "-c", script], cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    calls = folder / "calls"
    return done.returncode, calls.read_text().splitlines() if calls.exists() else [], done.stderr


BASE = "python:3.11.14-slim-bookworm"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_release_is_made_of_what_has_a_hash(device, tmp_path):
    """With RELEASE=1 neither a base without a digest nor a package without a hash goes in."""
    status, calls, said = install(tmp_path, DEVICE=device, RELEASE="1", BASE=BASE)
    assert status != 0 and calls == [] and "give BASE with its digest" in said
    pinned = f"{BASE}@sha256:{'0' * 64}"
    status, calls, said = install(tmp_path, DEVICE=device, RELEASE="1", BASE=pinned)
    assert status != 0 and calls == [] and f"python -m deploy.lock {device}" in said
    (tmp_path / "locks").mkdir()
    (tmp_path / "locks" / f"{device}.txt").touch()
    status, calls, _ = install(tmp_path, DEVICE=device, RELEASE="1", BASE=pinned)
    assert status == 0
    assert calls == [
        f"install --no-cache-dir --no-deps --require-hashes -r locks/{device}.txt --extra-index-url index",
        "install --no-cache-dir --no-deps .",
        *(["cpu_torchvision.py"] if device == "cpu" else []),
    ]


def test_without_a_lock_the_extras_are_resolved(tmp_path):
    """A build for oneself needs no lock; one with an unknown device ends."""
    status, calls, _ = install(tmp_path, DEVICE="cpu", RELEASE="0", BASE=BASE)
    assert status == 0 and calls[-2:] == ["uninstall -y torchaudio torchcodec triton", "cpu_torchvision.py"]
    assert "install --no-cache-dir .[cpu,audio,cluster]" in calls
    assert install(tmp_path, DEVICE="tpu", RELEASE="0", BASE=BASE)[0] != 0


def test_the_locks_have_every_dependency_with_its_hash():
    """Each line is one version with a hash; what pyproject.toml pins has that version."""
    for path in (ROOT / "deploy" / "locks").glob("*.txt"):
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        found = dict(re.fullmatch(r"([a-z0-9-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line).groups() for line in lines)
        assert len(lines) == len(found) > 100
        extras = PYPROJECT["project"]["optional-dependencies"]
        for wanted in [*PYPROJECT["project"]["dependencies"], *extras[path.stem], *extras["audio"], *extras["cluster"]]:
            name, exact, version = wanted.partition("==")
            name = re.match(r"[a-z0-9-]+", name)[0]
            assert name in found
            assert not exact or found[name].partition("+")[0] == version


def test_a_lock_has_what_pip_has_resolved():
    """Names as an index has them, in order; not the package itself, nor what breaks vLLM's CPU build."""
    items = [("tokenpool", "1", None), ("Torch_x", "2.0+cpu", "b" * 64), ("torchaudio", "3", "c" * 64)]
    items += [("A.b", "1", "a")]
    report = {
        "install": [
            {"metadata": {"name": n, "version": v}, "download_info": {"archive_info": {"hashes": {"sha256": h}}}}
            for n, v, h in items
        ]
    }
    assert lock_text(report, "cpu", "here").splitlines()[2:] == [
        "a-b==1 --hash=sha256:a", f"torch-x==2.0+cpu --hash=sha256:{'b' * 64}",
    ]  # fmt: skip


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
    """The image's exist; torch and torchvision are the versions that `make setup` installs."""
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert {"cpu", "cuda", "audio", "cluster"} <= extras.keys()
    assert '".[${DEVICE},audio,cluster]"' in " ".join(all_of("RUN"))
    for name in ("TORCH", "TORCHVISION"):
        (version,) = re.findall(rf"^{name} = (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert f"{name}_VERSION={version}" in all_of("ARG")
        assert f"{name.lower()}=={version}" in extras["cpu"]


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
