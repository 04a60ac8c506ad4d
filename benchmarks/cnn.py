"""A training step and a single image of two CNNs, against PyTorch and an im2col in NumPy.

    python benchmarks/cnn.py [--rounds 15] [--threads 2] [--levers] [--quick]

Both networks take 28x28 images; float32, SGD with momentum. Ratios are to PyTorch eager in the
faster of its two memory formats.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
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

STEPS = {  # case: repeats a turn
    "5x5 64": 20,
    "5x5 128": 10,
    "3x3 64": 4,
    "5x5 one": 200,
}
LABELS = {
    "5x5 64": "two 5x5 convolutions, step, batch 64",
    "5x5 128": "two 5x5 convolutions, step, batch 128",
    "3x3 64": "four 3x3 convolutions and batch norm, step, batch 64",
    "5x5 one": "two 5x5 convolutions, one image, inference",
}
ENGINES = {
    "torch": "PyTorch",
    "last": "PyTorch, channels last",
    "purenn": "purenn",
    "workers": "purenn, 2 workers",
    "im2col": "NumPy, im2col",
}
TORCH = {"torch", "last"}
LEVERS = {  # the same step with one setting changed, for --levers
    "purenn": "as it is",
    "workers": "2 workers",
    "single": "1 BLAS thread",
    "returned": "no keep_freed_memory()",
    "haswell": "OPENBLAS_CORETYPE=Haswell",
    "skylakex": "OPENBLAS_CORETYPE=SkylakeX",
}
SETTINGS = {
    "workers": {"OPENBLAS_NUM_THREADS": "1"},
    "single": {"OPENBLAS_NUM_THREADS": "1"},
    "haswell": {"OPENBLAS_CORETYPE": "Haswell"},
    "skylakex": {"OPENBLAS_CORETYPE": "SkylakeX"},
}


def batch_of(case: str) -> tuple[Any, Any]:
    """(images, labels) of a case like "5x5 64"."""
    import numpy as np

    size = case.split()[1]
    count = 1 if size == "one" else int(size)
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, 1, 28, 28)).astype(np.float32), rng.integers(0, 10, count)


def network(nn: Any, case: str, conv2d: Callable, max_pool2d: Callable) -> Any:
    """The network of a case, from these two layers and others of purenn."""
    layers = []
    if case.startswith("5x5"):
        for channels in (16, 32):
            layers += [conv2d(channels, 5, padding=2), nn.relu(), max_pool2d(2)]
        layers += [nn.flatten(), nn.linear(128), nn.relu()]
    else:
        for channels in (32, 64):
            for _ in range(2):
                convolution = conv2d(channels, 3, padding=1, bias=False)
                layers += [convolution, nn.batch_norm(), nn.relu()]
            layers.append(max_pool2d(2))
        layers.append(nn.flatten())
    return nn.sequential(*layers, nn.linear(10))


def purenn_case(
    case: str, workers: int = 1, im2col: bool = False, keep_memory: bool = True
) -> Callable[[], object]:
    """A step with value_and_grad; of several workers, each computes a shard of the batch."""
    nn = import_purenn(keep_memory=keep_memory)
    x, labels = batch_of(case)
    convolutions = peer_layers(nn) if im2col else (nn.conv2d, nn.max_pool2d)
    net = network(nn, case, *convolutions)
    if case.endswith("one"):
        params, _ = net.init(0, (1, 28, 28))
        return lambda: net.forward(params, x)
    optimizer = nn.sgd(0.01, momentum=0.9)
    gradients = nn.value_and_grad(net, nn.softmax_cross_entropy)
    if workers > 1:
        from concurrent.futures import ThreadPoolExecutor

        gradients = nn.data_parallel(gradients, workers, ThreadPoolExecutor(workers).map)
    return purenn_step(nn, net, (1, 28, 28), gradients, optimizer, (x, labels))


def torch_case(case: str, channels_last: bool = False) -> Callable[[], object]:
    """As PyTorch's own tutorials write it."""
    import torch

    images, labels = batch_of(case)
    order = torch.channels_last if channels_last else torch.contiguous_format
    x, target = torch.from_numpy(images).to(memory_format=order), torch.from_numpy(labels)
    torch.manual_seed(0)
    layers: list[Any] = []
    if case.startswith("5x5"):
        for before, channels in ((1, 16), (16, 32)):
            layers.append(torch.nn.Conv2d(before, channels, 5, padding=2))
            layers += [torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
        layers += [torch.nn.Flatten(), torch.nn.Linear(32 * 7 * 7, 128), torch.nn.ReLU()]
        layers.append(torch.nn.Linear(128, 10))
    else:
        for before, channels in ((1, 32), (32, 32), (32, 64), (64, 64)):
            layers.append(torch.nn.Conv2d(before, channels, 3, padding=1, bias=False))
            layers += [torch.nn.BatchNorm2d(channels), torch.nn.ReLU()]
            if before == channels:
                layers.append(torch.nn.MaxPool2d(2))
        layers += [torch.nn.Flatten(), torch.nn.Linear(64 * 7 * 7, 10)]
    net = torch.nn.Sequential(*layers).to(memory_format=order)
    if case.endswith("one"):
        return torch_forward(net, x)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)

    return torch_step(net, optimizer, x, target)


