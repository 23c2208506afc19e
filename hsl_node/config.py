"""What people write and agree on: node.toml, federation.toml, peer cards, plans. Frozen; unknown keys are refused.

How the files are read, and errors get their line: `toml_file.py`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from hsl_node.canonical import canonical_json
from hsl_node.errors import ConfigError, FederationMismatch, NotInitialised, UsageError, escaped
from hsl_node.hints import nothing_here
from hsl_node.sync.fusion_rules import FUSION_RULES
from hsl_node.sync.names import Digest, Peer, parse_peer
from hsl_node.toml_file import parse, read_text, read_toml, validate

CARD_MAX_BYTES = 8 * 1024  # two keys and a few names: under 1 KB
NAME_MAX = 120  # characters: one line of a terminal or a table
PEERS_MAX = 64  # a full set costs peers² transfers a round; beyond this another topology is needed


def _peer(name: str) -> str:
    try:
        return parse_peer(name)
    except UsageError as exc:
        raise ValueError(f"{exc.message}: {exc.remedy}") from exc


def _address(text: str) -> str:
    host, port = split_address(text)
    if not host or not 0 < port < 65536:
        raise ValueError(f"{text!r} is not host:port, e.g. mercy.example.org:8922")
    return text


def _listen(text: str) -> str:
    host, port = split_address(text)
    if not host or port > 65535:
        raise ValueError(f"{text!r} is not host:port, e.g. 0.0.0.0:8922 (port 0: any free one)")
    return text


def _ed25519(text: str) -> str:
    parts = text.split()
    try:
        blob = base64.b64decode(parts[1], validate=True)
    except (IndexError, binascii.Error, ValueError) as exc:
        raise ValueError('not a public key of the form "ssh-ed25519 AAAA..."') from exc
    if parts[0] != "ssh-ed25519" or len(blob) != 51 or blob[:19] != b"\0\0\0\x0bssh-ed25519\0\0\0\x20"[:19]:
        raise ValueError("only ssh-ed25519 keys are used here")
    if base64.b64encode(blob).decode() != parts[1]:  # keys are compared as text: one key, one spelling
        raise ValueError("the key is not written as ssh-keygen writes it: copy it again")
    return f"{parts[0]} {parts[1]}"  # a comment is not part of the key


def _fusion(name: str) -> str:
    if name not in FUSION_RULES:
        raise ValueError(f"{name!r} is no fusion rule: one of {', '.join(FUSION_RULES)}")
    return name


def printable(text: str) -> str:
    """What somebody else wrote is shown as one piece of one line, whoever shows it.

    Raises:
        ValueError: it holds a control character, a line end, or an invisible or reordering one.
    """
    if wrong := [c for c in text if not c.isprintable()]:
        raise ValueError(f"'{escaped(text, 60)}' holds a character that cannot be printed, U+{ord(wrong[0]):04X}")
    return text


def plain_name(text: str) -> str:
    """One to NAME_MAX printable characters in words with one space between them: padding could pass for a second line.

    Raises:
        ValueError
    """
    if not 1 <= len(text) <= NAME_MAX:
        raise ValueError(f"'{escaped(text, 60)}' is {len(text)} characters long; a name has 1 to {NAME_MAX}")
    if printable(text) != text.strip() or "  " in text:
        raise ValueError(f"'{escaped(text, 60)}' begins or ends with a space, or has two in a row")
    return text


Text = Annotated[str, AfterValidator(printable)]  # every free string of a file that others write
Name = Annotated[str, AfterValidator(plain_name)]
PeerName = Annotated[str, AfterValidator(_peer)]
Address = Annotated[str, AfterValidator(_address)]
Listen = Annotated[str, AfterValidator(_listen)]
PublicKey = Annotated[str, AfterValidator(_ed25519)]
FusionName = Annotated[str, AfterValidator(_fusion)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Plan(Frozen):
    """What all peers agreed to train. Defaults are the published HSL form (METHODS, section 1)."""

    method: Literal["hsl", "fedavg", "local"] = "hsl"
    task: Name = "primary task"
    classes: tuple[Name, ...] = Field(("negative", "positive"), min_length=2, max_length=100)  # order = label
    rounds: int = Field(20, ge=1, le=10_000)
    epochs_per_round: int = Field(5, ge=1, le=1000)
    seed: int = Field(1, ge=0, lt=2**31)
    image_size: int = Field(224, ge=16, le=1024)  # px, square
    batch_size: int = Field(32, ge=2, le=4096)  # primary images; as many anchor images are paired with them

    backbone: Literal["resnet18", "resnet34", "resnet50", "tiny"] = "resnet18"
    backbone_weights: Sha256 | None = None  # of a local weight file that all peers start from; None: random
    encoder: Literal["separate", "shared"] = "separate"
    embedding: Literal["softmax", "layernorm"] = "softmax"
    temperature: float = Field(3.0, gt=0, le=100)
    experts: int = Field(12, ge=1, le=256)

    learning_rate: float = Field(1e-3, gt=0, le=1)
    learning_rate_min: float = Field(1e-4, ge=0, le=1)
    cosine_period_epochs: int = Field(10, ge=1, le=10_000)
    weight_decay: float = Field(1e-4, ge=0, le=1)
    optimizer_state: Literal["keep", "reset"] = "keep"  # Adam's moments across a fusion
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 autocast where it pays

    fusion: FusionName = "mean"
    patience_epochs: int = Field(5, ge=1, le=10_000)  # local epochs without a better AUC end a round early
    plateau_rounds: int = Field(3, ge=1, le=10_000)
    plateau_improvement: float = Field(0.005, ge=0, le=1)  # relative
    split_percent: tuple[int, int, int] = (60, 10, 30)  # train, validation, test

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        if sum(self.split_percent) != 100 or min(self.split_percent) < 1:
            raise ValueError("split_percent: three positive numbers that add up to 100")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes: a class is named twice")
        if self.learning_rate_min > self.learning_rate:
            raise ValueError("learning_rate_min: larger than learning_rate")
        return self


class AnchorCard(Frozen):
    """Names the one anchor set of the federation; the images travel beside it, once, by any means."""

    name: Name
    fingerprint: Sha256  # sha256 of the anchor file
    images: int = Field(ge=4)
    image_size: int = Field(ge=16, le=1024)


class PeerCard(Frozen):
    """One hospital's node: what the others must know to reach and to recognise it."""

    name: PeerName
    address: Address  # where the others connect, host:port
    key: PublicKey  # the node's key: it logs in, signs, and is the host key of an embedded inbox
    # The next three only where the inbox is an existing SFTP server (see `hsl-node inbox provision`).
    host_key: PublicKey | None = None
    user: Text = Field("{sender}", max_length=64)  # login name on that server; {sender} = the sending peer
    root: str = Field(
        "", max_length=200, pattern=r"^[A-Za-z0-9._/{}-]*$"
    )  # folder that holds parts/, inbox/, receipts/

    @property
    def fingerprint(self) -> str:
        """As `ssh-keygen -l` shows it."""
        return fingerprint(self.key)


