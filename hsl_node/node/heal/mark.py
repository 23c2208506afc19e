"""The mark in the journal: this node may have lost something of its state, and must ask before it signs anything.

By `recover --from-peers`, `restore`, by a peer's proof (`before_signing.py`), by a checkpoint that is gone or altered
(`damage.py`), or when a journal came to another machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from hsl_node.sync.store.journal import Journal

ALTERED = "altered"  # what this disk did to checkpoints (`damage.py`), until its operator has acted


@dataclass(frozen=True)
class Mark:
    """Why this node must ask first, and whom it need not wait for."""

    why: str
    without: tuple[str, ...] = ()


def set_mark(journal: Journal, mark: Mark) -> None:
    journal.set_meta("recover", json.dumps({"why": mark.why, "without": mark.without}))


def find_mark(journal: Journal) -> Mark | None:
    content = json.loads(journal.meta("recover") or "null")
    return Mark(content["why"], tuple(content["without"])) if content else None


def machine_id() -> str:
    """Tells one machine from another, no more; empty where the system has no such file (most containers)."""
    with contextlib.suppress(OSError):
        if text := Path("/etc/machine-id").read_text().strip():
            return hashlib.sha256(f"hsl-node {text}".encode()).hexdigest()[:16]
    return ""


def due(journal: Journal) -> Mark | None:
    """Must this node ask before it goes on? Notices a journal that came to another machine."""
    known, here = journal.meta("machine"), machine_id()
    if find_mark(journal) is None and known and here and known != here and journal.state() is not None:
        set_mark(journal, Mark("its journal was written on another machine"))
    return find_mark(journal)
