"""Weighted averages of checkpoints: values worked out by hand, and what is refused."""

import hashlib
import itertools
import json
import re
import shutil
import tracemalloc

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from hf_folder import SETTINGS, assert_same, make_tensors, read_folder, write_folder

from vibejax import checkpoint_reader, merge, tokenizer, weights
from vibejax.merge import Source


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return folder


@pytest.fixture
def write(tmp_path, tokens):
    """Writes a checkpoint of random tensors, or of a constant in all of them."""

    def write(name, value=None, dtype="float32", shards=1, turned=False, **changes):
        settings = SETTINGS | changes
        tensors = make_tensors(settings, dtype)
        if value is not None:
            tensors = {key: np.full_like(tensor, value) for key, tensor in tensors.items()}
        if turned:
            tensors = {k: np.ascontiguousarray(t[::-1]) for k, t in tensors.items()}
        folder = write_folder(tmp_path / name, settings, tensors, shards)
        for file in tokens.iterdir():
            shutil.copy(file, folder)
        return folder

    return write


def command(*arguments) -> int:
    """The exit status of `python -m vibejax.merge` with these arguments."""
    try:
        merge.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        return exit.code
    return 0


def test_the_average_by_hand(write, tmp_path, capsys):
    a, b, c = write("a", 1.0), write("b", 2.0, shards=2), write("c", 6.0)
    assert command(tmp_path / "m", f"{a}=1", f"{b}=2", c) == 0  # 1/4, 2/4, 1/4
    for tensor in read_folder(tmp_path / "m").values():
        np.testing.assert_array_equal(tensor, np.float32(1 / 4 + 2 * 2 / 4 + 6 / 4))
    assert capsys.readouterr().out == f"0.2500  {a}\n0.5000  {b}\n0.2500  {c}\n"


def test_weights_are_divided_by_their_sum_and_equal_where_none_is_given():
    assert merge.shares([Source("a", 2.0), Source("b", 6.0)]) == [0.25, 0.75]
    assert merge.shares([merge.parse_source(name) for name in "ab"]) == [0.5, 0.5]
    assert merge.parse_source("runs/lr=3/final=0.5") == Source("runs/lr=3/final", 0.5)


def test_products_and_sums_are_float32_and_rounded_once(write, tmp_path):
    """256/2 + 4 x 2/8 = 129; sums in bfloat16 would stay at 128, whose next number is 129."""
    large, small = write("large", 256.0, "bfloat16"), write("small", 2.0, "bfloat16")
    merge.merge(tmp_path / "m", [Source(str(large), 4.0), *[Source(str(small), 1.0)] * 4], None)
    for tensor in read_folder(tmp_path / "m").values():
        np.testing.assert_array_equal(tensor, ml_dtypes.bfloat16(129))
        assert tensor.dtype == ml_dtypes.bfloat16


def test_random_tensors_against_a_float64_sum_in_many_pieces_and_shards(
    write, tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint_reader, "PIECE_BYTES", 7 * 16 * 4)  # seven rows
    a, b = write("a"), write("b", shards=3, turned=True)
    tensors = read_folder(a)
    sources = [Source(str(a), 0.3), Source(str(b), 0.7)]
    merge.merge(tmp_path / "m", sources, None, max_shard_bytes=20_000)
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 1
    merged = read_folder(tmp_path / "m")
    assert merged.keys() == tensors.keys()
    for name, tensor in tensors.items():
        want = 0.3 * tensor.astype(float) + 0.7 * tensor[::-1].astype(float)
        np.testing.assert_allclose(merged[name], want, rtol=0, atol=1e-6)


def test_one_source_with_all_the_weight_is_copied_bit_for_bit(write, tmp_path):
    a, b = write("a"), write("b", 5.0)
    merge.merge(tmp_path / "m", [Source(str(a), 1.0), Source(str(b), 0.0)], None)
    merge.merge(tmp_path / "alone", [Source(str(a), 0.1)], None)
    for folder in ("m", "alone"):
        assert_same(read_folder(tmp_path / folder), read_folder(a))


def test_dtypes_agree_or_become_float32(write, tmp_path):
    half, brain = (Source(str(write(dtype, dtype=dtype)), 1.0) for dtype in ("float16", "bfloat16"))
    for name, sources, asked, want in (
        ("same", [brain, brain], None, "bfloat16"),
        ("mixed", [half, brain], None, "float32"),
        ("asked", [brain, brain], "float16", "float16"),
    ):
        merge.merge(tmp_path / name, sources, asked)
        settings = json.loads((tmp_path / name / "config.json").read_text())
        assert settings["torch_dtype"] == want
        assert {t.dtype.name for t in read_folder(tmp_path / name).values()} == {want}


