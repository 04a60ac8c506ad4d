"""A training step and a single forward pass of an MLP, against PyTorch and the bare products.

    python benchmarks/mlp.py [--rounds 15] [--threads 2] [--quick]

784-256-128-10 with ReLU and softmax cross entropy in float32. Ratios are to PyTorch eager.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

from common import (
    Neighbors,
    Worker,
    has_torch,
    header,
    import_purenn,
    purenn_step,
    serve,
    table,
    take_turns,
    thread_variables,
    torch_forward,
    torch_step,
)

WIDTHS = (784, 256, 128, 10)
STEPS = {  # case: repeats a turn
    "64 sgd": 60,
    "64 adam": 60,
    "16 sgd": 100,
    "16 adam": 100,
    "one": 1000,
}
LABELS = {
    "64 sgd": "step, batch 64, SGD with momentum",
    "64 adam": "step, batch 64, Adam",
    "16 sgd": "step, batch 16, SGD with momentum",
    "16 adam": "step, batch 16, Adam",
    "one": "forward pass of one sample",
}
ENGINES = {
    "torch": "PyTorch",
    "purenn": "purenn",
    "lines": "purenn, five lines",
    "products": "matrix products alone",
    "numpy": "products and optimizer in place",
}


def batch_of(case: str) -> tuple[Any, Any, str]:
    """(images, labels, name of the optimizer) of a case like "64 sgd"."""
    import numpy as np

    size, _, optimizer = case.partition(" ")
    rng = np.random.default_rng(0)
    count = 1 if size == "one" else int(size)
    return rng.normal(size=(count, 784)).astype(np.float32), rng.integers(0, 10, count), optimizer


def purenn_case(case: str, five_lines: bool = False) -> Callable[[], object]:
    """With value_and_grad; or written out in five lines, which also compute dx of the data."""
    nn = import_purenn()
    x, labels, name = batch_of(case)
    net = nn.sequential(nn.linear(256), nn.relu(), nn.linear(128), nn.relu(), nn.linear(10))
    params, _ = net.init(0, (784,))
    if not name:
        return lambda: net.forward(params, x)
    optimizer = nn.sgd(0.01, momentum=0.9) if name == "sgd" else nn.adam()
    if not five_lines:
        gradients = nn.value_and_grad(net, nn.softmax_cross_entropy)
        return purenn_step(nn, net, (784,), gradients, optimizer, (x, labels))
    now = {"params": params, "state": optimizer.init(params)}
    steps = itertools.count()

    def step() -> None:
        params = now["params"]
        logits, cache = net.forward(nn.training(params, (0, next(steps))), x)
        _, dlogits = nn.softmax_cross_entropy(logits, labels)
        _, grads = net.backward(params, cache, dlogits)
        params, now["state"] = optimizer.step(params, grads, now["state"])
        now["params"] = nn.update_statistics(params, cache)

    return step


def torch_case(case: str) -> Callable[[], object]:
    """As PyTorch's own tutorials write it."""
    import torch

    x, labels, name = batch_of(case)
    images, target = torch.from_numpy(x), torch.from_numpy(labels)
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(784, 256),
        torch.nn.ReLU(),
        torch.nn.Linear(256, 128),
        torch.nn.ReLU(),
        torch.nn.Linear(128, 10),
    )
    if not name:
        return torch_forward(net, images)
    if name == "sgd":
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    else:
        optimizer = torch.optim.Adam(net.parameters())

    return torch_step(net, optimizer, images, target)


def numpy_case(case: str, with_optimizer: bool) -> Callable[[], object]:
    """The matrix products of a step, and the optimizer's arithmetic: nothing is allocated."""
    import numpy as np

    x, _, name = batch_of(case)
    rng = np.random.default_rng(0)

    def normals(*shape: int) -> Any:
        return rng.normal(size=shape).astype(np.float32)

    weights = [normals(*pair) for pair in itertools.pairwise(WIDTHS)]
    inputs = [x, *(normals(len(x), width) for width in WIDTHS[1:-1])]
    slopes = [normals(len(x), width) for width in WIDTHS[1:]]
    outputs, errors, grads, m, v, scratch = (
        [np.zeros_like(array) for array in like]
        for like in (slopes, inputs, weights, weights, weights, weights)
    )

    def step() -> None:
        for i, W in enumerate(weights):
            np.matmul(inputs[i], W, out=outputs[i])
        if not name:
            return
        for i, W in enumerate(weights):
            np.matmul(inputs[i].T, slopes[i], out=grads[i])
            if i:
                np.matmul(slopes[i], W.T, out=errors[i])
        if not with_optimizer:
            return
        for i, W in enumerate(weights):
            change = scratch[i]
            m[i] *= 0.9
            if name == "sgd":
                m[i] += grads[i]
                np.multiply(m[i], 1e-9, out=change)
            else:
                np.multiply(grads[i], 0.1, out=change)
                m[i] += change
                np.square(grads[i], out=change)
                change *= 0.001
                v[i] *= 0.999
                v[i] += change
                np.sqrt(v[i], out=change)
                change += 1e-8
                np.divide(m[i], change, out=change)
                change *= 1e-9
            W -= change

    return step


MAKERS: dict[str, Callable[[str], Callable[[], object]]] = {
    "torch": torch_case,
    "purenn": purenn_case,
    "lines": lambda case: purenn_case(case, five_lines=True),
    "products": lambda case: numpy_case(case, with_optimizer=False),
    "numpy": lambda case: numpy_case(case, with_optimizer=True),
}


def main() -> None:
    """Have the engines take turns, and print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--worker", choices=MAKERS, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each engine (default 15)")
    parser.add_argument("--threads", type=int, default=2, help="of BLAS and of PyTorch (default 2)")
    parser.add_argument("--quick", action="store_true", help="3 short turns, for a first look")
    options = parser.parse_args()
    if options.worker:
        serve(MAKERS[options.worker])
        return
    rounds = 3 if options.quick else options.rounds
    repeats = {case: count // 4 if options.quick else count for case, count in STEPS.items()}
    neighbors, threads = Neighbors(), thread_variables(options.threads)
    engines = [engine for engine in ENGINES if engine != "torch" or has_torch()]
    workers = {engine: Worker(__file__, engine, threads) for engine in engines}
    times = take_turns(workers, repeats, rounds)
    for worker in workers.values():
        worker.close()
    rows = []
    for case, label in LABELS.items():
        cells = [label]
        for engine in engines:
            ratio = times[engine, case] / times["torch", case] if "torch" in engines else 1
            share = f" ({ratio:.2f})" if engine != "torch" and "torch" in engines else ""
            cells.append(f"{times[engine, case] * 1e6:.0f}{share}")
        rows.append(cells)
    print(f"{header()}, {options.threads} threads, medians of {rounds} turns\n")
    print(table(["microseconds (ratio)", *(ENGINES[engine] for engine in engines)], rows))
    print(f"\n{neighbors.report()}")


if __name__ == "__main__":
    main()
