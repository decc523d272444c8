"""What does a V2 request say, and how is it answered: JSON, binary tensors and gRPC."""

import json
import struct
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from perennial.contract import MAX_ID, OUTPUT, Matrix, Tensor
from perennial.errors import BadInput, PerennialError

MAX_BODY = 8 << 20
JSON_LENGTH = "inference-header-content-length"
_TYPES = ("", "application/json", "application/octet-stream")

_DTYPES = {
    "FP32": "<f4",
    "FP64": "<f8",
    **{f"{s}INT{b}": f"<{k}{b // 8}" for s, k in (("", "i"), ("U", "u")) for b in (8, 16, 32, 64)},
}
_CONTENTS = {
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "BYTES": "bytes_contents",
    **{f"INT{bits}": "int_contents" for bits in (8, 16, 32)},
    **{f"UINT{bits}": "uint_contents" for bits in (8, 16, 32)},
}


class Refused(PerennialError):
    """A request that is answered with another status than 400."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Ask:
    """A request, whatever way it came."""

    id: str
    tensors: tuple[Tensor, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    binary: bool = False  # the answer is wanted in binary


@dataclass(frozen=True)
class Answer:
    """The scores of a request's rows."""

    id: str
    model_name: str
    scores: Matrix
    parameters: Mapping[str, str]


def read_rest(headers: Mapping[str, str], body: bytes) -> Ask:
    """Read a REST request. Raises BadInput or Refused, in a sentence that names the field."""
    kind = headers.get("content-type", "").split(";")[0].strip().lower()
    if kind not in _TYPES:
        raise Refused(415, f"content-type is {ascii(kind[:64])}, wanted application/json")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(415, "content-encoding is not supported, send the body as it is")
    length = _json_length(headers, len(body))
    document = _object(body[:length])
    binary = _wants_binary(document)
    tensors = _tensors(document, memoryview(body)[length:])
    return Ask(_id(document.get("id")), tensors, _parameters(document, "parameters"), binary)


def write_rest(answer: Answer, *, binary: bool) -> tuple[dict[str, str], bytes]:
    """Headers and body of a REST answer."""
    output: dict[str, Any] = {
        "name": OUTPUT,
        "shape": [len(answer.scores)],
        "datatype": "FP64",
    }
    document = {
        "id": answer.id,
        "model_name": answer.model_name,
        "parameters": dict(answer.parameters),
        "outputs": [output],
    }
    if not binary:
        output["data"] = answer.scores.tolist()
        return {"content-type": "application/json"}, orjson.dumps(document)
    raw = answer.scores.astype("<f8").tobytes()
    output["parameters"] = {"binary_data_size": len(raw)}
    head = orjson.dumps(document)
    return {"content-type": "application/octet-stream", JSON_LENGTH: str(len(head))}, head + raw


def read_grpc(message: Any) -> Ask:
    """Read a ModelInferRequest. Raises BadInput."""
    raw = list(message.raw_input_contents)
    if raw and len(raw) != len(message.inputs):
        raise BadInput(
            f"raw_input_contents has {len(raw)} parts, wanted one for each of"
            f" {len(message.inputs)} inputs"
        )
    contents = raw or [None] * len(message.inputs)
    pairs = zip(message.inputs, contents, strict=True)
    tensors = tuple(_grpc_tensor(tensor, part) for tensor, part in pairs)
    _check_outputs([{"name": o.name} for o in message.outputs])
    parameters = {name: _choice(value) for name, value in message.parameters.items()}
    return Ask(_id(message.id or None), tensors, parameters, bool(raw))


def forward(ask: Ask) -> bytes:
    """The same question as a JSON body, for the predictor."""
    inputs = [
        {"name": t.name, "datatype": t.datatype, "shape": list(t.shape), "data": _plain(t.data)}
        for t in ask.tensors
    ]
    return orjson.dumps({"id": ask.id, "inputs": inputs}, option=orjson.OPT_SERIALIZE_NUMPY)


def read_scores(body: bytes, rows: int) -> Matrix:
    """The scores in a predictor's JSON answer. Raises ValueError."""
    outputs = {o["name"]: o for o in orjson.loads(body)["outputs"]}
    scores = np.asarray(outputs[OUTPUT]["data"], dtype=np.float64)
    if scores.shape != (rows,):
        raise ValueError(f"{scores.shape} scores for {rows} rows")
    return scores


def _json_length(headers: Mapping[str, str], size: int) -> int:
    if JSON_LENGTH not in headers:
        return size
    text = headers[JSON_LENGTH]
    if not (text.isascii() and text.isdigit() and len(text) < 12 and 0 < int(text) <= size):
        raise BadInput(f"{JSON_LENGTH} is {ascii(text[:64])}, wanted a length within the body")
    return int(text)


