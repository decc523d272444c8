"""Of two runs of tests at once, no failure is lost and all that was said is shown."""

import subprocess
from pathlib import Path

import pytest

BESIDE = Path(__file__).resolve().parent / "beside.sh"
# Stands for pytest: says its last word, and ends with it.
PYTEST = """#!/bin/bash
echo "ended with ${@: -1}"
exit "${@: -1}"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTEST)
    python.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [("0", "0", 0), ("1", "0", 1), ("0", "1", 1), ("2", "1", 2), ("0", "5", 5)],
)
def test_it_ends_as_the_worse_of_the_two(checkout, first, second, code):
    script = f". {BESIDE}; beside {first} -- {second}"
    done = subprocess.run(
        ["bash", "-euc", script], cwd=checkout, capture_output=True, text=True, check=False
    )

    assert done.returncode == code, done.stderr
    assert f"ended with {first}" in done.stdout
    assert f"ended with {second}" in done.stdout
