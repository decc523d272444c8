"""What does the URL of a database say? Nothing, where a piece of its password passes for a host."""

import re

from sqlalchemy import URL
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

ESCAPES = "write @ : / ? of a password as %40 %3A %2F %3F"
# User and password end where SQLAlchemy thinks that they do.
_BEHIND = re.compile(r"[\w+]+://[^:/]*(?::[^@]*)?@(.*)", re.DOTALL)


def parse(url: str) -> URL:
    """Raises ArgumentError or ValueError (of a port) where it is none; either may quote it."""
    found = make_url(url)
    behind = _BEHIND.fullmatch(url)
    if behind and "@" in behind[1]:
        raise ArgumentError("an @ stands behind the one that ends the password")
    return found
