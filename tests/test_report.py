"""What people look at: one page, the answer first, nothing fetched, nothing unescaped."""

import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import Any

import pytest

from perennial.report import loop, page

FEATURES = ["recency_days", "orders_90d", "spend_90d", "basket_mean", "country", "cancel_share"]


def gate(name: str, measured: float, limit: float, passed: bool, reason: str) -> dict[str, Any]:
    return {
        "name": name,
        "measured": measured,
        "limit": limit,
        "rows": 1830,
        "passed": passed,
        "reason": reason,
    }


def window(number: int) -> dict[str, Any]:
    start = datetime(2011, 3, 7, tzinfo=UTC) + timedelta(days=7 * number)
    moved = FEATURES[:3] if number >= 9 else []
    labelled = number < 22
    return {
        "start": start.isoformat(),
        "end": (start + timedelta(days=7)).isoformat(),
        "rows": 40 if number == 5 else 780,
        "thin": number == 5,
        "drifted": moved if number < 14 or number > 20 else [],
        "auc_frozen": 0.74 - 0.006 * max(0, number - 8) if labelled else None,
        "auc_fresh": 0.74 - 0.002 * max(0, number - 8) if labelled else None,
        "versions": ["v1", "v2"] if number == 14 else ["v1" if number < 14 else "v2"],
        "event": bool(moved) and number < 14,
        "top": []
        if number == 5
        else [[f, 0.1, 1e-9 if f in moved else 0.3 / (i + 1)] for i, f in enumerate(FEATURES)],
    }


GATES = [
    gate("auc", 0.741, 0.6, True, "AUC 0.741 is at least 0.60"),
    gate(
        "gain", 0.013, 0.0, True, "AUC gained over v1: 0.031, at least 0.013 with confidence 0.95"
    ),
    gate("calibration", 0.04, 0.15, True, "calibration error 0.040 is at most 0.15"),
    gate("latency", 7.9, 100.0, True, "p95 7.9 ms is at most 100 ms"),
]
BROKEN = gate(
    "gain", -0.041, 0.0, False, "AUC gained over v2 is -0.022, at least -0.041: not above 0"
)


def run(
    number: int, as_of: str, gates: list[dict[str, Any]], version: str | None
) -> dict[str, Any]:
    passed = all(g["passed"] for g in gates)
    return {
        "run": f"local-{number}",
        "trigger": "event",
        "as_of": as_of,
        "state": "succeeded",
        "version": version,
        "candidate": "9c0d11ee",
        "passed": passed,
        "reason": "all 4 limits kept" if passed else BROKEN["reason"],
        "judged_from": as_of,
        "gates": gates,
    }


def step(weight: int, verdict: str, reason: str, requests: int) -> dict[str, Any]:
    return {
        "weight": weight,
        "verdict": verdict,
        "reason": reason,
        "canary_requests": requests,
    }


def summary(**changes: Any) -> dict[str, Any]:
    """A replay as it comes out of the box, invented."""
    steps = [
        step(10, "hold", "4 of 30 requests seen", 4),
        step(10, "hold", "17 of 30 requests seen", 17),
        *(step(w, "advance", f"{n} requests, no server errors, p95 7 ms", n) for w, n in STEPS),
    ]
    whole = {
        "project": "retail",
        "source": "the simulator",
        "from": "2011-03-07T00:00:00+00:00",
        "until": "2011-09-26T00:00:00+00:00",
        "took_s": 262.4,
        "requests": 5120,
        "failed_requests": 0,
        "windows": [window(n) for n in range(29)],
        "decisions": [
            decision("2011-05-16", "decline", "1 of 2 drifted windows in a row"),
            decision(
                "2011-05-23", "wait", "labels of the first drifted window known on 2011-07-15"
            ),
            decision("2011-06-13", "retrain", "5 drifted windows in a row; labels known"),
            decision("2011-08-29", "retrain", "drift in 3 windows in a row; labels known"),
        ],
        "runs": [
            run(0, "2011-03-07T00:00:00+00:00", GATES[:1], "v1 (1f0c92aa)"),
            run(1, "2011-06-13T00:00:00+00:00", GATES, "v2 (77ab3c1e)"),
            run(2, "2011-08-29T00:00:00+00:00", [GATES[0], BROKEN], None),
        ],
        "rollouts": [
            {"version": "v1 (1f0c92aa)", "phase": "first model", "reason": "ready", "steps": []},
            {
                "version": "v2 (77ab3c1e)",
                "phase": "promoted",
                "reason": "every step was kept",
                "steps": steps,
            },
        ],
        "pooled": {"auc_frozen": 0.7012, "auc_fresh": 0.7264, "rows": 16_842},
        "served_last": "v2 (77ab3c1e)",
        "answer": "Yes: AUC 0.726 kept fresh against 0.701 frozen over 16,842 labelled rows,"
        " with 1 of 2 candidates promoted.",
        "problems": [],
        "why": [
            "v2 (77ab3c1e) serves since 2011-06-13: promoted, every step was kept",
            "drift in recency_days, orders_90d, spend_90d in the window 2011-06-06 to 2011-06-13",
            "data digest sha256:5d41402abc4b2a76b9719d911017c592ae3f0a9b9c7a, 61,204 rows",
            "code commit 4f5d1c2, parameters max_depth=4 eta=0.11, lock sha256:aa11bb22, seed 7",
        ],
    }
    return {**whole, **changes}


