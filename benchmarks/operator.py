"""What do 200 ModelRollouts cost the operator: time to settle, memory, calls while steady?"""

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import ROOT, Figure
from perennial.records import Phase
from perennial.store import rollouts
from perennial.store.engine import make_engine

PROJECTS, STEADY_S, PATIENCE_S = 200, 120.0, 600.0
HOME = "/apis/{}/namespaces/bench/{}"
ROLLOUTS = HOME.format("perennial.dev/v1alpha1", "modelrollouts")
SERVICES = HOME.format("serving.kserve.io/v1beta1", "inferenceservices")
KNATIVE = HOME.format("serving.knative.dev/v1", "services")
REVISIONS = HOME.format("serving.knative.dev/v1", "revisions")


class ApiServer:
    """A stand-in that keeps objects in memory and makes each InferenceService ready at once.

    Pods of 200 models would need a machine room; what the operator asks is the same.
    """

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.calls: Counter[str] = Counter()
        self.lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[str]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        if path in self.objects:
            return 200, self.objects[path]
        if path in (ROLLOUTS, SERVICES) or path.endswith("/pods"):
            found = [o for where, o in list(self.objects.items()) if where.startswith(f"{path}/")]
            return 200, {"kind": "List", "metadata": {"resourceVersion": "1"}, "items": found}
        return 404, {"kind": "Status", "code": 404, "message": "not found"}

    def put(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        body["metadata"] |= {"generation": 1, "resourceVersion": "1", "uid": path}
        self.objects[path] = body
        if path.startswith(SERVICES):
            self._make_ready(path.rpartition("/")[2], body)
        return 200, body

    def tell(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.objects[path]["status"] = body["status"]
        return 200, self.objects[path]

    def _make_ready(self, name: str, body: dict[str, Any]) -> None:
        """What KServe and Knative would say once everything is up."""
        labels = body["spec"]["predictor"]["labels"]
        revision = f"{name}-predictor-00001"
        meta = {"name": revision, "labels": labels}
        ready = [{"type": "Ready", "status": "True"}, {"type": "RoutesReady", "status": "True"}]
        self.objects[f"{REVISIONS}/{revision}"] = {
            "metadata": meta,
            "status": {"conditions": ready},
        }
        known = {"latestCreatedRevision": revision, "latestReadyRevision": revision}
        body["status"] = {
            "components": {"predictor": {**known, "latestRolledoutRevision": revision}}
        }
        self.objects[f"{KNATIVE}/{name}-predictor"] = {
            "metadata": {"name": f"{name}-predictor", "generation": 1},
            "spec": {"template": {"metadata": {"labels": labels}}, "traffic": [{"percent": 100}]},
            "status": {
                "observedGeneration": 1,
                "conditions": ready,
                "latestCreatedRevisionName": revision,
                "latestReadyRevisionName": revision,
                "traffic": [{"revisionName": revision, "percent": 100, "latestRevision": True}],
            },
        }


def _handler(api: ApiServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            if "watch=true" in query or "watch=1" in query:
                return self._watch(path)
            return self._send(path, *self._known(path, api.get, path))

        def do_POST(self) -> None:
            body = self._body()
            path = f"{self.path.partition('?')[0]}/{body['metadata']['name']}"
            self._send(path, *self._known(path, api.put, path, body))

        def do_PATCH(self) -> None:
            path = self.path.partition("?")[0].removesuffix("/status")
            self._send(path, *self._known(path, api.tell, path, self._body()))

        def _known(self, path: str, act: Any, *args: Any) -> Any:
            if path.startswith("/apis/") and path.count("/") == 3:
                return 200, _resources(path)
            with api.lock:
                api.calls[f"{self.command} {path.split('/')[-2]}"] += 1
                return act(*args)

        def _watch(self, _path: str) -> None:
            # Nothing changes from outside while this runs.
            self.send_response(200)
            self.end_headers()
            time.sleep(PATIENCE_S)

        def _body(self) -> dict[str, Any]:
            text = self.rfile.read(int(self.headers["content-length"]))
            return dict(yaml.safe_load(text) if b"{" not in text[:1] else json.loads(text))

        def _send(self, _path: str, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Counted, not printed."""

    return Handler


def _resources(path: str) -> dict[str, Any]:
    """What the server says that it knows, for kopf."""
    plurals = {"perennial.dev": ("modelrollouts", "ModelRollout")}
    plurals["serving.kserve.io"] = ("inferenceservices", "InferenceService")
    group, version = path.split("/")[2:4]
    plural, kind = plurals.get(group, ("none", "None"))
    verbs = ["get", "list", "watch", "create", "patch"]
    one = {"name": plural, "singularName": kind.lower(), "kind": kind, "namespaced": True}
    known = [{**one, "verbs": verbs}]
    return {"kind": "APIResourceList", "groupVersion": f"{group}/{version}", "resources": known}


def figures(folder: Path) -> list[Figure]:
    """Start the real process against the stand-in, and look at it from outside."""
    url = f"sqlite:///{folder}/state.db"
    wish_all(url)
    api = ApiServer()
    with api.running() as server, _operator(folder, server, url) as process:
        began = time.monotonic()
        _until(lambda: _settled(url, api), process)
        settled_s = time.monotonic() - began
        time.sleep(5)
        calls, cpu_s = sum(api.calls.values()), _cpu_s(process.pid)
        time.sleep(STEADY_S)
        steady = sum(api.calls.values()) - calls
        share = (_cpu_s(process.pid) - cpu_s) / STEADY_S
        peak = _peak_mib(process.pid)
    minute = steady / PROJECTS / (STEADY_S / 60)
    what = f"operator, {PROJECTS} first ModelRollouts (stand-in API server, SQLite)"
    return [
        Figure(f"{what}: from wishes to all of them told", f"{settled_s:.1f} s, {calls:,} calls"),
        Figure(
            f"{what}: memory, peak (without the process that tells MLflow)",
            f"{peak:.0f} MiB",
            "<= 256 MiB",
            peak <= 256,
        ),
        Figure(
            f"{what}: calls of a steady one", f"{minute:.3f} a minute", "<= 1 a minute", minute <= 1
        ),
        Figure(f"{what}: a core while all are steady", f"{share:.1%}"),
    ]


def wish_all(url: str) -> None:
    """One first model for each project."""
    engine = make_engine(url)
    for number in range(PROJECTS):
        rollouts.wish(
            engine,
            project=f"model-{number}",
            version=1,
            digest=f"sha256:{number:064x}",
            bundle_uri=f"s3://bench/{number}",
            run_id="bench",
        )
    engine.dispose()


@contextmanager
def _operator(folder: Path, server: str, url: str) -> Iterator[subprocess.Popen[bytes]]:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "bench",
        "clusters": [{"name": "bench", "cluster": {"server": server}}],
        "users": [{"name": "bench", "user": {"token": "none"}}],
        "contexts": [{"name": "bench", "context": {"cluster": "bench", "user": "bench"}}],
    }
    file = folder / "kubeconfig"
    file.write_text(yaml.safe_dump(config))
    env = {
        "PATH": "/usr/bin:/bin",
        "KUBECONFIG": str(file),
        "PERENNIAL_NAMESPACE": "bench",
        "PERENNIAL_STATE_URL": url,
        "PERENNIAL_ROOT": str(ROOT),
        "PERENNIAL_HOME": str(folder),
        "PERENNIAL_SINK": "http://nobody.invalid/",
    }
    # One core, as a pod has it; telling MLflow is another process and not measured.
    command = ["taskset", "-c", "0", sys.executable, "-m", "perennial.rollout.operator"]
    command += ["--health-port=0", "--no-registry"]
    with (folder / "operator.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _settled(url: str, api: ApiServer) -> bool:
    engine = make_engine(url)
    open_ones = rollouts.open_projects(engine)
    engine.dispose()
    told = [o for path, o in list(api.objects.items()) if path.startswith(ROLLOUTS)]
    done = [o for o in told if o.get("status", {}).get("phase") == str(Phase.PROMOTED).title()]
    return not open_ones and len(done) == PROJECTS


def _until(is_so: Any, process: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + PATIENCE_S
    while not is_so():
        if time.monotonic() > limit or process.poll() is not None:
            raise SystemExit("the operator did not settle; its log says why")
        time.sleep(0.5)


def _peak_mib(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    line = next(row for row in text.splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        for figure in figures(Path(name)):
            print(figure)
