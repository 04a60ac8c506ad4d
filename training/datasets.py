"""Data sets: IDX and .npz files, what --data names, and the parts that are held out.

A data set is a dict of arrays: x_train (N, ...), y_train (N,), the same for x_test, y_test and,
once split off, x_validation, y_validation; with classes also their names, "classes".
"""

from __future__ import annotations

import gzip
import math
import os
from functools import partial

import numpy as np

import purenn as nn
from training import mnist
from training.digits import draw_digits
from training.files import as_path, blame, open_binary, read_array
from training.images import read_image_folders, resize, sub_folders
from training.terminal import ProgressLine

Dataset = dict[str, np.ndarray]
DEFAULT_FOLDER = os.path.join("data", "mnist")
RATIO = 200  # a data set unpacks to so many times its size at most; binary MNIST in float64: 124
IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
PARTS = {
    "x_train": "train-images",
    "y_train": "train-labels",
    "x_test": "t10k-images",
    "y_test": "t10k-labels",
}


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


def find_parts(path: str) -> Dataset:
    """The four arrays of a data set, as they are in its files."""
    if os.path.isdir(path):
        names = sorted(os.listdir(path))
        found = {
            part: [name for name in names if name.startswith(start) and "idx" in name]
            for part, start in PARTS.items()
        }
        if all(found.values()):  # the first one is the one without .gz, if there are both
            return {part: read_idx(os.path.join(path, files[0])) for part, files in found.items()}
        archives = [name for name in names if name.endswith(".npz")]
        if len(archives) != 1:
            missing = [start for part, start in PARTS.items() if not found[part]]
            raise ValueError(
                f"{path}: expected IDX files train-images-idx3-ubyte[.gz] and so on (missing:"
                f" {', '.join(missing)}) or one .npz file, found {len(archives)} of these"
            )
        path = os.path.join(path, archives[0])
    arrays = nn.read_npz(path, ratio=RATIO)
    with blame(path):
        if not PARTS.keys() <= arrays.keys():
            raise ValueError(f"expected {list(PARTS)}, found {sorted(arrays)}")
        return {part: arrays[part] for part in PARTS}


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


def as_labels(name: str, labels: np.ndarray, count: int, classes: int) -> np.ndarray:
    """(N,) or (N, 1) as int64 (N,): one class number for each of `count` images."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != (count,):
        raise ValueError(f"{name}: labels must have shape ({count},), got {labels.shape}")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{name}: labels must be whole numbers (integers), got {labels.dtype}")
    low, high = labels.min(), labels.max()
    if low < 0 or high >= classes:
        raise ValueError(f"{name}: labels must be from 0 to {classes - 1}, got {low} to {high}")
    return labels.astype(np.int64)


def read_dataset(path: str | os.PathLike[str]) -> Dataset:
    """{"x_train", "y_train", "x_test", "y_test"}: images (N, C, H, W) of float32, labels (N,).

    `path`: a folder with MNIST-style IDX files (.gz or not) or with one Keras-style .npz, or
    the .npz itself. Whole pixels of 0 ... 255 become 0 ... 1. ValueError (with the path) for
    files that are missing, damaged or do not fit together.
    """
    path = as_path("read_dataset", path)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    parts = find_parts(path)
    with blame(path):
        data = {name: as_images(parts[name]) for name in ("x_train", "x_test")}
        if data["x_train"].shape[1:] != data["x_test"].shape[1:]:
            raise ValueError("training and test images differ in size")
        classes = 2**31  # what is beyond is damage, and might not fit in int64
        for part in ("train", "test"):
            name = f"y_{part}"
            data[name] = as_labels(name, parts[name], len(data[f"x_{part}"]), classes)
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


def has_dataset(folder: str) -> bool:
    """Whether there is a complete data set in a folder, going by the names alone."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sum("-idx" in name or ".idx" in name for name in names) >= 4 or any(
        name.endswith(".npz") for name in names
    )


def show_download(line: ProgressLine, name: str, done: int, total: int) -> None:
    """Progress of a download, for `download_mnist`."""
    share = f" of {total / 1e6:.1f}" if total else ""
    line.show(f"downloading {name}: {done / 1e6:.1f}{share} MB", important=done >= total)


def find_mnist() -> str:
    """data/mnist, downloaded into it if it is not there; without a network "builtin"."""
    if has_dataset(DEFAULT_FOLDER):
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
    if source is not None and sub_folders(source) and not has_dataset(source):
        return read_image_folders(source, size), source
    if source is None:
        source = find_mnist()
    data = synthetic_digits() if source == "builtin" else read_dataset(source)
    return {**data, "classes": np.arange(int(data["y_train"].max()) + 1).astype(str)}, source


def shuffle(count: int, key: nn.Key) -> np.ndarray:
    """The numbers 0 ... count-1 in the order that the key says."""
    return next(nn.batches(count, count, key))


def select(data: Dataset, part: str, index: np.ndarray) -> list[np.ndarray]:
    """[x, y] of some of the training or test images, in the order in which they stand there."""
    index = np.sort(index)
    return [data[f"{name}_{part}"][index] for name in ("x", "y")]


def choose_test(data: Dataset, size: int | None) -> Dataset:
    """`size` of the test images; where there are none, of the training images, which lose them."""
    source = "test" if "x_test" in data else "train"
    available = len(data[f"x_{source}"])
    if source == "test" and size is None:
        return data
    size = available // 5 if size is None else size
    if size > available - (source == "train"):
        raise ValueError(f"--test-size {size} exceeds the {available} {source} images")
    order = shuffle(available, 0)
    parts = {"test": order[:size], **({"train": order[size:]} if source == "train" else {})}
    chosen = dict(data)
    for part, index in parts.items():
        chosen[f"x_{part}"], chosen[f"y_{part}"] = select(data, source, index)
    return chosen


def split_off(data: Dataset, size: int | None, seed: int, train_size: int | None = None) -> Dataset:
    """Hold out `size` random training images as "x_validation" and "y_validation".

    Of the others, `train_size` stay, or all.
    """
    available = len(data["x_train"])
    if size is None:
        size = min(5_000, available // 10)
    if size >= available:
        raise ValueError(f"--validation {size} leaves none of the {available} images to train on")
    if train_size is None:
        train_size = available - size
    if train_size > available - size:
        raise ValueError(
            f"--train-size {train_size} is too many: there are {available} images, {size} of them"
            " held out (--validation)"
        )
    order = shuffle(available, (seed, 3))
    parts = dict(data)
    parts["x_validation"], parts["y_validation"] = select(data, "train", order[:size])
    index = order[size : size + train_size]
    parts["x_train"], parts["y_train"] = select(data, "train", index)
    return parts


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
