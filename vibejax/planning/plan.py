"""A plan: whether a run fits on a slice, and what it would reach there.

Everything in it is projected from compiled programs; nothing was run.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from vibejax import handover, meshes, policy, rl_setup
from vibejax.completions import EngineConfig
from vibejax.config.rl import RlConfig
from vibejax.engine import plan_memory
from vibejax.memory_plan import MemoryPlan
from vibejax.planning import jobs, projection, slices, tiles_run, work
from vibejax.planning.compiling import Compiled
from vibejax.planning.projection import Decode, Estimate, Phase
from vibejax.planning.slices import GIB, Slice
from vibejax.qwen2 import ModelConfig
from vibejax.run_folder import RunError


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is planned.

    Attributes:
        config: the run's.
        settings: its policy's config.json.
        model: the same.
        where: the slice.
        mesh: the trainer's, without devices.
        engine: of one host.
        memory: the engine's plan.
        mean_tokens: of a completion, assumed.
    """

    config: RlConfig
    settings: Mapping[str, Any]
    model: ModelConfig
    where: Slice
    mesh: jax.sharding.AbstractMesh
    engine: EngineConfig
    memory: MemoryPlan
    mean_tokens: int

    @property
    def parts(self) -> int:
        """Groups of a host's devices with slots of their own."""
        return self.where.devices_a_host // self.engine.tensor

    @property
    def micro_batches(self) -> int:
        """Of a step, if every completion teaches and rows are full."""
        rollout, train = self.config.rollout, self.config.train
        tokens = rollout.prompts_per_step * rollout.group_size * (self.mean_tokens + 256)
        return math.ceil(tokens / (train.row_tokens * train.microbatch_rows))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What came out.

    Attributes:
        setting: what was planned.
        phases: what lies on a device, phase by phase.
        estimates: of each program but the window; `packed` is `accumulate` on a packed row.
        decode: a step with the slots of the configuration, their pages half grown.
        full: a step whose live tokens fill the pages.
        slots: of a host, recommended.
        pool_tokens: the same of pages.
        failures: program -> why it has not been compiled.
        buffers: program -> its largest ones.
    """

    setting: Setting
    phases: list[Phase]
    estimates: dict[str, Estimate]
    decode: Decode | None
    full: Decode | None
    slots: int
    pool_tokens: int
    failures: dict[str, str]
    buffers: dict[str, list[tuple[str, int]]]

    @property
    def peak(self) -> Phase:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        """Whether every program compiles and every phase fits."""
        return not self.failures and self.peak.total <= self.setting.where.chip.memory_bytes


def largest(plan: Plan, phase: Phase, count: int = 5) -> list[tuple[str, int]]:
    """What takes most of a phase: kinds that lie there, and buffers of its program."""
    kinds = [(kind, size) for kind, size in phase.held.items() if kind != "activations"]
    return sorted(kinds + plan.buffers.get(phase.name, []), key=lambda x: -x[1])[:count]


def prepare(config: RlConfig, settings: dict[str, Any], where: Slice, mean_tokens: int) -> Setting:
    """What is to be planned, once the mesh is known to fit.

    Raises:
        InputError: mesh, rows or engine cannot be used on this slice.
    """
    sizes, model = config.mesh.model_dump(), jobs.model_of(settings)
    slices.check_mesh(where, sizes)
    policy.check_context(config.policy, model, config.rollout)
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    try:
        meshes.check_rows(config.train, mesh)
        engine = rl_setup.engine_config(config, model, mesh, where.chip.memory_bytes)
    except ValueError as error:
        raise RunError(f"mesh: {error}") from None
    if where.devices_a_host % engine.tensor or model.kv_heads % engine.tensor:
        raise RunError(
            f"rollout.tensor = {engine.tensor}: must divide the {where.devices_a_host} devices of "
            f"a host and {model.kv_heads} key/value heads"
        )
    parts = where.devices_a_host // engine.tensor
    if engine.slots % parts:
        raise RunError(
            f"rollout.slots = {engine.slots}: must be a multiple of the {parts} devices of a host"
        )
    memory = plan_memory(
        engine,
        jax.numpy.dtype(config.train.dtype),
        parts=parts,
        copied=False,
        limit_bytes=engine.memory_bytes,
    )
    return Setting(config, settings, model, where, mesh, engine, memory, mean_tokens)


def make(setting: Setting, compiled: Mapping[str, Compiled]) -> Plan:
    """The plan, from the compiled programs."""
    config, model, mesh, where = setting.config, setting.model, setting.mesh, setting.where
    failures = {name: c.failure for name, c in compiled.items() if c.failure}
    done = {name: c for name, c in compiled.items() if not c.failure}
    measured = {name: c for name, c in compiled.items() if not c.failure or c.needed}
    phases = projection.phases(config, model, mesh, setting.memory, measured)
    causal = (config.train.row_tokens,)
    packed = tiles_run.packed_row(config.train.row_tokens)
    estimates = {}
    for name, lengths in (("accumulate", causal), ("packed", packed), ("score", causal)):
        source = "accumulate" if name == "packed" else name
        if source not in done:
            continue
        needed = (
            work.score(config, model, mesh, config.train.microbatch_rows, config.train.row_tokens)
            if name == "score"
            else work.accumulate(config, model, mesh, lengths)
        )
        kernel_s = projection.kernel_seconds(source, config, model, mesh, where, lengths)
        estimates[name] = projection.estimate(
            source, done[source], needed, where, kernel_s=kernel_s
        )
    short = handover.short_rows(config)
    others = {
        "apply": work.apply(model, mesh),
        "canary": work.score(config, model, mesh, short.microbatch_rows, short.row_tokens),
        "hand_over": work.hand_over(config, model, mesh),
        "fill": work.fill(setting.engine, setting.memory),
    }
    for name, needed in others.items():
        if name in done:
            estimates[name] = projection.estimate(name, done[name], needed, where)
    slots, pool_tokens = _recommended(setting, phases)
    decode = full = None
    if "window" in done:
        rows = setting.engine.slots // setting.parts
        pool = setting.memory.pages * setting.engine.page_tokens
        half = rows * (setting.mean_tokens / 2 + 256)
        decode, full = (
            projection.decode(
                done["window"], setting.engine, setting.memory, where, rows=rows, live_tokens=live
            )
            for live in (min(half, pool), pool)
        )
    buffers = {name: [*map(tuple, c.largest)] for name, c in compiled.items()}
    return Plan(setting, phases, estimates, decode, full, slots, pool_tokens, failures, buffers)


def _recommended(setting: Setting, phases: list[Phase]) -> tuple[int, int]:
    rolling = [p for p in phases if "KV pages" in p.held]
    if not rolling:
        return 0, 0
    taken = max(p.total - p.held["KV pages"] for p in rolling)
    room = setting.where.chip.memory_bytes - taken
    return projection.recommended(
        setting.config, setting.memory, room, setting.mean_tokens, setting.parts
    )


def mfu(setting: Setting, estimate: Estimate, *, hidden: bool, full: bool = False) -> float:
    """Model FLOPs utilisation of a train step: its micro-batches, and its share of the update."""
    flops = estimate.work.useful_flops
    if full:
        whole = (setting.config.train.row_tokens,)
        flops = work.accumulate(
            setting.config, setting.model, setting.mesh, whole, full=True
        ).useful_flops
    seconds = estimate.hidden_s if hidden else estimate.exposed_s
    return flops / (seconds * setting.where.chip.flops)


def step_seconds(plan: Plan) -> dict[str, float]:
    """A whole RL step with completions of the assumed mean length, everything exposed."""
    setting, estimates = plan.setting, plan.estimates
    rollout, found = setting.config.rollout, {}
    if plan.decode:
        tokens = rollout.prompts_per_step * rollout.group_size * setting.mean_tokens
        groups = setting.where.devices / setting.engine.tensor
        found["rollout_s"] = tokens / (plan.decode.rows * groups) * plan.decode.step_s
    if "accumulate" in estimates and "apply" in estimates:
        found["train_s"] = (
            setting.micro_batches * estimates["accumulate"].exposed_s + estimates["apply"].exposed_s
        )
    if "hand_over" in estimates:
        found["hand_over_s"] = setting.model.layers * estimates["hand_over"].exposed_s
    return found


def summary(plan: Plan) -> dict[str, Any]:
    """The plan as JSON takes it."""
    setting = plan.setting
    chip, estimates = setting.where.chip, plan.estimates
    out: dict[str, Any] = {
        "slice": setting.where.name,
        "mesh": setting.config.mesh.model_dump(),
        "microbatch_rows": setting.config.train.microbatch_rows,
        "remat": setting.config.train.remat,
        "projected": True,
        "fits": plan.fits,
        "failures": plan.failures,
        "memory_bytes": chip.memory_bytes,
        "peak_bytes": plan.peak.total if plan.phases else 0,
        "peak_phase": plan.peak.name if plan.phases else "",
        "phases": {phase.name: dict(phase.held) for phase in plan.phases},
        "slots": plan.slots,
        "pool_tokens": plan.pool_tokens,
        "mean_tokens": setting.mean_tokens,
        "micro_batches": setting.micro_batches,
        "step": step_seconds(plan),
        "programs": {},
    }
    for name, estimate in estimates.items():
        out["programs"][name] = {
            "flops": estimate.work.flops,
            "bytes": estimate.work.bytes,
            "roofline_s": estimate.roofline_s,
            "compute_s": estimate.compute_s,
            "collectives_s": estimate.traffic.seconds,
            "ici_bytes": estimate.traffic.link_bytes,
            "dcn_bytes": estimate.traffic.network_bytes,
            "collectives": dict(estimate.traffic.kinds),
            "exposed_s": estimate.exposed_s,
            "hidden_s": estimate.hidden_s,
        }
    for name, of in (("causal", "accumulate"), ("packed", "packed")):
        for hidden in (False, True):
            key = f"mfu_{name}_{'hidden' if hidden else 'exposed'}"
            out[key] = mfu(setting, estimates[of], hidden=hidden) if of in estimates else None
    for hidden in (False, True):
        key = f"mfu_full_{'hidden' if hidden else 'exposed'}"
        out[key] = (
            mfu(setting, estimates["accumulate"], hidden=hidden, full=True)
            if "accumulate" in estimates
            else None
        )
    if "accumulate" in estimates:
        rows = setting.config.train
        tokens = rows.row_tokens * rows.microbatch_rows
        out["train_tokens_per_s_per_chip"] = (
            tokens / estimates["accumulate"].exposed_s / setting.where.chips
        )
    for name, step in (("decode", plan.decode), ("decode_full", plan.full)):
        if step:
            groups = setting.where.devices / setting.engine.tensor
            out[name] = {
                "rows_per_device": step.rows,
                "live_tokens": step.live_tokens,
                "step_s": step.step_s,
                "roofline_s": step.roofline_s,
                "share_of_roofline": step.share,
                "moved_bytes": step.moved_bytes,
                "needed_bytes": step.work.bytes,
                "flops": step.work.flops,
                "tokens_per_s_per_chip": step.rows * groups / step.step_s / setting.where.chips,
            }
    return out


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / GIB:.2f} GiB"
