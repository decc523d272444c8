"""What the surroundings decide about every revision, and what they must be before they do."""

from functools import partial
from typing import Any

import pytest

from perennial import kube
from perennial.errors import BadInput, Unavailable
from perennial.rollout import places, plan
from perennial.settings import Settings
from perennial.store import fence, rollouts
from perennial.store.engine import make_engine


class FakeClient:
    namespace = "home"

    def __init__(self) -> None:
        self.live: list[Any] = []

    def create(self, made: Any) -> None:
        self.live.append(made)

    def list(self, _kind: type, **_: Any) -> list[Any]:
        return self.live

    def find(self, _client: Any, _kind: type, name: str) -> Any:
        return next((one for one in self.live if one["metadata"]["name"] == name), None)


def broker(url: str) -> dict[str, Any]:
    return {"status": {"address": {"url": url}}} if url else {}


def told(monkeypatch: pytest.MonkeyPatch, found: Any, **settings: str) -> str:
    monkeypatch.setattr(kube, "find", lambda *_: found)
    return places.place(Settings(**settings), FakeClient(), "retail").sink  # type: ignore[arg-type]


def test_servers_tell_drift_to_the_broker(monkeypatch):
    assert told(monkeypatch, broker("http://broker/home/default")) == "http://broker/home/default"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        pytest.param(None, "no Broker default in home .* set PERENNIAL_SINK", id="no Broker"),
        pytest.param(broker(""), "has no address yet", id="a Broker that comes up"),
    ],
)
def test_without_a_listener_nothing_is_rolled_out_yet(monkeypatch, found, said):
    """What would be said meanwhile stays with the rollout, and nobody listens there."""
    with pytest.raises(Unavailable, match=said):
        told(monkeypatch, found)


def test_a_listener_of_ones_own_goes_before_the_broker(monkeypatch):
    assert told(monkeypatch, None, sink="http://listener/") == "http://listener/"

    with pytest.raises(BadInput, match="PERENNIAL_SINK is 'listener'"):
        Settings.load({"PERENNIAL_SINK": "listener"})


def test_who_lost_its_lease_gives_no_revision_its_manifest(monkeypatch, root, tmp_path):
    monkeypatch.setattr(kube, "find", lambda *_: None)
    engine = make_engine(f"sqlite:///{tmp_path}/state.db")
    wished = {"project": "retail", "version": 1, "digest": "sha256:1", "bundle_uri": ""}
    state = rollouts.wish(engine, **wished, run_id="run")
    settings = Settings(root=root, sink="http://listener/", serving_image="images/serving:1")
    guard = partial(fence.check, name="operator", number=1)
    adapters = places.of(settings, FakeClient(), engine, "retail", guard)  # type: ignore[arg-type]

    with pytest.raises(Unavailable, match="another operator leads now"):
        adapters.revisions.start(state)

    assert rollouts.manifest(engine, state.id) == ""
    adapters.close()
    engine.dispose()


def test_an_edit_of_a_candidate_is_told_with_the_name_of_its_service(monkeypatch, root, tmp_path):
    client, engine = FakeClient(), make_engine(f"sqlite:///{tmp_path}/state.db")
    monkeypatch.setattr(kube, "find", client.find)
    told = {"sink": "http://listener/", "serving_image": "images/serving:1"}
    settings = Settings(root=root, deployment_mode=places.STANDARD, **told)
    adapters = places.of(settings, client, engine, "retail")  # type: ignore[arg-type]
    for version in (1, 2):
        wished = {"project": "retail", "version": version, "digest": f"sha256:{version}"}
        state = rollouts.wish(engine, **wished, bundle_uri="s3://b", run_id=f"run-{version}")
        rollouts.save(engine, plan.start(state))
        adapters.revisions.start(state)
    rollouts.set_serving(engine, "retail", 1)
    untouched = adapters.edits({None})

    candidate = client.live[1]["spec"]["predictor"]["containers"][0]
    candidate["image"] = "images/another:2"

    where = "InferenceService retail-v2: spec.predictor.containers[0].image"
    said = f"{where} is 'images/another:2', applied was 'images/serving:1'"
    assert untouched == []
    assert adapters.edits({None}) == [said]
    adapters.close()
    engine.dispose()
