"""What stays the same over an RL run: its policy, its devices, its engine and its programs."""

import dataclasses

import jax

from vibejax import (
    distributed,
    handover,
    memory_plan,
    meshes,
    policy,
    policy_programs,
    programs,
    rl_shapes,
    rollout,
    sampler_copy,
    weights,
)
from vibejax.completions import EngineConfig
from vibejax.config.rl import RlConfig
from vibejax.engine import Engine
from vibejax.journal import Journal
from vibejax.policy import Policy
from vibejax.policy_programs import Programs
from vibejax.qwen2 import ModelConfig


@dataclasses.dataclass(frozen=True)
class Setup:
    """What the parts of a step share.

    Attributes:
        config: of the run.
        policy: the checkpoint that it starts from.
        mesh: of the trainer.
        engine: of this process.
        programs: of the trainer.
        journal: of what is sampled, in the run's folder.
    """

    config: RlConfig
    policy: Policy
    mesh: jax.sharding.Mesh
    engine: Engine
    programs: Programs
    journal: Journal | None = None


def set_up(config: RlConfig) -> Setup:
    """Reads what the run starts from, short of its weights, and prepares its programs.

    Raises:
        InputError: the checkpoint cannot be used, the completions do not fit its context, or
            something does not divide over the mesh.
    """
    opened = policy.open_policy(config.policy, config.rollout)
    model = opened.model
    weights.require_tensors(opened.path, model)
    mesh = meshes.make(config.mesh, [model], config.train)
    meshes.require_attention(config.attention.implementation, "attention.implementation")
    limit = memory_plan.device_bytes(mesh.local_devices[0])
    engine = Engine(
        sampler_copy.shapes(model, config.train.dtype),
        engine_config(config, model, mesh, limit),
        mesh.local_devices,
    )
    distributed.announce(engine.memory)
    return Setup(config, opened, mesh, engine, policy_programs.make(config, model, mesh))


def engine_config(
    config: RlConfig, model: ModelConfig, mesh: jax.sharding.Mesh, device_bytes: int
) -> EngineConfig:
    """The engine of a run.

    Of a device's bytes it may have what the trainer's state leaves, and the scoring by which a
    hand-over is checked while there are pages.
    """
    copies = memory_plan.float32_copies(updating=False, reference=bool(config.objective.kl))
    tokens = handover.short_rows(config).row_tokens // config.mesh.context
    taken = (
        copies * memory_plan.sharded_bytes(model, mesh)
        + memory_plan.scoring_bytes(model, tokens)
        + int(memory_plan.SPARE_SHARE * device_bytes)
    )
    return dataclasses.replace(
        rollout.engine_config(config.rollout, model), memory_bytes=max(1, device_bytes - taken)
    )


def lowerings(setup: Setup) -> dict[str, programs.Lowering]:
    """The programs that each step runs, to be compiled before the first.

    Of the engine's only those that read pages in place: from copies, windows are as long as what
    they hold.
    """
    config, model = setup.config, setup.policy.model
    traces = rl_shapes.trainer(setup.programs, config, model, setup.mesh)
    found = programs.lowerings(traces, setup.mesh)
    if not setup.engine.has_copies:
        how = rollout.draws(config.rollout, setup.policy.tokenizer.eos_ids)
        found |= programs.lowerings(rl_shapes.sampler(setup.engine, how), setup.engine.mesh)
    return found
