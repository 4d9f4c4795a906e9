"""The attention kernels as compiled: `python tests/benchmarks/attention.py --chip v5e`.

One row of one layer of Qwen2.5-Coder-3B: 65,536 tokens, 16 query heads, 2 key/value heads, head
dimension 128, bfloat16. `forward` and `backward` are one causal document; `packed` holds eleven
and is forward and backward together. Nothing runs on the chip: the compiler's final schedules are
replayed (see tpu_schedule.py) and weighted by how often the tiles of the row need each piece. The
figures are a model's, optimistic and for ranking; temporaries are the compiler's own, there for
4,096 and 262,144 tokens too. Needs the extra `compile`. For h100 and a100 see compile_cuda.py.

ours: cycles of the kernels for one key/value head and its eight query heads.
peer: the same of JAX's splash attention, in the best of four block sizes; of its grid, only steps
    that compute count. Its schedules are those of 16,384 tokens, whose masks are quicker to build.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import compile_cuda
import tpu_schedule
from tpu_schedule import CHIPS, Piece

from vibejax.planning import tiles_run
from vibejax.planning.tiles_run import PACKED

HEADS, KV_HEADS, HEAD_DIM = 16, 2, 128
GROUP = HEADS // KV_HEADS
TOKENS, PEER_TOKENS = 65_536, 16_384
LENGTHS = (4_096, 65_536, 262_144)  # that are compiled
PEER_BLOCKS = ((1024, 1024, 512), (2048, 1024, 512), (2048, 2048, 512), (1024, 1024, 1024))
PROBE = 1_024  # rows and columns of the matmul that says how far the model is off


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", choices=[*CHIPS, *compile_cuda.TARGETS], required=True)
    parser.add_argument("--side", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(compile_side(args.chip, *args.side)))
    elif args.chip in CHIPS:
        report(args.chip)
    else:
        compile_cuda.report(args.chip)


def report(chip: str) -> None:
    """Prints the rows of one TPU."""
    for length in LENGTHS:
        row = {
            "benchmark": "attention",
            "case": f"gradient, {length} tokens",
            "chip": chip,
            "ours": in_a_process(chip, "ours", str(length))["temporaries_mib"],
            "peer": None,
            "ratio": None,
            "unit": "MiB of temporaries",
            "higher_is_better": False,
        }
        print(json.dumps(row), flush=True)
    print(json.dumps(calibration(chip)), flush=True)
    kernels, ours = compiled(chip, "ours", str(TOKENS))
    causal, packed = (ours_cycles(kernels, chip, lengths) for lengths in ((TOKENS,), PACKED))
    peers, failures = {}, {}
    for blocks in PEER_BLOCKS:
        for segments in (False, True):
            name = "/".join(map(str, blocks))
            try:
                found, side = compiled(chip, "peer", *map(str, blocks), str(int(segments)))
            except SystemExit as error:
                failures[name] = str(error).strip().splitlines()[-1][:200]
                continue
            peers[name, segments] = peer_cycles(found, blocks) | {"side": side}
    for case in ("forward", "backward", "packed"):
        mine = packed if case == "packed" else causal
        kinds = ("forward", "backward") if case == "packed" else (case,)
        totals = {
            name: sum(cycles[kind] for kind in kinds)
            for (name, segments), cycles in peers.items()
            if segments == (case == "packed")
        }
        best = min(totals, key=totals.get)
        total = sum(mine[kind]["cycles"] for kind in kinds)
        row = {
            "benchmark": "attention",
            "case": case,
            "chip": chip,
            "ours": round(total),
            "peer": round(totals[best]),
            "ratio": round(total / totals[best], 3),
            "unit": "cycles a key/value head (static model)",
            "higher_is_better": False,
            "peer_blocks": best,
            "peers_not_compiled": failures,
            "tiles": {kind: mine[kind] for kind in kinds},
            "temporaries_mib": ours["temporaries_mib"],
            "vmem_mib": ours["vmem_mib"],
            "build_s": ours["build_s"],
        }
        if case == "packed":
            row["area_over_allowed_pairs"] = mine["area"]
        print(json.dumps(row), flush=True)


def compiled(chip: str, *side: str) -> tuple[dict[str, list[Piece]], dict]:
    """The kernels of one side, and what the compiling process says of them."""
    with tempfile.TemporaryDirectory() as folder:
        said = in_a_process(chip, *side, dump=Path(folder))
        return tpu_schedule.of_kernels(Path(folder), CHIPS[chip]), said


def in_a_process(chip: str, *side: str, dump: Path | None = None) -> dict:
    """`compile_side` in a process of its own."""
    arguments = ("--chip", chip, "--side", *side)
    return json.loads(tpu_schedule.in_a_process(__file__, *arguments, dump=dump))


def calibration(chip: str) -> dict:
    """How near the replay of a plain matmul in VMEM comes to the matrix units' peak."""
    kernels, _ = compiled(chip, "matmul")
    (found,) = (found for name, found in kernels.items() if "matmul_probe" in name)
    cycles = sum(piece.cycles for piece in found)
    busy = sum(piece.matrix_cycles for piece in found)
    return {
        "benchmark": "attention",
        "case": f"calibration: bfloat16 matmul of {PROBE} cubed",
        "chip": chip,
        "ours": round(cycles),
        "peer": round(busy),
        "ratio": round(cycles / busy, 3),
        "unit": "cycles, against those at peak (static model)",
        "higher_is_better": False,
    }


