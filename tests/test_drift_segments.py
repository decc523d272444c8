from datetime import timedelta

import numpy as np
import pytest
import tiny

from perennial.drift import segments
from perennial.drift.windows import Served, WindowBuffer
from perennial.errors import BadInput
from perennial.records import DriftReport, FeatureDrift
from perennial.store.objects import Folder

NAMES = ("a", "b", "c", "colour")


def window(*hours: int, digest: str = "sha256:ab", seed: int = 0):
    rng = np.random.default_rng(seed)
    buffer = WindowBuffer(tiny.project(), digest)
    for hour in hours:
        moment = tiny.START + timedelta(hours=hour)
        buffer.add(Served(moment, f"r{hour}", rng.normal(size=(2, 4)), rng.random(2)))
    return buffer.flush()[0]


def test_what_was_written_is_read_in_order_of_time(place: str):
    closed = window(3, 1, 2)
    segments.Writer.new(place, "v1", NAMES).write(closed)

    rows = segments.read(place, tiny.START)

    assert rows.request_ids == ("r1", "r1", "r2", "r2", "r3", "r3")
    assert rows.rows == (0, 1) * 3
    assert rows.times[0] == tiny.START + timedelta(hours=1)
    assert set(rows.digests) == {"sha256:ab"}
    assert set(rows.revisions) == {"v1"}
    assert rows.features == NAMES
    np.testing.assert_array_equal(rows.matrix[4:], closed.served[0].matrix)
    np.testing.assert_array_equal(rows.scores[4:], closed.served[0].scores)


def test_missing_values_and_codes_survive(place: str):
    served = Served(tiny.START, "r", np.array([[np.nan, 1.0, 2.0, 3.0]]), np.array([0.25]))
    buffer = WindowBuffer(tiny.project(), "d")
    buffer.add(served)
    segments.Writer.new(place, "v1", NAMES).write(buffer.flush()[0])

    np.testing.assert_array_equal(segments.read(place, tiny.START).matrix, served.matrix)


def test_copies_whose_processes_have_one_id_do_not_write_over_each_other(place: str):
    """Of dozens of copies and restarts in a window, two tokens of 16 bits would meet some day."""
    copies = [segments.Writer.new(place, "v1", NAMES) for _ in range(3)]
    for hour, copy in enumerate(copies, start=1):
        copy.write(window(hour))

    assert len(segments.read(place, tiny.START)) == 6
    assert all(len(copy.stem.rpartition("-")[2]) >= 8 for copy in copies)


def test_parts_of_all_revisions_are_read_together_and_own_ones_apart(place: str):
    first = segments.Writer.new(place, "v1", NAMES)
    second = segments.Writer.new(place, "v2", NAMES)
    first.write(window(1))
    second.write(window(2, 3, digest="sha256:cd"))

    both = segments.read(place, tiny.START)

    assert len(both) == 6
    assert both.digests == ("sha256:ab",) * 2 + ("sha256:cd",) * 4
    assert len(first.read_own(tiny.START)) == 2
    assert len(second.read_own(tiny.START)) == 4


def test_a_restart_with_the_same_process_id_overwrites_nothing(place: str):
    for _ in range(2):
        segments.Writer.new(place, "v1", NAMES).write(window(1))

    assert len(segments.read(place, tiny.START)) == 4


def test_later_parts_add_to_earlier_ones(place: str):
    writer = segments.Writer.new(place, "v1", NAMES)
    buffer = WindowBuffer(tiny.project(), "d")
    for hour in (1, 2):
        moment = tiny.START + timedelta(hours=hour)
        buffer.add(Served(moment, "r", np.zeros((1, 4)), np.zeros(1)))
        writer.write(buffer.spill()[0])

    assert writer.write(buffer.flush()[0]) is None, "an empty part is no file"
    assert len(writer.read_own(tiny.START)) == 2


def test_starts_are_the_windows_with_rows(place: str):
    writer = segments.Writer.new(place, "v1", NAMES)
    writer.write(window(60))
    writer.write(window(1))

    Folder(place).write("20300101T000000Z/v1.drift.json", "a report of rows that are gone")

    assert segments.starts(place) == [tiny.START, tiny.START + timedelta(hours=50)]
    assert segments.starts(f"{place}/none") == []


def test_a_window_without_rows_is_told_in_one_line(place: str):
    with pytest.raises(BadInput, match="no served rows"):
        segments.read(place, tiny.START)


def test_a_damaged_part_is_told_by_its_name(place: str):
    uri = str(segments.Writer.new(place, "v1", NAMES).write(window(1)))
    folder, _, name = uri.rpartition("/")
    Folder(folder).write(name, b"PAR1 not really")

    with pytest.raises(BadInput, match=f"{name} is not a readable segment"):
        segments.read(place, tiny.START)


def test_a_report_is_read_as_it_was_written(place: str):
    found = (FeatureDrift("a", "ks", 0.5, 0.001, True, 0.0),)
    end = tiny.START + timedelta(hours=50)
    report = DriftReport(tiny.START, end, "sha256:ab", 50, False, 0.0125, found)

    segments.Writer.new(place, "v1", NAMES).write_report(report)

    assert segments.reports(place, tiny.START) == [report]
