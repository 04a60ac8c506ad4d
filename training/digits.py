"""Synthetic digits: drawings of numerals, a stand-in for MNIST where there is no network."""

from __future__ import annotations

from typing import Any

import numpy as np

import purenn as nn
from purenn import Array, Key


def check_whole(name: str, value: Any, minimum: int) -> int:
    """`value` as an int that is at least `minimum`."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"draw_digits: {name} must be a whole number, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"draw_digits: {name} must be at least {minimum}, got {value}")
    return int(value)


def generator_of(key: Key) -> np.random.Generator:
    """A generator of random numbers whose whole state is the key's."""
    words = nn.training({}, key)["key"]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def arc(x: float, y: float, width: float, height: float, start: float, end: float) -> Array:
    """Points on an ellipse around (x, y); angles in degrees, clockwise from the right."""
    angles = np.radians(np.linspace(start, end, 3 + int(abs(end - start) / 40)))
    return np.stack([x + width * np.cos(angles), y + height * np.sin(angles)], axis=1)


def line(*points: tuple[float, float]) -> Array:
    """The points of a line, straight from one to the next."""
    return np.array(points, np.float64)


def numerals() -> list[list[list[Array]]]:
    """For each numeral the ways to write it, each a list of strokes in a unit box, y downwards."""
    return [
        [[arc(0.5, 0.5, 0.3, 0.45, 0, 360)]],
        [
            [line((0.5, 0.05), (0.5, 0.95))],
            [line((0.3, 0.25), (0.52, 0.05), (0.52, 0.95))],
            [line((0.3, 0.25), (0.52, 0.05), (0.52, 0.95)), line((0.3, 0.95), (0.74, 0.95))],
        ],
        [
            [arc(0.5, 0.3, 0.28, 0.25, 190, 380), line((0.76, 0.4), (0.2, 0.95), (0.82, 0.95))],
            [
                arc(0.5, 0.3, 0.28, 0.25, 190, 390),
                line((0.74, 0.42), (0.3, 0.85)),
                arc(0.3, 0.84, 0.12, 0.1, 0, 360),
                line((0.3, 0.94), (0.85, 0.93)),
            ],
        ],
        [
            [arc(0.45, 0.28, 0.28, 0.23, 200, 450), arc(0.45, 0.73, 0.32, 0.23, 270, 520)],
            [line((0.2, 0.06), (0.76, 0.06), (0.45, 0.4)), arc(0.4, 0.7, 0.34, 0.28, 270, 510)],
        ],
        [
            [line((0.62, 0.95), (0.62, 0.05), (0.15, 0.65), (0.85, 0.65))],
            [line((0.22, 0.05), (0.2, 0.5), (0.76, 0.5)), line((0.74, 0.05), (0.7, 0.95))],
        ],
        [
            [line((0.78, 0.05), (0.3, 0.05), (0.26, 0.46)), arc(0.5, 0.7, 0.3, 0.28, 225, 500)],
            [line((0.3, 0.08), (0.28, 0.42)), arc(0.47, 0.67, 0.3, 0.28, 230, 510),
             line((0.3, 0.08), (0.8, 0.05))],
        ],
        [[arc(0.75, 0.6, 0.52, 0.56, 260, 180), arc(0.5, 0.7, 0.26, 0.25, 0, 360)]],
        [
            [line((0.18, 0.06), (0.82, 0.06), (0.4, 0.95))],
            [line((0.18, 0.06), (0.82, 0.06), (0.4, 0.95)), line((0.35, 0.5), (0.75, 0.5))],
        ],
        [[arc(0.5, 0.28, 0.23, 0.23, 0, 360), arc(0.5, 0.73, 0.28, 0.23, 0, 360)]],
        [
            [arc(0.5, 0.3, 0.26, 0.25, 0, 360), line((0.76, 0.3), (0.7, 0.65), (0.5, 0.95))],
            [arc(0.48, 0.3, 0.27, 0.25, 0, 360), line((0.75, 0.3), (0.74, 0.95))],
        ],
    ]  # fmt: skip


