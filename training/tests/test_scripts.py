"""The scripts as a user runs them, what the README says of them, and the house they stand in."""

import ast
import contextlib
import graphlib
import math
import os
import re
import shlex

import numpy as np
import pytest

import purenn as nn
import train_cnn
import train_mlp
from training import datasets
from training.checkpoints import read_run
from training.choices import check_options
from training.command_line import flag_of, new_parser, options_of, parse
from training.prediction import layers_of
from training.tests.conftest import (
    LAST_LINE,
    QUICK_CNN,
    REPOSITORY,
    SCRIPTS,
    run_python,
    train_cnn_on,
    train_on,
)

RECORDS = {"train_mlp.py": train_mlp.MLPOptions, "train_cnn.py": train_cnn.CNNOptions}

# --- in a process of their own ---


def test_the_mlp_learns_the_synthetic_digits(tmp_path):
    options = "--data builtin --hidden 32 --epochs 2 --lr 0.01 --out out"
    done = run_python(REPOSITORY / "train_mlp.py", *options.split(), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    first, *_, last = done.stdout.splitlines()
    words = "synthetic digits: 10,800 training, 1,200 validation and 2,000 test images of 1x28x28"
    assert first == f"{words}, 10 classes; 25,482 parameters to train"
    assert float(LAST_LINE.fullmatch(last)[1]) > 0.9
    assert list(nn.load(tmp_path / "out" / "model.npz")) == ["hidden1", "norm1", "out"]


def test_the_cnn_learns_some_of_the_synthetic_digits(tmp_path, monkeypatch, capsys):
    digits = datasets.synthetic_digits(2_500, 500)
    monkeypatch.setattr(datasets, "synthetic_digits", lambda: digits)
    options = "--data builtin --channels 6 12 --hidden --epochs 1 --lr 0.02 --batch-size 32 --out"
    assert train_cnn.main([*options.split(), str(tmp_path)]) == 0
    assert float(LAST_LINE.fullmatch(capsys.readouterr().out.splitlines()[-1])[1]) > 0.9
    layers = ["conv1", "convnorm1", "conv2", "convnorm2", "out"]
    assert list(nn.load(tmp_path / "model.npz")) == layers


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_what_it_takes_and_what_is_wrong(script, capsys):
    for option, words in (("--help", "--batch-size N"), ("--version", nn.__version__)):
        with pytest.raises(SystemExit) as stopped:
            SCRIPTS[script].main([option])
        assert stopped.value.code == 0
        assert words in capsys.readouterr().out
    done = run_python(REPOSITORY / script, "--data", "nowhere", cwd="/")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{script}: error: nowhere: there is no such file or folder\n"


# --- what they learn, in this process ---


@pytest.mark.parametrize(
    ("start", "options", "layer"),
    [(train_on, [], "norm1"), (train_cnn_on, ["--hidden"], "convnorm2")],
)
def test_a_script_learns_color_images_of_any_size(start, options, layer, blob_file, capsys):
    assert start(blob_file, *options, "--epochs", "12", "--lr", "0.02") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "180 training, 20 validation and 50 test images of 3x9x6, 4 classes" in lines[0]
    assert float(LAST_LINE.fullmatch(lines[-1])[1]) > 0.9


def choices_of(record):
    """(flag, choice) of every option that takes one of several names."""
    for name, about in options_of(record).items():
        for choice in about.argument.get("choices", ()):
            yield flag_of(name), choice


@pytest.mark.parametrize(
    ("flag", "choice"), [pair for pair in choices_of(train_mlp.MLPOptions) if pair[0] != "--task"]
)
def test_the_mlp_takes_every_choice_and_learns(flag, choice, blob_file, capsys):
    learns = flag in ("--loss", "--optimizer")
    options = ["--hidden", "32", "--dropout", "0", "--validation", "0"] if learns else []
    options += ["--lr", "0.02"] if flag == "--loss" else []
    assert train_on(blob_file, flag, choice, "--epochs", "20" if learns else "1", *options) == 0
    accuracy = float(LAST_LINE.fullmatch(capsys.readouterr().out.splitlines()[-1])[1])
    assert accuracy > (0.6 if learns else 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--convolutions", "2", "--no-batch-norm", "--activation", "gelu"],
        ["--pool", "1", "--hidden"],
        ["--pooling", "average", "--input-dropout", "0.1", "--optimizer", "sgd"],
        ["--channels"],
        ["--augment", "elastic=1", "shift=1"],
    ],
)
def test_the_cnn_takes_all_its_options(arguments, blob_file, capsys):
    assert train_cnn_on(blob_file, *arguments, "--epochs", "1") == 0
    assert LAST_LINE.fullmatch(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_networks_are_what_the_options_say(batch_norm):
    options = {"activation": "tanh", "batch_norm": batch_norm, "input_dropout": 0.1}
    mlp = train_mlp.build_mlp(train_mlp.MLPOptions(hidden=(8, 4), **options), 3)
    norms = [[f"norm{number}"] * batch_norm for number in (1, 2)]
    expected = ["flatten", "drop0", "hidden1", *norms[0], "act1", "drop1"]
    expected += ["hidden2", *norms[1], "act2", "drop2", "out"]
    assert list(layers_of(mlp)) == expected
    params, shape = mlp.init(0, (1, 2, 2))
    assert (shape, "b" in params["hidden2"], "b" in params["out"]) == ((3,), not batch_norm, True)
    cnn = train_cnn.build_cnn(train_cnn.CNNOptions(channels=(3,), kernel=3, **options), 5)
    params, shape = cnn.init(0, (1, 6, 6))
    assert (shape, params["conv1"]["W"].shape) == ((5,), (3, 1, 3, 3))
    assert ("convnorm1" in params, "b" in params["conv1"]) == (batch_norm, not batch_norm)


def test_the_mlp_fits_a_curve(tmp_path, capsys):
    quick = "--task sine --epochs 12 --batch-size 100 --report-every 200 --out"
    assert train_mlp.main([*quick.split(), str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "y = sin x: 3,600 training, 400 validation and 1,000 test points; 5,251 parameters to train"
    )
    last = re.fullmatch(r"test_error=(\d\.\d{8}) test_loss=(\d\.\d{8}) seconds=\d+\.\d", lines[-1])
    assert float(last[1]) < 0.03
    params = nn.load(tmp_path / "model.npz")
    x = np.linspace(-math.pi / 2, math.pi / 2, 1002)[1:-1, None].astype(np.float32)
    record = train_mlp.MLPOptions
    options = parse(record, new_parser(record, ""), ["--task", "sine"])
    output, _ = train_mlp.build_mlp(options, 1).forward(params, x)
    assert float(last[1]) == pytest.approx(np.abs(output - np.sin(x)).mean(), abs=1e-8)


MISTAKES = {"curves.png", "confusion.png", "mistakes.png"}


def features_on(data, *arguments):
    """The exit code of train_mlp.py on the mean brightness of images."""
    arrays = np.load(data)
    path = os.path.join(arguments[-1], "features.npz")
    np.savez(path, x=arrays["x_train"].mean(axis=(1, 2)), y=arrays["y_train"])
    return train_on(path, *arguments)


def sine_on(_, *arguments):
    """The exit code of train_mlp.py on a curve."""
    return train_mlp.main(["--task", "sine", "--hidden", "4", *arguments])


@pytest.mark.parametrize(
    ("start", "options", "own"),
    [
        (train_on, [], {*MISTAKES, "weights.png"}),
        (train_on, ["--hidden"], {*MISTAKES, "weights.png"}),
        (train_cnn_on, [], {*MISTAKES, "kernels.png", "features.png"}),
        (train_cnn_on, ["--channels"], {*MISTAKES, "features.png"}),
        (sine_on, [], {"curves.png", "fit.png"}),
        (features_on, [], {"curves.png", "confusion.png"}),
    ],
)
def test_a_script_draws_its_pictures(start, options, own, blob_file, tmp_path, drawn):
    assert start(blob_file, *options, "--epochs", "1", "--plot", str(tmp_path)) == 0
    assert {os.path.relpath(path, tmp_path) for path in drawn} == own


# --- the commands that are written down ---


def check_command(command):
    """Parse a command of a script, and check what its options say together."""
    _, script, *arguments = shlex.split(command)
    parser = new_parser(RECORDS[script], "")
    with contextlib.suppress(SystemExit) if "--help" in command else contextlib.nullcontext():
        options = parse(RECORDS[script], parser, arguments)
        check_options(options)
        return options
    return None


def test_commands_of_the_reports_have_options_that_exist():
    script = REPOSITORY / "benchmarks" / "reports.py"
    listed = run_python(script, "--list").stdout.splitlines()
    commands = dict(line.split(maxsplit=1) for line in listed)
    assert len(commands) == len(listed) > 90
    for command in commands.values():
        options = check_command(command)
        needed = re.match(r"{(.+)}/model\.npz", options.init_from or "")
        assert not needed or needed[1] in commands


READMES = REPOSITORY / "README.md", REPOSITORY / "training" / "README.md"


def test_commands_of_the_readmes_have_options_that_exist():
    text = "\n".join(path.read_text(encoding="utf-8") for path in READMES)
    commands = re.findall(
        r"^\s*(?:mpiexec .*?|srun )?(python train_\w+\.py[^\n#|`]*)|`(python train_\w+\.py[^`]*)`",
        text,
        re.MULTILINE,
    )
    assert len(commands) >= 10
    for command in (first or second for first, second in commands):
        check_command(command)


def test_the_code_of_the_readme_makes_a_data_set_and_builds_a_network(
    tmp_path, monkeypatch, blob_file, capsys
):
    monkeypatch.chdir(tmp_path)
    trained = train_cnn.main(
        [*QUICK_CNN, "--epochs", "1", "--data", blob_file, "--out", "runs/cnn"]
    )
    assert trained == 0
    rows = "1,2.5,large rose\n3,-4e3,iris\n" * 9
    (tmp_path / "flowers.csv").write_text(f"length,width,kind\n{rows}")
    images = np.ones((2, 3, 30, 20), np.float32)
    text, namespace = READMES[1].read_text("utf-8"), {"__name__": "readme", "images": images}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        exec(compile(block, "training/README.md", "exec"), namespace)
    data, _ = datasets.load_data("flowers.npz", None)
    assert data["x_train"][:2].tolist() == [[1, 2.5], [3, -4000]]
    assert data["y_train"][:2].tolist() == [1, 0]
    assert re.fullmatch(
        r"(\[(\('[0-3]', [0-9.]+\)(, )?){2}\])", capsys.readouterr().out.split("\n")[-2]
    )
    net = namespace["build"](train_mlp.MLPOptions(hidden=(3,)), 10)
    assert net.init(0, (1, 28, 28))[1] == (10,)


# --- the house ---


def rooms():
    """{name: path} of the modules in training/."""
    paths = sorted((REPOSITORY / "training").glob("*.py"))
    return {path.stem: path for path in paths if path.stem != "__init__"}


def imports(path):
    """The names of all modules that a file imports, at its top or anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_rooms_import_in_one_direction_and_nothing_imports_a_script():
    known, graph = rooms(), {}
    for name, path in known.items():
        found = imports(path)
        assert not found & {"train_mlp", "train_cnn"}, name
        graph[name] = {other for other in known if f"training.{other}" in found}
    graphlib.TopologicalSorter(graph).prepare()  # an error names the rooms of a cycle
    assert not {name for name in imports(REPOSITORY / "purenn.py") if name.startswith("train")}
    package = (REPOSITORY / "training" / "__init__.py").read_text(encoding="utf-8")
    order = re.findall(r"^([a-z_]+) +\w", package, re.MULTILINE)
    assert {*order, "one_thread"} == known.keys()
    for position, name in enumerate(order):  # as the package says: only from those above
        assert graph[name] <= set(order[:position]), name
    assert graph["one_thread"] == {"threads"}


USER_SCRIPT = """
import training.one_thread
import sys
from dataclasses import dataclass
import purenn as nn
from training import run
from training.command_line import count, option
from training.options import Options


@dataclass(frozen=True)
class MyOptions(Options):
    width: int = option("units", group="network", default=3, type=count, metavar="N")


def build(options, outputs):
    return nn.sequential(
        flatten=nn.flatten(), hidden=nn.linear(options.width), act=nn.relu(), out=nn.linear(outputs)
    )


def draw(folder, experiment, params):
    raise AssertionError("nobody asked for pictures")


if __name__ == "__main__":
    sys.exit(run.main(MyOptions, build, draw, "Train my network."))
"""


def test_a_script_of_a_users_is_like_the_others(blob_file, tmp_path):
    (tmp_path / "mine.py").write_text(USER_SCRIPT)
    arguments = ["mine.py", "--data", blob_file, "--epochs", "1", "--out", "run"]
    done = run_python(*arguments, "--width", "7", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "threads of BLAS: 1\n" in done.stdout
    assert nn.load(tmp_path / "run" / "model.npz")["hidden"]["W"].shape == (162, 7)
    found = read_run(str(tmp_path / "run"))
    assert (found.script, found.options["--width"]) == ("mine.py", 7)
    done = run_python(*arguments, "--resume", cwd=tmp_path)
    assert done.returncode == 2
    assert "it belongs to a different run: --width 7 then, 3 now" in done.stderr
