"""A look-up gives what the policies allow, and never a value that nobody knows."""

import asyncio
import contextlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pytest
import servers

from perennial.contract import Contract, FeatureSpec, Tensor
from perennial.data import history, missing, simulator
from perennial.errors import BadInput
from perennial.features import online, store, table
from perennial.project import Feature, Project, Simulator, load
from perennial.serving import lookup
from perennial.serving.lookup import Lookup, View
from perennial.serving.transformer import Transformer
from perennial.serving.wire import Ask, Refused
from perennial.settings import Settings
from perennial.store import scratch

NOW = datetime(2020, 5, 1, tzinfo=UTC)
ROOT = Path(__file__).parents[1]
VIEW = View("bought", "customer_id", "feature_time", timedelta(days=14).total_seconds())


def feature(name: str = "spend", **more: Any) -> Feature:
    return Feature.model_validate({"name": name, "type": "number", **more})


@pytest.mark.parametrize(
    ("more", "value", "age_d", "wanted"),
    [
        pytest.param({}, 2.5, 900, 2.5, id="of any age is used where nothing limits it"),
        pytest.param({}, None, 0, None, id="that is missing stays missing"),
        pytest.param({"max_age": "7d"}, 2.5, 7, 2.5, id="of the greatest age is used"),
        pytest.param({"max_age": "7d"}, 2.5, 8, None, id="that is too old is missing, not zero"),
        pytest.param({"max_age": "7d"}, 2.5, None, None, id="of an unknown age is missing"),
        pytest.param({"missing": "fail"}, 0.0, 3, 0.0, id="of zero is a value"),
        pytest.param({"missing": "fail"}, None, 3, "no value", id="that may not miss is refused"),
        pytest.param(
            {"missing": "fail", "max_age": "7d"}, 2.5, 8, "8d old", id="too old is refused"
        ),
        pytest.param(
            {"missing": "last_known", "max_age": "28d"}, 2.5, 20, 2.5, id="last known is used"
        ),
        pytest.param(
            {"missing": "last_known", "max_age": "28d"}, 2.5, 29, "may be 28d", id="too long ago"
        ),
        pytest.param(
            {"missing": "last_known", "max_age": "28d"}, None, 0, "no value", id="never known"
        ),
    ],
)
def test_a_value(more: dict[str, str], value: float | None, age_d: int | None, wanted: Any):
    age = None if age_d is None else timedelta(days=age_d)

    found = missing.judge(feature(**more), value, age)

    if isinstance(wanted, str):
        assert found.value is None
        assert wanted in found.fault
    else:
        assert (found.value, found.fault) == (wanted, "")


def project(*features: dict[str, Any]) -> Project:
    return Project.model_validate(
        {
            "name": "shop",
            "kind": "transactions",
            "time": {"column": "InvoiceDate"},
            "label": {},
            "features": [{"type": "number", **f} for f in features],
        }
    )


def answering(columns: dict[str, list[Any]], status: int = 200) -> httpx.MockTransport:
    """A feature server that knows these columns."""
    body = {
        "metadata": {"feature_names": list(columns)},
        "results": [{"values": values} for values in columns.values()],
    }
    return httpx.MockTransport(lambda _request: httpx.Response(status, json=body))


def asked(
    transport: httpx.AsyncBaseTransport, found: Project, keys: list[int], view: View = VIEW
) -> pd.DataFrame:
    async def once() -> pd.DataFrame:
        async with httpx.AsyncClient(transport=transport, base_url="http://features") as client:
            return await Lookup(client, found, view).rows(keys, NOW)

    return asyncio.run(once())


def ago(days: float) -> str:
    return str(int((NOW - timedelta(days=days)).timestamp() * 1e6))


def test_many_keys_are_asked_for_at_once_and_come_back_in_order():
    known = answering(
        {"customer_id": [7, 8], "feature_time": [ago(1), ago(2)], "spend": [1.5, None]}
    )

    rows = asked(known, project({"name": "spend"}), [7, 8])

    assert rows["spend"].iloc[0] == 1.5
    assert rows["spend"].isna().tolist() == [False, True]


@pytest.mark.parametrize(
    ("policy", "days", "wanted"),
    [
        pytest.param({}, 15, None, id="missing beyond its view's time"),
        pytest.param({"missing": "last_known", "max_age": "28d"}, 15, 1.5, id="carried on"),
        pytest.param({"max_age": "7d"}, 8, None, id="missing beyond its own age"),
    ],
)
def test_a_row_of_other_days_is(policy: dict[str, str], days: int, wanted: float | None):
    known = {"customer_id": [7], "feature_time": [ago(days)], "spend": [1.5]}
    known["spend__age_s"] = [0.0]

    rows = asked(answering(known), project({"name": "spend", **policy}), [7])

    assert (None if pd.isna(rows["spend"].iloc[0]) else rows["spend"].iloc[0]) == wanted


