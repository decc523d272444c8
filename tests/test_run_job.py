"""A run in the pod of a Job goes on where the pod before it ended; who waits learns how it ends."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import yaml
from launchers import LONG, REASON, WELL, WRONG, OutlivingContract, eventually
from lightkube.models.meta_v1 import Status
from lightkube.resources.batch_v1 import Job
from lightkube.resources.core_v1 import Event, Pod

from perennial import kube
from perennial.errors import RunFailed, Unavailable
from perennial.ledger import Ledger
from perennial.retrain import inpod, job
from perennial.retrain.launchers import RunRequest
from perennial.retrain.story import Story
from perennial.settings import Settings
from perennial.store.engine import make_engine
from perennial.store.objects import Folder

ROOT = Path(__file__).resolve().parents[1]
RUN = "tiny-1234"

# Three steps with the real exit handler. Each counts how often it was done; the second does what
# the source says, unless a file tells it that the trouble is over.
FAKE = '''
from kfp import compiler, dsl
from components.notify import notify

@dsl.component(base_image="python", install_kfp_package=False)
def first(project: str, trigger: str, run: str, made: dsl.Output[dsl.Dataset]) -> str:
    """Make a folder."""
    import pathlib
    from perennial.steps import context
    with context.opened("first", project, run, trigger) as ctx:
        print("done first", file=(ctx.folder.parent / "done").open("a"))
        ctx.ledger.append("run.started", project=ctx.project.name, subject=run,
                          body=dict(run=run, trigger=trigger), now=ctx.now)
    folder = pathlib.Path(made.path)
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "rows").write_text("1 2 3")
    made.metadata.update(share=0.1, rows=3)
    return "0.1"

@dsl.component(base_image="python", install_kfp_package=False)
def second(project: str, source: str, run: str, made: dsl.Input[dsl.Dataset]) -> float:
    """Do what the source says."""
    import os, pathlib, time
    from perennial import errors
    from perennial.steps import context
    with context.opened("second", project, run) as ctx:
        print("done second", file=(ctx.folder.parent / "done").open("a"))
        rows = pathlib.Path(made.path) / "inner" / "rows"
        (ctx.folder.parent / "rows").write_text(rows.read_text())
        if (ctx.folder.parent / "over").exists():
            return made.metadata["share"]
        if source == "sleep":
            time.sleep(120)
        if source == "away":
            raise errors.Unavailable("the store cannot be reached now")
        if source == "wrong":
            raise ValueError("row 17: churned is 2, expected 0 or 1")
        if source == "crash":
            os.kill(os.getpid(), 9)
    return made.metadata["share"]

@dsl.component(base_image="python", install_kfp_package=False)
def third(project: str, share: float, run: str) -> str:
    """The last."""
    from perennial.steps import context
    with context.opened("third", project, run) as ctx:
        print("done third", file=(ctx.folder.parent / "done").open("a"))
    return str(share)

@dsl.pipeline(name="fake")
def fake(project: str, source: str = "", as_of: str = "", trials: int = 0, seed: int = -1,
         trigger: str = ""):
    run = dsl.PIPELINE_JOB_ID_PLACEHOLDER
    told = notify(project=project, run=run)
    with dsl.ExitHandler(told):
        one = first(project=project, trigger=trigger, run=run).set_caching_options(False)
        two = second(project=project, source=source, run=run, made=one.outputs["made"])
        third(project=project, share=two.output, run=run)

compiler.Compiler().compile(fake, "{out}")
'''


@pytest.fixture(scope="module")
def root_of_fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose pipeline is the fake."""
    folder = tmp_path_factory.mktemp("root")
    (folder / "pipelines").mkdir()
    spec = folder / "pipelines" / "training.yaml"
    (folder / "fake.py").write_text(FAKE.replace("{out}", str(spec)))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(folder / "fake.py")], check=True, env=env)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project of a cluster: one file."""
    found = tmp_path / "projects"
    found.mkdir()
    text = tiny.project().model_dump(mode="json", exclude_defaults=True)
    (found / "tiny.yaml").write_text(yaml.safe_dump({**text, "source": {"path": "rows.csv"}}))
    return found


@pytest.fixture
def pod(settings: Settings, root_of_fake: Path, folder: Path, monkeypatch) -> "Pods":
    """Pods of one Job: each begins with nothing but the two stores."""
    place = (folder / "artifacts").as_uri()
    monkeypatch.setenv("PERENNIAL_ROOT", str(root_of_fake))
    monkeypatch.setenv("PERENNIAL_ARTIFACTS", place)
    monkeypatch.setenv("PERENNIAL_STATE_URL", f"sqlite:///{folder}/state.db")
    return Pods(Settings.load(), folder)


class Pods:
    """Runs the program of a Job's pod, one after the other."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.output = folder / "output"

    def start(self, source: str = "") -> "subprocess.Popen[bytes]":
        project = str(self.folder / "tiny.yaml")
        return self.begin(
            ["--run", RUN, "--project", project, "--source", source, "--trigger", "event 1"]
        )

    def begin(self, args: list[str]) -> "subprocess.Popen[bytes]":
        shutil.rmtree(self.settings.home, ignore_errors=True)
        self._mount()
        command = [sys.executable, "-m", "perennial.retrain.inpod", *args]
        with self.output.open("wb") as output:
            return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)

    def _mount(self) -> None:
        """A ConfigMap is mounted as links into a folder that has another name in each pod."""
        dated = self.folder / f"..{secrets.token_hex(4)}"
        dated.mkdir()
        link = self.folder / "tiny.yaml"
        shutil.copy(link, dated / "tiny.yaml")
        link.unlink()
        link.symlink_to(dated / "tiny.yaml")

    def code(self, source: str = "") -> int:
        return self.start(source).wait(120)

    @property
    def done(self) -> list[str]:
        path = self.folder / "done"
        return path.read_text().split()[1::2] if path.exists() else []

    @property
    def ends(self) -> list[dict[str, Any]]:
        ledger = Ledger(make_engine(self.settings.state_url))
        return [e.body for e in ledger.entries("tiny", "run.finished", RUN)]

    @property
    def store(self) -> Folder:
        kept = Folder(self.settings.state("tiny").artifacts("runs"))
        return kept / RUN / inpod._folder_of(self.settings)


