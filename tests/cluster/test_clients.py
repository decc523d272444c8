"""A real bundle behind the real ingress: V2 by curl, tritonclient and the kserve client."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tiny
import tritonclient.grpc as calls
import tritonclient.http as rest
from adapters import rollout
from tenant import DOMAIN, INGRESS, until_ready

from perennial import bundle, kube
from perennial.contract import Contract
from perennial.records import RolloutState
from perennial.rollout import manifest, pods
from perennial.rollout.knative import KnativeService
from perennial.store.objects import Folder

ROOT = Path(__file__).resolve().parents[2]
IMAGE = os.environ.get(
    "PERENNIAL_TEST_SERVING_IMAGE", "dev.local/perennial-serving:0.1.0-python3.11"
)
PATIENCE_S = 3 * float(os.environ.get("PERENNIAL_TEST_PATIENCE_S", "60"))
S3 = os.environ.get("PERENNIAL_TEST_S3", "")
BUCKET = "perennial-serving"

KSERVE = """
import asyncio, json, sys
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
url, host, body = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
told = [InferInput(t["name"], t["shape"], t["datatype"], data=t["data"]) for t in body["inputs"]]
headers = {"Host": host, "content-type": "application/json"}
async def ask():
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    request = InferRequest("tiny", told, "k1")
    answer = await client.infer(url, request, model_name="tiny", headers=headers)
    print(json.dumps(answer.outputs[0].data))
    await client.close()
