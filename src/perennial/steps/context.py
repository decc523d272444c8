"""What does every step need before it starts: settings, project, state, ledger, run and time?"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import Engine

from perennial import project as projects
from perennial.errors import BadInput, RunFailed
from perennial.ledger import Ledger
from perennial.project import Project
from perennial.settings import Settings, StateFolder
from perennial.store import files, lease
from perennial.store.engine import make_engine

LOST = "lost"  # end of a run that nobody saw end; its trigger may have another
FAILED = "step.failed"  # ledger kind: {run, step, reason}; the exit handler tells it again
LOCK = Path("locks") / "core.txt"
BEYOND = 1.5  # times the limit of a step, for pods to come up: then a run counts as gone
CODE = ("src", "components", "pipelines", "feature_repo")


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


@contextmanager
def opened(step: str, project: str, run: str, trigger: str = "") -> Iterator[Context]:
    """Open what a step needs; an error inside is written to the ledger under the step's name.

    The first step gives its ``trigger`` and so takes the lease of runs, unless who started the
    run holds it already. Raises RunFailed while another run goes on.
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
        ctx = Context(settings, found, folder, state, engine, ledger, run, now)
        _hold(ctx, trigger)
        yield ctx
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


def _hold(ctx: Context, trigger: str) -> None:
    """Take the lease in the first step, keep it in the later ones."""
    name, moment = lease_of_runs(ctx.project.name), ctx.now.timestamp()
    held = lease.holder(ctx.engine, name, moment)
    # Whoever started this run may hold the lease for it, under the name of the trigger; should
    # that one fall silent, the next step takes it over.
    if held in (None, ctx.run):
        ttl_s = BEYOND * ctx.settings.step_timeout_s
        held = lease.hold(ctx.engine, name, ctx.run, ttl_s, moment)
    if trigger and held == trigger:
        # A copy of a run has the same trigger, and so would pass for the one that goes on.
        told = ends(ctx.ledger, ctx.project.name, ctx.run, trigger)
        held = next((other for other, end in told.items() if end is None), held)
    if trigger and held not in (trigger, ctx.run):
        raise RunFailed(
            f"another run of {ctx.project.name} goes on ({held}); start this one when it ended"
        )


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


def pins(digest: str, run: str, *parents: str, **more: str) -> dict[str, Any]:
    """Metadata that makes an artifact part of a lineage."""
    return {"digest": digest, "run": run, "parents": list(parents), **more}


def lock_digest(settings: Settings) -> str:
    """Digest of the dependency lock; empty where the code was installed without one."""
    lock = settings.root / LOCK
    return files.digest_file(lock) if lock.is_file() else ""


def code_state(settings: Settings) -> tuple[str, bool]:
    """Commit of the code, and whether files differ from it; the setting wins over the checkout."""
    if settings.code_commit:
        return settings.code_commit, False
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
