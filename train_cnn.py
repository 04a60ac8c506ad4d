"""Train a convolutional network on MNIST, on your own images, or on synthetic digits.

    python train_cnn.py --channels 32 64 --kernel 3 --epochs 10 --augment --out runs/first --plot

Here are the network and its pictures. What is the same for every network is in training/, and any
script can use it as this one does: how a step is taken stands in `take_step` of training/loop.py.
"""

from __future__ import annotations

# First of all: BLAS reads how many threads it may have when NumPy is imported.
import training.one_thread  # noqa: F401  # isort: skip

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import purenn as nn
from training import run
from training.choices import initializer
from training.command_line import count, option, with_default
from training.loop import Experiment
from training.options import ACTIVATIONS, Options
from training.pictures import as_pictures, draw_mistakes, plot_grid, plot_maps
from training.prediction import layer_outputs, predict

POOLS = {"max": nn.max_pool2d, "average": nn.avg_pool2d}
network_option = partial(option, group="network")


@dataclass(frozen=True)
class CNNOptions(Options):
    """The options of every script, and those about convolutions."""

    default_shards: ClassVar[int] = 2
    needs_images: ClassVar[bool] = True
    epochs: int = with_default(Options, "epochs", 9)
    hidden: tuple[int, ...] = with_default(Options, "hidden", (128,))
    channels: tuple[int, ...] = network_option(
        "channels per stage: convolution, batch norm, activation, and a pool at its end",
        default=(24, 48),
        metavar="N",
        type=count,
        nargs="*",
    )
    convolutions: int = network_option("convolutions per stage", default=1, metavar="N", type=count)
    kernel: int = network_option("kernel size in pixels", default=5, metavar="N", type=count)
    pool: int = network_option(
        "pool size in pixels; 1 for none", default=2, metavar="N", type=count
    )
    pooling: str = network_option("what a pool computes", default="max", choices=POOLS)


def convolutions(options: CNNOptions) -> dict[str, nn.Layer]:
    """For each number of --channels: convolution, batch norm, activation, and a pool at the end."""
    if options.convolutions * len(options.channels) > 1_000:
        raise ValueError(f"--convolutions {options.convolutions}: these are more than 1,000 layers")
    init, bias = initializer(options), not options.batch_norm
    layers: dict[str, nn.Layer] = {}
    for stage, channels in enumerate(options.channels, start=1):
        for repeat in range(1, options.convolutions + 1):
            name = f"{stage}_{repeat}" if options.convolutions > 1 else f"{stage}"
            layers[f"conv{name}"] = nn.conv2d(
                channels, options.kernel, padding="same", init=init, bias=bias
            )
            if options.batch_norm:
                layers[f"convnorm{name}"] = nn.batch_norm()
            layers[f"convact{name}"] = ACTIVATIONS[options.activation]()
        if options.pool > 1:
            layers[f"pool{stage}"] = POOLS[options.pooling](options.pool)
    return layers


def hidden_layers(options: CNNOptions) -> dict[str, nn.Layer]:
    """For each number of --hidden: linear, batch norm, activation and dropout."""
    init, bias = initializer(options), not options.batch_norm
    layers: dict[str, nn.Layer] = {}
    if options.input_dropout:
        layers["drop0"] = nn.dropout(options.input_dropout)
    for index, units in enumerate(options.hidden, start=1):
        layers[f"hidden{index}"] = nn.linear(units, init=init, bias=bias)
        if options.batch_norm:
            layers[f"norm{index}"] = nn.batch_norm()
        layers[f"act{index}"] = ACTIVATIONS[options.activation]()
        if options.dropout:
            layers[f"drop{index}"] = nn.dropout(options.dropout)
    return layers


def build_cnn(options: CNNOptions, outputs: int) -> nn.Layer:
    """The convolutions, flatten, hidden layers, and one linear layer with a unit for each class."""
    layers = {**convolutions(options), "flatten": nn.flatten(), **hidden_layers(options)}
    return nn.sequential(**layers, out=nn.linear(outputs, init=initializer(options)))


def draw_cnn(folder: str, experiment: Experiment, params: nn.Tree) -> None:
    """kernels.png: the first ones; features.png: what each convolution makes of one image."""
    data, net = experiment.data, experiment.net
    first = next((name for name in params if name.startswith("conv") and "W" in params[name]), None)
    if first is not None:
        kernels = as_pictures(params[first]["W"])
        plot_grid(os.path.join(folder, "kernels.png"), kernels, "first kernels")
    image = data["x_test"][:1]
    maps = [("image", image[0])]
    for name, y in layer_outputs(net, params, image):
        if name.startswith("convact"):
            maps.append((name.replace("convact", "convolution "), y[0]))
    plot_maps(os.path.join(folder, "features.png"), maps)
    logits = predict(net, params, data["x_test"])
    draw_mistakes(folder, data["x_test"], data["y_test"], logits, data["classes"].tolist())


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, train, report; gives the exit code."""
    description = str(__doc__).split("\n\n")[0]
    return run.main(CNNOptions, build_cnn, draw_cnn, description, arguments)


if __name__ == "__main__":
    sys.exit(main())
