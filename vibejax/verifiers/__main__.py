"""Verifies the completions of a JSON Lines file, to debug rewards outside of a run.

    python -m vibejax.verifiers FILE.jsonl --out VERDICTS.jsonl

Each line holds `verifier`, what that verifier compares with (`ground_truth`, for code `tests`) and
`completion`. Each line of the output is that line with `correct`, `reward`, `outcome`, `answer`
(what was extracted) and `detail` (what went wrong) added, in the order of the input. Lines that
cannot be verified are named by their number and left out; the exit status is then 1.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vibejax.verifiers import Outcome, Verdict
from vibejax.verifiers.pool import Pool, VerifierFailure
from vibejax.verifiers.worker import combine, names

SHOWN_LINES = 20  # of each kind of trouble
ADDED_FIELDS = [field.name for field in dataclasses.fields(Verdict)]


Judge = Callable[[Sequence[tuple[dict[str, Any], str]], dict[str, Any]], list[Verdict]]
"""Scores (record, completion) pairs by the settings of `rubric`."""


def main(arguments: list[str] | None = None, judge: Judge | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: None takes the process's.
        judge: scores what asks for `rubric`, in this process and after all else; None leaves it
            to the workers and their endpoint.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vibejax.verifiers",
        description="Verifies the completions of a JSON Lines file.",
    )
    parser.add_argument("file", type=Path, metavar="FILE.jsonl", help="records with completions")
    parser.add_argument("--out", type=Path, required=True, metavar="F", help="where verdicts go")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--limit-s", type=float, default=10.0, help="seconds for one item")
    parser.add_argument("--memory-mb", type=int, default=2048, help="memory of a process, MiB")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="VERIFIER.KEY=VALUE",
        help="a setting of a verifier, as code.allow_unsandboxed=true",
    )
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        settings = _settings(options.set)
        pool = Pool(
            workers=options.workers,
            limit_s=options.limit_s,
            memory_mb=options.memory_mb,
            max_failure_rate=1.0,  # failures are what the reader looks for
            settings=settings,
        )
        with pool:
            scoring = judge and functools.partial(judge, settings=settings.get("rubric", {}))
            return _run(options.file, options.out, pool, console, scoring)
    except (OSError, ValueError, VerifierFailure) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted: nothing was written", style="red")
        return 130


def _run(
    source: Path,
    target: Path,
    pool: Pool,
    console: Console,
    judge: Callable[..., list[Verdict]] | None,
) -> int:
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"--out = {target} is the input itself")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"--out = {target}: its folder does not exist")
    lines = sum(1 for line in _lines(source) if line.strip())
    rejected: dict[int, str] = {}
    accepted: list[tuple[int, dict[str, Any]]] = []
    verdicts: dict[int, Verdict] = {}
    to_judge: list[tuple[int, dict[str, Any], str]] = []
    columns = (TextColumn("verified"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=lines)
        for number, line in enumerate(_lines(source), start=1):
            if not line.strip():
                continue
            try:
                record = _record(line)
                bare = {k: v for k, v in record.items() if k not in ("completion", *ADDED_FIELDS)}
                others = names(bare)
                if not isinstance(record["completion"], str):
                    raise ValueError(f"completion = {record['completion']!r:.80} is not a string")
                if judge is not None and "rubric" in others:
                    others.remove("rubric")
                    to_judge.append((number, bare, record["completion"]))
                if others:
                    pool.submit(number, {**bare, "verifier": others}, record["completion"])
            except ValueError as error:
                rejected[number] = str(error)
            else:
                accepted.append((number, record))
            verdicts.update(pool.finished(wait=False))
            progress.update(task, completed=len(verdicts) + len(rejected))
        for number, verdict in pool.finished():
            verdicts[number] = verdict
            progress.update(task, completed=len(verdicts) + len(rejected))
    if judge is not None and to_judge:
        scored = judge([(bare, completion) for _, bare, completion in to_judge])
        for (number, _, _), verdict in zip(to_judge, scored, strict=True):
            others = {"others": verdicts[number]} if number in verdicts else {}
            verdicts[number] = combine({**others, "rubric": verdict})
    _write(target, ({**r, **dataclasses.asdict(verdicts[n])} for n, r in accepted))
    _report(console, source, accepted, verdicts, rejected)
    return 1 if rejected else 0


def _lines(source: Path) -> Iterator[bytes]:
    with source.open("rb") as file:
        yield from file


def _record(line: bytes) -> dict[str, Any]:
    """Reads one line.

    Raises:
        ValueError: it is no JSON object with a completion.
    """
    try:
        record = json.loads(line)
    except RecursionError as error:
        raise ValueError("not JSON: brackets inside each other without end") from error
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object but {type(record).__name__}")
    if "completion" not in record:
        raise ValueError("record lacks `completion`")
    return record


def _settings(assignments: list[str]) -> dict[str, dict[str, Any]]:
    settings: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        name, dot, key = path.partition(".")
        if not (equals and dot and name and key):
            raise ValueError(f"--set {assignment!r} is not of the form VERIFIER.KEY=VALUE")
        with contextlib.suppress(ValueError):  # what is no JSON is text
            value = json.loads(value)
        settings[name][key] = value
    return dict(settings)


def _write(target: Path, records: Iterator[dict[str, Any]]) -> None:
    """Writes the file whole or not at all."""
    partial = target.with_name(target.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
    partial.replace(target)


def _report(
    console: Console,
    source: Path,
    accepted: list[tuple[int, dict[str, Any]]],
    verdicts: dict[int, Verdict],
    rejected: dict[int, str],
) -> None:
    """Prints a table of outcomes, then the lines that failed and those that are no records."""
    by_name: dict[str, list[Verdict]] = collections.defaultdict(list)
    for number, record in accepted:
        asked = record["verifier"]
        name = asked if isinstance(asked, str) else " + ".join(asked)
        by_name[name].append(verdicts[number])
    seen = [outcome for outcome in Outcome if any(v.outcome is outcome for v in verdicts.values())]
    table = Table("verifier", "items", *(str(outcome) for outcome in seen), "mean reward")
    for name, group in sorted(by_name.items()):
        counts = collections.Counter(verdict.outcome for verdict in group)
        scored = [verdict.reward for verdict in group if verdict.scored]
        mean = f"{sum(scored) / len(scored):.4f}" if scored else "-"
        table.add_row(name, str(len(group)), *(str(counts[outcome]) for outcome in seen), mean)
    Console().print(table)
    failed = {
        number: f"{verdict.outcome}: {verdict.detail}"
        for number, verdict in sorted(verdicts.items())
        if not verdict.scored
    }
    for title, troubles in (("failed", failed), ("left out", rejected)):
        for number, text in list(troubles.items())[:SHOWN_LINES]:
            message = f"{source}:{number}: {title}: {text}"
            console.print(message, markup=False, highlight=False, soft_wrap=True)
        if len(troubles) > SHOWN_LINES:
            console.print(f"... and {len(troubles) - SHOWN_LINES} more lines {title}")


if __name__ == "__main__":
    sys.exit(main())
