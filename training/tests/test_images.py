"""Images: files, folders of them, and another size."""

import io
import os
import pathlib
import re
import struct
import warnings
import zlib
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training import images
from training.tests.conftest import (
    damaged,
    outcome,
    peak_memory,
    refusal,
    refusal_in_time,
    run_python,
)


@pytest.fixture
def image_module():
    return pytest.importorskip("PIL.Image", reason="image files need Pillow, which is optional")


def write_images(folder, sizes=((9, 6),), modes=("L",), classes="ab", count=4, suffix="png"):
    """Bright images of the second class, dark ones of the first."""
    from PIL import Image

    for label, name in enumerate(classes):
        path = pathlib.Path(folder, name)
        path.mkdir(parents=True)
        for number in range(count):
            height, width = sizes[number % len(sizes)]
            image = Image.new("L", (width, height), 40 + 160 * label + number)
            image.convert(modes[number % len(modes)]).save(path / f"{number}.{suffix}")


def read(folder):
    """The data set of a folder with a sub-folder for each class."""
    return images.read_image_folders(str(folder), None)


# --- folders ---


@pytest.mark.usefixtures("image_module")
@pytest.mark.parametrize("names", [("train", "val", "test"), ("Train", "VALID"), ("train", "TEST")])
def test_folders_of_images_are_read_as_they_are(tmp_path, names):
    write_images(tmp_path / names[0], classes=("x y", "\u00fc"))
    for name in names[1:]:
        write_images(tmp_path / name, classes=("x y", "\u00fc"), count=2, suffix="BMP")
    (tmp_path / "notes").mkdir()
    data = read(tmp_path)
    assert data["classes"].tolist() == ["x y", "\u00fc"]
    parts = {"val": "validation", "valid": "validation"}
    assert [name[2:] for name in data if name[0] == "x"] == [
        parts.get(name.lower(), name.lower()) for name in names
    ]
    assert (data["x_train"].shape, data["x_train"].dtype) == ((8, 1, 9, 6), np.float32)
    np.testing.assert_array_equal(data["y_train"], [0, 0, 0, 0, 1, 1, 1, 1])
    levels = [40, 41, 42, 43, 200, 201, 202, 203]
    np.testing.assert_allclose(data["x_train"][:, 0, 4, 2], np.array(levels) / 255, atol=1e-6)
    for part in [name[2:] for name in data if name[0] == "x"][1:]:
        expected = np.array([40, 41, 200, 201]) / 255
        np.testing.assert_allclose(data[f"x_{part}"][:, 0, 4, 2], expected, atol=1e-6)
        np.testing.assert_array_equal(data[f"y_{part}"], [0, 0, 1, 1])


@pytest.mark.usefixtures("image_module")
def test_parts_of_other_colors_and_sizes_are_brought_together(tmp_path):
    write_images(tmp_path / "train")
    write_images(tmp_path / "test", modes=("RGB",), count=2)
    data = read(tmp_path)
    assert (data["x_train"].shape, data["x_test"].shape) == ((8, 3, 9, 6), (4, 3, 9, 6))
    np.testing.assert_allclose(data["x_train"][7], 203 / 255, atol=1e-6)
    write_images(tmp_path / "val", sizes=((9, 7),))
    with pytest.raises(ValueError, match=r"val/a/0\.png: images of 6x9 and 7x9 pixels; --size"):
        read(tmp_path)


@pytest.mark.usefixtures("image_module")
def test_a_class_may_be_called_train(tmp_path):
    write_images(tmp_path, classes=("bus", "test", "train"))
    assert read(tmp_path)["classes"].tolist() == ["bus", "test", "train"]


@pytest.mark.usefixtures("image_module")
def test_images_of_other_sizes_and_modes_are_brought_together(tmp_path):
    write_images(tmp_path, sizes=((9, 6), (12, 12)), modes=("L", "RGB", "P", "1"))
    with pytest.raises(ValueError, match=r"1\.png: images of 6x9 and 12x12 pixels; --size 6, for"):
        read(tmp_path)
    data = images.read_image_folders(str(tmp_path), 5)
    assert data["x_train"].shape == (8, 3, 5, 5)
    np.testing.assert_allclose(data["x_train"][0], 40 / 255, atol=1e-6)
    np.testing.assert_allclose(data["x_train"][1], 41 / 255, atol=1e-6)


