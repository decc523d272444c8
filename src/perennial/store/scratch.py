"""Where do files lie that are needed for a while only, and who removes them?"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_PREFIX = "perennial-scratch-"


@contextmanager
def folder(root: Path | None = None) -> Iterator[Path]:
    """A folder below ``root`` (None: the machine's for such) that is removed at the end.

    Those that killed processes left there are removed first.
    """
    root = root or Path(tempfile.gettempdir())
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(f"{_PREFIX}*"):
        _remove_left(left)
    with ExitStack() as held:
        path = _new(root, held)
        held.callback(shutil.rmtree, path, ignore_errors=True)
        yield path


def _new(root: Path, held: ExitStack) -> Path:
    """A folder that its lock marks as used: containers that share it know no process of another."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        # Before it was held, another process may have taken it for a left one.
        with suppress(BlockingIOError, FileNotFoundError):
            held.enter_context(_locked(path))
            if path.is_dir():
                return path


def _remove_left(path: Path) -> None:
    # Held, gone meanwhile or another user's: it is not ours to remove.
    with suppress(OSError), _locked(path):
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a folder. Raises OSError when another process holds it."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
