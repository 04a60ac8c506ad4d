"""Run folders: resumed to the same bits, never written over, refused in a sentence."""

import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

import purenn as nn
from training import checkpoints, loop
from training.tests.conftest import (
    REPOSITORY,
    blobs,
    last_line,
    metrics,
    mlp_experiment,
    outputs_in,
    refusal,
    refusal_in_time,
    train_cnn_on,
    train_on,
)

# --- resumed ---


class Killed(BaseException):
    """Stands for a process that ends at once."""


@pytest.mark.parametrize(
    ("start", "options"),
    [
        (train_on, ["--optimizer", "adam", "--dropout", "0.5", "--checkpoint-every", "4"]),
        (train_on, ["--schedule", "plateau", "--report-every", "5", "--checkpoint-every", "4"]),
        (train_on, ["--augment", "--validation", "0", "--checkpoint-every", "3"]),
        (train_on, ["--train-only", "out", "--optimizer", "rmsprop", "--checkpoint-every", "5"]),
        (train_cnn_on, ["--augment", "--optimizer", "sgd", "--checkpoint-every", "4"]),
    ],
)
def test_a_resumed_training_is_the_same_to_the_bit(
    start, options, blob_file, tmp_path, monkeypatch, capsys
):
    options = [*options, "--epochs", "3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start(blob_file, *options, "--out", whole) == 0
    last = last_line(capsys)
    original, steps = loop.take_step, itertools.count()

    def killed_at_times(*arguments):
        if next(steps) % 11 == 8:
            raise Killed
        return original(*arguments)

    monkeypatch.setattr(loop, "take_step", killed_at_times)
    for _ in range(20):
        try:
            assert start(blob_file, *options, "--out", parts, "--resume") == 0
        except Killed:
            continue
        break
    assert last_line(capsys) == last
    assert next(steps) > 40
    assert outputs_in(parts) == outputs_in(whole)
    assert start(blob_file, *options, "--out", parts, "--resume") == 0  # nothing is left to do
    assert last_line(capsys) == last
    assert outputs_in(parts) == outputs_in(whole)


def test_a_training_killed_at_any_moment_goes_on_to_the_same_bits(blob_file, tmp_path):
    command = [sys.executable, str(REPOSITORY / "train_mlp.py"), "--data", blob_file]
    command += ["--hidden", "8", "--epochs", "8", "--batch-size", "8", "--checkpoint-every", "9"]
    subprocess.run([*command, "--out", tmp_path / "whole"], check=True, capture_output=True)
    rng, kills = np.random.default_rng(0), 0
    while True:
        process = subprocess.Popen(
            [*command, "--out", tmp_path / "parts", "--resume"], stdout=subprocess.PIPE, text=True
        )
        assert "parameters to train" in process.stdout.readline()
        try:
            process.wait(rng.uniform(0, 0.2) if kills < 4 else None)
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
        finally:
            process.stdout.close()
    assert process.returncode == 0
    assert kills > 0
    assert outputs_in(tmp_path / "parts") == outputs_in(tmp_path / "whole")
    assert not list((tmp_path / "parts").glob("*.tmp"))


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(
    blob_file, tmp_path, monkeypatch, capsys
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_on(blob_file, "--out", whole) == 0
    original = loop.take_step

    def interrupted(experiment, optimizer, progress, index):
        progress = original(experiment, optimizer, progress, index)
        if progress.step == 7:
            signal.raise_signal(signal.SIGINT)
        return progress

    monkeypatch.setattr(loop, "take_step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert train_on(blob_file, "--out", parts) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().err.endswith(
        "interrupted after step 7 of 24; the same command with --resume goes on from there\n"
    )
    assert nn.load(parts / "checkpoint.npz")["step"] == 7
    assert train_on(blob_file) == 130
    assert "after step 7 of 24; with --out it could be gone on with" in capsys.readouterr().err
    assert train_on(blob_file, "--out", parts, "--resume") == 0
    assert outputs_in(parts) == outputs_in(whole)


@pytest.mark.parametrize("schedule", ["constant", "one-cycle"])
def test_more_epochs_extend_a_finished_run(schedule, blob_file, tmp_path, capsys):
    long, extended = tmp_path / "long", tmp_path / "extended"
    options = ["--schedule", schedule, "--out"]
    assert train_on(blob_file, *options, long, "--epochs", "3") == 0
    assert train_on(blob_file, *options, extended) == 0
    capsys.readouterr()
    assert train_on(blob_file, *options, extended, "--resume", "--epochs", "3") == 0
    assert ("--schedule one-cycle" in capsys.readouterr().out) == (schedule == "one-cycle")
    assert len(metrics(extended)) == 3
    same = outputs_in(long) == outputs_in(extended)
    assert same == (schedule == "constant")
    before = outputs_in(extended)
    assert train_on(blob_file, *options, extended, "--resume", "--epochs", "1") == 2  # fewer
    assert outputs_in(extended) == before


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_loaded(
    blob_file, tmp_path, capsys
):
    assert train_on(blob_file, "--out", tmp_path) == 0
    before = outputs_in(tmp_path)
    capsys.readouterr()
    assert train_on("nowhere", "--out", tmp_path, "--seed", "1") == 2
    out, errors = capsys.readouterr()
    assert f"{tmp_path}: this folder holds a run; " in errors
    assert "--resume" in errors
    assert (out, errors.count("\n")) == ("", 1)
    assert outputs_in(tmp_path) == before
    for name in checkpoints.OUTPUTS:  # any file of a run is worth keeping
        (tmp_path / name).rename(tmp_path / "kept")
        for other in set(checkpoints.OUTPUTS) - {name}:
            (tmp_path / other).unlink()
        (tmp_path / "kept").rename(tmp_path / name)
        with pytest.raises(ValueError, match="this folder holds a run"):
            checkpoints.check_unused(str(tmp_path))
        for other, content in before.items():
            (tmp_path / other).write_bytes(content)


def test_resuming_where_there_is_nothing_begins(blob_file, tmp_path):
    for name, options in (("a", []), ("b", ["--resume"])):
        assert train_on(blob_file, "--out", tmp_path / name, *options) == 0
    assert outputs_in(tmp_path / "a") == outputs_in(tmp_path / "b")


def test_a_checkpoint_says_with_which_shards_it_was_written(blob_file, tmp_path, capsys):
    assert train_on(blob_file, "--out", tmp_path) == 0
    assert train_on(blob_file, "--out", tmp_path, "--resume") == 0
    assert "shards a batch" not in capsys.readouterr().out
    assert train_on(blob_file, "--out", tmp_path, "--resume", "--shards", "2") == 0
    assert "written with 1 shards a batch, so what follows will differ" in capsys.readouterr().out


# --- what cannot be resumed ---


@pytest.fixture(scope="module")
def finished(blob_file, tmp_path_factory):
    """{name: bytes} of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    assert train_on(blob_file, "--out", folder) == 0
    return outputs_in(folder)


@pytest.fixture
def folder(finished, tmp_path):
    """A folder that holds a finished run, to be changed."""
    for name, content in finished.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def resumed(data, folder, capsys, *options):
    """What is said, in one line and with exit code 2, of a run that cannot be resumed."""
    before = outputs_in(folder)
    assert train_on(data, "--out", folder, "--resume", *options) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert outputs_in(folder) == before
    prefix, _, message = errors.partition(f"{folder / 'checkpoint.npz'}: cannot be ")
    assert prefix.endswith("error: ")
    return message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--hidden", "9"], "it is of another training: --hidden [8] then, [9] now"),
        (["--lr", "0.1"], "it is of another training: --lr 0.002 then, 0.1 now"),
        (["--augment", "shift=1"], 'it is of another training: --augment default then, ["shift'),
        (["--data", "other"], "it is of another training: the data are others"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    options, words, blob_file, folder, tmp_path_factory, capsys
):
    if "other" in options:
        images, labels = blobs(200, (9, 6, 3), 4, 7)
        other = tmp_path_factory.mktemp("other") / "other.npz"
        np.savez(other, x_train=images, y_train=labels, x_test=images, y_test=labels)
        options = ["--data", other]
    assert resumed(blob_file, folder, capsys, *options).startswith(f"resumed: {words}")


def as_bytes(value):
    """JSON as it is in a checkpoint."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


@pytest.mark.parametrize(
    "change",
    [
        *({"about": value} for value in (None, as_bytes([]), as_bytes({}), as_bytes(3))),
        {"about": np.frombuffer(b"[1", np.uint8)},
        {"about": np.frombuffer(b"[" * 100_000, np.uint8)},
        {"params": None},
        {"params": {"out": {"W": np.ones((8, 4))}}},
        {"best": {"out": np.ones(3)}},
        {"step": np.ones(3, int)},
        {"step": np.array(-1)},
        {"step": np.array(10**9)},
        {"sums": np.zeros(2)},
        {"best_score": np.zeros(2)},
        {"rows": np.zeros((2, 3))},
        {"rows": np.zeros(6)},
        {"rows": np.array(1.0)},
        {"rows": {"a": np.zeros(6)}},
        {"in two\nlines": np.ones(1)},
        {"state": {}},
        {"more": np.ones(1)},
    ],
)
def test_a_checkpoint_that_is_none_is_refused(change, blob_file, folder, capsys):
    path = folder / "checkpoint.npz"
    tree = {name: value for name, value in {**nn.load(path), **change}.items() if value is not None}
    nn.save(path, tree)
    assert resumed(blob_file, folder, capsys).startswith("resumed: ")


def test_a_damaged_checkpoint_is_refused(blob_file, folder, capsys):
    (folder / "checkpoint.npz").write_bytes(b"PK\x03\x04 and nothing more")
    assert resumed(blob_file, folder, capsys).startswith("read: ")


def changed_fingerprint(folder, change):
    """Change what a checkpoint says of its training, as another version would have written it."""
    path = folder / "checkpoint.npz"
    tree = nn.load(path)
    about = json.loads(tree["about"].tobytes())
    change(about)
    nn.save(path, {**tree, "about": as_bytes(about)})


def test_an_older_checkpoint_without_an_option_had_its_default(blob_file, folder, capsys):
    def forget(about):
        for flag in ("--clip", "--weight-decay", "--reduction", "--init-from"):
            about["options"].pop(flag, None)

    changed_fingerprint(folder, forget)
    message = resumed(blob_file, folder, capsys, "--weight-decay", "0.1")
    assert message.startswith(
        "resumed: it is of another training: --weight-decay 0.0 then, 0.1 now"
    )
    assert train_on(blob_file, "--out", folder, "--resume") == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda about: about.update(format=checkpoints.FORMAT + 1),
            "its format version is 2, this ver",
        ),
        (
            lambda about: about.pop("format"),
            "it has no format version: an older version of purenn wr",
        ),
        (
            lambda about: about["options"].update({"--magic": 3}),
            "it is of another training: --magic 3 t",
        ),
    ],
)
def test_a_checkpoint_of_another_version_is_refused(change, words, blob_file, folder, capsys):
    changed_fingerprint(folder, change)
    assert resumed(blob_file, folder, capsys).startswith(f"resumed: {words}")


