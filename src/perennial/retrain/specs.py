"""Which compiled pipeline fits the cluster that the settings describe?"""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from perennial import __version__
from perennial.errors import BadInput
from perennial.settings import PREFIX, Settings

SPEC = Path("pipelines") / "training.yaml"
# The settings that are compiled in; with all others the checked-in file is the right one.
COMPILED_IN = (
    "image",
    "run_cpu",
    "run_cpu_limit",
    "run_memory",
    "run_node_selector",
    "step_timeout_s",
)


def for_cluster(settings: Settings) -> str:
    """The spec for a backend: the checked-in one, or one compiled for these settings.

    Raises BadInput where there is none, or its source does not compile.
    """
    path = settings.root / SPEC
    if not path.is_file():
        raise BadInput(f"no compiled spec at {path}; run 'make spec', or set PERENNIAL_ROOT")
    if not _given(settings):
        return path.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="perennial-spec-") as folder:
        return _compiled(settings, Path(folder) / SPEC.name)


def version(text: str) -> str:
    """Name of a spec's version: it changes with the code and with the text."""
    return f"{__version__}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _given(settings: Settings) -> dict[str, str]:
    fields = Settings.model_fields
    values = {name: getattr(settings, name) for name in COMPILED_IN}
    return {name: str(v) for name, v in values.items() if v != fields[name].default}


def _compiled(settings: Settings, path: Path) -> str:
    given = {f"{PREFIX}{name.upper()}": value for name, value in _given(settings).items()}
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.training", "--to", str(path)],
        cwd=settings.root,
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it ended without a word"]
        raise BadInput(f"the pipeline in {settings.root} does not compile: {last[0]}")
    return path.read_text(encoding="utf-8")
