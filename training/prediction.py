"""The network at inference: its output, and the outputs of its layers."""

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
