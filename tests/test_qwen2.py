import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vibejax import qwen2, sampler_copy, sharding
from vibejax.kernels import reference
from vibejax.losses.logprobs import token_logprobs
from vibejax.rope import Rope, inverse_frequencies

SMALL = dict(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, mlp=48, vocab=77, context=64)
ODD = dict(layers=2, width=50, heads=3, kv_heads=1, head_dim=64, mlp=37, vocab=131, context=32)
CONFIGS = {
    "small": qwen2.ModelConfig(rope=Rope(theta=1e4), **SMALL),
    "odd": qwen2.ModelConfig(rope=Rope(theta=1e6, kind="linear", factor=3.0), tied=False, **ODD),
    "yarn": qwen2.ModelConfig(
        rope=Rope(theta=1e4, kind="yarn", factor=4.0, original_context=16), **SMALL
    ),
    "dynamic": qwen2.ModelConfig(rope=Rope(theta=1e4, kind="dynamic", factor=2.0), **SMALL),
}
QUICK = {"xla_backend_optimization_level": 0}  # compiling is what these tests spend time on
jit = functools.partial(jax.jit, compiler_options=QUICK)

hidden_states = jit(qwen2.hidden_states, static_argnames=("config", "dtype", "remat"))


def random_params(config):
    """Like trained ones: no bias is 0, no norm 1, and attention is far from uniform."""
    random = np.random.default_rng(0)

    def leaf(info):
        scale = 0.3 if len(info.axes) > 2 or info.init != "normal" else 1.0
        x = scale * random.standard_normal(info.shape, np.float32)
        return x + 1 if info.init == "ones" else x

    return qwen2.map_table(leaf, config)


def documents(config, lengths, T):
    """(tokens, positions, segments) of a row of documents, each [1, T]; 0 is padding."""
    random = np.random.default_rng(1)
    token_T, position_T, segment_T = np.zeros((3, T), np.int32)
    start = 0
    for segment, length in enumerate(lengths, 1):
        part = slice(start, start + length)
        token_T[part] = random.integers(0, config.vocab, length)
        position_T[part] = np.arange(length)
        segment_T[part] = segment
        start += length
    return token_T[None], position_T[None], segment_T[None]


def close(got, want, *, rounding):
    """Equal but for rounding, also that of a sum whose terms are large and cancel."""
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(
            g, w, rtol=rounding, atol=rounding * max(1.0, np.abs(w).max())
        ),
        got,
        want,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_are_as_if_alone(name):
    config = CONFIGS[name]
    params, row = random_params(config), documents(config, [5, 9, 4], 20)
    packed_BTE = hidden_states(params, *row, config)
    for start, length in ((0, 5), (5, 9), (14, 4)):
        alone = np.zeros((3, 1, 20), np.int32)
        alone[:, :, :length] = [x[:, start : start + length] for x in row]
        alone_BTE = hidden_states(params, *alone, config)
        close(packed_BTE[:, start : start + length], alone_BTE[:, :length], rounding=1e-5)


def test_padding_is_harmless():
    """Neither its length nor what its tokens and positions hold reaches a document."""
    config = CONFIGS["small"]
    params, row = random_params(config), documents(config, [9], 20)
    short = documents(config, [9], 9)
    want_BTE = hidden_states(params, *short, config)
    padded_BTE = hidden_states(params, *row, config)
    close(padded_BTE[:, :9], want_BTE, rounding=1e-5)
    token_BT, position_BT, segment_BT = (x.copy() for x in row)
    token_BT[:, 9:], position_BT[:, 9:] = 76, np.arange(11)
    got_BTE = hidden_states(params, token_BT, position_BT, segment_BT, config)
    np.testing.assert_array_equal(got_BTE[:, :9], padded_BTE[:, :9])
    assert np.all(np.isfinite(got_BTE))


def test_the_order_of_tokens_in_a_row_is_data():
    config = CONFIGS["yarn"]
    params, row = random_params(config), documents(config, [5, 9, 4], 20)
    order = np.random.default_rng(0).permutation(20)
    straight_BTE = hidden_states(params, *row, config)
    moved_BTE = hidden_states(params, *(x[:, order] for x in row), config)
    close(moved_BTE, straight_BTE[:, order], rounding=1e-5)


