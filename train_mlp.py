"""Train a multilayer perceptron on MNIST, on your own images, or on digits that purenn draws.

    python train_mlp.py --hidden 512 256 --epochs 10 --out runs/first --plot
    python train_mlp.py --task sine --plot

What a script for another kind of network needs as well (options, data, the loop, the report,
pictures) is written so that it can be imported from here: see `main`, which is short.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import glob
import hashlib
import io
import itertools
import json
import math
import os
import signal
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

# BLAS reads how many threads it may have when NumPy is imported, and workers want one each.
BLAS_THREADS = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_script = os.path.basename(sys.argv[0])
_workers = any(argument.startswith(("--sh", "--wo", "--mp")) for argument in sys.argv)
_shared = _script == "train_cnn.py" or (_script == "train_mlp.py" and _workers)
if _shared and not any(name in os.environ for name in BLAS_THREADS):
    os.environ.update(dict.fromkeys(BLAS_THREADS, "1"))

import numpy as np  # noqa: E402

import purenn as nn  # noqa: E402

# ------------------------------------------------------------------------------------------------
# Options: tables of what can be chosen by name, and the command line
# ------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": nn.relu,
    "leaky-relu": nn.leaky_relu,
    "elu": nn.elu,
    "sigmoid": nn.sigmoid,
    "tanh": nn.tanh,
    "softplus": nn.softplus,
    "gelu": nn.gelu,
    "silu": nn.silu,
}
INITIALISERS = {
    "he-normal": nn.he_normal,
    "he-uniform": nn.he_uniform,
    "xavier-normal": nn.xavier_normal,
    "xavier-uniform": nn.xavier_uniform,
    "orthogonal": nn.orthogonal,
    "normal": nn.normal,  # of the standard deviation --init-std
    "zeros": nn.zeros,
}
OPTIMISERS: dict[
    str, tuple[Callable, float, bool]
] = {  # name: (constructor, its learning rate if none is given, does it take a momentum)
    "sgd": (nn.sgd, 0.05, True),
    "adam": (nn.adam, 0.002, False),
    "adamw": (nn.adamw, 0.002, False),
    "rmsprop": (nn.rmsprop, 0.001, True),
    "adagrad": (nn.adagrad, 0.02, False),
    "adadelta": (nn.adadelta, 1.0, False),
}
VALUE_LOSSES = {"mse": nn.mean_squared_error, "mae": nn.mean_absolute_error, "huber": nn.huber}
# With classes, these compare with a row that is 1 at the class and 0 elsewhere.
ROW_LOSSES = {**VALUE_LOSSES, "bce": nn.binary_cross_entropy}
SCHEDULES = {  # name: which of --lr-factor and --lr-epochs it takes
    "constant": (),
    "step": ("lr_factor", "lr_epochs"),
    "multistep": ("lr_factor", "lr_epochs"),
    "exponential": ("lr_factor",),
    "cosine": (),
    "cyclic": ("lr_epochs",),
    "one-cycle": (),
    "plateau": ("lr_factor", "lr_epochs"),
}
SINE: dict[str, Any] = {  # what --task sine takes instead of the defaults
    "hidden": [50, 50, 50],
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


# argparse names the type in its message: "invalid whole number value: 'x'".
count = partial(whole, 1)
count.__name__ = "whole number"  # type: ignore[attr-defined]
count_or_zero = partial(whole, 0)
count_or_zero.__name__ = "whole number"  # type: ignore[attr-defined]
positive = partial(real, 5e-324, math.inf)
positive.__name__ = "number"  # type: ignore[attr-defined]
not_negative = partial(real, 0.0, math.inf)
not_negative.__name__ = "number"  # type: ignore[attr-defined]
fraction = partial(real, 0.0, 1.0)
fraction.__name__ = "number"  # type: ignore[attr-defined]


AUGMENTATIONS = ("shift", "rotation", "scale", "stretch", "elastic")


def augmentation(text: str) -> tuple[str, float]:
    """One KIND=AMOUNT of --augment."""
    kind, _, amount = text.partition("=")
    if kind not in AUGMENTATIONS or not amount:
        raise argparse.ArgumentTypeError(
            f"expected KIND=AMOUNT with a kind of {', '.join(AUGMENTATIONS)}, got {text}"
        )
    try:
        return kind, not_negative(amount)
    except ValueError:
        raise argparse.ArgumentTypeError(f"the amount of {kind} is no number: {amount}") from None


NOT_OF_THE_RESULT = ("data", "out", "plot", "compare", "summary", "resume", "checkpoint_every")
NOT_OF_THE_SETTING = (*NOT_OF_THE_RESULT, "report_every", "workers", "mpi")
NOT_OF_A_CHECKPOINT = (*NOT_OF_THE_RESULT, "shards", "workers", "mpi")  # each may be resumed with


def new_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that every training script has; a script adds its own."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Speed: freed memory is kept for the next step (glibc alone would hand it back). Of"
        " the environment, OPENBLAS_NUM_THREADS says how many cores to use, 1 where two trainings"
        " share the machine, and OPENBLAS_CORETYPE which kernels: best left to OpenBLAS.",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="folder with MNIST-style IDX files (.gz or not), with a Keras-style .npz or with a"
        " sub-folder of images for each class (in train/ and test/ or by themselves; needs Pillow),"
        " or the .npz itself; 'builtin' for digits that purenn draws (default: data/mnist,"
        " downloaded into it if it is not there; without a network the digits that purenn draws)",
    )
    data.add_argument(
        "--validation",
        metavar="N",
        type=count_or_zero,
        default=argparse.SUPPRESS,
        help="training images held out to choose the best epoch; 0 keeps the last epoch"
        " (default: a tenth of them, at most 5,000)",
    )
    data.add_argument(
        "--train-size",
        metavar="N",
        type=count,
        default=argparse.SUPPRESS,
        help="train on N of the other training images, chosen by the seed (default: all)",
    )
    data.add_argument(
        "--test-size",
        metavar="N",
        type=count,
        default=argparse.SUPPRESS,
        help="test on N of the test images, always the same ones (default: all; of a folder of"
        " images that has no test images, a fifth)",
    )
    data.add_argument(
        "--size",
        metavar="N",
        type=count,
        default=argparse.SUPPRESS,
        help="bring all images to N x N pixels, each the mean of the area it covers",
    )
    data.add_argument(
        "--center", action="store_true", help="pixels from -0.5 to 0.5 instead of 0 to 1"
    )
    data.add_argument(
        "--augment",
        metavar="KIND=AMOUNT",
        nargs="*",
        type=augmentation,
        default=argparse.SUPPRESS,
        help="change every training image by chance at every use: shift=PIXELS, rotation=DEGREES,"
        " scale=SHARE, stretch=SHARE, elastic=PIXELS; those named and no other, without any"
        " shift=2 rotation=10 scale=0.1 stretch=0.1",
    )
    parser.set_defaults(task="classes")
    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs",
        metavar="N",
        type=count_or_zero,
        default=20,
        help="rounds of training; 0 tests the network as it is",
    )
    training.add_argument(
        "--batch-size", metavar="N", type=count, default=128, help="images a step"
    )
    training.add_argument(
        "--seed", metavar="N", type=count_or_zero, default=0, help="of everything"
    )
    training.add_argument("--optimizer", choices=OPTIMISERS, default="adam", help="update rule")
    rates = ", ".join(f"{name} {lr:g}" for name, (_, lr, _) in OPTIMISERS.items())
    training.add_argument(
        "--lr",
        metavar="RATE",
        type=not_negative,
        default=argparse.SUPPRESS,
        help=f"learning rate, at its highest (default: {rates})",
    )
    training.add_argument(
        "--momentum",
        metavar="M",
        type=fraction,
        default=argparse.SUPPRESS,
        help="of sgd or rmsprop (default: sgd 0.9, rmsprop 0)",
    )
    training.add_argument(
        "--final-momentum",
        metavar="M",
        type=fraction,
        default=argparse.SUPPRESS,
        help="momentum in the last quarter of the training (default: as before)",
    )
    training.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="one-cycle",
        help="learning rate by step: constant; step: x 0.1 after each third; multistep: x 0.1 at"
        " 1/2 and 3/4; exponential: down to 1 %%; cosine: down to 0; cyclic: up from a tenth and"
        " down again, every four epochs; one-cycle: up for 30 %%, then down to 0; plateau: halved"
        " when the validation loss has not fallen for 2 epochs",
    )
    training.add_argument(
        "--lr-factor",
        metavar="F",
        type=fraction,
        default=argparse.SUPPRESS,
        help="what step, multistep and plateau multiply the rate by, and exponential every epoch",
    )
    training.add_argument(
        "--lr-epochs",
        metavar="E",
        type=positive,
        nargs="+",
        default=argparse.SUPPRESS,
        help="step: that often; multistep: then; cyclic: up for so long; plateau: having waited"
        " for so long; 0.5 is half an epoch",
    )
    training.add_argument(
        "--weight-decay", metavar="D", type=not_negative, default=0.0, help="L2 in the update rule"
    )
    training.add_argument(
        "--loss",
        choices=["cross-entropy", "hinge", *ROW_LOSSES],
        default="cross-entropy",
        help="what is minimised",
    )
    training.add_argument(
        "--reduction",
        choices=["mean", "sum"],
        default="mean",
        help="of the gradients of a batch's images",
    )
    training.add_argument(
        "--label-smoothing",
        metavar="S",
        type=fraction,
        default=argparse.SUPPRESS,
        help="share of each target that is spread over all classes (default: 0.1 with"
        " cross-entropy, the one loss that takes it)",
    )
    training.add_argument(
        "--init-from",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="begin with the weights of this model.npz",
    )
    training.add_argument(
        "--train-only",
        metavar="LAYER",
        nargs="+",
        default=argparse.SUPPRESS,
        help="leave all but these layers (names: --summary) exactly as they are, as at inference;"
        " where one of these does not fit --init-from, it begins anew",
    )
    training.add_argument(
        "--report-every",
        metavar="N",
        type=count,
        default=argparse.SUPPRESS,
        help="steps from one line, point of the curves and look at the validation images to the"
        " next (default: an epoch)",
    )
    parallel = parser.add_argument_group("cores and machines")
    parallel.add_argument(
        "--shards",
        metavar="N",
        type=count,
        default=argparse.SUPPRESS,
        help="parts of a batch that are computed by themselves, batch norm and all; the result"
        " depends on them and not on who computes them (default: train_mlp.py 1, train_cnn.py 2;"
        " with --mpi one for each worker of each rank)",
    )
    parallel.add_argument(
        "--workers",
        metavar="N",
        type=count,
        default=argparse.SUPPRESS,
        help="threads that compute shards at the same time (default: as many as there are shards"
        " and cores; with --mpi 1 in each rank)",
    )
    parallel.add_argument(
        "--mpi",
        action="store_true",
        help="share the shards among the processes that mpiexec or srun starts (needs mpi4py)",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="keep model.npz (the best), metrics.csv, options.json and checkpoint.npz, written at"
        " every epoch, in this folder",
    )
    output.add_argument(
        "--resume",
        action="store_true",
        help="go on from the checkpoint in --out, to the same bits as if it had never been stopped;"
        " where there is none, begin (without this option begin anew, and keep the one that is"
        " there as checkpoint.before.npz)",
    )
    output.add_argument(
        "--checkpoint-every",
        metavar="N",
        type=count,
        default=argparse.SUPPRESS,
        help="write a checkpoint every N steps as well",
    )
    output.add_argument(
        "--plot",
        metavar="DIR",
        nargs="?",
        const="",
        default=argparse.SUPPRESS,
        help="draw curves, weights or kernels and feature maps, the confusion matrix and what was"
        " taken for something else (needs matplotlib) into this folder; without a folder into that"
        " of --out, else plots",
    )
    output.add_argument(
        "--compare",
        metavar="RUN",
        nargs="+",
        default=argparse.SUPPRESS,
        help="instead of training, draw the curves of these runs (folders of --out) in one picture,"
        " compare.png in the folder of --plot",
    )
    output.add_argument(
        "--summary", action="store_true", help="print the layers, their shapes and parameters first"
    )
    return parser


def setting(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, str]:
    """{"--hidden": "64 32", ...}: what was chosen that changes the result, beside the defaults."""
    defaults = vars(parser.parse_args([]))
    chosen = {}
    for name, value in vars(options).items():
        if value == defaults.get(name) or name in NOT_OF_THE_SETTING:
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            chosen[flag if value else flag.replace("--", "--no-", 1)] = ""
        elif name == "augment":
            chosen[flag] = " ".join(f"{kind}={amount:g}" for kind, amount in value)
        else:
            values = value if isinstance(value, list) else [value]
            chosen[flag] = " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
    return chosen


def parse(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> tuple[argparse.Namespace, dict[str, str]]:
    """The options, and those among them that are not at their defaults as they would be typed."""
    options = parser.parse_args(arguments)
    if options.task == "sine":
        parser.set_defaults(**SINE)
        options = parser.parse_args(arguments)
    return options, {"": parser.prog, **setting(parser, options)}


def as_text(chosen: dict[str, str]) -> str:
    """A setting as one would type it."""
    return " ".join(f"{flag} {value}".strip() for flag, value in chosen.items())


def add_network_options(parser: argparse.ArgumentParser, hidden: list[int]) -> Any:
    """The options of a network that ends in linear layers."""
    network = parser.add_argument_group("network")
    network.add_argument(
        "--hidden", metavar="N", type=count, nargs="*", default=hidden, help="units a hidden layer"
    )
    network.add_argument(
        "--activation", choices=ACTIVATIONS, default="relu", help="after each hidden layer"
    )
    network.add_argument("--init", choices=INITIALISERS, default="he-normal", help="first weights")
    network.add_argument(
        "--init-std",
        metavar="S",
        type=not_negative,
        default=argparse.SUPPRESS,
        help="standard deviation of --init normal (default: 0.02)",
    )
    network.add_argument(
        "--dropout", metavar="RATE", type=fraction, default=0.3, help="after each hidden layer"
    )
    network.add_argument(
        "--input-dropout", metavar="RATE", type=fraction, default=0.0, help="before the first one"
    )
    network.add_argument(
        "--batch-norm",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="before each activation",
    )
    return network


class Task(NamedTuple):
    """What is learned, and by what it is judged."""

    outputs: int  # of the network
    loss: Callable  # (output, target) -> (loss, doutput)
    measure: Callable  # (output, target) -> a number
    name: str  # of that number
    better: int  # 1 where more of it is better, -1 where less is
    digits: int  # after the point, of what is printed


def choose_task(options: argparse.Namespace, data: dict[str, np.ndarray]) -> Task:
    """Classes or values, with the loss of the options."""
    if options.task == "sine":
        return Task(1, VALUE_LOSSES[options.loss], mean_error, "error", -1, 8)
    classes = len(data["classes"])
    loss: Callable = nn.hinge
    if options.loss == "cross-entropy":
        smoothing = getattr(options, "label_smoothing", 0.1)
        loss = partial(nn.softmax_cross_entropy, smoothing=smoothing)
    elif options.loss in ROW_LOSSES:
        loss = partial(loss_on_rows, loss=ROW_LOSSES[options.loss], classes=classes)
    return Task(classes, loss, nn.accuracy, "accuracy", 1, 4)


def mean_error(output: np.ndarray, target: np.ndarray) -> float:
    """The mean absolute error."""
    return nn.mean_absolute_error(output, target)[0]


def loss_on_rows(
    prediction: np.ndarray, labels: np.ndarray, *, loss: Callable, classes: int
) -> tuple[float, np.ndarray]:
    """A loss that compares with rows of numbers: 1 for the class, 0 for the others."""
    return loss(prediction, np.eye(classes, dtype=prediction.dtype)[labels])


def choose_schedule(options: argparse.Namespace, lr: float, steps_per_epoch: int) -> Any:
    """The learning rate by step."""
    name, steps = options.schedule, max(options.epochs * steps_per_epoch, 1)
    factor = getattr(options, "lr_factor", 0.1)
    after: Any = [
        max(round(epochs * steps_per_epoch), 1) for epochs in getattr(options, "lr_epochs", [])
    ]
    if name == "step":
        return nn.step_decay(lr, (after or [max(steps // 3, 1)])[0], factor)
    if name == "multistep":
        return nn.multistep(lr, after or [steps // 2, steps * 3 // 4], factor)
    if name == "exponential":
        by_epoch = getattr(options, "lr_factor", 0.01 ** (steps_per_epoch / steps))
        return nn.exponential(lr, by_epoch ** (1 / steps_per_epoch))
    if name == "cosine":
        return nn.cosine(lr, steps)
    if name == "cyclic":
        return nn.cyclic(lr / 10, lr, (after or [2 * steps_per_epoch])[0])
    if name == "one-cycle":
        return nn.one_cycle(lr, steps)
    return lr


def choose_optimizer(options: argparse.Namespace, steps_per_epoch: int) -> nn.Optimizer:
    """The optimiser of the options, with its schedule."""
    constructor, lr, takes_momentum = OPTIMISERS[options.optimizer]
    rate = choose_schedule(options, getattr(options, "lr", lr), steps_per_epoch)
    if not takes_momentum:
        return constructor(rate, weight_decay=options.weight_decay)
    momentum = getattr(options, "momentum", 0.9 if options.optimizer == "sgd" else 0.0)
    final = getattr(options, "final_momentum", momentum)
    if final > momentum:
        raise ValueError(f"--final-momentum {final:g} is above the momentum of {momentum:g}")
    if final < momentum:
        last_quarter = options.epochs * steps_per_epoch * 3 // 4
        momentum = nn.multistep(momentum, [last_quarter], final / momentum)
    return constructor(rate, momentum=momentum, weight_decay=options.weight_decay)


def initialiser(options: argparse.Namespace) -> Any:
    """The function (key, shape) -> array of --init and --init-std."""
    if options.init == "normal":
        return nn.normal(getattr(options, "init_std", 0.02))
    return INITIALISERS[options.init]


def choose_augmentation(options: argparse.Namespace) -> Callable | None:
    """The function (key, images) -> images of --augment, or None without it."""
    if not hasattr(options, "augment"):
        return None
    amounts = {**dict.fromkeys(AUGMENTATIONS, 0.0), **dict(options.augment)}
    augment = partial(nn.augment, **amounts) if options.augment else nn.augment
    return partial(augment_centred, augment=augment) if options.center else augment


def augment_centred(key: nn.Key, images: np.ndarray, *, augment: Callable) -> np.ndarray:
    """Augmentation of pixels from -0.5 to 0.5: what comes in from outside is black here too."""
    return augment(key, images + np.float32(0.5)) - np.float32(0.5)


ONLY_WITH = {  # an option, and the choice without which it would be silently left out
    "label_smoothing": ("loss", ("cross-entropy",)),
    "momentum": ("optimizer", ("sgd", "rmsprop")),
    "final_momentum": ("optimizer", ("sgd", "rmsprop")),
    "init_std": ("init", ("normal",)),
    "lr_factor": ("schedule", tuple(n for n, takes in SCHEDULES.items() if "lr_factor" in takes)),
    "lr_epochs": ("schedule", tuple(n for n, takes in SCHEDULES.items() if "lr_epochs" in takes)),
    "augment": ("task", ("classes",)),
    "size": ("task", ("classes",)),
    "data": ("task", ("classes",)),
}


def check_options(options: argparse.Namespace) -> None:
    """ValueError for options that contradict each other, before anything is done."""
    for name, (other, choices) in ONLY_WITH.items():
        if hasattr(options, name) and getattr(options, other) not in choices:
            raise ValueError(
                f"--{name.replace('_', '-')} goes with --{other} {' or '.join(choices)},"
                f" not {getattr(options, other)}"
            )
    if options.task == "sine" and options.loss not in VALUE_LOSSES:
        raise ValueError(f"--task sine takes --loss mse, mae or huber, not {options.loss}")
    if options.task == "sine" and options.center:
        raise ValueError("--center goes with --task classes, not sine")
    if options.schedule != "multistep" and len(getattr(options, "lr_epochs", [1])) != 1:
        raise ValueError(f"--schedule {options.schedule} takes one number of --lr-epochs")
    for name in ("resume", "checkpoint_every"):
        if getattr(options, name, False) and not hasattr(options, "out"):
            raise ValueError(f"--{name.replace('_', '-')} needs --out")
    augment = choose_augmentation(options)
    if augment:
        augment(0, np.zeros((1, 1, 2, 2), np.float32))  # refuses amounts that make no sense
    choose_optimizer(options, 1)  # refuses what does not go together there
    if hasattr(options, "plot"):
        pyplot()
        os.makedirs(picture_folder(options), exist_ok=True)
    if hasattr(options, "out"):
        os.makedirs(options.out, exist_ok=True)


def picture_folder(options: argparse.Namespace) -> str:
    """Where --plot puts its pictures."""
    return getattr(options, "plot", "") or getattr(options, "out", "plots")


# ------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------

DEFAULT_FOLDER = os.path.join("data", "mnist")


def drawn_digits(train: int = 12_000, test: int = 2_000) -> dict[str, np.ndarray]:
    """A data set of digits that purenn draws; always the same one."""
    data = {}
    for key, (part, size) in enumerate((("train", train), ("test", test))):
        images, labels = nn.draw_digits((2026, key), size)
        data[f"x_{part}"] = images[:, None] / np.float32(255)
        data[f"y_{part}"] = labels
    return data


def has_dataset(folder: str) -> bool:
    """Whether there is a complete data set in a folder, going by the names alone."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sum("-idx" in name or ".idx" in name for name in names) >= 4 or any(
        name.endswith(".npz") for name in names
    )


