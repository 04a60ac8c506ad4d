"""Data sets: IDX and .npz files, what --data names, and the parts that are held out.

A data set is a dict of arrays: x_train (N, ...), y_train (N,), the same for x_validation and for
x_test, which are split off where there are none; with classes also their names, "classes".
"""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Collection
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

import purenn as nn
from training import mnist
from training.digits import draw_digits
from training.files import as_path, blame, open_binary, read_array
from training.images import (
    PARTS,
    list_names,
    match_parts,
    read_image_folders,
    resize,
    sub_folders,
    visible_names,
)
from training.terminal import ProgressLine

Dataset = dict[str, np.ndarray]
DEFAULT_FOLDER = os.path.join("data", "mnist")
RATIO = 200  # a data set unpacks to so many times its size at most; binary MNIST in float64: 124
MAX_CLASSES = 1_000_000  # labels beyond are no class numbers, but take memory as if they were
IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
IDX_FILES = {  # array: how the name of its file begins
    "x_train": "train-images",
    "y_train": "train-labels",
    "x_test": "t10k-images",
    "y_test": "t10k-labels",
}
ARRAYS = {  # array: what it may be called in an .npz
    f"{kind}_{part}": [f"{kind}_{name}" for name in called] + [kind] * (part == "train")
    for part, called in PARTS.items()
    for kind in "xy"
}
TAKES = (
    "--data takes a folder of MNIST-style IDX files, a folder with a sub-folder of images for each"
    " class, or an .npz file, as numpy.savez('data.npz', x=x, y=y) writes it"
)


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """The array in an IDX file, the format of MNIST; compressed with gzip or not.

    ValueError (with the path) for a damaged or truncated file, and for one compressed more than 200
    to 1 and larger than a megabyte.
    """
    path = as_path("read_idx", path)
    with blame(path), open_binary(path) as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        limit = os.path.getsize(path)
        if packed:  # sorted labels are small, but compress better than any images
            limit = max(RATIO * limit, 1 << 20)
        with gzip.open(raw) if packed else raw as file:
            header = file.read(4)
            if len(header) < 4 or header[:2] != b"\0\0" or header[2] not in IDX_TYPES:
                raise ValueError("it does not start as an IDX file does")
            dtype, axes = np.dtype(IDX_TYPES[header[2]]), header[3]
            shape = tuple(np.frombuffer(file.read(4 * axes), ">u4").tolist())
            if len(shape) != axes or math.prod(shape) * dtype.itemsize > limit:
                raise ValueError(f"an array of shape {shape} does not fit in it")
            return read_array(file, dtype, shape)


def missing_arrays(found: Collection[str]) -> list[str]:
    """What a data set lacks: images or labels to train on, and in every other part the other."""
    missing = []
    for part in PARTS:
        lacks = [name for name in (f"x_{part}", f"y_{part}") if name not in found]
        if part == "train" or len(lacks) == 1:
            missing += lacks
    return missing


def read_archive(path: str) -> Dataset:
    """The arrays of a data set in an .npz file."""
    arrays = nn.read_npz(path, ratio=RATIO)
    with blame(path):
        names = match_parts(ARRAYS, arrays)
        if missing_arrays(names):
            raise ValueError(
                "expected x_train and y_train (or x and y), and where there are others x_val and"
                f" y_val, x_test and y_test; found {list_names(arrays)}"
            )
        return {part: arrays[name] for part, name in names.items()}


def read_parts(path: str) -> Dataset:
    """The arrays of a data set, as they are in its files."""
    if not os.path.isdir(path):
        if not path.lower().endswith(".npz"):
            raise ValueError(f"{path}: {TAKES}")
        return read_archive(path)
    names = visible_names(path)
    found: dict[str, str] = {}
    for part, start in IDX_FILES.items():
        files = [name for name in names if name.startswith(start) and "idx" in name]
        if files:
            found[part] = files[0]  # the one without .gz, if there are both
    archives = [name for name in names if name.endswith(".npz")]
    if len(archives) == 1 and len(found) < len(IDX_FILES):
        return read_archive(os.path.join(path, archives[0]))
    if not found:
        raise ValueError(f"{path}: {TAKES}; found {list_names(archives or names)}")
    missing = ", ".join(IDX_FILES[name] for name in missing_arrays(found))
    if missing:
        raise ValueError(f"{path}: missing beside {list_names(found.values())}: {missing}")
    return {part: read_idx(os.path.join(path, name)) for part, name in found.items()}


