"""Enrolment: a node's key and settings, its peer card, and the federation that the cards become.

init -> card ... mailed, fingerprint compared by phone ... -> federation create -> the same file to everybody -> join
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from hsl_node.errors import ConfigError, FederationMismatch, UsageError
from hsl_node.federation import config, identity, keyring, node_toml, strings, toml_file
from hsl_node.federation.config import Federation, PeerCard
from hsl_node.federation.node_toml import NodeConfig
from hsl_node.federation.plan import Plan
from hsl_node.host import durable
from hsl_node.host.durable import Step
from hsl_node.host.files import write_new
from hsl_node.host.layout import Layout
from hsl_node.node.checks import require_anchor, require_quota
from hsl_node.sync.store.journal import Journal
from hsl_node.sync.store.store import Store
from hsl_node.train.data.sources import toml_table

NODE_TOML = """\
# Settings of this hospital's node. Nothing in here is shared with the other hospitals.
# A line that begins with "#" shows a default, or an example where there is none: remove the "#" to change it.
# A misspelt key is refused at the start, with its line. After a change: hsl-node doctor, then restart the service.

{name}           # this node's name in the federation; cannot change later
{address}   # where the other hospitals reach this node; part of the peer card
{listen}     # where the embedded inbox listens
# anchor = "/srv/hsl/anchor.safetensors"   # the federation's anchor set; default: anchor.safetensors beside this file
# client = "asyncssh"                      # asyncssh | paramiko: what this node sends with

[data]                                     # this hospital's images; read in place, never written to, never sent
{path}
# filter = {{ scanner = "Canon" }}           # use only the rows of the table with this column = value
# columns = {{ path = "file" }}              # the table's own names for path, label, patient, site, split
# labels = {{ B = "benign" }}                # the source's own label = class of the plan
# exclude = ["broken.png"]                 # file names to leave out
# window_center = 40.0                     # DICOM: where the file's own window is unwanted
# window_width = 400.0

[train]
# device = "auto"                          # auto | cpu | cuda | cuda:0
# gpus = 1                                 # GPUs that compute each batch together, from `device` on
# threads = 0                              # processor threads, 0 = all cores; results depend on it: keep it
# micro_batch = 0                          # images computed with at once, 0 = the plan's batch; where memory is short
# backbone_weights = "/srv/hsl/resnet18.safetensors"   # only where the plan names such a file by its sha256
# generator = "/srv/hsl/generator.onnx"    # likewise, where the plan names one in fedktl.generator

[inbox]
# kind = "embedded"                        # embedded | directory: OpenSSH or SFTPGo (hsl-node inbox provision)
# directory = "/srv/hsl/inbox"             # with kind = "directory": the folder that holds a home folder per sender
# quota_mib = 4096                         # disk space that one peer may use here, MiB; default: as the plan's model
                                           # needs, 4096 at least
"""


def init(
    state: Path,
    *,
    name: str,
    address: str,
    listen: str | None,
    data: Path | None,
    columns: Mapping[str, str] = {},
    labels: Mapping[str, str] = {},
) -> PeerCard:
    """Make the state directory, key, node.toml and peer card. An init that was cut short is completed.

    Raises:
        UsageError: this has been done here before; nothing is changed.
        ConfigError: name, address or listen are not what they should be; nothing is written.
    """
    layout = Layout(state)
    if layout.node_toml.exists():
        raise UsageError(
            f"{state} is initialised already; nothing was changed",
            remedy="`hsl-node card` prints its peer card again; for a second node give another --state",
        )
    if strings.split_address(address)[0] in ("0.0.0.0", "::"):
        raise UsageError(
            f"{address} is every address of this machine, to listen at, and none that the others can reach",
            remedy="give the name in DNS by which they reach it: --address mercy.example.org:8922",
        )
    text = settings_text(name=name, address=address, listen=listen, data=data)
    for key, table in (("columns", columns), ("labels", labels)):
        if table:
            line = f"{key} = {toml_table(table)}".replace("\\", r"\\")  # in a replacement a backslash begins a group
            text = re.sub(rf"^# {key} = .*$", line, text, flags=re.MULTILINE)
    layout.make()
    me = identity.load(layout.key) if layout.key.exists() else identity.generate(layout.key)
    durable.sync_folder(state.absolute().parent)
    durable.sync_folder(layout.key.parent)  # an init that was cut short may have made it just before
    card = PeerCard(name=name, address=address, key=me.public)
    write_new(layout.card(name), config.card_text(card), replace=True, step=Step.INIT_CARD)
    write_new(layout.node_toml, text, mode=0o600, step=Step.INIT_SETTINGS)  # last: then all is there
    return card


def settings_text(*, name: str, address: str, listen: str | None, data: Path | None) -> str:
    """The commented node.toml, checked by the same reader that will read it.

    Raises:
        ConfigError: a value is not valid.
    """
    port = strings.split_address(address)[1] or 8922
    settings = {"name": name, "address": address, "listen": listen or f"[::]:{port}"}
    node = toml_file.check(settings, NodeConfig, "hsl-node init")
    try:
        str(data and data.absolute()).encode("utf-8")
    except UnicodeEncodeError as exc:  # a name of other bytes, as Python spells it
        raise ConfigError(
            f"{exc.object!r} cannot stand in node.toml: its bytes are no UTF-8",
            remedy="rename that folder or file, or name a link to it",
        ) from exc
    example = '# path = "/srv/images"                     # folder with a folder per class | table .csv | file .npz'
    path = _line("path", str(data.absolute())) if data else example
    return NODE_TOML.format(
        name=_line("name", node.name),
        address=_line("address", node.address),
        listen=_line("listen", node.listen),
        path=path,
    )


def card_of(state: Path, *, host_key: str | None = None, user: str | None = None, root: str | None = None) -> PeerCard:
    """This node's card. The three settings: where its inbox is an existing SFTP server with a key of its own."""
    node = node_toml.load_node(state)
    me = identity.load(Layout(state).key)
    other = {k: v for k, v in (("host_key", host_key), ("user", user), ("root", root)) if v is not None}
    return toml_file.check(
        {"name": node.name, "address": node.address, "key": me.public, **other}, PeerCard, "hsl-node card"
    )


