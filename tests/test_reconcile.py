"""The operator's loop: who leads, what is told, and what a steady project costs."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError
from test_controller import FakeClock, FakeEvidence, FakeRevisions, FakeTraffic

from perennial.errors import BadInput, Unavailable
from perennial.ledger import Ledger, why
from perennial.records import Evidence, Phase, RolloutState, Version
from perennial.rollout.board import Board
from perennial.rollout.places import Adapters
from perennial.rollout.reconcile import REST_S, Reconciler
from perennial.rollout.watch import Change
from perennial.store import lease, rollouts, versions
from perennial.store.engine import make_engine
from perennial.store.lease import Leader

KEEP = 3
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass
class FakeClient:
    """The API server's ModelRollouts, and how often it was asked."""

    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    down: bool = False
    undeletable: str = ""

    def list(self, kind: Any) -> list[dict[str, Any]]:
        self._ask("list")
        return list(self.objects.values())

    def create(self, made: Any) -> None:
        self._ask(f"create {made['metadata']['name']}")
        self.objects[made["metadata"]["name"]] = dict(made)

    def apply(self, told: Any, force: bool) -> None:
        self._ask(f"tell {told['metadata']['name']}")
        self.objects[told["metadata"]["name"]]["status"] = told["status"]

    def delete(self, kind: Any, name: str, namespace: str | None) -> None:
        self._ask(f"delete {name}")
        if self.undeletable:
            raise Unavailable(self.undeletable)
        self.objects.pop(name, None)

    def _ask(self, what: str) -> None:
        if self.down:
            raise Unavailable("the API server does not answer")
        self.calls.append(what)


@dataclass
class FakeChanges:
    waiting: list[Change] = field(default_factory=list)

    def take(self) -> list[Change]:
        found, self.waiting = self.waiting, []
        return found


@dataclass
class FakePlace:
    """Adapters of one project, and what somebody changed there."""

    traffic: FakeTraffic = field(default_factory=FakeTraffic)
    revisions: FakeRevisions = field(default_factory=FakeRevisions)
    edits: list[str] = field(default_factory=list)
    looks: list[str] = field(default_factory=list)
    allowed: list[set[int | None]] = field(default_factory=list)

    @property
    def inspected(self) -> int:
        return len(self.allowed)

    def inspect(self, allowed: Collection[int | None]) -> list[str]:
        self.allowed.append(set(allowed))
        return self.edits

    def named(self, name: str) -> str:
        self.looks.append(name)
        return f"tiny-predictor-{name}"

    def adapters(self) -> Adapters:
        return Adapters(
            self.traffic,
            self.revisions,
            FakeEvidence(),
            self.named,
            self.inspect,
            lambda: None,
        )


