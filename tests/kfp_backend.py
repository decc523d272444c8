"""A KFP API server over HTTP that checks every request and answers with kfp's own models.

What it does was seen on a real backend (2.17.0) or read in its source: who changes it, look there.
"""

import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kfp_server_api as api
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from perennial.ledger import Ledger
from perennial.steps import notify

GATE = {"record": {"results": [{"passed": True, "reason": "AUC is fine"}]}}
STEPS = ["ingest", "validate", "features", "train", "evaluate", "gate", "register", "deploy"]
UNKNOWN_TIME = datetime(1970, 1, 1, tzinfo=UTC)
PAGE = {"page_token", "page_size", "sort_by", "filter", "namespace", "experiment_id"}
KEYS = {
    "runs": {"display_name", "recurring_run_id", "state", "experiment_id", "run_id"},
    "recurringruns": {"display_name", "recurring_run_id"},
    "pipelines": {"name", "display_name", "pipeline_id"},
    "versions": {"name", "display_name", "pipeline_version_id"},
    "experiments": {"name", "display_name", "experiment_id"},
}

# What a step does on a cluster, of which the fake shows the outside: writing to the ledger, say.
Act = Callable[["FakeRun"], None]


class Answer(Exception):
    """An HTTP answer that is an error, in the shape of the gRPC gateway."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class FakeRun:
    """A run and the engine that works on it: each look at it brings it one step further."""

    run: Any
    plan: dict[str, list[str]]
    parameters: dict[str, Any]
    namespace: str
    workflow: str = "training-x7k2p"
    done: dict[str, str] = field(default_factory=dict)
    begun: dict[str, datetime] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    told: bool = False  # the exit handler ran; it does not run again
    attempts: int = 1

    @property
    def id(self) -> str:
        return str(self.run.run_id)


class FakeKfp:
    """The state behind the API, and what tests want of it."""

    def __init__(self, *, token: str = "", multi_user: bool = False) -> None:
        self.token = token
        self.multi_user = multi_user
        self.requests: list[str] = []
        self.bodies: list[Any] = []
        self.down = False
        self.plan: dict[str, list[str]] = {}  # outcomes of a step, one an attempt; else it succeeds
        self.plan_for: Callable[[dict[str, Any]], dict[str, list[str]]] = lambda _: self.plan
        self.acts: dict[str, Act] = {}  # by step, also "notify"
        self.experiments: dict[str, Any] = {}
        self.pipelines: dict[str, Any] = {}
        self.versions: dict[str, Any] = {}
        self.runs: dict[str, FakeRun] = {}
        self.recurring: dict[str, Any] = {}
        self.host = ""
        self._clock = datetime(2026, 11, 21, 12, tzinfo=UTC)

    def now(self) -> datetime:
        self._clock += timedelta(seconds=1)
        return self._clock

    def fire(self, recurring: str) -> FakeRun:
        """The schedule's time has come."""
        one = self.recurring[recurring]
        run = api.V2beta1Run(
            display_name=f"{one.display_name} 1",
            experiment_id=one.experiment_id,
            pipeline_version_reference=one.pipeline_version_reference,
            runtime_config=one.runtime_config,
            recurring_run_id=recurring,
            service_account=one.service_account,
        )
        return self._begin(run)

    def get_healthz(self, query: dict[str, str]) -> dict[str, Any]:
        return {
            "commit_sha": "4a3592c",
            "tag_name": "2.17.0",
            "multi_user": self.multi_user,
            "pipeline_store": "database",
        }

    def post_experiments(self, query: dict[str, str], body: Any) -> Any:
        wanted = read(body, "V2beta1Experiment")
        self._within(wanted.namespace)
        for known in self.experiments.values():
            if (known.display_name, known.namespace) == (wanted.display_name, wanted.namespace):
                raise Answer(409, f"The name {wanted.display_name} already exists.")
        wanted.experiment_id, wanted.created_at = str(uuid.uuid4()), self.now()
        return self.experiments.setdefault(wanted.experiment_id, wanted)

    def get_experiments(self, query: dict[str, str]) -> Any:
        found = self._listed("experiments", self.experiments.values(), query)
        return api.V2beta1ListExperimentsResponse(experiments=found or None)

    def post_pipelines(self, query: dict[str, str], body: Any) -> Any:
        wanted = read(body, "V2beta1Pipeline")
        self._within(wanted.namespace)
        if not wanted.name:
            raise Answer(400, "name is required")
        if any(p.name == wanted.name for p in self.pipelines.values()):
            raise Answer(409, f"The name {wanted.name} already exist.")
        wanted.pipeline_id, wanted.created_at = str(uuid.uuid4()), self.now()
        return self.pipelines.setdefault(wanted.pipeline_id, wanted)

    def get_pipelines(self, query: dict[str, str]) -> Any:
        found = self._listed("pipelines", self.pipelines.values(), query)
        return api.V2beta1ListPipelinesResponse(pipelines=found or None)

    def post_upload_version(self, query: dict[str, str], body: bytes) -> Any:
        if not set(query) <= {"name", "pipelineid", "display_name", "description", "tags"}:
            raise Answer(400, f"unknown query {sorted(query)}")
        if query.get("pipelineid") not in self.pipelines:
            raise Answer(400, "Failed to create a pipeline version")
        spec = check_spec(documents(body.decode()))
        if any(
            (v.pipeline_id, v.name) == (query["pipelineid"], query["name"])
            for v in self.versions.values()
        ):
            raise Answer(409, "Failed to create a pipeline version")
        made = api.V2beta1PipelineVersion(
            pipeline_id=query["pipelineid"],
            pipeline_version_id=str(uuid.uuid4()),
            name=query["name"],
            display_name=query["name"],
            created_at=self.now(),
            pipeline_spec=spec,
        )
        return self.versions.setdefault(made.pipeline_version_id, made)

    def get_versions(self, query: dict[str, str], pipeline: str) -> Any:
        own = [v for v in self.versions.values() if v.pipeline_id == pipeline]
        found = self._listed("versions", own, query)
        return api.V2beta1ListPipelineVersionsResponse(pipeline_versions=found or None)

    def post_runs(self, query: dict[str, str], body: Any) -> Any:
        run = read(body, "V2beta1Run")
        if run.experiment_id not in self.experiments:
            raise Answer(404, f"Experiment {run.experiment_id} not found.")
        spec = check_spec(run.pipeline_spec) if run.pipeline_spec else None
        if spec is None:
            raise Answer(400, "a run wants a pipeline_spec or a version")
        self._check_parameters(spec, run.runtime_config.parameters)
        return self._begin(run).run

    def get_run(self, query: dict[str, str], run: str) -> Any:
        found = self._run(run)
        self._further(found)
        return found.run

    def get_runs(self, query: dict[str, str]) -> Any:
        found = [r.run for r in reversed(self.runs.values())]
        if query.get("experiment_id"):
            found = [r for r in found if r.experiment_id == query["experiment_id"]]
        else:
            self._within(query.get("namespace"))
        return api.V2beta1ListRunsResponse(runs=self._filtered("runs", found, query) or None)

    def post_terminate(self, query: dict[str, str], run: str) -> dict[str, Any]:
        found = self._run(run)
        if found.run.state not in ("PENDING", "RUNNING"):
            raise Answer(400, f"Failed to terminate a run {run}. Row not found")
        move(found, "CANCELING", self.now())
        return {}

    def post_retry(self, query: dict[str, str], run: str) -> dict[str, Any]:
        found = self._run(run)
        if found.run.state != "FAILED":
            raise Answer(409, "Workflow must be Failed/Error to retry")
        found.done = {n: s for n, s in found.done.items() if s == "SUCCEEDED"}
        found.attempts += 1
        move(found, "RUNNING", self.now())
        found.run.finished_at = UNKNOWN_TIME
        return {}

    def get_log(self, query: dict[str, str], run: str, node: str) -> str:
        found = self._run(run)
        if node in found.logs:
            return found.logs[node]
        # The status was sent before the log was looked for: the error comes as text.
        return json.dumps(
            {
                "error_message": f"Failed to read logs for run {run}",
                "error_details": "BadRequestError: Failed to read logs",
            }
        )

    def post_recurringruns(self, query: dict[str, str], body: Any) -> Any:
        wanted = read(body, "V2beta1RecurringRun")
        if not 1 <= int(wanted.max_concurrency or 0) <= 10:
            raise Answer(
                400, "Max concurrency of a recurring run must be at least 1 and at most 10."
            )
        if len(wanted.trigger.cron_schedule.cron.split()) not in (5, 6):
            raise Answer(400, "Schedule cron is not a supported format")
        if wanted.experiment_id not in self.experiments:
            raise Answer(404, f"Experiment {wanted.experiment_id} not found.")
        version = self.versions.get(wanted.pipeline_version_reference.pipeline_version_id)
        if version is None:
            raise Answer(404, "PipelineVersion not found.")
        self._check_parameters(version.pipeline_spec, wanted.runtime_config.parameters)
        wanted.recurring_run_id, wanted.created_at = str(uuid.uuid4()), self.now()
        wanted.status = "ENABLED" if wanted.mode == "ENABLE" else "DISABLED"
        return self.recurring.setdefault(wanted.recurring_run_id, wanted)

    def get_recurringruns(self, query: dict[str, str]) -> Any:
        found = self._filtered("recurringruns", list(self.recurring.values()), query)
        return api.V2beta1ListRecurringRunsResponse(recurring_runs=found or None)

    def post_enable(self, query: dict[str, str], recurring: str) -> dict[str, Any]:
        self._recurring(recurring).status = "ENABLED"
        return {}

    def post_disable(self, query: dict[str, str], recurring: str) -> dict[str, Any]:
        self._recurring(recurring).status = "DISABLED"
        return {}

    def delete_recurringrun(self, query: dict[str, str], recurring: str) -> dict[str, Any]:
        self._recurring(recurring)
        for run in self.runs.values():
            if run.run.recurring_run_id == recurring:
                run.plan = {step: ["hang"] for step in STEPS}  # its Workflow is gone
        del self.recurring[recurring]
        return {}

    def _begin(self, run: Any) -> FakeRun:
        run.run_id, run.created_at = str(uuid.uuid4()), self.now()
        run.finished_at = UNKNOWN_TIME
        run.state_history = []
        owner = self.experiments[run.experiment_id].namespace or ""
        parameters = dict(run.runtime_config.parameters or {})
        plan = {k: list(v) for k, v in self.plan_for(parameters).items()}
        made = FakeRun(run, plan, parameters, owner)
        move(made, "PENDING", self.now())
        self.runs[made.id] = made
        return made

    def _further(self, found: FakeRun) -> None:
        if found.run.state == "PENDING":
            move(found, "RUNNING", self.now())
        elif found.run.state == "CANCELING":
            self._end(found, "FAILED")
        elif found.run.state == "RUNNING":
            self._next_step(found)
        found.run.run_details = api.V2beta1RunDetails(task_details=self._tasks(found))

    def _next_step(self, found: FakeRun) -> None:
        begun = next((s for s, state in found.done.items() if state == "RUNNING"), None)
        if begun is None:
            left = [step for step in STEPS if step not in found.done]
            if left:
                found.done[left[0]], found.begun[left[0]] = "RUNNING", self.now()
            else:
                self._end(found, "SUCCEEDED")
            return
        outcomes = found.plan.get(begun) or ["ok"]
        self._finish_step(found, begun, outcomes[min(found.attempts, len(outcomes)) - 1])

    def _finish_step(self, found: FakeRun, step: str, outcome: str) -> None:
        if outcome == "hang":
            return
        if step in self.acts:
            self.acts[step](found)
        found.logs[node(found, step)] = log_of(step, outcome)
        found.done[step] = "SUCCEEDED" if outcome == "ok" else "FAILED"
        if outcome != "ok":
            self._end(found, "FAILED")

    def _end(self, found: FakeRun, state: str) -> None:
        for step, at in found.done.items():
            if at == "RUNNING":
                found.done[step] = "FAILED"
        # A hook that ran once stays done: a resumed run does not tell its end again.
        if not found.told and "notify" in self.acts:
            self.acts["notify"](found)
        found.told = True
        found.done["notify"] = "SUCCEEDED"
        found.begun.setdefault("notify", self.now())
        move(found, state, self.now())
        found.run.finished_at = self.now()

    def _tasks(self, found: FakeRun) -> list[Any]:
        inner = {"root": "RUNNING", "root-driver": "SUCCEEDED", "exit-handler-1": found.run.state}
        names: dict[str, str] = {found.workflow: found.run.state, **inner}
        for step, state in found.done.items():
            names |= {f"{step}-driver": "SUCCEEDED", step: state}
        return [self._task(found, name, state) for name, state in sorted(names.items())]

    def _task(self, found: FakeRun, name: str, state: str) -> Any:
        over = state in ("SUCCEEDED", "FAILED")
        begun = found.begun.get(name, found.run.created_at)
        return api.V2beta1PipelineTaskDetail(
            run_id=found.id,
            task_id=str(uuid.uuid4()),
            display_name=name,
            state=state,
            create_time=begun,
            start_time=begun,
            end_time=begun + timedelta(seconds=12) if over else UNKNOWN_TIME,
            child_tasks=[api.PipelineTaskDetailChildTask(pod_name=node(found, name))],
        )

    def _run(self, run: str) -> FakeRun:
        if run not in self.runs:
            raise Answer(404, f"Run {run} not found.")
        return self.runs[run]

    def _recurring(self, recurring: str) -> Any:
        if recurring not in self.recurring:
            raise Answer(404, f"recurring run {recurring} not found.")
        return self.recurring[recurring]

    def _within(self, namespace: str | None) -> None:
        if self.multi_user and not namespace:
            raise Answer(400, "a resource cannot have an empty namespace in multi-user mode")

    def _check_parameters(self, spec: dict[str, Any], given: dict[str, Any] | None) -> None:
        pipeline = spec.get("pipeline_spec", spec)
        known = pipeline["root"]["inputDefinitions"]["parameters"]
        unknown = set(given or {}) - set(known)
        if unknown:
            raise Answer(400, f"unknown parameters {sorted(unknown)}")
        for name in set(known) - set(given or {}):
            if not known[name].get("isOptional"):
                said = "is not optional, yet has neither default value nor user provided value"
                raise Answer(400, f"parameter {name} {said}")

    def _listed(self, kind: str, found: Any, query: dict[str, str]) -> list[Any]:
        if kind != "versions":
            self._within(query.get("namespace"))
            found = [o for o in found if (o.namespace or "") == query.get("namespace", "")]
        return self._filtered(kind, list(found), query)

    def _filtered(self, kind: str, found: list[Any], query: dict[str, str]) -> list[Any]:
        if not set(query) <= PAGE:
            raise Answer(400, f"unknown query {sorted(set(query) - PAGE)}")
        wanted = read(json.loads(query.get("filter") or "{}"), "V2beta1Filter").predicates or []
        for predicate in wanted:
            if predicate.key not in KEYS[kind]:
                raise Answer(400, f"Invalid filter: {predicate.key} is no field of {kind}")
            name = "name" if kind == "pipelines" and predicate.key == "name" else predicate.key
            found = [o for o in found if getattr(o, name, None) == predicate.string_value]
        return found


