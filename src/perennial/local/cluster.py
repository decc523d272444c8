"""Say what a cluster lacks for the loop, and how to mend it; nothing is changed by looking."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightkube import Client
from lightkube.generic_resource import create_namespaced_resource
from lightkube.models.authorization_v1 import ResourceAttributes, SelfSubjectAccessReviewSpec
from lightkube.resources.apiextensions_v1 import CustomResourceDefinition
from lightkube.resources.apps_v1 import Deployment
from lightkube.resources.authentication_v1 import SelfSubjectReview
from lightkube.resources.authorization_v1 import SelfSubjectAccessReview
from lightkube.resources.core_v1 import Namespace, Pod, Secret

from perennial import kube
from perennial.errors import BadInput, PerennialError
from perennial.local import argo
from perennial.local.doctor import Check
from perennial.settings import Settings, in_pod

KSERVE = "inferenceservices.serving.kserve.io"
OLDEST_KSERVE = (0, 20)
INSTALL = "kubectl apply -k kustomize/overlays/demo"
IN_POD = "exec deploy/retraining -- perennial doctor --cluster"
ADMIN = "ask an administrator of the cluster, or use another KUBECONFIG"
SECRETS = {
    "state": ("url", "tracking-uri"),
    "event-key": ("event.key",),
    "artifacts": (),
    "server-artifacts": (),
}
RESTRICTED = "pod-security.kubernetes.io/enforce"
ACCOUNT = "system:serviceaccount:"
Broker = create_namespaced_resource("eventing.knative.dev", "v1", "Broker", "brokers")

# What whoever installs and looks needs: verb, group, resource.
PERSON = (
    ("create", "apps", "deployments"),
    ("create", "rbac.authorization.k8s.io", "roles"),
    ("create", "networking.k8s.io", "networkpolicies"),
    ("create", "eventing.knative.dev", "triggers"),
    ("create", "perennial.dev", "modelrollouts"),
    ("list", "serving.kserve.io", "inferenceservices"),
    ("list", "", "pods"),
)
# What the code uses of the API server: account, and where it differs the mode or the launcher;
# then group, resource, verbs. A test holds the Roles of kustomize/ to this table.
ROLES = {
    "operator": (
        ("perennial.dev", "modelrollouts", "list watch create delete"),
        ("perennial.dev", "modelrollouts/status", "patch"),
        ("serving.kserve.io", "inferenceservices", "get list watch create update delete"),
        ("eventing.knative.dev", "brokers", "get"),
        ("", "pods", "list"),
    ),
    "operator Knative": (
        ("serving.knative.dev", "revisions", "get"),
        ("serving.knative.dev", "services", "get"),
    ),
    "operator Standard": (("", "services", "get"),),
    "retraining job": (
        ("batch", "jobs", "create get delete"),
        ("", "pods", "list"),
        ("", "pods/log", "get"),
        ("", "events", "list"),
    ),
    "retraining kfp": (
        ("pipelines.kubeflow.org", "runs", "create get list retry terminate"),
        ("pipelines.kubeflow.org", "experiments", "create list"),
    ),
}


@dataclass(frozen=True)
class Kind:
    """A kind that somebody's installation brings."""

    name: str
    remedy: str


KINDS = (
    Kind(KSERVE, "install KServe 0.20 or later"),
    Kind("brokers.eventing.knative.dev", "install Knative Eventing"),
    Kind("triggers.eventing.knative.dev", "install Knative Eventing"),
    Kind("modelrollouts.perennial.dev", INSTALL),
)
SERVING = Kind(
    "revisions.serving.knative.dev",
    "install Knative Serving, or choose kustomize/overlays/demo-standard",
)


Right = tuple[str, str, str]
Look = tuple[str, Callable[[], Check]]


def checks(settings: Settings) -> list[Check]:
    """Everything that can be told in seconds; where nothing answers, only the stores are asked."""
    try:
        client = kube.connect(settings.namespace)
        user = _user(client)
    except PerennialError as exc:
        return [_unasked(exc, settings), *_stores(settings)]
    found = Check("API server", True, f"{client.config.cluster.server} knows us as {user}")
    # Outside of a pod an account's token is what a machine installs by.
    if in_pod() and user.startswith(ACCOUNT):
        needed = rights(user.rpartition(":")[2], settings)
        looks = [_rights(client, needed)] if needed else []
    else:
        looks = [_rights(client, PERSON), *_things(client, settings)]
    return [found, *(_looked(*look) for look in looks), *_stores(settings)]


def _unasked(fault: PerennialError, settings: Settings) -> Check:
    """Why the API server told nothing; a pod that leaves its runs to KFP needs no token for it."""
    if isinstance(fault, BadInput) and settings.launcher == "kfp" and in_pod():
        return Check("API server", True, "not asked: this pod has no token for it and needs none")
    remedy = "set KUBECONFIG to a file that names a cluster which runs"
    return Check("API server", False, str(fault), remedy)


