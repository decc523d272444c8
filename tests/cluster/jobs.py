"""A tenant whose runs are Jobs of real pods, without the rest of an installation."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from lightkube import Client
from sqlalchemy import Engine

from perennial import kube
from perennial.ledger import Ledger
from perennial.retrain import job
from perennial.retrain.launchers import RunRequest
from perennial.settings import Settings
from perennial.store.engine import make_engine, open_engine
from perennial.store.migrate import migrate

ROOT = Path(__file__).resolve().parents[2]
IMAGE = os.environ.get("PERENNIAL_TEST_IMAGE", "dev.local/perennial:0.1.0-python3.11")
AS_OF = datetime(2011, 6, 6, tzinfo=UTC)
Document = dict[str, Any]


class Tenant:
    """A namespace with what the launcher and its pods want there."""

    def __init__(self, kubectl: Any, space: str, settings: Settings) -> None:
        self.kubectl = kubectl
        self.space = space
        self.settings = settings

    def prepare(self, secrets: dict[str, str], tracking_uri: str) -> None:
        given = {
            "PERENNIAL_HOME": "/home/perennial/state",
            "PERENNIAL_ARTIFACTS": self.settings.artifacts,
        }
        project = (ROOT / "examples" / "retail" / "project.yaml").read_text()
        state = {"url": self.settings.state_url, "tracking-uri": tracking_uri}
        self.kubectl.apply(
            [
                self._made("ServiceAccount", "pipeline-run"),
                self._made("ConfigMap", "settings", data=given),
                self._made("ConfigMap", "projects", data={"retail.yaml": project}),
                self._made("Secret", "state", stringData=state),
                self._made("Secret", "artifacts", stringData=secrets),
            ]
        )

    def apply(self, kind: str, name: str, **body: Document) -> None:
        self.kubectl.apply([self._made(kind, name, **body)])

    def pods(self, run: str) -> list[Document]:
        found = self.kubectl.get("pods", "-n", self.space, "-l", f"{job.RUN}={run}")
        return sorted(found["items"], key=lambda p: str(p["metadata"]["creationTimestamp"]))

    def log(self, run: str) -> str:
        """What the newest pod of a run wrote."""
        found = self.pods(run)
        name = found[-1]["metadata"]["name"] if found else "none"
        return str(self.kubectl.run("logs", "-n", self.space, name, check=False).stdout)

    @contextmanager
    def engine(self) -> Iterator[Engine]:
        found = make_engine(self.settings.state_url)
        try:
            yield found
        finally:
            found.dispose()

    def kinds(self, run: str) -> list[str]:
        with self.engine() as engine:
            entries = Ledger(engine).entries("retail")
        return [e.kind for e in entries if e.body.get("run") == run]

    def _made(self, kind: str, name: str, **body: Any) -> Document:
        meta = {"name": name, "namespace": self.space}
        return {"apiVersion": "v1", "kind": kind, "metadata": meta, **body}


@pytest.fixture
def tenant(
    kubectl: Any, space: str, postgres: Any, s3: str, tmp_path: Path, monkeypatch: Any
) -> Tenant:
    monkeypatch.setenv("PERENNIAL_HOME", str(tmp_path))
    monkeypatch.setenv("PERENNIAL_STATE_URL", postgres.tenant(space))
    monkeypatch.setenv("PERENNIAL_ARTIFACTS", s3)
    monkeypatch.setenv("PERENNIAL_NAMESPACE", space)
    monkeypatch.setenv("PERENNIAL_LAUNCHER", "job")
    monkeypatch.setenv("PERENNIAL_IMAGE", IMAGE)
    monkeypatch.setenv("PERENNIAL_RUN_CPU", "100m")
    made = Tenant(kubectl, space, Settings.load())
    engine = open_engine(made.settings.state_url)
    migrate(engine)
    engine.dispose()
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL")
    made.prepare({name: os.environ[name] for name in names}, postgres.tracking_uri(space))
    return made


@pytest.fixture
def api(space: str) -> Iterator[Client]:
    with kube.connect(space) as found:
        yield found


@pytest.fixture
def launcher(tenant: Tenant, api: Client) -> job.JobLauncher:
    return job.JobLauncher(tenant.settings, api)


def ask(key: str, trials: int = 2, source: str = "") -> RunRequest:
    return RunRequest(
        project=ROOT / "examples" / "retail",
        source=source,
        as_of=AS_OF,
        trigger=key,
        trials=trials,
        key=key,
    )


def eventually(happened: Callable[[], bool], seconds: float = 600) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if happened():
            return True
        time.sleep(0.5)
    return False
