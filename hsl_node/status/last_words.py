"""How the daemon ended: noted in the journal, for whoever looks at the node when it is down. Loads fast.

A daemon that runs has noted that it does; finding that note when it is down means that it could say nothing more.
"""

from __future__ import annotations

import contextlib
import json
import time

from hsl_node.errors import DataError, DiskFailed, HslError, LocalStateError
from hsl_node.status.snapshot import Ended
from hsl_node.sync.store.journal import Journal

_KEY = "ended"


def note_running(journal: Journal) -> None:
    """Before anything is done. A full disk costs the note, not the start."""
    try:
        journal.set_meta(_KEY, json.dumps({"how": "running", "at": time.time()}))
    except DiskFailed:
        raise
    except LocalStateError:
        pass


def forget(journal: Journal) -> None:
    """A copy of a journal came into a directory in which no daemon has run."""
    journal.set_meta(_KEY, "null")


def note_asked(journal: Journal, by: str) -> None:
    """Somebody, or a signal, asks it to leave; it has not left yet. A disk that fails costs the note."""
    with contextlib.suppress(HslError):
        journal.set_meta(_KEY, json.dumps({"how": "running", "at": time.time(), "by": by}))


def note(journal: Journal, error: Exception | None) -> None:
    """Stopped as asked, or ended by this error. After a failed fsync nothing is written any more."""
    if isinstance(error, DiskFailed):
        return
    text, fix = said(error) if error is not None else (_asked(journal), "")
    content = {"how": "stopped" if error is None else "failed", "at": time.time(), "text": text, "fix": fix}
    with contextlib.suppress(HslError):  # no room, say: it is in the log, and on the console
        journal.set_meta(_KEY, json.dumps(content))


def _asked(journal: Journal) -> str:
    """`by SIGTERM`; empty where nobody has asked it to leave."""
    by = (json.loads(journal.meta(_KEY) or "null") or {}).get("by", "")
    return f"asked by {by}" if by else ""


def said(error: Exception) -> tuple[str, str]:
    """(What went wrong, what to do) for a log: without what an error about images quotes of the hospital's files."""
    if isinstance(error, DataError):
        text = "the images cannot be used as node.toml says (data.path, or what lies there)"
        return text, "`hsl-node doctor`, then `hsl-node data check`: they name the file"
    if isinstance(error, HslError):
        return error.message, error.remedy
    return f"a bug: {type(error).__name__}", "`hsl-node logs` has the traceback; `hsl-node support-bundle` packs it"


def find_ending(journal: Journal) -> Ended | None:
    """Of a daemon that is down. Killed: no word of its end, so `at` is when it started. None: nothing is known."""
    content = json.loads(journal.meta(_KEY) or "null")
    if content is None or content["how"] != "running":
        return Ended(**content) if content else None
    begun = f", while it was leaving, {by}" if (by := _asked(journal)) else ""
    text = f"the daemon ended without a word{begun}: killed, the machine went down, or the disk failed or was full"
    fix = "`hsl-node logs` shows its last events; `hsl-node start` goes on from the journal"
    return Ended("killed", content["at"], text, fix)
