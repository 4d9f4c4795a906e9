"""The engine's decode window for Qwen2.5-Coder-3B, compiled for real slices.

    python tests/benchmarks/compile_window.py [CASE ...]

`decode.window` as the engine calls it, bfloat16, sequences of up to 65,536 tokens, with the pages
that `memory_plan` finds room for. Compiles through libtpu and the CUDA plugin (extra `compile`);
needs no chip and runs nothing on one.

ours: MiB that one decode step moves to and from a device's memory: operands and results over the
    compiled loop body (hlo_bytes.py), our attention kernel by the copies it makes.
peer: what has to be moved: the weights once, and the keys and values of the live tokens, which
    fill the pool.
"""

import json
import sys

import tpu_schedule
from compile_cuda import DATA

GIB = 2**30
CASES = {  # platform, topology, devices, those that share heads, slots, GiB of a device
    "v5e x4": ("tpu", "v5e:2x2", 4, 2, 64, 15.75),
    "v6e x4": ("tpu", "v6e:2x2", 4, 1, 128, 31.25),
    "v5p x4": ("tpu", "v5p:2x2x1", 4, 1, 256, 95.74),
    "h100 x1": ("cuda", "1x1x1", 1, 1, 64, 79.6),
}
CONTEXT, PAGE_TOKENS, STEPS = 65_536, 64, 16


def main() -> None:
    for case in sys.argv[1:] or CASES:
        found = json.loads(tpu_schedule.in_a_process(__file__, "--side", case))
        print(json.dumps({"benchmark": "compile_window", "case": case, **found}), flush=True)


def compile_case(case: str) -> dict:
    """Compiles the window in this process."""
    import hlo_bytes
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from vibejax import attention, batching, decode, memory_plan, qwen2, sharding
    from vibejax.engine import engine_mesh
    from vibejax.kernels import decode_attention_tpu, pages
    from vibejax.rope import Rope

    platform, name, count, tensor, slots, room = CASES[case]
    if platform == "tpu":
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    else:
        target = (DATA / "h100.txtpb").read_text()
        topology = topologies.get_topology_desc(
            platform="cuda", topology=name, target_config=target
        )
    model = qwen2.ModelConfig(rope=Rope(theta=1e6), context=CONTEXT)
    mesh = engine_mesh(model, tensor, topology.devices[:count])
    parts = sharding.ways(mesh, "batch")
    rows = slots // parts
    plan = memory_plan.plan(
        model, rows=rows, context=CONTEXT, page_tokens=PAGE_TOKENS, pool_tokens=0,
        chunk_tokens=512, kv_dtype=jnp.bfloat16, dtype=jnp.bfloat16, tensor=tensor, copied=False,
        weight_bytes=memory_plan.weight_bytes(model, jnp.bfloat16, tensor),
        limit_bytes=int(0.9 * room * GIB),
    )  # fmt: skip

    def array(dtype, shape, *axes):
        place = sharding.sharding(mesh, shape, *(axes or ("batch", *(None,) * (len(shape) - 1))))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    params = qwen2.sampler_shapes(model, jnp.bfloat16, mesh)
    pool = jax.eval_shape(
        lambda: pages.empty(
            parts * plan.pages, model.kv_heads, PAGE_TOKENS, model.head_dim, jnp.bfloat16
        )
    )
    pool = jax.tree.map(lambda x: array(x.dtype, x.shape, "batch", "kv_heads", None, None), pool)
    entries, group = CONTEXT // PAGE_TOKENS, batching.group_of(rows)
    of_rows = lambda dtype: array(dtype, (slots,))  # noqa: E731
    window_rows = decode.Rows(
        *[of_rows(jnp.int32)] * 4, *[of_rows(jnp.uint32)] * 2,
        array(jnp.int32, (slots, entries)), array(jnp.int32, (slots // group,)), of_rows(bool),
    )  # fmt: skip
    scalar = jax.ShapeDtypeStruct((), jnp.uint32, sharding=sharding.replicated(mesh))
    with jax.set_mesh(mesh):
        assert attention.has_kernels()
        traced = decode.window.trace(
            params, [pool] * model.layers, None, window_rows, scalar, scalar, config=model,
            how=decode.Sampling(eos_ids=(151_643,)), steps=STEPS, group=group,
            implementation="auto",
        )  # fmt: skip
        compiled = traced.lower(lowering_platforms=(platform,)).compile()
    memory = compiled.memory_analysis()
    live = plan.pages * PAGE_TOKENS
    # The kernel of one device: its own heads and rows, each with an equal share of the pool.
    heads = model.heads // tensor
    q = jax.ShapeDtypeStruct((rows, 1, heads, model.head_dim), jnp.bfloat16)
    part = jax.eval_shape(
        lambda: pages.empty(
            plan.pages, model.kv_heads // tensor, PAGE_TOKENS, model.head_dim, jnp.bfloat16
        )
    )
    table = jax.ShapeDtypeStruct((rows, entries), jnp.int32)
    kernel = decode_attention_tpu.bytes_copied(q, part, table, jnp.full(rows, live // rows))
    computations = hlo_bytes.parse(compiled.as_text())
    body = hlo_bytes.loop_bodies(computations)[0]
    other, kernels, largest = hlo_bytes.moved(computations, body, KERNEL)
    needed = plan.weight_bytes + plan.pages * plan.page_bytes
    step = other + model.layers * kernel
    pool_bytes = plan.pages * plan.page_bytes
    return {
        "ours": round(step / 2**20),
        "peer": round(needed / 2**20),
        "ratio": round(step / needed, 3),
        "unit": "MiB a decode step and device",
        "higher_is_better": False,
        "slots": slots,
        "live_tokens": live * parts,
        "pool_gib": round(pool_bytes / GIB, 2),
        "temporaries_gib": round(memory.temp_size_in_bytes / GIB, 3),
        "temporaries_of_pool": round(memory.temp_size_in_bytes / pool_bytes, 4),
        "planned_temporaries_gib": round(plan.temporary_bytes / GIB, 3),
        "peak_gib": round(
            (
                memory.argument_size_in_bytes
                + memory.temp_size_in_bytes
                + memory.output_size_in_bytes
                - memory.alias_size_in_bytes
            )
            / GIB,
            2,
        ),
        "room_gib": room,
        "kernels_in_the_step": kernels,
        "largest_mib": {name: round(x / 2**20, 1) for name, x in largest.items()},
    }


KERNEL = r"tpu_custom_call|__gpu\$xla|triton"

if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        print(json.dumps(compile_case(sys.argv[2])))
    else:
        main()
