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
from compile_cuda import DATA

CASES = {  # platform, topology, devices, GiB of a device, GiB of the plain step
    "v5e x8": ("tpu", "v5e:2x4", 8, 15.75, 10.8),
    "v6e x4": ("tpu", "v6e:2x2", 4, 31.25, 21.9),
    "v5p x1": ("tpu", "v5p:2x2x1", 1, 95.74, 85.7),
    "h100 x8": ("cuda", "1x1x8", 8, 79.6, None),
}
TOKENS = 65_536
PARAMETERS = 3_085_938_688


def main() -> None:
    for case in sys.argv[1:] or CASES:
        *_, devices, room, plain = CASES[case]
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
    import functools

    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    from vibejax import qwen2, rl, sharding, train
    from vibejax.config import RlConfig
    from vibejax.optimizer import make_optimizer, make_schedule
    from vibejax.rope import Rope

    platform, name, count, *_ = CASES[case]
    if platform == "tpu":
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    else:
        target = (DATA / "h100.txtpb").read_text()
        topology = topologies.get_topology_desc(
            platform="cuda", topology=name, target_config=target
        )
    mesh = sharding.make_mesh({"context": count}, topology.devices[:count])
    model = qwen2.ModelConfig(
        rope=Rope(theta=1e6), layers=36, width=2_048, heads=16, kv_heads=2, head_dim=128,
        mlp=11_008, vocab=151_936, context=32_768, tied=True,
    )  # fmt: skip
    config = RlConfig(
        policy="-", prompts="-", train={"row_tokens": TOKENS, "dtype": "bfloat16", "remat": remat}
    )
    adamw = make_optimizer(config.optimizer, config.steps)
    loss = functools.partial(rl.policy_loss, model=model, config=config)
    shardings = qwen2.param_shardings(model, mesh)
    params = qwen2.map_table(
        lambda info, s: jax.ShapeDtypeStruct(info.shape, jnp.float32, sharding=s), model, shardings
    )
    state = train.abstract_state(params, adamw)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
    sums = train.Sums(params, scalar, dict.fromkeys(rl.SUMS, scalar))
    rows = sharding.sharding(mesh, (1, TOKENS), "batch", "length")
    order = ("place",) if count > 1 else ()
    floats = ("weight", "advantage", "sampler_logprob")
    batch = {
        channel: jax.ShapeDtypeStruct(
            (1, TOKENS), jnp.float32 if channel in floats else jnp.int32, sharding=rows
        )
        for channel in ("token", "target", "position", "segment", *floats, *order)
    }
    schedule = make_schedule(config.optimizer, config.steps)
    with jax.set_mesh(mesh):
        step = train.make_train_step(loss, adamw, schedule, model, mesh, rl.SUMS)
        programs = {
            "accumulate": step.accumulate.trace(params, sums, batch),
            "apply": step.apply.trace(state, sums),
        }
        return {
            name: _memory(traced.lower(lowering_platforms=(platform,)).compile().memory_analysis())
            for name, traced in programs.items()
        }


def _memory(analysis) -> dict[str, float]:
    gib = 2**30
    peak = (
        analysis.argument_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    )
    return {
        "peak_gib": round(peak / gib, 2),
        "temporaries_gib": round(analysis.temp_size_in_bytes / gib, 2),
        "arguments_gib": round(analysis.argument_size_in_bytes / gib, 2),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        print(json.dumps(compile_case(*sys.argv[2:])))
    else:
        main()
