"""The run as a whole: from the command line to the exit code, with all that is printed."""

import io
import os
import pathlib
import re
import subprocess
import sys
import threading
import types
from unittest import mock

import numpy as np
import pytest

import train_cnn
import train_mlp
from training import checkpoints, datasets, mnist, pictures, run
from training.images import resize
from training.tests.conftest import (
    LAST_LINE,
    REPOSITORY,
    blobs,
    mlp_experiment,
    outputs_in,
    train_cnn_on,
    train_on,
)


class Terminal(io.StringIO):
    """Standard output that claims to be a terminal."""

    def isatty(self):
        return True


# --- what is printed ---


def test_what_is_printed_of_a_run(blob_file, capsys, monkeypatch):
    assert train_on(blob_file) == 0
    out, errors = capsys.readouterr()
    first, second, *reports, last = out.splitlines()
    assert errors == ""
    assert first == (
        f"{blob_file}: 180 training, 20 validation and 50 test images of 3x9x6, 4 classes;"
        " 1,348 parameters to train"
    )
    assert second.startswith("every batch in 1 shard, computed by 1 worker; threads of BLAS: ")
    number = r"\d\.\d{4}"
    report = rf"loss {number}  accuracy {number}  validation loss {number}  validation accuracy "
    for epoch, line in enumerate(reports, start=1):
        assert re.fullmatch(rf"epoch {epoch}/2  {report}{number}  [\d,]+ samples/s", line)
    assert LAST_LINE.fullmatch(last)
    assert "\r" not in out

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Terminal())
        assert train_on(blob_file) == 0
        text = sys.stdout.getvalue()
    assert re.search(r"\repoch 1/2  loss \d\.\d{4}  [\d,]+ samples/s  \d+ s left", text)
    lines = [line.rpartition("\r")[2].rstrip() for line in text.split("\n")[:-1]]
    changing = re.compile(r"[\d,]+ samples/s|seconds.*")
    assert [changing.sub("", line) for line in lines] == changing.sub("", out).splitlines()


def test_the_summary_comes_first(blob_file, capsys):
    assert train_on(blob_file, "--summary", "--epochs", "0", "--train-only", "out") == 0
    lines = capsys.readouterr().out.splitlines()
    total = next(line for line in lines if line.startswith("total"))
    assert all(len(line) == len(total) for line in lines[: lines.index(total)])
    assert "36 parameters to train" in lines[lines.index(total) + 1]


def test_the_same_bits_for_the_same_options_and_no_others(blob_file, tmp_path):
    models = []
    for options in ([], [], ["--seed", "4"], ["--augment"], ["--augment", "shift=1"]):
        out = tmp_path / str(len(models))
        assert train_on(blob_file, *options, "--out", out, "--epochs", "1") == 0
        models.append(outputs_in(out)["model.npz"])
    assert models[0] == models[1]
    assert len(set(models)) == 4


# --- data ---


