"""Where do the rows of a project's quarantine lie, whole, whatever is killed meanwhile?

Rows are written first, under a name that their digest is part of. Then the batch and an entry of
the ledger are written down together, and what is not needed any more is removed last: so what is
known can always be read.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Connection, Engine

from perennial.data import aside
from perennial.data.back import Replayed
from perennial.errors import BadInput, RunFailed
from perennial.ledger import Ledger
from perennial.settings import StateFolder
from perennial.store import files, objects, quarantine
from perennial.store.quarantine import DROPPED, RENEWED, REPLAYED, Batch

# Kinds in the ledger: {run, batch, rows, rules}, and {batch, rows, because} twice.
KEPT_ASIDE, BACK, GONE = "rows.quarantined", "rows.replayed", "rows.dropped"
_TRIES = 3


@dataclass(frozen=True)
class Part:
    """Rows that are to be a batch; its name, count and digest follow from them."""

    batch: Batch
    rows: pa.Table


class Shelf:
    """The quarantine of one project."""

    def __init__(self, engine: Engine, ledger: Ledger, project: str, state: StateFolder) -> None:
        self._engine = engine
        self._ledger = ledger
        self._project = project
        self._folder = objects.Folder(state.artifacts("quarantine"))

    def batches(self) -> list[Batch]:
        """All batches, oldest first."""
        return quarantine.batches(self._engine, self._project)

    def read(self, batch: Batch) -> pa.Table:
        """The marked rows of a batch. Raises RunFailed where they are not those that were kept."""
        data = self._folder.read(batch.file)
        if files.digest_bytes(data) != batch.digest:
            raise RunFailed(
                f"{self._folder.uri}/{batch.file} is not what was kept aside: its digest is"
                f" {files.digest_bytes(data)}, wanted {batch.digest}"
            )
        return pq.read_table(pa.BufferReader(data))

    def replayed(self) -> list[Replayed]:
        """The rows that somebody replayed, batch by batch, oldest first."""
        return [Replayed(b.id, rows) for b, rows in self._all() if b.state == REPLAYED]

    def known(self, run: str) -> set[aside.Key]:
        """What rows are known by that need no keeping: other runs than ``run`` kept them.

        Rows that came back as they were are not among them: if they break a rule once more, they
        are kept once more.
        """
        found: set[aside.Key] = set()
        for batch, rows in self._all():
            if batch.run == run:
                continue
            held = rows.filter(aside.is_mended(rows)) if batch.state == REPLAYED else rows
            found.update(aside.keys(held))
        return found

    def hold(self, part: Part) -> Batch:
        """Keep rows; the same of the same run once. Raises what the guard of the ledger raises."""
        name = aside.tell(part.rows).name(part.batch.run)
        # Before anything is written: rows that were dropped meanwhile must not lie there again.
        known = {batch.id: batch for batch in self.batches()}
        if name in known:
            return known[name]
        made = self._written(part, name)
        body = {"run": made.run, "batch": made.id, "rows": made.rows, "rules": dict(made.rules)}
        self._append(KEPT_ASIDE, made, body, made.at, lambda c: self._hold(c, made))
        return made

    def replay(self, batch: Batch, back: Part, rest: Part | None, now: datetime) -> str:
        """Let the rows of a batch be replayed, all or those that keep the rules; says which.

        Raises BadInput where the batch was changed meanwhile.
        """
        joining = self._written(back, _name(batch, back) if rest else batch.id)
        said = f"{joining.rows:,} rows of batch {batch.id} join the next run (batch {joining.id})"
        if rest is None:
            self._exchange(BACK, batch, joining, (), said, now)
            return said
        staying = self._written(rest, _name(batch, rest))
        said += f"; {staying.rows:,} still break rules (batch {staying.id})"
        gone = replace(batch, state=RENEWED, told=said)
        self._exchange(BACK, batch, gone, (joining, staying), said, now)
        return said

    def drop(self, batch: Batch, because: str, now: datetime) -> None:
        """Delete the rows of a batch; what they are known by stays.

        Raises BadInput where the batch was changed meanwhile.
        """
        told = replace(batch, state=DROPPED, told=because)
        gone = self._written(Part(told, aside.bare(self.read(batch))), batch.id)
        self._exchange(GONE, batch, gone, (), because, now)

    def finish(self, batch: Batch) -> None:
        """Remove files that a batch does not need any more, if a killed command left some."""
        needed = [] if batch.state == RENEWED else [batch.file]
        for name in self._folder.names():
            if name.startswith(f"{batch.id}.") and name not in needed:
                self._folder.remove(name)

    def _all(self) -> list[tuple[Batch, pa.Table]]:
        """All batches that have rows, or what those are known by."""
        for _ in range(_TRIES):
            # One may be parted by a person between the list and the look.
            with suppress(BadInput):
                return [(b, self.read(b)) for b in self.batches() if b.state != RENEWED]
        return [(b, self.read(b)) for b in self.batches() if b.state != RENEWED]

    def _hold(self, connection: Connection, batch: Batch) -> None:
        quarantine.hold(connection, self._project, batch)

    def _exchange(
        self, kind: str, known: Batch, made: Batch, parts: Sequence[Batch], why: str, now: datetime
    ) -> None:
        def along(connection: Connection) -> None:
            quarantine.exchange(connection, self._project, known, made, parts)

        body = {"batch": known.id, "rows": known.rows, "because": why}
        self._append(kind, known, body, now, along)
        self.finish(made)

    def _append(
        self,
        kind: str,
        batch: Batch,
        body: dict[str, Any],
        now: datetime,
        along: Callable[[Connection], None],
    ) -> None:
        self._ledger.append(
            kind, project=self._project, subject=batch.id, body=body, now=now, along=along
        )

    def _written(self, part: Part, name: str) -> Batch:
        sink = pa.BufferOutputStream()
        pq.write_table(part.rows, sink, compression="zstd")
        data, what = sink.getvalue().to_pybytes(), aside.tell(part.rows)
        digest = files.digest_bytes(data)
        made = replace(part.batch, id=name, rows=what.rows, rules=what.rules, digest=digest)
        self._folder.write(made.file, data)
        return made


def _name(batch: Batch, part: Part) -> str:
    return aside.tell(part.rows).name(batch.id)
