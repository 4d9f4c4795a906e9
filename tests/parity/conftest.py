"""Programs here are compiled as they are for users."""

import jax

jax.config.update("jax_disable_most_optimizations", False)
