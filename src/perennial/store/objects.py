"""Where do bundles, served rows and records of runs lie: a folder here or in an object store?"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.parse import unquote, urlsplit

from perennial.errors import BadInput, Unavailable
from perennial.settings import s3_endpoint
from perennial.store.files import digest_bytes, sync_folder, write_atomic

# Written last into a folder that is kept whole: where it is missing, nothing is there.
CONTENTS = "contents.json"

_CONNECT_S = 5.0
_ANSWER_S = 30.0
_ATTEMPTS = 4


class _Store(Protocol):
    def write(self, name: str, data: bytes) -> None: ...

    def read(self, name: str) -> bytes: ...

    def names(self, below: str) -> list[str]: ...

    def exists(self, name: str) -> bool: ...

    def remove(self, name: str) -> None: ...


class Folder:
    """A folder by its URI, ``file:///...`` or ``s3://bucket/prefix``, or by its path.

    Faults of the store are Unavailable and name the URI; what is not there is BadInput.
    """

    def __init__(self, uri: str | Path) -> None:
        self.uri = _normal(str(uri))
        self._store = _store(self.uri)

    def __truediv__(self, name: str) -> "Folder":
        """A folder inside this one."""
        return Folder(f"{self.uri}/{name}")

    def __repr__(self) -> str:
        return f"Folder({self.uri!r})"

    def write(self, name: str, data: bytes | str) -> str:
        """Write one file, whole or not at all, and give its URI."""
        with self._faults(name):
            self._store.write(name, data.encode() if isinstance(data, str) else data)
        return f"{self.uri}/{name}"

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises BadInput when there is none."""
        with self._faults(name):
            return self._store.read(name)

    def exists(self, name: str) -> bool:
        """Is there such a file?"""
        with self._faults(name):
            return self._store.exists(name)

    def remove(self, name: str) -> None:
        """Delete one file; none there is no fault."""
        with self._faults(name):
            self._store.remove(name)

    def names(self, below: str = "") -> list[str]:
        """Names of all files in this folder, or in one inside it, in order."""
        with self._faults(below):
            return sorted(self._store.names(below))

    def holds(self, name: str) -> bool:
        """Was a whole folder kept under this name?"""
        return self.exists(f"{name}/{CONTENTS}")

    def keep(self, folder: Path, name: str) -> str:
        """Keep a folder of this machine whole and give its URI; what lies there is not sent again.

        New files count when all are there. A file that changes under its name makes whoever
        fetches meanwhile fail.
        """
        known = self._contents(name) if self.holds(name) else {}
        found = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
        if CONTENTS in found:
            raise BadInput(f"{found[CONTENTS]} has the name of the list of what is kept; rename it")
        contents = {}
        for inside, path in found.items():
            data = path.read_bytes()
            contents[inside] = digest_bytes(data)
            if known.get(inside) != contents[inside]:
                self.write(f"{name}/{inside}", data)
        if contents != known:
            self.write(f"{name}/{CONTENTS}", json.dumps(contents, indent=1, sort_keys=True))
        return f"{self.uri}/{name}"

    def fetch(self, name: str, into: Path) -> Path:
        """Copy a folder that was kept to ``into``, whole or not at all; what is there stays.

        Raises BadInput when nothing was kept, or when other bytes lie there.
        """
        contents = self._contents(name)
        draft = into.with_name(f".{into.name}-{os.getpid()}.tmp")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        try:
            for inside, digest in contents.items():
                write_atomic(draft / inside, self._verified(f"{name}/{inside}", digest))
            _settle(draft, into)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return into

    def _verified(self, name: str, digest: str) -> bytes:
        data = self.read(name)
        if digest_bytes(data) != digest:
            raise BadInput(f"{self.uri}/{name} holds other bytes than were kept there")
        return data

    def _contents(self, name: str) -> dict[str, str]:
        where = f"{name}/{CONTENTS}"
        nothing = f"nothing was kept whole at {self.uri}/{name}: {CONTENTS} is missing"
        try:
            text = self.read(where)
        except BadInput as exc:
            raise BadInput(nothing) from exc
        except Unavailable as exc:
            # Who may list below a prefix only is refused when reading what is not there; a server
            # may list nothing, and is refused twice.
            if self.exists(where):
                raise
            raise BadInput(nothing) from exc
        try:
            found = {str(k): str(v) for k, v in json.loads(text).items()}
        except (ValueError, AttributeError) as exc:
            raise BadInput(f"{self.uri}/{where} is damaged: not a list of files") from exc
        if odd := [inside for inside in found if not _is_inside(inside)]:
            raise BadInput(f"{self.uri}/{where} names {odd[0]!r}, which lies outside of its folder")
        return found

    @contextmanager
    def _faults(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as exc:
            raise BadInput(f"nothing lies at {self.uri}/{name}") from exc
        except OSError as exc:
            said = " ".join(str(exc).split())
            raise Unavailable(f"{self.uri}/{name} cannot be reached now: {said}") from exc


class _Disk:
    """Files of this machine, written so that they survive a power cut."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def write(self, name: str, data: bytes) -> None:
        write_atomic(self._root / name, data)

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    def names(self, below: str) -> list[str]:
        found = (self._root / below).rglob("*")
        return [p.relative_to(self._root).as_posix() for p in found if _is_whole(p)]

    def exists(self, name: str) -> bool:
        return (self._root / name).is_file()

    def remove(self, name: str) -> None:
        (self._root / name).unlink(missing_ok=True)


class _Bucket:
    """Objects of an S3 store: each appears whole with the answer to its PUT."""

    def __init__(self, bucket: str, prefix: str) -> None:
        # The library takes half a second: who keeps all on this disk need not wait for it.
        from pyarrow import fs  # noqa: PLC0415

        self._fs = fs
        self._bucket = bucket
        self._root = f"{bucket}/{prefix}".rstrip("/")
        self._s3 = fs.S3FileSystem(
            endpoint_override=s3_endpoint() or None,
            connect_timeout=_CONNECT_S,
            request_timeout=_ANSWER_S,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
            allow_delayed_open=True,
        )

    def write(self, name: str, data: bytes) -> None:
        stream = self._s3.open_output_stream(f"{self._root}/{name}")
        stream.write(data)
        # Not by `with`: after a failed write that would close, and so complete, a part.
        stream.close()

    def read(self, name: str) -> bytes:
        with self._s3.open_input_stream(f"{self._root}/{name}") as stream:
            return bytes(stream.read())

    def names(self, below: str) -> list[str]:
        found = self._listed(f"{self._root}/{below}".rstrip("/"), recursive=True)
        return [path.removeprefix(f"{self._root}/") for path in found]

    def exists(self, name: str) -> bool:
        # By a list: who may list below a prefix only is refused when asking for what is not there.
        path = f"{self._root}/{name}"
        return path in self._listed(path.rpartition("/")[0], recursive=False)

    def remove(self, name: str) -> None:
        if self.exists(name):
            self._s3.delete_file(f"{self._root}/{name}")

    def _listed(self, where: str, *, recursive: bool) -> list[str]:
        selector = self._fs.FileSelector(where, recursive=recursive, allow_not_found=True)
        found = self._s3.get_file_info(selector)
        if not found:
            self._require_bucket()
        return [info.path for info in found if info.is_file]

    def _require_bucket(self) -> None:
        # A store answers "nothing there" also for a bucket that it does not know, or lost.
        try:
            kind = self._s3.get_file_info(self._bucket).type
        except OSError:
            return  # refused: so there is one
        if kind == self._fs.FileType.NotFound:
            raise OSError(f"there is no bucket {self._bucket}")


def at(place: "Folder | Path | str") -> Folder:
    """A folder by whatever names it."""
    return place if isinstance(place, Folder) else Folder(place)


def _store(uri: str) -> _Store:
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return _Disk(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc:
        return _Bucket(parts.netloc, parts.path.strip("/"))
    raise BadInput(f"artifacts cannot lie at {uri!r}, wanted file:///folder or s3://bucket/prefix")


def _normal(uri: str) -> str:
    return (uri if "://" in uri else Path(uri).resolve().as_uri()).rstrip("/")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if _is_whole(path))


def _is_whole(path: Path) -> bool:
    """A file under its final name: ``write_atomic`` hides those that are being written."""
    return path.is_file() and not (path.name.startswith(".") and path.name.endswith(".tmp"))


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _settle(draft: Path, final: Path) -> None:
    """Give a folder its final name, unless another process was first."""
    try:
        draft.rename(final)
    except OSError:
        if not final.is_dir():
            raise
    sync_folder(final.parent)
