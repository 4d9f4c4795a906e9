import functools
import math

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from vibejax import sharding
from vibejax.losses.logprobs import TokenLogprobs, token_logprobs, token_loss

VOCAB = 50  # of 64 rows: 14 are padding
CHUNK = 16  # of 2 x 37 tokens: the last chunk is not full
TEMPERATURE = 0.7
QUICK = {"xla_backend_optimization_level": 0}  # compiling is what these tests spend time on


def inputs(B=2, T=37, E=16, V=64, vocab=VOCAB, dtype=np.float32, scale=1.0):
    random = np.random.default_rng(0)
    x_BTE = (scale * random.standard_normal((B, T, E))).astype(dtype)
    head_VE = random.standard_normal((V, E), np.float32)
    target_BT = random.integers(0, vocab, (B, T))
    needed_BT = random.random((B, T)) < 0.4
    cotangent_BT = random.standard_normal((B, T), np.float32)
    return x_BTE, head_VE, target_BT, needed_BT, cotangent_BT


def plain(x_BTE, head_VE, target_BT, needed_BT, *, vocab=VOCAB, temperature=TEMPERATURE):
    """The same by log_softmax over all logits."""
    logit_BTV = jnp.einsum(
        "BTE,VE->BTV",
        x_BTE,
        head_VE.astype(x_BTE.dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    logprob_BTV = jax.nn.log_softmax(logit_BTV[..., :vocab] / temperature)
    logprob_BT = jnp.take_along_axis(logprob_BTV, target_BT[..., None], axis=-1)[..., 0]
    entropy_BT = -jnp.sum(jnp.exp(logprob_BTV) * logprob_BTV, axis=-1)
    return TokenLogprobs(*(jnp.where(needed_BT, y, 0.0) for y in (logprob_BT, entropy_BT)))


def chunked(*args, vocab=VOCAB, temperature=TEMPERATURE, chunk_tokens=CHUNK):
    return token_logprobs(*args, vocab=vocab, temperature=temperature, chunk_tokens=chunk_tokens)


def program(function, x_BTE, head_VE, target_BT, needed_BT, cotangent_BT):
    """Log-probabilities, entropies, and the gradients of sum(cotangent * log-probability)."""

    def loss(x_BTE, head_VE):
        out = function(x_BTE, head_VE, target_BT, needed_BT)
        return jnp.sum(cotangent_BT * out.logprob_BT) + jnp.sum(out.entropy_BT) * 0.0, out

    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, out), (dx_BTE, dhead_VE) = gradient(x_BTE, head_VE)
    return *out, dx_BTE, dhead_VE


run = jax.jit(program, static_argnums=0, compiler_options=QUICK)


def check(got, want, *, rounding):
    """Equal but for rounding, also that of a sum whose terms are large and cancel."""
    for name, g, w in zip(("logprob", "entropy", "dx", "dhead"), got, want, strict=True):
        bound = rounding * max(1.0, np.abs(w).max())
        np.testing.assert_allclose(g, w, rtol=rounding, atol=bound, err_msg=name)


def test_float32_equals_plain_log_softmax():
    args = inputs()
    got = run(chunked, *args)
    assert all(y.dtype == np.float32 for y in got)
    check(got, run(plain, *args), rounding=2e-6)


def test_bfloat16_equals_plain_log_softmax():
    """Forward to float32 rounding; the gradients to the rounding of bfloat16 factors, 2^-9."""
    x_BTE, head_VE, *others = inputs(dtype=jnp.bfloat16)
    got = run(chunked, x_BTE, head_VE, *others)
    assert [y.dtype for y in got] == [np.float32, np.float32, jnp.bfloat16, np.float32]
    rounded_VE = head_VE.astype(jnp.bfloat16).astype(np.float32)
    want = run(plain, x_BTE.astype(np.float32), rounded_VE, *others)
    for g, w in zip(got[:2], want[:2], strict=True):
        np.testing.assert_allclose(g, w, rtol=2e-6, atol=2e-6)
    for g, w in zip(got[2:], want[2:], strict=True):
        assert np.linalg.norm(g.astype(np.float32) - w) < 2**-8 * np.linalg.norm(w)


def test_by_hand():
    """Logits ln 1, ln 2, ln 5 and a padding row; temperature 1/2 squares the weights.

    Probabilities 1/30, 4/30, 25/30; the gradient by the logits is (onehot - p) / temperature.
    """
    head_VE = np.log(np.array([[1.0], [2.0], [5.0], [900.0]], np.float32))
    function = functools.partial(chunked, vocab=3, temperature=0.5)
    target_BT, needed_BT = np.array([[1, 2]]), np.ones((1, 2), bool)
    cotangent_BT = np.array([[1.0, 0.0]], np.float32)
    args = (np.ones((1, 2, 1), np.float32), head_VE, target_BT, needed_BT, cotangent_BT)
    logprob_BT, entropy_BT, _, dhead_VE = run(function, *args)
    p = np.array([1, 4, 25]) / 30
    np.testing.assert_allclose(logprob_BT, np.log([p[1:]]), rtol=1e-6)
    np.testing.assert_allclose(entropy_BT, [[-(p @ np.log(p))] * 2], rtol=1e-6)
    want_V = (np.array([0, 1, 0]) - p) / 0.5
    np.testing.assert_allclose(dhead_VE[:, 0], [*want_V, 0.0], rtol=1e-5)


def test_padding_rows_have_no_probability_and_no_gradient():
    args = inputs()
    got = run(chunked, *args)
    args[1][VOCAB:] = 1e3
    for g, changed in zip(got, run(chunked, *args), strict=True):
        np.testing.assert_array_equal(g, changed)
    np.testing.assert_array_equal(got[-1][VOCAB:], 0.0)
    assert np.all(np.any(got[-1][:VOCAB] != 0.0, axis=1))


@pytest.mark.parametrize("share", ["none", "one", "all"])
def test_any_share_of_tokens_may_be_needed(share):
    args = inputs()
    needed_BT = args[3]
    needed_BT[:] = share == "all"
    needed_BT[1, 20] = share != "none"
    check(run(chunked, *args), run(plain, *args), rounding=2e-6)


def test_chunks_without_needed_tokens_are_skipped():
    """Six needed tokens of two rows go into one chunk; NaN beyond it is never looked at."""
    x_BTE, *_, needed_BT, _ = args = inputs()
    needed_BT[:] = False
    needed_BT[0, [1, 17, 36]] = needed_BT[1, [0, 20, 30]] = True
    early_BT = np.cumsum(~needed_BT).reshape(needed_BT.shape) <= 10  # these share the chunk of 16
    beyond_BT = ~(needed_BT | early_BT)
    x_BTE[beyond_BT] = np.nan
    got = run(chunked, *args)
    x_BTE[beyond_BT] = 0.0
    check(got, run(plain, *args), rounding=2e-6)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_huge_logits_stay_finite(dtype):
    """Logits around 1e4, also at tokens of a chunk whose own logsumexp is not kept."""
    args = inputs(dtype=dtype, scale=3e3)
    got = run(chunked, *args)
    assert np.abs(got[0]).max() > 1e4
    for y in got:
        assert np.all(np.isfinite(np.asarray(y, np.float32)))
    if dtype == np.float32:
        for g, w in zip(got, run(plain, *args), strict=True):
            np.testing.assert_allclose(g, w, rtol=2e-6, atol=2e-2)  # 2^-23 of 5e4 is 6e-3


def test_entropy_is_a_constant():
    x_BTE, head_VE, target_BT, needed_BT, _ = inputs()

    def total(x_BTE, head_VE):
        return jnp.sum(chunked(x_BTE, head_VE, target_BT, needed_BT).entropy_BT)

    for gradient in jax.jit(jax.grad(total, argnums=(0, 1)))(x_BTE, head_VE):
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.fixture(scope="module")
def on_one_device():
    """A problem whose last eighth of the vocabulary is padding alone, and its results."""
    function = functools.partial(chunked, vocab=27)
    args = inputs(B=8, T=24, V=32, vocab=27)
    return function, args, run(function, *args)


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 8},
        {"fsdp": 8},
        {"context": 8},
        {"tensor": 8},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"fsdp": 2, "context": 2, "tensor": 2},
    ],
    ids=str,
)
def test_meshes_equal_one_device(sizes, on_one_device):
    function, args, want = on_one_device
    mesh = sharding.make_mesh(sizes)
    axes = [("batch", "length", None), ("vocab", "embed"), *[("batch", "length")] * 3]
    shardings = [sharding.sharding(mesh, x.shape, *a) for x, a in zip(args, axes, strict=True)]
    with jax.set_mesh(mesh):
        got = run(function, *jax.device_put(args, tuple(shardings)))
    check(got, want, rounding=1e-6)
    assert got[3].sharding.is_equivalent_to(shardings[1], 2), "laid out as the head is"


