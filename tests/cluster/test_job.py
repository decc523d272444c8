"""The compiled pipeline as a Job of real pods: where one ends the next goes on, and all is told."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from lightkube import Client, KubeConfig
from lightkube.config.models import User
from sqlalchemy import Engine

from perennial import kube
from perennial.errors import RunFailed, Unavailable
from perennial.ledger import Ledger
from perennial.retrain import job
from perennial.retrain.launchers import RunRequest
from perennial.settings import Settings
from perennial.store import versions
from perennial.store.engine import make_engine, open_engine
from perennial.store.migrate import migrate

pytestmark = [pytest.mark.cluster, pytest.mark.stores]

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
        return self.kubectl.run("logs", "-n", self.space, name, check=False).stdout

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


@pytest.fixture
def hasty(tenant: Tenant, api: Client) -> job.JobLauncher:
    """A launcher that gives up a pod early."""
    return job.JobLauncher(tenant.settings.model_copy(update={"run_start_s": 10}), api)


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


def begun(log: str) -> list[str]:
    """Steps that a pod began, in order."""
    return re.findall(r"Executing task '([\w-]+)'", log)


def test_a_run_survives_its_launcher_and_its_pod_and_no_step_is_done_twice(tenant, launcher):
    run = job.run_id("retail", "event 1")
    code = (
        "from datetime import datetime; from pathlib import Path\n"
        "from perennial.settings import Settings\n"
        "from perennial.retrain.job import JobLauncher\n"
        "from perennial.retrain.launchers import RunRequest\n"
        f"JobLauncher(Settings.load()).run(RunRequest(Path({str(ROOT / 'examples' / 'retail')!r}),"
        f" as_of=datetime.fromisoformat({AS_OF.isoformat()!r}), trigger='event 1', trials=2,"
        " key='event 1'))"
    )
    first = subprocess.Popen([sys.executable, "-c", code])
    assert eventually(lambda: "train" in begun(tenant.log(run))), tenant.log(run)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = begun(tenant.log(run))
    name = tenant.pods(run)[-1]["metadata"]["name"]
    tenant.kubectl.run("delete", "pod", "-n", tenant.space, name, "--grace-period=0", "--force")

    steps: list[str] = []
    result = launcher.run(ask("event 1"), progress=steps.append)

    assert before == ["ingest", "validate", "features", "train"]
    assert begun(tenant.log(run)) == [*before[3:], *steps[1:]]
    assert steps[0] == "train" and steps[-1] == "notify"
    assert (result.run, result.state) == (run, "succeeded")
    assert result.reason.startswith("all ")
    kinds = tenant.kinds(run)
    assert [kinds.count(k) for k in ("run.started", "gate", "registered", "run.finished")] == [
        1
    ] * 4
    with tenant.engine() as engine:
        (version,) = versions.all_versions(engine, "retail")
    assert version.run_id == run
    assert launcher.run(ask("event 1")) == result


def test_a_failed_step_is_named_and_not_tried_again(tenant, launcher):
    with pytest.raises(RunFailed, match=r"step ingest failed: .*none\.csv"):
        launcher.run(ask("event 2", source="none.csv"))

    assert len(tenant.pods(job.run_id("retail", "event 2"))) == 1


def test_an_image_that_cannot_be_pulled_is_told_and_a_later_try_begins_anew(tenant, api):
    missing = tenant.settings.model_copy(
        update={"image": "dev.local/no-such-image:1", "run_start_s": 10}
    )

    with pytest.raises(Unavailable, match=r"its image cannot be pulled: .*no-such-image"):
        job.JobLauncher(missing, api).run(ask("event 3"))

    assert "event 3" not in str(tenant.kubectl.get("jobs", "-n", tenant.space)["items"])


def test_a_full_quota_is_told(tenant, hasty):
    tenant.apply("ResourceQuota", "none", spec={"hard": {"pods": "0"}})

    with pytest.raises(Unavailable, match=r"it got no pod: .*exceeded quota"):
        hasty.run(ask("event 4"))


def test_a_missing_secret_is_told(tenant, hasty):
    tenant.kubectl.run("delete", "secret", "-n", tenant.space, "state")

    with pytest.raises(Unavailable, match=r"its settings are not there: .*\"state\" not found"):
        hasty.run(ask("event 5"))


def test_an_identity_without_the_right_is_told_at_once(tenant, kubeconfig):
    token = tenant.kubectl.run("create", "token", "-n", tenant.space, "pipeline-run").stdout
    allowed = KubeConfig.from_file(kubeconfig).get()
    nobody = KubeConfig.from_one(
        cluster=allowed.cluster,
        user=User(token=token.strip()),
        namespace=tenant.space,
        fname=kubeconfig,
    )

    wanted = r"creating Job .* is forbidden: User .*pipeline-run"
    with Client(nobody) as client, pytest.raises(Unavailable, match=wanted):
        job.JobLauncher(tenant.settings, client).run(ask("event 6"))


def test_ending_a_run_by_hand_leaves_no_pod(tenant, launcher):
    run = job.run_id("retail", "event 7")
    launcher._create(job.manifest(tenant.settings, ask("event 7"), "retail", run))
    assert eventually(lambda: "ingest" in begun(tenant.log(run)))

    launcher.terminate("retail", run)

    assert eventually(lambda: tenant.pods(run) == [], 60)
    with pytest.raises(RunFailed, match="it was ended by hand"):
        launcher.run(ask("event 7"))
