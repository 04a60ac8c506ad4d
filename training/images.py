"""Resizing, image files (with Pillow), and folders that hold one sub-folder for each class."""

from __future__ import annotations

import io
import logging
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from training.files import open_binary
from training.terminal import ProgressLine

PARTS = {  # of a data set, and what each may be called, as a folder or in a file
    "train": ("train",),
    "validation": ("val", "valid", "validation"),
    "test": ("test",),
}
logging.getLogger("PIL").addHandler(logging.NullHandler())  # else it prints what it then raises
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # others may run programs
DEEP = (("I", "PNG"), ("I", "PPM"))  # modes of 16 bits, and those that are called I;16


def overlaps(length: int, pixels: int) -> np.ndarray:
    """(pixels, length): the share of each old pixel in each of the new ones on the same line."""
    if pixels * length > 1 << 24:  # a damaged file may say that it is a million pixels high
        raise ValueError(f"resize: a line of {length} pixels is too long to become one of {pixels}")
    edges = np.linspace(0, length, pixels + 1)
    start, end = edges[:-1, None], edges[1:, None]
    old = np.arange(length)
    shares: np.ndarray = np.minimum(end, old + 1)
    shares -= np.maximum(start, old)
    np.maximum(shares, 0, out=shares)
    shares *= pixels / length
    return shares


def check_side(value: Any) -> int:
    """A number of pixels as an int."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"resize: size must be a whole number, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"resize: size must be at least 1, got {value}")
    return int(value)


def check_images(images: Any) -> None:
    """Refuse what is not (N, C, H, W) of float32 or float64."""
    if not isinstance(images, np.ndarray) or isinstance(images, (np.ma.MaskedArray, np.matrix)):
        raise TypeError(f"resize: images must be a NumPy array, got {type(images).__name__}")
    if images.dtype.char not in "fd":
        raise TypeError(
            f"resize: images must be float32 or float64, got {images.dtype};"
            " convert it with images.astype(np.float32)"
        )
    if images.ndim != 4 or 0 in images.shape[2:]:
        raise ValueError(f"resize: images must be (N, C, H, W), got shape {images.shape}")


def resize(images: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """images (N, C, H, W) as (N, C, *size): every new pixel is the mean of the area it covers.

    `size` is an int or a pair (height, width). The mean of an image stays what it is; to a
    multiple of the size, pixels are repeated. As area interpolation elsewhere (OpenCV's
    INTER_AREA). ValueError for a size below 1 or images that are not (N, C, H, W).
    """
    check_images(images)
    pair = size if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2:
        raise ValueError(f"resize: size must be a whole number or a pair of them, got {size}")
    height, width = map(check_side, pair)
    down = overlaps(images.shape[2], height).astype(images.dtype)
    across = overlaps(images.shape[3], width).astype(images.dtype)
    with np.errstate(all="ignore"):  # what is too large becomes inf
        return np.asarray(down @ (np.ascontiguousarray(images) @ across.T))


def sub_folders(folder: str) -> list[str]:
    """The names of the folders in a folder, sorted; none where it is not a folder."""
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def image_suffixes(where: str) -> tuple[str, ...]:
    """The endings of the names of image files. ValueError if Pillow is missing."""
    try:
        import PIL.Image
        import PIL.PngImagePlugin
    except ImportError:
        raise ValueError(f"{where}: image files need Pillow: pip install pillow") from None
    PIL.PngImagePlugin.MAX_TEXT_MEMORY = 1 << 22  # bytes of comments unpacked, else 64 MB a file
    known = PIL.Image.registered_extensions().items()
    return tuple(suffix for suffix, kind in known if kind in IMAGE_FORMATS)


def read_pixels(content: io.BytesIO) -> np.ndarray:
    """(H, W), (H, W, 3) from 0 to 255: what an untrusted image file holds, the right way up."""
    import PIL.Image
    import PIL.ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PIL.Image.open(content, formats=IMAGE_FORMATS).verify()  # a PNG's checksums
        image = PIL.Image.open(content, formats=IMAGE_FORMATS)
        deep = image.mode.startswith("I;16") or (image.mode, image.format) in DEEP
        if image.mode[0] in "IF" and not deep:
            raise ValueError(f"its pixels are of mode {image.mode}, expected 8 or 16 bits a color")
        if not 0 < math.prod(image.size) <= max(1_000_000, 50 * len(content.getbuffer())):
            raise ValueError(f"{image.width}x{image.height} pixels do not fit in it")
        PIL.ImageOps.exif_transpose(image, in_place=True)  # as a phone was held
        if deep:
            return np.asarray(image, np.float32) / np.float32(257)  # 65535 is white
        gray = image.mode in ("1", "L", "LA")
        return np.asarray(image.convert("L" if gray else "RGB"))


def read_image(path: str, size: int | None) -> np.ndarray:
    """(C, H, W) from 0 to 1 of an image file with 8 or 16 bits a color; one channel if it is gray.

    Transparency is ignored, and of several pictures in a file the first one counts.
    """
    import PIL.Image

    try:
        with open_binary(path) as file:
            content = io.BytesIO(file.read())  # asked for more than there is, it takes no memory
        pixels = read_pixels(content)
    except Exception as error:  # Pillow raises any, for damaged files
        reason = str(error) or type(error).__name__
        if isinstance(error, PIL.UnidentifiedImageError):
            reason = f"it is damaged or not one of {', '.join(IMAGE_FORMATS)}"
        raise ValueError(f"{path}: cannot be read as an image: {reason}") from None
    pixels = pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)
    scaled: np.ndarray = np.divide(pixels, np.float32(255), dtype=np.float32)
    return scaled if size is None else resize(scaled[None], size)[0]


def empty_stack(count: int, image: np.ndarray) -> np.ndarray:
    """Room for so many images; asked for before they are read, for that may take long."""
    try:
        return np.empty((count, *image.shape), np.float32)
    except MemoryError:
        pixels = f"{image.shape[2]}x{image.shape[1]}"
        raise MemoryError(
            f"{count:,} images of {pixels} pixels do not fit in memory; --size N makes them smaller"
        ) from None


def stack_images(paths: list[str], size: int | None) -> np.ndarray:
    """(N, C, H, W) of image files of one size; gray ones get three channels among colored ones."""
    images = empty_stack(len(paths), read_image(paths[0], size))
    line = ProgressLine()
    try:
        for number, path in enumerate(paths):
            line.show(f"reading images: {number:,} of {len(paths):,}")
            image = read_image(path, size)
            if image.shape[1:] != images.shape[2:]:
                sizes = " and ".join(f"{i.shape[-1]}x{i.shape[-2]}" for i in (images, image))
                least = min(*images.shape[2:], *image.shape[1:])
                advice = f"--size {least}, for example, makes them the same"
                raise ValueError(f"{path}: images of {sizes} pixels; {advice}")
            if len(image) > images.shape[1]:
                images = np.repeat(images, len(image), axis=1)
            images[number] = image
    finally:
        line.clear()
    return images


def visible_names(folder: str) -> list[str]:
    """The names in a folder, sorted, but not the hidden ones, as .DS_Store and ._data.npz."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def list_images(folder: str) -> list[str]:
    """The paths of the image files in a folder, sorted."""
    suffixes = image_suffixes(folder)
    names = [name for name in visible_names(folder) if name.lower().endswith(suffixes)]
    return [os.path.join(folder, name) for name in names]


