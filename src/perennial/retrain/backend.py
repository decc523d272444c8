"""How is a KFP backend asked, and what does its refusal mean in one sentence?

Known of the real one (2.17.0), and the reason for much that is here: a run's end tells no reason,
its log is at an address of an older API, terminating ends in FAILED, a missing image stays RUNNING
for ever, and a recurring run cannot be changed.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import urllib3
import yaml

from perennial.errors import BadInput, PerennialError, Unavailable
from perennial.retrain import answers
from perennial.retrain.answers import Recurring, Run, Task, Uploaded, Wanted
from perennial.settings import Settings, in_pod

TIMEOUT_S = (5.0, 60.0)  # to connect, to answer
PAGE = 100
_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_NO_HOST = "http://localhost"  # what kfp falls back to when it found nothing
_REMEDY = (
    "set PERENNIAL_KFP_ENDPOINT, such as http://127.0.0.1:8888 behind"
    " 'kubectl port-forward -n kubeflow svc/ml-pipeline 8888'"
)


class Refused(BadInput):
    """The backend understood and refused; ``status`` is its HTTP code."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Backend:
    """A KFP backend, asked with time limits; its errors are ours, in one sentence."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @property
    def host(self) -> str:
        return str(self._client._existing_config.host)

    @cached_property
    def health(self) -> dict[str, Any]:
        """What the backend says of itself: tag_name, commit_sha, multi_user."""
        return dict(json.loads(self._text("/apis/v2beta1/healthz")))

    @cached_property
    def namespace(self) -> str:
        """The namespace of our runs; empty where the backend serves one user."""
        if not self.health.get("multi_user"):
            return ""
        found = self._settings.namespace or _pod_namespace()
        if not found:
            raise BadInput(
                f"the KFP backend at {self.host} serves many users;"
                " set PERENNIAL_NAMESPACE to the namespace of your profile"
            )
        return found

    def experiment(self, name: str) -> str:
        """Id of the experiment of this name, made when there is none."""
        known = self._experiment(name)
        if known:
            return known
        wanted = _models().V2beta1Experiment(display_name=name, namespace=self.namespace or None)
        with _made_by_another():
            made = self._call("_experiment_api", "experiment_service_create_experiment", wanted)
            return str(made.experiment_id)
        return str(self._experiment(name))

    def experiments(self, name: str) -> list[str]:
        """Ids of the experiments of this name, without making one."""
        known = self._experiment(name)
        return [known] if known else []

    def submit(
        self, experiment: str, name: str, spec: dict[str, Any], parameters: dict[str, Any]
    ) -> str:
        """Start a run of a spec; gives its id."""
        models = _models()
        run = models.V2beta1Run(
            experiment_id=experiment,
            display_name=name,
            pipeline_spec=spec,
            runtime_config=models.V2beta1RuntimeConfig(parameters=parameters),
            service_account=self._settings.kfp_service_account,
        )
        return str(self._call("_run_api", "run_service_create_run", run).run_id)

    def run(self, run: str) -> Run:
        """One run with its tasks. Raises Refused when there is none of this id."""
        return answers.run(self._call("_run_api", "run_service_get_run", run))

    def runs(self, experiment: str = "", **equal: str) -> Iterator[Run]:
        """Runs, newest first, whose fields are equal to what is given."""
        where = {"experiment_id": experiment} if experiment else self._within
        yield from map(
            answers.run,
            self._pages("_run_api", "run_service_list_runs", "runs", **where, **_filter(equal)),
        )

    def find(self, start: str) -> str:
        """Id of the one run whose id begins so."""
        if len(start) == 36:
            return start
        found = {run.id for run in self.runs() if run.id.startswith(start)}
        if len(found) != 1:
            many = "several runs begin" if found else "no run begins"
            raise BadInput(f"{many} with {start!r} on the KFP backend at {self.host}")
        return found.pop()

    def terminate(self, run: str) -> None:
        """Ask for a run's end; it comes a little later, as FAILED."""
        self._call("_run_api", "run_service_terminate_run", run)

    def retry(self, run: str) -> None:
        """Resume a failed run at the step that failed."""
        self._call("_run_api", "run_service_retry_run", run)

    def log(self, run: str, task: Task) -> str:
        """What a task wrote; empty where nothing was kept."""
        found = [self._node_log(run, node) for node in task.children]
        return "".join(found)

    def upload(self, pipeline: str, version: str, spec: Path) -> Uploaded:
        """Make a version of a pipeline known; one of the same name is taken for the same."""
        known = self._pipeline(pipeline) or self._new_pipeline(pipeline)
        with _made_by_another():
            made = self._call(
                "_upload_api",
                "upload_pipeline_version",
                str(spec),
                name=version,
                pipelineid=known,
            )
            return Uploaded(known, str(made.pipeline_version_id), version, new=True)
        return Uploaded(known, self._version(known, version), version, new=False)

    def recurring(self, experiment: str, name: str) -> list[Recurring]:
        """All recurring runs of this name: a backend takes several."""
        found = self._pages(
            "_recurring_run_api",
            "recurring_run_service_list_recurring_runs",
            "recurring_runs",
            experiment_id=experiment,
            **_filter({"display_name": name}),
        )
        return [answers.recurring(one) for one in found]

    def enable(self, recurring: str, on: bool) -> None:
        """Let a recurring run fire, or not."""
        verb = "enable" if on else "disable"
        self._call("_recurring_run_api", f"recurring_run_service_{verb}_recurring_run", recurring)

    def delete(self, recurring: str) -> None:
        """Forget a recurring run; its running Workflows go with it, so drain it first."""
        self._call("_recurring_run_api", "recurring_run_service_delete_recurring_run", recurring)

    def recur(self, experiment: str, wanted: Wanted) -> str:
        """Make a recurring run: one at a time, and none to make up for missed ones."""
        api = _models()
        body = api.V2beta1RecurringRun(
            display_name=wanted.name,
            experiment_id=experiment,
            mode=api.RecurringRunMode.ENABLE,
            max_concurrency="1",
            no_catchup=True,
            trigger=api.V2beta1Trigger(cron_schedule=api.V2beta1CronSchedule(cron=wanted.cron)),
            pipeline_version_reference=api.V2beta1PipelineVersionReference(
                pipeline_id=wanted.pipeline, pipeline_version_id=wanted.version
            ),
            runtime_config=api.V2beta1RuntimeConfig(parameters=wanted.parameters),
            service_account=self._settings.kfp_service_account,
        )
        made = self._call("_recurring_run_api", "recurring_run_service_create_recurring_run", body)
        return str(made.recurring_run_id)

    @property
    def _within(self) -> dict[str, str]:
        return {"namespace": self.namespace} if self.namespace else {}

    def _experiment(self, name: str) -> str | None:
        found = self._pages(
            "_experiment_api",
            "experiment_service_list_experiments",
            "experiments",
            **self._within,
            **_filter({"display_name": name}),
        )
        return next((str(e.experiment_id) for e in found), None)

    def _pipeline(self, name: str) -> str | None:
        found = self._pages(
            "_pipelines_api",
            "pipeline_service_list_pipelines",
            "pipelines",
            **self._within,
            **_filter({"name": name}),
        )
        return next((str(p.pipeline_id) for p in found), None)

    def _new_pipeline(self, name: str) -> str:
        """A pipeline without a version: an upload would bring one of the pipeline's name."""
        wanted = _models().V2beta1Pipeline(
            name=name, display_name=name, namespace=self.namespace or None
        )
        with _made_by_another():
            made = self._call("_pipelines_api", "pipeline_service_create_pipeline", wanted)
            return str(made.pipeline_id)
        return str(self._pipeline(name))

    def _version(self, pipeline: str, name: str) -> str:
        found = self._pages(
            "_pipelines_api",
            "pipeline_service_list_pipeline_versions",
            "pipeline_versions",
            pipeline,
            **_filter({"name": name}),
        )
        return next(str(v.pipeline_version_id) for v in found)

    def _node_log(self, run: str, node: str) -> str:
        text = self._text("/apis/v1alpha1/runs/{run}/nodes/{node}/log", {"run": run, "node": node})
        # The answer begins with 200 whatever comes: an error is told in the text.
        head, _, _ = text.rpartition('{"error_message"')
        return head if '{"error_message"' in text else text

    def _pages(self, api: str, method: str, field: str, *args: str, **given: str) -> Iterator[Any]:
        token = ""
        while True:
            page = self._call(
                api,
                method,
                *args,
                page_size=PAGE,
                page_token=token,
                sort_by="created_at desc",
                **given,
            )
            yield from getattr(page, field) or []
            token = page.next_page_token or ""
            if not token:
                return

    def _call(self, api: str, method: str, *args: Any, **given: Any) -> Any:
        call: Callable[..., Any] = getattr(getattr(self._client, api), method)
        return self._asked(call, *args, _request_timeout=TIMEOUT_S, **given)

    def _text(self, path: str, parts: dict[str, str] | None = None) -> str:
        """A page that the generated client has no method for, or not all fields of."""
        answer = self._asked(
            self._client._run_api.api_client.call_api,
            path,
            "GET",
            path_params=parts,
            header_params={"Accept": "*/*"},
            auth_settings=["Bearer"],
            _preload_content=False,
            _return_http_data_only=True,
            _request_timeout=TIMEOUT_S,
        )
        return str(answer.data.decode(errors="replace"))

    def _asked(self, call: Callable[..., Any], *args: Any, **given: Any) -> Any:
        try:
            return call(*args, **given)
        except _models().ApiException as exc:
            raise _translated(self.host, exc.status, exc.body, str(exc.reason)) from exc
        except urllib3.exceptions.HTTPError as exc:
            why = getattr(exc, "reason", None) or exc
            name = type(why).__name__
            raise Unavailable(
                f"the KFP backend at {self.host} does not answer ({name}); {_REMEDY}"
            ) from exc
        except OSError as exc:
            raise Unavailable(f"the token for the KFP backend cannot be read: {exc}") from exc

    @cached_property
    def _client(self) -> Any:
        return _connect(self._settings)


