"""What the options stand for: initializer, loss, optimizer, schedule and augmentation."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import purenn as nn
from training.command_line import check_companions
from training.options import (
    AUGMENTATIONS,
    INITIALIZERS,
    ONE_HOT_LOSSES,
    OPTIMIZERS,
    SCHEDULES,
    VALUE_LOSSES,
    Options,
)

Loss = Callable[..., tuple[float, np.ndarray]]  # (output, target, weights=None)
Measure = Callable[[np.ndarray, np.ndarray], float]
Augmentation = Callable[[nn.Key, np.ndarray], np.ndarray]


class Task(NamedTuple):
    """What is learned, and by what it is judged."""

    outputs: int  # of the network
    loss: Loss
    training_loss: Loss  # the same, with --class-weights
    measure: Measure
    name: str  # of that number
    better: int  # 1 where more of it is better, -1 where less is
    digits: int  # after the point, of what is printed


def mean_error(output: np.ndarray, target: np.ndarray) -> float:
    """The mean absolute error."""
    return nn.mean_absolute_error(output, target)[0]


def one_hot_loss(
    prediction: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    loss: Loss,
    classes: int,
) -> tuple[float, np.ndarray]:
    """A loss that compares with one-hot rows."""
    return loss(prediction, np.eye(classes, dtype=prediction.dtype)[labels], weights=weights)


def weighted_loss(
    output: np.ndarray, labels: np.ndarray, *, loss: Loss, class_weights: np.ndarray
) -> tuple[float, np.ndarray]:
    """Σ w·l / N, where w is the weight of a sample's class, and its gradient.

    A loss of the library is Σ w·l / Σ w. With N the parts of a batch add up to the batch, wherever
    it is cut, and a sample counts the same in every batch.
    """
    weights = class_weights[labels]
    value, doutput = loss(output, labels, weights=weights)
    factor = float(weights.mean())
    return value * factor, doutput * factor


def choose_class_weights(options: Options, counts: np.ndarray) -> np.ndarray:
    """--class-weights, scaled to a mean of 1 over the training images; of each class `counts`.

    Balanced, that is N / (classes · counts). A class without images has no use for its weight.
    """
    given = options.class_weights or ()
    if "balanced" in given:
        weights = 1 / np.maximum(counts, 1)
    elif len(given) == len(counts):
        weights = np.array(given, np.float64)
    else:
        raise ValueError(
            f"--class-weights: got {len(given)} numbers, but there are {len(counts)} classes"
        )
    weights /= weights.max()  # so that their sum is finite
    scaled: np.ndarray = weights * (counts.sum() / (counts @ weights))
    return scaled


def choose_task(options: Options, counts: np.ndarray) -> Task:
    """Classes or values, with the loss of the options; `counts`: training images of each class."""
    if options.task == "sine":
        loss = VALUE_LOSSES[options.loss]
        return Task(1, loss, loss, mean_error, "error", -1, 8)
    loss, classes = nn.hinge, len(counts)
    if options.loss == "cross-entropy":
        loss = partial(nn.softmax_cross_entropy, smoothing=options.smoothing or 0.0)
    elif options.loss in ONE_HOT_LOSSES:
        loss = partial(one_hot_loss, loss=ONE_HOT_LOSSES[options.loss], classes=classes)
    training_loss: Loss = loss
    if options.class_weights is not None:
        weights = choose_class_weights(options, counts)
        training_loss = partial(weighted_loss, loss=loss, class_weights=weights)
    return Task(classes, loss, training_loss, nn.accuracy, "accuracy", 1, 4)


def initializer(options: Options) -> nn.Initializer:
    """The function (key, shape) -> array of --init and --init-std."""
    if options.standard_deviation is not None:
        return nn.normal(options.standard_deviation)
    return INITIALIZERS[options.init]


def decay_factor(options: Options, steps_per_epoch: int) -> float | None:
    """--lr-factor, or that of the schedule; None for a schedule without one."""
    if options.lr_factor is not None or "lr_factor" not in SCHEDULES[options.schedule]:
        return options.lr_factor
    if options.schedule == "exponential":
        steps = max(options.epochs * steps_per_epoch, 1)
        return math.pow(0.01, steps_per_epoch / steps)
    return 0.5 if options.schedule == "plateau" else 0.1


def decay_epochs(options: Options, steps_per_epoch: int) -> tuple[float, ...] | None:
    """--lr-epochs, or those of the schedule; None for a schedule without any."""
    if options.lr_epochs is not None or "lr_epochs" not in SCHEDULES[options.schedule]:
        return options.lr_epochs
    steps = max(options.epochs * steps_per_epoch, 1)
    usual = {
        "step": [max(steps // 3, 1)],
        "multistep": [steps // 2, steps * 3 // 4],
        "cyclic": [2 * steps_per_epoch],
        "plateau": [2 * steps_per_epoch],
    }
    return tuple(step / steps_per_epoch for step in usual[options.schedule])


def choose_schedule(options: Options, lr: float, steps_per_epoch: int) -> nn.Rate:
    """The learning rate by step: a number or a function."""
    name, steps = options.schedule, max(options.epochs * steps_per_epoch, 1)
    factor = decay_factor(options, steps_per_epoch) or 0.0
    first = 0 if options.lr_epochs is None else 1  # an epoch that was given is one step at least
    after = [
        max(round(epochs * steps_per_epoch), first)
        for epochs in decay_epochs(options, steps_per_epoch) or ()
    ]
    if name == "step":
        return nn.step_decay(lr, after[0], factor)
    if name == "multistep":
        return nn.multistep(lr, after, factor)
    if name == "exponential":
        return nn.exponential(lr, factor ** (1 / steps_per_epoch))
    if name == "cosine":
        return nn.cosine(lr, steps)
    if name == "cyclic":
        return nn.cyclic(lr / 10, lr, after[0])
    if name == "one-cycle":
        return nn.one_cycle(lr, steps)
    return lr


def depends_on_epochs(options: Options) -> str:
    """The first option of those whose effect depends on the number of epochs, or ""."""
    depends = {
        "step": options.lr_epochs is None,
        "multistep": options.lr_epochs is None,
        "exponential": options.lr_factor is None,
        "cosine": True,
        "one-cycle": True,
    }
    if depends.get(options.schedule, False):
        return f"--schedule {options.schedule}"
    if options.last_momentum != options.first_momentum:
        return "--final-momentum"
    return ""


def choose_momentum(options: Options, steps_per_epoch: int) -> nn.Rate | None:
    """The momentum by step: a number or a function; None for an optimizer that takes none."""
    momentum, final = options.first_momentum, options.last_momentum
    if momentum is None or final is None or final == momentum:
        return momentum
    if final > momentum:
        raise ValueError(f"--final-momentum {final:g} is above the momentum of {momentum:g}")
    last_quarter = options.epochs * steps_per_epoch * 3 // 4
    return nn.multistep(momentum, [last_quarter], final / momentum)


def choose_optimizer(options: Options, steps_per_epoch: int) -> nn.Optimizer:
    """The optimizer of the options, with its schedule."""
    constructor = OPTIMIZERS[options.optimizer].constructor
    rate = choose_schedule(options, options.learning_rate, steps_per_epoch)
    momentum = choose_momentum(options, steps_per_epoch)
    if momentum is None:
        return constructor(rate, weight_decay=options.weight_decay)
    return constructor(rate, momentum=momentum, weight_decay=options.weight_decay)


def lower_rate(options: Options, state: nn.Tree, loss: float, epoch_steps: int) -> nn.Tree:
    """--schedule plateau: the optimizer's state after a look at the validation images."""
    (wait,) = decay_epochs(options, epoch_steps) or (0.0,)
    patience = max(round(wait * epoch_steps / (options.report_every or epoch_steps)), 1)
    factor = decay_factor(options, epoch_steps) or 0.0
    return nn.reduce_on_plateau(state, loss, factor, patience)


