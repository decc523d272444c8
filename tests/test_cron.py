"""A schedule means what its writer thinks, by the rules of the library that KFP uses."""

from datetime import UTC, datetime

import pytest

from perennial.errors import BadInput
from perennial.retrain import cron

NOW = datetime(2026, 3, 1, 12, 30, 15, tzinfo=UTC)


# The answers are those of github.com/robfig/cron v1.2.0, which KFP 2.17 parses with.
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("0 30 3 * * *", "2026-03-02T03:30:00"),
        ("0 0 * * * *", "2026-03-01T13:00:00"),
        ("15 30 12 * * *", "2026-03-02T12:30:15"),
        ("16 30 12 * * *", "2026-03-01T12:30:16"),
        ("0 */20 9-11 * * *", "2026-03-02T09:00:00"),
        ("0 50/5 12 * * *", "2026-03-01T12:50:00"),
        ("0 0 3 ? * mon", "2026-03-02T03:00:00"),
        ("0 0 3 29 2 *", "2028-02-29T03:00:00"),
        ("0 0 3 15 * fri", "2026-03-06T03:00:00"),
        ("0 0 3 */10 * fri", "2026-05-01T03:00:00"),
        ("0 0 0 1 jan,JUL *", "2026-07-01T00:00:00"),
    ],
    ids=lambda value: str(value),
)
def test_a_schedule_fires_when_its_library_says(text, wanted):
    assert cron.parse(text).after(NOW) == datetime.fromisoformat(wanted).replace(tzinfo=UTC)


def test_five_fields_are_refused_with_the_six_that_were_meant():
    with pytest.raises(BadInput, match=r"take the first for seconds; write '0 \*/1 \* \* \* \*'"):
        cron.parse("*/1 * * * *")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("@daily", "wanted six fields"),
        ("", "wanted six fields"),
        ("0 30 3 * * * 2026", "wanted six fields"),
        ("* 30 3 * * *", "more than once a minute"),
        ("*/10 0 * * * *", "more than once a minute"),
        ("0 0 3 31 feb *", "never fires"),
        ("0 0 24 * * *", "hour holds '24', wanted 0 to 23"),
        ("0 0 3 0 * *", "day holds '0', wanted 1 to 31"),
        ("0 0 3 * * 7", "weekday holds '7', wanted 0 to 6"),
        ("0 0 3 * foo *", "month holds 'foo'"),
        ("0 30-10 * * * *", "begins after its end"),
        ("0 */0 * * * *", "the step '0'"),
        ("0 -5 * * * *", "minute holds ''"),
    ],
    ids=lambda value: str(value),
)
def test_what_would_surprise_its_writer_is_refused(text, says):
    with pytest.raises(BadInput, match=says):
        cron.parse(text)


def test_all_faults_are_told_at_once():
    with pytest.raises(
        BadInput, match=r"in 2 place\(s\): minute holds '60'.*; weekday holds 'xxx'"
    ):
        cron.parse("0 60 3 * * xxx")


def test_a_schedule_is_kept_with_one_blank_between_its_fields():
    assert cron.parse("0  30 3   * * *").text == "0 30 3 * * *"
