"""Switch each protection off in a copy of the package and see which tests fail: `make mutations`.

    python tests/mutations/mutations.py                   all; writes MUTATIONS.md; exit code 1 where no test noticed
    python tests/mutations/mutations.py fsync quota       some; their rows are written anew, the others stay

A copy holds package, tests and what those read; it alone is on the path of the tests and of the daemons they start.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from mutants import TEN, TEN_MUTANTS, Mutant, apply
from mutants_inputs import INPUT_MUTANTS, INPUTS
from mutants_more import MORE, MORE_MUTANTS

PROTECTIONS = TEN | MORE | INPUTS
MUTANTS = TEN_MUTANTS + MORE_MUTANTS + INPUT_MUTANTS
TESTS = Path(__file__).resolve().parents[1]
REPOSITORY = TESTS.parent
TABLE = Path(__file__).with_name("MUTATIONS.md")
COPIED = ("hsl_node", "tests", "benchmarks", "pyproject.toml")
TEST_TIMEOUT_S = 60  # a daemon without a protection may wait for ever; the test then counts as failed
RUN_TIMEOUT_S = 1500
# Imported once, in the process that the runs are forked from: a third of the time of a short one. Nothing of ours.
PRELOADED = ["asyncssh", "hypothesis", "numpy", "paramiko", "pydantic", "pytest"]


@dataclass(frozen=True)
class Outcome:
    """What one run of some tests gave, by node id."""

    failed: tuple[str, ...]
    passed: tuple[str, ...]
    broken: str = ""  # why this run says nothing: the tests could not be collected, or ran against something else


class _Recorder:
    """A pytest plugin: who passed, who failed (in a fixture too: that is where a daemon may fall over)."""

    def __init__(self) -> None:
        self.failed: list[str] = []
        self.passed: list[str] = []

    def pytest_runtest_logreport(self, report) -> None:  # type: ignore[no-untyped-def]
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.passed and report.when == "call":
            self.passed.append(report.nodeid)


@contextlib.contextmanager
def copied(mutant: Mutant | None) -> Iterator[Path]:
    """A copy of the repository's package and tests, with one protection switched off. Raises: NotOnce."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder)
        for name in COPIED:
            if (REPOSITORY / name).is_dir():
                shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.tmp"))
            else:
                shutil.copy(REPOSITORY / name, copy / name)
        if mutant is not None:
            apply(mutant, copy / "hsl_node")
        yield copy


def run(mutant: Mutant | None, tests: Sequence[str]) -> Outcome:
    """Run tests (`file` or `file::name`) against a copy of the package, in a process of their own."""
    with copied(mutant) as copy:
        output, result = copy / "output.txt", copy / "outcome.pickle"
        host = _host()
        host.send((str(copy), list(tests), str(output), str(result)))
        process = host.recv()
        late = not host.poll(RUN_TIMEOUT_S)
        if late:
            os.killpg(process, signal.SIGKILL)  # with the daemons it started
        host.recv()  # it has ended
        if late:
            outcome = Outcome((), (), "took too long")
        elif result.exists():
            outcome = pickle.loads(result.read_bytes())  # noqa: S301  # our own process wrote it
        else:
            outcome = Outcome((), (), "the process of the tests died")
        if outcome.broken:
            return Outcome(outcome.failed, outcome.passed, f"{outcome.broken}\n{output.read_text()[-3000:]}")
        return outcome


@functools.cache
def _host() -> Connection:
    """A process that has imported much and nothing of ours, from which each run is forked; it ends with this one."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=_serve, args=(there,), daemon=True).start()
    there.close()
    return here


def _serve(requests: Connection) -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    while True:
        request = requests.recv()
        process = os.fork()
        if process == 0:
            try:
                _in_child(*request)
            finally:
                os._exit(0)
        requests.send(process)
        os.waitpid(process, 0)
        requests.send(None)


def _in_child(copy: str, tests: list[str], output: str, result: str) -> None:
    """Forked from a process that has imported nothing of ours."""
    os.setsid()
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    assert "hsl_node" not in sys.modules
    os.chdir(copy)
    sys.path[:] = [copy, *(p for p in sys.path if p not in ("", str(REPOSITORY)) and not Path(p).is_relative_to(TESTS))]
    data = REPOSITORY.parent / "shared" / "data"
    os.environ |= {"PYTHONPATH": copy, "CI": "true", "HSL_TEST_DATA": os.environ.get("HSL_TEST_DATA", str(data))}
    os.environ["HSL_TEST_ALL"] = "1"
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    import pytest

    recorder = _Recorder()
    options = ["-q", "-p", "no:cacheprovider", "-m", "not slow", f"--timeout={TEST_TIMEOUT_S}"]
    code = pytest.main([*options, *(f"tests/{test}" for test in tests)], plugins=[recorder])
    import hsl_node

    problem = "" if code in (0, 1) else f"pytest ended with {code!r}: no test was run"
    if not Path(str(hsl_node.__file__)).is_relative_to(copy):
        problem = f"the tests ran against {hsl_node.__file__}"
    Path(result).write_bytes(pickle.dumps(Outcome(tuple(recorder.failed), tuple(recorder.passed), problem)))


# ------------------------------------------------------------------ the table

HEAD = """\
# Protections, each switched off

