"""What failed beside other tests is tried once more alone, and no failure is lost by that."""

import subprocess
from pathlib import Path

import pytest

BESIDE = Path(__file__).resolve().parent / "beside.sh"
# Stands for pytest: ends as its last words say, "then" by what it says of a second try.
PYTEST = """#!/bin/bash
case "$*" in
  *--last-failed*) echo "again ${@: -1}"; exit "${@: -1}" ;;
  *) exit "${@: -2:1}" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTEST)
    python.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("first", "second", "code", "again"),
    [
        ("0 9", "0 9", 0, []),
        ("1 0", "0 9", 0, ["again 0"]),
        ("0 9", "1 0", 0, ["again 0"]),
        ("1 0", "1 0", 0, ["again 0", "again 0"]),
        pytest.param("1 1", "0 9", 1, ["again 1"], id="it fails alone, too"),
        pytest.param("1 1", "1 0", 1, ["again 1", "again 0"], id="one of two fails alone, too"),
        pytest.param("1 5", "0 9", 1, ["again 5"], id="skipped tests failed it, none is left"),
        pytest.param("2 0", "0 9", 2, [], id="it was interrupted"),
        pytest.param("0 9", "4 0", 4, [], id="it was called wrongly"),
    ],
)
def test_only_what_passes_alone_is_forgiven(checkout, first, second, code, again):
    script = f". {BESIDE}; beside {first} -- {second}"
    done = subprocess.run(
        ["bash", "-euc", script], cwd=checkout, capture_output=True, text=True, check=False
    )

    assert done.returncode == code, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("again")] == again
    assert done.stdout.count("AGAIN") == len(again)
