"""A tiny model, its checkpoint folder, and a task that it can be run on."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from vibejax import arithmetic, qwen2, tokenizer, weights
from vibejax.chat_template import CHATML
from vibejax.rope import Rope
from vibejax.tokenizer import Tokenizer

TASK = [{"prompt": f"{a}+{b}=", "verifier": "math", "ground_truth": str(a + b)}
        for a in range(3) for b in range(4)]  # fmt: skip

MARKUP = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


SIGNS = "0123456789+-*/=()., \n?:;cd#\\boxe{}"


def write_tokenizer(folder) -> None:
    """One id a character, so few that a random policy says a number now and then; and an end."""
    vocab = {character: i for i, character in enumerate([*dict.fromkeys(SIGNS)])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens([arithmetic.END])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": arithmetic.END, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": len(vocab)}))


def model_config(vocab: int = 36, **sizes) -> qwen2.ModelConfig:
    defaults = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 48}
    return qwen2.ModelConfig(
        **(defaults | {"context": 64, "init_std": 0.3} | sizes), vocab=vocab, rope=Rope(theta=1e4)
    )


def write_policy(folder, **sizes) -> qwen2.ModelConfig:
    """An HF folder with random weights and the arithmetic tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder.parent / f"{folder.name}_tokenizer"
    source.mkdir()
    write_tokenizer(source)
    config = model_config(tokenizer.load(source).vocab, **sizes)
    params = qwen2.init_params(config, jax.random.key(0))
    weights.save_params(params, config, folder, dtype=jnp.float32, source=source)
    return config


def write_task(path, records=TASK) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def chat_tokenizer(template: str = CHATML, **settings) -> Tokenizer:
    """A tokenizer of single characters, with ChatML's tokens at 0, 1 and 2."""
    characters = [chr(i) for i in range(32, 127)] + ["\n"]
    vocab = {token: i for i, token in enumerate(MARKUP + characters)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in MARKUP])
    return Tokenizer(backend=backend, template=template, eos_ids=(2, 0), settings=settings)


def write_chat_policy(folder, eos_ids=(2, 0), **sizes) -> qwen2.ModelConfig:
    """An HF folder with random weights and the tokenizer of `chat_tokenizer`."""
    source = folder.parent / f"{folder.name}_tokenizer"
    source.mkdir(parents=True)
    tokens = dataclasses.replace(chat_tokenizer(), eos_ids=eos_ids)
    tokenizer.save(tokens, source)
    config = model_config(tokens.vocab, **sizes)
    params = jax.jit(qwen2.init_params, static_argnums=0)(config, jax.random.key(0))
    weights.save_params(params, config, folder, dtype=jnp.float32, source=source)
    return config
