"""Run folders: resumed to the same bits, never written over, refused in a sentence."""

import contextlib
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

import purenn as nn
import train_mlp
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


# --- resumed ---


class Killed(BaseException):
    """Stands for a process that ends at once."""


@pytest.mark.parametrize(
    ("start", "options"),
    [
        (train_on, "--optimizer adam --dropout 0.5 --checkpoint-every 4"),
        (train_on, "--schedule plateau --report-every 5 --checkpoint-every 4 --clip 0.1"),
        (train_on, "--class-weights balanced --patience 9 --checkpoint-every 5 --loss mse"),
        (train_on, "--augment --validation 0 --checkpoint-every 3"),
        (train_on, "--train-only out --optimizer rmsprop --report-every 7 --checkpoint-every 4"),
        (train_cnn_on, "--augment --optimizer sgd --checkpoint-every 4"),
    ],
)
def test_a_resumed_training_is_the_same_to_the_bit(
    start, options, blob_file, tmp_path, monkeypatch, capsys
):
    options = [*options.split(), "--epochs", "3"]
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
    for seconds in (0, 0.02, 0.06, 0.15, None):  # the first one is surely killed
        process = subprocess.Popen(
            [*command, "--out", tmp_path / "parts", "--resume"], stdout=subprocess.PIPE, text=True
        )
        with process:
            assert "parameters to train" in process.stdout.readline()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            process.kill()
        assert process.returncode == -signal.SIGKILL or seconds != 0
    assert process.returncode == 0
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
    assert "after step 7 of 24; with --out it could be resumed" in capsys.readouterr().err
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


def test_patience_may_be_more_when_a_training_is_resumed(blob_file, tmp_path, capsys):
    """The same bits again and again; and with more patience those of a run that had it at once."""
    options = ["--lr", "0", "--no-batch-norm", "--report-every", "5", "--epochs", "9", "--out"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_on(blob_file, *options, whole, "--patience", "2") == 0
    assert train_on(blob_file, *options, parts, "--patience", "1") == 0
    assert [row["step"] for row in metrics(parts)] == [5, 10, 15, 20]  # the first one was the best
    before, said = outputs_in(parts), capsys.readouterr().out.splitlines()[-2]
    assert said.endswith("for 1 epoch (--patience): stopped after epoch 2 of 9")
    assert train_on(blob_file, *options, parts, "--resume", "--patience", "1") == 0
    assert outputs_in(parts) == before
    assert capsys.readouterr().out.splitlines()[-2] == said
    assert train_on(blob_file, *options, parts, "--resume", "--patience", "2") == 0
    assert outputs_in(parts) == outputs_in(whole)


def test_a_model_is_always_of_a_report_in_metrics(blob_file, tmp_path, monkeypatch):
    """The last report of a run may be of half an epoch; the longer run does not have it."""
    scores = {"long": [0.5, 0.6, 0.55, 0.55], "short": [0.5, 0.6, 0.9], "more": [0.55, 0.55]}
    out = {"long": tmp_path / "long", "short": tmp_path / "short", "more": tmp_path / "short"}
    for name, found in scores.items():
        left = iter(found)
        monkeypatch.setattr(
            loop, "validate", lambda _, __, part, left=left: (1.0, part == "test" or next(left))
        )
        options = ["--epochs", "2"] if name == "short" else ["--epochs", "3", "--resume"]
        options += ["--schedule", "constant", "--report-every", "10", "--out", out[name]]
        assert train_on(blob_file, *options) == 0
    assert outputs_in(tmp_path / "short") == outputs_in(tmp_path / "long")


def test_a_run_of_another_script_is_refused_before_anything_is_loaded(folder, capsys):
    (folder / "checkpoint.npz").unlink()
    assert train_cnn_on("nowhere", "--out", folder, "--resume") == 2
    message = capsys.readouterr().err
    assert f"{folder}: cannot be resumed: it is a run of " in message
    assert message.endswith(", and this script has no --task\n")


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_loaded(folder, capsys):
    before = outputs_in(folder)
    assert train_on("nowhere", "--out", folder) == 2
    out, errors = capsys.readouterr()
    assert f"{folder}: this folder holds a run; continue it with --resume, or" in errors
    assert (out, errors.count("\n")) == ("", 1)
    assert outputs_in(folder) == before


@pytest.mark.parametrize("name", checkpoints.OUTPUTS)
def test_any_file_of_a_run_is_a_run(name, tmp_path):
    checkpoints.check_unused(str(tmp_path))
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match="this folder holds a run"):
        checkpoints.check_unused(str(tmp_path))