def test_a_run_that_ends_well_bears_the_id_of_its_job(pod):
    assert pod.code() == 0, pod.output.read_text()

    assert pod.done == ["first", "second", "third"]
    assert [(e["run"], e["state"]) for e in pod.ends] == [(RUN, "succeeded")]
    result = Story(pod.settings, "tiny", RUN).result()
    assert result is not None and result.run == RUN
    assert len(pod.store.names("done")) == 3
    assert "Executing task 'second'" in job.log_of(pod.settings, "tiny", RUN)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "SIGTERM"])
def test_a_new_pod_goes_on_at_the_step_in_which_the_last_one_was_killed(pod, number):
    killed = pod.start("sleep")
    assert eventually(lambda: pod.done == ["first", "second"]), pod.output.read_text()
    assert eventually(lambda: len(pod.store.names("done")) == 1)
    killed.send_signal(number)
    killed.wait(30)
    (pod.folder / "over").touch()

    assert pod.code("sleep") == 0, pod.output.read_text()

    assert pod.done == ["first", "second", "second", "third"]
    assert (pod.folder / "rows").read_text() == "1 2 3"
    assert [e["state"] for e in pod.ends] == ["succeeded"]


@pytest.mark.parametrize("source", ["away", "crash"])
def test_what_may_pass_ends_the_pod_before_the_run_is_told_to_have_failed(pod, source):
    assert pod.code(source) == Unavailable.exit_code, pod.output.read_text()
    assert pod.ends == []
    (pod.folder / "over").touch()

    assert pod.code(source) == 0, pod.output.read_text()
    assert pod.done == ["first", "second", "second", "third"]
    assert [e["state"] for e in pod.ends] == ["succeeded"]


def test_what_a_step_says_is_final(pod):
    assert pod.code("wrong") == RunFailed.exit_code, pod.output.read_text()

    with pytest.raises(RunFailed, match="step second failed: row 17: churned is 2") as told:
        Story(pod.settings, "tiny", RUN).result()
    assert RUN in str(told.value)


def test_a_step_whose_files_were_damaged_in_the_store_is_done_again(pod):
    assert pod.code("away") == Unavailable.exit_code
    (rows,) = [name for name in pod.store.names("files") if name.endswith("inner/rows")]
    pod.store.write(rows, b"6 6 6")
    (pod.folder / "over").touch()

    assert pod.code() == 0, pod.output.read_text()

    assert pod.done == ["first", "second", "first", "second", "third"]
    assert (pod.folder / "rows").read_text() == "1 2 3"
    assert "a step is done again" in pod.output.read_text()


