"""GGUF files written by llama.cpp's own package, read as checkpoints and as tokenizers."""

import os
import re
import struct
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folder import command
from tokenizers import pre_tokenizers

from vibejax import tokenizer, weights
from vibejax.gguf_reader import GGUFFile
from vibejax.sharding import make_mesh
from vibejax.weights import CheckpointError

E, F, H, K, D, L, V = 64, 96, 4, 2, 16, 2, 40
SHAPES = {
    "attn_norm.weight": (E,),
    "attn_q.weight": (H * D, E),
    "attn_k.weight": (K * D, E),
    "attn_v.weight": (K * D, E),
    "attn_output.weight": (E, H * D),
    "ffn_norm.weight": (E,),
    "ffn_gate.weight": (F, E),
    "ffn_up.weight": (F, E),
    "ffn_down.weight": (E, F),
}
BIASES = {"attn_q.bias": (H * D,), "attn_k.bias": (K * D,), "attn_v.bias": (K * D,)}
HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def make_tensors(architecture: str, *, tied: bool = False) -> dict[str, np.ndarray]:
    """Under GGUF's names, in Hugging Face's row order."""
    shapes = {"token_embd.weight": (V, E), "output_norm.weight": (E,)}
    if not tied:
        shapes["output.weight"] = (V, E)
    for layer in range(L):
        for name, shape in (SHAPES | (BIASES if architecture == "qwen2" else {})).items():
            shapes[f"blk.{layer}.{name}"] = shape
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of the llama architecture."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, architecture: str, tensors: dict, **changes) -> Path:
    kinds = changes.pop("kinds", {})
    writer = gguf.GGUFWriter(path, architecture)
    numbers = {
        "block_count": L,
        "context_length": 128,
        "embedding_length": E,
        "feed_forward_length": F,
        "attention.head_count": H,
        "attention.head_count_kv": K,
        "rope.freq_base": 1e5,
        "attention.layer_norm_rms_epsilon": 1e-5,
    } | changes
    for key, value in numbers.items():
        general = key.startswith(("tokenizer.", "split.", "general."))
        add(writer, key if general else f"{architecture}.{key}", value)
    for name, tensor in tensors.items():
        kind = kinds.get(name)
        if architecture == "llama" and (match := re.search(r"attn_([qk])\.", name)):
            tensor = permute(tensor, H if match[1] == "q" else K)
        if kind is None:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def hf_name(name: str) -> str:
    outer = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    stem, end = name.rsplit(".", 1)
    if stem in outer:
        return f"{outer[stem]}.{end}"
    _, layer, stem = stem.split(".")
    return f"model.layers.{layer}.{HF_NAMES[stem]}.{end}"


def read_all(path: Path) -> dict[str, np.ndarray]:
    file = GGUFFile(path)
    return {
        name: file.read(name, slice(0, t.shape[0]), slice(0, t.shape[-1]))
        for name, t in file.tensors.items()
    }


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_tensors_come_back_in_hugging_faces_order(architecture, biases, tmp_path):
    tensors = make_tensors("qwen2" if biases else "llama")
    held = read_all(write_gguf(tmp_path / "m.gguf", architecture, tensors))
    assert held.keys() == {hf_name(name) for name in tensors}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(held[hf_name(name)], tensor, err_msg=name)