def move(found: FakeRun, state: str, at: datetime) -> None:
    found.run.state = state
    found.run.state_history.append(api.V2beta1RuntimeStatus(update_time=at, state=state))


def node(found: FakeRun, name: str) -> str:
    """The engine's id of a node: the workflow's name and a number."""
    return f"{found.workflow}-{sum(map(ord, name)) * 7919}"


def log_of(step: str, outcome: str) -> str:
    """The log of a step's main container, with what kfp's launcher writes around it."""
    head = f"I1121 12:00:00.000000       1 launcher_v2.go:90] input ComponentSpec: {step}\n"
    if outcome == "ok":
        return head + "done\n"
    if outcome == "killed":
        return head + "F1121 12:00:01.0 1 main.go:49] failed to execute component: signal: killed\n"
    trace = f'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n{outcome}\n'
    return (
        head + trace + "F1121 12:00:01.0 1 main.go:49] failed to execute component: exit status 1\n"
    )


def read(body: Any, kind: str) -> Any:
    """A body as kfp's own model; a field that the model has not is refused, as protojson does."""
    client = api.ApiClient()
    found = client.deserialize(SimpleNamespace(data=json.dumps(body)), kind)
    again = client.sanitize_for_serialization(found)
    if again != body:
        raise Answer(400, f"proto: unknown field or wrong type in {kind}: {differing(body, again)}")
    return found


