"""How a run's programs are compiled and kept; to be settled before the first of them."""

import os
from pathlib import Path

import jax
from jax._src.xla_bridge import backends_are_initialized  # has no public name

from vibejax.kernels import tiles
from vibejax.run_folder import RunError

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def prepare(*, deterministic: bool) -> None:
    """Keeps compiled programs on disk, so that a run that is started again finds them there.

    Where, JAX's own settings say, else it is ~/.cache/vibejax/compiled. Those of a CPU are only
    kept where JAX is told so: they take seconds, and are for one kind of processor.

    Args:
        deterministic: whether a program must give the same bits each time on GPUs too, where fast
            sums and the choice of the fastest kernel otherwise differ between runs; CPUs and TPUs
            are so anyway.

    Raises:
        RunError: programs have been compiled before, otherwise; or the file of VIBEJAX_TILES
            cannot be used.
    """
    try:
        tiles.overrides()
    except ValueError as error:
        raise RunError(str(error)) from None
    flags = os.environ.get("XLA_FLAGS", "")
    if deterministic and DETERMINISTIC not in flags.split():
        if backends_are_initialized() and jax.default_backend() == "gpu":
            raise RunError(
                f"deterministic: this process uses its GPUs already; set XLA_FLAGS={DETERMINISTIC}"
            )
        os.environ["XLA_FLAGS"] = f"{flags} {DETERMINISTIC}".strip()
    if jax.config.jax_compilation_cache_dir is None and jax.default_backend() != "cpu":
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "vibejax" / "compiled"))
