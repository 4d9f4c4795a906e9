import dataclasses
import datetime
import decimal
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import tiny
import tokenizers

from vibejax import data, tokenizer
from vibejax.records import DataError, read_records


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tiny.write_policy(folder / "p")
    return tokenizer.load(folder / "p")


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "lines, message",
    [
        ((), "is empty"),
        (('{"prompt": "1"}', "{broken"), ":2: not a JSON object"),
        (("[1]",), ":1: not a JSON object: list"),
        (('{"text": "1"}',), ":1: has the columns 'text', of no known layout; known are prompt "),
        (('{"prompt": 1}',), ":1: has neither 'messages' nor a 'prompt' text"),
        (('{"messages": [{"role": "user"}]}',), ":1: messages must be a list of"),
        (('{"prompt": ""}',), ":1: the prompt is empty"),
        (('{"prompt": ' + "1" * 5_000 + "}",), ":1: not a JSON object"),
        ((r'{"prompt": "1\ud83d"}',), r":1: the text holds '\ud83d', half of a character"),
        (('{"prompt": "1"}', '{"prompt": "1+2+3+4"}'), ":2: the prompt has 7 tokens, more than"),
    ],
)
def test_bad_prompt_files_are_named_by_line(tmp_path, tokens, lines, message):
    path = write(tmp_path / "p.jsonl", *lines)
    with pytest.raises(DataError) as error:
        data.read_prompts(path, tokens, vocab=tokens.vocab, max_tokens=6)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_a_prompt_with_a_token_that_the_model_does_not_know(tmp_path, tokens):
    path = write(tmp_path / "p.jsonl", '{"prompt": "1"}', '{"prompt": "12"}')
    known = max(tokens.encode("1"))
    with pytest.raises(DataError, match=rf"p\.jsonl:2: .* is token {known + 1}, the model knows"):
        data.read_prompts(path, tokens, vocab=known + 1, max_tokens=6)
    write(path, json.dumps({"prompt": "1", "completion": "2"}))
    limits = {"max_tokens": 6, "limited_by": "a test", "longer": "error"}
    with pytest.raises(DataError, match=r"p\.jsonl:1: .* the model knows those below 1"):
        data.read_demonstrations(path, tokens, vocab=1, **limits)


@pytest.mark.parametrize("truth", [["2"], True, {"a": 1}, float("nan")])
def test_a_ground_truth_that_no_answer_equals(tmp_path, tokens, truth):
    record = {"prompt": "1", "verifier": "math", "ground_truth": truth}
    path = write(tmp_path / "p.jsonl", json.dumps(record))
    prompts = data.read_prompts(path, tokens, vocab=tokens.vocab, max_tokens=6)
    with pytest.raises(DataError, match=r"p\.jsonl:1: `ground_truth` of verifier 'math' must be"):
        data.require_ground_truth(prompts, path)


def test_prompt_without_ground_truth_is_named(tmp_path, tokens):
    path = write(tmp_path / "p.jsonl", '{"prompt": "1", "verifier": "math"}')
    prompts = data.read_prompts(path, tokens, vocab=tokens.vocab, max_tokens=6)
    with pytest.raises(DataError, match=r"p\.jsonl:1: has no 'ground_truth'"):
        data.require_ground_truth(prompts, path)


def test_verl_columns_are_read(tmp_path, tokens):
    record = {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": "1+1"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": "2", "style": "rule"},
        "extra_info": {"index": 4},
    }
    path = tmp_path / "p.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), path)
    (prompt,) = data.read_prompts(path, tokens, vocab=tokens.vocab, max_tokens=99)
    assert prompt.record["ground_truth"] == "2"
    assert prompt.tokens == tuple(tokens.encode_chat(record["prompt"]))


def test_rows_of_a_csv_file_keep_line_breaks_within_quotes(tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,verifier\r\n"1,\n2",math\r\n3,\r\n')
    assert list(read_records(path)) == [
        (1, {"prompt": "1,\n2", "verifier": "math"}), (2, {"prompt": "3", "verifier": ""}),
    ]  # fmt: skip


def test_a_gzip_file_of_json_lines_is_read(tmp_path):
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "1"}\n{"prompt": "2"}\n'))
    assert [record["prompt"] for _, record in read_records(path)] == ["1", "2"]


