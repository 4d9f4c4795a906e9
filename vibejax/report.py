"""A run as a picture: `python -m vibejax.report RUN --out F.png`.

Draws the curves of metrics.jsonl: accuracy of the training groups and of held-out prompts with
its 95% interval, completion length, and how far sampler and trainer are apart.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from vibejax.config_file import InputError, errors_in_one_line
from vibejax.run_folder import read_log

matplotlib.use("Agg")  # files only: no display is needed or opened

from matplotlib import pyplot as plt

LABEL = 24  # characters of a checkpoint's name


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, metavar="F.png")
    args = parser.parse_args()
    with errors_in_one_line():
        rows = read_log(args.run / "metrics.jsonl")
        if not rows:
            raise InputError(f"{args.run}: has no metrics.jsonl with a step in it")
        draw(rows, args.out)


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """Writes the picture of a run's metrics."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    accuracy, length, agreement = axes
    _curve(accuracy, rows, "rollout/accuracy", label="training groups", alpha=0.6)
    heldout = [row for row in rows if "heldout/pass@1" in row]
    if heldout:
        value = [row["heldout/pass@1"] for row in heldout]
        low = [v - row["heldout/pass@1_low"] for v, row in zip(value, heldout, strict=True)]
        high = [row["heldout/pass@1_high"] - v for v, row in zip(value, heldout, strict=True)]
        steps = [row["step"] for row in heldout]
        accuracy.errorbar(
            steps, value, [low, high], fmt="o-", capsize=3, label="held-out, 95% interval"
        )
    accuracy.set(title="pass@1", ylim=(0, 1))
    _curve(length, rows, "rollout/length", color="tab:green")
    length.set(title="tokens of a completion", ylim=(0, None))
    _curve(agreement, rows, "agreement/mean_abs_dlogp", label="mean", color="tab:red")
    _curve(agreement, rows, "agreement/max_abs_dlogp", label="largest", color="tab:orange")
    agreement.set(title="|sampler - trainer log-prob|, nats", yscale="log")
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:  # a run may have learnt from nothing
            axis.legend()
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def draw_probe(
    checkpoints: Sequence[str], scores: Mapping[str, np.ndarray], title: str, out: Path
) -> None:
    """Writes the picture of a probe: each domain's score over the checkpoints, the best starred.

    Args:
        checkpoints: T names.
        scores: domain -> [T, 3] float: the score and the two ends of its interval.
        title: what the scores are.
        out: the file.
    """
    figure, axis = plt.subplots(figsize=(2 + 0.8 * len(checkpoints), 4), layout="constrained")
    place = np.arange(len(checkpoints))
    for domain, (value, low, high) in ((name, score.T) for name, score in scores.items()):
        line = axis.errorbar(
            place,
            value,
            np.maximum([value - low, high - value], 0),
            fmt="o-",
            capsize=3,
            label=domain,
        )
        best = value.argmax()
        axis.plot(best, value[best], "*", color=line[0].get_color(), markersize=14)
    labels = [name if len(name) <= LABEL else f"...{name[-LABEL:]}" for name in checkpoints]
    axis.set_xticks(place, labels, rotation=30, ha="right")
    axis.set(title=title, ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(out, dpi=110)
    plt.close(figure)


def draw_distillation(
    domains: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    edges: Sequence[int],
    out: Path,
) -> None:
    """Writes histograms of each domain's traces: scores and lengths, all and the chosen ones.

    Args:
        domains: name -> [B] scores, NaN where there is none, [B] lengths, [B] bool chosen, of
            which some are.
        edges: of the length buckets.
        out: the file.
    """
    size = (10, 0.4 + 2.8 * len(domains))
    figure, axes = plt.subplots(len(domains), 2, figsize=size, squeeze=False, layout="constrained")
    for row, (domain, (score_B, length_B, chosen_B)) in zip(axes, domains.items(), strict=True):
        scored_B = ~np.isnan(score_B)
        _two_histograms(row[0], score_B[scored_B], chosen_B[scored_B], "scored")
        for end in (score_B[chosen_B].min(), score_B[chosen_B].max()):
            row[0].axvline(end, color="tab:orange", linestyle=":")
        row[0].set(title=f"{domain}: score, nats a token")
        _two_histograms(row[1], length_B, chosen_B, "accepted")
        for edge in edges:
            if length_B.min() < edge <= length_B.max():
                row[1].axvline(edge, color="gray", linewidth=0.8)
        row[1].set(title=f"{domain}: tokens, and the buckets' edges")
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _two_histograms(axis, value_B: np.ndarray, chosen_B: np.ndarray, label: str) -> None:
    """Of all values, and of the chosen ones over them."""
    bins = np.histogram_bin_edges(value_B, bins=min(40, max(8, len(value_B) // 8)))
    axis.hist(value_B, bins, color="lightgray", label=f"{len(value_B)} {label}")
    axis.hist(value_B[chosen_B], bins, alpha=0.7, label=f"{chosen_B.sum()} chosen")
    axis.legend()


def _curve(axis, rows: list[dict[str, Any]], name: str, **style) -> None:
    """The steps that have a value."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        axis.plot(*zip(*points, strict=True), **style)


if __name__ == "__main__":
    main()
