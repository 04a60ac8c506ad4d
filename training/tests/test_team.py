"""Cores and machines: the result depends on the shards, and not on who computes them."""

import itertools
import os
import pathlib
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import purenn as nn
from train_cnn import CNNOptions, build_cnn
from train_mlp import MLPOptions, build_mlp
from training import loop, prediction, run, team
from training.team import Team
from training.tests.conftest import (
    QUICK,
    QUICK_CNN,
    REPOSITORY,
    SCRIPTS,
    all_bytes,
    mlp_experiment,
    outputs_in,
    train_on,
)

# --- ranks that are threads ---


class FakeRank:
    """One rank of a communicator whose ranks are threads."""

    def __init__(self, rank, barrier, values):
        self.rank, self.barrier, self.values = rank, barrier, values

    def Get_rank(self):
        return self.rank

    def Get_size(self):
        return len(self.values)

    def allgather(self, value):
        self.values[self.rank] = value
        self.barrier.wait(10)
        values = list(self.values)
        self.barrier.wait(10)
        return values

    def Allreduce(self, own, total):
        assert own.dtype == total.dtype
        total[...] = sum(self.allgather(own))


def on_ranks(count, work):
    """[work(communicator) of every rank]."""
    barrier, values = threading.Barrier(count), [None] * count
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, [FakeRank(rank, barrier, values) for rank in range(count)]))


@pytest.fixture(scope="module")
def shared_experiment(blob_file):
    """An experiment in which all that can depend on a shard does."""
    options = {"class_weights": (1.0, 2.0, 3.0, 4.0), "augment": (("shift", 1.0),), "clip": 1.0}
    return mlp_experiment(blob_file, hidden=(6,), dropout=0.5, **options)


@given(
    ranks=st.integers(1, 4),
    more=st.integers(0, 3),
    images=st.integers(2, 20),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_ranks_compute_what_one_process_does_with_as_many_shards(
    shared_experiment, ranks, more, images, reduction
):
    options = replace(shared_experiment.options, reduction=reduction)
    experiment = shared_experiment._replace(options=options)
    shards, index = Team(shards=ranks + more), np.arange(images)
    optimizer = nn.sgd(0.1)
    progress = loop.begin(experiment, optimizer, loop.first_params(experiment))

    def moved(communicator):
        own = experiment._replace(team=shards._replace(communicator=communicator))
        return loop.take_step(own, optimizer, progress, index)

    alone = nn.tree_flatten(moved(None)._asdict())
    first, *others = on_ranks(ranks, moved)
    for name, leaf in nn.tree_flatten(first._asdict()).items():
        assert leaf.dtype == alone[name].dtype
        np.testing.assert_allclose(leaf, alone[name], rtol=2e-4, atol=2e-5)
    assert all(all_bytes(own._asdict()) == all_bytes(first._asdict()) for own in others)
    assert not np.array_equal(first.params["hidden1"]["W"], progress.params["hidden1"]["W"])


@given(ranks=st.integers(1, 4), images=st.integers(1, 900))
def test_ranks_predict_what_one_process_does(ranks, images):
    net = nn.sequential(flatten=nn.flatten(), out=nn.linear(3))
    params, _ = net.init(0, (1, 2, 2))
    x = np.random.default_rng(0).normal(size=(images, 1, 2, 2))
    predict = partial(prediction.predict, net, params, x)
    np.testing.assert_allclose(predict(), net.forward(params, x)[0])
    results = on_ranks(ranks, lambda own: predict(Team(communicator=own)))
    assert all(result.tobytes() == predict().tobytes() for result in results)


def test_one_rank_that_is_asked_to_stop_stops_all():
    def stops(own, asked):
        return team.any_rank(Team(3, communicator=own), asked[own.rank])

    assert team.any_rank(Team(), True) is True
    for asked in itertools.product([False, True], repeat=3):
        assert on_ranks(3, partial(stops, asked=asked)) == [any(asked)] * 3


def test_ranks_with_other_data_or_options_are_found(shared_experiment):
    def check(own, change):
        experiment = shared_experiment._replace(team=Team(3, communicator=own))
        run.check_ranks_agree(change(experiment) if own.rank == 2 else experiment)

    def other_data(experiment):
        changed = {"x_train": experiment.data["x_train"] + 1}
        return experiment._replace(data={**experiment.data, **changed})

    def other_options(experiment):
        return experiment._replace(options=replace(experiment.options, lr=0.5))

    on_ranks(3, partial(check, change=lambda experiment: experiment))
    for change, words in ((other_data, ".* data "), (other_options, ".*--lr ")):
        with pytest.raises(ValueError, match=f"rank 2 does not do what rank 0 does: {words}"):
            on_ranks(3, partial(check, change=change))
    run.check_ranks_agree(shared_experiment)


# --- workers ---


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (build_mlp, MLPOptions(hidden=(8,))),
        (build_cnn, CNNOptions(hidden=(8,), channels=(3, 4), kernel=3)),
    ],
)
def test_the_result_depends_on_the_shards_and_not_on_the_workers(build, options, blob_file):
    options = replace(options, data=blob_file, epochs=1, batch_size=16, augment=())
    results = {}
    for shards, workers in ((3, 1), (3, 2), (3, 3), (1, 1)):
        with team.open_team(replace(options, shards=shards, workers=workers)) as own:
            assert (own.shards, own.workers) == (shards, workers)
            words = f"{shards} shards, computed by {workers} worker".replace("1 shards", "1 shard")
            assert words in team.describe_team(own)
            experiment, _ = run.set_up(options, build, own)
            progress = loop.begin(experiment, nn.adam(), loop.first_params(experiment))
            progress = loop.train(experiment, nn.adam(), progress)
            results[shards, workers] = all_bytes(progress._asdict())
    assert results[3, 1] == results[3, 2] == results[3, 3]
    assert results[3, 1] != results[1, 1]


