# SPDX-License-Identifier: Apache-2.0
"""Request traces as files: what others have published or our benchmarks have played becomes a workload.

The header tells the layout; columns may come in any order, and others beside them. Text files and those that end with
`.gz` are read. A file of JSON lines has keys in the place of columns.

    sim        req_id, arrival_ms, model, base_model, input_len, output_len             base_model is the kind
    bench      arrival_ms, model, input_len, output_len
    aegaeon    Request Time, Model Name, Input Length, Output Length                    HH:MM:SS.mmm
    azure      TIMESTAMP, ContextTokens, GeneratedTokens                                date and time; one model
    burstgpt   Timestamp, Model, Request tokens, Response tokens                        seconds
    prism      arrival_s, model, prompt_tokens, output_tokens                           seconds
    swissai    created_at, model, reported_token_input, reported_token_output           date and time
    mooncake   timestamp, input_length, output_length; JSON lines                       milliseconds; one model

The first three count arrivals from the begin of the workload. Of the others, which are logs of services, the first
request kept arrives at 0, and rows without prompt or answer are left out: those requests had failed. `hash_ids` of
`mooncake`, where they are there, become the blocks of prompts (`SimRequest.blocks`); so does the column `blocks` that
`sim` may have.

Source: the artifact of Aegaeon (SOSP'25), AzurePublicDataset (2023 and 2024), BurstGPT (HPMLL/BurstGPT), the trace of
Multi-LLM/prism-research as CSV, the log of SwissAI that OpenTela (OSDI'26) published, kvcache-ai/Mooncake (FAST'25).
"""

from __future__ import annotations

import csv
import gzip
import json
import logging
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple, Protocol, TextIO, cast

from tokenpool.errors import ConfigError, show
from tokenpool.sim.workload import SimRequest, Workload

_log = logging.getLogger(__name__)

ARTIFACT_KINDS = ("qwen2.5-7b",) * 6 + ("yi-9b",) * 2 + ("llama2-13b",) * 2
"""Kind of model number i of Aegaeon's workloads, by i mod 10."""
_ARTIFACT_NAME = re.compile(r"synth_model_([0-9]+)")
_CLOCK = re.compile(r"([0-9]+):([0-5]?[0-9]):([0-5]?[0-9](?:\.[0-9]*)?)")
_SIM_COLUMNS = ("req_id", "arrival_ms", "model", "base_model", "input_len", "output_len")


_BLOCKS = "blocks"
"""A column that `sim` may have: names of a prompt's blocks, a space between them."""


class TraceFile(NamedTuple):
    """What a file holds."""

    workload: Workload
    layout: str
    """One of the names above."""
    num_dropped: int
    """Rows without prompt or answer that were left out."""


def read_requests(path: str | os.PathLike[str]) -> Workload:
    """Return the requests of a trace, in order of arrival; see `read_trace_file`."""
    return read_trace_file(path).workload


def read_trace_file(path: str | os.PathLike[str]) -> TraceFile:
    """Read a trace of any layout above; rows out of order are sorted.

    The kind of a model is its name where the layout does not tell it. A layout without names takes that of the file.
    Raises ConfigError for a file that cannot be read, an unknown header, and a broken row, with its line.
    """
    path = Path(path)
    try:
        with open_trace(path, "rt") as file:
            trace = _read(path, file)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot be read: {getattr(error, 'strerror', None) or error}", source=str(path)) from error
    if trace.num_dropped:
        _log.info("trace file=%s requests=%d dropped=%d", path, len(trace.workload.requests), trace.num_dropped)
    return trace


