"""What is written of the tests at full counts is the sum of what they said."""

import pytest

from benchmarks import full


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["1 passed in 149.47s (0:02:29)\n"], "1 passed"),
        (
            ["1 failed, 112 passed, 5 errors in 1995.21s (0:33:15)\n", "12 passed in 841.21s\n"],
            "5 error, 1 failed, 124 passed",
        ),
        (["==== 3 failed, 15 passed in 384.26s (0:06:24) ====\n"], "3 failed, 15 passed"),
        (["its 5 passed quickly\n", "rc 1\n"], "no test"),
    ],
)
def test_the_ends_of_several_runs_are_summed(lines, told):
    assert full.counted(lines) == told


@pytest.mark.parametrize(("code", "kept"), [(0, True), (1, False)])
def test_a_run_that_failed_is_told_as_missed(code, kept):
    done = full._one("tests", ["sh", "-c", f"echo 2 passed in 1s; exit {code}"], {})

    assert (done.kept, done.measured) == (kept, "2 passed in 0 min")
