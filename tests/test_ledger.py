"""The ledger keeps its order and content, and tells how a model came to serve."""

import math
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import Engine

from perennial import ledger
from perennial.errors import BadInput, LoopBroken

NOW = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
OLD, NEW, BAD = ("sha256:" + c * 64 for c in "abc")


@pytest.fixture
def book(engine: Engine) -> ledger.Ledger:
    return ledger.Ledger(engine)


def fill(book: ledger.Ledger, count: int = 5) -> None:
    for n in range(count):
        book.append("decision", project="churn", subject=f"e{n}", body={"n": n}, now=NOW)


DISARM = {
    "sqlite": ("DROP TRIGGER ledger_no_update", "DROP TRIGGER ledger_no_delete"),
    "postgresql": ("ALTER TABLE ledger DISABLE TRIGGER USER",),
}


def tamper(engine: Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in (*DISARM[engine.dialect.name], *statements):
            connection.exec_driver_sql(statement)


def test_an_entry_comes_back_as_it_was_appended(book: ledger.Ledger):
    body = {"features": ["a", "b"], "gain": 0.1, "text": "über", "nested": {"none": None}}

    made = book.append("gate", project="churn", subject="run-1", body=body, now=NOW, event_time=NOW)

    assert book.entries("churn") == [made]
    assert made.body == body
    assert (made.seq, made.at, made.event_time) == (1, NOW, NOW)
    book.verify()


def test_entries_are_read_by_project_kind_and_subject(book: ledger.Ledger):
    fill(book, 2)
    book.append("promoted", project="churn", subject="v2", body={}, now=NOW)
    book.append("promoted", project="bank", subject="v1", body={}, now=NOW)

    assert [e.kind for e in book.entries("churn")] == ["decision", "decision", "promoted"]
    assert [e.subject for e in book.entries("churn", "promoted")] == ["v2"]
    assert [e.subject for e in book.entries("churn", "decision", "e1")] == ["e1"]


def test_a_measurement_that_is_no_number_is_kept_as_missing(book: ledger.Ledger):
    book.append("gate", project="p", subject="r", body={"auc": math.nan, "at": NOW}, now=NOW)

    assert book.entries("p")[0].body == {"auc": None, "at": NOW.isoformat()}


def test_a_body_that_json_cannot_hold_is_refused(book: ledger.Ledger):
    with pytest.raises(TypeError, match="set has no canonical JSON"):
        book.append("gate", project="p", subject="r", body={"x": {1}}, now=NOW)

    assert book.entries("p") == []


def test_an_empty_ledger_holds(book: ledger.Ledger):
    book.verify()


TAMPERED = {
    "one changed byte of a body": ("UPDATE ledger SET body='{\"n\":7}' WHERE seq=3", 3),
    "another subject": ("UPDATE ledger SET subject='e9' WHERE seq=2", 2),
    "another time": ("UPDATE ledger SET at='2020-01-01T00:00:00+00:00' WHERE seq=4", 4),
    "a deleted entry": ("DELETE FROM ledger WHERE seq=3", 3),
    "a deleted first entry": ("DELETE FROM ledger WHERE seq=1", 1),
    "a deleted last entry": ("DELETE FROM ledger WHERE seq=5", 5),
}


@pytest.mark.parametrize(("statement", "seq"), TAMPERED.values(), ids=TAMPERED.keys())
def test_the_ledger_names_the_entry_at_which_it_was_tampered_with(
    engine: Engine, book: ledger.Ledger, statement: str, seq: int
):
    fill(book)
    tamper(engine, statement)

    with pytest.raises(LoopBroken, match=f"the ledger is broken at entry {seq}:"):
        book.verify()


def test_two_entries_that_changed_places_are_found(engine: Engine, book: ledger.Ledger):
    fill(book)
    tamper(
        engine,
        "UPDATE ledger SET seq=99 WHERE seq=2",
        "UPDATE ledger SET seq=2 WHERE seq=3",
        "UPDATE ledger SET seq=3 WHERE seq=99",
    )

    with pytest.raises(LoopBroken, match="entry 2: it does not follow"):
        book.verify()


def test_a_deleted_entry_whose_followers_moved_up_is_found(engine: Engine, book: ledger.Ledger):
    fill(book)
    moved = [f"UPDATE ledger SET seq={n - 1} WHERE seq={n}" for n in (4, 5)]
    tamper(engine, "DELETE FROM ledger WHERE seq=3", *moved)

    with pytest.raises(LoopBroken, match="entry 3: it does not follow"):
        book.verify()


def result(name: str, passed: bool, reason: str) -> dict[str, Any]:
    return {
        "name": name,
        "measured": 0.7,
        "limit": 0.6,
        "rows": 512,
        "passed": passed,
        "reason": reason,
    }


def gate(run: str, candidate: str, champion: str, *results: dict[str, Any]) -> dict[str, Any]:
    record = {
        "candidate": candidate,
        "champion": champion,
        "as_of": "2011-06-05T00:00:00+00:00",
        "window_start": "2011-05-22T00:00:00+00:00",
        "window_end": "2011-06-05T00:00:00+00:00",
        "results": list(results),
    }
    lineage = {
        "data_digest": "sha256:" + "d" * 64,
        "code_commit": "0123456789abcdef0123456789abcdef01234567",
        "code_dirty": True,
        "parameters": {"max_depth": 4, "eta": 0.123456},
        "lock_digest": "sha256:" + "e" * 64,
        "seed": 7,
        "as_of": "2011-06-05T00:00:00+00:00",
    }
    return {"run": run, "record": record, "lineage": lineage, "metrics": {}, "champion_metrics": {}}


def started(run: str, trigger: str) -> dict[str, Any]:
    return {
        "run": run,
        "trigger": trigger,
        "as_of": "2011-06-05T00:00:00+00:00",
        "data_digest": "sha256:" + "d" * 64,
        "rows": 12345,
        "source": "simulator",
    }


def served(version: int, digest: str, reason: str) -> dict[str, Any]:
    return {"rollout": version, "version": version, "digest": digest, "reason": reason}


FIRST = [
    ("run.started", "run-1", started("run-1", "by hand 20260102T0304")),
    ("gate", "run-1", gate("run-1", OLD, "", result("auc", True, "0.70 is at least 0.60"))),
    ("registered", "v1", {"run": "run-1", "version": 1, "digest": OLD}),
    ("run.finished", "run-1", {"run": "run-1", "state": "succeeded", "reason": ""}),
    ("served", "v1", served(1, OLD, "the first model has nothing to be compared with")),
]
WINDOW = {"window_start": "2011-05-29T00:00:00+00:00", "window_end": "2011-06-05T00:00:00+00:00"}
RETRAINED = [
    (
        "event.received",
        "e1",
        {"id": "e1", "source": "/v1", **WINDOW, "drifted": ["recency_days"], "model_digest": OLD},
    ),
    (
        "decision",
        "e1",
        {
            "action": "retrain",
            "reason": "2 windows in a row drifted",
            "event_id": "e1",
            **WINDOW,
            "confirmed": ["recency_days"],
        },
    ),
    ("run.started", "run-2", started("run-2", "e1")),
    ("gate", "run-2", gate("run-2", NEW, OLD, result("gain", True, "AUC gained 0.03"))),
    ("registered", "v2", {"run": "run-2", "version": "v2", "digest": NEW}),
    ("run.finished", "run-2", {"run": "run-2", "state": "succeeded", "reason": ""}),
    (
        "rollout.step",
        "v2",
        {
            **served(2, NEW, "no errors in 40 requests"),
            "weight": 10,
            "verdict": "advance",
            "canary_requests": 40,
        },
    ),
    ("promoted", "v2", served(2, NEW, "all steps passed")),
]
REFUSED = [
    ("run.started", "run-3", started("run-3", "e2")),
    ("gate", "run-3", gate("run-3", BAD, NEW, result("gain", False, "AUC lost 0.05"))),
    ("run.finished", "run-3", {"run": "run-3", "state": "refused", "reason": "AUC lost 0.05"}),
]


@pytest.fixture
def tell(book: ledger.Ledger):
    def build(*parts: list[tuple[str, str, dict[str, Any]]]) -> list[ledger.Entry]:
        for kind, subject, body in [line for part in parts for line in part]:
            book.append(kind, project="churn", subject=subject, body=body, now=NOW)
        return book.entries("churn")

    return build


STORY = """\
v2 (bbbbbbbb) serves churn since 2026-01-02 03:04.

  event       window 2011-05-29 to 2011-06-05 drifted in recency_days
  decision    retrain: 2 windows in a row drifted
              confirmed from the served rows: recency_days
  run         with data up to 2011-06-05, succeeded
  data        sha256:dddddddddddd, 12,345 rows from simulator
  code        commit 0123456789ab, with changes that no commit holds
  parameters  eta 0.1235, max_depth 4
  lock        sha256:eeeeeeeeeeee
  seed        7
  gate        passed on the rows of 2011-05-22 to 2011-06-05, against aaaaaaaa
              kept   gain: AUC gained 0.03
  registered  as v2 (bbbbbbbb)
  rollout      10 %  advance: no errors in 40 requests (40 canary requests)
  promoted    2026-01-02 03:04: all steps passed

Refused since:
  cccccccc, data up to 2011-06-05: AUC lost 0.05"""


def test_why_tells_the_way_of_the_serving_model_and_who_was_refused_since(tell):
    lines = ledger.why(tell(FIRST, RETRAINED, REFUSED))

    assert "\n".join(lines) == STORY


def test_why_of_the_first_model_says_that_it_was_made_by_hand(tell):
    text = "\n".join(ledger.why(tell(FIRST)))

    assert text.startswith("v1 (aaaaaaaa) serves churn since")
    assert "  started     by hand\n" in text
    assert "against no champion" in text
    assert "  first       2026-01-02 03:04: the first model has nothing" in text
    assert "Refused" not in text


@pytest.mark.parametrize("name", ["v1", "aaaaaaaa", OLD], ids=["label", "short", "digest"])
def test_why_knows_an_older_model_by_any_of_its_names(tell, name: str):
    lines = ledger.why(tell(FIRST, RETRAINED), name)

    assert lines[0] == "v1 (aaaaaaaa) does not serve now."
    assert "  started     by hand" in lines


def test_why_tells_which_limit_a_refused_candidate_broke(tell):
    lines = ledger.why(tell(FIRST, RETRAINED, REFUSED), "cccccccc")

    assert lines[0] == "The candidate cccccccc was refused by the gate."
    assert "              BROKEN gain: AUC lost 0.05" in lines
    assert not [line for line in lines if "registered" in line]


def test_why_shows_run_and_event_ids_and_whole_digests_only_when_asked(tell):
    entries = tell(FIRST, RETRAINED)
    brief, long = ("\n".join(ledger.why(entries, verbose=v)) for v in (False, True))

    for text in ("run-2", "event e1 from /v1", "sha256:" + "d" * 64, "0123456789abcdef01234567"):
        assert text in long
        assert text not in brief


def test_why_names_what_it_knows_when_it_is_asked_for_another_model(tell):
    with pytest.raises(BadInput, match=r"model 'v9' is not in the ledger; .*\(v1, v2\)"):
        ledger.why(tell(FIRST, RETRAINED), "v9")


def test_why_of_an_empty_ledger_says_that_nothing_serves():
    assert ledger.why([]) == ["No model serves yet."]


def test_why_after_a_taken_back_promotion_is_about_the_model_before(tell):
    back = [("rolled_back", "v2", served(2, NEW, "by hand"))]

    lines = ledger.why(tell(FIRST, RETRAINED, back))

    assert lines[0].startswith("v1 (aaaaaaaa) serves churn since")


def test_why_after_a_canary_was_rolled_back_is_still_about_the_serving_model(tell):
    back = [("rolled_back", "v2", served(2, NEW, "5xx"))]

    lines = ledger.why(tell(FIRST, RETRAINED[:-1], back))

    assert lines[0].startswith("v1 (aaaaaaaa) serves churn since")


def test_why_breaks_long_reasons_into_aligned_lines(tell):
    long = [
        (k, s, {**b, "reason": "word " * 60} if k == "promoted" else b) for k, s, b in RETRAINED
    ]

    lines = ledger.why(tell(FIRST, long))

    assert max(len(line) for line in lines) <= 100
    at = next(n for n, line in enumerate(lines) if line.startswith("  promoted"))
    assert lines[at + 1].startswith(" " * 14 + "word")


EDIT = "spec.predictor.maxReplicas is 3, applied was 1"
GONE = "v1 serves by the store, and the cluster had no InferenceService of it"


def found(kind: str, version: int, **body: object) -> tuple[str, str, dict[str, Any]]:
    return kind, f"v{version}", {"rollout": version, "version": version, **body}


BEFALLEN = [
    found("serving.restored", 1, reason=GONE),
    found("serving.edited", 1, edits=[EDIT, "spec.x is gone"]),
    found("serving.edited", 1, edits=[]),
]


@pytest.mark.parametrize("verbose", [False, True], ids=["briefly", "at length"])
def test_why_tells_in_order_what_befell_the_servers_of_a_version(tell, verbose: bool):
    entries = tell(FIRST, BEFALLEN[:2], RETRAINED[:-1], BEFALLEN[2:])

    text = " ".join(" ".join(ledger.why(entries, "v1", verbose=verbose)).split())

    assert text.endswith(
        "first 2026-01-02 03:04: the first model has nothing to be compared with"
        f" restored 2026-01-02 03:04: {GONE}"
        f" edited 2026-01-02 03:04: {EDIT}; spec.x is gone"
        " edited 2026-01-02 03:04: nothing is edited any more"
    )


def test_why_tells_what_befell_servers_only_with_their_own_version(tell):
    entries = tell(FIRST, BEFALLEN, RETRAINED, [found("serving.edited", 2, edits=[EDIT])])

    newer, older = ("\n".join(ledger.why(entries, name)) for name in ("v2", "v1"))

    assert (newer.count("  edited  "), newer.count("  restored  ")) == (1, 0)
    assert (older.count("  edited  "), older.count("  restored  ")) == (2, 1)
    plain = ledger.why([e for e in entries if not e.kind.startswith("serving.")], "v2")
    assert [line for line in newer.splitlines() if "  edited  " not in line] == plain


def test_why_uses_the_time_of_the_data_where_an_entry_has_one(tell):
    moment = datetime(2011, 6, 6, tzinfo=UTC)
    entries = [
        replace(e, event_time=moment) if e.kind == "promoted" else e for e in tell(FIRST, RETRAINED)
    ]

    assert ledger.why(entries)[0] == "v2 (bbbbbbbb) serves churn since 2011-06-06."


def test_why_breaks_no_name_at_its_hyphens():
    for before in range(30, 90):
        text = "x " * (before // 2) + "retail-predictor-00002"

        assert any("retail-predictor-00002" in line for line in ledger._row("canary", text))