def test_the_folder_is_complete_and_says_what_was_merged(write, tmp_path):
    a, _ = write("a/final"), write("b/final", 2.0)  # run folders
    sources = [Source(str(tmp_path / "a"), 1.0), Source(str(tmp_path / "b"), 3.0)]
    merge.merge(tmp_path / "m", sources, None)
    assert {file.name for file in (tmp_path / "m").iterdir()} == {
        "config.json", "generation_config.json", "merge.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = weights.load_config(tmp_path / "m")
    params = weights.load_params(tmp_path / "m", config, None, jnp.float32)
    assert params["embed"].dtype == jnp.float32
    assert tokenizer.load(tmp_path / "m").eos_ids == tokenizer.load(a).eos_ids
    sums = {
        name: {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in (tmp_path / name).iterdir()
            if file.name != "merge.json"
        }
        for name in ("a/final", "b/final", "m")
    }
    assert json.loads((tmp_path / "m/merge.json").read_text()) == {
        "sources": [
            {"path": str(tmp_path / name), "weight": w, "sha256": sums[name]}
            for name, w in (("a/final", 0.25), ("b/final", 0.75))
        ],
        "sha256": sums["m"],
    }


def test_memory_is_that_of_a_few_pieces_whatever_the_number_of_sources(
    write, tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint_reader, "PIECE_BYTES", 1 << 18)
    folders = [str(write(name, vocab_size=60_000)) for name in "ab"]  # a tensor of 3.8 MB
    sources = [Source(name, 1.0) for name in itertools.islice(itertools.cycle(folders), 6)]
    tracemalloc.start()
    merge.merge(tmp_path / "m", sources, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 18, peak


# What is changed in the second source, and what the one line says of the two.
DIFFERENT = {
    "width": (dict(hidden_size=32), "two architectures: width = 16 and 32"),
    "rope": (dict(rope_theta=1e4), r"two architectures: rope.theta = 1000000.0 and 10000.0"),
    "tied": (dict(tie_word_embeddings=True), "two architectures: tied = False and True"),
    "vocab": (dict(vocab_size=320), "two architectures: vocab = 300 and 320"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_models_that_are_not_one_model_are_refused(case, write, tmp_path, capsys):
    changes, message = DIFFERENT[case]
    a, b = write("a"), write("b", **changes)
    assert command(tmp_path / "m", a, a, b) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(f"error: {a} and {b} .*{message}.*\n", error), error
    assert not (tmp_path / "m").exists()


def test_an_initial_spread_is_no_difference(write, tmp_path):
    assert command(tmp_path / "m", write("a"), write("b", initializer_range=0.5)) == 0


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("tokenizer.json", ('"7"', '"seven"'), r"model.vocab.7 = \d+ and None"),
        ("tokenizer.json", ('"special": true', '"special": false'), r"added_tokens\[0\].special ="),
        ("tokenizer_config.json", ("{", '{"chat_template": "X",'), ".* = .* and 'X'"),
        ("generation_config.json", ("34", "33"), r"eos_token_id\[0\] = 34 and 33"),
    ],
)
def test_two_tokenizers_are_refused(part, change, message, write, tmp_path, capsys):
    a, b = write("a"), write("b")
    text = (b / part).read_text()
    assert change[0] in text
    (b / part).write_text(text.replace(*change, 1))
    assert command(tmp_path / "m", a, b) == 1
    assert re.search(f"error: {a} and {b} have two tokenizers: {message}", capsys.readouterr().err)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "a, b, message",
    [
        (["x"], ["x", "y"], "k has 1 and 2 entries"),
        ({"p": 1}, {"p": 1, "q": [2]}, r"k.q = None and [2]"),
        ("a" * 70 + "bc", "a" * 70 + "d", "k[70:] = 'bc' and 'd'"),
        ("x" * 5, 3, "k = 'xxxxx' and 3"),
    ],
)
def test_the_first_difference_is_named(a, b, message):
    assert merge._first_difference({"k": a}, {"k": b}) == message


@pytest.mark.parametrize(
    "given, message",
    [
        (["=0", "=0"], "the weights sum to 0.0; the sum must be finite and above 0"),
        (["=nan", ""], "A: weight nan must be finite and at least 0"),
        (["=inf", ""], "A: weight inf must be finite and at least 0"),
        (["=-1", "=2"], "A: weight -1.0 must be finite and at least 0"),
        (["=1e308", "=1e308"], "the weights sum to inf; the sum must be finite and above 0"),
        (["=much", ""], "A=much: weight 'much' must be a number; a path that holds '=' needs one"),
        (["", "/nowhere"], "B/nowhere: no such file or folder"),
    ],
)
def test_weights_and_sources_that_cannot_be_used(given, message, write, tmp_path, capsys):
    a, b = str(write("a")), str(write("b"))
    assert command(tmp_path / "m", *(x + y for x, y in zip((a, b), given, strict=True))) == 1
    error = capsys.readouterr().err.replace(a, "A").replace(b, "B")
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "m").exists()


def test_nothing_that_exists_is_overwritten(write, tmp_path, capsys):
    a, b = write("run/final"), write("b")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for dst, message in (
        (a, f"{a}: holds the source {a}; name a new folder"),
        (tmp_path / "run", f"{tmp_path / 'run'}: holds the source {a}; name a new folder"),
        (b / ".." / "b", f"{b / '..' / 'b'}: holds the source {b}; name a new folder"),
        (tmp_path / "new", f"{tmp_path / 'new'}: exists; name a new folder"),
    ):
        (tmp_path / "new").mkdir(exist_ok=True)
        assert command(dst, a, b) == 1
        assert capsys.readouterr().err == f"error: {message}\n"
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


def test_a_value_that_is_not_finite_names_its_source_and_tensor(write, tmp_path, capsys):
    a, b = write("a", 1.0), write("b", np.inf)
    assert command(tmp_path / "m", a, f"{b}=0") == 1  # 0 x inf is not 0
    message = f"error: {b}: tensor model.embed_tokens.weight holds a value that is not finite\n"
    assert capsys.readouterr().err == message
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]
