"""Chat templates: foreign jinja2 programs that write a chat as text, run in jinja2's sandbox.

They see what transformers gives them. A template may say where the assistant's turns are, by
{% generation %} blocks; marks then stand around what these enclose.

Source: transformers' utils/chat_template_utils.py.
"""

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

from vibejax.config_file import InputError

Message = Mapping[str, Any]  # `role` and `content`, and what else the template reads

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Unicode's noncharacters, which no text holds, stand around what {% generation %} encloses.
_GENERATED = re.compile("\ufdd0([^\ufdd0\ufdd1]*)\ufdd1")
_GENERATION_TAG = re.compile(r"{%[-+]?\s*generation\b")


class TextError(InputError):
    """A text that cannot become tokens; the message is one line."""


class ChatError(TextError):
    """A chat template is broken, or refuses the messages; the message is one line."""


def render(
    template: str,
    messages: Sequence[Message],
    named: Mapping[str, str],
    add_generation_prompt: bool,
    *,
    mark_turns: bool = False,
) -> str:
    """The chat as the template writes it.

    Args:
        template: jinja2 source.
        messages: the conversation.
        named: texts of `bos_token` and the like.
        add_generation_prompt: whether the opening of the assistant's turn comes last.
        mark_turns: whether to put marks around what {% generation %} blocks enclose.

    Raises:
        ChatError: the template is broken, or refuses these messages.
    """
    try:
        return _compile(template, mark_turns).render(
            **named,
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
        )
    except Exception as error:  # a template is a foreign program and fails as it likes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ChatError(f"chat template: {reason}") from None


def marks_turns(template: str) -> bool:
    """Whether a template has {% generation %} blocks."""
    return bool(_GENERATION_TAG.search(template))


def split_at_marks(text: str) -> list[str]:
    """What lies outside and inside of the marks, by turns."""
    return _GENERATED.split(text)


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, transformers' tag around the assistant's turns."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        if self.environment.mark_turns:
            first, last = (
                nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in "\ufdd0\ufdd1"
            )
            body = [first, *body, last]
        return nodes.Scope(body, lineno=line)


@functools.cache
def _compile(template: str, mark_turns: bool) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.extend(mark_turns=mark_turns)
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
