"""Who said this: keys, the bytes that are signed, and their signatures."""

import contextlib
import hashlib
import hmac
import json
import math
import os
import secrets
from datetime import datetime
from pathlib import Path
from typing import Any

from perennial.errors import BadInput

KEY_BYTES = 32


def event_key(folder: Path) -> bytes:
    """The key that signs events, made on first use and readable by its owner only."""
    path = folder / "event.key"
    if not path.exists():
        _make_key(path)
    return read_key(path)


def read_key(path: Path) -> bytes:
    """Read a key file. Raises BadInput when it is not one."""
    try:
        key = path.read_bytes()
    except OSError as exc:
        raise BadInput(f"the event key {path} cannot be read: {exc.strerror}") from exc
    if len(key) != KEY_BYTES:
        raise BadInput(
            f"the event key {path} has {len(key)} bytes, wanted {KEY_BYTES}; remove it and start"
            " the stack again to make a new one"
        )
    return key


def sign(key: bytes, message: bytes) -> str:
    """HMAC-SHA256 of a message, as hex."""
    return hmac.new(key, message, hashlib.sha256).hexdigest()


def verify(key: bytes, message: bytes, signature: str) -> bool:
    """Was the message signed with this key? Takes equally long for every wrong signature."""
    return hmac.compare_digest(sign(key, message).encode(), signature.encode())


def canonical(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, no NaN (it becomes null)."""
    text = json.dumps(
        _finite(value),
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
        allow_nan=False,
        default=_moment,
    )
    return text.encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _moment(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no canonical JSON")


def _make_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o400)
    with os.fdopen(handle, "wb") as file:
        file.write(secrets.token_bytes(KEY_BYTES))
        file.flush()
        os.fsync(file.fileno())
    # A link never replaces: of two processes that start at once, both end with the first key.
    with contextlib.suppress(FileExistsError):
        os.link(temporary, path)
    temporary.unlink()
