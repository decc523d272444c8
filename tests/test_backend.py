"""A KFP backend is asked as it wants, and its answers and refusals are told in our words.

The tests with ``backend`` alone also run against a real one, named by PERENNIAL_KFP_ENDPOINT (and
PERENNIAL_KFP_TOKEN, PERENNIAL_NAMESPACE); the others need a backend that does what they say.
"""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from kfp_backend import FakeKfp, serving

from perennial.errors import BadInput, Unavailable
from perennial.retrain import backend as backends
from perennial.retrain.answers import Wanted
from perennial.retrain.backend import Backend, Refused
from perennial.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
SPEC = ROOT / "pipelines" / "training.yaml"
# Read before any test takes our variables away.
REAL = {
    name: os.environ.get(f"PERENNIAL_{name.upper()}", "")
    for name in ("kfp_endpoint", "kfp_token", "kfp_ca", "namespace")
}
PARAMETERS = {"project": "projects/none.yaml", "trigger": "a test"}


@pytest.fixture
def fake() -> Iterator[FakeKfp]:
    with serving(FakeKfp()) as found:
        yield found


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("secret-1\n")
    return path


@pytest.fixture
def crowd(token: Path) -> Iterator[FakeKfp]:
    """A backend that serves many users."""
    with serving(FakeKfp(token="secret-1", multi_user=True)) as found:
        yield found


def asking(settings: Settings, fake: FakeKfp, **more: object) -> Backend:
    return Backend(settings.model_copy(update={"kfp_endpoint": fake.host, **more}))


@pytest.fixture
def backend(settings: Settings, fake: FakeKfp) -> Backend:
    """The real one where there is one, else the fake."""
    if not REAL["kfp_endpoint"]:
        return asking(settings, fake)
    given = {name: value for name, value in REAL.items() if value}
    paths = {k: Path(v) for k, v in given.items() if k in ("kfp_token", "kfp_ca")}
    return Backend(settings.model_copy(update={**given, **paths}))


@pytest.fixture
def name() -> str:
    """A name that no earlier test left behind on a real backend."""
    return f"perennial-test-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def spec() -> dict[str, object]:
    return backends.read_spec(SPEC.read_text())


@pytest.fixture
def wanted(backend: Backend, name: str) -> Wanted:
    made = backend.upload(name, "1", SPEC)
    return Wanted(name, "0 30 3 1 1 *", made.pipeline, made.version, dict(PARAMETERS))


def test_an_experiment_is_made_once(backend, name):
    assert backend.experiment(name) == backend.experiment(name)


def test_a_run_of_the_compiled_spec_is_taken_and_found_by_its_name(backend, name, spec):
    experiment = backend.experiment(name)

    run = backend.submit(experiment, f"{name} 1", spec, PARAMETERS)

    found = list(backend.runs(experiment, display_name=f"{name} 1"))
    assert [r.id for r in found] == [run]
    assert backend.run(run).state in ("PENDING", "RUNNING")
    assert backend.run(run).finished_at is None
    backend.terminate(run)


def test_a_parameter_that_the_pipeline_has_not_is_refused(backend, name, spec):
    with pytest.raises(Refused, match="refuses"):
        backend.submit(backend.experiment(name), name, spec, {**PARAMETERS, "depth": 3})


def test_a_run_without_a_project_is_refused(backend, name, spec):
    with pytest.raises(Refused, match="parameter project is not optional"):
        backend.submit(backend.experiment(name), name, spec, {"trigger": "a test"})


def test_a_version_is_uploaded_once(backend, name):
    first, again = backend.upload(name, "1", SPEC), backend.upload(name, "1", SPEC)
    other = backend.upload(name, "2", SPEC)

    assert (first.new, again.new, other.new) == (True, False, True)
    assert first.version == again.version != other.version
    assert first.pipeline == other.pipeline