def test_any_rows_of_a_permuted_tensor_can_be_read(tmp_path):
    tensors = make_tensors("llama")
    file = GGUFFile(write_gguf(tmp_path / "m.gguf", "llama", tensors))
    name, expected = "model.layers.1.self_attn.k_proj.weight", tensors["blk.1.attn_k.weight"]
    for start in range(0, K * D, 5):
        for stop in range(start + 1, K * D + 1, 7):
            piece = file.read(name, slice(start, stop), slice(3, 50))
            np.testing.assert_array_equal(piece, expected[start:stop, 3:50])


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_tensors_are_what_llama_cpp_says_they_are(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    tensors = make_tensors("qwen2")
    name = "blk.0.ffn_up.weight"
    path = write_gguf(tmp_path / "m.gguf", "qwen2", tensors, kinds={name: kind})
    expected = gguf.quants.dequantize(gguf.quants.quantize(tensors[name], kind), kind)
    file = GGUFFile(path)
    piece = file.read(hf_name(name), slice(7, 70), slice(1, E - 1))
    np.testing.assert_array_equal(piece, expected[7:70, 1:-1])
    assert file.dtype_names() == {"F32", kind.name}


@pytest.mark.parametrize("mesh", [None, {"tensor": 2, "fsdp": 4}])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_same_model_as_an_hf_folder(tied, mesh, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama", make_tensors("llama", tied=tied))
    config = weights.load_config(path)
    assert (config.tied, config.vocab, config.rope.theta) == (tied, V, 1e5)
    assert config.norm_epsilon == 1e-5  # not 9.999999747378752e-06, as the float32 in the file
    mesh = mesh and make_mesh(mesh)
    params = weights.load_params(path, config, mesh, jnp.float32)
    assert not np.any(params["layers"]["q_bias"])
    # An architecture without biases becomes Qwen2 with biases of zero.
    weights.save_params(params, config, tmp_path / "hf", dtype="float32", source=None)
    again = weights.load_params(tmp_path / "hf", config, None, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, params, again)


BYTES = [c for c in "abcdefghijklmnopqrstuvwxyz0123456789.,!'\u0120\u010a"]
MERGES = ["h e", "l l", "he ll", "hell o", "1 2", "\u0120 hello", "\u0120 \u0120", "' t"]
TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "[PAD4]",
    *BYTES,
    *(merge.replace(" ", "") for merge in MERGES),
]
KINDS = [3, 3, 3, 4, 5] + [1] * (len(TOKENS) - 5)
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": KINDS,
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def load_tokenizer(tmp_path: Path, **changes) -> tokenizer.Tokenizer:
    keys = TOKENIZER | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return tokenizer.load(write_gguf(tmp_path / "t.gguf", "llama", make_tensors("llama"), **keys))


def pieces(tokens: tokenizer.Tokenizer, text: str) -> list[str]:
    return [tokens.backend.id_to_token(i) for i in tokens.encode(text)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        # One digit at a time; then GPT-2's words, in which a line break joins spaces.
        ("smollm", ["hello", "1", "2", "\u010a", "\u010a", "\u0120", "\u0120hello"]),
        # GPT-2 keeps numbers whole.
        ("gpt-2", ["hello", "12", "\u010a", "\u010a", "\u0120", "\u0120hello"]),
        ("qwen2", ["hello", "1", "2", "\u010a", "\u010a", "\u0120", "\u0120hello"]),
        # Where the file does not say, llama.cpp begins a text of Llama 3's with its BOS.
        ("llama-bpe", ["<|im_start|>", "hello", "12", "\u010a", "\u010a", "\u0120", "\u0120hello"]),
    ],
)
def test_pre_tokenizers_split_as_the_name_says(pre, expected, tmp_path):
    tokens = load_tokenizer(tmp_path, pre=pre)
    assert pieces(tokens, "hello12\n\n  hello") == expected
    assert tokens.decode(tokens.encode("hello12\n\n  hello")) == "hello12\n\n  hello"


def test_numbers_of_llama_3_have_three_digits_at_most(tmp_path):
    backend = load_tokenizer(tmp_path, pre="llama-bpe").backend
    split = [text for text, _ in backend.pre_tokenizer.pre_tokenize_str("1234567")]
    assert split == ["123", "456", "7"]


def test_qwen_splits_punctuation_from_letters_where_gpt2_does_not(tmp_path):
    # Qwen's words may start with one character that is no letter; GPT-2's only with a space.
    for pre, expected in (("qwen2", ["(a", ")"]), ("smollm", ["(", "a", ")"])):
        backend = load_tokenizer(tmp_path, pre=pre).backend
        assert [text for text, _ in backend.pre_tokenizer.pre_tokenize_str("(a)")] == expected


