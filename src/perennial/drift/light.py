"""Load one module of a big library without all that its package would import."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType


def package(name: str) -> None:
    """Let submodules of ``name`` be imported without its ``__init__``. Raises ImportError.

    The package's own names are not there afterwards: for processes of one purpose only.
    """
    if name in sys.modules:
        return
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    bare = ModuleType(name)
    bare.__path__ = list(spec.submodule_search_locations)
    bare.__spec__ = spec
    sys.modules[name] = bare


@contextmanager
def without(name: str) -> Iterator[None]:
    """Hide an optional library from what is imported meanwhile."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
