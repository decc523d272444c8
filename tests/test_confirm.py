"""A hint of drift is confirmed, or not, from the rows that our own servers wrote down."""

from datetime import datetime
from pathlib import Path

import pytest
import tiny
from sqlalchemy import Engine

from perennial import contract
from perennial.drift import segments
from perennial.drift.windows import ClosedWindow, Served
from perennial.errors import BadInput
from perennial.retrain.confirm import FromSegments, bundle_folder
from perennial.settings import StateFolder
from perennial.store import rollouts
from perennial.store.engine import make_engine

WINDOW = tiny.WINDOW_ROWS * tiny.STEP
STABLE, DRIFTED = 0.0, 3.0


class Place:
    """A state folder with a serving model, into which windows can be served."""

    def __init__(self, folder: Path) -> None:
        self.state = StateFolder(folder / "tiny")
        self.engine: Engine = make_engine(self.state.url)
        self.project = tiny.project()
        draft = folder / "draft"
        self.digest = tiny.bundle(draft)
        draft.rename(self._made(bundle_folder(self.state, self.digest)))
        self._serves(self.digest)
        self.confirm = FromSegments(self.state, self.engine, self.project)

    def start(self, number: int) -> datetime:
        return tiny.START + number * WINDOW

    def serve(self, number: int, shift: float, count: int = 50, digest: str = "") -> None:
        """Write one part with rows of the window with this number."""
        frame = tiny.rows(count, seed=number + 10, shift=shift)
        matrix = contract.learn(self.project.features, frame).encode(frame)
        served = Served(self.start(number), f"r{number}", matrix, matrix[:, 0])
        writer = segments.Writer.new(self.state.segments, "v1", self.project.feature_names)
        start, end = self.start(number), self.start(number + 1)
        writer.write(ClosedWindow(start, end, digest or self.digest, 0, True, (served,)))

    def drifted(self, number: int) -> list[tuple[int, bool, bool]]:
        """Number, thinness and drift of each window that the confirmation looked at."""
        reports = self.confirm(self.start(number))
        return [((r.window_start - tiny.START) // WINDOW, r.thin, r.is_drift) for r in reports]

    def _made(self, path: Path) -> Path:
        path.parent.mkdir(parents=True)
        return path

    def _serves(self, digest: str) -> None:
        state = rollouts.wish(
            self.engine, project="tiny", version=1, digest=digest, bundle_uri="", run_id="run-1"
        )
        rollouts.set_serving(self.engine, "tiny", state.id)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


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


def test_a_bundle_that_was_changed_is_not_used(place: Place):
    place.serve(0, DRIFTED)
    reference = bundle_folder(place.state, place.digest) / "model" / "reference.npy"
    reference.write_bytes(reference.read_bytes()[:-1] + b"x")

    with pytest.raises(BadInput, match="reference.npy is damaged"):
        place.confirm(place.start(0))
