"""Train a convolutional network on MNIST, on your own images, or on digits that purenn draws.

    python train_cnn.py --channels 32 64 --kernel 3 --epochs 10 --augment --out runs/first --plot

Options, data, the loop and the report are those of train_mlp.py; here are the network and its
pictures.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import train_mlp  # isort: skip (before NumPy is imported, it sees to the threads of BLAS)
import purenn as nn
from train_mlp import ACTIVATIONS, Experiment, count, initialiser, outputs

POOLS = {"max": nn.max_pool2d, "average": nn.avg_pool2d}


def convolutions(options: argparse.Namespace) -> dict[str, nn.Layer]:
    """For each number of --channels: convolution, batch norm, activation, and a pool at the end."""
    layers: dict[str, nn.Layer] = {}
    for stage, channels in enumerate(options.channels, start=1):
        for repeat in range(1, options.convolutions + 1):
            name = f"{stage}_{repeat}" if options.convolutions > 1 else f"{stage}"
            layers[f"conv{name}"] = nn.conv2d(
                channels,
                options.kernel,
                padding="same",
                init=initialiser(options),
                bias=not options.batch_norm,
            )
            if options.batch_norm:
                layers[f"convnorm{name}"] = nn.batch_norm()
            layers[f"convact{name}"] = ACTIVATIONS[options.activation]()
        if options.pool > 1:
            layers[f"pool{stage}"] = POOLS[options.pooling](options.pool)
    return layers


def build_cnn(options: argparse.Namespace, classes: int) -> nn.Layer:
    """The convolutions, flatten, hidden layers, and one linear layer with a unit for each class."""
    out = nn.linear(classes, initialiser(options))
    hidden = train_mlp.hidden_layers(options)
    return nn.sequential(**convolutions(options), flatten=nn.flatten(), **hidden, out=out)


def draw_cnn(folder: str, experiment: Experiment, params: nn.Tree) -> None:
    """kernels.png: the first ones; features.png: what each convolution makes of one image."""
    first = next((name for name in params if name.startswith("conv") and "W" in params[name]), None)
    if first is not None:
        kernels = train_mlp.as_pictures(params[first]["W"])
        train_mlp.plot_grid(os.path.join(folder, "kernels.png"), kernels, "first kernels")
    image = experiment.data["x_test"][:1]
    maps = [("image", image[0])]
    maps += [
        (name.replace("convact", "convolution "), y[0])
        for name, y in outputs(experiment.net, params, image)
        if name.startswith("convact")
    ]
    train_mlp.plot_maps(os.path.join(folder, "features.png"), maps)
    train_mlp.draw_mistakes(folder, experiment, params)


def command_line() -> argparse.ArgumentParser:
    """The options of this script: those of train_mlp.py, and what is about convolutions."""
    parser = train_mlp.new_parser(str(__doc__).split("\n\n")[0])
    network = train_mlp.add_network_options(parser, hidden=[128])
    network.add_argument(
        "--channels",
        metavar="N",
        type=count,
        nargs="*",
        default=[24, 48],
        help="channels a stage: convolution, batch norm, activation, and a pool at its end",
    )
    network.add_argument(
        "--convolutions", metavar="N", type=count, default=1, help="convolutions a stage"
    )
    network.add_argument("--kernel", metavar="N", type=count, default=5, help="its side in pixels")
    network.add_argument(
        "--pool", metavar="N", type=count, default=2, help="side of the pooled squares; 1 for none"
    )
    network.add_argument("--pooling", choices=POOLS, default="max", help="what a pool takes")
    parser.set_defaults(epochs=9)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, train, report; gives the exit code."""
    return train_mlp.start(command_line(), arguments, build_cnn, draw_cnn, shards=2)


if __name__ == "__main__":
    sys.exit(main())
