"""Coverage-guided fuzzing of everything that reads bytes from outside: `make fuzz`. Needs atheris (the extra `fuzz`).

python tests/fuzz/fuzz.py --seconds 60              # every target in turn; findings go to build/fuzz/findings
python tests/fuzz/fuzz.py --seconds 60 header       # one target
python tests/fuzz/fuzz.py --again build/fuzz/findings/header-crash-...      # one finding once more

A finding ends its target with a traceback, and this program with exit code 1. Mend it, and put the input into
tests/fuzz/test_fuzz_findings.py. The corpus in build/fuzz/corpus is kept from run to run.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import random
import subprocess
import sys
from pathlib import Path

import atheris

WATCHED = ["hsl_node", "tomllib", "json", "asyncssh.sshsig", "asyncssh.packet"]  # new paths count
with contextlib.redirect_stderr(io.StringIO()), atheris.instrument_imports(include=WATCHED):  # tells every module
    import targets

ROOT = Path(__file__).resolve().parents[2] / "build" / "fuzz"
INPUT_MAX_BYTES = 64 * 1024
SLOW_S = 10  # an input that takes longer is a finding
MEMORY_MIB = 2048  # and so is one that needs more; the interpreter with numpy and asyncssh has 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", nargs="*", choices=[*targets.TARGETS, []], help="default: all")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (60)")
    parser.add_argument("--again", type=Path, help="a finding to run once; its name begins with its target's")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.again:
        name = arguments.again.name.partition("-")[0]
        print(f"{name}: {'valid' if targets.TARGETS[name].accepts(arguments.again.read_bytes()) else 'refused'}")
        return 0
    if arguments.inside:
        return fuzz(arguments.target[0], arguments.seconds)
    names = arguments.target or list(targets.TARGETS)
    # libFuzzer ends its process, so every target gets one.
    command = [sys.executable, __file__, "--inside", "--seconds", str(arguments.seconds)]
    found = [name for name in names if subprocess.run([*command, name]).returncode != 0]
    print(f"findings in: {', '.join(found)}; the inputs are in {ROOT / 'findings'}" if found else "no findings")
    return 1 if found else 0


def fuzz(name: str, seconds: int) -> int:
    target = targets.TARGETS[name]
    corpus, findings = ROOT / "corpus" / name, ROOT / "findings"
    corpus.mkdir(parents=True, exist_ok=True)
    findings.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds:
        (corpus / hashlib.sha1(seed).hexdigest()).write_bytes(seed)  # libFuzzer's own way to name its files
    kept = sum(1 for _ in corpus.iterdir())
    print(f"== {name}: {len(target.seeds)} seeds, {kept} inputs in the corpus, {seconds} s", flush=True)

    def one_input(data: bytes) -> None:
        target.accepts(data)

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        """Every second time by structure, else as libFuzzer does, which learns from comparisons."""
        rng = random.Random(seed)
        return target.mutate(data, rng)[:max_size] if rng.random() < 0.5 else atheris.Mutate(data, max_size)

    options = [
        f"-max_total_time={seconds}",
        f"-max_len={INPUT_MAX_BYTES}",
        f"-timeout={SLOW_S}",
        f"-rss_limit_mb={MEMORY_MIB}",
        f"-artifact_prefix={findings}/{name}-",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one_input, custom_mutator=mutator)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
