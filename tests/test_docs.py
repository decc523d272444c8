"""What we tell people works: commands, links, generated pages, the published schema."""

import argparse
import contextlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from perennial import cli, project
from perennial.local import cluster
from perennial.settings import PREFIX, Settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TARGETS = re.findall(r"^([a-z-]+):.*?## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
EXAMPLES = sorted((ROOT / "examples").glob("*/project.yaml"))
IN_PODS = {f"projects/{path.parent.name}.yaml" for path in EXAMPLES}


OTHERS = ("kubectl", "head")  # tools of others, whose words are not ours to check
MADE = {"mytable"}  # by a line before, 'perennial init mytable.csv'


def shell_lines(page: Path) -> list[str]:
    """What a page tells to type: whole blocks of sh, and what follows a prompt in a console."""
    blocks = re.findall(r"^```(sh|console)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [line for kind, text in blocks for line in typed(kind, text.replace("\\\n", " "))]


def typed(kind: str, text: str) -> list[str]:
    prompt = "$ " if kind == "console" else ""
    lines = [line for line in text.splitlines() if line.strip() and line.startswith(prompt)]
    return [line.removeprefix(prompt) for line in lines]


def in_a_sentence(page: Path) -> list[str]:
    """Commands for a pod that stand inside of a sentence."""
    return re.findall(r"`(kubectl [^`\n]*exec [^`\n]* -- [^`\n]*)`", page.read_text())


def told_commands() -> list[Any]:
    return [
        pytest.param(line, id=f"{page.name}: {line.split('#')[0].strip()}")
        for page in PAGES
        for line in [*shell_lines(page), *in_a_sentence(page)]
    ]


def words(line: str) -> list[str]:
    """A shell line without comment and without variables set before the command."""
    found = shlex.split(line, comments=True)
    while re.fullmatch(r"[A-Z_]+=\S*", found[0]):
        found.pop(0)
    return found


@pytest.mark.parametrize("line", told_commands())
def test_a_command_in_the_docs_exists(line):
    tool, *rest = words(line)

    if tool == "make":
        assert rest[0] in TARGETS
    elif tool == "perennial":
        assert project_of(rest) in {"", *MADE} or (ROOT / project_of(rest)).is_dir()
    elif tool == "python":
        assert rest[0] == "-m" and importlib.util.find_spec(rest[1])
    elif tool == "kubectl" and "exec" in rest:
        inside = rest[rest.index("--") + 1 :]
        assert inside[0] == "perennial"
        assert project_of(inside[1:]) in {"", *IN_PODS}
    else:
        assert tool in OTHERS or line == ". .venv/bin/activate"


def project_of(rest: list[str]) -> str:
    """The project that a command of ours names; it must parse."""
    args = cli.build_parser().parse_args(rest)
    assert args.do
    return getattr(args, "project", None) or ""


@pytest.mark.parametrize(
    ("line", "is_told"),
    [
        ("$ kubectl -n a exec deploy/b -- perennial why projects/retail.yaml", True),
        ("$ kubectl -n a exec deploy/b -- perennial why retail", False),
        ("$ perennial why retail", False),
        ("$ kubectl -n a exec deploy/b \\\n    -- perennial why retail", False),
        ("NAME   PHASE", None),
    ],
)
def test_a_line_behind_a_prompt_is_checked(tmp_path, line, is_told):
    page = tmp_path / "page.md"
    page.write_text(f"```console\n{line}\n```\n")

    told = shell_lines(page)

    assert len(told) == (is_told is not None)
    for one in told:
        with contextlib.nullcontext() if is_told else pytest.raises(AssertionError):
            test_a_command_in_the_docs_exists(one)


def test_every_secret_that_pods_want_is_told_to_be_made():
    page = (ROOT / "docs" / "cluster.md").read_text()

    told = re.findall(r"^\$ kubectl .*create secret generic ([\w-]+)", page, re.MULTILINE)

    assert sorted(told) == sorted(cluster.SECRETS)


def test_what_a_cluster_of_ones_own_is_told_by_is_read_somewhere():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    code = [p for folder in ("tests", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    read = {name for p in code for name in re.findall(r'"(PERENNIAL_TEST_\w+)"', p.read_text())}

    told = set(re.findall(r"`(PERENNIAL_TEST_\w+)`", page))

    assert {"PERENNIAL_TEST_INGRESS", "PERENNIAL_TEST_KILLS"} <= told <= read


def all_commands(parser: argparse.ArgumentParser) -> list[str]:
    inner = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    below = [c for action in inner for p in action.choices.values() for c in all_commands(p)]
    return below or [parser.prog]


@pytest.mark.parametrize("command", all_commands(cli.build_parser()))
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.build_parser().parse_args([*command.split()[1:], "--help"])

    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {command} ")


def test_there_are_at_most_eighteen_nouns():
    inner = [a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction)]

    assert len(inner[0].choices) <= 18


def test_the_generated_pages_are_current():
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.stdout + done.stderr == ""
    assert done.returncode == 0


def test_every_setting_is_documented_with_its_meaning():
    page = (ROOT / "docs" / "settings.md").read_text()

    for name, field in Settings.model_fields.items():
        assert f"`{PREFIX}{name.upper()}`" in page
        assert field.description and field.description in page


def test_every_key_of_a_project_says_what_it_means():
    schema = project.schema()
    parts = {"Project": schema, **schema["$defs"]}

    silent = [
        f"{n}.{k}"
        for n, p in parts.items()
        for k, f in p["properties"].items()
        if "description" not in f
    ]

    assert silent == []


def as_json(value: Any) -> Any:
    """YAML reads 2011-06-01 as a date; a schema, and an editor, sees text."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_json(item) for item in value]
    return value.isoformat() if isinstance(value, date) else value


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.parent.name)
def test_an_example_fits_the_published_schema(path):
    schema = json.loads((ROOT / "docs" / "project.schema.json").read_text())

    jsonschema.validate(as_json(yaml.safe_load(path.read_text())), schema)


def test_the_published_schema_refuses_an_unknown_key():
    schema = json.loads((ROOT / "docs" / "project.schema.json").read_text())
    raw = as_json(yaml.safe_load(EXAMPLES[0].read_text()))

    with pytest.raises(jsonschema.ValidationError, match="drfit"):
        jsonschema.validate({**raw, "drfit": {}}, schema)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_a_link_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())

    broken = [a for a in links if "://" not in a and not (page.parent / a).exists()]

    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_a_link_inside_a_page_leads_to_a_heading(page):
    text = page.read_text()
    heads = {
        h.lower().replace(" ", "-").replace(".", "")
        for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }

    broken = [a for a in re.findall(r"\]\(#([^)]+)\)", text) if a not in heads]

    assert broken == []


def test_every_path_on_the_map_of_the_tree_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tree = text[text.index("## Map of the tree") : text.index("## Rules of flow")]

    missing = [
        p for p in re.findall(r"^\| `([^`]+)`", tree, re.MULTILINE) if not (ROOT / p).is_dir()
    ]

    assert missing == []


def test_every_target_is_explained():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)

    assert phony
    assert set(phony[1].split()) - {"announce"} == set(TARGETS)
