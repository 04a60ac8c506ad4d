"""Which changes to purenn.py would the tests not notice?

    python -m venv /tmp/mutants && /tmp/mutants/bin/pip install numpy pytest hypothesis coverage \
        cosmic-ray==8.7.0
    /tmp/mutants/bin/python .ci/mutants.py [--only conv2d_forward] [--jobs 2]

Every mutant that cosmic-ray makes of purenn.py goes through the tests that run its lines, those
first that are quick and run little else, until one fails or takes ten times as long as it should.
Left out are mutants that do not compile or change nothing that is evaluated, as in annotations.

A pytest for each of them would take hours. Instead one that has collected the tests and run them
once is forked for each mutant, and in the fork the functions of purenn are given the mutant's
code. Mutants outside functions, and survivors, go through a pytest of their own.

What is done is kept in --out. A mutant that was killed is not tried again while the function that
it is in stays as it is; survivors are, when purenn.py or test_purenn.py has changed, but for those
in survivors.txt, which says why they change nothing. Any other survivor makes it end with 1.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import gc
import hashlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
SURVIVORS = pathlib.Path(__file__).with_name("survivors.txt")
SOURCE = "purenn.py"
MEMORY = 8 << 30  # no test needs so much, but a mutant may


# ------------------------------------------------------------------------------------------------
# The mutants
# ------------------------------------------------------------------------------------------------


class Mutant(NamedTuple):
    """One change of one of the statements that the module is made of."""

    name: str  # of the function or class, or "module"
    statement: tuple[int, int]  # its first and its last line
    lines: tuple[int, int]  # those that change
    text: str  # the statement, changed
    change: str  # in one line
    forks: bool  # whether a fork can take it over

    @property
    def key(self) -> str:
        """What it is called in --out."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def extent(node: Any) -> tuple[int, int]:
    """The first line of a statement, decorators and all, and the last."""
    return min(
        item.lineno for item in [node, *getattr(node, "decorator_list", [])]
    ), node.end_lineno


def compiled(text: str, line: int, path: str = SOURCE) -> types.CodeType:
    """A statement that stands at this line of purenn.py."""
    with warnings.catch_warnings(action="ignore"):
        return compile("\n" * (line - 1) + text, path, "exec")  # inherits the import above


def meaning(text: str) -> str:
    """What a statement evaluates: its syntax without annotations."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def described(name: str, old: str, new: str) -> str:
    """The change as "name: the line with {old -> new}"."""

    def word(character: str) -> bool:
        return character.isalnum() or character in "._=<>*/"

    def common(one: str, other: str) -> int:
        pairs = enumerate(zip(one, other, strict=False))
        return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))

    start = common(old, new)
    end = common(old[start:][::-1], new[start:][::-1])
    while start and word(old[start - 1]):
        start -= 1
    while end and word(old[-end]):
        end -= 1
    stop = len(old) - end
    before = old[old.rfind("\n", 0, start) + 1 : start]
    after = old[stop:].partition("\n")[0]
    change = f"{before}{{{old[start:stop]} -> {new[start : len(new) - end]}}}{after}"
    return f"{name}: {' '.join(change.split())}"


def mutants(source: str, only: list[str]) -> Iterator[Mutant]:
    """All of them, but for those that do not compile or change nothing."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    operators = [get_operator(name) for name in operator_names()]
    operators = [operator() for operator in operators if not operator.arguments()]
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        name = getattr(node, "name", "module")
        if not any(part in name for part in only):
            continue
        first, last = extent(node)
        old = "".join(lines[first - 1 : last])
        seen = {meaning(old)}
        for operator in operators:
            positions = [
                position
                for item in ast_nodes(get_ast(old))
                for position in operator.mutation_positions(item)
            ]
            for occurrence, (start, end) in enumerate(positions):
                new = mutate_code(old, operator, occurrence) or old
                try:
                    compiled(new, 1)
                except SyntaxError:
                    continue
                if meaning(new) in seen:
                    continue
                seen.add(meaning(new))
                changed = (first + start[0] - 1, first + end[0] - 1)
                forks = isinstance(node, ast.FunctionDef) and changed[0] >= node.lineno
                yield Mutant(name, (first, last), changed, new, described(name, old, new), forks)


# ------------------------------------------------------------------------------------------------
# Trying them
# ------------------------------------------------------------------------------------------------


