"""Classifying images of any kind with the network in a run folder, without its training data."""

from __future__ import annotations

import io
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np

import purenn as nn
from training.checkpoints import Run, blame_outputs, read_run
from training.command_line import all_values, from_values
from training.datasets import (
    RATIO,
    as_samples,
    read_idx,
    scale_images,
    standardize,
)
from training.files import blame, one_line, open_binary
from training.images import image_suffixes, list_images, read_image, resize
from training.loop import start_from
from training.options import Options
from training.prediction import layers_of, predict

Chosen = TypeVar("Chosen", bound=Options)
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue (ITU-R BT.601)
CHUNK = 250  # images at a time
MOST_NUMBERS = 10_000_000  # in a sample that a network takes


class Model(NamedTuple):
    """A trained network, and what it takes and gives."""

    net: nn.Layer
    params: nn.Tree
    classes: list[str]
    sample_shape: tuple[int, ...]  # (channels, height, width), or (features,)
    center: bool
    mean: list[float]  # of the features that it was trained on, and their standard deviation
    std: list[float]


def load_network(
    folder: str, record: type[Chosen], build: Callable[[Chosen, int], nn.Layer]
) -> tuple[Run, Chosen, nn.Layer, nn.Tree]:
    """(run, options, network, params) of a run folder, rebuilt from run.json."""
    for name, missing in (
        ("run.json", "there is no run in this folder"),
        ("model.npz", "there is no model.npz yet; a run writes it with its first report"),
    ):
        if not os.path.exists(os.path.join(folder, name)):
            raise ValueError(f"{folder}: {missing}")
    run = read_run(folder)
    unknown = sorted(run.options.keys() - all_values(record()).keys())
    if unknown:
        words = f"it is a run of {run.script}, and this script has no {', '.join(unknown)}"
        raise ValueError(f"{folder}: {one_line(words)}")
    path = os.path.join(folder, "run.json")
    with blame_outputs(path):
        check_shape(run)
        options = from_values(record, run.options)
        if options.task == "classes" and not run.classes:
            raise ValueError("there are no classes in it")
        # What init gives is compared by its shapes alone, and zeros take no memory.
        net = build(replace(options, init="zeros", init_std=None), len(run.classes or "y"))
    layers = first_layers(net, tuple(run.sample_shape), path)
    params = start_from(os.path.join(folder, "model.npz"), layers_of(net), layers)
    return run, options, net, params


def first_layers(net: nn.Layer, shape: tuple[int, ...], path: str) -> Iterator[tuple[str, nn.Tree]]:
    """(name, its params before training) of every layer, one by one; ValueError with the path."""
    for name, layer in layers_of(net).items():
        with blame_outputs(path):
            params, shape = layer.init(0, shape)
        yield name, params


def check_shape(run: Run) -> None:
    """ValueError where classes, sample_shape or pixel_range are not what a run writes."""
    classes, shape = run.classes or [], run.sample_shape
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"classes must be a list of names, got {classes}")
    if len(shape) not in (1, 3) or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(
            f"sample_shape must be (channels, height, width) or (features,), got {shape}"
        )
    if math.prod(shape) > MOST_NUMBERS:
        raise ValueError(f"no network of this size has been trained on samples of shape {shape}")
    for numbers in (run.feature_mean, run.feature_std) if len(shape) == 1 and classes else ():
        if not isinstance(numbers, list) or [type(n) for n in numbers] != [float] * shape[0]:
            raise ValueError("there is no mean and no deviation for each feature")
    if run.pixel_range not in (None, [0, 1], [-0.5, 0.5]):
        raise ValueError(f"pixel_range must be [0, 1] or [-0.5, 0.5], got {run.pixel_range}")


def load_model(
    folder: str, record: type[Chosen], build: Callable[[Chosen, int], nn.Layer]
) -> Model:
    """The network in a run folder, which must tell classes apart."""
    run, options, net, params = load_network(folder, record, build)
    if run.classes is None:
        raise ValueError(f"{folder}: the run in this folder has no classes to predict")
    shape = tuple(run.sample_shape)
    mean, std = run.feature_mean or [], run.feature_std or []
    return Model(net, params, run.classes, shape, options.center, mean, std)


