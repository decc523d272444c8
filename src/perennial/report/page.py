"""How a page of ours looks: one HTML file without outside links, for screen, phone and paper."""

import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from html import escape as _escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that matplotlib writes and the style sheet then decides, so pictures follow dark mode.
_INK, _MUTED, _LINE = "#010101", "#020202", "#030303"
_TONES = {
    "fresh": "#040404",
    "frozen": "#050505",
    "warn": "#060606",
    "bad": "#070707",
    "good": "#080808",
}
_VARIABLES = {_INK: "ink", _MUTED: "muted", _LINE: "line"} | {c: n for n, c in _TONES.items()}
_MANY = 48  # more points than this are drawn small, and a quarter of it in marks without lines
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), "-.")


class Html(str):
    """Text that is HTML already, so ``table`` must not escape it."""


@dataclass(frozen=True)
class Section:
    """A part of a page under its heading (none: an empty title); ``html`` is HTML already."""

    title: str
    html: str


@dataclass(frozen=True)
class Mark:
    """Something that happened at a place of a chart's x axis; same kind, same look."""

    at: Any
    kind: str
    tone: str = "warn"  # one of fresh, frozen, warn, bad, good
    top: bool = True  # its triangle stands at the top edge, not at the bottom


def escape(value: object) -> str:
    """Any value as text that is safe in HTML; None is a dash, a moment is told to the minute."""
    return str(value) if isinstance(value, Html) else _escape(_text(value))


def page(title: str, sections: Sequence[Section], lead: str = "") -> str:
    """A whole HTML document: the answer (``lead``) first and big, then the sections."""
    head = f"<h1>{escape(title)}</h1>" if lead else f'<h1 class="lead">{escape(title)}</h1>'
    answer = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    body = "".join(_section(number, part) for number, part in enumerate(sections))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_css()}</style></head>\n"
        f"<body><main>{head}{answer}{_contents(sections)}{body}</main></body></html>\n"
    )


def table(rows: Sequence[Sequence[object]], head: Sequence[str]) -> str:
    """Rows under their heads, everything escaped; columns of numbers stand right."""
    right = [_numeric([row[i] for row in rows]) for i in range(len(head))]
    tops = "".join(
        f'<th scope="col"{_align(n)}>{escape(h)}</th>' for h, n in zip(head, right, strict=True)
    )
    if not rows:
        return '<p class="muted">None.</p>'
    lines = (
        "<tr>"
        + "".join(f"<td{_align(n)}>{escape(v)}</td>" for v, n in zip(row, right, strict=True))
        + "</tr>"
        for row in rows
    )
    label = escape(", ".join(head))
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="Table: {label}"><table>'
        f"<thead><tr>{tops}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def tiles(numbers: Mapping[str, object]) -> str:
    """A few big numbers side by side, each under its name."""
    cells = (f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in numbers.items())
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def badge(text: str, tone: str = "") -> Html:
    """A word in a frame; ``tone`` is good, bad, warn or nothing."""
    return Html(f'<span class="badge {_escape(tone)}">{escape(text)}</span>')


def paragraph(text: object) -> str:
    """One escaped paragraph."""
    return f"<p>{escape(text)}</p>"