def test_rows_do_not_see_each_other():
    config = CONFIGS["small"]
    params = random_params(config)
    first, second = documents(config, [7, 13], 20), documents(config, [20], 20)
    both = [np.concatenate(pair) for pair in zip(first, second, strict=True)]
    got_BTE = hidden_states(params, *both, config)
    for b, row in enumerate((first, second)):
        close(got_BTE[b : b + 1], hidden_states(params, *row, config), rounding=1e-5)


@pytest.mark.parametrize("name", ["small", "odd", "yarn"])
def test_only_distances_count(name):
    """A document whose positions all start later has the same outputs: RoPE is relative."""
    config = CONFIGS[name]
    params, (token_BT, position_BT, segment_BT) = random_params(config), documents(config, [20], 20)
    want_BTE = hidden_states(params, token_BT, position_BT, segment_BT, config)
    got_BTE = hidden_states(params, token_BT, position_BT + 100, segment_BT, config)
    close(got_BTE, want_BTE, rounding=2e-5)
    other_BTE = hidden_states(params, token_BT, 2 * position_BT, segment_BT, config)
    assert np.abs(other_BTE - want_BTE).max() > 1e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_over_a_cache_equal_the_full_forward(name):
    """A row of 12 tokens and one of 9, in chunks of 5, 1, 4 and 2; the second ends in padding."""
    config = CONFIGS[name]
    params, lengths = random_params(config), [12, 9]
    tokens = [documents(config, [n], n)[0][0] for n in lengths]
    token_BT = np.stack([np.pad(t, (0, 12 - len(t))) for t in tokens])
    position_BT = np.where(np.arange(12) < np.array(lengths)[:, None], np.arange(12), -1)
    sampler = sampler_copy.make(params, config, jnp.float32)

    def attend(cache, q_BTHD, k_BTKD, v_BTKD):
        cache = [jnp.concatenate(x, axis=1) for x in zip(cache, (k_BTKD, v_BTKD), strict=True)]
        T, S = q_BTHD.shape[1], cache[0].shape[1]
        position_BS = jnp.broadcast_to(jnp.arange(S), (2, S))
        ones_BS = jnp.ones((2, S), jnp.int32)
        a_BTHD = reference.attention(
            q_BTHD, *cache, position_BS[:, S - T :], ones_BS[:, :T], position_BS, ones_BS
        )
        return a_BTHD, cache

    shape = (2, 0, config.kv_heads, config.head_dim)
    caches = [[jnp.zeros(shape), jnp.zeros(shape)]] * config.layers
    outputs = []
    for start, end in ((0, 5), (5, 6), (6, 10), (10, 12)):
        step = jit(functools.partial(qwen2.cached_states, attend=attend, config=config))
        part = (token_BT[:, start:end], position_BT[:, start:end])
        x_BTE, caches = step(sampler, *part, caches)
        outputs.append(np.asarray(x_BTE))
    got_BTE = np.concatenate(outputs, axis=1)
    for b, n in enumerate(lengths):
        full = tokens[b][None], np.arange(n)[None], np.ones((1, n), np.int32)
        close(got_BTE[b, :n], hidden_states(params, *full, config)[0], rounding=1e-5)


REMAT = ("none", "full", "attention", "offload")


def weighted_sum(params, row, weight_BTE, config, remat, dtype=jnp.float32):
    x_BTE = qwen2.hidden_states(params, *row, config, dtype=dtype, remat=remat)
    return jnp.sum(weight_BTE * x_BTE), x_BTE


@functools.cache
def gradients(remat):
    """((loss, hidden states), gradients) of the small model under a remat policy."""
    config = CONFIGS["small"]
    row = documents(config, [5, 9, 4], 20)
    weight_BTE = np.random.default_rng(2).standard_normal((1, 20, 32), np.float32)
    run = jit(jax.value_and_grad(weighted_sum, has_aux=True), static_argnames=("config", "remat"))
    return run(random_params(config), row, weight_BTE, config=config, remat=remat)


def test_what_a_layer_keeps_for_the_backward_pass():
    """By hand, with remat "none": of a layer's states its input and what attention left of it, not
    what is normed of them; of the width of the MLP gate, up and their product.
    """
    config = CONFIGS["small"]
    row = documents(config, (5, 4), 12)
    run = functools.partial(qwen2.hidden_states, config=config)
    kept = jax.eval_shape(
        lambda params: jax.vjp(lambda params: run(params, *row), params)[1], random_params(config)
    )
    shapes = [x.shape for x in jax.tree.leaves(kept)]
    assert shapes.count((config.layers, 1, 12, config.width)) == 2
    assert shapes.count((config.layers, 1, 12, config.mlp)) == 3


