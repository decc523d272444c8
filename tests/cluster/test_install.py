"""Is "kubectl apply -k" the whole installation, and does "kubectl delete -k" remove it all?"""

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests import manifests
from tests.cluster.conftest import PREFIX, Kubectl

pytestmark = pytest.mark.cluster

IMAGE = os.environ.get("PERENNIAL_TEST_IMAGE", "dev.local/perennial:0.1.0-python3.11")


@dataclass(frozen=True)
class Tenant:
    """The demo, in a namespace of this test's own and beside whoever shares the kind."""

    kubectl: Kubectl
    folder: Path
    space: str

    def run(self, *args: str, check: bool = True) -> str:
        return self.kubectl.run("-n", self.space, *args, check=check).stdout


@pytest.fixture(scope="module")
def tenant(kubectl: Kubectl, crd: None, tmp_path_factory) -> Iterator[Tenant]:
    folder, space = tmp_path_factory.mktemp("tenant"), f"{PREFIX}-install-{uuid.uuid4().hex[:6]}"
    root = Path(os.path.relpath(manifests.ROOT / "kustomize", folder))
    name, _, tag = IMAGE.rpartition(":")
    text = {
        "namespace": space,
        "resources": [str(root / "overlays" / "demo")],
        "components": [str(root / "components" / "shared-crd")],
        "images": [{"name": "dev.local/perennial", "newName": name, "newTag": tag}],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(text))
    kubectl.run("apply", "-k", str(folder))
    yield Tenant(kubectl, folder, space)
    kubectl.run("delete", "namespace", space, "--wait=false", "--ignore-not-found")


def test_one_command_brings_everything_up(tenant):
    tenant.run("wait", "--for=condition=Complete", "job/migrate", "--timeout=280s")
    tenant.run("wait", "--for=condition=Available", "deployment", "--all", "--timeout=280s")
    tenant.run("wait", "--for=condition=Ready", "trigger/drift", "--timeout=120s")

    said = tenant.run("exec", "deploy/retraining", "--", "perennial", "doctor", "--cluster")
    refused = tenant.run("logs", "deploy/operator").lower()

    assert "MISSING" not in said
    assert "forbidden" not in refused


def test_no_pod_runs_as_root_or_carries_a_token_that_it_does_not_use(tenant):
    ask = "import os; print(os.getuid(), os.path.exists('/var/run/secrets/kubernetes.io'))"

    told = {
        name: tenant.run("exec", f"deploy/{name}", "--", "python", "-c", ask).split()
        for name in ("operator", "retraining", "dev-s3")
    }

    assert told == {
        "operator": ["65532", "True"],
        "retraining": ["65532", "True"],
        "dev-s3": ["65532", "False"],
    }


def test_applying_again_would_change_nothing(tenant):
    documents = list(yaml.safe_load_all(manifests.kustomize(str(tenant.folder))))
    # The Job goes by itself when it is done.
    lasting = [d for d in documents if d["kind"] != "Job"]

    same = tenant.kubectl.run("diff", "-f", "-", text=yaml.safe_dump_all(lasting), check=False)

    assert (same.returncode, same.stdout, same.stderr) == (0, "", "")
    assert len(lasting) > 40


def test_one_command_takes_everything_away(tenant):
    tenant.kubectl.run("delete", "-k", str(tenant.folder), "--timeout=240s")

    left = tenant.kubectl.run("get", "namespace", tenant.space, check=False)
    kind = tenant.kubectl.get("crd", "modelrollouts.perennial.dev")

    assert "NotFound" in left.stderr
    assert kind["metadata"]["name"] == "modelrollouts.perennial.dev"
