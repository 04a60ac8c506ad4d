"""purenn against PyTorch: a row for each workload, or time against the size of the work.

    python benchmarks/table.py [--rounds 9] [--quick] [--only TEXT] [--plot FILE]

float32, two threads; one sample also with one thread, in either library. Ratios are to PyTorch
eager in the faster of its memory formats. A step is `value_and_grad`, `optimizer.step` and
`update_statistics`, and `zero_grad`, loss, `backward`, `optimizer.step` and `loss.item()`; forward
+ backward also computes the gradient of the input, in the faster of two memory orders in either
library. Two workers are Python threads with one BLAS thread each, and half of the batch: a step is
`data_parallel`'s; elsewhere the gradients are added up, those of the input stay in two halves, and
outputs are joined. With --plot, steps of growing size are measured instead of the table, and drawn.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import statistics
import textwrap
import types
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from common import (
    Neighbors,
    Worker,
    has_torch,
    header,
    import_purenn,
    measure_turns,
    purenn_step,
    serve,
    table,
    thread_variables,
    torch_forward,
    torch_step,
)

# ------------------------------------------------------------------------------------------------
# Networks, of purenn's layers or of PyTorch's under the same names (`torch_layers`)
# ------------------------------------------------------------------------------------------------


def mlp(nn: Any, widths: tuple[int, ...] = (256, 128)) -> Any:
    """Linear layers with ReLU between them, and 10 classes."""
    hidden = [layer for width in widths for layer in (nn.linear(width), nn.relu())]
    return nn.sequential(*hidden, nn.linear(10))


def network_5x5(nn: Any) -> Any:
    """Two 5x5 convolutions, each with ReLU and a maximum pool, and two linear layers."""
    layers = []
    for channels in (16, 32):
        layers += [nn.conv2d(channels, 5, padding=2), nn.relu(), nn.max_pool2d(2)]
    return nn.sequential(*layers, nn.flatten(), nn.linear(128), nn.relu(), nn.linear(10))


def normalized(nn: Any, channels: int, kernel: int = 3, stride: int = 1) -> list[Any]:
    """A convolution that keeps the size (over its stride), and batch norm."""
    options = {"stride": stride, "padding": kernel // 2, "bias": False}
    return [nn.conv2d(channels, kernel, **options), nn.batch_norm()]


def network_3x3(nn: Any) -> Any:
    """Four 3x3 convolutions with batch norm and ReLU, and two maximum pools."""
    layers = []
    for channels in (32, 64):
        layers += [*normalized(nn, channels), nn.relu()]
        layers += [*normalized(nn, channels), nn.relu(), nn.max_pool2d(2)]
    return nn.sequential(*layers, nn.flatten(), nn.linear(10))


def resnet(nn: Any) -> Any:
    """Three residual blocks (He et al. 2016); the second and third halve the image."""
    layers = [*normalized(nn, 16), nn.relu()]
    for channels, stride in ((16, 1), (32, 2), (64, 2)):
        before = [*normalized(nn, channels, 3, stride), nn.relu()]
        branch = nn.sequential(*before, *normalized(nn, channels))
        shortcut = nn.identity()
        if stride > 1:
            shortcut = nn.sequential(*normalized(nn, channels, 1, stride))
        layers += [nn.residual(branch, shortcut), nn.relu()]
    return nn.sequential(*layers, nn.global_avg_pool2d(), nn.linear(10))


def lenet(nn: Any) -> Any:
    """LeNet-5 with tanh and average pools (LeCun et al. 1998)."""
    layers = [nn.conv2d(6, 5, padding=2), nn.tanh(), nn.avg_pool2d(2)]
    layers += [nn.conv2d(16, 5), nn.tanh(), nn.avg_pool2d(2), nn.flatten()]
    for width in (120, 84):
        layers += [nn.linear(width), nn.tanh()]
    return nn.sequential(*layers, nn.linear(10))


def convolution(nn: Any, channels: int, kernel: int, stride: int) -> Any:
    """One convolution."""
    return nn.conv2d(channels, kernel, stride=stride, padding=kernel // 2)


def separable(nn: Any) -> Any:
    """A depthwise 3x3 convolution of 64 channels, and a 1x1 convolution."""
    return nn.sequential(nn.conv2d(64, 3, padding=1, groups=64), nn.conv2d(128, 1))


def transposed_convolution(nn: Any) -> Any:
    """A convolution that doubles the size of an image, as in the second half of an autoencoder."""
    return nn.conv2d_transpose(32, 4, stride=2, padding=1)


def recurrent(nn: Any, layer: str) -> Any:
    """A GRU or an LSTM of 128 units, and 10 classes from its last state."""
    return nn.sequential(getattr(nn, layer)(128), nn.last(), nn.linear(10))


def attention_block(nn: Any, causal: bool = False) -> Any:
    """A block of a transformer, 64 wide, with the norms in the branches, as in GPT-2."""
    attention = nn.sequential(nn.layer_norm(), nn.attention(4, causal=causal))
    network = nn.sequential(nn.layer_norm(), nn.linear(256), nn.gelu(), nn.linear(64))
    return nn.sequential(nn.residual(attention), nn.residual(network))


def embedding(nn: Any, words: int) -> Any:
    """A vector of 64 numbers for each word."""
    return nn.embedding(words, 64)


def transformer(nn: Any, words: int) -> Any:
    """Two causal blocks between an embedding and the logits of the next word."""
    blocks = [attention_block(nn, causal=True) for _ in range(2)]
    ends = nn.layer_norm(), nn.linear(words)
    return nn.sequential(nn.embedding(words, 64), nn.position_embedding(), *blocks, *ends)


# ------------------------------------------------------------------------------------------------
# Workloads
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """What is measured: a network, the shape of a sample, the size of the batch and the pass.

    `does` is "step", "gradients" (forward and backward, with the gradient of the input) or
    "forward" (at inference). With `words`, the input is of whole numbers below it, and every one
    has a label.
    """

    network: Callable[[Any], Any]
    shape: tuple[int, ...]
    batch: int
    does: str = "step"
    optimizer: str = "sgd"
    words: int = 0


# A row of the table is one entry here; a layer is looked up in purenn and in `torch_layers`.
FLAT, GRAY = (784,), (1, 28, 28)
WORKLOADS = {
    "MLP, SGD with momentum, step, batch 64": Workload(mlp, FLAT, 64),
    "MLP, SGD with momentum, step, batch 16": Workload(mlp, FLAT, 16),
    "MLP, Adam, step, batch 64": Workload(mlp, FLAT, 64, optimizer="adam"),
    "MLP, Adam, step, batch 16": Workload(mlp, FLAT, 16, optimizer="adam"),
    "5x5 network, step, batch 64": Workload(network_5x5, GRAY, 64),
    "5x5 network, step, batch 128": Workload(network_5x5, GRAY, 128),
    "5x5 network, step, batch 256": Workload(network_5x5, GRAY, 256),
    "3x3 network with batch norm, step, batch 64": Workload(network_3x3, GRAY, 64),
    "small ResNet on 3x32x32, step, batch 64": Workload(resnet, (3, 32, 32), 64),
    "LeNet-5, tanh and average pools, step, batch 64": Workload(lenet, GRAY, 64),
    "convolution 3x3, stride 2, 32 -> 64 at 28x28, forward + backward, batch 64": Workload(
        partial(convolution, channels=64, kernel=3, stride=2), (32, 28, 28), 64, "gradients"
    ),
    "convolution 7x7, stride 2, 3 -> 64 at 112x112, forward + backward, batch 8": Workload(
        partial(convolution, channels=64, kernel=7, stride=2), (3, 112, 112), 8, "gradients"
    ),
    "depthwise 3x3 of 64 channels at 28x28, 1x1 to 128, forward + backward, batch 32": Workload(
        separable, (64, 28, 28), 32, "gradients"
    ),
    "transposed convolution 4x4, stride 2, 64 -> 32 at 14x14, forward + backward, batch 64": (
        Workload(transposed_convolution, (64, 14, 14), 64, "gradients")
    ),
    "GRU of 128 units, 28 steps of 28, step, batch 64": Workload(
        partial(recurrent, layer="gru"), (28, 28), 64
    ),
    "LSTM of 128 units, 28 steps of 28, step, batch 64": Workload(
        partial(recurrent, layer="lstm"), (28, 28), 64
    ),
    "attention block, 64 positions, 4 heads, 64 wide, forward + backward, batch 32": Workload(
        attention_block, (64, 64), 32, "gradients"
    ),
    "embedding of 10,000 words, 64 wide, 64 positions, forward + backward, batch 64": Workload(
        partial(embedding, words=10_000), (64,), 64, "gradients", words=10_000
    ),
    "transformer of 2 blocks and 64 characters, 64 positions, Adam, step, batch 32": Workload(
        partial(transformer, words=64), (64,), 32, optimizer="adam", words=64
    ),
    "MLP, one sample": Workload(mlp, FLAT, 1, "forward"),
    "5x5 network, one image": Workload(network_5x5, GRAY, 1, "forward"),
    "5x5 network, inference of 256 images": Workload(network_5x5, GRAY, 256, "forward"),
}
SIZES = (1, 4, 16, 64, 256, 1024)
PANELS = {  # the panels of --plot: {size: workload}
    "MLP 784-256-128-10: batch size": {size: Workload(mlp, FLAT, size) for size in SIZES},
    "5x5 network, 28x28: batch size": {size: Workload(network_5x5, GRAY, size) for size in SIZES},
    "MLP 784-width-width-10, batch 64: width": {
        width: Workload(partial(mlp, widths=(width, width)), FLAT, 64)
        for width in (64, 128, 256, 512, 1024, 2048, 4096)
    },
    "5x5 network, batch 64: image side": {
        side: Workload(network_5x5, (1, side, side), 64) for side in (8, 16, 32, 64, 128)
    },
}
POINTS = {
    f"{panel} {size}": workload
    for panel, points in PANELS.items()
    for size, workload in points.items()
}

# ------------------------------------------------------------------------------------------------
# Engines: each makes the function to time, in a process of its own
# ------------------------------------------------------------------------------------------------

ENGINES = {  # engine: threads of BLAS or PyTorch
    "torch": 2,
    "torch reordered": 2,
    "purenn": 2,
    "purenn reordered": 2,
    "torch one thread": 1,
    "torch reordered one thread": 1,
    "purenn one thread": 1,
    "purenn workers": 1,
    "purenn workers reordered": 1,
}
TORCH = ("torch", "torch reordered", "torch one thread", "torch reordered one thread")
PLAIN = ("purenn", "purenn reordered", "purenn one thread")
WORKERS = ("purenn workers", "purenn workers reordered")
LEARNING_RATE = 1e-6  # thousands of steps on one batch leave the network, and its cost, as it is


def measures(engine: str, workload: Workload) -> bool:
    """Whether an engine has anything of its own to measure here."""
    if engine in WORKERS and workload.batch == 1:
        return False
    if engine.endswith("one thread") and (workload.batch > 1 or workload.does != "forward"):
        return False
    if "reordered" in engine:
        return len(workload.shape) == 3 and (engine in TORCH or workload.does == "gradients")
    return True


def batch_of(workload: Workload) -> tuple[Any, Any]:
    """(x, labels), float32 and int64; both int64 if they are words."""
    import numpy as np

    rng = np.random.default_rng(0)
    if workload.words:
        x, labels = rng.integers(0, workload.words, (2, workload.batch, *workload.shape))
        return x, labels
    x = rng.normal(size=(workload.batch, *workload.shape)).astype(np.float32)
    return x, rng.integers(0, 10, workload.batch)


def purenn_gradients(net: Any, params: Any, x: Any, dy: Any) -> Any:
    """(dx, grads) of a forward and a backward pass."""
    _, cache = net.forward(params, x)
    return net.backward(params, cache, dy)


def gradients_of_parts(
    nn: Any, map_parts: Callable, net: Any, params: Any, xs: Any, dys: Any
) -> Any:
    """The dx of every part of a batch, and the sum of their grads."""
    results = map_parts(partial(purenn_gradients, net, params), xs, dys)
    dxs, grads = zip(*results, strict=True)
    return dxs, nn.tree_add(*grads)


def outputs_of_parts(map_parts: Callable, net: Any, params: Any, xs: Any) -> Any:
    """The outputs for all parts of a batch, in one array."""
    import numpy as np

    return np.concatenate([y for y, _ in map_parts(partial(net.forward, params), xs)])


def purenn_case(workload: Workload, engine: str) -> Callable[[], object]:
    """Reordered: x lies in memory as a convolution of purenn would hand it on."""
    import numpy as np

    nn = import_purenn()
    x, labels = batch_of(workload)
    net = workload.network(nn)
    params, _ = net.init(0, workload.shape)
    map_parts = ThreadPoolExecutor(2).map
    if workload.does == "step":
        gradients = nn.value_and_grad(net, nn.softmax_cross_entropy)
        if engine in WORKERS:
            gradients = nn.data_parallel(gradients, 2, map_parts)
        sgd = partial(nn.sgd, momentum=0.9)
        optimizer = {"sgd": sgd, "adam": nn.adam}[workload.optimizer](LEARNING_RATE)
        return purenn_step(nn, net, workload.shape, gradients, optimizer, (x, labels))
    xs = np.split(x, 2) if engine in WORKERS else [x]
    if "reordered" in engine:
        before = nn.conv2d(workload.shape[0], 1)
        xs = [before.forward(before.init(0, workload.shape)[0], part)[0] for part in xs]
    dys = [np.ones_like(net.forward(params, part)[0]) for part in xs]
    if engine in WORKERS and workload.does == "forward":
        return partial(outputs_of_parts, map_parts, net, params, xs)
    if engine in WORKERS:
        return partial(gradients_of_parts, nn, map_parts, net, params, xs, dys)
    if workload.does == "forward":
        return partial(net.forward, params, *xs)
    return partial(purenn_gradients, net, params, *xs, *dys)


def torch_layers() -> Any:
    """PyTorch's modules by purenn's names; they infer the size of their input, as purenn's do."""
    import torch
    from torch import nn

    class Residual(nn.Module):
        """branch(x) + shortcut(x)."""

        def __init__(self, branch: Any, shortcut: Any = nn.Identity()) -> None:
            super().__init__()
            self.branch, self.shortcut = branch, shortcut

        def forward(self, x: Any) -> Any:
            """The sum of both."""
            return self.branch(x) + self.shortcut(x)

    class Lazy(nn.Module):
        """A module that is made when the shape of a sample is known; the first of its outputs."""

        def __init__(self, make: Callable) -> None:
            super().__init__()
            self.make = make

        def forward(self, x: Any) -> Any:
            """What the module makes of x."""
            if not hasattr(self, "module"):
                self.module = self.make(x.shape[1:])
            y = self.module(x)
            return y[0] if isinstance(y, tuple) else y

    class Attention(nn.Module):
        """As `MultiheadAttention`, which takes longer."""

        def __init__(self, width: int, heads: int, causal: bool) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.heads, self.causal = heads, causal

        def forward(self, x: Any) -> Any:
            """Self-attention over x (N, T, D)."""
            q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
            return self.out(y.transpose(1, 2).flatten(2))

    class Positions(nn.Module):
        """x + P."""

        def __init__(self, shape: tuple[int, ...]) -> None:
            super().__init__()
            self.P = nn.Parameter(0.02 * torch.randn(*shape))

        def forward(self, x: Any) -> Any:
            """The sum."""
            return x + self.P

    class Last(nn.Module):
        """The last position."""

        def forward(self, x: Any) -> Any:
            """(N, D) of (N, T, D)."""
            return x[:, -1]

    return types.SimpleNamespace(
        sequential=nn.Sequential,
        residual=Residual,
        identity=nn.Identity,
        linear=nn.LazyLinear,
        conv2d=nn.LazyConv2d,
        batch_norm=nn.LazyBatchNorm2d,
        max_pool2d=nn.MaxPool2d,
        avg_pool2d=nn.AvgPool2d,
        global_avg_pool2d=lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        flatten=nn.Flatten,
        relu=nn.ReLU,
        tanh=nn.Tanh,
        gelu=partial(nn.GELU, "tanh"),
        conv2d_transpose=nn.LazyConvTranspose2d,
        embedding=nn.Embedding,
        position_embedding=partial(Lazy, Positions),
        layer_norm=lambda: Lazy(lambda shape: nn.LayerNorm(shape[-1])),
        attention=lambda heads, causal: Lazy(lambda shape: Attention(shape[-1], heads, causal)),
        gru=lambda units: Lazy(lambda shape: nn.GRU(shape[-1], units, batch_first=True)),
        lstm=lambda units: Lazy(lambda shape: nn.LSTM(shape[-1], units, batch_first=True)),
        last=Last,
    )


