"""Where do the files of a source lie: here, several by one pattern, or in an object store?"""

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from perennial.errors import BadInput, Unavailable

S3 = "s3://"
_ANSWER_S = 30
_CONNECT_S = 5


@dataclass(frozen=True)
class Part:
    """One file of a source: how people call it, and where its bytes lie while it is read."""

    name: str
    path: Path
    etag: str = ""  # what an object store calls its content


def parts(location: str, base: Path, wanted: str, scratch: Path) -> Iterator[Part]:
    """The files that a path, a pattern or an ``s3://`` URL names, in order of their names.

    Relative paths start at ``base``. Objects are copied to ``scratch``, one at a time: a part is
    there until the next one is asked for. Raises BadInput where there is none (``wanted`` says what
    is), Unavailable when the store does not answer.
    """
    if location.startswith(S3):
        yield from _objects(location, wanted, scratch)
        return
    path = base / location
    found = [path] if path.is_file() else _matches(path)
    if not found:
        raise BadInput(f"no file at {path}; wanted {wanted}")
    yield from (Part(str(each), each) for each in found)


def beside(location: str, name: str) -> str:
    """Location of a file in the same folder as another one."""
    if location.startswith(S3):
        return f"{location.rpartition('/')[0]}/{name}"
    return str(Path(location).parent / name)


def first_line(exc: BaseException) -> str:
    """What an error says first, without a full stop."""
    return (str(exc).splitlines() or [type(exc).__name__])[0].strip().rstrip(".")


def _matches(path: Path) -> list[Path]:
    if not glob.has_magic(str(path)):
        return []
    found = (Path(name) for name in sorted(glob.glob(str(path), recursive=True)))  # noqa: PTH207
    return [each for each in found if each.is_file()]


def _objects(url: str, wanted: str, scratch: Path) -> Iterator[Part]:
    with _answering(url, wanted):
        store = _store()
        # An exact name may hold what would be a pattern.
        keys = [url] if store.isfile(url) else sorted(store.glob(url))
    if not keys:
        raise BadInput(f"nothing lies at {url}; wanted {wanted}")
    for key in keys:
        name = f"{S3}{key.removeprefix(S3)}"
        path = scratch / f"object-{PurePosixPath(key).name}"
        with _answering(name, wanted):
            told = store.info(key)
            store.get_file(key, str(path))
        if path.stat().st_size != told["size"]:
            raise Unavailable(f"{name} changed while it was read; try again")
        try:
            yield Part(name, path, str(told.get("ETag", "")).strip('"'))
        finally:
            path.unlink()


def _store() -> Any:
    """Credentials, region and AWS_ENDPOINT_URL come from where AWS' own tools take them."""
    from s3fs import S3FileSystem

    # It tries five times itself.
    once = {
        "connect_timeout": _CONNECT_S,
        "read_timeout": _ANSWER_S,
        "retries": {"max_attempts": 0},
    }
    return S3FileSystem(skip_instance_cache=True, use_listings_cache=False, config_kwargs=once)


@contextmanager
def _answering(url: str, wanted: str) -> Iterator[None]:
    from botocore.exceptions import (  # type: ignore[import-untyped]
        BotoCoreError,
        NoCredentialsError,
    )

    try:
        yield
    except FileNotFoundError as exc:
        raise BadInput(f"nothing lies at {url}; wanted {wanted}") from exc
    except (PermissionError, NoCredentialsError) as exc:
        raise BadInput(
            f"{url} may not be read ({first_line(exc)}); give AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY, or the pod an identity, that may list and read it"
        ) from exc
    except (OSError, BotoCoreError) as exc:
        raise Unavailable(f"{url} cannot be read now: {first_line(exc)}") from exc
