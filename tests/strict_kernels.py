"""Kernels under the strict interpreter, in processes with a time limit."""

import contextlib
import os
import subprocess
import sys

import pytest

LIMIT_S = 150


def run_in_a_process(script: str, group: str) -> None:
    """Runs `script GROUP` and asserts that it succeeds.

    The interpreter's threads wait for each other for ever now and then. Then, and only then, the
    group is run again.
    """
    for _ in range(3):
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                [sys.executable, script, group],
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                timeout=LIMIT_S, capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3_000:]
            return
    pytest.fail("the interpreter hung three times")
