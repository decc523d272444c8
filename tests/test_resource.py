"""Rollouts as ModelRollouts, and ModelRollouts as wishes."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import yaml
from adapters import rollout
from jsonschema import Draft7Validator

from perennial.ledger import Entry
from perennial.project import Rollout
from perennial.records import BY_HAND, Phase
from perennial.rollout import resource
from perennial.rollout.resource import Look

NOW = datetime(2026, 1, 1, tzinfo=UTC)
QUIET = Look(steps=(), revision="", waits="", edits=())


def step(weight: int, verdict: str = "advance") -> Entry:
    body = {"weight": weight, "verdict": verdict, "reason": "30 requests", "canary_requests": 30}
    body |= {"rollout": 2, "revision": "retail-predictor-00002"}
    return Entry(1, NOW, None, "rollout.step", "retail", "v2", body, "", "")


def status(state, look=QUIET, before=None, now=NOW):
    return resource.status(state, Rollout(), look, before or {}, now)


@pytest.fixture
def schema(root):
    crd = yaml.safe_load((root / "kustomize/base/crd.yaml").read_text())
    found = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    # Draft 7 says exclusiveMinimum by a number; the API server by a flag.
    text = yaml.safe_dump(found).replace("exclusiveMinimum: true", "type: number")
    return {k: Draft7Validator(v) for k, v in yaml.safe_load(text).items()}


CANARY = replace(
    rollout(2),
    bundle_uri="s3://b/x",
    phase=Phase.CANARY,
    step=1,
    weight=50,
    reason="12 of 30 requests seen",
)


def test_a_rollout_is_told_as_the_schema_wants(schema):
    look = Look([step(10)], "retail-predictor-00002", "", ())

    told = status(CANARY, look)

    assert not list(schema["status"].iter_errors(told))
    assert (told["phase"], told["step"], told["weight"]) == ("Canary", "2/3", 50)
    assert told["history"][0]["revision"] == told["revision"] == "retail-predictor-00002"
    spec = resource.document(CANARY, "retail-v2", Rollout())["spec"]
    assert not list(schema["spec"].iter_errors(spec))


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("is_moving", [False, True])
def test_each_phase_is_one_that_the_schema_knows(schema, phase, is_moving):
    told = status(replace(CANARY, phase=phase), replace(QUIET, is_moving=is_moving))

    assert not list(schema["status"].iter_errors(told))


def test_a_condition_keeps_the_time_of_its_last_turn():
    before = status(CANARY)
    later = NOW + timedelta(minutes=5)

    same = status(CANARY, before=before, now=later)
    over = status(replace(CANARY, phase=Phase.PROMOTED), before=before, now=later)

    assert {c["lastTransitionTime"] for c in same["conditions"]} == {NOW.isoformat()}
    turned = {c["type"] for c in over["conditions"] if c["lastTransitionTime"] != NOW.isoformat()}
    assert turned == {"Progressing", "Complete"}


def test_an_edit_from_outside_is_a_condition_of_its_own():
    told = status(CANARY, Look((), "", "", ("canaryTrafficPercent is 33",)))

    applied = next(c for c in told["conditions"] if c["type"] == "AsApplied")
    assert (applied["status"], applied["reason"]) == ("False", "EditedOutside")
    assert applied["message"] == "canaryTrafficPercent is 33"


def test_a_version_that_is_rolled_out_again_gets_a_name_of_its_own():
    first, again = rollout(7), replace(rollout(7), id=9, run_id=f"{BY_HAND}8")

    assert resource.name(first, [first, again]) == "retail-v7"
    assert resource.name(again, [first, again]) == "retail-v7-r9"


def test_what_a_person_wrote_becomes_a_wish_and_keeps_its_name():
    written = {
        "metadata": {"name": "mine", "uid": "u-1"},
        "spec": {
            "project": "retail",
            "version": 3,
            "digest": "sha256:3",
            "steps": [50, 100],
            "analysis": {"maxP95Ms": 80},
            "deadlines": {"readySeconds": 30},
        },
    }

    wish = resource.wish(written)

    assert not resource.is_ours(written)
    assert wish.limits == {"max_p95_ms": 80, "ready_s": 30, "steps": [50, 100]}
    state = replace(rollout(3), run_id=wish.run_id)
    assert resource.name(state, [state]) == "mine"


def test_every_limit_of_a_project_has_its_place_in_the_resource():
    spec = resource.document(CANARY, "x", Rollout())["spec"]

    said = {**spec["analysis"], **spec["deadlines"], "steps": spec["steps"]}
    assert len(said) == len(Rollout.model_fields)
