"""Data sets: IDX files, archives, synthetic ones, and how they are split."""

import gzip
import io
import math
import os
import re
import struct
import zipfile
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training import datasets
from training.datasets import read_dataset, read_idx
from training.tests.conftest import (
    IDX_CODES,
    all_bytes,
    damaged,
    idx,
    outcome,
    peak_memory,
    refusal,
    refusal_in_time,
)

# --- IDX files ---

PACKED = {"plain": bytes, "gzip": gzip.compress}
SIX = np.arange(6, dtype=np.uint8).reshape(2, 3)
BAD_IDX = {  # content: what is said of it
    idx(SIX)[:-1]: "shape (2, 3) needs 6 bytes, but it has 5 or more",
    idx(SIX) + b"x": "shape (2, 3) needs 6 bytes, but it has 7 or more",
    gzip.compress(idx(SIX)[:-2]): "shape (2, 3) needs 6 bytes, but it has 4 or more",
    **dict.fromkeys(
        (b"\1\0\x08\1", b"\0\1\x08\1", b"\0\0\x0a\1", b"\0\0\x08", b"", b"\xff\xd8\xff\xe0"),
        "it does not start as an IDX file does",
    ),
    b"\0\0\x08\3" + bytes(8): "an array of shape (0, 0) does not fit in it",  # sizes of two alone
    b"\0\0\x08\3" + bytes(9): "",  # ... and a bit
}


@given(
    shape=st.lists(st.integers(0, 4), max_size=4).map(tuple),
    kind=st.sampled_from(list(IDX_CODES)),
    pack=st.sampled_from(list(PACKED.values())),
)
def test_idx_files_of_all_kinds_are_read(tmp_path_factory, shape, kind, pack):
    path = tmp_path_factory.mktemp("idx") / "file"
    array = np.asarray(np.random.default_rng(0).integers(0, 100, shape)).astype(kind)
    path.write_bytes(pack(idx(array)))
    read = read_idx(path)
    assert (read.dtype, read.shape) == (np.dtype(kind).newbyteorder("="), shape)
    np.testing.assert_array_equal(read, array)
    assert read.flags.writeable


@settings(max_examples=200)
@given(
    code=st.sampled_from([7, *IDX_CODES.values()]),
    axes=st.integers(0, 3) | st.just(255),
    sizes=st.lists(st.integers(0, 4) | st.sampled_from([2**16, 2**31, 2**32 - 1]), max_size=4),
    content=st.binary(max_size=40),
    pack=st.sampled_from(list(PACKED.values())),
)
def test_an_idx_file_holds_what_it_says_or_is_refused(
    tmp_path_factory, code, axes, sizes, content, pack
):
    path = tmp_path_factory.mktemp("idx") / "x"
    whole = struct.pack(f">4B{len(sizes)}I", 0, 0, code, axes, *sizes) + content
    path.write_bytes(pack(whole))
    read, message = outcome(read_idx, path)
    if message:
        return
    kind = next(kind for kind, number in IDX_CODES.items() if number == code)
    assert read.dtype == np.dtype(kind).newbyteorder("=")
    header = struct.pack(f">4B{axes}I", 0, 0, code, axes, *read.shape)
    assert header + read.astype(kind).tobytes() == whole


