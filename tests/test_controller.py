"""The rollout controller: one step a tick, and no step lost or made twice by a restart."""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from perennial.errors import BadInput, Unavailable
from perennial.ledger import Ledger
from perennial.project import Project
from perennial.records import ArmTraffic, Evidence, Phase, RolloutState
from perennial.rollout import plan
from perennial.rollout.controller import Controller, roll_back
from perennial.store import rollouts
from perennial.store.engine import make_engine

PROJECT = Project.model_validate(
    yaml.safe_load(
        "{name: tiny, kind: table, time: {column: t}, label: {column: y},"
        " features: [{name: x, type: number}]}"
    )
)
GOOD = ArmTraffic("canary", requests=60, server_errors=0, p95_ms=9.0, invalid_outputs=0)
SHARES = [{"v1": 100}, {"v1": 90, "v2": 10}, {"v1": 50, "v2": 50}, {"v2": 100}]
STABLE = ArmTraffic("stable", requests=600, server_errors=0, p95_ms=9.0, invalid_outputs=0)


@dataclass
class FakeTraffic:
    now: dict[str, int] = field(default_factory=dict)
    seen: list[dict[str, int]] = field(default_factory=list)
    down: bool = False

    def weights(self):
        return self.now

    def set_weights(self, weights):
        if self.down:
            raise Unavailable("the edge does not answer")
        self.now = {n: w for n, w in weights.items() if w}
        self.seen.append(self.now)


@dataclass
class FakeRevisions:
    up: list[str] = field(default_factory=list)
    slow: set[str] = field(default_factory=set)
    dead: dict[str, str] = field(default_factory=dict)
    refused: str = ""

    def names(self):
        return tuple(self.up)

    def start(self, state):
        if self.refused:
            raise BadInput(self.refused)
        self.up.append(plan.name(state))

    def ready(self, name):
        return name in self.up and name not in self.slow

    def died(self, name):
        return self.dead.get(name, "")

    def stop(self, name):
        if name in self.up:
            self.up.remove(name)


@dataclass
class FakeEvidence:
    canary: ArmTraffic | None = GOOD
    steps: list[str] = field(default_factory=list)

    def look(self, step, canary, stable):
        if step not in self.steps:
            self.steps.append(step)
        return Evidence(self.canary, STABLE, 0.0)


@dataclass
class FakeClock:
    seconds: float = 0.0

    def monotonic(self):
        return self.seconds

    def now(self):
        return datetime(2026, 1, 1, tzinfo=UTC)


class World:
    """Everything around a controller; a new controller each tick if ``forgetful``."""

    def __init__(self, folder: Path, forgetful: bool = False) -> None:
        self.engine = make_engine(f"sqlite:///{folder}/state.db")
        self.ledger = Ledger(self.engine)
        self.traffic, self.revisions = FakeTraffic(), FakeRevisions()
        self.evidence, self.clock = FakeEvidence(), FakeClock()
        self.promoted: list[str] = []
        self.forgetful = forgetful
        self.controller = self.new_controller()

    def new_controller(self) -> Controller:
        seams = (self.traffic, self.evidence, self.revisions, self.clock)
        tell = lambda state: self.promoted.append(plan.name(state))  # noqa: E731
        return Controller(PROJECT, self.engine, self.ledger, *seams, on_promoted=tell)

    def wish(self, version: int) -> RolloutState:
        return rollouts.wish(
            self.engine,
            project="tiny",
            version=version,
            digest=f"sha256:{version}",
            bundle_uri=f"/bundles/{version}",
            run_id=f"run-{version}",
        )

    def tick(self, seconds: float = 1.0) -> RolloutState | None:
        self.clock.seconds += seconds
        if self.forgetful:
            self.controller = self.new_controller()
        return self.controller.tick()

    def until_over(self, version: int, ticks: int = 30) -> RolloutState:
        self.wish(version)
        return self.go_on(ticks)

    def go_on(self, ticks: int = 30) -> RolloutState:
        for _ in range(ticks):
            self.tick()
            if rollouts.open_rollout(self.engine, "tiny") is None:
                break
        self.tick()
        return rollouts.history(self.engine, "tiny")[-1]

    def kinds(self) -> list[str]:
        return [f"{e.kind} {e.subject}" for e in self.ledger.entries("tiny")]

    def roll_back(self) -> RolloutState:
        return roll_back(self.engine, self.ledger, "tiny", self.clock.now())


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def serving(world: World) -> str:
    state = rollouts.serving(world.engine, "tiny")
    return plan.name(state) if state else "nothing"


