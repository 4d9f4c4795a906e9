"""Supervised fine-tuning: `python -m vibejax.sft CONFIG [--set key=value ...]`.

Each step packs some demonstrations into rows and takes one optimizer step on what the assistant
says in them, the mean over all learnt tokens of the step. Which documents a step holds is a
function of (seed, step), so a resumed run goes on as if it had not stopped. The result is an HF
folder, `final` in the run folder; `exports` holds those that were asked for on the way.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vibejax import (
    data,
    digests,
    distributed,
    goodput,
    memory_plan,
    meshes,
    optimizer,
    packing,
    preemption,
    programs,
    qwen2,
    run_folder,
    sharding,
    tokenizer,
    train,
    train_shapes,
    watchdog,
    weights,
)
from vibejax.checkpoint import Checkpoints
from vibejax.config.sft import SftConfig
from vibejax.config_file import errors_in_one_line, parse_args
from vibejax.data import Demonstration, Demonstrations
from vibejax.locations import resolve
from vibejax.losses.logprobs import TokenLogprobs
from vibejax.losses.nll import nll_loss
from vibejax.metrics import Metrics
from vibejax.packing import Document
from vibejax.profiling import Profile
from vibejax.qwen2 import ModelConfig, Params
from vibejax.rope import Rope
from vibejax.run_folder import RunError
from vibejax.tokenizer import Tokenizer
from vibejax.train import TrainState

COLUMNS = {
    "epoch": ("sft/epoch", ".2f"),
    "loss": ("loss", ".4f"),
    "grad norm": ("optimizer/grad_norm", ".3f"),
    "rate": ("optimizer/learning_rate", ".1e"),
    "tokens": ("sft/tokens", "d"),
    "fill": ("sft/fill", ".3f"),
    "tokens/s": ("time/tokens_per_s", ".0f"),
    "held-out": ("heldout/loss", ".4f"),
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """What stays the same over a run.

    Attributes:
        source: the checkpoint, or the folder of the tokenizer.
        tokenizer: its digest.
        steps: optimizer steps of the whole run.
        total: documents of the whole run, those of each pass counted anew.
        eos_ids: at which the trained policy stops; empty: those of `source`.
    """

    config: SftConfig
    source: Path
    tokenizer: str
    model: ModelConfig
    mesh: jax.sharding.Mesh
    documents: list[Demonstration]
    heldout: list[Document]
    steps: int
    total: int
    eos_ids: tuple[int, ...]


def main() -> None:
    """Runs the stage that the command line configures."""
    config = parse_args(SftConfig, doc=__doc__)
    with preemption.handled(), errors_in_one_line(OSError), distributed.joined(config):
        run(config)


def run(config: SftConfig) -> Path:
    """Trains, and returns the run folder.

    Raises:
        InputError: something the user gave cannot be used, or the run cannot go on.
    """
    began = time.perf_counter()
    run_folder.check_run(config)
    goodput.start()
    programs.prepare(deterministic=config.deterministic)
    setup = set_up(config)
    folder = run_folder.open_run(config, "sft")
    kept, place = config.checkpoint, run_folder.checkpoints(config, folder)
    with (
        run_folder.kept(config, folder) as keep,
        watchdog.watching(config.watchdog_s),
        distributed.log_file(folder),
        jax.set_mesh(setup.mesh),
        contextlib.closing(
            Checkpoints(place, keep=kept.keep, keep_every=kept.keep_every)
        ) as checkpoints,
    ):
        adamw = optimizer.make_optimizer(config.optimizer, setup.steps)
        schedule = optimizer.make_schedule(config.optimizer, setup.steps)
        loss_fn = make_loss(setup.model, config)
        step_of = train.make_train_step(
            loss_fn, adamw, schedule, setup.model, setup.mesh, ("loss",)
        )
        score = jax.jit(
            lambda params, rows: _logprobs(params, rows, setup.model, config),
            out_shardings=sharding.replicated(setup.mesh),
        )
        params = _params(setup)
        run_folder.require_same_data(
            config, folder, "data", "heldout", tokenizer=setup.tokenizer,
            policy=digests.of_tree(params),
        )  # fmt: skip
        state = train.init_state(params, adamw)
        if config.resume:
            state = checkpoints.restore_latest(state)
        done = int(state.step)
        metrics = Metrics(folder, done, COLUMNS)
        profile = Profile(folder / "profile", config.profile.steps)
        distributed.announce(memory_plan.trainer_line(state, setup.mesh.local_devices[0]))
        traces = _traces(setup, step_of, adamw, score)
        programs.compile_ahead(programs.lowerings(traces, setup.mesh))
        if done == 0 and setup.heldout:
            metrics.write(0, heldout_loss(setup, state.params, score))
        for step in range(done + 1, setup.steps + 1):
            start = time.perf_counter()
            profile.begin(step)
            batch = step_documents(setup, step)
            with goodput.phase("train"):
                sums, _ = train.sum_documents(
                    step_of, state.params, batch, config.train, setup.mesh
                )
                state, values = step_of.apply(state, sums)
                values = jax.device_get(values)  # waits for the devices
            if not values["optimizer/finite"]:
                checkpoints.save(step - 1, state)
                raise RunError(
                    f"step {step}: the loss or the gradient is not finite; the state after step "
                    f"{step - 1} is saved in {checkpoints.folder}"
                )
            row = {name: float(value) for name, value in values.items()}
            row |= _counts(setup, batch, step)
            row["time/tokens_per_s"] = row["sft/tokens"] / (time.perf_counter() - start)
            last = step == setup.steps
            if setup.heldout and (last or (config.eval.every and step % config.eval.every == 0)):
                row |= heldout_loss(setup, state.params, score)
            metrics.write(step, row | goodput.shares())
            if config.export_every and (last or step % config.export_every == 0):
                _export(setup, state, folder / "exports" / f"step-{step:06d}")
            if last or step % config.checkpoint.every == 0:
                metrics.log.sync()
                with goodput.phase("save"):
                    keep()
                checkpoints.save(step, state)
        for file in (metrics, checkpoints, profile):
            file.close()
        _export(setup, state, folder / "final")
    _announce_summary(metrics.log.rows, time.perf_counter() - began)
    return folder


def set_up(config: SftConfig) -> Setup:
    """Reads what the run starts from, short of its weights.

    Raises:
        InputError: checkpoint, data or mesh cannot be used.
    """
    source = weights.locate(config.policy) if config.policy else resolve(config.tokenizer)
    tokens = tokenizer.load(source)
    model = weights.load_config(source) if config.policy else _new_model(config, tokens.vocab)
    if config.policy:
        weights.require_tensors(source, model)
    if config.context:
        model = dataclasses.replace(model, context=config.context)
    mesh = meshes.make(config.mesh, [model], config.train)
    meshes.require_attention(config.attention.implementation, "attention.implementation")
    read = _read(config, config.data, tokens, model)
    heldout = _read(config, config.heldout, tokens, model).documents if config.heldout else []
    count = len(read.documents)
    total = (
        round(config.epochs * count) if config.epochs else config.steps * config.documents_per_step
    )
    if not total:
        raise RunError(
            f"epochs = {config.epochs} of {count} documents: there is none to learn from"
        )
    new_ends = sorted(read.ends - {*tokens.eos_ids})
    if new_ends:
        names = ", ".join(repr(tokens.backend.id_to_token(i)) for i in new_ends)
        distributed.announce(
            f"the trained policy stops at {names} too: the documents' turns end with it"
        )
    return Setup(
        config=config,
        source=source,
        tokenizer=tokens.digest,
        model=model,
        mesh=mesh,
        documents=read.documents,
        heldout=[Document(tokens=d.tokens, weights=np.float32(d.learnt)) for d in heldout],
        steps=math.ceil(total / config.documents_per_step),
        total=total,
        eos_ids=(*new_ends, *tokens.eos_ids) if new_ends else (),
    )


def _new_model(config: SftConfig, vocab: int) -> ModelConfig:
    sizes = config.model.model_dump()
    rope = Rope(theta=sizes.pop("rope_theta"))
    return ModelConfig(**sizes, rope=rope, vocab=vocab)


def _read(config: SftConfig, name: str, tokens: Tokenizer, model: ModelConfig) -> Demonstrations:
    """The documents of a file; says what they are."""
    limits = {"train.row_tokens": config.train.row_tokens, "context": model.context}
    limited_by = min(limits, key=limits.__getitem__)
    path = resolve(name)
    read = data.read_demonstrations(
        path,
        tokens,
        vocab=model.vocab,
        max_tokens=limits[limited_by],
        limited_by=limited_by,
        longer=config.long_documents,
    )
    tokens_read = sum(len(d.tokens) for d in read.documents)
    learnt = sum(int(d.learnt.sum()) for d in read.documents)
    line = f"{path}: {len(read.documents)} documents of {tokens_read} tokens, {learnt} learnt"
    if read.dropped or read.truncated:
        line += (
            f"; longer than {limited_by} = {limits[limited_by]}: {read.dropped} left out, "
            f"{read.truncated} cut"
        )
    distributed.announce(line)
    return read


def _params(setup: Setup) -> Params:
    model, mesh = setup.model, setup.mesh
    if setup.config.policy:
        return weights.load_params(setup.source, model, mesh, jnp.float32)
    create = jax.jit(
        lambda key: qwen2.init_params(model, key), out_shardings=qwen2.param_shardings(model, mesh)
    )
    return create(jax.random.key(setup.config.seed))


def step_documents(setup: Setup, step: int) -> list[Document]:
    """The documents of a step (from 1), each learnt token of equal weight; a function of the step.

    The last step of a whole number of epochs may hold fewer, so that none is seen once more.
    """
    config = setup.config
    per_step, before = config.documents_per_step, (step - 1) * config.documents_per_step
    indices = data.step_indices(len(setup.documents), config.seed, step - 1, per_step)
    chosen = [setup.documents[i] for i in indices[: setup.total - before]]
    learnt = sum(int(d.learnt.sum()) for d in chosen)
    return [Document(tokens=d.tokens, weights=np.float32(d.learnt) / learnt) for d in chosen]


def _traces(setup: Setup, step: train.TrainStep, adamw, score) -> dict[str, train_shapes.Trace]:
    """The programs of a step, to be compiled before the first."""
    config, model, mesh = setup.config.train, setup.model, setup.mesh
    found = train_shapes.train_step(step, adamw, config, model, mesh, ("loss",), ["weight"])
    if setup.heldout:
        params = train.abstract_params(model, mesh)
        rows = train_shapes.rows(config, mesh, ["weight"])
        found["score"] = train_shapes.traced(mesh, score, params, rows)
    return found


def make_loss(model: ModelConfig, config: SftConfig) -> train.LossFn:
    """The loss of packed rows: the sum over tokens that the documents' weights say."""

    def terms(logprobs: TokenLogprobs, rows: train.Batch):
        return nll_loss(logprobs.logprob_BT, rows["weight"])

    def loss_fn(params: Params, rows: train.Batch):
        return train.row_loss(
            terms, params, rows, model, config.train,
            implementation=config.attention.implementation,
        )  # fmt: skip

    return loss_fn


