"""How does a KFP backend come to have the one recurring run that was asked for?

A backend cannot change a recurring run, takes several of one name, and ends the Workflows of one
that is deleted while their runs stay RUNNING: so an old one is disabled and drained before the new
one is made, and deleted after it; whatever goes wrong before, the old one is in force again.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from perennial.errors import PerennialError, Unavailable
from perennial.retrain.answers import Recurring, Wanted
from perennial.retrain.backend import Backend

log = logging.getLogger(__name__)

Progress = Callable[[str], None]
POLL_S = 2.0


@dataclass(frozen=True)
class Outcome:
    """What became of a schedule, with the id of the recurring run that is in force."""

    id: str
    did: str  # made, changed, removed or unchanged


def reconcile(
    backend: Backend,
    experiment: str,
    wanted: Wanted,
    service_account: str,
    *,
    patience_s: float,
    progress: Progress,
) -> Outcome:
    """Bring a recurring run about; does nothing when it is there already.

    Raises Unavailable, with the old ones in force again, when their runs do not end in time.
    """
    found = backend.recurring(experiment, wanted.name)
    good = [one for one in found if one.is_as(wanted, service_account)][:1]
    old = [one for one in found if one not in good]
    _pause(backend, experiment, old, patience_s, progress)
    new = good[0].id if good else _made(backend, experiment, wanted, old, progress)
    _delete(backend, old, progress)
    if old:
        return Outcome(new, "changed")
    return Outcome(new, "unchanged" if good else "made")


def retire(
    backend: Backend,
    experiment: str,
    old: list[Recurring],
    *,
    patience_s: float,
    progress: Progress,
) -> None:
    """Disable recurring runs, wait for what they started, and delete them."""
    _pause(backend, experiment, old, patience_s, progress)
    _delete(backend, old, progress)


def _pause(
    backend: Backend, experiment: str, old: list[Recurring], patience_s: float, progress: Progress
) -> None:
    """Let recurring runs start nothing more, and wait for what they started."""
    try:
        for one in old:
            progress(f"disabling {one.name} ({one.id})")
            backend.enable(one.id, False)
        for one in old:
            _drain(backend, experiment, one, patience_s, progress)
    except BaseException:  # who waits may well press Ctrl-C
        _restore(backend, old)
        raise


def _made(
    backend: Backend, experiment: str, wanted: Wanted, old: list[Recurring], progress: Progress
) -> str:
    progress(f"making {wanted.name}")
    try:
        return backend.recur(experiment, wanted)
    except BaseException:
        _restore(backend, old)
        raise


def _delete(backend: Backend, old: list[Recurring], progress: Progress) -> None:
    for one in old:
        progress(f"deleting {one.name} ({one.id})")
        backend.delete(one.id)


def _drain(
    backend: Backend, experiment: str, one: Recurring, patience_s: float, progress: Progress
) -> None:
    until = time.monotonic() + patience_s
    told = False
    while True:
        left = [run for run in backend.runs(experiment, recurring_run_id=one.id) if not run.ended]
        if not left:
            return
        if time.monotonic() > until:
            raise Unavailable(
                f"the schedule {one.name} has a run that goes on ({left[0].id}), and stays as it"
                " was; try again when it ended, or end it by 'perennial runs terminate'"
            )
        if not told:
            progress(f"waiting for run {left[0].id}")
            told = True
        time.sleep(POLL_S)


def _restore(backend: Backend, old: list[Recurring]) -> None:
    """Put in force again what was; one that cannot be does not keep the others from it."""
    for one in [one for one in old if one.enabled]:
        try:
            backend.enable(one.id, True)
        except PerennialError as exc:
            log.warning("schedule stays disabled name=%s id=%s: %s", one.name, one.id, exc)
