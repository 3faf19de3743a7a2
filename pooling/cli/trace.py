# SPDX-License-Identifier: Apache-2.0
"""`tokenpool trace`: fetch what the device did when, save it for Perfetto, or draw it as a picture. Imports no vLLM.

tokenpool trace --seconds 30 --json trace.json
tokenpool trace --from trace.json --png trace.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from tokenpool.cli.key_words import add_key_flags, looking_key
from tokenpool.cli.parser import Parser
from tokenpool.cli.pool_query import add_url_flag, ask_pool
from tokenpool.errors import ConfigError, PoolError
from tokenpool.units import parse_seconds

_COLOURS = {
    "turn": "#4c78a8",
    "switch": "#bab0ac",
    "weights_in": "#e45756",
    "weights_from_disk": "#9d755d",
    "weights_out": "#f2a6a7",
    "kv_in": "#54a24b",
    "kv_out": "#a7d59f",
}
_OTHER_COLOUR = "#333333"
_LEAST_WIDTH_FRAC = 1 / 1500
"""Narrowest bar as a share of the picture, about a pixel: an eviction takes no time, but should be seen."""


class Span(NamedTuple):
    """One bar; times are seconds from the beginning of the trace."""

    model: str
    kind: str
    start_s: float
    duration_s: float


def add_command(commands: argparse._SubParsersAction[Parser], summary: str) -> None:
    """Add the parser of `tokenpool trace` to the tree."""
    parser = commands.add_parser(
        "trace", help=summary, description="Fetch what the device did when, to save it or to draw it."
    )
    add = parser.add_argument
    add_url_flag(parser)
    add_key_flags(parser)
    add("--seconds", metavar="N", help="only what ended in the last N seconds")
    add("--json", dest="json_path", metavar="FILE",
        help="write the trace there, for https://ui.perfetto.dev or chrome://tracing")  # fmt: skip
    add("--png", dest="png_path", metavar="FILE", help="draw it there; needs matplotlib: pip install 'tokenpool[plot]'")
    add("--from", dest="source", metavar="FILE", help="read a saved trace instead of asking a server")


def run(options: argparse.Namespace) -> int:
    """Write what was asked for and return the exit status; raises PoolError with one line."""
    if not options.json_path and not options.png_path:
        raise ConfigError("say where to write: --json FILE or --png FILE, or both")
    last_s = None if options.seconds is None else parse_seconds(_number(options.seconds), "--seconds")
    data = _read(options.source) if options.source else _fetch(options.url, looking_key(options), last_s)
    if options.json_path:
        _write(options.json_path, json.dumps(data).encode())
        print(f"wrote {options.json_path}")
    if options.png_path:
        draw(spans_of(data), options.png_path)
        print(f"wrote {options.png_path}")
    return 0


def spans_of(data: Any) -> list[Span]:
    """The complete events of a Chrome trace, in order of their start; raises ConfigError if it is none."""
    try:
        events = [event for event in data["traceEvents"] if event["ph"] == "X"]
        first = min((event["ts"] for event in events), default=0)
        spans = [Span(e["args"]["model"], e["name"], (e["ts"] - first) / 1e6, e["dur"] / 1e6) for e in events]
        return sorted(spans, key=lambda span: span.start_s)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"is no trace of tokenpool: {type(error).__name__} {error}") from None


def draw(spans: list[Span], path: str) -> None:
    """Draw one row per model: turns in its upper half, what was moved for it in the lower. Raises PoolError."""
    try:
        import matplotlib
    except ImportError:
        raise PoolError("matplotlib is needed to draw: pip install 'tokenpool[plot]', or use --json") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not spans:
        raise PoolError("the trace has no events: nothing was switched in that time")
    models = list(dict.fromkeys(span.model for span in spans))
    length_s = max(span.start_s + span.duration_s for span in spans)
    figure, axes = pyplot.subplots(figsize=(15, 1.6 + 0.55 * len(models)), layout="constrained")
    known = [kind for kind in _COLOURS if any(span.kind == kind for span in spans)]
    for kind in dict.fromkeys([*known, *(span.kind for span in spans)]):
        for row, model in enumerate(models):
            bars = [(s.start_s, max(s.duration_s, length_s * _LEAST_WIDTH_FRAC))
                    for s in spans if (s.model, s.kind) == (model, kind)]  # fmt: skip
            bottom = row - 0.4 if kind == "turn" else row + 0.02
            # In a switch lie its copies, which are drawn over it.
            height = 0.4 if kind in ("turn", "switch") else 0.28
            axes.broken_barh(bars, (bottom, height), facecolors=_COLOURS.get(kind, _OTHER_COLOUR))
        axes.barh(0, 0, color=_COLOURS.get(kind, _OTHER_COLOUR), label=kind)  # for the legend
    axes.set_yticks(range(len(models)), models)
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.set_xlim(0, length_s or 1.0)
    axes.set_xlabel("time (s)")
    axes.grid(axis="x", linewidth=0.3)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(_COLOURS) + 1, frameon=False)
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", key=path) from None
    finally:
        pyplot.close(figure)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _fetch(url: str, key: str | None, last_s: float | None) -> Any:
    query = "" if last_s is None else f"?seconds={last_s:g}"
    return ask_pool(url, key, f"/v1/pool/trace{query}")


def _read(path: str) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", key=path) from None
    except ValueError as error:
        raise ConfigError(f"is no JSON: {error}", key=path) from None


def _write(path: str, content: bytes) -> None:
    try:
        Path(path).write_bytes(content)
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", key=path) from None
