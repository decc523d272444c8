"""What happened, in which order, and why: each entry seals the one before it."""

import json
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, RowMapping, insert, select, update

from perennial import signing
from perennial.errors import BadInput, LoopBroken
from perennial.store import fence, files
from perennial.store.engine import reading
from perennial.store.tables import ledger, ledger_head

_FIRST = "sha256:" + "0" * 64
_WIDTH = 100
_LABEL = 12
_TAIL = 5
_BY_HAND = "by hand"
# What befell the servers of a version; such an entry names the version, not its digest.
_SERVING = {"serving.edited": "edited", "serving.restored": "restored"}


@dataclass(frozen=True)
class Entry:
    """One line of the ledger; ``at`` is wall time, ``event_time`` the time of the data."""

    seq: int
    at: datetime
    event_time: datetime | None
    kind: str
    project: str
    subject: str
    body: dict[str, Any]
    previous: str
    digest: str


def alone(_connection: Connection) -> None:
    """Nothing is written beside an entry."""


class Ledger:
    """The ledger of one database; any number of processes may append to it."""

    def __init__(self, engine: Engine, guard: fence.Guard = fence.free) -> None:
        """``guard`` refuses every entry of a writer that lost its lease."""
        self._engine = engine
        self._guard = guard

    def append(
        self,
        kind: str,
        *,
        project: str,
        subject: str,
        body: dict[str, Any],
        now: datetime,
        event_time: datetime | None = None,
        along: Callable[[Connection], None] = alone,
    ) -> Entry:
        """Add an entry; it is on the disk when this returns. Raises what the guard raises.

        ``along`` writes in the same transaction: what it says and the entry stand there together.
        """
        values = {
            "at": now.isoformat(),
            "event_time": event_time.isoformat() if event_time else None,
            "kind": kind,
            "project": project,
            "subject": subject,
            "body": signing.canonical(body).decode(),
        }
        with self._engine.begin() as connection:
            self._guard(connection)
            along(connection)
            seq, previous = _head(connection)
            row = {"seq": seq + 1, **values, "previous": previous}
            row["digest"] = _seal(row)
            connection.execute(insert(ledger).values(row))
            _move_head(connection, seq + 1, str(row["digest"]))
        return _entry(row)

    def entries(
        self, project: str, kind: str | None = None, subject: str | None = None
    ) -> list[Entry]:
        """Entries of a project, oldest first; of one kind and about one subject, if given."""
        query = select(ledger).where(ledger.c.project == project).order_by(ledger.c.seq)
        if kind is not None:
            query = query.where(ledger.c.kind == kind)
        if subject is not None:
            query = query.where(ledger.c.subject == subject)
        with reading(self._engine) as connection:
            return [_entry(row) for row in connection.execute(query).mappings()]

    def verify(self) -> None:
        """Check every seal. Raises LoopBroken that names the first entry that does not hold."""
        seq, previous = 0, _FIRST
        with reading(self._engine) as connection:
            for row in connection.execute(select(ledger).order_by(ledger.c.seq)).mappings():
                fault = _fault(row, seq + 1, previous)
                if fault:
                    raise LoopBroken(f"the ledger is broken at entry {seq + 1}: {fault}")
                seq, previous = row["seq"], row["digest"]
            if _head(connection) != (seq, previous):
                raise LoopBroken(f"the ledger is broken at entry {seq + 1}: entries are missing")


def _seal(row: RowMapping | dict[str, Any]) -> str:
    """Digest of an entry and of the digest before it."""
    fields = {key: value for key, value in row.items() if key != "digest"}
    return files.digest_bytes(signing.canonical(fields))


def _fault(row: RowMapping, seq: int, previous: str) -> str | None:
    if row["seq"] != seq:
        return f"entry {row['seq']} stands in its place"
    if row["previous"] != previous:
        return "it does not follow the entry before it"
    if row["digest"] != _seal(row):
        return "its content was changed"
    return None


def _head(connection: Connection) -> tuple[int, str]:
    row = connection.execute(select(ledger_head.c.seq, ledger_head.c.digest)).one_or_none()
    return (row[0], row[1]) if row else (0, _FIRST)


def _move_head(connection: Connection, seq: int, digest: str) -> None:
    if seq == 1:
        connection.execute(insert(ledger_head).values(id=1, seq=seq, digest=digest))
    else:
        connection.execute(update(ledger_head).values(seq=seq, digest=digest))


def _entry(row: RowMapping | dict[str, Any]) -> Entry:
    moment = row["event_time"]
    return Entry(
        seq=row["seq"],
        at=datetime.fromisoformat(row["at"]),
        event_time=datetime.fromisoformat(moment) if moment else None,
        kind=row["kind"],
        project=row["project"],
        subject=row["subject"],
        body=json.loads(row["body"]),
        previous=row["previous"],
        digest=row["digest"],
    )


