"""Supervised fine-tuning: `python -m vibejax.sft CONFIG [--set key=value ...]`.

Each step packs some demonstrations into rows and takes one optimizer step on the tokens of their
completions, each step's mean over tokens. The result is an HF folder, `final` in the run folder.
"""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vibejax import data, optimizer, qwen2, run_folder, sharding, tokenizer, train, weights
from vibejax.checkpoint import Checkpoints
from vibejax.config import SftConfig
from vibejax.config_file import errors_in_one_line, parse_args
from vibejax.locations import resolve
from vibejax.losses.nll import nll_loss
from vibejax.metrics import Metrics
from vibejax.packing import Document
from vibejax.rope import Rope
from vibejax.run_folder import RunError

COLUMNS = {
    "loss": ("loss", ".4f"),
    "grad norm": ("optimizer/grad_norm", ".3f"),
    "tokens": ("sft/tokens", "d"),
    "tokens/s": ("time/tokens_per_s", ".0f"),
}


def main() -> None:
    """Runs the stage that the command line configures."""
    config = parse_args(SftConfig, doc=__doc__)
    with errors_in_one_line():
        run(config)


def run(config: SftConfig) -> Path:
    """Trains, and returns the run folder."""
    source = weights.locate(config.policy) if config.policy else resolve(config.tokenizer)
    tokens = tokenizer.load(source)
    model = weights.load_config(source) if config.policy else _model(config, tokens.vocab)
    documents = _documents(config, tokens)
    try:
        mesh = sharding.make_mesh(config.mesh.model_dump())
        qwen2.param_shardings(model, mesh)
        sharding.context_chunk(config.train.row_tokens, config.mesh.context)
    except ValueError as error:
        raise RunError(f"mesh: {error}") from None
    folder = run_folder.open_run(config, "sft")
    with jax.set_mesh(mesh):
        adamw = optimizer.make_optimizer(config.optimizer, config.steps)
        schedule = optimizer.make_schedule(config.optimizer, config.steps)
        step = train.make_train_step(_loss(model, config), adamw, schedule, model, mesh, ("loss",))
        state = train.init_state(_params(config, source, model, mesh), adamw)
        checkpoints = Checkpoints(folder / "checkpoints", keep=config.checkpoint.keep)
        if config.resume:
            state = checkpoints.restore_latest(state)
        metrics = Metrics(folder, int(state.step), COLUMNS)
        for done in range(int(state.step), config.steps):
            start = time.perf_counter()
            batch = _batch(documents, config, done)
            sums, _ = train.sum_documents(step, state.params, batch, config.train, mesh)
            state, values = step.apply(state, sums)
            if not values["optimizer/finite"]:
                checkpoints.save(done, state)
                checkpoints.close()
                raise RunError(
                    f"step {done + 1}: the loss or the gradient is not finite; the state after "
                    f"step {done} is saved in {folder / 'checkpoints'}"
                )
            count = sum(len(d.tokens) for d in batch)
            rate = count / (time.perf_counter() - start)
            row = {name: float(value) for name, value in values.items()}
            metrics.write(done + 1, {**row, "sft/tokens": count, "time/tokens_per_s": rate})
            if (done + 1) % config.checkpoint.every == 0 or done + 1 == config.steps:
                checkpoints.save(done + 1, state)
        metrics.close()
        checkpoints.close()
        weights.save_params(
            state.params, model, folder / "final", dtype=config.export_dtype, source=source
        )
    return folder


def _model(config: SftConfig, vocab: int) -> qwen2.ModelConfig:
    sizes = config.model.model_dump()
    rope = Rope(theta=sizes.pop("rope_theta"))
    return qwen2.ModelConfig(**sizes, rope=rope, vocab=vocab)


def _params(config: SftConfig, source: Path, model: qwen2.ModelConfig, mesh) -> qwen2.Params:
    if config.policy:
        return weights.load_params(source, model, mesh, jnp.float32)
    create = jax.jit(
        lambda key: qwen2.init_params(model, key), out_shardings=qwen2.param_shardings(model, mesh)
    )
    return create(jax.random.key(config.seed))


def _documents(config: SftConfig, tokens: tokenizer.Tokenizer) -> list[tuple[np.ndarray, int]]:
    path = resolve(config.data)
    documents = []
    for number, record in data.read_records(path):
        document, prompt = data.learning_document(record, tokens, f"{path}:{number}")
        if len(document) > config.train.row_tokens:
            raise data.DataError(
                f"{path}:{number}: has {len(document)} tokens, more than train.row_tokens = "
                f"{config.train.row_tokens}"
            )
        documents.append((document, prompt))
    return documents


def _batch(documents, config: SftConfig, step: int) -> list[Document]:
    """The documents of one step, each learnt token of equal weight."""
    count = config.documents_per_step
    chosen = [documents[i] for i in data.step_indices(len(documents), config.seed, step, count)]
    learnt = sum(len(tokens) - prompt for tokens, prompt in chosen)
    return [
        Document(
            tokens=tokens, weights=(np.arange(len(tokens)) >= prompt).astype(np.float32) / learnt
        )
        for tokens, prompt in chosen
    ]


def _loss(model: qwen2.ModelConfig, config: SftConfig):
    def loss_fn(params, rows):
        implementation = config.attention.implementation
        logprob_BT = train.row_logprobs(
            params, rows, model, config.train, implementation=implementation
        ).logprob_BT
        loss, metrics = nll_loss(logprob_BT, rows["weight"])
        return loss, (metrics, logprob_BT)

    return loss_fn


if __name__ == "__main__":
    main()