def test_sizes_and_center_of_the_images(blob_file):
    sizes = {"train_size": 100, "validation": 30, "test_size": 20}
    plain = mlp_experiment(blob_file, **sizes).data
    small = mlp_experiment(blob_file, **sizes, size=4, center=True).data
    for part, count in (("train", 100), ("validation", 30), ("test", 20)):
        assert plain[f"x_{part}"].shape == (count, 3, 9, 6)
        np.testing.assert_array_equal(plain[f"y_{part}"], small[f"y_{part}"])
        expected = resize(plain[f"x_{part}"], 4) - np.float32(0.5)
        np.testing.assert_array_equal(small[f"x_{part}"], expected)
    other = mlp_experiment(blob_file, **sizes, seed=1).data
    np.testing.assert_array_equal(other["x_test"], plain["x_test"])
    assert not np.array_equal(other["x_train"], plain["x_train"])


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory in which there is nothing, and nobody to download from."""
    monkeypatch.chdir(tmp_path)
    mirrors = ["http://127.0.0.1:9/mnist", "http://[::1]:9/mnist"]
    monkeypatch.setattr(mnist, "MNIST_MIRRORS", mirrors)
    return tmp_path


DEFAULT = os.path.join("data", "mnist")


@pytest.mark.usefixtures("elsewhere")
def test_without_a_network_it_trains_on_synthetic_digits(monkeypatch, capsys):
    digits = datasets.synthetic_digits(200, 50)
    monkeypatch.setattr(datasets, "synthetic_digits", lambda: digits)
    assert train_mlp.main(["--epochs", "1", "--hidden", "8", "--out", "run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        rf"MNIST is not in {DEFAULT} and cannot be downloaded \(.*\); training on synthetic digits"
        " instead, --data DIR reads your own",
        lines[0],
    )
    assert lines[1].startswith("synthetic digits: 180 training")
    assert not os.path.exists("data")
    assert checkpoints.read_run("run").options["--data"] == "builtin"


def test_data_mnist_is_read_where_it_stands(elsewhere, blob_file, capsys):
    os.makedirs(DEFAULT)
    os.symlink(blob_file, os.path.join(DEFAULT, "any.npz"))
    assert train_mlp.main(["--epochs", "1", "--hidden", "8"]) == 0
    assert capsys.readouterr().out.startswith(f"{DEFAULT}: 180 training")


def test_mnist_is_downloaded_where_it_is_missing(elsewhere, blob_file, monkeypatch):
    def download(directory, mirrors, progress):
        progress("any.npz", 500_000, 1_000_000)
        progress("any.npz", 1_000_000, 1_000_000)
        os.makedirs(directory)
        os.symlink(blob_file, os.path.join(directory, "any.npz"))

    monkeypatch.setattr(mnist, "download_mnist", download)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Terminal())
        assert train_mlp.main(["--epochs", "1", "--hidden", "8"]) == 0
        text = sys.stdout.getvalue()
    assert "\rdownloading any.npz: 1.0 of 1.0 MB" in text
    assert f"{DEFAULT}: 180 training" in text


def test_a_folder_for_each_class_is_a_data_set(tmp_path, capsys):
    image_module = pytest.importorskip("PIL.Image", reason="image files need Pillow")
    for name, images in zip("ab", np.split(blobs(60, (9, 6), 2, 0)[0], 2), strict=True):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for number, image in enumerate(images):
            image_module.fromarray(image).save(folder / f"{number}.png")
    data = str(tmp_path / "data")
    assert train_on(data, "--epochs", "1", "--out", data) == 0  # it is one afterwards as well
    capsys.readouterr()
    assert train_on(data, "--epochs", "1", "--out", tmp_path / "run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "44 training, 4 validation and 12 test images of 1x9x6, 2 classes" in lines[0]
    assert checkpoints.read_run(str(tmp_path / "run")).classes == ["a", "b"]


def test_a_folder_of_ones_own_for_validation(tmp_path, capsys):
    image_module = pytest.importorskip("PIL.Image", reason="image files need Pillow")
    for name in ("train/a", "train/b", "val/a", "val/b"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for number in range(10):
            image_module.new("L", (6, 9), 100 * (name[-1] == "b")).save(folder / f"{number}.png")
    for options, validation in (((), 20), (("--validation", "3"), 3), (("--validation", "0"), 0)):
        assert train_on(str(tmp_path), "--epochs", "1", *options) == 0
        words = f": 16 training, {validation} validation and 4 test images of 1x9x6, 2 classes"
        assert words in capsys.readouterr().out.splitlines()[0]


@pytest.fixture
def table(tmp_path):
    """An .npz of two features in units of their own, and the classes that they tell apart."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 300)
    x = np.stack([rng.normal(size=300) * 1e-6, 1.7e9 + 40.0 * y + rng.normal(size=300)], axis=1)
    np.savez(tmp_path / "table.npz", x=x, y=y)
    return tmp_path / "table.npz"