def torch_gradients(net: Any, x: Any, dy: Any) -> None:
    """A forward and a backward pass; gradients in net and x."""
    net.zero_grad()
    x.grad = None
    net(x).backward(dy)


def torch_case(workload: Workload, engine: str) -> Callable[[], object]:
    """Reordered: network and images in `torch.channels_last`."""
    import torch

    x, labels = map(torch.from_numpy, batch_of(workload))
    torch.manual_seed(0)
    net = workload.network(torch_layers())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # lazy modules are new, it says
        net(x)
    if "reordered" in engine:
        order = torch.channels_last
        net, x = net.to(memory_format=order), x.to(memory_format=order)
    if workload.does == "forward":
        return torch_forward(net, x)
    if workload.does == "gradients":
        x.requires_grad_(not workload.words)
        return partial(torch_gradients, net, x, torch.ones_like(net(x)))
    if workload.words:  # PyTorch's loss wants the classes in axis 1
        net, labels = torch.nn.Sequential(net, torch.nn.Flatten(0, -2)), labels.flatten()
    sgd = partial(torch.optim.SGD, momentum=0.9)
    optimizers = {"sgd": sgd, "adam": torch.optim.Adam}
    return torch_step(
        net, optimizers[workload.optimizer](net.parameters(), LEARNING_RATE), x, labels
    )


