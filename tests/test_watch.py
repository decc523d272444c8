"""The operator hears of a deletion also when its watch was broken off meanwhile."""

from dataclasses import dataclass, field

import pytest
from test_controller import FakeClock

from perennial.errors import Unavailable
from perennial.rollout.watch import LOOK_S, ROLLOUTS, SERVICES, Census, Change

LABELS = {"perennial.dev/project": "retail"}


@dataclass
class Cluster:
    names: set[str] = field(default_factory=set)
    down: bool = False
    asked: int = 0

    def __call__(self) -> set[str]:
        self.asked += 1
        if self.down:
            raise Unavailable("the API server does not answer")
        return self.names


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def census(cluster: Cluster, clock: FakeClock) -> Census:
    return Census(cluster, clock.monotonic)


def told(name: str, kind: str = SERVICES[2], *, gone: bool = False) -> Change:
    body = {"metadata": {"name": name, "labels": LABELS}, "spec": {"large": "x" * 1000}}
    return Change(kind, name, gone, body)


def test_what_went_without_a_word_is_told_once_with_its_labels(census, cluster, clock):
    cluster.names = {"one"}
    census.gone([told("one"), told("two")])
    clock.seconds += LOOK_S

    assert census.gone([]) == [
        Change(SERVICES[2], "two", True, {"metadata": {"name": "two", "labels": LABELS}})
    ]
    clock.seconds += LOOK_S
    assert census.gone([]) == []


def test_the_api_server_is_asked_once_a_minute_whatever_happens(census, cluster, clock):
    for _ in range(239):
        census.gone([told("one")])
        clock.seconds += 0.5

    assert cluster.asked == 1


def test_what_was_told_gone_is_not_told_again(census, cluster, clock):
    census.gone([told("one"), told("two")])
    clock.seconds += LOOK_S

    assert census.gone([told("one", gone=True), told("two", gone=True)]) == []


def test_an_api_server_that_is_away_says_nothing_of_who_is_there(census, cluster, clock):
    census.gone([told("one")])
    cluster.down = True
    clock.seconds += LOOK_S
    assert census.gone([]) == []

    cluster.down = False
    clock.seconds += LOOK_S
    assert [c.name for c in census.gone([])] == ["one"]


def test_a_modelrollout_is_not_looked_for_among_services(census, clock):
    census.gone([told("mine", ROLLOUTS[2])])
    clock.seconds += LOOK_S

    assert census.gone([]) == []
