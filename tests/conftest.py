"""Every test sees eight CPU devices and refuses silent rank promotion.

Most of a test's time is compiling, so programs are compiled without expensive optimisations; what
such a program computes is the same. `optimised` is for tests of what optimisation may change.
"""

import signal

import jax
import pytest

# Shells start background jobs with SIGINT ignored, and what tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def optimised():
    """Programs as they are compiled for users."""
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    jax.clear_caches()
