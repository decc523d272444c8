"""The stack with real servers: a model serves, is replaced, is taken back, and nothing stays."""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from perennial import bundle
from perennial.errors import BadInput, RunFailed, Unavailable
from perennial.ledger import Ledger
from perennial.local import processes
from perennial.local import stack as stacks
from perennial.local.stack import Stack
from perennial.records import Phase, RolloutState
from perennial.retrain import launchers
from perennial.rollout.envoy import EnvoyTraffic
from perennial.settings import Settings
from perennial.store import rollouts
from perennial.store.engine import make_engine
from tests import tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stack")


@pytest.fixture(scope="module")
def ours(home: Path) -> Settings:
    given = {"PERENNIAL_HOME": str(home / "state"), "PERENNIAL_EDGE_PORT": "0"}
    return Settings.load(given)


@pytest.fixture(scope="module")
def folder(home: Path) -> Path:
    """A project whose models are not trained but laid into its state folder."""
    text = bundle.project_json(tiny.project()).decode()
    (home / "tiny").mkdir()
    (home / "tiny" / "project.yaml").write_text(text)
    return home / "tiny"


def wish(settings: Settings, version: int, *, damage: str = "") -> RolloutState:
    """State the wish for a new tiny model, as the deploy step would."""
    state = settings.state("tiny")
    engine = make_engine(state.url)
    draft = state.bundles / f"draft-{version}"
    digest = tiny.bundle(draft, seed=version)
    kept = draft.rename(state.bundles / digest.removeprefix("sha256:"))
    if damage:
        (kept / "model" / damage).write_bytes(b"{}")
    made = rollouts.wish(
        engine,
        project="tiny",
        version=version,
        digest=digest,
        bundle_uri=kept.as_uri(),
        run_id=f"run-{version}",
    )
    engine.dispose()
    return made


@pytest.fixture(scope="module")
def running(ours: Settings, folder: Path) -> Iterator[Stack]:
    wish(ours, 1)
    with Stack(ours, folder) as stack:
        yield stack


