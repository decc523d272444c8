"""How does a text file become columns of text? CSV, also packed by gzip, in bounded memory."""

import codecs
import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any

import pyarrow as pa

from perennial.data.places import Part, first_line
from perennial.errors import BadInput

GZIP = b"\x1f\x8b"
BATCH = 65_536
_BLOCK = 4 << 20
_SEPARATORS = (",", ";", "\t", "|")
_MARK = codecs.BOM_UTF8
_SEAM = 64  # bytes of a block that are looked at again with the next one
_END = "\ue000end\ue000"  # a last row of our own: an open quotation would swallow it


class Odd(Exception):
    """Only the careful reader can say what this file holds."""


@dataclass(frozen=True)
class Layout:
    """What the first line says: what parts the columns, their names, and how to read on."""

    separator: str
    names: tuple[str, ...]
    headed: bool
    plain: bool  # the first line is at the top and ends in a line break


def separator(line: str) -> str:
    """What splits a line into the most parts: a comma unless another does better."""
    return max(_SEPARATORS, key=lambda mark: len(next(csv.reader([line], delimiter=mark))))


def layout(part: Part, header: bool) -> Layout:
    """Look at the first line that is not blank. Raises BadInput where there is none."""
    with _lines(part) as lines:
        top = next(lines, "")
        first = top if top.strip() else next((line for line in lines if line.strip()), "")
    if not first:
        raise BadInput(f"{part.name} is empty; give a file with a header and at least one row")
    mark = separator(first.rstrip("\r\n"))
    with _lines(part) as lines:
        read = csv.reader(lines, delimiter=mark, skipinitialspace=True)
        cells = next(row for row in _told(part, read) if not _is_blank(row))
    names = _names(cells) if header else [f"column_{i + 1}" for i in range(len(cells))]
    return Layout(mark, tuple(names), header, bool(top.strip()) and first.endswith(("\n", "\r")))


