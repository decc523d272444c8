"""Features lie in Redis and PostgreSQL that Secrets name, and pods look up what training saw."""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pytest
import sqlalchemy as sa
import yaml
from adapters import rollout

from perennial import bundle, kube
from perennial.contract import Contract
from perennial.features import offline
from perennial.project import load
from perennial.rollout import manifest
from perennial.rollout.knative import KnativeService
from perennial.store import versions
from perennial.store.objects import Folder
from tests.cluster.jobs import AS_OF, IMAGE, ROOT, ask
from tests.cluster.tenant import DOMAIN, INGRESS, until_ready

pytestmark = [pytest.mark.cluster, pytest.mark.stores]

RETAIL = ROOT / "examples" / "retail"
REDIS = ROOT / "kustomize" / "components" / "dev-redis"
SERVING = os.environ.get(
    "PERENNIAL_TEST_SERVING_IMAGE", "dev.local/perennial-serving:0.1.0-python3.11"
)
ENTITIES, AT_ONCE = 1000, 200
Document = dict[str, Any]


@pytest.fixture
def redis(tenant: Any) -> str:
    """The Redis of the demo in the tenant's namespace; gives its URL."""
    docs = list(yaml.safe_load_all((REDIS / "redis.yaml").read_text()))
    conf = {"redis.conf": (REDIS / "redis.conf").read_text()}
    tenant.apply("Secret", "dev-redis", stringData=conf)
    text = yaml.safe_dump_all(docs).replace("image: perennial-", "image: dev.local/perennial-")
    space = ("-n", tenant.space)
    tenant.kubectl.run("apply", *space, "-f", "-", text=text)
    tenant.kubectl.run("rollout", "status", *space, "deployment/dev-redis", "--timeout=120s")
    return "redis://:demo-only@dev-redis:6379/0"


@pytest.fixture
def trained(tenant: Any, launcher: Any, redis: str) -> Any:
    """One run whose features lie in Redis and PostgreSQL; gives the version that it made."""
    database = tenant.settings.state_url
    places = {"online": redis, "registry": database, "offline": database}
    tenant.apply("Secret", "data", stringData={f"features-{k}": v for k, v in places.items()})
    tenant.apply("Secret", "lookup", stringData={f"features-{k}": v for k, v in places.items()})
    result = launcher.run(ask("features"))
    assert result.state == "succeeded", result
    with tenant.engine() as engine:
        (version,) = versions.all_versions(engine, "retail")
    return version


@pytest.fixture
def served(tenant: Any, trained: Any) -> Iterator[tuple[KnativeService, str]]:
    """The model with a feature server beside it, as docs/features.md has it; gives its host."""
    keys = [name for name in os.environ if name.startswith("AWS_")]
    tenant.apply("Secret", "server-artifacts", stringData={k: os.environ[k] for k in keys})
    tenant.apply("Secret", "event-key", stringData={"event.key": "k" * 32})
    tenant.apply("ServiceAccount", "serving")
    template = with_lookup(manifest.load(ROOT, "retail"))
    place = manifest.Place(tenant.space, "Knative", SERVING, "/tmp/segments", "", IMAGE)
    uri = f"{tenant.settings.artifacts}/retail/bundles/{bundle.name_of(trained.digest)}"
    state = replace(rollout(trained.number, "retail"), digest=trained.digest, bundle_uri=uri)
    with kube.connect(tenant.space) as client:
        service = KnativeService(
            client, "retail", lambda wish: manifest.render(template, wish, place), lambda: None
        )
        service.start(state)
        until_ready(service, f"v{trained.number}")
        yield service, f"retail-predictor.{tenant.space}.{DOMAIN}"


def with_lookup(template: Document) -> Document:
    """The file of the model with what the documentation adds to it."""
    text = (ROOT / "docs" / "features.md").read_text()
    container, volume = (
        yaml.safe_load(found)
        for found in re.findall(r"```yaml\n( +- name: .*?)```", text, re.DOTALL)
    )
    template["spec"]["predictor"]["containers"] += container
    template["spec"]["predictor"]["volumes"] += volume
    return template


def newest(tenant: Any) -> pd.DataFrame:
    """What PostgreSQL has of each customer at the moment of the run, a row each."""
    table = offline.table(load(RETAIL))
    query = sa.text(
        f"select distinct on (customer_id) * from {table} where event_time <= :moment"
        " order by customer_id, event_time desc"
    )
    with tenant.engine() as engine, engine.connect() as connection:
        return pd.read_sql(query, connection, params={"moment": AS_OF})


def test_pods_look_up_what_training_saw(tenant: Any, trained: Any, served: Any, tmp_path: Path):
    _, host = served
    project = load(RETAIL)
    offline_rows = newest(tenant)
    fresh = offline_rows["event_time"] >= pd.Timestamp(AS_OF) - pd.Timedelta("7d")
    rows = offline_rows[fresh].dropna(subset=list(project.feature_names)).head(ENTITIES)
    assert len(rows) >= 200

    by_key, by_value = [], []
    contract = contract_of(tenant, trained, tmp_path)
    with httpx.Client(base_url=INGRESS, headers={"host": host}, trust_env=False) as http:
        for start in range(0, len(rows), AT_ONCE):
            part = rows.iloc[start : start + AT_ONCE]
            by_key += answered(http, asking(part["customer_id"].tolist()))
            by_value += answered(http, contract.to_request(part, f"r{start}", AS_OF))
        unknown = http.post("/v2/models/retail/infer", json=asking([1]), timeout=60)

    assert by_key == by_value
    assert len(set(by_key)) > 10
    assert (unknown.status_code, "no features are known" in unknown.text) == (400, True)


def contract_of(tenant: Any, trained: Any, folder: Path) -> Contract:
    kept = Folder(f"{tenant.settings.artifacts}/retail/bundles")
    here = kept.fetch(bundle.name_of(trained.digest), folder / "bundle")
    return Contract.from_plain(bundle.parts(here).contract)


def asking(keys: list[int]) -> Document:
    wanted = {"name": "customer_id", "datatype": "INT64", "shape": [len(keys)], "data": keys}
    return {"inputs": [wanted], "parameters": {"event_time": AS_OF.isoformat()}}


def answered(http: httpx.Client, body: Document) -> list[float]:
    answer = http.post("/v2/models/retail/infer", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["outputs"][0]["data"])
