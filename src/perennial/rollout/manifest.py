"""What does a cluster run for one revision: the project's InferenceService file, filled in."""

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightkube.utils.quantity import parse_quantity

from perennial.errors import BadInput
from perennial.records import RolloutState
from perennial.rollout import plan

Document = dict[str, Any]

FILE = "isvc.yaml"
# Serves every project that brings no file of its own.
TEMPLATE = Path("kserve") / "retail" / FILE
MODE = "serving.kserve.io/deploymentMode"
PROJECT, REVISION, ROLLOUT = (f"perennial.dev/{n}" for n in ("project", "revision", "rollout"))
PREDICTOR, TRANSFORMER = "kserve-container", "transformer-container"
# Where a file has it, requests may name entities alone: it runs in the image of the steps.
LOOKUP = "feature-server"
PERCENT = "canaryTrafficPercent"
REPLICAS = "perennial.dev/replicas"
COMPONENTS = ("predictor", "transformer")
# Knative refuses such a constraint unless a flag of its administrator's allows it.
SPREADS = "Standard"
_SPREAD = ("kubernetes.io/hostname", "topology.kubernetes.io/zone")
# A template that an edit made a stranger's: nothing of ours runs under it.
NOBODY = ""


@dataclass(frozen=True)
class Scale:
    """How many copies of the servers there are; None leaves what the file says."""

    least: int | None = None
    most: int | None = None


AS_IN_FILE = Scale()


@dataclass(frozen=True)
class Place:
    """What the surroundings decide about every revision."""

    namespace: str
    mode: str  # Knative or Standard
    image: str
    segments: str  # URI that takes served rows
    sink: str  # URL that takes drift events, empty for nobody
    steps_image: str = ""  # of the feature server


def load(root: Path, project: str) -> Document:
    """The project's file in kserve/<project>/, else the shipped one under this name."""
    own = root / "kserve" / project / FILE
    file = own if own.is_file() else root / TEMPLATE
    try:
        text = file.read_text(encoding="utf-8")
        document = yaml.safe_load(text if file == own else re.sub(r"\bretail\b", project, text))
    except (OSError, yaml.YAMLError) as exc:
        raise BadInput(f"no readable InferenceService at {file}: {exc}") from exc
    missing = {PREDICTOR, TRANSFORMER} - set(_containers(document))
    if missing:
        raise BadInput(f"{file} has no container called {' or '.join(sorted(missing))}")
    return dict(document)


def render(template: Document, state: RolloutState, place: Place, name: str = "") -> Document:
    """The InferenceService of one rollout, without a canary's percent.

    ``name`` is the project's unless given. Nothing in metadata may ever depend on the percent:
    KServe copies it to the pods, and a changed pod template is a new revision.
    """
    made = deepcopy(template)
    labels = {
        "app.kubernetes.io/part-of": "perennial",
        "app.kubernetes.io/component": "serving",
        PROJECT: state.project,
    }
    meta = made["metadata"]
    meta["name"] = name or state.project
    meta["namespace"] = place.namespace
    meta["labels"] = {**meta.get("labels", {}), **labels}
    meta["annotations"] = {**meta.get("annotations", {}), MODE: place.mode}
    predictor = made["spec"]["predictor"]
    predictor["labels"] = {
        **predictor.get("labels", {}),
        **labels,
        REVISION: plan.name(state),
        ROLLOUT: str(state.id),
    }
    containers = _containers(made)
    for key, container in containers.items():
        container["image"] = place.steps_image if key == LOOKUP else place.image
    # Fetched by the servers: KServe's own init container breaks Pod Security's `restricted`.
    told = {"bundle": state.bundle_uri, "digest": state.digest, "revision": plan.name(state)}
    _tell(containers[PREDICTOR], **told)
    features = _address(containers[LOOKUP]) if LOOKUP in containers else ""
    told |= {"segments": place.segments, "sink": place.sink, "features": features}
    _tell(containers[TRANSFORMER], **told)
    if place.mode == SPREADS:
        predictor.setdefault("topologySpreadConstraints", _spread(predictor["labels"]))
    return made


def scaled(document: Document, scale: Scale) -> Document:
    """The same in as many copies as asked for. Raises BadInput for at least more than at most.

    An annotation says it as well: so what somebody changed differs from what other settings said.
    """
    made = _counted(document, scale)
    for component in _components(made):
        least, most = component.get("minReplicas", 1), component.get("maxReplicas", 0)
        # KServe takes 0 for no bound.
        if 0 < most < least:
            raise BadInput(
                f"{made['metadata']['name']} would have at least {least} and at most {most} copies;"
                " set PERENNIAL_MIN_REPLICAS and PERENNIAL_MAX_REPLICAS, or mend its file"
            )
    predictor = made["spec"]["predictor"]
    told = f"{predictor.get('minReplicas', '')}-{predictor.get('maxReplicas', '')}"
    made["metadata"].setdefault("annotations", {})[REPLICAS] = told
    return made


