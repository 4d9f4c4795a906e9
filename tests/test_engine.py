import jax
import numpy as np
import pytest
import tiny

from vibejax import engine, qwen2
from vibejax.engine import Request, Sampling

MODEL = tiny.model_config()
PROMPTS = [Request(i, tuple(range(1, 2 + i % 5))) for i in range(7)]
EOS = (3, 9)


@pytest.fixture(scope="module")
def params():
    return qwen2.init_params(MODEL, jax.random.key(0))


def run(params, requests=PROMPTS, samples=4, slots=12, dtype="float32", **how):
    how = Sampling(
        **({"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 12, "eos_ids": EOS} | how)
    )
    done = engine.generate(
        engine.sampler_params(params, MODEL, dtype), MODEL, requests,
        samples=samples, how=how, slots=slots, seed=5, step=2,
    )  # fmt: skip
    return {(requests[n].prompt, g): c for n, g, c in done}


@jax.jit
def forward_logits(params, tokens):
    """[T, V] logits of one sequence by the plain forward pass; padding comes after its end."""
    position = jax.numpy.arange(tokens.size)[None]
    segment = jax.numpy.ones_like(position)
    x_BTE = qwen2.hidden_states(params, tokens[None], position, segment, MODEL)
    return qwen2.logits(params, x_BTE[0], MODEL)


def padded(*parts):
    return np.pad(np.concatenate(parts), (0, 20))[:20].astype(np.int32)


def forward_logprobs(params, prompt, completion, temperature=1.0):
    """Log-probs of a completion by the plain forward pass."""
    logit_TV = forward_logits(params, padded(prompt, completion)) / temperature
    logprob_TV = np.asarray(jax.nn.log_softmax(logit_TV))
    place = np.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return logprob_TV[place, completion]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_the_forward_pass(params, temperature):
    completions = run(params, temperature=temperature)
    assert len(completions) == 28
    for (prompt, _), c in completions.items():
        want = forward_logprobs(params, PROMPTS[prompt].tokens, c.tokens, temperature)
        np.testing.assert_allclose(c.logprobs, want, atol=2e-5)


def test_completions_end_at_a_stop_token_or_at_the_limit(params):
    completions = run(params).values()
    assert {c.stop for c in completions} == {"stop", "length"}
    for c in completions:
        assert not np.isin(c.tokens[:-1], EOS).any()
        assert (c.tokens[-1] in EOS) == (c.stop == "stop")
        assert c.stop == "stop" or len(c.tokens) == 12
        assert len(c.tokens) == len(c.logprobs)


def test_completions_depend_neither_on_order_nor_on_neighbours(params):
    want = run(params)
    for other in (run(params, PROMPTS[::-1]), run(params, slots=4)):
        assert other.keys() == want.keys()
        for key, c in want.items():
            np.testing.assert_array_equal(other[key].tokens, c.tokens)


def test_samples_of_a_group_differ_and_more_samples_keep_the_first(params):
    few, many = run(params, samples=2), run(params, samples=4)
    for (prompt, g), c in few.items():
        np.testing.assert_array_equal(many[prompt, g].tokens, c.tokens)
    assert len({tuple(c.tokens) for c in many.values()}) > 20


def test_greedy_follows_the_likeliest_token(params):
    (completion,) = run(params, PROMPTS[:1], samples=1, temperature=0.0).values()
    tokens = list(PROMPTS[0].tokens)
    for token in completion.tokens:
        assert token == int(np.argmax(forward_logits(params, padded(tokens))[len(tokens) - 1]))
        tokens.append(token)


def test_one_compilation_serves_all_waves(params):
    run(params)
    before = engine._wave._cache_size()
    run(params, PROMPTS[:5])  # the last wave is not full
    assert engine._wave._cache_size() == before


@pytest.mark.parametrize(
    "longest, columns", [(1, 8), (8, 8), (9, 16), (17, 32), (32, 32), (33, 64), (65, 96)]
)
def test_prompt_columns_hold_the_longest_prompt_in_few_shapes(longest, columns):
    assert engine.prompt_columns(longest) == columns
