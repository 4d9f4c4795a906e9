import bisect
import itertools

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from vibejax import sampling

BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))
GRID = 2_048
# The middles of equal parts of [0, 1): an id of probability p is drawn GRID * p times, +-1.
GRID_B = (np.arange(GRID, dtype=np.float32) + 0.5) / GRID
VOCAB = 300  # three blocks of the inverse CDF, the last of them not full

draw = jax.jit(
    sampling.sample,
    static_argnames=("temperature", "top_p", "top_k"),
    compiler_options={"xla_backend_optimization_level": 0},  # compiling takes longer than drawing
)


def draw_same(sample, logit_V, uniform_B, *, temperature=1.0, **how):
    """Draws from one distribution with each of the uniforms."""
    logit_BV = np.broadcast_to(np.asarray(logit_V, np.float32), (len(uniform_B), len(logit_V)))
    id_B, logprob_B = sample(logit_BV, uniform_B, temperature=temperature, **how)
    assert id_B.dtype == np.int32 and logprob_B.dtype == np.float32
    return np.asarray(id_B), np.asarray(logprob_B)


def reference(logit_V, *, temperature=1.0, top_p=1.0, top_k=0):
    """Probabilities by full sorts in float64, and how near to `top_p` any kept mass comes."""
    logit_V = logit_V.astype(np.float64) / temperature
    weight_V = np.exp(logit_V - logit_V.max())
    if top_k:
        weight_V = np.where(weight_V >= np.sort(weight_V)[-top_k], weight_V, 0.0)  # ties stay
    descending_V = np.sort(weight_V)[::-1]
    mass_V = np.cumsum(descending_V) / weight_V.sum()
    if top_p < 1.0:
        weight_V = np.where(weight_V >= descending_V[mass_V >= top_p][0], weight_V, 0.0)  # here too
    return weight_V / weight_V.sum(), np.abs(mass_V - top_p).min()


UNIFORM_B = np.array([0, 0.01, 0.12, 0.13, 0.5, 0.58, 0.63, 0.66, BELOW_ONE], np.float32)


