"""What is a model: a folder whose manifest names every byte, and the only code that loads it."""

import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from pydantic import ValidationError

from perennial.errors import BadInput, PerennialError
from perennial.project import Project, parse_moment
from perennial.records import Lineage, plain
from perennial.settings import StateFolder
from perennial.store.files import digest_bytes, write_atomic
from perennial.store.objects import Folder

if TYPE_CHECKING:
    from xgboost import Booster

Matrix = np.ndarray[Any, np.dtype[np.float64]]

MODEL = "model"
EVIDENCE = "evidence"
MANIFEST = "manifest.json"
FORMAT = 1
FILES = (
    "model.json",
    "contract.json",
    "project.json",
    "lineage.json",
    "golden.npy",
    "golden_scores.npy",
    "reference.npy",
)
GOLDEN_TOLERANCE = 1e-6

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,63}\.(json|npy)")
_PREFLIGHT_S = 60.0
_PREFLIGHT_MEMORY = 4 << 30


@dataclass(frozen=True)
class Parts:
    """All that a bundle holds, verified, with the model still as bytes."""

    folder: Path
    digest: str
    model: bytes
    contract: dict[str, Any]
    project: Project
    lineage: Lineage
    golden: Matrix
    golden_scores: Matrix
    reference: Matrix

    @property
    def short(self) -> str:
        """First eight characters of the digest, as people see it."""
        return self.digest.removeprefix("sha256:")[:8]


@dataclass(frozen=True)
class Bundle(Parts):
    """A verified bundle with its model loaded."""

    booster: "Booster"

    def score(self, matrix: Matrix) -> Matrix:
        """Probability of each row; unseen categories must be missing already."""
        return score(self.booster, matrix)


def score(booster: "Booster", matrix: Matrix) -> Matrix:
    """Probability of each row of a matrix whose columns stand as in training."""
    found = booster.inplace_predict(matrix, validate_features=False)
    return np.asarray(found, dtype=np.float64)


def npy(array: Any) -> bytes:
    """An array as the bytes of a .npy file, always float64."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array, dtype=np.float64), allow_pickle=False)
    return buffer.getvalue()


def model_json(booster: "Booster") -> bytes:
    """A model as JSON: damaged JSON gives an error where damaged UBJ ends the process."""
    return bytes(booster.save_raw("json"))


def project_json(project: Project) -> bytes:
    """A project as JSON that ``load`` reads: lengths of time as a user writes them."""
    return _canonical(_jsonable(project.model_dump()))


def lineage_json(lineage: Lineage) -> bytes:
    """A lineage as JSON that ``load`` reads."""
    return _canonical(plain(lineage))


def files(
    booster: "Booster",
    contract: str,
    project: Project,
    lineage: Lineage,
    golden: Matrix,
    reference: Matrix,
) -> dict[str, bytes]:
    """Make the files of ``model/``; golden rows are scored by the model as it will be loaded."""
    model = model_json(booster)
    return {
        "model.json": model,
        "contract.json": contract.encode(),
        "project.json": project_json(project),
        "lineage.json": lineage_json(lineage),
        "golden.npy": npy(golden),
        "golden_scores.npy": npy(score(_booster(model), golden)),
        "reference.npy": npy(reference),
    }


def close(folder: Path, files: Mapping[str, bytes]) -> str:
    """Write ``model/`` with its manifest and give the digest that names the model."""
    missing = [name for name in FILES if name not in files]
    if missing:
        raise BadInput(f"a bundle at {folder} lacks {', '.join(missing)}")
    target = folder / MODEL
    if target.exists():
        raise BadInput(f"{target} is closed already; a bundle is written once, give a new folder")
    manifest = _manifest(files)
    draft = folder / f".{MODEL}-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for name, data in sorted(files.items()):
        write_atomic(draft / name, data)
    write_atomic(draft / MANIFEST, manifest)
    draft.rename(target)
    return digest_bytes(manifest)


def add_evidence(folder: Path, name: str, text: str) -> None:
    """Add a file to ``evidence/``, which the model's digest does not cover."""
    (folder / EVIDENCE).mkdir(parents=True, exist_ok=True)
    write_atomic(folder / EVIDENCE / name, text)


