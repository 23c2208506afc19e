"""`hsl-node doctor`: every condition under which this node works, each checked for real. Changes nothing.

A check that rests on one that failed is skipped, so that the first failure is the one to mend.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from hsl_node.admin.enrol import require_roomy_inbox
from hsl_node.admin.ping import comes_back, ping
from hsl_node.errors import (
    ConfigError,
    DataError,
    DataUnavailable,
    FederationMismatch,
    HslError,
    LocalStateError,
    NotInitialised,
    NotRunning,
    TrainerError,
)
from hsl_node.federation import config, identity, keyring, node_toml
from hsl_node.federation.config import Federation
from hsl_node.federation.node_toml import DataConfig, NodeConfig, TrainConfig
from hsl_node.federation.plan import Plan
from hsl_node.host import permissions, wrong_paths
from hsl_node.host.control import ask
from hsl_node.host.hints import NOTHING_HERE, addressed
from hsl_node.host.layout import Layout
from hsl_node.host.units import size
from hsl_node.node.checks import (
    MAPPING_FIX,
    mapping_needed,
    require_images,
    require_port,
    require_quota,
    require_same_federation,
    unreadable,
)
from hsl_node.sync.store import models
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.room import reserve_of, room
from hsl_node.sync.wire.sockets import FAST, congestion_control

TORCH_S = 120.0  # the first import after an installation compiles its bytecode
SCAN_MAX = 10_000  # files: enough to see that a folder is no empty mount point

# What the trainer does first. The convolution is there since a hardened service may forbid the code that torch makes
# for it at run time; the product on the GPU since a visible device is not yet a usable one.
_TORCH = """
import json, torch
torch.nn.Conv2d(3, 8, 3)(torch.zeros(1, 3, 32, 32))
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
for i in range(len(devices)):
    (torch.ones(8, 8, device=f"cuda:{i}") @ torch.ones(8, 8, device=f"cuda:{i}")).sum().item()
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "devices": devices}))
"""


@dataclass(frozen=True)
class Check:
    name: str
    outcome: Literal["ok", "warning", "failed", "skipped"]
    text: str
    fix: str = ""
    exit_code: int = 0


def examine(state: Path) -> list[Check]:
    """All checks, in the order in which to mend them; their hints name the state directory."""
    return [replace(c, text=addressed(c.text, state), fix=addressed(c.fix, state)) for c in _examined(state)]


def _examined(state: Path) -> list[Check]:
    layout = Layout(state)
    node: NodeConfig | None = None
    federation: Federation | None = None
    ring: keyring.Keyring | None = None
    checks = [_check("state directory", lambda: _state_directory(state))]
    if os.path.isdir(state):
        checks.append(_check("files", lambda: _files(state)))

    def settings() -> str:
        nonlocal node
        node = node_toml.load_node(state)
        return f"{Layout(state).node_toml}: {node.name}, {node.address}"

    def membership() -> str:
        nonlocal federation, ring
        found = config.load_federation(state)
        assert node is not None
        ring = keyring.load(state, found)
        keyring.require_mine(ring, node.name, identity.load(layout.key).public)
        card = found.get(node.name)
        if card.address != node.address:
            raise ConfigError(
                f"the federation says that {node.name} is at {card.address}, node.toml says {node.address}",
                remedy="the others use the federation's: make the two agree",
            )
        federation = found
        return f"{found.name!r}, hash {found.fed8}, {len(found.peer)} peers"

    checks.append(_check("settings", settings))
    checks.append(_check("key", lambda: identity.load(layout.key).fingerprint))
    if node is None or checks[-1].outcome == "failed":
        return checks
    configured = node
    checks.append(_check("federation", membership))
    checks.append(_check("journal", lambda: _journal(layout, federation, node.name if node else "")))
    there = checks[-1].outcome == "ok"
    skipped = Check("models", "skipped", "needs the journal")
    checks.append(_check("models", lambda: _models(layout)) if there else skipped)
    plan = federation.plan if federation else None
    checks.append(_check("images", lambda: _images(layout, configured.data, plan)))
    checks.append(_check("port", lambda: _port(state, configured)))
    checks.append(_check("congestion control", _line))
    checks.append(_check("torch", lambda: _torch(configured.train)))
    if federation is None or ring is None:
        return [*checks, *(Check(name, "skipped", "needs the federation") for name in ("anchor", "disk", "peers"))]
    joined = federation
    checks.append(_check("anchor", lambda: _anchor(layout, configured, joined)))
    checks.append(_check("disk", lambda: _disk(layout, configured, joined)))
    try:
        return checks + _peers(state, configured.name, joined, ring)
    except OSError as exc:
        return [*checks, _failed("peers", wrong_paths.explained(exc))]


def text(checks: Sequence[Check], *, colour: bool) -> str:
    codes = {"ok": "32", "warning": "33", "failed": "1;31", "skipped": "2"}
    lines: list[str] = []
    for check in checks:
        word = f"\x1b[{codes[check.outcome]}m{check.outcome:8}\x1b[0m" if colour else f"{check.outcome:8}"
        lines.append(f"{word} {check.name:16} {check.text.replace(chr(10), chr(10) + ' ' * 26)}")
        if check.fix:
            fix = textwrap.wrap(check.fix, 66, initial_indent="what to do: ", subsequent_indent=" " * 12)
            lines += [f"{'':26}{line}" for line in fix]
    return "\n".join(lines)


def exit_code(checks: Sequence[Check]) -> int:
    """Of the first check that failed: the first to mend. A warning is none."""
    return next((check.exit_code for check in checks if check.outcome == "failed"), 0)


class _Doubt(HslError):
    """Not wrong for certain: shown as a warning."""


def _check(name: str, work: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", work())
    except _Doubt as doubt:
        return Check(name, "warning", doubt.message, doubt.remedy)
    except HslError as exc:
        return _failed(name, exc)
    except OSError as exc:
        return _failed(name, wrong_paths.explained(exc))


def _failed(name: str, error: HslError) -> Check:
    return Check(name, "failed", error.message, error.remedy, error.exit_code)


# ------------------------------------------------------------------ the checks


def _state_directory(state: Path) -> str:
    if not state.is_dir():
        raise NotInitialised(f"{state} does not exist", remedy=NOTHING_HERE)
    status = state.stat()
    if status.st_mode & 0o077:
        raise LocalStateError(f"{state} may be read by others", remedy=f"chmod 700 {state}")
    if status.st_uid != os.geteuid():
        raise LocalStateError(f"{state} belongs to {permissions.owner(state)}", remedy=permissions.remedy(state, state))
    return str(state)


def _files(state: Path) -> str:
    if found := permissions.unusable(state):
        raise permissions.told(state, found)
    return f"user {permissions.me()} may read and write what the daemon needs"


def _journal(layout: Layout, federation: Federation | None, name: str) -> str:
    if not layout.journal.exists():
        return "none yet: this node has not been started"
    try:
        with Journal.read_only(layout.journal) as journal:
            journal.require_sound(layout.journal)
            if federation is not None:
                require_same_federation(journal, federation, name, layout)
    except NotInitialised:
        return "empty: the first start did not come far"
    return f"{layout.journal}: every page is readable"


def _models(layout: Layout) -> str:
    """Those that results are taken from. Without one the run goes on."""
    try:
        harmed = models.harmed(layout)
    except NotInitialised:
        return "none yet"
    if harmed:
        text, fix = "\n".join(h.text(layout) for h in harmed), " ".join(h.fix(layout) for h in harmed)
        raise _Doubt(text, remedy=fix)
    return "those that results are taken from are as the journal says"


def _images(layout: Layout, data: DataConfig, plan: Plan | None) -> str:
    """What a start would refuse of the images, as far as it can be told without reading each of them."""
    there = _seen(data.path)
    if plan is None:
        return there
    from hsl_node.train.data import dataset

    return f"{data.path}: {dataset.foresee(data, plan, cache=layout.cache, ledger=layout.splits)}"


def _seen(path: Path | None) -> str:
    if path is None:
        raise DataError("data.path is not set", remedy="name the folder, table or .npz with the images in node.toml")
    require_images(path)
    if not path.is_dir():
        return f"{path} (`hsl-node data check` reads it)"
    count = 0
    try:
        for _, _, files in os.walk(path, onerror=_raise):
            count += len(files)
            if count >= SCAN_MAX:
                break
    except OSError as exc:
        raise unreadable(path, exc) from exc
    if count == 0:
        raise DataUnavailable(f"{path} holds no files", remedy="is the share mounted?")
    return f"{path}: {count}{' or more' if count >= SCAN_MAX else ''} files (`hsl-node data check` reads them)"


def _raise(error: OSError) -> None:
    raise error


def _anchor(layout: Layout, node: NodeConfig, federation: Federation) -> str:
    if federation.anchor is None:
        return "this federation needs none"
    from hsl_node.train.data import anchor

    path = node.anchor or layout.anchor
    found = anchor.verify(path, federation.anchor)
    return f"{found.name}, {len(found.labels)} images, as the federation says"


def _disk(layout: Layout, node: NodeConfig, federation: Federation) -> str:
    initial = layout.fused(0)
    started = initial.exists()
    if started:
        require_quota(node, initial.stat().st_size)
    else:
        require_roomy_inbox(node, federation)
    found = room(layout, initial.stat().st_size if started else 0, len(federation.peer), reserve_of(node.inbox.kind))
    if found.free < found.arrival:
        text = f"{size(found.free)} free: no checkpoint of a peer is taken in below {size(found.arrival)}"
        raise LocalStateError(text, remedy="free some space")
    if not started:
        return f"{size(found.free)} free; what a round needs is known after the first start"
    text = f"{size(found.free)} free, {size(found.round)} needed to start a round"
    if found.free < found.round:
        raise LocalStateError(text, remedy="free some space")
    return text


def _port(state: Path, node: NodeConfig) -> str:
    where, pid = f"{node.listen} is free", None
    with suppress(NotRunning):
        pid = ask(state, "status")["status"]["pid"]
        where = f"{node.listen}: this node's daemon runs (process {pid})"
    if node.inbox.kind == "directory":
        return "none: another server is the inbox"
    if pid is None:
        require_port(node.listen)
    if note := mapping_needed(node):
        raise _Doubt(f"{where}; {note}", remedy=MAPPING_FIX)
    if pid is not None and (why := comes_back(state)):
        raise _Doubt(
            f"{where}; a call from here to the address that the others have does not end there: {why}",
            remedy="a router may not lead calls from within back in; else the address or its forwarding is wrong. "
            "Ask a hospital what its `hsl-node peer ping` says",
        )
    return where


def _line() -> str:
    found = congestion_control()
    if found == FAST.decode():
        return f"{found} on fast lines"
    return f"{found or 'unknown'} on all lines: this kernel offers no {FAST.decode()}, which losses slow down less"


def _torch(train: TrainConfig) -> str:
    try:
        done = subprocess.run([sys.executable, "-c", _TORCH], capture_output=True, text=True, timeout=TORCH_S)
    except subprocess.TimeoutExpired as exc:
        raise TrainerError(
            f"torch gave no answer in {TORCH_S:.0f} s", remedy="is the GPU driver hung? nvidia-smi"
        ) from exc
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise TrainerError(f"torch does not work: {last}", remedy="install it again; compare with `hsl-node version`")
    found = json.loads(done.stdout.splitlines()[-1])
    wanted = train.device.startswith("cuda") or (train.device == "auto" and train.gpus > 1)
    if wanted and len(found["devices"]) < int(train.device.partition(":")[2] or 0) + train.gpus:
        raise ConfigError(
            f"torch {found['version']} sees {len(found['devices'])} GPU(s), node.toml says "
            f'device = "{train.device}", gpus = {train.gpus}',
            remedy="check nvidia-smi; in a service, that DeviceAllow= lists the GPU; where there are no more: "
            'train.gpus = 1, and train.device = "cpu" or a GPU that is there',
        )
    if found["devices"]:
        return f"{found['version']} on {', '.join(found['devices'])}"
    if Path("/dev/nvidiactl").exists():
        raise _Doubt(
            f"{found['version']} on the CPU, though this machine has an NVIDIA driver",
            remedy="the torch build lacks CUDA, or the driver is older than it needs: compare nvidia-smi",
        )
    return f"{found['version']} on the CPU"


def _peers(state: Path, me: str, federation: Federation, ring: keyring.Keyring) -> list[Check]:
    """One check per peer, all at once: a login, as `peer ping` does it."""
    others = [p.name for p in federation.peer if p.name != me]
    reached = [name for name in others if not ring.is_revoked(name)]
    answers = {a.peer: a for a in ping(state, reached)} if reached else {}
    checks = []
    for name in others:
        if (answer := answers.get(name)) is None:
            checks.append(Check(f"peer {name}", "skipped", "its keys are revoked here"))
        elif answer.exit_code:
            checks.append(Check(f"peer {name}", "failed", answer.error, answer.remedy, answer.exit_code))
        elif answer.other_federation:
            code = FederationMismatch.exit_code
            checks.append(Check(f"peer {name}", "failed", answer.says, answer.remedy_of_it, code))
        elif answer.says:
            checks.append(Check(f"peer {name}", "warning", answer.says, answer.remedy_of_it))
        else:
            checks.append(Check(f"peer {name}", "ok", f"{answer.address}: logged in, both keys are right"))
    return checks
