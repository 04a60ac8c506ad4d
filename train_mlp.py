"""Train a multilayer perceptron on MNIST, on your own images or tables, or on synthetic digits.

    python train_mlp.py --hidden 512 256 --epochs 10 --out runs/first --plot
    python train_mlp.py --task sine --plot

Here are the network and its pictures. What is the same for every network is in training/, and any
script can use it as this one does: how a step is taken stands in `take_step` of training/loop.py.
"""

from __future__ import annotations

# First of all: BLAS reads how many threads it may have when NumPy is imported.
import training.threads  # noqa: F401  # isort: skip

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import purenn as nn
from training import run
from training.choices import initializer
from training.command_line import option
from training.loop import Experiment
from training.options import ACTIVATIONS, SINE, Options
from training.pictures import as_pictures, draw_mistakes, plot_fit, plot_grid
from training.prediction import predict


@dataclass(frozen=True)
class MLPOptions(Options):
    """The options of every script, and what is learned."""

    task: str = option(
        "classify images; or fit y = sin x on (-pi/2, pi/2), with defaults of its own:"
        " three hidden layers of 50 with gelu, mean squared error, no batch norm or dropout",
        group="task",
        default="classes",
        choices=["classes", "sine"],
        presets={"sine": SINE},
    )


def build_mlp(options: Options, outputs: int) -> nn.Layer:
    """Flatten; linear, batch norm, activation and dropout for each number of --hidden; linear.

    Its last layer has a unit for each class or value: logits, not probabilities.
    """
    init = initializer(options)
    layers: dict[str, nn.Layer] = {"flatten": nn.flatten()}
    if options.input_dropout:
        layers["drop0"] = nn.dropout(options.input_dropout)
    for index, units in enumerate(options.hidden, start=1):
        layers[f"hidden{index}"] = nn.linear(units, init=init, bias=not options.batch_norm)
        if options.batch_norm:
            layers[f"norm{index}"] = nn.batch_norm()
        layers[f"act{index}"] = ACTIVATIONS[options.activation]()
        if options.dropout:
            layers[f"drop{index}"] = nn.dropout(options.dropout)
    layers["out"] = nn.linear(outputs, init=init)
    return nn.sequential(**layers)


def draw_mlp(folder: str, experiment: Experiment, params: nn.Tree) -> None:
    """weights.png: what each unit of the first layer looks for; or, with --task sine, fit.png."""
    data = experiment.data
    output = predict(experiment.net, params, data["x_test"])
    if experiment.options.task == "sine":
        plot_fit(os.path.join(folder, "fit.png"), data["x_test"], data["y_test"], output)
        return
    first = params["hidden1" if "hidden1" in params else "out"]["W"]
    if "feature_mean" not in data:  # images
        units = as_pictures(first.T.reshape(-1, *data["x_train"].shape[1:]))
        plot_grid(os.path.join(folder, "weights.png"), units, "weights of the first layer")
    draw_mistakes(folder, data["x_test"], data["y_test"], output, data["classes"].tolist())


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, train, report; gives the exit code."""
    description = str(__doc__).split("\n\n")[0]
    return run.main(MLPOptions, build_mlp, draw_mlp, description, arguments)


if __name__ == "__main__":
    sys.exit(main())