Written by `make mutations`. Each row is a copy of the package with one protection switched off by a change in
a file `mutants*.py` here, and the tests that failed then. A row without such a test would make the command
fail; the same tests pass on the package as it is. *Row*: of the threats in [README.md](../README.md). Only fast files
that have to do with the protection are run, so more tests than these may notice.
"""


def render(failed: dict[str, Sequence[str]]) -> str:
    """The page, from what failed by mutant's name."""
    lines = [HEAD]
    for title, names in (("The ten", TEN), ("And more", MORE), ("Of data, people and silent machines", INPUTS)):
        lines += [
            f"## {title}",
            "",
            "| protection | row | switched off | cases that fail | in |",
            "|---|---|---|---|---|",
        ]
        for mutant in (m for m in MUTANTS if m.protection in names):
            ids = failed[mutant.name]
            files = ", ".join(
                f"`{file}`" for file in sorted({i.partition("::")[0].removeprefix("tests/") for i in ids})
            )
            row = PROTECTIONS[mutant.protection][0]
            lines.append(f"| {mutant.protection} | {row} | {mutant.off} | {len(ids)} | {files} |")
        lines.append("")
    for protection, (_, promise) in PROTECTIONS.items():
        lines += [f"## {protection[0].upper()}{protection[1:]}", "", promise]
        for mutant in (m for m in MUTANTS if m.protection == protection):
            lines += [
                "",
                f"**{mutant.off}** (`hsl_node/{mutant.file}`)" + (f"; held: {mutant.held}" if mutant.held else ""),
            ]
            cases = Counter(i.partition("[")[0].removeprefix("tests/") for i in failed[mutant.name])
            lines += ["", *(f"- `{test}`" + (f", {n} cases" if n > 1 else "") for test, n in sorted(cases.items()))]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def recorded(page: str) -> dict[str, list[str]]:
    """What failed by mutant's name, as far as an earlier page tells; of a test's cases only how many."""
    found: dict[str, list[str]] = {}
    for mutant in MUTANTS:
        _, there, after = page.partition(f"**{mutant.off}** (`hsl_node/{mutant.file}`)")
        rows = re.findall(r"- `([^`]+)`(?:, (\d+) cases)?$", re.split(r"^(?:\*\*|## )", after, flags=re.M)[0], re.M)
        if there:
            found[mutant.name] = [f"tests/{test}[{n}]" for test, count in rows for n in range(int(count or 1))]
    return found


# ------------------------------------------------------------------ the command


def main(wanted: Sequence[str]) -> int:
    chosen = [m for m in MUTANTS if not wanted or m.protection in wanted]
    if unknown := set(wanted) - PROTECTIONS.keys():
        print(f"no such protection: {', '.join(unknown)}; there are {', '.join(PROTECTIONS)}", file=sys.stderr)
        return 2
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", flush=True)

    files = sorted({test for mutant in chosen for test in mutant.tests})
    say(f"as it is: {len(files)} files and tests")
    before = run(None, files)
    if before.broken or before.failed:
        say(f"these fail with every protection in place: {', '.join(before.failed)} {before.broken}")
        return 1
    known = set(before.passed)
    failed: dict[str, Sequence[str]] = {}
    survived = []
    for number, mutant in enumerate(chosen, 1):
        outcome = run(mutant, mutant.tests)
        noticed = [test for test in dict.fromkeys(outcome.failed) if test in known]
        failed[mutant.name] = noticed
        if outcome.broken or not noticed or not outcome.passed:  # where nothing passes, the change broke the package
            survived.append(mutant.name)
        say(
            f"{number}/{len(chosen)}  {mutant.name}: "
            + (f"{len(noticed)} fail" if noticed else "SURVIVED")
            + outcome.broken
        )
    if wanted:  # the other rows stay as they were seen
        failed = recorded(TABLE.read_text()) | failed
    if not survived and failed.keys() == {m.name for m in MUTANTS}:
        TABLE.write_text(render(failed))
    say(f"{len(chosen) - len(survived)} of {len(chosen)} noticed" + "".join(f"\n  not noticed: {n}" for n in survived))
    return 1 if survived else 0


if __name__ == "__main__":
    if Path.cwd() != REPOSITORY:
        os.chdir(REPOSITORY)
    sys.exit(main(sys.argv[1:]))
