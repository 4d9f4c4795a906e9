"""Every test sees eight CPU devices and refuses silent rank promotion.

Most of a test's time is compiling, so programs are compiled without expensive optimisations; what
such a program computes is the same. `optimised` is for tests of what optimisation may change.
"""

import os
import signal

import jax
import pytest

# Shells start background jobs with SIGINT ignored, and what tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


# A thread for each processor is too few for eight devices that wait for each other.
os.environ["NPROC"] = "64"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)


# A file is one worker's work: those of minutes begin first, so that none is waited for alone.
LONGEST = ("test_rl.py", "test_distributed.py", "test_engine.py", "test_sft.py",
           "test_decode_attention_tpu.py", "test_train.py")  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def optimised():
    """Programs as they are compiled for users."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()
