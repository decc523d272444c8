import math
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from perennial.contract import Contract, Tensor, learn
from perennial.errors import BadInput
from perennial.project import Feature

AGE = Feature(name="age", type="number")
CITY = Feature(name="city", type="category")
TRAINING = pd.DataFrame({"age": [20, 30, 40], "city": ["rome", "oslo", None]})


@pytest.fixture
def contract() -> Contract:
    return learn([AGE, CITY], TRAINING)


def tensors(body: dict) -> list[Tensor]:
    return [Tensor(i["name"], i["datatype"], tuple(i["shape"]), i["data"]) for i in body["inputs"]]


def changed(contract: Contract, **change: object) -> list[Tensor]:
    body = contract.to_request(TRAINING, "id")
    body["inputs"][0].update(change)
    return tensors(body)


def test_categories_are_learnt_in_the_order_of_their_text(contract):
    assert contract.features[1].categories == ("oslo", "rome")


def test_a_contract_reads_what_it_wrote(contract):
    assert Contract.from_json(contract.to_json()) == contract


def test_missing_values_become_nan_and_unseen_categories_get_the_next_code(contract):
    frame = pd.DataFrame({"age": [1.5, None, "7"], "city": ["rome", "paris", None]})

    matrix = contract.encode(frame)

    expected = [[1.5, 1.0], [math.nan, 2.0], [7.0, math.nan]]
    np.testing.assert_array_equal(matrix, expected)


def test_the_model_sees_an_unseen_category_as_missing(contract):
    matrix = np.array([[1.0, 2.0], [2.0, 1.0]])

    known = contract.for_model(matrix)

    np.testing.assert_array_equal(known, [[1.0, math.nan], [2.0, 1.0]])
    assert matrix[0, 1] == 2.0, "the watched rows must keep what was unseen"


def test_whole_numbers_as_categories_keep_their_name_beside_missing_ones():
    zones = Feature(name="zone", type="category")
    contract = learn([zones], pd.DataFrame({"zone": [1, 2, None]}))

    matrix = contract.encode(pd.DataFrame({"zone": [2, 1]}))

    assert contract.features[0].categories == ("1", "2")
    np.testing.assert_array_equal(matrix, [[1.0], [0.0]])


def test_a_table_without_a_feature_is_refused_by_name(contract):
    with pytest.raises(BadInput, match="no column city"):
        contract.encode(pd.DataFrame({"age": [1]}))


def test_text_in_a_number_column_is_refused_by_name(contract):
    with pytest.raises(BadInput, match="column age holds text"):
        contract.encode(pd.DataFrame({"age": ["old"], "city": ["oslo"]}))


