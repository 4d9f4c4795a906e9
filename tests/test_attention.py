import functools

import jax
import jax.numpy as jnp
import numpy as np
import paged_rows
import pytest

from vibejax import attention, sharding
from vibejax.kernels import reference, tiles

# Two rows of packed documents. Row 0 ends in padding; row 1 holds its three documents in pieces
# and out of order, as a row cut over the `context` axis does.
SEGMENT_BT = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0], [3, 1, 1, 2, 3, 3, 1, 2, 1, 2, 3, 1]])
POSITION_BT = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3], [2, 4, 0, 2, 0, 3, 1, 0, 2, 1, 1, 3]])

attend = jax.jit(attention.attention)


def inputs(H=4, K=2, D=6, dtype=np.float32):
    random = np.random.default_rng(0)
    shapes = [(*SEGMENT_BT.shape, heads, D) for heads in (H, K, K)]
    return [random.standard_normal(shape).astype(dtype) for shape in shapes]


def by_loops(q_BTHD, k_BTKD, v_BTKD, position_BT, segment_BT):
    """The definition, one query at a time in float64."""
    q_BTHD, k_BTKD, v_BTKD = (x.astype(np.float64) for x in (q_BTHD, k_BTKD, v_BTKD))
    B, T, H, D = q_BTHD.shape
    out_BTHD = np.zeros((B, T, H, D))
    for b, t, h in np.ndindex(B, T, H):
        if segment_BT[b, t] == 0:
            continue
        k = h // (H // k_BTKD.shape[2])
        seen = (segment_BT[b] == segment_BT[b, t]) & (position_BT[b] <= position_BT[b, t])
        score_S = k_BTKD[b, seen, k] @ q_BTHD[b, t, h] / D**0.5
        weight_S = np.exp(score_S - score_S.max())
        out_BTHD[b, t, h] = weight_S @ v_BTKD[b, seen, k] / weight_S.sum()
    return out_BTHD


def test_by_hand():
    """One head of one dimension: keys ln 1, ln 2, ln 5 and q = 1 give weights 1, 2, 5.

    Values 8, 4, 16: token 0 sees 8; token 1 (8 + 2 * 4) / 3; token 2 (8 + 2 * 4 + 5 * 16) / 8.
    """
    q_BTHD = np.ones((1, 3, 1, 1), np.float32)
    k_BTKD = np.log(np.array([1, 2, 5], np.float32)).reshape(1, 3, 1, 1)
    v_BTKD = np.array([8, 4, 16], np.float32).reshape(1, 3, 1, 1)
    out = attend(q_BTHD, k_BTKD, v_BTKD, np.arange(3)[None], np.ones((1, 3), int))
    np.testing.assert_allclose(out[0, :, 0, 0], [8, 16 / 3, 12], rtol=1e-6)


@pytest.mark.parametrize("H, K", [(4, 4), (4, 2), (4, 1)])
def test_equals_the_definition(H, K):
    args = inputs(H, K)
    got = attend(*args, POSITION_BT, SEGMENT_BT)
    np.testing.assert_allclose(got, by_loops(*args, POSITION_BT, SEGMENT_BT), atol=2e-6)


def test_bfloat16_keeps_its_type_and_softmaxes_in_float32():
    args = inputs(dtype=jnp.bfloat16)
    got = attend(*args, POSITION_BT, SEGMENT_BT)
    assert got.dtype == jnp.bfloat16
    want = by_loops(*args, POSITION_BT, SEGMENT_BT)
    np.testing.assert_allclose(got.astype(np.float32), want, atol=2e-2)


def test_documents_do_not_leak():
    """Changing every token of document 1 leaves all others bit-identical."""
    args = inputs()
    before = attend(*args, POSITION_BT, SEGMENT_BT)
    other = SEGMENT_BT != 1
    changed = [np.where(other[..., None, None], x, np.float32(7)) for x in args]
    after = attend(*changed, POSITION_BT, SEGMENT_BT)
    np.testing.assert_array_equal(after[other], before[other])


def test_the_future_does_not_leak():
    """Changing every token at position 2 leaves what comes before it bit-identical."""
    args = inputs()
    before = attend(*args, POSITION_BT, SEGMENT_BT)
    changed = [np.where((POSITION_BT == 2)[..., None, None], np.float32(7), x) for x in args]
    after = attend(*changed, POSITION_BT, SEGMENT_BT)
    earlier = POSITION_BT < 2
    np.testing.assert_array_equal(after[earlier], before[earlier])
    assert np.any(after[1, SEGMENT_BT[1] > 0] != before[1, SEGMENT_BT[1] > 0])


def test_padding_is_zero_and_gets_no_gradient():
    args = inputs()
    pad = SEGMENT_BT == 0

    def total(q, k, v):
        out = attention.attention(q, k, v, POSITION_BT, SEGMENT_BT)
        return jnp.sum(jnp.sin(out)), out

    grads, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*args)
    np.testing.assert_array_equal(out[pad], 0.0)
    for g in grads:
        np.testing.assert_array_equal(g[pad], 0.0)
        assert np.all(np.isfinite(g))


