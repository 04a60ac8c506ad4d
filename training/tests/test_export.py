"""Networks for other runtimes: what ONNX Runtime computes is what purenn does."""

import functools
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import purenn as nn
from test_purenn import LAYERS, as_dtype, leaves, with_values
from training import classification, export
from training.tests.conftest import SCRIPTS, train_cnn_on, train_on


@pytest.fixture(scope="module")
def onnx():
    """The package onnx."""
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is optional")
    return pytest.importorskip("onnx", reason="onnx is optional")


def run_onnx(model, x):
    """{name: output} of ONNX Runtime, for {name: input}."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model)
    outputs = [output.name for output in session.get_outputs()]
    return dict(zip(outputs, session.run(None, x), strict=True))


def values(sample, *, batch, seed, entry):
    """A batch of values for a layer of the table."""
    x = entry.x(np.random.default_rng(seed), (batch, *sample))
    return x.astype(np.float32 if x.dtype.kind == "f" else np.int64)


def assert_same(onnx, layer, params, shape, make):
    """A layer and its export give the same for batches of 1, 2 and 5 of what `make` makes."""
    model = export.to_onnx(layer, params, shape)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    for batch in (1, 2, 5):
        x = nn.tree_map(functools.partial(make, batch=batch), shape)
        expected = leaves({"y": layer.forward(params, x)[0]})
        found = run_onnx(model.SerializeToString(), leaves({"x": x}))
        assert found.keys() == expected.keys()
        for name, y in expected.items():
            assert (found[name].shape, found[name].dtype) == (y.shape, np.float32)
            atol = 1e-6 + 1e-5 * np.abs(y).max()
            np.testing.assert_allclose(found[name], y, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_gives_the_same_in_onnx_runtime(name, onnx):
    entry = LAYERS[name]

    @settings(max_examples=settings.default.max_examples // 2)
    @given(entry.samples, st.integers(0, 10**6))
    def check(sample, seed):
        layer, shape = sample
        params = as_dtype(with_values(layer.init(seed, shape)[0], seed), np.float32)
        make = functools.partial(values, seed=seed, entry=entry)
        assert_same(onnx, layer, params, shape, make)

    check()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [  # what a few examples do not meet for certain
        (nn.attention(2, causal=True), (4, 6)),
        (nn.gelu(exact=True), (20,)),
        (nn.lstm(3, reverse=True), (4, 2)),
        (nn.gru(3), (4, 2)),
        (nn.group_norm(2), (4, 3)),
        (nn.conv1d(4, 3, dilation=2, padding="causal", groups=2), (2, 7)),
        (nn.conv2d(4, (2, 4), padding="same", groups=2), (2, 5, 6)),
        (nn.conv2d_transpose(2, 3, stride=(1, 2), dilation=3, output_padding=2), (2, 4, 4)),
        (nn.avg_pool2d(3, stride=2, padding=1), (2, 5, 6)),
        (nn.upsample2d((2, 3)), (2, 3, 3)),
    ],
    ids=repr,
)
def test_options_that_matter_give_the_same_in_onnx_runtime(layer, shape, onnx):
    params = with_values(layer.init(0, shape)[0], 0)
    assert_same(
        onnx, layer, params, shape, functools.partial(values, seed=1, entry=LAYERS["linear"])
    )


def test_every_layer_is_in_the_table():
    functions = {name.removesuffix("_forward") for name in vars(nn) if name.endswith("_forward")}
    in_table = {function.__name__.removesuffix("_forward") for function in export.NODES}
    assert in_table == functions & {*nn.__all__} == LAYERS.keys()


def test_inputs_of_both_kinds_and_sums_of_several_outputs(onnx):
    net = nn.sequential(
        nn.concatenate(
            word=nn.sequential(nn.embedding(3, 2), nn.flatten()), number=nn.sequential(nn.linear(4))
        ),
        nn.residual(nn.heads(a=nn.linear(2), b=nn.heads(c=nn.gelu())), several_heads()),
    )
    shape = {"word": (5,), "number": (2, 3)}
    with pytest.raises(ValueError, match="concatenate"):
        net.init(0, shape)
    shape["number"] = (3,)
    params = with_values(net.init(0, shape)[0], 1)

    def make(sample, batch):
        x = np.random.default_rng(batch).integers(0, 3, (batch, *sample))
        return x if sample == (5,) else x.astype(np.float32)

    assert_same(onnx, net, params, shape, make)
    model = export.to_onnx(net, params, shape)
    types = {value.name: value.type.tensor_type for value in model.graph.input}
    assert {name: kind.elem_type for name, kind in types.items()} == {
        "x/word": onnx.TensorProto.INT64,
        "x/number": onnx.TensorProto.FLOAT,
    }
    assert [value.name for value in model.graph.output] == ["y/a", "y/b/c"]
    assert types["x/word"].shape.dim[0].dim_param == "N"


def several_heads():
    return nn.heads(a=nn.linear(2), b=nn.heads(c=nn.tanh()))


def test_weights_in_float64_are_exported_in_float32(onnx):
    net = nn.sequential(nn.embedding(4, 3), nn.layer_norm(), nn.rnn(2))
    params = as_dtype(with_values(net.init(0, (3,))[0], 2), np.float64)
    model = export.to_onnx(net, params, (3,))
    assert {tensor.data_type for tensor in model.graph.initializer} == {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.INT64,
    }
    x = np.array([[0, 3, 1]])
    (y,) = run_onnx(model.SerializeToString(), {"x": x}).values()
    np.testing.assert_allclose(y, net.forward(params, x)[0], rtol=1e-5, atol=1e-6)


class Own:
    """A layer of a user's."""

    def init(self, key, shape):
        return {}, shape

    def forward(self, params, x):
        return x, x

    def backward(self, params, cache, dy):
        return dy, {}

    def __repr__(self):
        return "Own()"


