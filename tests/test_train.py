"""Any split of a batch gives the same gradient, and a bad gradient changes nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vibejax import optimizer, qwen2, sharding, train
from vibejax.config.rl import RlConfig
from vibejax.config.training import OptimizerConfig, TrainConfig
from vibejax.losses import importance
from vibejax.packing import Document
from vibejax.policy_programs import SUMS, policy_loss

MODEL = tiny.model_config(vocab=128, heads=8, kv_heads=4)


def documents():
    """Nine completions of different lengths, as a rollout leaves them."""
    rng = np.random.default_rng(0)
    out = []
    for n in (5, 17, 32, 9, 9, 26, 3, 12, 30):
        prompt = min(4, n - 1)
        out.append(
            Document(
                tokens=rng.integers(0, 128, n).astype(np.int32),
                weights=np.repeat(np.float32([0, 1 / (9 * (n - prompt))]), [prompt, n - prompt]),
                channels={
                    "advantage": np.full(n, rng.standard_normal(), np.float32),
                    "sampler_logprob": rng.normal(-4, 1, n).astype(np.float32),
                    "reference_logprob": rng.normal(-4, 1, n).astype(np.float32),
                },
            )
        )
    return out


def gradient(sizes, row_tokens, rows, remat="none", given=None, **objective):
    mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod([*sizes.values(), 1]))])
    config = RlConfig(
        policy="",
        prompts="",
        train=TrainConfig(row_tokens=row_tokens, microbatch_rows=rows, remat=remat),
        rollout={"max_prompt_tokens": 1, "max_completion_tokens": 1},
        objective={"kl": 0.1} | objective,
    )
    adamw = optimizer.make_optimizer(OptimizerConfig(), 10)
    loss_fn = functools.partial(policy_loss, model=MODEL, config=config)
    with jax.set_mesh(mesh):
        step = train.make_train_step(loss_fn, adamw, lambda _: 1e-6, MODEL, mesh, SUMS)
        create = jax.jit(
            lambda: qwen2.init_params(MODEL, jax.random.key(1)),
            out_shardings=qwen2.param_shardings(MODEL, mesh),
        )
        sums, logprobs = train.sum_documents(
            step, create(), given or documents(), config.train, mesh
        )
    return jax.device_get(sums), logprobs


@pytest.fixture(scope="module")
def whole():
    return gradient({}, 32, 9)


@pytest.mark.parametrize(
    "sizes, row_tokens, rows, remat",
    [
        ({}, 32, 1, "none"),
        ({}, 64, 2, "full"),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 32, 4, "none"),
        ({"context": 2, "tensor": 4}, 64, 2, "attention"),
        ({"fsdp": 4, "context": 2}, 32, 8, "none"),
        ({"data": 2, "context": 4}, 32, 2, "none"),
    ],
    ids=str,
)
def test_no_split_packing_or_mesh_changes_the_gradient(whole, sizes, row_tokens, rows, remat):
    got, logprobs = gradient(sizes, row_tokens, rows, remat)
    np.testing.assert_allclose(got.loss, whole[0].loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got.grads), jax.tree.leaves(whole[0].grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
    for a, b in zip(logprobs, whole[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_loss_of_single_tokens_has_the_gradient_of_one_of_whole_rows(whole, monkeypatch):
    monkeypatch.setattr(importance, "of_one_token", lambda correction: False)
    got, logprobs = gradient({}, 32, 9)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(whole[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
    for a, b in zip(logprobs, whole[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("correction", ["sequence_truncate", "geometric_mask"])
def test_corrections_of_sequences_see_whole_rows(whole, correction):
    """No split or packing changes their gradient either."""
    edges = {"correction_low": 0.5, "correction_high": 20.0}
    want = gradient({}, 32, 9, correction=correction, **edges)[0]
    assert want.loss != whole[0].loss
    got = gradient({}, 64, 2, correction=correction, **edges)[0]
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_the_sampler_is_compared_with_the_policy_that_it_sampled_from(whole):
    """What a step's earlier updates changed is the ratio's to correct, not the mismatch's."""
    sampler = "sampler_logprob"
    given = [
        dataclasses.replace(d, channels=d.channels | {"old_logprob": d.channels[sampler]})
        for d in documents()
    ]
    edges = {"correction_low": 0.99, "correction_high": 1.01}
    masked = gradient({}, 32, 9, given=given, correction="token_mask", **edges)[0]
    plain = gradient({}, 32, 9, given=given, correction="none")[0]
    assert masked.loss == plain.loss != whole[0].loss


