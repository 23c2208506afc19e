"""Freed memory is kept for the next block: counted in page faults, so no clock decides."""

from __future__ import annotations

import subprocess
import sys

import pytest

_TRANSFER = """
import resource
from hsl_node.host.malloc import keep_freed_memory
keep = {keep}
if keep and not keep_freed_memory():
    raise SystemExit(77)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block = bytes(255 * 1024)
before = faults()
for _ in range(200):
    copies = [bytearray(block) for _ in range(8)]
    del copies
print(faults() - before)
"""


def faults(keep: bool) -> int:
    done = subprocess.run([sys.executable, "-c", _TRANSFER.format(keep=keep)], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("the C library is not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_blocks_that_come_and_go_cost_no_page_faults() -> None:
    with_it, without = faults(True), faults(False)
    pages = 255 * 1024 // 4096 * 8  # of one set of copies
    assert with_it < 10 * pages < 100 * pages < without


_ROUND = """
from pathlib import Path
from hsl_node.host.malloc import give_freed_memory_back
def megabytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
blocks = [bytes([1]) * 100_000 for _ in range(1000)]  # small enough for the heap
last = bytes([1]) * 100_000  # keeps the heap's top where it is
del blocks
kept = megabytes()
if not give_freed_memory_back():
    raise SystemExit(77)
print(kept - megabytes())
"""


def test_what_a_round_freed_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", _ROUND], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("the C library is not glibc")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 90  # of 100 MB
