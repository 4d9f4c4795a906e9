"""python -m vibejax.curate: what stays, and why the rest went; bad input by its line."""

import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from vibejax.config.curate import CurateConfig
from vibejax.config_file import InputError, load
from vibejax.curate import rollouts
from vibejax.curate.__main__ import run
from vibejax.curate.record_files import Writer, read_chunks

ITEM = "A fair coin is thrown until three heads have come in a row; how long does that take?"
SENTENCE = "So the sum of all of these is equal to the other value of y and no more. "
VERSE = "The quick fox jumps over a lazy dog while seven wise owls look on from the old oak tree"
RECORDS = [
    {"id": "kept", "prompt": "What is 2 + 3?", "completion": "Five.", "note": "é"},
    {"id": "copy", "prompt": f"Solve: {ITEM.upper()}"},
    {"id": "loop", "prompt": "Add 1 and 2.", "completion": SENTENCE * 40},
    {"id": "twin", "messages": [{"role": "user", "content": "what is  2 + 3"},
                                {"role": "assistant", "content": "five"}]},
    {"id": "void", "prompt": ""},
    {"id": "verse", "prompt": VERSE},
    {"id": "close", "prompt": VERSE + " and on"},
    {"id": "other trace", "prompt": "What is 2 + 3?", "completion": "It is 5."},
]  # fmt: skip
REASONS = {
    "copy": "contaminated",
    "loop": "repetition",
    "twin": "duplicate",
    "void": "prompt_short",
    "close": "near_duplicate",
}


def write(path, records):
    if path.suffix == ".parquet":
        names = dict.fromkeys(name for record in records for name in record)
        rows = [{name: record.get(name) for name in names} for record in records]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path):
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


def configured(folder, records=RECORDS, *, source="in.jsonl", out="out.jsonl", **more):
    """A configuration with two evaluation sets' worth of items, on records written to `source`."""
    write(folder / "exam.jsonl", [{"prompt": ITEM}, {"prompt": "Name the third prime after 90."}])
    if records is not None:
        write(folder / source, records)
    settings = {
        "inputs": [str(folder / source)],
        "out": str(folder / out),
        "workers": 1,
        "decontaminate": {"sets": [f"exam={folder / 'exam.jsonl'}"]},
        "duplicates": {"near": 0.8},
        "verifiers": {"workers": 1},
    }
    return CurateConfig.model_validate(settings | more)


@pytest.mark.parametrize("source", ["in.jsonl", "in.parquet"])
@pytest.mark.parametrize("out", ["out.jsonl", "out.parquet"])
def test_each_record_is_kept_or_dropped_for_its_reason(tmp_path, source, out):
    report = run(configured(tmp_path, source=source, out=out))
    kept = [r for r in RECORDS if r["id"] not in REASONS]
    written = [{k: v for k, v in r.items() if v is not None} for r in read(tmp_path / out)]
    assert written == kept
    dropped = {row["id"]: row for row in read(tmp_path / "out.dropped.jsonl")}
    assert {name: row["reason"] for name, row in dropped.items()} == REASONS
    assert report["dropped"] == dict.fromkeys(REASONS.values(), 1)
    assert (report["read"], report["kept"]) == (8, 3)
    place = str(tmp_path / source)
    assert dropped["copy"]["file"] == place and dropped["copy"]["line"] == 2
    assert dropped["copy"]["match"]["item"] == "exam:1"
    assert dropped["twin"]["match"] == {"file": place, "line": 1}
    assert dropped["close"]["match"]["line"] == 6 and dropped["close"]["match"]["share"] >= 0.8
    assert report["evaluation"]["exam"]["dropped_by_item"] == {"exam:1": 1}
    assert json.loads((tmp_path / "out.report.json").read_text()) == report
    assert "contaminated" in (tmp_path / "out.report.txt").read_text()


