"""What would a cluster run: an InferenceService file, read here into two command lines."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from perennial.errors import BadInput, many
from perennial.settings import Settings

FILE = "isvc.yaml"
API = "serving.kserve.io/v1beta1"
MODE = "serving.kserve.io/deploymentMode"
MODES = ("Knative", "Standard")
PREDICTOR, TRANSFORMER = "kserve-container", "transformer-container"
# Serves every project that brings no file of its own.
TEMPLATE = Path("kserve") / "retail" / FILE


@dataclass(frozen=True)
class Container:
    """One server of the pod: what is run, with which arguments and environment."""

    command: tuple[str, ...]
    args: Mapping[str, str | None]  # in order; None for a flag without a value
    env: Mapping[str, str]
    probe: str  # path that answers 200 when it is ready

    def command_line(self, python: Path, changes: Mapping[str, str]) -> list[str]:
        """The command with this machine's Python, and with some arguments changed or added."""
        program = [str(python) if word == "python" else word for word in self.command]
        given = {**self.args, **{f"--{name}": value for name, value in changes.items()}}
        return program + [
            key if value is None else f"{key}={value}" for key, value in given.items()
        ]


@dataclass(frozen=True)
class InferenceService:
    """A predictor and, collocated, its transformer."""

    name: str
    predictor: Container
    transformer: Container


def find(settings: Settings, folder: Path, name: str) -> InferenceService:
    """The file beside the project or in kserve/<name>/, else the shipped one under this name."""
    own = [f for f in (folder / FILE, settings.root / "kserve" / name / FILE) if f.is_file()]
    if not own:
        return _renamed(read(settings.root / TEMPLATE), name)
    found = read(own[0])
    if found.name != name:
        raise BadInput(f"{own[0]}: metadata.name is {found.name!r}, wanted {name!r}")
    return found


def template(name: str) -> str:
    """Text of the shipped file for a project of another name, for a user to change."""
    text = (Settings.load().root / TEMPLATE).read_text(encoding="utf-8")
    return re.sub(r"\bretail\b", name, text)


def read(file: Path) -> InferenceService:
    """Read an InferenceService. Raises BadInput that tells every fault with its key."""
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise BadInput(
            f"no InferenceService at {file}; run from a checkout, or set PERENNIAL_ROOT to one"
        ) from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise BadInput(f"{file} is not readable YAML: {' '.join(str(exc).split())}") from exc
    reader = _Reader(raw)
    name = reader.text("metadata", "name")
    reader.expect(API, "apiVersion")
    reader.expect("InferenceService", "kind")
    mode = reader.text("metadata", "annotations", MODE)
    if mode and mode not in MODES:
        reader.fault(f"metadata.annotations.{MODE} is {mode!r}, wanted {' or '.join(MODES)}")
    found = reader.containers(name)
    if reader.faults:
        raise many(f"{file} is not an InferenceService that can be run here", reader.faults)
    return InferenceService(name, found[PREDICTOR], found[TRANSFORMER])


class _Reader:
    """Looks keys up in one document and remembers what is wrong with them."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.faults: list[str] = []

    def fault(self, text: str) -> None:
        self.faults.append(text)

    def text(self, *keys: str) -> str:
        value = self._get(keys)
        if not isinstance(value, str) or not value:
            self.fault(f"{'.'.join(keys)} is {value!r}, wanted a text")
            return ""
        return value

    def expect(self, wanted: str, key: str) -> None:
        if (value := self._get([key])) != wanted:
            self.fault(f"{key} is {value!r}, wanted {wanted!r}")

    def containers(self, model: str) -> dict[str, Container]:
        where = "spec.predictor.containers"
        raw = self._get(where.split("."))
        listed = raw if isinstance(raw, list) else []
        named = {
            c["name"]: (i, c) for i, c in enumerate(listed) if isinstance(c, dict) and "name" in c
        }
        for name in (PREDICTOR, TRANSFORMER):
            if name not in named:
                self.fault(f"{where} has no {name}, wanted {PREDICTOR} and {TRANSFORMER}")
        if self.faults:
            return {}
        self._check_cluster_rules(where, named)
        return {
            name: self._container(f"{where}[{named[name][0]}]", named[name][1], model)
            for name in (PREDICTOR, TRANSFORMER)
        }

    def _check_cluster_rules(self, where: str, named: Mapping[str, tuple[int, Any]]) -> None:
        """What KServe or Knative would refuse, said before a cluster does."""
        if any(e.get("name") == "STORAGE_URI" for e in named[TRANSFORMER][1].get("env") or ()):
            self.fault(f"{where}: STORAGE_URI belongs to {PREDICTOR} only")
        if len([name for name, (_, c) in named.items() if c.get("ports")]) > 1:
            self.fault(f"{where}: ports may stand in one container only")

    def _container(self, where: str, raw: dict[str, Any], model: str) -> Container:
        command = self._words(f"{where}.command", raw.get("command"))
        args = self._arguments(f"{where}.args", self._words(f"{where}.args", raw.get("args")))
        if args.get("--model_name") != model:
            self.fault(f"{where}.args: wanted --model_name={model}")
        env = {str(e.get("name")): str(e["value"]) for e in raw.get("env") or () if "value" in e}
        probe = ((raw.get("readinessProbe") or {}).get("httpGet") or {}).get("path")
        path = str(probe or f"/v2/models/{model}/ready")
        return Container(command, args, {k: v for k, v in env.items() if k != "STORAGE_URI"}, path)

    def _words(self, where: str, raw: Any) -> tuple[str, ...]:
        if not isinstance(raw, list) or not raw or not all(isinstance(w, str) for w in raw):
            self.fault(f"{where} is {raw!r}, wanted a list of texts")
            return ()
        return tuple(raw)

    def _arguments(self, where: str, words: Sequence[str]) -> dict[str, str | None]:
        for index, word in enumerate(words):
            if not word.startswith("--"):
                self.fault(f"{where}[{index}] is {word!r}, wanted --name=value")
        parts = [word.partition("=") for word in words]
        return {key: value if sign else None for key, sign, value in parts}

    def _get(self, keys: Sequence[str]) -> Any:
        found = self._raw
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found


def _renamed(service: InferenceService, name: str) -> InferenceService:
    def container(old: Container) -> Container:
        args = {**old.args, "--model_name": name}
        return replace(old, args=args, probe=old.probe.replace(f"/{service.name}/", f"/{name}/"))

    return InferenceService(name, container(service.predictor), container(service.transformer))
