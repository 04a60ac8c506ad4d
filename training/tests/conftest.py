"""What these tests share: data sets that are quick to learn, files, and runs of the scripts.

HYPOTHESIS_PROFILE=wide looks further than the quick default, which draws the same cases each time.
"""

import csv
import os
import pathlib
import re
import signal
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest

import train_cnn
import train_mlp
from test_purenn import all_bytes, peak_memory  # noqa: F401 (its import also sets the profile)
from training import checkpoints, run, threads

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = {"train_mlp.py": train_mlp, "train_cnn.py": train_cnn}
LAST_LINE = re.compile(r"test_accuracy=(\d\.\d{4}) test_loss=(\d+\.\d{4}) seconds=\d+\.\d")


# --- messages ---


def refusal(read, path):
    """The message of the ValueError with which `read` refuses a file, and which names the file."""
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: ") as caught:
        read(path)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")


def outcome(read, path):
    """(what `read` gives, ""), or (None, the message of its ValueError, which names the file)."""
    try:
        return read(path), ""
    except ValueError as error:
        message = str(error)
    assert message.startswith(f"{path}: cannot be read")
    return None, message


def refusal_in_time(read, path, named=None):
    """`refusal`, of a file that `named` may name instead; fails where `read` waits for a pipe."""
    messages = []

    def listen():
        with pytest.raises(ValueError, match="it is not a file") as caught:
            read(path)
        messages.append(str(caught.value))

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    thread.join(10)
    assert messages
    assert messages[0].startswith(f"{named or path}: ")
    return messages[0].removeprefix(f"{named or path}: ")


def damaged(content, every=1):
    """The bytes of a file cut off everywhere, then with each bit flipped; or every so many."""
    for length in range(0, len(content), every):
        yield content[:length]
    for bit in range(0, len(content) * 8, every):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


# --- data sets ---

IDX_CODES = {"u1": 0x08, "i1": 0x09, ">i2": 0x0B, ">i4": 0x0C, ">f4": 0x0D, ">f8": 0x0E}


def idx(array):
    """The bytes of an IDX file."""
    kind = array.dtype.str.removeprefix("|")
    header = struct.pack(f">4B{array.ndim}I", 0, 0, IDX_CODES[kind], array.ndim, *array.shape)
    return header + array.tobytes()


def blobs(count, shape, classes, key):
    """Images whose class is how bright they are: quick to learn whatever their size."""
    rng = np.random.default_rng(key)
    labels = rng.integers(0, classes, count)
    labels[:classes] = np.arange(classes)
    level = (labels + 0.5) * (255 / classes)
    noise = rng.normal(0, 10, (count, *shape))
    images = level.reshape(-1, *[1] * len(shape)) + noise
    return np.clip(images, 0, 255).astype(np.uint8), labels


@pytest.fixture(scope="session")
def blob_file(tmp_path_factory):
    """A Keras-style file of 4 classes and color images of 9 x 6: nothing as in MNIST."""
    path = tmp_path_factory.mktemp("blobs") / "blobs.npz"
    x_train, y_train = blobs(200, (9, 6, 3), 4, 1)
    x_test, y_test = blobs(50, (9, 6, 3), 4, 2)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return str(path)


# --- runs of the scripts ---

QUICK = ["--epochs", "2", "--hidden", "8", "--batch-size", "16"]
QUICK_CNN = [*QUICK, "--channels", "3", "4", "--kernel", "3"]


def train_on(data, *arguments):
    """The exit code of train_mlp.py, in this process."""
    return train_mlp.main(["--data", data, *QUICK, *map(str, arguments)])


def train_cnn_on(data, *arguments):
    """The exit code of train_cnn.py, in this process."""
    return train_cnn.main(["--data", data, *QUICK_CNN, *map(str, arguments)])


def mlp_experiment(data, build=train_mlp.build_mlp, **options):
    """What train_mlp.py makes of its options before it trains."""
    options = train_mlp.MLPOptions(data=data, **options)
    return run.set_up(options, build)[0]


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal, also where the tests run behind nohup."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def drawn(monkeypatch):
    """{path: figure} of what is drawn with matplotlib; nothing is rendered, which takes long."""
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, which is optional")
    figures = {}

    def save(figure, path, **options):
        figures[pathlib.Path(path)] = figure

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)
    return figures


def outputs_in(folder):
    """{name: bytes} of what a run leaves in its folder."""
    return {name: pathlib.Path(folder, name).read_bytes() for name in checkpoints.OUTPUTS}


def run_python(*arguments, environment=None, **options):
    """A Python process that has ended, without anything about threads of BLAS in its environment
    but what is given."""
    inherited = {name: v for name, v in os.environ.items() if name not in threads.BLAS_THREADS}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**inherited, "PYTHONPATH": str(REPOSITORY), **(environment or {})},
        capture_output=True,
        text=True,
        **options,
    )


def metrics(folder):
    """The rows of metrics.csv, as numbers."""
    with open(pathlib.Path(folder, "metrics.csv"), newline="") as file:
        return [{name: float(v) for name, v in row.items()} for row in csv.DictReader(file)]


def last_line(capsys):
    """The accuracy (or error) and the loss of the last line on standard output."""
    return capsys.readouterr().out.splitlines()[-1].split(" seconds")[0]
