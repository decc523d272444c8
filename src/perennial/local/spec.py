"""Compile the pipeline, and run the compiled one once by hand."""

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from perennial import project
from perennial.errors import BadInput
from perennial.local import folders
from perennial.retrain import launchers, runs
from perennial.settings import Settings
from perennial.store.engine import make_engine

SPEC = Path("pipelines") / "training.yaml"


def compile_training(settings: Settings, *, check: bool) -> int:
    """Compile pipelines/training.py; with ``check`` only compare with the checked-in file."""
    command = [sys.executable, "-m", "pipelines.training", *(["--check"] if check else [])]
    return subprocess.run(command, cwd=settings.root, check=False).returncode


def run_once(settings: Settings, text: str, *, source: str, as_of: str) -> int:
    """Run the compiled spec by hand and say how it ended."""
    folder = folders.project_folder(settings, text)
    found = project.load(folder)
    launcher = launchers.LocalLauncher(settings, settings.root / SPEC)
    moment = _moment(as_of)
    trigger = f"by hand {datetime.now(UTC):%Y%m%dT%H%M%S}"

    def launch(as_of: datetime, trigger: str) -> launchers.RunResult:
        request = launchers.RunRequest(project=folder, source=source, as_of=moment, trigger=trigger)
        return launcher.run(request, progress=print)

    engine = make_engine(settings.state(found.name).url)
    exclusive = runs.Runs(found.name, engine, launch, lambda: datetime.now(UTC))
    told = exclusive.once(trigger, moment or datetime.now(UTC))
    print(f"{found.name}: {told}")
    return 4 if told.startswith("failed") else 0


def _moment(text: str) -> datetime | None:
    if not text:
        return None
    try:
        return project.parse_moment(text)
    except ValueError as exc:
        raise BadInput(f"--as-of is {text!r}, wanted {exc}") from exc
