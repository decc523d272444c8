"""Fixtures and rules that all tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from stores import (  # noqa: F401  fixtures
    database_url,
    engine,
    place,
    postgres,
    s3,
    s3_bucket,
    tenant_url,
)

from perennial.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
MISSING_DATA = "no folder of public data sets at"
# What a test found out that it cannot try here; no tool is missing.
EXCUSED = (
    MISSING_DATA,
    "this cluster's network keeps no NetworkPolicies",
    "no KFP backend here",
)


def _data_folder() -> Path:
    given = os.environ.get("PERENNIAL_TEST_DATA")
    return Path(given) if given else ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of public data sets; a test that wants it is skipped where there is none."""
    folder = _data_folder()
    if not folder.is_dir():
        pytest.skip(f"{MISSING_DATA} {folder}; set PERENNIAL_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings whose state lies in this test's own folder, also for child processes."""
    for name in [
        n for n in os.environ if n.startswith("PERENNIAL_") and n != "PERENNIAL_TEST_DATA"
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PERENNIAL_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PERENNIAL_EDGE_PORT", "0")
    return Settings.load()


def _reason(report: pytest.TestReport) -> str:
    longrepr = report.longrepr
    return str(longrepr[2] if isinstance(longrepr, tuple) else longrepr).removeprefix("Skipped: ")


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Iterator[None]:
    """In CI a skipped test is a failure, except where the data folder is missing."""
    yield
    if os.environ.get("CI") == "true" and _skipped(session) and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _skipped(session: pytest.Session) -> list[tuple[str, str]]:
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    reports = terminal.stats.get("skipped", []) if terminal else []
    told = [(r.nodeid, _reason(r)) for r in reports]
    return [(node, why) for node, why in told if not why.startswith(EXCUSED)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List what was not run and why, as the last thing that is read."""
    reports = terminalreporter.stats.get("skipped", [])
    if not reports:
        return
    terminalreporter.section("not run")
    for report in reports:
        terminalreporter.write_line(f"{report.nodeid}: {_reason(report)}")
    if os.environ.get("CI") == "true":
        terminalreporter.write_line(
            "CI=true: tests that lack a server or tool fail the run; a missing data folder does not"
        )
