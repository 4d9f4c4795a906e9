"""Configuration files: strict TOML in, frozen sections out, and every error in one line each.

Unknown keys, wrong types and values out of range stop a run before any device is touched, all of
them at once, each with its file, key, value and rule.
"""

import argparse
import contextlib
import difflib
import json
import math
import signal
import sys
import tomllib
import typing
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import pydantic

C = TypeVar("C", bound="Section")

INTERRUPTED = 128 + signal.SIGINT  # exit code


class InputError(ValueError):
    """Something the user gave that cannot be used; the message is all that needs to be shown."""


class ConfigError(InputError):
    """A configuration that cannot be run; every line says which key and what to write."""


class Section(pydantic.BaseModel):
    """A table of a configuration file: no unknown keys, no conversions, no changes."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)


def parse_args(
    cls: type[C], *, doc: str, default: Path | None = None, argv: Sequence[str] | None = None
) -> C:
    """The configuration that the command line asks for; ends the process if there is none.

    Args:
        cls: the stage's configuration.
        doc: the stage's module docstring, shown by --help above the list of all fields.
        default: the file read where the command line names none.
        argv: the arguments; None takes the process's.
    """
    parser = argparse.ArgumentParser(
        description=doc,
        epilog="fields, in TOML tables by their dots:\n" + "\n".join(_field_lines(cls)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shipped = "" if default is None else " (without one, the shipped default runs)"
    parser.add_argument(
        "config", nargs="?" if default else None, type=Path, help=f"a TOML file{shipped}"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="overrides one field, as --set rollout.group_size=8; may be repeated",
    )
    args = parser.parse_args(argv)
    try:
        return load(cls, args.config or default, args.set)
    except ConfigError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


@contextlib.contextmanager
def errors_in_one_line(*more: type[Exception]) -> Iterator[None]:
    """Ends the process in one line, without a traceback, on what the user can mend and on Ctrl-C.

    Args:
        more: classes besides `InputError` whose message is all that needs to be shown.
    """
    try:
        yield
    except (InputError, *more) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def load(cls: type[C], path: str | Path, overrides: Sequence[str] = ()) -> C:
    """Reads `path` as a `cls`, after `overrides` of the form "table.key=TOML value".

    Raises:
        ConfigError: the file is not TOML, or keys or values do not fit `cls`; one line for each.
    """
    table = read_table(path)
    overridden = {_override(table, text) for text in overrides}
    return validated(cls, table, str(path), overridden)


def read_table(path: str | Path) -> dict[str, Any]:
    """What a TOML file says.

    Raises:
        ConfigError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def validated(
    cls: type[C], table: dict[str, Any], where: str, overridden: Collection[str] = ()
) -> C:
    """A table as a `cls`.

    Args:
        cls: the stage's configuration.
        table: keys and values.
        where: they come from, for messages.
        overridden: dotted keys that come from --set instead.

    Raises:
        ConfigError: keys or values do not fit `cls`; one line for each.
    """
    try:
        return cls.model_validate(table)
    except pydantic.ValidationError as error:
        lines = []
        for e in error.errors():
            key = ".".join(map(str, e["loc"]))
            place = "--set" if key in overridden else where
            lines.append(f"{place}: {_complaint(cls, key, e)}")
        raise ConfigError("\n".join(lines)) from None


def dump(config: Section) -> str:
    """The configuration as TOML that `load` reads back to an equal one."""
    return "\n".join(_toml(config.model_dump(), "")) + "\n"


def _toml(table: dict[str, Any], path: str) -> Iterator[str]:
    """The lines of a table, its own values before the tables inside it."""
    yield from (f"{k} = {_literal(v)}" for k, v in table.items() if not isinstance(v, dict))
    for name, section in table.items():
        if isinstance(section, dict):
            yield from ("", f"[{path}{name}]", *_toml(section, f"{path}{name}."))


def differences(stored: Section, given: Section) -> list[str]:
    """One "key: stored -> given" for each field in which two configurations differ."""
    old, new = leaves(stored), leaves(given)
    return [  # a table of free names may have other keys
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in old | new
        if old.get(key) != new.get(key)
    ]


def leaves(config: Section) -> dict[str, Any]:
    """Every field by its dotted name."""
    return dict(_leaves(config.model_dump()))


def _leaves(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _override(table: dict[str, Any], text: str) -> str:
    """Puts "a.b=value" into `table` and returns "a.b"."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals:
        raise ConfigError(f"--set {text}: must have the form key=value")
    *parents, leaf = key.split(".")
    for name in parents:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {text}: {name} is a value, not a table")
    try:
        table[leaf] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        table[leaf] = value.strip()  # a bare word, so that paths need no quotes within quotes
    return key


def _complaint(cls: type[Section], key: str, error: Any) -> str:
    """One line about one error of pydantic's."""
    if error["type"] == "extra_forbidden":
        known, value, names = [name for name, *_ in _fields(cls)], error["input"], [key]
        while isinstance(value, dict) and len(value) == 1:  # a table that --set has made, say
            (name, value), *_ = value.items()
            names = [f"{names[0]}.{name}", *names]
        pairs = [
            (n, near) for n in names for near in difflib.get_close_matches(n, known, cutoff=0.5)
        ]
        if not pairs:
            return f"unknown key {key}"
        name, near = max(pairs, key=lambda pair: difflib.SequenceMatcher(None, *pair).ratio())
        return f"unknown key {name}; did you mean {near}?"
    if error["type"] == "missing":
        return f"{key} is required"
    if error["type"] == "value_error":  # a rule over several fields, which names them itself
        return (f"{key}: " if key else "") + str(error["ctx"]["error"])
    rule = error["msg"].replace("Input should", "must", 1)
    rule = rule.replace("False, True", "false, true")  # as TOML writes them
    return f"{key} = {error['input']!r}: {rule}"


def _fields(cls: type[Section], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, type, pydantic field) of every leaf."""
    for name, field in cls.model_fields.items():
        inner = field.annotation
        if typing.get_origin(inner) is dict and _is_section(typing.get_args(inner)[1]):
            yield f"{prefix}{name}", inner, field
            yield from _fields(typing.get_args(inner)[1], f"{prefix}{name}.NAME.")
        elif _is_section(inner):
            yield from _fields(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner, field


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _field_lines(cls: type[Section]) -> Iterator[str]:
    """Lines of --help: name, type, default and meaning."""
    for name, kind, field in _fields(cls):
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        written = (c if isinstance(c, str) else _literal(c) for c in choices)
        type_name = " | ".join(written) or getattr(kind, "__name__", str(kind))
        default = "required" if field.is_required() else f"default {_literal(field.default)}"
        yield f"  {name} ({type_name}, {default})"
        yield f"      {field.description}"


def _literal(value: Any) -> str:
    """A scalar as TOML writes it: JSON writes strings, finite numbers and booleans alike."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
