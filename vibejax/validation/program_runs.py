"""The programs of a run on random weights: a decode window and a train micro-batch.

Each is the program that `vibejax.planning` compiles for a plan, so that what it projects stands
beside what was measured.

Shape suffixes: as in decode.py and train.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vibejax import (
    batching,
    decode,
    memory_plan,
    packing,
    policy_programs,
    qwen2,
    rl_shapes,
    sampler_copy,
    sharding,
    train,
)
from vibejax.completions import EngineConfig, EngineError, Request
from vibejax.config.rl import RlConfig
from vibejax.decode import Sampling
from vibejax.engine import Engine
from vibejax.packing import Document
from vibejax.planning import compiling, projection, work
from vibejax.planning.slices import Slice
from vibejax.qwen2 import ModelConfig
from vibejax.validation.checks import Found, Timing, timed
from vibejax.validation.machine import Machine
from vibejax.validation.sizes import Sizes

LAYERS = (36, 24, 12, 6, 3, 2, 1)
TRAINER_SHARE = 0.7  # of a device's memory, for parameters and gradients; the rest is activations
GRADIENTS = 3  # arrays of all parameters: they, the sums, and a micro-batch's own
AGREEMENT = {"float32": 1e-3, "bfloat16": 0.05}
"""Nats: mean difference between the log-probs of engine and trainer that counts as none."""


class Program(NamedTuple):
    """A program of a run, not compiled yet.

    Attributes:
        traced: it.
        mesh: that it runs on.
        work: of a device, by its definition; of the window, of one step.
        project: (what came out of the compile, the devices as a slice) -> projected seconds of a
            call.
    """

    traced: jax.stages.Traced
    mesh: jax.sharding.Mesh
    work: work.Work
    project: Callable[[compiling.Compiled, Slice], float]


# Decoding


def engine(devices, sizes: Sizes, limit_bytes: int) -> Engine:
    """An engine with as many layers as fit, empty; its weights come later.

    Raises:
        EngineError: not even one layer fits.
    """
    for layers in LAYERS:
        model = dataclasses.replace(sizes.model, layers=min(layers, sizes.model.layers))
        config = EngineConfig(
            model=model, slots=sizes.slots * len(devices), context=sizes.context,
            window=sizes.window, page_tokens=sizes.page_tokens,
            pool_tokens=sizes.slots * len(devices) * sizes.context,
            chunk_tokens=sizes.chunk_tokens, memory_bytes=int(0.9 * limit_bytes),
        )  # fmt: skip
        try:
            return Engine(sampler_copy.shapes(model, sizes.dtype), config, devices)
        except EngineError as error:
            reason = error
    raise reason


def window_program(engine: Engine) -> Program:
    """The decode window with all slots at work, half of their tokens cached."""
    config = engine.config
    parts = sharding.ways(engine.mesh, "batch")
    rows = config.slots // parts
    live = rows * (engine.context // 2)

    def project(compiled: compiling.Compiled, where: Slice) -> float:
        step = projection.decode(
            compiled, config, engine.memory, where, rows=rows, live_tokens=live
        )
        return step.step_s * config.window

    traced = rl_shapes.sampler(engine, Sampling())["window"]()
    done = work.decode_step(config, engine.memory, rows, live)
    return Program(traced, engine.mesh, done, project)


def random_weights(engine: Engine, sizes: Sizes) -> qwen2.Params:
    """The sampler's parameters, made where they are to lie.

    One program a shape: of all parameters in one, XLA for GPUs compiles for minutes.
    """
    model = engine.config.model

    @functools.cache
    def drawing(shape: jax.ShapeDtypeStruct) -> Callable[[jax.Array], jax.Array]:
        def draw(key: jax.Array) -> jax.Array:
            return model.init_std * jax.random.normal(key, shape.shape, shape.dtype)

        return jax.jit(draw, out_shardings=shape.sharding)

    leaves, tree = jax.tree.flatten(sampler_copy.shapes(model, sizes.dtype, engine.mesh))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(tree, [drawing(x)(k) for x, k in zip(leaves, keys, strict=True)])


def window_rows(engine: Engine) -> decode.Rows:
    """What decodes: each row has half of its context cached, in pages of its own."""
    config, parts = engine.config, sharding.ways(engine.mesh, "batch")
    rows, entries = config.slots // parts, -(-engine.context // config.page_tokens)
    group = batching.group_of(rows)
    slots = config.slots
    table = np.arange(rows * entries, dtype=np.int32).reshape(rows, entries)
    full = lambda value, dtype=np.int32: np.full(slots, value, dtype)  # noqa: E731
    return decode.Rows(
        full(1), full(engine.context // 2 - config.window // 2), full(0), full(engine.context),
        np.arange(slots, dtype=np.uint32), full(0, np.uint32), np.tile(table, (parts, 1)),
        np.zeros(slots // group, np.int32), full(False, bool),
    )  # fmt: skip


def decode_window(machine: Machine, sizes: Sizes) -> Found:
    """Steps of all slots: tokens a second, share of the roofline, and of what is projected."""
    empty = engine(machine.devices, sizes, memory_plan.device_bytes(machine.devices[0]))
    config, program = empty.config, window_program(empty)
    compiled = program.traced.lower().compile()
    params, rows = random_weights(empty, sizes), window_rows(empty)
    parts = sharding.ways(empty.mesh, "batch")
    with jax.set_mesh(empty.mesh):
        held = decode.empty_pools(
            config.model, parts * empty.memory.pages, config.page_tokens, empty.kv_dtype
        )

    drawn: decode.Drawn | None = None

    def call() -> decode.Drawn:
        nonlocal held, drawn
        held, _, drawn = compiled(params, held, None, rows, np.uint32(0), np.uint32(0))
        return drawn

    time = timed(call, sizes.repeats)
    found = _measured(program, compiled, time, machine, config.slots * config.window)
    step = time.median_s / config.window
    right = bool(np.isfinite(drawn.logprob_BW).all() and (drawn.count_B == config.window).all())
    said = f"{config.model.layers} layers, {config.slots} rows: step {1e3 * step:.2f} ms, "
    if "work" in found:
        share = found["work"]["bytes"] / machine.where.chip.bandwidth / step
        found["share_of_roofline"] = share
        said += f"{share:.0%} of the bandwidth roofline, "
    figures = found | {"layers": config.model.layers, "rows": config.slots, "step_s": step}
    return Found(said + _said(found), figures, right)


# Training


def train_config(devices: int, sizes: Sizes) -> RlConfig:
    """A run whose rows lie one on each device, parameters cut over all."""
    return RlConfig.model_validate(
        {
            "policy": "random", "prompts": "none", "mesh": {"fsdp": devices},
            "rollout": {"max_prompt_tokens": 1, "max_completion_tokens": sizes.row_tokens - 1},
            "train": {
                "row_tokens": sizes.row_tokens, "microbatch_rows": devices,
                "remat": "attention", "dtype": sizes.dtype,
            },
        }
    )  # fmt: skip


def train_model(mesh: jax.sharding.Mesh, sizes: Sizes, limit_bytes: int) -> ModelConfig:
    """The model with as many layers as fit, at least one."""
    for layers in LAYERS:
        model = dataclasses.replace(sizes.model, layers=min(layers, sizes.model.layers))
        taken = GRADIENTS * memory_plan.sharded_bytes(model, mesh)
        if taken <= TRAINER_SHARE * limit_bytes:
            break
    return model


def train_program(devices, sizes: Sizes, limit_bytes: int) -> tuple[Program, RlConfig, ModelConfig]:
    """The gradients of a micro-batch, a row a device, each one document."""
    config = train_config(len(devices), sizes)
    mesh = sharding.make_mesh(config.mesh.model_dump(), devices)
    model = train_model(mesh, sizes, limit_bytes)

    lengths = (sizes.row_tokens,)
    done = work.accumulate(config, model, mesh, lengths)

    def project(compiled: compiling.Compiled, where: Slice) -> float:
        kernel_s = projection.kernel_seconds("accumulate", config, model, mesh, where, lengths)
        estimate = projection.estimate("accumulate", compiled, done, where, kernel_s=kernel_s)
        return estimate.exposed_s

    run = policy_programs.make(config, model, mesh)
    traced = rl_shapes.trainer(run, config, model, mesh)["accumulate"]()
    return Program(traced, mesh, done, project), config, model


def train_rows(config: RlConfig, model: ModelConfig) -> dict[str, np.ndarray]:
    """Rows of one random document each."""
    random, tokens = np.random.default_rng(0), config.train.row_tokens
    count = config.train.microbatch_rows
    ones = np.ones(tokens, np.float32)
    documents = [
        Document(
            tokens=random.integers(0, model.vocab, tokens).astype(np.int32),
            weights=ones / tokens,
            channels={"advantage": ones, "sampler_logprob": -np.log(model.vocab) * ones},
        )
        for _ in range(count)
    ]
    return packing.pack(documents, [[b] for b in range(count)], tokens)


def micro_batch(machine: Machine, sizes: Sizes) -> Found:
    """A train micro-batch: MFU, projection against measurement."""
    limit = memory_plan.device_bytes(machine.devices[0])
    program, config, model = train_program(machine.devices, sizes, limit)
    compiled = program.traced.lower().compile()
    shardings = qwen2.param_shardings(model, program.mesh)
    params = jax.jit(qwen2.init_params, static_argnums=0, out_shardings=shardings)(
        model, jax.random.key(0)
    )
    sums = policy_programs.make(config, model, program.mesh).train_step.zeros()
    batch = train.place(train_rows(config, model), program.mesh)

    def call() -> jax.Array:
        nonlocal sums
        sums, _ = compiled(params, sums, batch)
        return sums.loss

    time = timed(call, sizes.repeats)
    tokens = config.train.microbatch_rows * config.train.row_tokens
    found = _measured(program, compiled, time, machine, tokens)
    norm = float(jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(sums.grads))))
    right = bool(np.isfinite(norm) and norm > 0 and np.isfinite(sums.loss))
    said = (
        f"{model.layers} layers, rows of {config.train.row_tokens}: {1e3 * time.median_s:.1f} ms, "
    )
    if "work" in found:
        mfu = found["work"]["useful_flops"] / machine.where.chip.flops / time.median_s
        found["mfu_causal"] = mfu
        said += f"MFU {mfu:.1%} (causal), "
    figures = found | {"layers": model.layers, "row_tokens": config.train.row_tokens}
    return Found(said + _said(found), figures, right)


def _measured(
    program: Program, compiled: Any, time: Timing, machine: Machine, tokens: int
) -> dict[str, Any]:
    """Figures of a program, with what is projected for it where peaks are known."""
    devices = program.mesh.size
    found: dict[str, Any] = {
        "seconds": time.median_s,
        "spread": time.spread,
        "tokens_per_s_per_device": tokens / time.median_s / devices,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }
    if machine.where is not None:
        found["work"] = program.work._asdict()
        try:
            described = compiling.described("", compiled, program.mesh)
            projected = program.project(described, machine.where)
        # A program of a form that planning, or jaxlib, does not read.
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            return found | {"not_projected": str(error).splitlines()[0]}
        ratio = time.median_s / projected
        found |= {"projected_s": projected, "measured_over_projected": ratio}
    return found


def _said(found: dict[str, Any]) -> str:
    said = (
        f"{found['tokens_per_s_per_device']:,.0f} tokens/s a device (spread {found['spread']:.0%})"
    )
    if "projected_s" in found:
        said += f", {found['measured_over_projected']:.2f} times as long as projected"
    if "not_projected" in found:
        said += f", not projected ({found['not_projected']})"
    return said


# Both


def agreement(machine: Machine, sizes: Sizes) -> Found:
    """Whether engine and trainer give tokens the same log-probs: two layers, one device."""
    model = dataclasses.replace(sizes.model, layers=min(2, sizes.model.layers))
    device, slots, tokens = machine.devices[:1], 8, min(64, sizes.context // 4)
    params = jax.jit(qwen2.init_params, static_argnums=0)(model, jax.random.key(1))
    mesh = sharding.make_mesh({}, device)
    params = jax.device_put(params, qwen2.param_shardings(model, mesh))
    config = EngineConfig(
        model=model, slots=slots, context=4 * tokens, window=sizes.window,
        page_tokens=min(sizes.page_tokens, 4 * tokens), chunk_tokens=sizes.chunk_tokens,
    )  # fmt: skip
    sampler = Engine(sampler_copy.make(params, model, sizes.dtype, mesh), config, device)
    random = np.random.default_rng(0)
    requests = [
        Request(n, tuple(random.integers(0, model.vocab, tokens + n).tolist()), tokens)
        for n in range(slots)
    ]
    completions = list(sampler.generate(requests, Sampling()))
    sampler.close()
    documents = []
    for completion in completions:
        prompt = requests[completion.request].tokens
        weights = np.r_[np.zeros(len(prompt)), np.ones(len(completion.tokens))]
        documents.append(
            Document(
                tokens=np.r_[prompt, completion.tokens].astype(np.int32),
                weights=weights.astype(np.float32),
            )
        )
    run = train_config(1, dataclasses.replace(sizes, row_tokens=4 * tokens))
    with jax.set_mesh(mesh):
        score = jax.jit(lambda params, rows: train.row_logprobs(params, rows, model, run.train)[0])
        scored = train.score_documents(score, params, documents, run.train, mesh)
    differences = [
        np.abs(own[-len(c.tokens) :] - c.logprobs)
        for own, c in zip(scored, completions, strict=True)
    ]
    mean, most = (float(f(np.concatenate(differences))) for f in (np.mean, np.max))
    limit = AGREEMENT[sizes.dtype]
    return Found(
        f"log-probs differ by {mean:.1e} nats on average (at most {limit:g}), {most:.1e} at most",
        {"mean": mean, "max": most, "limit": limit, "completions": len(completions)},
        right=len(completions) == slots and mean <= limit,
    )


def checks(machine: Machine, sizes: Sizes) -> Iterator[tuple[str, Callable[[], Found]]]:
    """All of these, by name."""
    yield "engine and trainer agree", lambda: agreement(machine, sizes)
    yield "decode window", lambda: decode_window(machine, sizes)
    yield "train micro-batch", lambda: micro_batch(machine, sizes)
