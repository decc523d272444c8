"""Which Kubernetes Job runs the pipeline, and how does whoever waits for it learn its end?"""

import hashlib
import logging
import re
import secrets
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, cast

from lightkube import Client
from lightkube.models.batch_v1 import JobSpec
from lightkube.models.core_v1 import ContainerState
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.batch_v1 import Job
from lightkube.resources.core_v1 import Event, Pod
from lightkube.types import CascadeType

from perennial import kube
from perennial import project as projects
from perennial.errors import BadInput, RunFailed, Unavailable
from perennial.retrain.launchers import Notes, Progress, RunRequest, RunResult
from perennial.retrain.story import Story
from perennial.settings import PREFIX, Settings
from perennial.store.objects import Folder

log = logging.getLogger(__name__)

CONTAINER = "run"
RUN = "perennial.dev/run"
PROJECT = "perennial.dev/project"
RETRIES = 2
# Security of a container: it gains no power and changes nothing outside of its volumes.
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
KEPT_S = 24 * 3600  # how long a Job that ended stays for a person to look at
_POLL_S = 1.0
_SPARE_S = 300.0  # beyond the deadline, for the Job controller to end it

# Reasons of a container that waits; anything else is a container on its way.
_STUCK = {
    "ErrImagePull": "its image cannot be pulled",
    "ImagePullBackOff": "its image cannot be pulled",
    "InvalidImageName": "its image has no valid name",
    "CreateContainerConfigError": "its settings are not there",
    "CreateContainerError": "its container cannot be made",
    "RunContainerError": "its container cannot be started",
}


class JobLauncher:
    """Runs the spec inside one pod at a time of a Job, which goes on without this process."""

    outlives = True

    def __init__(self, settings: Settings, client: Client | None = None) -> None:
        self._settings = settings
        self._given = client
        self._stopped = threading.Event()

    def run(self, request: RunRequest, progress: Progress | None = None) -> RunResult:
        """Run once and wait; a request with a known key waits for the Job that there is.

        Raises RunFailed when the run failed, and Unavailable when it cannot start or cannot be
        followed now: the same key then finds it again.
        """
        self._stopped.clear()
        project = projects.load(request.project).name
        name = run_id(project, request.key)
        story = Story(self._settings, project, name)
        if ended := story.result():
            return ended
        self._create(manifest(self._settings, request, project, name))
        return _Watch(self._settings, self._client, name, story, progress).end(self._stopped)

    def submit(self, request: RunRequest) -> str:
        """Start a run, or find the one of the same key, without waiting; gives its id."""
        project = projects.load(request.project).name
        name = run_id(project, request.key)
        self._create(manifest(self._settings, request, project, name))
        return name

    def stop(self) -> None:
        """Wait no longer; the run goes on."""
        self._stopped.set()

    def is_over(self, project: str, run: str) -> bool:
        """Ended by its own word, or by what became of its Job, which is then written down."""
        if not re.fullmatch(rf"{re.escape(project)}-[0-9a-f]{{12}}", run):
            return False
        story = Story(self._settings, project, run)
        job, pods = kube.find(self._client, Job, run), _pods(self._client, run)
        over = _over(job, pods, self._settings)
        if not story.ended():
            if not over:
                return False
            story.fail(over)
        return True

    def terminate(self, project: str, run: str) -> None:
        """End a run by hand, and say so in the ledger."""
        _delete(self._client, run)
        Story(self._settings, project, run).fail("it was ended by hand")

    @property
    def _client(self) -> Client:
        if self._given is None:
            self._given = kube.connect(self._settings.namespace)
        return self._given

    def _create(self, job: Job) -> None:
        name = str(job.metadata and job.metadata.name)
        try:
            with kube.asking(f"creating Job {name}"):
                self._client.create(job)
            log.info("created job=%s", name)
        except kube.Conflict:
            there = kube.find(self._client, Job, name)
            if there and there.metadata and there.metadata.deletionTimestamp:
                raise
            log.info("found job=%s", name)


