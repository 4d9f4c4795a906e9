"""Paged decode attention, compiled and counted.

    python tests/benchmarks/compile_decode.py [CHIP ...]

One layer of Qwen2.5-Coder-3B (16 query heads, 2 key/value heads, head dimension 128), 256 sequences
of up to 65,536 tokens (GPUs: 32), and a pool of pages that fills the chip's memory. Compiles
through libtpu and the CUDA plugin (extra `compile`); needs no accelerator and runs nothing on one.
These are the compilers' verdicts and memory analysis, and counts, no times.

Rows of `compile_decode`: MiB of temporaries of one decode step, which writes the new tokens' keys
and values into a donated pool and attends. `prefix` is with groups of 16 sequences that share
pages. A copy of the pool would show, or not fit. The peer is JAX's paged attention alone, on pages
of bfloat16 and one query token; it has no prefixes and writes nothing.

Rows of `decode_bytes`: what the TPU kernel's copies move for a token of each sequence. The peer
is the live keys, values and factors, the queries and the outputs, each once.
"""

import functools
import json
import os
import subprocess
import sys

from tpu_schedule import ENVIRONMENT

HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 16, 2, 128, 65_536
GROUP = 16
TPUS = {"v4:2x2x1": 13, "v5e:2x2": 14, "v5p:2x2x1": 92, "v6e:2x2": 29, "tpu7x:2x2x1": 90}
GPUS = {"h100": 72, "a100": 72}  # GiB of pages
VARIANTS = [(T, group, s) for T in (1, 4) for group in (1, GROUP) for s in (64, 128)]
LIMIT_S = 300


def main(chips: list[str]) -> None:
    """Prints the rows of these chips; none given: of all."""
    bytes_rows()
    for chip in chips or [*TPUS, *GPUS]:
        for dtype in ("bfloat16", "int8"):
            for T, group, s in VARIANTS:
                variant = (chip, dtype, str(T), str(group), str(s))
                ours = in_a_process("ours", *variant)
                has_peer = chip in TPUS and (dtype, T, group) == ("bfloat16", 1, 1)
                peer = in_a_process("peer", *variant) if has_peer else {}
                row(
                    "compile_decode",
                    f"{chip} {dtype} T={T} pages of {s}{' prefix' if group > 1 else ''}",
                    ours.get("temporaries_mib"),
                    peer.get("temporaries_mib"),
                    "MiB of temporaries",
                    compiles=ours["verdict"],
                    peer_compiles=peer.get("verdict"),
                    pool_gib=ours.get("pool_gib"),
                )


def row(benchmark, case, ours, peer, unit, **more) -> None:
    ratio = round(ours / peer, 4) if ours is not None and peer else None
    fields = {"benchmark": benchmark, "case": case, "ours": ours, "peer": peer, "ratio": ratio}
    print(json.dumps(fields | {"unit": unit, "higher_is_better": False} | more), flush=True)