def test_the_first_model_gets_all_traffic_once_it_is_ready(world):
    world.revisions.slow = {"v1"}
    world.wish(1)
    world.tick()
    assert world.traffic.seen == []

    world.revisions.slow = set()
    state = world.go_on()

    assert state.phase is Phase.PROMOTED
    assert world.traffic.now == {"v1": 100}
    assert serving(world) == "v1"
    assert world.kinds() == ["served v1"]


@pytest.mark.parametrize("forgetful", [False, True], ids=["one controller", "a new one each tick"])
def test_a_good_canary_goes_up_step_by_step(tmp_path, forgetful):
    world = World(tmp_path, forgetful)
    world.until_over(1)

    state = world.until_over(2)

    assert state.phase is Phase.PROMOTED
    weights = [
        w for i, w in enumerate(world.traffic.seen) if not i or w != world.traffic.seen[i - 1]
    ]
    assert weights == SHARES
    assert serving(world) == "v2"
    assert world.kinds() == ["served v1", *["rollout.step v2"] * 3, "promoted v2"]
    steps = [e.body for e in world.ledger.entries("tiny", "rollout.step")]
    assert [(s["weight"], s["verdict"], s["canary_requests"]) for s in steps] == [
        (10, "advance", 60),
        (50, "advance", 60),
        (100, "advance", 60),
    ]
    assert world.promoted == ["v1", "v2"]


@pytest.mark.parametrize("forgetful", [False, True], ids=["one controller", "a new one each tick"])
def test_a_bad_canary_loses_its_traffic_and_ends(tmp_path, forgetful):
    world = World(tmp_path, forgetful)
    world.until_over(1)
    world.evidence.canary = replace(GOOD, server_errors=9)

    state = world.until_over(2)

    assert state.phase is Phase.ROLLED_BACK
    assert state.reason == "9 server errors in 60 requests, wanted at most 1.0%"
    assert world.traffic.now == {"v1": 100}
    assert world.revisions.up == ["v1"]
    assert world.kinds() == ["served v1", "rollout.step v2", "rolled_back v2"]


def test_a_canary_without_traffic_holds_and_is_rolled_back_at_the_deadline(world):
    world.until_over(1)
    world.evidence.canary = replace(GOOD, requests=0)
    world.wish(2)
    for _ in range(119):
        world.tick()
    assert world.traffic.now == {"v1": 90, "v2": 10}

    state = world.go_on()

    assert state.phase is Phase.ROLLED_BACK
    assert "0 of 30 requests seen within 120 s" in state.reason


def test_each_step_counts_its_own_evidence(world):
    world.until_over(1)
    world.until_over(2)

    assert world.evidence.steps == ["2.0", "2.1", "2.2"]


def test_a_revision_that_is_never_ready_gets_no_request(world):
    world.until_over(1)
    world.revisions.slow = {"v2"}

    state = world.until_over(2, ticks=100)

    assert state.phase is Phase.ROLLED_BACK
    assert state.reason == "v2 was not ready within 90 s"
    assert world.traffic.seen == [{"v1": 100}, {"v1": 100}]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        pytest.param({"refused": "no bundle at /bundles/2"}, "no bundle", id="its bundle is gone"),
        pytest.param({"dead": {"v2": "ended with code 2"}}, "code 2", id="its process ends"),
    ],
)
def test_a_revision_that_cannot_start_is_rolled_back_at_once(world, fault, reason):
    world.until_over(1)
    for name, value in fault.items():
        setattr(world.revisions, name, value)

    world.wish(2)
    state = world.tick()

    assert state.phase is Phase.ROLLED_BACK
    assert reason in state.reason