def sine(train: int = 4_000, test: int = 1_000) -> dict[str, np.ndarray]:
    """Points of y = sin x on (-π/2, π/2): by chance to train on, evenly spaced to test on."""
    by_chance = nn.uniform(math.pi / 2)((2026, 2), (train, 1))
    edges = np.linspace(-math.pi / 2, math.pi / 2, test + 2)
    data = {"x_train": by_chance, "x_test": edges[1:-1, None].astype(np.float32)}
    return {**data, **{f"y{name[1:]}": np.sin(x) for name, x in data.items()}}


def sub_folders(folder: str) -> list[str]:
    """The names of the folders in a folder, sorted; none where it is no folder."""
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # others may run programs


def read_image(path: str, size: int | None) -> np.ndarray:
    """(C, H, W) from 0 to 1 of an image file with 8 bits a colour; one channel if it is grey."""
    import PIL.Image

    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise ValueError("it is not a file")
        with open(path, "rb") as file:
            content = io.BytesIO(file.read())  # asked for more than there is, it takes no memory
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            PIL.Image.open(content, formats=IMAGE_FORMATS).verify()  # a PNG's checksums
            image = PIL.Image.open(content, formats=IMAGE_FORMATS)
            if image.mode[0] in "IF":
                raise ValueError(f"its pixels are of mode {image.mode}, expected 8 bits a colour")
            if not 0 < math.prod(image.size) <= max(1_000_000, 50 * len(content.getbuffer())):
                raise ValueError(f"{image.width}x{image.height} pixels do not fit in it")
            grey = image.mode in ("1", "L", "LA")
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
    except Exception as error:  # Pillow raises any, for damaged files
        reason = str(error) or type(error).__name__
        if isinstance(error, PIL.UnidentifiedImageError):
            reason = f"it is no whole {', '.join(IMAGE_FORMATS)}"
        raise ValueError(f"{path}: cannot be read as an image: {reason}") from None
    pixels = pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)
    pixels = np.divide(pixels, np.float32(255), dtype=np.float32)
    return pixels if size is None else nn.resize(pixels[None], size)[0]