def _logprobs(params: Params, rows: train.Batch, model: ModelConfig, config: SftConfig):
    return train.row_logprobs(
        params, rows, model, config.train, implementation=config.attention.implementation
    ).logprob_BT


def heldout_loss(
    setup: Setup, params: Params, score: Callable[[Params, train.Batch], jax.Array]
) -> dict[str, float]:
    """The mean over all learnt tokens of the held-out documents, in nats."""
    values = train.score_documents(score, params, setup.heldout, setup.config.train, setup.mesh)
    learnt = sum(int(d.weights.sum()) for d in setup.heldout)
    return {"heldout/loss": -sum(float(v.sum(dtype=np.float64)) for v in values) / learnt}


def _counts(setup: Setup, batch: list[Document], step: int) -> dict[str, Any]:
    """What a step's rows held."""
    config, lengths = setup.config, [len(d.tokens) for d in batch]
    seen = min(step * config.documents_per_step, setup.total)
    return {
        "sft/epoch": seen / len(setup.documents),
        "sft/documents": len(batch),
        "sft/tokens": sum(lengths),
        "sft/learnt_tokens": sum(int(np.count_nonzero(d.weights)) for d in batch),
        "sft/fill": packing.fill(lengths, config.train.row_tokens, config.train.microbatch_rows),
    }


def _export(setup: Setup, state: TrainState, folder: Path) -> None:
    weights.save_params(
        state.params,
        setup.model,
        folder,
        dtype=setup.config.export_dtype,
        source=setup.source,
        eos_ids=setup.eos_ids,
    )


def _announce_summary(rows: list[dict[str, Any]], seconds: float) -> None:
    fills = [row["sft/fill"] for row in rows if "sft/fill" in row]
    losses = [row["heldout/loss"] for row in rows if "heldout/loss" in row]
    distributed.announce(
        f"{len(fills)} steps in {seconds:.0f} s, rows filled to {np.mean(fills):.3f}"
    )
    if losses:
        distributed.announce(f"held-out loss: {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