def test_token_types_decide_what_is_special(tmp_path):
    tokens = load_tokenizer(tmp_path)
    ids = tokens.encode("hello<|im_end|><tool_call>")
    assert ids == [TOKENS.index("hello"), 2, 3]
    assert tokens.decode(ids) == "hello<tool_call>"
    assert tokens.decode(ids, skip_special_tokens=False) == "hello<|im_end|><tool_call>"
    assert tokens.backend.token_to_id("[PAD4]") is None
    assert tokens.vocab == len(TOKENS)


def test_every_end_token_stops(tmp_path):
    tokens = load_tokenizer(tmp_path, eot_token_id=0, eom_token_id=2)
    assert tokens.eos_ids == (2, 0)


def test_a_bos_token_opens_texts_but_not_chats(tmp_path):
    tokens = load_tokenizer(tmp_path, add_bos_token=True)
    assert pieces(tokens, "hello") == ["<|im_start|>", "hello"]
    assert tokens.encode("hello", add_special_tokens=False) == [TOKENS.index("hello")]
    chat = tokens.encode_chat([{"role": "a", "content": "hello"}], False)
    assert [tokens.backend.id_to_token(i) for i in chat] == [
        "<|im_start|>", "a", "\u010a", "hello", "<|im_end|>", "\u010a",
    ]  # fmt: skip


def test_the_tokenizer_survives_the_way_to_an_hf_folder(tmp_path):
    tokens = load_tokenizer(tmp_path, eot_token_id=0)
    src = tmp_path / "t.gguf"
    weights.convert(src, tmp_path / "hf", None)
    again = tokenizer.load(tmp_path / "hf")
    text = "hello 12 <|im_end|> don't"
    assert again.encode(text) == tokens.encode(text)
    assert (again.eos_ids, again.template) == (tokens.eos_ids, tokens.template)
    assert isinstance(again.backend.pre_tokenizer, pre_tokenizers.Sequence)


@pytest.mark.parametrize("pre", ["smollm", "qwen2"])
def test_the_command_line_says_where_transformers_would_split_otherwise(pre, tmp_path, capsys):
    load_tokenizer(tmp_path, pre=pre)
    assert command("import", tmp_path / "t.gguf", tmp_path / "hf") == 0
    err = capsys.readouterr().err
    assert ("PreTrainedTokenizerFast reads it as it is" in err) == (pre == "smollm")


def damaged(path: Path, size: int) -> Path:
    os.truncate(path, size)
    return path


def test_truncated_files_are_named(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "qwen2", make_tensors("qwen2"))
    whole = path.read_bytes()
    damaged(path, len(whole) - 33)
    with pytest.raises(CheckpointError, match=r"m.gguf: truncated, tensor \S+ is cut off"):
        weights.load_config(path)
    for size in (2, 6, 20, 100, 400):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"m.gguf: damaged or truncated GGUF header"):
            weights.load_config(path)


def test_other_files_and_versions_are_refused(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        weights.load_config(path)
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 1, 0, 0))
    with pytest.raises(CheckpointError, match="GGUF version 1 must be among 2, 3"):
        weights.load_config(path)


def test_random_damage_of_the_header_never_passes_for_another_error(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "qwen2", make_tensors("qwen2"), **TOKENIZER)
    whole = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(whole)
        broken[rng.integers(4, 1_500)] = rng.integers(256)
        path.write_bytes(broken)
        try:
            weights.load_params(path, weights.load_config(path), None, jnp.float32)
        except CheckpointError as error:
            assert "\n" not in str(error)


