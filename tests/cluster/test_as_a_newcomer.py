"""The README's way onto a cluster, as it stands there.

Its deletion takes the kind with it, so it goes first.
"""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tenant import DOMAIN, INGRESS, ROOT

pytestmark = pytest.mark.cluster

SPACE = "perennial"
SERVES_S = 300


def commands() -> list[str]:
    """What follows a prompt in the README's part about clusters."""
    text = (ROOT / "README.md").read_text()
    (part,) = re.findall(r"^## On a cluster\n(.*?)^## ", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^\$ (.*)$", part, flags=re.MULTILINE)


@pytest.fixture
def shell(kubectl, kubeconfig) -> Iterator[dict[str, str]]:
    """The surroundings of a terminal; what is installed in it goes again."""
    there = kubectl.run("get", "namespace", SPACE, check=False)
    assert there.returncode != 0, f"namespace {SPACE} is somebody's; these tests make and delete it"
    path = f"{Path(kubectl.program).parent}{os.pathsep}{os.environ['PATH']}"
    yield {**os.environ, "PATH": path, "KUBECONFIG": kubeconfig}
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
