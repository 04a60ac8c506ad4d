"""Opening and reading untrusted files: whatever is wrong with them is one sentence."""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import os
from collections.abc import Iterator
from typing import IO, Any

import numpy as np


def as_path(where: str, path: Any) -> str:
    """A path as a string. TypeError for what is not a path."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{where}: the path must be a string or a Path, got {type(path).__name__}")
    return os.fsdecode(path)


def one_line(error: object) -> str:
    """What an error says, in one line that is not too long, whatever a file has in it."""
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextlib.contextmanager
def blame(path: str) -> Iterator[None]:
    """Whatever goes wrong while a file is read becomes a ValueError of one line with its path."""
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        raise ValueError(f"{path}: cannot be read: {one_line(error)}") from error


def check_regular(path: str) -> None:
    """ValueError for a folder, and for what may have no end: pipes, devices."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is not a file")


def open_binary(path: str) -> IO[bytes]:
    """A regular file, open for reading."""
    check_regular(path)
    return open(path, "rb")


def open_text(path: str) -> io.TextIOWrapper:
    """A regular text file, open for reading."""
    check_regular(path)
    return open(path, newline="", encoding="utf-8")


def read_array(
    file: IO[bytes] | gzip.GzipFile, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> np.ndarray:
    """The array that is the rest of a file; takes no more memory than that really has."""
    size = math.prod(shape) * dtype.itemsize
    data = bytearray()
    while piece := file.read(min(size + 1 - len(data), 1 << 20)):  # to the end, where checksums are
        data += piece
    if len(data) != size:
        raise ValueError(f"shape {shape} needs {size} bytes, but it has {len(data)} or more")
    array = np.frombuffer(data, dtype).reshape(shape)
    return array.astype(dtype.newbyteorder("="), copy=False)
