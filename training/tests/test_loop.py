"""The training loop: steps, reports, where it begins and how it stops."""

import math
import re
import signal
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import purenn as nn
from train_mlp import build_mlp
from training import choices, loop
from training.options import Options
from training.team import Team
from training.tests.conftest import all_bytes, mlp_experiment

# --- steps ---


@given(count=st.integers(1, 9), size=st.integers(1, 10), seed=st.integers(0, 3))
def test_steps_are_counted_and_taken_up_again_anywhere(count, size, seed):
    options = Options(epochs=2, batch_size=size, seed=seed)
    steps = list(loop.step_images(count, options))
    epoch = loop.count_steps(count, size)
    assert len(steps) == 2 * epoch > 0
    for start in (0, epoch):
        images = np.concatenate(steps[start : start + epoch])
        assert len(set(images)) == len(images) >= count - 1  # each once, but one left over
    alone = [index for index in steps if len(index) == 1]
    assert not alone or min(size, count) == 1
    for done in range(len(steps) + 1):
        assert all_bytes(*loop.step_images(count, options, done)) == all_bytes(*steps[done:])


def test_the_summed_gradient_is_the_mean_times_the_batch(blob_file):
    moves = []
    for reduction in ("mean", "sum"):
        experiment = mlp_experiment(blob_file, hidden=(8,), dropout=0.0, reduction=reduction)
        params, optimizer = loop.first_params(experiment), nn.sgd(0.01)
        progress = loop.begin(experiment, optimizer, params)
        moved = loop.take_step(experiment, optimizer, progress, np.arange(16))
        moves.append(moved.params["hidden1"]["W"].astype(np.float64) - params["hidden1"]["W"])
        assert moved.sums[0] < 3 * moved.sums[2] == 48
    np.testing.assert_allclose(moves[1], 16 * moves[0], atol=1e-6)
    assert np.abs(moves[1]).max() > 1e-3


def test_a_step_is_that_of_the_library_written_out(blob_file):
    """Dropout, batch norm, augmentation and all: the params and statistics to the bit."""
    options = {"hidden": (8,), "augment": (("shift", 1.0),), "seed": 3}
    experiment = mlp_experiment(blob_file, **options)
    optimizer, index = nn.adam(0.01), np.arange(5, 21)
    progress = loop.begin(experiment, optimizer, loop.first_params(experiment))
    moved = progress
    for _ in range(2):
        moved = loop.take_step(experiment, optimizer, moved, index)
    params, state = progress.params, progress.state
    images, labels = experiment.data["x_train"][index], experiment.data["y_train"][index]
    augment = choices.choose_augmentation(experiment.options)
    for step in range(2):
        own = nn.training(params, (3, 2, step))
        batch = augment(nn.fold_key(own["key"], 2**32 - 1), images)
        gradients = nn.value_and_grad(experiment.net, experiment.task.loss)
        _, grads, cache = gradients(own, batch, labels)
        params, state = optimizer.step(params, grads, state)
        params = nn.update_statistics(params, cache)
    assert all_bytes(moved.params, moved.state) == all_bytes(params, state)
    assert moved.sums[2] == 32


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_class_weights_and_clip_are_of_the_batch_whatever_the_shards(reduction, blob_file):
    options = {"hidden": (8,), "dropout": 0.0, "batch_norm": False, "reduction": reduction}
    moves, weights = {}, (1.0, 9.0, 2.0, 0.1)
    for clip in (None, 0.25, 1e9):
        for shards in (1, 3):
            experiment = mlp_experiment(blob_file, class_weights=weights, clip=clip, **options)
            experiment = experiment._replace(team=Team(shards))
            params, optimizer = loop.first_params(experiment), nn.sgd(1.0)
            progress = loop.begin(experiment, optimizer, params)
            moved = loop.take_step(experiment, optimizer, progress, np.arange(16)).params
            moves[clip, shards] = moved["hidden1"]["W"] - params["hidden1"]["W"]
            norm = nn.global_norm(nn.tree_map(np.subtract, moved, params))
            assert norm == pytest.approx(0.25, rel=1e-5) if clip == 0.25 else norm > 0.5
        np.testing.assert_allclose(moves[clip, 3], moves[clip, 1], atol=1e-5 * norm)
    assert np.array_equal(moves[None, 1], moves[1e9, 1])
    unweighted = experiment._replace(task=mlp_experiment(blob_file, **options).task)
    moved = loop.take_step(unweighted, optimizer, progress, np.arange(16)).params
    difference = moved["hidden1"]["W"] - params["hidden1"]["W"] - moves[1e9, 3]
    assert nn.global_norm({"W": difference}) > 0.1


