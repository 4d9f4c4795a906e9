"""Text to token ids and back, and chats to prompts, exactly as the checkpoint says.

A Hugging Face folder's tokenizer.json is obeyed as it is; `gguf_tokenizer` rebuilds the one of a
GGUF file. Chats are rendered with the checkpoint's own template (ChatML where it has none) in
jinja2's sandbox, the way transformers does it.

Source: transformers' utils/chat_template_utils.py.
"""

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from vibejax import gguf_tokenizer
from vibejax.checkpoint_config import CheckpointError
from vibejax.config_file import InputError
from vibejax.gguf_reader import GGUFFile
from vibejax.safetensors_folder import read_json, write_json

Message = Mapping[str, Any]  # `role` and `content`, and what else the template reads

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Private-use characters that stand around a control token which a message wrote.
_MARK = re.compile("[\ue000\ue001]")
_MARKED = re.compile("\ue000([^\ue000\ue001]*)\ue001")


class ChatError(InputError):
    """A chat template is broken, or refuses the messages; the message is one line."""


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

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`, in which the names of special tokens stand for those tokens.

        Args:
            text: any text.
            add_special_tokens: whether the tokens that the checkpoint puts around every text
                (Llama's BOS; none for Qwen) are added, as transformers does by default.
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

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
        named = {key: value for key, value in self.settings.items() if key.endswith("_token")}
        named = {key: _token_text(value) for key, value in named.items()}
        try:
            return _compile(self.template).render(
                **named,
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
            )
        except Exception as error:  # a template is a foreign program and fails as it likes
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ChatError(f"chat template: {reason}") from None

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
        text = self.render([_mark(m, self._added()) for m in messages], add_generation_prompt)
        ids = []
        for i, piece in enumerate(_MARKED.split(text)):
            if i % 2:  # stood between marks
                ids += self._encode_plain(piece)
                continue
            # A template that cuts strings leaves marks without a partner.
            for part in _MARK.split(piece):
                ids += self.encode(part, add_special_tokens=False)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        """The ids of `text` with no eye for added tokens."""
        if self.backend.normalizer is not None:
            text = self.backend.normalizer.normalize_str(text)
        pieces = self.backend.pre_tokenizer.pre_tokenize_str(text)
        return [token.id for piece, _ in pieces for token in self.backend.model.tokenize(piece)]

    def _added(self) -> re.Pattern:
        names = [t.content for t in self.backend.get_added_tokens_decoder().values()]
        names.sort(key=len, reverse=True)  # a longer token first, before one that it contains
        return re.compile("|".join(map(re.escape, names)) or "(?!)")


def _mark(message: Message, control: re.Pattern) -> dict[str, Any]:
    def marked(value: Any) -> Any:
        if isinstance(value, str):
            return control.sub("\ue000\\g<0>\ue001", _MARK.sub("", value))
        if isinstance(value, Mapping):
            return {key: marked(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [marked(item) for item in value]
        return value

    return {key: marked(value) for key, value in message.items()}


def _token_text(value: Any) -> Any:
    """tokenizer_config.json writes a token as its text or as an object that holds it."""
    return value.get("content") if isinstance(value, Mapping) else value


@functools.cache
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # jinja2's own filter escapes HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


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
    settings = _optional_json(folder / "tokenizer_config.json")
    return Tokenizer(
        backend=backend,
        template=_folder_template(folder, settings),
        eos_ids=_folder_eos(folder, backend, settings),
        settings=settings,
    )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _folder_template(folder: Path, settings: Mapping[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
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
