"""Feeds the readers with broken files until one does what it must not do.

    python -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install numpy pillow atheris==3.0.0
    /tmp/fuzz/bin/python .ci/fuzz.py load --runs 400000 [--seed 1] [--out runs/fuzz]

The first argument is the reader, one of TARGETS below. Atheris makes the files from valid ones,
guided by the lines that they reach; mutators that know the formats repair the checksums, so that
files get past the first check. A file must be read as what it is, or refused with a ValueError of
one line that begins with its path; without a warning, within a second, and with memory in
proportion to its size. Files that break this are kept in --out.

What `torch` reads is not a file: the bytes choose a network and what is wrong with its state.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import functools
import hashlib
import io
import json
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
import warnings
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import atheris

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
SOURCES = ["purenn", "training", "train_mlp", "train_cnn", "json", "zipfile", "gzip", "PIL"]
with atheris.instrument_imports(include=SOURCES):
    import gzip
    import zipfile

    import numpy as np
    import PIL.Image

    import purenn as nn
    import train_cnn
    import train_mlp
    from training import checkpoints, loop, run
    from training.choices import choose_optimizer
    from training.classification import Model, classify, classify_file, load_model
    from training.datasets import read_dataset, read_idx
    from training.files import blame
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
    trees.append({"net": {"W": np.ones((2, 3), ">f4").T, "k": np.array(5, np.uint64)}})
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
    for shape, kind in (
        ((3, 2, 2), "u1"),
        ((3, 2, 2, 3), "f8"),
        ((3, 1, 2, 2), "?"),
        ((3, 4), "f4"),
    ):
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


def valid_stacks() -> list[bytes]:
    """Archives with one array of images."""
    shapes = [(3, 8, 6), (2, 9, 7, 3), (1, 4, 4, 4), (300, 1, 2, 2), (2, 3, 8, 6), (1, 1, 1, 3_000)]
    shapes += [(4, 5), (600, 5)]
    return [
        npz([("x.npy", npy(np.ones(shape, kind)))]) for shape in shapes for kind in ("u1", "f8")
    ]


# --- valid runs ---

SCRIPTS: dict[str, tuple[Any, Any, Any]] = {
    "mlp": (train_mlp.main, train_mlp.MLPOptions, train_mlp.build_mlp),
    "cnn": (train_cnn.main, train_cnn.CNNOptions, train_cnn.build_cnn),
    "features": (train_mlp.main, train_mlp.MLPOptions, train_mlp.build_mlp),
}
CHOSEN = {"mlp": ["--augment", "shift=1"], "cnn": ["--channels", "2", "--kernel", "3"]}
TRAINED = tempfile.mkdtemp()  # here, in a folder for each script
atexit.register(shutil.rmtree, TRAINED)


@functools.cache
def trained(script: str) -> dict[str, bytes]:
    """{name: content} of the files in the folder of a run."""
    folder, data = os.path.join(TRAINED, script), os.path.join(TRAINED, f"{script}.npz")
    labels, images = np.arange(10) % 2, np.arange(480, dtype=np.uint8).reshape(10, 6, 8)
    x: Any = np.random.default_rng(0).random((10, 5)) if script == "features" else images
    np.savez(data, x_train=x, y_train=labels, x_test=x[:2], y_test=labels[:2])
    arguments = ["--data", data, "--epochs", "1", "--hidden", "3", "--out", folder]
    with contextlib.redirect_stdout(io.StringIO()):
        assert SCRIPTS[script][0]([*arguments, *CHOSEN.get(script, [])]) == 0
    return {name: pathlib.Path(folder, name).read_bytes() for name in checkpoints.OUTPUTS}


def valid_outputs(name: str) -> list[bytes]:
    """That file in the folder of each run."""
    return [trained(script)[name] for script in SCRIPTS]


def probabilities(found: list[tuple[Any, ...]]) -> np.ndarray:
    """Those of --predict, which are some."""
    numbers = np.array([found[-1] for found in found])
    assert len(numbers)
    assert ((numbers >= 0) & (numbers <= 1)).all()
    return numbers


@functools.cache
def trained_model(script: str) -> Model:
    """The network of a run: for gray images of 6 x 8, or for five features."""
    trained(script)
    return load_model(os.path.join(TRAINED, script), *SCRIPTS[script][1:])


def read_predicted(path: str) -> np.ndarray:
    """What --predict says of a file."""
    script = "cnn" if os.path.getsize(path) % 4 else "features"
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        found = list(classify_file(trained_model(script), path))
    assert not errors.getvalue()
    return probabilities(found)


def read_run_folder(path: str) -> np.ndarray:
    """What --predict, --compare and --resume make of a run.json."""
    folder, content = os.path.dirname(path), pathlib.Path(path).read_bytes()
    script = "features" if b'"feature_mean": [' in content else "mlp"
    script = "cnn" if b'"--kernel"' in content else script
    pathlib.Path(folder, "model.npz").write_bytes(trained(script)["model.npz"])
    about = checkpoints.read_run(folder)
    run.name_runs([about, about._replace(script="another")])
    if len(content) % 2:
        checkpoints.check_same_run(folder, checkpoints.read_run(os.path.join(TRAINED, script)))
    model = load_model(folder, *SCRIPTS[script][1:])
    shape = (1, 1, 4, 5) if len(model.sample_shape) == 3 else (1, 5)
    with blame(path):
        found = classify(model, np.ones(shape, np.float32))
    return probabilities(found)


def read_metrics(path: str) -> dict[str, np.ndarray]:
    """What --compare reads of a metrics.csv."""
    rows = checkpoints.read_metrics(os.path.dirname(path))
    return {str(number): np.array(list(row.values())) for number, row in enumerate(rows)}


@functools.cache
def experiment_in(folder: str) -> loop.Experiment:
    """That of which `trained` has a checkpoint."""
    data, augment = os.path.join(TRAINED, "mlp.npz"), (("shift", 1.0),)
    options = train_mlp.MLPOptions(data=data, epochs=1, hidden=(3,), augment=augment, out=folder)
    return run.set_up(options, train_mlp.build_mlp)[0]


def read_checkpoint(path: str) -> nn.Tree:
    """What --resume goes on from, after one step more."""
    trained("mlp")
    experiment = experiment_in(os.path.dirname(path))
    optimizer = choose_optimizer(experiment.options, 1)
    first = loop.begin(experiment, optimizer, loop.first_params(experiment))
    with contextlib.redirect_stdout(io.StringIO()), np.errstate(all="ignore"):
        progress = checkpoints.read_checkpoint(experiment, first)
        with contextlib.suppress(ValueError):  # numbers that are not finite
            loop.take_step(experiment, optimizer, progress, np.arange(4))
    return progress._asdict()


# --- states of PyTorch ---


@functools.cache
def networks() -> list[tuple[nn.Layer, dict[str, np.ndarray]]]:
    """(network, its state) of every layer that PyTorch has, and of some together."""
    block = nn.residual(nn.sequential(a=nn.linear(4), b=nn.batch_norm()), nn.linear(4, bias=False))
    small = nn.sequential(nn.conv2d(4, 3, groups=2, bias=False), nn.batch_norm(), nn.flatten())
    pairs: list[tuple[nn.Layer, Any]] = [
        (nn.linear(3), (4,)),
        (nn.conv1d(4, 2, groups=2), (4, 5)),
        (nn.conv2d(6, 3, stride=2, padding=1), (2, 5, 5)),
        (nn.conv2d_transpose(4, (3, 2), groups=2), (2, 3, 3)),
        (nn.layer_norm(), (5,)),
        (nn.group_norm(2), (4, 3, 3)),
        (nn.embedding(7, 3), (5,)),
        (nn.rnn(2), (4, 3)),
        (nn.gru(2), (4, 3)),
        (nn.lstm(2), (4, 3)),
        (nn.attention(2), (4, 6)),
        (nn.sequential(small, nn.linear(3), nn.relu()), (4, 4, 4)),
        (nn.sequential(block=block, out=nn.heads(x=nn.linear(1), y=nn.tanh())), (3,)),
        (nn.sequential(nn.embedding(5, 4), nn.attention(1), nn.gru(3), nn.last()), (6,)),
        (nn.relu(), (3,)),
    ]
    return [(net, nn.to_torch(net, net.init(1, shape)[0])) for net, shape in pairs]


def changed_array(choose: Any, array: Any) -> Any:
    """What an array of a state may be by mistake, or by malice."""
    one = np.float32(choose.PickValueInList([0.0, 1.0, -1.0, 3e38, np.nan, np.inf]))
    sizes = [0, 1, 2, 3, 4, 6, 7, 12, 1_000, 2**20, 2**40]
    shape = [choose.PickValueInList(sizes) for _ in range(choose.ConsumeIntInRange(0, 4))]
    kind = choose.PickValueInList(
        ["f2", "f4", "f8", ">f4", ">f8", "g", "c8", "i8", "?", "O", "U3", "S2", "V4", "f4,i4"]
    )
    others = [None, 1.0, "x", b"x", [[1.0]], {}, one, np.array(one), memoryview(b"ab"), 10**400]
    if not small(array):
        return choose.PickValueInList(others)
    changes: list[Callable[[], Any]] = [
        lambda: choose.PickValueInList(others),
        lambda: np.broadcast_to(one, shape),
        lambda: np.full(array.shape, one),
        lambda: array.astype(kind.replace("c8", "f8")),
        lambda: np.zeros(array.shape, kind),
        lambda: array[::-1],
        lambda: array.T,
        lambda: array[None],
        lambda: array[..., :1],
        lambda: array[:0],
        lambda: np.repeat(array, choose.PickValueInList([2, 3]), choose.PickValueInList([0, -1])),
        lambda: np.asfortranarray(array),
        lambda: np.ma.array(array),
        lambda: array.tolist(),
        lambda: array.tobytes(),
        lambda: np.lib.stride_tricks.as_strided(array, array.shape, [0] * array.ndim),
    ]
    try:
        with np.errstate(all="ignore"):
            return choose.PickValueInList(changes)()
    except (ValueError, TypeError, IndexError, MemoryError):  # NumPy has no such array
        return array


def odd_state(choose: Any) -> tuple[nn.Layer, Any]:
    """(network, a state of its own that may be changed)."""
    net, state = choose.PickValueInList(networks())
    state = dict(state)
    for _ in range(choose.ConsumeIntInRange(0, 3)):
        name = choose.PickValueInList(
            [*state, *NAMES[:8], 1, None, b"weight", ("weight",), "weight"]
        )
        match choose.ConsumeIntInRange(0, 5):
            case 0:
                state.pop(name, None)
            case 1:
                state[choose.PickValueInList([*state, *NAMES[:8], 0, "bias"])] = state.pop(
                    name, None
                )
            case 2:
                state = choose.PickValueInList([state, state, state, dict(reversed(state.items()))])
            case _:
                state[name] = changed_array(choose, state.get(name, np.ones((4, 3), np.float32)))
    return net, state if choose.ConsumeIntInRange(0, 99) else list(state.items())


def read_state(path: str) -> nn.Tree:
    """The params from an odd state; the error's sentence is made to begin with the path."""
    net, state = odd_state(atheris.FuzzedDataProvider(pathlib.Path(path).read_bytes()))
    frozen = [x.tobytes() for x in state.values() if small(x)] if isinstance(state, dict) else []
    try:
        params = nn.from_torch(net, state)
    except (ValueError, TypeError) as error:
        kind, text = type(error), str(error)
        assert kind in (ValueError, TypeError)
        assert text.startswith("from_torch: ")
        raise ValueError(f"{path}: {text}") from None
    except MemoryError:
        claimed = sum(x.nbytes for x in state.values() if isinstance(x, np.ndarray))
        assert claimed >= 2**30, "no memory for a small state"
        raise ValueError(f"{path}: so large an array") from None
    assert frozen == [x.tobytes() for x in state.values() if small(x)], "writes to the state"
    back = nn.to_torch(net, params)
    for name, array in state.items():
        if not name.endswith(("tracked", "bias_ih_l0", "bias_hh_l0")):
            assert array.shape == back[name].shape
            assert np.array_equal(array, back[name], equal_nan=True), f"another {name}"
    return params


