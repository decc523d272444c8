import json
import struct

import numpy as np
import pytest

from perennial.errors import BadInput
from perennial.serving import wire

JSON = {"content-type": "application/json"}
ONE = {"name": "a", "datatype": "FP64", "shape": [2], "data": [1, 2]}


def read(document: object, **headers: str) -> wire.Ask:
    return wire.read_rest({**JSON, **headers}, json.dumps(document).encode())


def read_binary(inputs: list[dict], tail: bytes, length: str | None = None) -> wire.Ask:
    head = json.dumps({"inputs": inputs}).encode()
    headers = {
        "content-type": "application/octet-stream",
        wire.JSON_LENGTH: length or str(len(head)),
    }
    return wire.read_rest(headers, head + tail)


def binary(size: object, datatype: str = "FP64") -> dict:
    parameters = {"binary_data_size": size}
    return {"name": "a", "datatype": datatype, "shape": [2], "parameters": parameters}


def test_a_request_without_id_gets_one():
    assert read({"inputs": [ONE]}).id
    assert read({"inputs": [ONE], "id": "mine"}).id == "mine"


def test_binary_tensors_are_cut_in_the_order_of_the_inputs():
    texts = b"".join(struct.pack("<I", len(t)) + t for t in (b"red", b""))
    numbers = np.array([1.5, np.nan]).tobytes()

    ask = read_binary([binary(16), {**binary(len(texts), "BYTES"), "name": "b"}], numbers + texts)

    np.testing.assert_array_equal(ask.tensors[0].data, [1.5, np.nan])
    assert ask.tensors[1].data == [b"red", b""]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        pytest.param(b"{", "not JSON", id="cut"),
        pytest.param(b"\xff\xfe", "not JSON", id="not UTF-8"),
        pytest.param(b"[1]", "not a JSON object", id="a list"),
        pytest.param(b"[" * 100_000, "nested too deeply|not JSON", id="deep"),
        pytest.param(b'{"inputs": [], "inputs": []}', "each key once", id="ambiguous"),
        pytest.param(b"{}", "inputs is missing", id="empty"),
        pytest.param(b'{"inputs": {}}', "inputs is missing", id="without a list"),
        pytest.param(b'{"inputs": [1]}', r"inputs\[0\] is not", id="of numbers"),
        pytest.param(b'{"inputs": [{}]}', r"inputs\[0\].name", id="without a name"),
        pytest.param(b'{"inputs": [], "id": 7}', "id is not", id="with a number as id"),
        pytest.param(b'{"inputs": [], "id": "\\ud800"}', "id is not", id="with half a character"),
        pytest.param(b'{"inputs": [], "parameters": 1}', "parameters", id="with odd parameters"),
        pytest.param(b'{"inputs": [], "outputs": 1}', "outputs", id="with odd outputs"),
        pytest.param(b'{"inputs": [], "outputs": [{"name": "x"}]}', "probability", id="for more"),
        pytest.param(
            b'{"inputs": [], "parameters": {"binary_data_output": 1}}', "true or false", id="unsure"
        ),
    ],
)
def test_a_body_is_refused_that_is(body, says):
    with pytest.raises(BadInput, match=says):
        wire.read_rest(JSON, body)


def test_a_long_id_is_refused():
    with pytest.raises(BadInput, match="at most 256"):
        read({"inputs": [ONE], "id": "x" * 257})


@pytest.mark.parametrize(
    ("size", "tail"),
    [
        pytest.param(16, b"x" * 15, id="beyond the body"),
        pytest.param(8, b"x" * 16, id="short of the body"),
        pytest.param(-1, b"x" * 16, id="negative"),
        pytest.param("16", b"x" * 16, id="text"),
        pytest.param(True, b"x", id="a truth value"),
        pytest.param(15, b"x" * 15, id="no whole values"),
        pytest.param(10**12, b"x" * 16, id="vast"),
    ],
)
def test_a_binary_size_is_refused_that_is(size, tail):
    with pytest.raises(BadInput):
        read_binary([binary(size)], tail)


@pytest.mark.parametrize("length", ["0", "-5", "abc", "999999999999", "1e3", "\u0663"])
def test_a_wrong_length_of_the_json_part_is_refused(length):
    with pytest.raises(BadInput, match="inference-header-content-length"):
        read_binary([binary(16)], b"x" * 16, length)


def test_a_text_that_is_longer_than_the_data_is_refused():
    with pytest.raises(BadInput, match="beyond its data"):
        read_binary([binary(8, "BYTES")], struct.pack("<I", 2**31) + b"text")


def test_data_in_both_ways_is_refused():
    with pytest.raises(BadInput, match="one of them"):
        read_binary([{**binary(16), "data": [1, 2]}], b"x" * 16)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"content-type": "text/plain"}, id="text"),
        pytest.param({"content-type": "application/x-www-form-urlencoded"}, id="a form"),
        pytest.param({"content-encoding": "gzip"}, id="compressed"),
    ],
)
def test_a_body_of_another_kind_is_415_when_it_is(headers):
    with pytest.raises(wire.Refused) as refused:
        read({"inputs": [ONE]}, **headers)

    assert refused.value.status == 415


@pytest.mark.parametrize("is_binary", [False, True], ids=["JSON", "binary"])
def test_an_answer_can_be_read_back(is_binary):
    answer = wire.Answer("id", "m", np.array([0.25, 0.75]), {"model_digest": "ab"})

    headers, body = wire.write_rest(answer, binary=is_binary)

    head = body[: int(headers.get(wire.JSON_LENGTH, len(body)))]
    document = json.loads(head)
    output = document["outputs"][0]
    scores = np.frombuffer(body[len(head) :]) if is_binary else output["data"]
    assert list(scores) == [0.25, 0.75]
    assert (document["id"], document["parameters"]) == ("id", {"model_digest": "ab"})


def test_what_is_forwarded_is_what_was_asked():
    texts = struct.pack("<I", 3) + b"red" + struct.pack("<I", 0)
    ask = read_binary(
        [binary(16), {**binary(len(texts), "BYTES"), "name": "b"}],
        np.array([1.5, np.nan]).tobytes() + texts,
    )

    again = wire.read_rest(JSON, wire.forward(ask))

    assert again.id == ask.id
    assert again.tensors[0].data == [1.5, None]
    assert again.tensors[1].data == ["red", ""]
