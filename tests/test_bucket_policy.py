"""The keys of a bucket open what their pods use, and nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from manifests import BUCKET

from perennial import bundle
from perennial.drift import segments
from perennial.drift.windows import ClosedWindow, Served
from perennial.records import DriftReport
from perennial.retrain.confirm import FromSegments
from perennial.retrain.inpod import Steps
from perennial.serving import options
from perennial.settings import StateFolder
from perennial.steps import register
from perennial.store import objects
from perennial.store.objects import Folder
from tests import policy

POLICY = json.loads(BUCKET.read_text())
LOOP, SERVERS = "perennial", "perennial-servers"
GET, PUT, LIST, DELETE = "s3:GetObject", "s3:PutObject", "s3:ListBucket", "s3:DeleteObject"
OURS = "perennial/retail"
TENANT = "s3://perennial/perennial"

# What each key opens, of everything that anybody may try; the rest is refused.
TRIES = {
    (action, f"{tenant}/retail/{kind}/x")
    for action in (GET, PUT, LIST, DELETE)
    for tenant in ("perennial", "second")
    for kind in ("bundles", "segments", "runs", "mlflow", "other")
}
OPEN = {
    LOOP: {(a, f"{OURS}/{k}/x") for a in (GET, LIST) for k in ("bundles", "segments", "runs")}
    | {(a, f"{OURS}/{k}/x") for a in (GET, LIST) for k in ("mlflow", "other")}
    | {(PUT, f"{OURS}/{k}/x") for k in ("bundles", "runs", "mlflow")},
    SERVERS: {
        (GET, f"{OURS}/bundles/x"),
        (GET, f"{OURS}/segments/x"),
        (PUT, f"{OURS}/segments/x"),
    },
    "perennial-operator": set(),
    "second": set(),
}


@pytest.mark.parametrize("who", OPEN)
def test_a_key_opens_what_the_table_says_and_nothing_else(who):
    opened = {(action, key) for action, key in TRIES if policy.may(POLICY, who, action, key)}

    assert opened == OPEN[who]


@pytest.mark.parametrize("who", [LOOP, SERVERS])
def test_a_key_opens_nothing_without_tls_and_in_no_other_bucket(who):
    mine = OPEN[who]

    assert not any(policy.may(POLICY, who, action, key, tls=False) for action, key in mine)
    assert not any(policy.may(POLICY, who, action, key, bucket="else") for action, key in mine)
    assert not policy.may(POLICY, who, LIST, "")


@pytest.mark.parametrize(
    ("widened", "opened"),
    [
        ({"Resource": "arn:aws:s3:::perennial/*"}, (GET, "second/retail/bundles/x")),
        ({"Principal": "*"}, (GET, f"{OURS}/bundles/x")),
        ({"Action": "s3:*"}, (DELETE, f"{OURS}/bundles/x")),
    ],
    ids=["every prefix", "everybody", "every action"],
)
def test_a_policy_that_is_wider_is_seen_to_be(widened, opened):
    wide = json.loads(BUCKET.read_text())
    who = "stranger" if "Principal" in widened else SERVERS
    next(one for one in wide["Statement"] if one["Sid"] == "ServersRead").update(widened)

    assert policy.may(wide, who, *opened)
    assert not policy.may(POLICY, who, *opened)


def test_a_condition_that_nobody_understands_is_not_passed_over():
    odd = {**POLICY["Statement"][1], "Condition": {"IpAddress": {"aws:SourceIp": "10.0.0.0/8"}}}

    with pytest.raises(TypeError, match="IpAddress"):
        policy.may({"Statement": [odd]}, LOOP, GET, f"{OURS}/bundles/x")


# What pods do, before a store that keeps the policy.


class Store:
    """A folder of this disk that asks the policy first, as the bucket would."""

    def __init__(self, root: Path, prefix: str, who: Callable[[], str]) -> None:
        self._disk = objects._Disk(root / prefix)
        self._prefix = prefix
        self._who = who

    def write(self, name: str, data: bytes) -> None:
        self._ask(PUT, name)
        self._disk.write(name, data)

    def read(self, name: str) -> bytes:
        self._ask(GET, name)
        return self._disk.read(name)

    def names(self, below: str) -> list[str]:
        self._ask(LIST, below)
        return self._disk.names(below)

    def exists(self, name: str) -> bool:
        self._ask(LIST, name)
        return self._disk.exists(name)

    def _ask(self, action: str, name: str) -> None:
        if not policy.may(POLICY, self._who(), action, f"{self._prefix}/{name}"):
            raise OSError(f"ACCESS_DENIED: {action} {self._prefix}/{name}")


class Bucket:
    """The bucket of a tenant, used by one key after the other."""

    def __init__(self, root: Path) -> None:
        self.who = LOOP
        self._root = root

    def store(self, uri: str) -> Store:
        return Store(self._root, uri.removeprefix("s3://perennial/"), lambda: self.who)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    found = Bucket(tmp_path / "bucket")
    monkeypatch.setattr(objects, "_store", found.store)
    monkeypatch.setattr(options, "FETCH_S", 0.0)
    return found


def state(folder: Path) -> StateFolder:
    """Of a pod of its own, with nothing on its disk."""
    return StateFolder(folder, "", f"{TENANT}/retail")


def closed(digest: str) -> ClosedWindow:
    rows = Served(tiny.START, "r1", np.zeros((1, 4)), np.zeros(1))
    end = tiny.project().window_end(tiny.START)
    return ClosedWindow(tiny.START, end, digest, 0, True, (rows,))


def test_runs_servers_and_the_retraining_service_do_their_work_with_their_keys(
    bucket, tmp_path, engine, monkeypatch
):
    digest = tiny.bundle(tmp_path / "judged")
    uri = register.keep(tmp_path / "judged", state(tmp_path / "run"), digest)
    assert bundle.near(state(tmp_path / "other run"), digest).is_dir(), "a later run's champion"

    bucket.who = SERVERS
    with options.bundle_folder(uri) as folder:
        assert bundle.verify(folder) == digest
    writer = segments.Writer.new(f"{TENANT}/retail/segments", "v1", ("a", "b", "c", "colour"))
    window = closed(digest)
    writer.write(window)
    assert len(writer.read_own(window.start)) == 1
    report = DriftReport(window.start, window.end, digest, 1, True, 0.01, ())
    writer.write_report(report)

    bucket.who = LOOP
    served = type("Serving", (), {"digest": digest})()
    monkeypatch.setattr("perennial.store.rollouts.serving", lambda *_: served)
    (seen,) = FromSegments(state(tmp_path / "retraining"), engine, tiny.project())(window.start)
    assert seen.rows == 1


def test_a_run_keeps_its_steps_with_its_key(bucket, tmp_path):
    root = tmp_path / "root"
    (root / ".kfp_cache").mkdir(parents=True)
    (root / "made").mkdir()
    (root / "made" / "file").write_text("1")
    record = {"out": {"uri": str(root / "made" / "file")}}
    (root / ".kfp_cache" / "key.json").write_text(json.dumps(record))
    store = Folder(f"{TENANT}/retail/runs") / "run-1"

    Steps(root, store).keep()
    shutil.rmtree(root)

    assert Steps(root, store).fetch() == 1, "the next pod finds them"


def test_a_server_cannot_replace_a_model_nor_read_what_runs_left(bucket, tmp_path):
    digest = tiny.bundle(tmp_path / "judged")
    uri = register.keep(tmp_path / "judged", state(tmp_path / "run"), digest)
    bucket.who = SERVERS

    for work in (
        lambda: Folder(uri).write("manifest.json", b"{}"),
        lambda: Folder(f"{TENANT}/retail/runs").read("run-1/done/x"),
        lambda: Folder(f"{TENANT}/retail/bundles").names(),
        lambda: Folder("s3://perennial/second/retail/bundles").read("x/contents.json"),
    ):
        with pytest.raises(objects.Unavailable, match="ACCESS_DENIED"):
            work()


def test_a_bundle_that_is_missing_is_told_where_reading_nothing_is_refused(bucket, monkeypatch):
    """A bucket does not tell who may list below a prefix only that an object is not there."""

    def refused(self: Store, name: str) -> bytes:
        raise OSError("ACCESS_DENIED")

    monkeypatch.setattr(Store, "read", refused)

    with pytest.raises(objects.BadInput, match=r"nothing was kept whole at .*contents.json"):
        Folder(f"{TENANT}/retail/bundles").fetch("none", Path("nowhere"))
