# SPDX-License-Identifier: Apache-2.0
"""Every subcommand explains itself, without doing anything and without vLLM."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.helpers.server import REPOSITORY
from tokenpool.cli.main import main
from tokenpool.cli.pool_flags import flag_texts
from tokenpool.cli.tree import COMMANDS

pytestmark = pytest.mark.cpu

DEEPER = [["bench", "serve"], ["key", "new"], ["key", "hash"], ["job", "pool.yaml"], ["serve", "org/a", "--port", "1"]]
ALL = [[command] for command in COMMANDS] + DEEPER


def helped(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    return (main(words), *capsys.readouterr())


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_is_printed_and_the_status_is_0(words, flag, capsys):
    """It goes to stdout, names the command, and says more than its usage line."""
    status, out, err = helped([*words, flag], capsys)

    assert (0, "") == (status, err)
    assert out.startswith("usage: tokenpool ")
    assert f"tokenpool {words[0]}" in out
    assert len(out.splitlines()) > 1


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_flag_has_a_text(words, capsys):
    """Beside the flag, or below it where that is long."""
    _, out, _ = helped([*words, "--help"], capsys)
    flags = re.findall(r"^  (-.*(?:\n {10}.*)*)", out, re.MULTILINE)

    assert flags
    assert not [flag for flag in flags if not re.search(r"\s{2,}\S", flag)]


def test_the_help_of_serve_has_the_keys_of_the_pool_file(capsys):
    """Each flag of the pool stands there with its key's text and default, by the declaration of the pool file."""
    out = " ".join(helped(["serve", "--help"], capsys)[1].split())

    assert [] == [flag for flag, text in flag_texts().items() if f"{flag} " not in out or text not in out]
    assert "--page-size SIZE Unit in which memory moves" in out and "Default: 32MiB." in out


def test_the_help_lists_every_command(capsys):
    """With one line each, in the order of the table."""
    _, out, _ = helped(["--help"], capsys)
    listed = re.findall(r"^    (\w+) +(.+)$", out, re.MULTILINE)

    assert [(name, command.summary) for name, command in COMMANDS.items()] == listed


@pytest.mark.vllm
def test_help_searches_the_flags_of_vllm_and_of_the_pool(capsys):
    """`--help=all` has all of both, `--help=WORD` a group or what has the word in its name."""
    status, everything, _ = helped(["serve", "--help=all"], capsys)
    found = {word: helped(["validate", f"--help={word}"], capsys)[1] for word in ("pool", "lora-mod", "no-such-flag")}

    assert status == 0
    assert everything.startswith("usage: tokenpool serve MODEL")
    assert all(f"  --{flag}" in everything for flag in ("max-model-len", "tool-parser-plugin", "device-memory"))
    assert "--kv-floor-pages" in found["pool"] and "--max-model-len" not in found["pool"]
    assert "--lora-modules" in found["lora-mod"] and "--max-loras" not in found["lora-mod"]
    assert "No group or arguments matching 'no-such-flag'" in found["no-such-flag"]


def imported_by(*words: str) -> set[str]:
    """Names of the modules that a command has imported when it ends."""
    code = "import sys; from tokenpool.cli.main import main; main(sys.argv[1:]); print('modules', *sys.modules)"
    command = [sys.executable, "-c", code, *words]
    out = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    return set(out.splitlines()[-1].split()[1:])


def test_help_imports_no_vllm():
    """It is there at once, and each command has only its own modules to import."""
    top, whole = imported_by("top", "--help"), imported_by("--help")

    assert {"tokenpool.cli.top.command", "rich.live"} <= top
    assert set() == top & {"vllm", "torch", "aiohttp", "numpy", "tokenpool.cli.serve"}
    assert {"tokenpool.cli.tree"} == {name for name in whole if name.startswith("tokenpool.cli.")} - {
        "tokenpool.cli.main", "tokenpool.cli.output", "tokenpool.cli.parser"}  # fmt: skip
    for name in COMMANDS:
        assert set() == imported_by(name, "--help") & {"vllm", "torch", "ray"}