SHARED = [  # (options, ranks, what each has of them: shards and workers, or what is said)
    (MLPOptions(), 1, (1, 1)),
    (CNNOptions(workers=2), 1, (2, 2)),
    (CNNOptions(workers=1), 1, (2, 1)),
    (MLPOptions(shards=5, workers=4), 1, (5, 4)),
    (CNNOptions(mpi=True), 3, (3, 1)),
    (MLPOptions(mpi=True, workers=2), 3, (6, 2)),
    (MLPOptions(mpi=True, shards=4, workers=2), 3, (4, 2)),
    (MLPOptions(workers=2), 1, "--workers 2 is too many: each process has 1 of the 1 shards"),
    (CNNOptions(workers=3), 1, "--workers 3 is too many: each process has 2 of the 2 shards"),
    (MLPOptions(mpi=True, shards=3, workers=2), 3, "--workers 2 is too many: each process has 1"),
    (MLPOptions(mpi=True, shards=2), 3, "--shards 2 leaves some of the 3 ranks without work"),
]


@pytest.mark.parametrize(("options", "ranks", "expected"), SHARED)
def test_as_many_shards_and_workers_as_the_options_say(options, ranks, expected, monkeypatch):
    rank = FakeRank(0, None, [None] * ranks)
    monkeypatch.setattr(team, "all_ranks", lambda: rank)
    monkeypatch.setattr(team, "own_cores", lambda communicator: 2)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected), team.open_team(options):
            pass
        return
    with team.open_team(options) as own:
        assert (own.shards, own.workers, own.ranks, own.rank) == (*expected, ranks, 0)
        assert (f"in each of {ranks} ranks" in team.describe_team(own)) == (ranks > 1)
        assert list(own.map(abs, [-1, 2, -3])) == [1, 2, 3]


