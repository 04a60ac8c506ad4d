"""A script from its command line to its exit code."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np

import purenn as nn
from training import checkpoints, export, loop, pictures
from training.choices import check_options, choose_optimizer, choose_task
from training.classification import print_classes
from training.command_line import chosen_values, flag_of, format_command, new_parser, parse
from training.datasets import (
    Dataset,
    choose_test,
    load_data,
    prepare,
    prepare_features,
    sine,
    split_off,
)
from training.loop import Experiment, Progress
from training.options import Options
from training.prediction import format_shape
from training.team import Team, all_ranks, describe_team, one_rank_first, open_team

Chosen = TypeVar("Chosen", bound=Options)
Draw = Callable[[str, Experiment, nn.Tree], None]  # (folder, experiment, params) -> pictures

INSTEAD = ("predict", "export", "compare")  # options that ask for something else than training
EPILOG = (
    "Speed: OPENBLAS_NUM_THREADS in the environment limits the cores that are used, 1 where two"
    " trainings share the machine; OPENBLAS_CORETYPE chooses the kernels and is best left unset."
)


class Script(NamedTuple):
    """What a script is apart from its options."""

    name: str
    build: Callable[..., nn.Layer]  # (options, outputs) -> network
    draw: Draw


# ------------------------------------------------------------------------------------------------
# Setting up
# ------------------------------------------------------------------------------------------------


def check_samples(options: Options, data: Dataset, source: str) -> None:
    """ValueError for features where only images will do."""
    if data["x_train"].ndim > 2:
        return
    what = f"{source} holds tabular data ({data['x_train'].shape[1]} features a sample)"
    if options.needs_images:
        raise ValueError(f"{what}, but this script takes images; train_mlp.py takes both")
    for name in ("size", "center", "augment"):
        if getattr(options, name) not in (None, False):
            raise ValueError(f"{what}, and {flag_of(name)} is for images")


def load_parts(options: Options) -> tuple[Dataset, str | None]:
    """The data of the options, in parts and prepared, and the value of --data that was used."""
    data: Dataset
    source: str | None
    data, source = (
        (sine(), None) if options.task == "sine" else load_data(options.data, options.size)
    )
    if source is not None:
        check_samples(options, data, source)
    data = choose_test(data, options.test_size)
    data = split_off(data, options.validation, options.seed, options.train_size)
    if source is not None and data["x_train"].ndim == 2:
        return prepare_features(data), source
    return prepare(data, size=options.size, center=options.center), source


def count_images(data: Dataset) -> np.ndarray:
    """How many training images each class has; empty without classes."""
    classes = len(data.get("classes", ()))
    return np.bincount(data["y_train"], minlength=classes) if classes else np.zeros(0, int)


def set_up(
    options: Chosen, build: Callable[[Chosen, int], nn.Layer], team: Team = Team()
) -> tuple[Experiment, str | None]:
    """Data, task and network of the options, and the value of --data that was used."""
    data, source = load_parts(options)
    validating = {
        "--schedule plateau": options.schedule == "plateau",
        "--patience": options.patience is not None,
    }
    for flag, used in validating.items():
        if used and not len(data["x_validation"]):
            raise ValueError(f"{flag} needs validation images, but there are none (--validation)")
    if len(data.get("classes", (0, 1))) < 2:
        (name,) = data["classes"]
        raise ValueError(f"{source}: expected at least two classes, found 1 ({name})")
    task = choose_task(options, count_images(data))
    return Experiment(options, data, task, build(options, task.outputs), team), source


def open_folders(options: Options) -> None:
    """Make the folders of --plot and --out; ValueError where nothing may be written into them."""
    if options.plot is not None:
        pictures.pyplot()
        folder, out = options.picture_folder, options.out
        own = out is not None and os.path.realpath(out) == os.path.realpath(folder)
        if not own and checkpoints.holds_run(folder):
            raise ValueError(
                f"{folder}: this folder holds another run; choose another folder for --plot"
            )
        os.makedirs(folder, exist_ok=True)
    if options.out is not None:
        os.makedirs(options.out, exist_ok=True)


def describe_data(experiment: Experiment, source: str | None, parameters: int) -> str:
    """The first line that is printed."""
    data, task = experiment.data, experiment.task
    sizes = [f"{len(data[f'x_{part}']):,} {part}" for part in ("train", "validation", "test")]
    shape = format_shape(data["x_train"])
    what = f"samples of {shape} features" if "feature_mean" in data else f"images of {shape}"
    what += f", {task.outputs} classes"
    origin = "synthetic digits" if source == "builtin" else source
    if source is None:
        what, origin = "points", "y = sin x"
    return (
        f"{origin}: {sizes[0]}ing, {sizes[1]} and {sizes[2]} {what};"
        f" {parameters:,} parameters to train"
    )


def check_ranks_agree(experiment: Experiment) -> None:
    """ValueError where a rank has other options or data than rank 0."""
    communicator = experiment.team.communicator
    if communicator is None:
        return
    first, *others = communicator.allgather(checkpoints.fingerprint(experiment))
    for rank, own in enumerate(others, start=1):
        try:
            checkpoints.check_fingerprint(first, own)
        except ValueError as error:
            raise ValueError(f"rank {rank} does not do what rank 0 does: {error}") from None


# ------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def silence(options: Chosen) -> Iterator[Chosen]:
    """The options of a rank beside rank 0, which alone reports, reads and writes."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield replace(options, out=None, plot=None, resume=False, summary=False)


