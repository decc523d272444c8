"""What can a server be told on its command line, besides what KServe's ModelServer takes?"""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from perennial.errors import PerennialError

MOUNTED = Path("/mnt/models")


def shared() -> argparse.ArgumentParser:
    """Options of predictor and transformer; KServe's own ones are added by ``host.parse``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--bundle", type=Path, default=MOUNTED, help="Folder of the model bundle.")
    parser.add_argument("--digest", default="", help="Digest that the bundle must have.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on.")
    parser.add_argument("--revision", default="", help="Name of the revision, told in answers.")
    return parser


def guarded(main: Callable[[], int]) -> int:
    """Run a server; what the user can mend is told in one line."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        return main()
    except PerennialError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
