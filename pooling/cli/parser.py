# SPDX-License-Identifier: Apache-2.0
"""The parser of which the tree of commands is made. Imports no vLLM."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from tokenpool.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would end the process, and itself refuses words that it does not know."""

    def __init__(self, *, leaves_words: bool = False, refusal: str | None = None, **settings: Any) -> None:
        """With `leaves_words` the flags are those of the help alone: all words are left, as they are, in `words`.

        `refusal` is said in place of argparse's message, which repeats the words that are wrong.
        """
        super().__init__(**settings)
        self._leaves_words = leaves_words
        self._refusal = refusal

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError that says what is wrong with the command line."""
        raise ConfigError(self._refusal or f"{message}; see {self.prog} --help")

    def split(self, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parse the flags that it knows; all other words are left, in their order."""
        return super().parse_known_args(words)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all words, or none; argparse calls this for each parser of the tree."""
        if self._leaves_words:
            if not {"-h", "--help"}.isdisjoint(args):
                self.print_help()
                self.exit()
            return argparse.Namespace(words=list(args)), []
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, []