@pytest.mark.parametrize("content", BAD_IDX)
def test_read_idx_says_what_is_wrong(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    assert refusal(read_idx, tmp_path / "x").startswith(f"cannot be read: {BAD_IDX[content]}")


@pytest.mark.parametrize("pack", PACKED.values())
def test_a_damaged_idx_file_is_refused_or_right(tmp_path, pack):
    path, whole, accepted = tmp_path / "x", pack(idx(SIX)), 0
    for content in damaged(whole):
        path.write_bytes(content)
        read, message = outcome(read_idx, path)
        if message:
            continue
        assert len(content) == len(whole)
        if pack is gzip.compress:  # a plain file has no checksum
            np.testing.assert_array_equal(read, SIX)
            accepted += 1
    assert accepted < 100  # time, system and flags of gzip's header are ignored


@pytest.mark.parametrize(
    ("pack", "content", "limit"),
    [
        (bytes, b"12", 10),
        (partial(gzip.compress, mtime=0), b"12", 1 << 20),
        (partial(gzip.compress, compresslevel=0, mtime=0), bytes(9_969), 200 * 10_000),
    ],
)
def test_read_idx_believes_no_claim_that_its_size_cannot_justify(tmp_path, pack, content, limit):
    path, numbers = tmp_path / "x", limit // 8 + 1
    for size, code, words in (
        (limit, 8, f"shape ({limit},) needs {limit} bytes, but it has {len(content)} or more"),
        (limit + 1, 8, f"an array of shape ({limit + 1},) does not fit in it"),
        (numbers, 14, f"an array of shape ({numbers},) does not fit in it"),
    ):
        path.write_bytes(pack(struct.pack(">4BI", 0, 0, code, 1, size) + content))
        assert refusal(read_idx, path) == f"cannot be read: {words}"


def test_labels_in_order_and_files_of_several_members_are_read(tmp_path):
    labels, path = np.repeat(np.arange(10, dtype=np.uint8), 6_000), tmp_path / "x"
    path.write_bytes(gzip.compress(idx(labels)))
    assert path.stat().st_size < len(labels) / 500  # however tightly they are packed
    np.testing.assert_array_equal(read_idx(path), labels)
    content = idx(SIX)
    pieces = [content[:3], b"", content[3:9], b"", b"", content[9:]]
    path.write_bytes(b"".join(map(gzip.compress, pieces)) + bytes(9))
    np.testing.assert_array_equal(read_idx(path), SIX)


# --- hostile files ---


def zeros_in_an_archive(count, method):
    """The bytes of a .npz of so many zeros."""
    file, member = io.BytesIO(), io.BytesIO()
    np.save(member, np.zeros(count, np.uint8))
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("x_train.npy", member.getvalue())
    return file.getvalue()


def packed_idx(claimed, content):
    """A packed IDX file that claims so many bytes."""
    return gzip.compress(struct.pack(">4BI", 0, 0, 8, 1, claimed) + content)


CLAIM = struct.pack(">4B3I", 0, 0, 8, 3, *[2**31] * 3)
HOSTILE = {
    "a bomb": (read_dataset, zeros_in_an_archive(30_000_000, zipfile.ZIP_DEFLATED)),
    "a bomb in another packing": (read_dataset, zeros_in_an_archive(8_000_000, zipfile.ZIP_LZMA)),
    "a claim": (read_idx, CLAIM),
    "a packed claim": (read_idx, gzip.compress(CLAIM)),
    "a packed bomb": (read_idx, packed_idx(30_000_000, bytes(30_000_000))),
    "a packed bomb of ten bytes, it says": (read_idx, packed_idx(10, bytes(30_000_000))),
    "what its size might justify": (
        read_idx,
        packed_idx(10**7, np.random.default_rng(0).bytes(10**5)),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_take_no_more_memory_than_they_have_data(tmp_path, name):
    read, content = HOSTILE[name]
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    refusal(read, path)  # what is imported at first is not meant
    assert peak_memory(lambda: refusal(read, path)) < 3_000_000


@pytest.mark.parametrize("read", [read_idx, read_dataset])
def test_links_are_followed_and_what_is_no_file_is_refused(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "zeros.npz").symlink_to("/dev/zero")
    for name in ("pipe.npz", "zeros.npz"):
        assert refusal_in_time(read, tmp_path / name) == "cannot be read: it is not a file"
    (tmp_path / "nowhere").symlink_to("missing")
    for name in ("nowhere", "missing"):
        with pytest.raises(FileNotFoundError, match=name):
            read(tmp_path / name)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((ValueError, FileNotFoundError), match=f"{tmp_path}/loop: "):
        read(tmp_path / "loop")
    with pytest.raises(TypeError, match="the path must be a string or a Path, got NoneType"):
        read(None)


# --- data sets ---

NAMES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


def four_parts(shape=(4, 5)):
    """Images and labels as they could be in a file, with 0 and 255 among the pixels."""
    images = np.random.default_rng(0).integers(0, 256, (6, *shape)).astype(np.uint8)
    images.flat[:2] = 0, 255
    labels = np.arange(6, dtype=np.uint8)
    return {"x_train": images, "y_train": labels, "x_test": images[3::-1], "y_test": labels[:4]}


def write_folder(folder, kind="plain", dot="-"):
    """A folder with the four IDX files of a data set."""
    for part, array in four_parts().items():
        name = NAMES[part].replace("-idx", f"{dot}idx") + ".gz" * (kind == "gzip")
        (folder / name).write_bytes(PACKED[kind](idx(array)))


def read_archive(tmp_path, **changed):
    """What is read of an archive of the four arrays, some of them changed."""
    np.savez(tmp_path / "data.npz", **{**four_parts(), **changed})
    return read_dataset(tmp_path / "data.npz")


@pytest.mark.parametrize(
    "write",
    [
        *(partial(write_folder, kind=kind, dot=dot) for kind in PACKED for dot in "-."),
        lambda folder: np.savez(folder / "a.npz", **four_parts(), more=np.ones(3)),
        lambda folder: np.savez_compressed(folder / "a.npz", **four_parts()),
    ],
)
def test_a_folder_of_idx_files_or_with_an_archive_is_a_data_set(tmp_path, write):
    write(tmp_path)
    (tmp_path / "notes.txt").write_text("not data")
    (tmp_path / "._a.npz").write_text("what macOS leaves")
    data, parts = read_dataset(str(tmp_path)), four_parts()
    assert list(data) == ["x_train", "y_train", "x_test", "y_test"]
    for part in ("train", "test"):
        images = parts[f"x_{part}"][:, None].astype(np.float32) / np.float32(255)
        assert all_bytes(data[f"x_{part}"]) == all_bytes(images)
        assert all_bytes(data[f"y_{part}"]) == all_bytes(parts[f"y_{part}"].astype(np.int64))
    if (tmp_path / "a.npz").exists():
        assert all_bytes(read_dataset(tmp_path / "a.npz")) == all_bytes(data)


def test_a_plain_file_is_preferred_to_a_packed_one_and_these_to_an_archive(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "a.npz").write_bytes(b"damaged")
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    assert read_dataset(tmp_path)["y_train"].tolist() == [0, 1, 2, 3, 4, 5]


SHAPES = {  # of a stored image, and as it is read
    (3, 5): (1, 3, 5), (1, 1): (1, 1, 1), (64, 64): (1, 64, 64),
    (4, 5, 1): (1, 4, 5), (4, 5, 3): (3, 4, 5), (4, 7, 3): (3, 4, 7),
    (5, 6, 4): (4, 5, 6),  # the opacity is left as it is
    **{same: same for same in ((1, 4, 5), (3, 4, 5), (3, 4, 3), (1, 4, 3), (2, 4, 5), (4, 5, 6))},
}  # fmt: skip


@pytest.mark.parametrize("stored", SHAPES)
@pytest.mark.parametrize("kind", ["u1", "i2", ">i4", "i8", "<f2", ">f4", "<f8", "?"])
def test_images_of_any_layout_and_kind_become_channels_first(tmp_path, stored, kind):
    pixels, scale = four_parts(stored)["x_train"], np.float32(255)
    if np.dtype(kind).kind not in "iu":  # as they are, below zero too; these are exact
        pixels, scale = pixels / 64 - 1, np.float32(1)
    pixels = pixels.astype(kind)
    data = read_archive(tmp_path, x_train=pixels, x_test=pixels[3::-1])
    images = pixels.astype(np.float32) / scale
    if len(stored) == 3 and SHAPES[stored] != stored:
        images = images.transpose(0, 3, 1, 2)
    images = images.reshape(6, *SHAPES[stored])
    assert all_bytes(data["x_train"], data["x_test"]) == all_bytes(images, images[3::-1])
    assert data["x_train"].flags.c_contiguous


@pytest.mark.parametrize("classes", [1, 2, 6, 1000])
def test_any_number_of_classes_is_taken(tmp_path, classes):
    labels = np.array([0, 0, 0, 0, 0, classes - 1])
    data = read_archive(tmp_path, y_train=labels[:, None], y_test=labels[2:, None])
    assert all_bytes(data["y_train"], data["y_test"]) == all_bytes(labels, labels[2:])
    with pytest.raises(ValueError, match=f"y_test: labels must be from 0 to {classes - 1}"):
        read_archive(tmp_path, y_train=labels, y_test=labels[2:] + 1)


SIZE, SHAPE = r"has samples of shape .*, but x_train of \(1, 4, 5\)$", "labels must have shape "
SAMPLES = r"expected features \(N, F\) or images .*, got shape "
WHOLE = "labels must be class numbers (integers), got "
MISFITS = [  # (part, another array in its place, what is said of it)
    *(("x_test", np.zeros((4, *shape), "u1"), SIZE) for shape in ((5, 5), (3, 5), (4, 5, 3))),
    ("x_test", np.zeros((4, 20), "u1"), SIZE),
    *(
        ("x_train", np.zeros(shape, "u1"), SAMPLES + re.escape(str(shape)))
        for shape in ((6, 1, 4, 5, 2), (6, 0, 5), (0, 4, 5), (6,), (6, 0), (0, 6), ())
    ),
    *(("x_train", np.full((6, 4, 5), v), "images must be finite") for v in (np.nan, np.inf, 1e300)),
    *(("y_train", np.zeros(shape, "u1"), SHAPE + r"\(6,\), .*\)$") for shape in (5, 0, (2, 3))),
    ("y_train", np.eye(6), SHAPE + r"\(6,\), got \(6, 6\); argmax\(axis=1\) makes class numbers"),
    ("y_test", np.zeros(5, "u1"), SHAPE + r"\(4,\)"),
    ("y_train", np.zeros(6, "?"), re.escape(f"{WHOLE}bool; astype(int) makes them so")),
    ("y_train", np.ones(6), re.escape(f"{WHOLE}float64; astype(int) makes them so")),
    ("y_train", np.full(6, 0.5, ">f4"), re.escape(f"{WHOLE}float32; these scripts classify, they")),
    ("y_test", np.full(4, np.nan), re.escape(f"{WHOLE}float64; these scripts classify, they")),
    ("y_train", np.full(6, -1, "i1"), "labels must be from 0"),
    ("y_train", np.full(6, 1_000_000), "labels must be from 0 to 999999, got 1000000"),
    ("y_train", np.full(6, 2**64 - 1, "u8"), "labels must be"),
    ("y_test", np.full(4, -1), "labels must be from 0 to 5"),
    ("y_test", np.full(4, 6), "labels must be from 0 to 5"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("part", "array", "message"), MISFITS)
def test_data_that_do_not_fit_together_are_refused(tmp_path, part, array, message):
    np.savez(tmp_path / "data.npz", **{**four_parts(), part: array})
    named = f"{part}: " if part.startswith("y") else "(x_test |x_train: )?"
    said = refusal(read_dataset, tmp_path / "data.npz")
    assert re.match(f"cannot be read: {named}{message}", said)


def test_missing_parts_of_a_data_set_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such file or folder"):
        read_dataset(tmp_path / "nowhere")
    assert refusal(read_dataset, tmp_path) == f"{datasets.TAKES}; found nothing"
    for name in NAMES:
        parts = four_parts()
        del parts[name]
        np.savez(tmp_path / "a.npz", **parts)
        said = refusal(read_dataset, tmp_path / "a.npz")
        assert said.startswith("cannot be read: expected x_train and y_train (or x and y), and")
        assert said.endswith(f"; found {', '.join(sorted(parts))}")
    np.savez(tmp_path / "b.npz", x_train=np.ones(3))
    (tmp_path / "notes.txt").touch()
    assert refusal(read_dataset, tmp_path) == f"{datasets.TAKES}; found a.npz, b.npz"
    write_folder(tmp_path)
    (tmp_path / NAMES["y_test"]).unlink()
    assert "ubyte: t10k-labels" in refusal(read_dataset, tmp_path)
    (tmp_path / NAMES["x_train"]).unlink()
    assert refusal(read_dataset, tmp_path).endswith(": train-images, t10k-labels")


PART_OF = {  # name in a file: in the data set
    "x": "x_train", "X": "x_train", "X_train": "x_train", "y": "y_train", "y_train": "y_train",
    "x_val": "x_validation", "x_valid": "x_validation", "X_validation": "x_validation",
    "y_val": "y_validation", "y_Valid": "y_validation", "Y_VALIDATION": "y_validation",
}  # fmt: skip


@given(names=st.sets(st.sampled_from(list(PART_OF))), more=st.booleans())
def test_arrays_are_known_by_several_names(tmp_path_factory, names, more):
    path = tmp_path_factory.mktemp("npz") / "a.NPZ"
    arrays = {"x": four_parts()["x_train"], "y": np.arange(6)}
    stored = {name: arrays[name[0].lower()] for name in names}
    with open(path, "wb") as file:
        np.savez(file, **stored, **({"names": np.arange(3)} if more else {}))
    parts = [PART_OF[name] for name in names]
    pairs = [{f"x_{part}", f"y_{part}"} <= {*parts} for part in ("train", "validation")]
    if len({*parts}) < len(parts):
        assert "are the same part of a data set: keep one" in refusal(read_dataset, path)
    elif pairs[0] and len(parts) == 2 * sum(pairs):
        assert set(read_dataset(path)) == {*parts}
    else:
        assert "expected x_train and y_train (or x and y)" in refusal(read_dataset, path)


def test_files_of_training_images_alone_are_a_data_set(tmp_path):
    write_folder(tmp_path)
    expected = read_dataset(tmp_path)
    for name in ("x_test", "y_test"):
        (tmp_path / NAMES[name]).unlink()
    (tmp_path / "notes").mkdir()
    data, _ = datasets.load_data(str(tmp_path), None)
    for name in ("x_train", "y_train"):
        assert all_bytes(data[name]) == all_bytes(expected[name])
    assert "x_test" not in data


@pytest.mark.parametrize("name", ["x.png", "x.csv", "x.txt", "x.pt", "x.zip", NAMES["x_train"]])
def test_what_data_takes_is_said_of_any_other_file(tmp_path, name):
    write_folder(tmp_path)
    (tmp_path / name).touch()
    assert refusal(read_dataset, tmp_path / name) == datasets.TAKES


# --- features ---


@pytest.mark.parametrize("kind", ["u1", "i8", "<f2", "f4", "f8", "?"])
def test_features_are_read_as_they_are(tmp_path, kind):
    features = np.arange(12).reshape(6, 2).astype(kind)
    np.savez(tmp_path / "a.npz", x=features, y=np.arange(6)[:, None])
    data = read_dataset(tmp_path / "a.npz")
    assert all_bytes(data["x_train"]) == all_bytes(features.astype(float))
    assert data["y_train"].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e300])
def test_features_that_are_not_finite_are_named(tmp_path, value):
    features = np.ones((6, 3))
    features[4, 1] = value
    np.savez(tmp_path / "a.npz", x=features, y=np.arange(6))
    said = refusal(read_dataset, tmp_path / "a.npz")
    assert said.endswith(f"features must be finite, got {value} in row 4, column 1")


@given(
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 0.1, 1e6, 1e30]),
    offset=st.sampled_from([0.0, 0.1, 1.7e9]),
    seed=st.integers(0, 99),
)
def test_features_of_any_unit_become_comparable(scale, offset, seed):
    rng = np.random.default_rng(seed)
    raw = rng.normal(size=(50, 2))
    features = np.column_stack([raw * scale + offset, np.full(50, offset + scale)])
    part = dict.fromkeys(("x_train", "x_validation", "x_test"), features)
    data = datasets.prepare_features({**part, "x_test": features + scale})
    x, mean, std = data["x_train"], data["feature_mean"], data["feature_std"]
    assert (x.dtype, x.shape) == (np.float32, (50, 3))
    if features[:, 0].std() > 1e-9 * np.abs(features).max():  # the unit is not below rounding
        np.testing.assert_allclose(x[:, :2].mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(x[:, :2].std(axis=0), 1, rtol=1e-5)
    assert not x[:, 2].any()
    assert std[2] == 1
    again = datasets.standardize(features, mean, std)
    assert all_bytes(again) == all_bytes(x) == all_bytes(data["x_validation"])
    assert all_bytes(data["x_test"]) == all_bytes(datasets.standardize(features + scale, mean, std))


@pytest.mark.parametrize("part", [*NAMES, "archive"])
def test_a_damaged_file_in_a_folder_is_blamed_by_its_own_path(tmp_path, part):
    path = tmp_path / "mine.npz"
    if part != "archive":
        write_folder(tmp_path, "gzip")
        path = tmp_path / f"{NAMES[part]}.gz"
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"^{path}: cannot be read: "):
        read_dataset(tmp_path)


