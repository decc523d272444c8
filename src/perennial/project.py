"""What does the user want: one ``project.yaml`` as a validated, frozen record."""

import ast
import keyword
import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema

from perennial.errors import BadInput, many

_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 604800}
_LENGTH = re.compile(r"(\d+)\s*(s|min|h|d|w)")


def parse_length(text: object) -> timedelta:
    """Turn ``60d``, ``30min``, ``12h``, ``2w`` into a length of time. Raises ValueError."""
    if isinstance(text, timedelta):
        return text
    match = _LENGTH.fullmatch(str(text).strip())
    if not match:
        raise ValueError("a length of time such as 60d, 12h, 30min or 2w")
    return timedelta(seconds=int(match[1]) * _UNITS[match[2]])


def tell_length(length: timedelta) -> str:
    """Write a length of time as ``parse_length`` reads it: in days if they are whole."""
    seconds = int(length.total_seconds())
    unit = next(u for u in ("d", "h", "min", "s") if seconds % _UNITS[u] == 0)
    return f"{seconds // _UNITS[unit]}{unit}"


def parse_moment(value: object) -> datetime:
    """Turn an ISO date or time into an aware UTC moment. Raises ValueError."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value.replace("Z", "+00:00"))
        except ValueError:
            raise ValueError("a date such as 2011-06-01") from None
    if isinstance(value, datetime):
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC)
    raise ValueError("a date such as 2011-06-01")


Length = Annotated[
    timedelta,
    BeforeValidator(parse_length),
    PlainSerializer(tell_length, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "pattern": r"^\s*\d+\s*(s|min|h|d|w)\s*$"}),
]
Moment = Annotated[
    datetime,
    BeforeValidator(parse_moment),
    WithJsonSchema({"type": "string", "examples": ["2011-06-01", "2011-06-01T12:00:00Z"]}),
]


class Part(BaseModel):
    """A part of a project: frozen, and a key that it does not know is a fault."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Shift(Part):
    """A change that the simulator plants in its history."""

    kind: Annotated[
        Literal["newcomers", "misbooked", "prices"],
        Field(
            description="newcomers: customers of another kind join; misbooked: purchases are booked"
            " to wrong customers, so labels are wrong; prices: unit prices change."
        ),
    ]
    start: Annotated[Moment, Field(description="First day of the change.")]
    end: Annotated[Moment | None, Field(description="Day after the last one; none: it stays.")] = (
        None
    )
    size: Annotated[
        float, Field(gt=0, description="Share of customers or purchases, or factor of prices.")
    ] = 0.5


class Simulator(Part):
    """Seeded purchases of invented customers, in the schema of UCI Online Retail."""

    seed: Annotated[int, Field(ge=0, description="Same seed, same rows.")] = 7
    start: Annotated[Moment, Field(description="First day.")] = datetime(2010, 12, 1, tzinfo=UTC)
    days: Annotated[int, Field(ge=30, le=3650, description="Length of the history in days.")] = 400
    customers: Annotated[int, Field(ge=50, le=100_000, description="Customers at the start.")] = (
        1200
    )
    shifts: Annotated[tuple[Shift, ...], Field(description="Planted changes.")] = ()


