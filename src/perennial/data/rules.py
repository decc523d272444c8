"""Which rows break a rule? Row-level expectations of Great Expectations as conditions of DuckDB."""

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from typing import Any

from perennial.data import duck
from perennial.data.duck import column as name
from perennial.project import Expectation

NUMBER, TEXT, TIME, TRUTH = "number", "text", "time", "truth"
Columns = Mapping[str, str]  # name -> one of the four; other types are left to Great Expectations


@dataclass(frozen=True)
class RowRule:
    """One expectation in SQL, over the columns of a table.

    ``looked_at`` holds for the rows that count (of the right kind, and not null where Great
    Expectations skips nulls), ``broken`` for those of them that break the rule; neither is ever
    null. Where the rule forbids repeats, ``broken`` is empty and ``unique`` names what must
    differ. ``columns`` are what an example of a broken row shows.
    """

    looked_at: str
    broken: str
    columns: tuple[str, ...]
    unique: tuple[str, ...] = ()


class Foreign(Exception):
    """Something that DuckDB would not judge as Great Expectations does; no fault of anybody."""


def translate(wanted: Expectation, columns: Columns) -> RowRule | None:
    """The rule as SQL; None where Great Expectations itself must judge, or it is no row's matter.

    Nulls, kinds of rows and both ends of ranges mean what they mean to Great Expectations on
    pandas: a test holds the two equal on the same rows.
    """
    make = _MADE.get(wanted.expect)
    args = {k: v for k, v in wanted.args.items() if v is not None and k != "mostly"}
    if make is None:
        return None
    try:
        kind = kind_of_rows(args, columns)
        rule = make(Arguments(args, columns))
    except Foreign:
        return None
    return replace(rule, looked_at=f"({kind} and {rule.looked_at})")


def kind_of_rows(args: dict[str, Any], columns: Columns) -> str:
    """Take the condition out of the arguments: which rows they are about, in SQL; ``true`` for all.

    Raises Foreign for a condition that only pandas can read.
    """
    condition, parser = args.pop("row_condition", None), args.pop("condition_parser", "pandas")
    if not condition:
        return "true"
    if parser != "pandas" or not isinstance(condition, str):
        raise Foreign
    return _condition(condition, columns)


class Arguments:
    """Arguments of one expectation; a name that is not asked for is foreign."""

    def __init__(self, args: Mapping[str, Any], columns: Columns) -> None:
        self._args = dict(args)
        self._columns = columns

    def take(self, name: str, default: Any = None) -> Any:
        return self._args.pop(name, default)

    def column(self, name: str, *kinds: str) -> str:
        found = self.take(name)
        if self._columns.get(found) not in kinds:
            raise Foreign
        return str(found)

    def columns(self, name: str) -> list[str]:
        found = self.take(name) or ()
        if not found or any(self._columns.get(c) not in PLAIN for c in found):
            raise Foreign
        return list(found)

    def kind(self, column: str) -> str:
        return self._columns[column]

    def done(self) -> None:
        if self._args:
            raise Foreign


PLAIN = (NUMBER, TEXT, TIME, TRUTH)


def _not_null(args: Arguments) -> RowRule:
    column = args.column("column", *PLAIN)
    args.done()
    return RowRule("true", f"{name(column)} is null", (column,))


def _null(args: Arguments) -> RowRule:
    column = args.column("column", *PLAIN)
    args.done()
    return RowRule("true", f"{name(column)} is not null", (column,))


def _between(args: Arguments) -> RowRule:
    column = args.column("column", NUMBER, TIME)
    least, most = args.take("min_value"), args.take("max_value")
    below = "<=" if args.take("strict_min", False) else "<"
    above = ">=" if args.take("strict_max", False) else ">"
    args.done()
    kind, told = args.kind(column), name(column)
    ends = [(below, least), (above, most)]
    broken = [f"{told} {sign} {bound(end, kind)}" for sign, end in ends if end is not None]
    if not broken:
        raise Foreign
    return RowRule(f"{told} is not null", f"({' or '.join(broken)})", (column,))


