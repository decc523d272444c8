"""A tenant as a user would install it: an overlay of kustomize/, in a namespace of its own."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from perennial.errors import Unavailable
from perennial.rollout.knative import KnativeService

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 600.0
READY_S = 3 * float(os.environ.get("PERENNIAL_TEST_PATIENCE_S", "60"))
INGRESS = os.environ.get("PERENNIAL_TEST_INGRESS", "http://127.0.0.1:31080")
DOMAIN = os.environ.get("PERENNIAL_TEST_DOMAIN", "example.com")


# A version like the one that serves, but not the same: its lineage names another seed.
PLANT = """
import sys, time
from dataclasses import replace
from pathlib import Path
from perennial import bundle
from perennial.settings import Settings
from perennial.store import rollouts, versions
from perennial.store.engine import make_engine
from perennial.store.objects import Folder

state = Settings.load().state("retail")
engine = make_engine(state.url)
here = bundle.near(state, rollouts.serving(engine, "retail").digest)
kept = {path.name: path.read_bytes() for path in (here / "model").iterdir()}
kept.pop("manifest.json")
lineage = bundle.parts(here).lineage
# Another one, so that what is spoiled is never planted again as a good one.
apart = 1000 if "spoiled" in sys.argv else 1
kept["lineage.json"] = bundle.lineage_json(replace(lineage, seed=lineage.seed + apart))
folder = Path(f"/home/perennial/planted-{time.time_ns()}")
digest = bundle.close(folder, kept)
store = Folder(state.artifacts("bundles"))
store.keep(folder, bundle.name_of(digest))
if "spoiled" in sys.argv:
    name = next(f for f in store.names(bundle.name_of(digest)) if f.endswith("model.json"))
    store.write(name, store.read(name) + b" ")
made = versions.next_version(engine, "retail", digest, "planted", lineage.as_of)
uri = f"{state.artifacts('bundles')}/{bundle.name_of(digest)}"
rollouts.wish(engine, project="retail", version=made.number, digest=digest, bundle_uri=uri,
              run_id=digest)
