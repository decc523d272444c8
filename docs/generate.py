"""Write the reference pages that follow from the code; ``--check`` says which are not current."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perennial import cli, project
from perennial.settings import PREFIX, Settings

DOCS = Path(__file__).resolve().parent
NOTE = "<!-- Written by docs/generate.py; run 'make docs' after a change. -->\n\n"


def settings_page() -> str:
    """All that the environment decides."""
    schema = Settings.model_json_schema()["properties"]
    rows = [
        (f"`{PREFIX}{name.upper()}`", _setting_default(name), schema[name]["description"])
        for name in Settings.model_fields
    ]
    return (
        f"{NOTE}# Settings\n\nRead once from the environment, by the command that starts. A value"
        " that does not fit is told in one line and ends the command with exit code 2.\n\n"
        f"{_table(('variable', 'default', 'meaning'), rows)}"
    )


def _setting_default(name: str) -> str:
    value = Settings.model_fields[name].default
    if name == "root":
        return "where perennial is installed from"
    if name == "runtime_python":
        return "`.venv-runtime/bin/python` beside the environment in use"
    return f"`{value}`" if str(value) else "empty"


def project_page() -> str:
    """Every key of project.yaml, part by part."""
    schema = project.schema()
    parts = [_part("project.yaml", schema)]
    order = _in_order(schema, schema["$defs"])
    parts += [_part(name, schema["$defs"][name]) for name in order]
    return (
        f"{NOTE}# project.yaml\n\nOne file says what a project is. A key not listed here"
        " is a fault; all faults are told at once, each with its key, value and what was wanted."
        " `perennial project check FOLDER` says them without doing anything.\n\n"
        "Lengths of time are written `60d`, `12h`, `30min`, `2w`; moments `2011-06-01` (UTC). "
        "The same as a JSON schema, for editors: [project.schema.json](project.schema.json), or"
        " `perennial project schema`.\n\n" + "\n".join(parts)
    )


def _in_order(schema: dict[str, Any], defs: dict[str, Any]) -> list[str]:
    """Names of parts, each after the one that mentions it first."""
    found: list[str] = []
    for name in _mentioned(schema):
        found += [n for n in (name, *_in_order(defs[name], defs)) if n not in found]
    return found


def _mentioned(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        inside = {k: v for k, v in node.items() if k != "$defs"}
        if "$ref" in inside:
            yield str(inside["$ref"]).rsplit("/", 1)[-1]
        for value in inside.values():
            yield from _mentioned(value)
    if isinstance(node, list):
        for value in node:
            yield from _mentioned(value)


def _part(name: str, schema: dict[str, Any]) -> str:
    required = set(schema.get("required", ()))
    rows = [
        (
            f"`{key}`",
            _type(field),
            "**required**" if key in required else _default(field),
            field["description"],
        )
        for key, field in schema["properties"].items()
    ]
    about = schema.get("description", "").replace("``", "`")
    return f"## {name}\n\n{about}\n\n{_table(('key', 'value', 'default', 'meaning'), rows)}"


def _type(field: dict[str, Any]) -> str:
    if "$ref" in field:
        name = field["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in field:
        return " or ".join(_type(kind) for kind in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field.get("type") == "array":
        pair = field.get("prefixItems")
        return f"two {_type(pair[0])}s" if pair else f"list of {_type(field['items'])}"
    return _plain_type(field)


def _plain_type(field: dict[str, Any]) -> str:
    words = {
        "string": "text",
        "integer": "whole number",
        "boolean": "true or false",
        "null": "none",
    }
    words["object"] = "mapping"
    base = words.get(field.get("type", ""), field.get("type", "any"))
    if "examples" in field:
        return "moment"
    if "min|h" in field.get("pattern", ""):
        return "length of time"
    signs = {"minimum": "≥", "maximum": "≤", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}
    limits = [f"{sign} {field[key]:g}" for key, sign in signs.items() if key in field]
    return " ".join([base, ", ".join(limits)]).strip()


def _default(field: dict[str, Any]) -> str:
    value = field.get("default")
    if isinstance(value, dict) or "$ref" in field:
        return "each key's own"
    if value in (None, [], ""):
        return "none"
    return f"`{json.dumps(value) if not isinstance(value, str) else value}`"


def cli_page() -> str:
    """Help of every command, as argparse prints it."""
    parser = cli.build_parser()
    parts = [f"```text\n{cli.OVERVIEW.rstrip()}\n```\n"]
    parts += [
        f"## {name}\n\n{_sentence(command)}\n\n```text\n{_help(command)}\n```\n"
        for name, command in commands(parser)
    ]
    codes = _table(
        ("exit code", "meaning"),
        [
            ("0", "done"),
            ("2", "a file, key, value or argument is wrong; one line says which and what to do"),
            ("3", "a server, port or lease is not to be had now; try again later"),
            ("4", "a pipeline run ended without a result; the line names the step"),
            ("5", "the loop did not do what it promises"),
            ("130", "stopped by Ctrl-C; everything that was started is stopped"),
        ],
    )
    return f"{NOTE}# Commands\n\n" + "\n".join(parts) + f"\n## Exit codes\n\n{codes}"


def commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command that does something, with its full name."""
    inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not inner:
        yield parser.prog, parser
    for action in inner:
        for command in action.choices.values():
            yield from commands(command)


def _sentence(parser: argparse.ArgumentParser) -> str:
    return parser.description or ""


def _help(parser: argparse.ArgumentParser) -> str:
    parser.formatter_class = _wide
    parser.description = None
    return parser.format_help().rstrip()


def _wide(prog: str) -> argparse.HelpFormatter:
    """Help of one width, whatever the terminal."""
    return argparse.HelpFormatter(prog, width=96, max_help_position=28)


def schema_text() -> str:
    """JSON schema of project.yaml, for editors."""
    return json.dumps(project.schema(), indent=2, sort_keys=True) + "\n"


PAGES = {
    "settings.md": settings_page,
    "project-yaml.md": project_page,
    "project.schema.json": schema_text,
    "cli.md": cli_page,
}


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(_cell(c) for c in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("``", "`").split())


def main() -> int:
    """Write all pages, or with ``--check`` name those that differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing, exit 1 if not current"
    )
    check = parser.parse_args().check
    stale = [name for name, make in PAGES.items() if _old(name) != make()]
    for name in stale if not check else []:
        (DOCS / name).write_text(PAGES[name](), encoding="utf-8")
    verb = "is not current; run 'make docs'" if check else "is written"
    for name in stale:
        print(f"docs/{name} {verb}")
    return 1 if check and stale else 0


def _old(name: str) -> str:
    path = DOCS / name
    return path.read_text(encoding="utf-8") if path.is_file() else ""


if __name__ == "__main__":
    sys.exit(main())
