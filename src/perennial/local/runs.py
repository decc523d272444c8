"""How does a person start, follow, resume and end a run, on whichever launcher is set?"""

import json
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Protocol, runtime_checkable

from rich.table import Table

from perennial import project as projects
from perennial.errors import BadInput
from perennial.local import folders, look, spec, summary, tables
from perennial.retrain import choice, ends
from perennial.retrain.answers import Run
from perennial.retrain.backend import Backend
from perennial.retrain.launchers import Launcher, RunRequest, RunResult, short_name
from perennial.settings import Settings
from perennial.store.engine import make_engine


@runtime_checkable
class Starter(Launcher, Protocol):
    """A launcher whose runs need nobody who waits for them."""

    def submit(self, request: RunRequest) -> str:
        """Start a run; gives its id."""
        ...


MOST = 100  # runs of a list

Follow = Callable[[], RunResult]


def submit(
    settings: Settings,
    text: str,
    *,
    source: str,
    as_of: str,
    trials: int,
    seed: int,
    wait: bool,
) -> int:
    """Start a run by hand; follow it to its end, or only say its id."""
    launcher = choice.launcher(settings)
    if not isinstance(launcher, Starter):
        _refuse_to_leave(settings, wait)
        return spec.run_once(settings, text, source=source, as_of=as_of, trials=trials, seed=seed)
    folder = folders.project_folder(settings, text)
    trigger = spec.by_hand()
    request = RunRequest(folder, source, spec.moment(as_of), trigger, trials, seed)
    _settle(settings, projects.load(folder).name)
    if not wait:
        print(launcher.submit(request))
        return 0
    return _followed(projects.load(folder).name, lambda: launcher.run(request, progress=print))


def _settle(settings: Settings, project: str) -> None:
    """Let the lease of a run go that ended while nobody followed it."""
    if not settings.state_url:
        return
    engine = make_engine(settings.state_url)
    try:
        ends.settle(engine, project, choice.launcher(settings).is_over, time.time())
    finally:
        engine.dispose()


def listing(settings: Settings, project: str, *, verbose: bool, as_json: bool) -> int:
    """All runs, newest first: of the ledger, or of a KFP backend where that is out of reach."""
    if settings.launcher != "kfp" or settings.state_url:
        _settle(settings, folders.state(settings, project).root.name)
        return look.runs(settings, project, verbose=verbose, as_json=as_json)
    found = [_plain(run) for run in islice(_backend_runs(settings, project), MOST)]
    if as_json:
        print(
            json.dumps([{k: v for k, v in row.items() if k != "steps"} for row in found], indent=2)
        )
        return 0
    table = Table("created", "state", "project", box=None, pad_edge=False)
    table.add_column("run", no_wrap=True, min_width=36)
    for row in found:
        table.add_row(row["created_at"][:16], row["state"], row["project"], row["run"])
    if found:
        tables.show(table)
    else:
        print("nothing yet")
    return 0


def _backend_runs(settings: Settings, project: str) -> Iterator[Run]:
    backend = Backend(settings)
    if not project:
        yield from backend.runs()
        return
    name = projects.load(folders.project_folder(settings, project)).name
    for experiment in backend.experiments(name):
        yield from backend.runs(experiment)


def status(settings: Settings, name: str, *, project: str, as_json: bool) -> int:
    """Where a run is: its steps on a KFP backend, else what the ledger knows."""
    if settings.launcher != "kfp":
        _settle(settings, folders.state(settings, project).root.name)
        return look.run(settings, project, name, as_json=as_json)
    backend = Backend(settings)
    run = backend.run(backend.find(name))
    if run.ended:
        _settle(settings, run.project)
    if as_json:
        print(json.dumps(_plain(run), indent=2))
        return 0
    print(f"run {run.id} ({run.name}): {run.state}")
    table = Table("step", "state", "seconds", box=None, pad_edge=False)
    for task in run.steps:
        seconds = "-" if task.seconds is None else f"{task.seconds:.0f}"
        table.add_row(task.name, task.state, seconds)
    tables.show(table)
    return 0


