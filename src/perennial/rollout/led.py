"""What only the leading operator moves: another one that hung and woke up is stopped before."""

from collections.abc import Mapping

from perennial.records import RolloutState
from perennial.rollout.ports import Revisions, Traffic
from perennial.store.lease import Leader


class LedTraffic:
    """Traffic that only the leader moves."""

    def __init__(self, traffic: Traffic, leader: Leader) -> None:
        self._traffic = traffic
        self._leader = leader

    def weights(self) -> Mapping[str, int]:
        return self._traffic.weights()

    def set_weights(self, weights: Mapping[str, int]) -> None:
        self._leader.check()
        self._traffic.set_weights(weights)


class LedRevisions:
    """Revisions that only the leader starts and stops."""

    def __init__(self, revisions: Revisions, leader: Leader) -> None:
        self._revisions = revisions
        self._leader = leader

    def names(self) -> tuple[str, ...]:
        return self._revisions.names()

    def start(self, state: RolloutState) -> None:
        self._leader.check()
        self._revisions.start(state)

    def ready(self, name: str) -> bool:
        # Behind an edge of ours, what is ready is made known to it.
        self._leader.check()
        return self._revisions.ready(name)

    def died(self, name: str) -> str:
        return self._revisions.died(name)

    def stop(self, name: str) -> None:
        self._leader.check()
        self._revisions.stop(name)