def test_lines_that_are_kept_are_the_bytes_that_came(tmp_path):
    line = b'{"prompt":  "Name a colour.", "n": 1.50, "t": "\\u00e9"}'  # no newline at the end
    (tmp_path / "in.jsonl").write_bytes(line)
    run(configured(tmp_path, None))
    assert (tmp_path / "out.jsonl").read_bytes() == line + b"\n"


def test_worker_processes_find_the_same(tmp_path):
    more = [{"id": str(i), "prompt": f"What is {i} times {i + 7}?"} for i in range(700)]
    records = [*RECORDS, *more, *more[:3]]
    results = []
    for workers in (1, 2):
        config = configured(tmp_path, records, workers=workers)
        results.append((run(config)["dropped"], (tmp_path / "out.jsonl").read_bytes()))
    assert results[0] == results[1]
    assert results[0][0]["duplicate"] == 4


def test_duplicates_are_found_across_files(tmp_path):
    config = configured(tmp_path, RECORDS[:1])
    other = write(tmp_path / "second.parquet", [{"prompt": "Hi."}, *RECORDS[:1], {"prompt": "hi"}])
    run(config.model_copy(update={"inputs": [*config.inputs, str(other)]}))
    row, last = read(tmp_path / "out.dropped.jsonl")
    assert (row["file"], row["line"]) == (str(other), 2)
    assert last["match"] == {"file": str(other), "line": 1}
    assert row["match"] == {"file": str(tmp_path / "in.jsonl"), "line": 1}


def test_verl_columns_are_read_and_stay(tmp_path):
    def verl(index, text):
        return {
            "prompt": [{"role": "user", "content": text}],
            "reward_model": {"ground_truth": "5"},
            "extra_info": {"index": index},
        }

    records = [verl(7, "What is 2 + 3?"), verl(8, ITEM)]
    run(configured(tmp_path, records, source="in.parquet", out="out.parquet"))
    assert read(tmp_path / "out.parquet") == records[:1]
    assert read(tmp_path / "out.dropped.jsonl")[0]["id"] == 8


def test_a_part_of_a_table_of_which_nothing_is_kept(tmp_path):
    records = [{"prompt": "one"}] * 600 + [{"prompt": "two"}]
    run(configured(tmp_path, records, source="in.parquet", out="out.parquet"))
    assert [row["prompt"] for row in read(tmp_path / "out.parquet")] == ["one", "two"]


def test_a_file_belongs_to_one_process(tmp_path):
    writer = Writer(tmp_path / "out.jsonl")
    writer.write_records([{"a": 1}])
    with pytest.raises(InputError, match=r"out\.jsonl: another process is writing it"):
        Writer(tmp_path / "out.jsonl")
    writer.close()
    assert read(tmp_path / "out.jsonl") == [{"a": 1}]


def test_half_a_character_has_no_place_in_a_table(tmp_path):
    writer = Writer(tmp_path / "out.parquet")
    with pytest.raises(InputError, match=r"out\.parquet: .*\.jsonl takes any records"):
        writer.write_records([{"a": "\ud800"}])
    writer.discard()


def test_bounds_on_length(tmp_path):
    records = [{"id": n, "prompt": "x" * n, "completion": "y" * n} for n in (2, 5, 9)]
    bounds = {"min_prompt": 3, "max_trace": 8}
    run(configured(tmp_path, records, length=bounds))
    assert [r["id"] for r in read(tmp_path / "out.jsonl")] == [5]
    rows = read(tmp_path / "out.dropped.jsonl")
    assert [(r["reason"], r["match"]) for r in rows] == [
        ("prompt_short", {"length": 2}),
        ("trace_long", {"length": 9}),
    ]


def test_traces_made_of_templates_are_dropped(tmp_path):
    trace = "First of all I will restate the problem in my own words, number {}."
    records = [{"prompt": f"Is {i} odd?", "completion": trace.format(i)} for i in range(5)]
    report = run(configured(tmp_path, records, repetition={"template_records": 3}))
    assert report["dropped"] == {"template": 2}


