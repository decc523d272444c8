"""The gate lets through what keeps every limit, and gives a reason with numbers for each."""

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import tiny

from perennial import bundle
from perennial.evaluation import Evaluation, Judged
from perennial.evaluation.calibration import Calibration
from perennial.evaluation.fairness import Fairness
from perennial.evaluation.latency import Latency
from perennial.evaluation.performance import Gain, Performance
from perennial.ledger import Ledger
from perennial.project import Gates
from perennial.records import GateRecord, GateResult
from perennial.steps import gate as step
from perennial.steps.context import Context
from perennial.store.engine import make_engine

AS_OF = datetime(2011, 9, 1, tzinfo=UTC)
NAN = float("nan")


def judged(digest: str, auc: float | None = 0.7, error: float = 0.05, rows: int = 1204) -> Judged:
    numbers = Performance(rows, 0.4, auc, 0.7, 0.6, 0.5, 0.55, 0.6, ((500, 222), (241, 241)))
    return Judged(digest, AS_OF, numbers, Calibration(error, 0.2, ()))


def evaluation(**changes: object) -> Evaluation:
    """A candidate that keeps every limit against a champion."""
    start = datetime(2011, 6, 27, tzinfo=UTC)
    good = Evaluation(
        as_of=AS_OF,
        window_start=start,
        window_end=start.replace(month=7, day=4),
        table_rows=20_000,
        early_labels=0,
        candidate=judged("sha256:new"),
        champion=judged("sha256:old", auc=0.66),
        champion_may_have_seen=False,
        gain=Gain(0.04, 0.012, 0.95, 2000),
        fairness=(),
        importance=(),
        latency=Latency(200, 0.4, 0.9),
    )
    return replace(good, **changes)


def result(record: GateRecord, name: str) -> GateResult:
    return next(r for r in record.results if r.name == name)


def test_a_candidate_that_keeps_every_limit_passes():
    record = step.judge(evaluation(), Gates())

    assert record.passed
    assert record.reason == "all 6 limits kept"
    assert (record.candidate, record.champion) == ("sha256:new", "sha256:old")


def test_judging_twice_gives_the_same_record():
    assert step.judge(evaluation(), Gates()) == step.judge(evaluation(), Gates())


