"""Run folders: the model, the metrics, what the run was (run.json), and the checkpoint."""

from __future__ import annotations

import contextlib
import csv
import glob
import hashlib
import io
import json
import math
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

import purenn as nn
from training.choices import decay_epochs, decay_factor, depends_on_epochs
from training.command_line import (
    all_values,
    chosen_values,
    flag_of,
    options_of,
    with_defaults,
)
from training.files import one_line, open_text
from training.loop import Experiment, Progress, columns, epoch_steps_of
from training.options import Options
from training.team import Team

OUTPUTS = ("model.npz", "run.json", "metrics.csv", "checkpoint.npz")  # in --out
CHANGEABLE = ("--epochs", "--patience", "--shards")  # when a training is resumed
FORMAT = 1  # of run.json and checkpoint.npz: another number where older ones would be misread


# ------------------------------------------------------------------------------------------------
# The folder
# ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock_folder(folder: str) -> Iterator[None]:
    """While this is entered, no other run writes into the folder: there it is a ValueError.

    The system lets go of the lock when the process ends, however it ends. What a killed run left
    half written is removed.
    """
    with open(os.path.join(folder, "lock"), "ab") as file:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{folder}: another run is writing into this folder") from None
        for name in OUTPUTS:
            for left in glob.glob(os.path.join(glob.escape(folder), f"{name}.*.tmp")):
                os.remove(left)
        yield


def holds_run(folder: str) -> bool:
    """Whether there is a run in a folder, or what is left of one."""
    return any(os.path.exists(os.path.join(folder, name)) for name in OUTPUTS)


def check_unused(folder: str) -> None:
    """ValueError for a folder that holds a run."""
    if holds_run(folder):
        raise ValueError(
            f"{folder}: this folder holds a run; continue it with --resume, or choose another"
            " folder for --out"
        )


def write_model(progress: Progress, folder: str) -> None:
    """Write model.npz."""
    nn.save(os.path.join(folder, "model.npz"), progress.best)


def write_outputs(progress: Progress, *, folder: str, experiment: Experiment) -> None:
    """Write metrics.csv, and model.npz if the last report is of the best params."""
    if progress.best is progress.params:
        write_model(progress, folder)
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(columns(experiment))
    for epoch, step, *numbers in progress.rows.tolist():
        writer.writerow([int(epoch), int(step), *numbers])
    with nn.replacing(os.path.join(folder, "metrics.csv")) as file:
        file.write(table.getvalue().encode())


# ------------------------------------------------------------------------------------------------
# run.json: what is needed to understand a run, and to use its network
# ------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What run.json says; None where a task has no classes or pixels.

    A field that is added later needs a default, for the older files that lack it.
    """

    format: int
    script: str
    options: dict[str, Any]  # {"--batch-size": 128, ...}: the values that were used
    chosen: list[str]  # the flags that distinguish it and were not at their defaults
    classes: list[str] | None
    sample_shape: list[int]
    pixel_range: list[float] | None  # what black and white became
    versions: dict[str, str]
    feature_mean: list[float] | None = None  # features became (x - mean) / std
    feature_std: list[float] | None = None


def used_values(experiment: Experiment, source: str | None) -> dict[str, Any]:
    """{"--batch-size": 128, ...}: the values that were used, those of defaults as well.

    Not those about where the outputs go, which may be others when it is resumed.
    """
    options, data, team = experiment.options, experiment.data, experiment.team
    epoch_steps = epoch_steps_of(experiment)
    used = replace(
        options.resolved(),
        data=source,
        validation=len(data["x_validation"]),
        train_size=len(data["x_train"]),
        test_size=len(data["x_test"]),
        lr_factor=decay_factor(options, epoch_steps),
        lr_epochs=decay_epochs(options, epoch_steps),
        report_every=options.report_every or epoch_steps,
        shards=team.shards,
        workers=team.workers,
    )
    values, known = all_values(used), options_of(options).items()
    flags = [flag_of(name) for name, about in known if about.group != "output"]
    return {flag: values[flag] for flag in flags}


def describe_run(experiment: Experiment, script: str, source: str | None) -> Run:
    """What run.json says of an experiment."""
    options, data = experiment.options, experiment.data
    classes, mean, std = (
        data[name].tolist() if name in data else None
        for name in ("classes", "feature_mean", "feature_std")
    )
    black = -0.5 if options.center else 0.0
    versions = {
        "purenn": nn.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    return Run(
        FORMAT,
        script,
        used_values(experiment, source),
        list(chosen_values(options)),
        classes,
        list(data["x_train"].shape[1:]),
        [black, black + 1] if classes and not mean else None,
        versions,
        mean,
        std,
    )


def write_run(folder: str, run: Run) -> None:
    """Write run.json."""
    with nn.replacing(os.path.join(folder, "run.json")) as file:
        file.write(json.dumps(run._asdict(), indent=1).encode())


def check_values(before: dict[str, Any], after: dict[str, Any]) -> None:
    """ValueError if options had other values than now."""
    for flag in [*(flag for flag in before if flag not in after), *after]:
        old, new = before.get(flag), after.get(flag)
        if old != new:
            texts = [json.dumps(value) if value is not None else "default" for value in (old, new)]
            raise ValueError(
                f"it belongs to a different run: {flag} {texts[0]} then, {texts[1]} now"
            )


@contextlib.contextmanager
def blame_outputs(path: str) -> Iterator[None]:
    """ValueError, with the path, for what --out cannot have written."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: is not what --out writes: {one_line(error)}") from None


