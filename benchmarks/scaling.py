"""Steps per second by workers and ranks, the size of the messages, and estimates for clusters.

    python benchmarks/scaling.py [--rounds 11] [--quick]

Measures one worker with one and with two BLAS threads, two workers, two MPI ranks (with mpi4py) and
PyTorch eager with two threads (where it is installed); they take turns. From the step time by
images per rank and the bytes that the ranks add up, it estimates clusters of 8 to 256 ranks, each
with a network link of its own.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
)

CASES = {  # case: repeats a turn
    "mlp 128": 20,
    "5x5 64": 10,
    "5x5 128": 6,
    "3x3 64": 3,
}
LABELS = {
    "mlp 128": "MLP 784-512-512-10 with batch norm and dropout, Adam, batch 128",
    "5x5 64": "two 5x5 convolutions, SGD with momentum, batch 64",
    "5x5 128": "two 5x5 convolutions, SGD with momentum, batch 128",
    "3x3 64": "four 3x3 convolutions and batch norm, SGD with momentum, batch 64",
}
ENGINES = {  # engine: (name, BLAS threads)
    "one": ("1 worker, 1 thread", 1),
    "blas": ("1 worker, 2 threads", 2),
    "workers": ("2 workers", 1),
    "ranks": ("2 ranks", 1),
    "torch": ("PyTorch, 2 threads", 2),
    "last": ("PyTorch, channels last", 2),
}
ESTIMATED = ("mlp", "5x5")
LOCAL = (4, 8, 16, 32, 64, 128)  # images per rank whose step is measured
RANKS = (8, 16, 32, 64, 128, 256)
NETWORKS = {
    "10 Gbit/s": (10e9 / 8, 30e-6),
    "100 Gbit/s": (100e9 / 8, 3e-6),
}  # bytes per second, seconds per message


def setting(case: str) -> tuple[Any, Any, Any, Any]:
    """(purenn, network, optimizer, batch) of a case like "5x5 64"."""
    import cnn
    import numpy as np

    nn = import_purenn()
    kind, size = case.split()
    if kind != "mlp":
        net = cnn.network(nn, case, nn.conv2d, nn.max_pool2d)
        return nn, net, nn.sgd(0.01, momentum=0.9), cnn.batch_of(case)
    layers = [nn.flatten()]
    for _ in range(2):
        layers += [nn.linear(512, bias=False), nn.batch_norm(), nn.relu(), nn.dropout(0.3)]
    rng = np.random.default_rng(0)
    images = rng.normal(size=(int(size), 1, 28, 28)).astype(np.float32)
    batch = images, rng.integers(0, 10, int(size))
    return nn, nn.sequential(*layers, nn.linear(10)), nn.adam(), batch


def purenn_case(case: str, workers: int = 1) -> Callable[[], object]:
    """A step in this process."""
    nn, net, optimizer, batch = setting(case)
    gradients = nn.value_and_grad(net, nn.softmax_cross_entropy)
    if workers > 1:
        gradients = nn.data_parallel(gradients, workers, ThreadPoolExecutor(workers).map)
    return purenn_step(nn, net, (1, 28, 28), gradients, optimizer, batch)


def rank_gradients(params: Any, x: Any, target: Any, *, gradients: Callable, team: Any) -> tuple:
    """loss, grads and cache of all ranks, as `training.loop.take_step` computes them."""
    import numpy as np

    from training.team import add_ranks

    loss, grads, cache = gradients(params, x, target)
    tree = {"loss": np.array(loss), "grads": grads, "cache": cache}
    return tuple(add_ranks(team, tree).values())


def ranks_case(case: str) -> Callable[[], object]:
    """A step of all ranks together."""
    nn, net, optimizer, batch = setting(case)
    from training.team import Team, all_ranks, map_own

    communicator = all_ranks()
    team = Team(communicator.Get_size(), communicator=communicator)
    gradients = nn.value_and_grad(net, nn.softmax_cross_entropy)
    parts = nn.data_parallel(gradients, team.shards, partial(map_own, team=team))
    added = partial(rank_gradients, gradients=parts, team=team)
    return purenn_step(nn, net, (1, 28, 28), added, optimizer, batch)


def allreduce_case(case: str) -> Callable[[], object]:
    """The sum over the ranks, by itself."""
    import numpy as np

    size = message_size(case)  # imports purenn, and makes training importable
    from training.team import all_ranks

    own = np.zeros(size // 4, np.float32)
    return partial(all_ranks().Allreduce, own, np.empty_like(own))


def message_size(case: str) -> int:
    """The size of the buffer that the ranks add up, in bytes."""
    nn, net, _, (x, labels) = setting(case)
    params, _ = net.init(0, (1, 28, 28))
    gradients = nn.data_parallel(nn.value_and_grad(net, nn.softmax_cross_entropy), 2)
    _, grads, cache = gradients(nn.training(params, 0), x, labels)
    return 4 * (1 + nn.count_parameters(grads) + nn.count_parameters(cache))


def torch_case(case: str, channels_last: bool = False) -> Callable[[], object]:
    """As PyTorch's own tutorials write it."""
    import cnn
    import torch
    from common import torch_step

    if not case.startswith("mlp"):
        return cnn.torch_case(case, channels_last)
    x, labels = setting(case)[3]
    layers: list[Any] = [torch.nn.Flatten()]
    for before in (784, 512):
        layers += [torch.nn.Linear(before, 512, bias=False), torch.nn.BatchNorm1d(512)]
        layers += [torch.nn.ReLU(), torch.nn.Dropout(0.3)]
    net = torch.nn.Sequential(*layers, torch.nn.Linear(512, 10))
    optimizer = torch.optim.Adam(net.parameters())
    return torch_step(net, optimizer, torch.from_numpy(x), torch.from_numpy(labels))


