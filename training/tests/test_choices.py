"""What the options stand for: loss, optimizer, schedule and augmentation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import purenn as nn
from training import choices
from training.options import AUGMENTATIONS, ONE_HOT_LOSSES, OPTIMIZERS, Options

SCHEDULED = [  # (--schedule and its options, {step: rate}) in 10 epochs of 100 steps, from 0.5
    ({"schedule": "constant"}, None),
    ({"schedule": "plateau"}, None),
    ({"schedule": "step"}, {0: 0.5, 332: 0.5, 333: 0.05, 666: 0.005}),
    (
        {"schedule": "step", "lr_factor": 0.5, "lr_epochs": (1.5,)},
        {149: 0.5, 150: 0.25, 300: 0.125, 999: 0.5**7},
    ),
    ({"schedule": "multistep"}, {499: 0.5, 500: 0.05, 749: 0.05, 750: 0.005}),
    ({"schedule": "multistep", "lr_epochs": (2.0, 8.0)}, {199: 0.5, 200: 0.05, 800: 0.005}),
    ({"schedule": "exponential"}, {0: 0.5, 1000: 0.005}),
    ({"schedule": "exponential", "lr_factor": 0.9}, {0: 0.5, 300: 0.5 * 0.9**3}),
    ({"schedule": "cosine"}, {0: 0.5, 500: 0.25, 1000: 0.0}),
    ({"schedule": "cyclic"}, {0: 0.05, 200: 0.5, 400: 0.05}),
    ({"schedule": "cyclic", "lr_epochs": (0.5,)}, {0: 0.05, 50: 0.5, 100: 0.05}),
    ({"schedule": "one-cycle"}, {299: 0.5, 999: 0.5 / 250_000}),
]


@pytest.mark.parametrize(("chosen", "rates"), SCHEDULED)
def test_schedules_end_where_the_help_says(chosen, rates):
    schedule = choices.choose_schedule(Options(epochs=10, **chosen), 0.5, 100)
    if rates is None:
        assert schedule == 0.5
    else:
        found = {step: schedule(step) for step in rates}
        assert found == pytest.approx(rates, abs=1e-9)


@pytest.mark.parametrize("chosen", [chosen for chosen, _ in SCHEDULED])
def test_a_schedule_that_depends_on_the_number_of_epochs_is_named(chosen):
    rates = []
    for epochs in (10, 20):
        schedule = choices.choose_schedule(Options(epochs=epochs, **chosen), 0.5, 100)
        rates.append([schedule(step) if callable(schedule) else schedule for step in range(1000)])
    named = choices.depends_on_epochs(Options(**chosen))
    assert named == (f"--schedule {chosen['schedule']}" if rates[0] != rates[1] else "")


def test_the_plateau_waits_for_so_many_epochs():
    for lr_epochs, report_every, factor, reports in (
        (None, None, None, 2),
        ((1.0,), None, 0.1, 1),
        ((1.0,), 4, None, 3),
    ):
        options = Options(
            schedule="plateau", lr_epochs=lr_epochs, report_every=report_every, lr_factor=factor
        )
        state, scales = nn.adam().init({}), []
        for _ in range(2 * reports + 3):
            state = choices.lower_rate(options, state, 1.0, 12)
            scales.append(float(state["scale"]))
        by = 0.5 if factor is None else factor
        np.testing.assert_allclose(scales, np.repeat([1, by, by**2], reports + 1)[: len(scales)])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_take_their_options(name):
    _, lr, momentum = OPTIMIZERS[name]
    chosen = {"optimizer": name, "schedule": "constant", "weight_decay": 0.1}
    chosen |= {} if momentum is None else {"momentum": 0.4}
    params, grads = {"w": np.ones(2)}, {"w": np.array([0.5, -2.0])}
    for options, rate in ((Options(**chosen), lr), (Options(**chosen, lr=0.3), 0.3)):
        more = {} if momentum is None else {"momentum": 0.4}
        expected = getattr(nn, name)(rate, weight_decay=0.1, **more)
        found = choices.choose_optimizer(options, 10)
        results = []
        for optimizer in (expected, found):
            own, state = params, optimizer.init(params)
            for _ in range(3):
                own, state = optimizer.step(own, grads, state)
            results.append(own["w"])
        np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(("momentum", "final"), [(0.8, 0.2), (0.8, 0.0), (None, 0.5), (None, None)])
def test_momentum_is_dropped_in_the_last_quarter(momentum, final):
    options = Options(optimizer="sgd", momentum=momentum, final_momentum=final, epochs=8)
    params = {"w": np.zeros(1)}
    optimizer = choices.choose_optimizer(options, 10)
    state = optimizer.init(params)
    first = 0.9 if momentum is None else momentum
    for step in range(80):
        before = state["velocity"]["w"]
        params, state = optimizer.step(params, {"w": np.ones(1)}, state)
        used = first if step < 60 or final is None else final
        np.testing.assert_allclose(state["velocity"]["w"], used * before + 1)
    dropped = final not in (None, first)
    assert choices.depends_on_epochs(Options(**{**vars(options), "schedule": "constant"})) == (
        "--final-momentum" if dropped else ""
    )


LOSSES = ["cross-entropy", "hinge", *ONE_HOT_LOSSES]


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_those_of_the_library(loss):
    outputs = np.random.default_rng(0).normal(size=(5, 3))
    labels = np.array([0, 2, 1, 1, 0])
    expected = {
        "cross-entropy": lambda: nn.softmax_cross_entropy(outputs, labels, smoothing=0.1),
        "hinge": lambda: nn.hinge(outputs, labels),
    }.get(loss, lambda: ONE_HOT_LOSSES[loss](outputs, np.eye(3)[labels]))()
    task = choices.choose_task(Options(loss=loss), np.array([2, 2, 1]))
    assert task.training_loss is task.loss
    value, gradient = task.loss(outputs, labels)
    assert value == expected[0]
    np.testing.assert_array_equal(gradient, expected[1])
    assert (task.outputs, task.name, task.better) == (3, "accuracy", 1)
    assert task.measure(outputs, labels) == nn.accuracy(outputs, labels)


def test_smoothing_may_be_chosen_and_a_curve_is_judged_by_its_error():
    outputs, labels = np.array([[1.0, -1.0]]), np.array([1])
    for smoothing in (0.0, 0.3):
        task = choices.choose_task(Options(label_smoothing=smoothing), np.ones(2, int))
        expected = nn.softmax_cross_entropy(outputs, labels, smoothing=smoothing)[0]
        assert task.loss(outputs, labels)[0] == expected
    task = choices.choose_task(Options(task="sine", loss="huber"), np.zeros(0, int))
    assert (task.outputs, task.name, task.better, task.loss) == (1, "error", -1, nn.huber)
    assert task.measure(np.array([[1.0], [4.0]]), np.array([[2.0], [2.0]])) == 1.5


@pytest.mark.parametrize("loss", LOSSES)
@given(
    weights=st.lists(st.floats(0.1, 9), min_size=3, max_size=3).map(tuple),
    labels=st.lists(st.integers(0, 2), min_size=2, max_size=8).map(np.array),
    data=st.data(),
)
def test_class_weights_weigh_every_image_wherever_a_batch_is_cut(loss, weights, labels, data):
    counts = np.array([5, 1, 4])
    options = Options(loss=loss, class_weights=weights)
    task = choices.choose_task(options, counts)
    outputs = np.random.default_rng(len(labels)).normal(size=(len(labels), 3))
    each = [task.loss(outputs[[i]], labels[[i]])[0] for i in range(len(labels))]
    scaled = np.array(weights) * 10 / (counts @ weights)  # a mean of 1 over the training images
    value, gradient = task.training_loss(outputs, labels)
    assert value == pytest.approx(np.mean(scaled[labels] * each))
    cut = data.draw(st.integers(1, len(labels) - 1))
    shares = [cut / len(labels), 1 - cut / len(labels)]
    parts = [task.training_loss(outputs[p], labels[p]) for p in (slice(cut), slice(cut, None))]
    assert value == pytest.approx(sum(s * part for s, (part, _) in zip(shares, parts, strict=True)))
    joined = np.concatenate([s * part for s, (_, part) in zip(shares, parts, strict=True)])
    np.testing.assert_allclose(gradient, joined)
    assert np.abs(gradient).max() > 0


def test_balanced_weights_are_inverse_to_the_numbers_of_images():
    counts = np.array([10, 30, 60])
    weights = choices.choose_class_weights(Options(class_weights=("balanced",)), counts)
    np.testing.assert_allclose(weights, 100 / (3 * counts))
    for given_weights in ((6.0, 2.0, 1.0), (3e307, 1e307, 0.5e307)):  # only their ratios matter
        found = choices.choose_class_weights(Options(class_weights=given_weights), counts)
        np.testing.assert_allclose(found, weights)
    without = choices.choose_class_weights(Options(class_weights=("balanced",)), counts * [1, 0, 1])
    np.testing.assert_allclose(without[[0, 2]], 70 / (2 * counts[[0, 2]]))
    for few in ((1.0, 2.0), (1.0,) * 4):
        with pytest.raises(ValueError, match=f"got {len(few)} numbers, but there are 3 classes$"):
            choices.choose_class_weights(Options(class_weights=few), counts)


@pytest.mark.parametrize("std", [None, 0.5])
def test_first_weights_have_the_deviation_that_was_chosen(std):
    found = choices.initializer(Options(init="normal", init_std=std))(3, (4, 5))
    np.testing.assert_array_equal(found, nn.normal(std or 0.02)(3, (4, 5)))
    assert choices.initializer(Options(init="orthogonal")) is nn.orthogonal


@pytest.mark.parametrize(
    ("augment", "expected"),
    [
        ((), {}),
        ((("rotation", 9.0),), {"rotation": 9.0}),
        ((("elastic", 2.0), ("shift", 1.0)), {"shift": 1.0, "elastic": 2.0}),
    ],
)
def test_augmentation_is_what_was_named_and_no_other(augment, expected):
    assert choices.choose_augmentation(Options()) is None
    if augment:
        expected = {**dict.fromkeys(AUGMENTATIONS, 0.0), **expected}
    images = np.random.default_rng(0).random((4, 1, 8, 8)).astype(np.float32)
    augmented = choices.choose_augmentation(Options(augment=augment))(5, images)
    np.testing.assert_array_equal(augmented, nn.augment(5, images, **expected))
    # With --center what comes in from outside is black as well.
    centered = choices.choose_augmentation(Options(augment=augment, center=True))
    np.testing.assert_allclose(centered(5, images - 0.5), augmented - 0.5, atol=1e-6)
