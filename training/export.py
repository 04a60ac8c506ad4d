"""Networks for other runtimes: ONNX, from a table with a function for every layer (needs onnx)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

import purenn as nn
from training.checkpoints import Run
from training.classification import load_network
from training.options import Options

Chosen = TypeVar("Chosen", bound=Options)
OPSET, IR_VERSION = 15, 8  # of 2021, so that older runtimes load it as well
METADATA = ("classes", "sample_shape", "pixel_range", "feature_mean", "feature_std")
SWAPPED = [1, 0, 2]  # batch and time


def import_onnx() -> Any:
    """The package onnx; ValueError if it is missing."""
    try:
        import onnx.helper
        import onnx.numpy_helper
    except ImportError:
        raise ValueError("an export needs the package onnx: pip install onnx") from None
    return onnx


# ------------------------------------------------------------------------------------------------
# A graph that grows node by node
# ------------------------------------------------------------------------------------------------


class Value(NamedTuple):
    """A tensor of a graph: its name, and the shape of one sample."""

    name: str
    shape: tuple[int, ...]


class Graph(NamedTuple):
    """What the layers add their nodes to."""

    onnx: Any  # the package
    nodes: list[Any]
    constants: list[Any]
    whole: set[str]  # the inputs of whole numbers
    path: str  # of the layer that adds, "block/branch/"

    def add(self, op: str, *inputs: Any, **attributes: Any) -> str:
        """Add a node; gives the name of its output.

        Its inputs are values, names of outputs, "" for none, and constants: arrays and numbers.
        """
        name, names = f"{self.path}{op}_{len(self.nodes)}", []
        for position, value in enumerate(inputs):
            if isinstance(value, (float, np.ndarray)):
                array = np.asarray(value, np.float32 if np.result_type(value).kind == "f" else None)
                tensor = self.onnx.numpy_helper.from_array(array, f"{name}_{position}")
                self.constants.append(tensor)
                value = tensor.name
            names.append(value.name if isinstance(value, Value) else value)
        self.nodes.append(self.onnx.helper.make_node(op, names, [name], name, **attributes))
        return name


def one_sample(graph: Graph, x: Value) -> np.ndarray:
    """A batch of one for a layer, of the type that it takes."""
    return np.zeros((1, *x.shape), np.int64 if x.name in graph.whole else np.float32)


def add_layer(graph: Graph, layer: nn.LayerLike, params: nn.Tree, x: Any) -> Any:
    """y of a layer, a Value or a tree of them, for such an x; its nodes are added to the graph."""
    bound = layer.forward if isinstance(layer.forward, partial) else partial(layer.forward)
    where, add = f"to_onnx: {graph.path[:-1] or 'net'}", NODES.get(bound.func)
    if add is None:
        raise ValueError(f"{where}: no ONNX is known for {layer!r}")
    if "layers" in bound.keywords:
        if unknown := sorted(params.keys() - bound.keywords["layers"].keys()):
            raise ValueError(f"{where}: no layer takes the entries {unknown} of params")
        return add(graph, params, x, **bound.keywords)
    if bound.func is nn.embedding_forward:
        graph.whole.add(x.name)
    try:
        y, _ = layer.forward(params, nn.tree_map(partial(one_sample, graph), x))
    except (ValueError, TypeError) as error:
        raise type(error)(f"{where}: {error}") from None
    return Value(add(graph, params, x, **bound.keywords), np.shape(y)[1:])


# ------------------------------------------------------------------------------------------------
# The layers: (graph, params, x, options) -> the name of y
# ------------------------------------------------------------------------------------------------


def unchanged(graph: Graph, params: nn.Tree, x: Value, **options: Any) -> str:
    """y = x."""
    return x.name


def single(graph: Graph, params: nn.Tree, x: Value, *, op: str, **attributes: Any) -> str:
    """One node, whose attributes are called as our options are."""
    return graph.add(op, x, **attributes)


def linear(graph: Graph, params: nn.Tree, x: Value | str) -> str:
    """y = x W + b."""
    y = graph.add("MatMul", x, params["W"])
    return graph.add("Add", y, params["b"]) if "b" in params else y


def leaky_relu(graph: Graph, params: nn.Tree, x: Value, *, slope: float) -> str:
    """y = x where x > 0, else slope · x."""
    return graph.add("LeakyRelu", x, alpha=slope)


def gelu(graph: Graph, params: nn.Tree, x: Value, *, exact: bool) -> str:
    """y = x · (1 + erf(x/√2))/2, or with the tanh that is close to this erf."""
    if exact:
        erf = graph.add("Erf", graph.add("Mul", x, math.sqrt(0.5)))
    else:
        cubic = graph.add("Mul", graph.add("Mul", graph.add("Mul", x, x), x), 0.044715)
        sum_ = graph.add("Mul", graph.add("Add", x, cubic), math.sqrt(2 / math.pi))
        erf = graph.add("Tanh", sum_)
    return graph.add("Mul", x, graph.add("Mul", graph.add("Add", erf, 1.0), 0.5))


def silu(graph: Graph, params: nn.Tree, x: Value) -> str:
    """y = x · sigmoid(x)."""
    return graph.add("Mul", x, graph.add("Sigmoid", x))


def reshape(graph: Graph, params: nn.Tree, x: Value, *, size: tuple[int, ...]) -> str:
    """y (N, *size)."""
    return graph.add("Reshape", x, np.array([0, *size]))  # 0: as it is


def permute(graph: Graph, params: nn.Tree, x: Value, *, axes: tuple[int, ...]) -> str:
    """y, with the axes of x in another order."""
    return graph.add("Transpose", x, perm=[0, *(axis + 1 for axis in axes)])


def last(graph: Graph, params: nn.Tree, x: Value) -> str:
    """y = x[:, -1]."""
    return graph.add("Gather", x, np.array(-1), axis=1)


def batch_norm(graph: Graph, params: nn.Tree, x: Value, *, eps: float) -> str:
    """y, with the running statistics."""
    entries = (params[name] for name in ("gamma", "beta", "mean", "var"))
    return graph.add("BatchNormalization", x, *entries, epsilon=eps)


def normalized(graph: Graph, x: Value | str, eps: float) -> str:
    """x with mean 0 and variance 1 over the last axis; runtimes refuse ops of their own for 1."""
    centered = graph.add("Sub", x, graph.add("ReduceMean", x, axes=[-1]))
    var = graph.add("ReduceMean", graph.add("Mul", centered, centered), axes=[-1])
    return graph.add("Div", centered, graph.add("Sqrt", graph.add("Add", var, eps)))


def scaled(graph: Graph, params: nn.Tree, y: str, axes: int) -> str:
    """gamma · y + beta, along the axis that so many others follow."""
    gamma, beta = (params[name].reshape(-1, *[1] * axes) for name in ("gamma", "beta"))
    return graph.add("Add", graph.add("Mul", y, gamma), beta)


def layer_norm(graph: Graph, params: nn.Tree, x: Value, *, eps: float) -> str:
    """y, normalized over the last axis."""
    return scaled(graph, params, normalized(graph, x, eps), 0)


def group_norm(graph: Graph, params: nn.Tree, x: Value, *, groups: int, eps: float) -> str:
    """y, normalized over each group of channels."""
    parts = normalized(graph, graph.add("Reshape", x, np.array([0, groups, -1])), eps)
    y = graph.add("Reshape", parts, np.array([0, *x.shape]))
    return scaled(graph, params, y, len(x.shape) - 1)


def embedding(graph: Graph, params: nn.Tree, x: Value) -> str:
    """y = W[x], for an input of whole numbers."""
    return graph.add("Gather", params["W"], x, axis=0)


def position_embedding(graph: Graph, params: nn.Tree, x: Value) -> str:
    """y = x + P[:T]."""
    return graph.add("Add", x, params["P"][: x.shape[0]])


def recurrent(
    graph: Graph,
    params: nn.Tree,
    x: Value,
    *,
    op: str,
    gates: Sequence[int],
    order: int,
    **attributes: Any,
) -> str:
    """RNN, GRU or LSTM; `gates` are ours in its order, and `order` is -1 from the end."""
    units = len(params["U"])
    columns = np.concatenate([np.arange(units) + gate * units for gate in gates])
    W, U = (params[name][:, columns].T[None] for name in "WU")
    biases = [params["b"], params.get("c", np.zeros_like(params["b"]))]
    b = np.concatenate([bias[columns] for bias in biases])[None]
    attributes |= {"direction": "forward" if order == 1 else "reverse", "hidden_size": units}
    y = graph.add(op, graph.add("Transpose", x, perm=SWAPPED), W, U, b, **attributes)
    y = graph.add("Squeeze", y, np.array([1]))  # its axis of directions
    return graph.add("Transpose", y, perm=SWAPPED)


def attention(graph: Graph, params: nn.Tree, x: Value, *, heads: int, causal: bool) -> str:
    """y = m W + b of "out", m = softmax(q kᵀ / √d) v for each head."""
    T, D = x.shape
    d = D // heads
    qkv = graph.add("Reshape", linear(graph, params["qkv"], x), np.array([0, T, 3, heads, d]))
    qkv = graph.add("Transpose", qkv, perm=[2, 0, 3, 1, 4])
    q, k, v = (graph.add("Gather", qkv, np.array(part), axis=0) for part in range(3))
    q = graph.add("Mul", q, d**-0.5)
    p = graph.add("MatMul", q, graph.add("Transpose", k, perm=[0, 1, 3, 2]))
    if causal:
        p = graph.add("Add", p, np.triu(np.full((T, T), -np.inf), 1))
    m = graph.add("MatMul", graph.add("Softmax", p, axis=-1), v)
    m = graph.add("Reshape", graph.add("Transpose", m, perm=[0, 2, 1, 3]), np.array([0, T, D]))
    return linear(graph, params["out"], m)


def ends_last(sides: Sequence[tuple[int, int]]) -> list[int]:
    """The padding of ONNX, (starts, ends), from one (start, end) for each axis."""
    return [side for part in zip(*sides, strict=True) for side in part]


def convolution(
    graph: Graph, params: nn.Tree, x: Value | str, *, op: str, groups: int, moves: nn.Tree
) -> str:
    """Conv or ConvTranspose, of images or of sequences."""
    W, moves = params["W"], dict(moves)
    attributes = {"strides": moves.pop("stride"), "dilations": moves.pop("dilation")}
    attributes |= {"pads": ends_last(moves.pop("padding")), "group": groups, **moves}
    weights = [params[name] for name in ("W", "b") if name in params]
    return graph.add(op, x, *weights, kernel_shape=W.shape[2:], **attributes)


def conv2d_transpose(
    graph: Graph, params: nn.Tree, x: Value | str, *, groups: int, moves: nn.Tree
) -> str:
    """ConvTranspose. A whole stride of output_padding is a pixel of zeros at the end of x.

    ONNX Runtime 1.23 leaves that part of y undefined.
    """
    zeros, rest = zip(*map(divmod, moves["output_padding"], moves["stride"]), strict=True)
    if any(zeros):
        x = graph.add("Pad", x, np.array([0] * 6 + [*zeros]))
    moves = {**moves, "output_padding": rest}
    return convolution(graph, params, x, op="ConvTranspose", groups=groups, moves=moves)


def pool(
    graph: Graph,
    params: nn.Tree,
    x: Value,
    *,
    op: str,
    size: tuple[int, int],
    stride: tuple[int, int],
    padding: Sequence[tuple[int, int]],
    **attributes: Any,
) -> str:
    """MaxPool or AveragePool."""
    pads = ends_last(padding)
    return graph.add(op, x, kernel_shape=size, strides=stride, pads=pads, **attributes)


def global_avg_pool2d(graph: Graph, params: nn.Tree, x: Value) -> str:
    """y (N, C), the means of the channels."""
    return graph.add("Flatten", graph.add("GlobalAveragePool", x))


def upsample2d(graph: Graph, params: nn.Tree, x: Value, *, factor: tuple[int, int]) -> str:
    """y, with each pixel several times."""
    scales = np.array([1.0, 1.0, *factor])
    how = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return graph.add("Resize", x, "", scales, mode="nearest", **how)


# --- layers made of layers: -> y, a value or a tree of values ---


def add_each(graph: Graph, params: nn.Tree, x: dict[str, Any], layers: nn.Tree) -> dict[str, Any]:
    """{name: y} of several layers that take {name: x}."""
    y = {}
    for name, layer in layers.items():
        inside = graph._replace(path=f"{graph.path}{name}/")
        y[name] = add_layer(inside, layer, params.get(name, {}), x[name])
    return y


def sequential(graph: Graph, params: nn.Tree, x: Any, *, layers: nn.Tree) -> Any:
    """One layer after the other."""
    for name, layer in layers.items():
        x = add_each(graph, params, {name: x}, {name: layer})[name]
    return x


def heads(graph: Graph, params: nn.Tree, x: Any, *, layers: nn.Tree) -> dict[str, Any]:
    """{name: y}, all of the same x."""
    return add_each(graph, params, dict.fromkeys(layers, x), layers)


def add_sum(graph: Graph, one: Value, other: Value) -> Value:
    """The sum of two values."""
    return Value(graph.add("Add", one, other), one.shape)


def residual(graph: Graph, params: nn.Tree, x: Any, *, layers: nn.Tree) -> Any:
    """y = branch(x) + shortcut(x), arrays or dicts of them."""
    return nn.tree_map(partial(add_sum, graph), *heads(graph, params, x, layers=layers).values())


def concatenate(graph: Graph, params: nn.Tree, x: Any, *, layers: nn.Tree, axis: int) -> Value:
    """The outputs of all branches side by side; x is one for all, or {name: x}."""
    x = x if isinstance(x, dict) else dict.fromkeys(layers, x)
    parts = list(add_each(graph, params, x, layers).values())
    joined = np.concatenate([np.empty((1, *part.shape), bool) for part in parts], axis)
    return Value(graph.add("Concat", *parts, axis=axis), joined.shape[1:])


NODES: dict[Any, Callable[..., Any]] = {
    nn.linear_forward: linear,
    nn.identity_forward: unchanged,
    nn.dropout_forward: unchanged,
    nn.flatten_forward: partial(single, op="Flatten"),
    nn.reshape_forward: reshape,
    nn.permute_forward: permute,
    nn.last_forward: last,
    nn.relu_forward: partial(single, op="Relu"),
    nn.leaky_relu_forward: leaky_relu,
    nn.elu_forward: partial(single, op="Elu"),
    nn.sigmoid_forward: partial(single, op="Sigmoid"),
    nn.tanh_forward: partial(single, op="Tanh"),
    nn.softplus_forward: partial(single, op="Softplus"),
    nn.gelu_forward: gelu,
    nn.silu_forward: silu,
    nn.softmax_forward: partial(single, op="Softmax", axis=-1),
    nn.log_softmax_forward: partial(single, op="LogSoftmax", axis=-1),
    nn.batch_norm_forward: batch_norm,
    nn.layer_norm_forward: layer_norm,
    nn.group_norm_forward: group_norm,
    nn.embedding_forward: embedding,
    nn.position_embedding_forward: position_embedding,
    nn.rnn_forward: partial(recurrent, op="RNN", gates=[0]),
    nn.gru_forward: partial(recurrent, op="GRU", gates=[1, 0, 2], linear_before_reset=1),
    nn.lstm_forward: partial(recurrent, op="LSTM", gates=[0, 3, 1, 2]),
    nn.attention_forward: attention,
    nn.conv1d_forward: partial(convolution, op="Conv"),
    nn.conv2d_forward: partial(convolution, op="Conv"),
    nn.conv2d_transpose_forward: conv2d_transpose,
    nn.max_pool2d_forward: partial(pool, op="MaxPool"),
    nn.avg_pool2d_forward: partial(pool, op="AveragePool", count_include_pad=1),
    nn.global_avg_pool2d_forward: global_avg_pool2d,
    nn.upsample2d_forward: upsample2d,
    nn.sequential_forward: sequential,
    nn.residual_forward: residual,
    nn.concatenate_forward: concatenate,
    nn.heads_forward: heads,
}


# ------------------------------------------------------------------------------------------------
# Networks
# ------------------------------------------------------------------------------------------------


def tensor_info(graph: Graph, name: str, value: Value) -> Any:
    """The name, type and shape of an input or output of the graph; N is free."""
    helper, kinds = graph.onnx.helper, graph.onnx.TensorProto
    kind = kinds.INT64 if value.name in graph.whole else kinds.FLOAT
    return helper.make_tensor_value_info(name, kind, ["N", *value.shape])


def to_onnx(net: nn.LayerLike, params: nn.Tree, shape: Any) -> Any:
    """An onnx.ModelProto that computes `net.forward(params, x)[0]`, at inference.

    `shape` is what `init` takes, the shape of one sample or a dict of shapes. The input is called
    "x", float32 (N, *shape) with N free, or int64 for an embedding; the output "y". Of a dict x the
    inputs are "x/name", of a dict y the outputs "y/name". Constants are float32.
    ValueError for a layer that is not in the table NODES (where you may add your own), for params
    that do not fit or hold a key, and where the package onnx is missing; TypeError for a shape
    that is not one.
    """
    onnx = import_onnx()
    if any(name.split("/")[-1] == "key" for name in nn.tree_flatten(params)):
        raise ValueError("to_onnx: params hold a key; export the plain params, not training(...)")
    inputs = nn.tree_flatten({"x": shape})
    for name, own in inputs.items():
        if not isinstance(own, (tuple, list)):
            raise TypeError(f"to_onnx: the shape of a sample must be a tuple, got {own!r}")
        inputs[name] = Value(name, tuple(own))
    graph = Graph(onnx, [], [], set(), "")
    y = add_layer(graph, net, params, nn.tree_unflatten(inputs)["x"])
    outputs = nn.tree_flatten({"y": y})
    graph.nodes.extend(
        onnx.helper.make_node("Identity", [value.name], [name]) for name, value in outputs.items()
    )
    body = onnx.helper.make_graph(
        graph.nodes,
        "network",
        [tensor_info(graph, name, value) for name, value in inputs.items()],
        [tensor_info(graph, name, value) for name, value in outputs.items()],
        graph.constants,
    )
    opset = onnx.helper.make_opsetid("", OPSET)
    return onnx.helper.make_model(
        body,
        opset_imports=[opset],
        ir_version=IR_VERSION,
        producer_name="purenn",
        producer_version=nn.__version__,
    )


# ------------------------------------------------------------------------------------------------
# --export
# ------------------------------------------------------------------------------------------------


def describe_network(run: Run) -> str:
    """What x must be, and what y is: the text in the file."""
    shape, classes = ", ".join(map(str, run.sample_shape)), run.classes
    x, y = "", ""
    if run.feature_mean:
        x = ": features as (feature - feature_mean) / feature_std"
    if run.pixel_range:
        black, white = run.pixel_range
        x = f": pixels (channels, height, width) from {black:g} for black to {white:g} for white"
    if classes is not None:
        y = f": logits, whose softmax are the probabilities of the classes {', '.join(classes)}"
    return (
        f"{run.script}: x is float32 (N, {shape}){x}. y is float32 (N, {len(classes or 'y')}){y}."
    )


def check_target(path: str) -> None:
    """ValueError for a file that cannot be written, or that should not be replaced by a network."""
    folder = os.path.dirname(path) or "."
    if not path.endswith(".onnx"):
        raise ValueError(f"--export: expected the name of a file that ends in .onnx, got {path}")
    if not os.path.isdir(folder):
        raise ValueError(f"{path}: there is no folder {folder}")
    if os.path.isdir(path):
        raise ValueError(f"{path}: it is a folder")


def export_run(
    options: Options, record: type[Chosen], build: Callable[[Chosen, int], nn.Layer]
) -> None:
    """Write the network of --out to the file of --export, with what it takes and gives."""
    path = options.export or ""
    if options.out is None:
        raise ValueError("--export needs --out, the folder of the run whose network it takes")
    check_target(path)
    run, _, net, params = load_network(options.out, record, build)
    model = to_onnx(net, params, tuple(run.sample_shape))
    model.doc_string = describe_network(run)
    about = {name: json.dumps(getattr(run, name)) for name in METADATA}
    import_onnx().helper.set_model_props(model, about)
    with nn.replacing(path) as file:
        file.write(model.SerializeToString())
    print(f"{path}: {model.doc_string}")
