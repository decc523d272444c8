"""The service's answers: which events are kept, which are refused, and what a sender is told."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import inbox_server
import pytest
import retraining as loop
from sqlalchemy import Engine
from starlette.testclient import TestClient

from perennial import events
from perennial.errors import Unavailable
from perennial.ledger import Ledger
from perennial.records import Event
from perennial.retrain import service
from perennial.retrain.inbox import Inbox
from perennial.retrain.runs import Runs
from perennial.retrain.worker import Worker
from perennial.store.engine import make_engine

KEY = b"k" * 32
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
MODES = ["structured", "binary"]


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    engine = make_engine(f"sqlite:///{tmp_path}/state.db")
    loop.serve(engine)
    return engine


@pytest.fixture
def inbox(engine: Engine) -> Inbox:
    return Inbox(engine)


@pytest.fixture
def worker(engine: Engine, inbox: Inbox) -> Worker:
    runs = Runs("churn", engine, loop.FakeLauncher(Ledger(engine)), lambda: NOW)
    return Worker(loop.project(), engine, inbox, runs, loop.drifted_up_to, lambda: NOW)


@pytest.fixture
def client(inbox: Inbox, worker: Worker) -> Iterator[TestClient]:
    app = service.Service(inbox, {"churn": worker}, KEY, lambda: NOW).app()
    with TestClient(app) as client:
        yield client


def post(client: TestClient, event: Event, key: bytes | None = KEY, **how: events.Mode):
    headers, body = events.to_http(event, key, **how)
    return client.post("/", headers=headers, content=body)


@pytest.mark.parametrize("mode", MODES)
def test_a_signed_event_is_kept_and_answered_with_an_empty_202(
    client: TestClient, inbox: Inbox, mode: events.Mode
):
    event = loop.event(0, NOW)

    answer = post(client, event, mode=mode)

    assert (answer.status_code, answer.content) == (202, b"")
    assert [kept.id for _, kept in inbox.pending()] == [event.id]


def test_a_duplicate_is_accepted_like_the_first_and_kept_once(client: TestClient, inbox: Inbox):
    event = loop.event(0, NOW)
    later = events.restamped(event, NOW + timedelta(minutes=1))

    answers = [post(client, e).status_code for e in (event, event, later)]

    assert answers == [202, 202, 202]
    assert len(inbox.pending()) == 1


UNSIGNED = {
    "without a signature": None,
    "with another key": b"x" * 32,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("key", UNSIGNED.values(), ids=UNSIGNED.keys())
def test_an_event_is_refused_with_401(
    client: TestClient, inbox: Inbox, key: bytes | None, mode: events.Mode
):
    answer = post(client, loop.event(0, NOW), key, mode=mode)

    assert answer.status_code == 401
    assert "sign with this project's key" in answer.json()["error"]
    assert inbox.pending() == []


def test_a_signed_event_that_was_altered_on_its_way_is_refused(client: TestClient, inbox: Inbox):
    headers, body = events.to_http(loop.event(0, NOW), KEY)

    answer = client.post("/", headers=headers, content=body.replace(b"500", b"501"))

    assert answer.status_code == 401
    assert inbox.pending() == []


AGES = {
    "an old event": (timedelta(minutes=-6), 401),
    "an event from the future": (timedelta(minutes=6), 401),
    "an event of four minutes ago": (timedelta(minutes=-4), 202),
    "an event of a clock that is a little fast": (timedelta(minutes=4), 202),
}


@pytest.mark.parametrize(("age", "status"), AGES.values(), ids=AGES.keys())
def test_the_age_decides_on(client: TestClient, age: timedelta, status: int):
    assert post(client, loop.event(0, NOW + age)).status_code == status


def with_data(**changes: object) -> Event:
    event = loop.event(0, NOW)
    return replace(event, data={**event.data, **changes})


WRONG: dict[str, tuple[Event, str]] = {
    "of another type": (replace(loop.event(0, NOW), type="org.other"), "the type is org.other"),
    "of another project": (replace(loop.event(0, NOW), subject="bank"), "wanted churn"),
    "without a window": (with_data(window_start=None), "data.window_start"),
    "without a model": (with_data(model_digest=7), "data.model_digest"),
}


@pytest.mark.parametrize(("event", "told"), WRONG.values(), ids=WRONG.keys())
def test_a_signed_event_is_refused_with_400_when_it_is(
    client: TestClient, inbox: Inbox, event: Event, told: str
):
    answer = post(client, event)

    assert answer.status_code == 400
    assert told in answer.json()["error"]
    assert inbox.pending() == []


BROKEN = {
    "no JSON": ({"content-type": events.STRUCTURED}, b"{", 400),
    "no event": ({"content-type": events.STRUCTURED}, b"{}", 400),
    "binary without attributes": ({"content-type": "application/json"}, b"{}", 400),
    "a form": ({"content-type": "application/x-www-form-urlencoded"}, b"a=b", 415),
    "a batch": ({"content-type": "application/cloudevents-batch+json"}, b"[]", 415),
    "no content type": ({}, b"{}", 415),
    "a body of a megabyte": ({"content-type": events.STRUCTURED}, b" " * (1 << 20), 413),
}


@pytest.mark.parametrize(("headers", "body", "status"), BROKEN.values(), ids=BROKEN.keys())
def test_a_client_gets_one_sentence_for(
    client: TestClient, headers: dict[str, str], body: bytes, status: int
):
    answer = client.post("/", headers=headers, content=body)

    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert "Traceback" not in answer.text


def test_an_event_that_the_disk_does_not_take_is_not_acknowledged(worker: Worker):
    class FullDisk:
        def put(self, event: Event) -> bool:
            raise Unavailable("the inbox cannot be written now; send the event again")

    app = service.Service(FullDisk(), {"churn": worker}, KEY, lambda: NOW).app()
    with TestClient(app) as client:
        answer = post(client, loop.event(0, NOW))

    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"


def test_the_status_tells_what_waits_and_what_was_decided(
    client: TestClient, worker: Worker, inbox: Inbox
):
    post(client, loop.event(0, NOW))
    before = client.get("/status").json()["churn"]
    worker.step()
    after = client.get("/status").json()["churn"]

    assert before == {"pending": 1, "running": False, "last_decided": None, "failed": []}
    assert after == {
        "pending": 0,
        "running": False,
        "last_decided": "2011-05-09T00:00:00+00:00",
        "failed": [],
    }


def test_a_timer_makes_the_worker_look_again_at_what_had_to_wait(
    client: TestClient, worker: Worker, inbox: Inbox, engine: Engine
):
    for _ in range(3):
        assert client.post("/schedule", content=b"{}").status_code == 202
    waiting = [event.type for _, event in inbox.pending()]
    worker.step()

    assert waiting == [events.SCHEDULE], "a flood within a minute is one"
    told = Ledger(engine).entries("churn", "decision")
    assert [e.body["action"] for e in told] == ["retrain"]
    assert [e.body["source"] for e in told] == ["schedule/churn"]


def test_an_event_that_came_too_late_is_written_down_once(client: TestClient, engine: Engine):
    late = loop.event(0, NOW - timedelta(hours=2))
    headers, body = events.to_http(late, KEY)

    answers = [client.post("/dead", headers=headers, content=body).status_code for _ in range(2)]

    assert answers == [202, 202]
    told = Ledger(engine).entries("churn", "event.undelivered")
    assert [e.subject for e in told] == [late.id]


def test_a_dead_letter_without_our_signature_is_refused(client: TestClient, engine: Engine):
    headers, body = events.to_http(loop.event(0, NOW), b"x" * 32)

    assert client.post("/dead", headers=headers, content=body).status_code == 401
    assert Ledger(engine).entries("churn", "event.undelivered") == []


def test_an_event_may_be_as_old_as_the_broker_is_slow(inbox: Inbox, worker: Worker):
    hour = timedelta(hours=1)
    app = service.Service(inbox, {"churn": worker}, KEY, lambda: NOW, hour).app()
    with TestClient(app) as client:
        answers = [post(client, loop.event(n, NOW - hour * n)).status_code for n in (1, 2)]

    assert answers == [202, 401]


def test_one_service_keeps_the_events_of_several_projects_apart(
    inbox: Inbox, worker: Worker, engine: Engine
):
    other = Worker(
        loop.project().model_copy(update={"name": "bank"}),
        engine,
        Inbox(engine, "bank"),
        Runs("bank", engine, loop.FakeLauncher(Ledger(engine)), lambda: NOW),
        loop.drifted_up_to,
        lambda: NOW,
    )
    app = service.Service(inbox, {"churn": worker, "bank": other}, KEY, lambda: NOW).app()
    with TestClient(app) as client:
        client.post("/schedule", content=b"{}")
        ticks = [Inbox(engine, name).pending()[0][1].subject for name in ("churn", "bank")]
        for name in ("churn", "bank"):
            Inbox(engine, name).settle(Inbox(engine, name).pending()[0][0], "seen")
        post(client, replace(loop.event(0, NOW), subject="bank"))
        told = client.get("/status").json()
        stranger = post(client, replace(loop.event(0, NOW), subject="elec"))

    assert ticks == ["churn", "bank"], "a timer means each project"
    assert told["bank"]["pending"] == 1
    assert Inbox(engine, "churn").pending() == []
    assert stranger.status_code == 400
    assert "wanted churn or bank" in stranger.json()["error"]


def test_others_reach_the_service_only_with_a_key_that_they_know(tmp_path: Path):
    command = [sys.executable, "-m", "perennial.retrain.service", "--host", "0.0.0.0"]
    command += ["--project", "examples/retail", "--port", "0"]
    ours = {**os.environ, "PERENNIAL_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=ours, check=False)

    assert done.returncode == 2
    assert "set PERENNIAL_EVENT_KEY" in done.stderr


def test_a_service_whose_worker_is_gone_is_not_healthy(client: TestClient, worker: Worker):
    before = client.get("/healthz").status_code
    worker.start()
    during = client.get("/healthz").status_code
    worker.stop()

    assert (before, during, client.get("/healthz").status_code) == (503, 200, 503)


def test_an_event_is_handled_soon_after_it_was_acknowledged(
    client: TestClient, worker: Worker, inbox: Inbox
):
    worker.start()
    post(client, loop.event(0, NOW))
    limit = time.monotonic() + 10
    while inbox.counts()["settled"] == 0 and time.monotonic() < limit:
        time.sleep(0.01)
    worker.stop()

    assert inbox.counts() == {"pending": 0, "settled": 1, "dead": 0}


def test_a_port_that_is_taken_is_told_with_the_remedy():
    with service.listen(service.HOST, 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Unavailable, match=f"port {port} is not free .*; give another --port"):
            service.listen(service.HOST, port)


def test_only_this_machine_reaches_the_service():
    with service.listen(service.HOST, 0) as server:
        assert server.getsockname()[0] == "127.0.0.1"


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"sqlite:///{tmp_path}/state.db"
    inbox_server.prepare(url)
    code = f"import inbox_server; inbox_server.main({url!r}, {port}, {KEY!r}, False)"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    yield child, port
    child.kill()
    child.communicate()


def wait_for(port: int) -> None:
    limit = time.monotonic() + 30
    while time.monotonic() < limit:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError("the service did not start")


def test_a_running_service_prints_nothing_for_a_request_and_ends_on_sigterm(running):
    child, port = running
    wait_for(port)
    for number in range(3):
        headers, body = events.to_http(loop.event(number), KEY)
        answer = httpx.post(f"http://127.0.0.1:{port}/", headers=headers, content=body)
        assert answer.status_code == 202
    httpx.get(f"http://127.0.0.1:{port}/nowhere")

    child.terminate()
    printed, _ = child.communicate(timeout=20)

    assert printed == ""
    assert child.returncode == 0


def test_a_slow_sender_does_not_keep_others_waiting(running):
    child, port = running
    wait_for(port)
    with socket.create_connection(("127.0.0.1", port)) as slow:
        slow.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        headers, body = events.to_http(loop.event(0), KEY)
        answer = httpx.post(f"http://127.0.0.1:{port}/", headers=headers, content=body, timeout=5)

    assert answer.status_code == 202


def run_main(*arguments: str, home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "perennial.retrain.service", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PERENNIAL_HOME": str(home)},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dumped = loop.project().model_dump(include={"name", "kind", "time", "label", "features"})
    dumped["label"] = {"column": "left"}
    dumped["time"] = {"column": "day"}
    (tmp_path / "project.yaml").write_text(json.dumps(dumped))
    return tmp_path


def test_the_command_serves_a_project_until_sigterm(folder: Path):
    with service.listen(service.HOST, 0) as free:
        port = free.getsockname()[1]
    child = run_main("--project", str(folder), "--port", str(port), home=folder)
    wait_for(port)
    key = (folder / "churn" / "keys" / "event.key").read_bytes()
    headers, body = events.to_http(loop.event(0), key)
    answer = httpx.post(f"http://127.0.0.1:{port}/", headers=headers, content=body)

    child.terminate()
    out, err = child.communicate(timeout=20)

    assert answer.status_code == 202
    assert (child.returncode, out) == (0, "")
    assert "Traceback" not in err


@pytest.mark.parametrize("fault", ["project", "port"])
def test_the_command_tells_in_one_line_what_is_wrong_with_its(folder: Path, fault: str):
    with service.listen(service.HOST, 0) as taken:
        taken.listen()
        port = taken.getsockname()[1] if fault == "port" else 0
        project = folder if fault == "port" else folder / "nowhere"
        child = run_main("--project", str(project), "--port", str(port), home=folder)
        out, err = child.communicate(timeout=30)

    assert child.returncode == {"project": 2, "port": 3}[fault]
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
