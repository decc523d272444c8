"""What each overlay allows, seen without a cluster; and that the checks find what is wrong."""

import base64
import copy
import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path

import jsonschema
import pytest
import yaml
from lightkube.utils.quantity import parse_quantity

from perennial import events, signing
from perennial import project as projects
from perennial.records import DriftReport, FeatureDrift, Phase, RolloutState
from perennial.retrain import job, launchers, service
from perennial.rollout import manifest
from perennial.settings import Settings
from pipelines import _cluster
from tests import policy
from tests.manifests import (
    BUCKET,
    DEMOS,
    OVERLAYS,
    RIGHTS,
    ROOT,
    kustomize,
    most_replicas,
    pipeline,
    rendered,
    templates,
)
from tests.policy import Doc, Nothing, Peer

TOKENS = {
    "demo": {"operator", "retraining"},
    "demo-standard": {"operator", "retraining"},
    "staging": {"operator"},
    "production": {"operator"},
}


def ours(name: str, *ports: int, space: str = "perennial") -> Peer:
    return Peer(name, space, {"app.kubernetes.io/component": name}, ports)


def served(name: str, space: str) -> Peer:
    ports = (8012, 8080, 8081, 8085, 9090)
    return Peer(name, space, {"serving.kserve.io/inferenceservice": "retail"}, ports)


def neighbourhood(space: str) -> list[Peer]:
    """Our pods with all their ports, a second tenant's, the platform's, and the world."""
    stores = [
        ours("dev-postgres", 5432, space=space),
        ours("dev-redis", 6379, space=space),
        ours("dev-s3", 9000, space=space),
    ]
    broker = {"app.kubernetes.io/component": "broker-ingress"}
    return [
        ours("operator", 8081, 8082, space=space),
        ours("retraining", 8080, space=space),
        ours("pipeline-run", 8080, space=space),
        ours("migrate", space=space),
        ours("edge", 8080, 8082, 9901, space=space),
        *stores,
        served("serving", space),
        Peer("kfp-driver", space, {"pipeline/runid": "1"}),
        Peer("kfp-run", space, {"pipeline/runid": "1", **ours("pipeline-run").labels}),
        Peer("stranger", space, {"app": "notebook"}, (8080,)),
        Peer("other-operator", "other", {"app.kubernetes.io/component": "operator"}, (8081,)),
        Peer("other-postgres", "other", {"app.kubernetes.io/component": "dev-postgres"}, (5432,)),
        Peer("other-run", "other", {"app.kubernetes.io/component": "pipeline-run"}),
        Peer("dns", "kube-system", {"k8s-app": "kube-dns"}, (53,)),
        Peer("system", "kube-system", {"app": "proxy"}, (53, 10249)),
        Peer("broker", "knative-eventing", broker, (8080, 9092)),
        Peer("activator", "knative-serving", {"app": "activator"}, (8012,)),
        Peer("gateway", "kourier-system", {"app": "3scale-kourier-gateway"}, (8080,)),
        Peer("kfp", "kubeflow", {"app": "ml-pipeline"}, (8887, 8888)),
        Peer("prometheus", "monitoring", {"app": "prometheus"}),
        Peer("kube-api", address="10.96.0.1", ports=(443, 10250)),
        Peer("metadata", address="169.254.169.254", ports=(80, 443)),
        Peer("world", address="203.0.113.9", ports=(22, 443, 5432)),
        Peer("database", address="10.20.0.5", ports=(22, 5432)),
        Peer("redis", address="10.20.0.6", ports=(22, 6379)),
    ]


def edge(text: str) -> set[policy.Edge]:
    """``a b > c:1 d:2`` is an edge from each on the left to each on the right."""
    found: set[policy.Edge] = set()
    for line in filter(None, map(str.strip, text.splitlines())):
        left, right = line.split(">")
        pairs = [target.split(":") for target in right.split()]
        found |= {(source, target, int(port)) for source in left.split() for target, port in pairs}
    return found


