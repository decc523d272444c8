"""The README's way onto a cluster, as it stands there.

Its deletion takes the kind with it, so it goes first, and not where anybody has a ModelRollout.
"""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import Kubectl
from tenant import DOMAIN, INGRESS, ROOT

pytestmark = pytest.mark.cluster

SPACE = "perennial"
KIND = "modelrollouts.perennial.dev"
SERVES_S = 300


def commands() -> list[str]:
    """What follows a prompt in the README's part about clusters."""
    text = (ROOT / "README.md").read_text()
    (part,) = re.findall(r"^## On a cluster\n(.*?)^## ", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^\$ (.*)$", part, flags=re.MULTILINE)


def rollouts(kubectl: Kubectl) -> list[str]:
    """Every ModelRollout of the cluster, as namespace/name; none where nobody knows the kind."""
    if not kubectl.run("get", "crd", KIND, "--ignore-not-found", "-o", "name").stdout:
        return []
    found = [item["metadata"] for item in kubectl.get(KIND, "--all-namespaces")["items"]]
    return [f"{meta['namespace']}/{meta['name']}" for meta in found]


@pytest.fixture
def shell(kubectl: Kubectl, kubeconfig: str) -> Iterator[dict[str, str]]:
    """The surroundings of a terminal; what is installed in it goes again."""
    there = kubectl.run("get", "namespace", SPACE, check=False)
    assert there.returncode != 0, f"namespace {SPACE} is somebody's; these tests make and delete it"
    told = ", ".join(rollouts(kubectl))
    assert not told, f"these tests delete the kind {KIND}, and with it what is somebody's: {told}"
    path = f"{Path(kubectl.program).parent}{os.pathsep}{os.environ['PATH']}"
    yield {**os.environ, "PATH": path, "KUBECONFIG": kubeconfig}
    remove(kubectl)


def remove(kubectl: Kubectl) -> None:
    """Remove the installation, and the kind with it unless somebody came to use it meanwhile."""
    if any(not name.startswith(f"{SPACE}/") for name in rollouts(kubectl)):
        kubectl.run("delete", "namespace", SPACE, "--ignore-not-found", patience_s=600)
        return
    overlay = str(ROOT / "kustomize" / "overlays" / "demo")
    kubectl.run("delete", "-k", overlay, "--ignore-not-found", check=False, patience_s=600)


def typed(command: str, shell: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env=shell,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_five_commands_lead_to_a_model_that_serves(shell):
    images, *others = commands()
    assert images == "make images"
    assert len(others) == 4

    said = [typed(command, shell) for command in others]
    limit = time.monotonic() + SERVES_S
    while not re.search(r"modelrollout.*retail-v1 .*Promoted", said[-1]):
        assert time.monotonic() < limit, said[-1]
        time.sleep(2)
        said[-1] = typed(others[-1], shell)

    assert "succeeded" in said[2]
    assert re.search(r"inferenceservice.*retail .*True", typed(others[-1], shell))
    headers = {"host": f"retail-predictor.{SPACE}.{DOMAIN}"}
    with httpx.Client(base_url=INGRESS, headers=headers, trust_env=False) as client:
        assert client.get("/v2/models/retail/ready").status_code == 200
