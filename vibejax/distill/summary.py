"""What became of the completions: counts of each cell, a table, and what a domain ended for."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vibejax.config.distill import DistillConfig
from vibejax.distill.traces import Lesson, Rejection, Sampled, Trace
from vibejax.losses.distillation import Fate
from vibejax.run_folder import RunError

# (domain, length bucket, what became of them) -> completions
Counts = collections.Counter[tuple[str, int, str]]


@dataclasses.dataclass(frozen=True)
class Decided:
    """The traces of a domain, and by place in `traces` what was found.

    Attributes:
        traces: all that were accepted.
        bucket_B: [B] int, length bucket.
        score_B: [B] float64, nats; NaN where there is no score.
        fate_B: [B] `Fate`.
    """

    traces: list[Trace]
    bucket_B: np.ndarray
    score_B: np.ndarray
    fate_B: np.ndarray

    @property
    def chosen_B(self) -> np.ndarray:
        """[B] bool."""
        return self.fate_B == Fate.CHOSEN


def count(sampled: Sampled, decided: Mapping[str, Decided]) -> Counts:
    """How each completion ended."""
    counts: Counts = collections.Counter(sampled.rejected)
    for domain, found in decided.items():
        for bucket, fate in zip(found.bucket_B, found.fate_B, strict=True):
            counts[domain, int(bucket), fate] += 1
    return counts


def require(left: Sequence[Any], domain: str, counts: Counts, config: DistillConfig) -> None:
    """Checks that a domain goes on.

    Raises:
        RunError: nothing of it is left; the message says of each cell what became of it.
    """
    if any(left):
        return
    cells = [
        f"{cell_name(bucket, config)} tokens: "
        + ", ".join(
            f"{counts[domain, bucket, end]} {end.replace('_', ' ')}"
            for end in (*Rejection, *Fate)
            if counts[domain, bucket, end]
        )
        for bucket in _buckets(domain, counts)
    ]
    total = sum(number for (name, _, _), number in counts.items() if name == domain)
    raise RunError(f"domain {domain}: of {total} completions none is left; {'; '.join(cells)}")


def summarize(
    decided: Mapping[str, Decided], counts: Counts, config: DistillConfig
) -> list[dict[str, Any]]:
    """The counts of each cell that has a completion, and below them its domain's."""
    rows = []
    for domain, found in decided.items():
        buckets = _buckets(domain, counts)
        cells = [(cell_name(bucket, config), [bucket]) for bucket in buckets]
        for name, own in [*cells, ("all", buckets)]:
            ends = {
                str(end): sum(counts[domain, bucket, end] for bucket in own)
                for end in (*Rejection, *Fate)
            }
            score_B = found.score_B[found.chosen_B & np.isin(found.bucket_B, own)]
            rows.append(
                {
                    "domain": domain,
                    "tokens": name,
                    "sampled": sum(ends.values()),
                    "accepted": sum(ends[end] for end in Fate),
                    **ends,
                    "chosen_scores": [score_B.min(), score_B.max()] if len(score_B) else None,
                }
            )
    return rows


def by_teacher(
    lessons: Sequence[Lesson], decided: Mapping[str, Decided], samples: int
) -> list[dict[str, Any]]:
    """What each teacher contributed to each of its domains."""
    rows = []
    for lesson in lessons:
        found, name = decided[lesson.domain], lesson.teacher.name
        own_B = np.array([trace.teacher == name for trace in found.traces])
        rows.append(
            {
                "domain": lesson.domain,
                "teacher": name,
                "sampled": len(lesson.prompts) * samples,
                "accepted": int(own_B.sum()),
                "chosen": int((own_B & found.chosen_B).sum()),
            }
        )
    return rows


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """The cells as people read them, and the names of those without a chosen trace."""
    steps = ["sampled", "accepted", *Fate]
    rows = [["domain", "tokens", *(step.replace("_", " ") for step in steps), "scores chosen"]]
    for cell in cells:
        ends = cell["chosen_scores"]
        scores = "" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"
        rows.append([cell["domain"], cell["tokens"], *(str(cell[s]) for s in steps), scores])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            text.rjust(width) if 2 <= i < len(row) - 1 else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lost = [f"{cell['domain']} {cell['tokens']}" for cell in cells if not cell["chosen"]]
    if lost:
        lines.append(f"no trace is chosen of: {', '.join(lost)}")
    return "\n".join(lines)


def cell_name(bucket: int, config: DistillConfig) -> str:
    """The lengths of a bucket."""
    edges = config.selection.edges
    low = edges[bucket - 1] if bucket else 0
    return f"{low}-{edges[bucket] - 1}" if bucket < len(edges) else f"{low}+"


def _buckets(domain: str, counts: Counts) -> list[int]:
    return sorted({bucket for name, bucket, _ in counts if name == domain})
