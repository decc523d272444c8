"""Rows that are kept aside can be seen, mended, replayed and dropped; none vanishes meanwhile."""

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import yaml
from contexts import AS_OF, Step, opened

from perennial import cli
from perennial.data.shelf import Shelf
from perennial.errors import RunFailed
from perennial.ledger import Ledger
from perennial.project import Project
from perennial.settings import Settings
from perennial.steps import validate
from perennial.store import objects, quarantine

GIVEN: dict[str, Any] = {
    "name": "few",
    "kind": "table",
    "time": {"row_order": {}},
    "label": {"column": "label"},
    "features": [{"name": "x", "type": "number"}, {"name": "t", "type": "category"}],
    "training": {"min_rows": 50},
}
BELOW_98 = {"expect": "ExpectColumnValuesToBeBetween", "args": {"column": "x", "max_value": 97}}
BELOW_99 = {"expect": "ExpectColumnValuesToBeBetween", "args": {"column": "x", "max_value": 98}}
NO_Z = {"expect": "ExpectColumnValuesToNotBeInSet", "args": {"column": "t", "value_set": ["z"]}}
UNIQUE = {"expect": "ExpectColumnValuesToBeUnique", "args": {"column": "x"}}


def rows() -> pd.DataFrame:
    frame = pd.DataFrame({"x": [float(x) for x in range(100)], "t": ["a", "b"] * 50})
    frame.loc[3, "t"] = "z"
    frame["row_id"] = range(100)
    frame["label"] = [0.0, 1.0] * 50
    times = pd.date_range("2011-01-01", periods=100, freq="h", tz="UTC")
    frame["event_time"] = times.as_unit("us")
    return frame


class Shop:
    """A project in a folder, its validate step, and the commands of a person."""

    def __init__(self, settings: Settings, folder: Path, capsys) -> None:
        self.folder = folder
        self._capsys = capsys
        self._step = Step(settings, folder)
        self._settings = settings
        self.expect(BELOW_98, NO_Z)

    def expect(self, *rules: dict[str, Any]) -> None:
        text = yaml.safe_dump(GIVEN | {"expectations": list(rules)})
        (self.folder / "project.yaml").write_text(text)
        self.project = Project.model_validate(GIVEN | {"expectations": list(rules)})

    def run(self, frame: pd.DataFrame, day: float = 0) -> validate.Checked:
        return self._step(self.project, frame, AS_OF + timedelta(day), run=f"r{day}")

    def kept(self) -> pd.DataFrame:
        return pd.read_parquet(self._step.out.kept)

    def says(self, *words: str, code: int = 0) -> str:
        project = ["--project", str(self.folder)]
        assert cli.main(["quarantine", *words, *project]) == code
        told = self._capsys.readouterr()
        return told.out if not code else told.err

    def batches(self) -> dict[str, quarantine.Batch]:
        return {batch.id: batch for batch in self._step.batches(self.project)}

    def told(self) -> list[str]:
        with opened(self._settings, self.project, self.folder) as ctx:
            return [entry.kind for entry in ctx.ledger.entries("few")]


@pytest.fixture
def shop(settings: Settings, tmp_path: Path, capsys) -> Shop:
    return Shop(settings, tmp_path, capsys)


def test_a_batch_is_listed_and_shown_with_its_rules_and_rows(shop: Shop):
    checked = shop.run(rows())

    listed = json.loads(shop.says("list", "--json"))
    shown = json.loads(shop.says("show", checked.batch[:5], "--json"))

    assert [(b["batch"], b["rows"], b["state"]) for b in listed] == [(checked.batch, 3, "held")]
    assert sorted(shown["rules"].values()) == [1, 2]
    assert [(row["quarantine_row"], row["x"]) for row in shown["shown"]] == [
        (4, 3.0),
        (99, 98.0),
        (100, 99.0),
    ]
    assert "3 rows, held" in shop.says("show", checked.batch)
    assert checked.batch in shop.says("list")


