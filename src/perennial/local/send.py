"""Send a project's own history to what serves it, here or on a cluster."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime

import pandas as pd
from rich.console import Console
from rich.progress import track

from perennial import contract, project
from perennial.data import sources
from perennial.errors import BadInput, Unavailable
from perennial.local import folders, replay
from perennial.local import rows as served
from perennial.settings import Settings

MOST_FAILED = 20


@dataclass(frozen=True)
class Wanted:
    """Which rows go where, and how."""

    to: str
    host: str = ""
    source: str = ""
    since: str = ""
    until: str = ""
    rows: int = 1  # in one request
    pause_s: float = 0.0  # after each request


def main(settings: Settings, text: str, wanted: Wanted) -> int:
    """Send the rows in order of time, and say who answered. Raises Unavailable when nobody does."""
    folder = folders.project_folder(settings, text)
    found = project.load(folder)
    home = folder if folder.is_dir() else folder.parent
    raw = sources.read(found, wanted.source or None, home, url=settings.source_url)
    since = _moment("--from", wanted.since) or found.replay.train_until
    rows = served.examples(found, raw, since or _FIRST, _moment("--until", wanted.until))
    if rows.empty:
        raise BadInput(f"{found.name} has no rows between --from and --until; wanted some to send")
    answers = replay.Answers()
    versions = _send(found, rows, wanted, answers)
    shares = ", ".join(f"{name} {count:,}" for name, count in versions.most_common())
    print(f"sent {len(rows):,} rows in {answers.requests:,} requests, {answers.failed:,} failed")
    print(f"rows answered by: {shares or 'nobody'}")
    return 0


_FIRST = datetime.min.replace(tzinfo=UTC)


def _send(
    found: project.Project,
    rows: pd.DataFrame,
    wanted: Wanted,
    answers: replay.Answers,
) -> Counter[str]:
    headers = {"host": wanted.host} if wanted.host else None
    asked = contract.learn(found.features, rows)
    versions: Counter[str] = Counter()
    with closing(replay.Client(wanted.to, found.name, asked, answers, headers)) as client:
        for part in _parts(rows, wanted.rows):
            versions.update({client.send(part).revision: len(part)})
            _check(wanted.to, answers)
            time.sleep(wanted.pause_s)
    del versions[""]
    return versions


def _parts(rows: pd.DataFrame, size: int) -> Iterator[pd.DataFrame]:
    console = Console(stderr=True)
    for start in track(range(0, len(rows), size), "sending", console=console):
        yield rows.iloc[start : start + size]


def _check(to: str, answers: replay.Answers) -> None:
    if answers.failed >= MOST_FAILED and answers.failed == answers.requests:
        raise Unavailable(f"{to} answers nothing: {answers.problems[0]}")


def _moment(option: str, text: str) -> datetime | None:
    try:
        return project.parse_moment(text) if text else None
    except ValueError as exc:
        raise BadInput(f"{option} is {text!r}, wanted {exc}") from exc
