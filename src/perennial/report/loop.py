"""What did a replay show: the whole loop on one page, its answer first."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from perennial.report import heat
from perennial.report.page import (
    Html,
    Mark,
    Section,
    badge,
    details,
    escape,
    line_chart,
    page,
    paragraph,
    table,
    tiles,
)

Summary = dict[str, Any]

_TONES = {
    "retrain": "good",
    "promoted": "good",
    "advance": "good",
    "succeeded": "good",
    "rolled back": "bad",
    "roll back": "bad",
    "failed": "bad",
    "wait": "warn",
    "hold": "warn",
}
_WORDS = (
    ("Frozen", "the first model, never changed. Kept fresh: whatever model served at that time."),
    ("AUC", "chance that a positive row scores above a negative one; 0.5 is guessing."),
    ("Drift", "a feature's values in a window differ from those the model was trained on."),
    ("Thin", "a window with too few rows to be tested."),
    (
        "Gate",
        "limits that a candidate must keep on rows it has not seen, beside the serving model.",
    ),
    ("Event time", "when something happened in the data, not when this replay ran."),
)


def render(summary: Summary) -> str:
    """The report of a replay as one HTML document."""
    sections = [
        Section("", _numbers(summary)),
        *_problems(summary["problems"]),
        Section("Quality over time", _quality(summary)),
        Section("What drifted", _drift(summary["windows"])),
        Section("Candidates and their gates", _runs(summary["runs"])),
        Section("Rollouts", _rollouts(summary["rollouts"])),
        Section("Events and decisions", _decisions(summary)),
        Section("Why the last model serves", _why(summary)),
        Section("Words", table([(Html(f"<b>{a}</b>"), b) for a, b in _WORDS], ("word", "meaning"))),
    ]
    span = f"{_day(summary['from'])} to {_day(summary['until'])}"
    title = f"Replay of {summary['project']} from {summary['source']}, {span}"
    return page(title, sections, lead=summary["answer"])


def _numbers(summary: Summary) -> str:
    windows, runs = summary["windows"], summary["runs"]
    ends = [r["phase"] for r in summary["rollouts"]]
    refused = sum(r["passed"] is False for r in runs) + ends.count("rolled back")
    return tiles(
        {
            "AUC kept fresh": _three(summary["pooled"]["auc_fresh"]),
            "AUC frozen": _three(summary["pooled"]["auc_frozen"]),
            f"drift events in {len(windows)} windows": sum(w["event"] for w in windows),
            "retrainings": max(len(runs) - 1, 0),
            "promoted": ends.count("promoted"),
            "refused": refused,
            f"requests, {summary['failed_requests']:,} failed": summary["requests"],
            "took": f"{summary['took_s'] / 60:.1f} min",
        }
    )


def _problems(problems: Sequence[str]) -> list[Section]:
    if not problems:
        return []
    lines = "".join(f"<li>{escape(p)}</li>" for p in problems)
    return [Section("The loop broke", f'<ul class="bad">{lines}</ul>')]


def _quality(summary: Summary) -> str:
    windows = summary["windows"]
    if not any(w["auc_fresh"] is not None for w in windows):
        return paragraph(
            "No window has known labels of both kinds, so there is no quality to show."
        )
    chart = line_chart(
        {
            "kept fresh": [w["auc_fresh"] for w in windows],
            "frozen": [w["auc_frozen"] for w in windows],
        },
        [_middle(w) for w in windows],
        "AUC of each window: the model kept fresh beside the frozen first one",
        "AUC",
        _marks(summary),
    )
    return chart + details("The same in numbers", _window_table(windows))


def _marks(summary: Summary) -> list[Mark]:
    promoted = {r["version"] for r in summary["rollouts"] if r["phase"] == "promoted"}
    back = {r["version"] for r in summary["rollouts"] if r["phase"] == "rolled back"}
    events = [Mark(_moment(w["end"]), "drift event") for w in summary["windows"] if w["event"]]
    runs = summary["runs"]
    good = [r for r in runs if r["version"] in promoted]
    bad = [r for r in runs if r["passed"] is False or r["version"] in back]
    return [
        *events,
        *(Mark(_moment(r["as_of"]), "promoted", "good", top=False) for r in good),
        *(Mark(_moment(r["as_of"]), "refused", "bad", top=False) for r in bad),
    ]


def _window_table(windows: Sequence[Summary]) -> str:
    head = ("from", "rows", "served by", "AUC frozen", "AUC fresh", "drifted", "event")
    rows = [
        (
            _day(w["start"]),
            w["rows"],
            ", ".join(w["versions"]),
            _three(w["auc_frozen"]),
            _three(w["auc_fresh"]),
            "too thin to test" if w["thin"] else ", ".join(w["drifted"]) or "nothing",
            "sent" if w["event"] else "",
        )
        for w in windows
    ]
    return table(rows, head)


def _drift(windows: Sequence[Summary]) -> str:
    names = sorted({t[0] for w in windows for t in w["top"]})
    if not names:
        return paragraph("No window was tested.")
    often = sorted(names, key=lambda n: -sum(n in w["drifted"] for w in windows))
    cells = [
        heat.Cell(often.index(name), column, p_value, name in w["drifted"], _tell(w, name, p_value))
        for column, w in enumerate(windows)
        for name, _, p_value in w["top"]
    ]
    alt = "; ".join(_counted(n, windows) for n in often[:4])
    picture = heat.heat_map(often, [_day(w["start"]) for w in windows], cells, f"Drift: {alt}")
    legend = (
        "One column is one window. The stronger the colour, the surer the difference from the"
        " reference rows of the model that served; a dot marks drift. Empty: too thin to test."
    )
    return f"<figure>{picture}<figcaption>{legend}</figcaption></figure>"


def _tell(window: Summary, name: str, p_value: float) -> str:
    state = "drifted" if name in window["drifted"] else "as before"
    return f"{name}, {_day(window['start'])}: {state}, p = {p_value:.2g}"


def _counted(name: str, windows: Sequence[Summary]) -> str:
    return f"{name} in {sum(name in w['drifted'] for w in windows)} of {len(windows)} windows"


def _runs(runs: Sequence[Summary]) -> str:
    return "".join(_run(number, run) for number, run in enumerate(runs)) or paragraph("No runs.")


def _run(number: int, run: Summary) -> str:
    name = run["version"] or (
        f"candidate {run['candidate']}" if run.get("candidate") else "no model"
    )
    first = " (the first model)" if number == 0 else ""
    head = f"<h3>{escape(name)}{first}, data as of {_day(run['as_of'])} {_outcome(run)}</h3>"
    gates = [
        (
            g["name"],
            badge("kept", "good") if g["passed"] else badge("broken", "bad"),
            g["measured"],
            g["limit"],
            g["rows"],
            g["reason"],
        )
        for g in run["gates"]
    ]
    columns = ("gate", "", "measured", "limit", "rows", "reason")
    limits = table(gates, columns) if gates else ""
    return head + paragraph(_sentence(run["reason"])) + limits


def _outcome(run: Summary) -> Html:
    if run["state"] != "succeeded" and run["passed"] is None:
        return badge(run["state"], "bad")
    return badge("passed", "good") if run["passed"] else badge("refused", "bad")


def _rollouts(rollouts: Sequence[Summary]) -> str:
    return "".join(_rollout(r) for r in rollouts) or paragraph("Nothing was rolled out.")


def _rollout(rollout: Summary) -> str:
    tone = _TONES.get(rollout["phase"], "")
    head = f"<h3>{escape(rollout['version'])} {badge(rollout['phase'], tone)}</h3>"
    steps = [
        (s["weight"], _badge(s["verdict"]), s["canary_requests"], s["reason"])
        for s in _without_repeats(rollout["steps"])
    ]
    columns = ("% of traffic", "verdict", "canary requests", "reason")
    shown = table(steps, columns) if steps else ""
    return head + paragraph(_sentence(rollout["reason"])) + shown


def _without_repeats(steps: Sequence[Summary]) -> list[Summary]:
    """Of equal verdicts in a row at one weight, the last: a hold is looked at every second."""
    keys = [(s["weight"], s["verdict"]) for s in steps]
    return [s for i, s in enumerate(steps) if i + 1 == len(steps) or keys[i] != keys[i + 1]]


def _decisions(summary: Summary) -> str:
    rows = [(_day(d["at"]), _badge(d["action"]), d["reason"]) for d in summary["decisions"]]
    if not rows:
        return paragraph("No drift event came, so nothing had to be decided.")
    return table(rows, ("event time", "decision", "reason"))


def _why(summary: Summary) -> str:
    head = paragraph(f"{summary['served_last'] or 'No model'} serves at the end of the replay.")
    lines = "".join(f"<li>{escape(line)}</li>" for line in summary["why"])
    return f'{head}<ol class="story">{lines}</ol>'


def _badge(word: str | None) -> Html:
    return badge(word, _TONES.get(word, "")) if word else Html("–")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}" if text else ""


def _three(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _day(text: str) -> str:
    return escape(_moment(text))


def _middle(window: Summary) -> datetime:
    start, end = _moment(window["start"]), _moment(window["end"])
    return start + (end - start) / 2