def test_the_age_of_a_carried_value_counts():
    known = {"customer_id": [7], "feature_time": [ago(10)], "spend": [1.5]}
    known["spend__age_s"] = [timedelta(days=20).total_seconds()]
    policy = {"missing": "last_known", "max_age": "28d"}

    with pytest.raises(Refused, match="customer_id 7: spend is 30d old, and may be 28d"):
        asked(answering(known), project({"name": "spend", **policy}), [7])


def test_a_row_of_a_clock_that_goes_fast_counts_as_new():
    known = {"customer_id": [7], "feature_time": [ago(-0.9)], "spend": [1.5]}
    known["spend__age_s"] = [timedelta(days=28).total_seconds()]
    policy = {"missing": "last_known", "max_age": "28d"}

    rows = asked(answering(known), project({"name": "spend", **policy}), [7])

    assert rows["spend"].tolist() == [1.5]
    known["spend__age_s"] = [timedelta(days=28, hours=12).total_seconds()]
    with pytest.raises(Refused, match="spend is .* old, and may be 28d"):
        asked(answering(known), project({"name": "spend", **policy}), [7])


def test_a_row_of_the_future_is_refused():
    known = {"customer_id": [7], "feature_time": [ago(-1.1)], "spend": [1.5]}

    with pytest.raises(
        Refused,
        match="customer_id 7: its features are of 2020-05-02 02:24, more than a day after",
    ) as told:
        asked(answering(known), project({"name": "spend"}), [7])

    assert told.value.status == 503


def test_every_refused_row_is_counted():
    known = {"customer_id": [7, 8], "feature_time": [ago(1), ago(1)], "spend": [None, None]}

    with pytest.raises(Refused, match="customer_id 7: spend has no value.*1 more row") as told:
        asked(answering(known), project({"name": "spend", "missing": "fail"}), [7, 8])

    assert told.value.status == 503


def test_an_entity_that_nobody_knows_is_the_clients_fault():
    known = {"customer_id": [7], "feature_time": [None], "spend": [None]}

    with pytest.raises(BadInput, match="inputs.customer_id.data holds 7, of which no features"):
        asked(answering(known), project({"name": "spend"}), [7])


@pytest.mark.parametrize(
    "transport",
    [
        pytest.param(answering({}, 500), id="fails"),
        pytest.param(answering({"customer_id": [7]}), id="knows another schema"),
        pytest.param(httpx.MockTransport(lambda _r: httpx.Response(200)), id="says nothing"),
    ],
)
def test_a_request_is_refused_for_now_when_the_feature_server(transport: httpx.MockTransport):
    with pytest.raises(Refused, match="the feature server does not answer") as told:
        asked(transport, project({"name": "spend"}), [7])

    assert told.value.status == 503


@pytest.mark.parametrize(
    ("tensor", "fault"),
    [
        pytest.param(Tensor("k", "BYTES", (1,), ["7"]), "wanted INT64", id="of texts"),
        pytest.param(Tensor("k", "INT64", (0,), []), "no list of 1 to", id="of nothing"),
        pytest.param(Tensor("k", "INT64", (1,), [1.5]), "no whole number", id="of parts"),
        pytest.param(Tensor("k", "INT64", (1,), [True]), "no whole number", id="of truths"),
        pytest.param(Tensor("k", "INT64", (2,), [7]), "its data wants", id="of another shape"),
        pytest.param(Tensor("k", "INT64", (1001,), [7] * 1001), "1 to 1,000", id="of too many"),
    ],
)
def test_keys_are_refused(tensor: Tensor, fault: str):
    with pytest.raises(BadInput, match=fault):
        lookup.keys(tensor)


def test_keys_come_as_json_or_in_binary():
    assert lookup.keys(Tensor("k", "INT64", (2,), [7, 8])) == [7, 8]
    assert lookup.keys(Tensor("k", "INT64", (2, 1), np.array([[7], [8]]))) == [7, 8]


class Offered:
    def __init__(self) -> None:
        self.requests: list[Any] = []

    def offer(self, request: Any) -> None:
        self.requests.append(request)


def test_the_transformer_fills_in_what_it_looked_up_and_watches_it():
    contract = Contract((FeatureSpec("spend", "number"),))
    known = answering({"customer_id": [7], "feature_time": [ago(1)], "spend": [1.5]})
    offered, seen = Offered(), []

    def predictor(request: httpx.Request) -> httpx.Response:
        seen.append(request.read().decode())
        return httpx.Response(200, json={"outputs": [{"name": "probability", "data": [0.25]}]})

    async def once() -> Any:
        async with (
            httpx.AsyncClient(transport=known, base_url="http://features") as features,
            httpx.AsyncClient(
                transport=httpx.MockTransport(predictor), base_url="http://predictor"
            ) as client,
        ):
            way = Lookup(features, project({"name": "spend"}), VIEW)
            told: Any = offered
            service = Transformer("shop", contract, client, told, {}, lambda: NOW, way)
            ask = Ask("r", (Tensor("customer_id", "INT64", (1,), [7]),), {})
            return await service.answer(service.read(ask), {})

    answer = asyncio.run(once())

    assert list(answer.scores) == [0.25]
    assert '"spend"' in seen[0] and "customer_id" not in seen[0]
    assert offered.requests[0].matrix.tolist() == [[1.5]]


