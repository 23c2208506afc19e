"""A model taken away: one folder that predicts by itself, on a machine without a node. No torch.

model.safetensors   all tensors, and `anchor_reference` (512,): no anchor set is needed to predict
model.json          what it is, how an image becomes its input, and what its output means
CARD.md             the same for people, so that another program can repeat it, with a worked example
example.png         the example's picture: drawn, of nobody
model.onnx          where it was asked for: pixels (N, 3, S, S) in 0..1 -> probabilities (N,) of class 1, or (N, C)
SHA256SUMS          of all these, as `sha256sum -c` reads it
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from hsl_node.errors import ConfigError, UsageError, escaped
from hsl_node.federation.names import Digest
from hsl_node.federation.plan import Plan
from hsl_node.federation.strings import Frozen, Sha256
from hsl_node.train.data.preprocessing import Preprocessing
from hsl_node.weights.whole import sha256_of

WEIGHTS_FILE, CARD_FILE, ONNX_FILE = "model.safetensors", "model.json", "model.onnx"
WORDS_FILE, EXAMPLE_FILE, SUMS_FILE = "CARD.md", "example.png", "SHA256SUMS"
NEEDED = (WEIGHTS_FILE, CARD_FILE, WORDS_FILE, EXAMPLE_FILE)
REFERENCE = "anchor_reference"
FORMAT = 2  # 1: the first released form, which did not say how an image becomes the input
CARD_MAX_BYTES = 1024 * 1024  # a plan of 100 classes and a federation of 100 peers: 60 KiB

_EXPORT_AGAIN = "on the node that it came from, export it again: hsl-node export --out DIR"
_COPY_AGAIN = "copy the whole folder again from where it was exported to, and change nothing in it"
_THE_FOLDER = "give the folder that hsl-node export wrote, on the node that the model comes from"


class Decision(Frozen):
    """From which probability on an image counts as of the positive class, and how that was chosen."""

    threshold: float = Field(ge=0, le=1)
    rule: str  # in words


class Computed(Frozen):
    """What the node computed with. Precision and threads show in the figures, and are taken again elsewhere."""

    precision: Literal["float32", "bfloat16"]
    threads: int = Field(ge=1)
    device: str
    processor: str


class Card(Frozen):
    """The part of model.json that predictions are made of; the rest is for people."""

    classes: tuple[str, ...] = Field(min_length=2)
    decision: Decision | None
    preprocessing: Preprocessing
    plan: Plan  # the network is rebuilt from its method and architecture
    hardware: Computed
    kind: Literal["own", "fused", "recalibrated"] = "fused"  # own: of one hospital, trained on from a fused model
    round: int
    why: str = ""  # it was taken, in words
    source_weights_sha256: Sha256  # of the fused model as the federation knows it, or of the hospital's own file

    @model_validator(mode="after")
    def _consistent(self) -> Card:
        if self.classes != self.plan.classes or self.preprocessing.image_size != self.plan.image_size:
            raise ValueError("classes and image size stand there twice, and differ")
        return self


def positive(classes: tuple[str, ...]) -> str | None:
    """The class whose probability a threshold is compared with: the second of two."""
    return classes[1] if len(classes) == 2 else None


def read_card(folder: Path) -> Card:
    """The card of an exported folder whose files are all those that were exported.

    Raises:
        UsageError: there is no such folder, or no exported model in it.
        ConfigError: a file is missing, cut or altered, each by name; or another version exported it.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UsageError(f"--model {folder} {what}", remedy=_THE_FOLDER)
    if not (folder / CARD_FILE).exists() and not (folder / SUMS_FILE).exists():
        raise UsageError(f"--model {folder} holds no exported model", remedy=_THE_FOLDER)
    path = folder / CARD_FILE
    try:
        with open(path, "rb") as file:
            data = file.read(CARD_MAX_BYTES)
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing", remedy=_COPY_AGAIN) from None
    except OSError as exc:
        raise _unreadable(path, exc) from exc
    _content_of(data, path)  # a card of another version is told before anything is said about its files
    _require_whole(folder)
    return parse_card(data, path)


def parse_card(data: bytes, path: Path) -> Card:
    """Raises: ConfigError: no card, or one of another version."""
    content = _content_of(data, path)
    try:
        return Card.model_validate_json(json.dumps({key: content.get(key) for key in Card.model_fields}))
    except ValidationError as exc:
        place = escaped(".".join(str(part) for part in exc.errors()[0]["loc"][:2]))
        raise ConfigError(
            f"{path} is not understood by this version of hsl-node: {place or 'its settings'}",
            remedy=f"use the version of hsl-node that exported it ({_versions(content)}), or {_EXPORT_AGAIN}",
        ) from exc


def sums_text(digests: Mapping[str, Digest]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def _content_of(data: bytes, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} was cut or altered after the export: it is no card", remedy=_COPY_AGAIN)
    match content.get("format"):
        case 1:
            raise ConfigError(
                f"{path} was exported by an earlier version of hsl-node ({_versions(content)}), which did not write"
                " down how an image becomes the network's input",
                remedy=_EXPORT_AGAIN,
            )
        case int(number) if number > FORMAT:
            raise ConfigError(
                f"{path} was exported by a later version of hsl-node ({_versions(content)})",
                remedy="upgrade hsl-node here: `hsl-node version` names the one that is installed",
            )
    return content


def _require_whole(folder: Path) -> None:
    """Every file is the one that was exported."""
    listed = _listed(folder)
    for name in (*NEEDED, *sorted(listed.keys() - set(NEEDED))):
        path = folder / name
        if name not in listed:
            raise ConfigError(f"{folder / SUMS_FILE} was cut or altered: no line for {name}", remedy=_COPY_AGAIN)
        try:
            found = sha256_of(path)
        except FileNotFoundError:
            raise ConfigError(f"{path} is missing, and {SUMS_FILE} names it", remedy=_COPY_AGAIN) from None
        except OSError as exc:
            raise _unreadable(path, exc) from exc
        if found != listed[name]:
            raise ConfigError(
                f"{path} was cut or altered after the export: its sha256 is {found[:12]}..., {SUMS_FILE} says"
                f" {listed[name][:12]}...",
                remedy=_COPY_AGAIN,
            )


def _listed(folder: Path) -> dict[str, str]:
    """Name -> sha256, as SHA256SUMS has it."""
    path = folder / SUMS_FILE
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing", remedy=_COPY_AGAIN) from None
    except (OSError, UnicodeDecodeError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "it is no text"
        raise ConfigError(f"{path} cannot be read: {why}", remedy=_COPY_AGAIN) from exc
    found = {}
    for line in lines:
        match = re.fullmatch(r"([0-9a-f]{64})  ([A-Za-z0-9_.-]+)", line)
        if match is None:
            raise ConfigError(f"{path} was cut or altered: {line[:80]!r} is no line of it", remedy=_COPY_AGAIN)
        found[match[2]] = match[1]
    return found


def _unreadable(path: Path, exc: OSError) -> ConfigError:
    return ConfigError(f"{path} cannot be read: {exc.strerror}", remedy="see that this user may read it")


def _versions(content: Mapping[str, Any]) -> str:
    said = content.get("versions")
    return f"hsl-node {escaped(str(said.get('hsl_node')), 40)}" if isinstance(said, dict) else "version unknown"