@contextmanager
def _made_by_another() -> Iterator[None]:
    """Go on where a name is taken already: whoever was first meant the same."""
    try:
        yield
    except Refused as exc:
        if exc.status != 409:
            raise


def read_spec(text: str) -> dict[str, Any]:
    """A compiled spec as the API takes it: pipeline and platform apart, where there are both."""
    documents = list(yaml.safe_load_all(text))
    if len(documents) == 1:
        return dict(documents[0])
    return {"pipeline_spec": documents[0], "platform_spec": documents[1]}


def _models() -> Any:
    """The generated models, imported late: they take a second."""
    import kfp_server_api  # type: ignore[import-untyped]

    return kfp_server_api


def _connect(settings: Settings) -> Any:
    from kfp.client import client as kfp_client
    from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials

    class Client(kfp_client.Client):
        """Finds endpoint and credentials as kfp does; asks nothing and writes no file."""

        def get_kfp_healthz(self, sleep_duration: int = 5) -> Any:
            return _models().V2beta1GetHealthzResponse(multi_user=False)

    token = settings.kfp_token
    if token and not token.is_file():
        raise BadInput(f"PERENNIAL_KFP_TOKEN is {token}, and there is no such file")
    credentials = ServiceAccountTokenVolumeCredentials(str(token) if token else None)
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        client = Client(
            host=settings.kfp_endpoint or _in_pod(settings),
            namespace=settings.kfp_namespace,
            credentials=credentials if Path(credentials._token_path).is_file() else None,
            ssl_ca_cert=str(settings.kfp_ca) if settings.kfp_ca else None,
        )
    if client._existing_config.host == _NO_HOST:
        raise BadInput(f"no KFP backend is configured; {_REMEDY}")
    return client


