"""What data, names and rules say is shown as it is, never read as markup."""

from pathlib import Path

import pytest
from rich.table import Table

from perennial.local import tables
from perennial.local.doctor import Check
from perennial.local.doctor import _show as doctor_show
from perennial.local.features import _show as features_show
from perennial.local.look import _show as look_show

LOCAL = Path(tables.__file__).parent
SAID = "^z[a-z/ ]+$ [/b] gone :smile:"


def test_heads_and_cells_are_shown_as_they_are(capsys):
    table = Table(SAID, box=None)
    table.add_row(SAID)

    tables.show(table)

    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [SAID, SAID]


@pytest.mark.parametrize(
    "shown",
    [
        pytest.param(lambda: look_show([{"reason": SAID}], False), id="models and runs"),
        pytest.param(lambda: features_show([{"feature": SAID}], False), id="features"),
        pytest.param(lambda: doctor_show([Check("disk", False, SAID, "mend")]), id="doctor"),
    ],
)
def test_no_command_reads_words_as_markup(shown, capsys):
    shown()

    assert SAID in capsys.readouterr().out


def test_one_module_prints_tables():
    texts = {path.name: path.read_text() for path in LOCAL.glob("*.py")}

    printing = [n for n, text in texts.items() if "rich.table" in text and "Console" in text]

    assert printing == ["tables.py"]