INNER = nn.sequential(nn.linear(3), nn.linear(2))


@pytest.mark.parametrize(
    ("net", "change", "words"),
    [
        (Own(), {}, "net: no ONNX is known for Own()"),
        (
            nn.sequential(nn.tanh(), block=nn.residual(nn.sequential(own=Own()))),
            {},
            "block/branch/own: no ONNX is known for Own()",
        ),
        (INNER, {"key": np.zeros(2, np.uint32)}, "params hold a key; export the plain params"),
        (INNER, {"1": {}}, "1: linear: there is no entry 'W' in []"),
        (INNER, {"0": {"W": np.zeros((4, 3))}}, "0: linear: x has 2 features, but W takes 4"),
        (
            nn.sequential(a=INNER),
            {"a": {"2": {"W": np.ones(1)}}},
            "a: no layer takes the entries ['2'] of params",
        ),
        (nn.sequential(a=INNER), {"a": {}}, "a/0: linear: there is no entry 'W'"),
    ],
)
def test_what_cannot_be_exported_is_named(net, change, words, onnx):
    params = {**net.init(0, (2,))[0], **change}
    with pytest.raises(ValueError, match=rf"^to_onnx: {re.escape(words)}") as caught:
        export.to_onnx(net, params, (2,))
    assert "\n" not in str(caught.value)


def test_a_shape_is_a_tuple(onnx):
    with pytest.raises(TypeError, match="^to_onnx: the shape of a sample must be a tuple, got 2$"):
        export.to_onnx(INNER, INNER.init(0, (2,))[0], 2)


def double_forward(params, x):
    return 2 * x, x


def double(graph, params, x):
    return graph.add("Mul", x, 2.0)


def test_a_layer_of_ones_own_is_added_to_the_table(onnx, monkeypatch):
    monkeypatch.setitem(export.NODES, double_forward, double)
    own = nn.Layer(nn.identity_init, double_forward, nn.identity_backward)
    make = functools.partial(values, seed=0, entry=LAYERS["linear"])
    assert_same(
        onnx, nn.residual(nn.linear(3), own), {"branch": INNER.init(0, (3,))[0]["0"]}, (3,), make
    )


# --- the scripts ---


