"""Feeds the file readers with broken files until one does what it must not do.

    python -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install numpy pillow atheris==3.0.0
    /tmp/fuzz/bin/python .ci/fuzz.py load --runs 400000 [--seed 1] [--out runs/fuzz]

The first argument is the reader: `load`, `idx`, `dataset` or `images`. Atheris makes the files from
valid ones, guided by the lines that they reach; mutators that know the formats repair the
checksums, so that files get past the first check. A file must be read as what it is, or refused
with a ValueError of one line that begins with its path; without a warning, within a second, and
with memory in proportion to its size. Files that break this are kept in --out.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import hashlib
import io
import os
import pathlib
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
import zlib
from typing import Any

import atheris

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
with atheris.instrument_imports(include=["purenn", "training", "zipfile", "gzip", "PIL"]):
    import gzip
    import zipfile

    import numpy as np
    import PIL.Image

    import purenn as nn
    from training.datasets import read_dataset, read_idx
    from training.images import read_image_folders

SLOW = 1.0  # seconds

# --- valid files ---


def npy(array: np.ndarray) -> bytes:
    """A .npy file."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array)
    return file.getvalue()


def npz(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # duplicate names are intended
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue()


def idx(array: np.ndarray, code: int = 8) -> bytes:
    """An IDX file."""
    return struct.pack(f">4B{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.tobytes()


def valid_models() -> list[bytes]:
    """Files that `save` or NumPy writes."""
    path = tempfile.mktemp()
    trees: list[nn.Tree] = [{}, {"a": np.arange(3.0)}]
    trees.append({"net": {"W": np.ones((2, 3), ">f4").T, "key": np.array(5, np.uint64)}})
    trees.append({kind: np.ones(2, kind) for kind in ("?", "i1", "u2", "f2", "i8", "f8")})
    files = []
    for tree in trees:
        nn.save(path, tree)
        files.append(pathlib.Path(path).read_bytes())
    os.remove(path)
    return [*files, npz([("a.npy", npy(np.ones(3)))], zipfile.ZIP_DEFLATED)]


def valid_arrays() -> list[bytes]:
    """IDX files, compressed or not."""
    files = [idx(np.arange(6, dtype=np.uint8).reshape(2, 3)), idx(np.ones(2, ">f8"), 14), b""]
    files += [idx(np.ones((2, 1, 2), ">i2"), 11), idx(np.ones(4, np.uint8).reshape(1, 2, 2, 1))]
    return files + [gzip.compress(file) for file in files] + [gzip.compress(files[0]) * 2]


def valid_datasets() -> list[bytes]:
    """Keras-style archives."""
    files = []
    for shape, kind in (((3, 2, 2), "u1"), ((3, 2, 2, 3), "f8"), ((3, 1, 2, 2), "?")):
        images, labels = np.ones(shape, kind), np.array([[0], [1], [0]])
        parts = {"x_train": images, "y_train": labels, "x_test": images[:2], "y_test": labels[:2]}
        members = [(f"{name}.npy", npy(array)) for name, array in parts.items()]
        files += [npz(members), npz(members, zipfile.ZIP_DEFLATED)]
    return files


def valid_images() -> list[bytes]:
    """Image files in many formats and modes."""
    files = []
    noise = PIL.Image.effect_noise((9, 7), 50)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "EPS", "PCX", "TGA"):
        for mode in ("L", "RGB", "1", "P", "LA", "RGBA", "CMYK", "I;16", "I"):
            file = io.BytesIO()
            with contextlib.suppress(OSError, ValueError):
                noise.convert(mode).save(file, kind)
                files.append(file.getvalue())
    for kind in ("PNG", "GIF", "TIFF", "WEBP"):
        file = io.BytesIO()
        noise.save(file, kind, save_all=True, append_images=[noise.rotate(90)])
        files.append(file.getvalue())
    for packing in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "group4"):
        file = io.BytesIO()
        noise.convert("1" if packing == "group4" else "L").save(file, "TIFF", compression=packing)
        files.append(file.getvalue())
    return files