def test_a_damaged_archive_is_refused_or_right(tmp_path):
    path, refused = tmp_path / "data.npz", 0
    np.savez_compressed(path, **four_parts((2, 2)))
    broken, expected = list(damaged(path.read_bytes(), every=13)), all_bytes(read_dataset(path))
    for content in broken:
        path.write_bytes(content)
        data, message = outcome(read_dataset, path)
        assert message or all_bytes(data) == expected
        refused += bool(message)
    assert refused > len(broken) / 2


# --- synthetic data ---


def test_synthetic_digits_are_a_data_set():
    data = datasets.synthetic_digits(train=40, test=20)
    for part, count in (("train", 40), ("test", 20)):
        assert data[f"x_{part}"].shape == (count, 1, 28, 28)
        assert data[f"y_{part}"].shape == (count,)
    assert data["x_train"].dtype == np.float32
    assert 0 <= data["x_train"].min() < 0.1
    assert 0.9 < data["x_train"].max() <= 1
    assert not np.array_equal(data["x_train"][:20], data["x_test"])


def test_points_of_a_sine():
    data = datasets.sine(train=400, test=99)
    for part, count in (("train", 400), ("test", 99)):
        x, y = data[f"x_{part}"], data[f"y_{part}"]
        assert (x.shape, x.dtype, y.dtype) == ((count, 1), np.float32, np.float32)
        np.testing.assert_allclose(y, np.sin(x))
        assert np.abs(x).max() < math.pi / 2
        assert np.ptp(x) > 3
    np.testing.assert_allclose(np.diff(data["x_test"][:, 0]), math.pi / 100, rtol=1e-4)


