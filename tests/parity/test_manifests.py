"""The Job inside the JobSet manifest of tpu/, against Kubernetes' own schemas."""

import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

TPU = Path(__file__).parents[2] / "tpu"


@pytest.fixture(params=[["v5e-16"], ["2xv5e-256", "--spot", "--service-account", "writer"]])
def job(request):
    """As the JobSet controller creates it."""
    slice_, *options = request.param
    words = ["--dry-run", "run", "rl", "--slice", slice_, "--image", "gcr.io/p/v:1", *options]
    done = subprocess.run(
        ["bash", str(TPU / "gke.sh"), *words, "--", "python", "-m", "vibejax.rl"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    (replicated,) = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"]
    metadata = {"name": f"rl-{replicated['name']}-0"}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, **replicated["template"]}


@pytest.mark.parametrize("version", ["1.31", "1.34", "1.37"])
def test_the_job_is_valid(job, version):
    assert kubernetes_validate.validate(job, version, strict=True) == version


def test_a_field_that_is_misspelt_is_not(job):
    job["spec"]["podFailurePolicy"]["rules"][0]["onPodCondition"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="onPodCondition"):
        kubernetes_validate.validate(job, "1.34", strict=True)
