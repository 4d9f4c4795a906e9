"""From a run's configuration and a slice to what is compiled, and from such a job to its program.

Two meshes: the trainer's, over the whole slice, and the engine's, over the devices of one host.
"""

from pathlib import Path
from typing import Any

import jax

from vibejax import (
    checkpoint_config,
    policy_programs,
    rl_setup,
    rl_shapes,
    rollout,
    sampler_copy,
    sharding,
)
from vibejax.config.rl import RlConfig
from vibejax.engine import Engine
from vibejax.planning import slices
from vibejax.planning.compiling import Job
from vibejax.planning.slices import Slice
from vibejax.qwen2 import ModelConfig
from vibejax.safetensors_folder import read_json

SAMPLER = ("fill", "window")


def of_run(config: RlConfig, settings: dict[str, Any], where: Slice) -> list[Job]:
    """All programs of a run.

    Args:
        config: the run's.
        settings: its policy's config.json.
        where: the slice.
    """
    names = ["accumulate", "apply", "canary", "hand_over", *SAMPLER]
    if config.objective.updates > 1 or config.objective.kl:
        names.append("score")
    table = config.model_dump()
    return [Job(name, where.name, table, settings) for name in names]


def read_settings(folder: Path) -> dict[str, Any]:
    """The config.json of a policy: a folder that has it, or the file itself.

    Raises:
        CheckpointError: it cannot be read, or is of another kind of model.
    """
    path = folder / "config.json" if folder.is_dir() else folder
    settings = read_json(path)
    checkpoint_config.from_hf(settings, path)
    return dict(settings)


def model_of(settings: dict[str, Any]) -> ModelConfig:
    """The model of a config.json."""
    return checkpoint_config.from_hf(settings, Path("config.json"))


def meshes(config: RlConfig, where: Slice) -> tuple[jax.sharding.Mesh, list[Any]]:
    """The trainer's mesh, and the devices of one host.

    Raises:
        SliceError: the mesh does not fit.
    """
    sizes = config.mesh.model_dump()
    slices.check_mesh(where, sizes)
    # Of a host's devices in a larger slice the compiler refuses collectives.
    return sharding.make_mesh(sizes, where.topology().devices), where.host.topology().devices


def engine_of(
    config: RlConfig, model: ModelConfig, where: Slice, mesh: jax.sharding.Mesh, host: list[Any]
) -> Engine:
    """A host's engine, planned but empty.

    Raises:
        EngineError: its plan does not fit.
    """
    return Engine(
        sampler_copy.shapes(model, config.train.dtype),
        rl_setup.engine_config(config, model, mesh, where.chip.memory_bytes),
        host,
    )


def trace(job: Job) -> tuple[jax.stages.Traced, jax.sharding.Mesh]:
    """A job's program, traced, and the mesh that it runs on."""
    config, where = RlConfig.model_validate(job.config), slices.find(job.slice)
    model = model_of(job.model)
    mesh, host = meshes(config, where)
    if job.program not in SAMPLER:
        run = policy_programs.make(config, model, mesh)
        return rl_shapes.trainer(run, config, model, mesh)[job.program](), mesh
    engine = engine_of(config, model, where, mesh, host)
    how = rollout.draws(config.rollout, (model.vocab - 1,))
    return rl_shapes.sampler(engine, how)[job.program](), engine.mesh
