"""How refusals of the API server are told."""

import json

import httpx2
import pytest
from lightkube import Client
from lightkube.config.kubeconfig import KubeConfig
from lightkube.config.models import Cluster, User
from lightkube.resources.core_v1 import ConfigMap

from perennial import kube
from perennial.errors import BadInput, Unavailable


def answering(status: int, body: str, kind: str = "application/json") -> Client:
    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(status, text=body, headers={"Content-Type": kind})

    return client_of(httpx2.MockTransport(answer))


def client_of(transport: httpx2.BaseTransport) -> Client:
    config = KubeConfig.from_one(cluster=Cluster(server="http://api"), user=User(), namespace="n")
    return Client(config.get(), transport=transport)


def refusal(code: int, message: str) -> str:
    return json.dumps({"kind": "Status", "apiVersion": "v1", "code": code, "message": message})


@pytest.mark.parametrize(
    ("code", "message", "error"),
    [
        pytest.param(400, "strict decoding error", BadInput, id="an unknown field"),
        pytest.param(422, "spec.steps: Invalid value", BadInput, id="a broken schema"),
        pytest.param(
            403, 'admission webhook "x" denied the request: no', BadInput, id="a webhook's no"
        ),
        pytest.param(403, 'User "x" cannot get', kube.Forbidden, id="a missing right"),
        pytest.param(403, "exceeded quota: small", kube.Forbidden, id="a full quota"),
        pytest.param(401, "Unauthorized", kube.Forbidden, id="an old token"),
        pytest.param(409, "the object has been modified", kube.Conflict, id="somebody's change"),
        pytest.param(404, 'namespaces "n" not found', kube.Missing, id="a missing namespace"),
        pytest.param(429, "too many requests", Unavailable, id="a busy server"),
        pytest.param(500, "failed calling webhook", Unavailable, id="a webhook that is away"),
    ],
)
def test_what_will_never_work_is_told_apart_from_what_may_work_later(code, message, error):
    client = answering(code, refusal(code, message))

    with pytest.raises(error, match="asking for a thing: .*" + message[:10]), asking():
        client.get(ConfigMap, "x")


def asking():
    return kube.asking("asking for a thing")


def test_a_kind_that_is_not_installed_is_missing():
    client = answering(404, "404 page not found", "text/plain")

    assert kube.find(client, kube.ModelRollout, "x") is None
    with pytest.raises(kube.Missing, match="404 page not found"), asking():
        client.get(kube.ModelRollout, "x")


def test_a_server_that_is_away_is_unavailable():
    def away(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("refused")

    client = client_of(httpx2.MockTransport(away))

    with pytest.raises(Unavailable, match=r"does not answer \(ConnectError\)"), asking():
        client.get(ConfigMap, "x")


def test_deleting_what_is_gone_is_done():
    client = answering(404, refusal(404, 'configmaps "x" not found'))

    kube.delete(client, ConfigMap, "x")


def test_a_machine_without_a_cluster_is_told_what_to_set(monkeypatch, tmp_path):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))

    with pytest.raises(BadInput, match="set KUBECONFIG"):
        kube.connect()
