"""The attention kernels on a GPU that is there: `python tests/benchmarks/attention_gpu.py`.

Rows of one layer of Qwen2.5-Coder-3B: 16 query heads, 2 key/value heads, head dimension 128,
bfloat16, as `vibejax.attention` runs them with `gpu` and with `cudnn`, in turn. `packed` holds
eleven documents; cuDNN takes no segments, so its peer attends over the whole row, which is what the
tokens would cost without them. TFLOP/s count the pairs that a causal mask allows: 4 products of
the pair's dimension in the forward pass, 10 more in the backward.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np

from vibejax import attention, sharding
from vibejax.planning.tiles_run import PACKED
from vibejax.validation import checks, kernel_checks

HEADS, KV_HEADS, HEAD_DIM = 16, 2, 128
LENGTHS = (4_096, 16_384, 65_536)
REPEATS = 10
PAIR = {"forward": 4, "gradient": 14}  # operations a pair, query head and dimension


def main() -> None:
    device = jax.devices()[0]
    with jax.set_mesh(sharding.make_mesh({}, [device])):
        for tokens in LENGTHS:
            for work in PAIR:
                report(device, "causal", tokens, work, (tokens,))
        for work in PAIR:
            report(device, "packed", sum(PACKED), work, PACKED)


def report(device: jax.Device, layout: str, tokens: int, work: str, lengths) -> None:
    """Prints one row: ours, cuDNN, and the ratio of their times' inverses."""
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    arrays = [
        jax.random.normal(key, (1, tokens, n, HEAD_DIM), jnp.bfloat16)
        for key, n in zip(jax.random.split(jax.random.key(0), 4), heads, strict=True)
    ]
    position = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None]
    segment = np.repeat(np.arange(1, len(lengths) + 1, dtype=np.int32), lengths)[None]

    def attend(implementation: str):
        ids = jnp.asarray(segment) if implementation == "gpu" else None
        run = lambda q, k, v, *_: attention.attention(  # noqa: E731 - of one line
            q, k, v, jnp.asarray(position), ids, implementation
        )
        if work == "gradient":
            run = kernel_checks.with_gradients(run)
            return jax.jit(lambda q, k, v, dout: run(q, k, v, dout, None, None))
        return jax.jit(run)

    seconds = {}
    for implementation in ("gpu", "cudnn"):
        run = attend(implementation)
        seconds[implementation] = checks.timed(lambda run=run: run(*arrays), REPEATS)
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    operations = PAIR[work] * pairs * HEADS * HEAD_DIM
    ours, peer = (operations / seconds[name].median_s / 1e12 for name in ("gpu", "cudnn"))
    row = {
        "benchmark": "attention_gpu",
        "case": f"{work}, {layout}, {tokens} tokens",
        "ours": round(ours, 1),
        "peer": round(peer, 1),
        "ratio": round(ours / peer, 3),
        "unit": "TFLOP/s",
        "higher_is_better": True,
        "ours_ms": round(1e3 * seconds["gpu"].median_s, 3),
        "peer_ms": round(1e3 * seconds["cudnn"].median_s, 3),
        "spread": [round(seconds[name].spread, 3) for name in seconds],
        "device": device.device_kind,
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
