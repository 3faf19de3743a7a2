# SPDX-License-Identifier: Apache-2.0
"""Log lines of tokenpool reach stderr whatever other packages do to Python's logging."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from tokenpool.errors import ConfigError
from tokenpool.logs import log_to_stderr
from tokenpool.settings import LOG_LEVEL

pytestmark = pytest.mark.cpu

HARM = {
    "nothing": "",
    "a level": "root.setLevel(logging.ERROR)",
    "a level for handlers": "[handler.setLevel(logging.ERROR) for handler in root.handlers]",
    "no handlers": "root.handlers.clear()",
    "other handlers": "logging.basicConfig(level=logging.CRITICAL, force=True)",
}
"""What a package does to the root logger when it is imported."""


def logged(code: str, level: str = "INFO") -> list[str]:
    """Run `code` in a process that logs as ours do, and return its stderr."""
    setup = "import logging; from tokenpool.logs import log_to_stderr; root = logging.getLogger()\n"
    env = {**os.environ, LOG_LEVEL.name: level}
    command = [sys.executable, "-c", setup + code]
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stderr.splitlines()


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
def test_no_line_is_lost_or_doubled(harm: str) -> None:
    """Each line of ours is written once and in our layout, also for loggers made after another package's import."""
    lines = logged(
        f"log_to_stderr()\nold = logging.getLogger('tokenpool.old')\n{harm}\n"
        "old.info('one %d', 1); logging.getLogger('tokenpool.new').warning('two'); old.debug('three')"
    )

    assert lines == ["INFO one 1", "WARNING two"]


def test_lines_name_their_process_and_a_second_call_replaces_the_first() -> None:
    """A host's lines say that they are a host's."""
    assert logged("log_to_stderr(); log_to_stderr('host'); logging.getLogger('tokenpool.x').info('up')") == [
        "INFO host: up"
    ]


def test_the_level_is_that_of_the_variable() -> None:
    """Lower case is fine, too."""
    code = "log_to_stderr(); own = logging.getLogger('tokenpool.x'); own.info('no'); own.error('yes')"

    assert logged(code, "error") == ["ERROR yes"]


def test_of_other_packages_warnings_are_shown() -> None:
    """What has no handler of its own is told apart by its level; its chatter is left out."""
    code = "log_to_stderr(); other = logging.getLogger('asyncio'); other.info('no'); other.warning('yes')"

    assert logged(code) == ["WARNING yes"]


def test_a_level_that_there_is_not_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the variable and the levels, and nothing is changed."""
    monkeypatch.setenv(LOG_LEVEL.name, "loud")
    before = list(logging.getLogger("tokenpool").handlers)

    with pytest.raises(ConfigError, match="TOKENPOOL_LOG_LEVEL: 'loud' is no level: give one of DEBUG, INFO"):
        log_to_stderr()
    assert before == logging.getLogger("tokenpool").handlers


FAULTS = {
    "a client's": ("vllm.entrypoints", "VLLMValidationError('the schema\\n is wrong', parameter='x')", 1),
    "overload": ("vllm.entrypoints", "GracefulHTTPError('busy', 503)", 1),
    "a grammar": ("vllm.v1.structured_output", "RuntimeError('too many states')", 1),
    "a cancelled response": ("vllm.entrypoints", "asyncio.CancelledError", 1),
    "the server's": ("vllm.entrypoints", "RuntimeError('a bug')", 6),
    "the server's own": ("tokenpool.serve", "GenerationError('a bug')", 6),
}


@pytest.fixture(scope="module")
def told() -> dict[str, list[str]]:
    """The lines of each fault, of one process."""
    code = """
import asyncio, sys
from vllm.exceptions import *
from vllm.exceptions import GenerationError, GracefulHTTPError, VLLMValidationError
log_to_stderr()
"""
    for name, (logger, error, _) in FAULTS.items():
        code += f"""
print("FAULT", {name!r}, file=sys.stderr, flush=True)
try:
    raise {error}
except BaseException:
    logging.getLogger({logger!r}).exception("Error in stream of %s.", "x")
"""
    found: dict[str, list[str]] = {}
    for line in logged(code):
        if line.startswith("FAULT "):
            lines = found.setdefault(line.removeprefix("FAULT "), [])
        elif found and any(word in line for word in ("x.", "raise", "Error", "Trace")):
            lines.append(line)
    return found


@pytest.mark.vllm
@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_client_did_wrong_is_one_line(told: dict[str, list[str]], fault: str) -> None:
    """Any client can cause as many of these as it likes; errors of the server keep their stacks."""
    lines, num_lines = told[fault], FAULTS[fault][2]
    assert (len(lines) == 1) == (num_lines == 1), lines
    assert "Error in stream of x." in lines[0]
    assert ("Traceback" in " ".join(lines)) == (num_lines > 1)
