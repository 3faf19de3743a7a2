# SPDX-License-Identifier: Apache-2.0
"""The weight files of a local checkpoint: how large they are, and whether they can be read. Imports no vLLM."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

from tokenpool.errors import ConfigError

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt")
"""In the order in which vLLM looks: the first of which there are files is taken."""


def checkpoint_bytes(folder: Path) -> int:
    """Size of the weights in `folder`; 0 if it is no folder or has none.

    Raises ConfigError that names a weight file which is no readable file, since vLLM would fail to open it.
    """
    if not os.path.isdir(folder):
        return 0
    for pattern in WEIGHT_FILES:
        if files := sorted(folder.glob(pattern)):
            _check_index(folder / f"model{pattern[1:]}.index.json")
            return sum(_file_bytes(file) for file in files)
    return 0


def _check_index(index: Path) -> None:
    """Look for every file that the index of a checkpoint in parts names."""
    try:
        named = json.loads(index.read_bytes())["weight_map"].values()
    except FileNotFoundError:
        return
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{index} cannot be read: {error}; fetch the model again", key="model") from error
    for name in sorted(set(named)):
        if not os.path.lexists(index.parent / name):
            raise ConfigError(f"weight file {index.parent / name} is missing; fetch the model again", key="model")


def _file_bytes(file: Path) -> int:
    try:
        # Not to wait for a writer, should it be a pipe.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
        finally:
            os.close(descriptor)
    except PermissionError as error:
        raise _unreadable(file, f"cannot be read by user {os.geteuid()}", "let that user read it") from error
    except OSError as error:
        raise _unreadable(file, f"cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise _unreadable(file, "is no file")
    return status.st_size


def _unreadable(file: Path, problem: str, advice: str = "correct it or fetch the model again") -> ConfigError:
    target = f", a link to {os.readlink(file)}," if os.path.islink(file) else ""
    return ConfigError(f"weight file {file}{target} {problem}; {advice}", key="model")
