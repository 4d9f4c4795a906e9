"""What lies on each device, before anything is allocated: the trainer's state, and the engine.

State, weights and pages are exact; temporaries are estimated from the shapes of the programs.
"""

import dataclasses
import math
import os
from typing import Any

import jax
import jax.numpy as jnp

from vibejax.losses.logprobs import CHUNK_TOKENS
from vibejax.qwen2 import ModelConfig, ParamInfo, map_table
from vibejax.sharding import mesh_axes, sharding
from vibejax.train import TrainState

GIB = 2**30
HOST_SHARE = 0.5  # of a host's memory that a CPU's engine may take
SPARE_SHARE = 0.03  # of a device's memory: programs, rows, and what lies between allocations


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Of one device.

    Attributes:
        weight_bytes: the sampler's copy of the parameters.
        page_bytes: of one page, over all layers.
        pages: of the pool.
        temporary_bytes: of the largest program, estimated.
        limit_bytes: that there are.
    """

    weight_bytes: int
    page_bytes: int
    pages: int
    temporary_bytes: int
    limit_bytes: int

    @property
    def total_bytes(self) -> int:
        """All together."""
        return self.weight_bytes + self.pages * self.page_bytes + self.temporary_bytes

    def __str__(self) -> str:
        """One line."""
        return (
            f"engine memory of a device: weights {self.weight_bytes / GIB:.2f} GiB, "
            f"{self.pages} pages {self.pages * self.page_bytes / GIB:.2f} GiB, "
            f"temporaries about {self.temporary_bytes / GIB:.2f} GiB, "
            f"of {self.limit_bytes / GIB:.2f} GiB"
        )


def float32_copies(*, updating: bool, reference: bool) -> int:
    """How many float32 arrays of all parameters the trainer holds.

    Masters and two moments always; the summed gradients only while it updates.

    Args:
        updating: whether gradients are being summed.
        reference: whether a KL term keeps the starting policy.
    """
    return 3 + updating + reference


def sharded_bytes(model: ModelConfig, mesh: jax.sharding.Mesh) -> int:
    """Bytes of a device's part of one float32 array of all parameters."""

    def count(info: ParamInfo) -> int:
        return math.prod(sharding(mesh, info.shape, *info.axes).shard_shape(info.shape))

    return 4 * sum(jax.tree.leaves(map_table(count, model)))


def scoring_bytes(model: ModelConfig, tokens: int) -> int:
    """About what scoring a few tokens takes on a device, beside the parameters.

    Args:
        model: that scores.
        tokens: of a device.
    """
    logits = 3 * 4 * min(tokens, CHUNK_TOKENS) * model.vocab_rows
    head = 2 * model.vocab_rows * model.width
    layer = 6 * (3 * model.width * model.mlp + 4 * model.width * model.heads * model.head_dim)
    return logits + head + layer


def weight_bytes(model: ModelConfig, dtype: Any, tensor: int) -> int:
    """Bytes of a device's part of the sampler's weights, shared by `tensor` devices."""

    def count(info: ParamInfo) -> int:
        shared = any("tensor" in mesh_axes(axis) for axis in info.axes)
        return math.prod(info.shape) // (tensor if shared else 1)

    return sum(jax.tree.leaves(map_table(count, model))) * jnp.dtype(dtype).itemsize


def plan(
    model: ModelConfig,
    *,
    rows: int,
    context: int,
    page_tokens: int,
    pool_tokens: int,
    chunk_tokens: int,
    kv_dtype: Any,
    dtype: Any,
    tensor: int,
    copied: bool,
    weight_bytes: int,
    limit_bytes: int,
) -> MemoryPlan:
    """What a device of an engine holds.

    Args:
        model: what decodes.
        rows: sequences that decode on the device.
        context: tokens of the longest, whole pages.
        page_tokens: of a page.
        pool_tokens: of all pages of the device; 0: `context` for each row, or what fits.
        chunk_tokens: of a prompt computed at one time.
        kv_dtype: of pages.
        dtype: of the computation.
        tensor: devices that share the heads.
        copied: whether a window decodes from a copy of its rows' pages.
        weight_bytes: of the parameters.
        limit_bytes: there are.

    Raises:
        MemoryError: it does not fit.
    """
    page = page_bytes(model, page_tokens, kv_dtype, tensor)
    copy_of_page = page_bytes(model, page_tokens, dtype, tensor) if copied else 0
    temporary = temporary_bytes(model, rows, chunk_tokens, dtype, tensor)
    whole = rows * context // page_tokens
    fits = max(0, limit_bytes - weight_bytes - temporary) // (page + copy_of_page)
    # Of int8 pages, in other numbers than these a TPU copies the scales to write some.
    unit = 8 if kv_dtype == jnp.int8 else 1
    wanted = -(-pool_tokens // page_tokens) or whole
    pages = -(-wanted // unit) * unit
    if not pool_tokens:
        pages = min(pages, fits // unit * unit)
    found = MemoryPlan(
        weight_bytes, page, pages, temporary + min(pages, whole) * copy_of_page, limit_bytes
    )
    if found.total_bytes > limit_bytes or pages < 1:
        raise MemoryError(f"{found}: does not fit")
    return found


def temporary_bytes(model: ModelConfig, rows: int, chunk_tokens: int, dtype, tensor: int) -> int:
    """About what the programs hold beside weights, pages and copies of pages."""
    itemsize = jnp.dtype(dtype).itemsize
    logits = 3 * 4 * rows * model.vocab_rows // tensor
    heads = (model.heads + 2 * model.kv_heads) * model.head_dim
    widest = max(2 * model.mlp // tensor, heads)
    chunk = chunk_tokens * (3 * model.width + 2 * widest) * max(itemsize, 4)
    return logits + chunk


def page_bytes(model: ModelConfig, page_tokens: int, kv_dtype: Any, tensor: int) -> int:
    """Bytes of one page on a device, over all layers.

    Args:
        model: what decodes.
        page_tokens: tokens of a page.
        kv_dtype: of keys and values; int8 has a float32 scale for each of both.
        tensor: devices that share the heads.
    """
    itemsize = jnp.dtype(kv_dtype).itemsize
    per_token = 2 * model.head_dim * itemsize + (8 if itemsize == 1 else 0)
    return model.layers * model.kv_heads // tensor * page_tokens * per_token


def resident_bytes(tree: Any) -> int:
    """Bytes of arrays, or of shapes that have shardings, on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def trainer_line(state: TrainState, device: jax.Device) -> str:
    """What a device holds of a trainer, but for what the micro-batches themselves need."""
    weights, moments = resident_bytes(state.params), resident_bytes(state.opt_state)
    return (
        f"trainer memory of a device: weights {weights / GIB:.2f} GiB, "
        f"optimizer {moments / GIB:.2f} GiB, while it learns gradients {weights / GIB:.2f} GiB, "
        f"of {device_bytes(device) / GIB:.2f} GiB"
    )


def engine_bytes(device: jax.Device) -> int:
    """Memory of a device that an engine may plan with where it has the device for itself."""
    return int((1 - SPARE_SHARE) * device_bytes(device))


def device_bytes(device: jax.Device) -> int:
    """Memory of a device that an engine may plan with: of a CPU a share of the host's."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(HOST_SHARE * host) // len(jax.local_devices())
