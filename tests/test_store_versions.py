"""Versions are numbered in order of registration, one number a digest."""

from datetime import UTC, datetime

from sqlalchemy import Engine

from perennial.records import Version
from perennial.store import versions

AS_OF = datetime(2011, 6, 1, tzinfo=UTC)


def test_versions_count_up_in_each_project(engine: Engine):
    one = versions.next_version(engine, "churn", "sha256:aa", "run-1", AS_OF)
    two = versions.next_version(engine, "churn", "sha256:bb", "run-2", AS_OF)
    other = versions.next_version(engine, "bank", "sha256:aa", "run-3", AS_OF)

    assert [one.label, two.label, other.label] == ["v1", "v2", "v1"]
    assert versions.all_versions(engine, "churn") == [one, two]


def test_a_digest_keeps_its_number_when_it_is_registered_again(engine: Engine):
    first = versions.next_version(engine, "churn", "sha256:aa", "run-1", AS_OF)
    again = versions.next_version(engine, "churn", "sha256:aa", "run-2", AS_OF)

    assert again == first
    assert again.run_id == "run-1"


def test_a_version_is_found_by_its_number(engine: Engine):
    versions.next_version(engine, "churn", "sha256:aa", "run-1", AS_OF)

    assert versions.by_number(engine, "churn", 1) == Version(1, "sha256:aa", "run-1", AS_OF)
    assert versions.by_number(engine, "churn", 2) is None
    assert versions.by_number(engine, "bank", 1) is None
