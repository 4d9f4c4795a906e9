"""Cleans prompts and traces: `python -m vibejax.curate CONFIG [--set key=value ...]`.

Reads records (JSONL or parquet) in one pass and writes those that stay, as they came, in their
order. Each record meets, in this order: length bounds, the repetition filter, decontamination, the
template filter, exact and near duplicates, and, where asked for, what rollouts and verifiers say.
Beside OUT.jsonl lie OUT.dropped.jsonl (each dropped record's file, line, id, reason and match),
OUT.report.json and the same as a table, OUT.report.txt.

Only hashes of records are kept: memory grows by some 400 bytes a kept record, whatever its length.
"""

import bisect
import collections
import functools
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from vibejax import benchmarks, buckets
from vibejax.config.curate import CurateConfig
from vibejax.config_file import InputError, errors_in_one_line, parse_args
from vibejax.curate import evaluation, report, rollouts
from vibejax.curate.duplicates import Seen
from vibejax.curate.evaluation import Index
from vibejax.curate.inspection import Findings, Reason, inspect_all, token_counter
from vibejax.curate.record_files import SUFFIXES, Chunk, Writer, parts
from vibejax.curate.repetition import Templates
from vibejax.curate.report import Counts
from vibejax.locations import resolve
from vibejax.records import Record, read_records
from vibejax.run_folder import RunError
from vibejax.verifiers.pool import Pool, VerifierFailure
from vibejax.votes import equal_answers


def main() -> None:
    """Runs the stage that the command line configures."""
    config = parse_args(CurateConfig, doc=__doc__)
    with errors_in_one_line(VerifierFailure, OSError):
        run(config)


def run(config: CurateConfig) -> dict[str, Any]:
    """Cleans the records, and returns the report.

    Raises:
        InputError: an input, an evaluation set or a record cannot be used.
        VerifierFailure: the verifiers fail too often.
    """
    began = time.perf_counter()
    inputs = [_input(name) for name in config.inputs]
    if not inputs:
        raise InputError("inputs = []: must name at least one file")
    sets = _evaluation_sets(config)
    out = _outputs(config, [*inputs, *(path for _, path in sets)])
    index = _index(config, sets)
    token_counter(config)  # names a tokenizer that cannot be used before any worker starts
    kept, dropped = Writer(out["kept"]), Writer(out["dropped"])
    try:
        counts = _clean(config, inputs, index, kept, dropped)
    except BaseException:
        kept.discard()
        dropped.discard()
        raise
    kept.close()
    dropped.close()
    summary = report.summary(counts, inputs, index, time.perf_counter() - began)
    out["report"].write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    table = report.tables(summary)
    with out["table"].open("w") as file:
        Console(file=file, width=100).print(*table)
    Console(file=sys.stderr).print(*table)
    return summary


def _input(name: str) -> Path:
    path = resolve(name)
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: must end with {' or '.join(SUFFIXES)}")
    return _there(path)


