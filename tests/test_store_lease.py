"""Exclusive work: one holder at a time and a number that tells a late one from the present one."""

import threading

import pytest
from sqlalchemy import Engine

from perennial.errors import Unavailable
from perennial.store import lease


def test_a_lease_has_one_holder_until_it_is_given_back(engine: Engine):
    first = lease.acquire(engine, "run", "a", ttl_s=10, now=100.0)
    refused = lease.acquire(engine, "run", "b", ttl_s=10, now=101.0)
    seen = lease.holder(engine, "run", now=101.0)
    lease.release(engine, "run", fence=first or 0)
    second = lease.acquire(engine, "run", "b", ttl_s=10, now=102.0)

    assert (first, refused, seen, second) == (1, None, "a", 2)


def test_a_lease_of_a_dead_holder_can_be_taken_when_its_time_is_over(engine: Engine):
    lease.acquire(engine, "run", "dead", ttl_s=10, now=100.0)

    assert lease.holder(engine, "run", now=110.0) is None
    assert lease.acquire(engine, "run", "b", ttl_s=10, now=110.0) == 2


def test_a_late_holder_can_neither_renew_nor_release_the_lease_of_another(engine: Engine):
    lease.acquire(engine, "run", "late", ttl_s=10, now=100.0)
    lease.acquire(engine, "run", "b", ttl_s=10, now=111.0)

    renewed = lease.renew(engine, "run", fence=1, ttl_s=10, now=112.0)
    lease.release(engine, "run", fence=1)

    assert not renewed
    assert lease.holder(engine, "run", now=112.0) == "b"


def test_a_renewed_lease_lasts_longer_also_when_nobody_took_it_meanwhile(engine: Engine):
    lease.acquire(engine, "run", "a", ttl_s=10, now=100.0)

    assert lease.renew(engine, "run", fence=1, ttl_s=10, now=120.0)
    assert lease.acquire(engine, "run", "b", ttl_s=10, now=125.0) is None


def test_a_lease_that_was_given_back_cannot_be_renewed(engine: Engine):
    lease.acquire(engine, "run", "a", ttl_s=10, now=100.0)
    lease.release(engine, "run", fence=1)

    assert not lease.renew(engine, "run", fence=1, ttl_s=10, now=101.0)


def test_leases_of_different_names_do_not_meet(engine: Engine):
    assert lease.acquire(engine, "run:a", "x", ttl_s=10, now=0.0) == 1
    assert lease.acquire(engine, "run:b", "y", ttl_s=10, now=0.0) == 1


def test_eight_contenders_never_hold_a_lease_together(engine: Engine):
    inside: list[int] = []
    overlaps: list[int] = []
    fences: list[int] = []

    def contend() -> None:
        for _ in range(20):
            fence = lease.acquire(engine, "run", "x", ttl_s=1e6, now=1.0)
            if fence is None:
                continue
            inside.append(fence)
            overlaps.extend(inside[1:])
            inside.remove(fence)
            fences.append(fence)
            lease.release(engine, "run", fence)

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert overlaps == []
    assert fences == sorted(set(fences))
    assert len(fences) >= 20


def test_steps_of_one_run_hold_its_lease_by_name_and_nobody_else_gets_it(engine: Engine):
    first = lease.hold(engine, "run", "run-1", ttl_s=10, now=100.0)
    again = lease.hold(engine, "run", "run-1", ttl_s=10, now=105.0)
    refused = lease.hold(engine, "run", "run-2", ttl_s=10, now=114.0)
    lease.let_go(engine, "run", "run-2")
    seen = lease.holder(engine, "run", now=114.0)
    lease.let_go(engine, "run", "run-1")
    free = lease.hold(engine, "run", "run-2", ttl_s=10, now=114.0)

    one, two = lease.Held("run-1", 1), lease.Held("run-2", 2)
    assert (first, again, refused, seen, free) == (one, one, one, "run-1", two)


def test_a_lease_that_is_held_by_name_is_lost_when_its_time_is_over(engine: Engine):
    lease.hold(engine, "run", "dead", ttl_s=10, now=100.0)

    assert lease.hold(engine, "run", "run-2", ttl_s=10, now=110.0).holder == "run-2"
    assert lease.acquire(engine, "run", "late", ttl_s=10, now=111.0) is None


def test_one_process_leads_and_the_next_takes_over_when_it_falls_silent(engine: Engine):
    clock = [100.0]
    one, two = (lease.Leader(engine, "work", n, 15.0, lambda: clock[0]) for n in ("a", "b"))

    begun = one.leads(), two.leads()
    clock[0] = 110.0
    kept = one.leads(), two.leads()
    clock[0] = 126.0  # the first renewed at 110 and was silent since
    taken = two.leads(), one.leads()

    assert (begun, kept, taken) == ((True, False), (True, False), (True, False))


def test_a_leader_that_resigns_is_followed_at_once(engine: Engine):
    one, two = (lease.Leader(engine, "work", n, 15.0, lambda: 100.0) for n in ("a", "b"))
    one.leads()

    one.resign()

    assert (two.leads(), one.leads()) == (True, False)


def test_a_leader_that_was_overtaken_is_stopped_before_it_moves_or_writes(engine: Engine):
    clock = [100.0]
    one, two = (lease.Leader(engine, "work", n, 15.0, lambda: clock[0]) for n in ("a", "b"))
    one.leads()
    one.check()
    with engine.begin() as connection:
        one.guard(connection)
    clock[0] = 120.0  # the first hung, and still believes that it leads
    assert two.leads()

    with pytest.raises(Unavailable, match="another work leads"), engine.begin() as connection:
        one.guard(connection)
    with pytest.raises(Unavailable, match="another work leads"):
        one.check()
    assert (one.term, two.term, one.leads()) == (None, 2, False)


def test_a_check_holds_on_to_the_lease_for_longer(engine: Engine):
    clock = [100.0]
    one, two = (lease.Leader(engine, "work", n, 15.0, lambda: clock[0]) for n in ("a", "b"))
    one.leads()
    clock[0] = 104.0
    one.check()

    clock[0] = 118.0

    assert not two.leads()
