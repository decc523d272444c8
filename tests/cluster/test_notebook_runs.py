"""The notebook that submits a run does so on a cluster: same cells, pods instead of processes."""

from pathlib import Path

import pytest

from tests import notebooks
from tests.cluster.jobs import Tenant

pytestmark = [pytest.mark.cluster, pytest.mark.stores]


def test_a_run_is_submitted_followed_and_read_from_a_notebook(tenant: Tenant, tmp_path: Path):
    told = notebooks.executed(notebooks.path("02"), tmp_path)

    assert "runs by the launcher 'job'" in told
    assert "succeeded: all 6 limits kept" in told
    assert "evaluate, features, gate, validate" in told
    assert tenant.kubectl.get("jobs", "-n", tenant.space)["items"]