@pytest.mark.parametrize("remat", REMAT[1:])
def test_rematerialisation_changes_nothing(remat):
    """Loss and gradients; `offload` goes through the CPU backend's host memory."""
    close(gradients(remat), gradients("none"), rounding=1e-6)


def test_the_gradient_is_that_of_finite_differences():
    """Along a random direction, in float32: (f(p + h d) - f(p - h d)) / 2h."""
    config = CONFIGS["small"]
    row, params = documents(config, [5, 9, 4], 20), random_params(config)
    weight_BTE = np.random.default_rng(2).standard_normal((1, 20, 32), np.float32)
    random = np.random.default_rng(3)
    direction = jax.tree.map(lambda w: random.standard_normal(w.shape, np.float32), params)
    values = []
    for h in (1e-3, -1e-3):
        moved = jax.tree.map(lambda w, d, h=h: w + np.float32(h) * d, params, direction)
        x_BTE = np.asarray(hidden_states(moved, *row, config), np.float64)
        values.append(np.sum(weight_BTE * x_BTE))
    slope = (values[0] - values[1]) / 2e-3
    _, gradient = gradients("none")
    products = jax.tree.map(lambda g, d: np.sum(np.float64(g) * d), gradient, direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), slope, rtol=2e-3)


@pytest.mark.parametrize(
    "remat, kept",
    [
        ("full", ["float32[2,1,20,32]"]),
        ("attention", ["float32[2,1,1,2,40]", "float32[2,1,20,32]", "float32[2,1,20,4,8]"]),
        ("offload", ["float32<host>[2,1,20,32]"]),
    ],
)
def test_what_the_backward_pass_keeps(remat, kept):
    """Of all layers: their inputs, also what attention gave, or their inputs on the host."""
    config = CONFIGS["small"]
    row, params = documents(config, [20], 20), random_params(config)
    backward = jax.grad(lambda p: weighted_sum(p, row, 1.0, config, remat)[0])
    jaxpr = jax.make_jaxpr(backward)(params).jaxpr
    forward = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    carried = forward.params["num_carry"]
    got = [v.aval.str_short() for v in forward.outvars[carried:]]
    assert sorted(got) == kept


MESHED = qwen2.ModelConfig(
    rope=Rope(theta=1e4, kind="yarn", factor=4.0, original_context=16),
    layers=2,
    width=16,
    heads=16,
    kv_heads=8,
    head_dim=4,
    mlp=32,
    vocab=77,
    context=64,
)


@pytest.fixture(scope="module")
def on_one_device():
    """(arguments, results) of a problem whose every axis divides by 8."""
    rows = [documents(MESHED, lengths, 16) for lengths in ([16], [3, 9], [8, 8], [5]) * 2]
    row = tuple(np.concatenate(x) for x in zip(*rows, strict=True))
    weight_BTE = np.random.default_rng(2).standard_normal((8, 16, 16), np.float32)
    args = (random_params(MESHED), row, weight_BTE)
    return args, loss_and_gradients(*args)


@jit
def loss_and_gradients(params, row, weight_BTE):
    run = jax.value_and_grad(weighted_sum, has_aux=True)
    return run(params, row, weight_BTE, MESHED, "attention")


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 8},
        {"fsdp": 8},
        {"context": 8},
        {"tensor": 8},
        {"data": 2, "fsdp": 2, "context": 2},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"data": 2, "context": 2, "tensor": 2},
        {"fsdp": 2, "context": 2, "tensor": 2},
    ],
    ids=str,
)
def test_meshes_equal_one_device(sizes, on_one_device):
    (params, row, weight_BTE), want = on_one_device
    mesh = sharding.make_mesh(sizes)
    tokens = sharding.sharding(mesh, (8, 16), "batch", "length")
    weights = sharding.sharding(mesh, (8, 16, 16), "batch", "length", None)
    placed = (qwen2.param_shardings(MESHED, mesh), (tokens,) * 3, weights)
    with jax.set_mesh(mesh):
        got = loss_and_gradients(*jax.device_put((params, row, weight_BTE), placed))
    close(got, want, rounding=1e-5)
    x_BTE = got[0][1]
    assert x_BTE.sharding.is_equivalent_to(weights, 3), "outputs stay where their tokens are"


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"tensor": 8}, "axis 'kv_heads' of size 2 is not a multiple of mesh axes .* = 8"),
        ({"fsdp": 8}, "axis 'embed' of size 50 is not a multiple of mesh axes .* = 8"),
    ],
    ids=str,
)
def test_an_axis_that_does_not_divide_is_named(sizes, message):
    config = CONFIGS["small"] if "tensor" in sizes else CONFIGS["odd"]
    with pytest.raises(ValueError, match=message):
        qwen2.param_shardings(config, sharding.make_mesh(sizes))