def small(x: Any) -> bool:
    """Whether this is an array in which every byte can be looked at."""
    return isinstance(x, np.ndarray) and x.size < 10_000 and not x.dtype.hasobject


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


TEXTS = ["", "x", "shift=1", "--seed", "a\nb", "\ud800", "$x^", "1e400", "nan", "-1", "9" * 5_000]
NUMBERS = [-1, 0, 1, 2, 3, 10**4, 10**6, 10**9, 2**31, 2**63, 2**64, 10**30, 10**400]
DEEP = json.loads("[" * 900 + "]" * 900)
ODD = [
    DEEP,
    None,
    True,
    False,
    0.5,
    -1.5,
    1e308,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    [[1]],
    {"": 1},
]


def odd_value(chance: random.Random, value: Any) -> Any:
    """A part of JSON with one change in it, anywhere."""
    entries: list[Any] = list(value) if isinstance(value, dict) else []
    entries = list(range(len(value))) if isinstance(value, list) else entries
    if not entries or chance.random() < 0.1:
        several = [chance.choice(NUMBERS) for _ in range(chance.choice([1, 2, 3, 3, 1_000]))]
        return chance.choice([*TEXTS, *NUMBERS, *ODD, several, [value] * 3, [value], str(value)])
    at = chance.choice(entries)
    new, copy = odd_value(chance, value[at]), value.copy()
    match chance.randrange(8):
        case 0:
            del copy[at]
        case 1 if isinstance(copy, dict):
            copy[chance.choice([*entries, *TEXTS])] = copy.pop(at)
        case _:
            copy[at] = new
    return copy


