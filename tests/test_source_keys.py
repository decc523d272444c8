"""A project names one source, and no password."""

from pathlib import Path

import pytest
import yaml

from perennial.errors import BadInput
from perennial.project import load
from perennial.settings import Settings

GIVEN = {
    "name": "shop",
    "kind": "table",
    "time": {"row_order": {}},
    "label": {"column": "y"},
    "features": [{"name": "x", "type": "number"}],
}
SECRET = "hunter" + "2"


def written(folder: Path, source: dict[str, object]) -> Path:
    (folder / "project.yaml").write_text(yaml.safe_dump({**GIVEN, "source": source}))
    return folder


@pytest.mark.parametrize(
    ("source", "said"),
    [
        pytest.param(
            {"path": "a", "query": "b"}, "one of path, query and simulator, not", id="two"
        ),
        pytest.param({"path": "a", "simulator": {}}, "not path and simulator", id="invented"),
        pytest.param({"url": "sqlite:///a"}, "wanted a query beside url, such as", id="url alone"),
        pytest.param({"query": "a", "join_times": "b"}, "join the times in the", id="times"),
        pytest.param(
            {"query": "a", "url": f"postgresql://me:{SECRET}@host/d"},
            "wanted url without a password; give all of it by the setting PERENNIAL_SOURCE_URL",
            id="a password",
        ),
        pytest.param(
            {"query": "a", "url": f"postgresql://host/d?user=me&PassWord={SECRET}"},
            "url without a password",
            id="a password as a parameter",
        ),
        pytest.param(
            {"query": "a", "url": f"postgresql://me:{SECRET}@[host/d"},
            "url without a password",
            id="a password in what is no URL",
        ),
    ],
)
def test_one_sentence_refuses_a_source_with(tmp_path: Path, source: dict[str, object], said: str):
    with pytest.raises(BadInput, match=said) as caught:
        load(written(tmp_path, source))

    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_query_needs_no_url_of_its_own(tmp_path: Path):
    assert load(written(tmp_path, {"query": "SELECT 1"})).source.url is None


def test_a_url_without_a_password_is_taken(tmp_path: Path):
    url = "postgresql://me@host:5432/d?sslmode=verify-full"

    assert load(written(tmp_path, {"query": "SELECT 1", "url": url})).source.url == url


def test_settings_do_not_show_the_url_of_the_source():
    found = Settings.load({"PERENNIAL_SOURCE_URL": f"postgresql://me:{SECRET}@host/d"})

    assert SECRET in found.source_url
    assert SECRET not in repr(found)
