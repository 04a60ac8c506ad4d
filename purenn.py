"""purenn: neural networks as pure functions over plain dicts of NumPy arrays.

A layer is a pair of pure functions over params, a dict of arrays:

    forward(params, x) -> (y, cache)        backward(params, cache, dy) -> (dx, grads)

A network is a layer made of layers and has exactly the same two functions. An optimizer is a
state transition, step(params, grads, state) -> (params, state). Nothing the caller can see is
ever written to, the same arguments give the same bits, and the dtype of x is kept: float32 in,
float32 out; float64 in, float64 out. What overflows becomes inf, without a warning.

    net = sequential(hidden=linear(256), act=relu(), out=linear(10))
    params, shape = net.init(0, (784,))
    optimizer = adam(1e-3)
    state = optimizer.init(params)

    loss, grads, cache = value_and_grad(net, softmax_cross_entropy)(params, images, labels)
    params, state = optimizer.step(params, grads, state)

Copy this file into your project; it needs NumPy (1.26 or newer) and nothing else.
"""

# mypy: disable-error-code=no-any-return

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from copy import copy, deepcopy
from functools import lru_cache, partial, reduce, wraps
from operator import itemgetter
from typing import IO, Any, Literal, NamedTuple, NoReturn, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

__version__ = "0.1.0"

# fmt: off
__all__ = [
    "tree_map", "tree_flatten", "tree_unflatten", "tree_add", "count_parameters", "global_norm",
    "clip_gradients", "fold_key", "training", "zeros", "constant", "normal", "uniform",
    "xavier_normal", "xavier_uniform", "he_normal", "he_uniform", "orthogonal", "Layer", "linear",
    "identity", "flatten", "reshape", "permute", "last", "relu", "leaky_relu", "elu", "sigmoid",
    "tanh", "softplus", "gelu", "silu", "softmax", "log_softmax", "dropout", "batch_norm",
    "update_statistics", "layer_norm", "group_norm", "embedding", "position_embedding", "rnn",
    "gru", "lstm", "attention", "conv1d", "conv2d", "conv2d_transpose", "max_pool2d", "avg_pool2d",
    "global_avg_pool2d", "upsample2d", "sequential", "residual", "concatenate", "heads",
    "softmax_cross_entropy", "cross_entropy", "hinge", "binary_cross_entropy", "mean_squared_error",
    "mean_absolute_error", "huber", "l2_penalty", "Optimizer", "sgd", "adam", "adamw", "rmsprop",
    "adagrad", "adadelta", "step_decay", "multistep", "exponential", "cosine", "cyclic",
    "one_cycle", "warmup", "reduce_on_plateau", "check_gradients", "value_and_grad",
    "data_parallel", "accuracy", "batches", "augment", "to_torch", "from_torch",
    "summary", "replacing", "save", "load", "keep_freed_memory",
]
# fmt: on

Array = NDArray[Any]
Tree = dict[str, Any]  # nested dicts whose leaves are arrays
Data = Any  # an array, or a tree of arrays with a common batch axis
Key = int | Sequence[int] | Array
Shape = tuple[int, ...]
Shapes = Any  # the shape of one sample, or a tree of shapes
Weights = Array | None
Path = str | os.PathLike[str]
_FLOATS = "float32 or float64", "fd", "np.float32"  # in words, dtype.char, what one converts to
_WHOLE = "whole numbers", np.typecodes["AllInteger"], "int"


# === Checks of arguments, used by every section =================================================


def _kind(value: Any) -> str:
    """What `value` is, in the words of an error message: itself where it is short."""
    if isinstance(value, np.ndarray):
        return f"{type(value).__name__} of {value.dtype} and shape {value.shape}"
    items = value if isinstance(value, (list, tuple)) else [value]
    plain = (bool, int, float, str, np.number, type(None))
    short = len(items) < 10 and all(isinstance(item, plain) for item in items)
    return repr(value) if short and len(repr(value)) < 40 else type(value).__name__


def _float(where: str, name: str, value: Any) -> float:
    """`value` as a float; nan where it is too large for one."""
    kinds = (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise TypeError(f"{where}: {name} must be a number, got {_kind(value)}")
    try:
        return float(value)
    except OverflowError:
        return math.nan


_LIMITS = {"minimum": ">=", "maximum": "<=", "above": ">", "below": "<"}


def _number(where: str, name: str, value: Any, **limits: float) -> float:
    """`value` as a finite float with minimum <= value <= maximum and above < value < below."""
    number = value if type(value) is float else _float(where, name, value)
    least, most = limits.get("minimum", -math.inf), limits.get("maximum", math.inf)
    above, below = limits.get("above", -math.inf), limits.get("below", math.inf)
    if not (least <= number <= most and above < number < below):
        known = [f"{_LIMITS[limit]} {bound:g}" for limit, bound in limits.items()]
        if not known or math.isinf(number):
            known.insert(0, "finite")
        raise ValueError(f"{where}: {name} must be {' and '.join(known)}, got {value}")
    return number


def _whole(where: str, name: str, value: Any, minimum: int) -> int:
    """`value` as an int that is at least `minimum`."""
    if type(value) is int and value >= minimum:
        return value
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{where}: {name} must be a whole number, got {_kind(value)}")
    if value < minimum:
        raise ValueError(f"{where}: {name} must be at least {minimum}, got {value}")
    return int(value)


_KINDS = {bool: "True or False", dict: "a dict", Callable: "a function"}


def _check_kind(where: str, name: str, value: Any, kind: Any) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{where}: {name} must be {_KINDS[kind]}, got {_kind(value)}")


def _is_array(x: Any) -> bool:
    """Whether x is a plain array; masked arrays and matrices compute differently."""
    if type(x) is np.ndarray:
        return True
    return isinstance(x, np.ndarray) and not isinstance(x, (np.ma.MaskedArray, np.matrix))


def _check_numbers(where: str, name: str, x: Any) -> None:
    """Refuse everything that is not an array of real numbers, of whatever type."""
    if not (_is_array(x) or isinstance(x, np.generic)) or x.dtype.kind not in "biuf":
        raise TypeError(f"{where}: {name} must be an array of numbers, got {_kind(x)}")


def _check_array(where: str, name: str, x: Any, kind: tuple[str, str, str] = _FLOATS) -> None:
    """Refuse everything that is not an array of this kind, float32 or float64 by default."""
    if not _is_array(x):
        raise TypeError(f"{where}: {name} must be a NumPy array, got {_kind(x)}")
    words, characters, dtype = kind
    if x.dtype.char not in characters:
        is_argument = name.isidentifier() and name not in ("params", "grads")
        hint = f"; convert it with {name}.astype({dtype})" if is_argument else ""
        raise TypeError(f"{where}: {name} must be {words}, got {x.dtype}{hint}")


def _check_shape(where: str, shape: Any) -> Shape:
    """`shape` as a tuple of positive ints."""
    if not isinstance(shape, (tuple, list)):
        wanted = "a tuple without the batch axis"
        raise TypeError(f"{where}: shape must be {wanted}, got {_kind(shape)}")
    return tuple(_whole(where, "every size in shape", size, 1) for size in shape)


def _names(tree: Any) -> str:
    return str(sorted(map(str, tree))) if isinstance(tree, dict) else _kind(tree)


# === Overflow ===================================================================================

_Function = TypeVar("_Function", bound=Callable[..., Any])
_QUIET = ContextVar("quiet", default=False)


def _call_quietly(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The result of a function, without NumPy's warnings: what overflows is inf.

    This covers everything it calls, user-defined layers included. np.errstate takes a microsecond,
    so only the outermost call enters it; nested calls only check the flag.
    """
    token = _QUIET.set(True)
    try:
        with np.errstate(all="ignore"):
            return function(*arguments, **options)
    finally:
        _QUIET.reset(token)


def _quiet(function: _Function) -> _Function:
    """A decorator: `function` without NumPy's warnings."""

    @wraps(function)
    def quiet(*arguments: Any, **options: Any) -> Any:
        if not _QUIET.get():
            return _call_quietly(function, *arguments, **options)
        return function(*arguments, **options)

    return cast(_Function, quiet)


# === Trees: nested dicts with arrays as leaves ==================================================


def tree_map(f: Callable[..., Any], *trees: Any) -> Any:
    """f applied leaf by leaf: a tree of f(leaf of the first tree, leaf of the second, ...).

    All trees have the same names, else ValueError. Everything that is not a dict is a leaf.
    """
    _check_kind("tree_map", "f", f, Callable)
    if not trees:
        raise TypeError("tree_map: expected at least one tree")
    if not any(isinstance(tree, dict) for tree in trees):
        return f(*trees)
    for tree in trees:
        if not isinstance(tree, dict) or tree.keys() != trees[0].keys():
            here, there = _names(trees[0]), _names(tree)
            raise ValueError(f"tree_map: trees differ, {here} here and {there} there")
    return {name: tree_map(f, *(tree[name] for tree in trees)) for name in trees[0]}


def _flatten(where: str, what: str, tree: Any) -> dict[str, Any]:
    """`tree_flatten`, with errors that say what the tree is."""
    _check_kind(where, what, tree, dict)
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if not isinstance(name, str):
            raise TypeError(f"{where}: names must be strings, got {name!r}")
        if not name or "/" in name:
            raise ValueError(f"{where}: a name must not be empty or contain '/', got {name!r}")
        if isinstance(value, dict):
            flat.update({f"{name}/{path}": v for path, v in _flatten(where, what, value).items()})
        else:
            flat[name] = value
    return flat


def _arrays(where: str, what: str, tree: Any) -> dict[str, Any]:
    """A tree as `tree_flatten` gives it; refused unless every leaf is an array of numbers."""
    flat = _flatten(where, what, tree)
    for path, leaf in flat.items():
        _check_numbers(where, path, leaf)
    return flat


def tree_flatten(tree: Tree) -> dict[str, Any]:
    """{"hidden/W": leaf, ...}: one flat dict, the names on the way joined by "/".

    Empty branches are dropped. ValueError for an empty name or one with a "/" in it.
    """
    return _flatten("tree_flatten", "tree", tree)


def tree_unflatten(flat: dict[str, Any]) -> Tree:
    """The inverse of `tree_flatten`.

    ValueError where one name is both a leaf and a branch, or nested deeper than 100.
    """
    _check_kind("tree_unflatten", "flat", flat, dict)
    tree: Tree = {}
    for path, leaf in flat.items():
        if not isinstance(path, str):
            raise TypeError(f"tree_unflatten: names must be strings, got {path!r}")
        *branches, name = path.split("/")
        if len(branches) > 100:  # so that no recursion over an untrusted tree overflows the stack
            raise ValueError(f"tree_unflatten: {path[:50]!r}... is nested deeper than 100")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                break
        if not all([*branches, name]) or not isinstance(node, dict) or name in node:
            raise ValueError(f"tree_unflatten: name {path!r} is malformed or clashes with another")
        node[name] = leaf
    return tree


def _sum(where: str, name: str, one: Any, other: Any) -> Any:
    """The sum of two trees or arrays; None, and an entry that one tree lacks, count as zero."""
    if one is None or other is None:
        return other if one is None else one
    trees = isinstance(one, dict) + isinstance(other, dict)
    if trees == 2:
        return {name: _sum(where, name, one.get(name), other.get(name)) for name in one | other}
    if trees or np.shape(one) != np.shape(other):
        raise ValueError(f"{where}: {name!r} is {_kind(one)} and {_kind(other)}")
    return np.asarray(one + other)


@_quiet
def tree_add(*trees: Tree) -> Tree:
    """The sum of trees, entry by entry; a tree that lacks an entry counts as zero there.

    So `tree_add(grads, l2_penalty(params, 1e-4)[1])` adds weight decay to the matrices alone.
    ValueError where shapes differ.
    """
    total: Tree = {}
    for tree in trees:
        _arrays("tree_add", "every tree", tree)
        total = _sum("tree_add", "tree", total, tree)
    return total


def count_parameters(tree: Tree) -> int:
    """The number of array elements in a tree, not counting keys.

    Of `params` that includes running statistics; of `grads` it is the trained ones alone.
    """
    arrays = _arrays("count_parameters", "tree", tree)
    return sum(leaf.size for path, leaf in arrays.items() if path.split("/")[-1] != "key")


def _norm(where: str, what: str, tree: Any) -> float:
    arrays = _arrays(where, what, tree)
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in arrays.values()]
    largest = float(np.max([np.abs(leaf).max(initial=0) for leaf in leaves], initial=0))
    if largest == 0 or not math.isfinite(largest):
        return largest
    scaled = [leaf / largest for leaf in leaves]  # so that no square overflows
    return largest * math.sqrt(sum(float(leaf @ leaf) for leaf in scaled))


@_quiet
def global_norm(tree: Tree) -> float:
    """sqrt(Σ g²) over all entries of a tree, summed in float64."""
    return _norm("global_norm", "tree", tree)


def _times(leaf: Any, factor: float) -> Array:
    """leaf · factor, an array; in the dtype of the leaf if it holds floats."""
    leaf = np.asarray(leaf)
    return np.asarray(leaf * factor, leaf.dtype if leaf.dtype.kind == "f" else None)


@_quiet
def clip_gradients(grads: Tree, max_norm: float) -> Tree:
    """grads · min(1, max_norm / global_norm(grads)) (Pascanu et al. 2013).

    ValueError where the norm is nan or infinite.
    """
    max_norm = _number("clip_gradients", "max_norm", max_norm, above=0)
    norm = _norm("clip_gradients", "grads", grads)
    if not math.isfinite(norm):
        raise ValueError(f"clip_gradients: the norm of the gradients is {norm}")
    if norm <= max_norm:
        return grads
    return tree_map(partial(_times, factor=max_norm / norm), grads)


# === Keys: randomness as data ===================================================================

_KEY_MARK = 0x6B657973  # the first word of every key array: "keys" in ASCII


def _key_array(key: Any) -> Array:
    """A key as an array of uint32: the mark, how many numbers, and each as (digits, its digits).

    The encoding tells 1, (1, 0) and (0, 1) apart. An array that starts with the mark is a key
    already.
    """
    if isinstance(key, np.ndarray) and key.ndim == 1:
        if key.dtype == np.uint32 and len(key) and key[0] == _KEY_MARK:
            return key
        key = key.tolist()
    numbers = key if isinstance(key, (tuple, list)) else (key,)
    if not numbers:
        raise ValueError("key: expected an int or a sequence of ints, got an empty one")
    words = [_KEY_MARK, len(numbers)]
    for number in numbers:
        number = _whole("key", "every number", number, 0)
        shifts = range(0, max(number.bit_length(), 1), 32)
        digits = [number >> shift & 0xFFFFFFFF for shift in shifts]
        words += [len(digits), *digits]
    return np.array(words, np.uint32)


def fold_key(key: Key, index: int) -> Array:
    """The key of child number `index`: a different index or parent gives different random numbers.

    `key` is an int >= 0, a tuple, list or array of such, or a key array that this function made.
    TypeError for other kinds, ValueError for a negative number or an empty sequence.
    """
    index = _whole("fold_key", "index", index, 0)
    if index >= 2**32:
        raise ValueError(f"fold_key: index must be below 2**32, got {index}")
    return np.append(_key_array(key), np.uint32(index))


def training(params: Tree, key: Key) -> Tree:
    """params plus the entry "key": a network given these runs in training mode.

    Combinators hand each child a key of its own; `dropout` draws its mask from
    it, and `batch_norm` takes the statistics of the batch. Params without a key mean inference.
    """
    _check_kind("training", "params", params, dict)
    return {**params, "key": _key_array(key)}


def _generator(key: Key) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(_key_array(key))))


# === Initializers: (key, shape) -> array of float32 =============================================

Initializer = Callable[[Any, Shape], Array]
_LARGEST = float(np.finfo(np.float32).max)


def zeros(key: Key, shape: Shape) -> Array:
    """All entries 0."""
    return np.zeros(_check_shape("zeros", shape), np.float32)


def _constant(key: Key, shape: Shape, *, value: float) -> Array:
    return np.full(_check_shape("constant", shape), value, np.float32)


def constant(value: float) -> Initializer:
    """All entries `value`."""
    value = _number("constant", "value", value, minimum=-_LARGEST, maximum=_LARGEST)
    return partial(_constant, value=value)


@_quiet
def _normal(key: Key, shape: Shape, *, std: float) -> Array:
    shape = _check_shape("normal", shape)
    return np.asarray(_generator(key).standard_normal(shape, np.float32) * np.float32(std))


def normal(std: float) -> Initializer:
    """N(0, std²)."""
    return partial(_normal, std=_number("normal", "std", std, minimum=0, maximum=_LARGEST))


def _uniform(key: Key, shape: Shape, *, limit: float) -> Array:
    shape = _check_shape("uniform", shape)
    return np.asarray((_generator(key).random(shape, np.float32) * 2 - 1) * np.float32(limit))


def uniform(limit: float) -> Initializer:
    """U(-limit, limit)."""
    return partial(_uniform, limit=_number("uniform", "limit", limit, minimum=0, maximum=_LARGEST))


def _fans(where: str, shape: Shape) -> tuple[int, int]:
    """(fan in, fan out) of a dense weight (in, out) or of a kernel (out, in, kh, kw)."""
    shape = _check_shape(where, shape)
    if len(shape) < 2:
        expected = "(in, out) or (out, in, kh, kw)"
        raise ValueError(f"{where}: shape {shape} has no fans, expected {expected}")
    if len(shape) == 2:
        return shape[0], shape[1]
    window = math.prod(shape[2:])
    return shape[1] * window, shape[0] * window


def xavier_normal(key: Key, shape: Shape) -> Array:
    """N(0, 2 / (fan in + fan out)) (Glorot and Bengio 2010)."""
    return _normal(key, shape, std=math.sqrt(2 / sum(_fans("xavier_normal", shape))))


def xavier_uniform(key: Key, shape: Shape) -> Array:
    """U(-limit, limit) with limit² = 6 / (fan in + fan out) (Glorot and Bengio 2010)."""
    return _uniform(key, shape, limit=math.sqrt(6 / sum(_fans("xavier_uniform", shape))))


def he_normal(key: Key, shape: Shape) -> Array:
    """N(0, 2 / fan in) (He et al. 2015)."""
    return _normal(key, shape, std=math.sqrt(2 / _fans("he_normal", shape)[0]))


def he_uniform(key: Key, shape: Shape) -> Array:
    """U(-limit, limit) with limit² = 6 / fan in (He et al. 2015)."""
    return _uniform(key, shape, limit=math.sqrt(6 / _fans("he_uniform", shape)[0]))


def orthogonal(key: Key, shape: Shape) -> Array:
    """A random matrix Q with QᵀQ = I, or QQᵀ = I where it is wider than high (Saxe et al. 2014).

    A kernel (out, in, kh, kw) counts as the matrix (out, in·kh·kw).
    """
    fan_in, fan_out = _fans("orthogonal", shape)
    rows, columns = (fan_in, fan_out) if len(shape) == 2 else (shape[0], fan_in)
    normals = _generator(key).standard_normal((max(rows, columns), min(rows, columns)))
    q, r = np.linalg.qr(normals)
    q *= np.where(np.diag(r) < 0, -1, 1)  # without this Q is not uniformly distributed
    return (q if rows >= columns else q.T).astype(np.float32).reshape(shape)


# === Layers: what they are, and what they take ==================================================

Gradients = tuple[Data, Tree]  # dx and grads
Init = Callable[[Key, Shapes], tuple[Tree, Shapes]]
Forward = Callable[[Tree, Data], tuple[Data, Any]]
Backward = Callable[[Tree, Any, Data], Gradients]


class Differentiable(Protocol):
    """Anything with a forward and a backward."""

    @property
    def forward(self) -> Forward: ...
    @property
    def backward(self) -> Backward: ...


class LayerLike(Differentiable, Protocol):
    """Anything with the three functions of a layer."""

    @property
    def init(self) -> Init: ...


class _Functions(NamedTuple):
    init: Init
    forward: Forward
    backward: Backward


class Layer(_Functions):
    """A layer: three pure functions over params, a dict of arrays.

        init(key, shape) -> (params, output shape)      without the batch axis
        forward(params, x) -> (y, cache)
        backward(params, cache, dy) -> (dx, grads)

    Any object with these functions is as good; they are called with arguments by position. dx has
    the structure of x, with None for whole numbers; grads hold what is trained, and may be None for
    a layer without params; `backward` needs no key. `check_gradients` finds whatever is not so.

    Where dx is not needed, as in the first layer of a network being trained, `backward` is called
    with `need_dx=False` and may return None for dx, which saves a third of that layer's work. If it
    does not take this keyword, a TypeError says so, and it is called again without.
    """

    _code: str | None = None  # the call that made it

    def __repr__(self) -> str:
        return self._code or f"Layer({', '.join(map(_as_code, self))})"


def _as_code(value: Any) -> str:
    """A value as one would write it: functions by their names, `normal(0.02)` for its partial."""
    if not isinstance(value, partial):
        return getattr(value, "__name__", None) or repr(value)
    name, arguments = _as_code(value.func), [_as_code(argument) for argument in value.args]
    if name.startswith("_"):  # one of the initializers above
        arguments += map(_as_code, value.keywords.values())
        return f"{name[1:]}({', '.join(arguments)})"
    arguments += [f"{key}={_as_code(argument)}" for key, argument in value.keywords.items()]
    return f"partial({', '.join([name, *arguments])})"


def _constructor(function: _Function) -> _Function:
    """A decorator: the repr of each layer that `function` returns is the call that made it."""

    @wraps(function)
    def construct(*arguments: Any, **options: Any) -> Layer:
        layer: Layer = function(*arguments, **options)
        written = [_as_code(value) for value in arguments]
        written += [f"{name}={_as_code(value)}" for name, value in options.items()]
        layer._code = f"{function.__name__}({', '.join(written)})"
        return layer

    return cast(_Function, construct)


def _layer(*functions: Callable[..., Any], **options: Any) -> Layer:
    """A layer of these three functions, each given those of the options that it takes."""
    bound = []
    for function in functions:
        takes = inspect.signature(function).parameters
        all_of_them = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
        own = {name: options[name] for name in options if all_of_them or name in takes}
        bound.append(partial(function, **own) if own else function)
    return Layer(*bound)


_WORDS = {"in": "features", "out": "outputs", "C": "channels", "D": "features"}  # in messages


def _bind(axes: Sequence[str], shape: Shape) -> dict[str, Any] | None:
    """{axis: size}, a tuple of sizes for "..."; None where `shape` does not have these axes."""
    sizes: tuple[Any, ...] = shape
    if "..." in axes:
        start = axes.index("...")
        stop = len(shape) - (len(axes) - start - 1)
        if stop < start:
            return None
        sizes = (*shape[:start], shape[start:stop], *shape[stop:])
    if len(axes) != len(sizes):
        return None
    bound: dict[str, Any] = {}
    for axis, size in zip(axes, sizes, strict=True):
        times, _, name = axis.rpartition("·")
        size, rest = divmod(size, int(times)) if times else (size, 0)
        if rest or (size == 0 and name != "N") or bound.setdefault(name, size) != size:
            return None
    return bound


def _axes(*forms: Sequence[str]) -> str:
    """Axes as one writes a shape: (N, ..., in)."""
    return " or ".join(f"({', '.join(axes)}{',' * (len(axes) == 1)})" for axes in forms)


def _check_names(where: str, params: Any, known: Iterable[str]) -> None:
    """Refuse params that are not a dict or have an entry of another layer."""
    _check_kind(where, "params", params, dict)
    unknown = sorted(map(str, params.keys() - known - {"key"}))
    if unknown:
        expected = sorted(known)
        raise ValueError(f"{where}: params have unknown entries {unknown}, expected {expected}")


def _entry(where: str, tree: Tree, name: str, dtype: np.dtype[Any] | None = None) -> Array:
    """The array `tree[name]`, in `dtype` if one is given."""
    if name not in tree:
        _check_kind(where, parent := name.rpartition("/")[0], tree.get(parent, {}), dict)
        raise ValueError(f"{where}: there is no entry {name!r} in {_names(tree)}")
    _check_array(where, name, tree[name])
    return tree[name].astype(dtype or tree[name].dtype, copy=False)


def _own_cache(where: str, cache: Any, entries: Sequence[str]) -> Tree:
    """A cache with these arrays, in the dtype of the first; ValueError for another layer's."""
    if not isinstance(cache, dict) or not cache.keys() >= set(entries):
        raise ValueError(f"{where}: the cache is not its own, it holds {_names(cache)}")
    _check_array(where, entries[0], cache[entries[0]])
    dtype = cache[entries[0]].dtype
    return {**cache, **{name: _entry(where, cache, name, dtype) for name in entries}}


_IMAGE = ["N", "C", "H", "W"]


def _axes_hint(forms: Sequence[Sequence[str]], x: Shape) -> str:
    """What to do about an x that does not have the axes of any of the forms."""
    if 0 in x[1:]:
        return "; only N may be empty"
    if forms != [_IMAGE] or len(x) not in (2, 3):
        return ""
    if len(x) == 2:
        return "; a single gray image needs x[None, None]"
    single = ", a single image x[None]" if x[0] in (1, 3) else ""
    return f"; gray images need a channel axis, x[:, None]{single}"


