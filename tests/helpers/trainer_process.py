"""The trainer as a real process that is spoken to line by line, and a state directory for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import learning
import tomli_w
from federations import make_federation
from PIL import Image

from hsl_node.federation.config import federation_text
from hsl_node.train.data import anchor as anchors

Event = dict[str, Any]


class Process:
    """A worker that is spoken to line by line."""

    def __init__(self, state: Path, command: list[str] | None = None) -> None:
        self.log = open(state / "trainer.log", "ab")  # noqa: SIM115 (closed in close)
        self.popen = subprocess.Popen(
            command or [sys.executable, "-m", "hsl_node.train.worker", "--state", str(state)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def send(self, line: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()

    def until(self, wanted: Callable[[Event], bool]) -> list[Event]:
        """All events up to the first one that is wanted."""
        assert self.popen.stdout is not None
        events: list[Event] = []
        for line in self.popen.stdout:
            events.append(json.loads(line))  # nothing but events ever comes this way
            if wanted(events[-1]):
                return events
        raise AssertionError(f"the worker ended; it said {events[-3:]}")

    def do(self, closing: str, **job: Any) -> list[Event]:
        self.send(json.dumps(job))
        events = self.until(lambda e: e["event"] in (closing, "error"))
        assert events[-1]["event"] == closing, events[-1]
        return events

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()
        for stream in (self.popen.stdin, self.popen.stdout, self.log):
            if stream is not None:
                stream.close()


def state_of(folder: Path, **changes: Any) -> Path:
    """A hospital's state directory over a table of images, as `init`, `federation join`, `anchor build` leave it."""
    images, rows = folder / "images", ["path,label,patient"]
    for number, (pixels, label) in enumerate(zip(*learning.blobs(60), strict=True)):
        path = images / ("negative", "positive")[label] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        rows.append(f"{path.relative_to(folder)},{path.parent.name},patient {number}")
    (folder / "images.csv").write_text("\n".join(rows))
    state = folder / "state"
    (state / "fused").mkdir(parents=True)
    anchors.save(learning.anchor(), state / "anchor.safetensors")
    card = anchors.card_of(state / "anchor.safetensors")
    federation = make_federation(2, plan=learning.small_plan(**changes), anchor=card).federation
    (state / "federation.toml").write_text(federation_text(federation))
    node = {
        "name": "ash",
        "address": "127.0.0.1:9001",
        "data": {"path": str(folder / "images.csv")},
        "train": {"device": "cpu", "threads": 1},
    }
    (state / "node.toml").write_text(tomli_w.dumps(node))
    return state
