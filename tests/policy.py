"""Do manifests keep the rules: restricted pods, only rights that are used, only listed edges?

Each check returns its faults as sentences, and raises Nothing when it had nothing to look at.
"""

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

Doc = dict[str, Any]
Right = tuple[str, str, str]

VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim"}
VOLUMES |= {"projected", "secret"}
CRD, SERVED = "CustomResourceDefinition", "InferenceService"
LISTS = ("containers", "initContainers", "ephemeralContainers")
AUDIENCES = {"pipelines.kubeflow.org"}
# The kinds that need somebody's controller to be there: an overlay must not fail without it.
FOREIGN = {"ServiceMonitor", "PodMonitor", "PrometheusRule", "HTTPRoute", "Certificate"}


class Nothing(AssertionError):
    """A check that had nothing to look at proves nothing."""


def some(found: list[Any], what: str) -> list[Any]:
    if not found:
        raise Nothing(f"there is no {what} to check")
    return found


def kinds(docs: Iterable[Doc], *wanted: str) -> list[Doc]:
    return [doc for doc in docs if doc.get("kind") in wanted]


def name(doc: Doc) -> str:
    return f"{doc.get('kind')}/{doc.get('metadata', {}).get('name')}"


# Pods


@dataclass(frozen=True)
class Pod:
    """A pod template, wherever it stood."""

    where: str
    spec: Doc
    accounts: Mapping[str, bool]

    @property
    def containers(self) -> list[Doc]:
        return [one for key in LISTS for one in self.spec.get(key) or []]

    @property
    def account(self) -> str:
        return str(self.spec.get("serviceAccountName") or "default")

    @property
    def has_token(self) -> bool:
        own = self.spec.get("automountServiceAccountToken")
        return bool(self.accounts.get(self.account, True) if own is None else own)


def pods(docs: Iterable[Doc]) -> list[Pod]:
    """Every pod template, found by its list of containers and not by the kind around it."""
    docs = list(docs)
    accounts = {
        doc["metadata"]["name"]: doc.get("automountServiceAccountToken", True)
        for doc in kinds(docs, "ServiceAccount")
    }
    found = [Pod(where, spec, accounts) for doc in docs for where, spec in _specs(doc, name(doc))]
    return some(found, "pod template")


def _specs(value: Any, where: str) -> Iterator[tuple[str, Doc]]:
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _specs(item, f"{where}[{number}]")
    if not isinstance(value, dict) or value.get("kind") == CRD:
        return
    containers = value.get("containers")
    # KServe fills the one container of a model from its runtime.
    if isinstance(value.get("model"), dict) and "modelFormat" in value["model"]:
        containers = [{"name": "model", **value["model"]}, *(containers or [])]
    if isinstance(containers, list) and any(isinstance(one, dict) for one in containers):
        yield where, {**value, "containers": containers}
    for key, item in value.items():
        if key not in LISTS:
            yield from _specs(item, f"{where}.{key}")


def restricted(pod: Pod) -> list[str]:
    """What the Pod Security profile 'restricted' refuses, and what we refuse beyond it."""
    faults = _shared(pod) + _volumes(pod) + _identity(pod)
    for container in pod.containers:
        inside = f"{pod.where} {container.get('name')}"
        checks = (_powers, _user, _bounds, _image)
        faults += [f"{inside}: {fault}" for check in checks for fault in check(pod, container)]
    return faults


def _shared(pod: Pod) -> list[str]:
    shared = ("hostNetwork", "hostPID", "hostIPC", "hostUsers", "shareProcessNamespace")
    faults = [f"{key} is set" for key in shared if pod.spec.get(key)]
    faults += ["sysctls are set"] if _security(pod.spec).get("sysctls") else []
    return [f"{pod.where}: {fault}" for fault in faults]


def _volumes(pod: Pod) -> list[str]:
    faults = []
    for volume in pod.spec.get("volumes") or []:
        faults += [f"volume type {key}" for key in set(volume) - {"name"} - VOLUMES]
        sources = volume.get("projected", {}).get("sources", [])
        tokens = [
            source["serviceAccountToken"] for source in sources if "serviceAccountToken" in source
        ]
        faults += [
            "a token for the API server" for t in tokens if t.get("audience") not in AUDIENCES
        ]
        if "emptyDir" in volume and not (volume["emptyDir"] or {}).get("sizeLimit"):
            faults.append(f"emptyDir {volume['name']} has no size limit")
    return [f"{pod.where}: {fault}" for fault in faults]


