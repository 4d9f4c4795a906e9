"""A checkpoint on evaluation sets: real sampling once, and completions by hand for the rest."""

import base64
import json
import pickle
import shutil
import zlib

import jax
import numpy as np
import pytest
import tiny
from hf_folder import SETTINGS, make_tensors, write_folder

from vibejax import evaluate, policy, run_folder, sharding
from vibejax.config.evaluate import EvaluateConfig
from vibejax.config_file import ConfigError, InputError, load
from vibejax.data import Prompt
from vibejax.policy import Answers
from vibejax.verifiers import worker

TOML = """
policy = "{folder}/policy"
samples = 8
[sets]
sums = {{path = "{folder}/sums.jsonl"}}
verl = {{path = "{folder}/verl.jsonl", samples = 4}}
[rollout]
max_prompt_tokens = 8
max_completion_tokens = 4
slots = 16
"""
# A random policy is never right, but now and then it says a number of one digit.
SUMS = [
    {"prompt": f"{a}+{b}=", "verifier": "math", "ground_truth": "1", "last_number": True}
    for a in range(2) for b in range(2)
]  # fmt: skip
VERL = [{"prompt": "1+2=", "reward_model": {"ground_truth": 3}, "extra_info": {"index": 0}}]


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Of the eight, for which everything would be compiled."""
    make_mesh = sharding.make_mesh
    one = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda sizes, devices=one: make_mesh(sizes, devices))
        yield


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A folder with a policy, two sets, and a run of them in `out`."""
    folder = tmp_path_factory.mktemp("evaluate")
    settings = SETTINGS | {"vocab_size": 35, "num_hidden_layers": 1}
    tensors = {name: t / 4 for name, t in make_tensors(settings, "float32").items()}
    tiny.write_tokenizer(write_folder(folder / "policy", settings, tensors))
    tiny.write_task(folder / "sums.jsonl", SUMS)
    tiny.write_task(folder / "verl.jsonl", VERL)
    (folder / "evaluate.toml").write_text(TOML.format(folder=folder))
    run(folder, folder / "out")
    return folder


@pytest.fixture
def never_sampled(monkeypatch):
    def load_engine(*_):
        raise AssertionError("nothing is to be sampled")

    monkeypatch.setattr(policy, "load_engine", load_engine)


def run(folder, out, *settings):
    return evaluate.run(load(EvaluateConfig, folder / "evaluate.toml", [f"out={out}", *settings]))


def results(out):
    return json.loads((out / "results.json").read_text())


def test_results_are_those_of_the_stored_completions(ran):
    found = results(ran / "out")
    assert found["config"]["sets"]["verl"] == {"path": f"{ran}/verl.jsonl", "samples": 4}
    assert {"config.json", "model.safetensors"} < found["checkpoint"]["sha256"].keys()
    for name, problems, samples in (("sums", 4, 8), ("verl", 1, 4)):
        score = found["sets"][name]
        rows = run_folder.read_log(ran / f"out/completions/{name}.jsonl")
        groups = [row["completions"] for row in sorted(rows, key=lambda row: row["prompt"])]
        assert (score["problems"], score["samples"]) == (problems, samples)
        assert [len(group) for group in groups] == [samples] * problems
        correct = [sum(c["correct"] for c in group) for group in groups]
        assert score["correct"] == correct
        assert score["avg"]["mean"] == pytest.approx(np.mean(correct) / samples)
        assert score["pass_at"][0] == pytest.approx(score["avg"]["mean"])
        assert score["pass_at"][-1] == np.mean([count > 0 for count in correct])
        assert score["pass_n"]["mean"] == score["pass_at"][-1]
        completions = [c for group in groups for c in group]
        assert score["length"] == pytest.approx(np.mean([c["length"] for c in completions]))
        assert score["truncated"] == np.mean([c["stop"] == "length" for c in completions])
        assert score["unscored"] == 0.0
        assert score["avg"]["low"] <= score["avg"]["mean"] <= score["avg"]["high"]
    assert any(found["sets"]["sums"]["correct"])


