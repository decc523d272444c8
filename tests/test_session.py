"""What a notebook asks of a project: where it answers, what is left to serve, what a run wrote."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Engine

from perennial import bundle, ledger
from perennial.drift.segments import Writer
from perennial.drift.windows import ClosedWindow, Served
from perennial.errors import BadInput
from perennial.local import session
from perennial.records import DriftReport, FeatureDrift, Phase
from perennial.settings import Settings
from perennial.store import rollouts
from perennial.store.engine import make_engine
from tests import tiny

NOW = datetime(2026, 1, 1, tzinfo=UTC)
DIGEST = "sha256:" + "1" * 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "tiny"
    made.mkdir()
    rows = tiny.project().model_copy(
        update={"source": tiny.project().source.model_copy(update={"path": "rows.csv"})}
    )
    (made / "project.yaml").write_text(bundle.project_json(rows).decode())
    tiny.rows(200).to_csv(made / "rows.csv", index=False)
    return made


@pytest.fixture
def here(settings: Settings, folder: Path) -> session.Session:
    return session.Session(settings, folder)


def with_settings(here: session.Session, **changes: object) -> session.Session:
    return session.Session(here.settings.model_copy(update=changes), here.folder)


def test_the_settings_say_where_models_answer(here):
    there = with_settings(here, edge_url="http://127.0.0.1:31080/", edge_host="tiny.example.com")

    assert there.edge() == session.Edge("http://127.0.0.1:31080", {"host": "tiny.example.com"})


def test_on_a_cluster_nothing_is_started_for_whoever_does_not_say(here):
    with pytest.raises(BadInput, match="set PERENNIAL_EDGE_URL to the ingress"):
        with_settings(here, launcher="job").edge()


def test_a_relative_home_is_one_of_the_root_wherever_the_notebook_stands(
    folder, root, monkeypatch, tmp_path
):
    monkeypatch.setenv("PERENNIAL_HOME", "build/none")
    monkeypatch.chdir(tmp_path)

    opened = session.open_project("examples/retail")

    assert opened.settings.home == root / "build" / "none"
    assert opened.folder == root / "examples" / "retail"


def test_windows_that_were_served_are_not_served_again(here, settings):
    first, second = (start for start, _ in list(here.windows())[:2])
    writer = Writer.new(settings.state("tiny").artifacts("segments"), "v1", ("a",))
    writer.write(window(first))

    assert next(here.windows())[0] == second


def test_a_history_that_was_served_to_its_end_is_told(here, settings):
    writer = Writer.new(settings.state("tiny").artifacts("segments"), "v1", ("a",))
    for start, _ in here.windows():
        writer.write(window(start))

    with pytest.raises(BadInput, match=r"all rows of tiny were served; forget .*state/tiny"):
        next(here.windows())


def test_a_run_is_found_by_the_name_that_its_first_step_wrote(here, settings):
    for run in ("one", "two"):
        folder = settings.state("tiny").runs / f"training-{run}"
        for name, text in pages(run).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)

    found = here.pages("two")

    assert [(p.step, p.kind, p.text) for p in found] == [
        ("evaluate", "text/html", '<b a="c">two</b>'),
        ("gate", "text/markdown", "# two"),
    ]
    assert 'srcdoc="&lt;b a=&quot;c&quot;&gt;two&lt;/b&gt;"' in str(
        found[0]._repr_mimebundle_()["text/html"]
    )
    assert found[1]._repr_mimebundle_() == {"text/markdown": "# two"}


def test_a_drifted_window_has_settled_only_when_its_run_has_ended(here, settings):
    start, end = tiny.START, tiny.project().window_end(tiny.START)
    engine = make_engine(settings.state("tiny").url)
    serves(engine)
    book = ledger.Ledger(engine)
    seen = [here._settled(start)]
    report(settings, start, end)
    steps = {
        "decision": {"window_end": end.isoformat(), "event_id": "e", "action": "retrain"},
        "run.started": {"run": "r", "trigger": "e", "as_of": end.isoformat()},
        "run.finished": {"run": "r", "state": "succeeded", "reason": "refused"},
    }
    for kind, body in steps.items():
        seen.append(here._settled(start))
        book.append(kind, project="tiny", subject="r", body=body, now=NOW)

    assert seen == [False] * 4
    assert here._settled(start)


def window(start: datetime) -> ClosedWindow:
    one = np.zeros(1)
    served = Served(start, "r1", one.reshape(1, 1), one)
    return ClosedWindow(start, tiny.project().window_end(start), DIGEST, 0, True, (served,))


def pages(run: str) -> dict[str, str]:
    return {
        "ingest/executor_output.json": f'{{"metadata": {{"run": "{run}"}}}}',
        "evaluate/page": f'<b a="c">{run}</b>',
        "gate/card": f"# {run}",
        "train/model": "none",
    }


def serves(engine: Engine) -> None:
    made = rollouts.wish(
        engine, project="tiny", version=1, digest=DIGEST, bundle_uri="file:///none", run_id="r"
    )
    rollouts.save(engine, replace(made, phase=Phase.PROMOTED, weight=100))
    rollouts.set_serving(engine, "tiny", made.id)


def report(settings: Settings, start: datetime, end: datetime) -> None:
    drift = FeatureDrift("a", "ks", 0.9, 1e-9, True, 0.0)
    found = DriftReport(start, end, DIGEST, 50, False, 0.01, (drift,))
    Writer.new(settings.state("tiny").artifacts("segments"), "v1", ("a",)).write_report(found)
