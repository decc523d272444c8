"""A tenant's load on the shared Broker and PostgreSQL does not stop its neighbour's loop."""

import pytest
import retraining as loop
from brokers import NOBODY, broker, ended, flood, here, listening, send
from neighbours import neighbour, served

pytestmark = pytest.mark.cluster

FLOOD_S = 300


def test_an_event_is_decided_while_a_neighbour_floods_its_broker_and_holds_its_database(
    kubectl, spaces, postgres
):
    first, second = spaces("first"), spaces("second")
    with (
        served(postgres.migrated("first")) as ours,
        listening(ours.app) as port,
        neighbour(postgres.migrated("second")) as theirs,
    ):
        broker(kubectl, first, here(port))
        broker(kubectl, second, NOBODY)
        flood(kubectl, second, loop.event(7), FLOOD_S)
        theirs.take_all()
        theirs.lock()

        event = loop.event(1)
        send(kubectl, first, event, 1)
        ended(kubectl, first)

        assert ours.decided(event)
        assert [e.subject for e in ours.ledger.entries("churn", "event.received")] == [event.id]
        phase = kubectl.get("-n", second, "pod", "sender")["status"]["phase"]
        assert phase == "Running", "the flood went on all that while, and ends with its namespace"
