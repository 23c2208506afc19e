"""Seconds per round of the exchange alone: real daemons, real SFTP on loopback, no training.

    python benchmarks/exchange.py [--peers 5] [--mb 94.7] [--tensors 251] [--rounds 3] [--json FILE]

Every daemon makes its checkpoint of random float32 numbers, pushes it to all others (encrypted, hashed, signed,
fsynced, receipted) and fuses the full set. A round counts from the moment the *last* peer has its checkpoint ("all
trained") to the moment the last peer has the fused model durably on disk ("all fused").

Beside it, in the same folder: as many bare processes write as many files of the same size with fsync, and do nothing
else. Where memory is slow to be touched for the first time, as in some virtual machines, that is most of a round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))
from cluster import Cluster

from hsl_node.federation.plan import Plan
from hsl_node.sync.store.journal import Journal


def peak_rss_mb(pid: int) -> float:
    """High-water mark of one process's resident memory, from the kernel."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return float("nan")


def cpu_seconds(pid: int) -> float:
    """User and system time of one process so far, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def network_bytes() -> int:
    """Bytes that crossed the loopback interface since boot: payload, encryption, acknowledgements."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split()[1])
    return 0


WRITER = """
import os, pathlib, sys
folder, files, size = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
block = os.urandom(1 << 20)
sys.stdin.readline()
for i in range(files):
    with open(folder / f"{os.getpid()}-{i}", "wb") as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        os.fsync(file.fileno())
"""


def writing_seconds(folder: Path, peers: int, size: int) -> float:
    """`peers` processes at once, each writes the files of one peer's round: the others' checkpoints, the fused one."""
    command = [sys.executable, "-c", WRITER, str(folder), str(peers), str(size)]
    writers = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(peers)]
    time.sleep(1)  # all are there, and wait for their line
    began = time.monotonic()
    for writer in writers:
        assert writer.stdin
        writer.stdin.close()
    for writer in writers:
        writer.wait()
    ended = time.monotonic()
    if any(writer.returncode for writer in writers):
        raise SystemExit("a writer failed: is the disk full?")
    for path in folder.iterdir():
        path.unlink()
    return ended - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, default=5)
    parser.add_argument("--mb", type=float, default=94.7, help="float32 megabytes a checkpoint")
    parser.add_argument("--tensors", type=int, default=251, help="float tensors; one integer buffer is added")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--client", choices=["asyncssh", "paramiko"], default="asyncssh")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where the state folders go (default: a temporary one)")
    args = parser.parse_args()

    names = [f"peer-{i}" for i in range(args.peers)]
    plan = Plan(method="fedavg", fusion="mean", rounds=args.rounds, epochs_per_round=1, plateau_rounds=10_000)
    trainer = ["--bytes", str(int(args.mb * 1e6)), "--tensors", str(args.tensors), "--epochs", "1"]
    with (
        tempfile.TemporaryDirectory(dir=args.folder) as folder,
        Cluster(Path(folder), names, plan, trainer=trainer, node={"client": args.client}) as cluster,
    ):
        before = network_bytes()
        cluster.start_all()
        peaks: dict[str, float] = {}
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.2):
                for name, process in cluster.processes.items():
                    try:
                        peaks[name] = max(peaks.get(name, 0.0), peak_rss_mb(process.pid))
                    except OSError:
                        pass

        threading.Thread(target=watch, daemon=True).start()
        cluster.wait_finished(every_s=1.0)  # an answer costs a node some milliseconds
        crossed = network_bytes() - before
        done.set()
        cpu = statistics.mean(cpu_seconds(p.pid) for p in cluster.processes.values())
        for name in names:
            cluster.stop(name)
        result = summarise(cluster, args, crossed, peaks, cpu)
        bare = Path(folder) / "bare"
        bare.mkdir()
        size = int(args.mb * 1e6)
        result["seconds_to_write_alone"] = [round_to(writing_seconds(bare, args.peers, size)) for _ in range(3)]
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


def summarise(
    cluster: Cluster, args: argparse.Namespace, crossed: int, peaks: dict[str, float], cpu: float
) -> dict[str, object]:
    phases = {}
    for name in cluster.names:
        journal = Journal.read_only(cluster.layout(name).journal)
        phases[name] = {(r["round"], r["phase"]): r for r in journal.rows("phases")}
        journal.close()
    seconds = []
    for round in range(1, args.rounds + 1):
        all_trained = max(phases[n][round, "train"]["ended"] for n in cluster.names)
        all_fused = max(phases[n][round, "fuse"]["ended"] for n in cluster.names)
        seconds.append(round_to(all_fused - all_trained))
    digests = [cluster.fused(n) for n in cluster.names]
    return {
        "peers": args.peers,
        "checkpoint_mb": args.mb,
        "client": args.client,
        "seconds_per_round": seconds,
        "median_s": statistics.median(seconds),
        "loopback_mb_per_node_and_round": round_to(crossed / 1e6 / args.peers / args.rounds),
        "payload_mb_per_node_and_round": round_to(args.mb * (args.peers - 1)),
        "supervisor_cpu_s_per_round": round_to(cpu / args.rounds),
        "supervisor_peak_mb": {n: round_to(p) for n, p in sorted(peaks.items())},
        "all_digests_agree": all(d == digests[0] for d in digests) and len(digests[0]) == args.rounds + 1,
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "at": time.strftime("%Y-%m-%d")},
    }


def round_to(value: float) -> float:
    return float(f"{value:.3g}") if value < 100 else round(value, 1)


if __name__ == "__main__":
    main()
