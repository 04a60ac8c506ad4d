"""The training loop: from params to the best params, step by step."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import purenn as nn
from training.choices import Loss, Task, choose_augmentation, lower_rate
from training.datasets import Dataset
from training.options import Options
from training.prediction import first_not_finite, predict
from training.team import Team, add_ranks, any_rank, map_own, own_cores
from training.terminal import ProgressLine
from training.threads import describe_threads


class Experiment(NamedTuple):
    """What does not change while a network is trained."""

    options: Options
    data: Dataset
    task: Task
    net: nn.Layer
    team: Team = Team()


class Progress(NamedTuple):
    """What changes while a network is trained: all that a checkpoint has to hold.

    A field that is added later needs a default: checkpoints that lack it can then be resumed, and
    it starts as `begin` has it.
    """

    params: nn.Tree
    state: nn.Tree  # of the optimizer
    best: nn.Tree  # the params that are kept
    best_score: np.ndarray  # ()
    step: np.ndarray  # (): how many were taken
    sums: np.ndarray  # (3,): loss, accuracy or error, number of the images since the last report
    rows: np.ndarray  # (reports, columns)


# ------------------------------------------------------------------------------------------------
# Before the first step
# ------------------------------------------------------------------------------------------------


def start_from(
    path: str,
    names: Collection[str],
    layers: Iterable[tuple[str, nn.Tree]],
    anew: Sequence[str] = (),
) -> nn.Tree:
    """The params of a file, which must fit the layers of these names, (name, params) of each.

    Those of `anew` that do not fit are as in `layers`. The first other one that does not is refused
    before the next one is asked for: it might take more memory than the file could justify.
    """
    loaded = nn.load(path)
    for entry, array in nn.tree_flatten(loaded).items():
        if array.dtype.char not in "fd":
            raise ValueError(f"{path}: {entry} is {array.dtype}, expected float32 or float64")
    unknown = sorted(loaded.keys() - set(names))
    if unknown:
        raise ValueError(f"{path}: this network has no layer {' or '.join(unknown)}")
    started = {}
    for name, own in layers:
        expected, found = (
            {entry: array.shape for entry, array in nn.tree_flatten({name: tree}).items()}
            for tree in (own, loaded.get(name, {}))
        )
        if found != expected and name not in anew:
            raise ValueError(
                f"{path}: {name} has {found or 'nothing'}, but this network needs {expected}"
            )
        if own:
            started[name] = loaded[name] if found == expected else own
    return started


def first_params(experiment: Experiment) -> nn.Tree:
    """The params to begin with: --init, or --init-from."""
    options, net = experiment.options, experiment.net
    params, _ = net.init((options.seed, 0), experiment.data["x_train"].shape[1:])
    only = options.train_only or ()
    for name in only:
        if name not in params:
            raise ValueError(
                f"--train-only: {name} is not a layer with parameters, as {', '.join(params)} are"
            )
    if options.init_from is not None:
        params = start_from(options.init_from, params, params.items(), only)
    return params


def trained_entries(experiment: Experiment, params: nn.Tree) -> nn.Tree:
    """The gradients of a first batch: which entries of params are trained, and their sizes."""
    data, only = experiment.data, experiment.options.train_only
    x, y = data["x_train"][:2], data["y_train"][:2]
    gradients = nn.value_and_grad(experiment.net, experiment.task.loss)
    _, grads, _ = gradients(nn.training(params, 0), x, y)
    return {name: entries for name, entries in grads.items() if only is None or name in only}


def columns(experiment: Experiment) -> list[str]:
    """The names of what a report says."""
    names = ["loss", experiment.task.name]
    if len(experiment.data["x_validation"]):
        names += [f"validation_{name}" for name in names]
    return ["epoch", "step", *names]


def begin(experiment: Experiment, optimizer: nn.Optimizer, params: nn.Tree) -> Progress:
    """The progress before the first step."""
    rows = np.zeros((0, len(columns(experiment))))
    state = optimizer.init(params)
    return Progress(params, state, params, np.array(-math.inf), np.array(0), np.zeros(3), rows)


# ------------------------------------------------------------------------------------------------
# A step
# ------------------------------------------------------------------------------------------------


def count_steps(count: int, batch_size: int) -> int:
    """How many steps an epoch has.

    A single image that is left over at its end is left out: batch norm cannot train on one.
    """
    full, left = divmod(count, min(batch_size, count))
    return full + (left > 1)


def epoch_steps_of(experiment: Experiment) -> int:
    """How many steps an epoch of this experiment has."""
    return count_steps(len(experiment.data["x_train"]), experiment.options.batch_size)


def step_images(count: int, options: Options, done: int = 0) -> Iterator[np.ndarray]:
    """The numbers of the images of every step that is left of the training, after `done` steps."""
    epoch_steps = count_steps(count, options.batch_size)
    for epoch in range(done // epoch_steps, options.epochs):
        indices = nn.batches(count, options.batch_size, (options.seed, 1, epoch + 1))
        first = max(done - epoch * epoch_steps, 0)
        yield from itertools.islice(indices, first, epoch_steps)


def in_training(params: nn.Tree, key: nn.Key, only: Sequence[str] | None) -> nn.Tree:
    """params in training mode; with `only`, these layers alone, and the others as at inference."""
    if only is None:
        return nn.training(params, key)
    keys = {name: nn.fold_key(key, index) for index, name in enumerate(only)}
    return {**params, **{name: nn.training(params[name], keys[name]) for name in only}}


def scaled_loss(
    output: np.ndarray, target: np.ndarray, *, loss: Loss, factor: int
) -> tuple[float, np.ndarray]:
    """A loss whose gradient is multiplied, but not its value: for --reduction sum."""
    value, doutput = loss(output, target)
    return value, doutput * factor


def shard_gradients(
    params: nn.Tree,
    batch: np.ndarray,
    target: np.ndarray,
    *,
    experiment: Experiment,
    step: int,
    images: int,
) -> tuple[float, nn.Tree, nn.Tree]:
    """(loss, grads, cache) of one shard of a step with so many images, for `data_parallel`.

    The cache has the accuracy or error among its statistics, as "measured".
    """
    options, _, task, net, _ = experiment
    key, only = params["key"], options.train_only
    augment = choose_augmentation(options)
    if augment:
        batch = augment(nn.fold_key(key, 2**32 - 1), batch)  # no layer has this number
    params = in_training({name: params[name] for name in params if name != "key"}, key, only)
    loss_of = task.training_loss
    if options.reduction == "sum":
        loss_of = partial(scaled_loss, loss=loss_of, factor=images)
    observed = nn.sequential(net=net, output=nn.identity())  # whose cache holds the output
    loss, grads, cache = nn.value_and_grad(observed, loss_of)({"net": params}, batch, target)
    if not math.isfinite(loss):
        where = first_not_finite(net, params, batch)
        raise ValueError(f"the loss became {loss} in step {step}: {where}; try a lower --lr")
    trained = {name: grads["net"][name] for name in only or grads["net"]}
    measured = {"measured": np.array(task.measure(cache["output"], target))}
    return loss, trained, {**cache["net"], "statistics": measured}


def clip(grads: nn.Tree, options: Options, step: int) -> nn.Tree:
    """The gradients of a step with the global norm of --clip, where theirs is larger."""
    if options.clip is None:
        return grads
    try:
        return nn.clip_gradients(grads, options.clip)
    except ValueError as error:
        raise ValueError(f"step {step}: {error}; try a lower --lr") from None


def take_step(
    experiment: Experiment, optimizer: nn.Optimizer, progress: Progress, index: np.ndarray
) -> Progress:
    """The progress after one more step, with the images of these numbers."""
    options, data, _, _, team = experiment
    step = int(progress.step)
    gradients: Callable[..., Any] = partial(
        shard_gradients, experiment=experiment, step=step, images=len(index)
    )
    if team.shards > 1:
        shards = max(1, min(team.shards, len(index) // 2))  # batch norm cannot train on one image
        gradients = nn.data_parallel(gradients, shards, partial(map_own, team=team))
    params = nn.training(progress.params, (options.seed, 2, step))
    loss, grads, cache = gradients(params, data["x_train"][index], data["y_train"][index])
    total = add_ranks(team, {"loss": np.array(loss), "grads": grads, "cache": cache})
    loss, grads, cache = total.values()
    grads = clip(grads, options, step)
    params, state = optimizer.step(progress.params, grads, progress.state)
    measured = np.array([loss, cache["statistics"]["measured"], 1]) * len(index)
    trained = {name: part for name, part in cache.items() if name in grads}  # not what is frozen
    return progress._replace(
        params=nn.update_statistics(params, trained),
        state=state,
        step=progress.step + 1,
        sums=progress.sums + measured,
    )


# ------------------------------------------------------------------------------------------------
# Reports
# ------------------------------------------------------------------------------------------------


def validate(experiment: Experiment, params: nn.Tree, part: str) -> tuple[float, float]:
    """(loss, accuracy or error) at inference, on the part "validation" or "test" of the data."""
    data, task = experiment.data, experiment.task
    output = predict(experiment.net, params, data[f"x_{part}"], experiment.team)
    return task.loss(output, data[f"y_{part}"])[0], task.measure(output, data[f"y_{part}"])


def add_report(experiment: Experiment, progress: Progress) -> Progress:
    """The progress with one more row, and with the best params so far."""
    options, data, task, _, _ = experiment
    epoch_steps = epoch_steps_of(experiment)
    step = int(progress.step)
    row = [(step - 1) // epoch_steps + 1, step, *(progress.sums[:2] / progress.sums[2])]
    score = float(step)
    if len(data["x_validation"]):
        row += validate(experiment, progress.params, "validation")
        score = task.better * row[-1]
        if options.schedule == "plateau":
            state = lower_rate(options, progress.state, row[-2], epoch_steps)
            progress = progress._replace(state=state)
    if score > progress.best_score:
        progress = progress._replace(best=progress.params, best_score=np.array(score))
    return progress._replace(sums=np.zeros(3), rows=np.vstack([progress.rows, row]))


def has_stalled(experiment: Experiment, progress: Progress) -> bool:
    """Whether the best report is as old as --patience allows."""
    patience, rows = experiment.options.patience, progress.rows
    if patience is None or not len(rows):
        return False
    best = (experiment.task.better * rows[:, -1] == progress.best_score).argmax()  # the first one
    return bool(rows[-1, 1] - rows[best, 1] >= patience * epoch_steps_of(experiment))


def describe_stall(experiment: Experiment, progress: Progress) -> str:
    """Why a training ends before its last epoch."""
    epochs = experiment.options.patience or 0
    return (
        f"no better validation {experiment.task.name} for {epochs} epoch{'s' * (epochs > 1)}"
        f" (--patience): stopped after epoch {progress.rows[-1, 0]:.0f} of"
        f" {experiment.options.epochs}"
    )


def format_report(row: dict[str, float], experiment: Experiment) -> str:
    """What is printed of a report."""
    epoch, _, *names = row
    numbers = [f"{n.replace('_', ' ')} {row[n]:.{experiment.task.digits}f}" for n in names]
    return "  ".join([f"epoch {row[epoch]:.0f}/{experiment.options.epochs}", *numbers])


def check_finite(progress: Progress) -> None:
    """ValueError for params that are not finite: such ones are never kept."""
    for name, array in nn.tree_flatten(progress.params).items():
        if not np.isfinite(array).all():
            raise ValueError(
                f"{name} is not finite after step {progress.step}, so its gradient was not;"
                " try a lower --lr"
            )


class Pace:
    """How long steps take, compared with the first ones."""

    def __init__(self) -> None:
        self.recent: list[float] = []
        self.spent = 0.0  # seconds, on these steps
        self.first = 0.0  # the median of the first ones

    def slowdown(self, seconds: float) -> float:
        """After a step of so many seconds: by which factor the last ones were slower, every 3 s.

        In between it is 0. Medians of at least 5 steps: a single pause is no slowdown.
        """
        self.recent.append(seconds)
        self.spent += seconds
        if self.spent < 3 or len(self.recent) < 5:
            return 0.0
        median = statistics.median(self.recent)
        self.first = self.first or median
        self.recent, self.spent = [], 0.0
        return median / self.first


class Display:
    """What is printed of a training: a line for every report, and one that moves in between."""

    def __init__(self, experiment: Experiment, done: int) -> None:
        self.experiment = experiment
        self.line = ProgressLine()
        self.first = done
        self.started = self.since = time.monotonic()
        self.seen = 0
        several = describe_threads() != "1" and own_cores(None) > 1  # threads of BLAS
        self.pace: Pace | None = Pace() if several else None

    def speed(self) -> str:
        """Samples a second since the last report."""
        return f"{self.seen / max(time.monotonic() - self.since, 1e-9):,.0f} samples/s"

    def count_step(self, images: int, seconds: float) -> None:
        """Count a step; and say, once, where threads of BLAS wait for each other."""
        self.seen += images
        if self.pace is None:
            return
        slowdown = self.pace.slowdown(seconds)
        if slowdown > 5:
            self.pace = None
            self.line.end(
                f"steps take {slowdown:.0f} times as long as the first ones did: with other work on"
                " this machine, threads of BLAS wait for each other; OPENBLAS_NUM_THREADS=1 in the"
                " environment, or --workers 1, limits them"
            )

    def report(self, progress: Progress) -> Progress:
        """`add_report`, whose time does not count, and its line."""
        speed = self.speed()
        progress = add_report(self.experiment, progress)
        row = dict(zip(columns(self.experiment), progress.rows[-1].tolist(), strict=True))
        self.line.end(f"{format_report(row, self.experiment)}  {speed}")
        self.seen, self.since = 0, time.monotonic()
        return progress

    def move(self, progress: Progress, total_steps: int) -> None:
        """The line that moves: where it is, how fast, and how long it will take."""
        if not self.line.is_due():
            return
        step, loss = int(progress.step), float(progress.sums[0] / progress.sums[2])
        epoch = (step - 1) // epoch_steps_of(self.experiment) + 1
        a_step = (time.monotonic() - self.started) / (step - self.first)
        text = format_report({"epoch": epoch, "step": step, "loss": loss}, self.experiment)
        self.line.show(f"{text}  {self.speed()}  {a_step * (total_steps - step):.0f} s left")


# ------------------------------------------------------------------------------------------------
# All steps
# ------------------------------------------------------------------------------------------------


class Stop:
    """While this is entered, Ctrl-C asks for a stop after the step; the second one is at once."""

    def __init__(self) -> None:
        self.asked = False
        self.before: Any = None

    def __enter__(self) -> Stop:
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as behind nohup
            with contextlib.suppress(ValueError):  # only the main thread may
                self.before = signal.signal(signal.SIGINT, self.ask)
        return self

    def ask(self, *_: object) -> None:
        """What Ctrl-C does."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)