def test_a_canary_whose_process_ends_is_rolled_back_at_the_next_look(world):
    world.until_over(1)
    world.wish(2)
    world.tick()
    world.revisions.dead = {"v2": "predictor of v2 ended by signal 9"}

    state = world.tick()

    assert state.phase is Phase.ROLLED_BACK
    assert state.reason == "predictor of v2 ended by signal 9"
    assert world.traffic.now == {"v1": 100}


def test_the_version_before_stays_warm_until_the_next_rollout_starts(world):
    for version in (1, 2):
        world.until_over(version)
    assert world.revisions.up == ["v1", "v2"]

    world.wish(3)
    world.tick()

    assert sorted(world.revisions.up) == ["v2", "v3"]


def test_the_same_model_is_not_rolled_out_over_itself(world):
    world.until_over(1)
    first = rollouts.serving(world.engine, "tiny")

    again = rollouts.wish(
        world.engine,
        project="tiny",
        version=1,
        digest=first.digest,
        bundle_uri=first.bundle_uri,
        run_id="another run",
    )
    world.tick()

    assert rollouts.get(world.engine, again.id).phase is Phase.SUPERSEDED
    assert serving(world) == "v1"


def test_a_rollback_by_hand_switches_at_once_to_the_warm_version(world):
    for version in (1, 2):
        world.until_over(version)

    world.roll_back()
    state = world.tick()

    assert state.phase is Phase.PROMOTED
    assert world.traffic.now == {"v1": 100}
    assert serving(world) == "v1"
    last = world.ledger.entries("tiny")[-1]
    assert (last.kind, last.subject) == ("rolled_back", "v2")
    assert last.body["reason"] == "by hand; v1 serves again"


def test_a_restart_of_long_ago_says_nothing_against_a_version_that_is_well(world):
    for version in (1, 2):
        world.until_over(version)
    world.revisions.dead = {"v1": "v1: predictor ended with 137"}

    world.roll_back()

    assert world.tick().phase is Phase.PROMOTED
    assert world.traffic.now == {"v1": 100}


def test_a_version_that_ends_at_once_is_no_place_to_go_back_to(world):
    for version in (1, 2):
        world.until_over(version)
    world.revisions.dead, world.revisions.slow = {"v1": "it ended with 1"}, {"v1"}

    world.roll_back()

    assert world.tick().phase is Phase.ROLLED_BACK
    assert world.traffic.now == {"v2": 100}


def test_a_rollback_to_a_stopped_version_starts_it_without_traffic_first(world):
    for version in (1, 2):
        world.until_over(version)
    world.revisions.stop("v1")
    world.revisions.slow = {"v1"}

    world.roll_back()
    world.tick()
    assert world.traffic.now == {"v2": 100}
    assert "v1" in world.revisions.up
    world.revisions.slow = set()
    world.tick()

    assert world.traffic.now == {"v1": 100}


def test_rolling_back_twice_goes_deeper_and_never_swaps(world):
    for version in (1, 2, 3):
        world.until_over(version)

    for wanted in ("v2", "v1"):
        world.roll_back()
        world.go_on()
        assert serving(world) == wanted

    with pytest.raises(BadInput, match="no version before"):
        world.roll_back()


def test_asking_twice_for_a_rollback_means_one(world):
    for version in (1, 2, 3):
        world.until_over(version)

    assert world.roll_back() == world.roll_back()
    world.go_on()

    assert serving(world) == "v2"
    assert world.kinds().count("rollout.wished v2") == 1


