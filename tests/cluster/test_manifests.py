"""What a real API server says of manifests and rights, and what one tenant sees of another."""

import copy
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from perennial.store import tenant
from tests import manifests, policy

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
DRY = ("--dry-run=server", "--validate=strict")
SERVERS = sorted(ROOT.glob("kserve/*/*.yaml"))
REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews"
ACCOUNTS = ("operator", "retraining", "pipeline-run", "serving", "edge", "migrate")


def placed(documents: list[policy.Doc], space: str) -> list[policy.Doc]:
    """The same for another namespace, without what is not of a namespace."""
    found = [copy.deepcopy(d) for d in documents if d["kind"] not in ("Namespace", policy.CRD)]
    for document in found:
        document["metadata"]["namespace"] = space
    for binding in policy.kinds(found, "RoleBinding"):
        for subject in binding["subjects"]:
            subject["namespace"] = space
    return found


@pytest.fixture(scope="module")
def empty(spaces: Callable[[str], str]) -> str:
    """A namespace in which nothing is ever made."""
    return spaces("dry")


@pytest.mark.parametrize("overlay", manifests.OVERLAYS)
def test_the_api_server_takes_every_object_of_an_overlay_without_a_warning(kubectl, empty, overlay):
    documents = manifests.rendered(overlay)
    text = yaml.safe_dump_all(placed(documents, empty))

    done = kubectl.run("create", *DRY, "-f", "-", text=text)

    taken = done.stdout.splitlines()
    kinds = {line.partition("/")[0].partition(".")[0] for line in taken}
    assert done.stderr == ""
    assert len(taken) == len(documents) - 2
    assert {"deployment", "job", "networkpolicy", "broker", "trigger", "eventtype"} <= kinds


@pytest.mark.parametrize("kind", ["Namespace", policy.CRD])
def test_the_api_server_takes_what_is_not_of_a_namespace(kubectl, kind):
    documents = policy.kinds(manifests.rendered("demo"), kind)
    assert len(documents) == 1

    done = kubectl.run(
        "apply",
        *DRY,
        "--server-side",
        "--force-conflicts",
        "-f",
        "-",
        text=yaml.safe_dump_all(documents),
    )

    assert "serverside-applied (server dry run)" in done.stdout


@pytest.mark.parametrize("path", SERVERS, ids=lambda p: p.relative_to(ROOT / "kserve").as_posix())
def test_kserve_takes_each_server(kubectl, empty, path):
    documents = [d for d in yaml.safe_load_all(path.read_text()) if d]

    done = kubectl.run("create", "-n", empty, *DRY, "-f", str(path))

    assert done.stdout.count("created (server dry run)") == len(documents) > 0


def deployment(changes: dict[str, Any]) -> policy.Doc:
    [found] = [d for d in manifests.rendered("demo") if policy.name(d) == "Deployment/operator"]
    return {**copy.deepcopy(found), "spec": {**found["spec"], **changes}}


def server(changes: dict[str, Any]) -> policy.Doc:
    found = copy.deepcopy(manifests.templates()[0])
    found["spec"]["predictor"].update(changes)
    return dict(found)


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        pytest.param(deployment({"replica": 3}), 'unknown field "spec.replica"', id="a typo"),
        pytest.param(
            server({"canaryTrafficPercen": 10}),
            'unknown field "spec.predictor.canaryTrafficPercen"',
            id="a typo in KServe's kind",
        ),
        pytest.param(
            server({"minReplicas": 3, "maxReplicas": 1}), "denied the request", id="a webhook's no"
        ),
    ],
)
def test_the_api_server_refuses(kubectl, empty, document, sentence):
    text = yaml.safe_dump_all(placed([document], empty))

    done = kubectl.run("create", *DRY, "-f", "-", text=text, check=False)

    assert done.returncode != 0
    assert sentence in done.stderr


