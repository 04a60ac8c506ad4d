"""Arrays as pictures, in files (needs matplotlib)."""

from __future__ import annotations

import contextlib
import math
import os
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from training.files import open_binary

CURVES = {"loss": "loss", "accuracy": "accuracy", "error": "mean absolute error"}
COMPARISON = "compare.png"  # of several runs; all other pictures are of one
MARK = b"tEXtSoftware\0purenn"  # near the beginning of the files that `save_figure` writes


def pyplot() -> Any:
    """matplotlib's pyplot, drawing into files. ValueError if it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def save_figure(figure: Any, path: str) -> None:
    """Write a figure, with all texts beside it, and close it."""
    figure.savefig(path, dpi=120, bbox_inches="tight", metadata={"Software": "purenn"})
    pyplot().close(figure)


def is_ours(path: str) -> bool:
    """Whether `save_figure` wrote this file."""
    with contextlib.suppress(OSError, ValueError), open_binary(path) as file:
        return MARK in file.read(100)
    return False


def remove_pictures(folder: str) -> None:
    """Remove the pictures of a run from a folder, and nothing that is not ours."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if name.endswith(".png") and name != COMPARISON and is_ours(path):
            os.remove(path)


def text_width(texts: Sequence[str], size: float | str | None) -> float:
    """The width of the widest of these texts, in inches."""
    figure = pyplot().figure()
    widths = [figure.text(0, 0, text, size=size).get_window_extent().width for text in texts]
    pyplot().close(figure)
    return float(max(widths, default=0) / figure.dpi)


def shorten(name: str, length: int = 30) -> str:
    """A name of at most so many characters, without its middle where it is longer."""
    if len(name) <= length:
        return name
    half = length // 2
    return f"{name[: half - 1]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"


def escape_dollars(text: str) -> str:
    """The text for a picture, where what stands between two dollars would be read as TeX.

    A name of a file may have bytes in it that are no text, and no font draws these.
    """
    return text.encode(errors="replace").decode().replace("$", r"\$")


def drawable_names(names: Sequence[str]) -> list[str]:
    """The names, shortened, with a font that can draw them; their numbers where there is none."""
    rc_params = pyplot().rcParams
    from matplotlib import font_manager

    characters = set("".join(names))
    fonts: list[Any] = [font_manager.findfont("DejaVu Sans")]
    fonts += [font.fname for font in font_manager.fontManager.ttflist]
    for path in fonts:
        font = font_manager.get_font(path)
        if font.family_name.startswith("Last Resort"):
            continue  # comes with matplotlib and has a box for every character
        if all(font.get_char_index(ord(character)) for character in characters):
            rc_params["font.family"] = ["DejaVu Sans", font.family_name]
            return [escape_dollars(shorten(name)) for name in names]
    return [str(number) for number in range(len(names))]


