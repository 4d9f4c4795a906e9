"""Merging specialists, on and off, over several seeds: `python tests/benchmarks/merging.py OUT`.

The first SFT stage of configs/pipeline_quick.toml, with another order of its documents for each
seed; its checkpoints are probed, and the specialists merged, as there. The merge is compared with
the mean of its parts, and with the stage's last checkpoint, which a run without merging would go on
with: pass@1 and pass@8 of 512 held-out prompts of each domain, eight completions of each, the same
draws for all. Differences are paired by seed; intervals are Student's over seeds. Run again, it
goes on where it stopped; five minutes of two cores for each seed.
"""

import json
import sys
import tomllib
from pathlib import Path

import numpy as np
from ablations import T_975

from vibejax import domains, merge, probe, sft
from vibejax.config.probe import ProbeConfig
from vibejax.config.sft import SftConfig

CONFIG = Path(__file__).parents[2] / "configs" / "pipeline_quick.toml"
SEEDS = (0, 1, 2, 3, 4)
DOMAINS = ("math", "code", "stem")


def main() -> None:
    out = Path(sys.argv[1])
    if not (out / "tasks").exists():
        domains.write(out / "tasks", 0)
    quick = tomllib.loads(CONFIG.read_text())
    found = []
    for seed in SEEDS:
        folder = out / f"seed-{seed}"
        if not (folder / "scores.json").is_file():
            folder.mkdir(exist_ok=True)
            scores = one_seed(quick, out / "tasks", folder, seed)
            (folder / "scores.json").write_text(json.dumps(scores))
        found.append(json.loads((folder / "scores.json").read_text()))
        report(found)


def one_seed(quick: dict, tasks: Path, folder: Path, seed: int) -> dict:
    """Score of merge, mean of its parts and last checkpoint, by domain and k."""
    (stage,) = (stage["set"] for stage in quick["stages"] if stage["name"] == "sft1")
    own = {"data": str(tasks / "sft.jsonl"), "out": str(folder / "sft"), "seed": seed}
    settings = _merged(quick["defaults"]["sft"], stage) | own
    sft.run(SftConfig(**settings, resume="auto"))
    exports = [str(path) for path in sorted((folder / "sft" / "exports").iterdir())]
    probed = quick["defaults"]["probe"]
    sets = {domain: str(tasks / f"{domain}_probe.jsonl") for domain in DOMAINS}
    own = {"checkpoints": exports, "domains": sets, "out": str(folder / "probe"), "seed": seed}
    probe.run(ProbeConfig(**probed | own, resume=(folder / "probe").exists()))
    sources = merge.specialists(folder / "probe")
    merged = folder / "merged"
    if not merged.exists():
        merge.merge(merged, sources, None)
    parts = [source.model for source in sources]
    sets = {domain: str(tasks / f"{domain}_heldout.jsonl") for domain in DOMAINS}
    own = {
        "checkpoints": [*dict.fromkeys([*parts, exports[-1], str(merged)])],
        "domains": sets, "samples": 8, "k": 8, "out": str(folder / "judged"), "seed": seed,
        "rollout": probed["rollout"] | {"top_p": 1.0},
    }  # fmt: skip
    probe.run(ProbeConfig(**probed | own, resume=(folder / "judged").exists()))
    scores = json.loads((folder / "judged" / "probe.json").read_text())["scores"]
    weight = dict(zip(parts, merge.shares(sources), strict=True))

    def of(name: str, domain: str, k: int) -> float:
        (score,) = (s for s in scores if (s["checkpoint"], s["domain"]) == (name, domain))
        return score["pass_at"][k - 1]

    return {
        f"{domain} pass@{k}": {
            "merged": of(str(merged), domain, k),
            "parts": sum(share * of(name, domain, k) for name, share in weight.items()),
            "last": of(exports[-1], domain, k),
        }
        for domain in DOMAINS
        for k in (1, 8)
    } | {"sources": {Path(name).name: share for name, share in weight.items()}}


def _merged(table: dict, other: dict) -> dict:
    out = table | other
    return out | {"optimizer": table["optimizer"] | other["optimizer"]}


def report(found: list[dict]) -> None:
    """Prints a row for each score, over the seeds so far."""
    for score in [name for name in found[0] if name != "sources"]:
        row = {"benchmark": "merging", "score": score, "seeds": len(found)}
        for side in ("merged", "parts", "last"):
            row[side] = round(float(np.mean([seed[score][side] for seed in found])), 4)
        for side in ("parts", "last"):
            d_S = np.array([seed[score]["merged"] - seed[score][side] for seed in found])
            row[f"merged - {side}"] = round(float(d_S.mean()), 4)
            if len(d_S) > 1:
                half = T_975[len(d_S) - 2] * d_S.std(ddof=1) / len(d_S) ** 0.5
                row[f"merged - {side}, 95%"] = np.round(
                    [d_S.mean() - half, d_S.mean() + half], 4
                ).tolist()
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
