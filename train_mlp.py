"""Train a multilayer perceptron on MNIST, on your own images, or on digits that purenn draws.

    python train_mlp.py --hidden 512 256 --epochs 10 --out runs/first --plot

What a script for another kind of network needs as well (options, data, the loop, the report,
pictures) is written so that it can be imported from here: see `main`, which is short.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

import purenn as nn

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
    "normal": nn.normal(0.02),
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
LOSSES = {  # those on class numbers; the others compare with a row that is 1 at the class
    "cross-entropy": nn.softmax_cross_entropy,
    "hinge": nn.hinge,
}
ROW_LOSSES = {
    "mse": nn.mean_squared_error,
    "mae": nn.mean_absolute_error,
    "huber": nn.huber,
    "bce": nn.binary_cross_entropy,
}
SCHEDULES = (
    "constant",
    "step",
    "multistep",
    "exponential",
    "cosine",
    "cyclic",
    "one-cycle",
    "plateau",
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


# argparse names the type in its message: "invalid whole number value: 'x'".
count = partial(whole, 1)
count.__name__ = "whole number"  # type: ignore[attr-defined]
count_or_zero = partial(whole, 0)
count_or_zero.__name__ = "whole number"  # type: ignore[attr-defined]
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
        help="folder with MNIST-style IDX files (.gz or not) or a Keras-style .npz, or the .npz"
        " itself; 'builtin' for digits that purenn draws (default: data/mnist, downloaded into"
        " it if it is not there; without a network the digits that purenn draws)",
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
        "--augment",
        metavar="KIND=AMOUNT",
        nargs="*",
        type=augmentation,
        default=argparse.SUPPRESS,
        help="change every training image by chance at every use: shift=PIXELS, rotation=DEGREES,"
        " scale=SHARE, stretch=SHARE, elastic=PIXELS; those named and no other, without any"
        " shift=2 rotation=10 scale=0.1 stretch=0.1",
    )
    training = parser.add_argument_group("training")
    training.add_argument(
        "--epochs", metavar="N", type=count, default=20, help="rounds of training"
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
        "--schedule",
        choices=SCHEDULES,
        default="one-cycle",
        help="learning rate by step: constant; step: x 0.1 after each third; multistep: x 0.1 at"
        " 1/2 and 3/4; exponential: down to 1 %%; cosine: down to 0; cyclic: up from a tenth and"
        " down again, every four epochs; one-cycle: up for 30 %%, then down to 0; plateau: halved"
        " when the validation loss has not fallen for 2 epochs",
    )
    training.add_argument(
        "--weight-decay", metavar="D", type=not_negative, default=0.0, help="L2 in the update rule"
    )
    training.add_argument(
        "--loss", choices=[*LOSSES, *ROW_LOSSES], default="cross-entropy", help="what is minimised"
    )
    training.add_argument(
        "--label-smoothing",
        metavar="S",
        type=fraction,
        default=argparse.SUPPRESS,
        help="share of each target that is spread over all classes (default: 0.1 with"
        " cross-entropy, the one loss that takes it)",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        metavar="DIR",
        default=argparse.SUPPRESS,
        help="keep model.npz (best epoch) and metrics.csv in this folder",
    )
    output.add_argument(
        "--plot",
        metavar="DIR",
        nargs="?",
        const="",
        default=argparse.SUPPRESS,
        help="draw curves, weights or kernels and feature maps, and the confusion matrix (needs"
        " matplotlib) into this folder; without a folder into that of --out, else plots",
    )
    return parser


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


def choose_loss(options: argparse.Namespace, classes: int) -> Callable:
    """The loss of the options, as a function of (logits, class numbers)."""
    if options.loss in ROW_LOSSES:
        return partial(loss_on_rows, loss=ROW_LOSSES[options.loss], classes=classes)
    if options.loss == "cross-entropy":
        smoothing = getattr(options, "label_smoothing", 0.1)
        return partial(nn.softmax_cross_entropy, smoothing=smoothing)
    return LOSSES[options.loss]


def loss_on_rows(
    prediction: np.ndarray, labels: np.ndarray, *, loss: Callable, classes: int
) -> tuple[float, np.ndarray]:
    """A loss that compares with rows of numbers: 1 for the class, 0 for the others."""
    return loss(prediction, np.eye(classes, dtype=prediction.dtype)[labels])


def choose_schedule(name: str, lr: float, epochs: int, epoch: int) -> Any:
    """The learning rate by step, for `epochs` of `epoch` steps each."""
    steps = epochs * epoch
    if name == "step":
        return nn.step_decay(lr, max(steps // 3, 1))
    if name == "multistep":
        return nn.multistep(lr, [steps // 2, steps * 3 // 4])
    if name == "exponential":
        return nn.exponential(lr, 0.01 ** (1 / steps))
    if name == "cosine":
        return nn.cosine(lr, steps)
    if name == "cyclic":
        return nn.cyclic(lr / 10, lr, 2 * epoch)
    if name == "one-cycle":
        return nn.one_cycle(lr, steps)
    return lr


def choose_optimizer(options: argparse.Namespace, steps_per_epoch: int) -> nn.Optimizer:
    """The optimiser of the options, with its schedule."""
    constructor, lr, takes_momentum = OPTIMISERS[options.optimizer]
    lr = getattr(options, "lr", lr)
    rate = choose_schedule(options.schedule, lr, options.epochs, steps_per_epoch)
    extra = {"weight_decay": options.weight_decay}
    if takes_momentum:
        extra["momentum"] = getattr(options, "momentum", 0.9 if options.optimizer == "sgd" else 0)
    return constructor(rate, **extra)


def choose_augmentation(options: argparse.Namespace) -> Callable | None:
    """The function (key, images) -> images of --augment, or None without it."""
    if not hasattr(options, "augment"):
        return None
    if not options.augment:
        return nn.augment
    return partial(nn.augment, **{**dict.fromkeys(AUGMENTATIONS, 0.0), **dict(options.augment)})


def check_options(options: argparse.Namespace) -> None:
    """ValueError for options that contradict each other, before anything is done."""
    augment = choose_augmentation(options)
    if augment:
        augment(0, np.zeros((1, 1, 2, 2), np.float32))  # refuses amounts that make no sense
    if hasattr(options, "label_smoothing") and options.loss != "cross-entropy":
        raise ValueError(f"--label-smoothing goes with --loss cross-entropy, not {options.loss}")
    if hasattr(options, "momentum") and not OPTIMISERS[options.optimizer][2]:
        raise ValueError(f"--momentum goes with sgd or rmsprop, not {options.optimizer}")
    if hasattr(options, "plot"):
        pyplot()
    if hasattr(options, "out"):
        os.makedirs(options.out, exist_ok=True)


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


def get_data(source: str | None) -> tuple[dict[str, np.ndarray], str]:
    """The data set that --data asks for, and a word on where it comes from."""
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


def split_off(
    data: dict[str, np.ndarray], size: int | None, seed: int
) -> tuple[dict[str, np.ndarray], int]:
    """Hold out `size` random training images as "x_validation" and "y_validation"."""
    available = len(data["x_train"])
    if size is None:
        size = min(5_000, available // 10)
    if size >= available:
        raise ValueError(f"--validation {size} leaves none of the {available} images to train on")
    order = np.concatenate(list(nn.batches(available, available, (seed, 3))))
    held_out, rest = np.sort(order[:size]), np.sort(order[size:])
    parts = {
        f"{name}_{part}": data[f"{name}_train"][index]
        for part, index in (("validation", held_out), ("train", rest))
        for name in ("x", "y")
    }
    return {**data, **parts}, size


# ------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------


class MovingLine:
    """One line on a terminal that is written again and again; silent in a file or a pipe."""

    def __init__(self) -> None:
        self.moves = sys.stdout.isatty()
        self.length = 0
        self.due = 0.0

    def show(self, text: str, important: bool = False) -> None:
        """Replace the line, at most ten times a second."""
        if self.moves and (important or time.monotonic() >= self.due):
            print("\r" + text.ljust(self.length), end="", flush=True)
            self.length, self.due = len(text), time.monotonic() + 0.1

    def end(self, text: str = "") -> None:
        """Replace the line for good; in a file or a pipe this is all that is printed."""
        if self.length or text:
            print(("\r" if self.length else "") + text.ljust(self.length), flush=True)
        self.length = 0


def predict(net: nn.Layer, params: nn.Tree, images: np.ndarray) -> np.ndarray:
    """The logits at inference, computed 250 images at a time."""
    parts = [images[start : start + 250] for start in range(0, len(images), 250)]
    return np.concatenate([net.forward(params, part)[0] for part in parts])


def evaluate(
    net: nn.Layer, params: nn.Tree, loss: Callable, images: np.ndarray, labels: np.ndarray
) -> tuple[float, float]:
    """(mean loss, accuracy) at inference."""
    logits = predict(net, params, images)
    return loss(logits, labels)[0], nn.accuracy(logits, labels)


def train(
    net: nn.Layer,
    params: nn.Tree,
    optimizer: nn.Optimizer,
    loss: Callable,
    data: dict[str, np.ndarray],
    options: argparse.Namespace,
) -> tuple[nn.Tree, list[dict[str, float]]]:
    """Train, report every epoch, and give the params of the best one and all that was measured.

    The best epoch is that with the highest validation accuracy; without validation, the last.
    """
    state = optimizer.init(params)
    images, labels = data["x_train"], data["y_train"]
    augment = choose_augmentation(options)
    best, best_score, rows = params, -1.0, []
    line = MovingLine()
    step, started = 0, time.monotonic()
    total_steps = options.epochs * math.ceil(len(images) / options.batch_size)
    for epoch in range(1, options.epochs + 1):
        epoch_started, seen, sum_loss, right = time.monotonic(), 0, 0.0, 0.0
        for index in nn.batches(len(images), options.batch_size, (options.seed, 1, epoch)):
            if len(index) == 1 < options.batch_size:
                continue  # what is left over at the end; batch norm cannot train on one image
            batch, target = images[index], labels[index]
            if augment:
                batch = augment((options.seed, 4, step), batch)
            logits, cache = net.forward(nn.training(params, (options.seed, 2, step)), batch)
            value, dlogits = loss(logits, target)
            if not math.isfinite(value):
                raise ValueError(
                    f"the loss became {value} in epoch {epoch}, step {step}; try a lower --lr"
                )
            _, grads = net.backward(params, cache, dlogits, need_dx=False)
            params, state = optimizer.step(params, grads, state)
            params = nn.update_statistics(params, cache)
            step += 1
            seen += len(index)
            sum_loss += value * len(index)
            right += nn.accuracy(logits, target) * len(index)
            elapsed = time.monotonic() - started
            line.show(
                f"epoch {epoch}/{options.epochs}  loss {sum_loss / seen:.4f}"
                f"  {seen / (time.monotonic() - epoch_started):,.0f} samples/s"
                f"  {elapsed / step * (total_steps - step):.0f} s left"
            )
        row = {"epoch": epoch, "step": step, "loss": sum_loss / seen, "accuracy": right / seen}
        seconds = time.monotonic() - epoch_started
        text = f"epoch {epoch}/{options.epochs}  loss {row['loss']:.4f}"
        text += f"  accuracy {row['accuracy']:.4f}"
        if len(data.get("x_validation", ())):
            parts = data["x_validation"], data["y_validation"]
            row["validation_loss"], row["validation_accuracy"] = evaluate(net, params, loss, *parts)
            text += (
                f"  validation loss {row['validation_loss']:.4f}"
                f"  accuracy {row['validation_accuracy']:.4f}"
            )
            if options.schedule == "plateau":
                state = nn.reduce_on_plateau(state, row["validation_loss"], patience=2)
        rows.append(row)
        score = row.get("validation_accuracy", float(epoch))
        if score > best_score:
            best, best_score = params, score
            keep(options, best)
        line.end(f"{text}  {seen / seconds:,.0f} samples/s")
    return best, rows


def keep(options: argparse.Namespace, params: nn.Tree) -> None:
    """Write the model, if --out asks for it."""
    if hasattr(options, "out"):
        nn.save(os.path.join(options.out, "model.npz"), params)


def write_metrics(path: str, rows: list[dict[str, float]]) -> None:
    """One line an epoch, in the order of the epochs."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def run(
    options: argparse.Namespace,
    build: Callable[[argparse.Namespace, int], nn.Layer],
    pictures: Callable[[str, nn.Layer, nn.Tree, dict[str, np.ndarray]], None],
) -> None:
    """Everything from the data to the last line; `build(options, classes)` makes the network."""
    started = time.monotonic()
    check_options(options)
    data, origin = get_data(getattr(options, "data", None))
    classes = int(data["y_train"].max()) + 1
    data, held_out = split_off(data, getattr(options, "validation", None), options.seed)
    if options.schedule == "plateau" and not held_out:
        raise ValueError("--schedule plateau needs validation images, but --validation is 0")
    shape = data["x_train"].shape[1:]
    net = build(options, classes)
    params, _ = net.init((options.seed, 0), shape)
    loss = choose_loss(options, classes)
    first = nn.training(params, 0), data["x_train"][:2], data["y_train"][:2]
    trained = nn.value_and_grad(net, loss)(*first)[1]
    print(
        f"{origin}: {len(data['x_train']):,} training, {held_out:,} validation and"
        f" {len(data['x_test']):,} test images of {'x'.join(map(str, shape))}, {classes} classes;"
        f" {nn.count_parameters(trained):,} parameters to train",
        flush=True,
    )
    steps = math.ceil(len(data["x_train"]) / options.batch_size)
    best, rows = train(net, params, choose_optimizer(options, steps), loss, data, options)
    if hasattr(options, "out"):
        write_metrics(os.path.join(options.out, "metrics.csv"), rows)
    logits, labels = predict(net, best, data["x_test"]), data["y_test"]
    if hasattr(options, "plot"):
        folder = options.plot or getattr(options, "out", "plots")
        os.makedirs(folder, exist_ok=True)
        plot_curves(os.path.join(folder, "curves.png"), rows)
        pictures(folder, net, best, data)
        predicted = logits.argmax(axis=1)
        plot_confusion(os.path.join(folder, "confusion.png"), predicted, labels, classes)
    test_loss, test_accuracy = loss(logits, labels)[0], nn.accuracy(logits, labels)
    seconds = time.monotonic() - started
    print(f"test_accuracy={test_accuracy:.4f} test_loss={test_loss:.4f} seconds={seconds:.1f}")


