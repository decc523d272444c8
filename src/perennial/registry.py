"""What does MLflow know of our models: the only code that speaks to it."""

import argparse
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from perennial.errors import BadInput, PerennialError, Unavailable
from perennial.records import Version
from perennial.settings import Settings, tell_libraries
from perennial.store import urls

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHALLENGER = "challenger"
CHAMPION = "champion"
RUN = "perennial.run"
VERSION = "perennial.version"


def track_training(
    settings: Settings,
    project: str,
    *,
    run: str,
    digest: str,
    parameters: Mapping[str, Any],
    metrics: Mapping[str, float],
    trials: Sequence[Mapping[str, Any]],
) -> str:
    """Log one training as one MLflow run and give its id; the same run twice is logged once.

    A backend that follows the run itself has opened an MLflow run already: that one is adopted.
    """
    with _client(settings, project) as client:
        found, adopted = _open_run(client, settings, project, run)
        _log(client, found, parameters, metrics, trials)
        client.set_tag(found, "digest", digest)
        if not adopted:
            client.set_terminated(found)
        return found


def publish(settings: Settings, project: str, version: Version, uri: str) -> int:
    """Add the bundle at a URI to the registry as the challenger and give its number there."""
    with _client(settings, project) as client:
        known = _find_version(client, project, version.number)
        number = known or _create_version(client, project, version, uri)
        client.set_registered_model_alias(project, CHALLENGER, str(number))
        return number


def set_alias(settings: Settings, project: str, number: int, alias: str) -> None:
    """Point an alias such as ``champion`` at our version ``number``."""
    with _client(settings, project) as client:
        known = _find_version(client, project, number)
        if known is None:
            raise BadInput(f"the MLflow registry knows no v{number} of {project}")
        client.set_registered_model_alias(project, alias, str(known))


def tracking_uri(settings: Settings, project: str) -> str:
    """Where tracking goes: the setting, else the server a backend named, else SQLite here."""
    database = settings.state(project).mlflow / "mlflow.db"
    return settings.tracking_uri or _told("MLFLOW_TRACKING_URI") or f"sqlite:///{database}"


@contextmanager
def _client(settings: Settings, project: str) -> "Iterator[MlflowClient]":
    tell_libraries(MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_LOGGING_LEVEL="WARNING")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The ``noload`` loader strategy")
        from mlflow import MlflowClient

        uri = tracking_uri(settings, project)
        settings.state(project).mlflow.mkdir(parents=True, exist_ok=True)
        try:
            yield MlflowClient(tracking_uri=uri, registry_uri=uri)
        except _faults() as exc:
            text = " ".join(str(exc).split())
            raise Unavailable(f"MLflow at {_shown(uri)} did not do as asked: {text}") from exc


def _faults() -> tuple[type[Exception], ...]:
    """What MLflow raises of its own, and lets through from its database and its object store."""
    from boto3.exceptions import Boto3Error  # type: ignore[import-untyped]
    from botocore.exceptions import (  # type: ignore[import-untyped]
        BotoCoreError,
        ClientError,
    )
    from mlflow.exceptions import MlflowException

    return MlflowException, SQLAlchemyError, Boto3Error, BotoCoreError, ClientError


def _shown(uri: str) -> str:
    """A URI without its password, and without what may be a piece of it."""
    try:
        return str(urls.parse(uri)) if "@" in uri else uri
    except (ArgumentError, ValueError):
        return f"{uri.partition('://')[0]}://..."


def _open_run(
    client: "MlflowClient", settings: Settings, project: str, run: str
) -> tuple[str, bool]:
    if given := _told("MLFLOW_RUN_ID"):
        return given, True
    experiment = _experiment(client, settings, project)
    known = client.search_runs([experiment], f"tags.`{RUN}` = '{run}'", max_results=1)
    if known:
        return str(known[0].info.run_id), False
    made = client.create_run(experiment, run_name=f"run {run}", tags={RUN: run})
    return str(made.info.run_id), False


def _told(name: str) -> str:
    """What a backend says in one of MLflow's own environment variables."""
    from mlflow import environment_variables

    return str(getattr(environment_variables, name).get() or "")


def _experiment(client: "MlflowClient", settings: Settings, project: str) -> str:
    known = client.get_experiment_by_name(project)
    if known:
        return str(known.experiment_id)
    remote = settings.tracking_uri.startswith("http")
    place = None if remote else f"{settings.state(project).artifacts('mlflow')}/artifacts"
    return str(client.create_experiment(project, artifact_location=place))


def _log(
    client: "MlflowClient",
    run: str,
    parameters: Mapping[str, Any],
    metrics: Mapping[str, float],
    trials: Sequence[Mapping[str, Any]],
) -> None:
    from mlflow.entities import Metric, Param

    now_ms = int(time.time() * 1000)
    numbers = [Metric(key, value, now_ms, 0) for key, value in metrics.items()]
    numbers += [Metric("trial_score", t["score"], now_ms, t["trial"]) for t in trials]
    given = [Param(key, str(value)) for key, value in parameters.items()]
    client.log_batch(run, metrics=numbers, params=given)
    client.log_dict(run, {"trials": [dict(t) for t in trials]}, "trials.json")


def _find_version(client: "MlflowClient", project: str, number: int) -> int | None:
    found = client.search_model_versions(f"name = '{project}' and tags.`{VERSION}` = '{number}'")
    return int(found[0].version) if found else None


def _create_version(client: "MlflowClient", project: str, version: Version, uri: str) -> int:
    if not client.search_registered_models(f"name = '{project}'"):
        client.create_registered_model(project)
    tags = {VERSION: str(version.number), "digest": version.digest, RUN: version.run_id}
    # The registry points at the bundle: MLflow's own flavour would be a second copy of the model.
    made = client.create_model_version(project, source=uri, tags=tags)
    return int(made.version)


def main() -> int:
    """Set an alias from the command line, so that whoever promotes need not import MLflow."""
    parser = argparse.ArgumentParser(prog="python -m perennial.registry", description=main.__doc__)
    parser.add_argument("command", choices=["alias"])
    parser.add_argument("project", help="name of a project")
    parser.add_argument("version", help="a version such as v2")
    parser.add_argument("alias", help="an alias such as champion")
    asked = parser.parse_args()
    try:
        set_alias(Settings.load(), asked.project, _number(asked.version), asked.alias)
    except PerennialError as exc:
        print(f"perennial.registry: {exc}", file=sys.stderr)
        return exc.exit_code
    return 0


def _number(text: str) -> int:
    digits = text.removeprefix("v")
    if not digits.isdecimal():
        raise BadInput(f"version is {text!r}, wanted one such as v2")
    return int(digits)


if __name__ == "__main__":
    sys.exit(main())
