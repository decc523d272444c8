"""Whatever ends an ingest half way, no half snapshot is seen, and the next run completes."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import numpy as np
import pandas as pd
import pytest

from perennial.data import snapshots
from perennial.errors import Unavailable
from perennial.project import Project
from perennial.settings import Settings
from perennial.steps import ingest
from perennial.store import files

POINTS = 20
ROWS = 6_000
PAGE = 4096  # bytes
NOW = datetime(2026, 1, 1, tzinfo=UTC)
PROJECT = {
    "name": "days",
    "kind": "table",
    "source": {"path": "days.csv"},
    "time": {"column": "day"},
    "label": {"column": "up", "known_after": "5d"},
    "features": [{"name": "x", "type": "number"}, {"name": "job", "type": "category"}],
}
KEEPERS = ("data/snapshots.py", "store/files.py", "steps/ingest.py", "shutil.py")


def take(home: Path, source: Path) -> ingest.Snapshot:
    where = (Settings(home=home), Project.model_validate(PROJECT), source, "", None)
    return ingest.ingest(*where, home / "out", run="r", trigger="t", now=NOW)


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "ROW_GROUP", 500)
    monkeypatch.setattr(snapshots, "_CHUNK", 4096)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    days = pd.date_range("2020-01-01", periods=ROWS, freq="min").strftime("%Y-%m-%d %H:%M")
    frame = pd.DataFrame({"day": days, "x": rng.normal(size=ROWS), "up": [0, 1] * (ROWS // 2)})
    frame["job"] = [f"{n:x}" for n in rng.integers(0, 2**60, ROWS)]
    frame.to_csv(tmp_path / "days.csv", index=False)
    return tmp_path


def assert_whole(home: Path, digest: str) -> None:
    """What is seen is whole: every snapshot with its record and file of DVC, and the copy."""
    kept = home / "days" / "snapshots"
    seen = sorted(kept.glob("*.parquet"))
    for path in seen:
        assert files.digest_file(path) == digest == f"sha256:{path.stem}"
        assert json.loads(path.with_suffix(".json").read_text())["rows"] == ROWS
        assert f"path: {path.name}" in path.with_name(f"{path.name}.dvc").read_text()
    if (home / "out").exists():
        assert seen
        assert files.digest_file(home / "out") == digest


def assert_completes(home: Path, source: Path, digest: str) -> None:
    """The next run ends with the same snapshot and leaves nothing else."""
    assert take(home, source).digest == digest
    assert_whole(home, digest)
    assert list((home / "days" / "scratch").iterdir()) == []
    stem = digest.removeprefix("sha256:")
    kept = {path.name for path in (home / "days" / "snapshots").iterdir()}
    assert kept == {f"{stem}.parquet", f"{stem}.json", f"{stem}.parquet.dvc"}
    assert {path.name for path in home.iterdir()} == {"out", "days"}


def counted(stop: int, all_: bool) -> Callable[[FrameType, str, object], None]:
    """A profiler that kills this process at its n-th call, of all or of those that keep files."""
    left = stop

    def look(frame: FrameType, event: str, _: object) -> None:
        nonlocal left
        if event in ("call", "c_call") and (all_ or frame.f_code.co_filename.endswith(KEEPERS)):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            counted.calls = stop - left  # type: ignore[attr-defined]

    return look


def calls(home: Path, source: Path, all_: bool) -> int:
    """How many calls an ingest makes."""
    sys.setprofile(counted(10**9, all_))
    try:
        take(home, source)
    finally:
        sys.setprofile(None)
    return int(counted.calls)  # type: ignore[attr-defined]


def killed(home: Path, source: Path, stop: int, all_: bool) -> int:
    """Run an ingest in a child that ends at a call; gives the signal that ended it."""
    child = os.fork()
    if not child:
        sys.setprofile(counted(stop, all_))
        take(home, source)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_kill_at_any_of_20_points(source: Path, tmp_path: Path):
    digest = take(tmp_path / "warm", source).digest
    points = [
        (all_, i * calls(tmp_path / f"counted-{all_}", source, all_) // (POINTS // 2 + 1))
        for all_ in (True, False)
        for i in range(1, POINTS // 2 + 1)
    ]

    kept = 0
    for number, (all_, stop) in enumerate(points):
        home = tmp_path / f"killed-{number}"
        assert killed(home, source, stop, all_) == -signal.SIGKILL
        assert_whole(home, digest)
        kept += any((home / "days" / "snapshots").glob("*.parquet"))
        assert_completes(home, source, digest)

    assert 0 < kept < POINTS, "all kills came before the snapshot, or all behind it"


@pytest.mark.slow
def test_a_full_disk_at_any_of_20_sizes(source: Path, tmp_path: Path):
    digest = take(tmp_path / "whole", source).digest
    enough = least(tmp_path, source)

    told, kept = [], 0
    for number in range(POINTS):
        home = tmp_path / f"full-{number}"
        with disk(home, number * enough // POINTS + PAGE) as make_room:
            with pytest.raises(Exception) as caught:
                take(home / "state", source)
            told.append(caught.value)
            assert_whole(home / "state", digest)
            kept += any((home / "state" / "days" / "snapshots").glob("*.parquet"))
            is_disk = home.is_mount()
            make_room()
            assert_completes(home / "state", source, digest)

    # What the database says of a full disk, it says itself.
    assert sum(isinstance(e, Unavailable) and "is full" in str(e) for e in told) >= POINTS - 5
    assert kept < POINTS, "the disk was always full behind the snapshot"
    # The snapshot and its copy are of one size: limits of a file's size cannot come between them.
    assert kept or not is_disk, "the disk was never full behind the snapshot"


def least(folder: Path, source: Path) -> int:
    """The smallest disk, in bytes, that an ingest needs."""
    low, high = 0, 16 << 20
    while high - low > PAGE:
        middle = (low + high) // 2 // PAGE * PAGE
        with disk(folder / f"try-{middle}", middle + PAGE):
            try:
                take(folder / f"try-{middle}" / "state", source)
                high = middle
            except Exception:
                low = middle
    return high


@contextmanager
def disk(folder: Path, size: int) -> Iterator[Callable[[], None]]:
    """A folder with so many bytes on it, where this user may mount one; else files up to that."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        with limited(size) as make_room:
            yield make_room
        return
    try:
        yield lambda: _mounted("mount", "-o", "remount,size=64m", str(folder))
    finally:
        _mounted("umount", "-l", str(folder))


def _mounted(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def limited(size: int) -> Iterator[Callable[[], None]]:
    """No file of this process may be larger than that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
