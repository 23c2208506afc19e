"""`make chaos`: federations under random kills, cuts and disk faults, each of which must end with the right bytes.

    python tests/chaos/chaos.py                                    500 simulated federations, 25 of real daemons
    python tests/chaos/chaos.py --seed 1234 --simulated 1 --daemons 0     one again: exactly the same, event by event
    python tests/chaos/chaos.py --seed 7 --simulated 0 --daemons 1the same faults in the same order

Federation number n of a run has the seed SEED + n. After a failure: its events are in build/chaos, and the last line
of its report is the command that repeats it. Exit code: 0 if nothing went wrong.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import chaos_daemons
import chaos_sim

KEPT = Path("build") / "chaos"
TOLD_EVERY_S = 10.0
SIMULATED, DAEMONS = "simulated", "daemons"


@dataclass
class Result:
    """What becomes of one federation, small enough to travel between processes."""

    seed: int
    form: str
    problems: list[str]
    log: list[str]
    faults: Counter[str]
    lives: int = 0
    simulated_s: float = 0.0

    @property
    def again(self) -> str:
        other = DAEMONS if self.form == SIMULATED else SIMULATED
        return f"python tests/chaos/chaos.py --seed {self.seed} --{self.form} 1 --{other} 0"


@dataclass
class Tally:
    federations: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    failed: list[Result] = field(default_factory=list)
    lives: int = 0
    simulated_s: float = 0.0

    def add(self, result: Result) -> None:
        self.federations[result.form] += 1
        self.faults += result.faults
        self.lives += result.lives
        self.simulated_s += result.simulated_s
        if result.problems:
            self.failed.append(result)

    def found(self, *words: str) -> int:
        """Federations with a problem of this sort."""
        first_lines = [[p.partition("\n")[0] for p in r.problems] for r in self.failed]
        return sum(any(w in line for line in lines for w in words) for lines in first_lines)

    def lines(self) -> list[str]:
        faults = ", ".join(f"{n} {kind}" for kind, n in self.faults.most_common())
        return [
            f"{self.faults.total()} faults: {faults or 'none'}",
            f"{self.federations[SIMULATED]} simulated federations ({self.simulated_s / 3600:.1f} h of their time, "
            f"{self.lives} starts of a node), {self.federations[DAEMONS]} of real daemons: "
            f"{self.found('lost a round', 'has not finished')} lost rounds, "
            f"{self.found('an undisturbed run', 'manifests of round', 'evidence', 'peers disagree')} disagreements, "
            f"{self.found('hang')} hangs, {len(self.failed)} failed in all",
        ]


def simulated(seed: int, defect: str = "") -> Result:
    o = chaos_sim.run(seed, defect)
    return Result(seed, SIMULATED, o.problems, o.log if o.problems else [], o.faults, o.lives, o.simulated_s)


def of_daemons(seed: int) -> Result:
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        o = chaos_daemons.run(seed, Path(folder) / "federation")
    return Result(seed, DAEMONS, o.problems, o.log, o.faults)


def report(result: Result, out: TextIO) -> None:
    KEPT.mkdir(parents=True, exist_ok=True)
    path = KEPT / f"{result.form}-{result.seed}.log"
    path.write_text("\n".join([*result.log, "", *result.problems]) + "\n")
    print(f"\nFAILED: {result.form} federation, seed {result.seed}", file=out)
    for problem in result.problems[:10]:
        print(f"  {problem[:600]}", file=out)
    print(f"  events: {path}\n  again:  {result.again}", file=out, flush=True)


def campaign(seed: int, counts: dict[str, int], jobs: int, out: TextIO, defect: str = "") -> Tally:
    """Run that many federations of each form, telling how far it is. `defect`: see `chaos_sim.run`."""
    tally, began, told = Tally(), time.monotonic(), time.monotonic()
    for result in _work(seed, counts, jobs, defect):
        tally.add(result)
        if result.problems:
            report(result, out)
        if time.monotonic() - told > TOLD_EVERY_S:
            told = time.monotonic()
            done = ", ".join(f"{tally.federations[form]} of {n} {form}" for form, n in counts.items() if n)
            print(f"{told - began:6.0f} s  {done}, {len(tally.failed)} failed", file=out, flush=True)
    return tally


def _work(seed: int, counts: dict[str, int], jobs: int, defect: str) -> Iterable[Result]:
    seeds = range(seed, seed + counts[SIMULATED])
    if jobs == 1 or len(seeds) < 2:
        yield from map(partial(simulated, defect=defect), seeds)
    else:
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield from pool.map(partial(simulated, defect=defect), seeds, chunksize=4)
    yield from map(of_daemons, range(seed, seed + counts[DAEMONS]))


def main(arguments: list[str] | None = None, out: TextIO = sys.stdout) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, help="of the first federation; default: drawn now, and printed")
    parser.add_argument("--simulated", type=int, default=500, help="federations in this process, on a fake clock")
    parser.add_argument("--daemons", type=int, default=25, help="federations of real daemons as processes")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes for the simulated ones")
    parser.add_argument("--defect", default="", help="of the first peer in a simulated one: see that it is found")
    args = parser.parse_args(arguments)
    seed = secrets.randbelow(10**9) if args.seed is None else args.seed
    print(f"chaos: SEED={seed}, {args.simulated} simulated, {args.daemons} of real daemons", file=out, flush=True)
    began = time.monotonic()
    tally = campaign(seed, {SIMULATED: args.simulated, DAEMONS: args.daemons}, args.jobs, out, args.defect)
    print("\n".join(tally.lines()), file=out)
    print(f"chaos: SEED={seed}, {time.monotonic() - began:.0f} s, {'FAILED' if tally.failed else 'ok'}", file=out)
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main())
