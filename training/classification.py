"""Classifying images of any kind with the network in a run folder, without its training data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple, TypeVar

import numpy as np

import purenn as nn
from training.checkpoints import Run, blame_outputs, read_run
from training.command_line import all_values, from_values
from training.datasets import RATIO, as_images, read_idx, scale_images
from training.files import blame
from training.images import image_suffixes, list_images, read_image, resize
from training.loop import start_from
from training.options import Options
from training.prediction import predict

Chosen = TypeVar("Chosen", bound=Options)
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue (ITU-R BT.601)
CHUNK = 250  # images at a time


class Model(NamedTuple):
    """A trained network, and what it takes and gives."""

    net: nn.Layer
    params: nn.Tree
    classes: list[str]
    sample_shape: tuple[int, int, int]
    center: bool


def load_model(
    folder: str, record: type[Chosen], build: Callable[[Chosen, int], nn.Layer]
) -> Model:
    """The network in a run folder, rebuilt from run.json."""
    run = read_run(folder)
    unknown = sorted(run.options.keys() - all_values(record()).keys())
    if unknown:
        raise ValueError(
            f"{folder}: a run of {run.script}; this script has no {', '.join(unknown)}"
        )
    with blame_outputs(os.path.join(folder, "run.json")):
        classes, shape = check_classifier(run)
        options = from_values(record, run.options)
        # What init gives is compared by its shapes alone, and zeros take no memory.
        net = build(replace(options, init="zeros", init_std=None), len(classes))
        params, _ = net.init(0, shape)
    params = start_from(os.path.join(folder, "model.npz"), params, ())
    return Model(net, params, classes, shape, options.center)


def check_classifier(run: Run) -> tuple[list[str], tuple[int, int, int]]:
    """(classes, shape of an image) of a run; ValueError if it has learned something else."""
    if not isinstance(run.classes, list) or not all(isinstance(c, str) for c in run.classes):
        raise ValueError("there are no classes in it")
    shape = run.sample_shape
    if len(shape) != 3 or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"sample_shape must be (channels, height, width), got {shape}")
    channels, height, width = shape
    return run.classes, (channels, height, width)


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


def read_images_in(path: str) -> Iterator[tuple[list[str], np.ndarray]]:
    """(names, images (N, C, H, W)) of a file or folder, not too many at a time."""
    if os.path.isdir(path):
        found = list_images(path)
        if not found:
            raise ValueError(f"{path}: there is no image in this folder")
        for inside in found:
            yield [inside], read_image(inside, None)[None]
    elif path.endswith(".npz") or "idx" in os.path.basename(path):
        images = read_images_array(path)
        for start in range(0, len(images), CHUNK):
            part = images[start : start + CHUNK]
            yield [f"{path}[{start + index}]" for index in range(len(part))], part
    else:
        image_suffixes(path)  # says what is missing without Pillow
        yield [path], read_image(path, None)[None]


def read_images_array(path: str) -> np.ndarray:
    """The images of an IDX file or of a .npz with one array."""
    if not path.endswith(".npz"):
        array = read_idx(path)
        with blame(path):
            return as_images(array)
    arrays = nn.read_npz(path, ratio=RATIO)
    with blame(path):
        if len(arrays) != 1:
            raise ValueError(f"expected one array, found {sorted(arrays)}")
        return as_images(*arrays.values())


def fit_images(model: Model, images: np.ndarray) -> np.ndarray:
    """Images of any size and color as the network takes them."""
    channels, height, width = model.sample_shape
    images = with_channels(images, channels)
    if images.shape[2:] != (height, width):
        images = resize(images, (height, width))
    return scale_images(images, size=None, center=model.center)


def classify(model: Model, images: np.ndarray) -> list[tuple[str, float]]:
    """(class, its probability) of every image."""
    logits = predict(model.net, model.params, fit_images(model, images))
    probabilities, _ = nn.softmax().forward({}, logits)
    return [(model.classes[row.argmax()], float(row.max())) for row in probabilities]


def print_classes(
    options: Options, record: type[Chosen], build: Callable[[Chosen, int], nn.Layer]
) -> None:
    """A line for each image of --predict: its name, its class, the probability of that."""
    if options.out is None:
        raise ValueError("--predict needs --out, the folder of the run whose network it takes")
    model = load_model(options.out, record, build)
    for path in options.predict or ():
        for names, images in read_images_in(path):
            with blame(path):
                found = classify(model, images)
            for name, (label, probability) in zip(names, found, strict=True):
                print(f"{name}  {label}  {probability:.4f}")