def bound(value: Any, kind: str) -> str:
    """One end of a range as SQL. Raises Foreign for a value of another kind."""
    if kind == NUMBER and isinstance(value, int | float) and not isinstance(value, bool):
        return literal(value)
    if kind == TIME and isinstance(value, datetime | date):
        return literal(value)
    if kind == TIME and isinstance(value, str):
        return literal(_moment(value))
    raise Foreign


def _moment(text: str) -> datetime:
    """A date as it comes back from JSON, such as that of a bundle's project."""
    try:
        return datetime.fromisoformat(text)
    except ValueError as exc:
        raise Foreign from exc


def _in_set(args: Arguments) -> RowRule:
    return _set(args, "not in")


def _not_in_set(args: Arguments) -> RowRule:
    return _set(args, "in")


def _set(args: Arguments, broken: str) -> RowRule:
    column = args.column("column", NUMBER, TEXT)
    values = list(args.take("value_set") or ())
    args.done()
    wanted = (str,) if args.kind(column) == TEXT else (int, float)
    if not values or not all(isinstance(v, wanted) and not isinstance(v, bool) for v in values):
        raise Foreign
    told = ", ".join(literal(value) for value in values)
    return RowRule(f"{name(column)} is not null", f"{name(column)} {broken} ({told})", (column,))


def _regex(args: Arguments) -> RowRule:
    return _matches(args, "not ")


def _not_regex(args: Arguments) -> RowRule:
    return _matches(args, "")


def _matches(args: Arguments, broken: str) -> RowRule:
    column, pattern = args.column("column", TEXT), args.take("regex")
    args.done()
    if not isinstance(pattern, str) or _ODD_PATTERN.search(pattern):
        raise Foreign
    told = f"{broken}regexp_matches({name(column)}, {literal(pattern)})"
    return RowRule(f"{name(column)} is not null", told, (column,))


# What RE2 has not, or reads in another way than Python.
_ODD_PATTERN = re.compile(r"\(\?|\\[1-9AbBdDsSwWZ]|\$")


def _lengths(args: Arguments) -> RowRule:
    column = args.column("column", TEXT)
    least, most = args.take("min_value"), args.take("max_value")
    args.done()
    told = f"length({name(column)})"
    ends = [("<", least), (">", most)]
    broken = [f"{told} {sign} {int(end)}" for sign, end in ends if end is not None]
    if not broken:
        raise Foreign
    return RowRule(f"{name(column)} is not null", f"({' or '.join(broken)})", (column,))


def _unique(args: Arguments) -> RowRule:
    column = args.column("column", *PLAIN)
    args.done()
    return RowRule(f"{name(column)} is not null", "", (column,), (column,))


def _unique_together(args: Arguments) -> RowRule:
    columns = tuple(args.columns("column_list"))
    ignored = args.take("ignore_row_if", "all_values_are_missing")
    args.done()
    return RowRule(_present(columns, ignored), "", columns, columns)


def _pair_equal(args: Arguments) -> RowRule:
    return _pair(args, "is distinct from")


def _pair_greater(args: Arguments) -> RowRule:
    return _pair(args, "<" if args.take("or_equal", False) else "<=")


def _pair(args: Arguments, broken: str) -> RowRule:
    one, other = args.column("column_A", *PLAIN), args.column("column_B", *PLAIN)
    ignored = args.take("ignore_row_if", "both_values_are_missing")
    args.done()
    if args.kind(one) != args.kind(other):
        raise Foreign
    # A comparison with what is missing holds nowhere, so it breaks the rule.
    said = f"{name(one)} {broken} {name(other)}"
    return RowRule(_present([one, other], ignored), f"coalesce({said}, true)", (one, other))


def _present(columns: Sequence[str], ignored: str) -> str:
    present = [f"{name(c)} is not null" for c in columns]
    if ignored in ("all_values_are_missing", "both_values_are_missing"):
        return f"({' or '.join(present)})"
    if ignored in ("any_value_is_missing", "either_value_is_missing"):
        return f"({' and '.join(present)})"
    if ignored in ("never", "neither"):
        return "true"
    raise Foreign


