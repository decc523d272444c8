"""What does an answer of a KFP backend mean?"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SUCCEEDED, FAILED = "SUCCEEDED", "FAILED"
ENDED = (SUCCEEDED, FAILED, "CANCELED", "SKIPPED")
# Nodes of the engine that are no step of ours: drivers, graphs, conditions, exit hooks.
_INNER = re.compile(
    r"root|.*-driver|executor.*|exit-handler-\d+|exit-hook-.*|condition-.*|.*\.onExit"
)
_NEVER = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Task:
    """One node of a run's graph, as the backend shows it."""

    name: str
    state: str
    children: tuple[str, ...]  # node ids, by which a log is found
    begun_at: datetime | None
    seconds: float | None


@dataclass(frozen=True)
class Run:
    """One run; the backend keeps no word on why it failed."""

    id: str
    name: str
    state: str
    states: tuple[str, ...]  # all that it went through
    parameters: dict[str, Any]
    created_at: datetime
    finished_at: datetime | None
    tasks: tuple[Task, ...]

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def end(self) -> str:
        """Which end of the run this is: one that was resumed has another later."""
        return f"{self.id} {len(self.states)} {self.finished_at}"

    @property
    def terminated(self) -> bool:
        return "CANCELING" in self.states

    @property
    def project(self) -> str:
        """The project's name, by the place that its file has on a cluster."""
        return Path(str(self.parameters.get("project", ""))).stem

    @property
    def steps(self) -> tuple[Task, ...]:
        """The steps that a person knows, in the order in which they began."""
        graphs = {child.rsplit("-", 1)[0] for task in self.tasks for child in task.children}
        known = [t for t in self.tasks if not _INNER.fullmatch(t.name) and t.name not in graphs]
        return tuple(sorted(known, key=lambda task: task.begun_at or _NEVER))

    @property
    def failed(self) -> tuple[Task, ...]:
        return tuple(task for task in self.steps if task.state == FAILED)


@dataclass(frozen=True)
class Wanted:
    """What a recurring run should be."""

    name: str
    cron: str
    pipeline: str
    version: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Recurring:
    """A recurring run as it is."""

    id: str
    name: str
    enabled: bool
    cron: str
    pipeline: str
    version: str
    parameters: dict[str, Any]
    alone: bool  # one run at a time, and missed ones are not made up for
    service_account: str

    def is_as(self, wanted: Wanted, service_account: str) -> bool:
        """Is there nothing to change?"""
        has = (self.name, self.cron, self.pipeline, self.version, self.parameters)
        wants = (wanted.name, wanted.cron, wanted.pipeline, wanted.version, wanted.parameters)
        good = self.enabled and self.alone and self.service_account == service_account
        return good and has == wants


@dataclass(frozen=True)
class Uploaded:
    """A version of a pipeline that the backend has."""

    pipeline: str
    version: str
    name: str
    new: bool


def run(raw: Any) -> Run:
    """A run out of kfp's own model of it."""
    details = raw.run_details.task_details if raw.run_details else None
    return Run(
        id=raw.run_id,
        name=raw.display_name or "",
        state=raw.state or "",
        states=tuple(s.state for s in raw.state_history or []),
        parameters=(raw.runtime_config.parameters or {}) if raw.runtime_config else {},
        created_at=raw.created_at,
        finished_at=_moment(raw.finished_at),
        tasks=tuple(_task(t) for t in details or []),
    )


def _moment(at: datetime | None) -> datetime | None:
    """A time that the backend knows; 1970 stands for none."""
    return at if at and at.year > 1970 else None


def _task(raw: Any) -> Task:
    begun, over = _moment(raw.start_time), _moment(raw.end_time)
    return Task(
        name=raw.display_name or "",
        state=raw.state or "",
        children=tuple(c.pod_name for c in raw.child_tasks or [] if c.pod_name),
        begun_at=begun,
        seconds=(over - begun).total_seconds() if begun and over else None,
    )


def recurring(raw: Any) -> Recurring:
    """A recurring run out of kfp's own model of it."""
    reference = raw.pipeline_version_reference
    cron = raw.trigger.cron_schedule if raw.trigger else None
    return Recurring(
        id=raw.recurring_run_id,
        name=raw.display_name or "",
        enabled=raw.status == "ENABLED",
        cron=(cron.cron or "") if cron else "",
        pipeline=(reference.pipeline_id or "") if reference else "",
        version=(reference.pipeline_version_id or "") if reference else "",
        parameters=(raw.runtime_config.parameters or {}) if raw.runtime_config else {},
        alone=str(raw.max_concurrency) == "1" and bool(raw.no_catchup),
        service_account=raw.service_account or "",
    )
