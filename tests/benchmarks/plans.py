"""The table of plans in tpu/README.md: `python tests/benchmarks/plans.py FOLDER [CASE ...]`.

Runs tpu/plan.py for each case, one after the other, keeps its JSON in FOLDER, and prints the table
of all that are there. Compiles take minutes each and are kept, so that it goes on where it stopped.
Everything in the table is projected from compiled programs; nothing is run on a TPU or GPU.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
GIB = 2**30
MODEL_3B, MODEL_15B = "qwen2.5-coder-3b-64k", "qwen2.5-math-1.5b-32k"


def sets(
    rows: int = 1, slots: int = 64, remat: str = "attention", **mesh: int
) -> dict[str, object]:
    """What differs from the configuration.

    Chunks of a prompt are shorter than the default: of 256 tokens and eight heads a key/value head,
    the TPU's kernel over pages does not fit into its on-chip memory.
    """
    sizes = {f"mesh.{axis}": mesh.get(axis, 1) for axis in ("data", "fsdp", "context", "tensor")}
    return sizes | {
        "train.microbatch_rows": rows,
        "train.remat": remat,
        "rollout.slots": slots,
    }


CASES = {  # configuration, policy, what differs from it
    "v5e-16": ("rl_math", MODEL_3B, sets(context=8, fsdp=2, rows=2)),
    "v5e-256": ("rl_math", MODEL_3B, sets(context=8, fsdp=32, rows=32)),
    "v5p-8": ("rl_math", MODEL_3B, sets(context=4, slots=256)),
    "v6e-8": ("rl_math", MODEL_3B, sets(context=8, slots=256)),
    "tpu7x-8": ("rl_math", MODEL_3B, sets(context=4, fsdp=2, rows=2, slots=512)),
    "2xv5e-256": ("rl_math", MODEL_3B, sets(context=8, fsdp=32, data=2, rows=64)),
    "h100-8": ("rl_math", MODEL_3B, sets(context=8, slots=256)),
    "v5e-8": ("rl_math_1.5b_16k", MODEL_15B, sets(fsdp=8, rows=8, slots=128)),
}
COLUMNS = (
    "slice | policy, row | mesh, rows, remat | peak GiB of | train MFU causal exposed / hidden | "
    "packed row | train tokens/s a chip | decode share of roofline | decode tokens/s a chip | "
    "slots, pool tokens a host"
)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for case in sys.argv[2:] or CASES:
        config, model, changes = CASES[case]
        chosen = changes | {"policy": ROOT / "tpu" / "models" / f"{model}.json"}
        command = [
            sys.executable, ROOT / "tpu" / "plan.py", ROOT / "configs" / f"{config}.toml",
            "--slice", case, "--workers", "1", "--json", folder / f"{case}.json",
            *(x for key, value in chosen.items() for x in ("--set", f"{key}={value}")),
        ]  # fmt: skip
        with (folder / f"{case}.txt").open("w") as said:
            code = subprocess.run([*map(str, command)], stdout=said, stderr=said).returncode
        print(f"{case}: exit code {code}", file=sys.stderr, flush=True)
    print("\n".join(table(folder)))


def table(folder: Path) -> list[str]:
    """The lines of the table, a case with a JSON each."""
    lines = [f"| {COLUMNS} |", "|" + "---|" * len(COLUMNS.split(" | "))]
    for case, (config, model, _) in CASES.items():
        path = folder / f"{case}.json"
        if path.is_file():
            found = json.loads(path.read_text())
            lines.append(f"| {' | '.join(row(case, config, model, found))} |")
    return lines


def row(case: str, config: str, model: str, found: dict) -> list[str]:
    """The cells of one plan."""
    mesh = " ".join(f"{axis}={n}" for axis, n in found["mesh"].items() if n > 1)
    decode, fits = found.get("decode_full"), "" if found["fits"] else "does not fit: "

    def percent(name: str) -> str:
        exposed, hidden = (found[f"mfu_{name}_{kind}"] for kind in ("exposed", "hidden"))
        return f"{exposed:.0%} / {hidden:.0%}" if exposed else "-"

    return [
        case,
        f"{model.split('-')[-2]}, {'16K' if '16k' in config else '64K'}",
        f"{mesh}, {found['microbatch_rows']}, {found['remat']}",
        f"{fits}{found['peak_bytes'] / GIB:.1f} of {found['memory_bytes'] / GIB:.1f}",
        percent("causal"),
        percent("packed"),
        f"{found.get('train_tokens_per_s_per_chip', 0):,.0f}",
        f"{decode['share_of_roofline']:.0%}" if decode else "-",
        f"{found['decode']['tokens_per_s_per_chip']:,.0f}" if decode else "-",
        f"{found['slots']}, {found['pool_tokens']:,}",
    ]


if __name__ == "__main__":
    main()