def make_case(case: str, engine: str) -> Callable[[], object]:
    """The function that an engine times for a case."""
    make = torch_case if engine in TORCH else purenn_case
    return make({**WORKLOADS, **POINTS}[case], engine)


# ------------------------------------------------------------------------------------------------
# Measurements, tables and the picture
# ------------------------------------------------------------------------------------------------


Times = dict[tuple[str, str], float]  # {(engine, case): seconds}
LIMIT = 1.1  # ratios above it are called slower


def measure(cases: dict[str, Workload], engines: list[str], rounds: int, seconds: float) -> Times:
    """Medians of all engines that measure a case; a turn takes about `seconds`, or one call."""
    workers = {
        engine: Worker(__file__, engine, thread_variables(ENGINES[engine])) for engine in engines
    }
    turns = {
        (engine, case): worker.repeats(case, seconds)
        for case, workload in cases.items()
        for engine, worker in workers.items()
        if measures(engine, workload)
    }
    times = measure_turns(workers, turns, rounds)
    for worker in workers.values():
        worker.close()
    return times


def fastest(times: Times, case: str, engines: tuple[str, ...]) -> float:
    """The time of the fastest of these engines; nan where none has measured the case."""
    measured = [times[engine, case] for engine in engines if (engine, case) in times]
    return min(measured, default=math.nan)


