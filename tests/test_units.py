# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenpool import units
from tokenpool.errors import ConfigError

pytestmark = pytest.mark.cpu

HUGE = pytest.param(10**10_000, id="more digits than Python prints")
LONG = pytest.param("9" * 10_000, id="long")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0, 0),
        (123, 123),
        ("123", 123),
        ("7B", 7),
        ("24GiB", 24 << 30),
        ("24gib", 24 << 30),
        (" 512 MiB ", 512 << 20),
        ("1.5 GB", 1_500_000_000),
        ("64KiB", 64 << 10),
        ("2TiB", 2 << 40),
        ("2KB", 2000),
        ("2MB", 2_000_000),
        ("2TB", 2 * 10**12),
        ("3Ki", 3 << 10),
        ("3Mi", 3 << 20),
        ("3Gi", 3 << 30),
        ("3Ti", 3 << 40),
        (".5KiB", 512),
        ("0.0001KiB", 0),
        (2**63 - 1, 2**63 - 1),
    ],
)
def test_bytes_are_read(text: object, expected: int) -> None:
    """A size is read with its unit: powers of 1024 with an i, powers of 1000 without."""
    actual = units.parse_bytes(text)

    assert expected == actual
    assert isinstance(actual, int)


@pytest.mark.parametrize(
    "value",
    [True, False, None, 1.5, "", " ", "1.5", "1.5B", "24G", "24K", "24 GiB of it", "GiB", "-1", -1, "1e9", "٣", [],
     math.nan, math.inf, "nan", "inf", "0x10", "1_000", 2**63, "9" * 30, LONG, HUGE],
)  # fmt: skip
def test_bad_bytes_are_refused(value: object) -> None:
    """What is no size is refused in one line that names the key and a form that works."""
    with pytest.raises(ConfigError, match=r"^device_memory: .*(such as 24GiB|2\^63-1 bytes)$") as refusal:
        units.parse_bytes(value, "device_memory")

    assert refusal.value.key == "device_memory"
    assert len(str(refusal.value)) < 250


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0, 0.0),
        (10, 10.0),
        (0.4, 0.4),
        ("10", 10.0),
        ("0.4", 0.4),
        ("250us", 0.00025),
        ("400ms", 0.4),
        ("7 ms", 0.007),
        ("10s", 10.0),
        ("2m", 120.0),
        ("1.5H", 5400.0),
    ],
)
def test_seconds_are_read(text: object, expected: float) -> None:
    """A time is read in seconds, correctly rounded."""
    actual = units.parse_seconds(text)

    assert expected == actual
    assert isinstance(actual, float)


@pytest.mark.parametrize(
    "value",
    [True, None, "", "s", "1d", "1m30s", "-1s", -0.1, math.nan, math.inf, -math.inf, "nan", "inf", "1e3", 1e10,
     "9" * 30, LONG, HUGE, {}],
)  # fmt: skip
def test_bad_seconds_are_refused(value: object) -> None:
    """What is no time is refused in one line that names the key and a form that works."""
    with pytest.raises(ConfigError, match=r"^slo\.ttft: .*(such as 400ms|1e9 seconds)$") as refusal:
        units.parse_seconds(value, "slo.ttft")

    assert len(str(refusal.value)) < 250


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (1024, "1KiB"),
        (1536, "1.5KiB"),
        (32 << 20, "32MiB"),
        ((1 << 20) - 1, "1MiB"),
        (24 << 30, "24GiB"),
        (5000 << 40, "5000TiB"),
        (-(3 << 20), "-3MiB"),
    ],
)
def test_bytes_are_written_short(num_bytes: int, expected: str) -> None:
    """A size is written in the largest binary unit that fits."""
    assert expected == units.format_bytes(num_bytes)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0s"),
        (0.00025, "250us"),
        (0.4, "400ms"),
        (0.9999999, "1s"),
        (90, "90s"),
        (600, "10m"),
        (9000, "2.5h"),
        (-0.4, "-400ms"),
        (math.inf, "infs"),
        (math.nan, "nans"),
    ],
)
def test_seconds_are_written_short(seconds: float, expected: str) -> None:
    """A time is written in the unit that reads best; a log line never fails on an odd value."""
    assert expected == units.format_seconds(seconds)


@given(st.integers(0, 2**60))
def test_written_bytes_read_back(num_bytes: int) -> None:
    """A written size reads back within its two decimals, so within 0.5 percent."""
    actual = units.parse_bytes(units.format_bytes(num_bytes))

    assert abs(num_bytes - actual) <= 0.005 * num_bytes + 1


@pytest.mark.parametrize(("count", "expected"), [(0, "0 models"), (1, "1 model"), (2, "2 models")])
def test_counts_have_the_right_number(count: int, expected: str) -> None:
    """Only one is singular."""
    assert expected == units.format_count(count, "model")


@given(st.floats(0, 0.999e9))
def test_written_seconds_read_back(seconds: float) -> None:
    """A written time reads back within its three decimals: 0.05 percent, or half a nanosecond."""
    actual = units.parse_seconds(units.format_seconds(seconds))

    assert abs(seconds - actual) <= 0.0005 * seconds + 0.51e-9


@given(st.text() | st.integers() | st.floats() | st.none() | st.booleans() | st.binary())
def test_any_value_is_read_or_refused_in_one_line(value: object) -> None:
    """A parser gives a value in range or a ConfigError of one line, never anything else."""
    for parse in (units.parse_bytes, units.parse_seconds, units.parse_number, units.parse_text):
        try:
            parse(value, "key")
        except ConfigError as refusal:
            assert len(str(refusal).splitlines()) == 1


def test_variables_are_put_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ${NAME} becomes the variable's value, which is not looked at again."""
    monkeypatch.setenv("TOKENPOOL_TEST_A", "x${TOKENPOOL_TEST_B}")

    assert units.expand_env("<${TOKENPOOL_TEST_A}> $1 {}") == "<x${TOKENPOOL_TEST_B}> $1 {}"


@pytest.mark.parametrize("text", ["secret${", "secret${}", "secret${a-b}", "secret${A", "secret${TOKENPOOL_NOT_SET}"])
def test_bad_references_are_refused(text: str) -> None:
    """A malformed reference or a missing variable is refused without showing the text around it."""
    with pytest.raises(ConfigError, match=r"^api_key: (a \$\{...\} is malformed|.*TOKENPOOL_NOT_SET)") as refusal:
        units.expand_env(text, "api_key")

    assert "secret" not in str(refusal.value)
