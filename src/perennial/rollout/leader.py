"""May this process move rollouts: one operator leads by a lease row, the others stay idle."""

import logging
from collections.abc import Callable, Mapping

from sqlalchemy import Connection, Engine

from perennial.errors import Unavailable
from perennial.records import RolloutState
from perennial.rollout.ports import Revisions, Traffic
from perennial.store import fence, lease

log = logging.getLogger(__name__)

LEASE = "operator"
TTL_S = 15.0


class Leader:
    """Holds the lease, and says before each move whether it still does."""

    def __init__(
        self, engine: Engine, holder: str, now: Callable[[], float], ttl_s: float = TTL_S
    ) -> None:
        self._engine = engine
        self._holder = holder
        self._now = now
        self._ttl_s = ttl_s
        self._fence: int | None = None
        self._renewed = 0.0

    @property
    def term(self) -> int | None:
        """The fencing number, None while another process leads."""
        return self._fence

    def hold(self) -> bool:
        """Take the lease if it is free, or hold on to it; says whether it is ours."""
        if self._fence is None:
            self._fence = lease.acquire(self._engine, LEASE, self._holder, self._ttl_s, self._now())
            if self._fence is not None:
                log.info("leads holder=%s term=%d", self._holder, self._fence)
            self._renewed = self._now()
        elif self._now() - self._renewed > self._ttl_s / 3:
            self._renew()
        return self._fence is not None

    def check(self) -> None:
        """Nothing, while this process leads. Raises Unavailable when another one took over."""
        if self._fence is None or not self._renew():
            raise Unavailable("another operator leads now")

    def guard(self, connection: Connection) -> None:
        """As ``check``, in the transaction of a write: who hung since then writes nothing."""
        fence.check(connection, LEASE, self._fence)

    def let_go(self) -> None:
        """Give the lease back, so that another replica need not wait for its end."""
        if self._fence is not None:
            lease.release(self._engine, LEASE, self._fence)
        self._fence = None

    def _renew(self) -> bool:
        assert self._fence is not None
        if lease.renew(self._engine, LEASE, self._fence, self._ttl_s, self._now()):
            self._renewed = self._now()
            return True
        log.warning("lost the lease holder=%s term=%d", self._holder, self._fence)
        self._fence = None
        return False


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
