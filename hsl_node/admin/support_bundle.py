"""`hsl-node support-bundle`: what somebody who helps needs to see, in one tar.gz, and nothing of the hospital's.

Everything in it is on a list of what may go out: known fields with numbers, known words, digests, peers' names. Free
text passes only where this program's exchange with other peers wrote it, and without paths, addresses and quotations.
What is not on the list stays here, whatever it is. Never: keys, images, weights, paths, file names, columns, hosts.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import platform
import re
import tarfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hsl_node import errors
from hsl_node.admin import doctor
from hsl_node.errors import HslError, escaped
from hsl_node.federation import config, node_toml, strings
from hsl_node.federation.names import PEER_PATTERN
from hsl_node.host import event_log
from hsl_node.host.layout import Layout
from hsl_node.host.versions import versions
from hsl_node.status import page
from hsl_node.status.snapshot import Snapshot, leaving
from hsl_node.sync.store.journal import Journal
from hsl_node.weights.checkpoint_file import read_schema

LOG_EVENTS = 2000  # the last ones; about 400 KB
NOTES = 500

# Fields with numbers, digests, peers' names or words of this program: those of the status, and of log events alone.
_LOGGED = """
    base before best_epoch codes count files in_s kind lines loss now op operation paused peer restart validation_loss
    wait_s