ALL = "operator retraining pipeline-run migrate edge serving dev-postgres dev-redis dev-s3"
ALL += " kfp-driver kfp-run stranger"
BASE = f"""
    {ALL} > dns:53
    operator > serving:8080 kube-api:443
    serving > broker:8080
    broker > retraining:8080
"""
IN_KNATIVE = """
    activator gateway > serving:8012 serving:9090
"""
IN_STANDARD = """
    edge > operator:8081 serving:8080 serving:8081
    operator > edge:8082
    activator broker gateway prometheus kfp other-operator other-postgres > edge:8080
    other-run dns system kube-api metadata world database redis > edge:8080
"""
DEV = """
    retraining > kube-api:443
    operator retraining pipeline-run kfp-run migrate > dev-postgres:5432
    pipeline-run kfp-run > dev-redis:6379
    retraining pipeline-run kfp-run serving > dev-s3:9000
"""
OWN = """
    retraining > kfp:8888
    kfp-driver kfp-run > kfp:8887 kfp:8888 kube-api:443
    prometheus > serving:8080 edge:8082
    operator retraining pipeline-run kfp-run migrate > database:5432 other-postgres:5432
    pipeline-run kfp-run > redis:6379
    retraining pipeline-run kfp-run serving > world:443 kube-api:443
"""
EDGES = {
    "demo": BASE + IN_KNATIVE + DEV,
    "demo-standard": BASE + IN_STANDARD + DEV,
    "staging": BASE + IN_KNATIVE + OWN,
    "production": BASE + IN_KNATIVE + OWN,
}


def faults(overlay: str, docs: list[Doc]) -> list[str]:
    """Everything that the static checks find in one overlay."""
    pods = policy.pods(docs)
    space = policy.kinds(docs, "Namespace")[0]["metadata"]["name"]
    found = policy.edges(docs, neighbourhood(space))
    wanted = edge(EDGES[overlay])
    return [
        *(fault for pod in pods for fault in policy.restricted(pod)),
        *(f"the token of {who} is mounted" for who in policy.tokens(docs) - TOKENS[overlay]),
        *policy.workloads(docs),
        *policy.tenant(docs),
        *policy.secrets(docs, demo=overlay in DEMOS),
        *policy.grants(docs, RIGHTS[overlay]),
        *(f"{a} reaches {b}:{port}" for a, b, port in sorted(found - wanted)),
        *(f"{a} does not reach {b}:{port}" for a, b, port in sorted(wanted - found)),
    ]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_keeps_every_rule(overlay):
    assert faults(overlay, rendered(overlay)) == []


def test_look_ups_open_the_way_to_their_stores_and_no_other(tmp_path):
    root = Path(os.path.relpath(ROOT / "kustomize", tmp_path))
    text = {
        "namespace": "perennial",
        "resources": [str(root / "overlays" / "demo")],
        "components": [str(root / "components" / "lookup")],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(text))

    docs = list(yaml.safe_load_all(kustomize(str(tmp_path))))

    found = [policy.edges(which, neighbourhood("perennial")) for which in (docs, rendered("demo"))]
    assert found[0] - found[1] == edge("serving > dev-redis:6379 dev-postgres:5432")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_installs_the_kind_and_none_of_its_objects(overlay):
    docs = rendered(overlay)

    assert [policy.name(d) for d in policy.kinds(docs, "CustomResourceDefinition")] == [
        "CustomResourceDefinition/modelrollouts.perennial.dev"
    ]
    assert policy.kinds(docs, "ModelRollout", "InferenceService") == []


def test_a_second_tenant_brings_everything_but_the_kind(tmp_path):
    docs = second_tenant("demo", tmp_path)

    spaces = {d["metadata"].get("namespace") for d in docs if d["kind"] != "Namespace"}
    assert policy.kinds(docs, "CustomResourceDefinition") == []
    assert spaces == {"second"}
    assert {d["metadata"]["name"] for d in policy.kinds(docs, "Namespace")} == {"second"}
    assert len(docs) == len(rendered("demo")) - 1


def second_tenant(overlay: str, folder: Path) -> list[Doc]:
    """The overlay for another namespace, as docs/cluster.md tells to write it."""
    text = told_overlays()["second"]
    return written(text.replace("../production", f"../{overlay}"), folder)


def told_overlays() -> dict[str, str]:
    """The overlays that docs/cluster.md tells to write, by their namespace."""
    page = (ROOT / "docs" / "cluster.md").read_text()
    blocks = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return {yaml.safe_load(text).get("namespace", ""): text for text in blocks}


