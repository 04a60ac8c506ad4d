"""Pictures: arrays in, files out (needs matplotlib)."""

import numpy as np
import pytest

from training import pictures

matplotlib = pytest.importorskip("matplotlib", reason="pictures need matplotlib, which is optional")


def rows(steps, losses, accuracies, validation=False):
    """The rows of a run's metrics; in validation all is more by one."""
    found = []
    for step, *values in zip(steps, losses, accuracies, strict=True):
        row = dict(zip(("loss", "accuracy"), values, strict=True))
        more = {f"validation_{name}": value + 1 for name, value in row.items() if validation}
        found.append({"step": step, **row, **more})
    return found


def test_curves_of_several_runs(drawn, tmp_path):
    runs = {
        "--lr 0.1 $": rows([5, 10], [1.0, 0.01], [0.5, 0.9], validation=True),
        "--lr 1": rows([7], [0.3], [0.6]),
    }
    pictures.plot_curves(tmp_path / "a.png", runs, "train_mlp.py $x$")
    loss, accuracy = drawn[tmp_path / "a.png"].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
    assert lines == {
        r"--lr 0.1 \$, training": [[5, 1.0], [10, 0.01]],
        r"--lr 0.1 \$, validation": [[5, 2.0], [10, 1.01]],
        "--lr 1, training": [[7, 0.3]],
    }
    assert accuracy.lines[2].get_xydata().tolist() == [[7, 0.6]]
    assert len({line.get_color() for line in loss.lines}) == 2
    assert (loss.get_yscale(), accuracy.get_yscale()) == ("log", "linear")
    assert (loss.get_ylabel(), accuracy.get_ylabel(), loss.get_xlabel()) == (
        "loss", "accuracy", "step",
    )  # fmt: skip
    assert drawn[tmp_path / "a.png"].get_suptitle() == r"train_mlp.py \$x\$"
    errors = [{"step": 1, "loss": 0.0, "error": 0.5}]
    pictures.plot_curves(tmp_path / "b.png", {"": errors}, "")
    assert [panel.get_ylabel() for panel in drawn[tmp_path / "b.png"].axes] == [
        "loss",
        "mean absolute error",
    ]
    assert [line.get_label() for line in drawn[tmp_path / "b.png"].axes[0].lines] == ["training"]


@pytest.mark.parametrize(("count", "low"), [(70, 0.0), (2, -0.5)])
def test_a_grid_has_at_most_64_images_in_one_range(drawn, tmp_path, count, low):
    images = np.random.default_rng(0).random((count, 4, 5)) + low
    titles = [f"{number}" for number in range(count)]
    pictures.plot_grid(tmp_path / "grid.png", images, "all", titles)
    panels = drawn[tmp_path / "grid.png"].axes
    assert [panel.get_title() for panel in panels] == titles[:64]
    high = np.abs(images[:64]).max()
    expected = (images[:64] + high) / (2 * high) if low else images[:64] / high
    np.testing.assert_allclose([panel.images[0].get_array() for panel in panels], expected)


def test_images_of_three_channels_are_colored_and_others_gray():
    for channels in (1, 2, 3, 4):
        images = np.random.default_rng(0).random((2, channels, 4, 5))
        expected = images.transpose(0, 2, 3, 1) if channels == 3 else images.mean(axis=1)
        np.testing.assert_allclose(pictures.as_pictures(images), expected)


def test_maps_are_a_line_of_channels_for_each_name(drawn, tmp_path):
    maps = [("image", np.ones((1, 4, 4))), ("convolution 1", np.ones((20, 4, 4)))]
    pictures.plot_maps(tmp_path / "maps.png", maps)
    panels = drawn[tmp_path / "maps.png"].axes
    assert [len(panel.images) for panel in panels] == [1] + [0] * 15 + [1] * 16
    assert (panels[0].get_ylabel(), panels[16].get_ylabel()) == ("image", "convolution 1")


