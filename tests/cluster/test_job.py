"""The compiled pipeline as a Job of real pods: where one ends the next goes on, and all is told."""

import re
import signal
import subprocess
import sys

import pytest
from lightkube import Client, KubeConfig
from lightkube.config.models import User

from perennial.errors import RunFailed, Unavailable
from perennial.retrain import job
from perennial.store import versions
from tests.cluster.jobs import AS_OF, ROOT, Tenant, ask, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.stores]


@pytest.fixture
def hasty(tenant: Tenant, api: Client) -> job.JobLauncher:
    """A launcher that gives up a pod early."""
    return job.JobLauncher(tenant.settings.model_copy(update={"run_start_s": 10}), api)


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