def check_format(found: Any) -> None:
    """ValueError for a format that is not this version's."""
    if found is None:
        raise ValueError("it has no format version: an older version of purenn wrote it")
    if found != FORMAT:
        raise ValueError(f"its format version is {found}, this version of purenn reads {FORMAT}")


def check_fields(found: dict[str, Any], expected: type[Run] | type[Progress]) -> None:
    """ValueError where a field is missing: all but those that were added later, with a default."""
    for name in expected._fields:
        if name not in found and name not in expected._field_defaults:
            raise ValueError(f"it has no {name}")


def check_kinds(run: Run) -> None:
    """ValueError where a field is of another kind than `describe_run` gives it."""
    kinds = {"script": str, "options": dict, "chosen": list, "sample_shape": list, "versions": dict}
    for name, kind in kinds.items():
        if not isinstance(getattr(run, name), kind):
            raise ValueError(f"{name} is no {kind.__name__}")
    if not run.options.keys() >= set(run.chosen):
        raise ValueError("the options that were chosen are not among the options")


def read_run(folder: str) -> Run:
    """What run.json in a folder says."""
    path = os.path.join(folder, "run.json")
    with blame_outputs(path):
        with open_text(path) as file:
            found = json.load(file)
        check_format(found.get("format"))
        check_fields(found, Run)
        run = Run(**{name: found[name] for name in Run._fields if name in found})
        check_kinds(run)
    return run


def check_script(folder: str, options: Options) -> None:
    """ValueError if the run in a folder is one of another script, which has other options."""
    if not os.path.exists(os.path.join(folder, "run.json")):
        return
    run = read_run(folder)
    unknown = sorted(run.options.keys() - all_values(options).keys())
    if unknown:
        raise ValueError(
            f"{folder}: cannot be resumed: it is a run of {run.script}, and this script has no"
            f" {', '.join(unknown)}"
        )


def check_same_run(folder: str, run: Run) -> None:
    """ValueError if the folder holds another run than this one, which has left no checkpoint."""
    if not os.path.exists(os.path.join(folder, "run.json")):
        return
    then = read_run(folder)
    flags = dict.fromkeys([*then.chosen, *run.chosen])
    before, after = (
        {flag: own.options.get(flag) for flag in flags if flag not in CHANGEABLE}
        for own in (then, run)
    )
    try:
        check_values(before, after)
    except ValueError as error:
        raise ValueError(f"{folder}: cannot be resumed: {one_line(error)}") from None


def read_metrics(folder: str) -> list[dict[str, float]]:
    """The rows of metrics.csv in a folder, {column: number}."""
    path = os.path.join(folder, "metrics.csv")
    with blame_outputs(path):
        with open_text(path) as file:
            rows = [
                {name: float(value) for name, value in row.items()} for row in csv.DictReader(file)
            ]
        names = list(rows[0]) if rows else []
        if (
            names[:3] != ["epoch", "step", "loss"]
            or names[3:4] not in (["accuracy"], ["error"])
            or names[4:] not in ([], [f"validation_{name}" for name in names[2:4]])
        ):
            raise ValueError("there are no steps and losses in it")
        if any(1e100 < abs(value) < math.inf for row in rows for value in row.values()):
            raise ValueError("there are numbers in it that cannot be drawn")
    return rows


# ------------------------------------------------------------------------------------------------
# checkpoint.npz
# ------------------------------------------------------------------------------------------------


def fixed_values(options: Options, team: Team) -> dict[str, Any]:
    """{"--batch-size": 128, ...}: the values that a training cannot be resumed without."""
    values = all_values(replace(options.resolved(), shards=team.shards))
    flags = [flag_of(name) for name, about in options_of(options).items() if not about.resumes]
    return {flag: values[flag] for flag in flags}


