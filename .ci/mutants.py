"""The mutation score of purenn.py: of all small changes to it, how many does test_purenn.py notice?

    python -m venv /tmp/mutants && /tmp/mutants/bin/pip install numpy pytest hypothesis coverage \
        cosmic-ray==8.7.0
    /tmp/mutants/bin/python .ci/mutants.py [--only conv2d_forward] [--sample 500] [--jobs 2]

Every mutant that cosmic-ray makes is tested with the tests that run its lines, quick and specific
ones first, until one fails or takes far too long; a signature, which only the import runs, with
all quick tests as well. Mutants that do not compile, or that change nothing that is evaluated
(annotations), do not count.

A pytest for each mutant would take hours. Instead, one that has collected the tests and run them
once is forked for each, and the fork swaps in the mutant's code. Only what is run by the import
of purenn (constants, helpers that build them) needs a new pytest, and only if it survives the fork.

Results are kept in --out: a run that was stopped goes on where it was. A kill counts as long as the
text of the function stays the same; a survivor is tried again when purenn.py or its tests change.
Prints the survivors and the score of each section; exits with 1 if the whole is below --least.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import functools
import gc
import hashlib
import inspect
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import re
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
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
SOURCE, TESTS = "purenn.py", "test_purenn.py"
MEMORY = 8 << 30  # bytes that a mutant may allocate; no test needs as many


# ------------------------------------------------------------------------------------------------
# The mutants
# ------------------------------------------------------------------------------------------------


class Mutant(NamedTuple):
    """One change of one top-level statement of the module."""

    name: str  # of the function or class, or "module"
    statement: tuple[int, int]  # its first and last line
    lines: tuple[int, int]  # those of the change
    text: str  # the statement, changed
    forks: bool  # whether a fork can swap in some of what changes; it cannot take off decorators
    imports: bool  # whether some of it has been run by the import of purenn

    @property
    def key(self) -> str:
        """What identifies it in --out."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def line_range(node: Any) -> tuple[int, int]:
    """The first line of a statement, including decorators, and the last."""
    nodes = [node, *getattr(node, "decorator_list", [])]
    return min(item.lineno for item in nodes), node.end_lineno


def compile_at(text: str, line: int, path: str = SOURCE) -> types.CodeType:
    """The code of a statement that begins at this line of purenn.py."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compile("\n" * (line - 1) + text, path, "exec")  # inherits the import above


def dump_evaluated(text: str) -> str:
    """The syntax of a statement without annotations: equal for mutants that behave alike."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def names_run_by_import() -> set[str]:
    """What the import of purenn runs, all classes too: a fork comes too late for these."""
    names = {"module"}

    def profile(frame: types.FrameType, *_: Any) -> None:
        if frame.f_globals.get("__name__") == "purenn":
            names.add(frame.f_code.co_name)

    sys.path.insert(0, str(REPOSITORY))
    sys.setprofile(profile)
    import purenn  # noqa: F401

    sys.setprofile(None)
    return names