@pytest.mark.parametrize(
    "name, held, message",
    [
        ("p.csv", b"a,b\n1,2,3\n", "p.csv:1: has more values than the header has columns"),
        ("p.csv", b'a,b\n1,"2\n', "p.csv: not a CSV file: unexpected end of data"),
        ("p.csv", b"a,b\n", "p.csv: is empty"),
        ("p.csv", b"a\n\xff\n", "p.csv: not a CSV file: 'utf-8' codec can't decode"),
        ("p.jsonl.gz", b"{}", "p.jsonl.gz: not a gzip file: Not a gzipped file"),
        ("p.jsonl.gz", gzip.compress(b"{}\n" * 9, mtime=0)[:-9], "p.jsonl.gz: not a gzip file: "),
    ],
)
def test_files_that_are_not_what_their_names_say(tmp_path, name, held, message):
    (tmp_path / name).write_bytes(held)
    with pytest.raises(DataError) as error:
        list(read_records(tmp_path / name))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_order_is_a_function_of_seed_and_step():
    steps = [data.step_indices(10, 3, step, 4) for step in range(5)]
    drawn = [i for step in steps for i in step]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == [*range(10)]  # two passes, each complete
    assert data.step_indices(10, 3, 4, 4) == steps[4]
    assert data.step_indices(10, 4, 0, 4) != steps[0]


def test_a_step_across_two_passes_holds_no_prompt_twice():
    """Both would get the same draws."""
    prompts = [data.Prompt(index=i, tokens=(i,), record={}) for i in range(10)]
    across = 0
    for step in range(1, 40):
        stream = data.step_indices(10, 3, step - 1, 4)
        drawn = [p.index for p in data.step_prompts(prompts, 3, step, 4)]
        assert len(set(drawn)) == 4 and set(stream) <= set(drawn)
        if len(set(stream)) == 4:
            assert drawn == stream
        across += len(set(stream)) < 4
    assert across > 3
    everything = data.step_prompts(prompts, 3, 2, 10)
    assert sorted(p.index for p in everything) == [*range(10)]


def test_demonstration_ends_with_the_stop_token(tokens):
    record = {"prompt": "1+1=", "completion": "2"}
    document = data.learning_document(record, tokens, "here")
    assert document.learnt.tolist() == [False] * 4 + [True] * 2
    assert tokens.decode(document.tokens[:-1].tolist()) == "1+1=2"
    assert document.tokens[-1] == tokens.eos_ids[0]


def test_nothing_can_predict_a_first_token(tokens):
    document = data.learning_document({"prompt": "", "completion": "12"}, tokens, "here")
    assert document.learnt.tolist() == [False, True, True]


def test_turns_of_weight_0_are_not_learnt():
    chat = tiny.chat_tokenizer()
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "weight": None},  # as parquet fills what is missing
    ]
    document = data.learning_document({"messages": messages}, chat, "here")
    assert document.tokens[document.learnt].tolist() == [*chat.encode("d"), 2]
    del messages[1]["weight"]
    document = data.learning_document({"messages": messages}, chat, "here")
    assert document.tokens[document.learnt].tolist() == [
        *chat.encode("b"), 2, *chat.encode("d"), 2,
    ]  # fmt: skip


def test_demonstration_has_one_token_of_opening(tokens):
    """A checkpoint that puts a token before every text puts none between prompt and completion."""
    bos = tokens.eos_ids[0]
    backend = tokenizers.Tokenizer.from_str(tokens.backend.to_str())
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="B $A", special_tokens=[("B", bos)]
    )
    opened = dataclasses.replace(tokens, backend=backend)
    document = data.learning_document({"prompt": "1+1=", "completion": "2"}, opened, "here")
    assert document.learnt.tolist() == [False] * 5 + [True] * 2
    assert document.tokens.tolist() == [bos, *tokens.encode("1+1=2"), tokens.eos_ids[0]]


def test_shipped_task_is_what_the_command_generates():
    from vibejax import arithmetic
    from vibejax.locations import resolve

    task = arithmetic.digits_task(0)
    seen = set()
    for name in ("sft", "train", "heldout"):
        prompts = {r["prompt"] for r in task[name]}
        assert len(prompts) == len(task[name]) and not prompts & seen
        seen |= prompts
    for name in ("train", "heldout"):
        path = resolve(f"package:vibejax/quickstart/{name}.jsonl")
        assert [json.loads(line) for line in path.read_text().splitlines()] == task[name]


def test_a_parquet_file_has_what_json_has(tmp_path):
    """Text in place of dates and decimals, and no field that a record does not have."""
    when = datetime.datetime(2026, 1, 2)
    rows = [
        {"prompt": "1", "at": when, "price": {"of": [decimal.Decimal("1.50")]}, "messages": None},
        {"prompt": "2", "at": None, "price": None, "messages": [{"role": "user", "content": "x"}]},
    ]
    path = tmp_path / "p.parquet"
    rows[0] |= {"id": b"caf\xc3\xa9"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert [record for _, record in read_records(path)] == [
        {"prompt": "1", "at": "2026-01-02 00:00:00", "price": {"of": ["1.50"]}, "id": "café"},
        {"prompt": "2", "messages": [{"role": "user", "content": "x"}]},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": b"\xff"}]), path)
    with pytest.raises(DataError, match=r"p.parquet: column 'prompt' holds bytes: 'utf-8' codec"):
        list(read_records(path))
