"""Class weights: ten classes, of which one is 1 % of the training images.

    python benchmarks/recipes/imbalance.py [--data DIR] [--rare 8] [--seeds 5] [--out DIR]

Each seed draws 10,000 images and trains the same network twice: every image weighs the same, or
every class does. The recall of a class is the fraction of its test images that are recognized.
The accuracy is that of test images with the classes as frequent as in training: what the rare
class gains, it pays for. --out DIR keeps the results of all seeds in imbalance.csv.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Sequence

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # where purenn.py is
import purenn as nn
from training.datasets import choose_test, load_data

COLUMNS = "recall unweighted", "accuracy unweighted", "recall weighted", "accuracy weighted"


def choose(labels: np.ndarray, rare: int, samples: int, seed: int) -> np.ndarray:
    """The index of so many random images, 1 % of them of the rare class."""
    order = np.random.default_rng(seed).permutation(len(labels))
    is_rare = labels[order] == rare
    few = max(1, samples // 100)
    return np.concatenate([order[is_rare][:few], order[~is_rare][: samples - few]])


def train(
    x: np.ndarray, labels: np.ndarray, class_weights: np.ndarray, seed: int, epochs: int = 5
) -> tuple[nn.Layer, nn.Tree]:
    """A network with one hidden layer, and its params."""
    net = nn.sequential(nn.flatten(), nn.linear(64), nn.relu(), nn.linear(len(class_weights)))
    params, _ = net.init(seed, x.shape[1:])
    optimizer = nn.adam(1e-3)
    state = optimizer.init(params)
    for epoch in range(epochs):
        for index in nn.batches(len(x), 64, key=(seed, epoch)):
            logits, cache = net.forward(params, x[index])
            weights = class_weights[labels[index]]  # one for each image of the batch
            _, dlogits = nn.softmax_cross_entropy(logits, labels[index], weights=weights)
            _, grads = net.backward(params, cache, dlogits)
            params, state = optimizer.step(params, grads, state)
    return net, params


def recalls(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The fraction of each class that is recognized."""
    right = logits.argmax(axis=1) == labels
    return np.bincount(labels, weights=right) / np.bincount(labels)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with and without weights from several seeds; print means and standard deviations."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--data", metavar="DIR", help="MNIST; default: data/mnist, or a download")
    parser.add_argument("--rare", type=int, default=8, metavar="CLASS", help="default 8")
    parser.add_argument("--samples", type=int, default=10_000, help="to train on (default 10,000)")
    parser.add_argument("--seeds", type=int, default=5, help="how many (default 5)")
    parser.add_argument("--out", metavar="DIR", type=pathlib.Path, help="for imbalance.csv")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    data = choose_test(load_data(options.data, None)[0], None)
    rows = []
    for seed in range(options.seeds):
        index = choose(data["y_train"], options.rare, options.samples, seed)
        x, labels = data["x_train"][index], data["y_train"][index]
        counts = np.bincount(labels)
        for weights in (np.ones(len(counts)), counts.max() / counts):
            net, params = train(x, labels, weights, seed)
            found = recalls(net.forward(params, data["x_test"])[0], data["y_test"])
            rows.append([found[options.rare], found @ counts / len(labels)])
    table = np.reshape(rows, (options.seeds, 4))
    for name, mean, std in zip(COLUMNS, table.mean(axis=0), table.std(axis=0), strict=True):
        print(f"{name}: {mean:.3f} ± {std:.3f}")
    print(f"{options.seeds} seeds, {time.perf_counter() - started:.0f} seconds")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / "imbalance.csv"
        np.savetxt(path, table, "%.4f", ",", header=",".join(COLUMNS), comments="")


if __name__ == "__main__":
    main()