def pod(template: policy.Doc, **changes: Any) -> policy.Doc:
    spec = copy.deepcopy(template["spec"]["template"]["spec"])
    spec.pop("serviceAccountName")
    spec["containers"][0]["securityContext"].update(changes)
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec}


@pytest.mark.parametrize(
    "changes",
    [
        {"allowPrivilegeEscalation": True},
        {"runAsNonRoot": False},
        {"capabilities": {"add": ["NET_ADMIN"]}},
    ],
    ids=["more privileges", "root", "a capability"],
)
def test_the_namespace_refuses_a_pod_that_is_not_restricted(kubectl, empty, changes):
    template = deployment({})

    good = kubectl.run("create", *DRY, "-f", "-", text=made(pod(template), empty))
    bad = kubectl.run(
        "create", *DRY, "-f", "-", text=made(pod(template, **changes), empty), check=False
    )

    assert "pod/p created" in good.stdout
    assert 'violates PodSecurity "restricted' in bad.stderr


def made(document: policy.Doc, space: str) -> str:
    return yaml.safe_dump_all(placed([document], space))


class Identity:
    """kubectl with the token of one account and nothing else."""

    def __init__(self, kubectl, folder: Path, space: str, account: str) -> None:
        token = kubectl.run("create", "token", account, "-n", space, "--duration=15m").stdout
        found = json.loads(
            kubectl.run("config", "view", "--raw", "--minify", "--flatten", "-o", "json").stdout
        )
        found["users"] = [{"name": found["users"][0]["name"], "user": {"token": token.strip()}}]
        self._path = folder / f"{space}-{account}"
        self._path.write_text(json.dumps(found))
        self._program = kubectl.program

    def run(self, *args: str, text: str = "") -> subprocess.CompletedProcess[str]:
        command = [self._program, "--kubeconfig", str(self._path), *args]
        return subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=60, check=False
        )

    def rights(self, space: str) -> set[policy.Right]:
        """What the API server says that this account may do there, beyond what everybody may."""
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectRulesReview",
            "spec": {"namespace": space},
        }
        done = self.run("create", "--raw", REVIEWS, "-f", "-", text=json.dumps(review))
        assert done.returncode == 0, done.stderr
        rules = json.loads(done.stdout)["status"]["resourceRules"]
        return {right for rule in rules for right in policy.granted(rule)}


@pytest.fixture(scope="module")
def tenants(kubectl, crd, spaces, tmp_path_factory) -> Callable[[int, str], Identity]:
    """Two tenants with the identities and objects of the demo, without its pods."""
    still = ("ServiceAccount", "Role", "RoleBinding", "ConfigMap", "Secret", "NetworkPolicy")
    documents = policy.kinds(manifests.rendered("demo"), *still)
    two = [spaces("tenant") for _ in range(2)]
    for space in two:
        kubectl.apply(placed(documents, space))
    folder = tmp_path_factory.mktemp("identities")
    made: dict[tuple[int, str], Identity] = {}

    def identity(number: int, account: str) -> Identity:
        key = number, account
        made[key] = made.get(key) or Identity(kubectl, folder, two[number], account)
        return made[key]

    identity.spaces = two
    return identity


@pytest.mark.parametrize("account", ACCOUNTS)
def test_the_api_server_grants_an_account_its_line_of_the_table_and_nothing_elsewhere(
    tenants, account
):
    here, there = tenants.spaces
    everybody = tenants(0, "default").rights(here)

    own = tenants(0, account).rights(here) - everybody
    elsewhere = tenants(0, account).rights(there) - everybody

    assert own == manifests.RIGHTS["demo"].get(account, set())
    assert elsewhere == set()


THINGS = (
    "secrets",
    "configmaps",
    "pods",
    "jobs.batch",
    "inferenceservices.serving.kserve.io",
    "revisions.serving.knative.dev",
    "brokers.eventing.knative.dev",
    "modelrollouts.perennial.dev",
)