def test_an_image_of_any_mode_and_format_is_read(tmp_path, image_module):
    gray = np.linspace(0, 255, 60).reshape(10, 6).round().astype(np.uint8)
    image = image_module.fromarray(gray)
    deep = image_module.fromarray(gray.astype(np.uint16) * 257)
    palette = image.convert("RGB").quantize(64)
    files = {
        **{f"gray.{ending}": image for ending in ("png", "tif", "bmp", "gif", "pgm", "jpg")},
        **{f"color.{ending}": image.convert("RGB") for ending in ("png", "tif", "ppm", "jpg")},
        **{f"deep.{ending}": deep for ending in ("png", "tif", "pgm")},
        **{f"opaque.{ending}": image.convert("RGBA") for ending in ("png", "tif")},
        **{f"both.{ending}": image.convert("LA") for ending in ("png", "tif")},
        **{f"print.{ending}": image.convert("CMYK") for ending in ("jpg", "tif")},
        **{f"palette.{ending}": palette for ending in ("png", "gif", "bmp")},
    }
    for name, saved in files.items():
        saved.save(tmp_path / name)
        read = images.read_image(str(tmp_path / name), None)
        atol = 0.05 if name.endswith("jpg") or name.startswith("palette") else 1e-6
        np.testing.assert_allclose(read, np.broadcast_to(gray / 255, read.shape), atol=atol)
    palette.save(tmp_path / "clear.png", transparency=0)
    assert images.read_image(str(tmp_path / "clear.png"), None).shape == (3, 10, 6)
    image.convert("1").save(tmp_path / "two.png")
    assert set(images.read_image(str(tmp_path / "two.png"), None).flat) == {0, 1}


def test_a_photo_is_read_the_right_way_up(tmp_path, image_module):
    gray = np.zeros((8, 16), np.uint8)
    gray[:, :8] = 255
    orientation = image_module.Exif()
    orientation[0x0112] = 6  # turned to the left: the camera's top is on the right
    image_module.fromarray(gray).save(tmp_path / "photo.jpg", exif=orientation)
    read = images.read_image(str(tmp_path / "photo.jpg"), None)
    assert read.shape == (1, 16, 8)
    np.testing.assert_allclose(read[0, :, 0], np.repeat([1, 0], 8), atol=0.02)