def test_the_words_for_ages_are_the_same_on_both_sides():
    assert lookup.AGE.format("spend") == history.age_name("spend")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Settings, Project]]:
    """A real feature server, as a stack starts it."""
    home = tmp_path_factory.mktemp("served")
    settings, found = Settings(home=home), load(ROOT / "examples" / "retail")
    snapshot = home / "snapshot.parquet"
    simulator.simulate(Simulator(seed=5, days=200, customers=150)).to_parquet(
        snapshot, coerce_timestamps="us"
    )
    with store.opened(settings, found) as made:
        with scratch.folder(made.folder) as near:
            as_of = datetime(2011, 6, 6, tzinfo=UTC)
            table.draft(found, made, snapshot, as_of, near)
        online.materialize(made, found)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "perennial.features.server", "--port", str(port)]
    command += ["--project", str(ROOT / "examples" / "retail")]
    child = subprocess.Popen(
        command, env={**os.environ, "PERENNIAL_HOME": str(home)}, stderr=subprocess.DEVNULL
    )
    try:
        _await(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}", settings, found
    finally:
        child.terminate()
        child.wait(20)


def _await(url: str) -> None:
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url).status_code == 200:
                return
        time.sleep(0.1)
    raise TimeoutError(f"{url} did not answer")


def test_a_real_feature_server_gives_what_the_store_holds(
    served: tuple[str, Settings, Project],
):
    url, settings, found = served
    with store.opened(settings, found) as made:
        newest = pd.read_parquet(made.rows)["event_time"].max().to_pydatetime()
        keys = pd.read_parquet(made.rows)["customer_id"].unique()[:200].tolist()
        wanted = made.read(keys, newest)

    async def once() -> pd.DataFrame:
        async with httpx.AsyncClient(base_url=url) as client:
            known = wanted[wanted[store.TIME].notna()]
            way = Lookup(client, found, lookup.connect(url))
            return await way.rows(known["customer_id"].tolist(), newest)

    rows = asyncio.run(once())

    held = wanted[wanted[store.TIME].notna()].reset_index(drop=True)
    assert len(rows) > 50
    for name in found.feature_names:
        pd.testing.assert_series_equal(
            rows[name], held[name], check_dtype=False, check_exact=name == "country"
        )


def test_an_entity_whose_rows_were_emptied_is_unknown_to_a_real_feature_server(
    served: tuple[str, Settings, Project],
):
    url, settings, found = served
    with store.opened(settings, found) as made:
        rows = pd.read_parquet(made.rows)
        newest = rows["event_time"].max().to_pydatetime()
        customer = int(rows["customer_id"].max())
        held = made.read([customer], newest)
        made.write(
            pd.DataFrame({made.key: [customer], "event_time": newest, **dict.fromkeys(made.names)})
        )

    async def once() -> pd.DataFrame:
        async with httpx.AsyncClient(base_url=url) as client:
            return await Lookup(client, found, lookup.connect(url)).rows([customer], newest)

    assert held[store.TIME].notna().all()
    with pytest.raises(BadInput, match=f"holds {customer}, of which no features are known"):
        asyncio.run(once())


@pytest.mark.parametrize("path", ["/push", "/write-to-online-store", "/materialize", "/chat"])
def test_the_feature_servers_doors_that_write_are_shut(
    served: tuple[str, Settings, Project], path: str
):
    url = served[0]

    assert httpx.post(f"{url}{path}", json={}).status_code == 404


def test_a_feature_server_that_is_not_there_is_named():
    with pytest.raises(Refused, match="no feature server answers at http://127.0.0.1:1/view"):
        lookup.connect("http://127.0.0.1:1")


def test_a_feature_server_that_starts_up_is_waited_for():
    port = servers.free_port()
    told = {"name": "rows", "key": "row_id", "time": "t", "ttl_s": 0.0}

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(told).encode())

        def log_message(self, *_: object) -> None:
            pass

    def late() -> None:
        time.sleep(0.5)
        server = http.server.HTTPServer(("127.0.0.1", port), Answer)
        server.handle_request()
        server.server_close()

    starting = threading.Thread(target=late)
    starting.start()
    found = lookup.connect(f"http://127.0.0.1:{port}", patience_s=60)
    starting.join()

    assert found == View(**told)