def with_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """images (N, C, H, W) with so many channels: gray to colors, or colors to gray."""
    have = images.shape[1]
    if have == channels:
        return images
    if have == 1:
        return np.repeat(images, channels, axis=1)
    if have in (3, 4) and channels in (1, 3):
        colors = images[:, :3]
        return colors if channels == 3 else np.tensordot(colors, LUMINANCE, (1, 0))[:, None]
    raise ValueError(f"images of {have} channels, but the network takes {channels}")


def find_files(path: str) -> list[str]:
    """The image files in a folder and in the folders in it; of what is no folder, its path."""
    found: list[str] = []
    for folder, inside, _ in os.walk(path):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        found += list_images(folder)
    return found or [path]


def read_samples(path: str) -> tuple[Iterator[str], np.ndarray]:
    """(names, images (N, C, H, W) or rows (N, features)) of a file, known by its first bytes."""
    if os.path.isdir(path):
        raise ValueError(f"{path}: there is no image in this folder")
    with blame(path), open_binary(path) as file:
        start = file.read(2)
    if start in (b"\0\0", b"\x1f\x8b"):  # the second is gzip's; no image begins with these
        array = read_idx(path)
    elif start == b"PK" or path.endswith(".npz"):
        array = read_only_array(path)
    else:
        image_suffixes(path)  # says what is missing without Pillow
        return iter([path]), read_image(path, None)[None]
    with blame(path):
        samples = as_samples("its array", array)
    return (f"{path}[{index}]" for index in range(len(samples))), samples


def read_only_array(path: str) -> np.ndarray:
    """The array of an .npz file with one."""
    arrays = nn.read_npz(path, ratio=RATIO)
    with blame(path):
        if len(arrays) != 1:
            raise ValueError(f"expected one array, found {sorted(arrays)}")
    return next(iter(arrays.values()))


def fit_rows(model: Model, rows: np.ndarray) -> np.ndarray:
    """Features (N, F) standardized as in training; ValueError for another number of them."""
    if rows.shape[1:] != model.sample_shape:
        raise ValueError(f"samples of shape {rows.shape[1:]}, expected {model.sample_shape}")
    return standardize(rows, model.mean, model.std)


def fit_images(model: Model, images: np.ndarray) -> np.ndarray:
    """Images (N, C, H, W) of any size and color, brought to those that the network takes."""
    if len(model.sample_shape) != 3:
        raise ValueError(f"images, but the network takes samples of shape {model.sample_shape}")
    channels, height, width = model.sample_shape
    images = with_channels(images, channels)
    if images.shape[2:] != (height, width):
        images = resize(images, (height, width))
    return scale_images(images, size=None, center=model.center)


def classify(model: Model, samples: np.ndarray) -> list[tuple[str, float]]:
    """(class, its probability) of images or rows as --data takes them, (N, C, H, W) for example."""
    samples = as_samples("samples", samples)
    x = fit_rows(model, samples) if samples.ndim == 2 else fit_images(model, samples)
    logits = predict(model.net, model.params, x)
    if not np.isfinite(logits).all():
        raise ValueError("the network's output is not finite: these numbers or its own are huge")
    probabilities, _ = nn.softmax().forward({}, logits)
    return [(model.classes[row.argmax()], float(row.max())) for row in probabilities]


def classify_file(model: Model, path: str) -> Iterator[tuple[str, str, float]]:
    """(name, class, its probability) of an image file, or of an array's samples one by one.

    They are not kept: a small file may hold millions of samples of one pixel.
    """
    names, samples = read_samples(path)
    with blame(path):
        for start in range(0, len(samples), CHUNK):
            for label, probability in classify(model, samples[start : start + CHUNK]):
                yield next(names), label, probability


def print_classes(
    options: Options,
    record: type[Chosen],
    build: Callable[[Chosen, int], nn.Layer],
    report: Callable[[Exception], None],
) -> int:
    """A line for each image of --predict: its name, its class, the probability of that.

    What cannot be classified goes to `report`, and the others are classified all the same. Gives
    the exit code.
    """
    if options.out is None:
        raise ValueError("--predict needs --out, the folder of the run whose network it takes")
    model, code = load_model(options.out, record, build), 0
    if isinstance(sys.stdout, io.TextIOWrapper):  # any name, whatever the locale takes
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    for path in options.predict or ():
        for file in find_files(path):
            try:
                for name, label, probability in classify_file(model, file):
                    print(f"{name}  {label}  {probability:.4f}")
            except BrokenPipeError:
                raise
            except (ValueError, OSError, MemoryError) as error:
                report(error)
                code = 2
    return code