def as_images(array: np.ndarray) -> np.ndarray:
    """(N, H, W), (N, H, W, C) or (N, C, H, W) as float32 (N, C, H, W); whole numbers over 255.

    C is 1, 3 or, with an opacity that is left as it is, 4.
    """
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim != 4 or 0 in array.shape:
        raise ValueError(f"images must be (N, H, W), (N, H, W, C) or (N, C, H, W): {array.shape}")
    if array.shape[1] not in (1, 3) and array.shape[3] in (1, 3, 4):
        array = array.transpose(0, 3, 1, 2)
    with np.errstate(all="ignore"):  # what is too large for float32 becomes inf
        images = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(images).all():
        raise ValueError("images must be finite")
    return images if array.dtype.kind in "fb" else np.divide(images, np.float32(255), out=images)


def as_features(array: np.ndarray) -> np.ndarray:
    """(N, features) as float64, whatever they are; `standardize` brings them to one scale."""
    with np.errstate(all="ignore"):  # what is too large for float32 becomes inf
        finite = np.isfinite(array.astype(np.float32))
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        value = array[row, column]
        raise ValueError(f"features must be finite, got {value} in row {row}, column {column}")
    return array.astype(np.float64)


def as_samples(name: str, array: np.ndarray) -> np.ndarray:
    """Features (N, F) by `as_features`, images by `as_images`."""
    if array.ndim not in (2, 3, 4) or 0 in array.shape:
        raise ValueError(
            f"{name}: expected features (N, F) or images (N, H, W), (N, H, W, C) or (N, C, H, W),"
            f" got shape {array.shape}"
        )
    return as_features(array) if array.ndim == 2 else as_images(array)