def interrupt(experiment: Experiment, step: int, total_steps: int) -> None:
    """KeyboardInterrupt, with a word on how to go on."""
    if experiment.team.communicator:
        experiment.team.communicator.Barrier()  # no rank ends before the checkpoint is written
    then = "with --out it could be resumed"
    if experiment.options.out:
        then = "the same command with --resume goes on from there"
    raise KeyboardInterrupt(f"interrupted after step {step} of {total_steps}; {then}")


def ignore(progress: Progress) -> None:
    """Write nothing."""


def train(
    experiment: Experiment,
    optimizer: nn.Optimizer,
    progress: Progress,
    write: Callable[[Progress], None] = ignore,
    save: Callable[[Progress], None] = ignore,
) -> Progress:
    """Train to the end; `write` what was reported, and `save` the progress, as often as asked."""
    options = experiment.options
    epoch_steps = epoch_steps_of(experiment)
    report_steps = options.report_every or epoch_steps
    checkpoint_steps = options.checkpoint_every or epoch_steps
    total_steps, done = options.epochs * epoch_steps, int(progress.step)
    display = Display(experiment, done)
    with Stop() as stop:
        for index in step_images(len(experiment.data["x_train"]), options, done):
            if has_stalled(experiment, progress):
                display.line.end(describe_stall(experiment, progress))
                break
            began = time.monotonic()
            progress = take_step(experiment, optimizer, progress, index)
            display.count_step(len(index), time.monotonic() - began)
            stops = any_rank(experiment.team, stop.asked)
            step = int(progress.step)
            reports = step % report_steps == 0
            saves = step % epoch_steps == 0 or step % checkpoint_steps == 0 or stops
            if reports or saves:
                check_finite(progress)
            if reports:
                progress = display.report(progress)
                write(progress)
            else:
                display.move(progress, total_steps)
            if saves:
                save(progress)
            if stops:
                display.line.end()
                interrupt(experiment, step, total_steps)
    if progress.sums[2]:  # the last report; no checkpoint has it, for a longer run would not
        progress = display.report(progress)
        write(progress)
    return progress
