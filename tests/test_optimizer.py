import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vibejax import optimizer
from vibejax.config.training import OptimizerConfig


def test_cosine_schedule_by_hand():
    config = OptimizerConfig(
        learning_rate=5e-5, final_learning_rate=8e-8, schedule="cosine", warmup=0.05
    )
    rate = optimizer.make_schedule(config, 100)
    np.testing.assert_allclose([rate(s) for s in (0, 4, 5)], [1e-5, 5e-5, 5e-5], rtol=1e-5)
    np.testing.assert_allclose(rate(100), 8e-8, rtol=1e-4)
    middle = 8e-8 + (5e-5 - 8e-8) * (1 + np.cos(np.pi * 47 / 95)) / 2
    np.testing.assert_allclose(rate(52), middle, rtol=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_without_warmup_the_first_rate_is_the_peak(schedule):
    config = OptimizerConfig(learning_rate=3e-4, schedule=schedule)
    np.testing.assert_allclose(optimizer.make_schedule(config, 10)(0), 3e-4, rtol=1e-6)


def test_decay_touches_matrices_only():
    params = {
        "embed": jnp.ones((4, 2)),
        "norm": jnp.ones(2),
        "layers": {"q": jnp.ones((3, 2, 2, 2)), "q_bias": jnp.ones((3, 2, 2)),
                   "attention_norm": jnp.ones((3, 2))},
    }  # fmt: skip
    adamw = optimizer.make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5), 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = adamw.update(zeros, adamw.init(params), params)
    leaves = updates["layers"] | {name: updates[name] for name in ("embed", "norm")}
    moved = {name: bool(jnp.any(x != 0)) for name, x in leaves.items()}
    assert moved == {
        "q": True, "embed": True, "norm": False, "q_bias": False, "attention_norm": False
    }  # fmt: skip