# --- mutators ---

KINDS = ["<f4", ">f8", "|u1", "|b1", "|O", "<U3", "<c8", "<M8[s]", "|V0", "<f16", "<f3", "|S1000"]
SIZES = [-1, 0, 1, 2, 3, 255, 2**16, 2**31, 2**32 - 1, 2**63, 2**64, 10**30, "True", "1.0", "3L"]
NAMES = ["a", "x_train", "y_test", "a/b", "a//b", "", "/", "..", "a\n", "ä", "a" * 300, "x/" * 120]


def odd_npy(chance: random.Random, content: bytes) -> bytes:
    """A .npy file with a random header."""
    shape = "".join(f"{chance.choice(SIZES)}," for _ in range(chance.choice([0, 1, 1, 2, 3, 4])))
    order = chance.choice(["True", "False", "False", "0"])
    header = (
        f"{{'descr': '{chance.choice(KINDS)}', 'fortran_order': {order}, 'shape': ({shape}), }}"
    )
    if chance.random() < 0.1:
        header = chance.choice("-([{~'\\9L") * chance.choice([99, 9_999, 60_000])
    text = header.encode().ljust(chance.choice([0, 64, 118])) + b"\n"
    start = chance.choice([b"\1\0", b"\1\0", b"\2\0", b"\3\0"])
    length = len(text) if chance.random() < 0.9 else chance.randrange(2**16)
    packed = struct.pack("<H" if start < b"\2" else "<I", length)
    return b"\x93NUMPY" + start + packed + text + content[128:]


def mutate_archive(data: bytes, room: int, chance: random.Random, valid: list[bytes]) -> bytes:
    """A zip file: its members changed before they are packed, or its own bytes changed."""
    if chance.random() < 0.25:
        return atheris.Mutate(data, room)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(m.filename, archive.open(m).read(100_000)) for m in archive.infolist()]
            comment = archive.comment
    except Exception:
        return chance.choice(valid)
    for _ in range(chance.choice([0, 1, 1, 2])):
        at = chance.randrange(len(members) + 1)
        name, content = members[at] if at < len(members) else ("new.npy", npy(np.ones(1)))
        match chance.randrange(5):
            case 0:
                content = odd_npy(chance, content)
            case 1:
                content = atheris.Mutate(content, room)
            case 2:
                name = chance.choice(NAMES) + chance.choice([".npy", ".npy", ".txt", ""])
            case 3:
                content += bytes(chance.choice([1, 1, 1_000, 1_000, 1_000_000]))
        members[at : at + 1] = [(name, content)] * chance.choice([0, 1, 1, 1, 2])
    methods = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    changed = bytearray(npz(members, chance.choices(methods, [50, 45, 4, 1])[0]))
    if comment and chance.random() < 0.5:
        with zipfile.ZipFile(io.BytesIO(changed)) as archive:
            comment = nn._digest(archive)
        changed[-2:] = struct.pack("<H", len(comment)) + comment
    for _ in range(chance.choice([0, 0, 1, 1, 2])):  # wrong numbers in the headers
        starts = [match.start() for match in re.finditer(b"PK", changed)] or [0]
        at = chance.choice(starts) + chance.randrange(46)
        if at + 4 <= len(changed):
            number = chance.choice([0, 1, 2**16 - 1, 2**31, 2**32 - 1, chance.randrange(2**32)])
            struct.pack_into("<I", changed, at, number)
    return bytes(chance.choice([0, 0, 0, 9, 5_000])) + bytes(changed)


