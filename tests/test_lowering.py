"""The model's programs, lowered for a TPU, which is not needed for it.

A TPU multiplies float32 operands at default precision as bfloat16: every product of float32
operands has to ask for more.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from vibejax import attention, decode, qwen2, sampler_copy
from vibejax.kernels.pages import Pages
from vibejax.kernels.row_copies import Copies
from vibejax.losses.logprobs import token_logprobs, token_loss
from vibejax.rope import Rope

CONFIG = qwen2.ModelConfig(
    rope=Rope(theta=1e6),
    layers=2,
    width=256,
    heads=4,
    kv_heads=2,
    head_dim=64,
    mlp=512,
    vocab=1_000,
    context=512,
)
ROWS, TOKENS = 3, 256  # no array without rows has an axis of size 3,
CHUNK = 40  # and none without a chunk of tokens one of size 40
PRODUCT = re.compile(r"stablehlo\.(?:dot_general|dot|convolution)\b.*")
OPERANDS = re.compile(r": \(tensor<([^>]*)>, tensor<([^>]*)>\)")
RESULT = re.compile(r"-> tensor<([^>]*)>")
SUM = re.compile(r"stablehlo\.reduce\(.*applies stablehlo\.add.*: \(tensor<([^>]*)>")


def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def lowered(function, *args):
    """The program for a TPU, as text."""
    return jax.export.export(jax.jit(function), platforms=["tpu"])(*args).mlir_module()


def products(module):
    """Of each matrix product: its text and its operands' types."""
    lines = PRODUCT.findall(module)
    return [(line, *(x.split("x")[-1] for x in OPERANDS.search(line).groups())) for line in lines]


def scopes(function, *args):
    """The names under which a profile shows what the program does."""
    module = jax.jit(function).lower(*args).as_text(debug_info=True)
    stacks = re.findall(r'loc\("([^"]+)"', module)  # such as jit(loss)/jvp(embed)/gather
    return {part for stack in stacks for part in re.split(r"[/()]", stack)}


def rounded(found):
    """Those in which a float32 operand would be rounded to bfloat16."""
    exact = "precision = [HIGHEST, HIGHEST]"
    return [line for line, *types in found if "f32" in types and exact not in line]


def params(dtype):
    return qwen2.map_table(lambda info: array(dtype, *info.shape), CONFIG)


def row():
    return [array(jnp.int32, ROWS, TOKENS)] * 3


def sum_of_terms(logprobs, channels):
    return -jnp.sum(channels["weight"] * logprobs.logprob_BT), {}


def of_single_tokens(*arguments, **settings):
    weight_BT = arguments[3].astype(jnp.float32)
    return token_loss(sum_of_terms, *arguments, {"weight": weight_BT}, **settings)[0]


def of_whole_rows(*arguments, **settings):
    return -jnp.sum(token_logprobs(*arguments, **settings).logprob_BT)


def loss(
    params, token_BT, position_BT, segment_BT, *, dtype, remat, implementation="auto",
    of=of_single_tokens,
):  # fmt: skip
    x_BTE = qwen2.hidden_states(
        params, token_BT, position_BT, segment_BT, CONFIG, dtype=dtype, remat=remat,
        implementation=implementation,
    )  # fmt: skip
    return of(
        x_BTE, qwen2.head(params), token_BT, segment_BT > 0, vocab=CONFIG.vocab, chunk_tokens=CHUNK
    )


@pytest.mark.parametrize(
    "dtype, remat, of",
    [
        ("float32", "none", of_single_tokens),
        ("float32", "none", of_whole_rows),
        ("bfloat16", "none", of_single_tokens),
        ("bfloat16", "attention", of_whole_rows),
        ("bfloat16", "offload", of_single_tokens),
    ],
)
def test_training_rounds_no_float32_operand(dtype, remat, of):
    step = jax.value_and_grad(functools.partial(loss, dtype=dtype, remat=remat, of=of))
    found = products(lowered(step, params(jnp.float32), *row()))
    # A layer has 9, q k v o gate up down, the scores and their use, and the head is another; the
    # backward pass has 2 of each. A loss of whole rows has the head's logits again.
    assert len(found) >= 3 * (9 + 1) + (of is of_whole_rows)
    assert not rounded(found)


