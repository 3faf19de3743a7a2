# SPDX-License-Identifier: Apache-2.0
"""Read and write single values of settings as people write them: ``24GiB``, ``400ms``, ``${NAME}``.

Everything behind the edge holds bytes (int) and seconds (float). Imports nothing of ours but errors and settings.
"""

from __future__ import annotations

import math
import re
import shlex
import sys
from fractions import Fraction

from tokenpool import settings
from tokenpool.errors import ConfigError, show

_BYTES_PER_UNIT = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}i{b}": 1024**power for power, prefix in enumerate("kmgt", 1) for b in ("", "b")},
}
_SECONDS_PER_UNIT = {
    "": Fraction(1),
    "us": Fraction(1, 10**6),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "h": Fraction(3600),
}

_NO_SIZE = "is no size: write whole bytes, or a number with KiB, MiB, GiB, TiB, KB, MB, GB, TB, such as 24GiB"
_NO_TIME = "is no time: write seconds, or a number with us, ms, s, m or h, such as 400ms"

_MAX_BYTES = 2**63 - 1
_MAX_SECONDS = 10**9
"""About 31 years: a longer wait overflows the clocks of some system calls."""

_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+) *([A-Za-z]*)")
_MAX_TEXT = 64
_REFERENCE = re.compile(r"\$\{(?:([A-Za-z_][A-Za-z0-9_]*)\})?")


def parse_bytes(value: object, key: str | None = None) -> int:
    """Return a byte count: an int as it is, ``24GiB`` or ``24Gi`` by powers of 1024, ``24GB`` of 1000.

    Letter case and a space before the unit do not matter; a fraction of a byte is rounded. A bare K, M or G
    is refused because programs disagree about its meaning. Raises ConfigError with `key`.
    """
    number: Fraction | int
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    else:
        number, unit = _split(value, _NO_SIZE, key)
        scale = _BYTES_PER_UNIT.get(unit.lower())
        if scale is None or (scale == 1 and number.denominator != 1):
            raise ConfigError(f"{show(value)} {_NO_SIZE}", key=key)
        number *= scale
    if not 0 <= number <= _MAX_BYTES:
        raise ConfigError(f"{show(value)} is out of range: give 0 to 2^63-1 bytes", key=key)
    return round(number)


def format_bytes(num_bytes: int) -> str:
    """Return a byte count in the largest binary unit that fits, with at most two decimals: ``1.5GiB``."""
    if num_bytes < 0:
        return f"-{format_bytes(-num_bytes)}"
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        # Judge the rounded number: 1023.999KiB must read 1MiB, not 1024KiB.
        if round(num_bytes / 1024 ** (power - 1), 2) >= 1024:
            return f"{_trim(num_bytes / 1024**power, 2)}{unit}"
    return f"{num_bytes}B"


def format_count(count: int, noun: str) -> str:
    """Return a count with its noun, in the plural unless it is one: ``1 model``, ``2 models``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def parse_seconds(value: object, key: str | None = None) -> float:
    """Return a time in seconds: a number as it is, or ``250us``, ``400ms``, ``10s``, ``2m``, ``1.5h``.

    Raises ConfigError with `key`; negative, infinite and NaN times and those above 1e9 s are refused.
    """
    number: Fraction | float
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = value
    else:
        number, unit = _split(value, _NO_TIME, key)
        scale = _SECONDS_PER_UNIT.get(unit.lower())
        if scale is None:
            raise ConfigError(f"{show(value)} {_NO_TIME}", key=key)
        number *= scale
    if not 0 <= number <= _MAX_SECONDS:  # refuses NaN too
        raise ConfigError(f"{show(value)} is out of range: give 0 to 1e9 seconds", key=key)
    return float(number)


def format_seconds(seconds: float) -> str:
    """Return a time in the unit that reads best, with at most three decimals: ``400ms``, ``90s``."""
    if not math.isfinite(seconds):
        return f"{seconds}s"
    if seconds < 0:
        return f"-{format_seconds(-seconds)}"
    if seconds == 0:
        return "0s"
    for unit, scale, limit in (("us", 1e-6, 1000), ("ms", 1e-3, 1000), ("s", 1, 120), ("m", 60, 120)):
        if round(seconds / scale, 3) < limit:
            return f"{_trim(seconds / scale, 3)}{unit}"
    return f"{_trim(seconds / 3600, 3)}h"


def parse_number(value: object, key: str | None = None) -> float:
    """Return a finite number as a float; raises ConfigError with `key` for all else, True and "8" included."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        raise ConfigError(f"expected a number, got {show(value)}", key=key)
    return float(value)


def parse_text(value: object, key: str | None = None) -> str:
    """Return a text as it is; raises ConfigError with `key` for a blank one and for all else."""
    if not isinstance(value, str):
        raise ConfigError(f"expected a text, got {show(value)}; put it in quotes if it is one", key=key)
    if not value.strip():
        raise ConfigError("is empty: write a text, or remove the key", key=key)
    return value


def parse_texts(value: object, what: str) -> list[str]:
    """Return one text or a list of texts as a list; raises ConfigError, which says `what` they are, for all else."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"expected a text or a list of texts: {what}")
    return texts


def expand_env(text: str, key: str | None = None) -> str:
    """Replace each ``${NAME}`` by that environment variable.

    Raises ConfigError with `key` if one is not set or a reference is malformed; the message holds neither
    `text` nor a value, as either may be a secret.
    """

    def lookup(match: re.Match[str]) -> str:
        if match[1] is None:
            raise ConfigError("a ${...} is malformed: write ${NAME}, with letters, digits and _", key=key)
        value = settings.environment().get(match[1])
        if value is None:
            raise ConfigError(f"environment variable {match[1]} is not set: set it", key=key)
        return value

    return _REFERENCE.sub(lookup, text)


def split_words(text: str, key: str | None = None) -> list[str]:
    """Split a text as a shell splits a line; raises ConfigError with `key` if a quote is left open."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{show(text)} cannot be split as a shell line: {error}", key=key) from None


def _split(value: object, refusal: str, key: str | None) -> tuple[Fraction, str]:
    # The length limit keeps Fraction() below the number of digits at which int() raises.
    match = None
    if isinstance(value, str) and len(value) <= _MAX_TEXT:
        match = _QUANTITY.fullmatch(value.strip())
    if match is None:
        raise ConfigError(f"{show(value)} {refusal}", key=key)
    return Fraction(match[1]), match[2]


def _trim(number: float, decimals: int) -> str:
    return f"{number:.{decimals}f}".rstrip("0").rstrip(".")
