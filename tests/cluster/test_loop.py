"""The whole loop on a cluster, as a user installs and runs it: an overlay, pods, real traffic."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import brokers
import httpx
import pytest
import retraining
from conftest import Kubectl
from tenant import ROOT, Tenant, install, shares, until

from perennial import cli, contract, project
from perennial.data import history, sources

pytestmark = pytest.mark.cluster

ENDED = ("Promoted", "RolledBack", "Refused", "Superseded")
# Of the retraining service in rollouts, in each mode; 'make test-full' asks for ten.
KILLS = int(os.environ.get("PERENNIAL_TEST_KILLS", "4")) // 2
PROJECT = "projects/retail.yaml"
TRAINED = "2011-06-06"
# By then newcomers have been asked about for so long that their labels are known.
DECIDED = "2011-09-27"
LATER = "2011-10-03"
# Longer than a run and a rollout take; its namespace is deleted before.
FLOOD_S = 900
BAD = """
import json, sys
from pathlib import Path
import numpy as np, xgboost
from perennial import bundle
from perennial.settings import Settings
from perennial.store.engine import make_engine
from perennial.store import rollouts, versions
from perennial.store.objects import Folder

state = Settings.load().state("retail")
engine = make_engine(state.url)
good = bundle.parts(bundle.near(state, rollouts.serving(engine, "retail").digest))
kinds = ["c" if f["type"] == "category" else "q" for f in good.contract["features"]]
data = xgboost.DMatrix(good.golden, label=np.full(len(good.golden), 5.0), feature_types=kinds,
                       feature_names=[f["name"] for f in good.contract["features"]],
                       enable_categorical=True, nthread=1)
model = xgboost.train({"objective": "reg:squarederror", "nthread": 1}, data, 30)
found = bundle.files(model, json.dumps(good.contract), good.project, good.lineage, good.golden,
                     good.reference)
folder = Path("/home/perennial/bad")
digest = bundle.close(folder, found)
Folder(state.artifacts("bundles")).keep(folder, bundle.name_of(digest))
made = versions.next_version(engine, "retail", digest, "planted", good.lineage.as_of)
print(made.number, digest)
"""


@pytest.fixture(scope="module", params=["demo", "demo-standard"])
def retail(
    request: pytest.FixtureRequest, kubectl: Kubectl, spaces, tmp_path_factory
) -> Iterator[Tenant]:
    """The demo, in Knative and in Standard mode, installed and with its first model serving."""
    space, folder = spaces("loop"), tmp_path_factory.mktemp("overlay")
    tenant = install(kubectl, request.param, space, folder)
    told = tenant.perennial("runs", "submit", PROJECT, "--as-of", TRAINED)
    assert "succeeded" in told
    until(tenant, "the first model serves", lambda: tenant.phase("retail-v1") == "Promoted")
    until(tenant, "clients are answered", lambda: answers(tenant))
    yield tenant
    kubectl.run("delete", "namespace", space, "--wait=false")


def answers(tenant: Tenant) -> bool:
    """Is the model ready, as a client is told?"""
    url, host = tenant.door
    with httpx.Client(trust_env=False, timeout=5, headers={"host": host}) as client:
        try:
            return client.get(f"{url}/v2/models/retail/ready").status_code == 200
        except httpx.HTTPError:
            return False


def send(tenant: Tenant, since: str, stop: str, rows: int) -> None:
    """Let the project's own history be asked about, as clients would."""
    url, host = tenant.door
    where = ["--to", url, "--host", host]
    when = ["--from", since, "--until", stop, "--rows", str(rows)]
    assert cli.main(["replay", str(ROOT / "examples" / "retail"), *where, *when]) == 0


def one_row() -> bytes:
    """A request about one customer, at a moment after all that was sent otherwise."""
    found = project.load(ROOT / "examples" / "retail")
    since = project.parse_moment(LATER)
    rows = history.examples(found, sources.read(found, None, ROOT), since, None).iloc[:1]
    asked = contract.learn(found.features, rows)
    return json.dumps(asked.to_request(rows, "one", since)).encode()