def test_data_and_rules_are_shown_as_they_are(shop: Shop, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    frame = rows()
    frame.loc[3, "t"] = "[/b] gone"
    args = {"column": "t", "regex": "^z[a-z/ ]+$|^[/]?[abz]$"}
    shop.expect({"expect": "ExpectColumnValuesToMatchRegex", "args": args})

    checked = shop.run(frame)

    assert args["regex"] in shop.says("list")
    assert "[/b] gone" in shop.says("show", checked.batch)


def test_rows_that_keep_a_mended_rule_are_back_in_the_next_run(shop: Shop):
    batch = shop.run(rows()).batch
    shop.expect()

    said = shop.says("replay", batch)
    # The source has moved on: these rows are nowhere but in the quarantine.
    later = rows().drop(index=[3, 98, 99])
    checked = shop.run(later, day=1)

    assert "3 rows" in said and "join the next run" in said
    assert (checked.kept, checked.aside) == (100, 0)
    kept = shop.kept()
    pd.testing.assert_frame_equal(kept.drop(columns="row_id"), rows().drop(columns="row_id"))
    # Their places in the source may be those of other rows by now.
    assert (kept["row_id"] < 0).sum() == 3
    assert kept["row_id"].is_unique


def test_a_row_that_joins_takes_no_other_rows_place(shop: Shop):
    batch = shop.run(rows()).batch
    shop.expect()
    shop.says("replay", batch)
    later = rows().drop(index=[3, 98, 99]).assign(row_id=range(97))

    shop.run(later, day=1)
    first = shop.kept()
    shop.run(later, day=2)

    assert first["row_id"].is_unique and len(first) == 100
    pd.testing.assert_frame_equal(shop.kept(), first)


def test_rows_that_the_source_has_again_do_not_come_back_twice(shop: Shop):
    batch = shop.run(rows()).batch
    shop.expect()
    shop.says("replay", batch)

    later = rows()
    later.loc[3, "label"] = 0.0  # a truth that came later makes no other row of it
    checked = shop.run(later, day=1)

    assert checked.kept == 100


def test_what_a_run_about_the_past_could_not_know_does_not_come_back(shop: Shop):
    batch = shop.run(rows()).batch
    shop.expect()
    shop.says("replay", batch)
    early = rows().drop(index=[3, 98, 99]).head(60)

    # A year before: only the row of the first hours was there by then.
    moment = (rows()["event_time"][59] - AS_OF) / timedelta(days=1)
    shop.run(early, day=moment)

    assert len(shop.kept()) == 61
    assert shop.kept()["event_time"].max() == early["event_time"].max()


def test_columns_that_the_source_gained_or_lost_do_not_keep_rows_away(shop: Shop):
    batch = shop.run(rows().assign(gone=1.0)).batch
    shop.expect()
    shop.says("replay", batch)

    later = rows().drop(index=[98, 99]).assign(new="n")
    checked = shop.run(later, day=1)

    # The row that the source still has is the same without what it gained.
    assert (checked.kept, checked.back.joined, checked.back.there) == (100, 2, 1)
    assert shop.kept()["new"].isna().sum() == 2


def test_a_row_held_before_and_after_the_source_gained_a_column_comes_back_once(
    shop: Shop, tmp_path: Path
):
    shop.expect(NO_Z)
    for day, letter in enumerate("ab"):
        given = rows().assign(new=1.0) if day else rows()
        batch = shop.run(given, day=day).batch
        table = exported(shop, batch, tmp_path)
        pd.read_csv(table).assign(t=letter).to_csv(table, index=False)
        shop.says("replay", batch, "--rows", str(table))

    checked = shop.run(rows().assign(new=1.0), day=2)

    assert (checked.back.joined, checked.kept) == (1, 100)
    assert shop.kept().loc[3, ["t", "new"]].tolist() == ["b", 1.0]


def test_rows_that_moved_up_in_a_source_without_times_are_the_same_rows(shop: Shop):
    batch = shop.run(rows()).batch
    shop.expect()
    shop.says("replay", batch)
    times = rows()["event_time"].head(99).tolist()
    later = rows().drop(index=0).assign(row_id=range(99), event_time=times)
    later["event_time"] = later["event_time"].dt.as_unit("us")

    checked = shop.run(later, day=1)

    assert (checked.back.joined, checked.back.there, checked.kept) == (0, 3, 99)


def test_zero_has_no_sign_and_nothing_is_no_number(shop: Shop):
    shop.expect(NO_Z)
    given = rows()
    given.loc[[3, 4], ["t", "label"]] = ["z", 1.0]
    given["y"] = [*([0.5] * 3), 0.0, -0.0, *([0.5] * 95)]
    given.loc[[3, 4], "x"] = float("nan")
    batch = shop.run(given).batch
    shop.expect()
    shop.says("replay", batch)

    checked = shop.run(given.drop(index=3), day=1)

    assert (checked.back.joined, checked.back.there) == (1, 1)


def test_rows_that_fit_no_column_stop_the_run_and_name_their_batch(shop: Shop):
    batch = shop.run(rows().assign(size="big")).batch
    shop.expect()
    shop.says("replay", batch)

    with pytest.raises(RunFailed, match=f"batch {batch} .* column size is .*drop {batch}"):
        shop.run(rows().assign(size=1.0), day=1)


def test_of_equal_rows_none_is_lost(shop: Shop):
    shop.expect(NO_Z)
    alike = rows().iloc[[3, 3, 3]]
    batch = shop.run(pd.concat([rows().head(3), alike, rows().tail(96)])).batch
    shop.expect()
    shop.says("replay", batch)

    # The source has one of the three left: it is one of them, and the other two come back.
    checked = shop.run(rows(), day=1)

    assert (checked.back.joined, checked.back.there, checked.kept) == (2, 1, 102)


def test_each_of_equal_rows_is_mended_for_itself(shop: Shop, tmp_path: Path):
    shop.expect(NO_Z)
    batch = shop.run(pd.concat([rows().head(3), rows().iloc[[3, 3]], rows().tail(96)])).batch
    table = exported(shop, batch, tmp_path)
    mended = pd.read_csv(table)
    mended["t"] = ["a", "b"]
    mended.to_csv(table, index=False)

    shop.says("replay", batch, "--rows", str(table))
    checked = shop.run(rows().drop(index=3), day=1)

    assert checked.back.joined == 2
    assert sorted(shop.kept()["t"][3:5]) == ["a", "b"]


def test_a_history_that_grows_holds_each_row_once(shop: Shop):
    first = shop.run(rows().head(99))
    second = shop.run(rows(), day=1)
    third = shop.run(rows(), day=2)

    # Rows 4 and 99 at first; row 100 came with the second run.
    assert (first.aside, first.again) == (2, 0)
    assert (second.aside, second.again, shop.batches()[second.batch].rows) == (3, 2, 1)
    assert (third.aside, third.again, third.batch) == (3, 3, "")


def test_a_row_that_came_back_and_breaks_a_rule_again_is_held_again(shop: Shop):
    batch = shop.run(rows()).batch
    shop.expect()
    shop.says("replay", batch)
    shop.expect(BELOW_98, NO_Z)

    checked = shop.run(rows(), day=1)

    assert (checked.aside, checked.again) == (3, 0)
    assert shop.batches()[checked.batch].state == "held"


# Commands and steps that are killed.


def raising(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


# Each is between two writes: rows first, then batch and entry together, then what goes.
KILLED = [(objects.Folder, "write"), (Ledger, "append"), (objects.Folder, "remove")]


@pytest.mark.parametrize("at", KILLED[:2], ids=["rows", "entry"])
def test_a_step_that_was_killed_holds_its_rows_when_it_is_taken_again(shop: Shop, monkeypatch, at):
    with monkeypatch.context() as killed:
        killed.setattr(*at, raising)
        with pytest.raises(KeyboardInterrupt):
            shop.run(rows())
    assert shop.batches() == {} and shop.told() == []

    batch = shop.run(rows()).batch

    assert shop.told() == ["rows.quarantined"]
    assert "3 rows, held" in shop.says("show", batch)


def test_a_batch_that_is_parted_while_a_run_reads_it_stops_no_run(shop: Shop, monkeypatch):
    batch = shop.run(rows()).batch
    shop.expect(BELOW_99, NO_Z)
    read, told = Shelf.read, []

    def parted(shelf: Shelf, one: quarantine.Batch) -> pa.Table:
        if not told:
            told.append(True)
            told.append(shop.says("replay", batch))
        return read(shelf, one)

    with monkeypatch.context() as person:
        person.setattr(Shelf, "read", parted)
        checked = shop.run(rows(), day=1)

    assert "1 rows" in told[1]
    assert (checked.kept, checked.aside, checked.again) == (98, 2, 2)


def test_rows_that_were_dropped_lie_nowhere_when_their_step_is_taken_again(
    shop: Shop, settings: Settings
):
    batch = shop.run(rows()).batch
    shop.says("drop", batch, "--because", "private")

    checked = shop.run(rows())

    (left,) = settings.home.rglob(f"{batch}.*.parquet")
    assert checked.batch == batch
    assert all(c.startswith("quarantine_") for c in pd.read_parquet(left).columns)


def test_a_step_that_is_taken_again_tells_its_batch_again(shop: Shop):
    first = shop.run(rows())

    assert shop.run(rows()).batch == first.batch
    assert shop.told() == ["rows.quarantined"]


@pytest.mark.parametrize("at", KILLED, ids=["rows", "entry", "rest"])
@pytest.mark.parametrize("command", ["replay", "drop"])
def test_a_command_that_was_killed_can_be_given_again(
    shop: Shop, settings: Settings, monkeypatch, at, command: str
):
    batch = shop.run(rows()).batch
    shop.expect(BELOW_99, NO_Z)
    words = [command, batch] + (["--because", "no use"] if command == "drop" else [])
    with monkeypatch.context() as killed:
        killed.setattr(*at, raising)
        shop.says(*words, code=130)
    done = len(shop.told()) == 2
    assert done == (at == KILLED[2])

    # What was done says so, and removes what the killed one left.
    shop.says(*words, code=2 if done else 0)

    state = {"replay": "renewed", "drop": "dropped"}[command]
    assert shop.batches()[batch].state == state
    held = {one.file for one in shop.batches().values() if one.state != "renewed"}
    assert {path.name for path in settings.home.rglob("quarantine/*.parquet")} == held
    assert len(shop.told()) == 2


def test_rows_that_still_break_a_rule_stay(shop: Shop):
    batch = shop.run(rows()).batch
    shop.expect(BELOW_99, NO_Z)

    said = shop.says("replay", batch)
    checked = shop.run(rows().drop(index=[3, 98, 99]), day=1)

    assert "1 rows of batch" in said and "2 still break rules" in said
    states = sorted((b.state, b.rows) for b in shop.batches().values())
    assert states == [("held", 2), ("renewed", 3), ("replayed", 1)]
    assert checked.kept == 98
    assert shop.kept()["x"].max() == 98.0


def test_without_any_mending_nothing_is_replayed(shop: Shop):
    batch = shop.run(rows()).batch

    said = shop.says("replay", batch, code=2)

    assert f"all 3 rows of batch {batch} still break rules" in said
    assert shop.batches()[batch].state == "held"


def test_mended_rows_take_the_place_of_broken_ones(shop: Shop, tmp_path: Path):
    batch = shop.run(rows()).batch
    table = exported(shop, batch, tmp_path)
    mended = pd.read_csv(table)
    mended.loc[mended["t"] == "z", "t"] = "a"
    mended.to_csv(table, index=False)

    said = shop.says("replay", batch, "--rows", str(table))
    checked = shop.run(rows(), day=1)

    assert "1 rows" in said and "2 still break rules" in said
    # The source still has the broken row, which stays aside; its mended copy is in.
    assert (checked.kept, checked.aside) == (98, 3)
    assert shop.kept()["t"][3] == "a"


def exported(shop: Shop, batch: str, folder: Path) -> Path:
    table = folder / "broken.csv"
    shop.says("show", batch, "--to", str(table))
    return table


def test_a_mended_row_gets_the_label_that_its_source_has_got_meanwhile(shop: Shop, tmp_path: Path):
    early = rows()
    early.loc[3, "label"] = None
    batch = shop.run(early).batch
    table = exported(shop, batch, tmp_path)
    mended = pd.read_csv(table)
    mended.loc[mended["t"] == "z", "t"] = "a"
    mended.to_csv(table, index=False)
    shop.says("replay", batch, "--rows", str(table))

    shop.run(rows(), day=1)

    assert shop.kept().loc[3, ["t", "label"]].tolist() == ["a", 1.0]


def test_each_of_equal_rows_gets_its_own_label(shop: Shop, tmp_path: Path):
    shop.expect(NO_Z)
    alike = rows().iloc[[3, 3]].assign(label=[1.0, 0.0])
    labelled = pd.concat([rows().head(3), alike, rows().tail(96)], ignore_index=True)
    early = labelled.copy()
    early.loc[[3, 4], "label"] = None
    batch = shop.run(early).batch
    table = exported(shop, batch, tmp_path)
    pd.read_csv(table).assign(t=["a", "b"]).to_csv(table, index=False)
    shop.says("replay", batch, "--rows", str(table))

    shop.run(labelled, day=1)

    assert shop.kept().loc[[3, 4], ["t", "label"]].values.tolist() == [["a", 1.0], ["b", 0.0]]


def test_a_label_can_be_mended(shop: Shop, tmp_path: Path):
    shop.expect(NO_Z)
    batch = shop.run(rows()).batch
    table = exported(shop, batch, tmp_path)
    pd.read_csv(table).assign(label=0.0).to_csv(table, index=False)
    shop.expect()
    shop.says("replay", batch, "--rows", str(table))

    checked = shop.run(rows().drop(index=3), day=1)

    assert (checked.back.joined, shop.kept()["label"][3]) == (1, 0.0)


def test_a_mended_row_that_equals_an_honest_one_is_another_row(shop: Shop, tmp_path: Path):
    shop.expect(NO_Z)
    given = rows()
    given.loc[[3, 4], ["x", "event_time"]] = [3.0, given["event_time"][3]]
    batch = shop.run(given).batch
    table = exported(shop, batch, tmp_path)
    pd.read_csv(table).assign(t="a").to_csv(table, index=False)
    shop.says("replay", batch, "--rows", str(table))

    still_broken = shop.run(given, day=1)
    mended = shop.run(given.assign(t=given["t"].replace("z", "a")), day=2)

    assert (still_broken.back.joined, still_broken.kept) == (1, 100)
    assert (mended.back.joined, mended.back.there, mended.kept) == (0, 1, 100)


def test_of_rows_that_are_mended_alike_the_source_may_mend_one(shop: Shop, tmp_path: Path):
    shop.expect(NO_Z)
    given = rows()
    given.loc[[3, 4], "t"] = ["z", "z"]
    batch = shop.run(given).batch
    table = exported(shop, batch, tmp_path)
    pd.read_csv(table).assign(t="a", x=3.5).to_csv(table, index=False)
    shop.says("replay", batch, "--rows", str(table))

    given.loc[4, ["t", "x"]] = ["a", 3.5]
    checked = shop.run(given, day=1)

    kept = shop.kept()
    assert (checked.back.joined, checked.back.there, checked.kept) == (1, 1, 100)
    assert sorted(kept.loc[kept["x"] == 3.5, "label"]) == [0.0, 1.0]


def test_mended_rows_are_mended_once_more_and_what_they_were_stays_known(
    shop: Shop, tmp_path: Path
):
    shop.expect(NO_Z)
    batch = shop.run(rows()).batch
    for letter in "ab":
        table = exported(shop, batch, tmp_path)
        pd.read_csv(table).assign(t=letter).to_csv(table, index=False)
        shop.says("replay", batch, "--rows", str(table))

    checked = shop.run(rows(), day=1)
    (shown,) = json.loads(shop.says("show", batch, "--json"))["shown"]

    assert (checked.aside, checked.again, shop.kept()["t"][3]) == (1, 1, "b")
    assert (shown["t"], shown["quarantine_was"]["t"]) == ("b", "z")


def test_rows_that_nobody_touched_come_back_as_they_were(shop: Shop, tmp_path: Path):
    shop.expect(NO_Z)
    odd = rows().assign(note=None, at=pd.Timestamp("2011-05-01 10:00:00.123456", tz="UTC"))
    odd["note"] = odd["note"].astype(object)
    odd.loc[3, "note"] = ""
    odd.loc[5, ["t", "note"]] = ["z", None]
    odd["part"] = 0.1 + 0.2
    odd["at"] = odd["at"].dt.as_unit("us")
    batch = shop.run(odd).batch
    shop.expect()

    shop.says("replay", batch, "--rows", str(exported(shop, batch, tmp_path)))
    checked = shop.run(odd, day=1)

    assert (checked.back.joined, checked.back.there) == (0, 2)


def test_a_repeated_row_can_be_mended(shop: Shop, tmp_path: Path):
    shop.expect(UNIQUE)
    frame = rows()
    frame.loc[7, "x"] = 6.0
    batch = shop.run(frame).batch
    table = exported(shop, batch, tmp_path)
    pd.read_csv(table).assign(x=7.5).to_csv(table, index=False)

    shop.says("replay", batch, "--rows", str(table))
    checked = shop.run(frame, day=1)

    assert (checked.kept, checked.aside, checked.again) == (100, 1, 1)
    assert 7.5 in shop.kept()["x"].tolist()


def test_replayed_rows_can_still_be_dropped(shop: Shop):
    batch = shop.run(rows()).batch
    shop.expect()
    shop.says("replay", batch)

    shop.says("drop", batch, "--because", "they were tests after all")
    checked = shop.run(rows().drop(index=[3, 98, 99]), day=1)

    assert (checked.kept, checked.back.joined) == (97, 0)
    assert shop.told() == ["rows.quarantined", "rows.replayed", "rows.dropped"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        pytest.param(lambda f: f.assign(quarantine_digest="x"), "mends none of", id="other rows"),
        pytest.param(lambda f: f.assign(x="much"), "does not hold rows", id="no number"),
        pytest.param(lambda f: f.drop(columns="quarantine_digest"), "quarantine_digest", id="bare"),
        pytest.param(lambda f: f.assign(label=7), "label is 7.0, wanted 0, 1", id="no label"),
        pytest.param(lambda f: f.assign(event_time=None), "event_time is NaT", id="no time"),
        pytest.param(
            lambda f: f.assign(event_time="2039-01-01 00:00:00Z"), "a time that has been", id="soon"
        ),
        pytest.param(lambda f: pd.concat([f, f["x"]], axis=1), "two columns x", id="two columns"),
        pytest.param(lambda f: pd.concat([f, f]), "rows 1 and 4 .* mend the same", id="twice"),
    ],
)
def test_a_file_of_other_rows_is_refused(shop: Shop, tmp_path: Path, spoil, said: str):
    batch = shop.run(rows()).batch
    table = exported(shop, batch, tmp_path)
    spoil(pd.read_csv(table)).to_csv(table, index=False)

    assert re.search(said, shop.says("replay", batch, "--rows", str(table), code=2))
    assert [b.state for b in shop.batches().values()] == ["held"]


@pytest.mark.parametrize("x", ["much", [[1.0]] * 3, pd.Timestamp("2011-01-01")], ids=str)
def test_a_parquet_file_of_other_types_is_refused(shop: Shop, tmp_path: Path, x: object):
    batch = shop.run(rows()).batch
    table = tmp_path / "broken.parquet"
    shop.says("show", batch, "--to", str(table))
    pd.read_parquet(table).assign(x=x).to_parquet(table)

    assert "does not hold rows" in shop.says("replay", batch, "--rows", str(table), code=2)


def test_a_repeated_row_is_not_judged_apart_from_the_one_that_it_repeats(shop: Shop):
    shop.expect(UNIQUE)
    frame = rows()
    frame.loc[7, "x"] = 6.0
    batch = shop.run(frame).batch

    assert "still break rules" in shop.says("replay", batch, code=2)


def test_dropped_rows_are_gone_for_good_and_that_is_written(shop: Shop):
    batch = shop.run(rows()).batch

    shop.says("drop", batch, "--because", "a test of the till")

    assert shop.batches()[batch].state == "dropped"
    assert "is dropped and has no rows: a test of the till" in shop.says("show", batch, code=2)
    assert "wanted one that is held or replayed" in shop.says("replay", batch, code=2)
    assert shop.told() == ["rows.quarantined", "rows.dropped"]


def test_rows_that_were_dropped_are_still_kept_out_and_counted(shop: Shop):
    batch = shop.run(rows()).batch
    shop.says("drop", batch, "--because", "no use")

    checked = shop.run(rows(), day=1)

    assert (checked.kept, checked.aside, checked.again, checked.batch) == (97, 3, 3, "")
    assert shop.batches()[batch].state == "dropped"


def test_a_batch_that_nobody_knows_is_refused(shop: Shop):
    shop.run(rows())

    assert "no batches of few begin with 'x'" in shop.says("show", "x", code=2)


def test_a_file_that_was_changed_on_the_shelf_is_not_read(shop: Shop, settings: Settings):
    batch = shop.run(rows()).batch
    (file,) = settings.home.rglob(f"{batch}.*.parquet")
    file.write_bytes(file.read_bytes()[:-1] + b"x")

    assert "is not what was kept aside" in shop.says("show", batch, code=RunFailed.exit_code)


def test_no_batch_is_told_in_words(shop: Shop):
    shop.expect()
    shop.run(rows())

    assert "No row of few was ever kept aside" in shop.says("list")