def test_folders_that_are_no_data_set_say_why(tmp_path, image_module):
    write_images(tmp_path / "lone" / "test")
    write_images(tmp_path / "twice" / "val")
    (tmp_path / "twice" / "validation").mkdir()
    for name, classes in (("fewer", "a"), ("more", "abcdefghi")):
        write_images(tmp_path / name / "train")
        write_images(tmp_path / name / "test", classes=classes)
    write_images(tmp_path / "damaged")
    (tmp_path / "damaged" / "b" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    write_images(tmp_path / "deep")
    image_module.new("I", (6, 9)).save(tmp_path / "deep" / "b" / "1.tif")
    write_images(tmp_path / "none", count=0)
    write_images(tmp_path / "others", suffix="png")
    (tmp_path / "others" / "a" / ".DS_Store").touch()
    for path in (tmp_path / "others" / "a").glob("*.png"):
        path.rename(path.with_suffix(".heic"))
    write_images(tmp_path / "nested" / "images")
    for name, path, words in (
        ("lone", "lone", "there is a folder test, but none called train"),
        ("twice", "twice", "val and validation are the same part of a data set: keep one"),
        ("fewer", "fewer/test", f"expected the same classes as in {tmp_path}/fewer/train; .* b$"),
        ("more", "more/train", f"expected .* as in {tmp_path}/more/test; .* c, d, e, f, g and 2 m"),
        ("others", "others/a", r"there is no image in this folder, only 0\.heic, 1\.h.*, 3\.heic$"),
        (
            "nested",
            "nested/images",
            "there is no image .*, only a, b; --data takes the folder righ",
        ),
        ("damaged", "damaged/b/2.png", "cannot be read as an image: "),
        ("deep", "deep/b/1.tif", "cannot be read as an image: its pixels are of mode I"),
        ("none", "none/a", "there is no image in this folder$"),
    ):
        with pytest.raises(ValueError, match=f"^{tmp_path / path}: {words}"):
            read(tmp_path / name)


def test_how_many_were_read_is_shown_on_a_terminal_alone(tmp_path, image_module, monkeypatch):
    write_images(tmp_path)
    for moves, expected in ((True, "\rreading images: 0 of 8\r" + " " * 22 + "\r"), (False, "")):
        out = io.StringIO()
        out.isatty = lambda moves=moves: moves
        monkeypatch.setattr("sys.stdout", out)
        read(tmp_path)
        assert re.sub("reading images: [1-8] of 8\r", "", out.getvalue()) == expected


def test_images_that_do_not_fit_in_memory_are_refused_before_they_are_read(monkeypatch):
    image = np.broadcast_to(np.float32(0), (3, 10**8, 10**8))
    monkeypatch.setattr(images, "read_image", lambda path, size: image)
    words = "^2 images of 100000000x100000000 pixels do not fit in memory; --size N makes them smal"
    with pytest.raises(MemoryError, match=words):
        images.stack_images(["a", "b"], None)


# --- files ---


def chunk(name, content, length=None):
    """A piece of a PNG file."""
    length = struct.pack(">I", len(content) if length is None else length)
    return length + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, rows, *extra):
    """The bytes of a grey PNG file with these sizes in its header, and more pieces after that."""
    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0))
    pieces = (header, *extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


PIXELS = b"\0\1\2\3\0\4\5\6"  # two rows of three, each after its filter
COMMENT = b"\0\0" + zlib.compress(bytes(1_000_000))
HOSTILE_IMAGES = {
    "nothing": b"",
    "text": b"no image",
    "a bomb": png(13_000, 13_000, bytes(13_000 * 500)),
    "a small bomb": png(1_500, 1_500, bytes(1_501 * 1_500)),
    "more pixels than Pillow takes": png(2**31 - 1, 2**31 - 1, PIXELS),
    "no width": png(0, 2, PIXELS),
    "no height": png(3, 0, PIXELS),
    "a piece of two gigabytes": png(3, 2, PIXELS, chunk(b"IDAT", b"\0", 2**31 - 9)),
    "comments of a hundred megabytes": png(
        3, 2, PIXELS, *(chunk(b"zTXt", b"%d" % number + COMMENT) for number in range(100))
    ),
    "a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 3 2\n%%EndComments\nshowpage\n",
    "a screen of 4 gigapixels": b"GIF89a%s\0\0\0,\0\0\0\0%s\0\2\0;" % (b"\xff" * 4, b"\xff" * 4),
}


def one_image(tmp_path, content, name="0.png"):
    """The path of an image, by itself in the folder of its class."""
    (tmp_path / "class").mkdir(exist_ok=True)
    path = tmp_path / "class" / name
    path.write_bytes(content)
    return path


def image_refusal(path):
    """What is said of an image in a folder that is read."""
    message = refusal(lambda _: read(path.parents[1]), path)
    assert message.startswith("cannot be read as an image: ")
    return message


@pytest.mark.usefixtures("image_module")
@pytest.mark.parametrize("name", HOSTILE_IMAGES)
def test_hostile_images_are_refused_without_a_warning_and_without_much_memory(name, tmp_path):
    path = one_image(tmp_path, HOSTILE_IMAGES[name])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        image_refusal(path)  # what Pillow imports at first is not meant
        limit = len(HOSTILE_IMAGES[name]) + 8_000_000
        assert peak_memory(lambda: image_refusal(path)) < limit
    assert not warned


@pytest.mark.usefixtures("image_module")
def test_a_large_image_is_read(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1100, 1000), np.uint8)
    one_image(tmp_path, png(1000, 1100, np.insert(noise, 0, 0, axis=1).tobytes()))
    np.testing.assert_array_equal(read(tmp_path)["x_train"][0, 0], noise / np.float32(255))


@pytest.mark.usefixtures("image_module")
def test_a_damaged_image_is_refused_or_right(tmp_path):
    broken, refused = list(damaged(png(3, 2, PIXELS))), 0
    for content in broken:
        path = one_image(tmp_path, content)
        data, message = outcome(lambda _: read(tmp_path), path)
        if not message:
            np.testing.assert_allclose(data["x_train"].ravel() * 255, [1, 2, 3, 4, 5, 6], 1e-6)
        refused += bool(message)
    assert refused > len(broken) * 0.7


@pytest.mark.usefixtures("image_module")
def test_nothing_but_the_message_is_printed_of_a_damaged_image(tmp_path):
    sizes = ((256, 2), (257, 2), (277, 65_282))  # width, height, channels
    tags = b"".join(struct.pack("<HHII", tag, 3, 1, size) for tag, size in sizes)
    many = struct.pack("<2sHIH", b"II", 42, 8, len(sizes)) + tags + bytes(4)
    (tmp_path / "0.tif").write_bytes(many)
    code = "from training.images import read_image; read_image('0.tif', None)"
    done = run_python("-c", code, cwd=tmp_path)
    message = done.stderr.splitlines()[-1]
    assert "0.tif: cannot be read as an image: it is damaged" in message
    assert done.stderr.startswith("Traceback"), done.stderr