class _Watch:
    """One Job, looked at until its run has an end."""

    def __init__(
        self,
        settings: Settings,
        client: Client,
        run: str,
        story: Story,
        progress: Progress | None,
    ) -> None:
        self._settings = settings
        self._client = client
        self._run = run
        self._story = story
        self._progress = progress
        self._seen: dict[str, int] = {}  # lines of each pod's log that were read
        self._notes = Notes(progress)
        self._idle_since: float | None = None  # monotonic; since when no pod runs

    def end(self, stopped: threading.Event) -> RunResult:
        """Wait for the end. Raises as ``JobLauncher.run`` does."""
        last = time.monotonic() + self._settings.run_deadline_s + _SPARE_S
        while not stopped.wait(_POLL_S):
            if ended := self._look(impatient=time.monotonic() > last):
                return ended
        raise RunFailed(f"nobody waits any longer for {self._run}, which goes on")

    def _look(self, impatient: bool) -> RunResult | None:
        try:
            job, pods = kube.find(self._client, Job, self._run), _pods(self._client, self._run)
            if self._progress:
                self._read(pods)
        except (kube.Forbidden, BadInput):
            raise
        except Unavailable as exc:
            # The run goes on without us; its end stands in the ledger.
            if impatient:
                raise
            log.warning("cannot look at %s: %s", self._run, exc)
            return self._story.result()
        over = _over(job, pods, self._settings)
        if ended := self._story.result():
            return ended
        if over:
            raise self._story.fail(over)
        if job:
            self._refuse_when_stuck(pods)
        return None

    def _refuse_when_stuck(self, pods: Sequence[Pod]) -> None:
        """Give up a Job for which no pod starts, so that the next try begins anew."""
        newest = max(pods, key=_born, default=None)
        phase = newest and newest.status and newest.status.phase
        if phase == "Running":
            self._idle_since = None
            return
        # Counted from our own look: between two pods a Job waits a while on purpose.
        self._idle_since = self._idle_since or time.monotonic()
        idle_s = time.monotonic() - self._idle_since
        if idle_s < self._settings.run_start_s:
            return
        why = _stuck(newest) if newest and phase == "Pending" else self._no_pod()
        _delete(self._client, self._run)
        raise Unavailable(f"run {self._run} did not start within {idle_s:.0f} s: {why}")

    def _no_pod(self) -> str:
        with kube.asking(f"reading events of Job {self._run}"):
            found = self._client.list(Event, fields={"involvedObject.name": self._run})
            told = [e.message for e in found if e.type == "Warning" and e.message]
        return f"it got no pod: {told[-1]}" if told else "it got no pod, and nobody says why"

    def _read(self, pods: Sequence[Pod]) -> None:
        """Take notice of what the newest pod wrote since the last look."""
        newest = max(pods, key=_born, default=None)
        if newest is None or newest.status is None or newest.status.phase == "Pending":
            return
        name = str(newest.metadata and newest.metadata.name)
        with kube.asking(f"reading the log of pod {name}"):
            lines = list(self._client.log(name, container=CONTAINER))
        for line in lines[self._seen.get(name, 0) :]:
            self._notes.read(line)
        self._seen[name] = len(lines)


def _pods(client: Client, run: str) -> list[Pod]:
    with kube.asking(f"reading the pods of Job {run}"):
        return list(client.list(Pod, labels={RUN: run}))


def run_id(project: str, key: str) -> str:
    """Id of a run and name of its Job: the same for the same key, else a new one."""
    digest = hashlib.sha256(f"{project}/{key}".encode()).hexdigest() if key else secrets.token_hex()
    return f"{project}-{digest[:12]}"


def manifest(settings: Settings, request: RunRequest, project: str, run: str) -> Job:
    """The Job of a run."""
    labels = _labels(project, run)
    spec = {
        "backoffLimit": RETRIES,
        "activeDeadlineSeconds": settings.run_deadline_s,
        "ttlSecondsAfterFinished": KEPT_S,
        # Two pods at once would do the same step twice.
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": _FAILURES},
        "template": {
            "metadata": {"labels": labels},
            "spec": _pod(settings, request, project, run),
        },
    }
    told = {"perennial.dev/trigger": request.trigger}
    return Job(
        metadata=ObjectMeta(name=run, labels=labels, annotations=told),
        spec=cast(JobSpec, JobSpec.from_dict(spec)),
    )


# A pod that an evicting node ends counts for nothing; what a step itself said is final.
_FAILURES = [
    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    {
        "action": "FailJob",
        "onExitCodes": {
            "containerName": CONTAINER,
            "operator": "In",
            "values": [BadInput.exit_code, RunFailed.exit_code],
        },
    },
]


def _labels(project: str, run: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": "perennial",
        "app.kubernetes.io/component": "pipeline-run",
        "app.kubernetes.io/part-of": "perennial",
        PROJECT: project,
        RUN: run,
    }


def _pod(settings: Settings, request: RunRequest, project: str, run: str) -> dict[str, Any]:
    return {
        "serviceAccountName": "pipeline-run",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 30,
        "nodeSelector": _pairs(settings.run_node_selector),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "runAsGroup": 65532,
            "fsGroup": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(settings, request, project, run)],
        "volumes": [
            {"name": "work", "emptyDir": {"sizeLimit": "10Gi"}},
            {"name": "tmp", "emptyDir": {"sizeLimit": "2Gi"}},
            {"name": "projects", "configMap": {"name": "projects", "optional": True}},
        ],
    }