def differing(body: Any, again: Any) -> str:
    return ", ".join(sorted(k for k in body if body.get(k) != (again or {}).get(k)))


def documents(text: str) -> dict[str, Any]:
    found = list(yaml.safe_load_all(text))
    return found[0] if len(found) == 1 else {"pipeline_spec": found[0], "platform_spec": found[1]}


def check_spec(spec: dict[str, Any]) -> dict[str, Any]:
    """A spec must be what the protocol buffers say, with nothing beside."""
    pipeline, platform = spec, None
    if "pipeline_spec" in spec:
        if not set(spec) <= {"pipeline_spec", "platform_spec"}:
            raise Answer(400, f"unknown template format: {sorted(spec)}")
        pipeline, platform = spec["pipeline_spec"], spec.get("platform_spec")
    try:
        json_format.ParseDict(pipeline, pipeline_spec_pb2.PipelineSpec())
        if platform:
            json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
    except json_format.ParseError as exc:
        raise Answer(400, f"unknown template format: {exc}") from exc
    return spec


def acts(ledger: Ledger) -> dict[str, Act]:
    """Steps that write to the ledger what ours write there, by name."""

    def begin(run: FakeRun) -> None:
        asked = {name: run.parameters.get(name) for name in ("trigger", "as_of")}
        _write(ledger, "run.started", run, **asked)

    return {
        "ingest": begin,
        "gate": lambda run: _write(ledger, "gate", run, **GATE),
        "notify": lambda run: _tell_end(ledger, run),
    }


