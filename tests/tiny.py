"""A tiny model, its checkpoint folder, and a task that it can be run on."""

import json

import jax
import jax.numpy as jnp

from vibejax import arithmetic, qwen2, tokenizer, weights
from vibejax.rope import Rope

TASK = [{"prompt": f"{a}+{b}=", "verifier": "math", "ground_truth": str(a + b)}
        for a in range(3) for b in range(4)]  # fmt: skip


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
    arithmetic.write_tokenizer(source)
    config = model_config(tokenizer.load(source).vocab, **sizes)
    params = qwen2.init_params(config, jax.random.key(0))
    weights.save_params(params, config, folder, dtype=jnp.float32, source=source)
    return config


def write_task(path, records=TASK) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
