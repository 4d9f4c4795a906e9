"""The TPU kernel of paged attention: interpreted with races and unwritten memory detected.

Blocks are as small as they can be, so that a short sequence has several.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import strict_kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # has no public name for races
from jax.experimental.pallas import tpu as pltpu
from packed_rows import kernel_products
from paged_rows import HEADS, PREFIXED, RAGGED, case, check

from vibejax.kernels import decode_attention_tpu
from vibejax.kernels import pages as pages_
from vibejax.kernels.decode_attention_tpu import Blocks

STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def kernel(blocks=Blocks(pages=2, buffers=3), interpret=STRICT):  # noqa: B008 - a constant
    settings = {"blocks": blocks, "interpret": interpret}
    attend = functools.partial(decode_attention_tpu.paged_attention, **settings)
    attend = jax.jit(attend, static_argnames="group")
    return lambda q, pages, table, length, shared=None, group=1: attend(
        q, pages, table, length, shared, group=group
    )


TILED = kernel()
FAST = kernel(interpret=True)  # wide sweeps; races and unwritten memory go unseen
CASES = {
    "wide": [(dict(T=T, H=H, K=K, D=D), 2e-6) for T, (H, K, D) in ((1, HEADS[0]), (3, HEADS[2]))],
    "narrow": [
        (dict(T=3, dtype=jnp.bfloat16), 2e-2),
        (dict(T=3, int8=True, s=32, M=3), 2e-6),
        (dict(int8=True, s=128, M=1), 2e-6),
    ],
}


def run_strictly(group):
    """The cases of a group; the interpreter's own bookkeeping says whether anything raced."""
    if group == "prefix":
        check(TILED, case(**PREFIXED), 2e-6)
    elif group == "bytes":
        copied = count_bytes()
        for some in (case(RAGGED, D=128), case(**PREFIXED, T=3, D=128, s=32, int8=True)):
            copied.clear()
            check(TILED, some, 2e-6)
            assert sum(copied) == decode_attention_tpu.bytes_copied(*some)
    else:
        for change, tolerance in CASES[group]:
            check(TILED, case(RAGGED, **change), tolerance)
    assert not interpret_pallas_call.races.races_found


def count_bytes():
    """A list that the bytes of every copy are appended to."""
    copied, execute = [], interpret_pallas_call.DMA.execute_read

    def counted(dma):
        fresh = dma.data is None
        execute(dma)
        if fresh:
            copied.append(dma.data_size)

    interpret_pallas_call.DMA.execute_read = counted
    return copied


@pytest.mark.parametrize("group", [*CASES, "prefix", "bytes"])
def test_equals_the_reference_without_races(group):
    strict_kernels.run_in_a_process(__file__, group)


@given(
    st.lists(st.integers(0, 64), min_size=4, max_size=4),
    st.tuples(st.integers(0, 4), st.integers(0, 4)),
    st.integers(0, 99),
)
@settings(max_examples=10, deadline=None)
def test_any_layout_equals_the_reference(lengths, shared, seed):
    check(FAST, case(lengths, M=4, shared=shared, seed=seed), 2e-6)


PLAN = jax.jit(decode_attention_tpu._plan, static_argnums=(2, 3))


@given(st.lists(st.integers(0, 99), min_size=6, max_size=6), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_the_plan_holds_every_block_once(lengths, count):
    """Both workers together, in order, and neither more than half and one sequence."""
    tokens_I = jnp.array(lengths)
    plan = PLAN(jnp.zeros_like(tokens_I), tokens_I, 8, 20, count)
    blocks_I = np.ceil(np.ceil(np.array(lengths) / 8) / count).astype(int)
    places = [np.arange(*x) for x in zip(plan.first_W, plan.last_W, strict=True)]
    items = [np.asarray(plan.item_I)[place] for place in places]
    np.testing.assert_array_equal(np.concatenate(items), np.flatnonzero(blocks_I))
    assert [blocks_I[item].sum() for item in items] == list(plan.blocks_W)
    assert max(plan.blocks_W) <= blocks_I.sum() / 2 + blocks_I.max()


def shapes(dtype, T=1, B=8, s=64, group=1, P=64, M=1_024, H=16, K=2, D=128):
    """Arguments of a 64K context."""
    array = jax.ShapeDtypeStruct
    pages = jax.eval_shape(functools.partial(pages_.empty, P, K, s, D, dtype))
    q_dtype = jnp.float32 if dtype == jnp.float32 else jnp.bfloat16
    args = [array((B, T, H, D), q_dtype), pages, array((B, M), jnp.int32), array((B,), jnp.int32)]
    return [*args, array((B // group,), jnp.int32)] if group > 1 else args


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("s, D, group, T", [(64, 128, 1, 1), (128, 64, 8, 4), (32, 256, 1, 4)])
def test_lowers_for_a_tpu_without_one(dtype, s, D, group, T):
    attend = functools.partial(decode_attention_tpu.paged_attention, group=group)
    args = shapes(dtype, T=T, s=s, D=D, group=group)
    text = jax.export.export(jax.jit(attend), platforms=["tpu"])(*args).mlir_module()
    assert text.count('kernel_name = "paged_attention"') == (2 if group > 1 else 1)
    products = kernel_products(jax.make_jaxpr(attend)(*args).jaxpr)
    exact = (jax.lax.Precision.HIGHEST,) * 2
    assert len(products) >= 2
    for product in products:
        floats = {x.aval.dtype.name for x in product.invars}
        assert floats == {"bfloat16"} or product.params["precision"] == exact


@pytest.mark.parametrize("s", [64, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("lengths", ["64K", "ragged"])
def test_copies_little_but_live_tokens(lengths, dtype, s):
    """At most 1.05 times the bytes of live keys, values, queries and outputs."""
    random = np.random.default_rng(0)
    ragged = np.clip(random.lognormal(np.log(6_000), 1.0, 256), 1, 65_536).astype(int)
    length_B = jnp.array([65_536] * 256 if lengths == "64K" else ragged)
    q, pages, table, _ = shapes(dtype, B=256, s=s, M=65_536 // s)
    token = 2 * 2 * 128 * pages.kv_PKsC.dtype.itemsize + (16 if dtype == jnp.int8 else 0)
    needed = int(length_B.sum()) * token + 2 * q.size * 2
    assert decode_attention_tpu.bytes_copied(q, pages, table, length_B) <= 1.05 * needed


def test_a_common_prompt_is_read_once():
    q, pages, table, _, shared = shapes(jnp.bfloat16, B=64, group=16)
    args = (q, pages, table, jnp.full(64, 1_024 + 100))
    alone = decode_attention_tpu.bytes_copied(*args)
    together = decode_attention_tpu.bytes_copied(*args, jnp.full(shared.shape, 16), 16)
    pages_each = 64 * 18, 4 * 16 + 64 * 2
    assert alone > pages_each[0] * 64 * 1_024
    assert together < 1.25 * pages_each[1] * 64 * 1_024


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(s=8), "pages of 8 tokens of bfloat16: must be a multiple of 16"),
        (dict(s=96, dtype=jnp.int8), "int8 pages of 96 tokens: must be 32, 64 or a multiple of"),
        (dict(D=96), "head dimension 96: must be 64, 128 or 256"),
        (dict(M=40_000), "40000 pages a sequence: must be at most 32768"),
        (dict(T=4_096), "32768 query rows a key/value head, 4096 tokens, 8 heads, groups of 1"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    args = shapes(**{"dtype": jnp.bfloat16} | change)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(decode_attention_tpu.paged_attention, *args)


if __name__ == "__main__":
    run_strictly(sys.argv[1])
