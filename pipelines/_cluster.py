"""What does a step need where a cluster runs it?"""

from kfp import kubernetes
from kfp.dsl import PipelineTask

from perennial.settings import Settings

# The names that kustomize/base gives them.
STATE = {"url": "PERENNIAL_STATE_URL", "tracking-uri": "PERENNIAL_TRACKING_URI"}
ARTIFACTS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
)
# Optional, and so is each key: where rows come from and features go.
DATA = {
    "source-url": "PERENNIAL_SOURCE_URL",
    "features-online": "PERENNIAL_FEATURES_ONLINE",
    "features-registry": "PERENNIAL_FEATURES_REGISTRY",
    "features-offline": "PERENNIAL_FEATURES_OFFLINE",
}
SETTINGS = ("PERENNIAL_ARTIFACTS", "PERENNIAL_HOME")
WORK = "/home/perennial"
PROJECTS = "/opt/perennial/projects"
LABELS = {
    "app.kubernetes.io/name": "perennial",
    "app.kubernetes.io/part-of": "perennial",
    "app.kubernetes.io/component": "pipeline-run",
}

# A pipeline is wired when its module is imported, so what wires it is read then.
CLUSTER = Settings.load()


def placed(task: PipelineTask, cluster: Settings = CLUSTER) -> PipelineTask:
    """Bound a step in time and size, and give its pod what the step asks its surroundings for.

    kfp.local takes no notice of any of this.
    """
    task.set_cpu_request(cluster.run_cpu).set_cpu_limit(cluster.run_cpu_limit)
    task.set_memory_request(cluster.run_memory).set_memory_limit(cluster.run_memory)
    # A missing image would leave a run RUNNING for ever.
    kubernetes.set_timeout(task, cluster.step_timeout_s)
    kubernetes.set_security_context(task, run_as_non_root=True)
    for label in filter(None, cluster.run_node_selector.split(",")):
        kubernetes.add_node_selector(task, *label.split("=", 1))
    for label, value in LABELS.items():
        kubernetes.add_pod_label(task, label, value)
    return _told(task)


def _told(task: PipelineTask) -> PipelineTask:
    kubernetes.use_secret_as_env(task, "state", STATE)
    # Where the cloud itself lets pods in, there is no such secret.
    kubernetes.use_secret_as_env(task, "artifacts", {k: k for k in ARTIFACTS}, optional=True)
    kubernetes.use_secret_as_env(task, "data", DATA, optional=True)
    kubernetes.use_config_map_as_env(task, "settings", {k: k for k in SETTINGS})
    kubernetes.use_config_map_as_volume(task, "projects", PROJECTS, optional=True)
    kubernetes.empty_dir_mount(task, "work", WORK)
    return task
