"""What a tenant does to the shared PostgreSQL does not stop the loop of its neighbour."""

import psycopg
import pytest
import retraining as loop
from neighbours import neighbour, served

EVENTS = 300


@pytest.fixture
def two(postgres) -> tuple[str, str]:
    """Two tenants, with roles and schemas of their own, on the one database."""
    return postgres.migrated("first"), postgres.migrated("second")


@pytest.mark.stores
def test_a_neighbour_with_all_its_connections_and_locks_and_a_full_inbox_stops_nobody(two):
    first, second = two
    with served(first) as ours, neighbour(second) as theirs:
        theirs.take_all()

        with theirs.flooding(EVENTS):
            event = loop.event(1)
            assert ours.post(event) == 202
            assert ours.decided(event)
        theirs.lock()
        with theirs.blocked():
            event = loop.event(2)
            assert ours.post(event) == 202
            assert ours.decided(event)

        assert theirs.loop.inbox.counts()["pending"] >= EVENTS
        assert len(ours.launcher.launched) == 2
        assert {e.subject for e in ours.ledger.entries("churn", "event.received")} == {
            loop.event(n).id for n in (1, 2)
        }, "nothing of the neighbour's came in"


@pytest.mark.stores
def test_a_neighbour_gets_no_connection_beyond_its_own(two):
    with neighbour(two[1]) as theirs:
        theirs.take_all()

        with pytest.raises(psycopg.OperationalError, match="too many connections for role"):
            theirs.take_all()