def _pod_namespace() -> str:
    return _POD.read_text(encoding="utf-8").strip() if _POD.is_file() else ""


def _in_pod(settings: Settings) -> str | None:
    # kfp itself asks for a token of the API server, which our pods have only where they need it.
    if not in_pod():
        return None
    return f"http://ml-pipeline.{settings.kfp_namespace}.svc.cluster.local:8888"


def _translated(host: str, status: int | None, body: Any, reason: str) -> PerennialError:
    said = _message(body) or reason
    where = f"the KFP backend at {host}"
    if status in (401, 403):
        remedy = "give a token by PERENNIAL_KFP_TOKEN, or the right in that namespace"
        return Refused(status, f"{where} does not let us: {said}; {remedy}")
    if status and 400 <= status < 500 or status == 501:
        return Refused(status, f"{where} refuses: {said}")
    return Unavailable(f"{where} failed ({status or 'no HTTP'}): {said}")


def _message(body: Any) -> str:
    """The one sentence in an answer's body, of which there are two shapes."""
    try:
        told = json.loads(body or "{}")
        text = told.get("message") or told.get("error_message") or told.get("error") or ""
    except (ValueError, AttributeError):
        text = str(body)
    return " ".join(str(text).split())[:300]


def _filter(equal: dict[str, str]) -> dict[str, str]:
    if not equal:
        return {}
    predicates = [
        {"operation": "EQUALS", "key": key, "string_value": value} for key, value in equal.items()
    ]
    return {"filter": json.dumps({"predicates": predicates})}