def test_gradients_that_are_not_finite_are_not_clipped(blob_file):
    options = mlp_experiment(blob_file, clip=1.0).options
    message = "^step 7: clip_gradients: the norm of the gradients is nan; try a lower --lr$"
    with pytest.raises(ValueError, match=message):
        loop.clip({"W": np.array([math.nan])}, options, 7)


# --- layers that are trained, and others ---


def test_frozen_layers_are_as_at_inference_and_the_others_in_training(blob_file):
    experiment = mlp_experiment(blob_file, hidden=(8, 6), train_only=("norm2", "out"))
    params, optimizer = loop.first_params(experiment), nn.adam()
    mode = loop.in_training(params, 3, ["norm2", "out"])
    assert {name for name in mode if "key" in mode[name]} == {"norm2", "out"}
    assert len({tuple(mode[name]["key"]) for name in ("norm2", "out")}) == 2
    assert "key" in loop.in_training(params, 3, None)
    progress = loop.begin(experiment, optimizer, params)
    moved = loop.take_step(experiment, optimizer, progress, np.arange(16)).params
    for name in params:
        assert (all_bytes(moved[name]) == all_bytes(params[name])) == (name not in ("norm2", "out"))
    assert not np.array_equal(moved["norm2"]["mean"], params["norm2"]["mean"])
    trained = loop.trained_entries(experiment, params)
    assert set(nn.tree_flatten(trained)) == {"norm2/gamma", "norm2/beta", "out/W", "out/b"}


@pytest.fixture(scope="module")
def model(blob_file, tmp_path_factory):
    """A model.npz of two hidden layers."""
    path = tmp_path_factory.mktemp("model") / "model.npz"
    nn.save(path, loop.first_params(mlp_experiment(blob_file, hidden=(8, 6), seed=7)))
    return str(path)


def test_a_model_is_where_another_training_begins(blob_file, model):
    experiment = mlp_experiment(blob_file, hidden=(8, 6), init_from=model)
    assert all_bytes(loop.first_params(experiment)) == all_bytes(nn.load(model))
    other = experiment._replace(net=build_mlp(experiment.options, 7))
    own = loop.first_params(other._replace(options=replace(other.options, init_from=None)))
    with pytest.raises(ValueError, match=r"out has .*\(6, 4\).* but this network needs .*\(6, 7\)"):
        loop.first_params(other)
    tuned = other._replace(options=replace(other.options, train_only=("out",)))
    started = loop.first_params(tuned)  # a last layer that does not fit begins anew
    assert all_bytes(started["out"]) == all_bytes(own["out"])
    assert all_bytes(started["hidden2"]) == all_bytes(nn.load(model)["hidden2"])
    with pytest.raises(ValueError, match="out has"):
        loop.start_from(model, own, own.items(), ["norm1"])


def test_what_does_not_fit_is_refused_before_the_next_layer_takes_memory(model):
    def layers():
        yield "hidden1", {"W": np.zeros((162, 10**6))}
        pytest.fail("the next layer is asked for")

    with pytest.raises(ValueError, match="hidden1 has"):
        loop.start_from(model, nn.load(model), layers())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden": (8,)}, "this network has no layer hidden2 or norm2"),
        ({"hidden": (8, 6, 4)}, "hidden3 has nothing, but this network needs {'hidden3/W'"),
        ({"hidden": (8, 5)}, "hidden2 has {'hidden2/W': (8, 6)}, but this network needs {'hidden2"),
        ({"hidden": (8, 6), "batch_norm": False}, "this network has no layer norm1 or norm2"),
        ({"train_only": ("act1",)}, "--train-only: act1 is not a layer with parameters, as hid"),
    ],
)
def test_what_does_not_fit_is_said(options, words, blob_file, model):
    with pytest.raises(ValueError, match=re.escape(words)):
        loop.first_params(mlp_experiment(blob_file, init_from=model, **options))


@pytest.mark.parametrize("kind", ["i1", "f2", "?", "u8"])
def test_init_from_refuses_what_no_layer_takes(kind, tmp_path):
    params = {"out": {"W": np.ones((2, 2), np.float32), "b": np.zeros(2, kind)}}
    nn.save(tmp_path / "model.npz", params)
    message = f"^{tmp_path}/model.npz: out/b is {np.dtype(kind)}, expected float32 or float64"
    with pytest.raises(ValueError, match=message):
        loop.start_from(tmp_path / "model.npz", params, params.items())