@pytest.mark.parametrize(
    ("start", "script"), [(train_on, "train_mlp.py"), (train_cnn_on, "train_cnn.py")]
)
def test_an_exported_run_gives_the_logits_of_predict(
    start, script, onnx, blob_file, tmp_path, capsys
):
    assert start(blob_file, "--size", "6", "--center", "--epochs", "1", "--out", tmp_path) == 0
    capsys.readouterr()
    path, main = tmp_path / "net.onnx", SCRIPTS[script].main
    assert main(["--export", str(path), "--out", str(tmp_path)]) == 0
    printed, errors = capsys.readouterr()
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert (printed, errors) == (f"{path}: {model.doc_string}\n", "")
    assert "pixels (channels, height, width) from -0.5 for black to 0.5 for white" in printed
    assert {entry.key: json.loads(entry.value) for entry in model.metadata_props} == {
        "classes": list("0123"),
        "sample_shape": [3, 6, 6],
        "pixel_range": [-0.5, 0.5],
        "feature_mean": None,
        "feature_std": None,
    }
    record = {"train_mlp.py": "MLPOptions", "train_cnn.py": "CNNOptions"}[script]
    build = {"train_mlp.py": "build_mlp", "train_cnn.py": "build_cnn"}[script]
    module = SCRIPTS[script]
    loaded = classification.load_model(
        str(tmp_path), getattr(module, record), getattr(module, build)
    )
    x = np.random.default_rng(0).random((5, 3, 6, 6)).astype(np.float32) - np.float32(0.5)
    expected, _ = loaded.net.forward(loaded.params, x)
    (logits,) = run_onnx(str(path), {"x": x}).values()
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_the_run_of_a_curve_is_exported(onnx, tmp_path, capsys):
    task = "--task sine --hidden 4 --epochs 1 --report-every 36 --out"
    assert SCRIPTS["train_mlp.py"].main([*task.split(), str(tmp_path)]) == 0
    path = str(tmp_path / "sine.onnx")
    assert SCRIPTS["train_mlp.py"].main(["--export", path, "--out", str(tmp_path)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r".*: x is float32 \(N, 1\)\. y is float32 \(N, 1\)\.", last)
    (y,) = run_onnx(path, {"x": np.zeros((3, 1), np.float32)}).values()
    assert y.shape == (3, 1)


def test_a_run_on_tabular_data_says_how_features_are_scaled(onnx, tmp_path, capsys):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(100, 3)) * [1, 10, 100], rng.integers(0, 2, 100)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    path, out = tmp_path / "table.onnx", ["--out", str(tmp_path / "run")]
    assert train_on(str(tmp_path / "data.npz"), "--epochs", "1", *out) == 0
    assert SCRIPTS["train_mlp.py"].main(["--export", str(path), *out]) == 0
    model = onnx.load(path)
    assert "x is float32 (N, 3): features as (feature - feature_mean) / feature_std" in (
        model.doc_string
    )
    about = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    scaled = ((x - about["feature_mean"]) / about["feature_std"]).astype(np.float32)
    (logits,) = run_onnx(str(path), {"x": scaled}).values()
    np.savez(tmp_path / "rows.npz", x)
    capsys.readouterr()
    assert SCRIPTS["train_mlp.py"].main(["--predict", str(tmp_path / "rows.npz"), *out]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert [int(label) for _, label, _ in lines] == p.argmax(axis=1).tolist()
    np.testing.assert_allclose([float(best) for *_, best in lines], p.max(axis=1), atol=1e-4)


def test_what_cannot_be_done_is_said_before_anything_is_written(
    blob_file, tmp_path, capsys, monkeypatch
):
    assert train_on(blob_file, "--epochs", "1", "--out", tmp_path / "run") == 0
    (tmp_path / "folder.onnx").mkdir()
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    before = sorted(tmp_path.rglob("*"))
    for file, folder, words in (
        ("x.onnx", "run", "an export needs the package onnx: pip install onnx"),
        ("x.onnx", "", "--export needs --out"),
        ("x.onnx", "nowhere", "nowhere: there is no run in this folder"),
        ("no/x.onnx", "run", "no/x.onnx: there is no folder no"),
        ("run/model.npz", "run", "expected the name of a file that ends in .onnx, got run/model"),
        ("folder.onnx", "run", "folder.onnx: it is a folder"),
    ):
        out = ["--out", folder] if folder else []
        assert SCRIPTS["train_mlp.py"].main(["--export", file, *out]) == 2
        printed, errors = capsys.readouterr()
        assert (printed, errors.count("\n"), words in errors) == ("", 1, True), errors
    for other in (["--predict", "x.png"], ["--compare", "run"]):
        with pytest.raises(SystemExit):
            SCRIPTS["train_mlp.py"].main(["--export", "x.onnx", *other])
        assert "exclude each other" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
