"""Tests of purenn: every layer through one harness, everything else against its formula.

HYPOTHESIS_PROFILE=wide looks further than the quick default, which draws the same cases each time.
"""

import argparse
import ast
import contextlib
import csv
import errno
import gc
import gzip
import hashlib
import http.server
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import pickle
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import types
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import purenn as nn
import train_cnn
import train_mlp

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=20,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("wide", deadline=None, max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# ------------------------------------------------------------------------------------------------
# The harness: one line a layer
# ------------------------------------------------------------------------------------------------

sizes = st.integers(1, 5)
any_shape = st.lists(sizes, max_size=3).map(tuple)
features = st.lists(sizes, min_size=1, max_size=3).map(tuple)
images = st.tuples(st.just(2), st.integers(5, 6), st.integers(5, 7))
channels = st.one_of(st.tuples(sizes), st.tuples(sizes, sizes, sizes))
rates = st.sampled_from([0.0, 0.2, 0.5, 0.9])
slopes = st.floats(-2, 2, allow_nan=False)


def bottleneck(units):
    """A residual block whose shortcut has params as well."""
    branch = nn.sequential(nn.linear(units), nn.tanh(), nn.dropout(0.3), nn.linear(3))
    return nn.residual(branch, nn.linear(3, bias=False))


def network(units):
    """Layers of all kinds, named and unnamed, nested."""
    block = nn.sequential(nn.layer_norm(), nn.linear(units), nn.gelu(), nn.linear(units))
    return nn.sequential(
        nn.flatten(),
        nn.linear(units),
        norm=nn.batch_norm(),
        act=nn.elu(),
        block=nn.residual(block),
        drop=nn.dropout(0.4),
        out=nn.linear(2),
    )


def pairs(low, high):
    one = st.integers(low, high)
    return st.one_of(one, st.tuples(one, one))


@st.composite
def convolutions(draw):
    """conv2d with any options, for 2 channels."""
    groups = draw(st.sampled_from([1, 1, 2]))
    stride = draw(pairs(1, 3))
    paddings = pairs(0, 3) if stride not in (1, (1, 1)) else st.one_of(pairs(0, 3), st.just("same"))
    return nn.conv2d(
        groups * draw(st.integers(1, 2)),
        draw(pairs(1, 3)),
        stride=stride,
        padding=draw(paddings),
        dilation=draw(pairs(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
    )


@st.composite
def pools(draw, constructor):
    size = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = tuple(draw(st.integers(0, places // 2)) for places in size)
    return constructor(size, draw(st.one_of(st.none(), pairs(1, 3))), padding)


LAYERS = {  # name: layers with generated options, shapes of one sample
    "linear": (st.builds(nn.linear, sizes, bias=st.booleans()), features),
    "identity": (st.builds(nn.identity), any_shape),
    "flatten": (st.builds(nn.flatten), any_shape),
    "relu": (st.builds(nn.relu), any_shape),
    "leaky_relu": (st.builds(nn.leaky_relu, slopes), any_shape),
    "elu": (st.builds(nn.elu, st.floats(0.1, 3)), any_shape),
    "sigmoid": (st.builds(nn.sigmoid), any_shape),
    "tanh": (st.builds(nn.tanh), any_shape),
    "softplus": (st.builds(nn.softplus), any_shape),
    "gelu": (st.builds(nn.gelu), any_shape),
    "silu": (st.builds(nn.silu), any_shape),
    "softmax": (st.builds(nn.softmax), features),
    "log_softmax": (st.builds(nn.log_softmax), features),
    "dropout": (st.builds(nn.dropout, rates), any_shape),
    "batch_norm": (st.builds(nn.batch_norm, st.sampled_from([1e-5, 1e-2])), channels),
    "layer_norm": (st.builds(nn.layer_norm, st.sampled_from([1e-5, 1e-2])), features),
    "conv2d": (convolutions(), images),
    "max_pool2d": (pools(nn.max_pool2d), images),
    "avg_pool2d": (pools(nn.avg_pool2d), images),
    "global_avg_pool2d": (st.builds(nn.global_avg_pool2d), images),
    "sequential": (st.builds(network, sizes), features),
    "residual": (st.builds(bottleneck, sizes), features),
}
BATCH_STATISTICS = {"batch_norm", "sequential"}  # layers whose samples meet while training
RANDOM = {"dropout", "residual", "sequential"}  # layers that draw from their key

PAIRS = [
    "linear",
    "identity",
    "flatten",
    "relu",
    "leaky_relu",
    "elu",
    "sigmoid",
    "tanh",
    "softplus",
]
PAIRS += ["gelu", "silu", "softmax", "log_softmax", "dropout", "batch_norm", "layer_norm"]
every_layer = pytest.mark.parametrize("name", LAYERS)


def with_values(params, seed):
    """params whose entries are all random, so that no bias is 0 and no gamma 1; var > 0."""
    flat = nn.tree_flatten(params)
    rng = np.random.default_rng(seed)
    for path, entry in flat.items():
        values = rng.normal(size=entry.shape).astype(entry.dtype)
        flat[path] = np.abs(values) + entry.dtype.type(0.5) if path.endswith("var") else values
    return nn.tree_unflatten(flat)


def as_dtype(tree, dtype):
    return nn.tree_map(lambda a: a.astype(dtype) if a.dtype.kind == "f" else a, tree)


@st.composite
def cases(draw, name, dtypes=(np.float32, np.float64), least=1, modes=(False, True)):
    """(layer, params, x, shape of y): of one layer, in one dtype, training or not."""
    layers, shapes = LAYERS[name]
    layer, shape, seed = draw(layers), draw(shapes), draw(st.integers(0, 10**6))
    dtype, in_training = np.dtype(draw(st.sampled_from(dtypes))), draw(st.sampled_from(modes))
    batch = draw(st.integers(max(least, 2 if name in BATCH_STATISTICS else 1), 5))
    params, out = layer.init(seed, shape)
    params = as_dtype(with_values(params, seed), dtype)
    x = np.random.default_rng(seed).normal(size=(batch, *shape))
    x = (x + 0.01 * np.sign(x)).astype(dtype)  # away from the kinks at 0
    return layer, nn.training(params, seed) if in_training else params, x, (batch, *out)


ORDERS = ["F", "batch last", "rows first", "reversed", "strided"]


def in_order(x, order):
    """The same values in another memory order."""
    if order == "batch last":
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 0, -1)), -1, 0)
    if order == "rows first":  # as conv2d lays it out: (H, C, W, N) for x (N, C, H, W)
        axes = (2, 1, 3, 0) if x.ndim == 4 else tuple(reversed(range(x.ndim)))
        return np.ascontiguousarray(x.transpose(axes)).transpose(np.argsort(axes))
    if order == "reversed":
        return x[::-1].copy()[::-1]
    if order == "strided":
        wide = np.zeros((*x.shape, 2), x.dtype)
        wide[..., 0] = x
        return wide[..., 0]
    return np.asarray(x, order=order)


def frozen(tree):
    """A copy of a tree whose arrays cannot be written to."""

    def freeze(leaf):
        if not isinstance(leaf, np.ndarray):
            return leaf
        leaf = leaf.copy(order="K")
        leaf.flags.writeable = False
        return leaf

    return nn.tree_map(freeze, tree)


def all_bytes(*trees):
    """Every bit of some trees, to be compared."""
    return [
        (path, leaf.dtype, leaf.shape, leaf.tobytes())
        for index, tree in enumerate(trees)
        for path, leaf in sorted(nn.tree_flatten({str(index): tree}).items())
    ]


def upstream(y, seed=7):
    """A random gradient for y."""
    return np.random.default_rng(seed).normal(size=y.shape).astype(y.dtype)


def numeric_gradient(function, array, step=1e-5):
    """Central differences of a scalar function for every entry of an array."""
    gradient = np.zeros(array.shape)
    for index in np.ndindex(array.shape):
        higher, lower = array.copy(), array.copy()
        higher[index] += step
        lower[index] -= step
        gradient[index] = (function(higher) - function(lower)) / (2 * step)
    return gradient


@every_layer
@given(data=st.data())
def test_output_has_the_shape_that_init_said_and_the_dtype_of_x(name, data):
    layer, params, x, shape = data.draw(cases(name))
    y, cache = layer.forward(params, x)
    dx, grads = layer.backward(params, cache, upstream(y))
    assert (y.shape, y.dtype) == (shape, x.dtype)
    assert (dx.shape, dx.dtype) == (x.shape, x.dtype)
    flat = nn.tree_flatten(params)
    for path, g in nn.tree_flatten(grads).items():
        assert (g.shape, g.dtype) == (flat[path].shape, x.dtype)


@every_layer
@given(data=st.data())
def test_grads_hold_exactly_the_trained_entries(name, data):
    layer, params, x, _ = data.draw(cases(name))
    y, cache = layer.forward(params, x)
    grads = layer.backward(params, cache, upstream(y))[1]
    untrained = ("mean", "var", "key")
    trained = [path for path in nn.tree_flatten(params) if path.split("/")[-1] not in untrained]
    assert list(nn.tree_flatten(grads)) == trained


@every_layer
@given(data=st.data())
def test_float32_params_do_not_change_the_dtype_of_x(name, data):
    layer, params, x, _ = data.draw(cases(name, dtypes=[np.float64]))
    y, cache = layer.forward(as_dtype(params, np.float32), x)
    dx, _ = layer.backward(as_dtype(params, np.float32), cache, upstream(y).astype(np.float32))
    assert y.dtype == dx.dtype == np.float64
    y, cache = layer.forward(params, x.astype(np.float32))
    dx, _ = layer.backward(params, cache, upstream(y).astype(np.float64))
    assert y.dtype == dx.dtype == np.float32


@every_layer
@settings(max_examples=12)
@given(data=st.data())
def test_gradients_are_those_of_central_differences(name, data):
    layer, params, x, _ = data.draw(cases(name, dtypes=[np.float64]))
    y, cache = layer.forward(params, x)
    r = upstream(y)
    dx, grads = layer.backward(params, cache, r)
    numeric = numeric_gradient(lambda x: (layer.forward(params, x)[0] * r).sum(), x)
    np.testing.assert_allclose(dx, numeric, rtol=1e-5, atol=1e-6 * max(1, np.abs(numeric).max()))
    flat = nn.tree_flatten(params)
    for path, g in nn.tree_flatten(grads).items():

        def loss(entry, path=path):
            moved = nn.tree_unflatten({**flat, path: entry})
            return (layer.forward(moved, x)[0] * r).sum()

        numeric = numeric_gradient(loss, flat[path])
        np.testing.assert_allclose(g, numeric, rtol=1e-5, atol=1e-6 * max(1, np.abs(numeric).max()))


@every_layer
@settings(max_examples=8)
@given(data=st.data())
def test_check_gradients_agrees(name, data):
    layer, params, x, _ = data.draw(cases(name))
    nn.check_gradients(layer, params, x)


@every_layer
@given(data=st.data())
def test_nothing_is_written_to_and_the_same_call_gives_the_same_bits(name, data):
    layer, params, x, _ = data.draw(cases(name))
    params, x = frozen(params), frozen({"x": x})["x"]
    before = all_bytes(params, x)
    y, cache = layer.forward(params, x)
    dy = frozen({"dy": upstream(y)})["dy"]
    cache = frozen({"cache": cache})["cache"]
    seen = all_bytes(cache)
    dx, grads = layer.backward(params, cache, dy)
    again, cache_again = layer.forward(params, x)
    assert all_bytes(again, cache_again) == all_bytes(y, cache)
    assert all_bytes(*layer.backward(params, cache, dy)) == all_bytes(dx, grads)
    assert all_bytes(params, x) == before
    assert all_bytes(cache) == seen


@every_layer
@given(data=st.data(), order=st.sampled_from(ORDERS))
def test_memory_order_is_irrelevant(name, data, order):
    layer, params, x, _ = data.draw(cases(name))
    y, cache = layer.forward(params, x)
    dx, grads = layer.backward(params, cache, upstream(y))
    moved = nn.tree_map(
        lambda a: in_order(a, order) if a.ndim and a.dtype.kind == "f" else a, params
    )
    y2, cache2 = layer.forward(moved, in_order(x, order))
    dx2, grads2 = layer.backward(moved, cache2, in_order(upstream(y), order))
    tolerance = 1e-4 if x.dtype == np.float32 else 1e-10
    same = partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    same(y2, y)
    same(dx2, dx)
    nn.tree_map(same, grads2, grads)


@every_layer
@given(data=st.data())
def test_a_layer_survives_pickling(name, data):
    layer, params, x, _ = data.draw(cases(name))
    copy = pickle.loads(pickle.dumps(layer))
    y, cache = layer.forward(params, x)
    assert all_bytes(*copy.forward(params, x)) == all_bytes(y, cache)
    dy = upstream(y)
    assert all_bytes(*copy.backward(params, cache, dy)) == all_bytes(
        *layer.backward(params, cache, dy)
    )
    assert all_bytes(copy.init(3, x.shape[1:])[0]) == all_bytes(layer.init(3, x.shape[1:])[0])


@every_layer
@given(data=st.data())
def test_the_gradient_of_a_batch_is_the_sum_over_its_parts(name, data):
    # While training, a sample may depend on the others, or on its place in the mask.
    modes = [False] if name in BATCH_STATISTICS | RANDOM else [False, True]
    layer, params, x, _ = data.draw(cases(name, dtypes=[np.float64], least=2, modes=modes))
    y, cache = layer.forward(params, x)
    dy = upstream(y)
    dx, grads = layer.backward(params, cache, dy)
    parts = []
    for part in (slice(0, 1), slice(1, None)):
        y_part, cache = layer.forward(params, x[part])
        np.testing.assert_allclose(y_part, y[part], rtol=1e-10, atol=1e-12)
        parts.append(layer.backward(params, cache, dy[part]))
    np.testing.assert_allclose(np.concatenate([p[0] for p in parts]), dx, rtol=1e-9, atol=1e-11)
    total = nn.tree_add(*(p[1] for p in parts))
    nn.tree_map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), total, grads)


@every_layer
@given(data=st.data())
def test_init_is_pure_and_float32_and_depends_on_its_key(name, data):
    layers, shapes = LAYERS[name]
    layer, shape = data.draw(layers), data.draw(shapes)
    params, out = layer.init((1, 2), shape)
    assert all_bytes(layer.init((1, 2), list(shape))[0]) == all_bytes(params)
    assert all(leaf.dtype == np.float32 for leaf in nn.tree_flatten(params).values())
    assert isinstance(out, tuple)
    other = nn.tree_flatten(layer.init((2, 1), shape)[0])
    for path, leaf in nn.tree_flatten(params).items():
        if leaf.ndim == 2:
            assert not np.array_equal(leaf, other[path])


@every_layer
@given(data=st.data())
def test_an_empty_batch_passes_at_inference(name, data):
    layer, params, x, shape = data.draw(cases(name, modes=[False]))
    y, cache = layer.forward(params, x[:0])
    dx, grads = layer.backward(params, cache, y)
    assert y.shape == (0, *shape[1:])
    assert dx.shape == x[:0].shape
    assert all(not leaf.any() for leaf in nn.tree_flatten(grads).values())


NOT_ARRAYS = [[[1.0, 2.0]], None, 1.0, "x", np.ma.masked_array([[1.0]]), np.float32(1)]
NOT_FLOATS = [
    np.ones((2, 2), dtype) for dtype in (np.int64, np.uint8, bool, np.float16, object, complex)
]


@every_layer
@given(data=st.data())
def test_bad_input_is_refused_by_name(name, data):
    layer, params, x, _ = data.draw(cases(name))
    y, cache = layer.forward(params, x)
    words = (
        "linear|flatten|norm|residual|sequential" if name in ("sequential", "residual") else name
    )
    for bad in (*NOT_ARRAYS, *NOT_FLOATS):
        with pytest.raises(TypeError, match=words):
            layer.forward(params, bad)
    for bad in (None, [1], np.ones(2)):
        with pytest.raises(TypeError, match=f"{name}.*params must be a dict"):
            layer.forward(bad, x)
    with pytest.raises(ValueError, match=f"{name}: params have unknown entries \\['other'\\]"):
        layer.forward({**params, "other": x}, x)
    for bad in (None, [y], y.astype(int)):
        with pytest.raises(TypeError, match="must be"):
            layer.backward(params, cache, bad)
    with pytest.raises(ValueError, match=r"dy has shape \(.*\), but y has \("):
        layer.backward(params, cache, np.zeros((*y.shape, 2), y.dtype))
    for entry in set(params) - {"key", "b"}:
        rest = {other: value for other, value in params.items() if other != entry}
        with pytest.raises(ValueError, match=f"no entry '{entry}'|no entry '(W|gamma)'"):
            layer.forward(rest, x)
    for bad in (3, None, "shape"):
        with pytest.raises(TypeError, match="shape must be a tuple"):
            layer.init(0, bad)
    for bad in ((0,), (-1, 3)):
        with pytest.raises((TypeError, ValueError), match="size in shape|axes"):
            layer.init(0, bad)
    with pytest.raises(TypeError, match="size in shape must be a whole number"):
        layer.init(0, (2.5,))


def test_batch_axis_is_asked_for():
    params, _ = nn.linear(3).init(0, (4,))
    with pytest.raises(ValueError, match=r"linear: x must be \(N, ..., in\), got shape \(4,\)"):
        nn.linear(3).forward(params, np.ones(4))
    for layer in (nn.softmax(), nn.log_softmax()):
        with pytest.raises(ValueError, match=r"x must be \(N, ..., classes\), got shape \(4,\)"):
            layer.forward({}, np.ones(4))
        with pytest.raises(ValueError, match=r"no axis of classes"):
            layer.init(0, ())
    with pytest.raises(ValueError, match=r"layer_norm: x must be \(N, ..., C\)"):
        nn.layer_norm().forward({}, np.ones(4))
    with pytest.raises(ValueError, match="flatten: x must have a batch axis"):
        nn.flatten().forward({}, np.ones(()))
    for layer in (nn.linear(3), nn.layer_norm()):
        with pytest.raises(ValueError, match=r"shape \(\) has no axis of features"):
            layer.init(0, ())
    for shape in ((), (2, 2), (1, 2, 3, 4)):
        with pytest.raises(ValueError, match="batch_norm: shape .* axes, expected 1 or 3"):
            nn.batch_norm().init(0, shape)


def test_params_that_are_not_arrays_of_floats_are_refused_by_name():
    x = np.ones((2, 3))
    for layer in (nn.linear(3), nn.batch_norm(), nn.layer_norm()):
        params, _ = layer.init(0, (3,))
        for entry in params:
            for bad in (params[entry].tolist(), None, params[entry].astype(int), 1.0):
                with pytest.raises(TypeError, match=rf"^\w+: {entry} must be"):
                    layer.forward({**params, entry: bad}, x)


def test_an_axis_without_entries_has_no_statistics():
    params, _ = nn.layer_norm().init(0, (3,))
    for layer in (nn.layer_norm(), nn.softmax(), nn.log_softmax()):
        own = params if layer.init is nn.layer_norm_init else {}
        assert layer.forward(own, np.ones((2, 0, 3)))[0].shape == (2, 0, 3)
        with pytest.raises(ValueError, match=r"x must be \(N, ..., \w+\), got shape \(2, 3, 0\)"):
            layer.forward(own, np.ones((2, 3, 0)))


def test_the_cache_of_another_layer_is_refused():
    for layer in (nn.dropout(0.5), nn.batch_norm(), nn.layer_norm(), nn.max_pool2d(1)):
        for bad in ({}, {"other": np.ones((2, 3))}, np.ones((2, 3)), None):
            names = "dropout|batch_norm|layer_norm|max_pool2d"
            with pytest.raises(ValueError, match=f"^({names}): the cache is not its own"):
                layer.backward({}, bad, np.ones((2, 3)))


def test_a_mapped_file_is_an_array(tmp_path):
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(4, 3))
    x[:] = np.arange(12).reshape(4, 3)
    params, _ = nn.linear(2).init(0, (3,))
    y, cache = nn.linear_forward(params, x)
    assert y.tobytes() == nn.linear_forward(params, np.array(x))[0].tobytes()
    assert nn.linear_backward(params, cache, y)[0].shape == (4, 3)


@every_layer
@given(data=st.data())
def test_a_gradient_of_another_shape_is_refused(name, data):
    layer, params, x, shape = data.draw(cases(name))
    _, cache = layer.forward(params, x)
    axis = data.draw(st.integers(0, len(shape) - 1))
    longer = tuple(size + (place == axis) for place, size in enumerate(shape))
    shorter = tuple(size - (place == axis) for place, size in enumerate(shape))
    for other in (longer, shorter, (*shape, 1), shape[:-1]):
        with pytest.raises(ValueError, match=r"dy has shape \(.*\), but y has \("):
            layer.backward(params, cache, np.ones(other, x.dtype))


def test_what_has_the_right_dtype_is_not_copied():
    x, dy = np.ones((2, 3)), np.ones((2, 3))
    assert nn.identity_backward({}, x, dy)[0] is dy
    for dtype in (np.float32, np.float64):
        params, _ = nn.batch_norm().init(0, (3,))
        params = as_dtype(params, dtype)
        statistics = nn.batch_norm().forward(params, x)[1]["statistics"]
        assert (statistics["mean"] is params["mean"]) == (dtype == x.dtype)
        assert statistics["mean"].dtype == x.dtype


@every_layer
@settings(max_examples=2)
@given(data=st.data())
def test_every_argument_can_be_given_by_its_name(name, data):
    layer, params, x, shape = data.draw(cases(name))
    assert layer.init(key=0, shape=x.shape[1:])[1] == shape[1:]
    y, cache = layer.forward(params=params, x=x)
    assert layer.backward(params=params, cache=cache, dy=y)[0].shape == x.shape


def test_linear_names_the_features_of_an_input_with_leading_axes():
    params, _ = nn.linear(2).init(0, (3,))
    with pytest.raises(ValueError, match="^linear: x has 5 features, but W takes 3$"):
        nn.linear_forward(params, np.ones((4, 3, 5)))
    x = np.random.default_rng(0).normal(size=(4, 5, 3))
    y, cache = nn.linear_forward(params, x)
    np.testing.assert_allclose(y, np.einsum("nti,io->nto", x, params["W"].astype(np.float64)))
    _, grads = nn.linear_backward(params, cache, upstream(y))
    np.testing.assert_allclose(grads["W"], np.einsum("nti,nto->io", x, upstream(y)))
    np.testing.assert_allclose(grads["b"], upstream(y).sum(axis=(0, 1)))
    nothing, same = nn.linear_backward(params, cache, upstream(y), need_dx=False)
    assert nothing is None
    assert all_bytes(same) == all_bytes(grads)


# ------------------------------------------------------------------------------------------------
# Layers against their formulas
# ------------------------------------------------------------------------------------------------

FORMULAS = {
    "identity": (nn.identity(), lambda x: x),
    "relu": (nn.relu(), lambda x: max(x, 0.0)),
    "leaky_relu": (nn.leaky_relu(), lambda x: x if x > 0 else 0.01 * x),
    "leaky_relu(0.3)": (nn.leaky_relu(0.3), lambda x: x if x > 0 else 0.3 * x),
    "elu": (nn.elu(), lambda x: x if x > 0 else math.exp(x) - 1),
    "elu(2)": (nn.elu(2), lambda x: x if x > 0 else 2 * (math.exp(x) - 1)),
    "sigmoid": (nn.sigmoid(), lambda x: 1 / (1 + math.exp(-x))),
    "tanh": (nn.tanh(), math.tanh),
    "softplus": (nn.softplus(), lambda x: math.log(1 + math.exp(x))),
    "gelu": (
        nn.gelu(),
        lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ),
    "silu": (nn.silu(), lambda x: x / (1 + math.exp(-x))),
}
LIMITS = {  # y at -10,000 and at 10,000, and the slopes there
    "identity": (-1e4, 1e4, 1, 1),
    "relu": (0, 1e4, 0, 1),
    "leaky_relu": (-1e2, 1e4, 0.01, 1),
    "leaky_relu(0.3)": (-3e3, 1e4, 0.3, 1),
    "elu": (-1, 1e4, 0, 1),
    "elu(2)": (-2, 1e4, 0, 1),
    "sigmoid": (0, 1, 0, 0),
    "tanh": (-1, 1, 0, 0),
    "softplus": (0, 1e4, 0, 1),
    "gelu": (0, 1e4, 0, 1),
    "silu": (0, 1e4, 0, 1),
}


@pytest.mark.parametrize("name", FORMULAS)
@given(x=st.lists(st.floats(-20, 20), min_size=1, max_size=6))
def test_activations_are_their_formulas(name, x):
    layer, formula = FORMULAS[name]
    y, _ = layer.forward({}, np.array(x))
    np.testing.assert_allclose(y, [formula(value) for value in x], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", LIMITS)
def test_activations_are_right_at_large_inputs_without_a_warning(name, dtype):
    layer, _ = FORMULAS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, cache = layer.forward({}, np.array([-1e4, 1e4], dtype))
        dx, _ = layer.backward({}, cache, np.ones(2, dtype))
        y_huge, cache = layer.forward({}, np.array([-1e30, 1e30], dtype))
        dx_huge, _ = layer.backward({}, cache, np.ones(2, dtype))
    np.testing.assert_allclose([*y, *dx], LIMITS[name], rtol=1e-6)
    np.testing.assert_allclose(dx_huge, LIMITS[name][2:], rtol=1e-6)
    assert np.isfinite(y_huge).all()


def test_activations_without_options_are_those_of_the_papers():
    x = np.array([[-1.0, 2.0]])
    np.testing.assert_array_equal(nn.leaky_relu().forward({}, x)[0], [[-0.01, 2]])
    np.testing.assert_allclose(nn.elu().forward({}, x)[0], [[math.expm1(-1), 2]])


def test_relu_lets_through_what_is_above_0_and_nothing_else():
    y, dy = np.array([[-1.0, 0.0, 2.0, math.nan]]), np.array([[3.0, 4.0, 5.0, 6.0]])
    np.testing.assert_array_equal(nn.relu_backward({}, y, dy)[0], [[0, 0, 5, 0]])


def test_slopes_at_a_kink_are_those_of_the_left():
    zero = np.zeros((1, 1))
    for layer, slope in ((nn.relu(), 0), (nn.leaky_relu(0.3), 0.3), (nn.elu(2), 2)):
        _, cache = layer.forward({}, zero)
        assert layer.backward({}, cache, np.ones((1, 1)))[0] == slope


@given(
    x=st.lists(st.floats(-30, 30), min_size=1, max_size=6),
    shift=st.sampled_from([0.0, 1e4, -1e4]),
)
def test_softmaxes_are_their_formulas_wherever_the_logits_lie(x, shift):
    total = math.fsum(math.exp(value - max(x)) for value in x)
    expected = [math.exp(value - max(x)) / total for value in x]
    logits = np.array([x]) + shift
    y, _ = nn.softmax().forward({}, logits)
    np.testing.assert_allclose(y[0], expected, rtol=1e-9)
    y, _ = nn.log_softmax().forward({}, logits)
    np.testing.assert_allclose(y[0], np.log(expected), rtol=1e-9, atol=1e-9)


def test_softmaxes_at_large_logits_give_no_warning():
    logits = np.array([[1e4, -1e4, 0]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for layer, expected in ((nn.softmax(), [1, 0, 0]), (nn.log_softmax(), [0, -2e4, -1e4])):
            y, cache = layer.forward({}, logits)
            dx, _ = layer.backward({}, cache, np.ones((1, 3), np.float32))
            np.testing.assert_array_equal(y, [expected])
            assert np.isfinite(dx).all()


@given(data=st.data())
def test_linear_is_a_sum_over_features(data):
    layer, params, x, _ = data.draw(cases("linear", dtypes=[np.float64]))
    y, _ = layer.forward(params, x)
    expected = np.zeros(y.shape)
    for index in np.ndindex(y.shape):
        *sample, unit = index
        for feature in range(x.shape[-1]):
            expected[index] += x[tuple(sample)][feature] * params["W"][feature, unit]
        expected[index] += params["b"][unit] if "b" in params else 0
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-12)


def test_linear_starts_with_its_initialiser_and_no_bias():
    params, shape = nn.linear(3, nn.constant(2.5)).init(0, (7, 4))
    assert shape == (7, 3)
    np.testing.assert_array_equal(params["W"], np.full((4, 3), 2.5))
    np.testing.assert_array_equal(params["b"], np.zeros(3))
    assert list(nn.linear(3, bias=False).init(0, (4,))[0]) == ["W"]
    default = nn.linear(3).init(5, (4,))[0]["W"]
    np.testing.assert_array_equal(default, nn.he_normal(nn.fold_key(5, 0), (4, 3)))


def test_linear_refuses_an_initialiser_that_gives_another_shape():
    for shape in ((3, 4), (4, 3, 1), (4, 4), ()):
        with pytest.raises(ValueError, match=r"linear: init gave shape \(.*\), expected \(4, 3\)"):
            nn.linear(3, lambda key, _, given=shape: np.zeros(given)).init(0, (4,))


def test_linear_says_what_does_not_fit():
    params, _ = nn.linear(10).init(0, (784,))
    with pytest.raises(ValueError, match="^linear: x has 100 features, but W takes 784$"):
        nn.linear_forward(params, np.ones((2, 100)))
    for size in (3, 11):
        with pytest.raises(ValueError, match=rf"b must have shape \(10,\), got \({size},\)"):
            nn.linear_forward({**params, "b": np.ones(size)}, np.ones((2, 784)))
    for shape in ((10,), (10, 3, 2)):
        with pytest.raises(ValueError, match=r"W must be \(in, out\), got shape \(10,"):
            nn.linear_forward({"W": np.ones(shape)}, np.ones((2, 10)))
    with pytest.raises(ValueError, match=r"^linear: .* unknown entries \['V'\], .* \['W', 'b'\]$"):
        nn.linear_forward({**params, "V": params["W"]}, np.ones((2, 784)))
    with pytest.raises(ValueError, match=r"^sequential: .* \['x'\], expected \['0'\]$"):
        nn.sequential(nn.linear(10)).forward({"x": params}, np.ones((2, 784)))


@given(shape=any_shape, batch=st.integers(0, 4))
def test_flatten_keeps_c_order(shape, batch):
    x = np.arange(batch * math.prod(shape), dtype=np.float64).reshape(batch, *shape)
    y, cache = nn.flatten().forward({}, np.asfortranarray(x))
    np.testing.assert_array_equal(y, np.arange(x.size).reshape(batch, math.prod(shape)))
    dx, grads = nn.flatten().backward({}, cache, 2 * y)
    np.testing.assert_array_equal(dx, 2 * x)
    assert grads == {}


# --- dropout ---


def test_dropout_at_inference_is_the_identity():
    x = np.ones((3, 4), np.float32)
    y, cache = nn.dropout(0.9).forward({}, x)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(nn.dropout(0.9).backward({}, cache, 3 * x)[0], 3 * x)


@given(rate=st.sampled_from([0.0, 0.1, 0.5, 0.75]), seed=st.integers(0, 10**6))
def test_dropout_drops_its_share_and_scales_the_rest(rate, seed):
    x = np.full((100, 100), 3.0)
    y, cache = nn.dropout(rate).forward(nn.training({}, seed), x)
    kept = y != 0
    np.testing.assert_allclose(y[kept], 3 / (1 - rate))
    assert abs(kept.mean() - (1 - rate)) <= 5 * math.sqrt(rate * (1 - rate) / x.size)
    dx, _ = nn.dropout(rate).backward({}, cache, 2 * x)
    np.testing.assert_allclose(dx, np.where(kept, 6 / (1 - rate), 0))


def test_dropout_of_nothing_drops_nothing_even_where_a_0_is_drawn():
    x = np.ones((1, 5033), np.float32)
    assert nn.uniform(1.0)(1200, x.shape)[0, 5032] == -1
    assert nn.dropout(0.0).forward(nn.training({}, 1200), x)[0].all()


def test_dropout_draws_its_mask_from_its_key_alone():
    layer, x = nn.dropout(0.5), np.ones((20, 20))

    def mask(key, x=x):
        return layer.forward(nn.training({}, key), x)[0] != 0

    np.testing.assert_array_equal(mask((1, 2)), mask((1, 2)))
    np.testing.assert_array_equal(mask(3), mask(3, x.astype(np.float32)))
    np.testing.assert_array_equal(mask(3), mask(3, np.asfortranarray(x)))
    assert not np.array_equal(mask((1, 2)), mask((2, 1)))


def test_two_dropouts_in_a_network_have_different_masks():
    x = np.ones((20, 20))
    nested = nn.sequential(
        nn.dropout(0.5), inner=nn.sequential(nn.dropout(0.5)), last=nn.dropout(0.5)
    )
    _, cache = nested.forward(nn.training({}, 0), x)
    masks = [cache["0"]["mask"], cache["inner"]["0"]["mask"], cache["last"]["mask"]]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not np.array_equal(masks[one], masks[other])
    _, cache = nn.residual(nn.dropout(0.5), nn.dropout(0.5)).forward(nn.training({}, 0), x)
    assert not np.array_equal(cache["branch"]["mask"], cache["shortcut"]["mask"])


# --- normalisation ---


@given(data=st.data())
def test_batch_norm_is_its_formula(data):
    layer, params, x, _ = data.draw(cases("batch_norm", dtypes=[np.float64]))
    eps = layer.forward.keywords["eps"]
    y, cache = layer.forward(params, x)
    for channel in range(x.shape[1]):
        values = x[:, channel]
        gamma, beta = params["gamma"][channel], params["beta"][channel]
        mean, var = params["mean"][channel], params["var"][channel]
        if "key" in params:
            mean, var = values.mean(), values.var()
        expected = gamma * (values - mean) / math.sqrt(var + eps) + beta
        np.testing.assert_allclose(y[:, channel], expected, rtol=1e-9, atol=1e-12)
    moved = nn.update_statistics(params, cache, momentum=0.3)
    others = [entry for entry in params if entry not in ("mean", "var")]
    assert all(moved[entry] is params[entry] for entry in others)
    axes = (0, 2, 3)[: x.ndim - 1]
    batch = {"mean": x.mean(axis=axes), "var": x.var(axis=axes, ddof=1)}
    for entry, value in batch.items():
        expected = 0.7 * params[entry] + 0.3 * value if "key" in params else params[entry]
        np.testing.assert_allclose(moved[entry], expected, rtol=1e-9)
        assert moved[entry].dtype == params[entry].dtype


def test_batch_norm_starts_as_the_identity_almost():
    params, shape = nn.batch_norm().init(0, (3, 2, 2))
    assert shape == (3, 2, 2)
    x = np.random.default_rng(0).normal(size=(4, 3, 2, 2))
    np.testing.assert_allclose(nn.batch_norm().forward(params, x)[0], x / math.sqrt(1 + 1e-5))
    assert list(params) == ["gamma", "beta", "mean", "var"]


def test_batch_norm_refuses_what_has_no_variance_or_does_not_fit():
    layer = nn.batch_norm()
    params, _ = layer.init(0, (3,))
    with pytest.raises(ValueError, match="batch_norm: training needs 2 values per channel, got 1"):
        layer.forward(nn.training(params, 0), np.ones((1, 3)))
    with pytest.raises(ValueError, match="batch_norm: training needs 2 values per channel, got 0"):
        layer.forward(nn.training(params, 0), np.ones((0, 3)))
    nothing = {name: entry[:0] for name, entry in params.items()}
    with pytest.raises(ValueError, match="batch_norm: training needs 2 values per channel, got 0"):
        layer.forward(nn.training(nothing, 0), np.ones((3, 0)))
    assert layer.forward(nn.training(params, 0), np.ones((1, 3, 1, 2)))[0].shape == (1, 3, 1, 2)
    for shape in ((4,), (2, 3, 4), (2, 3, 4, 5, 6)):
        with pytest.raises(ValueError, match=r"x must be \(N, C\) or \(N, C, H, W\), got shape"):
            layer.forward(params, np.ones(shape))
    for entry, size in itertools.product(params, (2, 4)):
        with pytest.raises(ValueError, match=rf"x has 3 channels, but {entry} is \({size},\)"):
            layer.forward({**params, entry: np.ones(size)}, np.ones((2, 3)))


@given(data=st.data())
def test_layer_norm_is_its_formula(data):
    layer, params, x, _ = data.draw(cases("layer_norm", dtypes=[np.float64]))
    y, _ = layer.forward(params, x)
    eps = layer.forward.keywords["eps"]
    for index in np.ndindex(x.shape[:-1]):
        values = x[index]
        expected = (values - values.mean()) / math.sqrt(values.var() + eps)
        np.testing.assert_allclose(y[index], expected * params["gamma"] + params["beta"], rtol=1e-9)


def test_normalisation_adds_a_hundred_thousandth_to_the_variance():
    x = np.array([[0.002, 0.0], [0.0, 0.002]])  # of variance 1e-6
    for layer in (nn.layer_norm(), nn.batch_norm()):
        y, _ = layer.forward(nn.training(layer.init(0, (2,))[0], 0), x)
        np.testing.assert_allclose(y, (x - 0.001) / math.sqrt(1.1e-5))


def test_layer_norm_refuses_what_does_not_fit():
    params, _ = nn.layer_norm().init(0, (3,))
    for entry, size in itertools.product(params, (2, 4)):
        with pytest.raises(ValueError, match=rf"x has 3 features, but {entry} is \({size},\)"):
            nn.layer_norm().forward({**params, entry: np.ones(size)}, np.ones((2, 5, 3)))


def test_update_statistics_reaches_every_depth_and_leaves_the_rest():
    net = nn.sequential(
        nn.linear(3),
        block=nn.residual(nn.sequential(nn.batch_norm())),
        mean=nn.linear(3),
    )
    params, _ = net.init(0, (2,))
    x = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    _, cache = net.forward(nn.training(params, 0), x)
    moved = nn.update_statistics(params, cache)
    before, after = nn.tree_flatten(params), nn.tree_flatten(moved)
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {"block/branch/0/mean", "block/branch/0/var"}
    assert list(after) == list(before)
    hidden = nn.linear(3).forward(params["0"], x)[0]
    np.testing.assert_allclose(
        moved["block"]["branch"]["0"]["mean"], 0.1 * hidden.mean(axis=0), rtol=1e-5
    )
    np.testing.assert_allclose(
        moved["block"]["branch"]["0"]["var"], 0.9 + 0.1 * hidden.var(axis=0, ddof=1), rtol=1e-5
    )
    for size in (1, 3):
        with pytest.raises(ValueError, match="update_statistics: mean is"):
            nn.update_statistics({"mean": np.ones(2)}, {"statistics": {"mean": np.ones(size)}})


# ------------------------------------------------------------------------------------------------
# Convolution and pooling against loops
# ------------------------------------------------------------------------------------------------


def both(value):
    return (value, value) if isinstance(value, int) else tuple(value)


def places(image, size, stride=1, padding=0, dilation=1):
    """(r, s, rows, columns): each window and the pixels of the padded image that it covers."""
    axes = [
        [
            (w, slice(w * step, w * step + spread * (places - 1) + 1, spread))
            for w in range((length + 2 * pad - spread * (places - 1) - 1) // step + 1)
        ]
        for length, places, step, pad, spread in zip(
            image, both(size), both(stride), both(padding), both(dilation), strict=True
        )
    ]
    return [(r, s, rows, columns) for r, rows in axes[0] for s, columns in axes[1]]


def around(x, padding, fill):
    top, left = both(padding)
    return np.pad(x, ((0, 0), (0, 0), (top, top), (left, left)), constant_values=fill)


def inside(padded, padding, shape):
    top, left = both(padding)
    return padded[:, :, top : top + shape[2], left : left + shape[3]]


def naive_conv2d(x, W, b, dy, padding, groups, **options):
    """(y, dx, dW, db), window by window."""
    padded = around(x, padding, 0)
    y, dpadded, dW = np.zeros_like(dy), np.zeros_like(padded), np.zeros_like(W)
    for group in range(groups):
        out = slice(group * len(W) // groups, (group + 1) * len(W) // groups)
        part = slice(group * W.shape[1], (group + 1) * W.shape[1])
        for r, s, rows, columns in places(x.shape[2:], W.shape[2:], padding=padding, **options):
            window = padded[:, part, rows, columns]
            y[:, out, r, s] = np.einsum("ncij,ocij->no", window, W[out])
            dW[out] += np.einsum("no,ncij->ocij", dy[:, out, r, s], window)
            dpadded[:, part, rows, columns] += np.einsum("no,ocij->ncij", dy[:, out, r, s], W[out])
    return y + b[:, None, None], inside(dpadded, padding, x.shape), dW, dy.sum(axis=(0, 2, 3))


@st.composite
def convolution_options(draw):
    options = {name: draw(pairs(1, 3)) for name in ("stride", "dilation")}
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    return {**options, "padding": draw(pairs(0, 4)), "groups": groups}


@settings(max_examples=60)
@given(
    options=convolution_options(),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    shape=st.tuples(st.integers(1, 3), st.integers(4, 12), st.integers(4, 12)),
    dtype=st.sampled_from([np.float32, np.float64]),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 1000),
)
def test_conv2d_is_a_loop_over_windows(options, kernel, channels, shape, dtype, order, seed):
    layer = nn.conv2d(channels[0] * options["groups"], kernel, **options)
    sample = (channels[1] * options["groups"], *shape[1:])
    moves = {name: options[name] for name in ("stride", "padding", "dilation")}
    if not places(sample[1:], kernel, **moves):
        with pytest.raises(
            ValueError, match=r"conv2d: the window covers \d+ x \d+ pixels, but the"
        ):
            layer.init(seed, sample)
        return
    params, out = layer.init(seed, sample)
    rng = np.random.default_rng(seed)
    params = as_dtype(with_values(params, seed), dtype)
    x = in_order(rng.normal(size=(shape[0], *sample)).astype(dtype), order)
    y, cache = layer.forward(params, x)
    dy = in_order(rng.normal(size=y.shape).astype(dtype), order)
    dx, grads = layer.backward(params, cache, dy)
    assert y.shape == (shape[0], *out)
    expected = naive_conv2d(x, params["W"], params["b"], dy, **options)
    for array, loop in zip((y, dx, grads["W"], grads["b"]), expected, strict=True):
        tolerance = 1e-4 if dtype == np.float32 else 1e-11
        np.testing.assert_allclose(array, loop, rtol=tolerance, atol=tolerance * 10)
    np.testing.assert_array_equal(
        layer.backward(params, cache, dy, need_dx=False)[1]["W"], grads["W"]
    )
    assert layer.backward(params, cache, dy, need_dx=False)[0] is None


@pytest.mark.parametrize(
    ("kernel", "size", "padding", "stride"),
    [(7, 2, 3, 1), (5, 2, 2, 2), (1, 1, 1, 3), (3, 5, 1, 5), (3, 4, 3, 3), (1, 4, 2, 8)],
)
def test_a_kernel_may_lie_over_padding_alone(kernel, size, padding, stride):
    loop = test_conv2d_is_a_loop_over_windows.hypothesis.inner_test
    options = {"padding": padding, "stride": stride, "dilation": 1, "groups": 1}
    case = {"kernel": (kernel, kernel), "channels": (1, 1), "shape": (1, size, size)}
    loop(options=options, **case, dtype=np.float64, order="F", seed=0)


def test_a_convolution_is_one_product_and_one_more_for_each_row_at_the_border(monkeypatch):
    products, matmul = [], np.matmul
    monkeypatch.setattr(np, "matmul", lambda *a, **k: (products.append(a), matmul(*a, **k))[1])
    ranges = range(3, 10), range(1, 6), range(1, 4), range(4)
    for height, kernel, stride, padding in itertools.product(*ranges):
        if height + 2 * padding >= kernel:
            layer = nn.conv2d(1, (kernel, 1), (stride, 1), (padding, 0))
            params, (_, rows, _) = layer.init(0, (1, height, 2))
            products.clear()
            layer.forward(params, np.ones((1, 1, height, 2)))
            tops = [row * stride - padding for row in range(rows)]
            inside = sum(0 <= top <= height - kernel for top in tops)
            assert len(products) == (inside > 0) + rows - inside


CONVOLUTIONS = {  # one for each option, at a size that people use
    "plain": (nn.conv2d(16, 5), (8, 28, 28)),
    "same": (nn.conv2d(16, 3, padding="same"), (16, 28, 28)),
    "stride": (nn.conv2d(16, 3, stride=2, padding=1), (16, 28, 28)),
    "kernel of pairs": (nn.conv2d(8, (1, 7), padding=(0, 3)), (8, 16, 16)),
    "dilation": (nn.conv2d(8, 3, dilation=2, padding=2), (8, 16, 16)),
    "groups": (nn.conv2d(16, 3, groups=4), (16, 16, 16)),
    "depthwise": (nn.conv2d(16, 3, padding=1, groups=16), (16, 16, 16)),
    "pointwise": (nn.conv2d(32, 1, bias=False), (16, 14, 14)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv2d_in_float32_is_that_in_float64(name):
    layer, shape = CONVOLUTIONS[name]
    params, out = layer.init(0, shape)
    rng = np.random.default_rng(1)
    x, dy = rng.normal(size=(8, *shape)), rng.normal(size=(8, *out))
    y, cache = layer.forward(params, x.astype(np.float32))
    dx, grads = layer.backward(params, cache, dy.astype(np.float32))
    y64, cache = layer.forward(params, x)
    dx64, grads64 = layer.backward(params, cache, dy)
    pairs = [(y, y64), (dx, dx64), *((grads[entry], grads64[entry]) for entry in grads)]
    for single, double in pairs:
        assert single.dtype == np.float32
        assert double.dtype == np.float64
        assert np.abs(single - double).max() < 2e-6 * np.abs(double).max()


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 2), (4, 4), (5, 1)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_padding_same_keeps_the_size_and_puts_the_odd_pixel_right_and_below(size, dilation):
    layer = nn.conv2d(1, size, padding="same", dilation=dilation, init=nn.constant(1), bias=False)
    params, shape = layer.init(0, (1, 9, 8))
    assert shape == (1, 9, 8)
    x = np.random.default_rng(0).normal(size=(1, 1, 9, 8))
    missing = [dilation * (places - 1) for places in size]
    padded = np.pad(x[0, 0], [(pixels // 2, pixels - pixels // 2) for pixels in missing])
    expected = sum(
        padded[i : i + 9, j : j + 8]
        for i in range(0, missing[0] + 1, dilation)
        for j in range(0, missing[1] + 1, dilation)
    )
    np.testing.assert_allclose(layer.forward(params, x)[0][0, 0], expected, atol=1e-12)


def naive_pool2d(x, dy, size, stride, padding, kind):
    """(y, dx), window by window; the maximum is the first one as one reads."""
    padded = around(x, padding, -np.inf if kind == "max" else 0)
    y, dpadded = np.zeros_like(dy), np.zeros_like(padded)
    for r, s, rows, columns in places(x.shape[2:], size, stride, padding):
        for n, c in np.ndindex(x.shape[:2]):
            window, into = padded[n, c, rows, columns], dpadded[n, c, rows, columns]
            if kind == "max":
                first = np.unravel_index(window.argmax(), window.shape)
                y[n, c, r, s] = window[first]
                into[first] += dy[n, c, r, s]
            else:
                y[n, c, r, s] = window.sum() / window.size
                into += dy[n, c, r, s] / window.size
    return y, inside(dpadded, padding, x.shape)


@pytest.mark.parametrize("kind", ["max", "avg"])
@settings(max_examples=60)
@given(
    data=st.data(),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(3, 9), st.integers(3, 9)),
    values=st.integers(1, 5),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 1000),
)
def test_pools_are_loops_over_windows_ties_included(kind, data, shape, values, order, seed):
    size = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride = data.draw(st.one_of(st.none(), pairs(1, 5)))
    padding = tuple(data.draw(st.integers(0, places // 2)) for places in size)
    layer = (nn.max_pool2d if kind == "max" else nn.avg_pool2d)(size, stride, padding)
    fits = all(n + 2 * p >= k for n, p, k in zip(shape[2:], padding, size, strict=True))
    if not fits:
        with pytest.raises(ValueError, match=f"{kind}_pool2d: the window covers"):
            layer.init(0, shape[1:])
        return
    rng = np.random.default_rng(seed)
    x = in_order(rng.integers(0, values, shape) - values / 2, order)  # few values, so many ties
    y, cache = layer.forward({}, x)
    assert y.shape == (shape[0], *layer.init(0, shape[1:])[1])
    dy = in_order(rng.normal(size=y.shape), order)
    dx, _ = layer.backward({}, cache, dy)
    expected, dexpected = naive_pool2d(
        x, dy, size, size if stride is None else stride, padding, kind
    )
    np.testing.assert_allclose(y, expected, atol=1e-12)
    np.testing.assert_allclose(dx, dexpected, atol=1e-12)


def test_padding_of_a_pool_goes_to_its_own_axis():
    x = np.ones((1, 1, 2, 3))
    y, _ = nn.avg_pool2d((1, 3), 1, (0, 1)).forward({}, x)
    np.testing.assert_allclose(y[0, 0], [[2 / 3, 1, 2 / 3]] * 2)
    y, _ = nn.avg_pool2d((2, 1), 1, (1, 0)).forward({}, x)
    np.testing.assert_allclose(y[0, 0], [[0.5] * 3, [1] * 3, [0.5] * 3])


def test_padding_never_wins_even_against_the_lowest_values():
    layer = nn.max_pool2d(2, padding=1)
    x = np.full((1, 1, 2, 2), -np.inf)
    y, cache = layer.forward({}, x)
    dx, _ = layer.backward({}, cache, np.ones_like(y))
    np.testing.assert_array_equal(y, np.full((1, 1, 2, 2), -np.inf))
    np.testing.assert_array_equal(dx, np.ones((1, 1, 2, 2)))


def test_global_avg_pool2d_is_the_mean():
    x = np.random.default_rng(0).normal(size=(3, 4, 5, 6))
    y, cache = nn.global_avg_pool2d().forward({}, x)
    np.testing.assert_allclose(y, x.mean(axis=(2, 3)))
    dx, _ = nn.global_avg_pool2d().backward({}, cache, y)
    np.testing.assert_allclose(dx, np.broadcast_to(y[:, :, None, None] / 30, x.shape))


IMAGE_LAYERS = {
    "conv2d": nn.conv2d(5, 3, padding=1),
    "strided": nn.conv2d(6, 3, stride=2, groups=2),
    "dilated": nn.conv2d(5, 3, dilation=2),
    "max_pool2d": nn.max_pool2d(2),
    "avg_pool2d": nn.avg_pool2d(3, 2, 1),
    "batch_norm": nn.batch_norm(),
    "relu": nn.relu(),
}


@pytest.mark.parametrize("name", IMAGE_LAYERS)
def test_results_lie_in_memory_as_rows_so_that_nothing_is_copied_between_layers(name):
    layer = IMAGE_LAYERS[name]
    params, _ = layer.init(0, (4, 8, 9))
    x = in_order(np.random.default_rng(0).normal(size=(7, 4, 8, 9)), "rows first")
    y, cache = layer.forward(nn.training(params, 0), x)
    dx, _ = layer.backward(params, cache, y)
    for array in (y, dx):
        assert array.transpose(2, 1, 3, 0).flags.c_contiguous


def test_a_flattened_image_is_the_same_numbers_whatever_its_memory():
    x = np.random.default_rng(0).normal(size=(4, 2, 3, 5))
    for order in ORDERS:
        np.testing.assert_array_equal(
            nn.flatten().forward({}, in_order(x, order))[0], x.reshape(4, -1)
        )
    assert np.shares_memory(nn.flatten().forward({}, x)[0], x)


@pytest.mark.parametrize("kernel", [3, 5])
def test_a_convolution_needs_memory_for_a_copy_per_kernel_column(kernel):
    layer = nn.conv2d(16, kernel, padding="same")
    params, _ = layer.init(0, (16, 32, 32))
    x = np.random.default_rng(0).normal(size=(8, 16, 32, 32)).astype(np.float32)
    x = in_order(x, "rows first")
    y, cache = layer.forward(params, x)
    assert cache is x  # and no unfolded copy of it
    for call in (lambda: layer.forward(params, x), lambda: layer.backward(params, cache, y)):
        assert peak_memory(call) < (kernel + 2.6) * x.nbytes


@pytest.mark.parametrize("groups", [1, 2])
def test_the_gradient_of_a_kernel_is_one_product_or_as_many_as_memory_allows(monkeypatch, groups):
    def backward(batch, size, channels):
        layer = nn.conv2d(channels, 3, groups=groups)
        params, _ = layer.init(0, (channels, *size))
        x = in_order(np.ones((batch, channels, *size), np.float32), "rows first")
        y, cache = layer.forward(params, x)
        return partial(layer.backward, params, cache, y, need_dx=False), x

    few, x = backward(1, (64, 8), 64)  # a kernel of half the size of its image
    assert peak_memory(few) < 10 * x.nbytes
    many, _ = backward(60, (8, 12), 2)
    products, matmul = [], np.matmul
    monkeypatch.setattr(np, "matmul", lambda *a, **k: (products.append(a), matmul(*a, **k))[1])
    many()
    assert len(products) == 1


def test_conv2d_finds_at_init_what_it_would_find_at_the_first_step():
    x = np.ones((2, 4, 6, 7))
    for layer, words in [
        (
            nn.conv2d(3, 9, padding=1),
            "conv2d: the window covers 9 x 9 pixels, but the padded image has 8 x 9",
        ),
        (
            nn.conv2d(3, 3, dilation=(3, 1)),
            "conv2d: the window covers 7 x 3 pixels, but the padded image has 6 x 7",
        ),
        (nn.conv2d(3, 3, groups=3), "conv2d: 3 groups do not divide the 4 channels of x"),
    ]:
        with pytest.raises(ValueError, match=words):
            layer.init(0, x.shape[1:])
        kernel = (3, 9, 9) if "9 x 9" in words else (3, 3, 3)
        W = np.ones((kernel[0], 4 if "groups" not in words else 1, *kernel[1:]))
        with pytest.raises(ValueError, match=words if "groups" not in words else "W takes 3"):
            layer.forward({"W": W}, x)
    for layer in (nn.max_pool2d(7), nn.avg_pool2d(7)):
        for call in (
            lambda layer=layer: layer.init(0, (4, 6, 7)),
            lambda layer=layer: layer.forward({}, x),
        ):
            with pytest.raises(
                ValueError, match="pool2d: the window covers 7 x 7 pixels, but the pad"
            ):
                call()


def test_layers_of_images_say_what_does_not_fit():
    layer = nn.conv2d(4, 3, groups=2)
    params, _ = layer.init(0, (2, 5, 5))
    x = np.ones((1, 2, 5, 5), np.float32)
    for bad, words in [
        (x[0], r"conv2d: x must be \(N, C, H, W\), got shape \(2, 5, 5\); give a single image"),
        (x[:, :, 0, 0], r"conv2d: x must be \(N, C, H, W\), got shape \(1, 2\)$"),
        (x[None], r"conv2d: x must be \(N, C, H, W\), got shape \(1, 1, 2, 5, 5\)$"),
        (np.ones((1, 3, 5, 5), np.float32), "conv2d: x has 3 channels, but W takes 2"),
        (np.ones((1, 1, 5, 5), np.float32), "conv2d: x has 1 channels, but W takes 2"),
        (x[:, :, :0], r"conv2d: x has no pixels, got shape \(1, 2, 0, 5\)"),
    ]:
        with pytest.raises(ValueError, match=words):
            layer.forward(params, bad)
    for entries, words in [
        ({"W": params["W"][0]}, r"conv2d: W must be \(out, in/2, kh, kw\), got shape \(1, 3, 3\)"),
        (
            {"W": params["W"][:3]},
            r"conv2d: W must be \(out, in/2, kh, kw\), got shape \(3, 1, 3, 3\)",
        ),
        ({"W": params["W"][:, :0]}, r"conv2d: W must be"),
        ({"W": np.ones((2, 3, 3), np.float32)}, r"conv2d: W must be .* got shape \(2, 3, 3\)"),
        ({"W": np.ones((2, 1, 3, 3, 1), np.float32)}, r"conv2d: W must be .*, 3, 3, 1\)"),
        (
            {"W": params["W"], "b": np.ones(3, np.float32)},
            r"conv2d: b must have shape \(4,\), got \(3",
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            layer.forward(entries, x)
    with pytest.raises(
        ValueError, match=r"conv2d: init gave shape \(1,\), expected \(2, 1, 3, 3\)"
    ):
        nn.conv2d(2, 3, init=lambda key, shape: np.ones(1)).init(0, (1, 5, 5))
    for pool in (nn.max_pool2d(2), nn.avg_pool2d(2), nn.global_avg_pool2d()):
        with pytest.raises(
            ValueError, match=r"pool2d: x must be \(N, C, H, W\), got shape \(2, 5, 5"
        ):
            pool.forward({}, x[0])
        with pytest.raises(ValueError, match="pool2d: x has no pixels"):
            pool.forward({}, x[:, :, :, :0])
        with pytest.raises(ValueError, match=r"pool2d: shape \(5, 5\) has 2 axes, expected 3"):
            pool.init(0, (5, 5))
        assert pool.forward({}, x[:, :0])[0].shape[:2] == (1, 0)
    with pytest.raises(ValueError, match="conv2d: shape .* has 2 axes, expected 3"):
        layer.init(0, (5, 5))
    for kernel in ((3,), (3, 3, 3)):
        with pytest.raises(ValueError, match="conv2d: kernel must be a whole number or a pair"):
            nn.conv2d(1, kernel)


def test_layers_of_images_take_what_fits_narrowly():
    assert nn.max_pool2d(6, padding=3).init(0, (1, 1, 1)) == ({}, (1, 1, 1))
    assert nn.conv2d(1, 3, padding="".join(["sa", "me"])).init(0, (1, 4, 4))[1] == (1, 4, 4)
    params, _ = nn.conv2d(1, 1).init(0, (300, 1, 1))
    assert nn.conv2d(1, 1).forward(params, np.ones((1, 300, 1, 1)))[0].shape == (1, 1, 1, 1)


def test_conv2d_starts_with_its_initialiser_and_no_bias():
    params, _ = nn.conv2d(4, 3, init=nn.constant(2)).init(0, (2, 5, 5))
    np.testing.assert_array_equal(params["W"], np.full((4, 2, 3, 3), 2))
    np.testing.assert_array_equal(params["b"], np.zeros(4))
    assert set(nn.conv2d(4, 3, bias=False).init(0, (2, 5, 5))[0]) == {"W"}


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), mean=st.sampled_from([0.0, 100.0]))
def test_batch_norm_of_images_is_its_formula(seed, mean):
    x = np.random.default_rng(seed).normal(mean, 2, size=(6, 3, 5, 4)).astype(np.float32)
    params = with_values(nn.batch_norm().init(0, (3, 5, 4))[0], seed)
    y, cache = nn.batch_norm().forward(nn.training(params, 0), in_order(x, "rows first"))
    x = x.astype(np.float64)
    axes = (0, 2, 3)
    normal = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
    expected = params["gamma"][:, None, None] * normal + params["beta"][:, None, None]
    np.testing.assert_allclose(y, expected, atol=2e-4)
    np.testing.assert_allclose(cache["statistics"]["mean"], x.mean(axes), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(cache["statistics"]["var"], x.var(axes, ddof=1), rtol=1e-3)


# --- combinators ---


def test_sequential_names_layers_by_position_and_leaves_out_those_without_params():
    net = nn.sequential(nn.flatten(), nn.linear(4), nn.relu(), out=nn.linear(2))
    params, shape = net.init(0, (2, 3))
    assert shape == (2,)
    assert list(params) == ["1", "out"]
    assert params["1"]["W"].shape == (6, 4)
    y, cache = net.forward(params, np.ones((5, 2, 3), np.float32))
    assert list(cache) == ["0", "1", "2", "out"]
    _, grads = net.backward(params, cache, y)
    assert list(grads) == ["1", "out"]


@given(data=st.data())
def test_sequential_is_its_layers_one_after_the_other(data):
    shape = data.draw(features)
    one, two = nn.linear(data.draw(sizes)), nn.layer_norm()
    net = nn.sequential(one, nn.tanh(), two=two)
    params, _ = net.init(3, shape)
    x = np.random.default_rng(0).normal(size=(2, *shape))
    y, cache = net.forward(params, x)
    hidden, cache1 = one.forward(params["0"], x)
    active, cache2 = nn.tanh().forward({}, hidden)
    expected, cache3 = two.forward(params["two"], active)
    assert all_bytes(y, cache) == all_bytes(expected, {"0": cache1, "1": cache2, "two": cache3})
    dy = upstream(y)
    d_active, g3 = two.backward(params["two"], cache3, dy)
    d_hidden, _ = nn.tanh().backward({}, cache2, d_active)
    dx, g1 = one.backward(params["0"], cache1, d_hidden)
    assert all_bytes(*net.backward(params, cache, dy)) == all_bytes(dx, {"0": g1, "two": g3})
    first, second = (nn.fold_key(3, index) for index in (0, 2))
    assert all_bytes(params["0"]) == all_bytes(one.init(first, shape)[0])
    assert all_bytes(params["two"]) == all_bytes(two.init(second, active.shape[1:])[0])


@given(data=st.data())
def test_leaving_out_dx_leaves_the_grads_as_they_are(data):
    body = nn.sequential(nn.linear(data.draw(sizes)), nn.tanh(), nn.linear(2))
    start = data.draw(st.sampled_from([[], [nn.flatten()], [nn.dropout(0.5), nn.flatten()]]))
    end = data.draw(st.sampled_from([{}, {"out": nn.linear(3)}, {"block": nn.residual(body)}]))
    net = nn.sequential(*start, body=body, **end, after=nn.linear(2))  # before it in the alphabet
    params, _ = net.init(0, (4,))
    x = np.random.default_rng(0).normal(size=(3, 4))
    y, cache = net.forward(nn.training(params, 1), x)
    dx, grads = net.backward(params, cache, y)
    assert dx.shape == x.shape
    nothing, same = net.backward(params, cache, y, need_dx=False)
    assert nothing is None
    assert all_bytes(same) == all_bytes(grads)


def test_leaving_out_dx_saves_the_work(monkeypatch):
    asked = []

    def backward(params, cache, dy, *, need_dx=True):
        asked.append(need_dx)
        return (dy if need_dx else None), {"w": np.ones(1)}

    layer = nn.Layer(
        lambda key, shape: ({"w": np.ones(1)}, shape), lambda params, x: (x, x), backward
    )
    net = nn.sequential(nn.relu(), a=layer, b=layer)
    params, _ = net.init(0, (2,))
    _, cache = net.forward(params, np.ones((1, 2)))
    cache["0"] = "never looked at"
    net.backward(params, cache, np.ones((1, 2)), need_dx=False)
    assert asked == [True, False]
    assert nn.sequential(nn.relu()).backward({}, {"0": None}, np.ones(1), need_dx=False) == (
        None,
        {},
    )


def test_an_empty_sequential_is_the_identity():
    net, x = nn.sequential(), np.ones((2, 3))
    assert net.init(0, (3,)) == ({}, (3,))
    y, cache = net.forward({}, x)
    assert y is x
    assert net.backward({}, cache, x)[0] is x


def test_errors_say_in_which_layer():
    inner = nn.sequential(nn.flatten(), wide=nn.linear(3))
    net = nn.sequential(body=nn.residual(inner, nn.linear(3)), out=nn.linear(2))
    params, _ = net.init(0, (4,))
    with pytest.raises(ValueError, match="^body: branch: wide: linear: x has 5 features"):
        net.forward(params, np.ones((2, 5)))
    y, cache = net.forward(params, np.ones((2, 4)))
    with pytest.raises(ValueError, match=r"^out: linear: dy has shape \(2, 9\)"):
        net.backward(params, cache, np.ones((2, 9)))
    with pytest.raises(ValueError, match="^out: linear: there is no entry 'W' in"):
        net.forward({"body": params["body"]}, np.ones((2, 4)))
    with pytest.raises(
        TypeError, match="sequential: params\\['out'\\] must be a dict, got ndarray"
    ):
        net.forward(nn.training({**params, "out": y}, 0), np.ones((2, 4)))
    with pytest.raises(TypeError, match="^out: linear: params must be a dict"):
        net.forward({**params, "out": y}, np.ones((2, 4)))
    with pytest.raises(ValueError, match="^norm: batch_norm: shape"):
        nn.sequential(nn.identity(), norm=nn.batch_norm()).init(0, (2, 3))
    for bad in ({}, None, {**cache, "more": 1}):
        with pytest.raises(ValueError, match="sequential: cache has"):
            net.backward(params, bad, y)
        with pytest.raises(ValueError, match="residual: cache has"):
            nn.residual(nn.relu()).backward({}, bad, y)


def test_other_errors_of_a_layer_pass_as_they_are():
    def forward(params, x):
        raise UnicodeDecodeError("utf-8", b"x", 0, 1, "a ValueError that takes five arguments")

    layer = nn.Layer(nn.identity_init, forward, nn.identity_backward)
    with pytest.raises(UnicodeDecodeError):
        nn.sequential(layer).forward({}, np.ones((1, 1)))


def test_residual_adds_and_refuses_what_cannot_be_added():
    net = nn.residual(nn.linear(3), nn.linear(3, bias=False))
    params, shape = net.init(0, (4,))
    assert (list(params), shape) == (["branch", "shortcut"], (3,))
    x = np.random.default_rng(0).normal(size=(2, 4))
    expected = x @ params["branch"]["W"] + params["branch"]["b"] + x @ params["shortcut"]["W"]
    np.testing.assert_allclose(net.forward(params, x)[0], expected)
    assert not np.array_equal(params["branch"]["W"], params["shortcut"]["W"])
    with pytest.raises(
        ValueError, match=r"residual: the branch gives \(3,\), but the shortcut \(4,\)"
    ):
        nn.residual(nn.linear(3)).init(0, (4,))
    for size in (1, 5):
        with pytest.raises(ValueError, match=rf"residual: the branch gives \(2, {size}\), but the"):
            nn.residual(nn.linear(size)).forward({"branch": {"W": np.ones((4, size))}}, x)
    assert nn.residual(nn.relu()).init(0, (4,)) == ({}, (4,))


# ------------------------------------------------------------------------------------------------
# Keys and initialisers
# ------------------------------------------------------------------------------------------------

KEYS = [0, 1, 2, (0, 0), (1, 0), (0, 1), (1, 0, 0), (1, 1), 2**32, (0, 2**32), 2**70, (2**32, 1)]


def test_different_keys_give_different_numbers():
    draws = [nn.uniform(1.0)(key, (4,)).tobytes() for key in KEYS]
    draws += [
        nn.uniform(1.0)(nn.fold_key(key, index), (4,)).tobytes() for key in KEYS for index in (0, 1)
    ]
    deeper = nn.fold_key(nn.fold_key(1, 0), 0)
    assert len({*draws, nn.uniform(1.0)(deeper, (4,)).tobytes()}) == 3 * len(KEYS) + 1


@pytest.mark.parametrize("key", KEYS)
def test_a_key_is_the_same_in_all_its_forms(key):
    folded = nn.training({}, key)["key"]
    assert folded.dtype == np.uint32
    expected = nn.uniform(1.0)(key, (4,))
    for form in (folded, folded.copy(), list(key) if isinstance(key, tuple) else np.array([key])):
        np.testing.assert_array_equal(nn.uniform(1.0)(form, (4,)), expected)
    assert list(nn.fold_key(key, 7)) == [*folded, 7]


def test_a_users_array_of_uint32_is_no_key_array():
    array = np.array([1, 0], np.uint32)
    np.testing.assert_array_equal(nn.uniform(1.0)(array, (4,)), nn.uniform(1.0)((1, 0), (4,)))
    assert list(nn.training({}, array)["key"]) == [0x6B657973, 2, 1, 1, 1, 0]
    beyond = np.array([0xFFFFFFFF], np.uint32)
    assert list(nn.training({}, beyond)["key"]) == [0x6B657973, 1, 1, 0xFFFFFFFF]
    for kind in (np.int64, np.uint64):
        numbers = np.array([0x6B657973, 1, 1, 5], kind)
        assert nn.fold_key(numbers, 0).tolist() == nn.fold_key(numbers.tolist(), 0).tolist()


def test_bad_keys_are_refused():
    for bad in (-1, (1, -1)):
        with pytest.raises(ValueError, match="key: every number must be at least 0"):
            nn.uniform(1.0)(bad, (1,))
    for bad in (1.5, True, None, "1", (1, 2.0), np.ones(2), {}, np.ones((2, 2), int)):
        with pytest.raises(TypeError, match="key: every number must be a whole number"):
            nn.training({}, bad)
    for bad in (np.array(3), np.ones((2, 2), int)):
        with pytest.raises(
            TypeError, match="must be a whole number, got ndarray of int64 and shape"
        ):
            nn.training({}, bad)
    for bad in ((), [], np.array([], int)):
        with pytest.raises(ValueError, match="key: .* got an empty one"):
            nn.fold_key(bad, 0)
    with pytest.raises(ValueError, match="fold_key: index must be at least 0"):
        nn.fold_key(0, -1)
    for bad in (2**32, 2**32 + 1):
        with pytest.raises(ValueError, match="fold_key: index must be below"):
            nn.fold_key(0, bad)


def test_training_adds_a_key_to_a_copy():
    params = {"W": np.ones(2)}
    in_training = nn.training(params, (1, 2))
    assert list(params) == ["W"]
    assert list(in_training) == ["W", "key"]
    assert in_training["W"] is params["W"]
    with pytest.raises(TypeError, match="training: params must be a dict, got list"):
        nn.training([], 0)


FANS = [((300, 200), 300, 200), ((40, 30, 5, 4), 600, 800), ((50, 60, 9), 540, 450)]


@pytest.mark.parametrize(("shape", "fan_in", "fan_out"), FANS)
def test_initialisers_have_the_moments_that_their_fans_ask_for(shape, fan_in, fan_out):
    spreads = {
        nn.xavier_normal: math.sqrt(2 / (fan_in + fan_out)),
        nn.xavier_uniform: math.sqrt(2 / (fan_in + fan_out)),
        nn.he_normal: math.sqrt(2 / fan_in),
        nn.he_uniform: math.sqrt(2 / fan_in),
        nn.normal(0.3): 0.3,
        nn.uniform(0.3): 0.3 / math.sqrt(3),
    }
    for initialiser, std in spreads.items():
        weights = initialiser((1, 2), shape)
        assert (weights.shape, weights.dtype) == (shape, np.float32)
        assert abs(weights.mean()) < 5 * std / math.sqrt(weights.size)
        assert weights.std() == pytest.approx(std, rel=5 / math.sqrt(weights.size))
        np.testing.assert_array_equal(weights, initialiser((1, 2), shape))
        assert not np.array_equal(weights, initialiser((2, 1), shape))
        fourth = float((weights.astype(np.float64) ** 4).mean()) / std**4
        normal = initialiser in (nn.xavier_normal, nn.he_normal) or "normal" in repr(initialiser)
        assert fourth == pytest.approx(3 if normal else 1.8, rel=0.1)
        if not normal:
            assert (
                math.sqrt(3) * std * 0.99 < np.abs(weights).max() <= math.sqrt(3) * std * 1.000001
            )


def test_constant_initialisers():
    np.testing.assert_array_equal(nn.zeros(0, (2, 3)), np.zeros((2, 3), np.float32))
    np.testing.assert_array_equal(nn.constant(-1.5)(0, (2,)), np.full(2, -1.5, np.float32))
    assert nn.zeros(0, (2,)).dtype == nn.constant(1)(0, (2,)).dtype == np.float32
    assert nn.normal(1.0)(0, ()).shape == nn.uniform(1.0)(0, ()).shape == ()


@pytest.mark.parametrize("shape", [(6, 6), (8, 3), (3, 8), (4, 2, 3, 3), (30, 2, 3, 3)])
def test_orthogonal_is_orthogonal(shape):
    weights = nn.orthogonal(1, shape)
    assert (weights.shape, weights.dtype) == (shape, np.float32)
    matrix = weights.reshape(shape[0], -1).astype(np.float64)
    small = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    np.testing.assert_allclose(small, np.eye(len(small)), atol=1e-6)
    assert not np.array_equal(weights, nn.orthogonal(2, shape))


def test_orthogonal_is_drawn_from_all_orthogonal_matrices():
    diagonals = np.array([np.diag(nn.orthogonal(key, (3, 3))) for key in range(400)])
    assert np.abs(diagonals.mean(axis=0)).max() < 5 / math.sqrt(3 * 400)


def test_pinned_numbers():
    """What keys give, so that a new NumPy cannot change it silently."""
    assert nn.fold_key((3, 2**40), 5).tolist() == [0x6B657973, 2, 1, 3, 2, 0, 256, 5]
    numbers = [0.4865238666534424, -0.3592355251312256, -0.0826958417892456]
    assert nn.uniform(1.0)((1, 2), (3,)).tolist() == numbers
    numbers = [0.7212965488433838, 0.3055172860622406, -1.3887238502502441]
    assert nn.normal(1.0)((1, 2), (3,)).tolist() == numbers
    rows = nn.orthogonal(1, (2, 2)).tolist()  # LAPACK's last bits may differ
    assert rows[0] == pytest.approx([0.95063913, 0.31029859], abs=1e-6)
    assert [index.tolist() for index in nn.batches(7, 3, 5)] == [[0, 5, 6], [3, 2, 4], [1]]
    _, cache = nn.dropout(0.5).forward(nn.training({}, 4), np.ones((2, 8)))
    assert (cache["mask"] / 2).tolist() == [[1, 1, 0, 1, 1, 0, 1, 1], [1, 0, 0, 0, 1, 1, 0, 0]]
    images, labels = nn.draw_digits(3, 20, 12)
    assert labels.tolist() == [8, 2, 4, 6, 7, 1, 6, 7, 7, 9, 2, 3, 6, 7, 7, 7, 2, 3, 1, 6]
    assert int(images.sum()) == pytest.approx(103_836, abs=40)  # sines may differ in the last bit
    line = nn.augment(7, np.arange(49.0).reshape(1, 1, 7, 7), elastic=1.0)[0, 0, 3]
    expected = [16.6624, 23.0149, 29.991, 34.4583, 10.4047, 0.0299, 0.0262]
    np.testing.assert_allclose(line, expected, atol=2e-4)
    waves = np.sin(np.arange(26 * 29) / 7).reshape(1, 1, 26, 29)
    line = nn.augment(8, waves, elastic=2.0)[0, 0, 13, ::4]
    expected = [0.694, 0.6222, -0.3226, -0.0756, 0.0831, -0.7333, -0.4396, 0.0006]
    np.testing.assert_allclose(line, expected, atol=2e-4)


def test_pinned_drawings():
    """Every way to write every numeral: one pixel of one image may differ by a few units."""
    images, labels = nn.draw_digits(11, 400, 12)
    weighted = images.reshape(400, 144) @ np.arange(144)
    sums = [11444625, 10536898, 20960798, 18467687, 14701519,
            16970224, 21269627, 9538899, 13163435, 14753364]  # fmt: skip
    for digit, expected in enumerate(sums):
        assert int(weighted[labels == digit].sum()) == pytest.approx(expected, abs=400)


def test_pinned_drawings_of_many():
    """As many of one numeral as are drawn in several parts."""
    images, _ = nn.draw_digits(12, 3000, 8)
    weighted = images.reshape(3000, 64) @ np.arange(64)
    assert int(weighted.sum()) == pytest.approx(223_320_645, abs=500)


def test_running_statistics_move_by_the_momentum_alone():
    params, _ = nn.batch_norm().init(0, (2,))
    x = np.array([[1.0, 4.0], [3.0, 8.0]])
    _, cache = nn.batch_norm().forward(nn.training(frozen(params), 0), x)
    cache = frozen(cache)
    for momentum, mean, var in (
        (0, [0, 0], [1, 1]),
        (1, [2, 6], [2, 8]),
        (0.5, [1, 3], [1.5, 4.5]),
    ):
        moved = nn.update_statistics(params, cache, momentum)
        np.testing.assert_array_equal(moved["mean"], mean)
        np.testing.assert_array_equal(moved["var"], var)
    default = nn.update_statistics(params, cache)
    np.testing.assert_allclose(default["mean"], [0.2, 0.6], rtol=1e-6)
    np.testing.assert_allclose(default["var"], [1.1, 1.7], rtol=1e-6)
    np.testing.assert_array_equal(params["var"], [1, 1])


def test_the_key_of_a_child_decides_its_numbers():
    one, two = nn.fold_key((3, 4), 0), nn.fold_key((3, 4), 1)
    assert not np.array_equal(nn.uniform(1.0)(one, (4,)), nn.uniform(1.0)(two, (4,)))
    rate, x = 0.5, np.ones((20, 20))
    net = nn.sequential(nn.relu(), drop=nn.dropout(rate))
    _, cache = net.forward(nn.training({}, (3, 4)), x)
    _, alone = nn.dropout(rate).forward({"key": two}, x)
    np.testing.assert_array_equal(cache["drop"]["mask"], alone["mask"])


# ------------------------------------------------------------------------------------------------
# Trees
# ------------------------------------------------------------------------------------------------

names = st.text(st.characters(exclude_characters="/", codec="utf-8"), min_size=1, max_size=5)
leaves = st.integers(0, 5).map(lambda size: np.arange(size, dtype=np.float64))
trees = st.recursive(
    st.dictionaries(names, leaves, min_size=1, max_size=3),
    lambda children: st.dictionaries(names, children | leaves, min_size=1, max_size=3),
    max_leaves=8,
)


@given(tree=trees)
def test_flatten_and_unflatten_are_inverse(tree):
    flat = nn.tree_flatten(tree)
    assert not any(isinstance(leaf, dict) for leaf in flat.values())
    assert all_bytes(nn.tree_unflatten(flat)) == all_bytes(tree)
    assert list(nn.tree_flatten(nn.tree_unflatten(flat))) == list(flat)


def test_flatten_joins_names_in_order():
    tree = {"b": {"y": 1, "x": {"z": 2}}, "a": 3, "empty": {}}
    assert list(nn.tree_flatten(tree).items()) == [("b/y", 1), ("b/x/z", 2), ("a", 3)]
    assert nn.tree_unflatten({"b/y": 1, "b/x/z": 2}) == {"b": {"y": 1, "x": {"z": 2}}}
    assert nn.tree_flatten({}) == nn.tree_unflatten({}) == {}


def test_malformed_trees_are_refused():
    for bad in ({"a/b": 1}, {"": 1}, {"x": {"a/b": 1}}):
        with pytest.raises(ValueError, match="a name must not be empty or contain '/'"):
            nn.tree_flatten(bad)
    for bad in ({"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}, {"a//b": 1}, {"": 1}, {"a/": 1}, {"/a": 1}):
        with pytest.raises(ValueError, match="is malformed or clashes"):
            nn.tree_unflatten(bad)
    assert nn.tree_flatten(nn.tree_unflatten({"a/" * 100 + "b": 1})) == {"a/" * 100 + "b": 1}
    path = "a/" * 101 + "b"
    with pytest.raises(ValueError, match=f"'{path[:50]}'\\.\\.\\. is nested deeper than 100"):
        nn.tree_unflatten({path: 1})
    with pytest.raises(ValueError, match="name 'a/b/c' is malformed or clashes"):
        nn.tree_unflatten({"a": np.ones(1), "a/b/c": 2})
    for function in (nn.tree_flatten, nn.tree_unflatten):
        with pytest.raises(TypeError, match="must be a dict, got list"):
            function([])
        with pytest.raises(TypeError, match="names must be strings, got 1"):
            function({1: 2})


@given(tree=trees)
def test_tree_map_applies_leaf_by_leaf(tree):
    doubled = nn.tree_map(lambda a, b: a + b, tree, tree)
    flat = nn.tree_flatten(tree)
    assert list(nn.tree_flatten(doubled)) == list(flat)
    for path, leaf in nn.tree_flatten(doubled).items():
        np.testing.assert_array_equal(leaf, 2 * flat[path])
    assert nn.tree_map(lambda a: a + 1, 2) == 3
    assert list(nn.tree_map(max, {"b": 1, "a": 2}, {"a": 3, "b": 4})) == ["b", "a"]


def test_tree_map_refuses_trees_that_differ():
    for one, other in (({"a": 1}, {"b": 1}), ({"a": 1}, {"a": 1, "b": 2}), ({"a": {}}, {"a": 1})):
        for pair in ((one, other), (other, one)):
            with pytest.raises(ValueError, match="tree_map: trees differ"):
                nn.tree_map(lambda a, b: a, *pair)
    for others in ([{"b": 1}], [{"a": 2}, {"b": 1}]):
        with pytest.raises(ValueError, match=r"trees differ, \['a'\] here and \['b'\] there$"):
            nn.tree_map(max, {"a": 1}, *others)
    with pytest.raises(TypeError, match="at least one tree"):
        nn.tree_map(abs)


def test_tree_add_sums_what_is_there():
    one = {"a": np.array([1.0]), "b": {"c": np.array([2.0])}}
    other = {"b": {"c": np.array([3.0]), "d": np.array([4.0])}}
    total = nn.tree_add(one, other, one)
    assert nn.tree_map(float, nn.tree_map(np.sum, total)) == {"a": 2, "b": {"c": 7, "d": 4}}
    assert one["b"]["c"] == 2
    assert list(other["b"]) == ["c", "d"]
    assert nn.tree_add() == {}
    for bad in ({"a": np.ones(2)}, {"a": {}}, {"b": np.array([1.0])}):
        with pytest.raises(ValueError, match="tree_add: '[ab]' is"):
            nn.tree_add(one, bad)
    with pytest.raises(TypeError, match="tree_add: every tree must be a dict, got list"):
        nn.tree_add(one, [])


def test_parameters_are_counted_without_keys():
    params, _ = nn.sequential(nn.linear(5), nn.batch_norm(), nn.linear(2)).init(0, (3,))
    assert nn.count_parameters(params) == 3 * 5 + 5 + 4 * 5 + 5 * 2 + 2
    assert nn.count_parameters(nn.training({**params, "x": nn.training({}, 0)}, 0)) == 52
    assert nn.count_parameters({"monkey": np.ones(2), "scalar": np.float32(1)}) == 3


@given(seed=st.integers(0, 1000), limit=st.floats(0.01, 100))
def test_norms_and_clipping(seed, limit):
    rng = np.random.default_rng(seed)
    grads = {"a": {"W": rng.normal(size=(3, 2)).astype(np.float32)}, "b": rng.normal(size=4)}
    flat = np.concatenate([leaf.ravel() for leaf in nn.tree_flatten(grads).values()])
    norm = math.sqrt(sum(float(value) ** 2 for value in flat))
    assert nn.global_norm(grads) == pytest.approx(norm)
    clipped = nn.clip_gradients(grads, limit)
    scale = min(1, limit / norm)
    for path, leaf in nn.tree_flatten(clipped).items():
        original = nn.tree_flatten(grads)[path]
        np.testing.assert_allclose(leaf, original * scale, rtol=1e-6)
        assert leaf.dtype == original.dtype
    assert nn.global_norm({}) == nn.global_norm({"a": np.zeros(3)}) == 0
    big, small = {"a": np.full(4, 1e30, np.float32)}, {"a": np.full(4, 1e-200)}
    assert nn.global_norm(big) == pytest.approx(2e30)
    assert nn.global_norm(small) == pytest.approx(2e-200, rel=1e-9, abs=0)
    assert math.copysign(1, nn.global_norm({})) == 1
    assert nn.clip_gradients(small, nn.global_norm(small)) is small
    both = nn.clip_gradients({"a": np.array([True, True])}, 1.0)
    np.testing.assert_allclose(both["a"], math.sqrt(0.5))


# ------------------------------------------------------------------------------------------------
# Losses
# ------------------------------------------------------------------------------------------------


def log_softmax(logits):
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def rows(labels, classes):
    return np.eye(classes)[labels]


CLASS_LOSSES = {  # name: (loss, is the prediction a probability, formula on class probabilities)
    "softmax_cross_entropy": (
        nn.softmax_cross_entropy,
        False,
        lambda z, t: -(t * log_softmax(z)).sum() / len(z),
    ),
    "softmax_cross_entropy(smoothing)": (
        partial(nn.softmax_cross_entropy, smoothing=0.3),
        False,
        lambda z, t: -((0.7 * t + 0.3 / z.shape[1]) * log_softmax(z)).sum() / len(z),
    ),
    "cross_entropy": (nn.cross_entropy, True, lambda p, t: -(t * np.log(p)).sum() / len(p)),
}
ELEMENT_LOSSES = {  # name: (loss, formula)
    "mean_squared_error": (nn.mean_squared_error, lambda p, t: ((p - t) ** 2).mean()),
    "mean_absolute_error": (nn.mean_absolute_error, lambda p, t: np.abs(p - t).mean()),
    "huber": (
        nn.huber,
        lambda p, t: np.where(np.abs(p - t) <= 1, 0.5 * (p - t) ** 2, np.abs(p - t) - 0.5).mean(),
    ),
    "huber(0.2)": (
        partial(nn.huber, delta=0.2),
        lambda p, t: np.where(
            np.abs(p - t) <= 0.2, 0.5 * (p - t) ** 2, 0.2 * (np.abs(p - t) - 0.1)
        ).mean(),
    ),
    "binary_cross_entropy": (
        nn.binary_cross_entropy,
        lambda z, t: (
            -t * np.log(1 / (1 + np.exp(-z))) - (1 - t) * np.log(1 / (1 + np.exp(z)))
        ).mean(),
    ),
}


@pytest.mark.parametrize("name", CLASS_LOSSES)
@given(
    count=st.integers(1, 4),
    classes=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    soft=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_class_losses_are_their_formulas(name, count, classes, seed, soft, dtype):
    loss, probable, formula = CLASS_LOSSES[name]
    rng = np.random.default_rng(seed)
    prediction = rng.normal(size=(count, classes))
    if probable:
        prediction = np.exp(log_softmax(prediction))
    labels = rng.integers(0, classes, count)
    t = rng.random((count, classes)) if soft else rows(labels, classes)
    prediction, t = prediction.astype(dtype), t.astype(np.float32)
    target = t if soft else labels.astype(rng.choice(["i1", "i4", "u2", "i8"]))
    before = all_bytes(prediction, target)
    value, gradient = loss(frozen(prediction), frozen(target))
    assert type(value) is float
    assert (gradient.shape, gradient.dtype) == (prediction.shape, dtype)
    assert all_bytes(prediction, target) == before
    exact, step = prediction.astype(np.float64), 1e-6 if probable else 1e-5
    assert value == pytest.approx(formula(exact, t), rel=1e-5, abs=1e-6)
    numeric = numeric_gradient(lambda p: formula(p, t), exact, step)
    np.testing.assert_allclose(gradient, numeric, rtol=2e-3, atol=1e-5)
    if not soft:
        assert loss(prediction, rows(labels, classes))[0] == pytest.approx(value)


def test_a_thousandth_beyond_0_and_1_counts_as_rounding():
    for p in ([1 + 1e-3, -1e-3], [1.0005, -0.0005]):
        assert nn.cross_entropy(np.array([p]), np.array([0]))[0] == pytest.approx(-math.log(p[0]))
    for p in ([1.0011, 0.0], [1.0, -0.0011]):
        with pytest.raises(ValueError, match="probabilities must be from 0 to 1"):
            nn.cross_entropy(np.array([p]), np.array([0]))


@given(count=st.integers(1, 4), classes=st.integers(1, 4), seed=st.integers(0, 10**6),
       margin=st.sampled_from([0.0, 0.5, 1.0, 3.0]))  # fmt: skip
def test_hinge_is_its_formula(count, classes, seed, margin):
    rng = np.random.default_rng(seed)
    scores, labels = rng.normal(size=(count, classes)), rng.integers(0, classes, count)

    def formula(scores):
        total = 0.0
        for sample, label in enumerate(labels):
            for wrong in set(range(classes)) - {label}:
                total += max(0.0, scores[sample, wrong] - scores[sample, label] + margin)
        return total / count

    value, gradient = nn.hinge(frozen(scores), labels, margin)
    assert value == pytest.approx(formula(scores))
    np.testing.assert_allclose(gradient, numeric_gradient(formula, scores), atol=1e-8)
    assert nn.hinge(scores, labels)[0] == nn.hinge(scores, labels, 1.0)[0]
    assert nn.hinge(scores.astype(np.float32), labels)[1].dtype == np.float32


@pytest.mark.parametrize("name", ELEMENT_LOSSES)
@given(shape=st.lists(sizes, min_size=1, max_size=3).map(tuple), seed=st.integers(0, 10**6),
       dtype=st.sampled_from([np.float32, np.float64]))  # fmt: skip
def test_element_losses_are_their_formulas(name, shape, seed, dtype):
    loss, formula = ELEMENT_LOSSES[name]
    rng = np.random.default_rng(seed)
    prediction, target = rng.normal(size=shape).astype(dtype), rng.random(shape)
    value, gradient = loss(frozen(prediction), frozen(target))
    assert type(value) is float
    assert (gradient.shape, gradient.dtype) == (shape, dtype)
    exact = prediction.astype(np.float64)
    assert value == pytest.approx(formula(exact, target), rel=1e-5)
    numeric = numeric_gradient(lambda p: formula(p, target), exact)
    np.testing.assert_allclose(gradient, numeric, rtol=2e-3, atol=1e-5)
    whole = loss(prediction, np.ones(shape, int))[0]
    assert whole == loss(prediction, np.ones(shape, bool))[0] == loss(prediction, np.ones(shape))[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_losses_at_extreme_predictions_are_right_without_a_warning(dtype):
    logits = np.array([[1e4, -1e4], [1e4, -1e4]], dtype)
    certain = np.array([[1, 0], [1, 0]], dtype)
    tiny = float(np.finfo(dtype).tiny)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value, gradient = nn.softmax_cross_entropy(logits, np.array([0, 1]))
        assert value == 1e4
        np.testing.assert_array_equal(gradient, [[0, 0], [0.5, -0.5]])
        value, gradient = nn.binary_cross_entropy(logits, np.array([[1, 0], [0, 1]]))
        assert value == 5e3
        np.testing.assert_array_equal(gradient, [[0, 0], [0.25, -0.25]])
        value, gradient = nn.hinge(logits, np.array([0, 1]))
        assert value == (2e4 + 1) / 2
        value, gradient = nn.cross_entropy(certain, np.array([0, 1]))
        assert value == pytest.approx(-math.log(tiny) / 2)
        np.testing.assert_allclose(gradient, [[-0.5, 0], [0, -0.5 / tiny]])
        value, gradient = nn.cross_entropy(certain, certain)
        assert value == 0


@given(tree=trees, coefficient=st.sampled_from([0.0, 0.1, 2.0]))
def test_l2_penalty_is_on_matrices_and_kernels_alone(tree, coefficient):
    kernel, matrix = np.full((2, 1, 2, 2), 3.0), np.full((2, 3), -1.0, np.float32)
    params = {**tree, "net": {"kernel": kernel, "W": matrix, "b": np.ones(3)}}
    value, grads = nn.l2_penalty(params, coefficient)
    assert value == pytest.approx(coefficient / 2 * (8 * 9 + 6))
    assert list(nn.tree_flatten(grads)) == ["net/kernel", "net/W"]
    np.testing.assert_array_equal(grads["net"]["kernel"], coefficient * kernel)
    np.testing.assert_allclose(grads["net"]["W"], coefficient * matrix)
    assert grads["net"]["W"].dtype == np.float32


@pytest.mark.parametrize("loss", [nn.softmax_cross_entropy, nn.cross_entropy])
def test_one_bad_probability_among_good_ones_is_refused(loss):
    prediction = np.full((2, 2), 0.5)
    for bad in (-0.1, 1.1, math.nan, math.inf, -math.inf):
        for index in np.ndindex(2, 2):
            target = np.full((2, 2), 0.5)
            target[index] = bad
            with pytest.raises(ValueError, match="target probabilities must be numbers from 0"):
                loss(prediction, target)


def test_one_bad_value_among_good_ones_is_refused():
    for bad in (-0.1, 1.1, math.nan, math.inf, -math.inf):
        for index in np.ndindex(2, 2):
            values = np.full((2, 2), 0.5)
            values[index] = bad
            with pytest.raises(
                ValueError, match="binary_cross_entropy: target must be from 0 to 1"
            ):
                nn.binary_cross_entropy(np.ones((2, 2)), values)
            with pytest.raises(
                ValueError, match="cross_entropy: probabilities must be from 0 to 1"
            ):
                nn.cross_entropy(values, np.array([0, 1]))


@given(seed=st.integers(0, 10**6), smoothing=st.sampled_from([0.0, 0.1, 0.9]))
def test_smoothing_mixes_the_target_with_equal_shares(seed, smoothing):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(3, 4)), rng.integers(0, 4, 3)
    mixed = (1 - smoothing) * rows(labels, 4) + smoothing / 4
    value, gradient = nn.softmax_cross_entropy(logits, labels, smoothing)
    expected, expected_gradient = nn.softmax_cross_entropy(logits, mixed)
    assert value == pytest.approx(expected)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-15)
    np.testing.assert_allclose(gradient, (np.exp(log_softmax(logits)) - mixed) / 3, atol=1e-15)


# ------------------------------------------------------------------------------------------------
# Optimisers and schedules
# ------------------------------------------------------------------------------------------------


def sgd_rule(p, g, memory, lr, momentum=0.0, nesterov=False, weight_decay=0.0):
    g = g + weight_decay * p
    memory["v"] = momentum * memory["v"] + g if "v" in memory else g
    change = g + momentum * memory["v"] if nesterov else memory["v"]
    return p - lr * change


def adam_rule(
    p, g, memory, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=False
):
    if decoupled:
        p = p - lr * weight_decay * p
    else:
        g = g + weight_decay * p
    t = memory["t"] = memory.get("t", 0) + 1
    memory["m"] = beta1 * memory.get("m", 0) + (1 - beta1) * g
    memory["v"] = beta2 * memory.get("v", 0) + (1 - beta2) * g * g
    denominator = np.sqrt(memory["v"]) / math.sqrt(1 - beta2**t) + eps
    return p - lr / (1 - beta1**t) * memory["m"] / denominator


def rmsprop_rule(p, g, memory, lr, decay=0.99, eps=1e-8, momentum=0.0, weight_decay=0.0):
    g = g + weight_decay * p
    memory["s"] = decay * memory.get("s", 0) + (1 - decay) * g * g
    change = g / (np.sqrt(memory["s"]) + eps)
    memory["v"] = momentum * memory.get("v", 0) + change
    return p - lr * memory["v"]


def adagrad_rule(p, g, memory, lr, eps=1e-10, weight_decay=0.0):
    g = g + weight_decay * p
    memory["s"] = memory.get("s", 0) + g * g
    return p - lr * g / (np.sqrt(memory["s"]) + eps)


def adadelta_rule(p, g, memory, lr, decay=0.9, eps=1e-6, weight_decay=0.0):
    g = g + weight_decay * p
    memory["s"] = decay * memory.get("s", 0) + (1 - decay) * g * g
    change = np.sqrt(memory.get("u", 0) + eps) / np.sqrt(memory["s"] + eps) * g
    memory["u"] = decay * memory.get("u", 0) + (1 - decay) * change * change
    return p - lr * change


OPTIMISERS = {  # name: (constructor, its rule written out, default rate, options)
    "sgd": (nn.sgd, sgd_rule, None, {}),
    "sgd momentum": (nn.sgd, sgd_rule, None, {"momentum": 0.9}),
    "sgd momentum schedule": (nn.sgd, sgd_rule, None, {"momentum": nn.multistep(0.9, [2], 0.5)}),
    "sgd nesterov": (nn.sgd, sgd_rule, None, {"momentum": 0.7, "nesterov": True}),
    "adam": (nn.adam, adam_rule, 1e-3, {}),
    "adam options": (nn.adam, adam_rule, 1e-3, {"beta1": 0.5, "beta2": 0.7, "eps": 1e-2}),
    "adam betas of 0": (nn.adam, adam_rule, 1e-3, {"beta1": 0.0, "beta2": 0.0}),
    "adamw": (nn.adamw, partial(adam_rule, decoupled=True), 1e-3, {}),
    "rmsprop": (nn.rmsprop, rmsprop_rule, 0.01, {}),
    "rmsprop momentum": (
        nn.rmsprop,
        rmsprop_rule,
        0.01,
        {"momentum": 0.8, "decay": 0.5, "eps": 0.1},
    ),
    "adagrad": (nn.adagrad, adagrad_rule, 0.01, {}),
    "adagrad eps": (nn.adagrad, adagrad_rule, 0.01, {"eps": 0.1}),
    "adadelta": (nn.adadelta, adadelta_rule, 1.0, {}),
    "adadelta options": (nn.adadelta, adadelta_rule, 1.0, {"decay": 0.5, "eps": 0.1}),
}
every_optimiser = pytest.mark.parametrize("name", OPTIMISERS)


def some_params(seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shapes = {"a/W": (3, 2), "a/b": (2,), "c/d/scale": (), "e": (1, 2, 2)}
    return nn.tree_unflatten(
        {path: np.asarray(rng.normal(size=shape), dtype) for path, shape in shapes.items()}
    )


@every_optimiser
@given(
    seed=st.integers(0, 10**6),
    lr=st.sampled_from([None, 0.1, "schedule"]),
    weight_decay=st.sampled_from([None, 0.0, 0.3]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_optimisers_follow_their_rules(name, seed, lr, weight_decay, dtype):
    constructor, rule, default, options = OPTIMISERS[name]
    options = dict(options) if weight_decay is None else {**options, "weight_decay": weight_decay}
    if lr is None and default is None:
        lr = 0.1
    rate = nn.exponential(0.1, 0.5) if lr == "schedule" else lr
    optimizer = constructor(**options) if lr is None else constructor(rate, **options)
    if weight_decay is None and name == "adamw":
        options["weight_decay"] = 0.01
    params = some_params(seed, dtype)
    state = optimizer.init(params)
    expected = {path: leaf.astype(np.float64) for path, leaf in nn.tree_flatten(params).items()}
    memories = {path: {} for path in expected}
    for step in range(5):
        grads = some_params((seed, step), dtype)
        if step == 1:
            grads = {"a": {"W": grads["a"]["W"]}}  # the others are frozen for a step
        params, state = optimizer.step(frozen(params), frozen(grads), frozen(state))
        rate = 0.1 * 0.5**step if lr == "schedule" else default if lr is None else lr
        now = {key: value(step) if callable(value) else value for key, value in options.items()}
        for path, g in nn.tree_flatten(grads).items():
            expected[path] = rule(expected[path], g.astype(np.float64), memories[path], rate, **now)
        assert int(state["step"]) == step + 1
        for path, leaf in nn.tree_flatten(params).items():
            assert (type(leaf), leaf.dtype, leaf.shape) == (np.ndarray, dtype, expected[path].shape)
            tolerance = 1e-10 if dtype == np.float64 else 2e-4
            np.testing.assert_allclose(leaf, expected[path], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("constructor", [nn.sgd, nn.rmsprop])
def test_a_scheduled_momentum_is_checked_at_its_step(constructor):
    optimizer = constructor(0.1, momentum=lambda step: 0.5 * step)
    params = some_params(1)
    state = optimizer.init(params)
    for _ in range(2):
        params, state = optimizer.step(params, params, state)
    with pytest.raises(ValueError, match="momentum at step 2 must be >= 0 and < 1, got 1"):
        optimizer.step(params, params, state)


@every_optimiser
def test_optimisers_are_pure_and_their_states_can_be_saved(name, tmp_path):
    constructor, _, _, options = OPTIMISERS[name]
    optimizer = constructor(0.1, **options)
    params, grads = some_params(1, np.float32), some_params(2, np.float32)
    state = optimizer.init(params)
    before = all_bytes(params, grads, state)
    first = optimizer.step(params, grads, state)
    assert all_bytes(params, grads, state) == before
    assert all_bytes(*optimizer.step(params, grads, state)) == all_bytes(*first)
    nn.save(tmp_path / "state.npz", first[1])
    loaded = nn.load(tmp_path / "state.npz")
    assert all_bytes(loaded) == all_bytes(first[1])
    copy = pickle.loads(pickle.dumps(optimizer))
    second = optimizer.step(first[0], grads, first[1])
    assert all_bytes(*copy.step(first[0], grads, loaded)) == all_bytes(*second)
    assert all_bytes(copy.init(params)) == all_bytes(state)


@every_optimiser
def test_optimisers_leave_frozen_entries_as_they_are(name):
    constructor, _, _, options = OPTIMISERS[name]
    optimizer = constructor(0.1, **options)
    params, grads = some_params(1), some_params(2)
    moved, _ = optimizer.step(params, {"a": {"b": grads["a"]["b"]}}, optimizer.init(params))
    assert moved["a"]["W"] is params["a"]["W"]
    assert moved["c"] is params["c"]
    assert not np.array_equal(moved["a"]["b"], params["a"]["b"])
    same, state = optimizer.step(params, {}, optimizer.init(params))
    assert all_bytes(same) == all_bytes(params)
    assert int(state["step"]) == 1


@every_optimiser
def test_optimisers_keep_the_dtype_of_params(name):
    constructor, _, _, options = OPTIMISERS[name]
    optimizer = constructor(0.1, **options)
    params = some_params(1, np.float32)
    state = optimizer.init(some_params(1, np.float64))
    moved, state = optimizer.step(params, some_params(2, np.float64), state)
    assert {leaf.dtype for leaf in nn.tree_flatten(moved).values()} == {np.dtype(np.float32)}
    expected, _ = optimizer.step(params, some_params(2, np.float32), optimizer.init(params))
    assert all_bytes(moved) == all_bytes(expected)
    params = some_params(1, np.float64)
    _, state = optimizer.step(params, params, optimizer.init(some_params(1, np.float32)))
    floats = [leaf for leaf in nn.tree_flatten(state).values() if leaf.dtype.kind == "f"]
    assert {leaf.dtype for leaf in floats} == {np.dtype(np.float64)}


@every_optimiser
def test_optimisers_refuse_what_is_not_theirs(name):
    constructor, _, _, options = OPTIMISERS[name]
    optimizer = constructor(0.1, **options)
    params, grads = some_params(1), some_params(2)
    state = optimizer.init(params)
    where = name.split()[0]
    for bad in (None, [params], params["e"]):
        for position, what in enumerate(("params", "grads", "state")):
            arguments = [params, grads, state]
            arguments[position] = bad
            with pytest.raises(TypeError, match=f"{where}: {what} must be a dict"):
                optimizer.step(*arguments)
        with pytest.raises(TypeError, match=f"{where}: params must be a dict"):
            optimizer.init(bad)
    with pytest.raises(ValueError, match=f"{where}: grads have an entry 'a/x' that params lack"):
        optimizer.step(params, {"a": {"x": params["e"]}}, state)
    for shape in ((1, 2, 3), (1, 2, 1)):
        with pytest.raises(ValueError, match=rf"{where}: e: grads have shape .*{shape[-1]}\), but"):
            optimizer.step(params, {"e": np.ones(shape)}, state)
    for bad in (None, [1.0], np.ones((1, 2, 2), int)):
        with pytest.raises(TypeError, match=f"{where}: e: grads must be"):
            optimizer.step(params, {"e": bad}, state)
    with pytest.raises(TypeError, match=f"{where}: e: params must be"):
        optimizer.step({**params, "e": np.ones((1, 2, 2), int)}, grads, state)
    with pytest.raises(TypeError, match=f"{where}: e: grads must be a NumPy array, got dict"):
        optimizer.step(params, {"e": {}}, state)
    with pytest.raises(TypeError, match=f"{where}: e: params must be a NumPy array, got dict"):
        optimizer.step({**params, "e": {}}, {"e": params["e"]}, state)
    others = [nn.sgd(0.1), nn.sgd(0.1, 0.9), nn.adam(), nn.rmsprop(), nn.adagrad(), nn.adadelta()]
    for other in others:
        if other.init(params).keys() != state.keys():
            with pytest.raises(ValueError, match=f"{where}: the state is not this optimiser's"):
                optimizer.step(params, grads, other.init(params))
    for quantity in set(state) - {"step", "scale"}:
        with pytest.raises(ValueError, match=f"{where}: the state has no {quantity} of params"):
            optimizer.step(params, grads, {**state, quantity: np.ones(3)})
        with pytest.raises(ValueError, match=f"{where}: the state has no {quantity} of c/d"):
            optimizer.step(params, grads, {**state, quantity: {**state[quantity], "c": {"d": 1}}})
        for bad in ({}, None, np.ones(7), np.ones((1, 1)), np.array(None)):
            with pytest.raises(ValueError, match=f"the state has no {quantity} of e and of its"):
                optimizer.step(params, grads, {**state, quantity: {**state[quantity], "e": bad}})
    for bad in ({"step": np.array(-1)}, {"scale": np.array(-0.1)}, {"scale": np.array(1.1)}):
        with pytest.raises(ValueError, match=rf"{where}: {next(iter(bad))} in the state must be"):
            optimizer.step(params, grads, {**state, **bad})
    for rate in (math.nan, math.inf, -0.1):
        broken = constructor(lambda step, rate=rate: rate, **options)
        with pytest.raises(ValueError, match=f"{where}: lr at step 0 must be >= 0, got {rate}"):
            broken.step(params, grads, state)


def test_glibc_is_asked_to_keep_freed_memory(monkeypatch):
    asked = []
    library = types.SimpleNamespace(mallopt=lambda *arguments: asked.append(arguments))
    monkeypatch.setattr("ctypes.CDLL", lambda name: library)
    nn.sgd(0.1).init({})
    trim_threshold, mmap_threshold = -1, -3  # M_... in malloc.h
    assert asked == [(trim_threshold, 2**31 - 1), (mmap_threshold, 2**25)]


SCHEDULES = {  # name: (schedule, formula)
    "step_decay": (nn.step_decay(2.0, 3, 0.5), lambda step: 2.0 * 0.5 ** (step // 3)),
    "step_decay default": (nn.step_decay(2.0, 4), lambda step: 2.0 * 0.1 ** (step // 4)),
    "multistep": (
        nn.multistep(2.0, [7, 2], 0.5),
        lambda step: 2.0 * (1 if step < 2 else 0.5 if step < 7 else 0.25),
    ),
    "multistep default": (nn.multistep(2.0, (2,)), lambda step: 2.0 if step < 2 else 0.2),
    "exponential": (nn.exponential(2.0, 0.9), lambda step: 2.0 * 0.9**step),
    "cosine": (
        nn.cosine(2.0, 10, 0.5),
        lambda step: 0.5 + 1.5 * (1 + math.cos(math.pi * min(step, 10) / 10)) / 2,
    ),
    "cosine default": (
        nn.cosine(2.0, 5),
        lambda step: 1 + math.cos(math.pi * min(step, 5) / 5),
    ),
    "cyclic": (
        nn.cyclic(0.5, 2.5, 4),
        lambda step: 0.5 + 2.0 * (1 - abs((step % 8) / 4 - 1)),
    ),
    "warmup of a number": (nn.warmup(2.0, 4), lambda step: 2.0 * min(1, (step + 1) / 4)),
    "warmup of a schedule": (
        nn.warmup(nn.exponential(2.0, 0.9), 3),
        lambda step: 2.0 * 0.9**step * min(1, (step + 1) / 3),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_their_formulas(name):
    schedule, formula = SCHEDULES[name]
    copy = pickle.loads(pickle.dumps(schedule))
    for step in (*range(30), 10**6):
        assert type(schedule(step)) is float
        assert schedule(step) == pytest.approx(formula(step), abs=1e-15)
        assert copy(step) == schedule(step)
        assert schedule(np.int64(step)) == pytest.approx(schedule(step))


@pytest.mark.parametrize(
    ("steps", "rise"), [(10, 0.3), (100, 0.25), (7, 0.0), (6, 1.0), (1, 0.3), (2, 0.5)]
)
def test_one_cycle_is_that_of_pytorch(steps, rise):
    schedule = nn.one_cycle(2.0, steps, rise)
    start, end, top = 2.0 / 25, 2.0 / 250_000, max(rise * steps - 1, 0)
    for step in range(steps):
        if step < top:
            expected = 2.0 + (start - 2.0) / 2 * (1 + math.cos(math.pi * step / top))
        elif steps - 1 - top > 0:
            along = (step - top) / (steps - 1 - top)
            expected = end + (2.0 - end) / 2 * (1 + math.cos(math.pi * along))
        else:
            expected = end
        assert schedule(step) == pytest.approx(expected)
    assert schedule(steps) == schedule(10**6) == pytest.approx(end)
    assert pickle.loads(pickle.dumps(schedule))(3) == schedule(3)
    assert nn.one_cycle(2.0, 100)(29) == pytest.approx(2.0)


@given(
    losses=st.lists(
        st.sampled_from([3.0, 2.0, 1.999, 1.5, 1.0, -1.0, math.nan, math.inf]), max_size=30
    ),
    patience=st.integers(0, 3),
    threshold=st.sampled_from([0.0, 1e-3, 0.3]),
)
def test_reduce_on_plateau_counts_as_pytorch_does(losses, patience, threshold):
    optimizer = nn.sgd(0.5)
    params = {"w": np.zeros(1)}
    state = optimizer.init(params)
    best, bad, scale = math.inf, 0, 1.0
    for loss in losses:
        before = all_bytes(state)
        new = nn.reduce_on_plateau(state, loss, 0.5, patience, threshold)
        assert all_bytes(state) == before
        if loss < best * (1 - threshold):
            best, bad = loss, 0
        else:
            bad += 1
        if bad > patience:
            scale, bad = scale * 0.5, 0
        assert float(new["scale"]) == scale
        assert (float(new["plateau_best"]), int(new["plateau_count"])) == (best, bad)
        moved, state = optimizer.step(params, {"w": np.ones(1)}, new)
        assert moved["w"][0] == -0.5 * scale
        assert {"plateau_best", "plateau_count"} <= state.keys()


def test_reduce_on_plateau_by_default_waits_for_ten_and_halves():
    state = nn.adam().init({})
    for _ in range(11):
        state = nn.reduce_on_plateau(state, 1.0)
        assert state["scale"] == 1
    assert nn.reduce_on_plateau(state, 0.9995)["scale"] == 0.5
    assert nn.reduce_on_plateau(state, np.float32(0.998))["scale"] == 1


def test_states_hold_what_the_rule_remembers_and_no_more():
    params = some_params(0)
    remembered = {
        "sgd": set(),
        "sgd momentum": {"velocity"},
        "sgd momentum schedule": {"velocity"},
        "sgd nesterov": {"velocity"},
        "adam": {"m", "v", "count"},
        "adamw": {"m", "v", "count"},
        "rmsprop": {"square_average"},
        "rmsprop momentum": {"square_average", "velocity"},
        "adagrad": {"square_sum"},
        "adadelta": {"square_average", "change_average"},
    }
    for name, quantities in remembered.items():
        constructor, _, _, options = OPTIMISERS[name]
        state = constructor(0.1, **options).init(params)
        assert state.keys() == {"step", "scale"} | quantities
        assert (int(state["step"]), float(state["scale"])) == (0, 1.0)
        for quantity in quantities:
            assert nn.tree_flatten(state[quantity]).keys() == nn.tree_flatten(params).keys()
            assert not any(leaf.any() for leaf in nn.tree_flatten(state[quantity]).values())


def test_adam_counts_the_steps_of_each_entry():
    optimizer = nn.adam(0.1)
    params = {"a": np.ones(2), "b": np.ones(2)}
    state = optimizer.init(params)
    for grads in ({"a": np.ones(2)}, {"a": np.ones(2), "b": np.ones(2)}, {"a": np.ones(2)}):
        params, state = optimizer.step(params, grads, state)
    assert {name: int(count) for name, count in state["count"].items()} == {"a": 3, "b": 1}
    assert {count.dtype for count in state["count"].values()} == {np.dtype(np.int64)}
    assert int(state["step"]) == 3


@given(losses=st.lists(st.sampled_from([2.0, 1.0, 0.5]), max_size=12),
       factor=st.sampled_from([0.0, 0.3, 1.0]))  # fmt: skip
def test_a_plateau_multiplies_the_scale_by_its_factor(losses, factor):
    state = nn.sgd(1.0).init({})
    best, bad, scale = math.inf, 0, 1.0
    for loss in losses:
        state = nn.reduce_on_plateau(state, loss, factor=factor, patience=1)
        best, bad = (loss, 0) if loss < best else (best, bad + 1)
        if bad > 1:
            scale, bad = scale * factor, 0
        assert float(state["scale"]) == scale


# ------------------------------------------------------------------------------------------------
# Gradient checking
# ------------------------------------------------------------------------------------------------


class Stranger:
    """A right pair by somebody who never saw purenn; the tests break it in one place each."""

    def forward(self, params, x):
        return x @ params["W"] + params["b"], (x, params["W"])

    def backward(self, params, cache, dy):
        x, W = cache
        return self.dx(W, dy), {"W": self.dW(x, dy), "b": self.db(dy)}

    def dx(self, W, dy):
        return dy @ W.T

    def dW(self, x, dy):
        return x.T @ dy

    def db(self, dy):
        return dy.sum(axis=0)


class WrongSign(Stranger):
    def db(self, dy):
        return -dy.sum(axis=0)


class MissingFactor(Stranger):
    def dW(self, x, dy):
        return x.T @ dy / len(x)


class Transposed(Stranger):
    def dW(self, x, dy):
        return dy.T @ x


class ZeroBias(Stranger):
    def db(self, dy):
        return np.zeros(dy.shape[1])


class ForgottenBias(Stranger):
    def backward(self, params, cache, dy):
        dx, grads = super().backward(params, cache, dy)
        return dx, {"W": grads["W"]}


class WrongForX(Stranger):
    def dx(self, W, dy):
        return dy @ W.T * 1.001


class ExtraEntry(Stranger):
    def backward(self, params, cache, dy):
        dx, grads = super().backward(params, cache, dy)
        return dx, {**grads, "c": dy}


class OneWrongEntry(Stranger):
    def dW(self, x, dy):
        gradient = x.T @ dy
        gradient[123, 45] += 1e-3
        return gradient


class Float32(Stranger):
    def forward(self, params, x):
        y, cache = super().forward(params, x)
        return y.astype(np.float32), cache


class WritesToItsInput(Stranger):
    def forward(self, params, x):
        x += 1
        return super().forward(params, x)


def stranger_inputs(rows=3, columns=3, batch=4):
    rng = np.random.default_rng(0)
    params = {"W": rng.normal(size=(rows, columns)), "b": rng.normal(size=columns)}
    return params, rng.normal(size=(batch, rows))


def test_a_right_pair_of_a_stranger_passes():
    for size in ((3, 3), (2, 5), (40, 30)):
        params, x = stranger_inputs(*size)
        assert nn.check_gradients(Stranger(), params, x) is None
        nn.check_gradients(Stranger(), nn.tree_map(np.float32, params), x.astype(np.float32))
    nn.check_gradients(Stranger(), params, x, rtol=1e-6, key=(3, 4))


def test_numbers_among_the_params_are_checked_too():
    scale = types.SimpleNamespace(
        forward=lambda params, x: (params["factor"] * x, x),
        backward=lambda params, x, dy: (params["factor"] * dy, {"factor": (x * dy).sum()}),
    )
    nn.check_gradients(scale, {"factor": 3.0}, np.ones((2, 2)))
    scale.backward = lambda params, x, dy: (params["factor"] * dy, {"factor": dy.sum() + 1})
    with pytest.raises(AssertionError, match=r"grads/factor\[\] is"):
        nn.check_gradients(scale, {"factor": 3.0}, np.ones((2, 2)))


@pytest.mark.parametrize(
    ("wrong", "size", "message"),
    [
        (WrongSign, (3, 3), r"grads/b\[0\] is (-?[\d.]+) by backward, but (-?[\d.]+) by central"),
        (MissingFactor, (3, 3), r"grads/W\[0, 0\] is .* by backward, but .* by central"),
        (Transposed, (3, 3), r"grads/W\[0, 1\] is"),
        (Transposed, (2, 3), r"grads/W has shape \(3, 2\), but what it is .* has \(2, 3\)"),
        (Transposed, (3, 2), r"grads/W has shape \(2, 3\), but what it is .* has \(3, 2\)"),
        (ZeroBias, (3, 3), r"grads/b\[0\] is 0 by backward"),
        (ForgottenBias, (3, 3), r"grads/b\[0\] is 0 by backward"),
        (WrongForX, (3, 3), r"dx\[0, 0\] is"),
        (ExtraEntry, (3, 3), r"grads have 'c', but params do not"),
        (OneWrongEntry, (400, 300), r"grads/W\[123, 45\] is"),
        (Float32, (3, 3), r"y must be float64 like x, got ndarray of float32"),
    ],
)
def test_a_wrong_gradient_is_found_and_named(wrong, size, message):
    params, x = stranger_inputs(*size)
    with pytest.raises(AssertionError, match=f"^check_gradients: {message}") as found:
        nn.check_gradients(wrong(), params, x)
    with pytest.raises(AssertionError) as again:
        nn.check_gradients(wrong(), params, x)
    assert str(found.value) == str(again.value)


def test_the_values_that_check_gradients_gives_are_right():
    params, x = stranger_inputs()
    with pytest.raises(AssertionError, match="grads/b") as found:
        nn.check_gradients(WrongSign(), params, x)
    analytic, numeric = (float(word) for word in str(found.value).split() if word[-1].isdigit())
    assert analytic == pytest.approx(-numeric, rel=1e-6)
    assert numeric != 0


def test_a_layer_that_writes_to_its_input_is_found():
    params, x = stranger_inputs()
    with pytest.raises(ValueError, match="read-only"):
        nn.check_gradients(WritesToItsInput(), params, x)


def test_a_gradient_wrong_by_less_than_rtol_passes():
    params, x = stranger_inputs()
    nn.check_gradients(WrongForX(), params, x, rtol=1e-2)


def test_a_wrong_layer_deep_in_a_network_is_found():
    broken = nn.tanh()._replace(backward=lambda params, cache, dy: (dy * (1 - cache), {}))
    net = nn.sequential(first=nn.linear(4), block=nn.residual(broken), out=nn.linear(2))
    params, _ = net.init(0, (3,))
    x = np.random.default_rng(0).normal(size=(2, 3))
    with pytest.raises(AssertionError, match="grads/first/W"):
        nn.check_gradients(net, params, x)


def test_kinks_and_statistics_and_missing_params_are_no_errors():
    x = np.array([[0.0, 1e-9, -1e-9, 2.0]])
    nn.check_gradients(nn.relu(), {}, x)
    nn.check_gradients(nn.leaky_relu(0.5), None, x)
    wrong = nn.relu()._replace(
        backward=lambda params, cache, dy: (dy * (cache > 0) * 1.1 - 0.1, {})
    )
    with pytest.raises(AssertionError, match="dx"):
        nn.check_gradients(wrong, {}, x)
    params, _ = nn.batch_norm().init(0, (4,))
    nn.check_gradients(nn.sequential(bn=nn.batch_norm()), {"bn": params}, x)


def test_a_layer_on_whole_numbers_is_checked_for_its_params():
    def forward(params, x):
        return params["table"][x], x

    def backward(params, cache, dy):
        gradient = np.zeros_like(params["table"])
        np.add.at(gradient, cache, dy)
        return None, {"table": gradient}

    lookup = nn.Layer(nn.identity_init, forward, backward)
    params = {"table": np.ones((5, 3)), "known": np.array([True, False])}  # nothing is moved of it
    nn.check_gradients(lookup, params, np.array([0, 3, 3]))


def test_a_real_network_is_checked():
    net = nn.sequential(
        hidden=nn.linear(256),
        norm=nn.batch_norm(),
        act=nn.relu(),
        drop=nn.dropout(0.2),
        out=nn.linear(10),
    )
    params, _ = net.init(0, (784,))
    x = np.random.default_rng(0).normal(size=(16, 784)).astype(np.float32)
    nn.check_gradients(net, nn.training(params, 5), x, rtol=1e-4)


def closures(factor):
    """A pair of functions made anew, y = factor · x · W + b, right unless `factor` is wrong."""

    def forward(params, x):
        return 2.0 * x * params["W"] + params["b"], x

    def backward(params, x, dy):
        return factor * dy * params["W"], {"W": (2.0 * x * dy).sum(axis=0), "b": dy.sum(axis=0)}

    return types.SimpleNamespace(forward=forward, backward=backward)


def test_closures_are_checked_like_any_other_pair():
    params = {"W": np.array([1.0, -2.0, 3.0]), "b": np.zeros(3)}
    x = np.random.default_rng(0).normal(size=(2, 3))
    nn.check_gradients(closures(2.0), params, x)
    with pytest.raises(AssertionError, match=r"^check_gradients: dx\[0, 0\] is"):
        nn.check_gradients(closures(-2.0), params, x)


@given(size=st.integers(1, 90), data=st.data())
def test_one_wrong_entry_is_found_wherever_it_is(size, data):
    wrong = data.draw(st.integers(0, size - 1))

    def backward(params, x, dy):
        gradient = dy.sum(axis=0)
        gradient[wrong] += 0.5
        return dy, {"b": gradient}

    layer = types.SimpleNamespace(forward=lambda params, x: (x + params["b"], x), backward=backward)
    with pytest.raises(AssertionError, match=rf"^check_gradients: grads/b\[{wrong}\] is"):
        nn.check_gradients(layer, {"b": np.zeros(size)}, np.ones((2, size)))


@settings(max_examples=5)
@given(row=st.integers(0, 249), column=st.integers(0, 399))
def test_one_wrong_entry_among_100_000_is_found_and_named(row, column):
    class Wrong(Stranger):
        def dW(self, x, dy):
            gradient = x.T @ dy
            gradient[row, column] += 1e-2
            return gradient

    params, x = stranger_inputs(250, 400)
    with pytest.raises(AssertionError, match=rf"grads/W\[{row}, {column}\] is"):
        nn.check_gradients(Wrong(), params, x)


def elementwise(function, slope):
    """A layer without params that computes each entry by itself."""
    return types.SimpleNamespace(
        forward=lambda params, x: (function(x), x),
        backward=lambda params, x, dy: (dy * slope(x), {}),
    )


@pytest.mark.parametrize("smaller", [0.5, -0.5])
def test_the_larger_of_two_wrong_entries_is_found_whatever_the_other(smaller):
    errors = np.zeros((1, 20_000))
    layer = elementwise(lambda x: x, lambda x: 1)
    layer.backward = lambda params, x, dy: (dy + errors, {})
    nn.check_gradients(layer, {}, np.ones_like(errors))
    errors[0, 10], errors[0, 19_000] = smaller, 1
    with pytest.raises(AssertionError, match=r"dx\[0, 19000\] is"):
        nn.check_gradients(layer, {}, np.ones_like(errors))


def test_the_search_for_a_wrong_entry_takes_small_steps():
    x = np.random.default_rng(0).normal(size=(1, 20_000))
    x[0, 12_345] = 1
    factor = np.ones_like(x)
    layer = elementwise(lambda x: x**3, lambda x: 3 * x * x * factor)
    nn.check_gradients(layer, {}, x)
    factor[0, 12_345] = 1.01
    with pytest.raises(AssertionError, match=r"dx\[0, 12345\] is"):
        nn.check_gradients(layer, {}, x)


def test_large_numbers_are_no_excuse_and_no_offence():
    for x in (np.full((1, 3), 1e6), np.full((1, 3), -1e6)):
        with pytest.raises(AssertionError, match=r"dx\[0, 0\] is"):
            nn.check_gradients(elementwise(lambda x: 2 * x, lambda x: 2.002), {}, x)
    x = np.random.default_rng(0).normal(size=(5, 5))
    nn.check_gradients(elementwise(lambda x: x + 1e8, lambda x: 1), {}, x)


def test_the_slope_at_a_kink_lies_between_those_of_its_sides():
    def kinked(slope_at_0, slope_elsewhere=3):
        slope = lambda x: np.where(x > 0, slope_elsewhere, np.where(x < 0, 1, slope_at_0))  # noqa: E731
        return elementwise(lambda x: np.where(x > 0, 3 * x, x), slope)

    x = np.array([[0.0, 1.0, -1.0]])
    for right in (1, 1.5, 2, 3):
        nn.check_gradients(kinked(right), {}, x)
    for wrong in (0.5, 0.99, 3.01, 4):
        with pytest.raises(AssertionError, match=r"dx\[0, 0\] is"):
            nn.check_gradients(kinked(wrong), {}, x)
    with pytest.raises(AssertionError, match=r"dx\[0, 1\] is"):  # what comes after it is checked
        nn.check_gradients(kinked(1.5, 3.01), {}, x)


def test_params_that_are_no_floats_reach_a_layer_as_they_are():
    mask = np.array([True, False])
    layer = types.SimpleNamespace(
        forward=lambda params, x: (np.where(params["mask"], x, 0), params["mask"]),
        backward=lambda params, mask, dy: (dy * mask, {}),
    )
    nn.check_gradients(layer, {"mask": mask}, np.ones((3, 2)))
    layer.forward = lambda params, x: (x[:, params["mask"]], params["mask"])
    layer.backward = lambda params, mask, dy: (np.insert(dy, [1], 0, axis=1), {})
    nn.check_gradients(layer, {"mask": mask}, np.ones((3, 2)))
    layer.forward = lambda params, x: (x + 0j, x)
    with pytest.raises(AssertionError, match="y must be float64 like x, got ndarray of complex128"):
        nn.check_gradients(layer, {}, np.ones((3, 2)))


def test_one_wrong_entry_of_dx_is_found():
    class Wrong(Stranger):
        def dx(self, W, dy):
            gradient = dy @ W.T
            gradient[17, 29] *= 1.5
            return gradient

    params, x = stranger_inputs(rows=50, columns=3, batch=40)
    with pytest.raises(AssertionError, match=r"^check_gradients: dx\[17, 29\] is"):
        nn.check_gradients(Wrong(), params, x)


class NotFinite(Stranger):
    """One entry of the gradient of b is not finite."""

    def __init__(self, value):
        self.value = value

    def db(self, dy):
        gradient = dy.sum(axis=0)
        gradient[1] = self.value
        return gradient


def test_a_gradient_that_is_not_a_number_is_found():
    params, x = stranger_inputs()
    with pytest.raises(AssertionError, match=r"^check_gradients: grads/b\[1\] is nan"):
        nn.check_gradients(NotFinite(math.nan), params, x)


def test_errors_that_cancel_are_found_with_some_key():
    def backward(params, x, dy):
        gradient = dy.sum(axis=0)
        gradient[666:668] += [0.5, -0.5]
        return dy, {"b": gradient}

    layer = types.SimpleNamespace(forward=lambda params, x: (x + params["b"], x), backward=backward)
    size, found = 2000, 0
    for key in range(12):
        with contextlib.suppress(AssertionError):
            nn.check_gradients(layer, {"b": np.zeros(size)}, np.ones((1, size)), key=key)
            continue
        found += 1
    assert found >= 3  # about half of the keys give the two entries one sign, so that they add up


def test_the_key_of_a_check_decides_what_is_sent_back_and_is_0_by_default():
    seen = []

    def backward(params, x, dy):
        seen.append(dy)
        return dy, {}

    layer = types.SimpleNamespace(forward=lambda params, x: (x, x), backward=backward)
    nn.check_gradients(layer, {}, np.ones((2, 3)))
    nn.check_gradients(layer, {}, np.ones((2, 3)), key=0)
    nn.check_gradients(layer, {}, np.ones((2, 3)), key=1)
    np.testing.assert_array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[0], seen[2])


# ------------------------------------------------------------------------------------------------
# Training helpers
# ------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 40), size=st.integers(1, 50), key=st.integers(0, 100))
def test_batches_hold_each_index_once(count, size, key):
    parts = list(nn.batches(count, size, key))
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    assert [len(part) for part in parts[:-1]] == [size] * (len(parts) - 1)
    assert 1 <= len(parts[-1]) <= size
    again = nn.batches(count, size, key)
    for part in parts:
        np.testing.assert_array_equal(next(again), part)
    orders = {tuple(np.concatenate(list(nn.batches(20, 7, (key, epoch))))) for epoch in range(5)}
    assert len(orders) == 5


def test_accuracy_is_the_share_of_right_ones():
    logits = np.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]], np.float32)
    assert nn.accuracy(logits, np.array([1, 0, 0])) == 2 / 3
    assert type(nn.accuracy(logits, np.array([1, 0, 1], np.uint8))) is float
    spoiled = np.array([[math.nan, 0, 1], [3, math.nan, 1], [0, 0, -1], [-1, math.inf, 0]])
    assert nn.accuracy(spoiled, np.array([0, 1, 0, 1])) == 1 / 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert nn.accuracy(spoiled, np.array([2, 0, 1, 1])) == 1 / 4


@given(data=st.data())
def test_value_and_grad_is_forward_loss_backward(data):
    net = network(data.draw(sizes))
    params, _ = net.init(1, (3,))
    x, labels = np.random.default_rng(0).normal(size=(4, 3)), np.array([0, 1, 1, 0])
    params = nn.training(params, 3) if data.draw(st.booleans()) else params
    function = pickle.loads(pickle.dumps(nn.value_and_grad(net, nn.softmax_cross_entropy)))
    loss, grads, cache = function(params, x, labels)
    logits, expected_cache = net.forward(params, x)
    expected_loss, dlogits = nn.softmax_cross_entropy(logits, labels)
    _, expected_grads = net.backward(params, expected_cache, dlogits)
    assert loss == expected_loss
    assert all_bytes(grads, cache) == all_bytes(expected_grads, expected_cache)


def test_value_and_grad_takes_a_stranger():
    params, x = stranger_inputs()
    loss, grads, _ = nn.value_and_grad(Stranger(), nn.mean_squared_error)(
        params, x, np.zeros((4, 3))
    )
    y = x @ params["W"] + params["b"]
    assert loss == pytest.approx((y**2).mean())
    np.testing.assert_allclose(grads["W"], x.T @ (2 * y / y.size))
    in_parts = nn.data_parallel(nn.value_and_grad(Stranger(), nn.mean_squared_error), 2)
    loss, grads, statistics = in_parts(params, x, np.zeros((4, 3)))
    assert loss == pytest.approx((y**2).mean())
    np.testing.assert_allclose(grads["W"], x.T @ (2 * y / y.size))
    assert statistics == {}


def parallel_case(batch, norm=False, seed=0):
    layers = [nn.conv2d(3, 3), *([nn.batch_norm()] if norm else []), nn.relu(), nn.flatten()]
    net = nn.sequential(*layers, nn.dropout(0.5), top=nn.sequential(nn.linear(4)))
    params, _ = net.init(seed, (1, 6, 6))
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, 1, 6, 6))
    return net, params, x, rng.integers(0, 4, batch)


@given(batch=st.integers(1, 9), shards=st.integers(1, 12), seed=st.integers(0, 100))
def test_data_parallel_is_the_same_gradient(batch, shards, seed):
    net, params, x, labels = parallel_case(batch, seed=seed)
    gradients = nn.value_and_grad(net, nn.softmax_cross_entropy)
    loss, grads, _ = gradients(params, x, labels)
    in_parts = nn.data_parallel(gradients, shards)
    loss_in_parts, grads_in_parts, cache = in_parts(params, x, labels)
    assert abs(loss - loss_in_parts) < 1e-12
    assert cache == {}
    nn.tree_map(partial(np.testing.assert_allclose, atol=1e-12), grads_in_parts, grads)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_data_parallel_depends_on_its_shards_alone(shards):
    net, params, x, labels = parallel_case(8, norm=True)
    gradients = nn.value_and_grad(net, nn.softmax_cross_entropy)
    params = nn.training(frozen(params), (1, 2))
    before = all_bytes(params, x)
    loss, grads, cache = nn.data_parallel(gradients, shards)(params, x, labels)
    with ThreadPoolExecutor(3) as pool:
        threaded = pickle.loads(pickle.dumps(gradients))
        again = nn.data_parallel(threaded, shards, pool.map)(params, x, labels)
    assert loss == again[0]
    assert all_bytes(grads, cache) == all_bytes(*again[1:])
    assert all_bytes(params, x) == before
    ends = [8 * shard // shards for shard in range(shards + 1)]
    parts = [
        gradients(
            {**params, "key": nn.fold_key(params["key"], shard)}, x[start:stop], labels[start:stop]
        )
        for shard, (start, stop) in enumerate(itertools.pairwise(ends))
    ]
    shares = np.diff(ends) / 8
    assert abs(loss - sum(s * part[0] for s, part in zip(shares, parts, strict=True))) < 1e-12
    for tree, which in ((grads, 1), (nn.update_statistics(params, cache, 1.0), None)):
        expected = [
            part[1] if which else nn.update_statistics(params, part[2], 1.0) for part in parts
        ]
        expected = nn.tree_map(
            lambda *a: sum(s * b for s, b in zip(shares, a, strict=True)), *expected
        )
        flat = nn.tree_flatten(expected)
        for path, leaf in nn.tree_flatten(tree).items():
            if path != "key":
                np.testing.assert_allclose(leaf, flat[path], rtol=1e-6, atol=1e-9)


def test_a_single_layer_is_a_network_too():
    params, _ = nn.linear(3).init(0, (3,))
    x, labels = np.random.default_rng(0).normal(size=(4, 3)), np.array([0, 1, 2, 0])
    gradients = nn.value_and_grad(nn.linear(3), nn.softmax_cross_entropy)
    loss, grads, cache = gradients(params, x, labels)
    assert all_bytes(nn.update_statistics(params, cache)) == all_bytes(params)
    in_parts = nn.data_parallel(gradients, 2)(params, x, labels)
    assert in_parts[0] == pytest.approx(loss)
    np.testing.assert_allclose(in_parts[1]["W"], grads["W"])
    assert in_parts[2] == {}


def test_data_parallel_refuses_what_its_function_would_refuse():
    net, params, x, labels = parallel_case(4)
    in_parts = nn.data_parallel(nn.value_and_grad(net, nn.softmax_cross_entropy), 2)
    net, params, many, labels_of_many = parallel_case(300)
    assert math.isfinite(in_parts(params, many, labels_of_many)[0])
    for count in (3, 5):
        with pytest.raises(ValueError, match=f"data_parallel: x has 4 samples, but target {count}"):
            in_parts(params, x, np.zeros(count, int))
    with pytest.raises(TypeError, match="data_parallel: params must be a dict, got NoneType"):
        in_parts(None, x, labels)
    with pytest.raises(ValueError, match="logits must not be empty"):
        in_parts(params, x[:0], labels[:0])
    for count in (1, 3):
        odd = nn.data_parallel(
            nn.value_and_grad(net, nn.softmax_cross_entropy),
            2,
            lambda f, parts, count=count: [f(parts[0])] * count,
        )
        with pytest.raises(ValueError, match=f"data_parallel: map gave {count} results of 2 parts"):
            odd(params, x, labels)


def test_a_network_learns():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 2))
    labels = (x[:, 0] * x[:, 1] > 0).astype(int)
    net = nn.sequential(nn.linear(16), nn.tanh(), nn.dropout(0.05), nn.linear(2))
    params, _ = net.init(0, (2,))
    optimizer = nn.adam(0.02)
    state = optimizer.init(params)
    function = nn.value_and_grad(net, nn.softmax_cross_entropy)
    for step in range(300):
        _, grads, _ = function(nn.training(params, (1, step)), x, labels)
        params, state = optimizer.step(params, grads, state)
    assert nn.accuracy(net.forward(params, x)[0], labels) > 0.95


def test_nobody_asks_for_the_gradient_of_the_data_in_training():
    asked = []

    class Asks(Stranger):
        def backward(self, params, cache, dy, *, need_dx=True):
            asked.append(need_dx)
            return super().backward(params, cache, dy)

    params, x = stranger_inputs()
    nn.value_and_grad(Asks(), nn.mean_squared_error)(params, x, np.zeros((4, 3)))
    assert asked == [False]


def test_helpers_write_to_nothing():
    net = network(3)
    params, _ = net.init(0, (4,))
    params, x = frozen(params), np.random.default_rng(0).normal(size=(5, 4))
    x.flags.writeable = False
    before = all_bytes(params, x)
    in_training = nn.training(params, 1)
    labels = np.array([0, 1, 0, 1, 1])
    _, grads, cache = nn.value_and_grad(net, nn.softmax_cross_entropy)(in_training, x, labels)
    grads, cache = frozen(grads), frozen(cache)
    seen = all_bytes(grads, cache)
    nn.clip_gradients(grads, 1e-3)
    nn.tree_add(grads, nn.l2_penalty(params, 0.1)[1])
    nn.update_statistics(params, cache)
    nn.check_gradients(net, in_training, x, rtol=1e-4)
    assert all_bytes(params, x) == before
    assert all_bytes(grads, cache) == seen


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_gradient_that_is_not_a_number_is_found_among_many(value):
    class Wrong(Stranger):
        def dW(self, x, dy):
            gradient = x.T @ dy
            gradient[123, 45] = value
            return gradient

    params, x = stranger_inputs(400, 300)
    with pytest.raises(AssertionError, match=rf"grads/W\[123, 45\] is {value}"):
        nn.check_gradients(Wrong(), params, x)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_gradient_is_found(value):
    params, x = stranger_inputs()
    with pytest.raises(AssertionError, match=rf"grads/b\[1\] is {value}"):
        nn.check_gradients(NotFinite(value), params, x)


def test_an_index_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"fold_key: index must be below 2\*\*32, got 4294967296"):
        nn.fold_key(0, 2**32)
    assert nn.fold_key(0, 2**32 - 1)[-1] == 2**32 - 1


@pytest.mark.parametrize(
    "helper", [lambda g: nn.clip_gradients(g, 0.1), lambda g: nn.tree_add(g, g)]
)
def test_gradients_without_axes_stay_arrays(helper):
    params = {"scale": np.array(3.0, np.float32)}
    optimizer = nn.sgd(0.1)
    optimizer.step(params, helper(params), optimizer.init(params))


@pytest.mark.parametrize("name", PAIRS)
def test_an_input_without_axes_is_refused(name):
    layer = getattr(nn, name)(*{"linear": [3], "dropout": [0.5]}.get(name, []))
    with pytest.raises(ValueError, match=f"{name}: (x must have a batch axis|x must be .*), got"):
        layer.forward({}, np.array(0.5, np.float32))


def not_a_rate(step):
    return "fast"


@pytest.mark.parametrize(
    "call",
    [
        lambda: nn.sgd(10**400),
        lambda: nn.sgd(0.1).step({}, {}, {"step": np.zeros(2, int), "scale": np.ones(())}),
        lambda: nn.sgd(not_a_rate).step({}, {}, nn.sgd(1).init({})),
    ],
)
def test_odd_arguments_of_optimisers_are_refused_by_name(call):
    with pytest.raises((TypeError, ValueError), match="^sgd: "):
        call()


# ------------------------------------------------------------------------------------------------
# Augmentation
# ------------------------------------------------------------------------------------------------

STILL = {"shift": 0, "rotation": 0, "scale": 0, "stretch": 0}


@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    amounts=st.fixed_dictionaries(
        {
            "shift": st.floats(0, 20),
            "rotation": st.floats(0, 180),
            "scale": st.floats(0, 0.99),
            "stretch": st.floats(0, 0.99),
            "elastic": st.floats(0, 5),
        }
    ),
    dtype=st.sampled_from([np.float32, np.float64]),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 1000),
)
def test_augment_is_pure_and_never_leaves_the_range_of_values(shape, amounts, dtype, order, seed):
    images = np.random.default_rng(seed).random(shape).astype(dtype)
    images = frozen({"x": in_order(images, order)})["x"]
    before = all_bytes(images)
    changed = nn.augment(seed, images, **amounts)
    assert changed.dtype == dtype
    assert changed.shape == shape
    assert all_bytes(images) == before
    assert all_bytes(nn.augment(seed, images, **amounts)) == all_bytes(changed)
    if images.size:
        assert changed.min() >= 0
        assert changed.max() <= images.max() * (1 + 1e-6)
    np.testing.assert_allclose(nn.augment(seed, images, **STILL), images, atol=1e-4)


@given(
    shape=st.tuples(*[st.integers(0, 3)] * 2, *[st.integers(1, 9)] * 2),
    size=st.integers(1, 12) | st.tuples(st.integers(1, 12), st.integers(1, 12)),
    dtype=st.sampled_from([np.float32, np.float64]),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 1000),
)
def test_resize_takes_the_mean_of_the_area(shape, size, dtype, order, seed):
    images = np.random.default_rng(seed).random(shape).astype(dtype)
    given_images = frozen({"x": in_order(images, order)})["x"]
    resized = nn.resize(given_images, size)
    height, width = size if isinstance(size, tuple) else (size, size)
    # Every pixel cut into height x width parts, and these put together anew, can be counted.
    parts = images.repeat(height, axis=2).repeat(width, axis=3)
    blocks = parts.reshape(*shape[:2], height, shape[2], width, shape[3])
    np.testing.assert_allclose(resized, blocks.mean(axis=(3, 5)), atol=1e-5)
    assert (resized.dtype, resized.shape) == (dtype, (*shape[:2], height, width))
    assert all_bytes(nn.resize(images, size)) == all_bytes(resized)


def test_samples_between_pixels_are_bilinear_and_zero_outside():
    image = np.arange(12.0).reshape(1, 1, 3, 4) + 1
    points = [
        (0, 0),
        (2, 3),
        (0.5, 1),
        (1, 1.25),
        (1.5, 2.5),
        (-0.5, 0),
        (2, 3.75),
        (-1, 0),
        (9, -9),
        (2.5, 3),
        (0, -0.5),
    ]
    rows, columns = np.array(points).T.reshape(2, 1, 1, -1)
    values = nn._sampled(image, rows, columns)[0, 0, 0]
    np.testing.assert_allclose(values, [1, 12, 4, 6.25, 9.5, 0.5, 3, 0, 0, 6, 0.5], atol=0.05)


def moments(images):
    """(rows, columns) of the centre of each image, and its covariance there."""
    weights = images[:, 0] / images[:, 0].sum(axis=(1, 2), keepdims=True)
    rows, columns = np.indices(images.shape[2:])
    means = [(weights * axis).sum(axis=(1, 2)) for axis in (rows, columns)]
    deviations = [
        axis - mean[:, None, None] for axis, mean in zip((rows, columns), means, strict=True)
    ]
    covariance = [[(weights * a * b).sum(axis=(1, 2)) for a in deviations] for b in deviations]
    return np.array(means), np.array(covariance)


def ellipses(count, height=41, width=41, rows=8.0, columns=4.0):
    """The same soft ellipse again and again, in the middle."""
    y, x = np.indices((height, width)) - np.array([height - 1, width - 1])[:, None, None] / 2
    return np.repeat(np.exp(-((y / rows) ** 2 + (x / columns) ** 2))[None, None], count, axis=0)


def test_shifts_are_uniform_pixels_along_both_axes():
    images = ellipses(400)
    centres, _ = moments(nn.augment(3, images, **{**STILL, "shift": 4}))
    for axis in centres - 20:
        assert 3.8 < axis.max() <= 4.01
        assert -4.01 <= axis.min() < -3.8
        assert abs(axis.std() - 4 / math.sqrt(3)) < 0.2
    assert abs(np.corrcoef(centres)[0, 1]) < 0.15


def test_rotations_are_uniform_degrees_around_the_middle():
    centres, ((rr, rc), (_, cc)) = moments(
        nn.augment(3, ellipses(400), **{**STILL, "rotation": 30})
    )
    angles = np.degrees(np.arctan2(2 * rc, rr - cc) / 2)
    assert 28.5 < angles.max() < 30.2
    assert -30.2 < angles.min() < -28.5
    np.testing.assert_allclose(centres, 20, atol=0.05)


def test_scales_and_stretches_change_size_and_ratio():
    _, ((rr, _), (_, cc)) = moments(nn.augment(3, ellipses(400), **{**STILL, "scale": 0.3}))
    for variance, expected in ((rr, 8.0), (cc, 4.0)):
        sizes = np.sqrt(2 * variance) / expected
        assert 1.25 < sizes.max() < 1.32
        assert 0.68 < sizes.min() < 0.73
    np.testing.assert_allclose(rr / cc, 4, rtol=0.1)
    _, ((rr, _), (_, cc)) = moments(nn.augment(3, ellipses(400), **{**STILL, "stretch": 0.3}))
    ratios = np.sqrt(rr / cc) / 2
    assert 1.25 < ratios.max() < 1.32
    assert 0.68 < ratios.min() < 0.73
    np.testing.assert_allclose(np.sqrt(rr * cc), 16, rtol=0.05)


def test_what_an_image_undergoes_is_drawn_independently():
    amounts = {"shift": 3, "rotation": 20, "scale": 0.2, "stretch": 0.2}
    (rows, columns), ((rr, rc), (_, cc)) = moments(nn.augment(3, ellipses(600), **amounts))
    angle, root = np.arctan2(2 * rc, rr - cc), np.sqrt((rr - cc) ** 2 + 4 * rc**2)
    size, ratio = rr * cc - rc**2, (rr + cc + root) / (rr + cc - root)
    together = np.corrcoef([rows, columns, angle, np.log(size), np.log(ratio)])
    assert np.abs(together - np.eye(5)).max() < 0.15


@pytest.mark.parametrize("length", [1, 6, 7, 8, 13, 28, 41, 64])
def test_splines_add_up_to_one_and_look_the_same_from_both_ends(length):
    splines = nn._spline(length, 4 + length // 7)
    np.testing.assert_allclose(splines.sum(axis=1), 1)
    assert (splines >= 0).all()
    if length > 1:
        np.testing.assert_allclose(splines, splines[::-1, ::-1], atol=1e-12)


def test_elastic_displacements_are_smooth_and_have_the_deviation_asked_for():
    ramp = np.broadcast_to(np.arange(40.0), (200, 1, 40, 40)) + 100  # its values tell the column
    moved = nn.augment(3, ramp, **STILL, elastic=1.5) - ramp
    middle = moved[:, 0, 8:-8, 8:-8]
    assert abs(middle.std() - 1.5) < 0.15
    assert np.abs(np.diff(middle, axis=1)).max() < 1.5
    assert np.abs(middle.mean()) < 0.1


def test_images_that_are_not_square_stay_in_the_middle():
    centres, _ = moments(nn.augment(1, ellipses(50, 31, 61), shift=0))
    np.testing.assert_allclose(centres[0], 15, atol=0.1)
    np.testing.assert_allclose(centres[1], 30, atol=0.1)


# ------------------------------------------------------------------------------------------------
# Huge, subnormal and odd values: right, or inf where they are too large; never a warning
# ------------------------------------------------------------------------------------------------

SIZES = {  # finite, from zero to the largest of each dtype
    np.float32: [0.0, 1e-45, 1e-40, 1e-20, 1.0, 1e10, 1e19, 1e30, 3.4028235e38],
    np.float64: [0.0, 5e-324, 1e-310, 1e-20, 1.0, 1e19, 1e150, 1e300, 1.7976931348623157e308],
}
every_dtype = pytest.mark.parametrize("dtype", SIZES)
NOT_FINITE = [math.inf, -math.inf, math.nan]


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def extreme(draw, shape, dtype, others=()):
    """An array of few different values, of all sizes and both signs."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    values = [*SIZES[dtype], *(-size for size in SIZES[dtype]), *others, *others]
    return rng.choice(rng.choice(values, rng.integers(1, 6)), shape).astype(dtype)


def extreme_tree(draw, tree, dtype, others=()):
    return nn.tree_map(
        lambda a: extreme(draw, a.shape, dtype, others) if a.dtype.kind == "f" else a, tree
    )


BOUNDED = {  # layers that add up nothing: numbers in, numbers out
    "identity", "flatten", "relu", "leaky_relu", "elu", "sigmoid", "tanh", "softplus", "gelu",
    "silu", "softmax", "log_softmax", "dropout", "max_pool2d",
}  # fmt: skip


@every_layer
@every_dtype
@pytest.mark.usefixtures("no_warnings")
@settings(max_examples=8)
@given(data=st.data())
def test_layers_take_values_of_any_size_without_a_warning(name, dtype, data):
    layer, params, x, _ = data.draw(cases(name, dtypes=[dtype]))
    x = extreme(data.draw, x.shape, dtype)
    y, cache = layer.forward(params, x)
    assert y.dtype == dtype
    assert name not in BOUNDED or not np.isnan(y).any()
    dx, _ = layer.backward(params, cache, upstream(y))
    if name in BOUNDED - {"softmax", "log_softmax"}:
        assert not np.isnan(dx).any()
    for others in ([], NOT_FINITE):
        params = extreme_tree(data.draw, params, dtype, others)
        x, dy = (extreme(data.draw, shape, dtype, others) for shape in (x.shape, y.shape))
        y, cache = layer.forward(params, x)
        dx, grads = layer.backward(params, cache, dy)
        assert y.dtype == dx.dtype == dtype
        assert all(g.dtype == dtype for g in nn.tree_flatten(grads).values())
        nn.update_statistics(params, cache if isinstance(cache, dict) else x)


@every_layer
@pytest.mark.usefixtures("no_warnings")
@settings(max_examples=5)
@given(data=st.data())
def test_what_is_too_large_for_float32_becomes_inf_without_a_warning(name, data):
    layer, params, x, _ = data.draw(cases(name, dtypes=[np.float32]))
    huge = nn.tree_map(lambda a: a.astype(float) * 1e300 if a.dtype.kind == "f" else a, params)
    y, cache = layer.forward(huge, x)
    dx, _ = layer.backward(huge, cache, np.full(y.shape, 1e300))
    assert y.dtype == dx.dtype == np.float32


@pytest.mark.parametrize("loss", [*CLASS_LOSSES, *ELEMENT_LOSSES])
@every_dtype
@pytest.mark.usefixtures("no_warnings")
@given(data=st.data())
def test_losses_are_numbers_for_predictions_of_any_size(loss, dtype, data):
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    prediction = extreme(data.draw, shape, dtype)
    if loss in ELEMENT_LOSSES:
        target = extreme(data.draw, shape, dtype)
        if loss == "binary_cross_entropy":
            target = np.minimum(abs(target), 1)
        value, gradient = ELEMENT_LOSSES[loss][0](prediction, target)
    else:
        soft = data.draw(st.booleans()) and loss != "hinge"
        labels = np.array(data.draw(st.tuples(*[st.integers(0, shape[1] - 1)] * shape[0])))
        target = np.minimum(abs(extreme(data.draw, shape, dtype)), 1) if soft else labels
        function, probable, _ = CLASS_LOSSES[loss]
        value, gradient = function(
            np.minimum(abs(prediction), 1) if probable else prediction, target
        )
    assert not math.isnan(value)
    assert not np.isnan(gradient).any()
    assert gradient.dtype == dtype
    with contextlib.suppress(ValueError):  # what is no probability
        function = {**CLASS_LOSSES, **ELEMENT_LOSSES}[loss][0]
        function(extreme(data.draw, shape, dtype, NOT_FINITE), target)


def test_losses_of_logits_further_apart_than_float32_reaches():
    logits = np.array([[3e38, -3e38, 0]], np.float32)
    for target, value in (([0], 0), ([1], math.inf), ([2], float(np.float32(3e38)))):
        assert nn.softmax_cross_entropy(logits, np.array(target))[0] == value
        soft = np.eye(3)[target]
        assert nn.softmax_cross_entropy(logits, soft)[0] == value
    assert nn.hinge(logits, np.array([0]))[0] == 0
    assert nn.hinge(logits, np.array([1]))[0] == math.inf
    logits[0, 2] = math.nan
    assert math.isnan(nn.softmax_cross_entropy(logits, np.array([0]))[0])


@pytest.mark.parametrize("shape", [(6, 2), (3, 2, 2, 4)])
@pytest.mark.parametrize("size", [1e19, 1e30, 3e38])
def test_batch_norm_in_float32_normalises_numbers_whose_squares_are_too_large(shape, size):
    params, _ = nn.batch_norm().init(0, shape[1:])
    params, rng = nn.training(with_values(params, 1), 0), np.random.default_rng(0)
    x = (size * (0.8 + 0.2 * rng.random(shape))).astype(np.float32)
    dy = rng.normal(size=shape).astype(np.float32)
    y, cache = nn.batch_norm().forward(params, x)
    expected, cache_expected = nn.batch_norm().forward(params, x.astype(float))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(cache["statistics"]["mean"], cache_expected["statistics"]["mean"])
    dx, grads = nn.batch_norm().backward(params, cache, dy)
    _, grads_expected = nn.batch_norm().backward(params, cache_expected, dy)
    kinds = nn.tree_map(lambda leaf: leaf.dtype, cache)
    assert kinds.pop("count").kind == "i"
    assert set(nn.tree_flatten(kinds).values()) == {y.dtype, dx.dtype} == {np.dtype(np.float32)}
    assert np.isfinite(dx).all()
    np.testing.assert_allclose(grads["gamma"], grads_expected["gamma"], rtol=1e-4)


@pytest.mark.usefixtures("no_warnings")
def test_what_overflows_is_inf_without_a_warning_also_in_a_users_layer_and_loss():
    huge = np.array([[3e38, -3e38], [0, 0]], np.float32)
    labels = np.array([0, 0])
    assert nn.softmax_cross_entropy(huge, labels)[0] == pytest.approx(math.log(2) / 2)
    assert nn.hinge(huge, np.array([1, 1]))[0] == math.inf
    assert nn.tree_add({"a": huge}, {"a": huge})["a"][0, 0] == math.inf
    ten_times = nn.Layer(
        nn.identity_init, lambda params, x: (x * 10, x), lambda params, cache, dy: (dy * 10, {})
    )
    net = nn.sequential(ten_times)
    y, cache = net.forward({}, huge)
    assert y[0, 0] == net.backward({}, cache, huge)[0][0, 0] == math.inf
    gradients = nn.value_and_grad(ten_times, lambda y, target: ((y * y).sum(), y * 10))
    assert gradients({}, huge, labels)[0] == math.inf


@every_optimiser
@every_dtype
@pytest.mark.usefixtures("no_warnings")
@settings(max_examples=8)
@given(data=st.data())
def test_optimisers_take_gradients_of_any_size(name, dtype, data):
    constructor, _, _, options = OPTIMISERS[name]
    optimizer = constructor(data.draw(st.sampled_from([1e-3, 1.0])), **options)
    params = extreme_tree(data.draw, some_params(1), dtype)
    grads = extreme_tree(data.draw, params, dtype)
    moved, state = optimizer.step(params, grads, optimizer.init(params))
    assert not any(np.isnan(leaf).any() for leaf in nn.tree_flatten(moved).values())
    optimizer = constructor(1.0, **options, weight_decay=0.5)
    for others in ([], NOT_FINITE):
        optimizer.step(moved, extreme_tree(data.draw, params, dtype, others), state)


@every_dtype
@pytest.mark.usefixtures("no_warnings")
@given(data=st.data())
def test_helpers_take_values_of_any_size(dtype, data):
    tree = extreme_tree(data.draw, some_params(1), dtype)
    leaves = np.concatenate([leaf.ravel() for leaf in nn.tree_flatten(tree).values()])
    norm = nn.global_norm(tree)
    halves = (leaves / 2).astype(float).tolist()  # so that hypot itself stays finite
    assert norm == pytest.approx(2 * math.hypot(*halves), rel=1e-12) or norm > 1.79e308
    if math.isfinite(norm):
        clipped = nn.global_norm(nn.clip_gradients(tree, 1.0))
        assert clipped == pytest.approx(min(1, norm), rel=1e-3)
    with contextlib.suppress(ValueError):  # a norm that is not finite
        nn.clip_gradients(extreme_tree(data.draw, tree, dtype, NOT_FINITE), 1.0)
    nn.tree_add(tree, extreme_tree(data.draw, tree, dtype, NOT_FINITE))
    value, _ = nn.l2_penalty(tree, 1e30)
    assert not math.isnan(value)
    lowest, highest = (np.full(2, sign * SIZES[dtype][-1], dtype) for sign in (-1, 1))
    nn.update_statistics({"mean": lowest}, {"statistics": {"mean": highest}})
    logits = extreme(data.draw, (3, 2), dtype, NOT_FINITE)
    assert 0 <= nn.accuracy(logits, np.array([0, 1, 1])) <= 1
    images = extreme(data.draw, (1, 1, 3, 4), dtype) * dtype(0.5)  # shares may add up to 1 + 1e-16
    assert not np.isnan(nn.resize(images, data.draw(st.sampled_from([1, 2, (5, 3)])))).any()
    amounts = [
        data.draw(st.sampled_from([0.0, 0.5, largest])) for largest in (1e9, 180, 0.9, 0.9, 1e9)
    ]
    assert not np.isnan(nn.augment(1, images, *amounts)).any()
    images[0, 0, 1, 1] = math.inf
    nn.resize(images, 2)
    nn.augment(1, images, 0, 0, 0, 0)


@pytest.mark.usefixtures("no_warnings")
def test_initialisers_and_networks_take_values_of_any_size():
    largest = float(np.finfo(np.float32).max)
    for init in (nn.normal(largest), nn.uniform(largest), nn.constant(-largest), nn.normal(1e-45)):
        assert not np.isnan(init(0, (20, 20))).any()
    net, params, x, labels = parallel_case(4, norm=True)
    gradients = nn.value_and_grad(net, nn.softmax_cross_entropy)
    huge = nn.training(nn.tree_map(lambda a: a * np.float32(1e30), params), 0)
    for function in (gradients, nn.data_parallel(gradients, 2)):
        _, grads, cache = function(huge, (x * 1e30).astype(np.float32), labels)
        assert grads.keys() == params.keys() - {"2"}
        nn.update_statistics(huge, cache)
    nn.check_gradients(nn.identity(), {}, np.full((3, 4), 1.7e308))
    with contextlib.suppress(AssertionError):  # differences of what is inf
        nn.check_gradients(net, huge, x * 1e300)
    nn.elu(1e300).forward({}, np.full((1, 2), -1, np.float32))
    sums = nn.residual(nn.identity())
    _, cache = sums.forward({}, np.full((1, 2), 1e308))
    assert sums.backward({}, cache, np.full((1, 2), 1e308))[0][0, 0] == math.inf


def test_errors_of_numpy_are_as_the_caller_set_them():
    """Before and after a call, also one that fails, and in the layers that are the caller's own."""
    x = np.full((1, 2), 1e308)
    nn.softplus().forward({}, x)
    with pytest.raises(TypeError):
        nn.relu().backward(None, x, x)
    with np.errstate(over="raise"):
        nn.residual(nn.identity()).forward({}, x)
        with pytest.raises(FloatingPointError):
            x * 10
    with pytest.warns(RuntimeWarning, match="overflow"):
        x * 10


@pytest.mark.parametrize("loss", [*CLASS_LOSSES, *ELEMENT_LOSSES])
@pytest.mark.parametrize("order", [*ORDERS, "C"])
def test_losses_take_arrays_of_any_order_and_kind(loss, order):
    function = {**CLASS_LOSSES, **ELEMENT_LOSSES}[loss][0]
    rng = np.random.default_rng(0)
    prediction, target = rng.random((6, 4)), rng.integers(0, 2, (6, 4)).astype(float)
    if loss.startswith("hinge"):
        target = np.arange(6.0) % 4
    expected = function(
        prediction, target if loss not in CLASS_LOSSES or target.ndim == 2 else target.astype(int)
    )
    for kind in ("f2", "f4", ">f8", "i1", "u8", bool):
        if target.ndim == 1:
            kind = {"f2": "i2", "f4": ">i4", ">f8": "u8", bool: "i1"}.get(kind, kind)
        value, gradient = function(
            frozen({"x": in_order(prediction, order)})["x"],
            frozen({"x": in_order(target.astype(kind), order)})["x"],
        )
        assert value == pytest.approx(expected[0], rel=1e-12)
        np.testing.assert_allclose(gradient, expected[1], rtol=1e-12)


def test_arrays_in_mapped_files_are_arrays(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6.0).reshape(2, 3))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    params, _ = nn.linear(2).init(0, (3,))
    y, cache = nn.linear_forward(params, x)
    assert all_bytes(y) == all_bytes(nn.linear_forward(params, np.array(x))[0])
    _, grads = nn.linear_backward(params, cache, y)
    assert all_bytes(grads) == all_bytes(nn.linear_backward(params, np.array(x), y)[1])


@every_optimiser
@pytest.mark.parametrize("order", ORDERS)
def test_optimisers_take_arrays_of_any_order(name, order):
    constructor, _, _, options = OPTIMISERS[name]
    optimizer = constructor(0.1, **options)
    params, grads = some_params(1), some_params(2)
    expected = optimizer.step(params, grads, optimizer.init(params))

    def ordered(leaf):
        return in_order(leaf, order) if leaf.ndim else leaf

    params, grads, state = (
        frozen(nn.tree_map(ordered, tree)) for tree in (params, grads, optimizer.init(params))
    )
    assert all_bytes(*optimizer.step(params, grads, state)) == all_bytes(*expected)


@given(order=st.sampled_from(ORDERS), seed=st.integers(0, 99))
def test_helpers_take_arrays_of_any_order(order, seed):
    tree = nn.tree_map(lambda a: a[None], some_params(seed))
    other = nn.tree_map(lambda a: in_order(a, order), tree)
    assert nn.global_norm(other) == pytest.approx(nn.global_norm(tree), rel=1e-12)
    assert all_bytes(nn.tree_add(other, other)) == all_bytes(nn.tree_add(tree, tree))
    for path, leaf in nn.tree_flatten(nn.clip_gradients(other, 0.5)).items():
        clipped = nn.tree_flatten(nn.clip_gradients(tree, 0.5))[path]
        np.testing.assert_allclose(leaf, clipped, rtol=1e-12)
    value, grads = nn.l2_penalty(other, 0.5)
    assert value == pytest.approx(nn.l2_penalty(tree, 0.5)[0], rel=1e-12)
    assert all_bytes(grads) == all_bytes(nn.l2_penalty(tree, 0.5)[1])
    logits, labels = tree["a"]["W"][0], np.array([0, 1, 1])
    in_any_order = nn.accuracy(in_order(logits, order), in_order(labels.astype("u1"), order))
    assert in_any_order == nn.accuracy(logits, labels)


def test_clipping_and_shares_of_whole_numbers_are_not_cut_off():
    clipped = nn.clip_gradients({"a": np.array([3, 4])}, 1.0)["a"]
    np.testing.assert_allclose(clipped, [0.6, 0.8])
    half = nn.clip_gradients({"a": np.array([3, 4], np.float16)}, 1.0)["a"]
    assert half.dtype == np.float16


# ------------------------------------------------------------------------------------------------
# Threads
# ------------------------------------------------------------------------------------------------


def test_a_network_in_several_threads_gives_the_bits_of_one():
    net = nn.sequential(
        nn.conv2d(4, 3, padding=1),
        nn.batch_norm(),
        nn.relu(),
        nn.max_pool2d(2),
        nn.residual(nn.sequential(nn.conv2d(4, 3, padding=1), nn.gelu())),
        nn.avg_pool2d(2),
        nn.flatten(),
        nn.dropout(0.5),
        nn.linear(3),
    )
    params, _ = net.init(0, (1, 12, 12))
    optimizer = nn.adam(nn.cosine(0.01, 9))
    state = optimizer.init(params)
    x, labels = np.random.default_rng(0).normal(size=(8, 1, 12, 12)), np.arange(8) % 3
    x = x.astype(np.float32)
    before = all_bytes(params, state, {"x": x})
    gradients = nn.value_and_grad(net, nn.softmax_cross_entropy)

    def training_steps(seed):
        own, own_state, losses = params, state, []
        for step in range(3):
            loss, grads, cache = gradients(nn.training(own, (seed, step)), x, labels)
            own, own_state = optimizer.step(own, nn.clip_gradients(grads, 1.0), own_state)
            own = nn.update_statistics(own, cache)
            losses.append(loss)
        return losses, all_bytes(own, own_state)

    seeds = [0, 1, 2, 3] * 6
    alone = {seed: training_steps(seed) for seed in set(seeds)}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads take turns in the middle of everything
    try:
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(training_steps, seeds))
    finally:
        sys.setswitchinterval(interval)
    assert together == [alone[seed] for seed in seeds]
    assert all_bytes(params, state, {"x": x}) == before


# ------------------------------------------------------------------------------------------------
# Misuse: what the sentences say
# ------------------------------------------------------------------------------------------------

Z, LABELS = np.ones((2, 3)), np.array([0, 2])
BOUND = {"leaky_relu": {"slope": 0.1}, "elu": {"alpha": 1.0}, "batch_norm": {"eps": 1e-5}}
BOUND["layer_norm"] = BOUND["batch_norm"]

MISUSE: dict[
    str, list
] = {  # name: calls that are refused, each (exception, words of the message, arguments)
    "tree_map": [(TypeError, "at least one", (abs,)), (ValueError, "differ", (max, {"a": 1}, {}))],
    "tree_flatten": [(TypeError, "must be a dict", (1,)), (ValueError, "empty", ({"": 1},))],
    "tree_unflatten": [(TypeError, "must be a dict", (1,)), (ValueError, "malformed", ({"": 1},))],
    "tree_add": [
        (TypeError, "must be a dict", (1,)),
        (ValueError, "'a' is", ({"a": Z}, {"a": LABELS})),
    ],
    "count_parameters": [(TypeError, "must be a dict", (Z,))],
    "global_norm": [(TypeError, "must be a dict", (Z,))],
    "clip_gradients": [
        (ValueError, "max_norm must be > 0", ({}, 0)),
        (ValueError, "the norm of the gradients is nan", ({"a": Z * math.nan}, 1)),
        (ValueError, "the norm of the gradients is inf", ({"a": Z, "b": Z * math.inf}, 1)),
        (ValueError, "max_norm", ({}, math.nan)),
        (ValueError, "max_norm", ({}, math.inf)),
        (TypeError, "max_norm must be a number", ({}, "1")),
        (TypeError, "must be a dict", (Z, 1)),
    ],
    "fold_key": [(TypeError, "index", (0, 1.5)), (TypeError, "key", ("0", 1))],
    "training": [(TypeError, "must be a dict", (Z, 1)), (ValueError, "at least 0", ({}, -1))],
    "zeros": [(TypeError, "zeros: shape", (0, 3)), (ValueError, "zeros: every size", (0, (0,)))],
    "constant": [(TypeError, "value must be a number", ("1",)), (ValueError, "value", (math.nan,))],
    "normal": [(ValueError, "std must be >= 0", (-1,)), (ValueError, "std", (math.inf,))],
    "uniform": [(ValueError, "limit must be >= 0", (-1,)), (ValueError, "limit", (math.nan,))],
    **{
        name: [
            (ValueError, f"{name}: shape .* has no fans", (0, (3,))),
            (TypeError, f"{name}: shape must be a tuple", (0, 3)),
        ]
        for name in ("xavier_normal", "xavier_uniform", "he_normal", "he_uniform", "orthogonal")
    },
    "linear": [
        (ValueError, "out must be at least 1", (0,)),
        (TypeError, "out must be a whole number", (1.0,)),
        (TypeError, "out must be a whole number", (True,)),
        (TypeError, "init must be a function", (3, "he")),
        (TypeError, "bias must be True or False", (3, nn.zeros, "no")),
    ],
    "leaky_relu": [
        (TypeError, "slope must be a number", ("1",)),
        (TypeError, "slope must be a number", (True,)),
        (ValueError, "slope", (math.nan,)),
        (ValueError, "slope must be finite", (math.inf,)),
    ],
    "elu": [(ValueError, "alpha must be > 0", (bad,)) for bad in (0, -1, math.nan, math.inf)],
    "dropout": [(ValueError, "rate must be >= 0 and < 1", (bad,)) for bad in (-0.1, 1, math.nan)],
    "batch_norm": [(ValueError, "eps must be > 0", (bad,)) for bad in (0, -1, math.nan, math.inf)],
    "layer_norm": [(ValueError, "eps must be > 0", (bad,)) for bad in (0, -1, math.nan, math.inf)],
    "conv2d": [
        (ValueError, "conv2d: out must be at least 1", (0, 3)),
        (TypeError, "conv2d: kernel must be a whole number", (4, 3.0)),
        (ValueError, "conv2d: kernel must be a whole number or a pair", (4, (3, 3, 3))),
        (ValueError, "conv2d: kernel must be at least 1", (4, (3, 0))),
        (ValueError, "conv2d: stride must be at least 1", (4, 3, 0)),
        (ValueError, "conv2d: padding must be at least 0", (4, 3, 1, -1)),
        (ValueError, "conv2d: padding must be numbers or 'same', got 'valid'", (4, 3, 1, "valid")),
        (ValueError, "conv2d: padding must be numbers or 'same', got 'full'", (4, 3, 1, "full")),
        (ValueError, "conv2d: padding 'same' goes with stride 1, got 2", (4, 3, 2, "same")),
        (ValueError, "conv2d: dilation must be at least 1", (4, 3, 1, 0, 0)),
        (ValueError, "conv2d: groups must be at least 1", (4, 3, 1, 0, 1, 0)),
        (ValueError, "conv2d: 3 groups do not divide the 4 channels of y", (4, 3, 1, 0, 1, 3)),
        (TypeError, "conv2d: init must be a function", (4, 3, 1, 0, 1, 1, "he")),
        (TypeError, "conv2d: bias must be True or False", (4, 3, 1, 0, 1, 1, nn.zeros, 1)),
    ],
    **{
        name: [
            (ValueError, f"{name}: size must be at least 1", (0,)),
            (TypeError, f"{name}: size must be a whole number", ("2",)),
            (ValueError, f"{name}: stride must be at least 1", (2, (1, 0))),
            (ValueError, f"{name}: padding must be at least 0", (2, 2, -1)),
            (ValueError, f"{name}: padding must be at most half of the window", (3, 1, (1, 2))),
            (ValueError, f"{name}: padding must be at most half of the window", (3, 1, (2, 1))),
        ]
        for name in ("max_pool2d", "avg_pool2d")
    },
    "data_parallel": [
        (ValueError, "shards must be at least 1", (print, 0)),
        (TypeError, "shards must be a whole number", (print, 2.0)),
        (TypeError, "must be functions", (None, 2)),
        (TypeError, "must be functions", (print, 2, None)),
    ],
    "augment": [
        (TypeError, "images must be a NumPy array", (0, [1.0])),
        (TypeError, "images must be float32 or float64", (0, np.ones((1, 1, 2, 2), np.uint8))),
        (ValueError, r"images must be \(N, C, H, W\), got shape \(2, 3\)", (0, Z)),
        (ValueError, r"images must be \(N, C, H, W\)", (0, np.ones((1, 1, 2, 0)))),
        (ValueError, r"images must be \(N, C, H, W\)", (0, np.ones((1, 0, 2, 2)))),
        (ValueError, "shift must be >= 0", (0, np.ones((1, 1, 2, 2)), -1)),
        (ValueError, "shift", (0, np.ones((1, 1, 2, 2)), math.inf)),
        (ValueError, "rotation must be >= 0 and <= 180", (0, np.ones((1, 1, 2, 2)), 1, 181)),
        (ValueError, "scale must be >= 0 and < 1", (0, np.ones((1, 1, 2, 2)), 1, 1, 1)),
        (ValueError, "stretch must be >= 0 and < 1", (0, np.ones((1, 1, 2, 2)), 1, 1, 0, 1)),
        (ValueError, "elastic must be >= 0", (0, np.ones((1, 1, 2, 2)), 1, 1, 0, 0, -1)),
    ],
    "resize": [
        (TypeError, "images must be a NumPy array", ([1.0], 2)),
        (TypeError, "images must be float32 or float64", (np.ones((1, 1, 2, 2), np.uint8), 2)),
        (ValueError, r"images must be \(N, C, H, W\), got shape \(2, 3\)", (Z, 2)),
        (ValueError, r"images must be \(N, C, H, W\)", (np.ones((1, 1, 0, 2)), 2)),
        (ValueError, "size must be at least 1", (np.ones((1, 1, 2, 2)), (2, 0))),
        (TypeError, "size must be a whole number", (np.ones((1, 1, 2, 2)), 2.0)),
    ],
    "update_statistics": [
        (ValueError, "momentum must be >= 0 and <= 1", ({}, {}, 1.1)),
        (ValueError, "momentum", ({}, {}, -0.1)),
        (TypeError, "params must be a dict", (Z, {})),
    ],
    "sequential": [
        (TypeError, "sequential: 0 must be a layer, but int has no init", (3,)),
        (TypeError, "has no forward", (types.SimpleNamespace(init=print),)),
        (TypeError, "has no backward", (types.SimpleNamespace(init=print, forward=print),)),
    ],
    "residual": [(TypeError, "residual: shortcut must be a layer", (nn.relu(), None))],
    "softmax_cross_entropy": [
        (ValueError, "smoothing must be >= 0 and < 1", (Z, LABELS, 1.0)),
        (ValueError, "smoothing", (Z, LABELS, -0.1)),
        (ValueError, r"logits must be \(N, classes\), got shape", (Z[None], LABELS)),
        (ValueError, r"labels must have shape \(2,\), got", (Z, Z[None])),
        (ValueError, "target has shape", (Z, np.ones((1, 3)))),
        (ValueError, "target has shape", (Z, np.ones((3, 3)))),
    ],
    "hinge": [
        (ValueError, "margin must be >= 0", (Z, LABELS, -1)),
        (TypeError, "labels must be a NumPy array", (Z, [0, 2])),
        (ValueError, r"labels must have shape \(2,\)", (Z, Z)),
    ],
    "cross_entropy": [
        (ValueError, "probabilities must be from 0 to 1; for logits use softmax_cross_entropy", bad)
        for bad in ((2 * Z, LABELS), (-Z, LABELS), (Z * math.nan, LABELS))
    ],
    "binary_cross_entropy": [
        (ValueError, "target must be from 0 to 1", (Z, bad))
        for bad in (1.1 * Z, -0.1 * Z, Z * math.nan)
    ],
    "mean_squared_error": [],
    "mean_absolute_error": [],
    "huber": [(ValueError, "delta must be > 0", (Z, Z, bad)) for bad in (0, math.nan, math.inf)],
    "l2_penalty": [
        (ValueError, "coefficient must be >= 0", ({}, -1)),
        (TypeError, "must be a dict", (Z, 1)),
    ],
    "sgd": [
        (ValueError, "lr must be >= 0", (-1,)),
        (ValueError, "momentum must be >= 0 and < 1", (1, 1)),
        (ValueError, "momentum", (1, -0.1)),
        (TypeError, "momentum must be a number", (1, "0.9")),
        (ValueError, "nesterov needs a momentum", (1, 0, True)),
        (ValueError, "weight_decay must be >= 0", (1, 0, False, -1)),
    ],
    "adam": [
        (ValueError, "beta1 must be >= 0 and < 1", (1, 1)),
        (ValueError, "beta2 must be >= 0 and < 1", (1, 0, 1)),
        (ValueError, "eps must be > 0", (1, 0, 0, 0)),
        (ValueError, "weight_decay", (1, 0, 0, 1, math.nan)),
    ],
    "adamw": [
        (ValueError, "beta1", (1, -0.1)),
        (ValueError, "beta2", (1, 0, -0.1)),
        (ValueError, "eps", (1, 0, 0, math.inf)),
        (ValueError, "weight_decay", (1, 0, 0, 1, -1)),
    ],
    "rmsprop": [
        (ValueError, "decay must be >= 0 and < 1", (1, 1)),
        (ValueError, "eps", (1, 0, 0)),
        (ValueError, "momentum", (1, 0, 1, 1)),
        (ValueError, "weight_decay", (1, 0, 1, 0, -1)),
    ],
    "adagrad": [(ValueError, "eps", (1, 0)), (ValueError, "weight_decay", (1, 1, -1))],
    "adadelta": [
        (ValueError, "decay", (1, 1)),
        (ValueError, "eps", (1, 0, 0)),
        (ValueError, "weight_decay", (1, 0, 1, -1)),
    ],
    "step_decay": [
        (ValueError, "every must be at least 1", (1, 0)),
        (ValueError, "factor must be >= 0 and <= 1", (1, 1, 2)),
        (ValueError, "lr", (-1, 1)),
    ],
    "multistep": [
        (TypeError, "milestones must be a sequence, got int", (1, 3)),
        (TypeError, "milestones must be a sequence", (1, "3")),
        (TypeError, "every milestone", (1, [1.5])),
        (ValueError, "every milestone must be at least 0", (1, [-1])),
        (ValueError, "factor", (1, [1], -1)),
        (ValueError, "lr", (math.nan, [1])),
    ],
    "exponential": [(ValueError, "decay", (1, 1.1)), (ValueError, "lr", (-1, 1))],
    "cosine": [
        (ValueError, "steps must be at least 1", (1, 0)),
        (ValueError, "lr", (-1, 1)),
        (ValueError, "final", (1, 1, -1)),
    ],
    "cyclic": [
        (ValueError, "half_cycle must be at least 1", (1, 1, 0)),
        (ValueError, "low", (-1, 1, 1)),
        (ValueError, "high", (1, -1, 1)),
    ],
    "one_cycle": [
        (ValueError, "steps must be at least 1", (1, 0)),
        (ValueError, "peak", (-1, 1)),
        (ValueError, "rise", (1, 1, 1.1)),
    ],
    "warmup": [
        (ValueError, "steps must be at least 1", (1, 0)),
        (ValueError, "schedule must be >= 0", (-1, 1)),
        (TypeError, "schedule must be a number", ("1", 1)),
    ],
    "reduce_on_plateau": [
        (ValueError, "expected an optimiser's state", ({}, 1)),
        (ValueError, "expected an optimiser's state", (None, 1)),
        (TypeError, "loss must be a number", (nn.adam().init({}), "1")),
        (ValueError, "scale in the state must be", ({"scale": np.array(-0.5)}, 1)),
        (TypeError, "loss must be a number", (nn.adam().init({}), True)),
        (ValueError, "factor", (nn.adam().init({}), 1, 2)),
        (ValueError, "patience", (nn.adam().init({}), 1, 0.5, -1)),
        (ValueError, "threshold must be >= 0 and < 1", (nn.adam().init({}), 1, 0.5, 1, 1)),
    ],
    "check_gradients": [
        (TypeError, "x must be an array of numbers", (nn.relu(), {}, [1.0])),
        (TypeError, "params must be a dict, got list", (nn.relu(), [Z], Z)),
        (ValueError, "rtol must be > 0", (nn.relu(), {}, Z, 0)),
    ],
    "value_and_grad": [
        (TypeError, "net must be a layer, but NoneType has no forward", (None, nn.hinge)),
        (TypeError, "loss must be a function, got NoneType", (nn.relu(), None)),
    ],
    "accuracy": [
        (TypeError, "logits must be a NumPy array", ([1], LABELS)),
        (TypeError, "labels must be a NumPy array", (Z, [0, 2])),
        (ValueError, "labels must be from 0 to 2, got 0 to 3", (Z, np.array([0, 3]))),
    ],
    "batches": [
        (ValueError, "count must be at least 1", (0, 1, 0)),
        (ValueError, "size must be at least 1", (1, 0, 0)),
        (TypeError, "key", (1, 1, "0")),
    ],
    "draw_digits": [
        (ValueError, "count must be at least 1", (0, 0)),
        (ValueError, "size must be at least 8", (0, 1, 7)),
    ],
    **{
        f"{name}_init": [(TypeError, "shape must be a tuple", (0, 3))]
        for name in ("identity", "flatten", "softmax", "batch_norm", "layer_norm")
    },
    **{
        f"{name}_forward": [
            (TypeError, f"{name}: x must be a NumPy array", ({}, [1.0])),
            (TypeError, f"{name}: params must be a dict", (None, Z)),
        ]
        for name in PAIRS
    },
    **{
        f"{name}_backward": [((TypeError, ValueError), name, ({"W": Z.T}, None, Z))]
        for name in PAIRS
    },
}
for name in ("softmax_cross_entropy", "cross_entropy"):
    MISUSE[name] += [
        (ValueError, "target probabilities must be numbers from 0 to 1", (Z, 1.1 * Z)),
        (ValueError, "target probabilities must be", (Z, -0.1 * Z)),
        (ValueError, "target probabilities must be", (Z, Z * math.nan)),
        (ValueError, "target probabilities must be", (Z, Z.astype(complex))),
        (
            ValueError,
            r"target has shape \(2, 2\), but the prediction \(2, 3\)",
            (Z, np.ones((2, 2))),
        ),
    ]
for name in ("softmax_cross_entropy", "cross_entropy", "hinge"):
    MISUSE[name] += [
        (TypeError, "must be a NumPy array", ([[1.0]], LABELS)),
        (TypeError, "must be float32 or float64", (Z.astype(int), LABELS)),
        (ValueError, r"must be \(N, classes\), got shape \(2,\)", (np.ones(2), LABELS)),
        (ValueError, "must not be empty", (np.ones((0, 3)), LABELS[:0])),
        (TypeError, "labels must be a NumPy array", (Z, [0, 1])),
        (ValueError, r"labels must have shape \(2,\), got \(3,\)", (Z, np.array([0, 1, 2]))),
        (ValueError, "labels must be whole numbers", (Z, np.array([0.0, 1.0]))),
        (ValueError, "labels must be from 0 to 2, got 0 to 3", (Z, np.array([0, 3]))),
        (ValueError, "labels must be from 0 to 2, got -1 to 0", (Z, np.array([0, -1]))),
    ]
for name in ("binary_cross_entropy", "mean_squared_error", "mean_absolute_error", "huber"):
    MISUSE[name] += [
        (TypeError, "prediction must be a NumPy array", ([1.0], Z)),
        (TypeError, "target must be an array of numbers, got list", (Z, [[1.0]])),
        (TypeError, "target must be an array of numbers", (Z, Z.astype(object))),
        (ValueError, r"target has shape \(2,\), but the prediction \(2, 3\)", (Z, LABELS)),
        (ValueError, r"target has shape \(3, 3\), but the prediction", (Z, np.ones((3, 3)))),
        (ValueError, "must not be empty", (Z[:0], Z[:0])),
    ]


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_refused_in_one_sentence(name):
    for exception, words, arguments in MISUSE[name]:
        function = getattr(nn, name)
        if name.endswith(("_forward", "_backward")):
            layer, _, kind = name.rpartition("_")
            options = BOUND.get(layer, {"rate": 0.5} if layer == "dropout" else {})
            if kind == "forward" or layer in ("leaky_relu", "elu"):
                function = partial(function, **options)
        with pytest.raises(exception, match=words) as refused:
            function(*arguments)
        assert "\n" not in str(refused.value)


def test_every_public_name_has_a_docstring_and_stands_in_all():
    for name in nn.__all__:
        assert getattr(nn, name).__doc__
    public = {
        name
        for name, value in vars(nn).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == "purenn"
    }
    assert public <= set(nn.__all__)


def test_names_of_layers_are_checked():
    for bad in ("key", "statistics", "", "a/b"):
        with pytest.raises(ValueError, match=f"sequential: a layer cannot be called '{bad}'"):
            nn.sequential(**{bad: nn.relu()})
    with pytest.raises(ValueError, match="sequential: a layer cannot be called '0'"):
        nn.sequential(nn.relu(), **{"0": nn.relu()})


# ------------------------------------------------------------------------------------------------
# Misuse: every argument of every public function, and of the functions that these return
# ------------------------------------------------------------------------------------------------

NO_DICTS: list = [None, [1.0], np.ones(3), "x", 1.0, {1, 2}, ({},)]
NO_NUMBERS: list = ["1", None, True, math.nan, [1.0], np.ones(2), 1j, {}]
NO_WHOLE_NUMBERS = [*NO_NUMBERS, 1.5, np.float64(2), -1]
NO_PAIRS = [*NO_WHOLE_NUMBERS, (), (1,), (1, 2, 3), (1, 1.5), (-1, 1), (1, None)]
NO_KEYS: list = [
    "0",
    None,
    True,
    1.5,
    -1,
    (),
    [1.5],
    ("a",),
    (1, (2,)),
    {},
    np.ones(2),
    np.array([-1]),
]
NO_SHAPES = [3, None, "ab", {3}, np.array([3]), (0,), (-1, 2), (1.5,), (True,), ("a",), (None,)]
NO_FUNCTIONS = [None, 1, "f", np.ones(2)]
NO_LAYERS: list = [None, 1, "f", nn.relu, {}, types.SimpleNamespace(init=print, forward=print)]
NO_PATHS: list = [None, 3, 1.5, ["a"], {}]
NO_NAMES = [{1: np.ones(2)}, {"": np.ones(2)}, {"/": np.ones(2)}]
NO_LABELS = [[0, 2], None, "x", 1.0, 0, {}, np.int64(0), np.array(0), np.array([0.0, 2.0])]
NO_LABELS += [np.array(bad) for bad in ([True, False], [0, 3], [0, -1], [0], [[0], [2]])]
NO_LABELS += [np.array([0, 2], object), np.ma.masked_array([0, 2], [False, True]), np.ones((2, 4))]


def no_numbers(array):
    """Everything that is not an array of real numbers."""
    yield from ([1.0, 2.0], None, "x", object(), np.ma.masked_array(array, array > 0))
    yield from (array.astype(kind) for kind in (object, complex, "S1"))
    yield from [array.view(np.matrix)] if array.ndim == 2 else []


def no_arrays(array):
    """Everything that is not an array of float32 or float64 with the axes of this one."""
    yield from no_numbers(array)
    yield from (1.0, np.float64(1), True, math.nan, {})
    yield from (array.astype(kind) for kind in (np.float16, int, np.uint8, bool))


def other_shapes(array):
    yield from no_arrays(array)
    yield from (np.ones(()), array[None], array[..., None], np.repeat(array, 2, axis=0))


def no_leaves(tree, wrong):
    """A tree with one of its leaves wrong, at any depth."""
    for name, value in tree.items():
        for bad in no_leaves(value, wrong) if isinstance(value, dict) else wrong(value):
            yield {**tree, name: bad}


def without_one(tree, kept=()):
    """A tree without one of its entries, at any depth, those apart that may be left out."""
    for name, value in tree.items():
        if name not in kept:
            yield {other: tree[other] for other in tree if other != name}
        if isinstance(value, dict):
            yield from ({**tree, name: rest} for rest in without_one(value, kept))


def only(tree, chosen):
    flat = nn.tree_flatten(tree)
    return nn.tree_unflatten({path: leaf for path, leaf in flat.items() if chosen(path)})


def wrong_params(params):
    yield from NO_DICTS
    yield {**params, "unknown": np.ones(3)}
    yield from without_one(params, kept="b")
    yield from no_leaves(params, other_shapes)
    branches = [name for name, value in params.items() if isinstance(value, dict)]
    yield from ({**params, name: bad} for name in branches for bad in NO_DICTS)


def wrong_params_of_backward(params):
    """As for forward; but of what params hold, backward needs only W and gamma."""
    used = only(params, lambda path: path.endswith(("W", "gamma")))
    yield from NO_DICTS
    yield {**params, "unknown": np.ones(3)}
    yield from without_one(used)
    yield from no_leaves(used, other_shapes)


def wrong_cache(cache):
    if isinstance(cache, np.ndarray):
        yield from other_shapes(cache)
    else:
        used = only(cache, lambda path: not re.search("statistics|count", path))
        yield from [*NO_DICTS, {}, {"other": np.ones((2, 3))}]
        yield from without_one(used)
        yield from no_leaves(used, no_arrays)


def wrong_trees(tree):
    yield from [*NO_DICTS, *NO_NAMES]
    yield from no_leaves(tree, no_numbers)


def wrong_target(target):
    yield from no_numbers(target)
    yield from (np.ones(()), target[None], target[:1], np.ones((2, 4)), {}, 1.0)


def wrong_state(state):
    yield from [*NO_DICTS, {}, {**state, "unknown": np.ones(3)}, {"step": 1, "scale": 1.0}]
    yield from without_one(state)
    memory = {name: value for name, value in state.items() if isinstance(value, dict)}
    yield from ({**state, **bad} for bad in no_leaves(memory, wrong_memory))
    yield from ({**state, name: bad} for name in memory for bad in [*NO_DICTS, {}])
    yield from ({**state, "step": bad} for bad in [*NO_WHOLE_NUMBERS, np.array(-1), np.array(1.0)])
    yield from ({**state, "scale": bad} for bad in [*NO_NUMBERS, np.array(2.0), -0.5])


def wrong_memory(array):
    if array.dtype.kind == "i":  # a count of steps
        yield from (1, None, np.array(-1), np.array(1.0), np.array([1]), np.ma.masked_array(1))
    else:
        yield from (bad for bad in other_shapes(array) if getattr(bad, "dtype", "") != np.float16)


def wrong_plateau(state):
    yield from [*NO_DICTS[:-2], {}, {"step": 1}]
    for name, bad in (("scale", 2.0), ("plateau_best", "x"), ("plateau_count", -1)):
        yield from ({**state, name: value} for value in (bad, None, True, np.ones(2), "x"))


IMAGES = np.random.default_rng(0).normal(size=(2, 2, 5, 5))
LAYER_CALLS = {  # name: (layer, shape of x)
    "linear": (nn.linear(2), (3,)),
    "identity": (nn.identity(), (3,)),
    "flatten": (nn.flatten(), (3, 2)),
    **{
        name: (getattr(nn, name)(), (3,))
        for name in ("relu", "leaky_relu", "elu", "sigmoid", "tanh", "softplus", "gelu", "silu")
    },
    "softmax": (nn.softmax(), (3,)),
    "log_softmax": (nn.log_softmax(), (3,)),
    "dropout": (nn.dropout(0.5), (3,)),
    "batch_norm": (nn.batch_norm(), (3,)),
    "layer_norm": (nn.layer_norm(), (3,)),
    "conv2d": (nn.conv2d(4, 3, 2, 1, groups=2), (2, 5, 5)),
    "max_pool2d": (nn.max_pool2d(2, 1, 1), (2, 5, 5)),
    "avg_pool2d": (nn.avg_pool2d(2, 1, 1), (2, 5, 5)),
    "global_avg_pool2d": (nn.global_avg_pool2d(), (2, 5, 5)),
    "sequential": (nn.sequential(nn.linear(2), nn.batch_norm()), (3,)),
    "residual": (nn.residual(nn.linear(3), nn.layer_norm()), (3,)),
}


def calls_of_layers():
    """A right call of init, forward and backward of every layer."""
    for layer, shape in LAYER_CALLS.values():
        params, _ = layer.init(0, shape)
        x = np.random.default_rng(0).normal(size=(2, *shape))
        y, cache = layer.forward(params, x)
        for function, arguments in (
            (layer.init, {"key": 0, "shape": shape}),
            (layer.forward, {"params": params, "x": x}),
            (layer.backward, {"params": params, "cache": cache, "dy": y}),
        ):
            plain = getattr(function, "func", function)
            yield plain.__name__, {**arguments, **getattr(function, "keywords", {})}


TREE = {"a": np.ones((2, 3)), "b": {"c": np.ones(3)}}
NET, STATE = nn.sequential(nn.linear(3)), nn.adam().init({"c": np.ones(3)})
NET_PARAMS = NET.init(0, (3,))[0]
LOGITS = np.random.default_rng(1).normal(size=(2, 3))
TARGETS = {"target": np.array([0, 2])}
CALLS = {  # name: a right call of it
    "tree_map": {"f": np.add, "*trees": (TREE, TREE)},
    **{name: {"tree": TREE} for name in ("tree_flatten", "count_parameters", "global_norm")},
    "tree_unflatten": {"flat": {"a/b": np.ones(2)}},
    "tree_add": {"*trees": (TREE, TREE)},
    "clip_gradients": {"grads": TREE, "max_norm": 1.0},
    "fold_key": {"key": 0, "index": 1},
    "training": {"params": {}, "key": 0},
    **{
        name: {"key": 0, "shape": (3, 4)}
        for name in ("zeros", "xavier_normal", "xavier_uniform", "he_normal", "he_uniform")
    },
    "orthogonal": {"key": 0, "shape": (3, 4)},
    "constant": {"value": 1.0},
    "normal": {"std": 1.0},
    "uniform": {"limit": 1.0},
    **{
        name: {}
        for name in ("identity", "flatten", "relu", "sigmoid", "tanh", "softplus", "gelu", "silu")
    },
    **{name: {} for name in ("softmax", "log_softmax", "global_avg_pool2d")},
    "linear": {"out": 3, "init": nn.zeros, "bias": True},
    "leaky_relu": {"slope": 0.1},
    "elu": {"alpha": 1.0},
    "dropout": {"rate": 0.5},
    "batch_norm": {"eps": 1e-5},
    "layer_norm": {"eps": 1e-5},
    "conv2d": {
        "out": 4,
        "kernel": 3,
        "stride": 2,
        "padding": 1,
        "dilation": (1, 1),
        "groups": 2,
        "init": nn.zeros,
        "bias": True,
    },
    "max_pool2d": {"size": 2, "stride": 1, "padding": 1},
    "avg_pool2d": {"size": 2, "stride": 1, "padding": 1},
    "sequential": {"*layers": (nn.relu(),), "**named_layers": {"a": nn.relu()}},
    "residual": {"branch": nn.relu(), "shortcut": nn.relu()},
    **dict(calls_of_layers()),
    "update_statistics": {
        "params": {"a": {"mean": np.ones(3)}},
        "cache": {"a": {"statistics": {"mean": np.ones(3)}}},
        "momentum": 0.1,
    },
    "softmax_cross_entropy": {"logits": LOGITS, **TARGETS, "smoothing": 0.1},
    "cross_entropy": {"probabilities": np.full((2, 3), 0.3), **TARGETS},
    "hinge": {"scores": LOGITS, **TARGETS, "margin": 1.0},
    "binary_cross_entropy": {"logits": LOGITS, "target": np.ones((2, 3))},
    "mean_squared_error": {"prediction": LOGITS, "target": np.ones((2, 3))},
    "mean_absolute_error": {"prediction": LOGITS, "target": np.ones((2, 3))},
    "huber": {"prediction": LOGITS, "target": np.ones((2, 3)), "delta": 1.0},
    "l2_penalty": {"params": TREE, "coefficient": 0.1},
    "sgd": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    **{
        name: {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "weight_decay": 0.1}
        for name in ("adam", "adamw")
    },
    "rmsprop": {"lr": 0.1, "decay": 0.9, "eps": 1e-8, "momentum": 0.9, "weight_decay": 0.1},
    "adagrad": {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.1},
    "adadelta": {"lr": 0.1, "decay": 0.9, "eps": 1e-8, "weight_decay": 0.1},
    "step_decay": {"lr": 0.1, "every": 3, "factor": 0.1},
    "multistep": {"lr": 0.1, "milestones": [3, 4], "factor": 0.1},
    "exponential": {"lr": 0.1, "decay": 0.9},
    "cosine": {"lr": 0.1, "steps": 9, "final": 0.0},
    "cyclic": {"low": 0.1, "high": 0.2, "half_cycle": 3},
    "one_cycle": {"peak": 0.1, "steps": 9, "rise": 0.3},
    "warmup": {"schedule": 0.1, "steps": 3},
    "reduce_on_plateau": {
        "state": nn.reduce_on_plateau(STATE, 1.0),
        "loss": 1.0,
        "factor": 0.5,
        "patience": 1,
        "threshold": 0.1,
    },
    "check_gradients": {
        "layer": nn.sigmoid(),
        "params": {},
        "x": np.ones((2, 3)),
        "rtol": 1e-5,
        "key": 0,
    },
    "value_and_grad": {"net": NET, "loss": nn.hinge},
    "data_parallel": {"value_and_grad": nn.value_and_grad(NET, nn.hinge), "shards": 2, "map": map},
    "accuracy": {"logits": LOGITS, "labels": np.array([0, 2])},
    "batches": {"count": 5, "size": 2, "key": 0},
    "draw_digits": {"key": 0, "count": 2, "size": 28},
    "augment": {
        "key": 0,
        "images": IMAGES,
        **dict.fromkeys(("shift", "rotation", "scale", "stretch", "elastic"), 0.1),
    },
    "resize": {"images": IMAGES, "size": 3},
    "replacing": {"path": "a.npz"},
    "save": {"path": "a.npz", "tree": TREE},
    "load": {"path": "a.npz"},
    "read_idx": {"path": "a"},
    "read_dataset": {"path": "a"},
    "download_mnist": {
        "directory": "a",
        "mirrors": (),
        "patience": 1.0,
        "timeout": 1.0,
        "progress": None,
    },
}
RETURNED = {  # name: what a public function returned, and a right call of it
    "constant(1)": (nn.constant(1), {"key": 0, "shape": (3, 4)}),
    "normal(1)": (nn.normal(1), {"key": 0, "shape": (3, 4)}),
    "uniform(1)": (nn.uniform(1), {"key": 0, "shape": (3, 4)}),
    **{
        f"{name}({', '.join(map(repr, options))})": (getattr(nn, name)(*options), {"step": 1})
        for name, options in {
            "step_decay": (1, 2),
            "multistep": (1, [2]),
            "exponential": (1, 1),
            "cosine": (1, 2),
            "cyclic": (1, 2, 3),
            "one_cycle": (1, 9),
            "warmup": (1, 2),
        }.items()
    },
    **{
        f"{name}().{function}": (getattr(optimizer, function), arguments)
        for name, optimizer in {
            "sgd": nn.sgd(0.1, 0.9),
            **{n: getattr(nn, n)() for n in ("adam", "adamw", "rmsprop", "adagrad", "adadelta")},
        }.items()
        for function, arguments in {
            "init": {"params": {"a": np.ones((2, 3)), "b": {"c": np.ones(3)}}},
            "step": {
                "params": {"c": np.ones(3), "d": np.ones(2)},
                "grads": {"c": np.ones(3)},
                "state": optimizer.init({"c": np.ones(3)}),
            },
        }.items()
    },
    **{
        f"{name}()": (function, {"params": NET_PARAMS, "x": np.ones((2, 3)), **TARGETS})
        for name, function in {
            "value_and_grad": nn.value_and_grad(NET, nn.hinge),
            "data_parallel": nn.data_parallel(nn.value_and_grad(NET, nn.hinge), 2),
        }.items()
    },
}
NO_PAIRS_BUT_NONE = [bad for bad in NO_PAIRS if bad is not None]
RATE = [*NO_NUMBERS, -1.0, math.inf]  # of learning; also other numbers that are not negative
POSITIVE = [*RATE, 0.0]
SHARE, BELOW_1 = [*NO_NUMBERS, -0.1, 1.1], [*NO_NUMBERS, -0.1, 1.0]
WRONG = {  # parameter, or function.parameter: wrong values, or what gives them for the right one
    "f": NO_FUNCTIONS,
    "tree_map.trees": lambda trees: [(), (trees[0], {}), *((trees[0], bad) for bad in NO_DICTS)],
    "tree_add.trees": lambda trees: (
        pair for bad in wrong_trees(trees[1]) for pair in ((trees[0], bad), (bad, trees[0]))
    ),
    "tree": wrong_trees,
    "tree_flatten.tree": [*NO_DICTS, *NO_NAMES],
    "flat": [*NO_DICTS, {1: 1.0}, {"": 1.0}, {"a//b": 1.0}, {"a": 1.0, "a/b": 1.0}],
    "grads": wrong_trees,
    "step.grads": lambda grads: [
        *NO_DICTS,
        {**grads, "unknown": np.ones(3)},
        {"a": {"c": grads["c"]}},
        *no_leaves(grads, other_shapes),
    ],
    "max_norm": POSITIVE,
    "index": [*NO_WHOLE_NUMBERS, 2**32],
    "key": NO_KEYS,
    "shape": NO_SHAPES,
    "value": [*NO_NUMBERS, math.inf, 1e39],
    "std": RATE,
    "limit": RATE,
    "out": [*NO_WHOLE_NUMBERS, 0],
    "init": NO_FUNCTIONS,
    "bias": [None, 1, "yes", np.ones(2)],
    "params": wrong_params,
    "backward.params": wrong_params_of_backward,
    "training.params": NO_DICTS,
    "update_statistics.params": lambda params: [
        *NO_DICTS,
        *no_leaves(
            params, lambda mean: [bad for bad in other_shapes(mean) if not isinstance(bad, dict)]
        ),
    ],
    "l2_penalty.params": wrong_trees,
    "init.params": wrong_trees,
    "step.params": lambda params: [
        *NO_DICTS,
        *({**params, "c": bad} for bad in other_shapes(params["c"])),
        {"d": params["d"]},
    ],
    "check_gradients.params": [*NO_DICTS[1:], {"unknown": np.ones(3)}],
    "x": no_arrays,
    "check_gradients.x": no_numbers,
    "dy": other_shapes,
    "cache": wrong_cache,
    "flatten_backward.cache": lambda x: [*no_arrays(x), np.ones(()), x[None]],
    "update_statistics.cache": lambda cache: [
        *(bad for bad in NO_DICTS if not isinstance(bad, np.ndarray)),
        *({"a": {"statistics": bad}} for bad in no_leaves({"mean": np.ones(3)}, no_numbers)),
        {"a": {"statistics": {"mean": np.ones(4)}}},
    ],
    "slope": [*NO_NUMBERS, math.inf],
    "alpha": POSITIVE,
    "eps": POSITIVE,
    "rate": BELOW_1,
    "kernel": [*NO_PAIRS, 0, (1, 0)],
    "size": [*NO_PAIRS, 0, (1, 0)],
    "draw_digits.size": [*NO_WHOLE_NUMBERS, 7],
    "batches.size": [*NO_WHOLE_NUMBERS, 0],
    "stride": [*NO_PAIRS, 0, (1, 0)],
    **{f"{name}_pool2d.stride": [*NO_PAIRS_BUT_NONE, 0, (1, 0)] for name in ("max", "avg")},
    "padding": [*NO_PAIRS, "valid"],
    **{f"{name}_pool2d.padding": [*NO_PAIRS, (2, 1)] for name in ("max", "avg")},
    "dilation": [*NO_PAIRS, 0, (1, 0)],
    **{
        f"{function}.{option}": [*NO_PAIRS_BUT_NONE, None, [1, 1], 1, (1, 0)]
        for function in ("init", "forward", "backward")
        for option in ("kernel", "size", "stride", "dilation")
    },
    **{
        f"{function}.padding": [
            *NO_PAIRS,
            *(1, [1, 1], (3, 3), ((1, 1), (1, -1)), ((-1, 1), (1, 1)), ((1, 1), 1), (1, (1, 1))),
            ((1, 1), (1, 1), (1, 1)),
        ]
        for function in ("init", "forward", "backward")
    },
    "groups": [*NO_WHOLE_NUMBERS, 0, 3],
    "layers": lambda layers: [(bad,) for bad in NO_LAYERS],
    "named_layers": lambda layers: [{"a": bad} for bad in NO_LAYERS] + [{"key": nn.relu()}],
    "branch": NO_LAYERS,
    "shortcut": NO_LAYERS,
    "momentum": SHARE,
    "target": NO_LABELS,
    **{
        f"{name}.target": wrong_target
        for name in (
            "binary_cross_entropy",
            "mean_squared_error",
            "mean_absolute_error",
            "huber",
        )
    },
    "labels": NO_LABELS,
    "logits": other_shapes,
    "probabilities": other_shapes,
    "scores": other_shapes,
    "prediction": other_shapes,
    "smoothing": BELOW_1,
    "margin": RATE,
    "delta": POSITIVE,
    "coefficient": RATE,
    "lr": RATE,
    "nesterov": [None, 1, "yes", np.ones(2)],
    "weight_decay": RATE,
    "decay": SHARE,
    "beta1": BELOW_1,
    "beta2": BELOW_1,
    "every": [*NO_WHOLE_NUMBERS, 0],
    "milestones": [None, 3, "34", {3}, [1.5], [-1], [None], np.array(3)],
    "factor": SHARE,
    "steps": [*NO_WHOLE_NUMBERS, 0],
    "final": RATE,
    "low": RATE,
    "high": RATE,
    "half_cycle": [*NO_WHOLE_NUMBERS, 0],
    "peak": RATE,
    "rise": SHARE,
    "schedule": RATE,
    "step": NO_WHOLE_NUMBERS,
    "step.state": wrong_state,
    "state": wrong_plateau,
    "value_and_grad.loss": NO_FUNCTIONS,
    "loss": ["1", None, True, [1.0], np.ones(2), {}],
    "patience": NO_WHOLE_NUMBERS,
    "download_mnist.patience": POSITIVE,
    "threshold": BELOW_1,
    "layer": NO_LAYERS,
    "net": NO_LAYERS,
    "value_and_grad": NO_FUNCTIONS,
    "map": NO_FUNCTIONS,
    "shards": [*NO_WHOLE_NUMBERS, 0],
    "count": [*NO_WHOLE_NUMBERS, 0],
    "images": lambda images: [*no_arrays(images), np.ones(()), images[0], images[None]],
    "shift": RATE,
    "rotation": RATE,
    "scale": BELOW_1,
    "stretch": BELOW_1,
    "elastic": RATE,
    "rtol": POSITIVE,
    "path": NO_PATHS,
    "directory": NO_PATHS,
    "mirrors": [None, 1, "http://a", [1]],
    "timeout": POSITIVE,
    "progress": NO_FUNCTIONS[1:],
}
INSIDE = {  # whose errors also come out of a function: those of its layers and of its loss
    "sequential": ["linear", "batch_norm"],
    "residual": ["linear", "layer_norm"],
    "value_and_grad()": ["sequential", "linear", "hinge"],
    "data_parallel()": ["sequential", "linear", "hinge"],
    "check_gradients": ["sigmoid"],
}
NEEDS_FILES = ["load", "read_idx", "read_dataset", "download_mnist"]


EXEMPT = {  # function, or function.parameter: why nothing is refused
    "Layer": "a tuple, which holds anything",
    "Optimizer": "a tuple, which holds anything",
    **{
        f"{name}.key": "nothing is drawn"
        for name in ("zeros", "constant(1)", "identity_init", "flatten_init", "softmax_init")
    },
    **{
        f"{name}_init.key": "nothing is drawn"
        for name in ("batch_norm", "layer_norm", "pool2d", "global_avg_pool2d")
    },
    **{
        f"{name}_{function}.layers": "sequential and residual have checked them, once for all calls"
        for name in ("sequential", "residual")
        for function in ("init", "forward", "backward")
    },
    **{
        f"{name}_backward.need_dx": "a truth value, of whatever kind"
        for name in ("linear", "conv2d", "sequential")
    },
    "pool2d_init.where": "a name for messages",
}


def wrong_values(name, parameter, right):
    """What the parameter of a function must not be."""
    wrong = WRONG.get(f"{name.rpartition('.')[2]}.{parameter}")
    if wrong is None and name.endswith(("_init", "_forward", "_backward")):
        wrong = WRONG.get(f"{name.rpartition('_')[2]}.{parameter}")
    if wrong is None:
        wrong = WRONG[parameter]
    return list(wrong(right) if callable(wrong) else wrong)


def parameters(function):
    """The parameters that a caller gives, with their stars."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    bound = getattr(function, "keywords", {})
    signature = inspect.signature(function).parameters.values()
    return {stars.get(p.kind, "") + p.name for p in signature if p.name not in bound}


def called(function, arguments):
    """The result of a function for arguments by name, those with stars spread out."""
    spread = [value for name, value in arguments.items() if name[:1] == "*" != name[1:2]]
    if not spread:
        return function(**arguments)
    named = {name: value for name, value in arguments.items() if not name.startswith("*")}
    return function(*named.values(), *spread[0], **arguments.get("**named_layers", {}))


def raised(function, arguments):
    try:
        return called(function, arguments)
    except Exception as error:
        return error


EVERY_CALL = {
    **{name: (getattr(nn, name), arguments) for name, arguments in CALLS.items()},
    **RETURNED,
    "replacing": (lambda path: nn.replacing(path).__enter__(), CALLS["replacing"]),
}


def test_every_parameter_of_every_public_function_is_in_the_table_of_misuse():
    functions = {name for name in nn.__all__ if callable(getattr(nn, name))}
    assert functions == CALLS.keys() | {"Layer", "Optimizer"}
    for name, (function, arguments) in EVERY_CALL.items():
        exempt = {path.rpartition(".")[2] for path in EXEMPT if path.startswith(f"{name}.")}
        assert parameters(function) - exempt == arguments.keys() - exempt, name
    for path in EXEMPT:
        name, _, parameter = path.partition(".")
        if parameter:
            assert parameter in inspect.signature(EVERY_CALL[name][0]).parameters


@pytest.mark.parametrize("name", EVERY_CALL)
def test_every_argument_is_refused_if_it_is_wrong(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function, right = EVERY_CALL[name]
    layer, _, _ = name.replace("().", "_").rpartition("_")
    said_by = {
        name.partition("(")[0],
        layer,
        right.get("where"),
        *INSIDE.get(name, INSIDE.get(layer, ())),
    }
    words = re.compile(rf"(\w+: )*({'|'.join(filter(None, said_by))}|key): .*")  # on one line
    if name not in NEEDS_FILES:
        called(function, right)
    for parameter, value in right.items():
        if f"{name}.{parameter}" in EXEMPT:
            continue
        wrong = wrong_values(name, parameter.lstrip("*"), value)
        assert wrong
        for bad in wrong:
            refusal = raised(function, {**right, parameter: bad})
            assert type(refusal) in (TypeError, ValueError), (parameter, bad, refusal)
            assert words.fullmatch(str(refusal)), (parameter, bad, refusal)


# ------------------------------------------------------------------------------------------------
# Files: save and load
# ------------------------------------------------------------------------------------------------

STORED_TYPES = ["?", "i1", "u1", "<i4", ">i4", "i8", "u8", "f2", "<f4", ">f4", "f8"]


@st.composite
def arrays_of_all_kinds(draw):
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    values = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 2, shape)
    array = np.asarray(values, draw(st.sampled_from(STORED_TYPES)))
    return draw(
        st.sampled_from([array, np.asfortranarray(array), array[..., ::-1] if shape else array])
    )


stored_trees = st.recursive(
    st.dictionaries(names, arrays_of_all_kinds(), max_size=3),
    lambda children: st.dictionaries(
        names, children | arrays_of_all_kinds(), min_size=1, max_size=3
    ),
    max_leaves=6,
)


def test_an_array_of_several_megabytes_comes_back(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, 3_500_000, np.uint8)
    nn.save(tmp_path / "x.npz", {"a": array})
    np.testing.assert_array_equal(nn.load(tmp_path / "x.npz")["a"], array)


def test_names_may_have_65_000_bytes(tmp_path):
    nn.save(tmp_path / "x.npz", {"n" * 65_000: np.ones(1)})
    assert list(nn.load(tmp_path / "x.npz")) == ["n" * 65_000]
    with pytest.raises(ValueError, match="save: a name must be short"):
        nn.save(tmp_path / "x.npz", {"n" * 65_001: np.ones(1)})


@given(tree=stored_trees)
def test_load_gives_back_what_was_saved(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("save") / "any name"
    nn.save(path, tree)
    loaded, expected = nn.tree_flatten(nn.load(str(path))), nn.tree_flatten(tree)
    assert list(loaded) == list(expected)
    for name, leaf in expected.items():
        assert (loaded[name].dtype, loaded[name].shape) == (
            leaf.dtype.newbyteorder("="),
            leaf.shape,
        )
        np.testing.assert_array_equal(loaded[name], leaf)
        assert loaded[name].flags.writeable
    first = path.read_bytes()
    nn.save(path, tree)
    assert path.read_bytes() == first
    with np.load(path) as archive:
        assert set(archive.files) == set(expected)


def test_save_takes_numpy_scalars_and_odd_names(tmp_path):
    nn.save(tmp_path / "x", {"file": np.float32(2), "a.npy": {"allow_pickle": np.int64(3)}})
    loaded = nn.load(tmp_path / "x")
    assert (loaded["file"], loaded["a.npy"]["allow_pickle"]) == (2, 3)
    assert loaded["file"].shape == ()


def test_save_refuses_what_load_would_not_read(tmp_path):
    for bad in (
        [1.0],
        1.0,
        "text",
        None,
        np.array(["text"]),
        np.array([None]),
        np.ones(2, complex),
        np.ma.masked_array([1.0, 2.0], [True, False]),
    ):
        with pytest.raises(TypeError, match="save: net/W must be an array of numbers, got"):
            nn.save(tmp_path / "x", {"net": {"W": bad}})
    with pytest.raises(TypeError, match="must be a dict"):
        nn.save(tmp_path / "x", np.ones(3))
    for name in ("a\0b", "ä" * 33_000):
        with pytest.raises(ValueError, match="save: a name must be short and without NUL"):
            nn.save(tmp_path / "x", {"net": {name: np.ones(1)}})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failing_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, fails):
    path = tmp_path / "model.npz"
    nn.save(path, {"a": np.ones(2)})

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, fails, full)
        with pytest.raises(OSError, match="No space left"):
            nn.save(path, {"a": np.zeros(2)})
    np.testing.assert_array_equal(nn.load(path)["a"], [1, 1])
    assert os.listdir(tmp_path) == ["model.npz"]


def test_save_is_on_the_disk_before_it_takes_the_old_files_place(tmp_path, monkeypatch):
    events = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: (events.append("sync"), real_sync(d)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), real_replace(a, b)))
    nn.save(tmp_path / "x", {"a": np.ones(2)})
    assert events == ["sync", "replace"]


def small_file(folder):
    path = folder / "small.npz"
    nn.save(path, {"a": np.arange(3, dtype=np.float32), "b": {"c": np.array(5)}})
    return path, path.read_bytes()


def refused_or_right(path, expected):
    """Whether a file is refused with its name; else it must give the right arrays."""
    try:
        loaded = nn.load(path)
    except ValueError as error:
        message = str(error)
    else:
        assert all_bytes(loaded) == all_bytes(expected)
        return False
    assert message.startswith(f"{path}: cannot be read: ")
    return True


def test_load_refuses_a_file_cut_off_anywhere(tmp_path):
    path, whole = small_file(tmp_path)
    expected, comment = nn.load(path), len(b"purenn ") + 64
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert refused_or_right(path, expected) or length >= len(whole) - comment


def test_load_survives_every_flipped_bit(tmp_path):
    path, whole = small_file(tmp_path)
    expected, refused = nn.load(path), 0
    for position in range(len(whole) * 8):
        broken = bytearray(whole)
        broken[position // 8] ^= 1 << position % 8
        path.write_bytes(broken)
        refused += refused_or_right(path, expected)
    assert refused > len(whole) * 4


def archive_of(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def npy(array, **header):
    """The bytes of a .npy file, with parts of its header replaced."""
    file = io.BytesIO()
    np.lib.format.write_array(file, array, allow_pickle=True)
    content = file.getvalue()
    for old, new in header.values():
        assert len(old) == len(new)
        assert old in content
        content = content.replace(old, new)
    return content


class Trap:
    """Code that a pickle would run."""

    def __reduce__(self):
        return os.mkdir, ("trapped",)


GOOD = npy(np.ones(3))
HOSTILE = {
    "a pickle": [("a.npy", npy(np.array([Trap()], dtype=object)))],
    "text": [("a.npy", npy(np.array(["abc"])))],
    "complex numbers": [("a.npy", npy(np.ones(2, complex)))],
    "a huge claim": [("a.npy", npy(np.ones(3), shape=(b"(3,), }       ", b"(999999999,),}")))],
    "a negative claim": [("a.npy", npy(np.ones(3), shape=(b"(3,), ", b"(-3,),")))],
    "too small a claim": [("a.npy", npy(np.ones(3), shape=(b"(3,)", b"(2,)")))],
    "zero times huge": [
        ("a.npy", npy(np.ones((0, 1)), shape=(b"(0, 1), }    ", b"(0, 99999),} ")))
    ],
    "too much": [("a.npy", GOOD + b"x")],
    "too little": [("a.npy", GOOD[:-1])],
    "another version": [("a.npy", GOOD.replace(b"NUMPY\x01", b"NUMPY\x03"))],
    "no array": [("a.npy", b"")],
    "another file": [("a.txt", GOOD)],
    "another ending": [("a.abc", GOOD)],
    "no name": [(".npy", GOOD)],
    "a name without ending": [("npy", GOOD)],
    "the same name twice": [("a.npy", GOOD), ("a.npy", GOOD)],
    "clashing names": [("a.npy", GOOD), ("a/b.npy", GOOD)],
    "an empty part": [("a//b.npy", GOOD)],
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", HOSTILE)
def test_load_refuses_hostile_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = archive_of("hostile.npz", HOSTILE[name])
    if name == "zero times huge":  # nothing is wrong with that
        assert nn.load(path)["a"].shape == (0, 99999)
        return
    with pytest.raises(ValueError, match=r"^hostile.npz: cannot be read: .+"):
        nn.load(path)
    assert os.listdir() == ["hostile.npz"]


def test_load_refuses_what_is_not_a_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        nn.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cannot be read"):
        nn.load(tmp_path)
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match="empty: cannot be read"):
        nn.load(tmp_path / "empty")


def peak_memory(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_bombs_are_refused_before_they_go_off(tmp_path):
    zeros = npy(np.zeros(30_000_000, np.uint8))
    bomb = archive_of(tmp_path / "bomb.npz", [("x_train.npy", zeros)], zipfile.ZIP_DEFLATED)
    claim = tmp_path / "claim-idx3-ubyte"
    claim.write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, 2**31, 2**31, 2**31))
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress(claim.read_bytes()))

    def refuse(read, path):
        with pytest.raises(ValueError, match="cannot be read"):
            read(path)

    for read, path in (
        (nn.load, bomb), (nn.read_dataset, bomb), (nn.read_idx, claim), (nn.read_idx, packed),
    ):  # fmt: skip
        assert peak_memory(lambda read=read, path=path: refuse(read, path)) < 2_000_000


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("read", [nn.load, nn.read_dataset])
def test_what_is_packed_as_no_array_is_takes_no_memory(tmp_path, read, method):
    honest = npy(np.zeros(4000, np.uint8))
    path = archive_of(tmp_path / "x", [("a.npy", honest + bytes(8_000_000))], method)
    content = path.read_bytes()  # its list of contents shall not tell, or that is what is refused
    content = content.replace(struct.pack("<I", len(honest) + 8_000_000), struct.pack("<I", 4128))
    path.write_bytes(bytes(4128) + content)

    def refuse():
        with pytest.raises(ValueError, match="'a.npy' is packed in a way that no array is"):
            read(path)

    assert peak_memory(refuse) < 1_000_000


def test_load_refuses_members_that_are_encrypted_or_share_their_bytes(tmp_path):
    path = archive_of(tmp_path / "x", [("a.npy", GOOD)])
    content = path.read_bytes()
    local, directory, end = (content.index(start) for start in (b"PK\3", b"PK\1", b"PK\5"))
    encrypted = bytearray(content)
    encrypted[local + 6] = encrypted[directory + 8] = 1
    path.write_bytes(encrypted)
    with pytest.raises(ValueError, match="cannot be read: .*encrypted"):
        nn.load(path)
    entry = content[directory:end]
    for entries in (entry * 2, entry + entry.replace(b"a.npy", b"b.npy")):
        sizes = struct.pack("<4H2IH", 0, 0, 2, 2, len(entries), directory, 0)
        path.write_bytes(bytes(300) + content[:directory] + entries + b"PK\5\6" + sizes)
        with pytest.raises(ValueError, match="cannot be read: "):
            nn.load(path)


def test_what_is_said_of_a_file_is_one_short_line(tmp_path):
    for name in ("a\nb" * 9, "a" * 60_000, "a/" * 300):
        path = archive_of(tmp_path / "x", [(name, GOOD)])
        with pytest.raises(ValueError, match=r"cannot be read: .+") as caught:
            nn.load(path)
        assert len(str(caught.value)) < len(str(path)) + 350
    with pytest.raises(ValueError, match=r"^x: cannot be read: two lines$"), nn._blaming("x"):
        raise OSError("two\n  lines\n")


def said_in_time(read, path):
    """What `read` says of a file; fails where it waits for more to come."""
    said = []

    def listen():
        with pytest.raises(ValueError, match="it is not a file") as caught:
            read(path)
        said.append(str(caught.value))

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    thread.join(10)
    assert said
    return said[0]


@pytest.mark.parametrize("read", [nn.load, nn.read_idx, nn.read_dataset])
def test_links_are_followed_and_what_is_no_file_is_refused(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name in ("pipe", "zeros"):
        message = said_in_time(read, tmp_path / name)
        assert message == f"{tmp_path / name}: cannot be read: it is not a file"
    (tmp_path / "nowhere").symlink_to("missing")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((ValueError, FileNotFoundError), match=f"{tmp_path}/loop: "):
        read(tmp_path / "loop")


def test_links_to_good_files_are_read(tmp_path):
    nn.save(tmp_path / "real", {"a": np.ones(2)})
    (tmp_path / "link").symlink_to("real")
    np.testing.assert_array_equal(nn.load(tmp_path / "link")["a"], [1, 1])


# ------------------------------------------------------------------------------------------------
# Files: data sets
# ------------------------------------------------------------------------------------------------

IDX_CODES = {"u1": 0x08, "i1": 0x09, ">i2": 0x0B, ">i4": 0x0C, ">f4": 0x0D, ">f8": 0x0E}


def idx(array, code=None):
    """The bytes of an IDX file."""
    code = (
        IDX_CODES[array.dtype.str[-2:] if array.dtype.itemsize == 1 else array.dtype.str]
        if code is None
        else code
    )
    header = struct.pack(f">4B{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + array.tobytes()


@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple),
    kind=st.sampled_from(list(IDX_CODES)),
    packed=st.booleans(),
)
def test_idx_files_of_all_kinds_are_read(tmp_path_factory, shape, kind, packed):
    path = tmp_path_factory.mktemp("idx") / "file"
    array = np.random.default_rng(0).integers(0, 100, shape).astype(kind)
    path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    read = nn.read_idx(path)
    assert (read.dtype, read.shape) == (np.dtype(kind).newbyteorder("="), shape)
    np.testing.assert_array_equal(read, array)
    assert read.flags.writeable


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_cut_off_or_too_long_or_not_idx_are_refused(tmp_path, packed):
    path, content = tmp_path / "file", idx(np.arange(6, dtype=np.uint8).reshape(2, 3))
    pack = gzip.compress if packed else bytes
    whole = pack(content)
    broken = [whole[:length] for length in range(len(whole))]
    broken += [pack(content[:length]) for length in range(len(content))]
    broken += [pack(content + b"x"), pack(b"\0\1" + content[2:]), pack(b"\0\0\x07" + content[3:])]
    broken += [pack(struct.pack(">4B2I", 0, 0, 8, 2, 2**32 - 1, 2**32 - 1) + b"123456")]
    for bytes_ in broken:
        path.write_bytes(bytes_)
        with pytest.raises(ValueError, match=f"^{path}: cannot be read: .+"):
            nn.read_idx(path)
    with pytest.raises(ValueError, match="cannot be read"):
        nn.read_idx(tmp_path)
    with pytest.raises(FileNotFoundError):
        nn.read_idx(tmp_path / "nowhere")


def digits(count=6, shape=(4, 5), classes=3):
    images = np.random.default_rng(count).integers(0, 256, (count, *shape)).astype(np.uint8)
    images.flat[0] = 255
    return images, (np.arange(count) % classes).astype(np.uint8)


def idx_folder(folder, style="train-images-idx3-ubyte", packed=False, change=None):
    """A folder with the four files; `change` may replace arrays."""
    parts = dict(zip(("x_train", "y_train"), digits(6), strict=True))
    parts.update(zip(("x_test", "y_test"), digits(4), strict=True))
    parts.update(change or {})
    starts = {"x_train": "train-images", "y_train": "train-labels"}
    starts.update({"x_test": "t10k-images", "y_test": "t10k-labels"})
    for part, array in parts.items():
        name = style.replace("train-images", starts[part]).replace("3", str(array.ndim))
        content = idx(array)
        (folder / (name + ".gz" * packed)).write_bytes(
            gzip.compress(content) if packed else content
        )
    return parts


def assert_same_data(data, parts):
    for part in ("train", "test"):
        images = parts[f"x_{part}"][:, None].astype(np.float32) / np.float32(255)
        np.testing.assert_array_equal(data[f"x_{part}"], images)
        assert data[f"x_{part}"].dtype == np.float32
        np.testing.assert_array_equal(data[f"y_{part}"], parts[f"y_{part}"])
        assert data[f"y_{part}"].dtype == np.int64
    assert list(data) == ["x_train", "x_test", "y_train", "y_test"]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("style", ["train-images-idx3-ubyte", "train-images.idx3-ubyte"])
def test_a_folder_of_idx_files_is_a_data_set(tmp_path, style, packed):
    parts = idx_folder(tmp_path, style, packed)
    (tmp_path / "notes.txt").write_text("not data")
    assert_same_data(nn.read_dataset(str(tmp_path)), parts)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("by", ["folder", "file"])
def test_a_keras_style_archive_is_a_data_set(tmp_path, save, by):
    (tmp_path / "idx").mkdir()
    parts = idx_folder(tmp_path / "idx")
    (tmp_path / "npz").mkdir()
    save(tmp_path / "npz" / "data.npz", **parts, more=np.ones(3))
    path = tmp_path / "npz"
    assert_same_data(nn.read_dataset(path if by == "folder" else path / "data.npz"), parts)


@pytest.mark.parametrize(
    ("shape", "channels"),
    [
        *(((4, 5), 1), ((4, 5, 1), 1), ((4, 5, 3), 3), ((1, 4, 5), 1), ((3, 4, 5), 3)),
        *(((3, 4, 3), 3), ((5, 6, 4), 4), ((4, 5, 6), 0), ((4, 7, 3), 3)),  # 0: they are first
    ],
)
@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.float64, np.bool_])
def test_images_of_any_layout_become_channels_first(tmp_path, shape, channels, kind):
    images, labels = digits(6, shape)
    first = images.reshape(6, 1, 4, 5) if channels == 1 else images
    if channels >= 3 and shape[0] != 3:
        first = np.moveaxis(images, -1, 1)
    given_images = images.astype(kind) / 255 if kind == np.float64 else images.astype(kind)
    if kind == np.bool_:  # true is white
        first = 255 * (first != 0)
    arrays = {
        "x_train": given_images,
        "y_train": labels[:, None],
        "x_test": given_images,
        "y_test": labels,
    }
    np.savez(tmp_path / "data.npz", **arrays)
    data = nn.read_dataset(tmp_path / "data.npz")
    np.testing.assert_allclose(data["x_train"], first / 255, rtol=1e-6)
    assert data["x_train"].flags.c_contiguous
    np.testing.assert_array_equal(data["y_train"], labels)


BROKEN_SETS = {
    "images of another size": ({"x_test": digits(4, (5, 5))[0]}, "differ in size"),
    "smaller images": ({"x_test": digits(4, (3, 5))[0]}, "differ in size"),
    "films": ({"x_train": np.zeros((6, 1, 4, 5, 2), np.uint8)}, "images must be"),
    "fewer labels": ({"y_train": digits(5)[1]}, r"y_train: labels must have shape \(6,\)"),
    "more labels": ({"y_test": digits(5)[1]}, r"y_test: labels must have shape \(4,\)"),
    "a class never trained": (
        {"y_test": np.full(4, 3, np.uint8)},
        "y_test: labels must be from 0 to 2",
    ),
    "negative labels": ({"y_train": np.full(6, -1, np.int8)}, "y_train: labels must be from 0"),
    "no images": ({"x_train": np.zeros((0, 4, 5), np.uint8)}, "images must be"),
    "flat images": ({"x_train": np.zeros((6, 20), np.uint8)}, r"images must be .*: \(6, 20\)$"),
    "half labels": ({"y_train": np.full(6, 0.5, ">f4")}, "labels must be whole numbers"),
    "images of nan": ({"x_train": np.full((6, 4, 5), np.nan, ">f4")}, "images must be finite"),
}


@pytest.mark.parametrize("name", BROKEN_SETS)
def test_data_that_do_not_fit_together_are_refused(tmp_path, name):
    change, message = BROKEN_SETS[name]
    idx_folder(tmp_path, change=change)
    with pytest.raises(ValueError, match=f"^{tmp_path}: cannot be read: .*{message}"):
        nn.read_dataset(tmp_path)


def test_missing_parts_of_a_data_set_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such file or folder"):
        nn.read_dataset(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match="missing: train-images, train-labels, t10k-images, t10k-labels"
    ):
        nn.read_dataset(tmp_path)
    idx_folder(tmp_path)
    os.remove(tmp_path / "t10k-labels-idx1-ubyte")
    with pytest.raises(ValueError, match=r"missing: t10k-labels\) or one .npz file, found 0"):
        nn.read_dataset(tmp_path)
    np.savez(tmp_path / "a.npz", x_train=np.ones(3))
    with pytest.raises(ValueError, match=r"a.npz: cannot be read: expected .* found \['x_train'\]"):
        nn.read_dataset(tmp_path)
    np.savez(tmp_path / "b.npz", x_train=np.ones(3))
    with pytest.raises(ValueError, match="one .npz file, found 2 of these"):
        nn.read_dataset(tmp_path)


def test_drawn_digits_are_all_there_and_differ():
    for size in (16, 28):
        images, labels = nn.draw_digits(5, 300, size)
        assert (images.shape, images.dtype, labels.shape) == ((300, size, size), np.uint8, (300,))
        assert set(labels) == set(range(10))
        assert images.max(axis=(1, 2)).min() > 100
        again, same = nn.draw_digits(5, 300, size)
        assert all_bytes(again, same) == all_bytes(images, labels)
        assert not np.array_equal(nn.draw_digits(6, 300, size)[0], images)


def test_drawn_digits_need_more_than_a_linear_classifier():
    images, labels = nn.draw_digits(7, 4_000, 16)
    x = (images / np.float32(255)).reshape(len(images), -1)
    scores = []
    for hidden in ((), (nn.linear(96), nn.relu())):
        net = nn.sequential(*hidden, nn.linear(10))
        params, _ = net.init(0, (256,))
        optimizer = nn.adam(0.003)
        state = optimizer.init(params)
        function = nn.value_and_grad(net, nn.softmax_cross_entropy)
        for epoch in range(15):
            for index in nn.batches(3_000, 50, (1, epoch)):
                _, grads, _ = function(params, x[index], labels[index])
                params, state = optimizer.step(params, grads, state)
        scores.append(nn.accuracy(net.forward(params, x[3_000:])[0], labels[3_000:]))
    linear, mlp = scores
    assert 0.7 < linear < 0.9
    assert mlp > linear + 0.05


# ------------------------------------------------------------------------------------------------
# The download, from servers on loopback
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_mnist(monkeypatch):
    """Small files in the place of MNIST's, with their true sizes and digests."""
    images, labels = digits(6)
    contents = {
        "t10k-labels-idx1-ubyte.gz": idx(labels),
        "train-labels-idx1-ubyte.gz": idx(labels[::-1].copy()),
        "t10k-images-idx3-ubyte.gz": idx(images),
        "train-images-idx3-ubyte.gz": idx(images[::-1].copy()),
    }
    monkeypatch.setattr(
        nn,
        "_MNIST_FILES",
        {name: (len(c), hashlib.sha256(c).hexdigest()) for name, c in contents.items()},
    )
    return {name: gzip.compress(content, mtime=0) for name, content in contents.items()}


class Mirror(http.server.BaseHTTPRequestHandler):
    """A mirror that behaves as its server's `manner` says."""

    def do_GET(self):
        self.server.requests.append(self.path)
        folder, _, name = self.path.rpartition("/")
        content = self.server.files.get(name) if folder == "/mnist" else None
        manner = self.server.manner
        if manner == "good at first" and name.startswith("train"):
            manner = "not there"
        if manner == "never answers":
            self.server.closing.wait(30)
            return
        if content is None or manner == "not there":
            self.send_error(404)
            return
        if manner == "wrong bytes":
            content = gzip.compress(b"something else")
        if manner == "not even packed":
            content = b"<html>log in first</html>"
        if manner == "too long":
            content = content + bytes(100_000)
        self.send_response(200)
        if manner != "no length":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2 if manner == "breaks off" else None])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def mirror(fake_mnist):
    """A function that starts a mirror and gives its server."""
    servers = []

    def start(manner):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
        server.files, server.manner, server.requests = fake_mnist, manner, []
        server.closing = threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}/mnist"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.closing.set()
        server.shutdown()
        server.server_close()
    gc.collect()  # so that a connection left open is noticed here, and not in some later test


@pytest.fixture
def closed_port():
    """The address of a port on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    return f"http://127.0.0.1:{port}/mnist"


def test_download_fetches_verifies_and_reports(tmp_path, mirror, fake_mnist):
    seen = []
    folder = tmp_path / "data" / "mnist"
    nn.download_mnist(folder, [mirror("good").url], progress=lambda *call: seen.append(call))
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == fake_mnist
    assert seen == [(name, len(packed), len(packed)) for name, packed in fake_mnist.items()]
    assert nn.read_dataset(folder)["x_train"].shape == (6, 1, 4, 5)


def test_download_without_a_length_is_verified_all_the_same(tmp_path, mirror, fake_mnist):
    seen = []
    nn.download_mnist(tmp_path, [mirror("no length").url], progress=lambda *call: seen.append(call))
    assert sorted(os.listdir(tmp_path)) == sorted(fake_mnist)
    assert {total for _, _, total in seen} == {0}


BAD_MANNERS = [
    "breaks off",
    "wrong bytes",
    "not even packed",
    "too long",
    "not there",
    "never answers",
]


@pytest.mark.parametrize("manner", BAD_MANNERS)
def test_download_turns_to_another_mirror(tmp_path, mirror, fake_mnist, manner):
    bad, good = mirror(manner), mirror("good")
    nn.download_mnist(tmp_path, [bad.url, good.url], timeout=0.5)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == fake_mnist
    assert len(bad.requests) <= 1


def test_download_goes_on_at_another_mirror_in_the_middle(tmp_path, mirror, fake_mnist):
    fickle, good = mirror("good at first"), mirror("good")
    good.manner = "not there"
    asked = []

    def recover(name, done, total):
        asked.append(name)
        good.manner = "good"

    nn.download_mnist(tmp_path, [good.url, fickle.url], progress=recover)
    assert sorted(os.listdir(tmp_path)) == sorted(fake_mnist)
    assert asked == list(fake_mnist)


@pytest.mark.parametrize("manner", BAD_MANNERS)
def test_download_gives_up_in_time_and_leaves_nothing(tmp_path, mirror, closed_port, manner):
    started = time.monotonic()
    with pytest.raises(OSError, match="none of 2 mirrors answered within 0.4 s: .+"):
        nn.download_mnist(tmp_path / "new", [closed_port, mirror(manner).url], patience=0.4)
    assert time.monotonic() - started < 3  # a bound, not a speed: the server may sleep for 30 s
    assert os.listdir(tmp_path) == []


def test_download_that_fails_in_the_middle_keeps_whole_files_only(tmp_path, mirror):
    with pytest.raises(OSError, match="no mirror gives train-labels-idx1-ubyte.gz: .* 404"):
        nn.download_mnist(tmp_path, [mirror("good at first").url])
    assert os.listdir(tmp_path) == ["t10k-labels-idx1-ubyte.gz"]


def test_download_keeps_good_files_and_replaces_bad_ones(tmp_path, mirror, fake_mnist):
    good = mirror("good")
    kept, bad = "t10k-images-idx3-ubyte.gz", "train-images-idx3-ubyte.gz"
    (tmp_path / kept).write_bytes(fake_mnist[kept])
    (tmp_path / bad).write_bytes(fake_mnist[kept])
    nn.download_mnist(tmp_path, [good.url])
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == fake_mnist
    assert f"/mnist/{kept}" not in good.requests
    assert f"/mnist/{bad}" in good.requests


def test_download_asks_nobody_for_what_is_there(tmp_path, fake_mnist):
    for name, content in fake_mnist.items():
        (tmp_path / name).write_bytes(content)
    nn.download_mnist(tmp_path, [])
    (tmp_path / name).write_bytes(content[:-1])
    with pytest.raises(OSError, match="none of 0 mirrors answered"):
        nn.download_mnist(tmp_path, [])


def test_download_without_mirrors_says_so(tmp_path):
    with pytest.raises(OSError, match="none of 0 mirrors answered"):
        nn.download_mnist(tmp_path, [])


def test_the_digests_are_those_of_mnist():
    assert len(nn.MNIST_MIRRORS) >= 2
    files = {name: nn._MNIST_FILES[name] for name in sorted(nn._MNIST_FILES)}
    assert files == {
        "t10k-images-idx3-ubyte.gz": (
            7_840_016,
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        ),
        "t10k-labels-idx1-ubyte.gz": (
            10_008,
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        "train-images-idx3-ubyte.gz": (
            47_040_016,
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        ),
        "train-labels-idx1-ubyte.gz": (
            60_008,
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        ),
    }


# ------------------------------------------------------------------------------------------------
# Files, the finer points: save and load
# ------------------------------------------------------------------------------------------------

BIT_PATTERN_TYPES = ["u1", "<i2", ">i2", "<u4", ">i8", "<f2", ">f2", "<f4", ">f4", "<f8", ">f8"]


@st.composite
def arrays_of_any_bits(draw):
    """Arrays of random bits: nan with payloads, infinities, -0.0 and subnormals among them."""
    kind = np.dtype(draw(st.sampled_from(BIT_PATTERN_TYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=4)))
    size = math.prod(shape) * kind.itemsize
    array = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), kind).reshape(shape)
    return np.asfortranarray(array) if draw(st.booleans()) else array


@settings(max_examples=60, deadline=None, derandomize=True)
@given(array=arrays_of_any_bits())
def test_every_bit_of_an_array_is_kept(tmp_path_factory, array):
    path = tmp_path_factory.mktemp("bits") / "x.npz"
    nn.save(path, {"outer": {"inner": array}})
    loaded = nn.load(path)["outer"]["inner"]
    assert (loaded.dtype, loaded.shape) == (array.dtype.newbyteorder("="), array.shape)
    assert loaded.astype(array.dtype).tobytes() == array.tobytes()


def test_saved_bytes_depend_on_no_clock_and_are_not_compressed(tmp_path):
    nn.save(tmp_path / "x", {"b": np.zeros(1000), "a": np.ones(2)})
    with zipfile.ZipFile(tmp_path / "x") as archive:
        members = archive.infolist()
    assert [member.filename for member in members] == ["b.npy", "a.npy"]
    assert {member.date_time for member in members} == {(1980, 1, 1, 0, 0, 0)}
    assert {member.compress_type for member in members} == {zipfile.ZIP_STORED}


class FullDisk(io.FileIO):
    """A file on a disk that has `room` for so many bytes."""

    room = 0

    def write(self, content):
        if self.tell() + len(content) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(content)


@pytest.mark.parametrize("room", [0, 30, 200, 500])
def test_a_disk_that_fills_up_anywhere_costs_no_old_file(tmp_path, monkeypatch, room):
    path = tmp_path / "model.npz"
    nn.save(path, {"a": np.ones(100)})
    before = path.read_bytes()
    assert room < len(before)
    with monkeypatch.context() as patch:
        patch.setattr(FullDisk, "room", room)
        patch.setattr(nn, "open", FullDisk, raising=False)
        with pytest.raises(OSError, match="No space left") as caught:
            nn.save(path, {"a": np.zeros(100)})
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.npz"]


def test_an_interrupted_save_leaves_nothing_half_written(tmp_path, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        nn.save(tmp_path / "x", {"a": np.ones(2)})
    assert os.listdir(tmp_path) == []


def test_save_where_no_file_can_be_leaves_nothing_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        nn.save(tmp_path / "folder", {"a": np.ones(2)})
    with pytest.raises(FileNotFoundError):
        nn.save(tmp_path / "nowhere" / "x", {"a": np.ones(2)})
    assert os.listdir(tmp_path) == ["folder"]


def test_a_name_with_a_nul_survives_or_is_refused_when_saved(tmp_path):
    try:
        nn.save(tmp_path / "x", {"a\0b": np.ones(2)})
    except (TypeError, ValueError):
        return
    assert list(nn.load(tmp_path / "x")) == ["a\0b"]


def npy_of_header(header, content=b"", version=1):
    """A .npy file with exactly this header."""
    start = b"\x93NUMPY" + bytes([version, 0])
    return start + struct.pack("<H" if version == 1 else "<I", len(header)) + header + content


def header_of(shape, kind="'<f8'", order="False"):
    return f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()


def zip_of(path, content, name="a.npy", method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, content)
    return path


EIGHT = b"\0" * 8
ODD_HEADERS = {
    "a shape of bool": header_of("(True,)"),
    "two unknown sizes": header_of("(-1, -1)"),
    "minus one alone": header_of("(-1,)"),
    "more axes than numpy has": header_of("(" + "1," * 65 + ")"),
    "a list for a shape": header_of("[1]"),
    "a float for a size": header_of("(1.0,)"),
    "an order that is no bool": header_of("(1,)", order="1"),
    "objects": header_of("(1,)", kind="'|O'"),
    "fields": header_of("(1,)", kind="[('a', '<f8')]"),
    "dates": header_of("(1,)", kind="'<M8[s]'"),
    "no bytes an item": header_of("(1,)", kind="'|V0'"),
    "brackets without end": b"(" * 500,
    "code": b"__import__('os').mkdir('trapped')\n",
    "no dict": b"()\n",
    "an entry missing": b"{'descr': '<f8', 'shape': (1,)}\n",
    "nothing": b"",
    "signs without end": b"~" * 9_999,
    "commas without end": b"," * 9_999,
    "digits without end": b"9" * 9_999,
    "spaces without end": header_of("(1,)").rjust(60_000),
    "a size of a thousand digits": header_of(f"({'9' * 1000},)"),
    "a size too long to convert": header_of(f"({'9' * 9000},)"),
    "an unknown kind of number": header_of("(1,)", kind="'<f3'"),
    "no tuple": header_of("(1)"),
}


@pytest.mark.parametrize("name", ODD_HEADERS)
def test_load_refuses_odd_headers(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zip_of("odd.npz", npy_of_header(ODD_HEADERS[name], EIGHT))
    with pytest.raises(ValueError, match=r"^odd\.npz: cannot be read: .+"):
        nn.load("odd.npz")
    assert os.listdir() == ["odd.npz"]


def test_odd_headers_take_no_memory(tmp_path):
    paths = [
        zip_of(tmp_path / f"{version}.{number}", npy_of_header(header, EIGHT, version))
        for version in (1, 2)
        for number, header in enumerate(ODD_HEADERS.values())
    ]

    def refuse():
        for path in paths:
            with pytest.raises(ValueError, match="cannot be read"):
                nn.load(path)

    assert peak_memory(refuse) < 1_000_000


HEADER_PARTS = [
    *("{", "'descr': ", "'<f8'", "'|u1'", "'>i2'", "'|O'", ", ", "'fortran_order': ", "True"),
    *("False", "'shape': ", "(", "1", "4", "0", ",", "L", "-", ")", "}", "\n", " ", "\\d", "é"),
]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["'<f8'", "'|u1'", "'>i2'", "'|b1'", "'<f2'", "'<U2'", "'=f4'"]),
    order=st.sampled_from(["True", "False"]),
    shape=st.sampled_from(["()", "(1,)", "(4,)", "(2, 2)", "(2,2)", "(2,1,)", "(0, 9)", "(1)"]),
    at=st.integers(0, 70),
    length=st.integers(0, 3),
    parts=st.lists(st.sampled_from(HEADER_PARTS), max_size=2),
    content=st.binary(max_size=8),
)
def test_a_header_means_what_numpy_takes_it_for_or_is_refused(
    tmp_path_factory, kind, order, shape, at, length, parts, content
):
    header = header_of(shape, kind, order).decode()
    header = (header[:at] + "".join(parts) + header[at + length :]).encode("latin-1")
    path = zip_of(tmp_path_factory.mktemp("header") / "x", npy_of_header(header, content))
    message = ""
    try:
        read = nn.load(path)["a"]
    except ValueError as error:
        message = str(error)
    else:
        with np.load(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of "1L"
            expected = archive["a"]
        assert (read.shape, read.dtype) == (expected.shape, expected.dtype.newbyteorder("="))
        assert read.astype(expected.dtype).tobytes("A") == expected.tobytes("A")
    assert message.startswith(f"{path}: cannot be read: ") or not message


@pytest.mark.parametrize("claim", [1, 2**16 - 70])
def test_load_refuses_a_header_shorter_than_it_says(tmp_path, claim):
    header = header_of("(0,)")
    content = npy_of_header(header).replace(
        struct.pack("<H", len(header)), struct.pack("<H", len(header) + claim)
    )
    with pytest.raises(ValueError, match="its header is not that of an array of numbers"):
        nn.load(zip_of(tmp_path / "x", content))


def test_load_reads_what_python_2_wrote(tmp_path):
    path = zip_of(tmp_path / "x", npy_of_header(header_of("(2L, 3L)"), bytes(48)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert nn.load(path)["a"].shape == (2, 3)


def test_load_reads_a_long_header(tmp_path):
    header = header_of("(1,)").ljust(1_000)
    assert nn.load(zip_of(tmp_path / "x", npy_of_header(header, bytes(8))))["a"] == 0


def test_load_reads_both_versions_of_the_header_and_both_orders(tmp_path):
    content = np.arange(6.0).tobytes()
    for version in (1, 2):
        path = zip_of(tmp_path / "x", npy_of_header(header_of("(2, 3)"), content, version))
        np.testing.assert_array_equal(nn.load(path)["a"], [[0, 1, 2], [3, 4, 5]])
        header = header_of("(2, 3)", order="True")
        path = zip_of(tmp_path / "x", npy_of_header(header, content, version))
        np.testing.assert_array_equal(nn.load(path)["a"], [[0, 2, 4], [1, 3, 5]])


def test_what_a_file_does_wrong_is_said_exactly(tmp_path):
    path = zip_of(tmp_path / "x", npy_of_header(header_of("(3,)"), EIGHT))
    size = len(npy_of_header(header_of("(3,)"), EIGHT))
    message = (
        f"{path}: cannot be read: an array of float64 and shape (3,) does not fit in {size} bytes"
    )
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        nn.load(path)
    assert str(caught.value) == message
    zip_of(
        path, npy_of_header(header_of("(1,)"), EIGHT, version=2).replace(b"\x02\0", b"\x03\0", 1)
    )
    with pytest.raises(ValueError, match=r"unknown version \(3, 0\) of the \.npy format"):
        nn.load(path)
    zip_of(path, npy_of_header(header_of("(1,)"), EIGHT), name="a.txt")
    with pytest.raises(ValueError, match=r"unexpected member 'a\.txt'"):
        nn.load(path)


def test_an_error_without_words_is_named():
    with pytest.raises(ValueError, match="^x: cannot be read: MemoryError$"), nn._blaming("x"):
        raise MemoryError


def test_missing_files_and_rights_and_interrupts_pass_unchanged():
    with pytest.raises(ValueError, match="^x: cannot be read: some words$"), nn._blaming("x"):
        raise OSError("some words")
    for passing in (FileNotFoundError, PermissionError):
        with pytest.raises(passing), nn._blaming("x"):
            raise passing
    with pytest.raises(KeyboardInterrupt), nn._blaming("x"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", list("cdefghij"))
def test_a_list_of_contents_that_was_changed_is_noticed(name, tmp_path):
    nn.save(tmp_path / "x", {"a": np.ones(2), "b": np.ones(2)})
    content, new = (tmp_path / "x").read_bytes(), f"{name}.npy".encode()
    directory = content.index(b"PK\x01\x02")
    changed = content[directory:].replace(b"a.npy", new, 1)
    # The name stands before the data as well, and zipfile compares the two.
    start = content[:directory].replace(b"a.npy", new, 1)
    (tmp_path / "x").write_bytes(start + changed)
    with pytest.raises(ValueError, match="its list of contents is damaged"):
        nn.load(tmp_path / "x")


@pytest.mark.parametrize(("read", "ratio"), [(nn.load, 1), (nn.read_dataset, 200)])
def test_a_file_may_claim_what_it_could_hold_and_not_a_byte_more(tmp_path, read, ratio):
    member = npy_of_header(header_of("(1000000,)", kind="'|u1'").rjust(64), bytes(1_000_000))
    member = member + bytes(-len(member) % ratio)  # a multiple of ratio; refused later, for that
    zip_of(tmp_path / "small", member, method=zipfile.ZIP_DEFLATED)
    small = (tmp_path / "small").read_bytes()
    path = tmp_path / "x"
    padding = len(member) // ratio - len(small)
    assert padding > 0
    path.write_bytes(bytes(padding) + small)  # a zip file may have anything before its start
    with contextlib.suppress(ValueError):
        read(path)
    assert not refused_for_its_claim(read, path)
    path.write_bytes(bytes(padding - 1) + small)
    assert refused_for_its_claim(read, path)


def refused_for_its_claim(read, path):
    try:
        read(path)
    except ValueError as error:
        return "it claims to hold more than it can" in str(error)
    return False


def test_a_member_that_unpacks_to_more_than_its_list_says_takes_no_memory(tmp_path):
    honest = npy_of_header(header_of("(1000,)"), np.random.default_rng(0).bytes(8000))
    bomb = honest + bytes(30_000_000)
    path = zip_of(tmp_path / "bomb.npz", bomb, method=zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    for true, told in ((len(bomb), len(honest)), (zlib.crc32(bomb), zlib.crc32(honest))):
        content = content.replace(struct.pack("<I", true), struct.pack("<I", told))
    path.write_bytes(content)

    def read():
        with contextlib.suppress(ValueError):
            nn.load(path)

    assert peak_memory(read) < 2_000_000


def test_a_claim_of_ten_gigabytes_takes_no_memory(tmp_path):
    kind = "'<f8'"
    path = zip_of(tmp_path / "x", npy_of_header(header_of("(1250000000,)", kind), EIGHT))
    headers = npy_of_header(header_of("(1,)"), EIGHT, version=2).replace(
        struct.pack("<I", len(header_of("(1,)"))), struct.pack("<I", 2**32 - 1)
    )
    long_header = zip_of(tmp_path / "y", headers)

    def read():
        for file in (path, long_header):
            with pytest.raises(ValueError, match="cannot be read"):
                nn.load(file)

    assert peak_memory(read) < 1_000_000


# ------------------------------------------------------------------------------------------------
# Files, the finer points: IDX and data sets
# ------------------------------------------------------------------------------------------------


def idx_file(array, code=0x08):
    """The bytes of an IDX file of unsigned bytes."""
    return struct.pack(f">4B{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.tobytes()


def said_of(read, path):
    """What `read` says of a file it refuses, without the beginning that is always the same."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read(path)
    beginning = f"{path}: cannot be read: "
    assert str(caught.value).startswith(beginning)
    return str(caught.value)[len(beginning) :]


def test_read_idx_says_what_is_wrong(tmp_path):
    path, whole = tmp_path / "x", idx_file(np.arange(6, dtype=np.uint8).reshape(2, 3))
    path.write_bytes(whole[:-1])
    assert said_of(nn.read_idx, path) == "shape (2, 3) needs 6 bytes, but it has 5 or more"
    path.write_bytes(whole + b"x")
    assert said_of(nn.read_idx, path) == "shape (2, 3) needs 6 bytes, but it has 7 or more"
    path.write_bytes(gzip.compress(whole[:-2]))
    assert said_of(nn.read_idx, path) == "shape (2, 3) needs 6 bytes, but it has 4 or more"
    magics = [b"\1\0\x08\1", b"\0\1\x08\1", b"\0\0\x0a\1", b"\0\0\x08", b"", b"\xff\xd8\xff\xe0"]
    for magic in magics:
        path.write_bytes(magic)
        assert said_of(nn.read_idx, path) == "it does not start as an IDX file does"
    path.write_bytes(b"\0\0\x08\3" + bytes(8))  # three axes, but sizes of two alone
    assert said_of(nn.read_idx, path) == "an array of shape (0, 0) does not fit in it"
    path.write_bytes(b"\0\0\x08\3" + bytes(9))  # ... and a bit
    assert said_of(nn.read_idx, path)


@pytest.mark.parametrize(
    ("pack", "content", "limit"),
    [
        (bytes, b"12", 10),
        (partial(gzip.compress, mtime=0), b"12", 1 << 20),
        (partial(gzip.compress, compresslevel=0, mtime=0), bytes(9_969), 200 * 10_000),
    ],
)
def test_read_idx_believes_no_claim_that_its_size_cannot_justify(tmp_path, pack, content, limit):
    path = tmp_path / "x"

    def said_of_claim(size):
        path.write_bytes(pack(struct.pack(">4BI", 0, 0, 8, 1, size) + content))
        return said_of(nn.read_idx, path)

    has = f"needs {limit} bytes, but it has {len(content)} or more"
    assert said_of_claim(limit) == f"shape ({limit},) {has}"
    assert said_of_claim(limit + 1) == f"an array of shape ({limit + 1},) does not fit in it"
    numbers = limit // 8 + 1
    path.write_bytes(pack(struct.pack(">4BI", 0, 0, 14, 1, numbers) + content))
    assert said_of(nn.read_idx, path) == f"an array of shape ({numbers},) does not fit in it"


def test_a_packed_idx_file_takes_no_more_memory_than_it_has_data(tmp_path):
    path = tmp_path / "x"
    for size in (30_000_000, 10_000_000):  # a bomb, and a claim that 100 kB might justify
        content = np.random.default_rng(0).bytes(100_000) if size < 20_000_000 else bytes(size)
        path.write_bytes(gzip.compress(struct.pack(">4BI", 0, 0, 8, 1, size) + content))
        assert peak_memory(lambda: said_of(nn.read_idx, path)) < 3_000_000
    path.write_bytes(gzip.compress(struct.pack(">4BI", 0, 0, 8, 1, 10) + bytes(30_000_000)))
    assert peak_memory(lambda: said_of(nn.read_idx, path)) < 3_000_000  # of ten bytes, it says


def test_labels_in_order_are_read_however_tightly_they_are_packed(tmp_path):
    labels = np.repeat(np.arange(10, dtype=np.uint8), 6_000)
    (tmp_path / "x").write_bytes(gzip.compress(idx_file(labels)))
    assert (tmp_path / "x").stat().st_size < len(labels) / 500
    np.testing.assert_array_equal(nn.read_idx(tmp_path / "x"), labels)


def test_a_gzip_file_of_several_members_is_read_as_one(tmp_path):
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    content = idx_file(array)
    pieces = [content[:3], b"", content[3:9], b"", b"", content[9:]]
    (tmp_path / "x").write_bytes(b"".join(map(gzip.compress, pieces)) + bytes(9))
    np.testing.assert_array_equal(nn.read_idx(tmp_path / "x"), array)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    code=st.sampled_from([7, *IDX_CODES.values()]),
    axes=st.integers(0, 3) | st.just(255),
    sizes=st.lists(st.integers(0, 4) | st.sampled_from([2**16, 2**31, 2**32 - 1]), max_size=4),
    content=st.binary(max_size=40),
    packed=st.booleans(),
)
def test_an_idx_file_holds_what_it_says_or_is_refused(
    tmp_path_factory, code, axes, sizes, content, packed
):
    path = tmp_path_factory.mktemp("idx") / "x"
    whole = struct.pack(f">4B{len(sizes)}I", 0, 0, code, axes, *sizes) + content
    path.write_bytes(gzip.compress(whole) if packed else whole)
    message = ""
    try:
        read = nn.read_idx(path)
    except ValueError as error:
        message = str(error)
    else:
        kind = next(kind for kind, number in IDX_CODES.items() if number == code)
        assert read.dtype == np.dtype(kind).newbyteorder("=")
        header = struct.pack(f">4B{axes}I", 0, 0, code, axes, *read.shape)
        assert header + read.astype(kind).tobytes() == whole
    assert message.startswith(f"{path}: cannot be read: ") or not message


def test_an_idx_file_without_axes_holds_one_number(tmp_path):
    (tmp_path / "x").write_bytes(b"\0\0\x08\0\7")
    read = nn.read_idx(tmp_path / "x")
    assert (read.shape, read.dtype, int(read)) == ((), np.uint8, 7)


def test_a_packed_idx_file_with_any_bit_flipped_is_refused_or_right(tmp_path):
    path, array = tmp_path / "x", np.arange(6, dtype=np.uint8).reshape(2, 3)
    whole, refused = gzip.compress(idx_file(array), mtime=0), 0
    for position in range(len(whole) * 8):
        broken = bytearray(whole)
        broken[position // 8] ^= 1 << position % 8
        path.write_bytes(broken)
        message = ""
        try:
            read = nn.read_idx(path)
        except ValueError as error:
            message = str(error)
            refused += 1
        else:
            np.testing.assert_array_equal(read, array)
        assert message.startswith(f"{path}: cannot be read: ") or not message
    assert refused > len(whole) * 8 - 100  # time, system and flags of gzip's header are ignored


def four_parts(shape=(4, 5), kind=np.uint8):
    """Images and labels as they could be in a file, with 0 and 255 among the pixels."""
    images = np.arange(6 * math.prod(shape)).reshape(6, *shape) % 256
    images.flat[0], images.flat[1] = 0, 255
    labels = np.array([0, 1, 2, 3, 4, 5])
    return {
        "x_train": images.astype(kind),
        "y_train": labels,
        "x_test": images[:4][::-1].astype(kind),
        "y_test": labels[:4],
    }


def data_of(tmp_path, **changed):
    np.savez(tmp_path / "data.npz", **{**four_parts(), **changed})
    return nn.read_dataset(tmp_path / "data.npz")


@pytest.mark.usefixtures("no_warnings")
def test_pixels_too_large_for_float32_are_refused_without_a_warning(tmp_path):
    with pytest.raises(ValueError, match="images must be finite"):
        data_of(tmp_path, x_train=np.full((6, 4, 5), 1e300))


FOLDER_NAMES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


def write_folder(folder, pack=bytes, ending=""):
    for part, array in four_parts().items():
        content = pack(idx_file(array.astype(np.uint8)))
        (folder / (FOLDER_NAMES[part] + ending)).write_bytes(content)


def test_a_plain_file_is_preferred_to_a_packed_one(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    assert nn.read_dataset(tmp_path)["y_train"].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("part", FOLDER_NAMES)
def test_a_damaged_part_of_a_folder_is_blamed_by_its_own_path(tmp_path, part):
    write_folder(tmp_path, gzip.compress, ".gz")
    path = tmp_path / (FOLDER_NAMES[part] + ".gz")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"^{path}: cannot be read: "):
        nn.read_dataset(tmp_path)


def test_a_damaged_archive_in_a_folder_is_blamed_by_its_own_path(tmp_path):
    (tmp_path / "mine.npz").write_bytes(b"not a zip file")
    with pytest.raises(ValueError, match=f"^{tmp_path}/mine.npz: cannot be read: "):
        nn.read_dataset(tmp_path)


@pytest.mark.parametrize("kind", ["u1", "i2", ">i4", "i8"])
def test_whole_pixels_are_divided_by_255_exactly(tmp_path, kind):
    parts = four_parts(kind=kind)
    data = data_of(tmp_path, **parts)
    expected = parts["x_train"].astype(np.float32)[:, None] / np.float32(255)
    assert (data["x_train"].tobytes(), data["x_train"].dtype) == (expected.tobytes(), np.float32)
    assert (data["x_train"].min(), data["x_train"].max()) == (0, 1)


@pytest.mark.parametrize("kind", ["<f2", ">f4", "<f8"])
def test_float_pixels_stay_as_they_are(tmp_path, kind):
    images = (np.arange(6 * 20).reshape(6, 4, 5) / 64 - 1).astype(kind)  # exact, also below zero
    data = data_of(tmp_path, x_train=images, x_test=images[:4])
    np.testing.assert_array_equal(data["x_train"], images[:, None].astype(np.float32))
    assert data["x_train"].dtype == np.float32


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        ((3, 5), (1, 3, 5)),
        ((1, 1), (1, 1, 1)),
        ((4, 5, 1), (1, 4, 5)),
        ((4, 5, 3), (3, 4, 5)),
        ((1, 4, 5), (1, 4, 5)),
        ((3, 4, 5), (3, 4, 5)),
        ((3, 4, 3), (3, 4, 3)),
        ((1, 4, 3), (1, 4, 3)),
        ((2, 4, 5), (2, 4, 5)),
        ((64, 64), (1, 64, 64)),
    ],
)
def test_channels_are_found_in_any_shape(tmp_path, stored, read):
    parts = four_parts(stored)
    data = data_of(tmp_path, **parts)
    images = parts["x_test"].astype(np.float32) / np.float32(255)
    if stored in ((4, 5, 1), (4, 5, 3)):
        images = images.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(data["x_test"], images.reshape(4, *read))
    assert data["x_train"].shape == (6, *read)
    assert data["x_train"].flags.c_contiguous


@pytest.mark.parametrize("classes", [1, 2, 6, 1000])
def test_any_number_of_classes_is_taken(tmp_path, classes):
    labels = np.array([0, 0, 0, 0, 0, classes - 1])
    data = data_of(tmp_path, y_train=labels[:, None], y_test=labels[2:, None])
    assert data["y_train"].tolist() == labels.tolist()
    assert data["y_test"].tolist() == labels[2:].tolist()
    assert data["y_test"].dtype == np.int64
    with pytest.raises(ValueError, match=f"y_test: labels must be from 0 to {classes - 1}"):
        data_of(tmp_path, y_train=labels, y_test=labels[2:] + 1)


@pytest.mark.parametrize("missing", FOLDER_NAMES)
def test_each_part_of_a_data_set_is_needed(tmp_path, missing):
    parts = four_parts()
    del parts[missing]
    np.savez(tmp_path / "data.npz", **parts)
    assert "expected ['x_train', 'y_train', 'x_test', 'y_test'], found" in said_of(
        nn.read_dataset, tmp_path / "data.npz"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"x_test": np.zeros((4, 4, 5, 3), np.uint8)},
        {"x_train": np.zeros((6, 0, 5), np.uint8)},
        {"x_train": np.zeros(6, np.uint8)},
        {"x_train": np.zeros((6, 1, 1, 4, 5), np.uint8)},
        {"x_train": np.full((6, 4, 5), np.inf)},
        {"y_train": np.zeros((0,), np.int64)},
        {"y_train": np.zeros((6, 3), np.int64)},
        {"y_train": np.zeros(6, bool)},
        {"y_test": np.zeros(5, np.int64)},
        {"y_test": np.full(4, -1)},
    ],
)
def test_a_part_that_does_not_fit_is_refused_with_the_path(tmp_path, change):
    np.savez(tmp_path / "data.npz", **{**four_parts(), **change})
    assert said_of(nn.read_dataset, tmp_path / "data.npz")


def test_a_data_set_that_is_cut_off_or_has_a_bit_flipped_is_refused_or_right(tmp_path):
    parts, path = four_parts((2, 2)), tmp_path / "data.npz"
    np.savez_compressed(path, **parts)
    whole, expected = path.read_bytes(), all_bytes(nn.read_dataset(path))
    broken = [whole[:length] for length in range(0, len(whole), 7)]
    for bit in range(0, len(whole) * 8, 13):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        broken.append(flipped)
    refused = 0
    for content in broken:
        path.write_bytes(content)
        message = ""
        try:
            data = nn.read_dataset(path)
        except ValueError as error:
            message = str(error)
            refused += 1
        else:
            assert all_bytes(data) == expected
        assert message.startswith(f"{path}: cannot be read: ") or not message
    assert refused > len(broken) / 2


def test_pixels_beyond_float32_are_refused_without_a_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"cannot be read: images must be finite$"):
            data_of(tmp_path, x_train=np.full((6, 4, 5), 1e300))


def test_labels_in_a_table_are_refused(tmp_path):
    with pytest.raises(ValueError, match="labels must have shape"):
        data_of(tmp_path, y_train=np.zeros((2, 3), np.int64))
    with pytest.raises(ValueError, match="labels must have shape"):
        data_of(tmp_path, y_train=np.zeros((6, 2), np.int64))


def test_labels_beyond_int64_are_refused(tmp_path):
    with pytest.raises(ValueError, match="labels must be"):
        data_of(tmp_path, y_train=np.full(6, 2**64 - 1, np.uint64))
    with pytest.raises(ValueError, match="labels must be from 0 to 2147483647"):
        data_of(tmp_path, y_train=np.full(6, 2**31, np.int64))


# ------------------------------------------------------------------------------------------------
# Drawn digits, the finer points
# ------------------------------------------------------------------------------------------------


def test_every_stroke_of_every_numeral_lies_in_its_box():
    numerals = nn._numerals()
    assert [len(ways) for ways in numerals] == [1, 3, 2, 2, 2, 2, 1, 2, 1, 2]
    for ways in numerals:
        for strokes in ways:
            points = np.concatenate(strokes)
            assert ((points >= 0.04) & (points <= 0.99)).all()
            assert np.ptp(points[:, 1]) > 0.8  # each is nearly as high as the box
            assert all(len(stroke) >= 2 for stroke in strokes)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(ends=st.lists(st.floats(-1, 1, width=32), min_size=8, max_size=8), size=st.integers(2, 9))
def test_distances_are_those_to_the_nearest_point_of_a_segment(ends, size):
    segments = np.array(ends, np.float32).reshape(1, 2, 4)
    centres = (np.arange(size) + 0.5) * 2 / size - 1
    walk = np.linspace(0, 1, 801)[:, None]
    points = np.concatenate([s[:2] * (1 - walk) + s[2:] * walk for s in segments[0].astype(float)])
    away = np.hypot(
        centres[None, :, None] - points[:, 0], centres[:, None, None] - points[:, 1]
    ).min(axis=2)
    np.testing.assert_allclose(nn._distances(segments, size)[0], away, atol=3e-3)


def test_bent_strokes_stay_in_one_piece_and_upright():
    stroke = np.array([[0.5, 0.05], [0.4, 0.3], [0.6, 0.6], [0.5, 0.95]])
    segments = nn._pen_positions([stroke], np.random.default_rng(0), 500)
    assert (segments.shape, segments.dtype) == ((500, 3, 4), np.float32)
    np.testing.assert_array_equal(segments[:, :-1, 2:], segments[:, 1:, :2])
    height = segments[:, -1, 3] - segments[:, 0, 1]
    assert 0.85 < height.min() < 1.1  # the lowest: 0.6 times 1.8, turned and swollen
    assert 1.45 < height.max() < 1.8
    middle = (segments[:, 0, :2] + segments[:, -1, 2:]) / 2
    assert np.abs(middle.mean(axis=0)).max() < 0.05
    assert np.abs(middle).max() < 0.5


def test_drawn_digits_are_bright_on_dark_and_every_one_differs():
    images, labels = nn.draw_digits((3, 1), 1_000, 20)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
    shares = np.bincount(labels, minlength=10) / len(labels)
    assert (shares > 0.07).all()
    assert len({image.tobytes() for image in images}) == len(images)
    brightest, border = images.max(axis=(1, 2)), images[:, 0]
    assert 90 < brightest.min() < 150  # ink from 0.6 on, less where a stroke is thin
    assert (brightest == 255).mean() > 0.15  # up to 1, or noise on top
    assert border.mean() < 12
    assert 30 < images.mean() < 70
    for digit in range(10):  # each numeral looks like itself on average, not like all of them
        average = images[labels == digit].mean(axis=0)
        assert np.corrcoef(average.ravel(), images.mean(axis=0).ravel())[0, 1] < 0.98


def test_drawn_digits_refuse_impossible_sizes():
    assert nn.draw_digits(0, 1, 8)[0].shape == (1, 8, 8)
    with pytest.raises(ValueError, match="draw_digits: size must be at least 8, got 7"):
        nn.draw_digits(0, 1, 7)
    with pytest.raises(ValueError, match="draw_digits: count must be at least 1, got 0"):
        nn.draw_digits(0, 0)
    with pytest.raises(TypeError, match="draw_digits: count must be a whole number, got float"):
        nn.draw_digits(0, 1.5)
    assert nn.draw_digits(0, 1)[0].shape == (1, 28, 28)


# ------------------------------------------------------------------------------------------------
# The download, the finer points, from servers on loopback
# ------------------------------------------------------------------------------------------------

LARGE = np.random.default_rng(0).bytes(200_000)  # takes gzip nothing off: several pieces to read


@pytest.fixture
def two_files(monkeypatch):
    """{name: packed}: a small and a large file in the place of MNIST's four."""
    contents = {"small.gz": b"small" * 20, "large.gz": LARGE}
    files = {name: (len(c), hashlib.sha256(c).hexdigest()) for name, c in contents.items()}
    monkeypatch.setattr(nn, "_MNIST_FILES", files)
    return {name: gzip.compress(content, mtime=0) for name, content in contents.items()}


class RawServer:
    """A server on loopback that sends whatever `answer(name)` yields and then hangs up.

    Written on bare sockets because most of what is tested here no proper server would do.
    """

    def __init__(self, answer):
        self.answer, self.asked, self.ending = answer, [], threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(0.02)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.threads = [threading.Thread(target=self.serve)]
        self.threads[0].start()

    def serve(self):
        while not self.ending.is_set():
            with contextlib.suppress(TimeoutError):
                connection = self.listener.accept()[0]
                self.threads.append(threading.Thread(target=self.talk, args=(connection,)))
                self.threads[-1].start()

    def talk(self, connection):
        with connection, contextlib.suppress(OSError):  # a client may hang up at any time
            connection.settimeout(5)
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(4096)
            name = request.split()[1].decode().lstrip("/")
            self.asked.append(name)
            for piece in self.answer(name):
                if self.ending.is_set():
                    return
                connection.sendall(piece)

    def close(self):
        self.ending.set()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()
        self.listener.close()


@pytest.fixture
def serve():
    """A function that starts a RawServer; all of them are closed in the end."""
    servers = []

    def start(answer):
        servers.append(RawServer(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def response(content, length=None):
    length = len(content) if length is None else length
    return b"HTTP/1.0 200 OK\r\nContent-Length: %s\r\n\r\n" % str(length).encode() + content


def files_in(folder):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


def test_progress_grows_piece_by_piece_to_the_whole(tmp_path, serve, two_files):
    seen = []
    server = serve(lambda name: [response(two_files[name])])
    nn.download_mnist(tmp_path, [server.url], progress=lambda *call: seen.append(call))
    assert files_in(tmp_path) == two_files
    size = len(two_files["large.gz"])
    assert seen[0] == ("small.gz", len(two_files["small.gz"]), len(two_files["small.gz"]))
    pieces = [done for name, done, total in seen[1:] if (name, total) == ("large.gz", size)]
    assert len(pieces) == len(seen) - 1 > 1
    assert sorted(set(pieces)) == pieces
    assert pieces[-1] == size
    assert server.asked == ["small.gz", "small.gz", "large.gz"]  # the first is to see who answers


STRANGE_ANSWERS = {
    "hangs up at once": [],
    "no http": [b"220 ready\r\n"],
    "a length that is no number": [b"HTTP/1.0 200 OK\r\nContent-Length: many\r\n\r\n"],
    "a chunk cut off": [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc"],
    "an empty file": [response(b"")],
    "a redirection to a file": [b"HTTP/1.0 302 Found\r\nLocation: file:///etc/hostname\r\n\r\n"],
    "a redirection to itself": [b"HTTP/1.0 302 Found\r\nLocation: /small.gz\r\n\r\n"],
    "a server error": [b"HTTP/1.0 503 Busy\r\n\r\n"],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", STRANGE_ANSWERS)
def test_strange_answers_are_errors_and_nothing_else(tmp_path, serve, two_files, name):
    bad = serve(lambda file: STRANGE_ANSWERS[name])
    with pytest.raises(OSError, match=r"^none of 1 mirrors answered within 5 s: .+"):
        nn.download_mnist(tmp_path / "new", [bad.url], patience=5)
    assert os.listdir(tmp_path) == []
    good = serve(lambda file: [response(two_files[file])])
    nn.download_mnist(tmp_path / "new", [bad.url, good.url], patience=5)
    assert files_in(tmp_path / "new") == two_files


def test_the_first_to_answer_is_asked_for_everything(tmp_path, serve, two_files):
    released = threading.Event()

    def slow(name):
        released.wait(5)
        yield response(two_files[name])

    late, quick = serve(slow), serve(lambda name: [response(two_files[name])])
    nn.download_mnist(tmp_path, [late.url, quick.url], patience=5)
    released.set()
    assert quick.asked == ["small.gz", "small.gz", "large.gz"]
    assert late.asked in ([], ["small.gz"])
    assert files_in(tmp_path) == two_files


def test_silent_mirrors_are_all_asked_at_once(tmp_path, serve, two_files, monkeypatch):
    released, started_threads = threading.Event(), []

    def silent(name):
        released.wait(10)
        return []

    servers = [serve(silent) for _ in range(4)]
    start = threading.Thread.start
    monkeypatch.setattr(
        threading.Thread, "start", lambda thread: (started_threads.append(thread), start(thread))
    )
    started = time.monotonic()
    with pytest.raises(OSError, match=r"^none of 4 mirrors answered within 0\.5 s: "):
        nn.download_mnist(tmp_path, [server.url for server in servers], patience=0.5)
    seconds = time.monotonic() - started
    released.set()
    assert 0.4 < seconds < 1.4  # one after the other would take two seconds
    asking = [thread for thread in started_threads if "(ask)" in thread.name]
    assert len(asking) == 4
    assert all(thread.daemon for thread in asking)  # none keeps the program from ending
    assert [server.asked for server in servers] == [["small.gz"]] * 4


def test_the_rest_is_asked_of_every_mirror_once(tmp_path, serve, two_files):
    def small_only(name):
        return [response(two_files[name] if name == "small.gz" else b"not this one")]

    servers = [serve(small_only), serve(small_only)]
    with pytest.raises(OSError, match=r"^no mirror gives large\.gz: ") as caught:
        nn.download_mnist(tmp_path, [server.url for server in servers], patience=5)
    assert sorted(server.asked.count("large.gz") for server in servers) == [1, 1]
    for server in servers:
        assert str(caught.value).count(f"{server.url}: large.gz is damaged: ") == 1
    assert "; " in str(caught.value)
    assert files_in(tmp_path) == {"small.gz": two_files["small.gz"]}


def test_patience_is_for_the_first_answer_and_the_timeout_for_the_rest(
    tmp_path, monkeypatch, two_files
):
    calls = []

    def fetch(mirror, name, timeout, progress=None):
        calls.append((mirror, name, timeout, progress))
        return two_files[name]

    monkeypatch.setattr(nn, "_fetch", fetch)
    nn.download_mnist(tmp_path, ["m"], 7.5, 3.5, print)
    nn.download_mnist(tmp_path / "default", ["m"])
    assert calls == [
        ("m", "small.gz", 7.5, None),
        ("m", "small.gz", 3.5, print),
        ("m", "large.gz", 3.5, print),
        ("m", "small.gz", 2.0, None),
        ("m", "small.gz", 10.0, None),
        ("m", "large.gz", 10.0, None),
    ]


def test_patience_ends_where_no_timeout_reaches(tmp_path, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(nn, "_fetch", lambda *arguments: released.wait(5))  # as looking up a name
    started = time.monotonic()
    with pytest.raises(OSError, match=r"none of 2 mirrors answered within 0\.1 s: all were silent"):
        nn.download_mnist(tmp_path, ["a", "b"], patience=0.1)
    assert time.monotonic() - started < 1
    released.set()


def test_files_that_are_there_are_kept_and_nothing_is_fetched_again(tmp_path, serve, two_files):
    for name, packed in two_files.items():
        (tmp_path / name).write_bytes(packed)
    (tmp_path / "large.gz").write_bytes(two_files["large.gz"][:1000])
    before = (tmp_path / "small.gz").stat().st_mtime_ns
    server = serve(lambda name: [response(two_files[name])])
    nn.download_mnist(str(tmp_path), [server.url], patience=5)
    assert server.asked == ["small.gz", "large.gz"]  # the small one for the choice of mirror
    assert (tmp_path / "small.gz").stat().st_mtime_ns == before
    assert files_in(tmp_path) == two_files


def test_a_full_disk_in_a_download_leaves_no_half_file(tmp_path, monkeypatch, serve, two_files):
    server = serve(lambda name: [response(two_files[name])])
    real_open = open

    def open_on_full_disk(path, mode="r"):
        return FullDisk(path, mode) if "w" in mode else real_open(path, mode)

    monkeypatch.setattr(FullDisk, "room", 1000)
    monkeypatch.setattr(nn, "open", open_on_full_disk, raising=False)
    with pytest.raises(OSError, match="No space left"):
        nn.download_mnist(tmp_path, [server.url], patience=5)
    assert files_in(tmp_path) == {"small.gz": two_files["small.gz"]}


def packed_to(size, content):
    """`content` packed with gzip to exactly `size` bytes, with a long comment in its header."""
    packed = gzip.compress(content, mtime=0)
    comment = b"c" * (size - len(packed) - 1) + b"\0"
    return packed[:3] + b"\x10" + packed[4:10] + comment + packed[10:]


def test_a_file_may_be_little_longer_than_its_content(serve, two_files):
    limit = 100 + 1024
    contents = {extra: packed_to(limit + extra, b"small" * 20) for extra in (0, 1)}
    assert [len(packed) for packed in contents.values()] == [limit, limit + 1]
    server = serve(lambda path: [response(contents[int(path.split("/")[0])])])
    assert nn._fetch(f"{server.url}/0", "small.gz", 5) == contents[0]
    with pytest.raises(OSError, match=r"small\.gz is too long or comes too slowly"):
        nn._fetch(f"{server.url}/1", "small.gz", 5)


@pytest.mark.parametrize(("seconds", "late"), [(60.0, False), (60.1, True)])
def test_a_whole_file_has_thirty_times_the_timeout(monkeypatch, serve, two_files, seconds, late):
    server = serve(lambda name: [response(two_files[name])])
    clock = [1000.0]
    monkeypatch.setattr(nn, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))

    def pass_time(name, done, total):
        clock[0] = 1000.0 + seconds

    if late:
        with pytest.raises(OSError, match=r"large\.gz is too long or comes too slowly"):
            nn._fetch(server.url, "large.gz", 2.0, pass_time)
    else:
        assert nn._fetch(server.url, "large.gz", 2.0, pass_time) == two_files["large.gz"]


def test_bytes_that_trickle_in_are_given_up_in_time(monkeypatch, serve, two_files):
    sent = []

    def trickle(name):
        yield response(b"", length=len(two_files[name]))
        for byte in two_files[name][:200]:
            time.sleep(0.005)
            sent.append(byte)
            yield bytes([byte])

    server, ticks = serve(trickle), itertools.count()
    # A clock that goes on by a second whenever it is looked at, so that no real time matters.
    monkeypatch.setattr(nn, "time", types.SimpleNamespace(monotonic=lambda: next(ticks)))
    with pytest.raises((OSError, ValueError)):
        nn._fetch(server.url, "large.gz", 2)
    assert len(sent) < 200


def test_verify_unpacks_no_more_than_the_file_and_looks_far_back(two_files, monkeypatch):
    bomb = gzip.compress(bytes(30_000_000))

    def refused():
        with pytest.raises(ValueError, match="cut off or too long"):
            nn._verify("small.gz", bomb)

    assert peak_memory(refused) < 10**6
    far = np.random.default_rng(0).bytes(25_000) * 2
    monkeypatch.setattr(nn, "_MNIST_FILES", {"far": (50_000, hashlib.sha256(far).hexdigest())})
    nn._verify("far", gzip.compress(far))


@pytest.mark.parametrize("pack", ["whole", "cut", "crc"])
def test_verify_takes_the_right_bytes_only(two_files, pack):
    packed = two_files["small.gz"]
    if pack == "whole":
        nn._verify("small.gz", packed)
        return
    broken = packed[: len(packed) // 2] if pack == "cut" else packed[:-8] + b"0000" + packed[-4:]
    with pytest.raises(ValueError, match=r"^small\.gz (is damaged: |is cut off)"):
        nn._verify("small.gz", broken)


def test_verify_refuses_more_and_less_than_the_file(two_files):
    for content in (b"small" * 21, b"small" * 19, b"small" * 20 + b"\0", b"Small" * 20):
        with pytest.raises(
            ValueError, match=r"^small\.gz (has the wrong SHA-256|is cut off or too long)$"
        ):
            nn._verify("small.gz", gzip.compress(content))


@pytest.mark.parametrize("end", [-1, -8, None])
def test_verify_refuses_what_read_idx_cannot_read(two_files, end):
    packed = two_files["small.gz"]
    broken = packed + b"junk" if end is None else packed[:end]
    with pytest.raises((EOFError, gzip.BadGzipFile)):
        gzip.decompress(broken)
    with pytest.raises(ValueError, match=r"small\.gz"):
        nn._verify("small.gz", broken)


# ------------------------------------------------------------------------------------------------
# The script, as a user runs it
# ------------------------------------------------------------------------------------------------

REPOSITORY = pathlib.Path(__file__).resolve().parent
LAST_LINE = re.compile(r"test_accuracy=(\d\.\d{4}) test_loss=(\d+\.\d{4}) seconds=\d+\.\d")


def blobs(count, shape, classes, key):
    """Images whose class is how bright they are: quick to learn whatever their size."""
    rng = np.random.default_rng(key)
    labels = rng.integers(0, classes, count)
    labels[:classes] = np.arange(classes)
    level = (labels + 0.5) * (255 / classes)
    noise = rng.normal(0, 10, (count, *shape))
    images = level.reshape(-1, *[1] * len(shape)) + noise
    return np.clip(images, 0, 255).astype(np.uint8), labels


@pytest.fixture(scope="module")
def blob_file(tmp_path_factory):
    """A Keras-style file of 4 classes and colour images of 9 x 6: nothing as in MNIST."""
    path = tmp_path_factory.mktemp("blobs") / "blobs.npz"
    x_train, y_train = blobs(200, (9, 6, 3), 4, 1)
    x_test, y_test = blobs(50, (9, 6, 3), 4, 2)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return str(path)


def mlp_experiment(*arguments):
    """What train_mlp.py makes of a command line before it trains."""
    options, _ = train_mlp.parse(train_mlp.command_line(), arguments)
    return train_mlp.set_up(options, train_mlp.build_mlp)[0]


def train_on(blob_file, *arguments):
    quick = ["--data", blob_file, "--epochs", "2", "--hidden", "8", "--batch-size", "16"]
    return train_mlp.main([*quick, *arguments])


def test_script_learns_the_built_in_digits_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, str(REPOSITORY / "train_mlp.py"), "--data", "builtin"]
    options = ["--hidden", "32", "--epochs", "3", "--lr", "0.01", "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == (
        "digits drawn by purenn: 10,800 training, 1,200 validation and 2,000 test images"
        " of 1x28x28, 10 classes; 25,482 parameters to train"
    )
    assert lines[1].startswith("every batch in 1 shard, computed by 1 worker; threads of BLAS: ")
    assert [line.split("  ")[0] for line in lines[2:-1]] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    accuracy = float(LAST_LINE.fullmatch(lines[-1])[1])
    assert accuracy > 0.9
    params = nn.load(tmp_path / "out" / "model.npz")
    assert params["hidden1"]["W"].shape == (784, 32)
    assert list(params) == ["hidden1", "norm1", "out"]


def test_script_learns_colour_images_of_any_size(blob_file, capsys):
    assert train_on(blob_file, "--epochs", "12", "--lr", "0.02") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "180 training, 20 validation and 50 test images of 3x9x6, 4 classes" in lines[0]
    assert float(LAST_LINE.fullmatch(lines[-1])[1]) > 0.9


def test_script_gives_the_same_bits_for_the_same_seed(blob_file, tmp_path):
    for folder, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert train_on(blob_file, "--seed", seed, "--out", str(tmp_path / folder)) == 0
    for name in ("model.npz", "metrics.csv"):
        a, b, c = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert a == b
        assert a != c


def test_script_keeps_the_best_epoch_and_all_metrics(blob_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert train_on(blob_file, "--epochs", "6", "--out", str(out), "--schedule", "constant") == 0
    last = LAST_LINE.fullmatch(capsys.readouterr().out.splitlines()[-1])
    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == list("123456")
    assert [int(row["step"]) for row in rows] == [12, 24, 36, 48, 60, 72]
    assert list(rows[0])[2:] == ["loss", "accuracy", "validation_loss", "validation_accuracy"]

    experiment = mlp_experiment("--data", blob_file, "--hidden", "8")
    params = nn.load(out / "model.npz")
    loss, accuracy = train_mlp.validate(experiment, params, "test")
    assert (f"{accuracy:.4f}", f"{loss:.4f}") == last.groups()
    assert len(experiment.data["x_validation"]) == 20
    _, accuracy = train_mlp.validate(experiment, params, "validation")
    assert accuracy == max(float(row["validation_accuracy"]) for row in rows)


def test_script_without_validation_keeps_the_last_epoch(blob_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert train_on(blob_file, "--validation", "0", "--out", str(out)) == 0
    assert "200 training, 0 validation" in capsys.readouterr().out
    header = (out / "metrics.csv").read_text().splitlines()[0]
    assert header == "epoch,step,loss,accuracy"


def numbered(count=50):
    """Images that show their own numbers, which are their classes as well."""
    images = np.arange(count, dtype=np.float32).reshape(count, 1, 1, 1)
    return {"x_train": images, "y_train": np.arange(count)}


def test_split_off_parts_the_images_without_losing_one():
    parts = train_mlp.split_off(numbered(), 12, seed=5)
    assert len(parts["x_validation"]) == 12
    together = np.concatenate([parts["y_train"], parts["y_validation"]])
    assert sorted(together) == list(range(50))
    for part in ("train", "validation"):
        np.testing.assert_array_equal(parts[f"x_{part}"].ravel(), parts[f"y_{part}"])
    again = train_mlp.split_off(numbered(), 12, seed=6)
    assert not np.array_equal(again["y_validation"], parts["y_validation"])
    assert len(train_mlp.split_off(numbered(), None, 0)["y_validation"]) == 5


def test_train_size_takes_some_of_the_images_that_are_not_held_out():
    parts = train_mlp.split_off(numbered(), 12, 5, train_size=30)
    whole = train_mlp.split_off(numbered(), 12, 5)
    np.testing.assert_array_equal(parts["y_validation"], whole["y_validation"])
    assert len(set(parts["y_train"])) == 30
    assert set(parts["y_train"]) < set(whole["y_train"])
    np.testing.assert_array_equal(parts["x_train"].ravel(), parts["y_train"])
    assert len(train_mlp.split_off(numbered(), 12, 5, train_size=38)["y_train"]) == 38
    with pytest.raises(ValueError, match="--train-size 39 is too many: .* 50 images, 12 of them"):
        train_mlp.split_off(numbered(), 12, 5, train_size=39)


def test_test_size_takes_some_test_images_or_where_there_are_none_training_images():
    data = numbered()
    both = {**data, "x_test": data["x_train"] + 100, "y_test": data["y_train"] + 100}
    assert train_mlp.choose_test(both, None) is both
    some = train_mlp.choose_test(both, 20)
    assert len(set(some["y_test"])) == 20
    np.testing.assert_array_equal(some["x_test"].ravel(), some["y_test"])
    assert some["x_train"] is both["x_train"]
    assert len(train_mlp.choose_test(both, 50)["y_test"]) == 50
    for size, expected in ((None, 10), (7, 7), (49, 49)):
        parts = train_mlp.choose_test(data, size)
        assert len(parts["y_test"]) == expected
        assert sorted([*parts["y_test"], *parts["y_train"]]) == list(range(50))
        np.testing.assert_array_equal(parts["x_train"].ravel(), parts["y_train"])
    for given_data, size in ((both, 51), (data, 50)):
        with pytest.raises(ValueError, match=f"--test-size {size} is too many of 50 te?"):
            train_mlp.choose_test(given_data, size)


def test_sizes_and_center_of_the_images(blob_file):
    sizes = ["--train-size", "100", "--validation", "30", "--test-size", "20"]
    plain = mlp_experiment("--data", blob_file, *sizes).data
    small = mlp_experiment("--data", blob_file, *sizes, "--size", "4", "--center").data
    for part, count in (("train", 100), ("validation", 30), ("test", 20)):
        assert plain[f"x_{part}"].shape == (count, 3, 9, 6)
        np.testing.assert_array_equal(plain[f"y_{part}"], small[f"y_{part}"])
        expected = nn.resize(plain[f"x_{part}"], 4) - np.float32(0.5)
        np.testing.assert_array_equal(small[f"x_{part}"], expected)
    other = mlp_experiment("--data", blob_file, *sizes, "--seed", "1").data
    np.testing.assert_array_equal(other["x_test"], plain["x_test"])
    assert not np.array_equal(other["x_train"], plain["x_train"])


def test_augmented_pixels_that_come_in_are_black_with_center_too():
    parse = train_mlp.command_line().parse_args
    options = ["--augment", "shift=3", "rotation=30"]
    plain = train_mlp.choose_augmentation(parse(options))
    centred = train_mlp.choose_augmentation(parse([*options, "--center"]))
    images = np.random.default_rng(0).random((4, 1, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(centred(5, images - 0.5), plain(5, images) - 0.5, atol=1e-6)


@pytest.mark.parametrize("name", train_mlp.ACTIVATIONS)
def test_script_takes_every_activation(name, blob_file):
    assert train_on(blob_file, "--activation", name, "--epochs", "1") == 0


@pytest.mark.parametrize("name", train_mlp.INITIALISERS)
def test_script_takes_every_init(name, blob_file):
    assert train_on(blob_file, "--init", name, "--epochs", "1", "--no-batch-norm") == 0


@pytest.mark.parametrize("name", ["cross-entropy", "hinge", *train_mlp.ROW_LOSSES])
def test_script_learns_with_every_loss(name, blob_file, capsys):
    options = ["--loss", name, "--epochs", "40", "--lr", "0.02", "--dropout", "0"]
    options += ["--validation", "0"]
    assert train_on(blob_file, *options) == 0
    last = LAST_LINE.fullmatch(capsys.readouterr().out.splitlines()[-1])
    assert float(last[1]) > 0.6


@pytest.mark.parametrize("name", train_mlp.OPTIMISERS)
def test_script_learns_with_every_optimiser(name, blob_file, capsys):
    extra = ["--momentum", "0.5"] if name in ("sgd", "rmsprop") else []
    options = ["--optimizer", name, "--weight-decay", "0.0001", "--epochs", "90", "--dropout", "0"]
    options += ["--validation", "0"]
    assert train_on(blob_file, *options, *extra) == 0
    last = LAST_LINE.fullmatch(capsys.readouterr().out.splitlines()[-1])
    assert float(last[1]) > 0.6


@pytest.mark.parametrize("name", train_mlp.SCHEDULES)
def test_script_takes_every_schedule(name, blob_file):
    assert train_on(blob_file, "--schedule", name) == 0


def test_schedules_of_the_script_end_where_its_help_says():
    def schedule(name, *arguments):
        options = train_mlp.command_line().parse_args(
            ["--schedule", name, "--epochs", "10", *arguments]
        )
        return train_mlp.choose_schedule(options, 0.5, 100)

    step = schedule("step", "--lr-factor", "0.5", "--lr-epochs", "1.5")
    assert [step(at) for at in (149, 150, 300, 999)] == [0.5, 0.25, 0.125, 0.5**7]
    multistep = schedule("multistep", "--lr-epochs", "2", "8")
    assert [round(multistep(at), 9) for at in (199, 200, 800)] == [0.5, 0.05, 0.005]
    exponential = schedule("exponential", "--lr-factor", "0.9")
    assert exponential(300) == pytest.approx(0.5 * 0.9**3)
    cyclic = schedule("cyclic", "--lr-epochs", "0.5")
    assert [cyclic(at) for at in (0, 50, 100)] == [0.05, 0.5, 0.05]
    assert schedule("constant") == schedule("plateau") == 0.5
    assert [round(schedule("step")(step), 9) for step in (0, 332, 333, 666)] == [
        0.5, 0.5, 0.05, 0.005,
    ]  # fmt: skip
    assert [round(schedule("multistep")(step), 9) for step in (499, 500, 750)] == [0.5, 0.05, 0.005]
    assert schedule("exponential")(1000) == pytest.approx(0.005)
    assert schedule("cosine")(1000) == 0
    assert [schedule("cyclic")(step) for step in (0, 200, 400)] == pytest.approx([0.05, 0.5, 0.05])
    assert schedule("one-cycle")(299) == pytest.approx(0.5)
    assert schedule("one-cycle")(999) == pytest.approx(0.5 / 250_000)


def test_plateau_of_the_script_halves_the_rate(blob_file, monkeypatch):
    original, scales = nn.reduce_on_plateau, []

    def settled(state, loss, factor, patience):
        state = original(state, 1.0, factor, patience)
        scales.append(float(state["scale"]))
        return state

    monkeypatch.setattr(nn, "reduce_on_plateau", settled)
    plateau = ["--schedule", "plateau", "--epochs", "5"]  # of 12 steps each
    assert train_on(blob_file, *plateau) == 0
    assert scales == [1, 1, 1, 0.5, 0.5]
    del scales[:]
    assert train_on(blob_file, *plateau, "--lr-factor", "0.1", "--lr-epochs", "1") == 0
    np.testing.assert_allclose(scales, [1, 1, 0.1, 0.1, 0.01])
    del scales[:]
    assert train_on(blob_file, *plateau, "--lr-epochs", "1", "--report-every", "4") == 0
    assert scales == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.125, 0.125, 0.125]


MISTAKES = {
    "a folder that is not there": (["--data", "nowhere"], "nowhere: there is no such file"),
    "a folder without data": (["--data", "empty"], "empty: expected IDX files"),
    "a damaged file": (["--data", "damaged.npz"], "damaged.npz: cannot be read"),
    "too many held out": (["--validation", "200"], "--validation 200 leaves none of the 200"),
    "smoothing without cross entropy": (
        ["--loss", "mse", "--label-smoothing", "0.1"],
        "--label-smoothing goes with --loss cross-entropy, not mse",
    ),
    "momentum of adam": (
        ["--momentum", "0.9"],
        "--momentum goes with --optimizer sgd or rmsprop, not adam",
    ),
    "a scale that makes no sense": (
        ["--augment", "scale=2"],
        "augment: scale must be >= 0 and < 1",
    ),
    "a rate factor of no schedule": (
        ["--lr-factor", "0.5"],
        "--lr-factor goes with --schedule step or multistep or exponential or plateau",
    ),
    "epochs of a schedule without": (
        ["--schedule", "cosine", "--lr-epochs", "2"],
        "--lr-epochs goes with --schedule step or multistep or cyclic or plateau, not cosine",
    ),
    "two numbers where one belongs": (
        ["--schedule", "step", "--lr-epochs", "2", "3"],
        "--schedule step takes one number of --lr-epochs",
    ),
    "a final momentum of adam": (["--final-momentum", "0"], "--final-momentum goes with"),
    "a final momentum that is higher": (
        ["--optimizer", "sgd", "--final-momentum", "0.95"],
        "--final-momentum 0.95 is above the momentum of 0.9",
    ),
    "a deviation of he": (["--init-std", "1"], "--init-std goes with --init normal, not he-normal"),
    "images of a curve": (["--task", "sine"], "--data goes with --task classes, not sine"),
    "too many training images": (["--train-size", "181"], "--train-size 181 is too many"),
    "a layer that is not there": (
        ["--train-only", "act1"],
        "--train-only: no layer act1 has parameters, but hidden1, norm1, out",
    ),
    "a model that is not there": (["--init-from", "nowhere.npz"], "nowhere.npz"),
    "a model that is damaged": (["--init-from", "damaged.npz"], "damaged.npz: cannot be read"),
    "a resume of nothing": (["--resume"], "--resume needs --out"),
    "checkpoints of nothing": (["--checkpoint-every", "9"], "--checkpoint-every needs --out"),
    "runs that are not there": (["--compare", "nowhere"], "nowhere"),
    "a run that is none": (["--compare", "empty"], "empty"),
    "plateau of nothing": (
        ["--schedule", "plateau", "--validation", "0"],
        "--schedule plateau needs validation images",
    ),
    "a rate that is much too high": (
        ["--optimizer", "sgd", "--lr", "1e30", "--no-batch-norm", "--schedule", "constant"],
        "try a lower --lr",
    ),
    "an output folder that is a file": (["--out", "damaged.npz"], "damaged.npz"),
}


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # of the rate that is too high
@pytest.mark.parametrize("name", MISTAKES)
def test_script_answers_a_mistake_with_one_line_and_exit_2(
    name, blob_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("empty").mkdir()
    pathlib.Path("damaged.npz").write_bytes(b"PK\x03\x04 and nothing more")
    arguments, message = MISTAKES[name]
    assert train_on(blob_file, *arguments) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert re.match(r"\S+: error: ", errors)
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "-1"],
        ["--epochs", "x"],
        ["--train-size", "0"],
        ["--test-size", "0"],
        ["--size", "0"],
        ["--report-every", "0"],
        ["--lr-factor", "1"],
        ["--lr-epochs", "0"],
        ["--init-std", "-1"],
        ["--final-momentum", "1"],
        ["--reduction", "max"],
        ["--task", "cosine"],
        ["--batch-size", "-1"],
        ["--seed", "-1"],
        ["--lr", "nan"],
        ["--lr", "-1"],
        ["--dropout", "1"],
        ["--momentum", "1"],
        ["--validation", "-1"],
        ["--hidden", "0"],
        ["--activation", "step"],
        ["--augment", "blur=1"],
        ["--augment", "shift"],
        ["--augment", "shift=far"],
        ["--augment", "shift=-1"],
        ["--augment", "shift=nan"],
    ],
)
def test_script_refuses_impossible_options(arguments, blob_file, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_on(blob_file, *arguments)
    assert stopped.value.code == 2
    assert f"argument {arguments[0]}" in capsys.readouterr().err


def test_script_on_a_full_disk_says_so_and_leaves_no_half_written_model(
    blob_file, tmp_path, monkeypatch, capsys
):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert train_on(blob_file, "--out", str(tmp_path / "out")) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == ["lock"]


def test_script_interrupted_exits_with_130(blob_file, monkeypatch, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(nn, "update_statistics", interrupt)
    assert train_on(blob_file) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")


def test_script_trains_on_a_last_batch_of_one_image_with_batch_norm(blob_file):
    assert train_on(blob_file, "--batch-size", "199", "--validation", "0") == 0


class Terminal:
    """Standard output that claims to be a terminal."""

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_progress_is_one_moving_line_on_a_terminal(blob_file, monkeypatch, capsys):
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert train_on(blob_file) == 0
    assert re.search(r"\repoch 1/2  loss \d\.\d{4}  [\d,]+ samples/s  \d+ s left", terminal.text)
    lines = [line.rpartition("\r")[2] for line in terminal.text.split("\n")]
    assert [line.split("  ")[0] for line in lines[2:-2]] == ["epoch 1/2", "epoch 2/2"]
    assert LAST_LINE.fullmatch(lines[-2])
    assert train_on(blob_file) == 0
    assert "\r" not in capsys.readouterr().out


def small_digits():
    return {
        name: value
        for key, (part, size) in enumerate((("train", 200), ("test", 50)))
        for name, value in zip(
            (f"x_{part}", f"y_{part}"), nn.draw_digits(key, size, size=8), strict=True
        )
    }


def test_without_a_network_the_script_trains_on_drawn_digits(tmp_path, monkeypatch, capsys):
    digits = {
        name: value[:, None] / np.float32(255) if name.startswith("x") else value
        for name, value in small_digits().items()
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_mlp, "drawn_digits", lambda: digits)
    monkeypatch.setattr(nn, "MNIST_MIRRORS", ["http://127.0.0.1:9/mnist", "http://[::1]:9/mnist"])
    assert train_mlp.main(["--epochs", "1", "--hidden", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"MNIST is not in .* and cannot be downloaded \(.*\); training on .*", lines[0]
    )
    assert lines[1].startswith("digits drawn by purenn: 180 training")
    assert not os.path.exists("data")


def test_drawn_digits_are_a_data_set():
    data = train_mlp.drawn_digits(train=40, test=20)
    assert data["x_train"].shape == (40, 1, 28, 28)
    assert data["x_test"].shape == (20, 1, 28, 28)
    assert data["x_train"].dtype == np.float32
    assert 0 <= data["x_train"].min() < 0.1
    assert 0.9 < data["x_train"].max() <= 1
    assert data["y_train"].shape == (40,)


def test_script_reads_data_mnist_where_it_stands(blob_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nn, "MNIST_MIRRORS", [])
    os.makedirs("data/mnist")
    os.symlink(blob_file, "data/mnist/any.npz")
    assert train_mlp.main(["--epochs", "1", "--hidden", "8"]) == 0
    assert capsys.readouterr().out.startswith(f"{os.path.join('data', 'mnist')}: 180 training")


def test_script_downloads_mnist_where_it_is_missing(blob_file, tmp_path, monkeypatch, capsys):
    def download(directory, mirrors, progress):
        progress("any.npz", 500_000, 1_000_000)
        progress("any.npz", 1_000_000, 1_000_000)
        os.makedirs(directory)
        os.symlink(blob_file, os.path.join(directory, "any.npz"))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nn, "download_mnist", download)
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        assert train_mlp.main(["--epochs", "1", "--hidden", "8"]) == 0
    assert "\rdownloading any.npz: 1.0 of 1.0 MB" in terminal.text
    assert f"{os.path.join('data', 'mnist')}: 180 training" in terminal.text


def test_plot_without_matplotlib_says_what_to_install(blob_file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert train_on(blob_file, "--plot") == 2
    assert "pictures need matplotlib: pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("hidden", [["8"], []])
def test_plot_draws_curves_and_weights(hidden, blob_file, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, which is optional")
    monkeypatch.chdir(tmp_path)
    for options, folder in (
        (["--plot", "pictures"], "pictures"),
        (["--plot", "--out", "out"], "out"),
        (["--plot", "--validation", "0"], "plots"),
    ):
        assert train_on(blob_file, *options, "--hidden", *hidden) == 0
        for name in ("curves.png", "weights.png", "confusion.png", "mistakes.png"):
            picture = (tmp_path / folder / name).read_bytes()
            assert picture.startswith(b"\x89PNG")
            assert len(picture) > 3_000


# --- the experiments of the reports ---


def test_summary_counts_the_parameters_of_the_fifth_report(tmp_path, monkeypatch, capsys):
    digits = train_mlp.drawn_digits(train=60, test=20)
    monkeypatch.setattr(train_mlp, "drawn_digits", lambda: digits)
    plain = ["--data", "builtin", "--epochs", "0", "--summary", "--no-batch-norm", "--dropout", "0"]
    network = ["--channels", "4", "4", "--kernel", "3", "--pooling", "average", "--hidden"]
    assert train_cnn.main([*plain, *network]) == 0
    table, rest = capsys.readouterr().out.split("total")
    assert table.splitlines() == [
        "layer     kind        output   parameters",
        "input                 1x28x28",
        "conv1     conv2d      4x28x28          40",
        "convact1  relu        4x28x28           0",
        "pool1     avg_pool2d  4x14x14           0",
        "conv2     conv2d      4x14x14         148",
        "convact2  relu        4x14x14           0",
        "pool2     avg_pool2d  4x7x7             0",
        "flatten   flatten     196               0",
        "out       linear      10            1,970",
    ]
    assert rest.split()[0] == "2,158"
    assert train_mlp.main([*plain, "--hidden", "100", "50"]) == 0
    assert re.search(r"^total +84,060$", capsys.readouterr().out, re.MULTILINE)
    assert train_mlp.main([*plain, "--hidden", "100", "50", "--train-only", "out"]) == 0
    assert re.search(r"^total +510$", capsys.readouterr().out, re.MULTILINE)


def test_the_summed_gradient_is_the_mean_times_the_batch(blob_file):
    options = ["--data", blob_file, "--hidden", "8", "--optimizer", "sgd", "--momentum", "0"]
    moves = []
    for reduction in ("mean", "sum"):
        experiment = mlp_experiment(*options, "--dropout", "0", "--reduction", reduction)
        params = train_mlp.first_params(experiment)
        optimizer = nn.sgd(0.01)
        progress = train_mlp.begin(experiment, optimizer, params)
        moved = train_mlp.take_step(experiment, optimizer, progress, np.arange(16))
        moves.append(moved.params["hidden1"]["W"].astype(np.float64) - params["hidden1"]["W"])
        assert moved.sums[0] < 3 * moved.sums[2] == 48
    np.testing.assert_allclose(moves[1], 16 * moves[0], atol=1e-6)
    assert np.abs(moves[1]).max() > 1e-3


def test_momentum_is_dropped_in_the_last_quarter():
    for momentum, final in (("0.8", "0.2"), ("0.8", "0")):
        options = ["--optimizer", "sgd", "--momentum", momentum, "--final-momentum", final]
        options = train_mlp.command_line().parse_args([*options, "--epochs", "8"])
        params = {"w": np.zeros(1)}
        optimizer = train_mlp.choose_optimizer(options, 10)
        state = optimizer.init(params)
        for step in range(80):
            before = state["velocity"]["w"]
            params, state = optimizer.step(params, {"w": np.ones(1)}, state)
            used = float(momentum if step < 60 else final)
            np.testing.assert_allclose(state["velocity"]["w"], used * before + 1)


def test_a_model_is_where_another_training_begins(blob_file, tmp_path, capsys):
    out = str(tmp_path / "first")
    assert train_on(blob_file, "--epochs", "12", "--out", out) == 0
    last = capsys.readouterr().out.splitlines()[-1].split(" seconds")[0]
    model = os.path.join(out, "model.npz")
    assert train_on(blob_file, "--epochs", "0", "--init-from", model) == 0
    assert last in capsys.readouterr().out


def test_train_only_leaves_the_other_layers_as_they_are(blob_file, tmp_path):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    options = ["--hidden", "8", "6", "--validation", "0"]
    assert train_on(blob_file, *options, "--out", first) == 0
    model = os.path.join(first, "model.npz")
    tuned = ["--init-from", model, "--train-only", "norm2", "out", "--out", second]
    assert train_on(blob_file, *options, *tuned) == 0
    before, after = nn.load(model), nn.load(os.path.join(second, "model.npz"))
    assert before.keys() == after.keys()
    for name in before:
        same = all_bytes(before[name]) == all_bytes(after[name])
        assert same == (name not in ("norm2", "out"))
    assert not np.array_equal(before["norm2"]["mean"], after["norm2"]["mean"])


def test_frozen_layers_are_as_at_inference_and_the_others_in_training(blob_file):
    experiment = mlp_experiment("--data", blob_file, "--train-only", "norm1", "out")
    params = train_mlp.first_params(experiment)
    x = experiment.data["x_train"][:8]
    mode = train_mlp.in_training(params, 3, ["norm1", "out"])
    _, cache = experiment.net.forward(mode, x)
    assert "statistics" in cache["norm1"]
    assert all_bytes(nn.update_statistics(params, cache)["norm2"]) == all_bytes(params["norm2"])
    assert {name for name in mode if "key" in mode[name]} == {"norm1", "out"}
    assert len({tuple(mode[name]["key"]) for name in ("norm1", "out")}) == 2
    assert "key" in train_mlp.in_training(params, 3, None)


def test_init_from_says_what_does_not_fit(blob_file, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert train_on(blob_file, "--hidden", "8", "6", "--out", out) == 0
    model = os.path.join(out, "model.npz")
    for options, words in (
        (["--hidden", "8"], "this network has no layer hidden2 or norm2"),
        (["--hidden", "8", "6", "4"], "hidden3 has nothing, but this network needs"),
        (
            ["--hidden", "8", "5"],
            "hidden2/W': (8, 6)}, but this network needs {'hidden2/W': (8, 5)",
        ),
        (["--hidden", "8", "6", "--no-batch-norm"], "this network has no layer norm1 or norm2"),
    ):
        assert train_on(blob_file, *options, "--init-from", model) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["i1", "f2", "?", "u8"])
def test_init_from_refuses_what_no_layer_takes(kind, blob_file, tmp_path, capsys):
    model = str(tmp_path / "model.npz")
    params = train_mlp.first_params(mlp_experiment("--data", blob_file, "--hidden", "8"))
    params["out"]["b"] = params["out"]["b"].astype(kind)
    nn.save(model, params)
    assert train_on(blob_file, "--hidden", "8", "--init-from", model) == 2
    errors = capsys.readouterr().err
    assert f"{model}: out/b is {np.dtype(kind)}, expected float32 or float64" in errors


def test_a_last_layer_that_does_not_fit_begins_anew_where_it_is_trained(blob_file, tmp_path):
    out = str(tmp_path / "out")
    assert train_on(blob_file, "--out", out) == 0
    model = os.path.join(out, "model.npz")
    own = mlp_experiment("--data", blob_file, "--hidden", "8")
    other = train_mlp.Experiment(*own[:3], train_mlp.build_mlp(own.options, 7))
    params = train_mlp.first_params(other)
    started = train_mlp.start_from(model, params, ["out"])
    assert started["out"] is params["out"]
    assert all_bytes(started["hidden1"]) == all_bytes(nn.load(model)["hidden1"])
    with pytest.raises(ValueError, match=r"out has .*\(8, 4\).* but this network needs .*\(8, 7\)"):
        train_mlp.start_from(model, params, ["norm1"])


def test_reports_come_as_often_as_asked_and_at_the_end(blob_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert train_on(blob_file, "--report-every", "10", "--out", str(out)) == 0
    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "10"), ("2", "20"), ("2", "24")]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:-1]] == ["epoch 1/2", "epoch 2/2", "epoch 2/2"]


def test_a_report_is_of_the_steps_since_the_last_one(blob_file, tmp_path, monkeypatch):
    values = iter(range(100))
    original = train_mlp.take_step

    def step(experiment, optimizer, progress, index):
        value, sums = next(values), progress.sums
        progress = original(experiment, optimizer, progress, index)
        return progress._replace(sums=sums + np.array([value, value / 100, 1]) * len(index))

    monkeypatch.setattr(train_mlp, "take_step", step)
    out, options = tmp_path / "out", ["--report-every", "2", "--validation", "100"]
    assert train_on(blob_file, *options, "--epochs", "1", "--out", str(out)) == 0
    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    means = [0.5, 2.5, 4.5, (6 * 4) / 4]  # the seventh batch has the 4 images that are left
    np.testing.assert_allclose([float(row["loss"]) for row in rows], means)
    np.testing.assert_allclose([float(row["accuracy"]) for row in rows], np.array(means) / 100)


def test_count_steps_and_step_images_agree():
    for count in range(1, 9):
        for size in range(1, 10):
            options = argparse.Namespace(epochs=2, batch_size=size, seed=0)
            found = list(train_mlp.step_images(count, options))
            assert len(found) == 2 * train_mlp.count_steps(count, size) > 0
            alone = [index for index in found if len(index) == 1]
            assert not alone or min(size, count) == 1
            for done in range(len(found) + 1):
                left = list(train_mlp.step_images(count, options, done))
                assert all_bytes(*left) == all_bytes(*found[done:])


SINE_LINE = re.compile(r"test_error=(\d\.\d{8}) test_loss=(\d\.\d{8}) seconds=\d+\.\d")


def test_script_fits_a_curve(tmp_path, capsys):
    out = tmp_path / "out"
    quick = ["--task", "sine", "--epochs", "12", "--batch-size", "100", "--report-every", "200"]
    assert train_mlp.main([*quick, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "y = sin x: 3,600 training, 400 validation and 1,000 test points; 5,251 parameters to train"
    )
    last = SINE_LINE.fullmatch(lines[-1])
    assert float(last[1]) < 0.03
    params = nn.load(out / "model.npz")
    x = np.linspace(-math.pi / 2, math.pi / 2, 1002)[1:-1, None].astype(np.float32)
    experiment = mlp_experiment(*quick)
    output, _ = experiment.net.forward(params, x)
    assert float(last[1]) == pytest.approx(np.abs(output - np.sin(x)).mean(), abs=1e-8)
    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    best = min(float(row["validation_error"]) for row in rows)
    assert train_mlp.validate(experiment, params, "validation")[1] == best
    assert json.loads((out / "options.json").read_text())["--task"] == "sine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--loss", "hinge"], "--task sine takes --loss mse, mae or huber, not hinge"),
        (["--loss", "bce"], "--task sine takes"),
        (["--augment"], "--augment goes with --task classes, not sine"),
        (["--size", "8"], "--size goes with --task classes"),
        (["--center"], "--center goes with --task classes, not sine"),
    ],
)
def test_a_curve_has_no_images(arguments, words, capsys):
    assert train_mlp.main(["--task", "sine", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_fit_of_the_curve_as_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, which is optional")
    quick = ["--task", "sine", "--epochs", "1", "--plot", str(tmp_path)]
    assert train_mlp.main([*quick, "--hidden", "4"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"curves.png", "fit.png"}


def test_options_that_were_chosen_stand_beside_the_model(blob_file, tmp_path):
    out = tmp_path / "out"
    chosen = ["--hidden", "8", "4", "--augment", "shift=1", "--no-batch-norm", "--lr", "0.01"]
    assert train_on(blob_file, *chosen, "--center", "--out", str(out)) == 0
    assert json.loads((out / "options.json").read_text()) == {
        "": train_mlp.command_line().prog,
        "--center": "",
        "--augment": "shift=1",
        "--epochs": "2",
        "--batch-size": "16",
        "--lr": "0.01",
        "--hidden": "8 4",
        "--no-batch-norm": "",
    }
    setting = json.loads((out / "options.json").read_text())
    text = train_mlp.as_text({**setting, "": "train_mlp.py"})
    assert text.startswith("train_mlp.py --center --epochs 2 --batch-size 16 --hidden 8 4")
    again, _ = train_mlp.parse(train_mlp.command_line(), shlex.split(text)[1:])
    before, _ = train_mlp.parse(train_mlp.command_line(), ["--hidden", "9", *shlex.split(text)[1:]])
    assert again == before


@pytest.fixture
def curves(monkeypatch):
    """What would have been drawn: (labels, title) of every picture of curves."""
    drawn = []

    def draw(path, runs, title):
        drawn.append((list(runs), title))
        pathlib.Path(path).touch()

    monkeypatch.setattr(train_mlp, "plot_curves", draw)
    return drawn


def test_runs_are_compared_by_what_is_their_own(blob_file, tmp_path, monkeypatch, capsys, curves):
    monkeypatch.chdir(tmp_path)
    quick = ["--data", blob_file, "--epochs", "1", "--hidden", "8"]
    assert train_mlp.main([*quick, "--out", "a"]) == 0
    assert train_mlp.main([*quick, "--lr", "0.01", "--out", "b"]) == 0
    assert train_mlp.main([*quick, "--lr", "0.1", "--center", "--out", "c"]) == 0
    for out in "abc":
        setting = json.loads(pathlib.Path(out, "options.json").read_text())
        pathlib.Path(out, "options.json").write_text(json.dumps({**setting, "": "train_mlp.py"}))
    assert train_mlp.main(["--compare", "a", "b", "c"]) == 0
    assert capsys.readouterr().out.endswith("plots/compare.png: 3 runs\n".replace("/", os.sep))
    assert train_mlp.main(["--compare", "a", "a", "--plot", "pictures"]) == 0
    assert pathlib.Path("pictures", "compare.png").exists()
    assert train_cnn.main(["--compare", "a"]) == 0
    title = "train_mlp.py --epochs 1 --hidden 8"
    assert curves == [
        (["default", "--lr 0.01", "--center --lr 0.1"], title),
        (["a"], title),
        (["default"], title),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("options.json", "{"),
        ("options.json", "[1]"),
        ("options.json", ""),
        ("metrics.csv", ""),
        ("metrics.csv", "epoch,step,loss\n"),
        ("metrics.csv", "epoch,step,loss\n1,2,much\n"),
        ("metrics.csv", "epoch,step,loss\n1,2\n"),
        ("metrics.csv", "a,b\n1,2\n"),
        ("metrics.csv", "\xff\x00"),
        ("options.json", "[" * 100_000),
        ("metrics.csv", f"epoch,step,loss,accuracy\n1,2,3,{'4' * 200_000}\n"),
        ("metrics.csv", "epoch,step,loss,accuracy\n1,2,3,4,5\n"),
        ("metrics.csv", "epoch,step,loss,accuracy\n1,2,1e308,4\n"),
        ("metrics.csv", "step,loss\n1,2\n"),
        ("metrics.csv", "epoch,step,loss,accuracy,validation_loss\n1,2,3,4,5\n"),
    ],
)
def test_compare_refuses_what_is_no_run(name, text, tmp_path, capsys):
    files = {"options.json": "{}", "metrics.csv": "epoch,step,loss,accuracy\n1,2,3,4\n", name: text}
    for file, content in files.items():
        (tmp_path / file).write_bytes(content.encode("latin-1"))
    assert train_mlp.main(["--compare", str(tmp_path)]) == 2
    assert f"{tmp_path / name}: is not what --out writes" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["options.json", "metrics.csv"])
def test_compare_waits_for_no_pipe(name, tmp_path):
    (tmp_path / "options.json").write_text("{}")
    (tmp_path / "metrics.csv").write_text("epoch,step,loss,accuracy\n1,2,3,4\n")
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    said = said_in_time(train_mlp.read_run, str(tmp_path))
    assert said == f"{tmp_path / name}: is not what --out writes: it is not a file"


def test_compare_refuses_runs_that_measured_different_things(tmp_path, capsys):
    for measure in ("accuracy", "error"):
        (tmp_path / measure).mkdir()
        (tmp_path / measure / "options.json").write_text("{}")
        (tmp_path / measure / "metrics.csv").write_text(f"epoch,step,loss,{measure}\n1,2,3,4\n")
    folders = [str(tmp_path / measure) for measure in ("accuracy", "error")]
    assert train_mlp.main(["--compare", *folders]) == 2
    assert "--compare: these runs measured different things" in capsys.readouterr().err


def test_class_names_that_no_font_can_draw_become_numbers(recwarn):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, which is optional")
    assert train_mlp.drawable(["cat", "dög", "β"]) == ["cat", "dög", "β"]
    nowhere = "\U0010fffd"  # for private use: no font has it
    assert train_mlp.drawable(["cat", nowhere]) == ["0", "1"]


def test_curves_of_several_runs_as_a_picture(blob_file, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, which is optional")
    monkeypatch.chdir(tmp_path)
    assert train_on(blob_file, "--out", "a") == 0
    assert train_on(blob_file, "--validation", "0", "--out", "b") == 0
    assert train_mlp.main(["--compare", "a", "b"]) == 0
    assert pathlib.Path("plots", "compare.png").read_bytes().startswith(b"\x89PNG")


# --- checkpoints ---


def kept(folder):
    return {name: pathlib.Path(folder, name).read_bytes() for name in train_mlp.KEPT}


class Killed(BaseException):
    """Stands for a process that ends at once."""


@pytest.mark.parametrize(
    "options",
    [
        ["--optimizer", "adam", "--dropout", "0.5"],
        ["--optimizer", "sgd", "--schedule", "plateau", "--report-every", "5"],
        ["--augment", "--validation", "0", "--checkpoint-every", "3", "--init", "orthogonal"],
        ["--train-only", "out", "--optimizer", "rmsprop", "--report-every", "7"],
    ],
)
@pytest.mark.parametrize("script", ["mlp", "cnn"])
def test_a_resumed_training_is_the_same_to_the_bit(
    script, options, blob_file, tmp_path, monkeypatch, capsys
):
    start = {"mlp": train_on, "cnn": train_cnn_on}[script]
    options = [*options, "--epochs", "3"]
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    assert start(blob_file, *options, "--out", whole) == 0
    last = capsys.readouterr().out.splitlines()[-1].split(" seconds")[0]
    original, steps = train_mlp.take_step, itertools.count()

    def killed_at_times(*arguments):
        if next(steps) % 11 == 8:
            raise Killed
        return original(*arguments)

    monkeypatch.setattr(train_mlp, "take_step", killed_at_times)
    if "--checkpoint-every" not in options:
        options = [*options, "--checkpoint-every", "4"]
    for _ in range(20):
        try:
            assert start(blob_file, *options, "--out", parts, "--resume") == 0
        except Killed:
            continue
        break
    assert capsys.readouterr().out.splitlines()[-1].split(" seconds")[0] == last
    assert next(steps) > 40
    expected, found = kept(whole), kept(parts)
    assert found["model.npz"] == expected["model.npz"]
    assert found["metrics.csv"] == expected["metrics.csv"]
    assert found["checkpoint.npz"] == expected["checkpoint.npz"]
    assert start(blob_file, *options, "--out", parts, "--resume") == 0  # nothing is left to do
    assert capsys.readouterr().out.splitlines()[-1].split(" seconds")[0] == last
    assert kept(parts) == found


def test_a_training_killed_at_any_moment_goes_on_to_the_same_bits(blob_file, tmp_path):
    command = [sys.executable, str(REPOSITORY / "train_mlp.py"), "--data", blob_file]
    command += ["--hidden", "8", "--epochs", "60", "--batch-size", "4", "--checkpoint-every", "5"]
    subprocess.run([*command, "--out", tmp_path / "whole"], check=True, capture_output=True)
    rng, kills = np.random.default_rng(0), 0
    while True:
        process = subprocess.Popen(
            [*command, "--out", tmp_path / "parts", "--resume"], stdout=subprocess.PIPE, text=True
        )
        assert "parameters to train" in process.stdout.readline()
        try:
            process.wait(rng.uniform(0, 0.3) if kills < 6 else None)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        finally:
            process.stdout.close()
    assert process.returncode == 0
    assert kills > 0
    assert kept(tmp_path / "parts") == kept(tmp_path / "whole")
    assert not list((tmp_path / "parts").glob("*.tmp"))


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal, also where the tests run behind nohup."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(
    blob_file, tmp_path, monkeypatch, capsys, interruptible
):
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    assert train_on(blob_file, "--out", whole) == 0
    original = train_mlp.take_step

    def interrupted(experiment, optimizer, progress, index):
        progress = original(experiment, optimizer, progress, index)
        if progress.step == 7:
            signal.raise_signal(signal.SIGINT)
        return progress

    monkeypatch.setattr(train_mlp, "take_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert train_on(blob_file, "--out", parts) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().err.endswith(
        "interrupted after step 7 of 24; the same command with --resume goes on from there\n"
    )
    assert nn.load(os.path.join(parts, "checkpoint.npz"))["step"] == 7
    assert train_on(blob_file) == 130
    assert "after step 7 of 24; with --out it could be gone on with" in capsys.readouterr().err
    assert train_on(blob_file, "--out", parts, "--resume") == 0
    assert kept(parts) == kept(whole)


def test_a_checkpoint_is_not_lost_where_another_training_begins(blob_file, tmp_path):
    assert train_on(blob_file, "--out", str(tmp_path)) == 0
    first = kept(tmp_path)["checkpoint.npz"]
    assert train_on(blob_file, "--out", str(tmp_path), "--resume") == 0
    assert not (tmp_path / "checkpoint.before.npz").exists()
    assert train_on(blob_file, "--out", str(tmp_path), "--seed", "1") == 0
    assert (tmp_path / "checkpoint.before.npz").read_bytes() == first
    assert kept(tmp_path)["checkpoint.npz"] != first


def test_ctrl_c_that_is_ignored_stays_ignored(interruptible):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with train_mlp.Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert not stop.asked
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_a_second_ctrl_c_is_at_once(interruptible):
    with train_mlp.Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_training_works_outside_the_main_thread(blob_file, tmp_path):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(train_on(blob_file)))
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_checkpoint_of_something_else_is_refused(blob_file, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert train_on(blob_file, "--out", out) == 0
    checkpoint = pathlib.Path(out, "checkpoint.npz")
    before = checkpoint.read_bytes()
    images, labels = blobs(200, (9, 6, 3), 4, 7)
    other = str(tmp_path / "other.npz")
    np.savez(other, x_train=images, y_train=labels, x_test=images, y_test=labels)
    for options, words in (
        (["--hidden", "9"], "it is of another training: --hidden [8] then, [9] now"),
        (["--lr", "0.1"], "it is of another training: --lr default then, 0.1 now"),
        (["--epochs", "3"], "--epochs 2 then, 3 now"),
        (["--data", other], "it is of another training: the data are others"),
    ):
        assert train_on(blob_file, *options, "--out", out, "--resume") == 2
        assert words in capsys.readouterr().err
        assert checkpoint.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"of": None},
        {"of": np.frombuffer(b"[1", np.uint8)},
        {"of": np.frombuffer(b"[]", np.uint8)},
        {"params": None},
        {"params": {"out": {"W": np.ones((8, 4))}}},
        {"best": {"out": np.ones(3)}},
        {"step": np.ones(3, int)},
        {"step": np.array(-1)},
        {"step": np.array(10**9)},
        {"sums": np.zeros(2)},
        {"best_score": np.zeros(2)},
        {"rows": np.zeros((2, 3))},
        {"rows": np.zeros(6)},
        {"rows": np.array(1.0)},
        {"rows": {"a": np.zeros(6)}},
        {"of": np.frombuffer(b"[" * 100_000, np.uint8)},
        {"in two\nlines": np.ones(1)},
        {"state": {}},
        {"more": np.ones(1)},
    ],
)
def test_a_checkpoint_that_is_none_is_refused(change, blob_file, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert train_on(blob_file, "--out", out) == 0
    path = os.path.join(out, "checkpoint.npz")
    tree = {name: value for name, value in {**nn.load(path), **change}.items() if value is not None}
    nn.save(path, tree)
    assert train_on(blob_file, "--out", out, "--resume") == 2
    errors = capsys.readouterr().err
    assert f"{path}: cannot be resumed" in errors
    assert errors.count("\n") == 1


def test_a_damaged_checkpoint_is_refused(blob_file, tmp_path, capsys):
    path = tmp_path / "checkpoint.npz"
    path.write_bytes(b"PK\x03\x04 and nothing more")
    assert train_on(blob_file, "--out", str(tmp_path), "--resume") == 2
    assert f"{path}: cannot be read" in capsys.readouterr().err


def test_a_second_run_into_the_same_folder_is_refused(blob_file, tmp_path, capsys):
    with train_mlp.only_run(str(tmp_path)):
        assert train_on(blob_file, "--out", str(tmp_path)) == 2
        assert f"{tmp_path}: another run is writing into this folder" in capsys.readouterr().err
    assert train_on(blob_file, "--out", str(tmp_path)) == 0


def test_what_a_killed_run_left_half_written_is_removed(blob_file, tmp_path):
    for name in ("checkpoint.npz.123.tmp", "metrics.csv.4.tmp", "notes.tmp"):
        (tmp_path / name).write_bytes(b"half")
    assert train_on(blob_file, "--out", str(tmp_path)) == 0
    assert {path.name for path in tmp_path.iterdir()} == {*train_mlp.KEPT, "lock", "notes.tmp"}


def test_a_loss_that_is_not_finite_says_where_it_began(blob_file, tmp_path, monkeypatch, capsys):
    original = train_mlp.take_step
    out = str(tmp_path / "out")

    def spoiled(experiment, optimizer, progress, index, *, value):
        if progress.step == 15:
            params = dict(progress.params)
            params["hidden2"] = {"W": np.full_like(params["hidden2"]["W"], value)}
            progress = progress._replace(params=params)
        return original(experiment, optimizer, progress, index)

    for value, where in (
        (math.nan, "hidden2/W is not finite, so its gradient was not"),
        (3e38, "the output of hidden2 is not finite"),
    ):
        monkeypatch.setattr(train_mlp, "take_step", partial(spoiled, value=value))
        assert train_on(blob_file, "--hidden", "8", "6", "--out", out) == 2
        errors = capsys.readouterr().err
        assert re.search(rf"the loss became (nan|inf) in step 15: {where}; try a lower", errors)
        assert errors.count("\n") == 1
        assert nn.load(os.path.join(out, "checkpoint.npz"))["step"] == 12


def test_params_that_are_not_finite_are_never_kept(blob_file, tmp_path, monkeypatch, capsys):
    original = train_mlp.take_step

    def spoiled(*arguments):
        progress = original(*arguments)
        if progress.step == 24:
            progress.params["out"]["b"][:] = math.inf
        return progress

    monkeypatch.setattr(train_mlp, "take_step", spoiled)
    assert train_on(blob_file, "--out", str(tmp_path)) == 2
    assert "out/b is not finite after step 24, so its gradient was not" in capsys.readouterr().err
    assert nn.load(tmp_path / "checkpoint.npz")["step"] == 12


def test_replacing_keeps_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    with nn.replacing(path) as file:
        file.write(b"old")
    with contextlib.suppress(KeyError), nn.replacing(str(path)) as file:
        file.write(b"half")
        assert path.read_bytes() == b"old"
        raise KeyError
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    with nn.replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


# --- folders of images ---


def write_images(folder, sizes=((9, 6),), modes=("L",), classes="ab", count=4, suffix="png"):
    """Bright images of the second class, dark ones of the first."""
    from PIL import Image

    for label, name in enumerate(classes):
        path = pathlib.Path(folder, name)
        path.mkdir(parents=True)
        for number in range(count):
            size = sizes[number % len(sizes)]
            image = Image.new("L", (size[1], size[0]), 40 + 160 * label + number)
            image.convert(modes[number % len(modes)]).save(path / f"{number}.{suffix}")


def needs_pillow():
    return pytest.importorskip("PIL", reason="image files need Pillow, which is optional")


def test_a_folder_for_each_class_is_a_data_set(tmp_path, capsys):
    needs_pillow()
    write_images(tmp_path, count=30)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    options = ["--data", str(tmp_path), "--hidden", "8", "--epochs", "20", "--batch-size", "8"]
    assert train_mlp.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "44 training, 4 validation and 12 test images of 1x9x6, 2 classes" in lines[0]
    assert float(LAST_LINE.fullmatch(lines[-1])[1]) > 0.9


def test_folders_of_images_are_read_as_they_are(tmp_path):
    needs_pillow()
    write_images(tmp_path / "train", classes=("x", "y"))
    write_images(tmp_path / "test", classes=("x", "y"), count=2, modes=("RGB",), suffix="bmp")
    data = train_mlp.read_image_folders(str(tmp_path), None)
    assert data["classes"].tolist() == ["x", "y"]
    assert data["x_train"].shape == (8, 1, 9, 6)
    assert data["x_train"].dtype == np.float32
    np.testing.assert_array_equal(data["y_train"], [0, 0, 0, 0, 1, 1, 1, 1])
    levels = [40, 41, 42, 43, 200, 201, 202, 203]
    np.testing.assert_allclose(data["x_train"][:, 0, 4, 2], np.array(levels) / 255, atol=1e-6)
    assert data["x_test"].shape == (4, 3, 9, 6)


def test_images_of_other_sizes_and_modes_are_brought_together(tmp_path):
    needs_pillow()
    write_images(tmp_path, sizes=((9, 6), (12, 12)), modes=("L", "RGB", "P", "1"))
    with pytest.raises(ValueError, match=r"1\.png: images of 6x9 and 12x12 pixels; --size makes"):
        train_mlp.read_image_folders(str(tmp_path), None)
    data = train_mlp.read_image_folders(str(tmp_path), 5)
    assert data["x_train"].shape == (8, 3, 5, 5)
    np.testing.assert_allclose(data["x_train"][0], 40 / 255, atol=1e-6)
    np.testing.assert_allclose(data["x_train"][1], 41 / 255, atol=1e-6)


def test_folders_that_are_no_data_set_say_why(tmp_path):
    needs_pillow()
    from PIL import Image

    (tmp_path / "lone" / "test").mkdir(parents=True)
    write_images(tmp_path / "differ" / "train")
    write_images(tmp_path / "differ" / "test", classes="ac")
    write_images(tmp_path / "damaged")
    (tmp_path / "damaged" / "b" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    write_images(tmp_path / "deep")
    Image.new("I", (6, 9)).save(tmp_path / "deep" / "b" / "1.tif")
    write_images(tmp_path / "none", count=0)
    for name, words in {
        "lone": "there is a folder test, but none called train",
        "differ": "expected a folder for each of a, b",
        "damaged": "2.png: cannot be read as an image",
        "deep": "1.tif: cannot be read as an image: its pixels are of mode I",
        "none": "a: there is no image in this folder",
    }.items():
        with pytest.raises(ValueError, match=re.escape(words)) as refused:
            train_mlp.read_image_folders(str(tmp_path / name), None)
        assert str(tmp_path / name) in str(refused.value)


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
    "more pixels than Pillow takes": png(2**31 - 1, 2**31 - 1, PIXELS),
    "no width": png(0, 2, PIXELS),
    "no height": png(3, 0, PIXELS),
    "a piece of two gigabytes": png(3, 2, PIXELS, chunk(b"IDAT", b"\0", 2**31 - 9)),
    "comments of a hundred megabytes": png(
        3, 2, PIXELS, *(chunk(b"zTXt", b"%d" % number + COMMENT) for number in range(100))
    ),
    "a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 3 2\n%%EndComments\nshowpage\n",
    "a screen of 4 gigapixels": b"GIF89a"
    + b"\xff" * 4
    + b"\0\0\0,\0\0\0\0"
    + b"\xff" * 4
    + b"\0\2\0;",
}


def one_image(tmp_path, content, name="0.png"):
    """A folder with one class of one image, and the path of that."""
    (tmp_path / "class").mkdir(exist_ok=True)
    path = tmp_path / "class" / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", HOSTILE_IMAGES)
def test_hostile_images_are_refused_without_a_warning_and_without_much_memory(name, tmp_path):
    needs_pillow()
    path = one_image(tmp_path, HOSTILE_IMAGES[name])

    def refuse():
        with pytest.raises(ValueError, match=f"^{path}: cannot be read as an image: .+"):
            train_mlp.read_image_folders(str(tmp_path), None)

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        refuse()  # what Pillow imports at first is not meant
        assert peak_memory(refuse) < len(HOSTILE_IMAGES[name]) + 8_000_000
    assert not warned


def test_a_large_image_is_read(tmp_path):
    needs_pillow()
    noise = np.random.default_rng(0).integers(0, 256, (1100, 1000), np.uint8)
    one_image(tmp_path, png(1000, 1100, np.insert(noise, 0, 0, axis=1).tobytes()))
    data = train_mlp.read_image_folders(str(tmp_path), None)
    np.testing.assert_array_equal(data["x_train"][0, 0], noise / np.float32(255))


def test_an_image_that_is_cut_off_or_has_a_bit_flipped_is_refused_or_right(tmp_path):
    needs_pillow()
    whole = png(3, 2, PIXELS)
    broken = [whole[:length] for length in range(len(whole))]
    for bit in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        broken.append(flipped)
    refused = 0
    for content in broken:
        path = one_image(tmp_path, content)
        message = ""
        try:
            data = train_mlp.read_image_folders(str(tmp_path), None)
        except ValueError as error:
            message = str(error)
            refused += 1
        else:
            np.testing.assert_allclose(data["x_train"].ravel() * 255, [1, 2, 3, 4, 5, 6], 1e-6)
        assert message.startswith(f"{path}: cannot be read as an image: ") or not message
    assert refused > len(broken) * 0.7


@pytest.mark.parametrize("error", [KeyError("x"), struct.error("x"), IndexError("x"), EOFError()])
def test_whatever_pillow_raises_is_said_of_the_image(error, tmp_path, monkeypatch):
    needs_pillow()
    path = one_image(tmp_path, png(3, 2, PIXELS))

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("PIL.Image.Image.convert", fail)
    with pytest.raises(ValueError, match=f"^{path}: cannot be read as an image: .+"):
        train_mlp.read_image_folders(str(tmp_path), None)


def test_only_files_that_are_images_and_not_hidden_are_read(tmp_path):
    needs_pillow()
    path = one_image(tmp_path, png(3, 2, PIXELS))
    one_image(tmp_path, b"what macOS leaves", "._0.png")
    one_image(tmp_path, b"another program's", "a.eps")
    (tmp_path / "class" / "more").mkdir()
    (tmp_path / "class" / "link.png").symlink_to(path)
    data = train_mlp.read_image_folders(str(tmp_path), None)
    assert data["x_train"].shape == (2, 1, 2, 3)
    (tmp_path / "class" / "1.png").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"1\.png: cannot be read as an image: it is not a file"):
        train_mlp.read_image_folders(str(tmp_path), None)
    (tmp_path / "class" / "0.png").unlink()
    os.mkfifo(tmp_path / "class" / "0.png")
    said = said_in_time(lambda path: train_mlp.read_image_folders(path, None), str(tmp_path))
    assert said.startswith(str(path))


def test_one_class_alone_and_names_with_dollars_are_a_data_set(tmp_path, monkeypatch, capsys):
    needs_pillow()
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, which is optional")
    write_images(tmp_path / "images", classes=["$\\frac$"], count=20)
    options = ["--data", str(tmp_path / "images"), "--hidden", "4", "--epochs", "1"]
    assert train_mlp.main([*options, "--plot", str(tmp_path / "$\\plots$")]) == 0
    assert "test_accuracy=1.0000" in capsys.readouterr().out


def test_images_without_pillow_say_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "PIL", None)
    (tmp_path / "a").mkdir()
    assert train_mlp.main(["--data", str(tmp_path)]) == 2
    assert "image files need Pillow: pip install pillow" in capsys.readouterr().err


def test_commands_of_the_reports_have_options_that_exist():
    script = REPOSITORY / "benchmarks" / "reports.py"
    listed = subprocess.run([sys.executable, script, "--list"], capture_output=True, text=True)
    commands = dict(line.split(maxsplit=1) for line in listed.stdout.splitlines())
    assert len(commands) == len(listed.stdout.splitlines()) > 90
    for command in commands.values():
        _, script, *arguments = shlex.split(command)
        module = {"train_mlp.py": train_mlp, "train_cnn.py": train_cnn}[script]
        options, _ = train_mlp.parse(module.command_line(), arguments)
        train_mlp.check_options(options)
        needed = re.match(r"{(.+)}/model\.npz", getattr(options, "init_from", ""))
        assert not needed or needed[1] in commands


# --- train_cnn.py and what it shares ---


def train_cnn_on(blob_file, *arguments):
    quick = ["--data", blob_file, "--epochs", "2", "--hidden", "8", "--batch-size", "16"]
    return train_cnn.main([*quick, "--channels", "3", "4", "--kernel", "3", *arguments])


def test_cnn_script_learns_the_built_in_digits_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, str(REPOSITORY / "train_cnn.py"), "--data", "builtin"]
    options = ["--channels", "8", "16", "--epochs", "1", "--lr", "0.01", "--out", "out"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "10,800 training, 1,200 validation and 2,000 test images of 1x28x28" in lines[0]
    assert float(LAST_LINE.fullmatch(lines[-1])[1]) > 0.95
    params = nn.load(tmp_path / "out" / "model.npz")
    assert list(params) == ["conv1", "convnorm1", "conv2", "convnorm2", "hidden1", "norm1", "out"]
    assert params["conv2"]["W"].shape == (16, 8, 5, 5)


def test_cnn_script_builds_what_its_options_say(blob_file):
    options = ["--channels", "3", "4", "--convolutions", "2", "--kernel", "3", "--pool", "3"]
    options += ["--pooling", "average", "--no-batch-norm", "--activation", "tanh", "--hidden"]
    net = train_cnn.build_cnn(train_cnn.command_line().parse_args(options), classes=5)
    params, shape = net.init(0, (1, 20, 19))
    assert shape == (5,)
    x = np.random.default_rng(0).normal(size=(2, 1, 20, 19)).astype(np.float32)
    shapes = {name: y.shape[1:] for name, y in train_mlp.outputs(net, params, x)}
    assert shapes == {
        "conv1_1": (3, 20, 19),
        "convact1_1": (3, 20, 19),
        "conv1_2": (3, 20, 19),
        "convact1_2": (3, 20, 19),
        "pool1": (3, 6, 6),
        "conv2_1": (4, 6, 6),
        "convact2_1": (4, 6, 6),
        "conv2_2": (4, 6, 6),
        "convact2_2": (4, 6, 6),
        "pool2": (4, 2, 2),
        "flatten": (16,),
        "out": (5,),
    }
    assert set(params["conv1_1"]) == {"W", "b"}
    outputs = dict(train_mlp.outputs(net, params, x))
    np.testing.assert_array_equal(outputs["convact1_1"], np.tanh(outputs["conv1_1"]))
    pooled = outputs["convact1_2"][:, :, :18, :18].reshape(2, 3, 6, 3, 6, 3).mean(axis=(3, 5))
    np.testing.assert_allclose(outputs["pool1"], pooled, atol=1e-6)
    assert np.array_equal(outputs["out"], net.forward(params, x)[0])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--convolutions", "2", "--no-batch-norm", "--activation", "gelu"],
        ["--pool", "1", "--hidden"],
        ["--pooling", "average", "--input-dropout", "0.1", "--optimizer", "sgd"],
        ["--channels"],
        ["--augment"],
        ["--augment", "elastic=1", "shift=1"],
    ],
)
def test_cnn_script_takes_colour_images_of_any_size(arguments, blob_file, capsys):
    assert train_cnn_on(blob_file, *arguments) == 0
    out = capsys.readouterr().out
    assert "images of 3x9x6, 4 classes" in out
    assert LAST_LINE.fullmatch(out.splitlines()[-1])


def test_cnn_script_finds_a_network_that_does_not_fit_before_it_trains(blob_file, capsys):
    assert train_cnn_on(blob_file, "--channels", "3", "4", "5") == 2
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors.endswith(
        "pool3: max_pool2d: the window covers 2 x 2 pixels, but the padded image has 2 x 1\n"
    )


def test_augmentation_of_the_scripts_changes_training_and_not_the_test(blob_file, tmp_path, capsys):
    models = []
    for options in ([], ["--augment"], ["--augment"], ["--augment", "shift=1"]):
        out = tmp_path / str(len(models))
        assert train_cnn_on(blob_file, *options, "--out", str(out)) == 0
        models.append((out / "model.npz").read_bytes())
    assert models[1] == models[2]
    assert len(set(models)) == 3
    choose = train_mlp.choose_augmentation
    assert choose(train_mlp.command_line().parse_args([])) is None
    images = np.random.default_rng(0).random((4, 1, 8, 8))
    for arguments, expected in (
        (["--augment"], {}),
        (["--augment", "rotation=9"], {**STILL, "rotation": 9}),
        (["--augment", "elastic=2", "shift=1"], {**STILL, "shift": 1, "elastic": 2}),
    ):
        augment = choose(train_mlp.command_line().parse_args(arguments))
        np.testing.assert_array_equal(augment(5, images), nn.augment(5, images, **expected))


def test_plots_of_a_cnn(blob_file, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, which is optional")
    monkeypatch.chdir(tmp_path)
    for folder, options in (("with", []), ("without", ["--channels"])):
        assert train_cnn_on(blob_file, "--plot", folder, *options) == 0
        names = {"curves.png", "confusion.png", "mistakes.png", "features.png"}
        names |= {"kernels.png"} if folder == "with" else set()
        assert {path.name for path in pathlib.Path(folder).iterdir()} == names
        for name in names:
            assert (tmp_path / folder / name).read_bytes().startswith(b"\x89PNG")


# --- cores and machines ---


class FakeRank:
    """One rank of a communicator whose ranks are threads."""

    def __init__(self, rank, barrier, values):
        self.rank, self.barrier, self.values = rank, barrier, values

    def Get_rank(self):
        return self.rank

    def Get_size(self):
        return len(self.values)

    def allgather(self, value):
        self.values[self.rank] = value
        self.barrier.wait(10)
        values = list(self.values)
        self.barrier.wait(10)
        return values

    def Allreduce(self, own, total):
        assert own.dtype == total.dtype
        total[...] = sum(self.allgather(own))


def on_ranks(count, work):
    """[work(communicator) of every rank]."""
    barrier, values = threading.Barrier(count), [None] * count
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, [FakeRank(rank, barrier, values) for rank in range(count)]))


@pytest.fixture(scope="module")
def shared_experiment(blob_file):
    """An experiment in which all that can depend on a shard does."""
    options = ["--hidden", "6", "--dropout", "0.5", "--augment", "shift=1", "--data", blob_file]
    return mlp_experiment(*options)


@given(
    ranks=st.integers(1, 4),
    more=st.integers(0, 3),
    images=st.integers(2, 20),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_ranks_compute_what_one_process_does_with_as_many_shards(
    shared_experiment, ranks, more, images, reduction
):
    options = argparse.Namespace(**{**vars(shared_experiment.options), "reduction": reduction})
    experiment = shared_experiment._replace(options=options)
    team, index = train_mlp.Team(shards=ranks + more), np.arange(images)
    optimizer = nn.sgd(0.1)
    progress = train_mlp.begin(experiment, optimizer, train_mlp.first_params(experiment))

    def moved(communicator):
        own = experiment._replace(team=team._replace(communicator=communicator))
        return train_mlp.take_step(own, optimizer, progress, index)

    alone = nn.tree_flatten(moved(None)._asdict())
    first, *others = on_ranks(ranks, moved)
    for name, leaf in nn.tree_flatten(first._asdict()).items():
        assert leaf.dtype == alone[name].dtype
        np.testing.assert_allclose(leaf, alone[name], rtol=2e-4, atol=2e-5)
    assert all(all_bytes(own._asdict()) == all_bytes(first._asdict()) for own in others)
    assert not np.array_equal(first.params["hidden1"]["W"], progress.params["hidden1"]["W"])


@given(ranks=st.integers(1, 4), images=st.integers(1, 900))
def test_ranks_predict_what_one_process_does(shared_experiment, ranks, images):
    net = nn.sequential(flatten=nn.flatten(), out=nn.linear(3))
    params, _ = net.init(0, (1, 2, 2))
    x = np.random.default_rng(0).normal(size=(images, 1, 2, 2))
    expected = net.forward(params, x)[0]
    predict = partial(train_mlp.predict, net, params, x)
    np.testing.assert_allclose(predict(), expected)
    results = on_ranks(ranks, lambda own: predict(train_mlp.Team(communicator=own)))
    assert all(result.tobytes() == predict().tobytes() for result in results)


def test_one_rank_that_is_asked_to_stop_stops_all():
    def stops(own, asked):
        return train_mlp.any_rank(train_mlp.Team(3, communicator=own), asked[own.rank])

    assert train_mlp.any_rank(train_mlp.Team(), True) is True
    for asked in itertools.product([False, True], repeat=3):
        assert on_ranks(3, partial(stops, asked=asked)) == [any(asked)] * 3


def test_ranks_with_other_data_or_options_are_found(shared_experiment):
    def check(own, names=("x_train",)):
        data = dict(shared_experiment.data)
        if own.rank == 2:
            data |= {name: data[name] + 1 for name in names}
        experiment = shared_experiment._replace(data=data)
        train_mlp.check_same(train_mlp.Team(3, communicator=own), experiment)

    with pytest.raises(ValueError, match="rank 2 does not do what rank 0 does: .* data are others"):
        on_ranks(3, check)
    on_ranks(3, partial(check, names=()))
    train_mlp.check_same(train_mlp.Team(), shared_experiment)


@pytest.mark.parametrize("script", ["mlp", "cnn"])
def test_the_result_depends_on_the_shards_and_not_on_the_workers(
    script, blob_file, tmp_path, capsys
):
    start = {"mlp": train_on, "cnn": train_cnn_on}[script]
    results = {}
    for shards, workers in ((3, 1), (3, 2), (3, 3), (1, 1)):
        out = tmp_path / f"{shards}-{workers}"
        options = ["--shards", str(shards), "--workers", str(workers), "--augment"]
        assert start(blob_file, *options, "--out", str(out)) == 0
        line = f"{shards} shards, computed by {workers} worker".replace("1 shards", "1 shard")
        assert line in capsys.readouterr().out
        results[shards, workers] = kept(out)
    assert results[3, 1] == results[3, 2] == results[3, 3]
    assert results[3, 1]["model.npz"] != results[1, 1]["model.npz"]


def test_by_default_the_cnn_has_two_shards_and_the_mlp_one(blob_file, tmp_path):
    for start, shards in ((train_on, "1"), (train_cnn_on, "2")):
        for name, options in (("default", []), ("chosen", ["--shards", shards])):
            assert start(blob_file, *options, "--out", str(tmp_path / name)) == 0
        chosen, default = kept(tmp_path / "chosen"), kept(tmp_path / "default")
        assert chosen["model.npz"] == default["model.npz"]


def test_a_network_with_batch_norm_learns_from_shards_of_few_images(blob_file, capsys):
    assert train_on(blob_file, "--shards", "9", "--validation", "0", "--batch-size", "66") == 0
    assert "computed by" in capsys.readouterr().out


def test_a_checkpoint_says_with_which_shards_it_was_written(blob_file, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert train_on(blob_file, *out) == 0
    assert train_on(blob_file, *out, "--resume") == 0
    assert "shards a batch" not in capsys.readouterr().out
    assert train_on(blob_file, *out, "--resume", "--shards", "2") == 0
    assert "written with 1 shards a batch, so what follows will differ" in capsys.readouterr().out


def test_workers_without_shards_are_refused(blob_file, capsys):
    assert train_cnn_on(blob_file, "--workers", "3") == 2
    assert (
        "error: --workers 3 is too many: each process has 2 of the 2 shards (--shards)\n"
        in capsys.readouterr().err
    )


def test_mpi_without_mpi4py_says_what_to_install(blob_file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert train_on(blob_file, "--mpi") == 2
    errors = capsys.readouterr().err
    assert "error: --mpi needs mpi4py and an MPI: pip install mpi4py mpich" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "options", "environment", "threads"),
    [
        ("train_cnn.py", [], {}, 1),
        ("train_mlp.py", ["--workers=1"], {}, 1),
        ("train_mlp.py", ["--shards", "2"], {}, 1),
        ("train_mlp.py", [], {}, None),
        ("train_cnn.py", [], {"OMP_NUM_THREADS": "2"}, 2),
        ("train_cnn.py", [], {"OPENBLAS_NUM_THREADS": "2"}, 2),
    ],
)
def test_each_worker_has_one_thread_of_blas(script, options, environment, threads, blob_file):
    code = (
        "import contextlib, os, runpy, sys, time; sys.argv = sys.argv[1:]\n"
        "with contextlib.suppress(SystemExit): runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "import train_mlp; print([os.environ.get(name) for name in train_mlp.BLAS_THREADS])\n"
        "time.sleep(0.2)\n"  # the workers are gone, but the system may not know it yet
        "print(len(os.listdir('/proc/self/task')) if os.path.exists('/proc/self/task') else 0)"
    )
    inherited = {n: v for n, v in os.environ.items() if n not in train_mlp.BLAS_THREADS}
    quick = ["--data", blob_file, "--epochs", "0", "--hidden", "4"]
    done = subprocess.run(
        [sys.executable, "-c", code, script, *quick, *options],
        env={**inherited, **environment, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=True,
    )
    *_, said, last, set_to, running = done.stdout.splitlines()
    assert said.endswith(f"threads of BLAS: {threads or 'all cores'}")
    assert LAST_LINE.fullmatch(last)
    expected = list(environment.values()) or [str(threads)] * 4 * (threads is not None)
    assert [value for value in ast.literal_eval(set_to) if value] == expected
    if threads == 1:
        assert int(running) <= 1  # those of BLAS were started with NumPy


def mpiexec(ranks, *arguments, **options):
    """The finished job of so many ranks, each of which runs Python with these arguments."""
    pytest.importorskip("mpi4py", reason="--mpi needs mpi4py, which is optional")
    beside = pathlib.Path(sys.executable).parent / "mpiexec"
    launcher = str(beside) if beside.exists() else shutil.which("mpiexec")
    if launcher is None:
        pytest.skip("there is no mpiexec")
    command = [launcher, "-n", str(ranks), sys.executable, *map(str, arguments)]
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    oversubscribed = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    return subprocess.run(
        command,
        env={**os.environ, **as_root, **oversubscribed},
        capture_output=True,
        text=True,
        timeout=100,
        cwd=REPOSITORY,
        **options,
    )


QUICK = ["--hidden", "8", "--batch-size", "30", "--epochs", "2", "--dropout", "0.2"]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_train_as_one_process_does(ranks, blob_file, tmp_path):
    for script, more in (("train_mlp.py", []), ("train_cnn.py", ["--channels", "3"])):
        options = [script, "--data", blob_file, *QUICK, *more]
        runs = [tmp_path / f"{script}{number}" for number in range(3)]
        for out in runs[:2]:
            done = mpiexec(ranks, *options, "--mpi", "--out", out)
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.count("epoch 2/2") == 1
            assert f"in {ranks} shards, computed by 1 worker in each of {ranks}" in done.stdout
        assert kept(runs[0]) == kept(runs[1])
        script_of = {"train_mlp.py": train_mlp, "train_cnn.py": train_cnn}[script]
        alone = ["--shards", str(ranks), "--workers", "1", "--out", str(runs[2])]
        assert script_of.main([*options[1:], *alone]) == 0
        trees = [nn.tree_flatten(nn.load(out / "model.npz")) for out in (runs[0], runs[2])]
        for name, leaf in trees[0].items():
            np.testing.assert_allclose(leaf, trees[1][name], rtol=1e-3, atol=1e-4)


IN_THE_MIDDLE = """
import os, signal, sys
import train_mlp
from mpi4py import MPI

original = train_mlp.take_step

def take_step(experiment, optimizer, progress, index):
    progress = original(experiment, optimizer, progress, index)
    if progress.step == 5 and MPI.COMM_WORLD.Get_rank() == 1:
        {what}
    return progress

train_mlp.take_step = take_step
sys.exit(train_mlp.main(sys.argv[1:]))
"""


def test_a_stopped_job_goes_on_with_another_number_of_ranks(blob_file, tmp_path):
    options = ["--data", blob_file, *QUICK, "--mpi", "--out", tmp_path]
    code = IN_THE_MIDDLE.format(what="os.kill(os.getpid(), signal.SIGINT)")
    done = mpiexec(2, "-c", code, *options)
    assert done.returncode == 130
    assert done.stderr.count("interrupted after step 5 of 12; the same command with --resume") == 1
    assert nn.load(tmp_path / "checkpoint.npz")["step"] == 5
    done = mpiexec(3, "train_mlp.py", *options, "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    assert "written with 2 shards a batch, so what follows will differ" in done.stdout
    assert nn.load(tmp_path / "checkpoint.npz")["step"] == 12


@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 9, ""),
        ("raise ValueError('no more')", 2, "rank 1: error: no more\n"),
        ("progress.unknown", 1, "AttributeError: 'Progress' object has no attribute 'unknown'"),
    ],
)
def test_a_rank_that_fails_ends_the_job(what, code, words, blob_file):
    options = ["--data", blob_file, *QUICK, "--mpi"]
    done = mpiexec(2, "-c", IN_THE_MIDDLE.format(what=what), *options)
    assert done.returncode in (code, 128 + code)
    assert words in done.stderr


def test_what_is_wrong_on_all_ranks_is_said_once(tmp_path):
    for options, words in (
        (["--data", tmp_path / "none"], "none: there is no such file or folder"),
        (["--shards", "2"], "--shards 2 leaves some of the 3 ranks without work"),
    ):
        done = mpiexec(3, "train_mlp.py", "--mpi", *options)
        assert done.returncode == 2
        assert done.stderr.count("error: ") == 1
        assert words in done.stderr


# ------------------------------------------------------------------------------------------------
# The README
# ------------------------------------------------------------------------------------------------


def readme():
    return (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_readme_blocks_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", readme(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    assert all(len(block.strip().splitlines()) <= 20 for block in blocks)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README block {number}", "exec"), namespace)
    printed = capsys.readouterr().out.splitlines()
    assert float(printed[0]) > 0.95
    assert float(printed[1]) > 0.9
    assert printed[2] in ("same sign", "different signs")


def test_readme_shows_the_message_of_a_forgotten_slope(tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", readme(), re.MULTILINE | re.DOTALL)
    broken = blocks[1].replace('dx = np.where(x > 0, dy, params["slope"] * dy)', "dx = dy")
    assert broken != blocks[1]
    with pytest.raises(AssertionError) as failure:
        exec(compile(broken, "README", "exec"), {"np": np, "__name__": "readme"})
    assert f"`{failure.value}`" in readme()


def test_readme_commands_have_options_that_exist():
    commands = re.findall(
        r"^\s*(?:mpiexec .*?|srun )?python (train_\w+\.py[^\n#|`]*)|`python (train_\w+\.py[^`]*)`",
        readme(),
        re.MULTILINE,
    )
    assert len(commands) >= 10
    for command in (first or second for first, second in commands):
        script, *arguments = shlex.split(command)
        parser = {"train_mlp.py": train_mlp, "train_cnn.py": train_cnn}[script].command_line()
        with contextlib.suppress(SystemExit) if "--help" in command else contextlib.nullcontext():
            parser.parse_args(arguments)


def test_the_library_imports_numpy_and_the_standard_library_alone():
    imported = set()
    for node in ast.walk(ast.parse((REPOSITORY / "purenn.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).partition(".")[0])
    assert imported - sys.stdlib_module_names == {"numpy"}