MAKERS: dict[str, Callable[[str], Callable[[], object]]] = {
    "one": purenn_case,
    "blas": purenn_case,
    "workers": partial(purenn_case, workers=2),
    "torch": torch_case,
    "last": partial(torch_case, channels_last=True),
}


def serve_ranks() -> None:
    """`serve` on all ranks: rank 0 reads what to measure; the others sleep until it tells them."""
    import numpy as np
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    functions: dict[str, Callable[[], object]] = {}
    lines = iter(sys.stdin) if world.Get_rank() == 0 else iter([])
    while True:
        line = np.zeros(64, np.uint8)
        if world.Get_rank() == 0:
            text = next(lines, "").strip().encode()
            line[: len(text)] = np.frombuffer(text, np.uint8)
        request = world.Ibcast(line)
        while not request.Test():
            time.sleep(0.01)
        case, _, repeats = bytes(line).decode().rstrip("\0").partition("|")
        if not case:
            return
        if case not in functions:
            make = allreduce_case if case.startswith("allreduce ") else ranks_case
            functions[case] = make(case.removeprefix("allreduce "))
        for _ in range(5):
            functions[case]()
        world.Barrier()
        started = time.perf_counter()
        for _ in range(int(repeats)):
            functions[case]()
        if world.Get_rank() == 0:
            print((time.perf_counter() - started) / int(repeats), flush=True)


def mpi_launcher() -> list[str]:
    """The words before a command that start two ranks of it; empty without MPI."""
    import importlib.util

    beside = os.path.join(os.path.dirname(sys.executable), "mpiexec")
    launcher = beside if os.path.exists(beside) else shutil.which("mpiexec")
    if launcher is None or importlib.util.find_spec("mpi4py") is None:
        print("The column of ranks is missing: pip install mpi4py mpich\n")
        return []
    return [launcher, "-n", "2"]


def allreduce_seconds(size: int, ranks: int, network: str) -> float:
    """The time to add up a buffer: reduce-scatter and allgather, 2·log2(ranks) messages."""
    bandwidth, latency = NETWORKS[network]
    return 2 * size * (ranks - 1) / ranks / bandwidth + 2 * math.log2(ranks) * latency


