"""Write a project for a user's own table."""

import re
from pathlib import Path

from perennial import project
from perennial.data import guess
from perennial.errors import BadInput
from perennial.local import isvc
from perennial.store import files


def write(
    table: Path, *, name: str | None, label: str | None, time: str | None, to: Path | None
) -> int:
    """Guess a project from ``table`` and write its folder; never over one that is there."""
    if not table.is_file():
        raise BadInput(f"no file at {table}; give a CSV (also .gz) or Parquet file")
    called = name or _name(table)
    folder = to or Path(called)
    target = folder / "project.yaml"
    if target.exists():
        raise BadInput(f"{target} is there already; choose another folder with --to")
    text = guess.guess(table, called, label=label, time=time)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_atomic(target, text)
    files.write_atomic(folder / "isvc.yaml", isvc.template(called))
    _tell(target, folder)
    return 0


def _tell(target: Path, folder: Path) -> None:
    found = project.load(target)
    confirm = sum("# confirm" in line for line in target.read_text().splitlines())
    clock = found.time.column or "the order of rows"
    print(
        f"wrote {target}: {len(found.features)} features, label {found.label.column}"
        f" = {found.label.positive!r}, time by {clock}, windows of {found.window.every}"
    )
    print(f"please look at the {confirm} lines marked '# confirm' in it, then run:")
    print(f"  perennial replay {folder}")


def _name(table: Path) -> str:
    stem = table.name.split(".")[0].lower()
    name = re.sub(r"[^a-z0-9]+", "-", stem).strip("-")
    begins_well = name[:1].isalpha()
    return (name if begins_well else f"table-{name}").strip("-")[:39]
