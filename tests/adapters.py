"""What every traffic adapter must do, whatever stands behind it.

A place inherits ``TrafficContract`` and gives it a fixture ``bench``. On a cluster everything takes
its time and may be refused meanwhile, so the suite drives: it asks again until it is done.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import httpx
import pytest

from perennial.errors import PerennialError, Unavailable
from perennial.records import Evidence, Phase, RolloutState
from perennial.rollout import plan
from perennial.rollout.ports import EvidenceSource, Revisions, Traffic

# What a revision of a bench may be told to do wrong.
FINE, ERRORS, NEVER_READY = "", "errors", "never ready"
FAILED = "no revision"


class Bench(Protocol):
    """An adapter with its surroundings, and clients of what it serves."""

    traffic: Traffic
    revisions: Revisions
    evidence: EvidenceSource
    patience_s: float

    def state(self, fault: str = FINE) -> RolloutState:
        """A rollout of a version that was never used before."""
        ...

    def ask(self, count: int) -> list[tuple[int, str]]:
        """Status of each answer and the revision that gave it."""
        ...

    def servers(self, name: str) -> int:
        """How many processes answer, and count, for a revision."""
        ...

    def kill(self, name: str) -> None:
        """End the servers of a revision without a word to anybody."""
        ...

    def restart(self) -> None:
        """Make the adapters anew, as a controller does that was killed."""
        ...


def rollout(version: int, project: str = "retail") -> RolloutState:
    """The wish for one version."""
    return RolloutState(
        id=version,
        project=project,
        version=version,
        digest=f"sha256:{version:064x}",
        bundle_uri="",
        run_id=f"run-{version}",
        phase=Phase.STARTING,
        step=-1,
        weight=0,
        reason="",
    )


def more_than(said: list[tuple[int, str]], count: int) -> bool:
    return len(said) > count


class TrafficContract:
    """Subclasses are collected where a ``bench`` is."""

    @pytest.fixture(autouse=True)
    def left_tidy(self, bench: Bench) -> Iterator[None]:
        """Tests share a bench; each leaves one good revision with all requests."""
        yield
        for extra in set(bench.revisions.names()) - set(bench.traffic.weights()):
            self.drive(bench, partial(bench.revisions.stop, extra))

    @pytest.fixture
    def stable(self, bench: Bench) -> str:
        return self.served(bench) or self.serve_first(bench)

    def served(self, bench: Bench) -> str:
        """The revision that has everything, if one is well and has."""
        return next(
            (name for name, percent in bench.traffic.weights().items() if percent == 100), ""
        )

    def serve_first(self, bench: Bench) -> str:
        name = self.bring_up(bench)
        self.split(bench, {name: 100})
        return name

    def bring_up(self, bench: Bench, fault: str = FINE) -> str:
        state = bench.state(fault)
        self.drive(bench, lambda: bench.revisions.start(state))
        self.until(bench, lambda: bench.revisions.ready(plan.name(state)))
        return plan.name(state)

    def split(self, bench: Bench, weights: dict[str, int]) -> None:
        self.drive(bench, lambda: bench.traffic.set_weights(weights))

    def drive(self, bench: Bench, act: Callable[[], None]) -> None:
        def is_done() -> bool:
            act()
            return True

        self.until(bench, is_done)

    def until(self, bench: Bench, is_so: Callable[[], object]) -> None:
        limit = time.monotonic() + bench.patience_s
        while not self.holds(is_so):
            assert time.monotonic() < limit, "it did not come about in time"
            time.sleep(0.1)

    def holds(self, is_so: Callable[[], object]) -> bool:
        try:
            return bool(is_so())
        except Unavailable:
            return False

    def answers(self, bench: Bench, count: int) -> Counter[str]:
        """Who answered, when everybody must have."""
        said = bench.ask(count)
        failed = [answer for answer in said if answer[0] != 200]
        assert not failed, failed[:5]
        return Counter(name for _, name in said)

    @contextmanager
    def clients(self, bench: Bench) -> Iterator[list[tuple[int, str]]]:
        """Requests that go on all the time."""
        said: list[tuple[int, str]] = []
        over = threading.Event()

        def send() -> None:
            while not over.is_set():
                try:
                    said.extend(bench.ask(5))
                except httpx.HTTPError as exc:
                    said.append((0, repr(exc)))

        sender = threading.Thread(target=send)
        sender.start()
        try:
            yield said
        finally:
            over.set()
            sender.join()

    def test_a_new_revision_gets_nothing_then_its_share_then_all(self, bench, stable):
        new = self.bring_up(bench)
        assert bench.traffic.weights() == {stable: 100}
        assert self.answers(bench, 30) == {stable: 30}

        self.split(bench, {stable: 90, new: 10})
        assert bench.traffic.weights() == {stable: 90, new: 10}
        assert 8 <= self.answers(bench, 300)[new] <= 60

        self.split(bench, {stable: 0, new: 100})
        assert bench.traffic.weights() == {new: 100}
        assert self.answers(bench, 30) == {new: 30}

    def test_no_request_fails_while_shares_change(self, bench, stable):
        new = self.bring_up(bench)

        with self.clients(bench) as said:
            for percent in (10, 50, 0, 100):
                self.split(bench, {stable: 100 - percent, new: percent})
                self.until(bench, partial(more_than, said, len(said) + 20))

        assert {status for status, _ in said} == {200}

    def test_a_rejected_revision_gets_no_request_ever_after(self, bench, stable):
        rejected = self.bring_up(bench)
        self.split(bench, {stable: 50, rejected: 50})

        self.split(bench, {stable: 100})
        with self.clients(bench) as afterwards:
            self.answers(bench, 50)
            self.drive(bench, lambda: bench.revisions.stop(rejected))
            new = self.bring_up(bench)
            self.split(bench, {stable: 80, new: 20})
            self.answers(bench, 50)
            self.split(bench, {stable: 100})

        assert rejected not in Counter(name for _, name in afterwards)
        assert {status for status, _ in afterwards} == {200}

    @pytest.mark.parametrize("percents", [(130, -30), (60, 60), (10, 10)])
    def test_what_is_no_share_is_refused_and_the_old_split_stays(self, bench, stable, percents):
        new = self.bring_up(bench)

        with pytest.raises(PerennialError):
            bench.traffic.set_weights(dict(zip((stable, new), percents, strict=True)))

        assert self.answers(bench, 30) == {stable: 30}

    def test_a_revision_that_was_never_started_gets_no_share(self, bench, stable):
        with pytest.raises(PerennialError):
            bench.traffic.set_weights({stable: 50, "v9999": 50})

        assert self.answers(bench, 30) == {stable: 30}

    def test_a_controller_that_was_killed_is_gone_on_with(self, bench, stable):
        new = self.bring_up(bench)
        self.split(bench, {stable: 50, new: 50})

        with self.clients(bench) as said:
            bench.restart()
            assert set(bench.revisions.names()) == {stable, new}
            self.until(bench, lambda: bench.revisions.ready(new))
            self.split(bench, {stable: 50, new: 50})
            assert set(self.answers(bench, 60)) == {stable, new}
            self.split(bench, {stable: 100})

        assert self.answers(bench, 30) == {stable: 30}
        assert {status for status, _ in said} == {200}

    def test_a_revision_that_cannot_start_says_why_and_takes_nothing(self, bench, stable):
        state = bench.state(NEVER_READY)
        self.drive(bench, lambda: bench.revisions.start(state))

        self.until(bench, lambda: bench.revisions.died(plan.name(state)))

        assert not self.holds(lambda: bench.revisions.ready(plan.name(state)))
        assert self.answers(bench, 30) == {stable: 30}
        assert bench.revisions.died(stable) == ""

    def test_what_is_stopped_is_gone_and_may_be_stopped_again(self, bench, stable):
        new = self.bring_up(bench)

        self.drive(bench, lambda: bench.revisions.stop(new))
        self.drive(bench, lambda: bench.revisions.stop(new))

        assert bench.revisions.names() == (stable,)
        assert not self.holds(lambda: bench.revisions.ready(new))

    def look(self, bench: Bench, step: str, canary: str, stable: str) -> Evidence:
        """Evidence of both, once there is some."""
        seen: list[Evidence] = []

        def is_whole() -> bool:
            seen.append(bench.evidence.look(step, canary, stable))
            return None not in (seen[-1].canary, seen[-1].stable)

        self.until(bench, is_whole)
        return seen[-1]

    def test_evidence_tells_who_answered_what_since_the_step_began(self, bench, stable):
        bad = self.bring_up(bench, ERRORS)
        self.split(bench, {stable: 50, bad: 50})
        # An older copy of stable that goes while we count would be missing numbers.
        self.until(bench, lambda: bench.servers(stable) == 1)
        bench.ask(20)
        before = self.look(bench, f"{bad}.0", bad, stable)
        asked = Counter(name for _, name in bench.ask(60))

        def is_counted() -> bool:
            evidence = self.look(bench, f"{bad}.0", bad, stable)
            return (evidence.canary.requests, evidence.stable.requests) == (
                asked[bad],
                asked[stable],
            )

        self.until(bench, is_counted)
        after = self.look(bench, f"{bad}.0", bad, stable)
        self.split(bench, {stable: 100})

        assert (before.canary.requests, before.stable.requests) == (0, 0)
        assert after.canary.server_errors == asked[bad] > 10
        assert (after.stable.server_errors, after.stable.p95_ms is None) == (0, False)
        assert after.age_s < 5

    def test_servers_that_vanish_are_missing_numbers_and_no_good_ones(self, bench, stable):
        new = self.bring_up(bench)
        self.split(bench, {stable: 50, new: 50})
        self.look(bench, f"{new}.0", new, stable)
        bench.ask(40)

        bench.kill(new)
        self.until(bench, lambda: bench.evidence.look(f"{new}.0", new, stable).canary is None)
        self.split(bench, {stable: 100})

        assert self.answers(bench, 30) == {stable: 30}