def estimate(seconds: dict[tuple[str, str], float], sizes: dict[str, int]) -> str:
    """Tables of the speed-up of clusters over one rank, from the steps of one rank."""
    lines = []
    for kind in ESTIMATED:
        one = {count: seconds["one", f"{kind} {count}"] for count in LOCAL}
        rows = []
        for network in NETWORKS:
            waits = {ranks: allreduce_seconds(sizes[kind], ranks, network) for ranks in RANKS}
            grown = [ranks * one[128] / (one[128] + waits[ranks]) for ranks in RANKS]
            alone = one[128] * 1024 / 128
            fixed = [alone / (one[1024 // ranks] + waits[ranks]) for ranks in RANKS]
            rows.append([f"{network}, 128 images per rank", *(f"{value:.0f}" for value in grown)])
            rows.append([f"{network}, 1,024 images in total", *(f"{value:.0f}" for value in fixed)])
        lines.append(table([f"{kind}: times one rank", *map(str, RANKS)], rows))
    return "\n\n".join(lines)


def mpi_version(launcher: list[str]) -> str:
    """The MPI that mpi4py uses."""
    if not launcher:
        return "no MPI"
    from mpi4py import MPI

    return MPI.Get_library_version().split("\n")[0].strip("\0 ").replace("\t", " ")


def start_workers(launcher: list[str]) -> dict[str, Worker]:
    """A worker for every engine that is installed."""
    missing = set() if has_torch() else {"torch", "last"}
    missing |= set() if launcher else {"ranks"}
    workers = {}
    for engine, (_, threads) in ENGINES.items():
        if engine not in missing:
            before = launcher if engine == "ranks" else []
            workers[engine] = Worker(__file__, engine, thread_variables(threads), before)
    return workers


def speed_table(times: dict[tuple[str, str], float], engines: list[str]) -> str:
    """Steps per second of every case, and how many times those of one worker with one thread."""
    rows = []
    for case, label in LABELS.items():
        cells = [label]
        for engine in engines:
            ratio = f" ({times['one', case] / times[engine, case]:.2f})"
            cells.append(f"{1 / times[engine, case]:.1f}{ratio}")
        rows.append(cells)
    head = "steps per second (times 1 worker, 1 thread)"
    return table([head, *(ENGINES[engine][0] for engine in engines)], rows)


def main() -> None:
    """Have the engines take turns, and print the tables."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=11, help="turns of each engine (default 11)")
    parser.add_argument("--quick", action="store_true", help="3 short turns, for a first look")
    options = parser.parse_args()
    if options.worker == "ranks":
        serve_ranks()
        return
    if options.worker:
        serve(MAKERS[options.worker])
        return
    rounds = 3 if options.quick else options.rounds
    repeats = {
        case: max(count // 3, 1) if options.quick else count for case, count in CASES.items()
    }
    neighbors, launcher = Neighbors(), mpi_launcher()
    workers = start_workers(launcher)
    times = take_turns(workers, repeats, rounds)
    by_images = {f"{kind} {count}": max(256 // count, 2) for kind in ESTIMATED for count in LOCAL}
    times |= take_turns({"one": workers["one"]}, by_images, max(rounds // 3, 1))
    sizes = {kind: message_size(f"{kind} 128") for kind in ESTIMATED}
    sums = {}
    if launcher:
        sent = {f"allreduce {kind} 128": 50 for kind in ESTIMATED}
        sums = take_turns({"ranks": workers["ranks"]}, sent, rounds)
    for worker in workers.values():
        worker.close()
    print(f"{header()}, {mpi_version(launcher)}, medians of {rounds} turns\n")
    print(f"{speed_table(times, list(workers))}\n\n{neighbors.report()}\n")
    for kind, size in sizes.items():
        here = sums.get(("ranks", f"allreduce {kind} 128"))
        measured = f"; two ranks here take {here * 1e3:.2f} ms for it" if here else ""
        print(f"{kind}: the ranks add up {size / 1e6:.2f} MB per step{measured}.")
    rows = [[kind, *(f"{times['one', f'{kind} {n}'] * 1e3:.2f}" for n in LOCAL)] for kind in sizes]
    print(f"\n{table(['ms per step, 1 worker, by images', *map(str, LOCAL)], rows)}\n")
    print(estimate(times, sizes))


if __name__ == "__main__":
    main()
