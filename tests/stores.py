"""Stores that tests ask for: SQLite and folders always, PostgreSQL and S3 where they are named."""

import os
import secrets
from collections.abc import Iterator

import pytest

S3 = os.environ.get("PERENNIAL_TEST_S3", "")
NO_S3 = "no S3 store: set PERENNIAL_TEST_S3, as 'stores up' prints it"


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """A bucket of this test session's own."""
    if not S3:
        pytest.skip(NO_S3)
    from pyarrow import fs

    store = fs.S3FileSystem(endpoint_override=S3, allow_bucket_creation=True)
    bucket = f"test-{secrets.token_hex(6)}"
    store.create_dir(bucket)
    yield bucket


@pytest.fixture
def s3(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix in a bucket that only this test uses, with the address set as pods have it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", S3)
    return f"s3://{s3_bucket}/{secrets.token_hex(4)}"


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.stores)])
def place(request: pytest.FixtureRequest) -> str:
    """The URI of an empty folder, once on this disk and once in an object store."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3"))
    return str(request.getfixturevalue("tmp_path").as_uri() + "/artifacts")