def in_a_process(*args: str) -> dict:
    command = [sys.executable, __file__, *args]
    environment = os.environ | ENVIRONMENT | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    try:
        done = subprocess.run(
            command, env=environment, timeout=LIMIT_S, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        return {"verdict": f"no: {LIMIT_S} s are over"}
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "Error" in line]
        return {"verdict": f"no: {errors[-1][:300] if errors else done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1]) | {"verdict": "yes"}


def shapes(array, dtype: str, B: int, T: int, group: int, s: int, gib: float) -> list:
    """Query, pages, table, lengths, and shared pages if there are groups."""
    import jax
    import jax.numpy as jnp

    from vibejax.kernels import pages as pages_

    page = KV_HEADS * s * (2 * HEAD_DIM * jnp.dtype(dtype).itemsize + 8 * (dtype == "int8"))
    count = int(gib * 2**30 / page) // 8 * 8
    pages = jax.eval_shape(
        functools.partial(pages_.empty, count, KV_HEADS, s, HEAD_DIM, jnp.dtype(dtype))
    )
    pages = jax.tree.map(lambda x: array(x.dtype, *x.shape), pages)
    table, length = array(jnp.int32, B, CONTEXT // s), array(jnp.int32, B)
    args = [array(jnp.bfloat16, B, T, HEADS, HEAD_DIM), pages, table, length]
    return [*args, array(jnp.int32, B // group)] if group > 1 else args


def temporaries(side: str, chip: str, dtype: str, T: int, group: int, s: int) -> dict:
    """Compiles one step for one chip, in this process."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from vibejax.kernels import pages as pages_
    from vibejax.planning import slices

    if chip in TPUS:
        from vibejax.kernels import decode_attention_tpu as kernel

        topology = topologies.get_topology_desc(platform="tpu", topology_name=chip)
    else:
        from vibejax.kernels import decode_attention_gpu as kernel

        topology = slices.find(f"{chip}-1").topology()
    place = SingleDeviceSharding(topology.devices[0])
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=place)  # noqa: E731 - of one line
    B, gib = (256, TPUS[chip]) if chip in TPUS else (32, GPUS[chip])
    q, pages, table, length, *shared = shapes(array, dtype, B, T, group, s, gib)

    def step(pages, q, k, v, table, length, *shared):
        position = length[:, None] - T + jnp.arange(T)
        pages = pages_.write(pages, k, v, table, position)
        return pages, kernel.paged_attention(q, pages, table, length, *shared, group=group)

    if side == "ours":
        new = array(q.dtype, B, T, KV_HEADS, HEAD_DIM)
        args = (pages, q, new, new, table, length, *shared)
        lowered = jax.jit(step, donate_argnums=0).lower(*args)
    else:
        from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

        shape = (KV_HEADS, pages.kv_PKsC.shape[0], s, HEAD_DIM)
        halves = [array(jnp.bfloat16, *shape)] * 2
        peer = functools.partial(paged_attention, pages_per_compute_block=512 // s)
        q_BHD = array(q.dtype, B, HEADS, HEAD_DIM)
        lowered = jax.jit(peer).lower(q_BHD, *halves, length, table)
    memory = lowered.compile().memory_analysis()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pages))
    if side == "ours":
        assert memory.alias_size_in_bytes >= size, "the pool is copied"
    return {
        "temporaries_mib": round(memory.temp_size_in_bytes / 2**20, 2),
        "pool_gib": round(size / 2**30, 2),
    }


def bytes_rows() -> None:
    """256 sequences of 64K tokens, and of lengths of median 6,000; groups share 1,024 tokens."""
    import jax
    import numpy as np

    from vibejax.kernels import decode_attention_tpu

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    B, prompt = 256, 1_024
    random = np.random.default_rng(0)
    ragged_B = np.clip(random.lognormal(np.log(6_000), 1.0, B), prompt + 1, CONTEXT).astype(int)
    for name, length_B in (("64K", np.full(B, CONTEXT)), ("median 6K", ragged_B)):
        for dtype in ("bfloat16", "int8"):
            for T, group, s in VARIANTS:
                q, pages, table, _, *shared = shapes(array, dtype, B, T, group, s, 1)
                length_B = jax.numpy.asarray(length_B)
                common = [jax.numpy.full(x.shape, prompt // s) for x in shared]
                ours = decode_attention_tpu.bytes_copied(
                    q, pages, table, length_B, *common, group=group
                )
                token = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pages)) / (
                    pages.kv_PKsC.shape[0] * s
                )
                tokens = int(length_B.sum()) - (B - B // group) * prompt * (group > 1)
                needed = tokens * token + 2 * q.size * q.dtype.itemsize
                row(
                    "decode_bytes",
                    f"{name} {dtype} T={T} pages of {s}{' prefix' if group > 1 else ''}",
                    round(ours / B / 2**20, 4),
                    round(needed / B / 2**20, 4),
                    "MiB a sequence and layer",
                )


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ("ours", "peer"):
        side, chip, dtype, *numbers = sys.argv[1:]
        print(json.dumps(temporaries(side, chip, dtype, *map(int, numbers))))
    else:
        main(sys.argv[1:])
