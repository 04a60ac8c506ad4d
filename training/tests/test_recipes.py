"""The recipes of benchmarks/recipes, in small."""

import importlib
import re
import sys

import numpy as np
import pytest

import purenn as nn
from training.digits import draw_digits
from training.tests.conftest import REPOSITORY


def recipe(name, monkeypatch):
    """A file of benchmarks/recipes as a module."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks" / "recipes")
    return importlib.import_module(name)


# --- text.py ---


@pytest.fixture
def text(monkeypatch):
    """text.py with a twentieth of its texts."""
    module = recipe("text", monkeypatch)
    compose = module.compose
    monkeypatch.setattr(module, "compose", lambda seed, length: compose(seed, length // 20))
    return module


def test_the_surprise_at_a_character_is_that_of_all_that_could_stand_there(text):
    sample = text.compose(5, 2_000)
    for stop in range(len(sample)):
        costs = [text.surprise(sample[:stop] + character)[-1] for character in text.ALPHABET]
        assert np.exp2(-np.array(costs)).sum() == pytest.approx(1)
    lines = ["the cats that the dog follows see.", "the cat sees.", "the cat see.", "the cat", ""]
    assert text.right(lines) == "2 of 5"


@pytest.mark.parametrize("model", ["transformer", "gru"])
def test_a_model_learns_text_without_looking_ahead_and_continues_it(model, text, capsys):
    text.main(["--model", model, "--steps", "20", "--write", "60"])
    printed = capsys.readouterr().out
    learned, least = re.search(r"new text: (.+) bits per character, (.+) by", printed).groups()
    assert 0.4 < float(least) < 0.5 < float(learned) < 4.2  # it starts at 4.6 or more
    assert re.search(r"\n0 of (\d+) sentences are right, 0 of \d+ that", printed)

    net = nn.sequential(**text.MODELS[model]())
    params, _ = net.init(0, (text.CONTEXT,))
    x = np.array([text.encode(text.compose(2, 800))])
    other = np.append(x[:, :-1], (x[:, -1:] + 1) % len(text.ALPHABET), axis=1)
    both = [net.forward(params, numbers)[0] for numbers in (x, other)]
    assert np.array_equal(both[0][:, :-1], both[1][:, :-1])
    assert not np.array_equal(both[0][:, -1], both[1][:, -1])
    written = [text.continue_text(net, params, "\nthe", 80, seed) for seed in (0, 0, 1)]
    assert written[0] == written[1] != written[2]
    assert len(written[0]) == 84


@pytest.mark.parametrize("model", ["transformer", "gru"])
def test_a_model_of_text_learns_as_in_pytorch(model, text, capsys):
    pytest.importorskip("torch")
    text.main(["--model", model, "--torch", "--steps", "4"])
    found = re.findall(
        r"(float\d\d): from (.+) to (.+) bits .* 4 steps; at most (\S+) from",
        capsys.readouterr().out,
    )
    assert [name for name, *_ in found] == ["float64", "float32"]
    for (_, first, last, apart), most in zip(found, (1e-12, 1e-4), strict=True):
        assert float(apart) < most
        assert float(last) < float(first)


def test_a_comparison_with_pytorch_says_what_it_needs(text, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "text_torch", raising=False)
    with pytest.raises(SystemExit) as stopped:
        text.main(["--torch"])
    assert stopped.value.code == 2
    assert "error: --torch needs PyTorch: pip install torch\n" in capsys.readouterr().err


# --- autoencoder.py, two_inputs.py, from_pytorch.py, imbalance.py ---


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder with a few synthetic digits."""
    folder = tmp_path_factory.mktemp("digits")
    x_train, y_train = draw_digits(0, 500)
    x_test, y_test = draw_digits(1, 200)
    np.savez(folder / "d.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return str(folder)


def numbers(pattern, capsys):
    """The numbers that a recipe printed, a row for each place where the pattern fits."""
    return [
        [*map(float, match.groups())] for match in re.finditer(pattern, capsys.readouterr().out)
    ]


def test_an_autoencoder_learns_and_draws(digits, tmp_path, monkeypatch, capsys):
    module = recipe("autoencoder", monkeypatch)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    module.main(["--data", digits, "--code", "8", "--epochs", "10", "--out", str(tmp_path)])
    printed = capsys.readouterr()
    assert "no picture: pictures need matplotlib: pip install matplotlib\n" in printed.out
    errors = dict(re.findall(r"(.+): mean squared error (\S+) per pixel", printed.out))
    assert list(errors) == ["mean image", "8 principal components", "autoencoder, 8 numbers"]
    mean, _, learned = map(float, errors.values())
    assert learned < mean
    params = nn.load(tmp_path / "model.npz")
    halves = module.build(8)
    x = draw_digits(2, 3)[0][:, None] / np.float32(255)
    codes, _ = halves["encoder"].forward(params["encoder"], x)
    logits, _ = nn.sequential(**halves).forward(params, x)
    assert (codes.shape, logits.shape) == ((3, 8), x.shape)
    assert np.array_equal(logits, halves["decoder"].forward(params["decoder"], codes)[0])

    monkeypatch.undo()
    plt = pytest.importorskip("matplotlib.pyplot", reason="pictures need matplotlib")
    module.draw(tmp_path / "drawn.png", halves, params, x)
    tiles = plt.imread(tmp_path / "drawn.png")[1::3, 1::3, 0].reshape(3, 28, 3, 28)
    drawn, between = np.split(tiles.transpose(0, 2, 1, 3), [2])
    pixels = 1 / (1 + np.exp(-logits[:, 0]))
    np.testing.assert_allclose(drawn, [x[:, 0], pixels], atol=1 / 128)
    np.testing.assert_allclose(between[0, [0, -1]], pixels[[0, -1]], atol=1 / 128)


def test_principal_components_are_exact_for_data_of_few(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 10)) + rng.normal(size=10)
    components = recipe("autoencoder", monkeypatch).principal_components
    np.testing.assert_allclose(components(x[:30], x[30:], 3), x[30:], atol=1e-9)
    assert np.abs(components(x[:30], x[30:], 2) - x[30:]).max() > 0.1


