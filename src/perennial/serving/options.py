"""What can a server be told on its command line, besides what KServe's ModelServer takes?"""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from perennial.errors import PerennialError, Unavailable
from perennial.store import scratch
from perennial.store.objects import Folder

MOUNTED = "/mnt/models"
# A store that is away for a minute is no fault of a model.
FETCH_S = 60.0
_PAUSE_S = 1.0


def shared() -> argparse.ArgumentParser:
    """Options of predictor and transformer; KServe's own ones are added by ``host.parse``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--bundle", default=MOUNTED, help="Folder of the model bundle, or its URI (s3://...)."
    )
    parser.add_argument("--digest", default="", help="Digest that the bundle must have.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on.")
    parser.add_argument("--revision", default="", help="Name of the revision, told in answers.")
    return parser


@contextmanager
def bundle_folder(text: str) -> Iterator[Path]:
    """The folder of a bundle; one in an object store is fetched, whole, for as long as this lasts.

    Raises BadInput when other bytes lie there, and Unavailable when the store stays away.
    """
    parent, _, name = text.rstrip("/").rpartition("/")
    if "://" not in parent:
        yield Path(text)
        return
    with scratch.folder() as near:
        yield _fetched(Folder(parent), name, near / name)


def _fetched(store: Folder, name: str, into: Path) -> Path:
    limit = time.monotonic() + FETCH_S
    while time.monotonic() < limit:
        try:
            return store.fetch(name, into)
        except Unavailable:
            time.sleep(_PAUSE_S)
    return store.fetch(name, into)


def guarded(main: Callable[[], int]) -> int:
    """Run a server; what the user can mend is told in one line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        return main()
    except PerennialError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