# --- how data are split ---


def numbered(count, test=0):
    """Images that show their own numbers, which are their classes as well."""
    images = np.arange(count + test, dtype=np.float32).reshape(-1, 1, 1, 1)
    labels = np.arange(count + test)
    data = {"x_train": images[:count], "y_train": labels[:count]}
    return {**data, **({"x_test": images[count:], "y_test": labels[count:]} if test else {})}


def labels_of(data, *parts):
    """The labels of each part, whose images must show them."""
    for part in parts:
        np.testing.assert_array_equal(data[f"x_{part}"].ravel(), data[f"y_{part}"])
    return [data[f"y_{part}"].tolist() for part in parts]


@given(data=st.data(), count=st.integers(2, 60), seed=st.integers(0, 9))
def test_validation_images_are_split_off_without_losing_one(data, count, seed):
    size = data.draw(st.none() | st.integers(0, count - 1))
    held_out = count // 10 if size is None else size
    train_size = data.draw(st.none() | st.integers(1, count - held_out))
    parts = datasets.split_off(numbered(count), size, seed, train_size)
    train, validation = labels_of(parts, "train", "validation")
    assert (train, validation) == (sorted(train), sorted(validation))
    assert len(validation) == held_out
    assert len(train) == (count - held_out if train_size is None else train_size)
    assert len({*train, *validation}) == len(train) + len(validation)
    whole = datasets.split_off(numbered(count), size, seed)
    assert whole["y_validation"].tolist() == validation  # whatever is trained on
    assert {*train} <= {*whole["y_train"].tolist()}