def take_over(module: types.ModuleType, name: str, code: types.CodeType) -> None:
    """Give a function of a module, wherever it is held, the code that is compiled here."""
    namespace = dict(vars(module))
    exec(code, namespace)
    old, new = inspect.unwrap(getattr(module, name)), inspect.unwrap(namespace[name])
    old.__code__ = new.__code__
    old.__defaults__, old.__kwdefaults__ = new.__defaults__, new.__kwdefaults__


class Trial:
    """A pytest plugin: runs the tests once as they are, then a fork of them for each mutant."""

    def __init__(self, queue: list[Mutant], budget: float, record: Callable) -> None:
        self.queue, self.budget, self.record = queue, budget, record
        self.path = pathlib.Path(SOURCE).resolve()
        self.source = self.path.read_text(encoding="utf-8")
        self.killers: dict[str, list[str]] = collections.defaultdict(list)  # by function
        self.pipe: int | None = None  # of a fork, to say which test failed

    def pytest_runtestloop(self, session: Any) -> bool:
        """In place of pytest's own."""
        import coverage
        import hypothesis

        import purenn

        self.module = purenn
        self.items = {item.nodeid: item for item in session.items}
        self.seconds = dict.fromkeys(self.items, 0.0)
        lines = self.source.splitlines(keepends=True)
        for node in ast.parse(self.source).body:
            if isinstance(node, ast.FunctionDef):
                first, last = extent(node)
                text = "".join(lines[first - 1 : last])
                take_over(purenn, node.name, compiled(text, first, str(self.path)))
        tracer = coverage.Coverage(data_file=None, include=[str(self.path)])
        tracer.start()
        for name in self.items:
            started = time.process_time()
            tracer.switch_context(name)
            self.run([name])
            self.seconds[name] = time.process_time() - started
        tracer.stop()
        covering = tracer.get_data().contexts_by_lineno(str(self.path))
        self.covering = {line: set(names) - {""} for line, names in covering.items()}
        reached = collections.Counter(itertools.chain.from_iterable(self.covering.values()))
        self.price = {name: self.seconds[name] * reached[name] for name in self.items}
        for item in session.items:  # a failure is enough, it need not be made small
            given = getattr(getattr(item, "obj", None), "hypothesis", None)
            if given:
                phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
                old = item.obj._hypothesis_internal_use_settings
                item.obj._hypothesis_internal_use_settings = hypothesis.settings(old, phases=phases)
        gc.collect()
        gc.freeze()
        if by := self.forked(None, [n for n in self.items if self.seconds[n] <= self.budget]):
            raise RuntimeError(f"as it is, purenn fails {by} in a fork")
        for mutant in self.queue:
            self.record(mutant, self.killer(mutant))
        return True

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        """The first failure ends a fork, before it is looked into."""
        if call.excinfo and call.excinfo.typename != "Skipped":
            if self.pipe is None:
                raise RuntimeError(f"as it is, purenn fails {item.nodeid}: {call.excinfo}")
            os.write(self.pipe, item.nodeid.encode())
            os._exit(1)

    def run(self, names: list[str]) -> None:
        """Run these tests, in a fork each with a time limit."""
        items = [self.items[name] for name in names]
        for item, following in zip(items, [*items[1:], None], strict=True):
            if self.pipe is not None:
                signal.setitimer(signal.ITIMER_PROF, 2 + 10 * self.seconds[item.nodeid])
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)

    def killer(self, mutant: Mutant) -> str | None:
        """The test that fails, "time" or the like; None if it survives."""
        for lines in (mutant.lines, mutant.statement):
            names = set().union(*(self.covering.get(n, ()) for n in range(lines[0], lines[1] + 1)))
            if names:
                break
        last = self.killers[mutant.name]  # what killed its neighbours may well kill it
        ordered = sorted(names or self.items, key=lambda n: (n not in last, self.price[n]))
        spent = itertools.accumulate(map(self.seconds.get, ordered))
        ordered = [name for name, sum_ in zip(ordered, spent, strict=True) if sum_ <= self.budget]
        before, after = mutant.statement[0] - 1, mutant.statement[1]
        lines = self.source.splitlines(keepends=True)
        self.path.write_text("".join([*lines[:before], mutant.text, *lines[after:]]))
        by = (mutant.forks and self.forked(mutant, ordered)) or self.plain(ordered)
        if by in self.items:
            self.killers[mutant.name] = [by, *last][:5]
        return by

    def forked(self, mutant: Mutant | None, names: list[str]) -> str | None:
        """What kills a fork of this process that runs these tests."""
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            self.pipe = writing
            said = "None"
            try:
                if mutant:
                    code = compiled(mutant.text, mutant.statement[0], str(self.path))
                    take_over(self.module, mutant.name, code)
                self.run(names)
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            os.write(writing, said.encode())
            os._exit(0)
        os.close(writing)
        patience = 30 + 10 * sum(self.seconds[name] for name in names)
        said = os.read(reading, 10_000) if select.select([reading], [], [], patience)[0] else b""
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        by = said.decode() or "time"
        return None if by == "None" else by

    def plain(self, names: list[str]) -> str | None:
        """As `forked`, by a new pytest that imports what is on the disk."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *names]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        try:
            said, _ = process.communicate(timeout=30 + 10 * sum(map(self.seconds.get, names)))
        except subprocess.TimeoutExpired:
            return "time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return said.decode()[-200:] if process.returncode else None


# ------------------------------------------------------------------------------------------------
# All of them
# ------------------------------------------------------------------------------------------------


def work(queue: list[Mutant], budget: float, out: pathlib.Path, version: str) -> None:
    """Try these mutants in a copy of the repository."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, out.open("a") as file:

        def record(mutant: Mutant, by: str | None) -> None:
            entry = {"key": mutant.key, "change": mutant.change, "by": by, "version": version}
            file.write(json.dumps(entry) + "\n")
            file.flush()

        files = subprocess.check_output(["git", "ls-files"], cwd=REPOSITORY, text=True).split("\n")
        for name in filter(None, files):
            copy = pathlib.Path(folder, name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, copy)
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.environ.update(OPENBLAS_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
        log = out.with_name(f"{os.getpid()}.log")
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        import pytest

        options = ["-q", "-s", "-p", "no:cacheprovider", "-o", "tmp_path_retention_policy=none"]
        code = pytest.main([*options, f"--basetemp={folder}/tmp"], [Trial(queue, budget, record)])
        if code:
            sys.exit(f"see {log}")
        log.unlink()


def finished(out: pathlib.Path, version: str) -> dict[str, str | None]:
    """{key of a mutant: what killed it}, of those that need not be tried again."""
    lines = out.read_text().splitlines() if out.exists() else []
    entries = [json.loads(line) for line in lines]
    return {e["key"]: e["by"] for e in entries if e["by"] or e["version"] == version}


def main() -> int:
    """Try what is not done yet, and list the survivors."""
    parser = argparse.ArgumentParser(
        description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=[""], nargs="+", help="what names of functions contain")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds of tests for each")
    parser.add_argument("--listed", action="store_true", help="try those in survivors.txt as well")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at a time")
    parser.add_argument("--out", type=pathlib.Path, default=REPOSITORY / "runs" / "mutants.jsonl")
    options = parser.parse_args()
    out = options.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    chosen = list(mutants((REPOSITORY / SOURCE).read_text(encoding="utf-8"), options.only))
    listed = SURVIVORS.read_text(encoding="utf-8").splitlines() if SURVIVORS.exists() else []
    known = collections.Counter(line for line in listed if line and not line.startswith("#"))
    state = b"".join((REPOSITORY / name).read_bytes() for name in (SOURCE, "test_purenn.py"))
    version = f"{hashlib.sha256(state).hexdigest()[:16]} {options.budget:g}"
    done = finished(out, version)
    left = [m for m in chosen if m.key not in done and (options.listed or m.change not in known)]
    random.Random(0).shuffle(left)
    left.sort(key=lambda mutant: not mutant.forks)
    print(f"{len(chosen)} mutants, {len(left)} to try", flush=True)
    started = time.monotonic()
    jobs = min(options.jobs, len(left))
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=work, args=(left[i::jobs], options.budget, out, version))
        for i in range(jobs)
    ]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        workers[0].join(30)
        count = len(finished(out, version)) - len(done)
        print(f"{count} of {len(left)} in {time.monotonic() - started:.0f} s", flush=True)
    if any(worker.exitcode for worker in workers):
        return 2
    done = finished(out, version)
    survivors = collections.Counter(m.change for m in chosen if done.get(m.key) is None)
    for change in (survivors - known).elements():
        print(f"SURVIVES: {change}")
    if not any(options.only):
        for change in (known - survivors).elements():
            print(f"listed, but gone or killed: {change}")
    killed = len(chosen) - survivors.total()
    print(f"{killed} of {len(chosen)} killed: {killed / max(len(chosen), 1):.1%}")
    return 1 if survivors - known else 0


if __name__ == "__main__":
    sys.exit(main())