def _size_hint(x: Shape, takes: int) -> str:
    """What to do about an x whose axes are as long as others than those that W takes."""
    if len(x) == 4 and x[3] == takes:
        return "; channels come before height and width, see x.transpose(0, 3, 1, 2)"
    return "; a flatten() before it would fit" if math.prod(x[1:]) == takes else ""


def _check_axes(form: _Form, layer: str, what: str, x: Shape, *entries: Shape | None) -> Shape:
    """The shape of y; ValueError where shapes do not fit the form or each other."""
    bound = [(axes, sizes) for axes in form.x if (sizes := _bind(axes, x)) is not None]
    if not bound:
        got = f"got shape {x}{_axes_hint(form.x, x)}"
        raise ValueError(f"{layer}: {what} must be {_axes(*form.x)}, {got}")
    axes, sizes = bound[0]
    owners = dict.fromkeys(sizes, what)
    for (name, own_axes), shape in zip(form.entries.items(), entries, strict=True):
        if shape is None:
            continue
        if (own := _bind(own_axes, shape)) is None:
            raise ValueError(f"{layer}: {name} must be {_axes(own_axes)}, got shape {shape}")
        for axis, size in own.items():
            if sizes.setdefault(axis, size) != size:
                has = f"{owners[axis]} has {sizes[axis]} {_WORDS.get(axis, axis)}"
                hint = _size_hint(x, size) if owners[axis] == what else ""
                raise ValueError(f"{layer}: {has}, but {name} takes {size}{hint}")
            owners.setdefault(axis, name)
    y: Shape = ()
    for axis in axes if form.y is None else form.y:
        y += sizes[axis] if axis == "..." else (sizes[axis],)
    return y


def _gradient(where: str, dy: Any, shape: Shape, dtype: np.dtype[Any]) -> Array:
    """dy in `dtype`; refused unless it has the shape of y."""
    if type(dy) is not np.ndarray or dy.dtype != dtype:
        _check_array(where, "dy", dy)
        dy = dy.astype(dtype, copy=False)
    if dy.shape != shape:
        raise ValueError(f"{where}: dy has shape {dy.shape}, but y has {shape}")
    return dy


class _Form:
    """The input, params and output of a layer as named axes, checked here for every layer.

    `_Form("N ... in", y="N ... out", W="in out", b_="out")`: x may have axes between its first and
    its last; the first axis of W is as long as the last of x; b may be missing, as the underscore
    says. Alternative forms of x are separated by "|". Without `y` it has the shape of x; with
    y="" the layer checks dy itself. Only N, the batch, and what "..." stands for may be empty. An
    axis "3·D" is three times as long as D, an entry "qkv/W" is params["qkv"]["W"], and x "whole: N"
    holds whole numbers: y then has the dtype of the first entry.
    """

    def __init__(self, x: str, *, y: str | None = None, **entries: str) -> None:
        self.kind = _WHOLE if x.startswith("whole: ") else _FLOATS
        self.x = [axes.split() for axes in x.removeprefix("whole: ").split("|")]
        self.y = None if y is None else y.split()
        self.entries = {name.rstrip("_"): axes.split() for name, axes in entries.items()}
        self.optional = {name.rstrip("_") for name in entries if name.endswith("_")}

    def shape(self, layer: str, shape: Any) -> Shape:
        """The shape of one sample, checked: where `init` begins."""
        shape = _check_shape(layer, shape)
        samples = [axes[1:] for axes in self.x]
        if all(_bind(axes, shape) is None for axes in samples):
            gray = self.x == [_IMAGE] and len(shape) == 2
            hint = f"; gray images have one channel, {(1, *shape)}" if gray else ""
            raise ValueError(f"{layer}: shape must be {_axes(*samples)}, got {shape}{hint}")
        return shape

    def checker(self, layer: str, what: str) -> Callable[[Any, Any], tuple[Tree, Shape, Any]]:
        """The function (params, x) -> (params in the dtype of y, its shape, dtype), if they fit."""
        # The same shapes recur at every step.
        check_axes = lru_cache(maxsize=256)(partial(_check_axes, self, layer, what))
        names, ndarray, characters = tuple(self.entries), np.ndarray, self.kind[1]
        nested, whole = any("/" in name for name in names), self.kind is _WHOLE

        def check(params: Any, x: Any) -> tuple[Tree, Shape, Any]:
            if type(x) is not ndarray or x.dtype.char not in characters:
                _check_array(layer, what, x, self.kind)
            if type(params) is not dict:
                _check_kind(layer, "params", params, dict)
            params = _flatten(layer, "params", params) if nested else params
            dtype = _entry(layer, params, names[0]).dtype if whole else x.dtype
            shapes, unknown = [x.shape], len(params) - ("key" in params)
            for name in names:
                array = params.get(name)
                if type(array) is not ndarray or array.dtype != dtype:
                    if name in self.optional and name not in params:
                        shapes.append(None)
                        continue
                    array = _entry(layer, params, name, dtype)
                    params = {**params, name: array}
                shapes.append(array.shape)
                unknown -= 1
            if unknown:
                _check_names(layer, params, self.entries)
            return tree_unflatten(params) if nested else params, check_axes(*shapes), dtype

        return check

    def forward(self, function: _Function) -> _Function:
        """A decorator: function(params, x), checked and without NumPy's warnings."""
        check = self.checker(function.__name__.removesuffix("_forward"), "x")

        @wraps(function)
        def forward(params: Tree, x: Array, **options: Any) -> Any:
            if not _QUIET.get():
                return _call_quietly(forward, params, x, **options)
            return function(check(params, x)[0], x, **options)

        forward.form = self  # type: ignore[attr-defined]  # for `shape_init`
        return cast(_Function, forward)

    def backward(self, *entries: str) -> Callable[[_Function], _Function]:
        """A decorator: function(params, cache, dy), checked and without NumPy's warnings.

        The cache is x (or y, of the same shape); with `entries`, a dict of these arrays at least,
        the first of them in the shape of x.
        """

        def decorate(function: _Function) -> _Function:
            layer = function.__name__.removesuffix("_backward")
            check = self.checker(layer, entries[0] if entries else "cache")

            @wraps(function)
            def backward(params: Tree, cache: Any, dy: Array, **options: Any) -> Any:
                if not _QUIET.get():
                    return _call_quietly(backward, params, cache, dy, **options)
                if entries:
                    cache = _own_cache(layer, cache, entries)
                x = cache[entries[0]] if entries else cache
                params, shape, dtype = check(params, x)
                if self.y != []:
                    dy = _gradient(layer, dy, shape, dtype)
                return function(params, cache, dy, **options)

            return cast(_Function, backward)

        return decorate


_ANY = _Form("N ...")  # what element-wise layers take
_CLASSES = _Form("N ... classes")
_POOLED = _Form("N C H W", y="")


# --- dense ---

_LINEAR = _Form("N ... in", y="N ... out", W="in out", b_="out")


def _weight_options(where: str, out: Any, init: Any, bias: Any) -> dict[str, Any]:
    """The options of layers with weights, checked."""
    _check_kind(where, "bias", bias, bool)
    _check_kind(where, "init", init, Callable)
    return {"out": _whole(where, "out", out, 1), "init": init, "bias": bias}


def _weights(where: str, key: Key, init: Initializer, shape: Shape, out: int, bias: bool) -> Tree:
    """W of `shape` from `init`; b (out,) of zeros if there are biases."""
    W = init(fold_key(key, 0), shape)
    _check_array(where, "what init returned", W)
    if W.shape != shape:
        raise ValueError(f"{where}: init returned shape {W.shape}, expected {shape}")
    return {"W": W, "b": np.zeros(out, np.float32)} if bias else {"W": W}


def linear_init(key: Key, shape: Shape, *, out: int, **weights: Any) -> tuple[Tree, Shape]:
    """W (in, out) from `init`, b (out,) of zeros; shape (..., in) becomes (..., out)."""
    *leading, features = _LINEAR.shape("linear", shape)
    return _weights("linear", key, shape=(features, out), out=out, **weights), (*leading, out)


@_LINEAR.forward
def linear_forward(params: Tree, x: Array) -> tuple[Array, Array]:
    """y = x W + b, for x (N, ..., in) and y (N, ..., out)."""
    y = (x if x.ndim == 2 else x.reshape(-1, x.shape[-1])) @ params["W"]  # one product, not many
    if "b" in params:
        y += params["b"]
    return (y if x.ndim == 2 else y.reshape(*x.shape[:-1], y.shape[1])), x


@_LINEAR.backward()
def linear_backward(params: Tree, cache: Array, dy: Array, *, need_dx: bool = True) -> Gradients:
    """dx = dy Wᵀ, dW = xᵀ dy, db = Σ dy over all axes but the last."""
    x = cache.reshape(-1, cache.shape[-1])
    rows = dy.reshape(-1, dy.shape[-1])
    product = np.dot if len(x) == 1 else np.matmul  # which takes six times as long for one row
    grads = {"W": product(x.T, rows)}
    if "b" in params:
        grads["b"] = rows.sum(axis=0)
    return ((rows @ params["W"].T).reshape(cache.shape) if need_dx else None), grads


@_constructor
def linear(out: int, *, init: Initializer = he_normal, bias: bool = True) -> Layer:
    """Fully connected layer with `out` units: y = x W + b. Any number of leading axes."""
    options = _weight_options("linear", out, init, bias)
    return _layer(linear_init, linear_forward, linear_backward, **options)


# --- shape ---

_FLATTEN = _Form("N ...", y="")


def identity_init(key: Key, shape: Shape) -> tuple[Tree, Shape]:
    """No params, and the shape is unchanged."""
    return {}, _ANY.shape("identity", shape)


def shape_init(key: Key, shape: Shape, *, forward: Any) -> tuple[Tree, Shape]:
    """No params; the shape is that of forward's y for one x of zeros."""
    function = getattr(forward, "func", forward)
    shape = function.form.shape(function.__name__.removesuffix("_forward"), shape)
    return {}, forward({}, np.zeros((1, *shape), np.float32))[0].shape[1:]


def _without_params(forward: Any, backward: Any, **options: Any) -> Layer:
    """A layer without params whose forward and backward take these options."""
    layer = _layer(shape_init, forward, backward, **options)
    return Layer(partial(shape_init, forward=layer.forward), *layer[1:])


@_ANY.forward
def identity_forward(params: Tree, x: Array) -> tuple[Array, Array]:
    """y = x."""
    return x, x


@_ANY.backward()
def identity_backward(params: Tree, cache: Array, dy: Array) -> Gradients:
    """dx = dy."""
    return dy, {}


@_constructor
def identity() -> Layer:
    """y = x, any shape."""
    return Layer(identity_init, identity_forward, identity_backward)


@_FLATTEN.forward
def flatten_forward(params: Tree, x: Array) -> tuple[Array, Array]:
    """y (N, a·b·...) holds the entries of x (N, a, b, ...) in C order."""
    # The batch last, so that rows (H, C, W, N) of a convolution are copied in long stretches.
    return np.moveaxis(x, 0, -1).reshape(math.prod(x.shape[1:]), len(x)).T, x


@_FLATTEN.backward()
def flatten_backward(params: Tree, cache: Array, dy: Array) -> Gradients:
    """dx is dy in the shape of x."""
    shape = len(cache), math.prod(cache.shape[1:])
    return _gradient("flatten", dy, shape, cache.dtype).reshape(cache.shape), {}


@_constructor
def flatten() -> Layer:
    """(N, a, b, ...) -> (N, a·b·...), as PyTorch's Flatten."""
    return _without_params(flatten_forward, flatten_backward)


def _reshaped(x: Array, size: Shape) -> Shape:
    if math.prod(x.shape[1:]) != math.prod(size):
        raise ValueError(f"reshape: a sample of shape {x.shape[1:]} does not fit in {size}")
    return (len(x), *size)


@_FLATTEN.forward
def reshape_forward(params: Tree, x: Array, *, size: Shape) -> tuple[Array, Array]:
    """y (N, *size) holds the entries of x (N, ...) in C order."""
    _reshaped(x, size)
    return np.moveaxis(np.moveaxis(x, 0, -1).reshape(*size, len(x)), -1, 0), x


@_FLATTEN.backward()
def reshape_backward(params: Tree, cache: Array, dy: Array, *, size: Shape) -> Gradients:
    """dx is dy in the shape of x."""
    dy = _gradient("reshape", dy, _reshaped(cache, size), cache.dtype)
    return dy.reshape(cache.shape), {}


@_constructor
def reshape(*shape: int) -> Layer:
    """(N, ...) -> (N, *shape) of as many values, as PyTorch's Unflatten: `reshape(64, 7, 7)`."""
    size = _check_shape("reshape", shape)
    return _without_params(reshape_forward, reshape_backward, size=size)


@_ANY.forward
def permute_forward(params: Tree, x: Array, *, axes: Shape) -> tuple[Array, Array]:
    """y: its axis i, the batch not counted, is axis axes[i] of x (N, ...)."""
    if x.ndim != len(axes) + 1:
        raise ValueError(f"permute: a sample of shape {x.shape[1:]} does not have axes {axes}")
    y = x.transpose(0, *(axis + 1 for axis in axes))
    return y, y


@_ANY.backward()
def permute_backward(params: Tree, cache: Array, dy: Array, *, axes: Shape) -> Gradients:
    """dx is dy with its axes in the order of x."""
    return dy.transpose(0, *(np.argsort(axes) + 1)), {}


@_constructor
def permute(*axes: int) -> Layer:
    """The axes in another order, the batch not counted: `permute(1, 0)` swaps time and features."""
    order = tuple(_whole("permute", "every axis", axis, 0) for axis in axes)
    if sorted(order) != list(range(len(order))):
        raise ValueError(f"permute: axes must be 0, 1, ... in some order, got {order}")
    return _without_params(permute_forward, permute_backward, axes=order)


_LAST = _Form("N T ...", y="N ...")


@_LAST.forward
def last_forward(params: Tree, x: Array) -> tuple[Array, Array]:
    """y (N, ...) = x[:, -1], for x (N, T, ...)."""
    return x[:, -1], x


@_LAST.backward()
def last_backward(params: Tree, cache: Array, dy: Array) -> Gradients:
    """dx is dy at the last step, and 0 at all others."""
    dx = np.zeros_like(cache)
    dx[:, -1] = dy
    return dx, {}


@_constructor
def last() -> Layer:
    """The last step of a sequence, (N, T, ...) -> (N, ...)."""
    return _without_params(last_forward, last_backward)


# --- activations: element by element, any shape ---


@_ANY.forward
def relu_forward(params: Tree, x: Array) -> tuple[Array, Array]:
    """y = max(x, 0)."""
    y = x.clip(0, np.inf)  # NumPy has no vector code for np.maximum(x, 0)
    return y, y


@_ANY.backward()
def relu_backward(params: Tree, cache: Array, dy: Array) -> Gradients:
    """dx = dy where y > 0, else 0."""
    dx = (cache > 0).astype(cache.dtype)
    dx *= dy
    return dx, {}


@_constructor
def relu() -> Layer:
    """max(x, 0); its gradient at 0 is 0."""
    return _without_params(relu_forward, relu_backward)


@_ANY.forward
def leaky_relu_forward(params: Tree, x: Array, *, slope: float) -> tuple[Array, Array]:
    """y = x where x > 0, else slope · x."""
    return np.where(x > 0, x, slope * x), x


@_ANY.backward()
def leaky_relu_backward(params: Tree, cache: Array, dy: Array, *, slope: float) -> Gradients:
    """dx = dy where x > 0, else slope · dy."""
    return np.where(cache > 0, dy, slope * dy), {}


@_constructor
def leaky_relu(slope: float = 0.01) -> Layer:
    """x where x > 0, else slope · x (Maas et al. 2013). ValueError for a slope not finite."""
    slope = _number("leaky_relu", "slope", slope)
    return _without_params(leaky_relu_forward, leaky_relu_backward, slope=slope)


@_ANY.forward
def elu_forward(params: Tree, x: Array, *, alpha: float) -> tuple[Array, Array]:
    """y = x where x > 0, else alpha · (exp(x) - 1)."""
    y = np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))
    return y, y


@_ANY.backward()
def elu_backward(params: Tree, cache: Array, dy: Array, *, alpha: float) -> Gradients:
    """dx = dy where y > 0, else dy · alpha · exp(x) = dy · (y + alpha)."""
    return np.where(cache > 0, dy, dy * (cache + alpha)), {}


@_constructor
def elu(alpha: float = 1.0) -> Layer:
    """x where x > 0, else alpha · (exp(x) - 1), for alpha > 0 (Clevert et al. 2016)."""
    alpha = _number("elu", "alpha", alpha, above=0)
    return _without_params(elu_forward, elu_backward, alpha=alpha)


def _sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), written so that no exponent is positive and nothing overflows."""
    return np.exp(np.minimum(x, 0)) / (1 + np.exp(-np.abs(x)))


@_ANY.forward
def sigmoid_forward(params: Tree, x: Array) -> tuple[Array, Array]:
    """y = 1 / (1 + exp(-x))."""
    y = _sigmoid(x)
    return y, y


@_ANY.backward()
def sigmoid_backward(params: Tree, cache: Array, dy: Array) -> Gradients:
    """dx = dy · y · (1 - y)."""
    return dy * (cache * (1 - cache)), {}


@_constructor
def sigmoid() -> Layer:
    """1 / (1 + exp(-x))."""
    return _without_params(sigmoid_forward, sigmoid_backward)


@_ANY.forward
def tanh_forward(params: Tree, x: Array) -> tuple[Array, Array]:
    """y = tanh(x)."""
    y = np.tanh(x)
    return y, y


@_ANY.backward()
def tanh_backward(params: Tree, cache: Array, dy: Array) -> Gradients:
    """dx = dy · (1 - y²)."""
    return dy * (1 - cache * cache), {}


@_constructor
def tanh() -> Layer:
    """tanh(x)."""
    return _without_params(tanh_forward, tanh_backward)


@_ANY.forward
def softplus_forward(params: Tree, x: Array) -> tuple[Array, Array]:
    """y = log(1 + exp(x))."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))), x


@_ANY.backward()
def softplus_backward(params: Tree, cache: Array, dy: Array) -> Gradients:
    """dx = dy · sigmoid(x)."""
    return dy * _sigmoid(cache), {}


@_constructor
def softplus() -> Layer:
    """log(1 + exp(x)), a smooth relu."""
    return _without_params(softplus_forward, softplus_backward)


_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


@_ANY.forward
def gelu_forward(params: Tree, x: Array, *, exact: bool) -> tuple[Array, Tree]:
    """y = x · Φ(x), Φ(x) = erfc(-x/√2)/2 or about (1 + tanh(sqrt(2/π) · (x + 0.044715 x³)))/2."""
    if exact:  # number by number: NumPy has no erfc, but C has
        values = map(math.erfc, (-math.sqrt(0.5) * x).ravel().tolist())
        phi = 0.5 * np.fromiter(values, x.dtype, x.size).reshape(x.shape)
    else:
        z = np.clip(x, -10, 10)  # the tanh is ±1 from there on, and z³ does not overflow
        phi = 0.5 + 0.5 * np.tanh(_SQRT_2_OVER_PI * z * (1 + 0.044715 * z * z))
    return np.maximum(x, -40) * phi, {"x": x, "phi": phi}


@_ANY.backward("x", "phi")
def gelu_backward(params: Tree, cache: Tree, dy: Array, *, exact: bool) -> Gradients:
    """dx = dy · (Φ + x Φ'), Φ' = exp(-x²/2) / sqrt(2π) if exact.

    In the tanh form Φ' = 2 Φ (1 - Φ) · sqrt(2/π) · (1 + 3 · 0.044715 x²).
    """
    x, phi = np.clip(cache["x"], -40, 40), cache["phi"]
    if exact:
        slope = 0.5 * _SQRT_2_OVER_PI * np.exp(-0.5 * x * x)
    else:
        slope = phi * (1 - phi) * (2 * _SQRT_2_OVER_PI * (1 + 3 * 0.044715 * x * x))
    return dy * (phi + x * slope), {}


@_constructor
def gelu(*, exact: bool = False) -> Layer:
    """x · Φ(x) (Hendrycks and Gimpel 2016), or its tanh form, which is 20 times faster."""
    _check_kind("gelu", "exact", exact, bool)
    return _without_params(gelu_forward, gelu_backward, exact=exact)


@_ANY.forward
def silu_forward(params: Tree, x: Array) -> tuple[Array, Array]:
    """y = x · sigmoid(x)."""
    return x * _sigmoid(x), x


@_ANY.backward()
def silu_backward(params: Tree, cache: Array, dy: Array) -> Gradients:
    """dx = dy · s · (1 + x · (1 - s)), s = sigmoid(x)."""
    x, s = cache, _sigmoid(cache)
    return dy * (s * (1 + x * _sigmoid(-x))), {}


@_constructor
def silu() -> Layer:
    """x · sigmoid(x), also called swish (Hendrycks and Gimpel 2016)."""
    return _without_params(silu_forward, silu_backward)


@_CLASSES.forward
def softmax_forward(params: Tree, x: Array) -> tuple[Array, Array]:
    """y = exp(x) / Σ exp(x) over the last axis."""
    y = np.exp(x - x.max(axis=-1, keepdims=True))
    y /= y.sum(axis=-1, keepdims=True)
    return y, y


@_CLASSES.backward()
def softmax_backward(params: Tree, cache: Array, dy: Array) -> Gradients:
    """dx = y · (dy - Σ dy · y)."""
    return cache * (dy - (dy * cache).sum(axis=-1, keepdims=True)), {}


@_constructor
def softmax() -> Layer:
    """exp(x) / Σ exp(x) over the last axis. Do not put it before `softmax_cross_entropy`."""
    return _without_params(softmax_forward, softmax_backward)


@_CLASSES.forward
def log_softmax_forward(params: Tree, x: Array) -> tuple[Array, Array]:
    """y = x - log Σ exp(x) over the last axis."""
    y = x - x.max(axis=-1, keepdims=True)
    y -= np.log(np.exp(y).sum(axis=-1, keepdims=True))
    return y, y


@_CLASSES.backward()
def log_softmax_backward(params: Tree, cache: Array, dy: Array) -> Gradients:
    """dx = dy - exp(y) · Σ dy."""
    return dy - np.exp(cache) * dy.sum(axis=-1, keepdims=True), {}


@_constructor
def log_softmax() -> Layer:
    """x - log Σ exp(x) over the last axis."""
    return _without_params(log_softmax_forward, log_softmax_backward)


# --- regularizers ---


@_ANY.forward
def dropout_forward(params: Tree, x: Array, *, rate: float) -> tuple[Array, Tree]:
    """y = x · mask, mask 0 with probability rate, else 1 / (1 - rate), from params["key"].

    Without a key mask is 1 everywhere.
    """
    if "key" not in params:
        return x, {"mask": np.broadcast_to(x.dtype.type(1), x.shape)}
    mask = (_generator(params["key"]).random(x.shape, np.float32) >= rate).astype(x.dtype)
    mask *= 1 / (1 - rate)
    return x * mask, {"mask": mask}


@_ANY.backward("mask")
def dropout_backward(params: Tree, cache: Tree, dy: Array) -> Gradients:
    """dx = dy · mask."""
    return dy * cache["mask"], {}


@_constructor
def dropout(rate: float) -> Layer:
    """Drops each entry with probability `rate` while training and scales up the rest.

    At inference it is the identity ("inverted" dropout; Srivastava et al. 2014). ValueError for a
    rate outside [0, 1).
    """
    rate = _number("dropout", "rate", rate, minimum=0, below=1)
    return _without_params(dropout_forward, dropout_backward, rate=rate)


# --- normalization ---

_BATCH_NORM = _Form("N C | N C H W", gamma="C", beta="C", mean="C", var="C")


def batch_norm_init(key: Key, shape: Shape) -> tuple[Tree, Shape]:
    """gamma 1, beta 0, mean 0 and var 1, each (C,), for shape (C,) or (C, H, W)."""
    shape = _BATCH_NORM.shape("batch_norm", shape)
    one, zero = np.ones(shape[0], np.float32), np.zeros(shape[0], np.float32)
    return {"gamma": one, "beta": zero, "mean": zero.copy(), "var": one.copy()}, shape


def _channel_sums(*factors: Array) -> Array:
    """Σ of the product of one or two arrays (N, C, ...), over all axes but 1."""
    axes = "nchwdefgijklm"[: factors[0].ndim]
    return np.einsum(",".join([axes] * len(factors)) + "->c", *factors)


def _per_channel(vector: Array, x: Array) -> Array:
    """A vector (C,) in a shape that broadcasts with x (N, C, ...).

    For images it is repeated along a row of pixels: broadcasting single values is twice as slow.
    """
    if x.ndim != 4:
        return vector if x.ndim == 2 else vector.reshape(-1, *[1] * (x.ndim - 2))
    N, C, _, W = x.shape
    return np.repeat(vector, W * N).reshape(C, 1, W, N).transpose(3, 0, 1, 2)