def details(summary: str, html: str) -> str:
    """HTML that opens on demand."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def figure(fig: "Figure", alt: str = "", caption: str = "") -> str:
    """A matplotlib figure as inline SVG; ``alt`` says in words what it shows."""
    for axes in fig.axes:
        axes.patch.set_alpha(0)
    fig.patch.set_alpha(0)
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    label = escape(alt or caption or "Chart")
    svg = _inline(_draw(fig)).replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    scroll = f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">{svg}</div>'
    return f"<figure>{scroll}{below}</figure>"


def line_chart(
    series: Mapping[str, Sequence[float | None]],
    x: Sequence[Any],
    title: str,
    ylabel: str,
    marks: Sequence[Mark] = (),
) -> str:
    """Lines over one x axis (moments or numbers) with marks at its edges; None leaves a gap."""
    axes = _axes(ylabel)
    for number, (name, values) in enumerate(series.items()):
        dots = [math.nan if v is None else float(v) for v in values]
        size = 3 if len(dots) > _MANY else 6
        axes.plot(x, dots, label=name, marker=".", markersize=size, **_look(number, name))
    for kind in dict.fromkeys(m.kind for m in marks):
        _draw_marks(axes, [m for m in marks if m.kind == kind])
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, -0.13), ncols=3, frameon=False, labelcolor=_INK
    )
    fig = axes.get_figure(root=True)
    assert fig is not None
    return figure(fig, alt=_words(title, series, marks), caption=title)


def _axes(ylabel: str) -> "Axes":
    from matplotlib.figure import Figure

    fig = Figure(figsize=(8.6, 3.6))
    axes = fig.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_LINE)
    axes.tick_params(colors=_MUTED, labelsize=9)
    axes.grid(axis="y", color=_LINE, linewidth=0.6)
    axes.set_ylabel(ylabel, color=_MUTED)
    return axes


def _look(number: int, name: str) -> dict[str, Any]:
    tones = list(_TONES.values())
    tone = next((c for n, c in _TONES.items() if n in name.lower()), tones[number % len(tones)])
    return {"color": tone, "linestyle": _DASHES[number % len(_DASHES)], "linewidth": 1.8}


def _draw_marks(axes: "Axes", marks: Sequence[Mark]) -> None:
    first = marks[0]
    places = [m.at for m in marks]
    edge, shape = (1.0, "v") if first.top else (0.0, "^")
    colour = _TONES.get(first.tone, _INK)
    axes.plot(
        places,
        [edge] * len(places),
        shape,
        color=colour,
        label=first.kind,
        clip_on=False,
        transform=axes.get_xaxis_transform(),
    )
    for place in places if len(places) <= _MANY // 4 else ():
        axes.axvline(place, color=colour, linewidth=0.7, alpha=0.5, zorder=0)


def _words(title: str, series: Mapping[str, Sequence[float | None]], marks: Sequence[Mark]) -> str:
    parts = [title]
    for name, values in series.items():
        seen = [v for v in values if v is not None and not math.isnan(v)]
        span = f"from {min(seen):.3g} to {max(seen):.3g}" if seen else "no values"
        parts.append(f"{name}: {span} over {len(seen)} points")
    for kind in dict.fromkeys(m.kind for m in marks):
        parts.append(f"{kind}: {sum(m.kind == kind for m in marks)}")
    return ". ".join(parts)


def _draw(fig: "Figure") -> str:
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "perennial"}):
        fig.savefig(out, format="svg", bbox_inches="tight", pad_inches=0.05)
    return out.getvalue()


def _inline(svg: str) -> str:
    """Drop what names other hosts, make ids unique in a page and colours those of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:\w+)?|version|width|height)="[^"]*"', "", svg, count=5)
    own = "f" + hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r'\bid="', f'id="{own}-', svg)
    svg = re.sub(r'xlink:href="#', f'href="#{own}-', svg)
    svg = svg.replace("url(#", f"url(#{own}-").replace("#000000", "currentColor")
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _section(number: int, part: Section) -> str:
    head = f'<h2 id="s{number}">{escape(part.title)}</h2>' if part.title else ""
    return f"<section>{head}{part.html}</section>"


def _contents(sections: Sequence[Section]) -> str:
    if len(sections) < 4:
        return ""
    links = (f'<a href="#s{i}">{escape(s.title)}</a>' for i, s in enumerate(sections) if s.title)
    return f'<nav aria-label="On this page">{"".join(links)}</nav>'


def _text(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M").removesuffix(" 00:00")
    return str(value)


def _numeric(values: Sequence[object]) -> bool:
    known = [v for v in values if v is not None]
    return bool(known) and all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in known
    )


def _align(right: bool) -> str:
    return ' class="n"' if right else ""


@cache
def _css() -> str:
    return files(__package__).joinpath("style.css").read_text(encoding="utf-8").strip()
