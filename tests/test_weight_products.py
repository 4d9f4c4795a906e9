import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vibejax.weight_products import einsum, product_held, project_held

WIDTHS = [(192, 576), (576, 1_536), (1_000, 128)]  # outputs and inputs; SmolLM2's and another


@pytest.mark.parametrize("outputs, inputs", WIDTHS)
def test_a_row_has_the_same_bits_beside_any_number_of_others(outputs, inputs, optimised):
    random = np.random.default_rng(0)
    w_FE = random.standard_normal((outputs, inputs), np.float32)
    x_NE = random.standard_normal((512, inputs), np.float32)
    product = jax.jit(lambda x_NE: product_held(x_NE, w_FE, jnp.float32))
    want_NF = np.asarray(product(x_NE))
    exact_NF = x_NE.astype(np.float64) @ w_FE.T
    assert np.abs(want_NF - exact_NF).max() < 1e-6 * np.abs(exact_NF).max() * inputs**0.5
    for rows in (2, 8, 12, 16, 31, 32, 33, 48, 64, 96, 100, 128, 160, 256):
        np.testing.assert_array_equal(product(x_NE[:rows]), want_NF[:rows], err_msg=str(rows))


def test_a_held_projection_is_the_product_over_its_last_axes():
    random = np.random.default_rng(0)
    a_BTHD = random.standard_normal((2, 3, 4, 8), np.float32)
    w_EHD = random.standard_normal((5, 4, 8), np.float32)
    got_BTE = project_held("BTHD,HDE->BTE", a_BTHD, w_EHD)
    want_BTE = einsum("BTHD,EHD->BTE", a_BTHD, w_EHD)
    np.testing.assert_allclose(got_BTE, want_BTE, rtol=1e-5, atol=1e-5)


def test_logits_of_a_bfloat16_head_are_float32():
    x_NE, w_FE = jnp.ones((20, 16), jnp.bfloat16), jnp.full((48, 16), 1.0625, jnp.bfloat16)
    logit_NF = product_held(x_NE, w_FE, jnp.float32)
    assert logit_NF.dtype == np.float32
    np.testing.assert_array_equal(logit_NF, np.full((20, 48), 17.0, np.float32))
