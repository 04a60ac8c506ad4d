"""Threads of BLAS: a first import gives it one for each worker, in any script."""

import ast

import pytest

from training import threads
from training.tests.conftest import REPOSITORY, run_python

# A third script, of a user's, that says what it sees of the threads; {} is its first import.
USER_SCRIPT = """
{}
import numpy as np
import os, time
np.ones((600, 600)) @ np.ones((600, 600))
from training.threads import BLAS_THREADS, describe_threads
print([os.environ.get(name) for name in BLAS_THREADS])
print(len(os.listdir('/proc/self/task')) if os.path.exists('/proc/self/task') else 0)
print(describe_threads())
"""


def seen_by(script, *arguments, environment=None):
    """(the variables, threads that run, the description) in a script of these contents."""
    done = run_python(script, *arguments, environment=environment, check=True)
    *_, variables, running, description = done.stdout.splitlines()
    return ast.literal_eval(variables), int(running), description


@pytest.mark.parametrize(
    ("name", "room", "arguments", "one"),
    [
        *((name, "one_thread", "", True) for name in ("mine.py", "train_mlp.py", "-c")),
        ("train_cnn.py", "threads", "", False),
        ("mine.py", "threads", "--epochs 2 --data shards", False),
        ("mine.py", "threads", "--shards 2", True),
        ("-c", "threads", "--workers=1", True),
        ("mine.py", "threads", "--mpi", True),
        ("mine.py", "threads", "--wo 2 --words 2 --show", False),
    ],
)
def test_a_script_of_any_name_gets_one_thread_where_it_has_workers(
    name, room, arguments, one, tmp_path
):
    code, start = USER_SCRIPT.format(f"import training.{room}"), [name]
    if name == "-c":
        start.append(code)
    else:
        start = [tmp_path / name]
        start[0].write_text(code)
    variables, running, description = seen_by(*start, *arguments.split())
    assert variables == ["1" if one else None] * len(threads.BLAS_THREADS)
    assert description == ("1" if one else "all cores")
    if one:
        assert running <= 1  # those of BLAS are started with NumPy


@pytest.mark.parametrize("variable", threads.BLAS_THREADS[:2])
def test_what_the_environment_says_of_threads_holds(variable):
    code = USER_SCRIPT.format("import training.one_thread")
    variables, _, description = seen_by("-c", code, "--mpi", environment={variable: "2"})
    expected = [("2" if name == variable else None) for name in threads.BLAS_THREADS]
    assert (variables, description) == (expected, "2")


def test_where_numpy_is_there_already_nothing_is_changed_or_claimed():
    code = USER_SCRIPT.format("import numpy; import training.one_thread")
    variables, _, description = seen_by("-c", code)
    assert set(variables) == {None}
    assert description == "all cores"


@pytest.mark.parametrize(
    ("script", "options", "expected"),
    [
        ("train_cnn.py", [], "1"),
        ("train_mlp.py", [], "all cores"),
        ("train_mlp.py", ["--shards", "2"], "1"),
    ],
)
def test_the_scripts_say_how_many_threads_blas_has(script, options, expected, blob_file):
    arguments = ["--data", blob_file, "--epochs", "0", "--hidden", "4", *options]
    done = run_python(REPOSITORY / script, *arguments, check=True)
    assert f"; threads of BLAS: {expected}\n" in done.stdout