class Federation(Frozen):
    """The agreed list of peers, their keys, the plan and the anchor set. The same file for everybody."""

    version: Literal[1] = 1
    name: Name
    anchor: AnchorCard | None = None
    plan: Plan = Plan()
    peer: tuple[PeerCard, ...] = Field(min_length=2, max_length=PEERS_MAX)

    @model_validator(mode="after")
    def _consistent(self) -> Federation:
        for what, values in (
            ("name", [p.name for p in self.peer]),
            ("key", [p.key for p in self.peer]),
            ("address", [p.address for p in self.peer]),
        ):
            twice = {v for v in values if values.count(v) > 1}
            if twice:
                raise ValueError(f"two peers have the same {what}: {', '.join(sorted(twice))}")
        if self.plan.method == "hsl" and self.anchor is None:
            raise ValueError("anchor: the method hsl needs an anchor set (hsl-node anchor build)")
        if self.plan.method == "hsl" and self.anchor and self.anchor.image_size != self.plan.image_size:
            raise ValueError(f"anchor: built at {self.anchor.image_size} px, the plan says {self.plan.image_size} px")
        peers_min = FUSION_RULES[self.plan.fusion].peers_min
        if len(self.peer) < peers_min:
            raise ValueError(
                f'plan.fusion: "{self.plan.fusion}" needs {peers_min} peers or more, here are {len(self.peer)}: '
                'with fewer it is the mean and protects from nothing; set fusion = "mean", or invite another peer'
            )
        return self

    @property
    def peers(self) -> tuple[Peer, ...]:
        """All names, sorted: the order of every fusion."""
        return tuple(sorted(Peer(p.name) for p in self.peer))

    def get(self, name: str) -> PeerCard:
        for peer in self.peer:
            if peer.name == name:
                return peer
        raise UsageError(f"{name!r} is not a peer of {self.name!r}", remedy=f"peers: {', '.join(self.peers)}")

    @property
    def digest(self) -> Digest:
        """sha256 over the content: comments, line ends and the order of the tables don't matter."""
        content = self.model_dump(mode="json")
        content["peer"] = sorted(content["peer"], key=lambda p: str(p["name"]))
        return Digest(hashlib.sha256(canonical_json(content)).hexdigest())

    @property
    def fed8(self) -> str:
        return self.digest[:8]