def with_percent(document: Document, percent: int | None) -> Document:
    """The same with a share for the newest revision; None gives it all."""
    if percent is not None and not 0 <= percent <= 100:
        # KServe takes any number, and then says that it cannot reconcile.
        raise BadInput(f"{percent} % of traffic, wanted 0 to 100")
    made = deepcopy(document)
    predictor = made["spec"]["predictor"]
    predictor.pop(PERCENT, None)
    if percent is not None:
        predictor[PERCENT] = percent
    return made


def percent(document: Document) -> int | None:
    """The share that the newest revision is given; None means all."""
    found = document["spec"]["predictor"].get(PERCENT)
    return None if found is None else int(found)


def revision(document: Document) -> str:
    """Whose pods a document describes: ``v7``."""
    return str(document["spec"]["predictor"].get("labels", {}).get(REVISION, NOBODY))


def rollout(document: Document) -> int:
    """The rollout that a document was made for, 0 when a stranger's."""
    number = str(document["spec"]["predictor"].get("labels", {}).get(ROLLOUT, ""))
    return int(number) if number.isdecimal() else 0


def differences(wanted: Document, live: Document) -> list[str]:
    """Where a live spec is not what was applied; what a server adds is no difference."""
    said = with_percent(_as_applied(wanted, live), None)["spec"]
    found = with_percent(live, None)["spec"]
    return list(_differences("spec", said, found))


def _as_applied(wanted: Document, live: Document) -> Document:
    """What is wanted, in as many copies as it was applied with."""
    told = str((live["metadata"].get("annotations") or {}).get(REPLICAS, ""))
    least, most = (int(n) if n.isdecimal() else None for n in (told.partition("-")[::2]))
    return _counted(wanted, Scale(least, most))


def _counted(document: Document, scale: Scale) -> Document:
    made = deepcopy(document)
    wanted = {"minReplicas": scale.least, "maxReplicas": scale.most}
    for component in _components(made):
        component.update({key: count for key, count in wanted.items() if count is not None})
    return made


def _components(document: Document) -> list[Document]:
    """Those that KServe scales by themselves."""
    return [document["spec"][key] for key in COMPONENTS if key in document["spec"]]


def _spread(labels: Mapping[str, str]) -> list[Document]:
    """Copies of one revision on several nodes and zones, if there are some."""
    mine = {key: labels[key] for key in (PROJECT, REVISION)}
    return [
        {
            "maxSkew": 1,
            "topologyKey": key,
            "whenUnsatisfiable": "ScheduleAnyway",
            "labelSelector": {"matchLabels": mine},
        }
        for key in _SPREAD
    ]


def _differences(where: str, wanted: Any, live: Any) -> list[str]:
    if isinstance(wanted, Mapping) and isinstance(live, Mapping):
        return [d for k in wanted for d in _differences(f"{where}.{k}", wanted[k], live.get(k))]
    if isinstance(wanted, list) and isinstance(live, list) and len(wanted) == len(live):
        pairs = enumerate(zip(wanted, live, strict=True))
        return [d for i, (w, f) in pairs for d in _differences(f"{where}[{i}]", w, f)]
    if wanted == live or _same_quantity(wanted, live):
        return []
    return [f"{where} is {_short(live)}, applied was {_short(wanted)}"]


def _same_quantity(one: Any, other: Any) -> bool:
    if not all(isinstance(v, str | int) for v in (one, other)):
        return False
    try:
        return bool(parse_quantity(str(one)) == parse_quantity(str(other)))
    except ValueError:
        return False


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _containers(document: Any) -> dict[str, Document]:
    try:
        return {c["name"]: c for c in document["spec"]["predictor"]["containers"]}
    except (KeyError, TypeError):
        return {}


def _address(container: Document) -> str:
    """Where a container of the same pod answers. Raises BadInput where it does not say."""
    told = [a.removeprefix("--port=") for a in container.get("args", []) if a.startswith("--port=")]
    if len(told) != 1 or not told[0].isdecimal():
        raise BadInput(f"container {container['name']} has no argument such as --port=8090")
    return f"http://127.0.0.1:{told[0]}"


def _tell(container: Document, **changes: str) -> None:
    """Set ``--name=value`` arguments, in place when they are there."""
    args = [a for a in container.get("args", []) if a.partition("=")[0][2:] not in changes]
    container["args"] = args + [f"--{key}={value}" for key, value in changes.items() if value]
