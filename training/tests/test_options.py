"""Options: one frozen record with every default, and the command line that follows from it."""

import contextlib
import dataclasses
import io
import itertools
import re
import types
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train_cnn import CNNOptions
from train_mlp import MLPOptions
from training import command_line, options
from training.choices import check_options
from training.command_line import (
    all_values,
    as_arguments,
    chosen_values,
    count,
    flag_of,
    format_command,
    new_parser,
    options_of,
    parse,
    preset_defaults,
)
from training.options import Options, network_option

RECORDS = [Options, MLPOptions, CNNOptions]


def parsed(record, *arguments):
    """The options of a command line."""
    return parse(record, new_parser(record, ""), arguments)


# --- the record ---


@pytest.mark.parametrize("record", RECORDS)
def test_every_default_is_that_of_the_command_line(record):
    assert parsed(record) == record()
    with pytest.raises(dataclasses.FrozenInstanceError):
        record().epochs = 3


def is_a(value, kind):
    """Whether a value is of the type of a field."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return any(is_a(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if kinds[-1] is ...:
            kinds = itertools.repeat(kinds[0])
        return isinstance(value, tuple) and all(map(is_a, value, kinds))
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


# What an option's kind makes of these, where it takes them: values of every option there is.
TEXTS = ["0", "1", "7", "300", "0.5", "0.25", "1e-05", "shift=2", "balanced", "norm1", "a/b"]


def accepted(kind):
    """What a kind of values on the command line makes of the texts that it takes."""
    values = []
    for text in TEXTS:
        try:
            values.append(kind(text))
        except Exception:  # as argparse does
            continue
    return values


@st.composite
def records(draw, record):
    """A record with some of its options chosen, whatever they are."""
    chosen = {}
    for name, about in options_of(record).items():
        argument = about.argument
        if isinstance(about.default, bool):
            values = st.booleans()
        else:
            found = list(argument.get("choices", ())) or accepted(argument.get("type", str))
            values = st.sampled_from(found)
            if argument.get("nargs", "?") in ("*", "+"):
                least = int(argument["nargs"] == "+")
                values = st.lists(values, min_size=least, max_size=3).map(tuple)
        if draw(st.integers(0, 3)) == 0:
            chosen[name] = draw(values)
    return record(**{**preset_defaults(record(**chosen)), **chosen})


@given(data=st.data(), record=st.sampled_from(RECORDS))
def test_what_is_typed_is_what_is_in_the_record_and_of_its_type(data, record):
    options = data.draw(records(record))
    defaults = all_values(record(**preset_defaults(options)))
    values = {flag: v for flag, v in all_values(options).items() if v != defaults[flag]}
    assert parsed(record, *as_arguments(values)) == options
    assert chosen_values(options).items() <= values.items()
    kinds = typing.get_type_hints(record)
    for known in dataclasses.fields(record):
        assert is_a(getattr(options, known.name), kinds[known.name]), known.name


@pytest.mark.parametrize("record", RECORDS)
def test_every_option_is_explained(record):
    text = new_parser(record, "Train.").format_help()
    for flag in all_values(record()):
        assert f"\n  {flag}" in text
    assert "default_shards" not in text


def test_a_script_of_a_users_adds_an_option_in_one_place():
    @dataclasses.dataclass(frozen=True)
    class MyOptions(Options):
        depth: int = network_option("blocks of the network", default=3, type=count, metavar="N")
        epochs: int = command_line.with_default(Options, "epochs", 7)

    assert (MyOptions().depth, MyOptions().epochs, Options().epochs) == (3, 7, 20)
    assert parsed(MyOptions) == MyOptions()
    assert parsed(MyOptions, "--depth", "5", "--epochs", "2").depth == 5
    assert "blocks of the network (default: 3)" in new_parser(MyOptions, "").format_help()
    assert chosen_values(MyOptions(depth=5)) == {"--depth": 5}
    assert all_values(MyOptions())["--depth"] == 3


def test_a_run_is_called_by_what_was_chosen_and_changes_the_result():
    chosen = ["--hidden", "8", "4", "--augment", "shift=1", "--no-batch-norm", "--lr", "0.010"]
    others = ["--data", "x", "--out", "y", "--plot", "z", "--workers", "2", "--summary"]
    options = parsed(MLPOptions, *chosen, *others, "--center", "--epochs", "20")
    values = chosen_values(options)
    assert values == {
        "--center": True,
        "--augment": ["shift=1.0"],
        "--lr": 0.01,
        "--hidden": [8, 4],
        "--batch-norm": False,
    }
    text = format_command(values, "train_mlp.py")
    assert text.startswith("train_mlp.py --center --augment shift=1")
    assert "--lr 0.01 --hidden 8 4 --no-batch-norm" in text
    assert chosen_values(MLPOptions()) == {}
    assert chosen_values(parsed(MLPOptions, "--task", "sine")) == {"--task": "sine"}
    assert chosen_values(parsed(MLPOptions, "--task", "sine", "--epochs", "9"))["--epochs"] == 9


def test_a_curve_has_defaults_of_its_own():
    curve = parsed(MLPOptions, "--task", "sine", "--lr", "0.5")
    assert curve == dataclasses.replace(MLPOptions(task="sine", **options.SINE), lr=0.5)
    assert parsed(MLPOptions, "--epochs", "9", "--task", "sine").epochs == 9


# --- what is refused ---

IMPOSSIBLE = {
    "--epochs": "-1 x 1.5", "--batch-size": "-1 0", "--seed": "-1", "--lr": "nan -1 inf",
    "--momentum": "1", "--final-momentum": "1", "--lr-factor": "1", "--lr-epochs": "0",
    "--train-size": "0", "--test-size": "0", "--size": "0", "--validation": "-1", "--hidden": "0",
    "--dropout": "1", "--init-std": "-1", "--report-every": "0", "--reduction": "max",
    "--activation": "step", "--task": "cosine", "--clip": "0 -1 nan x", "--patience": "0 1.5",
    "--class-weights": "0 -1 nan inf equal",
    "--augment": "blur=1 shift shift=far shift=-1 shift=nan",
}  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "value"), [(flag, v) for flag, values in IMPOSSIBLE.items() for v in values.split()]
)
def test_impossible_values_are_refused(flag, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(MLPOptions, flag, value)
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert f"argument {flag}: " in errors
    assert errors.count("\n") == 1


EVERY_OPTION = [
    (record, flag_of(name), about)
    for record, others in ((MLPOptions, {}), (CNNOptions, options_of(MLPOptions)))
    for name, about in options_of(record).items()
    if name not in others
]
NO_VALUES = ["x", "-1", "nan", "1.5", "2", "blur=1"]  # each kind refuses some of them
IGNORED = "ignored explicit argument '1'"
PARSERS = {record: new_parser(record, "") for record in (MLPOptions, CNNOptions)}


def error_of(record, *arguments):
    """What is said, in one line and with exit code 2, of what is not taken; None if it is."""
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            parse(record, PARSERS[record], arguments)
        except SystemExit as stopped:
            assert stopped.code == 2
            (line,) = errors.getvalue().splitlines()
            return line.partition(": error: ")[2]
    return None


def test_every_field_is_an_option():
    for record in (MLPOptions, CNNOptions):
        fields = {known.name for known in dataclasses.fields(record)}
        assert fields - options_of(record).keys() <= {"task"}  # what no other script has


@pytest.mark.parametrize("option", EVERY_OPTION, ids=lambda option: option[1])
def test_every_option_says_which_value_is_wrong(option):
    record, flag, about = option
    if isinstance(about.default, bool):
        assert error_of(record, f"{flag}=1") == f"argument {shown(flag, about)}: " + IGNORED
        return
    if about.argument.get("nargs", "+") == "+":
        assert re.fullmatch(f"argument {flag}: expected .* argument", error_of(record, flag))
    errors = {value: error_of(record, f"{flag}={value}") for value in NO_VALUES}
    refused = {value: error for value, error in errors.items() if error is not None}
    assert bool(refused) == bool(about.argument.keys() & {"type", "choices"})
    for value, error in refused.items():
        assert error.startswith(f"argument {flag}: ")
        assert repr(value) in error or error.endswith(f" {value}")


def shown(flag, about):
    """An option as argparse calls it: --center, or --batch-norm/--no-batch-norm."""
    return f"{flag}/--no-{flag[2:]}" if about.default is True else flag


@given(option=st.sampled_from(EVERY_OPTION), text=st.text() | st.floats().map(str))
def test_whatever_is_typed_is_taken_or_refused_in_one_line(option, text):
    record, flag, about = option
    error = error_of(record, f"{flag}={text}")
    assert error is None or error.startswith(f"argument {shown(flag, about)}: ")
    assert error is not None or not isinstance(about.default, bool)


@pytest.mark.parametrize("option", EVERY_OPTION, ids=lambda option: option[1])
def test_the_option_that_was_meant_is_named(option):
    record, flag, _ = option
    for typed in (flag[:-1], f"--{flag[2:].replace('-', '_')}"):
        error = error_of(record, f"{typed}=1")
        if typed != flag:
            assert error.startswith(f"there is no option {typed}=1; did you mean ")
            assert flag in re.split(" or |[ ?]", error)


def test_an_argument_of_two_lines_is_named_in_one():
    assert error_of(MLPOptions, "a\n b") == "unexpected argument a b"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("--epocs 3", "there is no option --epocs; did you mean --epochs?"),
        ("-lr 3", "there is no option -lr; did you mean --lr?"),
        ("--no-batchnorm", "there is no option --no-batchnorm; did you mean --no-batch-norm?"),
        ("--gpu", "there is no option --gpu"),
        ("mine.npz", "unexpected argument mine.npz"),
        ("--seed 3 4", "unexpected argument 4"),
        ("--task sine --gpu", "there is no option --gpu"),
    ],
)
def test_what_is_no_option_is_named(arguments, error):
    assert error_of(MLPOptions, *arguments.split()) == error


CONTRADICTIONS = [  # arguments, and the whole message or its beginning
    (
        "--loss mse --label-smoothing 0.1",
        "--label-smoothing goes with --loss cross-entropy, not mse",
    ),
    ("--loss mse --label-smoothing 0", "--label-smoothing goes with --loss cross-entropy, not mse"),
    ("--momentum 0.9", "--momentum goes with --optimizer sgd or rmsprop, not adam"),
    ("--final-momentum 0", "--final-momentum goes with --optimizer sgd or rmsprop, not adam"),
    ("--optimizer sgd --final-momentum 0.95", "--final-momentum 0.95 is above the momentum of 0.9"),
    ("--init-std 1", "--init-std goes with --init normal, not he-normal"),
    ("--augment scale=2", "augment: scale must be >= 0 and < 1"),
    (
        "--lr-factor 0.5",
        "--lr-factor goes with --schedule step or multistep or exponential or plateau",
    ),
    (
        "--schedule cosine --lr-epochs 2",
        "--lr-epochs goes with --schedule step or multistep or cyc",
    ),
    ("--schedule step --lr-epochs 2 3", "--schedule step takes one number of --lr-epochs"),
    ("--class-weights balanced 2", "--class-weights takes balanced, or one number for each class"),
    ("--task sine --class-weights 1", "--class-weights goes with --task classes, not sine"),
    ("--resume", "--resume needs --out"),
    ("--checkpoint-every 9", "--checkpoint-every needs --out"),
    ("--task sine --loss hinge", "--task sine takes --loss mse, mae or huber, not hinge"),
    ("--task sine --loss bce", "--task sine takes --loss mse, mae or huber, not bce"),
    ("--task sine --augment", "--augment goes with --task classes, not sine"),
    ("--task sine --size 8", "--size goes with --task classes, not sine"),
    ("--task sine --center", "--center goes with --task classes, not sine"),
    ("--task sine --data x", "--data goes with --task classes, not sine"),
]


@pytest.mark.parametrize(("arguments", "message"), CONTRADICTIONS)
def test_options_that_contradict_each_other_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        check_options(parsed(MLPOptions, *arguments.split()))


@pytest.mark.parametrize("record", RECORDS)
def test_the_defaults_contradict_nothing(record):
    check_options(record())
