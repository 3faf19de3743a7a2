# SPDX-License-Identifier: Apache-2.0
"""The script of `tokenpool completion` knows every command and flag, and completes them in a real shell."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tokenpool.cli.main import main
from tokenpool.cli.tree import COMMANDS
from tokenpool.serve.launch.flags import known_flags

pytestmark = pytest.mark.vllm

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
_shtab_tokenpool
printf '%s\\n' "${COMPREPLY[@]}"
"""
"""Completes the last of the words, as bash does when Tab is pressed behind it."""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script for bash."""
    path = tmp_path_factory.mktemp("completion") / "tokenpool"
    with pytest.MonkeyPatch.context() as patch, path.open("w") as file:
        patch.setattr("sys.stdout", file)
        assert 0 == main(["completion", "bash"])
    return path


def completed(script: Path, *words: str) -> set[str]:
    """What bash offers in place of the last word."""
    command = ["bash", "-c", ASK, "bash", str(script), "tokenpool", *words]
    return set(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split())


def test_bash_takes_the_script(script: Path) -> None:
    """Its syntax is right."""
    assert 0 == subprocess.run(["bash", "-n", str(script)], timeout=60).returncode


def test_every_command_is_offered(script: Path) -> None:
    """Those of the help, and what lies below them."""
    assert set(COMMANDS) == completed(script, "")
    assert {"new", "hash"} == completed(script, "key", "")
    assert {"serve"} == completed(script, "bench", "")


@pytest.mark.parametrize("command", ["top", "trace", "sim", "plan", "bench serve", "job"])
def test_every_flag_of_the_help_is_offered(script: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """None is missing, none is made up."""
    assert 0 == main([*command.split(), "--help"])
    told = {word for word in capsys.readouterr().out.replace("[", " ").split() if word.startswith("--")}

    assert completed(script, *command.split(), "--") == {word.strip(",)].;") for word in told} - {"--"}


@pytest.mark.parametrize("command", ["serve", "validate", "doctor"])
def test_the_flags_of_vllm_are_offered_beside_the_pools(script: Path, command: str) -> None:
    """Where they are taken."""
    flags = {flag for flag in known_flags() if flag.startswith("--")}

    assert len(flags) > 200
    assert flags | {"--device-memory", "--turn-policy"} <= completed(script, command, "--")


def test_files_are_offered_where_one_is_expected(script: Path, tmp_path: Path) -> None:
    """As the pool file of `serve`, and as the value of a flag."""
    (tmp_path / "pool.yaml").touch()
    start = f"{tmp_path}/po"

    assert {f"{tmp_path}/pool.yaml"} == completed(script, "serve", start) == completed(script, "sim", "--json", start)


def test_zsh_has_a_script_too(capsys: pytest.CaptureFixture[str]) -> None:
    """It is for zsh, and zsh takes it where there is one."""
    assert 0 == main(["completion", "zsh"])
    script = capsys.readouterr().out

    assert script.startswith("#compdef tokenpool\n")
    assert all(f"    {name}:'" in script for name in COMMANDS)
    if zsh := shutil.which("zsh"):
        assert 0 == subprocess.run([zsh, "-n"], input=script, text=True, timeout=60).returncode
