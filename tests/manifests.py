"""The manifests as kubectl renders them, and the rights that they are meant to give."""

import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

from perennial.local import cluster
from perennial.settings import Settings
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


KFP_RUN = (
    verbs("argoproj.io", "workflowtaskresults", "create", "patch")
    | verbs("", "configmaps=kfp-launcher", "get")
    | verbs("", "secrets=mlpipeline-minio-artifact", "get")
)


def table(mode: str, launcher: str) -> dict[str, set[policy.Right]]:
    """What each account needs, by the table that the doctor asks from."""
    settings = Settings(deployment_mode=mode, launcher=launcher)
    found = {
        account: {(group, thing, verb) for verb, group, thing in cluster.rights(account, settings)}
        for account in ("operator", "retraining")
    }
    return {**found, "pipeline-run": KFP_RUN} if launcher == "kfp" else found


RIGHTS = {
    "demo": table("Knative", "job"),
    "demo-standard": table("Standard", "job"),
    "staging": table("Knative", "kfp"),
    "production": table("Knative", "kfp"),
}