def _kubectl(namespace: str, words: str) -> str:
    """A command as it is typed; without a namespace kubectl means the same as we do."""
    return f"kubectl -n {namespace} {words}" if namespace else f"kubectl {words}"


def _user(client: Client) -> str:
    with kube.asking("asking the cluster who we are"):
        status = client.create(SelfSubjectReview()).status
    return str(status.userInfo.username if status and status.userInfo else "nobody")


def _things(client: Client, settings: Settings) -> list[Look]:
    """What only a person may look at."""
    kinds = (*KINDS, SERVING) if settings.deployment_mode == "Knative" else KINDS
    return [
        *((kind.name, partial(_kind, client, kind)) for kind in kinds),
        ("namespace", partial(_namespace, client)),
        *((f"secret {name}", partial(_secret, client, name)) for name in SECRETS),
        *((name, partial(_deployment, client, name)) for name in ("operator", "retraining")),
        ("broker", partial(_broker, client)),
    ]


def _looked(title: str, look: Callable[[], Check]) -> Check:
    """One look; what the cluster refuses to show is told like what is missing."""
    try:
        with kube.asking("looking"):
            return look()
    except kube.Forbidden as exc:
        return Check(title, False, f"may not be read: {exc}", ADMIN)
    except PerennialError as exc:
        return Check(title, False, str(exc), "try again when the cluster answers")


def rights(account: str, settings: Settings) -> tuple[Right, ...]:
    """What an account of ours needs under these settings; most accounts need nothing."""
    names = (account, *(f"{account} {w}" for w in (settings.deployment_mode, settings.launcher)))
    lines = [line for name in names for line in ROLES.get(name, ())]
    return tuple((verb, group, thing) for group, thing, verbs in lines for verb in verbs.split())


def _rights(client: Client, needed: tuple[Right, ...]) -> Look:
    return "permission", lambda: _told(client, [r for r in needed if not _may(client, *r)])


def _may(client: Client, verb: str, group: str, resource: str) -> bool:
    plain, _, part = resource.partition("/")
    asked = ResourceAttributes(
        verb=verb, group=group, resource=plain, subresource=part, namespace=client.namespace
    )
    review = SelfSubjectAccessReview(spec=SelfSubjectAccessReviewSpec(resourceAttributes=asked))
    status = client.create(review).status
    return bool(status and status.allowed)


def _told(client: Client, missing: list[Right]) -> Check:
    names = ", ".join(f"{verb} {resource}" for verb, _, resource in missing)
    seen = f"may not {names}" if missing else "everything that is needed"
    return Check("permission", not missing, f"{seen} in namespace {client.namespace}", ADMIN)


def _kind(client: Client, kind: Kind) -> Check:
    try:
        with kube.asking(f"reading the kind {kind.name}"):
            found = client.get(CustomResourceDefinition, kind.name)
    except kube.Missing:
        return Check(kind.name, False, "the cluster does not know this kind", kind.remedy)
    return _kserve(client, found) if kind.name == KSERVE else Check(kind.name, True, "known")


def _kserve(client: Client, kind: CustomResourceDefinition) -> Check:
    wanted = ".".join(map(str, OLDEST_KSERVE))
    remedy = f"install KServe {wanted} or later"
    version = _kserve_version(client)
    told = ".".join(map(str, version)) if version else ""
    if version and version < OLDEST_KSERVE:
        return Check(KSERVE, False, f"KServe {told}, wanted {wanted} or later", remedy)
    if not _knows_canary(kind):
        return Check(KSERVE, False, f"older than {wanted}: it knows no spec.canary", remedy)
    return Check(KSERVE, True, f"KServe {told or f'{wanted} or later'}")


def _kserve_version(client: Client) -> tuple[int, int] | None:
    """What the image of the controller says; None where it runs elsewhere."""
    manager = kube.find(client, Deployment, "kserve-controller-manager", namespace="kserve")
    template = manager.spec.template.spec if manager and manager.spec else None
    images = [str(c.image) for c in template.containers] if template else []
    found = re.search(r"kserve-controller:v(\d+)\.(\d+)", " ".join(images))
    return (int(found[1]), int(found[2])) if found else None


def _knows_canary(kind: CustomResourceDefinition) -> bool:
    """Does the schema know what came with 0.20? One that was cut down tells nothing."""
    # Below its first level lightkube leaves a schema as the server wrote it.
    schemas = [v.schema.openAPIV3Schema for v in kind.spec.versions if v.schema]
    tops: list[Any] = [(s.properties or {}).get("spec") for s in schemas if s]
    fields = [top["properties"] for top in tops if top and top.get("properties")]
    return not fields or any("canary" in properties for properties in fields)