def test_a_recurring_run_is_made_as_wanted_and_can_be_disabled_and_deleted(backend, name, wanted):
    experiment = backend.experiment(name)

    made = backend.recur(experiment, wanted)

    (found,) = backend.recurring(experiment, name)
    assert found.id == made
    assert found.is_as(wanted, "pipeline-run")
    backend.enable(made, False)
    assert not backend.recurring(experiment, name)[0].enabled
    backend.delete(made)
    assert backend.recurring(experiment, name) == []


def test_a_run_that_is_not_there_is_told(backend):
    with pytest.raises(Refused, match="refuses: .*not found") as told:
        backend.run(str(uuid.uuid4()))

    assert told.value.status == 404


def test_terminating_ends_in_failed_and_can_be_told_from_a_failure(settings, fake, spec):
    fake.plan["ingest"] = ["hang"]
    ours = asking(settings, fake)
    run = ours.submit(ours.experiment("retail"), "one", spec, PARAMETERS)
    ours.run(run)

    ours.terminate(run)

    seen = ours.run(run)
    assert (seen.state, seen.ended, seen.terminated) == ("FAILED", True, True)
    with pytest.raises(Refused, match="Row not found"):
        ours.terminate(run)


def test_only_a_failed_run_can_be_resumed(settings, fake, spec):
    ours = asking(settings, fake)
    run = ours.submit(ours.experiment("retail"), "one", spec, PARAMETERS)
    while not ours.run(run).ended:
        pass

    with pytest.raises(Refused, match="must be Failed/Error") as told:
        ours.retry(run)

    assert told.value.status == 409


def test_the_steps_of_a_run_are_ours_and_not_the_engines(settings, fake, spec):
    ours = asking(settings, fake)
    run = ours.submit(ours.experiment("retail"), "one", spec, PARAMETERS)
    for _ in range(4):
        seen = ours.run(run)

    assert {"root", "root-driver", "exit-handler-1"} < {t.name for t in seen.tasks}
    assert [(t.name, t.state) for t in seen.steps] == [
        ("ingest", "SUCCEEDED"),
        ("validate", "RUNNING"),
    ]
    assert [t.seconds for t in seen.steps] == [12.0, None]


def test_a_log_is_read_at_its_old_address(settings, fake, spec):
    fake.plan["ingest"] = ["ValueError: row 17"]
    ours = asking(settings, fake)
    run = ours.submit(ours.experiment("retail"), "one", spec, PARAMETERS)
    while not (seen := ours.run(run)).ended:
        pass

    (step,) = seen.failed

    assert "ValueError: row 17" in ours.log(run, step)
    assert any(r.startswith(f"GET /apis/v1alpha1/runs/{run}/nodes/") for r in fake.requests)


def test_a_log_that_was_not_kept_is_empty_though_the_answer_is_200(settings, fake, spec):
    ours = asking(settings, fake)
    run = ours.submit(ours.experiment("retail"), "one", spec, PARAMETERS)
    for _ in range(2):
        seen = ours.run(run)

    assert [t.state for t in seen.steps] == ["RUNNING"]
    assert ours.log(run, seen.steps[0]) == ""


def test_a_run_is_found_by_the_beginning_of_its_id(settings, fake, spec):
    ours = asking(settings, fake)
    run = ours.submit(ours.experiment("retail"), "one", spec, PARAMETERS)

    assert ours.find(run[:8]) == run
    with pytest.raises(BadInput, match="no run begins with 'zzz'"):
        ours.find("zzz")


def test_the_token_goes_with_every_call_and_is_read_again(settings, crowd, token, spec):
    ours = asking(settings, crowd, kfp_token=token, namespace="team-a")
    ours.experiment("retail")

    token.write_text("secret-2")
    crowd.token = "secret-2"

    assert ours.experiment("retail")


def test_a_wrong_token_is_told_with_its_remedy(settings, crowd, token):
    token.write_text("stale")

    with pytest.raises(Refused, match=r"does not let us: .*token.*; give a token by PERENNIAL_KFP"):
        asking(settings, crowd, kfp_token=token, namespace="team-a").experiment("retail")


