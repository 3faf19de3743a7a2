# SPDX-License-Identifier: Apache-2.0
"""`tokenpool trace`: from a trace to a picture, and one line for everything that is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tokenpool.cli.main import run
from tokenpool.cli.trace import spans_of
from tokenpool.errors import PoolError
from tokenpool.wire.trace import TraceLog, chrome_trace

pytestmark = pytest.mark.cpu


def a_trace() -> dict[str, Any]:
    log = TraceLog()
    log.record("turn", "a", 1000.0, 1000.5, steps=9)
    log.record("weights_out", "a", 1000.5, 1000.5)
    log.record("weights_in", "b", 1000.4, 1000.7, bytes=1 << 20)
    log.record("switch", "b", 1000.5, 1000.7)
    log.record("turn", "b", 1000.7, 1001.0, steps=4)
    return chrome_trace(log.events())


def test_a_saved_trace_becomes_a_picture(tmp_path: Path) -> None:
    """`--from` reads what `--json` wrote, and `--png` draws it: a PNG of some size."""
    pytest.importorskip("matplotlib")
    saved, copy, picture = tmp_path / "t.json", tmp_path / "copy.json", tmp_path / "t.png"
    saved.write_text(json.dumps(a_trace()))

    assert 0 == run(["trace", "--from", str(saved), "--json", str(copy), "--png", str(picture)])
    assert a_trace() == json.loads(copy.read_text())
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    assert width > 1000 and height > 200


def test_spans_start_at_zero_in_order() -> None:
    """Times count from the first event, in seconds; what is no complete event is left out."""
    spans = spans_of(a_trace())

    assert [("a", "turn", 0.0), ("b", "weights_in", 0.4)] == [(s.model, s.kind, s.start_s) for s in spans[:2]]
    assert 5 == len(spans)
    assert pytest.approx(1.0) == max(s.start_s + s.duration_s for s in spans)


def test_without_matplotlib_the_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing needs the extra `plot`; all else works without it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # an import of it fails
    saved, copy, picture = tmp_path / "t.json", tmp_path / "copy.json", tmp_path / "t.png"
    saved.write_text(json.dumps(a_trace()))

    assert 0 == run(["trace", "--from", str(saved), "--json", str(copy)])
    with pytest.raises(PoolError, match=r"matplotlib is needed to draw: pip install 'tokenpool\[plot\]'"):
        run(["trace", "--from", str(saved), "--png", str(picture)])
    assert not picture.exists()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "say where to write: --json FILE or --png FILE"),
        (["--jsn", "x"], "unrecognized arguments: --jsn x; see tokenpool trace --help"),
        (["--json"], "argument --json: expected one argument"),
        (["--json", "x", "--seconds", "soon"], "--seconds: 'soon' is no time"),
        (["--json", "x", "--url", "localhost"], "--url: 'localhost' is no address"),
        (["--json", "x", "--url", "http://127.0.0.1:1"], "http://127.0.0.1:1 does not answer: "),
        (["--json", "x", "--from", "/none.json"], "/none.json: cannot be read: No such file"),
        (["--from", "FILE:{", "--png", "x"], "is no JSON: "),
        (["--from", "FILE:[]", "--png", "x"], "is no trace of tokenpool: "),
        (["--from", 'FILE:{"traceEvents": [{"ph": "X"}]}', "--png", "x"], "is no trace of tokenpool: KeyError"),
        (["--from", 'FILE:{"traceEvents": []}', "--png", "x"], "the trace has no events"),
        (["--from", "FILE:{}", "--json", "/none/x.json"], "/none/x.json: cannot be written: No such file"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, words: list[str], problem: str) -> None:
    """Each mistake is a PoolError of one line that names the option or file."""
    pytest.importorskip("matplotlib")
    file = tmp_path / "t.json"
    for i, word in enumerate(words):
        if word.startswith("FILE:"):
            file.write_text(word[5:])
            words = [*words[:i], str(file), *words[i + 1 :]]
    with pytest.raises(PoolError) as refusal:
        run(["trace", *words])

    assert problem in str(refusal.value)
    assert 1 == len(str(refusal.value).splitlines())