asyncio.run(ask())
"""

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not S3, reason="PERENNIAL_TEST_S3 names no object store"),
]


@dataclass
class Served:
    """One model at the ingress."""

    host: str
    contract: Contract
    folder: Path
    service: KnativeService

    @property
    def body(self) -> dict[str, Any]:
        return self.contract.to_request(tiny.rows(3), "r1")

    @property
    def scores(self) -> list[float]:
        """What the bundle itself says of these rows."""
        loaded = bundle.load(self.folder)
        rows = self.contract.encode(tiny.rows(3))
        return [float(s) for s in loaded.score(self.contract.for_model(rows))]


def secrets() -> list[dict[str, Any]]:
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    data = {key: os.environ[key] for key in keys} | {"AWS_ENDPOINT_URL": S3}
    return [
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": found}
        for name, found in (("server-artifacts", data), ("event-key", {"event.key": "k" * 32}))
    ] + [{"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "serving"}}]


def state_of(folder: Path, uri: str, version: int, digest: str) -> RolloutState:
    return replace(rollout(version, "tiny"), digest=digest, bundle_uri=uri)


@pytest.fixture(scope="module")
def monkeypatch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def served(
    kubectl: Any,
    spaces: Callable[[str], str],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Served]:
    namespace, folder = spaces("serving"), tmp_path_factory.mktemp("bundle")
    digest = tiny.bundle(folder)
    monkeypatch.setenv("AWS_ENDPOINT_URL", S3)
    make_bucket()
    uri = Folder(f"s3://{BUCKET}/tiny/bundles").keep(folder, digest.removeprefix("sha256:"))
    kubectl.apply(secrets(), "-n", namespace)
    place = manifest.Place(namespace, "Knative", IMAGE, "/tmp/segments", "")
    shipped = manifest.load(ROOT, "tiny")

    def document(state: RolloutState) -> dict[str, Any]:
        return manifest.render(shipped, state, place)

    with kube.connect(namespace) as client:
        service = KnativeService(client, "tiny", document, lambda: None)
        service.start(state_of(folder, uri, 1, digest))
        until_ready(service, "v1")
        contract = Contract.from_plain(bundle.parts(folder).contract)
        yield Served(f"tiny-predictor.{namespace}.{DOMAIN}", contract, folder, service)


def make_bucket() -> None:
    import boto3

    boto3.client("s3", endpoint_url=S3).create_bucket(Bucket=BUCKET)


def test_curl_is_answered_with_the_scores_of_the_bundle(served):
    command = ["curl", "-s", "--noproxy", "*", "-H", f"Host: {served.host}"]
    command += ["-H", "content-type: application/json", "-d", json.dumps(served.body)]

    done = subprocess.run(
        [*command, f"{INGRESS}/v2/models/tiny/infer"], capture_output=True, text=True, timeout=60
    )

    answer = json.loads(done.stdout)
    assert answer["parameters"]["revision"] == "v1"
    np.testing.assert_allclose(answer["outputs"][0]["data"], served.scores, rtol=1e-6)


def test_a_client_that_is_wrong_is_told_so_and_is_no_evidence(served):
    with httpx.Client(base_url=INGRESS, headers={"host": served.host}, trust_env=False) as http:
        answer = http.post("/v2/models/tiny/infer", json={"inputs": []}, timeout=30)
        assert (answer.status_code, "error" in answer.json()) == (400, True)
        assert http.get("/v2/models/tiny/ready", timeout=30).status_code == 200

    (page,) = [httpx.get(url, timeout=10).text for url in served.service.pages("v1").values()]
    assert 'perennial_requests_total{cause="client",model_name="tiny"}' in page


def inputs(module: Any, served: Served) -> list[Any]:
    made = []
    for told in served.body["inputs"]:
        found = module.InferInput(told["name"], told["shape"], told["datatype"])
        kind = object if told["datatype"] == "BYTES" else np.float64
        found.set_data_from_numpy(np.array(told["data"], dtype=kind).reshape(told["shape"]))
        made.append(found)
    return made


def test_tritonclient_is_answered_over_rest(served):
    client = rest.InferenceServerClient(INGRESS.removeprefix("http://"))

    answer = client.infer("tiny", inputs(rest, served), headers={"Host": served.host})

    found = answer.as_numpy("probability")
    np.testing.assert_allclose(found, served.scores, rtol=1e-6)


def test_tritonclient_is_answered_over_grpc(served):
    options = [("grpc.default_authority", served.host)]
    client = calls.InferenceServerClient(INGRESS.removeprefix("http://"), channel_args=options)

    assert client.is_model_ready("tiny")
    answer = client.infer("tiny", inputs(calls, served))

    np.testing.assert_allclose(answer.as_numpy("probability"), served.scores, rtol=1e-6)


def test_the_kserve_client_is_answered(served):
    # In a process of its own: its protobuf names are those of tritonclient.
    command = [sys.executable, "-c", KSERVE, INGRESS, served.host, json.dumps(served.body)]

    done = subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), served.scores, rtol=1e-6)


def test_other_bytes_in_the_store_end_a_revision_with_a_sentence(served):
    store = Folder(f"s3://{BUCKET}/tiny/bundles")
    other = served.folder.parent / "other"
    digest = tiny.bundle(other, seed=7)
    uri = store.keep(other, digest.removeprefix("sha256:"))
    name = next(f for f in store.names(digest.removeprefix("sha256:")) if f.endswith("model.json"))
    store.write(name, store.read(name) + b" ")
    served.service._serving = lambda: rollout(1, "tiny")

    served.service.start(state_of(other, uri, 2, digest))

    limit = time.monotonic() + PATIENCE_S
    while not served.service.died("v2") and time.monotonic() < limit:
        time.sleep(1)
    assert "holds other bytes than were kept there" in served.service.died("v2")
    assert served.service.weights() == {"v1": 100}


def test_pods_are_found_by_label(served):
    found = pods.of(served.service._client, "tiny", "v1")

    assert [pods.is_ready(pod) for pod in found] == [True]


@pytest.mark.parametrize("file", sorted((ROOT / "kserve").glob("*/*.yaml")), ids=lambda f: f.stem)
def test_every_inference_service_that_is_shipped_passes_the_api_server(kubectl, space, file):
    kubectl.run("apply", "-n", space, "--dry-run=server", "--validate=strict", "-f", str(file))
