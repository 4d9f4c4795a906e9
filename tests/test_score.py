"""python -m vibejax.score: each record comes out with log-probs, or its fault is named."""

import json
import shutil
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny

from vibejax import score
from vibejax.locations import resolve

POLICY = resolve("package:vibejax/quickstart/policy")


def run(monkeypatch, records, out, model=POLICY):
    file = out.with_name("records.jsonl")
    tiny.write_task(file, records)
    monkeypatch.setattr(sys, "argv", ["score", str(model), str(file), "--out", str(out)])
    score.main()
    return [json.loads(line) for line in out.read_text().splitlines()]


def copy_of_the_policy(tmp_path) -> Path:
    return Path(shutil.copytree(POLICY, tmp_path / "policy"))


def test_records_come_out_with_log_probs(monkeypatch, tmp_path):
    out = tmp_path / "new" / "scored.jsonl"
    out.parent.mkdir()
    records = [{"tokens": [1, 2, 3], "id": 7}, {"messages": [{"role": "user", "content": "1+1="}]}]
    first, second = run(monkeypatch, records, out)
    link = tmp_path / "link.jsonl"
    link.symlink_to(out)
    assert run(monkeypatch, records, link) == [first, second] and link.is_symlink()
    assert first["id"] == 7 and first["tokens"] == [1, 2, 3]
    for row in (first, second):
        assert len(row["tokens"]) == len(row["logprobs"]) and row["logprobs"][0] is None
        assert max(row["logprobs"][1:]) <= 0


@pytest.mark.parametrize(
    "record, message",
    [
        ({"tokens": []}, ":2: tokens must be ids"),
        ({"messages": []}, ":2: messages must be a list of"),
        ({"messages": "1"}, ":2: messages must be a list of"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "half of a character"),
        ({"text": "1"}, ":2: has neither 'tokens' nor 'messages'"),
    ],
)
def test_a_record_that_cannot_be_scored_is_named(monkeypatch, tmp_path, capsys, record, message):
    with pytest.raises(SystemExit):
        run(monkeypatch, [{"tokens": [1]}, record], tmp_path / "o.jsonl")
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_token_that_the_model_does_not_know(monkeypatch, tmp_path, capsys):
    folder = copy_of_the_policy(tmp_path)
    file = folder / "tokenizer.json"
    held = json.loads(file.read_text())
    held["added_tokens"].append({**held["added_tokens"][0], "id": 100, "content": "<|x|>"})
    file.write_text(json.dumps(held))
    record = {"messages": [{"role": "user", "content": "1<|x|>"}]}
    with pytest.raises(SystemExit):
        run(monkeypatch, [record], tmp_path / "o.jsonl", folder)
    message = ":1: the tokenizer's '<|x|>' is token 100, the model knows those below 100"
    assert message in capsys.readouterr().err


def test_weights_that_are_not_numbers_give_no_scores(monkeypatch, tmp_path, capsys):
    folder = copy_of_the_policy(tmp_path)
    (file,) = folder.glob("*.safetensors")
    tensors = safetensors.numpy.load_file(file)
    norm = np.array(tensors["model.norm.weight"], np.float32)
    norm[0] = np.nan
    tensors["model.norm.weight"] = norm.astype(ml_dtypes.bfloat16)
    safetensors.numpy.save_file(tensors, file)
    (tmp_path / "there").write_text("of an earlier run")
    (tmp_path / "o.jsonl").symlink_to("there")
    with pytest.raises(SystemExit):
        run(monkeypatch, [{"tokens": [1, 2]}], tmp_path / "o.jsonl", folder)
    assert (tmp_path / "o.jsonl").read_text() == "of an earlier run"
    assert not [*tmp_path.glob("*.partial")]
    assert "record 1: the model's logits are not numbers" in capsys.readouterr().err


def test_the_records_are_not_written_over(monkeypatch, tmp_path, capsys):
    file = tmp_path / "records.jsonl"
    with pytest.raises(SystemExit):
        run(monkeypatch, [{"tokens": [1, 2]}], file)
    assert "is the file of the records" in capsys.readouterr().err
    assert json.loads(file.read_text()) == {"tokens": [1, 2]}
