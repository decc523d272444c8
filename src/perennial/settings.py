"""What does this machine or pod look like: read once, by the entry point, and handed down."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from perennial import __version__
from perennial.errors import many

PREFIX = "PERENNIAL_"


@dataclass(frozen=True)
class StateFolder:
    """Where one project keeps what it knows; every path is below ``root``.

    On a cluster the database and the artifacts lie elsewhere, and the folder is a pod's own copy.
    """

    root: Path
    database_url: str = ""  # empty: SQLite below root
    artifact_root: str = ""  # URI of this project's artifacts; empty: root itself

    @property
    def database(self) -> Path:
        return self.root / "state.db"

    @property
    def url(self) -> str:
        return self.database_url or f"sqlite:///{self.database}"

    def artifacts(self, kind: str) -> str:
        """URI of the folder that all pods share for ``bundles``, ``segments`` or ``runs``."""
        root = self.artifact_root or self.root.resolve().as_uri()
        return f"{root}/{kind}"

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    @property
    def snapshots(self) -> Path:
        return self.root / "snapshots"

    @property
    def scratch(self) -> Path:
        return self.root / "scratch"

    @property
    def bundles(self) -> Path:
        return self.root / "bundles"

    @property
    def segments(self) -> Path:
        return self.root / "segments"

    @property
    def labels(self) -> Path:
        return self.root / "labels"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def feast(self) -> Path:
        return self.root / "feast"

    @property
    def mlflow(self) -> Path:
        return self.root / "mlflow"

    @property
    def stack(self) -> Path:
        return self.root / "stack"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def reports(self) -> Path:
        return self.root / "reports"


class Settings(BaseModel):
    """Everything that the surroundings decide; each field is ``PERENNIAL_<NAME>`` there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    home: Annotated[
        Path, Field(description="Folder that holds one state folder for each project.")
    ] = Path(".perennial")
    root: Annotated[
        Path, Field(description="Folder that holds pipelines/, kserve/, feature_repo/, examples/.")
    ] = Path(__file__).resolve().parents[2]
    runtime_python: Annotated[
        Path, Field(description="Python of the runtime environment (drift transformer, predictor).")
    ] = Path(sys.prefix).parent / ".venv-runtime" / "bin" / "python"
    tracking_uri: Annotated[
        str, Field(description="MLflow tracking server; empty means SQLite in the state folder.")
    ] = ""
    edge_port: Annotated[
        int, Field(ge=0, le=65535, description="Port of the Envoy edge; 0 means any free one.")
    ] = 8080
    edge_url: Annotated[
        str,
        Field(description="Where models answer, for notebooks; empty means this machine's edge."),
    ] = ""
    edge_host: Annotated[
        str, Field(description="Host header that a notebook sends there; empty means none.")
    ] = ""
    log_level: Annotated[str, Field(description="Level of the log: DEBUG, INFO, WARNING.")] = "INFO"
    state_url: Annotated[
        str,
        Field(
            description="SQLAlchemy URL of the state database, such as postgresql+psycopg://...;"
            " empty means SQLite in the state folder."
        ),
    ] = ""
    artifacts: Annotated[
        str,
        Field(
            description="URI of a folder (s3://bucket/prefix) for bundles, segments and records of"
            " runs; empty means the state folder."
        ),
    ] = ""
    source_url: Annotated[
        str,
        Field(
            repr=False,
            description="SQLAlchemy URL of the database that source.query of a project asks, such"
            " as postgresql://role:password@host:5432/database; empty means source.url.",
        ),
    ] = ""
    features_online: Annotated[
        str,
        Field(
            repr=False,
            description="Where features are looked up: redis://user:password@host:6379/0 (rediss://"
            " with TLS); empty means SQLite in the state folder.",
        ),
    ] = ""
    features_registry: Annotated[
        str,
        Field(
            repr=False,
            description="Where features and their versions are registered: postgresql://..., for"
            " one schema of a role's own; empty means SQLite in the state folder.",
        ),
    ] = ""
    features_offline: Annotated[
        str,
        Field(
            repr=False,
            description="Where features are joined to rows of the past: postgresql://...?schema=s;"
            " empty means DuckDB on a Parquet file in the state folder.",
        ),
    ] = ""
    event_key: Annotated[
        Path | None,
        Field(description="File with the key that signs drift events; none means our own one."),
    ] = None
    event_fresh_s: Annotated[
        float,
        Field(gt=0, description="Greatest age of an event in seconds; a broker delivers late."),
    ] = 300.0
    launcher: Annotated[
        Literal["local", "job", "kfp"],
        Field(description="Who runs pipelines: this machine, a Kubernetes Job, a KFP backend."),
    ] = "local"
    namespace: Annotated[
        str, Field(description="Kubernetes namespace; empty means the pod's or the kubeconfig's.")
    ] = ""
    deployment_mode: Annotated[
        Literal["Knative", "Standard"],
        Field(description="How KServe deploys on a cluster; each InferenceService is told so."),
    ] = "Knative"
    image: Annotated[
        str, Field(description="Image of the core environment: steps, Jobs, operator.")
    ] = f"perennial:{__version__}-python3.11"
    serving_image: Annotated[
        str, Field(description="Image of the runtime environment: predictor and transformer.")
    ] = f"perennial-serving:{__version__}-python3.11"
    sink: Annotated[
        str,
        Field(
            pattern=r"^(https?://\S+)?$",
            description="URL that takes drift events from servers on a cluster; empty means the"
            " Broker `default` of the namespace, which a first rollout then waits for.",
        ),
    ] = ""
    min_replicas: Annotated[
        int | None,
        Field(
            ge=1,
            description="Least copies of each version's servers on a cluster, from its next rollout"
            " on; none means what its InferenceService file says.",
        ),
    ] = None
    max_replicas: Annotated[
        int | None,
        Field(
            ge=1,
            description="Most copies of each version's servers under load; none means what its"
            " InferenceService file says.",
        ),
    ] = None
    keep_rollouts: Annotated[
        int,
        Field(
            ge=1,
            description="ModelRollouts of a project that the operator keeps when they are over;"
            " it deletes older ones of its own making, the ledger keeps their story.",
        ),
    ] = 50
    code_commit: Annotated[
        str,
        Field(
            description="Commit of the code, where there is no git checkout to ask;"
            " `-dirty` behind it says that files differ from it."
        ),
    ] = ""
    run_cpu: Annotated[
        str,
        Field(
            pattern=r"^\d+(\.\d+)?m?$",
            description="CPU that a run's Job, or each step on KFP, asks for.",
        ),
    ] = "1"
    run_cpu_limit: Annotated[
        str,
        Field(
            pattern=r"^\d+(\.\d+)?m?$",
            description="CPU that a run's Job, or each step on KFP, may not exceed.",
        ),
    ] = "2"
    run_memory: Annotated[
        str,
        Field(
            pattern=r"^\d+(\.\d+)?(Ki|Mi|Gi|Ti|k|M|G|T)?$",
            description="Memory that a run's Job, or each step on a KFP backend, asks for and"
            " may not exceed.",
        ),
    ] = "3Gi"
    run_deadline_s: Annotated[
        int,
        Field(
            ge=60, description="Seconds after which a run on a cluster is ended, retries and all."
        ),
    ] = 7200
    run_start_s: Annotated[
        int, Field(ge=5, description="Seconds in which the pod of a run must have started.")
    ] = 180
    kfp_endpoint: Annotated[
        str,
        Field(
            description="URL of the KFP API, such as http://127.0.0.1:8888 behind a port-forward;"
            " empty is found as kfp finds it: KF_PIPELINES_ENDPOINT, the Service of the cluster"
            " that this pod runs in, else the proxy of the kubeconfig's API server."
        ),
    ] = ""
    kfp_namespace: Annotated[
        str, Field(description="Namespace that the KFP backend itself runs in.")
    ] = "kubeflow"
    kfp_token: Annotated[
        Path | None,
        Field(
            description="File with a bearer token for the KFP API, read again for each call; none"
            " means the volume that Kubeflow mounts, if there is one."
        ),
    ] = None
    kfp_ca: Annotated[
        Path | None,
        Field(description="File with the authority that signed the KFP API's certificate."),
    ] = None
    kfp_service_account: Annotated[
        str, Field(description="ServiceAccount that runs on a KFP backend use.")
    ] = "pipeline-run"
    kfp_retries: Annotated[
        int,
        Field(
            ge=0,
            le=10,
            description="How often a run whose step ended without a word (a lost node, no memory)"
            " is resumed at that step; what a step says itself is final.",
        ),
    ] = 2
    step_timeout_s: Annotated[
        int,
        Field(
            ge=60, description="Seconds that a step may take on a KFP backend, its pull included."
        ),
    ] = 3600
    run_node_selector: Annotated[
        str,
        Field(
            pattern=r"^([\w./-]+=[\w.-]*(,[\w./-]+=[\w.-]*)*)?$",
            description="Labels of the nodes that steps may run on, such as pool=batch,disk=ssd.",
        ),
    ] = ""

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None) -> "Settings":
        """Read ``PERENNIAL_*`` variables. Raises BadInput that names each wrong one."""
        env = os.environ if environ is None else environ
        found = {
            key.removeprefix(PREFIX).lower(): value
            for key, value in env.items()
            if key.startswith(PREFIX) and key.removeprefix(PREFIX).lower() in cls.model_fields
        }
        try:
            return cls.model_validate(found)
        except ValidationError as exc:
            faults = [
                f"{PREFIX}{str(e['loc'][0]).upper()} is {e['input']!r}, wanted: {e['msg']}"
                for e in exc.errors()
            ]
            raise many("the environment has wrong settings", faults) from exc

    def state(self, project: str) -> StateFolder:
        """The state folder of one project (not created here)."""
        artifacts = f"{self.artifacts.rstrip('/')}/{project}" if self.artifacts else ""
        return StateFolder(self.home.resolve() / project, self.state_url, artifacts)


def s3_endpoint() -> str:
    """Address of an S3 store that is not Amazon's, as its own tools are told it; else empty."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")


def in_pod() -> bool:
    """Does this process run in a pod? The kubelet tells every container where the API is."""
    return "KUBERNETES_SERVICE_HOST" in os.environ


def tell_libraries(**variables: str) -> None:
    """Set what a library reads from the environment while it is imported, if nobody set it."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)
