# SPDX-License-Identifier: Apache-2.0
"""`tokenpool trace`: fetch what the device did when, save it for Perfetto, or draw it as a picture. Imports no vLLM.

    tokenpool trace --seconds 30 --json trace.json
    tokenpool trace --from trace.json --png trace.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tokenpool.errors import ConfigError, PoolError
from tokenpool.serve.key_words import add_key_flags, looking_key
from tokenpool.serve.pool_query import ask_pool, default_url
from tokenpool.units import parse_seconds

USAGE = """usage: tokenpool trace [--url URL] [--view-key @FILE] [--seconds N] [--json FILE] [--png FILE]
       tokenpool trace --from FILE --png FILE

--url         the server; else $TOKENPOOL_URL, else http://127.0.0.1:8000
--view-key    the file with its view key, or --admin-key with its admin key; else $TOKENPOOL_VIEW_KEY is used, or
              $TOKENPOOL_ADMIN_KEY
--seconds     only what ended in the last N seconds
--json        write the trace there, for https://ui.perfetto.dev or chrome://tracing
--png         draw it there; needs matplotlib: pip install 'tokenpool[plot]'
--from        read a saved trace instead of asking a server"""

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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see tokenpool trace --help")


def trace(words: list[str]) -> int:
    """Run the subcommand and return its exit status; raises PoolError with one line."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--url", default=default_url())
    add_key_flags(parser)
    parser.add_argument("--seconds")
    parser.add_argument("--json", dest="json_path")
    parser.add_argument("--png", dest="png_path")
    parser.add_argument("--from", dest="source")
    options = parser.parse_args(words)
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