def test_two_inputs_are_learned_from_half_of_the_totals(digits, tmp_path, monkeypatch, capsys):
    module = recipe("two_inputs", monkeypatch)
    module.main(["--data", digits, "--epochs", "12", "--out", str(tmp_path)])
    rows = numbers(r"accuracy of the digit (\S+), mean error of the total (\S+)", capsys)
    (right, error), (guessed, without_image), (same, without_prices) = rows
    assert guessed + 0.3 < right == pytest.approx(same, abs=0.1)
    assert error < min(without_image, without_prices) - 0.5

    params, net = nn.load(tmp_path / "model.npz"), module.build()
    images, labels = draw_digits(3, 4)
    x, target = module.orders(images[:, None] / np.float32(255), labels, 4)
    np.testing.assert_allclose(
        target["total"][:, 0], labels * x["prices"][:, 0] + x["prices"][:, 1]
    )
    y = nn.tree_map(np.float64, net.forward(params, x)[0])
    loss, slopes = module.order_loss(y, target)
    assert (slopes["total"][:, 0] != 0).tolist() == target["known"].tolist() == [True, False] * 2
    for name, index in (("digit", (1, 2)), ("total", (2, 0))):
        moved = nn.tree_map(np.copy, y)
        moved[name][index] += 1e-6
        slope = (module.order_loss(moved, target)[0] - loss) / 1e-6
        assert slopes[name][index] == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_a_network_from_pytorch_gives_the_same_there_and_back(
    digits, tmp_path, monkeypatch, capsys
):
    torch = pytest.importorskip("torch")
    recipe("from_pytorch", monkeypatch).main(["--data", digits, "--out", str(tmp_path)])
    pattern = r"accuracy (\S+) there, (\S+) here; largest difference (\S+)"
    rows = numbers(pattern, capsys)
    assert len(rows) == 4
    for there, here, difference in rows:
        assert there == here
        assert difference < 1e-4
    assert rows[0] != rows[2]
    assert torch.load(tmp_path / "model.pt")["9.weight"].shape == (10, 784)


def test_the_recipe_from_pytorch_says_what_it_needs(monkeypatch):
    monkeypatch.delitem(sys.modules, "from_pytorch", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match=r"needs PyTorch .*: pip install torch"):
        recipe("from_pytorch", monkeypatch)


def test_class_weights_find_more_of_a_rare_class(digits, tmp_path, monkeypatch, capsys):
    module = recipe("imbalance", monkeypatch)
    module.main(["--data", digits, "--seeds", "2", "--samples", "400", "--out", str(tmp_path)])
    printed = np.ravel(numbers(r"weighted: (\S+) ±", capsys))
    lines = (tmp_path / "imbalance.csv").read_text().splitlines()
    assert lines[0] == ",".join(module.COLUMNS)
    table = np.array([line.split(",") for line in lines[1:]], float)
    np.testing.assert_allclose(table.mean(axis=0), printed, atol=6e-4)
    assert printed[0] < printed[2]  # recall, and below it accuracy
    assert printed[1] > 0.5

    labels = np.arange(2_000) % 10
    index = module.choose(labels, 3, 1_000, 0)
    assert len(set(index)) == 1_000 == 100 * np.sum(labels[index] == 3)
    logits = np.eye(3)[[0, 1, 1, 2, 0]]
    np.testing.assert_array_equal(module.recalls(logits, np.array([0, 0, 1, 2, 2])), [0.5, 1, 0.5])


# --- README.md ---


def test_blocks_of_the_readme_run_one_after_the_other():
    text = (REPOSITORY / "benchmarks" / "recipes" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    namespace = {"__name__": "readme"}
    exec(compile("\n".join(blocks), "benchmarks/recipes/README.md", "exec"), namespace)
    whole = namespace["gradients"](namespace["params"], namespace["x"], namespace["labels"])[1]
    for name, gradient in nn.tree_flatten(namespace["grads"]).items():  # accumulated
        np.testing.assert_allclose(gradient, nn.tree_flatten(whole)[name], atol=1e-6)
    assert namespace["best"][0] < np.inf
    assert not namespace["finished"]
