"""Show a project's features, bring them online by hand, and compare look-ups with training."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table
from sqlalchemy import Engine

from perennial import project as projects
from perennial.features import catalog, online, parity, watch
from perennial.features import store as stores
from perennial.features.parity import Report
from perennial.features.store import Store
from perennial.local import folders, tables
from perennial.project import Project
from perennial.records import some
from perennial.settings import Settings, StateFolder
from perennial.store import quality, versions
from perennial.store.engine import make_engine

BY_HAND = "by hand"


@dataclass(frozen=True)
class _View:
    project: Project
    state: StateFolder
    store: Store
    engine: Engine

    def entries(self, told: Sequence[stores.ViewVersion]) -> list[catalog.Entry]:
        models = versions.all_versions(self.engine, self.project.name)
        users = catalog.users(self.state, models)
        known = quality.newest(self.engine, self.project.name)
        return catalog.entries(self.project, told, users, known)


def listing(settings: Settings, text: str, *, as_json: bool) -> int:
    """Every feature of a project: type, version, owner, models that use it."""
    with _view(settings, text) as view:
        rows = [entry.row for entry in view.entries(view.store.versions())]
    _show(rows, as_json)
    return 0


def show(settings: Settings, text: str, name: str, *, as_json: bool) -> int:
    """One feature: its versions, policies, quality, and some values."""
    with _view(settings, text) as view:
        told = view.store.versions()
        entry = catalog.named(view.entries(told), name, view.project)
        mark = view.store.mark() if told else None
        shown = catalog.examples(view.store, view.project, name)
        facts = catalog.facts(entry, told, mark, shown)
    if as_json:
        print(json.dumps(facts, indent=2))
        return 0
    for key, value in facts.items():
        _tell(key, value)
    return 0


def materialize(settings: Settings, text: str, *, as_json: bool) -> int:
    """Bring the newest features online, and say what was written and how good it is."""
    with _view(settings, text) as view:
        view.store.apply()
        done = online.materialize(view.store, view.project)
        seen = watch.measure(view.engine, view.store, view.project, done.moment)
        now = datetime.now(UTC)
        watch.keep(view.engine, view.project, seen, run=BY_HAND, now=now)
    facts = {"moment": done.moment.isoformat(), "rows": done.rows, "written": done.written}
    facts["quality"] = seen.verdict
    if as_json:
        print(json.dumps(facts, indent=2))
        return 0
    print(
        f"{done.written:,} rows written, {done.rows:,} tell of {view.project.name}"
        f" at {done.moment:%Y-%m-%d %H:%M}; quality: {seen.verdict}"
    )
    return 0


def compare(settings: Settings, text: str, *, entities: int, seed: int, as_json: bool) -> int:
    """Compare look-ups with training. Raises parity.Differs that names what does."""
    with _view(settings, text) as view:
        report = parity.measure(view.store, view.project, entities, seed)
    if as_json:
        print(json.dumps(_plain(report), indent=2))
    else:
        _show([_parity_row(row) for row in report.rows], False)
    if report.mismatches:
        told = some([m.sentence for m in report.mismatches])
        raise parity.Differs(
            f"{len(report.mismatches):,} values of {report.entities:,} entities differ by more"
            f" than {parity.TOLERANCE:g}: {told}"
        )
    return 0


@contextmanager
def _view(settings: Settings, text: str) -> Iterator[_View]:
    state = folders.state(settings, text)
    # A replay keeps its state elsewhere; what it made is looked at there.
    found = settings.model_copy(update={"home": state.root.parent})
    project = projects.load(folders.project_folder(settings, text or _folder(settings, state)))
    engine = make_engine(state.url)
    try:
        with stores.opened(found, project) as store:
            yield _View(project, state, store, engine)
    finally:
        engine.dispose()


def _folder(settings: Settings, state: StateFolder) -> str:
    """The project that a state folder is named after."""
    known = [*(settings.root / "examples").glob("*/project.yaml"), Path("project.yaml")]
    known += sorted(Path.cwd().glob("*/project.yaml"))
    mine = (f for f in known if f.is_file() and projects.load(f).name == state.root.name)
    return str(next(mine, Path(state.root.name)))


def _plain(report: Report) -> dict[str, Any]:
    return {
        "moment": report.moment.isoformat(),
        "entities": report.entities,
        "features": [_parity_row(row) for row in report.rows],
        "mismatches": [vars(m) for m in report.mismatches],
    }


def _parity_row(row: parity.Row) -> dict[str, Any]:
    return {
        "feature": row.feature,
        "on both sides": row.values,
        "missing on both": row.missing,
        "differ": row.differ,
        "largest difference": row.largest,
    }


def _tell(key: str, value: Any) -> None:
    if not isinstance(value, list):
        lines = value if isinstance(value, dict) else {"": value}
        told = "; ".join(f"{k} {v}".strip() for k, v in lines.items() if v is not None)
        print(f"{key:<14}{told or '-'}")
        return
    for number, one in enumerate(value):
        print(f"{key if not number else '':<14}{'  '.join(str(v) for v in one.values())}")


def _show(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(*rows[0], box=None, pad_edge=False)
    for row in rows:
        table.add_row(*["-" if value is None else str(value) for value in row.values()])
    tables.show(table)
