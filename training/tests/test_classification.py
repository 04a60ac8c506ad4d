"""--predict: images of any kind, classified by the network in a run folder."""

import gzip
import json
import os
import shutil

import numpy as np
import pytest

import purenn as nn
import train_cnn
import train_mlp
from training import classification
from training.tests.conftest import blobs, idx, train_cnn_on, train_on

IMAGES, LABELS = blobs(12, (9, 6), 4, 5)  # gray ones, as bright as those that it learned from


@pytest.fixture(scope="module", params=[(train_on, train_mlp), (train_cnn_on, train_cnn)])
def run(request, blob_file, tmp_path_factory):
    """(folder of a run, its script) where the classes are told apart."""
    start, script = request.param
    folder = tmp_path_factory.mktemp("run")
    options = ["--epochs", "12", "--lr", "0.02", "--center", "--hidden", "16"]
    assert start(blob_file, *options, "--out", folder) == 0
    return folder, script


def predicted(run, path, capsys):
    """[(name, class, probability)] of what is printed."""
    folder, script = run
    assert script.main(["--predict", str(path), "--out", str(folder)]) == 0
    out, errors = capsys.readouterr()
    assert errors == ""
    return [tuple(line.split("  ")) for line in out.splitlines()]


@pytest.mark.parametrize("shape", [(9, 6), (9, 6, 3), (3, 9, 6), (18, 12), (9, 6, 4), (1, 9, 6)])
def test_arrays_of_any_size_and_color_are_classified(run, shape, tmp_path, capsys):
    images = np.stack([np.resize(image.mean(), shape) for image in IMAGES]).astype(np.uint8)
    if shape[-1] == 4:
        images[..., 3] = 255
    np.savez(tmp_path / "images.npz", anything=images)
    (tmp_path / "images-idx3-ubyte").write_bytes(idx(images))
    for name in ("images.npz", "images-idx3-ubyte"):
        found = predicted(run, tmp_path / name, capsys)
        names = [f"{tmp_path / name}[{number}]" for number in range(len(images))]
        assert [line[0] for line in found] == names
        assert [int(line[1]) for line in found] == LABELS.tolist()
        assert all(0.25 < float(line[2]) <= 1 for line in found)


def test_the_probability_is_that_of_the_network(run, blob_file):
    folder, script = run
    record = {train_mlp: train_mlp.MLPOptions, train_cnn: train_cnn.CNNOptions}[script]
    build = {train_mlp: train_mlp.build_mlp, train_cnn: train_cnn.build_cnn}[script]
    model = classification.load_model(str(folder), record, build)
    assert (model.classes, model.sample_shape) == (list("0123"), (3, 9, 6))
    images = np.random.default_rng(0).random((5, 3, 9, 6)).astype(np.float32)
    logits = model.net.forward(nn.load(folder / "model.npz"), images - np.float32(0.5))[0]
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = classification.classify(model, images)
    assert [int(label) for label, _ in found] == expected.argmax(axis=1).tolist()
    np.testing.assert_allclose([p for _, p in found], expected.max(axis=1), rtol=1e-5)
    pixels = np.round(images * 255).astype(np.uint8)  # as an image file has them
    scaled = classification.classify(model, pixels / np.float32(255))
    assert classification.classify(model, pixels.transpose(0, 2, 3, 1)) == scaled


def test_files_and_folders_of_images_are_classified(run, tmp_path, capsys):
    image_module = pytest.importorskip("PIL.Image", reason="image files need Pillow")
    for number, image in enumerate(IMAGES):
        mode = ("L", "RGB", "RGBA")[number % 3]
        picture = image_module.fromarray(image).convert(mode)
        picture.resize((6 + number, 9 + number)).save(tmp_path / f"{number:02}.png")
    found = predicted(run, tmp_path, capsys)
    assert [int(line[1]) for line in found] == LABELS.tolist()
    assert found[3] == predicted(run, tmp_path / "03.png", capsys)[0]
    assert found[3][0] == str(tmp_path / "03.png")


def test_what_a_file_holds_is_seen_from_its_first_bytes(run, tmp_path, capsys):
    image_module = pytest.importorskip("PIL.Image", reason="image files need Pillow")
    (tmp_path / "digits.bin").write_bytes(idx(IMAGES))
    (tmp_path / "packed").write_bytes(gzip.compress(idx(IMAGES)))
    image_module.fromarray(IMAGES[3]).save(tmp_path / "idx 3.npy", "PNG")
    expected = [f"{label}" for label in LABELS]
    for name in ("digits.bin", "packed"):
        assert [line[1] for line in predicted(run, tmp_path / name, capsys)] == expected
    assert [line[1] for line in predicted(run, tmp_path / "idx 3.npy", capsys)] == expected[3:4]