class DataConfig(Frozen):
    """Where this hospital's images are. Read in place, never written to."""

    path: Path | None = None  # folder with a folder per class | table .csv | .npz | None: not set yet
    filter: dict[str, str] = {}  # rows of a table to use, column -> value
    columns: dict[str, str] = {}  # path, label, patient, site, split -> the table's own column names
    labels: dict[str, str] = {}  # the source's own label -> class of the plan
    exclude: tuple[str, ...] = ()  # file names to leave out
    window_center: float | None = None  # DICOM, where the file's own window is unwanted
    window_width: float | None = Field(None, gt=0)


class TrainConfig(Frozen):
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    threads: int = Field(0, ge=0, le=1024)  # 0: all cores; fixed for a whole run, since results depend on it
    backbone_weights: Path | None = None  # local file whose sha256 the plan names


class InboxConfig(Frozen):
    kind: Literal["embedded", "directory"] = "embedded"
    directory: Path | None = None  # kind = "directory": the folder that holds a home folder per sender
    quota_mib: int = Field(4096, ge=64)  # per peer

    @model_validator(mode="after")
    def _consistent(self) -> InboxConfig:
        if self.kind == "directory" and self.directory is None:
            raise ValueError('inbox.directory: needed where kind = "directory"')
        return self


class NodeConfig(Frozen):
    """node.toml: what is private to this site."""

    name: PeerName
    address: Address
    listen: Listen = "0.0.0.0:8922"
    anchor: Path | None = None  # default: anchor.safetensors in the state directory
    client: Literal["asyncssh", "paramiko"] = "asyncssh"
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    inbox: InboxConfig = InboxConfig()


# ---------------------------------------------------------------- reading and writing


def load_node(state: Path) -> NodeConfig:
    path = state / "node.toml"
    if not path.exists():
        raise NotInitialised(f"{state} holds no node.toml", remedy=nothing_here(state))
    return read_toml(path, NodeConfig)


def load_federation(state: Path) -> Federation:
    path = state / "federation.toml"
    if not path.exists():
        raise NotInitialised(
            f"{state} holds no federation.toml", remedy="run `hsl-node federation join federation.toml`"
        )
    return read_toml(path, Federation)


def read_federation(path: Path) -> Federation:
    """A federation file that somebody named."""
    try:
        return read_toml(path, Federation)
    except ConfigError as exc:
        try:
            name = load_card(path).name
        except ConfigError:
            raise exc from None
        raise ConfigError(
            f"{path} is a peer card, that of {name}, and no federation file",
            remedy="give the federation.toml that came back: `hsl-node federation create` makes it of all cards",
        ) from exc


def load_plan(path: Path | None, settings: Sequence[str] = ()) -> Plan:
    """A plan file (none: the defaults), then `key=value` settings: TOML values, bare words, or lists as `a,b`."""
    source = path or Path("--set")
    text = read_text(path) if path else ""
    raw = parse(source, text)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting!r} is not of the form key=value", remedy="e.g. --set rounds=10")
        raw[key.strip()] = _setting(value.strip())
    return validate(source, text, raw, Plan)


def load_card(path: Path) -> PeerCard:
    """A peer card: the peer's table, plus a fingerprint that must agree with the key."""
    text = read_text(path, CARD_MAX_BYTES)
    raw = parse(path, text)
    claimed = raw.pop("fingerprint", None)
    raw.pop("read_aloud", None)
    card = validate(path, text, raw, PeerCard)
    if claimed is not None and claimed != card.fingerprint:
        raise ConfigError(
            f"{path}: the fingerprint does not belong to the key: the card was changed on its way",
            remedy=f"ask {card.name} for the card again and compare the fingerprint by phone",
        )
    return card


