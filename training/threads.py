"""How many threads BLAS may have: a script imports this, or `training.one_thread`, first of all.

BLAS reads these variables when NumPy is imported. Workers and ranks want one thread each, so
importing this sets them to 1 if the command line asks for any and the environment has none of
them. Without workers all stays as it is: a single process computes with all cores.
"""

import os
import sys

BLAS_THREADS = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


def use_one_thread() -> None:
    """Give BLAS one thread, unless the environment says how many or NumPy has been imported."""
    if "numpy" not in sys.modules and not any(name in os.environ for name in BLAS_THREADS):
        os.environ.update(dict.fromkeys(BLAS_THREADS, "1"))


def describe_threads() -> str:
    """The number of BLAS threads as the environment says it."""
    return next((os.environ[name] for name in BLAS_THREADS if name in os.environ), "all cores")


def asks_for_workers(argument: str) -> bool:
    """Whether this is --shards, --workers or --mpi."""
    return argument.partition("=")[0] in ("--shards", "--workers", "--mpi")


if any(map(asks_for_workers, sys.argv)):
    use_one_thread()