# The textbook formulation: every window becomes a row of a matrix, kh·kw copies of the image.


def im2col(x: Any, size: int, padding: int) -> Any:
    """(N·Ho·Wo, C·size·size) of x (N, C, H, W), stride 1."""
    import numpy as np

    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    N, C, H, W = x.shape
    Ho, Wo = H - size + 1, W - size + 1
    columns = np.empty((N, C, size, size, Ho, Wo), x.dtype)
    for i in range(size):
        for j in range(size):
            columns[:, :, i, j] = x[:, :, i : i + Ho, j : j + Wo]
    return columns.transpose(0, 4, 5, 1, 2, 3).reshape(N * Ho * Wo, -1)


def col2im(columns: Any, shape: tuple[int, ...], size: int, padding: int) -> Any:
    """For each pixel, the sum over the windows that hold it: the adjoint of im2col."""
    import numpy as np

    N, C, H, W = shape
    Ho, Wo = H + 2 * padding - size + 1, W + 2 * padding - size + 1
    columns = columns.reshape(N, Ho, Wo, C, size, size).transpose(0, 3, 4, 5, 1, 2)
    x = np.zeros((N, C, H + 2 * padding, W + 2 * padding), columns.dtype)
    for i in range(size):
        for j in range(size):
            x[:, :, i : i + Ho, j : j + Wo] += columns[:, :, i, j]
    return x[:, :, padding : padding + H, padding : padding + W]