def logs(settings: Settings, name: str, *, project: str, step: str) -> int:
    """What the steps of a run wrote, or one of them."""
    if settings.launcher == "kfp":
        return _backend_logs(Backend(settings), name, step)
    view = look.View(settings, project)
    if step:
        raise BadInput(
            f"the launcher is {settings.launcher}, and its steps write to one log; leave out --step"
        )
    print(_own_log(settings, view, _known(view, name)), end="")
    return 0


def retry(settings: Settings, name: str, *, wait: bool) -> int:
    """Resume a failed run at the step that failed."""
    from perennial.retrain.remote import KfpLauncher

    if settings.launcher != "kfp":
        raise BadInput(
            f"the launcher is {settings.launcher}, and only a KFP backend resumes a run that ended;"
            " 'perennial runs submit' starts another"
        )
    launcher = KfpLauncher(settings)
    run = launcher.backend.run(launcher.backend.find(name))
    failed = ", ".join(task.name for task in run.failed)
    launcher.backend.retry(run.id)
    print(f"run {run.id} goes on{' at ' + failed if failed else ''}")
    if not wait:
        return 0
    return _followed(run.project, lambda: launcher.follow(run.project, run.id, print))


def terminate(settings: Settings, name: str, *, project: str) -> int:
    """End a run that goes on."""
    if settings.launcher == "local":
        raise BadInput("a run of this machine ends with its command; press Ctrl-C there")
    if settings.launcher == "job":
        return _end_job(settings, name, project)
    backend = Backend(settings)
    run = backend.find(name)
    backend.terminate(run)
    print(f"run {run} is told to end; the backend will call it FAILED")
    return 0


def _refuse_to_leave(settings: Settings, wait: bool) -> None:
    if not wait:
        raise BadInput(
            f"the launcher is {settings.launcher}, whose runs end with their command;"
            " leave out --no-wait, or set PERENNIAL_LAUNCHER"
        )


def _followed(project: str, follow: Follow) -> int:
    """Say how a run ended; who stops waiting is told that it goes on."""
    try:
        result = follow()
    except KeyboardInterrupt:
        print(f"{project}: the run goes on; 'perennial runs list' shows how it ended")
        raise
    print(f"{project}: run {result.run} {result.state}{': ' * bool(result.reason)}{result.reason}")
    return 0


def _backend_logs(backend: Backend, name: str, step: str) -> int:
    run = backend.run(backend.find(name))
    names = [task.name for task in run.steps]
    if step and step not in names:
        raise BadInput(
            f"run {run.id} has no step {step!r}; it has {', '.join(names) or 'none yet'}"
        )
    for task in run.steps:
        if step in ("", task.name):
            text = backend.log(run.id, task) or "(no log was kept)\n"
            print(text if step else f"== {task.name}: {task.state}\n{text}", end="")
    return 0


def _own_log(settings: Settings, view: look.View, run: dict[str, Any]) -> str:
    """The log of a run that kfp.local made, in a Job or here."""
    if settings.launcher == "job":
        from perennial.retrain import job

        return job.log_of(settings, view.name, str(run["run"]))
    path = view.state.logs / f"run-{short_name(run['trigger'])}.log"
    if not path.is_file():
        raise BadInput(f"no log of run {run['run']} at {path}")
    return path.read_text(encoding="utf-8")


def _end_job(settings: Settings, name: str, project: str) -> int:
    from perennial.retrain.job import JobLauncher

    view = look.View(settings, project)
    run = _known(view, name)["run"]
    JobLauncher(settings).terminate(view.name, run)
    print(f"run {run} is ended")
    return 0


def _known(view: look.View, name: str) -> dict[str, Any]:
    found = [r for r in summary.runs(view.entries) if r["run"].startswith(name)]
    if len(found) != 1:
        many = "several runs begin" if found else "no run begins"
        raise BadInput(f"{many} with {name!r}; 'perennial runs list --verbose' shows their ids")
    return found[0]


def _plain(run: Run) -> dict[str, Any]:
    return {
        "run": run.id,
        "name": run.name,
        "project": run.project,
        "state": run.state,
        "created_at": run.created_at.isoformat(),
        "finished_at": run.finished_at.isoformat() if run.finished_at else None,
        "steps": [{"step": t.name, "state": t.state, "seconds": t.seconds} for t in run.steps],
    }
