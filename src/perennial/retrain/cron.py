"""When does a schedule of six fields fire, and does it mean what its writer thinks?

KFP reads the seconds first and takes five fields without a word: ``*/1 * * * *`` then fires every
second. So a schedule is read here first, by the rules of the library that KFP uses.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from perennial.errors import BadInput, many

WANTED = "six fields: second minute hour day month weekday, such as '0 30 3 * * *' (daily at 03:30)"
_LONGEST = timedelta(days=366 * 5)  # beyond it the library gives up too

_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_DAYS = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"]


@dataclass(frozen=True)
class _Field:
    """What one field of a schedule may hold."""

    name: str
    low: int
    high: int
    words: tuple[str, ...] = ()

    def number(self, text: str) -> int:
        if text.lower() in self.words:
            return self.low + self.words.index(text.lower())
        if not text.isdecimal() or not self.low <= int(text) <= self.high:
            raise ValueError(f"{self.name} holds {text!r}, wanted {self.low} to {self.high}")
        return int(text)

    def values(self, text: str) -> frozenset[int]:
        """All numbers that a field means: a list of numbers, ranges and steps."""
        return frozenset(n for part in text.split(",") for n in self._part(part))

    def _part(self, text: str) -> range:
        span, slash, step = text.partition("/")
        if slash and (not step.isdecimal() or int(step) == 0):
            raise ValueError(f"{self.name} has the step {step!r}, wanted a whole number from 1")
        low, high = self._span(span, bool(slash))
        if low > high:
            raise ValueError(f"{self.name} holds {span!r}, which begins after its end")
        return range(low, high + 1, int(step or 1))

    def _span(self, text: str, stepped: bool) -> tuple[int, int]:
        if text in ("*", "?"):
            return self.low, self.high
        first, dash, last = text.partition("-")
        low = self.number(first)
        if dash:
            return low, self.number(last)
        return low, self.high if stepped else low


_FIELDS = (
    _Field("second", 0, 59),
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day", 1, 31),
    _Field("month", 1, 12, tuple(_MONTHS)),
    _Field("weekday", 0, 6, tuple(_DAYS)),
)


@dataclass(frozen=True)
class Cron:
    """A schedule that was understood."""

    text: str
    sets: tuple[frozenset[int], ...]  # in the order of the fields
    any_day: bool
    any_weekday: bool

    def after(self, now: datetime) -> datetime | None:
        """The next time that it fires, in UTC; None for a day that no calendar has."""
        start = now.astimezone(UTC).replace(microsecond=0) + timedelta(seconds=1)
        for day in _days(start):
            found = self._first_on(day) if self._is_due(day) else None
            if found:
                return found
        return None

    def _is_due(self, day: datetime) -> bool:
        _, _, _, days, months, weekdays = self.sets
        if day.month not in months:
            return False
        by_day = day.day in days
        by_weekday = day.isoweekday() % 7 in weekdays
        # Where both are given, either will do.
        if self.any_day or self.any_weekday:
            return by_day and by_weekday
        return by_day or by_weekday

    def _first_on(self, day: datetime) -> datetime | None:
        """The first time on a day, from its time of day on."""
        seconds, minutes, hours = map(sorted, self.sets[:3])
        moments = (
            day.replace(hour=hour, minute=minute, second=second)
            for hour in hours
            for minute in minutes
            for second in seconds
        )
        return next((at for at in moments if at >= day), None)


def parse(text: str) -> Cron:
    """Read a schedule. Raises BadInput that tells every fault and what was wanted."""
    words = text.split()
    if len(words) == len(_FIELDS) - 1:
        raise BadInput(
            f"the schedule {text!r} has five fields, and KFP would take the first for seconds;"
            f" write '0 {' '.join(words)}'"
        )
    if len(words) != len(_FIELDS):
        raise BadInput(f"the schedule {text!r} is not understood, wanted {WANTED}")
    sets = _sets(text, words)
    if len(sets[0]) > 1:
        raise BadInput(
            f"the schedule {text!r} fires more than once a minute; begin with one second"
        )
    cron = Cron(" ".join(words), tuple(sets), _any(words[3]), _any(words[5]))
    if cron.after(datetime(2000, 1, 1, tzinfo=UTC)) is None:
        raise BadInput(f"the schedule {text!r} never fires: no month has that day")
    return cron


def _sets(text: str, words: list[str]) -> list[frozenset[int]]:
    found, faults = [], []
    for field, word in zip(_FIELDS, words, strict=True):
        try:
            found.append(field.values(word))
        except ValueError as exc:
            faults.append(str(exc))
    if faults:
        raise many(f"the schedule {text!r} is wrong", faults)
    return found


def _any(word: str) -> bool:
    return any(part.split("/")[0] in ("*", "?") for part in word.split(","))


def _days(start: datetime) -> Iterator[datetime]:
    """A moment, then each midnight after it."""
    yield start
    midnight = start.replace(hour=0, minute=0, second=0)
    for days in range(1, _LONGEST.days):
        yield midnight + timedelta(days=days)
