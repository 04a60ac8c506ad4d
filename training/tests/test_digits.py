"""Synthetic digits: drawn strokes that stand in for MNIST where there is no network."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import purenn as nn
from training import digits
from training.tests.conftest import all_bytes


def test_every_stroke_of_every_numeral_lies_in_its_box():
    numerals = digits.numerals()
    assert [len(ways) for ways in numerals] == [1, 3, 2, 2, 2, 2, 1, 2, 1, 2]
    for ways in numerals:
        for strokes in ways:
            points = np.concatenate(strokes)
            assert ((points >= 0.04) & (points <= 0.99)).all()
            assert np.ptp(points[:, 1]) > 0.8  # each is nearly as high as the box
            assert all(len(stroke) >= 2 for stroke in strokes)


@settings(max_examples=30)
@given(ends=st.lists(st.floats(-1, 1, width=32), min_size=8, max_size=8), size=st.integers(2, 9))
def test_distances_are_those_to_the_nearest_point_of_a_segment(ends, size):
    segments = np.array(ends, np.float32).reshape(1, 2, 4)
    centers = (np.arange(size) + 0.5) * 2 / size - 1
    walk = np.linspace(0, 1, 801)[:, None]
    points = np.concatenate([s[:2] * (1 - walk) + s[2:] * walk for s in segments[0].astype(float)])
    away = np.hypot(
        centers[None, :, None] - points[:, 0], centers[:, None, None] - points[:, 1]
    ).min(axis=2)
    np.testing.assert_allclose(digits.distances(segments, size)[0], away, atol=3e-3)


def test_bent_strokes_stay_in_one_piece_and_upright():
    stroke = np.array([[0.5, 0.05], [0.4, 0.3], [0.6, 0.6], [0.5, 0.95]])
    segments = digits.pen_positions([stroke], np.random.default_rng(0), 500)
    assert (segments.shape, segments.dtype) == ((500, 3, 4), np.float32)
    np.testing.assert_array_equal(segments[:, :-1, 2:], segments[:, 1:, :2])
    height = segments[:, -1, 3] - segments[:, 0, 1]
    assert 0.85 < height.min() < 1.1  # the lowest: 0.6 times 1.8, turned and swollen
    assert 1.45 < height.max() < 1.8
    middle = (segments[:, 0, :2] + segments[:, -1, 2:]) / 2
    assert np.abs(middle.mean(axis=0)).max() < 0.05
    assert np.abs(middle).max() < 0.5


@pytest.mark.parametrize("size", [20, 28])
def test_digits_of_all_classes_are_bright_on_dark_and_no_two_are_alike(size):
    images, labels = digits.draw_digits((3, 1), 1_000, size)
    assert (images.shape, images.dtype, labels.dtype) == ((1_000, size, size), np.uint8, np.int64)
    assert all_bytes(*digits.draw_digits((3, 1), 1_000, size)) == all_bytes(images, labels)
    assert not np.array_equal(digits.draw_digits((3, 2), 1_000, size)[0], images)
    assert (np.bincount(labels, minlength=10) > 70).all()
    assert len({image.tobytes() for image in images}) == len(images)
    brightest, border = images.max(axis=(1, 2)), images[:, 0]
    assert 90 < brightest.min() < 150  # ink from 0.6 on, less where a stroke is thin
    assert (brightest == 255).mean() > 0.15  # up to 1, or noise on top
    assert border.mean() < 12
    assert 30 < images.mean() < 70
    for digit in range(10):  # each numeral looks like itself on average, not like all of them
        average = images[labels == digit].mean(axis=0)
        assert np.corrcoef(average.ravel(), images.mean(axis=0).ravel())[0, 1] < 0.98


def test_pinned_digits():
    """The same ones at every version: of each way to write a numeral, and of many in parts.

    Sines may differ in the last bit, and so one pixel of one image by a few units.
    """
    images, labels = digits.draw_digits(3, 20, 12)
    assert labels.tolist() == [8, 2, 4, 6, 7, 1, 6, 7, 7, 9, 2, 3, 6, 7, 7, 7, 2, 3, 1, 6]
    assert int(images.sum()) == pytest.approx(103_836, abs=40)
    images, labels = digits.draw_digits(11, 400, 12)
    weighted = images.reshape(400, 144) @ np.arange(144)
    sums = [11444625, 10536898, 20960798, 18467687, 14701519,
            16970224, 21269627, 9538899, 13163435, 14753364]  # fmt: skip
    for digit, expected in enumerate(sums):
        assert int(weighted[labels == digit].sum()) == pytest.approx(expected, abs=400)
    images, _ = digits.draw_digits(12, 3000, 8)
    weighted = images.reshape(3000, 64) @ np.arange(64)
    assert int(weighted.sum()) == pytest.approx(223_320_645, abs=500)


def test_digits_need_more_than_a_linear_classifier():
    images, labels = digits.draw_digits(7, 3_000, 12)
    x = (images / np.float32(255)).reshape(len(images), -1)
    scores = []
    for hidden in ((), (nn.linear(96), nn.relu())):
        net = nn.sequential(*hidden, nn.linear(10))
        params, _ = net.init(0, (144,))
        optimizer = nn.adam(0.005)
        state = optimizer.init(params)
        function = nn.value_and_grad(net, nn.softmax_cross_entropy)
        for epoch in range(10):
            for index in nn.batches(2_000, 100, (1, epoch)):
                _, grads, _ = function(params, x[index], labels[index])
                params, state = optimizer.step(params, grads, state)
        scores.append(nn.accuracy(net.forward(params, x[2_000:])[0], labels[2_000:]))
    linear, mlp = scores
    assert 0.7 < linear < 0.85
    assert mlp > linear + 0.05


@pytest.mark.parametrize(
    ("parameter", "wrong"),
    [
        *(("key", bad) for bad in (None, "0", -1, 0.5, [[1]], math.nan)),
        *(("count", bad) for bad in (None, "1", 1.5, 0, True, math.nan)),
        *(("size", bad) for bad in (None, "28", 9.5, 7, (8, 8))),
    ],
)
def test_draw_digits_refuses_what_makes_no_sense(parameter, wrong):
    arguments = {"key": 0, "count": 1, "size": 8}
    assert digits.draw_digits(**arguments)[0].shape == (1, 8, 8)
    with pytest.raises(
        (TypeError, ValueError), match=rf"^(draw_digits: {parameter}|key).* must be "
    ):
        digits.draw_digits(**{**arguments, parameter: wrong})