def write_requests(path: str | os.PathLike[str], workload: Workload) -> None:
    """Write a workload in the layout `sim`; reading it back gives equal requests.

    Models without a request are not in the file.
    """
    has_blocks = any(request.blocks for request in workload.requests)
    with open_trace(Path(path), "wt") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*_SIM_COLUMNS, _BLOCKS) if has_blocks else _SIM_COLUMNS)
        for i, request in enumerate(workload.requests):
            arrival_s, model, *lengths, blocks = request
            # Decimal moves the point without rounding.
            arrival_ms = format(Decimal(repr(arrival_s)).scaleb(3).normalize(), "f")
            row = (i, arrival_ms, model, workload.kinds[model], *lengths)
            writer.writerow((*row, " ".join(map(str, blocks))) if has_blocks else row)


class _Layout(NamedTuple):
    name: str
    columns: tuple[str, ...]
    """Those of arrival, input and output length; then of the model and of its kind, where there are such."""
    parse_s: Callable[[str], float]
    time_example: str
    is_log: bool = False
    """Arrivals count from the first request, and rows without tokens are left out."""
    kind_of: Callable[[str], str] = str
    may_lack_tokens: bool = False
    """Whether a length may be empty: such a request had failed."""


def _ms(text: str) -> float:
    return float(Decimal(text).scaleb(-3))


def _clock_s(text: str) -> float:
    match = _CLOCK.fullmatch(text)
    if match is None:
        raise ValueError(text)
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])


def _date_s(text: str) -> float:
    # Digits beyond microseconds are cut off; a time without an offset is one of UTC.
    date = datetime.fromisoformat(text)
    return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def _artifact_kind(model: str) -> str:
    match = _ARTIFACT_NAME.fullmatch(model)
    return ARTIFACT_KINDS[int(match[1]) % 10] if match else model


