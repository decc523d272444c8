"""Drive a project's own history through the running loop, and say whether retraining paid."""

import json
import math
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from perennial import bundle, ledger, project
from perennial.contract import Contract
from perennial.data import sources
from perennial.drift import segments
from perennial.errors import BadInput, LoopBroken
from perennial.local import folders, processes, stack, summary
from perennial.local import rows as served
from perennial.records import DriftReport, Phase, some
from perennial.report import loop as loop_report
from perennial.settings import Settings
from perennial.store import engine as engines
from perennial.store import files, rollouts

BATCH = 100
BURST_THREADS = 4
SETTLE_S = 900.0


@dataclass
class Answers:
    """What clients got so far; rows in the order they were sent."""

    requests: int = 0
    failed: int = 0
    problems: list[str] = field(default_factory=list)

    def fault(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)


@dataclass(frozen=True)
class Sent:
    """One answered request."""

    probabilities: np.ndarray
    revision: str


class Client:
    """Sends rows of a table as V2 requests through the edge."""

    def __init__(
        self,
        edge: str,
        name: str,
        contract: Contract,
        answers: Answers,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._http = httpx.Client(base_url=edge, timeout=30.0, trust_env=False, headers=headers)
        self._path = f"/v2/models/{name}/infer"
        self._contract = contract
        self._answers = answers
        self._pool = ThreadPoolExecutor(BURST_THREADS)

    def send(self, rows: pd.DataFrame) -> Sent:
        """One request with all ``rows``; a failed one counts, and its rows answer NaN."""
        moment = rows["event_time"].iloc[0].to_pydatetime()
        body = self._contract.to_request(rows, f"r{rows['row_id'].iloc[0]}", moment)
        self._answers.requests += 1
        try:
            response = self._http.post(self._path, json=body)
        except httpx.HTTPError as exc:
            return self._failed(rows, f"a request through the edge failed: {exc!r}")
        if response.status_code != 200:
            return self._failed(rows, f"HTTP {response.status_code}: {response.text[:200]}")
        told = response.json()
        outputs = {o["name"]: o["data"] for o in told["outputs"]}
        scores = np.asarray(outputs["probability"], dtype=np.float64)
        return Sent(scores, told["parameters"]["revision"])

    def burst(self, rows: pd.DataFrame) -> list[Sent]:
        """One request a row, a few at a time: what a rollout wants to see."""
        return list(self._pool.map(self.send, [rows.iloc[i : i + 1] for i in range(len(rows))]))

    def _failed(self, rows: pd.DataFrame, text: str) -> Sent:
        self._answers.failed += 1
        self._answers.fault(text)
        return Sent(np.full(len(rows), np.nan), "")

    def close(self) -> None:
        self._pool.shutdown()
        self._http.close()


class Replay:
    """One replay: the stack is up, windows are sent in order, the loop does what it would do."""

    def __init__(
        self, settings: Settings, folder: Path, found: project.Project, running: stack.Stack
    ) -> None:
        self._project = found
        self._stack = running
        self._state = settings.state(found.name)
        self._engine = engines.make_engine(self._state.url)
        self.ledger = ledger.Ledger(self._engine)
        self.answers = Answers()
        self.results: list[summary.WindowResult] = []
        first = rollouts.serving(self._engine, found.name)
        if first is None:
            raise LoopBroken(f"no model of {found.name} serves after the first training")
        self._frozen = bundle.load(Path(first.bundle_uri.removeprefix("file://")))
        self._contract = Contract.from_plain(self._frozen.contract)
        self._client = Client(running.edge_url, found.name, self._contract, self.answers)

    def run(self, rows: pd.DataFrame, progress: "Narrator") -> None:
        """Send every window of ``rows``, sorted by event_time; the loop settles after each."""
        starts = rows["event_time"].map(lambda t: self._project.window_start(t.to_pydatetime()))
        before: tuple[datetime, set[str]] | None = None
        for start, window in rows.groupby(starts, sort=True):
            moment = start.to_pydatetime() if isinstance(start, pd.Timestamp) else start
            before = (moment, self._window(moment, window, before, progress))
            progress.window(self)

    def _window(
        self,
        start: datetime,
        rows: pd.DataFrame,
        before: tuple[datetime, set[str]] | None,
        progress: "Narrator",
    ) -> set[str]:
        sent = [self._client.send(rows.iloc[:BATCH])]
        if before and sent[0].revision in before[1]:
            self._settle(before[0], sent[0].revision, progress)
        position = len(sent[0].probabilities)
        while position < len(rows):
            part = rows.iloc[position : position + self._next_size()]
            sent += self._send(part)
            position += len(part)
            self._stack.tick()
        self._keep(start, rows, sent)
        return {s.revision for s in sent}

    def _send(self, part: pd.DataFrame) -> list[Sent]:
        if self._in_canary():
            return self._client.burst(part)
        return [self._client.send(part)]

    def _in_canary(self) -> bool:
        open_one = rollouts.open_rollout(self._engine, self._project.name)
        return open_one is not None and open_one.phase is Phase.CANARY

    def _next_size(self) -> int:
        """Rows to send before the next look: what the open step still needs, else a batch."""
        self._wait_for_start()
        open_one = rollouts.open_rollout(self._engine, self._project.name)
        if open_one is None or open_one.phase is not Phase.CANARY:
            return BATCH
        needed = self._project.rollout.min_requests * 100 / max(open_one.weight, 1)
        return math.ceil(needed * 1.2 / 3)

    def _wait_for_start(self) -> None:
        """A revision comes up in seconds of wall time, which is nothing in event time."""
        limit = time.monotonic() + self._project.rollout.ready_s * 2
        while time.monotonic() < limit:
            open_one = rollouts.open_rollout(self._engine, self._project.name)
            if open_one is None or open_one.phase is Phase.CANARY:
                return
            self._stack.tick()
            time.sleep(0.05)

    def _settle(self, start: datetime, revision: str, progress: "Narrator") -> None:
        """Wait until the loop has done with the window that ended: tested, decided, run over."""
        limit = time.monotonic() + SETTLE_S
        while not self._settled(start, revision):
            self._stack.tick()
            progress.events(self)
            time.sleep(0.05)
            if time.monotonic() > limit:
                text = f"the window that starts {start:%Y-%m-%d} did not settle in {SETTLE_S:.0f} s"
                raise LoopBroken(f"{text}; see the logs in {self._state.logs}")

    def _settled(self, start: datetime, revision: str) -> bool:
        report = self._report(start, revision)
        if report is None:
            return False
        if report.is_drift and not report.thin and not self._received(report):
            return False
        status = self._service_status()
        return status is not None and not status["pending"] and not status["running"]

    def _service_status(self) -> dict[str, Any] | None:
        """What the retraining service is at; None while the stack starts it again."""
        try:
            answer = httpx.get(f"{self._stack.service_url}/status", timeout=30.0, trust_env=False)
        except httpx.HTTPError:
            return None
        return dict(answer.json()[self._project.name]) if answer.status_code == 200 else None

    def _received(self, report: DriftReport) -> bool:
        end = report.window_end.isoformat()
        entries = self.ledger.entries(self._project.name, "event.received")
        return any(e.body["window_end"] == end for e in entries)

    def _report(self, start: datetime, revision: str) -> DriftReport | None:
        digest = self._digest(revision)
        reports = segments.reports(self._state.artifacts("segments"), start)
        return next((r for r in reports if r.model_digest == digest), None)

    def _digest(self, revision: str) -> str | None:
        states = rollouts.history(self._engine, self._project.name)
        return next((s.digest for s in states if f"v{s.version}" == revision), None)

    def _keep(self, start: datetime, rows: pd.DataFrame, sent: list[Sent]) -> None:
        matrix = self._contract.for_model(self._contract.encode(rows))
        self.results.append(
            summary.WindowResult(
                start=start,
                end=self._project.window_end(start),
                labels=rows["label"].to_numpy(dtype=np.float64),
                fresh=np.concatenate([s.probabilities for s in sent]),
                frozen=self._frozen.score(matrix),
                versions=tuple(dict.fromkeys(s.revision for s in sent if s.revision)),
                report=None,
            )
        )

    def finished(self) -> list[summary.WindowResult]:
        """Windows with what their detector said (after the stack is down: all is written)."""
        return [replace(w, report=self._widest(w.start)) for w in self.results]

    def _widest(self, start: datetime) -> DriftReport | None:
        reports = segments.reports(self._state.artifacts("segments"), start)
        return max(reports, key=lambda r: r.rows, default=None)

    def entries(self) -> list[ledger.Entry]:
        """All that the ledger holds of this project."""
        return self.ledger.entries(self._project.name)

    def close(self) -> None:
        self._client.close()


class Narrator:
    """Tells a person at the terminal what the loop does, one line an event."""

    KINDS = {
        "event.received": lambda b: f"drift in {_day(b['window_start'])}: {some(b['drifted'])}",
        "decision": lambda b: f"{b['action']}: {b['reason']}",
        "run.started": lambda b: (
            f"pipeline run on data as of {_day(b['as_of'])}, {b['rows']:,} rows"
        ),
        "gate": lambda b: _gate_line(b),
        "promoted": lambda b: f"promoted {summary.version_name(b)}: {b.get('reason', '')}",
        "rolled_back": lambda b: f"rolled back {summary.version_name(b)}: {b['reason']}",
    }

    def __init__(self, console: Console, windows: int, name: str) -> None:
        self._console = console
        self._seen = 0
        self._progress = Progress(
            TextColumn(f"{name} {{task.description}}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} windows"),
            TimeElapsedColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=windows)

    def __enter__(self) -> "Narrator":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def window(self, replay: Replay) -> None:
        """One more window was sent."""
        day = f"{replay.results[-1].start:%Y-%m-%d}"
        self._progress.update(self._task, advance=1, description=day)
        self.events(replay)

    def events(self, replay: Replay) -> None:
        """Print what the ledger has gained since the last look."""
        entries = replay.entries()
        for entry in entries[self._seen :]:
            tell = self.KINDS.get(entry.kind)
            if tell:
                self._console.print(f"  {tell(entry.body)}", markup=False, highlight=False)
        self._seen = len(entries)


def _day(moment: str) -> str:
    return moment[:10]


def _gate_line(body: dict[str, Any]) -> str:
    record = body["record"]
    broken = [r["reason"] for r in record["results"] if not r["passed"]]
    short = record["candidate"].removeprefix("sha256:")[:8]
    return f"candidate {short} " + (
        f"refused: {'; '.join(broken)}" if broken else "passed its gates"
    )


def main(settings: Settings, text: str, *, source: str, until: str, as_json: bool) -> int:
    """Replay a project; write report and summary; exit 5 if the loop broke."""
    console = Console(stderr=as_json)
    started = time.monotonic()
    folder = folders.project_folder(settings, text)
    found = project.load(folder)
    ours = folders.replay_settings(settings)
    rows, since = _history(found, source, folder, until, settings.source_url)
    _announce(console, found, source)
    _start_afresh(ours, found.name)
    result = _drive(ours, folder, found, source, rows, since, console)
    result.update(source=source or _source_name(found), took_s=round(time.monotonic() - started, 1))
    page = _write(settings, result)
    if as_json:
        print(json.dumps(result, indent=2))
    _closing_lines(console, result, page)
    return LoopBroken.exit_code if result["problems"] else 0


def _announce(console: Console, found: project.Project, source: str) -> None:
    console.print(
        f"Replaying {found.name} from {source or _source_name(found)}: train on its past, serve the"
        " rest through Envoy and KServe servers,\nlet labels arrive when they would have, and let"
        " the loop retrain, judge and roll out. This takes about 3 to 6 minutes\nand up to 300 MB"
        " of disk; nothing leaves this machine.",
        markup=False,
        highlight=False,
    )


def _source_name(found: project.Project) -> str:
    return found.source.path or ("its query" if found.source.query else "the simulator")


def _history(
    found: project.Project, source: str, folder: Path, until: str, url: str
) -> tuple[pd.DataFrame, datetime]:
    """Rows to serve, sorted by time, and the moment up to which the first model may look."""
    raw = sources.read(found, source or None, folder, url=url)
    stop = _moment(until) if until else found.replay.until
    everything = served.examples(found, raw, datetime.min.replace(tzinfo=UTC), stop)
    since = _since(found, everything)
    rows = everything[everything["event_time"] >= since].reset_index(drop=True)
    if rows.empty:
        raise BadInput(
            f"{found.name} has no rows after {since:%Y-%m-%d}, where serving would begin;"
            " set replay.train_until or replay.train_share in its project.yaml"
        )
    end = everything["event_time"].max()
    if end > pd.Timestamp.now(tz="UTC"):
        raise BadInput(
            f"{found.name} has rows up to {end:%Y-%m-%d}, in the future; mend {_clock_key(found)}"
            " in its project.yaml, or the table"
        )
    unknown = rows["label_known_at"] > end
    return rows.assign(label=rows["label"].where(~unknown)), since


def _clock_key(found: project.Project) -> str:
    return "time.column" if found.time.column else "time.row_order"


def _moment(text: str) -> datetime:
    try:
        return project.parse_moment(text)
    except ValueError as exc:
        raise BadInput(f"--until is {text!r}, wanted {exc}") from exc


def _since(found: project.Project, everything: pd.DataFrame) -> datetime:
    if found.replay.train_until:
        return found.replay.train_until
    position = int(len(everything) * found.replay.train_share)
    moment = everything["event_time"].iloc[position].to_pydatetime()
    start = found.window_start(moment)
    return start if start == moment else found.window_end(start)


def _start_afresh(settings: Settings, name: str) -> None:
    state = settings.state(name)
    processes.end_stale(state.stack)
    shutil.rmtree(state.root, ignore_errors=True)


def _drive(
    settings: Settings,
    folder: Path,
    found: project.Project,
    source: str,
    rows: pd.DataFrame,
    since: datetime,
    console: Console,
) -> dict[str, Any]:
    windows = rows["event_time"].map(lambda t: found.window_start(t.to_pydatetime())).nunique()
    console.print(f"  training the first model on history before {since:%Y-%m-%d}")
    with stack.Stack(settings, folder, source=source, as_of=since) as running:
        replay = Replay(settings, folder, found, running)
        with Narrator(console, windows, found.name) as narrator:
            replay.run(rows, narrator)
        problems = running.problems()
    replay.close()
    return _summarise(found, replay, problems)


def _summarise(found: project.Project, replay: Replay, problems: list[str]) -> dict[str, Any]:
    entries = replay.entries()
    windows = replay.finished()
    ends = {e.body["window_end"] for e in entries if e.kind == "event.received"}
    result: dict[str, Any] = {
        "project": found.name,
        "from": windows[0].start.isoformat(),
        "until": windows[-1].end.isoformat(),
        "requests": replay.answers.requests,
        "failed_requests": replay.answers.failed,
        "windows": [summary.window_row(w, w.end.isoformat() in ends) for w in windows],
        "decisions": summary.decisions(entries),
        "runs": summary.runs(entries),
        "rollouts": summary.rollouts(entries),
        "pooled": summary.pooled(windows),
        "problems": [*replay.answers.problems, *problems, *_chain_faults(replay.ledger)],
        "why": ledger.why(entries, None),
    }
    served = [r["version"] for r in result["rollouts"] if r["phase"] in ("promoted", "first model")]
    result["served_last"] = served[-1] if served else None
    result["problems"] += [
        f"run {r['run']} {r['state']}: {r['reason']}"
        for r in result["runs"]
        if r["state"] != "succeeded"
    ]
    return {**result, "answer": summary.answer(result)}


def _chain_faults(book: ledger.Ledger) -> list[str]:
    try:
        book.verify()
    except LoopBroken as exc:
        return [str(exc)]
    return []


def _write(settings: Settings, result: dict[str, Any]) -> Path:
    folder = settings.home / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{result['project']}-{datetime.now():%Y%m%dT%H%M%S}"
    files.write_atomic(folder / f"{stem}.json", json.dumps(result, indent=2))
    page = folder / f"{stem}.html"
    files.write_atomic(page, loop_report.render(result))
    return page


def _closing_lines(console: Console, result: dict[str, Any], page: Path) -> None:
    def say(head: str, text: str) -> None:
        console.print(f"{head:<10}{text}", markup=False, highlight=False, soft_wrap=True)

    console.print()
    say("answer", result["answer"])
    for problem in result["problems"]:
        say("BROKEN", problem)
    say("drifted", _drifted_line(result))
    say("promoted", _named(result, "promoted") or "no candidate")
    say("refused", _refused_line(result))
    say("report", str(page))
    say("next", "perennial init YOUR_TABLE.csv   then: perennial replay its folder")


def _drifted_line(result: dict[str, Any]) -> str:
    events = [w for w in result["windows"] if w["event"]]
    if not events:
        return f"nothing in {len(result['windows'])} windows"
    names = list(dict.fromkeys(n for w in events for n in w["drifted"]))
    first = events[0]["start"][:10]
    return f"{some(names)}: {len(events)} windows, the first starts {first}"


def _named(result: dict[str, Any], phase: str) -> str:
    rows = [r for r in result["rollouts"] if r["phase"] == phase]
    return "; ".join(f"{r['version']}: {r['reason']}" for r in rows)


def _refused_line(result: dict[str, Any]) -> str:
    refused = [r for r in result["runs"] if r["passed"] is False]
    back = _named(result, "rolled back")
    lines = [f"{r['candidate']} on {r['as_of'][:10]}: {r['reason']}" for r in refused]
    return "; ".join([*lines, *([back] if back else [])]) or "nothing"