def fingerprint(experiment: Experiment) -> dict[str, Any]:
    """What a training must share with a checkpoint to go on from it: options and data."""
    digest = hashlib.sha256()
    for name in ("x_train", "y_train", "x_validation", "y_validation"):
        digest.update(np.ascontiguousarray(experiment.data[name]).data)
    options = fixed_values(experiment.options, experiment.team)
    return {"format": FORMAT, "options": options, "data": digest.hexdigest()}


def complete(then: dict[str, Any], experiment: Experiment) -> dict[str, Any]:
    """A fingerprint in which every option has a value: one that it lacks had its default."""
    options, team = experiment.options, experiment.team
    missing = fixed_values(options, team).keys() - then["options"].keys()
    assumed = fixed_values(with_defaults(options, missing), team)
    return {**then, "options": {**assumed, **then["options"]}}


def check_fingerprint(then: dict[str, Any], now: dict[str, Any]) -> None:
    """ValueError if something is of other options or data than this."""
    check_values(then["options"], now["options"])
    if then["data"] != now["data"]:
        raise ValueError("it belongs to a different run: the data differ")


def write_checkpoint(progress: Progress, *, folder: str, about: dict[str, Any]) -> None:
    """Write checkpoint.npz, of a training with this fingerprint."""
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    nn.save(os.path.join(folder, "checkpoint.npz"), {**progress._asdict(), "about": text})


def read_about(tree: nn.Tree, experiment: Experiment) -> dict[str, Any]:
    """The fingerprint that a checkpoint is of, taken out of its tree."""
    about = json.loads(tree.pop("about").tobytes()) if "about" in tree else {}
    check_format(about.get("format"))
    return complete(about, experiment)


def describe_changes(then: dict[str, Any], experiment: Experiment) -> list[str]:
    """What is allowed to change when a training is resumed, and makes what follows differ."""
    options, shards = experiment.options, experiment.team.shards
    before, lines = then["options"], []
    if before["--shards"] != shards:
        lines.append(
            f"written with {before['--shards']} shards a batch, so what follows will differ"
        )
    depends = depends_on_epochs(options)
    if before["--epochs"] != options.epochs and depends:
        lines.append(
            f"{depends} depends on the number of epochs, {before['--epochs']} until here and"
            f" {options.epochs} from here on, so this differs from one run of {options.epochs}"
        )
    return lines


def check_entries(resumed: Progress, progress: Progress) -> None:
    """ValueError where an entry of this network or optimizer is missing or another one."""
    found = entry_kinds(resumed)
    for name, kind in entry_kinds(progress).items():  # --schedule plateau adds some of its own
        if found.get(name) != kind:
            raise ValueError(f"{name} is {found.get(name)}, expected {kind}")


def entry_kinds(progress: Progress) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{entry: (dtype, shape)} of all that a checkpoint holds, whatever the number of reports."""
    flat = nn.tree_flatten(progress._replace(rows=progress.rows[:0])._asdict())
    return {name: (str(np.asarray(leaf).dtype), np.shape(leaf)) for name, leaf in flat.items()}


def as_progress(tree: nn.Tree, start: Progress) -> Progress:
    """The progress in the tree of a checkpoint; fields that it may lack are as in `start`."""
    check_fields(tree, Progress)
    for name in tree:
        if name not in Progress._fields:
            raise ValueError(f"it has {name}, which this version of purenn does not know")
    return start._replace(**tree)


def read_checkpoint(experiment: Experiment, progress: Progress) -> Progress:
    """The progress in checkpoint.npz; the one that is given where there is no such file.

    ValueError for a file that is damaged, or of a training with other options or data.
    """
    options = experiment.options
    path = os.path.join(options.out or "", "checkpoint.npz")
    if not os.path.exists(path):
        return progress
    tree = nn.load(path)
    try:
        then = read_about(tree, experiment)
        now = fingerprint(experiment)
        changeable = {flag: now["options"][flag] for flag in CHANGEABLE}
        check_fingerprint({**then, "options": {**then["options"], **changeable}}, now)
        resumed = as_progress(tree, progress)
        check_entries(resumed, progress)
        total = options.epochs * epoch_steps_of(experiment)
        if not 0 <= resumed.step <= total:
            raise ValueError(
                f"it is of step {resumed.step}, but --epochs {options.epochs} has {total} steps"
            )
    except Exception as error:
        raise ValueError(f"{path}: cannot be resumed: {one_line(error)}") from None
    for line in describe_changes(then, experiment):
        print(f"{path}: {line}")
    return resumed