def ours_cycles(kernels: dict[str, list[Piece]], chip: str, lengths: tuple[int, ...]) -> dict:
    """Cycles of our kernels for a row of documents, one key/value head."""
    tiles = tiles_of(chip)
    return {
        "forward": _ours(kernels, "forward", tiles.forward, lengths, CHIPS[chip]),
        "backward": _ours(kernels, "backward", tiles.backward, lengths, CHIPS[chip]),
        "area": round(area(tiles.forward, lengths) / sum(n * (n + 1) // 2 for n in lengths), 3),
    }


def _ours(kernels, name, tile, lengths, chip) -> dict:
    (found,) = (pieces for kernel, pieces in kernels.items() if f"attention_{name}" in kernel)
    ((run, full, query_tiles),) = tiles_run.counts(tile, lengths, 1, name)
    hot = [piece for piece in found if piece.matrix_cycles]
    quick, masked = sorted(hot, key=lambda piece: piece.operations.get("vcmp", 0))
    pairs = tile.query * tile.key * GROUP
    assert quick.matrix_cycles == masked.matrix_cycles
    edges = query_tiles + (TOKENS // tile.key if name == "backward" else 0)
    cycles = quick.cycles * full + masked.cycles * (run - full) + _around(found, run, edges)
    rows = GROUP * tile.query
    if name == "forward":
        moved = 2 * tile.key * HEAD_DIM * 2
    else:  # q and dout, dq in float32 both ways, the statistics and the spans
        moved = rows * HEAD_DIM * (2 + 2 + 4 + 4) + 4 * rows * 4
    return {
        "cycles": round(cycles),
        "cycles_a_tile": round(quick.cycles + _around(found, 1, 0)),
        "cycles_a_masked_tile": round(masked.cycles),
        "tile": f"{tile.query}x{GROUP} x {tile.key}",
        "run": run,
        "full": full,
        "mxu_share": round(run * quick.matrix_cycles / cycles, 3),
        "dma_share": round(moved / chip.bandwidth * chip.clock / (cycles / run), 3),
        "pairs_a_tile": pairs,
    }


def _around(found: list[Piece], steps: int, edges: int) -> float:
    """Cycles outside the products: of each step of the innermost loop, and of each edge.

    A piece of that loop that stores 64 registers or more, but multiplies nothing, fills or writes
    an accumulator: it runs where one begins or ends.
    """
    depth = max(piece.depth for piece in found if piece.matrix_cycles)
    total = 0.0
    for piece in found:
        if not piece.matrix_cycles:
            inside = piece.depth == depth and piece.operations.get("vst", 0) < 64
            total += piece.cycles * (steps if inside else edges)
    return total


def area(tile, lengths: tuple[int, ...]) -> int:
    """Query and key pairs in the tiles that run."""
    (found,) = tiles_run.counts(tile, lengths, 1, "forward")
    return found.run * tile.query * tile.key


def peer_cycles(kernels: dict[str, list[Piece]], blocks: tuple[int, int, int]) -> dict[str, float]:
    """Cycles of splash attention for the causal row: it skips nothing between documents."""
    queries, keys, _ = blocks
    steps = sum(-(-(i + 1) * queries // keys) for i in range(TOKENS // queries))
    totals = {"forward": 0.0, "backward": 0.0}
    for name, found in kernels.items():
        if "splash" not in name:
            continue
        products = 2 if "fwd" in name else 4 if "dkv" in name else 3
        depth = min(piece.depth for piece in found if piece.matrix_cycles)
        busy = max(piece.matrix_cycles for piece in found)
        inner = max(1, round(products * queries * keys / 512 / busy)) if depth > 1 else 1
        outer = TOKENS // (keys if "dkv" in name else queries)
        hot = max(piece.cycles for piece in found if piece.matrix_cycles)
        cycles = hot * inner * steps + _around(found, steps, outer)
        totals["forward" if "fwd" in name else "backward"] += GROUP * cycles
    return totals


def tiles_of(chip: str):
    from vibejax.kernels.tiles import tpu_tiles

    return tpu_tiles(chip, "bfloat16", HEAD_DIM, GROUP)


def compile_side(chip: str, side: str, *options: str) -> dict:
    """Compiles one side in this process; the schedules go where the environment says."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].topology)

    def array(dtype, *shape):
        sharding = SingleDeviceSharding(topology.devices[0])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    if side == "matmul":
        x = array(jnp.bfloat16, PROBE, PROBE)
        jax.jit(matmul_probe).lower(x, x).compile()
        return {}
    length = int(options[0]) if side == "ours" else PEER_TOKENS
    q, k, v = (
        array(jnp.bfloat16, 1, length, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    ids = (array(jnp.int32, 1, length),) * 4
    attend = ours(chip) if side == "ours" else peer(length, *map(int, options))

    def loss(q, k, v, *ids):
        return jnp.sum(attend(q, k, v, *ids).astype(jnp.float32))

    start = time.perf_counter()
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, v, *ids)
    build_s = time.perf_counter() - start
    memory = lowered.compile().memory_analysis()
    return {
        "temporaries_mib": round(memory.temp_size_in_bytes / 2**20, 1),
        "vmem_mib": tiles_of(chip).vmem_bytes / 2**20,
        "build_s": round(build_s, 2),
    }


def matmul_probe(x, y):
    import jax
    from jax.experimental import pallas as pl

    def matmul_probe(x_ref, y_ref, out_ref):
        out_ref[...] = jax.lax.dot(x_ref[...], y_ref[...], preferred_element_type=out_ref.dtype)

    out = jax.ShapeDtypeStruct((PROBE, PROBE), "float32")
    return pl.pallas_call(matmul_probe, out_shape=out, name="matmul_probe")(x, y)


def ours(chip: str):
    from vibejax.kernels import flash_attention_tpu

    def attend(q, k, v, *ids):
        return flash_attention_tpu.attention(q, k, v, *ids, tiles_of(chip))

    return attend


def peer(length: int, queries: int, keys: int, compute: int, segments: int):
    import jax
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    sizes = splash.BlockSizes(
        block_q=queries, block_kv=keys, block_kv_compute=compute,
        block_q_dkv=queries, block_kv_dkv=keys, block_kv_dkv_compute=compute,
        block_q_dq=queries, block_kv_dq=keys,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((length, length)) for _ in range(GROUP)])
    kernel = splash.make_splash_mqa_single_device(mask, block_sizes=sizes)

    def attend(q, k, v, *ids):
        q_KGTD = q[0].transpose(1, 0, 2).reshape(KV_HEADS, GROUP, length, HEAD_DIM)
        k_KTD, v_KTD = k[0].swapaxes(0, 1), v[0].swapaxes(0, 1)
        if not segments:
            return jax.vmap(kernel)(q_KGTD, k_KTD, v_KTD)
        of_tokens = splash.SegmentIds(q=ids[1][0], kv=ids[3][0])
        return jax.vmap(kernel, in_axes=(0, 0, 0, None))(q_KGTD, k_KTD, v_KTD, of_tokens)

    return attend


if __name__ == "__main__":
    main()
