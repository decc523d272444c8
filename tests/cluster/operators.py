"""An operator as a process here, small servers in pods, clients at the ingress, and a store."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import yaml
from adapters import rollout
from lightkube import Client
from lightkube.generic_resource import create_namespaced_resource
from lightkube.types import PatchType
from small import inference_service
from tenant import DOMAIN, INGRESS

from perennial import kube
from perennial.ledger import Ledger
from perennial.project import Rollout
from perennial.records import Phase, RolloutState
from perennial.rollout import manifest
from perennial.rollout.knative import KnativeRevision
from perennial.rollout.places import KNATIVE
from perennial.store import rollouts, versions
from perennial.store.engine import make_engine

KnativeRoute = create_namespaced_resource("serving.knative.dev", "v1", "Route", "routes")

ROOT = Path(__file__).resolve().parents[2]
IMAGE = os.environ.get("PERENNIAL_TEST_IMAGE", "dev.local/perennial:0.1.0-python3.11")
INFER = "/v2/models/retail/infer"
# The last digit of a digest says what the small server does wrong.
GOOD, ERRORS, NEVER_READY = "0", "e", "f"
TOLD = """
import os, sys
told = dict(a[2:].split("=", 1) for a in sys.argv[1:] if "=" in a)
faults = {"e": "errors", "f": "never ready"}
os.environ["REVISION"] = told["revision"]
if os.environ["LISTEN"] == "8080":
    os.environ["FAULT"] = faults.get(told["digest"][-1], "")
"""
# A busy machine takes its time to start a pod.
PATIENCE_S = float(os.environ.get("PERENNIAL_TEST_PATIENCE_S", "60"))
QUICK = Rollout(
    min_requests=15,
    interval_s=0.5,
    deadline_s=PATIENCE_S,
    ready_s=PATIENCE_S,
    max_p95_ms=5000,
    max_p95_ratio=50,
)


def digest(version: int, fault: str = GOOD) -> str:
    return f"sha256:{version:063x}{fault}"


def template(folder: Path, namespace: str, mode: str) -> None:
    """The small server as a project's InferenceService file."""
    made = inference_service(rollout(1), "retail", namespace, mode, IMAGE, "")
    for container in made["spec"]["predictor"]["containers"]:
        container["command"][2] = TOLD + container["command"][2]
    file = folder / "kserve" / "retail" / manifest.FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(made))