def mutate_json(data: bytes, room: int, chance: random.Random, valid: list[bytes]) -> bytes:
    """A JSON file with other values, or other bytes."""
    if chance.random() < 0.2:
        return atheris.Mutate(data, room)
    try:
        value = json.loads(data if chance.random() < 0.8 else chance.choice(valid))
        for _ in range(chance.choice([1, 1, 1, 2, 3])):
            value = odd_value(chance, value)
        text = json.dumps(value, indent=chance.choice([None, 1]))
    except (ValueError, RecursionError):
        return chance.choice(valid)
    if chance.random() < 0.02:
        text = chance.choice(["[", '{"a":', "-", "1"]) * chance.choice([99, 9_999]) + text
    return text.encode()


def mutate_bytes(data: bytes, room: int, chance: random.Random, valid: list[bytes]) -> bytes:
    """Other bytes."""
    if chance.random() < 0.2:
        return chance.randbytes(chance.randrange(1, 64))
    return atheris.Mutate(data if chance.random() < 0.95 else chance.choice(valid), room)


# --- what must hold ---


def resident_memory(which: str, *, anew: bool = False) -> int:
    """VmRSS or, at its peak, VmHWM of this process in bytes (of Linux); `anew`: a new peak begins.

    Zeros that nobody has written to are not counted, which is what tracemalloc does.
    """
    if anew:
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{which}:")[2].split()[0])