def test_what_is_broken_is_said_and_all_others_are_classified(run, tmp_path, capsys, monkeypatch):
    image_module = pytest.importorskip("PIL.Image", reason="image files need Pillow")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in" / "a" / "deep").mkdir(parents=True)
    (tmp_path / "in" / ".thumbnails").mkdir()
    (tmp_path / "empty").mkdir()
    hidden = "in/.hidden.png", "in/.thumbnails/b.png"
    for name in ("in/b.png", "in/a/deep/c.jpg", "in/a/z.tif", *hidden):
        image_module.fromarray(IMAGES[3]).save(name)
    (tmp_path / "in" / "a" / "text.png").write_text("no image")
    np.savez("rows.npz", np.ones((3, 162)))
    folder, script = run
    files = ["none.png", "in", "empty", "rows.npz", "./in/b.png"]
    assert script.main(["--predict", *files, "--out", str(folder)]) == 2
    out, errors = capsys.readouterr()
    found = [line.rsplit("  ", 2)[:2] for line in out.splitlines()]
    names = ["in/b.png", "in/a/z.tif", "in/a/deep/c.jpg", "./in/b.png"]
    assert found == [[name, f"{LABELS[3]}"] for name in names]
    broken = ["none.png", "in/a/text.png", "empty", "rows.npz"]
    assert [line.split(": ")[2] for line in errors.splitlines()] == broken