class World:
    def __init__(self, folder: Path) -> None:
        self.engine = make_engine(f"sqlite:///{folder}/state.db")
        self.client, self.changes, self.clock = FakeClient(), FakeChanges(), FakeClock()
        self.places: dict[str, FakePlace] = {}
        self.alive: list[float] = []
        self.reconciler = self.another("one")

    def another(self, holder: str) -> Reconciler:
        board = Board(self.client, lambda: NOW, self.clock.monotonic)  # type: ignore[arg-type]
        return Reconciler(
            self.engine,
            board,
            Leader(self.engine, "operator", holder, 15.0, lambda: self.clock.seconds),
            self.changes,
            lambda project: self.place(project).adapters(),
            self.clock,
            lambda state: None,
            lambda project, digest: f"s3://b/{project}/{digest}",
            lambda: self.alive.append(self.clock.seconds),
            KEEP,
        )

    def place(self, project: str = "tiny") -> FakePlace:
        return self.places.setdefault(project, FakePlace())

    def wish(self, version: int, project: str = "tiny") -> RolloutState:
        return rollouts.wish(
            self.engine,
            project=project,
            version=version,
            digest=f"sha256:{version}",
            bundle_uri="s3://b/x",
            run_id=f"run-{version}",
        )

    def turn(self, times: int = 1, reconciler: Reconciler | None = None) -> bool:
        leads = False
        for _ in range(times):
            self.clock.seconds += 1
            leads = (reconciler or self.reconciler).turn()
        return leads

    def status(self, name: str) -> dict[str, Any]:
        return dict(self.client.objects[name].get("status", {}))

    def edit(self, generation: int, project: str = "tiny", name: str = "") -> None:
        labels = {"perennial.dev/project": project}
        meta = {"name": name or project, "generation": generation, "labels": labels}
        change = Change("inferenceservices", meta["name"], False, {"metadata": meta})
        self.changes.waiting.append(change)

    def gone(self, name: str, project: str = "tiny") -> None:
        meta = {"name": name, "generation": 1, "labels": {"perennial.dev/project": project}}
        self.changes.waiting.append(Change("inferenceservices", name, True, {"metadata": meta}))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_wish_of_a_pipeline_gets_its_resource_and_its_end_is_told(world):
    world.wish(1)
    world.turn(4)
    world.wish(2)
    world.turn(12)

    assert world.status("tiny-v1")["phase"] == "Promoted"
    told = world.status("tiny-v2")
    assert (told["phase"], told["step"], told["weight"]) == ("Promoted", "3/3", 100)
    assert [h["weight"] for h in told["history"]] == [10, 50, 100]
    assert told["revision"] == "tiny-predictor-v2"


def test_a_steady_project_costs_neither_a_call_nor_a_look(world):
    world.wish(1)
    world.turn(6)
    world.client.calls.clear()
    world.place().looks.clear()

    world.turn(120)

    assert world.client.calls == []
    assert world.place().looks == []


def test_words_are_told_every_few_seconds_and_moves_at_once(world):
    world.wish(1)
    world.turn(4)
    revisions, words = world.place().revisions, iter(range(99))
    ready = revisions.ready

    def always_another(name: str) -> bool:
        raise Unavailable(f"waits for the {next(words)}th thing")

    revisions.ready = always_another  # type: ignore[method-assign]
    world.wish(2)
    world.turn(20)
    told = [c for c in world.client.calls if c == "tell tiny-v2"]

    assert 2 <= len(told) <= 6
    revisions.ready = ready  # type: ignore[method-assign]
    world.turn(1)
    assert world.status("tiny-v2")["weight"] == 10


def test_a_wait_that_is_over_is_no_longer_told_once_the_project_is_steady(world):
    world.wish(1)
    world.turn(6)
    revisions, looks = world.place().revisions, iter(range(99))
    ready = revisions.ready

    def not_at_first(name: str) -> bool:
        promoted = rollouts.history(world.engine, "tiny")[-1].phase is Phase.PROMOTED
        if promoted and next(looks) < 2:
            raise Unavailable("waits until KServe notes that v2 has all traffic")
        return ready(name)

    revisions.ready = not_at_first  # type: ignore[method-assign]
    world.wish(2)
    until(world, lambda: "KServe notes" in progress(world, "tiny-v2")["message"])

    world.turn(6)

    assert progress(world, "tiny-v2")["reason"] == "Promoted"
    assert "KServe notes" not in progress(world, "tiny-v2")["message"]
    world.client.calls.clear()
    world.place().looks.clear()
    world.turn(60)
    assert (world.client.calls, world.place().looks) == ([], [])


def until(world: World, happened: Callable[[], bool]) -> None:
    for _ in range(30):
        if happened():
            return
        world.turn(1)
    raise AssertionError("it did not come about")


def progress(world: World, name: str) -> dict[str, Any]:
    """What its resource says of how it goes on; empty words while there is none."""
    told = world.status(name).get("conditions", ()) if name in world.client.objects else ()
    return next((c for c in told if c["type"] == "Progressing"), {"reason": "", "message": ""})