"""
FIELDS = leaving(Snapshot).union(_LOGGED.split())
WORD = re.compile(r"[A-Za-z0-9 ,.:+_/=()*-]{0,120}")
VERSION = re.compile(r"\d{1,4}\.\d{1,4}(\.\d{1,4})?((a|b|rc|\.dev|\.post)\d{1,4})?")  # never four numbers: an address
_PLACE = re.compile(
    r"\S*[/\\]\S*|\S+\.[A-Za-z0-9]{1,8}(?::\d+)?(?=[\s:;,)]|$)|[\w-]+:\d{2,5}(?=[\s:;,)]|$)|\[[0-9a-fA-F:]+\]:\d+|\S+@\S+"
)
_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")  # the one thing with slashes that is no path
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`|“[^”]*”")
_FRAME = re.compile(r'File "[^"]*?((?:hsl_node|asyncssh|paramiko|asyncio)/[A-Za-z0-9_/]+\.py)", (line \d+, in \w+)')


def collect(state: Path) -> dict[str, bytes]:
    """The files of the bundle, by name. Each is made on its own: one that fails says so and hides no other."""
    makers: dict[str, Callable[[Path], Any]] = {
        "version.json": lambda s: {**versions(), "machine": platform.machine(), "processors": os.cpu_count()},
        "settings.json": _settings,
        "plan.json": _plan,
        "status.json": lambda s: allowed(page.fetch(s).as_json()),
        "doctor.json": lambda s: [
            {"check": c.name, "outcome": c.outcome, "exit_code": c.exit_code} for c in doctor.examine(s)
        ],
        "log.json": lambda s: [_event(e) for e in event_log.tail(s, LOG_EVENTS)],
        "notes.json": _notes,
        "rounds.json": _rounds,
    }
    files = {}
    for name, make in makers.items():
        try:
            content = make(state)
        except (HslError, OSError) as exc:
            content = {"failed": type(exc).__name__}  # its words may name a path
        files[name] = json.dumps(content, indent=1, ensure_ascii=True, sort_keys=True).encode("ascii") + b"\n"
    return files


def write(files: Mapping[str, bytes], out: Path) -> None:
    """Raises: FileExistsError."""
    root = "hsl-support"
    with (
        open(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file,
        tarfile.open(fileobj=file, mode="w:gz") as archive,
    ):
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{root}/{name}")  # no owner, no name of this machine
            entry.size, entry.mode, entry.mtime = len(content), 0o600, int(time.time())
            archive.addfile(entry, io.BytesIO(content))


# ------------------------------------------------------------------ what may go out


def allowed(value: Any, key: str = "") -> Any:
    """The parts of a plain value that are on the list."""
    if isinstance(value, Mapping):
        return {k: allowed(v, k) for k, v in value.items() if k in FIELDS}
    if isinstance(value, list | tuple):
        return [allowed(v, key) for v in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    if key == "version" and VERSION.fullmatch(text):  # "0.1.0" looks like a file's name to the rule below
        return text
    return text if WORD.fullmatch(text) and not _PLACE.search(_FINGERPRINT.sub("", text)) else "..."


def without_places(text: str) -> str:
    """Free text of the exchange, without quotations and whatever looks like a path, a file, a host or an address."""
    return escaped(_PLACE.sub("...", _QUOTED.sub("...", text)), 300)


# ------------------------------------------------------------------ the files


def _settings(state: Path) -> dict[str, Any]:
    """node.toml: which settings are made, with the value only where it is one of a few words or a number."""
    node = node_toml.load_node(state)
    data = node.data
    return {
        "node": node.name,
        "client": node.client,
        "listen_port": strings.split_address(node.listen)[1],
        "anchor_set_elsewhere": node.anchor is not None,
        "data": {
            "path_set": data.path is not None,
            "source": None if data.path is None else "table" if data.path.suffix.lower() == ".csv" else "other",
            "filters": len(data.filter),
            "columns_renamed": len(data.columns),
            "labels_renamed": len(data.labels),
            "excluded": len(data.exclude),
            "window_set": data.window_center is not None or data.window_width is not None,
        },
        "train": {"device": node.train.device, "gpus": node.train.gpus, "threads": node.train.threads},
        "inbox": {"kind": node.inbox.kind, "quota_mib": node.inbox.quota_mib},
    }


def _plan(state: Path) -> dict[str, Any]:
    federation = config.load_federation(state)
    plan = federation.plan.model_dump(mode="json", exclude={"task", "classes"})
    schema = None
    if (initial := Layout(state).fused(0)).exists():
        found = read_schema(initial)
        schema = {"digest": found.digest, "bytes": found.file_bytes, "tensors": len(found.tensors)}
    return {
        "federation": federation.digest,
        "peers": list(federation.peers),
        "anchor": federation.anchor.fingerprint if federation.anchor else None,
        "classes": len(federation.plan.classes),
        "plan": plan,
        "schema": schema,
    }


def _event(event: dict[str, Any]) -> dict[str, Any]:
    logger = str(event.get("logger", ""))
    ours = logger.startswith("hsl_node")
    found = {"time": event.get("time"), "level": event.get("level"), "logger": logger if ours else "other"}
    # What a library says is not ours to know; what our own code logs as an event is one of its constants.
    found["event"] = event.get("event") if ours and "\\x" not in str(event.get("event")) else "..."
    found |= allowed({k: v for k, v in event.items() if k not in ("time", "level", "logger", "event", "name")})
    if logger.startswith("hsl_node.sync.") and "reason" in event:
        found["reason"] = without_places(str(event["reason"]))
    if frames := [" ".join(m.groups()) for line in event.get("traceback", ()) for m in [_FRAME.search(line)] if m]:
        found["traceback"] = [*frames, *(c for line in event["traceback"] if (c := _exception(line)))]
    return found


def _exception(line: str) -> str:
    """The class of an exception that this line of a traceback names, without its words; "" where it names none."""
    name = line.partition(":")[0].rpartition(".")[2]
    kind = getattr(builtins, name, None) or getattr(errors, name, None)
    return name if isinstance(kind, type) and issubclass(kind, BaseException) else ""


def _notes(state: Path) -> list[dict[str, Any]]:
    with Journal.read_only(Layout(state).journal) as journal:
        notes = journal.rows("notes")[-NOTES:]
    about_peers = re.compile(rf"refused [a-z0-9]+|keys|disagreement|refused by {PEER_PATTERN}")
    return [
        {
            "at": n["at"],
            "level": n["level"],
            "code": allowed(n["code"]),
            "text": without_places(n["text"]) if about_peers.fullmatch(n["code"]) else "...",
        }
        for n in notes
    ]


def _rounds(state: Path) -> dict[str, Any]:
    with Journal.read_only(Layout(state).journal) as journal:
        manifests = [
            {"round": m["round"], "peer": m["peer"], "sha256": m["sha256"], "at": m["at"]}
            for m in journal.each("manifests")
        ]
        found = {name: journal.rows(name) for name in ("phases", "fused", "transfers")}
        receipts = [
            {"round": r["round"], "receiver": r["receiver"], "accepted": r["accepted"], "code": allowed(r["code"])}
            for r in journal.each("receipts")
        ]
        return {**found, "manifests": manifests, "receipts": receipts, "instance": journal.meta("instance")}