def ratio(times: Times, case: str, engines: tuple[str, ...] = PLAIN + WORKERS) -> float:
    """purenn / PyTorch; nan where one is missing."""
    return fastest(times, case, engines) / fastest(times, case, TORCH)


def ratio_table(times: Times, cases: dict[str, Workload]) -> str:
    """Milliseconds and ratios, a row for each case; what is missing stays empty."""
    rows = []
    for case in cases:
        columns = (TORCH, PLAIN, WORKERS)
        cells = [f"{fastest(times, case, engines) * 1e3:.3f}" for engines in columns]
        cells += [f"{value:.2f}" for value in (ratio(times, case), ratio(times, case, PLAIN))]
        rows.append([case, *("" if cell == "nan" else cell for cell in cells)])
    head = ["milliseconds", "PyTorch", "purenn", "purenn, 2 workers", "best ratio", "plain ratio"]
    return table(head, rows)


def summary(times: Times, cases: dict[str, Workload]) -> str:
    """The geometric means of the ratios, and how many of the best are small."""
    best = [ratio(times, case) for case in cases]
    plain = statistics.geometric_mean([ratio(times, case, PLAIN) for case in cases])
    counts = [sum(value <= limit for value in best) for limit in (1.0, LIMIT)]
    return (
        f"Geometric mean {statistics.geometric_mean(best):.2f} (plain {plain:.2f}); of {len(best)}"
        f" workloads {counts[0]} are at most 1.0, and {counts[1]} at most {LIMIT}."
    )


