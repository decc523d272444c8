"""The operator in Standard mode, killed at any point: edges hear of weights from the next one."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
import fronts
import httpx
import kills
import pytest
from lightkube import Client
from operators import ERRORS, GOOD, Loop, until

from perennial import kube
from perennial.rollout import edge
from perennial.rollout.places import STANDARD
from perennial.rollout.standard import EdgePods
from perennial.store import edges

pytestmark = pytest.mark.cluster


class StandardLoop(Loop):
    """The same in Standard mode, with two Envoys before the Services of KServe."""

    mode = STANDARD

    def __init__(self, client: Client, namespace: str, folder: Path, host: str) -> None:
        super().__init__(client, namespace, folder)
        self.host, self.port = host, fronts.free_port(host)
        self.options = (f"--host={host}", f"--xds-port={self.port}")
        self.edges = EdgePods(client, "retail")
        self._shares: dict[str, dict[str, int]] = {}  # by the version of the routes

    def door(self) -> httpx.Client:
        # A new connection may go to another pod of the edge.
        return httpx.Client(
            base_url=f"http://{fronts.address(self.client)}", timeout=20, trust_env=False
        )

    def given(self) -> dict[str, dict[str, int]]:
        """Percent of each version, as the edge is told and as every Envoy really splits."""
        told = json.loads(edges.read(self.engine, "retail", edge.RDS) or "{}")
        if not told:
            return {}
        self._shares[told["version_info"]] = _shares(told)
        envoys = {name: self._shares.get(_routes_of(url), {}) for name, url in self.edges().items()}
        return {"routes": _shares(told), **envoys}


def _shares(told: dict[str, Any]) -> dict[str, int]:
    (host,) = told["resources"][0]["virtual_hosts"]
    arms = [r["route"]["weighted_clusters"]["clusters"] for r in host["routes"] if _splits(r)]
    return {arm["name"].removeprefix("retail-"): arm["weight"] for arm in arms[0]} if arms else {}


def _routes_of(url: str) -> str:
    """The version of the routes that an Envoy runs."""
    wanted = {"filter": r"^http\.edge\.rds\.edge\.version_text$"}
    try:
        said = httpx.get(f"{url}/stats", params=wanted, timeout=5, trust_env=False).text
    except httpx.HTTPError:
        return ""
    return said.partition(": ")[2].strip().strip('"')


def _splits(route: dict[str, Any]) -> bool:
    return "path" in route["match"] and "weighted_clusters" in route.get("route", {})


@pytest.fixture(scope="module")
def loop(
    kubectl: Any, crd: None, spaces: Callable[[str], str], tmp_path_factory: Any
) -> Iterator[StandardLoop]:
    namespace = spaces("standard-operator")
    host = fronts.host_address(kubectl)
    with kube.connect(namespace) as client:
        made = StandardLoop(client, namespace, tmp_path_factory.mktemp("operator"), host)
        fronts.install(kubectl, namespace, host, made.port)
        yield made
        made.close()


@pytest.fixture
def serving(loop: StandardLoop) -> str:
    """The version that serves, by edges that are ready."""
    if not loop.serving():
        first = loop.start()
        loop.serve(next(loop.numbers()))
        # An Envoy is ready when it has routes.
        until(lambda: len(loop.edges()) == fronts.EDGES, 120, loop.log)
        first.terminate()
        first.wait(20)
    return loop.serving()


@pytest.mark.parametrize("fault", [GOOD, ERRORS], ids=["a good version", "a bad version"])
def test_killed_at_any_point_it_ends_right_and_never_above_the_step(loop, serving, fault):
    kills.disturb(loop, loop.numbers(), fault)

    assert set(loop.ask(20)) == {loop.serving()}
    seen = {name for name, shares in loop.given().items() if shares == {loop.serving(): 100}}
    assert seen == {"routes", *loop.edges()}


def test_an_image_that_cannot_be_pulled_leaves_stable_and_says_why(loop, serving):
    faults.without_image(loop, loop.numbers())


def test_an_api_server_that_is_away_changes_nothing_and_is_got_over(
    loop, serving, kubeconfig, tmp_path
):
    faults.cut_off(loop, loop.numbers(), Path(kubeconfig), tmp_path)
