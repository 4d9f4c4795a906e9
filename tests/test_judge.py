"""A local checkpoint as judge: real sampling, and its answers combined as any judge's are."""

import json

import pytest
import tiny

from vibejax import judge as judge_module
from vibejax.verifiers import Outcome

SCORES = {"helpfulness": 8, "coherence": 6, "adherence": 10, "redundancy": 0}
ANSWER = json.dumps({"reason": "good", **SCORES})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge") / "model"
    tiny.write_policy(folder, context=4096)
    return str(folder)


def item(prompt="1+1=", completion="2"):
    return {"prompt": prompt, "verifier": "rubric"}, completion


def test_a_judge_that_answers_garbage_leaves_every_completion_unscored(model):
    verdicts = judge_module.judge(model, [item(), item(completion="3")], {"max_tokens": 8})
    assert [v.outcome for v in verdicts] == [Outcome.UNSCORED] * 2
    assert all(v.detail.startswith("judge: ") for v in verdicts)


def test_answers_reach_their_own_item(model, monkeypatch):
    def answers(path, config, tokens, requests):
        yield from ((r.prompt, ANSWER) for r in reversed(requests) if r.prompt != 1)
        yield 1, "no JSON"

    monkeypatch.setattr(judge_module, "_answers", answers)
    items = [item(), item(), item(completion="<think>only</think>"), item(completion="1" * 9999)]
    scored, garbage, empty, long = judge_module.judge(model, items, {})
    assert scored.reward == pytest.approx(0.4 * 0.8 + 0.2 * 0.6 + 0.3 * 1.0 + 0.1 * 1.0)
    assert garbage.outcome is Outcome.UNSCORED
    assert empty.outcome is Outcome.NO_ANSWER
    assert long.outcome is Outcome.UNSCORED and "pass its 4096" in long.detail
    (bad,) = judge_module.judge(model, [({"verifier": "rubric"}, "2")], {})
    assert bad.outcome is Outcome.UNSCORED and "prompt" in bad.detail


def test_command_combines_the_judge_with_other_verifiers(model, monkeypatch, tmp_path):
    monkeypatch.setattr(
        judge_module, "_answers", lambda path, config, tokens, requests:
        ((r.prompt, ANSWER) for r in requests),
    )  # fmt: skip
    record = {"prompt": "1+1=", "ground_truth": 2, "verifier": ["math", "rubric"]}
    records = [
        {**record, "completion": r"\boxed{2}"},
        {**record, "completion": r"\boxed{3}"},
        {**record, "verifier": "rubric", "completion": "2"},
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in records))
    monkeypatch.setattr("sys.argv", ["judge", model, str(source), "--out", str(out)])
    assert judge_module.main() == 0
    right, wrong, alone = [json.loads(line) for line in out.read_text().splitlines()]
    assert right["outcome"] == "correct" and right["reward"] == pytest.approx(0.84)
    assert wrong["outcome"] == "wrong" and wrong["reward"] == 0.0
    assert alone["outcome"] == "correct" and alone["verifier"] == "rubric"


def test_a_record_that_cannot_be_judged_costs_no_other(model, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        judge_module, "_answers", lambda path, config, tokens, requests:
        ((r.prompt, ANSWER) for r in requests),
    )  # fmt: skip
    texts = ["2", None, 3, "\ud800"]
    records = [{"prompt": "1+1=", "verifier": "rubric", "completion": text} for text in texts]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in records))
    monkeypatch.setattr("sys.argv", ["judge", model, str(source), "--out", str(out)])
    assert judge_module.main() in (0, 1)
    good, half = [json.loads(line) for line in out.read_text().splitlines()]
    assert good["outcome"] == "correct" and half["outcome"] == "unscored"
    said = capsys.readouterr().err
    assert ":2: left out: completion = None" in said and ":3: left out: completion = 3" in said


@pytest.mark.parametrize("limit", ["x", 0, 1.5, True])
def test_a_limit_that_is_no_number_is_named(model, limit):
    with pytest.raises(ValueError, match=r"rubric.max_tokens = .*: must be a whole number"):
        judge_module.judge(model, [item()], {"max_tokens": limit})


@pytest.mark.parametrize("argument, status", [("--help", 0), ("--out", 2)])
def test_help_and_a_missing_model(monkeypatch, capsys, argument, status):
    monkeypatch.setattr("sys.argv", ["judge", argument])
    assert judge_module.main() == status
    assert "python -m vibejax.judge MODEL" in capsys.readouterr().out


def test_a_missing_checkpoint_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["judge", "nowhere", "in.jsonl", "--out", "out.jsonl"])
    with pytest.raises(SystemExit) as ended:
        judge_module.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines() == ["error: nowhere: no such file or folder"]