def slower_sizes(times: Times, panel: str) -> str:
    """One sentence: at which sizes of a panel PyTorch is the better choice."""
    slow = [f"{size:,}" for size in PANELS[panel] if ratio(times, f"{panel} {size}") > LIMIT]
    where = ", ".join(slow) if slow else "no size measured"
    return f"{panel}: purenn takes more than {LIMIT} times as long as PyTorch at {where}."


def draw(times: Times, panels: list[str], title: str, path: str) -> None:
    """Time of a step against the size of the work, both axes logarithmic, ratios at the points."""
    import matplotlib.pyplot as plt

    width = min(len(panels), 2)
    height = math.ceil(len(panels) / width)
    figure, axes = plt.subplots(
        height, width, figsize=(6 * width, 4.2 * height), layout="constrained", squeeze=False
    )
    lines = {"PyTorch": TORCH, "purenn": PLAIN, "purenn, 2 workers": WORKERS}
    for panel, axis in zip(panels, axes.flat, strict=False):
        sizes = list(PANELS[panel])
        for (label, engines), style in zip(lines.items(), ("s-", "o-", "o--"), strict=True):
            seconds = [fastest(times, f"{panel} {size}", engines) for size in sizes]
            axis.plot(sizes, [value * 1e3 for value in seconds], style, label=label, markersize=4)
        for size in sizes:
            case = f"{panel} {size}"
            if not math.isnan(ratio(times, case)):
                best = fastest(times, case, PLAIN + WORKERS) * 1e3
                place = {"xytext": (0, -13), "textcoords": "offset points", "ha": "center"}
                axis.annotate(f"{ratio(times, case):.2f}", (size, best), fontsize=8, **place)
        axis.set(xscale="log", yscale="log", ylabel="milliseconds per step")
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
        axis.minorticks_off()
        axis.margins(y=0.1)
        axis.set_title(panel, fontsize=10)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    lines_of_title = [textwrap.fill(line, 100 * width) for line in title.splitlines()]
    explanation = "Numbers at the points: the faster curve of purenn / PyTorch."
    figure.suptitle("\n".join([*lines_of_title, explanation]), fontsize=7)
    figure.savefig(path, dpi=150)


