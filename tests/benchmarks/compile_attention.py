"""The TPU attention kernels, compiled: `python tests/benchmarks/compile_attention.py`.

One row of one layer of Qwen2.5-Coder-3B (16 query heads, 2 key/value heads, head dimension 128,
bfloat16), the gradients of queries, keys and values. Compiles through libtpu (extra `compile`);
needs no TPU and runs nothing on one. These are the compiler's verdicts and memory analysis, no
times.

ours: temporaries of the gradient in MiB.
peer: those of JAX's splash attention, causal over the whole row, in blocks of 1024/1024/512; none
    at 262,144 tokens, whose mask it would build on the host for minutes.
"""

import json
import os
import subprocess
import sys

HEADS, KV_HEADS, HEAD_DIM = 16, 2, 128
CHIPS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
LENGTHS = (4_096, 65_536, 262_144)
PEER_LENGTHS = LENGTHS[:2]
LIMIT_S = 300
ENVIRONMENT = {  # the compiler alone: no device is looked for
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}


def main() -> None:
    for chip in CHIPS:
        for length in LENGTHS:
            ours = in_a_process(chip, length, "ours")
            peer = in_a_process(chip, length, "peer") if length in PEER_LENGTHS else None
            row = {
                "benchmark": "compile_attention",
                "case": f"{chip} T={length} gradient",
                "ours": round(ours, 1),
                "peer": peer and round(peer, 1),
                "ratio": peer and round(ours / peer, 3),
                "unit": "MiB of temporaries",
                "higher_is_better": False,
            }
            print(json.dumps(row), flush=True)


def in_a_process(chip: str, length: int, side: str) -> float:
    command = [sys.executable, __file__, chip, str(length), side]
    environment = os.environ | ENVIRONMENT
    done = subprocess.run(command, env=environment, timeout=LIMIT_S, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{chip}, T={length}, {side}: no compile\n{done.stderr[-2_000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def temporaries_mib(chip: str, length: int, side: str) -> float:
    """Compiles one gradient for one chip, in this process."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    device = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0]

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    q, k, v = (
        array(jnp.bfloat16, 1, length, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    ids = (array(jnp.int32, 1, length),) * 4
    attend = {"ours": ours, "peer": peer}[side](length)

    def loss(q, k, v, *ids):
        return jnp.sum(attend(q, k, v, *ids).astype(jnp.float32))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v, *ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def ours(length: int):
    from vibejax.kernels import flash_attention_tpu

    def attend(q, k, v, *ids):
        return flash_attention_tpu.attention(q, k, v, *ids, flash_attention_tpu.tiles_for(q, k, v))

    return attend


def peer(length: int):
    import jax
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    group = HEADS // KV_HEADS
    sizes = splash.BlockSizes(
        block_q=1024, block_kv=1024, block_kv_compute=512,
        block_q_dkv=1024, block_kv_dkv=1024, block_kv_dkv_compute=512,
        block_q_dq=1024, block_kv_dq=1024,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((length, length)) for _ in range(group)])
    kernel = splash.make_splash_mqa_single_device(mask, block_sizes=sizes)

    def attend(q, k, v, *_):
        q_KGTD = q[0].transpose(1, 0, 2).reshape(KV_HEADS, group, length, HEAD_DIM)
        return jax.vmap(kernel)(q_KGTD, k[0].swapaxes(0, 1), v[0].swapaxes(0, 1))

    return attend


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(temporaries_mib(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
    else:
        main()
