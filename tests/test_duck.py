"""DuckDB stays within its memory, and leaves nothing on the disk."""

from pathlib import Path

import pandas as pd
import pytest

from perennial.data import duck
from perennial.errors import RunFailed

ROWS = pd.DataFrame({"x": range(20_000)})
# 160 MB of numbers, which no order has yet.
LARGE = "select a.x * 20000 + b.x as y from given a, given b where b.x < 1000 order by hash(y)"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the machine keeps files for a while."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_rows_in_memory_are_asked_within_a_bound_and_the_rest_spills(temporary: Path):
    with duck.over({"given": ROWS}, memory="100MB") as connection:
        connection.execute(f"create temp table made as {LARGE}")
        spilled = sum(f.stat().st_size for f in temporary.rglob("*") if f.is_file())
        count = connection.execute("select count(*) from made").fetchone()[0]

    assert count == 20_000_000
    assert spilled > 10_000_000
    assert list(temporary.iterdir()) == []


def test_rows_that_fit_nowhere_are_told(temporary: Path):
    with (
        pytest.raises(RunFailed, match="the rows do not fit: .*; give .* more disk"),
        duck.over({"given": ROWS}, memory="100MB") as connection,
    ):
        connection.execute("set max_temp_directory_size = '1MB'")
        connection.execute(f"create temp table made as {LARGE}")

    assert list(temporary.iterdir()) == []
