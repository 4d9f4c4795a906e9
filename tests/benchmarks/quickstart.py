"""The embedded default over three seeds, and its control: `python tests/benchmarks/quickstart.py`.

Each seed is the command a user runs, timed from process start. The control is the same run with
coin flips in place of verdicts on training completions: it must gain nothing.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time

SEEDS = (0, 1, 2)


def shipped(seed: int, folder: str) -> dict[str, float]:
    start = time.perf_counter()
    command = [sys.executable, "-m", "vibejax.rl", "--set", f"seed={seed}", "--set"]
    done = subprocess.run(
        [*command, f"out={folder}/seed{seed}"], check=True, stdout=subprocess.PIPE, text=True
    )
    return _gain(done.stdout) | {"seconds": time.perf_counter() - start}


def control(folder: str) -> dict[str, float]:
    script = [sys.executable, __file__, "control", f"{folder}/control"]
    done = subprocess.run(script, check=True, stdout=subprocess.PIPE, text=True)
    return _gain(done.stdout)


def run_control(out: str) -> None:
    from vibejax import rl
    from vibejax.config.rl import RlConfig
    from vibejax.config_file import load
    from vibejax.locations import resolve
    from vibejax.verifiers import Outcome, Verdict
    from vibejax.verifiers.pool import Pool

    config = load(RlConfig, rl.DEFAULT, [f"out={out}"])
    heldout = {json.loads(line)["prompt"] for line in resolve(config.heldout).open()}

    class CoinFlips(Pool):
        """Judges held-out completions, and flips a coin for all others."""

        flipped = ()

        def submit(self, key, record, completion):
            if record["prompt"] in heldout:
                super().submit(key, record, completion)
                return
            digest = hashlib.sha256(f"{record['prompt']}{key}{completion}".encode()).digest()
            right = digest[0] % 2 == 0
            outcome = Outcome.CORRECT if right else Outcome.WRONG
            verdict = Verdict(correct=right, reward=float(right), outcome=outcome)
            self.flipped = (*self.flipped, (key, verdict))

        def finished(self, *, wait):
            flipped, self.flipped = self.flipped, ()
            yield from flipped
            yield from super().finished(wait=wait)

    rl.run(config, open_pool=CoinFlips)


def _gain(output: str) -> dict[str, float]:
    before, after, prompts = re.search(
        r"held-out pass@1: ([\d.]+) -> ([\d.]+) \((\d+) prompts", output
    ).groups()
    return {"before": float(before), "after": float(after), "prompts": int(prompts)}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = {seed: shipped(seed, folder) for seed in SEEDS}
        flips = control(folder)
        for seed, result in results.items():
            ours, peer = (r["after"] - r["before"] for r in (result, flips))
            row = {
                "benchmark": "quickstart",
                "case": f"seed {seed}, peer: random rewards",
                "ours": round(ours, 3),
                "peer": round(peer, 3),
                "ratio": round(ours / peer, 3) if peer else None,
                "unit": "gain of held-out pass@1",
                "higher_is_better": True,
                "seconds": round(result["seconds"], 1),
                **result,
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    run_control(sys.argv[2]) if len(sys.argv) > 1 else main()
