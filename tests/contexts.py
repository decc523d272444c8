"""A step's context without a pipeline around it."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from perennial.ledger import Ledger
from perennial.project import Project
from perennial.settings import Settings
from perennial.steps import validate
from perennial.steps.context import Context
from perennial.store import files, quarantine
from perennial.store.engine import make_engine

NOW = datetime(2026, 1, 1, tzinfo=UTC)
AS_OF = datetime(2012, 1, 1, tzinfo=UTC)


def written(folder: Path, frame: pd.DataFrame) -> Path:
    """A frame as the file of a snapshot."""
    path = folder / "snapshot"
    frame.to_parquet(path, coerce_timestamps="us", index=False)
    return path


@contextmanager
def opened(
    settings: Settings, project: Project, folder: Path, run: str = "r1", now: datetime = NOW
) -> Iterator[Context]:
    """What ``steps.context.opened`` gives, for a project that is no file."""
    state = settings.state(project.name)
    engine = make_engine(state.url)
    try:
        yield Context(settings, project, folder, state, engine, Ledger(engine), run, now)
    finally:
        engine.dispose()


class Step:
    """The validate step on one project, as a run would take it."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder

    def __call__(
        self, project: Project, frame: pd.DataFrame, as_of: datetime = AS_OF, run: str = "r1"
    ) -> validate.Checked:
        path = written(self.folder, frame)
        given = validate.Given(path, files.digest_file(path), as_of)
        now = NOW + (as_of - AS_OF)
        with opened(self.settings, project, self.folder, run, now) as ctx:
            return validate.validate(ctx, given, self.out)

    @property
    def out(self) -> validate.Out:
        names = ("kept.parquet", "aside.parquet", "page.html")
        return validate.Out(*(self.folder / name for name in names))

    @property
    def page(self) -> str:
        return self.out.page.read_text()

    def batches(self, project: Project) -> list[quarantine.Batch]:
        with opened(self.settings, project, self.folder) as ctx:
            return quarantine.batches(ctx.engine, project.name)