def _there(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return path


def _evaluation_sets(config: CurateConfig) -> list[tuple[str, Path]]:
    sets = []
    for text in config.decontaminate.sets:
        name, equals, path = text.partition("=")
        path = _there(resolve(path if equals else text))
        sets.append((name if equals else path.stem, path))
    names = [name for name, _ in sets]
    if len(set(names)) < len(names):
        raise InputError(f"decontaminate.sets: two are called {max(names, key=names.count)!r}")
    return sets


def _outputs(config: CurateConfig, read: list[Path]) -> dict[str, Path]:
    """The files that are written, none of which is read."""
    out = buckets.on_disk(config.out)
    if out.suffix not in SUFFIXES:
        raise InputError(f"out = {config.out!r}: must end with {' or '.join(SUFFIXES)}")
    if not out.absolute().parent.is_dir():
        raise RunError(f"out = {config.out!r}: its folder does not exist")
    suffixes = {"dropped": ".dropped.jsonl", "report": ".report.json", "table": ".report.txt"}
    paths = {"kept": out} | {name: out.with_suffix(suffix) for name, suffix in suffixes.items()}
    for path in paths.values():
        if any(path.resolve() == other.resolve() for other in read):
            raise InputError(f"out = {config.out!r} would write {path}, which is read")
    return paths


def _index(config: CurateConfig, sets: list[tuple[str, Path]]) -> Index | None:
    """The evaluation sets, of any layout that `benchmarks` knows, ready to be looked for.

    Raises:
        InputError: a set is empty, or an item has no problem.
    """
    field = config.decontaminate.field
    texts: dict[str, list[str]] = {}
    for name, path in sets:
        texts[name] = []
        for number, row in read_records(path):
            where = f"{path}:{number}"
            text = row.get(field) if field else _problem(row, where)
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{where}: has no text in {field or 'prompt'!r}")
            texts[name].append(text)
    n, share = config.decontaminate.n, config.decontaminate.share
    return evaluation.build(texts, n=n, share=share) if texts else None


def _problem(row: Record, where: str) -> str:
    """What an item of an evaluation set asks."""
    try:
        text = benchmarks.problem(row)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    return parts(row, where)[0] if text is None else text


def _clean(
    config: CurateConfig, inputs: list[Path], index: Index | None, kept: Writer, dropped: Writer
) -> Counts:
    """Reads all inputs and writes every record to one of the two files."""
    counts, seen = Counts(), Seen(**config.duplicates.model_dump())
    templates = Templates(config.repetition.template_records)
    began: list[int] = []  # the number of each file's first record, to say where one was
    number = 0
    asks = config.verify_traces or config.rollouts.keep != "all" or config.rollouts.pseudo_labels
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
               TimeRemainingColumn(), TextColumn("{task.fields[said]}"))  # fmt: skip
    with (
        Pool(**config.verifiers.pool_arguments()) as pool,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        tasks = [progress.add_task(path.name, total=1.0, said="") for path in inputs]
        for source, chunk, findings in inspect_all(config, inputs, index):
            if source == len(began):
                began.append(number)
            if config.repetition.max_template_share < 1:
                _drop_templates(config, findings, templates)
            _drop_duplicates(findings, seen, number, lambda n: _where(n, inputs, began))
            number += len(chunk)
            left = [i for i, reason in enumerate(findings.reasons) if reason is None]
            if asks:
                records = chunk.records()
                _ask_verifiers(config, chunk, records, left, findings.reasons, pool, counts)
                left = [i for i in left if findings.reasons[i] is None]
                kept.write_records(
                    [{k: v for k, v in records[i].items() if k != "completions"} for i in left]
                )
            else:
                kept.write_chunk(chunk, left)
            dropped.write_records(_dropped_rows(chunk, findings, counts))
            path = str(chunk.path)
            counts.read[path] += len(chunk)
            counts.kept[path] += len(left)
            said = f"{counts.read[path]:,} read, {counts.kept[path]:,} kept"
            progress.update(tasks[source], completed=chunk.done, said=said)
    return counts


def _drop_templates(config: CurateConfig, findings: Findings, templates: Templates) -> None:
    for i, reason in enumerate(findings.reasons):
        if reason is None:
            share = templates.share(*findings.lines[i])
            if share > config.repetition.max_template_share:
                findings.reasons[i] = "template", {"template_share": round(share, 3)}


def _drop_duplicates(
    findings: Findings, seen: Seen, number: int, where: Callable[[int], dict[str, Any]]
) -> None:
    """Drops what was there before; `where` says where the record of a number is."""
    left = [i for i, reason in enumerate(findings.reasons) if reason is None]
    hashes_RB = findings.min_hashes
    earlier = seen.take(
        [number + i for i in left],
        [findings.exact_keys[i] for i in left],
        [findings.near_keys[i] for i in left],
        None if hashes_RB is None else hashes_RB[left],
    )
    for i, found in zip(left, earlier, strict=True):
        if found is not None and found.share is None:
            findings.reasons[i] = "duplicate", where(found.number)
        elif found is not None:
            share = {"share": round(found.share, 3)}
            findings.reasons[i] = "near_duplicate", where(found.number) | share


def _where(number: int, inputs: list[Path], began: list[int]) -> dict[str, Any]:
    source = bisect.bisect_right(began, number) - 1
    return {"file": str(inputs[source]), "line": number - began[source] + 1}


def _ask_verifiers(
    config: CurateConfig,
    chunk: Chunk,
    records: list[dict[str, Any]],
    left: list[int],
    reasons: list[Reason | None],
    pool: Pool,
    counts: Counts,
) -> None:
    """Labels and judges the records that are left; sets the reasons of those that go."""
    if config.rollouts.pseudo_labels:
        for i in left:
            if _wants_label(records[i]):
                reasons[i] = _label(config, records[i], chunk.where(i), pool)
                counts.labelled += reasons[i] is None
        left = [i for i in left if reasons[i] is None]
    if config.verify_traces:
        counts.without_verifier += sum(not _is_to_be_verified(records[i]) for i in left)
        _judge_traces(chunk, records, left, reasons, pool)
        left = [i for i in left if reasons[i] is None]
    if config.rollouts.keep != "all":
        _judge_rollouts(config, chunk, records, left, reasons, pool)


def _wants_label(record: Record) -> bool:
    """Whether a record has nothing to be verified with, and may be of math."""
    given = any(record.get(name) is not None for name in (*benchmarks.TRUTHS, "reward_model"))
    return not given and record.get("verifier") in (None, "math", "math_judge", ["math"])


def _is_to_be_verified(record: Record) -> bool:
    """Whether a record means to be: one with a truth and no verifier is an error then."""
    names = ("verifier", "reward_model", *benchmarks.TRUTHS)
    return any(record.get(name) is not None for name in names)


def _label(config: CurateConfig, record: dict[str, Any], where: str, pool: Pool) -> Reason | None:
    """Gives a record the answer of most of its completions as ground truth."""
    texts = rollouts.completion_texts(record, where)
    answer, votes = rollouts.majority(texts, functools.partial(equal_answers, pool))
    if answer is None or votes < config.rollouts.min_votes * len(texts):
        return "no_majority", {"votes": votes, "completions": len(texts)}
    share = round(votes / len(texts), 3)
    record.update({"verifier": "math", "ground_truth": answer, "vote_share": share})
    return None


def _judge_traces(
    chunk: Chunk,
    records: list[dict[str, Any]],
    left: list[int],
    reasons: list[Reason | None],
    pool: Pool,
) -> None:
    """Drops traces that their verifiers do not accept; records without a verifier stay."""
    items = []
    left = [i for i in left if _is_to_be_verified(records[i])]
    for i in left:
        where, record = chunk.where(i), benchmarks.asked(records[i])
        trace = parts(records[i], where)[1]
        if not trace:
            raise InputError(f"{where}: has no trace: no 'completion' or message of an 'assistant'")
        items.append(({k: v for k, v in record.items() if k != "completion"}, where, trace))
    for i, verdict in zip(left, rollouts.verdicts(pool, items), strict=True):
        if not verdict.correct:
            reason = "trace_wrong" if verdict.scored else "unverified"
            found = {"outcome": verdict.outcome, "answer": verdict.answer}
            reasons[i] = reason, found | ({"detail": verdict.detail} if verdict.detail else {})


def _judge_rollouts(
    config: CurateConfig,
    chunk: Chunk,
    records: list[dict[str, Any]],
    left: list[int],
    reasons: list[Reason | None],
    pool: Pool,
) -> None:
    """Drops what is too easy, or not mixed; also what nothing says that of."""
    accuracy = {i: rollouts.given_accuracy(records[i], chunk.where(i)) for i in left}
    items = [
        (i, (benchmarks.asked(records[i]), chunk.where(i), text))
        for i in left
        if accuracy[i] is None
        for text in rollouts.completion_texts(records[i], chunk.where(i))
        if _is_to_be_verified(records[i])
    ]
    groups = collections.defaultdict(list)
    found = rollouts.verdicts(pool, [item for _, item in items])
    for (i, _), verdict in zip(items, found, strict=True):
        groups[i].append(verdict)
    accuracy |= {i: rollouts.accuracy(group) for i, group in groups.items()}
    for i, value in accuracy.items():
        if value is None:
            reasons[i] = "unverified", {"completions": len(groups[i])}
            continue
        records[i]["accuracy"] = value
        if config.rollouts.keep == "hard" and 1 - value < config.rollouts.min_error_rate:
            reasons[i] = "easy", {"accuracy": round(value, 4)}
        elif config.rollouts.keep == "mixed" and value in (0, 1):
            reasons[i] = ("solved" if value else "unsolved"), {"accuracy": value}


def _dropped_rows(chunk: Chunk, findings: Findings, counts: Counts) -> Iterable[dict[str, Any]]:
    rows = []
    for i, reason in enumerate(findings.reasons):
        if reason is not None:
            name, match = reason
            counts.dropped[name] += 1
            if name == "contaminated":
                counts.items.update(match["item"].split("+"))
            place = {"file": str(chunk.path), "line": chunk.first + i, "id": findings.ids[i]}
            rows.append({**place, "reason": name, "match": match})
    return rows


if __name__ == "__main__":
    main()
