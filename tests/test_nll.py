import jax
import jax.numpy as jnp
import numpy as np

from vibejax.losses import nll


def test_loss_and_gradient_by_hand():
    """The mean of -log p over two documents of 1 and 2 learnt tokens: 3, and (1 + 2) / 2."""
    logprob_BT = jnp.array([[-3.0, -7.0, -1.0, -2.0]])
    weight_BT = jnp.array([[0.5, 0.0, 0.25, 0.25]])
    (loss, metrics), grad_BT = jax.value_and_grad(nll.nll_loss, has_aux=True)(logprob_BT, weight_BT)
    assert loss == (3 + 1.5) / 2
    assert metrics["loss"] == loss
    np.testing.assert_array_equal(grad_BT, -weight_BT)
