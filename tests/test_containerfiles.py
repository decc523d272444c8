"""The Containerfiles install from hash-locked wheels only, and leave no installer in what runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    "core": ROOT / "components" / "Containerfile",
    "serving": ROOT / "kserve" / "Containerfile",
}


def stages(name: str) -> list[list[str]]:
    """Instructions of each stage, every one on a single line."""
    text = re.sub(r"^\s*#.*\n", "", FILES[name].read_text(), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if line.startswith("FROM ")]
    return [lines[a:b] for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]


@pytest.mark.parametrize("name", FILES)
def test_what_runs_is_one_stage_from_scratch_that_only_copies(name):
    last = stages(name)[-1]

    assert last[0] == "FROM scratch"
    kinds = {line.split()[0] for line in last[1:]}
    assert kinds == {"COPY", "ARG", "LABEL", "ENV", "WORKDIR", "USER"}
    assert last[-1] == "USER 65532:65532"
    assert [line for line in last if line.startswith("COPY") and "--from=" not in line] == []


@pytest.mark.parametrize("name", FILES)
def test_every_install_is_held_to_hashes_or_takes_no_index(name):
    runs = [line for stage in stages(name) for line in stage if line.startswith("RUN")]
    installs = re.findall(r"[^&;]*\bpip (?:install|sync)\b[^&;]*", " ".join(runs))
    builds = re.findall(r"[^&;]*\buv build\b[^&;]*", " ".join(runs))

    assert len(installs) == 3 and len(builds) == 1
    for one in (*installs, *builds):
        assert "--require-hashes" in one or "--no-index" in one, one


@pytest.mark.parametrize("name", FILES)
def test_no_address_and_no_floating_base_stands_in_a_containerfile(name):
    text = FILES[name].read_text()

    assert "://" not in text
    bases = {stage[0].split()[1] for stage in stages(name)} - {"scratch", "tools", "environment"}
    assert bases == {"docker.io/library/python:3.11-slim-bookworm"}


def test_both_images_are_made_by_the_same_words():
    core, serving = (FILES[name].read_text().splitlines() for name in FILES)

    different = {line for line in set(core) ^ set(serving) if line.strip()}

    # Their locks and titles, the folders and the few words on what only one of them has.
    assert len(different) <= 24, sorted(different)


def test_only_what_is_named_goes_to_a_builder():
    ignored = (ROOT / ".containerignore").read_text().splitlines()

    assert "*" in ignored
    assert (ROOT / ".dockerignore").resolve() == ROOT / ".containerignore"
    named = {line[1:] for line in ignored if line.startswith("!")}
    assert not named & {
        "tests",
        ".git",
        ".venv",
        ".venv-runtime",
        "notebooks",
        "mlruns",
        ".perennial",
    }
    assert all((ROOT / name).exists() for name in named)
