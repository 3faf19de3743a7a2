# SPDX-License-Identifier: Apache-2.0
"""State in a folder of a name that others can guess: what others have made there is neither read nor written to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tokenpool.cluster.private_state import NotPrivateError, read_private, write_private

pytestmark = pytest.mark.cpu


def test_what_is_written_is_read_and_only_by_its_owner(tmp_path: Path) -> None:
    """The folder and the file are made for this user alone, and replacing leaves nothing behind."""
    path = tmp_path / "deep" / "state" / "a.json"
    for content in (b"one", b"two"):
        write_private(path, content)
        assert content == read_private(path)

    assert [0o700, 0o600] == [p.stat().st_mode & 0o777 for p in (path.parent, path)]
    assert ["a.json"] == os.listdir(path.parent)


def other_user(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(mode=0o700)
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)  # a folder of another user needs root to make


def open_to_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    folder.chmod(0o770)


def link(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder.parent / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(folder.parent / "elsewhere")


def file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_text("")


@pytest.mark.parametrize("made", [other_user, open_to_others, link, file])
def test_a_folder_of_others_is_refused(
    made: Callable[[Path, pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that another user made, that others may enter, or that is a link or a file, is not written to or read."""
    folder = tmp_path / "state"
    made(folder, monkeypatch)
    for use in (lambda: write_private(folder / "a", b"x"), lambda: read_private(folder / "a")):
        with pytest.raises(OSError) as refusal:
            use()
        assert isinstance(refusal.value, NotPrivateError) or made in (link, file)
    assert not any((tmp_path / "elsewhere").glob("*"))


def test_no_link_is_followed_to_a_file(tmp_path: Path) -> None:
    """A link in the place of the file is replaced, not written through, and not read."""
    path, victim = tmp_path / "state" / "a", tmp_path / "victim"
    victim.write_text("precious")
    path.parent.mkdir(mode=0o700)
    path.symlink_to(victim)
    with pytest.raises(OSError):
        read_private(path)
    write_private(path, b"mine")

    assert ("precious", b"mine", False) == (victim.read_text(), read_private(path), path.is_symlink())