# --- the folder ---


def test_a_second_run_into_the_same_folder_is_refused(blob_file, tmp_path, capsys):
    with checkpoints.lock_folder(str(tmp_path)):
        assert train_on(blob_file, "--out", tmp_path) == 2
        assert f"{tmp_path}: another run is writing into this folder" in capsys.readouterr().err
    assert train_on(blob_file, "--out", tmp_path) == 0


def test_what_a_killed_run_left_half_written_is_removed(blob_file, tmp_path):
    for name in ("checkpoint.npz.123.tmp", "metrics.csv.4.tmp", "notes.tmp"):
        (tmp_path / name).write_bytes(b"half")
    assert train_on(blob_file, "--out", tmp_path) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*checkpoints.OUTPUTS, "lock", "notes.tmp"}


def test_a_full_disk_leaves_no_half_written_model(blob_file, tmp_path, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert train_on(blob_file, "--out", tmp_path / "out") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == ["lock"]


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_a_training_that_fails_keeps_its_last_checkpoint(blob_file, tmp_path, monkeypatch, capsys):
    original = loop.take_step

    def spoiled(experiment, optimizer, progress, index):
        if progress.step == 15:
            out = nn.tree_map(partial(np.full_like, fill_value=np.nan), progress.params["out"])
            progress = progress._replace(params={**progress.params, "out": out})
        return original(experiment, optimizer, progress, index)

    monkeypatch.setattr(loop, "take_step", spoiled)
    assert train_on(blob_file, "--out", tmp_path) == 2
    errors = capsys.readouterr().err
    assert "the loss became nan in step 15: out/" in errors
    assert errors.count("\n") == 1
    assert nn.load(tmp_path / "checkpoint.npz")["step"] == 12


# --- metrics.csv and model.npz ---


def test_a_run_keeps_the_best_epoch_and_all_metrics(blob_file, tmp_path, capsys):
    options = ["--epochs", "6", "--schedule", "constant", "--out", tmp_path]
    assert train_on(blob_file, *options) == 0
    numbers = re.findall(r"=(\d\.\d{4})", last_line(capsys))
    rows = metrics(tmp_path)
    assert [(row["epoch"], row["step"]) for row in rows] == [(n, 12 * n) for n in range(1, 7)]
    assert list(rows[0])[2:] == ["loss", "accuracy", "validation_loss", "validation_accuracy"]
    assert checkpoints.read_metrics(str(tmp_path)) == rows
    experiment, params = mlp_experiment(blob_file, hidden=(8,)), nn.load(tmp_path / "model.npz")
    loss, accuracy = loop.validate(experiment, params, "test")
    assert [f"{accuracy:.4f}", f"{loss:.4f}"] == numbers
    _, accuracy = loop.validate(experiment, params, "validation")
    assert accuracy == max(row["validation_accuracy"] for row in rows)


GOOD_METRICS = "epoch,step,loss,accuracy\n1,2,3,4\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "epoch,step,loss\n",
        "epoch,step,loss\n1,2,much\n",
        "epoch,step,loss\n1,2\n",
        "a,b\n1,2\n",
        "\xff\x00",
        f"epoch,step,loss,accuracy\n1,2,3,{'4' * 200_000}\n",
        "epoch,step,loss,accuracy\n1,2,3,4,5\n",
        "epoch,step,loss,accuracy\n1,2,1e308,4\n",
        "step,loss\n1,2\n",
        "epoch,step,loss,accuracy,validation_loss\n1,2,3,4,5\n",
    ],
)
def test_metrics_that_are_none_are_refused(text, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(GOOD_METRICS)
    assert len(checkpoints.read_metrics(str(tmp_path))) == 1
    path.write_bytes(text.encode("latin-1"))
    message = refusal(lambda path: checkpoints.read_metrics(path.parent), path)
    assert message.startswith("is not what --out writes: ")


# --- run.json ---


def test_run_json_says_what_is_needed_to_understand_a_run(blob_file, tmp_path):
    chosen = ["--augment", "shift=1", "--no-batch-norm", "--center", "--validation", "50"]
    assert train_on(blob_file, *chosen, "--out", tmp_path) == 0
    content = json.loads((tmp_path / "run.json").read_text())
    run = checkpoints.read_run(str(tmp_path))
    assert content == run._asdict()
    assert run.format == checkpoints.FORMAT
    assert run.classes == ["0", "1", "2", "3"]
    assert run.sample_shape == [3, 9, 6]
    assert run.pixel_range == [-0.5, 0.5]
    assert run.versions.keys() >= {"purenn", "numpy", "python"}
    assert run.versions["numpy"] == np.__version__
    values = {
        "--data": blob_file,
        "--epochs": 2,
        "--batch-size": 16,
        "--hidden": [8],
        "--lr": 0.002,  # of the optimizer
        "--optimizer": "adam",
        "--label-smoothing": 0.1,
        "--validation": 50,
        "--train-size": 150,
        "--test-size": 50,
        "--center": True,
        "--batch-norm": False,
        "--augment": ["shift=1.0"],
        "--momentum": None,
        "--shards": 1,
    }
    assert {flag: run.options[flag] for flag in values} == values
    assert "--out" not in run.options
    assert set(run.chosen) == {
        *("--epochs", "--batch-size", "--hidden", "--augment", "--batch-norm", "--center"),
        "--validation",
    }


def test_run_json_of_a_curve_has_no_classes(tmp_path):
    assert train_on(None, "--task", "sine", "--out", tmp_path) == 0
    run = checkpoints.read_run(str(tmp_path))
    assert (run.classes, run.sample_shape, run.pixel_range) == (None, [1], None)
    assert run.options["--task"] == "sine"
    assert run.options["--lr"] == 0.004


def broken_run(**change):
    """The text of a run.json with other or without some of its entries."""
    run = checkpoints.Run(
        checkpoints.FORMAT, "a.py", {"--lr": 1}, ["--lr"], None, [1], None, {}
    )._asdict()
    return json.dumps({name: value for name, value in {**run, **change}.items() if value != ""})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", ""),
        ("", ""),
        ("\xff", ""),
        ("[1]", ""),
        ("[" * 100_000, ""),
        ("{}", "it has no format version: an older version of purenn wrote it"),
        (broken_run(format=""), "it has no format version: an older version of purenn wrote it"),
        (broken_run(format=2), "its format version is 2, this version of purenn reads 1"),
        (broken_run(format=[1]), "its format version is [1], this version of purenn reads 1"),
        *((broken_run(**{name: ""}), "") for name in checkpoints.Run._fields),
        *((broken_run(options=value), "") for value in (None, [1], "x", {"--seed": 1})),
        *((broken_run(chosen=value), "") for value in (None, 3, [[]], ["--seed"])),
    ],
)
def test_a_run_json_that_is_none_is_refused(text, words, tmp_path):
    (tmp_path / "run.json").write_text(broken_run())
    assert checkpoints.read_run(str(tmp_path)).chosen == ["--lr"]
    (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
    message = refusal(lambda path: checkpoints.read_run(path.parent), tmp_path / "run.json")
    assert message.startswith(f"is not what --out writes: {words}")


@pytest.mark.parametrize(
    ("read", "name"),
    [(checkpoints.read_run, "run.json"), (checkpoints.read_metrics, "metrics.csv")],
)
def test_nothing_waits_for_a_pipe_or_invents_a_run(read, name, tmp_path):
    with pytest.raises(FileNotFoundError):
        read(str(tmp_path))
    os.mkfifo(pathlib.Path(tmp_path, name))
    message = refusal_in_time(read, str(tmp_path), tmp_path / name)
    assert message == "is not what --out writes: it is not a file"
