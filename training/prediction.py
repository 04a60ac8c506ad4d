"""The network at inference: its output, the outputs of its layers, and what it is made of."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import numpy as np

import purenn as nn
from training.team import Team, map_all


def output_of(images: np.ndarray, *, net: nn.Layer, params: nn.Tree) -> np.ndarray:
    """The output at inference."""
    return net.forward(params, images)[0]


def predict(net: nn.Layer, params: nn.Tree, images: np.ndarray, team: Team = Team()) -> np.ndarray:
    """The output at inference, computed 250 images at a time."""
    parts = [images[start : start + 250] for start in range(0, len(images), 250)]
    return np.concatenate(map_all(team, partial(output_of, net=net, params=params), parts))


def layers_of(net: nn.Layer) -> dict[str, nn.Layer]:
    """The layers of a `sequential`, by name."""
    layers: dict[str, nn.Layer] = cast(Any, net.forward).keywords["layers"]
    return layers


def layer_outputs(
    net: nn.Layer, params: nn.Tree, x: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, output) of every layer of a `sequential`, at inference."""
    for name, layer in layers_of(net).items():
        x, _ = layer.forward(params.get(name, {}), x)
        yield name, x


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


def format_shape(batch: np.ndarray) -> str:
    """The shape of one sample, as in 1x28x28."""
    return "x".join(map(str, batch.shape[1:]))


def kind_of(layer: nn.Layer) -> str:
    """The name of the function that made a layer."""
    forward: Any = layer.forward
    function = forward.func if isinstance(forward, partial) else forward
    return str(function.__name__).removesuffix("_forward")


def summary(net: nn.Layer, params: nn.Tree, trained: nn.Tree, x: np.ndarray) -> str:
    """A table of the layers: names, what they are, what they make of one x, numbers to train."""
    rows = [("layer", "kind", "output", "parameters"), ("input", "", format_shape(x), "")]
    layers = layers_of(net)
    for name, y in layer_outputs(net, params, x):
        parameters = f"{nn.count_parameters(trained.get(name, {})):,}"
        rows.append((name, kind_of(layers[name]), format_shape(y), parameters))
    rows.append(("total", "", "", f"{nn.count_parameters(trained):,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([*map(str.ljust, row[:3], widths), row[3].rjust(widths[3])]).rstrip()
        for row in rows
    )