def make_mutants(source: str, only: list[str]) -> Iterator[Mutant]:
    """All mutants that compile and change something, of functions whose name has a part in only."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    operators = [get_operator(name) for name in operator_names()]
    operators = [operator() for operator in operators if not operator.arguments()]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        imported = pool.apply(names_run_by_import)
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        name = getattr(node, "name", "module")
        if not any(part in name for part in only):
            continue
        first, last = line_range(node)
        old = "".join(lines[first - 1 : last])
        nodes = list(ast_nodes(get_ast(old)))
        seen = {dump_evaluated(old)}
        for operator in operators:
            positions = [p for item in nodes for p in operator.mutation_positions(item)]
            for occurrence, (start, end) in enumerate(positions):
                new = mutate_code(old, operator, occurrence) or old
                try:
                    compile_at(new, 1)
                except SyntaxError:
                    continue
                if (evaluated := dump_evaluated(new)) not in seen:
                    seen.add(evaluated)
                    changed = (first + start[0] - 1, first + end[0] - 1)
                    forks = changed[0] >= node.lineno
                    imports = name in imported or not forks
                    yield Mutant(name, (first, last), changed, new, forks, imports)


# ------------------------------------------------------------------------------------------------
# Testing them
# ------------------------------------------------------------------------------------------------


def functions_of(value: Any) -> dict[str, types.FunctionType]:
    """A function by itself, or the methods of a class."""
    members = vars(value) if isinstance(value, type) else {"": value}
    members = {name: getattr(item, "fget", item) for name, item in members.items()}  # properties
    unwrapped = {name: inspect.unwrap(item) for name, item in members.items()}
    return {name: item for name, item in unwrapped.items() if inspect.isfunction(item)}


def swap_in(module: types.ModuleType, name: str, code: types.CodeType) -> None:
    """Give a function or the methods of a class, wherever they are held, the code compiled here.

    Any other statement is run in the module.
    """
    if not hasattr(module, name):
        exec(code, vars(module))
        return
    namespace = dict(vars(module))
    exec(code, namespace)
    replacements = functions_of(namespace[name])
    for key, old in functions_of(getattr(module, name)).items():
        new = replacements[key]
        old.__code__ = new.__code__
        old.__defaults__, old.__kwdefaults__ = new.__defaults__, new.__kwdefaults__
    for value in list(vars(module).values()):
        getattr(value, "cache_clear", int)()  # what the old code gave


class Trial:
    """A pytest plugin: runs the tests once as they are, then in a fork for each mutant."""

    def __init__(self, queue: list[Mutant], budget: float, record: Callable) -> None:
        self.queue, self.budget, self.record = queue, budget, record
        self.path = pathlib.Path(SOURCE).resolve()
        self.source = self.path.read_text(encoding="utf-8")
        self.lines = self.source.splitlines(keepends=True)
        self.killers: dict[str, list[str]] = collections.defaultdict(list)  # by function
        self.pipe: int | None = None  # of a fork, which tells what killed it

    def pytest_runtestloop(self, session: Any) -> bool:
        """In place of pytest's own."""
        import purenn

        self.module = purenn
        self.items = {item.nodeid: item for item in session.items}
        self.measure()
        for item in session.items:
            given = getattr(getattr(item, "obj", None), "hypothesis", None)
            if given and not hasattr(given.inner_test, "ends_fork"):
                given.inner_test = self.end_fork_in(given.inner_test)
        gc.collect()
        gc.freeze()
        if by := self.killed_in_fork(None, list(self.items)):
            raise RuntimeError(f"without a mutant, {by} fails in a fork")
        for mutant in self.queue:
            self.record(mutant, self.killer(mutant))
        return True

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        """The first failure ends a fork."""
        if call.excinfo and call.excinfo.typename != "Skipped":
            self.end_fork(call.excinfo)

    def end_fork(self, error: object) -> None:
        """End the fork, and tell which test killed it."""
        if self.pipe is None:
            raise RuntimeError(f"without a mutant, {self.current} fails: {error}")
        os.write(self.pipe, self.current.encode())
        os._exit(1)

    def end_fork_in(self, test: Callable) -> Callable:
        """A test that ends the fork at once, where hypothesis would repeat and shrink a failure."""
        from hypothesis.errors import UnsatisfiedAssumption

        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                test(*args, **kwargs)
            except UnsatisfiedAssumption:
                raise
            except Exception as error:  # hypothesis stops a test with a BaseException
                self.end_fork(error)

        run.ends_fork = True  # type: ignore[attr-defined]
        return run

    def measure(self) -> None:
        """Run all tests once, to learn how long each takes and which lines it runs."""
        import coverage

        for node in ast.parse(self.source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                first, last = line_range(node)
                text = "".join(self.lines[first - 1 : last])
                swap_in(self.module, node.name, compile_at(text, first, str(self.path)))
        self.seconds = dict.fromkeys(self.items, 0.0)
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

    def run(self, names: list[str]) -> None:
        """Run these tests, in a fork each with a limit of CPU time."""
        items = [self.items[name] for name in names]
        for item, following in zip(items, [*items[1:], None], strict=True):
            if self.pipe is not None:
                signal.setitimer(signal.ITIMER_PROF, 1 + 5 * self.seconds[item.nodeid])
            self.current = item.nodeid
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)

    def tests_of(self, mutant: Mutant) -> list[str]:
        """The tests that run the changed lines, in order, as many as the budget has time for."""
        recent = self.killers[mutant.name]  # what killed its neighbours may well kill it

        def order(name: str) -> tuple[bool, float]:
            return name not in recent, self.price[name]

        def affordable(names: Iterable[str]) -> list[str]:
            ordered = sorted(names, key=order)
            spent = itertools.accumulate(self.seconds[name] for name in ordered)
            return [name for name, sum_ in zip(ordered, spent, strict=True) if sum_ <= self.budget]

        changed, statement = (
            set().union(*(self.covering.get(n, ()) for n in range(first, last + 1)))
            for first, last in (mutant.lines, mutant.statement)
        )
        if changed:
            return affordable(changed)
        # Only the import runs a signature, but any test may look at it.
        return sorted({*affordable(statement), *affordable(self.items)}, key=order)

    def killer(self, mutant: Mutant) -> str | None:
        """The test that fails, "time" or an error; None if the mutant survives."""
        names = self.tests_of(mutant)
        before, after = self.lines[: mutant.statement[0] - 1], self.lines[mutant.statement[1] :]
        self.path.write_text("".join([*before, mutant.text, *after]), encoding="utf-8")
        by = self.killed_in_fork(mutant, names) if mutant.forks else None
        if by is None and mutant.imports:
            by = self.killed_in_new_pytest(names)
        if by is not None and by in self.items:
            recent = self.killers[mutant.name]
            self.killers[mutant.name] = [by, *(name for name in recent if name != by)][:5]
        return by

    def killed_in_fork(self, mutant: Mutant | None, names: list[str]) -> str | None:
        """What kills a fork of this process that runs these tests."""
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            self.pipe = writing
            result = b"None"
            try:
                if mutant:
                    code = compile_at(mutant.text, mutant.statement[0], str(self.path))
                    swap_in(self.module, mutant.name, code)
                self.run(names)
            except BaseException as error:
                result = f"{type(error).__name__}: {error}".encode()
            os.write(writing, result)
            os._exit(0)
        os.close(writing)
        patience = 30 + 10 * sum(self.seconds[name] for name in names)
        ready = select.select([reading], [], [], patience)[0]
        result = os.read(reading, 10_000) if ready else b""
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return None if result == b"None" else result.decode() or "time"

    def killed_in_new_pytest(self, names: list[str]) -> str | None:
        """The same for a new pytest, which imports the mutant from the disk."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *names]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        try:
            output, _ = process.communicate(timeout=30 + 10 * sum(self.seconds[n] for n in names))
        except subprocess.TimeoutExpired:
            return "time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return output.decode()[-200:] if process.returncode else None


# ------------------------------------------------------------------------------------------------
# All of them
# ------------------------------------------------------------------------------------------------


def work(queue: list[Mutant], budget: float, out: pathlib.Path, version: str) -> None:
    """Test these mutants in a copy of the repository."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, out.open("a") as file:

        def record(mutant: Mutant, by: str | None) -> None:
            file.write(json.dumps({"key": mutant.key, "by": by, "version": version}) + "\n")
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
        options += [f"--basetemp={folder}/tmp", TESTS]
        if pytest.main(options, [Trial(queue, budget, record)]):
            sys.exit(f"see {log}")
        log.unlink()


