"""What may a request look like: the strict V2 contract of one model, and its way to numbers."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd

from perennial.errors import BadInput, many

Matrix = np.ndarray[Any, np.dtype[np.float64]]

OUTPUT = "probability"
MAX_ROWS = 100_000
MAX_ID = 256

# Trees compare in 32 bits: a number beyond their range would become infinite inside the model.
_LARGEST = float(np.finfo(np.float32).max)
_INTEGERS = {
    name: (int(np.iinfo(name.lower()).min), int(np.iinfo(name.lower()).max))
    for name in (f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64))
}
_LIMITS: dict[str, tuple[float, float]] = {
    "FP32": (-_LARGEST, _LARGEST),
    "FP64": (-_LARGEST, _LARGEST),
    **_INTEGERS,
}
_NUMBERS = "FP64, FP32, INT8 to INT64 or UINT8 to UINT64"


class NamedType(Protocol):
    """A feature as a project names it."""

    @property
    def name(self) -> str: ...

    @property
    def type(self) -> Literal["number", "category"]: ...


@dataclass(frozen=True)
class FeatureSpec:
    """One input of the model; categories in the order of their codes."""

    name: str
    type: Literal["number", "category"]
    categories: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tensor:
    """A V2 tensor as it came: data is a JSON list, or an array where it came in binary."""

    name: str
    datatype: str
    shape: tuple[Any, ...]
    data: Any


@dataclass(frozen=True)
class Contract:
    """Names, types and known categories of a model's inputs, in the order of its columns."""

    features: tuple[FeatureSpec, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(f.name for f in self.features)

    @cached_property
    def kinds(self) -> tuple[Literal["number", "category"], ...]:
        return tuple(f.type for f in self.features)

    @cached_property
    def _codes(self) -> dict[str, dict[str, float]]:
        # Binary tensors know no null, so an empty text says "missing", as in a CSV file.
        return {
            f.name: {"": math.nan, **{t: float(code) for code, t in enumerate(f.categories)}}
            for f in self.features
        }

    def to_json(self) -> str:
        """As text that ``from_json`` reads; the same contract gives the same text."""
        return json.dumps({"features": [asdict(f) for f in self.features]}, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Contract":
        """Read what ``to_json`` wrote. Raises BadInput."""
        try:
            return cls.from_plain(json.loads(text))
        except ValueError as exc:
            raise BadInput("the contract is not JSON") from exc

    @classmethod
    def from_plain(cls, document: Any) -> "Contract":
        """Read the parsed JSON of a contract, as a bundle holds it. Raises BadInput."""
        try:
            specs = tuple(_spec(item) for item in document["features"])
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise BadInput(
                "the contract is not a list of features with name, type, categories"
            ) from exc
        if not specs:
            raise BadInput("the contract has no features")
        return cls(specs)

    def encode(self, frame: pd.DataFrame) -> Matrix:
        """Turn a table's columns into one matrix: codes for categories, NaN where missing."""
        missing = [n for n in self.names if n not in frame.columns]
        if missing:
            raise BadInput(f"the table has no column {', '.join(missing)}")
        columns = [self._column(spec, frame[spec.name]) for spec in self.features]
        return np.column_stack(columns).astype(np.float64)

    def _column(self, spec: FeatureSpec, values: "pd.Series[Any]") -> Matrix:
        if spec.type == "category":
            return self._coded(spec, [None if v is None else category(v) for v in _objects(values)])
        try:
            found = pd.to_numeric(values).to_numpy(dtype=np.float64, na_value=np.nan)
        except (ValueError, TypeError) as exc:
            raise BadInput(f"column {spec.name} holds text, wanted numbers") from exc
        return np.where(np.abs(found) <= _LARGEST, found, np.nan)

    def _coded(self, spec: FeatureSpec, texts: Iterable[str | None]) -> Matrix:
        codes, unseen = self._codes[spec.name], float(len(spec.categories))
        return np.array([math.nan if t is None else codes.get(t, unseen) for t in texts])

    def for_model(self, matrix: Matrix) -> Matrix:
        """The same rows with categories that training never saw as missing."""
        known = matrix.copy()
        for column, spec in enumerate(self.features):
            if spec.type == "category":
                known[known[:, column] >= len(spec.categories), column] = math.nan
        return known

    def decode(self, tensors: Sequence[Tensor]) -> Matrix:
        """Turn a request's tensors into one matrix. Raises BadInput that names the input."""
        found: dict[str, Tensor] = {}
        for tensor in tensors:
            if tensor.name in found:
                raise BadInput(f"inputs: {_shown(tensor.name)} is given twice, wanted once")
            found[tensor.name] = tensor
        self._check_names(found)
        rows = _rows(found[self.names[0]])
        matrix = np.empty((rows, len(self.features)))
        for column, spec in enumerate(self.features):
            matrix[:, column] = self._values(spec, found[spec.name], rows)
        return matrix

    def _check_names(self, found: dict[str, Tensor]) -> None:
        unknown = [n for n in found if n not in self._codes]
        if unknown:
            raise BadInput(
                f"inputs: {_shown(unknown[0])} is not an input of this model;"
                f" wanted {', '.join(self.names)}"
            )
        missing = [n for n in self.names if n not in found]
        if missing:
            raise BadInput(f"inputs: {missing[0]} is missing; wanted {', '.join(self.names)}")

    def _values(self, spec: FeatureSpec, tensor: Tensor, rows: int) -> Matrix:
        where = f"inputs.{spec.name}"
        if (seen := _rows(tensor)) != rows:
            raise BadInput(f"{where} has {seen} rows, wanted {rows} as in {self.names[0]}")
        data = _flat(tensor, rows)
        if spec.type == "category":
            return self._coded(spec, _texts(where, tensor.datatype, data))
        return _numbers(where, tensor.datatype, data)

    def to_request(
        self, frame: pd.DataFrame, request_id: str, event_time: datetime | None = None
    ) -> dict[str, Any]:
        """The V2 request (JSON body) that asks for a score of each row."""
        body: dict[str, Any] = {
            "id": request_id,
            "inputs": [_input(spec, frame[spec.name]) for spec in self.features],
        }
        if event_time is not None:
            body["parameters"] = {"event_time": event_time.isoformat()}
        return body

    def metadata(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Inputs and outputs as V2 model metadata tells them."""
        inputs = [{"name": f.name, "datatype": _datatype(f), "shape": [-1]} for f in self.features]
        return inputs, [{"name": OUTPUT, "datatype": "FP64", "shape": [-1]}]


def learn(features: Sequence[NamedType], frame: pd.DataFrame) -> Contract:
    """Make the contract of a model that will be trained on ``frame``."""
    absent = [f"no column {f.name}" for f in features if f.name not in frame.columns]
    if absent:
        raise many("the training table breaks the project", absent)
    return Contract(tuple(_learned(f, frame[f.name]) for f in features))


def category(value: object) -> str:
    """The text of a category; whole floats lose their point: missing values make ints floats."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def _learned(feature: NamedType, values: "pd.Series[Any]") -> FeatureSpec:
    if feature.type == "number":
        return FeatureSpec(feature.name, "number")
    seen = {category(v) for v in values.dropna().unique()}
    return FeatureSpec(feature.name, "category", tuple(sorted(seen)))


def _spec(item: dict[str, Any]) -> FeatureSpec:
    if item["type"] not in ("number", "category"):
        raise ValueError(item["type"])
    return FeatureSpec(
        str(item["name"]), item["type"], tuple(str(c) for c in item.get("categories", ()))
    )


def _datatype(spec: FeatureSpec) -> str:
    return "BYTES" if spec.type == "category" else "FP64"


def _objects(values: "pd.Series[Any]") -> list[Any]:
    found = values.astype(object)
    objects: list[Any] = found.where(found.notna(), None).tolist()
    return objects


def _input(spec: FeatureSpec, values: "pd.Series[Any]") -> dict[str, Any]:
    objects = _objects(values)
    data: list[Any]
    if spec.type == "category":
        data = [None if v is None else category(v) for v in objects]
    else:
        data = [None if v is None or abs(v) > _LARGEST else float(v) for v in objects]
    return {"name": spec.name, "datatype": _datatype(spec), "shape": [len(data)], "data": data}


def _shown(name: object) -> str:
    """A client's own text, short and printable, so that an answer cannot carry anything in."""
    return ascii(str(name)[:64])


def _rows(tensor: Tensor) -> int:
    shape = tensor.shape
    whole = all(isinstance(d, int) and not isinstance(d, bool) for d in shape)
    if not whole or len(shape) not in (1, 2) or (len(shape) == 2 and shape[1] != 1):
        raise BadInput(f"inputs.{tensor.name}.shape is {_shown(list(shape))}, wanted [n] or [n, 1]")
    if not 1 <= shape[0] <= MAX_ROWS:
        raise BadInput(f"inputs.{tensor.name}.shape has {shape[0]} rows, wanted 1 to {MAX_ROWS}")
    return int(shape[0])


def _flat(tensor: Tensor, rows: int) -> Any:
    data = tensor.data
    if not isinstance(data, list | np.ndarray):
        raise BadInput(f"inputs.{tensor.name}.data is missing, wanted a list of {rows} values")
    if len(data) != rows:
        raise BadInput(f"inputs.{tensor.name}.data has {len(data)} values, its shape wants {rows}")
    if isinstance(data, np.ndarray):
        return data.reshape(rows)
    if len(tensor.shape) == 2 and all(isinstance(v, list) and len(v) == 1 for v in data):
        return [v[0] for v in data]
    return data


def _texts(where: str, datatype: str, data: Any) -> list[str | None]:
    if datatype != "BYTES":
        raise BadInput(f"{where}.datatype is {_shown(datatype)}, wanted BYTES")
    return [_text(where, value) for value in data]


def _text(where: str, value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str | bytes):
        raise BadInput(f"{where}.data holds {_shown(value)}, wanted text")
    try:
        if isinstance(value, str):
            value.encode("utf-8")  # JSON can spell half characters, which nothing can write again
            return value
        return value.decode("utf-8")
    except UnicodeError as exc:
        raise BadInput(f"{where}.data holds text that is not UTF-8") from exc


def _numbers(where: str, datatype: str, data: Any) -> Matrix:
    if datatype not in _LIMITS:
        raise BadInput(f"{where}.datatype is {_shown(datatype)}, wanted {_NUMBERS}")
    if isinstance(data, list):
        data = _checked(where, datatype, data)
    values = np.asarray(data, dtype=np.float64)
    if (np.abs(values) > _LARGEST).any():
        raise BadInput(f"{where}.data holds a value beyond 3.4e38, wanted a smaller one or null")
    return values


def _checked(where: str, datatype: str, data: list[Any]) -> list[float | None]:
    low, high = _LIMITS[datatype]
    allowed = (int,) if datatype in _INTEGERS else (int, float)
    for value in data:
        if value is None:
            continue
        if type(value) not in allowed:
            raise BadInput(f"{where}.data holds {_shown(value)}, wanted {datatype} values or null")
        if not low <= value <= high and value == value:
            raise BadInput(f"{where}.data holds {_shown(value)}, wanted {low:g} to {high:g}")
    return data