# --- reports ---


def trained(experiment, optimizer=None, **hooks):
    """The progress at the end of a training."""
    optimizer = optimizer or nn.adam(0.02)
    progress = loop.begin(experiment, optimizer, loop.first_params(experiment))
    return loop.train(experiment, optimizer, progress, **hooks)


@pytest.mark.parametrize(("every", "steps"), [(None, [12, 24]), (10, [10, 20, 24]), (24, [24])])
def test_reports_come_as_often_as_asked_and_at_the_end(every, steps, blob_file, capsys):
    experiment = mlp_experiment(
        blob_file, hidden=(8,), epochs=2, batch_size=16, report_every=every, checkpoint_every=9
    )
    written, saved = [], []
    progress = trained(experiment, write=written.append, save=saved.append)
    assert [int(row[1]) for row in progress.rows] == steps
    assert [int(row[0]) for row in progress.rows] == [1 + (step > 12) for step in steps]
    assert [int(p.step) for p in written] == steps
    assert [int(p.step) for p in saved] == [9, 12, 18, 24]
    epochs = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert epochs == [f"epoch {1 + (step > 12)}/2" for step in steps]


def test_a_report_is_of_the_steps_since_the_last_one(blob_file, monkeypatch):
    original = loop.take_step

    def step(experiment, optimizer, progress, index):
        value, sums = float(progress.step), progress.sums
        progress = original(experiment, optimizer, progress, index)
        return progress._replace(sums=sums + np.array([value, value / 100, 1]) * len(index))

    monkeypatch.setattr(loop, "take_step", step)
    options = {"epochs": 1, "batch_size": 16, "report_every": 2, "validation": 100}
    rows = trained(mlp_experiment(blob_file, hidden=(8,), **options)).rows
    means = np.array([0.5, 2.5, 4.5, 6])  # the last one is of 4 images
    np.testing.assert_allclose(rows[:, 2:4], np.stack([means, means / 100], axis=1))


@pytest.mark.parametrize("validation", [20, 0])
def test_the_best_params_are_kept_or_without_validation_the_last(validation, blob_file):
    options = {"hidden": (8,), "batch_size": 16, "epochs": 6, "schedule": "constant"}
    experiment, seen = mlp_experiment(blob_file, validation=validation, **options), []
    progress = trained(experiment, nn.adam(0.1), save=lambda progress: seen.append(progress.params))
    names = ["epoch", "step", "loss", "accuracy"]
    if not validation:
        assert loop.columns(experiment) == names
        assert progress.best is progress.params
        return
    assert loop.columns(experiment) == [*names, "validation_loss", "validation_accuracy"]
    best = int(progress.rows[:, 5].argmax())
    assert progress.best_score == progress.rows[best, 5]
    assert all_bytes(progress.best) == all_bytes(seen[best])
    measured = loop.validate(experiment, progress.best, "validation")
    assert measured == tuple(progress.rows[best, 4:])


def test_the_plateau_sees_the_validation_loss(blob_file, monkeypatch):
    seen = []

    def lower(options, state, loss, epoch_steps):
        seen.append((loss, epoch_steps))
        return state

    monkeypatch.setattr(loop, "lower_rate", lower)
    options = {"hidden": (8,), "batch_size": 16, "epochs": 3, "schedule": "plateau"}
    progress = trained(mlp_experiment(blob_file, **options))
    assert seen == [(loss, 12) for loss in progress.rows[:, 4]]


