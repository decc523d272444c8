"""All pods of a tenant share the connections of its role: few each, and told when there is none."""

import contextlib
import math
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
import tiny

from perennial import bundle
from perennial.errors import Unavailable
from perennial.ledger import Ledger
from perennial.retrain import service
from perennial.retrain.story import Story
from perennial.settings import Settings
from perennial.store import engine as engines
from perennial.store import tenant
from perennial.store.engine import make_engine
from tests import manifests

ROOT = Path(__file__).resolve().parents[1]


def test_two_projects_of_one_service_share_one_engine(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "projects"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_bytes(bundle.project_json(tiny.project(name)))
    made, served = [], []

    def counted(url: str) -> object:
        made.append(make_engine(url))
        return made[-1]

    monkeypatch.setattr(engines, "make_engine", counted)
    monkeypatch.setattr(service, "serve", lambda *args: served.append(args))
    shared = settings.model_copy(update={"state_url": f"sqlite:///{tmp_path}/db/state.db"})

    with socket.socket() as server:
        service._run(shared, folder, "", server)

    ((told, workers, _),) = served
    assert [worker._engine for worker in workers] == made * 2
    assert told._box._engine is made[0]
    assert Story(shared, "one", "run-1").result() is None, "who follows a run uses it too"
    assert len(made) == 1
    made[0].dispose()


def limited(postgres, most: int) -> str:
    """URL of a migrated tenant whose role may have so many connections."""
    url = postgres.migrated("few")
    postgres.run(f'ALTER ROLE "{postgres.name}-few" CONNECTION LIMIT {most}')
    return url


def plain(url: str) -> str:
    return url.replace("+psycopg", "").replace(" ", "%20")


@pytest.mark.stores
def test_a_role_without_a_free_connection_is_told_and_recovers(postgres):
    url = limited(postgres, 3)
    engine = make_engine(url)
    ledger = Ledger(engine)
    engine.dispose()

    with contextlib.ExitStack() as others:
        for _ in range(3):
            others.enter_context(psycopg.connect(plain(url)))
        for use in (lambda: ledger.entries("churn"), lambda: make_engine(url)):
            with pytest.raises(Unavailable) as told:
                use()
            assert "gives this role no further connection" in str(told.value)
            assert "secret of" not in str(told.value), "the password is not told"

    assert eventually(lambda: ledger.entries("churn") == [])
    engine.dispose()


def eventually(ask: Callable[[], bool]) -> bool:
    """A server counts a connection a moment longer than its client."""
    for _ in range(100):
        with contextlib.suppress(Unavailable):
            return ask()
        threading.Event().wait(0.05)
    return False


@pytest.mark.stores
def test_one_process_never_takes_more_than_its_share(postgres, monkeypatch):
    monkeypatch.setattr(engines, "BUSY_S", 0.2)
    engine = make_engine(limited(postgres, 40))

    with contextlib.ExitStack() as held:
        for _ in range(engines.KEPT + engines.BEYOND):
            held.enter_context(engine.connect())
        with pytest.raises(Unavailable, match="3 connections of this process .* were busy"):
            engine.connect()

    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1
    engine.dispose()


def test_all_pods_of_production_fit_into_the_limit_of_their_role_as_documented():
    most = manifests.most_replicas(manifests.rendered("production"))
    process, step = engines.KEPT + engines.BEYOND, engines.KEPT + engines.BEYOND + 2
    # A release makes a quarter more of them, rounded up, before it takes the old ones away.
    pods = [(n + math.ceil(n / 4)) * process for n in (most["operator"], most["retraining"])]
    wanted = [*pods, 1, 2 * step, 1, process]

    table = (ROOT / "docs" / "state.md").read_text().split("| | connections |")[1].split("\n\n")[0]
    told = [int(n) for n in re.findall(r"\| (\d+) \|$", table, re.MULTILINE)]

    assert told == [*wanted, sum(wanted)]
    assert sum(wanted) <= tenant.CONNECTIONS