def quick(part: Part, found: Layout, wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Columns as text, by Arrow. Raises Odd where the careful reader must decide, BadInput else."""
    from pyarrow import csv as arrow

    if not found.plain:
        raise Odd
    names = list(found.names)
    last = found.separator.join([_END] * len(names))
    with _opened(part, _odd_quote(found.separator), f"\n{last}\n".encode()) as file:
        try:
            yield from _without_end(
                arrow.open_csv(
                    pa.PythonFile(file, mode="r"),
                    read_options=arrow.ReadOptions(
                        column_names=names,
                        skip_rows_after_names=int(found.headed),
                        block_size=_BLOCK,
                    ),
                    parse_options=arrow.ParseOptions(
                        delimiter=found.separator, newlines_in_values=True
                    ),
                    convert_options=arrow.ConvertOptions(
                        column_types=dict.fromkeys(names, pa.string()),
                        include_columns=list(wanted),
                        strings_can_be_null=False,
                        check_utf8=False,
                    ),
                )
            )
        except pa.ArrowInvalid as exc:
            raise Odd from exc


def _without_end(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """All rows but the last, which must be our own."""
    before: pa.RecordBatch | None = None
    for batch in batches:
        if before is not None and len(batch):
            yield before
        before = batch if len(batch) or before is None else before
    if before is None or {column[-1].as_py() for column in before.columns} != {_END}:
        raise Odd
    yield before.slice(0, len(before) - 1)


def careful(part: Part, found: Layout, wanted: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The same by the standard library, which knows the line. Raises BadInput that names it."""
    places = [found.names.index(name) for name in wanted]
    with _lines(part) as lines:
        rows = _even(part, lines, found)
        while several := list(islice(rows, BATCH)):
            columns = [pa.array([row[i] for row in several], pa.string()) for i in places]
            yield pa.RecordBatch.from_arrays(columns, names=list(wanted))


def _even(part: Part, lines: Iterator[str], found: Layout) -> Iterator[list[str]]:
    """Rows behind the header, each with as many fields as the first one."""
    read = csv.reader(_ended(lines), delimiter=found.separator, skipinitialspace=True)
    headed, line = found.headed, 1
    for row in _told(part, read):
        if row == [_END]:
            return
        here, line = line, read.line_num + 1
        if _is_blank(row) and len(found.names) > 1 or not row:
            continue
        if headed:
            headed = False
            continue
        if _END in row[-1]:
            raise _unreadable(part, f"the quotation that begins in line {here} never ends")
        if len(row) != len(found.names):
            wanted = f"wanted {len(found.names)} as in its first line"
            raise _unreadable(part, f"line {here} has {len(row)} fields, {wanted}")
        yield row


def _ended(lines: Iterator[str]) -> Iterator[str]:
    yield from lines
    yield f"{_END}\n"


def _told(part: Part, rows: "Any") -> Iterator[list[str]]:
    try:
        yield from rows
    except csv.Error as exc:
        raise _unreadable(part, f"line {rows.line_num}: {first_line(exc)}") from exc


def _unreadable(part: Part, why: str) -> BadInput:
    return BadInput(f"{part.name} is not readable CSV: {why}; mend it")


def _is_blank(row: list[str]) -> bool:
    return not row or (len(row) == 1 and not row[0].strip())


def _names(cells: Sequence[str]) -> list[str]:
    """Names without outer spaces; a second one of the same name gets .1 behind it."""
    found: list[str] = []
    for i, cell in enumerate(cells):
        name = cell.strip() or f"Unnamed: {i}"
        tries = (f"{name}.{n}" if n else name for n in range(len(cells) + 1))
        found.append(next(text for text in tries if text not in found))
    return found


def _odd_quote(mark: str) -> "re.Pattern[bytes]":
    """Spaces before a quotation mark: Arrow takes the mark for a letter then."""
    return re.compile(rb'(?:^|[\r\n]|%s) +"' % re.escape(mark.encode()))


@contextmanager
def _lines(part: Part) -> Iterator[Iterator[str]]:
    with _opened(part) as file:
        yield io.TextIOWrapper(io.BufferedReader(file, _BLOCK), encoding="utf-8", newline="")


@contextmanager
def _opened(
    part: Part, odd: "re.Pattern[bytes] | None" = None, end: bytes = b""
) -> "Iterator[_Text]":
    with part.path.open("rb") as raw:
        packed = raw.read(len(GZIP)) == GZIP
        raw.seek(0)
        file: IO[bytes] = gzip.GzipFile(fileobj=raw) if packed else raw  # type: ignore[assignment]
        with _Text(part, file, odd, end) as text:
            yield text


class _Text(io.RawIOBase):
    """Bytes that are UTF-8 text without a mark. Raises BadInput that says at which byte not.

    With a pattern of what is ``odd`` it raises Odd where that is met; ``end`` comes last.
    """

    def __init__(
        self, part: Part, file: IO[bytes], odd: "re.Pattern[bytes] | None", end: bytes
    ) -> None:
        self._part, self._file, self._odd = part, file, odd
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._at = 0  # bytes that were looked at
        self._seam = b"\n"
        self._end = end
        start = self._filled(len(_MARK))
        self._start = b"" if start == _MARK else start

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        # As much as is asked for: Arrow takes what it gets for a block, and a row must fit into it.
        data = self._start + self._filled(len(into) - len(self._start))
        self._start = b""
        self._check(data)
        if not data:
            data, self._end = self._end[: len(into)], self._end[len(into) :]
        into[: len(data)] = data
        return len(data)

    def _filled(self, size: int) -> bytes:
        found = b""
        while len(found) < size and (more := self._unpacked(size - len(found))):
            found += more
        return found

    def _unpacked(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except (OSError, EOFError, zlib.error) as exc:
            raise BadInput(
                f"{self._part.name} is damaged gzip after {self._at:,} bytes of text:"
                f" {first_line(exc)}; copy it again"
            ) from exc

    def _check(self, data: bytes) -> None:
        pending = self._decoder.getstate()[0]
        try:
            if pending or not data.isascii():
                self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as exc:
            raise BadInput(
                f"{self._part.name} is neither Parquet nor UTF-8 text (byte"
                f" {self._at - len(pending) + exc.start}); save it as CSV or Parquet"
            ) from exc
        if (place := data.find(b"\x00")) >= 0:
            raise BadInput(
                f"{self._part.name} is neither Parquet nor text (byte {self._at + place} is zero);"
                " save it as CSV or Parquet"
            )
        self._at += len(data)
        if self._odd and self._odd.search(self._seam + data):
            raise Odd
        self._seam = data[-_SEAM:]