def verify(folder: Path, expected: str | None = None) -> str:
    """Check every file of ``model/`` against the manifest. Raises BadInput naming the file."""
    return _read(folder, expected)[0]


def name_of(digest: str) -> str:
    """Name of the folder in which the bundle of a model digest is kept."""
    return digest.removeprefix("sha256:")


def near(state: StateFolder, digest: str) -> Path:
    """The bundle of a registered model as a folder of this machine, fetched if need be.

    Every byte is checked. Raises BadInput when it was never kept or holds other bytes.
    """
    here = state.bundles / name_of(digest)
    if not here.is_dir():
        Folder(state.artifacts("bundles")).fetch(name_of(digest), here)
    try:
        verify(here, digest)
    except BadInput:
        # A copy may be fetched again; what lies only here is somebody's to look at.
        if state.artifact_root:
            shutil.rmtree(here)
        raise
    return here


def parts(folder: Path, expected: str | None = None) -> Parts:
    """Verify and read everything but the model itself, which stays bytes."""
    digest, data = _read(folder, expected)
    try:
        return _parts(folder, digest, data)
    except (ValueError, KeyError, TypeError, ValidationError) as exc:
        raise BadInput(
            f"{folder / MODEL} keeps its digest but not its format ({_first(exc)}); train it again"
        ) from exc


def load(folder: Path, expected: str | None = None) -> Bundle:
    """Verify, load and try the model on its golden rows. Raises BadInput."""
    found = parts(folder, expected)
    bundle = Bundle(**vars(found), booster=_booster(found.model, folder))
    _check_golden(bundle)
    return bundle


