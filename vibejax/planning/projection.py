"""From compiled programs to memory, time and utilisation: a model, nothing is run.

Time of a program is that of its arithmetic, by the cycles that the TPU compiler estimates for all
but the attention kernels and by their replayed schedules for these, and that of its collectives, by
bytes over the links (or the network) that a group has. `exposed` adds both; `hidden` takes the
longer one. A GPU's compiler estimates nothing: there, time is the roofline's, with the rates that
one such device was measured at, where there are any.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vibejax import memory_plan
from vibejax.completions import EngineConfig
from vibejax.config.rl import RlConfig
from vibejax.engine import kv_dtype as kv_dtype_of
from vibejax.kernels import decode_attention_tpu
from vibejax.kernels import pages as pages_
from vibejax.memory_plan import MemoryPlan
from vibejax.planning import hlo, tiles_run, work
from vibejax.planning.compiling import Compiled
from vibejax.planning.hlo import Collective
from vibejax.planning.slices import Slice
from vibejax.planning.work import Work
from vibejax.qwen2 import ModelConfig

TRAINER = ("accumulate", "apply", "score", "canary")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What collectives move into a device, and for how long.

    Attributes:
        link_bytes: over links inside a slice.
        network_bytes: over the network between slices.
        seconds: of both, one after the other.
        kinds: bytes by collective.
    """

    link_bytes: float = 0.0
    network_bytes: float = 0.0
    seconds: float = 0.0
    kinds: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One call of a program.

    Attributes:
        work: by its definition.
        compute_s: of its arithmetic.
        traffic: of its collectives.
        roofline_s: below which no program of this kind gets.
    """

    work: Work
    compute_s: float
    traffic: Traffic
    roofline_s: float

    @property
    def exposed_s(self) -> float:
        """With every collective waited for."""
        return self.compute_s + self.traffic.seconds

    @property
    def hidden_s(self) -> float:
        """With collectives under the arithmetic, as far as they fit."""
        return max(self.compute_s, self.traffic.seconds)


@dataclasses.dataclass(frozen=True)
class Phase:
    """What lies on a device at one time.

    Attributes:
        name: of the phase.
        held: bytes by kind.
    """

    name: str
    held: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.held.values())


def phases(
    config: RlConfig,
    model: ModelConfig,
    mesh,
    memory: MemoryPlan,
    compiled: Mapping[str, Compiled],
) -> list[Phase]:
    """What each phase of a step holds; what programs take of it is the compiler's word.

    Args:
        config: the run's.
        model: its policy.
        mesh: the trainer's.
        memory: the engine's plan.
        compiled: the programs.
    """
    copy = memory_plan.sharded_bytes(model, mesh)
    pages = memory.pages * memory.page_bytes
    base = {"weights": copy, "optimizer": 2 * copy}
    if config.objective.kl:
        base["reference"] = copy
    code = sum(program.code for program in compiled.values())

    def phase(name: str, taken_as_argument: int, more: Mapping[str, int]) -> Phase:
        beside = max(0, compiled[name].peak - taken_as_argument)
        return Phase(name, {**base, **more, "activations": beside, "code": code})

    sampler = {"sampler copy": memory.weight_bytes, "KV pages": pages}
    found = []
    for name in compiled:
        if name == "accumulate":
            found.append(phase(name, 2 * copy, {"gradients": copy}))
        elif name == "apply":
            found.append(phase(name, 4 * copy, {"gradients": copy}))
        elif name == "score":
            found.append(phase(name, copy, {}))
        elif name == "canary":
            found.append(phase(name, copy, sampler))
        elif name == "hand_over":
            layers = compiled[name].arguments
            found.append(phase(name, layers, {"sampler copy": memory.weight_bytes}))
        else:
            found.append(phase(name, memory.weight_bytes + pages, sampler))
    return found


def traffic(
    found: Sequence[Collective],
    where: Slice,
    coordinates: Sequence[Sequence[int]],
    slices: Sequence[int],
) -> Traffic:
    """What collectives cost, one after another.

    Args:
        found: the collectives.
        where: the slice.
        coordinates: of the devices in the order of their mesh.
        slices: to which each belongs.
    """
    place, of_slice = np.asarray(coordinates), np.asarray(slices)
    links = network = seconds = 0.0
    kinds: dict[str, float] = {}
    ways: dict[str, dict[bytes, float]] = {}  # of a computation's permutes, seconds by direction
    for collective in found:
        costs = [
            _of_group(collective, where, place[group], of_slice[group])
            for group in collective.groups
        ]
        link, net, time = (collective.times * x for x in max(costs, key=lambda cost: cost[2]))
        links, network = links + link, network + net
        kinds[collective.kind] = kinds.get(collective.kind, 0.0) + link + net
        if collective.kind == "collective-permute":
            way = ways.setdefault(collective.place, {})
            key = collective.groups.tobytes()
            way[key] = way.get(key, 0.0) + time
        else:
            seconds += time
    # Both directions of a ring are used at the same time.
    seconds += sum(max(way.values()) for way in ways.values())
    return Traffic(links, network, seconds, kinds)


def _of_group(collective, where: Slice, place, of_slice) -> tuple[float, float, float]:
    """Bytes that a device takes in over links and over the network, and seconds."""
    parts = len(set(of_slice.tolist()))
    inside = len(of_slice) // parts
    twice = 2 if collective.kind == "all-reduce" else 1
    if collective.kind == "collective-permute":
        return (
            (0.0, collective.payload, collective.payload / where.chip.network)
            if parts > 1
            else (collective.payload, 0.0, collective.payload / where.bandwidth(place))
        )
    link = twice * collective.payload * (inside - 1) / inside
    net = twice * collective.payload / inside * (parts - 1) / parts
    bandwidth = where.bandwidth(place[of_slice == of_slice[0]]) if link else math.inf
    return link, net, link / bandwidth + net / where.chip.network


def estimate(
    name: str,
    compiled: Compiled,
    done: Work,
    where: Slice,
    *,
    kernel_s: float = 0.0,
) -> Estimate:
    """A call of one program of the trainer's, or of `fill`.

    Args:
        name: of the program.
        compiled: it.
        done: its work.
        where: the slice.
        kernel_s: of its attention kernels.
    """
    chip = where.chip
    runs = hlo.executions(compiled.computations, hlo.entry(compiled.text))
    found = hlo.collectives(compiled.computations, runs, len(compiled.coordinates))
    moved = traffic(found, where, compiled.coordinates, compiled.slices)
    floor = max(done.flops / chip.flops, done.bytes / chip.bandwidth)
    if chip.clock:
        compute = hlo.cycles(compiled.computations, runs) / chip.clock + kernel_s
    elif chip.reached:
        products = done.flops - (done.attention_flops if kernel_s else 0.0)
        floors = products / chip.reached.products, done.bytes / chip.reached.bandwidth
        compute = max(floors) + kernel_s
    else:
        compute = floor
    return Estimate(done, max(compute, floor) if name == "apply" else compute, moved, floor)


def kernel_seconds(
    name: str, config: RlConfig, model: ModelConfig, mesh, where: Slice, lengths: Sequence[int]
) -> float:
    """Of the attention kernels of one call, on the device with most to do."""
    if name not in ("accumulate", "score"):
        return 0.0
    again = work.forwards_again(config)
    if reached := where.chip.reached:
        tokens = config.train.microbatch_rows * config.train.row_tokens / mesh.size
        pairs = tokens * tiles_run.attended(lengths) * model.layers * model.heads * model.head_dim
        once = 4 * pairs / reached.forward
        return again * once + 14 * pairs / reached.gradient if name == "accumulate" else once
    if where.chip.platform != "tpu":
        return 0.0
    return tiles_run.seconds(
        where, model, lengths,
        shards=mesh.shape["context"],
        tensor=mesh.shape["tensor"],
        rows=max(1, config.train.microbatch_rows // (mesh.shape["data"] * mesh.shape["fsdp"])),
        forwards=1 + again if name == "accumulate" else 1,
        backwards=int(name == "accumulate"),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Decode:
    """One decode step of an engine's device.

    Attributes:
        work: by its definition.
        rows: sequences of the device.
        live_tokens: cached tokens of them all.
        moved_bytes: that the compiled step moves.
        step_s: projected.
        roofline_s: what has to be moved, at the memory's bandwidth.
        traffic: collectives of a step.
    """

    work: Work
    rows: int
    live_tokens: float
    moved_bytes: float
    step_s: float
    roofline_s: float
    traffic: Traffic

    @property
    def share(self) -> float:
        """Of the bandwidth roofline."""
        return self.roofline_s / self.step_s


def decode(
    compiled: Compiled,
    engine: EngineConfig,
    memory: MemoryPlan,
    where: Slice,
    *,
    rows: int,
    live_tokens: float,
) -> Decode:
    """A step of the decode window, from its compiled loop body.

    Args:
        compiled: the window.
        engine: its sizes.
        memory: its plan.
        where: the slice.
        rows: of a device.
        live_tokens: cached tokens of these.
    """
    computations, chip = compiled.computations, where.chip
    body = hlo.loop_bodies(computations)[0]
    other, *_ = hlo.moved(computations, body, hlo.KERNEL)
    pages = kernel_bytes(engine, memory, rows, live_tokens)
    found = hlo.collectives(computations, {body: 1.0}, len(compiled.coordinates))
    moved = traffic(found, where, compiled.coordinates, compiled.slices)
    arithmetic = hlo.cycles(computations, {body: 1.0}) / chip.clock if chip.clock else 0.0
    bandwidth = chip.reached.bandwidth if chip.reached else chip.bandwidth
    step = max(other / bandwidth, arithmetic) + pages / bandwidth + moved.seconds
    done = work.decode_step(engine, memory, rows, live_tokens)
    return Decode(done, rows, live_tokens, other + pages, step, done.bytes / chip.bandwidth, moved)


def kernel_bytes(engine: EngineConfig, memory: MemoryPlan, rows: int, live_tokens: float) -> float:
    """What the attention kernels of all layers copy in a step, `live_tokens` spread evenly."""
    model, tensor = engine.model, engine.tensor
    q = jax.ShapeDtypeStruct((rows, 1, model.heads // tensor, model.head_dim), jnp.bfloat16)
    kv_heads, kv_dtype = model.kv_heads // tensor, kv_dtype_of(engine, jnp.bfloat16)
    pool = jax.eval_shape(
        lambda: pages_.empty(memory.pages, kv_heads, engine.page_tokens, model.head_dim, kv_dtype)
    )
    entries = -(-(engine.context or model.context) // engine.page_tokens)
    table = jax.ShapeDtypeStruct((rows, entries), jnp.int32)
    lengths = jnp.full(rows, int(live_tokens // rows))
    return model.layers * decode_attention_tpu.bytes_copied(q, pool, table, lengths)


def recommended(
    config: RlConfig, memory: MemoryPlan, room: int, mean_tokens: int, parts: int
) -> tuple[int, int]:
    """Slots of a host, and tokens of its pages, that its memory has room for.

    Args:
        config: the run's.
        memory: the engine's plan.
        room: bytes of a device that are left for pages.
        mean_tokens: of a completion.
        parts: groups of a host's devices with slots of their own.
    """
    pages = max(0, room) // memory.page_bytes
    tokens = pages * config.rollout.page_tokens
    longest = config.rollout.sequence_tokens
    # A sequence holds half of its completion on average, and its prompt with its group.
    rows = int(tokens // (mean_tokens / 2 + config.rollout.max_prompt_tokens / 4))
    rows = max(8, min(rows // 8 * 8, 512))
    return rows * parts, min(tokens, rows * longest) * parts