def _identity(pod: Pod) -> list[str]:
    return [f"{pod.where}: runs as the default account"] if pod.account == "default" else []


def _powers(_pod: Pod, container: Doc) -> Iterator[str]:
    own = _security(container)
    if own.get("privileged"):
        yield "is privileged"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "may gain privileges"
    capabilities = own.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or []):
        yield "keeps capabilities"
    if capabilities.get("add"):
        yield f"adds capabilities {capabilities['add']}"
    if own.get("procMount", "Default") != "Default":
        yield "unmasks /proc"
    if any(port.get("hostPort") for port in container.get("ports") or []):
        yield "takes a port of the node"


def _user(pod: Pod, container: Doc) -> Iterator[str]:
    both = {**_security(pod.spec), **_security(container)}
    if both.get("runAsNonRoot") is not True:
        yield "may run as root"
    if both.get("runAsUser") == 0:
        yield "runs as root"
    if (both.get("seccompProfile") or {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "has no seccomp profile"
    if set(both.get("seLinuxOptions") or {}) & {"user", "role"}:
        yield "sets a SELinux user or role"
    if (both.get("windowsOptions") or {}).get("hostProcess"):
        yield "is a process of the host"
    if both.get("readOnlyRootFilesystem") is not True:
        yield "may write to its root"


def _bounds(_pod: Pod, container: Doc) -> Iterator[str]:
    resources = container.get("resources") or {}
    for kind in ("requests", "limits"):
        missing = {"cpu", "memory"} - set(resources.get(kind) or {})
        if missing:
            yield f"has no {' or '.join(sorted(missing))} in its {kind}"


def _image(_pod: Pod, container: Doc) -> Iterator[str]:
    image = str(container.get("image", ""))
    last = image.rsplit("/", 1)[-1]
    # A model of KServe takes the image of its runtime.
    if image and ("@" not in last and ":" not in last or last.endswith(":latest")):
        yield f"image {image} names no version"


def _security(value: Doc) -> Doc:
    return value.get("securityContext") or {}


def tokens(docs: Iterable[Doc]) -> set[str]:
    """Accounts whose token is mounted into some pod."""
    return {pod.account for pod in pods(docs) if pod.has_token}


def executors(docs: list[Doc]) -> list[str]:
    """Steps of a compiled pipeline: their pods are made by the backend, as its part here asks."""
    parts = [d["deploymentSpec"]["executors"] for d in docs if "deploymentSpec" in d]
    steps = {
        key: one["container"] for part in parts for key, one in part.items() if "container" in one
    }
    asked = [
        d["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        for d in docs
        if "platforms" in d
    ]
    platform = {key: one for part in asked for key, one in part.items()}
    some(list(steps), "step of a pipeline")
    return [f"{key}: {f}" for key, one in steps.items() for f in _step(one, platform.get(key, {}))]


def _step(container: Doc, platform: Doc) -> Iterator[str]:
    security = platform.get("securityContext") or {}
    if security.get("runAsNonRoot") is not True:
        yield "may run as root"
    if security.get("privileged") or security.get("runAsUser") in (0, "0"):
        yield "runs with power"
    labels = (platform.get("podMetadata") or {}).get("labels") or {}
    if labels.get("app.kubernetes.io/component") != "pipeline-run":
        yield "has no label that a NetworkPolicy could select"
    if not platform.get("activeDeadlineSeconds"):
        yield "has no deadline"
    if platform.get("hostPath") or platform.get("hostPathMount"):
        yield "volume type hostPath"
    if not container.get("resources"):
        yield "has no cpu or memory in its requests"
    yield from _image(Pod("", {}, {}), container)


# Workloads and what surrounds them


def workloads(docs: list[Doc]) -> list[str]:
    """Servers are probed, and Deployments survive a node: spread, a budget for disruptions."""
    selectors = [d["spec"]["selector"] for d in kinds(docs, "PodDisruptionBudget")]
    budgets = [selector.get("matchLabels", {}) for selector in selectors]
    found = some(kinds(docs, "Deployment", SERVED), f"Deployment or {SERVED}")
    return [
        f"{name(doc)}: {fault}"
        for doc in found
        for fault in (_served(doc) if doc["kind"] == SERVED else _workload(doc, budgets))
    ]


def _served(doc: Doc) -> Iterator[str]:
    """Knative takes probes of the container with the port only; a model's are its runtime's."""
    containers = doc["spec"]["predictor"].get("containers", [])
    doors = [container for container in containers if container.get("ports")]
    if containers and not doors:
        yield "has no port that could be probed"
    for container in doors:
        yield from _unprobed(container)
        path = container.get("readinessProbe", {}).get("httpGet", {}).get("path", "")
        if not re.fullmatch(r"/v2/models/[^/]+/ready", path):
            yield f"{container['name']} is ready without its model: it is probed at {path or '?'}"


def _unprobed(container: Doc) -> Iterator[str]:
    missing = {"startupProbe", "livenessProbe", "readinessProbe"} - set(container)
    yield from (f"{container['name']} has no {probe}" for probe in sorted(missing))


def _workload(doc: Doc, budgets: list[Doc]) -> Iterator[str]:
    template = doc["spec"]["template"]
    for container in template["spec"]["containers"]:
        yield from _unprobed(container)
    if doc["metadata"]["name"].startswith("dev-"):
        return
    keys = {one["topologyKey"] for one in template["spec"].get("topologySpreadConstraints", [])}
    if keys < {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}:
        yield "is not spread over nodes and zones"
    if not any(_has(template["metadata"]["labels"], budget) for budget in budgets):
        yield "has no disruption budget"


def _has(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    return bool(wanted) and wanted.items() <= labels.items()


def tenant(docs: list[Doc]) -> list[str]:
    """One namespace, closed and bounded; nothing that reaches beyond it."""
    spaces = some(kinds(docs, "Namespace"), "Namespace")
    faults = [f"there are {len(spaces)} namespaces"] if len(spaces) > 1 else []
    for mode in ("enforce", "audit", "warn"):
        key = f"pod-security.kubernetes.io/{mode}"
        if spaces[0]["metadata"].get("labels", {}).get(key) != "restricted":
            faults.append(f"the namespace does not {mode} 'restricted'")
    faults += [f"there is no {k}" for k in ("ResourceQuota", "LimitRange") if not kinds(docs, k)]
    faults += [f"{name(d)} wants a controller that may be missing" for d in kinds(docs, *FOREIGN)]
    faults += [f"{name(d)} has nothing to serve yet" for d in kinds(docs, "ModelRollout")]
    for doc in docs:
        faults += [f"{name(doc)}: {fault}" for fault in _placed(doc, spaces[0]["metadata"]["name"])]
    return faults


def _placed(doc: Doc, space: str) -> Iterator[str]:
    whole = doc["kind"] in ("Namespace", CRD)
    if not whole and doc["metadata"].get("namespace") != space:
        yield "is outside of the namespace"
    if doc["kind"] == "Service" and doc["spec"].get("type", "ClusterIP") != "ClusterIP":
        yield "opens a port of the node"
    if doc["kind"] == "Service" and doc["spec"].get("externalIPs"):
        yield "takes an address from outside"
    if doc["kind"] == "Trigger" and "retry" not in doc["spec"].get("delivery", {}):
        yield "is not retried"


def secrets(docs: list[Doc], *, demo: bool) -> list[str]:
    """Secrets stand in a demo only, and say so."""
    found = kinds(docs, "Secret")
    if not demo:
        return [f"{name(doc)} stands in the manifests" for doc in found]
    marks = [(doc, doc["metadata"].get("annotations") or {}) for doc in some(found, "Secret")]
    return [
        f"{name(d)} is not marked" for d, m in marks if m.get("perennial.dev/demo-only") != "true"
    ]


# Rights


def rights(docs: list[Doc]) -> dict[str, set[Right]]:
    """What each account of the namespace may do: ``(group/resource[/name], verb)`` of its Roles."""
    roles = {doc["metadata"]["name"]: doc.get("rules") or [] for doc in kinds(docs, "Role")}
    found: dict[str, set[Right]] = {}
    for binding in some(kinds(docs, "RoleBinding"), "RoleBinding"):
        given = {
            right for rule in roles.get(binding["roleRef"]["name"], []) for right in granted(rule)
        }
        for subject in binding.get("subjects") or []:
            found.setdefault(subject["name"], set()).update(given)
    return found


def granted(rule: Doc) -> Iterator[Right]:
    """Each single right of one rule."""
    for group in rule.get("apiGroups", []):
        for resource in rule.get("resources", []):
            for verb in rule.get("verbs", []):
                for one in rule.get("resourceNames") or [""]:
                    yield group, f"{resource}={one}" if one else resource, verb


def grants(docs: list[Doc], table: Mapping[str, set[Right]]) -> list[str]:
    """Rights are the table, neither more nor less, and come by no other way."""
    found = rights(docs)
    faults = [
        f"{name(d)} reaches every namespace"
        for d in kinds(docs, "ClusterRole", "ClusterRoleBinding")
    ]
    for who in sorted(set(found) | set(table)):
        more = found.get(who, set()) - table.get(who, set())
        less = table.get(who, set()) - found.get(who, set())
        faults += [f"{who} may {verb} {group}/{what}" for group, what, verb in sorted(more)]
        faults += [f"{who} may not {verb} {group}/{what}" for group, what, verb in sorted(less)]
    return faults + [
        f"{name(b)}: {f}" for b in kinds(docs, "RoleBinding") for f in _binding(b, docs)
    ]


def _binding(binding: Doc, docs: list[Doc]) -> Iterator[str]:
    roles = {doc["metadata"]["name"] for doc in kinds(docs, "Role")}
    accounts = {doc["metadata"]["name"] for doc in kinds(docs, "ServiceAccount")}
    if binding["roleRef"]["kind"] != "Role" or binding["roleRef"]["name"] not in roles:
        yield f"binds {binding['roleRef']['kind']} {binding['roleRef']['name']}"
    for subject in binding.get("subjects") or []:
        ours = subject["kind"] == "ServiceAccount" and subject["name"] in accounts
        if not ours or subject.get("namespace") != binding["metadata"].get("namespace"):
            yield f"names a stranger, {subject['kind']} {subject['name']}"


# Edges


@dataclass(frozen=True)
class Peer:
    """Somebody on the network: a pod of a namespace, or with no namespace a mere address."""

    name: str
    namespace: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    ports: tuple[int, ...] = ()
    address: str = "10.244.1.7"


Edge = tuple[str, str, int]


def edges(docs: list[Doc], peers: Iterable[Peer]) -> set[Edge]:
    """Every connection from or to the namespace of the policies that they let through."""
    policies = some(kinds(docs, "NetworkPolicy"), "NetworkPolicy")
    space = policies[0]["metadata"]["namespace"]
    everybody = list(peers)
    return {
        (source.name, target.name, port)
        for source in everybody
        for target in everybody
        if source != target and space in (source.namespace, target.namespace)
        for port in target.ports
        if _open(policies, "Egress", source, target, port)
        and _open(policies, "Ingress", target, source, port)
    }


def _open(policies: list[Doc], way: str, at: Peer, other: Peer, port: int) -> bool:
    """May ``at`` talk to or hear from ``other``? A pod that no policy selects may."""
    mine = [p["spec"] for p in policies if _governs(p, way, at)]
    peers, rules = ("to", "egress") if way == "Egress" else ("from", "ingress")
    return not mine or any(
        _rule_opens(rule, peers, at, other, port) for spec in mine for rule in spec.get(rules) or []
    )


def _governs(policy: Doc, way: str, at: Peer) -> bool:
    here = at.namespace and policy["metadata"].get("namespace") == at.namespace
    # Without policyTypes, Ingress is meant, and Egress where there are rules for it.
    types = policy["spec"].get("policyTypes") or [
        "Ingress",
        *(["Egress"] if "egress" in policy["spec"] else []),
    ]
    return (
        bool(here) and way in types and selects(policy["spec"].get("podSelector") or {}, at.labels)
    )


def _rule_opens(rule: Doc, key: str, at: Peer, other: Peer, port: int) -> bool:
    ports, peers = rule.get("ports"), rule.get(key)
    fits = not ports or any(_port(one, port) for one in ports)
    return fits and (not peers or any(_peer(one, at, other) for one in peers))


def _port(one: Doc, port: int) -> bool:
    if "port" not in one:
        return True
    if not isinstance(one["port"], int):
        raise TypeError(f"port {one['port']!r} is a name; policies here tell numbers")
    return one["port"] <= port <= one.get("endPort", one["port"])


def _peer(one: Doc, at: Peer, other: Peer) -> bool:
    if "ipBlock" in one:
        return _inside(other.address, one["ipBlock"])
    if "namespaceSelector" in one:
        space = {"kubernetes.io/metadata.name": other.namespace} if other.namespace else None
        near = space is not None and selects(one["namespaceSelector"] or {}, space)
    else:
        near = bool(other.namespace) and other.namespace == at.namespace
    return near and selects(one.get("podSelector") or {}, other.labels)


def _inside(address: str, block: Doc) -> bool:
    # Whether a block holds for pods too differs between networks: here it does, the worse case.
    one = ipaddress.ip_address(address)
    holes = [ipaddress.ip_network(hole) for hole in block.get("except") or []]
    return one in ipaddress.ip_network(block["cidr"]) and not any(one in hole for hole in holes)


def selects(selector: Doc, labels: Mapping[str, str]) -> bool:
    """Does a label selector mean somebody with these labels? The empty one means everybody."""
    wanted = selector.get("matchLabels") or {}
    return wanted.items() <= labels.items() and all(
        _expression(one, labels) for one in selector.get("matchExpressions") or []
    )


def _expression(one: Doc, labels: Mapping[str, str]) -> bool:
    value = labels.get(one["key"])
    return {
        "Exists": value is not None,
        "DoesNotExist": value is None,
        "In": value in one.get("values", []),
        "NotIn": value not in one.get("values", []),
    }[one["operator"]]


# Buckets


def buckets(policy: Doc, bucket: str, tenant: str) -> list[str]:
    """A tenant's rights on its bucket: its own prefix, to read, write and list, by TLS only."""
    statements = some(policy.get("Statement") or [], "statement of a bucket policy")
    allows = [one for one in statements if one.get("Effect") == "Allow"]
    faults = [
        f"{one.get('Sid')}: {fault}" for one in allows for fault in _allow(one, bucket, tenant)
    ]
    return (
        faults if any(map(_tls, statements)) else [*faults, "requests without TLS are not refused"]
    )


def _allow(one: Doc, bucket: str, tenant: str) -> Iterator[str]:
    wanted = {"s3:GetObject", "s3:PutObject", "s3:ListBucket"}
    yield from (f"allows {action}" for action in sorted(set(_list(one.get("Action"))) - wanted))
    yield from (f"has {key}" for key in ("NotAction", "NotResource", "NotPrincipal") if key in one)
    if "*" in str(one.get("Principal", "*")):
        yield "is for everybody"
    listing = "s3:ListBucket" in _list(one.get("Action"))
    arn = f"arn:aws:s3:::{bucket}"
    for resource in _list(one.get("Resource")):
        below = f"{arn}/{tenant}/"
        if not (resource == arn if listing else resource.startswith(below)):
            yield f"reaches {resource}"
    prefixes = _list(one.get("Condition", {}).get("StringLike", {}).get("s3:prefix"))
    if listing and prefixes != [f"{tenant}/*"]:
        yield "lists what is not the tenant's"


def may(
    policy: Doc, who: str, action: str, key: str, *, bucket: str = "perennial", tls: bool = True
) -> bool:
    """Does a bucket policy let a user do this to an object, or list below this prefix?

    As S3 decides: nothing is allowed that no statement allows, and a Deny has the last word.
    """
    arn = f"arn:aws:s3:::{bucket}"
    resource = arn if action == "s3:ListBucket" else f"{arn}/{key}"
    facts = {"s3:prefix": key, "aws:SecureTransport": str(tls).lower()}
    meant = [
        one["Effect"]
        for one in some(policy.get("Statement") or [], "statement of a bucket policy")
        if _is_for(one["Principal"], who)
        and _matches(one["Action"], action)
        and _matches(one["Resource"], resource)
        and _holds(one.get("Condition", {}), facts)
    ]
    return "Allow" in meant and "Deny" not in meant


def _is_for(principal: Any, who: str) -> bool:
    if principal == "*":
        return True
    return any(str(arn).rpartition("/")[2] == who for arn in _list(principal["AWS"]))


def _matches(patterns: Any, value: str) -> bool:
    return any(fnmatchcase(value, pattern) for pattern in _list(patterns))


def _holds(condition: Doc, facts: dict[str, str]) -> bool:
    unknown = set(condition) - {"StringLike", "Bool"}
    if unknown:
        raise TypeError(f"conditions {unknown} are not understood here")
    return all(
        _matches(wanted, facts[key]) for test in condition.values() for key, wanted in test.items()
    )


def _tls(one: Doc) -> bool:
    refused = one.get("Effect") == "Deny" and one.get("Principal") == "*"
    insecure = one.get("Condition", {}).get("Bool", {}).get("aws:SecureTransport") == "false"
    return refused and insecure and _list(one.get("Action")) == ["s3:*"]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
