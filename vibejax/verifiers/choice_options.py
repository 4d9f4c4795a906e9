"""Options of multiple-choice records: in prompts, in a seeded order, and which one is right."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vibejax.verifiers import choice_units

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
UNKNOWN_COUNT = 10  # letters accepted where the record does not say how many options there are
MIN_SUSPICIOUS = 8  # with four options, so many letters are alike by chance once in 16,384

_OPTION_LINE = re.compile(r"[ \t]*[(\[]?([A-Z])[)\].:][ \t]+(\S.*)")
_LETTER = re.compile(r"\(?([A-Za-z])\)?\.?")
_REFERS_TO_OTHERS = re.compile(
    r"\b(?:all|none|both|neither|any|each)\s+(?:of\s+)?(?:the\s+)?(?:above|these|below|others)\b"
    r"|\b(?:both|neither|only|options?)\s+\(?[A-J]\b|\b[A-J]\)?,?\s+(?:and|or|nor)\s+\(?[A-J]\b",
    re.IGNORECASE,
)
_MARKUP = re.compile(
    r"\\(?:text|textbf|mathrm|mathbf|textrm|bf|rm|boldsymbol)\b\s{0,3}|[{}$*_`]|\\[()\[\],;! ]"
)
_SPACES = re.compile(r"\s+")


def prepare(
    records: Iterable[Mapping[str, Any]], *, shuffle_seed: int | None
) -> list[dict[str, Any]]:
    """Checks choice records before a run, and shuffles their options if a seed is given.

    Args:
        records: choice records, see `choice.verify`.
        shuffle_seed: with it, each record's options are put in an order that depends on the seed
            and the record alone; None leaves them as they are.

    Raises:
        ValueError: a record's truth cannot be read or its options cannot be shuffled; or nothing
            is shuffled and all of at least `MIN_SUSPICIOUS` records have the same letter.
    """
    records = [dict(record) for record in records]
    truths = [truth_of(record)[0] for record in records]
    if shuffle_seed is not None:
        return [
            shuffle(record, seed=shuffle_seed) if isinstance(truth, str) else record
            for record, truth in zip(records, truths, strict=True)
        ]
    letters = [truth for truth in truths if isinstance(truth, str)]
    if len(letters) >= MIN_SUSPICIOUS and len(set(letters)) == 1:
        raise ValueError(
            f"all {len(letters)} choice records have the answer {letters[0]!r}: a policy that "
            "always says so would be right; shuffle the options (shuffle_seed = 0, for example)"
        )
    return records


def shuffle(record: Mapping[str, Any], *, seed: int) -> dict[str, Any]:
    """Returns a record with its options in another order, and the letter that is then right.

    The order is a function of the seed and the record's id (its prompt, if it has none). Options
    that speak of others ("all of the above", "both A and B") keep a record as it is.

    Raises:
        ValueError: there are no options, neither in `options` nor in the prompt.
    """
    letter, options = truth_of(record)
    prompt = prompt_text(record)
    if not isinstance(letter, str) or not options:
        raise ValueError(f"record {_name(record)}: no options to shuffle, in `options` or prompt")
    if any(_REFERS_TO_OTHERS.search(option) for option in options):
        return dict(record)
    key = f"{seed}:{prompt if record.get('id') is None else record['id']}"
    order = sorted(
        range(len(options)), key=lambda i: hashlib.sha256(f"{key}:{i}".encode()).digest()
    )
    shuffled = [options[i] for i in order]
    before, found, after = split(prompt)
    if not found:
        before += "\n\n"
    return {
        **_with_prompt(record, before + render(shuffled) + after),
        "options": shuffled,
        "ground_truth": LETTERS[order.index(LETTERS.index(letter))],
    }


def render(options: Sequence[str]) -> str:
    """Returns options as lines "A) ...", "B) ..."."""
    return "\n".join(
        f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)
    )


def split(prompt: str) -> tuple[str, list[str], str]:
    """Cuts a prompt into what stands before its options, the options, and what follows them.

    Options are lines labelled A, B, C in order, as in "A) ...", "(A) ...", "A. ..."; one may go on
    over several lines, the last one up to a blank line. Of several such lists the last counts.

    Returns:
        (before, options, after), to be put together again; without options, (prompt, [], "").
    """
    lines = prompt.split("\n")
    labels = [(i, label) for i, line in enumerate(lines) if (label := _OPTION_LINE.fullmatch(line))]
    for start in reversed(range(len(labels))):
        if labels[start][1][1] != "A":
            continue
        run = []
        for letter, (i, label) in zip(LETTERS, labels[start:], strict=False):
            if label[1] != letter:
                break
            run.append((i, label[2]))
        if len(run) < 2:
            continue
        end = next((i for i in range(run[-1][0], len(lines)) if not lines[i].strip()), len(lines))
        untils = [i for i, _ in run[1:]] + [end]
        options = [
            "\n".join([first, *lines[i + 1 : until]]).strip()
            for (i, first), until in zip(run, untils, strict=True)
        ]
        before = "".join(line + "\n" for line in lines[: run[0][0]])
        return before, options, "".join("\n" + line for line in lines[end:])
    return prompt, [], ""


def prompt_text(record: Mapping[str, Any]) -> str:
    """Returns the text of a record's prompt, or of the last user message of its messages.

    Raises:
        ValueError: the record has neither.
    """
    prompt = record.get("messages", record.get("prompt"))
    if isinstance(prompt, list):
        users = [m for m in prompt if isinstance(m, Mapping) and m.get("role") == "user"]
        prompt = users[-1].get("content") if users else None
    if not isinstance(prompt, str):
        raise ValueError(f"record {_name(record)}: has no prompt text and no user message")
    return prompt


def _with_prompt(record: Mapping[str, Any], prompt: str) -> dict[str, Any]:
    field = "messages" if "messages" in record else "prompt"
    if isinstance(record[field], str):
        return {**record, field: prompt}
    messages = [dict(message) for message in record[field]]
    next(m for m in reversed(messages) if m.get("role") == "user")["content"] = prompt
    return {**record, field: messages}


def truth_of(record: Mapping[str, Any]) -> tuple[str | choice_units.Quantity, list[str]]:
    """Reads a record's ground truth: a letter, the text of an option, or a quantity.

    Returns:
        (letter, options), without options where neither the record nor its prompt has any; or
        (quantity, []).

    Raises:
        ValueError: the ground truth is missing or none of these, is two of them at once, or
            `options` is no list of different texts.
    """
    truth, options = record.get("ground_truth"), record.get("options")
    if isinstance(truth, bool) or not isinstance(truth, str | int | float) or truth == "":
        raise ValueError(
            f"record {_name(record)}: ground_truth = {truth!r:.80}: must be an option letter, the "
            "text of an option, or a number with or without a unit"
        )
    truth = str(truth).strip()
    if options is None:
        options = _options_of_prompt(record)
    else:
        _check_options(record, options)
    found = _LETTER.fullmatch(truth)
    valid = LETTERS[: len(options) or UNKNOWN_COUNT]
    letter = found[1].upper() if found and found[1].upper() in valid else None
    texts = [plain(option) for option in options]
    by_text = LETTERS[texts.index(plain(truth))] if plain(truth) in texts else None
    if letter and by_text and letter != by_text:
        raise ValueError(
            f"record {_name(record)}: ground_truth = {truth!r}: is letter {letter} and also the "
            f"text of option {by_text}"
        )
    if by_text:
        return by_text, options
    if letter:
        return letter, options
    if options:
        raise ValueError(
            f"record {_name(record)}: ground_truth = {truth!r:.80}: is neither a letter nor the "
            f"text of one of its {len(options)} options"
        )
    quantity = choice_units.read(truth)
    if quantity is None:
        raise ValueError(
            f"record {_name(record)}: ground_truth = {truth!r:.80}: is neither an option letter "
            "nor a number with or without a unit, and there are no options"
        )
    return quantity, []


def _options_of_prompt(record: Mapping[str, Any]) -> list[str]:
    if "messages" not in record and "prompt" not in record:
        return []  # a record that is only verified need not carry its prompt
    options = split(prompt_text(record))[1]
    return options if len({plain(option) for option in options}) == len(options) else []


def _check_options(record: Mapping[str, Any], options: Any) -> None:
    if not isinstance(options, list) or not all(isinstance(o, str) and o.strip() for o in options):
        raise ValueError(f"record {_name(record)}: options must be a list of texts, none blank")
    if not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"record {_name(record)}: {len(options)} options: must be 2 to 26")
    if len({plain(option) for option in options}) < len(options):
        raise ValueError(f"record {_name(record)}: two options read the same: {options!r:.200}")


def _name(record: Mapping[str, Any]) -> str:
    return repr(record.get("id", "without id"))[:80]


def unmarked(text: str) -> str:
    """Returns a text without Markdown and LaTeX markup around its words."""
    return _MARKUP.sub("", text).strip()


def plain(text: str) -> str:
    """Normalises an option's text for comparison: no markup, spacing, case or final period."""
    return _SPACES.sub("", unmarked(text)).rstrip(".").casefold()
