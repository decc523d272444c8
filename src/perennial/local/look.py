"""Show what is known: status, why, models and runs, as tables for people or JSON for programs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from sqlalchemy import Engine

from perennial import ledger
from perennial.errors import BadInput
from perennial.local import folders, processes, summary, tables
from perennial.records import RolloutState, Version, plain
from perennial.settings import Settings, StateFolder
from perennial.store import engine as engines
from perennial.store import rollouts, versions


class View:
    """One project's state folder, opened for reading."""

    def __init__(self, settings: Settings, text: str) -> None:
        self.state: StateFolder = folders.state(settings, text)
        self.name = self.state.root.name
        self.engine: Engine = engines.make_engine(self.state.url)
        self.ledger = ledger.Ledger(self.engine)

    @property
    def entries(self) -> list[ledger.Entry]:
        return self.ledger.entries(self.name)


def status(settings: Settings, text: str, *, as_json: bool) -> int:
    """What serves, what drifts, what runs, on one screen."""
    view = View(settings, text)
    facts = _status(view)
    if as_json:
        print(json.dumps(facts, indent=2))
        return 0
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in facts.items():
        table.add_row(key.replace("_", " "), _plain_cell(value))
    tables.show(table)
    return 0


def _status(view: View) -> dict[str, Any]:
    entries = view.entries
    serving = rollouts.serving(view.engine, view.name)
    previous = rollouts.previous(view.engine, view.name)
    open_one = rollouts.open_rollout(view.engine, view.name)
    decisions = summary.decisions(entries)
    runs = summary.runs(entries)
    drifted = [e.body for e in entries if e.kind == "event.received"]
    return {
        "project": view.name,
        "stack": _stack_line(view.state),
        "serving": _named(serving) or "nothing yet",
        "previous": _named(previous) or "none",
        "rollout": _rollout_line(open_one),
        "last_drift": _drift_line(drifted),
        "last_decision": f"{decisions[-1]['action']}: {decisions[-1]['reason']}"
        if decisions
        else "none",
        "last_run": f"{runs[-1]['state']}: {runs[-1]['reason']}" if runs else "none",
        "counts": f"{len(drifted)} drift events, {len(runs)} runs,"
        f" {sum(e.kind == 'promoted' for e in entries)} promotions",
        "state": str(view.state.root),
    }


def _stack_line(state: StateFolder) -> str:
    if state.database_url:
        return "on a cluster; its pods are what kubectl tells"
    pid = processes.stack_pid(state.stack)
    return f"running, pid {pid}" if pid else "stopped"


def _named(state: RolloutState | None) -> str | None:
    return (
        summary.version_name({"version": state.version, "digest": state.digest}) if state else None
    )


def _rollout_line(state: RolloutState | None) -> str:
    if state is None:
        return "none in flight"
    return f"{_named(state)}: {state.phase}, {state.weight} % of traffic; {state.reason}"


def _drift_line(events: Sequence[dict[str, Any]]) -> str:
    if not events:
        return "none"
    return f"window {events[-1]['window_start'][:10]}: {', '.join(events[-1]['drifted'])}"


def why(settings: Settings, text: str, *, model: str | None, verbose: bool, as_json: bool) -> int:
    """How a model came to serve, from the ledger alone, after its chain was checked."""
    view = View(settings, text)
    view.ledger.verify()
    lines = ledger.why(view.entries, model, verbose=verbose)
    if as_json:
        print(json.dumps({"project": view.name, "why": lines}, indent=2))
        return 0
    print("\n".join(lines))
    return 0


def models(settings: Settings, text: str, *, verbose: bool, as_json: bool) -> int:
    """All registered versions, newest first."""
    view = View(settings, text)
    serving = rollouts.serving(view.engine, view.name)
    ends = {r["version"]: r["phase"] for r in summary.rollouts(view.entries)}
    found = reversed(versions.all_versions(view.engine, view.name))
    rows = [_model_row(v, serving, ends) for v in found]
    _show(rows, as_json, hidden=() if verbose else ("digest", "run"))
    return 0


def _model_row(
    version: Version, serving: RolloutState | None, ends: dict[str | None, str]
) -> dict[str, Any]:
    serves = serving is not None and serving.version == version.number
    return {
        "model": version.name,
        "as of": version.as_of.date().isoformat(),
        "state": "serving" if serves else ends.get(version.name, "registered"),
        "digest": version.digest,
        "run": version.run_id,
    }


def model(settings: Settings, text: str, name: str, *, verbose: bool, as_json: bool) -> int:
    """One version: its pins and its gates."""
    view = View(settings, text)
    number = name.removeprefix("v")
    if not number.isdecimal():
        raise BadInput(f"model is {name!r}, wanted a version such as v2")
    version = versions.by_number(view.engine, view.name, int(number))
    if version is None:
        raise BadInput(f"{view.name} has no model {name}; 'perennial models list' shows them")
    gates = [e.body for e in view.entries if e.kind == "gate" and e.body["run"] == version.run_id]
    lineage = gates[-1]["lineage"] if gates else {}
    if as_json:
        print(json.dumps({**plain(version), "lineage": lineage, "gates": gates[-1:]}, indent=2))
        return 0
    print(version.name)
    for key, value in lineage.items():
        print(f"  {key.replace('_', ' '):<14}{value}")
    _show([_gate_row(r) for g in gates[-1:] for r in g["record"]["results"]], False)
    return 0


def runs(settings: Settings, text: str, *, verbose: bool, as_json: bool) -> int:
    """All pipeline runs, newest first."""
    view = View(settings, text)
    wanted = ("as_of", "state", "version", "passed", "reason", "trigger", "run")
    found = reversed(summary.runs(view.entries))
    rows = [{key: r[key] for key in wanted} | {"as_of": r["as_of"][:10]} for r in found]
    _show(rows, as_json, hidden=() if verbose else ("trigger", "run"))
    return 0


def run(settings: Settings, text: str, name: str, *, as_json: bool) -> int:
    """One run: data, gates, outcome."""
    view = View(settings, text)
    found = [r for r in summary.runs(view.entries) if r["run"].startswith(name)]
    if len(found) != 1:
        many = "several runs begin" if found else "no run begins"
        raise BadInput(f"{many} with {name!r}; 'perennial runs list --verbose' shows their ids")
    if as_json:
        print(json.dumps(found[0], indent=2))
        return 0
    for key in ("run", "trigger", "as_of", "state", "version", "reason"):
        print(f"{key.replace('_', ' '):<9}{found[0][key]}")
    _show([_gate_row(r) for r in found[0]["gates"]], False)
    return 0


def _gate_row(result: dict[str, Any]) -> dict[str, Any]:
    return {
        "gate": result["name"],
        "passed": "yes" if result["passed"] else "NO",
        "reason": result["reason"],
    }


def _show(rows: Sequence[dict[str, Any]], as_json: bool, hidden: Sequence[str] = ()) -> None:
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    if not rows:
        print("nothing yet")
        return
    heads = [key for key in rows[0] if key not in hidden]
    table = Table(*heads, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*[_plain_cell(row[key]) for key in heads])
    tables.show(table)


def _plain_cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if not isinstance(value, Path) else value.as_posix()