BROKEN = {
    "label times": (
        {"early_labels": 7},
        "7 of 20,000 rows use a label before it can be known",
    ),
    "rows": (
        {"candidate": judged("sha256:new", rows=63)},
        "63 rows judge, wanted at least 100",
    ),
    "AUC": (
        {"candidate": judged("sha256:new", auc=0.531)},
        "AUC 0.531 on 1,204 rows is below 0.600",
    ),
    "gain": (
        {"gain": Gain(0.006, -0.004, 0.95, 2000)},
        "AUC +0.006 against the champion on 1,204 rows;"
        " the 95% lower bound -0.004 is not above 0.000",
    ),
    "calibration": (
        {"candidate": judged("sha256:new", error=0.2)},
        "calibration error 0.200 on 1,204 rows is above 0.150",
    ),
    "latency": (
        {"latency": Latency(200, 80.0, 180.0)},
        "p95 180.000 ms on 200 rows is above 100.000 ms",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_one_broken_limit_refuses_with_its_numbers(name):
    changes, reason = BROKEN[name]

    record = step.judge(evaluation(**changes), Gates(max_calibration_error=0.15))

    assert not record.passed
    assert record.reason == reason
    assert [r.name for r in record.results if not r.passed] == [name]


UNMEASURED = {
    "AUC": {"candidate": judged("sha256:new", auc=None)},
    "gain": {"gain": None},
    "gain that is NaN": {"gain": Gain(NAN, NAN, 0.95, 2000)},
    "calibration": {"candidate": judged("sha256:new", error=NAN)},
    "latency": {"latency": Latency(200, NAN, NAN)},
}


@pytest.mark.parametrize("case", UNMEASURED)
def test_what_could_not_be_measured_breaks_its_limit(case):
    record = step.judge(evaluation(**UNMEASURED[case]), Gates())

    name = case.removesuffix(" that is NaN")
    assert not result(record, name).passed
    assert result(record, name).measured is None
    assert "could not be measured" in result(record, name).reason


def test_a_tie_keeps_the_champion():
    record = step.judge(evaluation(gain=Gain(0.0, 0.0, 0.95, 2000)), Gates())

    assert not result(record, "gain").passed


def test_the_first_model_needs_no_gain():
    record = step.judge(evaluation(champion=None, gain=None), Gates())

    assert record.passed
    assert result(record, "gain").reason == "nothing serves yet"
    assert record.champion == ""


def test_a_badly_calibrated_candidate_may_follow_a_worse_one():
    candidate, champion = judged("sha256:new", error=0.2), judged("sha256:old", error=0.3)

    found = evaluation(candidate=candidate, champion=champion)
    record = step.judge(found, Gates(max_calibration_error=0.15))

    assert record.passed
    assert "below the champion's 0.300" in result(record, "calibration").reason


def test_parity_is_judged_only_where_the_project_sets_a_limit():
    unfair = evaluation(fairness=(Fairness("sex", (), 0.313), Fairness("race", (), 0.9)))

    without = step.judge(unfair, Gates())
    strict = step.judge(unfair, Gates(min_parity_ratio=0.8))

    assert without.passed
    assert not strict.passed
    assert strict.reason == "parity ratio 0.313 on 1,204 rows is below 0.800"


def test_parity_that_could_not_be_measured_breaks_a_limit_that_is_set():
    record = step.judge(evaluation(), Gates(min_parity_ratio=0.8))

    assert not result(record, "parity ratio").passed


def test_a_champion_that_may_have_seen_the_rows_is_mentioned():
    record = step.judge(evaluation(champion_may_have_seen=True), Gates())

    assert "may have seen these rows" in result(record, "gain").reason


@pytest.fixture
def ctx(settings, tmp_path) -> Context:
    state = settings.state("tiny")
    engine = make_engine(state.url)
    now = datetime(2026, 1, 1, tzinfo=UTC)
    return Context(settings, tiny.project(), tmp_path, state, engine, Ledger(engine), "run-1", now)


def gated(ctx: Context, folder: Path, auc: float = 0.7) -> GateRecord:
    digest = tiny.bundle(folder / "model")
    found = evaluation(candidate=judged(digest, auc=auc))
    (folder / "evaluation.json").write_text(found.to_json())
    return step.gate(
        ctx, folder / "evaluation.json", folder / "model", folder / "judged", folder / "card.md"
    )


def test_evidence_is_added_to_a_copy_and_the_digest_stays(ctx, tmp_path):
    record = gated(ctx, tmp_path)

    assert bundle.verify(tmp_path / "judged") == record.candidate
    evidence = {p.name for p in (tmp_path / "judged" / "evidence").iterdir()}
    assert evidence == {"gate.json", "metrics.json", "card.md"}
    assert not (tmp_path / "model" / "evidence").exists()


def test_the_verdict_stands_in_the_ledger_with_pins_and_numbers(ctx, tmp_path):
    record = gated(ctx, tmp_path, auc=0.5)

    (entry,) = ctx.ledger.entries("tiny", "gate")

    assert entry.subject == entry.body["run"] == "run-1"
    assert entry.body["record"]["candidate"] == record.candidate
    assert entry.body["metrics"]["auc"] == 0.5
    assert entry.body["champion_metrics"]["auc"] == 0.66
    assert entry.body["lineage"]["data_digest"] == "sha256:" + "0" * 64
    ctx.ledger.verify()


def test_the_card_gives_every_limit_its_reason(ctx, tmp_path):
    record = gated(ctx, tmp_path, auc=0.5)

    card = (tmp_path / "card.md").read_text()

    assert card.startswith("# Refused")
    assert all(r.reason in card for r in record.results)


def test_the_record_in_the_bundle_replays_to_the_same_verdict(ctx, tmp_path):
    record = gated(ctx, tmp_path)
    evidence = tmp_path / "judged" / "evidence"

    again = step.judge(
        Evaluation.from_json((evidence / "metrics.json").read_text()), tiny.project().gates
    )

    assert again == record
    assert json.loads((evidence / "gate.json").read_text())["candidate"] == record.candidate
