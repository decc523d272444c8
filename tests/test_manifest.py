"""What a cluster is told to run for one revision."""

from dataclasses import replace
from functools import partial

import pytest
import yaml
from adapters import rollout

from perennial.errors import BadInput, Unavailable
from perennial.records import Phase
from perennial.rollout import manifest
from perennial.rollout.manifest import Place, Scale
from perennial.rollout.pinned import Manifests
from perennial.store import fence, rollouts
from perennial.store.engine import make_engine

PLACE = Place("home", "Knative", "images/serving:1", "s3://b/retail/segments", "http://broker/")


@pytest.fixture
def made(root):
    return manifest.render(manifest.load(root, "retail"), rollout(7), PLACE)


def container(document, name):
    return next(c for c in document["spec"]["predictor"]["containers"] if c["name"] == name)


def test_a_revision_is_told_its_bundle_digest_name_segments_and_sink(made):
    predictor = container(made, manifest.PREDICTOR)["args"]
    transformer = container(made, manifest.TRANSFORMER)["args"]

    digest = f"--digest=sha256:{7:064x}"
    assert {digest, "--revision=v7"} <= set(predictor) & set(transformer)
    assert {"--segments=s3://b/retail/segments", "--sink=http://broker/"} <= set(transformer)
    assert not any(a.startswith(("--segments", "--sink")) for a in predictor)
    assert {c["image"] for c in made["spec"]["predictor"]["containers"]} == {"images/serving:1"}
    assert made["metadata"]["annotations"] == {manifest.MODE: "Knative"}


def test_pods_can_be_found_by_project_and_revision(made):
    assert manifest.revision(made) == "v7"
    assert manifest.rollout(made) == 7
    assert made["spec"]["predictor"]["labels"][manifest.PROJECT] == "retail"


def test_nothing_that_pods_inherit_depends_on_the_percent(made):
    """KServe copies metadata to the pods: a changed pod template is a new, untried revision."""
    shared = manifest.with_percent(made, 10)

    assert shared["metadata"] == made["metadata"]
    changed = {k for k, v in shared["spec"]["predictor"].items()} - set(made["spec"]["predictor"])
    assert changed == {"canaryTrafficPercent"}
    assert manifest.with_percent(shared, None) == made


@pytest.mark.parametrize("percent", [130, -5])
def test_a_percent_that_kserve_would_take_and_choke_on_is_refused(made, percent):
    with pytest.raises(BadInput, match="wanted 0 to 100"):
        manifest.with_percent(made, percent)


@pytest.mark.parametrize("name", ["bank", "mine"])
def test_a_project_is_served_by_its_own_file_else_by_the_shipped_one(root, name):
    document = manifest.load(root, name)

    assert document["metadata"]["name"] == name
    assert "retail" not in yaml.safe_dump(document)
    assert f"--model_name={name}" in container(document, manifest.PREDICTOR)["args"]


def test_what_a_server_adds_or_writes_otherwise_is_no_difference(made):
    live = manifest.with_percent(made, 10)
    live["spec"]["predictor"]["name"] = ""
    container(live, manifest.PREDICTOR)["resources"]["limits"] = {"cpu": "1000m", "memory": "1Gi"}

    assert manifest.differences(made, live) == []


def test_each_difference_is_told_with_its_key(made):
    live = manifest.with_percent(made, None)
    live["spec"]["predictor"]["maxReplicas"] = 3
    container(live, manifest.TRANSFORMER)["image"] = "other:1"

    assert manifest.differences(made, live) == [
        "spec.predictor.maxReplicas is 3, applied was 1",
        "spec.predictor.containers[1].image is 'other:1', applied was 'images/serving:1'",
    ]


@pytest.mark.parametrize(
    ("scale", "counts"),
    [
        pytest.param(Scale(), (1, 1), id="as the file says"),
        pytest.param(Scale(3, 6), (3, 6), id="both"),
        pytest.param(Scale(most=4), (1, 4), id="more under load only"),
    ],
)
def test_settings_say_in_how_many_copies_all_components_run(made, scale, counts):
    made["spec"]["transformer"] = {"minReplicas": 1, "maxReplicas": 1}

    scaled = manifest.scaled(made, scale)

    for component in ("predictor", "transformer"):
        found = scaled["spec"][component]
        assert (found["minReplicas"], found["maxReplicas"]) == counts
    assert made["spec"]["predictor"]["maxReplicas"] == 1
    assert manifest.scaled(scaled, scale) == scaled


def test_more_copies_at_least_than_at_most_are_refused(made):
    with pytest.raises(BadInput, match="at least 3 and at most 1 copies; set PERENNIAL_MIN"):
        manifest.scaled(made, Scale(least=3))

    made["spec"]["predictor"]["maxReplicas"] = 0
    assert manifest.scaled(made, Scale(least=3))["spec"]["predictor"]["minReplicas"] == 3