def test_the_vocabulary_is_padded_to_divide():
    assert [c.vocab_rows for c in (CONFIGS["small"], CONFIGS["odd"])] == [128, 256]
    assert qwen2.ModelConfig(rope=Rope(theta=1e6), vocab=151_936).vocab_rows == 151_936
    shardings = qwen2.param_shardings(MESHED, sharding.make_mesh({"tensor": 8}))
    assert shardings["embed"].shard_shape((128, 16)) == (16, 16)


@pytest.mark.parametrize("name", ["small", "odd"])
def test_padded_ids_have_no_probability(name):
    """For the sampler and the trainer alike, which agree on all ids that exist."""
    config = CONFIGS[name]
    params, row = random_params(config), documents(config, [20], 20)
    x_BTE = hidden_states(params, *row, config)
    logit_TV = jit(qwen2.logits, static_argnames="config")(params, x_BTE[0], config=config)
    logprob_TV = jax.nn.log_softmax(logit_TV)
    np.testing.assert_array_equal(np.exp(logprob_TV[:, config.vocab :]), 0.0)
    np.testing.assert_allclose(np.exp(logprob_TV).sum(axis=1), 1.0, rtol=1e-5)
    head_VE = params["embed"] if config.tied else params["head"]
    want_TV = np.asarray(x_BTE[0]) @ head_VE[: config.vocab].T
    close(logit_TV[:, : config.vocab], want_TV, rounding=1e-5)
    target_BT = np.arange(20)[None]
    ours = jit(functools.partial(token_logprobs, vocab=config.vocab))
    logprob_BT = ours(x_BTE, qwen2.head(params), target_BT, np.ones((1, 20), bool)).logprob_BT
    close(logprob_BT[0], logprob_TV[np.arange(20), target_BT[0]], rounding=1e-6)


def test_bfloat16_is_near_float32_also_at_late_positions():
    """Positions past 256 are not bfloat16 numbers: angles are float32 in any case."""
    config = CONFIGS["small"]
    params, (token_BT, position_BT, segment_BT) = random_params(config), documents(config, [20], 20)
    want_BTE = hidden_states(params, token_BT, position_BT, segment_BT, config)
    for start in (0, 4_099):
        row = (token_BT, position_BT + start, segment_BT)
        got_BTE = hidden_states(params, *row, config, dtype=jnp.bfloat16)
        assert got_BTE.dtype == jnp.bfloat16
        error = np.linalg.norm(got_BTE.astype(np.float32) - want_BTE) / np.linalg.norm(want_BTE)
        assert error < 2**-5


def test_initial_parameters():
    """Matrices of the asked spread, biases 0, norms 1, none like another."""
    config = CONFIGS["odd"]
    params = jit(qwen2.init_params, static_argnums=(0, 2))(config, jax.random.key(0), jnp.bfloat16)

    def check(info, x):
        assert x.shape == info.shape and x.dtype == jnp.bfloat16
        assert len(info.axes) == len(info.shape)
        x = np.asarray(x, np.float32)
        if info.init == "normal":
            np.testing.assert_allclose(x.std(), config.init_std, rtol=0.05)
            return x.ravel()[:8].tobytes()
        np.testing.assert_array_equal(x, 1.0 if info.init == "ones" else 0.0)
        return None

    starts = jax.tree.leaves(qwen2.map_table(check, config, params))
    assert len(set(starts)) == len(starts) == 9  # q k v o gate up down, embedding and head


@pytest.mark.parametrize(
    "sizes, count",
    [
        ({}, 3_085_938_688),  # Qwen2.5-Coder-3B
        (dict(layers=28, width=1_536, heads=12, mlp=8_960), 1_543_714_304),  # Qwen2.5-Math-1.5B
    ],
    ids=["3B", "1.5B"],
)
def test_param_count_of_published_checkpoints(sizes, count):
    assert qwen2.param_count(qwen2.ModelConfig(rope=Rope(theta=1e6), **sizes)) == count


