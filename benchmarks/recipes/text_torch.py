"""The networks of text.py in PyTorch, with the same weights and the same training."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

import purenn as nn


class Positions(torch.nn.Module):
    """x + P, which PyTorch has no layer for."""

    def __init__(self, P: np.ndarray) -> None:
        super().__init__()
        self.P = torch.nn.Parameter(torch.tensor(P))

    def forward(self, x: Any) -> Any:
        """y[n, t] = x[n, t] + P[t]."""
        return x + self.P[: x.shape[1]]


class Attention(torch.nn.MultiheadAttention):
    """Causal self-attention."""

    def forward(self, x: Any) -> Any:
        """The first of the two outputs of MultiheadAttention."""
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return super().forward(x, x, x, attn_mask=later, need_weights=False)[0]


class GRU(torch.nn.GRU):
    """A GRU that gives one output."""

    def forward(self, x: Any) -> Any:
        """The states of all steps."""
        return super().forward(x)[0]


class Residual(torch.nn.Module):
    """x + branch(x)."""

    def __init__(self, *branch: torch.nn.Module) -> None:
        super().__init__()
        self.branch = torch.nn.Sequential(*branch)

    def forward(self, x: Any) -> Any:
        """The sum."""
        return x + self.branch(x)


def module(name: str, params: nn.Tree, heads: int) -> torch.nn.Module:
    """PyTorch's layer for the layer of this name, its sizes from the params of all."""
    (letters, width), (features, _) = params["embed"]["W"].shape, params["out"]["W"].shape
    if name == "embed":
        return torch.nn.Embedding(letters, width)
    if name == "position":
        return Positions(params["position"]["P"])
    if name == "gru":
        return GRU(width, features, batch_first=True)
    if name == "out":
        return torch.nn.Linear(features, letters)
    norm = torch.nn.LayerNorm(width)
    if name == "norm":
        return norm
    if name.startswith("attention"):
        return Residual(norm, Attention(width, heads, batch_first=True))
    up, down = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)
    return Residual(norm, up, torch.nn.GELU("tanh"), down)


def twin(layers: dict[str, nn.Layer], params: nn.Tree, heads: int) -> torch.nn.Module:
    """The same network with the same weights."""
    net = torch.nn.Sequential(OrderedDict((name, module(name, params, heads)) for name in layers))
    net.to(torch.from_numpy(params["out"]["W"]).dtype)
    both = {name: layer for name, layer in layers.items() if name != "position"}
    state = nn.to_torch(nn.sequential(**both), {name: params[name] for name in both})
    if "position" in params:
        state["position.P"] = params["position"]["P"]
    net.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    return net


def train(
    net: torch.nn.Module, data: Iterable[np.ndarray], rate: Callable[[int], float]
) -> Iterator[float]:
    """The loss of each step."""
    optimizer = torch.optim.Adam(net.parameters())
    for step, batch in enumerate(map(torch.from_numpy, data)):
        optimizer.param_groups[0]["lr"] = rate(step)
        logits = net(batch[:, :-1]).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()
