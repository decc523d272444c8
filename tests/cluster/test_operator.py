"""The operator on a real cluster: rollouts as resources, kills, edits and lost leases."""

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import faults
import kills
import operators
import pytest
from lightkube.types import PatchType
from operators import ERRORS, GOOD, NEVER_READY, PATIENCE_S, Loop, digest, until

from perennial import kube
from perennial.errors import BadInput
from perennial.records import Phase
from perennial.rollout import controller, manifest
from perennial.store import lease

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def loop(
    kubectl: Any, spaces: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Loop]:
    """One namespace with a store; each test goes on with the versions of the one before."""
    kubectl.run("apply", "--server-side", "-f", str(operators.ROOT / "kustomize/base/crd.yaml"))
    namespace = spaces("operator")
    with kube.connect(namespace) as client:
        made = Loop(client, namespace, tmp_path_factory.mktemp("operator"))
        yield made
        made.close()


@pytest.fixture
def operator(loop: Loop) -> Iterator[Loop]:
    """The loop with one operator that leads."""
    process = loop.start()
    yield loop
    process.terminate()
    process.wait(20)


@pytest.fixture
def numbers(loop: Loop) -> Iterator[int]:
    """Versions that nobody used before."""
    return loop.numbers()


@pytest.fixture
def stable(operator: Loop, numbers: Iterator[int]) -> str:
    """The version that serves."""
    if not operator.serving():
        operator.serve(next(numbers))
        until(lambda: set(operator.ask(5)) == {operator.serving()}, 60)
    return operator.serving()


def test_a_good_version_goes_up_step_by_step_and_the_resource_tells_it(operator, stable, numbers):
    version = next(numbers)
    with operator.clients() as said:
        state = operator.until_over(operator.wish(version))

    assert (state.phase, state.weight) == (Phase.PROMOTED, 100)
    assert operator.serving() == f"v{version}"
    assert set(said) == {stable, f"v{version}"}
    steps = operator.ledger.entries("retail", "rollout.step", f"v{version}")
    assert [(e.body["weight"], e.body["verdict"]) for e in steps] == [
        (10, "advance"),
        (50, "advance"),
        (100, "advance"),
    ]
    assert all(e.body["revision"].startswith("retail-predictor-0") for e in steps)
    until(lambda: told(operator, version).get("phase") == "Promoted", 60)
    status = told(operator, version)
    assert (status["step"], status["weight"], status["verdict"]) == ("3/3", 100, "advance")
    assert [h["weight"] for h in status["history"]] == [10, 50, 100]
    assert status["revision"] == steps[-1].body["revision"]
    until(lambda: set(operator.ask(20)) == {f"v{version}"}, 30)


def told(loop: Loop, version: int) -> dict[str, Any]:
    return dict(loop.resource(f"retail-v{version}").get("status") or {})


def test_a_bad_version_goes_back_and_hears_nothing_ever_after(operator, stable, numbers):
    bad = next(numbers)
    with operator.clients():
        state = operator.until_over(operator.wish(bad, ERRORS))
    assert state.phase is Phase.ROLLED_BACK
    assert "server errors in" in state.reason
    until(lambda: operator.percent() == 0 or manifest.revision(operator.live()) == stable, 20)
    until(lambda: f"v{bad}" not in operator.ask(10), 20)

    with operator.clients() as said:
        until(lambda: manifest.revision(operator.live()) == stable, 60, operator.log)
        until(lambda: manifest.percent(operator.live()) is None, 60, operator.log)
        # What a person applies in good faith: the file of what serves, without a percent.
        operator.edit(timeout=31)
        good = next(numbers)
        assert operator.until_over(operator.wish(good)).phase is Phase.PROMOTED

    assert said[f"v{bad}"] == 0
    assert set(said) == {stable, f"v{good}"}
    until(lambda: told(operator, bad).get("phase") == "RolledBack", 60)
    assert told(operator, bad)["reason"] == state.reason


