"""How is a snapshot kept? Named by its content, with a record beside it, or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from perennial.data.rows import Unreadable
from perennial.data.sources import Origin
from perennial.errors import RunFailed
from perennial.store import files

ROW_GROUP = 131_072
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Counted:
    """What became of the rows that were read; ``in_future`` lie after the moment of reading.

    ``unreadable`` are values that are no numbers and so became missing, whenever their rows were.
    """

    read: int
    kept: int
    later: int
    in_future: int
    unreadable: tuple[Unreadable, ...] = ()

    @property
    def odd(self) -> dict[str, Any]:
        """What is unreadable as a part of a record; empty, where all is well."""
        found = {o.column: {"rows": o.rows, "example": o.example} for o in self.unreadable}
        return {"unreadable": found} if found else {}

    def check(self) -> None:
        """Raises RunFailed where a row is neither in the snapshot nor later than it."""
        if self.read != self.kept + self.later:
            raise RunFailed(
                f"{self.read:,} rows were read, but {self.kept:,} are kept and {self.later:,} are"
                " later than as_of; nothing is kept, so that no row is lost in silence"
            )


@dataclass(frozen=True)
class Taken:
    """When and of what a snapshot was taken; ``position`` is its newest row's time."""

    origin: Origin
    as_of: datetime
    position: datetime
    taken_at: datetime


def write(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """Parquet whose bytes depend on the rows alone, however they are batched; gives their count.

    No metadata of pandas and no time of writing is in it.
    """
    count = 0
    with path.open("wb") as file:
        with pq.ParquetWriter(file, schema, compression="zstd") as writer:
            for group in _groups(schema, batches):
                writer.write_table(group, row_group_size=ROW_GROUP)
                count += len(group)
        file.flush()
        os.fsync(file.fileno())
    return count


def keep(draft: Path, folder: Path, counted: Counted, taken: Taken) -> str:
    """Give a draft on the same disk its place in a folder of snapshots, and its digest.

    Beside it lie its record, ``<hex>.json``, and ``<hex>.parquet.dvc``, as 'dvc add' writes it.
    Both are there before the snapshot is; of a content that is kept already they stay. A file that
    has the name but not the content, as a bad disk or a hand leaves it, makes way for the draft.
    Raises RunFailed when the counts of rows do not add up.
    """
    counted.check()
    sha256, md5 = _digests(draft)
    final = folder / f"{sha256}.parquet"
    record = record_of(final)
    folder.mkdir(parents=True, exist_ok=True)
    if not (record.exists() and _holds(final, sha256)):
        told = _record(f"sha256:{sha256}", pq.read_schema(draft), counted, taken)
        _place(draft.parent, record, json.dumps(told, indent=1) + "\n")
        _place(draft.parent, final.with_name(f"{final.name}.dvc"), _tracked(draft, md5, final.name))
        files.sync_folder(folder)
        draft.replace(final)
        files.sync_folder(folder)
    return f"sha256:{sha256}"


def record_of(snapshot: Path) -> Path:
    """Where the record of a kept snapshot lies."""
    return snapshot.with_suffix(".json")


def copy(path: Path, out: Path) -> None:
    """Copy a file of any size, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    # Always the same name: what a killed run left is written over.
    draft = out.with_name(f".{out.name}.tmp")
    with path.open("rb") as source, draft.open("wb") as target:
        shutil.copyfileobj(source, target, _CHUNK)
        target.flush()
        os.fsync(target.fileno())
    draft.replace(out)
    files.sync_folder(out.parent)


def _groups(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """All rows in tables of one size: where pages end depends on what is written at once."""
    held = schema.empty_table()
    for batch in batches:
        held = pa.concat_tables([held, pa.Table.from_batches([batch], schema)])
        while len(held) >= ROW_GROUP:
            yield held.slice(0, ROW_GROUP).combine_chunks()
            held = held.slice(ROW_GROUP)
    if len(held):
        yield held.combine_chunks()


def _record(digest: str, schema: pa.Schema, counted: Counted, taken: Taken) -> Mapping[str, Any]:
    origin = taken.origin
    return {
        "digest": digest,
        "schema": [{"name": field.name, "type": str(field.type)} for field in schema],
        "rows": counted.kept,
        "rows_read": counted.read,
        "rows_later_than_as_of": counted.later,
        "rows_in_future": counted.in_future,
        **counted.odd,
        "source": {
            "kind": origin.kind,
            "told": origin.told,
            "parts": [_plain(asdict(part)) for part in origin.parts],
        },
        "position": taken.position.isoformat(),
        "as_of": taken.as_of.isoformat(),
        "taken_at": taken.taken_at.isoformat(),
    }


def _plain(part: Mapping[str, Any]) -> Mapping[str, Any]:
    return {key: value for key, value in part.items() if value != ""}


def _tracked(draft: Path, md5: str, name: str) -> str:
    size = draft.stat().st_size
    return f"outs:\n- md5: {md5}\n  size: {size}\n  hash: md5\n  path: {name}\n"


def _digests(path: Path) -> tuple[str, str]:
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            sha256.update(piece)
            md5.update(piece)
    return sha256.hexdigest(), md5.hexdigest()


def _holds(path: Path, sha256: str) -> bool:
    return path.exists() and files.digest_file(path) == f"sha256:{sha256}"


def _place(near: Path, final: Path, text: str) -> None:
    """Write beside the draft: what a killed run leaves there is removed by the next one."""
    files.write_atomic(near / final.name, text)
    (near / final.name).replace(final)