def test_param_count_leaves_padding_out():
    """Layers of 2 norms, q and o, k and v, biases, MLP; a norm; two tables of 131 ids."""
    layer = 2 * 50 + 2 * 50 * 3 * 64 + 2 * 50 * 64 + (3 + 2) * 64 + 3 * 50 * 37
    assert qwen2.param_count(CONFIGS["odd"]) == 2 * layer + 50 + 2 * 131 * 50


def test_train_flops_by_hand():
    """Forward 2 a weight and 4 a query dimension and key seen; backward twice that."""
    config = CONFIGS["small"]
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 128 * 32
    want = 3 * (2 * weights + 2 * 4 * 32 * 10.0)
    assert qwen2.train_flops_per_token(config, attended=10.0) == want


def frequencies(head_dim, context, longest=1, **rope):
    values_D, scale = inverse_frequencies(Rope(**rope), head_dim, context, np.int32(longest))
    return np.asarray(values_D), scale


def test_plain_and_linear_frequencies_by_hand():
    """theta = 10,000 and D = 8: exponents 0, 1/4, 1/2, 3/4."""
    values_D, scale = frequencies(8, 64, theta=1e4)
    np.testing.assert_allclose(values_D, [1, 0.1, 0.01, 0.001], rtol=1e-6)
    assert scale == 1.0
    values_D, scale = frequencies(8, 64, theta=1e4, kind="linear", factor=4.0)
    np.testing.assert_allclose(values_D, [1 / 4, 0.1 / 4, 0.01 / 4, 0.001 / 4], rtol=1e-6)
    assert scale == 1.0


def test_dynamic_frequencies_by_hand():
    """Factor 2, twice the context: theta grows by (2 * 2 - 1)^(D / (D - 2)) = 3^(4/3)."""
    plain_D, _ = frequencies(8, 64, theta=1e4)
    for longest in (1, 64):
        values_D, scale = frequencies(8, 64, longest, theta=1e4, kind="dynamic", factor=2.0)
        np.testing.assert_allclose(values_D, plain_D, rtol=1e-6)
    values_D, scale = frequencies(8, 64, 128, theta=1e4, kind="dynamic", factor=2.0)
    base = 1e4 * 3 ** (4 / 3)
    np.testing.assert_allclose(values_D, [1, base**-0.25, base**-0.5, base**-0.75], rtol=1e-5)
    assert scale == 1.0


def test_yarn_frequencies_by_hand():
    """D = 8, theta = 10,000, factor 4: pairs below bound 0 are kept, above bound 2 divided.

    A pair that makes r rotations over the original 4,096 positions has the index
    8 ln(4096 / (2 pi r)) / (2 ln 10000): 1.31 for r = 32 and 2.81 for r = 1, rounded to 1 and 3.
    Pair 2 lies half way between.
    """
    yarn = dict(theta=1e4, kind="yarn", factor=4.0, original_context=4_096)
    values_D, scale = frequencies(8, 32_768, **yarn)
    half_way = (0.01 + 0.01 / 4) / 2
    np.testing.assert_allclose(values_D, [1, 0.1, half_way, 0.001 / 4], rtol=1e-6)
    np.testing.assert_allclose(scale, 0.1 * np.log(4) + 1)
    _, scale = frequencies(8, 32_768, **yarn, attention_factor=1.5)
    assert scale == 1.5
    values_D, _ = frequencies(8, 32_768, **yarn, truncate=False)
    low, high = (4 * np.log(4_096 / (2 * np.pi * r)) / np.log(1e4) for r in (32, 1))
    ramp = (2 - low) / (high - low)
    want = [1, 0.1, 0.01 * (1 - ramp) + 0.01 / 4 * ramp, 0.001 / 4]
    np.testing.assert_allclose(values_D, want, rtol=1e-6)
    values_D, _ = frequencies(8, 4_096, theta=1e4, kind="yarn", factor=4.0)
    np.testing.assert_allclose(values_D[2], half_way, rtol=1e-6, err_msg="from the context")


def test_yarn_of_factor_one_is_plain():
    values_D, scale = frequencies(64, 32_768, theta=1e6, kind="yarn", factor=1.0)
    plain_D, _ = frequencies(64, 32_768, theta=1e6)
    np.testing.assert_allclose(values_D, plain_D, rtol=1e-6)
    assert scale == 1.0
