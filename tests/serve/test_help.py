# SPDX-License-Identifier: Apache-2.0
"""Every subcommand explains itself, without doing anything and without vLLM."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.helpers.server import REPOSITORY
from tokenpool.serve.cli import COMMANDS, USAGE, main

pytestmark = pytest.mark.cpu

DEEPER = [["bench", "serve"], ["key", "new"], ["key", "hash"], ["job", "pool.yaml"], ["serve", "org/a", "--port", "1"]]
ALL = [[command] for command in COMMANDS] + DEEPER


def helped(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command; argparse leaves by SystemExit."""
    try:
        status = main(words)
    except SystemExit as left:
        status = int(left.code or 0)
    return (status, *capsys.readouterr())


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_help_is_printed_and_the_status_is_0(words, flag, capsys):
    """It goes to stdout, names the command, and says more than its usage line."""
    status, out, err = helped([*words, flag], capsys)

    assert (0, "") == (status, err)
    assert out.startswith("usage: tokenpool ")
    assert f"tokenpool {words[0]}" in out
    assert len(out.splitlines()) > 1


@pytest.mark.parametrize("words", [["sim"], ["plan"], ["bench", "serve"]], ids=" ".join)
def test_every_flag_has_a_text(words, capsys):
    """Beside the flag, or below it where that is long."""
    _, out, _ = helped([*words, "--help"], capsys)
    flags = re.findall(r"^  (-.*(?:\n {10}.*)*)", out, re.MULTILINE)

    assert len(flags) > 8
    assert not [flag for flag in flags if not re.search(r"\s{2,}\S", flag)]


def test_the_usage_lists_every_command():
    """And the commands are those of the usage."""
    assert set(COMMANDS) == set(re.findall(r"^(?:usage:|      ) tokenpool (\w+)", USAGE, re.MULTILINE))


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


def test_help_imports_no_vllm():
    """It is there at once."""
    code = (
        "import sys; from tokenpool.serve.cli import main, COMMANDS\n"
        "for command in COMMANDS:\n"
        "    try:\n        main([command, '--help'])\n    except SystemExit:\n        pass\n"
        "assert 'vllm' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
