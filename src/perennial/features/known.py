"""Which entities are online? A set of keys beside the rows, in parts that are each written whole.

No online store of Feast can be asked for its keys. The set is never less than what is online: keys
join it before their rows are written, and leave it after their rows are emptied.
"""

from typing import Any

import numpy as np
import pyarrow as pa

from perennial.features.store import Store

PARTS = 64  # a power of two; of ten million keys each part has some megabyte
_AT_ONCE = 8  # parts in Python's hands at a time


def load(connection: Any, store: Store) -> None:
    """Make the table ``known`` of all keys of the set."""
    connection.execute("create or replace temp table known (key bigint)")
    for start in range(0, PARTS, _AT_ONCE):
        found = store.read_keys(range(start, start + _AT_ONCE))
        keys = np.frombuffer(b"".join(found), dtype="<i8")
        connection.register("given", pa.table({"key": keys}))
        connection.execute("insert into known from given")
        connection.unregister("given")


def save(connection: Any, store: Store, wanted: str) -> None:
    """Let the set be what a query gives: write the parts in which ``known`` is another one."""
    connection.execute(f"create or replace temp table wanted as {wanted}")
    changed = connection.execute(
        f"select distinct key & {PARTS - 1} as part from ((from wanted except from known)"
        " union all (from known except from wanted)) order by part"
    ).fetchnumpy()["part"]
    for start in range(0, len(changed), _AT_ONCE):
        parts = changed[start : start + _AT_ONCE].tolist()
        store.write_keys({part: _part(connection, part) for part in parts})
    connection.execute("create or replace temp table known as from wanted")


def _part(connection: Any, part: int) -> bytes:
    sql = f"select key from wanted where key & {PARTS - 1} = {part} order by key"
    keys: bytes = connection.execute(sql).fetchnumpy()["key"].astype("<i8").tobytes()
    return keys
