"""The manifests as kubectl renders them, and the rights that they are meant to give."""

import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests import policy
from tests.policy import Doc

ROOT = Path(__file__).resolve().parents[1]
OVERLAYS = ("demo", "demo-standard", "staging", "production")
DEMOS = ("demo", "demo-standard")
BUCKET = ROOT / "kustomize" / "policies" / "bucket.json"
CACHED = Path.home() / ".cache" / "perennial-cluster" / "bin" / "kubectl"


def kubectl() -> str:
    found = str(CACHED) if CACHED.exists() else shutil.which("kubectl")
    return found or pytest.skip("no kubectl here")


@cache
def kustomize(folder: str) -> str:
    done = subprocess.run(
        [kubectl(), "kustomize", str(ROOT / folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def rendered(overlay: str) -> list[Doc]:
    return list(yaml.safe_load_all(kustomize(f"kustomize/overlays/{overlay}")))


def most_replicas(docs: list[Doc]) -> dict[str, int]:
    """How many copies of each Deployment there may be: its own word, or its autoscaler's."""
    scaled = {
        d["spec"]["scaleTargetRef"]["name"]: d["spec"]["maxReplicas"]
        for d in policy.kinds(docs, "HorizontalPodAutoscaler")
    }
    fixed = {
        d["metadata"]["name"]: d["spec"]["replicas"]
        for d in policy.kinds(docs, "Deployment")
        if d["metadata"]["name"] not in scaled
    }
    return fixed | scaled


def templates() -> list[Doc]:
    return [yaml.safe_load(path.read_text()) for path in sorted(ROOT.glob("kserve/*/*.yaml"))]


def pipeline() -> list[Doc]:
    return list(yaml.safe_load_all((ROOT / "pipelines" / "training.yaml").read_text()))


def verbs(group: str, resource: str, *names: str) -> set[policy.Right]:
    return {(group, resource, verb) for verb in names}


OPERATOR = (
    verbs("perennial.dev", "modelrollouts", "list", "watch", "create", "delete")
    | verbs("perennial.dev", "modelrollouts/status", "patch")
    | verbs("serving.kserve.io", "inferenceservices", "get", "list", "watch", "create", "update")
    | verbs("serving.kserve.io", "inferenceservices", "delete")
    | verbs("eventing.knative.dev", "brokers", "get")
    | verbs("", "pods", "list")
)
STANDARD = verbs("", "services", "get")
KNATIVE = verbs("serving.knative.dev", "revisions", "get") | verbs(
    "serving.knative.dev", "services", "get"
)
JOBS = (
    verbs("batch", "jobs", "create", "get", "delete")
    | verbs("", "pods", "list")
    | verbs("", "pods/log", "get")
    | verbs("", "events", "list")
)
KFP = verbs(
    "pipelines.kubeflow.org", "runs", "create", "get", "list", "retry", "terminate"
) | verbs("pipelines.kubeflow.org", "experiments", "create", "list")
KFP_RUN = (
    verbs("argoproj.io", "workflowtaskresults", "create", "patch")
    | verbs("", "configmaps=kfp-launcher", "get")
    | verbs("", "secrets=mlpipeline-minio-artifact", "get")
)
RIGHTS = {
    "demo": {"operator": OPERATOR | KNATIVE, "retraining": JOBS},
    "demo-standard": {"operator": OPERATOR | STANDARD, "retraining": JOBS},
    "staging": {"operator": OPERATOR | KNATIVE, "retraining": KFP, "pipeline-run": KFP_RUN},
    "production": {"operator": OPERATOR | KNATIVE, "retraining": KFP, "pipeline-run": KFP_RUN},
}