_MADE: dict[str, Callable[[Arguments], RowRule]] = {
    "ExpectColumnValuesToNotBeNull": _not_null,
    "ExpectColumnValuesToBeNull": _null,
    "ExpectColumnValuesToBeBetween": _between,
    "ExpectColumnValuesToBeInSet": _in_set,
    "ExpectColumnValuesToNotBeInSet": _not_in_set,
    "ExpectColumnValuesToMatchRegex": _regex,
    "ExpectColumnValuesToNotMatchRegex": _not_regex,
    "ExpectColumnValueLengthsToBeBetween": _lengths,
    "ExpectColumnValuesToBeUnique": _unique,
    "ExpectCompoundColumnsToBeUnique": _unique_together,
    "ExpectColumnPairValuesToBeEqual": _pair_equal,
    "ExpectColumnPairValuesAToBeGreaterThanB": _pair_greater,
}


def literal(value: Any) -> str:
    """A value as SQL. Raises TypeError for what is neither number, text, truth nor time."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        # In quotation marks also what is no finite number.
        return f"'{value!r}'::double" if isinstance(value, float) else str(value)
    if isinstance(value, datetime):
        return f"timestamptz '{value.isoformat()}'"
    if isinstance(value, date):
        return f"timestamp '{value.isoformat()}'"
    if isinstance(value, str):
        return duck.quoted(value)
    raise TypeError(f"{value!r} is no plain value")


# Conditions of pandas: which rows a rule is about.

_SIGNS: dict[type[ast.cmpop], str] = {
    ast.Eq: "is not distinct from",
    ast.NotEq: "is distinct from",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
_TESTS = {"startswith": "starts_with", "endswith": "ends_with"}


def _condition(text: str, columns: Columns) -> str:
    """A condition as pandas' ``query`` reads it, in SQL that is never null."""
    try:
        return _Condition(columns).of(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as exc:
        raise Foreign from exc


class _Condition:
    def __init__(self, columns: Columns) -> None:
        self._columns = columns

    def of(self, node: ast.expr) -> str:
        match node:
            case ast.BoolOp(op=op, values=values):
                word = " and " if isinstance(op, ast.And) else " or "
                return f"({word.join(self.of(v) for v in values)})"
            case ast.BinOp(left=left, op=ast.BitAnd() | ast.BitOr() as op, right=right):
                word = "and" if isinstance(op, ast.BitAnd) else "or"
                return f"({self.of(left)} {word} {self.of(right)})"
            case ast.UnaryOp(op=ast.Not() | ast.Invert(), operand=operand):
                return f"(not {self.of(operand)})"
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _SIGNS:
                if self._kind(left) != self._kind(right):
                    raise Foreign
                said = f"{self._value(left)} {_SIGNS[type(op)]} {self._value(right)}"
                return f"coalesce({said}, false)"
            case ast.Call(func=ast.Attribute() as called, args=args, keywords=[]):
                return self._call(called, args)
        raise Foreign

    def _call(self, called: ast.Attribute, args: list[ast.expr]) -> str:
        match called, args:
            case ast.Attribute(value=ast.Name() as column, attr="isna" | "isnull"), []:
                return f"({self._value(column)} is null)"
            case ast.Attribute(value=ast.Name() as column, attr="notna" | "notnull"), []:
                return f"({self._value(column)} is not null)"
            case ast.Attribute(value=ast.Attribute(value=ast.Name() as column, attr="str")), [
                ast.Constant(value=str() as part)
            ] if called.attr in _TESTS and self._kind(column) == TEXT:
                told = f"{_TESTS[called.attr]}({self._value(column)}, {literal(part)})"
                return f"coalesce({told}, false)"
        raise Foreign

    def _kind(self, node: ast.expr) -> str:
        match node:
            case ast.Name(id=column):
                return self._columns.get(column, "")
            case ast.Constant(value=bool()):
                return TRUTH
            case ast.Constant(value=str()):
                return TEXT
        return NUMBER

    def _value(self, node: ast.expr) -> str:
        match node:
            case ast.Name(id=column) if column in self._columns:
                return name(column)
            case ast.Constant(value=bool() | int() | float() | str() as value):
                return literal(value)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                return literal(-value)
        raise Foreign