def test_a_rollback_by_hand_first_ends_the_canary_in_flight(world):
    for version in (1, 2):
        world.until_over(version)
    world.wish(3)
    world.tick()
    assert world.traffic.now == {"v2": 90, "v3": 10}

    world.roll_back()
    world.go_on()

    assert serving(world) == "v1"
    assert world.traffic.now == {"v1": 100}
    ended = {r.version: r for r in rollouts.history(world.engine, "tiny") if r.version == 3}
    assert ended[3].phase is Phase.ROLLED_BACK
    assert ended[3].reason == "a rollback by hand was asked for meanwhile"


@pytest.mark.parametrize("canary", [False, True], ids=["no canary", "a canary in flight"])
def test_a_model_that_is_wished_after_a_rollback_by_hand_waits_for_it(world, canary):
    for version in (1, 2):
        world.until_over(version)
    if canary:
        world.wish(3)
        world.tick()

    asked = world.roll_back()
    world.wish(4)
    while not rollouts.get(world.engine, asked.id).phase.over:
        world.tick()

    assert rollouts.get(world.engine, asked.id).phase is Phase.PROMOTED
    assert world.traffic.now == {"v1": 100}
    world.tick()
    assert world.traffic.now == {"v1": 90, "v4": 10}


def not_ready(name: str) -> bool:
    raise Unavailable(f"{name} is not ready: ErrImagePull")


@pytest.mark.parametrize("ready", [None, not_ready], ids=["it is down", "it says why"])
@pytest.mark.parametrize("canary", [False, True], ids=["no canary", "a canary in flight"])
def test_a_rollback_by_hand_does_not_wait_for_the_version_that_is_down(
    world, monkeypatch, ready, canary
):
    for version in (1, 2):
        world.until_over(version)
    if canary:
        world.wish(3)
        world.tick()
    world.revisions.slow = {"v2"}
    really = world.revisions.ready
    if ready:
        told = lambda name: ready(name) if name == "v2" else really(name)  # noqa: E731
        monkeypatch.setattr(world.revisions, "ready", told)
    world.controller = world.new_controller()

    world.roll_back()
    world.go_on()

    assert serving(world) == "v1"
    assert world.traffic.now == {"v1": 100}
    ends = ["rolled_back v3"] if canary else []
    assert [k for k in world.kinds() if k.startswith("rolled_back")] == [*ends, "rolled_back v2"]


def test_a_rollback_by_hand_that_fails_leaves_what_served(world):
    for version in (1, 2):
        world.until_over(version)
    world.revisions.stop("v1")
    world.revisions.slow = {"v1", "v2"}
    world.controller = world.new_controller()

    world.roll_back()
    world.go_on(ticks=100)
    world.revisions.slow = {"v1"}
    world.tick()

    assert world.controller.settled
    assert serving(world) == "v2"
    assert world.traffic.now == {"v2": 100}


def test_after_a_rollback_by_hand_a_new_candidate_is_judged_like_any_other(world):
    for version in (1, 2):
        world.until_over(version)
    world.roll_back()
    world.go_on()

    world.wish(3)
    world.tick()

    assert world.traffic.now == {"v1": 90, "v3": 10}


def test_an_edge_that_does_not_answer_delays_the_move_and_loses_nothing(world):
    world.until_over(1)
    world.wish(2)
    world.tick()
    world.evidence.canary = replace(GOOD, server_errors=9)
    world.traffic.down = True
    world.tick()
    assert "does not answer" in world.controller.problem

    world.traffic.down = False
    world.tick()

    assert world.traffic.now == {"v1": 100}
    assert world.controller.problem == ""
    assert world.kinds()[-1] == "rolled_back v2"


