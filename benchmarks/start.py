"""What it costs to start: importing purenn, and going from a cold start to the first prediction.

    python benchmarks/start.py [--rounds 15] [--quick]

The prediction: start Python, load a saved 784-256-128-10 network, classify one image, exit.
"""

from __future__ import annotations

import argparse
import os
import py_compile
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from common import REPOSITORY, Neighbors, has_torch, header, table

IMPORTS = {
    "numpy": "import numpy",
    "numpy and purenn": "import numpy, purenn",
    "the same, without a .pyc": "import sys; sys.path[0] = {source!r}; import numpy, purenn",
}
PREDICTIONS = {
    "purenn": """
import numpy as np
from purenn import linear, load, relu, sequential
net = sequential(linear(256), relu(), linear(128), relu(), linear(10))
logits, _ = net.forward(load("model.npz"), np.zeros((1, 784), np.float32))
print(logits.argmax())
""",
    "PyTorch": """
import torch
from torch import nn
net = nn.Sequential(
    nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
)
net.load_state_dict(torch.load("model.pt"))
with torch.inference_mode():
    print(net(torch.zeros(1, 784)).argmax().item())
""",
}
SAVE_PURENN = """
from purenn import linear, relu, save, sequential
net = sequential(linear(256), relu(), linear(128), relu(), linear(10))
save("model.npz", net.init(0, (784,))[0])
"""
SAVE_TORCH = PREDICTIONS["PyTorch"].partition("net.load")[0] + (
    "torch.save(net.state_dict(), 'model.pt')"
)


def run(code: str, folder: str) -> tuple[float, float]:
    """(seconds, peak memory in MB) of a Python process that runs some code."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"a benchmarked process failed: {code}")
    return seconds, usage.ru_maxrss / 1024


def medians(codes: dict[str, str], folder: str, rounds: int) -> dict[str, tuple[float, float]]:
    """{name: (median seconds, median MB)}; they take turns."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in codes}
    for _ in range(rounds):
        for name, code in codes.items():
            measured[name].append(run(code, folder))
    return {
        name: (statistics.median(s for s, _ in values), statistics.median(m for _, m in values))
        for name, values in measured.items()
    }


def main() -> None:
    """Measure both, and print two tables."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each (default 15)")
    parser.add_argument("--quick", action="store_true", help="3 turns, for a first look")
    options = parser.parse_args()
    rounds = 3 if options.quick else options.rounds
    neighbors = Neighbors()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as source:
        shutil.copy(REPOSITORY / "purenn.py", source)
        shutil.copy(REPOSITORY / "purenn.py", folder)
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # so that `source` stays uncompiled
        py_compile.compile(os.path.join(folder, "purenn.py"), doraise=True)

        print(f"{header()}, medians of {rounds} turns\n")
        codes = {name: code.format(source=source) for name, code in IMPORTS.items()}
        imports = medians(codes, folder, rounds)
        base = imports["numpy"][0]
        rows = [
            [name, f"{seconds * 1e3:.0f}", f"{(seconds - base) * 1e3:.0f}"]
            for name, (seconds, _) in imports.items()
        ]
        print(table(["imported", "process, ms", "beyond NumPy, ms"], rows) + "\n")

        codes = {"purenn": PREDICTIONS["purenn"]}
        run(SAVE_PURENN, folder)
        if has_torch():
            run(SAVE_TORCH, folder)
            codes = PREDICTIONS
        starts = medians(codes, folder, rounds)
        rows = [[name, f"{s * 1e3:.0f}", f"{mb:.0f}"] for name, (s, mb) in starts.items()]
        if "PyTorch" in starts:
            ratios = [a / b for a, b in zip(starts["purenn"], starts["PyTorch"], strict=True)]
            rows.append(["ratio", *(f"{ratio:.2f}" for ratio in ratios)])
        print(table(["cold start to prediction", "ms", "peak memory, MB"], rows))
        print(f"\n{neighbors.report()}")


if __name__ == "__main__":
    main()
