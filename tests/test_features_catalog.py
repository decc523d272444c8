"""Features are listed with who answers for them, what they became, and which models use them."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import tiny
import yaml

from perennial import cli
from perennial.data import simulator
from perennial.features import catalog, store
from perennial.features.store import ViewVersion
from perennial.project import Simulator
from perennial.settings import Settings
from perennial.steps import features
from perennial.store import versions
from perennial.store.engine import make_engine

ROOT = Path(__file__).parents[1]
START = datetime(2020, 1, 1, tzinfo=UTC)
AS_OF = datetime(2011, 6, 6, tzinfo=UTC)


def version(number: int, **fields: dict[str, str]) -> ViewVersion:
    return ViewVersion(number, START + timedelta(days=number), fields)


def test_changes_tell_what_each_version_did_to_a_feature():
    told = [
        version(0, spend={"made_by": "aa"}),
        version(1, spend={"made_by": "aa"}, orders={"made_by": "aa"}),
        version(2, spend={"made_by": "bb", "owner": "Ann"}, orders={"made_by": "aa"}),
        version(3, orders={"made_by": "aa"}),
    ]

    found = [(c.version, c.what) for c in catalog.changes(told, "spend")]

    assert found == [
        ("v0", "registered"),
        ("v2", "made by: aa -> bb; owner: none -> Ann"),
        ("v3", "removed"),
    ]
    assert [c.version for c in catalog.changes(told, "orders")] == ["v1"]


def test_models_are_listed_under_the_features_that_they_see(settings: Settings):
    state = settings.state("tiny")
    engine = make_engine(state.url)
    digest = tiny.bundle(settings.home / "made")
    gone = versions.next_version(engine, "tiny", "sha256:" + "0" * 64, "run-1", START)
    there = versions.next_version(engine, "tiny", digest, "run-2", START)
    state.bundles.mkdir(parents=True)
    (settings.home / "made").rename(state.bundles / digest.removeprefix("sha256:"))
    engine.dispose()

    found = catalog.users(state, [gone, there])

    assert found == dict.fromkeys(("a", "b", "c", "colour"), ("v2",))


def shop(folder: Path, **spend: str) -> Path:
    """A retail project of its own, with something said of its spend."""
    told = yaml.safe_load((ROOT / "examples" / "retail" / "project.yaml").read_text())
    told["features"] = [{**f, **spend} if f["name"] == "spend" else f for f in told["features"]]
    folder.mkdir(exist_ok=True)
    (folder / "project.yaml").write_text(yaml.safe_dump(told))
    return folder


def made(settings: Settings, folder: Path, out: Path) -> features.FeatureTable:
    from perennial.project import load

    snapshot = out.with_name("snapshot.parquet")
    simulator.simulate(Simulator(seed=5, days=200, customers=100)).to_parquet(
        snapshot, coerce_timestamps="us"
    )
    origin = features.Origin("run-1", START)
    return features.build(
        settings, load(folder), snapshot, AS_OF, out, page=out.with_name("p.html"), origin=origin
    )


def said(capsys: pytest.CaptureFixture[str], *args: str) -> Any:
    assert cli.main(["features", *args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_commands_tell_versions_quality_and_values(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    project = shop(tmp_path / "shop")
    made(settings, project, tmp_path / "table.parquet")
    shop(project, owner="Ann", description="Money in 90 days", missing="fail", max_age="14d")
    made(settings, project, tmp_path / "table.parquet")

    listed = said(capsys, "list", "--project", str(project))
    shown = said(capsys, "show", "spend", "--project", str(project))
    done = said(capsys, "materialize", str(project))
    parity = said(capsys, "parity", str(project), "--entities", "30")

    by_name = {row["feature"]: row for row in listed}
    assert by_name["spend"] | {"version": "v1", "owner": "Ann"} == by_name["spend"]
    assert by_name["orders"]["version"] == "v0"
    assert by_name["orders"]["quality"] in ("good", "warn")
    assert (shown["missing"], shown["max age"]) == ("fail", "14d")
    assert [v["version"] for v in shown["versions"]] == ["v0", "v1"]
    assert "owner: none -> Ann" in shown["versions"][1]["what"]
    assert len(shown["examples"]) == catalog.EXAMPLES
    assert shown["quality"]["nulls"] == 0
    assert done["written"] == 0
    assert (parity["entities"], parity["mismatches"]) == (30, [])


def test_parity_that_fails_names_feature_and_entity_and_ends_with_1(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from perennial.project import load

    project = shop(tmp_path / "shop")
    made(settings, project, tmp_path / "table.parquet")
    with store.opened(settings, load(project)) as opened:
        mark = opened.mark()
        assert mark is not None
        newest = pd.read_parquet(opened.rows).query("event_time == @mark.moment")
        wrong = opened.read(newest["customer_id"].head(1).tolist(), mark.moment)
        entity = int(wrong["customer_id"].iloc[0])
        wrong = wrong.assign(event_time=mark.moment, orders=99.0)
        opened.write(wrong)

    code = cli.main(["features", "parity", str(project)])

    assert code == 1
    assert f"orders of {entity} is 99.0 online" in capsys.readouterr().err


def test_a_feature_that_is_not_there_is_told_with_those_that_are(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    project = shop(tmp_path / "shop")
    make_engine(settings.state("retail").url).dispose()

    code = cli.main(["features", "show", "spent", "--project", str(project)])

    assert code == 2
    assert "retail has no feature 'spent'; it has recency_days" in capsys.readouterr().err


def test_features_that_nobody_made_yet_cannot_be_brought_online(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    project = shop(tmp_path / "shop")
    make_engine(settings.state("retail").url).dispose()

    code = cli.main(["features", "materialize", str(project)])

    assert code == 4
    assert "no features of retail are there" in capsys.readouterr().err