def why(entries: Sequence[Entry], version: str | None = None, verbose: bool = False) -> list[str]:
    """Tell how a model came to serve, or why it was refused, in lines for a terminal.

    ``version`` is ``v2``, a digest or its beginning; None means the model that serves now.
    Raises BadInput when the ledger knows no such model.
    """
    current, since = _serving(entries)
    digest = current if version is None else _named_digest(entries, version)
    if digest is None:
        return ["No model serves yet.", *_tail(entries, 0)]
    story = _Story(entries, digest, verbose)
    if digest != current:
        return [_headline(story, None), "", *story.lines()]
    return [_headline(story, since), "", *story.lines(), *_tail(entries, story.gate_seq)]


class _Story:
    """Everything the ledger knows about one model digest."""

    def __init__(self, entries: Sequence[Entry], digest: str, verbose: bool) -> None:
        self.digest = digest
        self.verbose = verbose
        self._entries = entries
        self.registered = self._first("registered", "digest", digest)
        gates = [e for e in entries if e.kind == "gate" and _candidate(e) == digest]
        run = self.registered.body["run"] if self.registered else None
        of_run = [e for e in gates if e.body["run"] == run]
        chosen = of_run or gates
        self._gate = chosen[-1] if chosen else None
        self._run = run or (self._gate.body["run"] if self._gate else None)

    @property
    def name(self) -> str:
        if self.registered is None:
            return f"The candidate {_short(self.digest)}"
        return _version_name(self.registered)

    @property
    def gate_seq(self) -> int:
        return self._gate.seq if self._gate else 0

    def lines(self) -> list[str]:
        """The way from the event to the traffic, one aligned row a fact."""
        rows = [*self._cause(), *self._pins(), *self._judged(), *self._traffic()]
        return [line for label, text in rows for line in _row(label, text)]

    def _cause(self) -> Iterator[tuple[str, str]]:
        started = self._first("run.started", "run", self._run)
        trigger = str(started.body["trigger"]) if started else _BY_HAND
        event = self._first("event.received", "id", trigger)
        decision = self._last("decision", "event_id", trigger)
        if event is None and decision is None:
            plain = trigger.startswith(_BY_HAND) and not self.verbose
            yield "started", _BY_HAND if plain else trigger
        if event:
            window = f"{_when(event.body['window_start'])} to {_when(event.body['window_end'])}"
            yield "event", f"window {window} drifted in {_listed(event.body['drifted'])}"
        if event and self.verbose:
            yield "", f"event {trigger} from {event.body['source']}"
        if decision:
            confirmed = _listed(decision.body["confirmed"])
            yield "decision", f"{decision.body['action']}: {decision.body['reason']}"
            yield "", f"confirmed from the served rows: {confirmed}"

    def _pins(self) -> Iterator[tuple[str, str]]:
        started = self._first("run.started", "run", self._run)
        lineage = self._gate.body["lineage"] if self._gate else {}
        facts = {**(started.body if started else {}), **lineage}
        if not facts:
            yield "run", "not in the ledger"
            return
        yield "run", self._run_line(facts)
        rows = f", {facts['rows']:,} rows" if facts.get("rows") else ""
        source = f" from {facts['source']}" if facts.get("source") else ""
        yield "data", f"{self._cut(facts['data_digest'])}{rows}{source}"
        if not lineage:
            return
        changed = ", with changes that no commit holds" if lineage["code_dirty"] else ""
        yield "code", f"commit {self._cut(lineage['code_commit']) or 'unknown'}{changed}"
        yield "parameters", _pairs(lineage["parameters"])
        yield "lock", self._cut(lineage["lock_digest"])
        yield "seed", str(lineage["seed"])

    def _run_line(self, facts: dict[str, Any]) -> str:
        ended = self._last("run.finished", "run", self._run)
        state = f", {ended.body['state']}" if ended else ""
        run = f" ({self._run})" if self.verbose else ""
        return f"with data up to {_when(facts['as_of'])}{state}{run}"

    def _judged(self) -> Iterator[tuple[str, str]]:
        if self._gate is None:
            return
        record = self._gate.body["record"]
        champion = _short(record["champion"]) if record["champion"] else "no champion"
        window = f"{_when(record['window_start'])} to {_when(record['window_end'])}"
        verdict = "passed" if _passed(self._gate) else "refused"
        yield "gate", f"{verdict} on the rows of {window}, against {champion}"
        for result in record["results"]:
            yield "", f"{'kept  ' if result['passed'] else 'BROKEN'} {_result(result)}"

    def _traffic(self) -> Iterator[tuple[str, str]]:
        if self.registered:
            yield "registered", f"as {self.name}"
        ends = {"served": "first", "promoted": "promoted", "rolled_back": "rolled back"}
        for entry in self._entries:
            if entry.kind in _SERVING and self._is_about(entry):
                yield _SERVING[entry.kind], f"{_day(entry)}: {_found(entry.body)}"
            if entry.body.get("digest") != self.digest:
                continue
            if entry.kind == "rollout.step":
                yield "rollout", _step(entry.body)
            if entry.kind in ends:
                reason = entry.body.get("reason") or "took all traffic"
                yield ends[entry.kind], f"{_day(entry)}: {reason}"

    def _is_about(self, entry: Entry) -> bool:
        """Is an entry that names no digest about this version?"""
        return self.registered is not None and _label(entry) == _label(self.registered)

    def _cut(self, digest: str) -> str:
        head, _, text = digest.rpartition(":")
        return digest if self.verbose else f"{head}:{text[:12]}".lstrip(":")

    def _first(self, kind: str, key: str, value: object) -> Entry | None:
        found = (e for e in self._entries if e.kind == kind and e.body.get(key) == value)
        return next(found, None)

    def _last(self, kind: str, key: str, value: object) -> Entry | None:
        found = [e for e in self._entries if e.kind == kind and e.body.get(key) == value]
        return found[-1] if found else None


