"""The trainer process: one job at a time, JSON lines in on stdin and out on stdout, log on stderr.

    python -m hsl_node.train.worker --state DIR

    job init      {"out", "sha256"}                      seeded initial weights    -> initialised
    job train     {"round", ..., "out", "own"}           one round, or its rest    -> validated, epoch ..., trained
    job validate  {"round", ...}                         a fused model, on its own -> validated
    job quit

    ...: "base", "base_sha256" (the fused model); "said": {peer: {name: number}}, "samples": {peer: n}, "full_set":
    {peer: path} of the exchange that made it; "mine", "mine_sha256": all tensors of what this site sent there, or null

Killed at any moment, the same job sent again ends with the same bytes. The end of stdin means that the daemon is
gone: the process leaves at once, in mid-epoch too, so that it never trains beside its successor.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import signal
import sys
import threading
import traceback
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import torch

from hsl_node.errors import DiskFailed, HslError, TrainerError
from hsl_node.federation.names import Digest
from hsl_node.host.layout import Layout
from hsl_node.train import devices
from hsl_node.train import site as opening
from hsl_node.train.data.sources import SPLIT_NAMES, TRAIN
from hsl_node.train.hardware import give_memory_back
from hsl_node.train.lock import hold_lock
from hsl_node.train.loop import train_round, worth_of
from hsl_node.train.method import Site
from hsl_node.train.progress import Report, ticker
from hsl_node.train.start import StartFiles, adopted

log = logging.getLogger("hsl_node.train.worker")


@dataclass
class Worker:
    """Opens the site with the first job that needs it and keeps it; nothing else outlives a job."""

    state: Path
    report: Report

    @cached_property
    def site(self) -> Site:
        return opening.open_site(self.state, ticker(self.report, "decoding images"))

    def run(self, job: dict[str, Any]) -> None:
        match job.get("job"):
            case "init":
                self._init(Path(job["out"]), job.get("sha256"))
            case "train":
                self._train(_files(job, int(job["round"])), Path(job["out"]), Path(job["own"]))
            case "validate":
                self._validate(_files(job, int(job["round"]) + 1))
            case other:
                raise TrainerError(f"unknown job {other!r}", remedy="supervisor and trainer are of different versions")

    def _init(self, out: Path, known: Digest | None) -> None:
        site = self.site
        site.method.require(site)
        plan, method, warnings = site.plan, site.method, list(site.dataset.warnings)
        if plan.rule != plan.card.fusion:  # works, but is not what the authors describe
            warnings.append(f'the plan fuses by "{plan.rule}"; the authors of {method.name} use "{plan.card.fusion}"')
        digest, parameters = opening.initial_weights(self.state, plan, method, out, known)
        self.report(
            {
                "event": "initialised",
                "sha256": digest,
                "bytes": out.stat().st_size,
                **site.hardware.facts,
                "versions": opening.versions(),
                "images": {name: len(site.indices(split)) for split, name in enumerate(SPLIT_NAMES)},
                "split": asdict(site.dataset.summary) if site.dataset.summary else {},
                "parameters": parameters,
                "warnings": warnings,
            }
        )

    def _train(self, files: StartFiles, out: Path, own: Path) -> None:
        with devices.company(self.site, _follow, (self.state, files, out, own), self._leave):
            done = train_round(
                self.site, folder=Layout(self.state).trainer, files=files, out=out, own=own, report=self.report
            )
        give_memory_back(self.site.hardware.device)
        assert done.best is not None
        self.report(
            {
                "event": "trained",
                "round": files.round,
                "sha256": done.best.sha256,
                "bytes": done.best.bytes,
                "score": done.best.validation.score,
                "loss": done.best.validation.loss,
                "said": dict(done.best.said),
                "own_sha256": done.best.own_sha256,
                "samples": len(self.site.indices(TRAIN)),
                "best_epoch": done.best.epoch,
                "epochs": done.epoch,
            }
        )

    def _leave(self, exc: HslError) -> None:
        self.report(_error(exc))
        os._exit(exc.exit_code)

    def _validate(self, files: StartFiles) -> None:
        learner, _ = adopted(self.site, files)
        worth_of(self.site, learner.model, files.round - 1, self.report)
        del learner
        give_memory_back(self.site.hardware.device)


def _follow(rank: int, place: str, state: Path, files: StartFiles, out: Path, own: Path) -> None:
    """Another device's process, for one round of training. Writes nothing but log lines about its end."""
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    try:
        site = opening.open_site(state, rank=rank)
        devices.join(site, rank, place)
        train_round(site, folder=Layout(state).trainer, files=files, out=out, own=own, report=lambda event: None)
        torch.distributed.destroy_process_group()
    except Exception as exc:
        frames = "".join(traceback.format_tb(exc.__traceback__))
        log.error("device %d failed: %s\n%s", rank + 1, _said(exc), frames)
        os._exit(1)