def failing(ledger: Ledger, reason: str, step: str = "train") -> Act:
    """A step that writes to the ledger why it failed."""
    return lambda run: _write(ledger, "step.failed", run, step=step, reason=reason)


def _write(ledger: Ledger, kind: str, run: FakeRun, **body: object) -> None:
    told = {"run": run.id, **body}
    ledger.append(kind, project="retail", subject=run.id, body=told, now=datetime.now(UTC))


def _tell_end(ledger: Ledger, run: FakeRun) -> None:
    """What the exit handler does, with what a backend tells it."""
    name = SimpleNamespace(name="retail")
    ctx = SimpleNamespace(
        ledger=ledger, engine=ledger._engine, project=name, run=run.id, now=datetime.now(UTC)
    )
    notify.notify(ctx, "FAILED" if "FAILED" in run.done.values() else "COMPLETE", "")


ROUTES = [
    ("GET", r"/apis/v2beta1/healthz", "get_healthz"),
    ("POST", r"/apis/v2beta1/experiments", "post_experiments"),
    ("GET", r"/apis/v2beta1/experiments", "get_experiments"),
    ("POST", r"/apis/v2beta1/pipelines", "post_pipelines"),
    ("GET", r"/apis/v2beta1/pipelines", "get_pipelines"),
    ("POST", r"/apis/v2beta1/pipelines/upload_version", "post_upload_version"),
    ("GET", r"/apis/v2beta1/pipelines/([^/:]+)/versions", "get_versions"),
    ("POST", r"/apis/v2beta1/runs", "post_runs"),
    ("GET", r"/apis/v2beta1/runs", "get_runs"),
    ("GET", r"/apis/v2beta1/runs/([^/:]+)", "get_run"),
    ("POST", r"/apis/v2beta1/runs/([^/:]+):terminate", "post_terminate"),
    ("POST", r"/apis/v2beta1/runs/([^/:]+):retry", "post_retry"),
    ("GET", r"/apis/v1alpha1/runs/([^/]+)/nodes/([^/]+)/log", "get_log"),
    ("POST", r"/apis/v2beta1/recurringruns", "post_recurringruns"),
    ("GET", r"/apis/v2beta1/recurringruns", "get_recurringruns"),
    ("POST", r"/apis/v2beta1/recurringruns/([^/:]+):enable", "post_enable"),
    ("POST", r"/apis/v2beta1/recurringruns/([^/:]+):disable", "post_disable"),
    ("DELETE", r"/apis/v2beta1/recurringruns/([^/:]+)", "delete_recurringrun"),
]


