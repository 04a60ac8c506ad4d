"""The options of the scripts: what can be chosen by name, and one frozen record with all defaults.

A new option is one more field here (or in a script's own subclass), and the code that uses it.
None stands for a default that depends on something else; the properties resolve those that depend
on other options.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import purenn as nn
from training.command_line import (
    count,
    count_or_zero,
    fraction,
    not_negative,
    option,
    positive,
)


class OptimizerChoice(NamedTuple):
    """An optimizer and its defaults."""

    constructor: Callable[..., nn.Optimizer]
    lr: float
    momentum: float | None  # None: it takes none


ACTIVATIONS: dict[str, Callable[[], nn.Layer]] = {
    "relu": nn.relu,
    "leaky-relu": nn.leaky_relu,
    "elu": nn.elu,
    "sigmoid": nn.sigmoid,
    "tanh": nn.tanh,
    "softplus": nn.softplus,
    "gelu": nn.gelu,
    "silu": nn.silu,
}
INIT_STD = 0.02
INITIALIZERS: dict[str, nn.Initializer] = {
    "he-normal": nn.he_normal,
    "he-uniform": nn.he_uniform,
    "xavier-normal": nn.xavier_normal,
    "xavier-uniform": nn.xavier_uniform,
    "orthogonal": nn.orthogonal,
    "normal": nn.normal(INIT_STD),  # or --init-std
    "zeros": nn.zeros,
}
OPTIMIZERS = {
    "sgd": OptimizerChoice(nn.sgd, 0.05, 0.9),
    "adam": OptimizerChoice(nn.adam, 0.002, None),
    "adamw": OptimizerChoice(nn.adamw, 0.002, None),
    "rmsprop": OptimizerChoice(nn.rmsprop, 0.001, 0.0),
    "adagrad": OptimizerChoice(nn.adagrad, 0.02, None),
    "adadelta": OptimizerChoice(nn.adadelta, 1.0, None),
}
VALUE_LOSSES: dict[str, Callable[..., Any]] = {
    "mse": nn.mean_squared_error,
    "mae": nn.mean_absolute_error,
    "huber": nn.huber,
}
ONE_HOT_LOSSES = {**VALUE_LOSSES, "bce": nn.binary_cross_entropy}  # with classes: of one-hot rows
SCHEDULES: dict[str, tuple[str, ...]] = {  # name: which of --lr-factor and --lr-epochs it takes
    "constant": (),
    "step": ("lr_factor", "lr_epochs"),
    "multistep": ("lr_factor", "lr_epochs"),
    "exponential": ("lr_factor",),
    "cosine": (),
    "cyclic": ("lr_epochs",),
    "one-cycle": (),
    "plateau": ("lr_factor", "lr_epochs"),
}
AUGMENTATIONS = ("shift", "rotation", "scale", "stretch", "elastic")
SINE: dict[str, Any] = {  # the defaults of --task sine, where they are not those of classes
    "hidden": (50, 50, 50),
    "activation": "gelu",
    "init": "xavier-uniform",
    "batch_norm": False,
    "dropout": 0.0,
    "loss": "mse",
    "epochs": 900,
    "batch_size": 64,
    "lr": 0.004,
    "schedule": "exponential",
    "report_every": 2_565,  # 45 epochs
}


def augmentation(text: str) -> tuple[str, float]:
    """One KIND=AMOUNT of --augment."""
    kind, _, amount = text.partition("=")
    if kind not in AUGMENTATIONS or not amount:
        raise ArgumentTypeError(
            f"expected KIND=AMOUNT with a kind of {', '.join(AUGMENTATIONS)}, got {text!r}"
        )
    try:
        return kind, not_negative(amount)
    except ValueError:
        raise ArgumentTypeError(f"the amount of {kind} is not a number: {amount!r}") from None


def class_weight(text: str) -> float | str:
    """One value of --class-weights: "balanced", or a number above 0."""
    try:
        return text if text == "balanced" else positive(text)
    except ValueError:
        raise ArgumentTypeError(f"expected balanced or numbers, got {text}") from None


data_option = partial(option, group="data")
training_option = partial(option, group="training")
parallel_option = partial(option, group="cores and machines", distinguishes=False, resumes=True)
output_option = partial(option, group="output", distinguishes=False, resumes=True)
network_option = partial(option, group="network")


@dataclass(frozen=True)
class Options:
    """The options of every training script, with their defaults."""

    default_shards: ClassVar[int] = 1  # of a script; with --mpi one for each worker of each rank
    needs_images: ClassVar[bool] = False  # a script that cannot take features (N, F)
    task: str = "classes"  # or "sine", in a script that offers it

    data: str | None = data_option(
        "folder with MNIST-style IDX files (.gz or not), with an .npz or with a sub-folder of"
        " images for each class (in train/, val/ and test/ or by themselves; needs Pillow), or the"
        " .npz itself: x_train and y_train, or x and y, and if there are any x_val, y_val, x_test"
        " and y_test, of images or of features (N, F); 'builtin' for synthetic digits (default:"
        " data/mnist, downloaded into it if it is not there; without a network synthetic digits)",
        metavar="DIR",
        only_with=("task", ["classes"]),
        distinguishes=False,
        resumes=True,  # a checkpoint knows the data by their hash
    )
    validation: int | None = data_option(
        "use N of the validation images to choose the best epoch, always the same ones, or where"
        " there are none hold out N of the training images; 0 keeps the last epoch (default: all,"
        " or a tenth of the training images, at most 5,000)",
        metavar="N",
        type=count_or_zero,
    )
    train_size: int | None = data_option(
        "train on N of the images that are not held out, chosen by the seed (default: all)",
        metavar="N",
        type=count,
    )
    test_size: int | None = data_option(
        "test on N of the test images, always the same ones, or where there are none on N of the"
        " training images, which are not trained on (default: all, or a fifth of the training"
        " images)",
        metavar="N",
        type=count,
    )
    size: int | None = data_option(
        "bring all images to N x N pixels, each the mean of the area it covers",
        metavar="N",
        type=count,
        only_with=("task", ["classes"]),
    )
    center: bool = data_option(
        "pixels from -0.5 to 0.5 instead of 0 to 1",
        default=False,
        only_with=("task", ["classes"]),
    )
    augment: tuple[tuple[str, float], ...] | None = data_option(
        "transform every training image randomly at every use: shift=PIXELS, rotation=DEGREES,"
        " scale=SHARE, stretch=SHARE, elastic=PIXELS; those named and no other, without any"
        " shift=2 rotation=10 scale=0.1 stretch=0.1",
        metavar="KIND=AMOUNT",
        nargs="*",
        type=augmentation,
        only_with=("task", ["classes"]),
    )

    epochs: int = training_option(
        "passes over the training images; 0 tests the network as it is",
        default=20,
        metavar="N",
        type=count_or_zero,
    )
    batch_size: int = training_option("images per step", default=128, metavar="N", type=count)
    seed: int = training_option(
        "seed of all random numbers", default=0, metavar="N", type=count_or_zero
    )
    optimizer: str = training_option("update rule", default="adam", choices=OPTIMIZERS)
    lr: float | None = training_option(
        "peak learning rate (default: "
        + ", ".join(f"{name} {choice.lr:g}" for name, choice in OPTIMIZERS.items())
        + ")",
        metavar="RATE",
        type=not_negative,
    )
    momentum: float | None = training_option(
        "momentum of sgd or rmsprop (default: sgd 0.9, rmsprop 0)",
        metavar="M",
        type=fraction,
        only_with=("optimizer", ["sgd", "rmsprop"]),
    )
    final_momentum: float | None = training_option(
        "momentum in the last quarter of the training (default: as before)",
        metavar="M",
        type=fraction,
        only_with=("optimizer", ["sgd", "rmsprop"]),
    )
    schedule: str = training_option(
        "learning rate schedule: constant; step: x 0.1 after each third; multistep: x 0.1 at"
        " 1/2 and 3/4; exponential: down to 1 %%; cosine: down to 0; cyclic: up from a tenth and"
        " down again, every four epochs; one-cycle: up for 30 %%, then down to 0; plateau: halved"
        " when the validation loss has not fallen for 2 epochs",
        default="one-cycle",
        choices=SCHEDULES,
    )
    lr_factor: float | None = training_option(
        "what step, multistep and plateau multiply the rate by, and exponential every epoch",
        metavar="F",
        type=fraction,
        only_with=("schedule", [n for n, takes in SCHEDULES.items() if "lr_factor" in takes]),
    )
    lr_epochs: tuple[float, ...] | None = training_option(
        "in epochs (0.5 is half of one), step: the interval; multistep: the milestones; cyclic:"
        " half a cycle; plateau: the patience",
        metavar="E",
        type=positive,
        nargs="+",
        only_with=("schedule", [n for n, takes in SCHEDULES.items() if "lr_epochs" in takes]),
    )
    clip: float | None = training_option(
        "scale the gradients of a step down to this global norm where theirs is larger",
        metavar="NORM",
        type=positive,
    )
    weight_decay: float = training_option(
        "weight decay of the optimizer", default=0.0, metavar="D", type=not_negative
    )
    loss: str = training_option(
        "what is minimized",
        default="cross-entropy",
        choices=["cross-entropy", "hinge", *ONE_HOT_LOSSES],
    )
    reduction: str = training_option(
        "how the gradients of a batch's images are combined",
        default="mean",
        choices=["mean", "sum"],
    )
    class_weights: tuple[float | str, ...] | None = training_option(
        "weights of the classes in the loss of the training (not of validation or test): one number"
        " for each class, of which only the ratios matter; or balanced, inversely proportional to"
        " their numbers of training images",
        metavar="W",
        type=class_weight,
        nargs="+",
        only_with=("task", ["classes"]),
    )
    label_smoothing: float | None = training_option(
        "share of each target that is spread over all classes (default: 0.1 with"
        " cross-entropy, the one loss that takes it)",
        metavar="S",
        type=fraction,
        only_with=("loss", ["cross-entropy"]),
    )
    init_from: str | None = training_option(
        "start from the weights of this model.npz", metavar="FILE"
    )
    train_only: tuple[str, ...] | None = training_option(
        "train these layers alone (names: --summary) and leave all others exactly as they are, as"
        " at inference; one that does not fit --init-from is initialized anew",
        metavar="LAYER",
        nargs="+",
    )
    patience: int | None = training_option(
        "early stopping: end the training after so many epochs without a better validation"
        " accuracy (or error); a schedule that lowers the rate until the last epoch, as one-cycle"
        " and cosine do, is then cut off while the rate is high",
        metavar="EPOCHS",
        type=count,
    )
    report_every: int | None = training_option(
        "steps from one report (a line, a point of the curves, a validation) to the next"
        " (default: an epoch)",
        metavar="N",
        type=count,
        distinguishes=False,
    )

    shards: int | None = parallel_option(
        "parts of a batch that are computed independently, batch norm included; the result"
        " depends on their number, not on who computes them (default: {record.default_shards}; with"
        " --mpi one for each worker of each rank)",
        metavar="N",
        type=count,
        distinguishes=True,
        resumes=False,
    )
    workers: int | None = parallel_option(
        "threads that compute shards in parallel (default: as many as there are shards and cores;"
        " with --mpi 1 in each rank)",
        metavar="N",
        type=count,
    )
    mpi: bool = parallel_option(
        "distribute the shards over the processes that mpiexec or srun starts (needs mpi4py)",
        default=False,
    )

    out: str | None = output_option(
        "the folder of this run: model.npz (the best), metrics.csv, run.json (the options) and"
        " checkpoint.npz, written at every epoch; one that holds another run is refused",
        metavar="DIR",
    )
    resume: bool = output_option(
        "go on from the checkpoint in --out, to the same bits as if it had never been stopped;"
        " where there is none, begin; with more --epochs or --patience a finished run is extended",
        default=False,
    )
    checkpoint_every: int | None = output_option(
        "write a checkpoint every N steps as well", metavar="N", type=count
    )
    plot: str | None = output_option(
        "draw curves, weights or kernels and feature maps, the confusion matrix and misclassified"
        " images (needs matplotlib) into this folder; without a folder into that of --out, else"
        " plots",
        metavar="DIR",
        nargs="?",
        const="",
    )
    compare: tuple[str, ...] | None = output_option(
        "instead of training, draw the curves of these runs (folders of --out) in one picture,"
        " compare.png in the folder of --plot",
        metavar="RUN",
        nargs="+",
    )
    predict: tuple[str, ...] | None = output_option(
        "instead of training, classify these images with the network in --out: image files or"
        " folders of them (need Pillow), a .npz with one array, IDX files; they are resized, and"
        " should look like the training images (MNIST: white on black, and dark on light is not"
        " guessed); prints the name, the class and its probability (softmax) of each",
        metavar="FILE",
        nargs="+",
    )
    export: str | None = output_option(
        "instead of training, write the network in --out for other runtimes (ONNX, needs onnx)",
        metavar="FILE.onnx",
    )
    summary: bool = output_option(
        "print the layers, their shapes and parameters first", default=False
    )

    hidden: tuple[int, ...] = network_option(
        "units per hidden layer", default=(512, 512), metavar="N", type=count, nargs="*"
    )
    activation: str = network_option("after each hidden layer", default="relu", choices=ACTIVATIONS)
    init: str = network_option("initial weights", default="he-normal", choices=INITIALIZERS)
    init_std: float | None = network_option(
        f"standard deviation of --init normal (default: {INIT_STD})",
        metavar="S",
        type=not_negative,
        only_with=("init", ["normal"]),
    )
    dropout: float = network_option(
        "after each hidden layer", default=0.3, metavar="RATE", type=fraction
    )
    input_dropout: float = network_option(
        "before the first hidden layer", default=0.0, metavar="RATE", type=fraction
    )
    batch_norm: bool = network_option("before each activation", default=True)

    @property
    def learning_rate(self) -> float:
        """--lr, or that of the optimizer."""
        return OPTIMIZERS[self.optimizer].lr if self.lr is None else self.lr

    @property
    def first_momentum(self) -> float | None:
        """--momentum, or that of the optimizer: None where it takes none."""
        return OPTIMIZERS[self.optimizer].momentum if self.momentum is None else self.momentum

    @property
    def last_momentum(self) -> float | None:
        """--final-momentum, or the momentum as before."""
        return self.first_momentum if self.final_momentum is None else self.final_momentum

    @property
    def smoothing(self) -> float | None:
        """--label-smoothing; None where the loss takes none."""
        if self.label_smoothing is None and self.loss == "cross-entropy":
            return 0.1
        return self.label_smoothing

    @property
    def standard_deviation(self) -> float | None:
        """--init-std; None where --init takes none."""
        return INIT_STD if self.init_std is None and self.init == "normal" else self.init_std

    @property
    def picture_folder(self) -> str:
        """Where --plot puts its pictures."""
        return self.plot or self.out or "plots"

    def resolved(self) -> Options:
        """The same with the defaults filled in that depend on other options."""
        return replace(
            self,
            lr=self.learning_rate,
            momentum=self.first_momentum,
            final_momentum=self.last_momentum,
            label_smoothing=self.smoothing,
            init_std=self.standard_deviation,
        )
