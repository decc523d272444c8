"""What the doctor sees of a cluster, and what it tells to do about it."""

import json
import socket
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest
from lightkube import Client
from lightkube.config.kubeconfig import KubeConfig
from lightkube.config.models import Cluster, User

from perennial import kube
from perennial.local import cluster, doctor

CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
SPACE = "/api/v1/namespaces/n"
KSERVE = f"{CRDS}/inferenceservices.serving.kserve.io"
MANAGER = "/apis/apps/v1/namespaces/kserve/deployments/kserve-controller-manager"
BROKER = "/apis/eventing.knative.dev/v1/namespaces/n/brokers/default"
OPERATOR = "/apis/apps/v1/namespaces/n/deployments/operator"
WHO, MAY = (
    f"/apis/{group}/v1/{plural}"
    for group, plural in (
        ("authentication.k8s.io", "selfsubjectreviews"),
        ("authorization.k8s.io", "selfsubjectaccessreviews"),
    )
)


def crd(*fields: str) -> dict[str, Any]:
    properties = {"spec": {"properties": {name: {} for name in fields}}} if fields else {}
    schema = {"openAPIV3Schema": {"type": "object", "properties": properties}}
    version = {"name": "v1", "served": True, "storage": True, "schema": schema}
    names = {"kind": "X", "plural": "x"}
    return {"spec": {"group": "g", "scope": "Namespaced", "names": names, "versions": [version]}}


def deployment(ready: int = 1, image: str = "perennial:1") -> dict[str, Any]:
    spec = {"containers": [{"name": "a", "image": image}]}
    template = {"metadata": {}, "spec": spec}
    status = {"readyReplicas": ready}
    return {"spec": {"replicas": 1, "selector": {}, "template": template}, "status": status}


def secret(*keys: str) -> dict[str, Any]:
    return {"data": dict.fromkeys(keys, "eA==")}


def ready(status: str, message: str = "") -> dict[str, Any]:
    return {"status": {"conditions": [{"type": "Ready", "status": status, "message": message}]}}


@dataclass
class Api:
    """An API server that knows a few objects, and to whom one of them may be hidden."""

    objects: dict[str, dict[str, Any]]
    user: str = "admin"
    forbidden: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    changed: list[str] = field(default_factory=list)

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        path = request.url.path
        if path == WHO:
            return httpx2.Response(201, json={"status": {"userInfo": {"username": self.user}}})
        if path == MAY:
            asked = json.loads(request.content)["spec"]["resourceAttributes"]
            allowed = asked["resource"] not in self.refused
            return httpx2.Response(201, json={"spec": {}, "status": {"allowed": allowed}})
        if request.method != "GET":
            self.changed.append(path)
        if path in self.forbidden:
            return self.refuse(403, "admin cannot get this")
        found = self.objects.get(path)
        return httpx2.Response(200, json=found) if found else self.refuse(404, "not found")

    def refuse(self, code: int, message: str) -> httpx2.Response:
        return httpx2.Response(code, json={"kind": "Status", "code": code, "message": message})


@pytest.fixture
def api(monkeypatch) -> Api:
    """A cluster that lacks nothing."""
    restricted = {"metadata": {"name": "n", "labels": {cluster.RESTRICTED: "restricted"}}}
    kinds = {f"{CRDS}/{kind.name}": crd() for kind in (*cluster.KINDS, cluster.SERVING)}
    secrets = {f"{SPACE}/secrets/{n}": secret(*keys) for n, keys in cluster.SECRETS.items()}
    there = {
        **kinds,
        **secrets,
        KSERVE: crd("predictor", "canary"),
        SPACE: restricted,
        OPERATOR: deployment(),
        OPERATOR.replace("operator", "retraining"): deployment(),
        f"{SPACE}/pods": {"items": []},
        BROKER: ready("True"),
    }
    made = Api(there)
    config = KubeConfig.from_one(cluster=Cluster(server="http://a"), user=User(), namespace="n")
    client = Client(config.get(), transport=httpx2.MockTransport(made.answer))
    monkeypatch.setattr(kube, "connect", lambda namespace="": client)
    return made


