"""Is the run over that holds the lease? Then nobody need wait for the lease to lapse."""

import logging
from typing import Protocol

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from perennial.errors import PerennialError
from perennial.steps.context import lease_of_runs
from perennial.store import lease

log = logging.getLogger(__name__)

AGAIN_S = 15.0  # between the two looks that a failed run is given up after, if it may be resumed
_KEPT_S = 7 * 86_400.0
_ENDED = "ended:"


class IsOver(Protocol):
    """Is a run over, by the word of whoever runs it? Its end is then in the ledger too."""

    def __call__(self, project: str, run: str) -> bool: ...


def settle(engine: Engine, project: str, is_over: IsOver, now: float) -> bool:
    """Let the lease of runs go if its holder is over; says whether the lease is free.

    A run that nobody follows may end without a word: killed, deleted, or resumed, after which a
    KFP backend runs no exit handler. Where nobody answers, the lease lapses by itself.

    Raises Unavailable or SQLAlchemyError when the lease cannot be read: neither free nor held.
    """
    name = lease_of_runs(project)
    holder = lease.holder(engine, name, now)
    if holder is None:
        return True
    try:
        if not is_over(project, holder):
            return False
        lease.let_go(engine, name, holder)
    except (PerennialError, SQLAlchemyError) as exc:
        log.warning("cannot see whether run %s of %s is over: %s", holder, project, exc)
        return False
    log.info("run is over, its lease is free project=%s run=%s", project, holder)
    return True


def is_seen_again(engine: Engine, end: str, now: float) -> bool:
    """Was this end of a run seen before, by whomever, and not just now?

    Between a failure and its retry a run looks as if it were over, and whoever follows it needs a
    moment. ``end`` names one failure of one run: the next attempt of that run fails anew.
    """
    lease.forget(engine, _ENDED, before=now - _KEPT_S)
    # A lease that is taken at each look: its number counts the looks that far apart.
    number = lease.acquire(engine, f"{_ENDED}{end}", "seen", AGAIN_S, now)
    return number is not None and number > 1