@pytest.mark.parametrize(
    ("dead", "meanwhile", "at_last"),
    [("its server ended", "RollingBack", "RolledBack"), ("", "Promoting", "Promoted")],
)
def test_an_end_is_told_as_one_only_when_requests_have_moved(world, dead, meanwhile, at_last):
    world.wish(1)
    world.turn(6)
    world.wish(2)
    until(world, lambda: world.place().traffic.now.get("v2") == 10)
    if dead:
        world.place().revisions.dead["v2"] = dead
    over = {Phase.ROLLED_BACK, Phase.PROMOTED}

    def stop_before_the_end(weights: dict[str, int]) -> None:
        if rollouts.history(world.engine, "tiny")[-1].phase in over:
            raise Unavailable("traffic of tiny is on its way")
        take(weights)

    take, world.place().traffic.set_weights = world.place().traffic.set_weights, stop_before_the_end
    until(world, lambda: world.status("tiny-v2")["phase"] == meanwhile)
    world.turn(3)

    assert world.status("tiny-v2")["phase"] == meanwhile
    assert conditions(world, "tiny-v2") == {"Progressing": "True", "Complete": "False"}
    assert progress(world, "tiny-v2")["message"] == "traffic of tiny is on its way"
    world.place().traffic.set_weights = take
    world.turn(3)
    assert world.status("tiny-v2")["phase"] == at_last
    assert conditions(world, "tiny-v2") == {"Progressing": "False", "Complete": "True"}


def conditions(world: World, name: str) -> dict[str, str]:
    told = world.status(name)["conditions"]
    return {c["type"]: c["status"] for c in told if c["type"] in ("Progressing", "Complete")}


def test_why_a_candidate_was_not_started_yet_is_told_until_it_is(world):
    world.wish(1)
    world.turn(4)
    revisions = world.place().revisions
    start = revisions.start

    def not_yet(state: RolloutState) -> None:
        raise Unavailable("v2 waits until KServe notes that v1 has all traffic")

    revisions.start = not_yet  # type: ignore[method-assign]
    world.wish(2)
    world.turn(3)

    going = next(c for c in world.status("tiny-v2")["conditions"] if c["type"] == "Progressing")
    assert "until KServe notes" in going["message"]
    assert world.place().traffic.now == {"v1": 100}
    revisions.start = start  # type: ignore[method-assign]
    world.turn(12)
    assert world.status("tiny-v2")["phase"] == "Promoted"


def serve_all(world: World, numbers: range) -> None:
    for version in numbers:
        world.wish(version)
        world.turn(12)


def test_old_resources_are_deleted_and_what_serves_keeps_its_own(world):
    serve_all(world, range(1, 6))
    assert set(world.client.objects) == {"tiny-v3", "tiny-v4", "tiny-v5"}
    world.place().revisions.refused = "no"
    serve_all(world, range(6, 11))

    assert set(world.client.objects) == {"tiny-v5", "tiny-v8", "tiny-v9", "tiny-v10"}
    assert len(rollouts.history(world.engine, "tiny")) == 10
    world.client.calls.clear()
    world.turn(60)
    assert world.client.calls == []


def test_resources_that_nobody_deleted_are_found_by_the_next_leader(world):
    world.client.undeletable = "operator cannot delete modelrollouts"
    serve_all(world, range(1, 6))
    assert len(world.client.objects) == 5
    assert world.status("tiny-v5")["phase"] == "Promoted"

    world.client.undeletable = ""
    world.clock.seconds += 60
    world.turn(3, world.another("two"))

    assert set(world.client.objects) == {"tiny-v3", "tiny-v4", "tiny-v5"}


def test_a_resource_that_a_person_made_is_theirs_to_delete(world, registered):
    registered(1)
    change = asked("mine", 1, "sha256:1")
    world.client.objects["mine"] = dict(change.body)
    world.changes.waiting.append(change)
    world.turn(12)

    serve_all(world, range(2, 8))

    assert world.status("mine")["phase"] == "Promoted"
    assert set(world.client.objects) == {"mine", "tiny-v5", "tiny-v6", "tiny-v7"}


