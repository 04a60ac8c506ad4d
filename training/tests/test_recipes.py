"""The recipes of benchmarks/recipes, in small."""

import importlib
import re
import sys

import numpy as np
import pytest

import purenn as nn
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