@pytest.fixture
def table_run(tmp_path):
    """(folder of a run on features whose class is seen, features, classes)."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, 300)
    features = rng.normal(size=(300, 4)) * [1, 10, 0.1, 1] + classes[:, None] * [5, 50, 0.5, 0]
    np.savez(tmp_path / "data.npz", x=features, y=classes)
    options = ["--epochs", "10", "--lr", "0.02", "--out", tmp_path / "run"]
    assert train_on(str(tmp_path / "data.npz"), *options) == 0
    return tmp_path / "run", features, classes


def test_features_are_classified(table_run, tmp_path, capsys):
    folder, features, classes = table_run
    capsys.readouterr()
    np.savez(tmp_path / "rows.npz", features)
    (tmp_path / "rows").write_bytes(idx(features.astype(">f8")))
    for name in ("rows.npz", "rows"):
        found = predicted((folder, train_mlp), tmp_path / name, capsys)
        right = [int(line[1]) == label for line, label in zip(found, classes, strict=True)]
        assert np.mean(right) > 0.95
    for array, words in (
        (IMAGES, "images, but the network takes samples of shape (4,)"),
        (features[:, 1:], "samples of shape (3,), expected (4,)"),
        (np.full((1, 4), np.nan), "features must be finite"),
    ):
        np.savez(tmp_path / "wrong.npz", array)
        assert words in refusal_of(folder, tmp_path / "wrong.npz", capsys)
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**about, "feature_std": [1.0]}))
    words = "there is no mean and no deviation for each feature"
    assert words in refusal_of(folder, tmp_path / "rows.npz", capsys)


def test_colors_become_the_gray_that_one_sees():
    colors = np.eye(3, dtype=np.float32)[None, :, :, None]
    gray = classification.with_channels(colors, 1)
    np.testing.assert_allclose(gray.ravel(), [0.299, 0.587, 0.114])
    np.testing.assert_array_equal(classification.with_channels(gray, 3)[:, 2:], gray)
    with pytest.raises(ValueError, match="images of 2 channels, but the network takes 3"):
        classification.with_channels(colors[:, :2], 3)


def refusal_of(folder, path, capsys):
    """What is said, in one line and with exit code 2, of what is not classified."""
    assert (
        train_mlp.main(["--predict", str(path), *(["--out", str(folder)] if folder else [])]) == 2
    )
    out, errors = capsys.readouterr()
    assert (out, errors.count("\n")) == ("", 1)
    return errors.partition("error: ")[2].strip()


@pytest.fixture
def mlp_run(blob_file, tmp_path):
    """A run of train_mlp.py, to be changed."""
    assert train_on(blob_file, "--epochs", "1", "--out", tmp_path / "run") == 0
    return tmp_path / "run"


def test_what_cannot_be_classified_is_refused(mlp_run, blob_file, tmp_path, capsys):
    pytest.importorskip("PIL", reason="image files need Pillow, which is optional")
    capsys.readouterr()
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 and nothing more")
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "huge.npz", np.full((1, 9, 6), 3e38))
    for folder, path, words in (
        (mlp_run, tmp_path / "huge.npz", "huge.npz: cannot be read: the network's output is not "),
        (None, "x.npz", "--predict needs --out"),
        (tmp_path / "x", "x.npz", "there is no run in this folder"),
        (mlp_run, tmp_path / "x.npz", f"{tmp_path}/x.npz: cannot be read"),
        (mlp_run, blob_file, "expected one array, found"),
        (mlp_run, "nowhere.npz", "nowhere.npz"),
        (mlp_run, tmp_path / "empty", "there is no image in this folder"),
    ):
        assert words in refusal_of(folder, path, capsys)


def test_samples_are_classified_one_after_the_other(mlp_run, tmp_path):
    model = classification.load_model(str(mlp_run), train_mlp.MLPOptions, train_mlp.build_mlp)
    images = np.zeros((260, 9, 6))
    images[-1] = 3e38
    np.savez(tmp_path / "x.npz", images)
    found = classification.classify_file(model, str(tmp_path / "x.npz"))
    names = [next(found)[0] for _ in range(250)]
    assert names[-1] == f"{tmp_path}/x.npz[249]"
    with pytest.raises(ValueError, match="x.npz: cannot be read: the network's output is not fin"):
        next(found)


def test_the_bytes_of_a_name_are_printed_as_they_are(mlp_run, blob_file, tmp_path, capsysbinary):
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    try:
        with open(name, "wb") as file:
            file.write(idx(IMAGES[:1]))
    except OSError:
        pytest.skip("this file system takes no such name")
    capsysbinary.readouterr()
    shutil.copy(blob_file, name + b".npz")
    assert train_on(os.fsdecode(name + b".npz"), "--epochs", "0") == 0
    assert capsysbinary.readouterr().out.startswith(name + b".npz: ")
    assert train_mlp.main(["--predict", os.fsdecode(name), "--out", str(mlp_run)]) == 0
    assert capsysbinary.readouterr().out.startswith(name + b"[0]  ")


def test_a_run_that_cannot_classify_says_why(mlp_run, tmp_path, capsys):
    sine = "--task sine --hidden 2 --epochs 1 --report-every 36"
    assert train_mlp.main([*sine.split(), "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert "has no classes to predict" in refusal_of(tmp_path, "x.png", capsys)
    assert train_cnn.main(["--predict", "x.png", "--out", str(mlp_run)]) == 2
    assert "this script has no --task" in capsys.readouterr().err
    (mlp_run / "model.npz").unlink()
    assert "there is no model.npz yet" in refusal_of(mlp_run, "x.png", capsys)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": None}, "there are no classes in it"),
        ({"classes": []}, "there are no classes in it"),
        ({"classes": [1, 2]}, "classes must be a list of names, got [1, 2]"),
        ({"sample_shape": [1, 2]}, "sample_shape must be (channels, height, width) or (features,)"),
        ({"sample_shape": [3, 9, -6]}, "sample_shape must be"),
        ({"pixel_range": 5}, "pixel_range must be [0, 1] or [-0.5, 0.5], got 5"),
        ({"sample_shape": [1, 10**5, 10**5]}, "no network of this size has been trained on"),
        ({"classes": ["a"] * 10**5}, "model.npz: out has "),
        ({"options": {"--kernel": 3}, "chosen": []}, "this script has no --kernel"),
        ({"options": {"--hidden": ["x"]}, "chosen": []}, "--hidden: "),
        ({"options": {"--hidden": 8}, "chosen": []}, ""),
        ({"options": {"--activation": "magic"}, "chosen": []}, "--activation: "),
        ({"options": {"--center": "false"}, "chosen": []}, "--center: expected true or false, got"),
        ({"options": {"--hidden": [9]}, "chosen": []}, "model.npz: hidden1 has "),
        ({"options": {"--hidden": [10**12]}, "chosen": []}, "run.json: is not what --out writes: "),
        ({"options": {"--" + "x" * 999: 1}, "chosen": []}, "this script has no --xxx"),
    ],
)
def test_a_run_that_was_changed_is_refused(change, words, mlp_run, tmp_path, capsys):
    capsys.readouterr()
    about = json.loads((mlp_run / "run.json").read_text())
    (mlp_run / "run.json").write_text(json.dumps({**about, **change}))
    np.savez(tmp_path / "x.npz", IMAGES)
    message = refusal_of(mlp_run, tmp_path / "x.npz", capsys)
    assert words in message
    assert len(message) < 500