def _namespace(client: Client) -> Check:
    name = client.namespace
    try:
        with kube.asking(f"reading namespace {name}"):
            meta = client.get(Namespace, name).metadata
    except kube.Missing:
        return Check("namespace", False, f"there is no namespace {name}", INSTALL)
    level = ((meta.labels if meta else None) or {}).get(RESTRICTED, "nothing")
    remedy = f"kubectl label namespace {name} {RESTRICTED}=restricted"
    return Check("namespace", level == "restricted", f"{name} enforces {level}", remedy)


def _secret(client: Client, name: str) -> Check:
    title, found = f"secret {name}", kube.find(client, Secret, name)
    if found is None:
        made = _kubectl(client.namespace, f"create secret generic {name} ...")
        remedy = f"{made}, as docs/cluster.md tells"
        return Check(title, False, "is not there", remedy)
    missing = sorted(set(SECRETS[name]) - set(found.data or {}))
    seen = f"has no {' and no '.join(missing)}" if missing else "is there"
    return Check(title, not missing, seen, "add what is missing, as docs/cluster.md tells")


def _deployment(client: Client, name: str) -> Check:
    found = kube.find(client, Deployment, name)
    if found is None:
        return Check(name, False, "is not there", INSTALL)
    ready = (found.status.readyReplicas if found.status else None) or 0
    wanted = (found.spec.replicas if found.spec else None) or 0
    seen = f"{ready} of {wanted} replicas are ready"
    if ready < wanted:
        remedy = _kubectl(client.namespace, f"logs deploy/{name}")
        return Check(name, False, f"{seen}{_why(client, name)}", remedy)
    return Check(name, True, seen)


def _why(client: Client, name: str) -> str:
    """What the first pod that waits says of itself."""
    pods = client.list(Pod, labels={"app.kubernetes.io/component": name})
    statuses = [s for pod in pods if pod.status for s in pod.status.containerStatuses or []]
    waiting = [s.state.waiting for s in statuses if s.state and s.state.waiting]
    told = [f": {one.reason} {one.message or ''}".rstrip() for one in waiting]
    return told[0] if told else ""


def _broker(client: Client) -> Check:
    found = kube.find(client, Broker, "default")
    if found is None:
        return Check("broker", False, "there is no Broker default", INSTALL)
    conditions = (found.get("status") or {}).get("conditions") or []
    [ready] = [c for c in conditions if c.get("type") == "Ready"] or [{}]
    if ready.get("status") == "True":
        return Check("broker", True, "takes events")
    seen = f"is not ready: {ready.get('message') or 'nobody looks after it'}"
    return Check("broker", False, seen, "kubectl -n knative-eventing get pods")


def _stores(settings: Settings) -> list[Check]:
    """What the settings name; a laptop names nothing, and cannot reach what only pods reach."""
    unset = f"is not set here; in a pod: {_kubectl(settings.namespace, IN_POD)}"
    looks = [
        ("state", settings.state_url, _state, f"PERENNIAL_STATE_URL {unset}"),
        ("artifacts", settings.artifacts, _artifacts, f"PERENNIAL_ARTIFACTS {unset}"),
        ("KFP", settings.launcher == "kfp", _kfp, f"PERENNIAL_LAUNCHER is {settings.launcher}"),
    ]
    return [
        _looked(title, partial(look, settings))
        if is_asked
        else Check(title, True, f"not asked: {why}")
        for title, is_asked, look, why in looks
    ]


def _state(settings: Settings) -> Check:
    from perennial.store.engine import make_engine, shown

    try:
        engine = make_engine(settings.state_url)
    except BadInput as exc:
        return Check("state", False, str(exc), "set PERENNIAL_STATE_URL to such a URL")
    except PerennialError as exc:
        remedy = "see that the database runs and the Job migrate ended, then PERENNIAL_STATE_URL"
        return Check("state", False, str(exc), remedy)
    engine.dispose()
    return Check("state", True, f"{shown(engine)} answers")


def _artifacts(settings: Settings) -> Check:
    from perennial.store.objects import Folder

    try:
        Folder(settings.artifacts).exists("doctor")
    except PerennialError as exc:
        remedy = "see that the store runs, then PERENNIAL_ARTIFACTS, AWS_ENDPOINT_URL and its keys"
        return Check("artifacts", False, str(exc), remedy)
    return Check("artifacts", True, f"{settings.artifacts} answers")


def _kfp(settings: Settings) -> Check:
    from perennial.retrain.backend import Backend

    try:
        version = Backend(settings).health.get("tag_name") or "a backend without a version"
    except PerennialError as exc:
        remedy = "see that KFP runs, then PERENNIAL_KFP_ENDPOINT; or choose PERENNIAL_LAUNCHER=job"
        return Check("KFP", False, str(exc), remedy)
    return Check("KFP", True, f"{version} answers; {argo.retries(settings)}")