def terms(logprobs, channels):
    """A loss that is not linear in the log-probability, and sums of other things."""
    logprob, entropy = logprobs
    return jnp.sum(channels["weight"] * jnp.exp(0.1 * logprob)), {
        "entropy": jnp.sum(entropy),
        "tokens": jnp.sum(channels["weight"] != 0, dtype=jnp.float32),
    }


def together(x_BTE, head_VE, target_BT, needed_BT, weight_BT, vocab=VOCAB):
    def loss(x_BTE, head_VE):
        value, aux = token_loss(
            terms, x_BTE, head_VE, target_BT, needed_BT,
            {"weight": jnp.where(needed_BT, weight_BT, 0.0)},
            vocab=vocab, temperature=TEMPERATURE, chunk_tokens=CHUNK,
        )  # fmt: skip
        return 3.0 * value, aux

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x_BTE, head_VE)


def apart(function, x_BTE, head_VE, target_BT, needed_BT, weight_BT, vocab=VOCAB):
    def loss(x_BTE, head_VE):
        logprobs = function(x_BTE, head_VE, target_BT, needed_BT, vocab=vocab)
        value, metrics = terms(logprobs, {"weight": jnp.where(needed_BT, weight_BT, 0.0)})
        return 3.0 * value, (metrics, logprobs)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x_BTE, head_VE)