@pytest.mark.parametrize(
    ("patience", "every", "scores", "reports"),
    [
        (2, None, [0.3, 0.5, 0.5, 0.4, 0.9], 4),  # as good as the best is not better
        (2, None, [0.3, 0.5, 0.4, 0.6, 0.5, 0.5, 0.9], 6),
        (1, None, [0.3, 0.2, 0.9], 2),
        (1, 6, [0.3, 0.2, 0.9, 0.8, 0.7, 0.9], 5),  # two reports an epoch
        (1, 24, [0.3, 0.2, 0.9], 2),  # two epochs a report
        (3, None, [0.5, 0.4, 0.3], 3),  # to its last epoch
    ],
)
def test_patience_ends_a_training(patience, every, scores, reports, blob_file, monkeypatch, capsys):
    left = iter(scores)
    monkeypatch.setattr(loop, "validate", lambda *_: (1.0, next(left)))
    epochs = len(scores) * (every or 12) // 12
    options = {"epochs": epochs, "batch_size": 16, "report_every": every, "patience": patience}
    experiment = mlp_experiment(blob_file, hidden=(8,), **options)
    progress = trained(experiment)
    assert progress.rows[:, -1].tolist() == scores[:reports]
    assert progress.best_score == max(scores[:reports])
    assert int(progress.step) == reports * (every or 12)
    said = [line for line in capsys.readouterr().out.splitlines() if "patience" in line]
    many = f"{patience} epoch{'s' * (patience > 1)}"
    ended = f"stopped after epoch {progress.rows[-1, 0]:.0f} of {epochs}"
    words = f"no better validation accuracy for {many} (--patience): {ended}"
    assert said == [words] * (reports < len(scores))
    monkeypatch.setattr(loop, "take_step", None)  # resumed, it has nothing to do
    assert loop.train(experiment, nn.adam(), progress) is progress
    assert capsys.readouterr().out.splitlines() == said


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_a_loss_that_is_not_finite_says_where_it_began(blob_file):
    experiment, optimizer = mlp_experiment(blob_file, hidden=(8, 6)), nn.adam()
    progress = loop.begin(experiment, optimizer, loop.first_params(experiment))
    progress.params["hidden2"]["W"][:] = 3e38
    where = "the output of hidden2 is not finite"
    with pytest.raises(ValueError, match=rf"^the loss became (nan|inf) in step 0: {where}; try a"):
        loop.take_step(experiment, optimizer, progress, np.arange(9))


def test_params_that_are_not_finite_are_never_kept(blob_file, monkeypatch):
    original = loop.take_step

    def spoiled(*arguments):
        progress = original(*arguments)
        if progress.step == 24:
            progress.params["out"]["b"][:] = math.inf
        return progress

    monkeypatch.setattr(loop, "take_step", spoiled)
    saved = []
    experiment = mlp_experiment(blob_file, hidden=(8,), epochs=2, batch_size=16)
    with pytest.raises(ValueError, match="^out/b is not finite after step 24, so its gradient was"):
        trained(experiment, write=saved.append, save=saved.append)
    assert [int(progress.step) for progress in saved] == [12, 12]


# --- steps that become slow ---


@pytest.mark.parametrize(
    ("durations", "found"),
    [
        ([0.01] * 1000, [1, 1, 1]),
        ([0.01] * 300 + [0.08] * 120, [1, 8, 8, 8]),
        ([0.01] * 500 + [60.0] + [0.01] * 350, [1, 1, 1]),  # the machine was asleep
        ([9.0] + [0.01] * 900, [1, 1, 1]),  # nor is the first step what others are compared with
        ([0.08] * 120, [1, 1, 1]),  # slow from the beginning: nothing to compare with
        ([2.0] * 5 + [20.0] * 4, [1]),  # too few to say
        ([2.0] * 5 + [20.0] * 5, [1, 10]),
    ],
)
def test_steps_are_compared_with_the_first_ones(durations, found):
    pace = loop.Pace()
    slowdowns = [slowdown for slowdown in map(pace.slowdown, durations) if slowdown]
    np.testing.assert_allclose(slowdowns[: len(found)], found)
    assert all(slowdown in found for slowdown in np.round(slowdowns, 6))


@pytest.mark.parametrize(("blas_threads", "cores"), [("all cores", 2), ("1", 2), ("2", 1)])
def test_that_threads_of_blas_wait_is_said_once(
    blas_threads, cores, blob_file, monkeypatch, capsys
):
    monkeypatch.setattr(loop, "describe_threads", lambda: blas_threads)
    monkeypatch.setattr(loop, "own_cores", lambda communicator: cores)
    display = loop.Display(mlp_experiment(blob_file, hidden=(8,)), 0)
    for seconds in [1.0] * 10 + [4.9] * 10 + [7.0] * 20:
        display.count_step(16, seconds)
    assert display.seen == 40 * 16
    lines = capsys.readouterr().out.splitlines()
    if blas_threads == "1" or cores == 1:
        assert lines == []  # no thread waits for another one
        return
    (line,) = lines
    assert line.startswith("steps take 7 times as long as the first ones did: ")
    assert "threads of BLAS wait for each other; OPENBLAS_NUM_THREADS=1 in the env" in line


# --- Ctrl-C ---


def test_ctrl_c_that_is_ignored_stays_ignored(interruptible):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with loop.Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert not stop.asked
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_a_second_ctrl_c_is_at_once(interruptible):
    before = signal.getsignal(signal.SIGINT)
    with loop.Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