class Loop:
    """The store, the operator and clients of one project, in Knative mode."""

    mode = KNATIVE
    options: tuple[str, ...] = ()

    def __init__(self, client: Client, namespace: str, folder: Path) -> None:
        self.client = client
        self.namespace = namespace
        self._folder = folder
        self.url = f"sqlite:///{folder}/state.db"
        self.engine = make_engine(self.url)
        self.ledger = Ledger(self.engine)
        self.processes: list[subprocess.Popen[bytes]] = []
        self._labels: dict[str, str] = {}
        self.image = IMAGE
        template(folder, namespace, self.mode)

    def start(self, kubeconfig: Path | None = None) -> subprocess.Popen[bytes]:
        env = {
            "PATH": os.environ["PATH"],
            "KUBECONFIG": str(kubeconfig or os.environ["KUBECONFIG"]),
            "PERENNIAL_NAMESPACE": self.namespace,
            "PERENNIAL_STATE_URL": self.url,
            "PERENNIAL_DEPLOYMENT_MODE": self.mode,
            "PERENNIAL_ROOT": str(self._folder),
            "PERENNIAL_HOME": str(self._folder),
            "PERENNIAL_SERVING_IMAGE": self.image,
            # Small servers see no drift, and their namespace has no Broker.
            "PERENNIAL_SINK": "http://nobody.invalid/",
        }
        # No registry knows these versions, so MLflow would be told again and again.
        command = [sys.executable, "-m", "perennial.rollout.operator", "--health-port=0"]
        command += ["--no-registry", *self.options]
        log = (self._folder / "operator.log").open("ab")
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=ROOT)
        log.close()
        self.processes.append(process)
        return process

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        for process in self.processes:
            process.wait(20)
        self.engine.dispose()

    def log(self) -> str:
        return (self._folder / "operator.log").read_text()

    def register(self, version: int, fault: str = GOOD) -> None:
        now = datetime.now(UTC)
        versions.next_version(self.engine, "retail", digest(version, fault), "a run", now)

    def wish(self, version: int, fault: str = GOOD, limits: Rollout = QUICK) -> RolloutState:
        return rollouts.wish(
            self.engine,
            project="retail",
            version=version,
            digest=digest(version, fault),
            bundle_uri="s3://nowhere/bundle",
            run_id=f"run-{version}",
            limits=limits.model_dump_json(),
        )

    def state(self, wished: RolloutState) -> RolloutState:
        found = rollouts.get(self.engine, wished.id)
        assert found
        return found

    def until_over(self, wished: RolloutState, patience_s: float = 4 * PATIENCE_S) -> RolloutState:
        def is_over() -> bool:
            running = [p for p in self.processes if p.poll() is None]
            assert running or not self.processes, f"the operator ended: {self.log()[-3000:]}"
            return self.state(wished).phase.over

        until(is_over, patience_s, self.log)
        return self.state(wished)

    def numbers(self) -> Iterator[int]:
        """Versions that nobody used before."""
        while True:
            used = [r.version for r in rollouts.history(self.engine, "retail")]
            yield max(used, default=0) + 1

    def serving(self) -> str:
        state = rollouts.serving(self.engine, "retail")
        return f"v{state.version}" if state else ""

    def serve(self, version: int) -> None:
        """Have this version serve, by what is usual."""
        state = self.until_over(self.wish(version))
        assert state.phase is Phase.PROMOTED, state.reason

    def resource(self, name: str) -> dict[str, Any]:
        return dict(kube.find(self.client, kube.ModelRollout, name) or {})

    def live(self) -> dict[str, Any]:
        return dict(kube.find(self.client, kube.InferenceService, "retail") or {})

    def given(self) -> dict[str, dict[str, int]]:
        """Percent of each version: what was asked for, what the Route has, what KServe tells."""
        live = self.live()
        route = kube.find(self.client, KnativeRoute, "retail-predictor") or {}
        said = (live.get("status") or {}).get("components", {}).get("predictor", {})
        places = {"route": route.get("status", {}), "status": said}
        found = {place: self._shares(told.get("traffic", ())) for place, told in places.items()}
        if live:
            asked = manifest.percent(live)
            found["spec"] = {manifest.revision(live): 100 if asked is None else asked}
        return found

    def _shares(self, traffic: Iterable[dict[str, Any]]) -> dict[str, int]:
        found: Counter[str] = Counter()
        for entry in traffic:
            found[self._label(entry.get("revisionName", ""))] += int(entry.get("percent") or 0)
        return dict(found)

    def _label(self, revision: str) -> str:
        """Which version one of Knative's revisions is, by its label."""
        if revision and revision not in self._labels:
            made = kube.find(self.client, KnativeRevision, revision)
            labels = made["metadata"].get("labels", {}) if made else {}
            self._labels[revision] = labels.get(manifest.REVISION, revision)
        return self._labels.get(revision, "")

    def percent(self) -> int:
        live = self.live()
        found = manifest.percent(live) if live else None
        return 100 if found is None else found

    def edit(self, **predictor: object) -> None:
        """What a person does with kubectl edit."""
        body = {"spec": {"predictor": predictor}}
        with kube.asking("editing"):
            self.client.patch(kube.InferenceService, "retail", body, patch_type=PatchType.MERGE)

    def ask(self, count: int = 1) -> list[str]:
        """Who answered."""
        with self.door() as http:
            return [_told(http.post(INFER, json={})) for _ in range(count)]

    def door(self) -> httpx.Client:
        """Where clients of the model knock."""
        headers = {"host": f"retail-predictor.{self.namespace}.{DOMAIN}"}
        return httpx.Client(base_url=INGRESS, headers=headers, timeout=20, trust_env=False)

    @contextmanager
    def clients(self, pause_s: float = 0.01) -> Iterator[Counter[str]]:
        """Requests that go on all the time, counted by who answered."""
        said: Counter[str] = Counter()
        over = threading.Event()

        def send() -> None:
            while not over.wait(pause_s):
                said.update(self.ask(5))

        sender = threading.Thread(target=send)
        sender.start()
        try:
            yield said
        finally:
            over.set()
            sender.join()


def _told(answer: httpx.Response) -> str:
    if not answer.text.startswith("{"):
        return f"nobody ({answer.status_code})"
    return str(answer.json()["model_version"])


def until(is_so: Callable[[], object], seconds: float, why: Callable[[], str] = str) -> None:
    limit = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < limit, f"it did not come about in time; {why()[-3000:]}"
        time.sleep(0.2)