def test_other_seeds_split_otherwise_and_no_more_is_taken_than_there_is():
    splits = [datasets.split_off(numbered(50), 12, seed, 20) for seed in (5, 6)]
    for name in ("y_train", "y_validation"):
        assert not np.array_equal(splits[0][name], splits[1][name])
    assert len(datasets.split_off(numbered(60_000), None, 0)["y_validation"]) == 5_000
    with pytest.raises(ValueError, match="--validation 50 leaves none of the 50 samples"):
        datasets.split_off(numbered(50), 50, 5)
    with pytest.raises(ValueError, match="--train-size 39 is too many: .* 50 samples, 12 of them"):
        datasets.split_off(numbered(50), 12, 5, train_size=39)


def test_test_size_takes_some_test_images_or_where_there_are_none_training_images():
    both, train_only = numbered(50, test=40), numbered(50)
    assert datasets.choose_test(both, None) is both
    for size in (1, 20, 40):
        parts = datasets.choose_test(both, size)
        (test,) = labels_of(parts, "test")
        assert len(set(test)) == size
        assert {*test} <= {*both["y_test"]}
        assert parts["x_train"] is both["x_train"]
    for size, expected in ((None, 10), (7, 7), (49, 49)):
        train, test = labels_of(datasets.choose_test(train_only, size), "train", "test")
        assert len(test) == expected
        assert sorted([*test, *train]) == list(range(50))
    assert len(datasets.choose_test(numbered(4), None)["y_test"]) == 1
    for data, size, words in (
        (both, 41, "--test-size 41 exceeds the 40 test samples"),
        (train_only, 50, "--test-size 50 leaves none of the 50 samples to train on"),
        (numbered(1), None, "--test-size 1 leaves none of the 1 samples to train on"),
    ):
        with pytest.raises(ValueError, match=f"^{words}$"):
            datasets.choose_test(data, size)


def test_validation_samples_of_ones_own_are_used_and_none_held_out():
    data = numbered(50)
    data |= {f"{kind}_validation": data[f"{kind}_train"][:20] + 50 for kind in "xy"}
    for size, train_size in ((None, None), (0, 50), (7, 3), (20, None)):
        parts = datasets.split_off(data, size, 5, train_size)
        train, validation = labels_of(parts, "train", "validation")
        assert (
            len(validation) == len({*validation} & {*range(50, 70)}) == (20, size)[size is not None]
        )
        assert len(train) == len({*train} & {*range(50)}) == (train_size or 50)
        other = datasets.split_off(data, size, 6, train_size)
        assert labels_of(other, "validation") == [validation]  # the same for every seed
        fewer = datasets.split_off(data, len(validation) // 2, 5)
        assert {*fewer["y_validation"]} <= {*validation}
    with pytest.raises(ValueError, match="--validation 21 exceeds the 20 validation samples"):
        datasets.split_off(data, 21, 5)
    with pytest.raises(ValueError, match="--train-size 51 .* 50 samples, 0 of them held out"):
        datasets.split_off(data, None, 5, train_size=51)