def test_a_token_file_that_is_not_there_is_told(settings, fake, tmp_path):
    with pytest.raises(BadInput, match=r"PERENNIAL_KFP_TOKEN is .*none, and there is no such file"):
        asking(settings, fake, kfp_token=tmp_path / "none").experiment("retail")


def test_the_token_that_kubeflow_mounts_is_found(settings, crowd, token, monkeypatch):
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(token))

    assert asking(settings, crowd, namespace="team-a").experiment("retail")


def test_the_endpoint_that_kubeflow_sets_in_a_notebook_is_found(settings, fake, monkeypatch):
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", fake.host)

    assert Backend(settings).experiment("retail")


def test_a_pod_asks_the_service_of_its_cluster(settings, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")

    assert Backend(settings).host == "http://ml-pipeline.kubeflow.svc.cluster.local:8888"


def test_a_pod_knows_its_namespace_where_many_users_share(
    settings, crowd, token, tmp_path, monkeypatch
):
    (tmp_path / "namespace").write_text("team-b")
    monkeypatch.setattr(backends, "_POD", tmp_path / "namespace")

    asking(settings, crowd, kfp_token=token).experiment("retail")

    assert [e.namespace for e in crowd.experiments.values()] == ["team-b"]


def test_a_laptop_asks_through_its_kubeconfig(settings, tmp_path, monkeypatch):
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": "http://10.9.8.7:6443"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
    }
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config")
    )

    host = Backend(settings).host

    assert host.startswith("http://10.9.8.7:6443/api/v1/namespaces/kubeflow/services/ml-pipeline")


def test_nothing_configured_is_told_with_what_to_set(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "no")
    )

    with pytest.raises(BadInput, match="no KFP backend is configured; set PERENNIAL_KFP_ENDPOINT"):
        Backend(settings).experiment("retail")

    assert capsys.readouterr().out == ""


def test_a_namespace_goes_with_what_many_users_share(settings, crowd, token):
    ours = asking(settings, crowd, kfp_token=token, namespace="team-a")

    ours.upload("training", "1", SPEC)
    ours.experiment("retail")

    assert {e.namespace for e in crowd.experiments.values()} == {"team-a"}
    assert {p.namespace for p in crowd.pipelines.values()} == {"team-a"}


def test_many_users_and_no_namespace_is_told(settings, crowd, token):
    with pytest.raises(BadInput, match="serves many users; set PERENNIAL_NAMESPACE"):
        asking(settings, crowd, kfp_token=token).experiment("retail")


def test_a_silent_backend_is_unavailable_soon_and_says_how_to_reach_it(settings):
    nobody = settings.model_copy(update={"kfp_endpoint": "http://127.0.0.1:9"})

    with pytest.raises(Unavailable, match=r"at http://127.0.0.1:9 does not answer .*port-forward"):
        Backend(nobody).experiment("retail")


def test_no_file_is_written_where_kfp_keeps_its_context(
    settings, crowd, token, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "kfp.client.client.Client._LOCAL_KFP_CONTEXT", str(tmp_path / "kfp" / "c.json")
    )

    asking(settings, crowd, kfp_token=token, namespace="team-a").experiment("retail")

    assert not (tmp_path / "kfp").exists()


def test_the_fake_refuses_what_a_backend_refuses(settings, fake, spec):
    """A fake that takes anything would prove nothing."""
    ours = asking(settings, fake)
    experiment = ours.experiment("retail")

    with pytest.raises(Refused, match="unknown field"):
        ours._call("_run_api", "run_service_create_run", {"experiment_id": experiment, "colour": 1})
    with pytest.raises(Refused, match="unknown template format"):
        ours.submit(experiment, "x", {**spec, "surprise": 1}, {})
    with pytest.raises(Refused, match="Invalid filter"):
        list(ours.runs(experiment, colour="blue"))
    with pytest.raises(Refused, match="not found"):
        ours.submit("no-such-experiment", "x", spec, {})
