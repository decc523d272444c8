"""MLflow hears which version serves, however often that fails, and from one process at a time."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from test_controller import FakeClock

from perennial.errors import BadInput, Unavailable
from perennial.ledger import Ledger
from perennial.records import Phase, RolloutState
from perennial.rollout import champion
from perennial.rollout.champion import PATIENCE_S, TOLD, Champion
from perennial.store import lease, rollouts
from perennial.store.engine import make_engine


@dataclass
class FakeChild:
    """A process that ends when it is told how."""

    code: int | None = None
    killed: bool = False

    def poll(self) -> int | None:
        return self.code

    def kill(self) -> None:
        self.killed = True

    def wait(self) -> int:
        return -9


@dataclass
class World:
    folder: Path
    clock: FakeClock = field(default_factory=FakeClock)
    told: list[str] = field(default_factory=list)
    children: list[FakeChild] = field(default_factory=list)
    ends: int | None = 0  # how each process ends, None for one that does not

    def __post_init__(self) -> None:
        self.engine = make_engine(f"sqlite:///{self.folder}/state.db")
        self.leader, self.champion = self.another("one")
        assert self.leader.leads()

    def another(self, holder: str) -> tuple[lease.Leader, Champion]:
        leader = lease.Leader(self.engine, "operator", holder, 1e6, lambda: self.clock.seconds)
        return leader, Champion(self.engine, leader, self.clock, self.start)

    def start(self, project: str, revision: str) -> FakeChild:
        self.told.append(f"{project} {revision}")
        self.children.append(FakeChild(self.ends))
        return self.children[-1]

    def serve(self, version: int, project: str = "tiny") -> RolloutState:
        state = rollouts.wish(
            self.engine,
            project=project,
            version=version,
            digest=f"sha256:{version}",
            bundle_uri="",
            run_id=f"run-{version}",
        )
        rollouts.save(self.engine, replace(state, phase=Phase.PROMOTED))
        rollouts.set_serving(self.engine, project, state.id)
        return state

    def turn(self, times: int = 1, seconds: float = 1.0) -> None:
        for _ in range(times):
            self.clock.seconds += seconds
            self.champion.turn()

    def recorded(self, project: str = "tiny") -> list[str]:
        return [e.subject for e in Ledger(self.engine).entries(project, TOLD)]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_each_promotion_is_told_once_and_noted(world):
    world.turn(3)
    for version in (1, 2):
        world.champion.promoted(world.serve(version))
        world.turn(100)

    assert world.told == ["tiny v1", "tiny v2"]
    assert world.recorded() == ["v1", "v2"]


def test_what_failed_is_told_again_ever_more_rarely_until_it_succeeds(world, caplog):
    world.turn(1)
    world.ends = 2
    world.champion.promoted(world.serve(1))
    world.turn(600)
    assert 4 <= len(world.told) <= 8
    assert world.recorded() == []
    assert "project=tiny serving=v1: it ended with 2" in caplog.text

    world.ends = 0
    world.turn(600)

    assert world.recorded() == ["v1"]


def test_what_an_operator_that_was_killed_did_not_tell_the_next_one_tells(world):
    world.serve(1)
    world.serve(7, "other")
    world.turn(5)
    world.serve(2)  # promoted, and killed before it heard of it
    lease.release(world.engine, "operator", 1)

    leader, world.champion = world.another("two")
    assert leader.leads()
    world.turn(50)

    assert sorted(world.told) == ["other v7", "tiny v1", "tiny v2"]
    assert world.recorded() == ["v1", "v2"]


def test_one_process_runs_at_a_time(world):
    world.turn(1)
    world.ends = None
    for project in ("a", "b"):
        world.champion.promoted(world.serve(1, project))
    world.turn(5)
    assert world.told == ["a v1"]

    world.children[0].code = 0
    world.turn(2)

    assert world.told == ["a v1", "b v1"]


def test_a_process_that_hangs_is_ended_and_the_others_have_their_turn(world):
    world.turn(1)
    world.ends = None
    for project in ("a", "b"):
        world.champion.promoted(world.serve(1, project))
    world.turn(int(PATIENCE_S) + 5)

    assert world.children[0].killed
    assert "b v1" in world.told
    assert world.recorded("a") == []


def test_a_promotion_while_the_one_before_is_told_has_the_last_word(world):
    world.turn(1)
    world.ends = None
    world.champion.promoted(world.serve(1))
    world.turn(1)
    world.champion.promoted(world.serve(2))
    world.children[0].code = world.ends = 0
    world.turn(50)

    assert world.told == ["tiny v1", "tiny v2"]
    assert world.recorded() == ["v1", "v2"]


def test_who_does_not_lead_tells_and_notes_nothing(world):
    world.turn(1)
    world.ends = None
    world.champion.promoted(world.serve(1))
    world.turn(1)
    lease.release(world.engine, "operator", 1)
    lease.acquire(world.engine, "operator", "two", 1e6, world.clock.seconds)
    world.children[0].code = 0

    with pytest.raises(Unavailable, match="another operator leads"):
        world.turn(1)
    world.champion.promoted(world.serve(2))
    world.turn(5)

    assert world.told == ["tiny v1"]
    assert world.recorded() == []


def test_who_hangs_before_it_notes_a_telling_notes_nothing(world, monkeypatch):
    world.turn(1)
    world.ends = None
    world.champion.promoted(world.serve(1))
    world.turn(1)
    world.children[0].code = 0
    now = world.clock.now

    def hang():
        lease.release(world.engine, "operator", 1)
        lease.acquire(world.engine, "operator", "two", 1e6, world.clock.seconds)
        return now()

    monkeypatch.setattr(world.clock, "now", hang)
    with pytest.raises(Unavailable, match="another operator leads now"):
        world.turn(1)

    assert world.recorded() == []


def test_a_telling_is_ended_with_the_leadership(world):
    world.turn(1)
    world.ends = None
    world.champion.promoted(world.serve(1))
    world.turn(1)
    world.leader.resign()
    world.turn(1)

    assert world.children[0].killed


@pytest.mark.slow
def test_the_process_is_one_that_knows_mlflow_and_says_what_it_lacks(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PERENNIAL_HOME", str(tmp_path))
    monkeypatch.delenv("PERENNIAL_TRACKING_URI", raising=False)

    child = champion.start("tiny", "v7")

    assert child.wait() == BadInput.exit_code
    assert "the MLflow registry knows no v7 of tiny" in capfd.readouterr().err
