import jax
import jax.numpy as jnp
import numpy as np

from vibejax import qwen2, sampler_copy
from vibejax.rope import Rope

MODEL = qwen2.ModelConfig(
    rope=Rope(theta=1e4), layers=2, width=32, heads=4, kv_heads=2, head_dim=8, mlp=48, vocab=77
)


def test_a_copy_is_a_list_of_layers_with_inputs_last():
    random = np.random.default_rng(0)
    params = qwen2.map_table(lambda info: random.standard_normal(info.shape, np.float32), MODEL)
    sampler = sampler_copy.make(params, MODEL, jnp.bfloat16)
    assert len(sampler["layers"]) == MODEL.layers
    for i, layer in enumerate(sampler["layers"]):
        for name, order in (
            ("q", (1, 2, 0)),
            ("o", (2, 0, 1)),
            ("down", (1, 0)),
            ("q_bias", (0, 1)),
        ):
            want = np.asarray(params["layers"][name])[i].transpose(order)
            np.testing.assert_array_equal(layer[name], want.astype(jnp.bfloat16))
    np.testing.assert_array_equal(sampler["embed"], np.asarray(params["embed"], jnp.bfloat16))
    shapes = sampler_copy.shapes(MODEL, jnp.bfloat16)
    assert jax.tree.all(
        jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), sampler, shapes)
    )
