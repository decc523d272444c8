"""What does a notebook ask of a project, wherever the project is at work?"""

import html
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from perennial import ledger, project
from perennial.data import sources
from perennial.drift import segments
from perennial.errors import BadInput, Unavailable
from perennial.local import folders, processes, replay, spec, summary
from perennial.local import rows as served
from perennial.records import DriftReport, Phase, RolloutState
from perennial.retrain import choice, launchers
from perennial.settings import Settings
from perennial.store import objects, rollouts
from perennial.store.engine import make_engine

PAGES = {"page": "text/html", "card": "text/markdown"}
FIRST = "ingest/executor_output.json"  # names its run, wherever a launcher put it
START_S = 900.0
SETTLE_S = 900.0
POLL_S = 0.2

Say = Callable[[str], None]


@dataclass(frozen=True)
class Edge:
    """Where V2 clients send their requests, and what they say beside them."""

    url: str
    headers: dict[str, str]


@dataclass(frozen=True)
class Page:
    """What a step of a run wrote for people; a notebook shows it as it is."""

    step: str
    kind: str  # media type
    text: str

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        if self.kind != "text/html":
            return {self.kind: self.text}
        frame = 'style="width: 100%; height: 30em; border: 1px solid #ccc"'
        return {self.kind: f'<iframe {frame} srcdoc="{html.escape(self.text)}"></iframe>'}