def test_a_restarted_stack_brings_the_serving_version_up_and_goes_on_with_the_canary(world):
    world.until_over(1)
    world.wish(2)
    world.tick()
    assert world.traffic.now == {"v1": 90, "v2": 10}
    world.traffic.now, world.traffic.seen, world.revisions.up = {}, [], []
    world.revisions.slow = {"v2"}
    world.controller = world.new_controller()

    world.tick()
    assert world.traffic.seen == [{"v1": 100}]
    world.revisions.slow = set()
    state = world.go_on()

    assert state.phase is Phase.PROMOTED
    assert world.traffic.now == {"v2": 100}


@dataclass
class OneTemplate(FakeRevisions):
    """As on Knative: what has no share is not up, unless it is the newest."""

    traffic: FakeTraffic = field(default_factory=FakeTraffic)

    def names(self):
        return tuple(dict.fromkeys([*self.up[-1:], *self.traffic.now]))

    def start(self, state):
        if plan.name(state) in self.up:
            self.traffic.set_weights({plan.name(state): 100})
        else:
            super().start(state)


@pytest.mark.parametrize("bad", [False, True], ids=["to a promotion", "to a rollback"])
def test_a_controller_killed_while_a_canary_has_everything_goes_on_with_it(world, bad):
    world.revisions = OneTemplate(traffic=world.traffic)
    world.controller = world.new_controller()
    world.until_over(1)
    world.wish(2)
    while world.traffic.now != {"v2": 100}:
        world.tick()

    if bad:
        world.evidence.canary = replace(GOOD, server_errors=9)
    world.controller = world.new_controller()
    state = world.go_on()

    assert state.phase is (Phase.ROLLED_BACK if bad else Phase.PROMOTED)
    assert world.traffic.now == ({"v1": 100} if bad else {"v2": 100})
    steps = world.ledger.entries("tiny", "rollout.step", "v2")
    assert [e.body["weight"] for e in steps] == [10, 50, 100]


class Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


@pytest.mark.parametrize("bad", [False, True], ids=["to a promotion", "to a rollback"])
def test_a_controller_killed_at_any_write_or_move_ends_where_an_unkilled_one_does(
    tmp_path, monkeypatch, bad
):
    """Every call that leaves the controller is a point to be killed at, before and after it."""
    points = 0
    for point in range(200):
        world = World(tmp_path / str(point))
        world.until_over(1)
        if bad:
            world.evidence.canary = replace(GOOD, server_errors=9)
        world.wish(2)
        with monkeypatch.context() as patch:
            left = arm(patch, world, point)
            run_with_restarts(world)
        if left[0] >= 0:
            break
        points += 1
        assert all(w in SHARES for w in world.traffic.seen)
        assert serving(world) == ("v1" if bad else "v2")
        assert world.traffic.now == ({"v1": 100} if bad else {"v2": 100})
        end = "rolled_back v2" if bad else "promoted v2"
        assert world.kinds().count(end) == 1
        steps = world.ledger.entries("tiny", "rollout.step", "v2")
        assert [e.body["weight"] for e in steps] == ([10] if bad else [10, 50, 100])
        assert world.revisions.names() == (("v1",) if bad else ("v1", "v2"))
    assert points > 15


def arm(patch: pytest.MonkeyPatch, world: World, point: int) -> list[int]:
    """Kill once, at call number ``point`` // 2: before it when even, after it when odd."""
    left = [point]

    def guarded(real):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == -1:
                raise Killed
            result = real(*args, **kwargs)
            left[0] -= 1
            if left[0] == -1:
                raise Killed
            return result

        return call

    for place, name in [
        (rollouts, "save"),
        (rollouts, "write"),
        (rollouts, "set_serving"),
        (world.ledger, "append"),
        (world.traffic, "set_weights"),
        (world.revisions, "start"),
        (world.revisions, "stop"),
    ]:
        patch.setattr(place, name, guarded(getattr(place, name)))
    return left


def run_with_restarts(world: World) -> None:
    for _ in range(40):
        try:
            world.tick()
        except Killed:
            world.controller = world.new_controller()