def test_what_was_not_told_because_nobody_answered_is_told_later(world):
    world.turn(1)
    world.client.down = True
    world.wish(1)
    world.turn(5)
    assert rollouts.serving(world.engine, "tiny")

    world.client.down = False
    world.turn(2)

    assert world.status("tiny-v1")["phase"] == "Promoted"


def test_only_one_leads_and_the_next_one_goes_on(world):
    second = world.another("two")
    world.wish(1)
    world.turn(4)
    assert not world.turn(1, second)
    world.wish(2)
    world.turn(3)
    going = rollouts.open_rollout(world.engine, "tiny")
    assert going and going.phase is Phase.CANARY

    # The first one hangs for longer than its lease, and wakes up again.
    world.clock.seconds += 60
    assert world.turn(10, second)
    assert not world.turn(1)

    assert rollouts.history(world.engine, "tiny")[-1].phase is Phase.PROMOTED


def test_who_lost_the_lease_moves_nothing(world):
    world.wish(1)
    world.turn(4)
    world.wish(2)
    world.turn(2)
    seen = list(world.place().traffic.seen)
    # It has just renewed the lease, and so believes for a while that it leads.
    world.reconciler._leader.check()
    lease.release(world.engine, "operator", 1)
    lease.acquire(world.engine, "operator", "two", 999, world.clock.seconds)

    world.turn(4)

    assert world.place().traffic.seen == seen


def test_a_takeover_that_the_api_server_did_not_answer_is_made_anew(world):
    world.wish(1)
    world.turn(4)
    canary = world.wish(2)
    world.turn(2)
    assert world.place().traffic.now.get("v2")
    # The first one is killed after it wrote the end of the canary, before it took its share away.
    ended = replace(canary, phase=Phase.ROLLED_BACK, reason="too many errors")
    rollouts.save(world.engine, ended)
    world.clock.seconds += 60
    second = world.another("two")
    world.client.down = True
    with pytest.raises(Unavailable):
        world.turn(1, second)

    world.client.down = False
    world.turn(4, second)

    assert world.place().traffic.now == {"v1": 100}


def test_who_hangs_between_its_check_and_its_write_writes_nothing(world, monkeypatch):
    world.wish(1)
    world.turn(4)
    world.wish(2)
    world.turn(2)
    told = rollouts.open_rollout(world.engine, "tiny")
    before = entries(world)

    def hang(*_: object) -> Evidence:
        overtaken(world)
        return FakeEvidence().look("", "", "")

    monkeypatch.setattr(world.reconciler._desks["tiny"].controller._evidence, "look", hang)
    world.turn(1)

    assert rollouts.open_rollout(world.engine, "tiny") == told
    assert entries(world) == before


def overtaken(world: World) -> None:
    lease.release(world.engine, "operator", 1)
    lease.acquire(world.engine, "operator", "two", 999, world.clock.seconds)


def entries(world: World) -> list[str]:
    return [f"{e.kind} {e.subject}" for e in Ledger(world.engine).entries("tiny")]


def test_who_hangs_before_it_tells_of_an_edit_tells_nothing(world, monkeypatch):
    world.wish(1)
    world.turn(6)
    before = entries(world)
    record = world.reconciler._record_edits

    def hang(*given: Any) -> None:
        overtaken(world)
        record(*given)

    world.place().edits = ["spec.predictor.maxReplicas is 3, applied was 1"]
    world.edit(2)
    monkeypatch.setattr(world.reconciler, "_record_edits", hang)
    world.turn(1)

    assert entries(world) == before


