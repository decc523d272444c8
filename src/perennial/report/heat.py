"""Draw one cell for each feature and window: how surely its values moved."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from perennial.report.page import escape

_LEFT, _TOP, _HIGH, _WIDE = 150, 6, 20, 860
_SURE = 10.0  # a p-value of 1e-10 or less has the full colour


@dataclass(frozen=True)
class Cell:
    """One test; ``row`` and ``column`` count from 0."""

    row: int
    column: int
    p_value: float
    drifted: bool
    words: str  # what a pointer or a screen reader is told


def heat_map(rows: Sequence[str], columns: Sequence[str], cells: Sequence[Cell], alt: str) -> str:
    """Inline SVG: strong colour is a small p-value, a dot is a drifted feature."""
    wide = max(10.0, min(44.0, (_WIDE - _LEFT) / max(len(columns), 1)))
    size = (_LEFT + wide * len(columns) + 4, _TOP + _HIGH * len(rows) + 24)
    parts = [
        f'<svg role="img" aria-label="{escape(alt)}" viewBox="0 0 {size[0]:.0f} {size[1]:.0f}"'
        f' style="min-width:{min(size[0], max(480, size[0] * 0.8)):.0f}px" font-size="11">',
        *(_name(number, name) for number, name in enumerate(rows)),
        *(_cell(cell, wide) for cell in cells),
        *_ticks(columns, wide, size[1] - 8),
        "</svg>",
    ]
    frame = f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(alt)}">'
    return f"{frame}{''.join(parts)}</div>"


def _name(number: int, name: str) -> str:
    short = name if len(name) <= 22 else f"{name[:21]}…"
    place = _TOP + _HIGH * number + 14
    return f'<text x="{_LEFT - 8}" y="{place}" text-anchor="end">{escape(short)}</text>'


def _cell(cell: Cell, wide: float) -> str:
    left, top = _LEFT + wide * cell.column, _TOP + _HIGH * cell.row
    sure = _SURE if cell.p_value <= 0 else min(-math.log10(cell.p_value), _SURE)
    shade = f"rgba(var(--heat),{0.05 + 0.8 * sure / _SURE:.2f})"
    box = (
        f'<rect x="{left + 0.5:.1f}" y="{top + 0.5}" width="{wide - 1:.1f}" height="{_HIGH - 1}"'
        f' style="fill:{shade}"><title>{escape(cell.words)}</title></rect>'
    )
    if not cell.drifted:
        return box
    middle = (left + wide / 2, top + _HIGH / 2)
    return f'{box}<circle cx="{middle[0]:.1f}" cy="{middle[1]:.1f}" r="2.6" fill="currentColor"/>'


def _ticks(columns: Sequence[str], wide: float, place: float) -> list[str]:
    each = max(1, math.ceil(74 / wide))
    return [
        f'<text x="{_LEFT + wide * i:.1f}" y="{place:.0f}" class="muted">{escape(c)}</text>'
        for i, c in enumerate(columns)
        if i % each == 0 and _LEFT + wide * i + 60 < _LEFT + wide * len(columns) + 20
    ]