def read_results(out: pathlib.Path, version: str) -> dict[str, str | None]:
    """{key of a mutant: what killed it}, of those that need not be tested again."""
    lines = out.read_text().splitlines() if out.exists() else []
    entries = [json.loads(line) for line in lines]
    return {e["key"]: e["by"] for e in entries if e["by"] or e["version"] == version}


def run(queue: list[Mutant], options: argparse.Namespace, version: str) -> bool:
    """Test these mutants, several at a time; False if a process failed."""
    print(f"{len(queue)} mutants to test", flush=True)
    started, done = time.monotonic(), len(read_results(options.out, version))
    context = multiprocessing.get_context("fork")
    jobs = min(options.jobs, len(queue))
    workers = [
        context.Process(target=work, args=(queue[i::jobs], options.budget, options.out, version))
        for i in range(jobs)
    ]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        next(worker for worker in workers if worker.is_alive()).join(30)
        count = len(read_results(options.out, version)) - done
        print(f"{count} of {len(queue)} in {time.monotonic() - started:.0f} s", flush=True)
    return not any(worker.exitcode for worker in workers)


def format_survivor(mutant: Mutant, lines: list[str]) -> str:
    """Where it is and the first of its lines that is not as it was."""
    first, last = mutant.statement
    pairs = itertools.zip_longest(lines[first - 1 : last], mutant.text.splitlines(), fillvalue="")
    number, new = next((n, new) for n, (old, new) in enumerate(pairs, first) if new != old)
    return f"{SOURCE}:{number}: {mutant.name}: {new.strip()}"


