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
SERVE = "import http.server as h; h.test(h.SimpleHTTPRequestHandler, port=5432, bind='0.0.0.0')"
COMPONENT = "app.kubernetes.io/component"


def reaches(kubectl, space: str, source: str, address: str) -> bool:
    code = f"import socket; socket.create_connection(('{address}', 5432), 3)"
    done = kubectl.run("exec", "-n", space, source, "--", "python", "-c", code, check=False)
    assert done.returncode == 0 or "timed out" in done.stderr or "refused" in done.stderr
    return done.returncode == 0


def test_where_the_network_keeps_policies_only_listed_edges_connect(kubectl, space):
    wait = "import time; time.sleep(600)"
    pods = [
        plain("database", {COMPONENT: "dev-postgres"}, SERVE),
        plain("migrate", {COMPONENT: "migrate"}, wait),
        plain("stranger", {"app": "stranger"}, wait),
    ]
    policies = policy.kinds(manifests.rendered("demo"), "NetworkPolicy")
    kubectl.apply(placed([*policies, *pods], space))
    kubectl.run("wait", "-n", space, "--for=condition=Ready", "pod", "--all", "--timeout=120s")
    address = kubectl.get("pod", "database", "-n", space)["status"]["podIP"]
    limit = time.monotonic() + 30
    while not (listed := reaches(kubectl, space, "migrate", address)) and time.monotonic() < limit:
        time.sleep(1)

    unlisted = reaches(kubectl, space, "stranger", address)

    assert listed
    if unlisted:
        pytest.skip(NO_POLICIES)