def guarded(name: str, function: Callable[[], None]) -> int:
    """The exit code of a script: a user's mistake is one line, not a traceback."""
    try:
        function()
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, MemoryError) as error:
        print(f"{name}: error: {str(error) or 'not enough memory'}", file=sys.stderr)
        return 2
    return 0


# ------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into files. ValueError if it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def plot_curves(path: str, rows: list[dict[str, float]]) -> None:
    """Loss and accuracy by epoch, of training and validation."""
    figure, panels = pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, quantity in zip(panels, ("loss", "accuracy"), strict=True):
        for name, label in ((quantity, "training"), (f"validation_{quantity}", "validation")):
            if name in rows[0]:
                values = [row[name] for row in rows]
                panel.plot([row["epoch"] for row in rows], values, marker=".", label=label)
        panel.set(xlabel="epoch", ylabel=quantity)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=120)
    pyplot().close(figure)


def as_pictures(images: np.ndarray) -> np.ndarray:
    """images (N, C, H, W) as (N, H, W, 3), or their mean over C as (N, H, W) where C is not 3."""
    if images.shape[1] == 3:
        return np.moveaxis(images, 1, -1)
    return images.mean(axis=1)


def plot_grid(path: str, images: np.ndarray, title: str) -> None:
    """Up to 64 images (N, H, W) or (N, H, W, 3) beside each other, zero in the middle of grey."""
    images = images[:64]
    columns = math.ceil(math.sqrt(len(images)))
    lines = math.ceil(len(images) / columns)
    figure, panels = pyplot().subplots(
        lines, columns, figsize=(columns, lines + 0.4), layout="constrained", squeeze=False
    )
    limit = float(np.abs(images).max()) or 1.0
    for panel in panels.flat:
        panel.axis("off")
    for panel, image in zip(panels.flat, images, strict=False):
        if image.ndim == 3:
            panel.imshow(0.5 + 0.5 * image / limit)
        else:
            panel.imshow(image, cmap="gray", vmin=-limit, vmax=limit)
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


