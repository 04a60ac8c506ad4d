"""--predict: images of any kind, classified by the network in a run folder."""

import json

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
    for folder, path, words in (
        (None, "x.npz", "--predict needs --out"),
        (tmp_path / "x", "x.npz", "run.json"),
        (mlp_run, tmp_path / "x.npz", f"{tmp_path}/x.npz: cannot be read"),
        (mlp_run, blob_file, "expected one array, found"),
        (mlp_run, "nowhere.npz", "nowhere.npz"),
        (mlp_run, tmp_path / "empty", "there is no image in this folder"),
    ):
        assert words in refusal_of(folder, path, capsys)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": None}, "there are no classes in it"),
        ({"classes": [1, 2]}, "there are no classes in it"),
        ({"sample_shape": [1]}, "sample_shape must be (channels, height, width), got [1]"),
        ({"sample_shape": [3, 9, -6]}, "sample_shape must be"),
        ({"options": {"--kernel": 3}, "chosen": []}, "this script has no --kernel"),
        ({"options": {"--hidden": ["x"]}, "chosen": []}, "--hidden: "),
        ({"options": {"--hidden": 8}, "chosen": []}, ""),
        ({"options": {"--activation": "magic"}, "chosen": []}, "--activation: "),
        ({"options": {"--hidden": [9]}, "chosen": []}, "model.npz: hidden1 has "),
    ],
)
def test_a_run_that_was_changed_is_refused(change, words, mlp_run, tmp_path, capsys):
    capsys.readouterr()
    about = json.loads((mlp_run / "run.json").read_text())
    (mlp_run / "run.json").write_text(json.dumps({**about, **change}))
    np.savez(tmp_path / "x.npz", IMAGES)
    assert words in refusal_of(mlp_run, tmp_path / "x.npz", capsys)