def plot_curves(path: str, runs: dict[str, list[dict[str, float]]], title: str) -> None:
    """Loss and accuracy (or error) by step, in training and validation, of every {label: rows}."""
    quantities = [name for name in next(iter(runs.values()))[0] if name in CURVES]
    figure, panels = pyplot().subplots(1, 2, figsize=(11, 5), layout="constrained")
    for number, (label, rows) in enumerate(runs.items()):
        steps = [row["step"] for row in rows]
        look = {"color": f"C{number % 10}", "marker": "." if len(rows) <= 30 else ""}
        for part, prefix, style in (("training", "", "--"), ("validation", "validation_", "-")):
            if f"{prefix}loss" not in rows[0]:
                continue
            name = f"{escape_dollars(label)}, {part}" if label else part
            look |= {"linestyle": style, "label": name}
            for panel, quantity in zip(panels, quantities, strict=True):
                panel.plot(steps, [row[prefix + quantity] for row in rows], **look)
    for panel, quantity in zip(panels, quantities, strict=True):
        bottom, top = panel.dataLim.intervaly
        if 0 < 10 * bottom < top and quantity != "accuracy":
            panel.set_yscale("log")
        panel.set(xlabel="step", ylabel=CURVES[quantity])
        panel.grid(alpha=0.3, which="both")
    handles, labels = panels[0].get_legend_handles_labels()
    columns = max(1, min(4, 140 // (max(map(len, labels)) + 8)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    figure.suptitle(textwrap.fill(escape_dollars(title), 120), fontsize="medium")
    save_figure(figure, path)


def as_pictures(images: np.ndarray) -> np.ndarray:
    """images (N, C, H, W) as (N, H, W, 3), or their mean over C as (N, H, W) where C is not 3."""
    return np.moveaxis(images, 1, -1) if images.shape[1] == 3 else np.mean(images, axis=1)


def plot_grid(path: str, images: np.ndarray, title: str, titles: Sequence[str] = ()) -> None:
    """Up to 64 images (N, H, W) or (N, H, W, 3) beside each other, in one range of gray.

    Where there are negative values, zero is in its middle: these are weights. Every title has as
    much room as the widest of them needs.
    """
    images, titles = images[:64], titles[:64]
    width = max(1.0, text_width(titles, "small") + 0.15)
    columns = math.ceil(math.sqrt(len(images) / width))
    lines = math.ceil(len(images) / columns)
    side = max(1.0, 5 / columns)
    above = 0.2 * max((text.count("\n") + 1 for text in titles), default=0)
    figure, panels = pyplot().subplots(
        lines,
        columns,
        figsize=(columns * max(side, width), lines * (side + above) + 0.5),
        layout="constrained",
        squeeze=False,
    )
    high = float(np.abs(images).max()) or 1.0
    low = -high if images.min() < 0 else 0.0
    for panel in panels.flat:
        panel.axis("off")
    for panel, image in zip(panels.flat, images, strict=False):
        panel.imshow((image - low) / (high - low), cmap="gray", vmin=0, vmax=1)
    for panel, text in zip(panels.flat, titles, strict=False):
        panel.set_title(text, fontsize="small", pad=2)
    figure.suptitle(title)
    save_figure(figure, path)


def plot_maps(path: str, maps: Sequence[tuple[str, np.ndarray]]) -> None:
    """One line of pictures for each (name, (C, H, W)): its first 16 channels."""
    columns = min(16, max(len(channels) for _, channels in maps))
    figure, panels = pyplot().subplots(
        len(maps),
        columns,
        figsize=(columns * 0.8 + 1, len(maps) * 0.9),
        layout="constrained",
        squeeze=False,
    )
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
        panel.set_frame_on(False)
    for line, (name, channels) in zip(panels, maps, strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for panel, channel in zip(line, channels, strict=False):
            panel.imshow(channel, cmap="gray")
    save_figure(figure, path)


def fitting_size(size: float, width: float, room: float) -> float | None:
    """A font size at which what is so wide at `size` fits; None for one too small to be read."""
    fitting = size * min(1.0, room / width)
    return fitting if fitting >= 4 else None


def plot_confusion(
    path: str, predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> None:
    """How many images of each class (down) were predicted as which (across)."""
    classes = len(names)
    counts = np.bincount(labels * classes + predicted, minlength=classes**2)
    counts = counts.reshape(classes, classes)
    side = min(max(2.0, 0.5 * classes), 15.0)
    cell = side / classes
    figure = pyplot().figure(figsize=(side, side))
    panel = figure.add_axes((0, 0, 1, 1))  # all texts stand beside it
    wrong = counts * (1 - np.eye(classes, dtype=int))
    panel.imshow(wrong, cmap="Reds", vmax=max(int(wrong.max()), 1))  # the correct ones stay white
    size = fitting_size(8, max(text_width([str(counts.max())], 8), 8 / 72), 0.8 * cell)
    for label, prediction in np.argwhere(counts) if size else ():
        dark = wrong[label, prediction] > 0.6 * wrong.max() > 0
        number, color = counts[label, prediction], "white" if dark else "black"
        panel.text(prediction, label, number, ha="center", va="center", fontsize=size, color=color)
    size = fitting_size(10, 10 / 72, 0.8 * cell)
    shown = names if size else ()
    rotation = 90 if text_width(shown, size) > 0.9 * cell else 0
    panel.set_xticks(range(len(shown)), shown, size=size, rotation=rotation)
    panel.set_yticks(range(len(shown)), shown, size=size)
    right = counts.trace() / max(counts.sum(), 1)
    panel.set(xlabel="predicted", ylabel="class", title=f"test accuracy {right:.2%}")
    save_figure(figure, path)


def draw_mistakes(
    folder: str, images: np.ndarray, labels: np.ndarray, logits: np.ndarray, classes: Sequence[str]
) -> None:
    """confusion.png; of images (N, C, H, W) also mistakes.png: the misclassified, worst first."""
    names = drawable_names(classes)
    predicted = logits.argmax(axis=1)
    plot_confusion(os.path.join(folder, "confusion.png"), predicted, labels, names)
    (wrong,) = np.nonzero(predicted != labels)
    if not len(wrong) or images.ndim != 4:
        return
    logits = logits[wrong]
    lead = logits.max(axis=1) - logits[np.arange(len(wrong)), labels[wrong]]
    worst = wrong[np.argsort(-lead, kind="stable")][:40]
    arrow = " \N{RIGHTWARDS ARROW} "
    titles = [f"{names[labels[i]]}{arrow}{names[predicted[i]]}" for i in worst]
    if text_width(titles, "small") > 1:  # below each other
        titles = [f"{names[labels[i]]}\n{arrow}{names[predicted[i]]}" for i in worst]
    title = f"{len(wrong):,} of {len(labels):,} test images misclassified"
    if len(wrong) > len(worst):
        title += f"; the {len(worst)} furthest off"
    path = os.path.join(folder, "mistakes.png")
    plot_grid(path, as_pictures(images[worst]), title, titles)


def plot_fit(path: str, x: np.ndarray, y: np.ndarray, output: np.ndarray) -> None:
    """The curve y = sin x, what the network makes of it, and the difference."""
    figure, (above, below) = pyplot().subplots(
        2, 1, figsize=(7, 6), height_ratios=(2, 1), sharex=True, layout="constrained"
    )
    above.plot(x, y, color="lightgray", linewidth=6, label="y = sin x")
    above.plot(x, output, color="C3", linewidth=1.5, label="network")
    above.set(ylabel="y")
    above.legend()
    below.plot(x, output - y, color="C3", linewidth=1)
    below.axhline(0, color="gray", linewidth=0.5)
    below.set(xlabel="x", ylabel="network - sin x")
    below.ticklabel_format(axis="y", scilimits=(0, 0))
    for panel in (above, below):
        panel.grid(alpha=0.3)
    error = float(np.abs(output - y).mean())
    above.set_title(f"mean absolute error {error:.2g} at {len(x):,} points")
    save_figure(figure, path)