@pytest.fixture
def in_pod(monkeypatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")


def missing(settings) -> dict[str, doctor.Check]:
    return {check.name: check for check in cluster.checks(settings) if not check.ok}


def test_of_a_whole_cluster_nothing_is_missing_and_nothing_is_changed(api, settings):
    found = cluster.checks(settings)

    assert [check for check in found if not check.ok] == []
    assert len(found) >= 15
    assert api.changed == []


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("inferenceservices.serving.kserve.io", "install KServe 0.20"),
        ("triggers.eventing.knative.dev", "install Knative Eventing"),
        ("revisions.serving.knative.dev", "demo-standard"),
        ("modelrollouts.perennial.dev", "kubectl apply -k"),
    ],
)
def test_a_missing_kind_is_told_with_its_remedy(api, settings, kind, remedy):
    del api.objects[f"{CRDS}/{kind}"]

    found = missing(settings)

    assert set(found) == {kind}
    assert remedy in found[kind].remedy


def test_standard_mode_wants_no_knative_serving(api, settings):
    del api.objects[f"{CRDS}/{cluster.SERVING.name}"]

    assert missing(settings.model_copy(update={"deployment_mode": "Standard"})) == {}


def test_a_kserve_without_what_came_with_0_20_is_too_old(api, settings):
    api.objects[KSERVE] = crd("predictor", "transformer")

    assert "no spec.canary" in missing(settings)[cluster.KSERVE].seen


def test_a_kserve_whose_controller_says_0_17_is_too_old(api, settings):
    api.objects[MANAGER] = deployment(image="kserve/kserve-controller:v0.17.0")

    assert missing(settings)[cluster.KSERVE].seen == "KServe 0.17, wanted 0.20 or later"


def test_what_this_identity_may_not_do_is_named(api, settings):
    api.refused = {"networkpolicies"}
    api.forbidden = {BROKER}

    found = missing(settings)

    assert "may not create networkpolicies in namespace n" in found["permission"].seen
    assert "cannot get this" in found["broker"].seen
    assert set(found) == {"permission", "broker"}
    assert all("administrator" in check.remedy for check in found.values())


@pytest.mark.parametrize(
    ("user", "launcher", "lacks", "names"),
    [
        ("operator", "job", "inferenceservices", "update inferenceservices"),
        ("operator", "job", "modelrollouts", "watch modelrollouts, create modelrollouts"),
        ("operator", "job", "services", "get services"),
        ("operator", "job", "revisions", "get revisions"),
        ("retraining", "job", "jobs", "create jobs, get jobs, delete jobs"),
        ("retraining", "job", "events", "list events"),
        ("retraining", "kfp", "runs", "retry runs, terminate runs"),
    ],
)
def test_a_pod_is_told_what_its_own_account_lacks(
    api, settings, in_pod, user, launcher, lacks, names
):
    api.user, api.refused = f"system:serviceaccount:n:{user}", {lacks}

    found = missing(settings.model_copy(update={"launcher": launcher}))

    assert set(found) - {"KFP"} == {"permission"}
    assert names in found["permission"].seen


def test_an_account_that_is_used_outside_of_a_pod_is_asked_for_all_that_a_person_needs(
    api, settings
):
    api.user, api.refused = "system:serviceaccount:n:nobody", {"deployments"}

    assert "create deployments" in missing(settings)["permission"].seen


def test_in_standard_mode_an_operator_needs_no_right_of_knative(api, settings, in_pod):
    api.user, api.refused = "system:serviceaccount:n:operator", {"revisions"}
    standard = settings.model_copy(update={"deployment_mode": "Standard"})

    before, api.refused = missing(standard), {"services"}

    assert before == {}
    assert "get services" in missing(standard)["permission"].seen


