"""The attention kernels through the real compilers, for chips that are not here."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import compile_cuda  # noqa: E402 - found by the line above
import tpu_schedule  # noqa: E402 - found by the line above


@pytest.mark.parametrize(
    "chip, tokens, most_mib",
    [
        ("v4", 4_096, 75),
        ("v5e", 4_096, 75),
        ("v5p", 4_096, 75),
        ("v6e", 4_096, 75),
        ("tpu7x", 4_096, 75),
        ("v5e", 65_536, 1_126.4),
        ("v5p", 65_536, 1_126.4),
    ],
)
def test_gradient_compiles_for_a_tpu(chip, tokens, most_mib):
    """Mosaic takes both kernels; beside arrays of q's size there is one, dq, in float32."""
    command = [sys.executable, str(BENCHMARKS / "attention.py"), "--chip", chip]
    done = subprocess.run(
        [*command, "--side", "ours", str(tokens)],
        env=os.environ | tpu_schedule.ENVIRONMENT,
        timeout=300, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3_000:]
    assert json.loads(done.stdout.splitlines()[-1])["temporaries_mib"] <= most_mib


@pytest.mark.parametrize("chip, instruction", [("h100", "HGMMA"), ("a100", "HMMA")])
def test_gradient_compiles_for_a_gpu(chip, instruction):
    """No register is spilled, and every kernel uses the chip's matrix instructions."""
    side = functools.partial(compile_cuda._ours, compile_cuda.CAPABILITIES[chip])
    report = compile_cuda.kernel_report(chip, *compile_cuda.gradient(side, 4_096))
    assert len(report["kernels"]) == 3
    for kernel in report["kernels"].values():
        assert kernel["spills"] == 0 and kernel[instruction] > 0
