"""The mesh of a run, once all that is to lie on it is known to divide over it."""

from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, Mesh

from vibejax import qwen2, sharding
from vibejax.config.mesh import MeshConfig
from vibejax.config.training import TrainConfig
from vibejax.qwen2 import ModelConfig
from vibejax.run_folder import RunError


def require_attention(implementation: str, field: str) -> None:
    """Checks that an implementation of attention is one for this process's devices.

    Raises:
        RunError: it is a kernel for others.
    """
    platform = jax.local_devices()[0].platform
    if implementation in ("tpu", "gpu") and implementation != platform:
        raise RunError(f"{field} = {implementation!r}: the devices are {platform}")


def make(
    config: MeshConfig, models: Sequence[ModelConfig], rows: TrainConfig | None = None
) -> Mesh:
    """The mesh that a configuration asks for.

    Args:
        config: its sizes.
        models: whose parameters are to lie on it.
        rows: that are to lie on it.

    Raises:
        RunError: there are other devices, or something does not divide; the message names it.
    """
    try:
        mesh = sharding.make_mesh(config.model_dump())
        for model in models:
            qwen2.param_shardings(model, mesh)
        if rows is not None:
            check_rows(rows, mesh)
    except ValueError as error:
        raise RunError(f"mesh: {error}") from None
    return mesh


def check_rows(config: TrainConfig, mesh: Mesh | AbstractMesh) -> None:
    """Checks that a micro-batch divides over a mesh.

    Raises:
        ValueError: it does not; the message names the axis.
    """
    shape = (config.microbatch_rows, config.row_tokens)
    sharding.sharding(mesh, shape, "batch", "length")
    sharding.context_chunk(config.row_tokens, mesh.shape["context"])
