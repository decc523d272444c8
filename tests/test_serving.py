import json
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import servers
import tiny
import xgboost

from perennial import bundle, events, signing
from perennial.contract import Contract
from perennial.drift import segments

WINDOW = tiny.WINDOW_ROWS * tiny.STEP

GRPC = """
import json, struct, sys
from perennial.drift import light
light.package("kserve")
import grpc
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb, grpc_predict_v2_pb2_grpc as rpc
stub = rpc.GRPCInferenceServiceStub(grpc.insecure_channel(sys.argv[1]))
numbers = {"a": 0.5, "b": -1.0, "c": 3.0}
def ask(raw, event_time="2019-06-01T00:00:00Z", **change):
    inputs, parts = [], []
    for name in [*numbers, "colour"]:
        text = name == "colour"
        tensor = {"name": name, "datatype": "BYTES" if text else "FP64", "shape": [1]}
        if raw:
            red = struct.pack("<I", 3) + b"red"
            parts.append(red if text else struct.pack("<d", numbers[name]))
        elif text:
            tensor["contents"] = {"bytes_contents": [b"red"]}
        else:
            tensor["contents"] = {"fp64_contents": [numbers[name]]}
        inputs.append(tensor)
    parameters = {"event_time": pb.InferParameter(string_param=event_time)}
    request = {"model_name": "tiny", "id": "g1", "inputs": inputs, "raw_input_contents": parts,
               "parameters": parameters, **change}
    return stub.ModelInfer(pb.ModelInferRequest(**request), timeout=10)
def code(call):
    try:
        call()
    except grpc.RpcError as error:
        return [error.code().name, error.details()]
typed, raw = ask(False), ask(True)
unload = pb.RepositoryModelUnloadRequest(model_name="tiny")
print(json.dumps({
    "typed": list(typed.outputs[0].contents.fp64_contents),
    "raw": list(struct.unpack("<d", raw.raw_output_contents[0])),
    "id": typed.id, "digest": typed.parameters["model_digest"].string_param,
    "inputs": [i.name for i in stub.ModelMetadata(pb.ModelMetadataRequest(name="tiny")).inputs],
    "missing input": code(lambda: ask(False, inputs=[])),
    "odd time": code(lambda: ask(False, event_time="soon")),
    "other model": code(lambda: ask(False, model_name="x")),
    "both ways": code(lambda: ask(False, raw_input_contents=[b"1234"] * 4)),
    "unload": code(lambda: stub.RepositoryModelUnload(unload)),
    "after": stub.ModelReady(pb.ModelReadyRequest(name="tiny")).ready,
}))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "tiny"
    tiny.bundle(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(made: Path) -> bundle.Bundle:
    return bundle.load(made)


@pytest.fixture(scope="module")
def contract(loaded: bundle.Bundle) -> Contract:
    return Contract.from_plain(loaded.contract)


@pytest.fixture(scope="module")
def predictor(made: Path) -> Iterator[servers.Server]:
    log = made.parent / "predictor.log"
    server = servers.Server("predictor", log, servers.runtime_python(), bundle=made)
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def sink() -> Iterator[servers.Sink]:
    sink = servers.Sink()
    yield sink
    sink.close()


@pytest.fixture(scope="module")
def key(made: Path) -> bytes:
    return signing.event_key(made.parent)


@pytest.fixture(scope="module")
def transformer(made, predictor, sink, key) -> Iterator[servers.Server]:
    server = started(made, predictor, sink.url, "v1")
    try:
        yield server.wait_ready()
    finally:
        server.stop()


def started(made: Path, predictor: servers.Server, sink: str, revision: str) -> servers.Server:
    return servers.Server(
        "transformer",
        made.parent / f"transformer-{revision}.log",
        servers.runtime_python(),
        bundle=made,
        predictor_host=predictor.address,
        segments=made.parent / f"segments-{revision}",
        revision=revision,
        sink=sink,
        key=made.parent / "event.key",
        enable_latency_logging="true",
    )


def one(contract: Contract) -> dict:
    """A request for one row that happens now: its window does not end during the tests."""
    return contract.to_request(tiny.rows(1), "r1")


def send_window(server, contract: Contract, number: int, shift: float = 0.0, rows: int = 50):
    """Serve rows of the window ``number`` windows after the start, ten rows a request."""
    frame = tiny.rows(rows, seed=100 + number, shift=shift)
    moment = tiny.START + number * WINDOW
    for place in range(0, rows, 10):
        part = frame.iloc[place : place + 10]
        body = contract.to_request(part, f"w{number}-{place}", moment + place * tiny.STEP)
        assert server.infer(body)[0] == 200


def wait_for(condition, seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return bool(condition())


def test_scores_are_those_of_the_bundle_with_id_digest_and_revision(
    transformer, predictor, contract, loaded
):
    frame = tiny.rows(20, seed=3)
    frame.loc[0, "colour"] = "unseen"
    frame.loc[1, "a"] = np.nan
    body = contract.to_request(frame, "mine")

    expected = loaded.score(contract.for_model(contract.encode(frame)))

    for server, revision in ((transformer, "v1"), (predictor, "")):
        status, answer = server.infer(body)
        assert status == 200
        assert answer["id"] == "mine"
        assert answer["parameters"] == {"model_digest": loaded.short, "revision": revision}
        assert answer["outputs"][0]["data"] == pytest.approx(list(expected), abs=1e-12)


def test_binary_tensors_are_answered_in_binary(transformer, contract):
    wanted = transformer.infer(one(contract))[1]["outputs"][0]["data"]
    inputs, tail = [], b""
    for tensor in one(contract)["inputs"]:
        (value,) = tensor.pop("data")
        text = value.encode() if isinstance(value, str) else b""
        raw = struct.pack("<I", len(text)) + text if text else struct.pack("<d", value)
        inputs.append({**tensor, "parameters": {"binary_data_size": len(raw)}})
        tail += raw
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()

    status, headers, body = transformer.ask(
        "POST",
        "/v2/models/tiny/infer",
        head + tail,
        content_type="application/octet-stream",
        inference_header_content_length=str(len(head)),
    )

    assert status == 200
    length = int(headers["inference-header-content-length"])
    assert list(struct.unpack("<d", body[length:])) == wanted


def test_grpc_answers_both_ways_and_refuses_by_name(transformer, contract, loaded):
    row = pd.DataFrame({"a": [0.5], "b": [-1.0], "c": [3.0], "colour": ["red"]})
    expected = pytest.approx(list(loaded.score(contract.encode(row))), abs=1e-12)

    done = subprocess.run(
        [servers.runtime_python(), "-c", GRPC, f"127.0.0.1:{transformer.grpc_port}"],
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["typed"] == expected
    assert found["raw"] == expected
    assert (found["id"], found["digest"]) == ("g1", loaded.short)
    assert found["inputs"] == ["a", "b", "c", "colour"]
    assert found["missing input"] == [
        "INVALID_ARGUMENT",
        "inputs: a is missing; wanted a, b, c, colour",
    ]
    assert found["odd time"][0] == "INVALID_ARGUMENT"
    assert "parameters.event_time" in found["odd time"][1]
    assert found["other model"][0] == "NOT_FOUND"
    assert found["both ways"][0] == "INVALID_ARGUMENT"
    assert found["unload"][0] == "UNIMPLEMENTED"
    assert found["after"] is True


@pytest.mark.parametrize(
    ("change", "names"),
    [
        pytest.param({"datatype": "FP99"}, "inputs.a.datatype", id="of no datatype"),
        pytest.param({"shape": [2]}, "inputs.a", id="of another shape"),
        pytest.param({"shape": [0]}, "inputs.a.shape", id="without rows"),
        pytest.param({"data": ["x"]}, "inputs.a.data", id="of text"),
        pytest.param({"data": [1e999]}, "inputs.a.data", id="infinite"),
        pytest.param({"name": "z"}, "'z'", id="unknown"),
        pytest.param({"name": "b"}, "'b' is given twice", id="repeated"),
        pytest.param({"data": {}}, "inputs.a.data", id="an object"),
    ],
)
def test_an_input_is_refused_in_one_sentence_by_both_servers_when_it_is(
    transformer, predictor, contract, change, names
):
    body = one(contract)
    body["inputs"][0].update(change)

    for server in (transformer, predictor):
        status, answer = server.infer(body)
        assert status == 400
        assert list(answer) == ["error"]
        assert names in answer["error"]


@pytest.mark.parametrize(
    "moment", ["soon", "", 5, "2020-13-01", "0001-01-01T00:00:00+14:00", "9999-12-31", ["2020"]]
)
def test_a_malformed_event_time_is_refused_by_name(transformer, contract, moment):
    status, answer = transformer.infer({**one(contract), "parameters": {"event_time": moment}})

    assert status == 400
    assert "parameters.event_time" in answer["error"]


def test_a_mistake_is_the_clients_and_counted_so(predictor, contract):
    before = predictor.metric('perennial_requests_total{cause="client"')

    assert predictor.infer(b"{")[0] == 400
    assert predictor.infer(one(contract), content_type="text/plain")[0] == 415
    assert predictor.infer(one(contract), content_encoding="gzip")[0] == 415
    assert predictor.infer(b" " * (8 << 20) + b"{}")[0] == 413

    assert predictor.metric('perennial_requests_total{cause="client"') == before + 4
    assert predictor.metric('perennial_requests_total{cause="platform"') == 0


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v2/repository/models/tiny/unload", 404),
        ("POST", "/v2/repository/models/tiny/load", 404),
        ("POST", "/v1/models/tiny:predict", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("POST", "/v2/models/tiny/versions/1/infer", 404),
        ("GET", "/v2/models/tiny/infer", 405),
        ("GET", "/v2/models/other", 404),
        ("GET", "/docs", 404),
        ("GET", "/v2/models/tiny", 200),
        ("GET", "/v2/models/tiny/ready", 200),
        ("GET", "/v2/health/live", 200),
        ("GET", "/v2/models", 200),
        ("GET", "/v2", 200),
    ],
)
def test_the_routes_of_kserve_answer_and_none_unloads(transformer, method, path, status, contract):
    assert transformer.ask(method, path, b"{}" if method == "POST" else None)[0] == status
    assert transformer.infer(one(contract))[0] == 200


def test_metadata_comes_from_the_contract(transformer, contract):
    inputs, outputs = contract.metadata()

    answer = json.loads(transformer.ask("GET", "/v2/models/tiny")[2])

    assert (answer["inputs"], answer["outputs"]) == (inputs, outputs)


def test_both_servers_listen_on_the_loopback_only(transformer, predictor):
    ports = {s.port for s in (transformer, predictor)} | {
        transformer.grpc_port,
        predictor.grpc_port,
    }
    loopback = {"0100007F", "0000000000000000FFFF00000100007F"}
    found = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            address, port = line.split()[1].split(":")
            if line.split()[3] == "0A" and int(port, 16) in ports:
                found[int(port, 16)] = address

    assert found.keys() == ports
    assert set(found.values()) <= loopback


def test_a_drifted_window_is_written_and_told_once_and_a_quiet_one_is_not(
    transformer, contract, sink, key, made, loaded
):
    folder = made.parent / "segments-v1"
    send_window(transformer, contract, 0)
    send_window(transformer, contract, 1, shift=2.0)
    send_window(transformer, contract, 2, rows=10)
    send_window(transformer, contract, 3, rows=10)

    ((headers, body),) = sink.wait(1)
    event, signature = events.from_http(headers, body)

    assert signing.verify(key, events.message(event), signature)
    hint = events.hint(event)
    assert (hint.window_start, hint.window_end) == (tiny.START + WINDOW, tiny.START + 2 * WINDOW)
    assert (hint.model_digest, hint.drifted) == (loaded.digest, ("a",))
    assert event.subject == "tiny"
    assert wait_for(lambda: segments.reports(folder, tiny.START + 2 * WINDOW))
    states = [
        (report.rows, report.thin, report.drifted)
        for number in range(3)
        for report in segments.reports(folder, tiny.START + number * WINDOW)
    ]
    assert states == [(50, False, ()), (50, False, ("a",)), (10, True, ())]
    assert len(sink.got) == 1


def test_a_segment_holds_the_rows_and_scores_that_clients_saw(transformer, contract, made):
    folder = made.parent / "segments-v1"
    frame = tiny.rows(5, seed=7)
    frame.loc[2, "colour"] = "unseen"
    moment = tiny.START - 500 * WINDOW

    scores = transformer.infer(contract.to_request(frame, "seen", moment))[1]["outputs"][0]["data"]
    transformer.infer(contract.to_request(frame, "next", moment + WINDOW))

    assert wait_for(lambda: segments.reports(folder, moment))
    rows = segments.read(folder, moment)
    np.testing.assert_array_equal(rows.matrix, contract.encode(frame))
    np.testing.assert_array_equal(rows.scores, scores)
    assert set(rows.request_ids) == {"seen"}
    assert rows.times == (moment,) * 5


@pytest.fixture(scope="module")
def interrupted(made, predictor, key, contract) -> Iterator[tuple[servers.Server, servers.Sink]]:
    """A transformer whose sink comes up only after a window drifted."""
    port = servers.free_port()
    server = started(made, predictor, f"http://127.0.0.1:{port}/", "v2").wait_ready()
    send_window(server, contract, 1, shift=2.0)
    send_window(server, contract, 2, rows=30)
    wait_for(lambda: segments.reports(made.parent / "segments-v2", tiny.START + WINDOW))
    sink = servers.Sink(port)
    yield server, sink
    server.stop()
    sink.close()


def test_a_sink_that_was_down_hears_the_event_later(interrupted):
    _, sink = interrupted

    assert len(sink.wait(1)) == 1


def test_sigterm_writes_the_open_window_without_an_event_within_3_seconds(interrupted, made):
    server, sink = interrupted
    sink.wait(1)

    began = time.monotonic()
    code = server.stop()

    assert time.monotonic() - began < 3.0
    assert code == 0
    assert len(segments.read(made.parent / "segments-v2", tiny.START + 2 * WINDOW)) == 30
    assert len(sink.got) == 1


def test_a_model_that_answers_no_probability_is_a_500_and_counted(tmp_path, predictor):
    learned = Contract.from_json(tiny.bundle_files()["contract.json"])
    frame = tiny.rows(100)
    matrix = learned.for_model(learned.encode(frame))
    data = xgboost.DMatrix(
        matrix, label=frame["a"] * 50, feature_types=["q", "q", "q", "c"], enable_categorical=True
    )
    booster = xgboost.train({"objective": "reg:squarederror"}, data, num_boost_round=5)
    files = bundle.files(
        booster, learned.to_json(), tiny.project(), tiny.lineage({}), matrix[:5], matrix
    )
    bundle.close(tmp_path / "odd", files)
    log = tmp_path / "odd.log"
    server = servers.Server("predictor", log, servers.runtime_python(), bundle=tmp_path / "odd")

    try:
        status, answer = server.wait_ready().infer(learned.to_request(frame, "r"))
        counted = server.metric("perennial_invalid_outputs_total")
    finally:
        server.stop()

    assert (status, answer) == (500, {"error": "model output invalid"})
    assert counted == 1


def test_the_predictor_runs_in_the_core_environment_too(made, tmp_path, predictor, contract):
    server = servers.Server("predictor", tmp_path / "log", Path(sys.executable), bundle=made)

    try:
        answer = server.wait_ready().infer(one(contract))
    finally:
        server.stop()

    assert answer == predictor.infer(one(contract))


def refused(module: str, *options: str) -> subprocess.CompletedProcess:
    command = [servers.runtime_python(), "-m", f"perennial.serving.{module}", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("module", ["predictor", "transformer"])
@pytest.mark.parametrize("fault", ["missing", "damaged", "another"])
def test_a_bundle_is_refused_with_exit_2_in_one_line_when_it_is(module, fault, made, tmp_path):
    folder, digest = tmp_path / "copy", ""
    if fault != "missing":
        tiny.bundle(folder)
    if fault == "damaged":
        (folder / "model" / "model.json").write_text("{}")
    if fault == "another":
        digest = "sha256:" + "0" * 64

    done = refused(module, f"--bundle={folder}", f"--digest={digest}", "--predictor_host=x:1")

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_a_port_that_is_taken_is_exit_3_in_one_line(made, predictor):
    done = refused("predictor", f"--bundle={made}", f"--http_port={predictor.port}")

    assert done.returncode == 3
    assert f"error: 127.0.0.1:{predictor.port} cannot be listened on" in done.stderr
    assert "Traceback" not in done.stderr
