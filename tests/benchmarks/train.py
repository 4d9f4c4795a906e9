"""One GRPO train step against transformers on torch: `python tests/benchmarks/train.py`.

SmolLM2-135M's shape with random weights, float32, AdamW. `uniform`: 32 sequences of 256 tokens,
64 of them prompt. `ragged`: 64 sequences of 64 prompt tokens and lognormal completions of median
48, at most 384. Both sides compute log-probabilities of completions only, in micro-batches; the
peer pads to the longest sequence of its batch, as TRL does. Useful tokens are prompt and
completion tokens without padding. The second of two steps is timed. Needs the extra `parity`.
"""

import os
import sys

import harness
import numpy as np

SHAPE = {"layers": 30, "width": 576, "heads": 9, "kv_heads": 3, "mlp": 1536, "vocab": 49_152}
PROMPT_TOKENS = 64
PEER_MICROBATCH = 8


def lengths(case: str) -> np.ndarray:
    """Completion tokens of each sequence."""
    if case == "uniform":
        return np.full(32, 256 - PROMPT_TOKENS)
    drawn = np.random.default_rng(0).lognormal(np.log(48), 0.8, 64)
    return np.clip(np.round(drawn), 1, 384).astype(int)


def sequences(case: str) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, SHAPE["vocab"], PROMPT_TOKENS + n) for n in lengths(case)]


def advantages(case: str) -> np.ndarray:
    return np.random.default_rng(2).standard_normal(len(lengths(case))).astype(np.float32)


def ours(case: str) -> None:
    import functools

    import jax

    from vibejax import optimizer, qwen2, sharding, train
    from vibejax.config.rl import RlConfig
    from vibejax.config.training import OptimizerConfig, TrainConfig
    from vibejax.packing import Document
    from vibejax.policy_programs import SUMS, policy_loss
    from vibejax.rope import Rope

    model = qwen2.ModelConfig(**SHAPE, head_dim=64, rope=Rope(theta=1e5), context=8_192)
    rows = (
        TrainConfig(row_tokens=256, microbatch_rows=8)
        if case == "uniform"
        else TrainConfig(row_tokens=448, microbatch_rows=10)
    )
    config = RlConfig(
        policy="", prompts="", train=rows,
        rollout={"max_prompt_tokens": 64, "max_completion_tokens": rows.row_tokens - 64},
    )  # fmt: skip
    documents = [
        Document(
            tokens=tokens.astype(np.int32),
            weights=np.repeat(np.float32([0, 1 / (len(lengths(case)) * n)]), [PROMPT_TOKENS, n]),
            channels={
                "advantage": np.full(len(tokens), advantage, np.float32),
                "sampler_logprob": np.full(len(tokens), -11.0, np.float32),
            },
        )
        for tokens, n, advantage in zip(
            sequences(case), lengths(case), advantages(case), strict=True
        )
    ]
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        adamw = optimizer.make_optimizer(OptimizerConfig(), 100)
        loss_fn = functools.partial(policy_loss, model=model, config=config)
        step = train.make_train_step(loss_fn, adamw, lambda _: 1e-6, model, mesh, SUMS)
        create = jax.jit(
            lambda key: qwen2.init_params(model, key),
            out_shardings=qwen2.param_shardings(model, mesh),
        )
        state = [train.init_state(create(jax.random.key(0)), adamw)]

        def run() -> None:
            sums, _ = train.sum_documents(step, state[0].params, documents, rows, mesh)
            state[0], _ = step.apply(state[0], sums)
            jax.block_until_ready(state[0])

        took = harness.seconds(run)
    harness.report(tokens_per_s=sum(map(len, sequences(case))) / took)


def peer_model():
    """transformers' model of this shape, and torch's AdamW on it."""
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
        use_cache=False,
    )
    model = transformers.Qwen2ForCausalLM(config)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)


def peer(case: str) -> None:
    import torch

    model, optimizer = peer_model()
    completion = int(max(lengths(case)))
    tokens = torch.zeros(len(lengths(case)), PROMPT_TOKENS + completion, dtype=torch.long)
    mask = torch.zeros(len(lengths(case)), completion)
    for i, (sequence, n) in enumerate(zip(sequences(case), lengths(case), strict=True)):
        tokens[i, : len(sequence)] = torch.from_numpy(sequence)
        mask[i, :n] = 1 / (len(lengths(case)) * n)
    attention_mask = (
        torch.arange(tokens.shape[1])[None] < PROMPT_TOKENS
    ) | torch.nn.functional.pad(mask > 0, (PROMPT_TOKENS, 0))
    advantage = torch.from_numpy(advantages(case))[:, None]

    def run() -> None:
        for i in range(0, len(tokens), PEER_MICROBATCH):
            part = slice(i, i + PEER_MICROBATCH)
            logits = model(
                tokens[part], attention_mask=attention_mask[part].long(),
                logits_to_keep=completion + 1,
            ).logits[:, :-1]  # fmt: skip
            chosen = tokens[part, PROMPT_TOKENS:, None]
            logprob = logits.gather(-1, chosen)[..., 0] - torch.logsumexp(logits, -1)
            ratio = torch.exp(logprob - logprob.detach())
            weight = torch.exp(logprob.detach() + 11.0).clamp(max=2.0)
            clipped = ratio.clamp(0.8, 1.28) * advantage[part]
            objective = torch.minimum(ratio * advantage[part], clipped)
            (-(mask[part] * weight * objective).sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    took = harness.seconds(run)
    harness.report(tokens_per_s=sum(map(len, sequences(case))) / took)


def main() -> None:
    for case in ("uniform", "ragged"):
        results = harness.measure(__file__, case)
        memory = {
            f"{side}_peak_gib": round(r["peak_bytes"] / 2**30, 2) for side, r in results.items()
        }
        harness.row(
            "train", case, results, "tokens_per_s", "useful tokens/s", higher_is_better=True,
            **memory,
        )  # fmt: skip
    harness.matmul_rows("train")


if __name__ == "__main__":
    {"ours": ours, "peer": peer}[sys.argv[1]](sys.argv[2]) if len(sys.argv) > 1 else main()