def written(text: str, folder: Path) -> list[Doc]:
    """What an overlay applies that is written beside the shipped ones, here in another folder."""
    beside = ROOT / "kustomize" / "overlays" / "yours"
    moved = re.sub(r"\.\./[^],]+", lambda path: os.path.relpath(beside / path[0], folder), text)
    (folder / "kustomization.yaml").write_text(moved)
    return list(yaml.safe_load_all(kustomize(str(folder))))


def test_the_told_overlay_of_a_second_tenant_keeps_its_objects_apart(tmp_path):
    docs = second_tenant("production", tmp_path)

    assert settings_of(docs).artifacts == "s3://perennial/second"
    assert faults("production", docs) == []


def test_the_told_overlay_pins_every_image_by_its_digest(tmp_path):
    docs = written(told_overlays()[""].replace("sha256:...", f"sha256:{'a' * 64}"), tmp_path)
    read = settings_of(docs)
    request = launchers.RunRequest(Path("projects/retail.yaml"))
    run = job.manifest(read, request, "retail", "retail-1").to_dict()
    state = RolloutState(1, "retail", 7, "ab", "s3://b/c", "r", Phase.WISHED, -1, 0, "")
    place = manifest.Place("perennial", "Knative", read.serving_image, "s3://b/d", "http://broker")
    served = manifest.render(manifest.load(ROOT, "retail"), state, place)

    pods = policy.pods([*docs, {"kind": "Job", **run}, served])
    images = {c["image"] for pod in pods for c in pod.containers}

    pinned = f"@sha256:{'a' * 64}"
    assert images == {
        f"registry.internal/perennial{pinned}",
        f"registry.internal/perennial-serving{pinned}",
    }
    assert read.image in images
    assert faults("production", docs) == []


def test_production_keeps_three_of_everything_and_grows_under_load():
    docs = rendered("production")

    counts = {
        d["metadata"]["name"]: d["spec"].get("replicas") for d in policy.kinds(docs, "Deployment")
    }
    scaled = {
        d["spec"]["scaleTargetRef"]["name"]: d["spec"]["minReplicas"]
        for d in policy.kinds(docs, "HorizontalPodAutoscaler")
    }
    # What an autoscaler counts has no number of its own, which each apply would set again.
    assert counts == {"operator": 3, "retraining": None}
    assert scaled == {"retraining": 3}
    assert most_replicas(docs)["retraining"] > 3
    read = settings_of(docs)
    assert (read.min_replicas, read.max_replicas) == (3, 6)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_servers_have_a_disruption_budget_and_a_quota_that_bears_two_versions(overlay):
    docs = rendered(overlay)
    budget = one(docs, "PodDisruptionBudget", "serving")["spec"]
    servers = "serving.kserve.io/inferenceservice"
    assert budget["selector"] == {"matchExpressions": [{"key": servers, "operator": "Exists"}]}
    assert budget["maxUnavailable"] == 1

    most = one(docs, "ResourceQuota", "tenant")["spec"]["hard"]
    counts = most_replicas(docs)
    pods = [
        (d["spec"]["template"]["spec"], counts[d["metadata"]["name"]])
        for d in policy.kinds(docs, "Deployment")
    ]
    template = manifest.load(ROOT, "retail")["spec"]["predictor"]
    copies = settings_of(docs).max_replicas or template["maxReplicas"]
    # Beside each server a proxy of Knative's, which the LimitRange bounds.
    proxy = {"resources": {"limits": {"cpu": "1"}}}
    pods.append(({"containers": [*template["containers"], proxy]}, 2 * copies))
    cpus = sum(
        count * parse_quantity(c["resources"]["limits"]["cpu"])
        for pod, count in pods
        for c in pod["containers"]
    )
    # One step of a pipeline beside them, with what Argo puts into its pod.
    assert cpus + 4 <= parse_quantity(most["limits.cpu"])