def test_a_version_that_fails_with_all_traffic_gives_it_back(operator, stable, numbers):
    """It has no revision beside it then: what served comes back from where Knative keeps it."""
    bad, at_once = next(numbers), operators.QUICK.model_copy(update={"steps": (100,)})
    with operator.clients():
        state = operator.until_over(operator.wish(bad, ERRORS, at_once))
        assert state.phase is Phase.ROLLED_BACK, state.reason
        until(lambda: operator.ledger.entries("retail", "rolled_back", f"v{bad}"), 60, operator.log)

    # From what the ledger tells on, also while a copy of what serves comes up in its place.
    with operator.clients() as said:
        until(lambda: manifest.revision(operator.live()) == stable, 120, operator.log)
        until(lambda: manifest.percent(operator.live()) is None, 120, operator.log)
        time.sleep(3)
    assert set(said) == {stable}


def test_what_serves_is_made_anew_when_somebody_deletes_it(operator, stable):
    until(lambda: lease.holder(operator.engine, "operator", time.time()), 30)
    before = operator.ledger.entries("retail", "serving.restored")
    time.sleep(3)

    kube.delete(operator.client, kube.InferenceService, "retail")

    def is_told() -> bool:
        return len(operator.ledger.entries("retail", "serving.restored")) == len(before) + 1

    until(is_told, 60, operator.log)
    until(lambda: answers_steadily(operator, stable), 3 * PATIENCE_S, operator.log)
    assert manifest.percent(operator.live()) is None


def answers_steadily(operator: Loop, name: str) -> bool:
    """For some seconds: the ingress may lose a route that is made anew once more."""
    for _ in range(5):
        if set(operator.ask(5)) != {name}:
            return False
        time.sleep(1)
    return True


def test_a_version_that_is_never_ready_gets_nothing_and_says_why(operator, stable, numbers):
    version = next(numbers)
    with operator.clients() as said:
        state = operator.until_over(operator.wish(version, NEVER_READY))

    assert state.phase is Phase.ROLLED_BACK
    assert "transformer-container ended with 1 (Error): it was told to end" in state.reason
    assert set(said) == {stable}
    until(lambda: told(operator, version).get("reason") == state.reason, 10)


def test_an_image_that_cannot_be_pulled_leaves_stable_and_says_why(loop, numbers):
    faults.without_image(loop, numbers)


def test_an_edit_from_outside_is_told_once_and_not_fought(operator, stable):
    until(lambda: lease.holder(operator.engine, "operator", time.time()), 30)
    version = int(stable[1:])
    # It was applied with 300 s, which is not said in our file: this one is said there.
    operator.edit(minReplicas=2, maxReplicas=2)

    until(lambda: "minReplicas is 2" in edited(operator, version), 60, operator.log)
    told_once = operator.ledger.entries("retail", "serving.edited", stable)
    time.sleep(5)

    assert operator.live()["spec"]["predictor"]["minReplicas"] == 2
    assert operator.ledger.entries("retail", "serving.edited", stable) == told_once
    assert any("maxReplicas is 2, applied was 1" in e for e in told_once[-1].body["edits"])
    operator.edit(minReplicas=1, maxReplicas=1)
    until(lambda: edited(operator, version) == "", 60, operator.log)


def edited(loop: Loop, version: int) -> str:
    status = told(loop, version)
    found = [c for c in status.get("conditions", ()) if c["type"] == "AsApplied"]
    return str(found[0]["message"]) if found else "not told"


def test_a_resource_that_a_person_makes_becomes_a_wish(operator, stable, numbers):
    version = next(numbers)
    while operator_versions(operator) < version:
        operator.register(operator_versions(operator) + 1)
    create(operator, "mine", version, digest(version), steps=[50, 100])
    with operator.clients():
        until(lambda: phase(operator, "mine") == "Promoted", 180, operator.log)

    assert operator.serving() == f"v{version}"
    assert [h["weight"] for h in operator.resource("mine")["status"]["history"]] == [50, 100]
    create(operator, "strange", version, digest(version + 77))
    until(lambda: phase(operator, "strange") == "Refused", 30, operator.log)
    assert "has digest" in operator.resource("strange")["status"]["reason"]


