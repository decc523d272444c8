"""Compile the pipeline, and run the compiled one once by hand."""

import subprocess
import sys
from datetime import datetime
from pathlib import Path

from perennial import project
from perennial.errors import BadInput
from perennial.local import folders
from perennial.retrain import launchers
from perennial.settings import Settings

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
    stamp = datetime.now().strftime("%Y%m%dT%H%M%S")
    result = launcher.run(
        launchers.RunRequest(
            project=folder, source=source, as_of=_moment(as_of), trigger=f"by hand {stamp}"
        ),
        progress=print,
    )
    print(f"{found.name}: run {result.state}: {result.reason}")
    return 0


def _moment(text: str) -> datetime | None:
    if not text:
        return None
    try:
        return project.parse_moment(text)
    except ValueError as exc:
        raise BadInput(f"--as-of is {text!r}, wanted {exc}") from exc
