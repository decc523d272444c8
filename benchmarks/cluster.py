"""How soon does the loop act on a cluster: an event becomes a run, a bundle becomes a canary?"""

import json
import os
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import yaml

from benchmarks.measure import ROOT, Figure
from perennial import contract, events, project
from perennial.data import history, sources
from perennial.records import DriftReport, FeatureDrift
from tests.cluster.conftest import CACHED, Kubectl
from tests.cluster.tenant import Tenant, install, until

BROKERS = os.environ.get("PERENNIAL_TEST_BROKERS", "http://127.0.0.1:31081")
RETAIL = "projects/retail.yaml"
DEMO_KEY = b"demo-only-event-key-of-32-bytes!"
EVENTS, BUNDLES = 7, 3
FIRST = datetime(2012, 1, 2, tzinfo=UTC)
WEEK = timedelta(days=7)
# Every drifted window is worth a run here, whatever went before.
EAGER = {"persistence": 1, "min_labelled_windows": 0, "cooldown": "0s"}

SERVED = """
import sys
from datetime import datetime, timedelta
import numpy as np
from perennial import bundle
from perennial.drift.segments import Writer
from perennial.drift.windows import ClosedWindow, Served
from perennial.settings import Settings
from perennial.store import rollouts
from perennial.store.engine import make_engine

state = Settings.load().state("retail")
serving = rollouts.serving(make_engine(state.url), "retail")
parts = bundle.parts(bundle.near(state, serving.digest))
names = [f["name"] for f in parts.contract["features"]]
rows = np.where(np.isnan(parts.reference), np.nan, parts.reference + 1000.0)
writer = Writer.new(state.artifacts("segments"), "v1", names)
start = datetime.fromisoformat(sys.argv[1])
for _ in range(int(sys.argv[2])):
    served = Served(start + timedelta(hours=1), "bench", rows, np.full(len(rows), 0.5))
    end = start + timedelta(days=7)
    writer.write(ClosedWindow(start, end, serving.digest, 0, True, (served,)))
    start = end
print(serving.digest)
"""


def figures() -> list[Figure]:
    """Install the demo, measure, and remove it again."""
    kubectl = Kubectl(str(CACHED), os.environ["KUBECONFIG"])
    with tempfile.TemporaryDirectory() as scratch, _tenant(kubectl, Path(scratch)) as tenant:
        tenant.perennial("runs", "submit", RETAIL, "--as-of", "2011-06-06", "--trials", "2")
        until(tenant, "a model serves", lambda: tenant.phase("retail-v1") == "Promoted")
        return [_events(tenant), _bundles(tenant)]


@contextmanager
def _tenant(kubectl: Kubectl, folder: Path) -> Iterator[Tenant]:
    space = f"bench-{uuid.uuid4().hex[:6]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    meta = {"name": space, "labels": labels}
    kubectl.apply([{"apiVersion": "v1", "kind": "Namespace", "metadata": meta}])
    try:
        tenant = install(kubectl, "demo", space, folder)
        _make_eager(tenant)
        yield tenant
    finally:
        kubectl.run("delete", "namespace", space, "--wait=false")


def _make_eager(tenant: Tenant) -> None:
    told = yaml.safe_load((ROOT / "examples" / "retail" / "project.yaml").read_text())
    changed = yaml.safe_dump({**told, "retraining": EAGER}, sort_keys=False)
    patch = json.dumps({"data": {"retail.yaml": changed}})
    space = ("-n", tenant.space)
    tenant.kubectl.run(*space, "patch", "configmap", "projects", "--type=merge", "-p", patch)
    tenant.kubectl.run(*space, "rollout", "restart", "deployment/retraining")
    tenant.kubectl.run(*space, "rollout", "status", "deployment/retraining", "--timeout=300s")


def _events(tenant: Tenant) -> Figure:
    digest = tenant.exec(
        "retraining", "python", "-c", SERVED, FIRST.isoformat(), str(EVENTS)
    ).split()[-1]
    took = [_one_event(tenant, digest, FIRST + n * WEEK) for n in range(EVENTS)]
    median = statistics.median(took)
    told = f"{median:.1f} s median, {max(took):.1f} s slowest of {EVENTS}"
    return Figure("event in the Broker to its run created", told, "<= 5 s", median <= 5)


def _one_event(tenant: Tenant, digest: str, start: datetime) -> float:
    found = FeatureDrift("recency_days", "ks", 1.0, 0.0, True, 0.0)
    report = DriftReport(start, start + WEEK, digest, 500, False, 0.01, (found,))
    event = events.drift_event(report, "retail", "/bench", datetime.now(UTC))
    headers, body = events.to_http(event, DEMO_KEY, "binary")
    before = _jobs(tenant)
    begun = time.monotonic()
    url = f"{BROKERS}/{tenant.space}/default"
    httpx.post(url, headers=headers, content=body, timeout=60, trust_env=False).raise_for_status()
    while not (new := _jobs(tenant) - before):
        assert time.monotonic() - begun < 120, tenant.problems()
        time.sleep(0.05)
    took = time.monotonic() - begun
    known = f"{new} in the ledger"
    until(tenant, known, lambda: new & {e["subject"] for e in tenant.entries("run.started")})
    tenant.perennial("runs", "terminate", *new, "--project", RETAIL)
    until(tenant, "the run is over", lambda: not _is_busy(tenant))
    return took


def _jobs(tenant: Tenant) -> set[str]:
    listed = tenant.kubectl.get(
        "-n", tenant.space, "jobs", "-l", "app.kubernetes.io/component=pipeline-run"
    )
    return {str(item["metadata"]["name"]) for item in listed["items"]}


def _is_busy(tenant: Tenant) -> bool:
    code = "import httpx; print(httpx.get('http://127.0.0.1:8080/status').text)"
    status = json.loads(tenant.exec("retraining", "python", "-c", code))["retail"]
    return bool(status["pending"] or status["running"])


def _bundles(tenant: Tenant) -> Figure:
    took = [_one_bundle(tenant) for _ in range(BUNDLES)]
    median = statistics.median(took)
    told = f"{median:.0f} s median, {max(took):.0f} s slowest of {BUNDLES}"
    return Figure(
        "new bundle to the first request that its canary answers", told, "<= 60 s", median <= 60
    )


def _one_bundle(tenant: Tenant) -> float:
    with _asking(tenant) as answered:
        begun = time.monotonic()
        label = tenant.plant()
        until(tenant, f"{label} answers", lambda: label in answered())
        took = time.monotonic() - begun
        until(tenant, "it is promoted", lambda: tenant.phase(f"retail-{label}") == "Promoted")
    return took


@contextmanager
def _asking(tenant: Tenant) -> Iterator[Callable[[], set[str]]]:
    """Ask some 30 times a second; gives what has answered so far."""
    over, seen = threading.Event(), set[str]()
    body = _one_row()

    def ask() -> None:
        url, host = tenant.door
        headers = {"host": host, "content-type": "application/json"}
        with httpx.Client(trust_env=False, timeout=30, headers=headers) as client:
            while not over.wait(0.02):
                found = client.post(f"{url}/v2/models/retail/infer", content=body)
                if found.status_code == httpx.codes.OK:
                    seen.add(found.json()["parameters"]["revision"])

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield lambda: seen
    finally:
        over.set()
        thread.join()


def _one_row() -> bytes:
    found = project.load(ROOT / "examples" / "retail")
    rows = history.examples(found, sources.read(found, None, ROOT), FIRST, None).iloc[:1]
    asked = contract.learn(found.features, rows)
    return json.dumps(asked.to_request(rows, "one", FIRST)).encode()