BAD = {
    "architecture": ("mamba", {}, "architecture 'mamba' is not supported"),
    "rope": (
        "llama",
        {"rope.scaling.type": "longrope"},
        r"rope.scaling.type 'longrope' is not supported \(linear, yarn\)",
    ),
    "rope's attention": (
        "llama",
        {"rope.scaling.type": "yarn", "rope.scaling.yarn_attn_factor": 0.5},
        "rope.scaling.yarn_attn_factor other than 1 is not supported",
    ),
    "alignment": (
        "llama",
        {"general.alignment": "32"},
        "general.alignment '32' must be a positive whole number",
    ),
    "partial rope": ("llama", {"rope.dimension_count": 8}, "dimension_count = 8 must be 16"),
    "parts": ("llama", {"split.count": 3}, "one part of several; join them by llama-gguf-split"),
    "experts": ("llama", {"expert_count": 8}, "llama.expert_count = 8 must be 0"),
    "per-layer heads": ("llama", {"attention.head_count": [4, 4]}, r"head_count = \[4, 4\] must"),
    "missing": ("llama", {"block_count": None}, "'block_count' is missing"),
    "layers": ("llama", {"block_count": 3}, "tensor model.layers.2.input_layernorm.weight is miss"),
    "width": ("llama", {"feed_forward_length": 95}, r"shape \(64, 96\), must be \(64, 95\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_metadata_get_one_line(case, tmp_path, capsys):
    architecture, changes, message = BAD[case]
    path = write_gguf(tmp_path / "m.gguf", architecture, make_tensors("llama"), **changes)
    assert command("import", path, tmp_path / "dst") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(path) in err
    assert re.search(message, err), err


def test_scaled_rope_by_a_tensor_is_refused(tmp_path):
    tensors = make_tensors("llama") | {"rope_freqs.weight": np.ones(8, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", "llama", tensors)
    with pytest.raises(CheckpointError, match=r"scaled RoPE by rope_freqs.weight"):
        weights.load_config(path)


def test_yarn_and_linear_scaling_are_read(tmp_path):
    scaling = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32,
    }
    path = write_gguf(tmp_path / "m.gguf", "qwen2", make_tensors("qwen2"), **scaling)
    rope = weights.load_config(path).rope
    assert (rope.kind, rope.factor, rope.original_context) == ("yarn", 4.0, 32)
    scaling["rope.scaling.type"] = "linear"
    path = write_gguf(tmp_path / "l.gguf", "qwen2", make_tensors("qwen2"), **scaling)
    rope = weights.load_config(path).rope
    assert (rope.kind, rope.factor, rope.original_context) == ("linear", 4.0, None)
    path = write_gguf(
        tmp_path / "z.gguf", "qwen2", make_tensors("qwen2"), **{"rope.scaling.factor": 0.0}
    )
    assert weights.load_config(path).rope.kind == "default"
    for key in ("rope.scaling.factor", "rope.scale_linear"):  # as llama.cpp takes them
        path = write_gguf(tmp_path / "d.gguf", "qwen2", make_tensors("qwen2"), **{key: 4.0})
        rope = weights.load_config(path).rope
        assert (rope.kind, rope.factor) == ("linear", 4.0)
    scaling["rope.scaling.type"] = "yarn"
    betas = {"rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 2.0}
    path = write_gguf(tmp_path / "b.gguf", "qwen2", make_tensors("qwen2"), **scaling, **betas)
    rope = weights.load_config(path).rope
    assert (rope.beta_fast, rope.beta_slow) == (8.0, 2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, r"tokenizer model 'llama' is not supported \(gpt2 with merges\)"),
        ({"pre": "tekken"}, r"pre-tokenizer 'tekken' is not supported \(default, gpt-2, smollm"),
        ({"eos_token_id": None}, r"no tokenizer.ggml.eos_token_id"),
        ({"token_type": [1, 1]}, "2 token types for"),
        ({"eos_token_id": 4_000}, "tokenizer.ggml.eos_token_id = 4000 is no token"),
        ({"merges": ["h q z"]}, r"tokenizer.ggml.merges: .*`q z` out of vocabulary"),
    ],
)
def test_bad_tokenizers_get_one_line(changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path, **changes)
