"""What can go wrong, as sentences a person can act on.

PerennialError
├── BadInput      the user's file, key, value or request is wrong        exit 2
├── Unavailable   something that should answer does not (retry later)    exit 3
├── RunFailed     a pipeline run ended without a result                  exit 4
└── LoopBroken    the loop itself did not do what it promises            exit 5
"""

from collections.abc import Sequence


class PerennialError(Exception):
    """Base of all errors that are told in one line, without a traceback."""

    exit_code = 1


class BadInput(PerennialError):
    """A file, key, value or request from outside is not what was wanted."""

    exit_code = 2


class Unavailable(PerennialError):
    """A server, port or lease is not to be had now."""

    exit_code = 3


class RunFailed(PerennialError):
    """A pipeline run failed; the message names the step and the reason."""

    exit_code = 4


class LoopBroken(PerennialError):
    """An invariant of the loop does not hold."""

    exit_code = 5


def many(what: str, faults: Sequence[str]) -> BadInput:
    """One error that tells every fault at once: ``what is wrong in N place(s): a; b``."""
    return BadInput(f"{what} in {len(faults)} place(s): " + "; ".join(faults))