@pytest.mark.parametrize("today", [Scale(), Scale(2, 4)], ids=["unset now", "others now"])
def test_copies_that_other_settings_asked_for_are_no_edit_and_somebodys_are(made, today):
    live = manifest.scaled(made, Scale(3, 6))
    wanted = manifest.scaled(made, today)

    assert manifest.differences(wanted, live) == []
    live["spec"]["predictor"]["minReplicas"] = 5
    assert manifest.differences(wanted, live) == ["spec.predictor.minReplicas is 5, applied was 3"]


@pytest.mark.parametrize("spoiled", ["many", "\u00b2-\u00b3"])
def test_an_annotation_that_somebody_spoiled_breaks_nothing(made, spoiled):
    live = manifest.scaled(made, Scale())
    live["metadata"]["annotations"][manifest.REPLICAS] = spoiled

    assert manifest.differences(made, live) == []


def test_copies_are_spread_where_the_mode_takes_that(root):
    def constraints(template, mode):
        made = manifest.render(template, rollout(7), replace(PLACE, mode=mode))
        return made["spec"]["predictor"].get("topologySpreadConstraints")

    template = manifest.load(root, "retail")
    spread = constraints(template, "Standard")
    assert [c["topologyKey"] for c in spread] == [
        "kubernetes.io/hostname",
        "topology.kubernetes.io/zone",
    ]
    assert {c["whenUnsatisfiable"] for c in spread} == {"ScheduleAnyway"}
    mine = {"perennial.dev/project": "retail", "perennial.dev/revision": "v7"}
    assert all(c["labelSelector"]["matchLabels"] == mine for c in spread)
    # Knative refuses the field unless its administrator allows it.
    assert constraints(template, "Knative") is None
    template["spec"]["predictor"]["topologySpreadConstraints"] = []
    assert constraints(template, "Standard") == []


def test_a_rollback_runs_what_had_earned_its_traffic_in_as_many_copies_as_are_asked_for_now(
    root, tmp_path
):
    engine = make_engine(f"sqlite:///{tmp_path}/state.db")
    first = wished(engine, 1)
    old = Manifests(engine, root, lambda _: PLACE).of(first)
    rollouts.save(engine, replace(first, phase=Phase.PROMOTED))
    again = wished(engine, 1, run_id="rollback by hand 2")

    place = replace(PLACE, image="images/serving:2")
    manifests = Manifests(engine, root, lambda _: place, Scale(3, 6))
    new = manifests.of(again)

    assert new == manifest.scaled(old, Scale(3, 6)) != old
    assert manifest.differences(manifests.pinned(first.id), new) == []
    engine.dispose()


def test_who_lost_its_lease_pins_nothing(root, tmp_path):
    engine = make_engine(f"sqlite:///{tmp_path}/state.db")
    state = wished(engine, 1)
    guard = partial(fence.check, name="operator", number=1)

    with pytest.raises(Unavailable, match="another operator leads now"):
        Manifests(engine, root, lambda _: PLACE, guard=guard).of(state)

    assert rollouts.manifest(engine, state.id) == ""
    engine.dispose()


def wished(engine, version, run_id="run"):
    return rollouts.wish(
        engine,
        project="retail",
        version=version,
        digest=f"sha256:{version}",
        bundle_uri="",
        run_id=run_id,
    )


def test_a_file_without_our_containers_is_refused(tmp_path):
    file = tmp_path / "kserve" / "mine" / "isvc.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("{spec: {predictor: {containers: [{name: kserve-container}]}}}")

    with pytest.raises(BadInput, match="no container called transformer-container"):
        manifest.load(tmp_path, "mine")


LOOKUP = {
    "name": manifest.LOOKUP,
    "image": "perennial:1",
    "command": ["python", "-m", "perennial.features.server"],
    "args": ["--project=projects/retail.yaml", "--port=8090"],
}


def with_lookup(root, **changes):
    template = manifest.load(root, "retail")
    template["spec"]["predictor"]["containers"].append(LOOKUP | changes)
    return manifest.render(template, rollout(7), replace(PLACE, steps_image="images/steps:1"))


def test_a_feature_server_in_the_file_runs_in_the_image_of_the_steps_and_is_asked(root):
    made = with_lookup(root)

    assert container(made, manifest.LOOKUP)["image"] == "images/steps:1"
    assert container(made, manifest.PREDICTOR)["image"] == "images/serving:1"
    told = container(made, manifest.TRANSFORMER)["args"]
    assert "--features=http://127.0.0.1:8090" in told
    assert container(made, manifest.LOOKUP)["args"] == LOOKUP["args"]


def test_without_a_feature_server_nobody_is_asked(made):
    told = container(made, manifest.TRANSFORMER)["args"]

    assert not any(arg.startswith("--features") for arg in told)


def test_a_feature_server_that_does_not_say_its_port_is_refused(root):
    with pytest.raises(BadInput, match="feature-server has no argument such as --port=8090"):
        with_lookup(root, args=[])