def _headline(story: _Story, since: Entry | None) -> str:
    if since:
        return f"{story.name} serves {since.project} since {_day(since)}."
    if story.registered:
        return f"{story.name} does not serve now."
    return f"{story.name} was refused by the gate."


def _serving(entries: Sequence[Entry]) -> tuple[str | None, Entry | None]:
    """Digest that serves after all these entries, and the entry that brought it there."""
    order: list[str] = []
    since = None
    for entry in entries:
        digest = entry.body.get("digest", "")
        top = order[-1] if order else None
        if entry.kind in ("served", "promoted") and digest != top:
            order.append(digest)
            since = entry
        # A canary that is rolled back never was on top; only taking back a promotion uncovers.
        if entry.kind == "rolled_back" and digest == top and len(order) > 1:
            order.pop()
            since = entry
    return (order[-1] if order else None), since


def _named_digest(entries: Sequence[Entry], version: str) -> str:
    registered = {_label(e): str(e.body["digest"]) for e in entries if e.kind == "registered"}
    if version in registered:
        return registered[version]
    candidates = {_candidate(e) for e in entries if e.kind == "gate"}
    wanted = version.removeprefix("sha256:")
    found = {
        d
        for d in candidates | set(registered.values())
        if d.removeprefix("sha256:").startswith(wanted)
    }
    if wanted and len(found) == 1:
        return found.pop()
    known = ", ".join(registered) or "none yet"
    seen = "fits several models" if wanted and found else "is not in the ledger"
    raise BadInput(f"model {version!r} {seen}; wanted a version ({known}) or a candidate's digest")


def _tail(entries: Sequence[Entry], after: int) -> list[str]:
    """What was tried since and did not come to serve."""
    refused = [e for e in entries if e.seq > after and e.kind == "gate" and not _passed(e)]
    if not refused:
        return []
    shown = [line for entry in refused[-_TAIL:] for line in _refusal(entry)]
    more = len(refused) - _TAIL
    earlier = [f"  and {more} earlier"] if more > 0 else []
    return ["", "Refused since:" if after else "Refused:", *shown, *earlier]


def _refusal(entry: Entry) -> list[str]:
    record = entry.body["record"]
    broken = "; ".join(r["reason"] for r in record["results"] if not r["passed"])
    text = f"{_short(record['candidate'])}, data up to {_when(record['as_of'])}: {broken}"
    return _lines(text, "  ", "    ")


def _row(label: str, text: str) -> list[str]:
    first = f"  {label:<{_LABEL}}"
    return _lines(text, first, " " * (_LABEL + 2)) or [first]


def _lines(text: str, first: str, further: str) -> list[str]:
    """Wrapped between words; a name such as ``retail-predictor-00002`` stays whole."""
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=further, break_on_hyphens=False
    )


def _result(result: dict[str, Any]) -> str:
    return f"{result['name']}: {result['reason']}"


def _step(body: dict[str, Any]) -> str:
    requests = body.get("canary_requests")
    on = f" on {body['revision']}" if body.get("revision") else ""
    seen = f" ({requests:,} canary requests{on})" if requests is not None else ""
    return f"{body['weight']:>3} %  {body['verdict']}: {body['reason']}{seen}"


def _found(body: dict[str, Any]) -> str:
    """What was found where a version serves."""
    if "edits" not in body:
        return str(body["reason"])
    return "; ".join(body["edits"]) or "nothing is edited any more"


def _passed(gate: Entry) -> bool:
    results = gate.body["record"]["results"]
    return bool(results) and all(r["passed"] for r in results)


def _candidate(gate: Entry) -> str:
    return str(gate.body["record"]["candidate"])


def _label(entry: Entry) -> str:
    return "v" + str(entry.body["version"]).removeprefix("v")


def _version_name(entry: Entry) -> str:
    return f"{_label(entry)} ({_short(entry.body['digest'])})"


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:8]


def _day(entry: Entry) -> str:
    return _when((entry.event_time or entry.at).isoformat(timespec="minutes"))


def _when(moment: str) -> str:
    text = datetime.fromisoformat(moment).strftime("%Y-%m-%d %H:%M")
    return text.removesuffix(" 00:00")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing"


def _pairs(parameters: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_number(value)}" for key, value in sorted(parameters.items()))


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
