"""What serves, what is wished to serve, and what served before."""

from dataclasses import replace
from functools import partial

import pytest
from sqlalchemy import Engine

from perennial.errors import LoopBroken, Unavailable
from perennial.records import BY_HAND, Phase, RolloutState
from perennial.store import edges, fence, lease, rollouts


def wish(engine: Engine, version: int, run: str | None = None) -> RolloutState:
    return rollouts.wish(
        engine,
        project="churn",
        version=version,
        digest=f"sha256:{version}",
        bundle_uri=f"bundles/{version}",
        run_id=run or f"run-{version}",
    )


def test_a_wish_waits_at_no_traffic(engine: Engine):
    state = wish(engine, 1)

    assert (state.phase, state.step, state.weight) == (Phase.WISHED, -1, 0)
    assert rollouts.open_rollout(engine, "churn") == state
    assert rollouts.get(engine, state.id) == state


def test_the_same_run_wishing_twice_means_one_rollout(engine: Engine):
    assert wish(engine, 1) == wish(engine, 1)
    assert len(rollouts.history(engine, "churn")) == 1


def test_a_newer_wish_supersedes_one_that_was_not_begun(engine: Engine):
    old = wish(engine, 1)
    new = wish(engine, 2)

    assert rollouts.open_rollout(engine, "churn") == new
    superseded = rollouts.get(engine, old.id)
    assert superseded is not None
    assert superseded.phase is Phase.SUPERSEDED
    assert superseded.reason == "v2 was wished before this one began"


def test_a_newer_wish_waits_for_a_rollback_by_hand_that_was_not_begun(engine: Engine):
    by_hand = wish(engine, 1, f"{BY_HAND}2")
    wish(engine, 3)
    newer = wish(engine, 4)

    phases = [r.phase for r in rollouts.history(engine, "churn")]
    assert phases == [Phase.WISHED, Phase.SUPERSEDED, Phase.WISHED]
    assert rollouts.open_rollout(engine, "churn") == by_hand
    rollouts.save(engine, replace(by_hand, phase=Phase.PROMOTED))
    assert rollouts.open_rollout(engine, "churn") == newer


def test_a_rollback_by_hand_supersedes_all_that_was_not_begun(engine: Engine):
    wish(engine, 2, f"{BY_HAND}2")
    wish(engine, 3)
    again = wish(engine, 1, f"{BY_HAND}4")

    assert [r for r in rollouts.history(engine, "churn") if not r.phase.over] == [again]


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.CANARY])
def test_a_newer_wish_waits_for_a_rollout_that_has_begun(engine: Engine, phase: Phase):
    begun = replace(wish(engine, 1), phase=phase)
    rollouts.save(engine, begun)
    new = wish(engine, 2)

    assert rollouts.open_rollout(engine, "churn") == begun
    rollouts.save(engine, replace(begun, phase=Phase.PROMOTED))
    assert rollouts.open_rollout(engine, "churn") == new


def test_saving_a_rollout_that_nobody_wished_breaks_the_loop(engine: Engine):
    with pytest.raises(LoopBroken, match="rollout 7 is saved but was never wished"):
        rollouts.save(engine, replace(wish(engine, 1), id=7))


@pytest.mark.parametrize("phase", [Phase.WISHED, Phase.CANARY, Phase.PROMOTED])
def test_a_rollout_that_is_over_stays_as_it_ended(engine: Engine, phase: Phase):
    ended = replace(wish(engine, 1), phase=Phase.ROLLED_BACK, reason="too many errors")
    rollouts.save(engine, ended)

    with pytest.raises(Unavailable, match=f"rollout {ended.id} is over meanwhile: rolled back"):
        rollouts.save(engine, replace(ended, phase=phase, reason="2 of 3"))
    rollouts.save(engine, ended)

    assert rollouts.get(engine, ended.id) == ended


@pytest.mark.parametrize("loss", ["taken", "given back"])
def test_who_lost_its_lease_writes_nothing(engine: Engine, loss: str):
    state = wish(engine, 1)
    number = lease.acquire(engine, "operator", "one", 10, now=0)
    guard = partial(fence.check, name="operator", number=number)
    rollouts.save(engine, replace(state, phase=Phase.STARTING), guard)
    edges.write(engine, "churn", "routes", "1", "{}", guard)
    if loss == "taken":
        lease.acquire(engine, "operator", "two", 10, now=20)
    else:
        lease.release(engine, "operator", number or 0)

    for write in (
        lambda: rollouts.save(engine, replace(state, phase=Phase.CANARY), guard),
        lambda: rollouts.set_serving(engine, "churn", state.id, guard),
        lambda: rollouts.pin_manifest(engine, state.id, "{}", guard),
        lambda: edges.write(engine, "churn", "routes", "2", "{}", guard),
    ):
        with pytest.raises(Unavailable, match="another operator leads now"):
            write()

    assert rollouts.open_rollout(engine, "churn") == replace(state, phase=Phase.STARTING)
    assert rollouts.serving(engine, "churn") is None
    assert rollouts.manifest(engine, state.id) == ""
    assert edges.versions(engine) == {("churn", "routes"): "1"}


def test_nothing_serves_at_first(engine: Engine):
    assert rollouts.serving(engine, "churn") is None
    assert rollouts.previous(engine, "churn") is None
    assert rollouts.open_rollout(engine, "churn") is None


def test_rolling_back_twice_goes_deeper_instead_of_back_and_forth(engine: Engine):
    first, second, third = (wish(engine, n) for n in (1, 2, 3))
    seen = []
    for state in (first, second, third, second, first):
        rollouts.set_serving(engine, "churn", state.id)
        now, before = rollouts.serving(engine, "churn"), rollouts.previous(engine, "churn")
        seen.append((now.version if now else None, before.version if before else None))

    assert seen == [(1, None), (2, 1), (3, 2), (2, 1), (1, None)]


def test_saying_twice_what_serves_changes_nothing(engine: Engine):
    first, second = wish(engine, 1), wish(engine, 2)
    for state in (first, second, second):
        rollouts.set_serving(engine, "churn", state.id)

    before = rollouts.previous(engine, "churn")
    assert before is not None
    assert before.id == first.id


def test_projects_do_not_see_each_other(engine: Engine):
    rollouts.set_serving(engine, "churn", wish(engine, 1).id)

    assert rollouts.serving(engine, "bank") is None
    assert rollouts.history(engine, "bank") == []
