"""The byte-level BPE tokenizer that a GGUF file describes by tokens, merges and a name.

The name (`tokenizer.ggml.pre`) stands for a pre-tokenizer that the file does not spell out.

Source: llama.cpp's llama-vocab.cpp for the names; the tokenizer.json of SmolLM2, Qwen2.5 and
Llama 3 for what they stand for.
"""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from vibejax.checkpoint_config import CheckpointError
from vibejax.gguf_reader import GGUFFile

# Numbers one digit at a time (Qwen2) or three at most (Llama 3).
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _WORDS.format(number=r"\p{N}")
_LLAMA3 = _WORDS.format(number=r"\p{N}{1,3}")
_QWEN2_NAMES = ("qwen2", "deepseek-r1-qwen")
_GPT2_NAMES = ("default", "gpt-2")

# GGUF's token types
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5

_PREFIX = "tokenizer.ggml."
_PROBE = "Don't  stop(12345)!\n\n \t\u00fcber \u6570\u5b66 x_1"


def build_backend(file: GGUFFile) -> tokenizers.Tokenizer:
    """The tokenizer of a GGUF file.

    Raises:
        CheckpointError: it is no byte-level BPE, of an unknown name, or contradicts itself.
    """
    own = _own(file)
    if own.get("model") != "gpt2" or "tokens" not in own or "merges" not in own:
        raise CheckpointError(
            f"{file.path}: tokenizer model {own.get('model')!r} is not supported (gpt2 with merges)"
        )
    tokens = own["tokens"]
    kinds = own.get("token_type") or [1] * len(tokens)
    if len(kinds) != len(tokens):
        raise CheckpointError(f"{file.path}: {len(kinds)} token types for {len(tokens)} tokens")
    name = own.get("pre", "default")
    try:
        backend = byte_level_bpe(
            {token: i for i, token in enumerate(tokens) if kinds[i] != _UNUSED},
            [tuple(merge.split(" ", 1)) for merge in own["merges"]],
            _pre_tokenizer(name, file.path),
            normalizers.NFC() if name in _QWEN2_NAMES else None,
            ignore_merges=name == "llama-bpe",
        )
    except CheckpointError:
        raise
    except Exception as error:  # the only class that the library raises
        raise CheckpointError(f"{file.path}: {_PREFIX}merges: {error}") from None
    special = {_CONTROL: True, _USER_DEFINED: False}
    backend.add_tokens(
        [
            AddedToken(token, special=special[kind], normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in special
        ]
    )
    bos = _token_id(file, "bos_token_id")
    if own.get("add_bos_token", name == "llama-bpe") and bos is not None:  # as llama.cpp
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return backend


def eos_ids(file: GGUFFile) -> tuple[int, ...]:
    """The tokens that end a text, a turn or a message, each once.

    Raises:
        CheckpointError: the file names none.
    """
    ends = (_token_id(file, f"{end}_token_id") for end in ("eos", "eot", "eom"))
    ids = tuple(dict.fromkeys(i for i in ends if i is not None))
    if not ids:
        raise CheckpointError(f"{file.path}: no {_PREFIX}eos_token_id")
    return ids


def named_tokens(file: GGUFFile) -> dict[str, Any]:
    """`bos_token` and the like, as tokenizer_config.json has them."""
    fields = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {name: _token_id(file, f"{field}_token_id") for name, field in fields.items()}
    tokens = _own(file)["tokens"]
    return {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}


def byte_level_bpe(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    normalizer: normalizers.Normalizer | None,
    *,
    ignore_merges: bool = False,
) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer without added tokens.

    Args:
        vocab: token -> id, bytes written as GPT-2's printable characters.
        merges: pairs of tokens, the first to be merged first.
        pre_tokenizer: splits a text into words and their bytes into characters.
        normalizer: applied before; None leaves a text as it is.
        ignore_merges: whether a word that is a token is taken whole at once.
    """
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges)
    )
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    return backend


def splits_like_qwen2(backend: tokenizers.Tokenizer) -> bool:
    """Whether words are told apart as in Qwen2's tokenizer, by the look of one hard text."""
    expected = _pre_tokenizer("qwen2", Path()).pre_tokenize_str(_PROBE)
    found = backend.pre_tokenizer.pre_tokenize_str(_PROBE) if backend.pre_tokenizer else []
    return [word for word, _ in found] == [word for word, _ in expected]


def _own(file: GGUFFile) -> dict[str, Any]:
    return {
        key.removeprefix(_PREFIX): value
        for key, value in file.metadata.items()
        if key.startswith(_PREFIX)
    }


def _token_id(file: GGUFFile, field: str) -> int | None:
    i = file.metadata.get(_PREFIX + field)
    count = len(file.metadata[_PREFIX + "tokens"])
    if i is not None and (type(i) is not int or not 0 <= i < count):
        raise CheckpointError(f"{file.path}: {_PREFIX}{field} = {i!r} is no token of {count}")
    return i


def _pre_tokenizer(name: str, path: Path) -> pre_tokenizers.PreTokenizer:
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in _GPT2_NAMES:
        return gpt2
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    patterns = dict.fromkeys(_QWEN2_NAMES, _QWEN2) | {"llama-bpe": _LLAMA3}
    if name not in patterns:
        known = ", ".join([*_GPT2_NAMES, "smollm", *patterns])
        raise CheckpointError(f"{path}: pre-tokenizer {name!r} is not supported ({known})")
    split = pre_tokenizers.Split(Regex(patterns[name]), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, byte_level])