def unset_kernels() -> str:
    """Unset what selects other kernels than OpenBLAS's own, and say what it was."""
    names = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
    found = [f"{name}={os.environ.pop(name)}" for name in names if name in os.environ]
    return f"\n{' and '.join(found)} unset for this run: OpenBLAS's own kernels." if found else ""


def main() -> None:
    """Have the engines take turns, and print the table or draw the picture."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, help="turns of each engine (9; with --plot 5)")
    parser.add_argument("--quick", action="store_true", help="3 short turns, for a first look")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows or panels with TEXT")
    parser.add_argument("--plot", metavar="FILE", help="measure growing work, and draw it here")
    options = parser.parse_args()
    if options.worker:
        serve(partial(make_case, engine=options.worker))
        return
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    wanted = options.only.lower()
    panels = [panel for panel in PANELS if options.plot and wanted in panel.lower()]
    names = [f"{panel} {size}" for panel in panels for size in PANELS[panel]]
    cases = {name: POINTS[name] for name in names}
    if not options.plot:
        cases = {name: row for name, row in WORKLOADS.items() if wanted in name.lower()}
    if not cases:
        parser.error(f"--only: nothing has {options.only!r} in its name")
    kernels = unset_kernels()
    rounds, seconds = (5, 0.05) if options.plot else (9, 0.1)
    if options.quick:
        rounds, seconds = 3, 0.02
    rounds = options.rounds or rounds
    with_torch = has_torch()
    engines = [engine for engine in ENGINES if with_torch or engine not in TORCH]
    neighbors = Neighbors()
    times = measure(cases, engines, rounds, seconds)
    load = neighbors.report()
    title = f"{header()}, two threads, medians of {rounds} turns{kernels}"
    print(f"{title}\n{load}\n\n{ratio_table(times, cases)}\n")
    if not with_torch:
        print("Without PyTorch there are no ratios.")
    elif options.plot:
        print("\n".join(slower_sizes(times, panel) for panel in panels))
    else:
        print(summary(times, cases))
    if options.plot:
        draw(times, panels, f"{title}\n{load}", options.plot)


if __name__ == "__main__":
    main()
