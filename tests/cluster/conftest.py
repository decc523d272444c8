"""A cluster for the tests here: the one that KUBECONFIG names, a namespace for each test."""

import json
import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightkube import Client

from perennial import kube
from tests.cluster.jobs import api, launcher, tenant  # noqa: F401  fixtures

CACHED = Path.home() / ".cache" / "perennial-cluster" / "bin" / "kubectl"
PREFIX = os.environ.get("PERENNIAL_TEST_PREFIX", "perennial-test")
RESTRICTED = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "warn")}
Document = dict[str, Any]


@dataclass(frozen=True)
class Kubectl:
    """kubectl for one kubeconfig; a failed call fails the test with what kubectl said."""

    program: str
    kubeconfig: str

    def run(
        self, *args: str, text: str = "", check: bool = True, patience_s: float = 300
    ) -> subprocess.CompletedProcess[str]:
        command = [self.program, "--kubeconfig", self.kubeconfig, *args]
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=patience_s, check=False
        )
        assert not check or done.returncode == 0, f"kubectl {' '.join(args)}: {done.stderr}"
        return done

    def get(self, *args: str) -> Document:
        return dict(json.loads(self.run("get", *args, "-o", "json").stdout))

    def apply(self, documents: list[Document], *args: str) -> str:
        text = yaml.safe_dump_all(documents)
        return self.run("apply", "--validate=strict", *args, "-f", "-", text=text).stdout


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test here that forgot its mark would run, and fail, where there is no cluster."""
    here = Path(__file__).parent
    unmarked = [
        item.nodeid
        for item in items
        if here in item.path.parents and item.get_closest_marker("cluster") is None
    ]
    if unmarked:
        raise pytest.UsageError(f"not marked with pytest.mark.cluster: {', '.join(unmarked)}")


@pytest.fixture(scope="session")
def kubeconfig() -> str:
    """The file that names the cluster; tests are skipped without."""
    path = os.environ.get("KUBECONFIG", "")
    return path or pytest.skip("no cluster: set KUBECONFIG, or run 'make test-cluster'")


@pytest.fixture(scope="session")
def kubectl(kubeconfig: str) -> Kubectl:
    """kubectl, which must be there when a cluster is."""
    program = str(CACHED) if CACHED.exists() else shutil.which("kubectl")
    assert program, "KUBECONFIG is set, but there is no kubectl"
    return Kubectl(program, kubeconfig)


@pytest.fixture(scope="session")
def crd(kubectl: Kubectl) -> None:
    """The cluster knows ModelRollouts; the kind stays, others may use it."""
    path = Path(__file__).resolve().parents[2] / "kustomize" / "base" / "crd.yaml"
    kubectl.run("apply", "--server-side", "--force-conflicts", "-f", str(path))
    kubectl.run("wait", "--for=condition=Established", "--timeout=60s", "-f", str(path))


@pytest.fixture(scope="module")
def spaces(kubectl: Kubectl) -> Iterator[Callable[[str], str]]:
    """Makes a restricted namespace; all of them go when the tests of a file are over."""
    made: list[str] = []

    def make(purpose: str) -> str:
        name = f"{PREFIX}-{purpose}-{uuid.uuid4().hex[:6]}"
        meta = {"name": name, "labels": RESTRICTED}
        kubectl.apply([{"apiVersion": "v1", "kind": "Namespace", "metadata": meta}])
        made.append(name)
        return name

    yield make
    if made:
        kubectl.run("delete", "namespace", *made, "--wait=false", "--ignore-not-found")


@pytest.fixture
def space(kubectl: Kubectl, spaces: Callable[[str], str]) -> Iterator[str]:
    """A restricted namespace of one test's own, and no longer than it."""
    made = spaces("one")
    yield made
    kubectl.run("delete", "namespace", made, "--wait=false", "--ignore-not-found")


@pytest.fixture
def client(space: str) -> Client:
    """A client whose calls mean this test's namespace."""
    return kube.connect(space)