def test_steps_of_another_image_are_done_anew(pod, monkeypatch):
    assert pod.code("away") == Unavailable.exit_code
    (pod.folder / "over").touch()
    monkeypatch.setenv("PERENNIAL_IMAGE", "perennial:0.2.0-python3.11")

    assert pod.code() == 0, pod.output.read_text()

    assert pod.done == ["first", "second", "first", "second", "third"]


def test_a_record_that_names_a_folder_outside_is_not_followed(tmp_path):
    store = Folder(tmp_path / "store")
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "passwd").write_text("x")
    store.keep(tmp_path / "evil", "files/../etc")
    store.write("done/a.json", json.dumps({"x": {"uri": f"{tmp_path}/pod/../etc/passwd"}}))

    steps = inpod.Steps(tmp_path / "pod", store)

    assert steps.fetch() == 0
    assert not (tmp_path / "etc").exists()


def test_a_record_goes_to_the_store_after_its_files(tmp_path):
    written: list[str] = []
    root = tmp_path / "root"
    (root / "run" / "step").mkdir(parents=True)
    (root / "run" / "step" / "file").write_text("1")
    (root / ".kfp_cache").mkdir()
    record = {"out": {"uri": str(root / "run" / "step" / "file")}}
    (root / ".kfp_cache" / "key.json").write_text(json.dumps(record))
    store = SimpleNamespace(
        keep=lambda folder, name: written.append(name), write=lambda name, _: written.append(name)
    )

    inpod.Steps(root, store).keep()  # type: ignore[arg-type]

    assert written == ["files/run/step", "done/key.json"]


def test_the_real_pipeline_is_pinned_to_its_run_and_each_step_but_the_last_is_done_once():
    text = (ROOT / "pipelines" / "training.yaml").read_text()

    made = list(yaml.safe_load_all(inpod.pinned(text, RUN)))

    tasks = {t["taskInfo"]["name"]: t for t in inpod._tasks(made[0])}
    cached = {name for name, t in tasks.items() if t["cachingOptions"].get("enableCache")}
    assert set(tasks) - cached == {"Tell how it ended"}
    assert len(cached) >= 8
    assert "pipeline_job_uuid" not in yaml.safe_dump_all(made)
    assert len(made) == len(list(yaml.safe_load_all(text)))


# The Job and whoever waits for it, on an API server of a few lines.


class Node:
    """An API server and a node for one Job: its pod is a process, and its log a file."""

    project = "tiny"
    reason = REASON

    def __init__(self, pods: Pods) -> None:
        self._pods = pods
        self._process: subprocess.Popen[bytes] | None = None
        self.launcher = job.JobLauncher(pods.settings, self)  # type: ignore[arg-type]

    def ask(self, how: str, key: str) -> RunRequest:
        source = {WELL: "", WRONG: "wrong", LONG: "sleep"}[how]
        return RunRequest(self._pods.folder / "tiny.yaml", source=source, trigger=key, key=key)

    @property
    def ledger(self) -> Ledger:
        return Ledger(make_engine(self._pods.settings.state_url))

    def goes_on(self) -> bool:
        return "second" in self._pods.done and self._phase == "Running"

    def create(self, made: Job) -> None:
        if self._process:
            raise _refused(409, "it already exists")
        (container,) = made.spec.template.spec.containers
        # The project lies elsewhere here than in an image.
        args = [
            str(self._pods.folder / "tiny.yaml") if a.endswith("/tiny.yaml") else a
            for a in container.args
        ]
        self._process = self._pods.begin(args)

    def get(self, kind: type, name: str, namespace: str | None = None) -> Job:
        over = {"Failed": "PodFailurePolicy", "Succeeded": "Complete"}.get(self._phase)
        return Job.from_dict({"metadata": {"name": name}, "status": failed(over) if over else {}})

    def list(self, kind: type, **_: object) -> list[Pod]:
        return [pod_that({}, self._phase)] if self._process else []

    def log(self, name: str, container: str) -> Any:
        return self._pods.output.read_text().splitlines(keepends=True)

    def end(self) -> None:
        if self._process:
            self._process.terminate()
            self._process.wait()

    @property
    def _phase(self) -> str:
        code = self._process.poll() if self._process else None
        return "Running" if code is None else "Failed" if code else "Succeeded"


class TestJobLauncher(OutlivingContract):
    @pytest.fixture
    def bench(self, pod: Pods) -> Iterator[Node]:
        node = Node(pod)
        yield node
        node.end()