def as_labels(name: str, labels: np.ndarray, count: int, classes: int) -> np.ndarray:
    """(N,) or (N, 1) as int64 (N,): one class number for each of `count` samples."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (count,):
        rows = labels.ndim == 2 and len(labels) == count
        advice = "; argmax(axis=1) makes class numbers of one-hot rows" if rows else ""
        raise ValueError(f"{name}: labels must have shape ({count},), got {labels.shape}{advice}")
    if labels.dtype.kind not in "iu":
        whole = np.array_equal(labels, np.round(labels))
        advice = (
            "astype(int) makes them so" if whole else "these scripts classify, they fit no values"
        )
        raise ValueError(
            f"{name}: labels must be class numbers (integers), got {labels.dtype}; {advice}"
        )
    low, high = labels.min(), labels.max()
    if low < 0 or high >= classes:
        raise ValueError(f"{name}: labels must be from 0 to {classes - 1}, got {low} to {high}")
    return labels.astype(np.int64)


def read_dataset(path: str | os.PathLike[str]) -> Dataset:
    """{"x_train", "y_train", ...}: images (N, C, H, W) of float32 or features (N, F), labels (N,).

    `path`: a folder with MNIST-style IDX files (.gz or not) or with one .npz, or the .npz itself;
    validation and test samples may be missing. Whole pixels of 0 ... 255 become 0 ... 1, features
    stay as they are, in float64. ValueError (with the path) for files that are missing, damaged or
    do not fit together.
    """
    path = as_path("read_dataset", path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path or repr(path)}: there is no such file or folder")
    parts = read_parts(path)
    with blame(path):
        data: Dataset = {}
        classes = MAX_CLASSES
        for part in PARTS:
            x, y = f"x_{part}", f"y_{part}"
            if x not in parts:
                continue
            data[x] = as_samples(x, parts[x])
            own, expected = data[x].shape[1:], data["x_train"].shape[1:]
            if own != expected:
                raise ValueError(f"{x} has samples of shape {own}, but x_train of {expected}")
            data[y] = as_labels(y, parts[y], len(data[x]), classes)
            classes = int(data["y_train"].max()) + 1
    return data


def synthetic_digits(train: int = 12_000, test: int = 2_000) -> Dataset:
    """A data set of synthetic digits; always the same one."""
    data = {}
    for key, (part, size) in enumerate((("train", train), ("test", test))):
        images, labels = draw_digits((2026, key), size)
        data[f"x_{part}"] = images[:, None] / np.float32(255)
        data[f"y_{part}"] = labels
    return data


def sine(train: int = 4_000, test: int = 1_000) -> Dataset:
    """Points of y = sin x on (-π/2, π/2): random ones to train on, evenly spaced to test on."""
    random = nn.uniform(math.pi / 2)((2026, 2), (train, 1))
    edges = np.linspace(-math.pi / 2, math.pi / 2, test + 2)
    data = {"x_train": random, "x_test": edges[1:-1, None].astype(np.float32)}
    return {**data, **{f"y{name[1:]}": np.sin(x) for name, x in data.items()}}


def data_files(folder: str) -> list[str]:
    """The names of the IDX and .npz files in a folder; none where it is not a folder."""
    names = visible_names(folder) if os.path.isdir(folder) else []
    return [n for n in names if "-idx" in n or ".idx" in n or n.endswith(".npz")]


def holds_arrays(folder: str) -> bool:
    """Whether a folder is read for its IDX files or its one .npz, not for images in sub-folders.

    Of several .npz, as a run leaves them in the folder of --out, none is a data set.
    """
    names = data_files(folder)
    archives = sum(name.endswith(".npz") for name in names)
    return len(names) > archives or archives == 1


def has_mnist(folder: str) -> bool:
    """Whether a download into a folder was finished, or another data set stands there."""
    names = data_files(folder)
    return len(names) >= len(IDX_FILES) or any(name.endswith(".npz") for name in names)


def show_download(line: ProgressLine, name: str, done: int, total: int) -> None:
    """Progress of a download, for `download_mnist`."""
    share = f" of {total / 1e6:.1f}" if total else ""
    line.show(f"downloading {name}: {done / 1e6:.1f}{share} MB", important=done >= total)


def find_mnist() -> str:
    """data/mnist, downloaded into it if it is not there; without a network "builtin"."""
    if has_mnist(DEFAULT_FOLDER):
        return DEFAULT_FOLDER
    line = ProgressLine()
    progress = partial(show_download, line)
    try:
        mnist.download_mnist(DEFAULT_FOLDER, mnist.MNIST_MIRRORS, progress=progress)
    except (OSError, ValueError) as error:
        line.end()
        print(
            f"MNIST is not in {DEFAULT_FOLDER} and cannot be downloaded ({error});"
            " training on synthetic digits instead, --data DIR reads your own",
            flush=True,
        )
        return "builtin"
    line.end()
    return DEFAULT_FOLDER


def load_data(source: str | None, size: int | None) -> tuple[Dataset, str]:
    """The data set that --data names, or the default one; and its name as --data takes it.

    Images of a folder of image files are resized to `size` while they are read.
    """
    if source is not None and sub_folders(source) and not holds_arrays(source):
        return read_image_folders(source, size), source
    if source is None:
        source = find_mnist()
    data = synthetic_digits() if source == "builtin" else read_dataset(source)
    return {**data, "classes": np.arange(int(data["y_train"].max()) + 1).astype(str)}, source


def shuffle(count: int, key: nn.Key) -> np.ndarray:
    """The numbers 0 ... count-1 in the order that the key says."""
    return next(nn.batches(count, count, key))


def select(data: Dataset, part: str, index: np.ndarray) -> list[np.ndarray]:
    """[x, y] of some of the samples of a part, in the order in which they stand there."""
    index = np.sort(index)
    return [data[f"{name}_{part}"][index] for name in ("x", "y")]


def choose_test(data: Dataset, size: int | None) -> Dataset:
    """`size` of the test samples; where there are none, of those to train on, which lose them."""
    source = "test" if "x_test" in data else "train"
    available = len(data[f"x_{source}"])
    if source == "test" and size is None:
        return data
    size = max(available // 5, 1) if size is None else size
    if source == "test" and size > available:
        raise ValueError(f"--test-size {size} exceeds the {available} test samples")
    if source == "train" and size >= available:
        raise ValueError(f"--test-size {size} leaves none of the {available} samples to train on")
    order = shuffle(available, 0)
    parts = {"test": order[:size], **({"train": order[size:]} if source == "train" else {})}
    chosen = dict(data)
    for part, index in parts.items():
        chosen[f"x_{part}"], chosen[f"y_{part}"] = select(data, source, index)
    return chosen


def choose_validation(data: Dataset, size: int | None) -> Dataset:
    """`size` of the validation samples, always the same ones, or all."""
    available = len(data["x_validation"])
    size = available if size is None else size
    if size > available:
        raise ValueError(f"--validation {size} exceeds the {available} validation samples")
    x, y = select(data, "validation", shuffle(available, 0)[:size])
    return {**data, "x_validation": x, "y_validation": y}


def split_off(data: Dataset, size: int | None, seed: int, train_size: int | None = None) -> Dataset:
    """Hold out `size` random training samples as "x_validation" and "y_validation".

    Where there are validation samples, they are those, and nothing is held out. Of the training
    samples that are left, `train_size` stay, or all.
    """
    parts, available, held_out = dict(data), len(data["x_train"]), 0
    if "x_validation" in data:
        parts = choose_validation(data, size)
    else:
        held_out = min(5_000, available // 10) if size is None else size
    if held_out >= available:
        raise ValueError(f"--validation {size} leaves none of the {available} samples to train on")
    if train_size is None:
        train_size = available - held_out
    if train_size > available - held_out:
        raise ValueError(
            f"--train-size {train_size} is too many: there are {available} samples, {held_out} of"
            " them held out (--validation)"
        )
    order = shuffle(available, (seed, 3))
    if "x_validation" not in data:
        parts["x_validation"], parts["y_validation"] = select(data, "train", order[:held_out])
    index = order[held_out : held_out + train_size]
    parts["x_train"], parts["y_train"] = select(data, "train", index)
    return parts


def standardize(features: np.ndarray, mean: ArrayLike, std: ArrayLike) -> np.ndarray:
    """Features as the network takes them: (features - mean) / std, in float32."""
    with np.errstate(over="ignore"):
        return ((features - np.asarray(mean)) / np.asarray(std)).astype(np.float32)


def prepare_features(data: Dataset) -> Dataset:
    """Features standardized, by the mean and the standard deviation of those that are trained on.

    These two are kept, as "feature_mean" and "feature_std". What is constant there becomes 0.
    """
    features = data["x_train"]
    mean, std, low = features.mean(axis=0), features.std(axis=0), features.min(axis=0)
    constant = low == features.max(axis=0)  # its mean and deviation are only so up to rounding
    mean[constant], std[constant | (std == 0)] = low[constant], 1
    prepared = {**data, "feature_mean": mean, "feature_std": std}
    for name in ("x_train", "x_validation", "x_test"):
        prepared[name] = standardize(data[name], mean, std)
    return prepared


def prepare(data: Dataset, *, size: int | None, center: bool) -> Dataset:
    """Images of `size` by `size` pixels (None: as they are), from -0.5 to 0.5 if `center`."""
    prepared = dict(data)
    for name in ("x_train", "x_validation", "x_test"):
        prepared[name] = scale_images(data[name], size=size, center=center)
    return prepared


def scale_images(images: np.ndarray, *, size: int | None, center: bool) -> np.ndarray:
    """Images as the network takes them: of this size, from 0 to 1 or from -0.5 to 0.5."""
    if size is not None:
        images = resize(images, size)
    return images - np.float32(0.5) if center else images