def mutate_idx(data: bytes, room: int, chance: random.Random, valid: list[bytes]) -> bytes:
    """An IDX file: changed before it is compressed, or after."""
    if not data or chance.random() < 0.1:
        return chance.choice(valid)
    if data[:2] != b"\x1f\x8b":
        data = atheris.Mutate(data, room)
        if chance.random() < 0.2:
            data = b"\0\0" + data[2:]
        return gzip.compress(data, 1, mtime=0) if chance.random() < 0.3 else data
    if chance.random() < 0.3:
        return atheris.Mutate(data, room)
    unpacker, parts = zlib.decompressobj(31), []
    with contextlib.suppress(zlib.error):
        parts.append(unpacker.decompress(data, 10_000_000))
    content = atheris.Mutate((parts or [b""])[0][:room], room)
    content += bytes(chance.choice([0, 0, 0, 0, 0, 0, 1_000, 1_100_000]))
    if chance.random() < 0.3 and len(content) >= 8:  # the header's size is right
        content = content[:2] + b"\x08\1" + struct.pack(">I", len(content) - 8) + content[8:]
    packed = gzip.compress(content, 1, mtime=0)
    return packed * chance.choice([1, 1, 1, 2, 300]) + bytes(chance.choice([0, 0, 99]))


def mutate_image(data: bytes, room: int, chance: random.Random, valid: list[bytes]) -> bytes:
    """An image; if it is a PNG, with correct checksums and sometimes with other sizes."""
    if chance.random() < 0.05:
        return chance.choice(valid)
    data = atheris.Mutate(data, room)
    if data[:4] != b"\x89PNG" or chance.random() < 0.1:
        return data
    changed, at = bytearray(data), 8
    while at + 12 <= len(changed):
        length, kind = struct.unpack_from(">I4s", changed, at)
        if at + 12 + length > len(changed):
            break
        if kind == b"IHDR" and length >= 8 and chance.random() < 0.1:
            struct.pack_into(">I", changed, at + chance.choice([8, 12]), 1 << chance.randrange(32))
        crc = zlib.crc32(changed[at + 4 : at + 8 + length])
        struct.pack_into(">I", changed, at + 8 + length, crc)
        at += 12 + length
    return bytes(changed)


# --- what must hold ---

# {target: (reader, valid files, mutator, file name, memory: times the file's size, and bytes more)}
TARGETS: dict[str, tuple[Any, Any, Any, str, int, int]] = {
    "load": (nn.load, valid_models, mutate_archive, "model.npz", 20, 2_000_000),
    "idx": (read_idx, valid_arrays, mutate_idx, "file-idx", 400, 3_000_000),
    "dataset": (read_dataset, valid_datasets, mutate_archive, "data.npz", 1000, 2_000_000),
    "images": (
        lambda path: read_image_folders(os.path.dirname(os.path.dirname(path)), None),
        *(valid_images, mutate_image, "class/image.png", 1_000, 30_000_000),
    ),
}


