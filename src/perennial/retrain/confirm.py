"""Do our own served rows show the drift that an event claims?"""

from collections.abc import Iterator
from datetime import datetime

import numpy as np
from sqlalchemy import Engine

from perennial import bundle
from perennial.drift import detectors, segments
from perennial.drift.detectors import Watch
from perennial.project import Project
from perennial.records import DriftReport
from perennial.settings import StateFolder
from perennial.store import rollouts
from perennial.store.objects import Folder

# Longer stretches of drift decide nothing that these do not.
MOST_WINDOWS = 60


class FromSegments:
    """Tests the windows of the serving model again, from the rows that its servers wrote down."""

    def __init__(self, state: StateFolder, engine: Engine, project: Project) -> None:
        self._state = state
        self._engine = engine
        self._project = project
        self._segments = Folder(state.artifacts("segments"))
        self._watch: Watch | None = None

    def __call__(self, window_start: datetime) -> list[DriftReport]:
        """Reports of the windows up to this one, newest last, back to the last stable one."""
        serving = rollouts.serving(self._engine, self._project.name)
        if serving is None:
            return []
        found: list[DriftReport] = []
        for report in self._newest_first(self._detector(serving.digest), window_start):
            found.insert(0, report)
            stable = not report.thin and not report.is_drift
            if stable or len(found) == MOST_WINDOWS:
                break
        return found

    def _newest_first(self, watch: Watch, until: datetime) -> Iterator[DriftReport]:
        for start in reversed(segments.starts(self._segments)):
            if start > until:
                continue
            rows = segments.read(self._segments, start)
            own = np.array([digest == watch.digest for digest in rows.digests], dtype=bool)
            if own.any():
                yield watch.report(rows.matrix[own], start, self._project.window_end(start))

    def _detector(self, digest: str) -> Watch:
        if self._watch is None or self._watch.digest != digest:
            # scipy answers as alibi-detect does, and this process has no alibi-detect.
            folder = bundle.near(self._state, digest)
            parts = bundle.parts(folder, expected=digest)
            self._watch = detectors.watch(parts, backend="scipy")
        return self._watch