def test_features_of_any_unit_are_learned(table, tmp_path, capsys):
    assert train_on(str(table), "--epochs", "8", "--out", tmp_path / "run") == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    words = "216 training, 24 validation and 60 test samples of 2 features, 2 classes; 50 para"
    assert first.startswith(f"{table}: {words}")
    assert float(LAST_LINE.fullmatch(last)[1]) > 0.95
    found = checkpoints.read_run(str(tmp_path / "run"))
    assert (found.sample_shape, found.classes, found.pixel_range) == ([2], ["0", "1"], None)
    data = mlp_experiment(str(table)).data
    raw = datasets.choose_test(datasets.read_dataset(table), None)["x_test"]
    own = datasets.standardize(raw, found.feature_mean, found.feature_std)
    np.testing.assert_array_equal(own, data["x_test"])


def test_what_is_for_images_alone_is_refused_for_features(table, capsys):
    what = f"{table} holds tabular data (2 features a sample)"
    for options in ("--size 8", "--center", "--augment", "--augment shift=1"):
        assert train_on(str(table), *options.split()) == 2
        flag = options.split()[0]
        assert capsys.readouterr().err.endswith(f": error: {what}, and {flag} is for images\n")
    assert train_cnn_on(str(table)) == 2
    words = f"{what}, but this script takes images; train_mlp.py takes both"
    assert capsys.readouterr().err.endswith(f": error: {words}\n")


def test_images_without_pillow_say_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "PIL", None)
    (tmp_path / "a").mkdir()
    assert train_mlp.main(["--data", str(tmp_path)]) == 2
    assert "image files need Pillow: pip install pillow" in capsys.readouterr().err


# --- mistakes ---

MISTAKES = {  # arguments: what is said
    "--data nowhere": "nowhere: there is no such file",
    "--data=": "'': there is no such file or folder",
    "--data empty": "empty: --data takes a folder of",
    "--data picture.png": "picture.png: --data takes a folder of",
    "--data damaged.npz": "damaged.npz: cannot be read",
    "--validation 200": "--validation 200 leaves none of the 200",
    "--train-size 181": "--train-size 181 is too many",
    "--momentum 0.9": "--momentum goes with --optimizer sgd or",
    "--init-from nowhere.npz": "nowhere.npz",
    "--init-from damaged.npz": "damaged.npz: cannot be read",
    "--compare nowhere": "nowhere",
    "--compare empty": "empty",
    "--schedule plateau --validation 0": "--schedule plateau needs validation images",
    "--patience 2 --validation 0": "--patience needs validation images, but there are none (--val",
    "--class-weights 1 2 3": "--class-weights: got 3 numbers, but there are 4 classes",
    "--optimizer sgd --lr 1e30 --no-batch-norm --schedule constant": "try a lower --lr",
    "--out damaged.npz": "damaged.npz",
    "--plot damaged.npz": "",
}


@pytest.mark.filterwarnings("error")  # of NumPy, about a rate that is much too high
@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_answered_with_one_line_and_exit_2(
    arguments, blob_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("empty").mkdir()
    pathlib.Path("picture.png").touch()
    pathlib.Path("damaged.npz").write_bytes(b"PK\x03\x04 and nothing more")
    assert train_on(blob_file, *arguments.split()) == 2
    errors = capsys.readouterr().err
    assert MISTAKES[arguments] in errors
    assert re.match(r"\S+: error: ", errors)
    assert errors.count("\n") == 1


def test_a_network_that_does_not_fit_is_found_before_it_trains(blob_file, capsys):
    assert train_cnn_on(blob_file, "--channels", "3", "4", "5") == 2
    out, errors = capsys.readouterr()
    assert out == ""
    assert "pool3: max_pool2d: the window covers 2 x 2 pixels, but the padded image" in errors


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (None, 0, ""),
        (ValueError("a\nb"), 2, "a.py: error: a b\n"),
        (OSError(28, "No space left"), 2, "a.py: error: No space left\n"),
        (OSError(2, "No such file", "x.npz"), 2, "a.py: error: x.npz: No such file\n"),
        (MemoryError(), 2, "a.py: error: not enough memory\n"),
        (KeyboardInterrupt(), 130, "\na.py: interrupted\n"),
        (KeyboardInterrupt("after step 3"), 130, "\na.py: after step 3\n"),
    ],
)
def test_exit_codes(error, code, words, capsys):
    def work():
        if error is not None:
            raise error

    assert run.exit_code("a.py", work) == code
    assert capsys.readouterr().err == words