def run(options: Options, script: Script) -> None:
    """Everything from the data to the last line."""
    started = time.monotonic()
    nn.keep_freed_memory()
    with contextlib.ExitStack() as stack:
        team = stack.enter_context(open_team(options))
        if team.rank:
            options = stack.enter_context(silence(options))
        with one_rank_first(team):
            check_options(options)
            open_folders(options)
            if options.out is not None:
                stack.enter_context(checkpoints.lock_folder(options.out))
                if options.resume:
                    checkpoints.check_script(options.out, options)
                else:
                    checkpoints.check_unused(options.out)
            experiment, source = set_up(options, script.build, team)
        check_ranks_agree(experiment)
        results = train_and_test(experiment, source, script)
        print(f"{results} seconds={time.monotonic() - started:.1f}")


def first_progress(experiment: Experiment, optimizer: nn.Optimizer, params: nn.Tree) -> Progress:
    """Where the training begins: at its first step, or at a checkpoint with --resume."""
    progress = loop.begin(experiment, optimizer, params)
    if experiment.options.resume:
        progress = checkpoints.read_checkpoint(experiment, progress)
    communicator = experiment.team.communicator
    return communicator.bcast(progress) if communicator else progress


def write_report(progress: Progress, *, folder: str, experiment: Experiment) -> None:
    """What is in the folder of a run after a report; pictures of before are not of it."""
    pictures.remove_pictures(folder)
    checkpoints.write_outputs(progress, folder=folder, experiment=experiment)


def train_to_folder(
    experiment: Experiment, optimizer: nn.Optimizer, progress: Progress
) -> Progress:
    """`train`, with what it writes in the folder of --out, if there is one."""
    folder = experiment.options.out
    with np.errstate(all="ignore"):  # a loss that is not finite is an error of its own
        if folder is None:
            return loop.train(experiment, optimizer, progress)
        if len(progress.rows):  # resumed: a shorter run's last report may have been better
            checkpoints.write_model(progress, folder)
        about = checkpoints.fingerprint(experiment)
        write = partial(write_report, folder=folder, experiment=experiment)
        save = partial(checkpoints.write_checkpoint, folder=folder, about=about)
        return loop.train(experiment, optimizer, progress, write, save)


def train_and_test(experiment: Experiment, source: str | None, script: Script) -> str:
    """Train, write, draw; the last line but for its time."""
    options, task = experiment.options, experiment.task
    params = loop.first_params(experiment)
    trained = loop.trained_entries(experiment, params)
    if options.summary:
        print(nn.summary(experiment.net, experiment.data["x_train"].shape[1:]))
    print(describe_data(experiment, source, nn.count_parameters(trained)))
    print(describe_team(experiment.team), flush=True)
    optimizer = choose_optimizer(options, loop.epoch_steps_of(experiment))
    progress = first_progress(experiment, optimizer, params)
    if options.out is not None:
        about = checkpoints.describe_run(experiment, script.name, source)
        checkpoints.check_same_run(options.out, about)
        checkpoints.write_run(options.out, about)
    progress = train_to_folder(experiment, optimizer, progress)
    loss, measured = loop.validate(experiment, progress.best, "test")
    if options.plot is not None:
        draw_run(experiment, progress, script)
    return f"test_{task.name}={measured:.{task.digits}f} test_loss={loss:.{task.digits}f}"


def draw_run(experiment: Experiment, progress: Progress, script: Script) -> None:
    """curves.png, and the script's own pictures."""
    folder, names = experiment.options.picture_folder, loop.columns(experiment)
    pictures.remove_pictures(folder)
    if len(progress.rows):
        rows = [dict(zip(names, row, strict=True)) for row in progress.rows]
        title = format_command(chosen_values(experiment.options), script.name)
        pictures.plot_curves(os.path.join(folder, "curves.png"), {"": rows}, title)
    script.draw(folder, experiment, progress.best)


