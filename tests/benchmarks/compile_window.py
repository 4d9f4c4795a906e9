"""The engine's decode window for Qwen2.5-Coder-3B, compiled for real slices.

    python tests/benchmarks/compile_window.py [CASE ...]

`decode.window` as the engine calls it, bfloat16, sequences of up to 65,536 tokens, with the pages
that `memory_plan` finds room for. Compiles through libtpu and the CUDA plugin (extra `compile`);
needs no chip and runs nothing on one.

ours: MiB that one decode step moves to and from a device's memory: operands and results over the
    compiled loop body (vibejax/planning/hlo.py), our attention kernel by the copies it makes.
peer: what has to be moved: the weights once, and the keys and values of the live tokens, which
    fill the pool.
"""

import json
import sys

import tpu_schedule

GIB = 2**30
CASES = {  # slice, of which so many devices, those that share heads, slots
    "v5e x4": ("v5e-4", 4, 2, 64),
    "v6e x4": ("v6e-4", 4, 1, 128),
    "v5p x4": ("v5p-8", 4, 1, 256),
    "h100 x1": ("h100-1", 1, 1, 64),
}
CONTEXT = 65_536


def main() -> None:
    for case in sys.argv[1:] or CASES:
        found = json.loads(tpu_schedule.in_a_process(__file__, "--side", case))
        print(json.dumps({"benchmark": "compile_window", "case": case, **found}), flush=True)


def compile_case(case: str) -> dict:
    """Compiles the window in this process."""
    from vibejax import decode, qwen2, rl_shapes, sampler_copy, sharding
    from vibejax.completions import EngineConfig
    from vibejax.engine import Engine
    from vibejax.planning import hlo, projection, slices
    from vibejax.rope import Rope

    name, count, tensor, slots = CASES[case]
    where = slices.find(name)
    room = where.chip.memory_bytes
    model = qwen2.ModelConfig(rope=Rope(theta=1e6), context=CONTEXT)
    config = EngineConfig(model=model, slots=slots, tensor=tensor, memory_bytes=int(0.9 * room))
    shapes = sampler_copy.shapes(model, "bfloat16")
    engine = Engine(shapes, config, where.topology().devices[:count])
    traced = rl_shapes.sampler(engine, decode.Sampling(eos_ids=(151_643,)))["window"]()
    compiled = traced.lower(lowering_platforms=(where.chip.platform,)).compile()
    memory, plan = compiled.memory_analysis(), engine.memory
    parts = sharding.ways(engine.mesh, "batch")
    live = plan.pages * config.page_tokens
    computations = hlo.parse(compiled.as_text())
    body = hlo.loop_bodies(computations)[0]
    other, kernels, largest = hlo.moved(computations, body, hlo.KERNEL)
    # The kernel of one device: its own heads and rows, each with an equal share of the pool.
    step = other + projection.kernel_bytes(config, plan, slots // parts, live)
    needed = plan.weight_bytes + plan.pages * plan.page_bytes
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
        "room_gib": round(room / GIB, 2),
        "kernels_in_the_step": kernels,
        "largest_mib": {name: round(x / 2**20, 1) for name, x in largest.items()},
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        print(json.dumps(compile_case(sys.argv[2])))
    else:
        main()