class Api:
    """Keeps one Job; its pods and events are what the test says."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.pods: list[Pod] = []
        self.events: list[Event] = []
        self.away = 0
        self.calls: list[str] = []

    def create(self, made: Job) -> None:
        self._asked("create")
        name = made.metadata.name
        if name in self.jobs:
            raise _refused(409, f"jobs.batch {name} already exists")
        self.jobs[name] = made

    def get(self, kind: type, name: str, namespace: str | None = None) -> Job:
        self._asked("get")
        if name not in self.jobs:
            raise _refused(404, "not found")
        return self.jobs[name]

    def list(self, kind: type, **_: object) -> list[Any]:
        self._asked("list")
        return list(self.pods if kind is Pod else self.events)

    def delete(self, kind: type, name: str, cascade: object = None) -> None:
        self._asked("delete")
        assert str(cascade) == "CascadeType.BACKGROUND"
        self.jobs.pop(name, None)

    def _asked(self, verb: str) -> None:
        self.calls.append(verb)
        if self.away:
            self.away -= 1
            raise _refused(503, "the server is starting")


def _refused(code: int, message: str) -> Exception:
    exc = kube.ApiError.__new__(kube.ApiError)
    exc.status = Status(code=code, message=message)
    return exc


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    monkeypatch.setattr(job, "_POLL_S", 0.01)
    return Api()


@pytest.fixture
def launcher(settings: Settings, api: Api) -> job.JobLauncher:
    return job.JobLauncher(settings, api)  # type: ignore[arg-type]


@pytest.fixture
def hasty(settings: Settings, api: Api) -> job.JobLauncher:
    """A launcher that gives up a pod at once."""
    return job.JobLauncher(settings.model_copy(update={"run_start_s": 0}), api)  # type: ignore[arg-type]


def ask(folder: Path, key: str = "event 1") -> RunRequest:
    return RunRequest(project=folder / "tiny.yaml", key=key, trigger="event 1")


def finish(settings: Settings, run: str, state: str = "succeeded", reason: str = "fine") -> None:
    Ledger(make_engine(settings.state("tiny").url)).append(
        "run.finished",
        project="tiny",
        subject=run,
        body={"run": run, "state": state, "reason": reason},
        now=tiny.START,
    )


def failed(reason: str) -> dict[str, Any]:
    return {"conditions": [_condition("Failed", reason)]}


def _condition(kind: str, reason: str) -> dict[str, Any]:
    return {"type": kind, "status": "True", "reason": reason}


def pod_that(state: dict[str, Any], phase: str = "Pending") -> Pod:
    status = {
        "phase": phase,
        "containerStatuses": [
            *[
                {
                    "name": "run",
                    "image": "",
                    "imageID": "",
                    "ready": False,
                    "restartCount": 0,
                    "state": state,
                }
            ]
        ],
    }
    made = {"name": "tiny-x", "creationTimestamp": "2020-01-01T00:00:00Z"}
    return Pod.from_dict({"metadata": made, "status": status})


def test_a_result_is_what_the_ledger_says(launcher, api, settings, folder):
    finish(settings, job.run_id("tiny", "event 1"), reason="all 6 limits kept")

    result = launcher.run(ask(folder))

    assert (result.state, result.reason) == ("succeeded", "all 6 limits kept")
    assert api.calls == [], "a run that ended was started again"


def test_a_known_key_waits_for_the_job_that_there_is(launcher, api, settings, folder):
    name = job.run_id("tiny", "event 1")
    api.jobs[name] = job.manifest(settings, ask(folder), "tiny", name)
    api.list = lambda kind, **_: finish(settings, name) or []  # type: ignore[method-assign]

    assert launcher.run(ask(folder)).run == name
    assert api.calls.count("create") == 1 and len(api.jobs) == 1


def test_keys_name_runs_and_no_key_is_a_new_run():
    assert job.run_id("tiny", "a") == job.run_id("tiny", "a") != job.run_id("tiny", "b")
    assert job.run_id("tiny", "") != job.run_id("tiny", "")
    assert len(job.run_id("t" * 39, "a")) <= 63


def test_an_api_server_that_is_away_does_not_end_the_wait(launcher, api, settings, folder):
    name = job.run_id("tiny", "event 1")
    api.jobs[name] = job.manifest(settings, ask(folder), "tiny", name)
    watch = job._Watch(settings, api, name, Story(settings, "tiny", name), None)  # type: ignore[arg-type]
    api.away = 5

    assert watch._look(impatient=False) is None
    finish(settings, name)
    assert watch._look(impatient=False).run == name


@pytest.mark.parametrize(
    ("status", "state", "wanted"),
    [
        (failed("DeadlineExceeded"), {}, "ended after 7200 s, the deadline of a run"),
        (
            failed("BackoffLimitExceeded"),
            {"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
            "its pod died: OOMKilled",
        ),
        (
            failed("PodFailurePolicy"),
            {"terminated": {"exitCode": 2, "reason": "Error", "message": "x\nerror: no project\n"}},
            r"its pod died: exit code 2 \(no project\)",
        ),
        ({"conditions": [_condition("Complete", "")]}, {}, "the ledger has no word"),
    ],
    ids=["deadline", "no memory", "bad input", "silence"],
)
def test_a_job_that_ended_without_a_word_in_the_ledger_is_told(
    launcher, api, settings, folder, status, state, wanted
):
    name = job.run_id("tiny", "event 1")
    api.jobs[name] = Job.from_dict({"metadata": {"name": name}, "status": status})
    api.pods = [pod_that(state, "Failed")] if state else []

    with pytest.raises(RunFailed, match=wanted):
        launcher.run(ask(folder))

    with pytest.raises(RunFailed, match=wanted):
        Story(settings, "tiny", name).result()


@pytest.mark.parametrize(
    ("reason", "wanted"),
    [
        ("ImagePullBackOff", "its image cannot be pulled: no such image"),
        ("CreateContainerConfigError", "its settings are not there: no such image"),
    ],
)
def test_a_pod_that_does_not_start_is_given_up_and_the_next_try_begins_anew(
    hasty, api, folder, reason, wanted
):
    api.pods = [pod_that({"waiting": {"reason": reason, "message": "no such image"}})]

    with pytest.raises(Unavailable, match=wanted):
        hasty.run(ask(folder))

    assert api.jobs == {}


def test_a_job_without_a_pod_is_told_by_the_words_of_its_events(hasty, api, folder):
    told = {"type": "Warning", "message": "exceeded quota: pods=0"}
    api.events = [Event.from_dict({"metadata": {}, "involvedObject": {}, **told})]

    with pytest.raises(Unavailable, match="it got no pod: exceeded quota: pods=0"):
        hasty.run(ask(folder))


def test_a_job_between_two_pods_is_given_its_time(launcher, api, settings, folder):
    name = job.run_id("tiny", "event 1")
    api.jobs[name] = job.manifest(settings, ask(folder), "tiny", name)
    api.jobs[name].metadata.creationTimestamp = tiny.START
    watch = job._Watch(settings, api, name, Story(settings, "tiny", name), None)  # type: ignore[arg-type]

    assert watch._look(impatient=False) is None
    assert name in api.jobs


def test_a_pod_that_runs_is_given_its_time(launcher, api, settings, folder):
    name = job.run_id("tiny", "event 1")
    api.jobs[name] = job.manifest(settings, ask(folder), "tiny", name)
    hasty = settings.model_copy(update={"run_start_s": 0})
    watch = job._Watch(hasty, api, name, Story(settings, "tiny", name), None)  # type: ignore[arg-type]
    api.pods = [pod_that({"running": {}}, "Running")]

    assert watch._look(impatient=False) is None
    assert name in api.jobs


def test_ending_a_run_by_hand_is_told_and_lets_its_lease_go(launcher, api, settings, folder):
    name = job.run_id("tiny", "event 1")
    api.jobs[name] = job.manifest(settings, ask(folder), "tiny", name)

    launcher.terminate("tiny", name)

    assert api.jobs == {}
    with pytest.raises(RunFailed, match="it was ended by hand"):
        launcher.run(ask(folder))


def test_the_pod_of_a_run_obeys_restricted_and_holds_no_token(settings, folder):
    made = job.manifest(settings, ask(folder), "tiny", "tiny-1")
    spec = made.spec.template.spec

    (container,) = spec.containers
    assert spec.automountServiceAccountToken is False
    assert spec.securityContext.runAsNonRoot and spec.securityContext.runAsUser == 65532
    assert spec.securityContext.seccompProfile.type == "RuntimeDefault"
    assert container.securityContext.readOnlyRootFilesystem
    assert not container.securityContext.allowPrivilegeEscalation
    assert container.securityContext.capabilities.drop == ["ALL"]
    assert container.resources.limits["memory"] == settings.run_memory
    assert made.spec.activeDeadlineSeconds == settings.run_deadline_s
    assert made.spec.backoffLimit == 2
    codes = made.spec.podFailurePolicy.rules[1].onExitCodes.values
    assert Unavailable.exit_code not in codes and RunFailed.exit_code in codes