@pytest.mark.parametrize(
    "how, p",
    [
        ({}, [1 / 8, 4 / 8, 3 / 8]),
        ({"temperature": 0.5}, [1 / 26, 16 / 26, 9 / 26]),  # weights squared
        ({"top_k": 2}, [0, 4 / 7, 3 / 7]),
        ({"top_k": 5}, [1 / 8, 4 / 8, 3 / 8]),  # more than there are
        ({"top_p": 0.45}, [0, 1, 0]),
        ({"top_p": 0.55}, [0, 4 / 7, 3 / 7]),
        ({"top_p": 0.9}, [1 / 8, 4 / 8, 3 / 8]),  # 7/8 are not enough
        ({"top_k": 2, "top_p": 0.55}, [0, 1, 0]),  # top-k first: 4/7 are enough
        ({"top_p": 0.0}, [0, 1, 0]),  # never nothing
    ],
    ids=str,
)
def test_by_hand(how, p):
    """Weights 1, 4, 3, 0: the id is the one in whose share of [0, 1) the uniform lies."""
    logit_V = [*np.log([1, 4, 3]), sampling.MASKED]
    id_B, logprob_B = draw_same(sampling.sample, logit_V, UNIFORM_B, **how)
    want_B = [bisect.bisect_right(list(itertools.accumulate(p)), u) for u in UNIFORM_B[:-1]]
    want_B += [np.flatnonzero(p)[-1]]
    np.testing.assert_array_equal(id_B, want_B)
    np.testing.assert_allclose(logprob_B, np.log(np.array(p)[id_B]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("how", [{"top_k": 2}, {"top_p": 0.55}])
def test_ids_tied_with_the_last_one_are_kept(how):
    """Weights 2, 1, 2, 2: the second and third stay with the first, the 1 goes."""
    id_B, logprob_B = draw_same(sampling.sample, np.log([2, 1, 2, 2]), UNIFORM_B, **how)
    assert set(id_B) == {0, 2, 3}
    np.testing.assert_allclose(logprob_B, np.log(1 / 3), rtol=1e-6)


@pytest.mark.parametrize("how", [{}, {"temperature": 1.4, "top_p": 0.8, "top_k": 50}], ids=str)
def test_shares_of_draws_are_the_probabilities(how):
    """Over a grid of uniforms each id comes up GRID * p times, to the one draw at its edge."""
    logit_V = 2.0 * np.random.default_rng(0).standard_normal(VOCAB).astype(np.float32)
    logit_V[128:256] -= 3.0  # a block of small mass between two others
    logit_V[250:] = sampling.MASKED
    p_V, _ = reference(logit_V, **how)
    id_B, logprob_B = draw_same(draw, logit_V, GRID_B, **how)
    count_V = np.bincount(id_B, minlength=VOCAB)
    assert np.abs(count_V - GRID * p_V).max() <= 1.0 + GRID * 1e-6
    assert np.all(np.diff(id_B) >= 0), "a larger uniform gives no smaller id"
    np.testing.assert_allclose(logprob_B, np.log(p_V[id_B]), rtol=1e-5)


@settings(deadline=None, max_examples=50)
@pytest.mark.parametrize("how", [{"top_k": 3}, {"top_k": 12, "top_p": 0.9}])
@given(level_V=npst.arrays(np.int8, 30, elements=st.integers(-9, 9)))
def test_kept_ids_are_those_of_a_full_sort(how, level_V):
    """Also among ties, which small whole numbers make."""
    logit_V = np.float32(0.37) * level_V
    p_V, margin = reference(logit_V, **how)
    assume("top_p" not in how or margin > 1e-5)  # nearer, rounding decides
    id_B, logprob_B = draw_same(draw, logit_V, GRID_B[::16], **how)
    assert set(id_B) >= set(np.flatnonzero(p_V > 2 * 16 / GRID))
    assert set(id_B) <= set(np.flatnonzero(p_V))
    np.testing.assert_allclose(logprob_B, np.log(p_V[id_B]), rtol=1e-5, atol=1e-6)


def test_temperature_zero_takes_the_likeliest():
    """The first of equals, whatever the uniform; its log-probability is that of temperature 1."""
    random = np.random.default_rng(0)
    logit_BV = random.standard_normal((64, VOCAB)).astype(np.float32)
    logit_BV[1, [7, 9]] = 50.0
    for uniform in (0.0, BELOW_ONE):
        id_B, logprob_B = draw(logit_BV, np.full(64, uniform, np.float32), temperature=0.0)
        np.testing.assert_array_equal(id_B, logit_BV.argmax(axis=1))
        p_B = [reference(logit_V)[0].max() for logit_V in logit_BV]
        np.testing.assert_allclose(logprob_B, np.log(p_B), rtol=1e-5)
    assert id_B[1] == 7


@pytest.mark.parametrize("how", [{}, {"temperature": 0.05, "top_p": 0.99, "top_k": 250}], ids=str)
def test_masked_and_impossible_ids_are_never_drawn(how):
    """Row b may draw b and 7 b; other ids are masked, or so unlikely that their weight is 0.

    Not at either end of [0, 1), not at the ends of the vocabulary, not in an empty block.
    """
    row_B = np.arange(VOCAB)
    logit_BV = np.full((VOCAB, VOCAB), sampling.MASKED, np.float32)
    logit_BV[:, ::2] = -300.0
    logit_BV[row_B, row_B] = logit_BV[row_B, 7 * row_B % VOCAB] = 0.0
    for uniform in (0.0, 1e-30, 0.5, BELOW_ONE):
        uniform_B = np.full(VOCAB, uniform, np.float32)
        id_B, logprob_B = draw(logit_BV, uniform_B, **{"temperature": 1.0} | how)
        assert np.all(logit_BV[row_B, id_B] == 0.0)
        want_B = -np.log((logit_BV == 0.0).sum(axis=1))
        np.testing.assert_allclose(logprob_B, want_B, rtol=1e-6, atol=1e-7)


def test_rounding_does_not_reach_past_the_last_possible_id():
    """Running sums round: that of a whole block may come out above or below the block's mass."""
    logit_BV = np.random.default_rng(0).standard_normal((GRID, sampling.BLOCK), np.float32)
    logit_BV[:, -1] = sampling.MASKED
    id_B, _ = draw(logit_BV, np.full(GRID, BELOW_ONE), temperature=1.0)
    assert np.all(np.asarray(id_B) < sampling.BLOCK - 1)


@jax.jit
def uniforms(seed, step, prompt_B, sample_B, position_B):
    return sampling.uniforms(sampling.sequence_keys(seed, step, prompt_B, sample_B), position_B)


def identities():
    """(prompts, samples, positions) of 64 tokens, no two alike."""
    index_B = np.arange(64, dtype=np.uint32)
    return np.stack([1_000 + index_B // 16, index_B // 4 % 4, index_B % 4])


def test_uniforms_follow_the_token_not_its_place_in_the_batch():
    which = identities()
    before_B = np.asarray(uniforms(7, 3, *which))
    order_B = np.random.default_rng(0).permutation(64)
    np.testing.assert_array_equal(uniforms(7, 3, *which[:, order_B]), before_B[order_B])
    np.testing.assert_array_equal(uniforms(7, 3, *which[:, 40:41]), before_B[40:41])


def test_uniforms_depend_on_all_that_names_a_token():
    prompt_B, sample_B, position_B = identities()
    draws = [
        uniforms(7, 3, prompt_B, sample_B, position_B),
        uniforms(8, 3, prompt_B, sample_B, position_B),
        uniforms(7, 4, prompt_B, sample_B, position_B),
        uniforms(7, 3, prompt_B + 4, sample_B, position_B),
        uniforms(7, 3, prompt_B, sample_B + 4, position_B),
        uniforms(7, 3, prompt_B, sample_B, position_B + 4),
    ]
    assert len(np.unique(draws)) == 6 * 64


@pytest.mark.parametrize("varied", ["prompts", "samples", "positions"])
def test_uniforms_are_uniform(varied):
    """Kolmogorov-Smirnov on 2,048 draws, at the 1% level, as one of the three varies."""
    index_B, fixed_B = np.arange(GRID, dtype=np.uint32), np.full(GRID, 5, np.uint32)
    which = [index_B if varied == name else fixed_B for name in ("prompts", "samples", "positions")]
    uniform_B = np.sort(uniforms(0, 0, *which))
    assert 0.0 <= uniform_B[0] and uniform_B[-1] < 1.0
    assert np.abs(uniform_B - GRID_B).max() < 1.63 / GRID**0.5