def test_who_hangs_before_it_takes_a_wish_over_wishes_nothing(world, registered, monkeypatch):
    registered(1)
    world.turn(1)
    known = versions.by_number

    def hang(*given: Any) -> Version | None:
        overtaken(world)
        return known(*given)

    monkeypatch.setattr(versions, "by_number", hang)
    world.changes.waiting.append(asked("mine", 1, "sha256:1"))
    with pytest.raises(Unavailable, match="another operator leads now"):
        world.turn(1)

    assert rollouts.history(world.engine, "tiny") == []
    assert entries(world) == []


def test_an_edit_is_told_once_in_ledger_and_resource(world):
    world.wish(1)
    world.turn(6)
    world.place().revisions.refused = "no"
    world.wish(2)
    world.turn(6)
    world.edit(1)
    world.turn(1)
    world.place().edits = ["spec.predictor.maxReplicas is 3, applied was 1"]
    world.edit(2)
    world.turn(3)

    entries = Ledger(world.engine).entries("tiny", "serving.edited")
    assert [e.body["edits"] for e in entries] == [world.place().edits]
    applied = next(c for c in world.status("tiny-v1")["conditions"] if c["type"] == "AsApplied")
    assert applied["message"] == world.place().edits[0]
    world.clock.seconds += 60
    world.reconciler = world.another("two")
    world.turn(3)
    world.edit(2)
    world.turn(2)
    assert len(Ledger(world.engine).entries("tiny", "serving.edited")) == 1
    world.place().edits = []
    world.edit(3)
    world.turn(2)
    applied = next(c for c in world.status("tiny-v1")["conditions"] if c["type"] == "AsApplied")
    assert applied["status"] == "True"


def test_who_takes_over_looks_for_edits_that_nobody_led_to_see(world):
    second = world.another("two")
    world.wish(1)
    world.turn(6)
    world.place().edits = ["spec.predictor.maxReplicas is 3, applied was 1"]
    # The one that waits hears of it, and has no use for it yet.
    world.edit(2)
    world.turn(1, second)
    world.clock.seconds += 60

    world.turn(3, second)

    (told,) = Ledger(world.engine).entries("tiny", "serving.edited")
    assert told.body["edits"] == world.place().edits
    applied = next(c for c in world.status("tiny-v1")["conditions"] if c["type"] == "AsApplied")
    assert applied["message"] == world.place().edits[0]


def test_an_edit_that_stands_is_still_shown_after_a_takeover_and_its_end_is_told(world):
    world.wish(1)
    world.turn(6)
    world.place().edits = ["spec.predictor.maxReplicas is 3, applied was 1"]
    world.edit(2)
    world.turn(3)
    world.clock.seconds += 60
    world.reconciler = world.another("two")
    world.turn(3)

    applied = next(c for c in world.status("tiny-v1")["conditions"] if c["type"] == "AsApplied")
    assert applied["status"] == "False"
    world.clock.seconds += 60
    world.place().edits = []
    world.turn(3, world.another("three"))
    entries = Ledger(world.engine).entries("tiny", "serving.edited")
    assert [bool(e.body["edits"]) for e in entries] == [True, False]


@pytest.mark.parametrize("how", ["under the operator", "before it came", "with the cluster"])
def test_what_serves_is_made_anew_when_it_is_not_there_and_that_is_told(world, how):
    world.wish(1)
    world.turn(6)
    world.place().revisions.up.clear()
    world.place().traffic.now = {}

    if how == "under the operator":
        world.gone("tiny")
    else:
        world.clock.seconds += 60
        world.reconciler = world.another("two")
    if how == "with the cluster":
        world.client.objects.clear()
    world.turn(4)

    assert world.place().revisions.up == ["v1"]
    assert world.place().traffic.now == {"v1": 100}
    (entry,) = Ledger(world.engine).entries("tiny", "serving.restored")
    assert (entry.subject, entry.body["rollout"]) == ("v1", 1)
    assert "no InferenceService of it" in entry.body["reason"]