@dataclass
class Clients:
    """Sends one request after another from a thread until it is left."""

    stack: Stack
    pause_s: float = 0.0
    answers: list[httpx.Response] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def sending(self) -> Iterator["Clients"]:
        over = threading.Event()
        threads = [threading.Thread(target=self._send, args=(over,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        yield self
        over.set()
        for thread in threads:
            thread.join()

    def _send(self, over: threading.Event) -> None:
        url, body = request(self.stack)
        with httpx.Client(timeout=20) as client:
            while not over.is_set():
                try:
                    self.answers.append(client.post(url, json=body))
                except httpx.HTTPError as exc:
                    self.failures.append(repr(exc))
                time.sleep(self.pause_s)

    @property
    def statuses(self) -> set[int]:
        return {a.status_code for a in self.answers}


def request(stack: Stack) -> tuple[str, dict[str, object]]:
    """URL and body of the curl line that ``up`` prints."""
    words = shlex.split(stacks.curl_line(stack))
    return words[-1], json.loads(words[words.index("-d") + 1])


def ask(stack: Stack) -> httpx.Response:
    url, body = request(stack)
    return httpx.post(url, json=body, timeout=20)


def tick_until(stack: Stack, is_so: Callable[[], bool], seconds: float = 90) -> None:
    limit = time.monotonic() + seconds
    while not is_so():
        stack.tick()
        assert time.monotonic() < limit, "it did not come about in time"
        time.sleep(0.05)


def end(stack: Stack, state: RolloutState) -> RolloutState:
    found = rollouts.get(stack._engine, state.id)
    assert found
    return found


def serving(stack: Stack) -> int:
    found = stack.serving()
    assert found
    return found.version


def test_the_printed_request_works_and_says_who_answered(running):
    answer = ask(running)

    golden = bundle.parts(Path(running.serving().bundle_uri.removeprefix("file://")))
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-revision"] == "v1"
    assert answer.json()["outputs"][0]["data"] == pytest.approx([golden.golden_scores[0]])


def test_a_shell_reads_the_printed_line_as_it_is_meant(running):
    line = stacks.curl_line(running)
    echo = "printf '%s\\n'" + line.removeprefix("curl")

    done = subprocess.run(echo, shell=True, capture_output=True, text=True, check=True)

    assert done.stdout.splitlines() == shlex.split(line)[1:]


def test_a_clients_mistake_is_its_own(running):
    url, body = request(running)
    body["inputs"][0]["data"] = ["text"]

    answer = httpx.post(url, json=body)

    assert answer.status_code == 400
    assert "inputs.a" in answer.json()["error"]


def test_every_process_listens_on_loopback_only(running):
    table = json.loads((running.state.stack / processes.PIDS).read_text())["children"]

    servers = ("edge", "service", "predictor-v1", "transformer-v1")

    found = {name: listening(table[name]["pid"]) for name in servers}

    assert found == dict.fromkeys(servers, {"127.0.0.1"})


def listening(pid: int) -> set[str]:
    """Addresses on which a process listens, by the kernel's own tables."""
    inodes, found = set(), set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            inodes.add(str(file.readlink()).removeprefix("socket:[").rstrip("]"))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(address(fields[1].split(":")[0]))
    return found


def address(text: str) -> str:
    """The kernel writes words of an address backwards; gRPC listens on the mapped form."""
    words = [bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8)]
    mapped = words[:3] == [b"\0\0\0\0", b"\0\0\0\0", b"\0\0\xff\xff"]
    return socket.inet_ntoa(words[-1]) if len(words) == 1 or mapped else f"[{text}]"


def test_a_second_stack_of_the_same_project_is_refused(running, ours, folder):
    with pytest.raises(Unavailable, match=rf"already running .*pid {os.getpid()}"):
        Stack(ours, folder).start()

    assert ask(running).status_code == 200


def test_a_killed_server_is_started_again_and_told(running):
    table = json.loads((running.state.stack / processes.PIDS).read_text())["children"]
    os.kill(table["predictor-v1"]["pid"], signal.SIGKILL)

    tick_until(running, lambda: ask(running).status_code == 200 and bool(running.problems()))

    assert running.problems() == ["predictor-v1 ended by signal 9"]
    running._problems.clear()


def test_a_killed_edge_comes_back_with_the_same_split(running):
    table = json.loads((running.state.stack / processes.PIDS).read_text())["children"]
    os.kill(table["edge"]["pid"], signal.SIGKILL)
    assert processes.wait_until(lambda: bool(running._children.ended("edge")), 5)
    started = time.monotonic()

    tick_until(running, lambda: not running._children.ended("edge"))
    assert processes.wait_until(lambda: answers(running), 5)

    assert time.monotonic() - started < 2
    assert ask(running).headers["x-revision"] == "v1"
    assert running.problems() == ["edge ended by signal 9"]
    running._problems.clear()


def answers(stack: Stack) -> bool:
    try:
        return ask(stack).status_code == 200
    except httpx.HTTPError:
        return False


def test_a_bundle_with_a_damaged_file_never_gets_a_request(running, ours):
    bad = wish(ours, 8, damage="model.json")

    with Clients(running, pause_s=0.05).sending() as clients:
        tick_until(running, lambda: end(running, bad).phase.over)

    assert end(running, bad).phase is Phase.ROLLED_BACK
    assert "model.json is damaged" in end(running, bad).reason
    assert clients.statuses == {200}
    assert {a.headers["x-revision"] for a in clients.answers} == {"v1"}


def test_a_good_model_is_promoted_under_traffic_without_a_failed_request(running, ours):
    good = wish(ours, 2)

    with Clients(running).sending() as clients:
        tick_until(running, lambda: end(running, good).phase.over)
        count = len(clients.answers)
        tick_until(running, lambda: len(clients.answers) > count + 20)

    assert end(running, good).phase is Phase.PROMOTED, end(running, good).reason
    assert (clients.statuses, clients.failures) == ({200}, [])
    assert Counter(a.headers["x-revision"] for a in clients.answers).keys() == {"v1", "v2"}
    assert ask(running).headers["x-revision"] == "v2"
    steps = [e.body for e in running._ledger.entries("tiny", "rollout.step")]
    assert [s["weight"] for s in steps if s["version"] == 2] == [10, 50, 100]
    assert all(s["canary_requests"] >= 30 for s in steps if s["version"] == 2)


def test_a_rollback_by_hand_from_elsewhere_takes_seconds_and_no_request(
    running, ours, capsys, monkeypatch
):
    move, waiting = EnvoyTraffic.set_weights, []

    def slowly(self, weights):
        time.sleep(1)
        waiting.append(asked.is_alive())
        move(self, weights)

    monkeypatch.setattr(EnvoyTraffic, "set_weights", slowly)
    with Clients(running).sending() as clients:
        asked = threading.Thread(target=stacks.roll_back, args=(ours, ""))
        started = time.monotonic()
        asked.start()
        tick_until(running, lambda: serving(running) == 1)
        took_s = time.monotonic() - started
        tick_until(running, lambda: not asked.is_alive())

    assert took_s < 5
    assert waiting and all(waiting), "it was told before requests went there"
    assert ask(running).headers["x-revision"] == "v1"
    assert (clients.statuses, clients.failures) == ({200}, [])
    assert capsys.readouterr().out.startswith("v1 (")


def test_a_canary_whose_server_is_killed_costs_no_request_and_is_rolled_back(running, ours):
    doomed = wish(ours, 3)

    with Clients(running, pause_s=0.02).sending() as clients:
        tick_until(running, lambda: end(running, doomed).phase is Phase.CANARY)
        table = json.loads((running.state.stack / processes.PIDS).read_text())["children"]
        os.kill(table["transformer-v3"]["pid"], signal.SIGKILL)
        tick_until(running, lambda: end(running, doomed).phase.over)

    assert end(running, doomed).phase is Phase.ROLLED_BACK
    told = end(running, doomed).reason
    assert "transformer-v3 ended by signal 9" in told or "server errors" in told
    assert (clients.statuses, clients.failures) == ({200}, [])


def test_nothing_is_left_of_a_stack_that_was_stopped(running):
    table = json.loads((running.state.stack / processes.PIDS).read_text())["children"]
    children = {name: processes.Process(**at) for name, at in table.items()}
    # The one that told MLflow of the last promotion ends by itself, at a moment of its own.
    left = [p for name, p in children.items() if name != stacks.ALIAS]
    assert len(left) >= 4, "the edge, the service, a predictor and its transformer"
    assert all(p.is_alive for p in left)

    running.stop()

    assert [p for p in left if p.is_alive] == []
    assert not (running.state.stack / processes.PIDS).exists()
    kinds = [e.kind for e in entries(running)]
    assert kinds[-1] == "stack.stopped"
    Ledger(make_engine(running.state.url)).verify()


def entries(stack: Stack) -> list:
    return Ledger(make_engine(stack.state.url)).entries("tiny")


UP = """
import sys
from perennial.local import stack
from perennial.settings import Settings
sys.exit(stack.up(Settings.load(), sys.argv[1]))
"""


@contextmanager
def upped(settings: Settings, folder: Path) -> Iterator["subprocess.Popen[str]"]:
    env = {**os.environ, **processes.surroundings(settings)}
    command = [sys.executable, "-c", UP, str(folder)]
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(command, env=env, stdout=pipe, stderr=both, text=True) as popen:
        try:
            yield popen
        finally:
            popen.kill()


def line_of(popen: "subprocess.Popen[str]", start: str) -> str:
    assert popen.stdout
    said = []
    for line in popen.stdout:
        said.append(line)
        if line.startswith(start):
            return line
    raise AssertionError(f"no line starts with {start!r} in {said}")


def alive(folder: Path) -> list[processes.Process]:
    table = json.loads((folder / processes.PIDS).read_text())["children"]
    return [processes.Process(**at) for at in table.values()]


def test_up_serves_again_what_served_and_down_ends_it_from_elsewhere(running, ours, folder, capsys):
    running.stop()
    with upped(ours, folder) as popen:
        url = shlex.split(line_of(popen, "curl"))[-1]
        assert httpx.get(url.replace("/infer", "/ready")).headers["x-revision"] == "v1"
        left = alive(ours.state("tiny").stack)

        assert stacks.down(ours, "") == 0

        assert popen.wait(20) == 0
    assert [p for p in left if p.is_alive] == []
    assert f"pid {popen.pid}" in capsys.readouterr().out


def test_after_kill_9_no_process_stays_and_the_next_start_works(running, ours, folder):
    running.stop()
    with upped(ours, folder) as popen:
        line_of(popen, "curl")
        left = alive(ours.state("tiny").stack)
        popen.kill()
        popen.wait()
        assert processes.wait_until(lambda: not any(p.is_alive for p in left), 15)
    with Stack(ours, folder) as again:
        assert ask(again).status_code == 200


def test_without_a_running_stack_a_rollback_says_so(running, ours):
    running.stop()

    with pytest.raises(Unavailable, match="no stack of tiny runs"):
        stacks.roll_back(ours, "")


def test_a_port_in_use_is_told_and_nothing_is_left(running, ours, folder):
    running.stop()
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = ours.model_copy(update={"edge_port": server.getsockname()[1]})

        with pytest.raises(Unavailable, match="PERENNIAL_EDGE_PORT"):
            Stack(taken, folder).start()

    assert processes.stack_pid(ours.state("tiny").stack) is None


def test_without_a_runtime_environment_the_remedy_is_told(ours, folder, tmp_path):
    nowhere = ours.model_copy(update={"runtime_python": tmp_path / "python"})

    with pytest.raises(BadInput, match="make env"):
        Stack(nowhere, folder).start()


def test_a_first_training_without_a_model_says_why(ours, folder, tmp_path, monkeypatch):
    elsewhere = ours.model_copy(update={"home": tmp_path})
    result = launchers.RunResult("run-1", "succeeded", "refused: AUC 0.51, wanted 0.60")
    monkeypatch.setattr(launchers.LocalLauncher, "run", lambda *_, **__: result)

    with pytest.raises(RunFailed, match="gave no model: refused: AUC 0.51"):
        Stack(elsewhere, folder).start()

    assert processes.stack_pid(elsewhere.state("tiny").stack) is None