class Target(NamedTuple):
    """A reader, and what it is fed with."""

    read: Callable[[str], Any]
    valid: Callable[[], list[bytes]]
    mutator: Callable[[bytes, int, random.Random, list[bytes]], bytes]
    name: str  # of the file; where a folder is in it, that folder may be what an error names
    times: int  # the memory that it may take: so many times the size of the file
    more: int  # and so many bytes


TARGETS = {
    "load": Target(nn.load, valid_models, mutate_archive, "model.npz", 20, 2_000_000),
    "idx": Target(read_idx, valid_arrays, mutate_idx, "file-idx", 400, 3_000_000),
    "dataset": Target(read_dataset, valid_datasets, mutate_archive, "data.npz", 1000, 2_000_000),
    "images": Target(
        lambda path: read_image_folders(os.path.dirname(os.path.dirname(path)), None),
        *(valid_images, mutate_image, "class/image.png", 1_000, 30_000_000),
    ),
    "run": Target(
        read_run_folder,
        *(functools.partial(valid_outputs, "run.json"), mutate_json, "run/run.json"),
        *(1_000, 300_000_000),  # a network of MOST_NUMBERS
    ),
    "metrics": Target(
        read_metrics,
        *(functools.partial(valid_outputs, "metrics.csv"), mutate_bytes, "run/metrics.csv"),
        *(400, 2_000_000),
    ),
    "checkpoint": Target(
        read_checkpoint,
        *(lambda: [trained("mlp")["checkpoint.npz"]], mutate_archive, "run/checkpoint.npz"),
        *(100, 5_000_000),
    ),
    "predict": Target(read_predicted, valid_images, mutate_image, "image.png", 1_000, 60_000_000),
    "predict-npz": Target(
        read_predicted, valid_stacks, mutate_archive, "images.npz", 2_000, 20_000_000
    ),
    "predict-idx": Target(
        read_predicted, valid_arrays, mutate_idx, "images-idx3-ubyte", 2_000, 20_000_000
    ),
    "torch": Target(
        read_state, lambda: [bytes(9), bytes(range(40))], mutate_bytes, "state", 0, 200_000_000
    ),
}


