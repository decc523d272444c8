"""The compiled pipeline is the one in the repository, and its components only wrap."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from perennial.retrain import specs

ROOT = Path(__file__).resolve().parents[1]
COMPONENTS = sorted(p for p in (ROOT / "components").glob("*.py") if not p.stem.startswith("_"))
STEPS = ["ingest", "validate", "features", "train", "evaluate", "gate", "register", "deploy"]


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    """What is the same everywhere, and what only a cluster reads."""
    return list(yaml.safe_load_all((ROOT / "pipelines" / "training.yaml").read_text()))


@pytest.fixture(scope="module")
def spec(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return documents[0]


def on_kubernetes(documents: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What each step's pod is given, by the name of the step."""
    found = documents[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {name.removeprefix("exec-"): given for name, given in found.items()}


def compiled(tmp_path: Path, **settings: str) -> list[dict[str, Any]]:
    """The spec as it is compiled where these settings hold."""
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.training", "--to", str(tmp_path / "spec.yaml")],
        cwd=ROOT,
        env={**os.environ, **{f"PERENNIAL_{k.upper()}": v for k, v in settings.items()}},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all((tmp_path / "spec.yaml").read_text()))


def tasks(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every task of the pipeline by its name, out of all its sub-graphs."""
    graphs = [spec["root"], *spec["components"].values()]
    return {
        name: task
        for graph in graphs
        for name, task in graph.get("dag", {}).get("tasks", {}).items()
    }


def only_function(path: Path) -> ast.FunctionDef:
    (found,) = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
    return found


def test_the_checked_in_spec_is_what_the_code_compiles_to():
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.training", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_a_changed_component_makes_the_spec_stale(tmp_path):
    for name in ("components", "pipelines"):
        (tmp_path / name).mkdir()
        for path in (ROOT / name).iterdir():
            if path.is_file():
                (tmp_path / name / path.name).write_bytes(path.read_bytes())
    deploy = tmp_path / "components" / "deploy.py"
    deploy.write_text(deploy.read_text().replace("State the wish", "Shout the wish"))

    done = subprocess.run(
        [sys.executable, "-m", "pipelines.training", "--check"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 1
    assert "run 'make spec'" in done.stdout


@pytest.mark.parametrize("path", COMPONENTS, ids=lambda p: p.stem)
def test_a_component_is_one_function_of_at_most_eight_statements(path):
    function = only_function(path)

    inside = [n for n in ast.walk(function) if isinstance(n, ast.stmt)][1:]
    docstring = 1

    assert function.name == path.stem
    assert ast.get_docstring(function)
    assert len(inside) - docstring <= 8


@pytest.mark.parametrize("path", COMPONENTS, ids=lambda p: p.stem)
def test_a_component_can_be_read_by_kfp(path):
    text = path.read_text()

    assert "from __future__" not in text
    assert " | " not in ast.unparse(only_function(path).args)


def test_there_are_eight_steps_and_an_exit_handler(spec):
    assert sorted(p.stem for p in COMPONENTS) == sorted([*STEPS, "notify"])
    assert set(STEPS) <= tasks(spec).keys()
    assert tasks(spec)["notify"]["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"


def test_every_parameter_has_a_description_and_all_but_the_project_a_default(spec):
    """A default would be a project in the image, whatever the cluster's own say."""
    parameters = spec["root"]["inputDefinitions"]["parameters"]

    assert set(parameters) == {"project", "source", "as_of", "trials", "seed", "trigger"}
    for name, parameter in parameters.items():
        assert parameter["description"], name
        has_default = "defaultValue" in parameter
        assert has_default == parameter.get("isOptional", False) == (name != "project"), name


@pytest.mark.parametrize("name", ["ingest", "evaluate", "gate", "register", "deploy", "notify"])
def test_a_step_with_effects_or_a_changing_world_is_never_cached(spec, name):
    assert not tasks(spec)[name]["cachingOptions"].get("enableCache", False)


def test_only_a_passed_gate_leads_to_register_and_deploy(spec):
    (branch,) = [t for n, t in tasks(spec).items() if n.startswith("condition")]
    inside = spec["components"][branch["componentRef"]["name"]]["dag"]["tasks"]

    assert set(inside) == {"register", "deploy"}
    condition = branch["triggerPolicy"]["condition"]
    assert "gate-Output" in condition
    assert condition.endswith("== true")


def test_features_wait_for_the_validation(spec):
    assert "validate" in tasks(spec)["features"]["dependentTasks"]


def test_the_data_digest_is_an_input_of_what_is_cached(spec):
    for name in ("validate", "features", "train"):
        given = tasks(spec)[name]["inputs"]["parameters"]["data_digest"]
        assert given["taskOutputParameter"]["producerTask"] == "ingest"


def test_every_step_has_a_name_for_people(spec):
    for name in STEPS:
        assert tasks(spec)[name]["taskInfo"]["name"] != name


def test_the_image_is_that_of_this_version(spec):
    images = {e["container"]["image"] for e in spec["deploymentSpec"]["executors"].values()}

    assert images == {"perennial:0.1.0-python3.11"}


def test_the_dashboard_gets_typed_artifacts(spec):
    types = {
        f"{name.removeprefix('comp-')}.{artifact}": kind["artifactType"]["schemaTitle"]
        for name, part in spec["components"].items()
        if "executorLabel" in part
        for artifact, kind in part.get("outputDefinitions", {}).get("artifacts", {}).items()
    }

    assert types == {
        "ingest.snapshot": "system.Dataset",
        "validate.kept": "system.Dataset",
        "validate.aside": "system.Dataset",
        "validate.page": "system.HTML",
        "features.table": "system.Dataset",
        "features.page": "system.HTML",
        "train.model": "system.Model",
        "train.metrics": "system.Metrics",
        "evaluate.evaluation": "system.Artifact",
        "evaluate.metrics": "system.Metrics",
        "evaluate.curves": "system.ClassificationMetrics",
        "evaluate.page": "system.HTML",
        "gate.judged": "system.Model",
        "gate.card": "system.Markdown",
    }


def test_every_step_is_bounded_and_may_run_in_a_restricted_namespace(documents):
    pods = on_kubernetes(documents)

    assert set(pods) == {*STEPS, "notify"}
    for name, pod in pods.items():
        assert pod["activeDeadlineSeconds"] == "3600", name
        assert pod["securityContext"] == {"runAsNonRoot": True}, name


def test_every_step_asks_for_what_it_needs_and_is_bounded_as_quotas_want(spec):
    for name, executor in spec["deploymentSpec"]["executors"].items():
        asked = executor["container"]["resources"]
        assert (asked["resourceCpuRequest"], asked["resourceCpuLimit"]) == ("1", "2"), name
        assert asked["resourceMemoryRequest"] == asked["resourceMemoryLimit"] == "3Gi", name


def test_every_step_is_told_where_state_and_artifacts_are(documents):
    for name, pod in on_kubernetes(documents).items():
        secrets = {s["secretName"]: s for s in pod["secretAsEnv"]}
        told = {k["envVar"] for s in secrets.values() for k in s["keyToEnv"]}
        told |= {k["envVar"] for c in pod["configMapAsEnv"] for k in c["keyToEnv"]}
        assert {"PERENNIAL_STATE_URL", "PERENNIAL_ARTIFACTS", "AWS_SECRET_ACCESS_KEY"} <= told, name
        # A step without the database would write its story into a pod that goes away.
        assert not secrets["state"]["optional"], name
        assert not pod["configMapAsEnv"][0]["optional"], name


def test_no_step_counts_on_retries_that_a_backend_does_not_make(spec):
    assert [n for n, task in tasks(spec).items() if "retryPolicy" in task] == []


def test_settings_of_a_cluster_reach_the_steps(tmp_path):
    made = compiled(
        tmp_path,
        image="registry.local/perennial:7-python3.11",
        run_node_selector="pool=batch,example.com/disk=ssd",
        step_timeout_s="900",
        run_cpu="500m",
    )

    containers = [e["container"] for e in made[0]["deploymentSpec"]["executors"].values()]
    assert {c["image"] for c in containers} == {"registry.local/perennial:7-python3.11"}
    assert {c["resources"]["resourceCpuRequest"] for c in containers} == {"500m"}
    for name, pod in on_kubernetes(made).items():
        assert pod["nodeSelector"]["labels"] == {"pool": "batch", "example.com/disk": "ssd"}, name
        assert pod["activeDeadlineSeconds"] == "900", name


def test_what_is_compiled_in_is_what_makes_a_launcher_compile_anew():
    used = set(re.findall(r"cluster\.(\w+)", (ROOT / "pipelines" / "_cluster.py").read_text()))

    assert set(specs.COMPILED_IN) == used | {"image"}
