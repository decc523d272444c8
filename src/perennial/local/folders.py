"""Which project and which state folder does a command mean?"""

from pathlib import Path

from perennial import project
from perennial.errors import BadInput
from perennial.settings import Settings, StateFolder

REPLAYS = "replays"
PROJECTS = "projects"  # where a cluster mounts them, below the root


def project_folder(settings: Settings, text: str) -> Path:
    """The project that ``text`` names, here or below the root: a folder, or a YAML file.

    Raises BadInput that lists the shipped examples when there is none.
    """
    for base in (Path.cwd(), settings.root):
        candidate = (base / text).resolve()
        if candidate.name == "project.yaml" and candidate.is_file():
            return candidate.parent
        if (candidate / "project.yaml").is_file():
            return candidate
        if candidate.suffix == ".yaml" and candidate.is_file():
            return candidate
    shipped = sorted(p.parent.name for p in (settings.root / "examples").glob("*/project.yaml"))
    raise BadInput(
        f"no project.yaml in {text!r}; give a folder that has one, such as"
        f" {', '.join('examples/' + name for name in shipped) or 'examples/retail'},"
        " or run 'perennial init TABLE' to write one"
    )


def replay_settings(settings: Settings) -> Settings:
    """The same settings with state folders of replays, apart from those of served projects."""
    ours = {"home": settings.home / REPLAYS, "state_url": "", "artifacts": ""}
    return settings.model_copy(update=ours)


def state(settings: Settings, text: str) -> StateFolder:
    """State folder of a project, or of the one used last when ``text`` is empty.

    A project that was both served and replayed has two; the one used last counts.
    """
    wanted = project.load(project_folder(settings, text)).name if text else None
    if settings.state_url:
        return settings.state(wanted or _only_project(settings))
    found = [
        StateFolder(db.parent.resolve())
        for home in (settings.home, settings.home / REPLAYS)
        for db in home.glob("*/state.db")
        if wanted in (None, db.parent.name)
    ]
    if not found:
        raise BadInput(
            f"nothing is known yet of {wanted or 'any project'} in {settings.home};"
            f" run 'perennial replay {text or 'examples/retail'}' or 'perennial up' first"
        )
    return max(found, key=_last_used)


def _only_project(settings: Settings) -> str:
    """The one project of a tenant's pods."""
    files = sorted((settings.root / PROJECTS).glob("*.yaml"))
    if len(files) != 1:
        names = ", ".join(f"{PROJECTS}/{file.name}" for file in files)
        raise BadInput(f"the state of several projects is in one database; name one: {names}")
    return project.load(files[0]).name


def _last_used(folder: StateFolder) -> float:
    wal = folder.database.with_name(folder.database.name + "-wal")
    return max(p.stat().st_mtime for p in (folder.database, wal) if p.exists())