def test_why_tells_of_what_was_edited_and_made_anew(world):
    body = {"run": "run-1", "version": 1, "digest": "sha256:1"}
    Ledger(world.engine).append("registered", project="tiny", subject="v1", body=body, now=NOW)
    world.wish(1)
    world.turn(6)
    world.edit(1)
    world.place().edits = ["spec.predictor.maxReplicas is 3, applied was 1"]
    world.turn(2)
    world.place().revisions.up.clear()
    world.gone("tiny")
    world.turn(4)

    story = why(Ledger(world.engine).entries("tiny"))

    assert "  edited      2026-01-01: spec.predictor.maxReplicas is 3, applied was 1" in story
    assert any(line.startswith("  restored    2026-01-01: v1 serves by the") for line in story)


def test_what_serves_is_made_anew_while_a_canary_is_judged_and_the_canary_goes_on(world):
    world.wish(1)
    world.turn(4)
    world.wish(2)
    world.turn(2)
    assert set(world.place().traffic.now) == {"v1", "v2"}
    world.place().revisions.up.remove("v1")

    world.gone("tiny-v1")
    world.turn(1)

    assert sorted(world.place().revisions.up) == ["v1", "v2"]
    world.turn(12)
    assert world.status("tiny-v2")["phase"] == "Promoted"
    assert [h["weight"] for h in world.status("tiny-v2")["history"]] == [10, 50, 100]


def test_a_version_that_the_operator_ended_itself_is_not_made_anew(world):
    serve_all(world, range(1, 4))
    assert "v1" not in world.place().revisions.up

    world.gone("tiny-v1")
    world.turn(3)

    assert "v1" not in world.place().revisions.up
    assert Ledger(world.engine).entries("tiny", "serving.restored") == []


def test_each_of_several_services_of_a_project_has_its_own_edits(world):
    world.wish(1)
    world.turn(6)
    for generation, name in ((2, "tiny-v1"), (5, "tiny-v2")):
        world.edit(generation, name=name)
    world.turn(2)
    inspected = world.place().inspected

    # The same events again, as a watch that begins anew tells them; then one real edit.
    for generation, name in ((2, "tiny-v1"), (5, "tiny-v2")):
        world.edit(generation, name=name)
        world.turn(2)
    assert world.place().inspected == inspected
    world.edit(3, name="tiny-v1")
    world.turn(2)
    assert world.place().inspected == inspected + 1


def test_what_could_not_be_cleared_away_is_no_edit(world):
    world.wish(1)
    world.turn(6)
    world.wish(2)
    world.turn(1)
    world.place().revisions.dead = {"v2": "ended with code 2"}
    world.place().revisions.stop = away  # type: ignore[method-assign]
    world.turn(100)
    world.edit(7)
    world.turn(1)
    assert world.place().allowed[-1] == {None, 0}

    world.place().revisions.dead = {}
    world.place().revisions.stop = lambda name: None  # type: ignore[method-assign]
    world.wish(3)
    world.turn(12)
    world.edit(8)
    world.turn(1)
    assert world.place().allowed[-1] == {None}


def asked(name: str, version: int, digest: str, **spec: object) -> Change:
    wanted = {"project": "tiny", "version": version, "digest": digest, **spec}
    body = {"metadata": {"name": name, "uid": "u"}, "spec": wanted}
    return Change("modelrollouts", name, False, body)


@pytest.fixture
def registered(world: World) -> Callable[[int], None]:
    def register(version: int) -> None:
        versions.next_version(world.engine, "tiny", f"sha256:{version}", "run", NOW)

    return register


def test_a_resource_of_a_person_becomes_one_wish(world, registered):
    registered(1)
    change = asked("mine", 1, "sha256:1", steps=[50, 100])
    world.client.objects["mine"] = dict(change.body)

    for _ in range(3):
        world.changes.waiting.append(change)
        world.turn(2)

    (state,) = rollouts.history(world.engine, "tiny")
    assert '"steps":[50,100]' in state.limits
    assert state.bundle_uri == "s3://b/tiny/sha256:1"
    assert world.status("mine")["phase"] == "Promoted"
    assert "create mine" not in world.client.calls
    assert len(Ledger(world.engine).entries("tiny", "rollout.wished")) == 1