class Session:
    """One project, with the eyes and hands that a notebook needs."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.project = project.load(folder)
        self._state = settings.state(self.project.name)
        self._engine = make_engine(self._state.url)
        self._ledger = ledger.Ledger(self._engine)
        self._segments = objects.Folder(self._state.artifacts("segments"))
        self._told = len(self.entries())
        self._stack: subprocess.Popen[bytes] | None = None

    def entries(self, kind: str | None = None) -> list[ledger.Entry]:
        """What the ledger holds, oldest first."""
        return self._ledger.entries(self.project.name, kind)

    def news(self) -> list[str]:
        """What the ledger has gained since the last look, one sentence an entry."""
        entries = self.entries()
        fresh, self._told = entries[self._told :], len(entries)
        tell = replay.Narrator.KINDS
        return [tell[e.kind](e.body) for e in fresh if e.kind in tell]

    def why(self) -> str:
        """How the serving model came to serve."""
        return "\n".join(ledger.why(self.entries()))

    def submit(self, as_of: datetime | None, progress: launchers.Progress) -> launchers.RunResult:
        """Run the pipeline by the launcher of the settings; tells each step as it begins."""
        request = launchers.RunRequest(self.folder, as_of=as_of, trigger=spec.by_hand())
        return choice.launcher(self.settings).run(request, progress)

    def pages(self, run: str) -> list[Page]:
        """What the steps of a run wrote for people."""
        runs = objects.Folder(self._state.artifacts("runs"))
        names = runs.names()
        firsts = [n for n in names if n.endswith(FIRST) and f'"{run}"'.encode() in runs.read(n)]
        roots = tuple(name.removesuffix(FIRST) for name in firsts)
        found = [PurePosixPath(n) for n in names if roots and n.startswith(roots)]
        written = [path for path in found if path.name in PAGES]
        return [Page(p.parent.name, PAGES[p.name], runs.read(str(p)).decode()) for p in written]

    def serving(self) -> RolloutState | None:
        """The rollout whose version serves."""
        return rollouts.serving(self._engine, self.project.name)

    def rollout(self) -> RolloutState | None:
        """The rollout that is in flight."""
        return rollouts.open_rollout(self._engine, self.project.name)

    def edge(self, say: Say = print) -> Edge:
        """Where to send requests; on one machine a stack is started unless one runs."""
        headers = {"host": self.settings.edge_host} if self.settings.edge_host else {}
        if self.settings.edge_url:
            return Edge(self.settings.edge_url.rstrip("/"), headers)
        if self.settings.launcher != "local":
            raise BadInput(
                "nobody says where models are served; set PERENNIAL_EDGE_URL to the ingress, such"
                " as http://127.0.0.1:31080, and PERENNIAL_EDGE_HOST to the service's host name"
            )
        if not processes.stack_pid(self._state.stack):
            self._start(say)
        return Edge(str(self.entries("stack.started")[-1].body["edge"]), headers)

    def close(self) -> None:
        """End the stack, if this session started it."""
        if self._stack is not None:
            processes.signal_stack(self._state.stack)
            self._stack.wait()
        self._stack = None

    def windows(self) -> Iterator[tuple[datetime, pd.DataFrame]]:
        """Windows of the project's history that nobody was served yet, in order of time.

        Raises BadInput when there are none.
        """
        home = self.folder if self.folder.is_dir() else self.folder.parent
        raw = sources.read(self.project, None, home, url=self.settings.source_url)
        since = self._unserved()
        rows = served.examples(self.project, raw, since, self.project.replay.until)
        if rows.empty:
            raise BadInput(
                f"all rows of {self.project.name} were served; forget the project's state, such as"
                f" {self._state.root}, to begin anew"
            )
        starts = rows["event_time"].map(lambda t: self.project.window_start(t.to_pydatetime()))
        for start, window in rows.groupby(starts, sort=True):
            yield pd.Timestamp(start).to_pydatetime(), window

    def drift(self, start: datetime) -> DriftReport | None:
        """What the detector says of a window that is over: its largest share of rows."""
        found = segments.reports(self._segments, start)
        return max(found, key=lambda r: r.rows, default=None)

    def settle(self, start: datetime, say: Say = print) -> None:
        """Wait until the loop has done with a window: tested, decided, trained, canary up."""
        limit = time.monotonic() + SETTLE_S
        while not self._settled(start):
            _tell(self.news(), say)
            if time.monotonic() > limit:
                raise Unavailable(f"window {start:%Y-%m-%d} did not settle in {SETTLE_S:.0f} s")
            time.sleep(POLL_S)
        _tell(self.news(), say)

    def _unserved(self) -> datetime:
        served = segments.starts(self._segments)
        first = self.project.replay.train_until or datetime.min.replace(tzinfo=UTC)
        return max([first, *(self.project.window_end(s) for s in served)])

    def _settled(self, start: datetime) -> bool:
        serving = self.serving()
        found = segments.reports(self._segments, start)
        mine = [r for r in found if serving and r.model_digest == serving.digest]
        if not mine or self._starting():
            return False
        drifted = any(r.is_drift and not r.thin for r in mine)
        return not drifted or self._decided(mine[0].window_end)

    def _decided(self, end: datetime) -> bool:
        bodies = [e.body for e in self.entries("decision")]
        mine = [b for b in bodies if b["window_end"] == end.isoformat()]
        triggers = {b["event_id"] for b in mine if b["action"] == "retrain"}
        ended = {r["trigger"] for r in summary.runs(self.entries()) if r["state"] != "unfinished"}
        return bool(mine) and triggers <= ended

    def _starting(self) -> bool:
        open_one = self.rollout()
        return open_one is not None and open_one.phase in (Phase.WISHED, Phase.STARTING)

    def _start(self, say: Say) -> None:
        before = len(self.entries("stack.started"))
        self._state.logs.mkdir(parents=True, exist_ok=True)
        log = self._state.logs / "notebook.log"
        command = [sys.executable, "-m", "perennial.cli", "up", str(self.folder)]
        with log.open("wb") as told:
            self._stack = subprocess.Popen(
                command,
                stdout=told,
                stderr=subprocess.STDOUT,
                env={**os.environ, **processes.surroundings(self.settings)},
                preexec_fn=processes.end_with(os.getpid()),
            )
        say(f"starting the stack; its log is {log}")
        limit = time.monotonic() + START_S
        while len(self.entries("stack.started")) == before:
            if self._stack.poll() is not None or time.monotonic() > limit:
                raise Unavailable(f"the stack did not start: {log.read_text('utf-8').strip()}")
            time.sleep(POLL_S)


def open_project(name: str) -> Session:
    """The project folder that ``name`` names, with the settings of the environment.

    A notebook stands in a folder of its own: a relative PERENNIAL_HOME is one of the root.
    """
    found = Settings.load()
    settings = found.model_copy(update={"home": found.root / found.home})
    return Session(settings, folders.project_folder(settings, name))


def _tell(lines: list[str], say: Say) -> None:
    for line in lines:
        say(f"{datetime.now():%H:%M:%S}  {line}")
