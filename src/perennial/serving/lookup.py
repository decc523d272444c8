"""What are the features of an entity now? Asked of the feature server, judged by their policies."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import httpx
import numpy as np
import pandas as pd

from perennial.contract import Tensor
from perennial.data import missing
from perennial.data.missing import Verdict
from perennial.errors import BadInput
from perennial.project import Feature, Project
from perennial.serving.wire import Refused

AGE = "{}__age_s"  # as data.history.age_name has it, in words that need no library
MAX_KEYS = 1000
_PAUSE_S = 0.2  # between two tries to reach a server that starts up
SKEW = timedelta(days=1)  # of clocks, and of requests that had to wait
_DOWN = "the feature server does not answer, try again"


@dataclass(frozen=True)
class View:
    """What a feature server looks up: a view, by which key, and for how long a row tells."""

    name: str
    key: str
    time: str  # field with a row's own time, in microseconds since 1970
    ttl_s: float  # 0: for ever


class Lookup:
    """A client of one project's feature server; many keys are asked for at once."""

    def __init__(self, client: httpx.AsyncClient, project: Project, view: View) -> None:
        self._client = client
        self._features = project.features
        self._view = view
        self._fields = (
            view.time,
            *project.feature_names,
            *(AGE.format(f.name) for f in project.features if f.missing == "last_known"),
        )

    @property
    def key(self) -> str:
        """Name of the input that a request carries instead of features."""
        return self._view.key

    async def rows(self, keys: Sequence[int], now: datetime) -> pd.DataFrame:
        """One row of features for each key, in their order, as they are known at ``now``.

        Raises BadInput for a key that is unknown, Refused (503) for a value that is missing or too
        old where its policy allows no such row, for a row of more than ``SKEW`` after ``now``
        (nobody could know it then; below that it counts as new), or when the server does not
        answer.
        """
        found = await self._ask(keys)
        rows, faults = [], []
        for place, key in enumerate(keys):
            values = {name: column[place] for name, column in found.items()}
            row, fault = self._row(key, values, now)
            rows.append(row)
            faults += [fault] if fault else []
        if faults:
            more = f"; {len(faults) - 1} more rows are refused" if len(faults) > 1 else ""
            raise Refused(503, f"{faults[0]}{more}")
        return pd.DataFrame(rows, columns=[f.name for f in self._features])

    async def _ask(self, keys: Sequence[int]) -> Mapping[str, Sequence[Any]]:
        wanted = [f"{self._view.name}:{name}" for name in self._fields]
        body = {"features": wanted, "entities": {self.key: list(keys)}}
        try:
            answer = await self._client.post("/get-online-features", json=body)
            answer.raise_for_status()
            told = answer.json()
            names = told["metadata"]["feature_names"]
            columns = [result["values"] for result in told["results"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as exc:
            raise Refused(503, _DOWN) from exc
        found = dict(zip(names, columns, strict=True))
        if any(len(found.get(name, ())) != len(keys) for name in self._fields):
            raise Refused(503, _DOWN)
        return found

    def _row(
        self, key: int, values: Mapping[str, Any], now: datetime
    ) -> tuple[dict[str, Any], str]:
        """The features of one entity, and why they are refused."""
        age = self._age(values, now)
        if age is None:
            raise BadInput(f"inputs.{self.key}.data holds {key}, of which no features are known")
        if age < -SKEW:
            return {}, (
                f"{self.key} {key}: its features are of {now - age:%Y-%m-%d %H:%M}, more than a"
                f" day after {now:%Y-%m-%d %H:%M}, for which they are asked"
            )
        row, fault = {}, ""
        for feature in self._features:
            found = self._judge(feature, values, max(age, timedelta(0)))
            row[feature.name] = found.value
            fault = fault or (f"{self.key} {key}: {found.fault}" if found.fault else "")
        return row, fault

    def _judge(self, feature: Feature, values: Mapping[str, Any], age: timedelta) -> Verdict:
        value = values[feature.name]
        # A row may tell nothing any more, and still know a value that may be carried on.
        if self._view.ttl_s and age.total_seconds() > self._view.ttl_s:
            value = value if feature.missing == "last_known" else None
        carried = values.get(AGE.format(feature.name)) or 0.0
        return missing.judge(feature, value, age + timedelta(seconds=float(carried)))

    def _age(self, values: Mapping[str, Any], now: datetime) -> timedelta | None:
        moment = values[self._view.time]
        if moment is None:
            return None
        # JSON of protobuf writes 64 bits as text.
        return now - datetime.fromtimestamp(int(moment) / 1e6, tz=now.tzinfo)


def keys(tensor: Tensor) -> list[int]:
    """The entity keys that a request carries. Raises BadInput for what is no whole number."""
    where = f"inputs.{tensor.name}"
    if tensor.datatype != "INT64":
        raise BadInput(f"{where}.datatype is {ascii(tensor.datatype[:64])}, wanted INT64")
    data = tensor.data.reshape(-1).tolist() if isinstance(tensor.data, np.ndarray) else tensor.data
    if not isinstance(data, list) or not 1 <= len(data) <= MAX_KEYS:
        raise BadInput(f"{where}.data is no list of 1 to {MAX_KEYS:,} keys")
    if any(type(key) is not int or not -(2**63) <= key < 2**63 for key in data):
        raise BadInput(f"{where}.data holds what is no whole number of 64 bits")
    if tuple(tensor.shape) not in ((len(data),), (len(data), 1)):
        raise BadInput(f"{where}.shape is {list(tensor.shape)}, its data wants [{len(data)}]")
    return data


def connect(url: str, timeout_s: float = 10.0, patience_s: float = 0.0) -> View:
    """What the feature server at ``url`` looks up; it may start up for ``patience_s`` yet.

    Raises Refused when it does not answer by then.
    """
    end = time.monotonic() + patience_s
    while (found := _view(url, timeout_s)) is None and time.monotonic() < end:
        time.sleep(_PAUSE_S)
    if found is None:
        raise Refused(503, f"no feature server answers at {url}/view")
    return found


def _view(url: str, timeout_s: float) -> View | None:
    try:
        answer = httpx.get(f"{url}/view", timeout=timeout_s, trust_env=False)
        answer.raise_for_status()
        return View(**answer.json())
    except (httpx.HTTPError, ValueError, TypeError):
        return None
