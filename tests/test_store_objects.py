"""Artifacts are whole or absent, on a disk and in an object store alike."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from perennial.errors import BadInput, Unavailable
from perennial.settings import Settings, StateFolder
from perennial.store.objects import CONTENTS, Folder


def some_files(folder: Path) -> Path:
    """A folder with folders in it, a hidden one, an empty file and an odd name."""
    for name, data in {
        "model/a.json": b"{}",
        "model/empty": b"",
        ".cache/deep/x": b"\x00\xff",
        "a b=ü.txt": b"text",
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in _files(folder)}


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_what_is_written_is_read_and_listed(place: str):
    folder = Folder(place)
    uri = folder.write("b/two.txt", "zwei ü")
    folder.write("a.bin", b"\x00")
    folder.write("b/one.txt", b"")

    assert uri == f"{place}/b/two.txt"
    assert folder.read("b/two.txt") == "zwei ü".encode()
    assert folder.names() == ["a.bin", "b/one.txt", "b/two.txt"]
    assert folder.names("b") == ["b/one.txt", "b/two.txt"]
    assert folder.names("none") == []
    assert (folder / "b").names() == ["one.txt", "two.txt"]
    assert (folder.exists("a.bin"), folder.exists("b"), folder.exists("c")) == (True, False, False)


def test_what_is_written_again_is_replaced(place: str):
    folder = Folder(place)
    folder.write("a", b"old, and longer")
    folder.write("a", b"new")

    assert folder.read("a") == b"new"


def test_what_is_not_there_is_told_with_its_address(place: str):
    with pytest.raises(BadInput, match=f"nothing lies at {place}/deep/none"):
        Folder(place).read("deep/none")


def test_a_large_file_comes_back_as_it_went(place: str):
    data = bytes(range(256)) * 50_000

    Folder(place).write("large", data)

    assert Folder(place).read("large") == data


def test_a_whole_folder_is_kept_and_fetched(place: str, tmp_path: Path):
    source = some_files(tmp_path / "source")

    uri = Folder(place).keep(source, "kept/1")
    fetched = Folder(place).fetch("kept/1", tmp_path / "far" / "copy")

    assert uri == f"{place}/kept/1"
    assert contents(fetched) == contents(source)
    assert list(fetched.parent.iterdir()) == [fetched], "no draft is left"


def test_a_folder_whose_list_is_missing_was_not_kept(place: str, tmp_path: Path):
    folder = Folder(place)
    folder.write("kept/model/a.json", b"{}")

    with pytest.raises(BadInput, match="nothing was kept whole at .*/kept: contents.json is"):
        folder.fetch("kept", tmp_path / "copy")

    assert not folder.holds("kept")
    assert not (tmp_path / "copy").exists()


def test_the_list_of_a_folder_is_written_last(place: str, tmp_path: Path, monkeypatch):
    written: list[str] = []
    folder = Folder(place)
    monkeypatch.setattr(folder, "write", lambda name, data: written.append(name))

    folder.keep(some_files(tmp_path / "source"), "kept")

    assert len(written) == 5
    assert written[-1] == f"kept/{CONTENTS}"


def test_other_bytes_than_were_kept_are_refused_and_nothing_stays(place: str, tmp_path: Path):
    folder = Folder(place)
    folder.keep(some_files(tmp_path / "source"), "kept")
    folder.write("kept/model/a.json", b"[]")

    with pytest.raises(BadInput, match=r"kept/model/a\.json holds other bytes than were kept"):
        folder.fetch("kept", tmp_path / "copy")

    assert [p.name for p in tmp_path.iterdir() if "copy" in p.name] == []


def test_a_file_that_was_removed_is_told(place: str, tmp_path: Path):
    folder = Folder(place)
    folder.keep(some_files(tmp_path / "source"), "kept")
    listed = json.loads(folder.read(f"kept/{CONTENTS}"))
    folder.write(f"kept/{CONTENTS}", json.dumps({**listed, "gone": "sha256:0"}))

    with pytest.raises(BadInput, match="nothing lies at .*/kept/gone"):
        folder.fetch("kept", tmp_path / "copy")


@pytest.mark.parametrize("name", ["../../escaped", "/escaped", "a/../../escaped", ""])
def test_a_list_that_names_files_outside_is_refused(place: str, tmp_path: Path, name: str):
    folder = Folder(place)
    folder.write("kept/escaped", b"evil")
    folder.write(f"kept/{CONTENTS}", json.dumps({name: "sha256:0"}))

    with pytest.raises(BadInput, match="lies outside of its folder"):
        folder.fetch("kept", tmp_path / "deep" / "copy")


@pytest.mark.parametrize("text", ["not json", "[]", '"x"'])
def test_a_list_that_is_damaged_is_told(place: str, tmp_path: Path, text: str):
    Folder(place).write(f"kept/{CONTENTS}", text)

    with pytest.raises(BadInput, match="contents.json is damaged: not a list of files"):
        Folder(place).fetch("kept", tmp_path / "copy")


def test_keeping_again_sends_only_what_changed(place: str, tmp_path: Path, monkeypatch):
    source = some_files(tmp_path / "source")
    folder = Folder(place)
    folder.keep(source, "kept")
    (source / "model" / "b.json").write_text("new")
    sent: list[str] = []
    write = folder.write
    monkeypatch.setattr(folder, "write", lambda n, data: (sent.append(n), write(n, data)))

    folder.keep(source, "kept")
    folder.keep(source, "kept")

    assert sent == ["kept/model/b.json", f"kept/{CONTENTS}"]
    assert contents(folder.fetch("kept", tmp_path / "copy")) == contents(source)


def test_a_folder_that_was_there_first_stays(place: str, tmp_path: Path):
    Folder(place).keep(some_files(tmp_path / "source"), "kept")
    first = tmp_path / "copy"
    first.mkdir()
    (first / "mine").write_text("first")

    Folder(place).fetch("kept", first)

    assert contents(first) == {"mine": b"first"}


def test_a_folder_with_a_file_called_like_the_list_is_refused(place: str, tmp_path: Path):
    (tmp_path / CONTENTS).write_text("mine")

    with pytest.raises(BadInput, match="rename it"):
        Folder(place).keep(tmp_path, "kept")


def test_a_file_that_is_being_written_is_not_there_yet(tmp_path: Path):
    (tmp_path / ".a.parquet.123.tmp").write_text("half")

    assert Folder(tmp_path).names() == []


def test_a_path_and_its_address_are_the_same_folder(tmp_path: Path):
    odd = tmp_path / "a b%20"

    Folder(odd).write("x", b"1")

    assert Folder(odd.as_uri()).read("x") == b"1"
    assert (odd / "x").read_bytes() == b"1"


@pytest.mark.parametrize("uri", ["gs://bucket/x", "s3:///no-bucket", "http://host/x"])
def test_an_address_of_another_kind_is_refused_with_what_is_wanted(uri: str):
    with pytest.raises(BadInput, match="wanted file:///folder or s3://bucket/prefix"):
        Folder(uri)


def test_a_disk_that_refuses_is_told_with_the_address(tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")

    with pytest.raises(Unavailable, match="file/x cannot be reached now"):
        Folder(tmp_path / "file").write("x", b"")


@pytest.mark.slow
def test_a_store_that_does_not_answer_is_told_within_seconds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    folder = Folder("s3://bucket/prefix")

    with pytest.raises(Unavailable, match="s3://bucket/prefix/x cannot be reached now"):
        folder.read("x")
    with pytest.raises(Unavailable, match="s3://bucket/prefix/x cannot be reached now"):
        folder.write("x", b"1")


@pytest.mark.stores
def test_a_bucket_that_is_gone_is_no_empty_folder(s3: str):
    lost = Folder("s3://no-such-bucket-at-all/prefix")

    with pytest.raises(Unavailable, match="there is no bucket no-such-bucket-at-all"):
        lost.names()
    with pytest.raises(Unavailable, match="there is no bucket no-such-bucket-at-all"):
        lost.exists("x")
    with pytest.raises(Unavailable, match="bucket does not exist"):
        lost.write("x", b"1")


class OwnPrefixOnly:
    """An S3 store whose policy lets list and read below a prefix, and ask for nothing else."""

    def __init__(self, store) -> None:
        self._store = store

    def __getattr__(self, name: str):
        return getattr(self._store, name)

    def get_file_info(self, what):
        if isinstance(what, str):
            raise OSError("AWS Error ACCESS_DENIED during HeadObject operation: No response body.")
        return self._store.get_file_info(what)


@pytest.mark.stores
def test_rights_below_a_prefix_are_enough(s3: str, tmp_path: Path):
    folder = Folder(s3)
    folder._store._s3 = OwnPrefixOnly(folder._store._s3)

    assert (folder.names(), folder.exists("a"), folder.holds("kept")) == ([], False, False)

    folder.keep(some_files(tmp_path / "source"), "kept")
    assert folder.holds("kept")
    assert contents(folder.fetch("kept", tmp_path / "copy")) == contents(tmp_path / "source")


@pytest.mark.stores
def test_a_writer_that_is_killed_leaves_no_object(s3: str):
    child = (
        "import os, sys; from perennial.store.objects import Folder\n"
        "stream = Folder(sys.argv[1])._store._s3.open_output_stream(sys.argv[2] + '/x')\n"
        "stream.write(b'a' * 12_000_000); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", child, s3, s3.removeprefix("s3://")], check=False)

    assert Folder(s3).names() == []


def test_artifacts_lie_in_the_state_folder_unless_the_settings_say_otherwise(tmp_path: Path):
    here = Settings(home=tmp_path).state("churn")
    there = Settings(home=tmp_path, artifacts="s3://bucket/tenant/").state("churn")

    assert here.artifacts("bundles") == here.bundles.as_uri()
    assert there.artifacts("bundles") == "s3://bucket/tenant/churn/bundles"
    assert there.bundles == here.bundles
    assert StateFolder(tmp_path).artifacts("runs") == (tmp_path / "runs").as_uri()


def test_the_database_is_the_state_folders_unless_the_settings_name_one(tmp_path: Path):
    named = Settings(home=tmp_path, state_url="postgresql+psycopg://host/db").state("churn")

    assert named.url == "postgresql+psycopg://host/db"
    assert Settings(home=tmp_path).state("churn").url == f"sqlite:///{tmp_path}/churn/state.db"
