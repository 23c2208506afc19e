"""Which test answers which threat: writes tests/README.md (`make threats`).

A test that answers threat 5 is called `test_threat_05_...`; the rest of its name is the sentence that the table shows.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from campaigns import marked, surely_in_make_test, table

TESTS = Path(__file__).resolve().parents[1]
TABLE = TESTS / "README.md"

THREATS = {
    1: "Names of files: `../`, absolute, NUL, Unicode, long, case twins",
    2: "Symlink, hardlink, FIFO in an inbox",
    3: "Huge or sparse files",
    4: "copy-data onto itself; floods of handles, sessions, requests",
    5: "Slowloris: silent or dripping clients",
    6: "Header bombs in safetensors",
    7: "NaN, infinity",
    8: "Finite but poisoned weights",
    9: "False sample counts",
    10: "Replay of an old round or of another federation",
    11: "Equivocation: two checkpoints for one round",
    12: "Equivocation by accident: crash, clone, old backup",
    13: "A file that changes while it is checked",
    14: "A peer that poses as another",
    15: "Man in the middle, weaker algorithms",
    16: "Changed host key",
    17: "Stolen key, departed peer",
    18: "Malicious inbox server",
    19: "Leaks through logs",
    20: "Log injection through strings of peers",
    21: "Full disk",
    22: "kill -9 anywhere",
    23: "Power loss, failed fsync",
    24: "Clock skew or jump",
    25: "Partition in mid-transfer, half-open TCP",
    26: "Started twice; one key in two places",
    27: "Typos in the configuration",
    28: "Peers with different plans, anchors or models",
    29: "Trainer dead, loop alive",
    30: "Own retries that look like an attack",
    31: "Patients on two sides of a split",
}
WITHOUT_TESTS: frozenset[int] = frozenset()  # rows that still need a test; the aim is none

HEAD = """\
# Tests

`make test` runs a sample of each campaign, `make test-all` all there is: the table at the end says what. Names are
sentences; parts are real (SFTP on port 0, processes, SQLite). In `helpers/`: `federations.py` with keys, `boxes.py` a
running inbox, `cluster.py` daemons, `proxy.py` a bad network, `receiver.py` and `sender.py` its two ends, which can be
killed, `hostile.py` hostile peers and servers, `simulation.py` a federation on paper. `fuzz/` has documents a little
wrong (`make fuzz` searches longer); `chaos/` federations of real nodes on a simulated network, clock and disk
(`chaos_sim.py`), and of real processes (`chaos_daemons.py`).

## Threats

What the node must withstand, and the tests that show it. Written by `make threats` from the names of the tests.
How each threat is met: [docs/security.md](../docs/security.md). Which of the tests fail when a protection is switched
off: [mutations/MUTATIONS.md](mutations/MUTATIONS.md).
"""

Test = tuple[int, str, str]  # (row, file, sentence)
_NAME = re.compile(r"test_threat_(\d\d)_(\w+)")
_LINE = re.compile(r"^- `(test_\w+\.py)`: (.+), (\d+)$", re.MULTILINE)


def named(file: str, name: str) -> Test | None:
    found = _NAME.fullmatch(name)
    return (int(found[1]), file, found[2].replace("_", " ")) if found else None


def collected() -> Counter[Test]:
    """Every case that pytest finds, slow ones included, by its test."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(TESTS)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, cwd=TESTS.parent).stdout.splitlines()
    cases: Counter[Test] = Counter()
    for line in lines:
        path, *names = line.partition("[")[0].split("::")
        if names and (test := named(Path(path).name, names[-1])):
            cases[test] += 1
    return cases


def written(surely: bool = False) -> set[Test]:
    """The tests that stand in the files, without running anything; `surely`: those of which `make test` runs a case."""
    tests = (named(file, name) for file, name, marks in marked() if not surely or surely_in_make_test(marks))
    return {test for test in tests if test}


def missing(tests: Iterable[Test]) -> set[int]:
    return THREATS.keys() - {row for row, _, _ in tests}


def render(cases: Counter[Test]) -> str:
    rows = [
        HEAD,
        f"{len(cases)} tests, {cases.total()} cases.",
        "",
        "| # | threat | tests | cases |",
        "|---|---|---|---|",
    ]
    for row, title in THREATS.items():
        mine = {test: n for test, n in cases.items() if test[0] == row}
        rows.append(f"| {row} | {title} | {len(mine)} | {sum(mine.values())} |")
    for row, title in THREATS.items():
        rows += ["", f"### {row}. {title}", ""]
        rows += [f"- `{file}`: {sentence}, {n}" for (at, file, sentence), n in sorted(cases.items()) if at == row]
    return "\n".join(rows) + "\n\n" + table()


def parse(table: str) -> Counter[Test]:
    """What a table says, read back."""
    found: Counter[Test] = Counter()
    for section in table.split("\n### ")[1:]:
        row = int(section.partition(".")[0])
        found.update({(row, file, sentence): int(n) for file, sentence, n in _LINE.findall(section)})
    return found


if __name__ == "__main__":
    TABLE.write_text(render(collected()))
