"""What machine this is, and which of the planned-for chips its devices are."""

import dataclasses
import os
import platform
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import backend

from vibejax.kernels import tiles
from vibejax.planning import compiling, slices
from vibejax.planning.slices import GIB, Slice

GPUS = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100"}
"""What JAX calls a GPU, and its name in `slices.CHIPS`; other models have other peaks."""

STAND_IN = "h100"  # whose peaks are taken where kernels are interpreted


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where the checks run.

    Attributes:
        devices: of this process, all of one kind.
        interpreted: whether kernels run step by step on a CPU.
        where: the devices as a slice; None: there are no published peaks for them.
    """

    devices: Sequence[jax.Device]
    interpreted: bool
    where: Slice | None

    @property
    def kernels(self) -> tuple[str, ...]:
        """The backends of kernels that there are for the devices."""
        if self.interpreted:
            return ("tpu", "gpu")
        kind, own = self.devices[0].device_kind, self.devices[0].platform
        return (own,) if own == "gpu" or kind in tiles.TPU_CHIPS else ()

    def implementation(self, backend: str) -> Any:
        """What `vibejax.attention` calls these kernels here."""
        return f"{backend}_interpreted" if self.interpreted else backend


def find(*, interpret: bool) -> Machine:
    """This process's devices; a CPU interprets."""
    devices = jax.local_devices()
    interpreted = interpret or devices[0].platform == "cpu"
    return Machine(devices, interpreted, as_slice(devices, interpreted))


def as_slice(devices: Sequence[jax.Device], interpreted: bool = False) -> Slice | None:
    """Some devices as a slice of planning; None: there are no published peaks for them."""
    if interpreted:
        return Slice(f"{len(devices)} as if {STAND_IN}", STAND_IN, 1, (len(devices),))
    kind = (tiles.TPU_CHIPS | GPUS).get(devices[0].device_kind)
    if kind is None:
        return None
    if devices[0].platform == "gpu":
        return Slice(f"{kind}-{len(devices)}", kind, 1, (len(devices),))
    axes = len(next(iter(slices.SHAPES[kind].values())))
    extent = np.ptp([d.coords for d in devices], axis=0) + 1
    shape = tuple(map(int, extent[:axes]))
    return Slice(f"{kind} {'x'.join(map(str, shape))}", kind, 1, shape)


def describe(machine: Machine) -> dict[str, Any]:
    """The machine as the JSON takes it."""
    device = machine.devices[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    return {
        "device_kind": device.device_kind,
        "platform": device.platform,
        "devices": len(machine.devices),
        "memory_bytes": memory,
        "interpreted": machine.interpreted,
        "peaks_of": machine.where and machine.where.name,
        "driver": backend.get_backend().platform_version,
        "versions": compiling.versions(),
        "python": platform.python_version(),
        "host": platform.platform(),
        "cores": os.cpu_count(),
        "tiles": tiles.overrides(),
    }


def line(facts: dict[str, Any]) -> str:
    """The same for people, in one line."""
    memory = facts["memory_bytes"]
    parts = [
        f"{facts['devices']} x {facts['device_kind']}",
        f"{memory / GIB:.1f} GiB each" if memory else "memory unknown",
        *(f"{name} {version}" for name, version in facts["versions"].items()),
        " ".join(facts["driver"].split()),
    ]
    if facts["interpreted"]:
        parts.append(f"kernels interpreted, peaks of {STAND_IN} stand in: no figure means anything")
    elif not facts["peaks_of"]:
        parts.append("no published peaks for this kind")
    return ", ".join(parts)