_LAYOUTS = (
    # `bench` has a part of the columns of `sim`, so it comes behind.
    _Layout("sim", ("arrival_ms", "input_len", "output_len", "model", "base_model"), _ms, "418"),
    _Layout("bench", ("arrival_ms", "input_len", "output_len", "model"), _ms, "418"),
    _Layout(
        "aegaeon",
        ("Request Time", "Input Length", "Output Length", "Model Name"),
        _clock_s,
        "00:00:01.250",
        kind_of=_artifact_kind,
    ),
    _Layout(
        "azure", ("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _date_s, "2023-11-16 18:17:03.9799600", is_log=True
    ),
    _Layout("burstgpt", ("Timestamp", "Request tokens", "Response tokens", "Model"), float, "45", is_log=True),
    _Layout("prism", ("arrival_s", "prompt_tokens", "output_tokens", "model"), float, "45.5", is_log=True),
    _Layout(
        "swissai",
        ("created_at", "reported_token_input", "reported_token_output", "model"),
        _date_s,
        "2025-01-31 18:17:03.979+00:00",
        is_log=True,
        may_lack_tokens=True,
    ),
    _Layout("mooncake", ("timestamp", "input_length", "output_length"), _ms, "3000", is_log=True),
)


def open_trace(path: Path, mode: str) -> TextIO:
    """Open a text file, packed or not, to read (`rt`) or write (`wt`)."""
    opener = gzip.open if path.suffix == ".gz" else open
    encoding = "utf-8-sig" if mode == "rt" else "utf-8"  # skips a byte order mark
    return cast(TextIO, opener(path, mode, encoding=encoding, newline=""))


class _Rows(Protocol):
    """Rows of text, the header first: what `csv.reader` returns."""

    @property
    def line_num(self) -> int:
        """Lines read so far."""

    def __iter__(self) -> Iterator[list[str]]: ...

    def __next__(self) -> list[str]: ...


class _JsonRows:
    """Objects of one line each, with the keys of `mooncake`, as such rows."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file, self.line_num = path, file, 0
        self._columns: list[str] = []
        self.blocks: tuple[int, ...] = ()
        """Of the last row."""

    def __iter__(self) -> Iterator[list[str]]:
        return self

    def __next__(self) -> list[str]:
        if not self._columns:
            self._columns = list(_LAYOUTS[-1].columns)
            return self._columns
        line = next(self._file)
        self.line_num += 1
        try:
            values = json.loads(line)
            self.blocks = tuple([int(block) for block in values.get("hash_ids", ())])
            return [str(values[name]) for name in self._columns]
        except (ValueError, KeyError, TypeError, AttributeError):
            problem = f"broken line: expected an object with {', '.join(self._columns)}"
            raise ConfigError(problem, key=f"line {self.line_num}", source=str(self._path)) from None


def _read(path: Path, file: TextIO) -> TraceFile:
    is_json = path.name.removesuffix(".gz").endswith(".jsonl")
    reader: _Rows = _JsonRows(path, file) if is_json else csv.reader(file)
    header = [name.strip() for name in next(reader, [])]
    layout = next((layout for layout in _LAYOUTS if set(layout.columns) <= set(header)), None)
    if layout is None:
        if {"client", "rate_rps"} <= set(header):
            problem = "holds rates of clients, no requests: give `tokenpool sim` or `plan` a time with --for, as in 20m"
            raise ConfigError(problem, key="line 1", source=str(path))
        known = "; ".join(",".join(layout.columns) for layout in _LAYOUTS)
        problem = f"unknown header {show(','.join(header))}: give the columns of one of {known}"
        raise ConfigError(problem, key="line 1", source=str(path))
    at = [header.index(name) for name in layout.columns]
    blocks_at = header.index(_BLOCKS) if layout.name == "sim" and _BLOCKS in header else None
    model = path.name.removesuffix(".gz").removesuffix(".csv").removesuffix(".jsonl")
    kinds: dict[str, str] = {}
    names: dict[str, str] = {}  # one text per model, not one per row
    requests, num_dropped = [], 0
    for row in reader:
        if not row:
            continue
        try:
            if len(row) != len(header):
                raise ValueError(row)
            fields = [row[i].strip() for i in at]
            if layout.may_lack_tokens:
                fields[1:3] = [text or "0" for text in fields[1:3]]
            arrival_s, input_len, output_len = layout.parse_s(fields[0]), int(fields[1]), int(fields[2])
            least = 0 if layout.is_log else 1
            blocks = () if blocks_at is None else tuple(map(int, row[blocks_at].split()))
            if not (0 <= arrival_s < math.inf and input_len >= least and output_len >= least and all(fields)):
                raise ValueError(row)
        except (ValueError, ArithmeticError):
            raise _broken(layout, header, row).under(f"line {reader.line_num}", source=str(path)) from None
        if not (input_len and output_len):
            num_dropped += 1
            continue
        if len(fields) > 3:
            model = names.setdefault(fields[3], fields[3])
        kind = fields[4] if len(fields) > 4 else layout.kind_of(model)
        if kinds.setdefault(model, kind) != kind:
            problem = f"model {show(model)} is of kind {show(kind)} here and of {show(kinds[model])} above"
            raise ConfigError(f"{problem}: give a model one kind", key=f"line {reader.line_num}", source=str(path))
        if isinstance(reader, _JsonRows):
            blocks = reader.blocks
        requests.append(SimRequest(arrival_s, model, input_len, output_len, blocks))
    requests.sort(key=itemgetter(0))
    if layout.is_log and requests:
        start_s = requests[0].arrival_s
        # Microseconds are what the logs have; the difference of two large floats has digits beyond that.
        requests = [request._replace(arrival_s=round(request.arrival_s - start_s, 6)) for request in requests]
    return TraceFile(Workload(requests, kinds), layout.name, num_dropped)


def _broken(layout: _Layout, header: Sequence[str], row: Sequence[str]) -> ConfigError:
    time, *lengths = layout.columns[:3]
    least = 0 if layout.is_log else 1
    expected = f"{len(header)} fields, {time} such as {layout.time_example}, whole {' and '.join(lengths)} from {least}"
    return ConfigError(f"broken row {show(','.join(row))}: expected {expected}")
