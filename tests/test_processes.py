"""Processes of a stack: they are told apart, written down, and none outlives its stack."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from perennial.errors import Unavailable
from perennial.local import processes
from perennial.local.processes import Children, Claim, Process

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
STUBBORN = [
    *[sys.executable, "-uc"],
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up');"
    " time.sleep(60)",
]
STACK = """
import sys, time
from pathlib import Path
from perennial.local.processes import Children, Claim
folder = Path(sys.argv[1])
claim = Claim(folder)
children = Children(folder, folder / "logs")
for name in sys.argv[2:]:
    children.start(name, [sys.executable, "-c", "import time; time.sleep(60)"], {})
print("up", flush=True)
time.sleep(60)
"""


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    found = Children(tmp_path, tmp_path / "logs")
    yield found
    found.stop_all()


@pytest.fixture
def stack(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A stack in another process, with two children."""
    command = [sys.executable, "-c", STACK, str(tmp_path), "edge", "service"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as popen:
        assert popen.stdout and popen.stdout.readline() == "up\n"
        yield popen
        popen.kill()


def written(folder: Path) -> dict[str, Process]:
    table = json.loads((folder / processes.PIDS).read_text())["children"]
    return {name: Process(**at) for name, at in table.items()}


def test_children_are_written_down_with_what_tells_them_apart(tmp_path, children):
    children.start("edge", SLEEP, {})

    process = written(tmp_path)["edge"]
    assert process.is_alive
    assert not Process(process.pid, process.ticks + 1).is_alive
    assert os.getpgid(process.pid) == process.pid


def test_a_stopped_child_is_gone_and_no_longer_written_down(tmp_path, children):
    children.start("edge", SLEEP, {})
    process = written(tmp_path)["edge"]

    children.stop("edge")

    assert not process.is_alive
    assert written(tmp_path) == {}


def test_a_child_that_ignores_sigterm_is_killed(tmp_path, children, monkeypatch):
    monkeypatch.setattr(processes, "STOP_S", 0.5)
    children.start("deaf", STUBBORN, {})
    processes.wait_until(lambda: "up" in children.log_file("deaf").read_text(), 10)
    process = written(tmp_path)["deaf"]

    children.stop("deaf")

    assert not process.is_alive


def test_grandchildren_end_with_their_group(tmp_path, children):
    spawn = (
        f"import subprocess; p = subprocess.Popen({SLEEP!r}); print(p.pid, flush=True); p.wait()"
    )
    children.start("parent", [sys.executable, "-c", spawn], {})
    log = children.log_file("parent")
    processes.wait_until(lambda: log.read_text().strip().isdigit(), 10)
    grandchild = Process.of(int(log.read_text()))
    assert grandchild.is_alive

    children.stop("parent")

    assert processes.wait_until(lambda: not grandchild.is_alive, 5)


def test_an_ended_child_tells_how_and_its_own_error(children):
    say = "import sys; print('error: no bundle at /x', file=sys.stderr); sys.exit(2)"
    children.start("predictor-v2", [sys.executable, "-c", say], {})

    assert processes.wait_until(lambda: children.ended("predictor-v2") != "", 10)

    assert children.ended("predictor-v2") == "predictor-v2 ended with code 2: no bundle at /x"


def test_a_child_that_keeps_ending_is_not_started_for_ever(children, monkeypatch):
    monkeypatch.setattr(processes, "RESTART_PAUSE_S", 0.05)
    children.start("edge", ["/bin/echo", "once"], {})

    def gives_up() -> bool:
        return bool(children.ended("edge")) and not children.restart("edge")

    assert processes.wait_until(gives_up, 10)
    lines = children.log_file("edge").read_text().splitlines()
    assert len(lines) == 1 + processes.RESTARTS


def test_a_child_gets_its_environment_besides_ours(children, monkeypatch):
    monkeypatch.setenv("OURS", "1")
    children.start("env", ["/usr/bin/env"], {"ITS": "2"})
    processes.wait_until(lambda: bool(children.ended("env")), 5)

    lines = children.log_file("env").read_text().splitlines()
    assert {"OURS=1", "ITS=2"} <= set(lines)


def test_children_end_when_their_stack_is_killed(tmp_path, stack):
    left = written(tmp_path)
    assert all(p.is_alive for p in left.values())

    stack.kill()
    stack.wait()

    assert processes.wait_until(lambda: not any(p.is_alive for p in left.values()), 5)


def test_what_a_killed_stack_left_is_ended_at_the_next_start(tmp_path):
    left = subprocess.Popen(SLEEP, process_group=0)
    other = subprocess.Popen(SLEEP, process_group=0)
    table = {
        "edge": {"pid": left.pid, "ticks": Process.of(left.pid).ticks},
        "reused": {"pid": other.pid, "ticks": 1},
    }
    dead = {"pid": 1 << 22, "ticks": 5}
    (tmp_path / processes.PIDS).write_text(json.dumps({"stack": dead, "children": table}))
    try:
        assert processes.stale(tmp_path) == ["edge"]
        assert processes.end_stale(tmp_path) == ["edge"]

        assert left.wait(5) == -signal.SIGTERM
        assert other.poll() is None, "a later process with a number from the file was hit"
        assert not (tmp_path / processes.PIDS).exists()
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stack": 1}'])
def test_a_damaged_list_of_processes_names_nobody(tmp_path, text):
    (tmp_path / processes.PIDS).write_text(text)

    assert processes.stack_pid(tmp_path) is None
    assert processes.end_stale(tmp_path) == []


def test_a_second_stack_in_the_same_folder_is_refused_with_the_number_of_the_first(tmp_path, stack):
    with pytest.raises(Unavailable, match=rf"already running .*pid {stack.pid}.*perennial down"):
        Claim(tmp_path)
    with pytest.raises(Unavailable, match="already running"):
        processes.end_stale(tmp_path)
    assert processes.stack_pid(tmp_path) == stack.pid


def test_a_claim_is_free_again_after_its_process_was_killed(tmp_path, stack):
    stack.kill()
    stack.wait()

    Claim(tmp_path).release()

    assert processes.stack_pid(tmp_path) is None


def test_a_stack_ends_when_it_is_told_to_from_elsewhere(tmp_path, stack):
    assert processes.signal_stack(tmp_path, 5) == stack.pid

    assert stack.wait(5) == -signal.SIGTERM
    assert processes.signal_stack(tmp_path) is None


def test_free_ports_are_free_and_different():
    ports = processes.free_ports(8)

    assert len(set(ports)) == 8
    assert all(processes.is_free(p) for p in ports)


def test_a_port_in_use_is_named_with_its_remedy():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        with pytest.raises(Unavailable, match=rf"port {port} .* in use.*PERENNIAL_EDGE_PORT"):
            processes.edge_port(port)
    assert processes.edge_port(port) == port
    assert processes.edge_port(0) in processes.PORTS


def test_a_port_just_left_can_be_taken_again():
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port)) as client:
        connection, _ = server.accept()
        connection.close()
        time.sleep(0.05)
        client.recv(1)
    server.close()

    assert processes.is_free(port)


def test_children_read_the_settings_of_their_stack(settings, tmp_path, children):
    ours = settings.model_copy(update={"home": tmp_path / "elsewhere", "edge_port": 8123})
    say = "from perennial.settings import Settings; print(Settings.load().model_dump_json())"

    children.start("reads", [sys.executable, "-c", say], processes.surroundings(ours))
    processes.wait_until(lambda: bool(children.ended("reads")), 20)

    assert json.loads(children.log_file("reads").read_text()) == json.loads(ours.model_dump_json())
