"""Tests of purenn: every layer through one harness, everything else against its formula.

HYPOTHESIS_PROFILE=wide looks further than the quick default, which draws the same cases each time.
"""

import ast
import contextlib
import errno
import functools
import http.client
import importlib.util
import inspect
import io
import itertools
import math
import os
import pathlib
import pickle
import re
import shutil
import struct
import subprocess
import sys
import threading
import tracemalloc
import types
import warnings
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import purenn as nn

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
QUICK = settings(derandomize=True, deadline=None, max_examples=11, database=None)
settings.register_profile("ci", QUICK, suppress_health_check=SLOW)
settings.register_profile("wide", deadline=None, max_examples=300)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

REPOSITORY = pathlib.Path(__file__).resolve().parent

# ------------------------------------------------------------------------------------------------
# The layers: one entry each, and what every test asks of them
# ------------------------------------------------------------------------------------------------

sizes = st.integers(1, 5)
any_shape = st.lists(sizes, max_size=3).map(tuple)
features = st.lists(sizes, min_size=1, max_size=3).map(tuple)
images = st.tuples(st.just(2), st.integers(5, 6), st.integers(5, 7))
channels = st.one_of(st.tuples(sizes), st.tuples(sizes, sizes, sizes))
steps = st.tuples(st.integers(1, 4), st.integers(1, 4))  # (T, D)
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


def several_inputs(units):
    """Two inputs of other shapes, side by side."""
    deep = nn.sequential(nn.linear(units), nn.tanh(), nn.dropout(0.3))
    return nn.concatenate(deep=deep, wide=nn.sequential(nn.flatten(), nn.batch_norm()))


def several_branches(units, axis):
    return nn.concatenate(nn.linear(units), nn.tanh(), named=bottleneck(units), axis=axis)


def several_outputs(units):
    a = nn.sequential(nn.layer_norm(), nn.linear(units))
    return nn.heads(a=a, b=nn.tanh(), c=bottleneck(units), d=nn.heads(a=nn.linear(2)))


def pairs(low, high):
    one = st.integers(low, high)
    return st.one_of(one, st.tuples(one, one))


def both(value):
    return (value, value) if isinstance(value, int) else tuple(value)


@st.composite
def convolutions(draw, constructor=nn.conv2d):
    """A convolution with any options, for 2 channels."""
    one = constructor is nn.conv1d
    numbers = st.integers if one else pairs
    groups, stride = draw(st.sampled_from([1, 1, 2])), draw(numbers(1, 3))
    words = ["causal"] * one + ["same"] * (stride in (1, (1, 1)))
    dilation, more = draw(numbers(1, 2)), {}
    if constructor is nn.conv2d_transpose:
        words = []
        most = [max(sizes) for sizes in zip(both(stride), both(dilation), strict=True)]
        more["output_padding"] = tuple(draw(st.integers(0, size - 1)) for size in most)
    return constructor(
        groups * draw(st.integers(1, 2)),
        draw(numbers(1, 3)),
        stride=stride,
        padding=draw(st.one_of(numbers(0, 1 if more else 3), st.sampled_from(words or [0]))),
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        **more,
    )


