"""What does an object of KServe or Knative say of itself, by its conditions?"""

from collections.abc import Mapping
from typing import Any

from perennial.rollout.manifest import Document


def of(document: Mapping[str, Any], kind: str) -> Document:
    """One condition, empty when it is not told."""
    return next((c for c in _all(document) if c.get("type") == kind), {})


def is_true(document: Mapping[str, Any], kind: str) -> bool:
    """Does a condition hold, as far as it is told?"""
    return of(document, kind).get("status") == "True"


def complaint(document: Mapping[str, Any]) -> str:
    """What the first condition says that does not hold, and says something."""
    said = [str(c.get("message", "")) for c in _all(document) if c.get("status") == "False"]
    return next((text for text in said if text), "")


def _all(document: Mapping[str, Any]) -> list[Document]:
    return [dict(c) for c in (document.get("status") or {}).get("conditions", ())]
