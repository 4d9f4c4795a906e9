"""AdamW as the stages use it: schedule, clipping, and decay of matrices only."""

import jax
import optax

from vibejax.config.training import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate at each of `steps` optimizer steps."""
    warmup = round(config.warmup * steps)
    peak, final = config.learning_rate, config.final_learning_rate
    rest = max(steps - warmup, 1)
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, final, rest)
    else:
        after = optax.cosine_decay_schedule(peak, rest, alpha=final / peak)
    if not warmup:
        return after
    # The first update already moves: a rate of 0 would waste its batch.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clips the global norm, then AdamW at the scheduled rate."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=_is_matrix,
        ),
    )


def _is_matrix(params):
    """True for what is multiplied with: norms and biases, per layer, are named or vectors."""
    return jax.tree.map_with_path(
        lambda path, x: x.ndim > 1 and not str(path[-1].key).endswith(("norm", "bias")), params
    )