@_BATCH_NORM.forward
def batch_norm_forward(params: Tree, x: Array, *, eps: float) -> tuple[Array, Tree]:
    """y = gamma · (x - mean) / sqrt(var + eps) + beta, for x (N, C) or (N, C, H, W).

    With params["key"], mean and var (biased) are those of the batch over all axes but C; without
    one they are params["mean"] and params["var"]. The cache holds under "statistics" the
    values towards which `update_statistics` moves params["mean"] and params["var"], and as "count"
    of how many values they are, 0 without a key.
    """
    mean, var, count, unbias = params["mean"], params["var"], 0, 1.0
    if "key" in params:
        count = x.size // x.shape[1]
        if count < 2:
            raise ValueError(f"batch_norm: training needs 2 values per channel, got {count}")
        mean, unbias = _channel_sums(x) / count, count / (count - 1)
    centered = x - _per_channel(mean, x)
    if count:
        var = _channel_sums(centered, centered) / count
    cache = {"statistics": {"mean": mean, "var": var * unbias}, "count": np.array(count)}
    inverse_std = 1 / np.sqrt(var + eps)
    if x.dtype == np.float32 and not math.isfinite(var @ inverse_std):  # sums that overflowed
        y, cache = batch_norm_forward(params, x.astype(np.float64), eps=eps)
        as_float32 = partial(np.asarray, dtype=np.float32)
        return as_float32(y), {**tree_map(as_float32, cache), "count": cache["count"]}
    y = centered * _per_channel(params["gamma"] * inverse_std, x)
    y += _per_channel(params["beta"], x)
    return y, {**cache, "centered": centered, "inverse_std": inverse_std}


@_BATCH_NORM.backward("centered", "inverse_std")
def batch_norm_backward(params: Tree, cache: Tree, dy: Array) -> Gradients:
    """dbeta = Σ dy, dgamma = Σ dy · x̂, dx = gamma/σ · (dy - mean(dy) - x̂ · mean(dy · x̂)).

    x̂ is the normalized x; sums and means are over all axes but C. At inference mean and var are
    constants, and dx = gamma/σ · dy.
    """
    centered, inverse_std = cache["centered"], cache["inverse_std"]
    dbeta = _channel_sums(dy)
    dgamma = _channel_sums(dy, centered) * inverse_std
    scale = params["gamma"] * inverse_std
    dx: Array = dy * _per_channel(scale, dy)
    if count := int(cache.get("count", 0)):
        dx -= centered * _per_channel(scale * inverse_std * dgamma / count, dy)
        dx -= _per_channel(scale * dbeta / count, dy)
    return dx, {"gamma": dgamma, "beta": dbeta}


@_constructor
def batch_norm(*, eps: float = 1e-5) -> Layer:
    """Normalizes each channel over the batch (Ioffe and Szegedy 2015), as PyTorch does.

    Its running statistics params["mean"] and params["var"] are updated by `update_statistics`.
    ValueError while training on fewer than two values per channel.
    """
    eps = _number("batch_norm", "eps", eps, above=0)
    return _layer(batch_norm_init, batch_norm_forward, batch_norm_backward, eps=eps)


def _parts(cache: Any) -> Tree:
    """The parts of a cache by name; those of a tuple or list have names that no params have."""
    if isinstance(cache, (tuple, list)):
        return {f"[{position}]": part for position, part in enumerate(cache)}
    return cache if isinstance(cache, dict) else {}


def _statistics(params: Any, cache: Any, path: str = "", lost: bool = False) -> Iterator[Any]:
    """(path in params, value in this batch, whether in training mode) of all running statistics."""
    parts = _parts(cache)
    for name, part in parts.items():
        if name == "statistics" and isinstance(part, dict):
            for own, value in part.items():
                if lost or own in params:  # a layer may list what is none of its params
                    yield path + own, value, bool(np.any(parts.get("count", True)))
        elif isinstance(params.get(name), dict):
            yield from _statistics(params[name], part, f"{path}{name}/")
        else:  # a tuple, perhaps, of a child that has the same params
            yield from _statistics(params, part, path, lost=True)


def _replace(tree: Tree, path: str, leaf: Any) -> Tree:
    name, _, rest = path.partition("/")
    return {**tree, name: _replace(tree[name], rest, leaf) if rest else leaf}


@_quiet
def update_statistics(params: Tree, cache: Any, momentum: float = 0.1) -> Tree:
    """params with updated running statistics: s <- s + momentum · (s of the batch - s).

    `cache` is that of the forward pass in training mode. Any layer may take part: what its cache
    holds under "statistics" are the batch's values for the params of the same names, which are
    not trained. The variance is the unbiased one, as PyTorch keeps it. A combinator of your own
    keeps the cache of each child under the name of the child's params.
    ValueError for a momentum outside [0, 1], statistics that params lack, and where nothing was in
    training mode: a "count" of 0 beside all statistics. TypeError for what is no cache.
    """
    where = "update_statistics"
    momentum = _number(where, "momentum", momentum, minimum=0, maximum=1)
    flat = _flatten(where, "params", params)
    if not isinstance(cache, (dict, np.ndarray, tuple, list)):
        raise TypeError(f"{where}: cache must be the one that forward returned, got {_kind(cache)}")
    found = list(_statistics(params, cache))
    if found and not any(in_training for *_, in_training in found):
        raise ValueError(f"{where}: nothing was in training mode, see `training`")
    for path, batch, in_training in found:
        if path not in flat:
            raise ValueError(f"{where}: the cache has statistics of {path!r}, which params lack")
        if in_training:
            running, name = flat[path], path.split("/")[-1]
            _check_array(where, name, running)
            _check_numbers(where, name, batch)
            if batch.shape != running.shape:
                raise ValueError(f"{where}: {name} is {_kind(running)}, got {_kind(batch)}")
            flat[path] = np.asarray(running + momentum * (batch - running), running.dtype)
            params = _replace(params, path, flat[path])
    return params


_LAYER_NORM = _Form("N ... in", gamma="in", beta="in")


def layer_norm_init(key: Key, shape: Shape) -> tuple[Tree, Shape]:
    """gamma 1 and beta 0, each (in,), for shape (..., in)."""
    shape = _LAYER_NORM.shape("layer_norm", shape)
    return {"gamma": np.ones(shape[-1], np.float32), "beta": np.zeros(shape[-1], np.float32)}, shape


@_LAYER_NORM.forward
def layer_norm_forward(params: Tree, x: Array, *, eps: float) -> tuple[Array, Tree]:
    """y = gamma · (x - mean) / sqrt(var + eps) + beta, mean and var (biased) over the last axis."""
    normalized = x - np.einsum("...i->...", x)[..., None] / x.shape[-1]  # quicker than mean
    squares = np.einsum("...i,...i->...", normalized, normalized)[..., None]
    inverse_std = 1 / np.sqrt(squares / x.shape[-1] + eps)
    normalized *= inverse_std
    y = normalized * params["gamma"] + params["beta"]
    return y, {"normalized": normalized, "inverse_std": inverse_std}


@_LAYER_NORM.backward("normalized", "inverse_std")
def layer_norm_backward(params: Tree, cache: Tree, dy: Array) -> Gradients:
    """dbeta = Σ dy, dgamma = Σ dy · x̂, dx = (g - mean(g) - x̂ · mean(g · x̂)) / σ, g = dy · gamma.

    x̂ is the normalized x; the sums are over all axes but the last, the means over the last.
    """
    normalized, D = cache["normalized"], dy.shape[-1]
    axes = tuple(range(dy.ndim - 1))
    grads = {"gamma": (dy * normalized).sum(axis=axes), "beta": dy.sum(axis=axes)}
    g = dy * params["gamma"]
    dx = g - np.einsum("...i->...", g)[..., None] / D
    dx -= normalized * (np.einsum("...i,...i->...", g, normalized)[..., None] / D)
    dx *= cache["inverse_std"]
    return dx, grads


@_constructor
def layer_norm(*, eps: float = 1e-5) -> Layer:
    """Normalizes each sample over its last axis (Ba et al. 2016), as PyTorch does."""
    eps = _number("layer_norm", "eps", eps, above=0)
    return _layer(layer_norm_init, layer_norm_forward, layer_norm_backward, eps=eps)


_GROUP_NORM = _Form("N C ...", gamma="C", beta="C")


def _check_groups(where: str, groups: int, channels: int, owner: str) -> None:
    if channels % groups:
        message = f"{groups} groups do not divide the {channels} channels of {owner}"
        raise ValueError(f"{where}: {message}")


