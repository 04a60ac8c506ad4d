"""Who computes: the workers of this process, and with --mpi those of all ranks."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

import purenn as nn
from training.options import Options
from training.threads import describe_threads

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Team(NamedTuple):
    """Who computes: the workers of this process, and with --mpi those of all ranks."""

    shards: int = 1
    workers: int = 1
    map: Callable[..., Iterable[Any]] = map  # of the workers of this process
    communicator: Any = None  # of mpi4py

    @property
    def rank(self) -> int:
        """The number of this process; rank 0 alone reports and writes."""
        return self.communicator.Get_rank() if self.communicator else 0

    @property
    def ranks(self) -> int:
        """How many processes there are."""
        return self.communicator.Get_size() if self.communicator else 1


def all_ranks() -> Any:
    """The communicator of all ranks."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: there is no MPI for it to load
        raise ValueError(
            f"--mpi needs mpi4py and an MPI: pip install mpi4py mpich ({error})"
        ) from None
    return MPI.COMM_WORLD


def own_cores(communicator: Any) -> int:
    """The cores for this process, where ranks on the same machine have equal parts of them."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    if communicator is None:
        return cores
    from mpi4py import MPI

    neighbors: int = communicator.Split_type(MPI.COMM_TYPE_SHARED).Get_size()
    return max(1, cores // neighbors)


def share_work(options: Options, communicator: Any) -> tuple[int, int]:
    """(shards, workers of each process). ValueError where one of them would have no work."""
    ranks = communicator.Get_size() if communicator else 1
    usual = ranks * (options.workers or 1) if communicator else options.default_shards
    shards = options.shards or usual
    if shards < ranks:
        raise ValueError(f"--shards {shards} leaves some of the {ranks} ranks without work")
    most = math.ceil(shards / ranks)
    workers = options.workers or min(most, own_cores(communicator))
    if workers > most:
        raise ValueError(
            f"--workers {workers} is too many: each process has {most} of the {shards} shards"
            " (--shards)"
        )
    return shards, workers


@contextlib.contextmanager
def open_team(options: Options) -> Iterator[Team]:
    """The team of the options, with its threads while this is entered."""
    communicator = all_ranks() if options.mpi else None
    shards, workers = share_work(options, communicator)
    if workers == 1:
        yield Team(shards, communicator=communicator)
        return
    with ThreadPoolExecutor(workers, initializer=partial(np.seterr, all="ignore")) as pool:
        yield Team(shards, workers, pool.map, communicator)


def describe_team(team: Team) -> str:
    """How the work is shared, in a line."""
    workers = f"{team.workers} worker{'s' * (team.workers > 1)}"
    ranks = f" in each of {team.ranks} ranks" if team.communicator else ""
    shards = f"{team.shards} shard{'s' * (team.shards > 1)}"
    by = f"computed by {workers}{ranks}; threads of BLAS: {describe_threads()}"
    return f"every batch in {shards}, {by}"


def own_part(team: Team, count: int) -> slice:
    """Which of so many pieces of work are this rank's."""
    return slice(*(count * rank // team.ranks for rank in (team.rank, team.rank + 1)))


def map_all(
    team: Team, function: Callable[[Piece], Result], pieces: Sequence[Piece]
) -> list[Result]:
    """function of every piece, in their order, whoever computes it."""
    own = list(team.map(function, pieces[own_part(team, len(pieces))]))
    if team.communicator is None:
        return own
    return list(itertools.chain(*team.communicator.allgather(own)))


def map_own(function: Callable[..., Any], parts: Iterable[Any], *, team: Team) -> list[Any]:
    """A `map` for `data_parallel`: other ranks' parts are nothing here, `add_ranks` brings them.

    A rank without a part learns from the first one what there is to add.
    """
    parts = list(parts)
    own = own_part(team, len(parts))
    results: list[Any] = [(0.0, {}, {})] * len(parts)
    results[own] = team.map(function, parts[own])
    if own.start == own.stop:
        _, grads, cache = function(parts[0])
        nothing = partial(nn.tree_map, np.zeros_like)
        results[0] = (0.0, nothing(grads), nothing(cache))
    return results


def next_part(leaf: np.ndarray, parts: Iterator[np.ndarray]) -> np.ndarray:
    """The next of some flat arrays, as a leaf of this kind."""
    return next(parts).reshape(leaf.shape).astype(leaf.dtype)


def add_ranks(team: Team, tree: nn.Tree) -> nn.Tree:
    """The sum of a tree over all ranks, by one Allreduce of one flat buffer."""
    if team.ranks == 1:
        return tree
    leaves = list(nn.tree_flatten(tree).values())
    dtype = np.result_type(*(leaf.dtype for leaf in leaves if leaf.ndim))
    own = np.concatenate([leaf.ravel() for leaf in leaves], dtype=dtype, casting="same_kind")
    total = np.empty_like(own)
    team.communicator.Allreduce(own, total)
    parts = np.split(total, np.cumsum([leaf.size for leaf in leaves])[:-1])
    added: nn.Tree = nn.tree_map(partial(next_part, parts=iter(parts)), tree)
    return added


def any_rank(team: Team, asked: bool) -> bool:
    """Whether this is so on any rank."""
    if team.ranks == 1:
        return asked
    total = np.zeros(1)
    team.communicator.Allreduce(np.array([float(asked)]), total)
    return bool(total[0])


@contextlib.contextmanager
def one_rank_first(team: Team) -> Iterator[None]:
    """Rank 0 goes through what is entered here before the others do: its mistakes end them all."""
    if team.communicator and team.rank > 0:
        team.communicator.Barrier()
    yield
    if team.communicator and team.rank == 0:
        team.communicator.Barrier()
