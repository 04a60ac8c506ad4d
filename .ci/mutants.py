"""Which changes to purenn.py would the tests not notice?

    python -m venv /tmp/mutants && /tmp/mutants/bin/pip install numpy pytest hypothesis pytest-cov \
        cosmic-ray==8.7.0
    /tmp/mutants/bin/python .ci/mutants.py [--sample 500] [--only conv2d_forward] [--jobs 2]

Every mutant that cosmic-ray makes of purenn.py, but for those in annotations, which nothing
evaluates, goes through the tests that run its lines, the quickest first, until one fails or it
takes ten times as long as it should. What is done is kept in --out and not done again while
purenn.py and test_purenn.py are the same. The survivors are listed at the end.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import hashlib
import importlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
SOURCE = "purenn.py"

RECORD = """
import json, pytest, sys
seconds = {}
class Record:
    def pytest_runtest_logreport(self, report):
        seconds[report.nodeid] = seconds.get(report.nodeid, 0) + report.duration
code = pytest.main(["-q", "--cov=purenn", "--cov-context=test", "--cov-report="], [Record()])
json.dump(seconds, open("seconds.json", "w"))
sys.exit(code)
"""


class Mutant(NamedTuple):
    """One change."""

    operator: str
    occurrence: int
    where: str
    start: tuple[int, int]
    end: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.where or 'module'} {self.start[0]}:{self.start[1]} {self.operator}"


def copy_repository() -> pathlib.Path:
    """A folder with what the tests need."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="mutants-"))
    names = subprocess.check_output(["git", "ls-files"], cwd=REPOSITORY, text=True).split("\n")
    for name in filter(None, names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    return folder


def in_annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the annotations are, from (line, column) to (line, column)."""
    found: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.arg, ast.AnnAssign)):
            found.append(node.annotation)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(node.returns)
    return [
        ((n.lineno, n.col_offset), (n.end_lineno or 0, n.end_col_offset or 0)) for n in found if n
    ]


def mutants(folder: pathlib.Path) -> Iterator[Mutant]:
    """All of them, but for those in annotations."""
    unseen = in_annotations((folder / SOURCE).read_text(encoding="utf-8"))
    items = importlib.import_module("cosmic_ray.commands.init")._all_work_items
    for item in items([folder / SOURCE], {}):
        spec = item.mutations[0]
        start, end = tuple(spec.start_pos), tuple(spec.end_pos)
        if not any(first <= start and end <= last for first, last in unseen):
            name = spec.operator_name.removeprefix("core/")
            yield Mutant(name, spec.occurrence, spec.definition_name or "", start, end)


def covering(folder: pathlib.Path) -> tuple[dict[int, list[str]], dict[str, float]]:
    """({line: tests that run it}, {test: seconds})."""
    import coverage

    code = subprocess.run([sys.executable, "-c", RECORD], cwd=folder, env=ENVIRONMENT).returncode
    if code:
        raise SystemExit("the tests do not pass as they are")
    data = coverage.CoverageData(str(folder / ".coverage"))
    data.read()
    (path,) = (name for name in data.measured_files() if name.endswith(SOURCE))
    lines = data.contexts_by_lineno(path).items()
    seconds = json.loads((folder / "seconds.json").read_text())
    tests = {line: [c.split("|")[0] for c in contexts if "|" in c] for line, contexts in lines}
    return tests, seconds


def survives(mutant: Mutant, folder: pathlib.Path, tests: list[str], limit: float) -> bool | None:
    """Whether these tests let it pass; None if it does not even change the text."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    original = (REPOSITORY / SOURCE).read_text(encoding="utf-8")
    operator = get_operator(f"core/{mutant.operator}")()
    mutated = mutate_code(original, operator, mutant.occurrence)
    if mutated is None or mutated == original:
        return None
    (folder / SOURCE).write_text(mutated, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=folder, env=ENVIRONMENT, capture_output=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main() -> int:
    """Test what is not tested yet, and list the survivors."""
    parser = argparse.ArgumentParser(
        description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, help="as many, by chance, instead of all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", help="those in the functions whose names contain this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at a time")
    parser.add_argument("--out", type=pathlib.Path, default=REPOSITORY / "runs" / "mutants.jsonl")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    folders = [copy_repository() for _ in range(options.jobs)]
    chosen = [m for m in mutants(folders[0]) if not options.only or options.only in m.where]
    print(f"{len(chosen)} mutants", flush=True)
    if options.sample:
        chosen = random.Random(options.seed).sample(chosen, min(options.sample, len(chosen)))
    state = b"".join((REPOSITORY / name).read_bytes() for name in (SOURCE, "test_purenn.py"))
    version = hashlib.sha256(state).hexdigest()[:16]
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    done = {
        (entry["operator"], entry["occurrence"]): entry["survives"]
        for entry in map(json.loads, lines)
        if entry["version"] == version
    }
    left = [m for m in chosen if (m.operator, m.occurrence) not in done]
    tests, seconds = covering(folders[0]) if left else ({}, {})
    started = time.monotonic()

    def try_one(mutant: Mutant) -> dict[str, Any]:
        wanted = range(mutant.start[0], mutant.end[0] + 1)
        selected = {test for line in wanted for test in tests.get(line, [])} or set(seconds)
        ordered = sorted(selected, key=lambda test: seconds.get(test, 0))
        limit = 10 + 10 * sum(seconds.get(test, 0) for test in ordered)
        folder = folders.pop()
        try:
            result = survives(mutant, folder, ordered, limit)
        finally:
            folders.append(folder)
        return {"version": version, **mutant._asdict(), "survives": result}

    with (
        concurrent.futures.ThreadPoolExecutor(options.jobs) as pool,
        options.out.open("a") as file,
    ):
        for number, entry in enumerate(pool.map(try_one, left), start=1):
            done[entry["operator"], entry["occurrence"]] = entry["survives"]
            file.write(json.dumps(entry) + "\n")
            file.flush()
            if number % 20 == 0:
                minutes = (time.monotonic() - started) / number * (len(left) - number) / 60
                print(f"{number} of {len(left)}, about {minutes:.0f} min left", flush=True)
    results = [(m, done[m.operator, m.occurrence]) for m in chosen]
    counted = [survived for _, survived in results if survived is not None]
    for mutant, survived in results:
        if survived:
            print(f"SURVIVES: {mutant}")
    killed = counted.count(False)
    print(f"{killed} of {len(counted)} killed: {killed / max(len(counted), 1):.1%}")
    for folder in folders:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
