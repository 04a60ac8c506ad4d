"""The download of MNIST: verified, from the first of several mirrors that answers."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import math
import os
import queue
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import purenn as nn
from training.files import as_path, open_binary

MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    "https://storage.googleapis.com/cvdf-datasets/mnist",
    "http://yann.lecun.com/exdb/mnist",
)

MNIST_FILES = {  # name: bytes and SHA-256 of the unpacked file; the smallest first
    "t10k-labels-idx1-ubyte.gz": (
        10_008,
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "train-labels-idx1-ubyte.gz": (
        60_008,
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "t10k-images-idx3-ubyte.gz": (
        7_840_016,
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "train-images-idx3-ubyte.gz": (
        47_040_016,
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
}

Progress = Callable[[str, int, int], None]  # name of the file, bytes so far, bytes in all (or 0)
Answers = queue.SimpleQueue[tuple[str, Exception | None]]


def verify(name: str, packed: bytes) -> None:
    """ValueError unless these are the bytes of that file of MNIST."""
    size, digest = MNIST_FILES[name]
    unpacker = zlib.decompressobj(wbits=31)
    try:
        unpacked = unpacker.decompress(packed, size + 1)
    except zlib.error as error:
        raise ValueError(f"{name} is damaged: {error}") from None
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError(f"{name} is cut off or too long")
    if hashlib.sha256(unpacked).hexdigest() != digest:
        raise ValueError(f"{name} has the wrong SHA-256")


def is_whole(directory: str, name: str) -> bool:
    """Whether that file of MNIST is in the folder, with the right bytes."""
    path = os.path.join(directory, name)
    with contextlib.suppress(OSError, ValueError), open_binary(path) as file:
        verify(name, file.read())
        return True
    return False


def fetch(mirror: str, name: str, timeout: float, progress: Progress | None = None) -> bytes:
    """The verified bytes of one file. OSError or ValueError if that fails."""
    packed = bytearray()
    deadline = time.monotonic() + 30 * timeout  # however slowly the bytes may trickle in
    try:
        with urllib.request.urlopen(f"{mirror}/{name}", timeout=timeout) as response:
            total = int(response.headers.get("Content-Length") or 0)
            while chunk := response.read1(1 << 16):
                packed += chunk
                if len(packed) > MNIST_FILES[name][0] + 1024 or time.monotonic() > deadline:
                    raise OSError(f"{mirror}: {name} is too long or comes too slowly")
                if progress:
                    progress(name, len(packed), total)
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        raise
    except http.client.HTTPException as error:
        raise OSError(f"{mirror}: {name} broke off: {error!r}") from error
    verify(name, bytes(packed))
    return bytes(packed)


def ask(mirror: str, *, patience: float, answers: Answers) -> None:
    """Fetch the smallest file from a mirror, and answer (mirror, what went wrong or None)."""
    try:
        fetch(mirror, next(iter(MNIST_FILES)), patience)
    except Exception as error:
        answers.put((mirror, error))
    else:
        answers.put((mirror, None))


def first_to_answer(mirrors: Sequence[str], patience: float) -> str:
    """The mirror that is first to give the smallest file; OSError if none does in time.

    They are all asked at once and in threads, because no time-out covers looking up a name.
    """
    answers: Answers = queue.SimpleQueue()
    function = partial(ask, patience=patience, answers=answers)
    for mirror in mirrors:
        threading.Thread(target=function, args=(mirror,), daemon=True).start()
    deadline = time.monotonic() + patience
    reason: Exception | str = "all timed out"
    with contextlib.suppress(queue.Empty):
        for _ in mirrors:
            mirror, error = answers.get(timeout=max(deadline - time.monotonic(), 0.001))
            if error is None:
                return mirror
            reason = error
    raise OSError(f"none of {len(mirrors)} mirrors answered within {patience:g} s: {reason}")


def fetch_from_any(
    mirrors: Sequence[str], name: str, timeout: float, progress: Progress | None
) -> bytes:
    """The verified bytes of one file from the first mirror that gives them, or OSError."""
    problems = []
    for mirror in mirrors:
        try:
            return fetch(mirror, name, timeout, progress)
        except (OSError, ValueError) as error:
            problems.append(f"{mirror}: {error}")
    raise OSError(f"no mirror gives {name}: {'; '.join(problems)}")


def check_seconds(name: str, value: Any) -> None:
    """Refuse what is not a positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"download_mnist: {name} must be a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"download_mnist: {name} must be > 0, got {value}")


def download_mnist(
    directory: str | os.PathLike[str],
    mirrors: Sequence[str] = MNIST_MIRRORS,
    patience: float = 2.0,
    timeout: float = 10.0,
    progress: Progress | None = None,
) -> None:
    """Put the four files of MNIST into `directory`, from the first of the mirrors that has them.

    What is there already and has the right SHA-256 is kept; if that is all, nobody is asked.
    OSError if no mirror answers within `patience` seconds, or if none gives the right bytes (a
    mirror may be silent for `timeout` seconds): then nothing half-written is left.
    """
    directory = as_path("download_mnist", directory)
    if not isinstance(mirrors, (tuple, list)) or not all(isinstance(m, str) for m in mirrors):
        raise TypeError("download_mnist: mirrors must be a sequence of addresses")
    check_seconds("patience", patience)
    check_seconds("timeout", timeout)
    if progress is not None and not callable(progress):
        kind = type(progress).__name__
        raise TypeError(f"download_mnist: progress must be a function, got {kind}")
    missing = [name for name in MNIST_FILES if not is_whole(directory, name)]
    if not missing:
        return
    first = first_to_answer(mirrors, patience)
    others = [mirror for mirror in mirrors if mirror != first]
    os.makedirs(directory, exist_ok=True)
    for name in missing:
        packed = fetch_from_any([first, *others], name, timeout, progress)
        with nn.replacing(os.path.join(directory, name)) as file:
            file.write(packed)
