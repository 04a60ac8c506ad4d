"""Two inputs, two outputs: how many (a handwritten digit), at what price? Which digit, what total?

    python benchmarks/recipes/two_inputs.py [--data DIR] [--epochs 4] [--out DIR]

x is {"image": (N, 1, 28, 28), "prices": (N, 2)}, the price of one and the postage; y is {"digit":
(N, 10), "total": (N, 1)}, logits and digit · price + postage. Only half of the orders have a total
to learn from. In the end the images, then the prices are taken from other orders: a network that
computes the total from both gets worse at it.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from operator import itemgetter

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # where purenn.py is
import purenn as nn
from training.datasets import choose_test, load_data

WEIGHTS = {"digit": 1.0, "total": 0.5}  # of the two losses, in their sum


def orders(images: np.ndarray, labels: np.ndarray, seed: int) -> tuple[nn.Tree, nn.Tree]:
    """(x, target) for images of digits, with prices from 0.5 to 2 and postage from 0 to 5."""
    prices = np.random.default_rng(seed).uniform((0.5, 0), (2, 5), (len(images), 2))
    prices = prices.astype(np.float32)
    total = labels[:, None] * prices[:, :1] + prices[:, 1:]
    known = np.arange(len(images)) % 2 == 0
    return {"image": images, "prices": prices}, {"digit": labels, "total": total, "known": known}


def build() -> nn.Layer:
    """The features of both inputs side by side, a layer that sees all of them, and two heads."""
    convolutions = nn.conv2d(8, 5, stride=2), nn.relu(), nn.conv2d(16, 5, stride=2), nn.relu()
    image = nn.sequential(*convolutions, nn.flatten(), nn.linear(64), nn.relu())
    both = nn.concatenate(image=image, prices=nn.sequential(nn.linear(32), nn.relu()))  # (96,)
    outputs = nn.heads(digit=nn.linear(10), total=nn.linear(1))
    return nn.sequential(inputs=both, hidden=nn.linear(128), act=nn.relu(), outputs=outputs)


def order_loss(prediction: nn.Tree, target: nn.Tree) -> tuple[float, nn.Tree]:
    """A loss is any function (prediction, target) -> (loss, dprediction); here of dicts."""
    parts = {
        "digit": nn.softmax_cross_entropy(prediction["digit"], target["digit"]),
        "total": nn.huber(prediction["total"], target["total"], weights=target["known"]),
    }
    loss = sum(WEIGHTS[name] * value for name, (value, _) in parts.items())
    return loss, {name: WEIGHTS[name] * slope for name, (_, slope) in parts.items()}


def train(net: nn.Layer, x: nn.Tree, target: nn.Tree, epochs: int, size: int = 64) -> nn.Tree:
    """The loop of every network: a batch of a dict is the batch of each of its arrays."""
    params, _ = net.init(0, {name: array.shape[1:] for name, array in x.items()})
    count = len(target["digit"])
    optimizer = nn.adam(nn.one_cycle(3e-3, epochs * math.ceil(count / size)))
    state = optimizer.init(params)
    gradients = nn.value_and_grad(net, order_loss)
    for epoch in range(epochs):
        for index in nn.batches(count, size, key=(0, epoch)):
            batch = [nn.tree_map(itemgetter(index), tree) for tree in (x, target)]
            loss, grads, _ = gradients(params, *batch)
            params, state = optimizer.step(params, grads, state)
        print(f"epoch {epoch + 1}: loss of the last batch {loss:.3f}", flush=True)
    return params


def main(arguments: Sequence[str] | None = None) -> None:
    """Train; then test with all that belongs together, and with what does not."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--data", metavar="DIR", help="MNIST; default: data/mnist, or a download")
    parser.add_argument("--epochs", type=int, default=4, help="default 4")
    parser.add_argument("--out", metavar="DIR", type=pathlib.Path, help="for the params")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    nn.keep_freed_memory()
    data = choose_test(load_data(options.data, None)[0], None)
    net = build()
    params = train(net, *orders(data["x_train"], data["y_train"], 1), options.epochs)
    x, target = orders(data["x_test"], data["y_test"], 2)
    others = {name: np.roll(array, 1, axis=0) for name, array in x.items()}
    tests = {"test": x, **{f"{name} of others": {**x, name: others[name]} for name in others}}
    for what, shown in tests.items():
        y, _ = net.forward(params, shown)
        right = nn.accuracy(y["digit"], target["digit"])
        error, _ = nn.mean_absolute_error(y["total"], target["total"])
        print(f"{what}: accuracy of the digit {right:.4f}, mean error of the total {error:.2f}")
    spread = np.abs(target["total"] - np.median(target["total"])).mean()
    print(f"the same total for all: {spread:.2f}; {time.perf_counter() - started:.0f} seconds")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        nn.save(options.out / "model.npz", params)


if __name__ == "__main__":
    main()
