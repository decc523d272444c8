"""What a real cluster lacks is named with its remedy, all of it at once, and the exit code is 2."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
CLOSED = "127.0.0.1:9"


def doctor(space: str, folder: Path, **more: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit code, and what is missing by its name."""
    given = {k: v for k, v in os.environ.items() if not k.startswith(("PERENNIAL_", "AWS_"))}
    env = given | {"PERENNIAL_HOME": str(folder), "PERENNIAL_NAMESPACE": space} | more
    command = [sys.executable, "-m", "perennial.cli", "doctor", "--cluster", "--json"]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.startswith(("[", "{")), done.stderr
    checks = json.loads(done.stdout)
    return done.returncode, {check["name"]: check for check in checks if not check["ok"]}


def test_in_an_empty_namespace_everything_of_ours_is_missing(space, crd, tmp_path):
    code, missing = doctor(space, tmp_path)

    assert code == 2
    assert {"operator", "retraining", "broker", "secret state"} <= set(missing)
    assert "kubectl" in missing["operator"]["remedy"]
    assert "inferenceservices.serving.kserve.io" not in missing


def test_stores_and_a_backend_that_do_not_answer_are_named_each(space, crd, tmp_path):
    code, missing = doctor(
        space,
        tmp_path,
        PERENNIAL_STATE_URL=f"postgresql+psycopg://us:hidden@{CLOSED}/db",
        PERENNIAL_ARTIFACTS="s3://bucket/prefix",
        PERENNIAL_LAUNCHER="kfp",
        PERENNIAL_KFP_ENDPOINT=f"http://{CLOSED}",
        AWS_ENDPOINT_URL=f"http://{CLOSED}",
        AWS_ACCESS_KEY_ID="a",
        AWS_SECRET_ACCESS_KEY="b",
        AWS_DEFAULT_REGION="us-east-1",
    )

    assert code == 2
    assert {"state", "artifacts", "KFP"} <= set(missing)
    assert "PERENNIAL_KFP_ENDPOINT" in missing["KFP"]["remedy"]
    assert "hidden" not in json.dumps(missing)


def test_an_identity_without_rights_is_told_what_it_may_not_do(
    kubectl, kubeconfig, space, crd, tmp_path
):
    kubectl.run("create", "serviceaccount", "nobody", "-n", space)
    token = kubectl.run("create", "token", "nobody", "-n", space).stdout.strip()
    told = yaml.safe_load(Path(kubeconfig).read_text())
    told["users"] = [{"name": u["name"], "user": {"token": token}} for u in told["users"]]
    file = tmp_path / "nobody.kubeconfig"
    file.write_text(yaml.safe_dump(told))

    code, missing = doctor(space, tmp_path, KUBECONFIG=str(file))

    assert code == 2
    assert f"in namespace {space}" in missing["permission"]["seen"]
    assert "administrator" in missing["permission"]["remedy"]


def test_a_cluster_that_does_not_answer_is_told_in_one_sentence(kubeconfig, tmp_path):
    told = yaml.safe_load(Path(kubeconfig).read_text())
    for cluster in told["clusters"]:
        cluster["cluster"]["server"] = f"https://{CLOSED}"
    file = tmp_path / "away.kubeconfig"
    file.write_text(yaml.safe_dump(told))

    code, missing = doctor("nowhere", tmp_path, KUBECONFIG=str(file))

    assert code == 2
    assert any("does not answer" in check["seen"] for check in missing.values())