class Fuzzer:
    """Has one file after the other read, and keeps those that reveal a problem."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.read, valid, self.mutator, name, *self.memory = TARGETS[options.target]
        self.options, self.files = options, valid()
        self.folder = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        self.path = os.path.join(self.folder, name)
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        self.counts = {"files": 0, "read": 0, "refused": 0}
        self.slowest = self.largest = 0.0
        self.found: dict[str, int] = {}
        self.warned: list[str] = []
        self.started = time.monotonic()
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: self.warned.append(repr(message))

    def mutate(self, data: bytes, room: int, seed: int) -> bytes:
        """The next file, when libFuzzer asks for one."""
        return self.mutator(data, room, random.Random(seed), self.files)[:room]

    def try_one(self, data: bytes) -> None:
        """Have one file read."""
        with open(self.path, "wb") as file:
            file.write(data)
        self.counts["files"] += 1
        self.warned.clear()
        measured = self.counts["files"] % 50 == 0
        if measured:
            tracemalloc.start()
        problem, seconds = self.find_problem(data), self.seconds
        if measured:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            limit = self.memory[0] * len(data) + self.memory[1]
            self.largest = max(self.largest, peak / limit)
            if peak > limit:
                problem = f"{peak} bytes of memory for {len(data)} in the file"
        else:
            for _ in range(3):  # another process may have slowed it down
                if seconds > SLOW:
                    self.find_problem(data)
                    seconds = min(seconds, self.seconds)
            self.slowest = max(self.slowest, seconds)
            if seconds > SLOW:
                problem = "too slow"
        if problem or self.warned:
            self.keep(problem or f"warns {self.warned[0]}", data)

    def find_problem(self, data: bytes) -> str:
        """What is wrong with the result, "" if nothing is."""
        started = time.perf_counter()
        try:
            result = self.read(self.path)
        except ValueError as error:
            self.seconds = time.perf_counter() - started
            self.counts["refused"] += 1
            text = str(error)
            where = self.path if self.options.target != "images" else self.folder
            if not text.startswith(where) or "\n" in text or "MemoryError" in text:
                return f"says {text[:100]!r}"
            return "" if len(text) < 600 else f"says {len(text)} characters"
        except Exception as error:
            self.seconds = time.perf_counter() - started
            frame = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__} from {frame.name} in {frame.filename}"
        self.seconds = time.perf_counter() - started
        self.counts["read"] += 1
        leaves = [result] if isinstance(result, np.ndarray) else nn.tree_flatten(result).values()
        if not all(type(x) is np.ndarray and x.dtype.kind in "biufU" for x in leaves):
            return "returns something other than arrays of numbers"
        if sum(x.nbytes for x in leaves) > self.memory[0] * len(data) + self.memory[1]:
            return "returns more than the file can hold"
        compared = self.options.target == "load" and self.counts["files"] % 4 == 0
        return self.compare_with_numpy(result) if compared else ""

    def compare_with_numpy(self, tree: nn.Tree) -> str:
        """What NumPy reads differently, "" if nothing."""
        try:
            with open(self.path, "rb") as file:
                archive = np.lib.npyio.NpzFile(file, allow_pickle=False)
                arrays = {name: archive[name] for name in archive.files}
        except Exception as error:
            return f"NumPy does not read it: {type(error).__name__}"
        finally:
            self.warned.clear()
        flat = nn.tree_flatten(tree)
        same = flat.keys() == arrays.keys() and all(
            (x.shape, x.dtype) == (arrays[name].shape, arrays[name].dtype.newbyteorder("="))
            and x.tobytes() == arrays[name].astype(x.dtype).tobytes()
            for name, x in flat.items()
        )
        return "" if same else "NumPy reads other arrays"

    def keep(self, problem: str, data: bytes) -> None:
        """Count a finding, and save the first file of each kind."""
        kind = re.sub(r"\d+", "N", problem.replace(self.folder, ""))
        self.found[kind] = self.found.get(kind, 0) + 1
        if self.found[kind] == 1:
            self.options.out.mkdir(parents=True, exist_ok=True)
            name = f"{self.options.target}-{hashlib.sha256(data).hexdigest()[:12]}"
            (self.options.out / name).write_bytes(data)
            print(f"FOUND ({name}): {problem}", flush=True)

    def report(self) -> None:
        """Print the counts, at the end."""
        shutil.rmtree(self.folder)
        seconds = time.monotonic() - self.started
        print(
            f"{self.options.target}: {self.counts}, {self.counts['files'] / seconds:.0f}/s,"
            f" slowest {self.slowest:.2f} s, {self.largest:.0%} of the memory; {self.found}",
            flush=True,
        )


def main() -> None:
    """Read the command line and fuzz."""
    parser = argparse.ArgumentParser(
        description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs", "fuzz"))
    options = parser.parse_args()
    fuzzer = Fuzzer(options)
    atexit.register(fuzzer.report)
    corpus = os.path.join(fuzzer.folder, ".corpus")
    os.mkdir(corpus)
    for number, file in enumerate(fuzzer.files):
        pathlib.Path(corpus, str(number)).write_bytes(file)
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    flags = [f"-atheris_runs={options.runs}", f"-seed={options.seed}", "-max_len=8192"]
    flags += ["-timeout=60", "-print_final_stats=0", "-verbosity=0", "-len_control=0"]
    atheris.Setup([sys.argv[0], *flags, corpus], fuzzer.try_one, custom_mutator=fuzzer.mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
