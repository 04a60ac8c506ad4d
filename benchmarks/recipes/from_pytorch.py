"""From PyTorch and back: train there, move, fine-tune here, move back; the outputs stay the same.

    python benchmarks/recipes/from_pytorch.py [--data DIR] [--out DIR]

A small network with batch norm learns digits in PyTorch, white on black. Here it learns to read
black on white as well, from a fifth of the images. --out DIR keeps it as PyTorch's model.pt.
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
from training.prediction import predict

try:
    import torch
    from torch import nn as tn
except ImportError:
    raise SystemExit("this recipe needs PyTorch (a CPU build will do): pip install torch") from None


def build() -> nn.Layer:
    """Layers without names are "0", "1", ..., as in torch.nn.Sequential."""
    first = nn.conv2d(8, 3, padding=1), nn.batch_norm(), nn.relu(), nn.max_pool2d(2)
    second = nn.conv2d(16, 3, padding=1), nn.batch_norm(), nn.relu(), nn.max_pool2d(2)
    return nn.sequential(*first, *second, nn.flatten(), nn.linear(10))


def build_torch() -> tn.Module:
    """The same network in PyTorch, layer by layer."""
    first = tn.Conv2d(1, 8, 3, padding=1), tn.BatchNorm2d(8), tn.ReLU(), tn.MaxPool2d(2)
    second = tn.Conv2d(8, 16, 3, padding=1), tn.BatchNorm2d(16), tn.ReLU(), tn.MaxPool2d(2)
    return tn.Sequential(*first, *second, tn.Flatten(), tn.Linear(16 * 7 * 7, 10))


def train_torch(model: tn.Module, images: np.ndarray, labels: np.ndarray) -> None:
    """One epoch there; the model is changed."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for index in nn.batches(len(images), 64, key=0):
        optimizer.zero_grad()
        logits = model(torch.from_numpy(images[index]))
        tn.functional.cross_entropy(logits, torch.from_numpy(labels[index])).backward()
        optimizer.step()
    model.eval()


def fine_tune(net: nn.Layer, params: nn.Tree, images: np.ndarray, labels: np.ndarray) -> nn.Tree:
    """Three epochs here: a pure function, so it gives other params."""
    optimizer = nn.adam(1e-3)
    state = optimizer.init(params)
    gradients = nn.value_and_grad(net, nn.softmax_cross_entropy)
    for epoch in range(3):
        for index in nn.batches(len(images), 64, key=epoch):
            keyed = nn.training(params, 0)  # batch norm needs no other key for each step
            _, grads, cache = gradients(keyed, images[index], labels[index])
            params, state = optimizer.step(params, grads, state)
            params = nn.update_statistics(params, cache)
    return params


def compare(when: str, model: tn.Module, net: nn.Layer, params: nn.Tree, data: nn.Tree) -> None:
    """Print the accuracies there and here, and the largest difference of the logits."""
    images, labels = data["x_test"], data["y_test"]
    for kind, x in {"white on black": images, "black on white": 1 - images}.items():
        with torch.inference_mode():
            there = model(torch.from_numpy(x)).numpy()
        here = predict(net, params, x)
        scores = f"{nn.accuracy(there, labels):.4f} there, {nn.accuracy(here, labels):.4f} here"
        difference = np.abs(there - here).max()
        print(f"{when}, {kind}: accuracy {scores}; largest difference {difference:.1e}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train there, fine-tune here, and compare both after each move."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--data", metavar="DIR", help="MNIST; default: data/mnist, or a download")
    parser.add_argument("--out", metavar="DIR", type=pathlib.Path, help="for model.pt")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    nn.keep_freed_memory()
    torch.manual_seed(0)
    data = choose_test(load_data(options.data, None)[0], None)
    images, labels = data["x_train"][:20_000], data["y_train"][:20_000]
    net, model = build(), build_torch()

    train_torch(model, images, labels)
    params = nn.from_torch(net, {name: t.numpy() for name, t in model.state_dict().items()})
    compare("trained in PyTorch", model, net, params, data)

    some = images[::5].copy()
    some[::2] = 1 - some[::2]  # half of them in negative
    params = fine_tune(net, params, some, labels[::5])
    state = {name: torch.from_numpy(a) for name, a in nn.to_torch(net, params).items()}
    model.load_state_dict(state)
    compare("fine-tuned here", model, net, params, data)
    print(f"{time.perf_counter() - started:.0f} seconds")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        torch.save(state, options.out / "model.pt")


if __name__ == "__main__":
    main()