def test_a_checkpoint_says_with_which_shards_it_was_written(blob_file, tmp_path, capsys):
    assert train_on(blob_file, "--out", tmp_path) == 0
    assert train_on(blob_file, "--out", tmp_path, "--resume") == 0
    assert "shards a batch" not in capsys.readouterr().out
    assert train_on(blob_file, "--out", tmp_path, "--resume", "--shards", "2") == 0
    assert "written with 1 shards a batch, so what follows will differ" in capsys.readouterr().out


# --- what cannot be resumed ---


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
        ("--hidden 9", "--hidden [8] then, [9] now"),
        ("--lr 0.1", "--lr 0.002 then, 0.1 now"),
        ("--clip 1", "--clip default then, 1.0 now"),
        ("--class-weights balanced", '--class-weights default then, ["balanced"] now'),
        ("--augment shift=1", '--augment default then, ["shift=1.0"] now'),
        ("--data other.npz", "the data differ"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    options, words, blob_file, folder, monkeypatch, capsys
):
    monkeypatch.chdir(folder)
    images, labels = blobs(200, (9, 6, 3), 4, 7)
    np.savez("other.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    message = resumed(blob_file, folder, capsys, *options.split())
    assert message == f"resumed: it belongs to a different run: {words}\n"


def as_bytes(value):
    """JSON as it is in a checkpoint."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


@pytest.mark.parametrize(
    "change",
    [
        *({"about": value} for value in (None, *map(as_bytes, ([], {}, 3)))),
        *({"about": np.frombuffer(text, np.uint8)} for text in (b"[1", b"[" * 100_000)),
        *(
            {"rows": rows}
            for rows in (np.zeros((2, 3)), np.zeros(6), np.ones(()), {"a": np.ones(6)})
        ),
        *({"step": step} for step in (np.ones(3, int), np.array(-1), np.array(10**9))),
        *({"params": params} for params in (None, {"out": {"W": np.ones((8, 4))}})),
        {"best": {"out": np.ones(3)}},
        {"sums": np.zeros(2)},
        {"best_score": np.zeros(2)},
        {"in two\nlines": np.ones(1)},
        {"more": np.ones(1)},
        {"state": {}},
        {},  # a damaged file
    ],
)
def test_a_checkpoint_that_is_none_is_refused(change, blob_file, folder, capsys):
    path = folder / "checkpoint.npz"
    if not change:
        path.write_bytes(path.read_bytes()[:-9])
        assert resumed(blob_file, folder, capsys).startswith("read: ")
        return
    tree = {name: value for name, value in {**nn.load(path), **change}.items() if value is not None}
    nn.save(path, tree)
    assert resumed(blob_file, folder, capsys).startswith("resumed: ")


def change_about(folder, change):
    """Change what a checkpoint says of its training, as another version would have written it."""
    tree = nn.load(folder / "checkpoint.npz")
    about = json.loads(tree["about"].tobytes())
    change(about)
    nn.save(folder / "checkpoint.npz", {**tree, "about": as_bytes(about)})


def test_an_older_checkpoint_without_an_option_had_its_default(blob_file, folder, capsys):
    change_about(
        folder, lambda about: [about["options"].pop(f"--{n}") for n in ("center", "reduction")]
    )
    message = resumed(blob_file, folder, capsys, "--center")
    assert message == "resumed: it belongs to a different run: --center false then, true now\n"
    assert train_on(blob_file, "--out", folder, "--resume") == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 99}, "its format version is 99, this version of purenn reads"),
        ({"format": None}, "it has no format version: an older version of purenn wrote it"),
        ("--magic", "it belongs to a different run: --magic 3 then, default now"),
    ],
)
def test_a_checkpoint_of_another_version_is_refused(change, words, blob_file, folder, capsys):
    if isinstance(change, str):  # an option that is unknown now
        change_about(folder, lambda about: about["options"].update({change: 3}))
    else:
        change_about(folder, lambda about: about.update(change))
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


# --- metrics.csv and model.npz ---


def test_a_run_keeps_the_best_epoch_and_all_metrics(blob_file, tmp_path, capsys):
    options = ["--epochs", "6", "--schedule", "constant", "--out", tmp_path]
    assert train_on(blob_file, *options) == 0
    numbers = re.findall(r"=(\d\.\d{4})", last_line(capsys))
    rows = metrics(tmp_path)
    assert [(row["epoch"], row["step"]) for row in rows] == [(n, 12 * n) for n in range(1, 7)]
    assert checkpoints.read_metrics(str(tmp_path)) == rows
    experiment, params = mlp_experiment(blob_file, hidden=(8,)), nn.load(tmp_path / "model.npz")
    loss, accuracy = loop.validate(experiment, params, "test")
    assert [f"{accuracy:.4f}", f"{loss:.4f}"] == numbers
    _, accuracy = loop.validate(experiment, params, "validation")
    assert accuracy == max(row["validation_accuracy"] for row in rows)


GOOD = "epoch,step,loss,accuracy\n1,2,3,4\n"
BAD_METRICS = [
    "", "\xff\x00", "a,b\n1,2\n", "step,loss\n1,2\n", "epoch,step,loss\n", "epoch,step,loss\n1,2\n",
    "epoch,step,loss\n1,2,much\n", f"{GOOD}1,2,3,{'4' * 200_000}\n", f"{GOOD}1,2,3,4,5\n",
    f"{GOOD}1,2,1e308,4\n", f"{GOOD}1,2,{'x' * 999},4\n",
    "epoch,step,loss,accuracy,validation_loss\n1,2,3,4,5\n",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_METRICS)
def test_metrics_that_are_none_are_refused(text, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(GOOD)
    assert len(checkpoints.read_metrics(str(tmp_path))) == 1
    path.write_bytes(text.encode("latin-1"))
    message = refusal(lambda path: checkpoints.read_metrics(path.parent), path)
    assert len(message) < 350
    assert message.startswith("is not what --out writes: ")


# --- run.json ---


def test_run_json_says_what_is_needed_to_understand_a_run(blob_file, tmp_path):
    chosen = "--augment shift=1 --no-batch-norm --center --validation 50 --out"
    assert train_on(blob_file, *chosen.split(), tmp_path) == 0
    run = checkpoints.read_run(str(tmp_path))
    assert json.loads((tmp_path / "run.json").read_text()) == run._asdict()
    assert run.format == checkpoints.FORMAT
    assert (run.classes, run.sample_shape, run.pixel_range) == (
        list("0123"),
        [3, 9, 6],
        [-0.5, 0.5],
    )
    assert run.versions["numpy"] == np.__version__
    values = {
        "--data": blob_file, "--epochs": 2, "--batch-size": 16, "--hidden": [8], "--shards": 1,
        "--optimizer": "adam", "--lr": 0.002, "--label-smoothing": 0.1, "--momentum": None,
        "--validation": 50, "--train-size": 150, "--test-size": 50, "--center": True,
        "--batch-norm": False, "--augment": ["shift=1.0"],
    }  # fmt: skip
    assert run.options == {**run.options, **values}  # also those that were not given
    assert "--out" not in run.options
    given = "--epochs --batch-size --hidden --augment --batch-norm --center --validation"
    assert set(run.chosen) == set(given.split())


def test_run_json_of_a_curve_has_no_classes(tmp_path):
    arguments = ["--task", "sine", "--epochs", "1", "--out", str(tmp_path)]
    assert train_mlp.main(arguments) == 0
    run = checkpoints.read_run(str(tmp_path))
    assert (run.classes, run.sample_shape, run.pixel_range) == (None, [1], None)
    assert (run.options["--task"], run.options["--lr"]) == ("sine", 0.004)


def broken_run(**change):
    """The text of a run.json with other or without some of its entries."""
    run = checkpoints.Run(
        checkpoints.FORMAT, "a.py", {"--lr": 1}, ["--lr"], None, [1], None, {}
    )._asdict()
    return json.dumps({name: value for name, value in {**run, **change}.items() if value != ""})


OLDEST_FIELDS = [n for n in checkpoints.Run._fields if n not in checkpoints.Run._field_defaults]
NO_FORMAT = "it has no format version: an older version of purenn wrote it"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((text, "") for text in ("{", "", "\xff", "[1]", "[" * 100_000)),
        *((text, NO_FORMAT) for text in ("{}", broken_run(format=""))),
        (broken_run(format=99), "its format version is 99, this version of purenn reads"),
        (broken_run(format=[1]), "its format version is [1], this version of purenn reads"),
        *((broken_run(**{name: ""}), "") for name in OLDEST_FIELDS),
        *((broken_run(options=value), "") for value in (None, [1], "x", {"--seed": 1})),
        *((broken_run(chosen=value), "") for value in (None, 3, [[]], ["--seed"])),
        *((broken_run(chosen=value), "chosen is no list") for value in ("--lr", {"--lr": 1})),
        *((broken_run(script=value), "script is no str") for value in (1, [], None)),
        *((broken_run(versions=value), "versions is no dict") for value in (1, [])),
        (broken_run(format="a\nb" + "c" * 1000), "its format version is a bcccc"),
    ],
)
def test_a_run_json_that_is_none_is_refused(text, words, tmp_path):
    (tmp_path / "run.json").write_text(broken_run())
    assert checkpoints.read_run(str(tmp_path)).chosen == ["--lr"]
    (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
    message = refusal(lambda path: checkpoints.read_run(path.parent), tmp_path / "run.json")
    assert len(message) < 350
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
