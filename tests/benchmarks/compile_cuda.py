"""The CUDA attention kernels, compiled: `python tests/benchmarks/attention.py --chip h100`.

One row of one layer of Qwen2.5-Coder-3B (16 query heads, 2 key/value heads, head dimension 128,
bfloat16), the gradients of queries, keys and values. Compiles through the CUDA plugin, then reads
what ptxas and nvdisasm say of each kernel (extra `compile`); needs no GPU and runs nothing on one.
These are the compilers' verdicts, no times.

ours: temporaries of the gradient in MiB.
peer: those of JAX's Triton attention with segment ids; it has no grouped queries and gets keys and
    values repeated for every head.

Each row also names, for each kernel of both sides, its registers a thread, the bytes that it spills
and its matrix instructions: HGMMA is a Hopper's fast path, HMMA the older one.
"""

import functools
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HEADS, KV_HEADS, HEAD_DIM = 16, 2, 128
TARGETS = {"h100": "sm_90a", "a100": "sm_80"}
CAPABILITIES = {"h100": 9, "a100": 8}  # major ones, which choose the tiles
LENGTHS = (4_096, 65_536, 262_144)
LIMIT_S = 300
PALLAS_KERNEL = r"\.entry \w*(attention|mha)"  # the rest of a program is XLA's own


def report(target: str) -> None:
    """Prints the rows of one chip."""
    for length in LENGTHS:
        sides = functools.partial(_ours, CAPABILITIES[target]), _peer
        ours, peer = (kernel_report(target, *gradient(side, length)) for side in sides)
        row = {
            "benchmark": "attention",
            "case": f"gradient, {length} tokens",
            "chip": target,
            "ours": ours["temporaries_mib"],
            "peer": peer["temporaries_mib"],
            "ratio": round(ours["temporaries_mib"] / peer["temporaries_mib"], 3),
            "unit": "MiB of temporaries",
            "higher_is_better": False,
            "ours_kernels": ours["kernels"],
            "peer_kernels": peer["kernels"],
        }
        print(json.dumps(row), flush=True)


def kernel_report(target: str, fn, args: tuple) -> dict:
    """Compiles `fn` for a GPU in a process of its own, and reads its Triton kernels.

    Args:
        target: of `TARGETS`.
        fn: what is compiled, one that pickle takes; its Pallas kernels have "attention"
            or "mha" in their names.
        args: shapes and dtypes of its arguments.

    Returns:
        `temporaries_mib`, and `kernels`: by name, the `registers` of a thread, the bytes of
        `spills`, and how many `HGMMA` and `HMMA` instructions there are.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "work.pickle").write_bytes(pickle.dumps((fn, args)))
        command = [sys.executable, __file__, target, folder]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join(sys.path),  # `fn` is imported by its name
            "XLA_FLAGS": f"--xla_dump_to={folder}",
            "TF_CPP_MIN_LOG_LEVEL": "3",  # the plugin finds no driver and says so at length
        }
        done = subprocess.run(
            command, env=environment, timeout=LIMIT_S, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{target}: no compile\n{done.stderr[-2_000:]}")
        kernels = {}
        for ptx in sorted(Path(folder).glob("*.ptx")):
            if re.search(PALLAS_KERNEL, ptx.read_text()):
                kernels |= _kernels(ptx, TARGETS[target])
        return json.loads(done.stdout.splitlines()[-1]) | {"kernels": kernels}


def _compile(target: str, folder: str) -> dict:
    import jax
    from jax.sharding import SingleDeviceSharding

    from vibejax.planning import slices

    fn, shapes = pickle.loads((Path(folder) / "work.pickle").read_bytes())
    topology = slices.find(f"{target}-1").topology()
    sharding = SingleDeviceSharding(topology.devices[0])
    args = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in shapes]
    compiled = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).compile()
    return {"temporaries_mib": round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1)}


def _kernels(ptx: Path, architecture: str) -> dict[str, dict[str, int]]:
    """What ptxas and nvdisasm say of the kernels of one file."""
    cubin = ptx.with_suffix(".cubin")
    said = _tool("ptxas", "-v", f"-arch={architecture}", str(ptx), "-o", str(cubin)).stderr
    kernels = {}
    for block in said.split("Compiling entry function '")[1:]:
        name = block.split("'")[0]
        spilled = re.findall(r"(\d+) bytes spill", block)
        kernels[name] = {
            "registers": int(re.search(r"Used (\d+) registers", block)[1]),
            "spills": sum(map(int, spilled)),
        }
    for section in re.split(r"\.section\s+\.text\.", _tool("nvdisasm", "-c", str(cubin)).stdout)[
        1:
    ]:
        name = re.match(r"[\w$]+", section)[0]
        for instruction in ("HGMMA", "HMMA"):
            kernels[name][instruction] = len(re.findall(rf"\b{instruction}\.", section))
    return kernels


def _tool(name: str, *args: str) -> subprocess.CompletedProcess:
    """Runs a tool of the wheel nvidia-cuda-nvcc or nvidia-cuda-nvdisasm."""
    import nvidia

    [path, *_] = [p for root in nvidia.__path__ for p in Path(root).glob(f"*/bin/{name}")]
    return subprocess.run([path, *args], check=True, capture_output=True, text=True)


def gradient(side, length: int):
    """The gradients through attention as `side` has it, and the shapes that they take."""
    import jax
    import jax.numpy as jnp

    arrays = [
        jax.ShapeDtypeStruct((1, length, heads, HEAD_DIM), jnp.bfloat16)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    ids = [jax.ShapeDtypeStruct((1, length), jnp.int32)] * 4
    return functools.partial(_gradients, side), (*arrays, *ids)


def _gradients(side, q, k, v, *ids):
    import jax
    import jax.numpy as jnp

    def loss(q, k, v):
        return jnp.sum(side(q, k, v, *ids).astype(jnp.float32))

    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)


def _ours(capability, q, k, v, *ids):
    from vibejax.kernels import flash_attention_gpu

    tiles = flash_attention_gpu.tiles_for(q, k, v, capability)
    return flash_attention_gpu.attention(q, k, v, *ids, tiles)


def _peer(q, k, v, position, segment, *_):
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.gpu import attention

    group = HEADS // KV_HEADS
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    return attention.mha(q, k, v, segment, sm_scale=HEAD_DIM**-0.5, causal=True)


if __name__ == "__main__":
    print(json.dumps(_compile(*sys.argv[1:])))
