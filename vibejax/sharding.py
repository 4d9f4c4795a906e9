"""The one place that says which array axis lies on which mesh axis.

A module names the axes of its arrays ("batch", "embed", ...); `AXIS_RULES` maps the names to
mesh axes. No other module writes a mesh axis name. A program runs under `jax.set_mesh(mesh)`;
`constrain` reads the mesh from there, and does nothing where there is none.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

CONTEXT_CHUNK = 512  # whole query tiles of the kernels
MESH_AXES = ("data", "fsdp", "context", "tensor")

AXIS_RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "length": "context",
    # parameters and the activations they touch
    "layers": None,
    "embed": ("fsdp", "context"),  # devices that share a row share the masters too
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
}


def make_mesh(sizes: dict[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all of `MESH_AXES`; an axis that `sizes` leaves out has size 1.

    Of several TPU slices, `data` alone lies across them: the others move too much for the network
    between slices.

    Args:
        sizes: devices on each axis.
        devices: those to use; None takes those of all processes.

    Raises:
        ValueError: an axis is unknown, the sizes do not multiply to the number of devices, or
            `data` does not divide over the slices.
    """
    unknown = sizes.keys() - set(MESH_AXES)
    if unknown:
        raise ValueError(f"mesh axes {sorted(unknown)}: must be among {', '.join(MESH_AXES)}")
    devices = jax.devices() if devices is None else devices
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    if math.prod(shape) != len(devices):
        wanted = " x ".join(f"{axis}={n}" for axis, n in zip(MESH_AXES, shape, strict=True))
        raise ValueError(f"mesh {wanted} needs {math.prod(shape)} devices, found {len(devices)}")
    auto = (AxisType.Auto,) * len(MESH_AXES)  # jit chooses the layout between our constraints
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(shape, MESH_AXES, axis_types=auto, devices=devices)
    return Mesh(_over_slices(shape, slices, devices), MESH_AXES, axis_types=auto)


def _over_slices(shape: tuple[int, ...], slices: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices of several slices (of GPUs: hosts), in the shape of a mesh."""
    if devices[0].platform != "tpu":  # ordered by host, so that the last axes stay inside one
        return np.asarray(devices).reshape(shape)
    data, *inside = shape
    if data % slices:
        raise ValueError(
            f"axis data = {data} must be a multiple of the {slices} slices: it alone lies across "
            "them"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *inside), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )


def spec(*axes: str | None) -> P:
    """The PartitionSpec of an array whose axes have these names (None: replicated)."""
    for axis in axes:
        if axis is not None and axis not in AXIS_RULES:
            raise ValueError(f"no sharding rule for axis {axis!r}; known: {', '.join(AXIS_RULES)}")
    return P(*(None if axis is None else AXIS_RULES[axis] for axis in axes))


def sharding(mesh: Mesh, shape: tuple[int, ...], *axes: str | None) -> NamedSharding:
    """The sharding of an array of `shape`, checked to divide evenly.

    Mesh axes of one device are left out, as the compiler does where it chooses: shardings that are
    the same but unequal would have a program compiled again.

    Raises:
        ValueError: an axis is not a multiple of the mesh axes it lies on.
    """
    partition: list[tuple[str, ...] | None] = []
    for axis, size, mesh_axes in zip(axes, shape, spec(*axes), strict=True):
        names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
        ways = math.prod(mesh.shape[name] for name in names)
        if size % ways:
            raise ValueError(
                f"axis {axis!r} of size {size} is not a multiple of mesh axes {names} = {ways}"
            )
        partition.append(tuple(name for name in names if mesh.shape[name] > 1) or None)
    while partition and partition[-1] is None:
        partition.pop()
    return NamedSharding(mesh, P(*partition))


def mesh_axes(axis: str) -> tuple[str, ...]:
    """The mesh axes that an array axis of this name lies on."""
    (names,) = spec(axis)
    return (names,) if isinstance(names, str) else names or ()


def shared_axes(*axes: str) -> tuple[str, ...]:
    """The mesh axes over which collectives for these array axes run, in a `shard_map`.

    Axes of one device are left out: XLA for CPUs copies what it reduces over a single device.
    """
    shape = jax.sharding.get_abstract_mesh().shape
    names = dict.fromkeys(name for axis in axes for name in mesh_axes(axis))
    return tuple(name for name in names if shape.get(name, 1) > 1)


def ways(mesh: Mesh | jax.sharding.AbstractMesh, axis: str) -> int:
    """On how many devices an array axis of this name is cut."""
    return math.prod(mesh.shape[name] for name in mesh_axes(axis))


def context_chunk(row_tokens: int, shards: int) -> int:
    """Tokens of a row that stay together on one context shard: `CONTEXT_CHUNK`, or its whole part.

    Raises:
        ValueError: a shard's part of a row is not a whole number of chunks.
    """
    part = row_tokens // shards
    chunk = min(CONTEXT_CHUNK, part)
    if row_tokens % shards or part % chunk:
        raise ValueError(
            f"rows of {row_tokens} tokens on {shards} context shards: a shard's part must be a "
            f"multiple of {CONTEXT_CHUNK}, or less"
        )
    return chunk


def one_each(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis has an entry for each device."""
    return NamedSharding(mesh, P(MESH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array of which every device holds the whole."""
    return NamedSharding(mesh, P())


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` laid out by the names of its axes on the mesh in force; `x` itself without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*axes))
