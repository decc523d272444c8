"""The notebooks as tests and people handle them: run, without what a run left in them.

python -m tests.notebooks strip            take outputs and counts out of all notebooks
python -m tests.notebooks run 01 FOLDER    execute one and write it, with outputs, to FOLDER
"""

import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
CELL_S = 900


def paths() -> list[Path]:
    return sorted(FOLDER.glob("*.ipynb"))


def path(number: str) -> Path:
    """The notebook whose name begins with a number, such as 02."""
    (found,) = FOLDER.glob(f"{number}-*.ipynb")
    return found


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def write(notebook: Any, path: Path) -> None:
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def source(path: Path) -> str:
    """All code of a notebook."""
    return "\n".join(c.source for c in read(path).cells if c.cell_type == "code")


def links(path: Path) -> list[str]:
    """Files that a notebook's words link to."""
    words = "\n".join(c.source for c in read(path).cells if c.cell_type == "markdown")
    return [t for t in re.findall(r"\]\(([^)#]+)", words) if "://" not in t]


def left(path: Path) -> list[str]:
    """What a run left in a notebook, cell by cell."""
    cells = [c for c in read(path).cells if c.cell_type == "code"]
    return [f"{path.name} {c.id}" for c in cells if c.outputs or c.execution_count is not None]


def strip(path: Path) -> None:
    """Take out what a run left."""
    found = read(path)
    for cell in [c for c in found.cells if c.cell_type == "code"]:
        cell.outputs, cell.execution_count = [], None
    for cell in found.cells:
        cell.metadata.clear()
    found.metadata.pop("widgets", None)
    write(found, path)


def execute(found: Any) -> None:
    """Run all cells as a reader would; raises what a cell raised."""
    place = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(found, timeout=CELL_S, resources=place).execute()


def executed(path: Path, folder: Path) -> str:
    """Run a notebook, leave it with its outputs in a folder, and give all that it told.

    Fails where a cell warned, or where a picture that it draws is missing.
    """
    found = read(path)
    try:
        execute(found)
    finally:
        write(found, folder / path.name)
    outputs = [o for c in found.cells if c.cell_type == "code" for o in c.outputs]
    warned = [o.text for o in outputs if o.get("name") == "stderr"]
    assert warned == [], path.name
    pictures = sum("image/png" in o.get("data", {}) for o in outputs)
    assert pictures == source(path).count("plt.show()"), path.name
    return "\n".join(o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs)


def main() -> None:
    verb, *rest = sys.argv[1:]
    if verb == "strip":
        for each in paths():
            strip(each)
    if verb == "run":
        executed(path(rest[0]), Path(rest[1]))


if __name__ == "__main__":
    main()