STEPS = ((10, 36), (50, 61), (100, 34))


def decision(day: str, action: str, reason: str) -> dict[str, Any]:
    return {"at": f"{day}T00:00:00+00:00", "action": action, "reason": reason}


class Reader(HTMLParser):
    """Collects ids, links and tags that stay open."""

    VOID = {"meta", "br", "path", "rect", "circle", "use", "stop"}

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {k: v or "" for k, v in attrs}
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[k] for k in ("href", "src", "xlink:href") if k in found]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    return reader


def test_the_report_opens_with_its_answer():
    html = loop.render(summary())

    body = re.sub(r"<[^>]+>", " ", html[html.index("<body") :])

    assert body.index("Yes: AUC 0.726") < body.index("AUC kept fresh")


def test_the_report_is_well_formed_and_fetches_nothing():
    html = loop.render(summary())

    reader = read(html)

    assert reader.open == []
    assert len(set(reader.ids)) == len(reader.ids)
    assert all(link.startswith("#") and link[1:] in reader.ids for link in reader.links)
    assert "http" not in html and "@import" not in html and "<script" not in html


@pytest.mark.parametrize(
    "wanted",
    [
        "v2 (77ab3c1e)",
        BROKEN["reason"],
        "1 of 2 drifted windows in a row",
        "61 requests, no server errors",
        "data digest sha256:5d41402a",
        "recency_days in 13 of 29 windows",
    ],
    ids=["version", "gate reason", "decision", "rollout step", "pins", "drift in words"],
)
def test_the_report_tells(wanted):
    assert wanted in loop.render(summary())


def test_holds_in_a_row_are_told_once():
    html = loop.render(summary())

    assert "17 of 30 requests seen" in html
    assert "4 of 30 requests seen" not in html.replace("17 of 30", "")


def test_a_broken_loop_says_so_before_everything_else():
    html = loop.render(summary(problems=["HTTP 503: <upstream> gone"]))

    assert html.index("The loop broke") < html.index("Quality over time")
    assert "HTTP 503: &lt;upstream&gt; gone" in html


@pytest.mark.parametrize(
    "changes",
    [
        {"windows": [window(5)]},
        {"windows": [{**window(1), "auc_fresh": None, "auc_frozen": None}]},
        {"runs": [], "rollouts": [], "decisions": [], "why": [], "served_last": None},
        {"pooled": {"auc_frozen": None, "auc_fresh": None, "rows": 0}},
        {"runs": [{**run(0, "2011-03-07", [], None), "state": "failed", "passed": None}]},
    ],
    ids=["only thin windows", "no labels", "nothing happened", "no quality", "a failed run"],
)
def test_the_report_stands_with(changes):
    assert read(loop.render(summary(**changes))).open == []


def test_names_from_the_data_are_escaped():
    evil = "<img src=x onerror=alert(1)>"
    windows = [{**window(10), "drifted": [evil], "top": [[evil, 0.5, 0.0]]}]

    html = loop.render(summary(windows=windows, project=evil, answer=evil, why=[evil]))

    assert "<img" not in html


def test_a_table_escapes_aligns_and_shows_what_is_missing():
    html = page.table([[1, "<b>", None], [2.5, page.Html("<i>x</i>"), True]], ["n", "text", "none"])

    assert '<td class="n">2.5</td>' in html
    assert "&lt;b&gt;" in html and "<i>x</i>" in html
    assert "<td>–</td>" in html and "<td>yes</td>" in html


def test_two_pictures_on_a_page_share_no_id():
    charts = [page.line_chart({"a": [1.0, n]}, [0, 1], "title", "y") for n in (2.0, 3.0)]

    ids = read("".join(charts)).ids

    assert len(ids) == len(set(ids))


def test_a_picture_says_in_words_what_it_shows():
    chart = page.line_chart({"frozen": [0.7, None, 0.6]}, [0, 1, 2], "AUC", "AUC")

    assert 'aria-label="AUC. frozen: from 0.6 to 0.7 over 2 points"' in chart


def test_equal_pictures_are_equal_bytes():
    first, second = (page.line_chart({"a": [1.0, 2.0]}, [0, 1], "t", "y") for _ in range(2))

    assert first == second
