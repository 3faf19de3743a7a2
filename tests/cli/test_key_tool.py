# SPDX-License-Identifier: Apache-2.0
"""`tokenpool key` prints what belongs into a pool file, and no key that was given to it."""

from __future__ import annotations

import io

import pytest

from tokenpool.cli.main import main
from tokenpool.config import PoolConfig
from tokenpool.tenant_config import hash_key

pytestmark = pytest.mark.cpu


def run(capsys, monkeypatch, *words: str, stdin: str = "") -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    status = main(["key", *words])
    return (status, *capsys.readouterr())


def test_new_prints_a_key_and_its_hash(capsys, monkeypatch):
    """The hash is that of the key, a pool file takes it, and no two keys are equal."""
    keys = set()
    for _ in range(3):
        status, out, _ = run(capsys, monkeypatch, "new")
        key, digest = (line.split()[1] for line in out.splitlines())
        assert (0, hash_key(key)) == (status, digest)
        assert len(key) > 40
        tenants = [{"name": "a", "keys": digest}]
        assert PoolConfig.from_dict({"models": [{"name": "m", "model": "x/y"}], "tenants": tenants}).tenants
        keys.add(key)
    assert 3 == len(keys)


def test_hash_reads_the_key_from_standard_input(capsys, monkeypatch):
    """One line, with or without its end."""
    for stdin in ("secret-012345678", "secret-012345678\n", "secret-012345678\r\n"):
        assert (0, hash_key("secret-012345678") + "\n", "") == run(capsys, monkeypatch, "hash", stdin=stdin)


@pytest.mark.parametrize(
    ("words", "stdin"),
    [([], "")]
    + [
        (["hash", *more], stdin)
        for more, stdin in ((["my-secret"], ""), ([], ""), ([], " my-secret-0123456\n"), ([], "my-secret\n"))
    ],
)
def test_mistakes_are_one_line_without_the_key(words, stdin, capsys, monkeypatch):
    """Exit status 2, and what was given is not repeated."""
    status, out, error = run(capsys, monkeypatch, *words, stdin=stdin)

    assert (2, "") == (status, out)
    assert error.startswith("tokenpool: error: ")
    assert error.count("\n") == 1
    assert "my-secret" not in error
