"""The train step of Qwen2.5-Coder-3B at one row of 65,536 tokens, compiled for real slices.

    python tests/benchmarks/compile_step.py [CASE ...]

The project's own step, `accumulate` and `apply` of the RL job, with its attention kernels, bfloat16
compute, float32 masters, AdamW. Compiles through libtpu and the CUDA plugin (extra `compile`);
needs no chip and runs nothing on one: the figures are the compiler's memory analysis.

ours: GiB of temporaries a device of `accumulate`.
peer: those of a plain train step with full rematerialisation and JAX's splash attention: what was
    measured for this model and these slices with jax 0.10.2, less its masters and moments, 12 bytes
    a parameter; none for the GPUs.

`resident_gib` is all that a device holds at the peak: both programs' arguments (masters, moments,
summed gradients) and the temporaries; `plain_resident_gib` is the plain step's, which sums nothing.
"""

import json
import sys

import tpu_schedule

CASES = {  # slice, of which so many devices, GiB of the plain step
    "v5e x8": ("v5e-8", 8, 10.8),
    "v6e x4": ("v6e-4", 4, 21.9),
    "v5p x1": ("v5p-8", 1, 85.7),
    "h100 x8": ("h100-8", 8, None),
}
TOKENS = 65_536
PARAMETERS = 3_085_938_688
GIB = 2**30


def main() -> None:
    from vibejax.planning import slices

    for case in sys.argv[1:] or CASES:
        where, devices, plain = CASES[case]
        room = slices.find(where).chip.memory_bytes / GIB
        for remat in ("full", "attention"):
            line = tpu_schedule.in_a_process(__file__, "--side", case, remat)
            programs = json.loads(line)
            accumulate, apply = programs["accumulate"], programs["apply"]
            resident = max(
                apply["peak_gib"], apply["arguments_gib"] + accumulate["temporaries_gib"]
            )
            peer = plain and round(plain - 12 * PARAMETERS / devices / 2**30, 2)
            row = {
                "benchmark": "compile_step",
                "case": f"{case}, remat {remat}",
                "ours": accumulate["temporaries_gib"],
                "peer": peer,
                "ratio": peer and round(accumulate["temporaries_gib"] / peer, 3),
                "unit": "GiB of temporaries a device",
                "higher_is_better": False,
                "resident_gib": round(resident, 2),
                "plain_resident_gib": plain,
                "fits": resident < room,
                "programs": programs,
            }
            print(json.dumps(row), flush=True)


def compile_case(case: str, remat: str) -> dict[str, dict[str, float]]:
    """Compiles both programs in this process."""
    from vibejax import policy_programs, qwen2, rl_shapes, sharding
    from vibejax.config.rl import RlConfig
    from vibejax.planning import slices
    from vibejax.rope import Rope

    name, count, _ = CASES[case]
    where = slices.find(name)
    mesh = sharding.make_mesh({"context": count}, where.topology().devices[:count])
    config = RlConfig(
        policy="-", prompts="-", train={"row_tokens": TOKENS, "dtype": "bfloat16", "remat": remat}
    )
    model = qwen2.ModelConfig(rope=Rope(theta=1e6))
    run = policy_programs.make(config, model, mesh)
    found = rl_shapes.trainer(run, config, model, mesh)
    platform = (where.chip.platform,)
    return {
        name: _memory(found[name]().lower(lowering_platforms=platform).compile().memory_analysis())
        for name in ("accumulate", "apply")
    }


def _memory(analysis) -> dict[str, float]:
    peak = (
        analysis.argument_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    )
    return {
        "peak_gib": round(peak / GIB, 2),
        "temporaries_gib": round(analysis.temp_size_in_bytes / GIB, 2),
        "arguments_gib": round(analysis.argument_size_in_bytes / GIB, 2),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        print(json.dumps(compile_case(*sys.argv[2:])))
    else:
        main()
