"""The GPU kernels against the reference, interpreted, and lowered for CUDA without a GPU.

Tiles are as small as Triton allows and differ from kernel to kernel, so that a short row has many.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.lib.mlir import ir  # has no public name: reads the kernels within a lowered program
from jax._src.pallas.triton.lowering import _new_ir_context
from packed_rows import check, inputs, out_and_grads, row_ids

from vibejax.kernels import flash_attention_gpu
from vibejax.kernels.flash_attention_gpu import Tile, Tiles, tiles_for

SMALL = Tiles(forward=Tile(16, 32), dq=Tile(32, 16), dkv=Tile(16, 16))
T = 77  # not whole tiles


def attend(*args):
    return flash_attention_gpu.attention(*args, SMALL, True)


def test_equals_the_reference_in_bfloat16():
    arrays = inputs(T, 2, 2, 128, jnp.bfloat16)
    check(attend, arrays, row_ids([5, 1, 40, 3, 20], T, 4), 2e-2)


@pytest.mark.parametrize(
    ("lengths", "front"), [([1] * 50, 5), ([], 0), ([T], 0), ([3, 20], 9), ([32, 16, 29], 0)]
)
def test_layouts(lengths, front):
    check(attend, inputs(T, D=64), row_ids(lengths, T, front), 2e-6)


@given(st.lists(st.integers(1, 30), max_size=50), st.integers(0, 20), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_any_layout_equals_the_reference(lengths, front, seed):
    ends = np.cumsum([front, *lengths])
    lengths = [n for n, end in zip(lengths, ends[1:], strict=True) if end <= T]
    check(attend, inputs(T, D=64, seed=seed), row_ids(lengths, T, front), 2e-6)


def test_eight_heads_a_key_head_in_two_rows():
    rows = [row_ids([40], 40), row_ids([22, 3], 40, 4)]
    ids = tuple(np.concatenate(x) for x in zip(*rows, strict=True))
    both = zip(inputs(40, 8, 1, 64), inputs(40, 8, 1, 64, seed=1), strict=True)
    arrays = [np.concatenate(x) for x in both]
    check(attend, arrays, ids, 2e-6)


def test_padding_is_zero_and_gets_no_gradient():
    ids = row_ids([20, 9], T, 13)
    for x in out_and_grads(attend, inputs(T, D=64), ids):
        assert not np.asarray(x)[ids[1] == 0].any()


CHUNKS = {
    "one": np.r_[16:64],
    "two": np.r_[0:16, 32:64],
    "out of order": np.r_[48:64, 0:16, 32:48],  # keys 16 to 31: of three tiles the second is blind
}


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
def test_chunks_of_queries_are_those_parts_of_the_row(chunk):
    """Outputs bit for bit; gradients as the reference has them for the chunks alone."""
    (q, *keys), (position, segment, *_) = inputs(T, D=64), row_ids([64, 4, 9], T)
    whole, *_ = out_and_grads(attend, [q, *keys], (position, segment, position, segment))
    arrays = [q[:, chunk], *keys]
    ids = (position[:, chunk], segment[:, chunk], position, segment)
    part, *_ = out_and_grads(attend, arrays, ids)
    np.testing.assert_array_equal(part, np.asarray(whole)[:, chunk])
    check(attend, arrays, ids, 2e-6)


def test_documents_do_not_touch_each_other():
    """Changing document 2 leaves every output and gradient of the others bit-identical."""
    arrays, ids = inputs(T, D=64), row_ids([13, 10, 41], T)
    others = ids[1] != 2
    changed = [np.where(others[..., None, None], x, np.float32(50)) for x in arrays]
    before, after = (out_and_grads(attend, x, ids) for x in (arrays, changed))
    for b, a in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.asarray(b)[others], np.asarray(a)[others])


def test_tiles_of_other_documents_are_not_computed():
    """A tile of NaN that entered any product, were it times zero, would leave its trace."""
    arrays, ids = inputs(T, D=64), row_ids([32, 32, 13], T)
    others = ids[1] != 2
    spoiled = [np.where(others[..., None, None], x, np.float32(np.nan)) for x in arrays]
    before, after = (out_and_grads(attend, x, ids) for x in (arrays, spoiled))
    for b, a in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.asarray(b)[others], np.asarray(a)[others])


def test_tiles_of_later_keys_are_not_computed():
    (q, *keys), (position, segment, *_) = inputs(T, D=64), row_ids([T], T)
    for x in keys:
        x[:, 64:] = np.nan
    ids = (position[:, 16:64], segment[:, 16:64], position, segment)
    out, dq, dk, dv = map(np.asarray, out_and_grads(attend, [q[:, 16:64], *keys], ids))
    for x in (out, dq, dk[:, :64], dv[:, :64]):
        assert np.isfinite(x).all()
        assert x.any()
    assert not dk[:, 64:].any()
    assert not dv[:, 64:].any()


def shapes(D, dtype, T=4096):
    arrays = [jax.ShapeDtypeStruct((1, T, heads, D), dtype) for heads in (16, 2, 2)]
    return arrays, [jax.ShapeDtypeStruct((1, T), jnp.int32)] * 4


def cuda_kernels(function, *args):
    """The text of a program's kernels, which lie in it as bytecode when lowered for CUDA.

    Not of those whose results nothing uses: XLA drops them.
    """
    lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
    kernels = []

    def visit(op):
        used = any(True for result in op.results for _ in result.uses)
        if used and "mhlo.backend_config" in op.attributes:
            kernels.append(ir.StringAttr(op.attributes["mhlo.backend_config"]["ir"]).value_bytes)
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    with _new_ir_context():
        return [str(ir.Module.parse(kernel)) for kernel in kernels]


@pytest.mark.parametrize("capability", [8, 9])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("D", [64, 128, 256])
def test_lowers_for_cuda_without_a_gpu(D, dtype, capability):
    """Triton takes all three kernels, and no float32 product becomes one of tf32."""
    arrays, ids = shapes(D, dtype)
    tiles = tiles_for(*arrays, capability)
    run = functools.partial(
        out_and_grads.__wrapped__, lambda *args: flash_attention_gpu.attention(*args, tiles)
    )
    kernels = cuda_kernels(run, arrays, ids)
    assert len(kernels) == 3
    for name, products in (("forward", 2), ("dq", 3), ("dkv", 4)):
        [kernel] = [text for text in kernels if f"@_flash_attention_{name}(" in text]
        # Three loops: masked tiles, full ones, masked ones.
        assert kernel.count("tt.dot") == 3 * products
        assert kernel.count("scf.for") == 3
    if dtype == jnp.float32:
        assert not any("tf32" in text for text in kernels)


def test_rematerialization_can_keep_what_the_backward_pass_needs():
    names = ("attention_output", "attention_logsumexp")
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    def loss(arrays, ids):
        tiles = tiles_for(*arrays, 9)
        kept = jax.checkpoint(
            lambda *a: flash_attention_gpu.attention(*a, *ids, tiles), policy=policy
        )
        return jnp.sum(jnp.sin(kept(*arrays)))

    assert len(cuda_kernels(jax.grad(loss), *shapes(128, jnp.bfloat16))) == 3


@pytest.mark.parametrize(
    ("dtypes", "D", "message"),
    [
        (("bfloat16", "float32", "bfloat16"), 64, r"dtypes \['bfloat16', 'float32'\]: must be all"),
        (("float16",) * 3, 64, r"dtypes \['float16'\]: must be all"),
        (("float32",) * 3, 80, "head dimension 80: must be 64, 128 or 256"),
    ],
)
def test_refuses_what_it_cannot_take(dtypes, D, message):
    arrays = [jax.ShapeDtypeStruct((1, 64, 2, D), dtype) for dtype in dtypes]
    with pytest.raises(ValueError, match=message):
        tiles_for(*arrays, 9)
