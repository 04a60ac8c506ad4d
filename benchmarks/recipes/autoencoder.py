"""A convolutional autoencoder: an image of 784 pixels becomes 16 numbers, and these an image again.

    python benchmarks/recipes/autoencoder.py [--data DIR] [--code 16] [--epochs 3] [--out DIR]

Beside its error stand that of the mean image, and that of the best linear code of the same length
(principal components). --out DIR keeps params in model.npz, and reconstructions.png (matplotlib).
"""

from __future__ import annotations

import argparse
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from functools import partial

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # where purenn.py is
import purenn as nn
from training.datasets import choose_test, load_data
from training.pictures import pyplot
from training.prediction import predict


def build(code: int) -> dict[str, nn.Layer]:
    """Images (N, 1, 28, 28) -> codes (N, code) -> logits of pixels: stride 2 halves or doubles."""
    halve = partial(nn.conv2d, kernel=3, stride=2, padding=1)
    double = partial(nn.conv2d_transpose, kernel=4, stride=2, padding=1)
    down = halve(16), nn.relu(), halve(32), nn.relu(), nn.flatten(), nn.linear(code)
    start = nn.linear(32 * 7 * 7), nn.relu(), nn.reshape(32, 7, 7)
    end = double(16), nn.relu(), double(1)
    return {"encoder": nn.sequential(*down), "decoder": nn.sequential(*start, *end)}


def train(net: nn.Layer, images: np.ndarray, epochs: int, size: int = 64) -> nn.Tree:
    """Params that give back each image as well as they can."""
    params, _ = net.init(0, images.shape[1:])
    optimizer = nn.adam(nn.one_cycle(0.01, epochs * math.ceil(len(images) / size)))
    state = optimizer.init(params)
    gradients = nn.value_and_grad(net, nn.binary_cross_entropy)
    for epoch in range(epochs):
        for index in nn.batches(len(images), size, key=(0, epoch)):
            loss, grads, _ = gradients(params, images[index], images[index])  # target: the input
            params, state = optimizer.step(params, grads, state)
        print(f"epoch {epoch + 1}: loss of the last batch {loss:.4f}", flush=True)
    return params


def principal_components(known: np.ndarray, images: np.ndarray, code: int) -> np.ndarray:
    """Images (N, 784) as the mean of the known ones and their first `code` principal components."""
    mean = known.mean(axis=0)
    _, vectors = np.linalg.eigh(np.cov(known.T))  # by ascending variance
    first = vectors[:, -code:].astype(images.dtype)
    return (images - mean) @ first @ first.T + mean


def draw(path: nn.Path, halves: dict[str, nn.Layer], params: nn.Tree, images: np.ndarray) -> None:
    """Images, their reconstructions, and the way from the code of the first to that of the last."""
    codes, _ = halves["encoder"].forward(params["encoder"], images)
    share = np.linspace(0, 1, len(images), dtype=np.float32)[:, None]
    way = (1 - share) * codes[0] + share * codes[-1]
    logits = (halves["decoder"].forward(params["decoder"], z)[0] for z in (codes, way))
    rows = [images, *(nn.sigmoid().forward({}, z)[0] for z in logits)]
    picture = np.concatenate([np.concatenate(row[:, 0], axis=1) for row in rows])
    pyplot().imsave(path, np.kron(picture, np.ones((3, 3))), cmap="gray", vmin=0, vmax=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, compare with simpler codes, and keep the results."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--data", metavar="DIR", help="MNIST; default: data/mnist, or a download")
    parser.add_argument("--code", type=int, default=16, help="numbers per image (default 16)")
    parser.add_argument("--epochs", type=int, default=3, help="default 3")
    parser.add_argument("--out", metavar="DIR", type=pathlib.Path, help="for params and picture")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    nn.keep_freed_memory()
    data = choose_test(load_data(options.data, None)[0], None)
    images, test = data["x_train"], data["x_test"]
    halves = build(options.code)
    net = nn.sequential(**halves)
    print(nn.summary(net, images.shape[1:]))
    params = train(net, images, options.epochs)
    pixels = predict(nn.sequential(**halves, pixels=nn.sigmoid()), params, test)  # the same params
    flat, target = images.reshape(len(images), -1), test.reshape(len(test), -1)
    outputs = {
        "mean image": flat.mean(axis=0),
        f"{options.code} principal components": principal_components(flat, target, options.code),
        f"autoencoder, {options.code} numbers": pixels.reshape(target.shape),
    }
    for name, output in outputs.items():
        print(f"{name}: mean squared error {np.square(output - target).mean():.4f} per pixel")
    print(f"{time.perf_counter() - started:.0f} seconds")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        nn.save(options.out / "model.npz", params)
        try:
            draw(options.out / "reconstructions.png", halves, params, test[:12])
        except ValueError as error:
            print(f"no picture: {error}")


if __name__ == "__main__":
    main()