@pytest.mark.parametrize("account", ["operator", "retraining"])
def test_the_token_of_one_tenant_reads_nothing_of_another(tenants, account):
    thief, there = tenants(0, account), tenants.spaces[1]

    tries = [thief.run("get", thing, "-n", there, "-o", "name") for thing in THINGS]
    tries += [thief.run("get", "secret", "state", "-n", there, "-o", "yaml")]
    tries += [thief.run("get", "pods", "--all-namespaces"), thief.run("get", "nodes")]
    tries += [thief.run("create", "token", "operator", "-n", there)]
    tries += [thief.run("get", "pods", "-n", there, "--as=system:admin")]
    own = thief.run("get", "pods", "-n", tenants.spaces[0])

    assert [t.args for t in tries if t.returncode == 0 or "orbidden" not in t.stderr] == []
    assert [t.stdout for t in tries if t.stdout] == []
    assert own.returncode == 0


def test_the_token_of_a_tenant_does_not_even_read_its_own_secrets(tenants):
    done = tenants(0, "operator").run("get", "secret", "state", "-n", tenants.spaces[0])

    assert "orbidden" in done.stderr


@pytest.fixture
def two_roles() -> Iterator[tuple[str, str]]:
    """URLs of two tenants of one PostgreSQL."""
    admin = os.environ.get("PERENNIAL_TEST_POSTGRES") or pytest.skip(
        "no PostgreSQL: set PERENNIAL_TEST_POSTGRES"
    )
    names = [f"h{os.getpid()}_{number}" for number in range(2)]
    for name in names:
        tenant.make(admin, name, f"word-{name}")
    urls = [tenant.state_url(admin, name, f"word-{name}") for name in names]
    yield tuple(url.replace("+psycopg", "") for url in urls)
    with psycopg.connect(admin) as connection:
        for name in names:
            connection.execute(f"DROP OWNED BY {name}")
            connection.execute(f"DROP ROLE {name}")


def test_the_role_of_one_tenant_reads_nothing_of_another(two_roles):
    first, second = two_roles
    with psycopg.connect(first) as mine:
        schema = mine.execute("SELECT current_schema()").fetchone()[0]
        mine.execute("CREATE TABLE secret AS SELECT 42 AS answer")
    tries = [
        f"SELECT * FROM {schema}.secret",
        f"INSERT INTO {schema}.secret VALUES (1)",
        f"CREATE TABLE {schema}.mine (x int)",
        f"SET ROLE {schema}",
        f"GRANT USAGE ON SCHEMA {schema} TO current_user",
        "CREATE TABLE public.mine (x int)",
        "CREATE SCHEMA mine",
        "SELECT * FROM pg_authid",
        "COPY (SELECT 1) TO '/tmp/x'",
    ]

    assert [said for said in (refused(second, sql) for sql in tries) if said is None] == []
    with psycopg.connect(first) as mine:
        assert mine.execute("SELECT answer FROM secret").fetchall() == [(42,)]


def refused(url: str, sql: str) -> str | None:
    """Why the database refuses; None when it does not."""
    try:
        with psycopg.connect(url) as connection:
            connection.execute(sql)
    except psycopg.errors.InsufficientPrivilege as exc:
        return str(exc)
    return None


def plain(name: str, labels: dict[str, str], code: str) -> policy.Doc:
    """A pod that runs one line of Python and may do nothing else."""
    [found] = [d for d in manifests.rendered("demo") if policy.name(d) == "Deployment/dev-s3"]
    spec = copy.deepcopy(found["spec"]["template"]["spec"])
    box = spec["containers"][0]
    kept = {key: box[key] for key in ("image", "securityContext", "resources")}
    spec["containers"] = [{**kept, "name": "one", "command": ["python", "-c", code]}]
    spec |= {"volumes": [], "restartPolicy": "Never", "terminationGracePeriodSeconds": 1}
    del spec["serviceAccountName"]
    meta = {"name": name, "labels": labels}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}