def _by_group(x: Array, groups: int) -> tuple[Array, Shape]:
    """x (N, C, ...) seen as (N, groups, C/groups, ...), and the axes of a group."""
    N, C, *others = x.shape
    _check_groups("group_norm", groups, C, "x")
    return x.reshape(N, groups, C // groups, *others), tuple(range(2, x.ndim + 1))


def group_norm_init(key: Key, shape: Shape, *, groups: int) -> tuple[Tree, Shape]:
    """gamma 1 and beta 0, each (C,), for shape (C, ...)."""
    shape = _GROUP_NORM.shape("group_norm", shape)
    _by_group(np.empty((0, shape[0])), groups)  # for its check
    return {"gamma": np.ones(shape[0], np.float32), "beta": np.zeros(shape[0], np.float32)}, shape


@_GROUP_NORM.forward
def group_norm_forward(params: Tree, x: Array, *, groups: int, eps: float) -> tuple[Array, Tree]:
    """y = gamma · (x - mean) / sqrt(var + eps) + beta, mean and var (biased) over each group."""
    parts, axes = _by_group(x, groups)
    normalized = parts - parts.mean(axis=axes, keepdims=True)
    inverse_std = 1 / np.sqrt(np.square(normalized).mean(axis=axes, keepdims=True) + eps)
    normalized *= inverse_std
    normalized = normalized.reshape(x.shape)
    y = normalized * _per_channel(params["gamma"], x)
    y += _per_channel(params["beta"], x)
    return y, {"normalized": normalized, "inverse_std": inverse_std}


@_GROUP_NORM.backward("normalized", "inverse_std")
def group_norm_backward(params: Tree, cache: Tree, dy: Array, *, groups: int) -> Gradients:
    """As `layer_norm_backward`, with the sums over all axes but C, the means over each group."""
    grads = {"gamma": _channel_sums(dy, cache["normalized"]), "beta": _channel_sums(dy)}
    g, axes = _by_group(dy * _per_channel(params["gamma"], dy), groups)
    normalized, _ = _by_group(cache["normalized"], groups)
    dx = g - g.mean(axis=axes, keepdims=True)
    dx -= normalized * (g * normalized).mean(axis=axes, keepdims=True)
    dx *= cache["inverse_std"]
    return dx.reshape(dy.shape), grads


@_constructor
def group_norm(groups: int, *, eps: float = 1e-5) -> Layer:
    """Normalizes each sample (C, ...) over groups of its channels (Wu and He 2018), as PyTorch.

    ValueError for groups that do not divide C; `init` finds it from the shape.
    """
    groups = _whole("group_norm", "groups", groups, 1)
    eps = _number("group_norm", "eps", eps, above=0)
    return _layer(group_norm_init, group_norm_forward, group_norm_backward, groups=groups, eps=eps)


# --- recurrence and attention ---

_EMBEDDING = _Form("whole: N ...", y="N ... size", W="count size")


def embedding_init(key: Key, shape: Shape, *, W: Shape, init: Initializer) -> tuple[Tree, Shape]:
    """W (count, size) from `init`; shape (...) becomes (..., size)."""
    shape = _EMBEDDING.shape("embedding", shape)
    return _weights("embedding", key, init, W, W[1], bias=False), (*shape, W[1])


@_EMBEDDING.forward
def embedding_forward(params: Tree, x: Array) -> tuple[Array, Array]:
    """y[n, ...] = W[x[n, ...]], for whole numbers x (N, ...) and y (N, ..., size)."""
    W, (low, high) = params["W"], (x.min(), x.max()) if x.size else (0, 0)
    if low < 0 or high >= len(W):
        raise ValueError(f"embedding: x must be from 0 to {len(W) - 1}, got {low} to {high}")
    return W[x], x


@_EMBEDDING.backward()
def embedding_backward(params: Tree, cache: Array, dy: Array) -> tuple[None, Tree]:
    """dW[i] = Σ of dy where x is i; dx is None."""
    (count, size), x, rows = params["W"].shape, cache.ravel(), dy.reshape(cache.size, dy.shape[-1])
    dW, stays, order = np.zeros((count, size), dy.dtype), np.zeros(count, int), np.arange(len(x))
    dW[x], stays[x] = rows, order  # of rows for the same i, the last one
    others = stays[x] != order
    entries = np.add.outer(x[others].astype(np.intp) * size, np.arange(size))
    np.add.at(dW.ravel(), entries.ravel(), rows[others].ravel())  # entry by entry it is fastest
    return None, {"W": dW}


@_constructor
def embedding(count: int, size: int, *, init: Initializer = normal(1.0)) -> Layer:
    """A row of W (count, size) for each whole number: (N, ...) -> (N, ..., size).

    y and grads have the dtype of W. TypeError for floats, ValueError outside 0 to count - 1.
    """
    W = _whole("embedding", "count", count, 1), _whole("embedding", "size", size, 1)
    _check_kind("embedding", "init", init, Callable)
    return Layer(partial(embedding_init, W=W, init=init), embedding_forward, embedding_backward)


_POSITION_EMBEDDING = _Form("N T D", P="positions D")


def position_embedding_init(key: Key, shape: Shape, *, init: Initializer) -> tuple[Tree, Shape]:
    """P (T, D) from `init`, for shape (T, D)."""
    shape = _POSITION_EMBEDDING.shape("position_embedding", shape)
    return {"P": _weights("position_embedding", key, init, shape, 0, bias=False)["W"]}, shape


@_POSITION_EMBEDDING.forward
def position_embedding_forward(params: Tree, x: Array) -> tuple[Array, Array]:
    """y[n, t] = x[n, t] + P[t], for x (N, T, D)."""
    P, T = params["P"], x.shape[1]
    if len(P) < T:
        raise ValueError(f"position_embedding: x has {T} steps, but P takes at most {len(P)}")
    return x + P[:T], x


@_POSITION_EMBEDDING.backward()
def position_embedding_backward(params: Tree, cache: Array, dy: Array) -> tuple[Array, Tree]:
    """dx = dy, dP[t] = Σ dy[n, t]."""
    return dy, {"P": np.pad(dy.sum(axis=0), ((0, len(params["P"]) - dy.shape[1]), (0, 0)))}


@_constructor
def position_embedding(*, init: Initializer = normal(0.02)) -> Layer:
    """x (N, T, D) plus a trained vector for each position; ValueError beyond those of `init`."""
    _check_kind("position_embedding", "init", init, Callable)
    layer_init = partial(position_embedding_init, init=init)
    return Layer(layer_init, position_embedding_forward, position_embedding_backward)


_RNN = _Form("N T D", y="N T units", W="D units", U="units units", b="units")
_GRU = _Form("N T D", y="N T units", W="D 3·units", U="units 3·units", b="3·units", c="3·units")
_LSTM = _Form("N T D", y="N T units", W="D 4·units", U="units 4·units", b="4·units")


def recurrent_init(
    key: Key, shape: Shape, *, where: str, form: _Form, gates: int, units: int, init: Initializer
) -> tuple[Tree, Shape]:
    """W from `init`, U orthogonal gate by gate, biases 0, but 1 for lstm's forget gate."""
    T, D = form.shape(where, shape)
    params = {name: np.zeros(gates * units, np.float32) for name in form.entries}
    params["W"] = init(fold_key(key, 0), (D, gates * units))
    U = [orthogonal(fold_key(key, gate + 1), (units, units)) for gate in range(gates)]
    params["U"] = np.concatenate(U, axis=1)
    params["b"][units : 2 * units] = where == "lstm"  # forgets little at first (Gers et al. 2000)
    return params, (T, units)


def _recurrent_start(params: Tree, x: Array, order: int) -> tuple[Array, Array, Array, Array]:
    """y, its states h (T + 1, N, units), all 0; x W + b (gates, T, N, units) and U gate by gate."""
    (N, T, D), units = x.shape, len(params["U"])
    W, U, b = (params[name].reshape(-1, params["U"].shape[1] // units, units) for name in "WUb")
    a = x[:, ::order].swapaxes(0, 1).reshape(-1, D) @ W.swapaxes(0, 1)
    a += b.swapaxes(0, 1)
    h = np.zeros((T + 1, N, units), x.dtype)
    return h[1:].swapaxes(0, 1)[:, ::order], h, a.reshape(len(a), T, N, units), U.swapaxes(0, 1)


def _recurrent_gradients(
    params: Tree, cache: Tree, da: Array, du: Array, *, order: int, need_dx: bool = True
) -> tuple[Array | None, Tree]:
    """dx and grads from those of a = x[t] W + b and u = h[t-1] U + c, (T, N, gates·units)."""
    steps, of_x = cache["x"][:, ::order].swapaxes(0, 1), {"W": params["W"], "b": params["b"]}
    dx, of_x = linear_backward(of_x, steps, da, need_dx=need_dx)
    h, later = (array.reshape(-1, array.shape[2]) for array in (cache["h"][1:-1], du[1:]))
    grads = {"W": of_x["W"], "U": h.T @ later, "b": of_x["b"]}  # h[0] is 0
    if "c" in params:
        grads["c"] = du.sum(axis=(0, 1))
    return (None if dx is None else dx.swapaxes(0, 1)[:, ::order]), grads


def _recurrent(where: str, form: _Form, gates: int, units: Any, reverse: Any, *both: Any) -> Layer:
    _check_kind(where, "reverse", reverse, bool)
    units = _whole(where, "units", units, 1)
    own = {"where": where, "form": form, "gates": gates, "units": units, "init": xavier_uniform}
    init = partial(recurrent_init, **own)
    return Layer(init, *(partial(function, order=-1 if reverse else 1) for function in both))


@_RNN.forward
def rnn_forward(params: Tree, x: Array, *, order: int) -> tuple[Array, Tree]:
    """y[t] = h[t] = tanh(x[t] W + b + h[t-1] U); x is (N, T, D), y (N, T, units)."""
    y, h, (a,), (U,) = _recurrent_start(params, x, order)
    for t in range(len(a)):
        np.tanh(a[t] + h[t] @ U, out=h[t + 1])
    return y, {"x": x, "h": h}


@_RNN.backward("x", "h")
def rnn_backward(params: Tree, cache: Tree, dy: Array, **options: Any) -> tuple[Any, Tree]:
    """da[t] = (dy[t] + da[t+1] Uᵀ) · (1 - h[t]²)."""
    dy, da = dy[:, :: options["order"]].swapaxes(0, 1), 1 - np.square(cache["h"][1:])
    for t in reversed(range(len(da))):
        da[t] *= dy[t] + (da[t + 1] @ params["U"].T if t + 1 < len(da) else 0)
    return _recurrent_gradients(params, cache, da, da, **options)


@_constructor
def rnn(units: int, *, reverse: bool = False) -> Layer:
    """(N, T, D) -> (N, T, units) (Elman 1990), as PyTorch's RNN; `reverse` runs from the end."""
    return _recurrent("rnn", _RNN, 1, units, reverse, rnn_forward, rnn_backward)


@_GRU.forward
def gru_forward(params: Tree, x: Array, *, order: int) -> tuple[Array, Tree]:
    """y[t] = h[t] = (1 - z) · n + z · h[t-1], r and z = sigmoid(a + u), n = tanh(a + r · u).

    Each has its third of a = x[t] W + b and u = h[t-1] U + c; x is (N, T, D), y (N, T, units).
    """
    y, h, gates, U = _recurrent_start(params, x, order)
    c, u_n = params["c"].reshape(3, 1, h.shape[2]), np.empty_like(h[1:])
    for t in range(len(u_n)):
        (r, z, n), u = gates[:, t], h[t] @ U + c
        gates[:2, t] = 1 / (1 + np.exp(-gates[:2, t] - u[:2]))
        np.tanh(n + r * u[2], out=n)
        h[t + 1], u_n[t] = n + z * (h[t] - n), u[2]
    return y, {"x": x, "h": h, "gates": gates, "u_n": u_n}


@_GRU.backward("x", "h", "gates", "u_n")
def gru_backward(params: Tree, cache: Tree, dy: Array, **options: Any) -> tuple[Any, Tree]:
    """dh[t] = dy[t] + dh[t+1] · z[t+1] + du[t+1] Uᵀ; du is da but for du_n = da_n · r."""
    h, gates, dy = cache["h"], cache["gates"], dy[:, :: options["order"]].swapaxes(0, 1)
    (da, du), later = np.empty((2, *dy.shape[:2], len(params["c"])), dy.dtype), np.zeros_like(h[0])
    for t in reversed(range(len(da))):
        (r, z, n), dh = gates[:, t], dy[t] + later
        dn = dh * (1 - z) * (1 - n * n)
        dr, dz = dn * cache["u_n"][t] * r * (1 - r), dh * (h[t] - n) * z * (1 - z)
        np.concatenate([dr, dz, dn], axis=1, out=da[t])
        np.concatenate([dr, dz, dn * r], axis=1, out=du[t])
        later = dh * z + du[t] @ params["U"].T
    return _recurrent_gradients(params, cache, da, du, **options)


@_constructor
def gru(units: int, *, reverse: bool = False) -> Layer:
    """(N, T, D) -> (N, T, units) (Cho et al. 2014), as PyTorch's GRU."""
    return _recurrent("gru", _GRU, 3, units, reverse, gru_forward, gru_backward)


@_LSTM.forward
def lstm_forward(params: Tree, x: Array, *, order: int) -> tuple[Array, Tree]:
    """y[t] = h[t] = o · tanh(c[t]), c[t] = f · c[t-1] + i · g; x is (N, T, D), y (N, T, units).

    i, f and o are the sigmoids of their parts of x[t] W + b + h[t-1] U, g the tanh of its part.
    """
    y, h, gates, U = _recurrent_start(params, x, order)
    c, tanh_c = np.zeros((2, *h.shape), x.dtype)
    for t in range(len(h) - 1):
        i, f, g, o = gate = gates[:, t]
        gate += h[t] @ U if t else 0  # h[0] is 0
        gate[:2], o[...] = 1 / (1 + np.exp(-gate[:2])), 1 / (1 + np.exp(-o))
        np.tanh(g, out=g)
        c[t + 1] = f * c[t] + i * g
        np.tanh(c[t + 1], out=tanh_c[t + 1])
        h[t + 1] = o * tanh_c[t + 1]
    return y, {"x": x, "h": h, "gates": gates, "c": c, "tanh_c": tanh_c}


@_LSTM.backward("x", "h", "gates", "c", "tanh_c")
def lstm_backward(params: Tree, cache: Tree, dy: Array, **options: Any) -> tuple[Any, Tree]:
    """dh[t] = dy[t] + da[t+1] Uᵀ, dc[t] = dc[t+1] · f[t+1] + dh[t] · o · (1 - tanh(c)²)."""
    gates, c, dy = cache["gates"], cache["c"], dy[:, :: options["order"]].swapaxes(0, 1)
    da, dc = np.empty((*dy.shape[:2], len(params["b"])), dy.dtype), np.zeros_like(c[0])
    for t in reversed(range(len(da))):
        (i, f, g, o), tanh_c = gates[:, t], cache["tanh_c"][t + 1]
        dho = o * (dy[t] + (da[t + 1] @ params["U"].T if t + 1 < len(da) else 0))
        dc += dho * (1 - tanh_c * tanh_c)
        di, df, dg = dc * g * i * (1 - i), dc * c[t] * f * (1 - f), dc * i * (1 - g * g)
        np.concatenate([di, df, dg, dho * tanh_c * (1 - o)], axis=1, out=da[t])
        dc *= f
    return _recurrent_gradients(params, cache, da, da, **options)


@_constructor
def lstm(units: int, *, reverse: bool = False) -> Layer:
    """(N, T, D) -> (N, T, units) (Hochreiter and Schmidhuber 1997), as PyTorch's LSTM."""
    return _recurrent("lstm", _LSTM, 4, units, reverse, lstm_forward, lstm_backward)


_ATTENTION = _Form("N T D", **{"qkv/W": "D 3·D", "qkv/b": "3·D", "out/W": "D D", "out/b": "D"})


def _by_head(x: Array, parts: int, heads: int) -> Array:
    """The view (parts, N, heads, T, D/heads) of x (N, T, parts·D)."""
    N, T, width = x.shape
    D = width // parts
    if D % heads:
        raise ValueError(f"attention: {heads} heads do not divide the {D} features of x")
    return x.reshape(N, T, parts, heads, D // heads).transpose(2, 0, 3, 1, 4)


def attention_init(key: Key, shape: Shape, *, heads: int, init: Initializer) -> tuple[Tree, Shape]:
    """W of "qkv" (D, 3·D) and of "out" (D, D) from `init`, b of zeros."""
    T, D = _ATTENTION.shape("attention", shape)
    _by_head(np.empty((0, T, D)), 1, heads)  # which checks the heads
    weights = partial(_weights, "attention", init=init, bias=True)
    qkv = weights(fold_key(key, 0), shape=(D, 3 * D), out=3 * D)
    return {"qkv": qkv, "out": weights(fold_key(key, 1), shape=(D, D), out=D)}, (T, D)


@_ATTENTION.forward
def attention_forward(params: Tree, x: Array, *, heads: int, causal: bool) -> tuple[Array, Tree]:
    """y = m W + b of "out", m = softmax(q kᵀ / √d) v for each head of d = D / heads features.

    q, k and v are the thirds of x W + b of "qkv"; x, m and y are (N, T, D).
    """
    qkv, _ = linear_forward(params["qkv"], x)
    q, k, v = _by_head(qkv, 3, heads)
    q *= q.shape[-1] ** -0.5
    p = k @ q.swapaxes(2, 3)  # transposed, as NumPy's max and sum are faster over this axis
    moderate = max(p.max(initial=0), -p.min(initial=0)) < 50
    if causal:
        p += np.tril(np.full(p.shape[2:], -np.inf, x.dtype), -1)
    if not moderate:  # exp could overflow
        p -= p.max(axis=2, keepdims=True)
    np.exp(p, out=p)
    p /= p.sum(axis=2, keepdims=True)
    m = (p.swapaxes(2, 3) @ v).swapaxes(1, 2).reshape(x.shape)
    return linear_forward(params["out"], m)[0], {"x": x, "qkv": qkv, "p": p, "m": m}


@_ATTENTION.backward("x", "qkv", "p", "m")
def attention_backward(params: Tree, cache: Tree, dy: Array, *, heads: int) -> tuple[Any, Tree]:
    """dv = pᵀ dm, dq = ds k / √d, dk = dsᵀ q / √d, ds = p · (dm vᵀ - Σ dm · m), p the softmax."""
    p, dqkv = cache["p"], np.empty(cache["qkv"].shape, dy.dtype)
    dm, of_out = linear_backward(params["out"], cache["m"], dy)
    (dm,), (m,) = (_by_head(array, 1, heads) for array in (np.asarray(dm), cache["m"]))
    (q, k, v), (dq, dk, dv) = (_by_head(array, 3, heads) for array in (cache["qkv"], dqkv))
    ds = v @ dm.swapaxes(2, 3)
    ds -= np.einsum("nhid,nhid->nhi", dm, m)[:, :, None]
    ds *= p
    np.matmul(p, dm, out=dv)
    np.matmul(ds, q, out=dk)  # this q is q / √d
    np.matmul(ds.swapaxes(2, 3), k * k.shape[-1] ** -0.5, out=dq)
    dx, of_qkv = linear_backward(params["qkv"], cache["x"], dqkv)
    return dx, {"qkv": of_qkv, "out": of_out}


@_constructor
def attention(heads: int, *, causal: bool = False) -> Layer:
    """Self-attention over (N, T, D) (Vaswani et al. 2017), as PyTorch's MultiheadAttention.

    If `causal`, no step sees a later one. ValueError for heads that do not divide D.
    """
    heads = _whole("attention", "heads", heads, 1)
    _check_kind("attention", "causal", causal, bool)
    functions = attention_init, attention_forward, attention_backward
    return _layer(*functions, heads=heads, causal=causal, init=xavier_uniform)


# --- convolution and pooling ---
#
# To the caller arrays are (N, C, H, W). In memory these layers lay them out as (H, C, W, N), called
# rows here, and hand back the transposed view. With the batch innermost every pass runs over long
# contiguous stretches, and all that a row of windows covers lies together.


def _rows_first(x: Array) -> Array:
    """x (N, C, H, W) as contiguous rows (H, C, W, N); no copy where its memory is in that order."""
    return np.ascontiguousarray(x.transpose(2, 1, 3, 0))


def _batch_first(rows: Array) -> Array:
    """The view (N, C, H, W) of rows (H, C, W, N)."""
    return rows.transpose(3, 1, 0, 2)


Pair = tuple[int, int]
Size = int | Pair  # one number is that of both axes
Sides = Sequence[Pair]  # of each axis: (above, below), (left, right)


def _sizes(where: str, name: str, value: Any, minimum: int, axes: int = 2) -> Shape:
    """A whole number for each axis; one number stands for both axes of an image."""
    sizes = value if axes == 2 and isinstance(value, (tuple, list)) else (value,) * axes
    if len(sizes) != axes:
        wanted = "a whole number or a pair of them"
        raise ValueError(f"{where}: {name} must be {wanted}, got {_kind(value)}")
    return tuple(_whole(where, name, size, minimum) for size in sizes)


class _Windows(NamedTuple):
    """How windows move over an image, down and across."""

    size: Shape
    counts: Shape  # what is padded below and to the right follows from it
    stride: Shape
    before: Shape  # pixels of padding above and to the left; negative ones leave pixels out
    dilation: Shape = (1, 1)


def _windows(
    where: str, image: Shape, size: Shape, stride: Shape, padding: Sides, dilation: Shape = (1, 1)
) -> _Windows:
    """The windows that fit into an image (H, W), or a sequence (T,), with padding around it."""
    covered = [d * (taps - 1) + 1 for d, taps in zip(dilation, size, strict=True)]
    padded = [length + sum(sides) for length, sides in zip(image, padding, strict=True)]
    counts = [(p - c) // s + 1 for p, c, s in zip(padded, covered, stride, strict=True)]
    if min(counts) < 1:
        window, whole = (" x ".join(map(str, lengths)) for lengths in (covered, padded))
        unit, what = ("pixels", "image") if len(image) == 2 else ("steps", "sequence")
        has = f"the padded {what} has {whole}"
        raise ValueError(f"{where}: the window covers {window} {unit}, but {has}")
    before = [sides[0] for sides in padding]
    axes = [(1, 1, 1, 0, 1), *zip(size, counts, stride, before, dilation, strict=True)]
    return _Windows(*zip(*axes[-2:], strict=True))  # a sequence is an image of one row


def _overlap(count: int, step: int, offset: int, length: int) -> tuple[slice, slice]:
    """The i < count for which i · step + offset is one of `length` pixels, and these pixels."""
    first = max(0, -(offset // step))
    last = max(first, min(count, (length - 1 - offset) // step + 1))
    start = first * step + offset
    return slice(first, last), slice(start, start + (last - first) * step, step)


@lru_cache(maxsize=256)  # the same shapes recur at every step
def _taps(windows: _Windows, length: int, axis: int) -> list[tuple[Any, Any]]:
    """For each tap along axis 0 (down) or 1 (across), of `length` pixels, two indices of rows.

    One is that of the windows which have a pixel there, the other that of these pixels.
    """
    size, count, stride, before, dilation = (both[axis] for both in windows)
    overlaps = [_overlap(count, stride, i * dilation - before, length) for i in range(size)]
    others = (slice(None),) * (2 * axis)
    return [((*others, covering), (*others, pixels)) for covering, pixels in overlaps]


def _padded(rows: Array, windows: _Windows, top: int, height: int) -> Array:
    """`height` rows of an image in its padding, contiguous; no copy where none is needed."""
    H, C, W, N = rows.shape
    kw, count, stride, left, dilation = (both[1] for both in windows)
    width = (count - 1) * stride + (kw - 1) * dilation + 1
    if width <= W and left == 0 <= top <= H - height:
        return np.ascontiguousarray(rows[top : top + height])
    padded = np.zeros((height, C, width, N), rows.dtype)
    lines, inside = _overlap(height, 1, top, H)
    columns, pixels = _overlap(width, 1, -left, W)
    padded[lines, :, columns] = rows[inside, :, pixels]
    return padded


def _view(buffer: Array, shape: Shape, strides: Shape, offset: int = 0) -> Array:
    """A contiguous buffer seen with other strides (as_strided takes ten times as long)."""
    return np.ndarray(shape, buffer.dtype, buffer, 0 if 0 in shape else offset, strides)


@lru_cache(maxsize=256)
def _spans(height: int, windows: _Windows, start: int, stop: int) -> list[tuple[slice, slice]]:
    """Rows of windows from start to stop: (these, the kernel rows that they have in the image)."""
    kh, _, stride, above, dilation = (both[0] for both in windows)
    spans: list[tuple[slice, slice]] = []
    for row in range(start, stop):
        taps, _ = _overlap(kh, dilation, row * stride - above, height)
        if spans and spans[-1][1] == taps:
            spans[-1] = slice(spans[-1][0].start, row + 1), taps
        else:
            spans.append((slice(row, row + 1), taps))
    return spans


_BLOCK = 1 << 22  # bytes that are unfolded at a time; larger blocks take more memory, not less time
_NARROW = 64  # columns of a matrix; narrower ones are worth a copy that lays them side by side


def _unfolded(rows: Array, windows: _Windows, groups: int) -> Iterator[tuple[slice, slice, Array]]:
    """Some rows of windows at a time: (these, kernel rows, the pixels under them).

    The pixels are (groups, rows, kernel rows·C/groups·kw, Wo·N), a matrix for each row. Where
    windows overlap so do the matrices: only dilated kernel rows are copied. Narrow matrices come
    side by side, (groups, 1, kh·C/groups·kw, rows·Wo·N).
    """
    (H, C, _, N), (kh, kw), (Ho, Wo) = rows.shape, windows.size, windows.counts
    stride, above, dilation = windows.stride[0], windows.before[0], windows.dilation[0]
    channels, pixels, tall = C // groups, Wo * N, dilation * (kh - 1) + 1
    narrow = pixels < _NARROW
    fit = _BLOCK // max(1, C * kw * pixels * rows.itemsize * (kh if narrow else 1))
    step = max(1, (fit - tall) // stride + 1)
    for start in range(0, Ho, step):
        stop = min(Ho, start + step)
        top, bottom = start * stride - above, (stop - 1) * stride - above + tall
        if not narrow:
            top, bottom = max(0, top), max(0, top, min(H, bottom))
        padded = _padded(rows, windows, top, bottom - top)
        row, channel, pixel, item = padded.strides
        tap, window = windows.dilation[1] * pixel, windows.stride[1] * pixel
        if narrow:
            shape: Shape = (groups, kh, channels, kw, stop - start, Wo, N)
            strides: Shape = (channels * channel, dilation * row, channel, tap)
            strides += (stride * row, window, item)
            size = (groups, 1, kh * channels * kw, (stop - start) * pixels)
            yield slice(start, stop), slice(0, kh), _view(padded, shape, strides).reshape(size)
            continue
        shape = groups, len(padded), channels, kw, Wo, N  # what each kernel column meets
        strides = channels * channel, row, channel, tap, window, item
        columns = np.ascontiguousarray(_view(padded, shape, strides))
        del padded  # frees the memory
        group, row, *inner = columns.strides
        for below, taps in _spans(H, windows, start, stop):
            count, covered = below.stop - below.start, taps.stop - taps.start
            shape = (groups, count, covered, *columns.shape[2:])
            strides = (group, stride * row, dilation * row, *inner)
            offset = (below.start * stride + taps.start * dilation - above - top) * row
            matrices = _view(columns, shape, strides, offset)
            yield below, taps, matrices.reshape(groups, count, covered * channels * kw, pixels)


def _by_groups(
    rows: Array, windows: _Windows, groups: int
) -> Iterator[tuple[slice, slice, slice, Array]]:
    """`_unfolded` for some groups at a time, those whose images fit: (these, ...)."""
    channels = rows.shape[1] // groups
    fit = _BLOCK // 2 * groups // max(1, rows.nbytes * windows.size[1])
    step = min(groups, max(1, fit))
    for first in range(0, groups, step):
        last = min(groups, first + step)
        part = rows[:, first * channels : last * channels]
        for below, taps, x in _unfolded(part, windows, last - first):
            yield slice(first, last), below, taps, x


def _conv_y(rows: Array, W: Array, windows: _Windows, groups: int, y: Array) -> None:
    """Write y (Ho, out, Wo, N) = W (out, C/groups, kh, kw) · the pixels under each window."""
    (Ho, out, Wo, N), (_, channels, kh, kw) = y.shape, W.shape
    own = out // groups
    kernel = W.reshape(groups, own, channels, kh, kw).swapaxes(2, 3)
    y = y.reshape(Ho, groups, own, Wo * N).swapaxes(0, 1)
    for few, below, taps, x in _by_groups(rows, windows, groups):
        part, (count, _, size, pixels) = y[few, below], x.shape
        matrix = np.ascontiguousarray(kernel[few, :, taps]).reshape(count, 1, own, size)
        if pixels == Wo * N:
            np.matmul(matrix, x, out=part)
        else:
            product = np.matmul(matrix, x).reshape(count, own, part.shape[1], Wo * N)
            part[...] = product.swapaxes(1, 2)


def _conv_dw(rows: Array, drows: Array, shape: Shape, windows: _Windows, groups: int) -> Array:
    """dW of this shape (out, C/groups, kh, kw) = dy (Ho, out, Wo, N) · the pixels under it."""
    (out, channels, kh, kw), (Ho, _, Wo, N) = shape, drows.shape
    own = out // groups
    dy = drows.reshape(Ho, groups, own, Wo * N).transpose(1, 2, 0, 3)
    dW = np.zeros((groups, kh, channels * kw, own), dy.dtype)
    for few, below, taps, x in _by_groups(rows, windows, groups):
        part, (count, products, _, pixels) = dW[few, taps], x.shape
        right = dy[few, :, below].reshape(count, own, products, pixels).transpose(0, 2, 3, 1)
        step = x.nbytes // max(1, part.nbytes) or 1  # products that take no more memory than x
        for r in range(0, products, step):
            # x is on the left: there BLAS is up to 1.7 times faster.
            product = np.matmul(x[:, r : r + step], right[:, r : r + step]).sum(axis=1)
            part += product.reshape(part.shape)
    dW = dW.reshape(groups, kh, channels, kw, own).transpose(0, 4, 2, 1, 3)
    return np.ascontiguousarray(dW).reshape(shape)


def _phases(length: int, windows: _Windows) -> Iterator[tuple[slice, list[int], Shape]]:
    """Pixel rows that meet the same kernel rows: (these pixels, these in reverse, windows).

    Row h of the image lies under kernel row i of window r where h = r · stride + i · dilation -
    above. So pixels that are `stride` apart see dy as windows of stride 1 would.
    """
    size, _, stride, above, dilation = (both[0] for both in windows)
    for first in range(min(stride, length)):
        taps = [i for i in range(size) if (first + above - i * dilation) % stride == 0]
        if taps:
            apart = (taps[1] - taps[0]) * dilation // stride if len(taps) > 1 else 1
            before = (taps[-1] * dilation - above - first) // stride
            pixels = range(first, length, stride)
            down = len(taps), len(pixels), 1, before, apart
            yield slice(first, length, stride), taps[::-1], down


def _conv_dx(drows: Array, W: Array, shape: Shape, windows: _Windows, groups: int) -> Array:
    """dx of this shape (H, C, W, N), the adjoint of `_conv_y` in x: dy meets the turned W."""
    (H, C, width, N), (out, channels, kh, kw), Wo = shape, W.shape, windows.counts[1]
    _, _, stride, left, dilation = (both[1] for both in windows)
    kernel = W.reshape(groups, out // groups, channels, kh, kw).swapaxes(1, 2)
    fold = stride > 1 or (kw > 1 and out > C)
    if fold:  # a channel for each kernel column, added up below: less than to unfold dy
        kernel = np.moveaxis(kernel, 4, 2).reshape(C * kw, out // groups, kh, 1)
        across: Shape = (1, Wo, 1, 0, 1)
    else:
        kernel = kernel[..., ::-1].reshape(C, out // groups, kh, kw)
        across = kw, width, 1, dilation * (kw - 1) - left, dilation
    every_row_is_written = windows.stride[0] == 1
    make = np.empty if every_row_is_written else np.zeros
    parts = make((H, len(kernel), across[1], N), drows.dtype)
    for pixels, taps, down in _phases(H, windows):
        moves = _Windows(*zip(down, across, strict=True))
        _conv_y(drows, kernel[:, :, taps], moves, groups, parts[pixels])
    if not fold:
        return parts
    dx = np.zeros(shape, drows.dtype)
    columns = parts.reshape(H, C, kw, Wo, N)
    for j, (covering, pixels) in enumerate(_taps(windows, width, 1)):
        if j * dilation < stride:  # no other tap so far has had these pixels
            dx[pixels] = columns[:, :, j][covering]
        else:
            dx[pixels] += columns[:, :, j][covering]
    return dx


def _as_image(x: Array) -> Array:
    """A sequence (N, C, T), or a kernel (out, in, k), with one row; images as they are."""
    return x if x.ndim == 4 else x[:, :, None]


def _conv_init(
    where: str, key: Key, shape: Shape, groups: int, kernel: Shape, moves: Tree, weights: Tree
) -> tuple[Tree, Shape]:
    C, *image = shape
    _check_groups(where, groups, C, "x")
    windows = _windows(where, tuple(image), kernel, **moves)
    params = _weights(where, key, shape=(weights["out"], C // groups, *kernel), **weights)
    return params, (weights["out"], *windows.counts[-len(image) :])


def _conv_windows(where: str, x: Array, W: Array, groups: int, moves: Tree) -> _Windows:
    """How W moves over x; ValueError for channels that do not go with it and its groups."""
    if len(W) % groups:
        taps = "kh, kw" if W.ndim == 4 else "k"
        raise ValueError(f"{where}: W must be (out, in/{groups}, {taps}), got shape {W.shape}")
    if x.shape[1] != W.shape[1] * groups:
        channels = W.shape[1] * groups
        takes = f"but W takes {channels}{_size_hint(x.shape, channels)}"
        raise ValueError(f"{where}: x has {x.shape[1]} channels, {takes}")
    return _windows(where, x.shape[2:], W.shape[2:], **moves)


def _conv_forward(where: str, params: Tree, x: Array, groups: int, moves: Tree) -> Array:
    windows = _conv_windows(where, x, params["W"], groups, moves)
    W, (Ho, Wo) = _as_image(params["W"]), windows.counts
    y = np.empty((Ho, len(W), Wo, len(x)), x.dtype)
    _conv_y(_rows_first(_as_image(x)), W, windows, groups, y)
    if "b" in params:
        y += params["b"][:, None, None]
    return _batch_first(y) if x.ndim == 4 else _batch_first(y)[:, :, 0]


def _conv_backward(
    where: str, params: Tree, x: Array, dy: Array, need_dx: bool, groups: int, moves: Tree
) -> Gradients:
    windows = _conv_windows(where, x, params["W"], groups, moves)
    shape = (len(x), len(params["W"]), *windows.counts[4 - x.ndim :])
    dy = _as_image(_gradient(where, dy, shape, x.dtype))
    W, rows, drows = _as_image(params["W"]), _rows_first(_as_image(x)), _rows_first(dy)
    grads = {"W": _conv_dw(rows, drows, W.shape, windows, groups).reshape(params["W"].shape)}
    if "b" in params:
        grads["b"] = _channel_sums(dy)
    if not need_dx:
        return None, grads
    dx = _batch_first(_conv_dx(drows, W, rows.shape, windows, groups))
    return dx if x.ndim == 4 else dx[:, :, 0], grads


def _convolution(
    where: str, axes: int, out: Any, kernel: Any, groups: Any, init: Any, bias: Any, **moves: Any
) -> Tree:
    """The options of a convolution, checked: padding as its sides, the others with a number each.

    `moves` are stride, dilation and padding, the latter a number or a word.
    """
    options = _weight_options(where, out, init, bias)
    options["kernel"] = _sizes(where, "kernel", kernel, 1, axes)
    stride, dilation = (_sizes(where, x, moves[x], 1, axes) for x in ("stride", "dilation"))
    missing = [d * (taps - 1) for d, taps in zip(dilation, options["kernel"], strict=True)]
    words = {"conv1d": "a number, 'same' or 'causal'", "conv2d": "numbers or 'same'"}
    padding, expected = moves["padding"], words.get(where, "numbers")
    if not isinstance(padding, str):
        sides = [(pixels, pixels) for pixels in _sizes(where, "padding", padding, 0, axes)]
    elif repr(padding) not in expected:
        raise ValueError(f"{where}: padding must be {expected}, got {padding!r}")
    elif padding == "causal":
        sides = [(missing[0], 0)]
    elif max(stride) > 1:
        raise ValueError(f"{where}: padding 'same' goes with stride 1, got {moves['stride']}")
    else:
        sides = [(pixels // 2, pixels - pixels // 2) for pixels in missing]
    options["groups"] = _whole(where, "groups", groups, 1)
    _check_groups(where, options["groups"], out, "y")
    options["moves"] = {"stride": stride, "padding": tuple(sides), "dilation": dilation}
    return options


_CONV2D = _Form("N C H W", y="", W="out in kh kw", b_="out")


def conv2d_init(
    key: Key, shape: Shape, *, groups: int, kernel: Shape, moves: Tree, **weights: Any
) -> tuple[Tree, Shape]:
    """W (out, C/groups, kh, kw) from `init`, b (out,) of zeros; (C, H, W) becomes (out, Ho, Wo).

    Ho = (H + padding above and below - dilation · (kh - 1) - 1) // stride + 1, and so Wo.
    """
    shape = _CONV2D.shape("conv2d", shape)
    return _conv_init("conv2d", key, shape, groups, kernel, moves, weights)


@_CONV2D.forward
def conv2d_forward(params: Tree, x: Array, *, groups: int, moves: Tree) -> tuple[Array, Array]:
    """y[n, o, r, s] = b[o] + Σ over c, i, j of W[o, c, i, j] · x[n, c, r·stride + i·dilation, ...].

    x (N, C, H, W) with zeros around it, y (N, out, Ho, Wo). With groups, the channels of x and of
    y fall into so many equal parts, and each part of y sees only its part of x.
    """
    return _conv_forward("conv2d", params, x, groups, moves), x


@_CONV2D.backward()
def conv2d_backward(
    params: Tree, cache: Array, dy: Array, *, need_dx: bool = True, groups: int, moves: Tree
) -> Gradients:
    """dW[o, c, i, j] = Σ dy[n, o, r, s] · x[n, c, r·stride + i·dilation, ...], db = Σ dy.

    dx is dy correlated with W rotated by 180 degrees.
    """
    return _conv_backward("conv2d", params, cache, dy, need_dx, groups, moves)


@_constructor
def conv2d(
    out: int,
    kernel: Size,
    *,
    stride: Size = 1,
    padding: Size | Literal["same"] = 0,
    dilation: Size = 1,
    groups: int = 1,
    init: Initializer = he_normal,
    bias: bool = True,
) -> Layer:
    """Convolution (cross-correlation, as everywhere) with `out` channels, as PyTorch's Conv2d.

    `kernel`, `stride`, `padding` and `dilation` are numbers or pairs (height, width); padding
    "same" keeps the size (stride 1 only; an odd pixel goes to the right and the bottom). With
    `groups` equal to the channels of x it is depthwise. ValueError for a kernel that does not fit
    into the padded image, channels that W does not take and groups that do not divide; `init`
    finds these from the shape alone.
    """
    moves = {"stride": stride, "padding": padding, "dilation": dilation}
    options = _convolution("conv2d", 2, out, kernel, groups, init, bias, **moves)
    return _layer(conv2d_init, conv2d_forward, conv2d_backward, **options)


_CONV1D = _Form("N C T", y="", W="out in k", b_="out")


def conv1d_init(
    key: Key, shape: Shape, *, groups: int, kernel: Shape, moves: Tree, **weights: Any
) -> tuple[Tree, Shape]:
    """W (out, C/groups, k) from `init`, b (out,) of zeros; (C, T) becomes (out, To) as `conv2d`."""
    shape = _CONV1D.shape("conv1d", shape)
    return _conv_init("conv1d", key, shape, groups, kernel, moves, weights)


@_CONV1D.forward
def conv1d_forward(params: Tree, x: Array, *, groups: int, moves: Tree) -> tuple[Array, Array]:
    """y[n, o, t] = b[o] + Σ over c, i of W[o, c, i] · x[n, c, t·stride + i·dilation - padding]."""
    return _conv_forward("conv1d", params, x, groups, moves), x


@_CONV1D.backward()
def conv1d_backward(
    params: Tree, cache: Array, dy: Array, *, need_dx: bool = True, groups: int, moves: Tree
) -> Gradients:
    """As `conv2d_backward`, along one axis."""
    return _conv_backward("conv1d", params, cache, dy, need_dx, groups, moves)


@_constructor
def conv1d(
    out: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int | Literal["same", "causal"] = 0,
    dilation: int = 1,
    groups: int = 1,
    init: Initializer = he_normal,
    bias: bool = True,
) -> Layer:
    """Convolution along T of x (N, C, T), as PyTorch's Conv1d; options and errors of `conv2d`.

    Padding "causal" puts dilation · (kernel - 1) zeros to the left, so that y never sees what comes
    after it.
    """
    moves = {"stride": stride, "padding": padding, "dilation": dilation}
    options = _convolution("conv1d", 1, out, kernel, groups, init, bias, **moves)
    return _layer(conv1d_init, conv1d_forward, conv1d_backward, **options)


_CONV2D_TRANSPOSE = _Form("N C H W", y="", W="C own kh kw", b_="out")


def _transposed(image: Shape, W: Shape, groups: int, moves: Tree) -> tuple[Shape, _Windows]:
    """(shape of a sample of y, how the convolution moves over it that has x as its result)."""
    _check_groups("conv2d_transpose", groups, W[0], "x")
    before = tuple(above for above, _ in moves["padding"])
    windows = _Windows(W[2:], image, moves["stride"], before, moves["dilation"])
    axes = zip(*windows, moves["output_padding"], strict=True)
    size = [
        (count - 1) * stride - 2 * before + dilation * (taps - 1) + 1 + more
        for taps, count, stride, before, dilation, more in axes
    ]
    if min(size) < 1:
        raise ValueError(f"conv2d_transpose: y would have {size[0]} x {size[1]} pixels")
    return (W[1] * groups, *size), windows


def conv2d_transpose_init(
    key: Key, shape: Shape, *, groups: int, kernel: Shape, moves: Tree, **weights: Any
) -> tuple[Tree, Shape]:
    """W (C, out/groups, kh, kw) from `init`, b (out,) of zeros; (C, H, W) becomes (out, Ho, Wo).

    Ho = (H - 1) · stride - 2 · padding + dilation · (kh - 1) + output_padding + 1, and so Wo.
    """
    C, *image = _CONV2D_TRANSPOSE.shape("conv2d_transpose", shape)
    W = (C, weights["out"] // groups, *kernel)
    y, _ = _transposed(tuple(image), W, groups, moves)
    return _weights("conv2d_transpose", key, shape=W, **weights), y


@_CONV2D_TRANSPOSE.forward
def conv2d_transpose_forward(
    params: Tree, x: Array, *, groups: int, moves: Tree
) -> tuple[Array, Array]:
    """y[n, o, r·stride + i·dilation - padding, ...] = b[o] + Σ W[c, o, i, j] · x[n, c, r, s].

    Each pixel of x adds W, times its value, to a window of y: the adjoint of `conv2d_forward`.
    """
    W = params["W"]
    (out, *image), windows = _transposed(x.shape[2:], W.shape, groups, moves)
    shape = (image[0], out, image[1], len(x))
    y = _conv_dx(_rows_first(x), W, shape, windows, groups)
    if "b" in params:
        if (size := len(params["b"])) != out:
            raise ValueError(f"conv2d_transpose: W has {out} outputs, but b takes {size}")
        y += params["b"][:, None, None]
    return _batch_first(y), x


@_CONV2D_TRANSPOSE.backward()
def conv2d_transpose_backward(
    params: Tree, cache: Array, dy: Array, *, groups: int, moves: Tree
) -> Gradients:
    """dx is dy convolved with W, dW that of a convolution from y to x, db = Σ dy."""
    x, W = cache, params["W"]
    y, windows = _transposed(x.shape[2:], W.shape, groups, moves)
    drows = _rows_first(_gradient("conv2d_transpose", dy, (len(x), *y), x.dtype))
    rows = _rows_first(x)
    grads = {"W": _conv_dw(drows, rows, W.shape, windows, groups)}
    if "b" in params:
        grads["b"] = _channel_sums(dy)
    dx = np.empty_like(rows)
    _conv_y(drows, W, windows, groups, dx)
    return _batch_first(dx), grads


@_constructor
def conv2d_transpose(
    out: int,
    kernel: Size,
    *,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    dilation: Size = 1,
    groups: int = 1,
    init: Initializer = he_normal,
    bias: bool = True,
) -> Layer:
    """Transposed convolution with `out` channels, as PyTorch's ConvTranspose2d.

    It has the shapes of a `conv2d` with these options the other way round; `output_padding`, less
    than stride or dilation, adds pixels below and to the right, as one shape comes from several.
    ValueError for a y without pixels and the errors of `conv2d`.
    """
    where = "conv2d_transpose"
    moves = {"stride": stride, "padding": padding, "dilation": dilation}
    options = _convolution(where, 2, out, kernel, groups, init, bias, **moves)
    moves = options["moves"]
    extra = moves["output_padding"] = _sizes(where, "output_padding", output_padding, 0)
    limits = map(max, moves["stride"], moves["dilation"])
    if any(more >= limit for more, limit in zip(extra, limits, strict=True)):
        below = "less than stride or dilation"
        raise ValueError(f"{where}: output_padding must be {below}, got {extra}")
    functions = conv2d_transpose_init, conv2d_transpose_forward, conv2d_transpose_backward
    return _layer(*functions, **options)


def _pool(combine: np.ufunc, outside: float, rows: Array, windows: _Windows, axis: int) -> Array:
    """What each window covers along one axis, combined; padding counts as `outside`."""
    shape = list(rows.shape)
    shape[2 * axis] = windows.counts[axis]
    y = np.empty(shape, rows.dtype)
    for tap, (covering, pixels) in enumerate(_taps(windows, rows.shape[2 * axis], axis)):
        part, covered = y[covering], rows[pixels]
        if tap:
            combine(part, covered, out=part)
        else:
            if windows.before[axis]:
                y[...] = outside
            part[...] = covered
    return y


def _to_largest(rows: Array, y: Array, dy: Array, windows: _Windows, axis: int) -> Array:
    """dy of each window, given to the first pixel that has the window's maximum y."""
    dx = np.zeros(rows.shape, rows.dtype)
    left = dy
    for tap, (window, pixel) in enumerate(_taps(windows, rows.shape[2 * axis], axis)):
        given = left[window]
        if tap < windows.size[axis] - 1:  # what is left then is the last one's
            given = (rows[pixel] == y[window]).astype(dy.dtype)
            given *= left[window]
            left = left.copy() if tap == 0 else left
            left[window] -= given
        if windows.stride[axis] < windows.size[axis]:
            dx[pixel] += given
        else:
            dx[pixel] = given
    return dx


def _pool2d(where: str, size: Any, stride: Any, padding: Any, *functions: Any) -> Layer:
    """A pool, its options checked; without a stride the windows lie side by side."""
    size = _sizes(where, "size", size, 1)
    stride = size if stride is None else _sizes(where, "stride", stride, 1)
    pixels = _sizes(where, "padding", padding, 0)
    if 2 * pixels[0] > size[0] or 2 * pixels[1] > size[1]:
        most = f"at most half of the window {size}"
        raise ValueError(f"{where}: padding must be {most}, got {pixels}")
    sides = tuple((number, number) for number in pixels)
    return _without_params(*functions, size=size, stride=stride, padding=sides)


@_POOLED.forward
def max_pool2d_forward(params: Tree, x: Array, **moves: Any) -> tuple[Array, Tree]:
    """y[n, c, r, s] = the maximum of x[n, c] in the window at (r, s) · stride - padding.

    x (N, C, H, W), y (N, C, Ho, Wo); padding counts as -inf.
    """
    windows = _windows("max_pool2d", x.shape[2:], **moves)
    across = _pool(np.maximum, -np.inf, _rows_first(x), windows, 1)
    y = _batch_first(_pool(np.maximum, -np.inf, across, windows, 0))
    return y, {"x": x, "across": _batch_first(across), "y": y}


@_POOLED.backward("x", "across", "y")
def max_pool2d_backward(params: Tree, cache: Tree, dy: Array, **moves: Any) -> Gradients:
    """dx: each dy goes to the maximum of its window, of several, to the first in row-major order.

    The first row that has the maximum, and in it the first pixel: so it goes down the column of
    the rows' maxima first, and then across each row.
    """
    x, across, y = (_rows_first(cache[name]) for name in ("x", "across", "y"))
    H, C, W, N = x.shape
    windows = _windows("max_pool2d", (H, W), **moves)
    dy = _gradient("max_pool2d", dy, (N, C, *windows.counts), x.dtype)
    dacross = _to_largest(across, y, _rows_first(dy), windows, 0)
    return _batch_first(_to_largest(x, across, dacross, windows, 1)), {}


@_constructor
def max_pool2d(size: Size, *, stride: Size | None = None, padding: Size = 0) -> Layer:
    """The maximum of each window, as PyTorch's MaxPool2d. `stride` defaults to `size`.

    `size`, `stride` and `padding` (at most half the window) are numbers or pairs (height, width).
    ValueError for a window that does not fit into the padded image.
    """
    return _pool2d("max_pool2d", size, stride, padding, max_pool2d_forward, max_pool2d_backward)


@_POOLED.forward
def avg_pool2d_forward(params: Tree, x: Array, **moves: Any) -> tuple[Array, Array]:
    """y[n, c, r, s] = the mean of x[n, c] in the window at (r, s) · stride - padding.

    x (N, C, H, W), y (N, C, Ho, Wo); padding counts as zeros.
    """
    windows = _windows("avg_pool2d", x.shape[2:], **moves)
    across = _pool(np.add, 0.0, _rows_first(x), windows, 1)
    y = _pool(np.add, 0.0, across, windows, 0)
    y *= 1 / math.prod(windows.size)
    return _batch_first(y), x


@_POOLED.backward()
def avg_pool2d_backward(params: Tree, cache: Array, dy: Array, **moves: Any) -> Gradients:
    """dx = the sum of dy / (size of a window) over the windows that cover the pixel."""
    x = cache
    windows = _windows("avg_pool2d", x.shape[2:], **moves)
    dy = _gradient("avg_pool2d", dy, (*x.shape[:2], *windows.counts), x.dtype)
    dx = _rows_first(dy) * (1 / math.prod(windows.size))
    for axis in (0, 1):
        drows, shape = dx, list(dx.shape)
        shape[2 * axis] = x.shape[2 + axis]
        dx = np.zeros(shape, x.dtype)
        for covering, pixels in _taps(windows, x.shape[2 + axis], axis):
            dx[pixels] += drows[covering]
    return _batch_first(dx), {}


@_constructor
def avg_pool2d(size: Size, *, stride: Size | None = None, padding: Size = 0) -> Layer:
    """The mean of each window, as PyTorch's AvgPool2d; options and errors of `max_pool2d`."""
    return _pool2d("avg_pool2d", size, stride, padding, avg_pool2d_forward, avg_pool2d_backward)


_GLOBAL_AVG_POOL2D = _Form("N C H W", y="N C")


@_GLOBAL_AVG_POOL2D.forward
def global_avg_pool2d_forward(params: Tree, x: Array) -> tuple[Array, Array]:
    """y (N, C) = the mean of x (N, C, H, W) over H and W."""
    return x.mean(axis=(2, 3)), x


@_GLOBAL_AVG_POOL2D.backward()
def global_avg_pool2d_backward(params: Tree, cache: Array, dy: Array) -> Gradients:
    """dx = dy / (H · W), the same for every pixel."""
    N, C, H, W = cache.shape
    share = np.ascontiguousarray(dy.T)[:, None] * (1 / (H * W))
    return _batch_first(np.broadcast_to(share, (H, C, W, N)).copy()), {}


@_constructor
def global_avg_pool2d() -> Layer:
    """The mean of each channel, (N, C, H, W) -> (N, C) (Lin et al. 2014)."""
    return _without_params(global_avg_pool2d_forward, global_avg_pool2d_backward)


@_POOLED.forward
def upsample2d_forward(params: Tree, x: Array, *, factor: Pair) -> tuple[Array, Array]:
    """y[n, c, r, s] = x[n, c, r // factor, s // factor], for x (N, C, H, W)."""
    return _batch_first(_rows_first(x).repeat(factor[1], axis=2).repeat(factor[0], axis=0)), x


@_POOLED.backward()
def upsample2d_backward(params: Tree, cache: Array, dy: Array, *, factor: Pair) -> Gradients:
    """dx = the sum of dy over the copies of each pixel."""
    (N, C, H, W), (down, across) = cache.shape, factor
    drows = _rows_first(_gradient("upsample2d", dy, (N, C, H * down, W * across), cache.dtype))
    dx: Any = sum(drows[i::down, :, j::across] for i in range(down) for j in range(across))
    return _batch_first(dx), {}


@_constructor
def upsample2d(factor: Size) -> Layer:
    """Each pixel `factor` times down and across, a number or a pair; PyTorch's nearest Upsample."""
    sizes = _sizes("upsample2d", "factor", factor, 1)
    return _without_params(upsample2d_forward, upsample2d_backward, factor=sizes)


# === Combinators: layers made of layers =========================================================

_Layers = dict[str, LayerLike]


def _check_layer(where: str, name: str, layer: Any, needs: Sequence[str] = Layer._fields) -> None:
    for function in needs:
        if not callable(getattr(layer, function, None)):
            what = f"{_kind(layer)} has no {function}"
            raise TypeError(f"{where}: {name} must be a layer, but {what}")


def _named(where: str, layers: Sequence[LayerLike], named_layers: _Layers) -> _Layers:
    """{name: layer}; those without a name are called by their position."""
    children = {str(position): layer for position, layer in enumerate(layers)}
    for name, layer in named_layers.items():
        if name in children or name in ("", "key", "statistics") or "/" in name:
            raise ValueError(f"{where}: a layer cannot be called {name!r}")
        children[name] = layer
    if not children and where != "sequential":
        raise ValueError(f"{where}: expected at least one layer")
    for name, layer in children.items():
        _check_layer(where, name, layer)
    return children


_RETURNS = {"init": "(params, shape)", "forward": "(y, cache)", "backward": "(dx, grads)"}
_ARRAYS = (np.ndarray, np.generic, dict)


def _two_results(what: str, results: Any, params: Tree) -> tuple[Any, Any]:
    """What a function of a layer returned; refused unless it is two things of the right kind."""
    if not isinstance(results, (tuple, list)) or len(results) != 2:
        number = f" of {len(results)}" if isinstance(results, (tuple, list)) else ""
        raise TypeError(f"{what} must return {_RETURNS[what]}, got {_kind(results)}{number}")
    first, second = results
    if what == "forward" and not isinstance(first, _ARRAYS):
        raise TypeError(f"forward must return (y, cache), y an array, got {_kind(first)}")
    if what == "backward":
        without = second is None and params.keys() <= {"key"}  # grads of a layer without params
        if not isinstance(second, dict) and not without:
            raise TypeError(f"backward must return (dx, grads), grads a dict, got {_kind(second)}")
        if first is not None and not isinstance(first, _ARRAYS):
            raise TypeError(f"backward must return (dx, grads), dx an array, got {_kind(first)}")
    return first, second


def _call_child(name: str, what: str, function: Any, *arguments: Any) -> tuple[Any, Any]:
    """The two results of a child's function; its errors are prefixed with its name."""
    try:
        return _two_results(what, function(*arguments), arguments[0])
    except (ValueError, TypeError) as error:
        if type(error) not in (ValueError, TypeError):  # others may not take a message alone
            raise
        raise type(error)(f"{name}: {error}") from error


def _children(where: str, params: Tree, layers: _Layers) -> Tree:
    """{name: params} of the children; while training, with a key each, folded from the parent's."""
    if isinstance(params, dict) and params.keys() <= layers.keys():
        return {name: params.get(name, {}) for name in layers}
    _check_names(where, params, layers)
    parent = _key_array(params["key"])
    keys = np.empty((len(layers), len(parent) + 1), np.uint32)
    keys[:, :-1] = parent
    keys[:, -1] = np.arange(len(layers))
    children = {}
    for name, key in zip(layers, keys, strict=True):
        _check_kind(where, f"params[{name!r}]", params.get(name, {}), dict)
        children[name] = {**params.get(name, {}), "key": key}
    return children


def _check_entries(where: str, what: str, tree: Any, names: Iterable[str]) -> None:
    if not isinstance(tree, dict) or tree.keys() != set(names):
        raise ValueError(f"{where}: {what} has {_names(tree)}, expected {sorted(names)}")


def _without_dx(backward: Any, params: Tree, cache: Any, dy: Data) -> tuple[Any, Tree]:
    """(dx or None, grads): `backward` is told need_dx=False if it takes that, see `Layer`."""
    try:
        return backward(params, cache, dy, need_dx=False)
    except TypeError as error:
        if "need_dx" not in str(error):
            raise
    return backward(params, cache, dy)


def sequential_init(key: Key, shape: Shapes, *, layers: _Layers) -> tuple[Tree, Shapes]:
    """{name: params} of the layers that have any, each from its own key, and the last shape."""
    params: Tree = {}
    for index, (name, layer) in enumerate(layers.items()):
        own, shape = _call_child(name, "init", layer.init, fold_key(key, index), shape)
        if own:
            params[name] = own
    return params, shape


@_quiet
def sequential_forward(params: Tree, x: Data, *, layers: _Layers) -> tuple[Data, Tree]:
    """x through every layer in turn; the cache is {name: cache}."""
    children = _children("sequential", params, layers)
    cache = {}
    for name, layer in layers.items():
        x, cache[name] = _call_child(name, "forward", layer.forward, children[name], x)
    return x, cache


@_quiet
def sequential_backward(
    params: Tree, cache: Tree, dy: Data, *, need_dx: bool = True, layers: _Layers
) -> Gradients:
    """dy through every layer in reverse; grads are {name: grads} of the layers that have any."""
    _check_names("sequential", params, layers)
    _check_entries("sequential", "cache", cache, layers)
    names = list(layers)
    while not need_dx and names and names[0] not in params:
        del names[0]  # before the first params there is nothing to compute but dx
    dx: Any = dy
    grads = {}
    for name in reversed(names):
        backward: Callable[..., Any] = layers[name].backward
        if not need_dx and name == names[0]:
            backward = partial(_without_dx, backward)
        own = params.get(name, {})
        dx, grads[name] = _call_child(name, "backward", backward, own, cache[name], dx)
    return (dx if need_dx else None), {name: grads[name] for name in names if grads[name]}


@_constructor
def sequential(*layers: LayerLike, **named_layers: LayerLike) -> Layer:
    """One layer after the other. Unnamed layers are called "0", "1", ... by their position.

    `sequential(hidden=linear(256), act=relu(), out=linear(10))`. ValueError for the names "key" and
    "statistics", an empty one or one with "/" in it; TypeError for what is not a layer.
    """
    named = _named("sequential", layers, named_layers)
    return _layer(sequential_init, sequential_forward, sequential_backward, layers=named)


# --- branches side by side: `heads` keeps their outputs apart, the others join them ---


def _init_each(where: str, key: Key, shapes: Tree, layers: _Layers) -> tuple[Tree, Tree]:
    """{name: params} of the branches that have any, and {name: output shape}."""
    _check_entries(where, "shape", shapes, layers)
    params, out = {}, {}
    for index, (name, layer) in enumerate(layers.items()):
        own, out[name] = _call_child(name, "init", layer.init, fold_key(key, index), shapes[name])
        if own:
            params[name] = own
    return params, out


def _forward_each(where: str, params: Tree, x: Tree, layers: _Layers) -> tuple[Tree, Tree]:
    """{name: y} and {name: cache} of branches that take {name: x}."""
    _check_entries(where, "x", x, layers)
    children, y, cache = _children(where, params, layers), {}, {}
    for name, layer in layers.items():
        y[name], cache[name] = _call_child(name, "forward", layer.forward, children[name], x[name])
    return y, cache


def _backward_each(
    where: str, params: Tree, cache: Tree, dy: Tree, need_dx: bool, layers: _Layers
) -> Gradients:
    """{name: dx} and {name: grads}; no dx at all if it is not needed."""
    _check_names(where, params, layers)
    _check_entries(where, "cache", cache, layers)
    _check_entries(where, "dy", dy, layers)
    dx, grads = {}, {}
    for name, layer in layers.items():
        backward = layer.backward if need_dx else partial(_without_dx, layer.backward)
        arguments = params.get(name, {}), cache[name], dy[name]
        dx[name], own = _call_child(name, "backward", backward, *arguments)
        if own:
            grads[name] = own
    return (dx if need_dx else {}), grads


def heads_init(key: Key, shape: Shapes, *, layers: _Layers) -> tuple[Tree, Tree]:
    """{name: params} of the heads that have any, and {name: output shape}."""
    return _init_each("heads", key, dict.fromkeys(layers, shape), layers)


@_quiet
def heads_forward(params: Tree, x: Data, *, layers: _Layers) -> tuple[Tree, Tree]:
    """y = {name: y of the head}, all of the same x; the cache is {name: cache}."""
    return _forward_each("heads", params, dict.fromkeys(layers, x), layers)


@_quiet
def heads_backward(
    params: Tree, cache: Tree, dy: Tree, *, need_dx: bool = True, layers: _Layers
) -> Gradients:
    """dx = the sum of the dx of all heads, for dy = {name: dy}."""
    dx, grads = _backward_each("heads", params, cache, dy, need_dx, layers)
    return reduce(partial(_sum, "heads", "dx"), dx.values(), None), grads


@_constructor
def heads(**named: LayerLike) -> Layer:
    """Several outputs of one input: y = {name: y}, and dy is a dict of the same names.

    `sequential(body, heads(digit=linear(10), angle=linear(1)))`. Its loss is a function of your
    own that takes such dicts: (prediction, target) -> (loss, {name: dprediction}).
    """
    return _layer(heads_init, heads_forward, heads_backward, layers=_named("heads", (), named))


def _check_same(branch: Shapes, shortcut: Shapes) -> None:
    if branch != shortcut:
        raise ValueError(f"residual: the branch gives {branch}, but the shortcut {shortcut}")


def residual_init(key: Key, shape: Shapes, *, layers: _Layers) -> tuple[Tree, Shapes]:
    """{"branch": params, "shortcut": params}, without the one that has none."""
    params, shapes = _init_each("residual", key, dict.fromkeys(layers, shape), layers)
    _check_same(**shapes)
    return params, shapes["branch"]


@_quiet
def residual_forward(params: Tree, x: Data, *, layers: _Layers) -> tuple[Data, Tree]:
    """y = branch(x) + shortcut(x)."""
    y, cache = _forward_each("residual", params, dict.fromkeys(layers, x), layers)
    _check_same(**tree_map(np.shape, y))
    return _sum("residual", "y", y["branch"], y["shortcut"]), cache


@_quiet
def residual_backward(
    params: Tree, cache: Tree, dy: Data, *, need_dx: bool = True, layers: _Layers
) -> Gradients:
    """dx = dx of the branch + dx of the shortcut."""
    both = dict.fromkeys(layers, dy)
    dx, grads = _backward_each("residual", params, cache, both, need_dx, layers)
    return reduce(partial(_sum, "residual", "dx"), dx.values(), None), grads


@_constructor
def residual(branch: LayerLike, shortcut: LayerLike = identity()) -> Layer:
    """y = branch(x) + shortcut(x) (He et al. 2016). Both must give the same shape."""
    layers = _named("residual", (), {"branch": branch, "shortcut": shortcut})
    return _layer(residual_init, residual_forward, residual_backward, layers=layers)


def _joined(shapes: Tree, axis: int) -> tuple[tuple[Any, ...], Array]:
    """The shape of outputs side by side along `axis`, from theirs with the batch; their ends."""
    first = next(iter(shapes.values()))
    for shape in shapes.values():
        fits = isinstance(shape, tuple) and -len(shape) < axis < len(shape)
        if not fits or shape[:axis] + shape[axis:][1:] != first[:axis] + first[axis:][1:]:
            raise ValueError(f"concatenate: outputs do not fit along axis {axis}: {shapes}")
    ends = np.cumsum([shape[axis] for shape in shapes.values()])
    return (*first[:axis], int(ends[-1]), *first[axis:][1:]), ends


def concatenate_init(key: Key, shape: Shapes, *, layers: _Layers, axis: int) -> tuple[Tree, Shape]:
    """{name: params} of the branches that have any; shape is one for all, or {name: shape}."""
    shapes = shape if isinstance(shape, dict) else dict.fromkeys(layers, shape)
    params, shapes = _init_each("concatenate", key, shapes, layers)
    shapes = {name: ("N", *own) if type(own) is tuple else own for name, own in shapes.items()}
    return params, _joined(shapes, axis)[0][1:]


@_quiet
def concatenate_forward(params: Tree, x: Data, *, layers: _Layers, axis: int) -> tuple[Array, Tree]:
    """y = the outputs of all branches side by side; x is one array for all, or {name: x}."""
    inputs = x if isinstance(x, dict) else dict.fromkeys(layers, x)
    y, cache = _forward_each("concatenate", params, inputs, layers)
    shape, ends = _joined(tree_map(np.shape, y), axis)
    own = {"shape": np.array(shape), "ends": ends, "split": np.array(isinstance(x, dict))}
    return np.concatenate(list(y.values()), axis), {**cache, "axis": own}  # no child's name


@_quiet
def concatenate_backward(
    params: Tree, cache: Tree, dy: Array, *, need_dx: bool = True, layers: _Layers, axis: int
) -> Gradients:
    """dx = the sum of the dx of all branches, each for its part of dy; {name: dx} for a dict x."""
    _check_entries("concatenate", "cache", cache, [*layers, "axis"])
    own, caches = cache["axis"], {name: cache[name] for name in layers}
    _check_array("concatenate", "dy", dy)
    dy = _gradient("concatenate", dy, tuple(own["shape"].tolist()), dy.dtype)
    parts = dict(zip(layers, np.split(dy, own["ends"][:-1], axis), strict=True))
    dx, grads = _backward_each("concatenate", params, caches, parts, need_dx, layers)
    total = partial(_sum, "concatenate", "dx")
    return (dx if own["split"] else reduce(total, dx.values(), None)), grads


@_constructor
def concatenate(*branches: LayerLike, axis: int = 1, **named: LayerLike) -> Layer:
    """The outputs of all branches side by side along `axis`; the batch is axis 0.

    x is one array that goes to all branches, or a dict with an entry for each (several inputs):
    `concatenate(image=convolutions, size=linear(8))`. Branches are named as in `sequential`.
    ValueError for axis 0, without a branch, and for shapes that differ but along the axis.
    """
    if _whole("concatenate", "axis", axis, -64) == 0:
        raise ValueError("concatenate: axis must not be 0, the batch")
    functions = concatenate_init, concatenate_forward, concatenate_backward
    return _layer(*functions, layers=_named("concatenate", branches, named), axis=axis)


# === Losses: (prediction, target) -> (loss, dprediction) ========================================


def _check_prediction(where: str, name: str, prediction: Any, classes: bool = False) -> None:
    _check_array(where, name, prediction)
    if prediction.size == 0:
        raise ValueError(f"{where}: {name} must not be empty, got shape {prediction.shape}")
    if classes and prediction.ndim < 2:
        raise ValueError(f"{where}: {name} must be (N, ..., classes), got shape {prediction.shape}")


def _check_labels(where: str, labels: Any, prediction: Array) -> None:
    """Refuse what is not one class number for each position of a prediction (N, ..., K)."""
    shape, classes = prediction.shape[:-1], prediction.shape[-1]
    if not _is_array(labels):
        raise TypeError(f"{where}: labels must be a NumPy array, got {_kind(labels)}")
    if labels.shape != shape:
        fewer = labels.ndim < len(shape)
        hint = "; for one label per sample put flatten() before the last layer" if fewer else ""
        raise ValueError(f"{where}: labels must have shape {shape}, got {labels.shape}{hint}")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{where}: labels must be whole numbers (integers), got {labels.dtype}")
    low, high = labels.min(), labels.max()
    if low < 0 or high >= classes:
        raise ValueError(f"{where}: labels must be from 0 to {classes - 1}, got {low} to {high}")


def _two_shapes(where: str, target: Array, prediction: Array) -> str:
    both = f"target has shape {target.shape}, but the prediction has {prediction.shape}"
    hint = "; put flatten() before the last layer" if target.ndim < prediction.ndim > 2 else ""
    return f"{where}: {both}{hint}"


def _probabilities(where: str, target: Any, prediction: Array) -> tuple[Array, Array | float]:
    """Class numbers (N, ...) or probabilities (N, ..., K) as a new array, and its sums over K."""
    if _is_array(target) and target.ndim == prediction.ndim:
        if target.shape != prediction.shape:
            raise ValueError(_two_shapes(where, target, prediction))
        if target.dtype.kind not in "biuf" or not (target.min() >= 0 and target.max() <= 1):
            raise ValueError(f"{where}: target probabilities must be numbers from 0 to 1")
        probabilities = target.astype(prediction.dtype)
        return probabilities, probabilities.sum(axis=-1, keepdims=True)
    _check_labels(where, target, prediction)
    probabilities = np.zeros(prediction.shape, prediction.dtype)
    probabilities.reshape(target.size, -1)[np.arange(target.size), target.ravel()] = 1
    return probabilities, 1.0


_Value = tuple[float, Array]  # a loss and its gradient


def _mean(where: str, losses: Array, gradient: Array, weights: Any) -> _Value:
    """The mean of the losses of all positions, and its gradient, given that of their sum.

    With weights it is Σ w·l / Σ w; where w is 0, l may be anything. The gradient is written to.
    """
    if weights is None:
        gradient *= 1 / losses.size
        return float(losses.sum()) / losses.size, gradient
    _check_numbers(where, "weights", weights)
    shape, full = weights.shape, losses.shape
    if not shape or shape != full[: len(shape)]:
        raise ValueError(f"{where}: weights have shape {shape}, expected {full} or its first axes")
    w = weights.astype(np.float64)
    if not (w.min() >= 0 and 0 < w.max() < math.inf):
        raise ValueError(f"{where}: weights must be finite, not negative and not all 0")
    w /= w.max()  # so that their sum is finite
    w *= w.size / (w.sum() * losses.size)
    w = w.astype(losses.dtype).reshape(w.shape + (1,) * (gradient.ndim - w.ndim))
    gradient *= w
    np.copyto(gradient, 0, where=w == 0)
    w = w.reshape(w.shape[: losses.ndim])
    return float(np.sum(losses * w, where=w > 0)), gradient


@_quiet
def softmax_cross_entropy(
    logits: Array, target: Array, smoothing: float = 0.0, weights: Weights = None
) -> _Value:
    """-Σ t log softmax(logits), the mean over all positions; its gradient (softmax · Σt - t) / N.

    logits (N, ..., K); target: class numbers (N, ...) or probabilities (N, ..., K). With
    `smoothing` s in [0, 1), t becomes (1 - s) t + s/K (Szegedy et al. 2016, as PyTorch's
    label_smoothing). `weights` w, here and in all losses, are numbers >= 0 for the positions
    (N, ...) or the first of these axes, as (N,). The mean of the losses l is then Σ w·l / Σ w, as
    PyTorch's with class weights: `weights=class_weights[labels]`; a 0 leaves out padding.
    ValueError for shapes that do not fit, labels out of range, an empty batch or no such weights.
    """
    where = "softmax_cross_entropy"
    _check_prediction(where, "logits", logits, classes=True)
    smoothing = _number(where, "smoothing", smoothing, minimum=0, below=1)
    t, sums = _probabilities(where, target, logits)
    if smoothing:
        t *= 1 - smoothing
        t += smoothing / logits.shape[-1]
        sums = sums * (1 - smoothing) + smoothing
    shifted = logits - logits.max(axis=-1, keepdims=True)
    gradient = np.exp(shifted)
    total = gradient.sum(axis=-1, keepdims=True)
    shifted -= np.log(total)
    losses = -np.einsum("...k,...k->...", t, shifted)
    if np.isnan(losses).any():  # 0 · -inf, perhaps: logits differ by more than the dtype's range
        shifted[t == 0] = 0
        losses = -np.einsum("...k,...k->...", t, shifted)
    gradient *= sums / total
    gradient -= t
    return _mean(where, losses, gradient, weights)


@_quiet
def cross_entropy(probabilities: Array, target: Array, weights: Weights = None) -> _Value:
    """-Σ t log p, the mean over all positions; its gradient -t / p / N.

    probabilities p (N, ..., K), as `softmax` gives them; target: class numbers (N, ...) or
    probabilities (N, ..., K). p is clipped from below at the smallest normal number, so that log 0
    is never met. Training is more accurate with `softmax_cross_entropy` on logits, where `weights`
    are explained. ValueError for shapes that do not fit, labels out of range or an empty batch.
    """
    where = "cross_entropy"
    _check_prediction(where, "probabilities", probabilities, classes=True)
    tolerance = 1e-3  # rounding, and the steps of a gradient check
    if not (probabilities.min() >= -tolerance and probabilities.max() <= 1 + tolerance):
        hint = "for logits use softmax_cross_entropy"
        raise ValueError(f"{where}: probabilities must be from 0 to 1; {hint}")
    t, _ = _probabilities(where, target, probabilities)
    p = np.maximum(probabilities, np.finfo(probabilities.dtype).tiny)
    losses = -np.einsum("...k,...k->...", t, np.log(p))
    return _mean(where, losses, np.divide(t, -p, out=t), weights)


@_quiet
def hinge(scores: Array, target: Array, margin: float = 1.0, weights: Weights = None) -> _Value:
    """Σ max(0, s_j - s_y + margin) over the wrong classes j, the mean over all positions.

    scores (N, ..., K), target: class numbers y (N, ...) (Weston and Watkins 1999, as CS231n);
    `weights` as in `softmax_cross_entropy`.
    ValueError for shapes that do not fit, labels out of range or an empty batch.
    """
    _check_prediction("hinge", "scores", scores, classes=True)
    margin = _number("hinge", "margin", margin, minimum=0)
    _check_labels("hinge", target, scores)
    right = target[..., None]
    excess = scores - np.take_along_axis(scores, right, axis=-1) + margin
    np.put_along_axis(excess, right, 0, axis=-1)
    np.maximum(excess, 0, out=excess)
    gradient = (excess > 0).astype(scores.dtype)
    np.put_along_axis(gradient, right, -gradient.sum(axis=-1, keepdims=True), axis=-1)
    return _mean("hinge", excess.sum(axis=-1), gradient, weights)


def _elementwise_target(where: str, prediction: Any, target: Any) -> Array:
    """The target in the dtype of the prediction; refused unless it has exactly its shape."""
    _check_prediction(where, "prediction", prediction)
    _check_numbers(where, "target", target)
    if target.shape != prediction.shape:
        raise ValueError(_two_shapes(where, target, prediction))
    return target.astype(prediction.dtype, copy=False)


@_quiet
def binary_cross_entropy(logits: Array, target: Array, weights: Weights = None) -> _Value:
    """-(t log σ(z) + (1 - t) log(1 - σ(z))), the mean over all elements; gradient (σ(z) - t)/size.

    logits z and target t in [0, 1] of the same shape (as PyTorch's BCEWithLogitsLoss); `weights` as
    in `softmax_cross_entropy`, up to the full shape. ValueError for shapes that differ or are
    empty, and a target out of range.
    """
    t = _elementwise_target("binary_cross_entropy", logits, target)
    if not (t.min() >= 0 and t.max() <= 1):
        raise ValueError("binary_cross_entropy: target must be from 0 to 1")
    losses = np.maximum(logits, 0) - logits * t + np.log1p(np.exp(-np.abs(logits)))
    return _mean("binary_cross_entropy", losses, _sigmoid(logits) - t, weights)


@_quiet
def mean_squared_error(prediction: Array, target: Array, weights: Weights = None) -> _Value:
    """(p - t)², the mean over all elements; gradient 2 (p - t) / size.

    `weights` as in `binary_cross_entropy`. ValueError for shapes that differ or are empty.
    """
    difference = prediction - _elementwise_target("mean_squared_error", prediction, target)
    return _mean("mean_squared_error", np.square(difference), 2 * difference, weights)


@_quiet
def mean_absolute_error(prediction: Array, target: Array, weights: Weights = None) -> _Value:
    """|p - t|, the mean over all elements; gradient sign(p - t) / size.

    `weights` as in `binary_cross_entropy`. ValueError for shapes that differ or are empty.
    """
    difference = prediction - _elementwise_target("mean_absolute_error", prediction, target)
    return _mean("mean_absolute_error", np.abs(difference), np.sign(difference), weights)


@_quiet
def huber(prediction: Array, target: Array, delta: float = 1.0, weights: Weights = None) -> _Value:
    """d²/2 where |d| <= delta, else delta · (|d| - delta/2), with d = p - t; the mean over all.

    The gradient is d, clipped to [-delta, delta], over the size (as PyTorch's HuberLoss); `weights`
    as in `binary_cross_entropy`.
    ValueError for shapes that differ or are empty, or a delta that is not positive.
    """
    delta = _number("huber", "delta", delta, above=0)
    difference = prediction - _elementwise_target("huber", prediction, target)
    clipped = np.clip(difference, -delta, delta)
    return _mean("huber", clipped * (difference - 0.5 * clipped), clipped, weights)


@_quiet
def l2_penalty(params: Tree, coefficient: float) -> tuple[float, Tree]:
    """coefficient/2 · Σ W² over all entries with two or more axes; their grads coefficient · W.

    So weight matrices and kernels are decayed, but not biases, gammas or betas, which get no
    entry in the grads. `tree_add` adds these to the grads of a loss.
    """
    coefficient = _number("l2_penalty", "coefficient", coefficient, minimum=0)
    arrays = _arrays("l2_penalty", "params", params)
    weights = {path: leaf for path, leaf in arrays.items() if leaf.ndim >= 2}
    loss = sum((0.5 * coefficient * float(np.vdot(W, W)) for W in weights.values()), 0.0)
    return loss, tree_unflatten({path: coefficient * W for path, W in weights.items()})


# === Optimizers: step(params, grads, state) -> (params, state) ==================================

Rate = float | Callable[[int], float]


class Optimizer(NamedTuple):
    """An optimizer: two pure functions.

    `init(params) -> state`: it holds "step" (how many steps were taken), "scale" (every rate is
    multiplied by it, see `reduce_on_plateau`) and a tree like params for each quantity that the
    rule remembers. `step(params, grads, state) -> (params, state)` moves exactly the entries that
    grads hold; the others stay as they are. ValueError for grads or a state that do not fit params.
    """

    init: Callable[[Tree], Tree]
    step: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]


_PLATEAU = frozenset({"plateau_best", "plateau_count"})  # what reduce_on_plateau adds to a state
_BELOW_1 = {"minimum": 0.0, "below": 1.0}
_NOT_NEGATIVE = {"minimum": 0.0}
_OPTIONS = {"lr": _NOT_NEGATIVE, "momentum": _BELOW_1, "weight_decay": _NOT_NEGATIVE}
_OPTIONS |= {"beta1": _BELOW_1, "beta2": _BELOW_1, "decay": _BELOW_1}
_OPTIONS |= {"eps": {"above": 0.0}}


_Moved = tuple[Array, Tree]  # p and memory after the step


class _Rule(NamedTuple):
    """An update rule: update(p, g, memory, **options) -> (p, memory), for every entry."""

    name: str
    update: Callable[..., _Moved]
    remembers: Sequence[str]  # quantities, each a tree like params in the state
    options: Tree  # lr and momentum may be schedules
    decoupled: bool = False  # weight decay shrinks the entry instead of adding to its gradient


def _optimizer(
    where: str, update: Any, remembers: Sequence[str], options: Tree, decoupled: bool = False
) -> Optimizer:
    """An optimizer of these options, checked; without momentum it remembers no velocity."""
    for name, option in options.items():
        if not (name in ("lr", "momentum") and callable(option)):
            options[name] = _number(where, name, option, **_OPTIONS[name])
    if not options.get("momentum", True):
        remembers = [name for name in remembers if name != "velocity"]
    rule = _Rule(where, update, remembers, options, decoupled)
    return Optimizer(partial(_init_state, rule=rule), partial(_take_step, rule=rule))


def _init_state(params: Tree, *, rule: _Rule) -> Tree:
    _arrays(rule.name, "params", params)
    start = {"count": lambda leaf: np.zeros((), np.int64)}
    trees = {name: tree_map(start.get(name, np.zeros_like), params) for name in rule.remembers}
    return {"step": np.zeros((), np.int64), "scale": np.ones(()), **trees}


def _item(value: Any) -> Any:
    """The number in an array without axes; anything else as it is."""
    return value.item() if isinstance(value, np.ndarray) and not value.ndim else value


@_quiet
def _take_step(params: Tree, grads: Tree, state: Tree, *, rule: _Rule) -> tuple[Tree, Tree]:
    """One step of any optimizer: the update of every entry of grads, at the rates of this step."""
    where, options = rule.name, dict(rule.options)
    for name, tree in (("params", params), ("grads", grads), ("state", state)):
        _check_kind(where, name, tree, dict)
    own = {"step", "scale", *rule.remembers}
    if not own <= state.keys() <= own | _PLATEAU:
        raise ValueError(f"{where}: the state is not this optimizer's, it has {_names(state)}")
    step = _whole(where, "step in the state", _item(state["step"]), 0)
    for name, rate in rule.options.items():
        if callable(rate):
            options[name] = _number(where, f"{name} at step {step}", rate(step), **_OPTIONS[name])
    scale = _number(where, "scale in the state", _item(state["scale"]), minimum=0, maximum=1)
    options["lr"] *= scale
    memory = {quantity: state[quantity] for quantity in rule.remembers}
    params, memory = _update_tree(rule, "", params, grads, memory, options)
    return params, {**state, **memory, "step": np.array(step + 1)}


def _update_tree(
    rule: _Rule, path: str, params: Tree, grads: Tree, memory: Tree, options: Tree
) -> tuple[Tree, Tree]:
    if "key" in params:
        raise ValueError(
            f"{rule.name}: params hold a key; pass the plain params, not training(...)"
        )
    for quantity, tree in memory.items():
        if not isinstance(tree, dict):
            raise ValueError(f"{rule.name}: the state has no {quantity} of {path or 'params'}")
    params = dict(params)
    memory = {quantity: dict(tree) for quantity, tree in memory.items()}
    for name, g in grads.items():
        here = f"{path}/{name}" if path else name
        if name not in params:
            lack = f"grads have an entry {here!r} that params lack"
            raise ValueError(f"{rule.name}: {lack}; it is step(params, grads, state)")
        p = params[name]
        own = {quantity: tree.get(name) for quantity, tree in memory.items()}
        update = _update_tree if isinstance(g, dict) and isinstance(p, dict) else _update_entry
        params[name], own = update(rule, here, p, g, own, options)
        for quantity, value in own.items():
            memory[quantity][name] = value
    return params, memory


def _update_entry(rule: _Rule, path: str, p: Any, g: Any, memory: Tree, options: Tree) -> _Moved:
    """The update of one array, checked, and in the dtype of params."""
    where = f"{rule.name}: {path}"
    if not (type(p) is type(g) is np.ndarray and p.dtype == g.dtype and p.dtype.char in "fd"):
        _check_array(where, "params", p)
        _check_array(where, "grads", g)
        g = g.astype(p.dtype)
    if g.shape != p.shape:
        raise ValueError(f"{where}: grads have shape {g.shape}, but params {p.shape}")
    for quantity, value in memory.items():
        shape, kind = ((), "i") if quantity == "count" else (p.shape, "f")
        if not _is_array(value) or value.shape != shape or value.dtype.kind != kind:
            raise ValueError(f"{rule.name}: the state has no {quantity} of {path} and of its shape")
        if quantity == "count":
            _whole(where, "count in the state", value.item(), 0)
        elif value.dtype != p.dtype:
            memory = {**memory, quantity: value.astype(p.dtype)}
    single = p.ndim == 0  # NumPy would turn arrays without axes into numbers
    if single:
        p, g, memory = p[None], g[None], {name: m[None] for name, m in memory.items()}
    options = dict(options)
    decay = options.pop("weight_decay")
    if decay and rule.decoupled:
        p = p * (1 - options["lr"] * decay)
    elif decay:
        g = g + decay * p
    p, memory = rule.update(p, g, memory, **options)
    if single:
        p, memory = p[0, ...], {name: m[0, ...] for name, m in memory.items()}
    return p, memory


def _sgd(p: Array, g: Array, memory: Tree, *, lr: float, momentum: float, nesterov: bool) -> _Moved:
    if not memory:
        return p - lr * g, {}
    velocity = memory["velocity"] * momentum
    velocity += g
    change = g + momentum * velocity if nesterov else velocity
    change = change * -lr
    change += p
    return change, {"velocity": velocity}


def sgd(
    lr: Rate, momentum: Rate = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> Optimizer:
    """Stochastic gradient descent: v <- momentum · v + g, p <- p - lr · v.

    g includes weight_decay · p. With nesterov, p <- p - lr · (g + momentum · v). As PyTorch's
    SGD; momentum may be a schedule, as lr. ValueError for nesterov without momentum, a momentum
    outside [0, 1) or a negative rate or decay.
    """
    _check_kind("sgd", "nesterov", nesterov, bool)
    options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    optimizer = _optimizer("sgd", partial(_sgd, nesterov=nesterov), ["velocity"], options)
    if nesterov and not momentum:
        raise ValueError("sgd: nesterov needs a momentum above 0")
    return optimizer


def _adam(
    p: Array, g: Array, memory: Tree, *, lr: float, beta1: float, beta2: float, eps: float
) -> _Moved:
    count = memory["count"] + 1
    t = int(count.item())
    # In-place work on arrays made here halves the time: each pass over fresh memory is expensive.
    scratch = g * (1 - beta1)
    m = memory["m"] * beta1
    m += scratch
    np.square(g, out=scratch)
    scratch *= 1 - beta2
    v = memory["v"] * beta2
    v += scratch
    np.sqrt(v, out=scratch)
    unbias = math.sqrt(1 - beta2**t)
    scratch += eps * unbias
    np.divide(m, scratch, out=scratch)
    scratch *= -lr * unbias / (1 - beta1**t)
    scratch += p
    return scratch, {"m": m, "v": v, "count": np.asarray(count)}


def adam(
    lr: Rate = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Optimizer:
    """m <- β₁m + (1-β₁)g, v <- β₂v + (1-β₂)g², p <- p - lr · m̂ / (sqrt(v̂) + eps).

    m̂ = m/(1-β₁ᵗ) and v̂ = v/(1-β₂ᵗ), with t the number of steps of that entry; g includes
    weight_decay · p. As PyTorch's Adam (Kingma and Ba 2015). ValueError for a beta outside
    [0, 1), an eps that is not positive, a negative rate or decay.
    """
    options = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    return _optimizer("adam", _adam, ["m", "v", "count"], options)


def adamw(
    lr: Rate = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Optimizer:
    """`adam` after p <- p · (1 - lr · weight_decay), instead of decay in the gradient.

    As PyTorch's AdamW (Loshchilov and Hutter 2019). Raises the same errors as `adam`.
    """
    options = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    return _optimizer("adamw", _adam, ["m", "v", "count"], options, decoupled=True)


def _rmsprop(
    p: Array, g: Array, memory: Tree, *, lr: float, decay: float, eps: float, momentum: float
) -> _Moved:
    square_average = decay * memory["square_average"] + (1 - decay) * (g * g)
    change = g / (np.sqrt(square_average) + eps)
    if "velocity" not in memory:
        return p - lr * change, {"square_average": square_average}
    velocity = momentum * memory["velocity"] + change
    return p - lr * velocity, {"square_average": square_average, "velocity": velocity}


def rmsprop(
    lr: Rate = 0.01,
    decay: float = 0.99,
    eps: float = 1e-8,
    momentum: Rate = 0.0,
    weight_decay: float = 0.0,
) -> Optimizer:
    """s <- decay · s + (1 - decay) g², v <- momentum · v + g / (sqrt(s) + eps), p <- p - lr · v.

    g includes weight_decay · p; momentum may be a schedule. As PyTorch's RMSprop (Tieleman and
    Hinton 2012). ValueError for a decay or momentum outside [0, 1), an eps that is not positive,
    a negative rate or weight decay.
    """
    options = {"lr": lr, "decay": decay, "eps": eps, "weight_decay": weight_decay}
    options["momentum"] = momentum
    return _optimizer("rmsprop", _rmsprop, ["square_average", "velocity"], options)


def _adagrad(p: Array, g: Array, memory: Tree, *, lr: float, eps: float) -> _Moved:
    square_sum = memory["square_sum"] + g * g
    return p - lr * (g / (np.sqrt(square_sum) + eps)), {"square_sum": square_sum}


def adagrad(lr: Rate = 0.01, eps: float = 1e-10, weight_decay: float = 0.0) -> Optimizer:
    """s <- s + g², p <- p - lr · g / (sqrt(s) + eps); g includes weight_decay · p.

    As PyTorch's Adagrad (Duchi et al. 2011). ValueError for an eps that is not positive, a
    negative rate or decay.
    """
    options = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
    return _optimizer("adagrad", _adagrad, ["square_sum"], options)


def _adadelta(p: Array, g: Array, memory: Tree, *, lr: float, decay: float, eps: float) -> _Moved:
    square_average = decay * memory["square_average"] + (1 - decay) * (g * g)
    change = np.sqrt(memory["change_average"] + eps) / np.sqrt(square_average + eps) * g
    change_average = decay * memory["change_average"] + (1 - decay) * (change * change)
    memory = {"square_average": square_average, "change_average": change_average}
    return p - lr * change, memory


def adadelta(
    lr: Rate = 1.0, decay: float = 0.9, eps: float = 1e-6, weight_decay: float = 0.0
) -> Optimizer:
    """s <- decay · s + (1 - decay) g², d = sqrt(u + eps) / sqrt(s + eps) · g, p <- p - lr · d.

    u <- decay · u + (1 - decay) d²; g includes weight_decay · p. As PyTorch's Adadelta (Zeiler
    2012). ValueError for a decay outside [0, 1), an eps that is not positive, a negative rate or
    weight decay.
    """
    options = {"lr": lr, "decay": decay, "eps": eps, "weight_decay": weight_decay}
    return _optimizer("adadelta", _adadelta, ["square_average", "change_average"], options)


# === Schedules: step -> learning rate, the first step is 0 ======================================

Schedule = Callable[[int | np.integer[Any] | Array], float]


def _schedule(rule: Callable[..., float], **options: Any) -> Schedule:
    """step -> rule(step, **options), with these options and then the step checked."""
    where = rule.__name__.lstrip("_")
    for name, option in options.items():
        if name in ("factor", "decay", "rise"):
            options[name] = _number(where, name, option, minimum=0, maximum=1)
        elif name in ("every", "steps", "half_cycle"):
            options[name] = _whole(where, name, option, 1)
        elif isinstance(option, tuple):
            options[name] = tuple(_whole(where, "every milestone", step, 0) for step in option)
        elif not (name == "schedule" and callable(option)):
            options[name] = _number(where, name, option, **_NOT_NEGATIVE)
    return partial(_at_step, where=where, rule=partial(rule, **options))


def _at_step(step: Any, *, where: str, rule: Callable[..., float]) -> float:
    return rule(_whole(where, "step", _item(step), 0))


def _step_decay(step: int, *, lr: float, every: int, factor: float) -> float:
    return lr * factor ** (step // every)


def step_decay(lr: float, every: int, factor: float = 0.1) -> Schedule:
    """lr · factor^⌊step / every⌋. ValueError for options out of range, as in all schedules."""
    return _schedule(_step_decay, lr=lr, every=every, factor=factor)


def _multistep(step: int, *, lr: float, milestones: tuple[int, ...], factor: float) -> float:
    return lr * factor ** sum(step >= milestone for milestone in milestones)


def multistep(lr: float, milestones: Sequence[int] | Array, factor: float = 0.1) -> Schedule:
    """lr · factor^(number of milestones reached). ValueError for options out of range."""
    if isinstance(milestones, np.ndarray):
        milestones = milestones.tolist()
    if not isinstance(milestones, (tuple, list)):
        raise TypeError(f"multistep: milestones must be a sequence, got {_kind(milestones)}")
    return _schedule(_multistep, lr=lr, milestones=tuple(milestones), factor=factor)


def _exponential(step: int, *, lr: float, decay: float) -> float:
    return lr * decay**step


def exponential(lr: float, decay: float) -> Schedule:
    """lr · decay^step. ValueError for a negative lr or a decay outside [0, 1]."""
    return _schedule(_exponential, lr=lr, decay=decay)


def _between(start: float, end: float, progress: float) -> float:
    """From start (progress 0) to end (progress 1) along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _cosine(step: int, *, lr: float, steps: int, final: float) -> float:
    return _between(lr, final, step / steps) if step < steps else final


def cosine(lr: float, steps: int, final: float = 0.0) -> Schedule:
    """final + (lr - final) · (1 + cos(π · step / steps)) / 2, and `final` from `steps` on.

    Loshchilov and Hutter 2017, without restarts. ValueError for options out of range.
    """
    return _schedule(_cosine, lr=lr, steps=steps, final=final)


def _cyclic(step: int, *, low: float, high: float, half_cycle: int) -> float:
    position = step % (2 * half_cycle)
    return low + (high - low) * min(position, 2 * half_cycle - position) / half_cycle


def cyclic(low: float, high: float, half_cycle: int) -> Schedule:
    """A triangle: `low` at 0, `high` after `half_cycle` steps, then back to `low` (Smith 2017).

    ValueError for a negative rate or a half cycle below 1.
    """
    return _schedule(_cyclic, low=low, high=high, half_cycle=half_cycle)


def _one_cycle(step: int, *, peak: float, steps: int, rise: float) -> float:
    top = max(rise * steps - 1, 0)
    if step < top:
        return _between(peak / 25, peak, step / top)
    length = steps - 1 - top
    progress = min((step - top) / length, 1) if length > 0 else 1
    return _between(peak, peak / 250_000, progress)


def one_cycle(peak: float, steps: int, rise: float = 0.3) -> Schedule:
    """A cosine from peak/25 up to `peak` for `rise` of the steps, then one down to peak/250,000.

    Smith and Topin 2018, with the numbers of PyTorch's OneCycleLR; then it stays there.
    ValueError for options out of range.
    """
    return _schedule(_one_cycle, peak=peak, steps=steps, rise=rise)


def _warmup(step: int, *, schedule: Rate, steps: int) -> float:
    if callable(schedule):
        schedule = _number("warmup", f"schedule({step})", schedule(step), **_NOT_NEGATIVE)
    return schedule * (step + 1) / steps if step < steps else schedule


def warmup(schedule: Rate, steps: int) -> Schedule:
    """schedule(step) · min(1, (step + 1) / steps); `schedule` may be a number.

    ValueError for steps below 1 or a negative rate.
    """
    return _schedule(_warmup, schedule=schedule, steps=steps)


def reduce_on_plateau(
    state: Tree, loss: float, factor: float = 0.5, patience: int = 10, threshold: float = 1e-3
) -> Tree:
    """An optimizer's state whose "scale" was multiplied by `factor` if the loss has plateaued.

    That is after more than `patience` calls in a row in which the loss was not below
    best · (1 - threshold), as PyTorch's ReduceLROnPlateau counts them. The best loss and the
    count are kept in the state as "plateau_best" and "plateau_count". ValueError for options out of
    range or what is not an optimizer's state.
    """
    where = "reduce_on_plateau"
    if not isinstance(state, dict) or "scale" not in state:
        raise ValueError(f"{where}: expected an optimizer's state, got {_names(state)}")
    factor = _number(where, "factor", factor, minimum=0, maximum=1)
    patience = _whole(where, "patience", patience, 0)
    threshold = _number(where, "threshold", threshold, minimum=0, below=1)
    loss = _float(where, "loss", loss)
    scale = _number(where, "scale in the state", _item(state["scale"]), minimum=0, maximum=1)
    best = _float(where, "plateau_best in the state", _item(state.get("plateau_best", math.inf)))
    count = _whole(where, "plateau_count in the state", _item(state.get("plateau_count", 0)), 0)
    if loss < best * (1 - threshold):
        best, count = loss, 0
    else:
        count += 1
    if count > patience:
        scale, count = scale * factor, 0
    plateau = {"plateau_best": np.array(best), "plateau_count": np.array(count)}
    return {**state, "scale": np.array(scale), **plateau}


# === Gradient checking ==========================================================================

# Every layer of a network is checked by itself, with the input that it gets there, and the layers
# inside of others first. So what is found wrong is its own fault, not that of its neighbors.

_SAMPLES = 40  # entries of one array that are compared one by one, when it has more
_STEP = 3e-6  # near the cube root of float64's precision, where central differences are best
_REPEATS = 10  # calls that must all give the same bits


class _Part(NamedTuple):
    """A layer of a network, and what it was given there."""

    path: str  # the names on the way to it, as in "block: branch: "
    layer: Any
    fresh: Any  # a copy that was never called; None where there can be none
    inputs: Tree  # {"params": params, "x": x}
    y: Any  # the bits of what forward returned there
    error: Exception | None  # or raised
    made_of_layers: bool  # which are parts as well

    def refuse(self, words: str) -> NoReturn:
        raise AssertionError(f"check_gradients: {self.path}{words}")


def _copy(value: Any, writeable: bool = False) -> Any:
    """A copy of all arrays in dicts, tuples and lists; by default writing to them is an error."""
    if isinstance(value, np.ndarray):
        frozen = isinstance(value.base, np.ndarray) and not value.base.flags.writeable
        if writeable or not frozen:
            value = value.copy(order="K")
        value.flags.writeable = writeable
        return value if writeable else value.view()  # of which nobody can change that flag
    if isinstance(value, dict):
        tree = copy(value)
        tree.update({name: _copy(part, writeable) for name, part in value.items()})
        return tree
    if isinstance(value, (tuple, list)):
        parts = [_copy(part, writeable) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _bits(value: Any) -> Any:
    """What is equal for two values only if all their bits are."""
    if isinstance(value, (dict, tuple, list)):
        return {name: _bits(part) for name, part in _parts(value).items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype, value.shape, value.tobytes()
    return repr(value) if isinstance(value, (int, float, complex, str)) else id(value)


def _leaves(path: str, tree: Any) -> Tree:
    """{path: leaf} of what may be a tree, with any names, or a single leaf."""
    if not isinstance(tree, dict):
        return {path: tree}
    parts = [_leaves(f"{path}/{name}", part) for name, part in tree.items()]
    return {own: leaf for part in parts for own, leaf in part.items()}


# --- the layers of a network, and what each is given ---


def _note(
    params: Tree, x: Data, *, path: str, layer: Any, fresh: Any, forward: Forward, parts: Any
) -> tuple[Data, Any]:
    """The forward of a layer, which adds it and its inputs to the parts, after those inside."""
    inputs, before = _copy({"params": params, "x": x}), len(parts)
    results: Any = None
    error = None
    try:
        results = forward(*_copy(inputs).values())
        return results
    except Exception as caught:
        error = caught
        raise
    finally:
        y = _bits(_parts(results).get("[0]"))
        part = _Part(path, layer, fresh, inputs, y, error, len(parts) > before)
        shapes = {name: getattr(leaf, "shape", None) for name, leaf in _leaves("x", x).items()}
        parts.setdefault(f"{path}{shapes}", part)


def _watch(layer: Any, path: str, parts: dict[str, _Part]) -> Any:
    """The layer, but it and the layers that it is made of add themselves to the parts."""
    forward, fresh = layer.forward, None
    if isinstance(forward, partial):
        forward = partial(forward.func, *forward.args, **_watch_all(forward.keywords, path, parts))
    with contextlib.suppress(Exception):
        fresh = deepcopy(layer)
    known = {"path": path, "layer": layer, "fresh": fresh, "forward": forward, "parts": parts}
    watched = Layer(identity_init, partial(_note, **known), layer.backward)
    with contextlib.suppress(Exception):  # whatever else it has, such as options, it still has
        other = copy(layer)
        if other is not layer:
            object.__setattr__(other, "forward", watched.forward)
            return other
    return watched


def _watch_all(options: dict[Any, Any], path: str, parts: dict[str, _Part]) -> dict[Any, Any]:
    """Options of a layer, with every layer among them watched."""
    watched = dict(options)
    for name, option in options.items():
        if hasattr(option, "forward") and hasattr(option, "backward"):
            watched[name] = _watch(option, f"{path}{name}: ", parts)
        elif isinstance(option, dict):
            watched[name] = _watch_all(option, path, parts)
        elif type(option) in (tuple, list):
            several = _watch_all(dict(enumerate(option)), path, parts)
            watched[name] = type(option)(several.values())
    return watched


# --- the rules of the pair ---


def _written_into(function: Callable[..., Any], arguments: Tree) -> str | None:
    """The argument that a function cannot do without writing into, if there is one."""
    for name in (None, *arguments):
        given = {own: _copy(value, own != name) for own, value in arguments.items()}
        try:
            function(*given.values())
        except Exception as error:
            if re.search("read-only|WRITEABLE", str(error)):
                return name or "what an earlier call was given"
    return None


def _call(part: _Part, what: str, arguments: Tree, writeable: bool = False) -> tuple[Any, Any]:
    """The two results of a layer's function; refused if it writes or returns something else."""
    function, given = getattr(part.layer, what), _copy(arguments, writeable)
    try:
        results = function(*given.values())
    except Exception as error:
        if name := _written_into(function, arguments):
            part.refuse(f"{what} writes into {name}")
        part.refuse(f"{what} raises {type(error).__name__}: {error}")
    for name, value in given.items() if writeable else ():
        if _bits(value) != _bits(arguments[name]):
            part.refuse(f"{what} writes into {name}")
    try:
        return _two_results(what, results, arguments["params"])
    except TypeError as error:
        part.refuse(str(error))


def _forward(part: _Part, inputs: Tree, writeable: bool = False) -> tuple[Data, Any]:
    y, cache = _call(part, "forward", inputs, writeable)
    for path, leaf in (_leaves("y", y) or {"y": y}).items():
        if not _is_array(leaf) or leaf.dtype != np.float64:
            part.refuse(f"{path} must be float64 like x, got {_kind(leaf)}")
    return y, cache


def _backward(part: _Part, params: Tree, cache: Any, dy: Data, writeable: bool = False) -> Tree:
    arguments = {"params": params, "cache": cache, "dy": dy}
    dx, grads = _call(part, "backward", arguments, writeable)
    return {"dx": dx, "grads": {} if grads is None else grads}


def _both_ways(part: _Part, inputs: Tree, dy: Data, writeable: bool = False) -> Tree:
    """{"y": y, "cache": cache, "dx": dx, "grads": grads}; backward is given no key."""
    y, cache = _forward(part, inputs, writeable)
    params = {name: value for name, value in inputs["params"].items() if name != "key"}
    return {"y": y, "cache": cache, **_backward(part, params, cache, dy, writeable)}


def _check_bits(part: _Part, results: Tree, expected: Tree, when: str) -> None:
    for name, result in results.items():
        if name != "cache" and _bits(result) != expected[name]:
            function = "forward" if name == "y" else "backward"
            part.refuse(f"{function} returns different {name} {when}")


def _check_purity(part: _Part, other: Tree, dy: Data) -> Tree:
    """What the layer returns; refused if earlier calls change that, or later ones."""
    inputs, again = part.inputs, "when it is called again"
    with contextlib.suppress(Exception):  # the layer may refuse what is not its real input
        _both_ways(part, other, dy)
    first = _both_ways(part, inputs, dy, writeable=True)
    _gradients(part, inputs, first)
    bits = {name: _bits(result) for name, result in first.items()}
    _check_bits(part, {"y": first["y"]}, {"y": part.y}, again)
    with contextlib.suppress(Exception):
        _both_ways(part, other, tree_map(np.negative, dy))
    for name, result in first.items():
        if _bits(result) != bits[name]:
            part.refuse(f"a later call overwrites the {name} of an earlier one")
    keyed = "when params hold a key" if "key" in inputs["params"] else again
    _check_bits(part, _backward(part, inputs["params"], first["cache"], dy), bits, keyed)
    for _ in range(1 if part.made_of_layers else _REPEATS):
        _check_bits(part, _both_ways(part, inputs, dy), bits, again)
    if part.fresh is not None:
        fresh = _both_ways(part._replace(layer=part.fresh), inputs, dy)
        _check_bits(part, fresh, bits, "than a copy that was never called before")
    lazy = Layer(identity_init, part.layer.forward, partial(_without_dx, part.layer.backward))
    grads = _backward(part._replace(layer=lazy), inputs["params"], first["cache"], dy)["grads"]
    _check_bits(part, {"grads": grads}, bits, "with need_dx=False")
    return first


def _gradients(part: _Part, inputs: Tree, results: Tree) -> Tree:
    """{name: (array, its gradient)} of x and all that is trained; 0 for what grads lack."""
    gradients = {**_leaves("dx", results["dx"]), **_leaves("grads", results["grads"])}
    arrays = {**_leaves("dx", inputs["x"]), **_leaves("grads", inputs["params"])}
    untrained = {f"grads/{path}" for path, *_ in _statistics(inputs["params"], results["cache"])}
    found = {}
    for name, array in arrays.items():
        if name in untrained or getattr(array, "dtype", None) != np.float64:
            continue
        gradient = gradients.pop(name, None if name[0] == "d" else np.zeros(array.shape))
        if getattr(gradient, "dtype", None) != np.float64:
            part.refuse(f"{name} must be a float64 array, got {_kind(gradient)}")
        if gradient.shape != array.shape:
            part.refuse(f"{name} has shape {gradient.shape}, expected {array.shape}")
        found[name] = array, np.asarray(gradient)
    for name, gradient in gradients.items():
        if name[0] == "g":
            part.refuse(f"grads have {name[6:]!r}, but params have no trained entry of this name")
        if gradient is not None:
            part.refuse(f"{name} must be None, got {_kind(gradient)}")
    return found


def _at(position: Any, array: Array) -> str:
    return f"[{', '.join(str(int(i)) for i in np.unravel_index(position, array.shape))}]"


def _rounding(part: _Part, first: Tree, dy: Data) -> dict[str, float]:
    """{name: the rounding error to expect in it}; refused if backward is not linear in dy.

    Times a power of two only exponents change. Times 3 it is all rounded anew, which shows how much
    that is: a lot, where terms cancel.
    """
    expected, rounding = _gradients(part, part.inputs, first), {}
    for factor in (-(2.0**20), 2.0**-20, 3.0):
        times = tree_map(partial(np.multiply, factor), dy)
        scaled = {**first, **_backward(part, part.inputs["params"], first["cache"], times)}
        for name, (_, gradient) in _gradients(part, part.inputs, scaled).items():
            once = expected[name][1]
            error = np.nan_to_num(np.abs(gradient / factor - once), nan=0, posinf=0)
            rounding[name] = 10 * float(error.max(initial=0))
            largest = np.abs(once[np.isfinite(once)]).max(initial=1e-300)
            if factor != 3 and rounding[name] > 1e-4 * largest:
                worst = int(error.argmax())
                both = f"{once.flat[worst]:.10g} for dy, but {gradient.flat[worst]:.10g} for"
                words = f"{both} {factor:.7g} dy, so backward is not linear in dy"
                part.refuse(f"{name}{_at(worst, once)} is {words}")
    return rounding


# --- central differences ---


def _vector(y: Data) -> Array:
    """All entries of an array, or of those of a tree, one after the other."""
    return np.concatenate([leaf.ravel() for leaf in _leaves("y", y).values()])


class _Probe(NamedTuple):
    """Every y · r as a function of one of the inputs, whose slopes are to be measured."""

    part: _Part
    inputs: Tree
    name: str  # of the gradient, as "dx" or "grads/hidden/W"
    array: Array  # the input that is moved
    y: Array
    r: Array

    def slopes(self, positions: Any, change: Any, step: float) -> Array:
        """The slopes to one side, in the direction of the change."""
        moved = self.array.copy(order="K")
        moved.flat[positions] += step * change
        what, slash, path = self.name.partition("/")
        inputs = _replace(self.inputs, {"dx": "x", "grads": "params"}[what] + slash + path, moved)
        y, _ = self.part.layer.forward(*inputs.values())
        return (_vector(y) - self.y) * self.r / step

    def sides(self, position: int, step: float) -> tuple[float, float, float]:
        """The lower and the higher slope of each output, summed; how far rounding moves them."""
        right, left = self.slopes(position, 1.0, step), -self.slopes(position, -1.0, step)
        low, high = float(np.minimum(left, right).sum()), float(np.maximum(left, right).sum())
        weighted = self.y / step * self.r
        noise = np.linalg.norm(weighted) + 100 * np.linalg.norm(weighted[right != 0])
        noise += abs(self.array.flat[position]) / step * max(-low, high) + 100 * np.abs(right).sum()
        # As exact as x is what the layer computes inside, such as the 1 + tanh of gelu.
        noise += self.scale() / step * np.abs(self.r).max(initial=0)
        return low, high, float(noise) * float(np.finfo(np.float64).eps)

    def scale(self) -> float:
        return float(np.abs(self.array).max(initial=0)) or 1.0


def _error(probe: _Probe, gradient: Array, direction: Array, positions: Array) -> float:
    """How far the gradient is off along a direction, as far as these positions are concerned."""
    change = direction[positions]
    step = _STEP * probe.scale() / math.sqrt(len(positions))
    slopes = probe.slopes(positions, change, step) - probe.slopes(positions, -change, step)
    return float(slopes.sum()) / 2 - float(gradient[positions] @ change)


def _suspect(probe: _Probe, gradient: Array, direction: Array) -> int:
    """A position that is probably wrong, found by bisection.

    One wrong entry changes the slope along a direction that moves every entry; the half whose
    slope is further off is searched next, so few slopes suffice, however many entries there are.
    """
    positions = np.arange(len(gradient))
    total = _error(probe, gradient, direction, positions)
    while len(positions) > 1:
        first, second = np.array_split(positions, 2)
        of_first = _error(probe, gradient, direction, first)
        if abs(of_first) >= abs(total - of_first):
            positions, total = first, of_first
        else:
            positions, total = second, total - of_first
    return int(positions[0])


def _difference(
    probe: _Probe, position: int, gradient: float, rtol: float, rounding: float
) -> float | None:
    """The central difference, if the gradient disagrees with it."""
    low, high, error = probe.sides(position, _STEP * probe.scale())
    largest = max(-low, high, abs(gradient))
    smooth = max(high - low, 100 * error) <= 1e-3 * largest or largest == 0
    if smooth and abs((low + high) / 2 - gradient) <= rtol * largest < math.inf:
        return None
    slope, agrees = _with_many_steps(probe, position, gradient, rtol, rounding)
    return None if agrees and math.isfinite(gradient) else slope


def _with_many_steps(
    probe: _Probe, position: int, gradient: float, rtol: float, rounding: float
) -> tuple[float, bool]:
    """The most certain central difference, and whether the gradient agrees with a certain one.

    A slope is certain if it hardly changes from one step to the next: large steps reach over a kink
    nearby, small ones drown in rounding. Where the gap between the slopes of both sides stays as
    well, there is a kink, such as relu's at 0, and whatever lies between them, output by output, is
    right.
    """
    scale, largest_y = probe.scale(), float(np.abs(probe.y[np.isfinite(probe.y)]).max(initial=0))
    top = 256 * _STEP * min(max(scale, 1.0, largest_y), 1e30)
    bottom = max(1e-30, 1e-15 * abs(probe.array.flat[position]))
    steps = top / 16.0 ** np.arange(2 + max(0, math.log(top / bottom, 16)))
    low, high, error = np.array([probe.sides(position, step) for step in steps]).T
    slopes, gaps, sizes = (low + high) / 2, high - low, np.maximum(-low, high)[1:]
    changes = np.append(np.abs(np.diff(slopes)), 0)
    seen = np.fmax(sizes, abs(gradient))
    seen[seen == 0] = np.fmax.reduce(sizes)
    uncertain = (changes[:-1] + error[1:]) / seen
    uncertain = np.where(np.isfinite(uncertain), uncertain, np.inf)
    best = int(np.argmin(uncertain))
    rounding += 1e-16 * largest_y / scale
    if 0.5 < uncertain[best] < math.inf:  # all that can be said is how large it is
        return 0.0, abs(gradient) <= 10 * np.fmax.reduce(sizes) + np.fmin.reduce(error) + rounding
    tolerance = rtol * seen + error[1:] + rounding + np.fmax(changes[:-1], changes[1:])
    kink = gaps[1:] > gaps[:-1] / 4
    least, most = np.where(kink, (low[1:], high[1:]), slopes[1:])
    agrees = (least - tolerance <= gradient) & (gradient <= most + tolerance)
    certain = (uncertain <= 10 * rtol) | (np.arange(len(sizes)) == best)
    return float(slopes[best + 1]), bool((agrees & certain).any())


def _mismatch(probe: _Probe, gradient: Array, rtol: float, rounding: float, key: Key) -> str | None:
    """Where backward and central differences disagree, if they do."""
    flat = gradient.reshape(-1)
    samples = _SAMPLES // 4 if probe.part.made_of_layers else _SAMPLES
    positions = np.flatnonzero(~np.isfinite(flat))[:1]
    if flat.size <= samples:
        positions = np.arange(flat.size)
    elif not positions.size:
        generator = _generator(key)
        direction = generator.choice([-1.0, 1.0], flat.size) * generator.uniform(0.9, 1, flat.size)
        chosen = generator.choice(flat.size, samples, replace=False)
        positions = np.unique(np.append(chosen, _suspect(probe, flat, direction)))
    for position in positions:
        slope = _difference(probe, position, float(flat[position]), rtol, rounding)
        if slope is not None:
            both = f"{flat[position]:.10g} by backward, but {slope:.10g} by central differences"
            return f"{probe.name}{_at(position, gradient)} is {both}"
    return None


def _compare(
    part: _Part,
    inputs: Tree,
    dy: Data,
    rtol: float,
    rounding: dict[str, float],
    key: Key,
    only_large: bool = False,
) -> str | None:
    """Where any of the gradients disagrees with central differences."""
    results = _both_ways(part, inputs, dy)
    y, r = _vector(results["y"]), _vector(dy)
    gradients = _gradients(part, inputs, results)
    for index, (name, (array, gradient)) in enumerate(gradients.items()):
        probe, own = _Probe(part, inputs, name, array, y, r), fold_key(key, index)
        if only_large and array.size <= _SAMPLES:
            continue
        if wrong := _mismatch(probe, gradient, rtol, rounding[name], own):
            return wrong
    return None


# --- all of it ---


def _moved(generator: np.random.Generator, leaf: Any) -> Any:
    """Floats that are a little higher; whole numbers in another order."""
    if not isinstance(leaf, np.ndarray) or leaf.dtype.kind != "f":
        return np.roll(leaf, 1, axis=0) if np.ndim(leaf) else leaf
    largest = float(np.abs(leaf).max(initial=0)) or 1.0
    return np.asarray(leaf + 0.01 * largest * generator.random(leaf.shape))


def _nearby(inputs: Tree, key: Key) -> Tree:
    """Other params and x, close to these; the same key for training."""
    moved: Tree = tree_map(partial(_moved, _generator(key)), inputs)
    if "key" in inputs["params"]:
        moved["params"]["key"] = inputs["params"]["key"]
    return moved


def _if_float(moved: Any, leaf: Any) -> Any:
    """What floats were moved to; of all else the leaf itself."""
    return moved if getattr(leaf, "dtype", None) == np.float64 else leaf


def _check_part(part: _Part, rtol: float, key: Key) -> None:
    """Refuse a layer that is wrong by itself, at the inputs that it was given."""
    if part.error is not None:  # which may be the fault of what came before
        if name := _written_into(part.layer.forward, part.inputs):
            part.refuse(f"forward writes into {name}")
        return
    shapes = tree_map(np.shape, _forward(part, part.inputs, writeable=True)[0])
    dy = _copy(tree_map(np.asarray, tree_map(_generator(key).standard_normal, shapes)))
    other = _nearby(part.inputs, key)
    first = _check_purity(part, other, dy)
    rounding = _rounding(part, first, dy)
    wrong = _compare(part, part.inputs, dy, rtol, rounding, key)
    # Beside them there are no kinks: those of several layers may meet in one point, where no rule
    # is right, and many of one mislead the search for a wrong entry of a large array.
    if not wrong or part.made_of_layers:
        beside = tree_map(_if_float, other, part.inputs)
        with contextlib.suppress(AssertionError):  # the layer may refuse what is not its real input
            if np.isfinite(_vector(_forward(part, beside)[0])).all():
                wrong = _compare(part, beside, dy, rtol, rounding, key, only_large=not wrong)
    if wrong:
        part.refuse(wrong)


def _float64(leaf: Any) -> Any:
    """A leaf in float64 if it holds floats; others, like keys, as they are."""
    array = np.asarray(leaf)
    return array.astype(np.float64) if array.dtype.kind == "f" else leaf


@_quiet
def check_gradients(
    layer: Differentiable, params: Tree | None, x: Data, rtol: float = 1e-5, key: Key = 0
) -> None:
    """Compare `backward` with central differences in float64, for dx and every entry of grads.

    `layer` is anything with forward(params, x) -> (y, cache) and backward(params, cache, dy) ->
    (dx, grads); x and y are arrays or dicts of arrays. Each layer of a network is checked by
    itself, with the input that it gets there, then the network as a whole; of a combinator of your
    own those layers that are keyword options of its forward, a partial. What is compared is the
    gradient of Σ y · r, r random from `key`. An array of many entries is sampled, and searched by
    bisection for a wrong one, at x and slightly beside it. For training mode give
    `training(params, key)`.

    AssertionError names the layer that is wrong, the entry, its index and both values; where y has
    a kink, any slope between those of its two sides is right. It is also raised for a layer that
    writes into its arguments or into earlier results, gives other bits when it is called again, is
    not linear in dy, or returns the wrong number of things or one of the wrong kind, shape or name:
    dx and grads are float64, grads hold what is trained, and dx of whole numbers is None.
    """
    rtol = _number("check_gradients", "rtol", rtol, above=0)
    _check_layer("check_gradients", "layer", layer, ("forward", "backward"))
    _arrays("check_gradients", "x", {"x": x})
    params = {} if params is None else params
    _check_kind("check_gradients", "params", params, dict)
    inputs = _copy(tree_map(_float64, {"params": params, "x": x}))
    parts: dict[str, _Part] = {}
    watched = _watch(layer, "", parts)
    # First with other inputs: what a layer keeps of its first call will then be wrong.
    for given in (_nearby(inputs, key), inputs):
        parts.clear()
        with contextlib.suppress(Exception):
            watched.forward(*given.values())
    for part in parts.values():
        _check_part(part, rtol, key)
    if part.error is not None:
        raise part.error


# === Training helpers ===========================================================================

Loss = Callable[[Data, Data], tuple[float, Data]]
ValueAndGrad = Callable[[Tree, Data, Data], tuple[float, Tree, Any]]


@_quiet
def _value_and_grad(
    params: Tree, x: Data, target: Data, *, net: Differentiable, loss: Loss
) -> tuple[float, Tree, Any]:
    prediction, cache = _two_results("forward", net.forward(params, x), params)
    value, dprediction = loss(prediction, target)
    results = _without_dx(net.backward, params, cache, dprediction)
    _, grads = _two_results("backward", results, params)
    return value, grads, cache


def value_and_grad(net: Differentiable, loss: Loss) -> ValueAndGrad:
    """The pure function (params, x, target) -> (loss, grads, cache) of a network and a loss.

    x, prediction and target may be dicts of arrays. grads are those of the params alone: dx is not
    computed. `cache` is that of the forward pass, for `update_statistics`. TypeError for what is
    not a network or not a function.
    """
    _check_layer("value_and_grad", "net", net, ("forward", "backward"))
    _check_kind("value_and_grad", "loss", loss, Callable)
    return partial(_value_and_grad, net=net, loss=loss)


def _only_statistics(cache: Any) -> Tree:
    """What a cache lists under "statistics", at any depth, with its "count", and nothing else."""
    parts = _parts(cache)
    found: Tree = {name: own for name, part in parts.items() if (own := _only_statistics(part))}
    if isinstance(parts.get("statistics"), dict):
        found |= {"statistics": parts["statistics"], "count": np.array(parts.get("count", 1))}
    return found


def _shard_gradients(part: Any, *, gradients: ValueAndGrad) -> tuple[float, Tree, Tree]:
    """The loss, grads and statistics of one part, times its share of the batch."""
    share, params, x, target = part
    loss, grads, cache = gradients(params, x, target)
    times = partial(_times, factor=share)
    return share * loss, tree_map(times, grads), tree_map(times, _only_statistics(cache))


def _data_parallel(
    params: Tree, x: Data, target: Data, *, gradients: ValueAndGrad, shards: int, map_parts: Any
) -> tuple[float, Tree, Tree]:
    _check_kind("data_parallel", "params", params, dict)
    data, counts = {"x": x, "target": target}, {}
    for name, array in _flatten("data_parallel", "data", data).items():
        if not _is_array(array) or not array.ndim:
            raise TypeError(f"data_parallel: {name} must be an array (N, ...), got {_kind(array)}")
        counts[name] = len(array)
    if len({*counts.values()}) > 1:
        raise ValueError(f"data_parallel: the numbers of samples differ, {counts}")
    samples = max(counts.values(), default=0)
    count = max(1, min(shards, samples))
    ends = [samples * shard // count for shard in range(count + 1)]
    parts = []
    for shard, (start, stop) in enumerate(itertools.pairwise(ends)):
        key = {"key": fold_key(params["key"], shard)} if "key" in params else {}
        part = tree_map(itemgetter(slice(start, stop)), data)
        share = (stop - start) / max(samples, 1)
        parts.append((share, {**params, **key}, part["x"], part["target"]))
    results = list(map_parts(partial(_shard_gradients, gradients=gradients), parts))
    if len(results) != count:
        raise ValueError(f"data_parallel: map returned {len(results)} results for {count} parts")
    losses, grads, statistics = zip(*results, strict=True)
    return sum(losses), tree_add(*grads), tree_add(*statistics)


def data_parallel(
    value_and_grad: ValueAndGrad,
    shards: int,
    map: Callable[..., Iterable[Any]] = map,  # noqa: A002 (it stands in for the built-in)
) -> ValueAndGrad:
    """The same function (params, x, target) -> (loss, grads, cache), computed in parts.

    The batch is cut into `shards` parts of nearly equal size. `map` computes them: the built-in
    one by one, `ThreadPoolExecutor(2).map` in parallel; the result depends on `shards` alone. Loss,
    grads and what the cache lists under "statistics" are means over the parts, weighted by their
    sizes and added in order; nothing else of the cache remains. Each part has a key of its own,
    folded from params["key"]; batch norm normalizes each part by itself, and so is the weighted
    mean of a loss taken. x and target are arrays or dicts of arrays. ValueError where they differ
    in length.
    """
    if not callable(value_and_grad) or not callable(map):
        raise TypeError("data_parallel: value_and_grad and map must be functions")
    shards = _whole("data_parallel", "shards", shards, 1)
    return partial(_data_parallel, gradients=value_and_grad, shards=shards, map_parts=map)


def accuracy(logits: Array, labels: Array) -> float:
    """The fraction of labels (N, ...) whose logit is the largest of its position in (N, ..., K).

    A position with a nan among its logits counts as wrong. Of equal logits the first one counts.
    ValueError for shapes that do not fit or labels out of range.
    """
    _check_prediction("accuracy", "logits", logits, classes=True)
    _check_labels("accuracy", labels, logits)
    rows = logits.reshape(labels.size, -1)
    best = rows.argmax(axis=1)  # the first nan, where there is one
    right = (best == labels.ravel()) & ~np.isnan(rows[np.arange(len(best)), best])
    return float(np.mean(right))


def batches(count: int, size: int, key: Key, drop_last: bool = False) -> Iterator[Array]:
    """Index arrays of `size` entries (the last may have fewer), each of 0 ... count-1 once.

    The order is drawn from `key`. With `drop_last` a smaller last one is left out. ValueError for a
    count or a size below 1, and where nothing remains.
    """
    count = _whole("batches", "count", count, 1)
    size = _whole("batches", "size", size, 1)
    _check_kind("batches", "drop_last", drop_last, bool)
    stop = count - count % size if drop_last else count
    if not stop:
        raise ValueError(f"batches: {count} samples make no whole batch of {size}")
    order = _generator(key).permutation(count)
    return iter([order[start : start + size] for start in range(0, stop, size)])


# === Augmentation ===============================================================================


def _spline(length: int, knots: int) -> Array:
    """(length, knots): the cubic B-splines of evenly spaced knots, at the pixels of a line."""
    at = np.linspace(0, knots - 3, length)[:, None] - np.arange(-1, knots - 1)
    near = np.abs(at)
    return np.where(near < 1, 2 / 3 - near**2 + near**3 / 2, np.maximum(2 - near, 0) ** 3 / 6)


def _sample(images: Array, rows: Array, columns: Array) -> Array:
    """images (N, C, H, W) at the points (N, Ho, Wo), bilinear; zero outside."""
    N, C, H, W = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows = np.clip(rows + 1, 0, H + 0.999)  # every point lies among the padded pixels
    columns = np.clip(columns + 1, 0, W + 0.999)
    top, left = np.minimum(rows.astype(np.intp), H), np.minimum(columns.astype(np.intp), W)
    down = (rows - top).astype(images.dtype)[:, None]
    right = (columns - left).astype(images.dtype)[:, None]
    image = np.arange(N).reshape(N, 1, 1, 1) * C + np.arange(C).reshape(C, 1, 1)
    corner = image * ((H + 2) * (W + 2)) + (top * (W + 2) + left)[:, None]
    flat = padded.ravel()
    upper = flat[corner] * (1 - right) + flat[corner + 1] * right
    lower = flat[corner + W + 2] * (1 - right) + flat[corner + W + 3] * right
    return upper * (1 - down) + lower * down


@_quiet
def augment(
    key: Key,
    images: Array,
    shift: float = 2.0,
    rotation: float = 10.0,
    scale: float = 0.1,
    stretch: float = 0.1,
    elastic: float = 0.0,
    flip: float = 0.0,
) -> Array:
    """Every image (N, C, H, W) randomly shifted, rotated, scaled and stretched, bilinearly.

    Drawn from `key`, uniformly: the shift along each axis within ±`shift` pixels, the angle within
    ±`rotation` degrees, the size within 1 ± `scale`, the aspect ratio within 1 ± `stretch`.
    `elastic` is the standard deviation in pixels of a smooth displacement (cubic B-splines with a
    knot every 7 pixels; after Simard et al. 2003). Each image is flipped left to right with
    probability `flip`. Pixels from outside the image are zero.
    ValueError for an option outside its range or images that are not (N, C, H, W).
    """
    _check_array("augment", "images", images)
    if images.ndim != 4 or 0 in images.shape[1:]:
        got = f"got shape {images.shape}{_axes_hint([_IMAGE], images.shape)}"
        raise ValueError(f"augment: images must be (N, C, H, W), {got}")
    shift = _number("augment", "shift", shift, minimum=0, maximum=1e9)
    rotation = _number("augment", "rotation", rotation, minimum=0, maximum=180)
    scale = _number("augment", "scale", scale, minimum=0, below=1)
    stretch = _number("augment", "stretch", stretch, minimum=0, below=1)
    elastic = _number("augment", "elastic", elastic, minimum=0, maximum=1e9)
    flip = _number("augment", "flip", flip, minimum=0, maximum=1)
    N, _, H, W = images.shape
    generator = _generator(key)
    draws = generator.uniform(-1, 1, (5, N, 1, 1)).astype(np.float32)
    angle = draws[2] * math.radians(rotation)
    size = 1 + scale * draws[3]
    ratio = np.sqrt(1 + stretch * draws[4])
    y = np.arange(H, dtype=np.float32)[:, None] - (H - 1) / 2
    x = np.arange(W, dtype=np.float32) - (W - 1) / 2
    y, x = y - shift * draws[0], x - shift * draws[1]
    y, x = (
        (y * np.cos(angle) - x * np.sin(angle)) / (size * ratio) + (H - 1) / 2,
        (y * np.sin(angle) + x * np.cos(angle)) / size * ratio + (W - 1) / 2,
    )
    if elastic:
        down, across = (_spline(length, 4 + length // 7) for length in (H, W))
        knots = generator.standard_normal((2, N, down.shape[1], across.shape[1]))
        # At a pixel the squares of a line's splines add up to 0.48 on average.
        bend = (elastic / 0.48) * (down @ knots @ across.T).astype(np.float32)
        y, x = y + bend[0], x + bend[1]
    if flip:
        images = np.where(generator.random((N, 1, 1, 1)) < flip, images[..., ::-1], images)
    return _sample(images, y, x)


# === Exchange with PyTorch, and a summary =======================================================

# Of each layer: the axes of a sample, which axis of the first entry is as long as "in", and every
# entry of PyTorch's = ours, ".T" where it is transposed, nothing where we do not keep it. What are
# two entries there and one here is their sum.
_KERNEL, _AFFINE = "weight=W bias=b", "weight=gamma bias=beta"
_RECURRENT = "weight_ih_l0=W.T weight_hh_l0=U.T bias_ih_l0=b bias_hh_l0="
_QKV = "in_proj_weight=qkv/W.T in_proj_bias=qkv/b out_proj.weight=out/W.T out_proj.bias=out/b"
_TORCH: dict[str, tuple[str, int, str]] = {
    "linear": ("in", 0, "weight=W.T bias=b"),
    "batch_norm": ("in", 0, f"{_AFFINE} running_mean=mean running_var=var num_batches_tracked="),
    **dict.fromkeys(("layer_norm", "group_norm"), ("in", 0, _AFFINE)),
    "embedding": ("", 0, "weight=W"),
    "position_embedding": ("", 0, "none"),
    **dict.fromkeys(("rnn", "lstm"), ("T in", 0, f"{_RECURRENT}b")),
    "gru": ("T in", 0, f"{_RECURRENT}c"),
    "attention": ("T in", 0, _QKV),
    "conv1d": ("in T", 1, _KERNEL),
    "conv2d": ("in H W", 1, _KERNEL),
    "conv2d_transpose": ("in H W", 0, _KERNEL),
}


def _option(function: Any, name: str) -> Any:
    """What a function of a layer was given as an option, or None."""
    return getattr(function, "keywords", {}).get(name)


def _kind_of(layer: LayerLike) -> str:
    """The name of the function of this file that made a layer, or of its class."""
    return repr(layer).partition("(")[0] if isinstance(layer, Layer) else type(layer).__name__


def _layers_in(net: LayerLike, path: str = "") -> list[tuple[str, Any]]:
    """(path, layer) of every layer that is not made of others; a path ends with "/"."""
    layers = _option(net.forward, "layers")
    if not isinstance(layers, dict):
        return [(path, net)]
    return [pair for name in layers for pair in _layers_in(layers[name], f"{path}{name}/")]


def _without_memory(key: Key, shape: Shape) -> Array:
    """Zeros that share one number: an initializer where the shapes alone are of interest."""
    return np.broadcast_to(np.float32(0), shape)


@_quiet
def _exchange(where: str, net: Any, source: Tree, ours: bool) -> Tree:
    """The entries of a network from a flat dict, `ours` or PyTorch's, by their other names."""
    _check_layer(where, "net", net)
    target: Tree = {}
    used = set()
    for path, layer in _layers_in(net):
        sample, axis, entries = _TORCH.get(_kind_of(layer), ("", 0, ""))
        if entries == "none" or _option(layer.forward, "order") == -1:
            raise ValueError(f"{where}: {path[:-1] or 'net'}: PyTorch has no {layer!r}")
        initial: Tree = {}
        init = layer.init
        if _option(init, "init") is not None:
            init = partial(init, init=_without_memory)
        for theirs, _, entry in (pair.partition("=") for pair in entries.split()):
            own, transposed = entry.removesuffix(".T"), entry.endswith(".T")
            names = path + own, path.replace("/", ".") + theirs
            name, other = names if ours else names[::-1]
            if own and initial and own not in initial:
                continue  # it has no bias
            if own:
                array = _entry(where, source, name)
                shape = array.shape[::-1] if transposed and not ours else array.shape
                what = f"{where}: {name} {array.shape}"
                if not array.size:  # (10**9, 0) is no memory, 10**9 features are
                    raise ValueError(f"{what} does not fit {layer!r}")
                if not initial:
                    features = (*shape, 1, 1)[axis] * (_option(layer.init, "groups") if axis else 1)
                    example = tuple(features if a == "in" else 10**6 for a in sample.split())
                    initial = tree_flatten(_call_child(what, "init", init, 0, example)[0])
                if own not in initial or shape != initial[own].shape:
                    raise ValueError(f"{what} does not fit {layer!r}")
                kind = array.dtype.newbyteorder("=")
                moved = np.array(array.T if transposed else array, kind, order="C")
                moved = np.zeros_like(moved) if name in used else moved  # the second of two biases
                target[other] = target[other] + moved if other in target else moved
            elif ours:
                target[other] = np.zeros((), np.int64)
            used.add(name)
    if unused := sorted(map(str, source.keys() - used)):
        raise ValueError(f"{where}: no layer that PyTorch has takes the entries {unused}")
    return target


def to_torch(net: LayerLike, params: Tree) -> dict[str, Array]:
    """{"0.weight": array, ...}: what state_dict() of the same network in PyTorch holds.

    Our path a/b/W is a.b.weight there; the second bias of rnn and lstm is 0. ValueError for params
    that do not fit and layers that PyTorch has not, or not alone: `lstm(8, reverse=True)`.
    """
    return _exchange("to_torch", net, _flatten("to_torch", "params", params), ours=True)


def from_torch(net: LayerLike, state: dict[str, Array]) -> Tree:
    """The params of `net` with the values of a state_dict(), {name: tensor.numpy(), ...}.

    The inverse of `to_torch`. ValueError for an entry that is missing, unknown or does not fit the
    options of its layer; TypeError for one that is not an array of float32 or float64.
    """
    _check_kind("from_torch", "state", state, dict)
    return tree_unflatten(_exchange("from_torch", net, state, ours=False))


def _noting_init(key: Key, shape: Any, *, layer: Any, path: str, rows: list[Any]) -> Any:
    """`layer.init`, which also adds the rows of `summary` for this layer, or for those in it."""
    layers = _option(layer.init, "layers")
    if not isinstance(layers, dict):
        params, out = _two_results("init", layer.init(key, shape), {})
        rows.append((path[1:], _kind_of(layer), str(out), f"{count_parameters(params):,}"))
        return params, out
    noting = {}
    for name, child in layers.items():
        init = partial(_noting_init, layer=child, path=f"{path}/{name}", rows=rows)
        noting[name] = Layer(init, child.forward, child.backward)
    return layer.init(key, shape, layers=noting)


def summary(net: LayerLike, shape: Any) -> str:
    """A table: path, kind, output shape and parameters of every layer, and the total.

    Layers made of others have no line; `shape` is what `init` takes. Running statistics count.
    """
    _check_layer("summary", "net", net)
    rows: list[Any] = []
    params, _ = _noting_init(0, shape, layer=net, path="", rows=rows)
    rows.append(("total", "", "", f"{count_parameters(params):,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([*map(str.ljust, row[:3], widths), row[3].rjust(widths[3])] for row in rows)
    return "\n".join(map("  ".join, lines))


# === Not pure: files and memory =================================================================

# Modules that only one of these functions needs are imported there, so `import purenn` is quick.

_NPY: Any = np.lib.format  # without types in older versions of NumPy


def _path(where: str, path: Any) -> str:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{where}: the path must be a string or a Path, got {_kind(path)}")
    return os.fsdecode(path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file to write to, which replaces `path` once all of it is on the disk.

    `with replacing("results.csv") as file: file.write(b"...")`. It is written beside `path` as a
    .tmp file, flushed, synced and renamed, so that there is always either the whole old file or the
    whole new one; after an error, the old one. OSError as from `open`, of a missing directory with
    its name.
    """
    path = _path("replacing", path)
    temporary = f"{path}.{os.getpid()}.{threading.get_ident()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        if not isinstance(error, OSError) or error.filename != temporary:
            raise
        reason, folder = error.strerror, os.path.dirname(path)
        if folder and not os.path.exists(folder):
            reason, path = "there is no such directory", folder
        raise type(error)(error.errno, reason, path) from None


def _digest(archive: Any) -> bytes:
    """A checksum of a zip file's list of contents, which has none of its own, for its comment."""
    import hashlib

    contents = [(member.filename, member.file_size, member.CRC) for member in archive.infolist()]
    return b"purenn " + hashlib.sha256(repr(contents).encode()).hexdigest().encode()


def save(path: Path, tree: Tree) -> None:
    """Write a tree of arrays to a file that `load` and `np.load` read (.npz, uncompressed).

    The file is written beside `path` and then renamed, so that an older one is never lost.
    TypeError for leaves that are not arrays of numbers; ValueError for params that hold a key and
    for a name with NUL in it, of more than 65,000 bytes or nested deeper than 100; OSError if it
    cannot be written.
    """
    import zipfile

    path, flat = _path("save", path), _arrays("save", "tree", tree)
    for name in flat:
        if name.split("/")[-1] == "key":
            raise ValueError("save: params hold a key; save the plain params, not training(...)")
        if "\0" in name or len(name.encode()) > 65_000 or name.count("/") > 100:
            raise ValueError(f"save: a name must be short and without NUL, got {name[:50]!r}")
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, leaf in flat.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                _NPY.write_array(member, np.asarray(leaf), allow_pickle=False)
        archive.comment = _digest(archive)


@contextlib.contextmanager
def _blame_file(path: str) -> Iterator[None]:
    """Turn what goes wrong while a file is read into a ValueError of one line with its path."""
    try:
        yield
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{path}: cannot be read: {reason}") from error


def _open(path: str) -> IO[bytes]:
    """The file, open for reading; folders, pipes and devices are refused: some have no end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("it is not a file")
    return open(path, "rb")


_NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|][biuf]\d+)', 'fortran_order': (True|False),"
    rb" 'shape': \(((?:\d+L?, ?)+(?:\d+L?)?|)\),? ?\}\s*"  # L: from Python 2
)


def _read_npy(member: IO[bytes], size: int) -> Array:
    """The array in an untrusted .npy file of `size` bytes.

    NumPy parses the header as Python, and a short text can then take a lot of stack and memory.
    """
    import io
    import shutil

    version = _NPY.read_magic(member)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"unknown version {version} of the .npy format")
    length = int.from_bytes(member.read(2 * version[0]), "little")
    text = member.read(min(length, 10_000))
    header = _NPY_HEADER.fullmatch(text)
    if not header or len(text) != length:
        raise ValueError(f"{member.name}: its header does not describe an array of numbers")
    dtype = np.dtype(header[1].decode())
    shape = tuple(map(int, re.findall(rb"\d+", header[3])))
    needed, data = math.prod(shape) * dtype.itemsize, io.BytesIO()
    if needed != size - member.tell():
        raise ValueError(f"an array of {dtype} and shape {shape} does not fit in {size} bytes")
    shutil.copyfileobj(member, data)  # to the end, where checksums are
    if data.tell() != needed:
        raise ValueError(f"shape {shape} needs {needed} bytes, but it has {data.tell()}")
    array = np.frombuffer(data.getbuffer(), dtype)
    array = array.reshape(shape, order="F" if header[2] == b"True" else "C")
    return array.astype(dtype.newbyteorder("="), copy=False)


def read_npz(path: Path, *, ratio: float = 1) -> dict[str, Array]:
    """{name: array} of a .npz file that unpacks to at most `ratio` times its size.

    ValueError (with the path) for a file that is not one, damaged, truncated or malicious; no code
    in it is ever run. FileNotFoundError where there is none.
    """
    import zipfile

    path = _path("read_npz", path)
    ratio = _number("read_npz", "ratio", ratio, minimum=1)
    arrays: dict[str, Array] = {}
    with _blame_file(path), _open(path) as file, zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if archive.comment.startswith(b"purenn ") and archive.comment != _digest(archive):
            raise ValueError("its list of contents is damaged")
        if sum(member.file_size for member in members) > ratio * os.path.getsize(path):
            raise ValueError("its declared sizes exceed what the file can hold")
        for info in members:
            name, _, ending = info.filename.rpartition(".")
            if not name or ending != "npy" or name in arrays or info.comment:
                raise ValueError(f"unexpected member {info.filename!r}")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{info.filename!r} has an unsupported compression")
            with archive.open(info) as member:
                arrays[name] = _read_npy(member, info.file_size)
    return arrays


def load(path: Path) -> Tree:
    """The tree of arrays that `save` wrote.

    ValueError (with the path) for a damaged, truncated or malicious file; no code in it is ever
    run. FileNotFoundError where there is none.
    """
    path = _path("load", path)
    arrays = read_npz(path)
    with _blame_file(path):
        return tree_unflatten(arrays)


def keep_freed_memory() -> None:
    """Have the C library keep the memory of freed arrays for the next ones (glibc only).

    By default glibc returns large blocks to the system, so that every training step page-faults its
    arrays in again. Call it once, before training: it applies to the whole process, and does
    nothing with another C library.
    """
    with contextlib.suppress(Exception):  # no such library, or a constant that it does not know
        import ctypes

        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: free memory at the end of the heap
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD: larger blocks are still mapped on their own