class Source(Part):
    """Where raw rows come from: files, a query of a database, or a simulator; ``--source`` names
    files instead.
    """

    path: Annotated[
        str | None,
        Field(
            description="CSV (also .gz) or Parquet file; several by a pattern (data/2011-*.csv), in"
            " order of their names; or s3://bucket/key, also with a pattern."
        ),
    ] = None
    wanted: Annotated[str, Field(description="What file to give when none is there.")] = (
        "a CSV or Parquet file"
    )
    url: Annotated[
        str | None,
        Field(
            description="Database by its SQLAlchemy URL, such as postgresql://role@host/database or"
            " sqlite:///file.db, without a password; PERENNIAL_SOURCE_URL overrides it."
        ),
    ] = None
    query: Annotated[
        str | None,
        Field(description="SELECT that gives the rows; only ORDER BY makes their order certain."),
    ] = None
    simulator: Annotated[
        Simulator | None, Field(description="Invent the rows (transactions only).")
    ] = None
    header: Annotated[bool, Field(description="Does a CSV begin with column names?")] = True
    join_times: Annotated[
        str | None,
        Field(description="File beside the source with one row number and one time a row (CSV)."),
    ] = None

    @model_validator(mode="after")
    def _one_place(self) -> "Source":
        given = [k for k in ("path", "query", "simulator") if getattr(self, k) is not None]
        if len(given) > 1:
            raise ValueError(f"one of path, query and simulator, not {' and '.join(given)}")
        if self.url is not None and self.query is None:
            raise ValueError("a query beside url, such as SELECT * FROM purchases ORDER BY id")
        if self.query is not None and self.join_times is not None:
            raise ValueError("join_times with files only; join the times in the query")
        return self

    @model_validator(mode="after")
    def _no_password(self) -> "Source":
        # Told as a fault of the whole part: a fault of the key itself would quote the password.
        if self.url is not None and _has_password(self.url):
            raise ValueError(
                "url without a password; give all of it by the setting PERENNIAL_SOURCE_URL, on a"
                " cluster from a Secret"
            )
        return self


def _has_password(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return "@" in url
    return bool(parts.password) or "password=" in parts.query.lower()


class RowOrder(Part):
    """Rows stand in order of time, without a time column: row i happens at start + i * step."""

    start: Annotated[Moment, Field(description="Moment of the first row.")] = datetime(
        2000, 1, 1, tzinfo=UTC
    )
    step: Annotated[Length, Field(description="Time from one row to the next.")] = timedelta(
        minutes=1
    )


class Time(Part):
    """When a row happened: a column says it, or the order of the rows does."""

    column: Annotated[str | None, Field(description="Column that says when a row happened.")] = None
    row_order: Annotated[RowOrder | None, Field(description="Rows are in order instead.")] = None

    @model_validator(mode="after")
    def _one_of_two(self) -> "Time":
        if (self.column is None) == (self.row_order is None):
            raise ValueError("exactly one of column and row_order")
        return self


class Label(Part):
    """What is predicted, and when its truth is known."""

    column: Annotated[
        str | None, Field(description="Column to predict (none for transactions).")
    ] = None
    positive: Annotated[str, Field(description="Value that counts as 1.")] = "1"
    horizon: Annotated[
        Length, Field(description="Transactions: churned if no purchase in this time.")
    ] = timedelta(days=60)
    known_after: Annotated[
        Length, Field(description="How long after the row's time its label is known.")
    ] = timedelta(0)
    max_change: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="Most change of the share of positives since the last accepted snapshot.",
        ),
    ] = 0.10


class Feature(Part):
    """One column that the model sees."""

    name: Annotated[str, Field(description="Column of the table.")]
    type: Annotated[Literal["number", "category"], Field(description="How it is read.")]
    owner: Annotated[str, Field(description="Who answers for it.")] = ""
    description: Annotated[str, Field(description="What it says, in a few words.")] = ""
    missing: Annotated[
        Literal["fail", "last_known", "allow"],
        Field(
            description="Without a value: fail refuses the row; last_known takes the entity's last"
            " one within max_age, and refuses beyond; allow leaves it missing to the model."
        ),
    ] = "allow"
    max_age: Annotated[
        Length | None,
        Field(description="Greatest age of a value that is looked up; an older one is missing."),
    ] = None

    vouched: Annotated[
        bool,
        Field(
            description="Somebody vouches that it is known when the prediction is wanted: the leak"
            " check then accuses it by its time only, not by what it tells."
        ),
    ] = False

    @model_validator(mode="after")
    def _bounded(self) -> "Feature":
        if self.missing == "last_known" and not self.max_age:
            raise ValueError("max_age: how old the last known value may be, such as 28d")
        return self