@pytest.mark.parametrize(
    ("version", "digest", "said"),
    [
        pytest.param(9, "sha256:9", "has no version v9", id="a version that nobody registered"),
        pytest.param(1, "sha256:2", "has digest sha256:1", id="another model than the version's"),
    ],
)
def test_a_wish_for_what_passed_no_gate_is_refused(world, registered, version, digest, said):
    registered(1)
    change = asked("mine", version, digest)
    world.client.objects["mine"] = dict(change.body)
    world.changes.waiting.append(change)

    world.turn(2)

    assert world.status("mine")["phase"] == "Refused"
    assert said in world.status("mine")["reason"]
    assert rollouts.history(world.engine, "tiny") == []


def test_a_refusal_is_final_whatever_is_registered_later(world, registered):
    change = asked("early", 1, "sha256:1")
    world.client.objects["early"] = dict(change.body)
    world.changes.waiting.append(change)
    world.turn(2)
    assert world.status("early")["phase"] == "Refused"

    registered(1)
    world.clock.seconds += 60
    # Its watch tells the next operator of every object that stands there.
    stands, second = world.client.objects["early"], world.another("two")
    world.changes.waiting.append(replace(change, body=stands))
    world.turn(3, second)

    assert rollouts.history(world.engine, "tiny") == []
    assert world.status("early")["phase"] == "Refused"
    anew = {"metadata": {**stands["metadata"], "uid": "u2"}, "spec": stands["spec"]}
    world.client.objects["early"] = dict(anew)
    world.changes.waiting.append(replace(change, body=anew))
    world.turn(6, second)
    assert world.status("early")["phase"] == "Promoted"


def test_what_nobody_could_answer_is_answered_later_all_of_it(world, registered, monkeypatch):
    registered(1)
    registered(2)
    changes = [
        asked("bad", 9, "sha256:9"),
        asked("one", 1, "sha256:1"),
        asked("two", 2, "sha256:2"),
    ]
    for change in changes:
        world.client.objects[change.name] = dict(change.body)
    world.turn(1)
    world.changes.waiting = changes
    world.client.down = True
    with pytest.raises(Unavailable):
        world.turn(1)

    world.client.down = False
    with monkeypatch.context() as broken:
        broken.setattr(versions, "by_number", gone_database)
        with pytest.raises(OperationalError):
            world.turn(1)
    world.turn(1)

    assert world.status("bad")["phase"] == "Refused"
    assert [r.version for r in rollouts.history(world.engine, "tiny")] == [1, 2]


def gone_database(*_: object) -> None:
    raise OperationalError("select", {}, Exception("the connection is gone"))


def test_a_resource_that_was_deleted_before_it_was_answered_is_no_wish(
    world, registered, monkeypatch
):
    registered(1)
    change = asked("mine", 1, "sha256:1")
    world.changes.waiting = [change]
    with monkeypatch.context() as broken, pytest.raises(Unavailable):
        broken.setattr(versions, "by_number", away)
        world.turn(1)

    world.changes.waiting = [replace(change, gone=True)]
    world.turn(1)

    assert rollouts.history(world.engine, "tiny") == []


def test_a_refusal_that_the_api_server_refuses_keeps_nobody_waiting(world, registered, monkeypatch):
    registered(1)
    world.turn(1)
    world.changes.waiting = [asked("bad", 9, "sha256:9"), asked("mine", 1, "sha256:1")]

    def refuse(*_: object, **__: object) -> None:
        raise BadInput("status.reason is too long")

    monkeypatch.setattr(world.client, "apply", refuse)
    world.turn(1)

    assert [r.version for r in rollouts.history(world.engine, "tiny")] == [1]


