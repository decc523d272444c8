"""InferenceService files: the same ones that a cluster would be given."""

from pathlib import Path

import pytest
import yaml

from perennial.errors import BadInput
from perennial.local import isvc

PYTHON = Path("/env/bin/python")


@pytest.fixture
def shipped(root: Path) -> str:
    return (root / "kserve" / "retail" / "isvc.yaml").read_text()


def written(folder: Path, text: str) -> Path:
    (folder / isvc.FILE).write_text(text)
    return folder / isvc.FILE


@pytest.mark.parametrize("name", ["retail", "bank", "elec"])
def test_a_shipped_file_is_read_as_two_command_lines(settings, name):
    service = isvc.find(settings, Path("examples") / name, name)

    predictor = service.predictor.command_line(PYTHON, {"http_port": "4001", "bundle": "/b"})
    assert predictor == [
        *["/env/bin/python", "-m", "perennial.serving.predictor", f"--model_name={name}"],
        *["--host=127.0.0.1", "--http_port=4001", "--grpc_port=8086", "--bundle=/b"],
    ]
    transformer = service.transformer.command_line(PYTHON, {"host": "127.0.0.1"})
    assert "--host=127.0.0.1" in transformer and "--host=0.0.0.0" not in transformer
    assert "--enable_predictor_health_check" in transformer
    assert service.transformer.probe == f"/v2/models/{name}/ready"
    assert service.predictor.env == {"OMP_NUM_THREADS": "1"}


def test_a_project_without_a_file_of_its_own_is_served_like_the_default_one(settings, tmp_path):
    service = isvc.find(settings, tmp_path, "mine")

    assert service.name == "mine"
    assert service.transformer.args["--model_name"] == "mine"
    assert service.transformer.probe == "/v2/models/mine/ready"


def test_the_template_for_a_new_project_is_a_valid_file_of_its_name(settings, tmp_path):
    file = written(tmp_path, isvc.template("my-table"))

    assert isvc.read(file) == isvc.find(settings, tmp_path / "nowhere", "my-table")
    assert "retail" not in file.read_text()


def test_a_file_in_the_project_folder_comes_first(settings, tmp_path, shipped):
    written(tmp_path, shipped.replace("8085", "9085"))

    service = isvc.find(settings, tmp_path, "retail")

    assert service.predictor.args["--http_port"] == "9085"


@pytest.mark.parametrize("name", ["retail", "bank", "elec"])
def test_a_shipped_file_keeps_the_rules_of_knative_mode(root, name):
    raw = yaml.safe_load((root / "kserve" / name / "isvc.yaml").read_text())
    containers = {c["name"]: c for c in raw["spec"]["predictor"]["containers"]}

    assert raw["metadata"]["annotations"] == {"serving.kserve.io/deploymentMode": "Knative"}
    assert [n for n, c in containers.items() if "ports" in c] == ["transformer-container"]
    assert [n for n, c in containers.items() if "Probe" in str(c)] == ["transformer-container"]
    door = containers["transformer-container"]
    # Knative fills in the port of a liveness probe, and not that of a startup probe.
    assert {p["httpGet"]["port"] for key, p in door.items() if key.endswith("Probe")} == {8080}
    assert door["readinessProbe"]["httpGet"]["path"] == f"/v2/models/{name}/ready"
    # Both fetch the bundle themselves: KServe's init container breaks `restricted`.
    assert "STORAGE_URI" not in str(containers)
    assert all(
        c["envFrom"] == [{"secretRef": {"name": "server-artifacts"}}] for c in containers.values()
    )
    assert all("limits" in c["resources"] for c in containers.values())


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        pytest.param("v1beta1", "v1", "apiVersion is 'serving.kserve.io/v1'", id="api"),
        pytest.param("kind: Inf", "kind: Conf", "kind is 'ConferenceService'", id="kind"),
        pytest.param("Mode: Knative", "Mode: Fast", "deploymentMode is 'Fast'", id="mode"),
        pytest.param("name: kserve-c", "name: c", "has no kserve-container", id="no predictor"),
        pytest.param(
            "--http_port=8085",
            "http_port",
            "spec.predictor.containers[0].args[2] is 'http_port', wanted --name=value",
            id="argument",
        ),
        pytest.param("--model_name=retail", "--x=y", "wanted --model_name=retail", id="no name"),
        pytest.param(
            "[python, -m, perennial.serving.predictor]", "5", "command is 5, wanted", id="command"
        ),
        pytest.param("ports:\n", "x:\n", "", id="ports may be absent"),
    ],
)
def test_a_fault_is_told_with_its_file_and_key(tmp_path, shipped, old, new, told):
    file = written(tmp_path, shipped.replace(old, new))

    if not told:
        assert isvc.read(file).name == "retail"
        return
    with pytest.raises(BadInput) as caught:
        isvc.read(file)
    assert str(file) in str(caught.value)
    assert told in str(caught.value)


def test_all_faults_are_told_at_once(tmp_path, shipped):
    text = shipped.replace("v1beta1", "v1").replace("kind: Inf", "kind: Conf")

    with pytest.raises(BadInput, match="in 2 place"):
        isvc.read(written(tmp_path, text))


@pytest.mark.parametrize("text", ["", "- a\n", "a: [", "\x00"])
def test_a_file_that_is_no_document_is_bad_input(tmp_path, text):
    with pytest.raises(BadInput):
        isvc.read(written(tmp_path, text))


def test_another_name_in_the_file_is_bad_input(settings, tmp_path, shipped):
    written(tmp_path, shipped)

    with pytest.raises(BadInput, match=r"metadata.name is 'retail', wanted 'mine'"):
        isvc.find(settings, tmp_path, "mine")


def test_what_a_cluster_would_refuse_is_refused_here(tmp_path, shipped):
    raw = yaml.safe_load(shipped)
    predictor, transformer = raw["spec"]["predictor"]["containers"]
    transformer["env"].append({"name": "STORAGE_URI", "value": "s3://x"})
    predictor["ports"] = [{"containerPort": 8085}]

    with pytest.raises(BadInput) as caught:
        isvc.read(written(tmp_path, yaml.safe_dump(raw)))

    assert "STORAGE_URI belongs to kserve-container only" in str(caught.value)
    assert "ports may stand in one container only" in str(caught.value)
