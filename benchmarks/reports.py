"""The experiments of the five course reports behind this project, each a command of a script.

    python benchmarks/reports.py --data data/mnist          # all, two at a time
    python benchmarks/reports.py --data data/mnist 2 sine   # report 2, and one by its name
    python benchmarks/reports.py --list

Finished experiments are not repeated: stop it at any time, and call it again to go on. It ends with
Markdown tables of all results.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

import common

# What the networks of the reports do without, and the plain update rule.
PLAIN = "--no-batch-norm --dropout 0 --label-smoothing 0"
SGD = "--optimizer sgd --momentum 0 --schedule constant"
MOMENTUM = "--optimizer sgd --momentum 0.9 --schedule constant"
# Report 2: 5,000 training, 1,000 validation and 1,000 test images of 16 x 16.
SMALL = "--size 16 --train-size 5000 --validation 1000 --test-size 1000"

TITLES = {
    1: "MLP and CNN on MNIST",
    2: "16x16 digits: 5,000 training, 1,000 validation, 1,000 test images, made from MNIST",
    3: "MLP 128-64-64-10 with sigmoid, centered pixels",
    4: "Curve fitting, and an MLP's depth, width and options (theirs on characters, here MNIST)",
    5: "CNN with average pooling",
}


class Experiment(NamedTuple):
    """One row of the table."""

    report: int
    name: str
    what: str
    theirs: str  # the number in the report, "" where it gives none
    command: str  # {name} stands for the folder of another experiment
    note: str = ""


def merge_options(*texts: str) -> str:
    """Command-line options, later ones in the place of earlier ones."""
    chosen: dict[str, list[str]] = {}
    for word in " ".join(texts).split():
        if word.startswith("--"):
            flag, chosen[word] = word, []
            chosen.pop("--no-" + word[2:], None)
        else:
            chosen[flag].append(word)
    return "".join(" ".join(["", flag, *values]) for flag, values in chosen.items())


def mlp_rows(report: int, base: str, *rows: tuple[str, ...]) -> list[Experiment]:
    """Experiments of train_mlp.py with options in common."""
    return [
        Experiment(report, name, what, theirs, "train_mlp.py" + merge_options(base, options), *note)
        for name, what, theirs, options, *note in rows
    ]


def cnn_rows(report: int, base: str, *rows: tuple[str, ...]) -> list[Experiment]:
    """Experiments of train_cnn.py with options in common."""
    mlp = mlp_rows(report, base, *rows)
    script = "train_cnn.py --shards 1"  # as in the reports; each has one core here
    return [row._replace(command=row.command.replace("train_mlp.py", script, 1)) for row in mlp]


# fmt: off
DEPTHS, WIDTHS = (2, 4, 8, 16), (10, 20, 30, 50, 100)

EXPERIMENTS = [
    *mlp_rows(
        1,
        f"{PLAIN} {SGD} --lr 0.1 --batch-size 64 --epochs 5",
        ("mlp-128", "128 hidden units", "0.9042", "--hidden 128"),
        ("mlp-256", "256 hidden units", "0.9201", "--hidden 256"),
        ("mlp-512", "512 hidden units", "0.9382", "--hidden 512"),
        ("mlp-linear", "linear only", "", "--hidden"),
        ("mlp-mean", "mean gradient, rate 0.01", "", "--hidden 128 --lr 0.01"),
        ("mlp-sum", "summed gradient, rate 0.01", "", "--hidden 128 --lr 0.01 --reduction sum"),
        ("mlp-l2", "L2 of 0.0001", "", "--hidden 128 --weight-decay 1e-4"),
        ("mlp-drop-2", "dropout 0.2", "", "--hidden 128 --dropout 0.2"),
        ("mlp-drop-5", "dropout 0.5", "", "--hidden 128 --dropout 0.5"),
        ("mlp-sgd", "SGD, rate 0.02", "0.90", "--hidden 128 --lr 0.02"),
        ("mlp-momentum", "momentum 0.9, rate 0.02", "0.87", "--hidden 128 --lr 0.02 --momentum 0.9"),
        ("mlp-step", "StepLR: x 0.1 every 2 epochs", "", "--hidden 128 --schedule step --lr-epochs 2"),
        ("mlp-exp-90", "ExpLR 0.9", "", "--hidden 128 --schedule exponential --lr-factor 0.9"),
        ("mlp-exp-99", "ExpLR 0.99", "", "--hidden 128 --schedule exponential --lr-factor 0.99"),
        ("mlp-multistep", "MultiStepLR: x 0.1 at epochs 3 and 4", "", "--hidden 128 --schedule multistep --lr-epochs 3 4"),
        ("mlp-augment", "augmented images", "", "--hidden 128 --augment"),
    ),
    *mlp_rows(1, "", ("mlp-best", "best MLP: the script's defaults", "0.92", "")),
    *cnn_rows(
        1,
        f"{PLAIN} {SGD} --lr 0.05 --batch-size 64 --epochs 2 --train-size 50000",
        ("cnn-6", "6 channels", "0.73", "--channels 6"),
        ("cnn-8", "8 channels", "0.82", "--channels 8"),
        ("cnn-12", "12 channels", "0.80", "--channels 12"),
        ("cnn-hidden-256", "8 channels, 256 hidden units", "", "--channels 8 --hidden 256"),
        ("cnn-pool-3", "8 channels, pool 3", "", "--channels 8 --pool 3"),
        ("cnn-two", "two convolutions, 8 and 8", "", "--channels 8 8"),
        ("cnn-one-linear", "8 channels, one linear layer", "", "--channels 8 --hidden"),
        ("cnn-1-epoch", "8 channels, 1 epoch", "", "--channels 8 --epochs 1"),
        ("cnn-300", "8 channels, 300 images", "", "--channels 8 --train-size 300 --epochs 50"),
    ),
    *cnn_rows(1, "", ("cnn-best", "best CNN: the script's defaults", "0.82", "")),
    *mlp_rows(
        2,
        f"{SMALL} --activation leaky-relu --no-batch-norm --dropout 0 {SGD} --batch-size 8 --epochs 20",
        ("small-10", "hidden 10, MSE", "0.903", "--hidden 10 --loss mse --lr 0.5 --schedule cosine --epochs 100", "0.897 and 0.890 with seeds 1 and 2"),
        ("small-deep", "hidden 32-32-64-64-32-16, MSE, L2 of 0.0003", "0.95", "--hidden 32 32 64 64 32 16 --loss mse --lr 0.3 --weight-decay 3e-4 --schedule cosine --epochs 100", "0.947 without L2"),
        ("small-momentum", "the same, momentum 0.9", "", "--hidden 32 32 64 64 32 16 --loss mse --lr 0.03 --momentum 0.9 --weight-decay 3e-4 --schedule cosine --epochs 100"),
        ("small-l2", "hidden 10, MSE, L2 of 0.0003", "0.91", "--hidden 10 --loss mse --lr 0.5 --weight-decay 3e-4 --schedule cosine --epochs 100"),
        ("small-ce", "hidden 64, cross entropy", "0.931", "--hidden 64 --label-smoothing 0 --lr 0.02 --epochs 40"),
        ("small-drop", "hidden 64, cross entropy, dropout 0.2", "0.937", "--hidden 64 --label-smoothing 0 --lr 0.02 --dropout 0.2"),
        ("small-soft", "hidden 64, soft labels (smoothing 0.1)", "", "--hidden 64 --lr 0.02 --label-smoothing 0.1"),
        ("small-tuned", "only the last layer tuned, from the deep network", "", "--hidden 32 32 64 64 32 16 --label-smoothing 0 --lr 0.02 --epochs 5 --init-from {small-deep}/model.npz --train-only out"),
        ("small-stretched", "hidden 64, stretched images", "", "--hidden 64 --label-smoothing 0 --lr 0.02 --augment stretch=0.2"),
        ("small-shifted", "hidden 64, shifted images", "", "--hidden 64 --label-smoothing 0 --lr 0.02 --augment shift=1"),
        ("small-rotated", "hidden 64, rotated images", "", "--hidden 64 --label-smoothing 0 --lr 0.02 --augment rotation=10"),
    ),
    *cnn_rows(
        2,
        f"{SMALL} --channels 32 --kernel 5 --pool 3 --activation leaky-relu {PLAIN} --hidden 64 --batch-size 8",
        ("small-conv", "convolution of 32 channels, kernel 5, pool 3", "0.979", f"{MOMENTUM} --lr 0.005 --schedule cosine --epochs 30"),
        ("small-best", "the same: He, momentum 0.9, rate x 0.9 every 5,000 batches, shifted and rotated images", "0.981", f"{MOMENTUM} --lr 0.01 --schedule step --lr-factor 0.9 --lr-epochs 8 --epochs 60 --augment shift=1 rotation=10 scale=0.1"),
    ),
    *mlp_rows(
        3,
        f"--hidden 128 64 64 --activation sigmoid --batch-size 16 --lr 0.02 --reduction sum --epochs 10 --center {PLAIN} {SGD}",
        ("sigmoid-zero", "zero initialization", "chance", "--init zeros", "all units of a layer start alike; only rounding breaks the symmetry"),
        ("sigmoid-normal", "normal 0.02 initialization", "0.950", "--init normal --init-std 0.02"),
        ("sigmoid-xavier", "Xavier initialization, constant rate", "0.969", "--init xavier-uniform"),
        ("sigmoid-step", "normal 0.02, step", "0.955", "--init normal --schedule step --lr-factor 0.5 --lr-epochs 3"),
        ("sigmoid-cosine", "normal 0.02, cosine", "0.955", "--init normal --schedule cosine"),
        ("sigmoid-cycle", "normal 0.02, cycle", "0.937", "--init normal --schedule cyclic"),
        ("sigmoid-drop", "Xavier, dropout 0.2", "0.949", "--init xavier-uniform --dropout 0.2"),
        ("sigmoid-l2-5", "Xavier, L2 of 1e-5", "0.964", "--init xavier-uniform --weight-decay 1e-5"),
        ("sigmoid-l2-7", "Xavier, L2 of 1e-7", "0.966", "--init xavier-uniform --weight-decay 1e-7"),
        ("sigmoid-best", "best: Xavier, momentum 0.9, one cycle, 20 epochs", "0.976", "--init xavier-uniform --reduction mean --lr 0.1 --momentum 0.9 --schedule one-cycle --epochs 20"),
    ),
    *mlp_rows(
        4, "", ("sine", "y = sin x, 3 layers of 50: mean absolute error", "0.00019", "--task sine")
    ),
    *mlp_rows(
        4,
        f"{PLAIN} --optimizer adam --batch-size 64 --epochs 8",
        *(
            (
                f"grid-{depth}-{width}",
                f"{depth} hidden layers of {width}",
                "",
                f"--hidden {' '.join([str(width)] * depth)}",
            )
            for depth in DEPTHS
            for width in WIDTHS
        ),
    ),
    *mlp_rows(
        4,
        f"{PLAIN} {MOMENTUM} --lr 0.02 --batch-size 64 --epochs 5",
        *(
            (f"rate-{lr}", f"rate {lr}", "", f"--hidden 50 50 --lr {lr}")
            for lr in ("0.001", "0.003", "0.01", "0.03", "0.1", "0.3")
        ),
        *(
            (f"l2-{decay}", f"L2 of {decay}", "", f"--hidden 50 50 --weight-decay {decay}")
            for decay in ("0", "0.0001", "0.001", "0.01", "0.1")
        ),
        *(
            (f"batch-{size}", f"batch {size}", "", f"--hidden 50 50 --batch-size {size}")
            for size in (16, 32, 64, 128, 256)
        ),
        ("sigmoid", "sigmoid", "0.866", "--hidden 50 50 --activation sigmoid --init xavier-uniform"),
        ("relu", "ReLU", "0.910", "--hidden 50 50 --activation relu"),
        ("tanh", "tanh", "0.884", "--hidden 50 50 --activation tanh --init xavier-uniform"),
        ("deep-plain", "16 layers of 50", "0.284", f"--hidden {' '.join(['50'] * 16)}"),
        ("deep-norm", "16 layers of 50, batch norm", "0.906", f"--hidden {' '.join(['50'] * 16)} --batch-norm"),
        ("moved", "shift and small rotation", "", "--hidden 50 50 --augment shift=2 rotation=5"),
    ),
    *cnn_rows(
        5,
        "--channels 4 4 --kernel 3 --pooling average --hidden --no-batch-norm --batch-size 100 --optimizer sgd --momentum 0.9 --lr 0.01 --schedule plateau --epochs 40",
        ("average-4", "4 and 4 channels, initialized with std 0.01", "0.985", "--label-smoothing 0 --init normal --init-std 0.01 --epochs 150 --lr-epochs 10", "converges there at this rate, 0.9840 after 300 epochs; three times the rate gets further"),
        ("average-4-fast", "the same with rate 0.03", "0.985", "--label-smoothing 0 --init normal --init-std 0.01 --lr 0.03 --epochs 150 --lr-epochs 10"),
        ("average-1", "rate 0.01, std 1", "", "--label-smoothing 0 --init normal --init-std 1 --lr-epochs 5"),
        ("average-16", "16 and 16 channels (He, one cycle, rate 0.1, L2 of 0.0002)", "0.990", "--channels 16 16 --label-smoothing 0 --schedule one-cycle --lr 0.1 --weight-decay 2e-4 --epochs 30", "0.9883 with the setting above"),
        ("kernel-5", "kernel 5", "", "--label-smoothing 0 --init normal --init-std 0.01 --kernel 5"),
        ("kernel-7", "kernel 7", "", "--label-smoothing 0 --init normal --init-std 0.01 --kernel 7"),
        ("euclidean", "Euclidean loss, He, rate 0.05", "", "--loss mse --lr 0.05 --lr-epochs 5"),
        ("late-momentum", "momentum 0.5 in the last quarter", "", "--label-smoothing 0 --init normal --init-std 0.01 --final-momentum 0.5"),
    ),
    *mlp_rows(
        5,
        f"--hidden 100 50 {PLAIN} --batch-size 100 --optimizer sgd --momentum 0.9 --lr 0.01 --schedule plateau --epochs 10",
        ("parameters", "MLP 100-50 for comparison", "", ""),
    ),
]
# fmt: on

# The rows of the short table.
SHORT = [
    "mlp-512",
    "mlp-best",
    "cnn-best",
    "small-deep",
    "small-drop",
    "small-conv",
    "small-best",
    "sigmoid-normal",
    "sigmoid-xavier",
    "sigmoid-best",
    "sine",
    "relu",
    "deep-plain",
    "deep-norm",
    "average-4",
    "average-4-fast",
    "average-16",
]


def needed_by(experiment: Experiment) -> str | None:
    """The name of the experiment whose model this one starts from."""
    needed = re.search(r"{([\w-]+)}", experiment.command)
    return needed[1] if needed else None


def select(words: list[str]) -> list[Experiment]:
    """The experiments with these names or of these reports, and those that they start from."""
    unknown = set(words) - {str(report) for report in TITLES} - {e.name for e in EXPERIMENTS}
    if unknown:
        raise SystemExit(f"there is no {', '.join(sorted(unknown))}; see --list")
    chosen = [e for e in EXPERIMENTS if not words or {str(e.report), e.name} & set(words)]
    needed = {needed_by(experiment) for experiment in chosen}
    return [e for e in EXPERIMENTS if e in chosen or e.name in needed]


def result_of(experiment: Experiment, options: argparse.Namespace) -> dict[str, Any]:
    """The result of an experiment, {} unless it was finished with the same command."""
    path = options.out / experiment.name / "result.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return result if result.get("command") == experiment.command else {}


def run(
    experiment: Experiment, options: argparse.Namespace, needed: concurrent.futures.Future | None
) -> str:
    """Run one experiment in a process of its own; gives its result in a few words."""
    if needed:
        needed.result()
    folder = options.out / experiment.name
    shutil.rmtree(folder, ignore_errors=True)  # what was interrupted begins anew
    folder.mkdir(parents=True)
    command = re.sub(r"{([\w-]+)}", rf"{options.out}/\1", experiment.command)
    script, *arguments = shlex.split(command)
    if experiment.name != "sine":
        arguments += ["--data", options.data]
    plot = ["--plot"] if options.plot else []
    done = subprocess.run(
        [sys.executable, common.REPOSITORY / script, *arguments, "--out", folder, *plot],
        capture_output=True,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    (folder / "log.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        return f"FAILED: {done.stderr.strip()}"
    found = re.search(
        r"(?P<images>[\d,]+) training.*; (?P<parameters>[\d,]+) parameters.*"
        r"test_(accuracy|error)=(?P<measured>\S+) .* seconds=(?P<seconds>\S+)",
        done.stdout,
        re.DOTALL,
    )
    assert found
    speeds = [int(speed.replace(",", "")) for speed in re.findall(r"(\S+) samples/s", done.stdout)]
    result = {
        "command": experiment.command,
        "measured": found["measured"],
        "seconds": float(found["seconds"]),
        "epoch_seconds": int(found["images"].replace(",", "")) / statistics.median(speeds),
        "parameters": found["parameters"],
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    return f"{result['measured']} in {result['seconds']:.0f} s"


def run_all(experiments: list[Experiment], options: argparse.Namespace) -> None:
    """Run those without a result, several at a time, and print the progress."""
    missing = [experiment for experiment in experiments if not result_of(experiment, options)]
    print(f"{len(experiments) - len(missing)} of {len(experiments)} are finished", flush=True)
    started = time.monotonic()
    futures: dict[str, concurrent.futures.Future] = {}
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        try:
            for experiment in missing:  # the needed one stands before it, so it begins before it
                needed = futures.get(needed_by(experiment) or "")
                futures[experiment.name] = pool.submit(run, experiment, options, needed)
            names = {future: name for name, future in futures.items()}
            for number, future in enumerate(concurrent.futures.as_completed(names), start=1):
                left = (time.monotonic() - started) / number * (len(missing) - number) / 60
                print(
                    f"[{number}/{len(missing)}] {names[future]}: {future.result()};"
                    f" about {left:.0f} min left",
                    flush=True,
                )
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise SystemExit("interrupted; the same command goes on from here") from None


def row_of(experiment: Experiment, options: argparse.Namespace) -> list[str]:
    """One line of a table."""
    result = result_of(experiment, options)
    times = [f"{result['seconds']:.0f} s", f"{result['epoch_seconds']:.2f} s"]
    numbers = [experiment.theirs, result["measured"], *times, result["parameters"]]
    return [experiment.what, *numbers, experiment.note, f"`{experiment.command}`"]


def grid(options: argparse.Namespace) -> str:
    """The table of depth against width of report 4."""
    results = {e.name: result_of(e, options).get("measured", "") for e in EXPERIMENTS}
    rows = [
        [f"{depth} layers", *(results[f"grid-{depth}-{width}"] for width in WIDTHS)]
        for depth in DEPTHS
    ]
    return common.table(["accuracy", *(f"{width} units" for width in WIDTHS)], rows)


def tables(options: argparse.Namespace) -> str:
    """All results, in Markdown, with a table for each report."""
    head = ["experiment", "theirs", "purenn", "time", "an epoch"]
    head += ["parameters", "remark", "command"]
    parts = []
    for report, title in TITLES.items():
        there = [e for e in EXPERIMENTS if e.report == report and result_of(e, options)]
        rows = [row_of(e, options) for e in there if not e.name.startswith("grid-")]
        if rows:
            parts.append(f"**Report {report}: {title}**\n\n{common.table(head, rows)}")
        if any(e.name.startswith("grid-") for e in there):
            parts.append(f"Depth and width (theirs 0.81 to 0.968):\n\n{grid(options)}")
    return "\n\n".join(parts)


def short_table(options: argparse.Namespace) -> str:
    """The short table of benchmarks/results.md."""
    rows = [
        [str(e.report), e.what, e.theirs, result_of(e, options)["measured"]]
        for e in EXPERIMENTS
        if e.name in SHORT and result_of(e, options)
    ]
    return common.table(["report", "experiment", "theirs", "purenn"], rows)


def worse_than_theirs(options: argparse.Namespace) -> list[str]:
    """The experiments whose result is worse than the report's, without a remark that says why."""
    names = []
    for experiment in EXPERIMENTS:
        result = result_of(experiment, options)
        if result and re.fullmatch(r"[\d.]+", experiment.theirs) and not experiment.note:
            ahead = float(result["measured"]) - float(experiment.theirs)
            if (ahead if experiment.name != "sine" else -ahead) < 0:
                names.append(experiment.name)
    return names


