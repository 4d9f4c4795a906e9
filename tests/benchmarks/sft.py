"""One SFT step against transformers on torch: `python tests/benchmarks/sft.py`.

SmolLM2-135M's shape with random weights, float32, AdamW; 16 chats of 64 prompt tokens and lognormal
completions of median 96, at most 448, in random order, a loss on completions only. Ours packs them
into rows of 512; the peer pads each micro-batch of 8 to its longest, as TRL does by default, and
computes the loss that its model computes from `labels`. Useful tokens are prompt and completion
tokens without padding. The second of two steps is timed. The target is twice the peer's. Needs the
extra `parity`.
"""

import sys

import harness
import numpy as np
import train as grpo

PROMPT_TOKENS = 64
MICROBATCH = 8
CASE = "ragged"


def lengths() -> np.ndarray:
    """Completion tokens of each chat."""
    drawn = np.random.default_rng(0).lognormal(np.log(96), 1.0, 16)
    return np.clip(np.round(drawn), 1, 448).astype(int)


def sequences() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    vocab = grpo.SHAPE["vocab"]
    return [rng.integers(0, vocab, PROMPT_TOKENS + n).astype(np.int32) for n in lengths()]


def ours() -> None:
    import jax

    from vibejax import optimizer, packing, qwen2, sft, sharding, train
    from vibejax.config.sft import SftConfig
    from vibejax.config.training import OptimizerConfig, TrainConfig
    from vibejax.packing import Document
    from vibejax.rope import Rope

    model = qwen2.ModelConfig(**grpo.SHAPE, head_dim=64, rope=Rope(theta=1e5), context=8_192)
    rows = TrainConfig(row_tokens=512, microbatch_rows=2)
    config = SftConfig(policy="-", data="-", steps=100, train=rows)
    learnt = lengths().sum()
    documents = [
        Document(tokens=t, weights=np.float32(np.arange(len(t)) >= PROMPT_TOKENS) / learnt)
        for t in sequences()
    ]
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        adamw = optimizer.make_optimizer(OptimizerConfig(), 100)
        loss_fn = sft.make_loss(model, config)
        step = train.make_train_step(loss_fn, adamw, lambda _: 1e-6, model, mesh, ("loss",))
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
    tokens = [len(d.tokens) for d in documents]
    fill = packing.fill(tokens, rows.row_tokens, rows.microbatch_rows)
    harness.report(tokens_per_s=sum(tokens) / took, fill=fill)


def peer() -> None:
    import torch

    model, optimizer = grpo.peer_model()
    documents = [torch.from_numpy(tokens).long() for tokens in sequences()]
    learnt = int(lengths().sum())

    def run() -> None:
        for i in range(0, len(documents), MICROBATCH):
            part = documents[i : i + MICROBATCH]
            tokens = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
            place = torch.arange(tokens.shape[1])[None]
            real = place < torch.tensor([[len(t)] for t in part])
            labels = torch.where(real & (place >= PROMPT_TOKENS), tokens, -100)
            model(
                tokens, attention_mask=real.long(), labels=labels, num_items_in_batch=learnt
            ).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    took = harness.seconds(run)
    tokens = [len(t) for t in documents]
    parts = [tokens[i : i + MICROBATCH] for i in range(0, len(tokens), MICROBATCH)]
    padded = sum(max(part) * len(part) for part in parts)
    harness.report(tokens_per_s=sum(tokens) / took, fill=sum(tokens) / padded)


def main() -> None:
    results = harness.measure(__file__, CASE)
    more = {
        f"{side}_{name}": round(value, 3)
        for side, r in results.items()
        for name, value in (("fill", r["fill"]), ("peak_gib", r["peak_bytes"] / 2**30))
    }
    harness.row(
        "sft", CASE, results, "tokens_per_s", "useful tokens/s", higher_is_better=True, **more
    )
    harness.matmul_rows("sft")


if __name__ == "__main__":
    {"ours": ours, "peer": peer}[sys.argv[1]]() if len(sys.argv) > 1 else main()
