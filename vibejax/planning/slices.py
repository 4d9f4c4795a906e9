"""Slices as clouds sell them, and what their chips are said to do.

Peaks are the vendors' published ones: bfloat16 operations (dense), bandwidth of the memory, one
direction of a link between chips; the network of a host, shared by its devices, is an estimate.
Memory is what the compilers let a program have, on GPUs what a run takes. A device is what JAX
calls one: a chip, or of v4 and tpu7x one of its two cores.

Source: the system architecture pages of Cloud TPU (v4, v5e, v5p, v6e, tpu7x) and the data sheets of
H100 SXM and A100 SXM 80 GB.
"""

import dataclasses
import difflib
import math
import re
from typing import Any, Literal, NamedTuple

import numpy as np

from vibejax import programs
from vibejax.config_file import InputError

GIB = 2**30

# Of 80 GB: what CUDA has on an H100, and of that what a run takes.
_GPU_BYTES = int(programs.GPU_MEMORY_SHARE * 79.18 * GIB)


class SliceError(InputError):
    """A slice that is not sold, or a mesh that does not fit it."""


class Reached(NamedTuple):
    """What one such device was measured at, which is less than is published of it.

    Attributes:
        products: operations a second of bfloat16 matrices.
        bandwidth: bytes a second, read and written.
        forward: of the attention kernel, 4 operations for a pair of tokens, head and dimension.
        gradient: of forward and backward kernels, 14 operations.
    """

    products: float
    bandwidth: float
    forward: float
    gradient: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of device.

    Attributes:
        platform: whose compiler compiles for it.
        flops: bfloat16 operations a second.
        bandwidth: bytes a second of its memory.
        memory_bytes: that a program may take.
        link: bytes a second of one link in one direction; of a GPU all its links together.
        network: bytes a second of its part of the host's network, one direction.
        clock: cycles a second in which the compiler estimates; 0: it does not.
        cores: that share what is above; a kernel's cycles are those of one.
        reached: what times are projected from, of a chip whose compiler does not estimate.
    """

    platform: Literal["tpu", "cuda"]
    flops: float
    bandwidth: float
    memory_bytes: int
    link: float
    network: float
    clock: float = 0.0
    cores: int = 1
    reached: Reached | None = None


# An H100 80GB HBM3, jax 0.10.2, 2026-11-23: tpu/validate.py, tests/benchmarks/attention_gpu.py of
# 65,536 tokens.
_H100 = Reached(products=671e12, bandwidth=2617e9, forward=420e12, gradient=406e12)

CHIPS = {
    "v4": Chip(platform="tpu", flops=137.5e12, bandwidth=614e9, memory_bytes=int(15.48 * GIB),
               link=25e9, network=3.1e9, clock=1.05e9),
    "v5e": Chip(platform="tpu", flops=197e12, bandwidth=819e9, memory_bytes=int(15.75 * GIB),
                link=50e9, network=3.1e9, clock=1.5e9),
    "v5p": Chip(platform="tpu", flops=459e12, bandwidth=2765e9, memory_bytes=int(95.74 * GIB),
                link=100e9, network=6.2e9, clock=1.75e9, cores=2),
    "v6e": Chip(platform="tpu", flops=918e12, bandwidth=1640e9, memory_bytes=int(31.25 * GIB),
                link=100e9, network=12.5e9, clock=1.75e9),
    "tpu7x": Chip(platform="tpu", flops=1153.5e12, bandwidth=3690e9,
                  memory_bytes=int(94.75 * GIB), link=50e9, network=6.2e9, clock=2.2e9),
    "h100": Chip(platform="cuda", flops=989e12, bandwidth=3350e9, memory_bytes=_GPU_BYTES,
                 link=450e9, network=50e9, reached=_H100),
    "a100": Chip(platform="cuda", flops=312e12, bandwidth=2039e9, memory_bytes=_GPU_BYTES,
                 link=300e9, network=25e9),
}  # fmt: skip

_FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16),
         256: (16, 16)}  # fmt: skip
_CUBES = {8: (2, 2, 1), 16: (2, 2, 2), 32: (2, 2, 4), 64: (2, 4, 4), 128: (4, 4, 4),
          256: (4, 4, 8), 512: (4, 8, 8), 1024: (8, 8, 8), 2048: (8, 8, 16)}  # fmt: skip
_NODES = {1: (1,), 2: (2,), 4: (4,), 8: (8,)}
# What the number in a slice's name counts: chips of v5e and v6e, cores of the others, GPUs.
SHAPES = {"v4": _CUBES, "v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT, "tpu7x": _CUBES,
          "h100": _NODES, "a100": _NODES}  # fmt: skip
_CHIPS_A_HOST = {"v5e": 4, "v6e": 4, "v4": 4, "v5p": 4, "tpu7x": 4}
_WHOLE_HOST = 8  # v5e and v6e of up to so many chips are sold as one host


@dataclasses.dataclass(frozen=True)
class Slice:
    """What a job runs on.

    Attributes:
        name: as the cloud has it, "2xv5e-256" for two of them.
        kind: of `CHIPS`.
        count: slices, or GPU hosts, that only a network joins.
        shape: of the chips of one.
    """

    name: str
    kind: str
    count: int
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """Its devices."""
        return CHIPS[self.kind]

    @property
    def devices_a_chip(self) -> int:
        """JAX's devices of one chip."""
        return 2 if self.kind in ("v4", "tpu7x") else 1

    @property
    def chips(self) -> int:
        """Of all slices."""
        return self.count * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Of all slices."""
        return self.chips * self.devices_a_chip

    @property
    def devices_a_host(self) -> int:
        """Of one host, whose engine decodes on them."""
        inside = math.prod(self.shape)
        if self.chip.platform == "tpu" and inside > _WHOLE_HOST - 4 * (len(self.shape) == 3):
            inside = _CHIPS_A_HOST[self.kind]
        return inside * self.devices_a_chip

    @property
    def host(self) -> "Slice":
        """One of its hosts, by itself."""
        shape = self.shape
        if self.devices_a_host < math.prod(shape) * self.devices_a_chip:
            shape = (2, 2, 1)[: len(shape)]
        return dataclasses.replace(self, count=1, shape=shape)

    def topology(self) -> Any:
        """The description that the compilers take.

        Needs libtpu or the CUDA plugin (extra `compile`).
        """
        from jax.experimental import topologies

        if self.chip.platform == "cuda":
            from importlib import resources

            target = resources.files("vibejax.planning") / f"{self.kind}.txtpb"
            return topologies.get_topology_desc(
                platform="cuda",
                topology=f"{self.count}x1x{math.prod(self.shape)}",
                target_config=target.read_text(),
            )
        several = {"num_slices": self.count} if self.count > 1 else {}
        if self.devices_a_host == _WHOLE_HOST and len(self.shape) == 2:
            several["chips_per_host_bounds"] = (*self.shape, 1)
        elif self.chips == 1:
            several["chips_per_host_bounds"] = (1, 1, 1)
        return topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{self.kind}:{'x'.join(map(str, self.shape))}",
            **several,
        )

    def bandwidth(self, coordinates: np.ndarray) -> float:
        """Bytes a second that a device of a group takes in over links, at the worst place.

        An axis of the torus that the group spans gives two links where it is closed to a ring, else
        one: a collective waits for the device at the corner. The cores of a chip share its links
        and reach each other through its memory.

        Args:
            coordinates: [devices, axes] of a group within one slice.
        """
        chip = self.chip
        if chip.platform == "cuda":
            return chip.link
        lengths = [*map(int, np.ptp(coordinates, axis=0) + 1)][: len(self.shape)]
        if max(lengths) == 1:
            return chip.bandwidth / 2
        links = zip(lengths, self.shape, strict=True)
        return chip.link * sum(2 if self._is_ring(*x) else x[0] > 1 for x in links)

    def _is_ring(self, length: int, axis_length: int) -> bool:
        if len(self.shape) == 2:  # v5e and v6e: whole axes of 16
            return length == axis_length == 16
        return length == axis_length and all(n % 4 == 0 for n in self.shape)


def find(name: str) -> Slice:
    """The slice of a name such as v5e-16, v5p-8 or 2xv5e-256.

    Raises:
        SliceError: it is not sold; the message lists what is.
    """
    named = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*)-(\d+)", name)
    if named:
        count, kind, size = int(named[1] or 1), named[2].replace("v5litepod", "v5e"), int(named[3])
        if count and size in SHAPES.get(kind, ()):
            return Slice(name, kind, count, SHAPES[kind][size])
    known = [f"{kind}-{size}" for kind, shapes in SHAPES.items() for size in shapes]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    listed = "; ".join(f"{kind}-{'|'.join(map(str, shapes))}" for kind, shapes in SHAPES.items())
    raise SliceError(f"slice {name!r}: {hint}known are {listed}, and 2x... for several")


def check_mesh(where: Slice, sizes: dict[str, int]) -> None:
    """Whether a mesh has as many devices as a slice, and keeps all but `data` inside it.

    Raises:
        SliceError: it does not.
    """
    wanted = " x ".join(f"{axis} {n}" for axis, n in sizes.items())
    if math.prod(sizes.values()) != where.devices:
        raise SliceError(
            f"mesh {wanted} = {math.prod(sizes.values())} devices, but {where.name} has "
            f"{where.devices}: set mesh.* so that they multiply to it, or use --search"
        )
    if sizes["data"] % where.count:
        raise SliceError(
            f"mesh {wanted}: mesh.data must be a multiple of the {where.count} slices of "
            f"{where.name}, which only a network joins"
        )
