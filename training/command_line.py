"""A command line from a frozen record, and the values of such a record as one would type them.

A record is a frozen dataclass whose fields are made by `option`. Everything about an option is said
there once: this room knows no single one of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import platform
import shlex
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np

import purenn as nn

Record = TypeVar("Record")


def whole(minimum: int, text: str) -> int:
    """A whole number of at least `minimum` from the command line."""
    number = int(text)
    if number < minimum:
        raise argparse.ArgumentTypeError(f"expected at least {minimum}, got {text}")
    return number


def real(minimum: float, below: float, text: str) -> float:
    """A number with minimum <= number < below from the command line."""
    number = float(text)
    if not minimum <= number < below:
        limits = f"at least {minimum:g}" + (f" and below {below:g}" if below < math.inf else "")
        if not math.isfinite(number):
            limits = f"a finite number of {limits}"
        raise argparse.ArgumentTypeError(f"expected {limits}, got {text}")
    return number


def positive(text: str) -> float:
    """A number above 0 from the command line."""
    number = real(0.0, math.inf, text)
    if not number:
        raise argparse.ArgumentTypeError(f"expected more than 0, got {text}")
    return number


count = partial(whole, 1)
count_or_zero = partial(whole, 0)
not_negative = partial(real, 0.0, math.inf)
fraction = partial(real, 0.0, 1.0)
# argparse names the type in its message: "invalid whole number value: 'x'"
vars(count)["__name__"] = vars(count_or_zero)["__name__"] = "whole number"
vars(not_negative)["__name__"] = vars(fraction)["__name__"] = positive.__name__ = "number"


class About(NamedTuple):
    """What there is to say of an option apart from its type."""

    help: str
    group: str
    default: Any
    distinguishes: bool
    resumes: bool
    only_with: tuple[str, Sequence[str]] | None
    presets: dict[str, dict[str, Any]]
    argument: dict[str, Any]


def option(
    help: str,  # noqa: A002 (as argparse calls it)
    *,
    group: str,
    default: Any = None,
    distinguishes: bool = True,
    resumes: bool = False,
    only_with: tuple[str, Sequence[str]] | None = None,
    presets: dict[str, dict[str, Any]] | None = None,
    **argument: Any,
) -> Any:
    """A field of a record; `argument` is what argparse's `add_argument` takes.

    `help` may refer to the record, as in {record.default_shards}. `distinguishes`: runs are told
    apart by it (--compare, titles). `resumes`: a training may be resumed with another value of it.
    `only_with`: another option, and its choices without which this one would be silently ignored.
    `presets`: {choice: {other option: its default then}}.
    """
    about = About(help, group, default, distinguishes, resumes, only_with, presets or {}, argument)
    return dataclasses.field(default=default, metadata={"about": about})


def with_default(record: type[Any], name: str, default: Any) -> Any:
    """An option of another record, with another default."""
    about = options_of(record)[name]._replace(default=default)
    return dataclasses.field(default=default, metadata={"about": about})


def options_of(record: Any) -> dict[str, About]:
    """The fields of a record (or of its class) that are on the command line, by name."""
    fields = dataclasses.fields(record)
    return {known.name: known.metadata["about"] for known in fields if known.metadata}


def flag_of(name: str) -> str:
    """--batch-size of batch_size."""
    return f"--{name.replace('_', '-')}"


def add_option(group: Any, name: str, about: About, record: type[Any]) -> None:
    """One argument of a parser."""
    argument, default = dict(about.argument), about.default
    if isinstance(default, bool):
        argument["action"] = argparse.BooleanOptionalAction if default else "store_true"
    elif isinstance(default, tuple):
        default = list(default)  # as argparse gives what is typed, and as help shows it
    elif default is None:
        default = argparse.SUPPRESS
    text = about.help.format(record=record)
    group.add_argument(flag_of(name), default=default, help=text, **argument)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def new_parser(record: type[Any], description: str, epilog: str = "") -> argparse.ArgumentParser:
    """The parser of all options of a record."""
    parser = Parser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog=epilog,
        allow_abbrev=False,  # what is short for one option today is for two when there are more
    )
    version = f"purenn {nn.__version__}, NumPy {np.__version__}, Python {platform.python_version()}"
    parser.add_argument("--version", action="version", version=version, help="print it and exit")
    groups: dict[str, Any] = {}
    for name, about in options_of(record).items():
        if about.group not in groups:
            groups[about.group] = parser.add_argument_group(about.group)
        add_option(groups[about.group], name, about, record)
    return parser


def from_namespace(record: type[Record], namespace: argparse.Namespace) -> Record:
    """The record of what argparse found."""
    values = vars(namespace).items()
    return record(**{name: tuple(v) if isinstance(v, list) else v for name, v in values})


def preset_defaults(options: Any) -> dict[str, Any]:
    """The defaults that are others because of what was chosen, as with --task sine."""
    presets: dict[str, Any] = {}
    for name, about in options_of(options).items():
        if about.presets:
            presets |= about.presets.get(getattr(options, name), {})
    return presets


def similar_flags(record: type[Any], argument: str) -> list[str]:
    """The options that begin like an argument, or else the one that is spelled most like it."""
    flags = ["--help", "--version"]
    for name, about in options_of(record).items():
        flags += [flag_of(name), *([f"--no-{flag_of(name)[2:]}"] if about.default is True else [])]
    wanted = argument.partition("=")[0]
    longer = [flag for flag in flags if len(wanted) > 2 and flag.startswith(wanted)]
    return longer or difflib.get_close_matches(wanted, flags, 1, 0.75)


def parse_once(
    record: type[Record], parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> Record:
    """The options of a command line; of one that there is not, what it may have meant is said."""
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        similar = " or ".join(similar_flags(record, unknown[0]))
        hint = f"; did you mean {similar}?" if similar else ""
        what = "there is no option" if unknown[0].startswith("-") else "unexpected argument"
        parser.error(f"{what} {unknown[0]}{hint}")
    return from_namespace(record, namespace)


def parse(
    record: type[Record], parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> Record:
    """The options of a command line (None: of this process)."""
    options = parse_once(record, parser, arguments)
    presets = preset_defaults(options)
    if not presets:
        return options
    parser.set_defaults(**presets)
    return parse_once(record, parser, arguments)


def from_json(about: About, value: Any) -> Any:
    """The value of an option that `as_json` gave; ValueError for one that could not be typed."""
    if value is None or (isinstance(value, bool) and isinstance(about.default, bool)):
        return value
    if isinstance(value, list):
        return tuple(from_json(about, item) for item in value)
    if isinstance(about.default, bool):
        raise ValueError(f"expected true or false, got {value!r}")
    typed = about.argument.get("type", str)(str(value))
    if typed not in about.argument.get("choices", [typed]):
        raise ValueError(f"unknown choice {value!r}")
    return typed


def from_values(record: type[Record], values: dict[str, Any]) -> Record:
    """The record of {"--batch-size": 128, ...}, as `all_values` gave them; defaults for others."""
    known = {flag_of(name): name for name in options_of(record)}
    found = {}
    for flag, value in values.items():
        try:
            found[known[flag]] = from_json(options_of(record)[known[flag]], value)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{flag}: {error}") from None
    return record(**found)


def with_defaults(options: Any, flags: set[str]) -> Any:
    """The same options, but these flags as if they had not been given."""
    defaults = vars(type(options)(**preset_defaults(options)))
    names = [name for name in options_of(options) if flag_of(name) in flags]
    return dataclasses.replace(options, **{name: defaults[name] for name in names})


def check_companions(options: Any) -> None:
    """ValueError for an option that would be silently ignored beside the others."""
    for name, about in options_of(options).items():
        value = getattr(options, name)
        if about.only_with is None or value is None or value is False:
            continue
        other, choices = about.only_with
        chosen = getattr(options, other)
        if chosen not in choices:
            expected = " or ".join(choices)
            raise ValueError(f"{flag_of(name)} goes with {flag_of(other)} {expected}, not {chosen}")


def as_json(value: Any) -> Any:
    """The value of an option as JSON holds it: a pair as in shift=2."""
    if not isinstance(value, tuple):
        return value
    return [f"{item[0]}={item[1]}" if isinstance(item, tuple) else item for item in value]


def all_values(options: Any) -> dict[str, Any]:
    """{"--batch-size": 128, ...}: every option by its flag, None where nothing was given."""
    return {flag_of(name): as_json(getattr(options, name)) for name in options_of(options)}


def chosen_values(options: Any) -> dict[str, Any]:
    """{"--epochs": 2, ...}: what distinguishes this run and is not at its default."""
    defaults = all_values(type(options)(**preset_defaults(options)))
    flags = [flag_of(name) for name, about in options_of(options).items() if about.distinguishes]
    values = all_values(options)
    return {flag: values[flag] for flag in flags if values[flag] != defaults[flag]}


def as_typed(value: Any) -> str:
    """A single value as one would type it."""
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)


def as_arguments(values: dict[str, Any]) -> Iterator[str]:
    """The values of options as arguments of a command line; None is left out."""
    for flag, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool):
            yield flag if value else flag.replace("--", "--no-", 1)
        else:
            yield flag
            yield from map(as_typed, value if isinstance(value, list) else [value])


def format_command(values: dict[str, Any], name: str = "") -> str:
    """A command with these options, as one would type it."""
    return shlex.join([*([name] if name else []), *as_arguments(values)])
