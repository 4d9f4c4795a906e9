"""The TPU kernels against the reference: interpreted with races and unwritten memory detected.

Tiles are as small as the interpreter allows, so that a short row has many.
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
from packed_rows import check, inputs, kernel_products, out_and_grads, row_ids

from vibejax.kernels import flash_attention_tpu, reference
from vibejax.kernels.tiles import Tile, TpuTiles, check_vmem, tpu_tiles
from vibejax.sharding import CONTEXT_CHUNK

STRICT = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def kernel(forward=(8, 16), backward=(16, 8), interpret=STRICT):
    tiles = TpuTiles(Tile(*forward), Tile(*backward), vmem_bytes=2**24)

    def attend(*args):
        return flash_attention_tpu.attention(*args, tiles, interpret)

    return attend


TILED = kernel()
FAST = kernel(interpret=True)  # wide sweeps; races and unwritten memory go unseen


HEADS = ((2, 2, 64), (4, 2, 64), (8, 1, 128))  # H, K, D
LAYOUTS = (([1] * 30, 5), ([], 0), ([40], 0), ([3, 20], 9))  # lengths, padding before them


def run_strictly(group):
    """The cases of a group; the interpreter's own bookkeeping says whether anything raced."""
    if group == "layouts":
        for lengths, front in LAYOUTS:
            check(TILED, inputs(40, D=64), row_ids(lengths, 40, front), 2e-6)
    elif group == "float32":
        for H, K, D in HEADS:
            check(TILED, inputs(29, H, K, D), row_ids([5, 1, 17, 3], 29), 2e-6)
    else:
        check(TILED, inputs(29, D=64, dtype=jnp.bfloat16), row_ids([5, 1, 17, 3], 29), 2e-2)
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("group", ["float32", "bfloat16", "layouts"])
def test_equals_the_reference_without_races(group):
    strict_kernels.run_in_a_process(__file__, group)


@pytest.mark.parametrize("H, K, D", HEADS[::2])
def test_heads_in_bfloat16(H, K, D):
    check(FAST, inputs(29, H, K, D, jnp.bfloat16), row_ids([5, 1, 17, 3], 29), 2e-2)


def test_fifty_documents_in_a_row():
    check(FAST, inputs(81, D=64), row_ids([1, 3, 1, 2, 1] * 10, 81), 2e-6)


@given(st.lists(st.integers(1, 12), max_size=6), st.integers(0, 9), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_any_layout_equals_the_reference(lengths, front, seed):
    check(FAST, inputs(81, D=64, seed=seed), row_ids(lengths, 81, front), 2e-6)


def test_query_tiles_that_straddle_key_tiles_are_right_too():
    """Their first tile gives not every row a reference; the chips' own tiles avoid it."""
    check(kernel((32, 16), (16, 8), True), inputs(96, D=64), row_ids([50, 40], 96), 2e-6)


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize("group", range(1, 17))
def test_tiles_of_the_chips(chip, group):
    """Each query tile lies in one key tile and in one chunk of a row cut over `context`."""
    for dtype in ("bfloat16", "float32"):
        for head_dim in (64, 128, 192, 256):
            if chip == "v4" and head_dim > 128 and group > 8:
                continue  # some of them do not fit, whatever the tile
            tiles = tpu_tiles(chip, dtype, head_dim, group)
            check_vmem(tiles, dtype, head_dim, group)
            for tile in (tiles.forward, tiles.backward):
                assert tile.key % tile.query == 0 and CONTEXT_CHUNK % tile.query == 0


def test_tiles_that_do_not_fit_are_named():
    tiles = TpuTiles(Tile(256, 512), Tile(256, 1024), 14 * 2**20)
    message = "backward tile of 256 x 1024 tokens, 8 query heads of 128, bfloat16: needs 3.* MiB"
    with pytest.raises(ValueError, match=message):
        check_vmem(tiles, "bfloat16", 128, 8)
    with pytest.raises(ValueError, match="no tiles for chip 'v3'"):
        tpu_tiles("v3", "bfloat16", 128, 8)


def test_scores_far_above_those_of_the_queries_own_keys():
    """Their weights overflow beside the reference of the row, which is done again, and it alone."""
    q, k, v = inputs(70, D=64)
    q, k = np.abs(q), np.abs(k) * np.float32(0.01)
    k[:, 2] = 12.5  # scores near 80 at one key, below one at all others
    ids = row_ids([60, 10], 70)
    check(FAST, [x.astype(jnp.bfloat16) for x in (q, k, v)], ids, 2e-2)
    want, *_ = out_and_grads(reference.attention, [q, k, v], ids)
    out, *_ = out_and_grads(FAST, [q, k, v], ids)
    np.testing.assert_allclose(out, want, atol=2e-6)
    k[:, 2] = 0
    calm, *_ = out_and_grads(FAST, [q, k, v], ids)
    np.testing.assert_array_equal(np.asarray(out)[:, 60:], np.asarray(calm)[:, 60:])


def test_two_rows_keep_apart():
    rows = [row_ids([5, 30], 40), row_ids([22, 3], 40, 4)]
    ids = tuple(np.concatenate(x) for x in zip(*rows, strict=True))
    arrays = [np.concatenate(x) for x in zip(inputs(40), inputs(40, seed=1), strict=True)]
    check(FAST, arrays, ids, 2e-6)


def test_a_chunk_of_queries_is_that_part_of_the_row():
    arrays, whole_ids = inputs(64), row_ids([20, 9, 25], 64)
    position, segment = whole_ids[:2]
    whole, *_ = out_and_grads(FAST, arrays, whole_ids)
    chunk = np.r_[16:32, 48:64]
    ids = (position[:, chunk], segment[:, chunk], position, segment)
    part, *_ = out_and_grads(FAST, [arrays[0][:, chunk], *arrays[1:]], ids)
    np.testing.assert_array_equal(part, whole[:, chunk])


def test_documents_do_not_touch_each_other():
    """Changing document 2 leaves every output and gradient of the others bit-identical."""
    arrays, ids = inputs(60), row_ids([13, 10, 30], 60)
    others = ids[1] != 2
    changed = [np.where(others[..., None, None], x, np.float32(50)) for x in arrays]
    before, after = (out_and_grads(FAST, x, ids) for x in (arrays, changed))
    for b, a in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.asarray(b)[others], np.asarray(a)[others])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("D", [64, 128, 256])
def test_lowers_for_a_tpu_without_one(D, dtype):
    """Mosaic takes both kernels, and no float32 product in them is left at one bfloat16 pass."""
    attend = kernel((128, 512), (128, 512), interpret=False)
    q, k, v = (jax.ShapeDtypeStruct((1, 4096, heads, D), dtype) for heads in (16, 2, 2))
    ids = (jax.ShapeDtypeStruct((1, 4096), jnp.int32),) * 4
    run = functools.partial(out_and_grads.__wrapped__, attend)
    exported = jax.export.export(jax.jit(run), platforms=["tpu"])((q, k, v), ids)
    products = kernel_products(jax.make_jaxpr(run)((q, k, v), ids).jaxpr)
    assert len(products) == 2 * 2 + 2 * 5  # each kernel has a body with a mask and one without
    exact = (jax.lax.Precision.HIGHEST,) * 2
    for product in products:
        operands = {x.aval.dtype for x in product.invars}
        assert operands == {jnp.dtype(dtype)}
        assert dtype != jnp.float32 or product.params["precision"] == exact
    text = exported.mlir_module()
    assert text.count("flash_attention_forward") >= 1
    assert text.count("flash_attention_backward") >= 1


if __name__ == "__main__":
    run_strictly(sys.argv[1])