def handler(fake: FakeKfp) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None: ...

        def answer(self) -> None:
            if fake.down:
                self.close_connection = True
                return
            parts = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fake.requests.append(f"{self.command} {parts.path}")
            try:
                self.check()
                status, said = 200, self.routed(parts.path, parts.query, body)
            except Answer as exc:
                status = exc.status
                said = {"code": status, "message": str(exc), "details": []}
            self.send(status, said)

        def check(self) -> None:
            """Single-user mode has no authentication at all."""
            given = self.headers.get("Authorization", "")
            if fake.multi_user and given != f"Bearer {fake.token}":
                raise Answer(401, "Request header error: there is no valid token")

        def routed(self, path: str, query: str, body: bytes) -> Any:
            asked = {k: v[0] for k, v in parse_qs(query).items()}
            for method, pattern, name in ROUTES:
                found = re.fullmatch(pattern, path)
                if method == self.command and found:
                    return getattr(fake, name)(asked, *found.groups(), *self.given(name, body))
            if self.command in ("PUT", "PATCH"):
                raise Answer(501, "Method Not Allowed")
            raise Answer(404, f"Not Found: {self.command} {path}")

        def given(self, name: str, body: bytes) -> list[Any]:
            if name == "post_upload_version":
                return [self.uploaded(body)]
            if not body:
                return []
            fake.bodies.append(json.loads(body))
            return [fake.bodies[-1]]

        def uploaded(self, body: bytes) -> bytes:
            head = f"Content-Type: {self.headers['Content-Type']}\n\n".encode()
            parts = message_from_bytes(head + body).get_payload()
            (file,) = [
                p
                for p in parts
                if p.get_param("name", header="content-disposition") == "uploadfile"
            ]
            return bytes(file.get_payload(decode=True))

        def send(self, status: int, said: Any) -> None:
            plain = (
                said
                if isinstance(said, str)
                else json.dumps(api.ApiClient().sanitize_for_serialization(said))
            )
            data = plain.encode()
            self.send_response(status)
            kind = "text/plain" if isinstance(said, str) else "application/json"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = do_PUT = do_PATCH = answer

    return Handler


@contextmanager
def serving(fake: FakeKfp) -> Iterator[FakeKfp]:
    """The fake behind a port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(fake))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    fake.host = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
