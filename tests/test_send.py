"""Sending a history to a loop that runs elsewhere: what goes out, and what is told."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from perennial import cli

PROJECT = """
name: mine
kind: table
source: {path: table.csv}
time: {column: day}
label: {column: left, positive: '1'}
features:
  - {name: age, type: number}
  - {name: plan, type: category}
window: {every: 1d, min_rows: 20}
"""
TABLE = "day,left,age,plan\n" + "".join(f"2020-01-0{d},{d % 2},{30 + d},a\n" for d in range(1, 8))


class Ingress(ThreadingHTTPServer):
    """Remembers what it is asked and answers as revision v3."""

    def __init__(self, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = status
        self.asked: list[tuple[str, str, dict]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Ingress

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.path, self.headers["host"], body))
        rows = body["inputs"][0]["shape"][0]
        output = {"name": "probability", "data": [0.5] * rows}
        told = json.dumps({"outputs": [output], "parameters": {"revision": "v3"}}).encode()
        self.send_response(self.server.status)
        self.send_header("content-length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def ingress() -> Iterator[Ingress]:
    server = Ingress()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def project(tmp_path: Path) -> str:
    (tmp_path / "project.yaml").write_text(PROJECT)
    (tmp_path / "table.csv").write_text(TABLE)
    return str(tmp_path)


def test_rows_go_out_in_order_under_the_host_that_the_ingress_knows(ingress, project, capsys):
    command = ["replay", project, "--to", ingress.url, "--host", "mine.example.com"]
    code = cli.main([*command, "--from", "2020-01-02", "--until", "2020-01-06", "--rows", "3"])

    assert code == 0
    assert [(path, host) for path, host, _ in ingress.asked] == [
        ("/v2/models/mine/infer", "mine.example.com")
    ] * 2
    ages = [i["data"] for _, _, b in ingress.asked for i in b["inputs"] if i["name"] == "age"]
    assert ages == [[32, 33, 34], [35]]
    assert ingress.asked[0][2]["parameters"]["event_time"].startswith("2020-01-02")
    told = capsys.readouterr().out
    assert "sent 4 rows in 2 requests, 0 failed" in told
    assert "rows answered by: v3 4" in told


def test_no_rows_between_two_moments_are_told(ingress, project, capsys):
    code = cli.main(["replay", project, "--to", ingress.url, "--from", "2021-01-01"])

    assert code == 2
    assert "no rows between --from and --until" in capsys.readouterr().err


def test_an_ingress_that_answers_nothing_ends_the_sending(project, capsys, monkeypatch):
    monkeypatch.setattr("perennial.local.send.MOST_FAILED", 3)

    code = cli.main(["replay", project, "--to", "http://127.0.0.1:9"])

    assert code == 3
    assert "http://127.0.0.1:9 answers nothing" in capsys.readouterr().err