@contextmanager
def preflight(folder: Path) -> Iterator[None]:
    """Load the bundle in a child process meanwhile: a parser's crash is then only the child's.

    Raises BadInput at the end when the child could not.
    """
    child = subprocess.Popen(
        [sys.executable, "-m", "perennial.bundle", str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield
        _finish(child, folder)
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate()


def _finish(child: "subprocess.Popen[str]", folder: Path) -> None:
    try:
        _, said = child.communicate(timeout=_PREFLIGHT_S)
    except subprocess.TimeoutExpired as exc:
        raise BadInput(f"{folder} did not load within {_PREFLIGHT_S:.0f} s; it is refused") from exc
    if child.returncode == BadInput.exit_code and said.strip():
        raise BadInput(said.strip().splitlines()[-1].removeprefix("error: "))
    if child.returncode != 0:
        raise BadInput(f"{folder} ends the process that loads it (code {child.returncode})")


def _manifest(files: Mapping[str, bytes]) -> bytes:
    wrong = [name for name in files if not _NAME.fullmatch(name) or name == MANIFEST]
    if wrong:
        raise BadInput(f"a bundle cannot hold {', '.join(wrong)}; wanted names such as notes.json")
    entries = {n: {"sha256": digest_bytes(d), "size": len(d)} for n, d in files.items()}
    return _canonical({"format": FORMAT, "files": entries})


def _read(folder: Path, expected: str | None) -> tuple[str, dict[str, bytes]]:
    where = folder / MODEL
    if folder.is_symlink() or where.is_symlink():
        raise BadInput(f"{where} is reached by a symbolic link; give the folder itself")
    if not (where / MANIFEST).is_file():
        raise BadInput(f"no bundle at {folder}: {MODEL}/{MANIFEST} is missing")
    manifest = _bytes(where / MANIFEST)
    digest = digest_bytes(manifest)
    if expected and digest != expected:
        raise BadInput(f"{folder} holds the model {digest}, wanted {expected}")
    entries = _entries(where / MANIFEST, manifest)
    _check_listing(where, set(entries))
    return digest, {name: _verified(where / name, entry) for name, entry in entries.items()}


def _entries(path: Path, manifest: bytes) -> dict[str, dict[str, Any]]:
    try:
        raw = json.loads(manifest)
        entries = {
            str(n): {"sha256": e["sha256"], "size": e["size"]} for n, e in raw["files"].items()
        }
        form = raw["format"]
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise BadInput(f"{path} is damaged: not a manifest of files with sha256 and size") from exc
    if form != FORMAT:
        raise BadInput(f"{path} has format {form!r}, wanted {FORMAT}")
    missing = [name for name in FILES if name not in entries]
    if missing or not all(_NAME.fullmatch(name) for name in entries):
        raise BadInput(f"{path} is damaged: it must name {', '.join(FILES)} and plain file names")
    return entries


def _check_listing(where: Path, named: set[str]) -> None:
    for found in where.iterdir():
        if found.name != MANIFEST and found.name not in named:
            raise BadInput(f"{found} is not in the manifest; a closed bundle takes no more files")


def _verified(path: Path, entry: Mapping[str, Any]) -> bytes:
    if not path.exists():
        raise BadInput(f"{path} is missing, though the manifest names it")
    data = _bytes(path)
    if len(data) != entry["size"] or digest_bytes(data) != entry["sha256"]:
        raise BadInput(f"{path} is damaged: its digest is not the manifest's")
    return data


def _bytes(path: Path) -> bytes:
    if path.is_symlink() or not path.is_file():
        raise BadInput(f"{path} is not a plain file; a bundle holds no links and no folders")
    return path.read_bytes()


def _parts(folder: Path, digest: str, data: Mapping[str, bytes]) -> Parts:
    contract = json.loads(data["contract.json"])
    columns = len(contract["features"])
    return Parts(
        folder=folder,
        digest=digest,
        model=data["model.json"],
        contract=contract,
        project=Project.model_validate_json(data["project.json"]),
        lineage=_lineage(data["lineage.json"]),
        golden=_matrix("golden.npy", data, columns),
        golden_scores=_array("golden_scores.npy", data),
        reference=_matrix("reference.npy", data, columns),
    )


def _lineage(data: bytes) -> Lineage:
    raw = json.loads(data)
    return Lineage(**{**raw, "as_of": parse_moment(raw["as_of"])})


def _matrix(name: str, data: Mapping[str, bytes], columns: int) -> Matrix:
    found = _array(name, data)
    if found.ndim != 2 or found.shape[1] != columns or not len(found):
        raise ValueError(f"{name} is {found.shape}, wanted rows of {columns} columns")
    return found


def _array(name: str, data: Mapping[str, bytes]) -> Matrix:
    found = np.load(io.BytesIO(data[name]), allow_pickle=False)
    if found.dtype != np.float64:
        raise ValueError(f"{name} holds {found.dtype}, wanted float64")
    return cast(Matrix, found)


def _booster(model: bytes, folder: Path | None = None) -> "Booster":
    import xgboost  # noqa: PLC0415  who only reads the other parts need not wait for it

    booster = xgboost.Booster({"nthread": 1})
    try:
        booster.load_model(bytearray(model))
    except (xgboost.core.XGBoostError, ValueError) as exc:
        raise BadInput(f"{folder}/{MODEL}/model.json is not a model of xgboost") from exc
    booster.set_param({"nthread": 1})
    return booster


def _check_golden(bundle: Bundle) -> None:
    found = bundle.score(bundle.golden)
    wanted = bundle.golden_scores
    if found.shape != wanted.shape or not np.all(np.abs(found - wanted) <= GOLDEN_TOLERANCE):
        raise BadInput(
            f"{bundle.folder} scores its golden rows differently here than where it was trained;"
            " use the same xgboost in both"
        )


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n"


def _jsonable(value: Any) -> Any:
    if isinstance(value, timedelta):
        return f"{int(value.total_seconds())}s"
    if isinstance(value, date | datetime):
        return value.isoformat()
    if isinstance(value, dict):
        return {key: _jsonable(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    return value


def _first(exc: Exception) -> str:
    return " ".join(str(exc).split())[:160]


def main() -> int:
    """Load one bundle under limits and say in one line what is wrong with it."""
    resource.setrlimit(resource.RLIMIT_CPU, (int(_PREFLIGHT_S), int(_PREFLIGHT_S)))
    resource.setrlimit(resource.RLIMIT_AS, (_PREFLIGHT_MEMORY, _PREFLIGHT_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # xgboost loads all of scikit-learn where it finds it: two seconds for nothing.
    sys.modules["sklearn"] = None  # type: ignore[assignment]
    try:
        load(Path(sys.argv[1]))
    except PerennialError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