@pytest.mark.parametrize("remat, forwards", [("none", 1), ("attention", 1), ("full", 2)])
def test_the_attention_policy_keeps_what_the_kernel_computed(remat, forwards, monkeypatch):
    """Layers are scanned, so each kernel of a layer stands once in the program."""
    monkeypatch.setattr(attention, "_device", lambda: ("TPU v5 lite", "tpu"))
    settings = {"dtype": "bfloat16", "remat": remat, "implementation": "tpu"}
    step = jax.value_and_grad(functools.partial(loss, **settings))
    module = lowered(step, params(jnp.float32), *row())
    assert module.count('kernel_name = "flash_attention_forward"') == forwards
    assert module.count('kernel_name = "flash_attention_backward"') == 1
    if remat == "attention":  # kept once a layer, in one array over the layers
        kept = f"tensor<{CONFIG.layers}x{ROWS}x{TOKENS}x{CONFIG.heads}x{CONFIG.head_dim}xbf16>"
        loops = [line for line in module.splitlines() if "stablehlo.while" in line]
        assert max(line.count(kept) for line in loops) == 1


@pytest.mark.parametrize("dtype, short", [("float32", "f32"), ("bfloat16", "bf16")])
def test_the_forward_pass_multiplies_in_the_dtype_asked_for(dtype, short):
    forward = functools.partial(loss, dtype=dtype, remat="none")
    found = products(lowered(forward, params(jnp.float32), *row()))
    assert [types for _, *types in found] == [[short, short]] * (9 + 1)


def test_gradients_are_summed_in_float32():
    """In bfloat16 training too: weights over tokens (and so devices), scales and biases."""
    step = jax.value_and_grad(functools.partial(loss, dtype="bfloat16", remat="attention"))
    module = lowered(step, params(jnp.float32), *row())
    results = [RESULT.search(line)[1].split("x") for line, *_ in products(module)]
    of_tokens = {str(ROWS), str(CHUNK)}
    of_weights = [dtype for *shape, dtype in results if of_tokens.isdisjoint(shape)]
    assert of_weights == ["f32"] * 8  # q k v o gate up down, and the head
    sums = [operand.split("x")[-1] for operand in SUM.findall(module)]
    assert len(sums) > 10 and set(sums) <= {"f32", "i32"}


def decoding(dtype, copied):
    """A window's program and its arguments."""
    sampler = sampler_copy.shapes(CONFIG, dtype)
    K, D, B = CONFIG.kv_heads, CONFIG.head_dim, 8
    pools = [Pages(array(dtype, 16, K, 8, 2 * D))] * CONFIG.layers
    copies = [Copies(array(dtype, B, K, D, 16), array(dtype, B, K, 16, D))] * CONFIG.layers
    integer, identity = array(jnp.int32, B), array(jnp.uint32, B)
    rows = decode.Rows(
        *[integer] * 4, *[identity] * 2, array(jnp.int32, B, 2), array(jnp.int32, 1),
        array(jnp.bool_, B),
    )  # fmt: skip
    step = functools.partial(
        decode.window, config=CONFIG, how=decode.Sampling(top_p=0.9), steps=4, group=8,
        implementation="xla",
    )  # fmt: skip
    seed = array(jnp.uint32)
    return step, sampler, pools, copies if copied else None, rows, seed, seed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("copied", [True, False], ids=["copies", "in place"])
def test_decoding_rounds_no_float32_operand(dtype, copied):
    found = products(lowered(*decoding(dtype, copied)))
    assert len(found) > CONFIG.layers * 9
    assert not rounded(found)


def test_what_a_profile_shows_has_names():
    step = jax.value_and_grad(functools.partial(loss, dtype="float32", remat="none"))
    trained = scopes(step, params(jnp.float32), *row())
    model = {"embed", "qkv", "out", "mlp"}
    assert model | {"attention", "token_loss"} <= trained
    in_place, copied = (scopes(*decoding("float32", copied)) for copied in (False, True))
    assert model | {"logits", "sample"} <= in_place & copied
    assert {"paged_attention", "write_pages"} <= in_place
    assert {"refresh_copies", "keep_recent"} <= copied - in_place


def test_a_product_at_default_precision_is_found():
    x = array(jnp.float32, 8, 8)
    y = array(jnp.bfloat16, 8, 8)
    dot = functools.partial(jax.lax.dot, preferred_element_type=jnp.float32)
    assert len(rounded(products(lowered(dot, x, x)))) == 1
    assert len(rounded(products(lowered(dot, x, y)))) == 1
    assert rounded(products(lowered(dot, y, y))) == []
    exact = functools.partial(dot, precision=jax.lax.Precision.HIGHEST)
    assert rounded(products(lowered(exact, x, x))) == []