def operator_versions(loop: Loop) -> int:
    from perennial.store import versions

    return len(versions.all_versions(loop.engine, "retail"))


def create(loop: Loop, name: str, version: int, digest: str, **more: object) -> None:
    deadlines = {"stepSeconds": operators.PATIENCE_S, "readySeconds": operators.PATIENCE_S}
    spec = {"project": "retail", "version": version, "digest": digest, "deadlines": deadlines}
    document = {
        "apiVersion": "perennial.dev/v1alpha1",
        "kind": "ModelRollout",
        "metadata": {"name": name},
        "spec": spec | more,
    }
    with kube.asking("creating"):
        loop.client.create(kube.ModelRollout(**document))


def phase(loop: Loop, name: str) -> str:
    return str((loop.resource(name).get("status") or {}).get("phase", ""))


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"steps": [10, 50]}, "the last step is 100"),
        ({"steps": [50, 10, 100]}, "each step is larger than the one before"),
        ({"steps": [0, 100]}, "greater than or equal to 1"),
        ({"steps": [10, 130]}, "less than or equal to 100"),
        ({"strategy": "Hope"}, 'supported values: "Canary"'),
        ({"digest": "sha256:1"}, "digest"),
        ({"analysis": {"maxErrorRate": 2}}, "maxErrorRate"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_broken_wish_is_refused_by_the_api_server(loop, broken, said):
    wanted = {"version": 1, "digest": digest(1), **broken}

    with pytest.raises(BadInput, match=said):
        create(loop, "broken", wanted.pop("version"), wanted.pop("digest"), **wanted)


def test_a_wish_is_never_rewritten(loop):
    create(loop, "kept", 999, digest(999))

    with pytest.raises(BadInput, match="a wish is never rewritten"), kube.asking("changing"):
        change = {"spec": {"version": 1000}}
        loop.client.patch(kube.ModelRollout, "kept", change, patch_type=PatchType.MERGE)
    kube.delete(loop.client, kube.ModelRollout, "kept")


def test_a_rollback_by_hand_brings_the_version_before_back(operator, stable, numbers):
    version = next(numbers)
    with operator.clients():
        operator.serve(version)

    wished = controller.roll_back(operator.engine, operator.ledger, "retail", datetime.now(UTC))
    state = operator.until_over(wished)

    assert state.phase is Phase.PROMOTED
    until(lambda: operator.serving() == stable, 30)
    until(lambda: set(operator.ask(20)) == {stable}, 30)
    until(lambda: phase(operator, f"retail-{stable}-r{wished.id}") == "Promoted", 10)


def test_the_second_operator_waits_and_takes_over_when_the_first_is_killed(loop, numbers):
    first = loop.start()
    until(lambda: lease.holder(loop.engine, "operator", time.time()), 30)
    second = loop.start()
    holder = lease.holder(loop.engine, "operator", time.time())
    assert str(first.pid) in str(holder)

    loop.kill(first)
    with loop.clients():
        state = loop.until_over(loop.wish(next(numbers)))

    assert state.phase is Phase.PROMOTED
    assert str(second.pid) in str(lease.holder(loop.engine, "operator", time.time()))
    second.terminate()
    second.wait(20)


def test_an_api_server_that_is_away_changes_nothing_and_is_got_over(
    loop, numbers, kubeconfig, tmp_path
):
    faults.cut_off(loop, numbers, Path(kubeconfig), tmp_path)


@pytest.mark.parametrize("fault", [GOOD, ERRORS], ids=["a good version", "a bad version"])
def test_killed_at_any_point_it_ends_right_and_never_above_the_step(loop, numbers, fault):
    kills.disturb(loop, numbers, fault)