def test_each_device_holds_its_part_of_parameters_moments_and_gradients():
    """By hand: matrices lie on fsdp, context and tensor, norms on the first two, biases on the
    last; a tensor that a program silently replicates makes a device hold more.
    """
    mesh = sharding.make_mesh({"fsdp": 2, "context": 2, "tensor": 2})
    adamw = optimizer.make_optimizer(OptimizerConfig(), 10)
    with jax.set_mesh(mesh):
        step = train.make_train_step(None, adamw, lambda _: 1e-6, MODEL, mesh, ())
        create = jax.jit(
            lambda: qwen2.init_params(MODEL, jax.random.key(1)),
            out_shardings=qwen2.param_shardings(MODEL, mesh),
        )
        sums = step.zeros()
        state, _ = step.apply(train.init_state(create(), adamw), sums)
    matrices = 128 * 32 + 2 * (2 * 32 * 8 * 8 + 2 * 32 * 4 * 8 + 3 * 32 * 48)
    norms, biases = 32 + 2 * 2 * 32, 2 * (8 * 8 + 2 * 4 * 8)
    held = matrices // 8 + norms // 4 + biases // 2
    for tree, copies in ((state.params, 1), (state.opt_state, 2), (sums.grads, 1)):
        arrays = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]
        for number in range(8):
            parts = [leaf.addressable_shards[number].data.size for leaf in arrays]
            assert sum(parts) == copies * held


def test_gradients_are_added_where_their_sums_lie():
    """A micro-batch holds no second tree of gradients beside the sums that it adds to."""
    model = dataclasses.replace(MODEL, layers=32, mlp=512)
    config = RlConfig(policy="", prompts="")
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    adamw = optimizer.make_optimizer(OptimizerConfig(), 10)
    loss_fn = functools.partial(policy_loss, model=model, config=config)
    integers, floats = (jax.ShapeDtypeStruct((1, 2), t) for t in (jnp.int32, jnp.float32))
    batch = dict.fromkeys(("token", "target", "position", "segment"), integers) | dict.fromkeys(
        ("weight", "advantage", "sampler_logprob"), floats
    )
    with jax.set_mesh(mesh):
        step = train.make_train_step(loss_fn, adamw, lambda _: 1e-6, model, mesh, SUMS)
        params, sums = train.abstract_params(model, mesh), jax.eval_shape(step.zeros)
        memory = step.accumulate.lower(params, sums, batch).compile().memory_analysis()
    one_tree = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    assert one_tree > 6e6
    assert memory.temp_size_in_bytes < one_tree / 4


def test_rows_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="axis 'batch' of size 3 is not a multiple"):
        gradient({"fsdp": 8}, 32, 3)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    adamw = optimizer.make_optimizer(OptimizerConfig(), 10)
    with jax.set_mesh(mesh):
        step = train.make_train_step(None, adamw, lambda _: 1e-6, MODEL, mesh, ())
        create = jax.jit(
            lambda: qwen2.init_params(MODEL, jax.random.key(1)),
            out_shardings=qwen2.param_shardings(MODEL, mesh),
        )
        state = train.init_state(create(), adamw)
        before = jax.device_get(state)
        sums = step.zeros()
        sums.grads["layers"]["q"] = sums.grads["layers"]["q"].at[0, 0].set(bad)
        state, metrics = step.apply(state, sums)
    assert not metrics["optimizer/finite"]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)