def test_a_finished_run_goes_on_without_sampling(ran, never_sampled, capsys):
    before = results(ran / "out")
    run(ran, ran / "out", "resume=true")
    after = results(ran / "out")
    assert after["config"].pop("resume") and not before["config"].pop("resume")
    assert after == before
    head, sums, verl = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["set", "problems", "n"]
    assert sums.split()[:3] == ["sums", "4", "8"] and verl.split()[:3] == ["verl", "1", "4"]


def test_a_stopped_run_ends_as_if_it_had_not(ran, tmp_path):
    out = shutil.copytree(ran / "out", tmp_path / "out")
    path = out / "completions/sums.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:20])
    (out / "results.json").unlink()
    run(ran, out, "resume=true")
    assert results(out)["sets"] == results(ran / "out")["sets"]


def test_greedy_completions_of_a_problem_are_all_the_same(ran, tmp_path):
    run(ran, tmp_path / "out", "rollout.temperature=0", "samples=3")
    for row in run_folder.read_log(tmp_path / "out/completions/sums.jsonl"):
        assert len({completion["text"] for completion in row["completions"]}) == 1


def test_other_weights_or_another_judge_are_another_run(ran, tmp_path, never_sampled, monkeypatch):
    out = shutil.copytree(ran / "out", tmp_path / "out")
    held = json.loads((out / "checkpoint.json").read_text())
    held["sha256"]["model.safetensors"] = "0" * 64
    (out / "checkpoint.json").write_text(json.dumps(held))
    with pytest.raises(InputError, match=r"out: holds completions of another checkpoint than"):
        run(ran, out, "resume=true")
    monkeypatch.setattr(policy, "judge_of", lambda prompts: "other")
    with pytest.raises(InputError, match="holds verdicts of the judge None, and VIBEJAX_JUDGE_MO"):
        run(ran, ran / "out", "resume=true")
    with pytest.raises(InputError, match="another configuration: samples: 8 -> 9"):
        run(ran, ran / "out", "resume=true", "samples=9")


def answered(group, verifier="math") -> Answers:
    """A problem with completions of (answer, correct, outcome, length, stop)."""
    record = {"verifier": verifier, "ground_truth": "1"}
    names = ("answer", "correct", "outcome", "length", "stop")
    rows = [dict(zip(names, completion, strict=True)) for completion in group]
    return Answers(Prompt(0, (1,), record), rows)


GROUPS = [
    [("1", True, "correct", 10, "stop"), ("1.0", True, "correct", 20, "stop"),
     ("2", False, "wrong", 30, "stop"), (None, False, "no_answer", 40, "length")],
    [("5", False, "wrong", 10, "stop"), ("5", False, "wrong", 20, "stop"),
     ("1", True, "correct", 30, "stop"), ("1", True, "correct", 40, "stop")],
    [("3", False, "wrong", 10, "stop"), ("4", False, "wrong", 20, "stop"),
     (None, False, "timeout", 30, "length"), ("3", False, "wrong", 40, "length")],
]  # fmt: skip


def same_number(pairs):
    return [float(a) == float(b) for a, b in pairs]


def test_scores_by_hand():
    score = evaluate.score_of([answered(group) for group in GROUPS], same_number)
    assert (score.problems, score.samples, score.correct) == (3, 4, [2, 2, 0])
    np.testing.assert_allclose(score.avg.mean, (2 / 4 + 2 / 4 + 0) / 3)
    np.testing.assert_allclose(score.pass_at, np.array([3 / 6, 5 / 6, 1, 1]) * 2 / 3)
    np.testing.assert_allclose(score.pass_n.mean, 2 / 3)
    np.testing.assert_allclose(score.maj.mean, (1 + 1 / 2 + 0) / 3)  # a majority, a tie, a loss
    np.testing.assert_allclose([score.length, score.truncated], [25, 3 / 12])
    np.testing.assert_allclose(score.unscored, 1 / 12)
    # Resampled, the three problems are all of one kind in 1 of 27 draws of each, above 2.5%.
    assert (score.avg.low, score.avg.high) == (0.0, 0.5)
    assert (score.maj.low, score.maj.high) == (0.0, 1.0)