def compare_runs(options: Options) -> None:
    """compare.png: the curves of the runs of --compare, each called by what is its own."""
    folders = options.compare or ()
    runs = [checkpoints.read_run(folder) for folder in folders]
    metrics = [checkpoints.read_metrics(folder) for folder in folders]
    if len({tuple(rows[0])[:4] for rows in metrics}) > 1:
        raise ValueError("--compare: these runs measured different things")
    labels, title = name_runs(runs)
    if len(set(labels)) < len(labels):  # the same setting twice
        labels = [os.path.normpath(folder) for folder in folders]
    os.makedirs(options.picture_folder, exist_ok=True)
    path = os.path.join(options.picture_folder, pictures.COMPARISON)
    pictures.plot_curves(path, dict(zip(labels, metrics, strict=True)), title)
    print(f"{path}: {len(runs)} runs")


def name_runs(runs: Sequence[checkpoints.Run]) -> tuple[list[str], str]:
    """What each run was called with that the others were not; and what all have in common."""
    scripts = {run.script for run in runs}
    chosen = list(dict.fromkeys(flag for run in runs for flag in run.chosen))
    values = {flag: [run.options.get(flag) for run in runs] for flag in chosen}
    common = {flag: found[0] for flag, found in values.items() if found == [found[0]] * len(runs)}
    labels = []
    for run in runs:
        own = {flag: run.options.get(flag) for flag in chosen if flag not in common}
        labels.append(format_command(own, run.script if len(scripts) > 1 else "") or "default")
    return labels, format_command(common, runs[0].script if len(scripts) == 1 else "")


# ------------------------------------------------------------------------------------------------
# Exit codes
# ------------------------------------------------------------------------------------------------


def main(
    record: type[Chosen],
    build: Callable[[Chosen, int], nn.Layer],
    draw: Draw,
    description: str,
    arguments: Sequence[str] | None = None,
) -> int:
    """A script with these options, this network and these pictures; and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name of any bytes is printed as it is
        sys.stdout.reconfigure(errors="surrogateescape")
    parser = new_parser(record, description, EPILOG)
    options = parse(record, parser, arguments)
    instead = [f"--{name}" for name in INSTEAD if getattr(options, name) is not None]
    if len(instead) > 1:
        parser.error(f"{' and '.join(instead)} exclude each other")
    if options.compare is not None:
        return exit_code(parser.prog, partial(compare_runs, options))
    if options.predict is not None:
        report = partial(report_error, parser.prog)
        return exit_code(parser.prog, partial(print_classes, options, record, build, report))
    if options.export is not None:
        return exit_code(parser.prog, partial(export.export_run, options, record, build))
    work = partial(run, options, Script(parser.prog, build, draw))
    return mpi_exit_code(parser.prog, work) if options.mpi else exit_code(parser.prog, work)


def exit_code(name: str, function: Callable[[], int | None]) -> int:
    """The exit code of a script: a user's mistake is one line, not a traceback."""
    try:
        return function() or 0
    except KeyboardInterrupt as interrupt:
        print(f"\n{name}: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as of `| head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, MemoryError) as error:
        report_error(name, error)
        return 2


def report_error(name: str, error: Exception) -> None:
    """The one line of a mistake."""
    print(f"{name}: error: {reason(error)}", file=sys.stderr)


def reason(error: Exception) -> str:
    """What went wrong, in one line: of a system error its file and its text."""
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    return " ".join(str(error).splitlines()) or "not enough memory"


def mpi_exit_code(name: str, function: Callable[[], int | None]) -> int:
    """`exit_code` on every rank: where one fails, it says so and all end, and none hangs."""
    try:
        last = all_ranks().Dup()  # of its own, where no rank waits for anything else
    except ValueError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    code, rank, errors = 1, last.Get_rank(), io.StringIO()
    with contextlib.redirect_stderr(errors) if rank else contextlib.nullcontext():
        try:
            code = exit_code(f"{name}: rank {rank}" if rank else name, function)
        except BaseException:
            traceback.print_exc()
    if code:
        everyone, deadline = last.Ibarrier(), time.monotonic() + 1
        while not everyone.Test():  # where all failed alike, rank 0 has said why
            if time.monotonic() > deadline:
                print(errors.getvalue(), end="", file=sys.stderr, flush=True)
                last.Abort(code)
            time.sleep(0.01)
    return code