def settings_of(docs: list[Doc]) -> Settings:
    return Settings.load(one(docs, "ConfigMap", "settings")["data"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_find_every_setting_that_they_are_given(overlay, monkeypatch):
    [settings] = [d for d in rendered(overlay) if policy.name(d) == "ConfigMap/settings"]

    known = {f"PERENNIAL_{name.upper()}" for name in Settings.model_fields}
    read = Settings.load(settings["data"])

    assert set(settings["data"]) <= known
    assert read.deployment_mode == ("Standard" if overlay == "demo-standard" else "Knative")
    assert read.launcher == ("job" if overlay in DEMOS else "kfp")
    assert read.artifacts.startswith("s3://perennial/perennial")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_pods_refer_to_is_there(overlay):
    docs = rendered(overlay)
    there = {policy.name(d) for d in docs}
    if overlay not in DEMOS:
        there |= {"Secret/state", "Secret/artifacts", "Secret/server-artifacts", "Secret/event-key"}

    wanted = {name for pod in policy.pods(docs) for name in referred(pod)}

    assert wanted - there == set()
    assert {"Secret/state", "ConfigMap/settings", "ConfigMap/projects"} <= wanted


def referred(pod: policy.Pod) -> set[str]:
    found = {f"ServiceAccount/{pod.account}"}
    for container in pod.containers:
        for source in container.get("envFrom", []):
            found |= {
                f"ConfigMap/{one['name']}" for k, one in source.items() if k == "configMapRef"
            }
            found |= {f"Secret/{one['name']}" for k, one in source.items() if k == "secretRef"}
        for variable in container.get("env", []):
            key = variable.get("valueFrom", {}).get("secretKeyRef")
            found |= {f"Secret/{key['name']}"} if key else set()
    for volume in pod.spec.get("volumes", []):
        found |= {f"Secret/{volume['secret']['secretName']}"} if "secret" in volume else set()
        found |= {f"ConfigMap/{volume['configMap']['name']}"} if "configMap" in volume else set()
    return found


@pytest.mark.parametrize("project", ["bank", "elec", "retail"])
def test_each_example_brings_itself_to_a_cluster(project, tmp_path):
    root = Path(os.path.relpath(ROOT, tmp_path))
    text = {
        "resources": [str(root / "kustomize" / "base")],
        "components": [str(root / "examples" / project)],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(text))

    docs = list(yaml.safe_load_all(kustomize(str(tmp_path))))

    [found] = [d for d in docs if policy.name(d) == "ConfigMap/projects"]
    (tmp_path / f"{project}.yaml").write_text(found["data"][f"{project}.yaml"])
    assert projects.load(tmp_path / f"{project}.yaml").name == project


def test_events_that_the_trigger_takes_are_ours_and_fit_their_schema():
    docs = rendered("demo")
    [trigger] = policy.kinds(docs, "Trigger")
    [schemas] = [d for d in docs if policy.name(d) == "ConfigMap/event-schemas"]
    schema = json.loads(schemas["data"]["drift.schema.json"])

    event = events.drift_event(drifted(), "retail", "a", datetime(2026, 1, 2, tzinfo=UTC))

    jsonschema.Draft202012Validator(schema).validate(event.data)
    assert not jsonschema.Draft202012Validator(schema).is_valid({**event.data, "drifted": []})
    assert trigger["spec"]["filter"]["attributes"] == {"type": events.DRIFT}
    assert [d["spec"]["type"] for d in policy.kinds(docs, "EventType")] == [events.DRIFT]


def drifted() -> DriftReport:
    start, end = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)
    features = (FeatureDrift("spend", "ks", 0.5, 0.001, True, 0.0),)
    return DriftReport(start, end, "sha256:ab", 200, False, 0.05, features)


def test_the_trigger_gives_up_when_an_event_would_be_too_old_to_be_taken():
    [trigger] = policy.kinds(rendered("demo"), "Trigger")
    delivery = trigger["spec"]["delivery"]

    waited_s = sum(2**n for n in range(delivery["retry"]))

    assert (delivery["backoffPolicy"], delivery["backoffDelay"]) == ("exponential", "PT1S")
    assert 200 < waited_s < service.FRESH.total_seconds()
    assert delivery["deadLetterSink"]["uri"] == "/dead"


def test_the_key_of_the_demo_is_one():
    [key] = [d for d in rendered("demo") if policy.name(d) == "Secret/event-key"]

    assert len(base64.b64decode(key["data"]["event.key"])) == signing.KEY_BYTES


@pytest.mark.parametrize("document", templates(), ids=policy.name)
def test_a_server_of_kserve_is_restricted_like_any_pod(document):
    assert [f for pod in policy.pods([document]) for f in policy.restricted(pod)] == []


@pytest.mark.parametrize("document", templates(), ids=policy.name)
def test_a_server_of_kserve_is_probed_where_knative_lets_it_be(document):
    assert policy.workloads([document]) == []


@pytest.mark.parametrize("probe", ["startupProbe", "livenessProbe", "readinessProbe", "ports"])
def test_a_server_of_kserve_that_is_not_probed_is_found(probe):
    document = copy.deepcopy(next(d for d in templates() if "containers" in d["spec"]["predictor"]))
    for container in document["spec"]["predictor"]["containers"]:
        container.pop(probe, None)

    wanted = "no port that could be probed" if probe == "ports" else f"has no {probe}"
    assert [f for f in policy.workloads([document]) if wanted in f] != []


def test_a_server_of_kserve_that_is_ready_without_its_model_is_found():
    document = copy.deepcopy(next(d for d in templates() if "containers" in d["spec"]["predictor"]))
    for container in document["spec"]["predictor"]["containers"]:
        if "readinessProbe" in container:
            container["readinessProbe"]["httpGet"]["path"] = "/v2/health/ready"

    (found,) = policy.workloads([document])
    assert "ready without its model" in found


@pytest.mark.parametrize("mode", ["Knative", "Standard"])
def test_the_servers_that_the_operator_makes_are_restricted_and_fit_the_policies(mode):
    state = RolloutState(1, "retail", 7, "ab", "s3://b/c", "r", Phase.WISHED, -1, 0, "")
    place = manifest.Place("perennial", mode, "perennial-serving:1", "s3://b/d", "http://broker")

    made = manifest.render(manifest.load(ROOT, "retail"), state, place)

    [pod] = policy.pods([made])
    assert policy.restricted(pod) == []
    assert (pod.account, pod.has_token) == ("serving", False)


def test_the_job_that_the_launcher_makes_is_restricted_and_fits_the_policies(settings):
    asked = launchers.RunRequest(Path("projects/retail.yaml"))

    made = job.manifest(settings, asked, "retail", "retail-1").to_dict()

    [pod] = policy.pods([{"kind": "Job", **made}])
    labels = made["spec"]["template"]["metadata"]["labels"]
    assert policy.restricted(pod) == []
    assert (pod.account, pod.has_token) == ("pipeline-run", False)
    assert ours("pipeline-run").labels.items() <= labels.items()


@pytest.mark.parametrize("image", ["components", "kserve"])
def test_every_pod_may_write_to_the_home_of_its_image(settings, image):
    """Its root is read-only: a home that is mounted elsewhere would be found out by a library."""
    [home] = re.findall(r"HOME=(\S+)", (ROOT / image / "Containerfile").read_text())
    asked = launchers.RunRequest(Path("projects/retail.yaml"))
    made = job.manifest(settings, asked, "retail", "retail-1").to_dict()
    folders = ("demo", "demo-standard", "production")
    docs = [*(d for one in folders for d in rendered(one)), *templates(), {"kind": "Job", **made}]
    which = "perennial-serving" if image == "kserve" else "perennial"

    containers = [c for pod in policy.pods(docs) for c in pod.containers if is_of(c, which)]

    assert len(containers) >= 6
    for container in containers:
        assert home in {mount["mountPath"] for mount in container["volumeMounts"]}
        told = {one["name"]: one.get("value") for one in container.get("env", [])}
        assert told.get("HOME", home) == home
    assert home == _cluster.WORK
    read = settings_of(rendered("demo"))
    assert read.home.is_relative_to(home)


def is_of(container: Doc, image: str) -> bool:
    return str(container.get("image", "")).rpartition("/")[2].partition(":")[0] == image


def test_the_steps_of_the_pipeline_ask_for_restricted_pods():
    assert policy.executors(pipeline()) == []


def test_the_bucket_is_closed_to_other_tenants():
    assert policy.buckets(json.loads(BUCKET.read_text()), "perennial", "perennial") == []


# What is seeded here must be found. Each seed spoils the documents of one overlay, or one file.


def one(docs: list[Doc], kind: str, called: str) -> Doc:
    return next(d for d in docs if policy.name(d) == f"{kind}/{called}")


def pod_of(docs: list[Doc], called: str = "operator", kind: str = "Deployment") -> Doc:
    return one(docs, kind, called)["spec"]["template"]["spec"]


def first(docs: list[Doc], called: str = "operator") -> Doc:
    return pod_of(docs, called)["containers"][0]


def security(docs: list[Doc], **changes: object) -> None:
    first(docs)["securityContext"].update(changes)


def drop(value: Doc, *path: str) -> None:
    for key in path[:-1]:
        value = value[key]
    del value[path[-1]]


def may(docs: list[Doc], who: str, group: str, resource: str, verb: str) -> None:
    rule = {"apiGroups": [group], "resources": [resource], "verbs": [verb]}
    one(docs, "Role", who)["rules"].append(rule)


def network(docs: list[Doc], called: str, **spec: object) -> None:
    meta = {"name": called, "namespace": "perennial"}
    docs.append({"kind": "NetworkPolicy", "metadata": meta, "spec": spec})


def remove(docs: list[Doc], kind: str, called: str) -> None:
    docs.remove(one(docs, kind, called))


def add(docs: list[Doc], kind: str, called: str, **more: object) -> None:
    docs.append({"kind": kind, "metadata": {"name": called, "namespace": "perennial"}, **more})


def foreign_subject(docs: list[Doc]) -> None:
    subject = {"kind": "Group", "name": "system:authenticated"}
    one(docs, "RoleBinding", "operator")["subjects"].append(subject)


SEEDS = {
    # pods
    "privileged": (lambda d: security(d, privileged=True), "is privileged"),
    "escalation": (
        lambda d: drop(first(d), "securityContext", "allowPrivilegeEscalation"),
        "may gain privileges",
    ),
    "capabilities kept": (lambda d: security(d, capabilities={}), "keeps capabilities"),
    "capability added": (
        lambda d: security(d, capabilities={"drop": ["ALL"], "add": ["NET_ADMIN"]}),
        "adds capabilities",
    ),
    "unmasked /proc": (lambda d: security(d, procMount="Unmasked"), "unmasks /proc"),
    "root allowed": (
        lambda d: drop(pod_of(d), "securityContext", "runAsNonRoot"),
        "may run as root",
    ),
    "root in one container": (lambda d: security(d, runAsUser=0), "runs as root"),
    "no seccomp": (
        lambda d: pod_of(d)["securityContext"].update(seccompProfile={"type": "Unconfined"}),
        "has no seccomp profile",
    ),
    "SELinux role": (
        lambda d: security(d, seLinuxOptions={"role": "system_r"}),
        "sets a SELinux user or role",
    ),
    "writable root": (
        lambda d: security(d, readOnlyRootFilesystem=False),
        "may write to its root",
    ),
    "network of the node": (lambda d: pod_of(d).update(hostNetwork=True), "hostNetwork is set"),
    "processes of the node": (lambda d: pod_of(d).update(hostPID=True), "hostPID is set"),
    "port of the node": (
        lambda d: first(d)["ports"][0].update(hostPort=80),
        "takes a port of the node",
    ),
    "sysctl": (
        lambda d: pod_of(d)["securityContext"].update(sysctls=[{"name": "kernel.msgmax"}]),
        "sysctls are set",
    ),
    "folder of the node": (
        lambda d: pod_of(d)["volumes"].append({"name": "x", "hostPath": {"path": "/"}}),
        "volume type hostPath",
    ),
    "endless emptyDir": (
        lambda d: pod_of(d)["volumes"].append({"name": "x", "emptyDir": {}}),
        "has no size limit",
    ),
    "init container": (
        lambda d: drop(pod_of(d, "migrate", "Job")["initContainers"][0], "securityContext"),
        "tenant: may gain privileges",
    ),
    "no limits": (lambda d: drop(first(d), "resources", "limits"), "in its limits"),
    "no version": (lambda d: first(d).update(image="perennial:latest"), "names no version"),
    "token mounted": (
        lambda d: pod_of(d, "migrate", "Job").update(automountServiceAccountToken=True),
        "the token of migrate is mounted",
    ),
    "token by a volume": (
        lambda d: pod_of(d)["volumes"].append(
            {"name": "x", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}
        ),
        "a token for the API server",
    ),
    "default account": (
        lambda d: drop(pod_of(d), "serviceAccountName"),
        "runs as the default account",
    ),
    # workloads and what surrounds them
    "no probe": (lambda d: drop(first(d), "livenessProbe"), "has no livenessProbe"),
    "not spread": (
        lambda d: drop(pod_of(d), "topologySpreadConstraints"),
        "is not spread",
    ),
    "no budget": (lambda d: remove(d, "PodDisruptionBudget", "operator"), "disruption budget"),
    "no quota": (lambda d: remove(d, "ResourceQuota", "tenant"), "there is no ResourceQuota"),
    "open namespace": (
        lambda d: one(d, "Namespace", "perennial")["metadata"]["labels"].update(
            {"pod-security.kubernetes.io/enforce": "baseline"}
        ),
        "does not enforce",
    ),
    "node port": (
        lambda d: one(d, "Service", "operator")["spec"].update(type="NodePort"),
        "opens a port of the node",
    ),
    "object elsewhere": (
        lambda d: one(d, "ConfigMap", "settings")["metadata"].update(namespace="kube-system"),
        "is outside of the namespace",
    ),
    "rollout in the overlay": (lambda d: add(d, "ModelRollout", "v1"), "has nothing to serve"),
    "kind of an operator": (lambda d: add(d, "ServiceMonitor", "x"), "may be missing"),
    "unmarked secret": (lambda d: add(d, "Secret", "x"), "is not marked"),
    "trigger without retries": (
        lambda d: drop(one(d, "Trigger", "drift"), "spec", "delivery"),
        "is not retried",
    ),
    # rights
    "wildcard": (lambda d: may(d, "operator", "*", "*", "*"), "operator may * */*"),
    "secrets": (lambda d: may(d, "retraining", "", "secrets", "list"), "may list /secrets"),
    "shell in pods": (
        lambda d: may(d, "operator", "", "pods/exec", "create"),
        "operator may create /pods/exec",
    ),
    "escalation of rights": (
        lambda d: may(d, "operator", "rbac.authorization.k8s.io", "roles", "escalate"),
        "operator may escalate",
    ),
    "a right too few": (
        lambda d: one(d, "Role", "operator-knative").update(rules=[]),
        "operator may not get serving.knative.dev/revisions",
    ),
    "cluster role": (lambda d: add(d, "ClusterRole", "x"), "reaches every namespace"),
    "binding to a cluster role": (
        lambda d: one(d, "RoleBinding", "operator")["roleRef"].update(
            kind="ClusterRole", name="admin"
        ),
        "binds ClusterRole admin",
    ),
    "stranger bound": (foreign_subject, "names a stranger"),
    # edges
    "nothing denied": (
        lambda d: remove(d, "NetworkPolicy", "deny-all"),
        "world reaches pipeline-run:8080",
    ),
    "egress open": (
        lambda d: network(d, "x", podSelector={}, policyTypes=["Egress"], egress=[{}]),
        "pipeline-run reaches world:22",
    ),
    "metadata of the cloud": (
        lambda d: network(
            d,
            "x",
            podSelector={},
            policyTypes=["Egress"],
            egress=[{"to": [{"ipBlock": {"cidr": "169.254.0.0/16"}}]}],
        ),
        "serving reaches metadata:80",
    ),
    "another tenant": (
        lambda d: one(d, "NetworkPolicy", "dev-postgres-from-us")["spec"]["ingress"][0][
            "from"
        ].append({"namespaceSelector": {}}),
        "other-run reaches dev-postgres:5432",
    ),
    "an edge too few": (
        lambda d: remove(d, "NetworkPolicy", "serving-to-broker"),
        "serving does not reach broker:8080",
    ),
}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seeded_violation_is_found(seed):
    spoil, sentence = SEEDS[seed]
    docs = copy.deepcopy(rendered("demo"))

    spoil(docs)

    assert [f for f in faults("demo", docs) if sentence in f] != []


def inference_service(**changes: object) -> Doc:
    document = copy.deepcopy(templates()[0])
    for container in document["spec"]["predictor"]["containers"]:
        container["securityContext"].update(changes)
    return document


HIDDEN = {
    "InferenceService": inference_service(privileged=True),
    "model of an InferenceService": {
        "kind": "InferenceService",
        "spec": {
            "predictor": {
                "serviceAccountName": "serving",
                "model": {
                    "modelFormat": {"name": "xgboost"},
                    "securityContext": {"privileged": True},
                },
            }
        },
    },
    "canary of an InferenceService": {
        "kind": "InferenceService",
        "spec": {"predictor": {}, "canary": [{"predictor": inference_service(privileged=True)}]},
    },
    "Job in a CronJob": {
        "kind": "CronJob",
        "spec": {
            "jobTemplate": {
                "spec": {
                    "template": {
                        "spec": {"containers": [{"securityContext": {"privileged": True}}]}
                    }
                }
            }
        },
    },
    "list of a list": {
        "kind": "List",
        "items": [{"spec": {"containers": [{"securityContext": {"privileged": True}}]}}],
    },
}


@pytest.mark.parametrize("where", HIDDEN)
def test_a_pod_is_found_wherever_it_hides(where):
    found = [f for pod in policy.pods([HIDDEN[where]]) for f in policy.restricted(pod)]

    assert [fault for fault in found if "is privileged" in fault] != []


STEPS = {
    "root": (lambda p: p["securityContext"].update(runAsNonRoot=False), "may run as root"),
    "no security at all": (lambda p: drop(p, "securityContext"), "may run as root"),
    "no deadline": (lambda p: drop(p, "activeDeadlineSeconds"), "has no deadline"),
    "no label": (
        lambda p: drop(p, "podMetadata"),
        "has no label that a NetworkPolicy could select",
    ),
    "uid 0": (lambda p: p["securityContext"].update(runAsUser="0"), "runs with power"),
}


@pytest.mark.parametrize("seed", STEPS)
def test_a_violation_seeded_into_the_pipeline_is_found(seed):
    spoil, sentence = STEPS[seed]
    docs = pipeline()
    [asked] = [d["platforms"]["kubernetes"]["deploymentSpec"] for d in docs if "platforms" in d]

    spoil(asked["executors"]["exec-train"])

    assert policy.executors(docs) == [f"exec-train: {sentence}"]


BUCKETS = {
    "everybody": (lambda s: s[1].update(Principal="*"), "is for everybody"),
    "another prefix": (
        lambda s: s[1].update(Resource="arn:aws:s3:::perennial/*"),
        "reaches arn:aws:s3:::perennial/*",
    ),
    "every verb": (lambda s: s[1].update(Action="s3:*"), "allows s3:*"),
    "deleting": (
        lambda s: s[2].update(Action=["s3:PutObject", "s3:DeleteObject"]),
        "allows s3:DeleteObject",
    ),
    "whole listing": (lambda s: drop(s[3], "Condition"), "lists what is not the tenant's"),
    "no TLS": (lambda s: s.pop(0), "requests without TLS are not refused"),
}


@pytest.mark.parametrize("seed", BUCKETS)
def test_a_violation_seeded_into_the_bucket_policy_is_found(seed):
    spoil, sentence = BUCKETS[seed]
    document = json.loads(BUCKET.read_text())

    spoil(document["Statement"])

    assert [f for f in policy.buckets(document, "perennial", "perennial") if sentence in f] != []


def test_at_least_25_different_violations_are_seeded():
    sentences = {sentence for _, sentence in [*SEEDS.values(), *STEPS.values(), *BUCKETS.values()]}

    assert len(sentences) >= 25


@pytest.mark.parametrize(
    "check",
    [
        policy.pods,
        policy.tokens,
        policy.workloads,
        policy.tenant,
        policy.rights,
        policy.executors,
        lambda docs: policy.grants(docs, {}),
        lambda docs: policy.secrets(docs, demo=True),
        lambda docs: policy.edges(docs, neighbourhood("perennial")),
        lambda docs: policy.buckets({"Statement": docs}, "perennial", "perennial"),
    ],
)
def test_a_check_on_nothing_fails(check):
    with pytest.raises(Nothing):
        check([])
