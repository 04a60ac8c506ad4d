"""The network at inference: its output, and the outputs of its layers."""

import numpy as np
import pytest

import purenn as nn
from train_cnn import CNNOptions, build_cnn
from train_mlp import MLPOptions, build_mlp
from training import prediction

X = np.random.default_rng(0).normal(size=(2, 1, 20, 19)).astype(np.float32)


@pytest.fixture(scope="module")
def network():
    """(net, params) of a CNN with two convolutions a stage."""
    options = CNNOptions(
        channels=(3, 4),
        convolutions=2,
        kernel=3,
        pool=3,
        pooling="average",
        batch_norm=False,
        activation="tanh",
        hidden=(),
    )
    net = build_cnn(options, 5)
    params, shape = net.init(0, X.shape[1:])
    assert shape == (5,)
    return net, params


def test_every_layer_gives_its_own_output(network):
    net, params = network
    outputs = dict(prediction.layer_outputs(net, params, X))
    assert list(outputs) == list(prediction.layers_of(net))
    shapes = {
        "conv1_1": (3, 20, 19), "convact1_1": (3, 20, 19), "conv1_2": (3, 20, 19),
        "convact1_2": (3, 20, 19), "pool1": (3, 6, 6), "conv2_1": (4, 6, 6),
        "convact2_1": (4, 6, 6), "conv2_2": (4, 6, 6), "convact2_2": (4, 6, 6),
        "pool2": (4, 2, 2), "flatten": (16,), "out": (5,),
    }  # fmt: skip
    assert {name: y.shape[1:] for name, y in outputs.items()} == shapes
    assert set(params["conv1_1"]) == {"W", "b"}
    np.testing.assert_array_equal(outputs["convact1_1"], np.tanh(outputs["conv1_1"]))
    pooled = outputs["convact1_2"][:, :, :18, :18].reshape(2, 3, 6, 3, 6, 3).mean(axis=(3, 5))
    np.testing.assert_allclose(outputs["pool1"], pooled, atol=1e-6)
    np.testing.assert_array_equal(outputs["out"], net.forward(params, X)[0])


def test_where_it_began_not_to_be_finite(network):
    net, params = network
    assert prediction.first_not_finite(net, params, X) == "every output is finite"
    for name, entry, value, words in (
        ("conv2_1", "b", np.nan, "conv2_1/b is not finite, so its gradient was not"),
        ("conv2_2", "W", 3e38, "the output of conv2_2 is not finite"),
    ):
        broken = nn.tree_map(np.copy, params)
        broken[name][entry][:] = value
        with np.errstate(all="ignore"):
            assert prediction.first_not_finite(net, broken, X) == words


def test_a_network_of_a_billion_layers_is_refused_before_it_is_built():
    with pytest.raises(ValueError, match="^--convolutions 1000000000: these are more than 1,000 l"):
        build_cnn(CNNOptions(convolutions=10**9), 5)


def test_the_summary_counts_the_parameters_of_the_fifth_report():
    options = CNNOptions(
        channels=(4, 4), kernel=3, pooling="average", hidden=(), batch_norm=False, dropout=0.0
    )
    assert nn.summary(build_cnn(options, 10), (1, 28, 28)).splitlines() == [
        "conv1     conv2d      (4, 28, 28)     40",
        "convact1  relu        (4, 28, 28)      0",
        "pool1     avg_pool2d  (4, 14, 14)      0",
        "conv2     conv2d      (4, 14, 14)    148",
        "convact2  relu        (4, 14, 14)      0",
        "pool2     avg_pool2d  (4, 7, 7)        0",
        "flatten   flatten     (196,)           0",
        "out       linear      (10,)        1,970",
        "total                              2,158",
    ]
    net = build_mlp(MLPOptions(hidden=(100, 50), batch_norm=False, dropout=0.0), 10)
    assert nn.summary(net, (1, 28, 28)).split()[-2:] == ["total", "84,060"]
