"""MLflow knows every training and every version, on one machine and on a cluster."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import tiny
from botocore.exceptions import EndpointConnectionError
from sqlalchemy.exc import OperationalError
from stores import S3, Postgres

from perennial import bundle, registry
from perennial.errors import BadInput, RunFailed, Unavailable
from perennial.ledger import Ledger
from perennial.project import Rollout
from perennial.records import Version
from perennial.settings import Settings
from perennial.steps import deploy, register
from perennial.steps.context import Context
from perennial.store import rollouts, versions
from perennial.store.engine import make_engine

URI = "s3://bucket/tiny/bundles/abc"
AS_OF = datetime(2011, 9, 1, tzinfo=UTC)
PASSED = '{"candidate": "%s", "results": [{"passed": true}]}'


@pytest.fixture(scope="module", params=["here", pytest.param("cluster", marks=pytest.mark.stores)])
def settings(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Settings]:
    """One state for the whole file, because MLflow makes its tables in seconds."""
    here = Settings(home=tmp_path_factory.mktemp("registry"))
    if request.param == "here":
        yield here
        return
    postgres: Postgres = request.getfixturevalue("postgres")
    there = {
        "state_url": postgres.migrated("registry"),
        "tracking_uri": postgres.tracking_uri("registry"),
        "artifacts": f"s3://{request.getfixturevalue('s3_bucket')}/registry",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", S3)
        yield here.model_copy(update=there)


@pytest.fixture
def client(settings):
    with registry._client(settings, "tiny") as found:
        yield found


@pytest.fixture
def ctx(settings, tmp_path) -> Iterator[Context]:
    state = settings.state("tiny")
    engine = make_engine(state.url)
    yield Context(settings, tiny.project(), tmp_path, state, engine, Ledger(engine), "run-1", AS_OF)
    engine.dispose()


def track(settings: Settings, run: str) -> str:
    return registry.track_training(
        settings,
        "tiny",
        run=run,
        digest="sha256:1",
        parameters={"max_depth": 3, "eta": 0.1},
        metrics={"cv_auc": 0.7, "cv_auc_spread": 0.01},
        trials=[{"trial": i, "score": 0.6 + i / 100, "max_depth": 3} for i in range(4)],
    )


def test_a_training_is_one_run_with_parameters_spread_and_trials(settings, client):
    found = client.get_run(track(settings, "one"))

    assert found.data.params == {"max_depth": "3", "eta": "0.1"}
    assert found.data.metrics["cv_auc"] == 0.7
    assert found.data.metrics["cv_auc_spread"] == 0.01
    assert found.info.status == "FINISHED"
    assert found.data.tags["digest"] == "sha256:1"
    history = client.get_metric_history(found.info.run_id, "trial_score")
    assert [(m.step, m.value) for m in history] == [(i, 0.6 + i / 100) for i in range(4)]
    assert [f.path for f in client.list_artifacts(found.info.run_id)] == ["trials.json"]
    assert found.info.artifact_uri.startswith(settings.state("tiny").artifacts("mlflow"))


def test_the_same_run_is_tracked_once(settings):
    assert track(settings, "same") == track(settings, "same")
    assert track(settings, "same") != track(settings, "other")


def test_a_run_that_a_backend_opened_is_adopted_and_left_open(settings, client, monkeypatch):
    opened = client.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", opened)

    assert track(settings, "adopted") == opened

    found = client.get_run(opened)
    assert found.info.status == "RUNNING"
    assert found.data.metrics["cv_auc"] == 0.7


def test_tracking_goes_to_the_state_folder_unless_the_settings_say_otherwise(settings, tmp_path):
    elsewhere = settings.model_copy(update={"tracking_uri": "http://mlflow:5000"})

    assert registry.tracking_uri(elsewhere, "tiny") == "http://mlflow:5000"
    here = Settings(home=tmp_path)
    assert registry.tracking_uri(here, "tiny") == f"sqlite:///{tmp_path}/tiny/mlflow/mlflow.db"


def test_a_version_points_at_its_bundle_and_is_the_challenger(settings, client, tmp_path):
    version = Version(41, "sha256:abc", "run-9", AS_OF)

    number = registry.publish(settings, "tiny", version, URI)

    found = client.get_model_version_by_alias("tiny", "challenger")
    assert int(found.version) == number
    assert found.source == URI
    assert found.tags["digest"] == "sha256:abc"


def test_publishing_twice_makes_one_version(settings, tmp_path):
    version = Version(42, "sha256:def", "run-9", AS_OF)

    first = registry.publish(settings, "tiny", version, URI)

    assert registry.publish(settings, "tiny", version, URI) == first


def test_an_alias_goes_to_our_number_not_to_that_of_mlflow(settings, client, tmp_path):
    number = registry.publish(settings, "tiny", Version(77, "sha256:77", "r", AS_OF), URI)

    registry.set_alias(settings, "tiny", 77, "champion")

    assert int(client.get_model_version_by_alias("tiny", "champion").version) == number != 77


def test_an_alias_of_an_unknown_version_is_refused(settings):
    with pytest.raises(BadInput, match="knows no v999 of tiny"):
        registry.set_alias(settings, "tiny", 999, "champion")


@pytest.mark.slow
def test_an_alias_can_be_set_from_the_command_line(settings, client, tmp_path):
    registry.publish(settings, "tiny", Version(78, "sha256:78", "r", AS_OF), URI)
    command = [sys.executable, "-m", "perennial.registry", "alias", "tiny"]
    env = {
        "PERENNIAL_HOME": str(settings.home),
        "PERENNIAL_TRACKING_URI": settings.tracking_uri,
        "PATH": "/usr/bin:/bin",
    }

    good = subprocess.run([*command, "v78", "champion"], env=env, check=False)
    bad = subprocess.run(
        [*command, "seven", "champion"], env=env, check=False, capture_output=True, text=True
    )

    assert good.returncode == 0
    assert client.get_model_version_by_alias("tiny", "champion").tags["digest"] == "sha256:78"
    assert bad.returncode == 2
    assert bad.stderr == ("perennial.registry: version is 'seven', wanted one such as v2\n")


def judged(folder: Path, seed: int = 0) -> str:
    digest = tiny.bundle(folder, seed=seed)
    bundle.add_evidence(folder, "gate.json", PASSED % digest)
    return digest


def test_registering_keeps_the_bundle_under_its_digest(ctx, client, tmp_path):
    digest = judged(tmp_path / "judged")

    version = register.register(ctx, tmp_path / "judged")

    kept = ctx.state.bundles / digest.removeprefix("sha256:")
    assert bundle.verify(kept) == digest == version.digest
    assert (kept / "evidence" / "gate.json").is_file()
    assert versions.by_number(ctx.engine, "tiny", version.number) == version
    shared = f"{ctx.state.artifacts('bundles')}/{kept.name}"
    assert client.get_model_version_by_alias("tiny", "challenger").source == shared


def test_a_registered_bundle_is_where_all_pods_find_it(ctx, tmp_path):
    digest = judged(tmp_path / "judged", seed=7)
    version = register.register(ctx, tmp_path / "judged")
    if ctx.state.artifact_root:
        shutil.rmtree(ctx.state.bundles)

    wished = deploy.deploy(ctx, version.number)
    found = bundle.near(ctx.state, digest)

    assert wished.bundle_uri == f"{ctx.state.artifacts('bundles')}/{bundle.name_of(digest)}"
    assert bundle.load(found, digest).digest == digest
    assert (found / "evidence" / "gate.json").is_file()


def test_registering_twice_gives_the_same_version(ctx, tmp_path):
    judged(tmp_path / "judged", seed=3)

    first = register.register(ctx, tmp_path / "judged")

    assert register.register(ctx, tmp_path / "judged") == first


@pytest.mark.parametrize("evidence", [None, '{"candidate": "sha256:x", "results": []}'])
def test_a_model_without_a_passed_gate_is_not_registered(ctx, tmp_path, evidence):
    tiny.bundle(tmp_path / "judged", seed=4)
    if evidence:
        bundle.add_evidence(tmp_path / "judged", "gate.json", evidence)

    with pytest.raises(RunFailed, match="has no record of a passed gate"):
        register.register(ctx, tmp_path / "judged")


def test_the_record_of_another_model_counts_nothing(ctx, tmp_path):
    tiny.bundle(tmp_path / "judged", seed=5)
    bundle.add_evidence(tmp_path / "judged", "gate.json", PASSED % "sha256:another")

    with pytest.raises(RunFailed, match="has no record of a passed gate"):
        register.register(ctx, tmp_path / "judged")


def test_deploying_states_a_wish_and_nothing_else(ctx, tmp_path):
    judged(tmp_path / "judged", seed=6)
    version = register.register(ctx, tmp_path / "judged")

    wished = deploy.deploy(ctx, version.number)

    assert rollouts.serving(ctx.engine, "tiny") is None
    assert rollouts.get(ctx.engine, wished.id).digest == version.digest
    assert Rollout.model_validate_json(wished.limits) == ctx.project.rollout
    entry = ctx.ledger.entries("tiny", "rollout.wished")[-1]
    assert entry.body["rollout"] == wished.id


def test_a_version_that_was_never_registered_is_not_deployed(ctx):
    with pytest.raises(RunFailed, match="no version v999 to deploy"):
        deploy.deploy(ctx, 999)


def test_no_piece_of_a_password_passes_for_a_host():
    assert registry._shown("postgresql://role:pa@sshidden@host/db") == "postgresql://..."


@pytest.mark.parametrize(
    "fault",
    [OperationalError("SELECT 1", {}, Exception("no")), EndpointConnectionError(endpoint_url="s")],
    ids=["database", "object store"],
)
def test_what_mlflow_cannot_reach_is_unavailable_and_no_password_is_told(
    tmp_path, monkeypatch, fault
):
    url = "postgresql+psycopg://role:hidden@host/db"
    settings = Settings(home=tmp_path, tracking_uri=url)
    monkeypatch.setattr("mlflow.MlflowClient.__init__", lambda self, **_: None)

    with (
        pytest.raises(Unavailable, match=r"MLflow at .*role:\*\*\*@host/db did not") as told,
        registry._client(settings, "tiny"),
    ):
        raise fault

    assert "hidden" not in str(told.value)
