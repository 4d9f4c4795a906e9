"""What became of the records, as numbers and as tables."""

import collections
from pathlib import Path
from typing import Any

from rich.table import Table

from vibejax.curate.evaluation import Index


class Counts:
    """What the report is made of.

    Attributes:
        read, kept: records of each file.
        dropped: records of each reason.
        items: records that repeat each item of an evaluation set.
        labelled: records that were given a ground truth.
        without_verifier: records whose traces nothing could verify, where traces are; they stay.
    """

    def __init__(self) -> None:
        """Has counted nothing yet."""
        self.read: collections.Counter[str] = collections.Counter()
        self.kept: collections.Counter[str] = collections.Counter()
        self.dropped: collections.Counter[str] = collections.Counter()
        self.items: collections.Counter[str] = collections.Counter()
        self.labelled = 0
        self.without_verifier = 0


def summary(
    counts: Counts, inputs: list[Path], index: Index | None, seconds: float
) -> dict[str, Any]:
    """The report: counts of records by reason, by input, and by evaluation set and item."""
    read, kept = counts.read.total(), counts.kept.total()
    report: dict[str, Any] = {
        "read": read,
        "kept": kept,
        "dropped": dict(counts.dropped.most_common()),
        "labelled": counts.labelled,
        "without_verifier": counts.without_verifier,
        "inputs": {
            str(path): {"read": counts.read[str(path)], "kept": counts.kept[str(path)]}
            for path in inputs
        },
        "evaluation": {},
        "seconds": round(seconds, 1),
        "records_per_s": round(read / seconds, 1),
    }
    if index is not None:
        for name, instruction in index.instructions.items():
            own = [i for item in index.items for i in item.names if i.rpartition(":")[0] == name]
            short = [i for i in index.too_short if i.rpartition(":")[0] == name]
            matched = {i: counts.items[i] for i in own if counts.items[i]}
            report["evaluation"][name] = {
                "items": len(own) + len(short),
                "too_short": short,
                "instruction": instruction,
                "dropped_by_item": matched,
            }
    return report


def tables(report: dict[str, Any]) -> list[Table]:
    """The report as it is printed."""
    read = max(report["read"], 1)
    table = Table("records", "count", "share")
    rows = {"read": report["read"], **report["dropped"], "kept": report["kept"]}
    for name, count in rows.items():
        label = name if name in ("read", "kept") else f"  {name.replace('_', ' ')}"
        table.add_row(label, f"{count:,}", f"{count / read:.2%}")
    tables = [table]
    if report["evaluation"]:
        sets = Table("evaluation set", "items", "found in records", "records dropped", "too short")
        for name, found in report["evaluation"].items():
            matched = found["dropped_by_item"]
            cells = (found["items"], len(matched), sum(matched.values()), len(found["too_short"]))
            sets.add_row(name, *map(str, cells))
        tables.append(sets)
    return tables