@given(
    st.lists(
        st.tuples(
            st.one_of(st.none(), st.floats(-1e30, 1e30)),
            st.one_of(st.none(), st.text(max_size=5), st.sampled_from(["oslo", "rome"])),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_a_request_decodes_to_what_the_table_encodes_to(rows):
    contract = learn([AGE, CITY], TRAINING)
    frame = pd.DataFrame(rows, columns=["age", "city"]).astype({"city": object})
    utf8 = frame[[str(c).isprintable() for c in frame["city"]]].reset_index(drop=True)
    if utf8.empty:
        return

    decoded = contract.decode(tensors(contract.to_request(utf8, "id")))

    np.testing.assert_array_equal(decoded, contract.encode(utf8))


def test_a_request_says_when_its_rows_happened(contract):
    body = contract.to_request(TRAINING, "r1", datetime(2020, 1, 2, tzinfo=UTC))

    assert body["id"] == "r1"
    assert body["parameters"] == {"event_time": "2020-01-02T00:00:00+00:00"}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"datatype": "fp64"}, id="lower case"),
        pytest.param({"datatype": "BOOL"}, id="of truth values"),
        pytest.param({"datatype": "BYTES", "data": ["1", "2", "3"]}, id="of texts"),
        pytest.param({"datatype": "INT8", "data": [300, 1, 1]}, id="too large for INT8"),
        pytest.param({"datatype": "UINT8", "data": [-1, 1, 1]}, id="negative for UINT8"),
        pytest.param({"datatype": "INT64", "data": [2**70, 1, 1]}, id="too large for INT64"),
        pytest.param({"datatype": "INT64", "data": [1.5, 1, 1]}, id="a fraction in INT64"),
        pytest.param({"data": [1, 2]}, id="too short"),
        pytest.param({"data": [1, 2, 3, 4]}, id="too long"),
        pytest.param({"data": [[1, 2], [3], [4]]}, id="ragged"),
        pytest.param({"data": ["1", 2, 3]}, id="with text"),
        pytest.param({"data": [True, 2, 3]}, id="with a truth value"),
        pytest.param({"data": [math.inf, 2, 3]}, id="infinite"),
        pytest.param({"data": [1e300, 2, 3]}, id="beyond 32 bits"),
        pytest.param({"data": np.array([1e300, 2, 3])}, id="beyond 32 bits in binary"),
        pytest.param({"data": [2**2000, 2, 3]}, id="beyond every float"),
        pytest.param({"data": None}, id="without data"),
        pytest.param({"shape": [1, 3]}, id="in one row"),
        pytest.param({"shape": [-3]}, id="of negative shape"),
        pytest.param({"shape": []}, id="without shape"),
        pytest.param({"shape": ["3"]}, id="with text as shape"),
        pytest.param({"shape": [2**40, 1]}, id="of vast shape"),
    ],
)
def test_a_number_input_is_refused_by_name_when_it_is(contract, change):
    with pytest.raises(BadInput, match="age"):
        contract.decode(changed(contract, **change))


@pytest.mark.parametrize(
    ("value", "code"), [("oslo", 0.0), (b"rome", 1.0), ("", math.nan), (None, math.nan)]
)
def test_a_category_may_be_text_bytes_or_missing(contract, value, code):
    one = [Tensor("age", "FP64", (1,), [1.0]), Tensor("city", "BYTES", (1, 1), [[value]])]

    np.testing.assert_array_equal(contract.decode(one), [[1.0, code]])


@pytest.mark.parametrize("value", [b"\xff", "\ud800", 3], ids=["bytes", "half a character", "int"])
def test_a_category_that_is_no_text_is_refused_by_name(contract, value):
    one = [Tensor("age", "FP64", (1,), [1.0]), Tensor("city", "BYTES", (1,), [value])]

    with pytest.raises(BadInput, match="inputs.city"):
        contract.decode(one)


def test_missing_unknown_and_repeated_inputs_are_refused_by_name(contract):
    age, city = tensors(contract.to_request(TRAINING, "id"))

    with pytest.raises(BadInput, match="city is missing"):
        contract.decode([age])
    with pytest.raises(BadInput, match="'height' is not an input"):
        contract.decode([age, city, Tensor("height", "FP64", (3,), [1, 2, 3])])
    with pytest.raises(BadInput, match="'age' is given twice"):
        contract.decode([age, age, city])


def test_an_answer_never_repeats_what_a_name_could_smuggle_in(contract):
    with pytest.raises(BadInput) as refused:
        contract.decode([Tensor("\x00\u202e" + "x" * 5000, "FP64", (1,), [1.0])])

    assert str(refused.value).isascii()
    assert len(str(refused.value)) < 300


def test_metadata_names_every_input_and_the_probability():
    inputs, outputs = learn(tiny.project().features, tiny.rows(50)).metadata()

    assert [(i["name"], i["datatype"]) for i in inputs] == [
        ("a", "FP64"),
        ("b", "FP64"),
        ("c", "FP64"),
        ("colour", "BYTES"),
    ]
    assert outputs == [{"name": "probability", "datatype": "FP64", "shape": [-1]}]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"features": []}', '{"features": [1]}'])
def test_a_damaged_contract_is_refused(text):
    with pytest.raises(BadInput, match="contract"):
        Contract.from_json(text)
