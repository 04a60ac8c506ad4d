"""What the benchmarks share: the header of a report, engines that take turns, tables."""

from __future__ import annotations

import datetime
import itertools
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def import_purenn(*, keep_memory: bool = True) -> Any:
    """purenn, in a process that keeps freed memory unless told otherwise."""
    sys.path.insert(0, str(REPOSITORY))
    import purenn

    if keep_memory:
        purenn.keep_freed_memory()
    return purenn


def cpu() -> str:
    """The processor's name and the number of cores that this process may use."""
    names = []
    if os.path.exists("/proc/cpuinfo"):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.processor()}, {cores} cores"


def version(package: str) -> str:
    """The installed version of a package."""
    import importlib.metadata

    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} not installed"


def blas() -> str:
    """The BLAS that NumPy was built with, its kernels, and whether the environment selects them."""
    import numpy as np

    config: Any = np.show_config(mode="dicts")
    library = config.get("Build Dependencies", {}).get("blas", {})
    coretype = os.environ.get("OPENBLAS_CORETYPE", "not set")
    name = f"{library.get('name', 'unknown')} {library.get('version', '')}".strip()
    return f"BLAS {name} with {blas_kernels()} kernels, OPENBLAS_CORETYPE {coretype}"


def blas_kernels() -> str:
    """The name of the kernels that the OpenBLAS of a NumPy wheel has selected, or "unknown"."""
    import ctypes

    import numpy as np

    packages = pathlib.Path(np.__file__).parent.parent
    for library in (packages / "numpy.libs").glob("*openblas*"):
        loaded = ctypes.CDLL(str(library))
        for name in ("scipy_openblas_get_corename64_", "openblas_get_corename64_"):
            if hasattr(loaded, name):
                function = getattr(loaded, name)
                function.restype = ctypes.c_char_p
                return str(function().decode())
    return "unknown"


def header() -> str:
    """Date, machine and versions: numbers mean nothing without them."""
    return (
        f"{datetime.date.today()}, {cpu()}, Python {platform.python_version()},"
        f" {version('numpy')}, {version('torch')}, {blas()}"
    )


class Neighbors:
    """How much of the machine other processes use, where there is a /proc/stat."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.before = self._foreign_seconds()

    @staticmethod
    def _foreign_seconds() -> float | None:
        """CPU seconds of all processes except this one and its children that have ended."""
        if not os.path.exists("/proc/stat"):
            return None
        fields = pathlib.Path("/proc/stat").read_text().split()[1:9]
        user, nice, system, _, _, irq, softirq, steal = map(int, fields)
        ticks = user + nice + system + irq + softirq + steal
        return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])

    def report(self) -> str:
        """One sentence; call it once the children have ended."""
        now = self._foreign_seconds()
        if now is None or self.before is None:
            return "The load of other processes is unknown here."
        capacity = (time.perf_counter() - self.started) * (os.cpu_count() or 1)
        share = max(0.0, (now - self.before) / capacity)
        advice = "; above 5 % the times mean little: run it again" if share > 0.05 else ""
        return f"Other processes used {share:.0%} of the machine during the run{advice}."


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def has_torch() -> bool:
    """Whether PyTorch can be imported; prints how to install it if not."""
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        print("PyTorch is missing: its columns stay empty. In an environment of its own:")
        print("    pip install numpy torch==2.13.0\n")
        return False
    return True


class Worker:
    """A process of the script that measures one engine on request.

    Each engine has a process of its own, so that its thread pools do not disturb another's; they
    take turns, so that a noisy neighbor disturbs all alike.
    """

    def __init__(
        self, script: str, engine: str, environment: dict[str, str], launcher: Sequence[str] = ()
    ) -> None:
        self.process = subprocess.Popen(
            [*launcher, sys.executable, script, "--worker", engine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def measure(self, case: str, repeats: int) -> float:
        """Seconds per call of a case, the mean of `repeats` calls in a row."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{case}|{repeats}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def repeats(self, case: str, seconds: float) -> int:
        """How many calls of a case take about this long; at least 1."""
        return max(1, round(seconds / self.measure(case, 1)))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def warm_up(function: Callable[[], object], calls: int, seconds: float) -> None:
    """Call a function until it has been called so often or for so long."""
    end = time.perf_counter() + seconds
    for _ in range(calls):
        function()
        if time.perf_counter() > end:
            return


def serve(cases: Callable[[str], Callable[[], object]]) -> None:
    """The worker's side: `cases(name)` makes the function to time."""
    functions: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        case, repeats = line.strip().split("|")
        if case not in functions:
            functions[case] = cases(case)
            warm_up(functions[case], 20, 0.5)
        function = functions[case]
        warm_up(function, 5, 0.1)  # wakes the threads of this process and refills the caches
        started = time.perf_counter()
        for _ in range(int(repeats)):
            function()
        print((time.perf_counter() - started) / int(repeats), flush=True)


def thread_variables(count: int) -> dict[str, str]:
    """The environment in which BLAS and PyTorch have this number of threads."""
    return {f"{pool}_NUM_THREADS": str(count) for pool in ("OMP", "MKL", "OPENBLAS")}


def take_turns(
    workers: dict[str, Worker], cases: dict[str, int], rounds: int
) -> dict[tuple[str, str], float]:
    """{(engine, case): median seconds}; every engine is measured once a round."""
    turns = {(engine, case): repeats for case, repeats in cases.items() for engine in workers}
    return measure_turns(workers, turns, rounds)


def measure_turns(
    workers: dict[str, Worker], turns: dict[tuple[str, str], int], rounds: int
) -> dict[tuple[str, str], float]:
    """Median seconds of every turn {(engine, case): repeats}, each taken once a round."""
    seconds: dict[tuple[str, str], list[float]] = {turn: [] for turn in turns}
    for _ in range(rounds):
        for (engine, case), repeats in turns.items():
            time.sleep(0.15)  # until the previous engine's threads have stopped spinning
            seconds[engine, case].append(workers[engine].measure(case, repeats))
    return {turn: statistics.median(values) for turn, values in seconds.items()}


def purenn_step(
    nn: Any, net: Any, shape: tuple[int, ...], gradients: Callable, optimizer: Any, batch: Any
) -> Callable[[], object]:
    """A training step as the README writes it, always on the same batch (x, labels)."""
    params, _ = net.init(0, shape)
    now = {"params": params, "state": optimizer.init(params)}
    steps = itertools.count()

    def step() -> None:
        params = now["params"]
        _, grads, cache = gradients(nn.training(params, (0, next(steps))), *batch)
        params, now["state"] = optimizer.step(params, grads, now["state"])
        now["params"] = nn.update_statistics(params, cache)

    return step


def torch_step(net: Any, optimizer: Any, images: Any, target: Any) -> Callable[[], object]:
    """A training step as PyTorch's own tutorials write it."""
    import torch

    loss_function = torch.nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        loss = loss_function(net(images), target)
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def torch_forward(net: Any, images: Any) -> Callable[[], object]:
    """A forward pass at inference."""
    import torch

    net.eval()

    def forward() -> object:
        with torch.inference_mode():
            return net(images)

    return forward