def test_the_order_of_tokens_in_a_row_plays_no_part():
    args = inputs()
    order = np.random.default_rng(1).permutation(SEGMENT_BT.shape[1])
    straight = attend(*args, POSITION_BT, SEGMENT_BT)
    moved = attend(*(x[:, order] for x in args), POSITION_BT[:, order], SEGMENT_BT[:, order])
    np.testing.assert_allclose(moved, straight[:, order], atol=1e-6)


@pytest.mark.parametrize(
    "sizes",
    [{"context": 4, "tensor": 2}, {"fsdp": 2, "context": 2, "tensor": 2}],
    ids=str,
)
def test_meshes_equal_one_device(sizes):
    args = (*inputs(), POSITION_BT, SEGMENT_BT)
    mesh = sharding.make_mesh(sizes)
    axes = [("batch", "length", name, None) for name in ("heads", "kv_heads", "kv_heads")]
    axes += [("batch", "length")] * 2
    shardings = [sharding.sharding(mesh, x.shape, *a) for x, a in zip(args, axes, strict=True)]
    with jax.set_mesh(mesh):
        run = jax.jit(attention.attention, out_shardings=shardings[0])
        got = run(*jax.device_put(args, tuple(shardings)))
    assert len(got.sharding.device_set) == 8
    np.testing.assert_allclose(got, attend(*args), atol=1e-6)


def test_head_counts_must_divide():
    q, k, v = inputs(H=4, K=3)
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3 key/value heads"):
        attention.attention(q, k, v, POSITION_BT, SEGMENT_BT)


def test_keys_and_values_must_be_alike():
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"keys \(2, 12, 2, 6\) and values \(2, 11, 2, 6\) differ"):
        attention.attention(q, k, v[:, 1:], POSITION_BT, SEGMENT_BT)


IN_ORDER = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0], [1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3]])
IN_ORDER_POSITION = np.array(
    [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4, 5, 6, 0, 1, 2]]
)


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "context": 2, "tensor": 2}], ids=str)
def test_xla_equals_the_reference_on_every_mesh(sizes):
    """Outputs and gradients, with queries cut over `context` and heads over `tensor`."""

    def run(implementation, args):
        def total(q, k, v):
            out = attention.attention(q, k, v, IN_ORDER_POSITION, IN_ORDER, implementation)
            return jnp.sum(jnp.sin(out)), out

        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*args)

    want = run("reference", inputs())
    mesh = sharding.make_mesh(sizes, jax.devices()[: 8 if sizes else 1])
    with jax.set_mesh(mesh):
        got = run("xla", inputs())
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, atol=2e-6)


def test_rows_in_another_order_are_put_back_for_the_keys():
    """Outputs and gradients, as `packing.spread` may lay a row over two context shards."""
    place = np.r_[6:12, 0:6]

    def run(args, ids, *options):
        def total(q, k, v):
            out = attention.attention(q, k, v, *ids, *options)
            return jnp.sum(jnp.sin(out)), out

        return jax.tree.leaves(jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*args))

    want = run(inputs(), (IN_ORDER_POSITION, IN_ORDER), "reference")
    moved = [x[:, place] for x in inputs()]
    ids = IN_ORDER_POSITION[:, place], IN_ORDER[:, place]
    with jax.set_mesh(sharding.make_mesh({"context": 2, "tensor": 2}, jax.devices()[:4])):
        got = run(moved, ids, "xla", np.broadcast_to(place, (2, 12)))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, np.asarray(w)[:, place], atol=2e-6)


def test_a_cpu_takes_the_implementation_that_holds_no_scores():
    args = (*inputs(), IN_ORDER_POSITION, IN_ORDER)
    assert "custom_vjp_call" in str(jax.make_jaxpr(lambda *a: attention.attention(*a))(*args))
    by_name = attention.attention(*args, implementation="reference")
    np.testing.assert_allclose(attention.attention(*args), by_name, atol=2e-6)


@pytest.mark.parametrize(
    "H, D, dtypes, message",
    [
        (4, 80, [np.float32] * 3, "head dimension 80: must be a multiple of 64, at most 256"),
        (4, 320, [np.float32] * 3, "head dimension 320"),
        (4, 64, [np.float32, jnp.bfloat16, np.float32], r"dtypes \['bfloat16', 'float32'\]: must"),
        (34, 64, [np.float32] * 3, "17 query heads a key/value head: must be at most 16"),
    ],
)
def test_what_the_tpu_kernels_cannot_take_is_named(H, D, dtypes, message):
    arrays = [x.astype(d) for x, d in zip(inputs(H, 2, D), dtypes, strict=True)]
    with pytest.raises(ValueError, match=message):
        attention.attention(*arrays, IN_ORDER_POSITION, IN_ORDER, "tpu_interpreted")


