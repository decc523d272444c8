"""tests/cluster/run takes down what it brought up, and nothing else."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).resolve().parent / "cluster" / "run"
SAY = """#!/bin/sh
echo "$(basename "$0") $1" >>"$SAID"
[ "$FAILS" != "$(basename "$0") $1" ] || exit 7
"""
SCRIPTS = {
    "shared/cluster/up": f'{SAY}echo "export KUBECONFIG=/a/pki/config"',
    "shared/cluster/down": SAY,
    "shared/cluster/status": '#!/bin/sh\nexec test "$CLUSTER" = up',
    "shared/cluster/stores": f'{SAY}[ "$1" = status ] && echo "postgres $STORES"\ntrue',
    "ours/images/build": SAY,
    "ours/.venv/bin/python": SAY,
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with a cluster beside it, whose scripts only say that they were called."""
    for name, text in SCRIPTS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    run = tmp_path / "ours" / "tests" / "cluster" / "run"
    run.parent.mkdir(parents=True)
    shutil.copy(RUN, run)
    return tmp_path


def ran(checkout: Path, **variables: str) -> tuple[int, list[str]]:
    """The exit code of the script, and what it called by then."""
    said, log = checkout / "said", checkout / "log"
    there = {"SAID": str(said), "FAILS": "", "CLUSTER": "down", "STORES": "down"}
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = [str(checkout / "ours" / "tests" / "cluster" / "run"), "one file"]
    with log.open("w") as told:
        print("before", file=told, flush=True)
        done = subprocess.run(
            command, env={**clean, **there, **variables}, stdout=told, stderr=told, check=False
        )
    assert log.read_text().startswith("before\n"), "a log that is a file is not begun anew"
    return done.returncode, [line.strip() for line in said.read_text().splitlines()]


TESTS = ["build", "python -m"]
STORES = ["stores status", "stores up"]


@pytest.mark.parametrize(
    ("variables", "calls"),
    [
        ({}, ["up serving", *STORES, *TESTS, "stores down", "down"]),
        ({"CLUSTER": "up"}, ["up serving", *STORES, *TESTS, "stores down"]),
        ({"CLUSTER": "up", "STORES": "up"}, ["up serving", *STORES, *TESTS]),
        ({"KUBECONFIG": "/their/own"}, [*STORES, *TESTS, "stores down"]),
        ({"KUBECONFIG": "/their/own", "STORES": "up"}, [*STORES, *TESTS]),
        ({"KUBECONFIG": "/their/own", "PERENNIAL_TEST_POSTGRES": "theirs"}, TESTS),
        ({"KEEP_CLUSTER": "1"}, ["up serving", *STORES, *TESTS]),
    ],
)
def test_what_was_up_before_stays_up(checkout, variables, calls):
    assert ran(checkout, **variables) == (0, calls)


@pytest.mark.parametrize(
    ("fails", "calls"),
    [
        ("up serving", ["up serving", "down"]),
        ("stores up", ["up serving", *STORES, "stores down", "down"]),
        ("build ", ["up serving", *STORES, "build", "stores down", "down"]),
        ("python -m", ["up serving", *STORES, *TESTS, "stores down", "down"]),
    ],
)
def test_what_fails_half_way_leaves_nothing_up_and_is_told(checkout, fails, calls):
    assert ran(checkout, FAILS=fails) == (7, calls)