class Clients:
    """Asks about one golden row again and again, and remembers who answered and when."""

    def __init__(self, tenant: Tenant) -> None:
        self._tenant = tenant
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self.answers: list[tuple[float, int, str]] = []
        self._body = one_row()

    def __enter__(self) -> "Clients":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def since(self, moment: float) -> list[str]:
        return [revision for at, _, revision in self.answers if at >= moment]

    @property
    def failed(self) -> list[int]:
        return [status for _, status, _ in self.answers if status != 200]

    def _loop(self) -> None:
        url, host = self._tenant.door
        headers = {"host": host, "content-type": "application/json"}
        with httpx.Client(trust_env=False, timeout=30, headers=headers) as client:
            while not self._over.is_set():
                begun = time.monotonic()
                found = client.post(f"{url}/v2/models/retail/infer", content=self._body)
                told = found.json().get("parameters", {}) if found.status_code == 200 else {}
                self.answers.append((begun, found.status_code, told.get("revision", "")))
                time.sleep(0.01)


def strangers(answers: list[tuple[float, int, str]], since: float) -> list[str]:
    """Answers of others than v2: when, with which status, and of whom."""
    return [f"+{at - since:.2f} s: {status} {who}" for at, status, who in answers if who != "v2"]


def serve_a_year(tenant: Tenant, folder: Path) -> None:
    """A year of requests, in which customers change: by a notebook, or by the command."""
    if tenant.overlay != "demo":
        send(tenant, TRAINED, DECIDED, rows=100)
        return
    run = [sys.executable, "-m", "tests.notebooks", "run", "03", str(folder)]
    env = {**os.environ, **tenant.surroundings, "PERENNIAL_HOME": str(folder / "state")}
    done = subprocess.run(
        run, env=env, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def kill_in_the_first_run(tenant: Tenant) -> None:
    until(tenant, "a drift event is worth a run", lambda: len(tenant.entries("run.started")) > 1)
    tenant.kill("retraining")


@pytest.fixture(scope="module")
def promoted(retail: Tenant, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The ledger after drift was seen, a run made a better model and a canary was judged.

    Meanwhile the retraining service is killed in the run, and the operator in the canary.
    """
    with ThreadPoolExecutor(3) as pool:
        year = pool.submit(serve_a_year, retail, tmp_path_factory.mktemp("year"))
        killed = pool.submit(kill_in_the_first_run, retail)
        until(retail, "a run for the drift", lambda: len(retail.entries("run.finished")) > 1)
        until(retail, "a canary", lambda: retail.phase("retail-v2") == "Canary")
        retail.kill("operator")
        if retail.overlay == "demo":
            # It sends as long as there is a rollout, and fails with a failed request.
            until(retail, "v2 is promoted", lambda: retail.phase("retail-v2") == "Promoted")
        year.result()
        killed.result()
    with Clients(retail) as clients:
        until(retail, "v2 is promoted", lambda: retail.phase("retail-v2") == "Promoted")
        time.sleep(5)
        assert shares(clients.since(time.monotonic() - 2)).keys() == {"v2"}
    assert clients.failed == []
    until(retail, "the service is back", retail.entries)
    return retail.entries()


def test_shifted_traffic_becomes_a_promoted_model_by_way_of_a_real_broker(promoted: list[dict]):
    kinds = [e["kind"] for e in promoted]
    wanted = ["event.received", "decision", "run.started", "gate", "registered", "rollout.wished"]

    drifts = [e for e in promoted if e["kind"] == "decision" and e["body"]["action"] == "retrain"]
    assert len(drifts) == 1
    after = kinds[kinds.index("promoted", kinds.index("served")) :]
    assert after[0] == "promoted"
    assert set(wanted) <= set(kinds)
    run = next(e for e in promoted if e["body"].get("trigger") == drifts[0]["subject"])
    assert run["subject"].startswith("retail-"), "a Job's name is the run's"
    assert kinds.count("run.started") == kinds.count("run.finished") == 2
    assert len([e for e in promoted if e["kind"] == "rollout.wished"]) == 2


def test_the_canary_took_its_steps_in_order_and_on_evidence(promoted: list[dict]):
    steps = [e["body"] for e in promoted if e["kind"] == "rollout.step"]

    assert [s["weight"] for s in steps] == [10, 50, 100]
    assert {s["verdict"] for s in steps} == {"advance"}
    assert all(s["canary_requests"] >= 20 for s in steps)


def test_why_tells_the_same_story_as_on_one_machine_with_names_of_this_platform(
    retail: Tenant, promoted: list[dict]
):
    told = retail.perennial("why", PROJECT, "--verbose")

    run = [e["subject"] for e in promoted if e["kind"] == "run.started"][-1]
    for part in ("serves retail since", "drifted in", "retrain:", "gate", "promoted", "10 %"):
        assert part in told, told
    assert run in told
    assert ("retail-v2" if retail.overlay == "demo-standard" else "retail-predictor-0000") in told


def test_a_bad_candidate_is_rolled_back_and_never_asked_again(retail: Tenant, promoted: list[dict]):
    version, digest = retail.exec("retraining", "python", "-c", BAD).split()[-2:]
    wish = {
        "apiVersion": "perennial.dev/v1alpha1",
        "kind": "ModelRollout",
        "metadata": {"name": "planted", "namespace": retail.space},
        "spec": {"project": "retail", "version": int(version), "digest": digest},
    }
    with Clients(retail) as clients:
        retail.kubectl.apply([wish])
        until(retail, "it is rolled back", lambda: retail.phase("planted") == "RolledBack")
        ended = time.monotonic()
        # Its place at the top of the template is taken back within this time, too.
        time.sleep(30)

    seen = shares(clients.since(0))
    assert seen.get("", 0) > 0, "its invalid outputs reached somebody: it was a real canary"
    after = [answer for answer in clients.answers if answer[0] >= ended]
    assert {revision for _, _, revision in after} == {"v2"}, strangers(after, ended)
    reason = retail.rollouts()["planted"]["status"]["reason"]
    assert "invalid output" in reason or "server error" in reason


def test_a_rollback_by_hand_brings_the_version_before_back(retail: Tenant, promoted: list[dict]):
    with Clients(retail) as clients:
        told = retail.perennial("rollback", PROJECT)
        time.sleep(3)
        newest = shares(clients.since(time.monotonic() - 1))

    assert "v1" in told
    assert newest.keys() == {"v1"}
    assert clients.failed == []


def test_other_bytes_in_the_store_leave_what_serves_and_the_resource_says_so(
    retail: Tenant, promoted: list[dict]
):
    with Clients(retail) as clients:
        name = f"retail-{retail.plant('spoiled')}"
        until(retail, "it is rolled back", lambda: retail.phase(name) == "RolledBack")

    assert len(shares(clients.since(0))) == 1
    assert clients.failed == []
    reason = retail.rollouts()[name]["status"]["reason"]
    assert "holds other bytes than were kept there" in reason


def test_a_run_and_a_rollout_end_well_while_a_neighbour_floods_the_brokers(
    retail: Tenant, promoted: list[dict], spaces
):
    second = spaces("flood")
    brokers.broker(retail.kubectl, second, brokers.NOBODY)
    brokers.flood(retail.kubectl, second, retraining.event(7), FLOOD_S)

    with Clients(retail) as clients:
        told = retail.perennial("runs", "submit", PROJECT, "--as-of", DECIDED, "--trials", "2")
        name = f"retail-{retail.plant()}"
        until(retail, f"{name} is promoted", lambda: retail.phase(name) == "Promoted")
        flood = retail.kubectl.get("-n", second, "pod", "sender")["status"]["phase"]
    retail.kubectl.run("delete", "namespace", second, "--wait=false")

    assert "succeeded" in told
    assert clients.failed == []
    assert flood == "Running", "the flood went on all that while"


def test_a_rollout_goes_on_whatever_becomes_of_the_retraining_service(
    retail: Tenant, promoted: list[dict]
):
    runs, kills = len(retail.entries("run.started")), 0
    with Clients(retail) as clients:
        while kills < KILLS:
            name = f"retail-{retail.plant()}"
            until(retail, f"{name} begins", lambda name=name: retail.phase(name))
            while retail.phase(name) not in ENDED:
                if kills < KILLS and retail.phase(name) == "Canary":
                    retail.kill("retraining")
                    kills += 1
                time.sleep(2)
            assert retail.phase(name) == "Promoted", retail.problems()
            until(retail, "the service is back", retail.entries)

    assert kills == KILLS
    assert clients.failed == []
    assert len(retail.entries("run.started")) == runs