def _files(job: dict[str, Any], begins: int) -> StartFiles:
    mine = job.get("mine")
    return StartFiles(
        round=begins,
        base=Path(job["base"]),
        base_sha256=str(job["base_sha256"]),
        said=job.get("said", {}),
        samples=job.get("samples", {}),
        full_set={peer: Path(path) for peer, path in job.get("full_set", {}).items()},
        mine=Path(mine) if mine else None,
        mine_sha256=job.get("mine_sha256"),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="hsl_node.train.worker", description="The trainer process of one node.")
    parser.add_argument("--state", type=Path, required=True)
    state: Path = parser.parse_args(argv).state
    for sign in (signal.SIGINT, signal.SIGHUP):  # the daemon's to handle: Ctrl-C, `systemctl kill -s HUP`
        signal.signal(sign, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    report = _reporter()
    try:
        _lock = hold_lock(Layout(state).trainer)
        worker = Worker(state, report)
        jobs = _read_jobs(sys.stdin)
        report({"event": "ready"})
        while (job := jobs.get()).get("job") != "quit":
            _run(worker, job, report)
            if devices.ranks() > 1:
                os._exit(1)  # an error within a round that several devices train: see `company`
    except HslError as exc:
        report(_error(exc))
        return exc.exit_code
    return 0


def _run(worker: Worker, job: dict[str, Any], report: Report) -> None:
    """Run one job; its failure is an event, and the next job may come."""
    try:
        worker.run(job)
    except DiskFailed:
        raise  # leave: nothing that this process believes about its files can be trusted
    except HslError as exc:
        log.error("job %s failed: %s", job.get("job"), type(exc).__name__)  # its words may name images: not for a log
        report(_error(exc))
    except Exception as exc:  # a bug, or torch out of memory: the daemon decides what next
        frames = "".join(traceback.format_tb(exc.__traceback__))
        log.error("job %s failed: %s\n%s", job.get("job"), _said(exc), frames)
        report(_error(TrainerError(_said(exc), remedy="see log/trainer.log")))


def _said(exc: Exception) -> str:
    """An exception without what it may quote of the hospital's files: a path, a cell of a table, a DICOM value."""
    if isinstance(exc, OSError):
        return f"{type(exc).__name__}: {exc.strerror or ''}"
    return f"{type(exc).__name__}: {exc}" if isinstance(exc, RuntimeError) else type(exc).__name__  # torch's words help


def _error(exc: HslError) -> dict[str, Any]:
    return {
        "event": "error",
        "error": type(exc).__name__,
        "message": exc.message,
        "remedy": exc.remedy,
        "exit_code": exc.exit_code,
    }


def _reporter() -> Report:
    """Keep stdout for events alone: whatever a library prints goes to stderr."""
    stream = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return lambda event: print(json.dumps(event, allow_nan=False), file=stream, flush=True)


def _read_jobs(stream: IO[str]) -> queue.SimpleQueue[dict[str, Any]]:
    """Read jobs beside the work, so that the end of stdin is noticed in mid-epoch."""
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        leaving = False
        for line in stream:
            if line.strip():
                job = json.loads(line)
                leaving = job.get("job") == "quit"
                jobs.put(job)
        if not leaving:
            os._exit(0)  # nothing to tidy up: every file is written so that a kill can't hurt it

    threading.Thread(target=read, name="jobs", daemon=True).start()
    return jobs


if __name__ == "__main__":
    sys.exit(main())
