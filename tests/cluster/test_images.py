"""Each image runs as nobody, installs nothing, and holds nothing to install or build with."""

import json
import os
import time
from typing import Any

import pytest

from perennial.retrain import job

pytestmark = pytest.mark.cluster

IMAGES = {
    "core": os.environ.get("PERENNIAL_TEST_IMAGE", "dev.local/perennial:0.1.0-python3.11"),
    "serving": os.environ.get(
        "PERENNIAL_TEST_SERVING_IMAGE", "dev.local/perennial-serving:0.1.0-python3.11"
    ),
}
MODULES = {
    "core": [
        *("perennial.retrain.inpod", "perennial.store.migrate", "perennial.retrain.service"),
        *("kfp", "mlflow", "feast", "great_expectations", "kopf", "lightkube", "psycopg", "shap"),
    ],
    "serving": ["perennial.serving.transformer", "perennial.serving.predictor", "alibi_detect.cd"],
}
# A kubelet tells of a new image with its next report but a few.
REPORTED_S = 300.0
MOST_BYTES = {"core": 2.0e9, "serving": 1.9e9}

# What the image says of itself, from inside; it needs no network to say so.
AUDIT = """
import importlib, importlib.util, json, os, pathlib, re, shutil, stat, sys

TOOLS = ("pip pip3 uv uvx conda apt apt-get gcc g++ cc c++ clang ld as make cmake cargo go git "
         "curl wget").split()
SETTINGS = re.compile(rb"index[-_]url|extra[-_]index|find[-_]links|trusted[-_]host")
NAMES = {"pip.conf", "uv.toml", ".netrc", ".pypirc", "direct_url.json"}
found = {"settings": [], "tools": [], "setuid": [], "writable": []}
for top, folders, files in os.walk("/"):
    folders[:] = [f for f in folders if os.path.join(top, f) not in ("/proc", "/sys", "/dev")]
    for name in files:
        path = os.path.join(top, name)
        try:
            mode = os.lstat(path).st_mode
        except OSError:
            continue
        if name in TOOLS and mode & stat.S_IXUSR:
            found["tools"].append(path)
        if name in NAMES:
            found["settings"].append(path)
        if stat.S_ISREG(mode) and mode & (stat.S_ISUID | stat.S_ISGID):
            found["setuid"].append(path)
        odd = top.startswith("/etc") or name.endswith((".cfg", ".ini", ".toml", ".conf"))
        if odd and stat.S_ISREG(mode) and os.access(path, os.R_OK):
            if SETTINGS.search(pathlib.Path(path).read_bytes()):
                found["settings"].append(path)
    if os.access(top, os.W_OK):
        found["writable"].append(top)
for module in MODULES:
    importlib.import_module(module)
spec = importlib.util.find_spec("perennial")
cached = importlib.util.cache_from_source(spec.origin)
print("AUDIT " + json.dumps({
    **found,
    "user": [os.getuid(), os.getgid()],
    "installers": [m for m in ("pip", "ensurepip") if importlib.util.find_spec(m)],
    "environment": [k for k in os.environ if re.match("PIP_|UV_|.*_proxy$", k, re.I)],
    "compiled": os.path.exists(cached),
    "root": os.environ["PERENNIAL_ROOT"],
    "envoy": shutil.which("envoy"),
    "token": os.path.exists("/var/run/secrets/kubernetes.io/serviceaccount/token"),
}))
"""


def _pod(image: str, code: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "audit"},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            # No name of any host can be resolved: what starts, starts without a network.
            "dnsPolicy": "None",
            "dnsConfig": {"nameservers": ["127.0.0.1"]},
            "securityContext": {
                "runAsNonRoot": True,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "main",
                    "image": image,
                    "command": ["python", "-c", code],
                    # A pod that asks for nothing gets next to nothing on a busy node.
                    "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}},
                    "terminationMessagePolicy": "FallbackToLogsOnError",
                    "securityContext": job.RESTRICTED,
                    "volumeMounts": [
                        {"name": "work", "mountPath": "/home/perennial"},
                        {"name": "tmp", "mountPath": "/tmp"},
                    ],
                }
            ],
            "volumes": [{"name": "work", "emptyDir": {}}, {"name": "tmp", "emptyDir": {}}],
        },
    }


def _ended(kubectl: Any, space: str) -> dict[str, Any]:
    until = time.monotonic() + 600
    while time.monotonic() < until:
        pod = kubectl.get("pod", "-n", space, "audit")
        if pod["status"]["phase"] in ("Succeeded", "Failed"):
            return dict(pod)
        time.sleep(1)
    raise AssertionError(f"the audit did not end: {pod['status']}")


@pytest.fixture(params=IMAGES)
def audited(request: pytest.FixtureRequest, kubectl: Any, space: str) -> dict[str, Any]:
    """What an image says of itself."""
    code = AUDIT.replace("MODULES", repr(MODULES[request.param]))
    kubectl.apply([_pod(IMAGES[request.param], code)], "-n", space)
    pod = _ended(kubectl, space)
    text = kubectl.run("logs", "-n", space, "audit").stdout
    assert pod["status"]["phase"] == "Succeeded", text
    said = next(line for line in text.splitlines() if line.startswith("AUDIT "))
    return {"name": request.param, **json.loads(said.removeprefix("AUDIT "))}


def test_an_image_starts_as_nobody_without_anything_to_install_or_build_with(audited):
    assert audited["user"] == [65532, 65532]
    assert audited["tools"] == []
    assert audited["installers"] == []
    assert audited["settings"] == []
    assert audited["environment"] == []
    assert audited["setuid"] == []
    assert not audited["token"]
    assert [w for w in audited["writable"] if not w.startswith(("/home/perennial", "/tmp"))] == []
    assert audited["compiled"], "a read-only file system would compile all modules at each start"
    assert audited["root"] == "/opt/perennial"
    assert bool(audited["envoy"]) == (audited["name"] == "core")


def _sizes(kubectl: Any, image: str) -> list[int]:
    """How many bytes the nodes say that they hold of it."""
    return [
        held["sizeBytes"]
        for node in kubectl.get("nodes")["items"]
        for held in node["status"].get("images", [])
        if image in (held.get("names") or [])
    ]


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_keeps_to_its_size(name, kubectl, record_property):
    limit = time.monotonic() + REPORTED_S
    while not (sizes := _sizes(kubectl, IMAGES[name])) and time.monotonic() < limit:
        time.sleep(2)

    assert sizes, f"no node holds {IMAGES[name]}; run 'make images'"
    record_property(f"{name}_bytes", sizes[0])
    print(f"{IMAGES[name]}: {sizes[0] / 1e6:.0f} MB")
    assert sizes[0] <= MOST_BYTES[name]
