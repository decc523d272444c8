"""What Knative mode makes of moments that a real cluster passes through in a second."""

from dataclasses import replace
from typing import Any

import pytest
from adapters import rollout

from perennial import kube
from perennial.errors import BadInput, PerennialError, Unavailable
from perennial.records import BY_HAND, RolloutState
from perennial.rollout import knative, manifest, plan

FIRST, OTHER = "retail-predictor-00001", "retail-predictor-00002"


class FakeClient:
    """An InferenceService, its Knative Service, and Knative's revisions by name."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self.applied: list[tuple[str, int | None]] = []
        self.created: list[str] = []
        self.fault: PerennialError | None = None

    def create(self, new: Any) -> None:
        self.created.append(manifest.revision(new))

    def replace(self, new: Any) -> None:
        fault, self.fault = self.fault, None
        if isinstance(fault, kube.Conflict | BadInput):
            raise fault
        self.objects["retail"]["spec"] = new["spec"]
        if fault:
            raise fault
        self.applied.append((manifest.revision(new), manifest.percent(new)))

    def has_revision(self, called: str, name: str) -> None:
        meta = {"name": called, "labels": {manifest.REVISION: name}}
        self.objects[called] = {"metadata": meta}


def document(state: RolloutState) -> dict[str, Any]:
    labels = {manifest.REVISION: plan.name(state), manifest.ROLLOUT: str(state.id)}
    return {"metadata": {"name": "retail"}, "spec": {"predictor": {"labels": labels}}}


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    """A cluster on which v1 has all traffic, as Knative says."""
    made = FakeClient()
    monkeypatch.setattr(kube, "find", lambda _client, _kind, name: made.objects.get(name))
    made.objects["retail"] = document(rollout(1))
    told = {"traffic": [{"revisionName": FIRST, "percent": 100}]}
    made.objects["retail-predictor"] = {"metadata": {}, "status": told}
    made.has_revision(FIRST, "v1")
    made.has_revision(OTHER, "v8")
    return made


@pytest.fixture
def service(client: FakeClient) -> knative.KnativeService:
    return knative.KnativeService(client, "retail", document, lambda: rollout(1))  # type: ignore[arg-type]


def rolled_out(client: FakeClient, revision: str) -> None:
    told = {"latestRolledoutRevision": revision} if revision else {}
    client.objects["retail"]["status"] = {"components": {"predictor": told}}


@pytest.mark.parametrize(
    ("known", "said"),
    [("", "nobody"), (OTHER, "v8")],
    ids=["right after a first model", "right after a promotion"],
)
def test_a_candidate_waits_until_kserve_knows_what_serves(client, service, known, said):
    rolled_out(client, known)

    wanted = f"v2 waits until KServe notes that v1 has all traffic; so far it has noted {said}"
    with pytest.raises(Unavailable, match=wanted):
        service.start(rollout(2))
    assert client.applied == []

    rolled_out(client, FIRST)
    service.start(rollout(2))
    assert client.applied == [("v2", 0)]


@pytest.fixture
def canary(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> knative.KnativeService:
    """v1 serves, v2 is ready with nothing, and an adapter that has put it there."""
    monkeypatch.setattr(knative.KnativeService, "_is_newest_ready", lambda self, seen: True)
    made = knative.KnativeService(
        client,  # type: ignore[arg-type]
        "retail",
        document,
        lambda: rollout(1),
        hold_s=0,
    )
    rolled_out(client, FIRST)
    made.start(rollout(2))
    client.applied.clear()
    return made


@pytest.mark.parametrize(
    "fault",
    [kube.Conflict("changed meanwhile"), Unavailable("no answer")],
    ids=["conflict", "lost"],
)
def test_a_share_that_met_a_fault_is_no_edit_of_somebody(client, canary, fault):
    client.fault = fault
    with pytest.raises(Unavailable, match=str(fault)):
        canary.set_weights({"v1": 90, "v2": 10})

    with pytest.raises(Unavailable, match="on its way to"):
        canary.set_weights({"v1": 90, "v2": 10})
    assert manifest.percent(client.objects["retail"]) == 10


def test_after_a_restart_a_percent_of_no_step_is_somebodys_edit(client, canary):
    restarted = knative.KnativeService(
        client,  # type: ignore[arg-type]
        "retail",
        document,
        lambda: rollout(1),
        ours=lambda: {0, 10, 50},
        hold_s=0,
    )
    client.objects["retail"] = manifest.with_percent(client.objects["retail"], 20)
    with pytest.raises(Unavailable, match="somebody edited .* canaryTrafficPercent is 20"):
        restarted.set_weights({"v1": 50, "v2": 50})

    client.objects["retail"] = manifest.with_percent(client.objects["retail"], 10)
    with pytest.raises(Unavailable, match="on its way to"):
        restarted.set_weights({"v1": 50, "v2": 50})
    assert manifest.percent(client.objects["retail"]) == 50


@pytest.mark.parametrize("refusal", [kube.Conflict("refused"), BadInput("refused")])
def test_a_refusal_does_not_hide_somebodys_edit(client, canary, refusal):
    client.fault = refusal
    with pytest.raises(PerennialError, match="refused"):
        canary.set_weights({"v1": 50, "v2": 50})
    client.objects["retail"] = manifest.with_percent(client.objects["retail"], 33)

    with pytest.raises(Unavailable, match="somebody edited .* canaryTrafficPercent is 33"):
        canary.set_weights({"v1": 50, "v2": 50})


def test_a_candidate_waits_while_another_one_has_traffic(client, service):
    told = client.objects["retail-predictor"]["status"]
    told["traffic"] = [
        {"revisionName": FIRST, "percent": 90},
        {"revisionName": OTHER, "percent": 10},
    ]
    rolled_out(client, FIRST)

    with pytest.raises(Unavailable, match=r"v2 waits: \['v8'\] has traffic still"):
        service.start(rollout(2))
    assert client.applied == []


def test_what_kserve_does_not_remember_comes_up_anew_with_nothing(client, service):
    """v8 and v9 were promoted since, and v9 is to give everything back to v1."""
    third = "retail-predictor-00003"
    client.has_revision(third, "v9")
    client.objects["retail"] = document(rollout(9))
    status = {"latestRolledoutRevision": third, "previousRolledoutRevision": OTHER}
    client.objects["retail"]["status"] = {"components": {"predictor": status}}

    with pytest.raises(Unavailable, match="v1 comes up anew, KServe does not remember it"):
        service.set_weights({"v1": 100})

    assert client.applied == [("v1", 0)]


def test_what_serves_is_put_back_without_waiting(client, service):
    client.objects["retail"] = document(rollout(2))
    rolled_out(client, "")

    service.start(rollout(1))

    assert client.applied == [("v1", 0)]


def test_a_rollback_by_hand_to_what_kserve_holds_on_to_does_not_wait(client, service):
    rolled_out(client, OTHER)

    service.start(replace(rollout(8), run_id=f"{BY_HAND}3"))

    assert client.applied == [("v8", 0)]
    client.objects["retail"] = document(rollout(1))
    rolled_out(client, OTHER)
    with pytest.raises(Unavailable, match="has noted v8"):
        service.start(rollout(8))


def test_what_serves_gets_everything_back_from_a_candidate_that_failed_at_100(client, service):
    client.objects["retail"] = manifest.with_percent(document(rollout(8)), 100)
    told = client.objects["retail-predictor"]["status"]["traffic"]
    told[0]["revisionName"] = OTHER
    status = {"latestRolledoutRevision": OTHER, "previousRolledoutRevision": FIRST}
    client.objects["retail"]["status"] = {"components": {"predictor": status}}
    assert service.names() == ("v8",)

    service.start(rollout(1))

    assert client.applied == [("v8", 0)]


def test_a_candidate_does_not_take_the_place_of_what_somebody_deleted(client, service):
    del client.objects["retail"]

    with pytest.raises(Unavailable, match="v2 waits: there is no InferenceService retail, and v1"):
        service.start(rollout(2))
    assert client.created == []

    service.start(rollout(1))
    service.start(replace(rollout(8), run_id=f"{BY_HAND}3"))
    assert client.created == ["v1", "v8"]


def test_with_nothing_that_serves_there_is_nothing_to_wait_for(client):
    service = knative.KnativeService(client, "retail", document, lambda: None)  # type: ignore[arg-type]
    rolled_out(client, "")

    service.start(rollout(2))

    assert client.applied == [("v2", 0)]


def test_revisions_that_count_from_one_again_are_not_taken_for_those_before(client, service):
    client.objects["retail-predictor"]["metadata"]["uid"] = "first"
    assert service.weights() == {"v1": 100}

    # Somebody deleted the InferenceService; what serves by now was made anew in its place.
    client.objects["retail-predictor"]["metadata"]["uid"] = "second"
    client.has_revision(FIRST, "v2")

    assert service.weights() == {"v2": 100}


def all_went_back(client: FakeClient, rolled_out: str, noted: str) -> None:
    """v8 failed at 100 % and stands at 0; Knative has given everything back to v1."""
    service = manifest.with_percent(document(rollout(8)), 0)
    told: dict[str, Any] = {"latestRolledoutRevision": rolled_out}
    told["previousRolledoutRevision"] = FIRST
    told["traffic"] = [{"revisionName": noted, "percent": 100}]
    service["status"] = {"components": {"predictor": told}}
    client.objects["retail"] = service
    labels = service["spec"]["predictor"]["labels"]
    client.objects["retail-predictor"] = {
        "metadata": {"generation": 4},
        "spec": {"template": {"metadata": {"labels": labels}}, "traffic": [{"percent": 0}]},
        "status": {
            "observedGeneration": 4,
            "traffic": [{"revisionName": FIRST, "percent": 100}],
            "conditions": [{"type": "RoutesReady", "status": "True"}],
        },
    }


@pytest.mark.parametrize(
    ("rolled_out", "noted"),
    [(OTHER, FIRST), (FIRST, OTHER)],
    ids=["KServe gives it to the failed one again", "KServe has not looked since"],
)
def test_traffic_is_not_back_while_kserve_may_still_move_it(client, canary, rolled_out, noted):
    all_went_back(client, rolled_out, noted)

    with pytest.raises(Unavailable, match="on its way to"):
        canary.set_weights({"v1": 100})

    all_went_back(client, FIRST, FIRST)
    canary.set_weights({"v1": 100})
