"""What the doctor sees, and what it tells to do about it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from perennial import signing
from perennial.errors import BadInput
from perennial.local import doctor, processes
from perennial.settings import Settings
from perennial.store.engine import make_engine


def checked(settings: Settings, text: str = "") -> dict[str, doctor.Check]:
    return {c.name: c for c in doctor.checks(settings, text)}


def test_on_a_machine_with_both_environments_nothing_is_missing(settings):
    found = checked(settings)

    assert [c for c in found.values() if not c.ok] == []
    assert "xgboost 3.2.0" in found["runtime environment"].seen


def test_a_missing_runtime_environment_is_told_with_its_remedy(settings, tmp_path, capsys):
    broken = settings.model_copy(update={"runtime_python": tmp_path / "python"})

    code = doctor.main(broken, "", as_json=True)

    told = {c["name"]: c for c in json.loads(capsys.readouterr().out)}
    assert code == 3
    assert not told["runtime environment"]["ok"]
    assert "make env" in told["runtime environment"]["remedy"]


def test_the_table_names_the_remedy_of_what_is_missing(settings, tmp_path, capsys):
    doctor.main(settings.model_copy(update={"root": tmp_path}), "", as_json=False)

    out = capsys.readouterr().out
    assert "MISSING" in out
    assert "PERENNIAL_ROOT" in out


def test_a_port_in_use_is_told(settings):
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = settings.model_copy(update={"edge_port": server.getsockname()[1]})

        assert not checked(taken)["port"].ok


def test_a_key_that_others_can_read_is_told(settings):
    state = settings.state("tiny")
    make_engine(state.url).dispose()
    signing.event_key(state.keys)
    assert checked(settings)["event key"].ok

    (state.keys / "event.key").chmod(0o444)

    assert checked(settings)["event key"].remedy.startswith("chmod 400")
    assert not checked(settings)["event key"].ok


def test_what_a_killed_stack_left_is_told(settings):
    state = settings.state("tiny")
    make_engine(state.url).dispose()
    state.stack.mkdir()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as left:
        ticks = processes.Process.of(left.pid).ticks
        table = {"edge": {"pid": left.pid, "ticks": ticks}}
        body = {"stack": {"pid": 1 << 22, "ticks": 1}, "children": table}
        (state.stack / processes.PIDS).write_text(json.dumps(body))

        found = checked(settings)["processes"]
        left.kill()

    assert (found.ok, found.remedy) == (False, "run 'perennial down'")
    assert "edge" in found.seen


def test_a_folder_that_cannot_be_written_is_told(settings, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: mode != os.W_OK)

    found = checked(settings)["state folder"]

    assert not found.ok
    assert "PERENNIAL_HOME" in found.remedy


def test_a_project_that_is_not_there_is_bad_input(settings):
    with pytest.raises(BadInput, match=r"no project\.yaml"):
        doctor.checks(settings, "nowhere")


def test_nothing_is_made_by_looking(settings):
    checked(settings)

    assert not Path(settings.home).exists()