def peer_layers(nn: Any) -> tuple[Callable, Callable]:
    """conv2d by im2col, and max_pool2d by a reshaped view (N, C, H/2, 2, W/2, 2)."""
    import numpy as np

    def conv2d(out: int, size: int, *, padding: int = 0, bias: bool = True) -> Any:
        def forward(params: Any, x: Any) -> Any:
            W = params["W"].reshape(out, -1)
            columns = im2col(x, size, padding)
            y = columns @ W.T
            if bias:
                y += params["b"]
            side = x.shape[2] + 2 * padding - size + 1
            return y.reshape(len(x), side, side, out).transpose(0, 3, 1, 2), (x.shape, columns)

        def backward(params: Any, cache: Any, dy: Any, *, need_dx: bool = True) -> Any:
            shape, columns = cache
            dy = dy.transpose(0, 2, 3, 1).reshape(-1, out)
            W = params["W"].reshape(out, -1)
            grads = {"W": (dy.T @ columns).reshape(params["W"].shape)}
            if bias:
                grads["b"] = dy.sum(axis=0)
            return (col2im(dy @ W, shape, size, padding) if need_dx else None), grads

        return nn.Layer(nn.conv2d(out, size, padding=padding, bias=bias).init, forward, backward)

    def max_pool2d(size: int) -> Any:
        def forward(params: Any, x: Any) -> Any:
            N, C, H, W = x.shape
            windows = x.reshape(N, C, H // size, size, W // size, size)
            y = windows.max(axis=(3, 5))
            return y, (windows, y)

        def backward(params: Any, cache: Any, dy: Any) -> Any:
            windows, y = cache
            N, C, H, size, W, _ = windows.shape
            largest = windows == y[:, :, :, None, :, None]
            dx = largest * dy[:, :, :, None, :, None]
            dx /= largest.sum(axis=(3, 5), keepdims=True, dtype=np.float32)
            return dx.reshape(N, C, H * size, W * size), {}

        return nn.Layer(nn.max_pool2d(size).init, forward, backward)

    return conv2d, max_pool2d


MAKERS: dict[str, Callable[[str], Callable[[], object]]] = {
    "torch": torch_case,
    "last": lambda case: torch_case(case, channels_last=True),
    "purenn": purenn_case,
    "workers": lambda case: purenn_case(case, workers=2),
    "im2col": lambda case: purenn_case(case, im2col=True),
    "returned": lambda case: purenn_case(case, keep_memory=False),
    **dict.fromkeys(("single", "haswell", "skylakex"), purenn_case),
}


def resident(name: str) -> float:
    """VmRSS or VmHWM of this process in MB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1e3 for line in file if line.startswith(name))


def growth(engine: str, case: str) -> float:
    """How many MB five steps add to the peak memory of this process."""
    if engine in TORCH:
        import torch

        torch.zeros(1)  # the start of the library is not counted
    else:
        import numpy as np

        np.ones((64, 64)) @ np.ones((64, 64))
    before = resident("VmRSS")
    step = MAKERS[engine](case)
    for _ in range(5):
        step()
    return resident("VmHWM") - before


def time_table(
    times: dict[tuple[str, str], float], names: dict[str, str], engines: list[str]
) -> str:
    """Milliseconds of every case, and ratios to PyTorch, or to the first engine without it."""
    references = {engine for engine in engines if engine in TORCH} or {engines[0]}
    rows = []
    for case, label in LABELS.items():
        best = min(times[engine, case] for engine in references)
        cells = [label]
        for engine in engines:
            ratio = "" if engine in references else f" ({times[engine, case] / best:.2f})"
            cells.append(f"{times[engine, case] * 1e3:.2f}{ratio}")
        rows.append(cells)
    return table(["milliseconds (ratio)", *(names[engine] for engine in engines)], rows)


def memory_table(names: dict[str, str], environments: dict[str, dict[str, str]]) -> str:
    """What `growth` returns in a new process for every case and engine."""
    rows = []
    for case, label in LABELS.items():
        cells = [label]
        for engine, environment in environments.items():
            command = [sys.executable, __file__, "--worker", f"{engine}:{case}"]
            variables = {**os.environ, **environment}
            result = subprocess.run(command, env=variables, capture_output=True, check=True)
            cells.append(f"{float(result.stdout):.0f}")
        rows.append(cells)
    return table(["MB at the peak", *(names[engine] for engine in environments)], rows)


def main() -> None:
    """Have the engines take turns, and print the tables."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each engine (default 15)")
    parser.add_argument("--threads", type=int, default=2, help="of BLAS and of PyTorch (default 2)")
    parser.add_argument("--quick", action="store_true", help="3 short turns, for a first look")
    parser.add_argument("--engines", help=f"some of {','.join(ENGINES)}; default all")
    parser.add_argument("--levers", action="store_true", help="purenn alone, with other settings")
    options = parser.parse_args()
    engine, _, memory_of = (options.worker or "").partition(":")
    if memory_of:
        print(growth(engine, memory_of))
        return
    if engine:
        serve(MAKERS[engine])
        return
    rounds = 3 if options.quick else options.rounds
    repeats = {
        case: max(count // 4, 1) if options.quick else count for case, count in STEPS.items()
    }
    neighbors, threads = Neighbors(), thread_variables(options.threads)
    names = LEVERS if options.levers else ENGINES
    chosen = options.engines.split(",") if options.engines else list(names)
    if TORCH & set(chosen) and not has_torch():
        chosen = [engine for engine in chosen if engine not in TORCH]
    engines = [engine for engine in names if engine in chosen]
    environments = {engine: {**threads, **SETTINGS.get(engine, {})} for engine in engines}
    workers = {engine: Worker(__file__, engine, environments[engine]) for engine in engines}
    times = take_turns(workers, repeats, rounds)
    for worker in workers.values():
        worker.close()
    print(f"{header()}, {options.threads} threads, medians of {rounds} turns\n")
    print(f"{time_table(times, names, engines)}\n\n{neighbors.report()}")
    if os.path.exists("/proc/self/status"):
        print(f"\n{memory_table(names, environments)}")


if __name__ == "__main__":
    main()
