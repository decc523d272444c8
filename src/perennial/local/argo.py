"""Do the retries that a pipeline asks for happen on a KFP backend?"""

from typing import Any

import yaml
from lightkube.resources.core_v1 import ConfigMap

from perennial import kube
from perennial.errors import PerennialError
from perennial.settings import Settings

CONFIG = "workflow-controller-configmap"
USELESS = ("OnError", "OnTransientError")  # a step that fails is Failed for Argo, not an error
OURS = "runs are resumed by the API's own retry"


def retries(settings: Settings) -> str:
    """One sentence on what set_retry does there, from the engine's own settings where they show."""
    try:
        policy = _policy(settings)
    except PerennialError:
        return f"under upstream's settings a pipeline's set_retry does nothing; {OURS}"
    if policy in USELESS:
        return f"a pipeline's set_retry does nothing there (retryPolicy is {policy}); {OURS}"
    return f"a pipeline's set_retry works there; {OURS} all the same"


def _policy(settings: Settings) -> str:
    """What the engine puts over every step's own policy; empty where it leaves that alone."""
    client = kube.connect(settings.kfp_namespace)
    found = kube.find(client, ConfigMap, CONFIG)
    if found is None:
        raise kube.Missing(f"there is no ConfigMap {CONFIG} in {settings.kfp_namespace}")
    defaults: Any = yaml.safe_load((found.data or {}).get("workflowDefaults", "")) or {}
    strategy = defaults.get("spec", {}).get("templateDefaults", {}).get("retryStrategy", {})
    return str(strategy.get("retryPolicy", ""))
