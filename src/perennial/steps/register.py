"""What number does a model bear that passed its gate, and where does it lie?"""

import json
import os
import shutil
from pathlib import Path

from perennial import bundle, registry
from perennial.bundle import Parts
from perennial.errors import RunFailed
from perennial.records import Version
from perennial.settings import StateFolder
from perennial.steps.context import Context
from perennial.store import files, versions
from perennial.store.objects import Folder


def register(ctx: Context, judged: Path) -> Version:
    """Keep the bundle under its digest, give it a version and publish it as the challenger.

    Doing so twice gives the same version. Raises RunFailed for a model without a passed gate.
    """
    parts = bundle.parts(judged)
    _check_gate(judged, parts)
    uri = keep(judged, ctx.state, parts.digest)
    version = versions.next_version(
        ctx.engine, ctx.project.name, parts.digest, ctx.run, parts.lineage.as_of, ctx.guard
    )
    registry.publish(ctx.settings, ctx.project.name, version, uri)
    ctx.ledger.append(
        "registered",
        project=ctx.project.name,
        subject=version.label,
        body={"run": ctx.run, "version": version.number, "digest": version.digest},
        now=ctx.now,
        event_time=version.as_of,
    )
    print(f"register: {version.name}", flush=True)
    return version


def keep(judged: Path, state: StateFolder, digest: str) -> str:
    """Keep a bundle here, and where all pods find it; gives the URI that it has from now on."""
    name = bundle.name_of(digest)
    here = _copy(judged, state.bundles, name)
    shared = Folder(state.artifacts("bundles"))
    if state.artifact_root and not shared.holds(name):
        shared.keep(here, name)
    return f"{shared.uri}/{name}"


def _copy(judged: Path, bundles: Path, name: str) -> Path:
    """Copy a bundle to its final folder, whole or not at all."""
    target = bundles / name
    if target.is_dir():
        return target
    bundles.mkdir(parents=True, exist_ok=True)
    draft = bundles / f".{target.name}-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(judged, draft)
    for path in draft.rglob("*"):
        _sync(path)
    draft.rename(target)
    files.sync_folder(bundles)
    return target


def _check_gate(judged: Path, parts: Parts) -> None:
    path = judged / bundle.EVIDENCE / "gate.json"
    record = json.loads(path.read_bytes()) if path.is_file() else {"results": []}
    passed = bool(record["results"]) and all(r["passed"] for r in record["results"])
    if not passed or record["candidate"] != parts.digest:
        raise RunFailed(f"model {parts.short} has no record of a passed gate; it is not registered")


def _sync(path: Path) -> None:
    if path.is_dir():
        files.sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())