def pen_positions(strokes: list[Array], generator: np.random.Generator, count: int) -> Array:
    """The strokes' segments, differently bent in each of `count` drawings: (count, segments, 4).

    Each row is (x, y) of a segment's two ends, in a box from -1 to 1.
    """
    draw = generator.uniform
    ends = np.concatenate([np.stack([s[:-1], s[1:]], axis=1) for s in strokes])  # (segments, 2, 2)
    x, y = 2 * ends[..., 0] - 1, 2 * ends[..., 1] - 1
    one = (count, 1, 1)
    wave = draw(0, 0.16, one) * np.sin(draw(1, 3, one) * y + draw(0, 2 * np.pi, one))
    swell = draw(0, 0.16, one) * np.sin(draw(1, 3, one) * x + draw(0, 2 * np.pi, one))
    x, y = (x + wave) * draw(0.55, 0.95, one), (y + swell) * draw(0.6, 0.85, one)
    x = x + draw(-0.45, 0.45, one) * y  # slant
    angle = draw(-0.3, 0.3, one)
    x, y = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    x, y = x + draw(-0.15, 0.15, one), y + draw(-0.15, 0.15, one)
    return np.stack([x, y], axis=-1).reshape(count, len(ends), 4).astype(np.float32)


def distances(segments: Array, size: int) -> Array:
    """From every pixel's center to the nearest of the segments: (count, size, size)."""
    pixels = ((np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1).astype(np.float32)
    px, py = pixels[None, None, :], pixels[None, :, None]
    nearest = np.full((len(segments), size, size), np.inf, np.float32)
    for x0, y0, x1, y1 in segments.transpose(1, 2, 0)[..., None, None]:
        dx, dy = x1 - x0, y1 - y0
        along = ((px - x0) * dx + (py - y0) * dy) / (dx * dx + dy * dy + np.float32(1e-9))
        np.clip(along, 0, 1, out=along)
        away = np.square(px - x0 - along * dx)
        away += np.square(py - y0 - along * dy)
        np.minimum(nearest, away, out=nearest)
    return np.sqrt(nearest)


def draw(segments: Array, generator: np.random.Generator, size: int) -> Array:
    """Images of uint8 of those segments, each with a pen, a blur, an ink and a noise of its own."""
    one = (len(segments), 1, 1)
    thickness, blur, ink, noise = (
        generator.uniform(low, high, one).astype(np.float32)
        for low, high in ((0.04, 0.15), (0.05, 0.2), (0.6, 1.0), (0.0, 0.15))
    )
    image = ink * np.clip((thickness - distances(segments, size)) / blur + 0.5, 0, 1)
    image += noise * generator.standard_normal(image.shape, np.float32)
    ink_on_paper: Array = (np.clip(image, 0, 1) * 255).astype(np.uint8)
    return ink_on_paper


def draw_digits(key: Key, count: int, size: int = 28) -> tuple[Array, Array]:
    """`count` drawings of numerals: images (count, size, size) of uint8, labels (count,).

    Strokes, bent, slanted, turned, scaled, shifted, of random thickness, blur, ink and noise:
    a stand-in for MNIST where there is no network. The same key gives the same images.
    """
    count = check_whole("count", count, 1)
    size = check_whole("size", size, 8)
    generator = generator_of(key)
    labels = generator.integers(0, 10, count)
    images = np.empty((count, size, size), np.uint8)
    ways = [(digit, way) for digit, written in enumerate(numerals()) for way in written]
    pick = generator.random(count)
    for digit in range(10):
        strokes = [way for number, way in ways if number == digit]
        for choice, way in enumerate(strokes):
            chosen = (labels == digit) & ((pick * len(strokes)).astype(int) == choice)
            for part in np.array_split(np.flatnonzero(chosen), chosen.sum() // 128 + 1):
                images[part] = draw(pen_positions(way, generator, len(part)), generator, size)
    return images, labels
