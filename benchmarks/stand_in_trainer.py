"""A trainer without torch: the worker's protocol, with checkpoints made of random numbers.

For benchmarks of the exchange and for tests of the daemon. Deterministic: the checkpoint of a round is a function of
the peer's name, the round and the fused model it starts from, as a real trainer's is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np

from hsl_node.errors import AlreadyRunning
from hsl_node.federation.config import load_federation
from hsl_node.federation.node_toml import load_node
from hsl_node.host.durable import Step
from hsl_node.train.lock import hold_lock
from hsl_node.weights.checkpoint_file import read_weights, write_weights
from hsl_node.weights.whole import holds


def tensors(size: int, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """`count` float32 tensors of about `size` bytes in all, and one integer buffer, like a network's."""
    per = max(1, size // 4 // count)
    weights: dict[str, np.ndarray] = {
        f"layer{i:03d}.weight": rng.standard_normal(per, dtype=np.float32) for i in range(count)
    }
    weights["norm.num_batches_tracked"] = np.array(rng.integers(1, 1000), dtype=np.int64)
    return weights


def seed_of(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


def say(**event: object) -> None:
    print(json.dumps(event), flush=True)


def held(file: Path | None, round: int) -> bool:
    """Whether that file is there and names this round, or an earlier one."""
    try:
        return file is not None and round >= int(file.read_text())
    except FileNotFoundError:
        return False


def spoilt(model: Path) -> bool:
    return bool(max(abs(w).max() for w in read_weights(model).values()) > 1e5)


def leave_with_parent() -> None:
    """The daemon died: so do we, whatever we are doing."""
    while os.getppid() == PARENT:
        time.sleep(0.2)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--bytes", type=int, default=200_000)
    parser.add_argument("--tensors", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--epoch-s", type=float, default=0.0, help="length of a pretended epoch")
    parser.add_argument(
        "--hold",
        type=Path,
        help="file with a number: no epoch ends from that round on while it is there; the last "
        "fused model is validated in the round after it",
    )
    parser.add_argument("--seed", type=int, help="initial weights other than the plan's")
    parser.add_argument("--times", type=float, default=1.0, help="multiplies what a round learned: a poisoner")
    parser.add_argument("--fragile", action="store_true", help="diverges from a fused model beyond 1e5")
    parser.add_argument("--lock-wait-s", type=float, help="hold the trainer's lock, as the worker does")
    args = parser.parse_args()
    node, plan = load_node(args.state), load_federation(args.state).plan
    me, device = node.name, node.train.device
    threading.Thread(target=leave_with_parent, daemon=True).start()

    if args.lock_wait_s is not None:
        try:
            _lock = hold_lock(args.state / "trainer", args.lock_wait_s)
        except AlreadyRunning as exc:
            say(event="error", error="AlreadyRunning", message=exc.message, remedy=exc.remedy, exit_code=exc.exit_code)
            sys.exit(exc.exit_code)
    say(event="ready")
    for line in sys.stdin:
        job = json.loads(line)
        match job["job"]:
            case "init" if device.startswith("cuda"):
                say(event="error", error="ConfigError", message=f"device {device}: a stand-in has no GPU", remedy="cpu")
            case "init":
                out, known = Path(job["out"]), job.get("sha256")
                if known is None or not holds(out, known):
                    rng = np.random.default_rng(args.seed or plan.seed)
                    known = write_weights(out, tensors(args.bytes, args.tensors, rng), Step.START_INITIAL)
                say(
                    event="initialised", sha256=known, bytes=out.stat().st_size, device="none", threads=1,
                    precision="float32", versions={"torch": "stand-in"},
                    images={"train": 10 + len(me), "validation": 2, "test": 3}, parameters=args.bytes // 4,
                )  # fmt: skip
            case "train" | "validate" if not holds(Path(job["base"]), job["base_sha256"]):
                say(event="error", error="Altered", message=f"{job['base']} is not the model to start from")
            case "train" | "validate" if args.fragile and spoilt(Path(job["base"])):
                of = job["round"] - (job["job"] == "train")
                text = f"the fused model of round {of} is spoilt: the model's output is not a finite number"
                say(event="error", error="Diverged", message=text, remedy="a lower learning_rate", exit_code=78)
            case "train":
                round, out = job["round"], Path(job["out"])
                say(event="validated", round=round - 1, score=0.5, loss=0.7, recalibrated=None)
                for epoch in range(1, args.epochs + 1):
                    progress = {"round": round, "epoch": epoch, "batch": 1, "batches": 1, "images_per_s": 1.0}
                    say(event="progress", **progress)
                    time.sleep(args.epoch_s)
                    while held(args.hold, round):
                        time.sleep(0.05)
                        say(event="progress", **progress)  # as between two batches: it is not silent
                    say(event="epoch", round=round, epoch=epoch, terms={"primary": 0.7}, score=0.5, validation_loss=0.7,
                        learning_rate=1e-3, seconds=args.epoch_s)  # fmt: skip
                rng = np.random.default_rng(seed_of(me, round, job["base_sha256"]))
                weights = tensors(args.bytes, args.tensors, rng)
                if args.times != 1:
                    base = read_weights(Path(job["base"]))
                    weights = {n: (base[n] + args.times * (w - base[n])).astype(w.dtype) for n, w in weights.items()}
                own = write_weights(Path(job["own"]), weights, Step.TRAINER_OWN)
                sha256 = write_weights(out, weights, Step.TRAINER_OUTBOX)
                score = 0.5 + 0.4 * (1 - 0.5**round)  # rises, then flattens
                say(event="trained", round=round, sha256=sha256, bytes=out.stat().st_size, score=score, loss=0.6,
                    said={}, own_sha256=own, samples=10 + len(me),
                    best_epoch=args.epochs, epochs=args.epochs)  # fmt: skip
            case "validate":
                while held(args.hold, job["round"] + 1):
                    time.sleep(0.05)
                    say(event="busy", what="validating", done=0, total=1)
                say(event="validated", round=job["round"], score=0.6, loss=0.6, recalibrated=None)
            case "quit":
                return


PARENT = os.getppid()

if __name__ == "__main__":
    main()