def card_text(card: PeerCard) -> str:
    content = card.model_dump(mode="json", exclude_defaults=True)
    return (
        f"# Peer card of {card.name}: mail it, then compare the fingerprint by phone. It holds no secret.\n"
        + tomli_w.dumps({**content, "fingerprint": card.fingerprint, "read_aloud": read_aloud(card.key)})
    )


def federation_text(federation: Federation) -> str:
    content = _without_none(federation.model_dump(mode="json"))
    return (
        f"# Federation {federation.name!r}, hash {federation.fed8}. Identical at every peer: do not edit, make a\n"
        "# new one with `hsl-node federation create` and let everybody join it again.\n" + tomli_w.dumps(content)
    )


def fingerprint(public_key: str) -> str:
    blob = base64.b64decode(public_key.split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def read_aloud(public_key: str) -> str:
    """The first 80 bits of the key's hash in groups of four, for the telephone."""
    digits = hashlib.sha256(base64.b64decode(public_key.split()[1])).hexdigest()[:20]
    return " ".join(digits[i : i + 4] for i in range(0, 20, 4))


FINGERPRINT_FORMS = 'as SHA256:... or as the five groups of four in quotes, "0123 4567 89ab cdef 0123"'


def is_fingerprint_of(said: str, public_key: str) -> bool:
    """Is this what a person was told of that key? Either form counts, whole; spaces don't.

    80 bits are enough: who wants another key taken has to find one with the same, about 2^80 tries. Two keys alike
    (2^40) are of no use: the key that is read aloud is its hospital's own.
    """
    typed = "".join(said.split())
    return typed == fingerprint(public_key) or typed.lower() == read_aloud(public_key).replace(" ", "")


def not_the_fingerprint(said: str | None, of_what: str) -> str:
    """What is wrong with it: nothing was said, it is none, or another key's."""
    if not said:
        return f"no fingerprint was given for {of_what}"
    if not re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}|[0-9a-fA-F]{20}", "".join(said.split()), re.ASCII):
        return f"{said!r} is no whole fingerprint, neither {FINGERPRINT_FORMS.replace(' or as', ' nor as')}"
    return f"{said!r} is not the fingerprint of {of_what}"


def split_address(text: str) -> tuple[str, int]:
    """`host:port` or `[v6]:port`; ('', 0) where it is neither."""
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9.-]+)):([0-9]{1,5})", text)
    return (found[1] or found[2], int(found[3])) if found else ("", 0)


def differences(ours: Federation, theirs: Federation) -> list[str]:
    """Every setting in which two federation files differ, as `key: ours -> theirs`; empty when they agree."""
    mine, other = dict(_flat(_comparable(ours))), dict(_flat(_comparable(theirs)))
    return [
        escaped(f"{key}: {mine.get(key, 'absent')} -> {other.get(key, 'absent')}", 400)
        for key in sorted(mine.keys() | other.keys())
        if mine.get(key) != other.get(key)
    ]


def require_member(federation: Federation, name: str, public_key: str) -> PeerCard:
    """Our entry in the federation.

    Raises:
        FederationMismatch: our name is absent, or stands there with another key.
    """
    ours = [p for p in federation.peer if p.key == _ed25519(public_key)]
    if not ours:
        raise FederationMismatch(
            f"this node's own key ({fingerprint(public_key)}) does not appear in federation {federation.name!r}",
            remedy="send your peer card (`hsl-node card`) to whoever makes the file, and ask for a new one",
        )
    if ours[0].name != name:
        raise FederationMismatch(
            f"federation {federation.name!r} lists this node's key as {ours[0].name!r}, node.toml says {name!r}",
            remedy="make the two names agree",
        )
    return ours[0]


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def _comparable(federation: Federation) -> dict[str, Any]:
    content = federation.model_dump(mode="json")
    content["peer"] = {str(p["name"]): p for p in content["peer"]}
    return content


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value


def _setting(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # TOMLDecodeError, or a number of 5000 digits; nested too deeply
        return [_setting(part.strip()) for part in text.split(",")] if "," in text else text
