"""One optimizer step for any loss: gradients are summed over micro-batches, then applied.

The number of rows differs from step to step, so a step is some calls of `accumulate` and one of
`apply`, two programs of fixed shapes. Losses are sums whose weights were fixed for the whole
batch, so gradients add up and no split changes them.

Shape suffixes: B rows of a micro-batch, T tokens of a row.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from vibejax import packing, progress, qwen2, sharding
from vibejax.attention import Implementation
from vibejax.config.training import TrainConfig
from vibejax.losses.logprobs import TermsFn, TokenLogprobs, token_logprobs, token_loss
from vibejax.packing import Document
from vibejax.qwen2 import ModelConfig, Params

Batch = dict[str, jax.Array]
Place = Callable[[dict[str, np.ndarray], Mesh], Batch]  # rows from the hosts, laid out
Metrics = dict[str, jax.Array]
LossFn = Callable[[Params, Batch], tuple[jax.Array, tuple[Metrics, jax.Array]]]


@flax.struct.dataclass
class TrainState:
    """All that a checkpoint must hold to go on from a step."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState


class Sums(NamedTuple):
    """What micro-batches add up to: gradients, loss and metrics."""

    grads: Params
    loss: jax.Array
    metrics: Metrics


class TrainStep(NamedTuple):
    """The compiled programs of a stage.

    Attributes:
        zeros: () -> Sums of nothing.
        accumulate: (params, sums, batch) -> (sums, logprob_BT); sums are donated, and every
            process can read the log-probs.
        apply: (state, sums) -> (state, metrics); the state is donated. A loss or gradient that is
            not finite leaves the state as it was and says so in `optimizer/finite`.
    """

    zeros: Callable[[], Sums]
    accumulate: Callable[[Params, Sums, Batch], tuple[Sums, jax.Array]]
    apply: Callable[[TrainState, Sums], tuple[TrainState, Metrics]]


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: ModelConfig,
    mesh: Mesh,
    metric_names: tuple[str, ...],
) -> TrainStep:
    """Compiles (lazily) the programs of one stage.

    Args:
        loss_fn: (params, batch) -> (scalar sum, ({name: scalar sum}, [B, T] log-probs)).
        optimizer: applied once a step.
        schedule: the learning rate that `optimizer` uses, for the metrics.
        config: the model.
        mesh: the devices.
        metric_names: the names that `loss_fn` returns.
    """
    params = abstract_params(config, mesh)
    state_shardings = jax.tree.map(lambda x: x.sharding, abstract_state(params, optimizer))
    param_shardings, everywhere = state_shardings.params, sharding.replicated(mesh)
    sums_shardings = Sums(param_shardings, everywhere, dict.fromkeys(metric_names, everywhere))

    def zeros() -> Sums:
        grads = qwen2.map_table(lambda info: jnp.zeros(info.shape, jnp.float32), config)
        return Sums(grads, jnp.zeros(()), {name: jnp.zeros(()) for name in metric_names})

    def accumulate(params: Params, sums: Sums, batch: Batch) -> tuple[Sums, jax.Array]:
        # Each layer's gradient is added where the sums lie: there is no second tree of gradients.
        grads = jax.tree.map(jax.new_ref, sums.grads)
        loss, pullback, (metrics, logprob_BT) = jax.vjp(
            lambda params: loss_fn(params, batch), params, has_aux=True
        )
        pullback.with_refs(grads)(jnp.ones_like(loss))
        added = jax.tree.map(jnp.add, (sums.loss, sums.metrics), (loss, metrics))
        return Sums(jax.tree.map(jax.freeze, grads), *added), logprob_BT

    @jax.named_scope("optimizer")
    def apply(state: TrainState, sums: Sums) -> tuple[TrainState, Metrics]:
        norm = optax.tree.norm(sums.grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(sums.loss)
        updates, opt_state = optimizer.update(sums.grads, state.opt_state, state.params)
        updated = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
        return state, sums.metrics | {
            "optimizer/finite": finite,
            "optimizer/grad_norm": norm,
            "optimizer/learning_rate": jnp.asarray(schedule(state.step - 1), jnp.float32),
        }

    return TrainStep(
        zeros=jax.jit(zeros, out_shardings=sums_shardings),
        accumulate=jax.jit(
            accumulate, donate_argnums=1, out_shardings=(sums_shardings, everywhere)
        ),
        apply=jax.jit(apply, donate_argnums=0, out_shardings=(state_shardings, everywhere)),
    )


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before step 0; moments lie as their parameters do. `params` are donated."""
    out = jax.tree.map(lambda x: x.sharding, abstract_state(params, optimizer))
    init = lambda params: _first_state(params, optimizer)  # noqa: E731 - jit wants it bound
    return jax.jit(init, donate_argnums=0, out_shardings=out)(params)


def abstract_params(config: ModelConfig, mesh: Mesh) -> Params:
    """Shapes, dtypes and shardings of the parameters that are trained."""
    return qwen2.map_table(
        lambda info, s: jax.ShapeDtypeStruct(info.shape, jnp.float32, sharding=s),
        config,
        qwen2.param_shardings(config, mesh),
    )


def abstract_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, dtypes and shardings of a state, from arrays or shapes that have shardings."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    abstract = jax.eval_shape(lambda params: _first_state(params, optimizer), shapes)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    everywhere = sharding.replicated(jax.tree.leaves(shardings)[0].mesh)
    placed = TrainState(
        everywhere,
        shardings,
        optax.tree.map_params(
            optimizer,
            lambda _, s: s,
            abstract.opt_state,
            shardings,
            transform_non_params=lambda _: everywhere,
        ),
    )
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placed
    )


def _first_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def row_logprobs(
    params: Params,
    rows: Batch,
    model: ModelConfig,
    config: TrainConfig,
    *,
    implementation: Implementation = "auto",
    temperature: float = 1.0,
) -> TokenLogprobs:
    """What the policy says of the targets of packed rows, where their loss weight is not 0."""
    inputs = _head_inputs(params, rows, model, config, implementation)
    return token_logprobs(*inputs, vocab=model.vocab, temperature=temperature)


def row_loss(
    terms: TermsFn,
    params: Params,
    rows: Batch,
    model: ModelConfig,
    config: TrainConfig,
    *,
    implementation: Implementation = "auto",
    temperature: float = 1.0,
) -> tuple[jax.Array, tuple[Metrics, jax.Array]]:
    """What a `LossFn` returns, of a loss whose `terms` of a token depend on that token alone.

    `terms` is given the log-probs and `rows`, of some tokens at a time.
    """
    inputs = _head_inputs(params, rows, model, config, implementation)
    loss, (metrics, logprobs) = token_loss(
        terms, *inputs, rows, vocab=model.vocab, temperature=temperature
    )
    return loss, (metrics, logprobs.logprob_BT)


def _head_inputs(params, rows, model, config, implementation) -> tuple[jax.Array, ...]:
    """Hidden states, head, targets, and where a target's log-prob is needed."""
    x_BTE = qwen2.hidden_states(
        params,
        rows["token"],
        rows["position"],
        rows["segment"],
        model,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        implementation=implementation,
        place_BT=rows.get("place"),
    )
    return x_BTE, qwen2.head(params), rows["target"], rows["weight"] > 0


def place(rows: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """Rows [B, T] that every process holds, laid out over the mesh.

    Raises:
        ValueError: B or T does not divide over the mesh; the message names the axis.
    """
    return {
        name: jax.make_array_from_callback(
            x_BT.shape, sharding.sharding(mesh, x_BT.shape, "batch", "length"), x_BT.__getitem__
        )
        for name, x_BT in rows.items()
    }


def sum_documents(
    step: TrainStep,
    params: Params,
    documents: Sequence[Document],
    config: TrainConfig,
    mesh: Mesh,
    place: Place = place,
) -> tuple[Sums, list[np.ndarray]]:
    """Gradients, loss and metrics of all documents, and each one's log-probs (see `unpack`).

    Args:
        step: the programs.
        params: of the policy.
        documents: of the same lengths and weights in every process.
        config: rows and micro-batches.
        mesh: the devices.
        place: lays a micro-batch out.
    """
    row_plan, rows = _rows(documents, config, mesh)
    sums, logprobs = step.zeros(), []
    for part in packing.microbatches(rows, config.microbatch_rows):
        sums, logprob_BT = step.accumulate(params, sums, place(part, mesh))
        logprobs.append(logprob_BT)
        progress.beat()
    if not logprobs:
        return sums, []
    return sums, _unpack(logprobs, rows, documents, row_plan)


def score_documents(
    score: Callable[[Params, Batch], jax.Array],
    params: Params,
    documents: Sequence[Document],
    config: TrainConfig,
    mesh: Mesh,
    place: Place = place,
) -> list[np.ndarray]:
    """Each document's log-probs under `params`, without gradients.

    Args:
        score: a jitted (params, batch) -> [B, T] log-probs that every process can read.
        params: of the model to score with.
        documents: tokens of weight 0 get 0; otherwise as for `sum_documents`.
        config: rows and micro-batches.
        mesh: the devices.
        place: lays a micro-batch out.
    """
    row_plan, rows = _rows(documents, config, mesh)
    parts = packing.microbatches(rows, config.microbatch_rows)
    logprobs = []
    for part in parts:
        logprobs.append(score(params, place(part, mesh)))
        progress.beat()
    return _unpack(logprobs, rows, documents, row_plan)


def _rows(documents: Sequence[Document], config: TrainConfig, mesh: Mesh):
    """The plan of the rows, and the rows in the order in which the devices hold them."""
    row_plan = packing.plan([len(d.tokens) for d in documents], config.row_tokens)
    rows = packing.pack(documents, row_plan, config.row_tokens)
    shards = sharding.ways(mesh, "length")
    return row_plan, packing.spread(rows, shards) if row_plan and shards > 1 else rows


def _unpack(logprobs, rows, documents, row_plan) -> list[np.ndarray]:
    value_BT = np.concatenate(jax.device_get(logprobs))[: len(row_plan)]
    if "place" in rows:
        value_BT = packing.gather(value_BT, rows["place"])
    return packing.unpack(value_BT, documents, row_plan)