def format_scores(mutants: list[Mutant], survivors: set[str], source: str) -> str:
    """Killed and all, for each section of purenn.py and for the whole."""
    banners = re.finditer(r"^# === (.+?) =+$", source, re.MULTILINE)
    starts = [(source.count("\n", 0, banner.start()), banner[1]) for banner in banners]
    counts: dict[str, list[int]] = {}
    for mutant in mutants:
        section = [title for line, title in [(0, "Top"), *starts] if line < mutant.statement[0]][-1]
        for title in (section, "all"):
            count = counts.setdefault(title, [0, 0])
            count[0] += mutant.key not in survivors
            count[1] += 1
    ordered = sorted(counts, key=["Top", *(title for _, title in starts), "all"].index)
    return "\n".join(
        f"{counts[title][0] / counts[title][1]:7.1%}  {counts[title][0]} of {counts[title][1]}"
        f" killed: {title}"
        for title in ordered
    )


def main() -> int:
    """Test the mutants that are not tested yet; print the survivors and the scores."""
    parser = argparse.ArgumentParser(
        description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=[""], nargs="+", help="what names of functions contain")
    parser.add_argument("--sample", type=int, help="a random sample of so many, always the same")
    parser.add_argument("--least", type=float, default=97, help="the score to reach, per cent")
    parser.add_argument("--budget", type=float, default=20, help="seconds of tests for each")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time")
    parser.add_argument("--out", type=pathlib.Path, default=REPOSITORY / "runs" / "mutants.jsonl")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    source = (REPOSITORY / SOURCE).read_text(encoding="utf-8")
    mutants = list(make_mutants(source, options.only))
    random.Random(0).shuffle(mutants)
    mutants = mutants[: options.sample]
    state = source.encode() + (REPOSITORY / TESTS).read_bytes()
    version = f"{hashlib.sha256(state).hexdigest()[:16]} {options.budget:g}"
    done = read_results(options.out, version)
    queue = [mutant for mutant in mutants if mutant.key not in done]
    if queue and not run(queue, options, version):
        return 2
    done = read_results(options.out, version)
    survivors = [mutant for mutant in mutants if done[mutant.key] is None]
    for mutant in sorted(survivors, key=lambda mutant: (mutant.name, mutant.lines)):
        print(format_survivor(mutant, source.splitlines()))
    print(format_scores(mutants, {mutant.key for mutant in survivors}, source))
    return int(len(mutants) - len(survivors) < options.least / 100 * len(mutants))


if __name__ == "__main__":
    sys.exit(main())