@st.composite
def pools(draw, constructor):
    size = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    padding = tuple(draw(st.integers(0, places // 2)) for places in size)
    return constructor(size, stride=draw(st.one_of(st.none(), pairs(1, 3))), padding=padding)


@st.composite
def attentions(draw):
    heads, (T, size) = draw(st.integers(1, 3)), draw(steps)
    return nn.attention(heads, causal=draw(st.booleans())), (T, heads * size)


def indices(rng, shape):
    """Whole numbers below 3, of any type."""
    return rng.integers(0, 3, shape).astype(rng.choice(["i8", "u1", "i2", "u8"]))


def floats(rng, shape):
    """Normal values that are not at a kink at 0."""
    x = rng.normal(size=shape)
    return x + 0.01 * np.sign(x)


class Entry(NamedTuple):
    """What cannot be found out by calling a layer.

    x may be of whole numbers, or a dict where the shape of a sample is a dict of shapes.
    """

    samples: st.SearchStrategy  # (layer with generated options, shape of one sample)
    x: Callable = floats  # (generator, shape) -> the values of x, or of each of its entries
    optional: tuple = ("b",)  # entries of params that may be missing
    free: tuple = ()  # entries of params that may be longer or shorter, with y of the same shape
    nan: tuple = ("y", "dx")  # which of them may be nan where sums over huge values overflow


def of(layers, shapes, **more):
    return Entry(st.tuples(layers, shapes), **more)


def recurrent(constructor):
    return of(st.builds(constructor, st.integers(1, 4), reverse=st.booleans()), steps, optional=())


def elementwise(constructor, *options):
    return of(st.builds(constructor, *options), any_shape, nan=())


eps = st.sampled_from([1e-5, 1e-2])
LAYERS = {
    "linear": of(st.builds(nn.linear, sizes, bias=st.booleans()), features),
    "identity": elementwise(nn.identity),
    "flatten": elementwise(nn.flatten),
    "reshape": of(
        st.sampled_from([nn.reshape(12), nn.reshape(3, 4), nn.reshape(2, 3, 1, 2)]),
        st.sampled_from([(12,), (4, 3), (2, 2, 3)]),
        nan=(),
    ),
    "permute": of(
        st.permutations(range(3)).map(lambda axes: nn.permute(*axes)),
        st.tuples(sizes, sizes, sizes),
        nan=(),
    ),
    "last": of(st.builds(nn.last), features, nan=()),
    "relu": elementwise(nn.relu),
    "leaky_relu": elementwise(nn.leaky_relu, slopes),
    "elu": elementwise(nn.elu, st.floats(0.1, 3)),
    "sigmoid": elementwise(nn.sigmoid),
    "tanh": elementwise(nn.tanh),
    "softplus": elementwise(nn.softplus),
    "gelu": elementwise(lambda exact: nn.gelu(exact=exact), st.booleans()),
    "silu": elementwise(nn.silu),
    "softmax": of(st.builds(nn.softmax), features, nan=("dx",)),
    "log_softmax": of(st.builds(nn.log_softmax), features, nan=("dx",)),
    "dropout": elementwise(nn.dropout, rates),
    "batch_norm": of(st.builds(nn.batch_norm, eps=eps), channels),
    "layer_norm": of(st.builds(nn.layer_norm, eps=eps), features),
    "conv1d": of(convolutions(nn.conv1d), st.tuples(st.just(2), st.integers(5, 7)), free=("W",)),
    "group_norm": of(
        st.builds(nn.group_norm, st.sampled_from([1, 2, 4]), eps=eps),
        st.sampled_from([(4,), (4, 3), (4, 2, 3), (8, 1, 2, 2)]),
    ),
    "embedding": of(
        st.builds(nn.embedding, st.integers(3, 5), sizes), any_shape, x=indices, free=("W",)
    ),
    "position_embedding": of(st.builds(nn.position_embedding), steps, free=("P",)),
    "rnn": recurrent(nn.rnn),
    "gru": recurrent(nn.gru),
    "lstm": recurrent(nn.lstm),
    "attention": Entry(attentions(), optional=()),
    "conv2d": of(convolutions(), images, free=("W",)),
    "conv2d_transpose": of(convolutions(nn.conv2d_transpose), images),
    "max_pool2d": of(pools(nn.max_pool2d), images, nan=()),
    "avg_pool2d": of(pools(nn.avg_pool2d), images),
    "global_avg_pool2d": of(st.builds(nn.global_avg_pool2d), images),
    "upsample2d": of(pairs(1, 3).map(nn.upsample2d), images),
    "sequential": of(st.builds(network, sizes), features),
    "residual": of(st.builds(bottleneck, sizes), features),
    "concatenate": Entry(
        st.one_of(
            st.tuples(
                st.builds(several_branches, sizes, st.sampled_from([-1, 2])),
                st.tuples(sizes, sizes),
            ),
            st.tuples(
                st.builds(several_inputs, sizes),
                st.fixed_dictionaries({"wide": st.tuples(sizes, sizes), "deep": st.tuples(sizes)}),
            ),
        )
    ),
    "heads": of(st.builds(several_outputs, sizes), st.tuples(sizes, st.just(3))),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def leaves(tree, path=""):
    """{path: leaf} of an array or of a tree; None, the dx of whole numbers, is no leaf."""
    if not isinstance(tree, dict):
        return {} if tree is None else {path: tree}
    parts = (leaves(value, f"{path}/{name}" if path else name) for name, value in tree.items())
    return {path: leaf for part in parts for path, leaf in part.items()}


def shapes(tree):
    return {path: leaf.shape for path, leaf in leaves(tree).items()}


def with_values(params, seed):
    """params whose entries are all random, so that no bias is 0 and no gamma 1; var > 0."""
    flat = nn.tree_flatten(params)
    rng = np.random.default_rng(seed)
    for path, entry in flat.items():
        values = rng.normal(size=entry.shape).astype(entry.dtype)
        flat[path] = np.abs(values) + entry.dtype.type(0.5) if path.endswith("var") else values
    return nn.tree_unflatten(flat)


def map_floats(function, tree):
    """A tree of whose leaves those that hold floats went through a function."""
    return nn.tree_map(lambda a: function(a) if a.dtype.kind == "f" else a, tree)


def as_dtype(tree, dtype):
    return map_floats(lambda a: a.astype(dtype), tree)


def statistics(cache):
    """The paths of the running statistics, as the cache of forward lists them."""
    paths = (path.split("/") for path in leaves(cache))
    return {
        "/".join(p for p in path if p != "statistics") for path in paths if "statistics" in path
    }


def draws_from_its_key(layer, params, x):
    many = nn.tree_map(lambda a: np.repeat(a, 50, axis=0), x)
    outputs = (layer.forward(nn.training(params, key), many)[0] for key in range(3))
    return len({tuple(all_bytes(y)) for y in outputs}) > 1


class Case(NamedTuple):
    """A layer with everything that its functions take."""

    layer: Any
    params: Any
    x: Any
    y_shape: Any  # what init said, with the batch
    shape: Any  # of one sample
    dtype: np.dtype  # of x, or of params where x holds whole numbers


@st.composite
def cases(draw, name, dtypes=(np.float32, np.float64), least=1, modes=(False, True)):
    """A case of one layer, in one dtype, training or not."""
    entry = LAYERS[name]
    (layer, shape), seed = draw(entry.samples), draw(st.integers(0, 10**6))
    dtype, in_training = np.dtype(draw(st.sampled_from(dtypes))), draw(st.sampled_from(modes))
    params, out = layer.init(seed, shape)
    params = as_dtype(with_values(params, seed), dtype)

    def values(batch):
        rng = np.random.default_rng(seed)
        return as_dtype(nn.tree_map(lambda sample: entry.x(rng, (batch, *sample)), shape), dtype)

    if statistics(layer.forward(params, values(1))[1]):
        least = max(least, 2)
    batch = draw(st.integers(least, 5))
    y_shape = nn.tree_map(lambda sample: (batch, *sample), out)
    params = nn.training(params, seed) if in_training else params
    return Case(layer, params, values(batch), y_shape, shape, dtype)


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
    """A copy of an array or a tree whose arrays cannot be written to."""

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
        for tree in trees
        for path, leaf in sorted(leaves(tree).items())
    ]


def upstream(y, seed=7):
    """A random gradient for y."""
    rng = np.random.default_rng(seed)
    return nn.tree_map(lambda a: rng.normal(size=a.shape).astype(a.dtype), y)


def both_ways(layer, params, x):
    """Every bit of a forward and a backward pass."""
    y, cache = layer.forward(params, x)
    return all_bytes(y, cache, *layer.backward(params, cache, upstream(y)))


def numeric_gradient(function, array, step=1e-5):
    """Central differences of a scalar function for every entry of an array."""
    gradient = np.zeros(array.shape)
    for index in np.ndindex(array.shape):
        higher, lower = array.copy(), array.copy()
        higher[index] += step
        lower[index] -= step
        gradient[index] = (function(higher) - function(lower)) / (2 * step)
    return gradient


def peak_memory(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def assert_close(actual, expected, rtol, atol):
    actual, expected = leaves(actual), leaves(expected)
    assert actual.keys() == expected.keys()
    for path, leaf in actual.items():
        np.testing.assert_allclose(leaf, expected[path], rtol=rtol, atol=atol)


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextlib.contextmanager
def in_short_turns(threads):
    """A pool of threads that take turns in the middle of everything."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool
    finally:
        sys.setswitchinterval(interval)


@every_layer
@given(data=st.data())
def test_results_have_the_shapes_dtypes_and_names_of_what_they_belong_to(name, data):
    case = data.draw(cases(name))
    y, cache = case.layer.forward(case.params, case.x)
    dx, grads = case.layer.backward(case.params, cache, upstream(y))
    assert shapes(y) == leaves(case.y_shape)
    inputs = {path: leaf for path, leaf in leaves(case.x).items() if leaf.dtype.kind == "f"}
    entries = [path for path in nn.tree_flatten(case.params) if path.split("/")[-1] != "key"]
    trained = [path for path in entries if path not in statistics(cache)]
    assert leaves(dx).keys() == inputs.keys()
    assert list(nn.tree_flatten(grads)) == trained
    inputs |= nn.tree_flatten(case.params)
    for path, gradient in {**leaves(dx), **nn.tree_flatten(grads)}.items():
        assert gradient.shape == inputs[path].shape
    assert {leaf.dtype for tree in (y, dx, grads) for leaf in leaves(tree).values()} == {case.dtype}


@every_layer
@settings(max_examples=6)
@given(data=st.data())
def test_y_and_dx_have_the_dtype_of_x_whatever_that_of_params_and_dy(name, data):
    case = data.draw(cases(name, dtypes=[np.float64]))
    if any(leaf.dtype.kind != "f" for leaf in leaves(case.x).values()):
        return  # then they have that of params
    for dtype, other in ((np.float64, np.float32), (np.float32, np.float64)):
        params = as_dtype(case.params, other)
        y, cache = case.layer.forward(params, as_dtype(case.x, dtype))
        dx, _ = case.layer.backward(params, cache, as_dtype(upstream(y), other))
        assert {leaf.dtype for tree in (y, dx) for leaf in leaves(tree).values()} == {
            np.dtype(dtype)
        }


@every_layer
@settings(max_examples=9)
@given(data=st.data())
def test_gradients_are_those_of_central_differences(name, data):
    layer, params, x, *_ = data.draw(cases(name, dtypes=[np.float64]))
    y, cache = layer.forward(params, x)
    r = upstream(y)
    dx, grads = layer.backward(params, cache, r)
    inputs = nn.tree_flatten({"params": params, "x": x})
    for path, gradient in leaves({"params": grads, "x": dx}).items():

        def loss(array, path=path):
            moved = nn.tree_unflatten({**inputs, path: array})
            y, _ = layer.forward(moved.get("params", {}), moved["x"])
            return sum((leaf * leaves(r)[name]).sum() for name, leaf in leaves(y).items())

        numeric = numeric_gradient(loss, inputs[path])
        tolerance = 1e-6 * max(1, np.abs(numeric).max())
        np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=tolerance)


@every_layer
@settings(max_examples=4)
@given(data=st.data())
def test_check_gradients_agrees(name, data):
    layer, params, x, *_ = data.draw(cases(name))
    nn.check_gradients(layer, params, x)


@every_layer
@given(data=st.data())
def test_nothing_is_written_to_and_the_same_call_gives_the_same_bits(name, data):
    case = data.draw(cases(name))
    layer, params, x = case.layer, frozen(case.params), frozen(case.x)
    before = all_bytes(params, x)
    y, cache = layer.forward(params, x)
    dy, cache = frozen(upstream(y)), frozen(cache)
    seen = all_bytes(cache)
    results = all_bytes(*layer.backward(params, cache, dy))
    copy = pickle.loads(pickle.dumps(layer))
    for again in (layer, copy):
        assert all_bytes(*again.forward(params=params, x=x)) == all_bytes(y, cache)
        assert all_bytes(*again.backward(params=params, cache=cache, dy=dy)) == results
    assert all_bytes(params, x) == before
    assert all_bytes(cache) == seen
    assert all_bytes(copy.init(3, case.shape)[0]) == all_bytes(
        layer.init(key=3, shape=case.shape)[0]
    )


@every_layer
@settings(max_examples=2)
@given(data=st.data())
def test_a_layer_in_several_threads_gives_the_bits_of_one(name, data):
    layer, params, x, *_ = data.draw(cases(name))
    batches = [map_floats(lambda a, n=n: a * a.dtype.type(n), x) for n in (1, 2, 3, 4)] * 3
    with in_short_turns(4) as pool:
        together = list(pool.map(partial(both_ways, layer, params), batches))
    assert together == [both_ways(layer, params, batch) for batch in batches]


@every_layer
@given(data=st.data(), order=st.sampled_from(ORDERS))
def test_memory_order_is_irrelevant(name, data, order):
    layer, params, x, *_, dtype = data.draw(cases(name))

    def results(reorder):
        moved = map_floats(reorder, params)
        y, cache = layer.forward(moved, nn.tree_map(reorder, x))
        dx, grads = layer.backward(moved, cache, nn.tree_map(reorder, upstream(y)))
        return {"y": y, "dx": dx, "grads": grads}

    reordered = results(lambda a: in_order(a, order) if a.ndim else a)
    tolerance = 1e-4 if dtype == np.float32 else 1e-10
    assert_close(reordered, results(lambda a: a), rtol=tolerance, atol=tolerance)


@every_layer
@given(data=st.data())
def test_the_gradient_of_a_batch_is_the_sum_over_its_parts(name, data):
    layer, params, x, *_ = data.draw(cases(name, dtypes=[np.float64], least=2))
    y, cache = layer.forward(params, x)
    if statistics(cache) or draws_from_its_key(layer, params, x):
        # While training, a sample then depends on the others or on its place in the batch.
        params = {entry: value for entry, value in params.items() if entry != "key"}
        y, cache = layer.forward(params, x)
    dy = upstream(y)
    dx, grads = layer.backward(params, cache, dy)
    total = {}
    for part in (slice(0, 1), slice(1, None)):
        of_part = partial(nn.tree_map, lambda a, part=part: a if a is None else a[part])
        y_part, cache = layer.forward(params, of_part(x))
        dx_part, grads_part = layer.backward(params, cache, of_part(dy))
        assert_close(y_part, of_part(y), rtol=1e-10, atol=1e-12)
        assert_close(dx_part, of_part(dx), rtol=1e-9, atol=1e-11)
        total = nn.tree_add(total, grads_part)
    assert_close(total, grads, rtol=1e-9, atol=1e-11)


@every_layer
@settings(max_examples=6)
@given(data=st.data())
def test_init_is_pure_and_float32_and_depends_on_its_key(name, data):
    layer, shape = data.draw(LAYERS[name].samples)
    params, out = layer.init((1, 2), shape)
    assert all_bytes(layer.init((1, 2), nn.tree_map(list, shape))[0]) == all_bytes(params)
    assert all(isinstance(one, tuple) for one in leaves(out).values())
    other = nn.tree_flatten(layer.init((2, 1), shape)[0])
    for path, leaf in nn.tree_flatten(params).items():
        assert leaf.dtype == np.float32
        assert leaf.size < 2 or set(leaf.ravel()) <= {0, 1} or not np.array_equal(leaf, other[path])


@every_layer
@settings(max_examples=4)
@given(data=st.data())
def test_an_empty_batch_passes_at_inference(name, data):
    layer, params, x, y_shape, *_ = data.draw(cases(name, modes=[False]))
    nothing = nn.tree_map(lambda a: a[:0], x)
    y, cache = layer.forward(params, nothing)
    dx, grads = layer.backward(params, cache, y)
    assert shapes(y) == {path: (0, *shape[1:]) for path, shape in leaves(y_shape).items()}
    for path, leaf in leaves(dx).items():
        assert leaf.shape == leaves(nothing)[path].shape
    assert not any(leaf.any() for leaf in leaves(grads).values())


@every_layer
@settings(max_examples=6)
@given(data=st.data())
def test_leaving_out_dx_leaves_the_grads_as_they_are(name, data):
    layer, params, x, *_ = data.draw(cases(name))

    def loss(y, target):
        return 0.0, upstream(y)

    y, cache = layer.forward(params, x)
    _, grads = layer.backward(params, cache, upstream(y))
    assert all_bytes(nn.value_and_grad(layer, loss)(params, x, None)[1]) == all_bytes(grads)


# ------------------------------------------------------------------------------------------------
# Layers against their formulas
# ------------------------------------------------------------------------------------------------

FORMULAS = {  # name: (layer, formula, y at -10,000 and at 10,000 and the slopes there)
    "identity": (nn.identity(), lambda x: x, (-1e4, 1e4, 1, 1)),
    "relu": (nn.relu(), lambda x: max(x, 0.0), (0, 1e4, 0, 1)),
    "leaky_relu": (nn.leaky_relu(), lambda x: max(x, 0.01 * x), (-1e2, 1e4, 0.01, 1)),
    "leaky_relu(0.3)": (nn.leaky_relu(0.3), lambda x: max(x, 0.3 * x), (-3e3, 1e4, 0.3, 1)),
    "elu": (nn.elu(), lambda x: x if x > 0 else math.exp(x) - 1, (-1, 1e4, 0, 1)),
    "elu(2)": (nn.elu(2), lambda x: x if x > 0 else 2 * (math.exp(x) - 1), (-2, 1e4, 0, 1)),
    "sigmoid": (nn.sigmoid(), lambda x: 1 / (1 + math.exp(-x)), (0, 1, 0, 0)),
    "tanh": (nn.tanh(), math.tanh, (-1, 1, 0, 0)),
    "softplus": (nn.softplus(), lambda x: math.log(1 + math.exp(x)), (0, 1e4, 0, 1)),
    "gelu": (
        nn.gelu(),
        lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        (0, 1e4, 0, 1),
    ),
    "gelu(exact)": (
        nn.gelu(exact=True),
        lambda x: x / 2 * math.erfc(-x / math.sqrt(2)),
        (0, 1e4, 0, 1),
    ),
    "silu": (nn.silu(), lambda x: x / (1 + math.exp(-x)), (0, 1e4, 0, 1)),
}


@pytest.mark.parametrize("name", FORMULAS)
@given(x=st.lists(st.floats(-20, 20), min_size=1, max_size=6))
def test_activations_are_their_formulas(name, x):
    layer, formula, _ = FORMULAS[name]
    y, _ = layer.forward({}, np.array(x))
    np.testing.assert_allclose(y, [formula(value) for value in x], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.usefixtures("no_warnings")
def test_activations_are_right_at_large_inputs_without_a_warning(name, dtype):
    layer, _, limits = FORMULAS[name]
    y, cache = layer.forward({}, np.array([-1e4, 1e4], dtype))
    dx, _ = layer.backward({}, cache, np.ones(2, dtype))
    np.testing.assert_allclose([*y, *dx], limits, rtol=1e-6)
    y, cache = layer.forward({}, np.array([-1e30, 1e30], dtype))
    dx, _ = layer.backward({}, cache, np.ones(2, dtype))
    np.testing.assert_allclose(dx, limits[2:], rtol=1e-6)
    assert np.isfinite(y).all()


NORMAL_DISTRIBUTION = {  # by mpmath with 40 digits
    -37.25: 5.2978887799272688403e-304, -30.1: 2.4226672179857587657e-199,
    -20.7: 1.731851879019737858e-95, -12.3: 4.5287069561587846514e-35,
    -7.7: 6.8033115407739613184e-15, -5.1: 1.6982674071476014616e-7,
    -3.3: 0.0004834241423837775071, -2.2: 0.013903447513498604313, -1.1: 0.13566606094638265582,
    -0.7: 0.24196365222307302862, -0.18: 0.42857628409909927816, -1e-3: 0.49960105778608893741,
    1e-3: 0.50039894221391106259, 0.7: 0.75803634777692697138, 1.1: 0.86433393905361734418,
    2.2: 0.98609655248650139569, 3.3: 0.99951657585761622249, 8.5: 0.99999999999999999052,
}  # fmt: skip


def test_exact_gelu_is_right_far_out_and_at_infinity():
    layer = nn.gelu(exact=True)
    x, phi = map(np.array, zip(*NORMAL_DISTRIBUTION.items(), strict=True))
    y, cache = layer.forward({}, x)
    np.testing.assert_allclose(y, x * phi, rtol=1e-12)
    dx, _ = layer.backward({}, cache, np.ones_like(x))
    slopes = phi + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(dx, slopes, rtol=1e-12)
    y32, _ = layer.forward({}, x.astype(np.float32))
    np.testing.assert_allclose(y32[x > -12], y[x > -12], rtol=4e-6)
    for dtype in (np.float32, np.float64):
        y, cache = layer.forward({}, np.array([-math.inf, math.inf, math.nan, 0], dtype))
        dx, _ = layer.backward({}, cache, np.ones(4, dtype))
        np.testing.assert_array_equal(y, [0, math.inf, math.nan, 0])
        np.testing.assert_array_equal(dx, [0, 1, math.nan, 0.5])


def test_slopes_at_a_kink_are_those_of_the_left():
    zero = np.zeros((1, 1))
    for layer, slope in ((nn.relu(), 0), (nn.leaky_relu(0.3), 0.3), (nn.elu(2), 2)):
        _, cache = layer.forward({}, zero)
        assert layer.backward({}, cache, np.ones((1, 1)))[0] == slope
    nothing_through = nn.relu_backward({}, np.array([[math.nan]]), np.ones((1, 1)))[0]
    assert nothing_through == 0


@given(
    x=st.lists(st.floats(-30, 30), min_size=1, max_size=6), shift=st.sampled_from([0.0, 1e4, -1e4])
)
def test_softmaxes_are_their_formulas_wherever_the_logits_lie(x, shift):
    total = math.fsum(math.exp(value - max(x)) for value in x)
    expected = [math.exp(value - max(x)) / total for value in x]
    logits = np.array([x]) + shift
    y, _ = nn.softmax().forward({}, logits)
    np.testing.assert_allclose(y[0], expected, rtol=1e-9)
    y, _ = nn.log_softmax().forward({}, logits)
    np.testing.assert_allclose(y[0], np.log(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("no_warnings")
def test_softmaxes_at_large_logits_give_no_warning():
    logits = np.array([[1e4, -1e4, 0]], np.float32)
    for layer, expected in ((nn.softmax(), [1, 0, 0]), (nn.log_softmax(), [0, -2e4, -1e4])):
        y, cache = layer.forward({}, logits)
        np.testing.assert_array_equal(y, [expected])
        assert np.isfinite(layer.backward({}, cache, np.ones((1, 3), np.float32))[0]).all()


@given(data=st.data())
def test_linear_is_a_sum_over_features(data):
    layer, params, x, *_ = data.draw(cases("linear", dtypes=[np.float64]))
    y, cache = layer.forward(params, x)
    _, grads = layer.backward(params, cache, y)
    expected, dW = np.zeros(y.shape), np.zeros_like(params["W"])
    for index in np.ndindex(y.shape):
        *sample, unit = index
        for feature in range(x.shape[-1]):
            expected[index] += x[tuple(sample)][feature] * params["W"][feature, unit]
            dW[feature, unit] += x[tuple(sample)][feature] * y[index]
        expected[index] += params["b"][unit] if "b" in params else 0
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(grads["W"], dW, rtol=1e-10, atol=1e-12)
    if "b" in params:
        np.testing.assert_allclose(grads["b"], y.reshape(-1, y.shape[-1]).sum(axis=0), atol=1e-12)


WEIGHTED = {  # name: (constructor of 4 units that takes options, a shape it takes, shape of its W)
    "linear": (partial(nn.linear, 4), (7, 3), (3, 4)),
    "conv1d": (partial(nn.conv1d, 4, 3, groups=2), (6, 5), (4, 3, 3)),
    "conv2d": (partial(nn.conv2d, 4, (3, 2), groups=2), (6, 5, 5), (4, 3, 3, 2)),
    "conv2d_transpose": (
        partial(nn.conv2d_transpose, 4, (3, 2), groups=2),
        (6, 5, 5),
        (6, 2, 3, 2),
    ),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_start_with_their_initializer_and_biases_with_0(name):
    constructor, shape, of_W = WEIGHTED[name]
    params, _ = constructor(init=nn.constant(2.5)).init(0, shape)
    np.testing.assert_array_equal(params["W"], np.full(of_W, 2.5))
    np.testing.assert_array_equal(params["b"], np.zeros(4))
    assert list(constructor(bias=False).init(0, shape)[0]) == ["W"]
    default = constructor().init(5, shape)[0]["W"]
    np.testing.assert_array_equal(default, nn.he_normal(nn.fold_key(5, 0), of_W))
    for wrong in ((*of_W, 1), (of_W[0] + 1, *of_W[1:]), ()):
        layer = constructor(init=lambda key, _, wrong=wrong: np.zeros(wrong))
        words = re.escape(f"{name}: init returned shape {wrong}, expected {of_W}")
        with pytest.raises(ValueError, match=f"^{words}$"):
            layer.init(0, shape)


@given(shape=any_shape, batch=st.integers(0, 4), order=st.sampled_from(ORDERS))
def test_flatten_keeps_c_order(shape, batch, order):
    x = np.arange(batch * math.prod(shape), dtype=np.float64).reshape(batch, *shape)
    y, cache = nn.flatten().forward({}, in_order(x, order) if batch else x)
    np.testing.assert_array_equal(y, np.arange(x.size).reshape(batch, math.prod(shape)))
    dx, grads = nn.flatten().backward({}, cache, 2 * y)
    np.testing.assert_array_equal(dx, 2 * x)
    assert grads == {}
    if x.size:
        assert np.shares_memory(nn.flatten().forward({}, x)[0], x)


@given(data=st.data())
def test_shapes_are_changed_as_numpy_does(data):
    layer, params, x, y_shape, *_ = data.draw(cases("reshape"))
    np.testing.assert_array_equal(layer.forward(params, x)[0], x.reshape(y_shape))
    layer, params, x, *_ = data.draw(cases("permute"))
    axes = layer.forward.keywords["axes"]
    y, cache = layer.forward(params, x)
    for index in np.ndindex(x.shape):
        assert y[index[:1] + tuple(index[axis + 1] for axis in axes)] == x[index]
    np.testing.assert_array_equal(layer.backward(params, cache, y)[0], x)
    layer, params, x, *_ = data.draw(cases("last"))
    y, cache = layer.forward(params, x)
    np.testing.assert_array_equal(y, x[:, -1])
    dx, _ = layer.backward(params, cache, y)
    np.testing.assert_array_equal(dx[:, -1], y)
    assert not dx[:, :-1].any()


def test_what_has_the_right_dtype_is_not_copied():
    x, dy = np.ones((2, 3)), np.ones((2, 3))
    assert nn.identity_backward({}, x, dy)[0] is dy
    for dtype in (np.float32, np.float64):
        params = as_dtype(nn.batch_norm().init(0, (3,))[0], dtype)
        found = nn.batch_norm().forward(params, x)[1]["statistics"]
        assert (found["mean"] is params["mean"]) == (dtype == x.dtype)
        assert found["mean"].dtype == x.dtype


def test_a_mapped_file_is_an_array(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6.0).reshape(2, 3))
    x = np.load(tmp_path / "x.npy", mmap_mode="r")
    params, _ = nn.linear(2).init(0, (3,))
    assert both_ways(nn.linear(2), params, x) == both_ways(nn.linear(2), params, np.array(x))


# --- dropout ---


@given(rate=st.sampled_from([0.0, 0.1, 0.5, 0.75]), seed=st.integers(0, 10**6))
def test_dropout_drops_its_share_and_scales_the_rest(rate, seed):
    x = np.full((100, 100), 3.0)
    y, cache = nn.dropout(rate).forward(nn.training({}, seed), x)
    kept = y != 0
    np.testing.assert_allclose(y[kept], 3 / (1 - rate))
    assert abs(kept.mean() - (1 - rate)) <= 5 * math.sqrt(rate * (1 - rate) / x.size)
    dx, _ = nn.dropout(rate).backward({}, cache, 2 * x)
    np.testing.assert_allclose(dx, np.where(kept, 6 / (1 - rate), 0))
    at_inference, cache = nn.dropout(rate).forward({}, x)
    assert at_inference is x
    np.testing.assert_array_equal(nn.dropout(rate).backward({}, cache, 2 * x)[0], 2 * x)


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


# --- normalization ---


@given(data=st.data(), momentum=st.sampled_from([0, 0.3, 1]))
def test_batch_norm_is_its_formula(data, momentum):
    layer, params, x, *_ = data.draw(cases("batch_norm", dtypes=[np.float64]))
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
    if "key" not in params:
        with pytest.raises(ValueError, match="nothing was in training mode"):
            nn.update_statistics(params, cache)
        return
    moved = nn.update_statistics(frozen(params), frozen(cache), momentum)
    assert all_bytes({**moved, "mean": 0 * x, "var": 0 * x}) == all_bytes(
        {**params, "mean": 0 * x, "var": 0 * x}
    )
    axes = (0, 2, 3)[: x.ndim - 1]
    for entry, batch in {"mean": x.mean(axis=axes), "var": x.var(axis=axes, ddof=1)}.items():
        expected = (1 - momentum) * params[entry] + momentum * batch
        np.testing.assert_allclose(moved[entry], expected, rtol=1e-9)
        assert moved[entry].dtype == params[entry].dtype


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), mean=st.sampled_from([0.0, 100.0]))
def test_batch_norm_of_images_is_its_formula_in_float32(seed, mean):
    x = np.random.default_rng(seed).normal(mean, 2, size=(6, 3, 5, 4)).astype(np.float32)
    params = with_values(nn.batch_norm().init(0, (3, 5, 4))[0], seed)
    y, cache = nn.batch_norm().forward(nn.training(params, 0), in_order(x, "rows first"))
    expected, exact = nn.batch_norm().forward(nn.training(params, 0), x.astype(np.float64))
    np.testing.assert_allclose(y, expected, atol=2e-4)
    assert_close(cache["statistics"], exact["statistics"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("constructor", [nn.layer_norm, nn.batch_norm, partial(nn.group_norm, 1)])
def test_normalization_starts_with_gamma_1_beta_0_and_an_eps_of_a_hundred_thousandth(constructor):
    layer = constructor()
    params, shape = layer.init(0, (2,))
    assert (list(params)[:2], shape) == (["gamma", "beta"], (2,))
    x = np.array([[0.002, 0.0], [0.0, 0.002]])  # of variance 1e-6
    y, _ = layer.forward(nn.training(params, 0), x)
    np.testing.assert_allclose(y, (x - 0.001) / math.sqrt(1.1e-5))
    if "mean" in params:
        np.testing.assert_allclose(layer.forward(params, x)[0], x / math.sqrt(1 + 1e-5))


@given(data=st.data())
def test_layer_norm_is_its_formula(data):
    layer, params, x, *_ = data.draw(cases("layer_norm", dtypes=[np.float64]))
    y, _ = layer.forward(params, x)
    eps = layer.forward.keywords["eps"]
    for index in np.ndindex(x.shape[:-1]):
        values = x[index]
        expected = (values - values.mean()) / math.sqrt(values.var() + eps)
        np.testing.assert_allclose(y[index], expected * params["gamma"] + params["beta"], rtol=1e-9)


@given(data=st.data())
def test_group_norm_is_its_formula(data):
    layer, params, x, *_ = data.draw(cases("group_norm", dtypes=[np.float64]))
    y, _ = layer.forward(params, x)
    groups, eps = layer.forward.keywords["groups"], layer.forward.keywords["eps"]
    expected, size = np.zeros_like(x), x.shape[1] // groups
    for n, group in np.ndindex(len(x), groups):
        part = slice(group * size, (group + 1) * size)
        values = x[n, part]
        expected[n, part] = (values - values.mean()) / math.sqrt(values.var() + eps)
    per_channel = (-1, *[1] * (x.ndim - 2))
    gamma, beta = params["gamma"].reshape(per_channel), params["beta"].reshape(per_channel)
    np.testing.assert_allclose(y, expected * gamma + beta, rtol=1e-9, atol=1e-9)


def test_update_statistics_reaches_every_depth_and_leaves_the_rest():
    net = nn.sequential(
        nn.linear(3), block=nn.residual(nn.sequential(nn.batch_norm())), mean=nn.linear(3)
    )
    params, _ = net.init(0, (2,))
    x = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    _, cache = net.forward(nn.training(params, 0), x)
    before, after = nn.tree_flatten(params), nn.tree_flatten(nn.update_statistics(params, cache))
    assert list(after) == list(before)
    changed = {path: after[path] for path in before if after[path] is not before[path]}
    hidden = nn.linear(3).forward(params["0"], x)[0]
    expected = {
        "block/branch/0/mean": 0.1 * hidden.mean(axis=0),
        "block/branch/0/var": 0.9 + 0.1 * hidden.var(axis=0, ddof=1),
    }
    assert_close(changed, expected, rtol=1e-5, atol=0)


def gate_init(key, shape, *, layers):
    """y = value(x) · gate(x), a combinator of a user's own."""
    params, shapes = {}, {}
    for index, (name, layer) in enumerate(layers.items()):
        params[name], shapes[name] = layer.init(nn.fold_key(key, index), shape)
    return params, shapes["value"]


def gate_forward(params, x, *, layers):
    y, cache = {}, {}
    for index, (name, layer) in enumerate(layers.items()):
        own = params[name]
        if "key" in params:
            own = nn.training(own, nn.fold_key(params["key"], index))
        y[name], cache[name] = layer.forward(own, x)
    return y["value"] * y["gate"], {**cache, "y": y}


def gate_backward(params, cache, dy, *, layers):
    y = cache["y"]
    dx1, value = layers["value"].backward(params["value"], cache["value"], dy * y["gate"])
    dx2, gate = layers["gate"].backward(params["gate"], cache["gate"], dy * y["value"])
    return dx1 + dx2, {"value": value, "gate": gate}


def gated(value, gate):
    layers = {"value": value, "gate": gate}
    functions = (gate_init, gate_forward, gate_backward)
    return nn.Layer(*(partial(function, layers=layers) for function in functions))


def with_cache(change, inner):
    """A user's layer that passes params on and keeps the cache of the other within its own."""

    def forward(params, x):
        y, cache = inner.forward(params, x)
        return y, change(cache, x)

    return inner._replace(forward=forward)


AROUND = {  # name: what is built around a sequential(linear(2), batch_norm())
    "a user's": lambda inner: gated(inner, nn.sequential(nn.linear(2))),
    "residual": lambda inner: nn.residual(inner, nn.linear(2)),
    "concatenate": lambda inner: nn.sequential(
        nn.concatenate(a=inner, b=nn.linear(3)), nn.linear(2)
    ),
    "heads": lambda inner: nn.heads(a=inner, b=nn.linear(3)),
    "tuple": partial(with_cache, lambda cache, x: (cache, x)),
    "list in a dict": partial(with_cache, lambda cache, x: {"own": [x, cache]}),
}


@pytest.mark.parametrize("inside", AROUND)
@pytest.mark.parametrize("outside", AROUND)
def test_update_statistics_finds_batch_norm_within_anything(inside, outside):
    inner = AROUND[inside](nn.sequential(nn.linear(2), nn.batch_norm()))
    net = inner if inside == "heads" else AROUND[outside](inner)
    params, _ = net.init(0, (4,))
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    before = nn.tree_flatten(params)

    def gradients(params, x, target):
        return 0.0, {}, net.forward(params, x)[1]

    for function in (gradients, nn.data_parallel(gradients, 1)):
        *_, cache = function(nn.training(params, 0), x, x)
        after = nn.tree_flatten(nn.update_statistics(params, cache, 1.0))
        changed = [path for path in before if after[path] is not before[path]]
        assert [path.split("/")[-1] for path in changed] == ["mean", "var"]
        hidden = x @ before[changed[0].removesuffix("1/mean") + "0/W"]
        np.testing.assert_allclose(after[changed[0]], hidden.mean(axis=0), atol=1e-6)
        with pytest.raises(ValueError, match="nothing was in training mode"):
            nn.update_statistics(params, function(params, x, x)[2])


def test_update_statistics_moves_what_was_in_training_and_shared_params_twice():
    norm = nn.batch_norm()
    net, rng = nn.sequential(norm, norm, nn.linear(2)), np.random.default_rng(0)
    params, _ = net.init(0, (3,))
    x = [rng.normal(size=(5, 3)) for _ in range(2)]
    _, cache = net.forward({**params, "1": nn.training(params["1"], 0)}, x[0])
    moved = nn.update_statistics(params, cache)
    assert moved["0"] is params["0"]
    assert moved["1"]["mean"] is not params["1"]["mean"]
    shared, caches = params["0"], [norm.forward(nn.training(params["0"], 0), part)[1] for part in x]
    expected = nn.update_statistics(nn.update_statistics(shared, caches[0]), caches[1])
    assert all_bytes(nn.update_statistics(shared, caches)) == all_bytes(expected)
    net = nn.sequential(nn.linear(3), nn.dropout(0.5))  # nothing is known of its mode
    params, _ = net.init(0, (3,))
    elsewhere = {"statistics": {"measured": np.ones(1)}}  # of no entry of params: left alone
    for cache in (net.forward(params, x[0])[1], (x[0], x[1]), [], x[0], elsewhere):
        assert nn.update_statistics(params, cache) is params


def test_a_users_combinator_is_right_in_both_modes():
    normed = nn.sequential(nn.linear(3), nn.batch_norm(), nn.dropout(0.2), nn.sigmoid())
    net = nn.sequential(gated(normed, nn.linear(3)), out=nn.linear(2))
    params, _ = net.init(0, (4,))
    for mode in (params, nn.training(params, 1)):
        nn.check_gradients(net, mode, np.random.default_rng(0).normal(size=(6, 4)))


# --- recurrence and attention ---


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def naive_rnn(p, x, h):
    return (np.tanh(x @ p["W"] + p["b"] + h @ p["U"]),)


def naive_gru(p, x, h):
    a_r, a_z, a_n = np.split(x @ p["W"] + p["b"], 3)
    u_r, u_z, u_n = np.split(h @ p["U"] + p["c"], 3)
    z, n = sigmoid(a_z + u_z), np.tanh(a_n + sigmoid(a_r + u_r) * u_n)
    return ((1 - z) * n + z * h,)


def naive_lstm(p, x, h, c):
    i, f, g, o = np.split(x @ p["W"] + p["b"] + h @ p["U"], 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


RECURRENT = {  # name: (one step of one sample, how many states, how many gates)
    "rnn": (naive_rnn, 1, 1),
    "gru": (naive_gru, 1, 3),
    "lstm": (naive_lstm, 2, 4),
}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", RECURRENT)
@given(shape=steps, units=sizes, seed=st.integers(0, 10**6))
def test_recurrent_layers_are_their_formulas_step_by_step(name, reverse, shape, units, seed):
    step, states, _ = RECURRENT[name]
    layer = getattr(nn, name)(units, reverse=reverse)
    params = as_dtype(with_values(layer.init(0, shape)[0], seed), np.float64)
    x = np.random.default_rng(seed).normal(size=(2, *shape))
    y, _ = layer.forward(params, x)
    for sample, expected in zip(x, y, strict=True):
        state = (np.zeros(units),) * states
        for t in range(len(sample))[:: -1 if reverse else 1]:
            state = step(params, sample[t], *state)
            np.testing.assert_allclose(expected[t], state[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_start_orthogonal_without_biases_and_lstm_remembering(name):
    gates = RECURRENT[name][2]
    params, shape = getattr(nn, name)(20).init(1, (7, 5))
    assert shape == (7, 20)
    assert list(params) == ["W", "U", "b", *(["c"] if name == "gru" else [])]
    expected = nn.xavier_uniform(nn.fold_key(1, 0), (5, gates * 20))
    np.testing.assert_array_equal(params["W"], expected)
    for gate, part in enumerate(np.split(params["U"], gates, axis=1)):
        expected = nn.orthogonal(nn.fold_key(1, gate + 1), (20, 20))
        np.testing.assert_array_equal(part, expected)
    b = np.zeros((gates, 20))
    b[1:2] = name == "lstm"
    np.testing.assert_array_equal(params["b"], b.ravel())
    np.testing.assert_array_equal(params.get("c", 0 * b.ravel()), 0 * b.ravel())


@pytest.mark.parametrize("name", [*RECURRENT, "attention"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.usefixtures("no_warnings")
def test_layers_of_sequences_are_finite_at_large_inputs(name, dtype):
    layer = getattr(nn, name)(1)
    params = map_floats(np.ones_like, layer.init(0, (3, 1))[0])
    y, cache = layer.forward(params, np.array([[[1e4], [-1e4], [1e15]]], dtype))
    dx, grads = layer.backward(params, cache, np.ones_like(y))
    assert all(np.isfinite(a).all() for a in leaves({"y": y, "dx": dx, "grads": grads}).values())


@pytest.mark.parametrize("name", [*RECURRENT, "attention"])
def test_sequences_of_float32_are_those_of_float64(name):
    layer, x = getattr(nn, name)(4), np.random.default_rng(0).normal(size=(3, 20, 12))
    params, results = layer.init(0, (20, 12))[0], []
    for kind in ("f4", "f8"):
        y, cache = layer.forward(as_dtype(params, kind), x.astype(kind))
        dx, grads = layer.backward(as_dtype(params, kind), cache, upstream(x[..., :1] + 0 * y))
        results.append({"y": y, "dx": dx, "grads": grads})
    assert_close(*results, rtol=1e-3, atol=5e-5)


@given(index=st.lists(st.integers(0, 4), max_size=40), size=sizes, seed=st.integers(0, 10**6))
def test_the_gradient_of_an_embedding_is_the_sum_over_each_index(index, size, seed):
    x, W = np.array(index, np.uint8), np.asfortranarray(np.zeros((5, size)))
    dy, expected = np.random.default_rng(seed).normal(size=(len(x), size)), np.zeros_like(W)
    for row, gradient in zip(index, dy, strict=True):
        expected[row] += gradient
    dx, grads = nn.embedding(5, size).backward({"W": W}, x, dy)
    assert dx is None
    np.testing.assert_allclose(grads["W"], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["i1", "u1", ">i2", "u2", "i4", "u4", "i8", "u8"])
def test_an_embedding_takes_any_whole_numbers_and_gives_rows_of_w(kind):
    W = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    x = np.array([[99, 0], [3, 99]], kind)
    y, cache = nn.embedding(100, 3).forward({"W": W}, x)
    np.testing.assert_array_equal(y, [[W[99], W[0]], [W[3], W[99]]])
    dW = nn.embedding(100, 3).backward({"W": W}, cache, np.ones((2, 2, 3)))[1]["W"]
    assert (y.dtype, dW.dtype) == (np.float32, np.float32)
    np.testing.assert_array_equal(dW[:, 0], np.bincount(x.ravel().astype(int), minlength=100))


def test_embeddings_start_normal():
    params, shape = nn.embedding(200, 300).init(2, (4, 5))
    assert shape == (4, 5, 300)
    expected = nn.normal(1.0)(nn.fold_key(2, 0), (200, 300))
    np.testing.assert_array_equal(params["W"], expected)
    assert nn.embedding(7, 3).init(0, ())[1] == (3,)
    params, shape = nn.position_embedding().init(2, (200, 300))
    assert shape == (200, 300)
    np.testing.assert_allclose(params["P"], 0.02 * expected, rtol=1e-6)


def test_a_shorter_sequence_takes_the_first_positions():
    P = np.arange(8.0).reshape(4, 2)
    y, cache = nn.position_embedding().forward({"P": P}, np.ones((3, 2, 2)))
    np.testing.assert_array_equal(y, np.broadcast_to(1 + P[:2], (3, 2, 2)))
    dx, grads = nn.position_embedding().backward({"P": P}, cache, y)
    np.testing.assert_array_equal(dx, y)
    np.testing.assert_array_equal(grads["P"], np.concatenate([3 * (1 + P[:2]), 0 * P[:2]]))


@given(data=st.data(), scale=st.sampled_from([1, 30]))
def test_attention_is_a_loop_over_heads_and_steps(data, scale):
    layer, params, x, *_ = data.draw(cases("attention", dtypes=[np.float64]))
    options, x = layer.forward.keywords, scale * x
    (N, T, D), heads = x.shape, options["heads"]
    y, _ = layer.forward(params, x)
    for n in range(N):
        q, k, v = np.split(x[n] @ params["qkv"]["W"] + params["qkv"]["b"], 3, axis=1)
        mixed = np.zeros((T, D))
        for columns in np.split(np.arange(D), heads):
            for t in range(T):
                seen = slice(0, t + 1) if options["causal"] else slice(None)
                score = k[seen][:, columns] @ q[t, columns] / math.sqrt(D / heads)
                score = np.exp(score - score.max())
                mixed[t, columns] = score / score.sum() @ v[seen][:, columns]
        expected = mixed @ params["out"]["W"] + params["out"]["b"]
        np.testing.assert_allclose(y[n], expected, rtol=1e-8, atol=1e-8)


def test_attention_starts_as_pytorchs_does():
    params, shape = nn.attention(2).init(3, (7, 40))
    assert (shape, list(params)) == ((7, 40), ["qkv", "out"])
    for index, (name, width) in enumerate({"qkv": 120, "out": 40}.items()):
        key = nn.fold_key(nn.fold_key(3, index), 0)
        np.testing.assert_array_equal(params[name]["W"], nn.xavier_uniform(key, (40, width)))
        np.testing.assert_array_equal(params[name]["b"], np.zeros(width))


@pytest.mark.parametrize("largest", [49.9, 50.1, 1e4])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_attention_is_right_at_scores_of_any_size(largest, sign, dtype):
    identity = {"W": np.eye(1, dtype=dtype), "b": np.zeros(1, dtype)}
    qkv = {"W": np.array([[sign, 1, 1]], dtype), "b": np.zeros(3, dtype)}
    x = np.sqrt(np.array([[[0.5 * largest], [0.99 * largest], [largest]]], dtype))
    all_scores = sign * x[0] @ x[0].T
    for causal in (False, True):
        layer = nn.attention(1, causal=causal)
        y, cache = layer.forward({"qkv": qkv, "out": identity}, x)
        scores = np.where(np.tri(3) > 0, all_scores, -np.inf) if causal else all_scores
        expected = nn.softmax().forward({}, scores)[0] @ x[0]
        np.testing.assert_allclose(y[0], expected, rtol=1e-12 if dtype == np.float64 else 1e-2)
        assert np.isfinite(layer.backward({"qkv": qkv, "out": identity}, cache, y)[0]).all()


@pytest.mark.parametrize("largest", [49.9, 50.0, 50.1, -49.9, -50.0, -50.1])
def test_attention_takes_the_maximum_off_its_scores_only_where_they_are_large(largest):
    identity = {"W": np.eye(1), "b": np.zeros(1)}
    x, qkv = np.array([[[1.0], [0.7]]]), {"W": np.array([[largest, 1, 1]]), "b": np.zeros(3)}
    _, cache = nn.attention(1).forward({"qkv": qkv, "out": identity}, x)
    scores = x[0] @ (largest * x[0]).T  # a column for each step
    p = np.exp(scores - scores.max(axis=0) if abs(largest) >= 50 else scores)
    np.testing.assert_array_equal(cache["p"][0, 0], p / p.sum(axis=0))


PEERS = {  # name: (layer, its peer in PyTorch, x, {path of a gradient: the peer's name})
    **{
        f"{name}{end}": (
            getattr(nn, name)(6, reverse=bool(end)),
            lambda torch, name=name: getattr(torch.nn, name.upper())(
                3, 6, batch_first=True, bidirectional=True
            ),
            {path: f"{own}_l0{end}" for path, own in names.items() if path != "c" or name == "gru"},
        )
        for names in [{"W": "weight_ih", "U": "weight_hh", "b": "bias_ih", "c": "bias_hh"}]
        for name in RECURRENT
        for end in ("", "_reverse")
    },
    **{
        name: (
            nn.attention(3, causal=name == "causal"),
            lambda torch: torch.nn.MultiheadAttention(3, 3, batch_first=True),
            {"qkv/W": "in_proj_weight", "qkv/b": "in_proj_bias",
             "out/W": "out_proj.weight", "out/b": "out_proj.bias"},
        )
        for name in ("attention", "causal")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PEERS)
def test_layers_of_sequences_are_those_of_pytorch(name):
    torch = pytest.importorskip("torch")
    layer, make, names = PEERS[name]
    peer, x = make(torch).double(), np.random.default_rng(0).normal(size=(4, 5, 3))
    params = as_dtype(with_values(layer.init(0, (5, 3))[0], 1), np.float64)
    own, flat = dict(peer.named_parameters()), nn.tree_flatten(params)
    with torch.no_grad():
        for entry in own.values():
            entry[...] = 0
        for path, its in names.items():
            own[its][...] = torch.from_numpy(np.ascontiguousarray(flat[path].T))
    given = torch.from_numpy(x).requires_grad_()
    if name in ("attention", "causal"):
        later = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
        expected = peer(given, given, given, attn_mask=later if name == "causal" else None)[0]
    else:
        expected = peer(given)[0][..., slice(6, 12) if name.endswith("reverse") else slice(6)]
    y, cache = layer.forward(params, x)
    dx, grads = layer.backward(params, cache, upstream(y))
    expected.backward(torch.from_numpy(upstream(y)))
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(dx, given.grad.numpy(), rtol=1e-10, atol=1e-10)
    for path, gradient in nn.tree_flatten(grads).items():
        expected = own[names[path]].grad.numpy().T
        np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------
# Convolution and pooling against loops
# ------------------------------------------------------------------------------------------------


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
    shape=st.tuples(st.sampled_from([1, 2, 40]), st.integers(4, 12), st.integers(4, 12)),
    dtype=st.sampled_from([np.float32, np.float64]),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 1000),
)
def test_conv2d_is_a_loop_over_windows(options, kernel, channels, shape, dtype, order, seed):
    layer = nn.conv2d(channels[0] * options["groups"], kernel, **options)
    sample = (channels[1] * options["groups"], *shape[1:])
    moves = {name: options[name] for name in ("stride", "padding", "dilation")}
    if not places(sample[1:], kernel, **moves):
        words = r"^conv2d: the window covers \d+ x \d+ pixels, but the padded image has \d+ x \d+$"
        with pytest.raises(ValueError, match=words):
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
    alone = layer.backward(params, cache, dy, need_dx=False)[1]
    np.testing.assert_array_equal(alone["W"], grads["W"])
    assert layer.backward(params, cache, dy, need_dx=False)[0] is None


@settings(max_examples=40)
@given(layer=convolutions(nn.conv1d), batch=st.sampled_from([1, 3, 40]), steps=st.integers(3, 9))
def test_conv1d_is_conv2d_on_an_image_of_one_row(layer, batch, steps):
    moves = layer.forward.keywords["moves"]
    padding, taps = moves["padding"][0], layer.init.keywords["kernel"][0]
    if steps + sum(padding) < moves["dilation"][0] * (taps - 1) + 1:
        with pytest.raises(ValueError, match=f"the padded sequence has {steps + sum(padding)}$"):
            layer.init(0, (2, steps))
        return
    params, (out, length) = layer.init(0, (2, steps))
    rng = np.random.default_rng(steps)
    params, x = with_values(params, 1), rng.normal(size=(batch, 2, steps))
    y, cache = layer.forward(params, x)
    dy = rng.normal(size=y.shape)
    dx, grads = layer.backward(params, cache, dy)
    groups = layer.forward.keywords["groups"]
    options = {name: (1, *moves[name]) for name in ("stride", "dilation")}
    flat = nn.conv2d(out, (1, taps), groups=groups, **options)
    image = {**params, "W": params["W"][:, :, None]}
    wide = np.pad(x, ((0, 0), (0, 0), padding))[:, :, None]
    y2, cache = flat.forward(image, wide)
    dx2, grads2 = flat.backward(image, cache, dy[:, :, None])
    assert_close(y, y2[:, :, 0], 1e-10, 1e-10)
    assert_close(dx, dx2[:, :, 0, padding[0] : padding[0] + steps], 1e-10, 1e-10)
    assert_close(grads, {**grads2, "W": grads2["W"][:, :, 0]}, 1e-10, 1e-10)
    assert y.shape == (batch, out, length)


@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (2, 1), (3, 2)])
def test_a_causal_convolution_sees_no_later_step_and_the_same_one_keeps_the_length(
    kernel, dilation
):
    x = np.random.default_rng(0).normal(size=(1, 2, 9))
    for padding in ("causal", "same"):
        layer = nn.conv1d(3, kernel, dilation=dilation, padding=padding)
        params, shape = layer.init(0, (2, 9))
        y, cache = layer.forward(params, x)
        assert y.shape[1:] == shape == (3, 9)
        dy = np.zeros_like(y)
        dy[:, :, 4] = 1
        seen = np.flatnonzero(layer.backward(params, cache, dy)[0][0, 0])
        right = 0 if padding == "causal" else dilation * (kernel - 1) - dilation * (kernel - 1) // 2
        assert list(seen) == list(range(4 + right - dilation * (kernel - 1), 5 + right, dilation))


@settings(max_examples=60)
@given(
    layer=convolutions(nn.conv2d_transpose),
    batch=st.sampled_from([1, 3, 40]),
    image=st.tuples(st.integers(1, 6), st.integers(1, 6)),
)
def test_conv2d_transpose_is_the_adjoint_of_conv2d(layer, batch, image):
    moves = layer.forward.keywords["moves"]
    size, stride, dilation = layer.init.keywords["kernel"], moves["stride"], moves["dilation"]
    lengths = [
        (n - 1) * s - sum(sides) + d * (k - 1) + 1 + e
        for n, s, sides, d, k, e in zip(
            image, stride, moves["padding"], dilation, size, moves["output_padding"], strict=True
        )
    ]
    if min(lengths) < 1:
        with pytest.raises(ValueError, match=f"y would have {lengths[0]} x {lengths[1]} pixels$"):
            layer.init(0, (2, *image))
        return
    params, shape = layer.init(0, (2, *image))
    rng, groups = np.random.default_rng(0), layer.forward.keywords["groups"]
    params, x = with_values(params, 1), rng.normal(size=(batch, 2, *image))
    y, cache = layer.forward(params, x)
    assert y.shape[1:] == shape == (params["W"].shape[1] * groups, *lengths)
    dy = rng.normal(size=y.shape)
    dx, grads = layer.backward(params, cache, dy)
    # Pixels that output_padding adds may fit one more window, which x does not have.
    padding = [sides[0] for sides in moves["padding"]]
    conv = nn.conv2d(2, size, stride=stride, padding=padding, dilation=dilation, groups=groups)
    kernel = {"W": params["W"]}
    back, _ = conv.forward(kernel, dy)
    more = np.zeros_like(back)
    more[:, :, : image[0], : image[1]] = x
    dW = conv.backward(kernel, dy, more)[1]["W"]
    spread = conv.backward(kernel, np.zeros_like(dy), more)[0]
    assert_close(dx, back[:, :, : image[0], : image[1]], 1e-10, 1e-10)
    assert_close(grads["W"], dW, 1e-10, 1e-10)
    if "b" in params:
        spread = spread + params["b"][:, None, None]
        assert_close(grads["b"], dy.sum(axis=(0, 2, 3)), 1e-10, 1e-10)
    assert_close(y, spread, 1e-10, 1e-10)


@pytest.mark.parametrize(
    ("kernel", "size", "padding", "stride"),
    [(7, 2, 3, 1), (5, 2, 2, 2), (1, 1, 1, 3), (3, 5, 1, 5), (3, 4, 3, 3), (1, 4, 2, 8)],
)
def test_a_kernel_may_lie_over_padding_alone(kernel, size, padding, stride):
    loop = test_conv2d_is_a_loop_over_windows.hypothesis.inner_test
    options = {"padding": padding, "stride": stride, "dilation": 1, "groups": 1}
    case = {"kernel": (kernel, kernel), "channels": (1, 1), "shape": (1, size, size)}
    loop(options=options, **case, dtype=np.float64, order="F", seed=0)


@pytest.fixture
def products(monkeypatch):
    """The matrix products that are computed."""
    seen, matmul = [], np.matmul
    monkeypatch.setattr(np, "matmul", lambda *a, **k: (seen.append(a), matmul(*a, **k))[1])
    return seen


def test_rows_of_windows_with_the_same_kernel_rows_are_one_product_and_so_are_narrow_ones(products):
    ranges = range(3, 10), range(1, 6), range(1, 4), range(4)
    for height, kernel, stride, padding in itertools.product(*ranges):
        if height + 2 * padding >= kernel > padding:
            layer = nn.conv2d(1, (kernel, 1), stride=(stride, 1), padding=(padding, 0))
            params, (_, rows, _) = layer.init(0, (1, height, 2))
            tops = [row * stride - padding for row in range(rows)]
            inside = [tuple(t + i in range(height) for i in range(kernel)) for t in tops]
            runs = len(list(itertools.groupby(inside)))
            for batch, expected in ((32, runs), (31, 1)):
                products.clear()
                layer.forward(params, np.ones((batch, 1, height, 2)))
                assert len(products) == expected


def test_as_many_rows_and_groups_are_unfolded_at_a_time_as_fit(products, monkeypatch):
    def count(layer, shape, block):
        monkeypatch.setattr(nn, "_BLOCK", block)
        params, _ = layer.init(0, shape[1:])
        products.clear()
        layer.forward(params, np.ones(shape))
        return len(products)

    for batch, kernel in itertools.product((1, 40), (1, 2)):  # narrow rows and wide ones
        layer, shape = nn.conv2d(1, (kernel, 3)), (batch, 1, 10, 8)
        row = 3 * 6 * batch * 8 * (kernel if batch == 1 else 1)
        for fit in (2, 3, 4, 5):
            step = fit - kernel + 1
            assert count(layer, shape, fit * row) == -(-(11 - kernel) // step)
            assert count(layer, shape, fit * row - 1) == -(-(11 - kernel) // max(1, step - 1))
        assert count(layer, shape, 1) == 11 - kernel
    depthwise, shape = nn.conv2d(6, (1, 3), groups=6), (40, 6, 10, 8)
    group = 3 * 10 * 8 * 40 * 8
    for fit in (2, 3, 4):
        assert count(depthwise, shape, 2 * fit * group) == -(-6 // fit)
        assert count(depthwise, shape, 2 * fit * group - 2) == -(-6 // (fit - 1))


@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize(
    "layer",
    [
        nn.conv2d(4, 3, padding=1),
        nn.conv2d(4, 3, stride=2, padding=2, dilation=2),
        nn.conv2d(4, (3, 2), groups=2, stride=(1, 2)),
        nn.conv2d(6, 3, groups=6, padding=1),
        nn.conv2d_transpose(4, 3, stride=2, groups=2),
    ],
    ids=repr,
)
def test_the_size_of_blocks_changes_only_rounding(monkeypatch, layer, batch):
    params, shape = layer.init(0, (6, 9, 8))
    rng = np.random.default_rng(0)
    params, x = with_values(params, 1), rng.normal(size=(batch, 6, 9, 8))
    dy = rng.normal(size=(batch, *shape))
    results = []
    for block in (1 << 22, 1, 3000, 20_000, 200_000):
        monkeypatch.setattr(nn, "_BLOCK", block)
        y, cache = layer.forward(params, x)
        dx, grads = layer.backward(params, cache, dy)
        results.append({"y": y, "dx": dx, **grads})
    for blocked in results[1:]:
        assert_close(blocked, results[0], 1e-11, 1e-11)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_gradient_of_a_kernel_is_one_product_or_as_many_as_memory_allows(products, groups):
    def backward(batch, size, channels):
        layer = nn.conv2d(channels, 3, groups=groups)
        params, _ = layer.init(0, (channels, *size))
        x = in_order(np.ones((batch, channels, *size), np.float32), "rows first")
        y, cache = layer.forward(params, x)
        return partial(layer.backward, params, cache, y, need_dx=False), x

    few, x = backward(16, (64, 8), 64)  # a kernel of half the size of its image
    assert peak_memory(few) < 10 * x.nbytes
    many, _ = backward(60, (8, 12), 2)
    products.clear()
    many()
    assert len(products) == 1


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

    def results(dtype):
        y, cache = layer.forward(params, x.astype(dtype))
        dx, grads = layer.backward(params, cache, dy.astype(dtype))
        return {"y": y, "dx": dx, **grads}

    single, double = results(np.float32), results(np.float64)
    for entry, exact in double.items():
        assert (single[entry].dtype, exact.dtype) == (np.float32, np.float64)
        assert np.abs(single[entry] - exact).max() < 2e-6 * np.abs(exact).max()


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
    pool = nn.max_pool2d if kind == "max" else nn.avg_pool2d
    layer = pool(size, stride=stride, padding=padding)
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
    stride = size if stride is None else stride
    expected, dexpected = naive_pool2d(x, dy, size, stride, padding, kind)
    np.testing.assert_allclose(y, expected, atol=1e-12)
    np.testing.assert_allclose(dx, dexpected, atol=1e-12)


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


@given(data=st.data(), order=st.sampled_from(ORDERS))
def test_upsample2d_repeats_pixels(data, order):
    layer, params, x, *_ = data.draw(cases("upsample2d", dtypes=[np.float64]))
    down, across = layer.forward.keywords["factor"]
    y, cache = layer.forward(params, in_order(x, order))
    np.testing.assert_array_equal(y, x.repeat(down, axis=2).repeat(across, axis=3))
    dy = upstream(y)
    expected = sum(dy[:, :, i::down, j::across] for i in range(down) for j in range(across))
    np.testing.assert_allclose(layer.backward(params, cache, dy)[0], expected, atol=1e-12)


IMAGE_LAYERS = {
    "conv2d": nn.conv2d(5, 3, padding=1),
    "strided": nn.conv2d(6, 3, stride=2, groups=2),
    "dilated": nn.conv2d(5, 3, dilation=2),
    "max_pool2d": nn.max_pool2d(2),
    "avg_pool2d": nn.avg_pool2d(3, stride=2, padding=1),
    "batch_norm": nn.batch_norm(),
    "group_norm": nn.group_norm(2),
    "upsample2d": nn.upsample2d((2, 3)),
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


def test_layers_of_images_take_what_fits_narrowly():
    assert nn.max_pool2d(6, padding=3).init(0, (1, 1, 1)) == ({}, (1, 1, 1))
    assert nn.conv2d(1, 3, padding="".join(["sa", "me"])).init(0, (1, 4, 4))[1] == (1, 4, 4)
    params, _ = nn.conv2d(1, 1).init(0, (300, 1, 1))
    assert nn.conv2d(1, 1).forward(params, np.ones((1, 300, 1, 1)))[0].shape == (1, 1, 1, 1)
    for layer in (nn.softmax(), nn.log_softmax(), nn.layer_norm()):
        params, _ = layer.init(0, (3,))
        assert layer.forward(params, np.ones((2, 0, 3)))[0].shape == (2, 0, 3)
    two = nn.batch_norm().init(0, (3, 1, 2))[0]
    y, _ = nn.batch_norm().forward(nn.training(two, 0), np.ones((1, 3, 1, 2)))
    assert y.shape == (1, 3, 1, 2)


# ------------------------------------------------------------------------------------------------
# Combinators
# ------------------------------------------------------------------------------------------------


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
    with pytest.raises(TypeError, match=r"params\['out'\] must be a dict, got ndarray"):
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
    words = r"residual: the branch gives \(3,\), but the shortcut \(4,\)"
    with pytest.raises(ValueError, match=words):
        nn.residual(nn.linear(3)).init(0, (4,))
    for size in (1, 5):
        with pytest.raises(ValueError, match=rf"residual: the branch gives \(2, {size}\), but the"):
            nn.residual(nn.linear(size)).forward({"branch": {"W": np.ones((4, size))}}, x)
    assert nn.residual(nn.relu()).init(0, (4,)) == ({}, (4,))


def test_branches_are_named_as_in_sequential_and_have_keys_of_their_own():
    layers = {"0": nn.linear(3), "b": nn.dropout(0.5), "c": nn.dropout(0.5)}
    x = np.random.default_rng(0).normal(size=(5, 4))
    for net in (nn.concatenate(layers["0"], b=layers["b"], c=layers["c"]), nn.heads(**layers)):
        params, shape = net.init(3, (4,))
        assert list(params) == ["0"]
        assert all_bytes(params["0"]) == all_bytes(layers["0"].init(nn.fold_key(3, 0), (4,))[0])
        y, _ = net.forward(nn.training(params, 7), x)
        outputs = {
            name: layer.forward(nn.training(params.get(name, {}), nn.fold_key(7, index)), x)[0]
            for index, (name, layer) in enumerate(layers.items())
        }
        if isinstance(y, dict):
            assert list(y) == list(shape) == list(layers)
            assert all_bytes(y) == all_bytes(outputs)
        else:
            assert shape == (11,)
            np.testing.assert_array_equal(y, np.concatenate(list(outputs.values()), 1))


@given(axis=st.sampled_from([1, 2, 3, -1, -2, -3]), sizes=st.lists(sizes, min_size=1, max_size=3))
def test_concatenate_lies_side_by_side_along_any_axis(axis, sizes):
    net = nn.concatenate(*[nn.tanh()] * len(sizes), axis=axis)
    shapes = {str(i): tuple(size if a == axis % 4 else 2 for a in (1, 2, 3))
              for i, size in enumerate(sizes)}  # fmt: skip
    x = {name: upstream(np.ones((3, *shapes[name])), int(name)) for name in reversed(shapes)}
    assert nn.concatenate(nn.tanh()).init(0, (2, 3)) == ({}, (2, 3))  # axis 1 by default
    y, cache = net.forward({}, x)
    assert net.init(0, shapes) == ({}, y.shape[1:])
    np.testing.assert_array_equal(y, np.concatenate([np.tanh(x[name]) for name in shapes], axis))
    dy = upstream(y)
    dx, _ = net.backward({}, cache, dy)
    parts = np.split(dy * (1 - y * y), np.cumsum(sizes)[:-1], axis)
    assert_close(dx, dict(zip(shapes, parts, strict=True)), rtol=1e-12, atol=0)


def lookup(count, size):
    """An embedding, whose dx is None."""

    def backward(params, x, dy):
        gradient = np.zeros_like(params["W"])
        np.add.at(gradient, x, dy)
        return None, {"W": gradient}

    def init(key, shape):
        return {"W": nn.normal(1.0)(key, (count, size))}, (*shape, size)

    return nn.Layer(init, lambda params, x: (params["W"][x], x), backward)


def test_dx_is_the_sum_of_those_that_are_not_none():
    rng = np.random.default_rng(0)
    x = {"numbers": rng.normal(size=(4, 3, 2)), "words": rng.integers(0, 5, (4, 3))}
    both = nn.concatenate(words=lookup(5, 3), numbers=nn.linear(2), axis=-1)
    other = nn.concatenate(words=lookup(5, 1), numbers=nn.tanh(), axis=2)
    for net in (both, nn.residual(both, both), nn.heads(a=both, b=other, c=nn.heads(a=both))):
        params, _ = net.init(0, {"words": (3,), "numbers": (3, 2)})
        nn.check_gradients(net, params, x)
        y, cache = net.forward(params, x)
        assert leaves(net.backward(params, cache, upstream(y))[0]).keys() == {"numbers"}
    look = lookup(5, 2)
    for net in (
        nn.residual(look, look),
        nn.heads(a=look),
        nn.concatenate(look),
        nn.sequential(look),
    ):
        params, _ = net.init(0, (3,))
        y, cache = net.forward(params, x["words"])
        assert net.backward(params, cache, upstream(y))[0] is None


def test_residual_adds_trees():
    branch = nn.heads(a=nn.linear(2), b=nn.tanh())
    net = nn.sequential(nn.residual(branch, branch), nn.concatenate(b=nn.linear(1), a=nn.relu()))
    params, shape = net.init(0, (3,))
    assert shape == (3,)
    nn.check_gradients(net, params, np.random.default_rng(0).normal(size=(2, 3)))


# --- need_dx: the gradient of the data is left out where nobody wants it ---

ASKED: list = []  # what was said of need_dx to one of the functions below


def takes_keyword_only(params, cache, dy, *, need_dx=True):
    ASKED.append(need_dx)
    return (dy * 3 if need_dx else None), {"w": dy.sum(axis=0)}


def takes_plain(params, cache, dy, need_dx=True):
    return takes_keyword_only(params, cache, dy, need_dx=need_dx)


def takes_none(params, cache, dy):
    return takes_keyword_only(params, cache, dy)


def scaled(params, cache, dy, *, factor, need_dx=True):
    return takes_keyword_only(params, cache, dy, need_dx=need_dx)


def bare(function):
    return lambda *arguments, **options: function(*arguments, **options)


def wrapped(function):
    return functools.wraps(function)(bare(function))


class Takes:
    """A method, and an object that is called."""

    def backward(self, params, cache, dy, need_dx=True):
        return takes_keyword_only(params, cache, dy, need_dx=need_dx)

    __call__ = backward


BACKWARDS = {  # name: (a user's backward, whether dx is left out where nobody wants it)
    "keyword-only": (takes_keyword_only, True),
    "plain keyword": (takes_plain, True),
    "partial": (partial(scaled, factor=3), True),
    "partial of a partial": (partial(partial(scaled, factor=2), factor=3), True),
    "method": (Takes().backward, True),
    "callable object": (Takes(), True),
    "functools.wraps": (wrapped(takes_plain), True),
    "functools.wraps twice": (wrapped(wrapped(takes_keyword_only)), True),
    "functools.wraps of a partial": (wrapped(partial(scaled, factor=3)), True),
    "partial of functools.wraps": (partial(wrapped(scaled), factor=3), True),
    "a decorator without functools.wraps": (bare(takes_plain), True),
    "one that takes any option": (lambda *given, **options: takes_plain(*given, **options), True),
    "one that does not": (takes_none, False),
    "a decorator of one that does not": (bare(takes_none), False),
    "functools.wraps of one that does not": (wrapped(takes_none), False),
    "one that hands on no option": (
        lambda params, cache, dy: takes_plain(params, cache, dy),
        False,
    ),
}


def users_layer(backward):
    """y = 3 x and an entry "w", which y does not depend on."""
    return nn.Layer(
        lambda key, shape: ({"w": np.ones(2)}, shape), lambda params, x: (3 * x, x), backward
    )


@pytest.mark.parametrize("name", BACKWARDS)
def test_dx_of_the_first_layer_is_left_out_exactly_where_it_can_be(name):
    backward, left_out = BACKWARDS[name]
    own = users_layer(backward)
    x, params = np.ones((1, 2)), {"w": np.ones(2)}

    def grads_of(net, params):
        ASKED.clear()
        function = nn.value_and_grad(net, nn.mean_squared_error)
        grads = function(params, x, np.zeros((1, 2)))[1]
        return nn.tree_map(np.ndarray.tolist, grads)

    assert grads_of(own, params) == {"w": [3, 3]}
    assert [not left_out] == ASKED
    net = nn.sequential(nn.identity(), first=own, second=own)
    grads = grads_of(net, {"first": params, "second": params})
    assert grads == {"first": {"w": [27, 27]}, "second": {"w": [9, 9]}}
    assert [True, not left_out] == ASKED


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("combine", [nn.heads, nn.concatenate, lambda a: nn.residual(a, nn.relu())])
def test_branches_are_told_that_dx_is_not_needed(combine, several):
    net, x = combine(a=users_layer(takes_plain)), Z[:, :2]
    params, _ = net.init(0, (2,))
    y, cache = net.forward(params, {"a": x} if several and combine is nn.concatenate else x)
    ASKED.clear()
    dx, grads = net.backward(params, cache, upstream(y), need_dx=False)
    assert not dx
    assert all_bytes(grads) == all_bytes(net.backward(params, cache, upstream(y))[1])
    assert ASKED == [False, True]


def test_errors_of_a_users_backward_pass_as_they_are():
    def backward(params, cache, dy, need_dx=True):
        ASKED.append(need_dx)
        raise TypeError("of the user's own")

    ASKED.clear()
    with pytest.raises(TypeError, match="^of the user's own$"):
        nn.value_and_grad(users_layer(backward), nn.mean_squared_error)({}, Z, Z)
    assert ASKED == [False]


def test_what_comes_before_the_first_params_is_not_computed():
    net = nn.sequential(nn.relu(), inner=nn.sequential(nn.relu(), users_layer(takes_plain)))
    params, _ = net.init(0, (2,))
    _, cache = net.forward(params, np.ones((1, 2)))
    cache["0"] = cache["inner"]["0"] = "never looked at"
    dx, grads = net.backward(params, cache, np.ones((1, 2)), need_dx=False)
    assert dx is None
    assert grads["inner"]["1"]["w"].tolist() == [1, 1]
    nothing = nn.sequential(nn.relu()).backward({}, {"0": None}, np.ones(1), need_dx=False)
    assert nothing == (None, {})


@given(data=st.data())
def test_grads_are_the_same_without_dx_in_any_network(data):
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


# --- repr: the code that makes a layer ---


@every_layer
@settings(max_examples=4)
@given(data=st.data())
def test_repr_of_a_layer_is_the_code_that_makes_it(name, data):
    layer, params, x, _, shape, _ = data.draw(cases(name))
    again = eval(repr(layer), vars(nn))
    assert repr(again) == repr(layer)
    assert repr(layer).startswith(f"{name}(")
    assert all_bytes(again.init(3, shape)[0]) == all_bytes(layer.init(3, shape)[0])
    assert both_ways(again, params, x) == both_ways(layer, params, x)
    assert repr(pickle.loads(pickle.dumps(layer))) == repr(layer)


REPRS = [
    "relu()", "linear(3)", "linear(3, bias=False)", "linear(3, init=zeros)",
    "linear(3, init=normal(0.1))", "leaky_relu(0.3)", "dropout(0.5)", "batch_norm()",
    "batch_norm(eps=0.1)", "conv2d(8, 3)", "conv2d(8, 3, stride=2, padding=1)",
    "conv2d(8, (3, 2), groups=2)", "conv2d(8, 3, padding='same')", "max_pool2d(2)",
    "max_pool2d(3, stride=2, padding=1)", "sequential()", "embedding(9, 4)",
    "position_embedding(init=zeros)", "lstm(8, reverse=True)", "attention(2, causal=True)",
    "sequential(flatten(), linear(4), act=relu())",
    "sequential(hidden=linear(256), act=relu(), out=linear(10))", "residual(linear(3))",
    "residual(sequential(linear(3), relu()), linear(3, bias=False))",
]  # fmt: skip


@pytest.mark.parametrize("code", REPRS)
def test_repr_leaves_out_what_is_so_by_default(code):
    assert repr(eval(code, vars(nn))) == code


def users_init(key, shape):
    return {}, shape


def users_forward(params, x):
    return x, x


def users_backward(params, cache, dy):
    return dy, {}


class UsersLayer:
    """A layer that is no Layer."""

    init = staticmethod(users_init)
    forward = staticmethod(users_forward)
    backward = staticmethod(users_backward)

    def __repr__(self):
        return "UsersLayer()"


def test_repr_of_a_users_layer_names_its_functions():
    layer = nn.Layer(users_init, users_forward, users_backward)
    for own in (layer, pickle.loads(pickle.dumps(layer))):
        for function in (users_init, users_forward, users_backward):
            assert function.__name__ in repr(own)
        assert repr(own) in repr(nn.sequential(own, nn.linear(2)))
        assert "0x" not in repr(nn.sequential(own))
    net = nn.sequential(nn.linear(2), mine=UsersLayer())
    assert repr(net) == "sequential(linear(2), mine=UsersLayer())"
    changed = nn.relu()._replace(forward=users_forward)
    assert "users_forward" in repr(changed)


WRONG_THINGS = {  # what a function of a layer with params returns: what is said in training
    "init": {
        "nothing": (lambda params, shape: None, r"init must return \(params, shape\), got None")
    },
    "forward": {
        "y alone": (lambda y, c: y, r"forward must return \(y, cache\), got ndarray"),
        "one": (lambda y, c: (y,), r"forward must return \(y, cache\), got tuple of 1"),
        "three": (lambda y, c: (y, c, c), r"forward must return \(y, cache\), got tuple of 3"),
        "no y": (lambda y, c: (None, c), r"forward must return \(y, cache\), y an array, got None"),
        "nothing": (lambda y, c: None, r"forward must return \(y, cache\), got None"),
    },
    "backward": {
        "dx alone": (lambda dx, g: dx, r"backward must return \(dx, grads\), got ndarray"),
        "rows of dx": (lambda dx, g: [*dx], "backward must .*, grads a dict, got ndarray"),
        "one": (lambda dx, g: (dx,), r"backward must return \(dx, grads\), got tuple of 1"),
        "swapped": (lambda dx, g: (g, dx), r"backward must .*, grads a dict, got ndarray"),
        "no grads": (lambda dx, g: (dx, None), "backward must .*, grads a dict, got None"),
        "a list": (lambda dx, g: (dx, [g]), "backward must .*, grads a dict, got list"),
        "no array": (lambda dx, g: ("dx", g), "backward must .*, dx an array, got 'dx'"),
        "nothing": (lambda dx, g: None, r"backward must return \(dx, grads\), got None"),
    },
}


def returns_wrong(what, change):
    right = nn.linear(3)
    return right._replace(**{what: lambda *arguments: change(*getattr(right, what)(*arguments))})


AROUND_ONE = {  # name of the layer: what is built around it
    "b": lambda layer: nn.sequential(nn.linear(3), b=layer, c=nn.linear(3)),
    "branch": nn.residual,
    "shortcut": lambda layer: nn.residual(nn.linear(3), layer),
    "side": lambda layer: nn.concatenate(nn.linear(2), side=layer),
    "head": lambda layer: nn.heads(head=layer, other=nn.tanh()),
}


def there_and_back(net, params, x):
    net.init(0, (3,))
    y, cache = net.forward(params, x)
    net.backward(params, cache, y)


@pytest.mark.parametrize("name", AROUND_ONE)
@pytest.mark.parametrize("what", WRONG_THINGS)
def test_functions_that_return_the_wrong_things_are_named(what, name):
    x = np.ones((2, 3))  # two rows, that unpack into two
    for change, words in WRONG_THINGS[what].values():
        layer, right = returns_wrong(what, change), nn.linear(3)
        params, _ = AROUND_ONE[name](right).init(0, (3,))
        with pytest.raises(TypeError, match=f"^{name}: {words}"):
            there_and_back(AROUND_ONE[name](layer), params, x)
        if what != "init":
            own, _ = right.init(0, (3,))
            with pytest.raises(TypeError, match=f"^{words}"):
                nn.value_and_grad(layer, nn.mean_squared_error)(own, x, x)


def test_a_layer_without_params_may_return_no_grads():
    silent = nn.relu()._replace(backward=lambda params, y, dy: (dy * (y > 0), None))
    for around in AROUND_ONE.values():
        net, x = around(silent), np.ones((2, 3))
        params, _ = net.init(0, (3,))
        y, cache = net.forward(nn.training(params, 0), x)
        assert net.backward(params, cache, y)[1].keys() == params.keys()
        nn.check_gradients(net, params, x)
        nn.check_gradients(net, nn.training(params, 0), x)


# ------------------------------------------------------------------------------------------------
# Keys and initializers
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
    for index in (0, 7, 2**32 - 1):
        assert list(nn.fold_key(key, index)) == [*folded, index]


def test_a_users_array_of_uint32_is_no_key_array():
    array = np.array([1, 0], np.uint32)
    np.testing.assert_array_equal(nn.uniform(1.0)(array, (4,)), nn.uniform(1.0)((1, 0), (4,)))
    assert list(nn.training({}, array)["key"]) == [0x6B657973, 2, 1, 1, 1, 0]
    beyond = np.array([0xFFFFFFFF], np.uint32)
    assert list(nn.training({}, beyond)["key"]) == [0x6B657973, 1, 1, 0xFFFFFFFF]
    for kind in (np.int64, np.uint64):
        numbers = np.array([0x6B657973, 1, 1, 5], kind)
        assert nn.fold_key(numbers, 0).tolist() == nn.fold_key(numbers.tolist(), 0).tolist()


def test_training_adds_a_key_to_a_copy():
    params = {"W": np.ones(2)}
    in_training = nn.training(params, (1, 2))
    assert list(params) == ["W"]
    assert list(in_training) == ["W", "key"]
    assert in_training["W"] is params["W"]


def test_the_key_of_a_child_decides_its_numbers():
    one, two = nn.fold_key((3, 4), 0), nn.fold_key((3, 4), 1)
    assert not np.array_equal(nn.uniform(1.0)(one, (4,)), nn.uniform(1.0)(two, (4,)))
    net, x = nn.sequential(nn.relu(), drop=nn.dropout(0.5)), np.ones((20, 20))
    _, cache = net.forward(nn.training({}, (3, 4)), x)
    _, alone = nn.dropout(0.5).forward({"key": two}, x)
    np.testing.assert_array_equal(cache["drop"]["mask"], alone["mask"])


@pytest.mark.parametrize(
    ("shape", "fan_in", "fan_out"),
    [((300, 200), 300, 200), ((40, 30, 5, 4), 600, 800), ((50, 60, 9), 540, 450)],
)
def test_initializers_have_the_moments_that_their_fans_ask_for(shape, fan_in, fan_out):
    spreads = {
        nn.xavier_normal: math.sqrt(2 / (fan_in + fan_out)),
        nn.xavier_uniform: math.sqrt(2 / (fan_in + fan_out)),
        nn.he_normal: math.sqrt(2 / fan_in),
        nn.he_uniform: math.sqrt(2 / fan_in),
        nn.normal(0.3): 0.3,
        nn.uniform(0.3): 0.3 / math.sqrt(3),
    }
    for initializer, std in spreads.items():
        weights = initializer((1, 2), shape)
        assert (weights.shape, weights.dtype) == (shape, np.float32)
        assert abs(weights.mean()) < 5 * std / math.sqrt(weights.size)
        assert weights.std() == pytest.approx(std, rel=5 / math.sqrt(weights.size))
        np.testing.assert_array_equal(weights, initializer((1, 2), shape))
        assert not np.array_equal(weights, initializer((2, 1), shape))
        fourth = float((weights.astype(np.float64) ** 4).mean()) / std**4
        normal = initializer in (nn.xavier_normal, nn.he_normal) or "normal" in repr(initializer)
        assert fourth == pytest.approx(3 if normal else 1.8, rel=0.1)
        if not normal:
            assert (
                math.sqrt(3) * std * 0.99 < np.abs(weights).max() <= math.sqrt(3) * std * 1.000001
            )


def test_constant_initializers():
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
    line = nn.augment(7, np.arange(49.0).reshape(1, 1, 7, 7), elastic=1.0)[0, 0, 3]
    expected = [16.6624, 23.0149, 29.991, 34.4583, 10.4047, 0.0299, 0.0262]
    np.testing.assert_allclose(line, expected, atol=2e-4)
    waves = np.sin(np.arange(26 * 29) / 7).reshape(1, 1, 26, 29)
    line = nn.augment(8, waves, elastic=2.0)[0, 0, 13, ::4]
    expected = [0.694, 0.6222, -0.3226, -0.0756, 0.0831, -0.7333, -0.4396, 0.0006]
    np.testing.assert_allclose(line, expected, atol=2e-4)


# ------------------------------------------------------------------------------------------------
# Trees
# ------------------------------------------------------------------------------------------------

names = st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=5)
small_arrays = st.integers(0, 5).map(lambda size: np.arange(size, dtype=np.float64))
trees = st.recursive(
    st.dictionaries(names, small_arrays, min_size=1, max_size=3),
    lambda children: st.dictionaries(names, children | small_arrays, min_size=1, max_size=3),
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
    whole = nn.clip_gradients({"a": np.array([3, 4])}, 1.0)["a"]
    np.testing.assert_allclose(whole, [0.6, 0.8])
    half = nn.clip_gradients({"a": np.array([3, 4], np.float16)}, 1.0)["a"]
    assert half.dtype == np.float16
    scale = {"scale": np.array(3.0, np.float32)}  # arrays without axes stay arrays
    for result in (nn.clip_gradients(scale, 0.1), nn.tree_add(scale, scale)):
        assert type(result["scale"]) is np.ndarray


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


ONE_BAD = {  # name: (the loss of values (2, 2) of which one is bad, what it says)
    **{
        loss.__name__: (
            partial(loss, np.full((2, 2), 0.5)),
            f"{loss.__name__}: target probabilities must be numbers from 0 to 1",
        )
        for loss in (nn.softmax_cross_entropy, nn.cross_entropy)
    },
    "binary_cross_entropy": (
        lambda values: nn.binary_cross_entropy(np.ones((2, 2)), values),
        "binary_cross_entropy: target must be from 0 to 1",
    ),
    "probabilities": (
        lambda values: nn.cross_entropy(values, np.array([0, 1])),
        "cross_entropy: probabilities must be from 0 to 1",
    ),
}


@pytest.mark.parametrize("name", ONE_BAD)
@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan, math.inf, -math.inf])
def test_one_bad_value_among_good_ones_is_refused(name, bad):
    loss, words = ONE_BAD[name]
    for index in np.ndindex(2, 2):
        values = np.full((2, 2), 0.5)
        values[index] = bad
        with pytest.raises(ValueError, match=words):
            loss(values)


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


WEIGHABLE = {  # name: (loss, has it a target of labels, of probabilities or of elements)
    "softmax_cross_entropy": (nn.softmax_cross_entropy, "labels"),
    "softmax_cross_entropy(soft)": (partial(nn.softmax_cross_entropy, smoothing=0.2), "soft"),
    "cross_entropy": (nn.cross_entropy, "labels"),
    "cross_entropy(soft)": (nn.cross_entropy, "soft"),
    "hinge": (nn.hinge, "labels"),
    **{name: (loss, "elements") for name, (loss, _) in ELEMENT_LOSSES.items()},
}
every_weighable_loss = pytest.mark.parametrize("name", WEIGHABLE)


def loss_case(name, shape, seed=0):
    """(loss, prediction, target, number of axes of its positions)"""
    (loss, kind), rng = WEIGHABLE[name], np.random.default_rng(seed)
    labels = rng.integers(0, shape[-1], shape[:-1])
    target = labels if kind == "labels" else rng.random(shape)
    return loss, rng.random(shape) * 0.8 + 0.1, target, len(shape) - (kind != "elements")


@every_weighable_loss
@given(shape=st.lists(sizes, min_size=2, max_size=4).map(tuple), seed=st.integers(0, 10**6),
       kind=st.sampled_from(["f4", "f8", "i8", "?", "u1", "f2"]), data=st.data())  # fmt: skip
def test_weighted_losses_are_weighted_means_of_those_of_the_positions(
    name, shape, seed, kind, data
):
    loss, prediction, target, axes = loss_case(name, shape, seed)
    axes, rng = data.draw(st.integers(1, axes)), np.random.default_rng(seed)
    weights = rng.integers(0, 4, shape[:axes]).astype(kind)
    weights.ravel()[rng.integers(weights.size)] = 2
    value, gradient = loss(frozen(prediction), frozen(target), weights=frozen(weights))
    assert type(value) is float
    mean, expected = 0.0, np.zeros(shape)
    for index in np.ndindex(weights.shape):
        part, slope = loss(prediction[index][None], np.asarray(target[index])[None])
        share = float(weights[index]) / weights.astype(float).sum()
        mean, expected[index] = mean + share * part, share * slope[0]
    assert value == pytest.approx(mean, rel=1e-9)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-14)
    single, of_single = loss(prediction.astype(np.float32), target, weights=weights)
    assert of_single.dtype == np.float32
    assert single == pytest.approx(value, rel=1e-4, abs=1e-5)
    assert loss(prediction, target, weights=weights * np.float64(1e307))[0] == pytest.approx(value)
    for one in (1.0, 3.0):
        ones, of_ones = loss(prediction, target, weights=np.full(shape[:axes], one))
        plain, of_plain = loss(prediction, target)
        assert ones == pytest.approx(plain)
        np.testing.assert_allclose(of_ones, of_plain, rtol=1e-12)


@every_weighable_loss
@pytest.mark.usefixtures("no_warnings")
def test_a_weight_of_0_leaves_out_whatever_is_there(name):
    loss, prediction, target, _ = loss_case(name, (4, 3, 5))
    weights = np.array([[1, 0, 1], [1, 1, 0], [0, 0, 0], [1, 1, 1]], bool)
    value, gradient = loss(prediction, target, weights=weights)
    for bad in (math.nan, math.inf, -math.inf, 1e300) if name[:6] != "cross_" else (0.0, 1.0):
        spoiled = prediction.copy()
        spoiled[~weights] = bad
        again, other = loss(spoiled, target, weights=weights)
        assert again == pytest.approx(value, rel=1e-12)
        np.testing.assert_allclose(other, gradient, rtol=1e-12)
        assert not other[~weights].any()
    if WEIGHABLE[name][1] == "labels":
        target[0, 1] = 5
        with pytest.raises(ValueError, match="labels must be from 0 to 4, got"):
            loss(prediction, target, weights=weights)


@given(lead=st.lists(sizes, min_size=1, max_size=3).map(tuple), classes=st.integers(1, 4),
       seed=st.integers(0, 10**6))  # fmt: skip
def test_class_losses_and_accuracy_take_any_leading_axes(lead, classes, seed):
    for name, (_, kind) in WEIGHABLE.items():
        loss, prediction, target, _ = loss_case(name, (*lead, classes), seed)
        if kind != "elements":
            flat, labels = prediction.reshape(-1, classes), target
            expected, slopes = loss(flat, target.reshape(-1, *target.shape[len(lead) :]))
            value, gradient = loss(prediction, target)
            assert value == pytest.approx(expected, rel=1e-12)
            np.testing.assert_allclose(gradient, slopes.reshape(gradient.shape), rtol=1e-12)
            if kind == "labels":
                assert nn.accuracy(prediction, labels) == np.mean(prediction.argmax(-1) == labels)


def test_class_weights_are_those_of_pytorch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits, labels, balance = rng.normal(size=(6, 5, 4)), rng.integers(0, 4, (6, 5)), rng.random(4)
    z = torch.tensor(logits.transpose(0, 2, 1), requires_grad=True)
    theirs = torch.nn.functional.cross_entropy(z, torch.tensor(labels), torch.tensor(balance))
    theirs.backward()
    value, gradient = nn.softmax_cross_entropy(logits, labels, weights=balance[labels])
    assert value == pytest.approx(theirs.item(), rel=1e-12)
    np.testing.assert_allclose(gradient, z.grad.numpy().transpose(0, 2, 1), atol=1e-12)


# ------------------------------------------------------------------------------------------------
# Optimizers and schedules
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


OPTIMIZERS = {  # name: (constructor, its rule written out, default rate, options)
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
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@pytest.fixture
def optimizer(name):
    constructor, _, _, options = OPTIMIZERS[name]
    return constructor(0.1, **options)


def some_params(seed, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shapes = {"a/W": (3, 2), "a/b": (2,), "c/d/scale": (), "e": (1, 2, 2)}
    return nn.tree_unflatten(
        {path: np.asarray(rng.normal(size=shape), dtype) for path, shape in shapes.items()}
    )


@every_optimizer
@given(
    seed=st.integers(0, 10**6),
    lr=st.sampled_from([None, 0.1, "schedule"]),
    weight_decay=st.sampled_from([None, 0.0, 0.3]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_optimizers_follow_their_rules(name, seed, lr, weight_decay, dtype):
    constructor, rule, default, options = OPTIMIZERS[name]
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


@every_optimizer
def test_optimizers_are_pure_and_their_states_can_be_saved(optimizer, tmp_path):
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


@every_optimizer
def test_optimizers_leave_frozen_entries_as_they_are(optimizer):
    params, grads = some_params(1), some_params(2)
    moved, _ = optimizer.step(params, {"a": {"b": grads["a"]["b"]}}, optimizer.init(params))
    assert moved["a"]["W"] is params["a"]["W"]
    assert moved["c"] is params["c"]
    assert not np.array_equal(moved["a"]["b"], params["a"]["b"])
    same, state = optimizer.step(params, {}, optimizer.init(params))
    assert all_bytes(same) == all_bytes(params)
    assert int(state["step"]) == 1


@every_optimizer
def test_optimizers_keep_the_dtype_of_params(optimizer):
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


@every_optimizer
@pytest.mark.parametrize("order", ORDERS)
def test_optimizers_take_arrays_of_any_order(optimizer, order):
    params, grads = some_params(1), some_params(2)
    expected = optimizer.step(params, grads, optimizer.init(params))

    params, grads, state = (
        frozen(nn.tree_map(lambda a: in_order(a, order) if a.ndim else a, tree))
        for tree in (params, grads, optimizer.init(params))
    )
    assert all_bytes(*optimizer.step(params, grads, state)) == all_bytes(*expected)


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
        constructor, _, _, options = OPTIMIZERS[name]
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
    "cosine default": (nn.cosine(2.0, 5), lambda step: 1 + math.cos(math.pi * min(step, 5) / 5)),
    "cyclic": (nn.cyclic(0.5, 2.5, 4), lambda step: 0.5 + 2.0 * (1 - abs((step % 8) / 4 - 1))),
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
    factor=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    patience=st.integers(0, 3),
    threshold=st.sampled_from([0.0, 1e-3, 0.3]),
)
def test_reduce_on_plateau_counts_as_pytorch_does(losses, factor, patience, threshold):
    optimizer = nn.sgd(0.5)
    params = {"w": np.zeros(1)}
    state = optimizer.init(params)
    best, bad, scale = math.inf, 0, 1.0
    for loss in losses:
        before = all_bytes(state)
        new = nn.reduce_on_plateau(state, loss, factor, patience, threshold)
        assert all_bytes(state) == before
        if loss < best * (1 - threshold):
            best, bad = loss, 0
        else:
            bad += 1
        if bad > patience:
            scale, bad = scale * factor, 0
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


# ------------------------------------------------------------------------------------------------
# Gradient checking
# ------------------------------------------------------------------------------------------------


class Stranger:
    """A pair by somebody who never saw purenn, right but for what is done to the gradients."""

    def __init__(self, **changes):
        self.changes = changes

    def forward(self, params, x):
        return x @ params["W"] + params["b"], (x, params["W"])

    def backward(self, params, cache, dy):
        x, W = cache
        gradients = {"dx": dy @ W.T, "W": x.T @ dy, "b": dy.sum(axis=0)}
        for name, change in self.changes.items():
            gradients[name] = change(gradients.get(name))
        dx = gradients.pop("dx")
        return dx, {name: g for name, g in gradients.items() if g is not None}


def stranger_inputs(rows=3, columns=3, batch=4):
    rng = np.random.default_rng(0)
    params = {"W": rng.normal(size=(rows, columns)), "b": rng.normal(size=columns)}
    return params, rng.normal(size=(batch, rows))


def plus(amount, *index):
    """One entry of a gradient is wrong by so much."""

    def change(gradient):
        gradient = gradient.copy()
        gradient[index] += amount
        return gradient

    return change


def pair(forward, backward):
    return types.SimpleNamespace(forward=forward, backward=backward)


def elementwise_pair(function, slope):
    """A layer without params that computes each entry by itself."""
    return pair(lambda params, x: (function(x), x), lambda params, x, dy: (dy * slope(x), {}))


def test_a_right_pair_of_a_stranger_passes():
    for size in ((3, 3), (2, 5), (40, 30)):
        params, x = stranger_inputs(*size)
        assert nn.check_gradients(Stranger(), params, x) is None
        nn.check_gradients(Stranger(), nn.tree_map(np.float32, params), x.astype(np.float32))
    nn.check_gradients(Stranger(), params, x, rtol=1e-6, key=(3, 4))
    nn.check_gradients(Stranger(dx=lambda dx: dx * 1.001), params, x, rtol=1e-2)


BY_BOTH = r"is -?[\d.]+ by backward, but -?[\d.]+ by central differences$"
WRONG_GRADIENTS = {  # name: (what is done to the gradients, size of W, what is said)
    "sign": ({"b": np.negative}, (3, 3), rf"grads/b\[0\] {BY_BOTH}"),
    "factor": ({"W": lambda W: W / 4}, (3, 3), rf"grads/W\[0, 0\] {BY_BOTH}"),
    "transposed": ({"W": np.transpose}, (3, 3), r"grads/W\[0, 1\] is"),
    "high": ({"W": np.transpose}, (2, 3), r"grads/W has shape \(3, 2\), expected \(2, 3\)$"),
    "wide": ({"W": np.transpose}, (3, 2), r"grads/W has shape \(2, 3\), expected \(3, 2\)$"),
    "zero": ({"b": np.zeros_like}, (3, 3), r"grads/b\[0\] is 0 by backward"),
    "missing": ({"b": lambda b: None}, (3, 3), r"grads/b\[0\] is 0 by backward"),
    "dx": ({"dx": lambda dx: dx * 1.001}, (3, 3), r"dx\[0, 0\] is"),
    "unknown": ({"c": lambda _: np.ones(3)}, (3, 3), "grads have 'c', but params have no trained"),
    "one of many": ({"W": plus(1e-3, 123, 45)}, (400, 300), r"grads/W\[123, 45\] is"),
    "one of dx": ({"dx": plus(0.5, 2, 29)}, (50, 3), r"dx\[2, 29\] is"),
    "nan": ({"b": plus(math.nan, 1)}, (3, 3), r"grads/b\[1\] is nan"),
    "inf": ({"b": plus(math.inf, 1)}, (3, 3), r"grads/b\[1\] is inf"),
    "-inf": ({"b": plus(-math.inf, 1)}, (3, 3), r"grads/b\[1\] is -inf"),
    "nan of many": ({"W": plus(math.nan, 123, 45)}, (400, 300), r"grads/W\[123, 45\] is nan"),
    "inf of many": ({"W": plus(math.inf, 123, 45)}, (400, 300), r"grads/W\[123, 45\] is inf"),
}


@pytest.mark.parametrize("name", WRONG_GRADIENTS)
def test_a_wrong_gradient_is_found_and_named(name):
    changes, size, message = WRONG_GRADIENTS[name]
    params, x = stranger_inputs(*size)
    said = set()
    for _ in range(2):
        with pytest.raises(AssertionError, match=f"^check_gradients: {message}") as found:
            nn.check_gradients(Stranger(**changes), params, x)
        said.add(str(found.value))
    assert len(said) == 1
    if name == "sign":
        backward, differences = (float(word) for word in said.pop().split() if word[-1].isdigit())
        assert backward == pytest.approx(-differences, rel=1e-6)
        assert differences != 0


@given(size=st.integers(1, 90), data=st.data())
def test_one_wrong_entry_is_found_wherever_it_is(size, data):
    wrong = data.draw(st.integers(0, size - 1))
    params, x = stranger_inputs(1, size, 2)
    with pytest.raises(AssertionError, match=rf"^check_gradients: grads/b\[{wrong}\] is"):
        nn.check_gradients(Stranger(b=plus(0.5, wrong)), params, x)


@settings(max_examples=5)
@given(row=st.integers(0, 249), column=st.integers(0, 399))
def test_one_wrong_entry_among_100_000_is_found_and_named(row, column):
    params, x = stranger_inputs(250, 400)
    with pytest.raises(AssertionError, match=rf"grads/W\[{row}, {column}\] is"):
        nn.check_gradients(Stranger(W=plus(1e-2, row, column)), params, x)


def test_numbers_among_the_params_are_checked_too():
    def scale(wrong):
        return pair(
            lambda params, x: (params["factor"] * x, x),
            lambda params, x, dy: (params["factor"] * dy, {"factor": (x * dy).sum() + wrong}),
        )

    nn.check_gradients(scale(0), {"factor": 3.0}, np.ones((2, 2)))
    with pytest.raises(AssertionError, match=r"grads/factor\[\] is"):
        nn.check_gradients(scale(1), {"factor": 3.0}, np.ones((2, 2)))


def test_what_is_not_float64_is_found():
    x = stranger_inputs()[1]
    for change, kind in ((np.float32, "float32"), (np.complex128, "complex128")):
        single = elementwise_pair(change, lambda x: 1)
        words = f"^check_gradients: y must be float64 like x, got ndarray of {kind}"
        with pytest.raises(AssertionError, match=words):
            nn.check_gradients(single, {}, x)


# --- planted bugs: each alone and inside of networks, where its layer must be named ---


def tanh_init(key, shape):
    return {"w": np.linspace(0.5, 1.5, shape[-1]), "b": np.zeros(shape[-1])}, shape


def tanh_forward(params, x):
    """y = w tanh(x) + b"""
    t = np.tanh(x)
    return params["w"] * t + params["b"], {"t": t, "x": x}


def tanh_backward(params, cache, dy):
    t = cache["t"]
    return dy * params["w"] * (1 - t * t), {"w": (dy * t).sum(axis=0), "b": dy.sum(axis=0)}


def right(forward=tanh_forward, backward=tanh_backward):
    return nn.Layer(tanh_init, forward, backward)


def receiving(what, change):
    """The right layer, but for what is done to the arguments of one of its functions."""
    if what == "forward":
        return right(forward=lambda params, x: tanh_forward(*change(params, x)))
    return right(backward=lambda params, cache, dy: tanh_backward(*change(params, cache, dy)))


def returning(what, change):
    """The right layer, but for what is done to the results of one of its functions."""
    if what == "forward":
        return right(forward=lambda params, x: change(*tanh_forward(params, x)))
    return right(backward=lambda params, cache, dy: change(*tanh_backward(params, cache, dy)))


def with_dx(change):
    return returning("backward", lambda dx, grads: (change(dx), grads))


def with_w(change):
    return returning("backward", lambda dx, grads: (dx, {**grads, "w": change(grads["w"])}))


def written(value):
    """An array into which its own values are written."""
    value[...] = value.copy()
    return value


def unlocked(value):
    value.flags.writeable = True
    return written(value)


def reshaped(value):
    value.shape = (value.size, 1)
    return value


class Stateful:
    """The right layer, but for hidden state of one kind."""

    kept = None

    def __init__(self, kind):
        self.kind, self.calls, self.buffers = kind, 0, {}
        self.generator = np.random.default_rng(0)

    def noise(self, value):
        return value * (1 + 2.0**-52 * self.generator.integers(0, 2, value.shape))

    def buffer(self, name, value):
        if self.kind == f"two buffers for {name}":
            name = name + str(self.calls % 2)
        elif self.kind != f"buffer for {name}":
            return value
        buffer = self.buffers.setdefault((name, value.shape), np.empty_like(value))
        buffer[...] = value
        return buffer

    def forward(self, params, x):
        self.calls += 1
        kind, first = self.kind, self.calls == 1
        if kind == "forgets the x before" and self.kept is not None:
            self.kept[...] = 0
        if kind == "first x" and not first:
            x = self.kept
        if kind in ("first x", "forgets the x before"):
            self.kept = x
        y, cache = tanh_forward(params, x)
        if kind == "running mean":
            self.kept = x.mean(axis=0) if first else 0.9 * self.kept + 0.1 * x.mean(axis=0)
            y = y - self.kept
        if kind == "mean of the first batch":
            self.kept = x.mean(axis=0) if first else self.kept
            y = y - self.kept
        if kind in ("last x", "last w"):
            self.kept = cache if kind == "last x" else params["w"]
        y = {
            "calls": y * self.calls,
            "first call": y + first,
            "second call": y + (self.calls == 2),
            "every third call": y + (self.calls % 3 == 0),
            "every ninth call": y + 1e-9 * (self.calls % 9 == 0),
            "noise": self.noise(y),
            "drops units": y * (self.generator.random(y.shape) < 0.9),
        }.get(kind, y)
        cache = {name: self.buffer("cache", value) for name, value in cache.items()}
        return self.buffer("y", y), {} if kind == "last x" else cache

    def backward(self, params, cache, dy):
        self.calls += 1
        kind, first = self.kind, self.kept is None
        if kind == "last x":
            cache = self.kept
        if kind == "last w":
            params = {**params, "w": self.kept}
        if kind == "first dy":
            dy = self.kept = dy if first else self.kept
        if kind == "size of the first dy":
            self.kept = np.abs(dy).max() if first else self.kept
            dy = dy * self.kept / np.abs(dy).max()
        if kind == "first cache":
            cache = self.kept = cache if first else self.kept
        dx, grads = tanh_backward(params, cache, dy)
        if kind == "first dx":
            dx = self.kept = dx if first else self.kept
        if kind == "adds up grads":
            grads = self.kept = nn.tree_add(self.kept or {}, grads)
        if kind == "backward every fifth call":
            dx = dx * (1 + (self.calls % 5 == 0))
        if kind == "backward counts":
            dx = dx * (1 + 1e-12 * self.calls)
        if kind == "noise in dx":
            dx = self.noise(dx)
        return self.buffer("dx", dx), {**grads, "w": self.buffer("grads", grads["w"])}


def stateful(kind):
    state = Stateful(kind)
    return right(state.forward, state.backward)


def closure(change):
    """Hidden state of a function, which no copy of the layer leaves behind."""
    calls = []

    def backward(params, cache, dy):
        calls.append((params, cache, dy))
        return tanh_backward(*change(calls))

    return right(backward=backward)


def emptied(cache):
    t = cache.t
    cache.t = cache.x
    return t


DX, DW, DB = r"dx\[\d, \d\] is", r"grads/w\[\d\] is", r"grads/b\[\d\] is"
WRITES = "backward writes into"
FLOATS = "must be a float64 array, got"
FORWARD, BACKWARD = r"forward must return \(y, cache\), ", r"backward must return \(dx, grads\), "
Y, B = "forward returns different y", "backward returns different"
HIDDEN_STATE = {
    **dict.fromkeys(["calls", "running mean", "first call", "second call", "every third call"], Y),
    **dict.fromkeys(["every ninth call", "noise", "drops units", "mean of the first batch"], Y),
    **dict.fromkeys(["last x", "last w", "noise in dx", "backward counts"], f"{B} dx"),
    "backward every fifth call": f"{B} dx",
    "adds up grads": f"{B} grads",
    "first x": f"{Y}|{DX}",
    "forgets the x before": "forward writes into what an earlier call was given$",
    **dict.fromkeys(["first dy", "size of the first dy", "first dx"], f"{B} dx|{DX}"),
    "first cache": f"{B} dx|{DX}",
    **{f"buffer for {name}": f"a later call overwrites the {name} of an earlier one$"
       for name in ("y", "cache", "dx", "grads")},
    "two buffers for dx": f"a later call overwrites the dx of|{B} dx",
}  # fmt: skip
WRONG_NUMBERS = {  # of dx, of w
    "sign": (np.negative, np.negative), "factor": (lambda g: g * 1.001, lambda g: g * 0.999),
    "a little": (lambda g: g * 1.0001, lambda g: g * 0.9999), "zero": (np.zeros_like,) * 2,
    "constant": (lambda g: g + 1e-3, lambda g: g + 1e-3), "nan": (lambda g: g * math.nan,) * 2,
    "other samples": (lambda g: g[::-1], lambda g: g[::-1]), "infinite": (lambda g: g / 0,) * 2,
    "off by one": (lambda g: np.roll(g, 1, 1), lambda g: np.roll(g, 1)),
    "one entry": (plus(1e-3, 1, 2), plus(1e-3, 2)), "mean": (lambda g: g / 2, lambda g: g / 2),
    "one nan": (plus(math.nan, 1, 1), plus(math.nan, 1)), "size": (np.abs, np.abs),
    "rounded": (lambda g: g.round(2), lambda g: g.round(1)), "sorted": (np.sort, np.sort),
    "clipped": (lambda g: g.clip(-0.1, 0.1), lambda g: g.clip(-0.1, 0.1)),
    "clipped at 100": (lambda g: g.clip(-100, 100), lambda g: g.clip(-100, 100)),
    "small ones dropped": (lambda g: g * (abs(g) > 1e-5), lambda g: g * (abs(g) > 1e-5)),
    "without the last": (lambda g: g * [1, 1, 0], lambda g: g * [1, 1, 0]),
}  # fmt: skip
WRONG_KINDS = {  # of dx, of w
    "float32": np.float32, "none": lambda g: None, "complex": lambda g: g + 0j,
    "whole": lambda g: g.astype(int), "object": lambda g: g.astype("O"), "text": lambda g: "dx",
    "bool": lambda g: g > 0, "number": lambda g: 1.0, "list": lambda g: g.tolist(),
}  # fmt: skip
WRONG_SHAPES = {  # of dx, of w
    "one row": lambda g: g[:1] * [[2]], "summed": lambda g: g.sum(axis=-1), "transposed":
    lambda g: g[:, None].T if g.ndim == 1 else g.T, "one more axis": lambda g: g[..., None],
    "scalar": lambda g: g.sum(), "too long": lambda g: np.concatenate([g, g]),
}  # fmt: skip
WRONG_RESULTS = {  # of backward
    "no grads": (lambda dx, g: (dx, None), f"{BACKWARD}grads a dict, got None"),
    "a list of grads": (lambda dx, g: (dx, [*g.values()]), f"{BACKWARD}grads a dict, got list"),
    "dx alone": (lambda dx, g: dx, f"{BACKWARD}got ndarray"),
    "dx alone, as a list": (lambda dx, g: list(dx), f"{BACKWARD}(grads a dict, )?got ndarray"),
    "grads alone": (lambda dx, g: g, f"{BACKWARD}got dict"),
    "swapped": (lambda dx, g: (g, dx), f"{BACKWARD}grads a dict, got ndarray"),
    "three": (lambda dx, g: (dx, g, 0), f"{BACKWARD}got tuple of 3"),
    "nothing": (lambda dx, g: None, f"{BACKWARD}got None"),
    "a generator": (lambda dx, g: iter((dx, g)), f"{BACKWARD}got tuple_iterator"),
    "a dict": (lambda dx, g: {"dx": dx, "grads": g}, f"{BACKWARD}got dict"),
    "tree for dx": (lambda dx, g: ({"x": dx}, g), f"dx {FLOATS} None"),
    "empty grads": (lambda dx, g: (dx, {}), DW + " 0 by backward"),
    "one missing": (lambda dx, g: (dx, {"w": g["w"]}), DB + " 0 by backward"),
    "renamed": (
        lambda dx, g: (dx, {"W": g["w"], "b": g["b"]}),
        "grads have 'W', but params have no tra",
    ),
    "nested": (
        lambda dx, g: (dx, {"bug": g}),
        "grads have 'bug/w', but params have no trained entry",
    ),
    "one more": (
        lambda dx, g: (dx, {**g, "c": dx}),
        "grads have 'c', but params have no trained entry",
    ),
    "grads of x": (
        lambda dx, g: (dx, {**g, "x": dx}),
        "grads have 'x', but params have no trained entr",
    ),
    "grads swapped": (lambda dx, g: (dx, {"w": g["b"], "b": g["w"]}), f"{DW}|{DB}"),
    "a tree for w": (lambda dx, g: (dx, {**g, "w": {"w": g["w"]}}), "grads have 'w/w', but params"),
}
WRONG_OUTPUTS = {  # of forward
    "y alone": (lambda y, c: y, f"{FORWARD}got ndarray"),
    "y alone, as a list": (lambda y, c: list(y), "backward raises|dx|grads"),
    "three": (lambda y, c: (y, c, 0), f"{FORWARD}got tuple of 3"),
    "nothing": (lambda y, c: None, f"{FORWARD}got None"),
    "swapped": (lambda y, c: (c, y), "backward raises IndexError|y/"),
    "no cache": (lambda y, c: (y, None), "backward raises TypeError"),
    "cache of another": (lambda y, c: (y, {"x": y}), "backward raises KeyError"),
    "no y": (lambda y, c: (None, c), f"{FORWARD}y an array, got None"),
    "a list": (lambda y, c: (y.tolist(), c), f"{FORWARD}y an array, got list"),
    "empty": (lambda y, c: ({}, c), "y must be float64 like x, got dict"),
    **{kind: (partial(lambda change, y, c: (change(y), c), change), f"y must be float64 .*{kind}")
       for kind, change in {"float32": np.float32, "complex": lambda y: y + 0j, "object":
       lambda y: y.astype("O"), "bool": lambda y: y > 0, "Masked": np.ma.array}.items()},
}  # fmt: skip
WRITING_FORWARDS = {
    "x in place": (lambda p, x: (p, np.add(x, 1, out=x)), "x"),
    "x put back": (lambda p, x: (p, written(x)), "x"),
    "x unlocked": (lambda p, x: (p, unlocked(x)), "x"),
    "x reshaped": (lambda p, x: (p, reshaped(x)), "x|forward raises"),
    "x by sorting": (lambda p, x: (p, x.sort(axis=0) or x), "x"),
    "x if it can": (lambda p, x: (p, np.add(x, 1, out=x) if x.flags.writeable else x + 1), "x"),
    "x if it must": (lambda p, x: (p, np.negative(y := np.require(x, None, "W"), out=y)), "x"),
    "w put back": (lambda p, x: ({**p, "w": written(p["w"])}, x), "params"),
    "an entry more": (lambda p, x: (p, p.setdefault("n", x))[:2], "params"),
    "an entry less": (lambda p, x: ({"b": p["b"], "w": p.pop("w")}, x), "params"),
    "another entry": (lambda p, x: (p.update(w=p["w"] + 1) or p, x), "params"),
    "in training": (lambda p, x: (p, written(x) if "key" in p else x), "x"),
}
WRITING_BACKWARDS = {
    "dy in place": (lambda p, c, dy: (p, c, np.multiply(dy, 1, out=dy)), "dy"),
    "dy put back": (lambda p, c, dy: (p, c, written(dy)), "dy"),
    "dy by a mask": (lambda p, c, dy: (p, c, np.multiply(dy, 0, out=dy, where=c["x"] > 9)), "dy"),
    "cache in place": (lambda p, c, dy: (p, {"t": np.tanh(c["x"], out=c["t"])}, dy), "cache"),
    "cache put back": (lambda p, c, dy: (p, {"t": written(c["t"])}, dy), "cache"),
    "cache emptied": (lambda p, c, dy: (p, {"t": c.pop("t")}, dy), "cache"),
    "cache cleared": (lambda p, c, dy: (p, [dict(c), c.clear()][0], dy), "cache"),
    "w put back": (lambda p, c, dy: ({**p, "w": written(p["w"])}, c, dy), "params"),
    "a key removed": (lambda p, c, dy: ({"w": p["w"], "n": p.pop("b")}, c, dy), "params"),
}
WRONG_BACKWARDS = {
    "needs the key": (lambda p, c, dy: (p, c, dy * (p["key"][0] > 0)), "backward raises KeyError"),
    "heeds the key": (lambda p, c, dy: (p, c, dy * (2 - ("key" in p))), f"{B}|{DX}"),
    "forgets w": (lambda p, c, dy: ({**p, "w": 1}, c, dy), DX),
    "x for its tanh": (lambda p, c, dy: (p, {"t": c["x"]}, dy), f"{DX}|{DW}"),
    "ignores dy": (lambda p, c, dy: (p, c, np.ones_like(dy)), f"{DX}|{DW}"),
    "squares dy": (lambda p, c, dy: (p, c, dy * abs(dy)), f"{DX}|{DW}"),
    "only rising dy": (lambda p, c, dy: (p, c, np.maximum(dy, 0)), f"{DX}|{DW}"),
    "first sample alone": (lambda p, c, dy: (p, c, dy * [[1], [0]]), f"{DX}|{DW}"),
    "wrong below 0": (lambda p, c, dy: (p, {"t": np.maximum(c["t"], 0)}, dy), f"{DX}|{DW}"),
    "raises": (lambda p, c, dy: 1 / 0, "backward raises ZeroDivisionError"),
}


def dense(dx=lambda x, W, dy: dy @ W.T, W=lambda x, dy: x.T @ dy, b=lambda dy: dy.sum(axis=0)):
    """y = x W + b, its W a square, with the formulas of its gradients."""

    def backward(params, x, dy):
        return dx(x, params["W"], dy), {"W": W(x, dy), "b": b(dy)}

    return nn.linear(3)._replace(backward=backward)


def layer_norm(dx):
    """layer_norm with a formula of one's own for dx, of x̂, σ, g = dy · gamma."""
    inner = nn.layer_norm()

    def backward(params, cache, dy):
        x, g = cache["normalized"], dy * params["gamma"]
        mean = partial(np.mean, axis=1, keepdims=True)
        return dx(x, cache["inverse_std"], g, mean), inner.backward(params, cache, dy)[1]

    return inner._replace(backward=backward)


def other_backward(layer, backward):
    return layer._replace(backward=backward)


def wrong_with_need_dx(params, cache, dy, need_dx=True):
    dx, grads = tanh_backward(params, cache, dy)
    return (dx, grads) if need_dx else (None, {"w": grads["w"] * 2, "b": grads["b"]})


WRONG_FORMULAS = {
    "W transposed": (lambda: dense(dx=lambda x, W, dy: dy @ W), DX),
    "dW transposed": (lambda: dense(W=lambda x, dy: dy.T @ x), r"grads/W\["),
    "dW of dy alone": (lambda: dense(W=lambda x, dy: dy.T @ dy), r"grads/W\["),
    "db is a mean": (lambda: dense(b=lambda dy: dy.mean(axis=0)), r"grads/b\["),
    "db broadcasts": (lambda: dense(b=lambda dy: dy.sum(axis=0, keepdims=True)), "grads/b has"),
    "db of columns": (lambda: dense(b=lambda dy: np.resize(dy.sum(axis=1), 3)), r"grads/b\["),
    "the mean left out": (lambda: layer_norm(lambda x, s, g, mean: s * (g - x * mean(g * x))), DX),
    "the variance left out": (lambda: layer_norm(lambda x, s, g, mean: s * (g - mean(g))), DX),
    "x̂ · mean(g)": (lambda: layer_norm(
        lambda x, s, g, mean: s * (g - mean(g) - x * mean(g) * mean(x))), DX),
    "eps twice": (lambda: layer_norm(
        lambda x, s, g, mean: (g - mean(g) - x * mean(g * x)) / (1 / s + 1e-3)), DX),
    "sum for mean": (lambda: layer_norm(
        lambda x, s, g, mean: s * (g - 3 * mean(g) - x * mean(g * x))), DX),
    "softmax alone": (lambda: other_backward(nn.softmax(), lambda p, y, dy: (dy * y * (1 - y), {})),
                      DX),
    "softmax of no sum": (lambda: other_backward(nn.softmax(), lambda p, y, dy: (dy * y, {})), DX),
    "slope below 0": (lambda: other_backward(
        nn.leaky_relu(0.1), lambda p, y, dy: (dy * np.where(y > 0, 1, 0.01), {})), DX),
    "other need_dx": (lambda: right(backward=wrong_with_need_dx), f"{B} grads"),
    "cache without its copy": (lambda: right(
        lambda p, x: (lambda y, c: (y, types.SimpleNamespace(**c)))(*tanh_forward(p, x)),
        lambda p, c, dy: tanh_backward(p, {"t": emptied(c)}, dy)), f"{B} dx"),
    "the first dy of all": (partial(closure, lambda calls: (*calls[-1][:2], calls[0][2])),
                            f"{B} dx|{DX}"),
    "the first cache of all": (partial(closure, lambda calls: (
        calls[-1][0], calls[0][1], calls[-1][2])), f"{B} dx|{DX}"),
    "the cache before": (partial(closure, lambda calls: (
        calls[-1][0], calls[-2:][0][1], calls[-1][2])), f"{B} dx|{DX}"),
    "noise of NumPy's own": (lambda: right(
        lambda p, x: tanh_forward(p, x + 1e-12 * np.random.random(x.shape))), Y),  # noqa: NPY002
}  # fmt: skip

BUGS = {  # name: (makes the layer, what is said of it)
    **{kind: (partial(stateful, kind), words) for kind, words in HIDDEN_STATE.items()},
    **{f"dx: {name}": (partial(with_dx, changes[0]), DX)
       for name, changes in WRONG_NUMBERS.items()},
    **{f"w: {name}": (partial(with_w, changes[1]), DW)
       for name, changes in WRONG_NUMBERS.items()},
    **{f"dx: {name}": (partial(with_dx, change), f"dx {FLOATS}|{BACKWARD}dx an array")
       for name, change in WRONG_KINDS.items()},
    **{f"w: {name}": (partial(with_w, change), f"grads/w {FLOATS}")
       for name, change in WRONG_KINDS.items()},
    **{f"dx: {name}": (partial(with_dx, change), r"dx has shape \(.*\), expected \(2, 3\)$")
       for name, change in WRONG_SHAPES.items()},
    **{f"w: {name}": (partial(with_w, change), r"grads/w has shape \(.*\), expected \(3,\)$")
       for name, change in WRONG_SHAPES.items()},
    **{f"backward: {name}": (partial(returning, "backward", change), words)
       for name, (change, words) in WRONG_RESULTS.items()},
    **{f"forward: {name}": (partial(returning, "forward", change), words)
       for name, (change, words) in WRONG_OUTPUTS.items()},
    **{f"forward: {name}": (partial(receiving, "forward", change), f"forward writes into ({words})")
       for name, (change, words) in WRITING_FORWARDS.items()},
    **{f"backward: {name}": (partial(receiving, "backward", change), f"{WRITES} {words}")
       for name, (change, words) in WRITING_BACKWARDS.items()},
    **{f"backward: {name}": (partial(receiving, "backward", change), words)
       for name, (change, words) in WRONG_BACKWARDS.items()},
    **WRONG_FORMULAS,
}  # fmt: skip


def ten(layer):
    block = nn.sequential(bug=layer, norm=nn.layer_norm(), act=nn.softplus(), out=nn.linear(3))
    return nn.sequential(
        nn.linear(3), block=nn.residual(block),
        sides=nn.concatenate(a=nn.linear(2), b=nn.tanh()), act=nn.sigmoid(),
        out=nn.heads(a=nn.linear(2), b=nn.gelu()),
    )  # fmt: skip


PLACES = {  # name: (what is built around the layer, the names on the way to it)
    "alone": (lambda layer: layer, ""),
    "sequential": (lambda layer: nn.sequential(nn.linear(3), bug=layer, out=nn.linear(2)), "bug: "),
    "residual": (lambda layer: nn.residual(layer), "branch: "),
    "ten layers": (ten, "block: branch: bug: "),
}
X = np.array([[0.3, -1.2, 0.7], [1.1, 0.4, -0.5]])  # two rows: an array unpacks into two


def said_of(net, params, x):
    """What check_gradients says of it, having left all arrays as they were."""
    before = all_bytes(params, x)
    try:
        nn.check_gradients(net, params, x)
        words = None
    except AssertionError as error:
        words = str(error)
    assert all_bytes(params, x) == before
    return words


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found_and_named_wherever_it_is(bug):
    make, words = BUGS[bug]
    for around, path in PLACES.values():
        net = around(make())
        params = with_values(net.init(0, (3,))[0], 1)
        if bug.endswith((" key", "in training")):
            params = nn.training(params, 0)
        said = said_of(net, params, X)
        assert said, path
        assert re.match(rf"check_gradients: {path}({words})", said), (path, said)
        assert "\n" not in said


def test_nothing_is_said_of_the_same_networks_without_a_bug():
    for around, _ in PLACES.values():
        net = around(right())
        params = with_values(net.init(0, (3,))[0], 1)
        assert said_of(net, nn.training(params, 0), X) is None


class Locked:
    """A right layer that cannot be copied, with a table that it makes when it first needs it."""

    def __init__(self):
        self.lock, self.tables = threading.Lock(), {}

    def forward(self, params, x):
        with self.lock:
            table = self.tables.setdefault(x.shape, np.arange(x.size).reshape(x.shape) + 1.0)
        return x * table, table

    def backward(self, params, table, dy):
        return dy * table, {}


class Looped:
    """A user's container that calls one layer three times."""

    def __init__(self, inner):
        self.inner = inner

    def forward(self, params, x):
        caches = []
        for _ in range(3):
            x, cache = self.inner.forward(params["inner"], x)
            caches.append(cache)
        return x, caches

    def backward(self, params, caches, dy):
        total = {}
        for cache in reversed(caches):
            dy, grads = self.inner.backward(params["inner"], cache, dy)
            total = nn.tree_add(total, grads)
        return dy, {"inner": total}


def repeated_forward(params, x, *, inner):
    y, cache = inner.forward(params, x)
    return y * len(inner.caches), cache  # a layer may have more than its functions


def repeated_backward(params, cache, dy, *, inner):
    return inner.backward(params, cache, dy * len(inner.caches))


class Results(NamedTuple):
    first: Any
    second: Any


def keyed_noise(params, x):
    noise = 1.0
    if "key" in params:
        noise = np.random.default_rng(params["key"]).random(x.shape)
    return x * noise, noise


def several_results(params, x):
    return {"sum": x + 1, "more": {"square": x * x}}, x


TANH_PARAMS = right().init(0, (3,))[0]
RIGHT_PAIRS = {  # name: (forward, backward, params)
    "x itself": (lambda p, x: (x, None), lambda p, c, dy: (dy, {}), {}),
    "no grads, no params": (lambda p, x: (x, None), lambda p, c, dy: (dy, None), None),
    "lists": (lambda p, x: [2 * x, []], lambda p, c, dy: [2 * dy, {}], {}),
    "named tuples": (lambda p, x: Results(2 * x, Results(x, 0)),
                     lambda p, c, dy: Results(2 * dy * (c.second == 0), {}), {}),
    "views": (lambda p, x: (x.T.copy().T[:, ::-1], x[:1]), lambda p, c, dy: (dy[:, ::-1], {}), {}),
    "broadcast": (lambda p, x: (np.broadcast_to(p["w"], x.shape), x),
                  lambda p, x, dy: (np.broadcast_to(0.0, x.shape), {"w": dy.sum(axis=0)}),
                  {"w": np.ones(3)}),
    "in Fortran's order": (lambda p, x: (np.asfortranarray(3 * x), x),
                           lambda p, c, dy: (np.asfortranarray(3 * dy), {}), {}),
    "own copies": (lambda p, x: (np.add(y := x.copy(), 1, out=y), None),
                   lambda p, c, dy: (np.multiply(d := dy.copy(), 1, out=d), {}), {}),
    "a tree of params": (lambda p, x: tanh_forward(p["a"]["b"], x),
                         lambda p, c, dy: (lambda dx, g: (dx, {"a": {"b": g}}))(
                             *tanh_backward(p["a"]["b"], c, dy)), {"a": {"b": TANH_PARAMS}}),
    "a number": (lambda p, x: (x * p["n"], x), lambda p, x, dy: (
        dy * p["n"], {"n": (x * dy).sum()}), {"n": np.array(3.0)}),
    "other kinds": (lambda p, x: (x * p["n"] * p["mask"], None),
                    lambda p, c, dy: (dy * p["n"] * p["mask"], {}),
                    {"n": np.int8(3), "mask": np.array([True, False, True])}),
    "a function": (lambda p, x: (x**3, lambda dy: 3 * x * x * dy),
                   lambda p, cache, dy: (cache(dy), {}), {}),
    "an object": (lambda p, x: (x**3, types.SimpleNamespace(x=x)),
                  lambda p, c, dy: (3 * c.x**2 * dy, {}), {}),
    "noise with a key": (keyed_noise, lambda p, noise, dy: (dy * noise, {}), {}),
    "trees": (several_results, lambda p, x, dy: (dy["sum"] + 2 * x * dy["more"]["square"], {}), {}),
    "float32 params": (tanh_forward, tanh_backward, nn.tree_map(np.float32, TANH_PARAMS)),
    "far from 0": (lambda p, x: (x + 1e9, None), lambda p, c, dy: (dy, {}), {}),
    "in its own range": (lambda p, x: (np.sqrt(x + 1.2 + 1e-6), x),
                         lambda p, x, dy: (dy / (2 * np.sqrt(x + 1.2 + 1e-6)), {}), {}),
    "a sum of squares less their mean": (
        lambda p, x: ((x + 1e3) ** 2 - 1e6, x), lambda p, x, dy: (2 * (x + 1e3) * dy, {}), {}),
    "nothing": (lambda p, x: (x[:, :0], x), lambda p, x, dy: (np.zeros_like(x), {}), {}),
    "per batch": (lambda p, x: (x.mean(axis=0, keepdims=True), x),
                  lambda p, x, dy: (np.repeat(dy, len(x), axis=0) / len(x), {}), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT_PAIRS)
def test_a_right_pair_passes_however_it_is_written(name):
    forward, backward, params = RIGHT_PAIRS[name]
    layer = nn.Layer(nn.identity_init, forward, backward)
    for x in (X, X[:1], np.asfortranarray(X), X.astype(np.float32), np.stack([X, X], 2)[..., 0]):
        assert said_of(layer, params, x) is None
    if params is not None:
        assert said_of(layer, nn.training(params, 3), X) is None
        net = nn.sequential(a=layer, b=nn.tanh()) if name != "trees" else nn.sequential(a=layer)
        assert said_of(net, {"a": params}, X) is None


def test_right_containers_of_a_user_pass():
    locked = Locked()
    assert said_of(locked, {}, X) is None
    inner = nn.sequential(nn.linear(3), nn.tanh())
    assert said_of(Looped(inner), {"inner": inner.init(0, (3,))[0]}, X) is None
    inner = pair(tanh_forward, tanh_backward)
    inner.caches = [1, 2, 3]
    functions = (
        partial(function, inner=inner) for function in (repeated_forward, repeated_backward)
    )
    net = nn.sequential(nn.tanh(), nn.Layer(tanh_init, *functions))
    assert said_of(net, {"1": TANH_PARAMS}, X) is None
    shared = nn.linear(3)
    net = nn.sequential(shared, nn.relu(), shared, nn.residual(shared, shared))
    assert said_of(net, net.init(0, (3,))[0], X) is None


FEW_BUGS = ("dx: sign", "calls", "forward: x put back", "w: float32", "backward: swapped")


@pytest.mark.parametrize("bug", FEW_BUGS)
def test_bugs_in_a_users_containers_are_named(bug):
    make, words = BUGS[bug]
    net = gated(nn.sequential(nn.linear(3), layer=make()), nn.linear(3))
    said = said_of(net, net.init(0, (3,))[0], X)
    assert re.match(rf"check_gradients: value: layer: ({words})", said), said
    looped = Looped(make())  # whose layers cannot be seen: it is named itself
    looped.init = lambda key, shape: ({"inner": TANH_PARAMS}, shape)
    net = nn.sequential(nn.linear(3), mine=looped, out=nn.linear(2))
    said = said_of(net, net.init(0, (3,))[0], X)
    assert said.startswith("check_gradients: mine: "), said


def test_wrong_wiring_of_right_layers_is_the_combinators():
    wrong = nn.residual(nn.linear(3), nn.tanh())
    wrong = wrong._replace(backward=partial(nn.residual(nn.linear(3)).backward.func,
                                            **wrong.backward.keywords))  # fmt: skip
    nn.check_gradients(wrong, wrong.init(0, (3,))[0], Z)

    def backward(params, cache, dy, layers):
        dx, grads = nn.residual_backward(params, cache, dy, layers=layers)
        return dx - dy, grads

    net = nn.residual(nn.linear(3), nn.tanh())
    net = net._replace(backward=partial(backward, **net.backward.keywords))
    net = nn.sequential(nn.linear(3), block=net, out=nn.linear(2))
    with pytest.raises(AssertionError, match=r"^check_gradients: block: dx\[0, 0\] is"):
        nn.check_gradients(net, net.init(0, (3,))[0], Z)


def test_what_is_said_of_trees_and_statistics():
    def forward(params, x):
        return {"sum": x["a"] + x["b"], "more": {"product": x["a"] * x["b"]}}, x

    def backward(params, x, dy, change=lambda dx: dx):
        s, p = dy["sum"], dy["more"]["product"]
        return change({"a": s + p * x["b"], "b": s + p * x["a"], "n": None}), {}

    rng = np.random.default_rng(0)
    x = {"a": rng.normal(size=(2, 3)), "b": rng.normal(size=(2, 3)), "n": np.arange(2)}
    nn.check_gradients(pair(forward, backward), {}, x)
    for change, words in {
        lambda dx: {"a": dx["a"], "b": dx["b"]}: None,
        lambda dx: {**dx, "b": plus(1e-3, 0, 0)(dx["b"])}: r"dx/b\[0, 0\] is",
        lambda dx: {"b": dx["b"]}: "dx/a must be a float64 array, got None",
        lambda dx: {**dx, "n": np.zeros(2)}: "dx/n must be None, got ndarray",
        lambda dx: {**dx, "m": np.zeros(2)}: "dx/m must be None, got ndarray",
        lambda dx: dx["a"]: "dx/a must be a float64 array, got None",
    }.items():
        layer = pair(forward, partial(backward, change=change))
        if words:
            with pytest.raises(AssertionError, match=f"^check_gradients: {words}"):
                nn.check_gradients(layer, {}, x)
        else:
            nn.check_gradients(layer, {}, x)
    single = pair(lambda params, x: ({"sum": np.float32(x["a"])}, x), backward)
    with pytest.raises(AssertionError, match="^check_gradients: y/sum must be float64 like x, got"):
        nn.check_gradients(single, {}, x)
    for bad in (None, [1.0], np.array(["a"])):
        with pytest.raises(TypeError, match="^check_gradients: x/a must be an array of numbers"):
            nn.check_gradients(single, {}, {**x, "a": bad})
    right = nn.batch_norm()

    def more(params, cache, dy):
        dx, grads = right.backward(params, cache, dy)
        return dx, {**grads, "mean": np.zeros(3)}

    with pytest.raises(
        AssertionError, match="grads have 'mean', but params have no trained entry of"
    ):
        nn.check_gradients(right._replace(backward=more), right.init(0, (3,))[0], x["a"])


@pytest.mark.parametrize("beside", [1e-6, -1e-6, 3e-7])
def test_beside_a_kink_only_the_true_slope_is_right(beside):
    x = np.array([[beside, 1.0, -2.5]])
    for slope in (0.0, 0.3, 0.5, 1.0):
        layer = elementwise_pair(lambda x: np.maximum(x, 0), lambda x, slope=slope: np.where(
            x == beside, slope, x > 0))  # fmt: skip
        if slope == (beside > 0):
            nn.check_gradients(layer, {}, x)
        else:
            with pytest.raises(AssertionError, match=r"dx\[0, 0\] is"):
                nn.check_gradients(layer, {}, x)


def test_a_curve_is_no_kink():
    nn.check_gradients(elementwise_pair(np.exp, np.exp), {}, X)
    with pytest.raises(AssertionError, match=r"dx\[0, 0\] is"):
        nn.check_gradients(elementwise_pair(np.exp, lambda x: 1.00003 * np.exp(x)), {}, X)


def test_at_a_kink_each_output_may_have_a_slope_of_its_own():
    """y = (relu(x), -relu(-x)): the slopes 0 to 1 of both, with r of any signs."""

    def forward(params, x):
        return np.concatenate([np.maximum(x, 0), np.minimum(x, 0)], axis=1), x

    def slopes(a, b):
        return pair(forward, lambda params, x, dy: (dy[:, :1] * a + dy[:, 1:] * b, {}))

    for a, b in itertools.product((0.0, 0.4, 1.0), (0.0, 0.7, 1.0)):
        nn.check_gradients(slopes(a, b), {}, np.zeros((2, 1)))
    with pytest.raises(AssertionError, match=r"dx\[\d, 0\] is"):
        nn.check_gradients(slopes(3.0, 3.0), {}, np.zeros((2, 1)))


def test_slopes_that_drown_in_the_rounding_of_a_layer_pass():
    for x in np.linspace(-9, -5, 40):  # where 1 + tanh is a few times the precision
        nn.check_gradients(nn.gelu(), {}, np.full((1, 1), x))


@pytest.mark.parametrize("key", range(3))
def test_many_kinks_do_not_hide_a_wrong_sample(key):
    images = np.zeros((16, 1, 8, 8))  # most windows of a drawing are ties
    images[:, :, 3:5, 2:6] = np.random.default_rng(key).random((16, 1, 2, 4))
    pool = nn.max_pool2d(2)

    def backward(params, cache, dy):
        dx, _ = pool.backward(params, cache, dy)
        return np.where(np.arange(16)[:, None, None, None] == 15, 0, dx), {}

    nn.check_gradients(pool, {}, images, key=key)
    with pytest.raises(AssertionError, match=r"^check_gradients: bad: dx\[15, 0, \d, \d\] is 0 by"):
        nn.check_gradients(nn.sequential(bad=pool._replace(backward=backward)), {}, images, key=key)


def test_where_many_kinks_meet_right_networks_pass_and_wrong_wiring_does_not():
    images = np.zeros((2, 1, 5, 5))
    net = nn.sequential(
        nn.conv2d(2, 3), nn.relu(), pool=nn.max_pool2d(2, stride=1), mid=nn.residual(nn.relu()),
        top=nn.sequential(nn.flatten(), nn.linear(4), nn.relu(), nn.linear(2)),
    )  # fmt: skip
    params, _ = net.init(0, (1, 5, 5))
    nn.check_gradients(net, params, images)
    nn.check_gradients(net, nn.tree_map(np.zeros_like, params), images + 1)

    def backward(params, cache, dy, layers):
        dx, grads = nn.sequential_backward(params, cache, dy, layers=layers)
        return 2 * dx, grads

    wrong = net._replace(backward=partial(backward, **net.backward.keywords))
    with pytest.raises(AssertionError, match=r"^check_gradients: dx\["):
        nn.check_gradients(wrong, params, images + 1)


@pytest.mark.parametrize("of_x", [1e-6, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("of_w", [1e-6, 1.0, 1e6])
def test_wrong_layers_are_found_in_any_units(of_x, of_w):
    params = nn.tree_map(lambda a: a * of_w, nn.linear(3).init(0, (3,))[0])
    for wrong in (
        dense(dx=lambda x, W, dy: dy @ W.T * 1.001),
        dense(W=lambda x, dy: 0.999 * x.T @ dy),
    ):
        said = said_of(nn.sequential(wrong, nn.softmax()), {"0": params}, X * of_x)
        assert re.match(r"check_gradients: 0: (dx|grads/W)\[\d, \d\] is", said), said


RIGHT_LAYERS = {  # of features, of sequences, of images, by the number of axes of a sample
    1: [
        nn.relu(), nn.tanh(), nn.elu(), nn.leaky_relu(0.1), nn.softplus(), nn.gelu(), nn.silu(),
        nn.sigmoid(), nn.softmax(), nn.log_softmax(), nn.layer_norm(), nn.batch_norm(),
        nn.group_norm(1), nn.dropout(0.3), nn.linear(3), nn.linear(4, bias=False), nn.identity(),
        nn.residual(nn.tanh()), nn.residual(nn.linear(2), nn.linear(2)),
        nn.concatenate(nn.relu(), nn.linear(2)), nn.sequential(nn.linear(2), nn.relu()),
    ],
    2: [
        nn.rnn(3), nn.gru(2), nn.lstm(2, reverse=True), nn.attention(1, causal=True), nn.last(),
        nn.position_embedding(), nn.conv1d(2, 3, padding="causal"), nn.permute(1, 0), nn.flatten(),
        nn.layer_norm(), nn.softmax(), nn.relu(), nn.linear(3), nn.group_norm(1),
        nn.residual(nn.sequential(nn.layer_norm(), nn.gelu())),
    ],
    3: [
        nn.conv2d(2, 3, padding=1), nn.conv2d(3, 2, stride=2, padding=1), nn.relu(),
        nn.max_pool2d(3, stride=1, padding=1), nn.max_pool2d(2), nn.avg_pool2d(2, stride=1),
        nn.batch_norm(), nn.group_norm(1), nn.conv2d_transpose(2, 2), nn.upsample2d(2), nn.tanh(),
        nn.flatten(), nn.global_avg_pool2d(), nn.dropout(0.5), nn.residual(nn.relu()),
        nn.concatenate(nn.conv2d(1, 1), nn.relu()),
    ],
}  # fmt: skip


@st.composite
def right_cases(draw):
    """A network of right layers, params and x, in any units, with and without kinks."""
    start = shape = draw(st.sampled_from([(4,), (3, 4), (2, 4, 4)]))
    seed, layers = draw(st.integers(0, 10**6)), []
    rng = np.random.default_rng(seed)
    for _ in range(draw(st.integers(1, 4))):
        pool = RIGHT_LAYERS[len(shape)]
        layer = draw(st.sampled_from(pool))
        with contextlib.suppress(ValueError):  # where a window is larger than the image
            shape = layer.init(0, shape)[1]
            layers.append(layer)
        if np.prod(shape) > 60:
            break
    net = nn.sequential(*layers)
    if draw(st.booleans()):
        net = nn.sequential(net, nn.heads(a=nn.identity(), b=nn.relu()))
    units = st.sampled_from([1e-6, 1e-3, 1.0, 1.0, 1.0, 1e3, 1e6])
    params = nn.tree_map(lambda a, unit=draw(units): a * unit, net.init(seed, start)[0])
    zeros = partial(nn.tree_map, np.zeros_like)
    params = draw(st.sampled_from([partial(with_values, seed=seed), dict, dict, zeros]))(params)
    values = {
        "normal": rng.normal(size=(3, *start)), "whole": rng.integers(-1, 2, (3, *start)) + 0.0,
        "black": np.zeros((2, *start)), "white": np.ones((2, *start)),
    }  # fmt: skip
    x = values[draw(st.sampled_from([*values]))] * draw(units)
    if draw(st.booleans()):
        return net, nn.training(params, seed), x, seed
    return net, params, x[: draw(st.integers(1, 3))], seed


@given(right_cases())
def test_right_networks_pass(case):
    net, params, x, key = case
    nn.check_gradients(net, params, x, key=key)


def test_kinks_and_statistics_and_missing_params_are_no_errors():
    x = np.array([[0.0, 1e-9, -1e-9, 2.0]])
    nn.check_gradients(nn.relu(), {}, x)
    nn.check_gradients(nn.leaky_relu(0.5), None, x)
    wrong = nn.relu()._replace(backward=lambda params, y, dy: (dy * (y > 0) * 1.1 - 0.1, {}))
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


@pytest.mark.parametrize("smaller", [0.5, -0.5])
def test_the_larger_of_two_wrong_entries_is_found_whatever_the_other(smaller):
    errors = np.zeros((1, 20_000))
    layer = elementwise_pair(lambda x: x, lambda x: 1)
    layer.backward = lambda params, x, dy: (dy + errors, {})
    nn.check_gradients(layer, {}, np.ones_like(errors))
    errors[0, 10], errors[0, 19_000] = smaller, 1
    with pytest.raises(AssertionError, match=r"dx\[0, 19000\] is"):
        nn.check_gradients(layer, {}, np.ones_like(errors))


def test_the_search_for_a_wrong_entry_takes_small_steps():
    x = np.random.default_rng(0).normal(size=(1, 20_000))
    x[0, 12_345] = 1
    factor = np.ones_like(x)
    layer = elementwise_pair(lambda x: x**3, lambda x: 3 * x * x * factor)
    nn.check_gradients(layer, {}, x)
    factor[0, 12_345] = 1.01
    with pytest.raises(AssertionError, match=r"dx\[0, 12345\] is"):
        nn.check_gradients(layer, {}, x)


def test_large_numbers_are_no_excuse_and_no_offence():
    for x in (np.full((1, 3), 1e6), np.full((1, 3), -1e6)):
        with pytest.raises(AssertionError, match=r"dx\[0, 0\] is"):
            nn.check_gradients(elementwise_pair(lambda x: 2 * x, lambda x: 2.002), {}, x)
    x = np.random.default_rng(0).normal(size=(5, 5))
    nn.check_gradients(elementwise_pair(lambda x: x + 1e8, lambda x: 1), {}, x)


def test_the_slope_at_a_kink_lies_between_those_of_its_sides():
    def kinked(slope_at_0, slope_elsewhere=3):
        return elementwise_pair(
            lambda x: np.where(x > 0, 3 * x, x),
            lambda x: np.where(x > 0, slope_elsewhere, np.where(x < 0, 1, slope_at_0)),
        )

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


def test_errors_that_cancel_are_found_with_some_key():
    params, x = stranger_inputs(1, 2000, 1)
    cancel = Stranger(b=lambda b: plus(0.5, 666)(plus(-0.5, 667)(b)))
    found = 0
    for key in range(12):
        try:
            nn.check_gradients(cancel, params, x, key=key)
        except AssertionError:
            found += 1
    assert found >= 3  # about half of the keys give the two entries one sign, so that they add up


def test_the_key_of_a_check_decides_what_is_sent_back_and_is_0_by_default():
    seen = {}
    for case, key in {"default": {}, "0": {"key": 0}, "1": {"key": 1}}.items():

        def backward(params, x, dy, case=case):
            seen.setdefault(case, dy)
            return dy, {}

        nn.check_gradients(pair(lambda params, x: (x, x), backward), {}, np.ones((2, 3)), **key)
    np.testing.assert_array_equal(seen["default"], seen["0"])
    assert not np.array_equal(seen["0"], seen["1"])


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


@given(count=st.integers(1, 40), size=st.integers(1, 40), key=st.integers(0, 100))
def test_drop_last_leaves_out_what_is_smaller(count, size, key):
    if size <= count:
        whole = [part for part in nn.batches(count, size, key) if len(part) == size]
        assert all_bytes(*nn.batches(count, size, key, drop_last=True)) == all_bytes(*whole)


@pytest.mark.usefixtures("no_warnings")
def test_accuracy_is_the_share_of_right_ones():
    logits = np.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]], np.float32)
    assert nn.accuracy(logits, np.array([1, 0, 0])) == 2 / 3
    assert type(nn.accuracy(logits, np.array([1, 0, 1], np.uint8))) is float
    spoiled = np.array([[math.nan, 0, 1], [3, math.nan, 1], [0, 0, -1], [-1, math.inf, 0]])
    assert nn.accuracy(spoiled, np.array([0, 1, 0, 1])) == 1 / 2
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


@pytest.mark.parametrize("net", [Stranger(), nn.linear(3)])
def test_value_and_grad_takes_a_stranger_and_a_single_layer(net):
    params, x = stranger_inputs()
    y = x @ params["W"] + params["b"]
    gradients = nn.value_and_grad(net, nn.mean_squared_error)
    for function in (gradients, nn.data_parallel(gradients, 2)):
        loss, grads, cache = function(params, x, np.zeros((4, 3)))
        assert loss == pytest.approx((y**2).mean())
        np.testing.assert_allclose(grads["W"], x.T @ (2 * y / y.size))
    assert cache == {}
    assert all_bytes(nn.update_statistics(params, cache)) == all_bytes(params)


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

    def mean(trees):
        return nn.tree_map(lambda *a: sum(s * b for s, b in zip(shares, a, strict=True)), *trees)

    assert_close(grads, mean(part[1] for part in parts), rtol=1e-6, atol=1e-9)
    del params["key"]
    moved = (nn.update_statistics(params, part[2], 1.0) for part in parts)
    assert_close(nn.update_statistics(params, cache, 1.0), mean(moved), rtol=1e-6, atol=1e-9)


def loss_of_two(y, target):
    value, d_class = nn.softmax_cross_entropy(y["class"], target["class"], weights=target["weight"])
    other, d_number = nn.mean_squared_error(y["number"], target["number"])
    return value + other, {"class": d_class, "number": d_number}


def test_trees_as_data_go_through_every_helper():
    image = nn.sequential(nn.conv2d(2, 3), nn.relu(), nn.flatten())
    body = nn.concatenate(image=image, vector=nn.linear(3))
    top = nn.heads(**{"class": nn.linear(4), "number": nn.linear(1)})
    net, rng = nn.sequential(body, nn.tanh(), top), np.random.default_rng(0)
    params, shape = net.init(0, {"image": (1, 5, 5), "vector": (4,)})
    assert shape == {"class": (4,), "number": (1,)}
    x = {"image": rng.normal(size=(8, 1, 5, 5)), "vector": rng.normal(size=(8, 4))}
    target = {
        "class": rng.integers(0, 4, 8),
        "number": rng.normal(size=(8, 1)),
        "weight": np.ones(8),
    }
    gradients = nn.value_and_grad(net, loss_of_two)
    loss, grads, _ = gradients(params, x, target)
    y, cache = net.forward(params, x)
    expected, dy = loss_of_two(y, target)
    assert loss == expected
    assert all_bytes(grads) == all_bytes(net.backward(params, cache, dy)[1])
    for shards in (1, 3, 20):
        value, in_parts, cache = nn.data_parallel(gradients, shards)(params, x, target)
        assert value == pytest.approx(loss)
        assert_close(in_parts, grads, rtol=1e-9, atol=1e-12)
        assert cache == {}
    part = nn.tree_map(lambda a: a[:2], {"x": x, "target": target})
    nn.check_gradients(net, params, part["x"])
    nn.check_gradients(net, nn.training(params, 0), nn.tree_map(np.float32, part["x"]))
    with pytest.raises(
        ValueError, match="^data_parallel: the numbers of samples differ, {'x/image': 2"
    ):
        nn.data_parallel(gradients, 2)(params, part["x"], target)
    with pytest.raises(
        TypeError, match=r"^data_parallel: target/class must be an array \(N, ...\)"
    ):
        nn.data_parallel(gradients, 2)(params, x, {**target, "class": None})


def test_data_parallel_refuses_what_its_function_would_refuse():
    net, params, x, labels = parallel_case(4)
    in_parts = nn.data_parallel(nn.value_and_grad(net, nn.softmax_cross_entropy), 2)
    net, params, many, labels_of_many = parallel_case(300)
    assert math.isfinite(in_parts(params, many, labels_of_many)[0])
    with pytest.raises(ValueError, match="logits must not be empty"):
        in_parts(params, x[:0], labels[:0])
    for count in (1, 3):
        function, words = nn.value_and_grad(net, nn.hinge), f"returned {count} results"
        odd = nn.data_parallel(function, 2, lambda f, parts, n=count: [f(parts[0])] * n)
        with pytest.raises(ValueError, match=f"data_parallel: map {words} for 2 parts"):
            odd(params, x, labels)


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


def test_a_network_in_several_threads_gives_the_bits_of_one():
    net, params, x, labels = parallel_case(8, norm=True)
    optimizer = nn.adam(nn.cosine(0.01, 9))
    state = optimizer.init(params)
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
    with in_short_turns(4) as pool:
        together = list(pool.map(training_steps, seeds))
    assert together == [alone[seed] for seed in seeds]
    assert all_bytes(params, state, {"x": x}) == before


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


def test_samples_between_pixels_are_bilinear_and_zero_outside():
    image = np.arange(12.0).reshape(1, 1, 3, 4) + 1
    points = [(0, 0), (2, 3), (0.5, 1), (1, 1.25), (1.5, 2.5), (-0.5, 0)]
    points += [(2, 3.75), (-1, 0), (9, -9), (2.5, 3), (0, -0.5)]
    rows, columns = np.array(points).T.reshape(2, 1, 1, -1)
    values = nn._sample(image, rows, columns)[0, 0, 0]
    np.testing.assert_allclose(values, [1, 12, 4, 6.25, 9.5, 0.5, 3, 0, 0, 6, 0.5], atol=0.05)


def moments(images):
    """(rows, columns) of the center of each image, and its covariance there."""
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
    centers, _ = moments(nn.augment(3, images, **{**STILL, "shift": 4}))
    for axis in centers - 20:
        assert 3.8 < axis.max() <= 4.01
        assert -4.01 <= axis.min() < -3.8
        assert abs(axis.std() - 4 / math.sqrt(3)) < 0.2
    assert abs(np.corrcoef(centers)[0, 1]) < 0.15


def test_rotations_are_uniform_degrees_around_the_middle():
    centers, ((rr, rc), (_, cc)) = moments(
        nn.augment(3, ellipses(400), **{**STILL, "rotation": 30})
    )
    angles = np.degrees(np.arctan2(2 * rc, rr - cc) / 2)
    assert 28.5 < angles.max() < 30.2
    assert -30.2 < angles.min() < -28.5
    np.testing.assert_allclose(centers, 20, atol=0.05)


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


def test_images_are_flipped_left_to_right_with_their_chance():
    images = np.random.default_rng(0).normal(size=(4000, 2, 3, 5)).astype(np.float32)
    for flip in (0.0, 0.25, 1.0):
        seen = nn.augment(3, frozen(images), flip=flip, **STILL)
        flipped = (seen == images[..., ::-1]).all(axis=(1, 2, 3))
        assert (flipped | (seen == images).all(axis=(1, 2, 3))).all()
        assert abs(flipped.mean() - flip) < 0.03
    few, turned = images[:9], images[:9, ..., ::-1]
    both = nn.augment(3, few, elastic=1.0, flip=0.5)  # flipped first, then the rest as without
    one_of = [nn.augment(3, images, elastic=1.0) for images in (few, turned)]
    same = [(both == one).all(axis=(1, 2, 3)) for one in one_of]
    np.testing.assert_array_equal(same[0], ~same[1])
    assert set(same[0]) == {True, False}


def test_images_that_are_not_square_stay_in_the_middle():
    centers, _ = moments(nn.augment(1, ellipses(50, 31, 61), shift=0))
    np.testing.assert_allclose(centers[0], 15, atol=0.1)
    np.testing.assert_allclose(centers[1], 30, atol=0.1)


# ------------------------------------------------------------------------------------------------
# Exchange with PyTorch, and a summary
# ------------------------------------------------------------------------------------------------


class Exchanged(NamedTuple):
    """A network, the shape of a sample, the same in PyTorch, and names and shapes of its state."""

    net: Any
    shape: tuple
    torch: str  # an expression with t for torch.nn
    state: dict


EXCHANGED = {
    "linear": Exchanged(
        nn.linear(3), (5, 4), "t.Linear(4, 3)", {"weight": (3, 4), "bias": (3,)}
    ),
    "without bias": Exchanged(
        nn.linear(3, bias=False), (4,), "t.Linear(4, 3, bias=False)", {"weight": (3, 4)}
    ),
    "conv2d": Exchanged(
        nn.conv2d(6, (5, 2), stride=2, padding=1, dilation=(2, 1), groups=2), (4, 7, 8),
        "t.Conv2d(4, 6, (5, 2), stride=2, padding=1, dilation=(2, 1), groups=2)",
        {"weight": (6, 2, 5, 2), "bias": (6,)},
    ),
    "batch_norm": Exchanged(
        nn.batch_norm(), (3, 4, 2), "t.BatchNorm2d(3)",
        {"weight": (3,), "bias": (3,), "running_mean": (3,), "running_var": (3,),
         "num_batches_tracked": ()},
    ),
    "layer_norm": Exchanged(
        nn.layer_norm(eps=1e-3), (3, 4), "t.LayerNorm(4, eps=1e-3)",
        {"weight": (4,), "bias": (4,)},
    ),
    "group_norm": Exchanged(
        nn.group_norm(2, eps=1e-3), (6, 3, 4), "t.GroupNorm(2, 6, eps=1e-3)",
        {"weight": (6,), "bias": (6,)},
    ),
    "group_norm of features": Exchanged(
        nn.group_norm(3), (6,), "t.GroupNorm(3, 6)", {"weight": (6,), "bias": (6,)}
    ),
    "group_norm of sequences": Exchanged(
        nn.group_norm(3), (6, 5), "t.GroupNorm(3, 6)", {"weight": (6,), "bias": (6,)}
    ),
    "upsample2d": Exchanged(
        nn.upsample2d((2, 3)), (2, 3, 4), "t.Upsample(scale_factor=(2, 3))", {}
    ),
    **{
        f"{layer} as {code}": Exchanged(layer, shape, f"t.{code}", {})
        for layer, shape, code in [
            (nn.identity(), (7,), "Identity()"),
            (nn.flatten(), (2, 3, 4), "Flatten()"),
            (nn.reshape(4, 3), (2, 6), "Sequential(t.Flatten(), t.Unflatten(1, (4, 3)))"),
            (nn.relu(), (7,), "ReLU()"),
            (nn.leaky_relu(0.2), (7,), "LeakyReLU(0.2)"),
            (nn.elu(1.5), (7,), "ELU(1.5)"),
            (nn.sigmoid(), (7,), "Sigmoid()"),
            (nn.tanh(), (7,), "Tanh()"),
            (nn.softplus(), (7,), "Softplus()"),
            (nn.gelu(), (7,), "GELU(approximate='tanh')"),
            (nn.gelu(exact=True), (7,), "GELU()"),
            (nn.silu(), (7,), "SiLU()"),
            (nn.softmax(), (3, 4), "Softmax(-1)"),
            (nn.log_softmax(), (3, 4), "LogSoftmax(-1)"),
            (nn.dropout(0), (7,), "Dropout(0)"),
            (nn.max_pool2d(3, stride=2, padding=1), (2, 6, 7), "MaxPool2d(3, 2, 1)"),
            (nn.avg_pool2d(3, stride=2, padding=1), (2, 6, 7), "AvgPool2d(3, 2, 1)"),
            (nn.global_avg_pool2d(), (2, 3, 4), "Sequential(t.AdaptiveAvgPool2d(1), t.Flatten())"),
        ]
    },
    "nested": Exchanged(
        nn.sequential(
            nn.conv2d(4, 3, bias=False), nn.batch_norm(), nn.relu(),
            nn.sequential(nn.group_norm(2), nn.upsample2d(2), nn.max_pool2d(2)),
            nn.flatten(), nn.linear(8), nn.reshape(2, 4), nn.linear(3), nn.flatten(),
        ),
        (2, 6, 6),
        "t.Sequential(t.Conv2d(2, 4, 3, bias=False), t.BatchNorm2d(4), t.ReLU(),"
        " t.Sequential(t.GroupNorm(2, 4), t.Upsample(scale_factor=2), t.MaxPool2d(2)),"
        " t.Flatten(), t.Linear(64, 8), t.Unflatten(1, (2, 4)), t.Linear(4, 3), t.Flatten())",
        {"0.weight": (4, 2, 3, 3), "1.weight": (4,), "1.bias": (4,), "1.running_mean": (4,),
         "1.running_var": (4,), "1.num_batches_tracked": (), "3.0.weight": (4,), "3.0.bias": (4,),
         "5.weight": (8, 64), "5.bias": (8,), "7.weight": (3, 4), "7.bias": (3,)},
    ),
}  # fmt: skip
if hasattr(nn, "lstm"):  # branch seq
    EXCHANGED |= {
        "embedding": Exchanged(
            nn.embedding(7, 3), (5,), "t.Embedding(7, 3)", {"weight": (7, 3)}
        ),
        **{
            name: Exchanged(
                getattr(nn, name)(4), (5, 3), f"First(t.{name.upper()}(3, 4, batch_first=True))",
                {"weight_ih_l0": (4 * k, 3), "weight_hh_l0": (4 * k, 4),
                 "bias_ih_l0": (4 * k,), "bias_hh_l0": (4 * k,)},
            )
            for name, k in (("rnn", 1), ("gru", 3), ("lstm", 4))
        },
        "attention": Exchanged(
            nn.attention(2), (5, 6), "First(t.MultiheadAttention(6, 2, batch_first=True))",
            {"in_proj_weight": (18, 6), "in_proj_bias": (18,), "out_proj.weight": (6, 6),
             "out_proj.bias": (6,)},
        ),
    }  # fmt: skip
if hasattr(nn, "conv2d_transpose"):
    EXCHANGED |= {
        "conv1d": Exchanged(
            nn.conv1d(6, 3, stride=2, padding=1, groups=2), (4, 9),
            "t.Conv1d(4, 6, 3, stride=2, padding=1, groups=2)",
            {"weight": (6, 2, 3), "bias": (6,)},
        ),
        "conv2d_transpose": Exchanged(
            nn.conv2d_transpose(6, (3, 2), stride=2, padding=1, groups=2), (4, 5, 4),
            "t.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=1, groups=2)",
            {"weight": (4, 3, 3, 2), "bias": (6,)},
        ),
    }  # fmt: skip
if hasattr(nn, "heads"):  # branch comb
    parts = nn.concatenate(nn.linear(2), b=nn.linear(3))
    EXCHANGED["combinators"] = Exchanged(
        nn.sequential(parts=parts, out=nn.heads(x=nn.linear(1), y=nn.tanh())), (4,), "",
        {"parts.0.weight": (2, 4), "parts.0.bias": (2,), "parts.b.weight": (3, 4),
         "parts.b.bias": (3,), "out.x.weight": (1, 5), "out.x.bias": (1,)},
    )  # fmt: skip
every_exchange = pytest.mark.parametrize("name", EXCHANGED)


@every_exchange
def test_a_state_has_pytorchs_names_shapes_and_kinds_and_comes_back_to_the_bit(name):
    net, shape, _, names = EXCHANGED[name]
    params = frozen(with_values(net.init(0, shape)[0], 1))
    state = nn.to_torch(net, params)
    assert {name: array.shape for name, array in state.items()} == names
    assert list(state) == list(names)
    for entry, array in state.items():
        assert array.dtype == (np.int64 if entry.endswith("tracked") else np.float32)
        assert array.flags.c_contiguous
        assert array.flags.writeable
    back = nn.from_torch(net, frozen(state))
    assert all_bytes(back) == all_bytes(params)
    assert list(nn.tree_flatten(back)) == list(nn.tree_flatten(params))
    for leaf in leaves(back).values():
        leaf += 1  # it is nobody else's
    assert all_bytes(nn.to_torch(net, params)) == all_bytes(state)
    no_counts = {entry: v for entry, v in state.items() if not entry.endswith("tracked")}
    assert all_bytes(nn.from_torch(net, no_counts)) == all_bytes(params)


@every_exchange
def test_what_does_not_fit_a_network_is_named(name):
    net, shape, *_ = EXCHANGED[name]
    params = net.init(0, shape)[0]
    state = nn.to_torch(net, params)
    for tree, function, check in (
        (state, partial(nn.from_torch, net), "from_torch"),
        (
            nn.tree_flatten(params),
            lambda flat: nn.to_torch(net, nn.tree_unflatten(flat)),
            "to_torch",
        ),
    ):
        entries = [entry for entry in tree if not entry.endswith("tracked")]
        for entry in entries:
            words = re.escape(f"{check}: there is no entry {entry!r} in ")
            with pytest.raises(ValueError, match=f"^{words}"):
                function({other: array for other, array in tree.items() if other != entry})
            for wrong in (None, 1.0, tree[entry].tolist(), tree[entry].astype(np.float16)):
                with pytest.raises(TypeError, match=f"^{check}: {re.escape(entry)} must be "):
                    function({**tree, entry: wrong})
            for wrong in (tree[entry][None], tree[entry][:0]):
                words = re.escape(f"{check}: {entry} {wrong.shape}")
                with pytest.raises(ValueError, match=rf"^{words}(:| does not fit) "):
                    function({**tree, entry: wrong})
            if check == "from_torch" and (name, entry) != ("conv2d_transpose", "weight"):
                wrong = np.repeat(tree[entry], 3, axis=0)  # options or other entries forbid it
                layer = re.escape(re.sub(r"\w+$", "", entry))
                with pytest.raises(ValueError, match=rf"^from_torch: {layer}\S+:? "):
                    function({**tree, entry: wrong})
        words = rf"^{check}: no layer that PyTorch has takes the entries \['x'\]$"
        with pytest.raises(ValueError, match=words):
            function({**tree, "x": np.ones(3)})


@every_exchange
@pytest.mark.parametrize("in_training", [False, True])
def test_pytorch_computes_the_same_with_the_same_state(name, in_training):
    torch = pytest.importorskip("torch")
    net, shape, code, names = EXCHANGED[name]
    if not code:
        return

    class First(torch.nn.Module):  # of what recurrent layers and attention give
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(*[x] * (3 if "Multihead" in code else 1))[0]

    module = eval(code, {"t": torch.nn, "First": First}).double().train(in_training)
    own = getattr(module, "layer", module)
    assert {entry: tuple(v.shape) for entry, v in own.state_dict().items()} == names
    params = as_dtype(with_values(net.init(0, shape)[0], 1), np.float64)
    arrays = nn.to_torch(net, params)
    own.load_state_dict({entry: torch.from_numpy(array) for entry, array in arrays.items()})
    rng = np.random.default_rng(2)
    x = rng.integers(0, 7, (4, *shape)) if name == "embedding" else rng.normal(size=(4, *shape))
    inputs = torch.from_numpy(x.copy()).requires_grad_(x.dtype.kind == "f")
    given = nn.training(params, 0) if in_training else params
    y, cache = net.forward(given, x)
    dy = upstream(y)
    dx, grads = net.backward(given, cache, dy)
    output = module(inputs)
    output.backward(torch.from_numpy(dy))
    np.testing.assert_allclose(y, output.detach(), rtol=1e-10, atol=1e-12)
    if dx is not None:
        np.testing.assert_allclose(dx, inputs.grad, rtol=1e-10, atol=1e-12)
    flat = nn.tree_flatten(params) | nn.tree_flatten(grads)
    ours = nn.to_torch(net, nn.tree_unflatten(flat))
    for entry, parameter in own.named_parameters():
        if entry == "bias_hh_l0" and name != "gru":
            entry = "bias_ih_l0"  # their sum is one entry here
        np.testing.assert_allclose(ours[entry], parameter.grad, rtol=1e-10, atol=1e-11)
    if in_training:
        moved = nn.to_torch(net, nn.update_statistics(params, cache))
        for entry, buffer in own.named_buffers():
            if not entry.endswith("tracked"):
                np.testing.assert_allclose(moved[entry], buffer, rtol=1e-10)
    state = {entry: tensor.numpy() for entry, tensor in own.state_dict().items()}
    assert nn.tree_flatten(nn.from_torch(net, state)).keys() == nn.tree_flatten(params).keys()


@pytest.mark.parametrize(
    ("layer", "change"),
    [
        (nn.attention(1), {"in_proj_weight": np.zeros((3, 10**5), np.float32)}),
        (nn.lstm(2), {"weight_ih_l0": np.broadcast_to(np.float32(0), (4, 10**8))}),
        (nn.linear(3), {"weight": np.broadcast_to(np.float32(0), (2, 10**10))}),
        (nn.group_norm(2), {"weight": np.zeros((10**9, 0))}),
        (nn.conv2d(2, 3), {"weight": np.broadcast_to(np.float32(0), (2, 10**9, 1, 1))}),
    ],
)
def test_a_state_that_does_not_fit_takes_no_memory(layer, change):
    def refused():
        with pytest.raises(ValueError, match=r"^from_torch: \S+ \(.*\) does not fit "):
            nn.from_torch(layer, change)

    assert peak_memory(refused) < 10_000_000


@pytest.mark.filterwarnings("error")
def test_a_state_of_another_byte_order_or_with_huge_values_is_taken_as_it_is():
    state = nn.to_torch(nn.lstm(2), nn.lstm(2).init(0, (4, 3))[0])
    swapped = {name: array.astype(">f4") for name, array in state.items()}
    assert all_bytes(nn.from_torch(nn.lstm(2), swapped)) == all_bytes(
        nn.from_torch(nn.lstm(2), state)
    )
    huge = {name: np.full_like(array, 3e38) for name, array in state.items()}
    assert np.isinf(nn.from_torch(nn.lstm(2), huge)["b"]).all()


def test_names_of_layers_become_paths_with_dots():
    block = nn.residual(nn.sequential(a=nn.linear(4), b=nn.tanh()), nn.linear(4, bias=False))
    net = nn.sequential(nn.relu(), block=block, out=nn.linear(2))
    params, _ = net.init(0, (3,))
    assert {name: array.shape for name, array in nn.to_torch(net, params).items()} == {
        "block.branch.a.weight": (4, 3),
        "block.branch.a.bias": (4,),
        "block.shortcut.weight": (4, 3),
        "out.weight": (2, 4),
        "out.bias": (2,),
    }
    np.testing.assert_array_equal(
        nn.to_torch(net, params)["block.shortcut.weight"], params["block"]["shortcut"]["W"].T
    )


class Doubled:
    """A user's own layer, without params."""

    def init(self, key, shape):
        return {}, shape

    def forward(self, params, x):
        return 2 * x, None

    def backward(self, params, cache, dy):
        return 2 * dy, {}


def test_a_layer_that_pytorch_lacks_is_refused_by_name_if_it_has_params():
    own = nn.Layer(nn.linear(3).init, lambda params, x: (x, x), nn.linear_backward)
    net = nn.sequential(Doubled(), block=nn.sequential(own))
    params, _ = net.init(0, (3,))
    words = "no layer that PyTorch has takes the entries "
    with pytest.raises(ValueError, match=re.escape(f"{words}['block/0/W', 'block/0/b']")):
        nn.to_torch(net, params)
    with pytest.raises(ValueError, match=re.escape(f"{words}['block.0.weight']")):
        nn.from_torch(net, {"block.0.weight": np.ones((3, 3))})
    doubled = nn.sequential(Doubled(), nn.linear(3))
    params, _ = doubled.init(0, (3,))
    state = nn.to_torch(doubled, params)
    assert list(state) == ["1.weight", "1.bias"]
    assert all_bytes(nn.from_torch(doubled, state)) == all_bytes(params)
    if hasattr(nn, "lstm"):  # branch seq
        for layer in (nn.lstm(3, reverse=True), nn.position_embedding()):
            words = re.escape(f"1: PyTorch has no {layer!r}")
            net = nn.sequential(nn.linear(4), layer)
            params, _ = net.init(0, (5, 2))
            with pytest.raises(ValueError, match=f"^to_torch: {words}$"):
                nn.to_torch(net, params)
            with pytest.raises(ValueError, match=f"^from_torch: {words}$"):
                nn.from_torch(net, {"0.weight": np.ones((4, 2)), "0.bias": np.ones(4)})


def test_the_summary_has_a_line_for_each_layer_and_the_total():
    block = nn.sequential(nn.conv2d(4, 3, padding=1), nn.batch_norm(), Doubled())
    net = nn.sequential(
        nn.conv2d(4, 3), block=nn.residual(block), flat=nn.flatten(), out=nn.linear(300)
    )
    text = nn.summary(net, (1, 5, 5))
    assert text.splitlines() == [
        "0               conv2d      (4, 3, 3)      40",
        "block/branch/0  conv2d      (4, 3, 3)     148",
        "block/branch/1  batch_norm  (4, 3, 3)      16",
        "block/branch/2  Doubled     (4, 3, 3)       0",
        "block/shortcut  identity    (4, 3, 3)       0",
        "flat            flatten     (36,)           0",
        "out             linear      (300,)     11,100",
        "total                                  11,304",
    ]
    assert nn.summary(net, (1, 5, 5)) == text
    assert nn.count_parameters(net.init(0, (1, 5, 5))[0]) == 11304
    one = ["       linear  (3,)  15", "total                15"]
    assert nn.summary(nn.linear(3), (4,)).splitlines() == one
    for shape, words in (
        ((5, 5), "0: conv2d: shape must be"),
        (5, "conv2d: shape must be a tuple"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            nn.summary(net, shape)
    with pytest.raises(TypeError, match="^summary: net must be a layer, but 3 has no init$"):
        nn.summary(3, (1,))


@pytest.mark.skipif(not hasattr(nn, "heads"), reason="branch comb")
def test_the_summary_takes_a_dict_of_shapes():
    parts = nn.concatenate(image=nn.sequential(nn.conv2d(4, 3), nn.flatten()), more=nn.linear(3))
    net = nn.sequential(parts=parts, out=nn.heads(kind=nn.linear(2), size=nn.linear(1)))
    assert nn.summary(net, {"more": (5,), "image": (1, 6, 6)}).splitlines() == [
        "parts/image/0  conv2d   (4, 4, 4)   40",
        "parts/image/1  flatten  (64,)        0",
        "parts/more     linear   (3,)        18",
        "out/kind       linear   (2,)       136",
        "out/size       linear   (1,)        68",
        "total                              262",
    ]


# ------------------------------------------------------------------------------------------------
# Huge, subnormal and odd values: right, or inf where they are too large; never a warning
# ------------------------------------------------------------------------------------------------


SIZES = {  # finite, from zero to the largest of each dtype
    np.float32: [0.0, 1e-45, 1e-40, 1e-20, 1.0, 1e10, 1e19, 1e30, 3.4028235e38],
    np.float64: [0.0, 5e-324, 1e-310, 1e-20, 1.0, 1e19, 1e150, 1e300, 1.7976931348623157e308],
}
every_dtype = pytest.mark.parametrize("dtype", SIZES)
NOT_FINITE = [math.inf, -math.inf, math.nan]


def extreme(draw, shape, dtype, others=()):
    """An array of few different values, of all sizes and both signs."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    values = [*SIZES[dtype], *(-size for size in SIZES[dtype]), *others, *others]
    return rng.choice(rng.choice(values, rng.integers(1, 6)), shape).astype(dtype)


def extreme_tree(draw, tree, dtype, others=()):
    return map_floats(lambda a: extreme(draw, a.shape, dtype, others), tree)


@every_layer
@every_dtype
@pytest.mark.usefixtures("no_warnings")
@settings(max_examples=5)
@given(data=st.data())
def test_layers_take_values_of_any_size_without_a_warning(name, dtype, data):
    layer, params, x, *_ = data.draw(cases(name, dtypes=[dtype]))
    inputs = params, x
    for others in ([], NOT_FINITE):
        params, x = (extreme_tree(data.draw, tree, dtype, others) for tree in inputs)
        y, cache = layer.forward(params, x)
        dy = extreme_tree(data.draw, y, dtype, others)
        dx, grads = layer.backward(params, cache, dy)
        assert {a.dtype for tree in (y, dx, grads) for a in leaves(tree).values()} == {
            np.dtype(dtype)
        }
        if "key" in params:
            nn.update_statistics(params, cache)
        for result, dx_or_y in ((y, "y"), (layer.backward(params, cache, upstream(y))[0], "dx")):
            if not others and dx_or_y not in LAYERS[name].nan:
                assert not any(np.isnan(leaf).any() for leaf in leaves(result).values())


@every_layer
@pytest.mark.usefixtures("no_warnings")
@settings(max_examples=5)
@given(data=st.data())
def test_what_is_too_large_for_float32_becomes_inf_without_a_warning(name, data):
    layer, params, x, *_ = data.draw(cases(name, dtypes=[np.float32]))
    if any(leaf.dtype.kind != "f" for leaf in leaves(x).values()):
        return  # then params decide about the dtype
    huge = map_floats(lambda a: a.astype(float) * 1e300, params)
    y, cache = layer.forward(huge, x)
    dx, _ = layer.backward(huge, cache, nn.tree_map(lambda a: np.full(a.shape, 1e300), y))
    assert {leaf.dtype for tree in (y, dx) for leaf in leaves(tree).values()} == {np.dtype("f4")}


EVERY_LOSS = {**CLASS_LOSSES, **ELEMENT_LOSSES}


@pytest.mark.parametrize("loss", EVERY_LOSS)
@every_dtype
@pytest.mark.usefixtures("no_warnings")
@given(data=st.data())
def test_losses_are_numbers_for_predictions_of_any_size(loss, dtype, data):
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    prediction, target = (extreme(data.draw, shape, dtype) for _ in range(2))
    function, probable = EVERY_LOSS[loss][0], loss == "cross_entropy"
    if loss in CLASS_LOSSES or loss == "binary_cross_entropy":
        target = np.minimum(abs(target), 1)
    if loss in CLASS_LOSSES and data.draw(st.booleans()):
        target = np.array(data.draw(st.tuples(*[st.integers(0, shape[1] - 1)] * shape[0])))
    value, gradient = function(np.minimum(abs(prediction), 1) if probable else prediction, target)
    assert not math.isnan(value)
    assert not np.isnan(gradient).any()
    assert gradient.dtype == dtype
    with contextlib.suppress(ValueError):  # what is no probability
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


@pytest.mark.parametrize("loss", EVERY_LOSS)
@pytest.mark.parametrize("order", [*ORDERS, "C"])
def test_losses_take_arrays_of_any_order_and_kind(loss, order):
    rng = np.random.default_rng(0)
    prediction, target = rng.random((6, 4)), rng.integers(0, 2, (6, 4)).astype(float)
    expected = EVERY_LOSS[loss][0](prediction, target)
    for kind in ("f2", "f4", ">f8", "i1", "u8", bool):
        other = frozen(in_order(target.astype(kind), order))
        value, gradient = EVERY_LOSS[loss][0](frozen(in_order(prediction, order)), other)
        assert value == pytest.approx(expected[0], rel=1e-12)
        np.testing.assert_allclose(gradient, expected[1], rtol=1e-12)


@pytest.mark.parametrize("shape", [(6, 2), (3, 2, 2, 4)])
@pytest.mark.parametrize("size", [1e19, 1e30, 3e38])
def test_batch_norm_in_float32_normalizes_numbers_whose_squares_are_too_large(shape, size):
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
    assert cache.pop("count").dtype.kind == "i"
    assert {leaf.dtype for leaf in (y, dx, *leaves(cache).values())} == {np.dtype(np.float32)}
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


@every_optimizer
@every_dtype
@pytest.mark.usefixtures("no_warnings")
@settings(max_examples=5)
@given(data=st.data())
def test_optimizers_take_gradients_of_any_size(name, dtype, data):
    constructor, _, _, options = OPTIMIZERS[name]
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
    images = extreme(data.draw, (1, 1, 3, 4), dtype) * dtype(0.5)
    amounts = [
        data.draw(st.sampled_from([0.0, 0.5, largest])) for largest in (1e9, 180, 0.9, 0.9, 1e9)
    ]
    assert not np.isnan(nn.augment(1, images, *amounts)).any()
    images[0, 0, 1, 1] = math.inf
    nn.augment(1, images, 0, 0, 0, 0)


@pytest.mark.usefixtures("no_warnings")
def test_initializers_and_networks_take_values_of_any_size():
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


def test_statistics_without_axes_stay_arrays_and_long_images_have_their_pixels():
    image = np.ones((1, 1, 32768, 1), np.float32)
    assert nn.augment(0, image, shift=50.0, rotation=0.0).shape == image.shape
    params, cache = {"s": np.zeros(())}, {"statistics": {"s": np.ones(())}}
    moved = nn.update_statistics(nn.update_statistics(params, cache, 0.5), cache, 0.5)
    assert type(moved["s"]) is np.ndarray
    assert moved["s"] == 0.75


# ------------------------------------------------------------------------------------------------
# Misuse: every parameter of every public function, and of what these return
# ------------------------------------------------------------------------------------------------

NO_NUMBERS: list = ["1", None, True, [1.0], np.ones(2), 1j, {}]
NO_DICTS: list = [None, [1.0], np.ones(3), "x", 1.0, {1, 2}, ({},)]


def type_error(words, *values):
    """Rows of what a parameter must not be: (value, exception, words of the message).

    Words that begin with "must" follow the name of the parameter, others that of the function;
    after a "^" they stand for themselves.
    """
    return [(value, TypeError, words) for value in values]


def value_error(words, *values):
    return [(value, ValueError, words) for value in values]


def number(limits, *beyond):
    rows = type_error("must be a number, got", *NO_NUMBERS)
    for bad in (math.nan, *beyond):
        finite = "finite and " if bad in (math.inf, -math.inf) and limits != "finite" else ""
        rows += value_error(f"must be {finite}{limits}, got", bad)
    return rows


def whole(minimum):
    rows = type_error("must be a whole number, got", *NO_NUMBERS, math.nan, 1.5, np.float64(2))
    return rows + value_error(f"must be at least {minimum}, got", minimum - 1, -1)


def pair_of(minimum, *also_right):
    no_pairs = ["1", None, True, np.ones(2), 1j, {}, math.nan, 1.5, (1, 1.5), (None, 1)]
    no_pairs = [bad for bad in no_pairs if type(bad) not in map(type, also_right)]
    rows = type_error("must be a whole number, got", *no_pairs)
    words, low = "must be a whole number or a pair of them, got", minimum - 1
    rows += value_error(words, (), (1,), (1, 2, 3), [1.0])
    return rows + value_error(f"must be at least {minimum}, got", low, (1, low), (low, 1))


NO_FUNCTIONS = type_error("must be a function", None, 1, "f", np.ones(2))
NO_BOOLS = type_error("must be True or False, got", None, 1, "yes", np.ones(2))
NO_PATHS = type_error("the path must be a string or", None, 3, 1.5, ["a"], {})
NO_NETS = type_error("must be a layer, but", None, 1, "f", nn.relu, {})
NO_LAYERS = NO_NETS + type_error("must be a layer, but", types.SimpleNamespace(forward=print))
NO_KEYS = [
    *type_error("^key: every number must be a whole number", "0", None, True, 1.5, [1.5], {}),
    *type_error("^key: every number must be a whole", ("a",), (1, (2,)), np.ones(2)),
    *type_error("^key: .* got ndarray of int64 and shape", np.array(3), np.ones((2, 2), int)),
    *value_error("^key: every number must be at least 0, got", -1, (1, -1), np.array([-1])),
    *value_error("^key: expected .*, got an empty one", (), [], np.array([], int)),
]
NO_SHAPES = [
    *type_error("shape must be a tuple", 3, None, "ab", {3}, np.array([3])),
    *value_error("every size in shape must be at least 1", (0,), (-1, 2)),
    *type_error("every size in shape must be a whole", (1.5,), (True,), ("a",), (None,)),
]
RATE, POSITIVE = number(">= 0", -1.0, math.inf, 10**400), number("> 0", -1.0, 0.0, math.inf)
SHARE, BELOW_1 = number(">= 0 and <= 1", -0.1, 1.1), number(">= 0 and < 1", -0.1, 1.0)


def no_numbers(array):
    """Everything that is not an array of real numbers."""
    yield from ([1.0, 2.0], None, "x", object(), np.ma.masked_array(array, array > 0))
    yield from (array.astype(kind) for kind in (object, complex, "S1"))
    yield from [array.view(np.matrix)] if array.ndim == 2 else []


def no_arrays(array):
    """Everything that is not an array of float32 or float64, or of whole numbers as this one."""
    yield from no_numbers(array)
    yield from (1.0, np.float64(1), True, math.nan, {})
    others = (np.float16, int, np.uint8, bool) if array.dtype.kind == "f" else (float, "f4", bool)
    yield from (array.astype(kind) for kind in others)


def kinds(array, name=""):
    words = f"{name} must be (a NumPy array|float32 or float64|an array of)".lstrip()
    return type_error(words, *no_arrays(array))


def other_axes(array):
    yield from (np.ones((), array.dtype), array[None], array[..., None])


def at_leaves(tree, rows):
    """A tree with one of its leaves wrong, at any depth."""
    for path, leaf in leaves(tree).items():
        for bad, kind, words in rows(leaf):
            yield replaced(tree, path, bad), kind, words.replace("{path}", path)


def replaced(tree, path, leaf):
    name, _, rest = path.partition("/")
    return {**tree, name: replaced(tree[name], rest, leaf) if rest else leaf} if name else leaf


def no_trees(tree, name=""):
    yield from type_error(f"{name} must be a dict, got".lstrip(), *NO_DICTS)
    yield from type_error("names must be strings, got 1$", {1: np.ones(2)})
    words = "a name must not be empty or contain '/', got"
    yield from value_error(words, {"": np.ones(2)}, {"a/b": np.ones(2)}, {"x": {"": Z}})
    words = "{path} must be an array of numbers, got"
    yield from at_leaves(tree, lambda leaf: type_error(words, *no_numbers(leaf)))


def dicts(tree):
    return type_error("must be a dict, got", *NO_DICTS)


def every_tree(trees):
    for bad, kind, words in no_trees(trees[1], "every tree"):
        yield (trees[0], bad), kind, words
        yield (bad, trees[0]), kind, words
    words = "'[ab]' is .* and "
    yield from (
        ((trees[0], bad), ValueError, words) for bad in ({"a": np.ones(2)}, {"a": {}}, {"b": Z})
    )


def no_labels(labels):
    rows = [[0, 2], None, "x", 1.0, 0, {}, np.int64(0), np.ma.masked_array([0, 2], [False, True])]
    yield from type_error("labels must be a NumPy array, got", *rows)
    rows = [np.array(0), np.array([0]), np.array([0, 1, 2]), np.array([[0], [2]])]
    words = r"(labels must have shape \(2,\), got|target has shape .*, but the prediction has)"
    yield from value_error(words, *rows, np.ones((2, 4)), Z[None])
    rows = [np.array(bad) for bad in ([0.0, 2.0], [True, False])]
    words = "labels must be whole numbers"
    yield from value_error(words, *rows, np.array([0, 2], object))
    for low, high in ((0, 3), (0, 9), (-1, 0)):
        words = f"labels must be from 0 to 2, got {low} to {high}$"
        yield from value_error(words, np.array([low, high]))


def no_target(target):
    words = "target must be an array of numbers, got"
    yield from type_error(words, *no_numbers(target), 1.0, {})
    words = r"target has shape \(.*\), but the prediction has \(2, 3\)$"
    rows = [np.ones(()), target[None], target[:1], np.ones((2, 4)), np.ones((3, 3)), LABELS]
    yield from value_error(words, *rows)


def no_prediction(prediction):
    yield from kinds(prediction)
    yield from value_error("must not be empty, got", prediction[:0])
    yield from value_error(r"must be \(N, ..., classes\), got", np.ones(2), np.ones(()))
    words = (
        r"labels must have shape \((1, 2|2, 3)\), got \(2,\); for one label per sample put flatten"
    )
    yield from value_error(words, prediction[None], prediction[..., None])


def no_weights(weights):
    wrong = [bad for bad in no_numbers(weights) if bad is not None]
    yield from type_error("must be an array of numbers", *wrong, 1.0, True, {})
    words = r"weights have shape \(.*\), expected \(2,.*\) or its first axes"
    shapes = ((), (1,), (3,), (2, 1), (1, 2), (1, 3), (2, 3, 1))
    yield from value_error(words, *map(np.ones, shapes))
    words, bad = "must be finite, not negative and not all 0$", [math.nan, math.inf, -1]
    yield from value_error(words, *(np.array([1, one]) for one in bad), np.zeros(2, bool))


def no_gradients(grads):
    yield from dicts(grads)
    words = r"that params lack; it is step\(params, grads, state\)$"
    yield from value_error(f"grads have an entry 'x' {words}", {**grads, "x": Z})
    yield from value_error(f"grads have an entry 'd/x' {words}", {**grads, "d": {"x": Z}})
    yield from at_leaves(grads, lambda leaf: kinds(leaf, "{path}: grads"))
    words, sizes = r"{path}: grads have shape \(.*\), but params \(", (np.ones(1), np.ones(4))
    yield from at_leaves(grads, lambda leaf: value_error(words, *other_axes(leaf), *sizes))


def no_params_of_step(params):
    yield from dicts(params)
    yield from at_leaves(params, lambda leaf: kinds(leaf, "{path}: params"))
    shapes = "{path}: grads have shape"
    yield from at_leaves(params, lambda leaf: value_error(shapes, *other_axes(leaf)))
    yield {"d": params["d"]}, ValueError, "grads have an entry 'c' that params lack; it is"


def no_state(state):
    yield from dicts(state)
    theirs = "the state is not this optimizer's, it has"
    yield from value_error(theirs, {}, {**state, "unknown": np.ones(3)})
    optimizers = nn.sgd(0.1), nn.sgd(0.1, 0.9), nn.adam(), nn.rmsprop(), nn.adagrad(), nn.adadelta()
    states = [optimizer.init(STEP["params"]) for optimizer in optimizers]
    states += [{name: state[name] for name in state if name != missing} for missing in state]
    yield from value_error(theirs, *(s for s in states if s.keys() != state.keys()))
    for name in state.keys() - {"step", "scale"}:
        memory, lacks = state[name], f"the state has no {name} of "
        yield from (({**state, name: bad}, ValueError, f"{lacks}params") for bad in NO_DICTS)
        yield {**state, name: {**memory, "d": 1}}, ValueError, f"{lacks}d$"
        leaf = memory["c"]
        wrong = [None, {}, 1.0, np.array(None), np.ones((1, 1)), np.ones(7), np.array(1.0)]
        wrong += [leaf.astype("S1"), leaf.astype(complex), leaf.tolist(), np.ma.masked_array(leaf)]
        wrong += [leaf[None], leaf[..., None], np.array([1])]
        wrong += [] if leaf.dtype.kind == "i" else [leaf.astype(int)]
        wrong = [{**state, name: {**memory, "c": bad}} for bad in wrong]
        yield from value_error(f"{lacks}c and of its", *wrong)
    if "count" in state:
        bad = {**state, "count": {**state["count"], "c": np.array(-1)}}
        yield bad, ValueError, "c: count in the state must be at least 0"
    steps = whole(0) + value_error("", np.array(-1)) + type_error("", np.array(1.0))
    scales = SHARE + value_error("", np.array(2.0), np.array(-0.5))
    for name, rows in (("step", steps), ("scale", scales)):
        for bad, kind, _ in rows:
            yield {**state, name: bad}, kind, f"{name} in the state must be"


def no_plateau(state):
    words = "expected an optimizer's state, got"
    yield from value_error(words, *NO_DICTS, {}, {"step": 1})
    below = {"scale": [2.0, -0.5], "plateau_best": [], "plateau_count": [-1]}
    for name, numbers in below.items():
        words = f"{name} in the state must be"
        yield from value_error(words, *({**state, name: bad} for bad in numbers))
        wrong = [{**state, name: bad} for bad in (None, True, np.ones(2), "x")]
        yield from type_error(words, *wrong)


def no_statistics(cache):
    bad = [one for one in NO_DICTS if not isinstance(one, (np.ndarray, tuple, list))]
    yield from type_error("cache must be the one that forward returned, got", *bad)
    path = "a/statistics/mean"
    wrong = [replaced(cache, path, bad) for bad in no_numbers(np.ones(3))]
    yield from type_error("mean must be an array of numbers, got", *wrong)
    own, words = cache["a"], "the cache has statistics of '(a/)?mean', which params lack$"
    yield from value_error(words, (own,), [1, own], {"b": own}, {"b": [own]})
    yield {"a": [{"statistics": {"var": np.ones(3)}}]}, ValueError, words.replace("mean", "var")
    yield (
        {"a": {**own, "count": np.array(0)}},
        ValueError,
        "nothing was in training mode, see `training`$",
    )
    wrong = [replaced(cache, path, np.ones(size)) for size in (1, 4)]
    yield from value_error("mean is ndarray of float64 and shape", *wrong)


def no_running(params):
    yield from dicts(params)
    wrong = (bad for bad in no_arrays(params["a"]["mean"]) if not isinstance(bad, dict))
    wrong = [{"a": {"mean": bad}} for bad in wrong]
    yield from type_error("mean must be (a NumPy array|float32 or float64)", *wrong)
    wrong = [{"a": {"mean": bad}} for bad in other_axes(params["a"]["mean"])]
    yield from value_error("mean is ndarray of float64 and shape", *wrong)


def no_images(right):
    yield from kinds(right)
    words = r"images must be \(N, .*\), got shape"
    yield from value_error(words, np.ones(()), right[0], right[None], right[:, :0], right[..., :0])


Z, LABELS, LOGITS = np.ones((2, 3)), np.array([0, 2]), np.random.default_rng(1).normal(size=(2, 3))
TREE = {"a": np.ones((2, 3)), "b": {"c": np.ones(3)}}
NET = nn.sequential(nn.linear(3))
STEP = {"params": {"c": np.ones(3), "d": {"e": np.ones(2)}}}
STEP["grads"] = STEP["params"]
RUNNING = {"a": {"mean": np.ones(3)}}
NO_GRADIENTS_OR_MAP = type_error("value_and_grad and map must be functions", None, 1, "f")
HALF = "padding must be at most half of the window"

PARAMETERS = {  # parameter, or function.parameter: (a right value, rows of wrong ones)
    "f": (np.add, NO_FUNCTIONS),
    "tree_map.*trees": ((TREE, TREE), [
        *type_error("expected at least one tree", ()),
        *value_error("trees differ", *((TREE, bad) for bad in [{}, *NO_DICTS])),
    ]),
    "*trees": ((TREE, TREE), every_tree),
    **dict.fromkeys(("tree", "save.tree", "l2_penalty.params"), (TREE, no_trees)),
    "tree_flatten.tree": (TREE, lambda tree: no_trees({})),
    "flat": ({"a/b": Z}, [
        *type_error("must be a dict, got", *NO_DICTS),
        *type_error("names must be strings, got 1", {1: 1.0}),
        *value_error("name .* is malformed or clashes", {"": 1.0}, {"a//b": 1.0}),
    ]),
    "clip_gradients.grads": (TREE, lambda tree: [
        *no_trees(tree),
        *(({"a": Z, "b": Z * bad}, ValueError, f"the norm of the gradients is {bad}$")
          for bad in (math.nan, math.inf)),
    ]),
    **dict.fromkeys(("lr", "margin", "coefficient", "weight_decay"), (0.1, RATE)),
    **dict.fromkeys(("final", "low", "high", "peak", "schedule"), (0.1, RATE)),
    **dict.fromkeys(("rate", "smoothing", "threshold", "scale", "stretch"), (0.1, BELOW_1)),
    **dict.fromkeys(("momentum", "beta1", "beta2", "decay"), (0.9, BELOW_1)),
    **dict.fromkeys(("factor", "rise", "flip"), (0.1, SHARE)),
    **dict.fromkeys(("exponential.decay", "update_statistics.momentum"), (0.1, SHARE)),
    **dict.fromkeys(("patience", "step"), (1, whole(0))),
    "index": (1, whole(0) + value_error(r"must be below 2\*\*32, got 42949672", 2**32, 2**32 + 1)),
    **dict.fromkeys(("out", "shards", "count", "batches.size"), (4, whole(1))),
    **dict.fromkeys(("units", "heads", "embedding.size"), (2, whole(1))),
    **dict.fromkeys(("every", "steps", "half_cycle"), (4, whole(1))),
    **dict.fromkeys(("kernel", "stride", "size"), (2, pair_of(1))),
    "key": (0, NO_KEYS),
    "shape": ((3, 4), NO_SHAPES),
    "value": (1.0, number(r">= -3.40282e\+38 and <= 3.40282e\+38", math.inf, 1e39)),
    **dict.fromkeys(("std", "limit"), (1.0, number(r">= 0 and <= 3.40282e\+38", -1.0, math.inf))),
    "init": (nn.zeros, NO_FUNCTIONS),
    **dict.fromkeys(("bias", "reverse", "causal"), (True, NO_BOOLS)),
    "slope": (0.1, number("finite", math.inf)),
    **dict.fromkeys(("alpha", "eps", "delta", "rtol", "max_norm"), (0.1, POSITIVE)),
    "dilation": ((1, 1), pair_of(1)),
    "padding": (1, [
        *pair_of(0, "1"),
        *value_error("padding must be numbers or 'same', got '", "full", "valid", "1"),
        *value_error("padding 'same' goes with stride 1, got 2$", "same"),
    ]),
    "groups": (2, [
        *whole(1), *value_error("3 groups do not divide the 4 channels of y$", 3)
    ]),
    **{f"conv1d.{name}": (2, whole(1)) for name in ("kernel", "stride", "dilation")},
    "conv1d.padding": (1, [
        *(row for row in whole(0) if not isinstance(row[0], str)),
        *value_error("padding must be a number, 'same' or 'causal', got '", "full", "1"),
        *value_error("padding 'same' goes with stride 1, got 2$", "same"),
    ]),
    "conv2d_transpose.padding": (1, [
        *pair_of(0, "1"), *value_error("padding must be numbers, got 'same'$", "same")
    ]),
    "output_padding": (1, [
        *pair_of(0), *value_error("output_padding must be less than stride or dilation, got", 2)
    ]),
    **{f"{name}_pool2d.stride": (1, pair_of(1, None)) for name in ("max", "avg")},
    **{f"{name}_pool2d.padding": (1, pair_of(0) + value_error(HALF, (2, 1), (1, 2), 2))
       for name in ("max", "avg")},
    **dict.fromkeys(("*layers", "*branches"), ((nn.relu(),), [
        ((bad,), kind, f"0 {words}") for bad, kind, words in NO_LAYERS])),
    **dict.fromkeys(("**named_layers", "**named"), ({"a": nn.relu()}, [
        *(({"a": bad}, kind, f"a {words}") for bad, kind, words in NO_LAYERS),
        *(({name: nn.relu()}, ValueError, f"a layer cannot be called '{name}'")
          for name in ("key", "statistics", "", "a/b")),
    ])),
    "axis": (1, [
        *type_error("must be a whole number, got", *NO_NUMBERS, 1.5),
        *value_error("must be at least -64, got", -65), *value_error("axis must not be 0", 0),
    ]),
    "weights": (np.array([1, 0.5]), no_weights),
    "drop_last": (False, NO_BOOLS),
    **dict.fromkeys(("branch", "shortcut"), (nn.relu(), NO_LAYERS)),
    "training.params": ({}, dicts),
    "update_statistics.params": (RUNNING, no_running),
    "update_statistics.cache": ({"a": {"statistics": RUNNING["a"]}}, no_statistics),
    **dict.fromkeys(("logits", "probabilities", "scores"), (abs(LOGITS) / 9, no_prediction)),
    "prediction": (LOGITS, lambda right: [
        *kinds(right),
        *value_error("target has shape", np.ones(()), *other_axes(right), np.ones((2, 4))),
        *value_error("prediction must not be empty, got shape", right[:0]),
    ]),
    **dict.fromkeys(("target", "labels"), (LABELS, no_labels)),
    "binary_cross_entropy.logits": (LOGITS, lambda right: kinds(right, "(logits|prediction)")),
    **{f"{loss.__name__}.target": (Z, no_target) for loss in
       (nn.binary_cross_entropy, nn.mean_squared_error, nn.mean_absolute_error, nn.huber)},
    "nesterov": (True, NO_BOOLS),
    "milestones": ([3, 4], [
        *type_error("milestones must be a sequence, got", None, 3, "34", {3}, np.array(3)),
        *type_error("every milestone must be a whole number", [1.5], [None], ["a"]),
        *value_error("every milestone must be at least 0, got -1", [-1]),
    ]),
    "init.params": (STEP["params"], no_trees),
    "step.params": (STEP["params"], no_params_of_step),
    "step.grads": (STEP["grads"], no_gradients),
    "step.state": (None, no_state),
    "state": (nn.reduce_on_plateau(nn.adam().init({}), 1.0), no_plateau),
    "loss": (1.0, type_error("loss must be a number, got", *NO_NUMBERS)),
    "layer": (nn.sigmoid(), NO_LAYERS),
    "check_gradients.params": ({}, [
        *type_error("params must be a dict, got", *NO_DICTS[1:]),
        *value_error("^sigmoid: params have unknown entries", {"unknown": np.ones(3)}),
    ]),
    "check_gradients.x": (Z, lambda x: type_error("must be an array of numbers", *no_numbers(x))),
    "net": (NET, NO_NETS),
    "value_and_grad.loss": (nn.hinge, NO_FUNCTIONS),
    **{f"{name}().params": (NET.init(0, (3,))[0], lambda params: [
        *type_error("^(sequential|data_parallel): params must be a dict, got", *NO_DICTS),
        *value_error("^sequential: params have unknown entries", {**params, "unknown": Z}),
    ]) for name in ("value_and_grad", "data_parallel")},
    "value_and_grad().x": (Z, lambda x: type_error("^linear: x must be", *no_arrays(x))),
    "data_parallel().x": (Z, lambda x: type_error("^.*: x must be ", *no_arrays(x), np.ones(()))),
    "value_and_grad().target": (LABELS, lambda right: [
        (bad, kind, f"^hinge: {words}") for bad, kind, words in no_labels(right)]),
    "data_parallel().target": (LABELS, lambda labels: [
        *type_error("target must be an array", None, [0, 2], np.array(0)),
        *value_error("the numbers of samples differ, {'x': 2, 'target': [13]}$",
                     labels[:1], np.zeros(3, int)),
    ]),
    "value_and_grad": (nn.value_and_grad(NET, nn.hinge), NO_GRADIENTS_OR_MAP),
    "map": (map, NO_GRADIENTS_OR_MAP),
    "images": (np.ones((2, 2, 5, 5)), no_images),
    **dict.fromkeys(("shift", "elastic"), (0.1, number(r">= 0 and <= 1e\+09", -1.0, math.inf))),
    "rotation": (0.1, number(">= 0 and <= 180", -1.0, 181)),
    "*shape": ((3, 4), [
        *type_error("every size in shape must be a whole number, got", (1.5,), ((3, 4),), ("a",)),
        *value_error("every size in shape must be at least 1, got", (0,), (3, -1)),
    ]),
    "*axes": ((1, 0), [
        *type_error("every axis must be a whole number, got", (1.5,), ((1, 0),), (None,)),
        *value_error("every axis must be at least 0, got", (-1,), (0, -1)),
        *value_error(r"axes must be 0, 1, \.\.\. in some order, got", (1,), (0, 0), (0, 2)),
    ]),
    "group_norm.groups": (2, whole(1)),
    "upsample2d.factor": (2, pair_of(1)),
    "exact": (True, NO_BOOLS),
    "to_torch.params": (NET.init(0, (3,))[0], dicts),
    "from_torch.state": (nn.to_torch(NET, NET.init(0, (3,))[0]), dicts),
    "summary.shape": ((3,), [(bad, kind, f"^linear: {words}") for bad, kind, words in NO_SHAPES]),
    "path": ("a.npz", NO_PATHS),
    "ratio": (1, number(">= 1", 0.5, math.inf)),
}  # fmt: skip
UNUSED = {  # nothing is drawn: any key will do
    "zeros.key",
    "constant().key",
}
NEED_FILES = ("load", "read_npz")
OPTIMIZER_NAMES = ("sgd", "adam", "adamw", "rmsprop", "adagrad", "adadelta")
RETURNED = {  # what public functions return
    **{f"{name}()": getattr(nn, name)(1.0) for name in ("constant", "normal", "uniform")},
    "step_decay()": nn.step_decay(1, 2),
    "multistep()": nn.multistep(1, [2]),
    "exponential()": nn.exponential(1, 1),
    "cosine()": nn.cosine(1, 2),
    "cyclic()": nn.cyclic(1, 2, 3),
    "one_cycle()": nn.one_cycle(1, 9),
    "warmup()": nn.warmup(1, 2),
    **{
        f"{name}().{function}": getattr(optimizer, function)
        for name in OPTIMIZER_NAMES
        for optimizer in [getattr(nn, name)(0.1, **({"momentum": 0.9} if name == "sgd" else {}))]
        for function in ("init", "step")
    },
    "value_and_grad()": nn.value_and_grad(NET, nn.hinge),
    "data_parallel()": nn.data_parallel(nn.value_and_grad(NET, nn.hinge), 2),
}
PUBLIC = [name for name in (*nn.__all__, "read_npz") if callable(getattr(nn, name))]
EVERY_FUNCTION = {
    **{name: getattr(nn, name) for name in PUBLIC if name not in ("Layer", "Optimizer")},
    **RETURNED,
    "replacing": lambda path: nn.replacing(path).__enter__(),
}


def rows_of(name, parameter):
    """The key of PARAMETERS that tells about a parameter of a function."""
    keys = f"{name}.{parameter}", f"{name.rpartition('.')[2]}.{parameter}", parameter
    return next(key for key in keys if key in PARAMETERS)


def parameters(function):
    """The parameters that a caller gives, with their stars."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    bound = getattr(function, "keywords", {})
    signature = inspect.signature(function).parameters.values()
    return [stars.get(p.kind, "") + p.name for p in signature if p.name not in bound]


def right_call(name, function):
    right = {p: PARAMETERS[rows_of(name, p)][0] for p in parameters(function)}
    if "state" in right and name.endswith(".step"):
        right["state"] = RETURNED[name.replace("step", "init")](right["params"])
    return right


def called(function, arguments):
    """The result of a function for arguments by name, those with stars spread out."""
    names, positional, options = list(arguments), [], {}
    starred = [name for name in names if name[:1] == "*" != name[1:2]]
    for name, value in arguments.items():
        if name.startswith("**"):
            options |= value
        elif name in starred:
            positional += value
        elif starred and names.index(name) < names.index(starred[0]):
            positional.append(value)
        else:
            options[name] = value
    return function(*positional, **options)


DEFAULTS = {
    "leaky_relu": [0.01], "elu": [1.0], "batch_norm": [1e-5], "layer_norm": [1e-5],
    "group_norm": [1e-5], "gelu": [False],
    "linear": [nn.he_normal, True], "conv2d": [1, 0, 1, 1, nn.he_normal, True],
    "conv1d": [1, 0, 1, 1, nn.he_normal, True],
    "conv2d_transpose": [1, 0, 0, 1, 1, nn.he_normal, True],
    "rnn": [False], "gru": [False], "lstm": [False], "attention": [False],
    "max_pool2d": [None, 0], "avg_pool2d": [None, 0], "update_statistics": [0.1],
    "softmax_cross_entropy": [0.0, None], "hinge": [1.0, None], "huber": [1.0, None],
    "concatenate": [1], "batches": [False], "sgd": [0.0, False, 0.0],
    "adam": [1e-3, 0.9, 0.999, 1e-8, 0.0], "adamw": [1e-3, 0.9, 0.999, 1e-8, 0.01],
    "rmsprop": [0.01, 0.99, 1e-8, 0.0, 0.0], "adagrad": [0.01, 1e-10, 0.0],
    "adadelta": [1.0, 0.9, 1e-6, 0.0], "step_decay": [0.1], "multistep": [0.1], "cosine": [0.0],
    "one_cycle": [0.3], "reduce_on_plateau": [0.5, 10, 1e-3], "check_gradients": [1e-5, 0],
    "augment": [2.0, 10.0, 0.1, 0.1, 0.0, 0.0],
}  # fmt: skip


def test_parameters_have_their_defaults_and_can_be_given_by_name():
    functions = {f for f in vars(nn).values() if inspect.isfunction(f) and f.__module__ == "purenn"}
    for function in functions:
        parameters = inspect.signature(function).parameters.values()
        defaults = [p.default for p in parameters if p.default is not p.empty]
        assert all(p.kind is not p.POSITIONAL_ONLY for p in parameters)
        assert defaults == DEFAULTS.get(function.__name__, defaults)
    assert nn.warmup(nn.cosine(0.1, 5), 2)(0) == 0.05


@pytest.mark.parametrize("name", EVERY_FUNCTION)
def test_every_argument_is_refused_if_it_is_wrong(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function = EVERY_FUNCTION[name]
    right = right_call(name, function)
    if name not in NEED_FILES:
        called(function, right)
    for parameter, value in right.items():
        if f"{name}.{parameter}" in UNUSED:
            continue
        rows = PARAMETERS[rows_of(name, parameter)][1]
        rows = list(rows(value) if callable(rows) else rows)
        assert rows
        where, said = name.partition("(")[0], parameter.lstrip("*")
        for bad, kind, words in rows:
            words = f"{said} {words}" if words.startswith("must") else words
            words = words[1:] if words.startswith("^") else f"{where}: {words}"
            with pytest.raises((TypeError, ValueError)) as refusal:
                called(function, {**right, parameter: bad})
            assert type(refusal.value) is kind, (parameter, bad, refusal.value)
            one_line = re.fullmatch(rf"(\w+: )*{words}.*", str(refusal.value))
            assert one_line, (parameter, bad, refusal.value, words)


def test_every_row_about_a_parameter_is_used():
    used = {
        rows_of(name, parameter)
        for name, function in EVERY_FUNCTION.items()
        for parameter in parameters(function)
    }
    assert used == PARAMETERS.keys()


def test_only_the_first_obvious_options_of_layers_are_positional():
    by_position = {"out", "kernel", "size", "slope", "alpha", "rate", "branch", "shortcut"}
    by_position |= {"groups", "factor", "count", "units", "heads"}
    for name in LAYERS:
        for parameter in inspect.signature(getattr(nn, name)).parameters.values():
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
                assert parameter.name in by_position
    for call in (
        lambda: nn.conv2d(1, 8, 3),  # from another library's habit: channels in, out, kernel
        lambda: nn.linear(3, nn.zeros),
        lambda: nn.batch_norm(16),
        lambda: nn.layer_norm(1e-5),
        lambda: nn.group_norm(2, 6),
        lambda: nn.gelu(True),
        lambda: nn.max_pool2d(2, 2),
        lambda: nn.avg_pool2d(2, 2),
        lambda: nn.embedding(4, 3, nn.zeros),
        lambda: nn.position_embedding(nn.zeros),
        lambda: nn.rnn(4, True),
        lambda: nn.gru(4, 3),
        lambda: nn.lstm(4, 3),
        lambda: nn.attention(4, 2),
    ):
        with pytest.raises(TypeError, match="positional argument"):
            call()


# --- misuse of layers: whatever is no right argument of init, forward and backward ---


def name_of(function):
    return getattr(function, "func", function).__name__.rpartition("_")[0]


def layers_within(layer):
    """The names of a layer's functions, and of those of the layers that it is made of."""
    names = set(map(name_of, layer))
    children = getattr(layer.forward, "keywords", {}).get("layers", {}).values()
    return names.union(*map(layers_within, children))


def of_other_sizes(array):
    """Longer and shorter along each axis."""
    for axis in range(array.ndim):
        yield np.repeat(array, 2, axis)
        yield np.delete(array, 0, axis)


def without(tree, path):
    return nn.tree_unflatten({p: leaf for p, leaf in nn.tree_flatten(tree).items() if p != path})


def raised(function, arguments):
    try:
        return function(*arguments)
    except Exception as error:
        return error


def never(result):
    return False


def of_other_shape(right):
    """Whether the first of the results has another shape than the right one: all fits, then."""
    return lambda results: shapes(results[0]) != shapes(right)


def wrong_params(params, entry):
    """(wrong params, exception, words, whether only the size of an entry is wrong)"""
    for bad in NO_DICTS:
        yield bad, TypeError, "{name}: params must be a dict, got", False
    bad = {**params, "unknown": np.ones(3)}
    yield bad, ValueError, r"{name}: params have unknown entries \['unknown'\]", False
    for name, child in params.items():
        for bad in NO_DICTS if isinstance(child, dict) else ():
            yield {**params, name: bad}, TypeError, ".* must be a dict, got", False
    for path, leaf in nn.tree_flatten(params).items():
        last = path.split("/")[-1]
        if last == "key":
            continue
        if last not in entry.optional:
            yield without(params, path), ValueError, ".*there is no entry '(W|gamma|.*)' in", False
        for bad in no_arrays(leaf):
            if isinstance(bad, dict) and "qkv" in params:
                continue  # to attention this is an entry that is missing
            yield replaced(params, path, bad), TypeError, f".*(: |/){last} must be", False
        for bad in other_axes(leaf):
            yield replaced(params, path, bad), ValueError, f".*{last}", False
        for bad in of_other_sizes(leaf) if last not in entry.free else ():
            yield replaced(params, path, bad), ValueError, ".*", True


@every_layer
@settings(max_examples=3)
@given(data=st.data())
def test_every_argument_of_a_layer_is_refused_if_it_is_wrong(name, data):
    layer, params, x, _, shape, _ = data.draw(cases(name))
    y, cache = layer.forward(params, x)
    dy = upstream(y)
    results = layer.backward(params, cache, dy)
    drawn = all_bytes(layer.init(0, shape)[0]) != all_bytes(layer.init(1, shape)[0])
    said_by = rf"(\w+: )*({'|'.join(layers_within(layer))}|key): "

    def check(function, arguments, kind, words, passes=never):
        """It is refused, by the layer or one within, or what is wrong was not needed."""
        result = raised(function, arguments)
        if not isinstance(result, Exception):
            assert passes(result), (arguments, words)
            return
        words = words.replace("{name}", name)
        assert type(result) is kind, (arguments, result)
        assert re.fullmatch(said_by + ".*", str(result)), (arguments, result)
        assert re.match(words, str(result)), (arguments, result, words)

    def same(result):
        return all_bytes(*result) == all_bytes(*results)

    for bad, kind, _ in NO_KEYS:
        check(layer.init, (bad, shape), kind, "", lambda result: not drawn)
    for path in leaves(shape):
        for bad, kind, words in NO_SHAPES:
            words = f".*: {words}" if kind is TypeError else ".*"
            check(layer.init, (0, replaced(shape, path, bad)), kind, words)
    for path, leaf in leaves(x).items():
        for bad in no_arrays(leaf):
            if path or name != "concatenate" or not isinstance(bad, dict):  # which is another input
                check(layer.forward, (params, replaced(x, path, bad)), TypeError, ".* must be ")
        nothing = replaced(x, path, np.ones((), leaf.dtype))
        check(layer.forward, (params, nothing), ValueError, r".*: x must .*, got shape \(\)")
    for bad, kind, words, resized in wrong_params(params, LAYERS[name]):
        check(layer.forward, (bad, x), kind, words, of_other_shape(y) if resized else never)
        check(layer.backward, (bad, cache, dy), kind, words, same)
    if isinstance(cache, dict):
        for bad in [*NO_DICTS, {}, {"other": np.ones((2, 3))}]:
            check(layer.backward, (params, bad, dy), ValueError, ".*cache")
    for path, leaf in leaves(cache).items():
        if path and leaf.dtype.kind != "f":
            continue  # a number of samples, perhaps
        for bad in no_arrays(leaf):
            check(layer.backward, (params, replaced(cache, path, bad), dy), TypeError, ".*", same)
        if not path:
            for bad in (*other_axes(leaf), *of_other_sizes(leaf)):
                check(
                    layer.backward, (params, bad, dy), ValueError, ".*", of_other_shape(results[0])
                )
        elif len(path.split("/")) == 1:
            check(layer.backward, (params, without(cache, path), dy), ValueError, ".*", same)
    for path, leaf in leaves(dy).items():
        for bad in no_arrays(leaf):
            bad = replaced(dy, path, bad)
            check(layer.backward, (params, cache, bad), TypeError, ".*: dy must be")
        for bad in (*other_axes(leaf), *of_other_sizes(leaf)):
            words = r".*: dy has shape \(.*\), but y has \("
            check(layer.backward, (params, cache, replaced(dy, path, bad)), ValueError, words)


# --- misuse: what does not fit together, and what is said of it ---

LINEAR, THREE, CONV = nn.linear(9), nn.linear(3), nn.conv2d(4, 3, groups=2)
CONV1D, TRANSPOSE = nn.conv1d(4, 3, groups=2), nn.conv2d_transpose(4, 3, groups=2)
FEATURES = {"gamma": (3,), "beta": (3,)}
CHANNELS = {**FEATURES, "mean": (3,), "var": (3,)}
GRU = {"W": (2, 9), "U": (3, 9), "b": (9,), "c": (9,)}
LSTM = {"W": (2, 8), "U": (2, 8), "b": (8,)}
EMPTY, GRAY = "; only N may be empty", "; gray images have one channel, (1, 5, 5)"
LAST = "; channels come before height and width, see x.transpose(0, 3, 1, 2)"
DOES_NOT_FIT: list = [  # (layer, shape of x, shapes of its params, what is said after its name)
    (LINEAR, (2, 100), {"W": (784, 10)}, "x has 100 features, but W takes 784"),
    (LINEAR, (4, 3, 5), {"W": (3, 2)}, "x has 5 features, but W takes 3"),
    (LINEAR, (4, 3, 5), {"W": (15, 2)},
     "x has 5 features, but W takes 15; a flatten() before it would fit"),
    (LINEAR, (2, 4), {"W": (4, 3), "b": (2,)}, "W has 3 outputs, but b takes 2"),
    (LINEAR, (2, 4), {"W": (4, 3), "b": (4,)}, "W has 3 outputs, but b takes 4"),
    (LINEAR, (2, 4), {"W": (4,)}, "W must be (in, out), got shape (4,)"),
    (LINEAR, (2, 4), {"W": (4, 3, 2)}, "W must be (in, out), got shape (4, 3, 2)"),
    (LINEAR, (4,), {"W": (4, 3)}, "x must be (N, ..., in), got shape (4,)"),
    (LINEAR, (2, 4), {"W": (4, 3), "V": ()},
     "params have unknown entries ['V'], expected ['W', 'b']"),
    (LINEAR, (2, 4), {}, "there is no entry 'W' in []"),
    (nn.flatten(), (), {}, "x must be (N, ...), got shape ()"),
    (nn.softmax(), (4,), {}, "x must be (N, ..., classes), got shape (4,)"),
    (nn.log_softmax(), (2, 3, 0), {}, "x must be (N, ..., classes), got shape (2, 3, 0)" + EMPTY),
    (nn.layer_norm(), (4,), FEATURES, "x must be (N, ..., in), got shape (4,)"),
    (nn.group_norm(2), (2, 3), FEATURES, "2 groups do not divide the 3 channels of x"),
    (nn.reshape(5, 2), (2, 11), {}, "a sample of shape (11,) does not fit in (5, 2)"),
    (nn.permute(1, 0), (2, 3), {}, "a sample of shape (3,) does not have axes (1, 0)"),
    (nn.layer_norm(), (2, 3, 0), FEATURES, "x must be (N, ..., in), got shape (2, 3, 0)" + EMPTY),
    *(
        (layer, (2, 3), {**entries, name: (size,)}, f"x has 3 {what}, but {name} takes {size}")
        for layer, entries, what in [
            (nn.layer_norm(), FEATURES, "features"),
            (nn.batch_norm(), CHANNELS, "channels"),
            (nn.group_norm(1), FEATURES, "channels"),
        ]
        for name in entries
        for size in (1, 2, 4)
    ),
    *(
        (nn.batch_norm(), shape, CHANNELS, f"x must be (N, C) or (N, C, H, W), got shape {shape}")
        for shape in ((4,), (2, 3, 4), (2, 3, 4, 5, 6))
    ),
    (nn.batch_norm(), (3, 3), {**CHANNELS, "var": (3, 3)}, "var must be (C,), got shape (3, 3)"),
    (nn.position_embedding(), (2, 5, 3), {"P": (4, 3)}, "x has 5 steps, but P takes at most 4"),
    (nn.position_embedding(), (2, 5, 3), {"P": (5, 4)}, "x has 3 features, but P takes 4"),
    (nn.rnn(3), (2, 5, 2), {"W": (2, 3), "U": (3, 4), "b": (3,)},
     "U must be (units, units), got shape (3, 4)"),
    (nn.rnn(3), (2, 5, 2), {"W": (2, 3), "U": (4, 4), "b": (3,)}, "W has 3 units, but U takes 4"),
    (nn.gru(3), (2, 5, 4), GRU, "x has 4 features, but W takes 2"),
    (nn.gru(3), (2, 5, 2), {**GRU, "W": (2, 10)}, "W must be (D, 3·units), got shape (2, 10)"),
    (nn.gru(3), (2, 5, 2), {**GRU, "U": (3, 12)}, "U must be (units, 3·units), got shape (3, 12)"),
    (nn.gru(3), (2, 5, 2), {**GRU, "c": (6,)}, "W has 3 units, but c takes 2"),
    (nn.lstm(2), (2, 5), LSTM, "x must be (N, T, D), got shape (2, 5)"),
    (nn.lstm(2), (2, 0, 2), LSTM, "x must be (N, T, D), got shape (2, 0, 2)" + EMPTY),
    (nn.lstm(2), (2, 5, 2), {**LSTM, "c": (8,)},
     "params have unknown entries ['c'], expected ['U', 'W', 'b']"),
    (CONV, (1, 3, 5, 5), {"W": (4, 1, 3, 3)}, "x has 3 channels, but W takes 2"),
    (CONV, (1, 1, 5, 5), {"W": (4, 1, 3, 3)}, "x has 1 channels, but W takes 2"),
    (CONV, (1, 6, 5, 2), {"W": (4, 1, 3, 3)}, f"x has 6 channels, but W takes 2{LAST}"),
    (CONV1D, (1, 3, 5), {"W": (4, 1, 3)}, "x has 3 channels, but W takes 2"),
    (CONV1D, (1, 2, 5), {"W": (3, 1, 3)}, "W must be (out, in/2, k), got shape (3, 1, 3)"),
    (CONV1D, (1, 2, 5), {"W": (4, 1, 3, 3)}, "W must be (out, in, k), got shape (4, 1, 3, 3)"),
    (CONV1D, (2, 5), {"W": (4, 1, 3)}, "x must be (N, C, T), got shape (2, 5)"),
    (TRANSPOSE, (1, 3, 5, 5), {"W": (3, 2, 3, 3)}, "2 groups do not divide the 3 channels of x"),
    (TRANSPOSE, (1, 2, 5, 5), {"W": (4, 2, 3, 3)}, "x has 2 channels, but W takes 4"),
    (TRANSPOSE, (1, 2, 5, 4), {"W": (4, 2, 3, 3)}, f"x has 2 channels, but W takes 4{LAST}"),
    (TRANSPOSE, (1, 2, 5, 5), {"W": (2, 2, 3, 3), "b": (2,)}, "W has 4 outputs, but b takes 2"),
    (CONV, (1, 2, 5, 5), {"W": (4, 1, 3, 3), "b": (3,)}, "W has 4 outputs, but b takes 3"),
    *(
        (CONV, (1, 2, 5, 5), {"W": shape}, f"W must be (out, {fan}, kh, kw), got shape {shape}")
        for fan, shape in [
            ("in", (1, 3, 3)), ("in", (2, 1, 3, 3, 1)), ("in/2", (3, 1, 3, 3)), ("in", (4, 0, 3, 3))
        ]
    ),
    *(
        (layer, shape, params, f"x must be (N, C, H, W), got shape {shape}{hint}")
        for layer, params in [
            (CONV, {"W": (4, 1, 3, 3)}),
            (nn.max_pool2d(2), {}),
            (nn.avg_pool2d(2), {}),
            (nn.global_avg_pool2d(), {}),
            (nn.upsample2d(2), {}),
        ]
        for shape, hint in [
            ((2, 5, 5), "; gray images need a channel axis, x[:, None]"),
            ((3, 5, 5), "; gray images need a channel axis, x[:, None], a single image x[None]"),
            ((1, 2), "; a single gray image needs x[None, None]"),
            ((2,), ""),
            ((1, 1, 2, 5, 5), ""),
            ((1, 2, 0, 5), EMPTY),
            ((1, 2, 5, 0), EMPTY),
        ]
    ),
    *(
        (layer, (1, 2, 5, 1), params,
         "the window covers 3 x 3 pixels, but the padded image has 5 x 1")
        for layer, params in [
            (CONV, {"W": (4, 1, 3, 3)}), (nn.max_pool2d(3), {}), (nn.avg_pool2d(3), {})
        ]
    ),
]  # fmt: skip
NOT_A_SHAPE_OF_IT = [  # (layer, shape that init refuses, what is said after the name of its init)
    (LINEAR, (), "shape must be (..., in), got ()"),
    (nn.layer_norm(), (), "shape must be (..., in), got ()"),
    (nn.softmax(), (), "shape must be (..., classes), got ()"),
    (nn.log_softmax(), (), "shape must be (..., classes), got ()"),
    (nn.elu(), (0,), "every size in shape must be at least 1, got 0"),
    (nn.dropout(0.1), (0,), "every size in shape must be at least 1, got 0"),
    *(
        (nn.batch_norm(), shape, f"shape must be (C,) or (C, H, W), got {shape}")
        for shape in ((), (2, 2), (1, 2, 3, 4))
    ),
    (CONV, (5, 5), f"shape must be (C, H, W), got (5, 5){GRAY}"),
    (CONV, (5,), "shape must be (C, H, W), got (5,)"),
    (nn.conv1d(3, 3), (5,), "shape must be (C, T), got (5,)"),
    (nn.conv1d(3, 3, groups=3), (4, 6), "3 groups do not divide the 4 channels of x"),
    (nn.conv1d(3, 3, dilation=3), (4, 6),
     "the window covers 7 steps, but the padded sequence has 6"),
    (TRANSPOSE, (5,), "shape must be (C, H, W), got (5,)"),
    (TRANSPOSE, (3, 5, 5), "2 groups do not divide the 3 channels of x"),
    (nn.conv2d_transpose(1, 3, padding=2), (1, 2, 3), "y would have 0 x 1 pixels"),
    (nn.conv2d(3, 3, groups=3), (4, 6, 7), "3 groups do not divide the 4 channels of x"),
    (nn.group_norm(3), (4, 6, 7), "3 groups do not divide the 4 channels of x"),
    (nn.group_norm(3), (), "shape must be (C, ...), got ()"),
    (nn.reshape(5, 2), (3, 4), "a sample of shape (3, 4) does not fit in (5, 2)"),
    (nn.permute(1, 0), (3,), "a sample of shape (3,) does not have axes (1, 0)"),
    (nn.last(), (), "shape must be (T, ...), got ()"),
    (nn.conv2d(3, 9, padding=1), (4, 6, 7),
     "the window covers 9 x 9 pixels, but the padded image has 8 x 9"),
    (nn.conv2d(3, 3, dilation=(3, 1)), (4, 6, 7),
     "the window covers 7 x 3 pixels, but the padded image has 6 x 7"),
]  # fmt: skip


def forward_of_ones(layer, shape, shapes):
    return layer.forward({name: np.ones(sizes) for name, sizes in shapes.items()}, np.ones(shape))


TWO_INPUTS = nn.concatenate(a=nn.relu(), b=nn.relu())


def attend(heads, shape, D, **changed):
    """A forward pass of attention over D features, with some of its entries of other shapes."""
    entries = {"qkv/W": (D, 3 * D), "qkv/b": (3 * D,), "out/W": (D, D), "out/b": (D,), **changed}
    ones = {path: np.ones(sizes) for path, sizes in entries.items() if sizes is not None}
    return nn.attention(heads).forward(nn.tree_unflatten(ones), np.ones(shape))


def embed(x, W=np.ones((3, 2))):
    return nn.embedding(3, 2).forward({"W": W}, x)


UNTYPED: Any = nn  # mypy would refuse what is refused here
SENTENCES: list = [  # (call, exception, what is said)
    *((partial(forward_of_ones, *row), ValueError, f"{name_of(row[0].forward)}: {words}")
      for *row, words in DOES_NOT_FIT),
    *((partial(layer.init, 0, shape), ValueError, f"{name_of(layer.forward)}: {words}")
      for layer, shape, words in NOT_A_SHAPE_OF_IT),
    *((partial(pool(7).init, 0, (4, 6, 7)), ValueError,
       f"{pool.__name__}: the window covers 7 x 7 pixels, but the padded image has 6 x 7")
      for pool in (nn.max_pool2d, nn.avg_pool2d)),
    *((partial(layer.init, 0, (5, 5)), ValueError,
       f"{name}: shape must be (C, H, W), got (5, 5){GRAY}")
      for name, layer in {"max_pool2d": nn.max_pool2d(2), "avg_pool2d": nn.avg_pool2d(2),
                          "global_avg_pool2d": nn.global_avg_pool2d(),
                          "upsample2d": nn.upsample2d(2)}.items()),
    (lambda: nn.sgd(0.1).step(nn.training({}, 0), {}, nn.sgd(0.1).init({})), ValueError,
     "sgd: params hold a key; pass the plain params, not training(...)"),
    (lambda: nn.sgd(0.1).step({"a": nn.training({}, 1)}, {"a": {}}, nn.sgd(0.1).init({})),
     ValueError, "sgd: params hold a key; pass the plain params, not training(...)"),
    (lambda: nn.save("x.npz", nn.training({}, 0)), ValueError,
     "save: params hold a key; save the plain params, not training(...)"),
    (lambda: UNTYPED.linear(2.5), TypeError, "linear: out must be a whole number, got 2.5"),
    (lambda: nn.sequential(nn.relu(), **{"0": nn.relu()}), ValueError,
     "sequential: a layer cannot be called '0'"),
    (lambda: UNTYPED.sequential(3), TypeError, "sequential: 0 must be a layer, but 3 has no init"),
    (lambda: UNTYPED.sequential(types.SimpleNamespace(init=print)), TypeError,
     "sequential: 0 must be a layer, but SimpleNamespace has no forward"),
    (lambda: UNTYPED.value_and_grad(None, nn.hinge), TypeError,
     "value_and_grad: net must be a layer, but None has no forward"),
    *((constructor, ValueError, f"{constructor.__name__}: expected at least one layer")
      for constructor in (nn.concatenate, nn.heads)),
    *((partial(nn.concatenate(nn.relu(), layer, axis=axis).init, 0, shape), ValueError,
       f"concatenate: outputs do not fit along axis {axis}: {{'0': {first}, '1': {second}}}")
      for layer, axis, shape, first, second in [
          (nn.flatten(), 1, (2, 3), ("N", 2, 3), ("N", 6)),
          (nn.linear(2), 1, (4, 3), ("N", 4, 3), ("N", 4, 2)),
          (nn.relu(), -2, (3,), ("N", 3), ("N", 3)),
          (nn.relu(), 2, (3,), ("N", 3), ("N", 3)),
          (nn.heads(a=nn.relu()), 1, (3,), ("N", 3), {"a": (3,)}),
      ]),
    (lambda: TWO_INPUTS.init(0, {"a": (3,)}), ValueError,
     "concatenate: shape has ['a'], expected ['a', 'b']"),
    (lambda: TWO_INPUTS.forward({}, {"a": Z, "c": Z}), ValueError,
     "concatenate: x has ['a', 'c'], expected ['a', 'b']"),
    (lambda: TWO_INPUTS.forward({}, {"a": Z, "b": Z[:1]}), ValueError,
     "concatenate: outputs do not fit along axis 1: {'a': (2, 3), 'b': (1, 3)}"),
    (lambda: TWO_INPUTS.backward({}, {"a": Z, "b": Z}, Z), ValueError,
     "concatenate: cache has ['a', 'b'], expected ['a', 'axis', 'b']"),
    (lambda: nn.heads(a=nn.relu()).backward({}, {"a": Z}, Z), ValueError,
     "heads: dy has ndarray of float64 and shape (2, 3), expected ['a']"),
    (lambda: nn.heads(a=nn.relu(), b=nn.relu()).backward({}, {"a": Z, "b": Z}, {"a": Z}),
     ValueError, "heads: dy has ['a'], expected ['a', 'b']"),
    (lambda: nn.linear(3).init(0, {"a": (3,)}), TypeError,
     "linear: shape must be a tuple without the batch axis, got dict"),
    (lambda: nn.batches(4, 5, 0, drop_last=True), ValueError,
     "batches: 4 samples make no whole batch of 5"),
    (lambda: nn.update_statistics({"0": {"mean": Z}}, {"1": {"statistics": {"mean": Z}}}),
     ValueError, "update_statistics: the cache has statistics of 'mean', which params lack"),
    (lambda: nn.softmax_cross_entropy(Z, np.array([0, 3])), ValueError,
     "softmax_cross_entropy: labels must be from 0 to 2, got 0 to 3"),
    (lambda: nn.softmax_cross_entropy(Z, np.ones((1, 3))), ValueError,
     "softmax_cross_entropy: target has shape (1, 3), but the prediction has (2, 3)"),
    *(
        (partial(loss, np.zeros((2, 4, 5, 3)), np.zeros((2, 3))), ValueError,
         f"{loss.__name__}: target has shape (2, 3), but the prediction has (2, 4, 5, 3);"
         " put flatten() before the last layer")
        for loss in (nn.huber, nn.mean_squared_error, nn.binary_cross_entropy)
    ),
    *(
        (partial(loss, np.zeros((2, 4, 5, 3)), np.zeros(shape)), ValueError,
         f"{loss.__name__}: labels must have shape (2, 4, 5), got {shape};"
         " for one label per sample put flatten() before the last layer")
        for loss in (nn.softmax_cross_entropy, nn.hinge, nn.accuracy) for shape in ((2,), (2, 3))
    ),
    (lambda: nn.cross_entropy(Z, Z.astype(complex)), ValueError,
     "cross_entropy: target probabilities must be numbers from 0 to 1"),
    (lambda: nn.cross_entropy(2 * Z, LABELS), ValueError,
     "cross_entropy: probabilities must be from 0 to 1; for logits use softmax_cross_entropy"),
    (lambda: nn.sgd(0.1, nesterov=True), ValueError, "sgd: nesterov needs a momentum above 0"),
    (lambda: UNTYPED.sgd(lambda step: "fast").step({}, {}, nn.sgd(1).init({})), TypeError,
     "sgd: lr at step 0 must be a number, got 'fast'"),
    *((lambda f=f: f(1, momentum=lambda step: step / 2).step(
        {}, {}, {**f(1, momentum=0.5).init({}), "step": 2}), ValueError,
       f"{f.__name__}: momentum at step 2 must be >= 0 and < 1, got 1.0")
      for f in (nn.sgd, nn.rmsprop)),
    *((lambda bad=bad: nn.adam(lambda step: bad).step({}, {}, nn.adam().init({})), ValueError,
       f"adam: lr at step 0 must be >= 0, got {bad}") for bad in (math.nan, -0.1)),
    *((partial(init, 0, (3,)), ValueError,
       f"{init.__name__}: shape (3,) has no fans, expected (in, out) or (out, in, kh, kw)")
       for init in
      (nn.xavier_normal, nn.xavier_uniform, nn.he_normal, nn.he_uniform, nn.orthogonal)),
    *((lambda batch=batch, count=count: nn.batch_norm().forward(
        nn.training(nn.batch_norm().init(0, (3,))[0], 0), np.ones(batch)), ValueError,
       f"batch_norm: training needs 2 values per channel, got {count}")
      for batch, count in (((1, 3), 1), ((0, 3), 0))),
    *((partial(layer.init, 0, (5,)), ValueError, f"{name}: shape must be (T, D), got (5,)")
      for name, layer in {"position_embedding": nn.position_embedding(), "rnn": nn.rnn(2), "gru":
                          nn.gru(2), "lstm": nn.lstm(2), "attention": nn.attention(1)}.items()),
    *((call, ValueError, "attention: 4 heads do not divide the 6 features of x") for call in
      (lambda: nn.attention(4).init(0, (5, 6)), lambda: attend(4, (2, 5, 6), 6))),
    *((partial(attend, *given, **changed), ValueError, f"attention: {words}")
      for given, changed, words in [
          ((2, (2, 5, 6), 4), {}, "x has 6 features, but qkv/W takes 4"),
          ((2, (2, 5), 4), {}, "x must be (N, T, D), got shape (2, 5)"),
          ((2, (2, 5, 4), 4), {"qkv/W": (4, 13)}, "qkv/W must be (D, 3·D), got shape (4, 13)"),
          ((2, (2, 5, 4), 4), {"qkv/b": (3,)}, "x has 4 features, but qkv/b takes 1"),
          ((2, (2, 5, 4), 4), {"out/W": (4, 3)}, "out/W must be (D, D), got shape (4, 3)"),
          ((2, (2, 5, 4), 4), {"out/b": None},
           "there is no entry 'out/b' in ['out/W', 'qkv/W', 'qkv/b']"),
          ((2, (2, 5, 4), 4), {"v": ()}, "params have unknown entries ['v'],"
           " expected ['out/W', 'out/b', 'qkv/W', 'qkv/b']"),
      ]),
    (lambda: nn.attention(1).forward({"qkv": Z, "out": {}}, np.ones((1, 1, 1))), TypeError,
     "attention: qkv must be a dict, got ndarray of float64 and shape (2, 3)"),
    *((partial(embed, np.array([low, high])), ValueError,
       f"embedding: x must be from 0 to 2, got {low} to {high}")
      for low, high in ((1, 3), (0, 4), (-1, 2))),
    *((partial(embed, np.ones(2, kind)), TypeError,
       f"embedding: x must be whole numbers, got {kind}; convert it with x.astype(int)")
      for kind in ("float32", "float64", "bool")),
    (partial(embed, [0, 1]), TypeError, "embedding: x must be a NumPy array, got [0, 1]"),
    (partial(embed, np.array([0]), Z.astype("i8")), TypeError,
     "embedding: W must be float32 or float64, got int64; convert it with W.astype(np.float32)"),
    (lambda: nn.sequential(nn.linear(3)).forward({"x": {}}, Z), ValueError,
     "sequential: params have unknown entries ['x'], expected ['0']"),
    *((partial(layer.backward, {}, {}, Z), ValueError,
       f"{name_of(layer.forward)}: the cache is not its own, it holds []") for layer in
      (nn.dropout(0.5), nn.batch_norm(), nn.layer_norm(), nn.max_pool2d(1))),
    *((partial(nn.from_torch, layer, {name: np.ones(shape) for name, shape in state.items()}),
       ValueError, f"from_torch: {words}") for layer, state, words in [
          (THREE, {"weight": (4, 5), "bias": (3,)}, "weight (4, 5) does not fit linear(3)"),
          (THREE, {"weight": (3, 5), "bias": (4,)}, "bias (4,) does not fit linear(3)"),
          (THREE, {"weight": (3,)}, "weight (3,) does not fit linear(3)"),
          (THREE, {"weight": ()}, "weight () does not fit linear(3)"),
          (THREE, {"weight": (3, 0)},
           "weight (3, 0) does not fit linear(3)"),
          (THREE, {"weight": (3, 5), "b": ()}, "there is no entry 'bias' in ['b', 'weight']"),
          (nn.linear(3, bias=False), {"weight": (3, 5), "bias": (3,)},
           "no layer that PyTorch has takes the entries ['bias']"),
          (nn.conv2d(4, 3), {"weight": (4, 2, 5, 5)},
           "weight (4, 2, 5, 5) does not fit conv2d(4, 3)"),
          (nn.conv2d(4, 3, groups=2), {"weight": (4,)},
           "weight (4,) does not fit conv2d(4, 3, groups=2)"),
          (nn.group_norm(4), {"weight": (6,), "bias": (6,)},
           "weight (6,): group_norm: 4 groups do not divide the 6 channels of x"),
          (nn.sequential(nn.relu()), {"0.weight": ()},
           "no layer that PyTorch has takes the entries ['0.weight']"),
      ]),
    (lambda: UNTYPED.from_torch(THREE, {"weight": [1.0]}), TypeError,
     "from_torch: weight must be a NumPy array, got [1.0]"),
    (lambda: UNTYPED.from_torch(nn.relu(), {1: Z}), ValueError,
     "from_torch: no layer that PyTorch has takes the entries ['1']"),
    *((partial(nn.to_torch, THREE, {name: np.ones(shape) for name, shape in params.items()}),
       ValueError, f"to_torch: {words}") for params, words in [
          ({"W": (2, 3), "b": (2,)}, "b (2,) does not fit linear(3)"),
          ({"W": (2, 4), "b": (3,)}, "W (2, 4) does not fit linear(3)"),
          ({"W": (2, 3)}, "there is no entry 'b' in ['W']"),
          ({"W": (2, 3), "b": (3,), "c": ()}, "no layer that PyTorch has takes the entries ['c']"),
          ({"W": (2, 3), "b": (3,), "key": ()},
           "no layer that PyTorch has takes the entries ['key']"),
      ]),
]  # fmt: skip


@pytest.mark.parametrize("row", SENTENCES, ids=lambda row: row[2])
def test_misuse_is_refused_in_one_sentence(row):
    call, kind, words = row
    with pytest.raises(kind, match=f"^{re.escape(words)}$"):
        call()


# ------------------------------------------------------------------------------------------------
# Files: save and load
# ------------------------------------------------------------------------------------------------

STORED_TYPES = ["?", "u1", "<i2", ">i2", "<u4", ">i8", "<f2", ">f2", "<f4", ">f4", "<f8", ">f8"]


@st.composite
def stored_arrays(draw):
    """Arrays of random bits: nan with payloads, infinities, -0.0 and subnormals among them."""
    kind = np.dtype(draw(st.sampled_from(STORED_TYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=4)))
    size = math.prod(shape) * kind.itemsize
    content = draw(st.binary(min_size=size, max_size=size))
    if kind.kind == "b":
        content = bytes(byte & 1 for byte in content)
    array = np.frombuffer(content, kind).reshape(shape)
    orders = [array, np.asfortranarray(array), array[..., ::-1] if shape else array]
    return draw(st.sampled_from(orders))


stored_trees = st.recursive(
    st.dictionaries(names, stored_arrays(), max_size=3),
    lambda children: st.dictionaries(names, children | stored_arrays(), min_size=1, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60)
@given(tree=stored_trees)
def test_load_gives_back_every_bit_of_what_was_saved(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("save") / "any name"
    nn.save(path, tree)
    loaded, expected = nn.tree_flatten(nn.load(str(path))), nn.tree_flatten(tree)
    assert list(loaded) == list(expected)
    for name, leaf in expected.items():
        assert loaded[name].dtype == leaf.dtype.newbyteorder("=")
        assert loaded[name].shape == leaf.shape
        assert loaded[name].astype(leaf.dtype).tobytes() == leaf.tobytes()
        assert loaded[name].flags.writeable
    first = path.read_bytes()
    nn.save(path, tree)
    assert path.read_bytes() == first
    with np.load(path) as archive:
        assert set(archive.files) == set(expected)
    flat = nn.read_npz(path)
    assert list(flat) == list(expected)
    assert all_bytes(nn.tree_unflatten(flat)) == all_bytes(nn.load(path))


def test_save_takes_large_arrays_numpy_scalars_and_odd_names(tmp_path):
    tree = {
        "file": np.float32(2),
        "a.npy": {"allow_pickle": np.int64(3)},
        "n" * 65_000: np.random.default_rng(0).integers(0, 256, 3_500_000, np.uint8),
    }
    nn.save(tmp_path / "x", tree)
    assert all_bytes(nn.load(tmp_path / "x")) == all_bytes(tree)
    assert nn.load(tmp_path / "x")["file"].shape == ()


def test_save_refuses_what_load_would_not_read(tmp_path):
    for name in ("a\0b", "ä" * 33_000, "n" * 65_001):
        with pytest.raises(ValueError, match="save: a name must be short and without NUL"):
            nn.save(tmp_path / "x", {"net": {name: np.ones(1)}})
    with pytest.raises(TypeError, match=r"save: net/W must be an array of numbers, got \[1.0\]"):
        nn.save(tmp_path / "x", {"net": {"W": [1.0]}})
    assert os.listdir(tmp_path) == []


def test_saved_bytes_depend_on_no_clock_and_are_not_compressed(tmp_path):
    nn.save(tmp_path / "x", {"b": np.zeros(1000), "a": np.ones(2)})
    with zipfile.ZipFile(tmp_path / "x") as archive:
        members = archive.infolist()
    assert [member.filename for member in members] == ["b.npy", "a.npy"]
    assert {member.date_time for member in members} == {(1980, 1, 1, 0, 0, 0)}
    assert {member.compress_type for member in members} == {zipfile.ZIP_STORED}


# --- writing ---


class FullDisk(io.FileIO):
    """A file on a disk that has `room` for so many bytes."""

    room = 0

    def write(self, content):
        if self.tell() + len(content) > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(content)


def failing(error):
    def fail(*arguments):
        raise error

    return fail


FAILURES = {  # name: (what fails, how, the error)
    **{
        name: (os, name, failing(OSError(errno.ENOSPC, "No space left on device")), OSError)
        for name in ("fsync", "replace")
    },
    "interrupted": (os, "fsync", failing(KeyboardInterrupt()), KeyboardInterrupt),
    **{
        f"room for {room}": (nn, "open", type("Full", (FullDisk,), {"room": room}), OSError)
        for room in (0, 30, 200, 500)
    },
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, name):
    owner, function, fails, error = FAILURES[name]
    path = tmp_path / "model.npz"
    nn.save(path, {"a": np.ones(100)})
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, fails, raising=False)
        with pytest.raises(error) as caught:
            nn.save(path, {"a": np.zeros(100)})
    assert getattr(caught.value, "errno", errno.ENOSPC) == errno.ENOSPC
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.npz"]


def test_save_is_on_the_disk_before_it_takes_the_old_files_place(tmp_path, monkeypatch):
    events = []
    real_sync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: (events.append("sync"), real_sync(d)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), real_replace(a, b)))
    nn.save(tmp_path / "x", {"a": np.ones(2)})
    assert events == ["sync", "replace"]


def test_save_where_no_file_can_be_leaves_nothing_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        nn.save(tmp_path / "folder", {"a": np.ones(2)})
    assert caught.value.filename == str(tmp_path / "folder")
    nowhere = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError, match="there is no such directory: ") as caught:
        nn.save(nowhere / "x", {"a": np.ones(2)})
    assert caught.value.filename == str(nowhere)
    assert os.listdir(tmp_path) == ["folder"]


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


# --- reading: damaged and untrusted files ---


def damaged(path, expected):
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


@pytest.fixture
def small(tmp_path):
    """(path, bytes, tree) of a small file."""
    tree = {"a": np.arange(3, dtype=np.float32), "b": {"c": np.array(5)}}
    nn.save(tmp_path / "small.npz", tree)
    return tmp_path / "small.npz", (tmp_path / "small.npz").read_bytes(), tree


def test_load_refuses_a_file_cut_off_anywhere(small):
    path, whole, tree = small
    comment = len(b"purenn ") + 64
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert damaged(path, tree) or length >= len(whole) - comment


def test_load_survives_flipped_bits(small):
    path, whole, tree = small
    found = 0
    for position in range(0, len(whole) * 8, 3):  # of every byte two or three
        broken = bytearray(whole)
        broken[position // 8] ^= 1 << position % 8
        path.write_bytes(broken)
        found += damaged(path, tree)
    assert found > len(whole) * 4 / 3


@pytest.mark.parametrize("name", list("cdefghij"))
def test_a_list_of_contents_that_was_changed_is_noticed(name, small):
    path, content, _ = small
    directory, new = content.index(b"PK\x01\x02"), f"{name}.npy".encode()
    # The name stands before the data as well, and zipfile compares the two.
    parts = content[:directory], content[directory:]
    path.write_bytes(b"".join(part.replace(b"a.npy", new, 1) for part in parts))
    with pytest.raises(ValueError, match="its list of contents is damaged"):
        nn.load(path)


def zip_of(path, content, name="a.npy", method=zipfile.ZIP_STORED):
    """An archive with one member, or with several given as (name, content)."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for member in content if isinstance(content, list) else [(name, content)]:
            archive.writestr(*member)
    return path


def npy(header, content=b"", version=1):
    """A .npy file with exactly this header."""
    start = b"\x93NUMPY" + bytes([version, 0])
    return start + struct.pack("<H" if version == 1 else "<I", len(header)) + header + content


def header_of(shape, kind="'<f8'", order="False"):
    return f"{{'descr': {kind}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()


class Trap:
    """Code that a pickle would run."""

    def __reduce__(self):
        return os.mkdir, ("trapped",)


def pickled(array):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), allow_pickle=True)
    return file.getvalue()


EIGHT = b"\0" * 8
GOOD = npy(header_of("(1,)"), EIGHT)
HEADERS = {  # name: a header that eight bytes do not go with
    "a huge claim": header_of("(999999999,)"),
    "a negative claim": header_of("(-3,)"),
    "too small a claim": header_of("(0,)"),
    "a shape of bool": header_of("(True,)"),
    "two unknown sizes": header_of("(-1, -1)"),
    "minus one alone": header_of("(-1,)"),
    "more axes than numpy has": header_of("(" + "1," * 65 + ")"),
    "a list for a shape": header_of("[1]"),
    "a float for a size": header_of("(1.0,)"),
    "an order that is no bool": header_of("(1,)", order="1"),
    "objects": header_of("(1,)", kind="'|O'"),
    "text": header_of("(1,)", kind="'<U2'"),
    "complex numbers": header_of("(1,)", kind="'<c8'"),
    "fields": header_of("(1,)", kind="[('a', '<f8')]"),
    "dates": header_of("(1,)", kind="'<M8[s]'"),
    "no bytes an item": header_of("(1,)", kind="'|V0'"),
    "an unknown kind of number": header_of("(1,)", kind="'<f3'"),
    "no tuple": header_of("(1)"),
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
    "ten gigabytes": header_of("(1250000000,)"),
}
UNTRUSTED = {  # name: the members of an archive
    **{
        f"{name}, version {version}": npy(header, EIGHT, version)
        for name, header in HEADERS.items()
        for version in (1, 2)
    },
    "a pickle": pickled(np.array([Trap()], dtype=object)),
    "too much": GOOD + b"x",
    "too little": GOOD[:-1],
    "another version": GOOD.replace(b"NUMPY\x01", b"NUMPY\x03"),
    "a header of 4 GB": npy(b"", EIGHT, 2).replace(bytes(4), b"\xff" * 4, 1),
    "no array": b"",
    "another file": [("a.txt", GOOD)],
    "another ending": [("a.abc", GOOD)],
    "no name": [(".npy", GOOD)],
    "a name without ending": [("npy", GOOD)],
    "a name of several lines": [("a\nb" * 9, GOOD)],
    "a long name": [("a" * 60_000, GOOD)],
    "many folders": [("a/" * 300, GOOD)],
    "the same name twice": [("a.npy", GOOD), ("a.npy", GOOD)],
    "clashing names": [("a.npy", GOOD), ("a/b.npy", GOOD)],
    "an empty part": [("a//b.npy", GOOD)],
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", UNTRUSTED)
def test_load_refuses_untrusted_files_in_one_short_line_and_without_memory(
    name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    zip_of("x.npz", UNTRUSTED[name])

    def refuse():
        with pytest.raises(ValueError, match=r"^x\.npz: cannot be read: .{1,330}$"):
            nn.load("x.npz")

    assert peak_memory(refuse) < 1_000_000
    assert os.listdir() == ["x.npz"]


@pytest.mark.parametrize("claim", [1, 2**16 - 70])
def test_load_refuses_a_header_shorter_than_it_says(tmp_path, claim):
    header = header_of("(0,)")
    sizes = (struct.pack("<H", len(header) + more) for more in (0, claim))
    with pytest.raises(ValueError, match="its header does not describe an array of numbers"):
        nn.load(zip_of(tmp_path / "x", npy(header).replace(*sizes)))


def test_load_reads_all_versions_of_the_header_and_both_orders(tmp_path):
    content = np.arange(6.0).tobytes()
    for version in (1, 2):
        for order, rows in (("False", [[0, 1, 2], [3, 4, 5]]), ("True", [[0, 2, 4], [1, 3, 5]])):
            path = zip_of(tmp_path / "x", npy(header_of("(2, 3)", order=order), content, version))
            np.testing.assert_array_equal(nn.load(path)["a"], rows)
    for header in (header_of("(2L, 3L)"), header_of("(2, 3)").ljust(1_000)):  # L: Python 2 wrote it
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert nn.load(zip_of(tmp_path / "x", npy(header, bytes(48))))["a"].shape == (2, 3)
    empty = zip_of(tmp_path / "x", npy(header_of("(0, 99999)")))  # nothing is wrong with that
    assert nn.load(empty)["a"].shape == (0, 99999)


HEADER_PARTS = [
    *("{", "'descr': ", "'<f8'", "'|u1'", "'>i2'", "'|O'", ", ", "'fortran_order': ", "True"),
    *("False", "'shape': ", "(", "1", "4", "0", ",", "L", "-", ")", "}", "\n", " ", "\\d", "é"),
]


@settings(max_examples=200)
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
    path = zip_of(tmp_path_factory.mktemp("header") / "x", npy(header, content))
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


def test_what_a_file_does_wrong_is_said_exactly(tmp_path):
    path = tmp_path / "x"
    member = npy(header_of("(3,)"), EIGHT)
    claim = f"an array of float64 and shape (3,) does not fit in {len(member)} bytes"
    for content, words in [
        ([("a.npy", member)], claim),
        ([("a.npy", GOOD.replace(b"\x01\0", b"\x03\0", 1))],
         "unknown version (3, 0) of the .npy format"),
        ([("a.txt", GOOD)], "unexpected member 'a.txt'"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: cannot be read: {words}')}$"):
            nn.load(zip_of(path, content))


def test_errors_of_reading_are_said_in_one_line_and_others_pass():
    for error, words in [
        (OSError("two\n  lines\n"), "two lines"),
        (MemoryError(), "MemoryError"),
        (OSError("x" * 400), "x" * 300),
    ]:
        with pytest.raises(ValueError, match=f"^x: cannot be read: {words}$"), nn._blame_file("x"):
            raise error
    for passing in (FileNotFoundError, PermissionError, KeyboardInterrupt):
        with pytest.raises(passing), nn._blame_file("x"):
            raise passing


def test_bombs_are_refused_before_they_go_off(tmp_path):
    zeros = npy(header_of("(30000000,)", kind="'|u1'"), bytes(30_000_000))
    honest = npy(header_of("(1000,)"), np.random.default_rng(0).bytes(8000))
    bomb = honest + bytes(30_000_000)
    short = zip_of(tmp_path / "short", bomb, method=zipfile.ZIP_DEFLATED)  # its list says less
    content = short.read_bytes()
    for true, told in ((len(bomb), len(honest)), (zlib.crc32(bomb), zlib.crc32(honest))):
        content = content.replace(struct.pack("<I", true), struct.pack("<I", told))
    short.write_bytes(content)
    paths = [zip_of(tmp_path / "bomb", zeros, method=zipfile.ZIP_DEFLATED), short]

    def read(path):
        with contextlib.suppress(ValueError):
            nn.load(path)
            assert path == short  # the bytes after the array may be left where they are

    for path in paths:
        assert peak_memory(partial(read, path)) < 2_000_000


def test_a_member_that_unpacks_to_less_than_its_list_says_is_refused(tmp_path):
    member = npy(header_of("(2000,)"), np.random.default_rng(0).bytes(8000))
    path = zip_of(tmp_path / "x", member, method=zipfile.ZIP_DEFLATED)
    sizes = (struct.pack("<I", len(member) + more) for more in (0, 8000))
    path.write_bytes(path.read_bytes().replace(*sizes))
    words = r"shape \(2000,\) needs 16000 bytes, but it has 8000$"
    with pytest.raises(ValueError, match=f"^{path}: cannot be read: {words}"):
        nn.read_npz(path, ratio=3)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("read", [nn.load, partial(nn.read_npz, ratio=200)])
def test_what_is_packed_as_no_array_is_takes_no_memory(tmp_path, read, method):
    honest = npy(header_of("(4000,)", kind="'|u1'").ljust(118), bytes(4000))
    path = zip_of(tmp_path / "x", honest + bytes(8_000_000), method=method)
    content = path.read_bytes()  # its list of contents shall not tell, or that is what is refused
    content = content.replace(struct.pack("<I", len(honest) + 8_000_000), struct.pack("<I", 4128))
    path.write_bytes(bytes(4128) + content)

    def refuse():
        with pytest.raises(ValueError, match="'a.npy' has an unsupported compression"):
            read(path)

    assert peak_memory(refuse) < 1_000_000


def test_load_refuses_members_that_are_encrypted_or_share_their_bytes(tmp_path):
    path = zip_of(tmp_path / "x", GOOD)
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


@pytest.mark.parametrize(
    ("options", "ratio"), [({}, 1), ({"ratio": 200}, 200), ({"ratio": 2.5}, 2.5)]
)
def test_a_file_may_claim_what_it_could_hold_and_not_a_byte_more(tmp_path, options, ratio):
    member = npy(header_of("(1000000,)", kind="'|u1'").ljust(118), bytes(1_000_000))
    small = zip_of(tmp_path / "small", member, method=zipfile.ZIP_DEFLATED).read_bytes()
    padding = math.ceil(len(member) / ratio) - len(small)
    assert padding > 0
    path = tmp_path / "x"
    path.write_bytes(bytes(padding) + small)  # a zip file may have anything before its start
    assert nn.read_npz(path, **options)["a"].shape == (1_000_000,)
    path.write_bytes(bytes(padding - 1) + small)
    for read in (partial(nn.read_npz, **options), nn.load):
        with pytest.raises(
            ValueError, match=f"^{path}: .*its declared sizes exceed what the file can hold$"
        ):
            read(path)


@pytest.mark.parametrize("read", [nn.load, nn.read_npz])
def test_links_are_followed_and_what_is_no_file_is_refused(tmp_path, read):
    def listen(path):
        with pytest.raises(ValueError, match="it is not a file") as caught:
            read(path)
        said.append(str(caught.value))

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe", tmp_path / "zeros", tmp_path):
        said = []
        thread = threading.Thread(target=listen, args=(path,), daemon=True)
        thread.start()
        thread.join(10)  # fails where it waits for more to come
        assert said == [f"{path}: cannot be read: it is not a file"]
    (tmp_path / "nowhere").symlink_to("missing")
    for missing in ("nowhere", "not there"):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / missing)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((ValueError, FileNotFoundError), match=f"{tmp_path}/loop: "):
        read(tmp_path / "loop")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match="empty: cannot be read"):
        read(tmp_path / "empty")
    nn.save(tmp_path / "real", {"a": np.ones(2)})
    (tmp_path / "link").symlink_to("real")
    np.testing.assert_array_equal(read(tmp_path / "link")["a"], [1, 1])


def test_what_load_would_refuse_is_not_saved(tmp_path):
    deep = {"W": np.ones(2)}
    for _ in range(101):
        deep = {"a": deep}
    with pytest.raises(ValueError, match="^save: a name must be short and without NUL"):
        nn.save(tmp_path / "deep", deep)
    nn.save(tmp_path / "deep", deep["a"])
    assert all_bytes(nn.load(tmp_path / "deep")) == all_bytes(deep["a"])
    with pytest.raises(ValueError, match="^save: params hold a key"):
        nn.save(tmp_path / "key.npz", {"a": {"b": nn.training({}, 0)}})


def test_two_threads_may_replace_one_file(tmp_path):
    path = tmp_path / "x"
    with nn.replacing(path) as file, ThreadPoolExecutor(1) as pool:
        file.write(b"1")
        pool.submit(nn.save, path, {"W": np.ones(2)}).result()
    assert path.read_bytes() == b"1"
    assert os.listdir(tmp_path) == ["x"]


# ------------------------------------------------------------------------------------------------
# The file itself: what it names, imports and touches, its types, and the README's code
# ------------------------------------------------------------------------------------------------


def test_every_public_name_has_a_docstring_and_flat_functions_are_not_in_all():
    public = {
        name: value
        for name, value in vars(nn).items()
        if not name.startswith("_")
        and getattr(value, "__module__", None) == "purenn"
        and not getattr(value, "_is_protocol", False)
    }
    flat = {name for name in public if name.endswith(("_init", "_forward", "_backward"))}
    for name in LAYERS:
        assert {f"{name}_forward", f"{name}_backward"} <= flat
    assert public.keys() - flat - {"read_npz"} == set(nn.__all__)
    assert len(set(nn.__all__)) == len(nn.__all__)
    assert all(value.__doc__ for value in public.values())


def test_the_library_imports_numpy_and_the_standard_library_alone():
    imported = set()
    for node in ast.walk(ast.parse((REPOSITORY / "purenn.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).partition(".")[0])
    assert imported - sys.stdlib_module_names == {"numpy"}


def test_glibc_is_asked_to_keep_freed_memory(monkeypatch):
    asked = []
    library = types.SimpleNamespace(mallopt=lambda *arguments: asked.append(arguments))
    monkeypatch.setattr("ctypes.CDLL", lambda name: library)
    nn.keep_freed_memory()
    trim_threshold, mmap_threshold = -1, -3  # M_... in malloc.h
    assert asked == [(trim_threshold, 2**31 - 1), (mmap_threshold, 2**25)]
    monkeypatch.setattr("ctypes.CDLL", failing(OSError("no such library")))
    assert nn.keep_freed_memory() is None


TOUCHES = {"open", "ctypes", "sys", "subprocess", "socket", "tempfile", "shutil", "zipfile"}
TOUCHES |= {"seterr", "setattr", "exec", "eval", "print", "input", "global", "environ", "time"}


def test_nothing_pure_touches_the_disk_or_the_process():
    """In the file: all that does stands under the last banner, and nothing above calls it."""
    source = (REPOSITORY / "purenn.py").read_text(encoding="utf-8")
    banners = list(re.finditer(r"^# === (.+?) =+$", source, re.MULTILINE))
    assert banners[-1][1].startswith("Not pure")
    first = source[: banners[-1].start()].count("\n")
    tree = ast.parse(source)
    not_pure = {n.name for n in tree.body if n.lineno > first and isinstance(n, ast.FunctionDef)}
    assert {"save", "load", "read_npz", "replacing", "keep_freed_memory"} <= not_pure
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.lineno < first:
            assert node.id not in TOUCHES | not_pure, f"line {node.lineno} of purenn.py"
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            raise AssertionError(f"line {node.lineno} of purenn.py keeps hidden state")
        if isinstance(node, ast.Name) and node.id == "keep_freed_memory":
            raise AssertionError(f"line {node.lineno} calls it for a user who did not ask")


def test_training_loads_no_library_and_writes_no_file():
    """In a process: from init to the last step, seen by the interpreter's own audit."""
    program = """
import sys
import numpy as np, numpy.random
import purenn as nn
seen = []
sys.addaudithook(lambda event, arguments: seen.append((event, *arguments[:2])))
net = nn.sequential(nn.linear(3), nn.batch_norm(), nn.dropout(0.5), nn.linear(2))
params, _ = net.init(0, (4,))
optimizer = nn.adam()
state = optimizer.init(params)
function = nn.data_parallel(nn.value_and_grad(net, nn.softmax_cross_entropy), 2)
x = np.ones((4, 4), np.float32)
loss, grads, cache = function(nn.training(params, 0), x, np.zeros(4, int))
params, state = optimizer.step(params, grads, state)
params = nn.update_statistics(params, cache)
nn.augment(0, np.ones((1, 1, 8, 8)))
nn.check_gradients(nn.relu(), {}, x)
print([e for e in seen if e[0].startswith(("ctypes", "os.", "subprocess", "socket"))
       or e[0] == "open" and e[2] not in ("r", "rb")])
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (run.stdout, run.stderr) == ("[]\n", "")


FLAGGED = [  # (lines that mypy must refuse, a part of what it says)
    ("net.forward(params)", "arg"),
    ("net.backward(params, cache, dy, wrong=1)", "wrong"),
    ("sequential(3)", "int"),
    ('conv2d(8, 3, padding="sam")', "sam"),
    ("conv2d(1, 8, 3)", "positional"),
    ("adam().step(params, params)", "arg"),
    ('nn.cosine(0.1, 9)("1")', "str"),
    ("value_and_grad(net, mean_squared_error)(params, x)", "arg"),
    ("a: str = value_and_grad(net, mean_squared_error)(params, x, x)[0]", "float"),
]
START = """import numpy as np
import purenn as nn
from purenn import *
net = sequential(linear(3), act=relu())
x = np.ones((2, 4), np.float32)
params, shape = net.init(0, (4,))
y, cache = net.forward(params, x)
dy = np.ones_like(y)
"""
RIGHT = '''"""A user's project under mypy --strict."""

from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any
import numpy as np
import purenn as nn

Array = np.ndarray[Any, Any]


def scale_init(key: nn.Key, shape: nn.Shape) -> tuple[nn.Tree, nn.Shape]:
    return {"w": np.ones(shape, np.float32)}, shape


def scale_forward(p: nn.Tree, inputs: Array) -> tuple[Array, Array]:
    return p["w"] * inputs, inputs


def scale_backward(p: nn.Tree, inputs: Array, upstream: Array) -> tuple[Array, nn.Tree]:
    return p["w"] * upstream, {"w": (inputs * upstream).sum(axis=0)}


def backward_with_need_dx(
    params: nn.Tree, x: Array, dy: Array, *, need_dx: bool = True
) -> tuple[Array | None, nn.Tree]:
    return (params["w"] * dy if need_dx else None), {"w": (x * dy).sum(axis=0)}


def times(params: nn.Tree, x: Array, *, factor: float) -> tuple[Array, Array]:
    return factor * x, x


def half(key: nn.Key, shape: nn.Shape) -> Array:
    return np.full(shape, 0.5, np.float32)


class Own:
    def init(self, key: nn.Key, shape: nn.Shape) -> tuple[nn.Tree, nn.Shape]:
        return {}, shape

    def forward(self, params: nn.Tree, x: Array) -> tuple[Array, Array]:
        return x, x

    def backward(self, params: nn.Tree, cache: Array, dy: Array) -> tuple[Array, nn.Tree]:
        return dy, {}


net = nn.sequential(
    nn.conv2d(8, (3, 1), stride=2, padding=(1, 0)),
    nn.conv2d(8, 3, padding="same", init=nn.normal(0.1)),
    nn.max_pool2d(2, stride=1),
    nn.Layer(scale_init, scale_forward, scale_backward),
    nn.residual(nn.Layer(scale_init, partial(times, factor=2.0), backward_with_need_dx)),
    mine=Own(),
    out=nn.linear(10, init=half),
)
params, shape = net.init((1, 2), (3, 8, 8))
x, target = np.ones((2, 3, 8, 8), np.float32), np.zeros(2, int)
y, cache = net.forward(nn.training(params, 0), x)
loss, dy = nn.softmax_cross_entropy(y, target)
dx, grads = net.backward(params, cache, dy)
optimizer = nn.adam(nn.warmup(nn.cosine(1e-3, 100), 10))
params, state = optimizer.step(params, grads, optimizer.init(params))
function = nn.data_parallel(nn.value_and_grad(net, nn.softmax_cross_entropy), 2)
value, grads, cache = function(params, x, target)
total: float = loss + value + nn.one_cycle(0.1, 9)(3)
params = nn.update_statistics(params, cache)
nn.check_gradients(net, params, x)
parts: list[Array] = [x[index] for index in nn.batches(10, 3, 0)]
nn.save("x.npz", params)
arrays: dict[str, Array] = nn.read_npz("x.npz", ratio=2)
'''


def test_mypy_flags_misuse_in_a_users_project_and_nothing_else(tmp_path):
    pytest.importorskip("mypy")
    shutil.copy(REPOSITORY / "purenn.py", tmp_path)
    lines = [line for line, _ in FLAGGED]
    (tmp_path / "wrong.py").write_text(START + "\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "right.py").write_text(RIGHT, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache")]
    command += ["--config-file", os.devnull, "purenn.py", "wrong.py", "right.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    errors = [line for line in run.stdout.splitlines() if ": error: " in line]
    assert [error for error in errors if not error.startswith("wrong.py:")] == []
    first = START.count("\n") + 1
    for number, (line, words) in enumerate(FLAGGED, first):
        said = [error for error in errors if error.startswith(f"wrong.py:{number}: ")]
        assert said, f"mypy says nothing of {line}"
        assert words in said[0]
    assert {int(error.split(":")[1]) for error in errors} == set(range(first, first + len(FLAGGED)))


def readme():
    return (REPOSITORY / "README.md").read_text(encoding="utf-8")


def readme_blocks():
    return re.findall(r"^```python\n(.*?)^```", readme(), re.MULTILINE | re.DOTALL)


def test_readme_blocks_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    blocks = readme_blocks()
    assert len(blocks) >= 6
    assert all(len(re.findall(r"^ *\S", block, re.M)) <= 20 for block in blocks)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(REPOSITORY))
    namespace = {"__name__": "readme"}
    for number, block in enumerate(blocks):
        if "import onnx" in block and not importlib.util.find_spec("onnxruntime"):
            continue  # an optional package
        exec(compile(block, f"README block {number}", "exec"), namespace)
    printed = capsys.readouterr().out.splitlines()
    assert float(printed[0]) > 0.95
    assert float(printed[1]) > 0.9
    assert printed[2] in ("same sign", "different signs")


def test_readme_shows_the_message_of_a_forgotten_slope():
    block = next(block for block in readme_blocks() if "check_gradients" in block)
    broken = block.replace('dx = np.where(x > 0, dy, params["slope"] * dy)', "dx = dy")
    assert broken != block
    with pytest.raises(AssertionError) as failure:
        exec(compile(broken, "README", "exec"), {"np": np, "nn": nn, "__name__": "readme"})
    assert f"`{failure.value}`" in readme()


def ask(port, body, **headers):
    """(code, text) that the README's server answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("POST", "/", body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_readme_server_answers_many_clients_and_survives_bad_requests():
    blocks = [block for block in readme_blocks() if "ThreadingHTTPServer" in block]
    if not blocks:
        pytest.skip("the README has no server")
    net = nn.sequential(nn.flatten(), nn.linear(10))
    params, _ = net.init(0, (1, 28, 28))
    namespace = {"np": np, "nn": nn, "cnn": net, "weights": params, "__name__": "readme"}
    exec(compile(blocks[0], "README", "exec"), namespace)
    handler = namespace["Classifier"]
    handler.timeout, handler.log_message = 0.2, lambda *_: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    images = np.random.default_rng(0).integers(0, 256, (30, 784), np.uint8)
    p = nn.softmax().forward({}, net.forward(params, images[:, None] / np.float32(255))[0])[0]
    expected = [(200, f"{row.argmax()} {row.max():.4f}\n") for row in p]
    with ThreadPoolExecutor(5) as clients:
        clients.submit(server.serve_forever, 0.01)
        try:
            port = server.server_address[1]
            for body, headers in ((b"abc", {}), (b"", {}), (b"x", {"Content-Length": "x"})):
                assert ask(port, body, **headers)[0] == 400
            with pytest.raises(http.client.RemoteDisconnected):  # it does not wait for the rest
                ask(port, b"abc", **{"Content-Length": "784"})
            asked = clients.map(partial(ask, port), [image.tobytes() for image in images])
            assert list(asked) == expected
        finally:
            server.shutdown()
            server.server_close()