class Expectation(Part):
    """One Great Expectations expectation under its own name and arguments.

    An argument may speak of the last accepted snapshot: ``{of_last: 0.5}`` is half of what the same
    expectation observed there, and ``partition_object: last_accepted`` its distribution.
    """

    expect: Annotated[str, Field(description="Name, such as ExpectColumnValuesToNotBeNull.")]
    layer: Annotated[
        Literal["schema", "statistics", "business"],
        Field(description="Under which heading the validation page shows it."),
    ] = "schema"
    severity: Annotated[
        Literal["critical", "warning", "info"],
        Field(description="critical stops the run; the others are only reported."),
    ] = "critical"
    rows: Annotated[
        Literal["quarantine", "keep"] | None,
        Field(
            description="What becomes of rows that break it; none: quarantine where it is critical"
            " and each row must keep it (no mostly), else keep."
        ),
    ] = None
    args: Annotated[
        dict[str, Any],
        Field(
            description="Arguments, such as column and mostly; a number may be {of_last: 0.5}, that"
            " many times what the last accepted snapshot showed."
        ),
    ] = {}

    @model_validator(mode="after")
    def _of_last(self) -> "Expectation":
        for key, value in self.args.items():
            factor = value.get(OF_LAST) if isinstance(value, dict) else None
            if isinstance(value, dict) and OF_LAST in value and not _is_factor(value):
                raise ValueError(f"args.{key}: {{of_last: a number above 0}}, not {factor!r}")
        return self

    @property
    def mostly(self) -> float:
        """Share of rows that must keep it."""
        return float(self.args.get("mostly") or 1.0)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that it names, also in the condition that says which rows it is about."""
        named = [self.args[key] for key in ("column", "column_A", "column_B") if key in self.args]
        for key in ("column_list", "column_set"):
            named += self.args.get(key) or []
        named += _of_condition(str(self.args.get("row_condition") or ""))
        return tuple(dict.fromkeys(str(column) for column in named))


OF_LAST, LAST_ACCEPTED = "of_last", "last_accepted"
_NAME = re.compile(r"`([^`]+)`|(?<![\w.])([A-Za-z_]\w*)")
_BACKED = re.compile(r"`([^`]+)`")
_QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")


def words(text: str) -> list[str]:
    """Words that may be columns: those that do not stand in quotation marks or behind a point."""
    return [quoted or word for quoted, word in _NAME.findall(_QUOTED.sub(" ", text))]


def _of_condition(text: str) -> list[str]:
    """Columns that a condition of pandas names: what it calls, such as abs, is none."""
    backed = dict.fromkeys(_BACKED.findall(text))
    plain = _BACKED.sub(lambda found: f"_backed_{[*backed].index(found[1])}", text)
    try:
        tree = ast.parse(plain.strip() or "None", mode="eval")
    except SyntaxError:
        return [word for word in words(text) if not keyword.iskeyword(word)]
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    told = {f"_backed_{place}": name for place, name in enumerate(backed)}
    return [told.get(node.id, node.id) for node in found if id(node) not in called]


def _is_factor(value: dict[str, Any]) -> bool:
    factor = value[OF_LAST]
    is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
    return len(value) == 1 and is_number and factor > 0


class Quarantine(Part):
    """When rows that break rules are kept aside, and when there are too many of them."""

    max_share: Annotated[
        float,
        Field(ge=0, le=1, description="Most rows kept aside, as a share; more stop the run."),
    ] = 0.05


class Search(Part):
    """Ranges that Optuna searches; both ends included."""

    max_depth: Annotated[tuple[int, int], Field(description="Depth of a tree.")] = (2, 6)
    eta: Annotated[tuple[float, float], Field(description="Learning rate.")] = (0.03, 0.3)
    min_child_weight: Annotated[
        tuple[float, float], Field(description="Least weight in a leaf.")
    ] = (1.0, 20.0)
    subsample: Annotated[tuple[float, float], Field(description="Share of rows a tree sees.")] = (
        0.6,
        1.0,
    )
    colsample_bytree: Annotated[
        tuple[float, float], Field(description="Share of features a tree sees.")
    ] = (0.5, 1.0)
    reg_lambda: Annotated[tuple[float, float], Field(description="L2 penalty.")] = (0.5, 10.0)


class Training(Part):
    """How a model is searched for and fitted."""

    trials: Annotated[int, Field(ge=1, le=1000, description="Optuna trials.")] = 20
    folds: Annotated[int, Field(ge=2, le=10, description="Time-ordered folds.")] = 3
    rounds: Annotated[int, Field(ge=10, le=5000, description="Most boosting rounds.")] = 200
    metric: Annotated[
        Literal["auc", "logloss", "aucpr"], Field(description="What the search improves.")
    ] = "auc"
    seed: Annotated[int, Field(ge=0, description="Same seed and data, same model.")] = 7
    min_rows: Annotated[int, Field(ge=50, description="Fewest labelled rows.")] = 300
    keep: Annotated[
        Length | None, Field(description="Train on rows this recent only; none: on all.")
    ] = None
    search: Annotated[Search, Field(description="Ranges that Optuna searches.")] = Search()


class Gates(Part):
    """Limits a candidate must keep; a missing or NaN measurement fails."""

    min_auc: Annotated[float, Field(ge=0, le=1, description="Least AUC on the holdout.")] = 0.60
    min_gain: Annotated[
        float, Field(description="Lower bound of AUC gained over the champion must exceed this.")
    ] = 0.0
    confidence: Annotated[float, Field(gt=0.5, lt=1, description="Of that lower bound.")] = 0.95
    max_calibration_error: Annotated[
        float, Field(gt=0, le=1, description="Most expected calibration error, 10 bins.")
    ] = 0.20
    min_parity_ratio: Annotated[
        float | None, Field(description="Least demographic parity ratio; none: reported only.")
    ] = None
    max_p95_ms: Annotated[
        float, Field(gt=0, description="Most milliseconds to score one row, 95th percentile.")
    ] = 100.0
    min_rows: Annotated[int, Field(ge=20, description="Fewest rows to judge on.")] = 100
    holdout_windows: Annotated[
        int, Field(ge=1, description="Newest labelled windows that judge, kept from training.")
    ] = 1


class Window(Part):
    """How served rows are cut into windows of event time."""

    every: Annotated[
        str, Field(description="7d, 12h, 30min, month, or '336 rows' with row_order.")
    ] = "7d"
    min_rows: Annotated[int, Field(ge=20, description="Thinner windows are not judged.")] = 100

    @model_validator(mode="after")
    def _readable(self) -> "Window":
        if self.every != "month" and not re.fullmatch(r"\d+ rows", self.every):
            parse_length(self.every)
        return self


class Drift(Part):
    """How a window of served rows is compared with reference rows."""

    p_value: Annotated[float, Field(gt=0, lt=1, description="Before Bonferroni.")] = 0.05
    reference_rows: Annotated[
        int, Field(ge=50, le=100_000, description="Most reference rows in a bundle.")
    ] = 1000
    reference_windows: Annotated[
        int, Field(ge=1, description="Newest windows before training that reference rows are from.")
    ] = 4
    window_rows: Annotated[int, Field(ge=50, description="Most rows tested in a window.")] = 1000
    ignore: Annotated[
        tuple[str, ...], Field(description="Features that change by nature, such as a season.")
    ] = ()
    backend: Annotated[
        Literal["alibi-detect", "scipy"],
        Field(description="Same results; alibi-detect is not free for production use, scipy is."),
    ] = "alibi-detect"


class Retraining(Part):
    """When confirmed drift is worth a training."""

    persistence: Annotated[
        int, Field(ge=1, description="Drifted windows in a row before training is spent.")
    ] = 2
    min_labelled_windows: Annotated[
        int, Field(ge=0, description="Drifted windows whose labels must be known first.")
    ] = 1
    cooldown: Annotated[Length, Field(description="Event time between two retrainings.")] = (
        timedelta(days=28)
    )


class Rollout(Part):
    """How a new version earns its traffic, and what sends it back."""

    steps: Annotated[tuple[int, ...], Field(description="Percent of traffic, rising to 100.")] = (
        10,
        50,
        100,
    )
    min_requests: Annotated[int, Field(ge=1, description="Canary requests judged at a step.")] = 30
    interval_s: Annotated[float, Field(gt=0, description="Seconds between two looks.")] = 1.0
    deadline_s: Annotated[float, Field(gt=0, description="Most seconds at one step.")] = 120.0
    ready_s: Annotated[float, Field(gt=0, description="Most seconds to become ready.")] = 90.0
    max_error_rate: Annotated[
        float, Field(ge=0, le=1, description="Most server-caused errors, as a share.")
    ] = 0.01
    max_p95_ms: Annotated[
        float, Field(gt=0, description="Most milliseconds of a request, 95th percentile.")
    ] = 250.0
    max_p95_ratio: Annotated[float, Field(gt=1, description="Against stable, same time.")] = 3.0
    max_invalid_rate: Annotated[
        float, Field(ge=0, le=1, description="Most answers that are no probability, as a share.")
    ] = 0.0

    @model_validator(mode="after")
    def _rising(self) -> "Rollout":
        if not self.steps or self.steps[-1] != 100 or list(self.steps) != sorted(set(self.steps)):
            raise ValueError("rising percentages that end with 100, such as [10, 50, 100]")
        if self.steps[0] < 1:
            raise ValueError("percentages of at least 1")
        return self


class Serving(Part):
    """What the servers do besides scoring the rows that they are sent."""

    lookup: Annotated[
        bool,
        Field(
            description="Run Feast's feature server too: a request may then carry the entity's key"
            " (customer_id) alone, and its newest features are looked up."
        ),
    ] = False


class Replay(Part):
    """Which part of the history trains the first model, and which is replayed."""

    train_until: Annotated[
        Moment | None, Field(description="History before this trains the first model.")
    ] = None
    train_share: Annotated[
        float, Field(gt=0, lt=1, description="Share of rows instead, when no date is given.")
    ] = 0.4
    until: Annotated[Moment | None, Field(description="Stop here; none: at the end.")] = None


class Project(Part):
    """A validated ``project.yaml``."""

    name: Annotated[
        str,
        Field(
            pattern=r"^[a-z][a-z0-9-]{0,38}$",
            description="Names the service and its state folder: small letters, digits, hyphens.",
        ),
    ]
    kind: Annotated[
        Literal["table", "transactions"],
        Field(description="table: a row is an example; transactions: retail churn from purchases."),
    ]
    source: Annotated[Source, Field(description="Where raw rows come from.")] = Source()
    time: Annotated[Time, Field(description="When a row happened.")]
    label: Annotated[Label, Field(description="What is predicted.")]
    entity: Annotated[str | None, Field(description="Column that names who a row is about.")] = None
    features: Annotated[
        tuple[Feature, ...], Field(min_length=1, description="Columns that the model sees.")
    ]
    sensitive: Annotated[tuple[str, ...], Field(description="Columns fairness looks at.")] = ()
    expectations: Annotated[
        tuple[Expectation, ...], Field(description="What raw rows must keep.")
    ] = ()
    quarantine: Annotated[Quarantine, Field(description="How many rows may be kept aside.")] = (
        Quarantine()
    )
    training: Annotated[Training, Field(description="How a model is fitted.")] = Training()
    gates: Annotated[Gates, Field(description="Limits of a candidate.")] = Gates()
    window: Annotated[Window, Field(description="How served rows are cut.")] = Window()
    drift: Annotated[Drift, Field(description="How a window is tested.")] = Drift()
    retraining: Annotated[Retraining, Field(description="When to train again.")] = Retraining()
    rollout: Annotated[Rollout, Field(description="How traffic moves.")] = Rollout()
    serving: Annotated[Serving, Field(description="What the servers do besides.")] = Serving()
    replay: Annotated[Replay, Field(description="How history is replayed.")] = Replay()

    @model_validator(mode="after")
    def _consistent(self) -> "Project":
        names = {f.name for f in self.features}
        if len(names) < len(self.features):
            raise ValueError("features: names that differ")
        unknown = set(self.drift.ignore) - names
        if unknown:
            raise ValueError(f"drift.ignore: names of features, not {sorted(unknown)}")
        if self.kind == "table" and not self.label.column:
            raise ValueError("label.column: the column to predict")
        if self.kind == "transactions" and not self.time.column:
            raise ValueError("time.column: transactions need a time column")
        if self.window.every.endswith("rows") and not self.time.row_order:
            raise ValueError("window.every: a length of time, because there is a time column")
        return self

    @property
    def feature_names(self) -> tuple[str, ...]:
        return tuple(f.name for f in self.features)

    @property
    def watched(self) -> tuple[str, ...]:
        """Features whose drift counts."""
        return tuple(n for n in self.feature_names if n not in self.drift.ignore)

    @property
    def origin(self) -> datetime:
        """Moment that windows are aligned to (weeks begin on a Monday without row order)."""
        if self.time.row_order:
            return self.time.row_order.start
        return datetime(2000, 1, 3, tzinfo=UTC)

    def _length(self) -> timedelta:
        if self.window.every.endswith(" rows") and self.time.row_order:
            return int(self.window.every.split()[0]) * self.time.row_order.step
        return parse_length(self.window.every)

    def window_start(self, moment: datetime) -> datetime:
        """Start of the window that holds ``moment`` (UTC)."""
        if self.window.every == "month":
            return datetime(moment.year, moment.month, 1, tzinfo=UTC)
        length = self._length()
        return self.origin + ((moment - self.origin) // length) * length

    def window_end(self, start: datetime) -> datetime:
        """First moment after the window that starts at ``start``."""
        if self.window.every == "month":
            return datetime(start.year + start.month // 12, start.month % 12 + 1, 1, tzinfo=UTC)
        return start + self._length()

    def windows(self, since: datetime, until: datetime) -> Iterator[tuple[datetime, datetime]]:
        """Windows that end at or before ``until``, the first one starting at or after ``since``."""
        start = self.window_start(since)
        if start < since:
            start = self.window_end(start)
        while (end := self.window_end(start)) <= until:
            yield start, end
            start = end


def load(path: Path) -> Project:
    """Read a project folder or its ``project.yaml``. Raises BadInput that tells every fault."""
    file = path / "project.yaml" if path.is_dir() else path
    if not file.is_file():
        raise BadInput(
            f"no project at {file}; give a folder with a project.yaml, or run"
            " 'perennial init TABLE' to write one"
        )
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        first = " ".join(str(exc).split())
        raise BadInput(f"{file} is not readable YAML: {first}") from exc
    if not isinstance(raw, dict):
        raise BadInput(f"{file} holds {type(raw).__name__}, wanted keys such as name, kind, label")
    try:
        return Project.model_validate(raw)
    except ValidationError as exc:
        raise many(
            f"{file} is not a valid project", [_fault(dict(e)) for e in exc.errors()]
        ) from exc


def _fault(error: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "project"
    wanted = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"{key} is not a known key; remove it or mend its spelling"
    if error["type"] == "missing":
        return f"{key} is missing"
    seen = error["input"]
    if isinstance(seen, dict | BaseModel):
        return f"{key}: wanted {wanted}"
    return f"{key} is {seen!r}, wanted: {wanted}"


class _SchemaWriter(GenerateJsonSchema):
    def encode_default(self, dft: Any) -> Any:
        return tell_length(dft) if isinstance(dft, timedelta) else super().encode_default(dft)


def schema() -> dict[str, Any]:
    """JSON schema of ``project.yaml``."""
    return Project.model_json_schema(schema_generator=_SchemaWriter)
