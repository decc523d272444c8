"""Small model servers for pods: they answer with their revision, and can be told to be bad."""

from typing import Any

from adapters import ERRORS, NEVER_READY

from perennial.records import LATENCY_BOUNDS_MS, RolloutState
from perennial.rollout import manifest, plan

Document = dict[str, Any]

SERVER = """
import json, os, signal, sys, threading
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REVISION, FAULT, PORT = os.environ["REVISION"], os.environ["FAULT"], int(os.environ["LISTEN"])
INVALID = "perennial_invalid_outputs_total"
COUNTS, LOCK = {"ok": 0, "client": 0, "model": 0, "platform": 0}, threading.Lock()


def counted():
    # What a real server's page says of its requests; every answer took 2.5 ms.
    requests = [f'perennial_requests_total{{cause="{k}",model_name="retail"}} {v}.0'
                for k, v in COUNTS.items()]
    done = COUNTS["ok"] + COUNTS["platform"]
    seconds = [f'perennial_request_seconds_bucket{{le="{b / 1000}",model_name="retail"}} '
               f"{float(done if b > 2 else 0)}" for b in BOUNDS]
    return "\\n".join([*requests, *seconds, ""])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length") or 0))
        with LOCK:
            COUNTS["platform" if FAULT == "errors" else "ok"] += 1
        self.answer(500 if FAULT == "errors" else 200)

    def do_GET(self):
        self.answer(200)

    def answer(self, status):
        page = f'# TYPE {INVALID} counter\\n{INVALID}{{model_name="retail"}} 0.0\\n'
        page += counted()
        told = json.dumps({"model_name": "retail", "model_version": REVISION})
        body = (page if self.path == "/metrics" else told).encode()
        head = f"HTTP/1.1 {status} x\\r\\ncontent-length: {len(body)}\\r\\n\\r\\n"
        self.wfile.write(head.encode() + body)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def answer_calls():
    import grpc

    def call(request, context):
        return REVISION.encode()

    calls = grpc.server(futures.ThreadPoolExecutor(4))
    method = grpc.unary_unary_rpc_method_handler(call)
    service = "inference.GRPCInferenceService"
    found = grpc.method_handlers_generic_handler(service, {"ModelInfer": method})
    calls.add_generic_rpc_handlers((found,))
    calls.add_insecure_port(f"0.0.0.0:{PORT + 1}")
    calls.start()
    return calls


if FAULT == "never ready":
    sys.exit("it was told to end")
calls = answer_calls() if os.environ.get("CALLS") else None
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
Server(("0.0.0.0", PORT), Handler).serve_forever()
"""

RESTRICTED = {
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def inference_service(
    state: RolloutState, name: str, namespace: str, mode: str, image: str, fault: str
) -> Document:
    """An InferenceService with the labels that a real one has, and small servers inside."""
    labels = {manifest.PROJECT: state.project}
    of_pods = {manifest.REVISION: plan.name(state), manifest.ROLLOUT: str(state.id)}
    probe = {"httpGet": {"path": "/ready", "port": 8080}, "periodSeconds": 1}
    door = {"ports": [{"containerPort": 8080, "protocol": "TCP"}], "readinessProbe": probe}
    transformer = _container(manifest.TRANSFORMER, image, plan.name(state), fault, 8080)
    beside = _container(manifest.PREDICTOR, image, plan.name(state), "", 8085)
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": labels,
            "annotations": {manifest.MODE: mode},
        },
        "spec": {
            "predictor": {
                "minReplicas": 1,
                "maxReplicas": 1,
                "automountServiceAccountToken": False,
                "labels": {**labels, **of_pods},
                "containers": [beside, {**transformer, **door}],
            }
        },
    }


def _container(name: str, image: str, revision: str, fault: str, port: int) -> Document:
    wanted = {"REVISION": revision, "FAULT": fault, "LISTEN": str(port)}
    calls = {"CALLS": "1"} if name == manifest.TRANSFORMER else {}
    return {
        "name": name,
        "image": image,
        "command": ["python", "-c", f"BOUNDS = {LATENCY_BOUNDS_MS}\n{SERVER}"],
        "env": [{"name": k, "value": v} for k, v in {**wanted, **calls}.items()],
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "resources": {
            "requests": {"cpu": "10m", "memory": "32Mi"},
            "limits": {"cpu": "500m", "memory": "128Mi"},
        },
        "securityContext": RESTRICTED,
    }


assert f'"{ERRORS}"' in SERVER and f'"{NEVER_READY}"' in SERVER