def create(*, name: str, cards: Sequence[Path], plan: Plan, anchor: Path | None) -> Federation:
    """Peer cards and a plan become the one file for everybody.

    Raises:
        ConfigError: a card was changed on its way, two peers share a name, key or address, or the anchor is missing.
    """
    if len(cards) < 2:
        raise UsageError(
            f"a federation has two peers or more, here is {len(cards)} card",
            remedy="give --card FILE for each hospital",
        )
    content: dict[str, Any] = {
        "name": name,
        "plan": plan.model_dump(mode="json", exclude_none=True),
        "peer": [config.load_card(path).model_dump(mode="json", exclude_none=True) for path in sorted(cards)],
    }
    if anchor is not None:
        from hsl_node.train.data.anchor import card_of  # the image libraries: only where there is an anchor

        content["anchor"] = card_of(anchor).model_dump(mode="json")
    return toml_file.check(content, Federation, "hsl-node federation create")


def join(state: Path, path: Path, *, anchor: Path | None = None, replace: bool = False) -> Federation:
    """Make `path` the federation of this node, and with `anchor` put the anchor set in its place.

    A journal of another federation moves to STATE/past/ with all that belongs to it: its promises bind that one only.

    Raises:
        ConfigError: this site's inbox has no room for a checkpoint of its plan.
        FederationMismatch: this node's key is not in it; the anchor is another; or rounds have been trained under the
            federation joined before, and `replace` is not set.
        AlreadyRunning: the daemon runs and would not notice.
    """
    federation = config.read_federation(path)
    node = node_toml.load_node(state)
    layout = Layout(state)
    keyring.require_mine(keyring.load(state, federation), node.name, identity.load(layout.key).public)
    config.require_unedited(path, federation)
    if anchor is not None:
        require_anchor(anchor, federation)
    require_roomy_inbox(node, federation)
    store = Store(layout)  # holds the lock: no daemon may start on a half-replaced state
    try:
        if store.journal.state() is not None and store.journal.meta("federation") != federation.digest:
            rounds = rounds_signed(store.journal)
            if rounds and not replace:
                raise FederationMismatch(
                    f"{rounds} round{'s have' if rounds > 1 else ' has'} been trained here under another federation",
                    remedy=f"`hsl-node federation diff {path}` compares; --replace moves that run to {layout.past}",
                )
            store.journal.close()
            _set_aside(layout)
        if anchor is not None and anchor.absolute() != layout.anchor.absolute():
            with open(anchor, "rb") as file, durable.replacing(layout.anchor, Step.JOIN_ANCHOR) as copy:
                shutil.copyfileobj(file, copy)
        text = config.federation_text(federation)
        write_new(layout.federation_toml, text, replace=True, step=Step.JOIN_FEDERATION)
    finally:
        store.close()
    return federation


def require_roomy_inbox(node: NodeConfig, federation: Federation) -> None:
    """Raises: ConfigError: no checkpoint of this plan ever fits into this site's inbox."""
    if node.inbox.kind == "embedded" and node.inbox.quota_set is not None:
        from hsl_node.train.site import checkpoint_bytes  # torch: only where node.toml sets a quota of its own

        require_quota(node, checkpoint_bytes(federation.plan))


def read_aloud(federation: Federation) -> str:
    """The first 80 bits of the federation's hash, for the telephone; it begins with the short hash."""
    return " ".join(federation.digest[i : i + 4] for i in range(0, 20, 4))


def rounds_signed(journal: Journal) -> int:
    """How many checkpoints this node has promised to others. Statements (of round 0, the end, a halt) hold none."""
    me = (journal.state() or {}).get("me")
    statements = {r["round"] for r in journal.each("manifests") if r["peer"] == me and r["content"]["bytes"] == 0}
    return len({row["round"] for row in journal.rows("signed")} - statements - {0})


def _set_aside(layout: Layout) -> None:
    """Cut short it is begun again: the journal, which tells that something is to be moved, goes when all else has."""
    target = layout.past / time.strftime("%Y%m%dT%H%M%S")
    while target.exists():  # another one in this second
        target = target.with_name(f"{target.name}b")
    target.mkdir(mode=0o700, parents=True)
    durable.sync_folder(target.parent)
    _move(
        target, layout.federation_toml, layout.outbox_folder, layout.inbox_folder, layout.quarantine,
        layout.fused_folder, layout.trainer, layout.evidence,
    )  # fmt: skip
    _move(target, *sorted(layout.state.glob(f"{layout.journal.name}*")))
    layout.make()
    durable.sync_folder(layout.state)


def _move(target: Path, *paths: Path) -> None:
    for path in paths:
        if path.exists():
            with durable.passing(Step.JOIN_SET_ASIDE):
                durable.rename(path, target / path.name)
    for folder in (target, *{path.parent for path in paths}):
        durable.sync_folder(folder)


def _line(key: str, value: str) -> str:
    """`key = "value"`, escaped as TOML wants it."""
    return tomli_w.dumps({key: value}).rstrip("\n")
