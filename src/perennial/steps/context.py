"""What does every step need before it starts: settings, project, state, ledger, run and time?"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import Engine

from perennial import project as projects
from perennial.errors import BadInput, RunFailed
from perennial.ledger import Ledger
from perennial.project import Project
from perennial.settings import Settings, StateFolder
from perennial.store import fence, files, lease
from perennial.store.engine import make_engine

LOST = "lost"  # end of a run that nobody saw end; its trigger may have another
FAILED = "step.failed"  # ledger kind: {run, step, reason}; the exit handler tells it again
LOCK = Path("locks") / "core.txt"
BEYOND = 1.5  # times the limit of a step, for pods to come up: then a run counts as gone
CODE = ("src", "components", "pipelines", "feature_repo")
DIRTY = "-dirty"  # what 'git describe --dirty' puts behind a commit that files differ from


class Artifact(Protocol):
    """What the steps use of an artifact of KFP."""

    @property
    def path(self) -> str: ...


@dataclass(frozen=True)
class Context:
    """One opened step of one run."""

    settings: Settings
    project: Project
    folder: Path
    state: StateFolder
    engine: Engine
    ledger: Ledger
    run: str
    now: datetime
    # Refuses what only the run may write that holds the lease; the ledger has it already.
    guard: fence.Guard = fence.free


@contextmanager
def opened(step: str, project: str, run: str, trigger: str = "") -> Iterator[Context]:
    """Open what a step needs; an error inside is written to the ledger under the step's name.

    The first step gives its ``trigger`` and so takes the lease of runs, unless who started the
    run holds it already. Raises RunFailed while another run goes on. A step whose run lost the
    lease to another writes nothing but its own failure.
    """
    settings = Settings.load()
    where = find(settings, project)
    found = projects.load(where)
    folder = where if where.is_dir() else where.parent
    state = settings.state(found.name)
    engine = make_engine(state.url)
    ledger = Ledger(engine)
    now = datetime.now(UTC)
    try:
        ttl_s = BEYOND * settings.step_timeout_s
        number = _hold(_Work(engine, ledger, found.name, run, now, ttl_s), trigger)
        guard = partial(fence.check_run, name=lease_of_runs(found.name), number=number)
        mine = Ledger(engine, guard)
        yield Context(settings, found, folder, state, engine, mine, run, now, guard)
    except Exception as exc:
        body = {"run": run, "step": step, "reason": reason(exc)}
        ledger.append(FAILED, project=found.name, subject=run, body=body, now=now)
        raise
    finally:
        engine.dispose()


def lease_of_runs(project: str) -> str:
    """Name of the lease that lets one run of a project go on at a time."""
    return f"run:{project}"


def ends(ledger: Ledger, project: str, run: str, trigger: str) -> dict[str, str | None]:
    """How the other runs of a trigger ended, None while they go on."""
    started = [e for e in ledger.entries(project, "run.started") if e.subject != run]
    mine = [e.subject for e in started if trigger and e.body["trigger"] == trigger]
    found: dict[str, str | None] = {}
    for other in mine:
        told = ledger.entries(project, "run.finished", other)
        found[other] = str(told[-1].body["state"]) if told else None
    return found


def _hold(work: "_Work", trigger: str) -> int | None:
    """Take the lease in the first step, keep it in the later ones; gives its number.

    None, when it is another's. Whoever started this run may hold the lease for it, under the
    name of the trigger; should that one fall silent, the next step takes it over.
    """
    cause, told = trigger or work.cause(), work.ends()
    if told and told[-1] == LOST:
        raise RunFailed(f"run {work.run} was given up as lost, and its trigger may have another")
    held = work.hold(cause)
    holder = held.holder
    if trigger and holder == trigger:
        # A copy of a run has the same trigger, and so would pass for the one that goes on.
        others = ends(work.ledger, work.project, work.run, trigger)
        holder = next((other for other, end in others.items() if end is None), holder)
    if trigger and holder not in (trigger, work.run):
        raise RunFailed(
            f"another run of {work.project} goes on ({holder}); start this one when it ended"
        )
    return held.number if holder in (cause, work.run) else None


@dataclass(frozen=True)
class _Work:
    """One run and its lease, before a step of it is opened."""

    engine: Engine
    ledger: Ledger
    project: str
    run: str
    now: datetime
    ttl_s: float

    def cause(self) -> str:
        """What started the run, as its first step wrote; empty before that."""
        started = self.ledger.entries(self.project, "run.started", self.run)
        return str(started[-1].body["trigger"]) if started else ""

    def ends(self) -> list[str]:
        """How the run ended: not at all, once, or again after it was resumed."""
        told = self.ledger.entries(self.project, "run.finished", self.run)
        return [str(entry.body["state"]) for entry in told]

    def hold(self, cause: str) -> lease.Held:
        name, moment = lease_of_runs(self.project), self.now.timestamp()
        return lease.hold(self.engine, name, self.run, self.ttl_s, moment, after=cause)


def find(settings: Settings, project: str) -> Path:
    """The project that ``project`` names, here or below the root: a folder or a YAML file."""
    for base in (Path.cwd(), settings.root):
        candidate = (base / project).resolve()
        folder = candidate.parent if candidate.name == "project.yaml" else candidate
        if (folder / "project.yaml").is_file():
            return folder
        if candidate.suffix == ".yaml" and candidate.is_file():
            return candidate
    raise BadInput(f"no project.yaml in {project!r}, here or below {settings.root}")


def moment(text: str) -> datetime | None:
    """A pipeline's ``as_of``: a moment, or None where the text is empty."""
    try:
        return projects.parse_moment(text) if text else None
    except ValueError as exc:
        raise BadInput(f"as_of is {text!r}, wanted {exc}") from exc


def known_moment(text: str) -> datetime:
    """The ``as_of`` that an earlier step left in an artifact's metadata."""
    found = moment(text)
    if found is None:
        raise BadInput("as_of is empty, wanted the moment that the snapshot was taken for")
    return found


def path(artifact: "Artifact") -> Path:
    """Where an artifact of KFP lies while the step runs."""
    return Path(artifact.path)


def digest(artifact: Artifact) -> str:
    """Digest of an artifact that is one file."""
    return files.digest_file(path(artifact))


def reason(exc: BaseException) -> str:
    """An error in one line."""
    return " ".join(str(exc).split()) or type(exc).__name__


def pins(digest: str, run: str, *parents: str, **more: str | int) -> dict[str, Any]:
    """Metadata that makes an artifact part of a lineage."""
    return {"digest": digest, "run": run, "parents": list(parents), **more}


def lock_digest(settings: Settings) -> str:
    """Digest of the dependency lock; empty where the code was installed without one."""
    lock = settings.root / LOCK
    return files.digest_file(lock) if lock.is_file() else ""


def code_state(settings: Settings) -> tuple[str, bool]:
    """Commit of the code, and whether files differ from it; the setting wins over the checkout."""
    if settings.code_commit:
        commit = settings.code_commit
        return commit.removesuffix(DIRTY), commit.endswith(DIRTY)
    commit = _git(settings.root, "rev-parse", "HEAD")
    return commit, bool(commit) and bool(_git(settings.root, "status", "--porcelain", "--", *CODE))


def _git(root: Path, *args: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
