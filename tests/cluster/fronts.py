"""The edge of Standard mode as it is shipped, in pods that ask this machine for their weights."""

import os
import socket
from pathlib import Path
from typing import Any

import httpx
import yaml
from lightkube import Client
from lightkube.resources.core_v1 import Service

ROOT = Path(__file__).resolve().parents[2]
EDGE = ROOT / "kustomize" / "edge" / "edge.yaml"
IMAGE = os.environ.get("PERENNIAL_TEST_IMAGE", "dev.local/perennial:0.1.0-python3.11")
EDGES = 2


def host_address(kubectl: Any) -> str:
    """Where pods reach this machine: the way by which this machine reaches the cluster."""
    server = kubectl.run(
        "config", "view", "--minify", "-o", "jsonpath={.clusters[0].cluster.server}"
    )
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((httpx.URL(server.stdout).host, 9))
        return str(probe.getsockname()[0])


def free_port(host: str) -> int:
    with socket.create_server((host, 0)) as held:
        return int(held.getsockname()[1])


def install(kubectl: Any, namespace: str, host: str, port: int) -> None:
    """The edge of project ``retail``; its Envoys ask ``host`` at ``port``."""
    text = EDGE.read_text().replace("PROJECT", "retail")
    text = text.replace("operator:8081", f"{host}:{port}")
    found = [d for d in yaml.safe_load_all(text) if d["kind"] != "PodDisruptionBudget"]
    deployment = next(d for d in found if d["kind"] == "Deployment")
    deployment["spec"]["replicas"] = EDGES
    deployment["spec"]["template"]["spec"]["containers"][0]["image"] = IMAGE
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "edge"}}
    kubectl.apply([account, *found], "-n", namespace)


def address(client: Client) -> str:
    """Where clients of the model knock."""
    return str(client.get(Service, "edge").spec.clusterIP)