@pytest.mark.parametrize(
    "verifier, voting",
    [("math", True), ("math_judge", True), ("choice", True), ("code", False), ("instruct", False),
     (["math", "rubric"], False)],
)  # fmt: skip
def test_only_answers_that_say_something_vote(verifier, voting):
    score = evaluate.score_of([answered(group, verifier) for group in GROUPS], same_number)
    assert (score.maj is not None) is voting
    cells = evaluate.table({"a": score}).splitlines()[1].split("  ")
    assert ("-" in [cell.strip() for cell in cells]) is not voting


class InProcess:
    """A pool that verifies here, without limits."""

    def __init__(self, **arguments):
        self.arguments = arguments

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def verify(self, items):
        return [
            worker.judge(record, text, worker.MODULES, {}, lambda: None) for record, text in items
        ]


class Hostile:
    def __reduce__(self):
        return print, ("loaded",)


CALLS = {
    "question_content": "?", "starter_code": "", "metadata": "{}", "question_id": "a",
    "public_test_cases": "[]",
    "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(Hostile()))).decode(),
}  # fmt: skip


@pytest.mark.parametrize(
    "rows, setting, message",
    [
        ((), "", "bad.jsonl: is empty"),
        (
            ({"text": "?"},),
            "",
            "bad.jsonl:1: has the columns 'text', of no known layout",
        ),
        (({"prompt": "1"},), "", "bad.jsonl:1: has no 'verifier'"),
        (({"prompt": "1", "verifier": "math"},), "", "bad.jsonl:1: has no 'ground_truth'"),
        (SUMS, "sets.bad.path=gone.csv", "gone.csv: no such file"),
        (SUMS, "policy=gone", "gone: no such file or folder"),
        (SUMS, "rollout.max_completion_tokens=99", "= 107 is more than the 64 positions of"),
        (
            (SUMS[0], {"prompt": "1", "verifier": "code", "tests": {"type": "stdin", "cases": []}}),
            "",
            "bad.jsonl:2: cannot be verified: ValueError: tests.cases = []: must be a list of",
        ),
        (
            ({"prompt": "1", "verifier": "choice", "ground_truth": "a cow"},),
            "",
            "bad.jsonl:1: cannot be verified: ValueError: record 'without id': ground_truth = 'a",
        ),
        (
            ({"prompt": "1", "verifier": "code"} | {k: CALLS[k] for k in CALLS if "test" in k},),
            "",
            "private_test_cases is not base64 of zlib of a pickle: it asks for builtins.print",
        ),
    ],
)
def test_bad_input_is_one_line_before_anything_is_sampled(
    rows, setting, message, ran, tmp_path, never_sampled, capsys
):
    tiny.write_task(tmp_path / "bad.jsonl", rows)
    settings = [f"sets.bad.path={tmp_path}/bad.jsonl", *filter(None, [setting])]
    config = load(EvaluateConfig, ran / "evaluate.toml", [f"out={tmp_path}/out", *settings])
    with pytest.raises(InputError) as error:
        evaluate.run(config, InProcess)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert "loaded" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (("sums = {", '"../sums" = {'), "sets.../sums"),
        ((", samples = 4", ", sample = 4"), "unknown key sets.verl.sample"),
        (("samples = 8", "samples = 0"), "samples = 0: must be greater than or equal to 1"),
        (("[sets]", "[set]"), "unknown key set; did you mean sets?"),
        (('{path = "/x/sums.jsonl"}', '"/x/sums.jsonl"'), "sets.sums = '/x/sums.jsonl': must be"),
    ],
)
def test_configurations_that_cannot_be_run(change, message, tmp_path):
    path = tmp_path / "evaluate.toml"
    path.write_text(TOML.format(folder="/x").replace(*change))
    with pytest.raises(ConfigError) as error:
        load(EvaluateConfig, path)
    assert message in str(error.value)
