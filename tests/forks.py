"""Run something in a copy of this process that may be killed or run out of disk on the way."""

import os
import resource
import signal
import time
from collections.abc import Callable

KILLED = -signal.SIGKILL


def run(work: Callable[[], object]) -> int:
    """Exit code of a fork that did ``work``: 0, 1 after an error, below 0 after a signal."""
    return _ended(_begin(work))


def killed_after(seconds: float, work: Callable[[], object]) -> int:
    """Exit code of a fork that did ``work`` and is killed so long after it began."""
    child = _begin(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return _ended(child)


def _begin(work: Callable[[], object]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def _ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(call: int, counted: Callable[..., object]) -> Callable[..., object]:
    """``counted``, but the process ends for good when it is called so often."""
    calls = 0

    def wrapped(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return counted(*args, **kwargs)

    return wrapped


def no_file_above(size: int) -> None:
    """Let every write fail that makes a file of this process larger than so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
