"""Files appear whole under their final name, or not at all."""

import hashlib
import os
from pathlib import Path

import pytest

from perennial.store import files


def test_a_file_is_replaced_as_a_whole_and_nothing_else_stays(tmp_path: Path):
    path = tmp_path / "new" / "state.json"

    files.write_atomic(path, "old")
    files.write_atomic(path, b"new")

    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["state.json"]


def test_a_write_that_fails_leaves_the_old_file_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "state.json"
    files.write_atomic(path, "old")

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomic(path, "new")

    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_the_content_is_synced_before_the_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "state.json"
    seen: list[tuple[str, bool]] = []

    def sync(handle: int) -> None:
        kind = "folder" if Path(f"/proc/self/fd/{handle}").is_dir() else "file"
        seen.append((kind, path.exists()))

    monkeypatch.setattr(os, "fsync", sync)
    files.write_atomic(path, "text")

    assert seen == [("file", False), ("folder", True)]


def test_a_digest_says_its_algorithm_and_is_the_same_for_file_and_bytes(tmp_path: Path):
    data = b"x" * (3 << 20)
    path = tmp_path / "data"
    path.write_bytes(data)

    assert files.digest_file(path) == files.digest_bytes(data)
    assert files.digest_bytes(data) == "sha256:" + hashlib.sha256(data).hexdigest()
