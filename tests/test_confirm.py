"""A hint of drift is confirmed, or not, from the rows that our own servers wrote down."""

import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
import tiny
from sqlalchemy import Engine

from perennial import bundle, contract
from perennial.drift import segments
from perennial.drift.windows import ClosedWindow, Served
from perennial.errors import BadInput
from perennial.retrain.confirm import FromSegments
from perennial.settings import StateFolder
from perennial.steps import register
from perennial.store import rollouts
from perennial.store.engine import make_engine
from perennial.store.objects import Folder

WINDOW = tiny.WINDOW_ROWS * tiny.STEP
STABLE, DRIFTED = 0.0, 3.0


class Place:
    """A state folder with a serving model, into which windows can be served."""

    def __init__(self, folder: Path, database: str = "", artifacts: str = "") -> None:
        self.state = StateFolder(folder / "tiny", database, artifacts)
        self.engine: Engine = make_engine(self.state.url)
        self.project = tiny.project()
        draft = folder / "draft"
        self.digest = tiny.bundle(draft)
        register.keep(draft, self.state, self.digest)
        self._serves(self.digest)
        self.confirm = FromSegments(self.state, self.engine, self.project)

    @property
    def kept(self) -> Path:
        return self.state.bundles / bundle.name_of(self.digest)

    def start(self, number: int) -> datetime:
        return tiny.START + number * WINDOW

    def serve(self, number: int, shift: float, count: int = 50, digest: str = "") -> None:
        """Write one part with rows of the window with this number."""
        frame = tiny.rows(count, seed=number + 10, shift=shift)
        matrix = contract.learn(self.project.features, frame).encode(frame)
        served = Served(self.start(number), f"r{number}", matrix, matrix[:, 0])
        writer = segments.Writer.new(
            self.state.artifacts("segments"), "v1", self.project.feature_names
        )
        start, end = self.start(number), self.start(number + 1)
        writer.write(ClosedWindow(start, end, digest or self.digest, 0, True, (served,)))

    def drifted(self, number: int) -> list[tuple[int, bool, bool]]:
        """Number, thinness and drift of each window that the confirmation looked at."""
        reports = self.confirm(self.start(number))
        return [((r.window_start - tiny.START) // WINDOW, r.thin, r.is_drift) for r in reports]

    def _serves(self, digest: str) -> None:
        state = rollouts.wish(
            self.engine, project="tiny", version=1, digest=digest, bundle_uri="", run_id="run-1"
        )
        rollouts.set_serving(self.engine, "tiny", state.id)


@pytest.fixture(params=["here", pytest.param("cluster", marks=pytest.mark.stores)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """All on this disk, or the database on PostgreSQL and the artifacts on S3."""
    where = [request.getfixturevalue(n) for n in ("tenant_url", "s3") if request.param == "cluster"]
    found = Place(tmp_path, *where)
    yield found
    found.engine.dispose()


def test_drift_is_found_again_in_the_rows_on_the_disk(place: Place):
    place.serve(0, STABLE)
    place.serve(1, DRIFTED)

    (stable, drifted) = place.confirm(place.start(1))

    assert (stable.is_drift, drifted.drifted) == (False, ("a",))
    assert drifted.window_end == place.start(2)
    assert (drifted.rows, drifted.model_digest) == (50, place.digest)


def test_it_looks_back_to_the_last_stable_window_and_no_further(place: Place):
    for number, shift in enumerate([DRIFTED, STABLE, DRIFTED, DRIFTED]):
        place.serve(number, shift)

    assert place.drifted(3) == [(1, False, False), (2, False, True), (3, False, True)]


def test_it_looks_through_thin_windows(place: Place):
    place.serve(0, DRIFTED)
    place.serve(1, DRIFTED, count=5)
    place.serve(2, DRIFTED)

    assert place.drifted(2) == [(0, False, True), (1, True, False), (2, False, True)]


def test_later_windows_do_not_speak_for_an_earlier_one(place: Place):
    place.serve(0, STABLE)
    place.serve(1, DRIFTED)

    assert place.drifted(0) == [(0, False, False)]


def test_parts_of_a_window_are_judged_together(place: Place):
    for _ in range(3):
        place.serve(0, DRIFTED, count=10)

    assert place.drifted(0) == [(0, False, True)]


def test_rows_that_another_model_served_do_not_count(place: Place):
    place.serve(0, DRIFTED, digest="sha256:other")
    place.serve(1, STABLE, count=30)
    place.serve(1, DRIFTED, digest="sha256:other")

    assert place.drifted(1) == [(1, False, False)]
    assert place.confirm(place.start(1))[-1].rows == 30


def test_there_is_nothing_to_confirm_before_rows_were_served(place: Place):
    assert place.confirm(place.start(3)) == []


def test_a_pod_without_the_bundle_fetches_it(place: Place, tmp_path: Path):
    place.serve(0, DRIFTED)
    if place.state.artifact_root:
        shutil.rmtree(place.kept)

    assert place.drifted(0) == [(0, False, True)]
    assert bundle.verify(place.kept) == place.digest


@pytest.mark.stores
def test_other_bytes_from_the_store_are_not_used_and_not_kept(tmp_path: Path, s3: str):
    place = Place(tmp_path, artifacts=s3)
    place.serve(0, DRIFTED)
    other = tmp_path / "other"
    tiny.bundle(other, seed=9)
    shutil.rmtree(place.kept)
    shared = Folder(place.state.artifacts("bundles"))
    shared.keep(other, bundle.name_of(place.digest))

    for _ in range(2):
        with pytest.raises(BadInput, match=f"wanted {place.digest}"):
            place.confirm(place.start(0))

    assert not place.kept.exists()


def test_a_bundle_that_was_changed_is_not_used(place: Place):
    place.serve(0, DRIFTED)
    reference = place.kept / "model" / "reference.npy"
    reference.write_bytes(reference.read_bytes()[:-1] + b"x")

    with pytest.raises(BadInput, match="reference.npy is damaged"):
        place.confirm(place.start(0))

    is_a_copy = bool(place.state.artifact_root)
    assert place.kept.exists() != is_a_copy, "the only one stays, a copy is fetched again"