def test_a_bug_is_a_traceback_and_no_mistake_of_the_user():
    with pytest.raises(ZeroDivisionError):
        run.exit_code("a.py", lambda: 1 // 0)


def test_ranks_that_do_not_agree_are_found_before_the_training(blob_file, monkeypatch, capsys):
    refuse = mock.Mock(side_effect=ValueError("rank 1 does not do what rank 0 does"))
    monkeypatch.setattr(run, "check_ranks_agree", refuse)
    assert train_on(blob_file) == 2
    assert capsys.readouterr().out == ""


def test_training_works_outside_the_main_thread(blob_file):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(train_on(blob_file)))
    thread.start()
    thread.join()
    assert codes == [0]


# --- pictures of a run, and of several ---


@pytest.fixture
def curves(monkeypatch):
    """What would have been drawn: (folder, labels, title) of every picture of curves."""
    drawn = []

    def draw(path, runs, title):
        pathlib.Path(path).touch()
        drawn.append((os.path.dirname(path), list(runs), title))

    monkeypatch.setattr(pictures, "pyplot", types.SimpleNamespace)
    monkeypatch.setattr(pictures, "plot_curves", draw)
    return drawn


def test_pictures_go_where_the_options_say(blob_file, tmp_path, monkeypatch, curves):
    monkeypatch.chdir(tmp_path)
    folders = []
    monkeypatch.setattr(run.Script, "draw", lambda self, folder, *_: folders.append(folder))
    for options in (["--plot", "pictures"], ["--plot", "--out", "out"], ["--plot"]):
        assert train_on(blob_file, *options, "--epochs", "1") == 0
    assert train_on(blob_file, "--plot", "nothing", "--epochs", "0") == 0  # there are no curves
    assert [folder for folder, _, _ in curves] == ["pictures", "out", "plots"]
    assert folders == ["pictures", "out", "plots", "nothing"]
    _, labels, title = curves[0]
    assert labels == [""]
    assert title.endswith(" --epochs 1 --batch-size 16 --hidden 8")


@pytest.fixture
def old_picture(tmp_path):
    """A picture that was drawn before."""
    path = tmp_path / "out" / "old.png"
    path.parent.mkdir()
    path.write_bytes(b"\x89PNG" + pictures.MARK)
    return path


def test_pictures_in_the_folder_of_a_run_are_those_of_the_run(
    blob_file, old_picture, curves, monkeypatch, capsys
):
    monkeypatch.setattr(run.Script, "draw", lambda *_: None)
    out = old_picture.parent
    mine = out / "mine.png"
    mine.write_bytes(b"\x89PNG")
    common = ["--schedule", "constant", "--out", out]
    assert train_on(blob_file, *common) == 0
    assert not old_picture.exists()  # it was of another run
    old_picture.write_bytes(pictures.MARK)
    assert train_on(blob_file, *common, "--resume") == 0
    assert old_picture.exists()  # nothing was left to do
    assert train_on(blob_file, *common, "--resume", "--epochs", "3") == 0
    assert not old_picture.exists()  # it was of fewer epochs
    old_picture.write_bytes(pictures.MARK)
    assert train_on(blob_file, *common, "--resume", "--epochs", "3", "--plot", f"{out}/.") == 0
    assert not old_picture.exists()
    assert mine.exists()
    capsys.readouterr()
    assert train_on("nowhere", "--plot", out) == 2
    words = f"{out}: this folder holds another run; choose another folder for --plot\n"
    assert capsys.readouterr().err.endswith(words)
    assert len(curves) == 1


