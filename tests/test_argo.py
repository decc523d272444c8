"""The doctor says whether a backend makes the retries that a pipeline asks for."""

import pytest
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.core_v1 import ConfigMap

from perennial import kube
from perennial.errors import BadInput
from perennial.local import argo

# As upstream's manifests of 2.17 have it.
UPSTREAM = """
spec:
  ttlStrategy:
    secondsAfterCompletion: 3600
  templateDefaults:
    retryStrategy:
      limit: '2'
      retryPolicy: OnError
"""


def showing(monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    data = {} if text is None else {"workflowDefaults": text}
    found = ConfigMap(metadata=ObjectMeta(name=argo.CONFIG), data=data)
    monkeypatch.setattr(kube, "connect", lambda namespace: namespace)
    monkeypatch.setattr(kube, "find", lambda client, kind, name: found)


def test_upstreams_settings_make_set_retry_useless(settings, monkeypatch):
    showing(monkeypatch, UPSTREAM)

    told = argo.retries(settings)

    assert told.startswith("a pipeline's set_retry does nothing there (retryPolicy is OnError)")
    assert told.endswith("runs are resumed by the API's own retry")


@pytest.mark.parametrize("text", [None, "", UPSTREAM.replace("OnError", "Always")])
def test_without_them_it_works(settings, monkeypatch, text):
    showing(monkeypatch, text)

    assert argo.retries(settings).startswith("a pipeline's set_retry works there")


def test_what_cannot_be_seen_is_told_as_upstream_has_it(settings, monkeypatch):
    def refuse(namespace: str) -> None:
        raise BadInput("no cluster")

    monkeypatch.setattr(kube, "connect", refuse)

    assert argo.retries(settings).startswith("under upstream's settings")