def _object(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as exc:
        raise BadInput("the body is nested too deeply, wanted lists of numbers or texts") from exc
    except ValueError as exc:
        raise BadInput("the body is not JSON (UTF-8, each key once)") from exc
    if not isinstance(found, dict):
        raise BadInput("the body is not a JSON object, wanted one with inputs")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice")
    return found


def _id(given: Any) -> str:
    if given is None:
        return uuid.uuid4().hex
    if not isinstance(given, str) or len(given) > MAX_ID or not given.isprintable():
        raise BadInput(f"id is not printable text of at most {MAX_ID} characters")
    return given


def _parameters(owner: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    found = owner.get("parameters")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise BadInput(f"{where} is not a JSON object")
    return found


def _wants_binary(document: Mapping[str, Any]) -> bool:
    wanted = document.get("outputs")
    if wanted is not None and not isinstance(wanted, list):
        raise BadInput(f"outputs is not a list, wanted nothing or [{OUTPUT}]")
    outputs = _check_outputs(wanted or [])
    flag = _parameters(document, "parameters").get("binary_data_output", False)
    for output in outputs:
        flag = _parameters(output, f"outputs.{OUTPUT}.parameters").get("binary_data", flag)
    if not isinstance(flag, bool):
        raise BadInput("binary_data and binary_data_output are true or false")
    return flag


def _check_outputs(outputs: Sequence[Any]) -> Sequence[Mapping[str, Any]]:
    for output in outputs:
        if not isinstance(output, dict) or output.get("name") != OUTPUT:
            raise BadInput(f"outputs names another output than {OUTPUT}")
    return outputs


def _tensors(document: Mapping[str, Any], tail: memoryview) -> tuple[Tensor, ...]:
    inputs = document.get("inputs")
    if not isinstance(inputs, list):
        raise BadInput("inputs is missing, wanted a list of tensors")
    tensors, used = [], 0
    for place, item in enumerate(inputs):
        tensor, size = _tensor(f"inputs[{place}]", item, tail[used:])
        tensors.append(tensor)
        used += size
    if used != len(tail):
        raise BadInput(f"the body has {len(tail) - used} bytes after its tensors, wanted none")
    return tuple(tensors)


def _tensor(where: str, item: Any, tail: memoryview) -> tuple[Tensor, int]:
    if not isinstance(item, dict):
        raise BadInput(f"{where} is not a JSON object")
    for key, kind in (("name", str), ("datatype", str), ("shape", list)):
        if not isinstance(item.get(key), kind):
            raise BadInput(f"{where}.{key} is missing or no {kind.__name__}")
    name, datatype, shape = item["name"], item["datatype"], tuple(item["shape"])
    size = _parameters(item, f"{where}.parameters").get("binary_data_size")
    if size is None:
        return Tensor(name, datatype, shape, item.get("data")), 0
    if "data" in item:
        raise BadInput(f"{where} has both data and binary_data_size, wanted one of them")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(tail):
        raise BadInput(f"{where}.parameters.binary_data_size is not a size within the body")
    return Tensor(name, datatype, shape, _raw(where, datatype, bytes(tail[:size]))), size


def _raw(where: str, datatype: str, raw: bytes) -> Any:
    if datatype == "BYTES":
        return _texts(where, raw)
    dtype = np.dtype(_DTYPES.get(datatype, "V1"))
    if dtype.kind == "V":
        raise BadInput(f"{where}.datatype is {ascii(datatype[:64])}, wanted such as FP64 or BYTES")
    if len(raw) % dtype.itemsize:
        raise BadInput(f"{where} has {len(raw)} bytes, wanted whole {datatype} values")
    return np.frombuffer(raw, dtype=dtype)


def _texts(where: str, raw: bytes) -> list[bytes]:
    found, at = [], 0
    while at < len(raw):
        size = struct.unpack_from("<I", raw, at)[0] if len(raw) - at >= 4 else len(raw)
        if size > len(raw) - at - 4:
            raise BadInput(f"{where} has a BYTES length that goes beyond its data")
        found.append(raw[at + 4 : at + 4 + size])
        at += 4 + size
    return found


def _grpc_tensor(tensor: Any, raw: bytes | None) -> Tensor:
    where = f"inputs.{ascii(tensor.name[:64])}"
    shape = tuple(int(d) for d in tensor.shape)
    if raw is not None:
        if tensor.HasField("contents"):
            raise BadInput(f"{where} has both contents and raw_input_contents, wanted one of them")
        return Tensor(tensor.name, tensor.datatype, shape, _raw(where, tensor.datatype, raw))
    if tensor.datatype not in _CONTENTS:
        raise BadInput(f"{where}.datatype is {ascii(tensor.datatype[:64])}, wanted such as FP64")
    field_name = _CONTENTS[tensor.datatype]
    return Tensor(tensor.name, tensor.datatype, shape, list(getattr(tensor.contents, field_name)))


def _choice(parameter: Any) -> Any:
    chosen = parameter.WhichOneof("parameter_choice")
    return getattr(parameter, chosen) if chosen else None


def _plain(data: Any) -> Any:
    if isinstance(data, list):
        return [v.decode() if isinstance(v, bytes) else v for v in data]
    return data