def test_pictures_beside_each_other_are_of_one_run(blob_file, old_picture, curves, monkeypatch):
    monkeypatch.setattr(run.Script, "draw", lambda *_: None)
    folder = old_picture.parent
    assert train_on(blob_file, "--epochs", "1", "--plot", folder) == 0
    assert os.listdir(folder) == ["curves.png"]
    assert len(curves) == 1


def test_plot_without_matplotlib_says_what_to_install_before_it_trains(
    blob_file, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert train_on(blob_file, "--plot") == 2
    out, errors = capsys.readouterr()
    assert "pictures need matplotlib: pip install matplotlib" in errors
    assert out == ""


def write_run(folder, script="train_mlp.py", metrics="accuracy", **options):
    """A folder with what --compare reads of a run."""
    os.makedirs(folder)
    flags = {f"--{name}": value for name, value in options.items()}
    values = {"--lr": 0.002, "--hidden": [512, 512], **flags}
    about = (checkpoints.FORMAT, script, values, list(flags), None, [1], None, {})
    checkpoints.write_run(folder, checkpoints.Run(*about))
    pathlib.Path(folder, "metrics.csv").write_text(f"epoch,step,loss,{metrics}\n1,2,3,4\n")


@pytest.mark.usefixtures("elsewhere")
def test_runs_are_compared_by_what_is_their_own(capsys, curves):
    write_run("a", hidden=[8])
    write_run("b", hidden=[8], lr=0.01)
    write_run("c", hidden=[8], lr=0.1, center=True)
    write_run("d", script="train_cnn.py", hidden=[8])
    common = "train_mlp.py --hidden 8"
    for folders, labels, title in (
        (["a", "b", "c"], ["--lr 0.002", "--lr 0.01", "--lr 0.1 --center"], common),
        (["a", "a"], ["a"], common),
        (["a"], ["default"], common),
        (["a", "d"], ["train_mlp.py", "train_cnn.py"], "--hidden 8"),
    ):
        assert train_mlp.main(["--compare", *folders]) == 0
        expected = os.path.join("plots", "compare.png")
        assert capsys.readouterr().out == f"{expected}: {len(folders)} runs\n"
        assert curves.pop() == ("plots", labels, title)
    assert train_cnn.main(["--compare", "a", "--plot", "pictures"]) == 0
    assert curves.pop()[0] == "pictures"


@pytest.mark.usefixtures("elsewhere", "curves")
def test_runs_that_measured_different_things_are_not_compared(capsys):
    write_run("a")
    write_run("b", metrics="error")
    assert train_mlp.main(["--compare", "a", "b"]) == 2
    assert "--compare: these runs measured different things" in capsys.readouterr().err


def test_a_reader_that_has_read_enough_is_no_error():
    code = "from training.run import *\ndef f(): raise BrokenPipeError\nexit(exit_code('a', f))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=REPOSITORY)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


def test_predicting_and_comparing_exclude_each_other(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_mlp.main(["--predict", "a.png", "--compare", "a", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "--predict and --compare exclude each other" in capsys.readouterr().err


def test_a_single_class_is_refused(tmp_path, capsys):
    images = np.zeros((20, 4, 4), np.uint8)
    parts = {"x_train": images, "x_test": images}
    labels = {"y_train": np.zeros(20, int), "y_test": np.zeros(20, int)}
    np.savez(tmp_path / "one.npz", **parts, **labels)
    assert train_on(str(tmp_path / "one.npz")) == 2
    assert "one.npz: expected at least two classes, found 1" in capsys.readouterr().err