def main() -> int:
    """Run what has no result yet, and print the tables."""
    parser = argparse.ArgumentParser(
        description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", help="numbers of reports, names of experiments; or all")
    parser.add_argument("--data", default="data/mnist", help="the folder with MNIST")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("runs/reports"),
        help="gets a folder with model, metrics and log for each experiment",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count(),
        help="how many at a time, each with one BLAS thread (default: one per core)",
    )
    parser.add_argument("--plot", action="store_true", help="draw the pictures of each run as well")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    parser.add_argument(
        "--short", action="store_true", help="print the short table of results.md, run nothing"
    )
    options = parser.parse_args()
    experiments = select(options.what)
    if options.list:
        for experiment in experiments:
            print(f"{experiment.name:18} python {experiment.command}")
        return 0
    if options.short:
        print(short_table(options))
        return 0
    neighbors = common.Neighbors()
    run_all(experiments, options)
    print(f"\n{common.header()}; {options.jobs} at a time, one BLAS thread each.")
    print(f"{neighbors.report()}\n\n{tables(options)}")
    missing = [experiment.name for experiment in experiments if not result_of(experiment, options)]
    if missing:
        print(f"\nMissing: {', '.join(missing)} (see log.txt in the folder of each)")
    if worse := worse_than_theirs(options):
        print(f"\nBelow the report's number: {', '.join(worse)}")
    return 1 if missing or worse else 0


if __name__ == "__main__":
    sys.exit(main())