def plot_confusion(path: str, predicted: np.ndarray, labels: np.ndarray, classes: int) -> None:
    """How many images of each class (down) were taken for which (across)."""
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
        panel.set(xticks=range(classes), yticks=range(classes))
    right = counts.trace() / max(counts.sum(), 1)
    panel.set(xlabel="predicted", ylabel="class", title=f"test images, {right:.2%} right")
    figure.savefig(path, dpi=120)
    pyplot().close(figure)


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
            units, INITIALISERS[options.init], bias=not options.batch_norm
        )
        if options.batch_norm:
            layers[f"norm{index}"] = nn.batch_norm()
        layers[f"act{index}"] = ACTIVATIONS[options.activation]()
        if options.dropout:
            layers[f"drop{index}"] = nn.dropout(options.dropout)
    return layers


def build_mlp(options: argparse.Namespace, classes: int) -> nn.Layer:
    """flatten, the hidden layers, and one linear layer with a unit for each class."""
    out = nn.linear(classes, INITIALISERS[options.init])
    return nn.sequential(flatten=nn.flatten(), **hidden_layers(options), out=out)


def draw_mlp(folder: str, net: nn.Layer, params: nn.Tree, data: dict[str, np.ndarray]) -> None:
    """weights.png: what each unit of the first layer looks for."""
    shape = data["x_train"].shape[1:]
    first = params["hidden1" if "hidden1" in params else "out"]["W"]
    units = as_pictures(first.T.reshape(-1, *shape))
    plot_grid(os.path.join(folder, "weights.png"), units, "weights of the first layer")


def command_line() -> argparse.ArgumentParser:
    """The options of this script."""
    parser = new_parser(str(__doc__).split("\n\n")[0])
    add_network_options(parser, hidden=[512, 512])
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, train, report; gives the exit code."""
    parser = command_line()
    options = parser.parse_args(arguments)
    return guarded(parser.prog, partial(run, options, build_mlp, draw_mlp))


if __name__ == "__main__":
    sys.exit(main())