NO_POLICIES = "this cluster's network keeps no NetworkPolicies"
KEPT_S = 30  # by when a network that keeps policies keeps a new one
PORTS = (5432, 8080, 8081, 8082, 9000)
COMPONENT = "app.kubernetes.io/component"
OURS = (
    "operator",
    "retraining",
    "pipeline-run",
    "migrate",
    "edge",
    "dev-postgres",
    "dev-redis",
    "dev-s3",
)
SERVE = f"""
import socketserver, threading
for port in {PORTS}:
    server = socketserver.ThreadingTCPServer(("", port), socketserver.BaseRequestHandler)
    threading.Thread(target=server.serve_forever).start()
"""
ASK = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor
def is_open(place):
    try:
        socket.create_connection(place[1:], 2).close()
    except OSError:
        return False
    return True
places = json.loads(sys.argv[1])
with ThreadPoolExecutor(len(places)) as pool:
    found = list(pool.map(is_open, places))
print(json.dumps([place for place, is_found in zip(places, found) if is_found]))
"""
DENY = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


def stands(kubectl, space: str, peers: list[policy.Peer]) -> dict[str, str]:
    """A pod for each peer, which listens on all ports; gives their addresses."""
    pods = [plain(peer.name, dict(peer.labels), SERVE) for peer in peers]
    kubectl.apply(placed(pods, space))
    kubectl.run("wait", "-n", space, "--for=condition=Ready", "pod", "--all", "--timeout=180s")
    items = kubectl.get("pods", "-n", space)["items"]
    return {item["metadata"]["name"]: item["status"]["podIP"] for item in items}


def reached(kubectl, space: str, addresses: dict[str, str]) -> set[policy.Edge]:
    """Every port of another pod to which a pod gets a connection."""
    found: set[policy.Edge] = set()
    for source in addresses:
        others = [(n, address) for n, address in addresses.items() if n != source]
        places = json.dumps([(*other, port) for other in others for port in PORTS])
        command = ("exec", "-n", space, source, "--", "python", "-c", ASK, places)
        told = json.loads(kubectl.run(*command).stdout)
        found |= {(source, target, port) for target, _, port in told}
    return found


def becomes(kubectl, space: str, addresses: dict[str, str], wanted: set[policy.Edge]) -> Any:
    """What is reached when it is what is wanted, or when the network had its time."""
    limit = time.monotonic() + KEPT_S
    while (found := reached(kubectl, space, addresses)) != wanted and time.monotonic() < limit:
        time.sleep(1)
    return found


def keeps_policies(kubectl, space: str) -> bool:
    """Does the network keep the simplest policy of all, with nothing of ours in it?"""
    peers = [policy.Peer(name, space, {"app": name}) for name in ("one", "other")]
    addresses = stands(kubectl, space, peers)
    everything = {(a, b, port) for a in addresses for b in addresses if a != b for port in PORTS}
    assert becomes(kubectl, space, addresses, everything) == everything
    meta = {"name": "deny-all", "namespace": space}
    document = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": meta}
    kubectl.apply([{**document, "spec": DENY}])
    return not becomes(kubectl, space, addresses, set())


def test_where_the_network_keeps_policies_the_listed_edges_connect_and_no_other(
    kubectl, space, spaces
):
    if not keeps_policies(kubectl, spaces("deny")):
        pytest.skip(NO_POLICIES)
    documents = manifests.rendered("demo-standard")
    policies = policy.kinds(documents, "NetworkPolicy")
    there = policies[0]["metadata"]["namespace"]
    peers = [policy.Peer(name, there, {COMPONENT: name}, PORTS) for name in OURS]
    peers.append(policy.Peer("stranger", there, {"app": "stranger"}, PORTS))
    wanted = policy.edges(policies, peers)
    assert {("edge", "operator", 8081), ("migrate", "dev-postgres", 5432)} <= wanted

    kubectl.apply(placed(policies, space))
    addresses = stands(kubectl, space, peers)

    assert becomes(kubectl, space, addresses, wanted) == wanted