print(made.label)
"""


class NotNow(AssertionError):
    """A pod that was asked is being replaced."""


@dataclass(frozen=True)
class Tenant:
    """An installed overlay; commands are given to its pods, as a person at a terminal would."""

    kubectl: Any  # conftest.Kubectl
    space: str
    overlay: str

    def perennial(self, *words: str, check: bool = True) -> str:
        """What one command of perennial prints in the retraining pod."""
        return self.exec("retraining", "perennial", *words, check=check)

    def exec(self, deployment: str, *words: str, check: bool = True) -> str:
        command = ("-n", self.space, "exec", f"deploy/{deployment}", "--", *words)
        done = self.kubectl.run(*command, check=check)
        return str(done.stdout if check else done.stdout + done.stderr)

    def entries(self, kind: str = "") -> list[dict[str, Any]]:
        """The ledger of retail, oldest first."""
        code = (
            "import json; from perennial.ledger import Ledger; from perennial.records import plain;"
            "from perennial.settings import Settings;"
            "from perennial.store.engine import make_engine;"
            "e = Ledger(make_engine(Settings.load().state('retail').url)).entries('retail');"
            "print(json.dumps([plain(x) for x in e]))"
        )
        told = self.exec("retraining", "python", "-c", code, check=False)
        if not told.startswith("["):
            # Its pod is being replaced; reading is tried again, by the caller's own patience.
            raise NotNow(told)
        found = json.loads(told.splitlines()[0])
        return [e for e in found if kind in ("", e["kind"])]

    def plant(self, how: str = "whole") -> str:
        """Wish for a new version as good as the one that serves; gives its label.

        Of one that is ``spoiled`` the store holds other bytes than were kept there.
        """
        return self.exec("retraining", "python", "-c", PLANT, how).split()[-1]

    @property
    def surroundings(self) -> dict[str, str]:
        """By which a notebook on this machine reaches the demo's stores and its ingress."""
        database, store = (self._address(name) for name in ("dev-postgres", "dev-s3"))
        url, host = self.door
        return {
            "PERENNIAL_NAMESPACE": self.space,
            "PERENNIAL_LAUNCHER": "job",
            "PERENNIAL_STATE_URL": f"postgresql+psycopg://perennial:demo-only@{database}/postgres",
            "PERENNIAL_ARTIFACTS": "s3://perennial/perennial",
            "AWS_ENDPOINT_URL": f"http://{store}",
            "AWS_ACCESS_KEY_ID": "demo-only",
            "AWS_SECRET_ACCESS_KEY": "demo-only",
            "AWS_DEFAULT_REGION": "us-east-1",
            "PERENNIAL_EDGE_URL": url,
            "PERENNIAL_EDGE_HOST": host,
        }

    def _address(self, service: str) -> str:
        spec = self.kubectl.get("-n", self.space, "service", service)["spec"]
        return f"{spec['clusterIP']}:{spec['ports'][0]['port']}"

    def rollouts(self) -> dict[str, dict[str, Any]]:
        """Every ModelRollout by its name."""
        items = self.kubectl.get("-n", self.space, "modelrollouts")["items"]
        return {item["metadata"]["name"]: item for item in items}

    def phase(self, name: str) -> str:
        found = self.rollouts().get(name, {})
        return str((found.get("status") or {}).get("phase", ""))

    @property
    def door(self) -> tuple[str, str]:
        """Where clients ask for retail from outside of the cluster, and by which host."""
        if self.overlay != "demo-standard":
            return INGRESS, f"retail-predictor.{self.space}.{DOMAIN}"
        return f"http://{self._address('retail')}", "retail"

    def kill(self, deployment: str) -> None:
        """Let the pods of a Deployment die at once, as by a SIGKILL."""
        which = f"app.kubernetes.io/component={deployment}"
        now = ("--force", "--grace-period=0", "--wait=false")
        self.kubectl.run("-n", self.space, "delete", "pod", "-l", which, *now)

    def problems(self) -> str:
        """What a person would look at first when something does not come to be."""
        told = [
            self.kubectl.run("-n", self.space, *words, check=False).stdout
            for words in (
                ("get", "pods,jobs,isvc,modelrollouts", "-o", "wide"),
                ("logs", "deploy/operator", "--tail=30"),
                ("logs", "deploy/retraining", "--tail=30"),
            )
        ]
        return "\n".join(told)


def install(kubectl: Any, overlay: str, space: str, folder: Path) -> Tenant:
    """Apply an overlay under another namespace, and wait until it can be asked for a run.

    An edge is not waited for: it is ready when there is a model.
    """
    target = ROOT / "kustomize" / "overlays" / overlay
    told = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": space,
        "resources": [os.path.relpath(target, folder.resolve())],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(told))
    kubectl.run("apply", "-k", str(folder))
    kubectl.run(
        *("-n", space, "wait", "--for=condition=Available"),
        *(f"deployment/{name}" for name in ("operator", "retraining")),
        f"--timeout={PATIENCE_S:.0f}s",
        patience_s=PATIENCE_S + 30,
    )
    return Tenant(kubectl, space, overlay)


def until(
    tenant: Tenant, what: str, is_so: Callable[[], object], patience_s: float = PATIENCE_S
) -> None:
    """Wait for something that the loop does by itself; says what there is when it does not."""
    limit = time.monotonic() + patience_s
    while not _is(is_so):
        if time.monotonic() > limit:
            raise AssertionError(f"{what}: not within {patience_s:.0f} s\n{tenant.problems()}")
        time.sleep(1.0)


def _is(question: Callable[[], object]) -> bool:
    try:
        return bool(question())
    except NotNow:
        return False


def shares(answers: Sequence[str]) -> dict[str, int]:
    """How many answers each revision gave."""
    return {name: list(answers).count(name) for name in dict.fromkeys(answers)}


def until_ready(service: KnativeService, name: str) -> None:
    """Wait for a revision's servers."""
    limit, why = time.monotonic() + READY_S, ""
    while time.monotonic() < limit:
        try:
            if service.ready(name):
                return
        except Unavailable as exc:
            why = str(exc)
        assert not service.died(name), service.died(name)
        time.sleep(1)
    raise AssertionError(why)
