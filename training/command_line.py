"""A command line from a frozen record, and the values of such a record as one would type them.

A record is a frozen dataclass whose fields are made by `option`. Everything about an option is said
there once: this room knows no single one of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import purenn as nn

Record = TypeVar("Record")
EPILOG = (
    "Speed: freed memory is kept for the next step (glibc alone would hand it back). Of the"
    " environment, OPENBLAS_NUM_THREADS says how many cores to use, 1 where two trainings share"
    " the machine, and OPENBLAS_CORETYPE which kernels: best left to OpenBLAS."
)


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
        raise argparse.ArgumentTypeError(f"expected {limits}, got {text}")
    return number


count = partial(whole, 1)
count_or_zero = partial(whole, 0)
positive = partial(real, 5e-324, math.inf)
not_negative = partial(real, 0.0, math.inf)
fraction = partial(real, 0.0, 1.0)
for _kind in (count, count_or_zero, positive, not_negative, fraction):
    # argparse names the type in its message: "invalid whole number value: 'x'"
    vars(_kind)["__name__"] = "whole number" if _kind.func is whole else "number"


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

    `distinguishes`: runs are told apart by it (--compare, titles). `resumes`: a training may be
    resumed with another value of it. `only_with`: another option, and its choices without which
    this one would be silently ignored. `presets`: {choice: {other option: its default then}}.
    """
    about = {
        "help": help,
        "group": group,
        "distinguishes": distinguishes,
        "resumes": resumes,
        "only_with": only_with,
        "presets": presets or {},
        "argument": argument,
    }
    return dataclasses.field(default=default, metadata=about)


def with_default(record: type[Any], name: str, default: Any) -> Any:
    """An option of another record, with another default."""
    (found,) = (known for known in option_fields(record) if known.name == name)
    return dataclasses.field(default=default, metadata=found.metadata)


def option_fields(record: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a record (or of its class) that are on the command line."""
    return [known for known in dataclasses.fields(record) if known.metadata]


def flag_of(name: str) -> str:
    """--batch-size of batch_size."""
    return f"--{name.replace('_', '-')}"


def add_option(group: Any, known: dataclasses.Field[Any], record: type[Any]) -> None:
    """One argument of a parser; its help may refer to the record, as in {record.usual_shards}."""
    argument, default = dict(known.metadata["argument"]), known.default
    if isinstance(default, bool):
        argument["action"] = argparse.BooleanOptionalAction if default else "store_true"
    elif isinstance(default, tuple):
        default = list(default)  # as argparse gives what is typed, and as help shows it
    elif default is None:
        default = argparse.SUPPRESS
    text = known.metadata["help"].format(record=record)
    group.add_argument(flag_of(known.name), default=default, help=text, **argument)


def new_parser(record: type[Any], description: str) -> argparse.ArgumentParser:
    """The parser of all options of a record."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog=EPILOG,
    )
    version = f"purenn {nn.__version__}"
    parser.add_argument("--version", action="version", version=version, help="print it and exit")
    groups: dict[str, Any] = {}
    for known in option_fields(record):
        title = known.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        add_option(groups[title], known, record)
    return parser


def from_namespace(record: type[Record], namespace: argparse.Namespace) -> Record:
    """The record of what argparse found."""
    values = vars(namespace).items()
    return record(**{name: tuple(v) if isinstance(v, list) else v for name, v in values})


def preset_defaults(options: Any) -> dict[str, Any]:
    """The defaults that are others because of what was chosen, as with --task sine."""
    presets: dict[str, Any] = {}
    for known in option_fields(options):
        presets |= known.metadata["presets"].get(getattr(options, known.name), {})
    return presets


def parse(
    record: type[Record], parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> Record:
    """The options of a command line (None: of this process)."""
    options = from_namespace(record, parser.parse_args(arguments))
    presets = preset_defaults(options)
    if not presets:
        return options
    parser.set_defaults(**presets)
    return from_namespace(record, parser.parse_args(arguments))


def with_defaults(options: Any, flags: set[str]) -> Any:
    """The same options, but these flags as if they had not been given."""
    defaults = vars(type(options)(**preset_defaults(options)))
    names = [known.name for known in option_fields(options)]
    return dataclasses.replace(options, **{n: defaults[n] for n in names if flag_of(n) in flags})


def check_companions(options: Any) -> None:
    """ValueError for an option that would be silently ignored beside the others."""
    for known in option_fields(options):
        value = getattr(options, known.name)
        if known.metadata["only_with"] is None or value is None or value is False:
            continue
        other, choices = known.metadata["only_with"]
        chosen = getattr(options, other)
        if chosen not in choices:
            raise ValueError(
                f"{flag_of(known.name)} goes with {flag_of(other)} {' or '.join(choices)},"
                f" not {chosen}"
            )


def as_json(value: Any) -> Any:
    """The value of an option as JSON holds it: a pair as in shift=2."""
    if not isinstance(value, tuple):
        return value
    return [f"{item[0]}={item[1]}" if isinstance(item, tuple) else item for item in value]


def all_values(options: Any) -> dict[str, Any]:
    """{"--batch-size": 128, ...}: every option by its flag, None where nothing was given."""
    names = [known.name for known in option_fields(options)]
    return {flag_of(name): as_json(getattr(options, name)) for name in names}


def flags_where(record: Any, quality: str, value: Any) -> set[str]:
    """The flags of the options for which something that `option` was told has this value."""
    known = option_fields(record)
    return {flag_of(one.name) for one in known if one.metadata[quality] == value}


def chosen_values(options: Any) -> dict[str, Any]:
    """{"--epochs": 2, ...}: what distinguishes this run and is not at its default."""
    defaults = all_values(type(options)(**preset_defaults(options)))
    distinguishing = flags_where(options, "distinguishes", True)
    return {
        flag: value
        for flag, value in all_values(options).items()
        if flag in distinguishing and value != defaults[flag]
    }


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
    return " ".join([*([name] if name else []), *as_arguments(values)])