@pytest.mark.parametrize(
    "implementation, segment, message",
    [
        ("tpu", IN_ORDER, "attention 'tpu': the mesh's devices are none"),
        ("gpu", IN_ORDER, "attention 'gpu': the mesh's devices are none"),
        ("cudnn", IN_ORDER, "'cudnn': must be rows of one document each"),
        ("cudnn", None, "attention 'cudnn': the mesh's devices are none"),
    ],
)
def test_an_implementation_for_other_devices_is_refused(implementation, segment, message):
    with pytest.raises(ValueError, match=message):
        attention.attention(*inputs(), IN_ORDER_POSITION, segment, implementation)


def test_cudnn_gets_the_heads_and_rows_of_each_device(monkeypatch):
    """cuDNN itself is not here: XLA computes what it is asked for."""
    asked, plain = [], jax.nn.dot_product_attention

    def attend(q, k, v, *, is_causal, implementation):
        asked.append((implementation, q.shape, k.shape))
        return plain(q, k, v, is_causal=is_causal)

    monkeypatch.setattr(attention, "_device", lambda: ("NVIDIA H100 80GB HBM3", "gpu"))
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    position = np.broadcast_to(np.arange(12), (2, 12))
    with jax.set_mesh(sharding.make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])):
        run = jax.jit(lambda *args: attention.attention(*args, position, None, "cudnn"))
        got = run(*inputs(4, 2, 64))
    assert asked == [("cudnn", (1, 12, 2, 64), (1, 12, 1, 64))]
    want = reference.attention(*inputs(4, 2, 64), *(position, position * 0 + 1) * 2)
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize(
    "kind, platform, kernel",
    [
        ("TPU v5 lite", "tpu", "tpu"),
        ("TPU v6 lite", "tpu", "tpu"),
        ("TPU v3", "tpu", None),  # no tiles for it
        ("NVIDIA H100 80GB HBM3", "gpu", "gpu"),
        ("cpu", "cpu", None),
        ("", "", None),
    ],
)
def test_kernels_go_by_the_devices_of_the_mesh(kind, platform, kernel):
    assert attention._kernel(kind, platform) == kernel


@pytest.mark.parametrize(
    "kind, capability",
    [("NVIDIA H100 80GB HBM3", 9), ("NVIDIA H20", 9), ("NVIDIA GH200 480GB", 9), ("NVIDIA B200", 9),
     ("NVIDIA A100-SXM4-80GB", 8), ("NVIDIA L4", 8)],
)  # fmt: skip
def test_gpus_take_the_tiles_of_their_matrix_instructions(kind, capability):
    assert tiles.gpu_capability(kind) == capability


def test_kernels_run_interpreted_on_request():
    args = (*inputs(4, 2, 64), IN_ORDER_POSITION)
    want = attention.attention(*args, IN_ORDER, "reference")
    for implementation in ("tpu_interpreted", "gpu_interpreted"):
        got = attention.attention(*args, IN_ORDER, implementation)
        np.testing.assert_allclose(got, want, atol=2e-6)


def test_rows_without_segments_are_one_document_each():
    position = np.broadcast_to(np.arange(12), (2, 12))
    want = attention.attention(*inputs(), position, np.ones((2, 12), np.int32))
    np.testing.assert_array_equal(attention.attention(*inputs(), position, None), want)


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("shared", [None, (1, 0)], ids=["plain", "prefix"])
def test_paged_attention_on_every_mesh(sizes, shared):
    """Each device of `data` has its own half of the pages, which its table counts from 0."""
    cases = [paged_rows.case((40, 36, 0, 33), shared=shared, seed=seed) for seed in (0, 1)]
    want = np.concatenate([reference.paged_attention(*case[:4]) for case in cases])
    joined = jax.tree.map(lambda *x: jnp.concatenate(x), *(case[:5] for case in cases))
    if sizes:
        with jax.set_mesh(sharding.make_mesh(sizes, jax.devices()[:4])):
            got = jax.jit(lambda *a: attention.paged_attention(*a, group=cases[0].group))(*joined)
    else:
        run = functools.partial(attention.paged_attention, group=cases[0].group)
        got = np.concatenate([run(*case[:5]) for case in cases])
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("implementation", ["reference", "tpu_interpreted", "gpu_interpreted"])
def test_paged_attention_by_name(implementation):
    case = paged_rows.case((40, 36, 0, 33))
    want = attention.paged_attention(*case[:4])
    got = attention.paged_attention(*case[:4], implementation=implementation)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_paged_attention_refuses_what_does_not_fit():
    case = paged_rows.case((40, 36))
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        attention.paged_attention(case.q_BTHD[:, :, :3], *case[1:4])
    with pytest.raises(ValueError, match="attention 'tpu': the mesh's devices are none"):
        attention.paged_attention(*case[:4], implementation="tpu")
    with pytest.raises(ValueError, match="'cudnn': must be tpu, gpu, xla or reference over pages"):
        attention.paged_attention(*case[:4], implementation="cudnn")
    odd = paged_rows.case((9, 7), s=10)
    with pytest.raises(ValueError, match="pages of 10 tokens of float32: must be a multiple of 8"):
        attention.paged_attention(*odd[:4], implementation="tpu_interpreted")