def check_loss(got, want, *, rounding):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        bound = rounding * max(1.0, np.abs(np.asarray(w, np.float32)).max())
        np.testing.assert_allclose(
            np.asarray(g, np.float32), np.asarray(w, np.float32), rtol=rounding, atol=bound
        )


@pytest.mark.parametrize("share", ["none", "one", "some", "all"])
def test_a_loss_equals_that_of_all_log_probs(share):
    """Value, metrics, log-probs and both gradients; nothing is added by tokens left out."""
    args = inputs()
    if share != "some":
        args[3][:] = share == "all"
        args[3][1, 20] = share != "none"
    compiled = functools.partial(jax.jit, compiler_options=QUICK)
    got = compiled(together)(*args)
    check_loss(got, compiled(functools.partial(apart, plain))(*args), rounding=2e-6)
    assert got[0][1][0]["tokens"] == args[3].sum()
    if share == "some":
        assert np.abs(got[1][1]).max() > 0.01


def test_a_loss_in_bfloat16_has_the_gradient_of_token_logprobs():
    args = inputs(dtype=jnp.bfloat16)
    compiled = functools.partial(jax.jit, compiler_options=QUICK)
    got = compiled(together)(*args)
    assert [y.dtype for y in got[1]] == [jnp.bfloat16, np.float32]
    check_loss(got, compiled(functools.partial(apart, chunked))(*args), rounding=2**-8)


@pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 8}, {"fsdp": 2, "context": 2, "tensor": 2}, {"data": 2, "tensor": 4}],
    ids=str,
)
def test_a_loss_on_meshes_equals_one_device(sizes):
    args = inputs(B=8, T=24, V=32, vocab=27)
    run = jax.jit(functools.partial(together, vocab=27), compiler_options=QUICK)
    want = run(*args)
    mesh = sharding.make_mesh(sizes)
    axes = [("batch", "length", None), ("vocab", "embed"), *[("batch", "length")] * 3]
    shardings = [sharding.sharding(mesh, x.shape, *a) for x, a in zip(args, axes, strict=True)]
    with jax.set_mesh(mesh):
        got = run(*jax.device_put(args, tuple(shardings)))
    check_loss(got, want, rounding=1e-6)
    assert got[1][1].sharding.is_equivalent_to(shardings[1], 2), "laid out as the head is"


def products(jaxpr):
    """Products with the head in a program, bodies of loops included."""
    own = sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)
    return own + sum(products(inner) for inner in jax.extend.core.subjaxprs(jaxpr))


def test_a_loss_multiplies_with_the_head_three_times():
    """Its logits, and the gradients of both factors; `token_logprobs` computes logits again."""
    args = inputs()
    assert products(jax.make_jaxpr(together)(*args).jaxpr) == 3
    assert products(jax.make_jaxpr(functools.partial(apart, chunked))(*args).jaxpr) == 4


def largest_array(jaxpr):
    """Elements of the largest array that a program computes, bodies of loops included."""
    own = (math.prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars)
    inner = (largest_array(inner) for inner in jax.extend.core.subjaxprs(jaxpr))
    return max([*own, *inner], default=0)


LONG = dict(B=1, T=4_096, E=8, V=2_048)


def test_neither_pass_computes_all_logits():
    """No array of forward or backward is larger than a chunk's logits; the plain form's is."""
    T, V, chunk_tokens = LONG["T"], LONG["V"], 64
    function = functools.partial(chunked, vocab=V, chunk_tokens=chunk_tokens)
    args = inputs(**LONG, vocab=V)
    ours, theirs = (
        largest_array(jax.make_jaxpr(program, static_argnums=0)(f, *args).jaxpr)
        for f in (function, functools.partial(plain, vocab=V))
    )
    assert theirs == T * V
    assert ours == chunk_tokens * V


def test_neither_pass_holds_all_logits():
    """What the compiled program allocates: a few chunks, not [T, V] (32 MiB here)."""
    T, V, chunk_tokens = LONG["T"], LONG["V"], 64
    function = functools.partial(chunked, vocab=V, chunk_tokens=chunk_tokens)
    args = inputs(**LONG, vocab=V)
    ours, theirs = (
        run.lower(f, *args).compile().memory_analysis().temp_size_in_bytes
        for f in (function, functools.partial(plain, vocab=V))
    )
    assert theirs >= 4 * T * V
    assert ours < 8 * 4 * chunk_tokens * V
