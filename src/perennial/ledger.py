"""What happened, in which order, and why: each entry seals the one before it."""

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, RowMapping, insert, select, update

from perennial import signing
from perennial.errors import LoopBroken
from perennial.store import files
from perennial.store.engine import reading
from perennial.store.tables import ledger, ledger_head

_FIRST = "sha256:" + "0" * 64


@dataclass(frozen=True)
class Entry:
    """One line of the ledger; ``at`` is wall time, ``event_time`` the time of the data."""

    seq: int
    at: datetime
    event_time: datetime | None
    kind: str
    project: str
    subject: str
    body: dict[str, Any]
    previous: str
    digest: str


class Ledger:
    """The ledger of one database; any number of processes may append to it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def append(
        self,
        kind: str,
        *,
        project: str,
        subject: str,
        body: dict[str, Any],
        now: datetime,
        event_time: datetime | None = None,
    ) -> Entry:
        """Add an entry; it is on the disk when this returns."""
        values = {
            "at": now.isoformat(),
            "event_time": event_time.isoformat() if event_time else None,
            "kind": kind,
            "project": project,
            "subject": subject,
            "body": signing.canonical(body).decode(),
        }
        with self._engine.begin() as connection:
            seq, previous = _head(connection)
            row = {"seq": seq + 1, **values, "previous": previous}
            row["digest"] = _seal(row)
            connection.execute(insert(ledger).values(row))
            _move_head(connection, seq + 1, str(row["digest"]))
        return _entry(row)

    def entries(
        self, project: str, kind: str | None = None, subject: str | None = None
    ) -> list[Entry]:
        """Entries of a project, oldest first; of one kind and about one subject, if given."""
        query = select(ledger).where(ledger.c.project == project).order_by(ledger.c.seq)
        if kind is not None:
            query = query.where(ledger.c.kind == kind)
        if subject is not None:
            query = query.where(ledger.c.subject == subject)
        with reading(self._engine) as connection:
            return [_entry(row) for row in connection.execute(query).mappings()]

    def verify(self) -> None:
        """Check every seal. Raises LoopBroken that names the first entry that does not hold."""
        seq, previous = 0, _FIRST
        with reading(self._engine) as connection:
            for row in connection.execute(select(ledger).order_by(ledger.c.seq)).mappings():
                fault = _fault(row, seq + 1, previous)
                if fault:
                    raise LoopBroken(f"the ledger is broken at entry {seq + 1}: {fault}")
                seq, previous = row["seq"], row["digest"]
            if _head(connection) != (seq, previous):
                raise LoopBroken(f"the ledger is broken at entry {seq + 1}: entries are missing")


def _seal(row: RowMapping | dict[str, Any]) -> str:
    """Digest of an entry and of the digest before it."""
    fields = {key: value for key, value in row.items() if key != "digest"}
    return files.digest_bytes(signing.canonical(fields))


def _fault(row: RowMapping, seq: int, previous: str) -> str | None:
    if row["seq"] != seq:
        return f"entry {row['seq']} stands in its place"
    if row["previous"] != previous:
        return "it does not follow the entry before it"
    if row["digest"] != _seal(row):
        return "its content was changed"
    return None


def _head(connection: Connection) -> tuple[int, str]:
    row = connection.execute(select(ledger_head.c.seq, ledger_head.c.digest)).one_or_none()
    return (row[0], row[1]) if row else (0, _FIRST)


def _move_head(connection: Connection, seq: int, digest: str) -> None:
    if seq == 1:
        connection.execute(insert(ledger_head).values(id=1, seq=seq, digest=digest))
    else:
        connection.execute(update(ledger_head).values(seq=seq, digest=digest))


def _entry(row: RowMapping | dict[str, Any]) -> Entry:
    moment = row["event_time"]
    return Entry(
        seq=row["seq"],
        at=datetime.fromisoformat(row["at"]),
        event_time=datetime.fromisoformat(moment) if moment else None,
        kind=row["kind"],
        project=row["project"],
        subject=row["subject"],
        body=json.loads(row["body"]),
        previous=row["previous"],
        digest=row["digest"],
    )
