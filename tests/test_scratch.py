"""What a server fetches while it starts is gone when it serves, and what a killed one left too."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import servers
import tiny

from perennial import bundle
from perennial.contract import Contract
from perennial.errors import BadInput
from perennial.serving import options
from perennial.store import scratch
from perennial.store.objects import Folder

HOLDS = """
import sys, time
from perennial.store import scratch
with scratch.folder() as path:
    (path / "bundle").write_text("1")
    print(path, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for temporary files, of this process and its children."""
    path = tmp_path / "tmp"
    path.mkdir()
    monkeypatch.setenv("TMPDIR", str(path))
    monkeypatch.setattr("tempfile.tempdir", str(path))
    return path


@pytest.fixture
def kept(tmp_path: Path) -> str:
    """The URI of a bundle in a store."""
    tiny.bundle(tmp_path / "tiny")
    return Folder((tmp_path / "store").as_uri()).keep(tmp_path / "tiny", "tiny")


def test_a_fetched_bundle_lasts_as_long_as_it_is_read(temporary, kept):
    with options.bundle_folder(kept) as folder:
        assert folder.is_relative_to(temporary)
        assert bundle.verify(folder)

    assert list(temporary.iterdir()) == []


def test_a_bundle_that_is_refused_leaves_nothing(temporary, kept):
    with pytest.raises(BadInput), options.bundle_folder(kept) as folder:
        bundle.verify(folder, "sha256:" + "0" * 64)

    assert list(temporary.iterdir()) == []


def test_a_folder_of_this_machine_stays(tmp_path):
    digest = tiny.bundle(tmp_path / "tiny")

    with options.bundle_folder(str(tmp_path / "tiny")) as folder:
        assert folder == tmp_path / "tiny"

    assert bundle.verify(tmp_path / "tiny") == digest


def test_what_a_killed_server_left_is_removed_by_the_next_and_not_while_it_lives(temporary):
    command = [sys.executable, "-c", HOLDS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        held = Path(other.stdout.readline().strip())
        with scratch.folder():
            lived = (held / "bundle").exists()
        other.send_signal(signal.SIGKILL)
    assert (lived, held.exists()) == (True, True)

    with scratch.folder() as mine:
        assert list(temporary.iterdir()) == [mine]


@pytest.mark.parametrize(
    ("module", "call"), [(scratch.os, "open"), (scratch.fcntl, "flock")], ids=["opened", "locked"]
)
def test_a_folder_is_made_anew_when_another_server_removed_it_before_it_was(
    module, call, temporary, monkeypatch
):
    real, removed = getattr(module, call), []

    def late(*given: object) -> object:
        if not removed:
            removed.extend(temporary.iterdir())
            removed[0].rmdir()
        return real(*given)

    monkeypatch.setattr(module, call, late)

    with scratch.folder() as path:
        assert path.is_dir()
        assert [path] != removed


def test_servers_that_serve_a_fetched_bundle_have_removed_it(temporary, kept, tmp_path):
    python = servers.runtime_python()
    predictor = servers.Server("predictor", tmp_path / "predictor.log", python, bundle=kept)
    transformer = servers.Server(
        "transformer",
        tmp_path / "transformer.log",
        python,
        bundle=kept,
        predictor_host=predictor.address,
        segments=tmp_path / "segments",
    )
    try:
        predictor.wait_ready()
        transformer.wait_ready()
        left = list(temporary.glob("perennial-scratch-*"))
        contract = Contract.from_plain(bundle.parts(tmp_path / "tiny").contract)
        answered = transformer.infer(contract.to_request(tiny.rows(1), "r"))[0]
    finally:
        transformer.stop()
        predictor.stop()

    assert (left, answered) == ([], 200)
