"""How does the pod of a Job run the pipeline, and what of it did the pod before it do already?

The exit code tells the Job what to do: another pod may bring a run further that ended with
Unavailable (3), died, or was killed; what a step itself says (4) and bad input (2) are final.
"""

import argparse
import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from perennial import project as projects
from perennial.errors import BadInput, PerennialError, RunFailed, Unavailable
from perennial.retrain import beside, launchers
from perennial.retrain.launchers import Log, Notes, RunRequest
from perennial.settings import Settings
from perennial.steps import context
from perennial.store.files import write_atomic
from perennial.store.objects import Folder

_RUN_ID = "{{$.pipeline_job_uuid}}"
_EXIT_HANDLER = "ALL_UPSTREAM_TASKS_COMPLETED"
_POLL_S = 1.0


class Steps:
    """The steps of a run that are done: their records and files, here and in the store.

    ``root`` is where the runner leaves files; a record there is written when its step is done.
    """

    def __init__(self, root: Path, store: Folder) -> None:
        self._root = root.resolve()
        self._records = root / ".kfp_cache"
        self._store = store
        self._kept: set[str] = set()

    def fetch(self) -> int:
        """Bring here what earlier pods did, and give the number of steps; damage is done anew."""
        for name in self._store.names("done"):
            try:
                self._fetch(Path(name).name, self._store.read(name))
            except BadInput as exc:
                print(f"a step is done again: {exc}", flush=True)
        return len(self._kept)

    def keep(self) -> None:
        """Copy what was done since the last call; the record of a step goes last."""
        for path in sorted(self._records.glob("*.json")):
            if path.name not in self._kept:
                self._keep(path)

    def _fetch(self, name: str, record: bytes) -> None:
        for folder in self._folders(record):
            self._store.fetch(f"files/{folder}", self._root / folder)
        write_atomic(self._records / name, record)
        self._kept.add(name)

    def _keep(self, path: Path) -> None:
        record = path.read_bytes()
        for folder in self._folders(record):
            self._store.keep(self._root / folder, f"files/{folder}")
        self._store.write(f"done/{path.name}", record)
        self._kept.add(path.name)

    def _folders(self, record: bytes) -> list[str]:
        """Folders, below the root, of the files that a record names."""
        try:
            files = [Path(uri).resolve() for uri in _uris(json.loads(record))]
            return sorted({str(file.parent.relative_to(self._root)) for file in files})
        except ValueError as exc:
            raise BadInput(f"the record of a step is damaged: {exc}") from exc


def pinned(spec: str, run: str) -> str:
    """A compiled pipeline whose run bears this id, and whose steps are each done once in it."""
    documents = list(yaml.safe_load_all(spec.replace(_RUN_ID, run)))
    for task in _tasks(documents[0]):
        # The exit handler tells how this attempt ended, so it is never done already.
        ends = task.get("triggerPolicy", {}).get("strategy") == _EXIT_HANDLER
        task["cachingOptions"] = {} if ends else {"enableCache": True}
    return yaml.safe_dump_all(documents, sort_keys=False)


def may_pass(notes: Notes) -> bool:
    """May a new pod get further: was something away, or did a step end without a word?"""
    return bool(notes.failed) and notes.kind in ("", Unavailable.__name__)


def run(settings: Settings, spec: Path, request: RunRequest, name: str) -> int:
    """Run the pipeline as run ``name``, from where an earlier pod came to; gives the exit code."""
    state = settings.state(projects.load(request.project).name)
    root = state.runs / name
    store = Folder(state.artifacts("runs")) / name / _folder_of(settings)
    steps, log = Steps(root, store), Log(root / "log.txt")
    if done := steps.fetch():
        print(f"{done} steps were done by an earlier pod", flush=True)
    ours = root / "spec.yaml"
    write_atomic(ours, pinned(spec.read_text(encoding="utf-8"), name).encode())
    try:
        with beside.going_on(partial(_keep_until, steps)):
            return _followed(settings, ours, request, root, log)
    finally:
        _keep_log(store, log)


def _followed(settings: Settings, spec: Path, request: RunRequest, root: Path, log: Log) -> int:
    with tempfile.TemporaryDirectory(prefix="perennial-run-") as scratch:
        child = launchers.start(settings, spec, request, scratch, kept=root)
        try:
            return _watched(child, log)
        finally:
            launchers.end(child)


def _watched(child: "subprocess.Popen[str]", log: Log) -> int:
    for line in log.lines(child):
        print(line, end="", flush=True)
        if may_pass(log):
            # Before the exit handler tells the end: the run goes on in a new pod.
            print(f"step {log.failed} ended early: {log.error or 'without a word'}", flush=True)
            return Unavailable.exit_code
    return _code(log, child.wait())


def _code(notes: Notes, code: int) -> int:
    if notes.failed:
        return RunFailed.exit_code
    return Unavailable.exit_code if code else 0


def _keep_until(steps: Steps, over: threading.Event) -> None:
    """Copy what is done now and then, and once more at the end."""
    while True:
        last = over.wait(_POLL_S)
        try:
            steps.keep()
        except Unavailable as exc:
            # A new pod would have to do these steps again, which is no reason to end this one.
            print(f"a step that is done could not be kept: {exc}", flush=True)
        if last:
            return


def _keep_log(store: Folder, log: Log) -> None:
    if not log.path.is_file():
        return
    try:
        store.write(f"logs/{socket.gethostname()}.txt", log.path.read_bytes())
    except Unavailable as exc:
        print(f"the log could not be kept: {exc}", flush=True)


def _tasks(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for component in (spec["root"], *spec["components"].values()):
        yield from component.get("dag", {}).get("tasks", {}).values()


def _uris(record: object) -> Iterator[str]:
    if isinstance(record, dict):
        if record.get("uri"):
            yield str(record["uri"])
        record = list(record.values())
    if isinstance(record, list):
        for value in record:
            yield from _uris(value)


def _folder_of(settings: Settings) -> str:
    """Steps of one image are not those of another, also where its tag was given anew."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", f"{settings.image} {settings.code_commit}".strip())


def main() -> int:
    """Run the pipeline in the pod of a Job."""
    asked = _parser().parse_args()
    # The first process of a container has no default for SIGTERM, and its children must end too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(Unavailable.exit_code))
    try:
        settings = Settings.load()
        context.find(settings, asked.project)
        request = RunRequest(
            settings.root / asked.project,
            asked.source,
            context.moment(asked.as_of),
            asked.trigger,
            asked.trials,
            asked.seed,
        )
        return run(settings, settings.root / launchers.SPEC, request, asked.run)
    except PerennialError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m perennial.retrain.inpod", description=main.__doc__
    )
    parser.add_argument("--run", required=True, help="id of the run: the name of the Job")
    parser.add_argument("--project", required=True, help="projects/<name>.yaml, below the root")
    parser.add_argument("--source", default="", help="file with raw rows")
    parser.add_argument("--as-of", default="", help="moment up to which data is known")
    parser.add_argument("--trigger", default="by hand", help="what started this run")
    parser.add_argument("--trials", type=int, default=0, help="0: the project's")
    parser.add_argument("--seed", type=int, default=-1, help="-1: the project's")
    return parser


if __name__ == "__main__":
    sys.exit(main())