@pytest.mark.usefixtures("image_module")
@pytest.mark.parametrize("error", [KeyError("x"), struct.error("x"), IndexError("x"), EOFError()])
def test_whatever_pillow_raises_is_said_of_the_image(error, tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.Image.Image.convert", mock.Mock(side_effect=error))
    assert image_refusal(one_image(tmp_path, png(3, 2, PIXELS)))


@pytest.mark.usefixtures("image_module")
def test_only_files_that_are_images_and_not_hidden_are_read(tmp_path):
    path = one_image(tmp_path, png(3, 2, PIXELS))
    one_image(tmp_path, b"what macOS leaves", "._0.png")
    one_image(tmp_path, b"another program's", "a.eps")
    (tmp_path / "class" / "more").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "class" / "link.png").symlink_to(path)
    assert read(tmp_path)["x_train"].shape == (2, 1, 2, 3)
    (tmp_path / "class" / "1.png").symlink_to("nowhere")
    assert image_refusal(tmp_path / "class" / "1.png")
    path.unlink()
    os.mkfifo(path)
    message = refusal_in_time(read, tmp_path, path)
    assert message == "cannot be read as an image: it is not a file"


# --- another size ---


@given(
    shape=st.tuples(*[st.integers(0, 3)] * 2, *[st.integers(1, 9)] * 2),
    size=st.integers(1, 12) | st.tuples(st.integers(1, 12), st.integers(1, 12)),
    dtype=st.sampled_from([np.float32, np.float64]),
    axes=st.permutations(range(4)),
    seed=st.integers(0, 1000),
)
def test_resize_takes_the_mean_of_the_area(shape, size, dtype, axes, seed):
    pixels = np.random.default_rng(seed).random(shape).astype(dtype)
    given_pixels = np.ascontiguousarray(pixels.transpose(axes)).transpose(np.argsort(axes))
    given_pixels.flags.writeable = False
    resized = images.resize(given_pixels, size)
    height, width = size if isinstance(size, tuple) else (size, size)
    # Every pixel cut into height x width parts, and these put together anew, can be counted.
    parts = pixels.repeat(height, axis=2).repeat(width, axis=3)
    blocks = parts.reshape(*shape[:2], height, shape[2], width, shape[3])
    np.testing.assert_allclose(resized, blocks.mean(axis=(3, 5)), atol=1e-5)
    assert (resized.dtype, resized.shape) == (dtype, (*shape[:2], height, width))
    assert images.resize(pixels, size).tobytes() == resized.tobytes()


@pytest.mark.filterwarnings("error")
@given(
    values=st.lists(
        st.sampled_from([0.0, 1.0, -1.0, 1e-45, -1e-45, 1.7e38, -1.7e38]), min_size=12, max_size=12
    ),
    size=st.sampled_from([1, 2, (5, 3)]),
)
def test_resize_of_huge_and_tiny_values_is_no_nan_and_no_warning(values, size):
    pixels = np.array(values, np.float32).reshape(1, 1, 3, 4)
    assert not np.isnan(images.resize(pixels, size)).any()
    pixels[0, 0, 1, 1] = np.inf
    images.resize(pixels, 2)


@pytest.mark.parametrize(
    ("shape", "size"), [((1, 1, 1, 10**6), 28), ((1, 1, 1, 4_000), (1, 10**7))]
)
def test_resize_takes_no_memory_for_lines_that_no_image_has(shape, size):
    pixels = np.broadcast_to(np.float32(0), shape)

    def refused():
        with pytest.raises(ValueError, match="^resize: a line of [0-9]+ pixels is too long to bec"):
            images.resize(pixels, size)

    assert peak_memory(refused) < 10_000_000  # of 224 or 320 MB


ONE = np.ones((1, 1, 2, 2))
IMAGES = r"images must be \(N, C, H, W\), got shape "


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "images must be a NumPy array", ([1.0], 2)),
        (TypeError, "images must be a NumPy array", (None, 2)),
        (TypeError, "images must be float32 or float64", (ONE.astype(np.uint8), 2)),
        (ValueError, IMAGES + r"\(2, 3\)", (np.ones((2, 3)), 2)),
        (ValueError, IMAGES + r"\(1, 1, 1, 2, 2\)", (ONE[None], 2)),
        (ValueError, IMAGES + r"\(1, 1, 0, 2\)", (ONE[:, :, :0], 2)),
        *((ValueError, "size must be at least 1", (ONE, bad)) for bad in (0, (2, 0), -1)),
        *((TypeError, "size must be ", (ONE, bad)) for bad in (2.0, None, "2", (2, 2.5), True)),
        *(((TypeError, ValueError), "size must be ", (ONE, bad)) for bad in ((2,), (1, 2, 3))),
    ],
)
def test_resize_refuses_what_makes_no_sense(error, message, arguments):
    with pytest.raises(error, match=f"^resize: {message}"):
        images.resize(*arguments)