def test_mpi_without_mpi4py_says_what_to_install(blob_file, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert train_on(blob_file, "--mpi") == 2
    errors = capsys.readouterr().err
    assert "error: --mpi needs mpi4py and an MPI: pip install mpi4py mpich" in errors
    assert errors.count("\n") == 1


# --- ranks that are processes ---


def mpiexec(ranks, *arguments):
    """The finished job of so many ranks, each of which runs Python with these arguments."""
    pytest.importorskip("mpi4py", reason="--mpi needs mpi4py, which is optional")
    beside = pathlib.Path(sys.executable).parent / "mpiexec"
    launcher = str(beside) if beside.exists() else shutil.which("mpiexec")
    if launcher is None:
        pytest.skip("there is no mpiexec")
    command = [launcher, "-n", str(ranks), sys.executable, *map(str, arguments)]
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    oversubscribed = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    return subprocess.run(
        command,
        env={**os.environ, **as_root, **oversubscribed},
        capture_output=True,
        text=True,
        timeout=100,
        cwd=REPOSITORY,
    )


@pytest.mark.parametrize(
    ("script", "options", "ranks"),
    [
        ("train_mlp.py", QUICK, 3),
        ("train_cnn.py", [*QUICK_CNN, "--clip", "0.5", "--class-weights", "balanced"], 2),
    ],
)
def test_ranks_train_as_one_process_does(script, options, ranks, blob_file, tmp_path):
    options = ["--data", blob_file, *options]
    runs = [tmp_path / str(number) for number in range(3)]
    for out in runs[:2]:
        done = mpiexec(ranks, script, *options, "--mpi", "--out", out)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("epoch 2/2") == 1
        assert f"in {ranks} shards, computed by 1 worker in each of {ranks}" in done.stdout
    assert outputs_in(runs[0]) == outputs_in(runs[1])
    alone = ["--shards", str(ranks), "--workers", "1", "--out", str(runs[2])]
    assert SCRIPTS[script].main([*options, *alone]) == 0
    trees = [nn.tree_flatten(nn.load(out / "model.npz")) for out in (runs[0], runs[2])]
    for name, leaf in trees[0].items():
        np.testing.assert_allclose(leaf, trees[1][name], rtol=1e-3, atol=1e-4)


IN_THE_MIDDLE = """
import os, signal, sys
import train_mlp
from mpi4py import MPI
from training import loop

original = loop.take_step

def take_step(experiment, optimizer, progress, index):
    progress = original(experiment, optimizer, progress, index)
    if progress.step == 5 and MPI.COMM_WORLD.Get_rank() == 1:
        {}
    return progress

loop.take_step = take_step
sys.exit(train_mlp.main(sys.argv[1:]))
"""


def test_a_stopped_job_goes_on_with_another_number_of_ranks(blob_file, tmp_path):
    options = ["--data", blob_file, *QUICK, "--mpi", "--out", tmp_path]
    code = IN_THE_MIDDLE.format("os.kill(os.getpid(), signal.SIGINT)")
    done = mpiexec(2, "-c", code, *options)
    assert done.returncode == 130
    assert done.stderr.count("interrupted after step 5 of 24; the same command with --resume") == 1
    assert nn.load(tmp_path / "checkpoint.npz")["step"] == 5
    done = mpiexec(3, "train_mlp.py", *options, "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    assert "written with 2 shards a batch, so what follows will differ" in done.stdout
    assert nn.load(tmp_path / "checkpoint.npz")["step"] == 24


@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 9, ""),
        ("raise ValueError('no more')", 2, "rank 1: error: no more\n"),
        ("progress.unknown", 1, "AttributeError: 'Progress' object has no attribute 'unknown'"),
    ],
)
def test_a_rank_that_fails_ends_the_job(what, code, words, blob_file):
    done = mpiexec(2, "-c", IN_THE_MIDDLE.format(what), "--data", blob_file, *QUICK, "--mpi")
    assert done.returncode in (code, 128 + code)
    assert words in done.stderr


def test_what_is_wrong_on_all_ranks_is_said_once(tmp_path):
    done = mpiexec(3, "train_mlp.py", "--mpi", "--data", tmp_path / "none")
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "none: there is no such file or folder" in done.stderr
