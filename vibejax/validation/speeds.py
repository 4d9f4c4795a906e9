"""What the devices reach beside what is published of them: memory, matrix products, links.

Shape suffixes: N numbers of a device, C devices times their numbers, I and J rows and columns.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from vibejax.planning.slices import Chip
from vibejax.validation.checks import Found, Skipped, Timing, timed
from vibejax.validation.machine import Machine
from vibejax.validation.sizes import Sizes

TIMES = 10  # in one call, so that starting it does not count

AXIS = "devices"


def stream(array_N: jax.Array) -> jax.Array:
    """`array_N` read and written `TIMES` times."""
    return jax.lax.fori_loop(0, TIMES, lambda _, x_N: x_N + 1, array_N)


def products(x_IJ: jax.Array, w_JJ: jax.Array) -> jax.Array:
    """`x_IJ` times a matrix, `TIMES` times over."""
    return jax.lax.fori_loop(0, TIMES, lambda _, x_IJ: x_IJ @ w_JJ, x_IJ)


def bandwidth(machine: Machine, sizes: Sizes) -> Found:
    """Of a device's memory, in both directions together."""
    array_N = jnp.zeros(sizes.stream_bytes // 4, jnp.float32)
    time = timed(_bound(jax.jit(stream), array_N), sizes.repeats)
    rate = TIMES * 2 * array_N.nbytes / time.median_s
    return _against("bandwidth", rate, "GB/s", 1e9, machine, lambda chip: chip.bandwidth, time)


def matmul(machine: Machine, sizes: Sizes) -> Found:
    """Of products of bfloat16 matrices."""
    n = sizes.matmul
    keys = jax.random.split(jax.random.key(0))
    x_IJ = jax.random.normal(keys[0], (n, n), jnp.bfloat16)
    w_JJ = jax.random.normal(keys[1], (n, n), jnp.bfloat16) / jnp.bfloat16(n**0.5)
    time = timed(_bound(jax.jit(products), x_IJ, w_JJ), sizes.repeats)
    rate = TIMES * 2 * n**3 / time.median_s
    return _against("flops", rate, "TFLOP/s", 1e12, machine, lambda chip: chip.flops, time)


def _against(
    name: str,
    rate: float,
    unit: str,
    scale: float,
    machine: Machine,
    published: Callable[[Chip], float],
    time: Timing,
) -> Found:
    figures = {name: rate, "spread": time.spread}
    said = f"{rate / scale:,.1f} {unit} (spread {time.spread:.0%})"
    if machine.where is not None:
        peak = published(machine.where.chip)
        figures |= {"published": peak, "share": rate / peak}
        said += f", {rate / peak:.0%} of the published {peak / scale:,.0f}"
    return Found(said, figures)


class Collective(NamedTuple):
    """One kind of exchange between all devices.

    Attributes:
        name: of it.
        run: [N] of each device -> what the device has afterwards.
        want: [C] of all devices -> what all have afterwards, one after another.
        moved: of the bytes of [C], how many come into a device, by the number of devices.
    """

    name: str
    run: Callable[[jax.Array], jax.Array]
    want: Callable[[np.ndarray, int], np.ndarray]
    moved: Callable[[int], float]


def _after(x_C: np.ndarray, n: int) -> np.ndarray:
    return np.roll(x_C.reshape(n, -1), 1, axis=0).reshape(-1)


def _permute(x_N: jax.Array) -> jax.Array:
    n = jax.lax.axis_size(AXIS)
    return jax.lax.ppermute(x_N, AXIS, [(i, (i + 1) % n) for i in range(n)])


COLLECTIVES = (
    Collective(
        "all-gather",
        lambda x_N: jax.lax.all_gather(x_N, AXIS, tiled=True),
        lambda x_C, n: np.tile(x_C, n),
        lambda n: (n - 1) / n,
    ),
    Collective(
        "reduce-scatter",
        lambda x_N: jax.lax.psum_scatter(x_N, AXIS, tiled=True),
        lambda x_C, n: x_C.reshape(n, -1).sum(axis=0),
        lambda n: (n - 1) / n / n,
    ),
    Collective(
        "all-reduce",
        lambda x_N: jax.lax.psum(x_N, AXIS),
        lambda x_C, n: np.tile(x_C.reshape(n, -1).sum(axis=0), n),
        lambda n: 2 * (n - 1) / n / n,
    ),
    Collective(
        "all-to-all",
        lambda x_N: jax.lax.all_to_all(x_N, AXIS, 0, 0, tiled=True),
        lambda x_C, n: x_C.reshape(n, n, -1).swapaxes(0, 1).reshape(-1),
        lambda n: (n - 1) / n / n,
    ),
    Collective("permute", _permute, _after, lambda n: 1 / n),
)


def collective(kind: Collective, machine: Machine, sizes: Sizes) -> Found:
    """One exchange: its result, and the bytes a second that come into a device.

    Raises:
        Skipped: there is one device.
    """
    n = len(machine.devices)
    if n == 1:
        raise Skipped("there is one device")
    mesh = jax.sharding.Mesh(np.array(machine.devices), (AXIS,))
    run = jax.jit(
        jax.shard_map(kind.run, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False)
    )
    count = sizes.collective_bytes // 4 // n**2 * n**2
    small_C = np.arange(n * n * 4, dtype=np.float32)  # whole numbers: sums are exact
    right = np.array_equal(run(_placed(mesh, small_C)), kind.want(small_C, n))
    x_C = jax.jit(
        lambda: jnp.ones(count, jnp.float32),
        out_shardings=jax.sharding.NamedSharding(mesh, P(AXIS)),
    )()
    time = timed(_bound(run, x_C), sizes.repeats)
    rate = kind.moved(n) * x_C.nbytes / time.median_s
    figures = {"bytes_per_s": rate, "spread": time.spread, "bytes": x_C.nbytes}
    said = f"{rate / 1e9:,.1f} GB/s into a device (spread {time.spread:.0%})"
    if machine.where is not None:
        places = np.array([[*getattr(d, "coords", [d.id])] for d in machine.devices])
        planned = machine.where.bandwidth(places)
        figures |= {"planned": planned, "share": rate / planned}
        said += f", {rate / planned:.0%} of the planned {planned / 1e9:,.0f}"
    if not right:
        said = f"the result is wrong; {said}"
    return Found(said, figures, right)


def _placed(mesh: jax.sharding.Mesh, x_C: np.ndarray) -> jax.Array:
    return jax.device_put(x_C, jax.sharding.NamedSharding(mesh, P(AXIS)))


def _bound(function: Callable, *arguments) -> Callable[[], jax.Array]:
    return lambda: function(*arguments)


def checks(machine: Machine, sizes: Sizes) -> Iterator[tuple[str, Callable[[], Found]]]:
    """All of these, by name."""
    yield "memory bandwidth, read and written", lambda: bandwidth(machine, sizes)
    yield "matrix products, bfloat16", lambda: matmul(machine, sizes)
    for kind in COLLECTIVES:
        yield (
            f"{kind.name} over {len(machine.devices)} devices",
            lambda kind=kind: collective(kind, machine, sizes),
        )
