"""Rollout against transformers' `generate`: `python tests/benchmarks/rollout.py`.

SmolLM2-135M's shape with random weights, float32, 32 prompts of 64 tokens, 128 new tokens each
at temperature 1, with the log-probability of every token. Needs the extra `parity`.
"""

import os
import sys

import harness
import numpy as np

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 32, 64, 128
SHAPE = {"layers": 30, "width": 576, "heads": 9, "kv_heads": 3, "mlp": 1536, "vocab": 49_152}


def prompts() -> np.ndarray:
    return np.random.default_rng(0).integers(0, SHAPE["vocab"], (PROMPTS, PROMPT_TOKENS))


def ours() -> None:
    import jax

    from vibejax import engine, qwen2
    from vibejax.rope import Rope

    model = qwen2.ModelConfig(**SHAPE, head_dim=64, rope=Rope(theta=1e5), context=8_192)
    params = jax.jit(lambda key: qwen2.init_params(model, key))(jax.random.key(0))
    params = engine.sampler_params(params, model, "float32")
    requests = [engine.Request(i, tuple(map(int, p))) for i, p in enumerate(prompts())]
    how = engine.Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=NEW_TOKENS, eos_ids=())

    def run() -> None:
        done = list(
            engine.generate(
                params, model, requests, samples=1, how=how, slots=PROMPTS, seed=0, step=0
            )
        )
        assert sum(len(c.logprobs) for _, _, c in done) == PROMPTS * NEW_TOKENS

    harness.report(tokens_per_s=PROMPTS * NEW_TOKENS / harness.seconds(run))


def peer() -> None:
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count())
    config = transformers.Qwen2Config(
        num_hidden_layers=SHAPE["layers"],
        hidden_size=SHAPE["width"],
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["kv_heads"],
        intermediate_size=SHAPE["mlp"],
        vocab_size=SHAPE["vocab"],
        max_position_embeddings=8_192,
        tie_word_embeddings=True,
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    tokens = torch.from_numpy(prompts())

    @torch.no_grad()
    def run(new_tokens: int = NEW_TOKENS) -> None:
        out = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for i, logits in enumerate(out.logits):
            chosen = out.sequences[:, PROMPT_TOKENS + i, None]
            torch.log_softmax(logits.float(), -1).gather(1, chosen)

    took = harness.seconds(run, warm_up=lambda: run(4))
    harness.report(tokens_per_s=PROMPTS * NEW_TOKENS / took)


def main() -> None:
    results = harness.measure(__file__, "rollout")
    memory = {f"{side}_peak_gib": round(r["peak_bytes"] / 2**30, 2) for side, r in results.items()}
    harness.row(
        "rollout", f"{PROMPTS} x {NEW_TOKENS} new tokens with log-probs", results,
        "tokens_per_s", "tokens/s", higher_is_better=True, **memory,
    )  # fmt: skip
    harness.matmul_rows("rollout")


if __name__ == "__main__":
    {"ours": ours, "peer": peer}[sys.argv[1]]() if len(sys.argv) > 1 else main()
