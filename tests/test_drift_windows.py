from datetime import timedelta

import numpy as np
import pytest
import tiny

from perennial.drift.windows import Served, WindowBuffer

LENGTH = tiny.WINDOW_ROWS * tiny.STEP


def served(hours: float, rows: int = 1, name: str = "r") -> Served:
    moment = tiny.START + hours * timedelta(hours=1)
    return Served(moment, name, np.zeros((rows, 4)), np.full(rows, 0.5))


@pytest.fixture
def buffer() -> WindowBuffer:
    return WindowBuffer(tiny.project(), "sha256:ab")


def test_a_window_stays_open_until_a_later_one_begins(buffer):
    buffer.add(served(0))
    buffer.add(served(49))

    assert buffer.close_before(tiny.START + 49.9 * tiny.STEP) == []
    (window,) = buffer.close_before(tiny.START + LENGTH)

    assert (window.start, window.end) == (tiny.START, tiny.START + LENGTH)
    assert (window.rows, window.closed, window.part, window.digest) == (2, True, 0, "sha256:ab")


def test_a_window_is_given_once(buffer):
    buffer.add(served(0))
    buffer.close_before(tiny.START + LENGTH)

    assert buffer.close_before(tiny.START + 2 * LENGTH) == []


def test_windows_close_with_the_oldest_first(buffer):
    buffer.add(served(60))
    buffer.add(served(10))

    closed = buffer.close_before(tiny.START + 3 * LENGTH)

    assert [w.start for w in closed] == [tiny.START, tiny.START + LENGTH]


def test_a_late_row_becomes_a_later_part_of_its_window_and_is_counted(buffer):
    buffer.add(served(0))
    buffer.close_before(tiny.START + LENGTH)

    buffer.add(served(1, rows=3))

    (late,) = buffer.spill()
    assert (late.start, late.part, late.closed, late.rows) == (tiny.START, 1, False, 3)
    assert buffer.late_rows == 3
    assert buffer.close_before(tiny.START + LENGTH) == [], "a window is tested once"


def test_one_stray_row_from_far_ahead_does_not_make_all_others_late(buffer):
    buffer.add(served(1_000_000))

    buffer.add(served(60))
    (window,) = buffer.close_before(tiny.START + 2 * LENGTH)

    assert (window.start, window.rows, buffer.late_rows) == (tiny.START + LENGTH, 1, 0)


def test_spilled_rows_are_given_up_but_their_window_still_ends(buffer):
    buffer.add(served(0, rows=5))

    (part,) = buffer.spill()
    (end,) = buffer.close_before(tiny.START + LENGTH)

    assert (part.part, part.closed, part.rows) == (0, False, 5)
    assert (end.part, end.closed, end.rows) == (1, True, 0)


def test_pending_rows_are_those_that_no_part_holds(buffer):
    buffer.add(served(0, rows=2))
    buffer.add(served(60, rows=3))
    assert buffer.pending_rows == 5

    buffer.close_before(tiny.START + LENGTH)
    assert buffer.pending_rows == 3

    buffer.flush()
    assert buffer.pending_rows == 0


def test_flush_ends_every_window_and_loses_no_late_row(buffer):
    buffer.add(served(0))
    buffer.close_before(tiny.START + LENGTH)
    buffer.add(served(1))
    buffer.add(served(60))

    found = buffer.flush()

    assert [(w.start, w.closed, w.rows) for w in found] == [
        (tiny.START, False, 1),
        (tiny.START + LENGTH, True, 1),
    ]
