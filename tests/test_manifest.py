"""What a cluster is told to run for one revision."""

import pytest
import yaml
from adapters import rollout

from perennial.errors import BadInput
from perennial.rollout import manifest
from perennial.rollout.manifest import Place

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


def test_a_file_without_our_containers_is_refused(tmp_path):
    file = tmp_path / "kserve" / "mine" / "isvc.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("{spec: {predictor: {containers: [{name: kserve-container}]}}}")

    with pytest.raises(BadInput, match="no container called transformer-container"):
        manifest.load(tmp_path, "mine")
