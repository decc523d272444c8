"""May a looked-up value be used, and what is done without it? As the feature's policy says."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from perennial.project import Feature, tell_length


@dataclass(frozen=True)
class Verdict:
    """A value to use (None: missing to the model), or why the row is refused."""

    value: Any
    fault: str = ""


def judge(feature: Feature, value: Any, age: timedelta | None) -> Verdict:
    """Decide on one value that is ``age`` old; None is a missing value, or an unknown age.

    Never a value that nobody knows: what is too old or missing is refused, or told as missing.
    """
    if value is not None and not _is_old(feature, age):
        return Verdict(value)
    if feature.missing == "allow":
        return Verdict(None)
    if value is None:
        return Verdict(None, f"{feature.name} has no value, and its policy is {feature.missing}")
    return Verdict(None, f"{feature.name} is {_told(age)} old, and may be {_told(feature.max_age)}")


def _is_old(feature: Feature, age: timedelta | None) -> bool:
    return feature.max_age is not None and (age is None or age > feature.max_age)


def _told(length: timedelta | None) -> str:
    return "of an unknown age, so too" if length is None else tell_length(length)