def group(*answers):
    return [{"text": rf"So it is \boxed{{{a}}}.", "tokens": [1], "stop": "stop"} for a in answers]


ROLLED = [
    {"id": "none", "completions": group(1, 2, 3, 4)},
    {"id": "one", "completions": group(5, 2, 3, 4)},
    {"id": "half", "completions": group(5, "10/2", 3, 4)},
    {"id": "all", "completions": group(5, 5, 5, "5.0")},
    {"id": "counted", "accuracy": 0.125},
]
ROLLED = [
    {"prompt": f"What is 2 + 3? ({r['id']})", "verifier": "math", "ground_truth": "5", **r}
    for r in ROLLED
]


@pytest.mark.parametrize(
    "keep, kept, reasons",
    [
        ("hard", {"none": 0.0, "one": 0.25, "counted": 0.125}, {"easy": 2}),
        ("mixed", {"one": 0.25, "half": 0.5, "counted": 0.125}, {"solved": 1, "unsolved": 1}),
    ],
)
def test_rollouts_say_what_is_hard_enough(tmp_path, keep, kept, reasons):
    report = run(configured(tmp_path, ROLLED, rollouts={"keep": keep}))
    written = read(tmp_path / "out.jsonl")
    assert {r["id"]: r["accuracy"] for r in written} == kept
    assert not any("completions" in r for r in written)
    assert report["dropped"] == reasons


def test_most_completions_give_the_label(tmp_path):
    records = [
        {"prompt": "Half of one?", "completions": group("1/2", "0.5", 3, r"\frac{1}{2}")},
        {"prompt": "A tie?", "completions": group(1, 1, 2, 2)},
        {"prompt": "No answer?", "completions": [{"text": "Who knows."}] * 3 + group(4)},
        {"prompt": "Known?", "ground_truth": "7", "completions": group(1)},
    ]
    report = run(configured(tmp_path, records, rollouts={"pseudo_labels": True}))
    first, known = read(tmp_path / "out.jsonl")
    assert (first["verifier"], first["ground_truth"], first["vote_share"]) == ("math", "1/2", 0.75)
    assert known == {"prompt": "Known?", "ground_truth": "7"}
    assert report["labelled"] == 1
    rows = read(tmp_path / "out.dropped.jsonl")
    assert [(r["reason"], r["match"]["votes"]) for r in rows] == [
        ("no_majority", 2),
        ("no_majority", 1),
    ]


def test_majority_by_hand():
    texts = [rf"\boxed{{{a}}}" for a in ("4", "x", "four", "X", "4")] + ["none"]

    def same(pairs):
        return [a.lower() == b.lower() for a, b in pairs]

    assert rollouts.majority(texts, same) == (None, 2)
    assert rollouts.majority(texts[:4], same) == ("x", 2)
    assert rollouts.majority(["none"], same) == (None, 0)


def test_traces_are_verified(tmp_path):
    chat = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": r"\boxed{2}"}]
    truth = {"verifier": "math", "ground_truth": 2}
    records = [
        {"id": "right", "messages": chat, **truth},
        {"id": "wrong", "prompt": "1 + 1 = ?", "completion": r"\boxed{3}", **truth},
    ]
    open_ended = {"id": "open", "prompt": "A poem!", "completion": "Roses are red."}
    report = run(configured(tmp_path, [*records, open_ended], verify_traces=True))
    assert report["without_verifier"] == 1
    assert read(tmp_path / "out.jsonl") == [records[0], open_ended], "nothing speaks against it"
    (row,) = read(tmp_path / "out.dropped.jsonl")
    assert row["reason"] == "trace_wrong"
    assert row["match"] == {"outcome": "wrong", "answer": "3"}


LINE = '{"prompt": "What is 1 + 1?"}\n'


