"""One RL run by 1, 2 and 4 processes of eight devices in all: `python tests/benchmarks/hosts.py`.

Real processes, which talk over this machine's loopback, train a tiny policy for five steps on a
mesh of fsdp, context and tensor. All must draw the same prompts; completions are compared as long
as the parameters have the same bits, at step 1, and reported for the steps after it; and the
parameters must end within a thousandth of the whole update.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import harness
import processes

LAYOUTS = ((1, 8), (2, 4), (4, 2))  # processes, devices of each
BOUND = 1e-3
LIMIT_S = 3_600


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes.prepare(folder)
        outs = []
        for count, devices in LAYOUTS:
            began = time.perf_counter()
            outs.append(processes.train_rl(folder, count, devices, LIMIT_S)[0])
            print(f"{count} x {devices}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
        good = [compare(folder, outs[0], out) for out in outs[1:]]
    sys.exit(not all(good))


def compare(folder: Path, one: Path, other: Path) -> bool:
    """Prints a row; whether two runs are as alike as they must be."""
    pairs = [*zip(*(processes.rows_of(out, "samples.jsonl") for out in (one, other)), strict=True)]
    prompts = all(a["prompt"] == b["prompt"] for a, b in pairs)
    first = all(a == b for a, b in pairs if a["step"] == 1)
    share = processes.apart(folder, one, other)
    results = {"ours": {"apart": share}, "peer": {"apart": BOUND}}
    harness.row(
        "hosts", other.name, results, "apart", f"share of the update of {one.name}",
        higher_is_better=False, share=f"{share:.1e}", same_prompts=prompts,
        same_samples_of_step_1=first, same_samples=sum(a == b for a, b in pairs) / len(pairs),
    )  # fmt: skip
    return prompts and first and share <= BOUND


if __name__ == "__main__":
    main()
