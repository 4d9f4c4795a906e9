"""The engine against others: `python tests/benchmarks/rollout.py`.

SmolLM2-135M's shape with random weights, float32, prompts of 64 tokens, temperature 1, with the
log-probability of every token. Needs the extra `parity`.

uniform: 32 completions of 128 tokens.
tail: 64 completions of lognormal lengths, median 48, the longest 384.

The peer is run with several batch sizes and its best counts; the static loop (static_loop.py) too.
`efficiency` is useful tokens over rows times steps, where rows are those of the compiled size in
use; `efficiency_of_all_slots` over all slots times steps. `roofline` is what the matrix products,
the weights and the cache of a step allow, by rates that are measured beside.
"""

import os
import sys
import time

import harness
import numpy as np

PROMPT_TOKENS = 64
SHAPE = {"layers": 30, "width": 576, "heads": 9, "kv_heads": 3, "mlp": 1536, "vocab": 49_152}
SLOTS = {"uniform": 32, "tail": 16}
WINDOW = {"uniform": 16, "tail": 8}
BATCHES = {"uniform": (32,), "tail": (16, 64)}


def workload(case: str) -> tuple[np.ndarray, np.ndarray]:
    """[N, T] prompts and [N] completion lengths."""
    random = np.random.default_rng(0)
    if case == "uniform":
        lengths = np.full(32, 128)
    else:
        lengths = np.clip(48 * np.exp(0.8 * random.standard_normal(64)), 4, 384).astype(int)
        lengths[np.argmax(lengths)] = 384
    prompts = random.integers(0, SHAPE["vocab"], (len(lengths), PROMPT_TOKENS))
    return prompts.astype(np.int32), lengths.astype(np.int32)


def sampler():
    import jax

    from vibejax import qwen2, sampler_copy
    from vibejax.rope import Rope

    model = qwen2.ModelConfig(**SHAPE, head_dim=64, rope=Rope(theta=1e5), context=8_192)
    params = jax.jit(lambda key: qwen2.init_params(model, key))(jax.random.key(0))
    return model, sampler_copy.make(params, model, "float32")


def ours(case: str) -> None:
    """The longest expected first, from earlier rounds of the same prompts; all is compiled."""
    from vibejax.completions import EngineConfig, Request
    from vibejax.decode import Sampling
    from vibejax.engine import Engine

    model, params = sampler()
    prompts, lengths = workload(case)
    requests = [
        Request(i, tuple(p), int(n))
        for i, (p, n) in enumerate(zip(prompts.tolist(), lengths, strict=True))
    ]
    config = EngineConfig(
        model=model, slots=SLOTS[case], context=PROMPT_TOKENS + int(lengths.max()),
        window=WINDOW[case],
    )  # fmt: skip
    engine = Engine(params, config)

    def run() -> None:
        done = list(engine.generate(requests, Sampling()))
        assert sum(len(c.logprobs) for c in done) == lengths.sum()

    def warm_up() -> None:  # the second round knows lengths, and so meets the sizes of the third
        run()
        run()

    took = harness.seconds(run, warm_up=warm_up)
    counts = engine.counts
    harness.report(
        tokens_per_s=lengths.sum() / took,
        efficiency=counts.tokens / counts.slot_steps,
        efficiency_of_all_slots=counts.tokens / (SLOTS[case] * counts.windows * WINDOW[case]),
        host_ms_a_window=1e3 * counts.host_s / counts.windows,
    )


def static(case: str) -> None:
    import static_loop

    model, params = sampler()
    prompts, lengths = workload(case)
    rates = []
    for rows in BATCHES[case]:

        def run(limits=lengths, rows=rows) -> None:
            static_loop.generate(params, model, prompts, limits, rows, int(lengths.max()))

        took = harness.seconds(run, warm_up=lambda run=run: run(np.minimum(lengths, 2)))
        rates.append(lengths.sum() / took)
    harness.report(tokens_per_s=max(rates))


def peer(case: str) -> None:
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
    prompts, lengths = workload(case)

    @torch.no_grad()
    def run(rows: int, limit: int = 10**9) -> None:
        for start in range(0, len(prompts), rows):
            tokens = torch.from_numpy(prompts[start : start + rows]).long()
            new_tokens = min(limit, int(lengths[start : start + rows].max()))
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

    rates = []
    for rows in BATCHES[case]:
        took = harness.seconds(lambda rows=rows: run(rows), warm_up=lambda rows=rows: run(rows, 2))
        rates.append(lengths.sum() / took)
    harness.report(tokens_per_s=max(rates))


def rates(case: str) -> None:
    """GFLOP/s of a product with 32 rows, GB/s of reading, and what they allow."""
    import jax
    import jax.numpy as jnp

    w_LFE = [jnp.ones((1_536, 576)) for _ in range(60)]
    x_BE = jnp.ones((32, 576))

    def einsum(x, w):
        return jnp.einsum("BE,FE->BF", x, w, precision="highest")

    products = jax.jit(lambda x, ws: [einsum(x, w) for w in ws])
    big = jnp.ones((2**28,))
    total = jax.jit(jnp.sum)

    def best(function) -> float:
        times = []
        for _ in range(6):
            start = time.perf_counter()
            jax.block_until_ready(function())
            times.append(time.perf_counter() - start)
        return min(times)

    flops = 60 * 2 * 32 * 576 * 1_536 / best(lambda: products(x_BE, w_LFE))
    bandwidth = big.nbytes / best(lambda: total(big))
    _, lengths = workload(case)
    weights = 134_515_008
    steps = lengths.sum() / min(SLOTS[case], len(lengths))
    cache = 30 * 2 * 3 * 64 * 4 * (PROMPT_TOKENS + lengths.mean() / 2) * SLOTS[case]
    step_s = max(2 * weights * SLOTS[case] / flops, (4 * weights + cache) / bandwidth)
    prefill_s = 2 * 106_000_000 * len(lengths) * PROMPT_TOKENS / flops
    harness.report(
        gflops=flops / 1e9,
        gbytes=bandwidth / 1e9,
        tokens_per_s=lengths.sum() / (steps * step_s + prefill_s),
    )


def main() -> None:
    for case in ("uniform", "tail"):
        results = harness.measure(__file__, case)
        for side in ("static", "rates"):
            results[side] = harness.measure_side(__file__, side, case)
        mine = results["ours"]
        harness.row(
            "rollout", case, results, "tokens_per_s", "useful tokens/s", higher_is_better=True,
            static_loop=round(results["static"]["tokens_per_s"], 1),
            ratio_to_static_loop=round(mine["tokens_per_s"] / results["static"]["tokens_per_s"], 2),
            roofline=round(results["rates"]["tokens_per_s"], 1),
            gflops=round(results["rates"]["gflops"]),
            gbytes_per_s=round(results["rates"]["gbytes"], 1),
            efficiency=round(mine["efficiency"], 3),
            efficiency_of_all_slots=round(mine["efficiency_of_all_slots"], 3),
            host_ms_a_window=round(mine["host_ms_a_window"], 2),
            peak_gib=round(mine["peak_bytes"] / 2**30, 2),
            peer_peak_gib=round(results["peer"]["peak_bytes"] / 2**30, 2),
        )  # fmt: skip


if __name__ == "__main__":
    sides = {"ours": ours, "peer": peer, "static": static, "rates": rates}
    sides[sys.argv[1]](sys.argv[2]) if len(sys.argv) > 1 else main()
