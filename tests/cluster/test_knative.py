"""Knative mode on a real cluster: one InferenceService, its revisions, and who gets requests."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from adapters import FINE, TrafficContract, rollout
from lightkube import Client
from lightkube.types import PatchType
from small import inference_service
from tenant import DOMAIN, INGRESS

from perennial import kube
from perennial.errors import Unavailable
from perennial.records import RolloutState
from perennial.rollout import knative, manifest, plan, pods
from perennial.rollout.podmetrics import PodEvidence

IMAGE = os.environ.get("PERENNIAL_TEST_IMAGE", "dev.local/perennial:0.1.0-python3.11")
INFER = "/v2/models/retail/infer"

pytestmark = pytest.mark.cluster


class KnativeBench:
    """The contract's surroundings: the adapter here, small servers in pods, Kourier before them."""

    patience_s = 2 * float(os.environ.get("PERENNIAL_TEST_PATIENCE_S", "60"))

    def __init__(self, client: Client, namespace: str, kubectl: Any) -> None:
        self.client = client
        self.namespace = namespace
        self._kubectl = kubectl
        self._faults: dict[int, str] = {}
        self._states: dict[str, RolloutState] = {}
        self._last = ""
        self._open()

    def restart(self) -> None:
        self.evidence.close()
        self._open()

    def _open(self) -> None:
        self.knative = knative.KnativeService(self.client, "retail", self.document, self.serving)
        self.traffic = self.revisions = self.knative
        self.evidence = PodEvidence("retail", self.knative.pages, self.knative.weights)

    def serving(self) -> RolloutState | None:
        """Whoever had all requests last: the contract keeps no store."""
        full = [name for name, percent in self.knative.weights().items() if percent == 100]
        self._last = full[0] if full else self._last
        return self._states.get(self._last)

    def document(self, state: RolloutState) -> dict[str, Any]:
        fault = self._faults[state.version]
        return inference_service(state, "retail", self.namespace, "Knative", IMAGE, fault)

    def state(self, fault: str = FINE) -> RolloutState:
        made = rollout(len(self._faults) + 1)
        self._faults[made.version] = fault
        self._states[plan.name(made)] = made
        return made

    def ask(self, count: int) -> list[tuple[int, str]]:
        headers = {"host": f"retail-predictor.{self.namespace}.{DOMAIN}"}
        with httpx.Client(base_url=INGRESS, headers=headers, timeout=10, trust_env=False) as http:
            said = [http.post(INFER, json={}) for _ in range(count)]
        return [(a.status_code, _revision(a)) for a in said]

    def servers(self, name: str) -> int:
        return len(self.knative.pages(name))

    def kill(self, name: str) -> None:
        for pod in pods.of(self.client, "retail", name):
            place = ["-n", self.namespace, "--force", "--grace-period=0"]
            self._kubectl.run("delete", "pod", pod.metadata.name, *place)

    def edit(self, **predictor: object) -> None:
        """What a person does with kubectl edit."""
        body = {"spec": {"predictor": predictor}}
        with kube.asking("editing"):
            self.client.patch(kube.InferenceService, "retail", body, patch_type=PatchType.MERGE)

    def live(self) -> dict[str, Any]:
        return dict(self.client.get(kube.InferenceService, "retail"))


def _revision(answer: httpx.Response) -> str:
    told = answer.headers.get("content-length") and answer.text.startswith("{")
    return answer.json().get("model_version", "nobody") if told else "nobody"


@pytest.fixture(scope="module")
def bench(kubectl: Any, spaces: Callable[[str], str]) -> Iterator[KnativeBench]:
    namespace = spaces("knative")
    with kube.connect(namespace) as client:
        made = KnativeBench(client, namespace, kubectl)
        yield made
        made.evidence.close()


class TestKnative(TrafficContract):
    """The contract of every adapter, in pods."""

    def test_a_rejected_revision_is_taken_out_of_the_template(self, bench, stable):
        rejected = self.bring_up(bench)
        self.split(bench, {stable: 50, rejected: 50})
        self.split(bench, {stable: 100})

        self.drive(bench, lambda: bench.revisions.stop(rejected))

        live = bench.live()
        assert manifest.revision(live) == stable
        # The trap: whoever applies the good file now, without a percent, must not wake the bad one.
        assert manifest.percent(live) is None
        assert bench.traffic.weights() == {stable: 100}

    def test_a_share_is_never_raised_over_somebodys_edit(self, bench, stable):
        new = self.bring_up(bench)
        self.split(bench, {stable: 90, new: 10})
        bench.edit(canaryTrafficPercent=33)

        self.until(bench, lambda: bench.traffic.weights() == {stable: 67, new: 33})
        with pytest.raises(Unavailable, match="somebody edited .* canaryTrafficPercent is 33"):
            bench.traffic.set_weights({stable: 50, new: 50})

        assert bench.traffic.weights() == {stable: 67, new: 33}
        self.split(bench, {stable: 100})

    def test_a_percent_that_was_taken_away_is_an_edit_too(self, bench, stable):
        new = self.bring_up(bench)
        self.split(bench, {stable: 90, new: 10})
        bench.edit(canaryTrafficPercent=None)
        bench.restart()

        with pytest.raises(Unavailable, match="canaryTrafficPercent is gone"):
            bench.traffic.set_weights({stable: 50, new: 50})
        self.split(bench, {stable: 100})

        assert self.answers(bench, 30) == {stable: 30}

    def test_an_edited_template_is_told_key_by_key(self, bench, stable):
        assert bench.knative.edits({None, 0}) == []

        bench.edit(timeout=77, maxReplicas=2)

        assert bench.knative.edits({None, 0}) == ["spec.predictor.maxReplicas is 2, applied was 1"]