@pytest.mark.parametrize(
    "text, more, message",
    [
        (LINE + '{"prompt": "what', {}, "in.jsonl:2: the last line is cut off, not a JSON object"),
        (LINE + "{broken\n" + LINE, {}, "in.jsonl:2: not a JSON object: Expecting"),
        (LINE + "[1]\n", {}, "in.jsonl:2: not a JSON object: list"),
        (LINE + '{"text": "x"}\n', {}, "in.jsonl:2: has neither 'messages' nor a 'prompt'"),
        (LINE + '{"messages": [{"role": "user"}]}\n', {}, ":2: messages[0] has no 'content' text"),
        (LINE + '{"messages": "x"}\n', {}, "in.jsonl:2: messages must be a list of"),
        ('{"prompt": "x", "completion": 3}\n', {}, ":1: completion must be a text, is int"),
        ('{"prompt": "x", "completion": "y", "ground_truth": 1}\n', {"verify_traces": True},
         "in.jsonl:1: record lacks `verifier`"),
        ("", {}, "in.jsonl: is empty"),
        (LINE, {"rollouts": {"keep": "hard"}}, ":1: has neither an 'accuracy' nor 'completions'"),
        ('{"prompt": "x", "accuracy": 2}\n', {"rollouts": {"keep": "hard"}}, "accuracy = 2: must"),
        ('{"prompt": "x", "verifier": "sums", "completions": [{"text": "1"}]}\n',
         {"rollouts": {"keep": "mixed"}}, "in.jsonl:1: verifier = 'sums' is unknown"),
        ('{"prompt": "x", "completions": [{}]}\n', {"rollouts": {"pseudo_labels": True}},
         "in.jsonl:1: completion 1 has no 'text'"),
        ('{"prompt": "x", "verifier": "math", "ground_truth": 1}\n', {"verify_traces": True},
         "in.jsonl:1: has no trace"),
    ],
)  # fmt: skip
def test_bad_records_are_named_by_line(tmp_path, text, more, message):
    config = configured(tmp_path, None, **more)
    (tmp_path / "in.jsonl").write_text(text)
    with pytest.raises(InputError) as error:
        run(config)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert {p.name for p in tmp_path.iterdir()} == {"exam.jsonl", "in.jsonl"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"out": "in.jsonl"}, "would write FOLDER/in.jsonl, which is read"),
        ({"out": "exam.jsonl"}, "would write FOLDER/exam.jsonl, which is read"),
        ({"out": "sub/../in.jsonl"}, "its folder does not exist"),
        ({"out": "out.csv"}, "must end with .jsonl or .parquet"),
        ({"inputs": ["in.txt"]}, "in.txt: must end with .jsonl or .parquet"),
        ({"inputs": ["gone.jsonl"]}, "gone.jsonl: no such file"),
        ({"inputs": []}, "inputs = []: must name at least one file"),
        ({"sets": ["void.jsonl"]}, "void.jsonl: is empty"),
        ({"sets": ["gone.parquet"]}, "gone.parquet: no such file"),
        ({"sets": ["exam.jsonl", "exam=exam.jsonl"]}, "two are called 'exam'"),
        ({"sets": ["blank.jsonl"]}, "blank.jsonl:1: has no text in 'prompt'"),
        ({"sets": ["exam.jsonl"], "field": "problem"}, "exam.jsonl:1: has no text in 'problem'"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    configured(tmp_path)
    (tmp_path / "void.jsonl").touch()
    write(tmp_path / "blank.jsonl", [{"prompt": " "}])
    decontaminate = {k: v for k, v in change.items() if k in ("sets", "field")}
    settings = {"inputs": ["in.jsonl"], "out": "out.jsonl", "workers": 1}
    settings |= {k: v for k, v in change.items() if k not in decontaminate}
    settings["decontaminate"] = {"sets": ["exam.jsonl"]} | decontaminate
    with pytest.raises(InputError) as error:
        run(CurateConfig.model_validate(settings))
    assert message.replace("FOLDER/", "") in str(error.value)


def test_parquet_takes_only_records_of_one_form(tmp_path):
    write(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b", "n": 1}])
    writer = Writer(tmp_path / "out.parquet")
    writer.write_records([{"prompt": "a"}])
    with pytest.raises(InputError, match="the first records have no field 'n', a later one has"):
        writer.write_records([{"prompt": "b", "n": 1}])
    with pytest.raises(InputError, match="records differ in the types of their fields"):
        writer.write_records([{"prompt": {"x": 1}}])
    writer.discard()


def test_parquet_gets_the_fields_of_all_records(tmp_path):
    records = [{"prompt": "a", "n": None}, {"prompt": "b", "n": 1}]
    writer = Writer(tmp_path / "out.parquet")
    writer.write_records([{"prompt": "a"}, records[1]])
    writer.write_records([{"prompt": "a"}])
    writer.close()
    assert read(tmp_path / "out.parquet") == [*records, records[0]]


def test_chunks_number_their_lines(tmp_path):
    write(tmp_path / "in.jsonl", [{"n": n} for n in range(1000)])
    chunks = list(read_chunks(tmp_path / "in.jsonl"))
    assert len(chunks) > 1
    assert [c.first for c in chunks] == [1 + c.records()[0]["n"] for c in chunks]
    assert sum(map(len, chunks)) == 1000 and chunks[-1].done == 1


def test_the_command_says_errors_in_one_line(tmp_path):
    config = configured(tmp_path)
    (tmp_path / "in.jsonl").write_text(LINE * 600 + "{")
    path = tmp_path / "curate.toml"
    path.write_text(
        f"inputs = {json.dumps(config.inputs)}\nout = {json.dumps(config.out)}\n"
        f"[decontaminate]\nsets = {json.dumps(config.decontaminate.sets)}\n"
    )
    assert load(CurateConfig, path).workers == 2
    command = [sys.executable, "-m", "vibejax.curate", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / 'in.jsonl'}:601: the last line is cut off")


def test_rollouts_that_nothing_can_verify_say_nothing(tmp_path):
    asked = {"prompt": "A poem!", "completions": [{"text": "Roses"}]}
    run(configured(tmp_path, [asked], rollouts={"keep": "hard"}))
    (row,) = read(tmp_path / "out.dropped.jsonl")
    assert row["reason"] == "unverified"


def test_only_what_may_be_math_is_labelled(tmp_path):
    texts = [{"text": r"\boxed{4}"}] * 3
    code = {"prompt": "f?", "verifier": "code", "tests": {"type": "call"}, "completions": texts}
    prose = {"prompt": "A poem!", "verifier": "rubric", "completions": texts}
    run(configured(tmp_path, [code, prose], rollouts={"pseudo_labels": True}))
    left = [{k: v for k, v in record.items() if k != "completions"} for record in (code, prose)]
    assert read(tmp_path / "out.jsonl") == left


def test_evaluation_sets_are_read_as_they_are_published(tmp_path):
    """Without what evaluation adds to their questions, which many prompts have in common."""
    added = r" Please reason step by step, and put your final answer within \boxed{}."
    write(tmp_path / "gsm8k.jsonl", [{"question": ITEM, "answer": "so #### 14"}])
    (tmp_path / "answerbench.csv").write_text(f'Problem ID,Problem,Short Answer\n1,"{VERSE}",2\n')
    records = [
        {"id": "a", "prompt": ITEM},
        {"id": "b", "prompt": VERSE},
        {"id": "c", "prompt": "How many legs have six spiders and two birds?" + added},
    ]
    sets = [f"{tmp_path}/gsm8k.jsonl", f"{tmp_path}/answerbench.csv"]
    run(configured(tmp_path, records, decontaminate={"sets": sets}))
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == ["c"]
    matches = [row["match"]["item"] for row in read(tmp_path / "out.dropped.jsonl")]
    assert [match.partition(":")[0] for match in matches] == ["gsm8k", "answerbench"]
