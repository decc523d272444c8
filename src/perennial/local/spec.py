"""Compile the pipeline, give it to a KFP backend, schedule it there, and run it once by hand."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from perennial import project
from perennial.errors import BadInput
from perennial.local import folders
from perennial.retrain import cron, launchers, runs, schedules, specs
from perennial.retrain.answers import Uploaded, Wanted
from perennial.retrain.backend import Backend
from perennial.settings import Settings
from perennial.store.engine import make_engine

SPEC = Path("pipelines") / "training.yaml"
PIPELINE = "training"
SCHEDULE = "schedule"  # the trigger of a run that a schedule starts


def compile_training(settings: Settings, *, check: bool, to: str = "") -> int:
    """Compile pipelines/training.py; with ``check`` only compare with the checked-in file."""
    flags: Sequence[str] = [*(["--check"] if check else []), *(["--to", to] if to else [])]
    command = [sys.executable, "-m", "pipelines.training", *flags]
    return subprocess.run(command, cwd=settings.root, check=False).returncode


def upload(settings: Settings) -> int:
    """Make the spec that fits these settings known to the backend, as a version of its own."""
    backend = Backend(settings)
    made = _upload(settings, backend)
    told = "uploaded to" if made.new else "is there already, at"
    print(f"{PIPELINE} version {made.name} {told} {backend.host}")
    return 0


def schedule(
    settings: Settings, text: str, *, when: str | None, off: bool, patience_s: float
) -> int:
    """Let the backend run the pipeline at set times: one run at a time, none made up for."""
    found = project.load(folders.project_folder(settings, text))
    # Before anything is asked: a wrong schedule must cost nothing.
    timing = cron.parse(when or "") if not off else None
    backend = Backend(settings)
    experiment = backend.experiment(found.name)
    if timing is None:
        return _unschedule(backend, experiment, found.name, patience_s)
    made = _upload(settings, backend)
    parameters = {"project": f"projects/{found.name}.yaml", "trigger": SCHEDULE}
    outcome = schedules.reconcile(
        backend,
        experiment,
        Wanted(found.name, timing.text, made.pipeline, made.version, parameters),
        settings.kfp_service_account,
        patience_s=patience_s,
        progress=print,
    )
    first = timing.after(datetime.now(UTC))
    print(
        f"{found.name}: schedule {outcome.did} ({outcome.id}); next run {first:%Y-%m-%d %H:%M} UTC"
    )
    return 0


def _unschedule(backend: Backend, experiment: str, name: str, patience_s: float) -> int:
    old = backend.recurring(experiment, name)
    schedules.retire(backend, experiment, old, patience_s=patience_s, progress=print)
    print(f"{name}: {'schedule removed' if old else 'there was no schedule'}")
    return 0


def _upload(settings: Settings, backend: Backend) -> Uploaded:
    text = specs.for_cluster(settings)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SPEC.name
        path.write_text(text, encoding="utf-8")
        return backend.upload(PIPELINE, specs.version(text), path)


def run_once(
    settings: Settings, text: str, *, source: str, as_of: str, trials: int = 0, seed: int = -1
) -> int:
    """Run the compiled spec here by hand and say how it ended."""
    folder = folders.project_folder(settings, text)
    found = project.load(folder)
    launcher = launchers.LocalLauncher(settings, settings.root / SPEC)
    until = moment(as_of)
    trigger = by_hand()

    def launch(as_of: datetime, trigger: str) -> launchers.RunResult:
        request = launchers.RunRequest(folder, source, until, trigger, trials, seed)
        return launcher.run(request, progress=print)

    engine = make_engine(settings.state(found.name).url)
    exclusive = runs.Runs(found.name, engine, launch, lambda: datetime.now(UTC))
    told = exclusive.once(trigger, until or datetime.now(UTC))
    print(f"{found.name}: {told}")
    return 4 if told.startswith("failed") else 0


def by_hand() -> str:
    """What starts a run that a person asks for now."""
    return f"by hand {datetime.now(UTC):%Y%m%dT%H%M%S}"


def moment(text: str) -> datetime | None:
    """What ``--as-of`` means; None where it is empty."""
    if not text:
        return None
    try:
        return project.parse_moment(text)
    except ValueError as exc:
        raise BadInput(f"--as-of is {text!r}, wanted {exc}") from exc