class Fuzzer:
    """Has one file after the other read, and keeps those that reveal a problem."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.target = TARGETS[options.target]
        self.options, self.files = options, self.target.valid()
        self.folder = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        self.path = os.path.join(self.folder, self.target.name)
        self.where = self.folder if "/" in self.target.name else self.path
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
        return self.target.mutator(data, room, random.Random(seed), self.files)[:room]

    def try_one(self, data: bytes) -> None:
        """Have one file read."""
        with open(self.path, "wb") as file:
            file.write(data)
        self.counts["files"] += 1
        self.warned.clear()
        measured = self.counts["files"] % 10 == 0
        before = resident_memory("VmRSS", anew=True) if measured else 0
        problem, seconds = self.find_problem(data), self.seconds
        if measured:
            peak = resident_memory("VmHWM") - before
            limit = self.limit(data)
            self.largest = max(self.largest, peak / limit)
            if peak > limit:
                problem = f"{peak} bytes of memory for {len(data)} in the file"
        for _ in range(3):  # another process may have slowed it down
            if seconds > SLOW:
                self.find_problem(data)
                seconds = min(seconds, self.seconds)
        self.slowest = max(self.slowest, seconds)
        if seconds > SLOW:
            problem = "too slow"
        if problem or self.warned:
            self.keep(problem or f"warns {self.warned[0]}", data)

    def limit(self, data: bytes) -> int:
        """How much memory a file may take."""
        return self.target.times * len(data) + self.target.more

    def find_problem(self, data: bytes) -> str:
        """What is wrong with the result, "" if nothing is."""
        started = time.perf_counter()
        try:
            result = self.target.read(self.path)
        except ValueError as error:
            self.seconds = time.perf_counter() - started
            self.counts["refused"] += 1
            text = str(error)
            if not text.startswith(self.where) or "\n" in text or "MemoryError" in text:
                return f"says {text[:100]!r}"
            return "" if len(text) < 600 else f"says {len(text)} characters"
        except Exception as error:
            self.seconds = time.perf_counter() - started
            frame = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__} from {frame.name} in {frame.filename}"
        self.seconds = time.perf_counter() - started
        self.counts["read"] += 1
        leaves = [result] if isinstance(result, np.ndarray) else nn.tree_flatten(result).values()
        if not all(
            type(x) is np.ndarray and x.dtype.kind in "biufU" and x.dtype.isnative for x in leaves
        ):
            return "returns something other than arrays of numbers"
        if sum(x.nbytes for x in leaves) > self.limit(data):
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
    longest = max(map(len, fuzzer.files))
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    flags = [
        f"-atheris_runs={options.runs}",
        f"-seed={options.seed}",
        f"-max_len={max(8_192, 2 * longest)}",
    ]
    flags += ["-timeout=60", "-print_final_stats=0", "-verbosity=0", "-len_control=0"]
    atheris.Setup([sys.argv[0], *flags, corpus], fuzzer.try_one, custom_mutator=fuzzer.mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