def list_names(names: Iterable[str]) -> str:
    """Some names in a sentence, the first five of them."""
    names = sorted(names)
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "nothing") + more


def match_parts(called: Mapping[str, Sequence[str]], names: Iterable[str]) -> dict[str, str]:
    """{part: its name} of the parts that are there; ValueError where one is there twice."""
    matched: dict[str, str] = {}
    for part, known in called.items():
        found = [name for name in names if name.lower() in known]
        if len(found) > 1:
            raise ValueError(f"{' and '.join(found)} are the same part of a data set: keep one")
        if found:
            matched[part] = found[0]
    return matched


def part_folders(folder: str) -> dict[str, str]:
    """{part: its folder}: train/, val/ and test/, or the folder itself where there are none.

    Those hold folders; one that is called train and holds images is a class.
    """
    try:
        found = match_parts(PARTS, sub_folders(folder))
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    folders = {part: os.path.join(folder, name) for part, name in found.items()}
    if not any(map(sub_folders, folders.values())):
        return {"train": folder}
    if "train" not in found:
        other = next(iter(found.values()))
        raise ValueError(f"{folder}: there is a folder {other}, but none called train")
    return folders


def check_classes(folder: str, train: str, classes: Sequence[str]) -> None:
    """ValueError where a folder has not one for each class, as the folder of `train` has."""
    found = sub_folders(folder)
    for one, other, missing in (
        (folder, train, set(classes).difference(found)),
        (train, folder, set(found).difference(classes)),
    ):
        if missing:
            raise ValueError(
                f"{one}: expected the same classes as in {other}; there is no folder"
                f" {list_names(missing)}"
            )


def list_class(folder: str) -> list[str]:
    """The paths of the images of one class, at least one."""
    paths = list_images(folder)
    if paths:
        return paths
    inside = sub_folders(folder)
    found = visible_names(folder)
    reason = f", only {list_names(found)}" if found else ""
    if inside:
        reason += "; --data takes the folder right above those of the classes"
    raise ValueError(f"{folder}: there is no image in this folder{reason}")


def read_image_folders(folder: str, size: int | None) -> dict[str, np.ndarray]:
    """A data set of image files, in one sub-folder for each class.

    These stand in train/, val/ and test/, of which only the first must be there; or by themselves.
    """
    image_suffixes(folder)
    folders = part_folders(folder)
    classes = sub_folders(folders["train"])
    paths: list[str] = []
    labels: dict[str, np.ndarray] = {}
    for part, path in folders.items():
        check_classes(path, folders["train"], classes)
        listed = [list_class(os.path.join(path, name)) for name in classes]
        labels[part] = np.repeat(np.arange(len(classes)), list(map(len, listed)))
        paths += [image for images in listed for image in images]
    ends = np.cumsum([len(part) for part in labels.values()])
    images = np.split(stack_images(paths, size), ends[:-1])
    data = {"classes": np.array(classes)}
    for part, own in zip(labels, images, strict=True):
        data |= {f"x_{part}": own, f"y_{part}": labels[part]}
    return data