@pytest.mark.parametrize("where", ["at its start", "when it ends"])
def test_what_the_api_server_refuses_is_shown_logged_once_and_asked_rarely(world, caplog, where):
    world.wish(1)
    world.turn(4)
    asks, traffic = [], world.place().traffic
    take = traffic.set_weights

    def refuse(weights: dict[str, int]) -> None:
        if where == "when it ends" and len(weights) == 2 and weights["v2"] != 100:
            return take(weights)
        asks.append(world.clock.seconds)
        raise BadInput("changing InferenceService tiny: refused by the API server: no")

    traffic.set_weights = refuse  # type: ignore[method-assign]
    world.wish(2)
    world.turn(40)

    going = next(c for c in world.status("tiny-v2")["conditions"] if c["type"] == "Progressing")
    assert (going["reason"], going["message"]) == (
        "Waiting",
        "changing InferenceService tiny: refused by the API server: no",
    )
    assert 3 <= len(asks) <= 6
    assert all(later - earlier >= REST_S for earlier, later in pairwise(asks))
    assert len([r for r in caplog.records if "refused by" in r.getMessage()]) == 1
    traffic.set_weights = take  # type: ignore[method-assign]
    world.turn(40)
    assert traffic.now == {"v2": 100}
    assert world.status("tiny-v2")["phase"] == "Promoted"


def test_a_refusal_that_comes_too_soon_to_be_told_is_not_asked_again_at_every_turn(world):
    world.wish(1)
    world.turn(4)
    asks: list[float] = []

    def away_then_refuse(_weights: dict[str, int]) -> None:
        asks.append(world.clock.seconds)
        raise Unavailable("no answer") if len(asks) <= 2 else BadInput("refused")

    world.place().traffic.set_weights = away_then_refuse  # type: ignore[method-assign]
    world.wish(2)
    world.turn(12)

    refused = asks[2:]
    assert progress(world, "tiny-v2")["message"] == "refused"
    assert len(refused) <= 2
    assert all(later - earlier >= REST_S for earlier, later in pairwise(refused))


def test_a_turn_does_not_last_while_nobody_answers_and_gets_round_to_all(world):
    projects = [f"p{number}" for number in range(8)]

    def hang(project: str) -> tuple[str, ...]:
        world.clock.seconds += 10
        looks.append(project)
        raise Unavailable("the API server does not answer")

    looks: list[str] = []
    for project in projects:
        world.place(project).revisions.names = partial(hang, project)  # type: ignore[method-assign]
        world.wish(1, project)
    before = world.clock.seconds
    world.turn(1)

    assert world.clock.seconds - before < 15
    assert len(world.alive) == len(looks) == 1
    world.turn(8)
    assert looks[:8] == projects
    assert len(world.alive) == len(looks) == 9


def test_a_project_that_cannot_be_moved_does_not_keep_the_others_waiting(world):
    world.place("tiny").revisions.names = away  # type: ignore[method-assign]
    world.wish(1)
    world.wish(1, "other")

    world.turn(4)

    assert rollouts.serving(world.engine, "other")
    assert rollouts.serving(world.engine, "tiny") is None


def test_a_fault_of_ours_in_one_project_stops_no_other_and_is_got_over(world, caplog):
    names = world.place("tiny").revisions.names
    world.place("tiny").revisions.names = faulty  # type: ignore[method-assign]
    world.wish(1)
    world.wish(1, "other")

    world.turn(4)

    assert rollouts.serving(world.engine, "other")
    assert [r.getMessage()[:40] for r in caplog.records if r.exc_info] == [
        "project=tiny is put aside for 10 s: a fa"
    ]
    world.place("tiny").revisions.names = names  # type: ignore[method-assign]
    world.turn(12)
    assert rollouts.serving(world.engine, "tiny")


def faulty(*_: object) -> tuple[str, ...]:
    raise KeyError("nobody thought of it")


def away(*_: object) -> tuple[str, ...]:
    raise Unavailable("no answer")
