"""Text to token ids and back, and chats to prompts, exactly as the checkpoint says.

A Hugging Face folder's tokenizer.json is obeyed as it is; `gguf_tokenizer` rebuilds the one of a
GGUF file. Chats are rendered with the checkpoint's own template (ChatML where it has none) in
jinja2's sandbox, the way transformers does it. Where the assistant's turns of a finished chat begin
and end is the template's to say as well.

Source: transformers' utils/chat_template_utils.py.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from vibejax import chat_template, digests, gguf_tokenizer
from vibejax.chat_template import CHATML, ChatError, Message, TextError
from vibejax.checkpoint_config import CheckpointError
from vibejax.gguf_reader import GGUFFile
from vibejax.safetensors_folder import read_json, write_json

# Private-use characters that stand around a control token which a message wrote.
_MARK = re.compile("[\ue000\ue001]")
_MARKED = re.compile("\ue000([^\ue000\ue001]*)\ue001")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A checkpoint's tokenizer, its chat template and its stop tokens.

    Attributes:
        backend: text to ids and back.
        template: jinja2 source that renders a chat.
        eos_ids: every token that ends a completion, in the checkpoint's order.
        settings: tokenizer_config.json, whose `bos_token` and the like the template sees.
    """

    backend: tokenizers.Tokenizer
    template: str
    eos_ids: tuple[int, ...]
    settings: Mapping[str, Any]

    @functools.cached_property
    def vocab(self) -> int:
        """One more than the largest token id; a model's vocabulary may be padded beyond it."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def digest(self) -> str:
        """Of all that decides which tokens a chat becomes."""
        held = (self.backend.to_str(), self.template, self.eos_ids, dict(self.settings))
        return digests.of_text(json.dumps(held, sort_keys=True))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`, in which the names of special tokens stand for those tokens.

        Args:
            text: any text.
            add_special_tokens: whether the tokens that the checkpoint puts around every text
                (Llama's BOS; none for Qwen) are added, as transformers does by default.

        Raises:
            TextError: it holds half of a character, as JSON can.
        """
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:  # what tokenizers raises for a str that UTF-8 does not have
            lone = next((c for c in text if "\ud800" <= c <= "\udfff"), "")
            raise TextError(f"the text holds {lone!r}, half of a character") from None

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`, by default without special tokens such as the stop token."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The chat as the template writes it.

        Args:
            messages: the conversation.
            add_generation_prompt: whether the opening of the assistant's turn comes last.

        Raises:
            ChatError: the template is broken, or refuses these messages.
        """
        return self._render(messages, add_generation_prompt)

    def _render(self, messages, add_generation_prompt: bool, *, mark_turns: bool = False) -> str:
        named = {key: _token_text(v) for key, v in self.settings.items() if key.endswith("_token")}
        named = {key: text for key, text in named.items() if isinstance(text, str)}
        return chat_template.render(
            self.template, messages, named, add_generation_prompt, mark_turns=mark_turns
        )

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        control_in_content: bool = True,
    ) -> list[int]:
        """The ids of the rendered chat, without a second BOS.

        Args:
            messages: the conversation.
            add_generation_prompt: whether the opening of the assistant's turn comes last.
            control_in_content: as in transformers, "<|im_end|>" inside a message ends it.
                False encodes such text as ordinary characters, so that what a stranger wrote
                cannot open a turn of its own; only the template writes control tokens then.

        Raises:
            ChatError: the template is broken, or refuses these messages.
        """
        if control_in_content:
            text = self.render(messages, add_generation_prompt)
            return self.encode(text, add_special_tokens=False)
        text = self.render(self._marked(messages), add_generation_prompt)
        ids = []
        for i, piece in enumerate(_MARKED.split(text)):
            if i % 2:  # stood between marks
                ids += self._encode_plain(piece)
                continue
            # A template that cuts strings leaves marks without a partner.
            for part in _MARK.split(piece):
                ids += self.encode(part, add_special_tokens=False)
        return ids

    def encode_turns(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """The ids of a finished chat, and which assistant's turn each of them belongs to.

        A turn is what a sampler would have written: it begins behind the generation prompt and
        ends with the special token that the template puts behind it. What follows (ChatML's line
        break) is the template's, and left out after the last turn. A template says where its turns
        are by {% generation %} blocks or, without, by what it writes of the chat's beginnings.

        Returns:
            The ids; and for each the index of the assistant's message it belongs to, or -1.

        Raises:
            ChatError: the template is broken, refuses these messages, or does not say where the
                assistant's turns begin and end.
        """
        speaking = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        marked = chat_template.marks_turns(self.template)
        pieces = self._marked_turns(messages) if marked else self._turns_by_beginnings(messages)
        if len(pieces) != len(speaking):
            raise ChatError(
                f"chat template: writes {len(pieces)} {{% generation %}} blocks for the "
                f"{len(speaking)} turns of the assistant"
            )
        ids: list[int] = []
        owners: list[int] = []
        end = 0
        for index, (opening, turn) in zip(speaking, pieces, strict=True):
            # As a sampler has it: a token never reaches from the prompt into the turn.
            before = self.encode(opening, add_special_tokens=False)
            inside = self.encode(turn, add_special_tokens=False)
            ids += before + inside
            owners += [-1] * len(before) + [index] * len(inside)
            length = max((n for n, i in enumerate(inside, 1) if i in self._turn_ends), default=0)
            behind = self.decode(inside[length:], skip_special_tokens=False)
            if not length or behind.strip():
                raise ChatError(
                    f"chat template: ends the assistant's turn with {behind[-20:]!r}, not with a "
                    "special token of the tokenizer"
                )
            end = len(ids) - len(inside) + length
            owners[end:] = [-1] * (len(ids) - end)
        return ids[:end], owners[:end]

    def _marked_turns(self, messages: Sequence[Message]) -> list[tuple[str, str]]:
        """What comes before each {% generation %} block, and the block."""
        text = self._render(messages, False, mark_turns=True)
        pieces = chat_template.split_at_marks(text)
        if "".join(pieces) != self.render(messages, False):
            raise ChatError("chat template: changes what its {% generation %} blocks enclose")
        return list(zip(pieces[::2], pieces[1::2], strict=False))

    def _turns_by_beginnings(self, messages: Sequence[Message]) -> list[tuple[str, str]]:
        """What comes before each of the assistant's turns, and the turn."""
        whole = self.render(messages, False)
        pieces, end = [], 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self.render(messages[:i]), self.render(messages[: i + 1], False)
            if not (whole.startswith(after) and after.startswith(before) and len(before) >= end):
                raise ChatError(
                    f"chat template: writes messages[{i}] in another way than behind a generation "
                    "prompt, or when more follows, so where the turn begins and ends is not known; "
                    "put it between {% generation %} and {% endgeneration %}"
                )
            turn = after[len(before) :]
            silent = before == self.render(messages[:i], False)
            if silent and not turn.lstrip().startswith(message["content"].strip()):
                raise ChatError(
                    "chat template: has no generation prompt, so where the assistant's turn begins "
                    "is not known; put it between {% generation %} and {% endgeneration %}"
                )
            pieces.append((whole[end : len(before)], turn))
            end = len(after)
        return pieces

    @functools.cached_property
    def _turn_ends(self) -> frozenset[int]:
        added = self.backend.get_added_tokens_decoder()
        return frozenset([*self.eos_ids, *(i for i, token in added.items() if token.special)])

    def _encode_plain(self, text: str) -> list[int]:
        """The ids of `text` with no eye for added tokens."""
        if self.backend.normalizer is not None:
            text = self.backend.normalizer.normalize_str(text)
        pieces = [(text, None)]
        if self.backend.pre_tokenizer is not None:
            pieces = self.backend.pre_tokenizer.pre_tokenize_str(text)
        return [token.id for piece, _ in pieces for token in self.backend.model.tokenize(piece)]

    def _marked(self, value: Any) -> Any:
        """A message, or what is in one, with marks around the control tokens that it writes."""
        if isinstance(value, str):
            pieces = self._added.split(_MARK.sub("", value))
            return "".join(
                f"\ue000{piece}\ue001" if i % 2 else self._marked_once_normal(piece)
                for i, piece in enumerate(pieces)
            )
        if isinstance(value, Mapping):
            return {key: self._marked(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked(item) for item in value]
        return value

    def _marked_once_normal(self, text: str) -> str:
        """A text without control tokens, of which its normal form may hold some."""
        if self.backend.normalizer is None:
            return text
        normal = self.backend.normalizer.normalize_str(text)
        return self._added.sub("\ue000\\1\ue001", normal) if self._added.search(normal) else text

    @functools.cached_property
    def _added(self) -> re.Pattern:
        tokens = [*self.backend.get_added_tokens_decoder().values()]
        names = {token.content for token in tokens}
        if (normalizer := self.backend.normalizer) is not None:
            names |= {normalizer.normalize_str(t.content) for t in tokens if t.normalized}
        # A longer token first, before one that it contains.
        found = "|".join(map(re.escape, sorted(names - {""}, key=len, reverse=True)))
        return re.compile(f"({found or '(?!)'})")


def _token_text(value: Any) -> Any:
    """tokenizer_config.json writes a token as its text or as an object that holds it."""
    return value.get("content") if isinstance(value, Mapping) else value


def load(path: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder or a GGUF file.

    Raises:
        CheckpointError: a file is missing or malformed, or no stop token is known.
    """
    return _from_gguf(GGUFFile(path)) if path.is_file() else _from_folder(path)


def load_backend(path: Path) -> tokenizers.Tokenizer:
    """Text to ids and back alone, of a folder or file as for `load`.

    Raises:
        CheckpointError: a file is missing or malformed.
    """
    if path.is_file():
        return gguf_tokenizer.build_backend(GGUFFile(path))
    file = path / "tokenizer.json"
    if not file.exists():
        raise CheckpointError(f"{file}: missing; only tokenizers in this form are read")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the only class that the library raises
        raise CheckpointError(f"{file}: {error}") from None
    backend.no_truncation()  # lengths are the caller's business; nothing is cut off silently
    backend.no_padding()
    return backend


def _from_folder(folder: Path) -> Tokenizer:
    backend = load_backend(folder)
    settings = _optional_json(folder / "special_tokens_map.json")
    settings |= _optional_json(folder / "tokenizer_config.json")
    _require_added(folder, backend, settings)
    return Tokenizer(
        backend=backend,
        template=_folder_template(folder, settings),
        eos_ids=_folder_eos(folder, backend, settings),
        settings=settings,
    )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _require_added(folder: Path, backend: tokenizers.Tokenizer, settings) -> None:
    """Raises for a token that only other files than tokenizer.json tell of."""
    listed = settings.get("added_tokens_decoder")
    listed = [*listed.values()] if isinstance(listed, dict) else []
    for name in map(_token_text, [*listed, *_optional_json(folder / "added_tokens.json")]):
        if isinstance(name, str) and backend.token_to_id(name) is None:
            raise CheckpointError(
                f"{folder / 'tokenizer.json'}: lacks the added token {name!r}, which other files "
                "of the tokenizer list; save it with transformers' fast tokenizer"
            )


def _folder_template(folder: Path, settings: Mapping[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file}: not UTF-8 ({error})") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict)]
        template = {entry.get("name"): entry.get("template") for entry in named}
        if named and "default" not in template:
            raise CheckpointError(
                f"{folder}: tokenizer_config.json: chat_template holds {[*template]} and no default"
            )
        template = template.get("default")
    if not isinstance(template, str | None):
        raise CheckpointError(f"{folder}: tokenizer_config.json: chat_template must be a text")
    return template or CHATML


def _folder_eos(folder, backend, settings) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        value = _optional_json(folder / name).get("eos_token_id")
        if value is not None:
            ids = tuple(value) if isinstance(value, list) else (value,)
            if not ids or not all(_is_token(i, backend) for i in ids):
                raise CheckpointError(f"{folder / name}: eos_token_id {value!r} must be token ids")
            return ids
    token = _token_text(settings.get("eos_token"))
    known = None if token is None else backend.token_to_id(token)
    if known is None:
        raise CheckpointError(f"{folder}: no eos_token_id in generation_config.json or config.json")
    return (known,)


def _from_gguf(file: GGUFFile) -> Tokenizer:
    return Tokenizer(
        backend=gguf_tokenizer.build_backend(file),
        template=file.metadata.get("tokenizer.chat_template") or CHATML,
        eos_ids=gguf_tokenizer.eos_ids(file),
        settings=gguf_tokenizer.named_tokens(file),
    )


def _is_token(i: Any, backend: tokenizers.Tokenizer) -> bool:
    return type(i) is int and i >= 0 and backend.id_to_token(i) is not None


def save(tokenizer: Tokenizer, dst: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json, generation_config.json into a folder."""
    tokenizer.backend.save(str(dst / "tokenizer.json"))
    settings = dict(tokenizer.settings)
    # The generic class takes tokenizer.json as it is. Qwen2's own would put its pre-tokenizer
    # in place of the file's.
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": tokenizer.template,
    }
    write_json(dst / "tokenizer_config.json", settings)
    eos = list(tokenizer.eos_ids)
    write_json(dst / "generation_config.json", {"eos_token_id": eos[0] if len(eos) == 1 else eos})
