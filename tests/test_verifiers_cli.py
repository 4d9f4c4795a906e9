"""python -m vibejax.verifiers: verdicts for a file, bad lines by their number, no traceback."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vibejax.verifiers.__main__ import main

GOOD = [
    {"verifier": "math", "ground_truth": "1/2", "completion": r"so \boxed{0.5}", "id": "a"},
    {"verifier": "math", "ground_truth": 3, "completion": r"so \boxed{4}"},
    {"verifier": "math", "ground_truth": 3, "completion": "no idea"},
    {
        "verifier": ["math", "choice"],
        "ground_truth": 3,
        "options": ["1", "3"],
        "completion": r"\boxed{3}",
    },
    {"verifier": "choice", "ground_truth": "B", "completion": "Answer: B", "outcome": "stale"},
]
BAD = [
    ("{not json", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[1, 2]", "not a JSON object but list"),
    ('{"verifier": "math", "ground_truth": 3}', "lacks `completion`"),
    ('{"verifier": "math", "completion": "x"}', "has no `ground_truth`"),
    ('{"completion": "x"}', "lacks `verifier`"),
    ('{"verifier": "maths", "ground_truth": 3, "completion": "x"}', "known are math, code"),
    ('{"verifier": "math", "ground_truth": 3, "completion": null}', "completion = None"),
    ('{"verifier": "math\xff', "not JSON"),
]


def write(path, lines):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_bytes(text.encode("latin-1") + b"\n")


def verdicts(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_verdicts_are_added_in_the_order_of_input(tmp_path, capfd):
    write(tmp_path / "in.jsonl", [*GOOD[:2], "", *GOOD[2:]])
    out = tmp_path / "out.jsonl"
    assert main([str(tmp_path / "in.jsonl"), "--out", str(out), "--workers", "2"]) == 0
    written = verdicts(out)
    assert [v["outcome"] for v in written] == [
        "correct",
        "wrong",
        "no_answer",
        "correct",
        "correct",
    ]
    assert [v["correct"] for v in written] == [True, False, False, True, True]
    assert [v["reward"] for v in written] == [1.0, 0.0, 0.0, 1.0, 1.0]
    assert [v["answer"] for v in written] == ["0.5", "4", None, "3", "B"]
    assert written[0]["id"] == "a" and written[0]["completion"] == r"so \boxed{0.5}"
    shown = capfd.readouterr()
    for word in ("verifier", "math + choice", "no_answer", "mean reward", "0.3333"):
        assert word in shown.out
    assert "5/5" in shown.err
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_bad_lines_are_named_and_left_out(tmp_path, capfd):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, [GOOD[0], *(line for line, _ in BAD), GOOD[1]])
    assert main([str(source), "--out", str(out), "--workers", "1"]) == 1
    assert [v["outcome"] for v in verdicts(out)] == ["correct", "wrong"]
    shown = capfd.readouterr().err.splitlines()
    for number, (_, reason) in enumerate(BAD, start=2):
        assert any(f"{source}:{number}: left out: " in line and reason in line for line in shown)
    assert "Traceback" not in "".join(shown)


def test_records_that_their_verifier_refuses_are_named(tmp_path, capfd):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, [GOOD[0], {"verifier": "code", "tests": "garbage", "completion": "```\n1\n```"}])
    assert main([str(source), "--out", str(out), "--workers", "1"]) == 0
    assert [v["outcome"] for v in verdicts(out)] == ["correct", "crash"]
    assert f"{source}:2: failed: crash: ValueError: tests" in capfd.readouterr().err


def test_settings_are_passed_on(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, [{"verifier": "choice", "ground_truth": "10 m", "completion": r"\boxed{11 m}"}])
    arguments = [str(source), "--out", str(out), "--workers", "1"]
    assert main(arguments) == 0 and not verdicts(out)[0]["correct"]
    assert main([*arguments, "--set", "choice.rel_tol=0.2"]) == 0 and verdicts(out)[0]["correct"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.jsonl", "--out", "out.jsonl"], "No such file"),
        (["in.jsonl", "--out", "in.jsonl"], "is the input itself"),
        (["in.jsonl", "--out", "nowhere/out.jsonl"], "its folder does not exist"),
        (["in.jsonl", "--out", "out.jsonl", "--workers", "0"], "workers = 0 is below 1"),
        (["in.jsonl", "--out", "out.jsonl", "--limit-s", "0"], "limit_s = 0.0 s is not in"),
        (["in.jsonl", "--out", "out.jsonl", "--set", "x"], "not of the form VERIFIER.KEY=VALUE"),
        (["in.jsonl", "--out", "out.jsonl", "--set", "maths.x=1"], "'maths' is unknown"),
        (["in.jsonl", "--out", "out.jsonl", "--set", "choice.nonsense=1"], "nonsense"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", [GOOD[4]])
    status = main(arguments)
    shown = capfd.readouterr().err
    if "choice.nonsense=1" not in arguments:  # only the verifier knows its settings
        assert status == 2 and shown.startswith("error: ")
        assert (tmp_path / "in.jsonl").read_text().count("\n") == 1
    assert message in shown.replace("\n", " ") and "Traceback" not in shown


def test_empty_file_gives_an_empty_file(tmp_path):
    (tmp_path / "in.jsonl").write_text("\n\n")
    assert main([str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]) == 0
    assert (tmp_path / "out.jsonl").read_text() == ""


def has_children(pid):
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if path.read_text().rpartition(")")[2].split()[1] == str(pid):
                return True
    return False


def test_ctrl_c_ends_the_program_without_a_traceback(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, [GOOD[1]] * 30_000)
    command = [sys.executable, "-m", "vibejax.verifiers", str(source), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    program = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    with program:
        while not has_children(program.pid):
            time.sleep(0.02)
        program.send_signal(signal.SIGINT)
        errors = program.stderr.read()
        assert program.wait(timeout=20) == 130
    assert "interrupted" in errors and "Traceback" not in errors
    assert not out.exists()
