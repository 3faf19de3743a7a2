# SPDX-License-Identifier: Apache-2.0
"""What runs vLLM's own API tests: the commands, the figures and the table that it reads. Starts nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.api.peer_servers import SIDES, StandIn, plain_words, words
from tests.api.peer_suites import DOCUMENT, FILES, LEFT_OUT, compare, documented, left_out, per_suite

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("port", [["--port", "7"], ["--port=7"], ["-p", "7"], []])
def test_a_server_gets_the_flags_of_the_test_and_a_port_of_ours(side: str, port: list[str]) -> None:
    """Every flag stays where it is but the port, also beside a flag with the same value."""
    got = words(side, "org/model", ["--max-model-len", "7", "--enforce-eager", *port], 1234)
    start = got.index("org/model")
    assert got[start + 1 : start + 4] == ["--max-model-len", "7", "--enforce-eager"]
    assert [got[index + 1] for index, word in enumerate(got) if word == "--port"] == ["1234"]
    assert not {"-p", "--port=7"} & set(got)


def test_only_the_pool_is_told_of_its_memory() -> None:
    """Plain vLLM gets its own flag for KV, the pool its budget and its page size."""
    plain, pool = (words(side, "m", [], 1) for side in SIDES)
    assert "--device-memory" in pool and "--page-size" in pool and "--device-memory" not in plain
    assert "--kv-cache-memory-bytes" in plain and "--kv-cache-memory-bytes" not in pool


def test_servers_are_shared_and_those_in_use_live_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same flags get the same server, and a start ends only those that no open stand-in uses."""
    ended: list[int] = []

    def started(model: str, flags: object, env: object) -> SimpleNamespace:
        port = next(ports)
        process = SimpleNamespace(poll=lambda: None)
        return SimpleNamespace(port=port, users=0, process=process, end=lambda: ended.append(port))

    ports = iter(range(1, 9))
    monkeypatch.setattr(StandIn, "_servers", {})
    monkeypatch.setattr(StandIn, "_started", staticmethod(started))
    with StandIn("m", ["--a"]) as first, StandIn("m", ["--b"]) as second:
        assert (first.port, second.port, ended) == (1, 2, [])
        assert StandIn("m", ["--a"]).port == 1
    assert StandIn("m", ["--b"]).port == 2
    assert ended == []
    assert StandIn("m", ["--b"], env_dict={"A_VARIABLE_OF_THE_TEST": "1"}).port == 3
    assert ended == [1, 2]
    StandIn.end_idle(all_of_them=True)
    assert ended == [1, 2, 3]


def test_a_failure_reads_the_same_at_each_run() -> None:
    """Ports, addresses, ids and temporary folders are left out of a message; the rest stays."""
    first = plain_words("503 at 127.0.0.1:4711 by <A object at 0x7f12> of chatcmpl-0123456789abcdef in /tmp/x/y\nmore")
    second = plain_words("503 at 127.0.0.1:815 by <A object at 0x7f3456> of chatcmpl-abcdef0123456789 in /tmp/z")
    assert first == second
    assert first.startswith("503 at 127.0.0.1:") and "more" not in first


def test_a_difference_is_known_only_by_its_section() -> None:
    """Rows of that section are patterns of tests, a bracket stands for itself, and other tables are not read."""
    text = "\n".join(
        ["| `a.py::x` | passes | fails | one |", "## vLLM's own API tests", "| suite | tests |", "|---|---|",
         "| `x` | 1 |",
         "| `a.py::t[1]`, `a.py::u*` | passes | fails | `w` |", "## More", "| `b.py::v` | passes | fails | |"]
    )  # fmt: skip
    known = documented(text)
    plain = {f"a.py::{name}": ("passed", "") for name in ("t[1]", "u[2]", "x", "both")}
    pool = {"a.py::t[1]": ("failed", "no"), "a.py::u[2]": ("error", ""), "a.py::both": ("passed", "")}
    lines, figures = compare(plain, pool, known)
    assert [figures[key] for key in ("tests", "same", "differ", "undocumented")] == [4, 1, 3, 1]
    assert [line for line in lines if line.startswith("differs")] == ["differs: a.py::x"]


def test_a_test_that_fails_on_both_for_another_reason_is_told_of() -> None:
    """It counts as the same, and its two reasons are printed."""
    lines, figures = compare({"t": ("failed", "400")}, {"t": ("failed", "500")}, [])
    assert (figures["same"], figures["other_reason"], len(lines)) == (1, 1, 3)


def test_a_file_is_run_or_left_out_and_the_document_names_files_that_run() -> None:
    """No file is both, and each documented test is one of a file that is run."""
    assert not set(FILES) & set(LEFT_OUT)
    assert {pattern.partition("::")[0] for pattern in documented(DOCUMENT.read_text())} <= set(FILES)


def test_every_file_of_the_suites_is_run_or_has_a_reason(tmp_path: Path) -> None:
    """One that starts no server needs no entry; one that does, and has none, ends the command."""
    folder = tmp_path / "tests/entrypoints/openai/responses"
    folder.mkdir(parents=True)
    for name, text in (("test_basic.py", ""), ("test_harmony.py", "RemoteOpenAIServer("), ("test_unit.py", "x = 1")):
        (folder / name).write_text(text)
    reasons = left_out(tmp_path)
    assert list(reasons) == ["openai/responses/test_harmony.py", "openai/responses/test_unit.py"]
    assert "gpt-oss" in reasons["openai/responses/test_harmony.py"] and "no server" in list(reasons.values())[1]
    (folder / "test_new.py").write_text("with RemoteOpenAIServer(model, []) as server: ...")
    with pytest.raises(AssertionError, match="test_new"):
        left_out(tmp_path)


def test_suites_are_counted_by_folder() -> None:
    """Tests that end alike by how they end, and those that do not."""
    plain = {
        "a/x.py::1": ("passed", ""),
        "a/x.py::2": ("failed", "1"),
        "a/y.py::3": ("passed", ""),
        "b/z.py::4": ("passed", ""),
    }
    pool = plain | {"a/x.py::2": ("failed", "2"), "a/y.py::3": ("error", "")}
    assert per_suite(plain, pool) == [
        "suite a: tests=3 differ=1 same: failed=1 passed=1",
        "suite b: tests=1 differ=0 same: passed=1",
    ]