@pytest.mark.parametrize("classes", [2, 30, 40, 250])
def test_the_confusion_counts_who_was_taken_for_whom(drawn, tmp_path, classes):
    labels, predicted = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    names = [f"class {number}" for number in range(classes)]
    pictures.plot_confusion(tmp_path / "confusion.png", predicted, labels, names)
    (panel,) = drawn[tmp_path / "confusion.png"].axes
    wrong = np.zeros((classes, classes))
    wrong[0, 1] = wrong[1, 0] = 1
    np.testing.assert_array_equal(panel.images[0].get_array(), wrong)
    assert panel.get_title() == "test accuracy 60.00%"
    texts = {text.get_position(): text.get_text() for text in panel.texts}
    if classes > 200:  # nothing that is too small to be read
        assert not texts
        assert not panel.get_yticklabels()
        return
    assert texts == {(0, 0): "1", (1, 0): "1", (0, 1): "1", (1, 1): "2"}
    assert [tick.get_text() for tick in panel.get_yticklabels()] == names


def test_the_furthest_off_of_the_misclassified_come_first(drawn, tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    logits, images = rng.normal(size=(200, 3)), rng.random((200, 1, 2, 2))
    pictures.draw_mistakes(tmp_path, images, labels, logits, ["cat", "$b$", "c"])
    predicted = logits.argmax(axis=1)
    wrong = [i for i in range(200) if predicted[i] != labels[i]]
    worst = sorted(wrong, key=lambda i: logits[i, labels[i]] - logits[i].max())[:40]
    panels = [panel for panel in drawn[tmp_path / "mistakes.png"].axes if panel.images]
    assert len(panels) == len(worst) == 40
    names = ["cat", r"\$b\$", "c"]
    for panel, i in zip(panels, worst, strict=True):
        np.testing.assert_allclose(panel.images[0].get_array(), images[i, 0] / images[worst].max())
        assert panel.get_title() == f"{names[labels[i]]} \N{RIGHTWARDS ARROW} {names[predicted[i]]}"
    title = drawn[tmp_path / "mistakes.png"].get_suptitle()
    assert title.startswith(f"{len(wrong)} of 200 test images ")
    assert title.endswith("; the 40 furthest off")
    assert tmp_path / "confusion.png" in drawn
    drawn.clear()
    pictures.draw_mistakes(tmp_path, images[:1], labels[:1], np.eye(3)[labels[:1]], ["a"] * 3)
    assert list(drawn) == [tmp_path / "confusion.png"]  # nothing is misclassified


def overlapping(figure):
    """The texts of a figure that share a pixel, and how many there are."""
    figure.draw_without_rendering()
    texts = list(figure.texts)
    for panel in figure.axes:
        texts += [panel.title, *panel.texts]
        for axis in (panel.xaxis, panel.yaxis) if panel.axison else ():
            texts += [axis.label, *axis.get_ticklabels()]
    texts = [text for text in texts if text.get_text()]
    x0, y0, x1, y1 = np.array([text.get_window_extent().extents for text in texts]).T
    meets = (x0[:, None] < x1) & (x0 < x1[:, None]) & (y0[:, None] < y1) & (y0 < y1[:, None])
    pairs = np.argwhere(np.triu(meets, 1))
    return [(texts[i].get_text(), texts[j].get_text()) for i, j in pairs], len(texts)


@pytest.mark.parametrize(
    ("name", "classes"), [("{}", 10), ("Grapefruit Pink (ripe) {}", 40), ("WM" * 20 + " {}", 2)]
)
def test_class_names_do_not_overlap(drawn, tmp_path, name, classes):
    names = [name.format(number) for number in range(classes)]
    labels = np.arange(-10, 0) % classes
    logits = np.eye(classes)[(labels + 1) % classes]
    pictures.draw_mistakes(tmp_path, np.zeros((10, 1, 4, 4)), labels, logits, names)
    pairs, count = overlapping(drawn[tmp_path / "confusion.png"])
    assert not pairs
    assert count == 2 * classes + 3 + min(10, classes)
    pairs, count = overlapping(drawn[tmp_path / "mistakes.png"])
    assert not pairs
    assert count == 11


def test_no_text_is_cut_off_at_the_edge(tmp_path):
    names = ["Grapefruit Pink (ripe)", "Grapefruit White (unripe)"]
    images, labels = np.zeros((3, 1, 4, 4)), np.array([0, 1, 1])
    pictures.draw_mistakes(tmp_path, images, labels, np.eye(2)[[1, 0, 0]], names)
    for file in ("confusion.png", "mistakes.png"):
        pixels = matplotlib.pyplot.imread(tmp_path / file)
        assert all(
            (edge == 1).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
        )


def test_long_names_keep_their_beginning_and_their_end():
    assert pictures.shorten("Grapefruit") == "Grapefruit"
    assert pictures.shorten("Grapefruit", 8) == "Gra\N{HORIZONTAL ELLIPSIS}ruit"
    assert len(pictures.shorten("x" * 300)) == 30


def test_only_the_pictures_of_a_run_are_removed(tmp_path):
    images, labels = np.zeros((2, 1, 4, 4)), np.array([0, 1])
    pictures.draw_mistakes(tmp_path, images, labels, np.eye(2)[::-1], ["a", "b"])
    pictures.plot_curves(tmp_path / "compare.png", {"a": rows([1], [1], [1])}, "")
    figure = pictures.pyplot().figure()
    figure.savefig(tmp_path / "mine.png")
    pictures.pyplot().close(figure)
    (tmp_path / "notes.txt").write_bytes(pictures.MARK)
    (tmp_path / "folder.png").mkdir()
    names = {"compare.png", "mine.png", "notes.txt", "folder.png"}
    assert {path.name for path in tmp_path.iterdir()} == {*names, "confusion.png", "mistakes.png"}
    pictures.remove_pictures(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == names


def test_the_fit_of_a_curve(drawn, tmp_path):
    x = np.linspace(-1, 1, 5)[:, None]
    pictures.plot_fit(tmp_path / "fit.png", x, np.sin(x), np.sin(x) + 0.25)
    above, below = drawn[tmp_path / "fit.png"].axes
    target, output = (line.get_ydata() for line in above.lines)
    np.testing.assert_allclose(output - target, 0.25)
    np.testing.assert_allclose(below.lines[0].get_ydata(), 0.25)
    assert above.get_title() == "mean absolute error 0.25 at 5 points"


def test_class_names_that_no_font_can_draw_become_numbers(recwarn):
    assert pictures.drawable_names(["cat", "dög", "β"]) == ["cat", "dög", "β"]
    nowhere = "\U0010fffd"  # for private use: no font has it
    assert pictures.drawable_names(["cat", nowhere]) == ["0", "1"]
    assert pictures.drawable_names(["$\\frac$"]) == [r"\$\frac\$"]
    assert pictures.drawable_names(["x" * 99]) == [pictures.shorten("x" * 99)]


def test_pictures_are_files_and_no_figure_stays_open(tmp_path):
    folder = tmp_path / "$\\plots$"
    folder.mkdir()
    labels, images = np.array([0, 1]), np.random.default_rng(0).random((2, 3, 6, 6))
    pictures.plot_curves(folder / "curves.png", {"$": rows([1], [1], [1])}, "$\\frac$ \udcff")
    pictures.draw_mistakes(folder, images, labels, np.eye(2)[::-1], ["$\\frac$", "b"])
    pictures.plot_maps(folder / "maps.png", [("$", images[0])])
    pictures.plot_fit(folder / "fit.png", np.ones((2, 1)), np.ones((2, 1)), np.ones((2, 1)))
    names = {"curves.png", "confusion.png", "mistakes.png", "maps.png", "fit.png"}
    assert {path.name for path in folder.iterdir()} == names
    for path in folder.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 1_000
    assert matplotlib.get_backend().lower() == "agg"
    assert not pictures.pyplot().get_fignums()