def test_an_open_namespace_is_told(api, settings):
    api.objects[SPACE]["metadata"]["labels"] = {}

    assert "restricted" in missing(settings)["namespace"].remedy


def test_a_missing_namespace_is_told(api, settings):
    del api.objects[SPACE]

    assert missing(settings)["namespace"].seen == "there is no namespace n"


def test_a_missing_secret_and_a_missing_key_are_told(api, settings):
    api.objects[f"{SPACE}/secrets/state"] = secret("url")
    del api.objects[f"{SPACE}/secrets/event-key"]

    found = missing(settings)

    assert found["secret state"].seen == "has no tracking-uri"
    assert found["secret event-key"].seen == "is not there"


def test_a_pod_whose_image_cannot_be_pulled_is_told(api, settings):
    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    status = {"name": "a", "image": "", "imageID": "", "ready": False, "restartCount": 0}
    containers = {"containerStatuses": [{**status, "state": waiting}]}
    api.objects[OPERATOR] = deployment(ready=0)
    api.objects[f"{SPACE}/pods"] = {"items": [{"status": containers}]}

    seen = missing(settings)["operator"].seen

    assert seen == "0 of 1 replicas are ready: ImagePullBackOff no such image"


def test_what_is_to_be_typed_names_the_namespace(api, settings):
    api.objects[OPERATOR] = deployment(ready=0)
    del api.objects[f"{SPACE}/secrets/state"]

    found = {c.name: c for c in cluster.checks(settings.model_copy(update={"namespace": "n"}))}

    assert found["operator"].remedy == "kubectl -n n logs deploy/operator"
    assert found["secret state"].remedy.startswith("kubectl -n n create secret generic state")
    assert "kubectl -n n exec deploy/retraining -- " in found["state"].seen


def test_a_broker_that_nobody_looks_after_is_told(api, settings):
    api.objects[BROKER] = {"status": {}}

    assert "nobody looks after it" in missing(settings)["broker"].seen


@pytest.fixture
def closed() -> str:
    """An address of this machine where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_stores_and_backend_that_do_not_answer_are_told(api, settings, closed, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{closed}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    there = {
        "state_url": f"postgresql+psycopg://a:secret@{closed}/x",
        "artifacts": "s3://perennial/a",
        "launcher": "kfp",
        "kfp_endpoint": f"http://{closed}",
    }

    found = missing(settings.model_copy(update=there))

    assert set(found) == {"state", "artifacts", "KFP"}
    assert "PERENNIAL_STATE_URL" in found["state"].remedy
    assert "AWS_ENDPOINT_URL" in found["artifacts"].remedy
    assert "PERENNIAL_KFP_ENDPOINT" in found["KFP"].remedy
    assert "secret" not in found["state"].seen


def test_without_a_cluster_that_answers_the_exit_code_is_2(settings, tmp_path, closed, monkeypatch):
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "a",
        "clusters": [{"name": "a", "cluster": {"server": f"http://{closed}"}}],
        "users": [{"name": "a", "user": {}}],
        "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
    }
    (tmp_path / "config").write_text(json.dumps(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))

    code = doctor.main(settings, "", as_json=True, cluster=True)

    assert code == 2


@pytest.mark.parametrize(("launcher", "lacks"), [("kfp", set()), ("job", {"API server"})])
def test_a_pod_without_a_token_lacks_it_only_where_its_runs_are_jobs(
    settings, tmp_path, monkeypatch, in_pod, launcher, lacks
):
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))

    found = missing(settings.model_copy(update={"launcher": launcher}))

    assert set(found) - {"KFP"} == lacks


def test_a_whole_cluster_ends_with_0_and_a_fault_with_2(api, settings, capsys):
    assert doctor.main(settings, "", as_json=True, cluster=True) == 0
    del api.objects[SPACE]

    assert doctor.main(settings, "", as_json=False, cluster=True) == 2
    assert "MISSING" in capsys.readouterr().out