def choose_augmentation(options: Options) -> Augmentation | None:
    """The function (key, images) -> images of --augment, or None without it."""
    if options.augment is None:
        return None
    amounts: dict[str, Any] = {**dict.fromkeys(AUGMENTATIONS, 0.0), **dict(options.augment)}
    augment = partial(nn.augment, **amounts) if options.augment else nn.augment
    return partial(augment_centered, augment=augment) if options.center else augment


def augment_centered(key: nn.Key, images: np.ndarray, *, augment: Augmentation) -> np.ndarray:
    """Augmentation of pixels from -0.5 to 0.5: what comes in from outside is black here too."""
    augmented = augment(key, images + np.float32(0.5))
    augmented -= np.float32(0.5)
    return augmented


def check_options(options: Options) -> None:
    """ValueError for options that contradict each other, before anything is done."""
    check_companions(options)
    if options.task == "sine" and options.loss not in VALUE_LOSSES:
        raise ValueError(f"--task sine takes --loss mse, mae or huber, not {options.loss}")
    if options.schedule != "multistep" and len(options.lr_epochs or (1,)) != 1:
        raise ValueError(f"--schedule {options.schedule} takes one number of --lr-epochs")
    if "balanced" in (weights := options.class_weights or ()) and len(weights) > 1:
        raise ValueError("--class-weights takes balanced, or one number for each class")
    if options.resume and options.out is None:
        raise ValueError("--resume needs --out")
    if options.checkpoint_every and options.out is None:
        raise ValueError("--checkpoint-every needs --out")
    augment = choose_augmentation(options)
    if augment:
        augment(0, np.zeros((1, 1, 2, 2), np.float32))  # refuses amounts that make no sense
    choose_optimizer(options, 1)  # refuses what does not go together there