def read_images(folder: str, classes: list[str], size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(images, labels) of a folder with one sub-folder for each class."""
    try:
        import PIL.PngImagePlugin
    except ImportError:
        raise ValueError(f"{folder}: image files need Pillow: pip install pillow") from None
    PIL.PngImagePlugin.MAX_TEXT_MEMORY = 1 << 22  # bytes of comments unpacked, else 64 MB a file
    known = PIL.Image.registered_extensions().items()
    suffixes = tuple(suffix for suffix, kind in known if kind in IMAGE_FORMATS)
    images, labels = [], []
    for label, name in enumerate(classes):
        files = sorted(os.listdir(os.path.join(folder, name)))
        files = [f for f in files if f.lower().endswith(suffixes) and not f.startswith(".")]
        paths = [os.path.join(folder, name, file) for file in files]
        if not paths:
            raise ValueError(f"{os.path.join(folder, name)}: there is no image in this folder")
        for path in paths:
            images.append(read_image(path, size))
            labels.append(label)
            if images[-1].shape[1:] != images[0].shape[1:]:
                sizes = " and ".join(f"{i.shape[2]}x{i.shape[1]}" for i in (images[0], images[-1]))
                raise ValueError(f"{path}: images of {sizes} pixels; --size makes them the same")
    channels = max(len(image) for image in images)
    return (
        np.stack([np.broadcast_to(image, (channels, *image.shape[1:])) for image in images]),
        np.array(labels),
    )


def read_image_folders(folder: str, size: int | None) -> dict[str, np.ndarray]:
    """A data set of image files, in one sub-folder for each class.

    These stand in train/ and test/; or by themselves, and then there are no test images.
    """
    parts = [part for part in ("train", "test") if part in sub_folders(folder)]
    folders = {part: os.path.join(folder, part) for part in parts} or {"train": folder}
    if "train" not in folders:
        raise ValueError(f"{folder}: there is a folder test, but none called train")
    classes = sub_folders(folders["train"])
    data = {"classes": np.array(classes)}
    for part, path in folders.items():
        if sub_folders(path) != classes:
            raise ValueError(f"{path}: expected a folder for each of {', '.join(classes)}")
        data[f"x_{part}"], data[f"y_{part}"] = read_images(path, classes, size)
    return data


def get_data(options: argparse.Namespace) -> tuple[dict[str, np.ndarray], str]:
    """The data set that the options ask for, and a word on where it comes from."""
    if options.task == "sine":
        return sine(), "y = sin x"
    source = getattr(options, "data", None)
    if source is not None and sub_folders(source) and not has_dataset(source):
        return read_image_folders(source, getattr(options, "size", None)), source
    data, origin = read_or_draw(source)
    return {**data, "classes": np.arange(int(data["y_train"].max()) + 1).astype(str)}, origin


def read_or_draw(source: str | None) -> tuple[dict[str, np.ndarray], str]:
    """A data set of a file or folder of arrays, of MNIST, or of digits that purenn draws."""
    if source == "builtin":
        return drawn_digits(), "digits drawn by purenn"
    if source is not None:
        return nn.read_dataset(source), source
    if not has_dataset(DEFAULT_FOLDER):
        line = MovingLine()
        try:
            nn.download_mnist(
                DEFAULT_FOLDER, nn.MNIST_MIRRORS, progress=partial(show_download, line)
            )
        except (OSError, ValueError) as error:
            line.end()
            print(
                f"MNIST is not in {DEFAULT_FOLDER} and cannot be downloaded ({error});"
                " training on digits drawn by purenn instead, --data DIR reads your own",
                flush=True,
            )
            return drawn_digits(), "digits drawn by purenn"
        line.end()
    return nn.read_dataset(DEFAULT_FOLDER), DEFAULT_FOLDER


def show_download(line: MovingLine, name: str, done: int, total: int) -> None:
    """Progress of a download, for `purenn.download_mnist`."""
    share = f" of {total / 1e6:.1f}" if total else ""
    line.show(f"downloading {name}: {done / 1e6:.1f}{share} MB", important=done >= total)


def shuffled(count: int, key: nn.Key) -> np.ndarray:
    """The numbers 0 ... count-1 in the order that the key says."""
    return next(nn.batches(count, count, key))


def part_of(data: dict[str, np.ndarray], part: str, index: np.ndarray) -> list[np.ndarray]:
    """[x, y] of some of the training or test images, in the order in which they stand there."""
    index = np.sort(index)
    return [data[f"{name}_{part}"][index] for name in ("x", "y")]


def choose_test(data: dict[str, np.ndarray], size: int | None) -> dict[str, np.ndarray]:
    """`size` of the test images; where there are none, of the training images, which lose them."""
    source = "test" if "x_test" in data else "train"
    available = len(data[f"x_{source}"])
    if source == "test" and size is None:
        return data
    size = available // 5 if size is None else size
    if size > available - (source == "train"):
        raise ValueError(f"--test-size {size} is too many of {available} {source} images")
    order = shuffled(available, 0)
    parts = {"test": order[:size], **({"train": order[size:]} if source == "train" else {})}
    chosen = dict(data)
    for part, index in parts.items():
        chosen[f"x_{part}"], chosen[f"y_{part}"] = part_of(data, source, index)
    return chosen


def split_off(
    data: dict[str, np.ndarray], size: int | None, seed: int, train_size: int | None = None
) -> dict[str, np.ndarray]:
    """Hold out `size` random training images as "x_validation" and "y_validation".

    Of the others, `train_size` stay, or all.
    """
    available = len(data["x_train"])
    if size is None:
        size = min(5_000, available // 10)
    if size >= available:
        raise ValueError(f"--validation {size} leaves none of the {available} images to train on")
    if train_size is None:
        train_size = available - size
    if train_size > available - size:
        raise ValueError(
            f"--train-size {train_size} is too many: there are {available} images, {size} of them"
            " held out (--validation)"
        )
    order = shuffled(available, (seed, 3))
    parts = dict(data)
    parts["x_validation"], parts["y_validation"] = part_of(data, "train", order[:size])
    index = order[size : size + train_size]
    parts["x_train"], parts["y_train"] = part_of(data, "train", index)
    return parts


def prepare(data: dict[str, np.ndarray], options: argparse.Namespace) -> dict[str, np.ndarray]:
    """As many images as the options ask for, of their size and range."""
    data = choose_test(data, getattr(options, "test_size", None))
    sizes = getattr(options, "validation", None), getattr(options, "train_size", None)
    data = split_off(data, sizes[0], options.seed, sizes[1])
    for name in ("x_train", "x_validation", "x_test"):
        if hasattr(options, "size"):
            data[name] = nn.resize(data[name], options.size)
        if options.center:
            data[name] = data[name] - np.float32(0.5)
    return data


# ------------------------------------------------------------------------------------------------
# Cores and machines
# ------------------------------------------------------------------------------------------------


class Team(NamedTuple):
    """Who computes: the workers of this process, and with --mpi those of all ranks."""

    shards: int = 1
    workers: int = 1
    map: Callable = map  # of the workers of this process
    communicator: Any = None  # of mpi4py

    @property
    def rank(self) -> int:
        """The number of this process; rank 0 alone reports and writes."""
        return self.communicator.Get_rank() if self.communicator else 0

    @property
    def ranks(self) -> int:
        """How many processes there are."""
        return self.communicator.Get_size() if self.communicator else 1


def world() -> Any:
    """The communicator of all ranks."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: there is no MPI for it to load
        raise ValueError(
            f"--mpi needs mpi4py and an MPI: pip install mpi4py mpich ({error})"
        ) from None
    return MPI.COMM_WORLD


def own_cores(communicator: Any) -> int:
    """The cores for this process, where ranks on the same machine have equal parts of them."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    if communicator is None:
        return cores
    from mpi4py import MPI

    return max(1, cores // communicator.Split_type(MPI.COMM_TYPE_SHARED).Get_size())


@contextlib.contextmanager
def assembled(options: argparse.Namespace, shards: int) -> Iterator[Team]:
    """The team of the options, where one process has so many shards by default."""
    communicator = world() if options.mpi else None
    ranks = communicator.Get_size() if communicator else 1
    if communicator:
        shards = ranks * getattr(options, "workers", 1)
    shards = getattr(options, "shards", shards)
    if shards < ranks:
        raise ValueError(f"--shards {shards} leaves some of the {ranks} ranks without work")
    most = math.ceil(shards / ranks)
    workers = getattr(options, "workers", min(most, own_cores(communicator)))
    if workers > most:
        raise ValueError(
            f"--workers {workers} is too many: each process has {most} of the {shards} shards"
            " (--shards)"
        )
    if workers == 1:
        yield Team(shards, communicator=communicator)
        return
    with ThreadPoolExecutor(workers, initializer=partial(np.seterr, all="ignore")) as pool:
        yield Team(shards, workers, pool.map, communicator)


def describe_team(team: Team) -> str:
    """How the work is shared, in a line."""
    threads = next((os.environ[name] for name in BLAS_THREADS if name in os.environ), "all cores")
    workers = f"{team.workers} worker{'s' * (team.workers > 1)}"
    ranks = f" in each of {team.ranks} ranks" if team.communicator else ""
    shards = f"{team.shards} shard{'s' * (team.shards > 1)}"
    return f"every batch in {shards}, computed by {workers}{ranks}; threads of BLAS: {threads}"


def own_part(team: Team, count: int) -> slice:
    """Which of so many pieces of work are this rank's."""
    return slice(*(count * rank // team.ranks for rank in (team.rank, team.rank + 1)))


def map_all(team: Team, function: Callable, pieces: Sequence) -> list:
    """function of every piece, in their order, whoever computes it."""
    own = list(team.map(function, pieces[own_part(team, len(pieces))]))
    if team.communicator is None:
        return own
    return list(itertools.chain(*team.communicator.allgather(own)))


def map_own(function: Callable, parts: Iterable, *, team: Team) -> list:
    """A `map` for `data_parallel`: other ranks' parts are nothing here, `add_ranks` brings them.

    A rank without a part learns from the first one what there is to add.
    """
    parts = list(parts)
    own = own_part(team, len(parts))
    results: list = [(0.0, {}, {})] * len(parts)
    results[own] = team.map(function, parts[own])
    if own.start == own.stop:
        _, grads, cache = function(parts[0])
        nothing = partial(nn.tree_map, np.zeros_like)
        results[0] = (0.0, nothing(grads), nothing(cache))
    return results


def next_part(leaf: np.ndarray, parts: Iterator[np.ndarray]) -> np.ndarray:
    """The next of some flat arrays, as a leaf of this kind."""
    return next(parts).reshape(leaf.shape).astype(leaf.dtype)


def add_ranks(team: Team, tree: nn.Tree) -> nn.Tree:
    """The sum of a tree over all ranks, by one Allreduce of one flat buffer."""
    if team.ranks == 1:
        return tree
    leaves = list(nn.tree_flatten(tree).values())
    dtype = np.result_type(*(leaf.dtype for leaf in leaves if leaf.ndim))
    own = np.concatenate([leaf.ravel() for leaf in leaves], dtype=dtype, casting="same_kind")
    total = np.empty_like(own)
    team.communicator.Allreduce(own, total)
    parts = np.split(total, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return nn.tree_map(partial(next_part, parts=iter(parts)), tree)


def any_rank(team: Team, asked: bool) -> bool:
    """Whether this is so on any rank."""
    if team.ranks == 1:
        return asked
    total = np.zeros(1)
    team.communicator.Allreduce(np.array([float(asked)]), total)
    return bool(total[0])


@contextlib.contextmanager
def one_rank_first(team: Team) -> Iterator[None]:
    """Rank 0 goes through what is entered here before the others do: its mistakes end them all."""
    if team.communicator and team.rank > 0:
        team.communicator.Barrier()
    yield
    if team.communicator and team.rank == 0:
        team.communicator.Barrier()


def check_same(team: Team, experiment: Experiment) -> None:
    """ValueError where a rank has other options or data than rank 0."""
    if team.communicator is None:
        return
    first, *others = team.communicator.allgather(identity(experiment))
    for rank, own in enumerate(others, start=1):
        try:
            check_identity(first, own)
        except ValueError as error:
            raise ValueError(f"rank {rank} does not do what rank 0 does: {error}") from None


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------


class MovingLine:
    """One line on a terminal that is written again and again; silent in a file or a pipe."""

    def __init__(self) -> None:
        self.moves = sys.stdout.isatty()
        self.length = 0
        self.due = 0.0

    def is_due(self) -> bool:
        """Whether it would move now: at most ten times a second."""
        return self.moves and time.monotonic() >= self.due

    def show(self, text: str, important: bool = False) -> None:
        """Replace the line, at most ten times a second."""
        if self.is_due() or (important and self.moves):
            print("\r" + text.ljust(self.length), end="", flush=True)
            self.length, self.due = len(text), time.monotonic() + 0.1

    def end(self, text: str = "") -> None:
        """Replace the line for good; in a file or a pipe this is all that is printed."""
        if self.length or text:
            print(("\r" if self.length else "") + text.ljust(self.length), flush=True)
        self.length = 0


class Experiment(NamedTuple):
    """What does not change while a network is trained."""

    options: argparse.Namespace
    data: dict[str, np.ndarray]
    task: Task
    net: nn.Layer
    team: Team = Team()


def output_of(images: np.ndarray, *, net: nn.Layer, params: nn.Tree) -> np.ndarray:
    """The output at inference."""
    return net.forward(params, images)[0]


def predict(net: nn.Layer, params: nn.Tree, images: np.ndarray, team: Team = Team()) -> np.ndarray:
    """The output at inference, computed 250 images at a time."""
    parts = [images[start : start + 250] for start in range(0, len(images), 250)]
    forward = partial(output_of, net=net, params=params)
    return np.concatenate(map_all(team, forward, parts))


def layers_of(net: nn.Layer) -> dict[str, nn.Layer]:
    """The layers of a `sequential`, by name."""
    return net.forward.keywords["layers"]  # type: ignore[attr-defined]


def outputs(net: nn.Layer, params: nn.Tree, x: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(name, output) of every layer of a `sequential`, at inference."""
    for name, layer in layers_of(net).items():
        x, _ = layer.forward(params.get(name, {}), x)
        yield name, x


def summary(net: nn.Layer, params: nn.Tree, trained: nn.Tree, x: np.ndarray) -> str:
    """A table of the layers: names, what they are, what they make of one x, numbers to train."""
    rows = [("layer", "kind", "output", "parameters"), ("input", "", as_shape(x), "")]
    for name, y in outputs(net, params, x):
        forward = layers_of(net)[name].forward
        kind = getattr(forward, "func", forward).__name__.removesuffix("_forward")
        rows.append((name, kind, as_shape(y), f"{nn.count_parameters(trained.get(name, {})):,}"))
    rows.append(("total", "", "", f"{nn.count_parameters(trained):,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([*map(str.ljust, row[:3], widths), row[3].rjust(widths[3])]).rstrip()
        for row in rows
    )


def as_shape(batch: np.ndarray) -> str:
    """The shape of one sample, as in 1x28x28."""
    return "x".join(map(str, batch.shape[1:]))


def start_from(path: str, params: nn.Tree, anew: Sequence[str]) -> nn.Tree:
    """The params of a file, which must fit; those layers of `anew` that do not, as in `params`."""
    loaded = nn.load(path)
    for entry, array in nn.tree_flatten(loaded).items():
        if array.dtype.char not in "fd":
            raise ValueError(f"{path}: {entry} is {array.dtype}, expected float32 or float64")
    unknown = sorted(loaded.keys() - params.keys())
    if unknown:
        raise ValueError(f"{path}: this network has no layer {' or '.join(unknown)}")
    started = {}
    for name, own in params.items():
        expected, found = (
            {entry: array.shape for entry, array in nn.tree_flatten({name: tree}).items()}
            for tree in (own, loaded.get(name, {}))
        )
        if found != expected and name not in anew:
            raise ValueError(
                f"{path}: {name} has {found or 'nothing'}, but this network needs {expected}"
            )
        started[name] = loaded[name] if found == expected else own
    return started


def in_training(params: nn.Tree, key: nn.Key, only: Sequence[str] | None) -> nn.Tree:
    """params in training mode; with `only`, these layers alone, and the others as at inference."""
    if only is None:
        return nn.training(params, key)
    keys = {name: nn.fold_key(key, index) for index, name in enumerate(only)}
    return {**params, **{name: nn.training(params[name], keys[name]) for name in only}}


def count_steps(count: int, batch_size: int) -> int:
    """How many steps an epoch has.

    A single image that is left over at its end is left out: batch norm cannot train on one.
    """
    full, left = divmod(count, min(batch_size, count))
    return full + (left > 1)


def step_images(count: int, options: argparse.Namespace, done: int = 0) -> Iterator[np.ndarray]:
    """The numbers of the images of every step that is left of the training, after `done` steps."""
    epoch_steps = count_steps(count, options.batch_size)
    for epoch in range(done // epoch_steps, options.epochs):
        indices = nn.batches(count, options.batch_size, (options.seed, 1, epoch + 1))
        first = max(done - epoch * epoch_steps, 0)
        yield from itertools.islice(indices, first, epoch_steps)


class Progress(NamedTuple):
    """What changes while a network is trained: all that a checkpoint has to hold."""

    params: nn.Tree
    state: nn.Tree  # of the optimiser
    best: nn.Tree  # the params that are kept
    best_score: np.ndarray  # ()
    step: np.ndarray  # (): how many were taken
    sums: np.ndarray  # (3,): loss, accuracy or error, number of the images since the last report
    rows: np.ndarray  # (reports, columns)


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
    augment, only = choose_augmentation(options), getattr(options, "train_only", None)
    key = params["key"]
    if augment:
        batch = augment(nn.fold_key(key, 2**32 - 1), batch)  # no layer has this number
    params = in_training({name: params[name] for name in params if name != "key"}, key, only)
    output, cache = net.forward(params, batch)
    loss, doutput = task.loss(output, target)
    if not math.isfinite(loss):
        where = first_not_finite(net, params, batch)
        raise ValueError(f"the loss became {loss} in step {step}: {where}; try a lower --lr")
    if options.reduction == "sum":
        doutput = doutput * images
    _, grads = net.backward(params, cache, doutput, need_dx=False)
    if only is not None:
        grads = {name: grads[name] for name in only}
    measured = {"measured": np.array(task.measure(output, target))}
    return loss, grads, {**cache, "statistics": measured}


def take_step(
    experiment: Experiment, optimizer: nn.Optimizer, progress: Progress, index: np.ndarray
) -> Progress:
    """The progress after one more step, with the images of these numbers."""
    options, data, _, _, team = experiment
    step = int(progress.step)
    gradients: Callable = partial(
        shard_gradients, experiment=experiment, step=step, images=len(index)
    )
    if team.shards > 1:
        shards = max(1, min(team.shards, len(index) // 2))  # batch norm cannot train on one image
        gradients = nn.data_parallel(gradients, shards, partial(map_own, team=team))
    params = nn.training(progress.params, (options.seed, 2, step))
    loss, grads, cache = gradients(params, data["x_train"][index], data["y_train"][index])
    total = add_ranks(team, {"loss": np.array(loss), "grads": grads, "cache": cache})
    loss, grads, cache = total.values()
    params, state = optimizer.step(progress.params, grads, progress.state)
    measured = np.array([loss, cache["statistics"]["measured"], 1]) * len(index)
    return progress._replace(
        params=nn.update_statistics(params, cache),
        state=state,
        step=progress.step + 1,
        sums=progress.sums + measured,
    )


def first_not_finite(net: nn.Layer, params: nn.Tree, batch: np.ndarray) -> str:
    """Where it began: the first layer whose weights or output are not finite."""
    layers: dict[str, nn.Layer] = {}
    for name, layer in layers_of(net).items():
        own = nn.tree_flatten({name: params.get(name, {})})
        for entry, array in own.items():
            if not np.isfinite(array).all():
                return f"{entry} is not finite, so its gradient was not"
        layers[name] = layer
        known = {key: value for key, value in params.items() if key in layers or key == "key"}
        output, _ = nn.sequential(**layers).forward(known, batch)
        if not np.isfinite(output).all():
            return f"the output of {name} is not finite"
    return "every output is finite"


def validate(experiment: Experiment, params: nn.Tree, part: str) -> tuple[float, float]:
    """(loss, accuracy or error) at inference, on the part "validation" or "test" of the data."""
    data, task = experiment.data, experiment.task
    output = predict(experiment.net, params, data[f"x_{part}"], experiment.team)
    return task.loss(output, data[f"y_{part}"])[0], task.measure(output, data[f"y_{part}"])


def report(experiment: Experiment, progress: Progress) -> Progress:
    """The progress with one more row, and with the best params so far."""
    options, data, task, _, _ = experiment
    epoch_steps = count_steps(len(data["x_train"]), options.batch_size)
    step = int(progress.step)
    row = [(step - 1) // epoch_steps + 1, step, *(progress.sums[:2] / progress.sums[2])]
    score = float(step)
    if len(data["x_validation"]):
        row += validate(experiment, progress.params, "validation")
        score = task.better * row[-1]
        if options.schedule == "plateau":
            progress = progress._replace(
                state=lower_rate(options, progress.state, row[-2], epoch_steps)
            )
    if score > progress.best_score:
        progress = progress._replace(best=progress.params, best_score=np.array(score))
    return progress._replace(sums=np.zeros(3), rows=np.vstack([progress.rows, row]))


def check_finite(progress: Progress) -> None:
    """ValueError for params that are not finite: such ones are never kept."""
    for name, array in nn.tree_flatten(progress.params).items():
        if not np.isfinite(array).all():
            raise ValueError(
                f"{name} is not finite after step {progress.step}, so its gradient was not;"
                " try a lower --lr"
            )


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


def train(experiment: Experiment, optimizer: nn.Optimizer, progress: Progress) -> Progress:
    """Train to the end; report, and keep what there is, as often as asked."""
    options, data, team = experiment.options, experiment.data, experiment.team
    count, first = len(data["x_train"]), int(progress.step)
    epoch_steps = count_steps(count, options.batch_size)
    report_steps = getattr(options, "report_every", epoch_steps)
    checkpoint_steps = getattr(options, "checkpoint_every", epoch_steps)
    total_steps = options.epochs * epoch_steps
    folder = getattr(options, "out", "")
    of = identity(experiment) if folder else {}
    line, started = MovingLine(), time.monotonic()
    seen, since = 0, started
    with Stop() as stop:
        for index in step_images(count, options, first):
            progress = take_step(experiment, optimizer, progress, index)
            stops = any_rank(team, stop.asked)
            step, seen, now = int(progress.step), seen + len(index), time.monotonic()
            speed = f"{seen / (now - since):,.0f} samples/s"
            reports = step % report_steps == 0 or step == total_steps
            saves = step % epoch_steps == 0 or step % checkpoint_steps == 0 or stops
            if reports or saves:
                check_finite(progress)
            if reports:
                progress = report(experiment, progress)
                row = dict(zip(columns(experiment), progress.rows[-1].tolist(), strict=True))
                line.end(f"{said(row, experiment)}  {speed}")
                keep(experiment, progress)
                seen, since = 0, time.monotonic()
            elif line.is_due():
                loss = progress.sums[0] / progress.sums[2]
                epoch = (step - 1) // epoch_steps + 1
                left = (now - started) / (step - first) * (total_steps - step)
                text = said({"epoch": epoch, "step": step, "loss": loss}, experiment)
                line.show(f"{text}  {speed}  {left:.0f} s left")
            if folder and saves:
                write_checkpoint(folder, progress, of)
            if stops:
                line.end()
                if team.communicator:
                    team.communicator.Barrier()  # no rank ends before the checkpoint is written
                then = "with --out it could be gone on with"
                if folder:
                    then = "the same command with --resume goes on from there"
                raise KeyboardInterrupt(f"interrupted after step {step} of {total_steps}; {then}")
    return progress


def lower_rate(
    options: argparse.Namespace, state: nn.Tree, loss: float, epoch_steps: int
) -> nn.Tree:
    """--schedule plateau: the optimiser's state after a look at the validation images."""
    (wait,) = getattr(options, "lr_epochs", [2])
    patience = max(round(wait * epoch_steps / getattr(options, "report_every", epoch_steps)), 1)
    return nn.reduce_on_plateau(state, loss, getattr(options, "lr_factor", 0.5), patience)


KEPT = ("model.npz", "metrics.csv", "options.json", "checkpoint.npz")  # in --out


def said(row: dict[str, float], experiment: Experiment) -> str:
    """What is printed of a report."""
    epoch, _, *names = row
    numbers = [f"{n.replace('_', ' ')} {row[n]:.{experiment.task.digits}f}" for n in names]
    return "  ".join([f"epoch {row[epoch]:.0f}/{experiment.options.epochs}", *numbers])


def keep(experiment: Experiment, progress: Progress) -> None:
    """Write metrics.csv, and model.npz if this report is of the best params, if --out asks."""
    if not hasattr(experiment.options, "out"):
        return
    folder = experiment.options.out
    if progress.best is progress.params:
        nn.save(os.path.join(folder, "model.npz"), progress.best)
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(columns(experiment))
    for epoch, step, *numbers in progress.rows.tolist():
        writer.writerow([int(epoch), int(step), *numbers])
    with nn.replacing(os.path.join(folder, "metrics.csv")) as file:
        file.write(table.getvalue().encode())


def identity(experiment: Experiment) -> dict[str, Any]:
    """What a training must share with a checkpoint to go on from it: options and data."""
    chosen = vars(experiment.options).items()
    options = {name: value for name, value in chosen if name not in NOT_OF_A_CHECKPOINT}
    options["shards"] = experiment.team.shards
    digest = hashlib.sha256()
    for name in ("x_train", "y_train", "x_validation", "y_validation"):
        digest.update(np.ascontiguousarray(experiment.data[name]).data)
    return json.loads(json.dumps({**options, "the data": digest.hexdigest()}))


def write_checkpoint(folder: str, progress: Progress, of: dict[str, Any]) -> None:
    """Write checkpoint.npz, of a training with this identity."""
    written = np.frombuffer(json.dumps(of).encode(), np.uint8)
    nn.save(os.path.join(folder, "checkpoint.npz"), {**progress._asdict(), "of": written})


def read_checkpoint(experiment: Experiment, progress: Progress) -> Progress:
    """The progress in checkpoint.npz; the one that is given where there is no such file.

    ValueError for a file that is damaged, or of a training with other options or data.
    """
    path = os.path.join(experiment.options.out, "checkpoint.npz")
    if not os.path.exists(path):
        return progress
    tree = nn.load(path)
    try:
        then, now = json.loads(tree.pop("of").tobytes()), identity(experiment)
        if then["shards"] != now["shards"]:
            print(
                f"{path}: written with {then['shards']} shards a batch, so what follows will differ"
            )
        check_identity({**then, "shards": now["shards"]}, now)
        resumed = Progress(**tree)
        for name, kind in kinds(progress).items():
            if kinds(resumed).get(name) != kind:
                raise ValueError(f"{name} is {kinds(resumed).get(name)}, expected {kind}")
        count, options = len(experiment.data["x_train"]), experiment.options
        if not 0 <= resumed.step <= options.epochs * count_steps(count, options.batch_size):
            raise ValueError(f"it is of step {resumed.step}")
    except Exception as error:
        raise ValueError(f"{path}: cannot be resumed: {error}") from None
    return resumed


def set_aside(folder: str) -> None:
    """Keep the checkpoint of an earlier training, which this one does not go on with."""
    with contextlib.suppress(FileNotFoundError):
        path = os.path.join(folder, "checkpoint.npz")
        os.replace(path, os.path.join(folder, "checkpoint.before.npz"))


def check_identity(then: dict[str, Any], now: dict[str, Any]) -> None:
    """ValueError if a checkpoint is of other options or data than these."""
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) == now.get(name):
            continue
        if name == "the data":
            raise ValueError("it is of another training: the data are others")
        before, after = (json.dumps(own[name]) if name in own else "default" for own in (then, now))
        flag = f"--{name.replace('_', '-')}"
        raise ValueError(f"it is of another training: {flag} {before} then, {after} now")


def kinds(progress: Progress) -> dict[str, tuple]:
    """{entry: (dtype, shape)} of all that a checkpoint holds, whatever the number of reports."""
    flat = nn.tree_flatten(progress._replace(rows=progress.rows[:0])._asdict())
    return {name: (str(np.asarray(leaf).dtype), np.shape(leaf)) for name, leaf in flat.items()}


@contextlib.contextmanager
def only_run(folder: str) -> Iterator[None]:
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
        for name in KEPT:
            for left in glob.glob(os.path.join(glob.escape(folder), f"{name}.*.tmp")):
                os.remove(left)
        yield


def first_params(experiment: Experiment) -> nn.Tree:
    """The params to begin with: --init, or --init-from."""
    options, net = experiment.options, experiment.net
    params, _ = net.init((options.seed, 0), experiment.data["x_train"].shape[1:])
    only = getattr(options, "train_only", [])
    for name in only:
        if name not in params:
            raise ValueError(
                f"--train-only: no layer {name} has parameters, but {', '.join(params)}"
            )
    if hasattr(options, "init_from"):
        params = start_from(options.init_from, params, only)
    return params


def trained_entries(experiment: Experiment, params: nn.Tree) -> nn.Tree:
    """The gradients of a first batch: which entries of params are trained, and their sizes."""
    _, data, task, net, _ = experiment
    x, y = data["x_train"][:2], data["y_train"][:2]
    _, grads, _ = nn.value_and_grad(net, task.loss)(nn.training(params, 0), x, y)
    only = getattr(experiment.options, "train_only", grads)
    return {name: entries for name, entries in grads.items() if name in only}


Build = Callable[[argparse.Namespace, int], nn.Layer]  # (options, outputs) -> network
Draw = Callable[[str, "Experiment", nn.Tree], None]  # (folder, experiment, params) -> pictures


def set_up(
    options: argparse.Namespace, build: Build, team: Team = Team()
) -> tuple[Experiment, str]:
    """Data, task and network of the options, and a word on where the data come from."""
    check_options(options)
    data, origin = get_data(options)
    data = prepare(data, options)
    if options.schedule == "plateau" and not len(data["x_validation"]):
        raise ValueError("--schedule plateau needs validation images, but --validation is 0")
    task = choose_task(options, data)
    return Experiment(options, data, task, build(options, task.outputs), team), origin


def describe(experiment: Experiment, origin: str, parameters: int) -> str:
    """The first line that is printed."""
    data, task = experiment.data, experiment.task
    sizes = [f"{len(data[f'x_{part}']):,} {part}" for part in ("train", "validation", "test")]
    what = f"images of {as_shape(data['x_train'])}, {task.outputs} classes"
    if experiment.options.task == "sine":
        what = "points"
    return (
        f"{origin}: {sizes[0]}ing, {sizes[1]} and {sizes[2]} {what};"
        f" {parameters:,} parameters to train"
    )


def run(
    options: argparse.Namespace, setting: dict[str, str], build: Build, draw: Draw, shards: int
) -> None:
    """Everything from the data to the last line."""
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        team = stack.enter_context(assembled(options, shards))
        if team.rank:  # rank 0 alone reports and writes
            silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(silence))
            kept = {name: v for name, v in vars(options).items() if name not in ("out", "plot")}
            options = argparse.Namespace(**{**kept, "resume": False, "summary": False})
        with one_rank_first(team):
            check_options(options)
            if hasattr(options, "out"):
                stack.enter_context(only_run(options.out))
            experiment, origin = set_up(options, build, team)
        check_same(team, experiment)
        said = run_alone(experiment, origin, setting, draw)
        print(f"{said} seconds={time.monotonic() - started:.1f}")


def run_alone(experiment: Experiment, origin: str, setting: dict[str, str], draw: Draw) -> str:
    """The same with the folder of --out to itself; gives the last line but for its time."""
    options, team = experiment.options, experiment.team
    params = first_params(experiment)
    trained = trained_entries(experiment, params)
    if options.summary:
        print(summary(experiment.net, params, trained, experiment.data["x_train"][:1]))
    print(describe(experiment, origin, nn.count_parameters(trained)))
    print(describe_team(team), flush=True)
    steps = count_steps(len(experiment.data["x_train"]), options.batch_size)
    optimizer = choose_optimizer(options, steps)
    progress = begin(experiment, optimizer, params)
    if options.resume:
        progress = read_checkpoint(experiment, progress)
    if team.communicator:
        progress = team.communicator.bcast(progress)
    if hasattr(options, "out"):
        if not options.resume:
            set_aside(options.out)
        with nn.replacing(os.path.join(options.out, "options.json")) as file:
            file.write(json.dumps(setting, indent=1).encode())
    with np.errstate(all="ignore"):  # a loss that is not finite is an error of its own
        progress = train(experiment, optimizer, progress)
    loss, measured = validate(experiment, progress.best, "test")
    if hasattr(options, "plot"):
        folder = picture_folder(options)
        if len(progress.rows):
            rows = [dict(zip(columns(experiment), row, strict=True)) for row in progress.rows]
            plot_curves(os.path.join(folder, "curves.png"), {"": rows}, as_text(setting))
        draw(folder, experiment, progress.best)
    task = experiment.task
    return f"test_{task.name}={measured:.{task.digits}f} test_loss={loss:.{task.digits}f}"


def start(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    build: Build,
    draw: Draw,
    shards: int = 1,
) -> int:
    """A script from its command line to its exit code; so many shards by default."""
    options, setting = parse(parser, arguments)
    if hasattr(options, "compare"):
        return guarded(parser.prog, partial(compare, options))
    work = partial(run, options, setting, build, draw, shards)
    return together(parser.prog, work) if options.mpi else guarded(parser.prog, work)


def guarded(name: str, function: Callable[[], None]) -> int:
    """The exit code of a script: a user's mistake is one line, not a traceback."""
    try:
        function()
    except KeyboardInterrupt as interrupt:
        print(f"\n{name}: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError) as error:
        reason = " ".join(str(error).splitlines()) or "not enough memory"
        print(f"{name}: error: {reason}", file=sys.stderr)
        return 2
    return 0


def together(name: str, function: Callable[[], None]) -> int:
    """`guarded` on every rank: where one fails, it says so and all end, and none waits for ever."""
    try:
        last = world().Dup()  # of its own, where no rank waits for anything else
    except ValueError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    code, rank, said = 1, last.Get_rank(), io.StringIO()
    with contextlib.redirect_stderr(said) if rank else contextlib.nullcontext():
        try:
            code = guarded(f"{name}: rank {rank}" if rank else name, function)
        except BaseException:
            traceback.print_exc()
    if code:
        everyone, deadline = last.Ibarrier(), time.monotonic() + 1
        while not everyone.Test():  # where all failed alike, rank 0 has said why
            if time.monotonic() > deadline:
                print(said.getvalue(), end="", file=sys.stderr, flush=True)
                last.Abort(code)
            time.sleep(0.01)
    return code


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into files. ValueError if it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def without_formulas(text: str) -> str:
    """The text for a picture, where what stands between two dollars would be read as TeX."""
    return text.replace("$", r"\$")


def drawable(names: list[str]) -> list[str]:
    """The names, with a font that can draw them chosen; their numbers where there is none."""
    rc_params = pyplot().rcParams
    from matplotlib import font_manager

    characters = set("".join(names))
    fonts: list[Any] = [font_manager.findfont("DejaVu Sans")]
    fonts += [font.fname for font in font_manager.fontManager.ttflist]
    for path in fonts:
        font = font_manager.get_font(path)
        if font.family_name.startswith("Last Resort"):
            continue  # comes with matplotlib and has a box for every character
        if all(font.get_char_index(ord(character)) for character in characters):
            rc_params["font.family"] = ["DejaVu Sans", font.family_name]
            return [without_formulas(name) for name in names]
    return [str(number) for number in range(len(names))]


CURVES = {"loss": "loss", "accuracy": "accuracy", "error": "mean absolute error"}


def plot_curves(path: str, runs: dict[str, list[dict[str, float]]], title: str) -> None:
    """Loss and accuracy (or error) by step, in training and validation, of every {label: rows}."""
    quantities = [name for name in next(iter(runs.values()))[0] if name in CURVES]
    figure, panels = pyplot().subplots(1, 2, figsize=(11, 5), layout="constrained")
    for number, (label, rows) in enumerate(runs.items()):
        steps = [row["step"] for row in rows]
        look = {"color": f"C{number % 10}", "marker": "." if len(rows) <= 30 else ""}
        for part, prefix, style in (("training", "", "--"), ("validation", "validation_", "-")):
            if f"{prefix}loss" not in rows[0]:
                continue
            name = f"{without_formulas(label)}, {part}" if label else part
            look |= {"linestyle": style, "label": name}
            for panel, quantity in zip(panels, quantities, strict=True):
                panel.plot(steps, [row[prefix + quantity] for row in rows], **look)
    for panel, quantity in zip(panels, quantities, strict=True):
        bottom, top = panel.dataLim.intervaly
        if 0 < 10 * bottom < top and quantity != "accuracy":
            panel.set_yscale("log")
        panel.set(xlabel="step", ylabel=CURVES[quantity])
        panel.grid(alpha=0.3, which="both")
    handles, labels = panels[0].get_legend_handles_labels()
    columns = max(1, min(4, 140 // (max(map(len, labels)) + 8)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    figure.suptitle(textwrap.fill(without_formulas(title), 120), fontsize="medium")
    figure.savefig(path, dpi=120)
    pyplot().close(figure)


def open_text(path: str) -> io.TextIOWrapper:
    """A text file, open for reading. ValueError for what is there but no file: a pipe may hang."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is not a file")
    return open(path, newline="", encoding="utf-8")


def read_run(folder: str) -> tuple[dict[str, str], list[dict[str, float]]]:
    """(setting, rows) of a run that was kept with --out."""
    path = os.path.join(folder, "options.json")
    try:
        with open_text(path) as file:
            setting = {str(flag): str(value) for flag, value in json.load(file).items()}
        path = os.path.join(folder, "metrics.csv")
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
    except (ValueError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path}: is not what --out writes: {error}") from None
    return setting, rows


def compare(options: argparse.Namespace) -> None:
    """compare.png: the curves of the runs of --compare, each called by what is its own."""
    runs = [read_run(folder) for folder in options.compare]
    if len({tuple(rows[0])[:4] for _, rows in runs}) > 1:
        raise ValueError("--compare: these runs measured different things")
    settings = [setting.items() for setting, _ in runs]
    common = set.intersection(*map(set, settings))
    labels = [
        as_text({f: v for f, v in own if (f, v) not in common}) or "default" for own in settings
    ]
    if len(set(labels)) < len(labels):  # the same setting twice
        labels = [os.path.normpath(folder) for folder in options.compare]
    title = as_text({flag: value for flag, value in settings[0] if (flag, value) in common})
    os.makedirs(picture_folder(options), exist_ok=True)
    path = os.path.join(picture_folder(options), "compare.png")
    plot_curves(path, {label: rows for label, (_, rows) in zip(labels, runs, strict=True)}, title)
    print(f"{path}: {len(runs)} runs")


def as_pictures(images: np.ndarray) -> np.ndarray:
    """images (N, C, H, W) as (N, H, W, 3), or their mean over C as (N, H, W) where C is not 3."""
    if images.shape[1] == 3:
        return np.moveaxis(images, 1, -1)
    return images.mean(axis=1)


def plot_grid(path: str, images: np.ndarray, title: str, titles: Sequence[str] = ()) -> None:
    """Up to 64 images (N, H, W) or (N, H, W, 3) beside each other, in one range of grey.

    Where there are negative values, zero is in its middle: these are weights.
    """
    images = images[:64]
    columns = math.ceil(math.sqrt(len(images)))
    lines = math.ceil(len(images) / columns)
    side = max(1.0, 5 / columns)
    figure, panels = pyplot().subplots(
        lines,
        columns,
        figsize=(columns * side, lines * (side + 0.25 * bool(titles)) + 0.5),
        layout="constrained",
        squeeze=False,
    )
    high = float(np.abs(images).max()) or 1.0
    low = -high if images.min() < 0 else 0.0
    for panel in panels.flat:
        panel.axis("off")
    for panel, image in zip(panels.flat, images, strict=False):
        panel.imshow((image - low) / (high - low), cmap="gray", vmin=0, vmax=1)
    for panel, text in zip(panels.flat, titles, strict=False):
        panel.set_title(text, fontsize="medium", pad=2)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot().close(figure)


def plot_maps(path: str, maps: Sequence[tuple[str, np.ndarray]]) -> None:
    """One line of pictures for each (name, (C, H, W)): its first 16 channels."""
    columns = min(16, max(len(channels) for _, channels in maps))
    figure, panels = pyplot().subplots(
        len(maps),
        columns,
        figsize=(columns * 0.8 + 1, len(maps) * 0.9),
        layout="constrained",
        squeeze=False,
    )
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
        panel.set_frame_on(False)
    for line, (name, channels) in zip(panels, maps, strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for panel, channel in zip(line, channels, strict=False):
            panel.imshow(channel, cmap="gray")
    figure.savefig(path, dpi=120)
    pyplot().close(figure)


def plot_confusion(path: str, predicted: np.ndarray, labels: np.ndarray, names: Sequence) -> None:
    """How many images of each class (down) were taken for which (across)."""
    classes = len(names)
    counts = np.bincount(labels * classes + predicted, minlength=classes**2)
    counts = counts.reshape(classes, classes)
    side = max(4.0, 0.5 * classes + 1)
    figure, panel = pyplot().subplots(figsize=(side, side), layout="constrained")
    wrong = counts * (1 - np.eye(classes, dtype=int))
    panel.imshow(wrong, cmap="Reds", vmax=max(int(wrong.max()), 1))  # the right ones left white
    if classes <= 30:
        for (label, prediction), number in np.ndenumerate(counts):
            dark = wrong[label, prediction] > 0.6 * wrong.max() > 0
            color = "white" if dark else "black" if number else "lightgray"
            panel.text(prediction, label, number, ha="center", va="center", fontsize=8, color=color)
        panel.set_xticks(range(classes), names, rotation=90 if max(map(len, names)) > 3 else 0)
        panel.set_yticks(range(classes), names)
    right = counts.trace() / max(counts.sum(), 1)
    panel.set(xlabel="predicted", ylabel="class", title=f"test images, {right:.2%} right")
    figure.savefig(path, dpi=120)
    pyplot().close(figure)


def draw_mistakes(folder: str, experiment: Experiment, params: nn.Tree) -> None:
    """confusion.png, and mistakes.png: test images taken for another class."""
    data, names = experiment.data, drawable(experiment.data["classes"].tolist())
    logits, labels = predict(experiment.net, params, data["x_test"]), data["y_test"]
    predicted = logits.argmax(axis=1)
    plot_confusion(os.path.join(folder, "confusion.png"), predicted, labels, names)
    (wrong,) = np.nonzero(predicted != labels)
    if not len(wrong):
        return
    logits = logits[wrong]
    lead = logits.max(axis=1) - logits[np.arange(len(wrong)), labels[wrong]]
    worst = wrong[np.argsort(-lead, kind="stable")][:40]
    titles = [f"{names[labels[i]]} \N{RIGHTWARDS ARROW} {names[predicted[i]]}" for i in worst]
    title = f"{len(wrong):,} of {len(labels):,} test images taken for another class"
    if len(wrong) > len(worst):
        title += f"; the {len(worst)} furthest off"
    path = os.path.join(folder, "mistakes.png")
    plot_grid(path, as_pictures(data["x_test"][worst]), title, titles)


# ------------------------------------------------------------------------------------------------
# The multilayer perceptron
# ------------------------------------------------------------------------------------------------


def hidden_layers(options: argparse.Namespace) -> dict[str, nn.Layer]:
    """Linear, batch norm, activation and dropout for each number of --hidden, by name."""
    layers: dict[str, nn.Layer] = {}
    if options.input_dropout:
        layers["drop0"] = nn.dropout(options.input_dropout)
    for index, units in enumerate(options.hidden, start=1):
        layers[f"hidden{index}"] = nn.linear(
            units, initialiser(options), bias=not options.batch_norm
        )
        if options.batch_norm:
            layers[f"norm{index}"] = nn.batch_norm()
        layers[f"act{index}"] = ACTIVATIONS[options.activation]()
        if options.dropout:
            layers[f"drop{index}"] = nn.dropout(options.dropout)
    return layers


def build_mlp(options: argparse.Namespace, outputs: int) -> nn.Layer:
    """flatten, the hidden layers, and one linear layer with a unit for each class or value."""
    out = nn.linear(outputs, initialiser(options))
    return nn.sequential(flatten=nn.flatten(), **hidden_layers(options), out=out)


def draw_mlp(folder: str, experiment: Experiment, params: nn.Tree) -> None:
    """weights.png: what each unit of the first layer looks for; or, with --task sine, fit.png."""
    if experiment.options.task == "sine":
        return draw_fit(folder, experiment, params)
    shape = experiment.data["x_train"].shape[1:]
    first = params["hidden1" if "hidden1" in params else "out"]["W"]
    units = as_pictures(first.T.reshape(-1, *shape))
    plot_grid(os.path.join(folder, "weights.png"), units, "weights of the first layer")
    return draw_mistakes(folder, experiment, params)


def draw_fit(folder: str, experiment: Experiment, params: nn.Tree) -> None:
    """fit.png: the curve, what the network makes of it, and the difference."""
    x, y = experiment.data["x_test"], experiment.data["y_test"]
    output = predict(experiment.net, params, x)
    figure, (above, below) = pyplot().subplots(
        2, 1, figsize=(7, 6), height_ratios=(2, 1), sharex=True, layout="constrained"
    )
    above.plot(x, y, color="lightgray", linewidth=6, label="y = sin x")
    above.plot(x, output, color="C3", linewidth=1.5, label="network")
    above.set(ylabel="y")
    above.legend()
    below.plot(x, output - y, color="C3", linewidth=1)
    below.axhline(0, color="gray", linewidth=0.5)
    below.set(xlabel="x", ylabel="network - sin x")
    below.ticklabel_format(axis="y", scilimits=(0, 0))
    for panel in (above, below):
        panel.grid(alpha=0.3)
    above.set_title(f"mean absolute error {mean_error(output, y):.2g} at {len(x):,} points")
    figure.savefig(os.path.join(folder, "fit.png"), dpi=120)
    pyplot().close(figure)


def command_line() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = new_parser(str(__doc__).split("\n\n")[0])
    add_network_options(parser, hidden=[512, 512])
    parser.add_argument(
        "--task",
        choices=["classes", "sine"],
        default="classes",
        help="classify images; or fit y = sin x on (-pi/2, pi/2), with defaults of its own:"
        " three hidden layers of 50 with gelu, mean squared error, no batch norm or dropout",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, train, report; gives the exit code."""
    return start(command_line(), arguments, build_mlp, draw_mlp)


if __name__ == "__main__":
    sys.exit(main())