def _container(settings: Settings, request: RunRequest, project: str, run: str) -> dict[str, Any]:
    asked = {"cpu": settings.run_cpu, "memory": settings.run_memory}
    return {
        "name": CONTAINER,
        "image": settings.image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-m", "perennial.retrain.inpod"],
        "args": _arguments(request, project, run),
        "envFrom": [
            {"configMapRef": {"name": "settings"}},
            {"secretRef": {"name": "artifacts"}},
        ],
        "env": [
            _from_secret("STATE_URL", "state", "url"),
            _from_secret("TRACKING_URI", "state", "tracking-uri"),
            *(_from_secret(name, "data", key, optional=True) for key, name in _DATA.items()),
            {"name": f"{PREFIX}IMAGE", "value": settings.image},
        ],
        "resources": {"requests": asked, "limits": {**asked, "cpu": settings.run_cpu_limit}},
        # Where the program could not even begin, its last words are all there is.
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": RESTRICTED,
        "volumeMounts": [
            {"name": "work", "mountPath": "/home/perennial"},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "projects", "mountPath": "/opt/perennial/projects", "readOnly": True},
        ],
    }


def _arguments(request: RunRequest, project: str, run: str) -> list[str]:
    return [
        *("--run", run),
        *("--project", f"projects/{project}.yaml"),
        *("--source", request.source),
        *("--as-of", request.as_of.isoformat() if request.as_of else ""),
        *("--trigger", request.trigger),
        *("--trials", str(request.trials)),
        *("--seed", str(request.seed)),
    ]


# Where rows come from and features go, by the keys of an optional secret.
_DATA = {
    "source-url": "SOURCE_URL",
    "features-online": "FEATURES_ONLINE",
    "features-registry": "FEATURES_REGISTRY",
    "features-offline": "FEATURES_OFFLINE",
}


def _from_secret(setting: str, secret: str, key: str, optional: bool = False) -> dict[str, Any]:
    ref: dict[str, Any] = {"name": secret, "key": key}
    if optional:
        ref["optional"] = True
    return {"name": f"{PREFIX}{setting}", "valueFrom": {"secretKeyRef": ref}}


def _pairs(text: str) -> dict[str, str]:
    """``pool=batch,disk=ssd`` as a mapping."""
    return dict(pair.split("=", 1) for pair in text.split(",") if pair)


def _over(job: Job | None, pods: Sequence[Pod], settings: Settings) -> str:
    """Why nothing more comes from a Job; empty while something may."""
    if job is None:
        return "its Job was deleted"
    conditions = (job.status and job.status.conditions) or []
    ended = {c.type: c.reason or "" for c in conditions if c.status == "True"}
    if "Complete" in ended:
        return "its Job completed, but the ledger has no word about its end"
    if "Failed" not in ended:
        return ""
    if ended["Failed"] == "DeadlineExceeded":
        return f"it was ended after {settings.run_deadline_s} s, the deadline of a run"
    said = [words for pod in sorted(pods, key=_born) if (words := _last_words(pod))]
    died = f"its pod died {len(said)} times, the last time" if len(said) > 1 else "its pod died"
    return f"{died}: {said[-1]}" if said else f"its Job failed: {ended['Failed']}"


def _last_words(pod: Pod) -> str:
    ended = _state(pod).terminated
    if ended is None:
        return ""
    told = (ended.message or "").strip().splitlines()
    cause = ended.reason or "Error"
    shown = cause if cause != "Error" else f"exit code {ended.exitCode}"
    return f"{shown} ({told[-1].removeprefix('error: ')})" if told else shown


def _stuck(pod: Pod) -> str:
    """Why a pending pod does not start."""
    waiting = _state(pod).waiting
    if waiting and waiting.reason in _STUCK:
        return f"{_STUCK[waiting.reason]}: {waiting.message or waiting.reason}"
    for condition in (pod.status and pod.status.conditions) or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return f"no node takes its pod: {condition.message or condition.reason}"
    return f"its pod is pending: {(waiting and waiting.reason) or 'nobody says why'}"


def _state(pod: Pod) -> ContainerState:
    statuses = (pod.status and pod.status.containerStatuses) or []
    return (statuses and statuses[0].state) or ContainerState()


def _born(pod: Pod) -> datetime:
    found = pod.metadata and pod.metadata.creationTimestamp
    return found or datetime.now(UTC)


def log_of(settings: Settings, project: str, run: str) -> str:
    """What the pods of a run wrote, as far as they ended; kept longer than they."""
    kept = Folder(settings.state(project).artifacts("runs")) / run
    names = [name for name in kept.names() if "/logs/" in name]
    return "".join(kept.read(name).decode(errors="replace") for name in names)


def _delete(client: Client, run: str) -> None:
    """Delete a Job with its pods; without saying so the API server would leave them."""
    try:
        with kube.asking(f"deleting Job {run}"):
            client.delete(Job, run, cascade=CascadeType.BACKGROUND)
    except kube.Missing:
        return
